"""Shared pieces: small checkpoints, small sounds, and where the measuring data lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from torch import Tensor

if TYPE_CHECKING:
    from calm_pl import CalmClassifier

RATE = 16_000
ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session", autouse=True)
def _private_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither read nor fill the user's own caches, and never look for a network."""
    caches = tmp_path_factory.mktemp("caches")
    os.environ["CALM_STORE"] = str(caches / "heads")
    os.environ["CALM_DATA"] = str(caches / "data")
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tiny_lalm() -> str:
    """The random-weight Qwen2-Audio whose head outputs the oracle holds."""
    return str(DATA / "pipeline" / "tiny-random")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real audio and a real model for measuring, where they are at hand."""
    folder = Path(os.environ.get("CALM_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no measuring data at {folder} (set CALM_SHARED)")
    return folder


def tone(path: Path, frequency: float, seconds: float = 0.6, seed: int = 0) -> Path:
    """A noisy tone: the simplest sound whose class can be told."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(0, 0.05, len(time))
    soundfile.write(path, 0.4 * np.sin(2 * np.pi * frequency * time) + noise, RATE)
    return path


def damaged(path: Path) -> Path:
    """A float file with one sample far beyond full scale."""
    wave = np.zeros(RATE // 2, dtype=np.float32)
    wave[100] = 3e38
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    return path


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder data set of three classes: 4 training and 3 test clips each, of different lengths."""
    folder = tmp_path_factory.mktemp("tones")
    for label, frequency in (("low", 200), ("middle", 900), ("high", 3000)):
        for split, count in (("train", 4), ("test", 3)):
            for number in range(count):
                seed = number + 10 * (split == "test")
                seconds = 0.4 + 0.15 * number
                tone(folder / split / label / f"{number}.wav", frequency * (1 + 0.02 * seed), seconds, seed)
    return folder


@pytest.fixture(scope="session")
def unbroken(tones: Path, tiny_lalm: str, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """What one undisturbed extraction of the tones keeps: (N, K, D)."""
    from tests.extracting import fill, stored

    root = tmp_path_factory.mktemp("unbroken") / "heads"
    fill(tones, tiny_lalm, root)
    return stored(tones, tiny_lalm, root)


@pytest.fixture(scope="session")
def labelled(tones: Path) -> tuple[list[Path], list[str]]:
    """The training tones, and what each is."""
    files = sorted((tones / "train").rglob("*.wav"))
    return files, [file.parent.name for file in files]


@pytest.fixture(scope="session")
def classifier(labelled: tuple[list[Path], list[str]], tiny_lalm: str) -> CalmClassifier:
    """Fitted on them."""
    from calm_pl import CalmClassifier

    return CalmClassifier().fit(*labelled, backbone=tiny_lalm)


@pytest.fixture(scope="session")
def several(labelled: tuple[list[Path], list[str]], tiny_lalm: str) -> CalmClassifier:
    """A classifier of clips with two labels each, but for one with one."""
    from calm_pl import CalmClassifier
    from calm_pl.baselines import SAV

    pitches = [name if n == 0 else (name, "shrill" if name == "high" else "dull") for n, name in enumerate(labelled[1])]
    return CalmClassifier(SAV(num_heads=5)).fit(labelled[0], pitches, backbone=tiny_lalm)
