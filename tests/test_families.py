"""Every family of audio-language models meets one contract; checkpoints are small, random, and loaded from disk."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
import transformers

from calm_pl.backbone.answers import generate_answers, label_log_likelihoods
from calm_pl.backbone.config import UNSERVED, model_class_of
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.inspection import inspect_checkpoint
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.spec import Backbone
from calm_pl.backbone.structure import find_head_sites
from calm_pl.clip import Clip
from examples.audiovisual import FILM_RATE, write_film
from tests.conftest import RATE
from tests.families import FAMILIES, Family
from tests.families.base import NEMOTRON_TEXT

# Head outputs of these checkpoints have a magnitude of about 1; some reach 20.
CLOSE = {"atol": 5e-4, "rtol": 0}


class Built(NamedTuple):
    family: Family
    folder: Path
    lalm: FrozenLALM  # every head


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    family = FAMILIES[request.param]
    for package in family.needs:
        if find_spec(package) is None:
            pytest.skip(f"{request.param} needs {package}")
    if family.model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"{request.param} needs a transformers newer than {transformers.__version__}")
    folder = tmp_path_factory.mktemp(request.param)
    family.write(folder)
    return Built(family, folder, FrozenLALM.from_pretrained(folder, heads=family.heads))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Noise of three lengths, two clips of one length, and questions of different lengths."""
    folder, random = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    clips = []
    for number, seconds in enumerate((0.3, 0.71, 1.3, 1.3)):
        file = folder / f"{number}.wav"
        soundfile.write(file, random.normal(0, 0.2, round(seconds * RATE)), RATE)
        clips.append(Clip(str(file), question="Why? " * (number + 1)))
    return clips


def test_attention_blocks_are_found(built):
    layers, heads, width = built.family.decoder
    lalm = built.lalm
    decoder = [site for site in lalm.sites if site.part == "decoder"]
    encoder = [site for site in lalm.sites if site.part == "encoder"]
    assert (lalm.num_layers, lalm.heads_per_layer) == (layers, heads)
    assert max(site.head_dim for site in decoder) == width
    found = (len(encoder), encoder[0].num_heads, encoder[0].head_dim) if encoder else None
    assert found == built.family.encoder
    assert json.loads((built.folder / "config.json").read_text())["model_type"] == built.family.model_type
    assert len(set(lalm.head_names)) == lalm.num_heads == layers * heads + (2 * 2 if encoder else 0)


def test_inspecting_finds_what_loading_finds(built):
    found = inspect_checkpoint(str(built.folder))
    layers, heads, width = built.family.decoder
    per_layer = heads if built.family.asked else f"{heads // 2} + {heads // 2}"  # self- and cross-attention
    assert found.decoder == f"{layers} layers x {per_layer} heads x {width} = {layers * heads} heads"
    assert found.encoder.startswith("2 layers x 2 heads" if built.family.encoder else "none (")
    assert found.max_seconds == built.lalm.processor.max_seconds and built.family.asks in found.prompt


def test_hooks_see_what_a_plain_forward_sees(built, clips):
    lalm, (first, second) = built.lalm, built.lalm.sites[:2]
    inputs = lalm.processor(clips[:1], [lalm.processor.load(clips[0])])
    seen = []
    attention = lalm.model.get_submodule(built.family.second)
    projection = attention.o_proj if built.family.asked else attention.out_proj
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with lalm.window(inputs), torch.inference_mode():
        lalm.model(**inputs.model_inputs)
    handle.remove()
    by_hand_HD = seen[0][0, -1].view(second.num_heads, -1)
    ours_HD = lalm.head_outputs(clips[:1])[0, first.num_heads :][: second.num_heads, : by_hand_HD.shape[1]]
    torch.testing.assert_close(ours_HD, by_hand_HD, **CLOSE)
    assert not any(module._forward_pre_hooks for module in lalm.model.modules())


def test_a_batch_gives_what_single_clips_give(built, clips):
    alone = built.lalm.head_outputs(clips, batch_size=1)
    torch.testing.assert_close(built.lalm.head_outputs(clips, batch_size=4), alone, **CLOSE)
    right = FrozenLALM.from_pretrained(built.folder, heads=built.family.heads, padding_side="right")
    torch.testing.assert_close(right.head_outputs(clips, batch_size=4), alone, **CLOSE)


def test_a_cut_window_and_an_early_exit_change_nothing(built, clips):
    layers = sorted({site.layer for site in built.lalm.sites if site.part == "decoder"})
    quick = FrozenLALM.from_pretrained(built.folder, heads=built.family.heads, layers=layers[:2])
    full = FrozenLALM.from_pretrained(built.folder, heads=built.family.heads, cut_window=False).head_outputs(clips[:2])
    later = tuple(f"decoder.{layer}" for layer in layers[2:])
    kept = [k for k, name in enumerate(built.lalm.head_names) if not name.startswith(later)]
    torch.testing.assert_close(quick.head_outputs(clips[:2]), full[:, kept], **CLOSE)
    inputs = quick.processor(clips[:1], [quick.processor.load(clips[0])])
    if quick.processor.cut_window:
        assert inputs.max_frames < 100  # 0.3 s of 2 s


@pytest.fixture
def long_clips(built, tmp_path) -> list[Clip]:
    """Two clips of two and a half windows that differ behind the second, and a short one."""
    window, random = round(built.family.window * RATE), np.random.default_rng(0)
    wave_S = random.normal(0, 0.2, 5 * window // 2)
    other_S = np.concatenate([wave_S[: 2 * window], 0.01 * wave_S[: window // 2]])
    clips = []
    for name, x_S in (("long", wave_S), ("other", other_S), ("short", wave_S[: RATE // 2])):
        soundfile.write(tmp_path / f"{name}.wav", x_S, RATE)
        clips.append(Clip(str(tmp_path / f"{name}.wav"), question="Why? " if name == "short" else "What?"))
    return clips


def test_long_clips_are_heard_whole_or_reported_as_cut(built, long_clips):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        alone = built.lalm.head_outputs(long_clips, batch_size=1)
        torch.testing.assert_close(built.lalm.head_outputs(long_clips, batch_size=3), alone, **CLOSE)
        if built.lalm.processor.cut_window:
            full = FrozenLALM.from_pretrained(built.folder, heads=built.family.heads, cut_window=False)
            torch.testing.assert_close(full.head_outputs(long_clips, batch_size=3), alone, **CLOSE)
    reported = f"2 of 3 clips are longer than the model's window of {built.family.window:g} s"
    assert any(reported in str(warning.message) for warning in told) == built.family.cuts
    assert ((alone[0] - alone[1]).abs().max() > 0.001) == (not built.family.cuts)


def test_very_short_clips_are_heard(built, clips, tmp_path):
    wave_S, rate = soundfile.read(clips[2].audio)
    short = []
    for milliseconds in (10, 10, 20, 30):
        file = tmp_path / f"{len(short)}.wav"
        soundfile.write(file, wave_S[len(short) :][: milliseconds * rate // 1000], rate)
        short.append(Clip(str(file)))
    alone = built.lalm.head_outputs(short, batch_size=1)
    assert torch.isfinite(alone).all()
    torch.testing.assert_close(built.lalm.head_outputs(short, batch_size=4), alone, **CLOSE)


def test_bfloat16_is_close(built, clips):
    half = FrozenLALM.from_pretrained(built.folder, heads=built.family.heads, dtype="bfloat16")
    cosine_NK = torch.cosine_similarity(half.head_outputs(clips), built.lalm.head_outputs(clips), dim=-1)
    assert cosine_NK.median() > 0.999  # the median: a mixture of experts may send a token elsewhere


def test_sound_that_becomes_codes_is_not_rounded(clips, tmp_path):
    if not hasattr(transformers, "Apertus1p5Config"):
        pytest.skip("Apertus 1.5 came with transformers 5.24")
    FAMILIES["apertus-1.5"].write(tmp_path)
    lalm = FrozenLALM.from_pretrained(tmp_path, dtype="bfloat16")
    inputs = lalm.processor(clips[2:], [lalm.processor.load(clip) for clip in clips[2:]])
    moved = inputs.to("cpu", torch.bfloat16).model_inputs
    assert torch.equal(moved["input_values"], inputs.model_inputs["input_values"])
    codes = torch.cat(lalm.model.model.get_audio_tokens(moved["input_values"], moved["padding_mask"]))
    assert codes.unique().numel() > 2  # it does hear


def test_the_audio_changes_the_heads(built, clips, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(round(1.3 * RATE)), RATE)
    silence = Clip(str(tmp_path / "silence.wav"), question=clips[3].question)
    other = Clip(clips[2].audio, question=clips[3].question)
    noise, quiet, noise_too = built.lalm.head_outputs([clips[3], silence, other])
    assert (noise - quiet).abs().amax(-1).median() > 0.01
    assert (noise - noise_too).abs().max() > 0.01


def test_the_question_is_asked_in_the_familys_own_template(built, clips):
    if not built.family.asked:
        starts = built.lalm.processor.tokenizer.convert_ids_to_tokens(built.lalm.processor.start_tokens)
        assert starts == ["<|startoftranscript|>", "<|notimestamps|>"]
        return
    text = built.lalm.processor.text(clips[0])
    assert built.family.asks in text and "Why?  Answer with the class name." in text
    assert text.index(built.lalm.processor.audio_token) < text.index("Why?")


def test_label_likelihoods_are_those_of_a_whole_forward(built, clips):
    if not built.family.asked:
        with pytest.raises(BackboneError, match="answers no questions"):
            likelihoods_equal_a_whole_forward(built.lalm, clips[:2])
        return
    likelihoods_equal_a_whole_forward(built.lalm, clips[:2])


def likelihoods_equal_a_whole_forward(lalm: FrozenLALM, clips: list[Clip]) -> None:
    labels, media = ["dog bark", "x"], [lalm.processor.load(clip) for clip in clips]
    scores_BC = label_log_likelihoods(lalm, lalm.processor(clips, media), labels)
    inputs = lalm.processor(clips[:1], media[:1]).model_inputs
    answer = torch.tensor([lalm.processor.tokenizer(labels[0], add_special_tokens=False).input_ids])
    longer = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        longer[name] = torch.zeros_like(answer)
    whole = {name: torch.cat([x, longer[name]], 1) if name in longer else x for name, x in inputs.items()}
    with lalm.window(lalm.processor(clips[:1], media[:1])), torch.inference_mode():
        log_p_TV = lalm.model(**whole).logits[0].float().log_softmax(-1)
    count = answer.shape[1]
    expected = log_p_TV[-count - 1 : -1].gather(1, answer[0, :, None]).mean()
    torch.testing.assert_close(scores_BC[0, 0], expected, **CLOSE)


def test_generation_is_the_same_in_a_batch(built, clips):
    waveforms = [built.lalm.processor.load(clip) for clip in clips]
    if not built.family.asked:
        with pytest.raises(BackboneError, match="answers no questions"):
            generate_answers(built.lalm, built.lalm.processor(clips, waveforms))
        return
    together = generate_answers(built.lalm, built.lalm.processor(clips, waveforms), max_new_tokens=3)
    last = built.lalm.processor(clips[3:], waveforms[3:])
    assert len(together) == 4 and generate_answers(built.lalm, last, max_new_tokens=3) == together[3:]


# Pictures


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Two films that differ in their pictures alone, and a shorter and smaller one."""
    folder, random = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    films = []
    for number, (seconds, side) in enumerate(((0.8, 64), (0.8, 64), (0.4, 56))):
        frames_FHW3 = random.integers(0, 256, (round(seconds * FILM_RATE), side, side, 3), dtype=np.uint8)
        wave_S = np.random.default_rng(0).normal(0, 0.2, round(seconds * RATE))
        film = write_film(folder / f"{number}.mp4", frames_FHW3, wave_S)
        films.append(Clip(str(film), question="Why? " * (1 + number // 2)))
    return films


@pytest.mark.parametrize("modality", ["video", "audiovisual"])
def test_pictures_are_seen_where_the_family_sees(built, films, clips, modality):
    if not built.family.sees:
        with pytest.raises(BackboneError, match="takes no pictures: set modality to audio"):
            FrozenLALM.from_pretrained(built.folder, modality=modality)
        return
    lalm = FrozenLALM.from_pretrained(built.folder, modality=modality)
    heads_NKD = lalm.head_outputs(films, batch_size=1)
    right = FrozenLALM.from_pretrained(built.folder, modality=modality, padding_side="right")
    torch.testing.assert_close(right.head_outputs(films, batch_size=3), heads_NKD, **CLOSE)
    assert (heads_NKD[0] - heads_NKD[1]).abs().max() > 0.01  # other pictures
    (dubbed_KD,) = lalm.head_outputs([replace(films[0], audio=clips[3].audio, end=0.8, video=films[0].audio)])
    assert ((dubbed_KD - heads_NKD[0]).abs().max() > 0.01) == (modality == "audiovisual")  # another sound
    likelihoods_equal_a_whole_forward(lalm, films[1:])


# Long clips


@pytest.mark.parametrize("name", ["audio-flamingo-3", "glm-asr", "moss-transcribe"])
def test_encoder_heads_of_windows_are_averaged_over_the_clip(name, tmp_path):
    """A clip of three windows gives what its windows give alone, each by its share."""
    FAMILIES[name].write(tmp_path)
    lalm = FrozenLALM.from_pretrained(tmp_path, heads="encoder")
    file = tmp_path / "long.wav"
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.2, 5 * RATE), RATE)
    windows = [Clip(str(file), start=start, end=start + 2) for start in (0.0, 2.0)] + [Clip(str(file), start=4.0)]
    whole, first, second, third = lalm.head_outputs([Clip(str(file)), *windows])
    torch.testing.assert_close(whole, (2 * first + 2 * second + third) / 5, **CLOSE)


def test_encoder_heads_of_an_unfolded_clip_leave_its_padding_out(tmp_path):
    if find_spec("torchvision") is None:
        pytest.skip("Phi-4 needs torchvision")
    FAMILIES["phi-4-multimodal"].write(tmp_path)
    lalm = FrozenLALM.from_pretrained(tmp_path, heads="encoder")
    file = tmp_path / "long.wav"
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.2, 45 * RATE), RATE)
    seen = []
    handle = lalm.sites[0].projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    (heads_KD,) = lalm.head_outputs([Clip(str(file))])
    handle.remove()
    (x_RTE,) = seen
    frames = -(-((45 * RATE - 400) // 160 + 1) // 8)  # of 25 ms every 10 ms, of which eight are one position
    assert x_RTE.shape[:2] == (2, 500) and frames < 1000
    torch.testing.assert_close(heads_KD[:2], x_RTE.reshape(1000, 2, -1)[:frames].mean(0), **CLOSE)


def test_a_clip_beyond_the_processors_last_whole_window_is_cut_there(tmp_path):
    FAMILIES["glm-asr"].write(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps(config | {"max_audio_len": 5}))
    processor = FrozenLALM.from_pretrained(tmp_path).processor
    soundfile.write(tmp_path / "long.wav", np.zeros(5 * RATE), RATE)
    clip = Clip(str(tmp_path / "long.wav"))
    with pytest.warns(UserWarning, match="window of 4 s"):
        assert processor.warn_of_cut_clips([clip]) == [0]
    (medium,) = processor.load(clip)
    assert len(medium.waveform_S) == 4 * RATE


# What cannot be served says so


def test_a_checkpoint_without_a_chat_template_cannot_be_asked(tmp_path):
    FAMILIES["audio-flamingo-3"].write(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(BackboneError, match=r"has no chat template: add its chat_template.jinja"):
        FrozenLALM.from_pretrained(tmp_path)


def test_a_template_without_a_place_for_audio_is_named(tiny_lalm, tmp_path, clips):
    folder = Path(shutil.copytree(tiny_lalm, tmp_path / "deaf"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}: hello{% endfor %}")
    with pytest.raises(BackboneError, match=r"chat template of .*/deaf writes no '<\|AUDIO\|>' for what is heard"):
        FrozenLALM.from_pretrained(folder).head_outputs(clips[:1])


def test_a_template_that_refuses_every_form_is_named_with_its_reason(tiny_lalm, tmp_path):
    folder = Path(shutil.copytree(tiny_lalm, tmp_path / "strict"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('system turn first') }}")
    with pytest.raises(BackboneError, match=r"chat template of .*/strict writes no .*\(system turn first\)"):
        inspect_checkpoint(str(folder))


def test_a_decoder_without_attention_has_no_heads(tmp_path):
    model = transformers.CsmForConditionalGeneration
    with torch.device("meta"), pytest.raises(BackboneError, match="no attention heads that can be read"):
        find_head_sites(model(transformers.CsmConfig()), "decoder")


@pytest.mark.parametrize("model_type", [name for name in UNSERVED if name in transformers.CONFIG_MAPPING])
def test_families_that_cannot_be_served_say_why(model_type):
    config = transformers.CONFIG_MAPPING[model_type]()
    with pytest.raises(
        BackboneError, match=rf"some/model \({model_type}\) cannot be a backbone: .*{UNSERVED[model_type]}"
    ):
        model_class_of(config, "some/model")


@pytest.mark.parametrize(
    ("model_type", "architecture", "reason"),
    [
        ("wav2vec2", "Wav2Vec2ForCTC", "has no language model that could be asked"),
        ("parakeet_ctc", "ParakeetForCTC", "has no language model that could be asked"),
        ("lasr_ctc", "LasrForCTC", "has no language model that could be asked"),
        ("granite_speech5_ctc", "GraniteSpeech5ForCTC", "has no language model that could be asked"),
        ("parakeet_tdt", "ParakeetForTDT", "transcribes and takes no prompt"),
        ("gemma3n_text", "Gemma3nForCausalLM", "takes no audio: choose an audio-language model"),
        ("gemma4", "Gemma4ForConditionalGeneration", "takes no audio in this size: choose an audio-language model"),
        ("audio-spectrogram-transformer", "ASTForAudioClassification", "has no language model"),
        ("seamless_m4t_v2", "SeamlessM4Tv2ForSpeechToText", "transcribes and takes no prompt"),
        ("moonshine", "MoonshineForConditionalGeneration", "transcribes and takes no prompt"),
    ],
)
def test_models_that_cannot_be_asked_say_so(model_type, architecture, reason):
    config = transformers.CONFIG_MAPPING[model_type](architectures=[architecture])
    with pytest.raises(BackboneError, match=rf"some/model is a {architecture}, which {reason}"):
        model_class_of(config, "some/model")


def test_a_model_without_a_decoder_is_refused_before_its_processor_is_read(tmp_path):
    transformers.ParakeetCTCConfig(architectures=["ParakeetForCTC"]).save_pretrained(tmp_path)
    for load in (FrozenLALM.from_pretrained, inspect_checkpoint, lambda path: Backbone(path).clip_processor()):
        with pytest.raises(
            BackboneError, match=r"is a ParakeetForCTC, which has no language model that could be asked"
        ):
            load(str(tmp_path))


def test_layers_without_heads_are_told_from_layers_that_are_not_there():
    text = {**NEMOTRON_TEXT, "vocab_size": 64}
    with torch.device("meta"):
        model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**text))
    with pytest.raises(BackboneError, match=r"layers=\[0\]: the decoder has heads in the layers 1, 3, 4"):
        find_head_sites(model, layers=[0])


# Code that a checkpoint brings


OWN_CODE = """
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

class OwnConfig(Qwen2AudioConfig):
    model_type = "own_audio"

class OwnAudio(Qwen2AudioForConditionalGeneration):
    pass
"""


@pytest.mark.parametrize("own_config", [True, False])
def test_a_checkpoints_own_code_is_run_only_where_it_is_trusted(own_config, tiny_lalm, clips, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = Path(shutil.copytree(tiny_lalm, tmp_path / f"own{own_config}"))
    (folder / "own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["OwnAudio"]}
    config["auto_map"] = {"AutoModel": "own.OtherAudio", "AutoModelForCausalLM": "own.OwnAudio"}
    if own_config:
        config["model_type"] = "own_audio"
        config["auto_map"]["AutoConfig"] = "own.OwnConfig"
    (folder / "config.json").write_text(json.dumps(config))
    for load in (FrozenLALM.from_pretrained, inspect_checkpoint, lambda path: Backbone(path).clip_processor()):
        with pytest.raises(BackboneError) as refusal:
            load(str(folder))
        assert str(refusal.value).startswith(f"{folder} comes with Python code of its own")
        assert str(refusal.value).endswith("set --data.backbone.trust_remote_code true.")
        assert "\n" not in str(refusal.value)
    spec = Backbone(path=str(folder), trust_remote_code=True)
    assert "own.py" in spec.fingerprint() and "own.py" not in replace(spec, trust_remote_code=False).fingerprint()
    own = FrozenLALM.from_pretrained(str(folder), trust_remote_code=True)
    assert type(own.model).__module__.startswith("transformers_modules")
    assert inspect_checkpoint(str(folder), trust_remote_code=True).model == "OwnAudio"
    expected = FrozenLALM.from_pretrained(tiny_lalm).head_outputs(clips[:1])
    torch.testing.assert_close(own.head_outputs(clips[:1]), expected)


def test_own_code_that_lacks_its_class_is_named(tiny_lalm, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = transformers.Qwen2AudioConfig(auto_map={"AutoModelForCausalLM": "own.Missing"}, architectures=["Missing"])
    (tmp_path / "own.py").write_text(OWN_CODE)
    with pytest.raises(BackboneError, match=r"some/model brings its own class own.Missing, which cannot be loaded"):
        model_class_of(config, "some/model", tmp_path, trust_remote_code=True)


def test_a_processors_own_code_is_run_only_where_it_is_trusted(tiny_lalm, tmp_path):
    folder = Path(shutil.copytree(tiny_lalm, tmp_path / "own"))
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        file = folder / name
        if file.exists():
            settings = json.loads(file.read_text()) | {"processor_class": "OwnProcessor"}
            file.write_text(json.dumps(settings | {"auto_map": {"AutoProcessor": "own.OwnProcessor"}}))
    with pytest.raises(BackboneError, match="comes with Python code of its own.*trust_remote_code true") as refusal:
        inspect_checkpoint(str(folder))
    assert "\n" not in str(refusal.value)
