"""The moment closure of sigmoid attention: its integrals against tensor quadrature, its flow against tokens, and what is exact about it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.closures import ClosureFlow, moment_closure

V = np.array([[0.6, -0.3], [0.2, 0.5]])
Q = np.array([[0.9, 0.2], [-0.1, 0.7]])
K = np.array([[0.8, -0.4], [0.2, 0.9]])
COV = np.array([[0.8, 0.25], [0.25, 0.5]])
closure = jax.jit(moment_closure, static_argnums=2)


def grid(dim: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    mass = np.ones(1)
    for _ in range(dim):
        mass = np.multiply.outer(mass, weights / weights.sum()).ravel()
    return np.stack([g.ravel() for g in np.meshgrid(*[nodes] * dim, indexing="ij")], 1), mass


def sigmoid_tokens(x: np.ndarray, w: np.ndarray, A: np.ndarray, V: np.ndarray, bias: float) -> np.ndarray:
    """Velocities of weighted tokens from the definition."""
    return (w / (1 + np.exp(-(x @ A.T @ x.T + bias)))) @ x @ V.T


def regression(mean: np.ndarray, factor: np.ndarray, A: np.ndarray, V: np.ndarray, bias: float, order: int) -> tuple[np.ndarray, np.ndarray]:
    """$E Γ$ and $E Γ(α + Lz) z^T$, the mean and the factor derivative of the closure, on tensor Gauss-Hermite tokens."""
    z, w = grid(factor.shape[1], order)
    moved = sigmoid_tokens(mean + z @ factor.T, w, A, V, bias)
    return w @ moved, moved.T @ (w[:, None] * z)


# the tensor rule converges slowly once the logits are wide: 40 nodes reach these errors, and the one-dimensional rule is no worse
@pytest.mark.parametrize(("size", "mean", "tolerance"), [(0.25, (0.0, 0.0), 1e-13), (0.25, (2.0, 1.0), 1e-12), (1.0, (0.0, 0.0), 1e-9),
                                                         (1.0, (2.0, 1.0), 1e-8), (1.0, (5.0, -3.0), 1e-11), (4.0, (0.0, 0.0), 2e-5)])
def test_the_closure_is_the_regression_of_the_velocity_on_the_token(size, mean, tolerance):
    mean, factor = np.array(mean), np.linalg.cholesky(size * COV)
    center, slope = regression(mean, factor, K.T @ Q, V, -0.7, 40)
    found = closure(tp.Sigmoid(Q, K, V, 1.0, -0.7), tp.Gaussian.from_factor(mean, factor), 128)
    np.testing.assert_allclose(found.mean, center, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.matrix @ factor, slope, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [0.01, 1.0, 1e4])
def test_twice_the_nodes_change_nothing(size):
    head, state = tp.Sigmoid(Q, K, V, 1.0, -7.0), tp.Gaussian(np.array([2.0, 1.0]), size * COV)
    few, many = closure(head, state, 128), closure(head, state, 256)
    scale = float(jnp.abs(many.matrix).max())
    np.testing.assert_allclose(few.matrix, many.matrix, rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(few.mean, many.mean, rtol=0, atol=1e-13 * float(jnp.abs(many.mean).max()))


@pytest.mark.slow
def test_the_measured_error_of_the_closure_is_half_a_percent():
    """Published numbers: 1.2499 against 1.2561 of the tokens for the first entry of the covariance at depth one."""
    from scipy.integrate import solve_ivp

    z, w = grid(2, 20)
    x0 = z @ np.linalg.cholesky(COV).T
    field = lambda t, x: sigmoid_tokens(x.reshape(-1, 2), w, K.T @ Q, 3 * V, 0.0).ravel()
    x = solve_ivp(field, (0.0, 1.0), x0.ravel(), rtol=1e-6, atol=1e-9).y[:, -1].reshape(-1, 2)
    exact = (w[:, None] * x).T @ x
    sol = tl.integrate(ClosureFlow(tp.Sigmoid(Q, K, 3 * V)), tp.Gaussian(np.zeros(2), COV), jnp.array([0.0, 1.0]))
    assert abs(exact[0, 0] - 1.2561) < 1e-4 and abs(float(sol.value.cov[-1, 0, 0]) - 1.2499) < 1e-4
    assert 4e-3 < (exact[0, 0] - float(sol.value.cov[-1, 0, 0])) / exact[0, 0] < 6e-3
    assert np.abs(sol.value.mean[-1]).max() < 1e-15                        # a centered law stays centered
    assert sol.history["quadrature_error"].max() < 1e-14 and sol.history["rank"].tolist() == [2, 2]


def test_a_singular_covariance_is_the_limit_of_regular_ones():
    head, mean, thin = tp.Sigmoid(Q, K, V, 1.0, 0.3), np.array([0.5, -0.2]), np.array([[0.8], [0.3]])
    exact = closure(head, tp.Gaussian.from_factor(mean, thin), 128)
    center, slope = regression(mean, thin, K.T @ Q, V, 0.3, 60)
    np.testing.assert_allclose(exact.mean, center, rtol=0, atol=1e-11)
    np.testing.assert_allclose(exact.matrix @ thin, slope, rtol=0, atol=1e-11)
    near = closure(head, tp.Gaussian.from_factor(mean, np.concatenate([thin, np.array([[0.0], [1e-9]])], 1)), 128)
    np.testing.assert_allclose(near.matrix, exact.matrix, rtol=0, atol=1e-13)


def test_heads_add_up_and_exact_heads_stay_exact():
    state = tp.Gaussian(np.array([0.3, -0.2]), COV)
    sigmoid, exact = tp.Sigmoid(Q, K, V, 1.0, -0.7), tp.Softmax(Q, K, V)
    heads = tp.MultiHead([tp.MultiHead([sigmoid, exact]), tp.FeedForward(np.eye(2))])
    both, one, two = closure(heads, state, 128), closure(sigmoid, state, 128), exact.velocity(state.mean, state.cov)
    np.testing.assert_allclose(both.matrix, one.matrix + two.matrix + np.eye(2), atol=1e-15)
    np.testing.assert_allclose(both.mean, one.mean + two.mean + state.mean, atol=1e-15)
    derivative = ClosureFlow(heads).field(0.0, state)
    np.testing.assert_allclose(derivative.mean, both.mean, atol=1e-15)
    np.testing.assert_allclose(derivative.factor, both.matrix @ state.factor, atol=1e-14)


def test_derivatives_are_finite_where_eigenvalues_are_equal_and_are_those_of_differences():
    head = tp.Sigmoid(np.eye(2), np.eye(2), V, 1.0, -0.7)
    state = lambda width: tp.Gaussian._raw(jnp.ones(2), width * jnp.eye(2), None)
    slope = jax.jit(jax.grad(lambda width: moment_closure(head, state(width)).matrix.sum()))(1.0)
    ends = [float(closure(head, state(jnp.asarray(1.0 + h)), 128).matrix.sum()) for h in (-1e-5, 1e-5)]
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2e-5, rtol=1e-8)


def test_single_precision_stays_single():
    head = tp.Sigmoid(*(np.asarray(a, np.float32) for a in (Q, K, V)))
    found = closure(head, tp.Gaussian(np.zeros(2, np.float32), COV.astype(np.float32)), 128)
    assert found.mean.dtype == found.matrix.dtype == jnp.float32
    np.testing.assert_allclose(found.matrix, closure(tp.Sigmoid(Q, K, V), tp.Gaussian(np.zeros(2), COV), 128).matrix, rtol=1e-5)


def test_what_has_no_closure_is_refused():
    state = tp.Gaussian.standard(2)
    with pytest.raises(ArgumentError, match="no moment closure is known for Exponential: follow tokens with Particles"):
        moment_closure(tp.MultiHead([tp.Sigmoid(Q, K, V), tp.Exponential(Q, K, V)]), state)
    with pytest.raises(ArgumentError, match="use PositionFlow"):
        ClosureFlow(tp.Masked(tp.Sigmoid(Q, K, V)))
    with pytest.raises(ArgumentError, match="attention must be a Softmax"):
        ClosureFlow("sigmoid")
    with pytest.raises(ArgumentError, match="nodes must be"):
        moment_closure(tp.Sigmoid(Q, K, V), state, nodes=1)
    with pytest.raises(ShapeError, match="state must have dimension 2 to match the attention, got 3"):
        moment_closure(tp.Sigmoid(Q, K, V), tp.Gaussian.standard(3))
    flow = ClosureFlow(tp.Sigmoid(Q, K, V))
    with pytest.raises(ArgumentError, match="the state of a ClosureFlow must be a Gaussian, got ndarray"):
        flow.lift(np.zeros(2))
    with pytest.raises(ShapeError, match="the state must have dimension 2 to match the attention, got 3"):
        flow.lift(tp.Gaussian.standard(3))
