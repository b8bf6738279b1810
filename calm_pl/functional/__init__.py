"""CALM as pure functions: tensors in, tensors out, float32 inside whatever comes in.

The method is CALM (Mehta et al., arXiv 2602.07077); the baseline it grew from is SAV (Mitra et al., arXiv
2412.00142). Leave-one-out and the within-head metric (`whitening`) are this project's.
"""

from calm_pl.functional.checks import SCHEMES
from calm_pl.functional.heads import (
    class_prototypes,
    cosines,
    head_posteriors,
    leave_one_out_cosines,
    leave_one_out_posteriors,
)
from calm_pl.functional.metric import HeadMetric, whiten, whiten_by_factors, whitening
from calm_pl.functional.reliability import (
    clip_evidence,
    global_reliability,
    global_weights,
    head_reliability,
    head_weights,
    shrink_reliability,
)
from calm_pl.functional.voting import nearest_prototypes, sav_head_accuracy, sav_votes, vote

__all__ = [
    "SCHEMES",
    "HeadMetric",
    "class_prototypes",
    "clip_evidence",
    "cosines",
    "global_reliability",
    "global_weights",
    "head_posteriors",
    "head_reliability",
    "head_weights",
    "leave_one_out_cosines",
    "leave_one_out_posteriors",
    "nearest_prototypes",
    "sav_head_accuracy",
    "sav_votes",
    "shrink_reliability",
    "vote",
    "whiten",
    "whiten_by_factors",
    "whitening",
]
