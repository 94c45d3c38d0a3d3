"""The mixture of experts as a scikit-learn regressor."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from theorylab import moe
from theorylab.interop.sklearn import TopKMoERegressor

X, Y = (np.asarray(part) for part in moe.example("S2").sample(200, key=0))


@pytest.mark.slow
@parametrize_with_checks([TopKMoERegressor(1, n_init=1, max_iter=5)], expected_failed_checks=lambda _: {
    "check_sample_weight_equivalence_on_dense_data": "an expert of d inputs needs d + 2 rows of positive weight; the check leaves fewer"})
def test_the_checks_of_scikit_learn_pass(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def test_one_expert_is_least_squares():
    model, exact = TopKMoERegressor(1, n_init=1).fit(X, Y), LinearRegression().fit(X, Y)
    np.testing.assert_allclose(model.predict(X), exact.predict(X), atol=1e-9)
    residual = Y - exact.predict(X)
    np.testing.assert_allclose(model.predict_dist(X).std, residual.std(), rtol=1e-6)
    assert model.bic(X, Y) - model.aic(X, Y) == pytest.approx(3 * (np.log(200) - 2))


@pytest.mark.slow
def test_two_experts_give_a_distribution_that_can_be_stored():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = TopKMoERegressor(2, n_init=2, max_iter=30, random_state=0).fit(X, Y)
    dist = model.predict_dist(X)
    low, high = dist.quantile([0.05, 0.95]).T
    assert 0.8 < np.mean((low < Y) & (high > Y)) < 0.97
    np.testing.assert_allclose(dist.cdf(low), 0.05, atol=1e-9)
    np.testing.assert_allclose(model.score_samples(X, Y).sum(), model.log_likelihood_, rtol=1e-9)
    np.testing.assert_allclose(model.gate_proba(X).sum(axis=1), 1.0)
    assert model.log_likelihood_ > TopKMoERegressor(1, n_init=1).fit(X, Y).log_likelihood_
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(X), model.predict(X))
    np.testing.assert_array_equal(model.sample(X, 3), model.sample(X, 3))


def test_weights_count_rows():
    weight = np.repeat([1.0, 0.0], 100)
    halves = TopKMoERegressor(1, n_init=1).fit(X, Y, sample_weight=weight), TopKMoERegressor(1, n_init=1).fit(X[:100], Y[:100])
    np.testing.assert_allclose(*(half.predict(X) for half in halves), atol=1e-9)


def test_it_stands_in_a_pipeline_and_can_be_cloned():
    model = make_pipeline(StandardScaler(), clone(TopKMoERegressor(1, n_init=1)))
    np.testing.assert_allclose(model.fit(X, Y).predict(X), LinearRegression().fit(X, Y).predict(X), atol=1e-9)


@pytest.mark.parametrize(("changes", "words"), [
    ({"n_experts": 0}, "experts must be"),
    ({"top_k": 3}, "active must be"),
    ({"selection": "size"}, "selection must be one of"),
    ({"n_experts": 100}, "x must have at least experts"),
])
def test_wrong_parameters_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        TopKMoERegressor(**({"n_experts": 2} | changes)).fit(X, Y)
