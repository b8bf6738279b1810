"""The equal error rate against an exact slow one, and the table by attack."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_pl.training.results import attacks_table
from calm_pl.training.spoofing import (
    attack_table,
    equal_error_rate,
    equal_error_rate_draws,
    is_spoofing,
    spoofing_figures,
)

clips = st.lists(st.tuples(st.integers(0, 15), st.booleans()), min_size=2, max_size=30).filter(
    lambda drawn: len({genuine for _, genuine in drawn}) == 2
)


def slow_equal_error_rate(drawn: list[tuple[int, bool]]) -> Fraction:
    """Where the line between two thresholds' error rates crosses the diagonal, in exact arithmetic."""
    genuine = [score for score, is_genuine in drawn if is_genuine]
    spoofed = [score for score, is_genuine in drawn if not is_genuine]
    points = []
    for threshold in [*sorted({score for score, _ in drawn}, reverse=True), -1]:
        passed = Fraction(sum(score > threshold for score in spoofed), len(spoofed))
        failed = Fraction(sum(score <= threshold for score in genuine), len(genuine))
        points.append((passed, failed))
    for (passed, failed), (next_passed, next_failed) in pairwise(points):
        gap, next_gap = passed - failed, next_passed - next_failed
        if gap <= 0 <= next_gap:
            share = Fraction(0) if gap == next_gap else -gap / (next_gap - gap)
            return passed + share * (next_passed - passed)
    raise AssertionError("both rates run from 0 to 1, so they meet")


@given(clips)
def test_the_equal_error_rate_is_exact_in_both_directions(drawn):
    scores_N = torch.tensor([score / 16 for score, _ in drawn])
    genuine_N = torch.tensor([genuine for _, genuine in drawn])
    exact = float(slow_equal_error_rate(drawn))
    assert equal_error_rate(scores_N, genuine_N) == pytest.approx(exact, abs=1e-9)
    assert equal_error_rate(1 - scores_N, ~genuine_N) == pytest.approx(exact, abs=1e-9)
    other_way = [(15 - score, not genuine) for score, genuine in drawn]
    assert float(slow_equal_error_rate(other_way)) == exact


@given(clips, st.integers(0, 2**31))
def test_a_resample_is_its_clips_repeated(drawn, seed):
    rows_N = torch.randint(len(drawn), (len(drawn),), generator=torch.Generator().manual_seed(seed))
    scores_N = torch.tensor([score / 16 for score, _ in drawn])
    genuine_N = torch.tensor([genuine for _, genuine in drawn])
    counts_RN = torch.bincount(rows_N, minlength=len(drawn))[None]
    found = float(equal_error_rate_draws(scores_N, genuine_N, counts_RN))
    assert found == pytest.approx(equal_error_rate(scores_N[rows_N], genuine_N[rows_N]), abs=1e-9, nan_ok=True)


def test_what_it_says_of_clear_cases():
    genuine_N = torch.tensor([True, True, False, False])
    assert equal_error_rate(torch.tensor([0.9, 0.8, 0.2, 0.1]), genuine_N) == 0
    assert equal_error_rate(torch.tensor([0.1, 0.2, 0.8, 0.9]), genuine_N) == 1
    assert equal_error_rate(torch.full((4,), 0.5), genuine_N) == 0.5
    assert equal_error_rate(torch.tensor([0.9, 0.1, 0.8, 0.05]), genuine_N) == 0.5
    assert math.isnan(equal_error_rate(torch.rand(3), torch.tensor([True] * 3)))


def test_close_scores_are_kept_apart():
    scores_N = torch.tensor([1 - 1e-7, 1 - 2e-7, 1e-30, 1e-38])
    assert equal_error_rate(scores_N, torch.tensor([True, False, True, False])) == 0.5
    assert equal_error_rate(scores_N, torch.tensor([True, False, False, False])) == 0


def test_every_attack_meets_all_genuine_clips():
    files = ["g1", "g2", "a1", "a2", "b1"]
    scores_N = torch.tensor([0.9, 0.6, 0.1, 0.2, 0.95])
    table = attack_table(scores_N, scores_N < 0.5, files, {"a1": "A07", "a2": "A07", "b1": "A08"})
    assert table == {
        "A07": {"clips": 2, "eer": 0.0, "accuracy": 1.0},
        "A08": {"clips": 1, "eer": 1.0, "accuracy": 0.0},
    }
    shown = attacks_table({"attacks": {"calm": table, "sav": table}})
    assert [column.header for column in shown.columns] == ["attack", "clips", "calm", "sav"]
    assert list(shown.columns[2].cells) == ["0.0", "100.0"]


def test_the_interval_is_around_the_rate():
    generator = torch.Generator().manual_seed(0)
    genuine_N = torch.arange(200) % 2 == 0
    scores_N = torch.rand(200, generator=generator) + 0.3 * genuine_N
    found = spoofing_figures(scores_N, genuine_N)
    low, high = found["eer_interval"]
    assert 0 < low < found["eer"] < high < 0.5
    assert spoofing_figures(scores_N, torch.ones(200, dtype=torch.bool)) == {}


def test_which_sets_are_of_spoofing():
    assert is_spoofing(["bonafide", "spoof"]) and not is_spoofing(["bonafide", "spoof", "unknown"])
