"""Outer descent: the table of the companion derivation, the guarantee of the certified rule, and what is reported when something fails."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from tests.hypergradient import cases, oracles
from theorylab.errors import ArgumentError, NonFiniteError, ShapeError
from theorylab.hypergradient.bilevel import Bilevel
from theorylab.hypergradient.estimators import OnePoint, Plain
from theorylab.hypergradient.inner import AcceleratedGradient, GradientDescent, Newton
from theorylab.hypergradient.linear import CG
from theorylab.hypergradient.outer import InnerCertificate, InnerEstimate, InnerResidual, OuterDescent
from theorylab.hypergradient.selection import RidgeSelection


def descended(inner_tolerance):
    """60 outer steps of size 100 on the breast-cancer data: the worst relative error of the hypergradient, and the inner gradients spent."""
    problem = cases.data("breast_cancer").problem
    method = OuterDescent(100.0, Plain(), AcceleratedGradient(), inner_tolerance, every=5)
    sol = tl.iterate(problem, method, jnp.zeros(30), steps=60, record=tl.whole)
    ys = sol.history["x"]
    true = np.array([oracles.logistic_gradient(problem, y) for y in ys[:-1]])
    error = np.linalg.norm((ys[:-1] - ys[1:]) / 100 - true, axis=1) / np.linalg.norm(true, axis=1)
    return error, sol.history["gradients"][59], sol


@pytest.mark.slow
@pytest.mark.parametrize(("tolerance", "worst", "count"), [
    (1e-3, 0.60, 1565), (InnerEstimate(0.1), 0.11, 1685), (1e-4, 0.058, 4415), (InnerEstimate(0.01), 0.0099, 4390), (InnerEstimate(0.5), 0.55, 700)])
def test_errors_and_costs_on_breast_cancer_are_those_of_the_specification(tolerance, worst, count):
    error, spent, sol = descended(tolerance)
    assert f"{error.max():.2g}" == f"{worst:.2g}"
    assert spent == count
    assert sol.history["unsolved"][-1] == sol.history["failed"][-1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("theta", [0.5, 0.1])
def test_the_certified_rule_keeps_its_promise(theta):
    error, spent, sol = descended(InnerCertificate(theta))
    assert error.max() <= theta
    assert (sol.history["hypergradient_error"] <= theta / (1 + theta) * sol.history["gradient_norm"]).all()
    inner = sol.history["inner_steps"][:60].sum()
    assert inner < 5000 and inner < spent < 1.5 * inner  # each bound takes one gradient more, at the Newton point
    assert sol.history["objective"][-1] < 0.0735


def test_the_automatic_step_size_reaches_a_stationary_point():
    problem = cases.data("breast_cancer").problem
    sol = tl.iterate(problem, OuterDescent(), jnp.zeros(30), steps=400, stop=tl.Below("gradient_norm", 1e-5))
    assert np.linalg.norm(oracles.logistic_gradient(problem, sol.value)) < 1.01e-5
    assert sol.history["objective"][-1] < 0.0707  # 60 steps of size 100 reach 0.0730


def shifted_energy(x, y):
    return jnp.sum((x["a"] - y) ** 2) + jnp.sum(x["b"] ** 2)


def shifted_outer(x, y):
    return jnp.sum((x["a"] - 1.0) ** 2)


TREE = Bilevel(shifted_energy, shifted_outer, x={"a": jnp.zeros(2), "b": jnp.zeros(())}, y=3 * jnp.ones(2))


def test_trees_counters_and_a_closed_form():
    sol = tl.iterate(TREE, OuterDescent(0.25, OnePoint(), Newton(), 1e-10), steps=30)
    np.testing.assert_allclose(sol.value, 1 + 2 * 0.5**30 * np.ones(2), rtol=1e-12)  # y' = y - 2 (y - 1) / 4
    np.testing.assert_allclose(sol.history["objective"], 8 * 0.25 ** np.arange(31), rtol=1e-9)
    np.testing.assert_array_equal(sol.history["factorizations"], 2 * (1 + np.arange(31)))  # one of the inner step, one of the estimate
    np.testing.assert_array_equal(sol.history["products"], 1 + np.arange(31))  # the directional derivative of the correction
    np.testing.assert_array_equal(sol.history["gradients"], 2 * (1 + np.arange(31)))
    np.testing.assert_array_equal(sol.history["inner_steps"], 1)


def test_the_counters_hold_the_adjoint_solves_and_the_looks_of_the_rule():
    quadratic = Bilevel(lambda x, y: jnp.sum((x - y) ** 2), lambda x, y: jnp.sum((x - 1.0) ** 2), x=jnp.zeros(2), y=jnp.zeros(2))
    method = OuterDescent(0.25, OnePoint(linear=CG()), GradientDescent(0.5), "estimate")
    sol = tl.iterate(quadratic, method, 3 * jnp.ones(2), steps=3)
    steps = np.array([1, 1, 1, 1])  # F_1 = 2 I: one step of descent, and of each of the three solves unless its right-hand side is 0
    np.testing.assert_array_equal(sol.history["inner_steps"], steps)
    np.testing.assert_array_equal(np.diff(sol.history["gradients"]), 2)
    np.testing.assert_array_equal(sol.history["factorizations"], 0)
    assert (np.diff(sol.history["products"]) >= 3).all()  # two looks, the second of which is the estimate


def test_runs_in_a_batch_and_schedules():
    method = OuterDescent(tl.InverseSqrt(0.25), Plain(), Newton(damping=False), InnerResidual(1e-10))
    starts = 3 * jnp.stack([jnp.ones(2), -jnp.ones(2)])
    both = tl.iterate(TREE, method, starts, steps=5, runs=2)
    expected = 1 + (np.asarray(starts) - 1) * np.prod(1 - 0.5 / np.sqrt(1 + np.arange(5)))
    np.testing.assert_allclose(both.value, expected, rtol=1e-9)


def test_the_inner_limit_is_reported_and_zero_steps_are_legal():
    sol = tl.iterate(TREE, OuterDescent(0.01, OnePoint(), GradientDescent(1e-3), 1e-10, inner_steps=2), steps=3)
    np.testing.assert_array_equal(sol.history["unsolved"], [1, 2, 3, 4])
    np.testing.assert_array_equal(sol.history["inner_steps"], 2)


def test_a_divergent_run_ends_as_not_finite():
    with pytest.raises(NonFiniteError):
        tl.iterate(TREE, OuterDescent(1e200, OnePoint(), Newton(), 1e-10), steps=10)


@pytest.mark.slow
def test_single_precision():
    problem = Bilevel(shifted_energy, shifted_outer, x={"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros((), jnp.float32)}, y=jnp.ones(2, jnp.float32))
    sol = tl.iterate(problem, OuterDescent(), jnp.full(2, 3.0, jnp.float32), steps=20)
    assert sol.value.dtype == jnp.float32 and sol.history["gradient_norm"].dtype == np.float32
    np.testing.assert_allclose(sol.value, 1, atol=1e-5)


RIDGE = RidgeSelection((jnp.eye(2), jnp.ones(2)), (jnp.eye(2), jnp.ones(2)))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: OuterDescent(-1.0), ArgumentError, "step_size must be above 0"),
    (lambda: OuterDescent(0.1, "plain"), ArgumentError, "estimator must be an estimator"),
    (lambda: OuterDescent(0.1, inner=3), ArgumentError, "inner must be an inner method"),
    (lambda: OuterDescent(0.1, inner_tolerance="tight"), ArgumentError, "inner_tolerance must be a number, 'estimate', 'certified'"),
    (lambda: OuterDescent(0.1, inner_tolerance=-1.0), ArgumentError, "level must be above 0"),
    (lambda: InnerEstimate(0.0), ArgumentError, "theta must be above 0"),
    (lambda: InnerCertificate(0.0), ArgumentError, "theta must be above 0"),
    (lambda: tl.iterate(TREE, OuterDescent(0.1, inner_tolerance="certified"), jnp.ones(2), steps=1), ArgumentError, "got Bilevel"),
    (lambda: tl.iterate(TREE.inner(jnp.ones(2)), OuterDescent(0.1), jnp.ones(3), steps=1), ArgumentError, "must be a bilevel problem"),
    (lambda: tl.iterate(RIDGE, OuterDescent(0.1), jnp.ones(3), steps=1), ShapeError, "y must"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
