"""`calm suggest`: doubt and coverage by their definitions, and a manifest that `calm fit` takes once it is filled."""

from __future__ import annotations

import csv
import os
import shlex
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_pl.classifier import CalmClassifier
from calm_pl.data import read_manifest
from calm_pl.functional.heads import unit
from calm_pl.methods.suggestion import MAX_FEATURES, by_coverage, by_entropy, by_margin, head_features
from tests.test_run import calm


def test_doubt_comes_first():
    probabilities_NC = torch.tensor([[0.5, 0.45, 0.05], [0.4, 0.3, 0.3], [0.9, 0.05, 0.05]])
    assert by_margin(probabilities_NC).tolist() == [0, 1, 2]
    assert by_entropy(probabilities_NC).tolist() == [1, 0, 2]
    alike_NC = torch.eye(3)[[0] * 100]  # no doubt, and no NaN
    assert by_entropy(alike_NC).tolist() == by_margin(alike_NC).tolist() == list(range(100))


def reach(points: list[float], chosen: tuple[float, ...]) -> float:
    return max(min(abs(point - one) for one in chosen) for point in points)


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=9, unique=True), st.integers(1, 3))
def test_coverage_is_within_twice_the_best(points, count):
    features_NF = torch.tensor(points, dtype=torch.float64)[:, None]
    chosen = by_coverage(features_NF, count).tolist()
    assert len(set(chosen)) == count
    best = min(reach(points, centres) for centres in combinations(points, count))
    assert reach(points, tuple(points[n] for n in chosen)) <= 2 * best + 1e-6


def test_coverage_keeps_away_from_what_is_labelled():
    features_NF = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    assert by_coverage(features_NF, 2, torch.tensor([[11.5]])).tolist() == [0, 2]
    assert len(by_coverage(features_NF, 9)) == 4
    assert by_coverage(features_NF[1:], 1).tolist() == [1]  # the closest to the mean


def test_features_keep_the_cosines_of_heads():
    generator = torch.Generator().manual_seed(0)
    for heads, dim, tolerance in ((3, 8, 1e-5), (40, 64, 0.15)):
        assert (heads * dim > MAX_FEATURES) == (tolerance > 0.1)
        heads_NKD = torch.randn(6, heads, dim, generator=generator)
        cosine_NN = torch.einsum("nkd,mkd->nmk", unit(heads_NKD), unit(heads_NKD)).mean(-1)
        distance_NN = torch.cdist(head_features(heads_NKD), head_features(heads_NKD)).square()
        torch.testing.assert_close(distance_NN, 2 * (1 - cosine_NN), atol=2 * tolerance, rtol=0)


@pytest.fixture(scope="module")
def classifier(tones, tiny_lalm, tmp_path_factory) -> Path:
    """Knows two of the three tones."""
    files = [str(tones / "train" / label / f"{n}.wav") for label in ("low", "high") for n in range(3)]
    folder = tmp_path_factory.mktemp("classifier")
    CalmClassifier().fit(files, ["low"] * 3 + ["high"] * 3, backbone=tiny_lalm).save_pretrained(folder)
    return folder


def test_a_filled_manifest_can_be_learned_from(classifier, tones, tiny_lalm, tmp_path, capsys):
    out = tmp_path / "to label" / "list.csv"
    calm("suggest", tones / "test", "--run", classifier, "--count", 6, "--by", "entropy", "--out", out)
    said = capsys.readouterr().out
    assert "6 of 9 clips to label" in said
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 6 and all(row["label"] == "" and row["prediction"] in ("low", "high") for row in rows)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "label": Path(row["audio"]).parent.name})
    clips = read_manifest(out)
    assert all(os.path.isfile(clip.audio) and clip.label in ("low", "middle", "high") for clip in clips)
    filled = out.read_text()
    told = shlex.split(said.splitlines()[-1])
    assert told[0] == "calm" and told[told.index("--data.shots") + 1] == "null"
    backbone = ("--backbone", tiny_lalm, "--data.num_workers", 0, "--trainer.accelerator", "cpu")
    calm(*told[1:], *backbone, "--run_dir", tmp_path / "run", "--model", "formula", "--model.zero_shot", "false")
    with pytest.raises(SystemExit, match="holds labels: name another file with --out"):
        calm("suggest", tones / "test", "--run", classifier, "--out", out)
    assert out.read_text() == filled


def test_what_is_labelled_is_not_suggested(tones, tiny_lalm, tmp_path):
    out = tmp_path / "to-label.csv"
    calm("suggest", tones, "--backbone", tiny_lalm, "--labelled", tones / "train", "--count", 50, "--out", out)
    assert {clip.audio for clip in read_manifest(out)} == {str(file) for file in (tones / "test").rglob("*.wav")}


def test_what_is_labelled_is_known_by_any_way_to_it(tones, tiny_lalm, tmp_path, monkeypatch):
    """Rows without a label are not labelled; links lead to folders elsewhere, and names begin with a space."""
    sounds, deep = tmp_path / "sounds", tmp_path / "a" / "b" / "c"
    for folder in (sounds, deep, tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    for name, number in (("x.wav", 0), ("y.wav", 1), (" z.wav", 2)):
        shutil.copy(tones / "test" / "low" / f"{number}.wav", sounds / name)
    (tmp_path / "link").symlink_to(deep)
    (tmp_path / "labelled.csv").write_text("audio,label\nsounds/x.wav,low\nsounds/y.wav,\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = tmp_path / "link" / "out.csv"
    calm(
        "suggest", "../sounds", "--backbone", tiny_lalm, "--labelled", tmp_path / "labelled.csv", "--count", 9,
        "--out", out,
    )  # fmt: skip
    assert {os.path.realpath(clip.audio) for clip in read_manifest(out)} == {
        str(sounds / name) for name in ("y.wav", " z.wav")
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--by", "margin"], "give one, or take coverage"),
        (["--labelled", "."], "every clip is labelled already"),
        (["--count", "0"], "--count 0: at least 1 clip"),
    ],
)
def test_what_cannot_be_suggested_is_told(tones, tiny_lalm, monkeypatch, more, message):
    monkeypatch.chdir(tones)
    with pytest.raises(SystemExit, match=message):
        calm("suggest", ".", "--backbone", tiny_lalm, *more)
