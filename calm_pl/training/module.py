"""CalmModule: methods fitted on one support set, side by side on the same heads, as a LightningModule.

Shapes: B batch, K heads, D head dimension, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import Self

from calm_pl.backbone.precision import arithmetic, weights_dtype
from calm_pl.classifier import CalmClassifier
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.labelled import STEPS_PER_EPOCH, LabelledHeads
from calm_pl.data.stream import ClipBatch
from calm_pl.headstore import HeadStore
from calm_pl.methods.base import HeadClassifier
from calm_pl.methods.learned import LearnedWeights
from calm_pl.methods.metric_space import MetricSpace
from calm_pl.progress import Task, say
from calm_pl.training.extraction import HeadExtraction, extract_missing
from calm_pl.training.metrics import ClipScores
from calm_pl.training.progress import shows_progress
from calm_pl.training.spoofing import GENUINE, attack_table, is_spoofing, spoofing_figures
from calm_pl.training.zero_shot import Answers, ZeroShot

CHECKPOINT_KEY = "calm_pl"
ZERO_SHOT = "zero_shot"  # what its row is called in results


class CalmModule(L.LightningModule):
    """Fits classifiers on the support set's head outputs and tests them on the same clips.

    The backbone is not in here: what it says of a clip comes from the head store, which is filled first with
    whatever is missing. Checkpoints hold weights, prototypes, class names and choices, and load with
    ``weights_only=True``.

    Args:
        methods: classifiers by name, each fitted on the support set alone.
        classifier: the one of them that predicts, and that the run folder keeps for use.
        zero_shot: also ask the backbone in words, as a baseline on the test clips.
        zero_shot_by: what tells its answer: ``likelihood`` of each class name, ``letters`` of the options that the
            question lists (protocol ``mcq``), or ``generation`` of an answer that is searched for a class name.
        optimizer: of learned weights; None is Adam with the step size that the method was cross-validated with.
        lr_scheduler: of learned weights, stepped once an epoch; None keeps the step size.
    """

    def __init__(
        self,
        methods: dict[str, HeadClassifier],
        classifier: str = "calm",
        zero_shot: bool = True,
        zero_shot_by: Answers = "likelihood",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if classifier not in methods:
            raise ValueError(f"classifier={classifier!r} is none of the methods: {', '.join(methods)}.")
        self._methods = nn.ModuleDict(methods)
        # DDP refuses a module in which nothing can be learned, and formulas learn nothing.
        self.nothing = nn.Parameter(torch.zeros(()))
        self.nothing.requires_grad_(not self.learners)
        self.classifier = classifier
        self.zero_shot = zero_shot
        self.zero_shot_by = zero_shot_by
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.classes: list[str] = []
        self.finished = False
        self.run_config: str | None = None  # the whole configuration as YAML, kept in checkpoints
        self.timing: dict[str, float] = {}
        self.scores: dict[str, ClipScores] = {}

    @property
    def methods(self) -> dict[str, HeadClassifier]:
        """The classifiers by name."""
        return cast("dict[str, HeadClassifier]", dict(self._methods.items()))

    @property
    def learners(self) -> list[LearnedWeights]:
        """The methods whose weights are optimised."""
        return [learner for _, learner in self._learners_by_name()]

    def _learners_by_name(self) -> list[tuple[str, LearnedWeights]]:
        return [(name, method) for name, method in self.methods.items() if isinstance(method, LearnedWeights)]

    @property
    def data(self) -> AudioEpisodeDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, AudioEpisodeDataModule):
            raise TypeError("CalmModule takes its heads from an AudioEpisodeDataModule: pass it as datamodule=...")
        return data

    def setup(self, stage: str) -> None:
        """Extract what the store lacks; at ``fit``, fit every formula on the support set and start the learners."""
        if self.data.streams:
            self._listen()
            return
        self._read_heads()
        if stage == "fit":
            self._fit_methods()
            self._plan_steps()

    def _read_heads(self) -> None:
        data = self.data
        started = time.perf_counter()
        store = data.open_store(arithmetic(self.trainer.precision))
        extraction = HeadExtraction(data.backbone)
        if self.trainer.is_global_zero:
            data.find_cut_clips()
        data.leave_out(extract_missing(self.trainer, data.clips, extraction, store, data.batch_size, data.num_workers))
        self.timing.setdefault("extraction_seconds", time.perf_counter() - started)

    def _listen(self) -> None:
        """Load the backbone, for head outputs that go straight to the classifiers."""
        self._extraction = HeadExtraction(self.data.backbone)
        self._extraction.trainer = self.trainer
        self.data.heads = self._extraction.lalm

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if isinstance(batch, ClipBatch):
            return batch  # FrozenLALM.forward moves what it needs
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _heard(self, batch: LabelledHeads | ClipBatch) -> LabelledHeads:
        """Clips of a stream become head outputs here, in no more memory than a batch takes, and are asked about."""
        if isinstance(batch, LabelledHeads):
            return batch
        heads_BKD = self._extraction.heads_of(batch)
        kept = batch if self._extraction.keeps else ClipBatch([], [], None, [])
        labelled = self.data.label_streamed(kept, heads_BKD[: len(kept)]).to(self.device)
        if ZERO_SHOT in self.scores:
            asking = ZeroShot(self.data.backbone, batch.clips, self.classes, self.zero_shot_by, self._extraction.lalm)
            kept_BV = asking.heads_of(batch)[: len(kept)].squeeze(1).cpu()
            probabilities_BC = asking.probabilities(kept_BV, kept.clips).to(self.device)
            self.scores[ZERO_SHOT].update(labelled.indices_B, probabilities_BC, labelled.labels_B)
        return labelled

    def _fit_methods(self) -> None:
        # On this rank's device, where the optimiser will want everything.
        support = self.data.support().to(self.trainer.strategy.root_device)
        self.classes = self.data.classes
        unlabelled_NKD = self.data.unlabelled_heads()
        with Task("fitting on the support set", len(self.methods), "methods", shows_progress(self.trainer)) as task:
            for name, method in self.methods.items():
                started = time.perf_counter()
                if isinstance(method, MetricSpace) and unlabelled_NKD is not None:
                    method.unlabelled_NKD = unlabelled_NKD.to(support.heads_BKD.device)
                self._fit(method, support)
                if isinstance(method, MetricSpace):
                    method.unlabelled_NKD = None  # they are in the metric now, and need not stay
                self.timing[f"fit_{name}_seconds"] = time.perf_counter() - started
                task.advance(note=name)

    def _fit(self, method: HeadClassifier, support: LabelledHeads) -> None:
        """On every rank, so that all refuse alike what makes no sense; then what the first one found counts.

        Sums on a GPU differ from rank to rank by their last bit, which can turn a choice between two that are as good.
        """
        clips = support.heads_BKD, support.labels_B, len(self.classes)
        if isinstance(method, LearnedWeights):
            method.start(*clips)
        else:
            method.fit(*clips)
        if self.trainer.world_size == 1:
            return
        found = {name: tensor.cpu() for name, tensor in method.state_dict().items()}
        found = self.trainer.strategy.broadcast(found)
        if self.trainer.is_global_zero:
            return
        found = {name: tensor.to(support.heads_BKD.device) for name, tensor in found.items()}
        if isinstance(method, LearnedWeights):
            method.started_as(found, *clips)
        else:
            method.load_state_dict(found)

    def _plan_steps(self) -> None:
        """As many optimiser steps as the support set asked for, unless the Trainer allows fewer."""
        wanted = max((learner.num_steps for learner in self.learners), default=0)
        epochs, steps = self.trainer.fit_loop, self.trainer.fit_loop.epoch_loop
        steps.max_steps = wanted if steps.max_steps < 0 else min(wanted, steps.max_steps)
        needed = max(1, -(-steps.max_steps // STEPS_PER_EPOCH))
        epochs.max_epochs = needed if epochs.max_epochs in (None, -1) else min(needed, epochs.max_epochs)

    def choices(self) -> dict[str, Any]:
        """What each method chose on the support set, and its scores there."""
        return {name: method.choices() for name, method in self.methods.items()}

    def to_classifier(self) -> CalmClassifier:
        """The chosen method as a classifier that can be saved and taken into use."""
        data = self.data
        return CalmClassifier.from_fitted(
            self.methods[self.classifier],
            self.classes,
            data.backbone,
            weights_dtype(self.trainer.precision),
            data.usable_clips("support"),
        )

    # Learning

    def configure_optimizers(self) -> Any:
        learners = [learner for learner in self.learners if list(learner.parameters())]
        if not learners:
            return None
        if self.optimizer is None:
            groups = [{"params": list(learner.parameters()), "lr": learner.learning_rate} for learner in learners]
            optimizer: torch.optim.Optimizer = torch.optim.Adam(groups)
        else:
            optimizer = self.optimizer([p for learner in learners for p in learner.parameters()])
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """One optimiser step on the episodes of this step; each rank takes its part of them."""
        # The episodes follow from the step alone, so a resumed fit goes on with those that come next.
        share = (self.global_step, self.trainer.global_rank, self.trainer.world_size)
        with full_precision(self.device):
            loss = torch.stack([learner.training_loss(*share) for learner in self.learners]).sum()
        self.log("support/loss", loss, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, *_: Any) -> None:
        """A learner that has taken the steps it asked for stays where it is, while others go on."""
        for learner in self.learners:
            if self.global_step >= learner.num_steps:
                for parameter in learner.parameters():
                    parameter.grad = None

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        for learner in self.learners:  # here, so that a checkpoint of this step holds its averages
            if self.global_step < learner.num_steps:
                learner.after_step()

    def on_train_epoch_end(self) -> None:
        with full_precision(self.device):
            for name, method in self.methods.items():
                if isinstance(method, LearnedWeights):  # for EarlyStopping and ModelCheckpoint to monitor
                    self.log(f"support/{name}/nll", method.criterion(), sync_dist=True)

    def finish(self) -> None:
        """Let go of the support set; once."""
        with full_precision(self.device):
            for learner in self.learners:
                if not self.finished:
                    learner.finish()
        self.finished = True

    def on_fit_end(self) -> None:
        self.finish()
        said = {f"support/{name}/cv_nll": chosen.get("cv_nll") for name, chosen in self.choices().items()}
        for logger in self.loggers:  # for searches, which must not look at test clips either
            logger.log_metrics({name: nll for name, nll in said.items() if nll is not None})

    def results(self) -> dict[str, Any]:
        """``results.json``: what was asked, every method's figures, and how long it took."""
        attacks = {"attacks": self.attacks} if self.attacks else {}
        return {**self.data.description(), "methods": self.figures, **attacks, "timing": self.timing}

    # Testing

    def _start_scoring(self, *others: str) -> None:
        self.scores = {name: ClipScores().to(self.device) for name in (*others, *self.methods)}
        nothing = torch.empty(0, dtype=torch.long, device=self.device)
        for scores in self.scores.values():  # so that a rank without clips has states of the right shape to gather
            no_labels = self.data.labels[:0].to(self.device)
            scores.update(nothing, torch.empty(0, len(self.classes), device=self.device), no_labels)
        self._scoring_started = time.perf_counter()

    def on_test_epoch_start(self) -> None:
        # Clips of a stream pass by once; the others are asked about at the end.
        self._start_scoring(*([ZERO_SHOT] if self.data.streams and self._asks() else []))

    def on_validation_epoch_start(self) -> None:
        self._start_scoring()

    def on_predict_epoch_start(self) -> None:
        self._start_scoring()

    def test_step(self, batch: LabelledHeads | ClipBatch, batch_idx: int) -> None:
        batch = self._heard(batch)
        with full_precision(self.device):
            for name, method in self.methods.items():
                probabilities_BC = self.data.among_options(batch.indices_B, method(batch.heads_BKD))
                self.scores[name].update(batch.indices_B, probabilities_BC, batch.labels_B)

    def validation_step(self, batch: LabelledHeads, batch_idx: int) -> None:
        self.test_step(batch, batch_idx)

    def predict_step(self, batch: LabelledHeads | ClipBatch, batch_idx: int) -> Tensor:
        batch = self._heard(batch)
        with full_precision(self.device):
            probabilities_BC = self.methods[self.classifier](batch.heads_BKD)
            probabilities_BC = self.data.among_options(batch.indices_B, probabilities_BC)
        self.scores[self.classifier].update(batch.indices_B, probabilities_BC, batch.labels_B)
        return probabilities_BC

    def on_test_epoch_end(self) -> None:
        self._log_figures("test")

    def on_predict_epoch_end(self) -> None:
        if self.data.streams:
            self._end_stream()

    def on_validation_epoch_end(self) -> None:
        self._log_figures("val")

    def _log_figures(self, part: str) -> None:
        if self.data.streams:
            self._end_stream()
        elif self._asks():
            self.scores = {ZERO_SHOT: self._zero_shot_scores(part), **self.scores}
        self.figures = {name: scores.compute() for name, scores in self.scores.items()}
        self.attacks = self._spoofing_figures() if is_spoofing(self.classes) else {}
        self.timing[f"{part}_seconds"] = time.perf_counter() - self._scoring_started
        for name, figures in self.figures.items():
            for figure, value in figures.items():
                if not figure.endswith("_interval"):
                    # Gathered over ranks already: every rank holds the same number.
                    self.log(f"{part}/{name}/{figure}", value, rank_zero_only=True)

    def _end_stream(self) -> None:
        """Only now it is known whether clips have several labels. A collective call."""
        data = self.data
        data.gather_streamed()
        if self.trainer.is_global_zero:
            self._extraction.lalm.processor.warn_of_cut(data.streamed_cut, len(data.streamed))
            if data.streamed_past:
                say(f"{data.streamed_past:,} clips of other splits than test were left out")
            if not any(clip.labels for clip in data.streamed.values()):
                say("no clip has a label: there are no figures")
        if not self.data.multi_label:
            for scores in self.scores.values():
                scores.one_label_each()

    def _asks(self) -> bool:
        """Whether the backbone is asked in words too; says so where it cannot be."""
        able = self.zero_shot and self.data.backbone.answers_questions()
        if self.zero_shot and not able and self.trainer.is_global_zero:
            print(f"zero_shot is left out: {self.data.backbone.name} transcribes, and answers no questions")
        return able

    def _spoofing_figures(self) -> dict[str, Any]:
        """Add the equal error rates; return figures by attack for each method, where the recipe knows attacks."""
        attacks: dict[str, str] = getattr(self.data.recipe, "attacks", dict)()
        genuine, tables = self.classes.index(GENUINE), {}
        for name, scores in self.scores.items():
            indices_N, probabilities_NC, labels_N = scores.of_all_ranks()
            scores_N, known_N = probabilities_NC[:, genuine], labels_N >= 0
            self.figures[name].update(spoofing_figures(scores_N[known_N], labels_N[known_N] == genuine))
            if attacks:
                files = [clip.audio for clip in self.data.clips_at(indices_N.tolist())]
                tables[name] = attack_table(scores_N, probabilities_NC.argmax(1) != genuine, files, attacks)
        return tables

    def _zero_shot_scores(self, part: str) -> ClipScores:
        """What the model answers when asked in words, kept in a head store of its own."""
        data = self.data
        positions = data.usable(part)
        clips = [data.clips[i] for i in positions]
        extraction = ZeroShot(data.backbone, clips, self.classes, self.zero_shot_by)
        store = HeadStore({**data.store.key, **extraction.store_key()}, data.store_root, dtype="float32")
        extract_missing(self.trainer, clips, extraction, store, data.batch_size, data.num_workers)
        scores = ClipScores().to(self.device)
        share = slice(self.trainer.global_rank, None, self.trainer.world_size)
        kept_BV = store.read(store.clip_keys(clips)[share]).squeeze(1)
        scores.update(
            torch.tensor(positions[share], dtype=torch.long, device=self.device),
            extraction.probabilities(kept_BV, clips[share]).to(self.device),
            data.labels[positions[share]].to(self.device),
        )
        return scores

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device; weights and prototypes stay float32 whatever the Trainer's precision."""
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
        return self if device is None else super().to(device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = {
            "classes": self.classes,
            "choices": self.choices(),
            "backbone": self.data.backbone.name,
            "config": self.run_config,
            "averages": {name: dict(one.averages) for name, one in self._learners_by_name()},
            "support": [] if self.data.streams else self.data.told_apart("support"),
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.classes = list(checkpoint[CHECKPOINT_KEY]["classes"])
        for name, learner in self._learners_by_name():
            learner.averages = dict(checkpoint[CHECKPOINT_KEY].get("averages", {}).get(name, {}))
        if self._trainer is not None and self.data.streams:
            self.data.expect(self.classes)
        elif self._trainer is not None and self.classes != self.data.classes:
            raise ValueError(f"the checkpoint knows the classes {self.classes}, the data has {self.data.classes}.")
        fitted = (yaml.safe_load(checkpoint[CHECKPOINT_KEY]["config"] or "") or {}).get("data", {})
        for name in ("shots", "seed") if self._trainer is not None else ():
            if name in fitted and fitted[name] != (asked := getattr(self.data, name)):
                raise ValueError(
                    f"the checkpoint was fitted with --data.{name} {fitted[name]}, and {asked} would not change what "
                    "it learned: leave it away, or fit anew."
                )
        if self._trainer is not None and not self.data.streams and (self.trainer.testing or self.trainer.validating):
            self._refuse_support_clips(set(checkpoint[CHECKPOINT_KEY].get("support", [])))

    def _refuse_support_clips(self, support: set[str]) -> None:
        """Refuse to test what was learned from, where the data are divided otherwise than they were for the fit."""
        if support == set(self.data.told_apart("support")):
            return  # copies may still be on both sides, of which the data module warns
        part = "val" if self.trainer.validating else "test"
        known = [
            self.data.clips[i].audio
            for i, name in zip(self.data.parts[part], self.data.told_apart(part), strict=True)
            if name in support
        ]
        if known:
            raise ValueError(
                f"{len(known)} of the {len(self.data.parts[part])} {part} clips are support clips of the checkpoint, "
                f"such as {known[0]}: test with the split that it was fitted with, or fit anew."
            )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within the block everything is float32: the Trainer's precision is the backbone's, not the weights'."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)
