"""The likelihood and the sums of one pass: golden numbers, autodiff, invariances."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from tests.moe import cases
from theorylab import errors, moe

S1 = moe.example("S1")


def wide(dim: int, rows: int = 60) -> tuple[moe.Likelihood, moe.Mixture]:
    """Random data and mixture of four experts, K = 2; inputs far from 0 and of unequal scales."""
    rng = np.random.default_rng(dim)
    m = moe.Mixture(rng.normal(size=4), rng.normal(size=(4, dim)), rng.normal(size=(4, dim)), rng.normal(size=4), rng.uniform(0.5, 2, 4), 2, "logit")
    x = (rng.normal(size=(rows, dim)) + 2) * np.linspace(0.2, 1, dim)
    return moe.Likelihood(x, rng.normal(size=rows), 4, 2, "logit", rng.uniform(0.5, 2, rows)), m


def assert_same(one: moe.Statistics, two: moe.Statistics, rtol: float = 1e-12) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.max(np.abs(b))))


def test_the_log_likelihood_is_the_golden_one():
    assert abs(float(cases.s1_likelihood().log_likelihood(S1)) - cases.A5_TRUTH_LIKELIHOOD) < 1e-11
    assert abs(float(cases.a2_likelihood().metrics(cases.A2_START)["log_likelihood"]) - cases.A2_LOG_LIKELIHOOD) < 1e-12


@pytest.mark.parametrize("dim", [2, 5])
def test_sums_are_those_of_plain_loops(dim):
    likelihood, m = wide(dim)
    sums = moe.statistics(likelihood, m)
    w, r, pi = np.asarray(likelihood.weight)[:, None], np.asarray(m.responsibilities(likelihood.x, likelihood.y)), np.asarray(m.gate(likelihood.x))
    z = np.column_stack([np.ones(60), (likelihood.x - likelihood.center) / likelihood.scale])
    e = np.asarray(likelihood.y)[:, None] - np.asarray(likelihood.x @ m.expert_coef.T + m.expert_intercept)
    blocks = np.einsum("ij,jl,ip,iq->jlpq", w * pi, np.eye(4), z, z) - np.einsum("ij,il,ip,iq->jlpq", w * pi, pi, z, z)
    expected = moe.Statistics(np.sum(w[:, 0] * m.log_density(likelihood.x, likelihood.y)), (w * r).sum(0), np.einsum("ij,ip,iq->jpq", w * r, z, z),
                              (w * r * e).T @ z, (w * r * e * e).sum(0), (w * (r - pi)).T @ z, (w * pi * (1 - pi)).sum(0), (w * pi).sum(0), blocks)
    assert_same(sums, jax.tree.map(jnp.asarray, expected))
    cheap = moe.statistics(likelihood, m, curvature=False)
    assert cheap.gate_curvature is None
    np.testing.assert_allclose(cheap.gate_impurity, sums.gate_impurity, rtol=1e-12)


def test_gate_derivatives_are_those_of_autodiff():
    likelihood, m = wide(2)
    sums, mask = moe.statistics(likelihood, m), m.routing(likelihood.x)
    r, w = m.responsibilities(likelihood.x, likelihood.y), likelihood.weight
    z = np.column_stack([np.ones(60), (likelihood.x - likelihood.center) / likelihood.scale])
    start = jnp.asarray(m.gate_matrix[:, 1:] * likelihood.scale)
    start = jnp.concatenate([m.gate_intercept[:, None] + m.gate_coef @ likelihood.center[:, None], start], axis=1)

    @jax.jit
    def objective(gate):
        logits = jnp.where(mask, z @ gate.T, -jnp.inf)
        log_pi = logits - jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)
        return jnp.sum(w[:, None] * r * jnp.where(mask, log_pi, 0))

    np.testing.assert_allclose(sums.gate_gradient, jax.jit(jax.grad(objective))(start), atol=1e-12)
    np.testing.assert_allclose(sums.gate_curvature, -jax.jit(jax.hessian(objective))(start).transpose(0, 2, 1, 3), atol=1e-11)


def test_the_score_is_the_gradient_of_the_log_likelihood():
    likelihood, m = wide(2)
    from theorylab.moe.em import score

    gate, experts, variance = score(likelihood, m, moe.statistics(likelihood, m))
    exact = jax.grad(likelihood.log_likelihood)(m)
    np.testing.assert_allclose(gate, exact.gate_matrix, atol=1e-11)
    np.testing.assert_allclose(experts, exact.expert_matrix, atol=1e-11)
    np.testing.assert_allclose(variance, exact.variance, atol=1e-11)


def test_bohning_bounds_dominate_the_curvature():
    likelihood, m = wide(2)
    blocks = np.asarray(moe.statistics(likelihood, m).gate_curvature)
    curvature = blocks.transpose(0, 2, 1, 3).reshape(12, 12)
    z = np.column_stack([np.ones(60), (likelihood.x - likelihood.center) / likelihood.scale])
    mask, w = np.asarray(m.routing(likelihood.x), float), np.asarray(likelihood.weight)
    per_row = (np.einsum("ij,jl->ijl", mask, np.eye(4)) - np.einsum("ij,il->ijl", mask, mask) / 2) / 2
    sharp = np.einsum("i,ijl,ip,iq->jplq", w, per_row, z, z).reshape(12, 12)
    dense = np.kron((np.eye(4) - 1 / 4) / 2, np.einsum("i,ip,iq->pq", w, z, z))
    size = np.linalg.eigvalsh(curvature)[-1]
    for bound in (sharp, dense):
        assert np.linalg.eigvalsh(bound - curvature)[0] > -1e-12 * size
    assert np.linalg.eigvalsh(curvature)[0] > -1e-12 * size


@pytest.mark.parametrize("chunk", [25, pytest.param(7, marks=pytest.mark.slow), pytest.param(59, marks=pytest.mark.slow)])
def test_sums_do_not_depend_on_chunks(chunk):
    likelihood, m = wide(2)
    cut = likelihood.replace(chunk=chunk)
    assert_same(moe.statistics(cut, m), moe.statistics(likelihood, m))
    assert abs(float(cut.log_likelihood(m) - likelihood.log_likelihood(m))) < 1e-11


def test_rows_of_weight_zero_and_repeated_rows_change_nothing():
    likelihood, m = wide(2)
    x, y, w = (np.asarray(a) for a in (likelihood.x, likelihood.y, likelihood.weight))
    padded = moe.Likelihood(np.vstack([x, 100 + x[:9]]), np.append(y, -50 + y[:9]), 4, 2, "logit", np.append(w, np.zeros(9)))
    doubled = moe.Likelihood(np.vstack([x, x]), np.append(y, y), 4, 2, "logit", np.append(w, 2 * w) / 3)
    for other in (padded, doubled):
        np.testing.assert_allclose(other.center, likelihood.center, rtol=1e-13)
        assert_same(moe.statistics(other, m), moe.statistics(likelihood, m))


def test_shards_add_to_the_sums_of_all_rows():
    likelihood, m = wide(2)
    parts = [a.reshape(3, 20, *a.shape[1:]) for a in (likelihood.x, likelihood.y, likelihood.weight)]

    def shard(x, y, weight):
        mine = moe.Likelihood(x, y, 4, 2, "logit", weight, axis="rows")
        return moe.statistics(mine, m), mine.log_likelihood(m)

    sums, value = jax.vmap(shard, axis_name="rows")(*parts)
    for i in range(3):
        assert_same(jax.tree.map(lambda a, i=i: a[i], sums), moe.statistics(likelihood, m))
        assert abs(float(value[i] - likelihood.log_likelihood(m))) < 1e-11


def test_a_frozen_routing_can_be_given():
    likelihood, m = wide(2)
    mask = likelihood.routing(m)
    moved = m.replace(gate_coef=-m.gate_coef)
    assert float(likelihood.log_likelihood(m, mask) - likelihood.log_likelihood(m)) == 0
    assert float(likelihood.log_likelihood(moved, mask)) != float(likelihood.log_likelihood(moved))


def test_a_stream_has_the_moments_of_all_rows_and_feeds_batches():
    likelihood, m = wide(2)
    data = (np.asarray(likelihood.x), np.asarray(likelihood.y))
    whole = moe.Likelihood(*data, 4, 2, "logit")
    rows = tl.Rows(data, 25, remainder="weight")
    streamed = moe.Likelihood.streamed(rows, 4, 2, "logit")
    np.testing.assert_allclose(streamed.center, whole.center, rtol=1e-13)
    np.testing.assert_allclose(streamed.scale, whole.scale, rtol=1e-12)
    np.testing.assert_allclose(streamed.spread, whole.spread, rtol=1e-12)
    parts = [moe.statistics(streamed.feed(jax.tree.map(jnp.asarray, rows.batch(i))), m) for i in range(3)]
    assert_same(jax.tree.map(lambda *a: sum(a[1:], a[0]), *parts), moe.statistics(whole, m), rtol=1e-11)


def test_single_precision_data_give_single_sums_and_a_double_likelihood():
    likelihood = cases.s1_likelihood(dtype=jnp.float32)
    m = jax.tree.map(lambda a: a.astype(jnp.float32), S1)
    sums = moe.statistics(likelihood, m)
    assert {a.dtype.name for a in jax.tree.leaves(sums)[1:]} == {"float32"}
    assert sums.log_likelihood.dtype == jnp.float64
    assert abs(float(sums.log_likelihood) - cases.A5_TRUTH_LIKELIHOOD) < 1e-3


def test_dependent_columns_are_reported():
    x, y = cases.s1_data(40)
    with pytest.warns(errors.RunWarning, match="linearly dependent"):
        moe.Likelihood(np.column_stack([x, np.ones(40)]), y, 3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe.Likelihood(x + 1e4, y, 3, 2)


@pytest.mark.slow
def test_solve_maximizes_the_likelihood_without_choices():
    data = moe.weyl_sample(moe.example("S2"), 400)
    likelihood = moe.Likelihood(*data, 2, 2)
    fit = tl.solve(likelihood, steps=3000)
    assert fit.status == tl.Status.CONVERGED
    assert fit.history["score_norm"][-1] < 1e-6
    assert float(likelihood.log_likelihood(fit.value)) > float(likelihood.log_likelihood(moe.example("S2")))


def bad(**changes):
    x, y = cases.s1_data(20)
    return moe.Likelihood(**{"x": x, "y": y, "experts": 3, "active": 2} | changes)


X, Y = (np.asarray(a) for a in cases.s1_data(20))
HOLE = np.where(np.arange(20) == 7, np.nan, Y)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: bad(active=4), errors.ArgumentError, "active must be a whole number at least 1 and at most 3, got 4"),
    (lambda: bad(active=0), errors.ArgumentError, "active"),
    (lambda: bad(experts=0), errors.ArgumentError, "experts"),
    (lambda: bad(experts=7), errors.ArgumentError, r"at least experts \(d \+ 2\) = 21 rows of positive weight, got 20"),
    (lambda: bad(weight=np.arange(20) < 8), errors.ArgumentError, "rows of positive weight, got 8"),
    (lambda: bad(y=HOLE), errors.NonFiniteInputError, r"y must be finite, got nan at index \(7,\)"),
    (lambda: bad(x=X * np.inf), errors.NonFiniteInputError, "x must be finite"),
    (lambda: bad(y=Y[:-1]), errors.ShapeError, "y must have shape"),
    (lambda: bad(x=np.zeros((20, 1, 1))), errors.ShapeError, "x must have shape"),
    (lambda: bad(y=np.ones(20)), errors.ArgumentError, "y must vary"),
    (lambda: bad(selection="both"), ValueError, "selection must be one of 'slope', 'logit', got 'both'"),
    (lambda: bad(weight=-np.ones(20)), errors.ArgumentError, "weight must not be negative"),
    (lambda: bad(weight=np.ones(3)), errors.ShapeError, "weight must have shape"),
    (lambda: bad(y=Y.astype(np.float32)), errors.PrecisionError, "y"),
    (lambda: bad(chunk=0), errors.ArgumentError, "chunk"),
    (lambda: bad().check_mixture(3), errors.ArgumentError, "x0 must be a Mixture"),
    (lambda: bad().check_mixture(moe.example("S2")), errors.ShapeError, "must have 3 experts of 1 inputs"),
    (lambda: bad().check_mixture(moe.example("S1", active=3)), errors.ArgumentError, "active=2"),
    (lambda: bad().check_mixture(moe.example("S1", selection="logit")), errors.ArgumentError, "selection='slope'"),
    (lambda: bad().feed((np.zeros((4, 2)), np.zeros(4))), errors.ShapeError, r"\(rows, 1\)"),
    (lambda: bad().feed(np.zeros(4)), errors.ArgumentError, "a batch must be"),
    (lambda: moe.Likelihood.streamed(tl.Rows((X, Y), 8), 2, 1), errors.ArgumentError, "remainder='weight'"),
    (lambda: moe.Likelihood.streamed(tl.Rows((X, Y), 5), 2, 1), errors.ArgumentError, "batches of at least"),
    (lambda: moe.Likelihood.streamed(tl.Batches(iter([])), 2, 1), errors.ArgumentError, "per_pass"),
])
def test_wrong_arguments_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
