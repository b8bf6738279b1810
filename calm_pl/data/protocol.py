"""What a prompt tells of the classes: nothing (`open`), or answer options, the true one among them (`mcq`).

Shapes: B clips, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calm_pl.clip import DEFAULT_QUESTION, Clip
from calm_pl.data.options import mcq
from calm_pl.data.recipes import Recipe


@dataclass(frozen=True)
class Protocol:
    """How clips are asked about; results that differ in it are never compared.

    The arguments are those of `AudioEpisodeDataModule`.

    Raises:
        ValueError: the protocol is unknown, or has no options to stay within.
    """

    protocol: str = "open"
    num_options: int = 4
    letters: bool = True
    options_seed: int = 0
    within_options: bool = False

    def __post_init__(self) -> None:
        if self.protocol not in ("open", "mcq"):
            raise ValueError(f"protocol={self.protocol!r} is unknown: choose open or mcq.")
        if self.within_options and not self.lists_options:
            raise ValueError("within_options is for protocol=mcq: the open question lists no options.")

    @property
    def lists_options(self) -> bool:
        return self.protocol == "mcq"

    def asked(self, clips: list[Clip], recipe: Recipe) -> list[Clip]:
        """The clips with the question of the protocol; a clip's own question stays.

        Raises:
            ValueError: the protocol is open, and a clip's own question lists options.
        """
        if self.lists_options:
            labels = sorted({label for clip in clips for label in clip.labels})
            return mcq(clips, labels, self.num_options, self.letters, self.options_seed, recipe.question)
        if any(clip.options for clip in clips):
            raise ValueError(
                f"{recipe.name}: clips come with answer options, which is the mcq protocol: "
                "set protocol=mcq (--data.protocol mcq), which keeps their questions as they are."
            )
        if recipe.question == DEFAULT_QUESTION:
            return clips
        return [clip if clip.question else replace(clip, question=recipe.question) for clip in clips]

    def check_own(self, clip: Clip) -> None:
        """Refuse a clip of a stream, which keeps the question that it came with, if that is of the other protocol.

        Raises:
            ValueError: it lists options under ``open``, or none under ``mcq``.
        """
        if clip.options and not self.lists_options:
            raise ValueError(f"{clip.audio}: comes with answer options, which is the mcq protocol: set protocol=mcq.")
        if self.lists_options and not clip.options:
            raise ValueError(
                f"{clip.audio}: has no answer options, which protocol=mcq asks with: give them in the manifest that "
                "the shards are made from."
            )

    def among_options(self, probabilities_BC: Tensor, clips: Sequence[Clip], classes: Sequence[str]) -> Tensor:
        """The probabilities without classes that the clips' questions do not list, as ``within_options`` asks for.

        Rows sum to 1 again; where a method gives none of the options any probability, they share it.

        Raises:
            ValueError: a clip's options are no classes.
        """
        index = {name: c for c, name in enumerate(classes)}
        listed_BC = torch.zeros_like(probabilities_BC)
        for row, clip in enumerate(clips):
            options = clip.options or ()
            if not options or any(option not in index for option in options):
                raise ValueError(f"{clip.audio}: its options {', '.join(options)} are not among the classes.")
            listed_BC[row, [index[option] for option in options]] = 1
        kept_BC = (probabilities_BC + torch.finfo(torch.float32).tiny) * listed_BC
        return kept_BC / kept_BC.sum(1, keepdim=True)

    def description(self) -> dict[str, Any]:
        """For ``results.json``."""
        return asdict(self) if self.lists_options else {"protocol": self.protocol}
