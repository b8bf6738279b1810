"""Stored head outputs with their labels, in chunks; and the numbers of optimiser steps.

Shapes: B batch, K heads, D head dimension, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from calm_pl.headstore import HeadStore

# After so many optimiser steps the support-set criterion is computed, for callbacks that watch it.
STEPS_PER_EPOCH = 10
# Clips whose head outputs are in memory at once while testing: 256 x 1,024 x 128 float32 are 134 MB.
TEST_CHUNK = 256


class LabelledHeads:
    """Head outputs with labels (-1: unknown); ``indices_B`` are positions in the data module's ``clips``.

    Where clips have several labels, ``labels_B`` is (B, C): 1 for each label of a clip.

    No dataclass, so that Lightning's precision plugins leave the head outputs in float32.
    """

    def __init__(self, indices_B: Tensor, heads_BKD: Tensor, labels_B: Tensor) -> None:
        self.indices_B, self.heads_BKD, self.labels_B = indices_B, heads_BKD, labels_B

    def __len__(self) -> int:
        return len(self.indices_B)

    def to(self, device: torch.device, non_blocking: bool = False) -> LabelledHeads:
        """Called by Lightning."""
        tensors = (self.indices_B, self.heads_BKD, self.labels_B)
        return LabelledHeads(*(tensor.to(device, non_blocking=non_blocking) for tensor in tensors))


class StoredHeads(IterableDataset[LabelledHeads]):
    """Streams stored head outputs in chunks; rank r of w sees clips r, r + w, ...: each clip exactly once.

    A rank beside others that has no clip gets one empty chunk: Lightning would send it past the epoch's end, where the
    others wait for it.
    """

    def __init__(
        self,
        store: HeadStore,
        keys: Sequence[str],
        labels: Tensor,
        positions: Sequence[int],
        rank: int = 0,
        world_size: int = 1,
        chunk: int = TEST_CHUNK,
    ) -> None:
        self.store, self.keys, self.labels, self.chunk = store, keys, labels, chunk
        self.positions = list(positions)[rank::world_size]
        self.least = 1 if world_size > 1 and len(positions) else 0

    def __len__(self) -> int:
        return max(self.least, -(-len(self.positions) // self.chunk))

    def __iter__(self) -> Iterator[LabelledHeads]:
        for first in range(0, len(self) * self.chunk, self.chunk):
            chosen = self.positions[first : first + self.chunk]
            yield LabelledHeads(
                torch.tensor(chosen, dtype=torch.long),
                self.store.read([self.keys[i] for i in chosen]),
                self.labels[chosen],
            )


class StepNumbers(IterableDataset[int]):
    """The steps of one epoch. Every rank takes every step, and its part of the step's episodes."""

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def __iter__(self) -> Iterator[int]:
        return iter(range(STEPS_PER_EPOCH))
