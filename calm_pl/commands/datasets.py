"""`calm datasets`: which data sets there are, and whether the one on this disk is sound."""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from calm_pl.clip import Clip
    from calm_pl.data.check import CheckedSet

SHOWN = 10  # broken files or duplicates printed before "and so many more"


def main(argv: list[str]) -> int:
    """Run `calm datasets <argv>`. Exit status 1: broken files, or sounds that are in several splits; 2: no data."""
    arguments = _parser().parse_args(argv)
    return _check(arguments.name, arguments.data_dir) if arguments.command else _list()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calm datasets", description=__doc__, epilog="Without a command: the list.")
    commands = parser.add_subparsers(dest="command", metavar="check")
    text = "decode every clip once; tell counts, rates, lengths, broken files and duplicates"
    check = commands.add_parser("check", help=text, description=text)
    check.add_argument("name", metavar="NAME", help="a data set of the list")
    check.add_argument("data_dir", metavar="DATA_DIR", nargs="?", help="its folder or file (default: the data cache)")
    return parser


def _list() -> int:
    from rich.console import Console
    from rich.table import Table

    from calm_pl.data.recipes import RECIPES
    from calm_pl.data.recipes.base import data_root

    table = Table("name", "what", "in the cache", box=None)
    for name, recipe in RECIPES.items():
        what = " ".join((recipe.__doc__ or "").split("\n\n")[0].split())
        table.add_row(name, what.split(". ")[0].rstrip("."), "yes" if _holds_data(data_root(name, None)) else "")
    Console().print(table)
    return 0


def _holds_data(root: Path) -> bool:
    """A download that failed leaves a lock, and perhaps a part of the archive."""
    return root.is_dir() and any(not (p.name.startswith(".") or p.suffix == ".part") for p in root.iterdir())


def _check(name: str, data_dir: str | None) -> int:
    from calm_pl.data.check import check_clips
    from calm_pl.data.recipes import RECIPES
    from calm_pl.progress import track

    if name not in RECIPES:
        print(f"unknown data set {name!r}; there are {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    try:
        recipe = RECIPES[name](**({} if data_dir is None else {"data_dir": data_dir}))
        recipe.prepare()
        clips = recipe.clips()
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    found = check_clips(clips, lambda each: track(each, f"decoding {name}", len(clips), "clips"))
    _show(found)
    return 1 if found.broken or found.leaks else 0


def _show(found: CheckedSet) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    splits = sorted({split for counts in found.counts.values() for split in counts})
    table = Table("class", *splits, "all", box=None)
    for label, counts in sorted(found.counts.items()):
        table.add_row(label, *(f"{counts[split]:,}" for split in splits), f"{counts.total():,}")
    console.print(table)
    rates = ", ".join(f"{rate} Hz ({count:,})" for rate, count in found.rates.most_common())
    console.print(f"\nrates: {rates or 'none'}")
    if found.seconds:
        shortest, middle, longest = min(found.seconds), statistics.median(found.seconds), max(found.seconds)
        total = sum(found.seconds) / 3600
        console.print(f"lengths: {shortest:.2f} to {longest:.2f} s, median {middle:.2f} s, together {total:.2f} h")
    inside = [clips for clips in found.repeats if clips not in found.leaks]
    _some(console, "broken files", found.broken)
    _some(console, "sounds repeated within a split", [_names(clips) for clips in inside])
    _some(console, "sounds repeated across splits", [_names(clips) for clips in found.leaks])


def _names(clips: list[Clip]) -> str:
    return " = ".join(f"{clip.audio} ({clip.split}, {', '.join(clip.labels)})" for clip in clips)


def _some(console: Console, title: str, lines: list[str]) -> None:
    console.print(f"{title}: {len(lines) or 'none'}")
    for line in lines[:SHOWN]:
        console.print(f"  {line}", markup=False)
    if len(lines) > SHOWN:
        console.print(f"  and {len(lines) - SHOWN} more")
