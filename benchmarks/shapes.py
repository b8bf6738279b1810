"""Audio-language models of given sizes with random weights, for measuring speed where a checkpoint is not at hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from calm_pl.backbone.random_checkpoint import CHATML, byte_tokenizer


@dataclass(frozen=True)
class Stack:
    """Sizes of a stack of transformer layers."""

    layers: int
    width: int
    heads: int
    feed_forward: int
    key_value_heads: int | None = None  # None: as many as heads


@dataclass(frozen=True)
class Shape:
    """Sizes of the audio encoder and the decoder; the encoder's window is `seconds` long.

    `sight` is the picture encoder of an Omni: it is there, and no sound goes through it. Without it the model is
    Qwen2-Audio.
    """

    encoder: Stack
    decoder: Stack
    vocabulary: int
    sight: Stack | None = None
    mel_bins: int = 128
    seconds: int = 30


SMALL = Stack(4, 256, 4, 1024)
WHISPER_LARGE = Stack(32, 1280, 20, 5120)
SHAPES = {
    # Small enough for a CPU, with the encoder's window of the large ones.
    "qwen2-audio-mini": Shape(SMALL, Stack(6, 256, 4, 640), 2048),
    "qwen2-audio-7b": Shape(WHISPER_LARGE, Stack(32, 4096, 32, 11008), 156032),
    "qwen2.5-omni-mini": Shape(SMALL, Stack(6, 256, 4, 640, 2), 2048, Stack(1, 64, 2, 64)),
    "qwen2.5-omni-7b": Shape(WHISPER_LARGE, Stack(28, 3584, 28, 18944, 4), 152064, Stack(32, 1280, 16, 3420)),
}


def write_checkpoint(shape: Shape, folder: Path, shard_size: str = "2GB") -> None:
    """Write a checkpoint of random bfloat16 weights as they are published, in the memory of one shard."""
    # The checkpoint of an Omni holds the whole model, of which the thinker is a part.
    prefix = "" if shape.sight is None else "thinker."
    model = random_model(shape, folder, torch.bfloat16, "meta")
    weights = {prefix + name: weight for name, weight in model.state_dict().items()}
    noise = (0.02 * torch.randn(2**24, generator=torch.Generator().manual_seed(0))).bfloat16()

    def random(name: str) -> torch.Tensor:
        like = weights[name]
        if like.ndim == 1:  # scales of norms, and biases
            return torch.full(like.shape, float(name.endswith("weight")), dtype=like.dtype)
        return noise.repeat(-(-like.numel() // len(noise)))[: like.numel()].reshape(like.shape)

    split = split_torch_state_dict_into_shards(weights, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: random(name) for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_model(shape: Shape, folder: Path, dtype: torch.dtype, device: str) -> tf.PreTrainedModel:
    """Make the model on `device`, and write its config and processor, but no weights, to `folder`."""
    extractor = tf.WhisperFeatureExtractor(feature_size=shape.mel_bins, chunk_length=shape.seconds)
    make = qwen2_audio if shape.sight is None else qwen25_omni
    model_class, config, processor = make(shape, extractor, folder)
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    standard = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class(config)
    finally:
        torch.set_default_dtype(standard)


def qwen2_audio(shape: Shape, extractor: tf.WhisperFeatureExtractor, folder: Path) -> tuple[type, Any, Any]:
    """Class, config and processor of Qwen2-Audio."""
    tokenizer = byte_tokenizer(["<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"])
    config = tf.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **_encoder(shape)},
        text_config={"model_type": "qwen2", **_decoder(shape)},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        architectures=["Qwen2AudioForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    processor = tf.Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer)
    processor.chat_template = processor.default_chat_template
    return tf.Qwen2AudioForConditionalGeneration, config, processor


def qwen25_omni(shape: Shape, extractor: tf.WhisperFeatureExtractor, folder: Path) -> tuple[type, Any, Any]:
    """Class, config and processor of the thinker of Qwen2.5-Omni, the part that hears and answers."""
    assert shape.sight is not None
    senses = ("image", "audio", "video")
    marks = {f"{name}_token": f"<|{name.upper()}|>" for name in senses}
    marks |= {f"{part}_{end}_token": f"<|{part}_{end}|>" for part in ("vision", "audio") for end in ("bos", "eos")}
    tokenizer = byte_tokenizer(["<|im_start|>"], **marks)
    half = shape.decoder.width // shape.decoder.heads // 2
    rope = {"rope_type": "default", "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8], "rope_theta": 1e6}
    thinker = {
        "audio_config": {**_encoder(shape), "n_window": 100, "output_dim": shape.decoder.width},
        "vision_config": {
            "depth": shape.sight.layers,
            "hidden_size": shape.sight.width,
            "num_heads": shape.sight.heads,
            "intermediate_size": shape.sight.feed_forward,
            "out_hidden_size": shape.decoder.width,
        },
        "text_config": {**_decoder(shape), "rope_parameters": rope},
        **{f"{name}_token_index": tokenizer.convert_tokens_to_ids(marks[f"{name}_token"]) for name in senses},
        "audio_start_token_id": tokenizer.convert_tokens_to_ids("<|audio_bos|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_bos|>"),
    }
    config = tf.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    config.save_pretrained(folder)
    processor = tf.Qwen2_5OmniProcessor(
        image_processor=tf.Qwen2VLImageProcessor(),
        video_processor=tf.Qwen2VLVideoProcessor(),
        feature_extractor=extractor,
        tokenizer=tokenizer,
    )
    processor.chat_template = CHATML.replace("AUDIO", "<|audio_bos|><|AUDIO|><|audio_eos|>")
    return tf.Qwen2_5OmniThinkerForConditionalGeneration, config.thinker_config, processor


def _encoder(shape: Shape) -> dict[str, int]:
    return {
        "num_mel_bins": shape.mel_bins,
        "encoder_layers": shape.encoder.layers,
        "d_model": shape.encoder.width,
        "encoder_attention_heads": shape.encoder.heads,
        "encoder_ffn_dim": shape.encoder.feed_forward,
        "max_source_positions": shape.seconds * 50,
    }


def _decoder(shape: Shape) -> dict[str, int]:
    return {
        "num_hidden_layers": shape.decoder.layers,
        "hidden_size": shape.decoder.width,
        "num_attention_heads": shape.decoder.heads,
        "num_key_value_heads": shape.decoder.key_value_heads or shape.decoder.heads,
        "intermediate_size": shape.decoder.feed_forward,
        "vocab_size": shape.vocabulary,
    }
