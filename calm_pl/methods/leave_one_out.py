"""Leaving every support clip out of its own prototype, and of the within-head metric, in closed form.

With z the clip minus its prototype in whitened space, n the clips of its class and C the classes, leaving it
out moves its prototype by -z / (n - 1), the mean of the prototypes by -z / (n - 1) / C, and takes z z' from the
metric. All of it is rank-one, so that every cosine without the clip follows from inner products with it. Only
tr S and the divisor N - C stay those of the full set (the tests compare with doing it by hand).

Shapes: N clips, K heads, D head dimension (in a metric, the dimensions that the support set spans), C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from calm_pl.functional.heads import MIN_NORM, Rows, chunks, class_means, default_chunk_size, unit
from calm_pl.functional.metric import HeadMetric

# Heads by which two rows are known to be one clip; over the whole depth, since early heads may not hear anything.
PROBED_HEADS = 8
CLIPS_AT_ONCE = 256  # of which heads are copied
# As a share of the largest number: a row of a product may come out a little different elsewhere in the matrix.
SAME = 1e-4
# A clip that alone spans a direction of the metric leaves about g times the mean variance there; float32 ends here.
MIN_LEVERAGE_LEFT = 1e-5


class LeaveOneOut:
    """Cosines of support clips with prototypes, and in a metric, that they had no part in.

    The only clip of a class cannot be left out: it keeps its prototype. With a generator its query is that
    clip with noise as large as the other classes vary, in place of the second clip that nobody recorded.

    A clip with several labels comes as several rows. It is left out of the prototypes of all its classes, by what its
    other rows are to theirs; to one that holds nothing but this clip its cosine is -1.

    Args:
        heads_NKD: head outputs of the support set.
        labels_N: their classes, every class present.
        num_classes: C.
        metric: the support set's own within-head metric; None for raw cosines.
        clip_N: which clip each row is of; None finds out by `same_clips`.
    """

    def __init__(
        self,
        heads_NKD: Tensor | Rows,
        labels_N: Tensor,
        num_classes: int,
        metric: HeadMetric | None = None,
        clip_N: Tensor | None = None,
    ) -> None:
        self.heads_NKD, self.labels_N = heads_NKD, labels_N
        self.num_classes, self.metric = num_classes, metric
        self.clip_N = same_clips(heads_NKD) if clip_N is None else clip_N
        self.row_NC = _rows_of_clips(self.clip_N, labels_N, num_classes)
        self.counts_N = torch.bincount(labels_N, minlength=num_classes)[labels_N]
        self.prototypes_KCD = self._rotate(class_means(heads_NKD, labels_N, num_classes))

    def around(self, centre: float) -> LeaveOneOut:
        """The same in the metric of another centre."""
        assert self.metric is not None
        metric = self.metric.around(centre)
        return LeaveOneOut(self.heads_NKD, self.labels_N, self.num_classes, metric, self.clip_N)

    def _rotate(self, heads_NKD: Tensor) -> Tensor:
        """Into the metric's eigenbasis, where every g is a scaling of the axes."""
        heads_KND = heads_NKD.float().transpose(0, 1)
        if self.metric is None:
            return heads_KND
        return (heads_KND - self.metric.mean_KD[:, None]) @ self.metric.vectors_KDM

    def whitened(self, shrinkage: float | str | Tensor | None = None, clips: Tensor | None = None) -> Tensor:
        """Support clips (all by default) in the metric of this g, in its eigenbasis: (K, N, D)."""
        heads_KND = self._rotate(self.heads_NKD[slice(None) if clips is None else clips])
        return heads_KND if self.metric is None else heads_KND * self._roots(shrinkage)

    def whitened_prototypes(self, shrinkage: float | str | Tensor | None = None) -> Tensor:
        """Prototypes of all clips in the same space: (K, C, D)."""
        return self.prototypes_KCD if self.metric is None else self.prototypes_KCD * self._roots(shrinkage)

    def _roots(self, shrinkage: float | str | Tensor | None) -> Tensor:
        assert self.metric is not None
        if shrinkage is None:
            raise ValueError("shrinkage is None: a within-head metric needs its g")
        return self.metric.inverse_roots(shrinkage)[:, None]

    def metric_gain(self, residual_KND: Tensor, counts_N: Tensor, shrinkage: float | str | Tensor | None) -> Tensor:
        """What taking a clip's residual z out of the metric adds to inner products, per product with z: (K, N, 1).

        Sherman-Morrison: (A - a z z')^-1 = A^-1 + A^-1 z z' A^-1 a / (1 - a z' A^-1 z).
        """
        if self.metric is None or shrinkage is None:
            return torch.zeros_like(residual_KND[..., :1])
        kept_K11 = self.metric.shrinkage_of_heads(shrinkage)[:, None, None]
        counts_N1 = counts_N[:, None]
        share = (1 - kept_K11) / max(1, self.metric.freedom) * counts_N1 / (counts_N1 - 1).clamp_min(1)
        return share / (1 - share * residual_KND.square().sum(2, keepdim=True)).clamp_min(MIN_LEVERAGE_LEFT)

    def cosines(
        self,
        shrinkage: float | str | Tensor | None = None,
        clips: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Cosines of these clips (default: all) without themselves, at this g: (N, K, C), float32."""
        clips = torch.arange(len(self.labels_N), device=self.labels_N.device) if clips is None else clips
        prototypes_KCD = self.whitened_prototypes(shrinkage)
        num_heads = len(prototypes_KCD)
        cosines_NKC = torch.empty(len(clips), num_heads, self.num_classes, device=self.labels_N.device)
        for part in chunks(len(clips), default_chunk_size(num_heads, max(self.num_classes, prototypes_KCD.shape[2]))):
            cosines_NKC[part] = self._without_themselves(clips[part], prototypes_KCD, shrinkage)
        alone_N = self.counts_N[clips] == 1
        if generator is not None and self.metric is not None and bool(alone_N.any()):
            noisy_KND = self.whitened(shrinkage, clips[alone_N])
            # Drawn for every such clip of the support set, so that a clip has the same noise in whatever company.
            of_all = (self.counts_N == 1).nonzero()[:, 0]
            noise_KND = torch.randn(len(noisy_KND), len(of_all), noisy_KND.shape[2], generator=generator)
            noise_KND = noise_KND.to(noisy_KND)[:, torch.searchsorted(of_all, clips[alone_N])]
            # In whitened space the classes vary by about 1 in every direction; two differ by twice that.
            noisy_KND = noisy_KND + 2**0.5 * noise_KND
            # The noise in dimensions that no support clip knows lengthens the query, and that is all.
            unknown_K = (self.metric.dimension_K - noise_KND.shape[2]).clamp_min(0)
            lengths_KN1 = (noisy_KND.square().sum(2, keepdim=True) + 2 * unknown_K[:, None, None]).sqrt()
            cosines_NKC[alone_N] = (noisy_KND / lengths_KN1 @ unit(prototypes_KCD).mT).transpose(0, 1)
        return self._without_their_other_rows(cosines_NKC, clips, prototypes_KCD, shrinkage)

    def _without_their_other_rows(
        self, cosines_NKC: Tensor, clips: Tensor, prototypes_KCD: Tensor, shrinkage: float | str | Tensor | None
    ) -> Tensor:
        row_NC = self.row_NC[clips]
        rows, classes = (row_NC >= 0).nonzero(as_tuple=True)
        others = row_NC[rows, classes]
        if not len(others):
            return cosines_NKC
        for part in chunks(len(others), default_chunk_size(*prototypes_KCD.shape[:2])):
            own_NKC = self._without_themselves(others[part], prototypes_KCD, shrinkage)
            own_NK = own_NKC[torch.arange(len(own_NKC), device=others.device), :, classes[part]]
            own_NK[self.counts_N[others[part]] == 1] = -1
            cosines_NKC[rows[part], :, classes[part]] = own_NK
        return cosines_NKC

    def without(self, held_N: Tensor) -> LeaveOneOut:
        """The same of the clips that are not held, which know nothing of those that are; every class must keep one."""
        assert isinstance(self.heads_NKD, Tensor)
        heads_NKD = Rows(self.heads_NKD, (~held_N).nonzero()[:, 0])
        labels_N, metric = self.labels_N[~held_N], self.metric
        if metric is not None:
            metric = HeadMetric.estimate(heads_NKD, labels_N, self.num_classes, metric.centre)
        return LeaveOneOut(heads_NKD, labels_N, self.num_classes, metric, self.clip_N[~held_N])

    def _without_themselves(
        self, clips: Tensor, prototypes_KCD: Tensor, shrinkage: float | str | Tensor | None
    ) -> Tensor:
        labels_N, counts_N = self.labels_N[clips], self.counts_N[clips]
        chosen_KND = self.whitened(shrinkage, clips)
        alone_N1 = (counts_N == 1)[:, None]
        residual_KND = (chosen_KND - prototypes_KCD[:, labels_N]).masked_fill(alone_N1, 0)
        norms_K1C = prototypes_KCD.square().sum(2)[:, None]
        squares_KN1 = chosen_KND.square().sum(2, keepdim=True)
        inner_KNC = chosen_KND @ prototypes_KCD.mT
        # Products with the residual z, which is zero for a clip that stays where it is.
        proto_z_KNC = residual_KND @ prototypes_KCD.mT
        query_z_KN1 = (residual_KND * chosen_KND).sum(2, keepdim=True)
        z_z_KN1 = residual_KND.square().sum(2, keepdim=True)

        moved_N1 = 1 / (counts_N - 1).clamp_min(1)[:, None]
        centre_N1 = moved_N1 * (self.metric.centre if self.metric is not None else 0) / self.num_classes
        shift_NC = centre_N1 - moved_N1 * one_hot(labels_N, self.num_classes)
        inner_KNC = inner_KNC + shift_NC * query_z_KN1 + centre_N1 * (proto_z_KNC + shift_NC * z_z_KN1)
        query_KN1 = squares_KN1 + centre_N1 * (2 * query_z_KN1 + centre_N1 * z_z_KN1)
        proto_KNC = norms_K1C + shift_NC * (2 * proto_z_KNC + shift_NC * z_z_KN1)
        gain_KN1 = self.metric_gain(residual_KND, counts_N, shrinkage)
        query_z_KN1 = query_z_KN1 + centre_N1 * z_z_KN1
        proto_z_KNC = proto_z_KNC + shift_NC * z_z_KN1
        inner_KNC = inner_KNC + gain_KN1 * query_z_KN1 * proto_z_KNC
        query_KN1 = query_KN1 + gain_KN1 * query_z_KN1.square()
        proto_KNC = proto_KNC + gain_KN1 * proto_z_KNC.square()
        lengths_KNC = query_KN1.clamp_min(MIN_NORM**2).sqrt() * proto_KNC.clamp_min(MIN_NORM**2).sqrt()
        return (inner_KNC / lengths_KNC).transpose(0, 1)


def same_clips(heads_NKD: Tensor | Rows) -> Tensor:
    """The clip of each row, a number that rows share whose head outputs are equal up to rounding: (N,)."""
    heads = torch.linspace(0, heads_NKD.shape[1] - 1, PROBED_HEADS, device=heads_NKD.device).long()
    parts = [heads_NKD[part][:, heads].flatten(1).float() for part in chunks(len(heads_NKD), CLIPS_AT_ONCE)]
    probed_NX = torch.cat(parts)
    direction_X = torch.randn(probed_NX.shape[1], generator=torch.Generator().manual_seed(0)).to(probed_NX)
    order_N = (probed_NX @ direction_X).argsort(stable=True)  # which brings equal rows side by side
    sorted_NX = probed_NX[order_N]
    differs_N = (sorted_NX[1:] - sorted_NX[:-1]).abs().amax(1) > SAME * sorted_NX[1:].abs().amax(1)
    clip_N = torch.zeros_like(order_N)
    clip_N[order_N[1:]] = differs_N.cumsum(0)
    return clip_N


def _rows_of_clips(clip_N: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """Of each row's clip, the row of every other class, -1 for classes that it does not have: (N, C)."""
    rows_N = torch.arange(len(labels_N), device=labels_N.device)
    row_NC = rows_N.new_full((int(clip_N.max()) + 1, num_classes), -1)
    row_NC[clip_N, labels_N] = rows_N
    return row_NC[clip_N].masked_fill(one_hot(labels_N, num_classes).bool(), -1)
