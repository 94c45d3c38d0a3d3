"""Restarted reflected-Halpern ACVI: counts of the specification, its bound without restarts, and every kind of x-step."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

import theorylab as tl
from theorylab import acvi
from theorylab.acvi.resolvent import Blocks, ConjugateGradient, Krylov, Newton, choose
from theorylab.errors import ArgumentError, UnknownNameError

A = np.random.default_rng(0).standard_normal((50, 50))
GAME = acvi.MatrixGame(A)
NORM = np.linalg.norm(A, 2)
CENTERED = np.linalg.norm(A - A.mean(0) - A.mean(1, keepdims=True) + A.mean(), 2)
SMALL = acvi.MatrixGame(np.random.default_rng(1).standard_normal((5, 7)))
KEY = jax.random.key(0)


@partial(jax.jit, static_argnames="steps")
def path(problem, method, x0, steps):
    """States after 1, 2, ... steps."""
    method = method.prepare(problem)

    def step(state, _):
        after = tl.core.tree.strong(method.step(problem, state, key=KEY))
        return after, after

    return jax.lax.scan(step, tl.core.tree.strong(method.init(problem, x0, key=KEY)), None, length=steps)[1]


def crossings(game, method, levels, steps=600):
    """The first multiples of 10 steps at which the gap of the repaired y is below each level, and the states."""
    states = path(game, method, game.start(KEY), steps)
    y, (n1, _) = np.asarray(states.y)[9::10], game.A.shape
    A, x1, x2 = np.asarray(game.A), *(part / part.sum(axis=1, keepdims=True) for part in np.split(np.maximum(y, 0), [n1], axis=1))
    gap = (x1 @ A).max(axis=1) - (x2 @ A.T).min(axis=1)
    return [10 * (1 + int(np.argmax(gap < level))) if (gap < level).any() else None for level in levels], states


def test_a_fixed_penalty_takes_the_counts_of_the_specification():
    counts, states = crossings(GAME, acvi.HalpernACVI(0.3 * NORM, adapt=False), (1e-3, 1e-6, 1e-9), steps=760)
    assert counts == [160, 440, 740]
    assert int(states.evaluations[739]) == 2 * 740 and int(states.factorizations[-1]) == 1
    assert set(np.asarray(states.penalty).tolist()) == {0.3 * NORM}


def test_the_penalty_tunes_itself_from_every_start():
    runs = [crossings(GAME, acvi.HalpernACVI(factor * CENTERED), (1e-6,)) for factor in (0.01, 0.3, 1.0, 10.0, 100.0)]
    counts = [counts[0] for counts, _ in runs]
    assert counts[:4] == [530, 420, 380, 430] and counts[4] < 590                           # 590 without the fall while the multiplier is 0
    ends = [float(states.penalty[counts[0]]) / CENTERED for counts, states in runs]
    assert round(min(ends), 2) >= 0.32 and round(max(ends), 2) <= 0.43
    bounds = [(0, None)] * 50 + [(None, None)]
    value = linprog(np.r_[np.zeros(50), 1.0], np.c_[A.T, -np.ones(50)], np.zeros(50), np.r_[np.ones(50), 0.0][None], [1.0], bounds=bounds).fun
    low, high = np.asarray(GAME.value_interval(GAME.repair(runs[1][1].y[-1])))
    assert low <= value <= high and value == pytest.approx(-0.03275650923633, abs=1e-12)


def test_scaling_the_game_changes_no_count():
    method = acvi.HalpernACVI(None)
    assert [crossings(acvi.MatrixGame(scale * A), method, (1e-6 * scale,))[0] for scale in (1e-2, 1e2)] == [[430], [430]]


def test_fresh_games_take_the_counts_of_the_specification():
    games = [acvi.MatrixGame(np.random.default_rng(seed).standard_normal((50, 50))) for seed in (100, 101, 102)]
    assert [crossings(game, acvi.HalpernACVI(), (1e-6,))[0] for game in games] == [[410], [360], [500]]


def test_without_restarts_the_residual_obeys_its_bound():
    rotations = acvi.rotations()                                                            # the solution 0 is v* as well
    states = path(rotations, acvi.HalpernACVI(1.0, adapt=False, restart=False), rotations.x0, 4000)
    residual = np.linalg.norm(states.x - states.y, axis=1)
    bound = np.linalg.norm(rotations.x0) / np.arange(1, 4001)
    assert (residual <= bound * (1 + 1e-12)).all() and (residual / bound).max() > 0.5


@pytest.mark.parametrize("linear", ["krylov", "newton"])
def test_other_x_steps_follow_the_same_path(linear):
    reference = path(SMALL, acvi.HalpernACVI(3.0), SMALL.start(0), 150)
    states = path(SMALL, acvi.HalpernACVI(3.0, linear=linear, accuracy=None), SMALL.start(0), 150)
    np.testing.assert_allclose(states.y[:100], reference.y[:100], atol=1e-9)
    assert int(states.restarts[-1]) > 0
    if linear == "newton":  # one step per root, as F is affine
        return
    loose = path(SMALL, acvi.HalpernACVI(3.0, linear=linear), SMALL.start(0), 150)
    assert int(loose.evaluations[50]) < 0.9 * int(states.evaluations[50]), (loose.evaluations[50], states.evaluations[50])
    assert float(SMALL.metrics(loose.y[-1])["gap"]) < 1e-6


def test_a_factored_x_step_follows_the_same_path_until_the_penalty_moves_and_skips_small_moves():
    reference = path(SMALL, acvi.HalpernACVI(3.0), SMALL.start(0), 150)
    states = path(SMALL, acvi.HalpernACVI(3.0, linear="dense"), SMALL.start(0), 150)
    moves = np.abs(np.diff(np.log(np.asarray(states.penalty))))
    first = int(np.argmax(np.asarray(states.penalty) != np.asarray(reference.penalty)))     # the first move that is not worth a factor
    np.testing.assert_allclose(states.y[:first or 150], reference.y[:first or 150], atol=1e-9)
    assert ((moves == 0) | (moves > np.log(1.5) - 1e-9)).all()
    assert int(states.factorizations[-1]) == 1 + (moves > 0).sum() < 1 + int(states.restarts[-1])
    assert float(SMALL.metrics(states.y[-1])["gap"]) < 1e-6


def test_a_schedule_of_mu_restarts_at_every_stage_and_ends_on_the_central_path():
    mu, stages = acvi.MuSchedule(1e-1, 0.1, stages=3, inner_steps=150), [149, 299, 449]
    states = path(SMALL, acvi.HalpernACVI(1.0, mu=mu), SMALL.start(0), 450)
    assert all(int(states.since[k]) == 0 for k in stages[:2])
    for k, value in zip(stages, (1e-2, 1e-3, 1e-4), strict=True):
        z = SMALL.repair(states.y[k])
        x1, x2 = np.split(np.asarray(z), [5])
        expected = value * (12 - 1 / x1.max() - 1 / x2.max())                               # the gap of the central path, in closed form
        assert float(SMALL.metrics(z)["gap"]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_a_batch_of_games_freezes_each_at_its_own_end():
    games = np.random.default_rng(3).standard_normal((4, 5, 7))
    method, stop = acvi.HalpernACVI(), tl.Below("gap", 1e-8)
    solve = lambda A: tl.iterate(acvi.MatrixGame(A), method, steps=600, every=10, stop=stop, keep="last")
    batch = jax.jit(jax.vmap(solve))(jnp.asarray(games))
    assert (np.asarray(batch.status) == int(tl.Status.CONVERGED)).all() and len(set(np.asarray(batch.steps).tolist())) > 1
    for lane, A in enumerate(games):
        counts, states = crossings(acvi.MatrixGame(A), method, (1e-8,))
        assert counts == [int(batch.steps[lane])]
        np.testing.assert_allclose(batch.value[lane], states.y[counts[0] - 1], atol=1e-7)


def test_a_nonlinear_operator_is_solved():
    problem = acvi.cournot(caps=40.0)
    y = path(problem, acvi.HalpernACVI(0.5), problem.start(KEY), 800).y[-1]
    np.testing.assert_allclose(y, (38.51768347, 40, 40, 40, 39.80156643), atol=1e-8)


def test_wrong_arguments_are_named():
    with pytest.raises(ArgumentError, match="penalty must be above 0"):
        acvi.HalpernACVI(0.0)
    with pytest.raises(ArgumentError, match="mu must be above 0"):
        acvi.HalpernACVI(mu=0.0)
    with pytest.raises(ArgumentError, match="linear must be one of"):
        acvi.HalpernACVI(linear="magic")


def test_the_penalty_falls_while_no_inequality_presses():
    sol = tl.solve(acvi.rotations(pairs=10), tolerance=1e-6, steps=1000)
    assert sol.history["penalty"][-1] < 1e-3 * sol.history["penalty"][0]
    np.testing.assert_allclose(sol.value, 0, atol=2e-3)                                   # the slowest speed is 1e-4


def test_the_step_for_an_operator_without_a_matrix_is_chosen_by_what_is_known_of_it():
    turn = partial(acvi.VariationalInequality, lambda x, _: x, 4, (), acvi.Nonnegative(), acvi.BlockSimplex((2, 2)))
    kinds = {None: Newton, "affine": Krylov, "bilinear": ConjugateGradient, "blocks": Blocks}
    assert {structure: choose(turn(structure=structure), "auto") for structure in kinds} == kinds
    assert choose(acvi.sparse_game(rows=6, per_row=3), "auto") == ConjugateGradient
    with pytest.raises(UnknownNameError, match="structure .diagonal. is not known"):
        acvi.VariationalInequality(lambda x, _: x, 2, structure="diagonal")
