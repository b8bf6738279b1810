"""Head outputs of clips under one key: what was computed once is read by every later run.

Tensor suffixes: N clips, K heads, D head dimension.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calm_pl.headstore.digests import file_digests
from calm_pl.headstore.files import (
    HeadStoreError,
    check_place,
    make_folder,
    remove_abandoned,
    store_root,
    write_atomically,
)
from calm_pl.headstore.index import ShardIndex, ShardLostError
from calm_pl.headstore.plans import planned_batches, unfinished_batch_size
from calm_pl.headstore.shard import SUFFIX, Shard, write_shard

if TYPE_CHECKING:
    from calm_pl.clip import Clip

FORMAT = 1
KEY_FILE = "key.json"
NAME_LENGTH = 32
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# After so many writes a writer merges its own shards, which no other process is merging at the same time, and
# only then waits for the disk: a power cut costs the last few batches, which their checksums show as torn.
MERGE_EVERY = 32
ATTEMPTS = 5  # at writing a shard while somebody deletes the store


def clip_key(clip: Clip, audio_digest: str, video_digest: str | None = None) -> str:
    """Key of a clip by content: SHA-256 of the audio file's bytes, the cut, and what is asked.

    The same bytes under another name, or inside a tar shard, have the same key.
    """
    start, end = float(clip.start or 0), None if clip.end is None else float(clip.end)
    return _hash([audio_digest, start, end, clip.question, clip.options, video_digest])


class HeadStore:
    """The head outputs of every clip seen under one `key`, in `root/<hash of key and dtype>/`.

    Any number of processes may read and write one store at once, without locks: a write is one new file that
    appears whole or not at all, and where two writers computed the same clip, the earlier file counts.

    Args:
        key: everything besides the clip that changes a head output (weights, prompt, precision, ...), of
            JSON's types. `key["backbone"]`, if there is one, is the name that `calm store ls` shows, and changes
            nothing.
        root: the folder of all stores. Default: CALM_STORE, else the user's cache folder.
        dtype: what is kept on disk: float16, bfloat16 or float32.
    """

    def __init__(self, key: Mapping[str, Any], root: str | Path | None = None, dtype: str = "float16") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"head store dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.key = dict(key)
        self.root = store_root(root)
        check_place(self.root)
        self.dtype = dtype
        # A copy of a model under another name is the same model.
        content = {name: value for name, value in self.key.items() if name != "backbone"}
        self.folder = self.root / _hash([FORMAT, dtype, content])[:NAME_LENGTH]
        self._index = ShardIndex(self.folder, DTYPES[dtype])
        self._unmerged: list[str] = []
        self._files: dict[str, str] = {}  # clip key -> audio file, for messages

    @classmethod
    def open(cls, folder: Path) -> HeadStore:
        """The store that lies in `folder`, by its key file.

        Raises:
            HeadStoreError: there is no readable key file of this format.
        """
        folder = Path(folder).absolute()
        try:
            about = json.loads((folder / KEY_FILE).read_bytes())
            store = cls(about["key"], folder.parent, about["dtype"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HeadStoreError(f"{folder / KEY_FILE} cannot be read: {error}") from error
        if about.get("format") != FORMAT:
            raise HeadStoreError(f"{folder} is of another format than this version's ({FORMAT})")
        if store.folder != folder:
            raise HeadStoreError(f"{folder} was renamed: nothing finds it until it is called {store.folder.name} again")
        return store

    def clip_keys(self, clips: Sequence[Clip]) -> list[str]:
        """Keys of clips by content; files are hashed once and remembered for all stores under the root.

        A file that cannot be read gets a key by its path, which nothing is ever stored under: the clip stays
        `missing`, so that whoever decodes it reports the failure.
        """
        files = {file for clip in clips for file in (clip.audio, clip.video) if file}
        digests = {file: f"unreadable: {file}" for file in files} | self._digests(files)
        keys = [clip_key(clip, digests[clip.audio], digests[clip.video] if clip.video else None) for clip in clips]
        self._files.update((key, clip.audio) for key, clip in zip(keys, clips, strict=True))
        return keys

    def _digests(self, files: Collection[str]) -> dict[str, str]:
        """Hashes of the files that can be read."""
        readable = sorted(file for file in files if os.path.isfile(file) and os.access(file, os.R_OK))
        try:
            return dict(zip(readable, file_digests(readable, self.root), strict=True))
        except FileNotFoundError:
            if all(map(os.path.isfile, readable)):
                raise
            return self._digests(readable)  # one went away since

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Indices of the keys that are not held; of a key that comes twice, only the first.

        The checksums of the clips that are held are verified here, so that a corrupt shard is found before it
        is counted on: it is set aside with a warning, and its clips are missing.
        """
        self._touch()
        self._index.refresh()
        self._index.verify(keys)
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        return sorted(index for key, index in first.items() if key not in self._index)

    def planned_batches(
        self, keys: Sequence[str], wanted: Sequence[int], batch_size: int, split: Callable[[list[int]], list[list[int]]]
    ) -> list[list[int]]:
        """Batches in which to compute the wanted of some clips, the same after a kill; see `plans.planned_batches`.

        Call `prepare` first: without the folder nothing is written down.
        """
        return planned_batches(self.folder, keys, wanted, batch_size, split, self._index)

    def unfinished_batch_size(self, keys: Sequence[str], wanted: Sequence[int]) -> int | None:
        """The batch size of the oldest plan that holds one of the wanted clips; None where none does."""
        return unfinished_batch_size(self.folder, {keys[index] for index in wanted})

    def read(self, keys: Sequence[str]) -> Tensor:
        """Head outputs in the order of `keys`: N x K x D float32, gathered from memory-mapped shards.

        Raises:
            HeadStoreError: a key is not held (names the clips).
        """
        self._touch()
        while True:
            if any(key not in self._index for key in keys):
                self._index.refresh()
            if absent := [key for key in keys if key not in self._index]:
                named = ", ".join(self._name(key) for key in absent[:5])
                raise HeadStoreError(
                    f"{len(absent)} of {len(keys)} clips are not in {self.folder}: {named}. If the store was pruned "
                    "meanwhile, run this again: what is missing is computed first."
                )
            heads_NKD = torch.empty(len(keys), self.num_heads, self.head_dim)
            with contextlib.suppress(ShardLostError):
                self._index.gather(keys, heads_NKD)
                return heads_NKD

    def write(self, keys: Sequence[str], heads_NKD: Tensor, head_names: Sequence[str] | None = None) -> None:
        """Keep the head outputs of some clips: one checksummed shard, whole or not at all.

        Args:
            keys: N clip keys; of a key that comes twice, the first counts.
            heads_NKD: N x K x D, any float dtype, any device.
            head_names: K names, kept beside the vectors.

        Raises:
            ValueError: shapes disagree, or a value is not finite in the store's dtype (names the clip).
            HeadStoreError: no room on the disk.
        """
        if not keys:
            return
        self._check_shape(keys, heads_NKD, head_names)
        kept_NKD = heads_NKD.detach().to("cpu", DTYPES[self.dtype])
        self._check_finite(keys, heads_NKD, kept_NKD)
        rows = sorted({key: row for row, key in reversed(list(enumerate(keys)))}.values())
        path = self.folder / f"{time.time_ns():020d}-{secrets.token_hex(8)}{SUFFIX}"
        for attempt in range(ATTEMPTS):
            self.prepare()
            try:
                self._index.add(write_shard(path, [keys[row] for row in rows], kept_NKD[rows], head_names))
                break
            except FileNotFoundError:  # somebody prunes the store at this moment
                if attempt == ATTEMPTS - 1:
                    raise
        self._unmerged.append(path.name)
        if len(self._unmerged) >= MERGE_EVERY:
            self._index.merge(self._unmerged)
            self._unmerged.clear()

    def prepare(self) -> None:
        """Make the folder and its key file: before hours are spent on what it cannot take, and when somebody has just
        pruned them.

        Raises:
            HeadStoreError: the folder cannot be written to.
        """
        make_folder(self.folder)
        # Written anew where it is torn, too; later writes do not read it again.
        whole = (self.folder / KEY_FILE).exists() if self._unmerged else self._key_file_is_whole()
        if not whole:
            about = {"format": FORMAT, "dtype": self.dtype, "key": self.key}
            write_atomically(self.folder / KEY_FILE, json.dumps(about, indent=2).encode(), durable=True)
        if not self._unmerged:
            remove_abandoned(self.folder)

    def _key_file_is_whole(self) -> bool:
        try:
            return bool(json.loads((self.folder / KEY_FILE).read_bytes()))
        except (OSError, ValueError):
            return False

    def compact(self) -> None:
        """Merge small shards into larger ones and drop duplicates. Safe beside readers and writers; where the folder
        cannot be written to, it stays as it is."""
        if os.access(self.folder, os.W_OK):
            self._index.compact()

    def verify(self) -> int:
        """Verify every checksum; corrupt shards are set aside with a warning. Returns how many so far."""
        self._index.refresh()
        self._index.verify()
        return len(self._index.corrupt)

    def __len__(self) -> int:
        """Clips held."""
        self._index.refresh()
        return len(self._index)

    @property
    def num_heads(self) -> int:
        """K."""
        return self._any_shard().shape[1]

    @property
    def head_dim(self) -> int:
        """D."""
        return self._any_shard().shape[2]

    @property
    def head_names(self) -> tuple[str, ...] | None:
        """K names as the writer gave them, or None."""
        return self._any_shard().head_names

    def _any_shard(self) -> Shard:
        if self._index.any_shard() is None:
            self._index.refresh()
        if (shard := self._index.any_shard()) is None:
            raise HeadStoreError(f"{self.folder} is empty; extract head outputs first")
        return shard

    def _name(self, key: str) -> str:
        return self._files.get(key, f"clip {key}")

    def _check_shape(self, keys: Sequence[str], heads_NKD: Tensor, head_names: Sequence[str] | None) -> None:
        known = self._index.any_shard()
        heads_and_dim = known.shape[1:] if known else heads_NKD.shape[1:]
        if heads_NKD.shape != (len(keys), *heads_and_dim) or heads_NKD.dim() != 3:
            expected = "x".join(map(str, (len(keys), *heads_and_dim)))
            raise ValueError(f"head outputs of shape {tuple(heads_NKD.shape)} for a store of {expected}")
        if head_names is not None and len(head_names) != heads_NKD.shape[1]:
            raise ValueError(f"{len(head_names)} head names for {heads_NKD.shape[1]} heads")

    def _check_finite(self, keys: Sequence[str], heads_NKD: Tensor, kept_NKD: Tensor) -> None:
        finite_N = kept_NKD.flatten(1).isfinite().all(dim=1)
        if finite_N.all():
            return
        row = int((~finite_N).nonzero()[0])
        if heads_NKD[row].isfinite().all():
            raise ValueError(
                f"head outputs of {self._name(keys[row])} are too large for {self.dtype}; "
                "keep this store in bfloat16 or float32"
            )
        raise ValueError(
            f"head outputs of {self._name(keys[row])} are not finite; leave the clip out, or run the backbone in "
            "bfloat16 or float32"
        )

    def _touch(self) -> None:
        """The key file's time of modification is the store's last use."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / KEY_FILE)


def is_store_name(name: str) -> bool:
    """Whether a folder's name is one that a store can have."""
    return len(name) == NAME_LENGTH and set(name) <= set("0123456789abcdef")


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
