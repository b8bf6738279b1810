"""Probabilities that mean what they say, and when to say that a clip is none of the classes.

Shapes: N clips, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss, one_hot

MIN_PROBABILITY = 1e-12  # smaller ones count as this, so that logarithms stay finite
CALIBRATION_BINS = 15  # of the expected calibration error (Guo et al., arXiv 1706.04599)
# Not below 1/16: clips that are all right would ask for 0, which says nothing of how clearly they are right.
TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(-16, 13))
AS_LIKELY = 1e-3
COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)


def temper(scores_NC: Tensor, temperature: float) -> Tensor:
    """Scores to probabilities: proportional to score ** (1 / temperature), rows summing to 1."""
    return torch.softmax(scores_NC.clamp_min(MIN_PROBABILITY).log() / temperature, dim=1)


def accuracy_and_nll(probabilities_NC: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """Share of clips classified rightly, and mean negative log-likelihood in nats."""
    nll = nll_loss(probabilities_NC.clamp_min(MIN_PROBABILITY).log(), labels_N)
    return float((probabilities_NC.argmax(1) == labels_N).float().mean()), float(nll)


def best_temperature(scores_NC: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """The temperature of highest likelihood (Guo et al., arXiv 1706.04599), and the mean NLL that it reaches.

    Of temperatures that are as likely, to a thousandth of a nat, the least confident: where every clip is right, the
    likelihood hardly tells one from another.
    """
    temperatures_T11 = torch.tensor(TEMPERATURES, device=scores_NC.device)[:, None, None]
    logs_TNC = (scores_NC.clamp_min(MIN_PROBABILITY).log() / temperatures_T11).log_softmax(2)
    nll_T = -logs_TNC[:, torch.arange(len(labels_N), device=labels_N.device), labels_N].mean(1)
    best = int((nll_T <= nll_T.min() + AS_LIKELY).nonzero().max())
    return TEMPERATURES[best], float(nll_T[best])


def calibrate(scores_NC: Tensor, labels_N: Tensor) -> tuple[float, dict[str, Any]]:
    """Temperature scaling from scores of clips left out.

    Returns:
        The temperature, and figures before and after with the coverage that a threshold buys; ready for JSON.
    """
    temperature, _ = best_temperature(scores_NC, labels_N)
    after_NC = temper(scores_NC, temperature)
    return temperature, {
        "temperature": temperature,
        "before": figures(temper(scores_NC, 1.0), labels_N),
        "after": figures(after_NC, labels_N),
        "unknown_thresholds": coverage_table(after_NC, labels_N),
    }


def figures(probabilities_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Accuracy, NLL (nats), Brier score (summed over classes) and ECE (in bins of equal width)."""
    accuracy, nll = accuracy_and_nll(probabilities_NC, labels_N)
    truth_NC = one_hot(labels_N, probabilities_NC.shape[1])
    confidence_N, guess_N = probabilities_NC.max(1)
    gap_N = confidence_N - (guess_N == labels_N).float()
    bin_N = (confidence_N * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    ece = torch.zeros(CALIBRATION_BINS, device=gap_N.device).index_add(0, bin_N, gap_N).abs().sum() / len(labels_N)
    brier = (probabilities_NC - truth_NC).square().sum(1).mean()
    return {"accuracy": accuracy, "nll": nll, "brier": float(brier), "ece": float(ece)}


def coverage_table(probabilities_NC: Tensor, labels_N: Tensor) -> list[dict[str, float]]:
    """For each share of clips kept: the confidence they reach, and how many of them are right."""
    confidence_N, guess_N = probabilities_NC.max(1)
    order_N = confidence_N.argsort(descending=True)
    rows = []
    for coverage in COVERAGES:
        kept = order_N[: max(1, round(coverage * len(order_N)))]
        accuracy = (guess_N[kept] == labels_N[kept]).float().mean()
        threshold = float(confidence_N[kept[-1]])
        rows.append({"threshold": threshold, "coverage": coverage, "accuracy": float(accuracy)})
    return rows
