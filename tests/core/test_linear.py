"""Factors and conjugate gradients against dense NumPy solves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import theorylab as tl
from theorylab.core import linear
from theorylab.core.linear import Factored, cg
from theorylab.errors import ArgumentError, MatrixError, NonFiniteInputError, PrecisionError, ShapeError, ToleranceError, UnknownNameError

N = 5
RNG = np.random.default_rng(0)
GENERAL = RNG.standard_normal((N, N)) + 3 * np.eye(N)
SPD = GENERAL @ GENERAL.T
VECTOR, BLOCK = RNG.standard_normal(N), RNG.standard_normal((N, 2))
E = RNG.standard_normal((N, N))
KINDS = {"cholesky": SPD, "lu": GENERAL, "eigh": SPD, "diagonal": np.arange(1.0, 6.0)}


def dense(matrix: np.ndarray) -> np.ndarray:
    return np.diag(matrix) if matrix.ndim == 1 else matrix


# Factors.


@pytest.mark.parametrize("kind", KINDS)
def test_every_factor_solves_vectors_and_blocks_and_knows_the_determinant(kind):
    matrix = KINDS[kind]
    factored = Factored.of(matrix, kind)
    np.testing.assert_allclose(factored.solve(VECTOR), np.linalg.solve(dense(matrix), VECTOR), rtol=1e-11)
    np.testing.assert_allclose(factored.solve(BLOCK), np.linalg.solve(dense(matrix), BLOCK), rtol=1e-11)
    np.testing.assert_allclose(factored.log_det(), np.linalg.slogdet(dense(matrix))[1], rtol=1e-12)


def test_auto_decides_by_shape():
    assert Factored.of(SPD).kind == "lu"
    assert Factored.of(np.ones(3)).kind == "diagonal"


@pytest.mark.parametrize("kind", ["eigh", "diagonal"])
def test_a_shifted_system_needs_no_new_factor(kind):
    factored = Factored.of(KINDS[kind], kind)
    shifts = jnp.array([0.0, 0.5, 10.0])
    found = jax.vmap(lambda shift: factored.solve_shifted(BLOCK, shift))(shifts)
    np.testing.assert_allclose(found, [np.linalg.solve(dense(KINDS[kind]) + s * np.eye(N), BLOCK) for s in shifts], rtol=1e-11)


def test_a_singular_symmetric_system_is_solved_with_least_norm():
    thin = RNG.standard_normal((N, 2))
    np.testing.assert_allclose(Factored.of(thin @ thin.T, "eigh").solve(VECTOR), np.linalg.pinv(thin @ thin.T) @ VECTOR, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_the_equation(kind):
    matrix = KINDS[kind]
    change = np.diagonal(E) if matrix.ndim == 1 else E if kind == "lu" else E + E.T

    def value(t):
        factored = Factored.of(matrix + t * change, kind)
        return jnp.sum(VECTOR * factored.solve(VECTOR * (1 + t))) + factored.log_det()

    def exact(t):
        m = dense(matrix + t * change)
        return np.sum(VECTOR * np.linalg.solve(m, VECTOR * (1 + t))) + np.linalg.slogdet(m)[1]

    h = 1e-4
    first, second = jax.jit(lambda t: (jax.grad(value)(t), jax.jvp(jax.grad(value), (t,), (1.0,))[1]))(0.0)
    np.testing.assert_allclose(first, (exact(h) - exact(-h)) / (2 * h), rtol=1e-5)
    np.testing.assert_allclose(second, (exact(h) - 2 * exact(0.0) + exact(-h)) / h**2, rtol=1e-3)


def test_derivatives_of_an_eigen_factor_are_finite_at_repeated_eigenvalues_and_in_the_shift():
    value = lambda a, shift: jnp.sum(VECTOR * Factored.of(a, "eigh").solve_shifted(VECTOR, shift))
    by_matrix, by_shift = jax.jit(jax.grad(value, argnums=(0, 1)))(jnp.eye(N), 1.0)
    np.testing.assert_allclose(by_matrix, -np.outer(VECTOR, VECTOR) / 4, rtol=1e-13)
    np.testing.assert_allclose(by_shift, -VECTOR @ VECTOR / 4, rtol=1e-13)


def test_a_factor_crosses_jit_and_vmap_and_keeps_its_precision():
    many = np.stack([SPD, 2 * SPD]).astype(np.float32)
    factored = jax.jit(jax.vmap(lambda m: Factored.of(m, "cholesky")))(many)
    found = jax.jit(jax.vmap(lambda f: f.solve(VECTOR.astype(np.float32))))(factored)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[1], np.linalg.solve(2 * SPD, VECTOR), rtol=1e-3)


# Conjugate gradients.


def spd(condition: float, n: int = 20) -> np.ndarray:
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((n, n)))[0]
    m = (q * np.geomspace(1, condition, n)) @ q.T
    return (m + m.T) / 2


M, RHS = spd(1e2), np.random.default_rng(2).standard_normal(20)
run = jax.jit(lambda m, b: cg(lambda x: m @ x, b, tolerance=1e-10))  # one compilation serves the tests below
status = lambda end: tl.Status(int(end.status))


def test_cg_solves_and_reports_residual_and_steps():
    end = run(M, RHS)
    np.testing.assert_allclose(end.value, np.linalg.solve(M, RHS), rtol=1e-7)
    assert status(end) is tl.Status.CONVERGED
    np.testing.assert_allclose(end.residual, np.linalg.norm(RHS - M @ end.value), rtol=1e-3, atol=1e-14)
    assert end.residual <= 1e-10 * np.linalg.norm(RHS)
    counted = []
    scipy.sparse.linalg.cg(M, RHS, rtol=1e-10, callback=lambda _: counted.append(1))
    assert abs(int(end.steps) - len(counted)) <= 1


@pytest.mark.parametrize("scale", [2.0**-300, 2.0**300])
def test_cg_does_not_depend_on_the_scale_of_operator_and_data(scale):
    end = run(M * scale, RHS / scale)
    assert status(end) is tl.Status.CONVERGED
    np.testing.assert_array_equal(end.value * scale * scale, run(M, RHS).value)


def test_cg_with_zero_data_returns_zero_at_once():
    end = run(M, 0 * RHS)
    assert (status(end), int(end.steps), float(np.abs(end.value).max())) == (tl.Status.CONVERGED, 0, 0.0)


def test_cg_reports_the_step_limit():
    end = cg(M, RHS, tolerance=1e-10, max_steps=3)
    assert (status(end), int(end.steps)) == (tl.Status.MAX_STEPS, 3)
    np.testing.assert_allclose(end.residual, np.linalg.norm(RHS - M @ end.value), rtol=1e-12)


def test_cg_reports_an_operator_that_is_not_positive_definite():
    end = run(np.diag(np.r_[-1.0, np.arange(1.0, 20.0)]), RHS)
    assert status(end) is tl.Status.UNDECIDED
    assert np.isfinite(end.value).all()


def test_cg_reports_a_residual_that_round_off_keeps_above_the_tolerance():
    end = run(spd(1e14), RHS)
    assert status(end) in (tl.Status.UNDECIDED, tl.Status.MAX_STEPS)
    assert end.residual > 1e-10 * np.linalg.norm(RHS)
    assert np.isfinite(end.value).all()


def test_cg_reports_a_non_finite_operator_and_keeps_the_last_finite_iterate():
    bad = M.copy()
    bad[0, 0] = np.nan
    end = run(bad, RHS)
    assert status(end) is tl.Status.NONFINITE
    assert np.isfinite(end.value).all()


def test_cg_in_a_batch_has_a_status_per_lane():
    both = np.stack([M, np.diag(np.r_[-1.0, np.arange(1.0, 20.0)])])
    end = jax.jit(jax.vmap(lambda m: cg(lambda x: m @ x, RHS, tolerance=1e-10)))(both)
    assert [tl.Status(int(s)) for s in end.status] == [tl.Status.CONVERGED, tl.Status.UNDECIDED]
    np.testing.assert_allclose(end.value[0], np.linalg.solve(M, RHS), rtol=1e-7)


def test_a_preconditioner_saves_steps_and_an_exact_one_needs_one():
    ill = M * np.geomspace(1, 1e2, 20)[:, None] * np.geomspace(1, 1e2, 20)[None, :]
    jacobi = cg(ill, RHS, preconditioner=Factored.of(np.diagonal(ill)), tolerance=1e-10)
    assert int(jacobi.steps) < int(run(ill, RHS).steps)
    np.testing.assert_allclose(jacobi.value, np.linalg.solve(ill, RHS), rtol=1e-5)
    exact = cg(ill, RHS, preconditioner=Factored.of(ill, "cholesky"), tolerance=1e-8)
    assert int(exact.steps) == 1


def test_a_starting_point_saves_steps():
    solution = np.linalg.solve(M, RHS)
    assert int(cg(M, RHS, x0=solution, tolerance=1e-10).steps) == 0
    near = cg(M, RHS, x0=solution + 1e-6 * RHS, tolerance=1e-10)
    assert int(near.steps) < int(run(M, RHS).steps)
    np.testing.assert_allclose(near.value, solution, rtol=1e-7)


def test_derivatives_of_cg_are_those_of_the_equation():
    def value(t):
        end = cg(lambda x: jnp.asarray(M) @ x + t * x, (1 + t) * jnp.asarray(RHS), x0=jnp.ones(20), tolerance=1e-13)
        return jnp.sum(end.value**2)

    exact = lambda t: np.sum(np.linalg.solve(M + t * np.eye(20), (1 + t) * RHS) ** 2)
    reverse, forward = jax.jit(lambda t: (jax.grad(value)(t), jax.jvp(value, (t,), (1.0,))[1]))(0.3)
    np.testing.assert_allclose(reverse, forward, rtol=1e-9)
    np.testing.assert_allclose(forward, (exact(0.3 + 1e-5) - exact(0.3 - 1e-5)) / 2e-5, rtol=1e-7)


def test_further_calls_with_new_values_compile_nothing():
    sizes = lambda: (linear._cg_compiled._cache_size(), linear._solve._cache_size(), linear._factor._cache_size())
    for scale in (1.0, 2.0, 3.0):
        factored = Factored.of(scale * M, "cholesky")
        factored.solve(scale * RHS)
        cg(scale * M, RHS, preconditioner=factored, tolerance=1e-9 * scale, max_steps=int(10 * scale))
        if scale == 1.0:
            first = sizes()
    assert sizes() == first


def test_cg_takes_pytrees_and_keeps_float32():
    b = {"u": jnp.ones(3, jnp.float32), "v": jnp.ones((2, 2), jnp.float32)}
    end = cg(lambda x: {"u": 2 * x["u"], "v": 4 * x["v"]}, b)
    assert end.value["v"].dtype == end.residual.dtype == jnp.float32
    np.testing.assert_allclose(end.value["v"], 0.25, rtol=1e-6)


def test_cg_takes_an_operator_object_of_lineax():
    lineax = pytest.importorskip("lineax")
    end = cg(lineax.MatrixLinearOperator(jnp.asarray(M), lineax.positive_semidefinite_tag), RHS, tolerance=1e-10)
    np.testing.assert_allclose(end.value, run(M, RHS).value, rtol=1e-9)


# Refusals.


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: Factored.of(BLOCK), ShapeError, "matrix must be a square matrix"),
    (lambda: Factored.of(np.ones((2, 2, 2))), ShapeError, r"use jax.vmap\(Factored.of\)"),
    (lambda: Factored.of(SPD, "diagonal"), ShapeError, "matrix must be a vector"),
    (lambda: Factored.of(SPD, "qr"), UnknownNameError, "kind 'qr' is not known"),
    (lambda: Factored.of(-SPD, "cholesky"), MatrixError, "matrix must be positive definite, its smallest eigenvalue is -"),
    (lambda: Factored.of(np.ones((2, 2)), "lu"), MatrixError, "matrix must be invertible, got a zero pivot at row 1"),
    (lambda: Factored.of(np.array([1.0, 0.0])), MatrixError, "matrix must be invertible, got a zero pivot at row 1"),
    (lambda: Factored.of(GENERAL, "eigh"), MatrixError, "matrix must be symmetric"),
    (lambda: Factored.of(SPD).solve(np.ones(3)), ShapeError, r"b must have shape \(5,\) or \(5, any\)"),
    (lambda: Factored.of(SPD).solve(np.ones(N, np.float32)), PrecisionError, "matrix float64, b float32"),
    (lambda: Factored.of(SPD).solve_shifted(VECTOR, 1.0), ArgumentError, "solve_shifted needs a factor of kind 'eigh'"),
    (lambda: cg(M, RHS, tolerance=1e-16), ToleranceError, "tolerance must be at least 2.2e-15 for float64"),
    (lambda: cg(M, RHS, tolerance=-1.0), ArgumentError, "tolerance must be a number above 0"),
    (lambda: cg(M, RHS, max_steps=0), ArgumentError, "max_steps must be a whole number at least 1"),
    (lambda: cg(M, RHS * np.nan), NonFiniteInputError, "b must be finite"),
    (lambda: cg(M, RHS, x0=np.ones(3)), ShapeError, "x0 must match b"),
    (lambda: cg(lambda x: x[:3], RHS), ShapeError, r"operator\(b\) must match b"),
    (lambda: cg(M, RHS, preconditioner=np.ones((3, 3))), ShapeError, "preconditioner must be 20 x 20"),
    (lambda: cg(M, {"u": RHS}), ShapeError, "operator may be a matrix only when b is a vector"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
