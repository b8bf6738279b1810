"""Choosing on the support set alone: every candidate is judged by cross-validated accuracy, ties by likelihood.

Shapes: N clips, K heads, D head dimension, C classes, F weightings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from calm_pl import functional as F
from calm_pl.functional.heads import class_means
from calm_pl.functional.metric import HeadMetric
from calm_pl.methods.calibration import MIN_PROBABILITY, accuracy_and_nll
from calm_pl.methods.leave_one_out import LeaveOneOut
from calm_pl.methods.logistic import FOLDS, places_in_class, stratified_folds

# Choosing looks at no more than this many posteriors at once, but at two clips of every class; clips beyond it still
# make prototypes and weights.
MAX_POSTERIORS = 2**26
# The first of equals is taken, as at two clips a class, whose folds leave nothing to tell of a metric.
SHRINKAGES = (0.3, 0.1, 1.0, 0.03)


@dataclass(frozen=True)
class Formula:
    """One way to compute class-conditional weights.

    Attributes:
        tau: temperature of the head posteriors.
        scheme: what a reliability is, one of `calm_pl.functional.SCHEMES`.
        tau_w: temperature of the weights.
        top_k: heads a class may use; None for all.
        alpha: shrinkage of reliabilities toward their mean, in clips.
        shrinkage: g of the within-head metric, or the name of a formula for it; None for raw cosines.
    """

    tau: float = 0.07
    scheme: str = "margin_clamped"
    tau_w: float = 1.0
    top_k: int | None = None
    alpha: float = 0.0
    shrinkage: float | str | None = None


@dataclass(frozen=True)
class Grid:
    """The values tried for each part of a `Formula`; one value fixes it.

    `top_k` is given as fractions of the heads; `shrinkage` counts in the within-head metric alone.
    """

    tau: Sequence[float] = (0.03, 0.07, 0.15)
    scheme: Sequence[str] = F.SCHEMES
    tau_w: Sequence[float] = (0.3, 1.0)
    top_fraction: Sequence[float] = (1.0, 0.25)
    alpha: Sequence[float] = (0.0, 5.0)
    shrinkage: Sequence[float | str] = SHRINKAGES


GRID = Grid()


@dataclass(frozen=True)
class Judged:
    """A formula and how it did on clips that were held out: its scores of those clips, and their classes."""

    formula: Formula
    accuracy: float
    nll: float
    scores_NC: Tensor
    labels_N: Tensor

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self.formula), "cv_accuracy": self.accuracy, "cv_nll": self.nll}


def judge_all(
    heads_NKD: Tensor, labels_N: Tensor, num_classes: int, grid: Grid, metric: HeadMetric | None = None
) -> list[Judged]:
    """Every formula of the grid, in its order, with its cross-validated accuracy and likelihood.

    A clip is compared with prototypes, in a metric, made without it, and the weights that then judge it are made
    without its whole fold: prototypes, metric and reliabilities anew. To leave its own evidence out of the weights
    would not do: its classmates would still tell of the heads by prototypes that hold it.
    """
    clips = judged_clips(labels_N, heads_NKD.shape[1] * num_classes)
    fold_N = torch.full_like(labels_N, -1)
    fold_N[clips] = stratified_folds(labels_N[clips], FOLDS)
    # Clips that are not judged make prototypes; reliabilities only where a class has no other clip.
    speaks_N = (fold_N >= 0) | (torch.bincount(labels_N)[labels_N] == 1)
    left_out = LeaveOneOut(heads_NKD, labels_N, num_classes, metric)
    shrinkages: Sequence[float | str | None] = (None,) if metric is None else grid.shrinkage
    scores: dict[Formula, list[Tensor]] = {}
    labels = []
    for fold in range(int(fold_N.max()) + 1):
        held_N = fold_N == fold
        held, rest = held_N.nonzero()[:, 0], left_out.without(held_N)
        speaking = speaks_N[~held_N].nonzero()[:, 0]
        labels.append(labels_N[held])
        for shrinkage in shrinkages:
            cosines_NKC, held_cosines_NKC = rest.cosines(shrinkage, speaking), left_out.cosines(shrinkage, held)
            for tau in grid.tau:
                posteriors_NKC = torch.softmax(cosines_NKC / tau, -1)
                weighted = _weightings(posteriors_NKC, rest, speaking, grid, Formula(tau=tau, shrinkage=shrinkage))
                held_posteriors_NKC = torch.softmax(held_cosines_NKC / tau, -1)
                weights_FKC = torch.stack(list(weighted.values()))
                scores_FNC = torch.einsum("nkc,fkc->fnc", held_posteriors_NKC, weights_FKC)
                for formula, scores_NC in zip(weighted, scores_FNC, strict=True):
                    scores.setdefault(formula, []).append(scores_NC)
    return [_judge(formula, torch.cat(parts), torch.cat(labels)) for formula, parts in scores.items()]


def _judge(formula: Formula, scores_NC: Tensor, labels_N: Tensor) -> Judged:
    probabilities_NC = scores_NC / scores_NC.sum(1, keepdim=True).clamp_min(MIN_PROBABILITY)
    return Judged(formula, *accuracy_and_nll(probabilities_NC, labels_N), probabilities_NC, labels_N)


def _weightings(
    posteriors_NKC: Tensor, left_out: LeaveOneOut, clips: Tensor, grid: Grid, start: Formula
) -> dict[Formula, Tensor]:
    """The weights (K, C) of every formula with this start, from posteriors of these clips."""
    labels_N, counts_C = left_out.labels_N[clips], torch.bincount(left_out.labels_N)
    num_heads, num_classes = posteriors_NKC.shape[1:]
    weighted = {}
    for scheme in grid.scheme:
        evidence_NK = F.clip_evidence(posteriors_NKC, labels_N, scheme)
        reliability_KC = class_means(evidence_NK, labels_N, num_classes).T
        for alpha, tau_w, fraction in product(grid.alpha, grid.tau_w, grid.top_fraction):
            top_k = None if fraction == 1 else max(1, round(fraction * num_heads))
            formula = replace(start, scheme=scheme, alpha=alpha, tau_w=tau_w, top_k=top_k)
            shrunk_KC = F.shrink_reliability(reliability_KC, counts_C, alpha)
            weighted[formula] = F.head_weights(shrunk_KC, scheme, tau_w, top_k)
    return weighted


def judged_clips(labels_N: Tensor, posteriors_per_clip: int) -> Tensor:
    """The clips that choosing looks at: those of classes that have another clip, at most MAX_POSTERIORS' worth or two
    a class.

    Beyond that, the first clips of every class in turn.
    """
    counts_C = torch.bincount(labels_N)
    clips = (counts_C[labels_N] > 1).nonzero()[:, 0]
    limit = max(2 * len(counts_C), MAX_POSTERIORS // posteriors_per_clip)
    if len(clips) <= limit:
        return clips
    return clips[places_in_class(labels_N)[clips].argsort(stable=True)[:limit]].sort().values


def best_of(judged: Sequence[Judged]) -> Judged:
    """Highest accuracy, then likelihood, then the first."""
    return max(judged, key=lambda j: (j.accuracy, -j.nll))
