"""`calm backbones`: the list agrees with conf/, and inspecting a checkpoint reads no weights."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
import transformers

from calm_pl.backbone.catalogue import CATALOGUE, FAMILIES
from calm_pl.backbone.inspection import inspect_checkpoint
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.named import named_backbone
from calm_pl.backbone.structure import find_head_sites
from calm_pl.cli import main
from calm_pl.conf import config_names
from tests.conftest import ROOT
from tests.families import FAMILIES as CONFORMING


def listed(capsys, monkeypatch, columns: int, terminal: bool) -> list[list[str]]:
    """Words of each line that `calm backbones` prints."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")  # rich takes it for a terminal
    assert main(["backbones"]) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert not terminal or max(map(len, lines)) <= columns
    return [line.split() for line in lines]


@pytest.mark.parametrize("terminal", [True, False])
def test_names_and_hub_ids_are_whole_however_narrow_the_terminal_is(capsys, monkeypatch, terminal):
    lines = listed(capsys, monkeypatch, 80, terminal)
    for name, known in CATALOGUE.items():
        hub_id, shape = known.hub_id.split(), [str(known.layers), "x", str(known.heads), "x", str(known.head_dim)]
        if terminal:
            assert [name, *hub_id] in lines and any(
                line[:6] == [name, *shape] and line[-1] == known.tested for line in lines
            )
        else:
            assert any(
                line[: 6 + len(hub_id)] == [name, *hub_id, *shape] and line[-1] == known.tested for line in lines
            )
    assert all([name, hub_id] in lines for name, hub_id in FAMILIES.items())


def test_a_wide_terminal_shows_a_model_in_a_line(capsys, monkeypatch):
    wide, piped = (listed(capsys, monkeypatch, 160, True), listed(capsys, monkeypatch, 80, False))
    assert wide == piped


def test_the_list_has_every_named_backbone(capsys):
    assert main(["backbones"]) == 0
    shown = capsys.readouterr().out
    named = set(config_names("backbone")) - {"random-qwen2-audio"}
    assert set(CATALOGUE) == named
    assert all(name in shown for name in named) and all(name in shown for name in FAMILIES)
    documented = (ROOT / "docs" / "reference" / "backbones.md").read_text()
    assert all(f"`{name}`" in documented and hub_id in documented for name, hub_id in FAMILIES.items())
    assert set(FAMILIES) == {*CONFORMING, "whisper"}
    for name, known in CATALOGUE.items():
        assert known.hub_id == named_backbone(name).path or name == "calm-tiny"
        assert f"| {name} | {known.hub_id} | {known.layers} x {known.heads} x {known.head_dim} |" in documented


def test_the_lists_sizes_are_those_of_the_shipped_model():
    found, known = inspect_checkpoint("calm-tiny"), CATALOGUE["calm-tiny"]
    assert found.decoder.startswith(f"{known.layers} layers x {known.heads} heads x {known.head_dim}")
    assert (found.max_seconds, found.sampling_rate) == (known.max_seconds, known.sampling_rate)
    assert found.bf16_gb == pytest.approx(known.bf16_gb, rel=0.05)


@pytest.mark.parametrize(
    ("name", "model_class", "config"),
    [
        ("voxtral-mini", transformers.VoxtralForConditionalGeneration, transformers.VoxtralConfig()),
        ("whisper-large-v3", transformers.WhisperForConditionalGeneration, transformers.WhisperConfig(
            d_model=1280, encoder_layers=32, decoder_layers=32, encoder_attention_heads=20, decoder_attention_heads=20,
            encoder_ffn_dim=5120, decoder_ffn_dim=5120, num_mel_bins=128, vocab_size=51866,
        )),
    ],
)  # fmt: skip
def test_exact_sizes_are_those_of_a_model_built_from_its_config(name, model_class, config):
    known = CATALOGUE[name]
    with torch.device("meta"):
        model = model_class(config)
    assert known.exact and sum(w.numel() for w in model.parameters()) / 1e9 == pytest.approx(known.billions, rel=0.01)
    sites = find_head_sites(model)
    assert len({site.layer for site in sites}) == known.layers and sites[0].head_dim == known.head_dim
    assert sum(site.num_heads for site in sites) == known.layers * known.heads


def test_inspecting_needs_no_weights_and_finds_what_loading_finds(tiny_lalm, tmp_path, capsys):
    bare = shutil.copytree(tiny_lalm, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert main(["backbones", "inspect", str(bare)]) == 0
    lalm = FrozenLALM.from_pretrained(tiny_lalm)
    shown = capsys.readouterr().out
    assert f"4 layers x 4 heads x 16 = {lalm.num_heads} heads" in shown
    assert "What sound is this?" in shown and type(lalm.model).__name__ in shown


def test_inspecting_what_cannot_be_reached_is_no_verdict(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["backbones", "inspect", "nobody/no-such-model"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("cannot tell: ") and "does not work" not in said


def test_inspecting_says_why_a_checkpoint_does_not_work(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    assert main(["backbones", "inspect", str(tmp_path)]) == 1
    assert "takes no audio" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of", "architectures": ["UnheardOf"]}')
    assert main(["backbones", "inspect", str(tmp_path)]) == 1
    assert "cannot read the config" in capsys.readouterr().err
