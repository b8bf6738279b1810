"""Which shard of a folder holds which clip, kept right while other processes write, merge and delete shards.

Tensor suffixes: N clips, K heads, D head dimension.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from calm_pl.headstore.files import HeadStoreError
from calm_pl.headstore.shard import SUFFIX, CorruptShardError, Shard, set_aside, write_shard

SHARD_BYTES = 64 << 20
BYTES_PER_KEY = 100  # in a shard's header, which safetensors limits to 100 MB
# Of a file that is no shard, or not for us; what else may happen passes, and is no reason to compute clips again.
UNREADABLE = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP}


class ShardLostError(Exception):
    """A shard went away or was set aside while it was being used; what it held may be elsewhere."""


LOOKS = 20  # at a folder that others merge shards in


class ShardIndex:
    """Clip key -> shard and row. Of shards with the same clip, the one whose name sorts first counts."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self.corrupt: set[str] = set()  # remembered because a read-only folder goes on showing them
        self._shards: dict[str, Shard] = {}
        self._places: dict[str, tuple[str, int]] = {}
        self._gone: set[str] = set()  # clips whose shards went away
        self._others: dict[str, list[tuple[str, int]]] = {}  # places that do not count while `_places` has a better one

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def any_shard(self) -> Shard | None:
        return next(iter(self._shards.values()), None)

    def refresh(self) -> None:
        """Learn of shards written, merged or deleted since the last look; only headers are read.

        Where shards went away meanwhile, others may be merging them into one that this look came too early for, or
        that a listing of the folder, which is no snapshot, passed over.
        """
        for _ in range(LOOKS):
            lost = self._look()
            self._gone = {key for key in self._gone if key not in self}
            if not lost and not self._gone:
                return
        self._gone = set()  # deleted, and not merged

    def _look(self) -> bool:
        """Read the folder once; whether shards had gone away, before or while it was read."""
        try:
            found = {entry.name for entry in os.scandir(self.folder) if entry.name.endswith(SUFFIX)}
        except FileNotFoundError:
            found = set()
        gone = self._shards.keys() - found
        if gone:
            self._gone |= self._forget(gone)
        new = sorted(found - self._shards.keys() - self.corrupt)
        for name in new:
            with contextlib.suppress(ShardLostError), self._losing(name):
                self.add(Shard.open(self.folder / name, self.dtype))
        return bool(gone) or any(name not in self._shards and name not in self.corrupt for name in new)

    def add(self, shard: Shard) -> None:
        """Count on a shard that lies in the folder."""
        name = shard.path.name
        self._forget([name])
        self._shards[name] = shard
        for row, key in enumerate(shard.keys):
            place = (name, row)
            if key in self._places:
                best, other = sorted([self._places[key], place])
                self._others.setdefault(key, []).append(other)
                place = best
            self._places[key] = place

    def gather(self, keys: Sequence[str], heads_NKD: Tensor) -> None:
        """Copy the clips' head outputs into `heads_NKD`, in the order of the keys, all of which are held.

        Raises:
            ShardLostError: refresh and look again.
        """
        for name, held in self._by_shard(keys).items():
            with self._losing(name):
                positions, rows = zip(*held, strict=True)
                heads_NKD[torch.tensor(positions)] = self._shards[name].rows(rows).to(heads_NKD.dtype)

    def verify(self, keys: Iterable[str] | None = None) -> None:
        """Check the rows of some clips (default: every row), setting corrupt shards aside with a warning."""
        if keys is None:
            checks: list[tuple[str, Sequence[int] | None]] = [(name, None) for name in self._shards]
        else:
            wanted = [key for key in keys if key in self]
            checks = [(name, [row for _, row in held]) for name, held in self._by_shard(wanted).items()]
        lost = False
        for name, rows in checks:
            try:
                with self._losing(name):
                    self._shards[name].check(rows)
            except ShardLostError:
                lost = True
        if lost:
            self.refresh()
            self.verify(keys)

    def compact(self) -> None:
        """Merge shards into larger ones and drop duplicates."""
        self.refresh()
        group: list[str] = []
        total = 0
        for name, shard in self._removable():  # as they are now: each merge looks anew at what there is
            size = shard.payload_bytes(self.dtype) + BYTES_PER_KEY * len(shard.keys)
            if total + size > SHARD_BYTES:
                self.merge(group)
                group, total = [], 0
            group.append(name)
            total += size
        self.merge(group)

    def merge(self, names: Sequence[str]) -> None:
        """Replace shards by one whose name sorts beside the first of them, so that precedence stays.

        The sources are deleted once the merged shard would survive a power cut. Interrupted anywhere, or done
        by two processes at once, this leaves duplicates at worst.
        """
        self.refresh()
        names = sorted(names)
        if len(names) < 2 or not self._shards.keys() >= set(names):
            return
        keys: list[str] = []
        parts: list[Tensor] = []
        try:
            for name in names:
                with self._losing(name):
                    shard = self._shards[name]
                    rows = [row for row, key in enumerate(shard.keys) if self._places[key] == (name, row)]
                    keys += [shard.keys[row] for row in rows]
                    parts.append(shard.rows(rows))
        except ShardLostError:
            return
        head_names = self._shards[names[0]].head_names
        if keys:
            # Of names and clips, so that a file which another process made of the same shards is replaced by none
            # that holds less.
            sources = hashlib.sha256("".join([*names, *keys]).encode()).hexdigest()
            merged = self.folder / f"{names[0].split('-')[0]}-{sources[:16]}{SUFFIX}"
            try:
                self.add(write_shard(merged, keys, torch.cat(parts), head_names, durable=True))
            except (HeadStoreError, OSError):
                return  # a full disk, say: all clips are held as they are
        for name in names:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
        self._forget(names)

    def _removable(self) -> list[tuple[str, Shard]]:
        """Shards that may be merged, by name: in a folder with the sticky bit nobody deletes what others wrote."""
        shards = sorted(self._shards.items())
        with contextlib.suppress(FileNotFoundError):
            folder = self.folder.stat()
            if folder.st_mode & stat.S_ISVTX and os.getuid() not in (0, folder.st_uid):
                shards = [(name, shard) for name, shard in shards if shard.path.stat().st_uid == os.getuid()]
        return shards

    def _by_shard(self, keys: Iterable[str]) -> dict[str, list[tuple[int, int]]]:
        """Shard name -> (position among the keys, row in the shard) of every key."""
        held: dict[str, list[tuple[int, int]]] = {}
        for position, key in enumerate(keys):
            name, row = self._places[key]
            held.setdefault(name, []).append((position, row))
        return held

    def _forget(self, names: Iterable[str]) -> set[str]:
        """Count on some shards no longer; the clips that are nowhere else. Only the shards' own clips are looked at: a
        store may hold millions."""
        nowhere = set()
        lost = {name: shard for name in names if (shard := self._shards.pop(name, None))}
        for key in {key for shard in lost.values() for key in shard.keys}:
            places = [self._places.pop(key), *self._others.pop(key, [])]
            if kept := sorted(place for place in places if place[0] not in lost):
                self._places[key], *others = kept
                if others:
                    self._others[key] = others
            else:
                nowhere.add(key)
        return nowhere

    @contextlib.contextmanager
    def _losing(self, name: str) -> Iterator[None]:
        """Turn the loss of shard `name` into ShardLostError, and say so when it was corrupt."""
        try:
            yield
        except FileNotFoundError as error:
            self._gone |= self._forget([name])
            raise ShardLostError(name) from error
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            self.corrupt.add(name)
            self._forget([name])
            warnings.warn(
                f"a file of the head store that cannot be read: {self.folder / name} ({error.strerror}); whatever "
                "clips it holds are computed again",
                stacklevel=4,
            )
            raise ShardLostError(name) from error
        except CorruptShardError as error:
            self.corrupt.add(name)
            self._forget([name])
            aside = set_aside(self.folder / name)
            warnings.warn(
                f"corrupt shard of the head store, not used any more: {aside} ({error}); its clips are missing now "
                "and are computed again when they are next needed",
                stacklevel=4,
            )
            raise ShardLostError(name) from error
