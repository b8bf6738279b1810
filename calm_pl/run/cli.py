"""LightningCLI with this project's defaults: composed configs, run folders, tests after fitting."""

from __future__ import annotations

import atexit
import os
import re
import tempfile
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from calm_pl.conf import CONF_DIR, given_options, names_help
from calm_pl.data.datamodule import AudioEpisodeDataModule, default_run_dir
from calm_pl.progress import say
from calm_pl.run.folder import (
    CHECKPOINTS,
    ON_OTHER_DATA,
    PREDICTIONS_FILE,
    RunFolder,
    SaveRunConfig,
    check_run_folder,
)
from calm_pl.run.folds import folds_of, run_folds
from calm_pl.run.logging import LogRun
from calm_pl.training.module import CHECKPOINT_KEY, CalmModule
from calm_pl.training.progress import RunProgress
from calm_pl.training.results import outcome, print_table
from calm_pl.training.trainer import CalmTrainer

LAST_CHECKPOINT = Path(CHECKPOINTS) / "last.ckpt"
# What may be a path in a configuration; a run must be found again from any folder.
PATHS = ("recipe.init_args.data_dir", "backbone.path", "backbone.adapter", "pseudo_labels", "unlabelled", "store")
UNFIT = re.compile(r"[^\w.-]+")  # for the name of a folder
LIGHTNINGS_WORDS = ("best", "last", "hpc")  # in place of a checkpoint's name
BUILT_IN = ("calm-tiny", "random-qwen2-audio", "none")


class CalmCLI(LightningCLI):
    """``calm fit`` learns, saves and tests; ``validate``, ``test`` and ``predict`` take a checkpoint alone.

    Args:
        config: what to run; None takes it from the command line.
        about: what this run is a part of; its results are then told in one line instead of a table.
    """

    def __init__(self, config: Namespace | None = None, about: str | None = None) -> None:
        self.given, self.about = config, about
        defaults = {"parser_mode": "omegaconf", "default_config_files": [str(CONF_DIR / "calm.yaml")], **names_help()}
        super().__init__(
            CalmModule,
            AudioEpisodeDataModule,
            trainer_class=CalmTrainer,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [RunFolder(), LogRun()]},
            seed_everything_default=0,
            parser_kwargs={
                "parser_mode": "omegaconf",
                "formatter_class": defaults["formatter_class"],  # commands take it from their parent
                **dict.fromkeys(self.subcommands(), defaults),
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "extract": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="folder for results; default: runs/<dataset>-<backbone>-<shots>shot-seed<seed>",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=True,
            help="test right after fitting, where there are test clips",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if self.given is None:
            super().parse_arguments(parser, args)
        else:
            self.config = parser.parse_object(self.given)

    def before_instantiate_classes(self) -> None:
        """Give the run its folder, and its checkpoint a place in it."""
        config = self.config[self.subcommand]
        if self.subcommand in ("test", "validate", "predict") and config.ckpt_path is None:
            raise ValueError(f"calm {self.subcommand} wants a run that was fitted: name it by --ckpt_path RUN")
        data = config.data
        for name in PATHS:
            value = data.get(name)
            if isinstance(value, str) and value not in BUILT_IN and Path(value).expanduser().exists():
                data[name] = str(Path(value).expanduser().absolute())
        backbone = data.backbone.path
        if data.backbone.modality != "audio":
            backbone += f"-{data.backbone.modality}"
        run_dir = config.run_dir or default_run_dir(
            dataset_name(data.recipe.class_path, data.recipe.init_args.get("data_dir")),
            backbone,
            data.shots,
            data.seed,
        )
        if not config.run_dir and data.recipe.init_args.get("test_fold") == "all":
            run_dir = f"{run_dir}-all-folds"
        config.run_dir = str(run_dir)
        if self.subcommand == "fit":
            check_run_folder(Path(run_dir))
        self.asked = self.config.clone()
        if self.subcommand != "extract":  # whose work goes to the head store
            config.trainer.default_root_dir = str(run_dir)
        logger = config.trainer.logger
        if isinstance(logger, Namespace) and logger.init_args.get("save_dir", ".") in (None, ""):
            logger.init_args.save_dir = str(run_dir)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Lightning's Trainer with this project's progress display, unless the user wants none."""
        if self.config[self.subcommand].trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(RunProgress())
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except TypeError as error:  # of devices=two, say
            raise ValueError(f"the Trainer cannot be made: {error}") from error
        if trainer.num_nodes > 1 and trainer.is_global_zero:
            say(f"{trainer.num_nodes} nodes of {trainer.num_devices} processes: each waits for all others")
        return trainer

    def after_instantiate_classes(self) -> None:
        self._dump_config()
        self.model.run_config = yaml.safe_dump(self.config_dump, sort_keys=False)

    def fit(self, **arguments: Any) -> None:
        """Lightning's fit; with ``test_fold: all`` one of each fold."""
        if folds_of(self.datamodule.recipe):
            run_folds(self)
        else:
            self.trainer.fit(**arguments)

    def after_fit(self) -> None:
        """Keep the checkpoint that a run is tested again from, and test it."""
        if self.config[self.subcommand].trainer.fast_dev_run or folds_of(self.datamodule.recipe):
            return
        folder = Path(self.trainer.default_root_dir)
        self.trainer.save_checkpoint(folder / LAST_CHECKPOINT)
        if self.trainer.is_global_zero:
            for interrupted in folder.glob("hpc_ckpt_*.ckpt"):  # Lightning's, of a SLURM job that went on: it is done
                interrupted.unlink()
        if self.config[self.subcommand].test_after_fit and self.datamodule.usable("test"):
            self.trainer.test(self.model, self.datamodule, verbose=False)
            self.after_test()
        elif self.trainer.is_global_zero:
            print(f"not tested; run folder: {folder.resolve()}")

    def after_test(self) -> None:
        """One table, and where everything lies."""
        if not self.trainer.is_global_zero:
            return
        results = self.model.results()
        if self.about:
            print(f"{self.about}: {', '.join(outcome(results, name) for name in results['methods'])}", flush=True)
        else:
            print_table(results, results["splits"]["test"])
            print(f"run folder: {Path(self.trainer.default_root_dir).resolve()}")

    def after_predict(self) -> None:
        """Where the predictions are."""
        if self.trainer.is_global_zero:
            print(f"predictions: {Path(self.trainer.default_root_dir).resolve() / PREDICTIONS_FILE}")

    def after_validate(self) -> None:
        """The same table of the validation clips, where there are any."""
        clips = len(self.datamodule.usable("val"))
        if self.trainer.is_global_zero and clips:
            print_table(self.model.results(), clips, "validation")
        elif self.trainer.is_global_zero:
            print(f"{self.datamodule.recipe.name} has no validation clips: nothing was validated; see calm test")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if "verbose" in kwargs:
            kwargs["verbose"] = False  # our own table instead of Lightning's, one line a figure
        if "weights_only" in kwargs:
            kwargs["weights_only"] = True  # a checkpoint is data, never code
        return kwargs


def recipe_name(class_path: str) -> str:
    """The name a recipe is filed under, from its class."""
    module, _, name = class_path.rpartition(".")
    return str(getattr(import_module(module), name).name)


def dataset_name(class_path: str, data_dir: str | None) -> str:
    """The name of a recipe; of your own data with that of its folder or manifest, which is a data set each."""
    name = recipe_name(class_path)
    if name not in ("folder", "manifest") or not data_dir:
        return name
    own = Path(data_dir).expanduser().absolute()
    return f"{name}-{UNFIT.sub('-', own.name if own.is_dir() else own.stem)}"


def checkpoint_arguments(arguments: list[str]) -> list[str]:
    """Put the configuration kept in ``--ckpt_path`` before the other arguments, which may change it.

    So ``calm test --ckpt_path RUN`` needs nothing else; results go to the run that the checkpoint is of, those of
    another data set into a folder in it. A run folder stands for its last checkpoint. Arguments are returned as they
    are where there is no checkpoint, or where a ``--config`` is given.

    Raises:
        ValueError: no checkpoint of `calm fit`, or a damaged one.
    """
    arguments = list(chain.from_iterable(_apart(argument) for argument in arguments))
    given = [position for position, option in enumerate(arguments[:-1], 1) if option == "--ckpt_path"]
    for position in given:
        if (Path(arguments[position]) / LAST_CHECKPOINT).is_file():
            arguments[position] = str(Path(arguments[position]) / LAST_CHECKPOINT)
    if not given or "--config" in arguments or "-c" in arguments:
        return arguments
    file = Path(arguments[given[-1]])
    if file.is_dir():
        raise ValueError(f"--ckpt_path {file} is a folder without {LAST_CHECKPOINT}: `calm fit` leaves that in a run.")
    if not file.is_file():
        text = arguments[given[-1]]
        if text in LIGHTNINGS_WORDS or ":" in text:  # or an address, or "registry:..."
            return arguments
        raise ValueError(
            f"--ckpt_path {file} is not there: name a folder that `calm fit` left (its --run_dir, below runs/ by "
            "default), or a checkpoint file."
        )
    config = _kept_config(file)
    folder = file.resolve().parent
    run = folder.parent if folder.name == LAST_CHECKPOINT.parent.name else folder / file.stem
    other = _other_data(arguments, config["data"]["recipe"])
    config["run_dir"] = str(run / f"{ON_OTHER_DATA}{other}" if other else run)
    # A file, and not a value, because further processes of a DDP run parse the same arguments again.
    descriptor, scratch = tempfile.mkstemp(prefix="calm-", suffix=".yaml")
    with os.fdopen(descriptor, "w") as handle:
        yaml.safe_dump(config, handle, sort_keys=False)
    atexit.register(os.unlink, scratch)
    return [arguments[0], "--config", scratch, *arguments[1:]]


def _kept_config(file: Path) -> dict[str, Any]:
    """The configuration that a checkpoint was fitted with, but for what counts in a fit alone."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        config: dict[str, Any] = yaml.safe_load(checkpoint[CHECKPOINT_KEY]["config"])
    except Exception as error:  # whatever torch makes of bytes that are no checkpoint
        raise ValueError(
            f"--ckpt_path {file} is damaged, or no checkpoint of `calm fit`, which keeps its configuration there "
            f"({type(error).__name__}): name another run, or give --config too."
        ) from error
    return {name: value for name, value in config.items() if name not in ("ckpt_path", "test_after_fit")}


def _other_data(arguments: list[str], recipe: dict[str, Any]) -> str | None:
    """The name of the data set that the arguments ask for, where it is not that of the recipe."""
    options, named = given_options(arguments), recipe
    if "--data" in options:
        named = (yaml.safe_load(Path(options["--data"]).read_text()) or {}).get("recipe") or recipe
    names = [
        dataset_name(one["class_path"], data_dir or (one.get("init_args") or {}).get("data_dir"))
        for one, data_dir in ((recipe, None), (named, options.get("--data.recipe.init_args.data_dir")))
    ]
    return names[1] if names[1] != names[0] else None


def _apart(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith(("--ckpt_path=", "--config=")) else [argument]
