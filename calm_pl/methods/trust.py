"""How far to trust learning, decided by cross-validation on the support set.

Weights are learned on some folds of clips, which know nothing of the clips of another, and judged on that one. All
settings and folds are learned side by side in one tensor, so that the search costs little more than one fit.

Shapes: N clips, K heads, C classes, S settings, P folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from calm_pl.methods.calibration import MIN_PROBABILITY, best_temperature, temper
from calm_pl.methods.leave_one_out import LeaveOneOut
from calm_pl.methods.logistic import FOLDS, stratified_folds
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


@dataclass(frozen=True)
class Folds:
    """Clips to judge by, in folds: each without itself, and for each fold what all others are without it.

    Attributes:
        posteriors_NKC: leave-one-out head posteriors.
        labels_N: classes.
        fold_N: the fold in which a clip is judged.
        training_CNK: for each fold, leave-one-out posteriors of all other clips, which know nothing of the fold.
    """

    posteriors_NKC: Tensor
    labels_N: Tensor
    fold_N: Tensor
    training_CNK: Sequence[Tensor]

    @classmethod
    def of(cls, left_out: LeaveOneOut, clips: Tensor, shrinkage: float | str | None, tau_K: Tensor) -> Folds:
        """Of these clips of a support set, stratified; the others make prototypes and metrics in every fold."""

        def posteriors(left_out: LeaveOneOut, clips: Tensor) -> Tensor:
            return torch.softmax(left_out.cosines(shrinkage, clips) / tau_K[:, None], -1)

        labels_N = left_out.labels_N[clips]
        fold_N = stratified_folds(labels_N, FOLDS)
        training_CNK = []
        for fold in range(int(fold_N.max()) + 1):
            held_N = torch.zeros_like(left_out.labels_N, dtype=torch.bool)
            held_N[clips[fold_N == fold]] = True
            rest = clips[fold_N != fold]
            rest_NKC = posteriors(left_out.without(held_N), rest - held_N.cumsum(0)[rest])
            training_CNK.append(rest_NKC.permute(2, 0, 1).contiguous())
        return cls(posteriors(left_out, clips), labels_N, fold_N, training_CNK)


def cross_validate(
    folds: Folds,
    start: Callable[[Tensor, Tensor], Tensor],
    settings: Sequence[tuple[float, float]],
    steps: Sequence[int],
    lrs: Sequence[float],
    alpha: float,
) -> list[Tried]:
    """Learn with every setting (to_start, to_shared) and step size, and judge after every number of steps.

    Args:
        folds: to learn from and to judge by.
        start: (posteriors, labels) -> weights (K, C) by formula, made from the training clips of each fold.
        settings: pairs of penalties, the strongest first.
        steps: numbers of optimiser steps after which to judge, ascending.
        lrs: step sizes of Adam.
        alpha: of entmax.

    Returns:
        What was tried, from the formula itself (0 steps) to what can have moved the furthest, with calibrated
        likelihoods of the clips held out.
    """
    labels_N, fold_N, training_CNK = folds.labels_N, folds.fold_N, folds.training_CNK
    num_clips, num_heads, num_classes = folds.posteriors_NKC.shape
    shape = (len(settings), len(training_CNK), num_heads, num_classes)
    labels = [labels_N[fold_N != fold] for fold in range(len(training_CNK))]
    starts = [start(part_CNK.permute(1, 2, 0), own_N) for part_CNK, own_N in zip(training_CNK, labels, strict=True)]
    start_SPKC = torch.stack(starts).expand(shape)
    logits_SPKC = entmax_logits(start_SPKC, alpha)
    to_start_S, to_shared_S = torch.tensor(settings, device=fold_N.device).unbind(1)

    def weights(moves_SPKC: Tensor) -> Tensor:
        return entmax(logits_SPKC + step_size(num_heads, alpha) * moves_SPKC, alpha, dim=2)

    def held_out(moves_SPKC: Tensor) -> Tensor:
        weights_SPKC = weights(moves_SPKC.detach())
        scores_SNC = torch.empty(len(settings), num_clips, num_classes, device=fold_N.device)
        for fold in range(len(training_CNK)):
            held = fold_N == fold
            held_NKC = folds.posteriors_NKC[held]
            scores_SNC[:, held] = torch.einsum("nkc,skc->snc", held_NKC, weights_SPKC[:, fold])
        return scores_SNC

    def losses(weights_SPKC: Tensor) -> Tensor:
        found = []
        for fold, (part_CNK, own_N) in enumerate(zip(training_CNK, labels, strict=True)):
            scores_CNS = part_CNK @ weights_SPKC[:, fold].permute(2, 1, 0)
            fit_S = -mixture_log_likelihood(scores_CNS.permute(2, 1, 0), own_N).mean(1)
            held_S = penalty(weights_SPKC[:, fold], start_SPKC[:, fold], to_start_S, to_shared_S)
            found.append(fit_S + held_S / len(own_N))
        return torch.stack(found, 1)

    tried = [_judge(Trust(steps=0), held_out(torch.zeros(shape, device=fold_N.device))[0], labels_N)]
    for lr in lrs:
        moves_SPKC = torch.zeros(shape, device=fold_N.device, requires_grad=True)
        optimizer = torch.optim.Adam([moves_SPKC], lr=lr)
        for step in range(1, max(steps, default=0) + 1):
            with torch.enable_grad():
                optimizer.zero_grad()
                losses(weights(moves_SPKC)).sum().backward()
            optimizer.step()
            if step in steps:
                for setting, scores_NC in zip(settings, held_out(moves_SPKC), strict=True):
                    tried.append(_judge(Trust(*setting, step, lr), scores_NC, labels_N))
    return sorted(tried, key=lambda one: one.trust.moved)


def mixture_log_likelihood(scores_SNC: Tensor, labels_N: Tensor) -> Tensor:
    """Log of the labelled class's share of the scores: (..., N)."""
    index = labels_N[:, None].expand(*scores_SNC.shape[:-1], 1)
    own = scores_SNC.gather(-1, index)[..., 0]
    return own.clamp_min(MIN_PROBABILITY).log() - scores_SNC.sum(-1).clamp_min(MIN_PROBABILITY).log()


def _judge(trust: Trust, scores_NC: Tensor, labels_N: Tensor) -> Tried:
    temperature, _ = best_temperature(scores_NC, labels_N)
    probabilities_NC = temper(scores_NC, temperature)
    nll_N = nll_loss(probabilities_NC.clamp_min(MIN_PROBABILITY).log(), labels_N, reduction="none")
    accuracy = (probabilities_NC.argmax(1) == labels_N).float().mean()
    return Tried(trust, nll_N, float(accuracy), scores_NC, labels_N)
