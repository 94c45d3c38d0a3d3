"""Closed forms against an integrator that shares no code with the package, against published digits, and against each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.special

from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, NoClosedFormError, ShapeError
from theorylab.transformer_pde.closed_forms import _Carried, _log_inverse_growth, flow_map

RNG = np.random.default_rng(0)
ROOT, Q, K, V, MEAN = RNG.normal(size=(3, 3)), *(RNG.normal(size=(3, 3, 3)) * 0.5), RNG.normal(size=3)
STEADY = V + 1.5 * np.eye(3)                                        # eigenvalues with positive real parts: the orbits below do not escape
ZERO = np.zeros(3)
FULL, THIN, LINE = (tp.Gaussian.from_factor(ZERO, ROOT[:, :r]) for r in (3, 2, 1))


def by_scipy(head: tp.Attention, state: tp.Gaussian, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and covariances from the moment equations in NumPy, to 1e-13."""
    Q, K, V, c = np.asarray(head.Q), np.asarray(head.K), np.asarray(head.value_matrix), float(head.scale)
    A, P, d = c * K.T @ Q, c * K.T @ K, head.dim

    def field(t: float, y: np.ndarray) -> np.ndarray:
        a, S = y[:d], y[d:].reshape(d, d)
        if isinstance(head, tp.Sinkhorn):
            eps, root = float(head.temperature), scipy.linalg.sqrtm(S).real
            left, s, right = np.linalg.svd(root @ A.T @ root / eps)
            plan = root @ left @ np.diag(2 * s / (1 + np.sqrt(1 + 4 * s * s))) @ right @ root
            B, m = V @ plan.T @ np.linalg.pinv(S) / eps, V @ a / eps
        else:
            l2 = isinstance(head, tp.L2)
            tilt, twice = (np.linalg.inv(np.eye(d) + 2 * S @ P), 2) if l2 else (np.eye(d), 1)
            B, m = twice * V @ tilt @ S @ A, V @ tilt @ (a + twice * S @ A @ a)
        return np.concatenate([m, (B @ S + S @ B.T).ravel()])

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


@pytest.mark.slow
@pytest.mark.parametrize("v, sign", [(1.3, 1), (-0.8, 1), (1.3, -1)])
def test_sinkhorn_with_a_number_as_value(v, sign):
    head = tp.Sinkhorn(sign * K, K, v, 0.7, temperature=0.6)
    assert_follows(head, FULL.replace(mean=MEAN), 1.5, 1e-10)               # the square roots of the reference lose digits
    mixed = tp.Sinkhorn(K + K.T, np.eye(3), v, temperature=0.6)             # an indefinite form: some directions grow, some decay
    assert_follows(mixed, FULL, 1.5, 1e-10)
    thin = tp.closed_form(tp.GaussianFlow(head), THIN, [0.0, 1.0])
    np.testing.assert_allclose(thin.cov[0], THIN.cov, rtol=1e-12)
    slope = (thin.cov[1] - tp.closed_form(tp.GaussianFlow(head), THIN, [1.0 - 1e-6]).cov[0]) / 1e-6
    L = thin.factor[1]
    moved = np.asarray(head.factor_velocity(thin.mean[1], L)[1] @ L.T)
    np.testing.assert_allclose(slope, moved + moved.T, rtol=1e-4, atol=1e-6)


def test_sinkhorn_survives_growth_beyond_the_range_of_numbers_of_sinh_and_has_derivatives():
    flow = lambda v: tp.GaussianFlow(tp.Sinkhorn(K, K, v))
    far = tp.closed_form(flow(1.0), FULL, [300.0, 301.0]).cov
    np.testing.assert_allclose(far[1] / far[0], np.exp(2), rtol=1e-9)       # rate 2 v / temperature
    assert np.isfinite(tp.closed_form(flow(-1.0), FULL, [1e8]).cov).all()
    at = lambda v: tp.closed_form(flow(v), FULL, jnp.array([0.5])).cov[0]
    slope, h = jax.jvp(at, (1.0,), (1.0,))[1], 1e-5
    np.testing.assert_allclose(slope, (at(1 + h) - at(1 - h)) / (2 * h), rtol=1e-7, atol=1e-8)


def test_one_time_gives_one_state():
    flow = tp.GaussianFlow(tp.Softmax(Q, K, 1.3))
    one, row = tp.closed_form(flow, FULL, 0.1), tp.closed_form(flow, FULL, [0.1])
    np.testing.assert_array_equal(one.cov, row.cov[0])
    assert one.mean.shape == (3,)


@pytest.mark.parametrize("kind", [tp.Softmax, tp.L2, tp.Sinkhorn, tp.Linear])
def test_a_matrix_that_is_a_multiple_of_the_identity_counts_as_the_number(kind):
    times = np.array([0.05, 0.1])
    matrix, number = (tp.closed_form(tp.GaussianFlow(kind(K, K, v, 0.7)), FULL, times) for v in (-0.8 * np.eye(3), -0.8))
    np.testing.assert_allclose(matrix.cov, number.cov, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", [tp.Softmax, tp.L2, tp.Sinkhorn])
def test_diagonal_matrices_decouple_the_coordinates(kind):
    Q, K, V = np.diag([1.0, -2.0, 0.7]), np.diag([1.0, 0.5, 0.0]), np.diag([1.0, -2.0, 0.5])
    for last in (0.5,) if kind is tp.Sinkhorn else (0.5, 0.0):                  # the root of a singular covariance is not to be had from SciPy
        variances = [0.8, 0.3, last]
        assert_follows(kind(Q, K, V, 0.7), tp.Gaussian(MEAN, np.diag(variances)), 0.1)
    flow = tp.GaussianFlow(tp.Softmax(np.eye(3), np.eye(3), np.diag([1.0, 2.0, -1.0])))
    with pytest.raises(ArgumentError, match=r"below the blow-up time 0\.25, got 0\.25"):
        tp.closed_form(flow, tp.Gaussian.standard(3), [0.25])


def test_linear_attention_at_zero_mean_is_softmax():
    times = [0.0, 0.05]
    one, other = (tp.closed_form(tp.GaussianFlow(kind(Q, K, 1.3)), FULL, times) for kind in (tp.Linear, tp.Softmax))
    np.testing.assert_array_equal(one.cov, other.cov)
    traced = jax.jit(lambda m: tp.closed_form(tp.GaussianFlow(tp.Linear(Q, K, 1.3)), FULL.replace(mean=m), jnp.asarray(times)).cov)
    assert np.isnan(traced(jnp.ones(3))).all() and np.isfinite(traced(jnp.zeros(3))).all()


@pytest.mark.slow
def test_the_flow_map_carries_tokens():
    head = tp.Softmax(K, K, -0.8, 0.7)
    times = np.array([0.0, 0.3, 0.9])
    for state in (FULL, THIN):
        closed = flow_map(tp.GaussianFlow(head), state, times)
        np.testing.assert_allclose(closed[0], np.eye(3), atol=1e-14)
        cov = tp.closed_form(tp.GaussianFlow(head), state, times).cov
        np.testing.assert_allclose(closed @ state.cov @ np.swapaxes(closed, 1, 2), cov, rtol=1e-11, atol=1e-13)
    general = flow_map(tp.GaussianFlow(tp.Softmax(K, K, -0.8 * np.eye(3), 0.7)), state, times[1:])
    np.testing.assert_allclose(general, closed[1:], rtol=1e-8, atol=1e-9)                     # also off the range of the singular state


@pytest.mark.slow
def test_the_flow_map_of_a_general_flow_moves_the_covariance():
    flow = tp.GaussianFlow(tp.L2(Q, K, V), feed_forward=(0.3 * Q, None), normalize=True)
    carried = flow_map(flow, FULL, [0.4])[0]
    there = carried @ FULL.cov @ carried.T
    assert float(jnp.trace(there)) == pytest.approx(float(jnp.trace(FULL.cov)), rel=1e-8)          # what normalize keeps, at zero mean
    other = tp.GaussianFlow(flow.attention, flow.feed_forward, normalize=True, form="covariance")
    change = [_Carried(f).field(jnp.zeros(()), (f.lift(FULL), carried)) for f in (flow, other)]
    np.testing.assert_allclose(change[0][1], change[1][1], rtol=1e-11)
    np.testing.assert_allclose(change[0][0]._factor, change[0][1] @ jnp.linalg.inv(carried) @ FULL.factor, rtol=1e-10, atol=1e-13)    # L' = B L


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
    "linear mean": (lambda: asked(tp.Linear, Q, K, 1.0, FULL.replace(mean=MEAN)), NoClosedFormError, "linear attention is solved at zero mean"),
    "L2 ratio": (lambda: asked(L, Q, K, 1.0), NoClosedFormError, "Q is not a multiple of K"),
    "Sinkhorn form": (lambda: asked(tp.Sinkhorn, Q, K, 1.0), NoClosedFormError, "A = K.T Q is not symmetric"),
    "noise": (lambda: asked(L, K, K, 1.0, noise=0.1, form="covariance"), NoClosedFormError, "known for softmax attention with a number"),
    "normalize": (lambda: asked(L, K, K, 1.0, normalize=True), NoClosedFormError, "with normalize"),
    "heads": (lambda: tp.closed_form(tp.GaussianFlow(tp.MultiHead([S(K, K, 1.0)])), FULL, [0.1]), NoClosedFormError, "for MultiHead"),
    "sigmoid": (lambda: asked(tp.Sigmoid, K, K, 1.0), (NoClosedFormError, ArgumentError), "which Sigmoid does"),
    "late": (lambda: asked(S, K, K, 1.0, FULL, [0.0, 1e3]), ArgumentError, "below the blow-up time"),
    "negative": (lambda: asked(S, K, K, 1.0, FULL, [-1.0]), ArgumentError, "times must be at least 0, got -1"),
    "table": (lambda: asked(S, K, K, 1.0, FULL, [[0.1]]), ArgumentError, "times must be one-dimensional"),
    "flow": (lambda: tp.closed_form(S(K, K, 1.0), FULL, [0.1]), ArgumentError, "flow must be a GaussianFlow, got Softmax"),
    "dim": (lambda: asked(S, K, K, 1.0, tp.Gaussian.standard(2)), ShapeError, "state must have dimension 3"),
    "map flow": (lambda: flow_map(S(K, K, 1.0), FULL, [0.1]), ArgumentError, "flow must be a GaussianFlow, got Softmax"),
    "map late": (lambda: flow_map(tp.GaussianFlow(S(K, K, 1.0)), FULL, [1e3]), ArgumentError, "below the blow-up time"),
    "map state": (lambda: flow_map(tp.GaussianFlow(S(K, K, 1.0)), tp.Gaussian.standard(2), [0.1]), ShapeError, "dimension 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_closed_form_is_refused_with_the_reason(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
