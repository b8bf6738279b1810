"""Figures of resampled clips, counted at once, against torchmetrics on each resample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot
from torchmetrics.functional.classification import binary_calibration_error, multiclass_f1_score

from calm_pl.methods import calibration
from calm_pl.methods.calibration import CALIBRATION_BINS, MIN_PROBABILITY
from calm_pl.training import metrics
from calm_pl.training.metrics import (
    BOOTSTRAP_RESAMPLES,
    ClipScores,
    bootstrap_draws,
    bootstrap_intervals,
    calibration_error_draws,
    figures,
    macro_f1_draws,
)
from calm_pl.training.multilabel import multi_label_figures


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30), st.integers(2, 6), st.integers(0, 2**31))
def test_draws_are_the_figures_of_the_clips_repeated(clips, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    confidence_N = (torch.rand(clips, generator=generator) * 15).round() / 15  # on the bins' edges, too
    said_N, true_N = (torch.randint(classes, (clips,), generator=generator) for _ in range(2))
    drawn_RN = next(bootstrap_draws(clips))[:5]
    assert drawn_RN.sum(1).tolist() == [clips] * 5
    ece_R = calibration_error_draws(confidence_N, (said_N == true_N).long(), drawn_RN)
    said_NC, true_NC = one_hot(said_N, classes), one_hot(true_N, classes)
    f1_R = macro_f1_draws(said_NC, true_NC, drawn_RN)
    for drawn_N, ece, f1 in zip(drawn_RN, ece_R.tolist(), f1_R.tolist(), strict=True):
        rows_N = torch.arange(clips).repeat_interleave(drawn_N.long())
        right_N = (said_N == true_N)[rows_N].long()
        assert ece == pytest.approx(
            float(binary_calibration_error(confidence_N[rows_N], right_N, n_bins=CALIBRATION_BINS)), abs=1e-5
        )
        # A macro average of torchmetrics leaves out classes that are neither said nor true.
        expected = multiclass_f1_score(said_N[rows_N], true_N[rows_N], classes, average="macro")
        assert f1 == pytest.approx(float(expected), abs=1e-5)


@settings(deadline=None, max_examples=15)  # 500 resamples each
@given(st.integers(1, 30), st.integers(2, 5), st.integers(0, 2**31))
def test_figures_are_those_of_the_definitions(clips, classes, seed):
    """Some clips have no answer: wrong, of no class, and with no confidence."""
    generator = torch.Generator().manual_seed(seed)
    probabilities_NC = torch.randn(clips, classes, generator=generator).softmax(1)
    probabilities_NC[torch.rand(clips, generator=generator) < 0.2] = 0
    labels_N = torch.randint(classes, (clips,), generator=generator)
    said = [int(row.argmax()) if row.any() else None for row in probabilities_NC]
    true = labels_N.tolist()
    truth_NC = torch.eye(classes)[labels_N]
    f1s = []
    for c in {*said, *true} - {None}:
        both = sum(s == t == c for s, t in zip(said, true, strict=True))
        f1s.append(2 * both / (said.count(c) + true.count(c)))
    bins = [[] for _ in range(CALIBRATION_BINS)]
    for row, s, t in zip(probabilities_NC, said, true, strict=True):
        bins[min(CALIBRATION_BINS - 1, int(row.max() * CALIBRATION_BINS))].append(float(row.max()) - (s == t))
    expected = {
        "accuracy": sum(s == t for s, t in zip(said, true, strict=True)) / clips,
        "macro_f1": sum(f1s) / len(f1s),
        "nll": float(-(probabilities_NC * truth_NC).sum(1).clamp_min(MIN_PROBABILITY).log().mean()),
        "brier": float((probabilities_NC - truth_NC).square().sum(1).mean()),
        "ece": sum(abs(sum(gaps)) for gaps in bins) / clips,
    }
    found = figures(probabilities_NC, labels_N)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    answered_N = probabilities_NC.any(1)
    if answered_N.any():  # and those that choosing on a support set goes by
        found = figures(probabilities_NC[answered_N], labels_N[answered_N])
        of_support = calibration.figures(probabilities_NC[answered_N], labels_N[answered_N])
        assert of_support == pytest.approx({name: found[name] for name in of_support}, abs=1e-5)


def test_the_intervals_of_many_clips_are_as_wide_as_the_normal_distribution_has_them():
    generator = torch.Generator().manual_seed(0)
    probabilities_NC = torch.randn(400, 3, generator=generator).softmax(1)
    labels_N = torch.multinomial(probabilities_NC, 1, generator=generator)[:, 0]
    truth_NC = torch.eye(3)[labels_N]
    several = multi_label_figures(probabilities_NC, truth_NC)
    for found in (figures(probabilities_NC, labels_N), several):
        for name, values_N in {
            "accuracy": (probabilities_NC.argmax(1) == labels_N).float(),
            "nll": -(probabilities_NC * truth_NC).sum(1).log(),
            "brier": (probabilities_NC - truth_NC).square().sum(1),
        }.items():
            low, high = found[f"{name}_interval"]
            assert (low + high) / 2 == pytest.approx(found[name], rel=0.02)
            assert (high - low) / 2 == pytest.approx(1.96 * float(values_N.std()) / 20, rel=0.1)
        for name in ("macro_f1", "ece"):
            low, high = found[f"{name}_interval"]
            assert low < found[name] < high
    for name in ("exact_match", "sample_f1", "map"):
        low, high = several[f"{name}_interval"]
        assert low < several[name] < high


def test_intervals_do_not_depend_on_how_many_resamples_are_drawn_at_once(monkeypatch):
    values_N = torch.randn(40, generator=torch.Generator().manual_seed(0))
    mean = {"mean": lambda drawn_RN: drawn_RN @ values_N / 40}
    at_once = bootstrap_intervals(40, mean)
    monkeypatch.setattr(metrics, "MAX_DRAWN", 40 * 7 + 1)
    assert {len(drawn_RN) for drawn_RN in bootstrap_draws(40)} == {7, BOOTSTRAP_RESAMPLES % 7}
    assert bootstrap_intervals(40, mean)["mean_interval"] == pytest.approx(at_once["mean_interval"], abs=1e-6)
    low, high = at_once["mean_interval"]
    half = 1.96 * float(values_N.std()) / 40**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.15) and low < float(values_N.mean()) < high


@pytest.mark.parametrize("seed", range(10))
def test_the_interval_of_the_calibration_error_holds_it(seed):
    """Resampling makes a sum of absolute values larger: of twenty well calibrated clips, far larger."""
    generator = torch.Generator().manual_seed(seed)
    confidence_N = 0.5 + torch.rand(20, generator=generator) / 2
    labels_N = (torch.rand(20, generator=generator) > confidence_N).long()
    found = figures(torch.stack([confidence_N, 1 - confidence_N], 1), labels_N)
    low, high = found["ece_interval"]
    assert 0 <= low <= found["ece"] <= high


def test_a_class_that_no_clip_has_or_is_said_to_have_is_no_part_of_the_macro_f1():
    truth_NC, sure_NC = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]])
    found = multi_label_figures(sure_NC, truth_NC)
    assert found["macro_f1"] == 1 and found["macro_f1_interval"] == [1, 1]


def test_rows_of_0_and_1_become_the_one_class_that_each_clip_has():
    probabilities_NC, rows_NC = torch.rand(3, 3).softmax(1), torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]])
    scores = ClipScores()
    for n in (2, 0, 1):
        scores.update(torch.tensor([n]), probabilities_NC[n : n + 1], rows_NC[n : n + 1])
    scores.one_label_each()
    assert scores.of_all_ranks()[2].tolist() == [2, -1, 0]
    assert scores.compute() == figures(probabilities_NC[[0, 2]], torch.tensor([2, 0]))


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.eye(3)[:2]], ids=["one", "several"])
def test_a_probability_that_rounds_to_more_than_1_is_1(labels):
    scores = {}
    for certain in (1.0, 1.0 + 2**-23):
        clip_scores = ClipScores()
        clip_scores.update(torch.arange(2), torch.tensor([[certain, 0, 0], [0.2, 0.7, 0.1]]), labels)
        scores[certain] = clip_scores.compute()
    assert scores[1.0 + 2**-23] == scores[1.0]
    assert scores[1.0]["ece"] == pytest.approx(0.15)
