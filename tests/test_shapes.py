"""The models of random weights that speed is measured with."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shapes import SHAPES, random_model, write_checkpoint
from calm_pl import Backbone, Clip, FrozenLALM
from tests.conftest import tone

# What the published checkpoints have; the Omni's without its talker and vocoder.
BILLIONS = {"qwen2-audio-7b": 8.4, "qwen2.5-omni-7b": 8.9}


@pytest.mark.parametrize("name", BILLIONS)
def test_large_shapes_are_as_large_as_the_published_checkpoints(name, tmp_path):
    if "omni" in name:
        pytest.importorskip("torchvision")
    model = random_model(SHAPES[name], tmp_path, torch.bfloat16, "meta")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(BILLIONS[name], abs=0.1)


@pytest.mark.parametrize("name", [name for name in SHAPES if name.endswith("mini")])
def test_small_shapes_hear(name, tmp_path):
    if "omni" in name:
        pytest.importorskip("torchvision")
    lalm = FrozenLALM(
        random_model(SHAPES[name], tmp_path, torch.float32, "cpu"), Backbone(str(tmp_path)).clip_processor()
    )
    decoder = SHAPES[name].decoder
    low, high = (Clip(str(tone(tmp_path / f"{frequency}.wav", frequency))) for frequency in (200, 3000))
    heads_NKD = lalm.head_outputs([low, high], batch_size=2)
    assert heads_NKD.shape == (2, decoder.layers * decoder.heads, decoder.width // decoder.heads)
    assert not torch.allclose(heads_NKD[0], heads_NKD[1])


@pytest.mark.parametrize("name", [name for name in SHAPES if name.endswith("mini")])
def test_checkpoints_of_a_shape_load_as_published_ones_do(name, tmp_path):
    if "omni" in name:
        pytest.importorskip("torchvision")
    write_checkpoint(SHAPES[name], tmp_path, shard_size="5MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    low, high = (Clip(str(tone(tmp_path / f"{frequency}.wav", frequency))) for frequency in (200, 3000))
    heads_NKD = FrozenLALM.from_pretrained(str(tmp_path)).head_outputs([low, high])
    assert heads_NKD.isfinite().all()
    assert not torch.allclose(heads_NKD[0], heads_NKD[1])
