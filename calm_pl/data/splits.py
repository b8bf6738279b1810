"""Who learns and who is tested: support sets, and splits for data that comes without one."""

from __future__ import annotations

import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from calm_pl.clip import Clip

T = TypeVar("T")


def draw_support(clips: Sequence[Clip], shots: int | None, seed: int, by_confidence: bool = False) -> list[int]:
    """Draw `shots` clips of every class.

    Of one seed, fewer shots are a subset of more shots, and what a class gets does not depend on the other
    classes. Clips of different groups come first, so that few shots cover many sources. Of multi-label clips,
    every label gets at least `shots`.

    Args:
        clips: the support pool (the training split).
        shots: clips a class; None takes all.
        seed: chooses the draw.
        by_confidence: draw clips in proportion to how sure their label is.

    Returns:
        Indices into `clips`, class by class in alphabetical order.

    Raises:
        ValueError: a clip has no label, shots < 1, or classes have too few clips (listed with counts).
    """
    if shots is not None and shots < 1:
        raise ValueError(f"shots is {shots}; at least 1 clip a class is needed")
    members = _by_label(clips)
    short = {label: len(indices) for label, indices in members.items() if shots and len(indices) < shots}
    if short:
        raise ValueError(
            f"{shots} shots need {shots} training clips a class, and these have fewer: {_counts(short)}; "
            f"ask for {min(short.values())} shots, or add clips"
        )
    chosen: dict[int, None] = {}  # a set that keeps its order
    for label, indices in sorted(members.items()):
        shuffled = _by_confidence(indices, clips, seed, label) if by_confidence else _shuffled(indices, seed, label)
        seen: Counter[str] = Counter()
        rounds = {}  # how many clips of the same group come before
        for index in shuffled:
            rounds[index] = seen[_source(clips[index])]
            seen[_source(clips[index])] += 1
        chosen.update(dict.fromkeys(sorted(shuffled, key=rounds.__getitem__)[:shots]))
    return list(chosen)


def split_clips(clips: Sequence[Clip], test_fraction: float, seed: int) -> list[Clip]:
    """Set `split` to "train" or "test", stratified by label, with every group on one side.

    Parts of one file count as a group where no other is given.

    Args:
        clips: labelled clips; a split that they have is replaced.
        test_fraction: share of test clips aimed at in every class, between 0 and 1.
        seed: chooses the split.

    Returns:
        The clips in their order.

    Raises:
        ValueError: test_fraction is not between 0 and 1, a clip has no label, or classes cannot be on both
            sides (one clip, or all clips of one group); they are listed with their counts.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}; a share between 0 and 1 is needed")
    members = _by_label(clips)
    sides: dict[str, str] = {}
    # Small classes first: they have the least choice where a group holds several classes.
    for label, indices in sorted(members.items(), key=lambda item: (len(item[1]), item[0])):
        sizes = Counter(_source(clips[index]) for index in indices)
        tested = sum(size for source, size in sizes.items() if sides.get(source) == "test")
        trained = sum(size for source, size in sizes.items() if sides.get(source) == "train")
        aim = min(max(1, round(test_fraction * len(indices))), len(indices) - 1)
        open_sources = _shuffled([source for source in sizes if source not in sides], seed, label)
        for position, source in enumerate(open_sources):
            wanted = abs(tested + sizes[source] - aim) < abs(tested - aim)
            if position == len(open_sources) - 1:  # neither side may stay empty
                wanted = not tested or (wanted and trained > 0)
            if wanted:
                sides[source], tested = "test", tested + sizes[source]
            else:
                sides[source], trained = "train", trained + sizes[source]
    parted = [replace(clip, split=sides[_source(clip)]) for clip in clips]
    lonely = {
        label: len(indices) for label, indices in members.items() if len({parted[index].split for index in indices}) < 2
    }
    if lonely:
        raise ValueError(
            f"these classes cannot be split without a group on both sides: {_counts(lonely)}; "
            "add clips of another group to each (without groups every file is one), or leave the class out"
        )
    return parted


def check_disjoint(train: Sequence[Clip], test: Sequence[Clip], part: str = "test") -> None:
    """Make sure that no test (or validation) clip is known from training.

    Raises:
        ValueError: a group is on both sides, or the same audio (the file, or overlapping parts of it).
    """
    shared = {clip.group for clip in train if clip.group} & {clip.group for clip in test if clip.group}
    if shared:
        raise ValueError(f"{len(shared)} groups are in training and in {part}: {_some(sorted(shared))}")
    trained = defaultdict(list)
    for clip in train:
        trained[clip.audio].append(_interval(clip))
    leaked = []
    for clip in test:
        start, end = _interval(clip)
        if any(start < other_end and other_start < end for other_start, other_end in trained.get(clip.audio, ())):
            leaked.append(clip.audio)
    if leaked:
        raise ValueError(f"{len(leaked)} {part} clips are also training clips: {_some(leaked)}")


def without_repeats(clips: Sequence[Clip]) -> list[Clip]:
    """The clips without those that were there before: one that is there twice would vouch for itself. Asked another
    question, a clip is another.

    Raises:
        ValueError: a clip is listed with different labels.
    """
    known: dict[tuple[object, ...], Clip] = {}
    repeated = []
    for clip in clips:
        first = known.setdefault((clip.audio, clip.start, clip.end, clip.question, clip.options), clip)
        if first.labels != clip.labels:
            raise ValueError(
                f"{clip.audio}: is listed as {', '.join(first.labels)} and as {', '.join(clip.labels)}; where both are "
                'right, list it once with label ["one", "two"]'
            )
        if first is not clip:
            repeated.append(clip.audio)
    if repeated:
        warnings.warn(
            f"{len(repeated)} training clips are listed twice, and count once: {_some(repeated)}", stacklevel=2
        )
    return list(known.values())


def _by_label(clips: Sequence[Clip]) -> dict[str, list[int]]:
    members = defaultdict(list)
    for index, clip in enumerate(clips):
        if not clip.labels:
            raise ValueError(f"{clip.audio}: has no label; classes are learned from labelled clips")
        for label in dict.fromkeys(clip.labels):
            members[label].append(index)
    return dict(members)


def _source(clip: Clip) -> str:
    return f"file {clip.audio}" if clip.group is None else f"group {clip.group}"


def _interval(clip: Clip) -> tuple[float, float]:
    return clip.start or 0.0, float("inf") if clip.end is None else clip.end


def _shuffled(items: Sequence[T], seed: int, label: str) -> list[T]:
    shuffled = list(items)
    random.Random(f"{seed} {label}").shuffle(shuffled)  # a text seeds the same in every process
    return shuffled


def _by_confidence(indices: Sequence[int], clips: Sequence[Clip], seed: int, label: str) -> list[int]:
    """A random order, the next clip always drawn in proportion to its confidence (Efraimidis and Spirakis, 2006)."""
    rng = random.Random(f"{seed} {label} by confidence")
    weights = {i: 1.0 if (sure := clips[i].confidence) is None else max(sure, 1e-6) for i in indices}
    waits = {i: rng.expovariate(weights[i]) for i in indices}
    return sorted(indices, key=waits.__getitem__)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{label} ({count})" for label, count in sorted(counts.items()))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
