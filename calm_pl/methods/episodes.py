"""Few-shot episodes from the labelled support set alone.

Shapes: N clips, K heads, D head dimension, C classes, Q queries of one step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calm_pl.functional.heads import MIN_NORM
from calm_pl.methods.leave_one_out import LeaveOneOut
from calm_pl.methods.logistic import places_in_class

# Posteriors that one optimiser step works on; support sets beyond it are visited in parts.
MAX_POSTERIORS = 2**24


@dataclass(frozen=True)
class Episodes:
    """What one optimiser step sees: cosines of queries with prototypes they had no part in, and their classes.

    `total` counts the queries of all ranks, so that a sum over them divided by it is the mean over the step.
    """

    cosines_QKC: Tensor
    labels_Q: Tensor
    dropped_K: Tensor
    total: int


class EpisodeSource:
    """Draws the episodes of a step from (seed, step) alone: the same on every machine, in parts on several
    ranks.

    With `shots` None every clip is a query against prototypes of all others: the largest episodes that a
    support set holds, without the noise of small prototypes. The only clip of a class then has a noisy copy
    of itself as query (see `LeaveOneOut`): there is no second clip, and against its own prototype it would
    teach nothing. With `shots` k, each episode makes prototypes of k random clips a class (at least one clip
    is left to query) and the rest are queries.

    Args:
        left_out: the support set in the metric of its choice.
        shrinkage: g of the metric; None for raw cosines.
        shots: clips a prototype, or None for leave-one-out.
        per_step: random episodes a step (with `shots`).
        head_dropout: share of heads that a step leaves out.
        seed: of the draws.
    """

    def __init__(
        self,
        left_out: LeaveOneOut,
        shrinkage: float | str | None,
        shots: int | None = None,
        per_step: int = 4,
        head_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.left_out, self.shrinkage, self.shots = left_out, shrinkage, shots
        self.per_step, self.head_dropout, self.seed = per_step, head_dropout, seed
        self.labels_N = left_out.labels_N
        num_classes, (num_heads, _, _) = left_out.num_classes, left_out.prototypes_KCD.shape
        self.queries_per_step = max(1, MAX_POSTERIORS // (num_heads * num_classes))
        self._all_cosines: Tensor | None = None
        alone = bool((left_out.counts_N == 1).any())
        if shots is None and not alone and len(self.labels_N) <= self.queries_per_step:
            self._all_cosines = left_out.cosines(shrinkage)

    def draw(self, step: int, rank: int = 0, world_size: int = 1) -> Episodes:
        """The part of step `step` that belongs to this rank."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        num_heads = len(self.left_out.prototypes_KCD)
        dropped_K = torch.rand(num_heads, generator=generator) < self.head_dropout
        dropped_K &= ~dropped_K.all()
        device = self.labels_N.device
        if self.shots is not None:
            parts = [self._random_split(generator) for _ in range(self.per_step)]
            cosines_QKC = torch.cat([cosines for cosines, _ in parts])
            labels_Q = torch.cat([labels for _, labels in parts])
            mine = slice(rank, None, world_size)
            return Episodes(cosines_QKC[mine], labels_Q[mine], dropped_K.to(device), len(labels_Q))
        order_N = torch.randperm(len(self.labels_N), generator=generator)[: self.queries_per_step]
        clips = order_N[rank::world_size].sort().values.to(device)
        if self._all_cosines is not None:
            cosines_QKC = self._all_cosines[clips]
        else:
            cosines_QKC = self.left_out.cosines(self.shrinkage, clips, generator)
        return Episodes(cosines_QKC, self.labels_N[clips], dropped_K.to(device), len(order_N))

    def _random_split(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Prototypes of random clips; the metric is the support set's, with each query's residual taken out of it."""
        assert self.shots is not None
        labels_N, num_classes = self.labels_N, self.left_out.num_classes
        order_N = torch.randperm(len(labels_N), generator=generator).to(labels_N.device)
        place_N = torch.empty_like(labels_N)  # of each clip in its class, shuffled
        place_N[order_N] = places_in_class(labels_N[order_N])
        shots_N = torch.minimum(torch.tensor(self.shots), (self.left_out.counts_N - 1).clamp_min(1))
        prototype_N = place_N < shots_N
        queries = (~prototype_N).nonzero()[:, 0]
        whitened_KND = self.left_out.whitened(self.shrinkage)
        share_CN = torch.nn.functional.one_hot(labels_N, num_classes).T * prototype_N / shots_N
        prototypes_KCD = share_CN @ whitened_KND
        queries_KQD = whitened_KND[:, queries]
        residual_KQD = queries_KQD - self.left_out.whitened_prototypes(self.shrinkage)[:, labels_N[queries]]
        gain_KQ1 = self.left_out.metric_gain(residual_KQD, self.left_out.counts_N[queries], self.shrinkage)
        along_query_KQ1 = (residual_KQD * queries_KQD).sum(2, keepdim=True)
        along_KQC = residual_KQD @ prototypes_KCD.mT
        inner_KQC = queries_KQD @ prototypes_KCD.mT + gain_KQ1 * along_query_KQ1 * along_KQC
        query_KQ1 = queries_KQD.square().sum(2, keepdim=True) + gain_KQ1 * along_query_KQ1.square()
        proto_KQC = prototypes_KCD.square().sum(2)[:, None] + gain_KQ1 * along_KQC.square()
        lengths_KQC = query_KQ1.clamp_min(MIN_NORM**2).sqrt() * proto_KQC.clamp_min(MIN_NORM**2).sqrt()
        cosines_QKC = (inner_KQC / lengths_KQC).transpose(0, 1)
        row_QC = self.left_out.row_NC[queries]
        shown_QC = (row_QC >= 0) & prototype_N[row_QC]  # another row of the query is in the prototype
        return cosines_QKC.masked_fill(shown_QC[:, None], -1), labels_N[queries]
