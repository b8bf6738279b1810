"""What an extraction reads: the clips that the head store lacks, or the shards of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import lightning as L
from torch.utils.data import DataLoader

from calm_pl.audio import AudioError
from calm_pl.backbone.processing import ClipProcessor
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip, length_batches
from calm_pl.data.stream import (
    DEFAULT_BATCH_SIZE,
    BatchSize,
    ClipBatch,
    ClipBatches,
    ShardBatches,
    file_stamps,
    on_gpu,
    share_of_rank,
    stream_batch_size,
    stream_loader,
)
from calm_pl.headstore import HeadStore, HeadStoreError, Stamp

if TYPE_CHECKING:
    from calm_pl.training.extraction import HeadExtraction

BATCHES_EACH = 4  # that `batch_size: auto` leaves at least to every worker of every rank, where there are clips enough
LOOK_AGAIN_AFTER = (0, 5, 20)  # seconds, for what other nodes wrote to a network folder


class ClipDataModule(L.LightningDataModule):
    """The clips whose head outputs are missing, for ``Trainer.predict(HeadExtraction(...))``.

    Args:
        clips: all clips of the run.
        backbone: whose processor makes the inputs.
        store: where head outputs are kept; what it lacks is computed.
        batch_size: clips a forward pass; ``auto`` finds what fits the GPU.
        num_workers: processes that decode.
        share: (share, shares) of this process, where its Trainer knows of no other; None asks `share_of_rank`.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        backbone: Backbone,
        store: HeadStore,
        batch_size: BatchSize = 8,
        num_workers: int = 0,
        share: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.clips = clips
        self.backbone = backbone
        self.store = store
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.share = share
        self.keys: list[str] = []
        self.stamps: dict[str, Stamp | None] = {}
        self.wanted: list[int] = []
        self.batches: list[list[int]] | None = None
        self.clips_of_this_rank: int | None = None
        self._processor: ClipProcessor | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True  # the last batches may be fewer than the ranks

    def prepare_data(self) -> None:
        """Hash the files on one rank of each node; the others find the hashes remembered."""
        self.store.clip_keys(self.clips)

    def setup(self, stage: str | None = None) -> None:
        """See what is missing. No rank may write before all have seen it: Lightning waits for all after setup."""
        if not self.keys:
            self.stamps = file_stamps(self.clips)
            self.keys = self.store.clip_keys(self.clips)
            self.wanted = self.store.missing(self.keys)
            if self.wanted:
                self.store.prepare()

    def why_unusable(self, index: int) -> str | None:
        """The error of decoding a clip; None where there is none."""
        if self._processor is None:
            self._processor = self.backbone.clip_processor()
        try:
            self._processor.load(self.clips[index])
        except AudioError as error:
            return str(error)
        return None

    def plan(self, trainer: L.Trainer, extraction: HeadExtraction) -> None:
        """Decide the batches. Rank 0 does, for all: another process may write between two ranks' looks at the store."""
        self.wanted = trainer.strategy.broadcast(self.wanted)
        self.batches = []
        if not self.wanted:
            return
        size = self._size(trainer, extraction) if self.batch_size == "auto" else self.batch_size
        if trainer.is_global_zero:
            self.batches = self.store.planned_batches(self.keys, self.wanted, size, lambda new: self._split(new, size))
        self.batches = trainer.strategy.broadcast(self.batches)

    def _size(self, trainer: L.Trainer, extraction: HeadExtraction) -> int:
        """What `auto` is. A run that goes on after a kill takes the size of the one before it, and so its batches; and
        no size leaves a rank or one of its workers without a few batches of the whole set."""
        unfinished = self.store.unfinished_batch_size(self.keys, self.wanted)
        if unfinished := trainer.strategy.broadcast(unfinished):
            return unfinished
        share = len(self.clips) // (BATCHES_EACH * trainer.world_size * max(1, self.num_workers))
        return extraction.chosen_batch_size(self.clips, max(DEFAULT_BATCH_SIZE, share))

    def _split(self, positions: list[int], size: int) -> list[list[int]]:
        batches = length_batches([self.clips[index] for index in positions], size)
        return [[positions[row] for row in batch] for batch in batches]

    def predict_dataloader(self) -> DataLoader[ClipBatch]:
        trainer = self.trainer
        assert trainer is not None
        if self.batches is None:
            self.plan(trainer, cast("HeadExtraction", trainer.lightning_module))
        assert self.batches is not None
        share, shares = self.share or share_of_rank(trainer, self.backbone)
        batches = ClipBatches(
            self.clips, self.keys, self.wanted, self.batches[share::shares], self.backbone, self.stamps
        )
        self.clips_of_this_rank = sum(map(len, batches.batches))
        return stream_loader(batches, self.num_workers, on_gpu(trainer))


class ShardDataModule(L.LightningDataModule):
    """Clips of tar shards, for ``Trainer.predict(HeadExtraction(...))``; see `ShardBatches`.

    The longest clip of a stream is not known, so ``auto`` is a constant here.
    """

    def __init__(
        self,
        urls: Sequence[str],
        backbone: Backbone,
        store: HeadStore,
        batch_size: BatchSize = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.urls = urls
        self.backbone = backbone
        self.store = store
        self.batch_size = stream_batch_size(batch_size)
        self.num_workers = num_workers

    def predict_dataloader(self) -> DataLoader[ClipBatch]:
        trainer = self.trainer
        assert trainer is not None
        share = share_of_rank(trainer, self.backbone)
        batches = ShardBatches(self.urls, self.backbone, self.batch_size, self.store, share)
        return stream_loader(batches, self.num_workers, pin_memory=on_gpu(trainer))


def unusable_clips(data: ClipDataModule) -> dict[int, str]:
    """Why clips are still missing after an extraction: decoding them again tells.

    Raises:
        HeadStoreError: one can be decoded. What another node wrote may be seen late in a network folder, or never.
    """
    lost: list[int] = []
    for seconds in LOOK_AGAIN_AFTER:
        time.sleep(seconds)
        missing = {data.keys[index] for index in data.store.missing(data.keys)}
        # Files of the same bytes have one key: where one cannot be used, none can.
        reasons = {index: data.why_unusable(index) for index, key in enumerate(data.keys) if key in missing}
        lost = [index for index, reason in reasons.items() if reason is None]
        if not lost:
            return {index: reason for index, reason in reasons.items() if reason is not None}
    raise HeadStoreError(
        f"{data.clips[lost[0]].audio} can be decoded, but its head outputs are not in {data.store.folder}: it changed "
        "or the store was pruned while this ran, or another node wrote them to a folder of its own. Run it again, or "
        "set CALM_STORE to a folder that all nodes share."
    )
