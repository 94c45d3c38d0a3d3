"""Inner methods: plain NumPy recursions, solutions found independently, batches that do not wait, refusals."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from tests.hypergradient import cases
from theorylab import hypergradient as hg
from theorylab.core import tree
from theorylab.errors import ArgumentError, NoClosedFormError, NotConvergedError, ShapeError

KEY = jax.random.key(0)


def slow(*values):
    """Further values of a parameter, for the long run of the tests."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


GENERIC = cases.generic()
ROOT = cases.root()
INNER = GENERIC.problem.inner(GENERIC.y)
SOLUTION = cases.solved(GENERIC.problem, GENERIC.y)
RNG = np.random.default_rng(3)
A, B = RNG.standard_normal((20, 4)), np.sign(RNG.standard_normal(20))
LOGISTIC = hg.LogisticSelection((A, B), (A, B))
RIDGE = hg.RidgeSelection((A, B), (A, B))
Y = np.array([0.5, -1.0, 0.0, 1.0])
D = np.exp(Y) / 4


@partial(jax.jit, static_argnames="steps")
def path(problem, method, x0, steps):
    """The states after 0, 1, ..., steps steps."""
    first = tree.strong(method.init(problem, x0, key=KEY))

    def step(state, _):
        return tree.strong(method.step(problem, state, key=KEY)), state

    return jax.lax.scan(step, first, None, length=steps + 1)[1]


def energy(x):
    return np.mean(np.logaddexp(0, -B * (A @ x))) + D @ x**2 / 2


def gradient(x):
    return A.T @ (-B / (1 + np.exp(B * (A @ x)))) / 20 + D * x


def test_gradient_descent_halves_its_step_while_the_energy_rises_and_keeps_it():
    steep, start = 40.0, np.array([3.0, -2.0, 1.0, 2.0])
    x, size, xs, sizes = start, 1.0, [start], [1.0]
    for _ in range(20):
        g = steep * gradient(x)
        while steep * energy(x - size * g) > steep * energy(x):
            size /= 2
        x = x - size * g
        xs.append(x)
        sizes.append(size)
    problem = hg.Bilevel(scaled_energy, scaled_outer, (jnp.asarray(A), jnp.asarray(B), jnp.asarray(steep)), x=jnp.zeros(4), y=jnp.asarray(Y))
    states = path(problem.inner(Y), hg.GradientDescent(), jnp.asarray(start), 20)
    np.testing.assert_allclose(states.x, xs, rtol=1e-10)
    assert states.size.tolist() == sizes and sizes[-1] < 0.2
    trials = 1 + 20 + int(np.log2(1 / sizes[-1]))
    assert int(states.gradients[-1]) == trials


def scaled_energy(x, y, A, b, scale):
    return scale * (jnp.mean(jax.nn.softplus(-b * (A @ x))) + jnp.exp(y) @ x**2 / 8)


def scaled_outer(x, y, A, b, scale):
    return jnp.sum(x)


def test_gradient_descent_with_a_number_is_the_plain_recursion():
    x = np.ones(4)
    for _ in range(20):
        x = x - 0.4 * gradient(x)
    np.testing.assert_allclose(path(LOGISTIC.inner(Y), hg.GradientDescent(0.4), jnp.ones(4), 20).x[-1], x, rtol=1e-12)


def test_accelerated_gradient_is_the_published_recursion_with_the_constants_of_the_problem():
    L, mu = np.linalg.eigvalsh(A.T @ A / 20)[-1] / 4 + D.max(), D.min()
    beta = (1 - np.sqrt(mu / L)) / (1 + np.sqrt(mu / L))
    x = w = np.ones(4)
    for _ in range(25):
        ahead = w - gradient(w) / L
        x, w = ahead, ahead + beta * (ahead - x)
    inner = LOGISTIC.inner(Y)
    np.testing.assert_allclose(path(inner, hg.AcceleratedGradient().prepare(inner), jnp.ones(4), 25).x[-1], x, rtol=1e-11)
    given = hg.AcceleratedGradient(0.1, 2.0)
    assert given.prepare(inner) is given


def test_newton_solves_a_quadratic_energy_in_one_step():
    states = path(RIDGE.inner(Y), hg.Newton(), jnp.full(4, 30.0), 1)
    np.testing.assert_allclose(states.x[1], np.linalg.solve(A.T @ A / 20 + np.diag(D), A.T @ B / 20), atol=1e-13)


def well(x, y):
    return jnp.sum(x**4) / 4 - jnp.sum(x**2) / 2 - y @ x


def test_newton_leaves_a_region_where_the_hessian_is_not_definite():
    problem = hg.Bilevel(well, lambda x, y: x[0], x=jnp.array([0.05, 0.3]), y=jnp.array([0.1, 0.1]))
    sol = tl.solve(problem.inner(problem.y), tolerance=1e-12)
    roots = np.roots([1, 0, -1, -0.1])
    np.testing.assert_allclose(sol.value, [roots.max()] * 2, rtol=1e-12)
    objective = sol.history["objective"]
    assert (np.diff(objective) <= 1e-12).all()


def test_newton_damps_a_step_that_goes_too_far():
    problem = hg.Bilevel(lambda x, y: jnp.sum(jnp.sqrt(1 + x**2)) - y @ x, lambda x, y: x[0], x=jnp.full(1, 3.0), y=jnp.array([0.5]))
    sol = tl.iterate(problem.inner(problem.y), hg.Newton(), steps=30, stop=tl.Below("residual", 1e-12))
    assert float(sol.value[0]) == pytest.approx(0.5 / np.sqrt(0.75), rel=1e-12)
    full = tl.iterate(problem.inner(problem.y), hg.Newton(damping=False), steps=4, throw=False)
    assert not abs(float(full.value[0])) < 3


@pytest.mark.parametrize("method", slow(hg.LBFGS(), hg.Newton(), hg.LBFGS(memory=2), hg.GradientDescent()))
def test_every_method_finds_the_minimizer_of_the_generic_problem(method):
    sol = tl.iterate(INNER, method, steps=2000, stop=tl.Below("residual", 1e-11))
    np.testing.assert_allclose(sol.value, SOLUTION, atol=1e-11)
    assert float(sol.history["residual"][-1]) == pytest.approx(float(INNER.metrics(sol.value)["residual"]), abs=1e-14)
    assert float(sol.history["objective"][0]) == pytest.approx(float(GENERIC.problem.energy(jnp.zeros(4), GENERIC.y)), rel=1e-14)


@pytest.mark.parametrize("method", slow(hg.Newton(), hg.GradientDescent(0.05)))
def test_root_problems_are_solved_by_newton_and_by_a_fixed_step(method):
    sol = tl.iterate(ROOT.problem.inner(ROOT.y), method, steps=2000, stop=tl.Below("residual", 1e-10))
    np.testing.assert_allclose(sol.value, cases.solved(ROOT.problem, ROOT.y), atol=1e-9)
    assert "objective" not in sol.history


def rosenbrock(x, y):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (y - x[:-1]) ** 2)


def test_lbfgs_follows_the_valley_of_rosenbrock_to_round_off():
    problem = hg.Bilevel(rosenbrock, lambda x, y: x[0], x=jnp.array([-1.2, 1.0, -1.2, 1.0]), y=1.0)
    sol = tl.iterate(problem.inner(1.0), hg.LBFGS(), steps=200, stop=tl.Below("residual", 1e-10))
    np.testing.assert_allclose(sol.value, 1, atol=1e-10)
    assert sol.history["gradients"][-1] == sol.steps + 1 <= 120     # SciPy's L-BFGS-B takes 41 to 60 evaluations to 1e-5 from starts like it


@pytest.mark.slow
def test_lbfgs_on_a_quadratic_ends_as_fast_as_conjugate_gradients():
    diagonal = jnp.logspace(0, 2, 8)
    problem = hg.Bilevel(lambda x, y, a: a @ x**2 / 2 - y @ x, lambda x, y, a: x[0], (diagonal,), x=jnp.zeros(8), y=jnp.ones(8))
    sol = tl.iterate(problem.inner(problem.y), hg.LBFGS(memory=8), steps=60, stop=tl.Below("residual", 1e-10))
    np.testing.assert_allclose(sol.value, 1 / diagonal, atol=1e-10)


@pytest.mark.slow
def test_lbfgs_reaches_the_tolerances_of_the_workload():
    """Workload W1 of the specification: there 15, 32 and 58 iterations lead to gradients of 1e-3, 1e-5 and 1e-8."""
    rs, N, p, Nv = np.random.RandomState(0), 2000, 200, 1000
    s = np.linspace(1, 0.1, p)
    X, w = rs.randn(N, p) * s, rs.randn(p)
    b, Xv = np.sign(X @ w + 0.5 * rs.randn(N)), rs.randn(Nv, p) * s
    bv, y = np.sign(Xv @ w + 0.5 * rs.randn(Nv)), -1 + 0.5 * rs.randn(p)
    problem = hg.LogisticSelection((X, b), (Xv, bv))
    sol = tl.iterate(problem.inner(y), hg.LBFGS(), steps=100, stop=tl.Below("residual", 1e-8))
    residual = sol.history["residual"]
    for level, iterations in ((1e-3, 15), (1e-5, 32), (1e-8, 58)):
        assert np.argmax(residual < level) <= 1.25 * iterations
    assert float(jnp.linalg.norm(sol.value)) == pytest.approx(7.4974328664, rel=1e-6)


@pytest.mark.parametrize("method", [hg.LBFGS(), *slow(hg.Newton(), hg.GradientDescent())])
def test_a_batch_of_settings_gives_what_each_gives_alone(method):
    ys = jnp.asarray([Y, Y - 3, Y + 3])
    ends = jax.jit(jax.vmap(lambda y: method_end(method, LOGISTIC, y)))(ys)
    for y, end in zip(ys, ends, strict=True):
        np.testing.assert_allclose(method_end(method, LOGISTIC, y), end, rtol=1e-9, atol=1e-12)


@jax.jit
def method_end(method, problem, y):
    inner = problem.inner(y)
    state = tree.strong(method.init(inner, problem.start_x(y), key=KEY))
    return jax.lax.fori_loop(0, 12, lambda _, s: tree.strong(method.step(inner, s, key=KEY)), state).x


def test_lbfgs_does_one_evaluation_a_step_whatever_the_data():
    """No loop whose length depends on the data: lanes of a batch never wait for each other."""
    inner, method = LOGISTIC.inner(Y), hg.LBFGS()
    state = method.init(inner, jnp.zeros(4), key=KEY)
    assert "while" not in str(jax.make_jaxpr(lambda s: method.step(inner, s, key=KEY))(state))


@pytest.mark.parametrize("method", [hg.Newton(), *slow(hg.LBFGS(), hg.GradientDescent(), hg.AcceleratedGradient())])
def test_float32_stays_float32(method):
    problem = hg.LogisticSelection((A.astype(np.float32), B), (A.astype(np.float32), B))
    sol = tl.iterate(problem.inner(Y.astype(np.float32)), method, steps=300, stop=tl.Below("residual", 3e-6))
    assert sol.value.dtype == jnp.float32
    np.testing.assert_allclose(sol.value, cases.solved(LOGISTIC, jnp.asarray(Y)), atol=2e-5)


@pytest.mark.parametrize("name", ["BFGS", *slow("LBFGS", "NonlinearCG")])
def test_minimizers_of_optimistix_run_as_methods(name):
    optimistix = pytest.importorskip("optimistix")
    method = hg.Optimistix(getattr(optimistix, name)(rtol=1e-10, atol=1e-10))
    sol = tl.iterate(INNER, method, steps=400, stop=tl.Below("residual", 1e-7))
    np.testing.assert_allclose(sol.value, SOLUTION, atol=1e-6)


def test_starts_may_be_trees_and_solve_chooses_the_method():
    problem = hg.Bilevel(lambda x, y: jnp.sum((x["a"] - y) ** 2) + x["b"] ** 2, lambda x, y: x["b"], x={"a": jnp.zeros(2), "b": 1.0}, y=3.0)
    sol = tl.iterate(problem.inner(3.0), hg.Newton(), {"a": jnp.ones(2), "b": 0.0}, steps=1)
    np.testing.assert_allclose(sol.value, [3, 3, 0], atol=1e-14)
    assert isinstance(problem.inner(3.0).default_method(), hg.Newton) and isinstance(ROOT.problem.inner(ROOT.y).default_method(), hg.Newton)
    wide = hg.Bilevel(lambda x, y: jnp.sum(x**2), lambda x, y: x[0], x=jnp.zeros(501), y=1.0)
    assert isinstance(wide.inner(1.0).default_method(), hg.LBFGS)


SAMPLES = hg.simulated(0, dim_inner=4, dim_outer=3, samples=64)


def test_stochastic_descent_with_all_rows_is_gradient_descent_and_the_error_is_known():
    y, start = jnp.ones(3), jnp.ones(4)
    schedule = tl.InverseSqrt(0.4)
    noisy, plain = (tl.iterate(SAMPLES.inner(y), how, start, steps=20) for how in (hg.StochasticGradient(schedule, 64), hg.GradientDescent(schedule)))
    np.testing.assert_allclose(noisy.value, plain.value, rtol=1e-12)
    x, H, g = np.ones(4), np.asarray(SAMPLES.inner_rows.hessian), np.asarray(SAMPLES.inner_rows.cross @ y + SAMPLES.inner_rows.s.mean(0))
    solution, errors = -np.linalg.solve(H, g), []
    for t in range(21):
        errors.append(np.linalg.norm(x - solution))
        x = x - 0.4 / np.sqrt(t + 1) * (H @ x + g)
    np.testing.assert_allclose(plain.history["error"], errors, rtol=1e-10)


def test_stochastic_descent_on_batches_comes_near_and_refuses_what_has_no_samples():
    far = tl.iterate(SAMPLES.inner(jnp.ones(3)), hg.StochasticGradient(0.1, 16), steps=200, every=200).history["error"]
    assert far[-1] < 0.3 * far[0]
    refused = (SAMPLES.inner(jnp.ones(3)), 65, "batch_size must be at most the 64 samples"), (INNER, 1, "not a mean over samples")
    for problem, size, words in refused:
        with pytest.raises(ArgumentError, match=words):
            tl.iterate(problem, hg.StochasticGradient(0.1, size), jnp.zeros(4), steps=1)


@pytest.mark.parametrize("case", [ROOT, *slow(GENERIC, cases.p1(), cases.p3())])
def test_reference_solutions_are_exact_to_round_off(case):
    x = case.problem.pack_x(hg.reference(case.problem, case.problem.unpack_y(case.y)))
    np.testing.assert_allclose(x, cases.solved(case.problem, case.y), atol=5e-16, rtol=5e-16)


def test_reference_works_in_compiled_batches_and_from_a_start():
    ys = jnp.stack([GENERIC.y, GENERIC.y / 2])
    found = jax.jit(jax.vmap(lambda y: hg.reference(GENERIC.problem, y)))(ys)
    np.testing.assert_allclose(found[1], hg.reference(GENERIC.problem, GENERIC.y / 2, jnp.full(4, 2.0)), atol=1e-15)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: hg.GradientDescent(0.0), ArgumentError, "step_size must be above 0"),
    (lambda: hg.LBFGS(memory=0), ArgumentError, "memory must be at least 1"),
    (lambda: hg.Newton(damping=0.5), ArgumentError, "damping must be one of True, False"),
    (lambda: tl.iterate(GENERIC.problem, hg.Newton(), GENERIC.y, steps=1), ArgumentError, r"made by problem.inner\(y\), got Bilevel"),
    (lambda: tl.iterate(INNER, hg.Newton(), jnp.ones(3), steps=1), ShapeError, r"x must have shape \(4,\)"),
    (lambda: tl.iterate(ROOT.problem.inner(ROOT.y), hg.LBFGS(), jnp.zeros(4), steps=1), ArgumentError, "LBFGS needs an inner energy"),
    (lambda: tl.iterate(ROOT.problem.inner(ROOT.y), hg.GradientDescent(), jnp.zeros(4), steps=1), ArgumentError, "GradientDescent needs"),
    (lambda: tl.iterate(ROOT.problem.inner(ROOT.y), hg.AcceleratedGradient(), jnp.zeros(4), steps=1), ArgumentError, "AcceleratedGradient needs"),
    (lambda: tl.iterate(INNER, hg.AcceleratedGradient(), jnp.zeros(4), steps=1), NoClosedFormError, "knows no constants of curvature"),
    (lambda: tl.iterate(INNER, hg.Optimistix("BFGS"), jnp.zeros(4), steps=1), ArgumentError, "minimizer must be a minimizer of optimistix, got str"),
    (lambda: hg.reference(INNER, GENERIC.y), ArgumentError, "problem must be a bilevel problem, got InnerProblem"),
    (lambda: hg.reference(GENERIC.problem, jnp.ones(4)), ShapeError, r"y must have shape \(3,\)"),
    (lambda: hg.reference(hg.Bilevel(lambda x, y: jnp.exp(-x) + y, lambda x, y: x, x=0.0, y=0.0), 0.0), NotConvergedError, "did not settle")])
def test_wrong_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
