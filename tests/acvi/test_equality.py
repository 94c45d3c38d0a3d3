from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorylab import acvi
from theorylab.errors import ArgumentError, MatrixError, NoClosedFormError, ShapeError

N = 6
C = np.random.default_rng(0).standard_normal((2, N))
D = np.array([1.0, -2.0])


def dense_pair(equality):
    """Projector and least-norm point of an equality, from its own functions."""
    return np.asarray(jax.jit(jax.vmap(equality.null))(jnp.eye(N))), np.asarray(equality.point)


def test_the_dense_pieces_are_those_of_the_normal_equations():
    null, point = dense_pair(acvi.DenseEquality(C, D))
    inverse = np.linalg.inv(C @ C.T)
    np.testing.assert_allclose(null, np.eye(N) - C.T @ inverse @ C, atol=1e-14)
    np.testing.assert_allclose(point, C.T @ inverse @ D, atol=1e-14)
    np.testing.assert_allclose(null @ null, null, atol=1e-14)
    np.testing.assert_allclose(null @ point, 0, atol=1e-14)


@pytest.mark.parametrize("equality", [acvi.DenseEquality(C, D), acvi.BlockSimplex((2, 4), [1.0, 3.0]), acvi.BlockSimplex((3, 3))])
def test_a_projected_point_solves_the_equations_and_is_the_nearest(equality, rng):
    x = jnp.asarray(rng.standard_normal(N))
    z = equality.project(x)
    assert float(equality.residual(z)) < 1e-14
    np.testing.assert_allclose(np.asarray(equality.null(x) + equality.point), np.asarray(z), atol=1e-14)
    np.testing.assert_allclose(np.asarray(equality.null(x - z)), 0, atol=1e-14)
    rows, level = equality.normal_rows()
    np.testing.assert_allclose(np.asarray(rows @ rows.T), np.eye(equality.rows), atol=1e-14)
    np.testing.assert_allclose(np.asarray(rows @ z), np.asarray(level), atol=1e-14)


def test_block_sums_equal_the_matrix_they_stand_for():
    matrix = np.array([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    found, expected = dense_pair(acvi.BlockSimplex((2, 4), [1.0, 3.0])), dense_pair(acvi.DenseEquality(matrix, np.array([1.0, 3.0])))
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=1e-15)


def test_redundant_rows_are_dropped_with_a_warning():
    repeated = np.vstack([C, C[0] + C[1]])
    with pytest.warns(UserWarning, match=r"1 redundant row \(rank 2 of 3\)"):
        equality = acvi.DenseEquality(repeated, np.append(D, D.sum()))
    for a, b in zip(dense_pair(equality), dense_pair(acvi.DenseEquality(C, D))):
        np.testing.assert_allclose(a, b, atol=1e-13)


def test_contradicting_rows_are_refused():
    with pytest.raises(MatrixError, match="has no solution"):
        acvi.DenseEquality(np.vstack([C, C[0] + C[1]]), np.append(D, D.sum() + 1e-3))


def test_the_matrix_free_form_agrees_with_the_matrix(rng):
    equality = acvi.MatrixFree(lambda x, a: a @ x, lambda z, a: a.T @ z, D, jnp.asarray(C))
    for a, b in zip(dense_pair(equality), dense_pair(acvi.DenseEquality(C, D))):
        np.testing.assert_allclose(a, b, atol=1e-12)
    x = jnp.asarray(rng.standard_normal(N))
    assert float(equality.residual(equality.project(x))) < 1e-12
    assert np.array_equal(equality.replace(d=2 * jnp.asarray(D)).point, 2 * equality.point)
    with pytest.raises(MatrixError, match="no solution"):
        acvi.MatrixFree(lambda x, a: jnp.stack([x[0], x[0]]), lambda z, a: jnp.zeros(N).at[0].set(z.sum()), np.array([0.0, 1.0]))


def test_no_equality_is_the_identity():
    equality = acvi.NoEquality().bind(3)
    x = jnp.arange(3.0)
    assert equality.rows == 0 and np.array_equal(equality.null(x), x) and np.array_equal(equality.point, np.zeros(3))
    assert float(equality.residual(x)) == 0


def test_single_precision_stays_single():
    x = jnp.ones(N, jnp.float32)
    for equality in (acvi.DenseEquality(C, D), acvi.BlockSimplex((2, 4)), acvi.NoEquality().bind(N)):
        assert equality.null(x).dtype == equality.project(x).dtype == equality.residual(x).dtype == jnp.float32


def test_a_replaced_right_hand_side_is_solved_again():
    equality = acvi.DenseEquality(C, D)
    np.testing.assert_allclose(np.asarray(equality.replace(d=jnp.asarray(2 * D)).point), 2 * np.asarray(equality.point), atol=1e-15)


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: acvi.DenseEquality(C[0], D), ShapeError, "equality C"),
    (lambda: acvi.DenseEquality(C, D[:, None]), ShapeError, "equality d"),
    (lambda: acvi.DenseEquality(C, np.ones(3)), ShapeError, "equality d"),
    (lambda: acvi.DenseEquality(np.eye(3), np.ones(3)), ShapeError, "rank below"),
    (lambda: acvi.DenseEquality(np.random.default_rng(0).standard_normal((4, 2)), np.zeros(4)), ShapeError, "rank below"),
    (lambda: acvi.DenseEquality(np.zeros((1, 3)), np.zeros(1)), MatrixError, "must not be 0"),
    (lambda: acvi.BlockSimplex(3), ArgumentError, "sequence"),
    (lambda: acvi.BlockSimplex((1, 1)), ShapeError, "more than one entry"),
    (lambda: acvi.BlockSimplex((2, 0)), ArgumentError, "sizes"),
    (lambda: acvi.BlockSimplex((2, 2), 0.0), ArgumentError, "totals must be above 0"),
    (lambda: acvi.BlockSimplex((2, 2), np.ones(3)), ShapeError, "totals"),
    (lambda: acvi.MatrixFree(C, lambda z, a: z, D), ArgumentError, "apply must be a function"),
    (lambda: acvi.MatrixFree(lambda x, a: x, lambda z, a: z[:, None], D), ShapeError, "operator"),
    (lambda: acvi.NoEquality().point, ArgumentError, "bind"),
    (lambda: acvi.VariationalInequality(lambda x, a: x, 5, equality=(C, D)), ShapeError, "equality C must have 5 columns"),
    (lambda: acvi.VariationalInequality(lambda x, a: x, 5, equality=acvi.BlockSimplex((2, 2))), ShapeError, "4 unknowns"),
    (lambda: acvi.VariationalInequality(lambda x, a: x, 5, equality=C), ArgumentError, r"pair \(C, d\)"),
])
def test_bad_equalities_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_what_needs_the_matrix_of_the_equations_says_so():
    free = acvi.MatrixFree(lambda x, a: x.sum(keepdims=True), lambda y, a: jnp.broadcast_to(y, (3,)), np.ones(1))
    problem = acvi.AffineVariationalInequality(np.eye(3), None, acvi.Nonnegative(), free)
    with pytest.raises(NoClosedFormError, match=r"MatrixFree has no matrix of its equations, which is needed here: pass equality=\(C, d\)"):
        acvi.central_path(problem, [0.1])
