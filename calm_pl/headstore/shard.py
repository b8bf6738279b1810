"""One shard of a head store: a safetensors file with the head outputs of some clips and a checksum for each.

The tensor `heads` is N x K x D in the store's dtype. The header's metadata holds `clips`, a JSON object
(`keys`: N clip keys, `crc32`: N checksums of the rows' bytes, `head_names`: K names or null), and `crc32`,
the checksum of that JSON text. Tensor suffixes: N clips, K heads, D head dimension.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from calm_pl.headstore.files import HeadStoreError, write_atomically

SUFFIX = ".safetensors"
CORRUPT_SUFFIX = ".corrupt"
ATTEMPTS = 3  # to open a file that is there


class CorruptShardError(Exception):
    """The bytes of a shard are not those that were written."""


@dataclass
class Shard:
    """A shard as its header tells it; the head outputs stay on disk until `rows` is called."""

    path: Path
    keys: list[str]
    checksums: list[int]
    shape: tuple[int, int, int]
    head_names: tuple[str, ...] | None
    _sound: set[int] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path, dtype: torch.dtype) -> Shard:
        """Read the header only.

        Raises:
            FileNotFoundError: it has gone (compacted or pruned by another process).
            CorruptShardError: the file is torn, its header is damaged, or the tensor is not of `dtype`.
        """
        try:
            with _open(path) as file:
                metadata, heads = file.metadata(), file.get_slice("heads")
                shape = tuple(heads.get_shape())
                if zlib.crc32(metadata["clips"].encode()) != int(metadata["crc32"]):
                    raise CorruptShardError("wrong checksum of the header")
                clips = json.loads(metadata["clips"])
                if heads.get_dtype() != _SAFETENSORS_NAME[dtype] or shape[:1] != (len(clips["keys"]),):
                    raise CorruptShardError("the tensor does not match the header")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptShardError(str(error)) from error
        names = clips["head_names"]
        return cls(path, clips["keys"], clips["crc32"], shape, tuple(names) if names else None)

    def payload_bytes(self, dtype: torch.dtype) -> int:
        """Size of the tensor on disk."""
        return math.prod(self.shape) * dtype.itemsize

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Head outputs of some clips (len(indices) x K x D, the store's dtype), from the mapped file.

        Raises:
            FileNotFoundError: the shard has gone (compacted or pruned by another process).
            CorruptShardError: a row's checksum is wrong. Each row is checked when it is first asked for.
        """
        heads_NKD = self._mapped()
        self._check(heads_NKD, indices)
        return heads_NKD[torch.tensor(indices, dtype=torch.long)]

    def check(self, indices: Sequence[int] | None = None) -> None:
        """Verify the checksums of some rows (default: all). Raises as `rows` does."""
        wanted = range(len(self.keys)) if indices is None else indices
        if not self._sound.issuperset(wanted):
            self._check(self._mapped(), wanted)

    def _mapped(self) -> Tensor:
        try:
            with _open(self.path) as file:
                heads_NKD: Tensor = file.get_tensor("heads")
        except SafetensorError as error:
            raise CorruptShardError(str(error)) from error
        return heads_NKD

    def _check(self, heads_NKD: Tensor, indices: Sequence[int]) -> None:
        bytes_NB = heads_NKD.flatten(1).view(torch.uint8).numpy()
        for row in indices:
            if row not in self._sound:
                if zlib.crc32(bytes_NB[row]) != self.checksums[row]:
                    raise CorruptShardError(f"wrong checksum of clip {row + 1} of {len(self.keys)}")
                self._sound.add(row)


def _open(path: Path) -> safe_open:
    for _ in range(ATTEMPTS):
        try:
            return safe_open(path, "pt")
        except (OSError, RuntimeError) as error:
            # safetensors opens the file twice and may say "not found" of one that it only lacks the rights or
            # descriptors for; Python tells what is the matter. Where nothing is, two processes merged the same
            # shards: the file was merged further and deleted, and is there again.
            try:
                path.open("rb").close()
            except OSError as told:
                if told.errno == errno.ESTALE:  # deleted by another machine, as a network folder says it
                    raise FileNotFoundError(errno.ENOENT, "deleted", str(path)) from told
                raise
            reason = error
    raise HeadStoreError(
        f"{path} cannot be mapped into memory: {reason}. Where its file system cannot do that, set CALM_STORE to "
        "a folder on another."
    )


_SAFETENSORS_NAME = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def write_shard(
    path: Path, keys: list[str], heads_NKD: Tensor, head_names: Sequence[str] | None, durable: bool = False
) -> Shard:
    """Write a shard atomically. `heads_NKD`: contiguous, on the CPU, in the store's dtype."""
    bytes_NB = heads_NKD.flatten(1).view(torch.uint8).numpy()
    checksums = [zlib.crc32(row) for row in bytes_NB]
    names = tuple(head_names) if head_names else None
    clips = json.dumps({"keys": keys, "crc32": checksums, "head_names": names})
    metadata = {"clips": clips, "crc32": str(zlib.crc32(clips.encode()))}
    write_atomically(path, save({"heads": heads_NKD}, metadata), durable)
    n, k, d = heads_NKD.shape
    return Shard(path, keys, checksums, (n, k, d), names)


def set_aside(path: Path) -> Path:
    """Rename a corrupt shard to `*.corrupt`, and return where it is; where the folder is read-only it stays."""
    aside = path.with_name(path.name + CORRUPT_SUFFIX)
    with contextlib.suppress(OSError):
        path.rename(aside)
    return path if path.exists() else aside
