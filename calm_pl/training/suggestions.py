"""Active learning: the clips of an unlabelled set that are most worth a person's time.

Shapes: N clips, K heads, D head dimension, C classes, F features.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from calm_pl.backbone.precision import PRECISION_DTYPES
from calm_pl.backbone.spec import Backbone
from calm_pl.classifier import CalmClassifier
from calm_pl.clip import Clip
from calm_pl.headstore import HeadStore
from calm_pl.methods.suggestion import by_coverage, by_entropy, by_margin, head_features
from calm_pl.training.extraction import HeadExtraction
from calm_pl.training.extraction_data import ClipDataModule
from calm_pl.training.trainer import CalmTrainer

By = Literal["margin", "entropy", "coverage"]
# Clips whose head outputs are in memory at once.
CHUNK = 256


class Suggester:
    """Ranks unlabelled clips by what a classifier is unsure of, or by what lies far from everything labelled.

    Args:
        clips: unlabelled ones.
        labelled: clips that have a label already; `coverage` keeps away from them.
        classifier: of an earlier round; None where there is none yet: then only `coverage` works.
        backbone: whose heads are read, where there is no classifier.
        store: folder of the head store; None is the usual one.
        batch_size: clips in one pass.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        labelled: Sequence[Clip] = (),
        classifier: CalmClassifier | None = None,
        backbone: Backbone | None = None,
        store: str | Path | None = None,
        batch_size: int = 8,
    ) -> None:
        known = {_place(clip) for clip in labelled}
        # Heads are read under the question that the classifier was fitted with.
        asked = classifier.asked if classifier else list
        self.clips = asked(clip for clip in clips if _place(clip) not in known)
        self.labelled = asked(labelled)
        self.classifier = classifier
        found = classifier.backbone if classifier else backbone
        if found is None:
            raise ValueError("name a classifier or a backbone")
        if not self.clips:
            raise ValueError("every clip is labelled already")
        self.backbone = found
        self.dtype = classifier.dtype if classifier else "float32"
        self.store = HeadStore(self.backbone.store_key(self.dtype, store), store)
        self.batch_size = batch_size

    def suggest(self, by: By, count: int) -> list[tuple[Clip, str]]:
        """The ``count`` clips most worth a label, the most first, each with what the classifier takes it for.

        Raises:
            ValueError: ``by`` needs a classifier; or no clip can be used.
        """
        if by != "coverage" and self.classifier is None:
            raise ValueError(f"by {by} asks a classifier what it is unsure of: give one, or take coverage")
        clips = self._readable(self.clips)
        probabilities_NC = self._probabilities(clips)
        if by == "coverage":
            labelled = self._readable(self.labelled) if self.labelled else []
            before_LF = self._features(labelled) if labelled else None
            order = by_coverage(self._features(clips), count, before_LF)
        else:
            assert probabilities_NC is not None
            order = (by_margin if by == "margin" else by_entropy)(probabilities_NC)[:count]
        guesses = [""] * len(clips)
        if probabilities_NC is not None and self.classifier is not None:
            guesses = [self.classifier.classes[c] for c in probabilities_NC.argmax(1).tolist()]
        return [(clips[n], guesses[n]) for n in order.tolist()]

    def _readable(self, clips: Sequence[Clip]) -> list[Clip]:
        """Those whose head outputs are in the store, after reading what was missing."""
        precision: Any = next(name for name, dtype in PRECISION_DTYPES.items() if dtype == self.dtype)
        trainer = CalmTrainer(
            devices=1, precision=precision, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        waiting = ClipDataModule(clips, self.backbone, self.store, self.batch_size)
        trainer.fill(self.store, HeadExtraction(self.backbone), waiting)
        keys = self.store.clip_keys(clips)
        missing = {keys[i] for i in self.store.missing(keys)}
        found = [clip for clip, key in zip(clips, keys, strict=True) if key not in missing]
        if not found:
            raise ValueError("none of the clips can be used")
        return found

    def _heads(self, clips: Sequence[Clip]) -> Iterator[Tensor]:
        for first in range(0, len(clips), CHUNK):
            yield self.store.read(self.store.clip_keys(clips[first : first + CHUNK]))

    def _features(self, clips: Sequence[Clip]) -> Tensor:
        return torch.cat([head_features(heads_NKD) for heads_NKD in self._heads(clips)])

    def _probabilities(self, clips: Sequence[Clip]) -> Tensor | None:
        if self.classifier is None:
            return None
        with torch.inference_mode():
            return torch.cat([self.classifier.method(heads_NKD) for heads_NKD in self._heads(clips)])


def _place(clip: Clip) -> tuple[str, float | None, float | None]:
    """By which a clip is known again, by whatever way to its file."""
    return os.path.realpath(clip.audio), clip.start, clip.end
