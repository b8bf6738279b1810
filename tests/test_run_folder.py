"""A run folder belongs to one question: what may stand in it, what may replace it, and from where it is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from calm_pl.run.cli import checkpoint_arguments, dataset_name
from calm_pl.run.finished import is_finished
from calm_pl.run.folder import remove_findings
from calm_pl.training.module import CHECKPOINT_KEY
from tests.test_run import calm, options

FORMULA = ("--model", "formula", "--model.zero_shot", "false")


@pytest.fixture
def finished(tones, tiny_lalm, tmp_path, monkeypatch) -> Path:
    """A run whose data was named by a path from the folder above it."""
    monkeypatch.chdir(tones.parent)
    calm("fit", *options(Path(tones.name), tiny_lalm, "--run_dir", tmp_path / "run", *FORMULA))
    return tmp_path / "run"


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "wrong", [("--data.backbone.heads", "decodr"), ("--data.backbone.layers", "[99]"), ("--data.shots", "1000")]
)
def test_a_fit_that_cannot_begin_leaves_what_an_earlier_one_found(finished, tones, tiny_lalm, wrong):
    before = files(finished)
    with pytest.raises(SystemExit):
        calm("fit", *options(tones, tiny_lalm, "--run_dir", finished, *FORMULA, *wrong))
    assert files(finished) == before


def test_a_fit_with_other_settings_takes_away_the_checkpoint_too(finished, tones, tiny_lalm, monkeypatch):
    (finished / "on-esc10").mkdir()
    (finished / "checkpoints" / "epoch=3.ckpt").touch()
    monkeypatch.setenv("HOME", str(tones.parent))
    calm("fit", *options(Path("~", tones.name), tiny_lalm, "--run_dir", finished, *FORMULA, "--data.seed", "1"))
    assert [file.name for file in (finished / "checkpoints").iterdir()] == ["last.ckpt"]
    assert not (finished / "on-esc10").exists()
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["data"]["recipe"]["init_args"]["data_dir"] == str(tones)


def test_a_fit_that_goes_on_from_a_checkpoint_of_the_run_keeps_it(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    (tmp_path / "results.json").touch()
    remove_findings(tmp_path, but=checkpoint)
    assert list(files(tmp_path)) == ["checkpoints/last.ckpt"]
    remove_findings(tmp_path, but=tmp_path.parent / "of another run.ckpt")
    assert not checkpoint.exists()


def test_files_that_no_run_wrote_are_not_replaced(tones, tiny_lalm, tmp_path):
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(SystemExit, match="has results.json, but no config.yaml"):
        calm("fit", *options(tones, tiny_lalm, "--run_dir", tmp_path, *FORMULA))
    assert files(tmp_path) == {"results.json": b"mine"}


def test_a_run_is_tested_from_any_folder(finished, tones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (finished / "results.json").unlink()
    calm("test", "--ckpt_path", finished)
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["data"]["recipe"]["init_args"]["data_dir"] == str(tones)
    assert (finished / "results.json").is_file()


@pytest.mark.parametrize(("option", "value"), [("--data.shots", "1"), ("--data.seed", "7")])
def test_a_test_cannot_have_other_shots_than_the_fit(finished, option, value):
    before = (finished / "results.json").read_bytes()
    with pytest.raises(SystemExit, match=f"the checkpoint was fitted with {option}"):
        calm("test", "--ckpt_path", finished, option, value)
    assert (finished / "results.json").read_bytes() == before


def test_clips_that_were_learned_from_are_not_tested(finished, tones, tmp_path):
    for place in ("moved", "mixed"):
        shutil.copytree(tones, tmp_path / place)
    learned = next((tmp_path / "mixed" / "train" / "low").iterdir())
    shutil.copy(learned, tmp_path / "mixed" / "test" / "low")  # of copies it is warned
    shutil.copy(learned, tmp_path / "mixed" / "test" / "low" / "9.wav")
    before = (finished / "results.json").read_bytes()
    calm("test", "--ckpt_path", finished, "--data.recipe.init_args.data_dir", tmp_path / "moved")
    assert (finished / "results.json").read_bytes() == before and (finished / "on-folder-moved/report.html").is_file()
    calm("test", "--ckpt_path", finished, "--data.recipe.init_args.data_dir", tmp_path / "mixed")
    test, train = (tmp_path / "mixed" / part for part in ("test", "train"))
    test.rename(tmp_path / "mixed" / "between")
    train.rename(test)
    (tmp_path / "mixed" / "between").rename(train)
    assert {"on-folder-moved", "on-folder-mixed"} <= {path.name for path in finished.iterdir()}
    with pytest.raises(SystemExit, match=r"of the 12 test clips are support clips of the checkpoint, such as .*test/"):
        calm("test", "--ckpt_path", finished, "--data.recipe.init_args.data_dir", tmp_path / "mixed")


def test_every_folder_of_sounds_has_a_run_of_its_own(tmp_path):
    own = "calm_pl.data.recipes.Folder"
    assert dataset_name(own, str(tmp_path / "my birds")) == "folder-my-birds"
    assert dataset_name("calm_pl.data.recipes.Manifest", "sets/frogs.jsonl") == "manifest-frogs"
    assert dataset_name("calm_pl.data.recipes.Synthetic", None) == "synthetic"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The least that a run can be tested from."""
    recipe = {"class_path": "calm_pl.data.recipes.Folder", "init_args": {"data_dir": "sounds"}}
    config = yaml.safe_dump({"data": {"recipe": recipe, "shots": 2}, "run_dir": "where it was", "test_after_fit": True})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save({CHECKPOINT_KEY: {"config": config}}, tmp_path / "run" / "checkpoints" / "last.ckpt")
    return tmp_path / "run" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    ("recipe", "place"), [("", "run"), ("recipe: {class_path: calm_pl.data.recipes.Synthetic}", "run/on-synthetic")]
)
def test_a_file_that_names_another_data_set_is_told_from_one_that_names_none(checkpoint, tmp_path, recipe, place):
    (tmp_path / "data.yaml").write_text(f"shots: 3\n{recipe}")
    given = ["--ckpt_path", str(checkpoint.parents[1]), "--data", str(tmp_path / "data.yaml")]
    command, option, kept, *rest = checkpoint_arguments(["test", *given])
    assert (command, option, rest) == ("test", "--config", ["--ckpt_path", str(checkpoint), *given[2:]])
    config = yaml.safe_load(Path(kept).read_text())
    assert config["run_dir"] == str(tmp_path / place) and "test_after_fit" not in config


@pytest.mark.parametrize("option", [["--config", "mine.yaml"], ["-c", "mine.yaml"], ["--config=mine.yaml"]])
def test_a_configuration_that_is_given_is_not_mixed_with_that_of_the_checkpoint(checkpoint, option):
    apart = ["--config", "mine.yaml"] if "=" in option[0] else option
    found = checkpoint_arguments(["test", *option, f"--ckpt_path={checkpoint.parents[1]}"])
    assert found == ["test", *apart, "--ckpt_path", str(checkpoint)]


def test_a_path_is_the_same_from_wherever_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sounds", "others", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/results.json").write_text(json.dumps({}))
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"data": {"data_dir": str(tmp_path / "sounds")}}))
    assert is_finished(tmp_path / "run", {"data": {"data_dir": "sounds"}})
    assert not is_finished(tmp_path / "run", {"data": {"data_dir": "others"}})
