"""What a run shows while it works: head outputs being read, weights being learned, clips being tested."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar

from calm_pl.data.labelled import LabelledHeads
from calm_pl.data.stream import ClipBatch
from calm_pl.progress import Task, say


def shows_progress(trainer: L.Trainer) -> bool:
    """Whether this process tells how a run gets on: rank 0, unless ``enable_progress_bar`` is off."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


class RunProgress(ProgressBar):
    """Lightning's place for a progress bar: learning and testing, each counted to its own end.

    Lightning's own bar starts anew each epoch, and an epoch of ten steps says nothing about the time left.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown = True
        self._task: Task | None = None

    def disable(self) -> None:
        self._shown = False

    def enable(self) -> None:
        self._shown = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        data: Any = getattr(trainer, "datamodule", None)
        if stage == "fit" and self._shown:
            support, test = len(data.usable("support")), len(data.usable("test"))
            say(
                f"{data.recipe.name}, {data.backbone.name}: {support:,} labelled clips of {len(data.classes)} classes "
                f"to learn from, {test:,} to test on"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("learning weights", trainer.max_steps if trainer.max_steps >= 0 else None, "steps")

    def on_train_batch_end(self, *_: Any) -> None:
        self._advance(1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("testing", _clips_of_this_rank(trainer, "test"), "clips")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.training:
            self._begin("validating", _clips_of_this_rank(trainer, "val"), "clips")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("predicting", _clips_of_this_rank(trainer, "test"), "clips")

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: LabelledHeads | ClipBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._advance(len(batch))

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()  # before the module asks the backbone in words, which has a bar of its own

    on_validation_epoch_end = on_predict_epoch_end = on_test_epoch_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()

    def _begin(self, title: str, total: int | None, unit: str) -> None:
        self._task = Task(title, total, unit, self._shown)

    def _advance(self, count: int) -> None:
        if self._task is not None:
            self._task.advance(count)

    def _end(self) -> None:
        if self._task is not None:
            self._task.close()
        self._task = None


def _clips_of_this_rank(trainer: L.Trainer, part: str) -> int | None:
    data: Any = getattr(trainer, "datamodule", None)
    return None if data.streams else -(-len(data.usable(part)) // trainer.world_size)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """The moment at which a GPU has done all that it was told so far; None on a CPU, which has done it."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds_between(first: torch.cuda.Event, second: torch.cuda.Event) -> float:
    second.synchronize()
    return float(first.elapsed_time(second)) / 1000


class ExtractionProgress(Callback):
    """Clips done, clips/s, time left; and how long the model waited for decoded clips.

    Attributes:
        clips: that went through the model or could not be used, on this rank.
        errors: of the latter, each named, with the reason.
        cut: of a stream's clips that were cut at the model's window.
        startup_seconds: until the first batch came from the workers; not part of speed and waiting.
        waited_share: share of the time since then that the model waited for the next batch.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.clips = 0
        self.errors: list[str] = []
        self.cut = 0
        self.startup_seconds = 0.0
        self._task: Task | None = None
        self._began: float | None = None
        self._waited = self._seconds = 0.0
        # Of a GPU: when it had its first batch, its latest one, and when it has done the one before.
        self._first: torch.cuda.Event | None = None
        self._given: torch.cuda.Event | None = None
        self._done: torch.cuda.Event | None = None

    @property
    def clips_per_second(self) -> float:
        return self.clips / max(self._seconds, 1e-9)

    @property
    def waited_share(self) -> float:
        return self._waited / max(self._seconds, 1e-9)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._idle_since = time.perf_counter()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = getattr(getattr(trainer, "datamodule", None), "clips_of_this_rank", None)
        self._task = Task(getattr(pl_module, "title", ""), total, "clips", self.enabled and total != 0)

    def on_predict_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        if self._began is None:
            self._began, self.startup_seconds = now, now - self._idle_since
            self._first = mark(trainer.strategy.root_device)
        elif self._first is None:
            self._waited += now - self._idle_since
        else:  # it still computed the batch before for some of that time, and only the GPU knows for how long
            self._given = mark(trainer.strategy.root_device)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: ClipBatch, *_: Any
    ) -> None:
        assert self._began is not None and self._task is not None
        self._idle_since = time.perf_counter()
        self._seconds = self._idle_since - self._began
        if self._done is not None and self._given is not None:
            self._waited += _seconds_between(self._done, self._given)
        self._done = mark(trainer.strategy.root_device)
        done = len(batch.clips) + len(batch.errors)
        self.clips += done
        self.errors += batch.errors
        self.cut += batch.cut
        self._task.advance(done, f"{self.clips_per_second:.1f} clips/s")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._first is not None and self._done is not None:
            self._seconds = _seconds_between(self._first, self._done)  # with the last batch

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._task is not None:
            self._task.close()

    def summary(self, world_size: int) -> str:
        """Clips, speed, and the share of time that the model waited for decoded clips, on this rank."""
        if not self.clips:
            return "nothing was missing"
        # Whoever has few batches for many workers decodes most of them meanwhile.
        first = f" after the first batch, which took {self.startup_seconds:.0f} s" if self.startup_seconds > 5 else ""
        where = "" if world_size == 1 else f" on the first of {world_size} ranks"
        return (
            f"{self.clips:,} clips{where}, {self.clips_per_second:.1f} clips/s; "
            f"the model waited for audio {self.waited_share:.0%} of the time{first}"
        )
