"""Labels that the backbone gives itself: asked in words about clips that nobody has labelled.

Shapes: B clips of a batch, N clips, C classes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from calm_pl.backbone.precision import arithmetic
from calm_pl.backbone.processing import LALMInputs
from calm_pl.backbone.sampling import sampled_votes
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.stream import ClipBatch
from calm_pl.headstore import HeadStore
from calm_pl.training.extraction import HeadBatch, HeadExtraction
from calm_pl.training.extraction_data import ClipDataModule
from calm_pl.training.trainer import CalmTrainer
from calm_pl.training.zero_shot import ZeroShot

By = Literal["likelihood", "answers"]


@dataclass(frozen=True)
class Asking:
    """How the backbone is asked, and which of its labels are kept.

    Args:
        by: ``likelihood`` takes the class name that is likeliest as the answer: one pass, the same every time;
            ``answers`` lets the model answer ``trials`` times with sampling, and takes the majority.
        trials: sampled answers a clip.
        temperature: of the sampling.
        max_new_tokens: of an answer.
        seed: of the sampling; the same clips with the same seed get the same answers.
        balance: with ``likelihood``, take out how likely a name is for the average clip: names differ more in how
            common they are than in how well they fit. Left out where there are no more clips than names.
        threshold: labels of less confidence are dropped; null is 0.5 for ``answers`` (the majority) and 0 for
            ``likelihood``. Confidence is the share of the answers, or the probability among the class names.
        keep: keep so many clips a class, the surest ones; null keeps all.
    """

    by: By = "likelihood"
    trials: int = 5
    temperature: float = 1.0
    max_new_tokens: int = 16
    seed: int = 0
    balance: bool = True
    threshold: float | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.by not in ("likelihood", "answers"):
            raise ValueError(f"by={self.by!r} is unknown: choose likelihood or answers.")
        if self.trials < 1 or self.temperature <= 0:
            raise ValueError(f"trials={self.trials}, temperature={self.temperature}: both must be above 0.")


class SampledAnswers(HeadExtraction):
    """Lets the backbone answer several times; keeps each clip's votes (1 x C + 1, the last for no class)."""

    title = "sampling answers"

    def __init__(self, backbone: Backbone, classes: Sequence[str], asking: Asking) -> None:
        super().__init__(backbone)
        self.classes, self.asking = list(classes), asking

    def store_key(self) -> dict[str, Any]:
        """What decides the votes, beyond the clip and the backbone."""
        asked = {name: getattr(self.asking, name) for name in ("trials", "temperature", "max_new_tokens", "seed")}
        return {"sampled_answers": {**asked, "labels": self.classes}}

    def predict_step(self, batch: ClipBatch, batch_idx: int) -> HeadBatch | None:
        # From the batch's clips alone, so that a run that was killed, or has more ranks, draws the same answers.
        names = [(Path(clip.audio).name, clip.start, clip.end) for clip in batch.clips]
        digest = hashlib.sha256(repr((self.asking.seed, names)).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        return super().predict_step(batch, batch_idx)

    def vectors(self, inputs: LALMInputs) -> Tensor:
        asked = self.asking
        votes_BV = sampled_votes(self.lalm, inputs, self.classes, asked.trials, asked.temperature, asked.max_new_tokens)
        return votes_BV[:, None, :]

    def vector_names(self) -> list[str]:
        return ["votes"]


def pseudolabel(
    trainer: CalmTrainer, data: AudioEpisodeDataModule, clips: Sequence[Clip], classes: Sequence[str], asking: Asking
) -> list[Clip]:
    """Ask about every clip, on all devices of the trainer, and label those that are sure enough.

    Answers are kept batch by batch in a head store, so a run that was killed goes on where it was.

    Args:
        trainer: devices, strategy and precision.
        data: whose backbone, store, batch size and workers are used.
        clips: to label; labels that they have are not looked at.
        classes: C names.
        asking: how, and what is kept.

    Returns:
        The clips that got a label, with their confidence, in their order.
    """
    clips = [replace(clip, label=None, confidence=None) for clip in clips]
    extraction: ZeroShot | SampledAnswers
    if asking.by == "likelihood":
        extraction = ZeroShot(data.backbone, clips, classes, "likelihood")
    else:
        extraction = SampledAnswers(data.backbone, classes, asking)
    key = {**data.backbone.store_key(arithmetic(trainer.precision), data.store_root), **extraction.store_key()}
    store = HeadStore(key, data.store_root, dtype="float32")
    waiting = ClipDataModule(clips, data.backbone, store, data.batch_size, data.num_workers)
    trainer.fill(store, extraction, waiting)
    keys = store.clip_keys(clips)
    unheard = {keys[i] for i in store.missing(keys)}
    heard = [i for i, key in enumerate(keys) if key not in unheard]
    if not heard:
        return []
    kept_NV = store.read([keys[i] for i in heard]).squeeze(1)
    balance = asking.balance
    if asking.by == "likelihood" and balance and len(heard) <= len(classes):
        balance = False  # of a single clip nothing would be left
        warnings.warn(
            f"names are not balanced: {len(heard)} clips do not tell how likely each of {len(classes)} names is for "
            "the average clip",
            stacklevel=2,
        )
    confidences_NC = vote_shares(kept_NV) if asking.by == "answers" else likelihood_shares(kept_NV, balance)
    return labelled([clips[i] for i in heard], classes, confidences_NC, asking)


def vote_shares(votes_NV: Tensor) -> Tensor:
    """Shares of all answers (N, C) from votes (N, C + 1), whose last column named no class."""
    return votes_NV[:, :-1] / votes_NV.sum(1, keepdim=True)


def likelihood_shares(logs_NC: Tensor, balance: bool) -> Tensor:
    """Probabilities among the class names (N, C) from log-likelihoods, by wish without each name's mean over clips."""
    return (logs_NC - logs_NC.mean(0) if balance else logs_NC).softmax(1)


def labelled(clips: Sequence[Clip], classes: Sequence[str], confidences_NC: Tensor, asking: Asking) -> list[Clip]:
    """Clips whose surest class reaches the threshold, with it as label; of each class the surest ``keep``."""
    threshold = asking.threshold
    if threshold is None:
        threshold = 0.5 if asking.by == "answers" else 0.0
    confidence_N, best_N = confidences_NC.max(1)
    taken: Counter[int] = Counter()
    chosen: dict[int, Clip] = {}
    for n in confidence_N.argsort(descending=True, stable=True).tolist():
        confidence, best = float(confidence_N[n]), int(best_N[n])
        if confidence > 0 and confidence >= threshold and (asking.keep is None or taken[best] < asking.keep):
            taken[best] += 1
            chosen[n] = replace(clips[n], label=classes[best], confidence=round(confidence, 6))
    return [chosen[n] for n in sorted(chosen)]
