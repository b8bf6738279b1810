"""How far a head is to be trusted, and the weights that follow from it.

Shapes: N clips, K heads, D head dimension, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from calm_pl.functional.checks import check_finite, check_positive, check_posteriors, check_scheme, check_tensor
from calm_pl.functional.heads import class_means
from calm_pl.functional.precision import without_autocast


@without_autocast
def head_reliability(posteriors_NKC: Tensor, labels_N: Tensor, scheme: str) -> Tensor:
    """How far each class may trust each head (CALM, section 3).

    Per labelled clip of class c, `margin_clamped` takes max(0, p_c - max over the other classes of p),
    `margin_softmax` the same without the clamp, `prob_softmax` p_c, and `brier_softmax` 2 p_c - sum over
    classes of p squared. The reliability is the mean over the clips of the class.

    Args:
        posteriors_NKC: what `head_posteriors` or `leave_one_out_posteriors` gave.
        labels_N: integer classes in [0, C); clips labelled -1 are ignored.
        scheme: one of `SCHEMES`.

    Returns:
        Reliability of shape (K, C), float32; 0 for a class without a clip.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    check_scheme(scheme)
    num_classes = check_posteriors(posteriors_NKC, labels_N)
    labelled_N = labels_N >= 0
    labels_N = labels_N[labelled_N]
    evidence_NK = clip_evidence(posteriors_NKC[labelled_N].float(), labels_N, scheme)
    return class_means(evidence_NK, labels_N, num_classes).T.contiguous()


@without_autocast
def clip_evidence(posteriors_NKC: Tensor, labels_N: Tensor, scheme: str) -> Tensor:
    """The term that `head_reliability` averages, for every clip and head: (N, K)."""
    labels_N = labels_N.long()  # gather and one_hot take no int32
    own_NK1 = posteriors_NKC.gather(-1, labels_N[:, None, None].expand(-1, posteriors_NKC.shape[1], 1))
    own_NK = own_NK1.squeeze(-1)
    if scheme == "prob_softmax":
        return own_NK
    if scheme == "brier_softmax":
        return 2 * own_NK - posteriors_NKC.square().sum(-1)
    is_own_N1C = one_hot(labels_N, posteriors_NKC.shape[-1]).bool()[:, None]
    margin_NK = own_NK - posteriors_NKC.masked_fill(is_own_N1C, 0).amax(-1)
    return margin_NK.clamp_min(0) if scheme == "margin_clamped" else margin_NK


@without_autocast
def global_reliability(posteriors_NKC: Tensor, labels_N: Tensor) -> Tensor:
    """One reliability a head, GRW's: the mean over labelled clips of max(0, p_y - max over the other classes of p).

    Returns:
        Reliability of shape (K,), float32. Clips labelled -1 are ignored; without any labelled clip it is 0.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    check_posteriors(posteriors_NKC, labels_N)
    labelled_N = labels_N >= 0
    evidence_NK = clip_evidence(posteriors_NKC[labelled_N].float(), labels_N[labelled_N], "margin_clamped")
    return evidence_NK.sum(0) / max(1, len(evidence_NK))


@without_autocast
def shrink_reliability(reliability_KC: Tensor, counts_C: Tensor, alpha: float) -> Tensor:
    """Pull the reliability of classes with few clips toward the mean reliability of all heads and classes.

    r' = r n_c / (n_c + alpha) + mean(r) alpha / (n_c + alpha); alpha <= 0 leaves r as it is.

    Args:
        reliability_KC: what `head_reliability` gave.
        counts_C: labelled clips of each class.
        alpha: strength, in clips.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    check_finite("reliability_KC", reliability_KC, 2)
    check_tensor("counts_C", counts_C)
    if counts_C.shape != reliability_KC.shape[1:]:
        raise ValueError(
            f"counts_C must hold one count a class, {reliability_KC.shape[1]}; got {tuple(counts_C.shape)}"
        )
    if alpha != alpha:
        raise ValueError("alpha is NaN")
    reliability_KC = reliability_KC.float()
    if alpha <= 0:
        return reliability_KC
    trust_C = counts_C.to(reliability_KC) / (counts_C.to(reliability_KC) + alpha)
    return reliability_KC * trust_C + reliability_KC.mean() * (1 - trust_C)


@without_autocast
def head_weights(reliability_KC: Tensor, scheme: str, tau_w: float = 1.0, top_k: int | None = None) -> Tensor:
    """Class-conditional weights: how much of each class's score comes from which head (CALM, section 3).

    `*_softmax` schemes: softmax over heads of r / tau_w. `margin_clamped`: r^(1/tau_w) divided by its sum
    over heads. With `top_k`, only the k heads of highest reliability in a column take part, the lower index
    first among equals. A `margin_clamped` column with no positive reliability is uniform over the heads
    allowed.

    Returns:
        Weights of shape (K, C), float32, non-negative, each column summing to 1.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    check_scheme(scheme)
    check_finite("reliability_KC", reliability_KC, 2)
    check_positive("tau_w", tau_w)
    reliability_KC = reliability_KC.float()
    allowed_KC = top_heads(reliability_KC, top_k)
    if scheme != "margin_clamped":
        return torch.softmax((reliability_KC / tau_w).masked_fill(~allowed_KC, -torch.inf), dim=0)
    # Dividing by the largest first keeps the power of small margins from underflowing to a column of zeros.
    relative_KC = reliability_KC.clamp_min(0) / reliability_KC.amax(0).clamp_min(torch.finfo(torch.float32).tiny)
    power_KC = relative_KC.pow(1 / tau_w) * allowed_KC
    power_KC = torch.where(power_KC.sum(0) > 0, power_KC, allowed_KC.float())
    return power_KC / power_KC.sum(0)


@without_autocast
def global_weights(reliability_K: Tensor, tau_w: float = 1.0, top_k: int | None = None) -> Tensor:
    """GRW's weights, one a head and shared by all classes: softmax of r / tau_w over the top_k heads, 0 elsewhere.

    Returns:
        Weights of shape (K,), float32, non-negative, summing to 1.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    check_finite("reliability_K", reliability_K, 1)
    return head_weights(reliability_K[:, None], "margin_softmax", tau_w, top_k).squeeze(1)


def top_heads(reliability_KC: Tensor, top_k: int | None) -> Tensor:
    """Mask (K, C) of the top_k heads of each column; a stable sort puts the lower index first among equals."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all heads; got {top_k}")
    if top_k is None or top_k >= len(reliability_KC):
        return torch.ones_like(reliability_KC, dtype=torch.bool)
    order_KC = reliability_KC.argsort(dim=0, descending=True, stable=True)
    return torch.zeros_like(reliability_KC, dtype=torch.bool).scatter(0, order_KC[:top_k], True)
