"""Symmetric pencils and B-orthonormal bases against SciPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings, strategies as st

from theorylab.core import pencil
from theorylab.errors import MatrixError, PrecisionError, ShapeError, UnknownNameError

N, P = 5, 2
PROPERTY = settings(max_examples=15, deadline=None, derandomize=True)


def spd(seed: int, condition: float = 1e2) -> np.ndarray:
    q = scipy.linalg.qr(np.random.default_rng(seed).standard_normal((N, N)))[0]
    b = (q * np.geomspace(1, condition, N)) @ q.T
    return (b + b.T) / 2


def symmetric(seed: int) -> np.ndarray:
    g = np.random.default_rng(seed).standard_normal((N, N))
    return (g + g.T) / 2


def columns(seed: int, p: int = P) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, p))


A, B, X, Y = symmetric(0), spd(1), columns(2), columns(3)


# The pencil.


@PROPERTY
@given(seed=st.integers(0, 10**6), condition=st.sampled_from([1.0, 1e3, 1e6]))
def test_eigenpairs_agree_with_scipy(seed, condition):
    a, b = symmetric(seed), spd(seed + 1, condition)
    pairs, expected = pencil.eigh(a, b), scipy.linalg.eigh(a, b, eigvals_only=True)
    round_off = 1e-14 * condition  # B⁻¹A is this ill-conditioned
    np.testing.assert_allclose(pairs.values, expected, atol=10 * round_off * np.abs(expected).max())
    np.testing.assert_allclose(pairs.vectors.T @ b @ pairs.vectors, np.eye(N), atol=10 * round_off)
    np.testing.assert_allclose(a @ pairs.vectors, b @ pairs.vectors * pairs.values, atol=10 * round_off * np.linalg.norm(pairs.vectors))
    assert int(pairs.rank) == N


def test_units_of_the_variables_do_not_change_the_rank_or_the_eigenvalues():
    units = np.diag([1e-12, 1e12, 1.0, 1e-6, 1e6])  # B itself has condition 1e50 after the change of units
    scaled = pencil.eigh(units @ A @ units, units @ B @ units)
    assert int(scaled.rank) == N
    np.testing.assert_allclose(scaled.values, pencil.eigh(A, B).values, rtol=1e-11)


def test_a_singular_b_is_reported_and_its_kernel_is_dropped():
    basis = columns(4, 3)
    inside_a, inside_b = symmetric(5)[:3, :3], np.diag([1.0, 2.0, 3.0])
    pairs = pencil.eigh(basis @ inside_a @ basis.T, basis @ inside_b @ basis.T)
    assert int(pairs.rank) == 3
    np.testing.assert_allclose(pairs.values[:3], scipy.linalg.eigh(inside_a, inside_b, eigvals_only=True), atol=1e-12)
    assert np.isinf(pairs.values[3:]).all()
    np.testing.assert_array_equal(pairs.vectors[:, 3:], np.zeros((N, 2)))


def test_without_b_the_pencil_is_the_ordinary_eigenproblem():
    np.testing.assert_allclose(pencil.eigh(A).values, np.linalg.eigvalsh(A), atol=1e-14)


def test_whitening_whitens_and_reports_the_rank():
    full = pencil.whiten(B)
    np.testing.assert_allclose(full.matrix.T @ B @ full.matrix, np.eye(N), atol=1e-13)
    assert int(full.rank) == N
    thin = columns(6, 2)
    part = pencil.whiten(thin @ thin.T)
    assert int(part.rank) == 2
    np.testing.assert_allclose(part.matrix.T @ (thin @ thin.T) @ part.matrix, np.diag([1.0, 1.0, 0, 0, 0]), atol=1e-13)
    np.testing.assert_array_equal(part.matrix[:, 2:], np.zeros((N, 3)))


def test_cut_of_whiten_drops_small_directions():
    assert int(pencil.whiten(np.array([[1.0, 0.999], [0.999, 1.0]]), cut=1e-2).rank) == 1


@jax.jit
def pencil_slope(a, b, da, db):
    """Derivative at t = 0 of the eigenvalues, and of the squares of the entries of the vectors."""
    run = lambda t: pencil.eigh(a + t * da, b + t * db)[:2]
    (_, _), (values, vectors) = jax.jvp(run, (0.0,), (1.0,))
    return values, 2 * run(0.0)[1] * vectors


def test_derivatives_of_eigenpairs_agree_with_finite_differences():
    da, db = symmetric(7), symmetric(8)
    values, squares = pencil_slope(A, B, da, db)
    exact = [scipy.linalg.eigh(A + t * da, B + t * db) for t in (1e-5, -1e-5)]
    np.testing.assert_allclose(values, (exact[0][0] - exact[1][0]) / 2e-5, atol=1e-7)
    np.testing.assert_allclose(squares, (exact[0][1] ** 2 - exact[1][1] ** 2) / 2e-5, atol=1e-7)


def test_derivatives_of_eigenpairs_are_finite_when_b_has_repeated_eigenvalues():
    da, db = symmetric(7), symmetric(8)
    values, squares = pencil_slope(np.diag(np.arange(5.0)), np.eye(N), da, db)
    np.testing.assert_allclose(values, np.diagonal(da) - np.arange(5.0) * np.diagonal(db), atol=1e-13)
    assert np.isfinite(squares).all()


def test_gradient_of_the_eigenvalues_is_finite_when_they_are_repeated():
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(pencil.eigh(a, B).values)))(B)  # all eigenvalues are 1; the sum is tr B⁻¹A
    np.testing.assert_allclose(gradient, np.linalg.inv(B), atol=1e-12)


# Bases.


@pytest.mark.parametrize("kind", ["cholesky", "polar"])
def test_orthonormalize_gives_a_b_orthonormal_basis_of_the_same_span(kind):
    q = np.asarray(pencil.orthonormalize(X, B, kind))
    np.testing.assert_allclose(q.T @ B @ q, np.eye(P), atol=1e-14)
    assert scipy.linalg.subspace_angles(q, X).max() < 1e-14
    np.testing.assert_allclose(pencil.orthonormalize(X, lambda x: B @ x, kind), q, atol=1e-14)


def test_orthonormalize_by_cholesky_is_gram_schmidt():
    lower = np.linalg.cholesky(B)
    q, r = np.linalg.qr(lower.T @ X)
    expected = np.linalg.solve(lower.T, q * np.sign(np.diagonal(r)))
    np.testing.assert_allclose(pencil.orthonormalize(X, B), expected, atol=1e-13)


@pytest.mark.parametrize("kind", ["cholesky", "polar"])
def test_orthonormalize_is_orthonormal_to_round_off_for_nearly_dependent_columns(kind):
    near = np.stack([X[:, 0], X[:, 0] + 1e-7 * X[:, 1]], axis=1)  # the Gram matrix has condition 1e14
    q = np.asarray(pencil.orthonormalize(near, None, kind))
    np.testing.assert_allclose(q.T @ q, np.eye(P), atol=1e-14)


@pytest.mark.parametrize("kind", ["cholesky", "polar"])
def test_compiled_orthonormalize_of_dependent_columns_is_nan_and_never_a_wrong_basis(kind):
    flat = np.stack([X[:, 0], np.zeros(N)], axis=1)
    assert np.isnan(jax.jit(lambda x: pencil.orthonormalize(x, B, kind))(flat)).any()


def test_polar_is_the_nearest_basis():
    lower = np.linalg.cholesky(B)
    expected = np.linalg.solve(lower.T, scipy.linalg.polar(lower.T @ X)[0])
    np.testing.assert_allclose(pencil.polar(X, B), expected, atol=1e-13)
    uneven = X * np.array([1.0, 1e-7])
    np.testing.assert_allclose(pencil.polar(uneven), scipy.linalg.polar(uneven)[0], atol=1e-13)


def test_derivative_of_polar_at_an_orthonormal_basis_is_the_tangent_projection_and_the_second_is_finite():
    base, change = np.linalg.qr(X)[0], Y
    along = lambda t: pencil.polar(base + t * change)
    slope = lambda t: jax.jvp(along, (t,), (1.0,))[1]
    first, second = jax.jit(lambda t: (slope(t), jax.jvp(slope, (t,), (1.0,))[1]))(0.0)
    overlap = base.T @ change
    np.testing.assert_allclose(first, change - base @ (overlap + overlap.T) / 2, atol=1e-13)
    exact = [scipy.linalg.polar(base + t * change)[0] for t in (1e-4, 0.0, -1e-4)]
    np.testing.assert_allclose(second, (exact[0] - 2 * exact[1] + exact[2]) / 1e-8, atol=1e-6)


# Angles.


def test_principal_angles_agree_with_scipy():
    wide = columns(9, 3)
    np.testing.assert_allclose(pencil.principal_angles(X, wide), scipy.linalg.subspace_angles(X, wide)[::-1], atol=1e-14)
    np.testing.assert_allclose(pencil.principal_angles(wide, X), scipy.linalg.subspace_angles(X, wide)[::-1], atol=1e-14)


def test_principal_angles_in_an_inner_product_are_those_after_the_change_of_variables():
    root = scipy.linalg.sqrtm(B)
    np.testing.assert_allclose(pencil.principal_angles(X, Y, B), scipy.linalg.subspace_angles(root @ X, root @ Y)[::-1], atol=1e-13)


@pytest.mark.parametrize("size", [1e-3, 1e-8, 1e-13])
def test_tiny_and_nearly_right_angles_are_both_accurate(size):
    x = np.eye(4)[:, :2]
    y = np.stack([np.cos(size) * np.eye(4)[0] + np.sin(size) * np.eye(4)[2], np.sin(size) * np.eye(4)[1] + np.cos(size) * np.eye(4)[3]], axis=1)
    small, large = pencil.principal_angles(x, y)
    np.testing.assert_allclose(small, size, rtol=1e-12)
    np.testing.assert_allclose(np.pi / 2 - large, size, atol=1e-15)


@PROPERTY
@given(seed=st.integers(0, 10**6))
def test_principal_angles_do_not_depend_on_the_bases(seed):
    x, y, mix = columns(seed), columns(seed + 1), np.random.default_rng(seed).standard_normal((P, P)) + 3 * np.eye(P)
    np.testing.assert_allclose(pencil.principal_angles(x @ mix, y), pencil.principal_angles(y, x), atol=1e-12)


# Batches, precision.


def test_leading_axes_and_vmap_agree_with_single_calls():
    a, b, x = (np.stack([f(s) for s in (10, 11)]) for f in (symmetric, spd, columns))
    values = pencil.eigh(a, b).values
    np.testing.assert_allclose(values, [pencil.eigh(m, k).values for m, k in zip(a, b)], atol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda m, k: pencil.eigh(m, k).values))(a, b), values, atol=1e-12)
    np.testing.assert_allclose(pencil.orthonormalize(x, b), [pencil.orthonormalize(m, k) for m, k in zip(x, b)], atol=1e-12)
    np.testing.assert_allclose(pencil.principal_angles(x, Y, b), [pencil.principal_angles(m, Y, k) for m, k in zip(x, b)], atol=1e-12)


def test_float32_stays_float32():
    a, b, x, y = (m.astype(np.float32) for m in (A, B, X, Y))
    for call in (lambda: pencil.whiten(b).matrix, lambda: pencil.polar(x, b), lambda: pencil.orthonormalize(x, b),
                 lambda: pencil.principal_angles(x, y, b)):
        assert jax.eval_shape(call).dtype == jnp.float32
    assert pencil.eigh(a, b).vectors.dtype == jnp.float32
    np.testing.assert_allclose(pencil.eigh(a, b).values, pencil.eigh(A, B).values, atol=1e-5)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: pencil.eigh(np.triu(A), B), MatrixError, "a must be symmetric"),
    (lambda: pencil.eigh(A, -B), MatrixError, "b must be positive semidefinite"),
    (lambda: pencil.eigh(A, np.eye(3)), ShapeError, "b must be 5 x 5"),
    (lambda: pencil.eigh(A, B.astype(np.float32)), PrecisionError, "a float64, b float32"),
    (lambda: pencil.whiten(X), ShapeError, "b must be a square matrix"),
    (lambda: pencil.orthonormalize(X.T), ShapeError, "x must have at most as many columns as rows"),
    (lambda: pencil.orthonormalize(X, B, "qr"), UnknownNameError, "kind 'qr' is not known"),
    (lambda: pencil.orthonormalize(np.stack([X[:, 0], 2 * X[:, 0]], axis=1), B), MatrixError, "columns of x must be independent"),
    (lambda: pencil.polar(np.stack([X[:, 0], 2 * X[:, 0]], axis=1), B), MatrixError, "columns of x must be independent"),
    (lambda: pencil.principal_angles(X, np.ones((4, 1))), ShapeError, r"y must have shape \(5, any\)"),
    (lambda: pencil.principal_angles(X, np.stack([Y[:, 0], Y[:, 0]], axis=1)), MatrixError, "columns of y must be independent"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
