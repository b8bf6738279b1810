"""How far to trust learning, decided by cross-validation on the support set.

Every clip's cosines come from prototypes without it; weights are learned on some folds of clips and judged on
the others. All settings and folds are learned side by side in one tensor, so that the search costs little
more than one fit.

Shapes: N clips, K heads, C classes, F settings x folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from calm_pl.methods.calibration import MIN_PROBABILITY, best_temperature, temper
from calm_pl.methods.logistic import stratified_folds
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
    labels_N: Tensor,
    start: Callable[[Tensor, Tensor], Tensor],
    settings: Sequence[tuple[float, float]],
    steps: Sequence[int],
    alpha: float,
    lrs: Sequence[float],
    folds: int = 4,
) -> list[Tried]:
    """Learn with every setting (to_start, to_shared) and step size, and judge after every number of steps.

    Args:
        posteriors_NKC: leave-one-out head posteriors of the support set.
        labels_N: its classes.
        start: (posteriors, labels) -> weights (K, C) by formula, made from the training clips of each fold.
        settings: pairs of penalties, the strongest first.
        steps: numbers of optimiser steps after which to judge, ascending.
        alpha: of entmax.
        lrs: step sizes of Adam.
        folds: how many.

    Returns:
        What was tried, from the formula itself (0 steps) to what can have moved the furthest, with calibrated
        likelihoods of the clips held out.
    """
    fold_N = stratified_folds(labels_N, folds)
    num_folds = int(fold_N.max()) + 1
    num_heads = posteriors_NKC.shape[1]
    training_FN = (fold_N[None] != torch.arange(num_folds, device=fold_N.device)[:, None]).float()
    training_FN = training_FN.repeat(len(settings), 1)
    counts_F = training_FN.sum(1)
    strengths_F2 = torch.tensor(settings, device=fold_N.device).repeat_interleave(num_folds, 0)
    starts = [start(posteriors_NKC[fold_N != f], labels_N[fold_N != f]) for f in range(num_folds)]
    weights_at_start_FKC = torch.stack(starts).repeat(len(settings), 1, 1)
    start_FKC = entmax_logits(weights_at_start_FKC, alpha)
    posteriors_CNK = posteriors_NKC.permute(2, 0, 1).contiguous()

    def scores(moves_FKC: Tensor) -> tuple[Tensor, Tensor]:
        weights_FKC = entmax(start_FKC + step_size(num_heads, alpha) * moves_FKC, alpha, dim=1)
        return weights_FKC, (posteriors_CNK @ weights_FKC.permute(2, 1, 0)).permute(2, 1, 0)

    def held_out(moves_FKC: Tensor) -> Tensor:
        _, scores_FNC = scores(moves_FKC)
        by_fold = scores_FNC.detach().view(len(settings), num_folds, len(labels_N), -1)
        return by_fold[:, fold_N.clamp_min(0), torch.arange(len(labels_N), device=fold_N.device)]

    tested_N = fold_N >= 0
    tried = [_judge(Trust(steps=0), held_out(torch.zeros_like(start_FKC))[0], labels_N, tested_N)]
    for lr in lrs:
        moves_FKC = torch.zeros_like(start_FKC, requires_grad=True)
        optimizer = torch.optim.Adam([moves_FKC], lr=lr)
        for step in range(1, max(steps, default=0) + 1):
            with torch.enable_grad():
                weights_FKC, scores_FNC = scores(moves_FKC)
                loss_FN = -mixture_log_likelihood(scores_FNC, labels_N)
                loss_F = (loss_FN * training_FN).sum(1) / counts_F
                held_F = penalty(weights_FKC, weights_at_start_FKC, strengths_F2[:, 0], strengths_F2[:, 1]) / counts_F
                optimizer.zero_grad()
                (loss_F + held_F).sum().backward()
            optimizer.step()
            if step in steps:
                for setting, scores_NC in zip(settings, held_out(moves_FKC), strict=True):
                    tried.append(_judge(Trust(*setting, step, lr), scores_NC, labels_N, tested_N))
    return sorted(tried, key=lambda one: one.trust.moved)


def mixture_log_likelihood(scores_FNC: Tensor, labels_N: Tensor) -> Tensor:
    """Log of the labelled class's share of the scores: (..., N)."""
    index = labels_N[:, None].expand(*scores_FNC.shape[:-1], 1)
    own = scores_FNC.gather(-1, index)[..., 0]
    return own.clamp_min(MIN_PROBABILITY).log() - scores_FNC.sum(-1).clamp_min(MIN_PROBABILITY).log()


def _judge(trust: Trust, scores_NC: Tensor, labels_N: Tensor, tested_N: Tensor) -> Tried:
    scores_NC, labels_N = scores_NC[tested_N], labels_N[tested_N]
    temperature, _ = best_temperature(scores_NC, labels_N)
    probabilities_NC = temper(scores_NC, temperature)
    nll_N = nll_loss(probabilities_NC.clamp_min(MIN_PROBABILITY).log(), labels_N, reduction="none")
    accuracy = (probabilities_NC.argmax(1) == labels_N).float().mean()
    return Tried(trust, nll_N, float(accuracy), scores_NC, labels_N)
