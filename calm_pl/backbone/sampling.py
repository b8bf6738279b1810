"""Asking the model in words several times, with sampling: which labels its answers name.

Shapes: B clips, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calm_pl.backbone.answers import must_answer, named_labels
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.processing import LALMInputs


@torch.inference_mode()
def sampled_votes(
    lalm: FrozenLALM,
    inputs: LALMInputs,
    labels: Sequence[str],
    trials: int,
    temperature: float = 1.0,
    max_new_tokens: int = 16,
) -> Tensor:
    """How many of ``trials`` sampled answers name each label first, and in the last column none: (B, C + 1), float32.

    Draws from torch's global generator, which the caller seeds.

    Raises:
        BackboneError: the model is an encoder-decoder, or its prompts are padded on the right.
    """
    must_answer(lalm)
    if inputs.parts:
        return inputs.in_parts(lambda part: sampled_votes(lalm, part, labels, trials, temperature, max_new_tokens))
    inputs = inputs.to(lalm.device, lalm.model.dtype)
    with lalm.window(inputs):
        tokens_RT = lalm.model.generate(  # R = B x trials rows, a clip's trials together
            **inputs.model_inputs,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=trials,
        )
    answers = lalm.processor.tokenizer.batch_decode(
        tokens_RT[:, inputs.last_token_B.max() + 1 :], skip_special_tokens=True
    )
    votes_BV = torch.zeros(len(inputs.last_token_B), len(labels) + 1, dtype=torch.float32)
    for row, answer in enumerate(answers):
        named = named_labels(answer, labels)
        votes_BV[row // trials, named[0] if named else len(labels)] += 1
    return votes_BV
