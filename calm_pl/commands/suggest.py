"""``calm suggest``: of an unlabelled folder, the clips most worth labelling, as a manifest to fill."""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calm_pl.clip import Clip


def main(argv: list[str]) -> int:
    """Read the heads of the clips, rank them, write the manifest."""
    options = _parser().parse_args(argv)
    from calm_pl.backbone.errors import BackboneError
    from calm_pl.backbone.named import named_backbone
    from calm_pl.classifier import CalmClassifier
    from calm_pl.commands.lightning import hush
    from calm_pl.data.unlabelled import labelled_clips, unlabelled_clips
    from calm_pl.headstore import HeadStoreError
    from calm_pl.training.suggestions import Suggester

    hush()
    if options.count < 1:
        sys.exit(f"calm: error: --count {options.count}: at least 1 clip.")
    out = options.out.absolute()
    if _has_labels(out):
        sys.exit(f"calm: error: {out} holds labels: name another file with --out (and give this one to --labelled)")
    try:
        suggester = Suggester(
            unlabelled_clips(options.clips),
            labelled_clips(options.labelled) if options.labelled else (),
            CalmClassifier.from_pretrained(options.run, device="cpu") if options.run else None,
            named_backbone(options.backbone),
            batch_size=options.batch_size,
        )
        found = suggester.suggest(options.by or ("margin" if options.run else "coverage"), options.count)
    except (BackboneError, HeadStoreError, ValueError, FileNotFoundError) as error:
        sys.exit(f"calm: error: {error}")
    _write(out, found)
    print(f"{len(found)} of {len(suggester.clips)} clips to label: fill the column label, then")
    print(f"calm fit --data manifest --data.recipe.init_args.data_dir {shlex.quote(str(out))} --data.shots null")
    return 0


def _write(out: Path, suggested: Sequence[tuple[Clip, str]]) -> None:
    """Write clips as a CSV manifest without labels, each with what a classifier takes it for; whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    with scratch.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)  # a name may begin with a space
        above = os.path.realpath(out.parent)
        writer.writerow(["audio", "start", "end", "label", "prediction"])
        for clip, guess in suggested:
            times = ["" if second is None else second for second in (clip.start, clip.end)]
            folder, name = os.path.split(clip.audio)  # links to folders lead elsewhere than `..` in a text does
            writer.writerow([os.path.relpath(os.path.join(os.path.realpath(folder), name), above), *times, "", guess])
    scratch.replace(out)


def _has_labels(file: Path) -> bool:
    """Whether somebody has begun to fill a manifest that was written here."""
    if not file.is_file():
        return False
    with file.open(newline="", encoding="utf-8-sig") as rows:
        return any(row.get("label") for row in csv.DictReader(rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calm suggest",
        description="Write the unlabelled clips that are most worth labelling as a CSV manifest whose column label is "
        "to be filled. A classifier's own doubts come first (margin, entropy); coverage picks clips far from each "
        "other, and from labelled ones, in the space of the heads, and needs no classifier.",
        epilog="example: calm suggest recordings/ --run runs/mine --labelled labelled.csv --count 20",
    )
    parser.add_argument("clips", help="folder of audio files at any depth, or a manifest")
    parser.add_argument("--run", help="run folder or saved classifier of an earlier round")
    parser.add_argument(
        "--backbone", default="calm-tiny", help="whose heads are read without --run (default: %(default)s)"
    )
    parser.add_argument(
        "--by", choices=("margin", "entropy", "coverage"), help="default: margin; without --run coverage"
    )
    parser.add_argument("--count", type=int, default=20, help="how many clips (default: 20)")
    parser.add_argument("--labelled", help="manifest or folder of clips that have a label already: never suggested")
    parser.add_argument("--out", type=Path, default=Path("to-label.csv"), help="the manifest (default: to-label.csv)")
    parser.add_argument("--batch-size", type=int, default=8, help="clips in one pass (default: 8)")
    return parser
