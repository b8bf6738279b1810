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

COLUMNS = {"accuracy": "accuracy %", "macro_f1": "macro-F1 %", "nll": "NLL", "ece": "ECE %"}
PERCENT = ("accuracy", "macro_f1", "ece")
WITH_INTERVAL = ("accuracy", "macro_f1")  # the others' are in results.json; a terminal is 80 columns wide


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_predictions(path: Path, clips: Sequence[Clip], classes: Sequence[str], probabilities_NC: Tensor) -> None:
    """Write ``path,label,prediction,confidence``, one line a clip, in the clips' order.

    Where clips are parts of files, ``start,end`` (seconds) come after.
    """
    confidence_N, prediction_N = probabilities_NC.max(1)
    with io.StringIO(newline="") as file:
        writer = csv.writer(file)
        parts = any(clip.start is not None or clip.end is not None for clip in clips)
        writer.writerow(["path", "label", "prediction", "confidence", *(["start", "end"] if parts else [])])
        for clip, prediction, confidence in zip(clips, prediction_N.tolist(), confidence_N.tolist(), strict=True):
            part = [clip.start, clip.end] if parts else []
            writer.writerow([clip.audio, "|".join(clip.labels), classes[prediction], f"{confidence:.6f}", *part])
        write_text(path, file.getvalue())


def results_table(results: Mapping[str, Any], clips: int, part: str = "test") -> Table:
    """The methods of one run side by side, best accuracy in bold, with 95 % intervals; of several folds their means."""
    over = f"{len(results['folds'])} folds" if "folds" in results else f"the {part} clips"
    shots = "all" if results["shots"] is None else results["shots"]
    table = Table(
        title=(
            f"{results['dataset']} · {results['backbone']} · {shots} shots · seed {results['seed']} · "
            f"{results['protocol']} protocol · {clips} {part} clips"
        ),
        caption=f"\\[low, high]: 95 % interval over {over}",
    )
    table.add_column("method", no_wrap=True)
    for title in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    best = max((figures["accuracy"] for figures in results["methods"].values()), default=0.0)
    for name, figures in results["methods"].items():
        style = "bold" if figures["accuracy"] == best else ""
        table.add_row(name, *(_cell(figures, column) for column in COLUMNS), style=style)
    return table


def _cell(figures: Mapping[str, Any], column: str) -> str:
    scale, digits = (100, 1) if column in PERCENT else (1, 3)
    text = f"{round(figures[column] * scale, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero
    if column in WITH_INTERVAL:
        low, high = figures[f"{column}_interval"]
        text += f" \\[{low * scale:.{digits}f}, {high * scale:.{digits}f}]"
    return text


def print_table(results: Mapping[str, Any], clips: int, part: str = "test") -> None:
    """Print :func:`results_table` of the ``clips`` of one part, and who was left out."""
    console = Console()
    console.print(results_table(results, clips, part))
    if results["skipped"]:
        console.print(f"[yellow]{len(results['skipped'])} clips could not be used:[/yellow]")
        for skipped in results["skipped"][:10]:
            console.print(f"  {skipped['reason']}", style="yellow", highlight=False)
