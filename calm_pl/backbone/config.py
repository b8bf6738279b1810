"""From a checkpoint's config to the class of its model."""

from __future__ import annotations

import os
from importlib.util import find_spec

import transformers
from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from calm_pl.backbone.errors import BackboneError

_SPEAKS = "it speaks, and answers no question about what it hears"
_IN_STEP = "it writes in step with what it hears and takes no prompt"
_STATE_SPACE = "most layers of its decoder are state-space layers, which have no attention heads"
_TOO_LARGE = "it is too large to have been tried"
# Families of transformers that take audio, and why each cannot be a backbone.
UNSERVED = {
    "csm": _SPEAKS,
    "higgs_audio_v2": _SPEAKS,
    "dia": _SPEAKS,
    "vibevoice": _SPEAKS,
    "pocket_tts": _SPEAKS,
    "gradium_phonon_tts": _SPEAKS,
    "moshi": _IN_STEP,
    "kyutai_speech_to_text": _IN_STEP,
    "voxtral_realtime": _IN_STEP,
    "nemotron_h_omni": _STATE_SPACE,
    "nemo_speechlm": _STATE_SPACE,
    "dots3_note": _TOO_LARGE,
    "inkling_mm_model": _TOO_LARGE,
}


def load_config(checkpoint: os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config in a checkpoint's folder.

    Raises:
        BackboneError: transformers cannot read it.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(
            f"transformers {transformers.__version__} cannot read the config in {checkpoint}: {error}"
        ) from error
    return config


def model_class_of(config: PreTrainedConfig, name: str | os.PathLike[str]) -> type[PreTrainedModel]:
    """The class that the config names, provided it takes audio.

    Raises:
        BackboneError: it takes none, it cannot be asked about it, it needs a package that is missing, or transformers
            does not know it.
    """
    if reason := UNSERVED.get(config.model_type):
        raise BackboneError(f"{name} ({config.model_type}) cannot be a backbone: {reason}.")
    # Without peft, transformers would load Granite Speech and leave its adapter out.
    if getattr(config, "has_lora_adapter", False) and find_spec("peft") is None:
        raise BackboneError(f"{name} comes with a low-rank adapter, which needs peft: pip install peft.")
    # Omni models speak too. Only their thinker hears and answers in text; of the full checkpoint only it is loaded.
    thinker = getattr(config, "thinker_config", None)
    if thinker is not None:
        return MODEL_FOR_MULTIMODAL_LM_MAPPING[type(thinker)]  # type: ignore[return-value]
    for architecture in config.architectures or []:
        model_class = getattr(transformers, architecture, None)
        if model_class is None:
            continue
        if not model_class.can_generate():
            raise BackboneError(f"{name} is a {architecture}, which has no language model that could be asked.")
        if config.is_encoder_decoder and config.model_type != "whisper":
            raise BackboneError(
                f"{name} is a {architecture}, which transcribes and takes no prompt; of such models Whisper is served."
            )
        if "audio" in model_class.input_modalities:
            return model_class  # type: ignore[no-any-return]
        raise BackboneError(
            f"{name} is a {architecture}, which takes no audio (it takes {model_class.input_modalities}): choose an "
            "audio-language model, for example Qwen/Qwen2-Audio-7B-Instruct."
        )
    raise BackboneError(
        f"{name} names no model class that transformers {transformers.__version__} knows "
        f"(architectures={config.architectures}): upgrade transformers, or choose another model."
    )
