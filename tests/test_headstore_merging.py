"""Several stores of one folder at once: what they write, merge and read."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calm_pl.headstore import HeadStore
from calm_pl.headstore import shard as shard_module
from calm_pl.headstore.index import ShardIndex
from calm_pl.headstore.store import MERGE_EVERY
from tests.test_headstore import KEY, heads, no_silent_warnings, shards

__all__ = ["no_silent_warnings"]  # holds here, too


def test_reader_follows_a_merge(tmp_path: Path) -> None:
    writer, reader = HeadStore(KEY, tmp_path), HeadStore(KEY, tmp_path)
    for index in range(4):
        writer.write([str(index)], heads(1, index))
    keys = ["3", "0", "2", "1"]
    before = reader.read(keys)
    writer.compact()
    assert len(shards(writer)) == 1
    assert torch.equal(reader.read(keys), before)


def test_a_clip_is_held_as_long_as_one_of_its_shards_is_there(tmp_path: Path) -> None:
    store = HeadStore(KEY, tmp_path)
    for seed in range(3):
        store.write(["a"], heads(1, seed))
    for seed, path in enumerate(shards(store)):
        assert torch.equal(store.read(["a"]), heads(1, seed).half().float())
        path.unlink()
        assert store.missing(["a"]) == ([0] if seed == 2 else [])


def test_a_listing_that_passed_a_merged_shard_over_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = HeadStore(KEY, tmp_path), HeadStore(KEY, tmp_path)
    for index in range(3):
        writer.write([str(index)], heads(1, index))
    assert reader.missing(["0", "1", "2"]) == []
    writer.compact()
    merged = shards(writer)
    listing, looks = os.scandir, []

    def hasty(folder: Any) -> Any:  # as a file system may answer while names come and go
        looks.append(folder)
        return listing(folder) if len(looks) > 3 else iter(())

    monkeypatch.setattr("calm_pl.headstore.index.os.scandir", hasty)
    assert reader.missing(["0", "1", "2"]) == [] and len(looks) == 4
    looks.clear()
    for path in merged:
        path.unlink()  # by a person: these will not come back
    assert reader.missing(["0", "1", "2"]) == [0, 1, 2]
    looks.clear()
    assert reader.missing(["0", "1", "2"]) == [0, 1, 2] and len(looks) == 1  # nor are they waited for again


def test_a_shard_that_goes_and_comes_back_while_it_is_opened_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HeadStore(KEY, tmp_path)
    store.write(["0"], heads(1))
    (path,) = shards(store)
    opened, away = shard_module.safe_open, tmp_path / "away"

    def late(*arguments: Any) -> Any:
        if away.exists():
            return opened(*arguments)
        path.rename(away)
        try:
            return opened(*arguments)
        finally:
            path.write_bytes(away.read_bytes())

    monkeypatch.setattr(shard_module, "safe_open", late)
    assert HeadStore(KEY, tmp_path).missing(["0"]) == []


def test_a_long_run_of_small_writes_leaves_few_files(tmp_path: Path) -> None:
    store = HeadStore(KEY, tmp_path)
    for index in range(200):
        store.write([str(index)], heads(1, index))
    assert len(shards(store)) < 40
    expected = torch.cat([heads(1, index) for index in range(200)]).half().float()
    assert torch.equal(HeadStore(KEY, tmp_path).read([str(index) for index in range(200)]), expected)


def test_a_writer_that_merges_keeps_what_another_wrote_before(tmp_path: Path) -> None:
    one, other = HeadStore(KEY, tmp_path), HeadStore(KEY, tmp_path)
    one.write(["first"], heads(1))
    other.write(["both"], heads(1, seed=1))
    one.write(["both"], heads(1, seed=2))
    index = 0
    while len(shards(one)) > 2:  # until its own shards are one
        one.write([str(index)], heads(1))
        index += 1
    assert torch.equal(one.read(["both"]), heads(1, seed=1).half().float())
    assert torch.equal(HeadStore(KEY, tmp_path).read(["both"]), one.read(["both"]))


class OnlyByKey(dict[str, Any]):
    """A dict that nobody may walk through."""

    def refuse(self, *_: object) -> Any:
        raise AssertionError("walked through the whole store")

    __iter__ = keys = values = items = clear = refuse  # type: ignore[assignment]


def test_a_write_looks_at_its_own_clips_however_many_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    HeadStore(KEY, tmp_path).write([f"old {index}" for index in range(5000)], heads(5000))
    store = HeadStore(KEY, tmp_path)
    assert len(store) == 5000
    index = store._index
    index._places = OnlyByKey(index._places)
    rows: list[int] = []
    add = ShardIndex.add
    monkeypatch.setattr(ShardIndex, "add", lambda self, shard: rows.append(len(shard.keys)) or add(self, shard))
    for step in range(MERGE_EVERY):
        store.write([f"{step}a", f"{step}b"], heads(2, step))
    assert len(shards(store)) == 2
    assert sum(rows) == 2 * MERGE_EVERY + 2 * MERGE_EVERY  # as written, and as merged
    assert torch.equal(store.read(["7a", "7b", "old 0"]), torch.cat([heads(2, 7), heads(5000)[:1]]).half().float())


def test_two_that_merge_the_same_shards_lose_nothing(tmp_path: Path) -> None:
    one, other = HeadStore(KEY, tmp_path), HeadStore(KEY, tmp_path)
    for index in range(3):
        one.write([str(index)], heads(1, index))
    first = shards(one)[0]
    first = first.rename(first.with_name(f"{first.name.split('-')[0]}-{'0' * 16}.safetensors"))  # sorts before a merge
    sources = {path: path.read_bytes() for path in shards(one)}
    assert len(other) == 3
    one.compact()
    for path, content in sources.items():  # `one` has written its merge and not yet deleted these
        path.write_bytes(content)
    other._index.merge([path.name for path in sources])
    assert first not in shards(one)
    for store in (one, other, HeadStore(KEY, tmp_path)):
        assert torch.equal(store.read(["0", "1", "2"]), torch.cat([heads(1, index) for index in range(3)]).half())


def test_a_merged_shard_would_survive_a_power_cut_before_its_sources_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HeadStore(KEY, tmp_path)
    for index in range(3):
        store.write([str(index)], heads(1, index))
    sources = shards(store)
    done: list[str] = []
    replace, fsync, unlink = os.replace, os.fsync, Path.unlink

    def renamed(source: Any, target: Any) -> None:
        replace(source, target)
        done.append("renamed")

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        done.append("folder synced" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file synced")

    def deleted(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if path in sources:
            done.append("source deleted")

    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "unlink", deleted)
    store.compact()
    assert done == ["file synced", "renamed", "folder synced", *["source deleted"] * 3]


def test_two_that_compact_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calm_pl.headstore.index.SHARD_BYTES", 2 * heads(1).half().nbytes)
    store, other = HeadStore(KEY, tmp_path), HeadStore(KEY, tmp_path)
    keys = [str(index) for index in range(8)]
    for index, key in enumerate(keys):
        store.write([key], heads(8)[index : index + 1])
    merge = ShardIndex.merge
    with monkeypatch.context() as patch:

        def others_first(index: ShardIndex, names: list[str]) -> None:
            merge(other._index, [path.name for path in shards(other)])
            merge(index, names)

        patch.setattr(ShardIndex, "merge", others_first)
        store.compact()
    assert torch.equal(store.read(keys), heads(8).half().float())


OPERATIONS = st.tuples(
    st.integers(0, 2),
    st.one_of(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4), st.sampled_from(["compact", "look"])),
)


@settings(max_examples=40, deadline=None)
@given(operations=st.lists(OPERATIONS, max_size=12))
def test_any_interleaving_of_writers_reads_back_what_was_written_first(operations: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as root:
        stores = [HeadStore(KEY, root, "float32") for _ in range(3)]
        first: dict[str, Tensor] = {}
        for step, (who, action) in enumerate(operations):
            if action == "compact":
                stores[who].compact()
            elif action == "look":
                stores[who].missing(list("abcdefgh"))
            else:
                vectors = heads(len(action), seed=step)
                stores[who].write(action, vectors)
                for key, vector in zip(action, vectors, strict=True):
                    first.setdefault(key, vector)
        for store in (*stores, HeadStore(KEY, root, "float32")):
            missing = store.missing(list("abcdefgh"))
            assert {"abcdefgh"[index] for index in missing} == set("abcdefgh") - set(first)
            if first:
                assert torch.equal(store.read(list(first)), torch.stack(list(first.values())))
