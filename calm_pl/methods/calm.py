"""CALM by its formula: class-conditional weights from reliabilities, chosen honestly.

Shapes: N clips, K heads, D head dimension, C classes.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from calm_pl import functional as F
from calm_pl.functional.heads import chunks, class_means, default_chunk_size
from calm_pl.functional.metric import HeadMetric
from calm_pl.methods.base import check_support
from calm_pl.methods.calibration import calibrate, temper
from calm_pl.methods.leave_one_out import LeaveOneOut
from calm_pl.methods.metric_space import CENTRE, MetricSpace, directions
from calm_pl.methods.selection import GRID, Formula, Grid, best_of, judge_all

# Where no class has two clips nothing can be left out, hence nothing chosen.
DEFAULT = Formula()
DEFAULT_WHITENED = Formula(tau=0.15)


class Calm(MetricSpace):
    """CALM (Mehta et al., arXiv 2602.07077) with leave-one-out prototypes and choices made on the support set alone.

    Whatever is not given is chosen by cross-validated accuracy, ties by likelihood.

    Args:
        metric: "raw" for cosines of head outputs as published; "whitened" for cosines in the within-head
            metric, by far the better from 2 clips a class on.
        tau: temperature of the head posteriors.
        scheme: how a reliability is computed, one of `calm_pl.functional.SCHEMES`.
        tau_w: temperature of the weights; small ones trust few heads.
        top_k: heads a class may use; 0 for all.
        alpha: shrinkage of reliabilities toward their mean, in clips; helps where classes have few.
        shrinkage: g of the within-head metric, a number or "ledoit_wolf" or "oas".
        centre: of the within-head metric, as a share of the mean of the prototypes.
        metric_rank: of the within-head metric, at most, for a small classifier; None for all that the clips tell.
        grid: what is tried for whatever is not given.
    """

    weights_KC: Tensor

    def __init__(
        self,
        metric: str = "raw",
        tau: float | None = None,
        scheme: str | None = None,
        tau_w: float | None = None,
        top_k: int | None = None,
        alpha: float | None = None,
        shrinkage: float | str | None = None,
        centre: float = CENTRE,
        metric_rank: int | None = None,
        grid: Grid = GRID,
    ) -> None:
        super().__init__()
        if metric not in ("raw", "whitened"):
            raise ValueError(f"metric must be raw or whitened; got {metric!r}")
        if metric == "raw" and (shrinkage is not None or metric_rank is not None):
            raise ValueError("shrinkage and metric_rank are of the within-head metric: set metric to whitened")
        self.metric, self.centre, self.metric_rank, self.grid = metric, centre, metric_rank, grid
        given = {"tau": tau, "scheme": scheme, "tau_w": tau_w, "alpha": alpha, "shrinkage": shrinkage}
        self.given: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if top_k is not None:
            self.given["top_k"] = top_k or None

    def fit(self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        labels_N = check_support(heads_NKD, labels_N, num_classes)
        metric, default = None, DEFAULT
        if self.metric == "whitened":
            heads_NKD = directions(heads_NKD)
            metric, shrinkage = self.estimate(heads_NKD, labels_N, num_classes, self.centre)
            default = replace(DEFAULT_WHITENED, shrinkage=shrinkage)
        formula, choices = self._choose(heads_NKD, labels_N, num_classes, metric, default)
        weights_KC = formula_weights(heads_NKD, labels_N, num_classes, formula, metric)
        buffers = {"prototypes_CKD": F.class_prototypes(heads_NKD, labels_N, num_classes)}
        if metric is not None and formula.shrinkage is not None:
            buffers = self.in_metric(metric, formula.shrinkage, self.metric_rank, **buffers)
        self.keep(choices, weights_KC=weights_KC, **buffers)
        return self

    def _choose(
        self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int, metric: HeadMetric | None, default: Formula
    ) -> tuple[Formula, dict[str, Any]]:
        fixed = {key: (value,) for key, value in self.given.items() if key != "top_k"}
        if "top_k" in self.given:
            fixed["top_fraction"] = (1.0 if not self.given["top_k"] else self.given["top_k"] / heads_NKD.shape[1],)
        judged = judge_all(heads_NKD, labels_N, num_classes, replace(self.grid, **fixed), metric)
        if not judged:
            formula = replace(default, **self.given)
            return formula, {**asdict(formula), "chosen": False, "calibration": {"temperature": 1.0}}
        best = best_of(judged)
        _, calibration = calibrate(best.scores_NC, best.labels_N)
        return best.formula, {**best.as_dict(), "candidates": len(judged), "calibration": calibration}

    def forward(self, queries_NKD: Tensor) -> Tensor:
        """Scores s[n,c] = sum over k of w[k,c] p[n,k,c], as calibrated probabilities."""
        choices = self.choices()
        scores_NC = self.vote(queries_NKD, self.weights_KC, choices["tau"])
        return temper(scores_NC, choices["calibration"]["temperature"])


def formula_weights(
    heads_NKD: Tensor, labels_N: Tensor, num_classes: int, formula: Formula, metric: HeadMetric | None
) -> Tensor:
    """Weights (K, C) by a formula from leave-one-out posteriors of all support clips, in chunks."""
    left_out = LeaveOneOut(heads_NKD, labels_N, num_classes, metric)
    evidence = []
    for chunk in chunks(len(heads_NKD), 8 * default_chunk_size(heads_NKD.shape[1], num_classes)):
        clips = torch.arange(chunk.start, chunk.stop, device=heads_NKD.device)
        posteriors_NKC = torch.softmax(left_out.cosines(formula.shrinkage, clips) / formula.tau, -1)
        evidence.append(F.clip_evidence(posteriors_NKC, labels_N[chunk], formula.scheme))
    reliability_KC = class_means(torch.cat(evidence), labels_N, num_classes).T
    counts_C = torch.bincount(labels_N, minlength=num_classes)
    reliability_KC = F.shrink_reliability(reliability_KC, counts_C, formula.alpha)
    return F.head_weights(reliability_KC, formula.scheme, formula.tau_w, formula.top_k)
