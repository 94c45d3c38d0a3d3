"""States: the rule of the initial factor, sampling and quadrature, moments, ranks, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, MatrixError, NonFiniteInputError, ShapeError


def covariance(rng: np.random.Generator, dim: int, rank: int) -> np.ndarray:
    root = rng.normal(size=(dim, rank))
    return root @ root.T


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 10**6))
def test_the_factor_has_the_rank_of_the_covariance_and_gives_it_back(dim, rank, seed):
    rank = min(dim, rank)
    cov = covariance(np.random.default_rng(seed), dim, rank)
    state = tp.Gaussian(np.zeros(dim), cov)
    assert state.factor.shape == (dim, max(rank, 1)) and state.columns == max(rank, 1)      # the zero covariance keeps one zero column
    np.testing.assert_allclose(state.cov, cov, atol=1e-13 * max(np.abs(cov).max(), 1))
    assert np.array_equal(state.cov, state.cov.T)


def test_a_rank_that_a_cholesky_factor_would_misreport_is_decided_by_the_spectrum():
    root = np.array([[0.1, 0.7], [0.3, 0.2], [0.5, 0.9]])
    cov = root @ root.T + 1e-17 * np.eye(3)
    assert tp.Gaussian(np.zeros(3), cov).columns == 2
    assert tp.Gaussian(np.zeros(2), np.diag([1.0, 1e-12])).columns == 2                      # small, but not round-off


def test_a_given_factor_is_kept_as_it_is():
    factor = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    state = tp.Gaussian.from_factor(np.ones(2), factor)
    assert np.array_equal(state.factor, factor) and state.columns == 3 and int(tp.effective_rank(state)) == 1


def test_leading_axes_are_starts_with_one_factor_shape(rng):
    covs = np.stack([covariance(rng, 3, 2), covariance(rng, 3, 1), np.zeros((3, 3))])
    state = tp.Gaussian(np.zeros(3), covs)
    assert state.factor.shape == (3, 3, 2) and state.mean.shape == (3, 3)
    np.testing.assert_allclose(state.cov, covs, atol=1e-13)
    assert tp.effective_rank(state).tolist() == [2, 1, 0]


def test_a_traced_covariance_gets_its_symmetric_root():
    cov = np.array([[2.0, 0.5], [0.5, 1.0]])
    factor = jax.jit(lambda c: tp.Gaussian(jnp.zeros(2), c).factor)(cov)
    np.testing.assert_allclose(factor @ factor, cov, rtol=1e-13)
    np.testing.assert_allclose(factor, factor.T, rtol=1e-13)


def test_states_are_pytrees_and_copies_are_checked():
    state = tp.Gaussian.standard(2)
    assert [a.shape for a in jax.tree.leaves(state)] == [(2,), (2, 2)]
    moved = state.replace(mean=np.ones(2))
    assert moved.mean.tolist() == [1.0, 1.0] and np.array_equal(moved.factor, state.factor)
    np.testing.assert_allclose(state.replace(cov=4 * np.eye(2)).factor, 2 * np.eye(2))
    with pytest.raises(ArgumentError, match="replace takes mean and cov, got factor"):
        state.replace(factor=np.eye(2))


def test_samples_have_the_moments_of_the_state_and_are_addressed_by_the_key():
    mean, cov = np.array([1.0, -2.0]), np.array([[2.0, 0.6], [0.6, 0.5]])
    state = tp.Gaussian(mean, cov)
    cloud = state.sample(40_000, key=1)
    error = 5 / np.sqrt(40_000)                                                              # five standard errors of unit normals
    np.testing.assert_allclose(cloud.points.mean(0), mean, atol=error * np.sqrt(2))
    np.testing.assert_allclose(np.cov(np.asarray(cloud.points).T), cov, atol=error * 2 * np.sqrt(2))
    assert np.array_equal(cloud.points, state.sample(40_000, key=jax.random.key(1)).points)
    assert not np.array_equal(state.sample(3, key=1).points, state.sample(3, key=2).points)


def test_quadrature_integrates_polynomials_exactly():
    cov = np.array([[1.5, 0.4, 0.0], [0.4, 0.7, 0.2], [0.0, 0.2, 0.9]])
    cloud = tp.Gaussian(np.zeros(3), cov).quadrature(6)
    x, w = np.asarray(cloud.points), np.asarray(cloud.weights)
    fourth = lambda i, j, k, m: cov[i, j] * cov[k, m] + cov[i, k] * cov[j, m] + cov[i, m] * cov[j, k]     # Isserlis
    for index in ((0, 0, 0, 0), (0, 1, 1, 2), (0, 0, 1, 2)):
        assert w @ np.prod(x[:, list(index)], axis=1) == pytest.approx(fourth(*index), rel=1e-12)
    assert w.sum() == pytest.approx(1, abs=1e-14) and tp.Gaussian(np.zeros(3), np.diag([1.0, 0, 0])).quadrature(6).count == 6


def test_far_nodes_are_dropped():
    cloud = tp.Gaussian.standard(1).quadrature(100)
    assert cloud.count < 100 and float(cloud.weights.min()) > 1e-23
    assert float(tp.moments(cloud).cov[0, 0]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_those_of_numpy(weighted, rng):
    points, weights = rng.normal(size=(7, 3)), rng.dirichlet(np.ones(7)) if weighted else None
    state = tp.moments(tp.Cloud(points, weights))
    np.testing.assert_allclose(state.mean, np.average(points, axis=0, weights=weights), rtol=1e-13)
    np.testing.assert_allclose(state.cov, np.cov(points.T, aweights=weights, ddof=0), rtol=1e-12)
    if not weighted:
        np.testing.assert_array_equal(tp.moments(points).cov, state.cov)


def test_a_cloud_knows_its_weights_also_when_none_were_given():
    cloud = tp.Gaussian.standard(2).sample(8, key=0)
    assert cloud.weights.tolist() == [0.125] * 8
    assert len(jax.tree.leaves(cloud)) == 1                                       # equal weights take no memory
    heavier = cloud.replace(weights=np.arange(8) / 28.0)
    assert heavier.points is cloud.points and float(heavier.weights[7]) == 0.25
    with pytest.raises(ArgumentError, match="replace takes points and weights, got mass"):
        cloud.replace(mass=1.0)


def test_small_eigenvalues_of_a_factor_are_seen_far_below_round_off():
    state = tp.Gaussian.from_factor(np.zeros(2), np.array([[1.0, 1.0], [1.0, 1.0 + 1e-9]]))
    assert int(tp.effective_rank(state, tolerance=1e-20)) == 2 and int(tp.effective_rank(state)) == 1


def test_float32_stays_float32():
    state = tp.Gaussian(jnp.zeros(2, jnp.float32), jnp.eye(2, dtype=jnp.float32))
    assert {a.dtype.name for a in jax.tree.leaves((state, state.cov, state.sample(3), state.quadrature(4)))} == {"float32"}


BAD = {
    "not square": (lambda: tp.Gaussian(np.zeros(2), np.ones((2, 3))), ShapeError, r"cov must be a square matrix .* got shape \(2, 3\)"),
    "mean": (lambda: tp.Gaussian(np.zeros(3), np.eye(2)), ShapeError, r"mean must have 2 entries to match cov, got shape \(3,\)"),
    "mean axes": (lambda: tp.Gaussian(np.zeros((4, 2)), np.eye(2)), ShapeError, "mean must have leading axes"),
    "not symmetric": (lambda: tp.Gaussian(np.zeros(2), [[1.0, 0.1], [0.0, 1.0]]), MatrixError, r"cov must be symmetric, .* \(cov \+ cov.T\) / 2"),
    "indefinite": (lambda: tp.Gaussian(np.zeros(2), np.diag([1.0, -0.1])), MatrixError, "definite, got the eigenvalue -0.1"),
    "NaN": (lambda: tp.Gaussian(np.zeros(2), [[np.nan, 0.0], [0.0, 1.0]]), NonFiniteInputError, r"cov must be finite, got nan at index \(0, 0\)"),
    "inf mean": (lambda: tp.Gaussian([np.inf, 0.0], np.eye(2)), NonFiniteInputError, "mean must be finite, got inf"),
    "factor": (lambda: tp.Gaussian.from_factor(np.zeros(2), np.zeros(2)), ShapeError, r"factor must have shape \(dim, rank\)"),
    "factor dim": (lambda: tp.Gaussian.from_factor(np.zeros(3), np.eye(2)), ShapeError, "mean must have 2 entries to match factor"),
    "dim": (lambda: tp.Gaussian.standard(0), ArgumentError, "dim must be a whole number of at least 1, got 0"),
    "count": (lambda: tp.Gaussian.standard(2).sample(2.5), ArgumentError, "count must be a whole number of at least 1, got 2.5"),
    "order": (lambda: tp.Gaussian.standard(5).quadrature(50), ArgumentError, "order must give at most 2000000 nodes"),
    "points": (lambda: tp.Cloud(np.zeros(3)), ShapeError, r"points must have shape \(count, dim\)"),
    "weights shape": (lambda: tp.Cloud(np.zeros((3, 2)), np.ones(2) / 2), ShapeError, r"weights must have shape \(3,\)"),
    "weights sign": (lambda: tp.Cloud(np.zeros((2, 2)), [1.5, -0.5]), ArgumentError, "non-negative and sum to one, got smallest -0.5"),
    "weights sum": (lambda: tp.Cloud(np.zeros((2, 2)), [0.5, 0.4]), ArgumentError, "and sum 0.9"),
    "tokens without entries": (lambda: tp.Cloud(np.zeros((3, 0))), ShapeError, r"points must have shape \(count, dim\)"),
    "moments": (lambda: tp.moments(tp.Gaussian.standard(2)), ArgumentError, "cloud must be a Cloud or an array of tokens, got Gaussian"),
    "rank of a vector": (lambda: tp.effective_rank(np.ones(3)), ShapeError, "state must be a Gaussian or a square matrix"),
    "tolerance": (lambda: tp.effective_rank(np.eye(2), tolerance=2.0), ArgumentError, "tolerance must be above 0 and below 1, got 2.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
