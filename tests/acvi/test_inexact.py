"""Inexact ACVI: counts of the specification, the inner iterations, the domain of the barrier, and adaptive accuracy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from theorylab import acvi
from theorylab.acvi.inexact import Krylov, Root
from theorylab.errors import ArgumentError, InfeasibleStartError

PAPER = acvi.InexactACVI(0.5, acvi.MuSchedule(1e-6, 0.8, 100, 10), inner=acvi.GradientDescentAscent(0.05), inner_steps=10, barrier_steps=10,
                         barrier_step_size=0.05, output="x")
A = np.random.default_rng(1).standard_normal((5, 7))
GAME = acvi.MatrixGame(A)
SQUARE = acvi.constrained_bilinear()
KEY = jax.random.key(0)


@partial(jax.jit, static_argnames="steps")
def path(problem, method, x0, steps):
    """States after 1, 2, ... steps."""
    method = method.prepare(problem)

    def step(state, _):
        after = tl.core.tree.strong(method.step(problem, state, key=KEY))
        return after, after

    return jax.lax.scan(step, tl.core.tree.strong(method.init(problem, x0, key=KEY)), None, length=steps)[1]


def high_dimensional(function, args, solution):
    uniform = np.random.RandomState(0).uniform(size=1000)
    x0 = np.concatenate([half / half.sum() for half in uniform.reshape(2, -1)])
    return acvi.VariationalInequality(function, 1000, args, acvi.Nonnegative(), acvi.BlockSimplex((500, 500)), solution=solution, x0=x0)


def quadratic_game(z, eta):
    a, b = z[:500], z[500:]
    return jnp.concatenate([eta * a + (1 - eta) * b, eta * b - (1 - eta) * a])


def diagonal_game(z, diagonal):
    return jnp.concatenate([diagonal * z[500:], -diagonal * z[:500]])


def errors(problem, method, steps):
    """The relative error of x after 0, 1, ... steps."""
    x = np.vstack([problem.x0, path(problem, method, problem.x0, steps).x])
    return np.linalg.norm(x - problem.solution, axis=1) / np.linalg.norm(problem.solution)


@pytest.mark.slow
def test_the_papers_settings_take_the_counts_of_the_specification():
    problem = high_dimensional(quadratic_game, jnp.asarray(0.5), np.full(1000, 1 / 500))

    def run(curvature, method=PAPER):
        return errors(problem.replace(args=jnp.asarray(curvature)), method, 240)

    assert [int(np.argmax(run(c) <= 0.02)) for c in np.linspace(0.01, 0.99, 5)] == [44, 25, 17, 12, 9]
    slow = run(0.05)
    assert [int(np.argmax(slow <= level)) for level in (0.5, 0.1, 0.05, 0.01, 0.001, 0.0005)] == [2, 15, 24, 53, 120, 146]
    inner = []  # gradient steps in x and y to relative error 1e-5, the last iteration counting x only, by length of first and other stages
    for first, others in ((5, 20), (40, 20), (120, 1)):
        mu = acvi.MuSchedule(1e-6, 0.8, 1000, others, first_steps=first)
        inner.append(20 * int(np.argmax(run(0.05, PAPER.replace(mu=mu)) <= 1e-5)) - 10)
    assert inner == [4590, 3290, 2330]


def test_the_first_rows_of_the_conditioning_table():
    diagonal = jnp.linspace(1.0, 2.0, 500)
    strategy = np.asarray((1 / diagonal) / jnp.sum(1 / diagonal))
    method = acvi.InexactACVI(0.5, acvi.MuSchedule(1e-5, 0.5, 200, 50), inner=acvi.GradientDescentAscent(0.003), inner_steps=20, barrier_steps=20,
                              barrier_step_size=0.003, output="x")
    problem = high_dimensional(diagonal_game, diagonal, np.concatenate([strategy, strategy]))
    flat = problem.replace(args=jnp.ones(500), solution=np.full(1000, 1 / 500))
    assert [int(np.argmax(errors(p, method, 180) <= 0.02)) for p in (flat, problem)] == [75, 177]


@pytest.mark.parametrize(("steps", "size", "count"), [(10, 0.2, 9), (20, 0.05, 56)])
def test_projected_inexact_steps_on_the_square(steps, size, count):
    states = path(SQUARE, acvi.InexactProjectedACVI(0.5, acvi.GradientDescentAscent(size), steps), SQUARE.x0, 80)
    assert 1 + int(np.argmax(np.linalg.norm(states.y, axis=1) <= 1e-6)) == count
    assert int(states.evaluations[-1]) == 80 * steps


def test_an_unstable_inner_step_size_ends_the_run_non_finite():
    method = acvi.InexactProjectedACVI(0.5, acvi.GradientDescentAscent(0.5), 5)
    assert tl.iterate(SQUARE, method, steps=2000, throw=False).status is tl.Status.NONFINITE


def test_on_rotations_few_inner_descent_steps_fail_and_one_extragradient_step_works():
    rotations = acvi.rotations()
    gap = {}
    for inner, steps in ((acvi.GradientDescentAscent(0.3), 1), (acvi.GradientDescentAscent(0.3), 10), (acvi.Extragradient(0.3), 1)):
        method = acvi.InexactProjectedACVI(1.0, inner, steps, output="x")
        x = path(rotations, method, rotations.x0, 2000).x[-1]
        force = rotations.operator(x)
        gap[type(inner).__name__, steps] = float(force @ x + rotations.support(-force))
    assert gap["GradientDescentAscent", 1] > 1 and gap["GradientDescentAscent", 10] < 0.2 and gap["Extragradient", 1] < 0.3


def test_enough_krylov_steps_give_the_exact_iterates():
    exact = path(GAME, acvi.ACVI(0.4, 1e-2), GAME.start(0), 30)
    inexact = path(GAME, acvi.InexactACVI(0.4, 1e-2, inner=Krylov(), inner_steps=12), GAME.start(0), 30)
    np.testing.assert_allclose(inexact.x, exact.x, atol=1e-11)
    np.testing.assert_allclose(inexact.y, exact.y, atol=1e-11)
    assert int(inexact.evaluations[-1]) == 30 * 13


def test_krylov_on_a_nonlinear_operator_is_an_inexact_newton_method():
    problem = acvi.VariationalInequality(lambda x, _: x**3 + jnp.array([[0.0, 1.0], [-1.0, 0.0]]) @ x - 1, 2, constraints=acvi.Nonnegative())
    sol = tl.iterate(problem, acvi.InexactProjectedACVI(1.0, inner_steps=2), jnp.array([2.0, 2.0]), steps=200, stop=tl.Below("residual", 1e-10))
    assert sol.status is tl.Status.CONVERGED


def test_inner_descent_shrinks_the_equality_residual_and_contracts_as_stated():
    u, beta = np.random.default_rng(0).standard_normal(12), 2.0
    equality = GAME.equality
    root = Root(GAME, equality.null(jnp.asarray(u)) + equality.point, jnp.asarray(beta))
    norm = float(acvi.resolvent.operator_norm(GAME))
    exact = np.asarray(acvi.resolvent.choose(GAME, "svd").make(GAME, beta)(GAME, jnp.asarray(u), None, jnp.asarray(beta)).x)
    for eta, rate in ((1 / (1 + norm / beta) ** 2, np.sqrt(1 - 1 / (1 + norm / beta) ** 2)),
                      (1 / (1 + (norm / beta) ** 2), np.sqrt((norm / beta) ** 2 / (1 + (norm / beta) ** 2)))):
        x = GAME.start(0)
        for _ in range(10):
            after = x - eta * root.operator(x)
            assert np.linalg.norm(after - exact) <= rate * np.linalg.norm(x - exact) * (1 + 1e-12)
            x = after
        off = x + 0.1
        residual = lambda x: np.array([x[:5].sum() - 1, x[5:].sum() - 1])
        np.testing.assert_allclose(residual(off - eta * root.operator(off)), (1 - eta) * residual(off), atol=1e-13)


@pytest.mark.slow
def test_leaving_the_domain_fails_or_is_stepped_back():
    base = acvi.InexactACVI(0.5, 1e-2, inner_steps=12, barrier_steps=10, barrier_step_size=1.9)
    assert jnp.isnan(path(GAME, base.replace(leave="fail"), GAME.start(0), 1500).y[-1]).all()
    kept = path(GAME, base, GAME.start(0), 1500).y
    assert float(jnp.min(kept)) > 0
    np.testing.assert_allclose(kept[-1], path(GAME, acvi.ACVI(0.5, 1e-2), GAME.start(0), 1500).y[-1], atol=1e-7)
    everywhere = base.replace(leave="fail", barrier=acvi.ExtendedLogBarrier(switch=0.05), barrier_step_size=0.1)
    assert jnp.isfinite(path(GAME, everywhere, GAME.start(0), 400).y).all()


def test_a_start_outside_is_moved_inside():
    state = acvi.InexactACVI(0.5, 1e-3, barrier_steps=3).prepare(GAME).init(GAME, jnp.full(12, -1.0), key=KEY)
    assert float(jnp.min(state.y)) > 0 and float(jnp.abs(state.v - state.y).max()) == 0


def test_gradient_steps_in_y_refuse_a_given_start_on_the_boundary():
    steps = acvi.InexactACVI(0.5, 1e-3, inner=acvi.GradientDescentAscent(0.05), barrier_steps=3)
    corner = np.r_[1.0, np.zeros(4), 1.0, np.zeros(6)]
    for x0, runs in ((corner, None), (np.stack([np.full(12, 0.1), corner]), 2)):
        with pytest.raises(InfeasibleStartError, match="x0 must be strictly inside the constraints, its smallest slack is 0"):
            tl.iterate(GAME, steps, x0, steps=1, runs=runs)
    for method in (steps.replace(barrier_steps=None), steps.replace(barrier=acvi.ExtendedLogBarrier(switch=0.05))):
        assert tl.iterate(GAME, method, corner, steps=1).status.good


def test_accuracy_bounds_the_error_of_every_x_step():
    method = acvi.InexactProjectedACVI(2.0, acvi.Extragradient(0.2), 3, accuracy=0.1)
    x0 = GAME.start(0)
    states = path(GAME, method, x0, 40)
    ys, vs = jnp.concatenate([x0[None], states.y[:-1]]), jnp.concatenate([x0[None], states.v[:-1]])

    def relative(x, y, v):
        target = GAME.equality.null(2 * y - v) + GAME.equality.point
        return jnp.linalg.norm(Root(GAME, target, jnp.asarray(2.0)).operator(x)) / jnp.linalg.norm(x - y)

    assert float(jax.vmap(relative)(states.x, ys, vs)[1:].max()) <= 0.1
    rounds = np.diff(np.asarray(states.evaluations)) / 7                                     # each of 3 steps with 2 evaluations, and a test
    assert (rounds == rounds.round()).all() and rounds.max() > 1


@pytest.mark.slow
def test_the_certificate_of_inexact_steps_bounds_the_gap_and_ends_stages_early():
    slow = acvi.InexactACVI(1.0, acvi.MuSchedule(1e-1, 0.5, stages=12, inner_steps=200), inner=acvi.Extragradient(0.2), inner_steps=5,
                            barrier_steps=5, barrier_step_size=0.3)
    quick = slow.replace(advance=2.0)
    x0 = GAME.start(0)
    states = path(GAME, slow, x0, 300)
    before = jax.tree.map(lambda a: a[:-1], states)
    after = jax.tree.map(lambda a: a[1:], states)
    mu = slow.mu(before.step)
    bound = jax.jit(jax.vmap(lambda b, a, m: slow._bound(GAME, b, a, 12, m)))
    bounds = bound(before, after, mu)
    x1, x2 = np.split(np.asarray(after.x), [5], axis=1)
    gaps = (x1 @ A).max(axis=1) - (x2 @ A.T).min(axis=1)                                     # x is on the plane of the equalities
    assert (gaps <= np.asarray(bounds) + 1e-9).all()
    ahead = path(GAME, quick, x0, 300)
    jumps = np.flatnonzero(np.diff(np.asarray(ahead.step)) > 1) + 1
    assert len(jumps) > 3 and float(slow.mu(ahead.step[-1])) < float(slow.mu(states.step[-1]))
    pair = jax.tree.map(lambda a: a[:-1], ahead), jax.tree.map(lambda a: a[1:], ahead)
    mu = slow.mu(pair[0].step)
    assert (np.asarray(bound(*pair, mu)) <= 24 * np.asarray(mu))[jumps - 1].all()  # stages end early only where the certificate allows


@pytest.mark.parametrize(("make", "words"), [
    (lambda: acvi.InexactACVI(inner_steps=0), "inner_steps must be at least 1"), (lambda: acvi.InexactACVI(accuracy=0.0), "accuracy must be above 0"),
    (lambda: acvi.InexactACVI(leave="jump"), "leave must be one of"),
    (lambda: tl.iterate(GAME, acvi.InexactACVI(mu=1e-3, advance=2.0), steps=1), "advance needs a MuSchedule"),
    (lambda: tl.iterate(GAME, acvi.InexactProjectedACVI(inner=0.1), steps=1), "inner must be a method")])
def test_wrong_arguments_are_named(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()
