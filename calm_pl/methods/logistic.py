"""Multinomial logistic regression with an L2 penalty, small enough to be solved exactly by L-BFGS.

Shapes: N clips, R features, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
DEFAULT_C = 10.0
FOLDS = 5
MAX_ITERATIONS = 200  # of L-BFGS


def cross_validated_logistic(
    features_NR: Tensor, labels_N: Tensor, num_classes: int, c: float | None = None, clip_N: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Fit with the C of highest accuracy in stratified cross-validation, ties by likelihood, unless C is given.

    Args:
        features_NR: of labelled clips.
        labels_N: their classes.
        num_classes: C.
        c: inverse strength of the penalty; None chooses.
        clip_N: which clip each row is of, where one has several labels; its rows share a fold.

    Returns:
        weights (R, C), bias (C,) and the choice with its scores.
    """
    choices = _choose(features_NR, labels_N, num_classes, clip_N) if c is None else {"c": c}
    weights_RC, bias_C = logistic(features_NR, labels_N, num_classes, choices["c"])
    return weights_RC, bias_C, choices


def _choose(features_NR: Tensor, labels_N: Tensor, num_classes: int, clip_N: Tensor | None) -> dict[str, Any]:
    """The C that does best in cross-validation, with its scores; the default where no class has two clips."""
    fold_N = stratified_folds(labels_N, FOLDS)
    if clip_N is not None:
        fold_of_clip = torch.full_like(labels_N, -1).scatter_reduce(0, clip_N, fold_N, "amax")
        fold_N = fold_of_clip[clip_N]
    num_folds = int(fold_N.max()) + 1
    if num_folds < 2:
        return {"c": DEFAULT_C}
    candidates = []
    for c in PENALTIES:
        logits_NC = torch.zeros(len(labels_N), num_classes, device=features_NR.device)
        for fold in range(num_folds):
            held = fold_N == fold
            weights_RC, bias_C = logistic(features_NR[~held], labels_N[~held], num_classes, c)
            logits_NC[held] = features_NR[held] @ weights_RC + bias_C
        tested_NC, truth_N = logits_NC[fold_N >= 0], labels_N[fold_N >= 0]
        accuracy = float((tested_NC.argmax(1) == truth_N).float().mean())
        candidates.append((accuracy, -float(cross_entropy(tested_NC, truth_N)), c))
    accuracy, log_likelihood, c = max(candidates)
    return {"c": c, "accuracy": accuracy, "nll": -log_likelihood}


def logistic(features_NR: Tensor, labels_N: Tensor, num_classes: int, c: float) -> tuple[Tensor, Tensor]:
    """Minimise C times the summed cross-entropy plus half the squared weights; the bias is free."""
    weights_RC = torch.zeros(features_NR.shape[1], num_classes, device=features_NR.device, requires_grad=True)
    bias_C = torch.zeros(num_classes, device=features_NR.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights_RC, bias_C], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(features_NR @ weights_RC + bias_C, labels_N)
        loss = loss + weights_RC.square().sum() / (2 * c * len(labels_N))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights_RC.detach(), bias_C.detach()


def stratified_folds(labels_N: Tensor, folds: int) -> Tensor:
    """Deal the clips of every class out to the folds in turn: (N,). The only clip of a class is in none: -1."""
    alone_N = torch.bincount(labels_N)[labels_N] == 1
    return (places_in_class(labels_N) % folds).masked_fill(alone_N, -1)


def places_in_class(labels_N: Tensor) -> Tensor:
    """How many clips of the same class come before each clip: (N,)."""
    place_N = torch.zeros_like(labels_N)
    for c in labels_N.unique().tolist():
        members = (labels_N == c).nonzero()[:, 0]
        place_N[members] = torch.arange(len(members), device=labels_N.device)
    return place_N
