"""Asking the model in words: how likely it finds each class name as the answer.

Shapes: B clips, C labels, T tokens of the longest label, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import re
import string
from collections.abc import Sequence

import torch
from torch import Tensor

from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.processing import LALMInputs

# Copies of the prompt's cache in memory at once; more labels than this are asked in turns.
LABELS_PER_PASS = 32


@torch.inference_mode()
def label_log_likelihoods(lalm: FrozenLALM, inputs: LALMInputs, labels: Sequence[str]) -> Tensor:
    """Mean log-likelihood per token of each label as the answer (B, C), float32, on the model's device.

    Audio and prompt run once; their cache is shared by all labels.

    Raises:
        BackboneError: the model is an encoder-decoder (it transcribes and answers no questions), or prompts are padded
            on the right.
        ValueError: a label is empty.
    """
    must_answer(lalm)
    if inputs.parts:
        return inputs.in_parts(lambda part: label_log_likelihoods(lalm, part, labels))
    inputs = inputs.to(lalm.device, lalm.model.dtype)
    arguments = inspect.signature(lalm.model.forward).parameters
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}
    with lalm.window(inputs):
        prompt = lalm.model(**inputs.model_inputs, **only_last, use_cache=True)
    first_BV = prompt.logits[:, -1].float().log_softmax(-1)
    cache = prompt[_cache_argument(lalm)]
    scores = [
        _continuations(lalm, inputs.model_inputs["attention_mask"], cache, first_BV, tokens_CT)
        for tokens_CT in _tokens(lalm, labels).split(LABELS_PER_PASS)
    ]
    return torch.cat(scores, dim=1)


def letter_log_likelihoods(lalm: FrozenLALM, inputs: LALMInputs, num_options: int) -> Tensor:
    """Log-likelihood of the letters A, B, ... as the answer to a multiple-choice question (B, options), float32.

    Raises:
        BackboneError: as :func:`label_log_likelihoods`.
    """
    return label_log_likelihoods(lalm, inputs, list(string.ascii_uppercase[:num_options]))


@torch.inference_mode()
def generate_answers(lalm: FrozenLALM, inputs: LALMInputs, max_new_tokens: int = 16) -> list[str]:
    """The model's own answers (B), decoded greedily; of a clip in pieces, that to its first.

    Raises:
        BackboneError: the model is an encoder-decoder, or prompts are padded on the right.
    """
    must_answer(lalm)
    if inputs.parts:
        answers = [answer for part in inputs.parts for answer in generate_answers(lalm, part, max_new_tokens)]
        return [answers[inputs.order.index(row)] for row in range(len(inputs.last_token_B))]
    inputs = inputs.to(lalm.device, lalm.model.dtype)
    with lalm.window(inputs):
        tokens_BT = lalm.model.generate(**inputs.model_inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new_BT = tokens_BT[:, inputs.last_token_B.max() + 1 :]
    decoded: list[str] = lalm.processor.tokenizer.batch_decode(new_BT, skip_special_tokens=True)
    return decoded


def named_labels(answer: str, labels: Sequence[str]) -> list[int]:
    """Indices of the labels that an answer names, in its order; of several that start at one word, the longest first.

    Case, punctuation and underscores do not count; labels match whole words only.
    """
    words = f" {_words(answer)} "
    found = [(words.find(f" {_words(label)} "), -len(label), i) for i, label in enumerate(labels)]
    return [index for at, _, index in sorted(found) if at >= 0]


def leading_letter(answer: str) -> int | None:
    """Which option (0 is A) an answer chooses by its letter, as in "B", "B." or "(b) rain"; None for a plain text."""
    found = re.match(r"\W*([A-Z])\W*$|\W*([A-Z])[.:)]|\(([a-z])\)", answer)
    letter = next(filter(None, found.groups()), "") if found else ""
    return string.ascii_uppercase.index(letter.upper()) if letter else None


def must_answer(lalm: FrozenLALM) -> None:
    """Refuse models that answer nothing, and padding between the prompt and its answer."""
    if lalm.model.config.is_encoder_decoder:
        raise BackboneError(f"{type(lalm.model).__name__} answers no questions: it has no zero-shot answer to score.")
    if lalm.processor.tokenizer.padding_side != "left":
        raise BackboneError("answers come behind the prompt: load the backbone with padding_side=left.")


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower().replace("_", " ")))


def _tokens(lalm: FrozenLALM, labels: Sequence[str]) -> Tensor:
    """Token ids (C, T) of the labels; -1 fills up the shorter ones."""
    ids = [lalm.processor.tokenizer(label, add_special_tokens=False).input_ids for label in labels]
    for label, row in zip(labels, ids, strict=True):
        if not row:
            raise ValueError(f"the label {label!r} has no text that the model could answer with: name it.")
    longest = max(map(len, ids))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in ids], device=lalm.device)


def _continuations(lalm: FrozenLALM, mask: Tensor, cache: object, first_BV: Tensor, tokens_CT: Tensor) -> Tensor:
    """Scores (B, C) of some labels after one prompt whose cache is left as it was."""
    B, (C, T) = len(first_BV), tokens_CT.shape
    real_CT = tokens_CT >= 0
    # Of this dtype, whatever the default one is: precision bf16-true makes that bfloat16.
    log_p_BCT = torch.empty(B, C, T, device=first_BV.device, dtype=torch.float32)
    log_p_BCT[:, :, 0] = first_BV[:, tokens_CT[:, 0]]
    if T > 1:
        shared = copy.deepcopy(cache)
        # By which beam search picks rows: `batch_repeat_interleave` forgets the states of layers that keep some.
        rows_R = torch.arange(B, device=first_BV.device).repeat_interleave(C)
        shared.reorder_cache(rows_R)  # type: ignore[attr-defined]  # transformers.Cache
        ids_RT = tokens_CT.clamp_min(0).repeat(B, 1)  # R = B * C rows, labels innermost as in the repeated cache
        mask_R = torch.cat([mask.repeat_interleave(C, 0), real_CT.repeat(B, 1).to(mask.dtype)], dim=1)
        logits = lalm.model(
            input_ids=ids_RT[:, :-1],
            attention_mask=mask_R[:, :-1],
            **{_cache_argument(lalm): shared},
            use_cache=True,
            **_positions(lalm, mask_R[:, :-1], T - 1),
        ).logits
        log_p_RT = logits.float().log_softmax(-1).gather(-1, ids_RT[:, 1:, None]).squeeze(-1)
        log_p_BCT[:, :, 1:] = log_p_RT.view(B, C, T - 1)
    return (log_p_BCT * real_CT).sum(-1) / real_CT.sum(-1)


def _cache_argument(lalm: FrozenLALM) -> str:
    """What the model calls its cache, which transformers 5.24 renamed."""
    return "cache" if "cache" in inspect.signature(lalm.model.forward).parameters else "past_key_values"


def _positions(lalm: FrozenLALM, mask_R: Tensor, count: int) -> dict[str, Tensor]:
    """Positions of the last ``count`` tokens, where the model cannot count them itself behind a cache.

    Omni's positions have three axes, and run apart from the tokens' numbers by ``rope_deltas`` of each clip.
    """
    deltas_B1 = getattr(lalm.model.base_model, "rope_deltas", None)
    if deltas_B1 is None:
        return {}
    positions_RT = (mask_R.long().cumsum(1) - 1)[:, -count:]
    positions_RT = positions_RT + deltas_B1.repeat_interleave(len(mask_R) // len(deltas_B1), 0)
    return {"position_ids": positions_RT.expand(3, -1, -1)}
