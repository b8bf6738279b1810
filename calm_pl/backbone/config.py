"""From a checkpoint's config to the class of its model."""

from __future__ import annotations

import inspect
import os
from importlib.util import find_spec

import transformers
from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from calm_pl.backbone.errors import BackboneError

_SPEAKS = "it speaks, and answers no question about what it hears"
_MAKES_MUSIC = "it makes music, and answers no question about what it hears"
_IN_STEP = "it writes in step with what it hears and takes no prompt"
# Families of transformers that take audio, and why each cannot be a backbone.
UNSERVED = {
    "csm": _SPEAKS,
    "higgs_audio_v2": _SPEAKS,
    "dia": _SPEAKS,
    "vibevoice": _SPEAKS,
    "pocket_tts": _SPEAKS,
    "gradium_phonon_tts": _SPEAKS,
    "clvp": _SPEAKS,
    "musicgen": _MAKES_MUSIC,
    "musicgen_melody": _MAKES_MUSIC,
    "pop2piano": _MAKES_MUSIC,
    "moshi": _IN_STEP,
    "kyutai_speech_to_text": _IN_STEP,
    "voxtral_realtime": _IN_STEP,
    "omniasr": "it transcribes; its prompt is a language and holds no question",
}
# Sound reaches a model under one of these names, or one that has "audio" in it. What a class says of its modalities is
# no help: Muse Spark leaves audio out, and the text halves of Gemma name it.
AUDIO_ARGUMENTS = ("input_features", "input_values")


def load_config(
    checkpoint: os.PathLike[str], trust_remote_code: bool = False, name: str | os.PathLike[str] | None = None
) -> PreTrainedConfig:
    """The config in a checkpoint's folder.

    Args:
        checkpoint: the folder.
        trust_remote_code: run the Python code that comes with it.
        name: what the user calls it.

    Raises:
        BackboneError: transformers cannot read it, or needs the checkpoint's own code, which is not trusted.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        if not trust_remote_code and _brings_code(checkpoint):
            raise untrusted(name or checkpoint) from error
        raise BackboneError(
            f"transformers {transformers.__version__} cannot read the config in {checkpoint}: {error}"
        ) from error
    return config


def model_class_of(
    config: PreTrainedConfig,
    name: str | os.PathLike[str],
    checkpoint: os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> type[PreTrainedModel]:
    """The class that the config names, provided it takes audio and text.

    Args:
        config: the checkpoint's config.
        name: what the user calls the checkpoint.
        checkpoint: its folder, where its own code lies.
        trust_remote_code: use the class that its own code brings, if any.

    Raises:
        BackboneError: it takes no audio, it cannot be asked about it, it needs a package that is missing or code that
            is not trusted, or transformers does not know it.
    """
    if reason := UNSERVED.get(config.model_type):
        raise BackboneError(f"{name} ({config.model_type}) cannot be a backbone: {reason}.")
    # Without peft, transformers would load Granite Speech and leave its adapter out.
    if getattr(config, "has_lora_adapter", False) and find_spec("peft") is None:
        raise BackboneError(f"{name} comes with a low-rank adapter, which needs peft: pip install peft.")
    model_class = _class_it_brings(config, name, checkpoint) if trust_remote_code else None
    if model_class is None:
        # Omni models speak too. Only their thinker hears and answers in text; of the full checkpoint only it is loaded.
        thinker = getattr(config, "thinker_config", None)
        if thinker is not None:
            return MODEL_FOR_MULTIMODAL_LM_MAPPING[type(thinker)]  # type: ignore[return-value]
        known = (getattr(transformers, architecture, None) for architecture in config.architectures or [])
        model_class = next((found for found in known if found is not None), None)
    if model_class is None and not trust_remote_code and getattr(config, "auto_map", None):
        raise untrusted(name)
    if model_class is None:
        raise BackboneError(
            f"{name} names no model class that transformers {transformers.__version__} knows "
            f"(architectures={config.architectures}): upgrade transformers, or choose another model."
        )
    _must_hear_and_read(model_class, config, name)
    return model_class


def takes_audio(model_class: type[PreTrainedModel]) -> bool:
    """Whether sound can be passed to the model."""
    arguments = inspect.signature(model_class.forward).parameters
    return any(argument in AUDIO_ARGUMENTS or "audio" in argument for argument in arguments)


def _must_hear_and_read(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, name: str | os.PathLike[str]
) -> None:
    what = f"{name} is a {model_class.__name__}"
    # CTC models generate too, but take sound alone.
    reads = "input_ids" in inspect.signature(model_class.forward).parameters
    if not model_class.can_generate() or not (reads or config.is_encoder_decoder):
        raise BackboneError(f"{what}, which has no language model that could be asked.")
    deaf = "audio_config" in type(config).sub_configs and config.audio_config is None
    if deaf or not takes_audio(model_class):
        raise BackboneError(
            f"{what}, which takes no audio{' in this size' if deaf else ''}: choose an audio-language model, for "
            "example Qwen/Qwen2-Audio-7B-Instruct."
        )
    if config.is_encoder_decoder and config.model_type != "whisper":
        raise BackboneError(f"{what}, which transcribes and takes no prompt; of such models Whisper is served.")


def _class_it_brings(
    config: PreTrainedConfig, name: str | os.PathLike[str], checkpoint: os.PathLike[str] | None
) -> type[PreTrainedModel] | None:
    """The model class of the checkpoint's own code; None where it brings none."""
    classes = {auto: found for auto, found in (getattr(config, "auto_map", None) or {}).items() if "AutoModel" in auto}
    # The class that the config calls its architecture; AutoModel alone would be the model without its language head.
    named = [found for found in classes.values() if found.rpartition(".")[2] in (config.architectures or [])]
    chosen = next(iter([*named, *(found for auto, found in classes.items() if auto != "AutoModel")]), None)
    if chosen is None or checkpoint is None:
        return None
    try:
        return get_class_from_dynamic_module(chosen, checkpoint)
    except (OSError, ImportError, AttributeError) as error:
        raise BackboneError(f"{name} brings its own class {chosen}, which cannot be loaded: {error}") from error


def _brings_code(checkpoint: os.PathLike[str]) -> bool:
    try:
        return "auto_map" in PreTrainedConfig.get_config_dict(checkpoint)[0]
    except (OSError, ValueError):
        return False


def untrusted(name: str | os.PathLike[str]) -> BackboneError:
    """The error of a checkpoint that cannot be loaded without running its own code."""
    return BackboneError(
        f"{name} comes with Python code of its own, for what transformers {transformers.__version__} does not "
        "know, and such code is run only where it is trusted: read it, then set "
        "--data.backbone.trust_remote_code true."
    )
