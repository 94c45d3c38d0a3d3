"""Closed forms against an integrator that shares no code with the package, against published digits, and against each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special

from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, NoClosedFormError, ShapeError
from theorylab.transformer_pde.closed_forms import _log_inverse_growth

RNG = np.random.default_rng(0)
ROOT, Q, K, V, MEAN = RNG.normal(size=(3, 3)), *(RNG.normal(size=(3, 3, 3)) * 0.5), RNG.normal(size=3)
STEADY = V + 1.5 * np.eye(3)                                        # eigenvalues with positive real parts: the orbits below do not escape
ZERO = np.zeros(3)
FULL, THIN, LINE = (tp.Gaussian.from_factor(ZERO, ROOT[:, :r]) for r in (3, 2, 1))


def by_scipy(head: tp.Attention, state: tp.Gaussian, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and covariances from the moment equations in NumPy, to 1e-13."""
    Q, K, V, c = np.asarray(head.Q), np.asarray(head.K), np.asarray(head.value_matrix), float(head.scale)
    A, P, d = c * K.T @ Q, c * K.T @ K, head.dim
    l2 = isinstance(head, tp.L2)

    def field(t: float, y: np.ndarray) -> np.ndarray:
        a, S = y[:d], y[d:].reshape(d, d)
        tilt, twice = (np.linalg.inv(np.eye(d) + 2 * S @ P), 2) if l2 else (np.eye(d), 1)
        B = twice * V @ tilt @ S @ A
        return np.concatenate([V @ tilt @ (a + twice * S @ A @ a), (B @ S + S @ B.T).ravel()])

    y0 = np.concatenate([np.asarray(state.mean), np.asarray(state.cov).ravel()])
    sol = scipy.integrate.solve_ivp(field, (0, times[-1]), y0, method="DOP853", rtol=1e-13, atol=1e-14, t_eval=times)
    return sol.y[:d].T, sol.y[d:].T.reshape(-1, d, d)


def assert_follows(head: tp.Attention, state: tp.Gaussian, end: float, tol: float = 2e-12) -> None:
    times = np.linspace(0, end, 5)
    got, (mean, cov) = tp.closed_form(tp.GaussianFlow(head), state, times), by_scipy(head, state, times)
    assert np.abs(got.cov - cov).max() < tol * np.abs(cov).max()
    assert np.abs(got.mean - mean).max() < tol * max(np.abs(mean).max(), 1)


@pytest.mark.parametrize("v", [1.3, -0.8])
@pytest.mark.parametrize("state", [FULL, THIN], ids=["full", "singular"])
def test_softmax_with_a_number_as_value(v, state):
    assert_follows(tp.Softmax(Q, K, v, 0.7), state, 0.1)
    for sign in (1, -1):                                            # symmetric forms: the mean has a closed form too
        assert_follows(tp.Softmax(sign * K, K, v, 0.7), state.replace(mean=MEAN), 0.02)


@pytest.mark.parametrize("ratio, v", [(1.0, 1.3), (-1.0, 1.3), (0.6, -0.8), (0.0, 1.3)])
@pytest.mark.parametrize("state", [FULL, THIN], ids=["full", "singular"])
def test_l2_with_a_number_as_value(v, ratio, state):
    assert_follows(tp.L2(ratio * K, K, v, 0.7), state.replace(mean=MEAN), 2.0)


@pytest.mark.parametrize("kind", [tp.Softmax, tp.L2])
def test_rank_one_states(kind):
    assert_follows(kind(Q, K, V), LINE, 0.3)
    assert_follows(kind(-Q, K, V), LINE, 0.3)
    assert_follows(kind(-K, K, STEADY), LINE, 50.0)


@pytest.mark.parametrize("kind", [tp.Softmax, tp.L2])
def test_rank_one_heads(kind):
    q = Q[:1]
    assert_follows(kind(0.5 * q, q, V, 0.7), FULL, 0.3)
    assert_follows(kind(-q, q, STEADY, 0.7), FULL, 100.0)           # freezes: the clock stops at a zero of the orbit
    frozen = tp.closed_form(tp.GaussianFlow(kind(-q, q, STEADY, 0.7)), FULL, [1e9]).cov[0]
    assert np.abs(q @ frozen).max() < 1e-6                          # the limit has Q Sigma = 0


def test_a_rank_one_state_blows_up_where_a_number_as_value_says_so():
    flow = tp.GaussianFlow(tp.Softmax(K, K, np.eye(3)))
    end = float(tp.blow_up_time(tp.GaussianFlow(tp.Softmax(K, K, 1.0)), LINE))
    near = tp.closed_form(flow, LINE, [0.999 * end]).cov[0]
    np.testing.assert_allclose(near, LINE.cov * 1000, rtol=1e-9)    # 1 / (1 - t/t*)
    with pytest.raises(ArgumentError, match=f"times must lie below the blow-up time {end:.8f}"):
        tp.closed_form(flow, LINE, [1.001 * end])


def test_the_scalar_equation_of_l2_is_the_wright_omega_function():
    p = np.geomspace(1e-3, 1e3, 25)
    for y in (-50.0, 0.0, 0.9, 1.0, 30.0, 1e5):
        z = y / (2 * p) - np.log(2 * p)
        omega = scipy.special.wrightomega(z)
        log_omega = np.where(z > 0, np.log(np.maximum(omega, 1e-300)), z - omega)           # omega + log omega = z; omega underflows
        np.testing.assert_allclose(_log_inverse_growth(jnp.asarray(p), jnp.full(25, y)), np.log(2 * p) + log_omega, rtol=1e-10, atol=1e-12)
    assert _log_inverse_growth(jnp.zeros(1), jnp.ones(1)).item() == 0.0


def test_derivatives_of_the_covariance_are_those_of_the_formula():
    # dSigma = v t Sigma (dA + dA') Sigma, because the inverse is affine in A
    A, change = np.array([[0.3, 0.5, 0], [-0.2, 0.1, 0], [0, 0, -0.4]]), RNG.normal(size=(3, 3))
    at = lambda form: tp.closed_form(tp.GaussianFlow(tp.Softmax.bilinear(form, -0.8)), tp.Gaussian.standard(3), jnp.array([0.3])).cov[0]
    cov, moved = jax.jvp(at, (jnp.asarray(A),), (jnp.asarray(change),))
    np.testing.assert_allclose(moved, -0.8 * 0.3 * cov @ (change + change.T) @ cov, rtol=1e-11, atol=1e-13)


def test_traced_calls_agree_and_hide_what_has_no_closed_form():
    times = jnp.linspace(0, 0.1, 5)

    def scaled(s):
        return tp.closed_form(tp.GaussianFlow(tp.Softmax(s * Q, K, -0.8)), FULL.replace(mean=MEAN), times)

    out = jax.vmap(scaled)(jnp.array([0.5, 1.0]))
    alone = tp.closed_form(tp.GaussianFlow(tp.Softmax(Q, K, -0.8)), FULL, times)
    np.testing.assert_allclose(out.cov[1], alone.cov, rtol=1e-12)
    assert np.isnan(out.mean).all()                                 # A is not symmetric and the mean is not zero
    crossed = jax.jit(lambda r: tp.closed_form(tp.GaussianFlow(tp.L2(Q + r, K, 1.0)), FULL, times).cov)(0.0)
    assert np.isnan(crossed).all()


def asked(kind: type, Q: np.ndarray, K: np.ndarray, V: object, state: tp.Gaussian = FULL, times: object = (0.1,), **terms: object) -> tp.Gaussian:
    return tp.closed_form(tp.GaussianFlow(kind(Q, K, V), **terms), state, times)


S, L = tp.Softmax, tp.L2
BAD = {
    "matrix V": (lambda: asked(S, Q, K, V), NoClosedFormError, "3 x 3 value matrix, 3 rows of queries"),
    "mean": (lambda: asked(S, Q, K, 1.0, FULL.replace(mean=MEAN), [0.01]), NoClosedFormError, "the mean of V = v I"),
    "orbit mean": (lambda: asked(S, Q, K, V, LINE.replace(mean=MEAN)), NoClosedFormError, "state of zero mean"),
    "L2 ratio": (lambda: asked(L, Q, K, 1.0), NoClosedFormError, "Q is not a multiple of K"),
    "head ratio": (lambda: asked(L, Q[:1], K[:1], V), NoClosedFormError, "not a multiple of K"),
    "noise": (lambda: asked(S, Q, K, 1.0, noise=0.1, form="covariance"), NoClosedFormError, "has noise"),
    "normalize": (lambda: asked(L, K, K, 1.0, normalize=True), NoClosedFormError, "has normalize"),
    "traced orbit": (lambda: jax.jit(lambda t: asked(S, Q, K, V, LINE, t).cov)(jnp.ones(1)), NoClosedFormError, "traced"),
    "late": (lambda: asked(S, K, K, 1.0, FULL, [0.0, 1e3]), ArgumentError, "below the blow-up time"),
    "negative": (lambda: asked(S, K, K, 1.0, FULL, [-1.0]), ArgumentError, "times must be at least 0, got -1"),
    "table": (lambda: asked(S, K, K, 1.0, FULL, [[0.1]]), ArgumentError, "times must be one-dimensional"),
    "flow": (lambda: tp.closed_form(S(K, K, 1.0), FULL, [0.1]), ArgumentError, "flow must be a GaussianFlow, got Softmax"),
    "dim": (lambda: asked(S, K, K, 1.0, tp.Gaussian.standard(2)), ShapeError, "state must have dimension 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_closed_form_is_refused_with_the_reason(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
