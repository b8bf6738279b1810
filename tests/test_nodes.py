"""Two "nodes" on this machine, under torchrun and under SLURM: the same store and the same figures as one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment

from calm_pl.backbone.spec import Backbone
from calm_pl.data.recipes import Folder
from calm_pl.headstore import HeadStore
from calm_pl.training.extraction import ExtractingTrainer, HeadExtraction, StoreWriter
from calm_pl.training.extraction_data import ClipDataModule
from tests.extracting import QUIET, free_port, stored

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=0")
PYTHON = (sys.executable,)
NODES = ("--trainer.strategy", "ddp", "--trainer.devices", "1", "--trainer.num_nodes", "2")


def start(
    launcher: tuple[str, ...], tones: Path, model: str, folder: Path, *more: str, **env: object
) -> subprocess.Popen:
    command = [
        *launcher, "-m", "calm_pl", "fit", "--data", "folder", "--data.recipe.init_args.data_dir", tones,
        "--backbone", model, "--data.shots", "null", "--data.num_workers", "0", "--data.batch_size", "2",
        "--data.store", folder / "heads", "--run_dir", folder / "run", "--trainer.accelerator", "cpu", *more,
    ]  # fmt: skip
    given = {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "localhost", **env}
    environment = {**os.environ, **{name: str(value) for name, value in given.items()}}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen) -> list[str]:
    """What they printed, once all have ended well."""
    try:
        told = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, told, strict=True):
        assert process.returncode == 0, text
    return told


def figures(folder: Path) -> dict[str, float]:
    """By method and figure; without the intervals, which follow from the same clips."""
    methods = json.loads((folder / "run" / "results.json").read_text())["methods"]
    return {
        f"{method} {figure}": value
        for method, known in methods.items()
        for figure, value in known.items()
        if isinstance(value, float)
    }


@pytest.fixture(scope="module")
def alone(tones, tiny_lalm, tmp_path_factory) -> Path:
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "run").mkdir()
    (folder / "run" / "hpc_ckpt_1.ckpt").touch()
    finish(start(PYTHON, tones, tiny_lalm, folder))
    return folder


def assert_same(alone: Path, folder: Path, tones: Path, model: str) -> None:
    assert torch.equal(*(stored(tones, model, root / "heads") for root in (folder, alone)))
    assert figures(folder) == pytest.approx(figures(alone), abs=1e-3)


def test_two_nodes_of_torchrun(alone, tones, tiny_lalm, tmp_path):
    meeting = (
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{free_port()}",
        "--rdzv-id=test",
        "--local-addr=localhost",
    )
    nodes = [
        start((*TORCHRUN, *meeting, f"--node-rank={rank}"), tones, tiny_lalm, tmp_path, *NODES) for rank in range(2)
    ]
    told = finish(*nodes)
    assert_same(alone, tmp_path, tones, tiny_lalm)
    assert sum("reading heads" in text for text in told) == 1  # rank 0 speaks for all
    assert sum("2 nodes of 1 processes: each waits for all others" in text for text in told) == 1


def test_two_nodes_of_slurm(alone, tones, tiny_lalm, tmp_path):
    job = {
        "SLURM_JOB_ID": 4711, "SLURM_JOB_NAME": "calm", "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost", "SLURM_NNODES": 2, "SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1,
        "SLURM_LOCALID": 0, "MASTER_PORT": free_port(),
    }  # fmt: skip
    told = finish(
        *(
            start(PYTHON, tones, tiny_lalm, tmp_path, *NODES, **job, SLURM_PROCID=rank, SLURM_NODEID=rank)
            for rank in range(2)
        )
    )
    assert_same(alone, tmp_path, tones, tiny_lalm)
    assert sum("reading heads" in text for text in told) == 1


class TakenOffItsNode(L.Callback):
    """What SLURM sends before the time is up, after the first batch."""

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_job_taken_off_its_node_is_queued_again_and_leaves_no_checkpoint_of_an_extraction(
    tones, tiny_lalm, tmp_path, monkeypatch
):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    for name, value in {**job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    backbone, clips = Backbone(tiny_lalm), Folder(str(tones)).clips()
    store = HeadStore(backbone.store_key(), tmp_path / "heads")
    trainer = ExtractingTrainer(
        default_root_dir=tmp_path,
        callbacks=[StoreWriter(store), TakenOffItsNode()],
        plugins=[SLURMEnvironment()],
        **QUIET,
    )
    trainer.predict(HeadExtraction(backbone), datamodule=ClipDataModule(clips, backbone, store, batch_size=2))
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert not list(tmp_path.rglob("*.ckpt"))
    assert len(store) == len(clips)


def test_what_an_interrupted_job_left_to_start_from_goes_when_the_run_is_done(alone):
    assert [file.name for file in (alone / "run").rglob("*.ckpt")] == ["last.ckpt"]
