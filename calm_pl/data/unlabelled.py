"""Clips without labels: folders of audio files, and what to do with labels that a model gave."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from calm_pl.audio import EXTENSIONS
from calm_pl.clip import Clip
from calm_pl.data.manifest import read_manifest


def unlabelled_clips(source: str | os.PathLike[str]) -> list[Clip]:
    """Clips of a folder (its audio files at any depth) or of a manifest, in a fixed order, without their labels.

    Raises:
        ManifestError: a manifest that cannot be read.
        ValueError: the folder holds no audio.
    """
    path = Path(source).expanduser().absolute()
    if not path.is_dir():
        return [replace(clip, label=None, confidence=None) for clip in read_manifest(path)]
    files = sorted(
        file for file in path.rglob("*")
        if file.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )  # fmt: skip
    if not files:
        raise ValueError(f"{path}: no audio files in it or below it ({', '.join(EXTENSIONS)})")
    return [Clip(str(file)) for file in files]


def relabelled(pool: Sequence[Clip], manifest: str | os.PathLike[str]) -> list[Clip]:
    """The clips of a pool that a manifest of pseudo-labels knows, with its label and confidence instead of their own.

    Raises:
        ValueError: it knows none of them.
    """
    given = {(clip.audio, clip.start, clip.end): clip for clip in read_manifest(manifest) if clip.labels}
    found = [
        replace(clip, label=given[key].label, confidence=given[key].confidence)
        for clip in pool
        if (key := (clip.audio, clip.start, clip.end)) in given
    ]
    if not found:
        raise ValueError(f"{manifest}: knows none of the {len(pool)} training clips; was it made of another data set?")
    return found
