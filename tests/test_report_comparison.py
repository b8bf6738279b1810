"""Runs side by side: what is one observation, which runs share a table, and what counts once. Runs are made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from calm_pl.report.comparison import Comparison, Row, by_method


def run_folder(
    folder: Path, accuracy: float = 0.5, seed: int = 0, config: dict[str, Any] | None = None, **results: Any
) -> Path:
    """A finished run of one method. ``config``: settings by their dotted names."""
    folder.mkdir(parents=True)
    content = {
        "dataset": "sounds", "backbone": "tiny", "protocol": "open", "shots": 5, "seed": seed,
        "num_classes": 2, "num_heads": 4, "head_dim": 4, "splits": {"support": 10, "test": 6}, "skipped": [],
        "methods": {"calm": {"accuracy": accuracy}}, **results,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(content))
    nested: dict[str, Any] = {}
    for name, value in {"model.classifier": "calm", "data.seed": seed, **(config or {})}.items():
        *groups, last = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(nested))
    return folder


def of_fold(folder: Path, fold: int | str, accuracy: float, seed: int = 0, **results: Any) -> Path:
    return run_folder(folder, accuracy, seed, {"data.recipe.init_args.test_fold": fold}, **results)


def only_row(comparison: Comparison) -> Row:
    ((row,),) = comparison.rows.values()
    return row


def test_folds_of_one_seed_are_one_observation(tmp_path):
    folders = [of_fold(tmp_path / str(fold), fold, 0.4 + fold / 10) for fold in range(1, 6)]
    comparison = Comparison(folders)
    row = only_row(comparison)
    assert row.mean == pytest.approx(0.7) and row.half_width != row.half_width  # one seed has no interval
    comparison.write(tmp_path / "out")
    (line,) = csv.DictReader((tmp_path / "out" / "comparison.csv").open())
    assert (line["runs"], line["seeds"], line["low"]) == ("5", "1", "")


def test_the_interval_is_over_means_of_seeds(tmp_path):
    folders = [
        of_fold(tmp_path / f"{seed}-{fold}", fold, 0.3 + seed / 10 + fold / 10, seed)
        for seed in range(3)
        for fold in (1, 2)
    ]
    row = only_row(Comparison(folders))
    assert row.mean == pytest.approx(0.55)
    assert row.half_width == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=0.01)  # Student's t, 2 degrees of freedom


def test_random_splits_of_one_seed_are_one_observation(tmp_path):
    """The recipe's seed chooses the test clips, as a fold does."""
    folders = [
        run_folder(
            tmp_path / str(split),
            0.5 + split / 10,
            config={"data.recipe.init_args.seed": split, "data.recipe.init_args.test_fraction": 0.3},
        )
        for split in range(3)
    ]
    row = only_row(Comparison(folders))
    assert row.values == pytest.approx([0.6])


def test_a_run_of_all_folds_stands_for_single_ones(tmp_path):
    whole = of_fold(tmp_path / "all", "all", 0.6, folds={"fold1": {"calm": 0.5}, "fold2": {"calm": 0.7}})
    folders = [whole, of_fold(whole / "fold1", 1, 0.5), of_fold(tmp_path / "other", 1, 0.9, seed=1)]
    row = only_row(Comparison(folders))
    assert row.values == pytest.approx([0.6, 0.9]) and row.runs == 2


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("data.recipe.init_args.data_dir", ["/data/birds", "/data/cars"]),
        ("data.recipe.init_args.seed", [0, 1]),  # without test_fraction it makes the sounds, and is no draw
        ("data.recipe.init_args.test_fraction", [0.3, 0.5]),
        ("data.recipe.class_path", ["mine.Birds", "mine.Cars"]),
        ("data.backbone.path", ["/models/a/tiny", "/models/b/tiny"]),
        ("trainer.precision", ["32-true", "bf16-true"]),
    ],
)
def test_other_data_models_and_precisions_never_share_a_table(tmp_path, name, values):
    folders = [run_folder(tmp_path / str(n), seed=n, config={name: value}) for n, value in enumerate(values)]
    assert [question.settings for question in Comparison(folders).rows] == [
        f"{name.rpartition('.')[2]}={value}" for value in values
    ]


@pytest.mark.parametrize("name", ["data.recipe.init_args.data_dir", "data.backbone.path"])
def test_one_folder_by_several_paths_is_one(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path)
    paths = ["here", str(tmp_path / "here"), f"{tmp_path}/here/", "link"]
    folders = [run_folder(tmp_path / str(n), seed=n, config={name: path}) for n, path in enumerate(paths)]
    assert len(only_row(Comparison(folders)).values) == 4


def test_settings_are_told_apart_within_a_data_set_alone(tmp_path):
    folders = [
        run_folder(tmp_path / data, config={"data.recipe.init_args.data_dir": f"/{data}"}, dataset=data)
        for data in ("birds", "cars")
    ]
    assert [str(question) for question in Comparison(folders).rows] == ["birds · tiny · open", "cars · tiny · open"]


def test_what_labelled_the_clips_is_told_beside_the_method(tmp_path):
    given: list[dict[str, Any]] = [
        {"data.pseudo_labels": None},
        {"data.pseudo_labels": "/a.jsonl"},
        {"data.pseudo_labels": "/b.jsonl"},
        {"data.pseudo_labels": "/b.jsonl", "data.by_confidence": True},
    ]
    folders = [
        run_folder(
            tmp_path / str(n), n / 10, n, config, **({"pseudo_labels": {}} if config["data.pseudo_labels"] else {})
        )
        for n, config in enumerate(given)
    ]
    (rows,) = Comparison(folders).rows.values()
    assert {row.method: row.mean for row in rows} == {
        "calm": 0.0,
        "calm, pseudo-labels /a.jsonl": 0.1,
        "calm, pseudo-labels /b.jsonl": 0.2,
        "calm, pseudo-labels /b.jsonl, by confidence": 0.3,
    }


def test_a_run_that_is_named_twice_counts_once(tmp_path, monkeypatch):
    run_folder(tmp_path / "one")
    (tmp_path / "link").symlink_to("one")
    monkeypatch.chdir(tmp_path)
    comparison = Comparison(["one", "one/", tmp_path / "one", "link"])
    assert only_row(comparison).runs == len(comparison.runs) == 1


def test_two_folders_of_one_draw_count_once_and_are_told(tmp_path, capsys):
    first, again, other = (of_fold(tmp_path / str(n), 1 + n // 2, 0.5 + n / 10) for n in range(3))
    comparison = Comparison([first, again, other])
    assert only_row(comparison).values == pytest.approx([0.6]) and len(comparison.runs) == 2
    assert f"{again} is left out: {first} is of the same shots, seed and fold" in capsys.readouterr().err


def test_runs_of_several_labels_a_clip_are_compared_by_map(tmp_path):
    """By which their methods are ranked: the one that is better by the most probable class comes second."""
    methods = {"calm": {"accuracy": 0.9, "map": 0.4}, "sav": {"accuracy": 0.5, "map": 0.6}}
    folders = [run_folder(tmp_path / str(shots), shots=shots, methods=methods) for shots in (1, 5)]
    comparison = Comparison(folders)
    assert [list(by_method(rows)) for rows in comparison.rows.values()] == [["sav", "calm"]]
    assert [table.caption for table in comparison.tables()] == ["mAP %, mean ± half of its 95 % interval over seeds"]
    page = comparison.write(tmp_path / "out").read_text()
    assert "mAP on test clips" in page and "its mAP %" in page and "mAP over labelled clips" in page
    assert "60.0" in page and "90.0" not in page and "ccuracy" not in page
    lines = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert {line["method"]: float(line["map"]) for line in lines} == {"calm": 0.4, "sav": 0.6}
    assert "accuracy" not in lines[0]
    assert "mAP, %" in (tmp_path / "out" / "plots" / "map-over-shots.svg").read_text()


def test_map_and_accuracy_have_columns_of_their_own(tmp_path):
    one = run_folder(tmp_path / "one", 0.5)
    several = run_folder(tmp_path / "several", dataset="chords", methods={"calm": {"accuracy": 0.9, "map": 0.4}})
    Comparison([one]).write(tmp_path / "out")
    header = "dataset,backbone,protocol,settings,shots,method,runs,seeds,accuracy,low,high"
    assert (tmp_path / "out" / "comparison.csv").read_text().splitlines()[0] == header
    page = Comparison([one, several]).write(tmp_path / "out").read_text()
    assert "accuracy and mAP on test clips" in page and "Accuracy in %" in page and "mAP in %" in page
    lines = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert [(line["accuracy"], line["map"]) for line in lines] == [("0.5", ""), ("", "0.4")]


@pytest.mark.parametrize("length", [1, 300])
def test_every_question_has_a_plot_of_its_own(tmp_path, length):
    """However long its settings are, and though they differ only in letters that a file's name does not have."""
    prompts = [f"{{question}} {'a' * length}{mark}" for mark in "?!"]
    folders = [
        run_folder(tmp_path / f"{n}-{shots}", config={"data.backbone.prompt": prompt}, shots=shots)
        for n, prompt in enumerate(prompts)
        for shots in (1, 5)
    ]
    Comparison(folders).write(tmp_path / "out")
    assert len(list((tmp_path / "out" / "plots").glob("*.svg"))) == 2
