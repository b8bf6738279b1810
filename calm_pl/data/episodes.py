"""N-way K-shot episodes of the few-shot literature: some classes, some support clips, some queries, again and again.

Shapes: S support clips of an episode, Q queries, K heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info


@dataclass(frozen=True)
class Episode:
    """One small classification task; labels count from 0 within it, ``classes`` names them in the whole set.

    ``number`` is the episode's place in the stream, from which everything in it follows.
    """

    number: int
    classes: Tensor
    support_SKD: Tensor
    support_labels_S: Tensor
    queries_QKD: Tensor
    query_labels_Q: Tensor


class EpisodeStream(IterableDataset[Episode]):
    """Draws ``count`` episodes from labelled head outputs, each from (seed, number) alone.

    Ranks and workers take every n-th episode: together they see each exactly once, and the same whatever their
    number.

    Args:
        heads_NKD: head outputs to draw from.
        labels_N: their classes, from 0.
        way: classes of an episode; None takes all.
        shots: support clips a class.
        queries: query clips a class, none of them in the support.
        query_N: which clips are queries, the others being support: a data set's own split, which keeps sources apart.
            None: any clip may be either.
        count: how many episodes.
        seed: of all draws.
        rank: of this process.
        world_size: how many processes share the stream.

    Raises:
        ValueError: a class has too few clips, or there are too few classes; says the counts.
    """

    def __init__(
        self,
        heads_NKD: Tensor,
        labels_N: Tensor,
        way: int | None = None,
        shots: int = 5,
        queries: int = 15,
        count: int = 600,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        query_N: Tensor | None = None,
    ) -> None:
        self.heads_NKD, self.labels_N = heads_NKD, labels_N
        self.members = [(labels_N == c).nonzero()[:, 0] for c in range(int(labels_N.max()) + 1)]
        self.way = way or len(self.members)
        self.shots, self.queries, self.count, self.seed = shots, queries, count, seed
        self.rank, self.world_size = rank, world_size
        if self.way > len(self.members):
            raise ValueError(f"way={way}: there are {len(self.members)} classes.")
        self.query_N = query_N
        needs = {"clips": shots + queries} if query_N is None else {"support clips": shots, "query clips": queries}
        for kind, needed in needs.items():
            counts = {c: len(found) for c, found in enumerate(self._of_kind(kind))}
            short = {c: count for c, count in counts.items() if count < needed}
            if short:
                raise ValueError(
                    f"{shots} shots and {queries} queries need {needed} {kind} a class; these have fewer "
                    f"(class: {kind}): {short}"
                )

    def _of_kind(self, kind: str) -> list[Tensor]:
        if self.query_N is None:
            return self.members
        wanted_N = self.query_N if kind == "query clips" else ~self.query_N
        return [found[wanted_N[found]] for found in self.members]

    def __iter__(self) -> Iterator[Episode]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(self.rank * parts + part, self.count, self.world_size * parts):
            yield self.draw(number)

    def draw(self, number: int) -> Episode:
        """The episode of this number."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        classes = torch.randperm(len(self.members), generator=generator)[: self.way]
        support, queries = [], []
        for c in classes.tolist():
            order = self.members[c][torch.randperm(len(self.members[c]), generator=generator)]
            if self.query_N is None:
                support.append(order[: self.shots])
                queries.append(order[self.shots : self.shots + self.queries])
            else:
                support.append(order[~self.query_N[order]][: self.shots])
                queries.append(order[self.query_N[order]][: self.queries])
        own_labels = torch.arange(self.way)
        return Episode(
            number,
            classes,
            self.heads_NKD[torch.cat(support)],
            own_labels.repeat_interleave(self.shots),
            self.heads_NKD[torch.cat(queries)],
            own_labels.repeat_interleave(self.queries),
        )
