"""Loggers by one word: W&B without a key, read back from its own files; CSV; and nothing that was not asked for."""

from __future__ import annotations

import csv
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_run import calm_process, options

NO_KEY = {"WANDB_API_KEY": "", "WANDB_MODE": "online", "NETRC": "/nonexistent", "WANDB_SILENT": "true"}


def records(file: Path) -> Iterator[Any]:
    """What W&B's own file holds: records of its protocol in LevelDB's log format (32 KiB blocks)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (left := -position % 32768) and left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@pytest.fixture(scope="module")
def wandb_run(tones, tiny_lalm, tmp_path_factory) -> Path:
    """A run with --logger wandb in a process without a key."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "run"
    fit = calm_process(
        "fit", *options(tones, tiny_lalm, "--run_dir", folder, "--logger", "wandb"),
        "--model.methods.calm_learned.init_args.steps", "2", HOME=str(home), **NO_KEY,
    )  # fmt: skip
    assert fit.returncode == 0, fit.stderr
    assert "logged offline" in fit.stderr and "wandb sync" in fit.stderr
    return folder


def test_wandb_goes_offline_without_a_key(wandb_run):
    assert (wandb_run / "results.json").is_file()
    assert len(list(wandb_run.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_wandb_holds_config_metrics_media_and_classifier(wandb_run):
    (file,) = wandb_run.glob("wandb/offline-run-*/*.wandb")
    kept = list(records(file))
    results = json.loads((wandb_run / "results.json").read_text())
    config = {u.key: json.loads(u.value_json) for r in kept if r.HasField("run") for u in r.run.config.update}
    config |= {u.key: json.loads(u.value_json) for r in kept if r.HasField("config") for u in r.config.update}
    assert config["data"]["shots"] == 2 and "calm_learned" in config["model"]["methods"]

    logged: dict[str, Any] = {}
    for record in kept:
        for item in record.history.item:
            logged["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    for name, figures in results["methods"].items():
        assert logged[f"test/{name}/accuracy"] == pytest.approx(figures["accuracy"]), name
    assert {"test/class_accuracy/low", "test/class_accuracy/middle", "test/class_accuracy/high"} <= logged.keys()
    assert logged["plots/heads/_type"] == logged["plots/confusion/_type"] == "image-file"

    predictions = list(csv.DictReader((wandb_run / "predictions.csv").open()))
    mistakes = min(8, sum(row["label"] != row["prediction"] for row in predictions))
    artifacts = [r.artifact for r in kept if r.HasField("artifact")]
    held = {artifact.name: {entry.path for entry in artifact.manifest.contents} for artifact in artifacts}
    (model,) = [files for name, files in held.items() if name.startswith("classifier-")]
    (sounds,) = [files for name, files in held.items() if name.endswith("-mistakes")]
    assert model == {"classifier.json", "classifier.safetensors"}
    assert sum(path.endswith(".wav") for path in sounds) == logged["mistakes/nrows"] == mistakes


def test_wandb_itself_reads_the_run_back(wandb_run):
    sync = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", str(wandb_run / "wandb")],
        capture_output=True, text=True, timeout=120, env={**os.environ, **NO_KEY, "WANDB_SILENT": "false"},
    )  # fmt: skip
    assert sync.returncode == 0, sync.stderr
    assert "Would sync 1 run(s)" in sync.stdout + sync.stderr


def test_wandb_when_disabled_leaves_nothing(tones, tiny_lalm, tmp_path):
    arguments = options(tones, tiny_lalm, "--run_dir", tmp_path / "run", "--logger", "wandb")
    fit = calm_process(
        "fit", *arguments, "--model.methods.calm_learned.init_args.steps", "2", **{**NO_KEY, "WANDB_MODE": "disabled"}
    )
    assert fit.returncode == 0, fit.stderr
    assert not list(tmp_path.rglob("*.wandb"))


def test_two_processes_make_one_wandb_run(tones, tiny_lalm, tmp_path):
    arguments = options(tones, tiny_lalm, "--run_dir", tmp_path / "run", "--logger", "wandb")
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--model.methods.calm_learned.init_args.steps", "2"]
    fit = calm_process("fit", *arguments, *two, **{**NO_KEY, "WANDB_MODE": "offline"})
    assert fit.returncode == 0, fit.stderr
    assert len(list(tmp_path.rglob("*.wandb"))) == 1


def test_figures_as_csv(tones, tiny_lalm, tmp_path):
    fit = calm_process("fit", *options(tones, tiny_lalm, "--run_dir", tmp_path, "--logger", "csv"))
    assert fit.returncode == 0, fit.stderr
    rows = list(csv.DictReader((tmp_path / "logs" / "metrics.csv").open()))
    results = json.loads((tmp_path / "results.json").read_text())
    found = [float(row["test/calm/accuracy"]) for row in rows if row.get("test/calm/accuracy")]
    assert found == [pytest.approx(results["methods"]["calm"]["accuracy"])]
    assert not list(tmp_path.rglob("*.wandb"))
