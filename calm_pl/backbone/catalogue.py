"""The models that ``conf/backbone/`` names, with their sizes, and the families that are known to work."""

from __future__ import annotations

from dataclasses import dataclass

# Tested: with the model's own weights, or with a small random-weight checkpoint of its family (tests/families/).
WEIGHTS, FAMILY = "weights", "family"
# bitsandbytes stores half a byte per weight and scales for blocks of 64.
FOUR_BIT_BYTES = 0.5 + 4 / 64
BF16_BYTES = 2


@dataclass(frozen=True)
class Known:
    """One model: decoder layers, heads per layer, head dimension, billions of weights (of the part that is loaded).

    ``heads`` of an encoder-decoder model counts self- and cross-attention. ``linear`` is the share of the weights that
    quantisation reaches: not embeddings, convolutions or stacked experts. Both numbers are ``exact`` where they were
    counted on a model built from its configuration; elsewhere they are about what the model's card says.
    """

    hub_id: str
    layers: int
    heads: int
    head_dim: int
    billions: float
    max_seconds: int | None = 30
    linear: float = 0.9
    tested: str = FAMILY
    sampling_rate: int = 16_000
    exact: bool = False

    @property
    def bf16_gb(self) -> float:
        """Gigabytes (1e9) of the weights in bfloat16."""
        return BF16_BYTES * self.billions

    @property
    def four_bit_gb(self) -> float:
        """The same with linear layers in four bits."""
        return self.billions * (self.linear * FOUR_BIT_BYTES + (1 - self.linear) * BF16_BYTES)


CATALOGUE = {
    "calm-tiny": Known("(in the package)", 6, 6, 64, 0.0174, max_seconds=5, linear=0.87, tested=WEIGHTS, exact=True),
    "whisper-tiny": Known("openai/whisper-tiny.en", 4, 12, 64, 0.038, linear=0.44, tested=WEIGHTS, exact=True),
    "whisper-large-v3": Known("openai/whisper-large-v3", 32, 40, 64, 1.543, linear=0.95, exact=True),
    "qwen2-audio": Known("Qwen/Qwen2-Audio-7B-Instruct", 32, 32, 128, 8.4),
    "qwen2.5-omni-7b": Known("Qwen/Qwen2.5-Omni-7B", 28, 28, 128, 8.9, max_seconds=300),
    "qwen2.5-omni-3b": Known("Qwen/Qwen2.5-Omni-3B", 36, 16, 128, 4.7, max_seconds=300),
    "qwen3-omni-30b": Known("Qwen/Qwen3-Omni-30B-A3B-Instruct", 48, 32, 128, 31.7, max_seconds=None, linear=0.08),
    "audio-flamingo-3": Known("nvidia/audio-flamingo-3-hf", 28, 28, 128, 8.3, max_seconds=600),
    "voxtral-mini": Known(
        "mistralai/Voxtral-Mini-3B-2507", 30, 32, 128, 4.676, max_seconds=None, linear=0.826, exact=True
    ),
    "gemma-3n": Known("google/gemma-3n-E2B-it", 30, 8, 256, 5.4, linear=0.4),
    "granite-speech": Known("ibm-granite/granite-speech-3.3-2b", 40, 32, 64, 3.0, max_seconds=None),
    "phi-4-multimodal": Known("microsoft/Phi-4-multimodal-instruct", 32, 24, 128, 5.6, max_seconds=None, linear=0.8),
}

# Families that pass the conformance test, and an example of each; those named above are examples of theirs.
FAMILIES = {
    "qwen2-audio": "Qwen/Qwen2-Audio-7B-Instruct",
    "qwen2.5-omni": "Qwen/Qwen2.5-Omni-7B",
    "qwen3-omni-moe": "Qwen/Qwen3-Omni-30B-A3B-Instruct",
    "qwen3-asr": "Qwen/Qwen3-ASR-1.7B-hf",
    "audio-flamingo-3": "nvidia/audio-flamingo-3-hf",
    "music-flamingo": "nvidia/music-flamingo-2601-hf",
    "voxtral": "mistralai/Voxtral-Mini-3B-2507",
    "gemma-3n": "google/gemma-3n-E2B-it",
    "gemma-4": "google/gemma-4-e2b-it",
    "gemma-4-unified": "google/gemma-4-12B-it",
    "granite-speech": "ibm-granite/granite-speech-3.3-2b",
    "granite-speech-plus": "ibm-granite/granite-speech-4.1-2b-plus",
    "phi-4-multimodal": "microsoft/Phi-4-multimodal-instruct",
    "glm-asr": "zai-org/GLM-ASR-Nano-2512",
    "fun-asr-nano": "FunAudioLLM/Fun-ASR-Nano-2512-hf",
    "moss-transcribe": "hf-audio/MOSS-Transcribe-Diarize-HF",
    "vibevoice-asr": "microsoft/VibeVoice-ASR-HF",
    "muse-spark": "meta-models/Muse-Spark-Open-816B-A42B",
    "inkling": "thinkingmachines/Inkling",
    "dots3-note": "dots-studio/dots3-note-prev",
    "nemotron-h-omni": "nvidia/Nemotron-3-Nano-Omni-30B-A3B-Reasoning-BF16",
    "nemotron-3.5-transcribe": "nvidia/NVIDIA-Nemotron-3.5-Transcribe-30B-A4B",
    "apertus-1.5": "swiss-ai/Apertus-v1.5-8B",
    "whisper": "openai/whisper-large-v3",
}
