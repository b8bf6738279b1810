"""The methods that CALM is measured against, on the same heads.

Shapes: N clips, K heads, D head dimension, C classes, R rank of the support set.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from calm_pl import functional as F
from calm_pl.functional.heads import chunks, class_means, default_chunk_size, unit
from calm_pl.methods.base import HeadClassifier, check_support
from calm_pl.methods.leave_one_out import same_clips
from calm_pl.methods.logistic import cross_validated_logistic


class SAV(HeadClassifier):
    """Sparse attention vectors (Mitra et al., arXiv 2412.00142): the best heads vote, one vote each.

    Args:
        num_heads: how many heads vote (the paper: 20).
    """

    prototypes_CKD: Tensor
    head_indices: Tensor

    def __init__(self, num_heads: int = 20) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1; got {num_heads}")
        self.num_heads = num_heads

    def fit(self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        labels_N = check_support(heads_NKD, labels_N, num_classes)
        correct_K = F.sav_head_accuracy(heads_NKD, labels_N, num_classes)
        best = correct_K.argsort(descending=True, stable=True)[: self.num_heads]
        self.keep(
            {"head_indices": best.tolist(), "correct": correct_K[best].tolist()},
            prototypes_CKD=F.class_prototypes(heads_NKD, labels_N, num_classes)[:, best],
            head_indices=best,
        )
        return self

    def forward(self, queries_NKD: Tensor) -> Tensor:
        """Shares of the votes; classes with equal shares keep the order of their indices."""
        every_head = torch.arange(len(self.head_indices), device=queries_NKD.device)
        votes_NC = F.sav_votes(queries_NKD[:, self.head_indices], self.prototypes_CKD, every_head)
        return votes_NC.float() / len(self.head_indices)


class GRW(HeadClassifier):
    """Global reliability weights (CALM, section 3): soft votes, one weight a head for all classes.

    Prototypes vote on the clips they were made from, as published. Settings are the published defaults.

    Args:
        tau: temperature of the head posteriors.
        tau_w: temperature of the weights.
        top_k: how many heads vote; None for all.
    """

    prototypes_CKD: Tensor
    weights_K: Tensor

    def __init__(self, tau: float = 0.07, tau_w: float = 0.1, top_k: int | None = 20) -> None:
        super().__init__()
        self.tau, self.tau_w, self.top_k = tau, tau_w, top_k

    def fit(self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        labels_N = check_support(heads_NKD, labels_N, num_classes)
        prototypes_CKD = F.class_prototypes(heads_NKD, labels_N, num_classes)
        reliability_K = torch.zeros(heads_NKD.shape[1], device=heads_NKD.device)
        for chunk in chunks(len(heads_NKD), default_chunk_size(heads_NKD.shape[1], num_classes)):
            posteriors_NKC = F.head_posteriors(heads_NKD[chunk], prototypes_CKD, self.tau)
            evidence_NK = F.clip_evidence(posteriors_NKC, labels_N[chunk], "margin_clamped")
            reliability_K += evidence_NK.sum(0) / len(heads_NKD)
        self.keep(
            {"tau": self.tau, "tau_w": self.tau_w, "top_k": self.top_k},
            prototypes_CKD=prototypes_CKD,
            weights_K=F.global_weights(reliability_K, self.tau_w, self.top_k),
        )
        return self

    def forward(self, queries_NKD: Tensor) -> Tensor:
        weights_KC = self.weights_K[:, None].expand(-1, len(self.prototypes_CKD))
        return F.vote(queries_NKD, self.prototypes_CKD, weights_KC, self.choices()["tau"])


class LinearProbe(HeadClassifier):
    """Logistic regression on all heads, the honest opponent.

    Every head is centred on the support set and scaled to length 1, then all are laid side by side. The
    penalty is chosen by cross-validation on the support set. Since N is much smaller than K x D, the
    regression is solved among the support set's principal axes, where its solution is the same.

    Args:
        c: inverse strength of the L2 penalty; None chooses it.
    """

    mean_KD: Tensor
    coefficients_CKD: Tensor
    bias_C: Tensor

    def __init__(self, c: float | None = None) -> None:
        super().__init__()
        self.c = c

    def fit(self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        labels_N = check_support(heads_NKD, labels_N, num_classes)
        mean_KD = heads_NKD.float().mean(0)
        features_NF = self._features(heads_NKD, mean_KD)
        gram_NN = features_NF @ features_NF.T
        values_N, vectors_NN = torch.linalg.eigh(gram_NN)
        kept = values_N > values_N[-1].clamp_min(1e-12) * 1e-6
        roots_R, vectors_NR = values_N[kept].sqrt(), vectors_NN[:, kept]
        weights_RC, bias_C, choices = cross_validated_logistic(
            vectors_NR * roots_R, labels_N, num_classes, self.c, same_clips(heads_NKD)
        )
        coefficients_FC = features_NF.T @ (vectors_NR / roots_R @ weights_RC)
        coefficients_CKD = coefficients_FC.T.reshape(num_classes, *heads_NKD.shape[1:])
        self.keep(choices, mean_KD=mean_KD, coefficients_CKD=coefficients_CKD, bias_C=bias_C)
        return self

    @staticmethod
    def _features(heads_NKD: Tensor, mean_KD: Tensor) -> Tensor:
        return unit(heads_NKD.float() - mean_KD).flatten(1)

    def forward(self, queries_NKD: Tensor) -> Tensor:
        parts = []
        for chunk in chunks(len(queries_NKD), default_chunk_size(*queries_NKD.shape[1:])):
            features_NF = self._features(queries_NKD[chunk], self.mean_KD)
            parts.append(features_NF @ self.coefficients_CKD.flatten(1).T + self.bias_C)
        return torch.cat(parts).softmax(1)


class NearestPrototype(HeadClassifier):
    """Cosine with class prototypes of the last heads laid side by side: what one would do without choosing heads.

    Args:
        num_heads: how many heads, counted from the last one: one layer's (6: calm-tiny and Whisper-tiny).
        tau: temperature of the probabilities.
    """

    prototypes_CKD: Tensor

    def __init__(self, num_heads: int = 6, tau: float = 0.07) -> None:
        super().__init__()
        self.num_heads, self.tau = num_heads, tau

    def fit(self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        labels_N = check_support(heads_NKD, labels_N, num_classes)
        prototypes_CKD = F.class_prototypes(heads_NKD[:, -self.num_heads :], labels_N, num_classes)
        self.keep({"num_heads": prototypes_CKD.shape[1], "tau": self.tau}, prototypes_CKD=prototypes_CKD)
        return self

    def forward(self, queries_NKD: Tensor) -> Tensor:
        last_NF = queries_NKD[:, -self.prototypes_CKD.shape[1] :].float().flatten(1)
        cosines_NC = unit(last_NF) @ unit(self.prototypes_CKD.flatten(1)).T
        return torch.softmax(cosines_NC / self.choices()["tau"], 1)


class MeanOfHeads(HeadClassifier):
    """Soft votes of all heads with equal weights: what is left of CALM without reliabilities.

    Args:
        tau: temperature of the head posteriors.
    """

    prototypes_CKD: Tensor

    def __init__(self, tau: float = 0.07) -> None:
        super().__init__()
        self.tau = tau

    def fit(self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        labels_N = check_support(heads_NKD, labels_N, num_classes)
        self.keep({"tau": self.tau}, prototypes_CKD=F.class_prototypes(heads_NKD, labels_N, num_classes))
        return self

    def forward(self, queries_NKD: Tensor) -> Tensor:
        num_classes, num_heads, _ = self.prototypes_CKD.shape
        weights_KC = self.prototypes_CKD.new_full((num_heads, num_classes), 1 / num_heads)
        return F.vote(queries_NKD, self.prototypes_CKD, weights_KC, self.choices()["tau"])


class KNearest(HeadClassifier):
    """The k nearest support clips by the cosine averaged over heads; votes weighted by exp(cosine / tau).

    Args:
        k: neighbours; no more than the support set has.
        tau: temperature of the votes.
    """

    centre_KD: Tensor
    support_NKD: Tensor
    support_labels_N: Tensor
    num_classes_1: Tensor

    def __init__(self, k: int = 5, tau: float = 0.07) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        self.k, self.tau = k, tau

    def fit(self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        labels_N = check_support(heads_NKD, labels_N, num_classes)
        centre_KD = class_means(heads_NKD, torch.zeros_like(labels_N), 1)[0]
        self.keep(
            {"k": min(self.k, len(heads_NKD)), "tau": self.tau},
            centre_KD=centre_KD,
            support_NKD=unit(heads_NKD.float() - centre_KD),
            support_labels_N=labels_N,
            num_classes_1=torch.tensor([num_classes]),
        )
        return self

    def forward(self, queries_NKD: Tensor) -> Tensor:
        choices, num_heads = self.choices(), self.support_NKD.shape[1]
        votes_NC = torch.zeros(len(queries_NKD), int(self.num_classes_1), device=queries_NKD.device)
        for chunk in chunks(len(queries_NKD), default_chunk_size(*queries_NKD.shape[1:])):
            units_NF = unit(queries_NKD[chunk].float() - self.centre_KD).flatten(1)
            cosines, index = (units_NF @ self.support_NKD.flatten(1).T / num_heads).topk(choices["k"])
            votes_NC[chunk] = votes_NC[chunk].scatter_add(
                1, self.support_labels_N[index], torch.softmax(cosines / choices["tau"], 1)
            )
        return votes_NC
