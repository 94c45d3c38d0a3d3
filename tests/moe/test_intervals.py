"""Intervals: golden standard errors, the linear model in closed form, the delta method, what is not identified."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from tests.moe.cases import A5_ERRORS, A5_FIT, s1_likelihood
from theorylab.errors import ArgumentError, RunWarning, ShapeError, UnknownNameError
from theorylab.moe.intervals import confidence_intervals
from theorylab.moe.model import Mixture, example, weyl_sample
from theorylab.moe.problem import Likelihood

S1 = example("S1")


@pytest.fixture(scope="module")
def fitted():
    return s1_likelihood(), S1.unpack(jnp.asarray(A5_FIT))


def flat(parameters):
    return np.concatenate([parameters.gate_intercept[:-1], parameters.gate_coef[:-1].ravel(), parameters.expert_coef.ravel(),
                           parameters.expert_intercept, parameters.variance])


def linear_model(n=60):
    """One expert: least squares, with everything known."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=n), rng.normal(size=n)
    design = np.column_stack([np.ones(n), x])
    coefficients, (rss,) = np.linalg.lstsq(design, y, rcond=None)[:2]
    fit = Mixture([0.0], [[0.0]], [[coefficients[1]]], [coefficients[0]], [rss / n], 1)
    return Likelihood(x, y, 1, 1), fit, design, rss


def test_golden_standard_errors(fitted):
    found = confidence_intervals(*fitted)
    assert (np.abs(flat(found.standard_error) - A5_ERRORS) < [5.1e-5] * 4 + [5.1e-6] * 9).all()  # as many digits as are given
    np.testing.assert_allclose(flat(found.upper) - A5_FIT, 1.959964 * flat(found.standard_error), rtol=1e-4)
    np.testing.assert_allclose(flat(found.lower) + flat(found.upper), 2 * A5_FIT, atol=1e-5)
    assert found.standard_error.gate_intercept[-1] == 0
    assert "gate_coef[1, 0]" in repr(found)
    assert "gate_coef[2, 0]" not in repr(found)
    assert "<table>" in found._repr_html_()


def test_the_delta_method_of_a_parameter_is_its_interval_and_of_a_mean_its_gradient(fitted):
    found = confidence_intervals(*fitted, level=0.9)
    own = found.of(lambda m: m.expert_intercept)
    np.testing.assert_allclose(own.standard_error, found.standard_error.expert_intercept)
    np.testing.assert_allclose(own.upper, found.upper.expert_intercept)
    x, point, step = jnp.array([[0.3]]), np.asarray(found.fit.pack()), 1e-5
    mean = lambda v: float(found.fit.unpack(jnp.asarray(v)).mean(x)[0])
    slope = np.array([(mean(point + step * e) - mean(point - step * e)) / (2 * step) for e in np.eye(13)])
    assert found.of(lambda m: m.mean(x)[0]).standard_error == pytest.approx(np.sqrt(slope @ found.covariance @ slope), rel=1e-6)


def test_in_the_linear_model_wald_and_profile_are_known():
    likelihood, fit, design, rss = linear_model()
    n, q = len(design), scipy.stats.chi2.ppf(0.95, 1)
    wald, profile = (confidence_intervals(likelihood, fit, kind) for kind in ("wald", "profile"))
    error = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * rss / n)
    np.testing.assert_allclose([wald.standard_error.expert_intercept[0], wald.standard_error.expert_coef[0, 0]], error, rtol=1e-8)
    assert wald.standard_error.variance[0] == pytest.approx(rss / n * np.sqrt(2 / n))
    # profile of a coefficient: n log(1 + (t / error)^2 / n) = q; of the variance: n (log(v / s) + s / v - 1) = q
    reach = np.sqrt(n * np.expm1(q / n)) * error
    assert profile.upper.expert_intercept[0] - float(fit.expert_intercept[0]) == pytest.approx(reach[0], rel=1e-6)
    assert float(fit.expert_coef[0, 0]) - profile.lower.expert_coef[0, 0] == pytest.approx(reach[1], rel=1e-6)
    excess = lambda ratio: n * (np.log(ratio) + 1 / ratio - 1) - q
    ends = [scipy.optimize.brentq(excess, *bracket) for bracket in ((0.3, 1), (1, 4))]
    np.testing.assert_allclose([profile.lower.variance[0], profile.upper.variance[0]], np.array(ends) * rss / n, rtol=1e-6)


def test_the_bootstrap_of_the_linear_model_has_its_standard_errors():
    likelihood, fit, design, rss = linear_model()
    found = confidence_intervals(likelihood, fit, "bootstrap", replicates=400, steps=3, level=0.9, key=1)
    error = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * rss / len(design))
    assert found.standard_error.expert_intercept[0] == pytest.approx(error[0], rel=0.15)
    assert found.upper.expert_coef[0, 0] - found.lower.expert_coef[0, 0] == pytest.approx(2 * 1.645 * error[1], rel=0.2)
    again = confidence_intervals(likelihood, fit, "bootstrap", replicates=400, steps=3, level=0.9, key=1)
    assert flat(again.lower).tolist() == flat(found.lower).tolist()


@pytest.mark.slow
def test_profile_and_bootstrap_are_close_to_wald_in_a_regular_fit(fitted):
    wald, profile, bootstrap = (confidence_intervals(*fitted, kind, replicates=200) for kind in ("wald", "profile", "bootstrap"))
    for other in (profile, bootstrap):
        np.testing.assert_allclose((flat(other.upper) - flat(other.lower)) / flat(wald.standard_error), 2 * 1.96, rtol=0.3)


def test_with_one_active_expert_the_gate_has_no_interval():
    truth = example("S0")
    x, y = weyl_sample(truth, 200)
    parts = [(np.column_stack([np.ones(200), x])[side], np.asarray(y)[side]) for side in (np.asarray(x)[:, 0] > 0.32, np.asarray(x)[:, 0] < 0.32)]
    lines = [np.linalg.lstsq(*part, rcond=None)[0] for part in parts]
    variance = [np.mean((part[1] - part[0] @ line) ** 2) for part, line in zip(parts, lines, strict=True)]
    fit = Mixture.from_matrices(truth.gate_matrix, np.array(lines), np.array(variance), 1, "logit")
    found = confidence_intervals(Likelihood(x, y, experts=2, active=1, selection="logit"), fit)
    assert np.isnan(found.standard_error.gate_coef[0]).all()
    error = [np.sqrt(v * np.linalg.inv(part[0].T @ part[0])[1, 1]) for part, v in zip(parts, variance, strict=True)]
    np.testing.assert_allclose(found.standard_error.expert_coef[:, 0], error, rtol=1e-8)
    assert np.isfinite(found.of(lambda m: m.expert_coef).standard_error).all()
    assert np.isnan(found.of(lambda m: m.gate_coef[0]).standard_error).all()


def test_a_fit_that_is_no_maximum_is_told():
    with pytest.warns(RunWarning, match="not a maximizer"):
        confidence_intervals(s1_likelihood(), S1)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: confidence_intervals(S1, S1), ArgumentError, "likelihood must be a Likelihood"),
    (lambda: confidence_intervals(s1_likelihood(), example("S2")), ShapeError, "fit must have 3 experts"),
    (lambda: confidence_intervals(s1_likelihood(), S1, "exact"), UnknownNameError, "kind 'exact'"),
    (lambda: confidence_intervals(s1_likelihood(), S1, level=1.0), ArgumentError, "level must be"),
    (lambda: confidence_intervals(s1_likelihood(), S1, "bootstrap", replicates=1), ArgumentError, "replicates must be"),
])
def test_wrong_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
