"""What the Trainer's precision does to a real model's heads, and to what is predicted from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from calm_pl.backbone.precision import arithmetic
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip
from calm_pl.data.recipes.sounds import SOUNDS
from calm_pl.data.recipes.synthesis import RATE
from calm_pl.data.recipes.synthetic import scene
from calm_pl.headstore import HeadStore
from calm_pl.methods.calm import Calm
from calm_pl.training.extraction import HeadExtraction, extract_missing
from tests.extracting import trainer

CLASSES, SUPPORT, QUERIES = 6, 6, 20
CUTS = [(0.0, 2.0), (2.5, 4.5)]  # seconds of a scene that are a clip each


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """The same number of short clips of each of some everyday sounds."""
    folder = tmp_path_factory.mktemp("sounds")
    made = []
    for index, label in enumerate(list(SOUNDS)[:CLASSES]):
        for number in range((SUPPORT + QUERIES) // len(CUTS)):
            path = folder / f"{label}-{number}.flac"
            soundfile.write(path, scene(np.random.default_rng([index, number]), label), RATE)
            made += [Clip(str(path), label, start=start, end=end) for start, end in CUTS]
    return made


def heads(clips: list[Clip], precision: str, root: Path) -> torch.Tensor:
    backbone = Backbone("calm-tiny", heads="both")
    store = HeadStore(backbone.store_key(arithmetic(precision), root), root, dtype="float32")
    extract_missing(trainer(precision=precision), clips, HeadExtraction(backbone), store)
    return store.read(store.clip_keys(clips))


def test_bfloat16_turns_heads_little_and_predictions_hardly(clips, tmp_path):
    """Queries in bfloat16, support in float32, as where a classifier made elsewhere is used.

    On real clips and several models at least 99.1 % of the answers are the same: `python -m benchmarks.precision`; its
    figures are in docs/how-to/own-model.md. Here are few clips, hence the wider margin.
    """
    exact_NKD = heads(clips, "32-true", tmp_path)
    labels_N = torch.arange(CLASSES).repeat_interleave(SUPPORT + QUERIES)
    support_N = torch.arange(len(clips)) % (SUPPORT + QUERIES) < SUPPORT
    queries = [clip for clip, supports in zip(clips, support_N.tolist(), strict=True) if not supports]
    exact_QKD, labels_Q = exact_NKD[~support_N], labels_N[~support_N]
    classifier = Calm().fit(exact_NKD[support_N], labels_N[support_N], CLASSES)
    best_QC, classes_QC = classifier(exact_QKD).topk(2)
    lead_Q = best_QC[:, 0] - best_QC[:, 1]
    assert (classes_QC[:, 0] == labels_Q).float().mean() > 0.5  # there is something to get wrong
    assert (lead_Q > 0.1).float().mean() > 0.85
    lost = {}
    for precision in ("bf16-true", "bf16-mixed"):
        half_QKD = heads(queries, precision, tmp_path)
        cosine_QK = torch.cosine_similarity(half_QKD, exact_QKD, dim=-1)
        assert cosine_QK.median() > 0.999 and cosine_QK.quantile(0.05) > 0.99
        same_Q = classifier(half_QKD).argmax(1) == classes_QC[:, 0]
        assert same_Q.float().mean() > 0.98
        assert same_Q[lead_Q > 0.1].all()  # what changes was a tie, or nearly so
        lost[precision] = float(1 - cosine_QK.mean())
    assert lost["bf16-mixed"] < lost["bf16-true"] < 0.002
