"""Attention on Gaussians: exact velocities against brute-force quadrature and textbook inverses, symmetries, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, NonFiniteInputError, ShapeError, UnknownNameError
from theorylab.transformer_pde.kernels import ridge_basis, solve_shifted, tiled_average

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
V = np.array([[0.6, -0.3], [0.2, 0.5]])
MEAN, COV = np.array([0.3, -0.2]), np.array([[0.8, 0.25], [0.25, 0.5]])
KINDS = {"softmax": tp.Softmax, "l2": tp.L2}


def brute_force(kind: str, scale: float, order: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, weights and velocities of a Gauss-Hermite cloud, straight from the definition of attention."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    x = MEAN + np.stack([g.ravel() for g in np.meshgrid(nodes, nodes)], 1) @ np.linalg.cholesky(COV).T
    w = np.outer(weights, weights).ravel() / weights.sum() ** 2
    q, k = x @ Q.T, x @ K.T
    logits = scale * q @ k.T if kind == "softmax" else -scale * ((q[:, None] - k[None]) ** 2).sum(-1)
    p = w * np.exp(logits - logits.max(1, keepdims=True))
    return x, w, (p @ x / p.sum(1, keepdims=True)) @ V.T


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_the_velocity_on_a_gaussian_is_that_of_its_quadrature_cloud(kind, scale):
    x, w, moved = brute_force(kind, scale)
    mean, matrix = tp.velocity(KINDS[kind](Q, K, V, scale), tp.Gaussian(MEAN, COV))
    error = moved - np.asarray(mean + (x - MEAN) @ matrix.T)
    assert np.sqrt(w @ (error**2).sum(1)) < 1e-12                       # the paper's derivation was checked to 2.5e-15


@jax.jit
def at_state(head: tp.Attention, state: tp.Gaussian) -> tuple:
    """Everything an attention says about a Gaussian, in one compiled call."""
    return head.velocity(state.mean, state.cov), *head.factor_velocity(state.mean, state.factor), head.gain(state.factor)


@pytest.mark.parametrize("dim, k, rank", [(1, 1, 1), (3, 1, 2), (3, 3, 2), (6, 2, 6), (6, 7, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_form_is_the_velocity_form(kind, dim, k, rank, rng):
    Qr, Kr, Vr, L, mean = (rng.normal(size=s) for s in ((k, dim), (k, dim), (dim, dim), (dim, rank), (dim,)))
    head, state = KINDS[kind](Qr, Kr, Vr, 0.6), tp.Gaussian.from_factor(mean, L)
    P, A, S = 0.6 * Kr.T @ Kr, 0.6 * Kr.T @ Qr, L @ L.T
    tilt = np.linalg.inv(np.eye(dim) + 2 * S @ P) if kind == "l2" else np.eye(dim)
    twice = 2 if kind == "l2" else 1
    B, m = twice * Vr @ tilt @ S @ A, Vr @ tilt @ (mean + twice * S @ A @ mean)
    (m_cov, B_cov), m_factor, moved, gain = at_state(head, state)
    for got, exact in ((m_cov, m), (m_factor, m), (B_cov, B), (moved, B @ L), (Vr @ L @ gain, B @ L)):
        np.testing.assert_allclose(got, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_as_value_matrix_is_a_multiple_of_the_identity(kind):
    state = tp.Gaussian(MEAN, COV)
    number, matrix = (tp.velocity(KINDS[kind](Q, K, v), state) for v in (-0.7, -0.7 * np.eye(2)))
    np.testing.assert_allclose(number.mean, matrix.mean, rtol=1e-14)
    np.testing.assert_allclose(number.matrix, matrix.matrix, rtol=1e-14)


def test_the_form_of_a_bilinear_head_is_not_transposed():
    A = np.array([[0.3, 1.0], [-0.4, 0.2]])
    x, y = np.array([1.0, 2.0]), np.array([0.5, -1.0])
    head = tp.Softmax.bilinear(A, 1.0, scale=2.0)
    np.testing.assert_allclose(head.A, 2 * A)
    logit = jnp.log(tp.L2(Q, K, 1.0).scale) + 2 * (A @ x) @ y                       # log 1 = 0
    weight = np.exp(float(logit)) / (1 + np.exp(float(logit)))                      # tokens y and 0: the average is weight * y
    moved = head.token_velocity(jnp.asarray(np.stack([y, np.zeros(2)])), queries=jnp.asarray(x[None]))[0]
    np.testing.assert_allclose(moved[0], weight * y, rtol=1e-13)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(["softmax", "l2"]))
def test_a_change_of_basis_moves_the_velocity_along(seed, kind):
    rng = np.random.default_rng(seed)
    M = np.eye(2) + 0.4 * rng.normal(size=(2, 2))
    inverse = np.linalg.inv(M)
    here = tp.velocity(KINDS[kind](Q, K, V), tp.Gaussian(MEAN, COV))
    there = tp.velocity(KINDS[kind](Q @ inverse, K @ inverse, M @ V @ inverse), tp.Gaussian.from_factor(M @ MEAN, M @ np.linalg.cholesky(COV)))
    size = np.linalg.cond(M) ** 2
    np.testing.assert_allclose(there.mean, M @ here.mean, atol=1e-13 * size)
    np.testing.assert_allclose(there.matrix, M @ here.matrix @ inverse, atol=1e-13 * size)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_the_velocity_are_those_of_finite_differences(kind):
    state, step = tp.Gaussian(MEAN, COV), 1e-6
    f = lambda q: KINDS[kind](q, K, V).factor_velocity(state.mean, state.factor)[1]
    change = np.array([[0.2, -0.5], [0.7, 0.1]])
    got = jax.jvp(f, (jnp.asarray(Q),), (jnp.asarray(change),))[1]
    np.testing.assert_allclose(got, (f(Q + step * change) - f(Q - step * change)) / (2 * step), atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_stays_float32(kind):
    f = lambda a: jnp.asarray(a, jnp.float32)
    head, state = KINDS[kind](f(Q), f(K), f(V)), tp.Gaussian(f(MEAN), f(COV))
    assert {a.dtype for a in jax.tree.leaves(jax.eval_shape(at_state, head, state))} == {jnp.dtype("float32")}
    assert {a.dtype for a in jax.tree.leaves(jax.eval_shape(head.token_velocity, f(np.ones((5, 2)))))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_inputs_give_finite_velocities(kind):
    zero = np.zeros((2, 2))
    for head in (KINDS[kind](zero, zero, V), KINDS[kind](Q, K, zero), KINDS[kind](Q, K, 0.0)):
        for state in (tp.Gaussian(MEAN, zero), tp.Gaussian.from_factor(MEAN, zero)):
            assert all(np.isfinite(a).all() for a in jax.tree.leaves(at_state(head, state)))


def test_small_and_large_systems_are_solved_alike(rng):
    for k in (4, 5):
        root, right = rng.normal(size=(k, k)), rng.normal(size=(k, 2))
        np.testing.assert_allclose(solve_shifted(jnp.asarray(root @ root.T), jnp.asarray(right)), np.linalg.solve(np.eye(k) + root @ root.T, right),
                                   rtol=1e-10)
        tall = rng.normal(size=(6, k))
        upper, lower = ridge_basis(jnp.asarray(tall))
        np.testing.assert_allclose(lower @ upper.T, np.linalg.solve(np.eye(k) + tall.T @ tall, tall.T), rtol=1e-10, atol=1e-12)


def test_the_l2_gain_keeps_its_digits_for_a_large_and_thin_covariance():
    # K L has singular values near 1e6 and 1; a solve with I + 2 Y Y' would lose 12 digits, the basis loses 6
    import mpmath

    L = np.array([[1e6, 0.3], [1e6, -1.1]])
    with mpmath.workdps(40):
        Y, W = mpmath.matrix(K @ L), mpmath.matrix(Q @ L)
        exact = 2 * Y.T * mpmath.inverse(mpmath.eye(2) + 2 * Y * Y.T) * W
    exact = np.array(exact.tolist(), float)
    assert np.linalg.norm(tp.L2(Q, K, V).gain(jnp.asarray(L)) - exact) < 1e-9 * np.linalg.norm(exact)


def test_tokens_of_weight_zero_do_not_count_even_when_they_fill_a_tile(rng):
    points, weights = rng.normal(size=(12, 2)), np.r_[np.zeros(4), np.full(8, 1 / 8)]
    head = tp.Softmax(Q, K, V)
    got = head.token_velocity(jnp.asarray(points), jnp.asarray(weights), tile=4)[0]
    np.testing.assert_allclose(got, head.token_velocity(jnp.asarray(points[4:]), queries=jnp.asarray(points))[0], rtol=1e-12)


def test_huge_logits_do_not_overflow(rng):
    keys = jnp.asarray(1e3 * rng.normal(size=(9, 2)))
    average, size = tiled_average(keys, keys, jnp.zeros(9), keys, 4)
    assert np.isfinite(average).all()
    np.testing.assert_allclose(average, keys[np.argmax(np.asarray(keys) @ np.asarray(keys).T, axis=1)])
    np.testing.assert_allclose(size, 1.0)


def test_random_heads_have_the_stated_law_and_depend_on_the_key_alone():
    head = tp.random_attention("l2", 3, dim=40, rank=20)
    assert isinstance(head, tp.L2) and head.Q.shape == (20, 40) and head.V.shape == (40, 40)
    for matrix in (head.Q, head.K, head.V):
        assert float((matrix**2).mean()) == pytest.approx(1 / 40, rel=0.25)         # 800 entries: three standard errors are 15 percent
    assert np.array_equal(head.K, tp.random_attention("l2", jax.random.key(3), dim=40, rank=20).K)
    assert not np.array_equal(head.Q, head.K)


BAD = {
    "Q vector": (lambda: tp.Softmax(np.ones(2), K, V), ShapeError, r"Q must have shape \(k, dim\), got \(2,\)"),
    "K shape": (lambda: tp.Softmax(Q, np.ones((1, 2)), V), ShapeError, r"K must have the shape \(2, 2\) of Q, got \(1, 2\)"),
    "V dim": (lambda: tp.L2(Q, K, np.eye(3)), ShapeError, "V must be 2 x 2 to match the other arguments, got 3 x 3"),
    "V not square": (lambda: tp.L2(Q, K, np.ones((2, 3))), ShapeError, "V must be a square matrix"),
    "NaN": (lambda: tp.Softmax(Q, K, np.nan * V), NonFiniteInputError, r"V must be finite, got nan at index \(0, 0\)"),
    "complex": (lambda: tp.Softmax(Q + 0j, K, V), ArgumentError, "Q must be real, got dtype complex128"),
    "text": (lambda: tp.Softmax("Q", K, V), ArgumentError, "Q must be an array of real numbers, got str"),
    "scale": (lambda: tp.L2(Q, K, V, scale=0.0), ArgumentError, "scale must be above 0, got 0"),
    "two scales": (lambda: tp.L2(Q, K, V, scale=np.ones(2)), ShapeError, r"scale must be one number, got shape \(2,\)"),
    "two biases": (lambda: tp.Sigmoid(Q, K, V, bias=np.ones(2)), ShapeError, r"bias must be one number, got shape \(2,\)"),
    "two temperatures": (lambda: tp.Sinkhorn(Q, K, V, temperature=np.ones(2)), ShapeError, r"temperature must be one number, got shape \(2,\)"),
    "A": (lambda: tp.Softmax.bilinear(np.ones((2, 3)), 1.0), ShapeError, "A must be a square matrix"),
    "state class": (lambda: tp.velocity(tp.Softmax(Q, K, V), COV), ArgumentError, "state must be a Gaussian, got ndarray"),
    "state dim": (lambda: tp.velocity(tp.Softmax(Q, K, V), tp.Gaussian.standard(3)), ShapeError, "state must have dimension 2 .* got 3"),
    "batch": (lambda: tp.velocity(tp.Softmax(Q, K, V), tp.Gaussian(np.zeros((5, 2)), np.stack([COV] * 5))), ShapeError, "no leading axes"),
    "attention": (lambda: tp.velocity(V, tp.Gaussian.standard(2)), ArgumentError, "attention must be a Softmax, .* got ndarray"),
    "kind": (lambda: tp.random_attention("sofmax", 0, dim=2), UnknownNameError, "did you mean 'softmax'"),
    "rank": (lambda: tp.random_attention("l2", 0, dim=2, rank=0), ArgumentError, "rank must be a whole number of at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
