"""``calm report``: a run's page again, or several runs side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Write ``report.html`` of one run, or ``comparison.html`` of several; print where it lies."""
    options = _parser().parse_args(argv)
    if options.mistakes < 0:
        sys.exit(f"calm: error: --mistakes {options.mistakes}: 0 or more")
    from calm_pl.report.comparison import Comparison
    from calm_pl.report.page import write_report

    try:
        if len(options.runs) == 1 and options.out is None:
            page = write_report(options.runs[0], options.mistakes)
        else:
            page = Comparison(options.runs).write(options.out or "comparison")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"calm: error: {error}")
    print(page)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calm report",
        description="Remake the report of a run; or compare runs: a table, a CSV file, and accuracy (of several "
        "labels a clip: mAP) over shots.",
        epilog="example: calm report runs/esc50-*",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, as `calm fit` leaves it")
    parser.add_argument(
        "--mistakes", type=int, default=12, metavar="N",
        help="mistakes to show and hear; 0 keeps recordings out of the page (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of a comparison (default: comparison/)")
    return parser
