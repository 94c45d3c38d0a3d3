"""Several heads, affine layers, masks and weights that change with depth."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, ShapeError

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
V = np.array([[0.6, -0.3], [0.2, 0.5]])
SMALL = tp.Softmax([[0.3, -0.2]], [[0.1, 0.5]], [[-0.2, 0.4], [0.3, 0.1]])
START = tp.Gaussian(np.array([0.3, -0.2]), np.array([[0.8, 0.25], [0.25, 0.5]]))
HEAD = tp.Softmax(Q, K, V)


def test_golden_values_of_two_heads_at_depth_one():
    sol = tl.integrate(tp.GaussianFlow(tp.MultiHead([HEAD, SMALL])), START, [0.0, 1.0], rtol=1e-12, atol=1e-13)
    cov = np.asarray(sol.value.cov[-1])
    np.testing.assert_allclose([cov[0, 0], cov[0, 1], cov[1, 1]], [0.9630120671358, 0.30573584925573, 0.56104959776499], atol=2e-13)
    np.testing.assert_allclose(sol.value.mean[-1], [0.44935679197937, -0.13779643063301], atol=2e-13)


@pytest.mark.slow
def test_heads_of_different_kinds_add_up_on_gaussians_and_on_tokens(rng):
    heads = [HEAD, tp.L2(Q, K, 0.3), tp.Sinkhorn(Q, K, V, temperature=2.0), tp.FeedForward(V, [0.1, 0.2])]
    both, points = tp.MultiHead(heads), jnp.asarray(rng.normal(size=(5, 2)))
    total = sum(np.asarray(tp.velocity(head, START).matrix) for head in heads)
    np.testing.assert_allclose(tp.velocity(both, START).matrix, total, rtol=1e-13)
    np.testing.assert_allclose(both.factor_velocity(START.mean, START.factor)[1], total @ START.factor, rtol=1e-12)
    moved = sum(np.asarray(head.token_velocity(points)[0]) for head in heads)
    np.testing.assert_allclose(both.token_velocity(points)[0], moved, rtol=1e-13)


def test_stacked_matrices_split_into_the_heads_of_a_network(rng):
    x, stacked = rng.normal(size=(6, 4)), [rng.normal(size=(4, 4)) for _ in range(3)]
    out = rng.normal(size=(4, 4))
    queries, keys, values = (x @ a.T for a in stacked)
    expected = np.zeros((6, 4))
    for h in range(2):                                                       # as a network computes it: scale 1 / sqrt(k), concatenate, project
        cut = slice(2 * h, 2 * h + 2)
        p = np.exp(queries[:, cut] @ keys[:, cut].T / np.sqrt(2))
        expected += (p / p.sum(1, keepdims=True) @ values[:, cut]) @ out[:, cut].T
    heads = tp.MultiHead.split(*stacked, heads=2, output=out)
    np.testing.assert_allclose(heads.token_velocity(jnp.asarray(x))[0], expected, rtol=1e-12)


def test_several_softmax_heads_stay_homogeneous_and_other_mixtures_do_not():
    assert tp.MultiHead([HEAD, SMALL]).degree == 2
    assert tp.MultiHead([HEAD, tp.L2(Q, K, V)]).degree is None
    assert not tp.MultiHead([HEAD, tp.Sigmoid(Q, K, V)]).keeps_gaussians
    assert tp.MultiHead([HEAD, tp.Linear(Q, K, V)]).feels_mean


def test_an_affine_layer_among_the_heads_is_the_feed_forward_of_the_flow():
    W, b = np.array([[-0.3, 0.1], [0.0, 0.2]]), np.array([0.1, -0.4])
    among = tl.integrate(tp.GaussianFlow(tp.MultiHead([HEAD, tp.FeedForward(W, b)])), START, [0.0, 1.0]).value
    beside = tl.integrate(tp.GaussianFlow(HEAD, feed_forward=(W, b)), START, [0.0, 1.0]).value
    np.testing.assert_allclose(among.cov[-1], beside.cov[-1], rtol=1e-12)
    np.testing.assert_allclose(among.mean[-1], beside.mean[-1], rtol=1e-12)


def test_masked_tokens_see_their_past_only(rng):
    x = rng.normal(size=(7, 2))
    logits = (x @ Q.T) @ (x @ K.T).T
    p = np.exp(np.where(np.tri(7, dtype=bool), logits, -np.inf))
    np.testing.assert_allclose(tp.Masked(HEAD).token_velocity(jnp.asarray(x))[0], p / p.sum(1, keepdims=True) @ x @ V.T, rtol=1e-12)


@pytest.mark.parametrize("kind", [tp.Linear, tp.Sigmoid])
def test_the_past_of_an_unnormalized_head_is_a_measure_of_its_own(kind, rng):
    x, w = rng.normal(size=(6, 2)), rng.dirichlet(np.ones(6))
    head = kind(Q, K, V)
    moved = np.asarray(tp.Masked(head).token_velocity(jnp.asarray(x), jnp.asarray(w))[0])
    for i in range(6):
        past = head.token_velocity(jnp.asarray(x[: i + 1]), jnp.asarray(w[: i + 1] / w[: i + 1].sum()), jnp.asarray(x[i : i + 1]))[0]
        np.testing.assert_allclose(moved[i], past[0], rtol=1e-11)


def test_layers_act_one_after_the_other():
    weights = tp.Layered([HEAD, tp.Softmax(Q, -K, -V)], edges=[0.0, 0.5, 1.0])
    sol = tl.integrate(tp.GaussianFlow(weights), START, [0.0, 0.5, 1.0], rtol=1e-11, atol=1e-13).value
    middle = tl.integrate(tp.GaussianFlow(HEAD), START, [0.0, 0.5], rtol=1e-11, atol=1e-13).value
    state = tp.Gaussian(middle.mean[-1], middle.cov[-1])
    end = tl.integrate(tp.GaussianFlow(tp.Softmax(Q, -K, -V)), state, [0.0, 0.5], rtol=1e-11, atol=1e-13).value
    np.testing.assert_allclose(sol.cov[-1], end.cov[-1], rtol=1e-8)


def test_a_network_of_layers_is_the_same_on_a_gaussian_and_on_its_tokens():
    weights = tp.Layered([HEAD, tp.Softmax(K, Q, -V), HEAD])
    cloud = START.quadrature(30)
    tokens = tl.iterate(weights, tp.ResidualLayers(1.0), cloud, steps=3)
    exact = tl.iterate(weights, tp.ResidualLayers(1.0), START, steps=3)
    np.testing.assert_allclose(tp.moments(tokens.value).cov, exact.value.cov, rtol=1e-6)
    np.testing.assert_allclose(tokens.history["trace"], exact.history["trace"], rtol=1e-6)
    step = lambda head, cov: (np.eye(2) + np.asarray(tp.velocity(head, tp.Gaussian(np.zeros(2), cov)).matrix)) @ cov
    cov, J = np.asarray(START.cov), None
    for head in (HEAD, tp.Softmax(K, Q, -V), HEAD):
        J = step(head, cov) @ np.linalg.inv(cov)
        cov = J @ cov @ J.T
    np.testing.assert_allclose(exact.value.cov, cov, rtol=1e-12)


def test_wrong_arguments_are_named():
    wide = tp.Softmax(np.eye(3), np.eye(3), 1.0)
    with pytest.raises(ShapeError, match=r"heads\[1\] must have dimension 2 like heads\[0\], got 3"):
        tp.MultiHead([HEAD, wide])
    with pytest.raises(ArgumentError, match="heads must be a sequence of at least one attention, got list of length 0"):
        tp.MultiHead([])
    with pytest.raises(ArgumentError, match=r"heads\[0\] must be a Softmax"):
        tp.MultiHead([np.eye(2)])
    with pytest.raises(ShapeError, match="heads must divide the rows of Q: 3 heads and 4 rows"):
        tp.MultiHead.split(np.eye(4), np.eye(4), np.eye(4), heads=3)
    with pytest.raises(ShapeError, match="output must be given when V has 2 rows"):
        tp.MultiHead.split(np.eye(4), np.eye(4), np.eye(4)[:2], heads=2)
    with pytest.raises(ShapeError, match=r"b must have shape \(2,\) to match W, got \(3,\)"):
        tp.FeedForward(np.eye(2), np.zeros(3))
    with pytest.raises(ArgumentError, match="Sinkhorn looks at all tokens"):
        tp.Masked(tp.MultiHead([HEAD, tp.Sinkhorn(Q, K, V)]))
    with pytest.raises(ArgumentError, match="queries must be None for masked attention"):
        tp.Masked(HEAD).token_velocity(jnp.zeros((3, 2)), queries=jnp.zeros((1, 2)))
    with pytest.raises(ShapeError, match="layers must be of one kind and of equal shapes"):
        tp.Layered([HEAD, tp.L2(Q, K, V)])
    with pytest.raises(ShapeError, match=r"edges must have shape \(3,\) for 2 layers"):
        tp.Layered([HEAD, HEAD], edges=[0.0, 1.0])
    with pytest.raises(ArgumentError, match="edges must increase"):
        tp.Layered([HEAD, HEAD], edges=[0.0, 1.0, 1.0])
    with pytest.raises(ArgumentError, match="ask at"):
        tp.Layered([HEAD, HEAD]).velocity(jnp.zeros(2), jnp.eye(2))
    for variant in (tp.Masked(HEAD), tp.Sigmoid(Q, K, V), tp.Exponential(Q, K, V)):
        with pytest.raises(ArgumentError, match="attention must map Gaussians to Gaussians"):
            tp.GaussianFlow(variant)
        with pytest.raises(ArgumentError, match="does not map Gaussians to Gaussians"):
            tp.velocity(variant, START)
