"""What the Trainer's precision does to a real model's heads, and to what is predicted from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip
from calm_pl.data.recipes.sounds import SOUNDS
from calm_pl.data.recipes.synthesis import RATE
from calm_pl.data.recipes.synthetic import scene
from calm_pl.headstore import HeadStore
from calm_pl.methods.calm import Calm
from calm_pl.training.extraction import HeadExtraction, arithmetic, extract_missing
from tests.extracting import trainer

CLASSES, SUPPORT, QUERIES = 6, 6, 8


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """The same number of short clips of each of some everyday sounds."""
    folder = tmp_path_factory.mktemp("sounds")
    made = []
    for index, label in enumerate(list(SOUNDS)[:CLASSES]):
        for number in range(SUPPORT + QUERIES):
            path = folder / f"{label}-{number}.flac"
            soundfile.write(path, scene(np.random.default_rng([index, number]), label)[: 2 * RATE], RATE)
            made.append(Clip(str(path), label))
    return made


def heads(clips: list[Clip], precision: str, root: Path) -> torch.Tensor:
    backbone = Backbone("calm-tiny", heads="both")
    store = HeadStore(backbone.store_key(arithmetic(precision), root), root, dtype="float32")
    extract_missing(trainer(precision=precision), clips, HeadExtraction(backbone), store)
    return store.read(store.clip_keys(clips))


def test_bfloat16_turns_heads_little_and_predictions_hardly(clips, tmp_path):
    exact_NKD = heads(clips, "32-true", tmp_path)
    labels_N = torch.arange(CLASSES).repeat_interleave(SUPPORT + QUERIES)
    support_N = torch.arange(len(clips)) % (SUPPORT + QUERIES) < SUPPORT
    classifier = Calm().fit(exact_NKD[support_N], labels_N[support_N], CLASSES)
    predicted_N = classifier(exact_NKD[~support_N]).argmax(1)
    assert (predicted_N == labels_N[~support_N]).float().mean() > 0.5  # there is something to get wrong
    lost = {}
    for precision in ("bf16-true", "bf16-mixed"):
        half_NKD = heads(clips, precision, tmp_path)
        cosine_NK = torch.cosine_similarity(half_NKD, exact_NKD, dim=-1)
        assert cosine_NK.median() > 0.999
        assert (classifier(half_NKD[~support_N]).argmax(1) == predicted_N).float().mean() > 0.95
        lost[precision] = float(1 - cosine_NK.mean())
    assert lost["bf16-mixed"] < lost["bf16-true"] < 0.003
