"""Figures of resampled clips, counted at once, against torchmetrics on each resample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot
from torchmetrics.functional.classification import binary_calibration_error, multiclass_f1_score

from calm_pl.training.metrics import CALIBRATION_BINS, bootstrap_draws, calibration_error_draws, macro_f1_draws


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30), st.integers(2, 6), st.integers(0, 2**31))
def test_draws_are_the_figures_of_the_clips_repeated(clips, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    confidence_N = (torch.rand(clips, generator=generator) * 15).round() / 15  # on the bins' edges, too
    said_N, true_N = (torch.randint(classes, (clips,), generator=generator) for _ in range(2))
    drawn_RN = bootstrap_draws(clips)[:5]
    assert drawn_RN.sum(1).tolist() == [clips] * 5
    ece_R = calibration_error_draws(confidence_N, (said_N == true_N).long(), drawn_RN)
    said_NC, true_NC = one_hot(said_N, classes), one_hot(true_N, classes)
    f1_R = macro_f1_draws(said_NC, true_NC, drawn_RN, absent=torch.nan)
    for drawn_N, ece, f1 in zip(drawn_RN, ece_R.tolist(), f1_R.tolist(), strict=True):
        rows_N = torch.arange(clips).repeat_interleave(drawn_N.long())
        right_N = (said_N == true_N)[rows_N].long()
        assert ece == pytest.approx(
            float(binary_calibration_error(confidence_N[rows_N], right_N, n_bins=CALIBRATION_BINS)), abs=1e-5
        )
        # A macro average of torchmetrics leaves out classes that are neither said nor true.
        expected = multiclass_f1_score(said_N[rows_N], true_N[rows_N], classes, average="macro")
        assert f1 == pytest.approx(float(expected), abs=1e-5)
