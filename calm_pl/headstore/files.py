"""Where the head store lies, and the one way in which anything is written into it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from pathlib import Path

TEMPORARY = ".tmp-"
ABANDONED_SECONDS = 24 * 3600
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


class HeadStoreError(RuntimeError):
    """The head store cannot do what was asked; the message names the place and the way out."""


def store_root(root: str | Path | None = None) -> Path:
    """The folder of all head stores: `root`, else the variable CALM_STORE, else the user's cache folder."""
    chosen = root or os.environ.get("CALM_STORE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("calm-pl")) / "heads"


def make_folder(folder: Path) -> None:
    """Make a folder that can be written to.

    Raises:
        HeadStoreError: it cannot, or a file is in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(folder, error) from error
    if not os.access(folder, os.W_OK):
        raise _refused(folder, PermissionError(errno.EACCES, "permission denied"))


def check_place(folder: Path) -> None:
    """Refuse a file where a folder is wanted; one that is not there yet is made when it is wanted.

    Raises:
        HeadStoreError: a file is there.
    """
    if folder.exists() and not folder.is_dir():
        raise _refused(folder, NotADirectoryError(errno.ENOTDIR, "it is a file"))


def _refused(folder: Path, error: OSError) -> HeadStoreError:
    return HeadStoreError(
        f"head outputs cannot be kept in {folder} ({error.strerror or error}): make it a folder that you may write "
        "to, or set CALM_STORE to one."
    )


def write_atomically(path: Path, data: bytes, durable: bool) -> None:
    """Write a whole file or none, whenever this process is killed: temporary file in the same folder, rename.

    `durable` waits until it would survive a power cut too (fsync, some 10 ms); otherwise one within the
    next half minute may lose the file or leave a torn one, which its reader must be able to tell.

    Raises:
        HeadStoreError: the disk, the quota or the file size limit is full, or the folder may not be written to. Nothing
            is left behind.
        OSError: anything else the file system says. Nothing is left behind.
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in FORBIDDEN:
            raise _refused(path.parent, error) from error
        if error.errno not in DISK_FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        raise HeadStoreError(
            f"no room for the head store in {path.parent} ({error.strerror}): {len(data):,} bytes needed, "
            f"{free:,} free on the disk. Free some (`calm store prune`), or set CALM_STORE to a folder on "
            "a larger disk; a store that is moved there keeps what it holds."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, on file systems that can sync a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_abandoned(folder: Path, older_than: float = ABANDONED_SECONDS) -> int:
    """Delete temporary files that killed writers left in `folder` more than `older_than` seconds ago."""
    removed = 0
    for path in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):  # gone, or of another user in a folder with the sticky bit
            if time.time() - path.stat().st_mtime > older_than:
                path.unlink()
                removed += 1
    return removed
