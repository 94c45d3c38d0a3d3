"""Causal attention on one Gaussian for each position: exact mixture velocities and the closure against weighted tokens with a mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.positions import PositionFlow, conditional_bures, mixture_velocity

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
V = np.array([[0.6, -0.3], [0.2, 0.5]])
MEANS = np.array([[0.3, -0.2], [-0.4, 0.5], [0.6, 0.1]])
ROOTS = np.array([[[0.8, 0.0], [0.3, 0.6]], [[0.5, 0.1], [-0.2, 0.7]], [[0.6, 0.2], [0.0, 0.4]]])
THETA = np.array([0.5, 0.2, 0.8])
HEADS = {"softmax": tp.Softmax(Q, K, V, 0.7), "l2": tp.L2(Q, K, V, 0.7), "linear": tp.Linear(Q, K, V, 0.7)}
STATES = tp.Gaussian.from_factor(MEANS, ROOTS)


def grid(order: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    return np.stack([g.ravel() for g in np.meshgrid(nodes, nodes)], 1), np.outer(weights, weights).ravel() / weights.sum() ** 2


def masked_tokens(kind: str, x: np.ndarray, mass: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The definition: velocities at asked[i] from the tokens x[j] of mass[j] at the positions j <= i; one loop over positions."""
    moved = np.empty_like(asked)
    for i in range(len(x)):
        y, w = x[: i + 1].reshape(-1, 2), mass[: i + 1].ravel() / mass[: i + 1].sum()
        q, k = asked[i] @ Q.T, y @ K.T
        if kind == "linear":
            p = 0.7 * (q @ k.T) * w
        else:
            logit = 0.7 * (q @ k.T if kind == "softmax" else -((q[:, None] - k[None]) ** 2).sum(-1))
            p = w * np.exp(logit - logit.max(1, keepdims=True))
            p = p / p.sum(1, keepdims=True)
        moved[i] = p @ y @ V.T
    return moved


@pytest.mark.parametrize("kind", HEADS)
def test_the_mixture_velocity_is_that_of_masked_quadrature_tokens(kind, rng):
    z, w = grid(30)
    asked = rng.normal(size=(3, 5, 2))
    exact = masked_tokens(kind, MEANS[:, None] + z @ ROOTS.transpose(0, 2, 1), THETA[:, None] * w, asked)
    got = mixture_velocity(tp.Masked(HEADS[kind]), STATES, asked, THETA)
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-11)
    np.testing.assert_allclose(mixture_velocity(HEADS[kind], STATES, asked, 7 * THETA), got, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", HEADS)
def test_the_closure_is_the_regression_of_the_velocity_on_the_token(kind):
    z, w = grid(20)
    x = MEANS[:, None] + z @ ROOTS.transpose(0, 2, 1)
    moved = masked_tokens(kind, x, THETA[:, None] * w, x)
    mean = np.einsum("n,mnd->md", w, moved)
    slope = np.einsum("n,mnd,nr->mdr", w, moved, z)
    rest = moved - mean[:, None] - z @ slope.transpose(0, 2, 1)
    left = np.sqrt(np.einsum("n,mnd->m", w, rest**2) / np.einsum("n,mnd->m", w, moved**2))
    flow = PositionFlow(tp.Masked(HEADS[kind]), THETA)
    field, metrics = flow.field(0.0, STATES), flow.metrics(0.0, STATES)
    tolerance = 3e-15 if kind == "linear" else 1e-11
    np.testing.assert_allclose(field.mean, mean, rtol=0, atol=tolerance)
    np.testing.assert_allclose(field.factor, slope, rtol=0, atol=tolerance)
    np.testing.assert_allclose(metrics["non_affine"], left, rtol=0, atol=1e-9)
    if kind == "linear":
        assert not metrics["non_affine"].any()
    else:
        assert metrics["non_affine"][0] < 1e-12 and (metrics["non_affine"][1:] > 2e-3).all() and (metrics["non_affine"] < 5e-2).all()


@pytest.mark.parametrize("kind", HEADS)
def test_positions_that_share_one_law_move_as_without_a_mask(kind):
    state = tp.Gaussian.from_factor(np.tile(MEANS[0], (3, 1)), np.tile(ROOTS[0], (3, 1, 1)))
    mean, moved = HEADS[kind].factor_velocity(jnp.asarray(MEANS[0]), jnp.asarray(ROOTS[0]))
    field = PositionFlow(HEADS[kind], THETA).field(0.0, state)
    np.testing.assert_allclose(field.mean, np.tile(mean, (3, 1)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(field.factor, np.tile(moved, (3, 1, 1)), rtol=0, atol=1e-12)


def test_masked_linear_attention_follows_masked_tokens_exactly():
    """Linear attention moves any measure by its first two moments, so tokens with the right moments have the right path."""
    from scipy.integrate import solve_ivp

    z, w = grid(3)
    x0 = MEANS[:, None] + z @ ROOTS.transpose(0, 2, 1)
    field = lambda t, x: masked_tokens("linear", x.reshape(x0.shape), THETA[:, None] * w, x.reshape(x0.shape)).ravel()
    x = solve_ivp(field, (0.0, 1.0), x0.ravel(), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1].reshape(x0.shape)
    sol = tl.integrate(PositionFlow(tp.Masked(HEADS["linear"]), THETA), STATES, jnp.array([0.0, 1.0]), rtol=1e-11, atol=1e-12)
    mean = np.einsum("n,mnd->md", w, x)
    np.testing.assert_allclose(sol.value.mean[-1], mean, rtol=0, atol=1e-10)
    np.testing.assert_allclose(sol.value.cov[-1], np.einsum("n,mni,mnj->mij", w, x - mean[:, None], x - mean[:, None]), rtol=0, atol=1e-10)
    assert sol.history["rank"].shape == (2, 3) and sol.history["eigenvalues"].shape == (2, 3, 2)


def test_sigma_points_are_exact_where_the_velocity_is_affine_and_near_elsewhere(rng):
    dim, count = 5, 3
    head = tp.Softmax(*(rng.normal(size=(dim, dim)) / 6 for _ in range(3)))
    factor, mean = 0.4 * rng.normal(size=(count, dim, dim)), rng.normal(size=(count, dim))
    same = tp.Gaussian.from_factor(np.tile(mean[0], (count, 1)), np.tile(factor[0], (count, 1, 1)))
    field = PositionFlow(head).field(0.0, same)
    np.testing.assert_allclose(field.factor[-1], head.factor_velocity(jnp.asarray(mean[0]), jnp.asarray(factor[0]))[1], rtol=0, atol=1e-13)

    def error(size: float) -> float:
        state = tp.Gaussian.from_factor(mean, size * factor)
        points, fine = PositionFlow(head).field(0.0, state), PositionFlow(head, order=5).field(0.0, state)
        return float(np.abs(np.asarray(points.factor - fine.factor)).max())

    assert 7 < error(0.2) / error(0.1) < 9                                   # the first term that is not integrated is cubic


def test_several_heads_and_an_affine_layer_add_up(rng):
    both = tp.MultiHead([HEADS["softmax"], HEADS["linear"], tp.FeedForward(V, np.array([1.0, -1.0]))])
    asked = rng.normal(size=(3, 5, 2))
    parts = mixture_velocity(HEADS["softmax"], STATES, asked, THETA) + mixture_velocity(HEADS["linear"], STATES, asked, THETA)
    np.testing.assert_allclose(mixture_velocity(tp.Masked(both), STATES, asked, THETA), parts + asked @ V.T + np.array([1.0, -1.0]), atol=1e-13)
    affine = tp.MultiHead([HEADS["linear"], tp.FeedForward(V, np.array([1.0, -1.0]))])
    exact, points = (PositionFlow(affine, THETA).field(0.0, STATES), PositionFlow(affine).field(0.0, STATES))
    brute = mixture_velocity(affine, STATES, np.repeat(MEANS[:, None], 5, 1), THETA)[:, 0]
    np.testing.assert_allclose(exact.mean, brute, atol=1e-14)
    linear = PositionFlow(HEADS["linear"], THETA).field(0.0, STATES)
    np.testing.assert_allclose(exact.factor, linear.factor + V @ ROOTS, atol=1e-14)
    assert np.abs(np.asarray(points.factor - exact.factor)).max() > 1e-3                   # the weights of the positions matter


def test_the_conditional_distance_is_the_weighted_sum_over_positions():
    from scipy.linalg import sqrtm

    def distance(i: int, j: int) -> float:
        a, b = (ROOTS[k] @ ROOTS[k].T for k in (i, j))
        root = sqrtm(a)
        return np.sqrt(((MEANS[i] - MEANS[j]) ** 2).sum() + np.trace(a + b - 2 * sqrtm(root @ b @ root)))

    other = tp.Gaussian.from_factor(MEANS[::-1].copy(), ROOTS[::-1].copy())
    parts = [distance(i, 2 - i) if i != 1 else 0.0 for i in range(3)]
    exact = np.sqrt(THETA / THETA.sum() @ np.square(parts))
    np.testing.assert_allclose(conditional_bures(STATES, other, THETA), exact, rtol=1e-10)
    assert conditional_bures(STATES, STATES, THETA) < 1e-12
    batch = tp.Gaussian.from_factor(np.stack([MEANS, MEANS[::-1]]), np.stack([ROOTS, ROOTS[::-1]]))
    np.testing.assert_allclose(conditional_bures(batch, other, THETA), [exact, 0.0], atol=1e-12)


def test_the_velocity_is_differentiable():
    asked = np.zeros((3, 5, 2))
    moved = lambda mean: mixture_velocity(HEADS["l2"], tp.Gaussian._raw(mean, STATES.factor, None), asked, THETA).sum()
    slope = jax.jit(jax.grad(moved))(jnp.asarray(MEANS))
    h = np.zeros((3, 2))
    h[0, 0] = 1e-6
    np.testing.assert_allclose(slope[0, 0], (moved(jnp.asarray(MEANS + h)) - moved(jnp.asarray(MEANS - h))) / 2e-6, rtol=1e-7)


def test_bad_positions_are_refused():
    with pytest.raises(ArgumentError, match="made of Softmax, L2, Linear and FeedForward to act on a mixture, got Sigmoid"):
        PositionFlow(tp.Sigmoid(Q, K, V))
    with pytest.raises(ArgumentError, match="attention must be"):
        PositionFlow(3)
    with pytest.raises(ArgumentError, match="theta must be positive, got 0"):
        PositionFlow(HEADS["linear"], np.array([1.0, 0.0]))
    with pytest.raises(ArgumentError, match="order must be"):
        PositionFlow(HEADS["linear"], order=-1)
    flow = PositionFlow(HEADS["linear"], THETA)
    with pytest.raises(ShapeError, match="states must have one leading axis, the position"):
        flow.lift(tp.Gaussian.standard(2))
    with pytest.raises(ShapeError, match="states must have dimension 2 to match the attention, got 3"):
        flow.lift(tp.Gaussian(np.zeros((3, 3)), np.tile(np.eye(3), (3, 1, 1))))
    with pytest.raises(ShapeError, match="theta must have one weight for each of the 2 positions"):
        flow.lift(tp.Gaussian.from_factor(MEANS[:2], ROOTS[:2]))
    with pytest.raises(ArgumentError, match="states must be a Gaussian, got ndarray"):
        mixture_velocity(HEADS["linear"], MEANS, np.zeros((3, 1, 2)))
    with pytest.raises(ShapeError, match="points must have shape"):
        mixture_velocity(HEADS["linear"], STATES, np.zeros((2, 1, 2)))
    with pytest.raises(ShapeError, match="b must have positions and dimension"):
        conditional_bures(STATES, tp.Gaussian.from_factor(MEANS[:2], ROOTS[:2]))
    with pytest.raises(ShapeError, match="a must have a leading axis of positions"):
        conditional_bures(tp.Gaussian.standard(2), STATES)
    with pytest.raises(ArgumentError, match="b must be a Gaussian, got int"):
        conditional_bures(STATES, 3)
