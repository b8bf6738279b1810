"""Which clips are run together, written down before the first is, so that a killed extraction meets the same batches.

The last bits of a head output depend on the clips that shared its batch. A plan is a file of the store's folder,
`plan-<time>-<hash of its bytes>.json`, with the batches as lists of clip keys. It is deleted by the next run that looks
at it and finds all of its clips held.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path

from calm_pl.headstore.files import HeadStoreError, write_atomically

PREFIX = "plan-"
# Some are never finished: a clip of theirs cannot be used, or nobody goes on with the run.
KEPT = 64


def planned_batches(
    folder: Path,
    keys: Sequence[str],
    wanted: Sequence[int],
    batch_size: int,
    split: Callable[[list[int]], list[list[int]]],
    held: Container[str],
) -> list[list[int]]:
    """Batches (of positions) that hold every wanted clip: those of earlier runs that did not finish, then new ones.

    A batch of another run is taken if all of its clips are here, whole. The oldest plan is asked first, and a clip's
    batch does not depend on which others are still missing; so whoever goes on after a kill, or works on the same
    clips at the same time, runs it among the same clips.

    Args:
        folder: of the store.
        keys: of all clips of the run.
        wanted: positions of those that are to be computed.
        batch_size: plans for another are passed over.
        split: the wanted positions that no plan covers, into new batches.
        held: keys that the store holds; plans with no others are deleted.
    """
    position = {key: index for index, key in reversed(list(enumerate(keys)))}
    left = {keys[index] for index in wanted}
    batches: list[list[int]] = []
    for path, size, planned in _plans(folder):
        if all(key in held for batch in planned for key in batch):
            _delete(path)
        elif size == batch_size:
            for batch in planned:
                if not left.isdisjoint(batch) and position.keys() >= set(batch):
                    batches.append([position[key] for key in batch])
                    left.difference_update(batch)
    if left:
        new = split([index for index in wanted if keys[index] in left])
        _write(folder, batch_size, [[keys[index] for index in batch] for batch in new])
        batches += new
    return batches


def unfinished_batch_size(folder: Path, wanted: Container[str]) -> int | None:
    """The batch size of the oldest plan with one of these clips; None where there is none."""
    sizes = (size for _, size, planned in _plans(folder) if any(key in wanted for batch in planned for key in batch))
    return next(sizes, None)


def _plans(folder: Path) -> Iterator[tuple[Path, int, list[list[str]]]]:
    """Every plan in a folder, the oldest first: path, batch size, batches. Torn ones, and too old ones, are deleted."""
    paths = sorted(folder.glob(f"{PREFIX}*.json"))
    for path in paths[:-KEPT]:
        _delete(path)
    for path in paths[-KEPT:]:
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if not path.name.endswith(f"-{_digest(data)}.json"):
                _delete(path)
                continue
            plan = json.loads(data)
            yield path, plan["batch_size"], plan["batches"]


def _write(folder: Path, batch_size: int, batches: list[list[str]]) -> None:
    data = json.dumps({"batch_size": batch_size, "batches": batches}).encode()
    path = folder / f"{PREFIX}{time.time_ns():020d}-{_digest(data)}.json"
    # Where a plan cannot be written, head outputs cannot either, and whoever writes those says so.
    with contextlib.suppress(OSError, HeadStoreError):
        write_atomically(path, data, durable=True)


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
