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
# Five state-space, expert and attention layers in turn, as in Nemotron-H: layers 1, 3 and 4 attend.
NEMOTRON_TEXT = {
    "model_type": "nemotron_h",
    "layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention", "full_attention"],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "eos_token_id": 1,
}
VISION = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1}


@dataclass(frozen=True)
class Family:
    """What the conformance test must find in a family's checkpoint.

    Attributes:
        model_type: what transformers calls the family.
        write: writes the checkpoint into a folder.
        decoder: layers, heads a layer, head dimension.
        encoder: the same of the audio encoder; None where it has no heads.
        second: path of the second attention block in the model that is loaded.
        asks: a piece of the rendered prompt that only the family's own template writes.
        needs: packages that its processor or model cannot do without.
        sees: whether it takes pictures too.
        window: seconds that its encoder, or its processor, takes in one piece; a few where there is no such length.
        cuts: whether nothing beyond the window is heard.
        asked: whether a question can be asked; an encoder-decoder only transcribes.
    """

    model_type: str
    write: Callable[[Path], None]
    decoder: tuple[int, int, int]
    encoder: tuple[int, int, int] | None = (2, 2, 16)
    second: str = "model.language_model.layers.1.self_attn"
    asks: str = "<|im_start|>assistant\n"
    needs: tuple[str, ...] = ()
    sees: bool = False
    window: float = 2.0
    cuts: bool = False
    asked: bool = True

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
        for name, codebook in model.named_buffers():
            if name.endswith("codebook.embed"):  # zeros, with which every sound would be the same code
                torch.nn.init.normal_(codebook)
        model.save_pretrained(folder)
    if template is not None:
        processor.chat_template = template
    processor.save_pretrained(folder)
