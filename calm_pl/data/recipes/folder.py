"""Your own data: a manifest file, or a folder with one sub-folder a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from calm_pl.clip import Clip
from calm_pl.data.manifest import read_manifest
from calm_pl.data.recipes.base import DataMissingError, data_root
from calm_pl.data.splits import check_disjoint, split_clips


@dataclass
class Manifest:
    """Clips listed in a JSON Lines, JSON or CSV file.

    Where no clip has a split, `test_fraction` of every class is set aside for the test, groups kept together.

    Attributes:
        data_dir: the manifest file.
        test_fraction: share of test clips.
        seed: chooses them.
    """

    data_dir: str | None = None
    test_fraction: float = 0.3
    seed: int = 0

    name: ClassVar[str] = "manifest"
    question: ClassVar[str] = "What sound is this?"

    def prepare(self) -> None:
        if self.data_dir is None:
            raise DataMissingError(
                f"the data set {self.name!r} is yours: name it with --data.recipe.init_args.data_dir "
                "(of `make train`: DATA_DIR)"
            )

    def clips(self) -> list[Clip]:
        self.prepare()
        path = data_root(self.name, self.data_dir)
        clips = read_manifest(path)
        unsplit = [clip for clip in clips if clip.split is None]
        if len(unsplit) == len(clips):
            return split_clips(clips, self.test_fraction, self.seed)
        if unsplit:
            raise ValueError(
                f"{path}: {len(unsplit)} of {len(clips)} clips have no split; give all of them one, or none"
            )
        check_disjoint(
            [clip for clip in clips if clip.split != "test"], [clip for clip in clips if clip.split == "test"]
        )
        return clips


@dataclass
class Folder(Manifest):
    """A folder with one sub-folder a class (or train and test folders of such).

    Attributes:
        data_dir: the folder.
        test_fraction: share of test clips, where there are no train and test folders.
        seed: chooses them.
    """

    name: ClassVar[str] = "folder"
