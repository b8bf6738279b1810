"""The `mcq` protocol: the question lists answer options, the true one among them."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from calm_pl.clip import DEFAULT_QUESTION, Clip


def mcq(
    clips: Sequence[Clip],
    labels: Sequence[str],
    num_options: int = 4,
    letters: bool = True,
    seed: int = 0,
    question: str = DEFAULT_QUESTION,
) -> list[Clip]:
    """Give every clip a multiple-choice question, written as the published CALM code writes it.

    The wrong options and their order depend on the seed and on the clip's own name, part and label, so the same clip
    gets the same options in any process, on any machine, among any other clips. A multi-label clip becomes one clip a
    label, whose wrong options are none of its labels.

    Args:
        clips: labelled clips; a question of their own is kept and the options are added to it. A clip that has
            options of its own stays as it is.
        labels: all classes of the data set.
        num_options: options a question, the true one included.
        letters: "A. Dog bark B. Rain" on one line; otherwise one option a line.
        seed: chooses wrong options and order.
        question: for clips that have none.

    Returns:
        The clips in their order with `question`, `options` and a single `label`.

    Raises:
        ValueError: a clip has no label, or there are too few labels or letters for so many options.
    """
    known = sorted(set(labels))
    limit = min(len(known), len(string.ascii_uppercase)) if letters else len(known)
    if not 2 <= num_options <= limit and not all(clip.options for clip in clips):
        raise ValueError(f"num_options is {num_options}; with {len(known)} labels it must be 2 to {limit}")
    asked = []
    for clip in clips:
        if clip.options:
            asked.append(clip)
            continue
        if not clip.labels:
            raise ValueError(f"{clip.audio}: has no label, and options need the true one among them")
        wrong = [label for label in known if label not in clip.labels]
        if len(wrong) < num_options - 1:
            raise ValueError(f"{clip.audio}: {num_options} options need {num_options - 1} labels that it does not have")
        for label in clip.labels:
            rng = random.Random("\n".join(map(str, (seed, label, Path(clip.audio).name, clip.start, clip.end))))
            options = [label, *rng.sample(wrong, num_options - 1)]
            rng.shuffle(options)
            text = f"{clip.question or question}\n{_listed(options, letters)}"
            asked.append(replace(clip, label=label, question=text, options=tuple(options)))
    return asked


def _listed(options: Sequence[str], letters: bool) -> str:
    if not letters:
        return "\n".join(options)
    return " ".join(f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False))
