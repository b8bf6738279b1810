"""``report.html``: one run as a page that opens offline. Nothing in it is fetched from anywhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from calm_pl import __version__
from calm_pl.progress import say
from calm_pl.report import plots
from calm_pl.report.run import Prediction, Run, heads_for
from calm_pl.report.sounds import Sound, embed
from calm_pl.training.results import WITH_INTERVAL, shown, write_text

MISTAKES = 12
# Base64 in the page; with everything else the page stays below 5 MB.
SOUND_BUDGET = 3_500_000
NAMED_HEADS = 3


@dataclass(frozen=True)
class Plot:
    """A plot as the page shows it: inline SVG in the reader's text colour, and what it says in words."""

    svg: Markup
    name: str


def write_report(folder: str | Path, mistakes: int = MISTAKES, redraw: bool = True) -> Path:
    """Write ``report.html`` into a run folder, and its plots as PNG and SVG into ``plots/``.

    Args:
        folder: a run folder with ``results.json``.
        mistakes: how many of the most confident mistakes are shown and can be heard. 0 leaves all audio out, for
            recordings that must not leave this machine.
        redraw: make plots anew that were made for these results already.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: the folder holds no finished run.
    """
    run = Run.read(folder)
    page = run.folder / "report.html"
    content = {
        "run": run,
        "headline": headline(run),
        "with_interval": WITH_INTERVAL,
        "plots": draw(run, redraw),
        "sweep": _sweep_curve(run),
        "heads": trusted_heads(run),
        "maps_shown": plots.MAPS_SHOWN,
        "specialisation": run.specialisation,
        "mistakes": [] if not mistakes else heard(run.mistakes[:mistakes]),
        "command": f"calm fit --config {shlex.quote(str(run.folder / 'config.yaml'))}",
        "config": (run.folder / "config.yaml").read_text() if run.config else "",
    }
    write_text(page, render("run.html.j2", **content))
    return page


def headline(run: Run) -> str:
    """The run in two or three sentences."""
    methods = dict(run.ranking)
    if not methods:
        return "No test clip has a label: there is nothing to measure."
    name = run.kept or run.ranking[0][0]
    figures = methods[name]
    column, _ = run.leading
    value, (low, high) = figures[column], figures[f"{column}_interval"]
    count = run.results["shots"]
    shots = "all its labelled clips" if count is None else f"{count} labelled clip{'s' if count > 1 else ''}"
    labelled = run.results["splits"]["test"] - run.unlabelled
    clips = f"{labelled} {'labelled ' if run.unlabelled else ''}test clips"
    text = f"From {shots} a class, {name} "
    if run.multi_label:
        text += f"reaches a mean average precision (mAP) of {100 * value:.1f} % on {clips} "
    else:
        text += f"tells {100 * value:.1f} % of {clips} right "
    text += f"(95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
    if chance := run.chance(name):
        choices = "options of a question" if run.among_options(name) else "classes"
        text += f"; guessing among the {1 / chance:.0f} {choices} gives {100 * chance:.0f} %"
    text += "."
    if name != "zero_shot" and "zero_shot" in methods:
        # Only there has the model fewer answers to choose from.
        listed = "" if run.among_options(name) == run.among_options("zero_shot") else " among the options of a question"
        text += f" Asked in words{listed}, the same model reaches {100 * methods['zero_shot'][column]:.1f} %."
    if run.unlabelled:
        text += f" {run.unlabelled} more test clips have no label."
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def draw(run: Run, redraw: bool = True) -> dict[str, Plot]:
    """All plots that the run has data for, written to ``plots/`` and ready for the page."""
    figures: dict[str, Callable[[], Figure]] = {}
    if run.ranking:
        chance = {name: guessed for name, _ in run.ranking if (guessed := run.chance(name))}
        figures["methods"] = partial(plots.methods, dict(run.ranking), chance, run.kept, *run.leading)
    if run.labelled:
        figures["confusion"] = partial(plots.confusion, run.confusion_CC, run.classes)
        figures["classes"] = partial(plots.class_accuracy, run.per_class)
        figures["calibration"] = partial(plots.calibration, run.calibration)
    if run.weights_KC is not None:
        figures["heads"] = partial(plots.head_map, run.weights_KC, run.head_sites)
        if not run.all_trust_alike:
            figures["heads-by-class"] = partial(plots.class_head_maps, run.weights_KC, run.head_sites, run.classes)
        figures["head-share"] = partial(plots.head_share, run.weights_KC)
    if run.heads_kept:
        figures["heads-kept"] = partial(plots.heads_kept, run.heads_kept)
    if run.specialisation and "ablation" in run.specialisation and not run.all_trust_alike:
        ablation = run.specialisation["ablation"]
        # A class without test clips has none.
        change_CC = torch.tensor([[ablation[a][c] or 0.0 for c in run.classes] for a in run.classes])
        figures["ablation"] = partial(plots.ablation, change_CC, run.classes)
    folder = run.folder / "plots"
    if missing := plots.missing_letters("".join(run.classes)):
        say(
            f"no font installed here has the letters {missing[:20]}: {folder}/*.png show boxes for them, report.html "
            "and the .svg files do not; after installing one (Debian: fonts-noto-cjk, fonts-noto) run calm report again"
        )
    return {
        name: _drawn(run, name) if not redraw and run.is_of_these_results(folder / f"{name}.svg")
        else Plot(inline_svg(plots.save(figure(), folder, name)), name)
        for name, figure in figures.items()
    }  # fmt: skip


def _drawn(run: Run, name: str) -> Plot:
    return Plot(inline_svg((run.folder / "plots" / f"{name}.svg").read_text()), name)


def curve_name(figure: str) -> str:
    """What the plot of a figure over shots is called."""
    return f"{figure}-over-shots"


def _sweep_curve(run: Run) -> Plot | None:
    """The leading figure over shots, where a sweep put it into the run's plots."""
    name = curve_name(run.leading[0])
    return _drawn(run, name) if run.is_of_these_results(run.folder / "plots" / f"{name}.svg") else None


def inline_svg(svg: str) -> Markup:
    """An SVG file's content for use inside a page: as large as there is room, in the page's text colour."""
    svg = svg[svg.index("<svg") :].replace(plots.INK, "currentColor")
    points = re.findall(r' width="([\d.]+)pt"', svg)[0]
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # every plot has a figure_1; nothing refers to it
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    style = f'style="width:{float(points) * 4 / 3:.0f}px" '  # 1 pt is 4/3 px
    return Markup(svg.replace("<svg ", f'<svg aria-hidden="true" focusable="false" {style}', 1))


def trusted_heads(run: Run) -> dict[str, Any] | None:
    """Per class: how many heads carry 90 % of its weight, and its strongest ones."""
    if run.weights_KC is None:
        return None
    counts = heads_for(run.weights_KC).tolist()
    strongest = run.weights_KC.topk(min(NAMED_HEADS, len(run.weights_KC)), dim=0)
    names = run.head_names
    return {
        "total": len(run.weights_KC),
        "mean": sum(counts) / len(counts),
        "classes": [
            {
                "name": name,
                "count": counts[c],
                "strongest": [
                    (names[k], weight)
                    for k, weight in zip(strongest.indices[:, c].tolist(), strongest.values[:, c].tolist(), strict=True)
                ],
            }
            for c, name in enumerate(run.classes)
        ],
    }


def heard(mistakes: list[Prediction]) -> list[tuple[Prediction, Sound]]:
    """Mistakes with their sounds, as many as the page has room for."""
    found, left = [], SOUND_BUDGET
    for mistake in mistakes:
        sound = embed(mistake.path, mistake.start, mistake.end)
        size = len(sound.audio) + len(sound.spectrogram)
        if size > left:
            sound = Sound(problem="left out: the page is full")
        else:
            left -= size
        found.append((mistake, sound))
    return found


def render(template: str, **content: Any) -> str:
    """Fill a template of this package; everything that is not Markup is escaped."""
    environment = Environment(
        loader=PackageLoader("calm_pl.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share, digits=1: f"{100 * share:.{digits}f}"
    environment.filters["shown"] = shown
    return environment.get_template(template).render(version=__version__, **content)
