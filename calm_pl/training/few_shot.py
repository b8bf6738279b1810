"""The few-shot protocol of the literature: N-way K-shot, over many random episodes.

Shapes: N clips, K heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.episodes import EpisodeStream
from calm_pl.data.splits import check_disjoint
from calm_pl.methods.base import HeadClassifier
from calm_pl.methods.compare import Key, Row, score, timed_fit
from calm_pl.progress import Task
from calm_pl.training.comparison import (
    ROWS_FILE,
    anew,
    check_options,
    check_same_question,
    kept,
    read_rows,
    stored_heads,
)


def run_episodes(
    trainer: L.Trainer,
    data: AudioEpisodeDataModule,
    methods: Mapping[str, HeadClassifier],
    settings: Mapping[str, Any],
    way: int,
    shots: int,
    queries: int,
    count: int,
    out: Path,
) -> list[Row]:
    """Fit and test every method on every episode; rows that ``out`` holds already are kept, the others are added.

    Support clips are drawn from the data set's training clips and queries from its test clips, so that no source is
    on both sides. A row's seed is the number of its episode, from which and the data's seed all of it follows.

    Args:
        trainer: whose device and precision the backbone runs on, where head outputs are missing.
        data: recipe, backbone, store, protocol and seed.
        methods: unfitted classifiers by name.
        settings: what each of them was made with.
        way: classes of an episode.
        shots: support clips a class.
        queries: query clips a class.
        count: episodes.
        out: folder for the results.

    Raises:
        ValueError: too few clips or classes; ``out`` holds episodes of another kind; the data have an option that
            counts in `calm fit` alone.
    """
    check_options(data)
    data.recipe.prepare()
    clips = [clip for clip in data.asked(data.recipe.clips()) if clip.split in ("train", "test")]
    check_disjoint([c for c in clips if c.split == "train"], [c for c in clips if c.split == "test"])
    check_same_question(trainer, data, settings, out, way=way, shots=shots, queries=queries, seed=data.seed)
    heads_NKD, labels_N, usable_N = stored_heads(trainer, data, clips)
    query_N = torch.tensor([clip.split == "test" for clip in clips])
    stream = EpisodeStream(
        heads_NKD[usable_N], labels_N[usable_N], way, shots, queries, count, data.seed, query_N=query_N[usable_N]
    )
    rows = read_rows(out / ROWS_FILE)
    made = _rows(stream, methods, {row.key for row in rows})
    with Task("fitting and testing", max(count * len(methods) - len(rows), 0), "fits") as task:
        for row in kept(made, out / ROWS_FILE):
            rows.append(row)
            task.advance(note=f"episode {row.seed}")
    return [row for row in rows if row.seed < count]


def _rows(stream: EpisodeStream, methods: Mapping[str, HeadClassifier], done: set[Key]) -> Iterator[Row]:
    fold = f"{stream.way}-way"
    for number in range(stream.count):
        left = [name for name in methods if (name, stream.shots, number, fold) not in done]
        if not left:
            continue
        episode = stream.draw(number)
        for name in left:
            support = episode.support_SKD, episode.support_labels_S
            method, seconds = timed_fit(anew(methods[name])(), *support, stream.way)
            figures = score(method, episode.queries_QKD, episode.query_labels_Q)
            yield Row(name, stream.shots, number, fold, **figures, seconds=seconds)
