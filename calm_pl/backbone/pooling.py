"""Which prompt tokens a decoder head is read at.

Shapes: B clips, T tokens, E concatenated heads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calm_pl.backbone.errors import BackboneError

if TYPE_CHECKING:
    from calm_pl.backbone.processing import LALMInputs


@dataclass(frozen=True)
class Pooling:
    """The last prompt token (CALM, arXiv 2602.07077), the mean of the last ``last``, or of the audio tokens."""

    last: int | None = 1  # None: the audio tokens

    @classmethod
    def parse(cls, text: str) -> Pooling:
        """Read ``last``, ``last:N`` or ``audio``.

        Raises:
            BackboneError: anything else.
        """
        if text == "audio":
            return cls(None)
        found = re.fullmatch(r"last(?::([1-9][0-9]*))?", text)
        if not found:
            raise BackboneError(
                f"pooling={text!r} is unknown: choose last, last:N (the mean of the last N tokens) or audio."
            )
        return cls(int(found[1] or 1))

    def __call__(self, x_BTE: Tensor, inputs: LALMInputs) -> Tensor:
        """Reduce (B, T, E) to (B, E).

        Raises:
            BackboneError: the audio tokens of an encoder-decoder model, or of pictures alone, which have none.
        """
        if self.last == 1:
            rows_B = torch.arange(len(x_BTE), device=x_BTE.device)
            return x_BTE[rows_B, inputs.last_token_B.to(x_BTE.device)]
        mask_BT = self._tokens(inputs).to(x_BTE.device)
        return (x_BTE.float() * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)

    def _tokens(self, inputs: LALMInputs) -> Tensor:
        if self.last is None:
            if inputs.audio_BT is None:
                raise BackboneError("pooling=audio: there are no audio tokens in the decoder; choose last or last:N.")
            return inputs.audio_BT
        tokens_BT = inputs.model_inputs.get("attention_mask")
        if tokens_BT is None:
            tokens_BT = torch.ones_like(inputs.model_inputs["decoder_input_ids"])
        distance_BT = inputs.last_token_B[:, None] - torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return (distance_BT >= 0) & (distance_BT < self.last) & tokens_BT.bool()
