"""Riccati flows: feed-forward and noise against SciPy, poles, equilibria against its Riccati solver."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, MatrixError, NoClosedFormError
from theorylab.transformer_pde.riccati import equilibrium

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
W = np.array([[0.4, 0.3], [-0.5, 0.6]])
D = np.array([[0.3, 0.1], [0.1, 0.2]])
COV = np.array([[0.8, 0.25], [0.25, 0.5]])
FORM = Q + np.eye(2)                                                     # not symmetric, positive definite symmetric part
START = tp.Gaussian(np.zeros(2), COV)
THIN = tp.Gaussian.from_factor(np.zeros(2), [[0.9], [0.4]])


def head(v: float) -> tp.Softmax:
    return tp.Softmax.bilinear(FORM, v)


def flow(v: float, noisy: bool) -> tp.GaussianFlow:
    return tp.GaussianFlow(head(v), (W, None), D if noisy else None, form="covariance" if noisy else "factor")


@pytest.mark.parametrize("v", [-0.7, 0.4])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("state", [START, THIN], ids=["full", "singular"])
def test_feed_forward_and_noise_against_scipy(v, noisy, state):
    S, times = v * (FORM + FORM.T), np.linspace(0, 0.5, 4)

    def field(t, y):
        cov = y.reshape(2, 2)
        return (W @ cov + cov @ W.T + cov @ S @ cov + (2 * D if noisy else 0)).ravel()

    cov = scipy.integrate.solve_ivp(field, (0, times[-1]), np.asarray(state.cov).ravel(), rtol=1e-12, atol=1e-14, t_eval=times).y.T.reshape(-1, 2, 2)
    got = tp.closed_form(flow(v, noisy), state, times)
    np.testing.assert_allclose(got.cov, cov, rtol=1e-10, atol=1e-12)
    assert not np.asarray(got.mean).any()


def test_noise_alone_in_one_dimension_is_a_hyperbolic_tangent():
    # s' = 2 D - 2 s^2 from 0
    noisy = tp.GaussianFlow(tp.Softmax([[-1.0]], [[1.0]], 1.0), noise=0.49, form="covariance")
    got = tp.closed_form(noisy, tp.Gaussian(np.zeros(1), [[0.0]]), [0.0, 1.0, 30.0]).cov[:, 0, 0]
    np.testing.assert_allclose(got, 0.7 * np.tanh(1.4 * np.array([0.0, 1.0, 30.0])), rtol=1e-12, atol=1e-15)


def test_a_time_beyond_the_pole_is_refused():
    # d = 1: s' = 2 w s + 2 s^2, 1/s = e^{-2wt}(1/s0 + 1/w) - 1/w
    one = tp.GaussianFlow(tp.Softmax([[1.0]], [[1.0]], 1.0), (np.array([[0.5]]), None))
    end = np.log(1 + 0.5 / 0.8)
    near = tp.closed_form(one, tp.Gaussian(np.zeros(1), [[0.8]]), [0.999 * end]).cov.item()
    assert near == pytest.approx(1 / (np.exp(-0.999 * end) * (1 / 0.8 + 2) - 2), rel=1e-9)
    for late in (1.001, 10.0):
        with pytest.raises(ArgumentError, match="below the blow-up time"):
            tp.closed_form(one, tp.Gaussian(np.zeros(1), [[0.8]]), [late * end])
        with pytest.raises(ArgumentError, match="below the blow-up time"):
            tp.closed_form(flow(1.0, True), START, [50.0 * late])


def test_the_equilibrium_is_the_stabilizing_solution_and_attracts():
    S = -0.7 * (FORM + FORM.T)
    root = scipy.linalg.cholesky(-S)
    exact = scipy.linalg.solve_continuous_are(W.T, root.T, 2 * D, np.eye(2))              # W X + X W' - X root'root X + 2 D = 0
    got = equilibrium(flow(-0.7, True))
    np.testing.assert_allclose(got, exact, rtol=1e-12)
    np.testing.assert_allclose(tp.closed_form(flow(-0.7, True), THIN, [60.0]).cov[0], exact, rtol=1e-10)
    quiet = scipy.linalg.solve_continuous_lyapunov(W.T, -S)                              # W'Y + Y W = -S for the inverse
    np.testing.assert_allclose(equilibrium(flow(-0.7, False)), np.linalg.inv(quiet), rtol=1e-12)
    saddle = tp.GaussianFlow(head(-0.7), (np.diag([0.5, -0.4]), None))
    assert np.linalg.matrix_rank(equilibrium(saddle), tol=1e-9) == 1                     # one growing direction of W is held, the other decays


def test_the_equilibrium_has_derivatives_and_batches():
    at = lambda v: equilibrium(tp.GaussianFlow(tp.Softmax.bilinear(FORM, v), (W, None)))
    slope = jax.jacfwd(at)(-0.7)
    np.testing.assert_allclose(slope, -at(-0.7) / -0.7, rtol=1e-9)                       # the equilibrium is proportional to 1 / v
    np.testing.assert_allclose(jax.vmap(at)(jnp.array([-0.7, -1.4]))[1], at(-1.4), rtol=1e-12)


BAD = {
    "mean": (lambda: tp.closed_form(flow(1.0, False), START.replace(mean=np.ones(2)), [0.1]), NoClosedFormError, "zero mean and b"),
    "b": (lambda: tp.closed_form(tp.GaussianFlow(head(1.0), (W, np.ones(2))), START, [0.1]), NoClosedFormError, "zero mean and b"),
    "indefinite": (lambda: equilibrium(flow(0.7, True)), MatrixError, "nothing attracts here"),
    "imaginary": (lambda: equilibrium(tp.GaussianFlow(head(-0.7), (np.array([[0.0, 1], [-1, 0]]), None))), MatrixError, "no imaginary eigenvalue"),
    "alone": (lambda: equilibrium(tp.GaussianFlow(head(-0.7))), NoClosedFormError, "feed_forward or noise"),
    "flow": (lambda: equilibrium(head(-0.7)), ArgumentError, "flow must be a GaussianFlow, got Softmax"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
