"""Several runs side by side: means over seeds with intervals, a CSV file, and accuracy (or mAP) over shots."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from calm_pl.conf import flat
from calm_pl.methods.compare import half_width, mean_and_half
from calm_pl.progress import Task
from calm_pl.report import plots
from calm_pl.report.page import Plot, curve_name, inline_svg, render, write_report
from calm_pl.report.run import Run
from calm_pl.training.results import write_text

# Settings that runs of one question may differ in: which clips were drawn, how the work was done, and what is told
# beside a method (see `_labelled_by`).
DRAWS = re.compile(
    r"data\.(shots|seed|pseudo_labels|by_confidence|store\w*|batch_size|num_workers|recipe\.init_args\.test_fold)"
)
# Settings beside those of data and model that change the figures.
OTHERS = ("trainer.precision",)
PATHS = (
    "data.recipe.init_args.data_dir", "data.backbone.path", "data.backbone.adapter", "data.unlabelled",
    "data.pseudo_labels",
)  # fmt: skip
COLUMNS = ("dataset", "backbone", "protocol", "settings", "shots", "method", "runs", "seeds")
ALL_FOLDS = "all"
LONGEST_NAME = 75  # characters, of up to 3 bytes; file systems allow 255 bytes


@dataclass(frozen=True)
class Question:
    """What runs must have in common to stand in one table. ``settings``: in what else they differ from the others.

    ``figure`` ranks their methods, and is called ``title``: mAP where clips have several labels.
    """

    dataset: str
    backbone: str
    protocol: str
    settings: str = ""
    figure: str = "accuracy"
    title: str = "accuracy"

    def __str__(self) -> str:
        return " · ".join(part for part in (self.dataset, self.backbone, self.protocol, self.settings) if part)


@dataclass(frozen=True)
class Row:
    """One method at one shot count: seed -> fold -> the question's figure, from 0 to 1.

    One seed's mean over its folds is one observation: folds share most of their training clips, and every one of them
    tests other clips. The fold ALL_FOLDS is the mean of all, and stands for single ones of the same seed.
    """

    method: str
    shots: int
    folds_of: Mapping[int, Mapping[str, float]]

    @property
    def runs(self) -> int:
        """How many runs count; one of all folds is one."""
        return sum(1 if ALL_FOLDS in folds else len(folds) for folds in self.folds_of.values())

    @property
    def values(self) -> list[float]:
        """One for each seed, from 0 to 1."""
        return [folds.get(ALL_FOLDS, statistics.fmean(folds.values())) for folds in self.folds_of.values()]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean over seeds by Student's t; NaN below 3 seeds."""
        return half_width(self.values)

    def __str__(self) -> str:
        return mean_and_half(self.mean, self.half_width)


class Comparison:
    """Runs by question: data sets, backbones, protocols and settings never share a table.

    A run counts once, however often it is named; so do several folders of the same draw, and which of them is left out
    is told on standard error.

    Args:
        folders: run folders.

    Raises:
        FileNotFoundError: a folder holds no finished run.
    """

    def __init__(self, folders: Iterable[str | Path]) -> None:
        runs = [Run.read(folder) for folder in {Path(folder).resolve(): folder for folder in folders}.values()]
        self.runs_of: dict[Question, list[Run]] = defaultdict(list)
        alike: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
        for run in runs:
            alike[run.results["dataset"], run.results["backbone"], run.results["protocol"]].append(run)
        for asked, likely in alike.items():
            for run, settings in zip(likely, _settings(likely), strict=True):
                self.runs_of[Question(*asked, settings, *run.leading)].append(run)
        self.runs_of = {question: _draws(theirs) for question, theirs in self.runs_of.items()}
        left = {id(run) for theirs in self.runs_of.values() for run in theirs}
        self.runs = [run for run in runs if id(run) in left]
        self.rows = {question: _rows(runs, question.figure) for question, runs in self.runs_of.items()}

    def tables(self) -> Iterator[Table]:
        """One table a question for the terminal: methods by shots, in %, mean ± half of its interval."""
        for question, rows in self.rows.items():
            shots = sorted({row.shots for row in rows})
            caption = f"{question.title} %, mean ± half of its 95 % interval over seeds"
            table = Table(title=str(question), caption=caption)
            table.add_column("method", no_wrap=True)
            for count in shots:
                table.add_column(f"{count} {'shot' if count == 1 else 'shots'}", justify="right", no_wrap=True)
            for method, by_shots in by_method(rows).items():
                table.add_row(method, *(str(by_shots.get(count, "")) for count in shots))
            yield table

    def write(self, out: str | Path) -> Path:
        """Write ``comparison.html``, ``comparison.csv`` and ``plots/`` into a folder; return the page's path."""
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        self._write_csv(out / "comparison.csv")
        plots_of = {question: self._plot(out, question) for question in self.rows}
        links = [(run, os.path.relpath(run.folder / "report.html", out)) for run in self.runs]
        page = out / "comparison.html"
        content = {"tables": self.rows, "plots": plots_of, "runs": links, "figures": self.figures}
        write_text(page, render("comparison.html.j2", by_method=by_method, **content))
        return page

    @property
    def figures(self) -> dict[str, str]:
        """Names and titles of the figures that the tables show, each once."""
        return {question.figure: question.title for question in self.rows}

    def add_curves(self, out: str | Path) -> None:
        """Show in every run's own report the figure over shots that `write` drew of it and its like."""
        curves = {question: Path(out, "plots", f"{self._plot_name(question)}.svg") for question in self.rows}
        runs = [(run, file) for question, file in curves.items() if file.is_file() for run in self.runs_of[question]]
        if not runs:  # all have the same shots
            return
        titles = " and ".join(self.figures.values())
        with Task(f"adding {titles} over shots to the reports", len(runs), "reports") as task:
            for run, file in runs:
                (run.folder / "plots").mkdir(exist_ok=True)
                for suffix in (".svg", ".png"):
                    copy = run.folder / "plots" / f"{curve_name(run.leading[0])}{suffix}"
                    shutil.copyfile(file.with_suffix(suffix), copy)
                write_report(run.folder, redraw=False)
                task.advance()

    def _write_csv(self, file: Path) -> None:
        with io.StringIO(newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow([*COLUMNS, *self.figures, "low", "high"])
            for question, rows in self.rows.items():
                asked = (question.dataset, question.backbone, question.protocol, question.settings)
                for row in rows:
                    interval = row.half_width
                    bounds = ("", "") if interval != interval else (row.mean - interval, row.mean + interval)
                    seeds = len(row.folds_of)
                    means = [row.mean if figure == question.figure else "" for figure in self.figures]
                    writer.writerow([*asked, row.shots, row.method, row.runs, seeds, *means, *bounds])
            write_text(file, handle.getvalue())

    def _plot_name(self, question: Question) -> str:
        """The file's name without its ending; questions that are long or spelled alike are told apart by number."""
        if len(self.rows) == 1:
            return curve_name(question.figure)
        names = [re.sub(r"[^\w.-]+", "-", f"{curve_name(one.figure)} {one}")[:LONGEST_NAME] for one in self.rows]
        place = list(self.rows).index(question)
        return names[place] if names.count(names[place]) == 1 else f"{names[place]}-{place + 1}"

    def _plot(self, out: Path, question: Question) -> Plot | None:
        """The figure over shots, where there is more than one shot count."""
        rows = self.rows[question]
        if len({row.shots for row in rows}) < 2:
            return None
        name = self._plot_name(question)
        curves = {
            method: {shots: (row.mean, row.half_width) for shots, row in by_shots.items()}
            for method, by_shots in by_method(rows).items()
        }
        return Plot(inline_svg(plots.save(plots.over_shots(curves, question.title), out / "plots", name)), name)


def by_method(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Method -> shots -> row, the method that is best at the most shots first."""
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        found[row.method][row.shots] = row
    return dict(sorted(found.items(), key=lambda item: -item[1][max(item[1])].mean))


def _rows(runs: Sequence[Run], figure: str) -> list[Row]:
    """A figure of runs that differ in their draw."""
    found: dict[tuple[int, str], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for run, labelled_by in zip(runs, _labelled_by(runs), strict=True):
        for method, figures in run.ranking:
            name = method if method == "zero_shot" else f"{method}{labelled_by}"
            found[_shots(run), name][run.results["seed"]].setdefault(_fold(run), figures[figure])
    return [Row(method, shots, folds_of) for (shots, method), folds_of in sorted(found.items())]


def _draws(runs: Sequence[Run]) -> list[Run]:
    """Runs of one question, each draw once: the first of several folders is kept, the others are told."""
    first: dict[tuple[Any, ...], Run] = {}
    for run, labelled_by in zip(runs, _labelled_by(runs), strict=True):
        draw = _shots(run), run.results["seed"], _fold(run), labelled_by, *sorted(run.results["methods"])
        kept = first.setdefault(draw, run)
        if kept is not run:
            print(f"calm: {run.folder} is left out: {kept.folder} is of the same shots, seed and fold", file=sys.stderr)
    return list(first.values())


def _shots(run: Run) -> int:
    """Support clips a class; where all clips are taken, of a class on average."""
    results = run.results
    return int(results["shots"] or round(results["splits"]["support"] / results["num_classes"]))


def _fold(run: Run) -> str:
    """Which clips a run was tested on: its fold; of data without folds the seed of a random split."""
    if "folds" in run.results:
        return ALL_FOLDS
    recipe = ((run.config.get("data") or {}).get("recipe") or {}).get("init_args") or {}
    return str(recipe.get("test_fold", recipe.get("seed") if "test_fraction" in recipe else None))


def _labelled_by(runs: Sequence[Run]) -> list[str]:
    """What is added to the names of each run's methods: to learn from labels that a model gave, or from its surest
    ones, is another method of the same question."""
    settings = [_values(run.config) for run in runs]
    manifests = {one["data.pseudo_labels"] for one in settings if one.get("data.pseudo_labels")}
    added = []
    for run, one in zip(runs, settings, strict=True):
        text = ""
        if "pseudo_labels" in run.results:
            text += ", pseudo-labels" + (f" {one.get('data.pseudo_labels')}" if len(manifests) > 1 else "")
        added.append(text + (", by confidence" if one.get("data.by_confidence") else ""))
    return added


def _settings(runs: Iterable[Run]) -> list[str]:
    """For each run the settings of data, model and precision in which the runs differ, draws apart: ``alpha=1.5``."""
    settings = [
        {
            name: value
            for name, value in _values(run.config).items()
            if name.startswith(("data.", "model.", *OTHERS)) and not DRAWS.fullmatch(name)
        }
        for run in runs
    ]
    for one in settings:
        if "data.recipe.init_args.test_fraction" in one:  # else the seed makes the sounds
            one.pop("data.recipe.init_args.seed", None)
    names = {name for one in settings for name in one}
    differing = sorted(name for name in names if len({repr(one.get(name)) for one in settings}) > 1)
    return [", ".join(f"{name.rpartition('.')[2]}={one.get(name)}" for name in differing) for one in settings]


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name, paths by where they lead."""
    return {name: _led_to(value) if name in PATHS and value else value for name, value in flat(config)}


def _led_to(path: str) -> str:
    """A path whole and without links; a name that is no path here, such as a hub id, as it is."""
    whole = os.path.realpath(os.path.expanduser(path))
    return whole if os.path.exists(whole) else path
