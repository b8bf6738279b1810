"""A support clip with several labels is one clip: left out of all its classes, whatever row of it is judged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from calm_pl.baselines import LinearProbe
from calm_pl.functional.heads import class_means, cosines
from calm_pl.functional.metric import HeadMetric
from calm_pl.methods import logistic
from calm_pl.methods.calm import Calm
from calm_pl.methods.episodes import EpisodeSource
from calm_pl.methods.learned import LearnedWeights
from calm_pl.methods.leave_one_out import LeaveOneOut, same_clips
from calm_pl.methods.metric_space import Whitened

FINE, CLASSES, HEADS, DIM = 4, 6, 6, 16
METHODS = {
    "calm": Calm,
    "whitened": lambda: Calm("whitened"),
    "learned": lambda: LearnedWeights(steps=5),
    "probe": LinearProbe,
    "whitened probe": lambda: Whitened(LinearProbe()),
}


def clips(count: int, noise: float = 0.6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Clips of four sounds, the first two of class 4, the others of class 5: heads, fine and coarse labels."""
    generator = torch.Generator().manual_seed(seed)
    means_CKD = torch.randn(FINE, HEADS, DIM, generator=torch.Generator().manual_seed(9))
    fine_N = torch.arange(FINE).repeat_interleave(count)
    heads_NKD = means_CKD[fine_N] + noise * torch.randn(len(fine_N), HEADS, DIM, generator=generator)
    return heads_NKD, fine_N, FINE + fine_N // 2


def rows(count: int, noise: float = 0.6) -> tuple[Tensor, Tensor]:
    heads_NKD, fine_N, coarse_N = clips(count, noise)
    return torch.cat([heads_NKD, heads_NKD]), torch.cat([fine_N, coarse_N])


@pytest.mark.parametrize("in_metric", [False, True])
def test_a_clip_is_left_out_of_all_its_prototypes(in_metric):
    heads_NKD, labels_N = rows(5)
    metric = HeadMetric.estimate(heads_NKD, labels_N, CLASSES) if in_metric else None
    left_out = LeaveOneOut(heads_NKD, labels_N, CLASSES, metric)
    shrinkage = 0.3 if in_metric else None
    found_NKC, N = left_out.cosines(shrinkage), len(labels_N) // 2
    for n in (0, 7, N - 1):
        assert_close(found_NKC[n, :, labels_N[n + N]], found_NKC[n + N, :, labels_N[n + N]])
        assert_close(found_NKC[n + N, :, labels_N[n]], found_NKC[n, :, labels_N[n]])
        if not in_metric:  # by hand
            others_N = (torch.arange(2 * N) != n) & (torch.arange(2 * N) != n + N)
            prototypes_CKD = class_means(heads_NKD[others_N], labels_N[others_N], CLASSES)
            assert_close(found_NKC[n], cosines(heads_NKD[n : n + 1], prototypes_CKD)[0], atol=1e-5, rtol=0)
    some = torch.tensor([3, 1, N + 2])
    assert_close(left_out.cosines(shrinkage, some), found_NKC[some])


def test_a_prototype_of_nothing_but_the_clip_tells_nothing_of_it():
    heads_NKD, fine_N, _ = clips(3)
    heads_NKD, labels_N = torch.cat([heads_NKD, heads_NKD[:1]]), torch.cat([fine_N, torch.tensor([FINE])])
    assert (LeaveOneOut(heads_NKD, labels_N, FINE + 1).cosines()[0, :, FINE] == -1).all()


def test_a_row_held_out_takes_no_part_where_the_others_stay():
    heads_NKD, labels_N = rows(5)
    held_N = torch.zeros(len(labels_N), dtype=torch.bool)
    held_N[len(labels_N) // 2] = True  # the first clip's coarse row
    rest = LeaveOneOut(heads_NKD, labels_N, CLASSES).without(held_N)
    prototypes_CKD = class_means(heads_NKD[~held_N], labels_N[~held_N], CLASSES)
    assert_close(rest.cosines()[0, :, FINE], cosines(heads_NKD[:1], prototypes_CKD)[0, :, FINE])


def test_episodes_show_no_query_to_itself():
    heads_NKD, labels_N = rows(3, noise=0.01)
    left_out = LeaveOneOut(heads_NKD, labels_N, CLASSES)
    episodes = EpisodeSource(left_out, None, shots=1, per_step=20).draw(0)
    assert (episodes.cosines_QKC < 1 - 1e-6).all() and (episodes.cosines_QKC == -1).any()


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_choices_are_made_on_clips_that_are_told_apart(make):
    """Half of the rows are right at best: of both labels of a clip one comes first."""
    method = make().fit(*rows(5), CLASSES)
    heads_NKD, fine_N, coarse_N = clips(20, seed=1)
    choices = method.choices()
    assert 0.4 < choices.get("cv_accuracy", choices.get("accuracy")) <= 0.5
    best_N2 = method(heads_NKD).topk(2).indices.sort(1).values
    assert (best_N2 == torch.stack([fine_N, coarse_N], 1)).all(1).float().mean() > 0.8


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_noise_is_told_as_often_as_chance_has_it(make, monkeypatch):
    """A clip whose other row were not left out would always be taken for that one's class."""
    monkeypatch.setattr(logistic, "PENALTIES", (1000.0,))  # else the probe sees that there is nothing to tell
    heads_NKD, labels_N = rows(10, noise=1000.0)
    order_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0))
    choices = make().fit(heads_NKD[order_N], labels_N[order_N], CLASSES).choices()
    assert choices.get("cv_accuracy", choices.get("accuracy")) > 0.1


def test_clips_are_known_again_up_to_rounding():
    heads_NKD, _, _ = clips(50)
    order = torch.randperm(3 * len(heads_NKD), generator=torch.Generator().manual_seed(1))
    clip_N = same_clips(torch.cat([heads_NKD, heads_NKD * (1 + 1e-6), heads_NKD])[order])
    assert len(clip_N.unique()) == len(heads_NKD)
    assert all(len(clip_N[order % len(heads_NKD) == n].unique()) == 1 for n in range(len(heads_NKD)))
