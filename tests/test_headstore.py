from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calm_pl.clip import Clip
from calm_pl.headstore import HeadStore, HeadStoreError, clip_key, file_digest, store_root
from calm_pl.headstore import store as store_module
from calm_pl.headstore.inventory import delete, list_stores, tidy

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


def test_a_store_of_another_format_is_another_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = HeadStore(KEY, tmp_path)
    old.write(["a"], heads(1))
    monkeypatch.setattr(store_module, "FORMAT", store_module.FORMAT + 1)
    new = HeadStore(KEY, tmp_path)
    assert new.folder != old.folder and new.missing(["a"]) == [0]
    with pytest.raises(HeadStoreError, match="of another format"):
        HeadStore.open(old.folder)


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


def test_a_shard_cut_after_a_look_at_its_header_is_found(tmp_path: Path) -> None:
    _, path = two_shards(tmp_path)
    reader = HeadStore(KEY, tmp_path)
    assert len(reader) == 3
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=path.name):
        assert reader.missing(["a", "b", "c"]) == [0, 1]


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
    store = HeadStore(KEY, tmp_path / "file" / "heads")
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
        with pytest.raises(HeadStoreError, match="you may not write to it"):
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


def test_a_file_where_a_store_should_be_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HeadStoreError, match=r"cannot be kept in .*file \(it is a file\).*CALM_STORE"):
        HeadStore(KEY, tmp_path / "file")
