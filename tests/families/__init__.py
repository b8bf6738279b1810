"""One small random-weight checkpoint a model family, written as a user's would be; built for the conformance test."""

from __future__ import annotations

from tests.families import hearing, seeing
from tests.families.base import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES = {
    "qwen2-audio": Family(hearing.qwen2_audio, (3, 4, 8), cuts=True),
    "qwen2.5-omni": Family(seeing.qwen25_omni, (3, 4, 8), needs=("torchvision",), sees=True, cuts=True),
    "qwen3-omni-moe": Family(seeing.qwen3_omni, (3, 4, 16), needs=("torchvision",), sees=True),
    "audio-flamingo-3": Family(hearing.flamingo("AudioFlamingo3"), (3, 4, 8)),
    "music-flamingo": Family(hearing.flamingo("MusicFlamingo"), (3, 4, 8)),
    "voxtral": Family(hearing.voxtral, (3, 4, 16), asks="[/INST]", needs=("mistral_common",), window=30),
    "glm-asr": Family(hearing.glm_asr, (3, 4, 8)),
    "qwen3-asr": Family(hearing.qwen3_asr, (3, 4, 16)),
    "fun-asr-nano": Family(hearing.fun_asr_nano, (3, 4, 16)),
    "moss-transcribe": Family(hearing.moss_transcribe, (3, 4, 16)),
    "vibevoice-asr": Family(hearing.vibevoice_asr, (3, 4, 8), encoder=None),
    "granite-speech": Family(hearing.granite_speech("GraniteSpeech"), (3, 4, 8), asks=hearing.GRANITE_TURN),
    "granite-speech-plus": Family(hearing.granite_speech("GraniteSpeechPlus"), (3, 4, 8), asks=hearing.GRANITE_TURN),
    "phi-4-multimodal": Family(
        seeing.phi4, (3, 4, 8), layers_at="model.layers", needs=("torchvision",), sees=True, window=40
    ),
    "gemma-3n": Family(
        seeing.gemma3n,
        (5, 2, 16),
        asks=seeing.GEMMA_TURN,
        needs=("torchvision", "timm"),
        sees=True,
        window=30,
        cuts=True,
    ),
    "gemma-4": Family(
        seeing.gemma4, (4, 2, 32), asks=seeing.GEMMA_TURN, needs=("torchvision",), sees=True, window=30, cuts=True
    ),
    "gemma-4-unified": Family(
        seeing.gemma4_unified, (4, 2, 32), encoder=None, asks=seeing.GEMMA_TURN, needs=("torchvision",), sees=True
    ),
}
