"""ESC-50 and its subset ESC-10 (Piczak, ACM Multimedia 2015): environmental sounds in five folds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from calm_pl.clip import Clip
from calm_pl.data.recipes.base import data_root
from calm_pl.data.recipes.download import fetch_archive
from calm_pl.data.recipes.listing import rows

URL = "https://github.com/karolpiczak/ESC-50/archive/master.zip"


@dataclass
class Esc50:
    """2,000 clips of 5 s, 50 classes. One of the five folds is the test; clips of one recording share a fold.

    Attributes:
        data_dir: folder that holds `meta/esc50.csv` and `audio/`; None is the data cache.
        test_fold: 1 to 5; `all` is for `calm fit`, which runs every fold and averages (elsewhere: no test).
    """

    data_dir: str | None = None
    test_fold: int | Literal["all"] = 1

    name: ClassVar[str] = "esc50"
    num_folds: ClassVar[int] = 5
    question: ClassVar[str] = "What sound is this?"

    def __post_init__(self) -> None:
        if self.test_fold not in ("all", *range(1, self.num_folds + 1)):
            raise ValueError(f"test_fold is {self.test_fold}; ESC-50 has folds 1 to {self.num_folds}, or all")

    def prepare(self) -> None:
        fetch_archive(data_root("esc50", self.data_dir), URL, ["meta/esc50.csv", "audio"])

    def clips(self) -> list[Clip]:
        root = data_root("esc50", self.data_dir)
        return [
            Clip(
                audio=str(root / "audio" / row["filename"]),
                label=row["category"].replace("_", " "),
                split="test" if int(row["fold"]) == self.test_fold else "train",
                group=row["src_file"],
            )
            for row in rows(root / "meta/esc50.csv")
            if self._wanted(row)
        ]

    def _wanted(self, row: dict[str, str]) -> bool:
        return True


@dataclass
class Esc10(Esc50):
    """The ten classes of ESC-50 that its author marked as easy: 400 clips under CC BY.

    Attributes:
        data_dir: folder of ESC-50 (or of a copy of ESC-10 laid out alike); None is the data cache.
        test_fold: 1 to 5; `all` is for `calm fit`, which runs every fold and averages (elsewhere: no test).
    """

    name: ClassVar[str] = "esc10"

    def _wanted(self, row: dict[str, str]) -> bool:
        return row["esc10"] == "True"
