"""`test_fold: all`: every fold once, each clip tested once, means with intervals, and nothing done twice."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest
import yaml

from calm_pl.data.recipes import Esc50
from calm_pl.report.run import Run
from calm_pl.run.finished import is_finished
from calm_pl.run.folds import average, folds_of
from tests.conftest import tone
from tests.test_run import calm


@pytest.fixture(scope="module")
def esc50(tmp_path_factory) -> Path:
    """Two classes, two recordings of each in every fold, laid out as ESC-50 is."""
    folder = tmp_path_factory.mktemp("esc50")
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for target, (category, frequency) in enumerate((("sea_waves", 300), ("siren", 2000))):
            for take in "AB":
                source = 1000 * fold + 10 * target + ord(take)
                name = f"{fold}-{source}-{take}-{target}.wav"
                lines.append(f"{name},{fold},{target},{category},True,{source},{take}")
                seconds = 6.0 if fold == 3 and take == "A" else 0.4  # the window is 5 s
                tone(folder / "audio" / name, frequency, seconds, source)
    (folder / "meta").mkdir()
    (folder / "meta/esc50.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def all_folds(esc50, tiny_lalm, tmp_path_factory) -> tuple[Path, list[str | Path]]:
    place = tmp_path_factory.mktemp("run")
    arguments: list[str | Path] = [
        "fit", "--data", "esc50", "--data.recipe.init_args.data_dir", esc50, "--data.recipe.init_args.test_fold", "all",
        "--backbone", tiny_lalm, "--data.shots", "2", "--data.num_workers", "0", "--model", "formula",
        "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        with pytest.warns(UserWarning, match="longer than the model's window") as told:
            calm(*arguments)
    said = [str(warning.message) for warning in told if "longer than" in str(warning.message)]
    assert len(said) == 1 and said[0].startswith("2 of 20 clips")
    # Not where one fold alone would lie.
    return place / "runs" / "esc50-tiny-random-2shot-seed0-all-folds", arguments


def of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_every_clip_is_tested_once(all_folds, esc50):
    folder, _ = all_folds
    tested = [row["path"] for row in csv.DictReader((folder / "predictions.csv").open())]
    assert sorted(tested) == sorted(map(str, (esc50 / "audio").iterdir()))
    assert of(folder)["splits"] == {"support": 4, "test": 20}
    assert of(folder)["cut"] == 2 and of(folder / "fold3")["cut"] >= 2


def test_figures_are_means_with_intervals_over_folds(all_folds):
    folder, _ = all_folds
    results, folds = of(folder), [of(folder / f"fold{number}") for number in range(1, 6)]
    for name, figures in results["methods"].items():
        accuracies = [fold["methods"][name]["accuracy"] for fold in folds]
        assert figures["accuracy"] == pytest.approx(statistics.fmean(accuracies))
        half = 2.7764 * statistics.stdev(accuracies) / 5**0.5  # Student's t, 4 degrees of freedom
        low, high = figures["accuracy_interval"]
        mean = figures["accuracy"]
        assert (low, high) == pytest.approx((max(0, mean - half), min(1, mean + half)), abs=1e-3)
        assert [fold[name] for fold in results["folds"].values()] == accuracies
    assert "interval over folds" in (folder / "report.html").read_text()
    assert Run.read(folder).kept == "calm_whitened"


def test_finished_folds_are_not_run_again(all_folds, capsys):
    folder, arguments = all_folds
    before = of(folder)
    (folder / "fold4" / "results.json").unlink()  # as a kill would leave it
    capsys.readouterr()
    calm(*arguments, "--run_dir", folder)
    said = capsys.readouterr().out
    assert "fold 4: " in said and said.count("fold ") == 1 and "interval over 5 folds" in said
    assert of(folder)["methods"] == before["methods"]


def test_another_question_is_asked_of_every_fold(all_folds):
    folder, _ = all_folds
    config = yaml.safe_load((folder / "fold1" / "config.yaml").read_text())
    assert is_finished(folder / "fold1", {**config, "run_dir": "elsewhere"})
    assert not is_finished(folder / "fold1", {**config, "data": {**config["data"], "shots": 1}})


def test_results_without_their_configuration_are_found_anew(tmp_path):
    results, config = tmp_path / "results.json", tmp_path / "config.yaml"
    for written, done in ((results, False), (config, True)):
        written.write_text("{}")
        assert is_finished(tmp_path, {}) is done
    results.unlink()
    assert not is_finished(tmp_path, {})


def test_a_method_that_a_fold_lacks_is_not_averaged():
    fold = {"methods": {"calm": {"accuracy": 0.5}, "sav": {"accuracy": 0.4}}, "splits": {"support": 2, "test": 3},
            "timing": {}, "skipped": []}  # fmt: skip
    other = {**fold, "methods": {"calm": {"accuracy": 0.7}}, "skipped": [{"audio": "a.wav", "reason": "broken"}]}
    found = average({"fold1": fold, "fold2": other})
    assert list(found["methods"]) == ["calm"] and found["splits"]["test"] == 6 and len(found["skipped"]) == 1


def test_only_all_means_all():
    assert folds_of(Esc50(test_fold=2)) == []
    assert folds_of(Esc50(test_fold="all")) == [1, 2, 3, 4, 5]
