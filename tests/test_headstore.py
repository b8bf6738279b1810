from __future__ import annotations

import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calm_pl.clip import Clip
from calm_pl.headstore import HeadStore, HeadStoreError, clip_key, file_digest, store_root
from calm_pl.headstore import shard as shard_module
from calm_pl.headstore import store as store_module
from calm_pl.headstore.index import ShardIndex
from calm_pl.headstore.inventory import delete, list_stores, tidy
from calm_pl.headstore.store import MERGE_EVERY

KEY = {"backbone": "tiny", "prompt": "What sound is this?"}
K, D = 3, 4


@pytest.fixture(autouse=True)
def no_silent_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def heads(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, K, D, generator=torch.Generator().manual_seed(seed))


def make_clips(folder: Path, count: int) -> list[Clip]:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        (folder / f"{index}.wav").write_bytes(random.Random(index).randbytes(64))
    return [Clip(str(folder / f"{index}.wav")) for index in range(count)]


def shards(store: HeadStore) -> list[Path]:
    return sorted(store.folder.glob("*.safetensors"))


# Round trip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_reads_back_what_was_written_in_the_order_asked(tmp_path: Path, dtype: str) -> None:
    vectors = heads(5)
    names = [f"decoder.0.self_attn.{head}" for head in range(K)]
    writer = HeadStore(KEY, tmp_path, dtype)
    writer.write(["a", "b", "c"], vectors[:3], names)
    writer.write(["d", "e"], vectors[3:].double(), names)
    for store in (writer, HeadStore(KEY, tmp_path, dtype), HeadStore.open(writer.folder)):
        assert store.missing(["x", "a", "e", "x"]) == [0]
        read = store.read(["e", "a", "d", "a"])
        assert read.dtype == torch.float32
        assert torch.equal(read, vectors[[4, 0, 3, 0]].to(getattr(torch, dtype)).float())
        assert (store.num_heads, store.head_dim, store.head_names) == (K, D, tuple(names))
        assert len(store) == 5


def test_reading_what_is_not_held_names_the_clips(tmp_path: Path) -> None:
    store = HeadStore(KEY, tmp_path)
    with pytest.raises(HeadStoreError, match="empty"):
        _ = store.num_heads
    clips = make_clips(tmp_path / "audio", 2)
    keys = store.clip_keys(clips)
    store.write(keys[:1], heads(1))
    with pytest.raises(HeadStoreError, match=r"1 of 2 clips.*audio/1\.wav"):
        store.read(keys)


def test_a_clip_listed_twice_is_computed_once(tmp_path: Path) -> None:
    store = HeadStore(KEY, tmp_path)
    assert store.missing(["a", "b", "a"]) == [0, 1]
    store.write(["a", "b", "a"], heads(3))
    assert torch.equal(store.read(["a"]), heads(3)[:1].half().float())


def test_refuses_what_it_could_not_give_back(tmp_path: Path) -> None:
    store = HeadStore(KEY, tmp_path)
    clips = make_clips(tmp_path / "audio", 3)
    keys = store.clip_keys(clips)
    vectors = heads(3)
    vectors[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"1\.wav are not finite"):
        store.write(keys, vectors)
    vectors[1, 2, 3] = 1e6
    with pytest.raises(ValueError, match=r"1\.wav are too large for float16.*bfloat16"):
        store.write(keys, vectors)
    store.write(keys, heads(3))
    with pytest.raises(ValueError, match="shape"):
        store.write(["d"], torch.zeros(1, K, D + 1))
    with pytest.raises(ValueError, match="shape"):
        store.write(["d"], heads(2))
    with pytest.raises(ValueError, match="2 head names"):
        store.write(["d"], heads(1), ["one", "two"])
    with pytest.raises(ValueError, match="float8"):
        HeadStore(KEY, tmp_path, "float8")
    assert len(store) == 3


def test_place_of_the_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALM_STORE", str(tmp_path / "variable"))
    assert HeadStore(KEY).folder.parent == tmp_path / "variable"
    assert HeadStore(KEY, tmp_path / "argument").folder.parent == tmp_path / "argument"
    monkeypatch.delenv("CALM_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert store_root().name == "heads"
    assert store_root().parent.name == "calm-pl"


def test_a_moved_store_keeps_what_it_holds(tmp_path: Path) -> None:
    HeadStore(KEY, tmp_path / "here").write(["a"], heads(1))
    (tmp_path / "here").rename(tmp_path / "there")
    assert HeadStore(KEY, tmp_path / "there").missing(["a"]) == []


# What changes a vector changes its key


@pytest.mark.parametrize("change", [{"prompt": "Which genre?"}, {"dtype": "bfloat16"}, {"files": "other"}])
def test_another_key_is_another_store(tmp_path: Path, change: dict[str, str]) -> None:
    HeadStore(KEY, tmp_path).write(["a"], heads(1))
    assert HeadStore(KEY | change, tmp_path).missing(["a"]) == [0]
    assert HeadStore(KEY, tmp_path, "float32").missing(["a"]) == [0]
    assert HeadStore(dict(reversed(KEY.items())), tmp_path).missing(["a"]) == []
    assert HeadStore(KEY | {"backbone": "another name"}, tmp_path).missing(["a"]) == []


def test_what_is_heard_or_asked_is_in_the_clip_key(tmp_path: Path) -> None:
    store = HeadStore(KEY, tmp_path)
    audio, other, video = (str(tmp_path / name) for name in ("a.wav", "b.wav", "v.mp4"))
    for path, content in ((audio, b"same"), (other, b"same"), (video, b"frames")):
        Path(path).write_bytes(content)
    variants = [
        Clip(audio),
        Clip(audio, start=1.0),
        Clip(audio, end=1.0),
        Clip(audio, question="Which bird?"),
        Clip(audio, options=("owl", "wren")),
        Clip(audio, options=("wren", "owl")),
        Clip(audio, video=video),
    ]
    keys = store.clip_keys(variants)
    assert len(set(keys)) == len(keys)
    same = [Clip(other), Clip(audio, label="owl", split="test", group="g"), Clip(audio, start=0.0)]
    assert set(store.clip_keys(same)) == {keys[0]}
    assert clip_key(Clip("in a tar"), file_digest(audio)) == keys[0]


def test_a_changed_file_is_missing_even_at_the_same_size(tmp_path: Path) -> None:
    store = HeadStore(KEY, tmp_path)
    clips = make_clips(tmp_path / "audio", 3)
    before = store.clip_keys(clips)
    path = Path(clips[1].audio)
    path.write_bytes(path.read_bytes()[::-1])
    after = store.clip_keys(clips)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_a_file_that_cannot_be_read_stays_missing(tmp_path: Path) -> None:
    store = HeadStore(KEY, tmp_path)
    (here,) = make_clips(tmp_path / "audio", 1)
    keys = store.clip_keys([here, Clip(str(tmp_path / "gone.wav"))])
    store.write(keys[:1], heads(1))
    assert store.missing(keys) == [1]


# Several stores at once


def test_reader_follows_a_merge(tmp_path: Path) -> None:
    writer, reader = HeadStore(KEY, tmp_path), HeadStore(KEY, tmp_path)
    for index in range(4):
        writer.write([str(index)], heads(1, index))
    keys = ["3", "0", "2", "1"]
    before = reader.read(keys)
    writer.compact()
    assert len(shards(writer)) == 1
    assert torch.equal(reader.read(keys), before)


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


OPERATIONS = st.tuples(
    st.integers(0, 2),
    st.one_of(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4), st.sampled_from(["compact", "look"])),
)


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


# Damage


def two_shards(root: Path) -> tuple[HeadStore, Path]:
    store = HeadStore(KEY, root)
    store.write(["a", "b"], heads(2), ["x", "y", "z"])
    store.write(["c"], heads(1, seed=1), ["x", "y", "z"])
    return store, shards(store)[0]


def assert_found(root: Path, damaged: Path) -> None:
    store = HeadStore(KEY, root)
    with pytest.warns(UserWarning, match=damaged.name):
        assert store.missing(["a", "b", "c"]) == [0, 1]
    assert damaged.with_name(damaged.name + ".corrupt").exists()
    assert torch.equal(store.read(["c"]), heads(1, seed=1).half().float())


def test_a_flip_of_any_byte_is_found(tmp_path: Path) -> None:
    _, path = two_shards(tmp_path)
    sound = path.read_bytes()
    for offset in range(len(sound)):
        damaged = bytearray(sound)
        damaged[offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        assert_found(tmp_path, path)


def test_a_shard_cut_anywhere_is_found(tmp_path: Path) -> None:
    _, path = two_shards(tmp_path)
    sound = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        assert_found(tmp_path, path)


def test_damaged_clips_are_written_again(tmp_path: Path) -> None:
    store, path = two_shards(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="corrupt"):
        missing = store.missing(["a", "b", "c"])
    store.write([["a", "b", "c"][index] for index in missing], heads(2))
    assert torch.equal(HeadStore(KEY, tmp_path).read(["a", "b"]), heads(2).half().float())


def test_damage_found_while_reading_falls_back_on_a_duplicate(tmp_path: Path) -> None:
    store, path = two_shards(tmp_path)
    store.write(["a", "b"], heads(2, seed=2))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    reader = HeadStore(KEY, tmp_path)
    with pytest.warns(UserWarning, match=path.name):
        assert torch.equal(reader.read(["a", "b"]), heads(2, seed=2).half().float())


def test_a_merge_does_not_spread_damage(tmp_path: Path) -> None:
    store, path = two_shards(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=path.name):
        store.compact()
    assert store.missing(["a", "b", "c"]) == [0, 1]


def test_what_killed_writers_left_is_ignored_and_removed_after_a_day(tmp_path: Path) -> None:
    store, _ = two_shards(tmp_path)
    young, old = store.folder / ".tmp-young", store.folder / ".tmp-old"
    for path in (young, old):
        path.write_bytes(b"half a sha")
    os.utime(old, (0, 0))
    again = HeadStore(KEY, tmp_path)
    assert len(again) == 3
    again.write(["d"], heads(1))
    assert young.exists()
    assert not old.exists()


def test_a_place_that_is_no_folder_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = HeadStore(KEY, tmp_path / "file")
    for attempt in (store.prepare, lambda: store.write(["a"], heads(1))):
        with pytest.raises(HeadStoreError, match=r"cannot be kept in .*file.* set CALM_STORE"):
            attempt()


def test_a_store_that_may_not_be_written_to_is_read_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HeadStore(KEY, tmp_path)
    for key in "ab":
        store.write([key], heads(1))
    # Whoever runs the tests may be allowed everything.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    before = shards(store)
    again = HeadStore(KEY, tmp_path)
    again.compact()
    assert shards(store) == before and again.missing(["a", "b"]) == []
    with pytest.raises(HeadStoreError, match="permission denied.* set CALM_STORE"):
        again.prepare()
    info = list_stores(tmp_path)[0]
    for change in (tidy, delete):
        with pytest.raises(HeadStoreError, match="permission denied"):
            change(info)
    assert shards(store) == before


def test_a_file_that_goes_away_while_others_are_hashed_stays_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = make_clips(tmp_path, 2)
    hashed = store_module.file_digests

    def late(files: list[str], root: Path) -> list[str]:
        Path(clips[0].audio).unlink(missing_ok=True)
        return hashed(files, root)

    monkeypatch.setattr(store_module, "file_digests", late)
    store = HeadStore(KEY, tmp_path / "heads")
    assert store.missing(store.clip_keys(clips)) == [0, 1]


def test_a_store_opens_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HeadStore(KEY, tmp_path)
    store.write(["a"], heads(1))
    monkeypatch.chdir(tmp_path)
    assert HeadStore.open(Path(store.folder.name)).missing(["a"]) == []
