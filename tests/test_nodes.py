"""Two "nodes" on this machine, under torchrun and under SLURM: the same store and the same figures as one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_extraction import stored

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=0")
PYTHON = (sys.executable,)
NODES = ("--trainer.strategy", "ddp", "--trainer.devices", "1", "--trainer.num_nodes", "2")


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


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
