"""The x-step: every way to solve it against the KKT system in NumPy, and Newton against SciPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import root

from theorylab import acvi
from theorylab.acvi import resolvent
from theorylab.acvi.resolvent import choose, conjugate_residuals, operator_norm
from theorylab.errors import ArgumentError

RNG = np.random.default_rng(0)
A = RNG.standard_normal((5, 7))
C = np.vstack([np.r_[np.ones(5), np.zeros(7)], np.r_[np.zeros(5), np.ones(7)]])
U = RNG.standard_normal(12)
GAME = acvi.MatrixGame(A)
M = np.asarray(GAME.matrix)


def product(x, matrix):
    return matrix @ x


AFFINE = acvi.AffineVariationalInequality(M, None, acvi.Nonnegative(), (C, np.ones(2)))
GENERAL = acvi.VariationalInequality(product, 12, jnp.asarray(M), acvi.Nonnegative(), acvi.BlockSimplex((5, 7)))


def kkt(M, q, C, d, u, beta):
    """x of beta x + M x + q + C' nu = beta u, C x = d."""
    n, p = M.shape[0], C.shape[0]
    system = np.block([[beta * np.eye(n) + M, C.T], [C, np.zeros((p, p))]])
    return np.linalg.solve(system, np.r_[beta * u - q, d])[:n]


def solve(problem, kind, beta, u=U):
    def run(u, beta):
        return choose(problem, kind).make(problem, beta)(problem, u, problem.start(jax.random.key(0)), beta)

    return jax.jit(run)(jnp.asarray(u), jnp.asarray(beta))


@pytest.mark.parametrize(("problem", "kind"), [(GAME, "svd"), (GAME, "dense"), (GAME, "cg"), (GAME, "krylov"), (AFFINE, "krylov"),
                                               (GENERAL, "newton"), (GENERAL, "cg")])
def test_every_kind_solves_the_kkt_system(problem, kind):
    np.testing.assert_allclose(solve(problem, kind, 0.3).x, kkt(M, np.zeros(12), C, np.ones(2), U, 0.3), rtol=0, atol=5e-12)


def test_blocks_solve_one_small_system_for_all_coordinates():
    B, q = np.array([[0.3, 1.1], [-0.9, 0.2]]), RNG.standard_normal(12)
    matrix, C = np.kron(B, np.eye(6)), np.kron(np.eye(2), np.ones((1, 6)))
    problem = acvi.AffineVariationalInequality(matrix, q, acvi.Nonnegative(), acvi.BlockSimplex((6, 6)))
    np.testing.assert_allclose(solve(problem, "blocks", 0.5).x, kkt(matrix, q, C, np.ones(2), U, 0.5), atol=1e-13)


def test_an_affine_operator_with_redundant_rows_and_offset():
    q, rows = RNG.standard_normal(12), np.vstack([C, C[0] + C[1]])
    with pytest.warns(UserWarning, match="redundant"):
        problem = acvi.AffineVariationalInequality(M + np.eye(12), q, acvi.Nonnegative(), (rows, np.array([1.0, 1.0, 2.0])))
    for kind in ("dense", "krylov"):
        np.testing.assert_allclose(solve(problem, kind, 0.5).x, kkt(M + np.eye(12), q, C, np.ones(2), U, 0.5), atol=1e-12)


def test_the_dense_resolvent_is_firmly_nonexpansive():
    R = np.asarray(choose(AFFINE, "dense").make(AFFINE, jnp.asarray(0.4)).matrix)
    assert np.linalg.eigvalsh(R + R.T - 2 * R.T @ R).min() > -1e-14
    assert np.linalg.norm(R, 2) <= 1 + 1e-14


def test_newton_finds_the_root_that_scipy_finds():
    market = acvi.cournot()
    u, beta = np.array([20.0, 30.0, 40.0, 10.0, 35.0]), 0.5
    expected = root(lambda x: beta * (x - u) + np.asarray(market.operator(jnp.asarray(x))), np.full(5, 30.0), tol=1e-13).x
    solved = solve(market, "newton", beta, u)
    np.testing.assert_allclose(solved.x, expected, rtol=1e-12)
    assert 2 <= int(solved.evaluations) <= 12 and int(solved.factorizations) <= 8


def test_newton_steps_back_where_the_operator_is_not_finite():
    problem = acvi.VariationalInequality(lambda x, _: jnp.log(x), 1, x0=jnp.array([5.0]))
    solved = solve(problem, "newton", 0.1, np.array([-30.0]))                               # the full step from 5 is negative
    x = float(solved.x[0])
    assert x > 0 and 0.1 * (x + 30) + np.log(x) == pytest.approx(0, abs=1e-12)


def test_large_nonlinear_problems_take_the_newton_steps_matrix_free(monkeypatch):
    monkeypatch.setattr(resolvent, "NEWTON_SIZE", 4)
    matrix = jnp.asarray(M)
    problem = acvi.VariationalInequality(lambda x, a: a @ x + x**3, 12, matrix, acvi.Nonnegative(), acvi.BlockSimplex((5, 7)))
    solved = solve(problem, "newton", 0.5)
    x = np.asarray(solved.x)
    force = 0.5 * (x - U) + M @ x + x**3
    np.testing.assert_allclose(C @ x, 1, atol=1e-13)
    np.testing.assert_allclose(force[:5] - force[:5].mean(), 0, atol=1e-11)
    np.testing.assert_allclose(force[5:] - force[5:].mean(), 0, atol=1e-11)
    assert int(solved.factorizations) == 0


def test_conjugate_residuals_solve_a_nonsymmetric_system_in_n_products():
    matrix = np.eye(12) + M
    r = jnp.asarray(U)
    z, used = conjugate_residuals(lambda z: jnp.asarray(matrix) @ z, r, 12, jnp.asarray(1e-12))
    np.testing.assert_allclose(z, np.linalg.solve(matrix, U), atol=1e-12)
    assert int(used) <= 12


def test_the_norm_of_the_operator_is_that_on_the_plane(monkeypatch):
    centered = A - A.mean(0) - A.mean(1, keepdims=True) + A.mean()
    exact = np.linalg.norm(centered, 2)
    assert float(operator_norm(GAME)) == pytest.approx(exact, rel=1e-12)
    assert float(operator_norm(AFFINE)) == pytest.approx(exact, rel=1e-12)
    monkeypatch.setattr(resolvent, "NEWTON_SIZE", 1)
    assert float(operator_norm(GAME)) == pytest.approx(exact, rel=1e-6)                      # power iteration


def test_the_choice_goes_by_class_and_shape():
    names = [choose(p, "auto").__name__ for p in (GAME, AFFINE, GENERAL)]
    assert names == ["Spectral", "Dense", "Newton"]


def test_single_precision_stays_single():
    game = acvi.MatrixGame(A.astype(np.float32))
    for kind in ("svd", "krylov"):
        x = solve(game, kind, jnp.asarray(0.3, jnp.float32), U.astype(np.float32)).x
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, kkt(M, np.zeros(12), C, np.ones(2), U, 0.3), atol=2e-5)


@pytest.mark.parametrize(("problem", "kind", "words"), [(AFFINE, "svd", "needs a MatrixGame"), (GENERAL, "dense", "known matrix"),
                                                        (AFFINE, "cg", "two simplices")])
def test_a_kind_that_does_not_fit_is_refused(problem, kind, words):
    with pytest.raises(ArgumentError, match=words):
        choose(problem, kind)


def test_blocks_of_unequal_size_are_refused():
    with pytest.raises(ArgumentError, match="equal sizes"):
        solve(GENERAL, "blocks", 1.0)
    with pytest.raises(ArgumentError, match="affine problems only"):
        operator_norm(GENERAL)
