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
from theorylab.hypergradient.analysis import singular_triple

X = jnp.array([0.3, -0.2, 0.5, 1.0])
NEWTON = (0.273828277422, 0.098376051530, 0.128543416285)
ONE_POINT = (0.599060218700, 0.587358464491, 0.586954435018)


def near(found, expected, rtol=1e-10):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)


@functools.cache
def solved(make):
    case = make()
    return case, oracles.solution(case.problem, case.y)


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


def test_the_constant_of_the_plain_formula_and_its_parts():
    case, x = solved(cases.generic)
    found = hg.efficiency_constant(case.problem, x, case.y)
    near(found.value, case.known["C"])
    near(found.outer + found.mixed + found.bent, found.value * found.left)
    assert Status(int(found.status)) == Status.CONVERGED
    J, G11, G21, slope = eqx.filter_jit(lambda p: (oracles.jacobian(p, x, case.y), jax.hessian(p.outer)(x, case.y),
                                                   jax.jacfwd(jax.grad(p.outer, 1))(x, case.y), oracles.omega_x(p, x, case.y)))(case.problem)
    near(found.limit, np.linalg.norm(G21 + J.T @ G11, 2))
    near(found.outer, (G21 + J.T @ G11) @ found.right)
    near(np.abs(np.linalg.svd(slope)[0][:, 0] @ np.asarray(found.left)), 1.0)
    near(jnp.linalg.norm(slope @ case.d), case.known["turned"])


def test_the_constant_of_a_root_problem_away_from_the_solution():
    case = cases.root()
    slope = eqx.filter_jit(oracles.omega_x)(case.problem, X, case.y)
    near(hg.efficiency_constant(case.problem, X, case.y).value, np.linalg.norm(slope, 2))


def test_an_affine_outer_objective_leaves_nothing_that_a_reparametrization_cannot_remove():
    case, x = solved(cases.affine)
    found = hg.efficiency_constant(case.problem, x, case.y)
    assert float(found.limit) < 1e-12 < float(found.value)
    near(found.outer, np.zeros(3))


def test_super_efficient_estimators_have_constant_zero():
    case, x = solved(cases.generic)
    for how in (hg.OnePoint(), hg.NewtonPoint()):
        assert float(hg.efficiency_constant(case.problem, x, case.y, how).value) < 1e-11


@pytest.mark.parametrize("make", [cases.p3], ids=["p3"])
def test_constants_of_all_estimators_in_the_plane(make):
    problem, y, _, known = make()
    x = problem.exact(y)
    near(hg.efficiency_constant(problem, x, y).value, known["C"]["Plain"], 1e-10)
    near(hg.efficiency_constant(problem, x, y, hg.Preconditioned()).value, known["C"]["Preconditioned"], 1e-10)
    for name in ("linear", "exponential", "hessian"):
        near(hg.efficiency_constant(problem, x, y, hg.Reparametrized(name)).value, known["C"][name], 1e-10)


@pytest.mark.parametrize("name", ["diabetes", "breast_cancer"])
def test_constants_on_real_data(name):
    problem, y, _, known = cases.data(name)
    x = problem.exact(y)
    x = oracles.solution(problem, y) if x is None else x
    np.testing.assert_allclose(jnp.linalg.norm(x), known["x_norm"], rtol=1e-10)
    gradient = hg.hypergradient(problem, x, y, hg.Plain()).value
    np.testing.assert_allclose([jnp.linalg.norm(gradient), problem.outer(x, y)], [known["gradient_norm"], known["L"]], rtol=1e-10)
    np.testing.assert_allclose(gradient[jnp.array([0, -1])], known["ends"], rtol=1e-8)
    chosen = {"C": None, "C_precond": hg.Preconditioned(), "C_linear": hg.Reparametrized("linear"), "C_exponential": hg.Reparametrized("exponential")}
    for key, how in chosen.items():
        np.testing.assert_allclose(hg.efficiency_constant(problem, x, y, how).value, known[key], rtol=2e-6)


# Predicted and observed errors.


def test_predicted_errors_are_those_of_the_expansion():
    case, x = solved(cases.generic)
    predict = lambda how: hg.predicted_error(case.problem, x, case.y, case.d, how)  # noqa: E731
    first = predict(hg.Plain()).first
    near(np.linalg.norm(first), case.known["turned"])
    near(predict(hg.NewtonPoint()).second, NEWTON, 1e-9)
    near(predict(None).second, ONE_POINT, 1e-9)
    near(predict(hg.NewtonPoint()).first, np.zeros(3))
    contraction = np.eye(4) - (H := np.asarray(case.problem.at(x, case.y).matrix())) / np.diag(H)[:, None]
    near(np.linalg.norm(contraction, 2), case.known["jacobi"])
    near(predict(hg.Preconditioned()).first, predict_along(case, x, contraction @ np.asarray(case.d)), 1e-9)


def predict_along(case, x, direction):
    return hg.predicted_error(case.problem, x, case.y, direction, hg.Plain()).first


@pytest.mark.parametrize(("how", "order", "size"), [(hg.Plain(), 1, 1.3936), (hg.NewtonPoint(), 2, 0.318093), (hg.OnePoint(), 2, 1.023904),
                                                    (hg.Polish(), 2, 0.7351)], ids=["plain", "newton", "one-point", "polish"])
def test_observed_errors_tend_to_the_predicted_vector(how, order, size):
    case, x = solved(cases.generic)
    found = hg.check_super_efficiency(how, case.problem, case.y, solution=x, direction=case.d)
    assert found.super_efficient == (order == 2)
    np.testing.assert_allclose(found.slope, order, atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(found.predicted), size, rtol=1e-4)
    miss = np.linalg.norm(found.observed - found.predicted, axis=1) / found.distances
    assert miss[2] < 1
    np.testing.assert_allclose(miss[2], miss[1], rtol=0.05)


def test_the_remainder_of_the_plain_formula_has_its_constant():
    case, x = solved(cases.generic)
    found = hg.check_super_efficiency(hg.Plain(), case.problem, case.y, solution=x, direction=case.d)
    miss = np.linalg.norm(found.observed - found.predicted, axis=1) / found.distances
    np.testing.assert_allclose(miss, [0.744, 0.745, 0.745, 0.745], atol=6e-4)
    np.testing.assert_allclose(found.errors / found.distances, [1.4315, 1.3972, 1.3940, 1.3936], atol=6e-5)


def test_a_preconditioner_is_of_first_order_and_exactness_has_no_slope():
    problem, y, _, known = cases.p3()
    assert not hg.check_super_efficiency(hg.Preconditioned(), problem, y).super_efficient
    exact = hg.check_super_efficiency(hg.NewtonPoint(), problem, y)
    assert exact.super_efficient
    assert np.isnan(exact.slope)


def test_curves_have_order_one_and_two():
    case, x = solved(cases.generic)
    path = x + jnp.geomspace(1e-1, 1e-4, 6)[:, None] * case.d
    curves = hg.error_curve(case.problem, path, case.y, {"plain": hg.Plain(), "one-point": hg.OnePoint()}, solution=x + 1e-4)
    near(curves["plain"].inner, np.geomspace(1e-1, 1e-4, 6), 1e-9)
    near(curves["plain"].gradient, case.known["gradient"])
    slopes = [np.polyfit(np.log(np.asarray(c.inner)), np.log(np.asarray(c.outer)), 1)[0] for c in curves.values()]
    np.testing.assert_allclose(slopes, [1, 2], atol=0.02)
    np.testing.assert_allclose(curves["one-point"].estimate[3:], curves["plain"].outer[3:], rtol=2e-2)
    assert curves["plain"].estimate is None
    assert (np.asarray(curves["one-point"].status) == Status.COMPLETED).all()


def test_a_closed_form_is_the_reference_of_a_curve():
    problem, y, d, known = cases.p3()
    curve = hg.error_curve(problem, problem.exact(y) + jnp.array([[0.1], [0.01]]) * d, y, hg.Plain())
    near(curve.inner, [0.1, 0.01])
    near(curve.gradient, known["gradient"], 1e-9)


# The corrected value.


def test_the_corrected_value_has_an_error_of_second_order():
    case, x = solved(cases.generic)
    t = 1e-4
    moved = x + t * case.d
    corrected = hg.value_correction(case.problem, moved, case.y)
    np.testing.assert_allclose((float(corrected) - case.known["L"]) / t**2, -0.4017, atol=2e-3)
    adjoint = hg.hypergradient(case.problem, moved, case.y, hg.Plain()).adjoint
    near(hg.value_correction(case.problem, moved, case.y, adjoint=adjoint), corrected)
    assert abs(float(case.problem.outer(moved, case.y)) - case.known["L"]) > 1e-5


GENERIC = cases.generic()
PATH = jnp.stack([X, X])


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: hg.efficiency_constant(GENERIC.problem, X[:2], GENERIC.y), ShapeError, r"x must have shape \(4,\), got \(2,\)"),
    (lambda: hg.efficiency_constant("x", X, X), ArgumentError, "problem must be a bilevel problem"),
    (lambda: hg.efficiency_constant(GENERIC.problem, X, GENERIC.y, "plain"), ArgumentError, "estimator must be an estimator"),
    (lambda: hg.predicted_error(GENERIC.problem, X, GENERIC.y, jnp.ones(3)), ShapeError, r"must have shape \(4,\), got \(3,\)"),
    (lambda: hg.error_curve(GENERIC.problem, X, GENERIC.y), ShapeError, r"path must have shape \(K, n\), one iterate in each row, got \(4,\)"),
    (lambda: hg.error_curve(GENERIC.problem, PATH[:, :3], GENERIC.y), ShapeError, r"x must have shape \(4,\), got \(3,\)"),
    (lambda: hg.error_curve(GENERIC.problem, PATH.at[0, 0].set(jnp.inf), GENERIC.y), NonFiniteInputError, "path must be finite"),
    (lambda: hg.error_curve(GENERIC.problem, PATH, GENERIC.y, {"a": 1}), ArgumentError, "estimator must be an estimator"),
    (lambda: hg.error_curve(GENERIC.problem, PATH, GENERIC.y, solution=1e3 * X), ArgumentError, "the inner solution was not found: after 3 Newton steps"),
    (lambda: hg.check_super_efficiency(None, GENERIC.problem, GENERIC.y), ArgumentError, "estimator must be an estimator"),
    (lambda: hg.check_super_efficiency(hg.Plain(), GENERIC.problem, GENERIC.y, distances=[0.1]), ArgumentError, "distances must be at least two"),
    (lambda: hg.check_super_efficiency(hg.Plain(), GENERIC.problem, GENERIC.y, direction=jnp.zeros(4)), ArgumentError, "direction must not be 0"),
    (lambda: hg.value_correction(GENERIC.problem, X, GENERIC.y, linear="cg"), ArgumentError, "linear must be 'auto' or a linear solver"),
    (lambda: hg.value_correction(GENERIC.problem, X, GENERIC.y, adjoint=jnp.ones(2)), ShapeError, r"must have shape \(4,\), got \(2,\)"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
