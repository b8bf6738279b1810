"""Every model of the installed transformers that takes sound and text is served, or refused with a reason."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers.models.auto import modeling_auto, processing_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from calm_pl.backbone.config import UNSERVED, model_class_of, takes_audio
from calm_pl.backbone.errors import BackboneError
from tests.families import FAMILIES

# The newest transformers whose models were gone through. Those of a newer one are listed, and fail nothing.
GONE_THROUGH = (5, 24)
SERVED = {family.model_type for family in FAMILIES.values() if family.model_type in CONFIG_MAPPING}
SOUND = re.compile("audio|speech|sound|input_features|input_values")
# Classes that take text alone, of families whose other classes, or whose processor, take sound.
TEXT_HALVES = {
    "DiffusionGemmaForBlockDiffusion",
    "Dots3NoteForCausalLM",
    "Gemma3nForCausalLM",
    "Gemma4ForCausalLM",
    "Gemma4UnifiedForCausalLM",
    "SeamlessM4TForTextToSpeech",
    "SeamlessM4TForTextToText",
    "SpeechT5ForTextToSpeech",
    "WhisperForCausalLM",
}


def hearing_models() -> Iterator[tuple[str, str]]:
    """Model type and class of every model that generates and has to do with sound."""
    maps = [names for mapping, names in vars(modeling_auto).items() if re.fullmatch("MODEL_.*MAPPING_NAMES", mapping)]
    found = {
        (model_type, name)
        for names in maps
        for model_type, listed in names.items()
        for name in ([listed] if isinstance(listed, str) else listed)
    }
    for model_type, name in sorted(found):
        model_class = getattr(transformers, name, None) if _mentions_sound(model_type) else None
        if model_class is not None and model_class.can_generate() and _hears(model_type, model_class):
            yield model_type, name


def _mentions_sound(model_type: str) -> bool:
    """By the text of its source: importing every model of transformers would take long."""
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
    return any(SOUND.search(file.read_text(encoding="utf-8")) for file in folder.glob("modeling_*.py"))


def _hears(model_type: str, model_class: type[transformers.PreTrainedModel]) -> bool:
    """By its arguments, its config, its processor, or what it says of itself; each of them leaves some models out."""
    parts = _parts_of_processor(model_type)
    return (
        takes_audio(model_class)
        or any(SOUND.search(part) for part in getattr(model_class.config_class, "sub_configs", {}))
        or bool({"feature_extractor", "audio_processor", "audio_token"} & parts)
        or "audio" in model_class.input_modalities
    )


def _parts_of_processor(model_type: str) -> set[str]:
    name = processing_auto.PROCESSOR_MAPPING_NAMES.get(model_type) or ""
    try:
        processor = getattr(transformers, name, None)
    except ModuleNotFoundError:  # it needs a package that is not there
        return set()
    return {*inspect.signature(processor.__init__).parameters} if processor else set()


def test_every_hearing_model_is_served_or_refused_with_a_reason():
    found = set(hearing_models())
    assert {model_type for model_type, _ in found} >= SERVED  # the walk does see them
    unknown = []
    for model_type, name in sorted(found):
        if model_type.removesuffix("_thinker") in SERVED and name not in TEXT_HALVES:
            continue
        try:
            model_class_of(CONFIG_MAPPING[model_type](architectures=[name]), "some/model")
        except BackboneError as refusal:
            assert ("takes no audio" in str(refusal)) == (name in TEXT_HALVES), f"{name}: {refusal}"
        else:
            unknown.append(f"{name} ({model_type})")
    told = f"to be served, or refused with a reason: {', '.join(unknown)}"
    if unknown and Version(transformers.__version__).release[:2] > GONE_THROUGH:
        pytest.xfail(f"transformers {transformers.__version__} is newer than these tests; {told}")
    assert not unknown, told


def test_no_family_is_both_served_and_refused():
    assert not SERVED & set(UNSERVED)
