"""One small random-weight checkpoint a model family, written as a user's would be; built for the conformance test."""

from __future__ import annotations

from tests.families import hearing, seeing
from tests.families.base import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES = {
    "qwen2-audio": Family("qwen2_audio", hearing.qwen2_audio, (3, 4, 8), cuts=True),
    "qwen2.5-omni": Family("qwen2_5_omni", seeing.qwen25_omni, (3, 4, 8), needs=("torchvision",), sees=True, cuts=True),
    "qwen3-omni-moe": Family("qwen3_omni_moe", seeing.qwen3_omni, (3, 4, 16), needs=("torchvision",), sees=True),
    "audio-flamingo-3": Family("audioflamingo3", hearing.flamingo("AudioFlamingo3"), (3, 4, 8)),
    "music-flamingo": Family("musicflamingo", hearing.flamingo("MusicFlamingo"), (3, 4, 8)),
    "voxtral": Family("voxtral", hearing.voxtral, (3, 4, 16), asks="[/INST]", needs=("mistral_common",), window=30),
    "glm-asr": Family("glmasr", hearing.glm_asr, (3, 4, 8)),
    "qwen3-asr": Family("qwen3_asr", hearing.qwen3_asr, (3, 4, 16)),
    "fun-asr-nano": Family("fun_asr_nano", hearing.fun_asr_nano, (3, 4, 16)),
    "moss-transcribe": Family("moss_transcribe_diarize", hearing.moss_transcribe, (3, 4, 16)),
    "vibevoice-asr": Family("vibevoice_asr", hearing.vibevoice_asr, (3, 4, 8), encoder=None),
    "granite-speech": Family(
        "granite_speech", hearing.granite_speech("GraniteSpeech"), (3, 4, 8), asks=hearing.GRANITE_TURN
    ),
    "granite-speech-plus": Family(
        "granite_speech_plus", hearing.granite_speech("GraniteSpeechPlus"), (3, 4, 8), asks=hearing.GRANITE_TURN
    ),
    "phi-4-multimodal": Family(
        "phi4_multimodal",
        seeing.phi4,
        (3, 4, 8),
        second="model.layers.1.self_attn",
        needs=("torchvision",),
        sees=True,
        window=40,
    ),
    "gemma-3n": Family(
        "gemma3n",
        seeing.gemma3n,
        (5, 2, 16),
        asks=seeing.GEMMA_TURN,
        needs=("torchvision", "timm"),
        sees=True,
        window=30,
        cuts=True,
    ),
    "gemma-4": Family(
        "gemma4",
        seeing.gemma4,
        (4, 2, 32),
        asks=seeing.GEMMA_TURN,
        needs=("torchvision",),
        sees=True,
        window=30,
        cuts=True,
    ),
    "gemma-4-unified": Family(
        "gemma4_unified",
        seeing.gemma4_unified,
        (4, 2, 32),
        encoder=None,
        asks=seeing.GEMMA_TURN,
        needs=("torchvision",),
        sees=True,
    ),
    "muse-spark": Family("muse_spark", seeing.muse_spark, (3, 4, 8), encoder=None, needs=("torchvision",), sees=True),
    "inkling": Family(
        "inkling_mm_model", seeing.inkling, (3, 4, 8), encoder=None, needs=("torchvision", "scipy"), sees=True
    ),
    "dots3-note": Family("dots3_note", seeing.dots3_note, (3, 4, 8), needs=("torchvision",), sees=True),
    "nemotron-h-omni": Family(
        "nemotron_h_omni",
        seeing.nemotron_omni,
        (3, 4, 8),
        second="language_model.model.layers.3.mixer",
        needs=("torchvision",),
        sees=True,
    ),
    "nemotron-3.5-transcribe": Family(
        "nemo_speechlm", hearing.nemotron_transcribe, (3, 4, 8), second="model.language_model.layers.3.mixer"
    ),
    "apertus-1.5": Family("apertus1p5", seeing.apertus, (3, 4, 8), encoder=None, needs=("torchvision",), sees=True),
    "whisper": Family(
        "whisper",
        hearing.whisper,
        (3, 4, 16),
        second="model.decoder.layers.0.encoder_attn",
        asks="start tokens",
        asked=False,
        cuts=True,
    ),
}
