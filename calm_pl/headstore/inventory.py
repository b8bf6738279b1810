"""What lies under the root of the head stores, and what may go."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calm_pl.headstore.files import HeadStoreError, remove_abandoned, store_root
from calm_pl.headstore.shard import CORRUPT_SUFFIX
from calm_pl.headstore.store import KEY_FILE, HeadStore, is_store_name


@dataclass(frozen=True)
class StoreInfo:
    """One store's folder. `store` is None where its key file cannot be read, and `problem` says why."""

    folder: Path
    store: HeadStore | None
    problem: str
    clips: int
    files: int
    size: int  # bytes
    last_use: float  # seconds since the epoch

    @property
    def backbone(self) -> str:
        return str(self.store.key.get("backbone", "-")) if self.store is not None else "-"


def list_stores(root: str | Path | None = None) -> list[StoreInfo]:
    """Every store under the root, the one used last first."""
    folders = [path for path in store_root(root).glob("*") if is_store_name(path.name) and path.is_dir()]
    return sorted((_info(folder) for folder in folders), key=lambda info: -info.last_use)


def _info(folder: Path) -> StoreInfo:
    store, problem, clips, last_use = None, "", 0, 0.0
    try:
        store = HeadStore.open(folder)
        clips = len(store)
    except HeadStoreError as error:
        problem = str(error)
    sizes: list[int] = []
    files: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # somebody prunes
        files = list(folder.iterdir())
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            sizes.append(file.stat().st_size)
    with contextlib.suppress(FileNotFoundError):
        last_use = (folder / KEY_FILE).stat().st_mtime
    return StoreInfo(folder, store, problem, clips, len(sizes), sum(sizes), last_use)


def least_recently_used(stores: Sequence[StoreInfo], max_size: int) -> list[StoreInfo]:
    """The stores to delete so that the others take at most `max_size` bytes together."""
    doomed: list[StoreInfo] = []
    total = sum(info.size for info in stores)
    for info in sorted(stores, key=lambda info: info.last_use):
        if total <= max_size:
            break
        doomed.append(info)
        total -= info.size
    return doomed


def tidy(info: StoreInfo) -> None:
    """Delete corrupt shards that were set aside and what killed writers left, and merge small shards.

    Raises:
        HeadStoreError: the folder cannot be written to.
    """
    _check_writable(info.folder)
    for file in info.folder.glob(f"*{CORRUPT_SUFFIX}"):
        file.unlink(missing_ok=True)
    remove_abandoned(info.folder)
    if info.store is not None:
        info.store.compact()


def delete(info: StoreInfo) -> None:
    """Delete a whole store.

    Raises:
        HeadStoreError: the folder cannot be written to.
    """
    _check_writable(info.folder)
    with contextlib.suppress(FileNotFoundError):  # somebody else deletes it at this moment
        shutil.rmtree(info.folder)


def _check_writable(folder: Path) -> None:
    if folder.exists() and not os.access(folder, os.W_OK):
        raise HeadStoreError(f"{folder} is left as it is: you may not write to it.")
