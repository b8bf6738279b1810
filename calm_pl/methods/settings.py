"""What learned weights choose among on the support set, and what they are where nothing can be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """The values that `LearnedWeights` tries; of what its caller gives nothing is tried.

    Attributes:
        centre: of the within-head metric, as a share of the mean of the prototypes.
        round_clips: g = c / (c + N - C) for each c of these: what c clips would say that vary alike in every direction,
            beside the N - C that the support set has to tell of variation inside classes.
        tau: temperatures of the head posteriors.
        power: reliabilities to the power 1 / these. A reliability to the power n is what n clips in a row would say for
            a head, so no power exceeds the clips of a class.
        penalties: toward the start and toward shared weights, in clips, the strongest first.
        steps: numbers of optimiser steps, ascending.
        lr: step sizes of Adam.
    """

    centre: Sequence[float] = (0.8, 1.0)
    round_clips: Sequence[float] = (4.0, 16.0, 64.0, 256.0)
    tau: Sequence[float] = (0.05, 0.1, 0.2)
    power: Sequence[float] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    penalties: Sequence[tuple[float, float]] = ((1.0, 10.0), (1.0, 1.0), (0.1, 10.0), (0.1, 1.0), (0.1, 0.1))
    steps: Sequence[int] = (10, 20, 40, 80)
    lr: Sequence[float] = (0.03, 0.1)

    def __post_init__(self) -> None:
        for name in ("centre", "round_clips", "tau", "power"):  # of which the geometric mean is taken
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"search.{name} holds {min(getattr(self, name))}: numbers above 0")


@dataclass(frozen=True)
class OneShot:
    """What `LearnedWeights` uses where no class has two clips: nothing can be left out there, hence nothing chosen.

    Attributes:
        centre: of the within-head metric, as a share of the mean of the prototypes.
        tau: the lowest temperature of the head posteriors.
        heard_spread: how far a head's prototypes must lie apart to be heard; see `calm_pl.methods.hearing`.
        tau_of_spread: no head's tau is less than this times its squared spread.
    """

    centre: float = 1.0
    tau: float = 0.03
    heard_spread: float = 0.14
    tau_of_spread: float = 0.3

    def __post_init__(self) -> None:
        if self.centre <= 0:
            raise ValueError(f"one_shot.centre is {self.centre}: a share above 0 of the mean of the prototypes")


SEARCH, ONE_SHOT = Search(), OneShot()
