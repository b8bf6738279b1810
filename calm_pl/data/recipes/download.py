"""Archives from the network: resumed where they broke off, checked, and unpacked so that no path escapes."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from filelock import FileLock

from calm_pl.data.recipes.base import DataMissingError, absent
from calm_pl.progress import Task

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 30  # without a byte
_ATTEMPTS = 5


def fetch_archive(root: Path, url: str, expected: Sequence[str], checksum: str | None = None) -> None:
    """Download and unpack an archive into `root`, unless what is expected is there.

    An archive put into `root` by hand is unpacked instead, and never removed. One process works, the others wait.

    Args:
        root: folder of the data set.
        url: the archive: .zip, .tar.gz or .tgz. A single folder at its top is left out of the paths.
        expected: paths in `root` that must exist afterwards.
        checksum: "sha256:..." or "md5:..." of the archive, where it is known.

    Raises:
        DataMissingError: no network, a broken archive, or other files there; says what to fetch and where to.
    """
    if not absent(root, expected):
        return
    archive = root / Path(url).name
    partial = archive.with_name(archive.name + ".part")
    if root.exists() and not archive.exists() and not partial.exists():
        found = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
        if found:  # a mistyped folder should not receive gigabytes
            raise DataMissingError(
                f"{root}: {', '.join(absent(root, expected))} not found there, only {', '.join(found[:5])}. "
                f"Give the folder that holds {expected[0]}, or an empty one to download {url} into."
            )
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        if not absent(root, expected):
            return
        by_hand = archive.exists()
        try:
            if by_hand and (wrong := _mismatch(archive, checksum)):
                raise DataMissingError(
                    f"{archive}: {wrong}: it is broken, or another version than {url}. It was left as it is; put the "
                    f"right one there, move it away to download it, or unpack it so that {root / expected[0]} exists."
                )
            if not by_hand:
                _download_checked(url, partial, checksum)
                partial.replace(archive)
            unpack(archive, root)
        except DataMissingError:
            raise
        except (OSError, http.client.HTTPException, tarfile.TarError, zipfile.BadZipFile, ValueError) as error:
            raise DataMissingError(
                f"{root}: could not get {url} ({error}). Fetch that file with a network and put it at "
                f"{archive}, or unpack it so that {root / expected[0]} exists; then run this again."
            ) from error
        if not by_hand:
            archive.unlink()
        if absent(root, expected):
            raise DataMissingError(f"{root}: {url} held no {', '.join(absent(root, expected))}; was it changed?")


def _download_checked(url: str, partial: Path, checksum: str | None) -> None:
    """Download a file. Raises ValueError, and removes it, where it is not the one that the checksum is of."""
    _download(url, partial)
    if wrong := _mismatch(partial, checksum):
        partial.unlink()
        raise ValueError(f"{wrong}; the file was removed")


def _download(url: str, partial: Path) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        held = partial.stat().st_size if partial.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={held}-"} if held else {})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as reply:
                resumed = reply.status == 206
                rest = int(reply.headers.get("Content-Length") or 0)
                _receive(reply, partial, held if resumed else 0, rest)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416 and held:  # nothing left to send, or another file: begin again
                partial.unlink()
            elif error.code < 500 or attempt == _ATTEMPTS:
                raise
        except (http.client.IncompleteRead, ConnectionError, TimeoutError):
            if attempt == _ATTEMPTS:
                raise


def _receive(reply: IO[bytes], partial: Path, held: int, rest: int) -> None:
    with (
        Task(f"fetching {partial.stem}", rest // _CHUNK or None, "MiB") as task,
        partial.open("ab" if held else "wb") as file,
    ):
        received = 0
        while chunk := reply.read(_CHUNK):
            file.write(chunk)
            received += len(chunk)
            task.advance(received // _CHUNK - task.done)
    if received < rest:
        raise http.client.IncompleteRead(b"", rest - received)


def _mismatch(archive: Path, checksum: str | None) -> str | None:
    """What is wrong with the checksum of a file; None where it is right, or not known."""
    if checksum is None:
        return None
    algorithm, _, expected = checksum.partition(":")
    with archive.open("rb") as file:
        digest = hashlib.new(algorithm)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    return None if found == expected else f"its {algorithm} is {found}, not {expected}"


def unpack(archive: Path, root: Path) -> None:
    """Unpack the files of a zip or tar archive into `root`, without the single folder at its top.

    Raises:
        ValueError: a path in the archive points out of it, or is no plain file. Nothing is left in `root`.
    """
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root) as name:
        folder = Path(name)
        for member, stream in _members(archive):
            target = (folder / member).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise ValueError(f"{archive.name} holds {member!r}, which leaves the folder; not unpacked")
            target.parent.mkdir(parents=True, exist_ok=True)
            with stream, target.open("wb") as file:
                shutil.copyfileobj(stream, file, _CHUNK)
        tops = [path for path in folder.iterdir() if path.name != "__MACOSX"]
        while len(tops) == 1 and tops[0].is_dir():
            tops = list(tops[0].iterdir())
        for path in tops:
            if not (root / path.name).exists():
                path.replace(root / path.name)


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                if not entry.is_dir():
                    yield entry.filename, zipped.open(entry)
        return
    with tarfile.open(archive) as tarred:
        for member in tarred:
            if member.isdir():
                continue
            stream = tarred.extractfile(member) if member.isfile() else None
            if stream is None:
                raise ValueError(f"{archive.name} holds {member.name!r}, which is no file; not unpacked")
            yield member.name, stream
