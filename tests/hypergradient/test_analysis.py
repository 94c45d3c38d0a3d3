"""Efficiency constants against dense singular values, predicted errors against observed ones, and the golden numbers."""

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
from theorylab.errors import ArgumentError, NonFiniteInputError, ShapeError
from theorylab.hypergradient.analysis import predicted, singular_triple

X, Y = oracles.X3, oracles.Y2
NEWTON = (0.273828277422, 0.098376051530, 0.128543416285)
ONE_POINT = (0.599060218700, 0.587358464491, 0.586954435018)


def near(found, expected, rtol=1e-10):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)


@functools.cache
def generic():
    """The generic problem, its y, d and numbers, and its solution."""
    case = cases.generic()
    return *case, oracles.solution(case.problem, case.y)


@functools.cache
def tiny():
    """A small problem at its solution."""
    problem = oracles.tiny()
    return problem, oracles.solution(problem, Y)


@eqx.filter_jit
def slopes(estimators, problem, x, y):
    """Dense Jacobians in x of the values of several estimators, by autodiff."""
    return jax.jacfwd(lambda x: [how.estimate(problem, x, y).value for how in estimators])(x)


# The constant.


def test_the_triple_of_a_map_given_by_products():
    rng = np.random.default_rng(3)
    for shape in ((7, 5), (3, 9)):
        A = rng.standard_normal(shape)
        sigma, left, right, residual = jax.jit(lambda A: singular_triple(lambda h: A @ h, lambda u: u @ A, A[:, 0], min(A.shape)))(jnp.asarray(A))
        near(sigma, np.linalg.norm(A, 2))
        near(A @ np.asarray(right), float(sigma) * np.asarray(left))
        assert float(residual) < 1e-10
    low = np.outer(np.arange(1.0, 6.0), np.arange(1.0, 5.0))  # rank one: the Krylov space ends early
    sigma, *_, residual = jax.jit(lambda A: singular_triple(lambda h: A @ h, lambda u: u @ A, A[:, 0], 4))(jnp.asarray(low))
    near(sigma, np.linalg.norm(low, 2))
    assert float(residual) < 1e-9
    assert float(singular_triple(lambda h: 0 * h, lambda u: 0 * u, jnp.ones(3), 3)[0]) == 0


def test_the_constant_of_the_generic_problem():
    problem, y, _, known, x = generic()
    near(hg.efficiency_constant(problem, x, y).value, known["C"])


@pytest.mark.parametrize("kind", ["energy", "root"])
def test_the_constant_of_the_plain_formula_and_its_parts_at_any_point(kind):
    problem = oracles.tiny(kind)
    found = hg.efficiency_constant(problem, X, Y)
    slope, J, G11, G21 = eqx.filter_jit(lambda p: (oracles.omega_x(p, X, Y), oracles.jacobian(p, X, Y), jax.hessian(p.outer)(X, Y),
                                                   jax.jacfwd(jax.grad(p.outer, 1))(X, Y)))(problem)
    near(found.value, np.linalg.norm(slope, 2))
    near(slope @ found.right, found.value * found.left)
    near(found.outer + found.mixed + found.bent, found.value * found.left)
    near(found.outer, (G21 + J.T @ G11) @ found.right)
    near(found.limit, np.linalg.norm(G21 + J.T @ G11, 2))
    assert Status(int(found.status)) == Status.CONVERGED


def test_an_affine_outer_objective_leaves_nothing_that_a_reparametrization_cannot_remove():
    problem, y, _, known = cases.p1()
    found = hg.efficiency_constant(problem, known["x"], y)
    near([found.value, found.limit, found.outer], [known["C"], 0.0, 0.0])


def test_the_jacobian_of_a_super_efficient_estimator_is_zero_by_autodiff():
    problem, x = tiny()
    for slope in slopes([hg.OnePoint(), hg.NewtonPoint(), hg.Polish()], problem, x, Y):
        np.testing.assert_allclose(slope, 0, atol=1e-12)


def test_constants_of_all_estimators_in_the_plane():
    problem, y, _, known = cases.p3()
    chosen = [hg.Plain(), hg.Preconditioned(), *map(hg.Reparametrized, ("linear", "exponential", "hessian"))]
    found = [np.linalg.norm(slope, 2) for slope in slopes(chosen, problem, problem.exact(y), y)]
    near(found, list(known["C"].values()), 1e-10)
    jacobi = hg.efficiency_constant(problem, problem.exact(y), y, hg.Preconditioned())
    near(jacobi.value, known["C"]["Preconditioned"], 1e-10)
    assert jacobi.outer is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diabetes", "breast_cancer"])
def test_the_constant_on_real_data(name):
    problem, y, _, known = cases.data(name)
    x = hg.reference(problem, y)
    np.testing.assert_allclose([jnp.linalg.norm(x), problem.outer(x, y)], [known["x_norm"], known["L"]], rtol=1e-10)
    gradient = np.asarray(hg.hypergradient(problem, x, y, hg.Plain()).value)
    np.testing.assert_allclose(np.linalg.norm(gradient), known["gradient_norm"], rtol=1e-10)
    np.testing.assert_allclose(gradient[[0, -1]], known["ends"], rtol=1e-8)
    np.testing.assert_allclose(hg.efficiency_constant(problem, x, y).value, known["C"], rtol=4e-6)  # the tables print six digits or more


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diabetes", "breast_cancer"])
def test_constants_of_both_remedies_on_real_data(name):
    problem, y, _, known = cases.data(name)
    chosen = {"C_precond": hg.Preconditioned(), "C_linear": hg.Reparametrized("linear"), "C_exponential": hg.Reparametrized("exponential")}
    found = slopes(list(chosen.values()), problem, hg.reference(problem, y), y)
    np.testing.assert_allclose([np.linalg.norm(slope, 2) for slope in found], [known[key] for key in chosen], rtol=4e-6)


# Predicted and observed errors.


def test_predicted_errors_have_the_golden_vectors():
    problem, y, d, known, x = generic()
    run = eqx.filter_jit(lambda problem: [predicted(how, problem, x, y, d) for how in (hg.Plain(), hg.NewtonPoint(), hg.OnePoint(), hg.Polish())])
    plain, newton, point, polish = run(problem)
    near(np.linalg.norm(plain.first), known["turned"])
    near(newton.second, NEWTON)
    near(point.second, ONE_POINT)
    np.testing.assert_allclose(np.linalg.norm(polish.second), 0.7351, atol=5e-5)
    for one in (newton, point, polish):
        near(one.first, np.zeros(3))


def test_a_preconditioner_multiplies_the_first_order_error():
    problem, x = tiny()
    d = jnp.array([1.0, -2.0, 0.5])
    H = np.asarray(eqx.filter_jit(lambda p: p.at(x, Y).matrix())(problem))
    contraction = np.eye(3) - H / np.diag(H)[:, None]
    near(hg.predicted_error(problem, x, Y, d, hg.Preconditioned()).first,
         hg.predicted_error(problem, x, Y, contraction @ np.asarray(d), hg.Plain()).first, 1e-9)


@pytest.mark.parametrize(("how", "order"), [(hg.Preconditioned(), 1), (hg.OnePoint(), 2), pytest.param(hg.NewtonPoint(), 2, marks=pytest.mark.slow),
                                             pytest.param(hg.Polish(), 2, marks=pytest.mark.slow)], ids=["jacobi", "one-point", "newton", "polish"])
def test_observed_errors_tend_to_the_predicted_vector(how, order):
    problem, x = tiny()
    found = hg.check_super_efficiency(how, problem, Y, solution=x, direction=jnp.array([1.0, -2.0, 0.5]))
    assert found.super_efficient == (order == 2)
    np.testing.assert_allclose(found.slope, order, atol=0.05)
    miss = np.linalg.norm(found.observed - found.predicted, axis=1) / found.distances
    assert np.linalg.norm(found.predicted) > 0.01
    np.testing.assert_allclose(miss[2], miss[1], rtol=0.1)  # the remainder is of one order more


@pytest.mark.slow
def test_the_remainder_of_the_plain_formula_has_its_constant():
    problem, y, d, _, x = generic()
    found = hg.check_super_efficiency(hg.Plain(), problem, y, solution=x, direction=d)
    miss = np.linalg.norm(found.observed - found.predicted, axis=1) / found.distances
    np.testing.assert_allclose(miss, [0.744, 0.745, 0.745, 0.745], atol=6e-4)
    np.testing.assert_allclose(found.errors / found.distances, [1.4315, 1.3972, 1.3940, 1.3936], atol=6e-5)


@pytest.mark.slow
def test_exactness_has_no_slope():
    problem, y, _, _ = cases.p3()
    exact = hg.check_super_efficiency(hg.NewtonPoint(), problem, y)
    assert exact.super_efficient
    assert np.isnan(exact.slope)


def test_curves_have_order_one_and_two():
    problem, x = tiny()
    distance = np.geomspace(1e-1, 1e-4, 4)
    path = x + jnp.asarray(distance)[:, None] * jnp.array([0.6, 0.0, -0.8])
    curves = hg.error_curve(problem, path, Y, {"plain": hg.Plain(), "one-point": hg.OnePoint()}, solution=x + 1e-4)
    near(curves["plain"].inner, distance, 1e-9)
    near(curves["plain"].gradient, hg.hypergradient(problem, x, Y, hg.Plain()).value)
    slopes = [np.polyfit(np.log(distance), np.log(np.asarray(c.outer)), 1)[0] for c in curves.values()]
    np.testing.assert_allclose(slopes, [1, 2], atol=0.05)
    np.testing.assert_allclose(curves["one-point"].estimate[2:], curves["plain"].outer[2:], rtol=2e-2)
    assert curves["plain"].estimate is None
    assert (np.asarray(curves["one-point"].status) == Status.COMPLETED).all()


# The corrected value.


def test_the_corrected_value_has_an_error_of_second_order():
    problem, y, d, known, x = generic()
    t = 1e-4
    moved = x + t * d
    corrected = hg.value_correction(problem, moved, y)
    np.testing.assert_allclose((float(corrected) - known["L"]) / t**2, -0.4017, atol=2e-3)
    adjoint = hg.hypergradient(problem, moved, y, hg.Plain()).adjoint
    near(hg.value_correction(problem, moved, y, adjoint=adjoint), corrected)
    assert abs(float(problem.outer(moved, y)) - known["L"]) > 1e-5


TINY = oracles.tiny()
PATH = jnp.stack([X, X])


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: hg.efficiency_constant(TINY, X[:2], Y), ShapeError, r"x must have shape \(3,\), got \(2,\)"),
    (lambda: hg.efficiency_constant("x", X, X), ArgumentError, "problem must be a bilevel problem"),
    (lambda: hg.efficiency_constant(TINY, X, Y, "plain"), ArgumentError, "estimator must be an estimator"),
    (lambda: hg.predicted_error(TINY, X, Y, jnp.ones(4)), ShapeError, r"must have shape \(3,\), got \(4,\)"),
    (lambda: hg.error_curve(TINY, X, Y), ShapeError, r"path must have shape \(K, n\), one iterate in each row, got \(3,\)"),
    (lambda: hg.error_curve(TINY, PATH[:, :2], Y), ShapeError, r"x must have shape \(3,\), got \(2,\)"),
    (lambda: hg.error_curve(TINY, PATH.at[0, 0].set(jnp.inf), Y), NonFiniteInputError, "path must be finite"),
    (lambda: hg.error_curve(TINY, PATH, Y, {"a": 1}), ArgumentError, "estimator must be an estimator"),
    (lambda: hg.check_super_efficiency(None, TINY, Y), ArgumentError, "estimator must be an estimator"),
    (lambda: hg.check_super_efficiency(hg.Plain(), TINY, Y, distances=[0.1]), ArgumentError, "distances must be at least two"),
    (lambda: hg.check_super_efficiency(hg.Plain(), TINY, Y, distances=[0.1, -0.1]), ArgumentError, "distances must be at least two"),
    (lambda: hg.check_super_efficiency(hg.Plain(), TINY, Y, direction=jnp.zeros(3)), ArgumentError, "direction must not be 0"),
    (lambda: hg.value_correction(TINY, X, Y, linear="cg"), ArgumentError, "linear must be 'auto' or a linear solver"),
    (lambda: hg.value_correction(TINY, X, Y, adjoint=jnp.ones(2)), ShapeError, r"must have shape \(3,\), got \(2,\)"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
