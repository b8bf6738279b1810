"""What else may lie in a head store's folder or befall it: foreign files, no room to tidy, other users, pruning."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from calm_pl.headstore import HeadStore, HeadStoreError, file_digest, index, inventory
from calm_pl.headstore.index import ShardIndex
from calm_pl.headstore.shard import Shard
from calm_pl.headstore.store import KEY_FILE
from tests.test_headstore import KEY, heads, two_shards


@pytest.mark.parametrize("kind", ["folder", "loop"])
def test_what_is_no_file_is_named_and_passed_over(tmp_path: Path, kind: str) -> None:
    store, _ = two_shards(tmp_path)
    odd = store.folder / "odd.safetensors"
    odd.mkdir() if kind == "folder" else odd.symlink_to(odd)
    with pytest.warns(UserWarning, match=f"cannot be read: {odd}"):
        assert HeadStore(KEY, tmp_path).missing(["a", "b", "c"]) == []


def test_what_passes_is_no_reason_to_compute_clips_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    two_shards(tmp_path)
    store = HeadStore(KEY, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many open files"):
        patch.setattr(Shard, "open", refuse)
        store.missing(["a", "b", "c"])
    assert store.missing(["a", "b", "c"]) == []


def test_without_room_to_tidy_everything_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = two_shards(tmp_path)
    before = sorted(store.folder.iterdir())

    def full(*_: object, **__: object) -> Shard:
        raise HeadStoreError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(index, "write_shard", full)
        store.compact()
    assert sorted(store.folder.iterdir()) == before and HeadStore(KEY, tmp_path).missing(["a", "b", "c"]) == []


def test_in_a_folder_with_the_sticky_bit_only_own_shards_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = two_shards(tmp_path)
    store.folder.chmod(0o1777)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    before = sorted(store.folder.iterdir())
    store.compact()
    assert sorted(store.folder.iterdir()) == before
    assert ShardIndex(store.folder, torch.float16)._removable() == []


def test_a_merged_shard_holds_no_more_clips_than_its_header_has_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = two_shards(tmp_path)
    monkeypatch.setattr(index, "BYTES_PER_KEY", index.SHARD_BYTES)
    store.compact()
    assert len(list(store.folder.glob("*.safetensors"))) == 2


def test_writing_goes_on_where_somebody_prunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = two_shards(tmp_path)
    monkeypatch.setattr(HeadStore, "prepare", pruned_after(HeadStore.prepare))
    store.write(["new"], heads(1))
    assert HeadStore(KEY, tmp_path).missing(["new"]) == []


def pruned_after(prepare):
    times = iter(range(100))

    def prepared(self: HeadStore) -> None:
        prepare(self)
        if next(times) == 0:
            shutil.rmtree(self.folder)

    return prepared


def test_a_store_that_goes_away_while_it_is_listed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = two_shards(tmp_path)
    monkeypatch.setattr(HeadStore, "__len__", lambda self: shutil.rmtree(self.folder) or 0)
    (found,) = inventory.list_stores(tmp_path)
    assert (found.folder, found.files) == (store.folder, 0)
    inventory.tidy(found)
    inventory.delete(found)


def test_a_torn_key_file_is_written_anew(tmp_path: Path) -> None:
    store, _ = two_shards(tmp_path)
    (store.folder / KEY_FILE).write_text('{"format": 1, "k')
    with pytest.raises(HeadStoreError, match="cannot be read"):
        HeadStore.open(store.folder)
    HeadStore(KEY, tmp_path).write(["new"], heads(1))
    assert HeadStore.open(store.folder).key == KEY


def test_a_renamed_store_is_told_its_name(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)[0].folder
    folder.rename(tmp_path / "copy")
    with pytest.raises(HeadStoreError, match=f"was renamed: .* {folder.name}"):
        HeadStore.open(tmp_path / "copy")


def test_a_stale_handle_is_a_deleted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = two_shards(tmp_path)
    path = next(store.folder.glob("*.safetensors"))

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("calm_pl.headstore.shard.safe_open", lambda *_: (_ for _ in ()).throw(RuntimeError("?")))
    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(FileNotFoundError):
        Shard.open(path, torch.float16)


def test_a_parent_of_a_link_is_that_of_where_it_leads(tmp_path: Path) -> None:
    for name in ("x.wav", "far/x.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "far" / "inner").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    digest = file_digest(f"{tmp_path}/link/../x.wav", tmp_path / "heads")
    assert digest == file_digest(tmp_path / "far" / "x.wav") != file_digest(tmp_path / "x.wav")
