"""What each head believes: prototypes, cosines and posteriors, also with every clip left out of its own class.

Shapes: N clips, K heads, D head dimension, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from calm_pl.functional.checks import check_heads, check_labels, check_positive, check_queries
from calm_pl.functional.precision import without_autocast

MIN_NORM = 1e-8
# Loops work on about this many numbers at a time: 8 MiB of them stay in the processor's cache.
CHUNK_ELEMENTS = 2**21


@without_autocast
def class_prototypes(heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """Mean head vectors of each class (CALM, section 3).

    Args:
        heads_NKD: head outputs of labelled clips, any floating dtype.
        labels_N: integer classes in [0, num_classes).
        num_classes: C.

    Returns:
        Prototypes of shape (C, K, D), float32; zeros for a class without a clip.

    Raises:
        ValueError: naming the argument that has a wrong shape or dtype, a NaN or infinity, or a label out of range.
    """
    check_heads("heads_NKD", heads_NKD)
    check_labels(labels_N, len(heads_NKD), num_classes)
    return class_means(heads_NKD, labels_N, num_classes)


@without_autocast
def head_posteriors(queries_NKD: Tensor, prototypes_CKD: Tensor, tau: float) -> Tensor:
    """What each head on its own believes: softmax over classes of cosine / tau (CALM, section 3).

    Returns:
        Posteriors of shape (N, K, C), float32, summing to 1 over C. This is the large tensor that `vote`
        avoids.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    check_queries(queries_NKD, prototypes_CKD)
    check_positive("tau", tau)
    return torch.softmax(cosines(queries_NKD, prototypes_CKD) / tau, dim=-1)


@without_autocast
def leave_one_out_posteriors(heads_NKD: Tensor, labels_N: Tensor, num_classes: int, tau: float) -> Tensor:
    """Head posteriors of labelled clips, each against prototypes made without it, in closed form.

    The clip leaves the mean of its own class only: mu without h = (n mu - h) / (n - 1). A class of one clip
    is left with no prototype, hence a zero vector and a cosine of 0.

    Returns:
        Posteriors of shape (N, K, C), float32.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    check_heads("heads_NKD", heads_NKD)
    check_labels(labels_N, len(heads_NKD), num_classes)
    check_positive("tau", tau)
    return torch.softmax(leave_one_out_cosines(heads_NKD, labels_N, num_classes) / tau, dim=-1)


@without_autocast
def cosines(queries_NKD: Tensor, prototypes_CKD: Tensor) -> Tensor:
    """Cosine of every query with every prototype, head by head: (N, K, C), float32. Norms are clamped at MIN_NORM."""
    return unit(queries_NKD.float()).transpose(0, 1).matmul(unit_columns(prototypes_CKD)).transpose(0, 1)


@without_autocast
def leave_one_out_cosines(heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """`cosines` of labelled clips, the own class's prototype made without the clip itself: (N, K, C), float32."""
    heads_NKD = heads_NKD.float()
    prototypes_CKD = class_means(heads_NKD, labels_N, num_classes)
    counts_N = torch.bincount(labels_N, minlength=num_classes)[labels_N][:, None, None]
    own_NKD = (counts_N * prototypes_CKD[labels_N] - heads_NKD) / (counts_N - 1).clamp_min(1)
    own_NKD = own_NKD.where(counts_N > 1, torch.zeros(()))
    own_NK1 = (unit(heads_NKD) * unit(own_NKD)).sum(-1, keepdim=True)
    index_NK1 = labels_N[:, None, None].expand_as(own_NK1)
    return cosines(heads_NKD, prototypes_CKD).scatter(-1, index_NK1, own_NK1)


class Rows:
    """Some rows of a tensor, of which no more is copied than is asked for at once: head outputs may fill the memory."""

    def __init__(self, whole: Tensor, rows_N: Tensor) -> None:
        self.whole, self.rows_N = whole, rows_N
        self.shape = (len(rows_N), *whole.shape[1:])
        self.ndim, self.device = whole.ndim, whole.device

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, wanted: slice | Tensor) -> Tensor:
        return self.whole[self.rows_N[wanted]]


def class_means(values_Nx: Tensor | Rows, labels_N: Tensor, num_classes: int) -> Tensor:
    """Mean over the clips of each class, along the first dimension; zeros for a class without a clip."""
    sums_Cx = torch.zeros(num_classes, *values_Nx.shape[1:], device=values_Nx.device)
    for chunk in chunks(len(values_Nx), default_chunk_size(*values_Nx.shape[1:])):
        sums_Cx.index_add_(0, labels_N[chunk], values_Nx[chunk].float())
    counts_C = torch.bincount(labels_N, minlength=num_classes).clamp_min(1)
    return sums_Cx / counts_C.view(-1, *[1] * (values_Nx.ndim - 1))


def unit(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norms.clamp_min(MIN_NORM)


def unit_columns(prototypes_CKD: Tensor) -> Tensor:
    """Normalised prototypes as (K, D, C), ready to be multiplied head by head."""
    return unit(prototypes_CKD.float()).permute(1, 2, 0)


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices that cover range(total) in steps of size; one empty slice when there is nothing to cover."""
    return (slice(start, min(start + size, total)) for start in range(0, max(total, 1), size))


def default_chunk_size(*shape: int) -> int:
    """How many tensors of this shape stay in the processor's cache together."""
    return max(1, CHUNK_ELEMENTS // max(1, math.prod(shape)))
