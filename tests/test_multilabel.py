"""Several labels a clip: figures against slow ones written out by hand, and the way through the data module."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multilabel_f1_score

from calm_pl import AudioEpisodeDataModule, Backbone, CalmClassifier
from calm_pl.clip import Clip
from calm_pl.data.manifest import read_manifest, write_manifest
from calm_pl.data.recipes import Manifest
from calm_pl.data.shard_writer import write_shards
from calm_pl.data.splits import draw_support
from calm_pl.training.metrics import figures
from calm_pl.training.multilabel import mean_average_precision_draws, multi_label_figures
from calm_pl.training.results import columns_of, outcome, results_table, write_predictions
from tests.conftest import tone
from tests.test_run import calm


@st.composite
def scored_clips(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Random probabilities, some of them equal, and one to three labels a clip."""
    clips, classes = draw(st.integers(1, 12)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps = draw(st.sampled_from([4, 1000]))  # few steps make ties
    scores_NC = (torch.rand(clips, classes, generator=generator) * steps).ceil()
    labels_NC = torch.zeros(clips, classes, dtype=torch.uint8)
    for row in labels_NC:
        count = int(torch.randint(1, min(3, classes) + 1, (), generator=generator))
        row[torch.randperm(classes, generator=generator)[:count]] = 1
    return scores_NC / scores_NC.sum(1, keepdim=True), labels_NC


def best(row: list[float], count: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda c: -row[c])[:count])


def slow_average_precision(scores: list[float], truth: list[int]) -> float:
    total = sum(truth)
    found, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        said = [t for s, t in zip(scores, truth, strict=True) if s >= threshold]
        found += (sum(said) / total - recall) * sum(said) / len(said)
        recall = sum(said) / total
    return found


@settings(deadline=None, max_examples=30)  # 500 resamples each
@given(scored_clips())
def test_figures_are_those_of_the_definitions(clips):
    probabilities_NC, labels_NC = clips
    exact, f1s = [], []
    for row, truth in zip(probabilities_NC.tolist(), labels_NC.tolist(), strict=True):
        true = {c for c, label in enumerate(truth) if label}
        said = best(row, len(true))
        exact.append(said == true)
        f1s.append(2 * len(said & true) / (len(said) + len(true)))
    precisions = [
        slow_average_precision(probabilities_NC[:, c].tolist(), labels_NC[:, c].tolist())
        for c in range(labels_NC.shape[1]) if labels_NC[:, c].any()
    ]  # fmt: skip
    found = multi_label_figures(probabilities_NC, labels_NC)
    assert found["exact_match"] == pytest.approx(sum(exact) / len(exact))
    assert found["sample_f1"] == pytest.approx(sum(f1s) / len(f1s))
    if len(labels_NC) > 1:
        counts_N, classes = labels_NC.sum(1), labels_NC.shape[1]
        said_NC = torch.stack(
            [
                row.topk(int(n)).indices.bincount(minlength=classes)
                for row, n in zip(probabilities_NC - 1e-5 * torch.arange(classes), counts_N, strict=True)
            ]
        )
        each_N = multilabel_f1_score(
            said_NC[..., None], labels_NC[..., None].long(), classes, average="micro", multidim_average="samplewise"
        )
        assert found["sample_f1"] == pytest.approx(float(each_N.mean()), abs=1e-6)
    assert found["map"] == pytest.approx(sum(precisions) / len(precisions), abs=1e-5)
    for name in ("exact_match", "sample_f1", "map", "accuracy", "macro_f1"):
        low, high = found[f"{name}_interval"]
        assert 0 <= low <= high <= 1 + 1e-6


@given(scored_clips(), st.integers(0, 2**31))
def test_resampled_map_is_that_of_the_clips_repeated(clips, seed):
    probabilities_NC, labels_NC = clips
    rows_N = torch.randint(len(labels_NC), (len(labels_NC),), generator=torch.Generator().manual_seed(seed))
    drawn_RN = torch.bincount(rows_N, minlength=len(labels_NC))[None].float()
    repeated_NC, truth_NC = probabilities_NC[rows_N], labels_NC[rows_N]
    expected = [
        slow_average_precision(repeated_NC[:, c].tolist(), truth_NC[:, c].tolist())
        for c in range(labels_NC.shape[1]) if truth_NC[:, c].any()
    ]  # fmt: skip
    found_R = mean_average_precision_draws(probabilities_NC, labels_NC, drawn_RN)
    assert found_R.tolist() == pytest.approx([sum(expected) / len(expected)], abs=1e-5)


def test_a_clip_without_an_answer_is_said_to_have_no_label():
    answered_NC = torch.tensor([[0.0, 0, 0], [0.2, 0.3, 0.5]])
    found = multi_label_figures(answered_NC, torch.tensor([[1, 1, 0], [0, 0, 1]]))
    for name in ("accuracy", "exact_match", "sample_f1"):
        assert found[name] == 0.5
    assert found["macro_f1"] == pytest.approx(1 / 3)
    assert multi_label_figures(answered_NC[:0], torch.zeros(0, 3)) == figures(answered_NC[:0], torch.zeros(0)) == {}


def test_one_label_a_clip_is_the_common_case():
    generator = torch.Generator().manual_seed(1)
    probabilities_NC = torch.rand(40, 4, generator=generator).softmax(1)
    labels_N = torch.arange(40) % 4
    one, several = figures(probabilities_NC, labels_N), multi_label_figures(probabilities_NC, torch.eye(4)[labels_N])
    for name in ("accuracy", "macro_f1", "nll", "brier", "ece"):
        assert several[name] == pytest.approx(one[name], abs=1e-5)
    assert several["exact_match"] == several["accuracy"]


@pytest.fixture(scope="module")
def chords(tmp_path_factory) -> Path:
    """Two pure tones and both together: the third kind has two labels."""
    folder = tmp_path_factory.mktemp("chords")
    clips = []
    for split, count in (("train", 3), ("test", 2)):
        for number in range(count):
            for label in (("low",), ("high",), ("high", "low")):
                frequency = {("low",): 200, ("high",): 3000}.get(label, 900)
                path = tone(folder / split / f"{'-'.join(label)}{number}.wav", frequency, 0.4, number)
                clips.append(Clip(str(path), label, split))
    write_manifest(clips, folder / "clips.jsonl")
    return folder / "clips.jsonl"


def test_a_clip_is_an_example_of_each_of_its_labels(chords, tiny_lalm, tmp_path):
    data = AudioEpisodeDataModule(Manifest(str(chords)), Backbone(tiny_lalm), shots=None)
    data.setup()
    assert data.multi_label and data.classes == ["high", "low"]
    assert data.labels[data.usable("support")].sum(0).tolist() == [6, 6]
    alone = AudioEpisodeDataModule(
        Manifest(str(chords)), Backbone(tiny_lalm), shots=None, protocol="mcq", num_options=2
    )
    with pytest.raises(ValueError, match="2 options need 1 labels that it does not have"):
        alone.setup()


def test_fit_tells_what_several_labels_ask_for(chords, tiny_lalm, tmp_path, capsys):
    calm(
        "fit", "--data", "manifest", "--data.recipe.init_args.data_dir", chords, "--backbone", tiny_lalm,
        "--data.shots", "2", "--data.num_workers", "0", "--trainer.accelerator", "cpu", "--run_dir", tmp_path,
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("mAP %", "sample F1 %", "exact", "top-1", "calm_whitened"))
    results = json.loads((tmp_path / "results.json").read_text())
    methods = {"zero_shot", "sav", "grw", "calm", "calm_whitened", "calm_learned", "linear_probe"}
    assert results["methods"].keys() == methods and results["splits"]["test"] == 6
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    exact = [set(row["label"].split("|")) == set(row["prediction"].split("|")) for row in rows]
    assert sum(exact) / 6 == pytest.approx(results["methods"]["calm_learned"]["exact_match"])
    assert all(len(row["label"].split("|")) == len(row["prediction"].split("|")) for row in rows)
    assert (tmp_path / "report.html").is_file()
    used(chords, tmp_path, rows, capsys)
    streamed(chords, tmp_path, results)
    with pytest.raises(SystemExit, match="several labels, which compare cannot count"):
        calm("compare", "--data", "manifest", "--data.recipe.init_args.data_dir", chords, "--backbone", tiny_lalm,
             "--out", tmp_path / "compared")  # fmt: skip


def test_a_clip_without_labels_is_said_to_have_as_many_as_support_clips(tmp_path):
    clips = [Clip("a.wav"), Clip("b.wav", "x")]
    write_predictions(tmp_path / "said.csv", clips, ["x", "y", "z"], torch.tensor([[0.1, 0.6, 0.3]] * 2), 2)
    said = [row["prediction"] for row in csv.DictReader((tmp_path / "said.csv").open())]
    assert said == ["y|z", "y"]


def used(chords: Path, run: Path, tested: list[dict], capsys) -> None:
    """Its classifier says as many classes of a clip as support clips have on average, those of the test first."""
    train = [clip for clip in read_manifest(chords) if clip.split == "train"]
    support = [train[i] for i in draw_support(train, 2, 0)]
    average = CalmClassifier.from_pretrained(run).labels_per_clip
    assert average == sum(len(clip.labels) for clip in support) / len(support) > 1
    capsys.readouterr()
    calm("classify", run, *(row["path"] for row in tested))
    said = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [line["path"] for line in said] == [row["path"] for row in tested for _ in range(round(average))]
    first = {line["path"]: line["prediction"] for line in reversed(said)}
    assert [first[row["path"]] for row in tested] == [row["prediction"].split("|")[0] for row in tested]


def streamed(chords: Path, run: Path, kept: dict) -> None:
    """The same clips, in shards and without a store, give the same figures."""
    pytest.importorskip("webdataset")
    write_shards([clip for clip in read_manifest(chords) if clip.split == "test"], run / "shards", per_shard=4)
    calm(
        "test", "--ckpt_path", run / "checkpoints/last.ckpt", "--data", "shards", "--data.store", "none",
        "--data.recipe.init_args.data_dir", run / "shards", "--data.num_workers", "0", "--run_dir", run / "stream",
    )  # fmt: skip
    passed = json.loads((run / "stream" / "results.json").read_text())["methods"]
    assert passed.keys() == kept["methods"].keys()
    for name, known in kept["methods"].items():
        for figure in ("exact_match", "sample_f1", "accuracy"):
            assert passed[name][figure] == pytest.approx(known[figure]), (name, figure)


def test_the_best_map_is_in_bold():
    base = {name: 0.5 for name in ("sample_f1", "exact_match", "accuracy", "map")}
    base |= {f"{name}_interval": [0.4, 0.6] for name in base}
    results = {"dataset": "d", "backbone": "b", "shots": 1, "seed": 0, "protocol": "open",
               "methods": {"a": base, "b": {**base, "map": 0.6}}}  # fmt: skip
    assert next(iter(columns_of(results))) == "map"
    assert [row.style for row in results_table(results).rows] == ["", "bold"]
    assert outcome(results, "b") == "b 60.0 % mAP" and outcome({"methods": {"a": {"accuracy": 0.5}}}, "a") == "a 50.0 %"


def test_a_pseudo_label_that_a_clip_has_is_right(chords, tiny_lalm, tmp_path):
    train = [clip for clip in read_manifest(chords) if clip.split == "train" and len(clip.labels) == 2]
    given = [replace(clip, label=label) for clip, label in zip(train, ("high", "low", "low"), strict=True)]
    write_manifest(given, tmp_path / "pseudo.jsonl")
    data = AudioEpisodeDataModule(
        Manifest(str(chords)), Backbone(tiny_lalm), shots=None, pseudo_labels=str(tmp_path / "pseudo.jsonl")
    )
    data.setup()
    assert data.support_right == 3
