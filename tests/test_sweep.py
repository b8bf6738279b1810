"""Sweeps without a server: which points there are, that they are W&B's own, what is run again and what is not."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from calm_pl import cli
from calm_pl.backbone import spec
from calm_pl.commands import sweep as sweep_command
from calm_pl.commands.sweep import Point, default_folder, read_points
from calm_pl.conf import config_names, find_config
from calm_pl.training.module import CalmModule
from tests.conftest import ROOT
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


@pytest.mark.parametrize("logger", [["--logger", "wandb"], ["--logger=wandb"], ["--logger"]])
def test_the_servers_logger_is_left_out_however_it_is_written(tmp_path, logger):
    command = ["${program}", "fit", *logger, "--model.zero_shot=false", "${args}"]
    points = read_points(sweep_file(tmp_path, command=command))
    assert points[0].arguments == ("--model.zero_shot=false", "--data.shots=1", "--data.seed=3")


def test_the_shipped_files_follow_wandbs_own_schema():
    """By W&B's package `sweeps`, which its server uses; it wants an old numpy, so it is no dependency of the tests."""
    cfg = pytest.importorskip("sweeps.config.cfg")
    assert cfg.schema_violations_from_proposed_config({"method": "gird", "parameters": {"a": {"value": 1}}})
    for name in config_names("sweep"):
        assert cfg.schema_violations_from_proposed_config(yaml.safe_load(find_config("sweep", name).read_text())) == []


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
        ({"method": "annealing"}, r"method: annealing: choose grid, random or bayes"),
        (
            {"method": "random", "parameters": {"data.seed": {"distribution": "beta", "min": 0, "max": 5}}},
            r"data\.seed has distribution: beta",
        ),
        (
            {"method": "random", "parameters": {"data.seed": {"values": [0, 1], "probabilities": [1]}}},
            r"data\.seed has probabilities: \[1\] for 2 values",
        ),
        ({"program": "train.py"}, "does not run `calm fit`"),
        ({"parameters": {"data.seed": {"min": 0, "max": 5}}}, r"data\.seed has neither value nor values"),
    ],
)
def test_what_cannot_be_run_here_is_told(tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["sweep", str(sweep_file(tmp_path, **changes))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "is no sweep: it has no parameters"),
        ("program: calm", "is no sweep: it has no parameters"),
        ("a: [", "not YAML"),
        ("program: calm\nmethod: grid\nparameters: {data.shots: 5}", "data.shots is 5: give it value: or values:"),
        ("program: calm\nmethod: random\nparameters: {data.shots: 5}", "data.shots is 5: give it value: or values:"),
    ],
)
def test_files_that_are_no_sweep_are_told(tmp_path, text, message):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(SystemExit, match=message):
        cli.main(["sweep", str(tmp_path / "sweep.yaml")])


def test_what_the_file_varies_cannot_be_given_too(capsys):
    points = read_points(find_config("sweep", "shots"), ["--data.shots", "500"])
    assert "shots.yaml varies data.shots: what is given for it does not count" in capsys.readouterr().err
    assert all(
        point.arguments[-2:]
        == (f"--data.shots={point.parameters['data.shots']}", f"--data.seed={point.parameters['data.seed']}")
        for point in points
    )


def test_a_search_without_a_server_is_drawn_at_random(capsys):
    file = find_config("sweep", "bayes")
    points = read_points(file)
    assert "drawn at random" in capsys.readouterr().err
    assert len(points) == yaml.safe_load(file.read_text())["run_cap"]
    assert points == read_points(file)
    for key, about in yaml.safe_load(file.read_text())["parameters"].items():
        values = [point.parameters[key] for point in points]
        if "min" in about:
            assert all(about["min"] <= value <= about["max"] for value in values)
            middle = (about["min"] * about["max"]) ** 0.5
            assert 0.2 < sum(value < middle for value in values) / len(values) < 0.8  # uniform in the logarithm
        else:
            assert set(values) == set(about.get("values", [about.get("value")]))


@pytest.mark.parametrize("method", ["random", "grid"])
def test_points_that_repeat_are_run_once(tmp_path, capsys, method):
    parameters = {"data.shots": {"value": 2}, "data.seed": {"values": [0, 1, 0, 1, 0, 1, 0, 1]}}
    points = read_points(sweep_file(tmp_path, method=method, run_cap=8, parameters=parameters))
    assert sorted(point.name for point in points) == ["shots=2,seed=0", "shots=2,seed=1"]
    assert "small.yaml: 2 of its 8 points are left" in capsys.readouterr().err


def test_values_are_drawn_as_often_as_the_file_says(tmp_path):
    seeds = {"values": [0, 1, 2], "probabilities": [0.0, 0.9, 0.1]}
    parameters = {"data.seed": seeds, "data.options_seed": {"min": 0, "max": 10**9}}
    points = read_points(sweep_file(tmp_path, method="random", run_cap=1000, parameters=parameters))
    counts = Counter(point.parameters["data.seed"] for point in points)
    assert counts[0] == 0 and 860 < counts[1] < 940


def test_values_are_spelled_as_in_a_configuration(tmp_path):
    parameters = {
        "data.shots": {"values": [None]}, "data.letters": {"value": False}, "data.protocol": {"value": "open"},
        "model.methods.calm.init_args.grid": {"value": {"tau": [0.1, None]}},
    }  # fmt: skip
    (point,) = read_points(sweep_file(tmp_path, parameters=parameters))
    assert point.arguments[1:] == (
        "--data.shots=null", "--data.letters=false", "--data.protocol=open",
        '--model.methods.calm.init_args.grid={"tau": [0.1, null]}',
    )  # fmt: skip
    assert point.name.startswith("shots=null,letters=false,protocol=open,")
    config = parsed(*point.arguments[1:-1])
    assert config["data"]["shots"] is None and config["data"]["letters"] is False


def test_points_that_are_spelled_alike_have_folders_of_their_own(tmp_path):
    prompts = {"values": ["{question} Answer?", "{question} Answer!", "{question} Answer."]}
    file = sweep_file(tmp_path, parameters={"data.backbone.prompt": prompts})
    names = [point.name for point in read_points(file)]
    assert names[2] == "prompt=-question-Answer."  # as it is, where nothing else is called so
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"prompt=-question-Answer--[0-9a-f]{8}", name) for name in names[:2])
    assert names == [point.name for point in read_points(file)]


def test_unknown_sweeps_are_told():
    with pytest.raises(SystemExit, match=r"no such file, and no nothing\.yaml .* shipped are bayes, methods, shots"):
        cli.main(["sweep", "nothing"])


def test_names_and_folders_are_plain():
    assert Point({"a.b": "x/y z", "c": 1.5}, ()).name == "b=x-y-z,c=1.5"
    recipe = {"class_path": "calm_pl.data.recipes.Esc50"}
    config = {"data": {"recipe": recipe, "backbone": {"path": "Qwen/Qwen2-Audio-7B"}}}
    assert default_folder("shots", config) == Path("runs/sweep-shots-esc50-Qwen2-Audio-7B")
    recipe |= {"class_path": "calm_pl.data.recipes.Folder", "init_args": {"data_dir": "/my/birds"}}
    assert default_folder("shots", config) == Path("runs/sweep-shots-folder-birds-Qwen2-Audio-7B")


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
    assert "4 of 4 points" in said.stdout and "1 shot " in said.stdout
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
    for run in out.glob("shots=*"):
        assert {file.name for file in run.iterdir()} >= {
            "config.yaml", "results.json", "predictions.csv", "choices.json", "heads.json", "classifier", "checkpoints",
            "report.html", "plots",
        }  # fmt: skip
        assert (run / "plots" / "accuracy-over-shots.svg").is_file()
        assert '<h2 id="shots">Accuracy over shots</h2>' in (run / "report.html").read_text()


def test_the_backbone_is_loaded_once_for_heads_and_words_of_all_points(sweep):
    assert "loaded 1 times" in sweep[2].stdout


def test_finished_points_are_skipped_and_others_run(sweep, monkeypatch, capsys):
    """After a restart: one point lost its results, one was run with another setting; two are left alone."""
    arguments, out, _, home = sweep
    (out / "shots=1,seed=1" / "results.json").unlink()
    changed = out / "shots=2,seed=0" / "config.yaml"
    changed.write_text(changed.read_text().replace("steps: 2", "steps: 3"))
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/results.json")}
    monkeypatch.setenv("CALM_STORE", str(home / "heads"))
    monkeypatch.setattr(spec, "_loaded", {})
    assert cli.main(["sweep", *map(str, arguments)]) == 0
    said = capsys.readouterr().err
    assert "2 of 4 points are finished already" in said and "running points: 2 points" in said
    assert "loading tiny-random" not in said  # the head store holds every clip
    rerun = {file.parent.name for file in out.glob("*/results.json") if before.get(file) != file.stat().st_mtime_ns}
    assert rerun == {"shots=1,seed=1", "shots=2,seed=0"}


def figures(folder: Path) -> dict:
    """Every method's figures of a run."""
    return json.loads((folder / "results.json").read_text())["methods"]


def both(*commands: list[str | Path], cwd: Path, **env: str) -> list[subprocess.Popen[str]]:
    """Run commands side by side to their end."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1", **env}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for command in commands
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return started


def test_two_sweeps_at_once_do_each_point_once_and_find_the_same(sweep, tmp_path):
    arguments, alone, *_ = sweep
    command = ["-m", "calm_pl", "sweep", arguments[0], "--out", tmp_path / "out", *arguments[3:]]
    both(command, command, cwd=tmp_path, CALM_STORE=str(tmp_path / "heads"))
    for shots, seed in itertools.product((1, 2), (0, 1)):
        name = f"shots={shots},seed={seed}"
        assert figures(tmp_path / "out" / name) == figures(alone / name), name


def test_runs_of_several_ranks_have_processes_of_their_own(sweep, tmp_path):
    """What Lightning leaves in a process after one of them (here the extraction) would break the next (the point)."""
    arguments, alone, *_ = sweep
    file = sweep_file(tmp_path, parameters={"data.shots": {"value": 2}, "data.seed": {"value": 0}})
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--model.zero_shot", "false"]
    done = calm_process(
        "sweep", file, "--out", tmp_path / "out", *arguments[3:], *ranks, CALM_STORE=str(tmp_path / "h")
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 points" in done.stdout and "run folder" not in done.stdout
    found, expected = (figures(folder / "shots=2,seed=0") for folder in (tmp_path / "out", alone))
    assert found["sav"]["accuracy"] == expected["sav"]["accuracy"]


@pytest.mark.parametrize(("hears", "ended"), [("exit 3", 3), ("", -signal.SIGKILL)])
def test_a_run_of_several_ranks_ends_with_its_sweep(tmp_path, monkeypatch, hears, ended):
    """By itself where it hears a SIGTERM, so that it ends its ranks."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/bash\ntrap '{hears}' TERM\ntouch {tmp_path}/started\nwhile :; do sleep 0.05; done\n")
    program.chmod(0o755)
    begun = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if not begun:
                begun.append(self)
                while not (tmp_path / "started").exists():
                    time.sleep(0.01)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(sweep_command, "SECONDS_TO_STOP", 0.3)
    with pytest.raises(KeyboardInterrupt):
        sweep_command._run("fit", Point({}, ()), {"trainer": {"devices": 2, "num_nodes": 1}})
    assert begun[0].returncode == ended


# What `wandb agent` does with the points that its server sends: its own code, without the server.
AGENT = """
import queue, sys, yaml
from wandb.wandb_agent import Agent
sweep, point = (yaml.safe_load(open(file)) for file in sys.argv[1:])
agent = Agent(None, queue.Queue(), sweep_id="local")
agent._sweep_command = sweep["command"]
command = {"type": "run", "run_id": "point", "program": sweep["program"], "args": point}
answer = agent._process_command(command)
sys.exit(answer.get("exception") or agent._run_processes["point"].wait())
"""


def test_two_wandb_agents_on_one_store_find_what_one_process_finds(sweep, tmp_path):
    arguments, alone, *_ = sweep
    parts = ["${env}", "${program}", "fit", "--logger=wandb", "--model.zero_shot=false", *map(str, arguments[3:])]
    file = sweep_file(tmp_path, command=[*parts, "${args}"])
    commands = []
    for shots in (1, 2):
        point = tmp_path / f"{shots}.yaml"
        point.write_text(yaml.safe_dump({"data.shots": {"value": shots}, "data.seed": {"value": 0}}))
        commands.append(["-c", AGENT, file, point])
    home = {"HOME": str(tmp_path), "WANDB_MODE": "offline", "WANDB_SWEEP_ID": "local"}
    both(*commands, cwd=tmp_path, CALM_STORE=str(tmp_path / "heads"), **home)
    for shots in (1, 2):
        (run,) = (tmp_path / "runs").glob(f"folder-*-tiny-random-{shots}shot-seed0")
        for method, found in figures(run).items():  # of heads that went through the backbone in other batches
            expected = figures(alone / f"shots={shots},seed=0")[method]
            assert found["accuracy"] == expected["accuracy"], method
            assert found["macro_f1"] == expected["macro_f1"], method
        assert len(list(run.glob("wandb/offline-run-*-point/*.wandb"))) == 1


def test_a_failed_point_does_not_stop_the_others(tones, tiny_lalm, tmp_path, capsys):
    file = sweep_file(tmp_path, parameters={"data.shots": {"values": [40, 1]}})
    fast = ["--model.methods.calm_learned.init_args.steps", "2", "--trainer.enable_progress_bar", "false"]
    assert (
        cli.main(["sweep", str(file), "--out", str(tmp_path / "out"), *map(str, options(tones, tiny_lalm, *fast))]) == 1
    )
    said = capsys.readouterr()
    assert "shots=40 failed" in said.err and "1 of 2 points" in said.out


def test_a_stopped_point_stops_the_sweep(tones, tiny_lalm, tmp_path, monkeypatch, capsys):
    tried = []

    def stop(self):
        tried.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(CalmModule, "_fit_methods", stop)
    data = map(str, options(tones, tiny_lalm)[:6])
    before = signal.getsignal(signal.SIGINT)
    try:
        assert cli.main(["sweep", str(sweep_file(tmp_path)), *data, "--out", str(tmp_path / "out")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # which Lightning takes for itself
    assert len(tried) == 1 and "calm: stopped" in capsys.readouterr().err
