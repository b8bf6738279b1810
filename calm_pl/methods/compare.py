"""Methods side by side on the same heads, the same support sets and the same test clips, and what to conclude.

Shapes: N clips, K heads, D head dimension, C classes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_f1_score

from calm_pl.methods.base import HeadClassifier
from calm_pl.methods.calibration import figures

Key = tuple[str, int, int, str]


@dataclass(frozen=True)
class Fold:
    """One division of the clips: indices that support sets are drawn from, and indices to test on."""

    name: str
    train: Tensor
    test: Tensor


@dataclass(frozen=True)
class Row:
    """One method, fitted on one support set and tested on one fold's clips."""

    method: str
    shots: int
    seed: int
    fold: str
    accuracy: float
    macro_f1: float
    nll: float
    brier: float
    ece: float
    seconds: float

    @property
    def key(self) -> Key:
        return self.method, self.shots, self.seed, self.fold

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    heads_NKD: Tensor,
    labels_N: Tensor,
    num_classes: int,
    folds: Sequence[Fold],
    shots: Sequence[int],
    seeds: Sequence[int],
    methods: Mapping[str, Callable[[], HeadClassifier]],
    draw: Callable[[Tensor, int, int], Sequence[int]],
    done: Collection[Key] = (),
) -> Iterator[Row]:
    """Fit and test every method on every draw; rows come as they are made, so that a caller can keep them.

    Args:
        heads_NKD: head outputs of all clips.
        labels_N: their classes.
        num_classes: C.
        folds: the divisions.
        shots: clips a class in a support set; a number that repeats counts once.
        seeds: one support set is drawn for each; as with shots.
        methods: how to make each method anew.
        draw: (indices of the pool, shots, seed) -> positions in the pool that make the support set.
        done: keys of rows that exist already and are left out.
    """
    for fold in folds:
        for count in dict.fromkeys(shots):
            for seed in dict.fromkeys(seeds):
                wanted = [name for name in methods if (name, count, seed, fold.name) not in done]
                if not wanted:
                    continue
                support = fold.train[torch.as_tensor(draw(fold.train, count, seed))]
                for name in wanted:
                    method, seconds = timed_fit(methods[name](), heads_NKD[support], labels_N[support], num_classes)
                    scores = score(method, heads_NKD[fold.test], labels_N[fold.test])
                    yield Row(name, count, seed, fold.name, **scores, seconds=seconds)


def timed_fit(
    method: HeadClassifier, heads_NKD: Tensor, labels_N: Tensor, num_classes: int
) -> tuple[HeadClassifier, float]:
    """The method, fitted, and how many seconds that took."""
    started = time.perf_counter()
    method.fit(heads_NKD, labels_N, num_classes)
    return method, time.perf_counter() - started


@torch.no_grad()
def score(method: HeadClassifier, heads_NKD: Tensor, labels_N: Tensor) -> dict[str, float]:
    """`figures` and macro F1 of a fitted method on clips of known classes."""
    probabilities_NC = method(heads_NKD)
    macro_f1 = multiclass_f1_score(probabilities_NC, labels_N, probabilities_NC.shape[1], average="macro")
    return {**figures(probabilities_NC, labels_N), "macro_f1": float(macro_f1)}


@dataclass(frozen=True)
class Difference:
    """How much better a method is than another on the same draws: mean of the differences and 95 % interval.

    `low` and `high` are NaN below 3 seeds.
    """

    method: str
    reference: str
    shots: int
    mean: float
    low: float
    high: float
    draws: int


def paired_differences(rows: Iterable[Row], method: str, reference: str, figure: str = "accuracy") -> list[Difference]:
    """Differences between two methods at every shot count.

    One seed's differences, averaged over its folds, are one observation; the interval is Student's over
    seeds.
    """
    values: dict[Key, float] = {row.key: getattr(row, figure) for row in rows}
    by_seed: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (name, shots, seed, fold), value in values.items():
        if name == method and (reference, shots, seed, fold) in values:
            by_seed[shots][seed].append(value - values[reference, shots, seed, fold])
    found = []
    for shots, seeds in sorted(by_seed.items()):
        means = [statistics.fmean(differences) for differences in seeds.values()]
        mean, margin = statistics.fmean(means), half_width(means)
        draws = sum(len(differences) for differences in seeds.values())
        found.append(Difference(method, reference, shots, mean, mean - margin, mean + margin, draws))
    return found


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean by Student's t; NaN below 3 values."""
    if len(values) < 3:
        return math.nan
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def mean_and_half(mean: float, half: float) -> str:
    """A mean and half of its interval in percent, as tables show them; the mean alone where half is NaN."""
    return f"{100 * mean:.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def t_quantile(freedom: int) -> float:
    """The point below which Student's t lies with a probability of 0.975, to 6 digits.

    By bisection on the closed form of the distribution for whole degrees of freedom (Abramowitz and Stegun 26.7.3-4).
    """

    def share_within(t: float) -> float:
        theta = math.atan(t / math.sqrt(freedom))
        term, terms = (math.cos(theta), []) if freedom % 2 else (1.0, [])
        for power in range(2 + freedom % 2, freedom + 1, 2):
            terms.append(term)
            term *= math.cos(theta) ** 2 * (power - 1) / power
        if freedom % 2:
            return 2 / math.pi * (theta + math.sin(theta) * math.fsum(terms))
        return math.sin(theta) * math.fsum(terms)

    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share_within(middle) < 0.95 else (low, middle)
    return low
