"""Inputs that make no sense are refused with a ValueError that names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

# Larger head outputs are refused: the squares of a whole support set must add up to a float32.
LARGEST_HEAD_OUTPUT = 1e15
LARGEST_FLOAT32 = torch.finfo(torch.float32).max
SCHEMES = ("margin_clamped", "margin_softmax", "prob_softmax", "brier_softmax")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: a tensor is needed; got {type(value).__name__}")


def check_finite(name: str, tensor: Tensor, ndim: int, largest: float = LARGEST_FLOAT32) -> None:
    check_tensor(name, tensor)
    if tensor.ndim != ndim or (ndim == 3 and 0 in tensor.shape[1:]):
        raise ValueError(f"{name} must have {ndim} dimensions, none empty but N; got shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {tensor.dtype}")
    # aminmax passes NaN on, which is not <= anything, and, unlike isfinite, needs no mask as large as the tensor.
    if tensor.numel() and not (torch.stack(tensor.detach().aminmax()).float().abs() <= largest).all():
        raise ValueError(f"{name} holds NaN, infinity or a number beyond {largest:.3g}, too large for float32 inside")


def check_heads(name: str, heads_NKD: Tensor) -> None:
    check_finite(name, heads_NKD, 3, LARGEST_HEAD_OUTPUT)


def check_queries(queries_NKD: Tensor, prototypes_CKD: Tensor) -> None:
    check_heads("queries_NKD", queries_NKD)
    check_heads("prototypes_CKD", prototypes_CKD)
    if not len(prototypes_CKD):
        raise ValueError("prototypes_CKD holds no class")
    if queries_NKD.shape[1:] != prototypes_CKD.shape[1:]:
        raise ValueError(
            f"queries_NKD and prototypes_CKD differ in heads or head dimension: "
            f"{tuple(queries_NKD.shape[1:])} and {tuple(prototypes_CKD.shape[1:])}"
        )


def check_posteriors(posteriors_NKC: Tensor, labels_N: Tensor) -> int:
    check_finite("posteriors_NKC", posteriors_NKC, 3)
    num_classes = posteriors_NKC.shape[2]
    check_labels(labels_N, len(posteriors_NKC), num_classes, lowest=-1)
    return num_classes


def check_labels(labels_N: Tensor, num_clips: int, num_classes: int, lowest: int = 0) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1; got {num_classes}")
    check_tensor("labels_N", labels_N)
    if labels_N.shape != (num_clips,):
        raise ValueError(f"labels_N must hold one label a clip, {num_clips}; got shape {tuple(labels_N.shape)}")
    if labels_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels_N must be int64 or int32; got {labels_N.dtype}")
    if num_clips and not within(labels_N, lowest, num_classes):
        raise ValueError(
            f"labels_N must be from {lowest} to {num_classes - 1}; got {int(labels_N.min())} to {int(labels_N.max())}"
        )


def within(values: Tensor, low: int, high: int) -> bool:
    return int(values.min()) >= low and int(values.max()) < high


def check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite; got {value}")


def check_scheme(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
