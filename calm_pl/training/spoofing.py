"""Genuine or spoofed speech: equal error rates, of all attacks together and of each.

Shapes: N clips, R bootstrap resamples, T thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calm_pl.training.metrics import bootstrap_intervals

GENUINE, SPOOFED = "bonafide", "spoof"
# Rates that are equal but for rounding; two different ones are further apart.
EQUAL = 1e-12


def equal_error_rate(scores_N: Tensor, genuine_N: Tensor) -> float:
    """The error rate at the threshold where as large a share of spoofed clips passes as of genuine ones fails.

    Between two thresholds both rates are taken to be linear, so the result does not depend on which of the classes is
    asked for: spoofed clips and 1 - scores give the same. NaN where a class has no clip.

    Args:
        scores_N: higher for genuine.
        genuine_N: whether a clip is genuine.
    """
    return float(equal_error_rate_draws(scores_N, genuine_N, torch.ones(1, len(scores_N))))


def equal_error_rate_draws(scores_N: Tensor, genuine_N: Tensor, drawn_RN: Tensor) -> Tensor:
    """`equal_error_rate` of each resample (R,), in which clip n comes ``drawn_RN[r, n]`` times; sorted once for all."""
    _, rank_N = (-scores_N).unique(return_inverse=True)  # from the highest score to the lowest
    thresholds = int(rank_N.max()) + 1
    drawn_RN = drawn_RN.double()
    # Shares of spoofed and of genuine clips that pass, from the threshold that nothing passes to the lowest.
    passed_RT, kept_RT = (
        torch.zeros(len(drawn_RN), thresholds + 1, dtype=torch.double)
        .index_add_(1, rank_N + 1, drawn_RN * of_class_N)
        .cumsum(1)
        .div((drawn_RN * of_class_N).sum(1, keepdim=True))
        for of_class_N in (~genuine_N, genuine_N)
    )
    gap_RT = passed_RT + kept_RT - 1  # from -1 to 1, never falling: where it is 0, the rates are equal
    after_R1 = (gap_RT >= -EQUAL).long().argmax(1, keepdim=True).clamp_min(1)
    before_R1 = after_R1 - 1
    low_R1, high_R1 = gap_RT.gather(1, before_R1), gap_RT.gather(1, after_R1)
    share_R1 = low_R1 / (low_R1 - high_R1)
    passed_R1, then_R1 = passed_RT.gather(1, before_R1), passed_RT.gather(1, after_R1)
    return (passed_R1 + share_R1 * (then_R1 - passed_R1)).squeeze(1)


def is_spoofing(classes: Sequence[str]) -> bool:
    """Whether the classes are those of a spoofing benchmark."""
    return set(classes) == {GENUINE, SPOOFED}


def spoofing_figures(scores_N: Tensor, genuine_N: Tensor) -> dict[str, Any]:
    """The equal error rate with its 95 % interval, by a bootstrap over clips; nothing where a class has no clip."""
    if genuine_N.all() or not genuine_N.any():
        return {}
    eer = {"eer": lambda drawn_RN: equal_error_rate_draws(scores_N, genuine_N, drawn_RN)}
    return {"eer": equal_error_rate(scores_N, genuine_N), **bootstrap_intervals(len(scores_N), eer)}


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
