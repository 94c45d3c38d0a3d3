"""Particles: the velocity against a dense softmax, and the flow against the Gaussian that the tokens sample."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, ShapeError

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
V = np.array([[0.6, -0.3], [0.2, 0.5]])
HEADS = {"softmax": tp.Softmax(Q, K, V, 1.3), "l2": tp.L2(Q, K, V, 1.3)}
POINTS = np.random.default_rng(0).normal(size=(50, 2))
WEIGHTS = np.random.default_rng(1).dirichlet(np.ones(50))


def dense_velocity(kind: str, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """From the definition, one query at a time."""
    moved = []
    for q in x @ Q.T:
        keys = x @ K.T
        logits = 1.3 * (keys @ q) if kind == "softmax" else -1.3 * ((q - keys) ** 2).sum(1)
        p = w * np.exp(logits - logits.max())
        moved.append(V @ (p @ x) / p.sum())
    return np.array(moved)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("tile", [7, 50, 1024])
def test_the_velocity_is_the_definition_whatever_the_tile(kind, tile):
    moved = tp.Particles(HEADS[kind], tile).field(0.0, tp.Cloud(POINTS, WEIGHTS))
    np.testing.assert_allclose(moved.points, dense_velocity(kind, POINTS, WEIGHTS), rtol=1e-12, atol=1e-14)
    assert not np.any(moved._weights)


def test_a_cloud_follows_scipy():
    n = len(POINTS)
    uniform = np.full(n, 1 / n)
    there = scipy.integrate.solve_ivp(lambda t, y: dense_velocity("softmax", y.reshape(n, 2), uniform).ravel(), (0, 1), POINTS.ravel(), rtol=1e-9,
                                      atol=1e-10, method="DOP853")
    sol = tl.integrate(tp.Particles(HEADS["softmax"]), POINTS, [0.0, 1.0])
    np.testing.assert_allclose(sol.value.points[-1], there.y[:, -1].reshape(n, 2), rtol=1e-7, atol=1e-8)


@pytest.mark.slow
def test_quadrature_tokens_follow_the_moment_equations_each_with_its_coordinates_in_the_factor():
    start = tp.Gaussian(np.array([0.3, -0.2]), np.array([[0.8, 0.25], [0.25, 0.5]]))
    times = np.array([0.0, 0.6])
    cloud = tl.integrate(tp.Particles(HEADS["softmax"]), start.quadrature(24), times).value
    exact = tl.integrate(tp.GaussianFlow(HEADS["softmax"]), start, times).value
    reached = tp.moments(jax.tree.map(lambda a: a[-1], cloud))
    np.testing.assert_allclose(reached.cov, exact.cov[-1], atol=1e-8)
    np.testing.assert_allclose(reached.mean, exact.mean[-1], atol=1e-8)
    z = np.linalg.solve(start.factor, (cloud.points[0] - start.mean).T)                      # x(t) = alpha(t) + L(t) z
    missed = np.asarray(cloud.points[-1] - exact.mean[-1]) - np.asarray(exact.factor[-1] @ z).T
    assert np.sqrt(np.asarray(cloud.weights[0]) @ (missed**2).sum(1)) < 1e-7


@pytest.mark.slow
def test_a_finite_cloud_outlives_the_blow_up_of_its_gaussian():
    head = tp.Softmax(jnp.eye(2), jnp.eye(2), 1.0)
    assert float(tp.blow_up_time(tp.GaussianFlow(head), tp.Gaussian.standard(2))) == pytest.approx(0.5)
    tokens = tp.Gaussian.standard(2).sample(50, key=0)
    sol = tl.integrate(tp.Particles(head), tokens, [0.0, 1.0])
    assert sol.status == tl.Status.COMPLETED and np.isfinite(sol.history["trace"]).all()
    radius = lambda cloud: np.linalg.norm(np.asarray(cloud), axis=-1).max()
    assert radius(sol.value.points[-1]) <= np.exp(1.0) * radius(tokens.points)            # support grows at most like exp(|V| t)


def test_the_effective_sample_size_is_that_of_the_weights():
    n = len(POINTS)
    row = tp.Particles(HEADS["softmax"]).metrics(0.0, tp.Cloud(POINTS))
    logits = 1.3 * (POINTS @ Q.T) @ (POINTS @ K.T).T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(row["effective_sample_size"], (1 / (p**2).sum(1)).min(), rtol=1e-12)
    np.testing.assert_allclose(row["eigenvalues"], np.linalg.eigvalsh(np.cov(POINTS.T, bias=True)), rtol=1e-12)
    assert 1 <= float(row["effective_sample_size"]) <= n


def test_feed_forward_and_weights_that_change_with_depth_enter_the_velocity():
    W, b = np.array([[0.1, 0.2], [-0.3, 0.4]]), np.array([1.0, -1.0])
    other = tp.Softmax(K, Q, -V, 0.7)
    flow = tp.Particles(tp.Layered([HEADS["softmax"], other], [0.0, 1.0, 2.0]), feed_forward=(W, b))
    for t, head in ((0.5, HEADS["softmax"]), (1.5, other)):
        expected = head.token_velocity(jnp.asarray(POINTS))[0] + POINTS @ W.T + b
        np.testing.assert_allclose(flow.field(t, tp.Cloud(POINTS)).points, expected, rtol=1e-12)
    with pytest.raises(ShapeError, match="feed_forward b must have shape"):
        tp.Particles(HEADS["softmax"], feed_forward=(W, np.zeros(3)))


SIZE = np.linalg.norm(V, 2)
BOUNDED = {"masked sigmoid": (tp.Masked(tp.Sigmoid(Q, K, V)), SIZE), "sinkhorn": (tp.Sinkhorn(Q, K, V, temperature=0.5), 2 * SIZE),
           "heads": (tp.MultiHead([tp.Softmax(Q, K, V), tp.L2(K, Q, V)]), 2 * SIZE)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOUNDED)
def test_no_support_grows_faster_than_its_bound(kind):
    """Radii grow at most like exp(size of V times t), summed over heads, over the temperature for Sinkhorn (companion derivation)."""
    head, rate = BOUNDED[kind]
    times = np.array([0.0, 0.3, 0.6])
    sol = tl.integrate(tp.Particles(head), POINTS[:20], times)
    bound = np.exp(rate * times) * np.linalg.norm(POINTS[:20], axis=1).max()
    assert (sol.history["radius"] <= bound * (1 + 1e-9)).all() and sol.status == tl.Status.COMPLETED
    assert np.abs(sol.value.points[-1] - sol.value.points[0]).max() > 1e-3


def test_no_array_of_all_pairs_is_formed():
    n, tile = 4096, 64
    flow = tp.Particles(HEADS["softmax"], tile)
    program = jax.jit(lambda x: flow.field(0.0, tp.Cloud(x)).points).lower(jnp.zeros((n, 2))).compile()
    assert program.memory_analysis().temp_size_in_bytes < 40 * n * 2 * 8


def test_wrong_states_are_named():
    flow = tp.Particles(HEADS["softmax"])
    with pytest.raises(ArgumentError, match="must be a Cloud or an array of tokens, got Gaussian"):
        tl.integrate(flow, tp.Gaussian.standard(2), [0.0, 1.0])
    with pytest.raises(ShapeError, match="must have dimension 2 to match the attention, got 3"):
        tl.integrate(flow, np.zeros((5, 3)), [0.0, 1.0])
    with pytest.raises(ShapeError, match=r"no leading axes here, got \(2,\)"):
        tl.integrate(flow, np.zeros((2, 5, 2)), [0.0, 1.0])
    with pytest.raises(ShapeError, match="at least one token"):
        tl.integrate(flow, np.zeros((0, 2)), [0.0, 1.0])
    with pytest.raises(ArgumentError, match="attention must be"):
        tp.Particles("softmax")
    with pytest.raises(ArgumentError, match="tile must be at least 1"):
        tp.Particles(HEADS["softmax"], 0)
    with pytest.raises(ArgumentError, match="queries must be None for masked attention"):
        tp.Masked(HEADS["softmax"]).token_velocity(jnp.asarray(POINTS), queries=jnp.asarray(POINTS))
    with pytest.raises(ShapeError, match="weights must have shape"):
        tl.integrate(flow, tp.Cloud(POINTS, WEIGHTS[1:]), [0.0, 1.0])
    with pytest.raises(ArgumentError, match="mesh must be a jax.sharding.Mesh with an axis called 'tokens', got .*rows"):
        tp.Particles(HEADS["softmax"], mesh=jax.make_mesh((1,), ("rows",)))
