"""Which heads deserved trust on other labelled sets: a start for classes that have few clips.

Shapes: K heads, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def base_weights(folders: Sequence[str], num_heads: int) -> Tensor:
    """Mean over runs and their classes of the head weights that ``calm_learned`` found there: (K,), summing to 1.

    Args:
        folders: run folders (or their ``classifier/``) of fits on other sets, with the same backbone and heads.
        num_heads: K of the heads that are to be weighted.

    Raises:
        FileNotFoundError: no classifier there.
        ValueError: it was fitted by another method than ``LearnedWeights``, or on another number of heads.
    """
    from calm_pl.methods.learned import LearnedWeights

    found = []
    for folder in map(Path, folders):
        place = next((p for p in (folder, folder / "classifier") if (p / "classifier.json").is_file()), None)
        if place is None:
            raise FileNotFoundError(f"base: {folder} holds no classifier; give the run folder of a finished calm fit")
        method = json.loads((place / "classifier.json").read_text())["method"]
        if not method.endswith(f".{LearnedWeights.__name__}"):
            raise ValueError(f"base: {place} was fitted by {method}; only calm_learned's weights can be a base")
        learned = LearnedWeights()
        learned.load_state_dict(load_file(place / "classifier.safetensors"))
        weights_K = learned.weights().detach().mean(1)
        if len(weights_K) != num_heads:
            raise ValueError(f"base: {place} weights {len(weights_K)} heads, this backbone has {num_heads}")
        found.append(weights_K)
    return torch.stack(found).mean(0)
