"""`make train DATASET=...` on a miniature of every data set, by the very command that the Makefile runs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from calm_pl.data.recipes import RECIPES, synthetic
from calm_pl.data.recipes.sounds import SOUNDS
from calm_pl.report import page
from calm_pl.training.results import columns_of
from tests.conftest import ROOT
from tests.miniatures import MINIATURES
from tests.test_run import calm

ELSEWHERE = {"synthetic", "hf", "shards"}  # made on the spot, from a package that may be missing, and no files


def make_train(dataset: str, data_dir: Path, run_dir: Path, tiny_lalm: str, *more: str) -> dict:
    """What `make train` does after installing; the report, the same for every set, is left out."""
    arguments = ["--model formula --data.num_workers 0 --trainer.accelerator cpu", *more]
    command = ["make", "-n", "--no-print-directory", "train", f"DATASET={dataset}", f"DATA_DIR={data_dir}",
               f"RUN_DIR={run_dir}", "SHOTS=1",
               f"BACKBONE={tiny_lalm}", f"ARGS={' '.join(arguments)}"]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    planned = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    line = planned.replace("\\\n", " ").splitlines()[-1]
    program, *given = shlex.split(line)
    assert program.endswith("/calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write_report", lambda folder: folder)
        calm(*given)
    return json.loads((run_dir / "results.json").read_text())


def test_no_data_set_is_left_out():
    assert MINIATURES.keys() | ELSEWHERE == RECIPES.keys()


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.filterwarnings("ignore:gtzan")
@pytest.mark.parametrize("dataset", sorted(MINIATURES))
def test_make_train(dataset, tiny_lalm, tmp_path, capsys):
    data_dir = MINIATURES[dataset](tmp_path / "data")
    results = make_train(dataset, data_dir, tmp_path / "run", tiny_lalm)
    assert results["dataset"] == dataset and results["shots"] == 1
    assert results["splits"]["test"] >= 2 and results["skipped"] == []
    figures = results["methods"]["calm_whitened"]
    assert all(name in figures for name in columns_of(results))
    assert "calm_whitened" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_train_on_the_built_in_sounds(tiny_lalm, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SOUNDS", {label: SOUNDS[label] for label in ("water drip", "bouncing ball")})
    monkeypatch.setattr(synthetic, "TRAIN", 1)
    monkeypatch.setattr(synthetic, "TEST", 1)
    assert make_train("synthetic", tmp_path / "data", tmp_path / "run", tiny_lalm)["num_classes"] == 2


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_spoofing_is_told_by_attack(tiny_lalm, tmp_path, capsys):
    data_dir = MINIATURES["asvspoof2019_la"](tmp_path / "data")
    results = make_train("asvspoof2019_la", data_dir, tmp_path / "run", tiny_lalm)
    table = results["attacks"]["calm_whitened"]
    assert {attack: row["clips"] for attack, row in table.items()} == {"A07": 2, "A19": 2}
    low, high = results["methods"]["calm_whitened"]["eer_interval"]
    assert 0 <= low <= results["methods"]["calm_whitened"]["eer"] <= high <= 1
    shown = capsys.readouterr().out
    assert "EER % by attack" in shown and "A19" in shown


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_the_papers_lists_ask_for_each_label(tiny_lalm, tmp_path):
    data_dir = MINIATURES["audioset"](tmp_path / "data")
    several = make_train("audioset", data_dir, tmp_path / "open", tiny_lalm)
    asked = "--data.protocol mcq --data.num_options 2 --data.within_options true"
    one = make_train("audioset", data_dir, tmp_path / "mcq", tiny_lalm, asked)
    assert {"map", "exact_match", "sample_f1"} <= several["methods"]["calm_whitened"].keys()
    assert several["splits"]["test"] == 6 and one["splits"]["test"] == 8  # two test clips have two labels
    assert "map" not in one["methods"]["calm_whitened"]
    assert (one["protocol"], one["num_options"], one["within_options"]) == ("mcq", 2, True)


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_shards_say_how_they_are_used(tiny_lalm, tmp_path):
    tarfile.open(tmp_path / "clips-0.tar", "w").close()
    with pytest.raises(SystemExit, match="fit on files"):
        make_train("shards", tmp_path, tmp_path / "run", tiny_lalm)
