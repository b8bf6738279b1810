"""UrbanSound8K (Salamon et al., ACM Multimedia 2014): city sounds in ten folds."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

from calm_pl.clip import Clip
from calm_pl.data.recipes.base import data_root
from calm_pl.data.recipes.download import fetch_archive
from calm_pl.data.recipes.listing import rows
from calm_pl.data.splits import split_clips

URL = "https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz"


@dataclass
class UrbanSound8K:
    """8,732 excerpts of up to 4 s, 10 classes. Excerpts of one recording share a fold.

    Attributes:
        data_dir: folder that holds `metadata/UrbanSound8K.csv` and `audio/fold1` to `fold10`; None is the data cache.
        test_fold: 1 to 10; `all` is for `calm fit`, which runs every fold and averages (elsewhere: no test).
        shuffle_seed: draw the tenth that is tested by recording instead of by fold. Not comparable to published
            results; a warning says so.
    """

    data_dir: str | None = None
    test_fold: int | Literal["all"] = 1
    shuffle_seed: int | None = None

    name: ClassVar[str] = "urbansound8k"
    num_folds: ClassVar[int] = 10
    question: ClassVar[str] = "What sound is this?"

    def __post_init__(self) -> None:
        if self.test_fold not in ("all", *range(1, 11)):
            raise ValueError(f"test_fold is {self.test_fold}; UrbanSound8K has folds 1 to 10, or all")

    def prepare(self) -> None:
        fetch_archive(data_root(self.name, self.data_dir), URL, ["metadata/UrbanSound8K.csv", "audio"])

    def clips(self) -> list[Clip]:
        root = data_root(self.name, self.data_dir)
        clips = [
            Clip(
                audio=str(root / f"audio/fold{row['fold']}" / row["slice_file_name"]),
                label=row["class"].replace("_", " "),
                split="test" if int(row["fold"]) == self.test_fold else "train",
                group=row["fsID"],
            )
            for row in rows(root / "metadata/UrbanSound8K.csv")
        ]
        if self.shuffle_seed is None:
            return clips
        warnings.warn(
            "urbansound8k: its ten folds are shuffled; results are not comparable to published ones",
            stacklevel=2,
        )
        return split_clips(clips, 0.1, self.shuffle_seed)
