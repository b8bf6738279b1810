"""The frozen forward pass as Lightning's ``predict``: clips in, head outputs in the store.

Shapes: B clips of a batch, K heads, D head dimension.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader

from calm_pl.audio import AudioError
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.processing import ClipProcessor, LALMInputs
from calm_pl.backbone.spec import Backbone
from calm_pl.backbone.tensor_parallel import is_first_process
from calm_pl.clip import Clip, length_batches
from calm_pl.data.stream import (
    DEFAULT_BATCH_SIZE,
    BatchSize,
    ClipBatch,
    ClipBatches,
    ShardBatches,
    file_stamps,
    share_of_rank,
    stream_batch_size,
    stream_loader,
)
from calm_pl.headstore import HeadStore, HeadStoreError, Stamp
from calm_pl.progress import say
from calm_pl.training.batch_size import LARGEST_BATCH, fitting_batch_size, run_in_halves
from calm_pl.training.progress import ExtractionProgress, shows_progress

# What the Trainer's precision means for frozen weights; under "-mixed" they stay float32 and autocast does the rest.
PRECISION_DTYPES = {
    "32-true": "float32",
    "bf16-true": "bfloat16",
    "16-true": "float16",
    "bf16-mixed": "float32",
    "16-mixed": "float32",
}


BATCHES_EACH = 4  # that `batch_size: auto` leaves at least to every worker of every rank, where there are clips enough
LOOK_AGAIN_AFTER = (0, 5, 20)  # seconds, for what other nodes wrote to a network folder


@dataclass
class HeadBatch:
    """Head outputs of one batch, and the keys to keep them under (None: not to be kept)."""

    keys: list[str | None]
    heads_BKD: Tensor
    head_names: list[str]


class HeadExtraction(L.LightningModule):
    """The frozen forward pass. Has no parameters: the backbone is loaded at the first batch that needs it.

    Args:
        backbone: the model whose heads are read.
        lalm: the same, where it is loaded already.
    """

    title = "reading heads"

    def __init__(self, backbone: Backbone, lalm: FrozenLALM | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self._lalm = lalm
        self._halved = False

    @property
    def lalm(self) -> FrozenLALM:
        """The loaded backbone, on this rank's device, in the dtype that the Trainer's precision asks for."""
        if self._lalm is None:
            if self.backbone.device_map is not None and self.trainer.world_size > 1:
                raise BackboneError(
                    f"device_map={self.backbone.device_map} spreads a model over the GPUs of one process, and "
                    f"{self.trainer.world_size} run here: use --trainer gpu, or tensor_parallel in place of device_map."
                )
            device = self.trainer.strategy.root_device
            self._lalm = self.backbone.load(weights_dtype(self.trainer.precision), str(device))
        return self._lalm

    @property
    def keeps(self) -> bool:
        """Whether what this rank reads is to be kept: of ranks that hold one model together, the first one's is."""
        return is_first_process() or not self.backbone.tensor_parallel

    def transfer_batch_to_device(self, batch: ClipBatch, device: torch.device, dataloader_idx: int) -> ClipBatch:
        return batch  # FrozenLALM.forward moves what it needs, in the dtype it needs

    def predict_step(self, batch: ClipBatch, batch_idx: int) -> HeadBatch | None:
        if batch.inputs is None:
            return None
        heads_BKD = self.read(batch.inputs)
        return HeadBatch(batch.keys, heads_BKD, self.vector_names()) if self.keeps else None

    def read(self, inputs: LALMInputs) -> Tensor:
        """Head outputs (B, K, D); a batch for which memory does not suffice is run in halves.

        Ranks that hold one model together do not, since memory may suffice for some of them.

        Raises:
            BackboneError: memory does not suffice for a single clip.
        """
        if self.backbone.tensor_parallel:
            return self.vectors(inputs)
        return run_in_halves(self.vectors, inputs, self._tell_halved)

    def _tell_halved(self, size: int) -> None:
        if not self._halved:
            self._halved = True
            warnings.warn(
                f"out of memory with a batch of {size} clips: batches that do not fit are run in halves; "
                "with a smaller data.batch_size, or auto, none has to be tried twice",
                stacklevel=2,
            )

    def heads_of(self, batch: ClipBatch) -> Tensor:
        """Head outputs of a batch's clips; of none, 0 x K x D."""
        if batch.inputs is None:
            return torch.empty(0, self.lalm.num_heads, self.lalm.head_dim, dtype=torch.float32)
        return self.read(batch.inputs)

    def vectors(self, inputs: LALMInputs) -> Tensor:
        """One pass (B, K, D)."""
        return self.lalm.forward(inputs)

    def vector_names(self) -> list[str]:
        """K names."""
        return self.lalm.head_names


def weights_dtype(precision: str) -> str:
    """The dtype of frozen weights under a Trainer's precision. Raises ValueError for one that has no meaning here."""
    if precision not in PRECISION_DTYPES:
        raise ValueError(f"precision={precision!r}: backbones run in {', '.join(PRECISION_DTYPES)}.")
    return PRECISION_DTYPES[precision]


def arithmetic(precision: str) -> str:
    """What a head output was computed in, for store keys: the dtype of the weights, or under "-mixed" the precision."""
    dtype = weights_dtype(precision)
    return precision if precision.endswith("-mixed") else dtype


class StoreWriter(BasePredictionWriter):
    """Writes each batch's wanted head outputs to the store: while a GPU computes the next batch, so that it does not
    wait for the disk."""

    def __init__(self, store: HeadStore) -> None:
        super().__init__(write_interval="batch")
        self.store = store
        self._computed: HeadBatch | None = None
        self._copied: torch.cuda.Event | None = None

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, prediction: HeadBatch | None, *_: Any
    ) -> None:
        self._write()  # the batch before; of this one a GPU has only been told
        if prediction is not None:
            heads_BKD, device = prediction.heads_BKD, prediction.heads_BKD.device
            on_gpu = device.type == "cuda"
            self._computed = replace(prediction, heads_BKD=heads_BKD.to("cpu", non_blocking=on_gpu))
            self._copied = torch.cuda.current_stream(device).record_event() if on_gpu else None

    def on_predict_end(self, *_: Any) -> None:
        self._write()

    def on_exception(self, *_: Any) -> None:
        self._write()

    def _write(self) -> None:
        batch, self._computed = self._computed, None
        if batch is not None:
            if self._copied is not None:
                self._copied.synchronize()
            wanted = {row: key for row, key in enumerate(batch.keys) if key is not None}
            self.store.write(list(wanted.values()), batch.heads_BKD[list(wanted)], batch.head_names)


class ClipDataModule(L.LightningDataModule):
    """The clips whose head outputs are missing, for ``Trainer.predict(HeadExtraction(...))``.

    Args:
        clips: all clips of the run.
        backbone: whose processor makes the inputs.
        store: where head outputs are kept; what it lacks is computed.
        batch_size: clips a forward pass; ``auto`` finds what fits the GPU.
        num_workers: processes that decode.
        share: (rank, world size) of this process, where its Trainer knows of no other; None leaves the sharing to
            Lightning, which gives each batch to one rank.
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

    def plan(self, trainer: L.Trainer, extraction: L.LightningModule) -> None:
        """Decide the batches. Rank 0 does, for all: another process may write between two ranks' looks at the store."""
        self.wanted = trainer.strategy.broadcast(self.wanted)
        self.batches = []
        if not self.wanted:
            return
        size = self._size(trainer, extraction) if self.batch_size == "auto" else self.batch_size
        if trainer.is_global_zero:
            self.batches = self.store.planned_batches(self.keys, self.wanted, size, lambda new: self._split(new, size))
        self.batches = trainer.strategy.broadcast(self.batches)

    def _size(self, trainer: L.Trainer, extraction: L.LightningModule) -> int:
        """What `auto` is. A run that goes on after a kill takes the size of the one before it, and so its batches; and
        no size leaves a rank or one of its workers without a few batches of the whole set."""
        unfinished = self.store.unfinished_batch_size(self.keys, self.wanted)
        if unfinished := trainer.strategy.broadcast(unfinished):
            return unfinished
        share = len(self.clips) // (BATCHES_EACH * trainer.world_size * max(1, self.num_workers))
        return chosen_batch_size(trainer, extraction, self.clips, max(DEFAULT_BATCH_SIZE, share))

    def _split(self, positions: list[int], size: int) -> list[list[int]]:
        batches = length_batches([self.clips[index] for index in positions], size)
        return [[positions[row] for row in batch] for batch in batches]

    def predict_dataloader(self) -> DataLoader[ClipBatch]:
        trainer = self.trainer
        assert trainer is not None
        if self.batches is None:
            self.plan(trainer, trainer.lightning_module)
        assert self.batches is not None
        share, shares = self.share or (0, 1)
        batches = ClipBatches(
            self.clips, self.keys, self.wanted, self.batches[share::shares], self.backbone, self.stamps
        )
        _, ranks = share_of_rank(trainer, self.backbone)
        self.clips_of_this_rank = sum(map(len, batches.batches)) // ranks
        return stream_loader(batches, self.num_workers, _on_gpu(trainer), self.backbone.tensor_parallel)


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
        return stream_loader(batches, self.num_workers, pin_memory=_on_gpu(trainer))


def _on_gpu(trainer: L.Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"


def chosen_batch_size(trainer: L.Trainer, extraction: L.LightningModule, clips: Sequence[Clip], largest: int) -> int:
    """What ``batch_size: auto`` stands for: rank 0 finds it, as the clips will be run, and all ranks take the same.

    Ranks that hold one model together find none: where memory ended for one of them, the others would wait for it.
    """
    assert isinstance(extraction, HeadExtraction)
    size = DEFAULT_BATCH_SIZE
    if extraction.backbone.tensor_parallel:
        if trainer.is_global_zero:
            say(f"batch size: {size}; with tensor_parallel, auto finds none")
        return size
    if clips and _on_gpu(trainer) and trainer.is_global_zero:
        device = trainer.strategy.root_device
        lalm, largest = extraction.lalm, min(largest, LARGEST_BATCH)
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            size = fitting_batch_size(extraction.vectors, lalm.processor, clips, device, largest)
        say(f"batch size: {size}")
    return trainer.strategy.broadcast(size)


class ExtractingTrainer(L.Trainer):
    """Lightning's Trainer, which saves no checkpoint of an extraction: the head store holds all that was done.

    A job that SLURM takes off a node would leave one otherwise, and the next `fit` in that folder would start from it.
    """

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self.lightning_module, HeadExtraction):
            super().save_checkpoint(*args, **kwargs)


def extract_missing(
    trainer: L.Trainer,
    clips: Sequence[Clip],
    extraction: HeadExtraction,
    store: HeadStore,
    batch_size: BatchSize = 8,
    num_workers: int = 0,
) -> dict[int, str]:
    """Run ``extraction`` for what the store lacks, on the devices of ``trainer``, every rank its part.

    With nothing missing no weights are read and no audio is decoded.

    Returns:
        Clips that cannot be used, by position, with the reason.
    """
    share = share_of_rank(trainer, extraction.backbone)
    data = ClipDataModule(clips, extraction.backbone, store, batch_size, num_workers, share)
    data.setup()
    trainer.strategy.barrier("head store read")
    if batch_size == "auto":
        extraction.trainer = trainer
    data.plan(trainer, extraction)
    if not data.wanted:
        return {}
    device = trainer.strategy.root_device
    progress = ExtractionProgress(shows_progress(trainer))
    # The ranks are there already: each runs a Trainer of its own on its own device.
    inner = ExtractingTrainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=trainer.precision,
        callbacks=[StoreWriter(store), progress],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    inner.predict(extraction, datamodule=data, return_predictions=False)
    trainer.strategy.barrier("head store written")
    if trainer.is_global_zero:
        store.compact()
        say(f"{extraction.title}: {progress.summary(share[1])}")
    return unusable_clips(data)


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
        "while this ran, or another node wrote them to a folder of its own. Run it again, or set CALM_STORE to a "
        "folder that all nodes share."
    )
