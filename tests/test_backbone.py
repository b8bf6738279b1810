"""Reading heads: agreement with the published code, batching, hooks, structure, and what errors say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calm_pl.backbone import spec
from calm_pl.backbone.answers import label_log_likelihoods
from calm_pl.backbone.checkpoints import resolve_checkpoint
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.hooks import HeadCapture, capture_heads
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.named import named_backbone
from calm_pl.backbone.spec import Backbone
from calm_pl.backbone.window import shorter_encoder
from calm_pl.clip import Clip
from tests.conftest import DATA, tone

PIPELINE = DATA / "pipeline"


@pytest.fixture(scope="module")
def oracle_clips() -> list[Clip]:
    return [
        Clip(str(PIPELINE / entry["wav"]), question=entry["question"])
        for entry in json.loads((PIPELINE / "clips.json").read_text())
    ]


@pytest.fixture(scope="module")
def lalm(tiny_lalm: str) -> FrozenLALM:
    return FrozenLALM.from_pretrained(tiny_lalm)


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("lengths")
    return [Clip(str(tone(folder / f"{s}.wav", 500, s))) for s in (0.3, 1.7, 0.9, 4.0, 6.5)]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_agrees_with_the_published_code(tiny_lalm, oracle_clips, padding_side, batch_size):
    lalm = FrozenLALM.from_pretrained(tiny_lalm, padding_side=padding_side)
    heads_NKD = lalm.head_outputs(oracle_clips, batch_size=batch_size)
    expected_NKD = load_file(PIPELINE / "heads.safetensors")["heads"]
    torch.testing.assert_close(heads_NKD, expected_NKD, atol=1e-4, rtol=0)


def test_agrees_with_the_whole_oracle(shared):
    folder = shared / "oracle" / "pipeline"
    expected = load_file(folder / "pipe.safetensors")
    lalm = FrozenLALM.from_pretrained(folder / "tiny-random")
    for split, entries in json.loads((folder / "split.json").read_text()).items():
        clips = [Clip(str(folder / entry["wav"]), question=entry["question"]) for entry in entries]
        torch.testing.assert_close(lalm.head_outputs(clips), expected[f"{split}_heads"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("heads", ["decoder", "encoder", "both"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_gives_what_single_clips_give(tiny_lalm, lengths, heads, padding_side):
    lalm = FrozenLALM.from_pretrained(tiny_lalm, heads=heads, padding_side=padding_side)
    together, alone = lalm.head_outputs(lengths, batch_size=5), lalm.head_outputs(lengths, batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert together.dtype == torch.float32 and together.shape == (5, lalm.num_heads, lalm.head_dim)


def test_heads_are_named_and_ordered_decoder_first(tiny_lalm, lengths):
    both = FrozenLALM.from_pretrained(tiny_lalm, heads="both")
    decoder = FrozenLALM.from_pretrained(tiny_lalm, heads="decoder")
    encoder = FrozenLALM.from_pretrained(tiny_lalm, heads="encoder")
    assert (decoder.num_layers, decoder.heads_per_layer, decoder.head_dim, decoder.num_heads) == (4, 4, 16, 16)
    assert both.head_names == decoder.head_names + encoder.head_names
    assert both.head_names[5] == "decoder.1.self_attn.1" and both.head_names[16] == "encoder.0.self_attn.0"
    expected = torch.cat([decoder.head_outputs(lengths), encoder.head_outputs(lengths)], dim=1)
    torch.testing.assert_close(both.head_outputs(lengths), expected)


def test_encoder_heads_are_the_mean_over_valid_frames(tiny_lalm, lengths):
    lalm = FrozenLALM.from_pretrained(tiny_lalm, heads="encoder")
    clip = lengths[2]  # 0.9 s: 90 mel frames, 45 encoder frames
    inputs = lalm.processor([clip], [lalm.processor.load(clip)])
    seen = []
    projection = lalm.model.model.audio_tower.layers[1].self_attn.out_proj
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with lalm.window(inputs):
        lalm.model(**inputs.model_inputs)
    handle.remove()
    by_hand_HD = seen[0][0, :45].mean(0).view(4, 16)
    torch.testing.assert_close(lalm.head_outputs([clip])[0, 4:], by_hand_HD, atol=1e-5, rtol=0)


def test_hooks_see_what_a_plain_forward_sees(lalm, oracle_clips):
    clip = oracle_clips[0]
    inputs = lalm.processor([clip], [lalm.processor.load(clip)])
    seen = []
    projection = lalm.model.model.language_model.layers[2].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with lalm.window(inputs):
        lalm.model(**inputs.model_inputs)
    handle.remove()
    torch.testing.assert_close(lalm.head_outputs([clip])[0, 8:12], seen[0][0, -1].view(4, 16))


def test_language_model_head_never_runs_and_hooks_always_go(lalm, oracle_clips):
    def forbidden(module, args):
        raise AssertionError("the language-model head ran")

    handle = lalm.model.lm_head.register_forward_pre_hook(forbidden)
    lalm.head_outputs(oracle_clips[:1])
    handle.remove()
    assert not any(site.projection._forward_pre_hooks for site in lalm.sites)

    with pytest.raises(KeyError, match="inside"), capture_heads(HeadCapture(lalm.sites)):
        assert all(site.projection._forward_pre_hooks for site in lalm.sites)
        raise KeyError("inside")
    assert not any(site.projection._forward_pre_hooks for site in lalm.sites)


def test_model_is_frozen(lalm, oracle_clips):
    assert not lalm.model.training and not any(p.requires_grad for p in lalm.model.parameters())
    assert not isinstance(lalm, torch.nn.Module)
    assert not lalm.head_outputs(oracle_clips[:1]).requires_grad


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(tiny_lalm, lalm, oracle_clips, dtype):
    half = FrozenLALM.from_pretrained(tiny_lalm, dtype=dtype)
    cosine = torch.cosine_similarity(half.head_outputs(oracle_clips), lalm.head_outputs(oracle_clips), dim=-1)
    assert half.model.dtype == getattr(torch, dtype)
    assert cosine.min() > 0.999


def test_eager_and_sdpa_agree(tiny_lalm, lalm, lengths):
    eager = FrozenLALM.from_pretrained(tiny_lalm, attn_implementation="eager")
    torch.testing.assert_close(eager.head_outputs(lengths), lalm.head_outputs(lengths), atol=1e-4, rtol=0)


def test_a_very_short_clip_yields_an_audio_token(lalm, tmp_path):
    short = Clip(str(tone(tmp_path / "short.wav", 1000, 0.02)))
    inputs = lalm.processor([short], [lalm.processor.load(short)])
    audio_token = lalm.processor.processor.audio_token_id
    assert (inputs.model_inputs["input_ids"] == audio_token).sum() >= 1
    loud = lalm.head_outputs([short])
    other = lalm.head_outputs([tone(tmp_path / "other.wav", 3000, 0.02)])
    assert (loud - other).abs().max() > 1e-5  # it is heard, not only counted


def test_question_and_prompt_reach_the_model(tiny_lalm, lalm, oracle_clips):
    clip = Clip(oracle_clips[0].audio)
    assert lalm.processor.text(clip).endswith(
        "What sound is this? Answer with the class name.<|im_end|>\n<|im_start|>assistant\n"
    )
    asked = Clip(clip.audio, question="Which instrument plays {here}?")
    assert "Which instrument plays {here}? Answer" in lalm.processor.text(asked)
    other = FrozenLALM.from_pretrained(tiny_lalm, prompt="{question} One word.")
    assert (other.head_outputs([clip]) - lalm.head_outputs([clip])).abs().max() > 1e-5


def test_label_likelihoods_equal_whole_forwards(lalm, oracle_clips):
    labels = ["dog bark", "rain", "x"]
    inputs = lalm.processor(oracle_clips, [lalm.processor.load(clip) for clip in oracle_clips])
    scores_BC = label_log_likelihoods(lalm, inputs, labels)
    for row, clip in enumerate(oracle_clips):
        for column, label in enumerate(labels):
            text = lalm.processor.text(clip) + label
            whole = lalm.processor._process([text], lalm.processor.load(clip))
            count = len(lalm.processor.tokenizer(label).input_ids)
            with shorter_encoder(lalm.model, whole["input_features"]):
                log_p_TV = lalm.model(**whole).logits[0].log_softmax(-1)
            tokens_T = whole["input_ids"][0, -count:]
            expected = log_p_TV[-count - 1 : -1].gather(1, tokens_T[:, None]).mean()
            torch.testing.assert_close(scores_BC[row, column], expected, atol=1e-4, rtol=0)


def test_an_encoder_decoder_gives_self_and_cross_attention_heads(shared, lengths):
    whisper = FrozenLALM.from_pretrained(shared / "models" / "whisper-tiny.en", heads="both")
    assert (whisper.num_layers, whisper.heads_per_layer, whisper.num_heads) == (4, 12, 72)
    assert whisper.head_names[0] == "decoder.0.self_attn.0" and whisper.head_names[6] == "decoder.0.encoder_attn.0"
    together, alone = whisper.head_outputs(lengths[:3], batch_size=3), whisper.head_outputs(lengths[:3], batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    inputs = whisper.processor(lengths[:1], [whisper.processor.load(lengths[0])])
    with pytest.raises(BackboneError, match="answers no questions"):
        label_log_likelihoods(whisper, inputs, ["dog"])


def test_a_gpu_may_not_round_convolutions_of_float32(lengths, tiny_lalm):
    lalm, allowed = FrozenLALM.from_pretrained(tiny_lalm), []
    convolution = next(module for module in lalm.model.modules() if isinstance(module, torch.nn.Conv1d))
    convolution.register_forward_pre_hook(lambda *_: allowed.append(torch.backends.cudnn.allow_tf32))
    lalm.head_outputs(lengths[:1])
    assert allowed == [False] and torch.backends.cudnn.allow_tf32  # for others as it was


def test_random_checkpoint_is_deterministic_and_has_a_telling_name(lengths):
    backbone = named_backbone("random-qwen2-audio")
    assert backbone.name == "random-qwen2-audio"
    first, second = backbone.load(), FrozenLALM.from_pretrained("random-qwen2-audio")
    torch.testing.assert_close(first.head_outputs(lengths[:2]), second.head_outputs(lengths[:2]), rtol=0, atol=0)


def test_a_process_keeps_the_model_that_it_loaded_last(tiny_lalm, tmp_path):
    folder = shutil.copytree(tiny_lalm, tmp_path / "model")
    loaded = Backbone(str(folder)).load()
    assert Backbone(str(folder)).load() is loaded
    (folder / "config.json").touch()  # as a new checkpoint would
    assert Backbone(str(folder)).load() is not loaded
    other = Backbone(str(folder), layers=(0,)).load()
    assert other.num_layers == 1 and Backbone(str(folder)).load().num_layers == 4


def test_store_key_follows_what_changes_a_head_output(tiny_lalm, tmp_path, monkeypatch):
    backbone = Backbone(tiny_lalm)
    changed = [
        backbone.store_key("bfloat16"),
        Backbone(tiny_lalm, heads="both").store_key(),
        Backbone(tiny_lalm, prompt="{question}").store_key(),
        Backbone(tiny_lalm, layers=(0, 1)).store_key(),
        Backbone(tiny_lalm, layers=(1,)).store_key(),
        Backbone(tiny_lalm, cut_window=False).store_key(),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(spec, "FORMAT_VERSION", spec.FORMAT_VERSION + 1)
        changed.append(backbone.store_key())
    assert Backbone(tiny_lalm, layers=(1, 0)).store_key() == Backbone(tiny_lalm, layers=(0, 1)).store_key()
    copied = shutil.copytree(tiny_lalm, tmp_path / "tiny-random")
    assert Backbone(str(copied)).store_key() == backbone.store_key()  # the same content elsewhere is the same model
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (copied / "config.json").write_text(json.dumps(config))
    changed.append(Backbone(str(copied)).store_key())
    (copied / "words.tiktoken").write_text("YQ== 0")
    changed.append(Backbone(str(copied)).store_key())
    keys = [backbone.store_key(), *changed]
    assert all(key != other for index, key in enumerate(keys) for other in keys[:index])


def test_store_key_follows_the_code_of_a_checkpoint_where_it_is_run(tiny_lalm, tmp_path):
    copied = shutil.copytree(tiny_lalm, tmp_path / "tiny-random")
    trusted, plain = Backbone(str(copied), trust_remote_code=True), Backbone(str(copied))
    bare = trusted.store_key(), plain.store_key()
    (copied / "modeling.py").write_text("SCALE = 1\n")
    before = trusted.store_key(), plain.store_key()
    (copied / "modeling.py").write_text("SCALE = 2\n")
    after = trusted.store_key(), plain.store_key()
    assert len({json.dumps(keys[0]) for keys in (bare, before, after)}) == 3
    assert bare[1] == before[1] == after[1]  # code that nobody runs changes nothing
    assert Backbone(tiny_lalm, trust_remote_code=True).store_key() == Backbone(tiny_lalm).store_key()


def test_store_key_follows_weights_that_an_index_finds_in_a_folder_below(tiny_lalm, tmp_path):
    copied = shutil.copytree(tiny_lalm, tmp_path / "tiny-random")
    (copied / "parts").mkdir()
    part = (copied / "model.safetensors").rename(copied / "parts" / "1.safetensors")
    names = load_file(part)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "parts/1.safetensors")}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    backbone = Backbone(str(copied))
    before, state = backbone.store_key(), backbone._state_on_disk()
    save_file({name: 2 * weight for name, weight in names.items()}, part, {"format": "pt"})
    assert backbone.store_key() != before and backbone._state_on_disk() != state
    (copied / "model.safetensors.index.json").write_text("torn")
    backbone.store_key()


def test_store_key_follows_the_bytes_of_an_adapter_and_not_its_place(tiny_lalm, tmp_path):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    moved = shutil.copytree(adapter, tmp_path / "moved")
    backbone = Backbone(tiny_lalm, adapter=str(adapter))
    before = backbone.store_key()
    assert Backbone(tiny_lalm, adapter=str(moved)).store_key() == before
    (adapter / "adapter_model.safetensors").write_bytes(b"weightz")
    retrained = backbone.store_key()
    (adapter / "adapter_config.json").write_text('{"r": 9}')
    keys = [Backbone(tiny_lalm).store_key(), before, retrained, backbone.store_key()]
    assert all(key != other for index, key in enumerate(keys) for other in keys[:index])


def test_of_several_chat_templates_the_default_one_is_used(tiny_lalm, tmp_path):
    copied = shutil.copytree(tiny_lalm, tmp_path / "tiny-random")
    (copied / "additional_chat_templates").mkdir()
    (copied / "additional_chat_templates" / "tool_use.jinja").write_text("none for sounds")
    clip = Clip("some.wav")
    assert Backbone(str(copied)).clip_processor().text(clip) == Backbone(tiny_lalm).clip_processor().text(clip)


# What errors say


def test_a_folder_without_config_is_no_checkpoint(tmp_path):
    with pytest.raises(BackboneError, match="is no checkpoint: it has no config.json"):
        FrozenLALM.from_pretrained(tmp_path)


def test_a_mistyped_path_names_what_needs_no_download():
    with pytest.raises(BackboneError, match=r"neither a folder on this machine nor a hub id.*calm-tiny"):
        resolve_checkpoint("./no/such/folder")


def test_no_network_and_nothing_cached_names_address_and_way_out():
    with pytest.raises(BackboneError, match=r"https://huggingface.co/Qwen/Qwen2-Audio-7B-Instruct .*hf download"):
        FrozenLALM.from_pretrained("Qwen/Qwen2-Audio-7B-Instruct")


def test_a_text_model_takes_no_audio(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from calm_pl.backbone.random_checkpoint import byte_tokenizer

    config = Qwen2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=300,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer([]).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="takes no audio"):
        FrozenLALM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"dtype": "int3"}, "dtype='int3' is unknown"), ({"heads": "tail"}, "heads='tail' is unknown")],
)
def test_unknown_options_are_refused_before_the_weights_are_read(tiny_lalm, tmp_path, option, message):
    shutil.copytree(tiny_lalm, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(BackboneError, match=message):
        FrozenLALM.from_pretrained(tmp_path / "model", **option)


def test_damaged_weights_are_named(tiny_lalm, tmp_path):
    broken = Path(shutil.copytree(tiny_lalm, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(BackboneError, match="weights of .*broken cannot be loaded"):
        FrozenLALM.from_pretrained(broken)


def test_out_of_memory_says_lower_the_batch_size(lalm, oracle_clips):
    def full(module, args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    handle = lalm.sites[0].projection.register_forward_pre_hook(full)
    try:
        with pytest.raises(BackboneError, match="batch of 4 clips: lower the batch size"):
            lalm.head_outputs(oracle_clips, batch_size=4)
    finally:
        handle.remove()


# Speed without another result


@pytest.mark.parametrize("heads", ["decoder", "both"])
def test_a_cut_window_gives_what_the_full_window_gives(tiny_lalm, lengths, heads):
    cut = FrozenLALM.from_pretrained(tiny_lalm, heads=heads)
    full = FrozenLALM.from_pretrained(tiny_lalm, heads=heads, cut_window=False)
    short = lengths[:3]
    inputs = cut.processor(short, [cut.processor.load(clip) for clip in short])
    assert inputs.model_inputs["input_features"].shape[-1] < 200  # 1.7 s instead of 5 s
    torch.testing.assert_close(cut.head_outputs(short), full.head_outputs(short), atol=1e-4, rtol=0)
    torch.testing.assert_close(cut.head_outputs(lengths), full.head_outputs(lengths), atol=1e-4, rtol=0)
    assert cut.model.model.audio_tower.embed_positions.weight.shape[0] == 250  # whole again


def test_layers_limit_what_is_kept_and_what_is_run(tiny_lalm, lalm, oracle_clips):
    early = FrozenLALM.from_pretrained(tiny_lalm, layers=[0, 2])
    assert early.num_heads == 8 and early.head_names[4] == "decoder.2.self_attn.0"

    def forbidden(module, args):
        raise AssertionError("a layer after the last wanted one ran")

    handle = early.model.model.language_model.layers[3].register_forward_pre_hook(forbidden)
    heads_NKD = early.head_outputs(oracle_clips)
    handle.remove()
    all_NKD = lalm.head_outputs(oracle_clips)
    torch.testing.assert_close(heads_NKD, torch.cat([all_NKD[:, :4], all_NKD[:, 8:12]], dim=1))
    with pytest.raises(BackboneError, match="has the layers 0 to 3"):
        FrozenLALM.from_pretrained(tiny_lalm, layers=[4])
