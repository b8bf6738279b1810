"""Where learned weights start: leave-one-out reliabilities as weights that all classes share, and their settings.

Shapes: N clips, K heads, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from calm_pl import functional as F
from calm_pl.methods.calibration import best_temperature
from calm_pl.methods.hearing import Hearing
from calm_pl.methods.leave_one_out import LeaveOneOut
from calm_pl.methods.settings import Search


def choose_start(
    left_out: LeaveOneOut,
    clips: Tensor,
    hearing: Hearing,
    search: Search,
    given: Mapping[str, float | str],
    evidence: float,
) -> dict[str, Any]:
    """Centre, g, tau and the sharpness of the shared weights: their mean over all tried, by likelihood.

    The likelihood is that of the clips left out, after calibration; the mean is geometric. With few clips many
    settings are nearly as likely as the best, which is the best by chance: their mean is the steadier choice.

    Args:
        left_out: the support set in its within-head metric, of whatever centre.
        clips: those that are judged.
        hearing: of the heads.
        search: what is tried.
        given: what the caller fixes, of `centre`, `shrinkage` and `tau`.
        evidence: what a judged clip counts for.
    """
    assert left_out.metric is not None
    found = []
    labels_N = left_out.labels_N[clips]
    sharpest = max(2, len(left_out.labels_N) / left_out.num_classes)
    powers = [power for power in search.power if 1 / power <= sharpest]
    shrinkages = [count / (count + left_out.metric.freedom) for count in search.round_clips]
    for centre in [given["centre"]] if "centre" in given else search.centre:
        of_centre = left_out.around(float(centre))
        for shrinkage in [given["shrinkage"]] if "shrinkage" in given else shrinkages:
            cosines_NKC = of_centre.cosines(shrinkage, clips)
            for tau in [given["tau"]] if "tau" in given else search.tau:
                posteriors_NKC = torch.softmax(cosines_NKC / hearing.tau(float(tau))[:, None], -1)
                reliability_NK = reliability_without(posteriors_NKC, labels_N, hearing.heard_K)
                for power in powers:
                    weights_NK = F.head_weights(reliability_NK.T, "margin_clamped", power).T
                    scores_NC = torch.einsum("nkc,nk->nc", posteriors_NKC, weights_NK)
                    setting: dict[str, Any] = {"centre": centre, "shrinkage": shrinkage, "tau": tau, "tau_w": power}
                    found.append((setting, best_temperature(scores_NC, labels_N)[1]))
    likelihoods = torch.softmax(-evidence * len(clips) * torch.tensor([nll for _, nll in found]), 0)
    likeliest, nll = min(found, key=lambda one: one[1])
    chosen = {
        name: float((likelihoods @ torch.tensor([setting[name] for setting, _ in found]).log()).exp())
        for name, value in likeliest.items()
        if not isinstance(value, str)
    }
    return {**chosen, **given, "likeliest": {**likeliest, "loo_nll": nll}}


def clip_trust(posteriors_NKC: Tensor, labels_N: Tensor, heard_K: Tensor) -> Tensor:
    """What each clip says for each head: Brier's score of its posterior, for as much as the head hears, (N, K).

    A proper score, in which a head that is wrong with certainty loses more than one that is undecided. It counts from
    1/C below nothing, so that guessing, which scores 1/C, is worth as much again.
    """
    score_NK = F.clip_evidence(posteriors_NKC, labels_N, "brier_softmax")
    return (score_NK + 1 / posteriors_NKC.shape[2]) * heard_K


def shared_weights(posteriors_NKC: Tensor, labels_N: Tensor, heard_K: Tensor, power: float) -> Tensor:
    """Reliabilities as weights, the same for every class: max(0, r)^(1/power) over its sum, (K, C)."""
    reliability_K1 = clip_trust(posteriors_NKC, labels_N, heard_K).mean(0)[:, None]
    return F.head_weights(reliability_K1, "margin_clamped", power).expand(-1, posteriors_NKC.shape[2])


def reliability_without(posteriors_NKC: Tensor, labels_N: Tensor, heard_K: Tensor) -> Tensor:
    """For every clip the reliabilities by the clips of all other classes, (N, K).

    A clip must not choose the heads that judge it, nor may its classmates, whom a prototype judges that it is part of.
    """
    evidence_NK = clip_trust(posteriors_NKC, labels_N, heard_K)
    of_class_NC = one_hot(labels_N, posteriors_NKC.shape[2]).to(evidence_NK)
    sums_CK, counts_C = of_class_NC.T @ evidence_NK, of_class_NC.sum(0)
    others_CK = (sums_CK.sum(0) - sums_CK) / (len(labels_N) - counts_C).clamp_min(1)[:, None]
    return others_CK[labels_N]
