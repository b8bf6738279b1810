"""Any data set of the Hugging Face `datasets` library that has an audio column and a label."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from calm_pl.clip import Clip
from calm_pl.data.manifest import read_manifest, write_manifest
from calm_pl.data.recipes.base import DataMissingError, data_root, make_once
from calm_pl.data.splits import split_clips


@dataclass
class HuggingFace:
    """Clips of a hub data set or a local folder, written to the data cache once, as the files they are.

    Rows without a label are left out, and counted in a warning.

    Attributes:
        path: id on the hub, or a folder, as `datasets.load_dataset` takes it.
        config: its configuration, where it has several.
        train_split: its split that support clips are drawn from.
        test_split: its split to test on; None sets `test_fraction` of the training split aside.
        audio_column: its column with the audio.
        label_column: its column with the label (a class, a text, or a list of them).
        group_column: its column with the source (a speaker, a recording), where it has one.
        streaming: read it over the network clip by clip, without storing the whole of it first.
        max_clips: take no more of each split than the first so many.
        test_fraction: share of test clips where there is no test split.
        seed: chooses them.
        data_dir: folder for the clips; None is the data cache.
    """

    path: str | None = None
    config: str | None = None
    train_split: str = "train"
    test_split: str | None = "test"
    audio_column: str = "audio"
    label_column: str = "label"
    group_column: str | None = None
    streaming: bool = False
    max_clips: int | None = None
    test_fraction: float = 0.3
    seed: int = 0
    data_dir: str | None = None

    name: ClassVar[str] = "hf"
    question: ClassVar[str] = "What sound is this?"

    def prepare(self) -> None:
        if self.path is None:
            raise DataMissingError("the recipe hf reads a data set of your choice: name it with path")
        make_once(self._root(), self._make)

    def clips(self) -> list[Clip]:
        clips = read_manifest(self._root() / "manifest.jsonl")
        return clips if self.test_split else split_clips(clips, self.test_fraction, self.seed)

    def _root(self) -> Path:
        chosen = asdict(self)
        for later in ("data_dir", "test_fraction", "seed"):  # what does not change the files
            del chosen[later]
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
        return data_root(self.name, self.data_dir) / f"{Path(self.path or self.name).name}-{digest}"

    def _make(self, folder: Path) -> None:
        splits = {"train": self.train_split, "test": self.test_split}
        clips = [clip for split, theirs in splits.items() if theirs for clip in self._written(folder, split, theirs)]
        write_manifest(clips, folder / "manifest.jsonl")

    def _rows(self, theirs: str) -> Any:
        """The rows of one of their splits, audio as the bytes of its files; checked for the columns that are wanted."""
        try:
            datasets = import_module("datasets")
        except ImportError:
            raise DataMissingError("the recipe hf needs the package datasets: pip install datasets[audio]") from None
        try:
            rows = datasets.load_dataset(self.path, self.config, split=theirs, streaming=self.streaming)
        except (OSError, ValueError) as error:
            raise DataMissingError(f"{self.path}, split {theirs}: {error}") from error
        columns = set(rows.column_names or rows.features)
        wanted = {self.audio_column, self.label_column} | ({self.group_column} if self.group_column else set())
        if not wanted <= columns:
            absent, there = ", ".join(sorted(wanted - columns)), ", ".join(sorted(columns))
            raise DataMissingError(f"{self.path}: no column {absent}; it has {there}")
        return rows.cast_column(self.audio_column, datasets.Audio(decode=False))

    def _written(self, folder: Path, split: str, theirs: str) -> Iterator[Clip]:
        """Write the sounds of one of their splits as files; the clips come as they are written."""
        rows = self._rows(theirs)
        labelled = unlabelled = 0
        for number, row in enumerate(islice(rows, self.max_clips)):
            label = _label(row[self.label_column], rows.features[self.label_column])
            if label is None:
                unlabelled += 1
                continue
            labelled += 1
            audio = row[self.audio_column]
            content = audio["bytes"] if audio["bytes"] is not None else Path(audio["path"]).read_bytes()
            path = folder / split / f"{number:06d}{Path(audio['path'] or 'clip.wav').suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            yield Clip(str(path), label, split, _text(row[self.group_column]) if self.group_column else None)
        if unlabelled and not labelled:
            raise DataMissingError(
                f"{self.path}, split {theirs}: not one of its {unlabelled} rows has a label in the column "
                f"{self.label_column}; name another with label_column, train_split or test_split (null: a share of "
                "the training split)"
            )
        if unlabelled:
            total = unlabelled + labelled
            warnings.warn(
                f"{self.path}, split {theirs}: {unlabelled} of {total} rows have no label; they are left out",
                stacklevel=2,
            )


def _label(value: Any, feature: Any) -> str | tuple[str, ...] | None:
    """Class numbers become names, lists tuples; None where there is no label."""
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
        return tuple(str(label) for item in value if (label := _label(item, inner))) or None
    if hasattr(feature, "int2str"):
        return None if value in (None, -1) else str(feature.int2str(value))  # -1: how the library stores no label
    return _text(value)


def _text(value: Any) -> str | None:
    """None where a cell is empty."""
    return None if value is None else str(value).strip() or None
