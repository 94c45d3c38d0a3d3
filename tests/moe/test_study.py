"""The study: one table for all sizes, resumable, with columns that can be recomputed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from theorylab.errors import ArgumentError, UnknownNameError
from theorylab.moe.model import example
from theorylab.moe.study import rate_study

S1 = example("S1")


def study(replicates, **options):
    return rate_study(S1, 3, [250, 1000], replicates, key=0, law=(-1.0, 1.0), steps=200, chunk=8, **options)


def test_errors_halve_when_the_sample_is_four_times_as_large(tmp_path):
    table = study(8, out=tmp_path)
    assert table.n.tolist() == [250, 1000]
    assert {"loss", "hellinger", "log_likelihood", "steps", "status"} == set(table.columns)
    h = table["hellinger"].mean(axis=1)
    # companion: the mean of H is .0796 and .0384 at these sizes; the error of eight replicates is some 8 %
    np.testing.assert_allclose(h, [0.0796, 0.0384], rtol=0.25)
    assert 1.4 < h[0] / h[1] < 2.9
    assert (table["log_likelihood"][0] > table["log_likelihood"][1]).all()  # sums over 250 and over 1000 rows, all negative
    assert len(np.unique(table["loss"])) == 16
    again = study(8, out=tmp_path)
    np.testing.assert_array_equal(again["loss"], table["loss"])


@pytest.mark.slow
def test_the_density_and_the_parameters_of_exact_fits_have_the_rate_one_half():
    table = rate_study(S1, 3, [1000, 2000, 4000], 24, key=1, law=(-1.0, 1.0), steps=300)
    for name in ("hellinger", "loss"):
        assert -0.65 < np.polyfit(np.log(table.n), np.log(np.median(table[name], axis=1)), 1)[0] < -0.35


@pytest.mark.slow
def test_of_several_starts_the_best_is_kept():
    # With a fourth expert to place, starts attach it to different atoms and end in different maxima.
    options = {"key": 0, "law": (-1.0, 1.0), "active": 3, "steps": 500, "tolerance": 1e-5, "distance": False}
    one, four = (rate_study(S1, 4, [200], 6, starts=starts, **options)["log_likelihood"] for starts in (1, 4))
    assert one.shape == four.shape == (1, 6)
    assert four.mean() > one.mean()


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: rate_study(3, 3, [100], 2, key=0), ArgumentError, "truth must be a Mixture, got int"),
    (lambda: rate_study(S1, 2, [100], 2, key=0), ArgumentError, "experts must be a whole number at least 3"),
    (lambda: rate_study(S1, 3, [5], 2, key=0), ArgumentError, "sizes must be a whole number at least 9"),
    (lambda: rate_study(S1, 3, [], 2, key=0), ArgumentError, "at least one sample size"),
    (lambda: rate_study(S1, 3, [100], 2, key=0, active=4), ArgumentError, "active must be"),
    (lambda: rate_study(S1, 3, [100], 2, key=0, starts=0), ArgumentError, "starts must be"),
    (lambda: rate_study(S1, 3, [100], 2, key=0, law=1.0), ArgumentError, "law must be"),
    (lambda: rate_study(S1, 3, [100], 2, key=0, kind="D1"), UnknownNameError, "kind 'D1'"),
    (lambda: rate_study(S1, 3, [100], 2, key=0, tolerance=0.0), ArgumentError, "tolerance must be"),
    (lambda: rate_study(S1, 3, [100], 0, key=0), ArgumentError, "replicates"),
    (lambda: rate_study(S1, 3, [100], 2, key=0, law=(np.ones((2, 1)), np.ones(2))), ArgumentError, "law must be"),
])
def test_wrong_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
