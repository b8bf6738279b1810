"""Choosing on the support set alone: every candidate is judged by leave-one-out accuracy, ties by likelihood.

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

# Choosing looks at no more than this many posteriors at once, but at two clips of every class; clips beyond it still
# make prototypes and weights.
MAX_POSTERIORS = 2**26
SHRINKAGES = (0.03, 0.1, 0.3, 1.0)


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
    """A formula and how it did when every clip was left out: its scores of those clips, and their classes."""

    formula: Formula
    accuracy: float
    nll: float
    scores_NC: Tensor
    labels_N: Tensor

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self.formula), "loo_accuracy": self.accuracy, "loo_nll": self.nll}


def judge_all(
    heads_NKD: Tensor, labels_N: Tensor, num_classes: int, grid: Grid, metric: HeadMetric | None = None
) -> list[Judged]:
    """Every formula of the grid, in its order, with its leave-one-out accuracy and likelihood.

    A clip is left out of its prototype, of the metric, and with its own evidence of the reliability of its class. Its
    classmates' evidence comes from prototypes that hold it still, so that accuracy and likelihood are too good, the
    more so the fewer the clips.
    """
    clips = judged_clips(labels_N, heads_NKD.shape[1] * num_classes)
    if not len(clips):
        return []
    judged: list[Judged] = []
    shrinkages: Sequence[float | str | None] = (None,) if metric is None else grid.shrinkage
    for shrinkage in shrinkages:
        left_out = LeaveOneOut(heads_NKD, labels_N, num_classes, metric)
        cosines_NKC = left_out.cosines(shrinkage, clips)
        for tau in grid.tau:
            posteriors_NKC = torch.softmax(cosines_NKC / tau, -1)
            start = Formula(tau=tau, shrinkage=shrinkage)
            judged += _judge_weightings(posteriors_NKC, labels_N[clips], grid, start)
    return judged


def _judge_weightings(posteriors_NKC: Tensor, labels_N: Tensor, grid: Grid, start: Formula) -> list[Judged]:
    num_heads, num_classes = posteriors_NKC.shape[1:]
    counts_C = torch.bincount(labels_N, minlength=num_classes)
    own_KN = posteriors_NKC.gather(2, labels_N[:, None, None].expand(-1, num_heads, 1))[..., 0].T
    formulas, weights, own_scores = [], [], []
    for scheme in grid.scheme:
        evidence_NK = F.clip_evidence(posteriors_NKC, labels_N, scheme)
        reliability_KC = class_means(evidence_NK, labels_N, num_classes).T
        count_N = counts_C[labels_N]
        rest_KN = (reliability_KC[:, labels_N] * count_N - evidence_NK.T) / (count_N - 1).clamp_min(1)
        for alpha, tau_w, fraction in product(grid.alpha, grid.tau_w, grid.top_fraction):
            top_k = None if fraction == 1 else max(1, round(fraction * num_heads))
            formulas.append(replace(start, scheme=scheme, alpha=alpha, tau_w=tau_w, top_k=top_k))
            shrunk_KC = F.shrink_reliability(reliability_KC, counts_C, alpha)
            weights.append(F.head_weights(shrunk_KC, scheme, tau_w, top_k))
            # The column of the clip's own class is made without the clip's own evidence.
            trust_N = (count_N - 1) / (count_N - 1 + alpha).clamp_min(1e-9)
            without_KN = rest_KN * trust_N + reliability_KC.mean() * (1 - trust_N)
            own_scores.append((F.head_weights(without_KN, scheme, tau_w, top_k) * own_KN).sum(0))
    scores_FNC = torch.einsum("nkc,fkc->fnc", posteriors_NKC, torch.stack(weights))
    index_N1 = labels_N[:, None]
    judged = []
    for formula, scores_NC, own_N in zip(formulas, scores_FNC, own_scores, strict=True):
        scores_NC = scores_NC.scatter(1, index_N1, own_N[:, None])
        probabilities_NC = scores_NC / scores_NC.sum(1, keepdim=True).clamp_min(MIN_PROBABILITY)
        judged.append(Judged(formula, *accuracy_and_nll(probabilities_NC, labels_N), probabilities_NC, labels_N))
    return judged


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
    rank_N = torch.zeros_like(labels_N)
    for c in range(len(counts_C)):
        members = (labels_N == c).nonzero()[:, 0]
        rank_N[members] = torch.arange(len(members), device=labels_N.device)
    return clips[rank_N[clips].argsort(stable=True)[:limit]].sort().values


def best_of(judged: Sequence[Judged]) -> Judged:
    """Highest accuracy, then likelihood, then the first."""
    return max(judged, key=lambda j: (j.accuracy, -j.nll))
