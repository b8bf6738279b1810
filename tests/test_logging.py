"""Loggers by one word. W&B without a key or a network, read back by W&B's own reader; TensorBoard by its own; CSV."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile

from calm_pl.report.run import Prediction, Run
from calm_pl.run.logging import _mistakes_table
from tests.conftest import tone
from tests.test_run import calm, calm_process, options

ONLINE = {"WANDB_MODE": "online", "NETRC": "/nonexistent"}
NO_KEY = {**ONLINE, "WANDB_API_KEY": ""}
# A key, and a server that is not there: nothing listens on port 9.
NO_NETWORK = {**ONLINE, "WANDB_API_KEY": 40 * "0", "WANDB_BASE_URL": "http://127.0.0.1:9"}
FAST = ["--model.methods.calm_learned.init_args.steps", "2"]
ONE_FIGURE = """
import sys
import wandb
from calm_pl.run.logging import RunLogger
logger = RunLogger(save_dir=sys.argv[1], mode=sys.argv[2] or None, seconds_to_connect=2)
logger.log_metrics({"figure": 42})
wandb.finish()
"""


def records(folder: Path) -> list[dict[str, Any]]:
    """What W&B's own reader finds in the one offline run of a folder."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    read = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    assert read.returncode == 0, read.stderr
    return [json.loads(line) for line in read.stdout.splitlines()]


def history(kept: list[dict[str, Any]]) -> dict[str, Any]:
    """The last value of everything that was logged."""
    logged: dict[str, Any] = {}
    for record in kept:
        logged |= record.get("history", {}).get("item", {})
    return logged


@pytest.fixture(scope="module")
def wandb_run(tones, tiny_lalm, tmp_path_factory) -> Path:
    """A run with --logger wandb in a process without a key."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "run"
    arguments = options(tones, tiny_lalm, "--run_dir", folder, "--logger", "wandb", *FAST)
    fit = calm_process("fit", *arguments, HOME=str(home), **NO_KEY)
    assert fit.returncode == 0, fit.stderr
    assert "logged offline" in fit.stderr and "wandb sync" in fit.stderr
    return folder


def test_wandb_goes_offline_without_a_key(wandb_run):
    assert (wandb_run / "results.json").is_file()
    kept = records(wandb_run)
    assert kept[-1]["exit"]["exit_code"] == 0


def test_wandb_goes_offline_without_a_network(tmp_path):
    said = calm_process(str(tmp_path), "", program=ONE_FIGURE, HOME=str(tmp_path), **NO_NETWORK)
    assert said.returncode == 0, said.stderr
    assert "no connection to its server" in said.stderr and "logged offline" in said.stderr
    assert history(records(tmp_path))["figure"] == 42


@pytest.mark.parametrize(("mode", "runs"), [("offline", 1), ("disabled", 0)])
@pytest.mark.parametrize("by_option", [True, False])
def test_one_option_keeps_wandb_offline_or_off(tmp_path, mode, runs, by_option):
    """So does the environment; with a key, so that nothing else could be the reason."""
    env = {**NO_NETWORK, "WANDB_MODE": "online" if by_option else mode, "HOME": str(tmp_path)}
    said = calm_process(str(tmp_path), mode if by_option else "", program=ONE_FIGURE, **env)
    assert said.returncode == 0, said.stderr
    assert "no connection" not in said.stderr
    assert len(list(tmp_path.rglob("*.wandb"))) == runs


def test_wandb_holds_config_and_figures(wandb_run):
    kept = records(wandb_run)
    config: dict[str, Any] = {}
    for record in kept:
        config |= record.get("config", {}).get("update", {})
    assert config["data"]["shots"] == 2 and "calm_learned" in config["model"]["methods"]
    logged = history(kept)
    for name, figures in json.loads((wandb_run / "results.json").read_text())["methods"].items():
        for figure in ("accuracy", "macro_f1", "nll", "ece"):
            assert logged[f"test/{name}/{figure}"] == pytest.approx(figures[figure]), name
    assert {f"test/class_accuracy/{name}" for name in ("low", "middle", "high")} <= logged.keys()
    assert logged["support/loss"] > 0
    assert {logged[f"plots/{name}._type"] for name in ("heads", "heads-by-class", "confusion")} == {"image-file"}


def test_wandb_holds_mistakes_to_hear_confusion_and_classifier(wandb_run):
    predictions = list(csv.DictReader((wandb_run / "predictions.csv").open()))
    mistakes = [row for row in predictions if row["label"] != row["prediction"]]
    kept = records(wandb_run)
    assert history(kept)["mistakes.nrows"] == min(8, len(mistakes)) > 0
    artifacts = {record["artifact"]["name"]: record["artifact"] for record in kept if "artifact" in record}
    held = {
        name.rpartition("-")[2] if name.startswith("run-") else name.partition("-")[0]: {
            entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]
        }
        for name, artifact in artifacts.items()
    }
    assert held["classifier"].keys() == {"classifier.json", "classifier.safetensors"}
    sounds = [file for path, file in held["mistakes"].items() if path.endswith(".wav")]
    assert len(sounds) == min(8, len(mistakes))
    lengths = {round(soundfile.info(row["path"]).duration, 2) for row in mistakes}
    for sound in sounds:
        with sound.open("rb") as file:
            assert round(soundfile.info(file).duration, 2) in lengths
    (table,) = held["confusion_matrix_table"].values()
    counts = {(true, guess): count for true, guess, count in json.loads(table.read_text())["data"]}
    for pair in counts:
        assert counts[pair] == sum((row["label"], row["prediction"]) == pair for row in predictions)


def test_a_mistake_whose_sound_is_gone_stays_in_the_table(tmp_path):
    heard = [
        Prediction(str(tone(tmp_path / "there.wav", 300)), "low", "high", 0.6),
        Prediction(str(tmp_path / "gone.wav"), "low", "high", 0.9),
        Prediction(str(tmp_path / "right.wav"), "low", "low", 1.0),
    ]
    run = Run(tmp_path, {}, {}, heard, ["high", "low"], None)
    gone, there = _mistakes_table(run, 8).data
    assert gone == [None, "low", "high", 0.9, heard[1].path]
    assert there[1:] == ["low", "high", 0.6, heard[0].path] and there[0].durations([there[0]]) == [0.6]
    assert _mistakes_table(run, 1).data == [gone]


def test_nothing_unasked_goes_to_wandb(wandb_run):
    kinds = {record["type"] for record in records(wandb_run)}
    assert not kinds & {"output", "output_raw"}  # the screen
    sent = {path.name for path in wandb_run.glob("wandb/offline-run-*/files/*")}
    assert sent <= {"media", "wandb-metadata.json", "config.yaml", "wandb-summary.json"}


def test_wandb_sync_finds_the_run(wandb_run):
    sync = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", str(wandb_run / "wandb")],
        capture_output=True, text=True, timeout=120, env={**os.environ, **NO_KEY},
    )  # fmt: skip
    assert sync.returncode == 0, sync.stderr
    assert "Would sync 1 run(s)" in sync.stdout + sync.stderr


def test_two_processes_make_one_wandb_run(tones, tiny_lalm, tmp_path):
    arguments = options(tones, tiny_lalm, "--run_dir", tmp_path / "run", "--logger", "wandb")
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", *FAST]
    fit = calm_process("fit", *arguments, *two, **{**NO_KEY, "WANDB_MODE": "offline"})
    assert fit.returncode == 0, fit.stderr
    assert history(records(tmp_path / "run"))["mistakes.ncols"] == 5
    assert len(list(tmp_path.rglob("*.wandb"))) == 1


def test_figures_as_csv(tones, tiny_lalm, tmp_path):
    calm("fit", *options(tones, tiny_lalm, "--run_dir", tmp_path, "--logger", "csv", *FAST))
    rows = list(csv.DictReader((tmp_path / "logs" / "metrics.csv").open()))
    results = json.loads((tmp_path / "results.json").read_text())
    found = [float(row["test/calm/accuracy"]) for row in rows if row.get("test/calm/accuracy")]
    assert found == [pytest.approx(results["methods"]["calm"]["accuracy"])]
    assert not list(tmp_path.rglob("*.wandb"))


def test_figures_in_tensorboard(tones, tiny_lalm, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    calm("fit", *options(tones, tiny_lalm, "--run_dir", tmp_path, "--logger", "tensorboard", *FAST))
    events = reader.EventAccumulator(str(tmp_path / "logs")).Reload()
    results = json.loads((tmp_path / "results.json").read_text())
    for name, figures in results["methods"].items():
        (found,) = events.Scalars(f"test/{name}/accuracy")
        assert found.value == pytest.approx(figures["accuracy"]), name
    assert len(events.Scalars("support/loss")) == 2  # every step
