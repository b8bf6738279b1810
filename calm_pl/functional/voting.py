"""From heads to a decision: CALM's weighted soft votes and SAV's hard ones.

Shapes: N clips, K heads, D head dimension, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calm_pl.functional.checks import check_finite, check_positive, check_queries, within
from calm_pl.functional.heads import chunks, class_prototypes, cosines, default_chunk_size, unit, unit_columns
from calm_pl.functional.precision import without_autocast

CLIPS_AT_A_TIME = 256
WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@without_autocast
def vote(
    queries_NKD: Tensor, prototypes_CKD: Tensor, weights_KC: Tensor, tau: float | Tensor, chunk_size: int | None = None
) -> Tensor:
    """The weighted sum of what the heads believe, s[n,c] = sum over k of w[k,c] p[n,k,c] (CALM, section 3).

    Clips go `chunk_size` at a time and heads a few at a time, so memory never grows with N x K x C, unless a gradient
    is asked for: autograd keeps the posteriors.

    Args:
        queries_NKD: head outputs of the clips to classify, any floating dtype.
        prototypes_CKD: what `class_prototypes` gave.
        weights_KC: what `head_weights` gave, or any finite weights.
        tau: softmax temperature of the head posteriors, or a tensor (K,) with one a head.
        chunk_size: clips at a time; more of them read the prototypes less often.

    Returns:
        Scores of shape (N, C), float32; the prediction is the argmax.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    check_queries(queries_NKD, prototypes_CKD)
    check_finite("weights_KC", weights_KC, 2)
    tau_K1 = torch.as_tensor(tau, dtype=torch.float32, device=queries_NKD.device).expand(len(weights_KC))[:, None]
    for extreme in tau_K1.detach().aminmax():
        check_positive("tau", float(extreme))
    num_classes, num_heads, _ = prototypes_CKD.shape
    if weights_KC.shape != (num_heads, num_classes):
        raise ValueError(f"weights_KC must have shape {(num_heads, num_classes)}; got {tuple(weights_KC.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
    inputs = (queries_NKD, prototypes_CKD, weights_KC, tau_K1)
    watched = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    weigh = torch.mul if watched else Tensor.mul_  # in place, unless autograd needs the posteriors as they were
    scores_NC = torch.zeros(len(queries_NKD), num_classes, device=queries_NKD.device)
    for clips in chunks(len(queries_NKD), chunk_size or CLIPS_AT_A_TIME):
        # A few heads at a time: their posteriors stay in the processor's cache, and no copy of all heads is made.
        for heads in chunks(num_heads, default_chunk_size(clips.stop - clips.start, num_classes)):
            # Temperature and norm are applied where the query is still D wide, not C wide.
            queries_KND = (unit(queries_NKD[clips, heads].float()) / tau_K1[heads]).transpose(0, 1)
            posteriors_KNC = torch.softmax(queries_KND @ unit_columns(prototypes_CKD[:, heads]), dim=-1)
            scores_NC[clips] += weigh(posteriors_KNC, weights_KC[heads, None].float()).sum(0)
    return scores_NC


@without_autocast
def sav_head_accuracy(heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """How many labelled clips each head classifies rightly by the nearest prototype (SAV, section 3.2).

    Returns:
        Counts of shape (K,), int64. Prototypes hold the clip itself, as SAV has it.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    prototypes_CKD = class_prototypes(heads_NKD, labels_N, num_classes)
    return (nearest_prototypes(heads_NKD, prototypes_CKD) == labels_N[:, None]).sum(0)


@without_autocast
def sav_votes(queries_NKD: Tensor, prototypes_CKD: Tensor, head_indices: Tensor | list[int]) -> Tensor:
    """Hard votes: each of the chosen heads gives one to the class of highest cosine (SAV, section 3.3).

    Returns:
        Counts of shape (N, C), int64; the prediction is the argmax.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    check_queries(queries_NKD, prototypes_CKD)
    num_classes, num_heads, _ = prototypes_CKD.shape
    indices = torch.as_tensor(head_indices, device=queries_NKD.device)
    if not indices.numel():
        raise ValueError("head_indices is empty: no head would vote")
    if indices.ndim != 1 or indices.dtype not in WHOLE_NUMBERS or not within(indices, 0, num_heads):
        raise ValueError(f"head_indices must be whole numbers from 0 to {num_heads - 1}; got {head_indices}")
    indices = indices.long()  # uint8 would be taken for a mask
    votes_NK = nearest_prototypes(queries_NKD[:, indices], prototypes_CKD[:, indices])
    return torch.stack([(votes_NK == c).sum(1) for c in range(num_classes)], dim=1)


@without_autocast
def nearest_prototypes(queries_NKD: Tensor, prototypes_CKD: Tensor) -> Tensor:
    """The class of highest cosine in each head, the lower index among equals: (N, K), int64."""
    num_classes, num_heads, _ = prototypes_CKD.shape
    size = default_chunk_size(num_heads, num_classes)
    return torch.cat([cosines(queries_NKD[c], prototypes_CKD).argmax(-1) for c in chunks(len(queries_NKD), size)])
