"""The scikit-learn face: the checks of scikit-learn, known solutions, data in chunks, pipelines and searches."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import scipy.linalg

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from theorylab.interop.sklearn import GeneralizedEigen, LandingICA, StochasticCCA

RNG = np.random.default_rng(0)
COMMON = RNG.normal(size=(300, 2))
LEFT = np.hstack([COMMON + 0.3 * RNG.normal(size=(300, 2)), RNG.normal(size=(300, 2))]) @ RNG.normal(size=(4, 4)) + 5
RIGHT = np.hstack([COMMON[:, ::-1] + 0.3 * RNG.normal(size=(300, 2)), RNG.normal(size=(300, 1))]) @ RNG.normal(size=(3, 3)) - 3


@pytest.mark.slow
@parametrize_with_checks([StochasticCCA(), GeneralizedEigen(max_iter=100), LandingICA(max_iter=30)])
def test_the_checks_of_scikit_learn_pass(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        check(estimator)


def canonical(x, y, p):
    """Canonical correlations by whitening."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    roots = [np.linalg.inv(scipy.linalg.sqrtm(m.T @ m)) for m in (x, y)]
    return np.linalg.svd(roots[0] @ x.T @ y @ roots[1], compute_uv=False)[:p]


def test_correlations_are_those_of_whitening():
    exact = canonical(LEFT, RIGHT, 2)
    model = StochasticCCA(2, ridge=1e-6, random_state=0).fit(LEFT, RIGHT)
    assert np.abs(model.correlations_ - exact).max() < 5e-3
    assert abs(model.score(LEFT, RIGHT) - model.correlations_.sum()) < 1e-12
    scores, _ = model.transform(LEFT, RIGHT)
    assert np.abs(scores.T @ scores / 300 - np.eye(2)).max() < 1e-4                      # feasible up to the ridge
    assert np.array_equal(clone(model).fit(LEFT, RIGHT).x_rotations_, model.x_rotations_)


@pytest.mark.slow
def test_chunks_of_data_give_nearly_the_same_correlations_and_can_be_stored():
    exact = canonical(LEFT, RIGHT, 2)
    chunks = StochasticCCA(2, ridge=1e-6, random_state=0)
    for _ in range(15):
        for k in range(0, 300, 100):
            chunks.partial_fit(LEFT[k:k + 100], RIGHT[k:k + 100])
    assert np.abs(chunks.x_mean_ - LEFT.mean(axis=0)).max() < 1e-12
    assert chunks.n_iter_ == 45
    assert canonical(chunks.transform(LEFT), (RIGHT - chunks.y_mean_) @ chunks.y_rotations_, 2).sum() > 0.95 * exact.sum()
    again = pickle.loads(pickle.dumps(chunks))
    assert np.array_equal(again.partial_fit(LEFT[:100], RIGHT[:100]).x_rotations_, chunks.partial_fit(LEFT[:100], RIGHT[:100]).x_rotations_)


@pytest.mark.slow
def test_directions_of_signal_against_noise_are_generalized_eigenvectors():
    noise = RNG.normal(size=(500, 4)) @ np.diag([3.0, 1.0, 1.0, 0.5])
    values, vectors = scipy.linalg.eigh(np.cov(LEFT.T, bias=True), np.cov(noise.T, bias=True))
    model = GeneralizedEigen(2).fit(LEFT, background=noise)
    assert np.abs(model.eigenvalues_ - values[::-1][:2]).max() < 1e-10 * values[-1]
    assert np.abs(np.abs(model.components_ @ np.cov(noise.T, bias=True) @ vectors[:, ::-1][:, :2]) - np.eye(2)).max() < 1e-8
    chunks = GeneralizedEigen(2, random_state=0)
    for _ in range(20):
        for k in range(0, 300, 100):
            chunks.partial_fit(LEFT[k:k + 100], background=noise[k:k + 100])
    assert chunks.eigenvalues_.sum() > 0.8 * values[-2:].sum()
    assert np.abs(GeneralizedEigen(1, metric=np.diag([1.0, 1, 1, 4])).partial_fit(LEFT).components_).max() > 0


@pytest.mark.slow
def test_components_are_unmixed_and_fit_in_pipelines_and_searches():
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sources = RNG.laplace(size=(3000, 3))
    rows = sources @ RNG.normal(size=(3, 3)) + 1
    model = make_pipeline(StandardScaler(), LandingICA(random_state=0)).fit(rows)
    overlap = np.abs(np.corrcoef(model.transform(rows).T, sources.T)[:3, 3:])
    assert np.sort(overlap.max(axis=1)).min() > 0.98
    plain = LandingICA(random_state=0).fit(rows)
    assert np.abs(plain.inverse_transform(plain.transform(rows)) - rows).max() < 1e-10
    assert list(plain.get_feature_names_out()) == ["landingica0", "landingica1", "landingica2"]
    chunks = LandingICA(random_state=0)
    for _ in range(10):
        for k in range(0, 3000, 500):
            chunks.partial_fit(rows[k:k + 500])
    assert np.sort(np.abs(np.corrcoef(chunks.transform(rows).T, sources.T)[:3, 3:]).max(axis=1)).min() > 0.9
    search = GridSearchCV(StochasticCCA(1, epochs=1, random_state=0), {"ridge": [1e-3, 1e3]}, cv=2).fit(LEFT, RIGHT)
    assert search.best_params_["ridge"] == 1e-3 or search.best_score_ > 0.5


@pytest.mark.parametrize(("call", "words"), [
    (lambda: StochasticCCA(4).fit(LEFT, RIGHT), "n_components must be a whole number between 1 and 3"),
    (lambda: StochasticCCA(0).fit(LEFT, RIGHT), "n_components must be"),
    (lambda: StochasticCCA(ridge=-1.0).fit(LEFT, RIGHT), "ridge must be a number at least 0"),
    (lambda: StochasticCCA(step_size=0.0).fit(LEFT, RIGHT), "step_size must be above 0"),
    (lambda: GeneralizedEigen(2, metric=np.eye(3)).fit(LEFT), r"metric must have shape \(4, 4\) to match X, got \(3, 3\)"),
    (lambda: GeneralizedEigen(2, metric=np.eye(4)).fit(LEFT, background=LEFT), "must not both be given"),
    (lambda: GeneralizedEigen(2).fit(LEFT, background=RIGHT), "background must have 4 columns as X, got 3"),
    (lambda: LandingICA().fit(np.ones((10, 3))), "X must not be constant"),
    (lambda: LandingICA(3).fit(np.hstack([LEFT[:, :2], LEFT[:, :1]])), "between 1 and 2, the rank of X"),
    (lambda: LandingICA(contrast="cube").fit(LEFT), "contrast 'cube' is not known"),
])
def test_bad_input_is_refused(call, words):
    with pytest.raises((ValueError, LookupError), match=words):
        call()
