"""Data sets of the Hugging Face hub: their columns as clips, and what a row may lack."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from calm_pl.data.recipes import DataMissingError, HuggingFace
from tests.test_recipes_benchmarks import heard, sound


def test_hf_needs_a_name() -> None:
    with pytest.raises(DataMissingError, match="name it with path"):
        HuggingFace().prepare()


class Rows(list):
    """Rows of a data set as the package datasets holds them, for what its writer may leave empty."""

    def __init__(self, folder: Path, labels: list, feature: object = None, speakers: list | None = None) -> None:
        sound(folder / "a.wav")
        audio = {"bytes": (folder / "a.wav").read_bytes(), "path": "a.wav"}
        speakers = speakers or [None] * len(labels)
        super().__init__(
            {"audio": audio, "label": label, "speaker": speaker}
            for label, speaker in zip(labels, speakers, strict=True)
        )
        self.column_names, self.features = ["audio", "label", "speaker"], {"label": feature}

    def cast_column(self, *_: object) -> Rows:
        return self


class Named:
    """Classes by number; -1 is none."""

    def int2str(self, number: int) -> str:
        if not 0 <= number < 2:
            raise ValueError(f"Invalid integer class label {number}")
        return ("cat", "dog")[number]


def from_hub(monkeypatch: pytest.MonkeyPatch, train: Rows, test: Rows | None = None) -> None:
    package = ModuleType("datasets")
    splits = {"train": train, "test": test}
    package.load_dataset = lambda path, config, split, streaming: splits[split]
    package.Audio = lambda decode: None
    monkeypatch.setitem(sys.modules, "datasets", package)


@pytest.mark.parametrize(
    ("labels", "feature", "expected"),
    [
        (["cat", "dog", None, "cat ", "", " "], None, ["cat", "dog", "cat"]),
        ([0, 1, None, 0, -1, None], Named(), ["cat", "dog", "cat"]),
        ([["cat"], ["dog", None, "cat"], [], [None], None, ["dog"]], None, [("cat",), ("dog", "cat"), ("dog",)]),
        ([[0], [1, 0], [], [-1], None, [1]], [Named()], [("cat",), ("dog", "cat"), ("dog",)]),
    ],
)
def test_hf_rows_without_a_label_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list, feature: object, expected: list
) -> None:
    from_hub(monkeypatch, Rows(tmp_path, labels, feature), Rows(tmp_path, labels[:2], feature))
    recipe = HuggingFace("some/set", data_dir=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="some/set, split train: 3 of 6 rows have no label; they are left out") as told:
        clips = heard(recipe)
    assert len(told) == 1
    assert [clip.label for clip in clips] == expected + expected[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heard(recipe)  # the second time they are on disk


def test_hf_split_without_any_label_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_hub(monkeypatch, Rows(tmp_path, [0, 1], Named()), Rows(tmp_path, [-1, -1], Named()))
    recipe = HuggingFace("some/set", data_dir=str(tmp_path / "cache"))
    with pytest.raises(DataMissingError, match="some/set, split test: not one of its 2 rows has a label in the column"):
        recipe.prepare()


def test_hf_rows_without_a_group_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speakers = [None, None, None, " ", 7, "7"]
    from_hub(monkeypatch, Rows(tmp_path, ["cat", "dog"] * 3, speakers=speakers))
    options = {"group_column": "speaker", "test_split": None, "data_dir": str(tmp_path / "cache")}
    clips = heard(HuggingFace("some/set", **options))
    assert [clip.group for clip in clips] == [None, None, None, None, "7", "7"]
    assert {clip.split for clip in clips} == {"train", "test"}


@pytest.mark.parametrize("streaming", [False, True])
def test_hf_reads_a_data_set_as_the_hub_holds_it(tmp_path: Path, streaming: bool) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sound(tmp_path / "a.wav")
    audio = {"bytes": (tmp_path / "a.wav").read_bytes(), "path": "a.wav"}
    columns = {"audio": [audio] * 6, "label": [0, 1] * 3, "speaker": list(range(6))}
    features = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "speaker": datasets.Value("int64"),
        }
    )
    (tmp_path / "set/data").mkdir(parents=True)
    for split in ("train", "test"):
        table = pyarrow.Table.from_pydict(columns, schema=features.arrow_schema)
        parquet.write_table(table, tmp_path / f"set/data/{split}-00000-of-00001.parquet")
    options = {"path": str(tmp_path / "set"), "streaming": streaming, "data_dir": str(tmp_path / "cache")}
    clips = heard(HuggingFace(**options))
    assert Counter((clip.split, clip.label) for clip in clips) == {
        (split, label): 3 for split in ("train", "test") for label in ("cat", "dog")
    }
    assert Path(clips[0].audio).read_bytes() == audio["bytes"]
    with pytest.raises(DataMissingError, match="no column sound; it has audio, label, speaker"):
        HuggingFace(audio_column="sound", **options).prepare()
    halves = heard(HuggingFace(test_split=None, group_column="speaker", **options))
    assert Counter(clip.split for clip in halves) == {"train": 4, "test": 2}
    assert len(heard(HuggingFace(max_clips=2, **options))) == 4
