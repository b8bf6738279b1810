"""Genuine or spoofed speech: equal error rates, of all attacks together and of each.

Shapes: N clips, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_roc

from calm_pl.training.metrics import BOOTSTRAP_RESAMPLES, percentiles

GENUINE, SPOOFED = "bonafide", "spoof"


def equal_error_rate(scores_N: Tensor, genuine_N: Tensor) -> float:
    """The error rate at the threshold where as large a share of spoofed clips passes as of genuine ones fails.

    Between two thresholds both rates are taken to be linear, so the result does not depend on which of the classes is
    asked for: spoofed clips and 1 - scores give the same. NaN where a class has no clip.

    Args:
        scores_N: higher for genuine.
        genuine_N: whether a clip is genuine.
    """
    if genuine_N.all() or not genuine_N.any():
        return float("nan")
    # Ranks instead of scores: torchmetrics takes anything outside [0, 1] for logits, which may merge close scores.
    ranks_N = scores_N.unique(return_inverse=True)[1].double()
    passed_T, kept_T, _ = binary_roc(ranks_N / ranks_N.max().clamp_min(1), genuine_N.long())
    failed_T, passed_T = 1 - kept_T.double(), passed_T.double()
    gap_T = passed_T - failed_T  # from -1 to 1, never falling
    after = int((gap_T >= 0).nonzero()[0])
    if after == 0:
        return float(passed_T[0])
    before = after - 1
    share = gap_T[before] / (gap_T[before] - gap_T[after])
    return float(passed_T[before] + share * (passed_T[after] - passed_T[before]))


def is_spoofing(classes: Sequence[str]) -> bool:
    """Whether the classes are those of a spoofing benchmark."""
    return set(classes) == {GENUINE, SPOOFED}


def spoofing_figures(scores_N: Tensor, genuine_N: Tensor) -> dict[str, Any]:
    """The equal error rate with its 95 % interval, by a bootstrap over clips; nothing where a class has no clip."""
    if genuine_N.all() or not genuine_N.any():
        return {}
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(scores_N), (BOOTSTRAP_RESAMPLES, len(scores_N)), generator=generator)
    drawn_R = torch.tensor([equal_error_rate(scores_N[rows], genuine_N[rows]) for rows in draws])
    return {"eer": equal_error_rate(scores_N, genuine_N), "eer_interval": percentiles(drawn_R)}


def attack_table(
    scores_N: Tensor, spoof_said_N: Tensor, files: Sequence[str], attacks: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """By attack: how many clips, the equal error rate against all genuine clips, the share found to be spoofed.

    Args:
        scores_N: higher for genuine.
        spoof_said_N: whether a clip was said to be spoofed.
        files: the clips' audio files.
        attacks: attack by audio file; files that it lacks are genuine.
    """
    genuine_N = torch.tensor([file not in attacks for file in files])
    table = {}
    for attack in sorted({attacks[file] for file in files if file in attacks}):
        of_attack_N = torch.tensor([attacks.get(file) == attack for file in files])
        chosen_N = of_attack_N | genuine_N
        table[attack] = {
            "clips": int(of_attack_N.sum()),
            "eer": equal_error_rate(scores_N[chosen_N], genuine_N[chosen_N]),
            "accuracy": float(spoof_said_N[of_attack_N].float().mean()),
        }
    return table
