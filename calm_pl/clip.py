"""One clip, and batches of clips of similar length."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calm_pl.audio import AudioError, audio_seconds

# Asked about a clip that has no question of its own, and the text that it stands in.
DEFAULT_QUESTION = "What sound is this?"
DEFAULT_PROMPT = "{question} Answer with the class name."


@dataclass(frozen=True)
class Clip:
    """One clip to hear: a file, or the part of it from `start` to `end`.

    Attributes:
        audio: absolute path of the file; of a video, its sound track is heard.
        label: its class; a tuple where it has several (multi-label); None where it is not known.
        split: "train" (support clips are drawn from it), "val", "test", or None.
        group: clips of one source (recording, speaker, take) share it; never on both sides of a split.
        start: first second.
        end: last second.
        question: what the prompt asks about this clip, instead of the backbone's own question.
        options: the answers that the question lists.
        video: absolute path of the file whose pictures are shown with it; without one, `audio`'s own are.
        confidence: how sure its label is, from 0 to 1, where a model gave it; None where a person did.
    """

    audio: str
    label: str | tuple[str, ...] | None = None
    split: str | None = None
    group: str | None = None
    start: float | None = None
    end: float | None = None
    question: str | None = None
    options: tuple[str, ...] | None = None
    video: str | None = None
    confidence: float | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Its classes as a tuple: none, one or several."""
        return () if self.label is None else (self.label,) if isinstance(self.label, str) else self.label


def labels_per_clip(clips: Sequence[Clip]) -> float:
    """How many labels labelled clips have on average; 1 of no clips."""
    return sum(len(clip.labels) for clip in clips) / len(clips) if clips else 1.0


def absolute_path(path: str | os.PathLike[str]) -> str:
    """As clips name their files: without `..`, which of a link to a folder is the folder that the link leads into, as
    `open` has it."""
    there = Path(path).absolute()
    if ".." in there.parts:
        return os.path.join(os.path.realpath(there.parent), there.name)
    return os.path.normpath(there)


def length_batches(clips: Sequence[Clip], batch_size: int) -> list[list[int]]:
    """Split clip positions into batches of similar length, longest first.

    Longest first, because a batch that does not fit into memory should fail at once.
    """
    order = sorted(range(len(clips)), key=lambda i: (-seconds_or_zero(clips[i]), i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def seconds_or_zero(clip: Clip) -> float:
    """Length by the file's header; 0 for a file that cannot be read, whose error is told when it is decoded."""
    try:
        return audio_seconds(clip.audio, clip.start, clip.end)
    except AudioError:
        return 0.0
