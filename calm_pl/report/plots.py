"""Every plot as a matplotlib Figure. Shapes: K heads, C classes.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Heat maps are one hue of growing opacity, so
that they read on white and on black; for the same reason all text and lines have the colour INK, which the report
replaces by the reader's own text colour.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font
from torch import Tensor

from calm_pl.report.run import CalibrationBin, ClassAccuracy

INK = "#1c2127"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
LINES = (BLUE, ORANGE, GREEN, PURPLE, "#56b4e9", "#d55e00", "#999999")
MARKERS = "osD^vPX"
WIDTH = 4.6  # inches: about a phone's width at the size that text is set in
MAPS_SHOWN = 24
# Tried in this order for letters that matplotlib's own font lacks, where they are installed.
FALLBACK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
    "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Segoe UI Emoji",
)  # fmt: skip
INSTALLED_FONTS = {font.name for font in fontManager.ttflist}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # class names may hold dollars
    "font.size": 9,
    "font.family": ["sans-serif", *(name for name in FALLBACK_FONTS if name in INSTALLED_FONTS)],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}": INK for part in ("edgecolor", "labelcolor", "titlecolor")},
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in STYLE, whatever the caller's own matplotlib settings are."""

    @wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return in_style


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write ``name.png`` and ``name.svg``, the same bytes whenever the data are the same; return the SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # see `missing_letters`
        figure.savefig(folder / f"{name}.png", dpi=200, facecolor="white", bbox_inches="tight")
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": "CALM-PL"}
        )
    (folder / f"{name}.svg").write_text(text.getvalue())
    return text.getvalue()


def missing_letters(text: str) -> str:
    """Those of `text` that no font at hand has: they are boxes in a PNG; whoever shows an SVG has fonts of its own."""
    fonts = [get_font(fontManager.findfont(FontProperties(family=[name]))) for name in STYLE["font.family"]]
    return "".join(sorted({letter for letter in text if not any(font.get_char_index(ord(letter)) for font in fonts)}))


@styled
def methods(
    figures: Mapping[str, Mapping[str, Any]],
    chance: Mapping[str, float],
    kept: str | None,
    column: str = "accuracy",
    title: str = "accuracy",
) -> Figure:
    """One figure of each method with its 95 % interval; the kept one is filled. Dotted: guessing in its place."""
    figure, axes = _figure(0.34 * len(figures) + 0.9)
    names = sorted(figures, key=lambda name: figures[name][column])
    for row, name in enumerate(names):
        value = 100 * figures[name][column]
        low, high = (100 * bound for bound in figures[name][f"{column}_interval"])
        colour = BLUE if name == kept else INK
        axes.plot([low, high], [row, row], color=colour, linewidth=1.6, alpha=1 if name == kept else 0.55)
        axes.plot(value, row, "o", color=colour, markersize=7 if name == kept else 5)
        axes.annotate(f"{value:.1f}", (value, row), (0, 5), textcoords="offset points", ha="center", fontsize=8)
        if name in chance:  # the lines of neighbours with the same chance are one
            guessed = 100 * chance[name]
            axes.plot([guessed, guessed], [row - 0.5, row + 0.5], color=INK, linestyle=":", linewidth=1)
    if names[0] in chance:
        axes.annotate(
            "chance", (100 * chance[names[0]], -0.5), (3, 1), textcoords="offset points", fontsize=8, va="bottom"
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.3)
    axes.set_xlim(0, 103)
    axes.set_xlabel(f"{title} on the test clips, %")
    return figure


@styled
def confusion(counts_CC: Tensor, classes: Sequence[str]) -> Figure:
    """Shares of each true class (rows) by prediction; cells hold counts of clips."""
    C = len(classes)
    share_CC = counts_CC / counts_CC.sum(1, keepdim=True).clamp_min(1)
    side = max(WIDTH - 1.2, 0.24 * C)
    figure, axes = _figure(side, width=side + 1.2)
    axes.imshow(_shade(share_CC), interpolation="none")
    if C <= 30:
        for row, column in counts_CC.nonzero().tolist():
            dark = float(share_CC[row, column]) > 0.5
            axes.text(
                column, row, str(int(counts_CC[row, column])), ha="center", va="center",
                fontsize=8, color="white" if dark else INK,
            )  # fmt: skip
    _name_classes(axes, classes)
    axes.set_xlabel("prediction")
    axes.set_ylabel("true class")
    return figure


@styled
def class_accuracy(classes: Sequence[ClassAccuracy]) -> Figure:
    """Accuracy of each class with Wilson's 95 % interval, the hardest at the top."""
    ordered = sorted(classes, key=lambda c: -c.accuracy)
    figure, axes = _figure(0.24 * len(ordered) + 0.8)
    for row, one in enumerate(ordered):
        low, high = one.interval
        axes.plot([100 * low, 100 * high], [row, row], color=INK, linewidth=1, alpha=0.55)
        axes.plot(100 * one.accuracy, row, "o", color=BLUE, markersize=6)
    axes.set_yticks(range(len(ordered)), [f"{one.name} ({one.correct}/{one.total})" for one in ordered])
    axes.set_ylim(-0.7, len(ordered) - 0.3)
    axes.set_xlim(0, 103)
    axes.grid(visible=True, axis="x", color=INK, alpha=0.15, linewidth=0.6)
    axes.set_xlabel("test clips of the class told right, %")
    return figure


@styled
def head_map(weights_KC: Tensor, sites: Mapping[str, int]) -> Figure:
    """Weight of each head, mean over classes: attention blocks (rows) by heads."""
    rows, columns = len(sites), max(sites.values())
    figure, axes = _figure(max(1.6, 0.19 * rows + 0.9))
    _draw_map(axes, weights_KC.mean(1), sites)
    for row in range(1, rows):
        axes.axhline(row - 0.5, color=INK, linewidth=0.2)
    axes.set_yticks(range(rows), list(sites), fontsize=8 if rows <= 24 else 6)
    axes.set_xticks(range(0, columns, max(1, columns // 8)))
    axes.set_xlabel("head in its block")
    return figure


@styled
def class_head_maps(weights_KC: Tensor, sites: Mapping[str, int], classes: Sequence[str]) -> Figure:
    """One small map a class (the first MAPS_SHOWN), each scaled to its own strongest head."""
    shown = list(classes)[:MAPS_SHOWN]
    columns = min(6, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(1.45 * columns, 1.5 * rows), layout="constrained")
    for number, name in enumerate(shown):
        axes = figure.add_subplot(rows, columns, number + 1)
        _draw_map(axes, weights_KC[:, number], sites)
        axes.set_title(name, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


@styled
def head_share(weights_KC: Tensor) -> Figure:
    """Share of a class's weight that its strongest heads carry: mean over classes, and the range."""
    carried_KC = weights_KC.sort(0, descending=True).values.cumsum(0).cpu()
    figure, axes = _figure(2.6)
    count = range(1, len(carried_KC) + 1)
    low, high = 100 * carried_KC.amin(1), 100 * carried_KC.amax(1)
    axes.fill_between(count, low, high, color=BLUE, alpha=0.25, linewidth=0, label="range over classes")
    axes.plot(count, 100 * carried_KC.mean(1), color=BLUE, label="mean over classes")
    axes.axhline(90, color=INK, linestyle=":", linewidth=1)
    _count_heads(axes, len(carried_KC))
    axes.set_xlabel("strongest heads of a class")
    axes.set_ylabel("share of its weight, %")
    axes.legend(loc="lower right")
    return figure


@styled
def calibration(bins: Sequence[CalibrationBin]) -> Figure:
    """Accuracy over confidence with 95 % intervals; the larger a dot, the more clips."""
    figure, axes = _figure(3.2)
    most = max((one.count for one in bins), default=1)
    axes.plot([0, 100], [0, 100], color=INK, linestyle=":", linewidth=1)
    for one in bins:
        low, high = one.interval
        axes.plot([100 * one.confidence] * 2, [100 * low, 100 * high], color=INK, linewidth=1, alpha=0.55)
    axes.scatter(
        [100 * one.confidence for one in bins], [100 * one.accuracy for one in bins],
        s=[15 + 120 * one.count / most for one in bins], color=BLUE, linewidth=0, zorder=3,
    )  # fmt: skip
    axes.set_xlim(0, 102)
    axes.set_ylim(-4, 104)
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("told right, %")
    return figure


@styled
def over_shots(table: Mapping[str, Mapping[int, tuple[float, float]]], title: str = "accuracy") -> Figure:
    """A share over shots: method -> shots -> (mean, half of the 95 % interval, NaN where there is none)."""
    figure, axes = _figure(3.4)
    shots = sorted({count for points in table.values() for count in points})
    look = {name: number for number, name in enumerate(sorted(table))}  # the same in any order of the methods
    for number, (name, points) in enumerate(table.items()):
        # A little apart, so that intervals of the same shots do not hide one another.
        shift = 1 + 0.025 * (number - (len(table) - 1) / 2)
        counts = sorted(points)
        axes.errorbar(
            [count * shift for count in counts],
            [100 * points[count][0] for count in counts],
            [100 * points[count][1] if points[count][1] == points[count][1] else 0 for count in counts],
            color=LINES[look[name] % len(LINES)], marker=MARKERS[look[name] % len(MARKERS)],
            markersize=4.5, linewidth=1.4, elinewidth=0.9, capsize=2, label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(shots, [str(count) for count in shots])
    axes.minorticks_off()
    axes.grid(visible=True, axis="y", color=INK, alpha=0.15, linewidth=0.6)
    axes.set_xlabel("labelled clips a class")
    axes.set_ylabel(f"{title}, %")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.18), ncols=3, fontsize=8)
    return figure


@styled
def ablation(change_CC: Tensor, classes: Sequence[str]) -> Figure:
    """Change in the accuracy of each class (columns) without the heads of each class (rows); loss is orange."""
    C = len(classes)
    side = max(WIDTH - 1.2, 0.3 * C)
    figure, axes = _figure(side, width=side + 1.2)
    largest = change_CC.abs().max().clamp_min(1e-6)
    loss, gain = _shade(-change_CC / largest, ORANGE), _shade(change_CC / largest)
    axes.imshow(loss, interpolation="none")
    axes.imshow(gain, interpolation="none")
    if C <= 24:
        for row, column in change_CC.round(decimals=2).nonzero().tolist():
            points = f"{100 * float(change_CC[row, column]):.0f}"
            axes.text(column, row, points, ha="center", va="center", fontsize=7)
    _name_classes(axes, classes)
    axes.set_xlabel("change in the accuracy of, points")
    axes.set_ylabel("without the heads of")
    return figure


@styled
def heads_kept(kept: Mapping[int, float]) -> Figure:
    """Accuracy with only the most trusted heads; the others are mean-ablated. Dotted: 90 % of the accuracy of all."""
    figure, axes = _figure(2.6)
    counts = list(kept)
    axes.plot(counts, [100 * accuracy for accuracy in kept.values()], "o-", color=BLUE, markersize=4)
    axes.axhline(90 * kept[max(counts)], color=INK, linestyle=":", linewidth=1)
    _count_heads(axes, max(counts))
    axes.set_xlabel("heads kept")
    axes.set_ylabel("accuracy, %")
    return figure


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _grid(weights_K: Tensor, sites: Mapping[str, int]) -> Tensor:
    """Attention blocks by heads; NaN where a block has fewer heads than the largest."""
    grid = torch.full((len(sites), max(sites.values())), float("nan"))
    for row, weights in enumerate(weights_K.cpu().split(list(sites.values()))):
        grid[row, : len(weights)] = weights
    return grid


def _shade(strength: Tensor, colour: str = BLUE) -> Any:
    """A colour of an opacity that follows the strength in [0, 1]: RGBA."""
    rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    opacity = strength.nan_to_num(0).clamp(0, 1)[..., None]
    return torch.cat([rgb.expand(*strength.shape, 3), opacity], dim=-1).numpy()


def _name_classes(axes: Axes, classes: Sequence[str]) -> None:
    """Frame a matrix of classes by classes."""
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.spines[:].set_visible(True)


def _draw_map(axes: Axes, weights_K: Tensor, sites: Mapping[str, int]) -> None:
    """Attention blocks (rows) by heads, in a frame; the deeper the colour, the closer to the strongest head."""
    grid = _grid(weights_K, sites)
    axes.imshow(_shade(grid / grid.nan_to_num().max().clamp_min(1e-12)), interpolation="none", aspect="auto")
    axes.spines[:].set_visible(True)


def _count_heads(axes: Axes, most: int) -> None:
    """A percentage over 1, 2, 4, ... heads."""
    doublings = [2**power for power in range(most.bit_length())]
    axes.set_xscale("log")
    axes.set_xticks(doublings, list(map(str, doublings)))
    axes.minorticks_off()
    axes.set_ylim(0, 102)
