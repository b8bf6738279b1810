from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from calm_pl.clip import Clip
from calm_pl.commands.datasets import main
from calm_pl.data.check import check_clips
from calm_pl.data.recipes import RECIPES


def sound(path: Path, seed: int, seconds: float = 0.5, rate: int = 16000) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * rate)), rate, subtype="PCM_16")
    return str(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, label, number in (("train", "dog", 1), ("train", "dog", 2), ("train", "cat", 3), ("test", "dog", 4)):
        sound(tmp_path / split / label / f"{number}.wav", seed=number)
    sound(tmp_path / "test/cat/5.wav", seed=5, seconds=1.5, rate=8000)
    return tmp_path


def test_a_sound_set_is_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "folder", str(root)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "class test train all" in lines
    assert "cat 1 1 2" in lines
    assert "dog 1 2 3" in lines
    assert "rates: 16000 Hz (4), 8000 Hz (1)" in lines
    assert "lengths: 0.50 to 1.50 s, median 0.50 s, together 0.00 h" in lines
    assert "broken files: none" in lines


def test_broken_files_and_duplicates_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "train/dog/6.wav").write_text("no sound")
    for source, copy in (("train/dog/1.wav", "train/dog/again.flac"), ("train/cat/3.wav", "test/cat/known.flac")):
        samples, rate = soundfile.read(root / source, dtype="int16")
        soundfile.write(root / copy, samples, rate)
    assert main(["check", "folder", str(root)]) == 1
    told = capsys.readouterr().out
    assert f"broken files: 1\n  {root}/train/dog/6.wav: not audio" in told
    assert f"within a split: 1\n  {root}/train/dog/1.wav (train, dog) = {root}/train/dog/again.flac" in told
    assert f"across splits: 1\n  {root}/test/cat/known.flac (test, cat) = {root}/train/cat/3.wav" in told


def test_parts_of_a_file_are_no_duplicates(tmp_path: Path) -> None:
    path = sound(tmp_path / "long.wav", seed=0, seconds=2)
    found = check_clips([Clip(path, "a", start=0, end=1), Clip(path, "a", start=1, end=2), Clip(path, start=1)])
    assert [len(same) for same in found.repeats] == [2]
    assert found.seconds == [1.0, 1.0, 1.0]
    assert found.counts == {"a": {"(no split)": 2}, "(no label)": {"(no split)": 1}}


def test_the_list_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    told = capsys.readouterr().out.split()
    assert not [name for name in RECIPES if name not in told]


def test_a_download_that_failed_is_not_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CALM_DATA", str(tmp_path))
    for name in ("esc50/.lock", "fsdd/archive.zip.part", "gtzan/genres/blues.wav"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert main([]) == 0
    in_the_cache = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith(" yes")]
    assert in_the_cache == ["gtzan"]


def test_errors_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "esc51", str(tmp_path)]) == 2
    assert "unknown data set 'esc51'; there are folder, manifest" in capsys.readouterr().err
    assert main(["check", "fsd50k", str(tmp_path)]) == 2
    assert "zenodo.org/records/4060432" in capsys.readouterr().err
