"""Content hashes of files, remembered so that an unchanged file is read once.

The memory is a folder of up to 256 small JSON files, shared by every store under a root:
`digests/<first byte of the path's hash>.json`, each `{real path: [size, mtime_ns, ctime_ns, sha256]}`. It is
only a cache. Each file is replaced as a whole, so that a crash leaves the old or the new one, and when two
processes replace the same one at once, what the loser had learned is hashed again another day.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from calm_pl.headstore.files import HeadStoreError, store_root, write_atomically
from calm_pl.progress import Task

FOLDER = "digests"
# A file changed again within the clock tick of its time stamps looks unchanged. Hence no file is remembered
# while its last change is younger than the coarsest tick in use (FAT: two seconds).
SETTLED_NS = 2_000_000_000
PART = 2048
SAVE_EVERY_SECONDS = 30.0


class Stamp(NamedTuple):
    """What must stay the same for a remembered hash to hold.

    The inode's change time is part of it because two archives can unpack to files of equal size and
    modification time.
    """

    size: int
    mtime_ns: int
    ctime_ns: int


def file_digest(path: str | Path, root: str | Path | None = None) -> str:
    """SHA-256 of a file's bytes, as hex; see `file_digests`."""
    return file_digests([path], root)[0]


def file_digests(paths: Sequence[str | Path], root: str | Path | None = None) -> list[str]:
    """SHA-256 of each file's bytes, as hex, read only when (real path, size, times) are not remembered.

    Raises:
        OSError: a file is missing or cannot be read (the error carries its name).
    """
    memory = _Memory(store_root(root) / FOLDER)
    real_paths = _real_paths(paths)
    saved = time.monotonic()
    with Task("looking at files", len(paths), "files", shown=_tells(len(paths))) as task:
        for begin in range(0, len(paths), PART):
            part = real_paths[begin : begin + PART]
            memory.learn(part)
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                memory.save()
                saved = time.monotonic()
            task.advance(len(part))
    memory.save()
    return [memory.digests[path] for path in real_paths]


def _tells(count: int) -> bool:
    """Whether so many files are worth a word; of several processes on a machine, one has it."""
    return count > PART and os.environ.get("LOCAL_RANK", "0") == "0"


def _real_paths(paths: Sequence[str | Path]) -> list[str]:
    """`os.path.realpath` of each, asking the file system once a folder instead of once a file."""
    real_folder = lru_cache(maxsize=None)(os.path.realpath)
    here = os.getcwd()
    # No abspath: it takes `link/..` for the link's own folder, and open() for that of what it leads to.
    split = (os.path.split(os.path.join(here, path)) for path in paths)
    joined = (os.path.join(real_folder(folder), name) for folder, name in split)
    return [os.path.realpath(path) if os.path.islink(path) else path for path in joined]


class _Memory:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        self._buckets: dict[str, dict[str, list[int | str]]] = {}
        self._learned: dict[str, dict[str, list[int | str]]] = defaultdict(dict)

    def learn(self, paths: Sequence[str]) -> None:
        unknown: dict[str, Stamp] = {}
        begun = time.time_ns()  # how long reading takes is no matter: a file may have changed right after it was read
        for path in paths:
            if path in self.digests:
                continue
            stamp = _stamp(path)
            *remembered, digest = self._bucket(path).get(path, [""])
            if remembered == list(stamp):
                self.digests[path] = str(digest)
            else:
                unknown[path] = stamp
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            self.digests.update(zip(unknown, pool.map(_sha256, unknown), strict=True))
        for path, stamp in unknown.items():
            settled = begun - stamp.ctime_ns > SETTLED_NS
            if settled and _stamp(path) == stamp:
                self._learned[_bucket_name(path)][path] = [*stamp, self.digests[path]]

    def _bucket(self, path: str) -> dict[str, list[int | str]]:
        name = _bucket_name(path)
        if name not in self._buckets:
            self._buckets[name] = _load(self.folder / name)
        return self._buckets[name]

    def save(self) -> None:
        try:
            for name, entries in self._learned.items():
                self.folder.mkdir(parents=True, exist_ok=True)
                merged = _load(self.folder / name) | entries
                write_atomically(self.folder / name, json.dumps(merged).encode(), durable=False)
        except (OSError, HeadStoreError) as error:
            warnings.warn(f"file hashes are not remembered for the next run: {error}", stacklevel=3)
        self._learned.clear()


def _bucket_name(path: str) -> str:
    return f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:2]}.json"


def _load(path: Path) -> dict[str, list[int | str]]:
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def file_stamp(path: str) -> Stamp | None:
    """A file's stamp now; None where there is no such file."""
    try:
        return _stamp(path)
    except OSError:
        return None


def _stamp(path: str) -> Stamp:
    status = os.stat(path)
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
