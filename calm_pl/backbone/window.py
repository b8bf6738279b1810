"""The audio encoder's window, cut to the longest clip of a batch.

Whisper-like encoders pad every clip to 30 s and cost the same for 1 s as for 30 s. Where an encoder masks padded
frames, a shorter window gives the same valid frames: positions are absolute and the convolutions see what they saw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from calm_pl.backbone.structure import audio_encoder

# Encoders that mask padded frames or drop them; the tests prove that cutting their window changes nothing. The encoders
# of Whisper, Voxtral and GLM-ASR attend to the padding, so their window stays whole.
MASKING_ENCODERS = (
    "qwen2_audio_encoder",
    "audioflamingo3_encoder",
    "qwen2_5_omni_audio_encoder",
    "qwen3_omni_moe_audio_encoder",
)
# Its extractor knows a window, but pads to the longest clip only, and does not say how long each clip is in frames.
UNPADDED_ENCODERS = ("dots3_note_audio_encoder",)
PIECEWISE_ENCODERS = ("qwen3_omni_moe_audio_encoder", "qwen3_asr_encoder")
# Written into transformers' code, not in the config.
PHI4_POSITIONS = 500
# Mel frames kept behind the longest clip: the STFT window and the two convolutions look this far ahead.
MARGIN_FRAMES = 8
# Convolutions and pooling shorten four mel frames to one audio token.
FRAMES_PER_TOKEN = 4


def can_be_cut(config: PreTrainedConfig) -> bool:
    """Whether this model's audio encoder may run on a shorter window."""
    config = getattr(config, "thinker_config", config)
    return getattr(getattr(config, "audio_config", None), "model_type", None) in MASKING_ENCODERS


def mixes_from(config: PreTrainedConfig, extractor: Any) -> float:
    """Samples from which on clips of different lengths may share a batch; below, padding would change the result.

    Whisper's extractor pads to a fixed window, so features do not depend on the batch. Others (Gemma, Granite Speech,
    Phi-4) pad to the longest clip, and what stands behind a shorter clip changes its features or reaches it inside the
    encoder, in transformers as in the authors' code. Only clips of one length share a batch there.
    """
    audio = getattr(getattr(config, "thinker_config", config), "audio_config", None)
    if not hasattr(extractor, "n_samples") or getattr(audio, "model_type", None) in UNPADDED_ENCODERS:
        return math.inf
    if audio is not None and audio.model_type in PIECEWISE_ENCODERS:
        # They pad a clip's pieces of 2 * n_window frames to the longest piece of the batch, and convolve over that.
        return float(2 * audio.n_window * extractor.hop_length)
    return 0


def alone_from(config: PreTrainedConfig, extractor: Any) -> float:
    """Samples beyond which a clip is run alone: Phi-4's encoder unfolds such clips, and fails with two in a batch."""
    audio: Any = getattr(config, "audio_config", None)
    if getattr(audio, "model_type", None) != "phi4_multimodal_audio":
        return math.inf
    return float(PHI4_POSITIONS * audio.time_reduction * extractor.hop_length)


@contextmanager
def shorter_features(extractor: Any, waveforms: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, ``extractor`` pads to the longest of ``waveforms`` instead of its full window."""
    full = extractor.n_samples, extractor.nb_max_frames
    longest = max(len(x_S) for x_S in waveforms) // extractor.hop_length + MARGIN_FRAMES
    frames = min(-(-longest // FRAMES_PER_TOKEN) * FRAMES_PER_TOKEN, extractor.nb_max_frames)
    extractor.n_samples, extractor.nb_max_frames = frames * extractor.hop_length, frames
    try:
        yield
    finally:
        extractor.n_samples, extractor.nb_max_frames = full


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Within the block, a GPU computes convolutions of float32 numbers in float32, as it does matrix products.

    Unless told otherwise, cuDNN rounds them to 11 bits (TF32), which moves heads of calm-tiny by up to 0.06.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def shorter_encoder(model: PreTrainedModel, input_features_BMF: Tensor | None) -> Iterator[None]:
    """Within the block, the audio encoder takes features as short as these (B clips, M mel bins, F frames)."""
    encoder: Any = audio_encoder(model) if can_be_cut(model.config) else None
    # Encoders without a table of positions take any length as they are.
    if input_features_BMF is None or not hasattr(encoder, "embed_positions"):
        yield
        return
    config = encoder.config
    positions = input_features_BMF.shape[-1] // 2  # the second convolution has stride 2
    full_positions, full_weight = config.max_source_positions, encoder.embed_positions.weight
    config.max_source_positions = positions
    encoder.embed_positions.weight = nn.Parameter(full_weight[:positions], requires_grad=False)
    try:
        yield
    finally:
        config.max_source_positions = full_positions
        encoder.embed_positions.weight = full_weight
