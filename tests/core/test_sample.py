"""Minibatch streams and random matrices: exact properties by counting, laws by moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st

from theorylab.core import sample
from theorylab.errors import ArgumentError, PrecisionError, ShapeError

SIZES = [(1, 1), (5, 2), (16, 16), (100, 7)]


@pytest.mark.parametrize(("n", "batch_size"), SIZES)
def test_a_pass_visits_rows_at_most_once_and_leaves_out_fewer_than_a_batch(n, batch_size):
    per_pass = n // batch_size
    batches = jax.vmap(lambda step: sample.minibatch(3, n, batch_size, step))(jnp.arange(3 * per_pass))
    for seen in np.asarray(batches).reshape(3, -1):
        assert len(set(seen.tolist())) == len(seen) == per_pass * batch_size
        assert seen.min() >= 0 and seen.max() < n
    assert batches.dtype == jnp.int32


def test_a_batch_is_a_function_of_key_and_step_alone():
    alone = sample.minibatch(7, 1000, 4, 123_456)
    together = jax.jit(jax.vmap(lambda step: sample.minibatch(7, 1000, 4, step)))(jnp.arange(123_455, 123_458))
    np.testing.assert_array_equal(alone, together[1])
    np.testing.assert_array_equal(alone, sample.minibatch(jax.random.key(7), 1000, 4, np.int32(123_456)))
    assert (np.asarray(sample.minibatch(8, 1000, 4, 123_456)) != np.asarray(alone)).any()


def test_passes_have_different_orders():
    orders = np.asarray(jax.vmap(lambda step: sample.minibatch(0, 50, 50, step))(jnp.arange(20)))
    assert len({tuple(order) for order in orders}) == 20


def test_orders_of_few_rows_are_uniform():
    # 24 orders of 4 rows, 4800 passes: chi-square with 23 degrees of freedom
    orders = np.asarray(jax.vmap(lambda step: sample.minibatch(1, 4, 4, step))(jnp.arange(4800)))
    counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_position_and_row_are_independent_and_neighbours_are_unrelated():
    # 2000 passes over 12 rows: each row at each position, and each ordered pair of neighbours, equally often
    orders = np.asarray(jax.vmap(lambda step: sample.minibatch(2, 12, 12, step))(jnp.arange(2000)))
    places = np.stack([np.bincount(orders[:, j], minlength=12) for j in range(12)])
    statistic = np.sum((places - 2000 / 12) ** 2 / (2000 / 12))
    assert 1e-3 < scipy.stats.chi2.sf(statistic, 11 * 11) < 1 - 1e-3
    pairs = np.bincount((12 * orders[:, :-1] + orders[:, 1:]).ravel(), minlength=144).reshape(12, 12)
    pairs = pairs[~np.eye(12, dtype=bool)]
    assert scipy.stats.chisquare(pairs).pvalue > 1e-3


@pytest.mark.parametrize("n", [2**31 - 1, 10**6])
def test_large_streams_stay_in_range_without_repeats(n):
    rows = np.asarray(sample.minibatch(0, n, 512, 10))
    assert len(set(rows.tolist())) == 512 and rows.min() >= 0 and rows.max() < n
    assert abs(rows.mean() / n - 0.5) < 0.06  # 4.7 standard errors


def test_with_replacement_rows_repeat():
    rows = np.asarray(sample.minibatch(0, 10, 1000, 5, replace=True))
    assert scipy.stats.chisquare(np.bincount(rows, minlength=10)).pvalue > 1e-3


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_spd_with_spectrum_has_the_spectrum(seed):
    values = np.array([0.0, 1e-3, 1.0, 7.0])
    matrix = np.asarray(sample.spd_with_spectrum(seed, values))
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), values, atol=1e-14)


def test_random_orthogonal_is_orthogonal_and_its_frame_is_its_first_columns_in_law():
    q, frame = np.asarray(sample.random_orthogonal(0, 4)), np.asarray(sample.random_orthogonal(0, 4, 2))
    np.testing.assert_allclose(q.T @ q, np.eye(4), atol=1e-14)
    np.testing.assert_allclose(frame.T @ frame, np.eye(2), atol=1e-14)


def test_random_orthogonal_is_haar():
    # the trace of a Haar matrix of size 3 has mean 0 and second moment 1; entries have mean 0; both signs of the determinant are equally likely
    many = np.asarray(jax.vmap(lambda k: sample.random_orthogonal(k, 3))(jax.random.split(jax.random.key(0), 4000)))
    traces = np.trace(many, axis1=1, axis2=2)
    assert abs(traces.mean()) < 4 / np.sqrt(4000)
    assert abs((traces**2).mean() - 1) < 4 * (traces**2).std() / np.sqrt(4000)
    assert np.abs(many.mean(axis=0)).max() < 4.5 / np.sqrt(3 * 4000)
    assert abs((np.linalg.det(many) > 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


@pytest.mark.parametrize("dof", [2, 5])
def test_wishart_has_the_moments_and_the_rank_of_its_law(dof):
    many = np.asarray(jax.vmap(lambda k: sample.wishart(k, 3, dof))(jax.random.split(jax.random.key(1), 4000)))
    assert set(np.linalg.matrix_rank(many[:50], hermitian=True)) == {min(dof, 3)}
    np.testing.assert_allclose(many.mean(axis=0), dof * np.eye(3), atol=5 * np.sqrt(2 * dof / 4000))
    variance = many.var(axis=0)  # of W_ij: dof (1 + [i = j])
    np.testing.assert_allclose(variance, dof * (1 + np.eye(3)), rtol=0.25)


def test_wishart_determinant_has_the_law_of_a_product_of_chi_squares():
    many = np.asarray(jax.vmap(lambda k: sample.wishart(k, 3, 5))(jax.random.split(jax.random.key(2), 4000)))
    expected = sum(scipy.special.digamma((5 - i) / 2) + np.log(2) for i in range(3))
    found = np.linalg.slogdet(many)[1]
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(4000)


def test_low_rank_factor_has_covariance_of_mean_identity():
    many = np.asarray(jax.vmap(lambda k: sample.low_rank_factor(k, 3, 2))(jax.random.split(jax.random.key(3), 4000)))
    np.testing.assert_allclose((many @ many.transpose(0, 2, 1)).mean(axis=0), np.eye(3), atol=5 / np.sqrt(4000))


def test_float32_on_request_and_by_data():
    for draw in (lambda: sample.random_orthogonal(0, 3, dtype="float32"), lambda: sample.wishart(0, 3, 5, dtype="float32"),
                 lambda: sample.low_rank_factor(0, 3, 2, dtype="float32"), lambda: sample.spd_with_spectrum(0, np.ones(3, np.float32))):
        assert jax.eval_shape(draw).dtype == jnp.float32


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: sample.minibatch(0, 10, 11, 0), ArgumentError, "batch_size must be a whole number at least 1 and at most 10, got 11"),
    (lambda: sample.minibatch(0, 2**31, 1, 0), ArgumentError, "n must be a whole number"),
    (lambda: sample.minibatch(0, 10, 2, -1), ArgumentError, "step must be a whole number at least 0, got -1"),
    (lambda: sample.minibatch("seed", 10, 2, 0), ArgumentError, "key must be an integer seed"),
    (lambda: sample.random_orthogonal(0, 3, 4), ArgumentError, "columns must be a whole number at least 1 and at most 3"),
    (lambda: sample.random_orthogonal(0, 3, dtype="float16"), PrecisionError, "dtype must be float32 or float64"),
    (lambda: sample.spd_with_spectrum(0, [1.0, -1.0]), ArgumentError, "smallest of eigenvalues must be a number at least 0, got -1"),
    (lambda: sample.spd_with_spectrum(0, np.eye(2)), ShapeError, r"eigenvalues must have shape \(any,\)"),
    (lambda: sample.wishart(0, 3, 0), ArgumentError, "dof must be a whole number at least 1"),
    (lambda: sample.low_rank_factor(0, 3, 0), ArgumentError, "rank must be a whole number at least 1"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
