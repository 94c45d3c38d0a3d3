"""Flows of Gaussians: published digits, terms against SciPy, both forms, blow-up in depth."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, MatrixError, ShapeError

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
V = np.array([[0.6, -0.3], [0.2, 0.5]])
W, b, D = np.array([[-0.4, 0.1], [0.3, -0.6]]), np.array([0.2, -0.1]), np.array([[0.3, 0.1], [0.1, 0.2]])
HEAD = tp.Softmax(Q, K, V)
START = tp.Gaussian(np.array([0.3, -0.2]), np.array([[0.8, 0.25], [0.25, 0.5]]))
KINDS = {"softmax": tp.Softmax, "l2": tp.L2}
TIMES = np.array([0.0, 1.0])
# 14 digits at t = 1, computed with 34-digit arithmetic
DIGITS = {"softmax": ([0.65590877899274, -0.26198092341618], [0.93065697142737, 0.28488032191863, 0.56487265543648]),
          "l2": ([0.60313796359764, -0.2596793814137], [1.0492477761264, 0.32306254536541, 0.59957427895568])}


@pytest.mark.parametrize("form", ["factor", "covariance"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_flow_has_the_published_digits(kind, form):
    sol = tl.integrate(tp.GaussianFlow(KINDS[kind](Q, K, V), form=form), START, TIMES, rtol=1e-13, atol=1e-15)
    mean, (a, c, d) = DIGITS[kind]
    np.testing.assert_allclose(sol.value.mean[-1], mean, rtol=1e-12)
    np.testing.assert_allclose(sol.value.cov[-1], [[a, c], [c, d]], rtol=1e-12)
    assert isinstance(sol.value, tp.Gaussian) and sol.value.cov.shape == (2, 2, 2) and sol.status == tl.Status.COMPLETED
    np.testing.assert_allclose(sol.history["eigenvalues"][-1], np.linalg.eigvalsh([[a, c], [c, d]]), rtol=1e-12)
    assert sol.history["rank"].tolist() == [2, 2] and sol.history["trace"][-1] == pytest.approx(a + d)


def by_scipy(normalize: bool, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def field(t, y):
        m, S = y[:2], y[2:].reshape(2, 2)
        B = V @ S @ K.T @ Q + W
        velocity, change = V @ (m + S @ K.T @ Q @ m) + W @ m + b, B @ S + S @ B.T + 2 * noise
        shrink = (velocity @ m + np.trace(change) / 2) / (m @ m + np.trace(S)) if normalize else 0
        return np.concatenate([velocity - shrink * m, (change - 2 * shrink * S).ravel()])

    y0 = np.concatenate([np.asarray(START.mean), np.asarray(START.cov).ravel()])
    y = scipy.integrate.solve_ivp(field, (0, 1), y0, rtol=1e-12, atol=1e-13, method="DOP853").y[:, -1]
    return y[:2], y[2:].reshape(2, 2)


@pytest.mark.parametrize("form, normalize", [("factor", False), ("covariance", True)])
def test_feed_forward_noise_and_normalization_are_the_terms_they_claim(form, normalize):
    noise = D if form == "covariance" else None
    flow = tp.GaussianFlow(HEAD, feed_forward=(W, b), noise=noise, normalize=normalize, form=form)
    end = tp.last(tl.integrate(flow, START, TIMES, rtol=1e-10, atol=1e-12).value)
    mean, cov = by_scipy(normalize, np.zeros((2, 2)) if noise is None else noise)
    np.testing.assert_allclose(end.mean, mean, atol=1e-9)
    np.testing.assert_allclose(end.cov, cov, atol=1e-9)
    if normalize:
        size = lambda m, S: m @ m + np.trace(S)
        assert float(size(end.mean, end.cov)) == pytest.approx(float(size(START.mean, START.cov)), rel=1e-9)


def test_the_rank_never_grows():
    thin = tp.Gaussian.from_factor(np.zeros(2), np.array([[1.0, 2.0], [0.5, 1.0]]))
    sol = tl.integrate(tp.GaussianFlow(HEAD), thin, TIMES)
    assert sol.history["rank"].tolist() == [1, 1] and sol.history["eigenvalues"][:, 0].max() < 1e-30


def test_a_blow_up_in_depth_is_a_status_with_its_time():
    flow = tp.GaussianFlow(HEAD)
    large = tp.Gaussian(np.zeros(2), 20 * np.asarray(START.cov))
    sol = tl.integrate(flow, large, [0.0, 50.0])
    assert sol.status == tl.Status.BLOWUP
    assert sol.stats.counters["last_time"] == pytest.approx(float(tp.blow_up_time(flow, large)), rel=1e-7)


def test_what_is_added_may_be_given_in_several_ways():
    assert tp.GaussianFlow(HEAD, noise=0.1).form == "covariance" and tp.GaussianFlow(HEAD).form == "factor"
    for layer in (W, (W, None), tp.FeedForward(W)):
        found = tp.GaussianFlow(HEAD, feed_forward=layer).feed_forward
        np.testing.assert_array_equal(found[0], W)
        np.testing.assert_array_equal(found[1], np.zeros(2))


BATCH = tp.Gaussian(np.zeros((3, 2)), np.stack([np.eye(2)] * 3))
BAD = {
    "attention": (lambda: tp.GaussianFlow(V), ArgumentError, "attention must be a Softmax, .* got ndarray"),
    "form": (lambda: tp.GaussianFlow(HEAD, form="cholesky"), ArgumentError, "form must be one of 'factor', 'covariance', got 'cholesky'"),
    "noise form": (lambda: tp.GaussianFlow(HEAD, noise=0.1, form="factor"), ArgumentError, "use form='covariance'"),
    "noise sign": (lambda: tp.GaussianFlow(HEAD, noise=-0.1), MatrixError, "noise must be positive semidefinite, got the eigenvalue -0.1"),
    "noise symmetry": (lambda: tp.GaussianFlow(HEAD, noise=np.array([[1.0, 1.0], [0.0, 1.0]])), MatrixError, "noise must be symmetric"),
    "no runs": (lambda: tl.integrate(tp.GaussianFlow(HEAD), BATCH, TIMES), ShapeError, r"no leading axes here, got \(3,\); .* runs=3"),
    "noise shape": (lambda: tp.GaussianFlow(HEAD, noise=np.eye(3), form="covariance"), ShapeError, "noise must be 2 x 2"),
    "feed-forward": (lambda: tp.GaussianFlow(HEAD, feed_forward=3.0), ArgumentError, r"a pair \(W, b\), got float"),
    "W": (lambda: tp.GaussianFlow(HEAD, feed_forward=(np.eye(3), None)), ShapeError, "feed_forward W must be 2 x 2"),
    "b": (lambda: tp.GaussianFlow(HEAD, feed_forward=(W, np.ones(3))), ShapeError, r"feed_forward b must have shape \(2,\), got \(3,\)"),
    "state": (lambda: tl.integrate(tp.GaussianFlow(HEAD), np.eye(2), TIMES), ArgumentError, "must be a Gaussian, got ndarray"),
    "dim": (lambda: tl.integrate(tp.GaussianFlow(HEAD), tp.Gaussian.standard(3), TIMES), ShapeError, "must have dimension 2 .* got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
