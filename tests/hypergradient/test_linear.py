"""Linear solvers against dense NumPy solves, and what they say when they fail."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, MatrixError, UnknownNameError
from theorylab.hypergradient import linear
from theorylab.hypergradient.bilevel import Bilevel
from theorylab.hypergradient.linear import CG, GMRES, LU, Cholesky, NeumannSeries

X = jnp.array([0.3, -0.2, 0.5, 1.0])
B = np.array([1.0, -2.0, 0.5, 3.0])


def matrix_problem(M, symmetric=False):
    """A root problem with F_1 = M."""
    M = jnp.asarray(M)
    return Bilevel(residual=_linear, outer=_total, args=(M,), x=jnp.zeros(len(M), M.dtype), y=jnp.ones(len(M), M.dtype), symmetric=symmetric)


def _linear(x, y, M):
    return M @ x - y


def _total(x, y, M):
    return jnp.sum(x)


@eqx.filter_jit
def solve(how, at, b, symmetric=True, transpose=False, x0=None):
    return how.factor(at, symmetric).solve(b, transpose, x0)


GENERAL = np.array([[3.0, 1.0, 0.0, 0.2], [-1.0, 2.0, 0.5, 0.0], [0.3, 0.0, 4.0, -1.0], [0.0, 0.7, 1.0, 2.0]])
SPD = GENERAL @ GENERAL.T


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("how", [LU(), GMRES(), GMRES(restart=2), NeumannSeries(400, 0.1)], ids=repr)
def test_general_solvers_solve_both_systems_of_a_root_problem(how, transpose):
    at, M = matrix_problem(GENERAL).at(X, jnp.ones(4)), GENERAL
    end = solve(how, at, jnp.asarray(B), False, transpose)
    M = M.T if transpose else M
    np.testing.assert_allclose(end.value, np.linalg.solve(M, B), rtol=1e-9)
    assert bool(end.converged)
    assert float(end.residual) < 1e-9


@pytest.mark.parametrize("how", [Cholesky(), LU(), CG(), CG(preconditioner="jacobi"), CG(preconditioner=jnp.eye(4)), GMRES()], ids=repr)
def test_solvers_of_energy_problems_agree_with_a_dense_solve(how):
    at, M = matrix_problem(SPD, symmetric=True).at(X, jnp.ones(4)), SPD
    end = solve(how, at, jnp.asarray(B))
    np.testing.assert_allclose(end.value, np.linalg.solve(M, B), rtol=1e-9)
    assert bool(end.converged)


def test_the_residual_is_measured():
    at, M = matrix_problem(SPD, symmetric=True).at(X, jnp.ones(4)), SPD
    for how in (CG(max_steps=2), GMRES(tolerance=1e-2, max_steps=1, restart=2), NeumannSeries(3, 0.05)):
        end = solve(how, at, jnp.asarray(B), True, True)
        np.testing.assert_allclose(end.residual, np.linalg.norm(B - M.T @ np.asarray(end.value)), rtol=1e-10)
        assert float(end.residual) > 1e-3


def test_a_series_leaves_a_power_of_the_contraction():
    at, M = matrix_problem(GENERAL).at(X, jnp.ones(4)), GENERAL
    end = solve(NeumannSeries(5, 0.1), at, jnp.asarray(B), False, True)
    left = np.linalg.matrix_power(np.eye(4) - 0.1 * M.T, 5) @ B
    np.testing.assert_allclose(B - M.T @ np.asarray(end.value), left, rtol=1e-12)
    assert Status(int(end.status)) == Status.COMPLETED


def test_an_iteration_that_ran_out_of_steps_says_so():
    at = matrix_problem(SPD, symmetric=True).at(X, jnp.ones(4))
    assert Status(int(solve(CG(max_steps=2), at, jnp.asarray(B)).status)) == Status.MAX_STEPS
    assert Status(int(solve(GMRES(max_steps=1, restart=2), at, jnp.asarray(B)).status)) == Status.MAX_STEPS


def test_a_start_at_the_solution_needs_no_step():
    at, M = matrix_problem(SPD, symmetric=True).at(X, jnp.ones(4)), SPD
    assert int(solve(CG(), at, jnp.asarray(B), x0=jnp.asarray(np.linalg.solve(M, B))).steps) == 0


def test_an_indefinite_matrix_gives_a_status_in_compiled_code_and_a_sentence_outside():
    at = matrix_problem(np.diag([2.0, 1.0, -0.5, 3.0]), symmetric=True).at(X, jnp.ones(4))
    assert Status(int(solve(Cholesky(), at, jnp.asarray(B)).status)) == Status.NONFINITE
    assert Status(int(solve(CG(), at, jnp.asarray(B)).status)) == Status.UNDECIDED
    for how in (Cholesky(), CG()):
        with pytest.raises(MatrixError, match=r"F_1 must be positive definite, its smallest eigenvalue is -0\.5"):
            how.diagnose(at)
    with pytest.raises(MatrixError, match=r"smallest eigenvalue is -0\.5"):
        Cholesky().factor(at, True)


def test_a_wrong_declaration_of_symmetry_is_seen():
    at = matrix_problem(SPD + 0.05 * (GENERAL - GENERAL.T), symmetric=True).at(X, jnp.ones(4))
    for how in (Cholesky(), CG()):
        assert not bool(solve(how, at, jnp.asarray(B), True, True).converged)
    fair = matrix_problem(SPD, symmetric=True).at(X, jnp.ones(4))
    for how in (Cholesky(), CG()):
        assert bool(solve(how, fair, jnp.asarray(B), True, True).converged)


def test_a_diverging_series_gives_a_status_and_a_sentence():
    at = matrix_problem(SPD, symmetric=True).at(X, jnp.ones(4))
    limit = 2 / np.linalg.eigvalsh(SPD)[-1]
    assert Status(int(solve(NeumannSeries(4, 0.95 * limit), at, jnp.asarray(B)).status)) == Status.COMPLETED
    assert Status(int(solve(NeumannSeries(4, 1.05 * limit), at, jnp.asarray(B)).status)) == Status.UNDECIDED
    assert bool(solve(NeumannSeries(1000), at, jnp.asarray(B)).residual < 1e-9)
    with pytest.raises(ArgumentError, match=f"step_size must be below 2/lambda_max = {limit:.2g}.* for the Neumann series"):
        NeumannSeries(4, 1.05 * limit).diagnose(at)


def test_a_singular_matrix_gives_a_status_and_a_sentence():
    at = matrix_problem(np.diag([1.0, 2.0, 0.0, 3.0])).at(X, jnp.ones(4))
    assert Status(int(solve(LU(), at, jnp.asarray(B), False).status)) == Status.NONFINITE
    with pytest.raises(MatrixError, match="F_1 must be invertible, its smallest singular value is 0"):
        LU().diagnose(at)


def test_float32_stays_float32():
    at = matrix_problem(SPD.astype(np.float32), symmetric=True).at(X.astype(jnp.float32), jnp.ones(4, jnp.float32))
    for how in (Cholesky(), LU(), CG(), GMRES(), NeumannSeries(3)):
        end = solve(how, at, jnp.asarray(B, jnp.float32))
        assert end.value.dtype == end.residual.dtype == jnp.float32
        assert bool(end.converged)


def test_another_tolerance_or_matrix_does_not_compile_again():
    traces = []

    @eqx.filter_jit
    def run(how, at):
        traces.append(1)
        return how.factor(at, True).solve(jnp.asarray(B)).value

    for tolerance, M in ((1e-6, SPD), (1e-8, 2 * SPD)):
        np.testing.assert_allclose(run(CG(tolerance), matrix_problem(M, True).at(X, jnp.ones(4))), np.linalg.solve(M, B), rtol=1e-4)
    assert len(traces) == 1


def test_solves_batch_over_right_hand_sides():
    at = matrix_problem(SPD, True).at(X, jnp.ones(4))
    rows = jnp.asarray(np.stack([B, 2 * B[::-1]]))
    for how in (Cholesky(), CG(), GMRES()):
        end = eqx.filter_jit(lambda how: jax.vmap(how.factor(at, True).solve)(rows))(how)
        np.testing.assert_allclose(end.value, np.linalg.solve(SPD, np.asarray(rows).T).T, rtol=1e-8)


def test_auto_decides_by_size_and_symmetry():
    kinds = [type(linear.solver("auto", n, s)) for n, s in ((1000, True), (1000, False), (1001, True), (1001, False))]
    assert kinds == [Cholesky, LU, CG, GMRES]


AT = matrix_problem(GENERAL).at(X, jnp.ones(4))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: CG().factor(AT, False), ArgumentError, r"got CG: the inner problem is a root problem .* use GMRES\(\) or LU\(\)"),
    (lambda: Cholesky().factor(AT, False), ArgumentError, r"got Cholesky: the inner problem is a root problem .* GMRES\(\) or LU\(\)"),
    (lambda: linear.solver("cg", 3, True), ArgumentError, r"linear must be 'auto' or a linear solver such as CG\(\)"),
    (lambda: CG(preconditioner="ilu"), UnknownNameError, "preconditioner 'ilu' is not known; known: jacobi"),
    (lambda: CG(tolerance=0.0), ArgumentError, "CG: tolerance must be above 0, got 0"),
    (lambda: CG(max_steps=0), ArgumentError, "CG: max_steps must be at least 1, got 0"),
    (lambda: GMRES(restart=0), ArgumentError, "GMRES: restart must be at least 1, got 0"),
    (lambda: NeumannSeries(0), ArgumentError, "NeumannSeries: terms must be at least 1, got 0"),
    (lambda: NeumannSeries(3, -1.0), ArgumentError, "NeumannSeries: step_size must be above 0, got -1"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
