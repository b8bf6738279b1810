"""What to conclude from methods on the same draws: the table, paired differences and the plot over shots."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from calm_pl.methods.compare import Difference, Row, half_width, mean_and_half, paired_differences
from calm_pl.report import plots
from calm_pl.training.results import wide_console, write_json


def means(rows: Sequence[Row], figure: str = "accuracy") -> dict[str, dict[int, tuple[float, float]]]:
    """method -> shots -> (mean, half of the 95 % interval), one seed's mean over folds being one observation."""
    by_seed: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_seed[row.method, row.shots][row.seed].append(getattr(row, figure))
    table: dict[str, dict[int, tuple[float, float]]] = {}
    for (method, shots), seeds in by_seed.items():
        observed = [statistics.fmean(values) for values in seeds.values()]
        table.setdefault(method, {})[shots] = (statistics.fmean(observed), half_width(observed))
    return table


def report(rows: Sequence[Row], out: Path, reference: str = "calm", over: str = "seeds") -> None:
    """Print the table and the paired differences; write them and the plot beside the rows.

    ``over`` names what a row's seed stands for. Methods that joined later may have fewer or more draws than others;
    then the table says so beside those that have fewer.
    """
    table = means(rows)
    draws = Counter((method, shots) for method, shots, _, _ in {row.key for row in rows})
    shots = sorted({count for points in table.values() for count in points})
    shown = Table(title=f"accuracy, %: mean over {over} ± half of the 95 % interval")
    shown.add_column("method", no_wrap=True)
    for count in shots:
        shown.add_column(f"{count} shot{'s' * (count > 1)}", justify="right", no_wrap=True)
    most = {n: max(draws[method, n] for method in table) for n in shots}
    for method, points in table.items():
        fewer = {n: f" (of {draws[method, n]} draws)" if draws[method, n] < most[n] else "" for n in shots}
        shown.add_row(method, *(mean_and_half(*points[n]) + fewer[n] if n in points else "" for n in shots))
    if any(draws[method, n] < most[n] for method, points in table.items() for n in points):
        shown.caption = f"the others are of {', '.join(map(str, sorted(set(most.values()))))} draws"
    console = wide_console()
    console.print(shown)
    differences = [
        difference
        for method in table
        if method != reference and reference in table
        for difference in paired_differences(rows, method, reference)
    ]
    if differences:
        console.print(_against(differences, reference, shots))
    means_json = {
        method: {
            str(n): {"mean": mean, "half_interval": _number(half), "draws": draws[method, n]}
            for n, (mean, half) in points.items()
        }
        for method, points in table.items()
    }
    against_json = [{**asdict(d), "low": _number(d.low), "high": _number(d.high)} for d in differences]
    write_json(out / "comparison.json", {"accuracy": means_json, "differences": against_json})
    plots.save(plots.over_shots(table), out, "accuracy-over-shots")
    console.print(f"rows, figures and plot: {out.resolve()}")


def _against(differences: Sequence[Difference], reference: str, shots: Sequence[int]) -> Table:
    table = Table(title=f"points above {reference}, paired over draws: mean [95 % interval]")
    table.add_column("method", no_wrap=True)
    for count in shots:
        table.add_column(f"{count}", justify="right", no_wrap=True)
    for method in dict.fromkeys(difference.method for difference in differences):
        cells = {
            d.shots: f"{100 * d.mean:+.1f}"
            + ("" if math.isnan(d.low) else f" \\[{100 * d.low:+.1f}, {100 * d.high:+.1f}]")
            for d in differences
            if d.method == method
        }
        table.add_row(method, *(cells.get(count, "") for count in shots))
    return table


def _number(value: float) -> float | None:
    """JSON has no NaN: an interval that cannot be told (below 3 seeds) is null."""
    return None if math.isnan(value) else value
