"""The backbone asked in words, as a baseline: which class its answer names, told in one of three ways.

Shapes: B clips of a batch, N clips, C classes, V numbers kept of a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from calm_pl.backbone.answers import (
    generate_answers,
    label_log_likelihoods,
    leading_letter,
    letter_log_likelihoods,
    named_labels,
)
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.processing import LALMInputs
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip
from calm_pl.training.extraction import HeadExtraction

Answers = Literal["likelihood", "letters", "generation"]


class ZeroShot(HeadExtraction):
    """Asks about every clip; what it keeps in a head store (1 x V) tells the class by :meth:`probabilities`.

    ``likelihood`` compares the class names' mean log-likelihoods per token as the answer; ``letters`` the likelihoods
    of the letters before the options that the question lists; ``generation`` decodes an answer greedily and looks for a
    class name in it, or, where options are listed, for the letter that it starts with. Where a clip has options, only
    they count. An answer that names none of them is wrong. Of a clip in pieces each piece answers, and the mean counts.

    Args:
        backbone: the model that is asked.
        clips: N clips to ask about.
        classes: C names.
        answers: how the answer is told.
        lalm: the backbone, where it is loaded already.

    Raises:
        ValueError: ``answers`` is unknown, or ``letters`` of a clip without options, or with more than there are.
    """

    title = "asking in words"

    def __init__(
        self,
        backbone: Backbone,
        clips: Sequence[Clip],
        classes: Sequence[str],
        answers: Answers,
        lalm: FrozenLALM | None = None,
    ) -> None:
        super().__init__(backbone, lalm)
        if answers not in get_args(Answers):
            raise ValueError(f"zero_shot_by={answers!r} is unknown: choose one of {', '.join(get_args(Answers))}.")
        bare = next((clip for clip in clips if not clip.options), None)
        if answers == "letters" and bare is not None:
            raise ValueError(f"{bare.audio}: zero_shot_by=letters needs options to choose from: set protocol to mcq.")
        self.classes = list(classes)
        self.answers = answers
        most = max(clips, key=lambda clip: len(clip.options or ()), default=None)
        self.num_letters = len(most.options or ()) if most else 0
        if answers == "letters" and most is not None and self.num_letters > len(ascii_uppercase):
            raise ValueError(
                f"{most.audio}: has {self.num_letters} options, and there are {len(ascii_uppercase)} letters: set "
                "zero_shot_by to likelihood or generation."
            )

    def store_key(self) -> dict[str, Any]:
        """What decides the numbers kept, beyond the clip and the backbone."""
        labels = {} if self.answers == "letters" else {"labels": self.classes}
        letters = {} if self.answers == "likelihood" else {"letters": self.num_letters}
        # Named only where used: answers to whole clips stay valid.
        pieces = {"pieces": "mean"} if self.answers == "generation" and self.backbone.long_clips == "split" else {}
        return {"zero_shot": self.answers, **labels, **letters, **pieces}

    def vectors(self, inputs: LALMInputs) -> Tensor:
        if self.answers == "likelihood":
            kept_BV = label_log_likelihoods(self.lalm, inputs, self.classes)
        elif self.answers == "letters":
            kept_BV = letter_log_likelihoods(self.lalm, inputs, self.num_letters)
        else:
            kept_BV = inputs.in_parts(self._answered) if inputs.parts else self._answered(inputs)
        return kept_BV[:, None, :]

    def vector_names(self) -> list[str]:
        return ["answer"]

    def _answered(self, inputs: LALMInputs) -> Tensor:
        return torch.stack([self._mentions(answer) for answer in generate_answers(self.lalm, inputs)])

    def _mentions(self, answer: str) -> Tensor:
        """For each class 1, 1/2, 1/3, ... in the order in which the answer names them, else 0; then its letter (V)."""
        mentions_V = torch.zeros(len(self.classes) + self.num_letters, dtype=torch.float32)
        for rank, index in enumerate(named_labels(answer, self.classes)):
            mentions_V[index] = 1 / (1 + rank)
        letter = leading_letter(answer)
        if letter is not None and letter < self.num_letters:
            mentions_V[len(self.classes) + letter] = 1
        return mentions_V

    def probabilities(self, kept_NV: Tensor, clips: Sequence[Clip]) -> Tensor:
        """Class probabilities (N, C) of clips from what is kept of them; a row of zeros is no answer."""
        rows = [self._row(kept_V, clip.options) for kept_V, clip in zip(kept_NV, clips, strict=True)]
        return torch.stack(rows) if rows else torch.empty(0, len(self.classes))

    def _row(self, kept_V: Tensor, options: tuple[str, ...] | None) -> Tensor:
        row_C = torch.zeros(len(self.classes))
        listed = [self.classes.index(option) if option in self.classes else None for option in options or self.classes]
        if self.answers == "letters":
            shares = kept_V[: len(listed)].softmax(0)
        elif self.answers == "likelihood":
            shares = torch.tensor([-torch.inf if i is None else float(kept_V[i]) for i in listed]).softmax(0)
        else:
            mentioned = torch.tensor([0.0 if i is None else float(kept_V[i]) for i in listed])
            if options and not mentioned.any():
                mentioned = kept_V[len(self.classes) :][: len(listed)]
            best = (mentioned == mentioned.max()) & (mentioned > 0)
            shares = best / best.sum().clamp_min(1)  # pieces of a clip may disagree evenly
        for share, index in zip(shares.tolist(), listed, strict=True):
            if index is not None:
                row_C[index] = share
        return row_C
