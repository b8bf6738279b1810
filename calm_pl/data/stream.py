"""Clips streamed to the backbone: decoded and turned into inputs by worker processes, batch by batch.

Which clips form a batch decides the last bits of their head outputs. It does not depend on how many ranks and workers
there are, and a run that goes on after a kill takes the batches planned before it (`HeadStore.planned_batches`), so
they give the same numbers.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Literal, NamedTuple, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from calm_pl.audio import AudioError
from calm_pl.backbone.content import Media
from calm_pl.backbone.processing import ClipProcessor, LALMInputs
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip
from calm_pl.data.shards import Files, ShardClip, ShardClips, decoded
from calm_pl.headstore import HeadStore, Stamp, file_stamp
from calm_pl.progress import say

BatchSize = int | Literal["auto"]
# What `auto` is where nothing is found by trying: on a CPU, where larger batches are no faster, and for streams.
DEFAULT_BATCH_SIZE = 8
# Batches' worth of a shard's clips that are sorted by length together; this many are in a worker's memory at once.
SORTED_BATCHES = 4
# Fewer are sorted together where their files are larger than this: of whole films, memory would not hold so many.
SORTED_BYTES = 1 << 30

ShardFiles = ShardClip[Files] | AudioError
T = TypeVar("T")


class ClipBatch:
    """One batch on its way to the backbone.

    No dataclass, so that Lightning's precision plugins leave it alone: the backbone casts its own inputs.

    Args:
        clips: those that could be decoded.
        keys: where the head store keeps each; None for a clip that is run for its neighbours' sake alone.
        inputs: what the model takes; None when there is nothing to run.
        errors: clips that cannot be used, each named, with the reason.
        cut: how many of a stream's clips are longer than the model's window, and cut there; of files, see
            `ClipProcessor.warn_of_cut_clips`.
        left_out: how many clips of a stream were passed over, being of another split.
    """

    def __init__(
        self,
        clips: list[Clip],
        keys: list[str | None],
        inputs: LALMInputs | None,
        errors: list[str],
        cut: int = 0,
        left_out: int = 0,
    ) -> None:
        self.clips, self.keys, self.inputs, self.errors = clips, keys, inputs, errors
        self.cut, self.left_out = cut, left_out

    def __len__(self) -> int:
        return len(self.clips)

    def pin_memory(self) -> ClipBatch:
        inputs = self.inputs and self.inputs.pin_memory()
        return ClipBatch(self.clips, self.keys, inputs, self.errors, self.cut, self.left_out)


class ClipBatches(Dataset[ClipBatch]):
    """Batches of files. One item is one whole batch, so that a worker does all of its decoding and features.

    Args:
        clips: all clips of the run.
        keys: of all clips.
        wanted: positions that are to be computed.
        batches: positions; each batch is run whole, with clips that are not wanted for their neighbours' sake.
        backbone: whose processor makes the inputs.
        stamps: of the clips' files when their keys were made, see `file_stamps`; a clip whose file changed is an error,
            else other bytes would be kept under its key.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        keys: Sequence[str],
        wanted: Sequence[int],
        batches: list[list[int]],
        backbone: Backbone,
        stamps: Mapping[str, Stamp | None] | None = None,
    ) -> None:
        self.clips = clips
        self.keys = keys
        self.wanted = frozenset(wanted)
        self.batches = batches
        self.backbone = backbone
        self.stamps = stamps or {}
        self._processor: ClipProcessor | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, item: int) -> ClipBatch:
        if self._processor is None:  # built in the worker, once
            self._processor = self.backbone.clip_processor()
        batch = self.batches[item]
        loaded: dict[int, list[Media]] = {}
        errors: list[str] = []
        for index in sorted(batch, key=lambda index: index not in self.wanted):
            if index not in self.wanted and not loaded:
                break  # of the wanted, none can be used
            try:
                media = self._processor.load(self.clips[index])
                self._check_unchanged(self.clips[index])
            except AudioError as error:
                errors.append(str(error))
            else:
                loaded[index] = media
        if not loaded:
            return ClipBatch([], [], None, errors)
        usable = [index for index in batch if index in loaded]
        clips = [self.clips[i] for i in usable]
        keys = [self.keys[i] if i in self.wanted else None for i in usable]
        return ClipBatch(clips, keys, self._processor(clips, [loaded[i] for i in usable]), errors)

    def _check_unchanged(self, clip: Clip) -> None:
        for file in _files(clip):
            if file in self.stamps and file_stamp(file) != self.stamps[file]:
                raise AudioError(file, "changed while this ran; run it again when it is whole")


def _files(clip: Clip) -> list[str]:
    return [file for file in (clip.audio, clip.video) if file]


def file_stamps(clips: Sequence[Clip]) -> dict[str, Stamp | None]:
    """Sizes and times of the clips' files; None for one that is not there."""
    return {file: file_stamp(file) for clip in clips for file in _files(clip)}


class Loaded(NamedTuple):
    """A clip of a shard, decoded; and whether it is cut, which nobody can tell later."""

    media: list[Media]
    is_cut: bool


class ShardBatches(IterableDataset[ClipBatch]):
    """Batches of clips from tar shards, which are read once, from front to back.

    No batch crosses the end of a shard. Memory holds a few batches, whatever the size of the set.

    Args:
        urls: the shards, see `ShardClips`.
        backbone: whose processor makes the inputs.
        batch_size: clips a batch.
        store: batches that it holds already are left out, and clips that no such batch needs are not decoded; None
            runs everything.
        share: (rank, world size): the shards are dealt to ranks, and a rank's to its workers.
        split: clips that say they are of another one are left out; None takes all.
    """

    def __init__(
        self,
        urls: Sequence[str],
        backbone: Backbone,
        batch_size: int,
        store: HeadStore | None = None,
        share: tuple[int, int] = (0, 1),
        split: str | None = None,
    ) -> None:
        super().__init__()
        self.urls = urls
        self.backbone = backbone
        self.batch_size = batch_size
        self.store = store
        self.share = share
        self.split = split

    def __iter__(self) -> Iterator[ClipBatch]:
        processor = self.backbone.clip_processor()

        def load(clip: Clip) -> Loaded:
            return Loaded(processor.load(clip), processor.is_cut(clip))

        stream = ShardClips(self.urls, load, processor.content.sees, self.share)
        for shard in stream.shards():
            for read in self._sorted_together(shard):
                yield from self._sorted_batches(read, processor, load)

    def _sorted_together(self, shard: Iterator[ShardFiles]) -> Iterator[list[ShardFiles]]:
        read: list[ShardFiles] = []
        size = 0
        for item in shard:
            read.append(item)
            size += 0 if isinstance(item, AudioError) else sum(map(len, item.content.values()))
            if len(read) == SORTED_BATCHES * self.batch_size or size > SORTED_BYTES:
                yield read
                read, size = [], 0
        if read:
            yield read

    def _sorted_batches(
        self, read: Sequence[ShardFiles], processor: ClipProcessor, load: Callable[[Clip], Loaded]
    ) -> Iterator[ClipBatch]:
        errors = [str(item) for item in read if isinstance(item, AudioError)]
        every = [item for item in read if isinstance(item, ShardClip)]
        found = [item for item in every if self.split is None or item.clip.split in (None, self.split)]
        left_out = len(every) - len(found)
        keys = [item.key for item in found]
        # Of clips with the same bytes only one is to be kept, but each that cannot be used is to be named.
        kept = set(range(len(keys)) if self.store is None else self.store.missing(keys))
        missing = {keys[index] for index in kept}
        loaded = {i: decoded(item, load) for i, item in enumerate(found) if item.key in missing}
        errors += [str(item) for item in loaded.values() if isinstance(item, AudioError)]
        if any(isinstance(loaded[index], ShardClip) for index in kept):
            # The others' lengths decide who shares a batch with those that are missing, and so their last bits.
            loaded |= {i: decoded(item, load) for i, item in enumerate(found) if i not in loaded}
            items = [(i, item) for i in range(len(found)) if isinstance(item := loaded[i], ShardClip)]
            items.sort(key=lambda pair: -sum(map(_size, pair[1].content.media)))
            for begin in range(0, len(items), self.batch_size):
                batch = items[begin : begin + self.batch_size]
                batch_keys = [item.key if i in kept else None for i, item in batch]
                if any(batch_keys):
                    clips = [item.clip for _, item in batch]
                    inputs = processor(clips, [item.content.media for _, item in batch])
                    cut = sum(item.content.is_cut for _, item in batch)
                    yield ClipBatch(clips, batch_keys, inputs, errors, cut, left_out)
                    errors, left_out = [], 0
        if errors or left_out:
            yield ClipBatch([], [], None, errors, left_out=left_out)


def _size(medium: Media) -> int:
    """By which clips are sorted: samples, or frames where nothing is heard."""
    frames = 0 if medium.frames_F3HW is None else len(medium.frames_F3HW)
    return len(medium.waveform_S) or frames


def share_of_rank(trainer: L.Trainer, backbone: Backbone) -> tuple[int, int]:
    """Which of how many shares of a run's batches this rank reads; ranks that hold one model together all read all."""
    return (0, 1) if backbone.tensor_parallel else (trainer.global_rank, trainer.world_size)


def on_gpu(trainer: L.Trainer) -> bool:
    """Whether this rank computes on a CUDA device."""
    return trainer.strategy.root_device.type == "cuda"


def stream_loader(batches: Dataset[ClipBatch], num_workers: int, pin_memory: bool = False) -> DataLoader[ClipBatch]:
    """A loader over this rank's batches, all of them whole; workers decode ahead while the model computes."""
    if num_workers:
        allow_open_files()
    # Where no sampler deals the batches to ranks, Lightning does, and fails where there are fewer of them than ranks.
    dealt: DistributedSampler[int] | None = None
    if not isinstance(batches, IterableDataset):
        dealt = DistributedSampler(batches, 1, 0, shuffle=False)
    return DataLoader(
        batches,
        batch_size=None,
        sampler=dealt,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )


def stream_batch_size(batch_size: BatchSize) -> int:
    """Clips a batch of a stream, of which nobody knows the longest clip: `auto` is a constant there, and says so."""
    if batch_size == "auto":
        rank_zero_only(say)(f"batch size: {DEFAULT_BATCH_SIZE}; of a stream, auto finds none")
        return DEFAULT_BATCH_SIZE
    return batch_size


def allow_open_files() -> None:
    """Ask for as many open files as the system lets a process have: each tensor on its way from a worker is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def of_all_ranks(items: list[T]) -> list[T]:
    """The items of rank 0, of rank 1, ... A collective call: every rank must make it."""
    if not torch.distributed.is_initialized():
        return items
    gathered: list[list[T]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, items)
    return list(chain.from_iterable(gathered))
