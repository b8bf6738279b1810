from __future__ import annotations

import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import soundfile

from calm_pl.audio import load_audio
from calm_pl.clip import Clip
from calm_pl.data import ManifestError, write_manifest
from calm_pl.data.recipes import (
    RECIPES,
    DataMissingError,
    Esc10,
    Esc50,
    Folder,
    Manifest,
    Recipe,
    Synthetic,
    synthetic,
)
from calm_pl.data.recipes.base import make_once
from calm_pl.data.recipes.sounds import SOUNDS
from calm_pl.data.splits import check_disjoint, draw_support

SHARED = Path(os.environ.get("CALM_SHARED", Path(__file__).parents[2] / "shared"))
KINDS = [(0, "dog", True), (21, "sneezing", True), (36, "vacuum_cleaner", False)]  # target, category, esc10
CONFIGS = sorted((Path(__file__).parents[1] / "conf/data").glob("*.yaml"))


def sides(clips: list[Clip]) -> tuple[list[Clip], list[Clip]]:
    return [clip for clip in clips if clip.split == "train"], [clip for clip in clips if clip.split == "test"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_names_its_recipe(path: Path) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--recipe", type=Recipe)
    recipe = parser.instantiate(parser.parse_path(path)).recipe
    assert recipe.name == path.stem
    assert recipe.question.endswith("?")
    assert path.read_text().startswith("# ")


def test_a_folder_is_split_by_itself(tmp_path: Path) -> None:
    for name in (f"{label}/{n}.wav" for label in ("dog", "cat") for n in range(10)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    train, test = sides(Folder(str(tmp_path), test_fraction=0.3).clips())
    assert Counter(clip.label for clip in test) == {"dog": 3, "cat": 3}
    assert len(train) == 14


def test_a_manifest_keeps_its_splits(tmp_path: Path) -> None:
    clips = [Clip(f"{tmp_path}/{n}.wav", "dog", split) for n, split in enumerate(["train", "val", "test"])]
    write_manifest(clips, tmp_path / "m.jsonl")
    assert Manifest(str(tmp_path / "m.jsonl")).clips() == clips


def test_a_manifest_that_leaks_or_is_half_split_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest([Clip("/a.wav", "dog", "train", "g"), Clip("/b.wav", "dog", "test", "g")], path)
    with pytest.raises(ValueError, match="groups are in training and in test: g"):
        Manifest(str(path)).clips()
    write_manifest([Clip("/a.wav", "dog", "train"), Clip("/b.wav", "dog")], path)
    with pytest.raises(ValueError, match="1 of 2 clips have no split"):
        Manifest(str(path)).clips()


def test_own_data_must_be_named() -> None:
    for recipe in (Folder(), Manifest()):
        with pytest.raises(DataMissingError, match="DATA_DIR"):
            recipe.prepare()


@pytest.fixture
def esc50(tmp_path: Path) -> Path:
    rows = [
        f"{fold}-10{fold}{n}-A-{target}.wav,{fold},{target},{category},{esc10},10{fold}{n},A"
        for fold in range(1, 6)
        for n, (target, category, esc10) in enumerate(KINDS)
    ]
    (tmp_path / "meta").mkdir()
    (tmp_path / "audio").mkdir()
    (tmp_path / "meta/esc50.csv").write_text("filename,fold,target,category,esc10,src_file,take\n" + "\n".join(rows))
    return tmp_path


def test_esc50_folds(esc50: Path) -> None:
    recipe = Esc50(str(esc50), test_fold=2)
    recipe.prepare()
    train, test = sides(recipe.clips())
    assert (len(train), len(test)) == (12, 3)
    assert Clip(f"{esc50}/audio/2-1022-A-36.wav", "vacuum cleaner", "test", group="1022") in test
    check_disjoint(train, test)


def test_esc10_is_a_part_of_esc50(esc50: Path) -> None:
    assert {clip.label for clip in Esc10(str(esc50)).clips()} == {"dog", "sneezing"}


@pytest.mark.parametrize("fold", [0, 6])
def test_esc50_has_five_folds(fold: int) -> None:
    with pytest.raises(ValueError, match=f"test_fold is {fold}"):
        Esc50(test_fold=fold)


@pytest.mark.skipif(not (SHARED / "data/esc10").is_dir(), reason="no ../shared/data/esc10")
def test_the_real_esc10() -> None:
    recipe = Esc10(str(SHARED / "data/esc10"), test_fold=5)
    recipe.prepare()
    train, test = sides(recipe.clips())
    assert (len(train), len(test)) == (320, 80)
    assert set(Counter(clip.label for clip in test).values()) == {8}
    check_disjoint(train, test)
    drawn = [train[index] for index in draw_support(train, 5, seed=0)]
    assert len({clip.group for clip in drawn}) > 30  # at most 40 sources
    assert len(load_audio(test[0].audio, 16000, max_seconds=5)) == 80000


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ("crickets at night", "water drip", "bouncing ball")
    monkeypatch.setattr(synthetic, "SOUNDS", {label: SOUNDS[label] for label in quick})
    monkeypatch.setattr(synthetic, "TRAIN", 2)
    monkeypatch.setattr(synthetic, "TEST", 1)


@pytest.mark.usefixtures("small")
def test_synthetic_data_are_the_same_everywhere_and_no_clip_twice(tmp_path: Path) -> None:
    made = []
    for place in ("one", "two"):
        recipe = Synthetic(str(tmp_path / place), seed=3)
        recipe.prepare()
        recipe.prepare()  # the second time it is there
        made.append([Path(clip.audio).read_bytes() for clip in recipe.clips()])
    assert made[0] == made[1]
    assert len(set(made[0])) == len(made[0]) == 9
    assert Counter(clip.split for clip in recipe.clips()) == {"train": 6, "test": 3}
    other = Synthetic(str(tmp_path / "one"), seed=4)
    other.prepare()
    assert not set(made[0]) & {Path(clip.audio).read_bytes() for clip in other.clips()}
    assert soundfile.info(recipe.clips()[0].audio).samplerate == 16000


@pytest.mark.usefixtures("small")
def test_a_half_made_set_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Synthetic(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "write_manifest", None)  # all clips are made, their list is not
        with pytest.raises(TypeError):
            recipe.prepare()
    with pytest.raises(ManifestError, match="no such manifest"):
        recipe.clips()
    recipe.prepare()
    assert not list(tmp_path.glob(".*.partial"))
    assert len(recipe.clips()) == 9


def test_a_set_is_made_by_one_while_others_wait(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.05)
        (folder / "done").touch()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: make_once(tmp_path / "set", make), range(4)))
    assert len(made) == 1
    assert (tmp_path / "set/done").exists()


@pytest.mark.parametrize("label", SOUNDS)
def test_every_sound_can_be_heard_and_varies(label: str) -> None:
    waves = [synthetic.scene(np.random.default_rng(seed), label) for seed in range(2)]
    for wave in waves:
        assert wave.shape == (80000,)
        assert np.isfinite(wave).all()
        assert 0.01 < np.abs(wave).max() <= 1
    assert not np.allclose(*waves)


def test_every_recipe_has_a_config_and_a_place_in_the_docs() -> None:
    docs = (Path(__file__).parents[1] / "docs/reference/datasets.md").read_text(encoding="utf-8")
    assert {path.stem for path in CONFIGS} == set(RECIPES)
    headings = {
        name.strip("` ") for line in docs.splitlines() if line.startswith("### ") for name in line[4:].split(",")
    }
    assert headings == set(RECIPES)


def test_a_folder_that_cannot_be_made_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataMissingError, match=r"cannot be made \(.*\): set CALM_DATA to a folder"):
        Synthetic(data_dir=str(tmp_path / "file" / "data")).prepare()
