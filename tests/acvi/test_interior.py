"""The interior-point method: step counts of the specification, values from HiGHS, solutions from SciPy, and batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog, minimize

import theorylab as tl
from theorylab import acvi
from theorylab.errors import ArgumentError

METHOD = acvi.InteriorPoint()


@jax.jit
def last(problem, x0, steps):
    """The iterate after `steps` steps."""
    key = jax.random.key(0)
    state = tl.core.tree.strong(METHOD.init(problem, x0, key=key))
    return jax.lax.fori_loop(0, steps, lambda _, s: tl.core.tree.strong(METHOD.step(problem, s, key=key)), state).x


@pytest.mark.slow
def test_gaussian_games_take_the_steps_of_the_specification():
    for size, seed, steps, value in ((50, 0, 11, -0.03275650923633), (200, 1, 14, -0.00731697447648)):
        A = np.random.default_rng(seed).standard_normal((size, size))
        game = acvi.MatrixGame(A)
        before, after = (game.value_interval(game.repair(last(game, game.start(0), k))) for k in (steps - 1, steps))
        assert float(after[1] - after[0]) < 1e-10 <= float(before[1] - before[0])
        low, high = np.asarray(after)
        assert low - 1e-12 <= value <= high + 1e-12
        if size == 50:
            rows, ones = np.c_[A.T, -np.ones(size)], np.r_[np.ones(size), 0.0][None]
            found = linprog(np.r_[np.zeros(size), 1.0], rows, np.zeros(size), ones, [1.0], bounds=[(0, None)] * size + [(None, None)]).fun
            assert low - 1e-12 <= found <= high + 1e-12


def test_a_batch_of_games_stays_finite_beyond_convergence():
    games = jnp.asarray(np.random.default_rng(0).standard_normal((50, 10, 10)))
    batch = jax.jit(jax.vmap(lambda A: tl.iterate(acvi.MatrixGame(A), METHOD, steps=40, keep="last")))(games)
    gap = np.asarray(batch.history["gap"])
    assert np.isfinite(gap).all() and gap.max() < 1e-10


def test_a_quadratic_program_with_equalities():
    rng = np.random.default_rng(0)
    S, q, C, x = rng.standard_normal((6, 6)), rng.standard_normal(6), rng.standard_normal((2, 6)), rng.uniform(0.1, 1, 6)
    M, d = S @ S.T + np.eye(6), C @ x
    problem = acvi.AffineVariationalInequality(M, q, acvi.Nonnegative(), (C, d))
    exact = minimize(lambda x: x @ M @ x / 2 + q @ x, x, jac=lambda x: M @ x + q, bounds=[(0, None)] * 6,
                     constraints={"type": "eq", "fun": lambda x: C @ x - d, "jac": lambda x: C}, method="SLSQP", options={"ftol": 1e-14}).x
    np.testing.assert_allclose(last(problem, jnp.ones(6), 30), exact, atol=1e-6)


@pytest.mark.slow
def test_a_polyhedron_after_lifting():
    rng = np.random.default_rng(1)
    S, q, rows = rng.standard_normal((3, 3)), 3 * rng.standard_normal(3), rng.standard_normal((8, 3))
    M, b = S @ S.T + (S - S.T), np.ones(8)
    problem = acvi.AffineVariationalInequality(M, q, acvi.Polyhedron(rows, b))
    x = np.asarray(last(problem.lifted(), jnp.ones(11), 40)[:3])
    force = M @ x + q
    lowest = linprog(force, rows, b, bounds=[(None, None)] * 3).fun                          # the gap over the polyhedron, by linear programming
    assert (rows @ x).max() == pytest.approx(1.0, abs=1e-9) and force @ x - lowest < 1e-8


def test_redundant_rows_do_no_harm():
    A = np.random.default_rng(2).standard_normal((4, 3))
    game = acvi.MatrixGame(A)
    C = np.vstack([np.r_[np.ones(4), np.zeros(3)], np.r_[np.zeros(4), np.ones(3)], np.ones(7)])
    with pytest.warns(UserWarning, match="redundant"):
        problem = acvi.AffineVariationalInequality(game.matrix, None, acvi.Nonnegative(), (C, np.array([1.0, 1.0, 2.0])))
    np.testing.assert_allclose(last(problem, jnp.full(7, 0.25), 15), last(game, game.start(0), 15), atol=1e-9)


def test_other_problems_are_refused():
    for problem in (acvi.forsaken(), acvi.constrained_bilinear()):
        with pytest.raises(ArgumentError, match="InteriorPoint needs an affine problem"):
            tl.iterate(problem, METHOD, steps=1)
    with pytest.raises(ArgumentError, match="boundary must be above 0 and below 1"):
        acvi.InteriorPoint(1.0)
