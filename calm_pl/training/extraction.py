"""The frozen forward pass as Lightning's ``predict``: clips in, head outputs in the store.

Shapes: B clips of a batch, K heads, D head dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.precision import weights_dtype
from calm_pl.backbone.processing import LALMInputs
from calm_pl.backbone.spec import Backbone
from calm_pl.backbone.tensor_parallel import is_first_process, processes
from calm_pl.clip import Clip
from calm_pl.data.stream import DEFAULT_BATCH_SIZE, BatchSize, ClipBatch, on_gpu, share_of_rank
from calm_pl.headstore import HeadStore, HeadStoreError
from calm_pl.progress import say
from calm_pl.training.batch_size import LARGEST_BATCH, fitting_batch_size, run_in_halves
from calm_pl.training.extraction_data import ClipDataModule, unusable_clips
from calm_pl.training.progress import ExtractionProgress, shows_progress


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
            # Not of the Trainer: the ranks of a fit extract with one each, of its own.
            if self.backbone.device_map is not None and processes() > 1:
                raise BackboneError(
                    f"device_map={self.backbone.device_map} spreads a model over the GPUs of one process, and "
                    f"{processes()} run here: use --trainer gpu, or tensor_parallel in place of device_map."
                )
            device = self.trainer.strategy.root_device
            self._lalm = self.backbone.load(weights_dtype(self.trainer.precision), str(device))
        return self._lalm

    @property
    def together(self) -> bool:
        """Whether several ranks hold one model together."""
        return self.backbone.tensor_parallel and processes() > 1

    @property
    def keeps(self) -> bool:
        """Whether what this rank reads is to be kept: of ranks that hold one model together, the first one's is."""
        return is_first_process() or not self.together

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
        if self.together:
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

    def chosen_batch_size(self, clips: Sequence[Clip], largest: int) -> int:
        """What ``batch_size: auto`` stands for: rank 0 finds it, as the clips will be run, and all ranks take the same.

        Ranks that hold one model together find none: where memory ended for one of them, the others would wait for it.
        """
        trainer, size = self.trainer, DEFAULT_BATCH_SIZE
        if self.together:
            if trainer.is_global_zero:
                say(f"batch size: {size}; with tensor_parallel, auto finds none")
            return size
        if clips and on_gpu(trainer) and trainer.is_global_zero:
            device, largest = trainer.strategy.root_device, min(largest, LARGEST_BATCH)
            with torch.inference_mode(), trainer.precision_plugin.forward_context():
                size = fitting_batch_size(self.vectors, self.lalm.processor, clips, device, largest)
            say(f"batch size: {size}")
        return trainer.strategy.broadcast(size)

    def vectors(self, inputs: LALMInputs) -> Tensor:
        """One pass (B, K, D)."""
        return self.lalm.forward(inputs)

    def vector_names(self) -> list[str]:
        """K names."""
        return self.lalm.head_names


class StoreWriter(BasePredictionWriter):
    """Writes each batch's wanted head outputs to the store: while a GPU computes the next batch, so that it does not
    wait for the disk."""

    def __init__(self, store: HeadStore) -> None:
        super().__init__(write_interval="batch")
        self.store = store
        self._computed: HeadBatch | None = None
        self._copied: torch.cuda.Event | None = None
        self._backbone_unchanged = False

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, prediction: HeadBatch | None, *_: Any
    ) -> None:
        self._write()  # the batch before; of this one a GPU has only been told
        if prediction is not None:
            if not self._backbone_unchanged and isinstance(pl_module, HeadExtraction):
                self._check_unchanged(pl_module.backbone)
            heads_BKD, device = prediction.heads_BKD, prediction.heads_BKD.device
            self._computed = replace(prediction, heads_BKD=heads_BKD.to("cpu", non_blocking=device.type == "cuda"))
            self._copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def _check_unchanged(self, backbone: Backbone) -> None:
        """Once the weights are in memory: hours may have passed since the store was keyed by their files.

        Raises:
            HeadStoreError: they changed meanwhile.
        """
        key = self.store.key
        now = {"files": backbone.fingerprint(self.store.root), "adapter": backbone.adapter_fingerprint(self.store.root)}
        if any(key.get(name, files) != files for name, files in now.items()):
            raise HeadStoreError(
                f"the files of {backbone.name} changed while this ran; run it again when they are whole"
            )
        self._backbone_unchanged = True

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
