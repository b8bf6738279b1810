"""Repeating a prompt's cache where layers keep states: transformers repeats keys and values, and forgets the states.

State-space layers (Nemotron-H) and convolutions inside attention (Inkling) keep a state of the prompt, and every label
that is asked about goes on from it.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import LinearAttentionLayer


def repeat_states(layer: LinearAttentionLayer, repeats: int) -> None:
    """Repeat each clip's states, and its keys and values where the layer has them, ``repeats`` times in a row."""
    # The method by which beam search picks rows knows both.
    states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    rows = next(len(state) for state in states if state is not None)
    layer.reorder_cache(torch.arange(rows).repeat_interleave(repeats))  # type: ignore[arg-type]


LinearAttentionLayer.batch_repeat_interleave = repeat_states  # type: ignore[attr-defined]
