"""Truncated series, unrolled descent and one-step differentiation against autodiff of the iterations and the dense formula."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.hypergradient import cases, oracles
from theorylab import hypergradient as hg
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError

X = jnp.array([0.3, -0.2, 0.5, 1.0])
ETA = 0.1


def near(found, expected, rtol=1e-10):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)


@eqx.filter_jit
def _facts(problem, x, y):
    return (oracles.omega(problem, x, y), oracles.jacobian(problem, x, y), jax.jacfwd(problem.residual)(x, y), jax.grad(problem.outer)(x, y),
            jax.grad(problem.outer, 1)(x, y), jax.jacfwd(problem.residual, 1)(x, y))


def facts(problem, x, y):
    """Omega, J, F_1, G_1, G_2 and F_2 by autodiff."""
    return [np.asarray(a) for a in _facts(problem, x, y)]


@pytest.mark.parametrize("make", [cases.generic, cases.root], ids=["generic", "root"])
def test_a_series_is_off_by_a_power_of_the_contraction(make):
    case = make()
    value, J, H, outer_x, *_ = facts(case.problem, X, case.y)
    found = hg.hypergradient(case.problem, X, case.y, hg.Neumann(7, ETA))
    left = np.linalg.matrix_power(np.eye(4) - ETA * H.T, 7) @ outer_x
    near(found.value, value - J.T @ left)
    near(found.adjoint_residual, np.linalg.norm(left))
    assert Status(int(found.status)) == Status.COMPLETED


def test_unrolling_is_autodiff_of_gradient_descent():
    case = cases.generic()

    @eqx.filter_jit
    def direct(problem, differentiated):
        def value(y):
            x = X
            for k in range(5):
                y_seen = y if k >= 5 - differentiated else jax.lax.stop_gradient(y)
                x = x - ETA * problem.residual(x, y_seen)
                x = x if k >= 5 - differentiated else jax.lax.stop_gradient(x)
            return problem.outer(x, y)

        return jax.grad(value)(case.y)

    near(hg.hypergradient(case.problem, X, case.y, hg.Unrolled(5, ETA)).value, direct(case.problem, 5))
    near(hg.hypergradient(case.problem, X, case.y, hg.Unrolled(5, ETA, window=2)).value, direct(case.problem, 2))


def test_unrolling_from_the_solution_equals_the_series():
    case = cases.generic()
    x = oracles.solution(case.problem, case.y)
    for terms in (1, 6):
        unrolled, series = (hg.hypergradient(case.problem, x, case.y, how) for how in (hg.Unrolled(terms, ETA), hg.Neumann(terms, ETA)))
        near(unrolled.value, series.value, 1e-11)
        near(unrolled.adjoint, series.adjoint, 1e-11)
        near(unrolled.adjoint_residual, series.adjoint_residual, 1e-10)


def test_a_jacobian_free_estimate_is_a_series_of_one_term():
    case = cases.generic()
    free, series = (hg.hypergradient(case.problem, X, case.y, how) for how in (hg.JacobianFree(ETA), hg.Neumann(1, ETA)))
    near(free.value, series.value)
    near(free.adjoint_residual, series.adjoint_residual)
    x = oracles.solution(case.problem, case.y)
    value, J, H, outer_x, *_ = facts(case.problem, x, case.y)
    bias = hg.hypergradient(case.problem, x, case.y, hg.JacobianFree(ETA)).value - value
    near(bias, -J.T @ (outer_x - ETA * H @ outer_x))
    assert np.linalg.norm(bias) > 0.1


@pytest.mark.parametrize("step", ["newton", "gradient"])
def test_one_step_is_autodiff_of_the_last_step(step):
    case = cases.generic()

    @eqx.filter_jit
    def direct(problem):
        def value(y):
            move = oracles.newton(problem, X, y) if step == "newton" else ETA * problem.residual(X, y)
            return problem.outer(X - move, y)

        return jax.grad(value)(case.y)

    near(hg.hypergradient(case.problem, X, case.y, hg.OneStep(step, None if step == "newton" else ETA)).value, direct(case.problem))


def test_one_newton_step_has_the_predicted_first_order_error_of_the_jacobian():
    case = cases.affine()
    problem, y, d = case.problem, case.y, case.d
    x, t = oracles.solution(problem, y), 1e-4
    rows = jnp.eye(4)

    @eqx.filter_jit
    def columns(problem, x):
        """The transposed Jacobian, one outer objective b' x for each entry."""
        each = lambda b: hg.OneStep().estimate(eqx.tree_at(lambda p: p.args[-1], problem, b), x, y).value + jnp.sin(y)
        return jax.vmap(each)(rows)

    @eqx.filter_jit
    def predicted(problem):
        bend = jax.jvp(lambda x: jax.jacfwd(problem.residual)(x, y), (x,), (d,))[1]
        J = oracles.jacobian(problem, x, y)
        return J, -jnp.linalg.solve(jax.jacfwd(problem.residual)(x, y), bend @ J)

    J, slope = predicted(problem)
    near(columns(problem, x), J, 1e-9)
    observed = (columns(problem, x + t * d) - J) / t
    np.testing.assert_allclose(observed, slope, atol=20 * t * np.abs(slope).max())
    np.testing.assert_allclose([np.linalg.norm(observed), np.linalg.norm(observed, 2)], [0.0603, 0.0597], atol=1e-4)


def test_one_newton_step_is_exact_where_the_energy_is_quadratic():
    problem, y, _, known = cases.p3()
    far = problem.exact(y) + jnp.array([3.0, -4.0])
    near(hg.hypergradient(problem, far, y, hg.OneStep()).value, known["gradient"], 1e-9)


def test_default_steps_come_from_power_iterations():
    problem, y, _, known = cases.p3()
    x = problem.exact(y)
    for how in (hg.Neumann(200), hg.Unrolled(200)):
        near(hg.hypergradient(problem, x, y, how).value, known["gradient"], 1e-9)
    moved = hg.hypergradient(problem, x, y, hg.OneStep("gradient"))
    near(moved.value, hg.hypergradient(problem, x, y, hg.Neumann(1)).value)


def test_a_diverging_step_is_refused_outside_and_has_a_status_inside():
    problem, y, _, _ = cases.p3()
    x = problem.exact(y)
    top = np.linalg.eigvalsh(np.asarray(problem.at(x, y).matrix()))[-1]
    inside = jax.jit(lambda x: hg.hypergradient(problem, x, y, hg.Neumann(3, 2.1 / top)))(x)
    assert Status(int(inside.status)) == Status.UNDECIDED
    with pytest.raises(ArgumentError, match=r"step_size must be below 2/lambda_max = .* for the Neumann series to converge"):
        hg.hypergradient(problem, x, y, hg.Neumann(3, 2.1 / top))
    with pytest.raises(ArgumentError, match=r"step_size must be below 2/lambda_max = .* for gradient descent to converge"):
        hg.hypergradient(problem, x + 1, y, hg.Unrolled(2000, 3.0 / top))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: hg.Neumann(0), ArgumentError, "Neumann: terms must be at least 1, got 0"),
    (lambda: hg.Neumann(2, -0.1), ArgumentError, "Neumann: step_size must be above 0"),
    (lambda: hg.Neumann(2, linear=hg.LU()), ArgumentError, r"Neumann takes no linear solver, got linear=LU\(\)"),
    (lambda: hg.JacobianFree(0.0), ArgumentError, "JacobianFree: step_size must be above 0, got 0"),
    (lambda: hg.OneStep("secant"), ArgumentError, "OneStep: step must be one of 'newton', 'gradient', got 'secant'"),
    (lambda: hg.Unrolled(0), ArgumentError, "Unrolled: steps must be at least 1, got 0"),
    (lambda: hg.Unrolled(3, window=0), ArgumentError, "Unrolled: window must be at least 1, got 0"),
    (lambda: hg.Unrolled(3, window=4), ArgumentError, "Unrolled: window must be at most steps = 3, got 4"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
