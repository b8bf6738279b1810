"""``calm pseudolabel``: the backbone labels clips that nobody has labelled; ``calm fit`` learns from that."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calm_pl.commands.lightning import expand_names, hush, shipped_defaults
from calm_pl.conf import names_help

if TYPE_CHECKING:
    from calm_pl.clip import Clip
    from calm_pl.data.datamodule import AudioEpisodeDataModule

DESCRIPTION = (
    "Ask the backbone about unlabelled clips and write those that it is sure of as a manifest, with confidences. "
    "Either name --clips and --classes, and learn from the manifest with `calm fit --data manifest`; or name a data "
    "set with --data: its training clips are labelled without looking at their labels, `calm fit --data NAME "
    "--data.pseudo_labels MANIFEST` learns from that, and `calm report` sets it beside the run with true labels. "
    "Run it again after an interruption: it goes on where it was."
)


def main(argv: list[str]) -> int:
    """Label, write the manifest, tell what came of it. Exit code 1: no clip got a label."""
    arguments = expand_names(["pseudolabel", *argv])[1:]
    from jsonargparse import ArgumentParser

    from calm_pl.backbone.errors import BackboneError
    from calm_pl.data import write_manifest
    from calm_pl.data.datamodule import AudioEpisodeDataModule
    from calm_pl.data.manifest import check_writable
    from calm_pl.headstore import HeadStoreError
    from calm_pl.training.pseudolabels import Asking, pseudolabel
    from calm_pl.training.trainer import CalmTrainer

    named = names_help("--data", "--backbone")
    parser = ArgumentParser(prog="calm pseudolabel", description=DESCRIPTION, parser_mode="omegaconf", **named)
    parser.add_argument("--clips", type=str | None, help="folder of audio files at any depth, or a manifest")
    parser.add_argument("--classes", type=str | None, help="class names, separated by commas (default: the data set's)")
    parser.add_argument("--question", type=str | None, help="asked about every clip (default: the data set's)")
    parser.add_argument("--list_classes", type=bool, default=False, help="name all classes in the question, one a line")
    parser.add_argument("--out", default="pseudo-labels.jsonl", help="the manifest")
    parser.add_class_arguments(Asking, "asking")
    for name, default in (("devices", "1"), ("accelerator", "auto"), ("strategy", "auto"), ("precision", "32-true")):
        parser.add_argument(f"--{name}", default=default, help="as in Lightning's Trainer")
    parser.add_class_arguments(AudioEpisodeDataModule, "data", skip={"shots", "seed", "protocol", "pseudo_labels"})
    options = parser.parse_args([*shipped_defaults(), *arguments])
    hush()
    built = parser.instantiate(options)
    trainer = CalmTrainer(
        devices=int(options.devices) if options.devices.isdigit() else options.devices,
        accelerator=options.accelerator, strategy=options.strategy, precision=options.precision,
        logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    try:
        check_writable(options.out)  # before hours of asking
        clips, classes = _wanted(options.clips, options.classes, built.data)
        listed = "\n" + "\n".join(classes) if options.list_classes else ""
        if options.question or listed:
            usual = built.data.recipe.question
            clips = [replace(clip, question=(options.question or clip.question or usual) + listed) for clip in clips]
        found = pseudolabel(trainer, built.data, clips, classes, built.asking)
    except (BackboneError, HeadStoreError, ValueError, FileNotFoundError) as error:
        sys.exit(f"calm: error: {error}")
    if trainer.is_global_zero:
        if found:
            write_manifest(found, options.out)
        _tell(len(clips), found, classes, Path(options.out))
    return 0 if found else 1


def _wanted(source: str | None, names: str | None, data: AudioEpisodeDataModule) -> tuple[list[Clip], list[str]]:
    """The clips to ask about, and the class names to choose from."""
    from calm_pl.data.unlabelled import unlabelled_clips

    if source:
        clips, known = unlabelled_clips(source), set()
    else:
        data.recipe.prepare()
        every = data.asked(data.recipe.clips())
        known = {label for clip in every for label in clip.labels}
        clips = [clip for clip in every if clip.split == "train"]
    classes = [name.strip() for name in names.split(",")] if names else sorted(known)
    if len(set(classes)) < 2 or len(set(classes)) < len(classes) or "" in classes:
        raise ValueError("name at least two classes to choose from, each once: --classes 'dog bark,rain'.")
    return clips, classes


def _tell(asked: int, found: list[Clip], classes: list[str], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("class", "clips", "mean confidence", title=f"{len(found)} of {asked} clips got a label")
    without = []
    for name in classes:
        sure = [clip.confidence or 0.0 for clip in found if clip.label == name]
        table.add_row(name, str(len(sure)), f"{sum(sure) / len(sure):.2f}" if sure else "")
        without += [] if sure else [name]
    Console().print(table)
    if without:
        print(f"no clip was taken for {', '.join(without)}", file=sys.stderr)
    if found:
        print(out.resolve())
