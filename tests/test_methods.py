"""Leaving out, choosing, calibrating, comparing: what each promises."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from calm_pl.functional import HeadMetric
from calm_pl.methods import selection
from calm_pl.methods.calibration import best_temperature, calibrate, figures, temper
from calm_pl.methods.calm import Calm, formula_weights
from calm_pl.methods.compare import Fold, Row, compare, paired_differences, t_quantile
from calm_pl.methods.learned import LearnedWeights
from calm_pl.methods.leave_one_out import LeaveOneOut
from calm_pl.methods.selection import Grid, best_of, judge_all, judged_clips
from tests.test_baselines import make_set

FORMULA = {"tau": 0.07, "scheme": "margin_clamped", "tau_w": 0.3, "top_k": 0, "alpha": 0.0}


def test_every_setting_of_the_grid_is_obeyed():
    heads, labels = make_set(4)
    grid = Grid(tau=(0.2,), scheme=("prob_softmax",), tau_w=(0.4,), top_fraction=(0.5,), alpha=(2.0,), shrinkage=(0.6,))
    choices = Calm("whitened", grid=grid).fit(heads, labels, 4).choices()
    expected = {"tau": 0.2, "scheme": "prob_softmax", "tau_w": 0.4, "top_k": 3, "alpha": 2.0, "shrinkage": 0.6}
    assert {name: choices[name] for name in expected} == expected and choices["candidates"] == 1


@pytest.mark.parametrize("make", [LearnedWeights, lambda: Calm("whitened")])
def test_choosing_sees_two_clips_of_every_class_however_many_classes(make, monkeypatch):
    monkeypatch.setattr(selection, "MAX_POSTERIORS", 10)
    heads, labels = make_set(4)
    assert torch.bincount(labels[judged_clips(labels, heads.shape[1] * 4)]).tolist() == [2, 2, 2, 2]
    assert (make().fit(heads, labels, 4)(heads).argmax(1) == labels).float().mean() > 0.9


def test_the_only_clip_of_a_class_queries_with_noise_where_asked():
    heads, labels = make_set(3)
    heads, labels = torch.cat([heads, heads[:1] + 1]), torch.cat([labels, torch.tensor([4])])
    left_out = LeaveOneOut(heads, labels, 5, HeadMetric.estimate(heads, labels, 5))
    assert_close(left_out.cosines(0.3)[-1, :, 4], torch.ones(6))
    noisy = left_out.cosines(0.3, generator=torch.Generator().manual_seed(0))
    assert noisy[-1, :, 4].mean() < 0.9
    assert torch.equal(noisy[:-1], left_out.cosines(0.3)[:-1])


def test_choosing_takes_the_best_held_out_accuracy_then_likelihood():
    heads, labels = make_set(4, noise=2.0)
    judged = judge_all(heads, labels, 4, Grid())
    best = best_of(judged)
    assert best.accuracy == max(j.accuracy for j in judged)
    assert best.nll == min(j.nll for j in judged if j.accuracy == best.accuracy)
    choices = Calm().fit(heads, labels, 4).choices()
    assert (choices["tau"], choices["scheme"]) == (best.formula.tau, best.formula.scheme)
    assert choices["cv_accuracy"] == pytest.approx(best.accuracy)


@pytest.mark.parametrize("shots", [2, 5])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Calm(**FORMULA),
        lambda: Calm("whitened", shrinkage=0.3, **FORMULA),
        lambda: LearnedWeights(steps=40, lr=0.1, to_start=0.01, to_shared=0.01),
    ],
    ids=["calm", "calm_whitened", "calm_learned"],
)
def test_noise_is_not_said_to_be_worth_more_than_chance(make, shots):
    """Of many heads that hear nothing some fit any clips; nobody who is judged by them may have chosen them."""
    labels = torch.arange(4).repeat_interleave(shots)
    said = [
        make().fit(torch.randn(len(labels), 40, 8, generator=torch.Generator().manual_seed(seed)), labels, 4)
        for seed in range(160 // len(labels))
    ]
    mean = sum(method.choices()["cv_accuracy"] for method in said) / len(said)
    assert mean < 0.25 + 0.1  # three standard errors; around a centre, leaving a clip out makes its class look worse


def test_the_weights_that_judge_a_fold_are_those_that_the_other_clips_make():
    heads, labels = make_set(4, noise=2.0)
    heads, labels = torch.cat([heads, heads[:1] + 1]), torch.cat([labels, torch.tensor([4])])  # alone in its class
    metric = HeadMetric.estimate(heads, labels, 5, 0.8)
    judged = judge_all(heads, labels, 5, Grid(tau=(0.2,), shrinkage=(0.3,)), metric)[-1]
    expected = []
    cosines_NKC = LeaveOneOut(heads, labels, 5, metric).cosines(0.3)
    for fold in range(4):
        rest = torch.arange(17) // 4 != fold
        of_rest = HeadMetric.estimate(heads[rest], labels[rest], 5, 0.8)
        weights_KC = formula_weights(heads[rest], labels[rest], 5, judged.formula, of_rest)
        posteriors_NKC = torch.softmax(cosines_NKC[~rest] / 0.2, -1)
        expected.append(torch.einsum("nkc,kc->nc", posteriors_NKC, weights_KC))
    scores_NC = torch.cat(expected)
    assert torch.equal(judged.labels_N, labels[:16])
    assert_close(judged.scores_NC, scores_NC / scores_NC.sum(1, keepdim=True))


def test_what_the_caller_fixes_is_not_chosen():
    heads, labels = make_set(4)
    given = {"tau": 0.2, "scheme": "prob_softmax", "tau_w": 0.4, "top_k": 4, "alpha": 1.0, "shrinkage": 0.2}
    method = Calm(metric="whitened", **given).fit(heads, labels, 4)
    assert {key: method.choices()[key] for key in given} == given
    assert ((method.weights_KC > 0).sum(0) == 4).all()
    learned = LearnedWeights(tau=0.2, shrinkage=0.2, steps=3, to_start=2.0, to_shared=5.0).fit(heads, labels, 4)
    expected = {"tau": 0.2, "shrinkage": 0.2, "steps": 3, "to_start": 2.0, "to_shared": 5.0}
    assert {key: learned.choices()[key] for key in expected} == expected
    likeliest = LearnedWeights(tau=0.3, shrinkage=0.2, centre=0.5, steps=0).fit(heads, labels, 4).choices()["likeliest"]
    assert (likeliest["tau"], likeliest["shrinkage"], likeliest["centre"]) == (0.3, 0.2, 0.5)


@pytest.mark.parametrize("make", [Calm, lambda: Calm("whitened"), LearnedWeights])
def test_of_single_clips_probabilities_are_the_scores_themselves(make):
    method = make().fit(*make_set(1), 4)
    queries, _ = make_set(3, seed=5)
    weights_KC = method.weights() if isinstance(method, LearnedWeights) else method.weights_KC
    tau = method.tau_K if isinstance(method, LearnedWeights) else method.choices()["tau"]
    scores_NC = method.vote(queries, weights_KC, tau)
    assert_close(method(queries), scores_NC / scores_NC.sum(1, keepdim=True))


def test_a_perfect_support_set_makes_nobody_surer_than_its_clips_tell():
    certain = torch.softmax(40 * torch.eye(4), 1)
    assert best_temperature(certain, torch.arange(4))[0] > 1
    doubtful = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
    assert best_temperature(doubtful, torch.arange(2))[0] < 0.2


def test_calibration_lowers_the_likelihood_loss_and_keeps_the_order():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (200,), generator=generator)
    logits = torch.randn(200, 3, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 3)
    scores = torch.softmax(logits / 5, 1)
    temperature, report = calibrate(scores, labels)
    assert 0.1 < temperature < 0.4
    assert report["before"] == pytest.approx(figures(scores, labels))
    assert report["after"]["nll"] < report["before"]["nll"]
    assert report["after"]["ece"] < report["before"]["ece"]
    assert torch.equal(temper(scores, temperature).argmax(1), scores.argmax(1))
    accuracies = [row["accuracy"] for row in report["unknown_thresholds"]]
    assert accuracies[-1] > accuracies[0]


def test_comparing_gives_a_row_per_draw_and_leaves_out_what_is_done():
    heads, labels = make_set(12, noise=1.5)
    folds = [Fold("a", torch.arange(24), torch.arange(24, 48)), Fold("b", torch.arange(24, 48), torch.arange(24))]

    def draw(pool, shots, seed):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return [int(i) for c in range(4) for i in order[labels[pool[order]] == c][:shots]]

    methods = {"calm": Calm, "calm_whitened": lambda: Calm(metric="whitened")}
    rows = list(compare(heads, labels, 4, folds, [1, 3], range(3), methods, draw))
    assert len({row.key for row in rows}) == len(rows) == 2 * 2 * 3 * 2
    missing = list(compare(heads, labels, 4, folds, [1, 3], range(3), methods, draw, {r.key for r in rows[5:]}))
    assert [row.key for row in missing] == [row.key for row in rows[:5]]
    assert [row.accuracy for row in missing] == [row.accuracy for row in rows[:5]]


def test_paired_differences_take_seeds_as_observations():
    def row(method, seed, fold, accuracy):
        return Row(method, 5, seed, fold, accuracy, 0, 0, 0, 0, 0)

    rows = [row("a", s, f, 0.8 + 0.01 * s) for s in range(4) for f in "xy"]
    rows += [row("b", s, f, 0.7) for s in range(4) for f in "xy"]
    (found,) = paired_differences(rows, "a", "b")
    assert found.mean == pytest.approx(0.115)
    assert found.draws == 8
    assert found.high - found.mean == pytest.approx(3.182 * 0.0129099 / 2, rel=0.01)
    # Student's own table
    for freedom, expected in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (19, 2.0930), (99, 1.9842)):
        assert t_quantile(freedom) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: LearnedWeights(alpha=1.2), "alpha"),
        (lambda: LearnedWeights(temperature="warm"), "temperature"),
        (lambda: Calm(metric="cosine"), "metric"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()
