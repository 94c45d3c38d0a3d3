"""Certificates: never below the true error, near it once Newton's method converges, with the numbers of the companion derivation."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.hypergradient import cases, oracles
from theorylab.errors import ArgumentError, NonFiniteInputError, ShapeError, UnknownNameError
from theorylab.hypergradient.bilevel import Bilevel
from theorylab.hypergradient.bounds import ball, certificate, error_bound
from theorylab.hypergradient.estimators import NewtonPoint, OnePoint, Plain
from theorylab.hypergradient.inner import reference
from theorylab.hypergradient.selection import LogisticSelection, RidgeSelection, SoftmaxSelection

DISTANCES = np.array([3.0, 1.0, 0.3, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-12, 0.0])


@cache
def truth(name):
    """The solution and the hypergradient of a data set at y uniform in [-1, 1]."""
    case = cases.data(name)
    y = jnp.asarray(2 * np.random.RandomState(0).rand(case.problem.m) - 1)
    x = cases.solved(case.problem, y)
    return y, x, jax.jit(partial(oracles.omega, case.problem))(x, y)


@jax.jit
def along(problem, xs, y):
    """Values and bounds of the plain, the one-point and the Newton-point estimate at each row of `xs`."""

    def one(x):
        values = jnp.stack([estimator.estimate(problem, x, y).value for estimator in (Plain(), OnePoint(), NewtonPoint())])
        return values, jax.vmap(lambda value: error_bound(problem, x, y, value)[0])(values)

    return jax.lax.map(one, xs)


@cache
def errors_and_bounds(name):
    case, (y, x, gradient) = cases.data(name), truth(name)
    values, bounds = along(case.problem, x + DISTANCES[:, None] * case.d, y)
    return np.linalg.norm(values - gradient, axis=2), np.asarray(bounds)


@pytest.mark.parametrize("name", ["diabetes", "breast_cancer", "wine"])
def test_the_bound_is_above_the_error_and_within_five_percent_in_the_last_decades(name):
    errors, bounds = errors_and_bounds(name)
    assert (bounds >= errors).all()
    last = (DISTANCES <= 1e-4) & (DISTANCES >= 1e-8)
    assert (bounds[last, 0] <= 1.05 * errors[last, 0]).all()
    assert (bounds[-1] < 1e-9 * np.linalg.norm(truth(name)[2])).all()


def test_a_quadratic_problem_has_an_exact_certificate_at_every_distance():
    errors, bounds = errors_and_bounds("diabetes")
    np.testing.assert_allclose(bounds[:9, 0], errors[:9, 0], rtol=1e-3)
    assert (bounds[:9, 2] < 1e-11).all()


@jax.jit
def descended(problem, x, y, steps):
    step = 1 / problem.curvature(y)[1]
    return jax.lax.fori_loop(0, steps, lambda _, x: x - step * problem.residual(x, y), x)


@pytest.mark.parametrize(("name", "steps", "high"), [("diabetes", 400, 780), ("breast_cancer", 1600, 650)])
def test_the_raw_bound_is_valid_and_loose_by_hundreds_late_in_the_inner_run(name, steps, high):
    case, (y, solution, gradient) = cases.data(name), truth(name)
    found = certificate(case.problem, descended(case.problem, jnp.zeros_like(solution), y, steps), y, Plain(), "raw")
    error = np.linalg.norm(found.value - gradient)
    assert 1e-12 < error < 1e-4 * np.linalg.norm(gradient)
    assert 190 * error <= found.error_bound <= high * error


def drawn(kind, seed):
    rng = np.random.default_rng(seed)
    A, A_out, w = (rng.standard_normal(shape) for shape in ((12, 3), (7, 3), (3, 2)))
    scale = np.exp(rng.uniform(-2, 2))
    if kind is SoftmaxSelection:
        labels = [np.argmax(a @ np.c_[w, -w.sum(1)] + rng.gumbel(size=(len(a), 3)), axis=1) for a in (A, A_out)]
        problem = kind((scale * A, labels[0]), (A_out, labels[1]), classes=3)
    else:
        targets = [a @ w[:, 0] + rng.standard_normal(len(a)) for a in (A, A_out)]
        targets = [np.where(t > 0, 1.0, -1.0) for t in targets] if kind is LogisticSelection else targets
        targets[0][0], targets[1][0] = (-abs(t[1]) if t[1] > 0 else abs(t[1]) for t in targets)
        problem = kind((scale * A, targets[0]), (A_out, targets[1]))
    y = jnp.asarray(rng.uniform(-3, 3, 3))
    return problem, y, rng.standard_normal(problem.n)


@jax.jit
def exact(problem, x, y):
    """The hypergradient from the solution x, and the smallest eigenvalue of the Hessian."""
    return Plain().estimate(problem, x, y).value, jnp.linalg.eigvalsh(problem.at(x, y).matrix())[0]


ball_at = jax.jit(lambda problem, x, y: ball(problem, problem.at(x, y)))


@pytest.mark.slow
@given(st.sampled_from([LogisticSelection, SoftmaxSelection]), st.integers(0, 10**6), st.floats(-9, 1))
@settings(max_examples=30, deadline=None)
def test_no_draw_breaks_the_bound_or_leaves_the_ball(kind, seed, exponent):
    problem, y, d = drawn(kind, seed)
    solution = problem.pack_x(reference(problem, y))
    gradient, smallest = exact(problem, solution, y)
    x = solution + 10**exponent * d
    values, bounds = (np.asarray(a[0]) for a in along(problem, x[None], y))
    assert (bounds >= np.linalg.norm(values - gradient, axis=1)).all()
    radius, mu = ball_at(problem, x, y)
    assert jnp.linalg.norm(x - solution) <= radius
    assert mu <= smallest * (1 + 1e-12)


def test_the_public_function_packs_and_sets_the_bound():
    case, (y, x, gradient) = cases.data("wine"), truth("wine")
    found = certificate(case.problem, case.problem.unpack_x(x + 1e-4 * case.d), y, NewtonPoint())
    assert found.value.shape == y.shape and found.adjoint.shape == case.problem.shape
    assert jnp.linalg.norm(found.value - gradient) <= found.error_bound < 1e-7


def test_single_precision_keeps_its_dtype_and_its_bound():
    case, (y, x, gradient) = cases.data("diabetes"), truth("diabetes")
    half = lambda pair: tuple(np.asarray(a, np.float32) for a in pair)
    single = RidgeSelection(half((case.problem.A, case.problem.b)), half((case.problem.A_out, case.problem.b_out)))
    for t in (1e-1, 1e-3, 0.0):
        found = certificate(single, (x + t * case.d).astype(jnp.float32), y.astype(jnp.float32), Plain())
        assert found.error_bound.dtype == jnp.float32
        assert np.linalg.norm(np.asarray(found.value, float) - gradient) <= float(found.error_bound)


RIDGE = RidgeSelection((jnp.eye(2), jnp.ones(2)), (jnp.eye(2), jnp.ones(2)))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: certificate(3, jnp.ones(2), jnp.ones(2)), ArgumentError, "problem must be a bilevel problem"),
    (lambda: certificate(Bilevel(lambda x, y: x**2, lambda x, y: x, x=0.0, y=0.0), 0.0, 0.0), ArgumentError, "got Bilevel; hypergradient"),
    (lambda: certificate(RIDGE, jnp.ones(3), jnp.ones(2)), ShapeError, "x must"),
    (lambda: certificate(RIDGE, jnp.ones(2), jnp.array([1.0, jnp.nan])), NonFiniteInputError, "y must be finite"),
    (lambda: certificate(RIDGE, jnp.ones(2), jnp.ones(2), "plain"), ArgumentError, "estimator must be an estimator"),
    (lambda: certificate(RIDGE, jnp.ones(2), jnp.ones(2), kind="tight"), UnknownNameError, "kind 'tight' is not known"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
