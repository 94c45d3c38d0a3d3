"""Truncated series, unrolled descent and one-step differentiation against autodiff of the iterations and the dense formula."""

from __future__ import annotations

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.hypergradient import cases, oracles
from theorylab import hypergradient as hg
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError

X, Y, ETA, STEPS, WINDOW = oracles.X3, oracles.Y2, 0.1, 6, 2
EVERY = [hg.Neumann(STEPS, ETA), hg.Unrolled(STEPS, ETA), hg.Unrolled(STEPS, ETA, window=WINDOW), hg.JacobianFree(ETA), hg.OneStep(),
         hg.OneStep("gradient", ETA)]


def near(found, expected, rtol=1e-10):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)


@eqx.filter_jit
def _facts(problem, x, y):
    H = jax.jacfwd(problem.residual)(x, y)
    return oracles.omega(problem, x, y), oracles.jacobian(problem, x, y), H, jax.grad(problem.outer)(x, y)


@eqx.filter_jit
def _differentiated(problem):
    """Autodiff through the iterations themselves: unrolled, unrolled at the end, one Newton step, one gradient step."""

    def unrolled(y, window):
        x = X
        for k in range(STEPS):
            seen = y if k >= STEPS - window else jax.lax.stop_gradient(y)
            x = x - ETA * problem.residual(x, seen)
        return problem.outer(x, y)

    newton = lambda y: problem.outer(X - oracles.newton(problem, X, y), y)
    return jax.grad(unrolled)(Y, STEPS), jax.grad(unrolled)(Y, WINDOW), jax.grad(newton)(Y), jax.grad(unrolled_once)(Y, problem)


def unrolled_once(y, problem):
    return problem.outer(X - ETA * problem.residual(X, y), y)


@functools.cache
def at(kind, solved=False):
    """The problem, Omega, J, F_1 and G_1 by autodiff, and the results of every baseline."""
    problem = oracles.tiny(kind)
    x = oracles.solution(problem, Y) if solved else X
    return problem, [np.asarray(a) for a in _facts(problem, x, Y)], oracles.each(EVERY, problem, x, Y)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["energy", "root"])
def test_a_series_is_off_by_a_power_of_the_contraction(kind):
    _, (value, J, H, outer_x), (series, *_) = at(kind)
    left = np.linalg.matrix_power(np.eye(3) - ETA * H.T, STEPS) @ outer_x
    near(series.value, value - J.T @ left)
    near(series.adjoint_residual, np.linalg.norm(left))
    assert Status(int(series.status)) == Status.COMPLETED


def test_unrolling_and_one_step_are_autodiff_of_the_iterations():
    problem, _, (_, unrolled, windowed, _, newton, gradient) = at("energy")
    for found, expected in zip((unrolled, windowed, newton, gradient), _differentiated(problem), strict=True):
        near(found.value, expected)


def test_unrolling_from_the_solution_equals_the_series():
    _, _, (series, unrolled, *_) = at("energy", solved=True)
    near(unrolled.value, series.value, 1e-11)
    near(unrolled.adjoint, series.adjoint, 1e-11)
    near(unrolled.adjoint_residual, series.adjoint_residual, 1e-10)


def test_a_jacobian_free_estimate_keeps_its_bias_at_the_solution():
    for solved in (False, True):
        _, (value, J, H, outer_x), (_, _, _, free, *_) = at("energy", solved)
        near(free.value - value, -J.T @ (outer_x - ETA * H.T @ outer_x))
        near(free.adjoint_residual, np.linalg.norm(outer_x - ETA * H.T @ outer_x))
        assert np.linalg.norm(free.value - value) > 0.1


def test_the_public_function_takes_baselines():
    problem, _, found = at("energy")
    for how, one in zip(EVERY[:2], found, strict=False):
        near(hg.hypergradient(problem, X, Y, how).value, one.value)


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
    series, unrolled, moved, once = oracles.each([hg.Neumann(200), hg.Unrolled(200), hg.OneStep("gradient"), hg.Neumann(1)], problem, x, y)
    near(series.value, known["gradient"], 1e-9)
    near(unrolled.value, known["gradient"], 1e-9)
    near(moved.value, once.value)


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
