"""Voting in the within-head metric: what `Calm` and `LearnedWeights` share.

Two things are done to head outputs before the metric of `calm_pl.functional`. Each is scaled to length 1, since a
cosine asks for directions and loud clips should not shape the metric. And the centre lies short of the mean of the
prototypes: the mean of a few prototypes is itself uncertain, and a cosine around it forgets what all classes share
and other sounds do not. How short depends on the backbone.

The metric is kept and applied as factors, which are as small as the support set is: N - C directions a head.

Shapes: N clips, K heads, D head dimension, C classes, R rank of the metric.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from calm_pl import functional as F
from calm_pl.functional.heads import chunks, default_chunk_size, unit
from calm_pl.functional.metric import HeadMetric
from calm_pl.methods.base import HeadClassifier, check_support
from calm_pl.methods.calibration import best_temperature
from calm_pl.methods.leave_one_out import LeaveOneOut
from calm_pl.methods.selection import SHRINKAGES, judged_clips

CENTRE = 0.8
UNLABELLED_SHRINKAGE = 0.6  # the total covariance holds what tells classes apart, too: much of it must stay


def directions(heads_NKD: Tensor) -> Tensor:
    """Head outputs scaled to length 1, in their own dtype, without a float32 copy of all of them."""
    found_NKD = torch.empty_like(heads_NKD)
    for chunk in chunks(len(heads_NKD), default_chunk_size(*heads_NKD.shape[1:])):
        found_NKD[chunk] = unit(heads_NKD[chunk].float()).to(heads_NKD.dtype)
    return found_NKD


def factors(metric: HeadMetric, shrinkage: float | str, rank: int | None = None) -> dict[str, Tensor]:
    """The buffers of `InMetric`, of this rank at most.

    What is chosen by leaving clips out is chosen in the whole metric: less of it cannot do without a clip exactly.
    """
    axes_KDR, stretch_KR, rest_K = (metric if rank is None else metric.of_rank(rank)).factors(shrinkage)
    return {"mean_KD": metric.mean_KD, "axes_KDR": axes_KDR, "stretch_KR": stretch_KR, "rest_K": rest_K}


class InMetric(HeadClassifier):
    """A method whose buffers may hold the `factors` of a metric."""

    mean_KD: Tensor
    axes_KDR: Tensor
    stretch_KR: Tensor
    rest_K: Tensor

    def into_metric(self, heads_NKD: Tensor) -> Tensor:
        """Head outputs in the metric, where there is one: (N, K, D)."""
        if not hasattr(self, "axes_KDR"):
            return heads_NKD
        return F.whiten_by_factors(directions(heads_NKD), self.mean_KD, self.axes_KDR, self.stretch_KR, self.rest_K)


class MetricSpace(InMetric):
    """A classifier that votes on raw cosines, or in a metric where `in_metric` made one.

    Attributes:
        unlabelled_NKD: head outputs of clips without labels, to be given before `fit`. Where no class has two clips,
            the metric is their total covariance, around their mean; else they are not looked at.
    """

    prototypes_CKD: Tensor
    unlabelled_NKD: Tensor | None = None

    def estimate(
        self, directions_NKD: Tensor, labels_N: Tensor, num_classes: int, centre: float
    ) -> tuple[HeadMetric, float]:
        """The metric of a support set, and the g to take where nothing can be left out to choose it."""
        metric = HeadMetric.estimate(directions_NKD, labels_N, num_classes, centre)
        if metric.freedom or self.unlabelled_NKD is None:
            return metric, 1.0
        everything_NKD = directions(self.unlabelled_NKD)
        no_classes_N = torch.zeros(len(everything_NKD), dtype=torch.long, device=everything_NKD.device)
        return HeadMetric.estimate(everything_NKD, no_classes_N, 1, whole=True), UNLABELLED_SHRINKAGE

    @staticmethod
    def in_metric(
        metric: HeadMetric, shrinkage: float | str, rank: int | None, prototypes_CKD: Tensor
    ) -> dict[str, Tensor]:
        """The buffers of a vote in this metric; `prototypes_CKD` are means of directions."""
        buffers = factors(metric, shrinkage, rank)
        return {**buffers, "prototypes_CKD": F.whiten_by_factors(prototypes_CKD, **buffers)}

    def vote(self, queries_NKD: Tensor, weights_KC: Tensor, tau: float | Tensor) -> Tensor:
        """Scores s[n,c] = sum over k of w[k,c] p[n,k,c] (CALM, section 3): (N, C), in chunks of queries."""
        parts = chunks(len(queries_NKD), default_chunk_size(*queries_NKD.shape[1:]))
        return torch.cat(
            [F.vote(self.into_metric(queries_NKD[part]), self.prototypes_CKD, weights_KC, tau) for part in parts]
        )


class Whitened(InMetric):
    """Any method in the within-head metric: heads are moved into it first, and the method sees nothing else.

    Args:
        method: the method, for instance a baseline.
        shrinkage: g, a number or "ledoit_wolf" or "oas"; None chooses it by the calibrated leave-one-out likelihood
            of all heads voting alike.
        centre: as a share of the mean of the prototypes.
        tau: temperature of those votes.
        metric_rank: of the metric, at most; None for all that the support set tells.
    """

    def __init__(
        self,
        method: HeadClassifier,
        shrinkage: float | str | None = None,
        centre: float = CENTRE,
        tau: float = 0.15,
        metric_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.method, self.shrinkage, self.centre = method, shrinkage, centre
        self.tau, self.metric_rank = tau, metric_rank

    def fit(self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        labels_N = check_support(heads_NKD, labels_N, num_classes)
        directions_NKD = directions(heads_NKD)
        metric = HeadMetric.estimate(directions_NKD, labels_N, num_classes, self.centre)
        left_out = LeaveOneOut(directions_NKD, labels_N, num_classes, metric)
        shrinkage = self._choose(left_out) if self.shrinkage is None else self.shrinkage
        self.keep({"metric_shrinkage": shrinkage}, **factors(metric, shrinkage, self.metric_rank))
        self.method.fit(self.into_metric(heads_NKD), labels_N, num_classes)
        return self

    def _choose(self, left_out: LeaveOneOut) -> float:
        num_heads = len(left_out.prototypes_KCD)
        clips = judged_clips(left_out.labels_N, num_heads * left_out.num_classes)

        def nll(shrinkage: float) -> float:
            scores_NC = torch.softmax(left_out.cosines(shrinkage, clips) / self.tau, -1).mean(1)
            return best_temperature(scores_NC, left_out.labels_N[clips])[1]

        return min(SHRINKAGES, key=nll) if len(clips) else 1.0

    def choices(self) -> dict[str, Any]:
        return {**super().choices(), **self.method.choices()}

    def forward(self, queries_NKD: Tensor) -> Tensor:
        """The method's probabilities (N, C)."""
        parts = chunks(len(queries_NKD), default_chunk_size(*queries_NKD.shape[1:]))
        return torch.cat([self.method(self.into_metric(queries_NKD[part])) for part in parts])
