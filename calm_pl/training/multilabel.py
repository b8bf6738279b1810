"""Figures of clips with several labels each: what fraction of them is told, and how well classes rank clips.

With one label a clip, accuracy, likelihood and Brier score are those of `calm_pl.training.metrics`.

Shapes: N clips, C classes, R bootstrap resamples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multilabel_average_precision,
    multilabel_f1_score,
)

from calm_pl.methods.calibration import CALIBRATION_BINS, MIN_PROBABILITY
from calm_pl.training.metrics import (
    bootstrap_intervals,
    calibration_error_draws,
    macro_f1_draws,
    wilson_interval,
)


def top_labels(probabilities_NC: Tensor, counts_N: Tensor) -> Tensor:
    """The ``counts_N`` most probable classes of each clip, as 0 or 1: (N, C). Ties: the earlier class."""
    order_NC = probabilities_NC.argsort(dim=1, descending=True, stable=True)
    rank_NC = torch.arange(probabilities_NC.shape[1], device=order_NC.device).expand_as(order_NC)
    return torch.zeros_like(order_NC).scatter(1, order_NC, (rank_NC < counts_N[:, None]).long())


def multi_label_figures(probabilities_NC: Tensor, labels_NC: Tensor) -> dict[str, Any]:
    """Exact match, sample F1 and mAP beside accuracy, macro-F1, likelihood, Brier score and calibration error.

    As in the paper, a clip with n true labels is said to have its n most probable classes: `exact_match` is the share
    of clips where these are the true ones, `sample_f1` the mean over clips of the F1 between both, `macro_f1` the mean
    over classes (those that a clip has or is said to have). `map` is the mean over classes (those with clips) of the
    average precision. `accuracy` asks whether the most probable class is a true one, `nll` is of the true classes'
    joint probability, and `brier` compares with equal shares for the true classes. Every figure comes with its 95 %
    interval over clips.

    Args:
        probabilities_NC: rows summing to 1; a row of zeros is a clip without an answer.
        labels_NC: 1 where a clip has a label, else 0; at least one a clip.
    """
    N, C = labels_NC.shape
    if N == 0:
        return {}
    labels_NC = labels_NC.long()
    count_N = labels_NC.sum(1)
    confidence_N, best_N = probabilities_NC.max(1)
    answered_N = (confidence_N > 0).long()
    top_NC = top_labels(probabilities_NC, count_N * answered_N)
    hit_N = labels_NC.gather(1, best_N[:, None]).squeeze(1) * answered_N
    per_clip = {
        "accuracy": hit_N.float(),
        "nll": -(probabilities_NC * labels_NC).sum(1).clamp_min(MIN_PROBABILITY).log(),
        "brier": (probabilities_NC - labels_NC / count_N[:, None]).square().sum(1),
        "exact_match": (top_NC == labels_NC).all(1).float(),
        # As many classes are said as are true, so precision, recall and F1 are one number. (The samplewise F1 of
        # torchmetrics 1.9 is the same, and fails on a single clip.)
        "sample_f1": (top_NC * labels_NC).sum(1) / count_N,
    }
    results: dict[str, Any] = {name: float(values_N.mean()) for name, values_N in per_clip.items()}
    f1_C = multilabel_f1_score(top_NC, labels_NC, C, average="none")
    results["macro_f1"] = float(f1_C[(top_NC + labels_NC).any(0)].mean())
    seen = labels_NC.any(0)
    precision_C = multilabel_average_precision(probabilities_NC, labels_NC, C, average="none")
    results["map"] = float(precision_C[seen].mean())
    # Top-label calibration is calibration of the binary question "is this prediction right?".
    results["ece"] = float(binary_calibration_error(confidence_N, hit_N, n_bins=CALIBRATION_BINS))
    results["accuracy_interval"] = wilson_interval(int(hit_N.sum()), N)
    means = {
        name: lambda drawn_RN, values_N=values_N: drawn_RN @ values_N / N
        for name, values_N in per_clip.items()
        if name != "accuracy"
    }
    return results | bootstrap_intervals(
        N,
        {
            **means,
            "macro_f1": lambda drawn_RN: macro_f1_draws(top_NC, labels_NC, drawn_RN),
            "map": lambda drawn_RN: mean_average_precision_draws(probabilities_NC, labels_NC, drawn_RN),
            "ece": lambda drawn_RN: calibration_error_draws(confidence_N, hit_N, drawn_RN),
        },
        means={"ece": results["ece"]},
    )


def mean_average_precision_draws(probabilities_NC: Tensor, labels_NC: Tensor, drawn_RN: Tensor) -> Tensor:
    """mAP of each resample (R,), in which clip n comes ``drawn_RN[r, n]`` times; classes without a clip do not count.

    Average precision is the sum over thresholds of precision times the step in recall; clips of equal score share a
    threshold. Each class is sorted once for all resamples.
    """
    precisions = []
    for scores_N, truth_N in zip(probabilities_NC.T, labels_NC.T.float(), strict=True):
        if not truth_N.any():
            continue
        order_N = scores_N.argsort(descending=True)
        last_of_tie_N = torch.cat([scores_N[order_N].diff() != 0, torch.tensor([True])])
        counts_RN = drawn_RN[:, order_N]
        true_RT = (counts_RN * truth_N[order_N]).cumsum(1)[:, last_of_tie_N]
        said_RT = counts_RN.cumsum(1)[:, last_of_tie_N]
        steps_RT = true_RT.diff(dim=1, prepend=torch.zeros(len(true_RT), 1))
        precisions.append((steps_RT * true_RT / said_RT.clamp_min(1)).sum(1) / true_RT[:, -1])  # NaN without a clip
    return torch.stack(precisions).nanmean(0)
