"""What the small checkpoints of all families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf

QWEN2 = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 32,
    "max_source_positions": 100,
}
VISION = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1}


@dataclass(frozen=True)
class Family:
    """What the conformance test must find in a family's checkpoint.

    Attributes:
        write: writes the checkpoint into a folder.
        decoder: layers, heads a layer, head dimension.
        encoder: the same of the audio encoder; None where it has no heads.
        layers_at: path of the decoder's layers in the model that is loaded.
        asks: a piece of the rendered prompt that only the family's own template writes.
        needs: packages that its processor or model cannot do without.
        sees: whether it takes pictures too.
        window: seconds that its encoder, or its processor, takes in one piece; a few where there is no such length.
        cuts: whether nothing beyond the window is heard.
    """

    write: Callable[[Path], None]
    decoder: tuple[int, int, int]
    encoder: tuple[int, int, int] | None = (2, 2, 16)
    layers_at: str = "model.language_model.layers"
    asks: str = "<|im_start|>assistant\n"
    needs: tuple[str, ...] = ()
    sees: bool = False
    window: float = 2.0
    cuts: bool = False

    @property
    def heads(self) -> str:
        """All heads that there are."""
        return "both" if self.encoder else "decoder"


def mel(chunk_length: int = 2) -> tf.WhisperFeatureExtractor:
    return tf.WhisperFeatureExtractor(feature_size=32, chunk_length=chunk_length)


def save(folder: Path, model_class: type, config: Any, processor: Any, template: str | None = None) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        # Fresh initialisation is so small that nothing in the model would notice the audio.
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                torch.nn.init.normal_(weight, std=1.5 / weight[0].numel() ** 0.5)
        model.save_pretrained(folder)
    if template is not None:
        processor.chat_template = template
    processor.save_pretrained(folder)
