"""What a run leaves behind for people: ``results.json``, ``predictions.csv`` and one table on the screen."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from calm_pl.clip import Clip

# What a table shows, by the kind of task; the rest is in results.json.
COLUMNS = {"accuracy": "accuracy %", "macro_f1": "macro-F1 %", "nll": "NLL", "ece": "ECE %"}
MULTI_LABEL_COLUMNS = {
    "map": "mAP %", "sample_f1": "sample F1 %", "exact_match": "exact", "accuracy": "top-1",
}  # fmt: skip
SPOOFING_COLUMNS = {"accuracy": "accuracy %", "eer": "EER %", "macro_f1": "macro-F1 %", "nll": "NLL"}
NO_SHARE = ("nll", "brier")
TABLE_WIDTH = 120
WITH_INTERVAL = 2  # of the columns, the first ones: a terminal is 80 columns wide


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_predictions(
    path: Path, clips: Sequence[Clip], classes: Sequence[str], probabilities_NC: Tensor, unlabelled: int = 1
) -> None:
    """Write ``path,label,prediction,confidence``, one line a clip, in the clips' order.

    Of a clip with n labels, the n most probable classes are its prediction, joined by ``|`` as its labels are; of one
    without, as many as ``unlabelled`` says. Where clips are parts of files, ``start,end`` (seconds) come after.
    """
    confidence_N = probabilities_NC.amax(1)
    order_NC = probabilities_NC.argsort(dim=1, descending=True, stable=True)
    with io.StringIO(newline="") as file:
        writer = csv.writer(file)
        parts = any(clip.start is not None or clip.end is not None for clip in clips)
        writer.writerow(["path", "label", "prediction", "confidence", *(["start", "end"] if parts else [])])
        for clip, order_C, confidence in zip(clips, order_NC, confidence_N.tolist(), strict=True):
            said = [classes[c] for c in order_C[: len(clip.labels) or unlabelled].tolist()]
            part = [clip.start, clip.end] if parts else []
            writer.writerow([clip.audio, "|".join(clip.labels), "|".join(said), f"{confidence:.6f}", *part])
        write_text(path, file.getvalue())


def wide_console() -> Console:
    """Prints tables whole: where there is no room in a line, the terminal wraps it, and no figure is cut off."""
    return Console(width=max(Console().width, TABLE_WIDTH))


def _headline(results: Mapping[str, Any], clips: int, part: str) -> str:
    count = results["shots"]
    shots = f"{'all' if count is None else count} {'shot' if count == 1 else 'shots'}"
    return (
        f"{results['dataset']} · {results['backbone']} · {shots} · seed {results['seed']} · "
        f"{results['protocol']} protocol · {clips} {part} clips"
    )


def results_table(results: Mapping[str, Any], part: str = "test") -> Table:
    """The methods of one run side by side, the best in bold, with 95 % intervals; of several folds their means."""
    over = f"{len(results['folds'])} folds" if "folds" in results else f"the {part} clips"
    table = Table(caption=f"\\[low, high]: 95 % interval over {over}")
    columns = columns_of(results)
    methods = {name: figures for name, figures in results["methods"].items() if figures}  # none without any clip
    table.add_column("method", no_wrap=True)
    for title in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    leading, _ = leading_of(results)
    best = max((figures[leading] for figures in methods.values()), default=0.0)
    for name, figures in methods.items():
        style = "bold" if figures[leading] == best else ""
        cells = (_cell(figures, column, number < WITH_INTERVAL) for number, column in enumerate(columns))
        table.add_row(name, *cells, style=style)
    return table


def columns_of(results: Mapping[str, Any]) -> dict[str, str]:
    """Names and titles of the figures that a table of these results shows; methods are ranked by the first."""
    names = {name for figures in results["methods"].values() for name in figures}
    return MULTI_LABEL_COLUMNS if "map" in names else SPOOFING_COLUMNS if "eer" in names else COLUMNS


def leading_of(results: Mapping[str, Any]) -> tuple[str, str]:
    """Name and title of the figure that methods are ranked by; it is a share, more is better."""
    name, title = next(iter(columns_of(results).items()))
    return name, title.removesuffix(" %")


def outcome(results: Mapping[str, Any], method: str) -> str:
    """A method by the figure that ranks it: ``calm 85.4 %`` of accuracy, others are named, ``calm 61.2 % mAP``."""
    figure, title = leading_of(results)
    return f"{method} {100 * results['methods'][method][figure]:.1f} %" + ("" if figure == "accuracy" else f" {title}")


def attacks_table(results: Mapping[str, Any]) -> Table:
    """Equal error rate of every method (columns) against each attack (rows)."""
    tables = results["attacks"]
    table = Table(title="EER % by attack, against all genuine clips")
    for title in ("attack", "clips", *tables):
        table.add_column(title, justify="right", no_wrap=True)
    for attack, about in next(iter(tables.values())).items():
        table.add_row(attack, str(about["clips"]), *(f"{100 * of[attack]['eer']:.1f}" for of in tables.values()))
    return table


def shown(value: float, column: str) -> str:
    """A figure as tables show it: in %, those of NO_SHARE as they are."""
    scale, digits = (1, 3) if column in NO_SHARE else (100, 1)
    return f"{round(value * scale, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero


def _cell(figures: Mapping[str, Any], column: str, interval: bool) -> str:
    text = shown(figures[column], column)
    if interval:
        low, high = figures[f"{column}_interval"]
        text += f" \\[{shown(low, column)}, {shown(high, column)}]"
    return text


def print_table(results: Mapping[str, Any], clips: int, part: str = "test") -> None:
    """Print :func:`results_table` of the ``clips`` of one part, and who was left out."""
    console = wide_console()
    console.print(_headline(results, clips, part), style="italic", highlight=False, soft_wrap=True)
    console.print(results_table(results, part))
    if results.get("attacks"):
        console.print(attacks_table(results))
    if results["skipped"]:
        console.print(f"[yellow]{len(results['skipped'])} clips could not be used:[/yellow]")
        for skipped in results["skipped"][:10]:
            console.print(f"  {skipped['reason']}", style="yellow", highlight=False)
