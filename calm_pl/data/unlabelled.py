"""Clips without labels: folders of audio files, and what to do with labels that a model gave."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from calm_pl.audio import EXTENSIONS, NOT_UTF8, is_utf8
from calm_pl.clip import Clip, absolute_path
from calm_pl.data.manifest import ManifestError, read_manifest


def unlabelled_clips(source: str | os.PathLike[str]) -> list[Clip]:
    """Clips of a folder (its audio files at any depth) or of a manifest, in a fixed order, without their labels.

    Raises:
        ManifestError: a manifest that cannot be read, or a file whose name no manifest could hold.
        ValueError: the folder holds no audio.
    """
    path = Path(absolute_path(Path(source).expanduser()))
    if not path.is_dir():
        return [replace(clip, label=None, confidence=None) for clip in read_manifest(path)]
    files = audio_files(path)
    if not files:
        raise ValueError(f"{path}: no audio files in it or below it ({', '.join(EXTENSIONS)})")
    for file in files:
        if not is_utf8(file):
            raise ManifestError(f"{os.fsencode(file)!r}: {NOT_UTF8}")
    return [Clip(str(file)) for file in files]


def audio_files(folder: Path) -> list[Path]:
    """The audio files of a folder, at any depth, but hidden ones; in a fixed order."""
    return sorted(
        file for file in folder.rglob("*")
        if file.suffix.lower() in EXTENSIONS and not any(part[0] == "." for part in file.relative_to(folder).parts)
    )  # fmt: skip


def labelled_clips(source: str | os.PathLike[str]) -> list[Clip]:
    """The clips of a manifest that have a label, or all of a folder; without their labels.

    Raises:
        ManifestError: as `unlabelled_clips`.
        ValueError: as `unlabelled_clips`.
    """
    if Path(source).expanduser().is_dir():
        return unlabelled_clips(source)
    clips = read_manifest(Path(source).expanduser())
    return [replace(clip, label=None, confidence=None) for clip in clips if clip.labels]


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
