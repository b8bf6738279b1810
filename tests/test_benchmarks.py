"""The benchmarks run from end to end, on little; what they measure is nobody's business here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

from benchmarks import extraction, fit, precision, vote
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.spec import Backbone
from tests.miniatures import esc50


def test_extraction(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extraction, "RESULTS", tmp_path)
    options = (
        "--backbone random-qwen2-audio --clips 3 --seconds 0.3 --batch-size 2 --workers 0 --rounds 1 --curve --name f"
    )
    monkeypatch.setattr(sys, "argv", ["extraction", *options.split()])
    extraction.main()
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["ways"].keys() >= {"authors_20", "authors_1", "plain", "hooked", "stopped", "ours"}
    assert found["ratios"].keys() == {"hooks", *(name for name, *_ in extraction.GOALS)}
    assert [point["batch_size"] for point in found["curve"]] == [1, 2]
    assert "published, 20 trials" in capsys.readouterr().out


def test_clips_become_inputs_once(tiny_lalm, tmp_path):
    """A GPU would wait for each of the ways otherwise."""
    lalm = FrozenLALM.from_pretrained(tiny_lalm)
    bench = extraction.Bench(lalm, Backbone(tiny_lalm), extraction.make_clips(tmp_path, 2, 0.3), 2, 0)
    assert bench.inputs() is bench.inputs() is not bench.inputs(cut_window=False)
    assert len(replace(bench, batch_size=1).inputs()) == 2


def test_vote(tmp_path, monkeypatch):
    monkeypatch.setattr(vote, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["vote", "--clips", "20", "--heads", "8", "--classes", "5", "--width", "4"])
    vote.main()
    assert json.loads((tmp_path / "vote.json").read_text()).keys() >= {"vote", "materialised", "ratios"}


def test_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["fit", "--sizes", "small", "--methods", "calm"])
    fit.main()
    assert json.loads((tmp_path / "fit.json").read_text())["small"]["calm"]["seconds"] > 0


def test_precision(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "RESULTS", tmp_path)
    options = "--backbones random-qwen2-audio --shots 2 --draws 1 --esc10"
    monkeypatch.setattr(sys, "argv", ["precision", *options.split(), str(esc50(tmp_path / "esc10"))])
    precision.main()
    found = json.loads((tmp_path / "precision.json").read_text())["random-qwen2-audio"]["precisions"]
    mean = {name: figures["cosine"]["mean"] for name, figures in found.items()}
    assert mean["32-true"] > mean["bf16 weights, 32-true"] > mean["bf16-true"] > 0.999
    assert all(found["32-true"]["methods"][name]["support_too"] == 1 for name in precision.METHODS)
    assert "bf16 weights, 32-true" in capsys.readouterr().out
