"""Class-conditional weights that can be optimised: entmax over heads of logits that start at a formula's weights.

Shapes: N clips, K heads, C classes, R rank, F settings tried side by side.
"""

from __future__ import annotations

import math

import torch
from entmax import entmax15, sparsemax
from torch import Tensor

SMOOTHING = 1e-3


def entmax(logits_KC: Tensor, alpha: float, dim: int = 0) -> Tensor:
    """Distribution over heads (Peters et al., arXiv 1905.05702): softmax (1.0), 1.5-entmax, sparsemax (2.0).

    From 1.5 on, heads that matter little get exactly 0.
    """
    if alpha == 1.0:
        return torch.softmax(logits_KC, dim)
    found: Tensor = entmax15(logits_KC, dim) if alpha == 1.5 else sparsemax(logits_KC, dim)
    return found


def entmax_logits(weights_KC: Tensor, alpha: float) -> Tensor:
    """Logits whose entmax is exactly these weights: the deformed logarithm, for alpha 1 the log itself.

    With alpha 1 a weight of 0 is out of reach; it becomes 1e-6.
    """
    if alpha == 1.0:
        return weights_KC.clamp_min(1e-6).log()
    return weights_KC.pow(alpha - 1) / (alpha - 1)


def step_size(num_heads: int, alpha: float) -> float:
    """What a logit must move by to change a weight of 1/K by the factor e, about: 1 for softmax, less for others."""
    return math.pow(num_heads, 1 - alpha)


def divergence(weights: Tensor, reference: Tensor) -> Tensor:
    """K times KL(weights || reference) over heads, (..., C), the reference smoothed so that its zeros stay affordable.

    For small moves K x KL is the summed squared change of log-weights, about: its scale does not depend on K.
    """
    num_heads = weights.shape[-2]
    reference = (1 - SMOOTHING) * reference + SMOOTHING / num_heads
    smoothed = (1 - SMOOTHING) * weights + SMOOTHING / num_heads
    return num_heads * (smoothed * (smoothed / reference).log()).sum(-2)


def penalty(weights: Tensor, start: Tensor, to_start: Tensor | float, to_shared: Tensor | float) -> Tensor:
    """How far weights (..., K, C) are from their start and from one another, averaged over classes: (...)."""
    shared = weights.mean(-1, keepdim=True)
    from_start = divergence(shared, start.mean(-1, keepdim=True)).mean(-1)
    # Classes are compared as changes of the start: what the formula gave a class costs nothing.
    apart = divergence(weights, _rescaled(start, shared)).mean(-1)
    return to_start * from_start + to_shared * apart


def _rescaled(start: Tensor, shared: Tensor) -> Tensor:
    moved = start * shared / start.mean(-1, keepdim=True).clamp_min(1e-9)
    return moved / moved.sum(-2, keepdim=True).clamp_min(1e-9)
