"""Sweeps without a server: which points there are, that they are W&B's own, what is run again and what is not."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

from calm_pl import cli
from calm_pl.commands.sweep import Point, default_folder, read_points
from calm_pl.conf import config_names, find_config
from tests.test_configs import parsed
from tests.test_run import calm_process, options

GRID = {
    "program": "calm",
    "command": ["${env}", "${program}", "fit", "--logger=wandb", "--model.zero_shot=false", "${args}"],
    "method": "grid",
    "parameters": {"data.shots": {"values": [1, 2]}, "data.seed": {"value": 3}},
}


def sweep_file(folder: Path, **changes: object) -> Path:
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return file


def test_points_are_the_grid_in_order(tmp_path):
    points = read_points(sweep_file(tmp_path), ["--data", "esc10"])
    assert [point.name for point in points] == ["shots=1,seed=3", "shots=2,seed=3"]
    # The server's logger is left out here; everything else stays, and the parameters come last.
    assert points[1].arguments == ("--model.zero_shot=false", "--data", "esc10", "--data.shots=2", "--data.seed=3")


def test_wandb_agents_start_the_same_commands(tmp_path):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    for name in config_names("sweep"):
        sweep = yaml.safe_load(find_config("sweep", name).read_text())
        drawn = {key: {"value": about.get("values", [about.get("min", about.get("value"))])[0]}
                 for key, about in sweep["parameters"].items()}  # fmt: skip
        flags = create_sweep_command_args({"args": drawn})["args"]
        assert sweep["program"] == "calm" and sweep["command"][-1] == "${args}"
        if sweep["method"] == "grid":
            assert list(read_points(find_config("sweep", name))[0].arguments) == flags
        config = parsed(*flags)  # every parameter is one that `calm fit` knows
        for key, value in drawn.items():
            found = config
            for part in key.split("."):
                found = found[part]
            assert found == value["value"], key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "bayes"}, r"method: bayes: only a grid is known beforehand.*wandb sweep"),
        ({"program": "train.py"}, "does not run `calm fit`"),
        ({"parameters": {"data.seed": {"min": 0, "max": 5}}}, r"data\.seed has neither value nor values"),
    ],
)
def test_what_cannot_be_run_here_is_told(tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["sweep", str(sweep_file(tmp_path, **changes))])


def test_unknown_sweeps_are_told():
    with pytest.raises(SystemExit, match=r"no such file, and no nothing\.yaml .* shipped are bayes, methods, shots"):
        cli.main(["sweep", "nothing"])


def test_names_and_folders_are_plain():
    assert Point({"a.b": "x/y z", "c": 1.5}, ()).name == "b=x-y-z,c=1.5"
    config = {"data": {"recipe": {"class_path": "a.Esc50"}, "backbone": {"path": "Qwen/Qwen2-Audio-7B"}}}
    assert default_folder("shots", config) == Path("runs/sweep-shots-esc50-Qwen2-Audio-7B")


COUNT_LOADS = """
import sys
from calm_pl import cli
from calm_pl.backbone.lalm import FrozenLALM
loads, load = [], FrozenLALM.from_pretrained
FrozenLALM.from_pretrained = lambda path, **settings: loads.append(path) or load(path, **settings)
code = cli.main()
print("loaded", len(loads), "times")
sys.exit(code)
"""


@pytest.fixture(scope="module")
def sweep(tones, tiny_lalm, tmp_path_factory):
    """A sweep that ran in a process of its own: (its arguments, its folder, what it said)."""
    home = tmp_path_factory.mktemp("sweep")
    file = sweep_file(home, parameters={"data.shots": {"values": [1, 2]}, "data.seed": {"values": [0, 1]}})
    fast = ["--model.methods.calm_learned.init_args.steps", "2", "--trainer.enable_progress_bar", "false"]
    arguments = [file, "--out", home / "out", *options(tones, tiny_lalm, *fast)]
    done = calm_process("sweep", *arguments, program=COUNT_LOADS, CALM_STORE=str(home / "heads"))
    assert done.returncode == 0, done.stderr
    return arguments, home / "out", done, home


def test_a_sweep_leaves_runs_a_table_and_a_plot(sweep):
    _, out, said, _ = sweep
    assert "4 of 4 points" in said.stdout and "1 shots" in said.stdout
    assert re.search(r"running points: 4 points\n(.*\n)*shots=2,seed=1: calm_learned \d+\.\d %", said.stderr)
    assert said.stdout.count("run folder") == 0  # points show nothing of themselves
    for shots in (1, 2):
        for seed in (0, 1):
            results = json.loads((out / f"shots={shots},seed={seed}" / "results.json").read_text())
            assert (results["shots"], results["seed"]) == (shots, seed)
    rows = list(csv.DictReader((out / "comparison.csv").open()))
    accuracies = [
        json.loads((out / f"shots=1,seed={seed}" / "results.json").read_text())["methods"]["sav"]["accuracy"]
        for seed in (0, 1)
    ]
    (row,) = [row for row in rows if (row["method"], row["shots"]) == ("sav", "1")]
    assert float(row["accuracy"]) == pytest.approx(sum(accuracies) / 2) and row["runs"] == "2"
    assert (out / "plots" / "accuracy-over-shots.png").is_file() and (out / "comparison.html").is_file()


def test_the_backbone_is_loaded_once_for_heads_and_words_of_all_points(sweep):
    assert "loaded 1 times" in sweep[2].stdout


def test_finished_points_are_skipped_and_others_run(sweep, monkeypatch):
    """After a restart: one point lost its results, one was run with another setting; two are left alone."""
    arguments, out, _, home = sweep
    (out / "shots=1,seed=1" / "results.json").unlink()
    changed = out / "shots=2,seed=0" / "config.yaml"
    changed.write_text(changed.read_text().replace("steps: 2", "steps: 3"))
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/results.json")}
    again = calm_process("sweep", *arguments, CALM_STORE=str(home / "heads"))
    assert again.returncode == 0, again.stderr
    assert "2 of 4 points are finished already" in again.stderr and "running points: 2 points" in again.stderr
    assert "loading tiny-random" not in again.stderr  # the head store holds every clip
    rerun = {file.parent.name for file in out.glob("*/results.json") if before.get(file) != file.stat().st_mtime_ns}
    assert rerun == {"shots=1,seed=1", "shots=2,seed=0"}


def test_a_failed_point_does_not_stop_the_others(tones, tiny_lalm, tmp_path):
    file = sweep_file(tmp_path, parameters={"data.shots": {"values": [40, 1]}})
    fast = ["--model.methods.calm_learned.init_args.steps", "2", "--trainer.enable_progress_bar", "false"]
    done = calm_process("sweep", file, "--out", tmp_path / "out", *options(tones, tiny_lalm, *fast))
    assert done.returncode == 1
    assert "shots=40 failed" in done.stderr and "1 of 2 points" in done.stdout
