"""Every figure of a method, by torchmetrics, over all ranks, each with a 95 % interval.

Shapes: N clips, B batch, C classes, R bootstrap resamples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_f1_score,
)
from torchmetrics.utilities import dim_zero_cat

# Two-sided 95 % of a standard normal.
Z_95 = 1.959963984540054
BOOTSTRAP_RESAMPLES = 500
CALIBRATION_BINS = 15
SMALLEST_PROBABILITY = 1e-12


class ClipScores(Metric):
    """Keeps each clip's probabilities and tells what they are worth.

    States are gathered over ranks; each clip is counted once. ``compute`` returns the figures,
    ``of_all_ranks`` the clips themselves in their order, for ``predictions.csv``.
    """

    full_state_update = False
    indices: list[Tensor]
    labels: list[Tensor]
    probabilities: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("indices", "labels", "probabilities"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, indices_B: Tensor, probabilities_BC: Tensor, labels_B: Tensor) -> None:
        """Add a batch: positions of the clips, class probabilities, true classes (-1 where unknown).

        Clips with several labels have rows (B, C) of 0 and 1 in place of true classes, without a 1 where unknown.
        """
        self.indices.append(indices_B)
        self.labels.append(labels_B)
        self.probabilities.append(probabilities_BC.float())

    def one_label_each(self) -> None:
        """Replace rows of 0 and 1 by the one true class that each clip has, -1 where unknown."""
        self.labels = [torch.where(rows_BC.bool().any(1), rows_BC.long().argmax(1), -1) for rows_BC in self.labels]

    def of_all_ranks(self) -> tuple[Tensor, Tensor, Tensor]:
        """(indices_N, probabilities_NC, labels_N) of every clip that any rank has seen, in the order of indices.

        A collective call: every rank must make it.
        """
        with self.sync_context():
            return self._gathered()

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        indices_N = dim_zero_cat(self.indices).cpu()
        order_N = indices_N.argsort()
        return (
            indices_N[order_N],
            dim_zero_cat(self.probabilities).cpu()[order_N],
            dim_zero_cat(self.labels).cpu()[order_N],
        )

    def compute(self) -> dict[str, Any]:
        """Figures of the clips with a label: see :func:`figures`, and `multi_label_figures` for several labels."""
        _, probabilities_NC, labels = self._gathered()
        if labels.ndim == 2:
            from calm_pl.training.multilabel import multi_label_figures

            known_N = labels.bool().any(1)
            return multi_label_figures(probabilities_NC[known_N], labels[known_N])
        known_N = labels >= 0
        return figures(probabilities_NC[known_N], labels[known_N])


def figures(probabilities_NC: Tensor, labels_N: Tensor) -> dict[str, Any]:
    """Accuracy, macro-F1, negative log-likelihood, Brier score and expected calibration error.

    Each figure ``x`` comes with ``x_interval``, [low, high] at 95 %: Wilson's for accuracy, a bootstrap over clips
    (percentiles, fixed seed) for the others. A row of zeros is a clip without an answer: wrong, whatever its class.
    """
    N, C = probabilities_NC.shape
    if N == 0:
        return {}
    confidence_N, prediction_N = probabilities_NC.max(1)
    prediction_N = prediction_N.masked_fill(confidence_N == 0, C)
    true_N = probabilities_NC.gather(1, labels_N[:, None]).squeeze(1)
    brier_N = probabilities_NC.square().sum(1) - 2 * true_N + 1
    columns = (labels_N, prediction_N, confidence_N, true_N, brier_N)

    results: dict[str, Any] = _figures_of(C, *columns)
    generator = torch.Generator().manual_seed(0)
    resamples_RN = torch.randint(N, (BOOTSTRAP_RESAMPLES, N), generator=generator)
    draws = [_figures_of(C, *(column[rows_N] for column in columns)) for rows_N in resamples_RN]
    for name in list(results):
        values_R = torch.tensor([draw[name] for draw in draws])
        results[f"{name}_interval"] = percentiles(values_R)
    results["accuracy_interval"] = wilson_interval(int((prediction_N == labels_N).sum()), N)
    return results


def percentiles(values_R: Tensor) -> list[float]:
    """The middle 95 % of bootstrap values; NaN, where a resample has no such figure, do not count."""
    return [float(values_R.nanquantile(q)) for q in (0.025, 0.975)]


def wilson_interval(correct: int, total: int) -> list[float]:
    """Wilson's 95 % score interval of a proportion (Wilson, JASA 1927)."""
    share, z2 = correct / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 * (share * (1 - share) / total + z2 / (4 * total**2)) ** 0.5 / (1 + z2 / total)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def _figures_of(
    num_classes: int,
    labels_N: Tensor,
    prediction_N: Tensor,
    confidence_N: Tensor,
    true_N: Tensor,
    brier_N: Tensor,
) -> dict[str, float]:
    correct_N = (prediction_N == labels_N).long()
    # One class more, for clips without an answer; no clip is of it, so that it counts for nothing itself.
    f1_C = multiclass_f1_score(prediction_N, labels_N, num_classes + 1, average="none")[:num_classes]
    known_C = torch.cat([prediction_N, labels_N]).bincount(minlength=num_classes + 1) > 0
    return {
        "accuracy": float(correct_N.float().mean()),
        "macro_f1": float(f1_C[known_C[:num_classes]].mean()),
        "nll": float(-true_N.clamp_min(SMALLEST_PROBABILITY).log().mean()),
        "brier": float(brier_N.mean()),
        # Top-label calibration is calibration of the binary question "is this prediction right?".
        "ece": float(binary_calibration_error(confidence_N, correct_N, n_bins=CALIBRATION_BINS)),
    }
