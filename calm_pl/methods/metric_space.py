"""Voting in the within-head metric: what `Calm` and `LearnedWeights` share.

Two things are done to head outputs before the metric of `calm_pl.functional`. Each is scaled to length 1, since a
cosine asks for directions and loud clips should not shape the metric. And the centre lies short of the mean of the
prototypes: the mean of a few prototypes is itself uncertain, and a cosine around it forgets what all classes share
and other sounds do not. How short depends on the backbone.

Shapes: N clips, K heads, D head dimension, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from calm_pl import functional as F
from calm_pl.functional.heads import CHUNK_ELEMENTS, chunks, default_chunk_size, unit
from calm_pl.functional.metric import HeadMetric
from calm_pl.methods.base import HeadClassifier, check_support
from calm_pl.methods.calibration import best_temperature
from calm_pl.methods.leave_one_out import LeaveOneOut
from calm_pl.methods.selection import judged_clips

CENTRE = 0.8
SHRINKAGES = (0.03, 0.1, 0.3, 1.0)
UNLABELLED_SHRINKAGE = 0.6  # the total covariance holds what tells classes apart, too: much of it must stay


def directions(heads_NKD: Tensor) -> Tensor:
    """Head outputs scaled to length 1, in their own dtype, without a float32 copy of all of them."""
    found_NKD = torch.empty_like(heads_NKD)
    for chunk in chunks(len(heads_NKD), max(1, CHUNK_ELEMENTS // max(1, heads_NKD[:1].numel()))):
        found_NKD[chunk] = unit(heads_NKD[chunk].float()).to(heads_NKD.dtype)
    return found_NKD


class MetricSpace(HeadClassifier):
    """A classifier that votes on raw cosines, or in a metric where `in_metric` made one.

    Attributes:
        unlabelled_NKD: head outputs of clips without labels, to be given before `fit`. Where no class has two clips,
            the metric is their total covariance, around their mean; else they are not looked at.
    """

    mean_KD: Tensor
    transform_KDD: Tensor
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
        return HeadMetric.estimate(everything_NKD, no_classes_N, 1), UNLABELLED_SHRINKAGE

    @staticmethod
    def in_metric(metric: HeadMetric, shrinkage: float | str, prototypes_CKD: Tensor) -> dict[str, Tensor]:
        """The buffers of a vote in this metric; `prototypes_CKD` are means of directions."""
        mean_KD, transform_KDD = metric.mean_KD, metric.transform(shrinkage)
        return {
            "mean_KD": mean_KD,
            "transform_KDD": transform_KDD,
            "prototypes_CKD": F.whiten(prototypes_CKD, mean_KD, transform_KDD),
        }

    def vote(self, queries_NKD: Tensor, weights_KC: Tensor, tau: float | Tensor) -> Tensor:
        """Scores s[n,c] = sum over k of w[k,c] p[n,k,c] (CALM, section 3): (N, C), in chunks of queries."""
        scores = []
        for chunk in chunks(len(queries_NKD), default_chunk_size(*queries_NKD.shape[1:])):
            heads_NKD = queries_NKD[chunk]
            if hasattr(self, "transform_KDD"):
                heads_NKD = F.whiten(directions(heads_NKD), self.mean_KD, self.transform_KDD)
            scores.append(F.vote(heads_NKD, self.prototypes_CKD, weights_KC, tau))
        return torch.cat(scores)


class Whitened(HeadClassifier):
    """Any method in the within-head metric: heads are moved into it first, and the method sees nothing else.

    Args:
        method: the method, for instance a baseline.
        shrinkage: g, a number or "ledoit_wolf" or "oas"; None chooses it by the calibrated leave-one-out likelihood
            of all heads voting alike.
        centre: as a share of the mean of the prototypes.
        tau: temperature of those votes.
    """

    mean_KD: Tensor
    transform_KDD: Tensor

    def __init__(
        self, method: HeadClassifier, shrinkage: float | str | None = None, centre: float = CENTRE, tau: float = 0.15
    ) -> None:
        super().__init__()
        self.method, self.shrinkage, self.centre, self.tau = method, shrinkage, centre, tau

    def fit(self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        check_support(heads_NKD, labels_N, num_classes)
        heads_NKD = directions(heads_NKD)
        metric = HeadMetric.estimate(heads_NKD, labels_N, num_classes, self.centre)
        left_out = LeaveOneOut(heads_NKD, labels_N, num_classes, metric)
        shrinkage = self._choose(left_out) if self.shrinkage is None else self.shrinkage
        self.keep({"metric_shrinkage": shrinkage}, mean_KD=metric.mean_KD, transform_KDD=metric.transform(shrinkage))
        self.method.fit(F.whiten(heads_NKD, self.mean_KD, self.transform_KDD), labels_N, num_classes)
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
        parts = [
            self.method(F.whiten(directions(queries_NKD[chunk]), self.mean_KD, self.transform_KDD))
            for chunk in chunks(len(queries_NKD), default_chunk_size(*queries_NKD.shape[1:]))
        ]
        return torch.cat(parts)
