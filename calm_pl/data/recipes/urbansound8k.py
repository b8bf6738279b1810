"""UrbanSound8K (Salamon et al., ACM Multimedia 2014): city sounds in ten folds."""

from __future__ import annotations

import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from calm_pl.clip import Clip
from calm_pl.data.recipes.base import data_root
from calm_pl.data.recipes.download import fetch_archive
from calm_pl.data.recipes.listing import rows

URL = "https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz"


@dataclass
class UrbanSound8K:
    """8,732 excerpts of up to 4 s, 10 classes. Excerpts of one recording share a fold.

    Attributes:
        data_dir: folder that holds `metadata/UrbanSound8K.csv` and `audio/fold1` to `fold10`; None is the data cache.
        test_fold: 1 to 10; `all` is for `calm fit`, which runs every fold and averages (elsewhere: no test).
        shuffle_seed: deal the recordings into ten folds anew, by this seed, instead of the official ones. Not
            comparable to published results; a warning says so.
    """

    data_dir: str | None = None
    test_fold: int | Literal["all"] = 1
    shuffle_seed: int | None = None

    name: ClassVar[str] = "urbansound8k"
    num_folds: ClassVar[int] = 10
    question: ClassVar[str] = "What sound is this?"

    def __post_init__(self) -> None:
        if self.test_fold not in ("all", *range(1, self.num_folds + 1)):
            raise ValueError(f"test_fold is {self.test_fold}; UrbanSound8K has folds 1 to {self.num_folds}, or all")

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
        folds = _deal(clips, self.num_folds, self.shuffle_seed)
        return [replace(clip, split="test" if folds[clip.group] == self.test_fold else "train") for clip in clips]


def _deal(clips: Iterable[Clip], num_folds: int, seed: int) -> dict[str | None, int]:
    """The fold of each group, from 1: one goes where its classes have the fewest clips so far."""
    labels: dict[str | None, Counter[str]] = defaultdict(Counter)
    for clip in clips:
        labels[clip.group].update(clip.labels)
    groups = sorted(labels, key=str)
    random.Random(f"{seed} folds").shuffle(groups)  # a text seeds the same in every process
    held: Counter[tuple[int, str]] = Counter()
    folds = {}
    for group in groups:
        fold = min(range(1, num_folds + 1), key=lambda fold: sum(held[fold, label] for label in labels[group]))
        folds[group] = fold
        held.update({(fold, label): count for label, count in labels[group].items()})
    return folds
