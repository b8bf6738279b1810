"""The within-head metric: leaving clips out of it, its rank and size, and every method in it."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from calm_pl import functional as F
from calm_pl.baselines import GRW, SAV, KNearest, LinearProbe, MeanOfHeads, NearestPrototype
from calm_pl.functional import HeadMetric
from calm_pl.methods.calibration import best_temperature
from calm_pl.methods.calm import Calm
from calm_pl.methods.learned import LearnedWeights
from calm_pl.methods.leave_one_out import LeaveOneOut
from calm_pl.methods.metric_space import CENTRE, Whitened, directions
from calm_pl.methods.selection import SHRINKAGES
from tests.test_baselines import make_set


def left_out_by_hand(heads, labels, num_classes, shrinkage, centre=1.0):
    cosines = []
    for n in range(len(heads)):
        rest = torch.arange(len(heads)) != n
        mean, transform = F.whitening(heads[rest], labels[rest], num_classes, shrinkage)
        prototypes = F.class_prototypes(heads[rest], labels[rest], num_classes)
        queries = F.whiten(heads[n : n + 1], centre * mean, transform)
        cosines.append(F.cosines(queries, F.whiten(prototypes, centre * mean, transform)))
    return torch.cat(cosines)


def test_leaving_out_of_raw_prototypes_is_exact():
    heads, labels = make_set(4)
    expected = F.leave_one_out_cosines(heads, labels, 4)
    for scale in (1.0, 1e-6):
        assert_close(LeaveOneOut(scale * heads, labels, 4).cosines(), expected)


@pytest.mark.parametrize("width", [6, 40])
@pytest.mark.parametrize("shrinkage", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("centre", [0.5, 1.0])
def test_leaving_out_of_the_metric_is_close_to_doing_it_by_hand(width, shrinkage, centre):
    heads, labels = make_set(5, width=width)
    metric = HeadMetric.estimate(heads, labels, 4, centre)
    expected = left_out_by_hand(heads, labels, 4, shrinkage, centre)
    error = (LeaveOneOut(heads, labels, 4, metric).cosines(shrinkage) - expected).abs()
    mean, transform = F.whitening(heads, labels, 4, shrinkage)
    naive = F.leave_one_out_cosines(F.whiten(heads, centre * mean, transform), labels, 4)
    assert error.max() < 0.05
    assert error.mean() < 0.1 * (naive - expected).abs().mean()


def test_leaving_out_in_closed_form_chooses_the_same_metric_as_by_hand():
    heads, labels = make_set(4, width=24, noise=1.5)
    metric = HeadMetric.estimate(heads, labels, 4)
    likelihoods = []
    for source in ("closed form", "by hand"):
        losses = []
        for shrinkage in (0.03, 0.1, 0.3, 1.0):
            if source == "by hand":
                cosines = left_out_by_hand(heads, labels, 4, shrinkage)
            else:
                cosines = LeaveOneOut(heads, labels, 4, metric).cosines(shrinkage)
            losses.append(best_temperature(torch.softmax(cosines / 0.15, -1).mean(1), labels)[1])
        likelihoods.append(torch.tensor(losses))
    assert likelihoods[0].argmin() == likelihoods[1].argmin()
    assert_close(likelihoods[0], likelihoods[1], atol=0.02, rtol=0.0)


def test_leaving_out_holds_where_a_clip_spans_a_direction_of_the_metric_alone():
    heads, labels = make_set(2, width=24, noise=0.3)
    # Nobody else varies along this axis: without the clip, less than a thousandth of its variance is left there.
    heads[0, :, 0] += 30
    metric = HeadMetric.estimate(heads, labels, 4)
    expected = left_out_by_hand(heads, labels, 4, 0.01)
    assert_close(LeaveOneOut(heads, labels, 4, metric).cosines(0.01), expected, atol=0.05, rtol=0.0)


@pytest.mark.parametrize("shots", [1, 2, 8])
@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 1.0])
def test_the_metric_of_few_clips_is_found_among_as_many_dimensions(shots, shrinkage):
    heads, labels = make_set(shots, width=24)
    heads[..., 20:] = 0  # padding
    small, whole = (HeadMetric.estimate(heads, labels, 4, whole=whole) for whole in (False, True))
    assert small.vectors_KDM.shape[2] == min(4 * shots, 24)
    queries, _ = make_set(5, width=24, seed=3)
    mean, transform = F.whitening(heads, labels, 4, shrinkage)
    expected = F.whiten(queries, mean, whole.transform(shrinkage))
    assert_close(F.whiten(queries, mean, transform), expected, rtol=1e-3, atol=1e-3)
    axes, stretch, rest = small.factors(shrinkage)
    assert axes.shape[2] == min(4 * shots - 4, 23)
    assert_close(F.whiten_by_factors(queries, mean, axes, stretch, rest), expected, rtol=1e-3, atol=1e-3)
    left_out = (LeaveOneOut(heads, labels, 4, metric).cosines(max(0.1, shrinkage)) for metric in (small, whole))
    assert_close(*left_out, rtol=1e-3, atol=1e-3)


def test_noise_is_as_long_where_few_clips_span_few_dimensions():
    def noisy(shots, whole):
        heads, labels = make_set(shots, width=400)
        heads, labels = torch.cat([heads, heads[:1] + 1]), torch.cat([labels, torch.tensor([4])])
        left_out = LeaveOneOut(heads, labels, 5, HeadMetric.estimate(heads, labels, 5, whole=whole))
        return left_out.cosines(1.0, generator=torch.Generator().manual_seed(0))[-1, :, 4].mean()

    assert_close(noisy(3, whole=False), noisy(3, whole=True), rtol=0.2, atol=0.0)


def test_a_metric_of_lower_rank_keeps_what_varies_most():
    heads, labels = make_set(20, width=12)
    heads += 20 * torch.randn(80, 1, 1) * torch.nn.functional.one_hot(torch.tensor(5), 12)
    metric = HeadMetric.estimate(heads, labels, 4)
    low = metric.of_rank(2)
    axes, stretch, _ = low.factors(0.01)
    assert axes.shape == (6, 12, 2) and stretch.shape == (6, 2)
    assert (axes[:, 5, -1].abs() > 0.9).all() and (stretch[:, -1] < -0.8).all()
    assert_close(low.values_KM.sum(1), metric.values_KM.sum(1))
    assert metric.of_rank(50) is metric
    with pytest.raises(ValueError, match="rank must be at least 0"):
        metric.of_rank(-1)


@pytest.mark.parametrize("make", [LearnedWeights, lambda **a: Calm("whitened", **a), lambda **a: Whitened(SAV(3), **a)])
def test_a_classifier_is_as_small_as_its_metric(make):
    heads, labels = make_set(10, width=32)
    ranks = {rank: make(metric_rank=rank).fit(heads, labels, 4) for rank in (None, 3, 0)}
    assert [ranks[rank].axes_KDR.shape[2] for rank in ranks] == [31, 3, 0]
    queries, truth = make_set(20, width=32, seed=5)
    for method in ranks.values():
        assert (method(queries).argmax(1) == truth).float().mean() > 0.6
    single = make().fit(*make_set(1, width=32), 4)
    assert single.axes_KDR.numel() == 0
    again = make()
    again.load_state_dict(single.state_dict(), strict=False)
    assert torch.equal(again(queries), single(queries))


@pytest.mark.parametrize("estimate", ["ledoit_wolf", "oas"])
def test_shrinkage_formulas_fall_with_more_clips(estimate):
    def shrinkage(shots):
        heads, labels = make_set(shots, width=16, noise=2.0)
        return getattr(HeadMetric.estimate(heads * torch.logspace(0, 1, 16), labels, 4), estimate)()

    few, many = shrinkage(4), shrinkage(200)
    assert ((few >= 0) & (few <= 1)).all()
    assert many.mean() < few.mean()


@pytest.mark.parametrize("shots", [1, 2, 3, 5, 30])
def test_shrinkage_formulas_are_those_of_the_papers(shots):
    """With n = N - C, for the clips' residuals z and their covariance S in the D dimensions that are no padding."""
    heads, labels = make_set(shots, width=6, noise=2.0)
    heads = heads * torch.tensor([1, 2, 3, 4, 5, 0.0])
    metric = HeadMetric.estimate(heads, labels, 4)
    n, dim = max(1, len(labels) - 4), 5
    residuals_NKD = (heads - F.class_prototypes(heads, labels, 4)[labels]).double()
    for k in range(6):
        z_ND = residuals_NKD[:, k, :dim]
        s_DD = z_ND.T @ z_ND / n
        trace, square = float(s_DD.trace()), float(s_DD.square().sum())
        distance = square - trace**2 / dim
        if shots == 1:  # nothing varies: round
            expected = {"ledoit_wolf": 0.0, "oas": 1.0}
        else:
            fourth = float(z_ND.square().sum(1).square().mean())
            oas = ((1 - 2 / dim) * square + trace**2) / ((n + 1 - 2 / dim) * distance)
            expected = {"ledoit_wolf": min(1, max(0, (fourth - square) / n / distance)), "oas": min(1, oas)}
        for name, value in expected.items():
            assert float(getattr(metric, name)()[k]) == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("method", [Calm, LearnedWeights])
@pytest.mark.parametrize("estimate", ["ledoit_wolf", "oas"])
def test_a_formula_for_the_shrinkage_can_be_named(method, estimate):
    heads, labels = make_set(6, noise=1.5)
    given = {"metric": "whitened"} if method is Calm else {}
    fitted = method(shrinkage=estimate, **given).fit(heads, labels, 4)
    assert fitted.choices()["shrinkage"] == estimate
    assert (fitted(heads).argmax(1) == labels).float().mean() > 0.8
    with pytest.raises(ValueError, match="ledoit_wolf"):
        method(shrinkage="magic", **given).fit(heads, labels, 4)


def test_loudness_does_not_shape_the_metric():
    heads, labels = make_set(5)
    louder = heads * torch.linspace(0.1, 10, len(heads))[:, None, None]
    for method in (lambda: Calm("whitened"), LearnedWeights):
        assert_close(
            method().fit(louder, labels, 4)(heads), method().fit(heads, labels, 4)(heads), atol=1e-3, rtol=0.01
        )


def test_a_head_that_says_the_same_of_every_clip_has_no_metric():
    heads, labels = make_set(5)
    constant = torch.stack([torch.randn(heads.shape[2]), torch.zeros(heads.shape[2])])
    heads = torch.cat([heads, constant.expand(len(heads), -1, -1)], 1)
    metric = HeadMetric.estimate(heads, labels, 4)
    for transform_DD in metric.transform(0.1)[-2:]:
        assert_close(transform_DD, transform_DD[0, 0] * torch.eye(heads.shape[2]))
    assert LearnedWeights().fit(heads, labels, 4)(heads).isfinite().all()


@pytest.mark.parametrize("method", [SAV, GRW, KNearest, MeanOfHeads, lambda: NearestPrototype(2), LinearProbe])
def test_every_method_works_in_the_metric(method):
    heads, labels = make_set(6, noise=1.5)
    queries, truth = make_set(20, noise=1.5, seed=9)
    fitted = Whitened(method()).fit(heads, labels, 4)
    loaded = Whitened(method())
    loaded.load_state_dict(fitted.state_dict())
    assert_close(loaded(queries), fitted(queries))
    assert (fitted(queries).argmax(1) == truth).float().mean() > 0.4
    assert fitted.choices()["metric_shrinkage"] in (0.03, 0.1, 0.3, 1.0)


def test_a_method_in_the_metric_has_the_likeliest_shrinkage_of_all_heads_voting_alike():
    chosen = []
    for width in (8, 16, 32):
        heads, labels = make_set(6, width=width, noise=0.3)
        metric = HeadMetric.estimate(directions(heads), labels, 4, CENTRE)
        left_out, nll = LeaveOneOut(directions(heads), labels, 4, metric), {}
        for shrinkage in SHRINKAGES:
            scores_NC = torch.softmax(left_out.cosines(shrinkage) / 0.15, -1).mean(1)
            nll[shrinkage] = best_temperature(scores_NC, labels)[1]
        chosen.append(Whitened(MeanOfHeads()).fit(heads, labels, 4).choices()["metric_shrinkage"])
        assert chosen[-1] == min(nll, key=nll.get)
    assert len(set(chosen)) == 3


def test_the_metric_takes_out_what_varies_in_every_class():
    heads, labels = make_set(8)
    queries, truth = make_set(20, seed=9)
    loud = torch.zeros(heads.shape[-1]).index_fill(0, torch.tensor([0]), 30.0)
    noisy = [
        x + loud * torch.randn(*x.shape[:2], 1, generator=torch.Generator().manual_seed(3)) for x in (heads, queries)
    ]
    accuracy = [
        (method.fit(noisy[0], labels, 4)(noisy[1]).argmax(1) == truth).float().mean()
        for method in (MeanOfHeads(), Whitened(MeanOfHeads()))
    ]
    assert accuracy[1] > accuracy[0] + 0.2


@pytest.mark.parametrize("make", [LearnedWeights, lambda: Calm("whitened")])
def test_unlabelled_clips_shape_the_metric_of_single_clips_alone(make):
    unlabelled, _ = make_set(30, noise=2.0, seed=7)
    for shots, helped in ((1, True), (3, False)):
        heads, labels = make_set(shots)
        plain, method = make().fit(heads, labels, 4), make()
        method.unlabelled_NKD = unlabelled
        method.fit(heads, labels, 4)
        assert method.choices()["shrinkage"] == (0.6 if helped else plain.choices()["shrinkage"])
        assert torch.equal(method(unlabelled), plain(unlabelled)) is not helped
