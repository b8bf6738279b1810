"""`compile: true`: the same numbers, with hooks on and off, and an error that helps where there is no compiler."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch
from torch._inductor import config as inductor

from calm_pl.backbone.answers import label_log_likelihoods
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip
from tests.conftest import tone

COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no C++ compiler ({COMPILER})")
def test_a_compiled_model_says_the_same(tiny_lalm, tmp_path):
    clips = [Clip(str(tone(tmp_path / f"{i}.wav", 700, 0.5 + 0.7 * i)), question="Why? " * i) for i in range(4)]
    plain, compiled = (FrozenLALM.from_pretrained(tiny_lalm, heads="both", compile=on) for on in (False, True))
    assert any(module._compiled_call_impl for module in compiled.model.modules())
    expected_NKD = plain.head_outputs(clips)
    for batch_size in (4, 2):
        torch.testing.assert_close(compiled.head_outputs(clips, batch_size), expected_NKD, atol=1e-4, rtol=0)
    inputs = plain.processor(clips, [plain.processor.load(clip) for clip in clips])
    said, expected = (label_log_likelihoods(lalm, inputs, ["dog", "a car horn"]) for lalm in (compiled, plain))
    torch.testing.assert_close(said, expected, atol=1e-4, rtol=0)


def test_without_a_compiler_the_error_names_what_to_install(tiny_lalm, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled earlier
    torch._dynamo.reset()
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(BackboneError, match=r"install a C\+\+"):
        FrozenLALM.from_pretrained(tiny_lalm, compile=True)


def test_the_store_does_not_depend_on_it(tiny_lalm):
    assert Backbone(tiny_lalm, compile=True).store_key() == Backbone(tiny_lalm).store_key()
