"""`fit_rate`: the slope and its interval against SciPy, its coverage by simulation, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st

from theorylab.errors import ArgumentError, NonFiniteInputError, ShapeError
from theorylab.lab.rates import fit_rate

SIZES = np.geomspace(1e2, 1e5, 8)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_slope_intercept_and_interval_are_those_of_linregress(rng, level):
    error = SIZES**-0.5 * np.exp(0.1 * rng.standard_normal(8))
    oracle = scipy.stats.linregress(np.log(SIZES), np.log(error))
    half = oracle.stderr * scipy.stats.t.ppf((1 + level) / 2, 6)
    fit = fit_rate(SIZES, error, level=level)
    np.testing.assert_allclose([fit.slope, fit.intercept, *fit.interval],
                               [oracle.slope, oracle.intercept, oracle.slope - half, oracle.slope + half], rtol=1e-10)


@pytest.mark.parametrize(("draw", "replicates"), [("half-normal", 10), ("half-normal", 40), ("lognormal", 40)])
def test_the_interval_covers_the_true_slope_as_often_as_it_says(rng, draw, replicates):
    repetitions = 1500
    noise = rng.standard_normal((repetitions, 8, replicates))
    noise = np.abs(noise) if draw == "half-normal" else np.exp(noise)
    covered = 0
    for sample in noise:
        low, high = fit_rate(SIZES, SIZES[:, None] ** -0.5 * sample).interval
        covered += low <= -0.5 <= high
    # Four standard errors of a binomial proportion, 4 * sqrt(0.95 * 0.05 / 1500).
    assert abs(covered / repetitions - 0.95) < 0.0226


@pytest.mark.parametrize(("error", "power", "without", "limit"), [
    (np.sqrt(np.log(SIZES) / SIZES), 0.5, -0.435, -0.5),
    (np.log(SIZES) / np.sqrt(SIZES), 1.0, -0.370, -0.5),
])
def test_a_logarithm_bends_the_slope_unless_it_is_divided_out(error, power, without, limit):
    assert fit_rate(SIZES, error).slope == pytest.approx(without, abs=1e-3)
    fit = fit_rate(SIZES, error, log_power=power)
    assert fit.slope == pytest.approx(limit, abs=1e-12)
    np.testing.assert_allclose(fit.local_slopes, limit, atol=1e-10)
    np.testing.assert_allclose(fit.predict(SIZES), error, rtol=1e-12)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(slope=st.floats(-3, 3), scale=st.floats(1e-3, 1e3), unit=st.floats(0.01, 100))
def test_units_of_size_and_error_do_not_move_the_slope(slope, scale, unit):
    error = SIZES**slope * np.linspace(1.0, 1.3, 8)
    base, moved = fit_rate(SIZES, error), fit_rate(unit * SIZES, scale * error)
    np.testing.assert_allclose([moved.slope, *moved.interval], [base.slope, *base.interval], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("center", "oracle"), [("mean", np.mean), ("median", np.median), ("geometric", scipy.stats.gmean)])
def test_replicates_are_joined_by_the_named_center(rng, center, oracle):
    table = SIZES[:, None] ** -1.0 * rng.exponential(size=(8, 9))
    fit = fit_rate(SIZES, table, center=center)
    np.testing.assert_allclose(fit.error, oracle(table, axis=1), rtol=1e-12)
    assert fit.slope == pytest.approx(fit_rate(SIZES, oracle(table, axis=1)).slope, rel=1e-12)
    assert fit.replicates == 9


def test_the_order_of_the_sizes_does_not_matter(rng):
    error, order = SIZES**-0.5 * rng.uniform(1, 2, 8), rng.permutation(8)
    base, mixed = fit_rate(SIZES, error), fit_rate(SIZES[order], error[order])
    assert (mixed.slope, mixed.interval) == (base.slope, base.interval)
    np.testing.assert_array_equal(mixed.local_slopes, base.local_slopes)


def test_within_fits_the_inner_sizes_alone_and_forgives_the_others():
    n = np.array([1e-9, 1e-6, 1e-4, 1e-2, 1.0])
    error = np.array([0.0, 1e-12, 1e-8, 1e-4, np.nan])  # round-off at one end, divergence at the other
    fit = fit_rate(n, error, within=(1e-6, 1e-2))
    assert fit.slope == pytest.approx(2.0) and fit.n.tolist() == [1e-6, 1e-4, 1e-2]


def test_two_sizes_give_a_slope_and_no_interval():
    fit = fit_rate([1, 10], [1.0, 0.1])
    assert fit.slope == pytest.approx(-1.0) and fit.interval == (-np.inf, np.inf)
    assert "two sizes give no interval" in repr(fit)


def test_equal_sizes_share_one_local_slope():
    fit = fit_rate([1, 10, 10, 100], [1.0, 0.1, 0.4, 0.01])
    np.testing.assert_allclose(fit.local_slopes, [np.log10(0.2), np.log10(0.01 / 0.2)])
    assert fit.slope == pytest.approx(scipy.stats.linregress([0, 1, 1, 2], np.log10([1.0, 0.1, 0.4, 0.01])).slope)
    assert "<td>" in fit._repr_html_()


def test_it_reads_well_and_is_drawn_on_logarithmic_axes():
    fit = fit_rate([10, 100, 1000], [[1.0, 1.2], [0.3, 0.4], [0.1, 0.1]])
    for text in (repr(fit), fit._repr_html_()):
        assert "slope -0.5" in text and "95% interval" in text
    ax = fit.plot()
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), fit.error)
    np.testing.assert_allclose(np.log(ax.lines[1].get_ydata()[-1] / ax.lines[1].get_ydata()[0]) / np.log(100), fit.slope)
    assert fit.plot(ax=ax) is ax
    assert fit.to_dict()["n"] == [10.0, 100.0, 1000.0]


@pytest.mark.parametrize(("n", "error", "options", "kind", "words"), [
    ([1, 2, 3], [1, 2], {}, ShapeError, r"error must have shape \(3,\) or \(3, replicates\) to match n, got \(2,\)"),
    ([[1, 2]], [1, 2], {}, ShapeError, r"n must have shape \(sizes,\), got \(1, 2\)"),
    ([1, 2], np.ones((2, 3, 4)), {}, ShapeError, r"got \(2, 3, 4\)"),
    ([1, 2], np.ones((2, 0)), {}, ShapeError, r"got \(2, 0\)"),
    ([1, 2], [[1, 2], [3]], {}, ShapeError, "equal replicates per size"),
    ([1], [1], {}, ShapeError, "at least two distinct sizes to fit a slope, got 1"),
    ([5, 5], [1, 2], {}, ShapeError, "got 1"),
    ([], [], {}, ShapeError, "got 0"),
    ([1, 2, 3], [1, 2, 3], {"within": (2.5, 9)}, ShapeError, r"got 1 within \(2.5, 9\)"),
    ([1, 2, 3], [1, np.nan, 3], {}, NonFiniteInputError, r"error must be finite, got nan at size number 1 of n = 2 \(1 of 3"),
    ([1, np.inf], [1, 2], {}, NonFiniteInputError, "n must be finite"),
    ([0, 2], [1, 2], {}, ArgumentError, "n must be positive"),
    ([1, 2], [1, 0], {}, ArgumentError, "error must be positive .* at n = 2 it is 0"),
    ([1, 2], [[1, 1], [1, -3]], {}, ArgumentError, "at n = 2 its mean is -1"),
    ([1, 2], [[1, 1], [1, -3]], {"center": "geometric"}, ArgumentError, "got -3 at n = 2"),
    ([1, 2], [1, 2], {"log_power": 0.5}, ArgumentError, "n must be above 1 where log_power is not 0"),
    ([1, 2], [1, 2], {"level": 95}, ArgumentError, "level must be between 0 and 1, got 95"),
    ([1, 2], [1, 2], {"within": (2, 1)}, ArgumentError, "within must be a pair"),
    ([1, 2], [1, 2], {"center": "mode"}, ArgumentError, "center must be one of 'mean', 'median', 'geometric', got 'mode'"),
    ("abc", [1, 2], {}, ShapeError, "n must be an array of real numbers"),
])
def test_bad_input_is_named(n, error, options, kind, words):
    with pytest.raises(kind, match=words):
        fit_rate(n, error, **options)
