"""Head stores under processes that run at once, are killed, or find no room."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calm_pl.clip import Clip
from calm_pl.headstore import HeadStore, HeadStoreError
from tests.extracting import PROCESSES, in_process
from tests.test_headstore import KEY, heads, make_clips, shards, two_shards


def hear(path: str) -> Tensor:
    """Stands for a backbone: a function of the file's bytes."""
    return heads(1, seed=int.from_bytes(Path(path).read_bytes()[:6], "big"))


def extract(root: Path, clips: Sequence[Clip], batch_size: int, report: Connection | None = None) -> None:
    store = HeadStore(KEY, root)
    keys = store.clip_keys(clips)
    missing = store.missing(keys)
    for begin in range(0, len(missing), batch_size):
        batch = missing[begin : begin + batch_size]
        vectors = torch.cat([hear(clips[index].audio) for index in batch])
        if report:
            report.send_bytes(b".")
        store.write([keys[index] for index in batch], vectors)


def write_all(root: Path, clips: Sequence[Clip], seed: int) -> None:
    order = random.Random(seed).sample(list(clips), len(clips))
    extract(root, order, batch_size=4)


def test_two_processes_write_the_same_set_while_others_merge_and_read(tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "audio", 300)
    root = tmp_path / "store"
    writers = [in_process(write_all, root, clips, seed) for seed in (1, 2)]
    reader, merger = HeadStore(KEY, root), HeadStore(KEY, root)
    keys = reader.clip_keys(clips)
    vectors = torch.cat([hear(clip.audio) for clip in clips]).half().float()
    rounds = 0
    while any(writer.is_alive() for writer in writers) or rounds == 0:
        held = sorted(set(range(len(keys))) - set(reader.missing(keys)))
        merger.compact()
        if held:
            assert torch.equal(reader.read([keys[index] for index in held]), vectors[held])
        rounds += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert torch.equal(reader.read(keys), vectors)
    merger.compact()
    assert len(shards(merger)) == 1
    assert torch.equal(reader.read(keys), vectors)
    assert len(HeadStore(KEY, root)) == len(clips)


def test_killed_at_twenty_random_moments_then_resumed(tmp_path: Path) -> None:
    chance = random.Random(0)
    clips = make_clips(tmp_path / "audio", 20 * 42)
    for _ in range(20):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = in_process(extract, tmp_path / "killed", clips, 1, sender)
        for _ in range(chance.randint(1, 40)):
            receiver.recv_bytes()
        time.sleep(chance.uniform(0, 0.003))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    extract(tmp_path / "killed", clips, batch_size=16)
    extract(tmp_path / "unbroken", clips, batch_size=16)
    killed, unbroken = (HeadStore(KEY, tmp_path / name) for name in ("killed", "unbroken"))
    keys = killed.clip_keys(clips)
    assert killed.missing(keys) == []
    assert killed.read(keys).numpy().tobytes() == unbroken.read(keys).numpy().tobytes()
    assert killed.verify() == 0


def open_without_descriptors(root: Path, answer: Connection) -> None:
    store = HeadStore(KEY, root)
    store.missing(["a"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(OSError, match="Too many open files"):
        store.read(["a"])
    os.close(held.pop())  # enough to list the folder, but opening a shard needs two
    with pytest.raises((OSError, HeadStoreError), match="Too many open files"):
        HeadStore(KEY, root).missing(["a"])
    answer.send("refused twice")


def test_a_shard_that_cannot_be_opened_is_no_damage(tmp_path: Path) -> None:
    two_shards(tmp_path)
    receiver, sender = PROCESSES.Pipe(duplex=False)
    in_process(open_without_descriptors, tmp_path, sender).join()
    assert receiver.poll()
    assert receiver.recv() == "refused twice"
    assert HeadStore(KEY, tmp_path).missing(["a", "b", "c"]) == []


# A full disk


def write_beyond(root: Path, limit: int | None, answer: Connection) -> None:
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    store = HeadStore(KEY, root)
    store.write(["small"], torch.zeros(1, 64, 64))
    try:
        store.write([f"clip {index}" for index in range(200)], torch.ones(200, 64, 64))
    except HeadStoreError as error:
        answer.send(str(error))


def assert_refused(root: Path, limit: int | None) -> None:
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = in_process(write_beyond, root, limit, sender)
    process.join()
    assert receiver.poll()
    message = receiver.recv()
    store = HeadStore(KEY, root)
    assert str(store.folder) in message
    assert "CALM_STORE" in message
    assert int(message.split(" bytes needed")[0].split()[-1].replace(",", "")) > 200 * 64 * 64 * 2
    assert sorted(path.suffix for path in store.folder.iterdir()) == [".json", ".safetensors"]
    assert store.missing(["small", "clip 0"]) == [1]


def test_a_file_size_limit_leaves_nothing_behind(tmp_path: Path) -> None:
    assert_refused(tmp_path, limit=100_000)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        assert_refused(disk, limit=None)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
