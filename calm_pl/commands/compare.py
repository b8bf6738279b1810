"""``calm compare``: methods over shots, seeds and folds on the same heads."""

from __future__ import annotations

import sys
from pathlib import Path

from calm_pl.commands.lightning import expand_names, hush, shipped_defaults
from calm_pl.conf import CONF_DIR, given_options, names_help

# What `calm fit` calls otherwise.
NAMES = {
    "--data.shots": "--shots (as in --shots 1,5,20)",
    "--data.seed": "--seeds (how many support sets are drawn in each fold)",
    "--trainer.precision": "--precision", "--run_dir": "--out",
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Parse, extract what is missing, fit everything, tell the result."""
    for option in given_options(argv):
        if option in NAMES:
            sys.exit(f"calm: error: {option} is called {NAMES[option]} here")
    refuse_zero_shot(argv)
    arguments = expand_names(["compare", *argv])[1:]
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Trainer

    from calm_pl.backbone.errors import BackboneError
    from calm_pl.data.datamodule import AudioEpisodeDataModule
    from calm_pl.headstore import HeadStoreError
    from calm_pl.report.methods import report
    from calm_pl.training.comparison import run_comparison
    from calm_pl.training.module import CalmModule

    parser = ArgumentParser(
        prog="calm compare",
        description="Compare methods on the same heads over shots, seeds and folds (all folds that a data set has).",
        parser_mode="omegaconf",
        **names_help("--data", "--backbone", "--model"),
    )
    parser.add_argument("--shots", default="1,2,5,10,20", help="clips a class, separated by commas")
    parser.add_argument("--seeds", type=int, default=20, help="how many support sets are drawn in each fold")
    parser.add_argument(
        "--splits",
        type=int,
        default=1,
        help="random splits, sources kept apart, of data without folds or a split of their own",
    )
    parser.add_argument("--out", default="runs/comparison", help="folder for rows.csv, figures and plot")
    parser.add_argument("--precision", default="32-true", help="of the backbone, as in Lightning's Trainer")
    parser.add_class_arguments(CalmModule, "model", skip={"optimizer", "lr_scheduler"})
    parser.add_class_arguments(AudioEpisodeDataModule, "data", skip={"shots", "seed"})
    options = parser.parse_args([f"--model={CONF_DIR / 'model' / 'default.yaml'}", *shipped_defaults(), *arguments])
    shots = [int(count) if count.strip().isdigit() else 0 for count in options.shots.split(",")]
    if min(*shots, options.seeds, options.splits) < 1:
        given = f"--shots {options.shots} --seeds {options.seeds} --splits {options.splits}"
        sys.exit(f"calm: error: {given}: numbers from 1, as in --shots 1,5,20")
    hush()
    built = parser.instantiate(options)
    out, seeds = Path(options.out), range(options.seeds)
    methods, settings = built.model.methods, options.model.as_dict()["methods"]
    trainer = Trainer(devices=1, precision=options.precision, logger=False, enable_checkpointing=False)
    try:
        rows = run_comparison(trainer, built.data, methods, settings, shots, seeds, out, options.splits)
    except (BackboneError, HeadStoreError, ValueError, FileNotFoundError) as error:
        sys.exit(f"calm: error: {error}")
    report(rows, out)
    return 0


def refuse_zero_shot(argv: list[str]) -> None:
    """Exit where the model shall be asked in words too: the methods alone are compared.

    Models say ``zero_shot: true`` for `calm fit` unless told otherwise, so what is parsed does not tell who wants it.
    """
    for option, value in given_options(argv).items():
        if option == "--model.zero_shot_by" or (option == "--model.zero_shot" and value.lower() != "false"):
            sys.exit(
                f"calm: error: {option} does not count here: nothing is asked in words. `calm fit` takes it, "
                "and so does a sweep over shots and seeds: calm sweep shots --model.zero_shot true"
            )
