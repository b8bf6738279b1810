"""Options of a backbone beyond which heads: pooling, long clips, fewer bits, adapters; and asking it in words."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from transformers import GraniteSpeechConfig

from calm_pl.backbone import config, placement
from calm_pl.backbone.answers import (
    generate_answers,
    label_log_likelihoods,
    leading_letter,
    letter_log_likelihoods,
    named_labels,
)
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip
from tests.conftest import tone
from tests.test_wrong_weights import lora


@pytest.fixture(scope="module")
def lalm(tiny_lalm: str) -> FrozenLALM:
    return FrozenLALM.from_pretrained(tiny_lalm)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("sounds")
    return [Clip(str(tone(folder / f"{s}.wav", 700, s)), question="Why? " * (1 + int(s))) for s in (0.6, 1.7, 3.1)]


def states(lalm: FrozenLALM, clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    """By hand: the first layer's concatenated heads at every token (T, E), and the token ids (T)."""
    inputs, seen = lalm.processor([clip], [lalm.processor.load(clip)]), []
    handle = lalm.sites[0].projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with lalm.window(inputs):
        lalm.model(**inputs.model_inputs)
    handle.remove()
    return seen[0][0], inputs.model_inputs["input_ids"][0]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["last:1", "last:5", "audio"])
def test_pooling_is_the_mean_over_its_tokens(tiny_lalm, lalm, clips, pooling, padding_side):
    pooled = FrozenLALM.from_pretrained(tiny_lalm, pooling=pooling, padding_side=padding_side)
    heads_NKD = pooled.head_outputs(clips, batch_size=3)
    for clip, heads_KD in zip(clips, heads_NKD, strict=True):
        x_TE, ids_T = states(lalm, clip)
        tokens = ids_T == lalm.processor.audio_token_id if pooling == "audio" else slice(-int(pooling[-1]), None)
        torch.testing.assert_close(heads_KD[:4], x_TE[tokens].mean(0).view(4, 16), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pooling", ["first", "last:0", "last:"])
def test_unknown_pooling_names_the_known_before_anything_is_loaded(pooling):
    for load in (Backbone, FrozenLALM.from_pretrained):
        with pytest.raises(BackboneError, match=r"choose last, last:N .* or audio"):
            load("nowhere", pooling=pooling)


def test_long_clips_are_cut_and_counted(lalm, clips, tmp_path):
    long = Clip(str(tone(tmp_path / "long.wav", 700, 12)))  # the window is 5 s
    with pytest.warns(UserWarning, match=r"1 of 2 clips are longer than the model's window of 5 s"):
        cut = lalm.head_outputs([long, clips[0]])
    beginning = Clip(long.audio, end=5)
    torch.testing.assert_close(cut[:1], lalm.head_outputs([beginning]), atol=1e-4, rtol=0)


def test_long_clips_are_split_and_averaged(tiny_lalm, lalm, clips, tmp_path):
    split = FrozenLALM.from_pretrained(tiny_lalm, long_clips="split")
    long = str(tone(tmp_path / "long.wav", 700, 12))
    heads_NKD = split.head_outputs([Clip(long), *clips], batch_size=4)
    pieces = lalm.head_outputs([Clip(long, start=0, end=4), Clip(long, start=4, end=8), Clip(long, start=8, end=12)])
    torch.testing.assert_close(heads_NKD[0], pieces.mean(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(heads_NKD[1:], lalm.head_outputs(clips), atol=1e-4, rtol=0)
    with pytest.raises(BackboneError, match="choose cut or split"):
        FrozenLALM.from_pretrained(tiny_lalm, long_clips="drop")


def test_each_option_has_its_own_store(tiny_lalm):
    changed = [{"pooling": "audio"}, {"pooling": "last:5"}, {"long_clips": "split"}, {"quantization": "4bit"}, {}]
    keys = [Backbone(tiny_lalm, **options).store_key() for options in changed]
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])
    assert Backbone(tiny_lalm, device_map="auto").store_key() == Backbone(tiny_lalm).store_key()
    assert keys[-1]["pooling"] == "last_token"  # as the first stores had it


def test_a_device_map_changes_nothing(tiny_lalm, clips):
    """Layers that wait on the disk until they run, as those of another GPU would be moved to: by accelerate's hooks."""
    pytest.importorskip("accelerate")
    places = {"audio_tower": "cpu", "multi_modal_projector": "cpu", "language_model": "disk"}
    asked = {**{f"model.{part}": place for part, place in places.items()}, "lm_head": "disk"}
    mapped = FrozenLALM.from_pretrained(tiny_lalm, heads="both", device_map=asked)
    assert mapped.model.hf_device_map == asked
    kept = {site.part: site.projection.weight.device.type for site in mapped.sites}
    assert kept == {"decoder": "meta", "encoder": "cpu"}  # meta: not in memory
    plain = FrozenLALM.from_pretrained(tiny_lalm, heads="both")
    torch.testing.assert_close(mapped.head_outputs(clips), plain.head_outputs(clips), atol=1e-5, rtol=0)


# The shipped model is small, and rounding tells in it.
@pytest.mark.parametrize(("quantization", "cosine"), [("4bit", 0.6), ("8bit", 0.95)])
def test_quantised_heads_are_close_or_the_missing_package_is_named(clips, quantization, cosine):
    if find_spec("bitsandbytes") is None or find_spec("accelerate") is None:
        with pytest.raises(BackboneError, match=r"needs the package (bitsandbytes|accelerate): pip install"):
            FrozenLALM.from_pretrained("calm-tiny", quantization=quantization)
        return
    small = FrozenLALM.from_pretrained("calm-tiny", quantization=quantization)
    full = FrozenLALM.from_pretrained("calm-tiny")
    assert small.model.get_memory_footprint() < 0.7 * full.model.get_memory_footprint()
    assert torch.cosine_similarity(small.head_outputs(clips), full.head_outputs(clips), dim=-1).median() > cosine


def test_an_adapter_changes_the_heads_and_the_store(tiny_lalm, lalm, clips, tmp_path):
    backbone = Backbone(tiny_lalm, adapter=str(lora(tiny_lalm, tmp_path / "lora")))
    adapted = backbone.load()
    assert adapted.head_names == lalm.head_names
    assert (adapted.head_outputs(clips) - lalm.head_outputs(clips)).abs().max() > 1e-3
    assert not any(weight.requires_grad for weight in adapted.model.parameters())
    assert backbone.store_key() != Backbone(tiny_lalm).store_key()
    with pytest.raises(BackboneError, match="no adapter_config.json"):
        Backbone(tiny_lalm, adapter=str(tmp_path)).load()


def test_without_peft_an_adapter_is_refused_and_the_package_named(tiny_lalm, tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="adapter needs the package peft: pip install peft"):
        FrozenLALM.from_pretrained(tiny_lalm, adapter=str(tmp_path))
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="some/granite comes with a low-rank adapter, which needs peft"):
        config.model_class_of(GraniteSpeechConfig(has_lora_adapter=True), "some/granite")


# Asked in words


def test_letters_are_likelihoods_of_single_tokens(lalm, clips):
    inputs = lalm.processor(clips, [lalm.processor.load(clip) for clip in clips])
    scores_BC = letter_log_likelihoods(lalm, inputs, 3)
    with lalm.window(inputs), torch.inference_mode():
        log_p_BV = lalm.model(**inputs.model_inputs).logits[:, -1].log_softmax(-1)
    letters = lalm.processor.tokenizer(["A", "B", "C"]).input_ids
    torch.testing.assert_close(scores_BC, log_p_BV[:, [row[0] for row in letters]], atol=1e-4, rtol=0)


def test_generation_is_greedy_and_the_same_in_a_batch(tiny_lalm, lalm, clips):
    waveforms = [lalm.processor.load(clip) for clip in clips]
    together = generate_answers(lalm, lalm.processor(clips, waveforms), max_new_tokens=4)
    alone = [generate_answers(lalm, lalm.processor([c], [x]), 4)[0] for c, x in zip(clips, waveforms, strict=True)]
    assert together == alone and all(isinstance(answer, str) for answer in together)
    inputs = lalm.processor(clips[:1], waveforms[:1])
    with lalm.window(inputs), torch.inference_mode():
        first = lalm.model(**inputs.model_inputs).logits[0, -1].argmax()
    assert alone[0].startswith(lalm.processor.tokenizer.decode(first, skip_special_tokens=True))
    right = FrozenLALM.from_pretrained(tiny_lalm, padding_side="right")
    with pytest.raises(BackboneError, match="padding_side=left"):
        generate_answers(right, right.processor(clips, waveforms))
    with pytest.raises(BackboneError, match="padding_side=left"):  # between a prompt and a label lies padding
        label_log_likelihoods(right, right.processor(clips, waveforms), ["dog", "rain"])


def test_a_label_without_text_is_named(lalm, clips):
    inputs = lalm.processor(clips[:1], [lalm.processor.load(clips[0])])
    with pytest.raises(ValueError, match="the label '' has no text"):
        label_log_likelihoods(lalm, inputs, ["dog", ""])


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ("Dog bark", [0]),
        ("  dog_bark. ", [0]),
        ("The sound is a sea wave!", [1]),
        ("It is a dog barking", []),  # "dog bark" is no word of it
        ("rain on a roof", [3, 2]),  # the longer label wins
        ("rain, then a sea wave", [2, 1]),  # in the answer's order
        ("", []),
    ],
)
def test_answers_are_matched_to_labels(answer, labels):
    assert named_labels(answer, ["dog bark", "sea_wave", "rain", "rain on a roof"]) == labels


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", 1), ("B.", 1), ("C. Rain", 2), ("(b) rain", 1), ("A) rain", 0), ("A dog barks", None), ("rain", None)],
)
def test_letters_are_read_off_answers(answer, letter):
    assert leading_letter(answer) == letter
