"""The tiled kernels against dense arithmetic, their derivatives, and the memory of the compiled programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from hypothesis import given, settings, strategies as st
from scipy.special import logsumexp

from theorylab.transformer_pde import kernels

RNG = np.random.default_rng(0)
N, M, TILE = 45, 30, 16
QUERIES, KEYS, VALUES = (jnp.asarray(RNG.normal(size=shape)) for shape in ((M, 2), (N, 2), (N, 3)))
WEIGHTS = jnp.asarray(RNG.dirichlet(np.ones(N)))
average = jax.jit(kernels.tiled_average, static_argnums=(4, 5))


def dense(queries, keys, bias, values, causal=False):
    """Averages and effective sample sizes with all pairs in memory."""
    logits = np.asarray(queries @ keys.T + bias)
    if causal:
        logits = np.where(np.tri(len(queries), dtype=bool), logits, -np.inf)
    p = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    return p @ values, 1 / (p * p).sum(1)


@pytest.mark.parametrize("tile", [TILE, 1000])
def test_the_average_is_the_dense_softmax(tile):
    for found, expected in zip(average(QUERIES, KEYS, jnp.log(WEIGHTS), VALUES, tile), dense(QUERIES, KEYS, jnp.log(WEIGHTS), VALUES), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tile", [TILE, 1000])
def test_the_causal_average_sees_the_past_only(tile):
    bias = jnp.log(WEIGHTS)
    for found, expected in zip(average(KEYS, KEYS, bias, VALUES, tile, True), dense(KEYS, KEYS, bias, VALUES, True), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@settings(max_examples=15, deadline=None)
@given(size=st.floats(-3.0, 8.0), shift=st.floats(-1e6, 1e6), seed=st.integers(0, 100))
def test_logits_of_any_size_neither_overflow_nor_vanish(size, shift, seed):
    queries = jnp.asarray(10.0 ** (size / 2) * np.random.default_rng(seed).normal(size=(M, 2)))
    keys = 10.0 ** (size / 2) * KEYS
    found, sample_size = average(queries, keys, jnp.full(N, shift), VALUES, TILE)
    expected, expected_size = dense(queries, keys, 0.0, VALUES)
    slack = 1e-13 * (10.0**size + abs(shift))                                       # round-off of a logit is a relative error of its weight
    np.testing.assert_allclose(found, expected, atol=100 * slack + 1e-12)
    np.testing.assert_allclose(sample_size, expected_size, rtol=100 * slack + 1e-12)


def test_the_shift_is_left_out_where_no_logit_is_large_and_lanes_of_a_batch_decide_together():
    small = jax.jit(kernels._are_small, static_argnums=3)
    bias = jnp.zeros(N)
    reach = float(np.linalg.norm(QUERIES, axis=1).max() * np.linalg.norm(KEYS, axis=1).max())
    edge = np.log(np.finfo(float).max) / 3 / reach
    assert bool(small(0.99 * edge * QUERIES, KEYS, bias, False)) and not bool(small(1.01 * edge * QUERIES, KEYS, bias, False))
    assert not bool(small(jnp.nan * QUERIES, KEYS, bias, False)) and not bool(small(QUERIES, KEYS, bias - 1e3, False))
    barred = jnp.where(jnp.arange(N) == 0, -jnp.inf, 0.0)
    assert bool(small(QUERIES, KEYS, barred, False)) and not bool(small(KEYS, KEYS, barred, True))        # masked, the first query sees that key only
    batch = jnp.array([1.0, 0.99 * edge, 1.01 * edge])[:, None, None] * QUERIES
    for lanes in (batch[:2], batch):
        found = jax.vmap(lambda q: kernels.tiled_average(q, KEYS, bias, VALUES, TILE))(lanes)
        for i, queries in enumerate(lanes):
            expected, size = dense(queries, KEYS, 0.0, VALUES)
            np.testing.assert_allclose(found[0][i], expected, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(found[1][i], size, rtol=1e-10)


def test_tokens_of_weight_zero_do_not_count():
    bias = jnp.where(jnp.arange(N) < 2 * TILE, -jnp.inf, 0.0)                       # the first two tiles are empty
    found, sample_size = average(QUERIES, KEYS, bias, VALUES, TILE)
    expected, expected_size = dense(QUERIES, KEYS[2 * TILE:], 0.0, VALUES[2 * TILE:])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(sample_size, expected_size, rtol=1e-12)
    slope = jax.jvp(lambda q: kernels.tiled_average(q, KEYS, bias, VALUES, TILE)[0], (QUERIES,), (jnp.ones((M, 2)),))[1]
    assert np.isfinite(slope).all()


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_derivatives_are_those_of_the_dense_softmax(causal):
    def exact(keys, bias):
        logits = keys @ KEYS.T + bias
        logits = jnp.where(np.tri(N, dtype=bool), logits, -jnp.inf) if causal else logits
        p = jax.nn.softmax(logits)
        return ((p @ VALUES) ** 2).sum() + (1 / (p * p).sum(1)).sum()

    def tiled(keys, bias):
        found, sample_size = kernels.tiled_average(keys, KEYS, bias, VALUES, TILE, causal)
        return (found**2).sum() + sample_size.sum()

    at = KEYS, jnp.log(WEIGHTS)
    expected = jax.grad(exact, (0, 1))(*at)
    for found, e in zip(jax.jit(jax.grad(tiled, (0, 1)))(*at), expected, strict=True):
        np.testing.assert_allclose(found, e, rtol=1e-9, atol=1e-11)
    tangent = jax.jit(lambda *at: jax.jvp(tiled, at, (jnp.ones((N, 2)), jnp.ones(N)))[1])(*at)
    assert float(tangent) == pytest.approx(float(expected[0].sum() + expected[1].sum()), rel=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_the_sum_is_the_dense_sum(causal):
    weight = np.tanh(np.asarray(KEYS @ KEYS.T)) * (np.tri(N) if causal else 1)
    np.testing.assert_allclose(kernels.tiled_sum(KEYS, KEYS, VALUES, TILE, jnp.tanh, causal), weight @ VALUES, rtol=1e-12, atol=1e-13)


def test_single_precision_stays_single_and_a_batch_is_its_parts():
    single = [jnp.asarray(a, jnp.float32) for a in (QUERIES, KEYS, jnp.log(WEIGHTS), VALUES)]
    found, sample_size = average(*single, TILE)
    assert found.dtype == sample_size.dtype == jnp.float32
    np.testing.assert_allclose(found, dense(QUERIES, KEYS, jnp.log(WEIGHTS), VALUES)[0], rtol=1e-4, atol=1e-5)
    batch = jnp.stack([QUERIES, 2 * QUERIES])
    both = jax.vmap(lambda q: kernels.tiled_average(q, KEYS, jnp.log(WEIGHTS), VALUES, TILE)[0])(batch)
    for one, q in zip(both, batch, strict=True):
        np.testing.assert_allclose(one, dense(q, KEYS, jnp.log(WEIGHTS), VALUES)[0], rtol=1e-11, atol=1e-13)


def temporary(function, *shapes):
    """Bytes of temporary memory of the compiled program."""
    return jax.jit(function).lower(*[jax.ShapeDtypeStruct(s, float) for s in shapes]).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["average", "causal", "sum", "sinkhorn", "gradient"])
def test_no_program_has_a_buffer_of_all_pairs(name):
    n, d, tile = 8192, 2, 64
    programs = {
        "average": lambda x: kernels.tiled_average(x, x, x[:, 0], x, tile),
        "causal": lambda x: kernels.tiled_average(x, x, x[:, 0], x, tile, True),
        "sum": lambda x: kernels.tiled_sum(x, x, x, tile, jnp.exp),
        "sinkhorn": lambda x: kernels.sinkhorn_bias(x, x, x[:, 0], tile),
        "gradient": jax.grad(lambda x: kernels.tiled_average(x, x, x[:, 0], x, tile)[0].sum()),
    }
    # a gradient keeps the running sums of one tile of queries for every tile of keys: as much as one column per token
    assert temporary(programs[name], (n, d)) < 60 * n * (d + 2) * 8 + 20 * tile**2 * 8 < n * n


@pytest.mark.slow
def test_sinkhorn_potentials_are_those_of_pot():
    keys = QUERIES @ np.array([[0.8, 0.3], [-0.2, 0.9]])
    w = RNG.dirichlet(np.ones(M))
    lw = jnp.log(jnp.asarray(w))
    g, error = jax.jit(kernels.sinkhorn_bias, static_argnums=3)(QUERIES, keys, lw, TILE)
    assert float(error) < 1e-11
    logits = np.asarray(QUERIES @ keys.T)
    plan = ot.sinkhorn(w, w, -logits, 1.0, method="sinkhorn_log", stopThr=1e-14, numItermax=10000)
    rows = kernels.tiled_average(QUERIES, keys, g + lw, keys, TILE)[0]
    np.testing.assert_allclose(rows, plan @ np.asarray(keys) / plan.sum(1, keepdims=True), rtol=1e-9, atol=1e-11)
    f = -logsumexp(logits + np.asarray(g + lw), axis=1)
    columns = np.exp(f[:, None] + logits + np.asarray(g)) * w[:, None]
    np.testing.assert_allclose(columns.sum(0), 1.0, rtol=1e-10)
    assert w @ np.asarray(g) == pytest.approx(0.0, abs=1e-11)


def test_sinkhorn_needs_far_fewer_updates_than_the_alternating_scheme():
    queries = jnp.asarray(4 * RNG.normal(size=(N, 2)))                              # a temperature of a quarter
    logits, lw, g = np.asarray(queries @ KEYS.T), np.full(N, -np.log(N)), np.zeros(N)
    change, alternating = np.inf, 0
    while change > 1e-10 and alternating < 1000:
        f = -logsumexp(logits + g + lw, axis=1)
        old, g = g, -logsumexp(logits + (f + lw)[:, None], axis=0)
        change, alternating = np.abs(g - old).max(), alternating + 1
    assert change < 1e-10
    found, error = kernels.sinkhorn_bias(queries, KEYS, jnp.asarray(lw), TILE, max_iterations=alternating // 2)
    assert float(error) < 1e-10
    np.testing.assert_allclose(found, g - g.mean(), atol=1e-8)


def test_a_limit_on_iterations_shows_in_the_error():
    assert float(kernels.sinkhorn_bias(QUERIES, 3 * QUERIES, jnp.full(M, -np.log(M)), TILE, max_iterations=2)[1]) > 1e-6


def test_sinkhorn_in_single_precision_stops_at_its_round_off():
    single = [jnp.asarray(a, jnp.float32) for a in (QUERIES, QUERIES, np.full(M, -np.log(M)))]
    g, error = kernels.sinkhorn_bias(*single, TILE, max_iterations=200)
    assert g.dtype == jnp.float32 and float(error) < 1e-4


@pytest.mark.slow
def test_the_derivative_of_sinkhorn_is_that_of_its_solution():
    lw, direction = jnp.full(M, -jnp.log(M)), jnp.asarray(RNG.normal(size=(M, 2)))

    def loss(q):
        g, _ = kernels.sinkhorn_bias(q, QUERIES, lw, TILE)
        return (kernels.tiled_average(q, QUERIES, g + lw, QUERIES, TILE)[0] ** 2).sum()

    at = QUERIES
    run, h = jax.jit(loss), 1e-5
    difference = float(run(at + h * direction) - run(at - h * direction)) / (2 * h)
    tangent = jax.jit(lambda q: jax.jvp(loss, (q,), (direction,))[1])(at)
    assert float(tangent) == pytest.approx(difference, rel=1e-7)
    assert float((jax.jit(jax.grad(loss))(at) * direction).sum()) == pytest.approx(difference, rel=1e-7)
