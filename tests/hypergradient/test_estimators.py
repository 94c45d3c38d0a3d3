"""Estimators against autodiff of the dense formula, the golden numbers of the companion derivation, and the checks of `hypergradient`."""

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
from theorylab.errors import ArgumentError, MatrixError, NonFiniteInputError, NotConvergedError, PrecisionError, ShapeError, UnknownNameError

X, Y = oracles.X3, oracles.Y2


@eqx.filter_jit
def _dense(problem, x, y):
    """Omega, its Jacobian in x, the Newton step, F_1 and F at any point, by autodiff."""
    return (oracles.omega(problem, x, y), oracles.omega_x(problem, x, y), oracles.newton(problem, x, y), jax.jacfwd(problem.residual)(x, y),
            problem.residual(x, y))


@functools.cache
def dense(kind="energy"):
    problem = oracles.tiny(kind)
    return problem, Y, [np.asarray(a) for a in _dense(problem, X, Y)]


def near(found, expected, rtol=1e-11):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)


# The formulas (Claims 1, 3, 5, 6, 7, 10, 22).


@pytest.mark.parametrize("kind", ["energy", "root"])
def test_the_plain_formula_is_the_dense_one_at_any_point(kind):
    problem, y, (value, *_, F) = dense(kind)
    found = hg.hypergradient(problem, X, y, hg.Plain())
    near(found.value, value)
    near(found.inner_residual, np.linalg.norm(F))
    assert float(found.adjoint_residual) < 1e-12
    assert found.error_estimate is None
    assert Status(int(found.status)) == Status.COMPLETED


def test_the_plain_formula_at_the_solution_is_the_hypergradient():
    case = cases.generic()
    near(hg.hypergradient(case.problem, jnp.array(case.known["x"]), case.y, hg.Plain()).value, case.known["gradient"], 1e-10)
    root, h = oracles.tiny("root"), 1e-5
    values = eqx.filter_jit(eqx.filter_vmap(lambda y: root.outer(oracles.solution(root, y), y)))(Y + h * jnp.concatenate([jnp.eye(2), -jnp.eye(2)]))
    x = oracles.solution(root, Y)
    assert float(jnp.linalg.norm(root.residual(x, Y))) < 1e-12
    near(hg.hypergradient(root, x, Y, hg.Plain()).value, (values[:2] - values[2:]) / (2 * h), 1e-8)


@pytest.mark.parametrize("kind", ["energy", "root"])
def test_the_one_point_correction_is_the_jacobian_of_the_formula_times_the_newton_step(kind):
    problem, y, (value, slope, newton, *_) = dense(kind)
    found = hg.hypergradient(problem, X, y)
    near(found.correction, slope @ newton, 1e-10)
    near(found.value, value - slope @ newton, 1e-10)
    near(found.error_estimate, np.linalg.norm(slope @ newton), 1e-10)


@pytest.mark.slow
def test_every_linear_solver_gives_the_same_estimate():
    problem, y, (value, *_) = dense()
    for found in oracles.each([hg.Plain(linear=how) for how in (hg.LU(), hg.CG(), hg.CG(preconditioner="jacobi"), hg.GMRES())], problem, X, y):
        near(found.value, value, 1e-9)


@pytest.mark.slow
def test_preconditioned_estimators_are_the_formula_at_the_moved_point():
    problem, y, (_, _, newton, H, F) = dense()
    scale, full = np.array([3.0, 4.0, 5.0]), H + 0.3 * np.eye(3)
    F_at = eqx.filter_jit(lambda p, x: p.residual(x, y))
    again = np.asarray(X) - F / np.diag(H)
    again = again - np.asarray(F_at(problem, jnp.asarray(again))) / np.diag(H)  # P is kept
    points = [(hg.Preconditioned(), X - F / np.diag(H)), (hg.Preconditioned("newton"), X - newton), (hg.NewtonPoint(), X - newton),
              (hg.Preconditioned(scale), X - F / scale), (hg.Preconditioned(full), X - np.linalg.solve(full, F)),
              (hg.Preconditioned(_tenth), X - F / 10), (hg.Preconditioned(hg.CG(1e-12)), X - newton), (hg.Preconditioned(steps=2), again)]
    expected = eqx.filter_jit(lambda p, xs: jax.vmap(lambda x: oracles.omega(p, x, y))(xs))(problem, jnp.asarray([x for _, x in points]))
    for found, value in zip(oracles.each([how for how, _ in points], problem, X, y), expected, strict=True):
        near(found.value, value, 1e-9)
        near(found.inner_residual, np.linalg.norm(F))


def _tenth(at, r):
    return r / 10


@pytest.mark.slow
def test_polish_is_the_derivative_through_a_differentiated_newton_step():
    problem, y, _ = dense()

    @eqx.filter_jit
    def direct(problem, frozen):
        J = oracles.jacobian(problem, X, y)

        def value(t):
            x = X + J @ (t - y)
            H = jax.jacfwd(problem.residual)(x, t)
            H = jax.lax.stop_gradient(H) if frozen else H
            return problem.outer(x - jnp.linalg.solve(H, problem.residual(x, t)), t)

        return jax.grad(value)(y)

    found = hg.hypergradient(problem, X, y, hg.Polish()).value
    near(found, direct(problem, False), 1e-10)
    assert np.linalg.norm(found - direct(problem, True)) > 1e-2


def test_an_inexact_adjoint_is_off_by_the_jacobian_times_its_residual():
    problem, y, (value, *_, H, _) = dense()
    found = hg.hypergradient(problem, X, y, hg.Plain(linear=hg.CG(max_steps=2)))
    outer_x, J = eqx.filter_jit(lambda p: (jax.grad(p.outer)(X, y), oracles.jacobian(p, X, y)))(problem)
    r = np.asarray(outer_x) - H.T @ np.asarray(found.adjoint)
    near(found.value, value - J.T @ r, 1e-10)
    near(found.adjoint_residual, np.linalg.norm(r))
    assert Status(int(found.status)) == Status.MAX_STEPS


def test_the_error_for_any_adjoint_has_an_exact_form_without_smallness():
    problem, y, v = oracles.tiny(), Y, jnp.array([0.4, -1.0, 2.0])
    solution = oracles.solution(problem, y)

    @eqx.filter_jit
    def both(problem):
        lam = jax.grad(lambda x, y: problem.outer(x, y) - v @ problem.residual(x, y), (0, 1))
        (ax, ay), (bx, by) = lam(X, y), lam(solution, y)
        at = problem.at(X, y)
        r = at.outer_x - at.transposed(v)
        J = oracles.jacobian(problem, solution, y)
        return at.outer_y - at.cross_pullback(v), oracles.omega(problem, solution, y) + ay - by + J.T @ (ax - bx) - J.T @ r

    near(*both(problem))


@pytest.mark.parametrize("case", [cases.p1, cases.p4], ids=["p1", "p4"])
def test_scalar_golden_numbers(case):
    problem, y, _, known = case()
    names = [name for name in ("Plain", "NewtonPoint", "OnePoint", "Preconditioned") if name in known]
    found = oracles.each([getattr(hg, name)() for name in names], problem, jnp.array([known["x"] + known["at"]]), y)
    near([float(one.value[0]) for one in found], [known[name] for name in names], 1e-9)


def test_planar_ridge_golden_numbers_and_exactness_of_the_newton_point_at_any_distance():
    problem, y, _, known = cases.p3()
    chosen = [hg.Plain(), hg.Preconditioned(), hg.NewtonPoint()]
    near(problem.exact(y), known["x"], 1e-10)
    plain, precond, newton = oracles.each(chosen, problem, problem.exact(y) + jnp.array(known["at"]), y)
    near(plain.value, known["Plain"], 1e-9)
    near(precond.value, known["Preconditioned"], 1e-9)
    near(newton.value, known["gradient"], 1e-9)
    near(oracles.each(chosen, problem, problem.exact(y) + 30 * jnp.array([0.6, -0.8]), y)[2].value, known["gradient"], 1e-9)


@pytest.mark.slow
def test_a_large_logistic_problem_has_the_published_errors():
    rs, N, p = np.random.RandomState(0), 2000, 200
    s = np.linspace(1, 0.1, p)
    A, w = rs.randn(N, p) * s, rs.randn(p)
    b = np.sign(A @ w + 0.5 * rs.randn(N))
    Av = rs.randn(1000, p) * s
    bv = np.sign(Av @ w + 0.5 * rs.randn(1000))
    y, u = -1 + 0.5 * rs.randn(p), rs.randn(p)
    x = np.zeros(p)
    for _ in range(12):
        q = 1 / (1 + np.exp(b * (A @ x)))
        S = q * (1 - q)
        x -= np.linalg.solve(A.T * S @ A / N + np.diag(np.exp(y) / p), -A.T @ (b * q) / N + np.exp(y) / p * x)
    near(np.linalg.norm(x), 7.4974328664, 1e-9)
    problem, y = hg.LogisticSelection((A, b), (Av, bv)), jnp.asarray(y)
    chosen = [hg.Plain(), hg.OnePoint(), hg.NewtonPoint()]
    exact = oracles.each(chosen, problem, jnp.asarray(x), y)[0].value
    near(np.linalg.norm(exact), 0.00622655087094, 1e-9)
    x = x + 1e-3 * u / np.linalg.norm(u)
    plain, point, newton = oracles.each(chosen, problem, jnp.asarray(x), y)
    error = [float(np.linalg.norm(e.value - exact)) for e in (plain, point, newton)]
    np.testing.assert_allclose(error, [1.462e-6, 7.0e-10, 3.2e-10], rtol=0.02)
    np.testing.assert_allclose(point.error_estimate, error[0], rtol=1e-3)


# The function.


def test_trees_go_in_and_come_out():
    problem = hg.Bilevel(lambda x, y: jnp.sum((x["u"] - y[0]) ** 2) + (x["w"] - y[1]) ** 2, lambda x, y: jnp.sum(x["u"]) * x["w"],
                         x={"u": jnp.zeros(2), "w": 0.0}, y=(jnp.ones(2), 2.0))
    found = hg.hypergradient(problem, {"u": jnp.ones(2), "w": 2.0}, (jnp.ones(2), 2.0))
    near(found.value[0], [2.0, 2.0])
    near(found.value[1], 2.0)
    assert found.adjoint["w"].shape == ()
    assert found.correction[0].shape == (2,)


@pytest.mark.slow
def test_it_batches_compiles_and_differentiates():
    problem, y, (_, slope, *_) = dense()
    ys, xs = jnp.stack([y, y + 0.1]), jnp.stack([X, X - 0.1])
    each = [hg.hypergradient(problem, x, t).value for x, t in zip(xs, ys, strict=True)]
    batched = jax.jit(jax.vmap(lambda x, t: hg.hypergradient(problem, x, t)))(xs, ys)
    near(batched.value, each, 1e-10)
    assert batched.status.shape == (2,)
    near(jax.jacrev(lambda x: hg.hypergradient(problem, x, y, hg.Plain()).value)(X), slope, 1e-9)


def test_other_numbers_or_data_do_not_compile_again():
    traces = []

    def energy(x, y, a):
        traces.append(1)
        return jnp.sum(a * jnp.cosh(x)) - x @ y

    def run(a, x, how):
        return hg.hypergradient(hg.Bilevel(energy, _first, args=(jnp.full(2, a),), x=jnp.zeros(2), y=jnp.ones(2)), x, jnp.ones(2), how)

    run(1.0, jnp.ones(2), hg.OnePoint(linear=hg.CG(1e-9)))
    before = len(traces)
    hg.Bilevel(energy, _first, args=(jnp.full(2, 2.0),), x=jnp.zeros(2), y=jnp.ones(2))
    building = len(traces) - before
    second = run(2.0, jnp.zeros(2), hg.OnePoint(linear=hg.CG(1e-8)))
    assert len(traces) - before == 2 * building
    assert np.isfinite(second.value).all()


def _first(x, y, a):
    return x[0]


@pytest.mark.slow
def test_float32_stays_float32():
    found = hg.hypergradient(oracles.tiny(dtype=jnp.float32), X.astype(jnp.float32), Y.astype(jnp.float32))
    value = hg.hypergradient(oracles.tiny(), X, Y).value
    assert all(a.dtype == jnp.float32 for a in (found.value, found.error_estimate, found.adjoint, found.adjoint_residual, found.correction))
    np.testing.assert_allclose(found.value, value, rtol=2e-5)


@pytest.mark.slow
def test_the_work_of_an_estimate_is_counted():
    known = {hg.Plain(): (0, 0, 1), hg.OnePoint(): (0, 1, 1), hg.NewtonPoint(): (1, 0, 2), hg.Preconditioned(steps=2): (2, 0, 1),
             hg.Polish(): (1, 1, 1), hg.Neumann(5): (0, 17, 0), hg.Unrolled(4): (4, 16, 0), hg.JacobianFree(): (0, 0, 0),
             hg.OneStep(): (1, 1, 1)}  # 12 products find the step
    works = eqx.filter_jit(lambda x, y: [how.estimate(oracles.tiny(), x, y).work for how in known])(oracles.X3, oracles.Y2)
    assert [tuple(int(part) for part in work) for work in works] == list(known.values())


def test_a_warm_adjoint_saves_products():
    problem, y, _ = dense()
    how = hg.Plain(linear=hg.CG(1e-10, max_steps=1))
    cold = hg.hypergradient(problem, X, y, how)
    warm = hg.hypergradient(problem, X, y, how, v0=hg.hypergradient(problem, X, y, hg.Plain()).adjoint)
    assert Status(int(cold.status)) == Status.MAX_STEPS
    assert Status(int(warm.status)) == Status.COMPLETED


def _indefinite(x, y):
    return x[0] ** 2 - 3 * x[1] ** 2 - x @ y


def _sum(x, y):
    return jnp.sum(x)


@pytest.mark.slow
def test_a_hessian_that_is_not_positive_definite_is_named_or_solved_by_another_solver():
    problem = hg.Bilevel(_indefinite, _sum, x=jnp.zeros(2), y=jnp.ones(2))
    with pytest.raises(MatrixError, match=r"inner Hessian F_1 must be positive definite, its smallest eigenvalue is -6 .* linear=LU\(\)"):
        hg.hypergradient(problem, jnp.ones(2), jnp.ones(2))
    near(hg.hypergradient(problem, jnp.ones(2), jnp.ones(2), hg.Plain(linear=hg.LU())).value, [1 / 2, -1 / 6])
    inside = jax.jit(lambda x: hg.hypergradient(problem, x, jnp.ones(2)))(jnp.ones(2))
    assert Status(int(inside.status)) == Status.NONFINITE


def test_strict_refuses_an_unsolved_inner_problem_and_a_failed_solve():
    problem = oracles.tiny()
    near_by = oracles.solution(problem, Y) + 1e-5
    assert Status(int(hg.hypergradient(problem, near_by, Y, strict=True).status)) == Status.COMPLETED
    with pytest.raises(ArgumentError, match=r"x must solve the inner problem for strict=True: \|F\(x, y\)\| is"):
        hg.hypergradient(problem, X, Y, strict=True)
    with pytest.raises(NotConvergedError, match="the linear solve ended with MAX_STEPS and an adjoint residual of"):
        hg.hypergradient(problem, near_by, Y, hg.Plain(linear=hg.CG(1e-10, max_steps=1)), strict=True)


TINY, ROOT = oracles.tiny(), oracles.tiny("root")


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: hg.hypergradient(TINY, jnp.ones(4), Y), ShapeError, r"x must have shape \(3,\), got \(4,\)"),
    (lambda: hg.hypergradient(TINY, X, jnp.ones(4)), ShapeError, r"y must have shape \(2,\), got \(4,\)"),
    (lambda: hg.hypergradient(TINY, X.at[1].set(jnp.nan), Y), NonFiniteInputError, "x must be finite, got nan at index"),
    (lambda: hg.hypergradient(TINY, X, Y, v0=jnp.ones(2)), ShapeError, r"must have shape \(3,\), got \(2,\)"),
    (lambda: hg.hypergradient(TINY, X.astype(jnp.float32), Y), PrecisionError, "x must have the dtype float64"),
    (lambda: hg.hypergradient(TINY, np.asarray(X) + 0j, Y), PrecisionError, "x must hold real numbers"),
    (lambda: hg.hypergradient("ridge", X, X), ArgumentError, "problem must be a bilevel problem such as Bilevel"),
    (lambda: hg.hypergradient(TINY, X, Y, "plain"), ArgumentError, r"estimator must be an estimator such as OnePoint\(\)"),
    (lambda: hg.hypergradient(ROOT, X, Y, hg.Plain(linear=hg.CG())), ArgumentError, "got CG: the inner problem is a root problem"),
    (lambda: hg.Plain(linear="cg"), ArgumentError, "linear must be 'auto' or a linear solver"),
    (lambda: hg.Preconditioned("jacoby"), UnknownNameError, "preconditioner 'jacoby' is not known"),
    (lambda: hg.Preconditioned(3.0), ArgumentError, "preconditioner must be a name, a vector, a matrix"),
    (lambda: hg.Preconditioned(steps=0), ArgumentError, "Preconditioned: steps must be at least 1, got 0"),
    (lambda: hg.hypergradient(TINY, X, Y, hg.Preconditioned(jnp.ones(4))), ShapeError,
     r"preconditioner must have shape \(3,\) or \(3, 3\) to match x, got \(4,\)"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
