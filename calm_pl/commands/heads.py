"""``calm heads``: do the classes of a run rely on different heads?"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Print overlap, layers and ablation; leave ``heads.json`` in the run folder and its plots in the report."""
    options = _parser().parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    from calm_pl.report.page import write_report
    from calm_pl.report.run import Run
    from calm_pl.report.specialisation import specialisation
    from calm_pl.training.results import write_json

    try:
        run = Run.read(options.run)
        if folds := list(run.results.get("folds", ())):
            sys.exit(
                f"calm: error: {options.run} holds the averages of {len(folds)} folds, each of which has a classifier "
                f"of its own: name one of their folders, such as {options.run / folds[0]}."
            )
        found = specialisation(options.run)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"calm: error: {error}")
    write_json(options.run / "heads.json", found.as_dict(run.classes))
    write_report(options.run)

    own_C = found.ablation_CC.diagonal()
    others_C = found.ablation_CC.clone().fill_diagonal_(math.nan).nanmean(1)
    console = Console()
    if run.all_trust_alike:
        print(
            "All classes weigh the heads alike: the labelled clips did not tell beyond doubt which should trust which."
        )
    console.print(
        f"Two classes share {100 * found.overlap:.1f} % of their {found.heads_per_class} strongest heads (Jaccard, "
        f"mean over pairs); random heads: {100 * found.chance_overlap:.1f} %.",
        highlight=False,
    )
    table = Table(
        "class", "accuracy %", "without its heads", "other classes without them",
        caption="Change in points of accuracy when a class's heads are mean-ablated.",
    )  # fmt: skip
    for name, accuracy, own, others in zip(run.classes, found.accuracy, own_C.tolist(), others_C.tolist(), strict=True):
        table.add_row(name, _percent(accuracy), _percent(own, "+"), _percent(others, "+"))
    table.add_section()
    table.add_row("mean", "", _percent(float(own_C.nanmean()), "+"), _percent(float(others_C.mean()), "+"))
    console.print(table)
    sites = sorted(found.site_share.items(), key=lambda site: -site[1])[:5]
    console.print(
        "Weight by layer: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in sites), highlight=False
    )
    console.print(f"{run.enough_heads()} of {len(run.head_names)} heads reach 90 % of the accuracy.", highlight=False)
    print(f"all figures: {options.run / 'heads.json'}; plots: {options.run / 'report.html'}")
    return 0


def _percent(share: float, sign: str = "") -> str:
    """In the table; a class without test clips has none."""
    return "" if math.isnan(share) else f"{100 * share:{sign}.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calm heads",
        description="Measure whether classes rely on different heads: overlap of their head sets against chance, "
        "layers, and which classes suffer without a class's heads. Reads the head store; computes nothing anew.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, as `calm fit` leaves it")
    return parser
