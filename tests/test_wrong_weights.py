"""Weights that do not fit are refused: what transformers would leave at random says something else in every process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calm_pl.backbone.answers import label_log_likelihoods
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip
from tests.conftest import tone


@pytest.fixture
def checkpoint(tiny_lalm: str, tmp_path: Path) -> Path:
    """A copy to take something from."""
    return Path(shutil.copytree(Backbone(tiny_lalm).path, tmp_path / "copy"))


def lora(model: str, folder: Path, **options: object) -> Path:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False, **options)
    peft.get_peft_model(FrozenLALM.from_pretrained(model).model, settings).save_pretrained(folder)
    return folder


def rename(file: Path, before: str, after: str) -> None:
    weights = {name.replace(before, after): weight for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def test_a_checkpoint_that_lacks_a_layers_weight_is_refused(checkpoint):
    (file,) = checkpoint.glob("*.safetensors")
    weights = load_file(file)
    gone = next(name for name in weights if "layers.1." in name and "q_proj" in name)
    save_file({name: weight for name, weight in weights.items() if name != gone}, file, {"format": "pt"})
    with pytest.raises(BackboneError, match=r"lacks 1 weights that heads are read behind, such as .*q_proj"):
        FrozenLALM.from_pretrained(checkpoint)


def test_a_language_model_head_is_not_missed(checkpoint, tiny_lalm, tmp_path):
    (file,) = checkpoint.glob("*.safetensors")
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if "lm_head" not in name}, file, {"format": "pt"})
    clips = [Clip(str(tone(tmp_path / "a.wav", 440)))]
    heads_NKD = FrozenLALM.from_pretrained(tiny_lalm).head_outputs(clips)
    assert torch.equal(FrozenLALM.from_pretrained(checkpoint).head_outputs(clips), heads_NKD)


def test_an_adapter_of_other_layers_is_refused(tiny_lalm, tmp_path):
    folder = lora(tiny_lalm, tmp_path / "lora")
    rename(folder / "adapter_model.safetensors", "layers.0", "layers.30")
    with pytest.raises(BackboneError, match=f"{folder} was made for another model than .*such as"):
        FrozenLALM.from_pretrained(tiny_lalm, adapter=str(folder))


def test_an_adapter_that_would_lose_its_magnitudes_is_refused(tiny_lalm, tmp_path):
    folder = lora(tiny_lalm, tmp_path / "dora", use_dora=True)
    with pytest.raises(BackboneError, match="of a kind that transformers cannot load"):
        FrozenLALM.from_pretrained(tiny_lalm, adapter=str(folder))


@pytest.mark.parametrize("damage", ["torn", "unknown"])
def test_a_damaged_adapter_is_named(tiny_lalm, tmp_path, damage):
    folder = lora(tiny_lalm, tmp_path / "lora")
    if damage == "torn":
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
    else:
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "FOO"}))
    with pytest.raises(BackboneError, match=f"the adapter {folder} cannot be loaded"):
        FrozenLALM.from_pretrained(tiny_lalm, adapter=str(folder))


def test_weights_that_change_within_a_tick_of_the_clock_are_read_again(checkpoint):
    """Copies keep sizes and times; a process must not go on with the model that it has."""
    (file,) = checkpoint.glob("*.safetensors")
    backbone, clips = Backbone(str(checkpoint)), [Clip(str(tone(checkpoint.parent / "a.wav", 440)))]
    before_NKD, status = backbone.load().head_outputs(clips), file.stat()
    weights = load_file(file)
    save_file({name: 2 * weight for name, weight in weights.items()}, file, {"format": "pt"})
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert not torch.equal(backbone.load().head_outputs(clips), before_NKD)


def test_likelihoods_are_float32_whatever_the_default_is(tiny_lalm, tmp_path):
    """Lightning makes bfloat16 the default under precision bf16-true."""
    lalm = FrozenLALM.from_pretrained(tiny_lalm)
    clip = Clip(str(tone(tmp_path / "a.wav", 440)))
    inputs = lalm.processor([clip], [lalm.processor.load(clip)])
    exact_BC = label_log_likelihoods(lalm, inputs, ["a dog", "rain on leaves"])
    torch.set_default_dtype(torch.bfloat16)
    try:
        found_BC = label_log_likelihoods(lalm, inputs, ["a dog", "rain on leaves"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found_BC.dtype == torch.float32
    torch.testing.assert_close(found_BC, exact_BC)
