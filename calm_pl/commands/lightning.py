"""``calm fit | validate | test | predict | extract``: Lightning's own command line over the files in ``conf/``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from calm_pl.conf import CONF_DIR, GROUPS, config_names, find_config, given_options

if TYPE_CHECKING:
    from calm_pl.run.cli import CalmCLI

TARGETS = {"--backbone": "--data.backbone", "--logger": "--trainer.logger"}
CONFIG_OPTIONS = ("--config", "-c")
# What other commands and `make train` call by a word; here a word has its place.
PLACES = {
    "--shots": "--data.shots", "--seed": "--data.seed", "--store": "--data.store", "--protocol": "--data.protocol",
    "--data_dir": "--data.recipe.init_args.data_dir", "--heads": "--data.backbone.heads",
    "--devices": "--trainer.devices", "--precision": "--trainer.precision", "--out": "--run_dir",
}  # fmt: skip

NO_GPU = (
    "torch sees no GPU here. --trainer.accelerator auto takes what there is; with an NVIDIA GPU, see whether "
    "nvidia-smi lists it and whether this torch was built for CUDA (python -m torch.utils.collect_env)"
)
LOST_WORKER = (
    "a process that decodes clips was killed: the memory was full or, in a container, the shared memory (docker run "
    "--ipc=host). A smaller --data.num_workers or --data.batch_size needs less"
)


def main(argv: list[str]) -> int:
    """Parse, run, and turn the errors a user can mend into one line and exit code 1."""
    for option in given_options(argv):
        if option in PLACES:
            sys.exit(f"calm: error: {option} is called {PLACES[option]} here")
    arguments = expand_names(argv)
    from calm_pl.run.cli import CalmCLI

    run(CalmCLI, arguments)
    return 0


def run(cli: type[CalmCLI], arguments: list[str]) -> None:
    """Run the command; errors that the user can mend are told without a traceback (CALM_DEBUG=1 shows it)."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from calm_pl.backbone.errors import BackboneError
    from calm_pl.headstore import HeadStoreError
    from calm_pl.run.cli import checkpoint_arguments

    if not os.environ.get("CALM_DEBUG"):
        hush()
    try:
        # Lightning starts further processes with sys.argv, so it must say what this process was told.
        sys.argv[1:] = checkpoint_arguments(arguments)
        cli()
    except (
        BackboneError, HeadStoreError, MisconfigurationException, ValueError, FileNotFoundError, ModuleNotFoundError
    ) as error:  # fmt: skip
        if os.environ.get("CALM_DEBUG"):
            raise
        sys.exit(f"calm: error: {NO_GPU if 'No supported gpu backend' in str(error) else error}")
    except RuntimeError as error:
        if os.environ.get("CALM_DEBUG") or not str(error).startswith("DataLoader worker"):
            raise
        sys.exit(f"calm: error: {LOST_WORKER} ({error})")


def hush() -> None:
    """Silence advice that Lightning has for training loops of another kind; CALM_DEBUG=1 lets it speak."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "You have overridden `transfer_batch_to_device`",
        "Couldn't infer the batch indices",
        "`LightningModule.configure_optimizers` returned `None`",
        "Total length of `.*` across ranks is zero",
        "Your `IterableDataset` has `__len__` defined",
        "predict returned None",  # of a batch whose clips cannot be used, which is told by name
        "The '.*' does not have many workers",
        "It is recommended to use `self.log\\(.*sync_dist=True",  # what is logged was gathered over ranks already
    ):
        warnings.filterwarnings("ignore", message=message)


def shipped_defaults() -> list[str]:
    """Recipe and backbone that ``calm fit`` starts from, for commands with a parser of their own."""
    import yaml

    data = yaml.safe_load((CONF_DIR / "calm.yaml").read_text())["data"]
    return [f"--data.recipe={data['recipe']['class_path']}", f"--data.backbone={CONF_DIR / data['backbone']}"]


def expand_names(argv: list[str]) -> list[str]:
    """Replace short names by what Lightning's parser takes.

    ``--data esc50`` becomes ``--data <conf>/data/esc50.yaml``; ``--backbone`` takes a shipped name, a file, a folder
    or a hub id; ``--option=value`` works as well. The first argument is the command and stays first. Names and
    ``--config`` come next, in their order, and single options last: those hold wherever they stand, or
    ``--data.backbone.heads both --backbone FOLDER`` would lose its heads to what the backbone begins with.
    """
    named, single = [], []
    rest = list(argv[1:])
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        if option not in GROUPS and option not in CONFIG_OPTIONS:
            single.append(argument)
            continue
        if not equals:
            if not rest:
                expected = f"one of {', '.join(config_names(GROUPS[option]))}" if option in GROUPS else "a file"
                sys.exit(f"calm: error: {option} needs a value: {expected}")
            value = rest.pop(0)
        named += _expand(option, value)
    return [argv[0], *named, *single]


def _expand(option: str, value: str) -> list[str]:
    if option in CONFIG_OPTIONS:
        if not Path(value).is_file():
            sys.exit(f"calm: error: {option} {value}: there is no such file")
        return [option, value]
    group, target = GROUPS[option], TARGETS.get(option, option)
    shipped = find_config(group, value)
    if shipped:
        return [target, str(shipped)]
    if Path(value).is_file():
        return [target, value]
    if option == "--backbone":
        # The default configuration's heads are calm-tiny's; another model starts from its decoder.
        return [f"{target}.path", value, f"{target}.heads", "decoder"]
    if value in ("true", "false", "null"):
        return [target, value]
    sys.exit(
        f"calm: error: {option} {value}: no such file, and no {value}.yaml in {CONF_DIR / group}; "
        f"shipped are {', '.join(config_names(group))}"
    )
