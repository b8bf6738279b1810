"""Voting in the within-head metric: what `Calm` and `LearnedWeights` share.

Two things are done to head outputs before the metric of `calm_pl.functional`. Each is scaled to length 1, since a
cosine asks for directions and loud clips should not shape the metric. And the centre is half the mean of the
prototypes: the mean of a few prototypes is itself uncertain, and a cosine around it forgets what all classes share
and other sounds do not.

Shapes: N clips, K heads, D head dimension, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calm_pl import functional as F
from calm_pl.functional.heads import CHUNK_ELEMENTS, chunks, default_chunk_size, unit
from calm_pl.functional.metric import HeadMetric
from calm_pl.methods.base import HeadClassifier

CENTRE = 0.5


def directions(heads_NKD: Tensor) -> Tensor:
    """Head outputs scaled to length 1, in their own dtype, without a float32 copy of all of them."""
    found_NKD = torch.empty_like(heads_NKD)
    for chunk in chunks(len(heads_NKD), max(1, CHUNK_ELEMENTS // max(1, heads_NKD[:1].numel()))):
        found_NKD[chunk] = unit(heads_NKD[chunk].float()).to(heads_NKD.dtype)
    return found_NKD


class MetricSpace(HeadClassifier):
    """A classifier that votes on raw cosines, or in a metric where `in_metric` made one."""

    mean_KD: Tensor
    transform_KDD: Tensor
    prototypes_CKD: Tensor

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
