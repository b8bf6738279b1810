"""The built-in data set: sixteen everyday sounds, synthesised on first use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import soundfile
from numpy.random import Generator

from calm_pl.clip import Clip
from calm_pl.data.manifest import read_manifest, write_manifest
from calm_pl.data.recipes.base import data_root, make_once
from calm_pl.data.recipes.sounds import SOUNDS
from calm_pl.data.recipes.synthesis import RATE, Wave, background, microphone, room
from calm_pl.progress import track

VERSION = 1  # part of the folder's name: change it with anything that changes a sound
TRAIN, TEST = 25, 15  # clips a class


@dataclass
class Synthetic:
    """640 clips of 5 s at 16 kHz, 16 classes, made from a seed. Every clip has a generator of its own.

    Attributes:
        data_dir: folder to make it in; None is the data cache.
        seed: another seed, another data set.
    """

    data_dir: str | None = None
    seed: int = 0

    name: ClassVar[str] = "synthetic"
    question: ClassVar[str] = "What sound is this?"

    def prepare(self) -> None:
        make_once(self._root(), self._make)

    def clips(self) -> list[Clip]:
        return read_manifest(self._root() / "manifest.jsonl")

    def _root(self) -> Path:
        return data_root(self.name, self.data_dir) / f"version-{VERSION}-seed-{self.seed}"

    def _make(self, folder: Path) -> None:
        numbered = [(label, number) for label in SOUNDS for number in range(TRAIN + TEST)]
        clips = []
        for label, number in track(numbered, "making the synthetic data set", len(numbered), "clips"):
            split = "train" if number < TRAIN else "test"
            path = folder / split / label.replace(" ", "_") / f"{number:02d}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng([self.seed, list(SOUNDS).index(label), number])
            soundfile.write(path, scene(rng, label), RATE, subtype="PCM_16")
            clips.append(Clip(str(path), label, split))
        write_manifest(clips, folder / "manifest.jsonl")


def scene(rng: Generator, label: str) -> Wave:
    """One sound as a microphone hears it: in a room, among others, over background noise, at some level.

    Returns:
        (T,) float64 in [-1, 1], five seconds at 16 kHz.
    """
    wave = room(rng, _level(SOUNDS[label](rng)))
    if rng.random() < 0.5:  # something else goes on, further away
        other = rng.choice([name for name in SOUNDS if name != label])
        wave = wave + 10 ** (rng.uniform(-30, -15) / 20) * room(rng, _level(SOUNDS[other](rng)))
    wave = wave + 10 ** (-rng.uniform(3, 25) / 20) * background(rng)
    wave = microphone(rng, wave)
    clipped: Wave = np.clip(wave / np.abs(wave).max() * 10 ** (rng.uniform(-24, 3) / 20), -1, 1)
    return clipped


def _level(wave: Wave) -> Wave:
    """Scale so that the louder frames, not the pauses, have unit RMS."""
    frames = np.sqrt(np.mean(wave.reshape(-1, 400) ** 2, axis=1))
    return wave / float(np.quantile(frames, 0.9) + 0.1 * frames.max() + 1e-9)
