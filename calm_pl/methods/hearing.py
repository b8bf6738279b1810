"""What the spread of a head's prototypes says of the head, before any clip is judged.

Shapes: N clips, K heads, C classes, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Hearing:
    """How much a head hears of what tells the classes apart, and how softly it votes.

    Attributes:
        heard_K: from 0, where all classes sound alike to the head, to 1.
        least_tau_K: the lowest temperature of the head's posteriors.
    """

    heard_K: Tensor
    least_tau_K: Tensor

    @classmethod
    def of(cls, prototypes_CKD: Tensor, enough: float, tau_of_spread: float) -> Hearing:
        """Of heads that hear half of what there is where their prototypes have spread `enough`.

        No tau is less than `tau_of_spread` times the squared spread: that heads of wide spread vote softly was better
        for most of the heads that it was tried on (docs/explanation/tried.md).
        """
        spread_K = spread(prototypes_CKD)
        return cls(heard(spread_K, enough), tau_of_spread * spread_K.square())

    def tau(self, tau: float) -> Tensor:
        """One temperature a head (K,): this one, or more where the spread is wide."""
        return self.least_tau_K.clamp_min(tau)


def spread(prototypes_CKD: Tensor) -> Tensor:
    """Mean square distance of a head's prototypes from their mean, (K,); head outputs are of length 1."""
    return prototypes_CKD.float().var(0, correction=0).sum(-1)


def heard(spread_K: Tensor, enough: float) -> Tensor:
    """How much each head hears, from 0 to 1: s^4 / (s^4 + enough^4) for a spread s, (K,).

    A head that hears all classes alike has little to say. Beyond that, a wider spread says nothing. Of heads that no
    clip can judge more is asked, and of those that clips can judge less, the more clips a class has: chance moves
    prototypes of n clips by the n-th part.
    """
    fourth_K = (spread_K / enough) ** 4
    return fourth_K / (1 + fourth_K)
