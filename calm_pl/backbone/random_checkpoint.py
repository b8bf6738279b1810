"""A small Qwen2-Audio with random weights: exercises the whole path, hears nothing, and says so by its name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

# A chat template for processors that have none of their own; AUDIO stands for a family's mark of a sound.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'audio' %}AUDIO{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_qwen2_audio(folder: Path | None = None, seed: int = 0) -> Path:
    """Write the checkpoint (about 1 MB, deterministic in ``seed``) unless it is there; return its folder."""
    folder = folder or user_cache_path("calm-pl") / "backbones" / f"random-qwen2-audio-{seed}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that a killed run leaves no half checkpoint and two runs do not meet.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _write(Path(scratch) / "checkpoint", seed)
        try:
            os.replace(Path(scratch) / "checkpoint", folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    return folder


def _write(folder: Path, seed: int) -> None:
    import torch
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = byte_tokenizer(["<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"])
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "num_mel_bins": 32,
            "max_source_positions": 250,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 160,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 1024,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=32, chunk_length=5)
    processor = Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer)
    processor.chat_template = processor.default_chat_template
    processor.save_pretrained(folder)


def byte_tokenizer(  # type: ignore[no-untyped-def]  # transformers' class is loaded late
    special_tokens: list[str], **named: str
):
    """A tokenizer whose vocabulary is the 256 bytes and the special tokens: any text is possible, none is short.

    ``named`` are special tokens that a processor asks for by name, such as ``audio_token="<audio>"``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = list(dict.fromkeys(["<|endoftext|>", "<|im_end|>", *special_tokens, *named.values()]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(specials + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special_tokens,
        **({"extra_special_tokens": named} if named else {}),
    )
