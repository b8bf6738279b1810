"""Every figure of a method, by torchmetrics, over all ranks, each with a 95 % interval.

Shapes: N clips, B batch, C classes, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_f1_score,
)
from torchmetrics.utilities import dim_zero_cat

from calm_pl.methods.calibration import CALIBRATION_BINS, MIN_PROBABILITY

# Two-sided 95 % of a standard normal.
Z_95 = 1.959963984540054
BOOTSTRAP_RESAMPLES = 500
# Resamples x clips that are drawn at once: 64 MiB of float32.
MAX_DRAWN = 2**24


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
        # Shares that sum to 1 may round to a little more, which torchmetrics would take for logits, all of them.
        self.probabilities.append(probabilities_BC.float().clamp_max(1))

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
    correct_N = (prediction_N == labels_N).long()
    true_N = probabilities_NC.gather(1, labels_N[:, None]).squeeze(1)
    nll_N = -true_N.clamp_min(MIN_PROBABILITY).log()
    brier_N = probabilities_NC.square().sum(1) - 2 * true_N + 1
    # Top-label calibration is calibration of the binary question "is this prediction right?".
    ece = float(binary_calibration_error(confidence_N, correct_N, n_bins=CALIBRATION_BINS))
    # One class more, for clips without an answer; no clip is of it, so that it counts for nothing itself.
    f1_C = multiclass_f1_score(prediction_N, labels_N, C + 1, average="none")[:C]
    known_C = torch.cat([prediction_N, labels_N]).bincount(minlength=C + 1) > 0
    said_NC, label_NC = one_hot(prediction_N, C + 1)[:, :C], one_hot(labels_N, C)
    return {
        "accuracy": float(correct_N.float().mean()),
        "macro_f1": float(f1_C[known_C[:C]].mean()),
        "nll": float(nll_N.mean()),
        "brier": float(brier_N.mean()),
        "ece": ece,
        "accuracy_interval": wilson_interval(int(correct_N.sum()), N),
        **bootstrap_intervals(
            N,
            {
                "macro_f1": lambda drawn_RN: macro_f1_draws(said_NC, label_NC, drawn_RN),
                "nll": lambda drawn_RN: drawn_RN @ nll_N / N,
                "brier": lambda drawn_RN: drawn_RN @ brier_N / N,
                "ece": lambda drawn_RN: calibration_error_draws(confidence_N, correct_N, drawn_RN),
            },
            means={"ece": ece},
        ),
    }


def bootstrap_intervals(
    clips: int, figures: Mapping[str, Callable[[Tensor], Tensor]], means: Mapping[str, float] | None = None
) -> dict[str, list[float]]:
    """The middle 95 % of figures over resamples of the clips, as ``NAME_interval``.

    Values that are NaN, where a resample has no such figure, do not count.

    Args:
        clips: N.
        figures: by name, from how often each clip comes in each resample (R, N) to a value a resample (R,).
        means: for figures that resampling makes larger, as it does sums of absolute values, what they are of the clips
            themselves: the resamples are moved to have that mean, but not below 0.
    """
    values: dict[str, list[Tensor]] = {name: [] for name in figures}
    for drawn_RN in bootstrap_draws(clips):
        for name, figure in figures.items():
            values[name].append(figure(drawn_RN))
    intervals = {}
    for name, parts in values.items():
        values_R = torch.cat(parts)
        if means and name in means:
            values_R = (values_R - values_R.nanmean() + means[name]).clamp_min(0)
        intervals[f"{name}_interval"] = [float(values_R.nanquantile(q)) for q in (0.025, 0.975)]
    return intervals


def bootstrap_draws(clips: int) -> Iterator[Tensor]:
    """How often each clip comes in each resample, float32, some resamples (R, N) at a time: the same at every call."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, MAX_DRAWN // clips)
    for start in range(0, BOOTSTRAP_RESAMPLES, rows):
        resamples = [
            torch.randint(clips, (clips,), generator=generator) for _ in range(min(rows, BOOTSTRAP_RESAMPLES - start))
        ]
        yield torch.stack([torch.bincount(clips_N, minlength=clips).float() for clips_N in resamples])


def macro_f1_draws(said_NC: Tensor, true_NC: Tensor, drawn_RN: Tensor) -> Tensor:
    """Macro-F1 of each resample (R,), from what is said and what is true, as 0 or 1.

    A class that a resample neither holds nor says does not count.
    """
    hit_RC = drawn_RN @ (said_NC * true_NC).float()
    either_RC = drawn_RN @ (said_NC + true_NC).float()
    return torch.where(either_RC > 0, 2 * hit_RC / either_RC, torch.nan).nanmean(1)


def calibration_error_draws(confidence_N: Tensor, correct_N: Tensor, drawn_RN: Tensor) -> Tensor:
    """Expected calibration error of each resample (R,), in the bins of torchmetrics' calibration error."""
    edges = torch.linspace(0, 1, CALIBRATION_BINS + 1)
    bin_N = torch.bucketize(confidence_N, edges, right=True) - 1
    gap_NB = one_hot(bin_N, CALIBRATION_BINS + 1) * (confidence_N - correct_N)[:, None]
    return (drawn_RN @ gap_NB).abs().sum(1) / len(confidence_N)


def wilson_interval(correct: int, total: int) -> list[float]:
    """Wilson's 95 % score interval of a proportion (Wilson, JASA 1927)."""
    share, z2 = correct / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 * (share * (1 - share) / total + z2 / (4 * total**2)) ** 0.5 / (1 + z2 / total)
    return [max(0.0, centre - half), min(1.0, centre + half)]
