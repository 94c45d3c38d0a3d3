"""Baselines: their formulas, published numbers, known fixed points, exact and stochastic use, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import theorylab as tl
from tests.stiefel.test_landing import DATA, A, B, N, P, gevp, published, walk
from theorylab import stiefel
from theorylab.errors import ArgumentError, InfeasibleStartError

X0 = np.random.default_rng(1).normal(size=(N, P)) / 3
EYE = np.eye(P)


def sym(a):
    return (a + a.T) / 2


def direction(name, x, beta):
    """The directions of the methods, from their displays."""
    g, bx = -A @ x, B @ x
    h = x.T @ bx - EYE
    return {"PLAM": g - bx @ sym(x.T @ g) + beta * bx @ h, "PCAL": g - bx @ sym(x.T @ g) + beta * bx @ h, "QuadraticPenalty": g + beta * bx @ h,
            "GeneralizedHebbian": g - bx @ (x.T @ g)}[name]


def first(method, problem, x0):
    """The point after the first step, without a loop."""
    method = method.prepare(problem)
    return problem.unpack(method.step(problem, method.init(problem, x0, key=jax.random.key(0)), key=jax.random.key(0)).point.x)


@pytest.mark.parametrize("name", ["PLAM", "PCAL", "QuadraticPenalty", "GeneralizedHebbian"])
def test_a_step_is_the_formula(name):
    options = {} if name == "GeneralizedHebbian" else {"penalty": 1.7}
    expected = X0 - 0.1 * direction(name, X0, 1.7)
    if name == "PCAL":
        expected = expected / np.sqrt(np.diag(expected.T @ B @ expected))
    assert np.abs(first(getattr(stiefel, name)(0.1, **options), gevp(), X0) - expected).max() < 1e-14


@pytest.mark.parametrize("kind", ["cholesky", "polar"])
def test_a_riemannian_step_is_the_retracted_gradient(kind):
    x = np.asarray(stiefel.retract(X0, B))
    g = -A @ x
    a = x - 0.1 * (np.linalg.solve(B, g) - x @ sym(x.T @ g))
    gram = a.T @ B @ a
    right = np.linalg.inv(np.linalg.cholesky(gram)).T if kind == "cholesky" else np.linalg.inv(scipy.linalg.sqrtm(gram))
    assert np.abs(first(stiefel.RiemannianDescent(0.1, kind), gevp(), x) - a @ right).max() < 1e-13


@pytest.mark.slow
def test_the_published_gaps_of_the_official_baselines_are_reproduced():
    """The instance of figure 1 at n = 100, p = 50 after 1000 iterations of the official code."""
    a, b, x0 = published(100, 50)
    problem = stiefel.GEVP(a, b, p=50, reference="value")
    best = abs(float(problem.optimum))
    state = walk(stiefel.RiemannianDescent(0.01), problem, x0, 1000)
    assert abs(float(problem.metrics(problem.unpack(state.point.x))["gap"]) / best / 9.6697e-5 - 1) < 1e-4
    state = walk(stiefel.PLAM(0.1, penalty=5.0), problem, x0, 1000)                      # half of the base step
    assert abs(float(problem.metrics(problem.unpack(state.point.x))["gap"]) / best / 1.5e-3 - 1) < 0.02
    for step, bounded, lost in ((0.2, 45, 1000), (0.4, 0, 45)):                          # the base step is lost within 1000, twice that within 45
        for steps, finite in ((bounded, True), (lost, False)):
            state = walk(stiefel.PLAM(step, penalty=20.0), problem, x0, steps)
            assert np.isfinite(state.point.x[0]).all() == finite


def test_the_quadratic_penalty_ends_off_the_manifold_by_the_eigenvalues():
    weight, problem = 20.0, gevp()
    state = walk(stiefel.QuadraticPenalty(0.02, penalty=weight), problem, problem.start(jax.random.key(0)), 8000)
    values = scipy.linalg.eigh(A, B, eigvals_only=True)[-P:]
    assert np.abs(np.linalg.eigvalsh(state.point.grams[0]) - (1 + values / weight)).max() < 1e-8


def test_backtracking_descends_and_converges():
    problem = gevp()
    sol = tl.iterate(problem, stiefel.RiemannianDescent(50.0, search=True), steps=300, stop=tl.Below("gap", 1e-10))
    assert sol.status.name == "CONVERGED"
    assert np.all(np.diff(sol.history["objective"]) <= 1e-15)
    assert sol.history["step_size"][1] < 50.0
    assert np.max(sol.history["infeasibility"]) < 1e-13
    assert np.abs(sol.value - first(stiefel.RiemannianDescent(0.3), problem, sol.value)).max() < 1e-4


@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_rolling_descent_ends_feasible_for_the_regularized_mean(ridge):
    problem = stiefel.ICA(DATA, p=2, sign=1)
    method = stiefel.RollingRiemannian(0.1, batch_size=16, ridge=ridge)                 # 60 rows: the last batch of a pass holds 12
    x = np.asarray(walk(method, problem, problem.start(jax.random.key(0)), 12).point.x[0]).T
    centred = DATA - DATA.mean(axis=0)
    violation = x.T @ (centred.T @ centred / 60) @ x - np.eye(2)
    assert np.abs(violation + ridge * x.T @ x).max() < 1e-13


def test_running_means_make_plam_exact_after_the_first_pass():
    problem = stiefel.CCA(DATA, DATA[:, :3] ** 2, p=2, ridge=0.1)
    x0 = problem.start(jax.random.key(0))
    mean = stiefel.PLAM(0.05, batch_size=20, average="first_pass", order="sequential")
    state = walk(mean, problem, x0, 3)                                                  # the means are complete after three batches of 60 rows
    after = problem.unpack(mean.step(problem, state, key=jax.random.key(0)).point.x)
    exact = first(stiefel.PLAM(0.05), problem, problem.unpack(state.point.x))
    assert all(np.abs(a - b).max() < 1e-13 for a, b in zip(after, exact, strict=True))


@pytest.mark.slow
def test_two_time_scales_find_one_eigenvector_from_samples():
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.normal(size=(N, N)))[0]
    a = q @ np.diag(np.linspace(1.0, 0.1, N)) @ q.T
    problem = stiefel.GEVP(stiefel.Population(a), stiefel.Population(B), p=1)
    method = stiefel.GenOja(tl.Inverse(0.1, 50.0), 0.5, batch_size=20, order="independent")
    x0 = problem.start(jax.random.key(0))
    sine = [float(problem.metrics(problem.unpack((walk(method, problem, x0, steps).v,)))["error"]) for steps in (100, 5000)]
    assert sine[1] < 0.1 < sine[0]


@pytest.mark.slow
def test_oja_on_samples_comes_near_the_leading_space():
    problem = stiefel.GEVP(stiefel.Population(A), stiefel.Population(B), p=P)
    method = stiefel.GeneralizedHebbian(tl.Inverse(0.05, 200.0), batch_size=20, order="independent")
    state = walk(method, problem, problem.start(jax.random.key(0)), 3000)
    row = problem.metrics(problem.unpack(state.point.x))
    assert row["gap"] < 0.02 * abs(problem.optimum)
    assert row["infeasibility"] < 0.2


@pytest.mark.slow
def test_float32_stays_and_one_or_all_columns_work():
    for p in (1, N):
        problem = stiefel.GEVP(jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32), p=p, reference="none")
        state = walk(stiefel.RiemannianDescent(0.1), problem, problem.start(jax.random.key(0)), 1)
        assert state.point.x[0].dtype == jnp.float32 and np.isfinite(state.point.x[0]).all()


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: stiefel.RiemannianDescent(0.0), ArgumentError, "step_size must be above 0"),
    (lambda: stiefel.RiemannianDescent(0.1, "qr"), ArgumentError, "retraction must be one of"),
    (lambda: stiefel.RiemannianDescent(0.1, search="armijo"), ArgumentError, "search must be one of"),
    (lambda: stiefel.RollingRiemannian(0.1, ridge=0.0), ArgumentError, "ridge must be above 0"),
    (lambda: stiefel.PLAM(0.1, penalty=-1.0), ArgumentError, "penalty must be at least 0"),
    (lambda: stiefel.PCAL(0.1, average="all"), ArgumentError, "average must be one of"),
    (lambda: stiefel.GenOja(0.1, inner_step=0.0), ArgumentError, "inner_step must be above 0"),
    (lambda: first(stiefel.GenOja(0.1), gevp(), X0), ArgumentError, "must have p = 1, got p = 3"),
    (lambda: first(stiefel.PLAM(0.1, batch_size=8), gevp(), X0), ArgumentError, "GEVP holds no rows of data"),
    (lambda: first(stiefel.RollingRiemannian(0.1), gevp(), X0), ArgumentError, "batch_size must be given"),
    (lambda: first(stiefel.RollingRiemannian(0.1), stiefel.ICA.streamed(DATA, p=2).feed(DATA), X0[:, :2]), ArgumentError, "per_pass must be given"),
    (lambda: stiefel.RiemannianDescent(0.1).check(gevp(), 0 * X0), InfeasibleStartError, "smallest eigenvalue is 0"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
