"""The planner: predictions against dense formulas and against the errors of the estimators it hands out; refusals."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.hypergradient import cases, oracles
from theorylab.core.linear import Factored
from theorylab.errors import ArgumentError, ShapeError, UnknownNameError
from theorylab.hypergradient.estimators import Plain
from theorylab.hypergradient.plan import DampedDiagonal, Nystrom, plan_correction


@cache
def setting():
    """Breast-cancer data near the solution, and F_1 at another y as a stale matrix."""
    case = cases.data("breast_cancer")
    solution = cases.solved(case.problem, case.y)
    stale = case.problem.at(solution, case.y + 0.5).matrix()
    return case.problem, case.y, solution, solution + 1e-5 * case.d, Factored.of(stale, "cholesky")


@cache
def plan(budget, preconditioner="auto"):
    problem, y, _, x, stale = setting()
    return plan_correction(problem, x, y, budget, stale=stale, preconditioner=preconditioner)


@pytest.mark.slow
def test_the_constants_are_those_of_the_dense_formula():
    problem, y, _, x, stale = setting()
    H, Omega_x = np.asarray(problem.at(x, y).matrix()), np.asarray(jax.jit(lambda x: oracles.omega_x(problem, x, y))(x))
    newton = np.linalg.solve(H, problem.residual(x, y))
    U = np.vstack([newton, jax.random.normal(probe_key(), (8, 30))])
    U /= np.linalg.norm(U, axis=1, keepdims=True)
    root = np.sqrt(np.diag(H))
    values = np.linalg.eigvalsh(H / root / root[:, None])
    inverses = {"plain": np.zeros((30, 30)), "jacobi": np.diag(1 / np.diag(H)), "stale": np.linalg.inv(stale.matrix),
                "damped": np.diag(2 / (values[0] + values[-1]) / np.diag(H))}
    found = plan(2)
    for name, inverse in inverses.items():
        norms = np.linalg.norm((U - U @ H @ inverse.T) @ Omega_x.T, axis=1)
        np.testing.assert_allclose(found.constants[name], np.sqrt(np.mean(norms**2)), rtol=1e-9)
        np.testing.assert_allclose(found.errors[name], norms[0] * np.linalg.norm(newton), rtol=1e-9)


def probe_key():
    from theorylab.core.keys import as_key, stream

    return stream(as_key(0), "probes")


@pytest.mark.parametrize(("budget", "asked", "name"), [(1, "damped", "damped"), (8, "auto", "pcg"), (1, "auto", "stale"), (4, "nystrom", "nystrom")])
def test_the_chosen_estimator_has_the_predicted_error(budget, asked, name):
    problem, y, _, x, _ = setting()
    found = plan(budget, asked)
    assert found.name == name and (asked != "auto" or found.constants[name] == min(found.constants.values()))
    exact = truth()
    value = jax.jit(lambda x: found.estimator.estimate(problem, x, y).value)(x)
    np.testing.assert_allclose(np.linalg.norm(value - exact), found.errors[name], rtol=1e-2)  # second order: about 1e-5 of the error of plain


@cache
def truth():
    problem, y, solution, _, _ = setting()
    return jax.jit(lambda x: oracles.omega(problem, x, y))(solution)


def test_more_products_are_better_and_dominate_the_diagonal():
    constants = [plan(budget).constants for budget in (1, 4, 8)]
    assert constants[0]["pcg"] > 5 * constants[1]["pcg"] > 25 * constants[2]["pcg"]
    assert constants[0]["pcg"] < constants[0]["damped"] < constants[0]["plain"]


def test_the_nystrom_approximation_is_the_inverse_at_full_rank_and_what_its_formula_says_below():
    problem, y, _, x, _ = setting()
    at = problem.at(x, y)
    H = np.asarray(at.matrix())
    root = np.sqrt(np.diag(H))
    S = H / root / root[:, None]
    np.testing.assert_allclose(Nystrom(30)(at, jnp.ones(30)), np.linalg.solve(H, np.ones(30)), rtol=1e-8)
    inverse = np.asarray(jax.vmap(lambda r: Nystrom(6)(at, r))(jnp.eye(30)))
    Q = np.linalg.qr(np.cos(np.arange(1, 901.0) ** 2).reshape(30, 30)[:, :6])[0]
    Y = S @ Q
    heights, U = np.linalg.eigh(Y @ np.linalg.solve(Q.T @ Y, Y.T))
    known = (np.eye(30) - U[:, -6:] @ U[:, -6:].T) / heights[-6] + U[:, -6:] / heights[-6:] @ U[:, -6:].T
    np.testing.assert_allclose(root[:, None] * inverse * root, known, atol=1e-9)


def test_a_diagonal_that_makes_things_worse_is_refused():
    case = cases.data("diabetes")
    x = cases.solved(case.problem, case.y) + 1e-5 * case.d
    found = plan_correction(case.problem, x, case.y, 0, stale=0.3 * case.problem.at(x, case.y).matrix())
    assert {"jacobi", "stale"} <= set(found.refused)  # a third of F_1 turns the error around and doubles it
    assert found.name == "damped"
    with pytest.raises(ArgumentError, match="preconditioner 'jacobi' is refused: a unit of inner error is predicted to become"):
        plan_correction(case.problem, x, case.y, 0, stale=0.3 * case.problem.at(x, case.y).matrix(), preconditioner="jacobi")


def test_a_root_problem_has_the_diagonal_only_and_plain_is_the_last_resort():
    case = cases.root()
    found = plan_correction(case.problem, 1e-3 * case.d, case.y, 3)
    assert set(found.constants) == {"plain", "jacobi"}
    assert found.name in ("plain", "jacobi") and (found.name == "jacobi" or isinstance(found.estimator, Plain))


def test_damping_scales_the_diagonal():
    problem, y, _, x, _ = setting()
    at = problem.at(x, y)
    np.testing.assert_allclose(DampedDiagonal(0.5)(at, jnp.ones(30)), 0.5 / np.diag(at.matrix()), rtol=1e-12)


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"budget": -1}, ArgumentError, "budget must be a whole number at least 0"),
    ({"probes": 0}, ArgumentError, "probes must be a whole number at least 1"),
    ({"preconditioner": "ilu"}, UnknownNameError, "preconditioner 'ilu' is not known"),
    ({"stale": jnp.eye(3)}, ShapeError, "stale must have 30 rows"),
    ({"stale": jnp.ones(3)}, ShapeError, "stale must be a square matrix"),
    ({"x": jnp.ones(3)}, ShapeError, "x must"),
])
def test_bad_input_is_refused(change, error, words):
    problem, y, _, x, _ = setting()
    with pytest.raises(error, match=words):
        plan_correction(**{"problem": problem, "x": x, "y": y, "budget": 0, **change})


def test_a_candidate_that_is_not_there_is_named():
    problem, y, _, x, _ = setting()
    for name, words in (("stale", "needs the argument stale"), ("pcg", "needs a budget of at least 1"), ("nystrom", "needs a budget of at least 1")):
        with pytest.raises(ArgumentError, match=words):
            plan_correction(problem, x, y, 0, preconditioner=name)
