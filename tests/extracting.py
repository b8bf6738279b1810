"""Extractions for tests to start, here or in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import lightning as L
import torch

from calm_pl.backbone.spec import Backbone
from calm_pl.data.manifest import read_manifest
from calm_pl.headstore import HeadStore
from calm_pl.training.extraction import HeadExtraction, StoreWriter
from calm_pl.training.extraction_data import ClipDataModule

# Forks of a process that has imported everything and started nothing. There is one for all tests of a worker, and what
# it has imported is what was asked for last: no other file may ask.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "tests.extracting", "calm_pl.training.trainer", "calm_pl.run.folder", "calm_pl.training.module",
        "transformers.models.qwen2_audio.modeling_qwen2_audio", "hypothesis", "pytest",
    ]
)  # fmt: skip
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fill(
    folder: Path, model: str, root: Path, ready: Connection | None = None, batch_size: int = 2, **options: object
) -> None:
    """Extract the clips of a folder."""
    clips, backbone = read_manifest(folder), Backbone(model)
    store = HeadStore(backbone.store_key(), root)
    trainer = L.Trainer(callbacks=[StoreWriter(store)], **QUIET, **{"devices": 1, **options})
    data = ClipDataModule(clips, backbone, store, batch_size)
    if ready:
        ready.send_bytes(b".")
    trainer.predict(HeadExtraction(backbone), datamodule=data, return_predictions=False)


def in_process(function: Callable[..., None], *arguments: object) -> BaseProcess:
    process = PROCESSES.Process(target=function, args=arguments)
    process.start()
    return process


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


def in_two_ranks(function: Callable[..., None], *arguments: object) -> None:
    """Run a function in two processes of one torchrun job."""
    port = free_port()
    processes = [in_process(as_rank, rank, port, function, arguments) for rank in range(2)]
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0


def as_rank(rank: int, port: int, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    """What torchrun tells a process of itself."""
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    job = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in {**known, **job}.items()})
    torch.set_num_threads(1)
    function(*arguments)


def fill_in_two_ranks(folder: Path, model: str, root: Path, batch_size: int = 2) -> None:
    fill(folder, model, root, batch_size=batch_size, devices=2, strategy="ddp")


def stored(folder: Path, model: str, root: Path) -> torch.Tensor:
    clips = read_manifest(folder)
    store = HeadStore(Backbone(model).store_key(), root)
    return store.read(store.clip_keys(clips))


def trainer(**options: object) -> L.Trainer:
    return L.Trainer(**QUIET, **{"devices": 1, **options})
