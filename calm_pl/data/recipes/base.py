"""What every recipe offers, and where data sets live on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from filelock import FileLock

from calm_pl.clip import Clip, absolute_path


class Recipe(Protocol):
    """A data set by name: a small dataclass that knows its layout on disk.

    Attributes:
        name: how it is called in configs and results, such as "esc50".
        question: what the `open` protocol asks about a clip; it names no class.
    """

    name: ClassVar[str]
    question: ClassVar[str]

    def prepare(self) -> None:
        """Download or generate what is missing. Called once, by one process.

        Raises:
            DataMissingError: the data are not there and cannot be fetched; says what to fetch and put where.
        """

    def clips(self) -> list[Clip]:
        """Every clip, with its group and its split; support clips are drawn from "train"."""


class DataMissingError(FileNotFoundError):
    """The files of a data set are not where they should be; the message says how to get them there."""


def data_root(name: str, data_dir: str | os.PathLike[str] | None) -> Path:
    """Folder of a data set: as given, else `name` in $CALM_DATA, else in ~/.cache/calm-pl/data."""
    if data_dir is not None:
        return Path(absolute_path(Path(data_dir).expanduser()))
    home = os.environ.get("CALM_DATA")
    return (Path(home).expanduser().absolute() if home else Path.home() / ".cache/calm-pl/data") / name


def absent(root: Path, expected: Sequence[str]) -> list[str]:
    """Which of the expected files and folders are not in `root`."""
    return [name for name in expected if not (root / name).exists()]


def require(root: Path, expected: Sequence[str], steps: str) -> None:
    """Make sure that a data set which cannot be downloaded from here is in place.

    Args:
        root: its folder.
        expected: paths in it that must exist.
        steps: where it is to be had, and what to do with it.

    Raises:
        DataMissingError: naming the folder, what is absent, and the steps.
    """
    missing = absent(root, expected)
    if missing:
        raise DataMissingError(f"{root}: {', '.join(missing)} not found there. {steps}")


def make_once(root: Path, make: Callable[[Path], None]) -> None:
    """Let `make` fill the folder `root`, all or nothing: a half-made one never has the name.

    One process works, others wait; what a killed one left behind is begun anew.

    Raises:
        DataMissingError: the folder above cannot be made.
    """
    if root.exists():
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataMissingError(
            f"{root.parent} cannot be made ({error.strerror}): set CALM_DATA to a folder that you may write to."
        ) from error
    partial = root.with_name(f".{root.name}.partial")
    with FileLock(root.with_name(f".{root.name}.lock")):
        if not root.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.replace(root)
