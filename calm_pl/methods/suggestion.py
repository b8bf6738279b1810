"""Which unlabelled clips are most worth a label.

Shapes: N clips, C classes, F features, L labelled clips.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calm_pl.functional.heads import unit
from calm_pl.methods.calibration import MIN_PROBABILITY

# Wider features are projected to so many random directions, which keeps distances up to a few percent.
MAX_FEATURES = 1024


def by_margin(probabilities_NC: Tensor) -> Tensor:
    """Positions (N,), those first whose two most probable classes are closest."""
    top_N2 = probabilities_NC.topk(2, dim=1).values
    return (top_N2[:, 0] - top_N2[:, 1]).argsort(stable=True)


def by_entropy(probabilities_NC: Tensor) -> Tensor:
    """Positions (N,), the least certain over all classes first."""
    entropy_N = -(probabilities_NC * probabilities_NC.clamp_min(MIN_PROBABILITY).log()).sum(1)
    return entropy_N.argsort(descending=True, stable=True)


def by_coverage(features_NF: Tensor, count: int, labelled_LF: Tensor | None = None) -> Tensor:
    """Positions of ``count`` clips, each the farthest from all that are labelled or chosen before (Gonzalez, 1985).

    No clip is then farther from a chosen one than twice the least distance that any choice of as many could reach.

    Args:
        features_NF: of the clips to choose from.
        count: how many.
        labelled_LF: of the clips that have a label; None, and the first choice is the clip closest to the mean.
    """
    if labelled_LF is None or not len(labelled_LF):
        first = int((features_NF - features_NF.mean(0)).square().sum(1).argmin())
        chosen = [first]
        nearest_N = (features_NF - features_NF[first]).square().sum(1)
    else:
        chosen = []
        nearest_N = torch.cdist(features_NF, labelled_LF).square().amin(1)
    while len(chosen) < min(count, len(features_NF)):
        nearest_N[chosen] = -1.0
        farthest = int(nearest_N.argmax())
        chosen.append(farthest)
        nearest_N = torch.minimum(nearest_N, (features_NF - features_NF[farthest]).square().sum(1))
    return torch.tensor(chosen)


def head_features(heads_NKD: Tensor) -> Tensor:
    """Every head's direction, side by side (N, F): squared distances are 2 (1 - mean cosine over heads).

    The same projection in every call, so that parts of a set can be turned into features one by one.
    """
    num_heads, dim = heads_NKD.shape[1:]
    features_NF: Tensor = (unit(heads_NKD.float()) / num_heads**0.5).flatten(1)
    if num_heads * dim <= MAX_FEATURES:
        return features_NF
    directions = torch.randn(num_heads * dim, MAX_FEATURES, generator=torch.Generator().manual_seed(0))
    projected_NF: Tensor = features_NF @ (directions / MAX_FEATURES**0.5)
    return projected_NF
