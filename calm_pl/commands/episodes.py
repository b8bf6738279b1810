"""``calm episodes``: every method on the N-way K-shot episodes of the few-shot literature."""

from __future__ import annotations

import sys
from pathlib import Path

from calm_pl.commands.compare import refuse_zero_shot
from calm_pl.commands.lightning import expand_names, hush, shipped_defaults
from calm_pl.conf import CONF_DIR, names_help


def main(argv: list[str]) -> int:
    """Parse, extract what is missing, run the episodes, tell the result."""
    refuse_zero_shot(argv)
    arguments = expand_names(["episodes", *argv])[1:]
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Trainer

    from calm_pl.backbone.errors import BackboneError
    from calm_pl.data.datamodule import AudioEpisodeDataModule
    from calm_pl.headstore import HeadStoreError
    from calm_pl.report.methods import report
    from calm_pl.training.few_shot import run_episodes
    from calm_pl.training.module import CalmModule

    parser = ArgumentParser(
        prog="calm episodes",
        description="Evaluate methods as the few-shot literature does: many random episodes of some classes, support "
        "clips from the training clips and queries from the test clips; mean accuracy with its 95 % interval.",
        parser_mode="omegaconf",
        **names_help("--data", "--backbone", "--model"),
    )
    parser.add_argument("--way", type=int, default=5, help="classes of an episode")
    parser.add_argument("--queries", type=int, default=15, help="query clips a class")
    parser.add_argument("--count", type=int, default=600, help="episodes")
    parser.add_argument("--out", default="runs/episodes", help="folder for rows.csv, figures and plot")
    parser.add_argument("--precision", default="32-true", help="of the backbone, as in Lightning's Trainer")
    parser.add_class_arguments(CalmModule, "model", skip={"optimizer", "lr_scheduler"})
    parser.add_class_arguments(AudioEpisodeDataModule, "data")
    options = parser.parse_args([f"--model={CONF_DIR / 'model' / 'default.yaml'}", *shipped_defaults(), *arguments])
    hush()
    built = parser.instantiate(options)
    trainer = Trainer(devices=1, precision=options.precision, logger=False, enable_checkpointing=False)
    out, data = Path(options.out), built.data
    settings = options.model.as_dict()["methods"]
    try:
        if data.shots is None:
            raise ValueError("an episode has so many support clips a class: give --data.shots.")
        asked = (options.way, data.shots, options.queries, options.count)
        rows = run_episodes(trainer, data, built.model.methods, settings, *asked, out)
    except (BackboneError, HeadStoreError, ValueError, FileNotFoundError) as error:
        sys.exit(f"calm: error: {error}")
    report(rows, out, over=f"{options.count} episodes, {options.way}-way")
    return 0
