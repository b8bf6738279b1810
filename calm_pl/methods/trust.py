"""How far to trust learning, decided by cross-validation on the support set.

Weights are learned on some folds of clips, which know nothing of the clips of another, and judged on that one. All
settings and folds are learned side by side in one tensor, so that the search costs little more than one fit.

Shapes: N clips, K heads, C classes, P folds, F settings x folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from calm_pl.methods.calibration import MIN_PROBABILITY, best_temperature, temper
from calm_pl.methods.weighting import entmax, entmax_logits, penalty, step_size


@dataclass(frozen=True)
class Trust:
    """How learning is held back, and how long it goes on.

    Attributes:
        to_start: weight of the divergence from the start, in clips.
        to_shared: weight of the divergence of classes from one another, in clips.
        steps: optimiser steps; 0 keeps the formula.
        lr: step size of Adam.
    """

    to_start: float = 1.0
    to_shared: float = 3.0
    steps: int = 0
    lr: float = 0.1

    @property
    def moved(self) -> float:
        """How far Adam can have moved a parameter from its start."""
        return self.steps * self.lr


@dataclass(frozen=True)
class Tried:
    """One setting with its scores of the clips held out, their calibrated likelihoods and accuracy."""

    trust: Trust
    nll_N: Tensor
    accuracy: float
    scores_NC: Tensor
    labels_N: Tensor

    @property
    def nll(self) -> float:
        return float(self.nll_N.mean())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self.trust), "cv_nll": self.nll, "cv_accuracy": self.accuracy}


def choose(tried: Sequence[Tried], standard_errors: float) -> Tried:
    """The first setting, from the least moved on, that is no worse than the best by so many standard errors.

    Breiman's rule takes one. Few clips make every likelihood uncertain, the best of some twenty settings is the best
    partly by chance, and learning that only seems to help mostly harms.
    """
    best = min(tried, key=lambda t: t.nll)

    def close(one: Tried) -> bool:
        worse_N = one.nll_N - best.nll_N
        return bool(worse_N.mean() <= standard_errors * worse_N.std() / len(worse_N) ** 0.5)

    return next(one for one in tried if one is best or close(one))


def cross_validate(
    posteriors_NKC: Tensor,
    posteriors_PNKC: Tensor,
    labels_N: Tensor,
    fold_N: Tensor,
    start: Callable[[Tensor, Tensor], Tensor],
    settings: Sequence[tuple[float, float]],
    steps: Sequence[int],
    alpha: float,
    lrs: Sequence[float],
) -> list[Tried]:
    """Learn with every setting (to_start, to_shared) and step size, and judge after every number of steps.

    Args:
        posteriors_NKC: leave-one-out head posteriors of the support set, to judge by.
        posteriors_PNKC: the same to learn from, for each fold without its clips; of these, any numbers.
        labels_N: classes of the clips.
        fold_N: the fold in which a clip is judged.
        start: (posteriors, labels) -> weights (K, C) by formula, made from the training clips of each fold.
        settings: pairs of penalties, the strongest first.
        steps: numbers of optimiser steps after which to judge, ascending.
        alpha: of entmax.
        lrs: step sizes of Adam.

    Returns:
        What was tried, from the formula itself (0 steps) to what can have moved the furthest, with calibrated
        likelihoods of the clips held out.
    """
    num_folds, num_clips, num_heads, num_classes = posteriors_PNKC.shape
    training_PN = fold_N[None] != torch.arange(num_folds, device=fold_N.device)[:, None]
    starts = [start(p[t], labels_N[t]) for p, t in zip(posteriors_PNKC, training_PN, strict=True)]
    weights_at_start_FKC = torch.stack(starts).repeat(len(settings), 1, 1)
    start_FKC = entmax_logits(weights_at_start_FKC, alpha)
    strengths_F2 = torch.tensor(settings, device=fold_N.device).repeat_interleave(num_folds, 0)
    share_FN = (training_PN / training_PN.sum(1, keepdim=True)).repeat(len(settings), 1)
    counts_F = training_PN.sum(1).repeat(len(settings))

    def weights(moves_FKC: Tensor) -> Tensor:
        return entmax(start_FKC + step_size(num_heads, alpha) * moves_FKC, alpha, dim=1)

    def held_out(moves_FKC: Tensor) -> Tensor:
        by_fold = weights(moves_FKC.detach()).view(-1, num_folds, num_heads, num_classes)
        scores_SNC = torch.empty(len(by_fold), num_clips, num_classes, device=fold_N.device)
        for p in range(num_folds):
            scores_SNC[:, fold_N == p] = torch.einsum("nkc,skc->snc", posteriors_NKC[fold_N == p], by_fold[:, p])
        return scores_SNC

    tried = [_judge(Trust(steps=0), held_out(torch.zeros_like(start_FKC))[0], labels_N)]
    for lr in lrs:
        moves_FKC = torch.zeros_like(start_FKC, requires_grad=True)
        optimizer = torch.optim.Adam([moves_FKC], lr=lr)
        for step in range(1, max(steps, default=0) + 1):
            with torch.enable_grad():
                weights_FKC = weights(moves_FKC)
                by_fold = weights_FKC.view(-1, num_folds, num_heads, num_classes)
                scores_FNC = torch.einsum("pnkc,spkc->spnc", posteriors_PNKC, by_fold).flatten(0, 1)
                loss_F = (-mixture_log_likelihood(scores_FNC, labels_N) * share_FN).sum(1)
                held_F = penalty(weights_FKC, weights_at_start_FKC, strengths_F2[:, 0], strengths_F2[:, 1]) / counts_F
                optimizer.zero_grad()
                (loss_F + held_F).sum().backward()
            optimizer.step()
            if step in steps:
                for setting, scores_NC in zip(settings, held_out(moves_FKC), strict=True):
                    tried.append(_judge(Trust(*setting, step, lr), scores_NC, labels_N))
    return sorted(tried, key=lambda one: one.trust.moved)


def mixture_log_likelihood(scores_FNC: Tensor, labels_N: Tensor) -> Tensor:
    """Log of the labelled class's share of the scores: (..., N)."""
    index = labels_N[:, None].expand(*scores_FNC.shape[:-1], 1)
    own = scores_FNC.gather(-1, index)[..., 0]
    return own.clamp_min(MIN_PROBABILITY).log() - scores_FNC.sum(-1).clamp_min(MIN_PROBABILITY).log()


def _judge(trust: Trust, scores_NC: Tensor, labels_N: Tensor) -> Tried:
    temperature, _ = best_temperature(scores_NC, labels_N)
    probabilities_NC = temper(scores_NC, temperature)
    nll_N = nll_loss(probabilities_NC.clamp_min(MIN_PROBABILITY).log(), labels_N, reduction="none")
    accuracy = (probabilities_NC.argmax(1) == labels_N).float().mean()
    return Tried(trust, nll_N, float(accuracy), scores_NC, labels_N)
