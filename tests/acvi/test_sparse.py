"""Sparse matrices in problems, against the dense problem, NumPy's KKT system and SciPy."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg
from jax.experimental.sparse import BCOO, BCSR

import theorylab as tl
from theorylab import acvi
from theorylab.acvi import sparse
from theorylab.acvi.resolvent import choose
from theorylab.errors import ArgumentError, NonFiniteInputError, PrecisionError, ShapeError

N = 12
RNG = np.random.default_rng(0)
LINE = sp.diags_array([np.full(N - 1, -1.5), np.full(N, 2.0), np.full(N - 1, -0.5)], offsets=[-1, 0, 1])
DENSE, Q, U = LINE.toarray(), RNG.standard_normal(N), RNG.standard_normal(N)
SUM = np.ones((1, N))


def kkt(C, d, beta):
    """x of beta x + M x + q + C' nu = beta u, C x = d."""
    p = C.shape[0]
    return np.linalg.solve(np.block([[beta * np.eye(N) + DENSE, C.T], [C, np.zeros((p, p))]]), np.r_[beta * U - Q, d])[:N]


def solve(problem, beta):
    def run(u, beta):
        return choose(problem, "sparse").make(problem, beta)(problem, u, u, beta)

    return jax.jit(run)(jnp.asarray(U), jnp.asarray(beta))


@pytest.mark.parametrize(("equality", "C", "d"), [
    (None, np.zeros((0, N)), np.zeros(0)), (acvi.BlockSimplex((N,)), SUM, np.ones(1)),
    ((RNG.standard_normal((2, N)), np.ones(2)), None, None)])
def test_the_factored_x_step_solves_the_kkt_system(equality, C, d):
    C, d = equality if C is None else (C, d)
    found = solve(acvi.AffineVariationalInequality(LINE, Q, acvi.Box(-1.0, 1.0), equality), 0.3)
    np.testing.assert_allclose(found.x, kkt(np.asarray(C), np.asarray(d), 0.3), atol=1e-13)


def test_redundant_equations_are_dropped_from_the_factored_system():
    with pytest.warns(UserWarning, match="redundant"):
        problem = acvi.AffineVariationalInequality(LINE, Q, acvi.Box(-1.0, 1.0), (np.vstack([SUM, 2 * SUM]), np.array([1.0, 2.0])))
    np.testing.assert_allclose(solve(problem, 0.3).x, kkt(SUM, np.ones(1), 0.3), atol=1e-13)


@pytest.mark.parametrize("make", [sp.coo_array, sp.csr_array, sp.csc_matrix, BCOO.from_scipy_sparse, BCSR.from_scipy_sparse])
def test_every_sparse_format_is_the_dense_matrix(make):
    M = acvi.AffineVariationalInequality(make(sp.csr_array(LINE))).M
    assert isinstance(M, sparse.SparseMatrix) and len(M.values) == LINE.nnz
    assert np.array_equal(M.todense(), DENSE) and np.array_equal(M.T.todense(), DENSE.T)
    np.testing.assert_allclose(M @ U, DENSE @ U, atol=1e-14)
    np.testing.assert_allclose(M.T @ U, DENSE.T @ U, atol=1e-14)


def test_doubled_whole_single_and_absent_entries():
    twice = sp.coo_array((np.array([1, 2, 3]), (np.array([0, 0, 1]), np.array([0, 0, 1]))), (2, 2))
    problem = acvi.AffineVariationalInequality(twice)
    assert problem.M.todense().tolist() == [[3.0, 0.0], [0.0, 3.0]] and len(problem.M.values) == 2
    assert acvi.AffineVariationalInequality(sp.csr_array(DENSE.astype(np.float32))).dtype == jnp.float32
    assert np.array_equal(acvi.AffineVariationalInequality(sp.csr_array((3, 3))).operator(jnp.ones(3)), np.zeros(3))
    assert problem.replace(q=np.ones(2)).M is problem.M


def test_a_run_factors_once_and_solves_as_the_dense_problem_does(monkeypatch):
    made = []
    monkeypatch.setattr(scipy.sparse.linalg, "splu", lambda A, _splu=scipy.sparse.linalg.splu, **kw: made.append(A.shape) or _splu(A, **kw))
    sparse._factors.clear()
    flat = acvi.AffineVariationalInequality(LINE, Q, acvi.Box(-0.3, 0.3), acvi.BlockSimplex((N,)))
    same = acvi.AffineVariationalInequality(DENSE, Q, acvi.Box(-0.3, 0.3), acvi.BlockSimplex((N,)))
    paths = [tl.iterate(problem, acvi.ProjectedACVI(0.7), steps=40, record=tl.whole).history for problem in (flat, same)]
    np.testing.assert_allclose(paths[0]["x"], paths[1]["x"], atol=1e-13)
    assert made == [(N + 1, N + 1)] and paths[0]["factorizations"][-1] == 1 and paths[0]["operator_evaluations"][-1] == 40


@pytest.mark.slow
def test_solve_factors_again_only_for_another_penalty():
    flat = acvi.AffineVariationalInequality(LINE, Q, acvi.Box(-0.3, 0.3), acvi.BlockSimplex((N,)))
    same = acvi.AffineVariationalInequality(DENSE, Q, acvi.Box(-0.3, 0.3), acvi.BlockSimplex((N,)))
    sol = tl.solve(flat, tolerance=1e-10)
    assert type(sol.method.solver).__name__ == "SparseLU" and float(acvi.gap(same, same.repair(sol.value))) <= 1e-10
    assert sol.history["factorizations"][-1] == len(set(np.asarray(sol.history["penalty"]).tolist()))


def test_a_factor_that_was_dropped_is_made_again():
    problem = acvi.AffineVariationalInequality(LINE, Q)
    step = jax.jit(lambda beta: sparse.SparseLU.make(problem, beta))(jnp.asarray(0.5))
    sparse._factors.clear()
    found = jax.jit(lambda step, u: step(problem, u, u, jnp.asarray(0.5)))(step, jnp.asarray(U))
    np.testing.assert_allclose(found.x, kkt(np.zeros((0, N)), np.zeros(0), 0.5), atol=1e-13)


def test_penalties_in_a_batch_have_their_own_factors():
    problem = acvi.AffineVariationalInequality(LINE, Q, acvi.Box(-1.0, 1.0))
    betas = jnp.array([0.1, 1.0])
    found = jax.jit(jax.vmap(lambda beta: sparse.SparseLU.make(problem, beta)(problem, jnp.asarray(U), jnp.asarray(U), beta).x))(betas)
    np.testing.assert_allclose(found, [kkt(np.zeros((0, N)), np.zeros(0), beta) for beta in (0.1, 1.0)], atol=1e-13)


def test_what_factors_well_is_factored_and_the_rest_is_multiplied(monkeypatch):
    monkeypatch.setattr(sparse, "FILL", 50)
    monkeypatch.setattr(sparse, "PER_NONZERO", 1)
    scattered = sp.random_array((N * 5, N * 5), density=0.1, rng=np.random.default_rng(0))
    problem = acvi.AffineVariationalInequality(sp.csr_array(scattered - scattered.T))
    assert choose(problem, "auto").__name__ == "Krylov" and choose(problem, "sparse").__name__ == "SparseLU"
    assert choose(acvi.AffineVariationalInequality(LINE), "auto").__name__ == "SparseLU"
    sums = acvi.MatrixFree(lambda x: x[:1] + x[1:2], lambda z: jnp.concatenate([z, z, jnp.zeros(N - 2)]), np.ones(1))
    assert choose(acvi.AffineVariationalInequality(LINE, None, None, sums), "auto").__name__ == "Krylov"


def test_the_envelope_bounds_the_fill_and_leaves_out_full_rows():
    star = sp.eye_array(400, format="lil")
    star[0, :] = star[:, 0] = 1.0
    assert acvi.AffineVariationalInequality(LINE).M.envelope == N - 1
    assert acvi.AffineVariationalInequality(sp.csr_array(star + 400 * sp.eye_array(400))).M.envelope == 400


def test_large_sparse_matrices_that_are_not_monotone_are_warned_about():
    n = 600
    skew = sp.diags_array([np.ones(n - 1), -np.ones(n - 1)], offsets=[1, -1])
    dent = sp.coo_array((np.array([-0.3]), (np.array([7]), np.array([7]))), (n, n))
    with pytest.warns(UserWarning, match=r"not monotone.* is -0\.3"):
        acvi.AffineVariationalInequality(sp.csr_array(skew + dent))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acvi.AffineVariationalInequality(sp.csr_array(skew))
        band = sp.diags_array([np.ones(n), np.ones(n - 1), np.ones(n - 2)], offsets=[0, 1, 2])
        acvi.AffineVariationalInequality(sp.csr_array(skew + band @ band.T))  # semidefinite, and not by its discs


def test_a_sparse_game_is_the_dense_game():
    A = sp.random_array((6, 9), density=0.5, rng=np.random.default_rng(2), data_sampler=np.random.default_rng(3).standard_normal)
    thin, full = acvi.MatrixGame(sp.csr_array(A)), acvi.MatrixGame(A.toarray())
    x = jnp.asarray(RNG.standard_normal(15))
    np.testing.assert_allclose(thin.operator(x), full.operator(x), atol=1e-14)
    assert np.array_equal(thin.matrix, full.matrix) and choose(thin, "auto").__name__ == "ConjugateGradient"
    sol = tl.solve(thin, tolerance=1e-8)
    assert type(sol.method).__name__ == "PrimalDualHybridGradient"
    assert float(acvi.certificate(full, sol.value).bound) <= 1e-8


@pytest.mark.slow
def test_a_sparse_game_is_solved_by_conjugate_gradients():
    A = sp.random_array((6, 9), density=0.5, rng=np.random.default_rng(2), data_sampler=np.random.default_rng(3).standard_normal)
    sol = tl.iterate(acvi.MatrixGame(sp.csr_array(A)), acvi.HalpernACVI(), steps=2000, every=10, stop=tl.Below("gap", 1e-8))
    assert float(acvi.certificate(acvi.MatrixGame(A.toarray()), sol.value).bound) <= 1e-8


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: acvi.AffineVariationalInequality(sp.csr_array((2, 3))), ShapeError, r"M must be a square matrix, got shape \(2, 3\)"),
    (lambda: acvi.AffineVariationalInequality(sp.csr_array(np.diag([1.0, np.nan]))), NonFiniteInputError, "M must be finite"),
    (lambda: acvi.AffineVariationalInequality(sp.csr_array(np.diag([1.0, 1j]))), PrecisionError, "M must hold real numbers"),
    (lambda: acvi.AffineVariationalInequality(LINE, np.ones(3)), ShapeError, "q must have shape"),
    (lambda: acvi.MatrixGame(BCOO.fromdense(jnp.ones((2, 2, 2)), n_batch=1)), ShapeError, "A must be a matrix"),
    (lambda: acvi.MatrixGame(BCOO.fromdense(jnp.ones((2, 2)), n_dense=1)), ShapeError, "no batch or dense axes"),
    (lambda: choose(acvi.AffineVariationalInequality(DENSE), "sparse"), ArgumentError, "sparse M")])
def test_wrong_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
