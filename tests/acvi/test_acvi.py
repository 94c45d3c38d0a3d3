"""Exact ACVI: iterates and counts of the specification, and the statements about it as properties."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import linprog

import theorylab as tl
from theorylab import acvi
from theorylab.errors import ArgumentError, ShapeError

SCHEDULE = acvi.MuSchedule(1e-5, 0.5, stages=20, inner_steps=1)
A = np.random.default_rng(1).standard_normal((5, 7))
GAME = acvi.MatrixGame(A)


@partial(jax.jit, static_argnames="steps")
def path(problem, method, y, lam, steps):
    """States after 1, 2, ... steps from y and the multiplier lam, and the prepared method."""
    method = method.prepare(problem)
    state = method.init(problem, y, key=jax.random.key(0))._replace(v=y + lam / method.penalty)

    def step(state, _):
        after = tl.core.tree.strong(method.step(problem, state, key=jax.random.key(0)))
        return after, after

    return jax.lax.scan(step, tl.core.tree.strong(state), None, length=steps)[1]


def value_of(A):
    """The value of the game by linear programming: min over x1 of the largest entry of A'x1."""
    n1, n2 = A.shape
    return linprog(np.r_[np.zeros(n1), 1.0], np.c_[A.T, -np.ones(n2)], np.zeros(n2), np.r_[np.ones(n1), 0.0][None], [1.0],
                   bounds=[(0, None)] * n1 + [(None, None)]).fun


def test_the_iterates_of_the_damped_rotation_are_those_of_the_specification():
    states = path(acvi.bilinear_quadrant(), acvi.ACVI(0.08, SCHEDULE), jnp.ones(2), jnp.zeros(2), 50)
    np.testing.assert_allclose(states.x[0], [-0.063541263076, 0.091437427354], atol=1e-12)
    np.testing.assert_allclose(states.y[0], [0.000968840485, 0.092115920277], atol=1e-12)
    np.testing.assert_allclose(0.08 * (states.v[0] - states.y[0]), [-5.160808284880e-3, -5.427943383707e-5], rtol=1e-11)
    np.testing.assert_allclose(states.y[2], [0.000218784193, 0.005267172288], atol=1e-12)
    np.testing.assert_allclose(states.y[9], [1.794385200680e-6, 5.366332204955e-3], rtol=1e-11)
    np.testing.assert_allclose(states.y[49, 1], 3.938202284758e-3, rtol=1e-11)


@pytest.mark.parametrize(("problem", "end"), [
    (acvi.ratio_game(), (0.95194102, 0.05048525)),
    (acvi.forsaken(), (0.07802667, 0.41193385)), (acvi.toy_gan(), (1.00641547, 8e-13))])
def test_the_trajectories_in_the_plane_end_where_the_specification_says(problem, end):
    start = problem.start(jax.random.key(0))
    np.testing.assert_allclose(path(problem, acvi.ACVI(0.08, SCHEDULE), start, jnp.zeros(2), 49).y[-1], end, atol=5e-9)


def test_the_quadratic_game_takes_four_or_five_iterations():
    uniform = np.random.RandomState(0).uniform(size=1000)
    x0 = np.concatenate([half / half.sum() for half in uniform.reshape(2, -1)])
    problem = acvi.VariationalInequality(quadratic_game, 1000, jnp.asarray(0.5), acvi.Nonnegative(), acvi.BlockSimplex((500, 500)))
    method = acvi.ACVI(0.5, acvi.MuSchedule(1e-6, 0.5, 10, 1), linear="blocks")

    def errors(curvature):
        x = path(problem.replace(args=jnp.asarray(curvature)), method, jnp.asarray(x0), jnp.zeros(1000), 50).x
        return np.linalg.norm(x - 1 / 500, axis=1) / np.sqrt(1 / 250)

    assert [1 + int(np.argmax(errors(eta) <= 0.02)) for eta in np.linspace(0.01, 0.99, 5)] == [4, 5, 5, 4, 3]
    error = errors(0.05)
    assert [1 + int(np.argmax(error <= level)) for level in (0.5, 0.1, 0.05, 0.01, 0.001, 0.0005)] == [1, 2, 3, 5, 8, 9]
    np.testing.assert_allclose(error[[9, 19]], [1.7e-4, 6.4e-8], rtol=0.02)
    assert error[49] < 1e-15


def quadratic_game(z, eta):
    a, b = z[:500], z[500:]
    return jnp.concatenate([eta * a + (1 - eta) * b, eta * b - (1 - eta) * a])


def test_projected_steps_on_the_square_take_the_published_counts():
    problem, start = acvi.constrained_bilinear(), jnp.array([2.0, 2.0])
    for penalty, count in ((0.1, 7), (0.5, 19), (1.0, 44), (2.0, 129)):
        states = path(problem, acvi.ProjectedACVI(penalty), start, jnp.zeros(2), 150)
        assert 1 + int(np.argmax(np.linalg.norm(states.y, axis=1) <= 1e-6)) == count


def test_stages_end_on_the_central_path_of_the_square():
    problem, start = acvi.constrained_bilinear(), jnp.array([2.0, 2.0])
    states = path(problem, acvi.ACVI(0.5, acvi.MuSchedule(2.0, 0.5, 18, 10)), start, jnp.zeros(2), 10)
    np.testing.assert_allclose(states.y[-1], (0.199036, 1.186411), atol=6e-7)
    states = path(problem, acvi.ACVI(0.5, 1.0), start, jnp.zeros(2), 120)
    np.testing.assert_allclose(states.y[-1], (0.2051000898891326, 1.197017515650712), atol=1e-13)


MONOTONE = settings(max_examples=8, deadline=None)


@MONOTONE
@given(st.integers(0, 10_000), st.sampled_from([1e-1, 1e-2, 1e-3]), st.sampled_from([0.1, 0.5, 2.0]))
def test_fixed_mu_properties_from_any_start(seed, mu, penalty):
    """Multiplier identity, Douglas-Rachford form, Fejer monotonicity, monotone residuals and the explicit rate."""
    rng, steps, n = np.random.default_rng(seed), 400, 12
    y0, lam0 = rng.uniform(0.01, 1.0, n), rng.standard_normal(n)
    method = acvi.ACVI(penalty, mu)
    states = jax.tree.map(np.asarray, path(GAME, method, jnp.asarray(y0), jnp.asarray(lam0), steps))
    ends = jax.tree.map(np.asarray, path(GAME, method, jnp.asarray(y0), jnp.asarray(lam0), 20_000))
    x, y, lam = states.x, states.y, penalty * (states.v - states.y)
    np.testing.assert_allclose(lam * y, -mu, rtol=1e-8)
    y_end, lam_end = ends.y[-1], penalty * (ends.v[-1] - ends.y[-1])
    Y, L = np.vstack([y0, y]), np.vstack([lam0, lam])
    V = penalty * np.sum((Y - y_end) ** 2, axis=1) + np.sum((L - lam_end) ** 2, axis=1) / penalty
    fall = penalty * np.sum((x - Y[:-1]) ** 2, axis=1)
    assert (V[1:] <= V[:-1] - fall + 1e-12 * V[0]).all()
    W = (penalty * np.sum(np.diff(y, axis=0) ** 2, axis=1) + np.sum(np.diff(lam, axis=0) ** 2, axis=1) / penalty)
    near = np.linalg.norm(x[1:] - y[:-1], axis=1)
    assert (np.diff(W) <= 1e-13 * W[0]).all() and (np.diff(near) <= 1e-13 * near[0] + 1e-15).all()
    assert (W * np.arange(1, steps) <= V[1] * (1 + 1e-12)).all()
    k = np.arange(1, steps)
    assert (np.linalg.norm(x[1:] - y[1:], axis=1) <= np.sqrt(V[1] / (penalty * k)) + 1e-14).all()


@jax.jit
def ends(M, q, C, d, mu, beta, y, lam):
    problem = acvi.AffineVariationalInequality(M, q, acvi.Nonnegative(), (C, d))
    states = path(problem, acvi.ACVI(beta, mu), y, lam, 50)
    return states.x[-1], states.y[-1]


@MONOTONE
@given(st.integers(0, 10_000), st.floats(0.1, 10.0), st.floats(0.1, 10.0))
def test_scalings_and_permutations_leave_the_iterates_alone(seed, s, c):
    rng = np.random.default_rng(seed)
    M, q, C = rng.standard_normal((6, 6)), rng.standard_normal(6), rng.standard_normal((2, 6))
    M, d = M - M.T + np.eye(6), C @ rng.uniform(0.1, 1.0, 6)
    y, lam, mu, beta = rng.uniform(0.1, 1.0, 6), rng.standard_normal(6), 0.05, 0.7

    x1, y1 = ends(M, q, C, d, mu, beta, y, lam)
    order = rng.permutation(6)
    for M2, q2, C2, d2, mu2, beta2, y2, lam2, back in (
            (s * M, s * q, C, d, s * mu, s * beta, y, s * lam, lambda v: v),
            (M / c, q, C, c * d, c * mu, beta / c, c * y, lam, lambda v: v / c),
            (M[np.ix_(order, order)], q[order], C[:, order], d, mu, beta, y[order], lam[order], lambda v: v[np.argsort(order)]),
            (M, q + C.T @ np.array([1.3, -0.4]), C, d, mu, beta, y, lam, lambda v: v)):
        x_new, y_new = ends(M2, q2, C2, d2, mu2, beta2, y2, lam2)
        np.testing.assert_allclose(back(x_new), x1, atol=1e-11)
        np.testing.assert_allclose(back(y_new), y1, atol=1e-11)


@pytest.mark.parametrize("barrier", [True, False])
def test_strong_monotonicity_gives_the_stated_linear_rate(barrier):
    rng = np.random.default_rng(0)
    for sigma, skew, beta in ((1.0, 0.0, 1.0), (0.5, 2.0, 1.0), (0.2, 1.0, 3.0), (2.0, 5.0, 0.5)):
        S = rng.standard_normal((6, 6))
        S = skew * (S - S.T) / np.linalg.norm(S - S.T, 2)
        problem = acvi.AffineVariationalInequality(sigma * np.eye(6) + S, rng.standard_normal(6), acvi.Box(-0.5, 0.5))
        method = acvi.ACVI(beta, 1e-3) if barrier else acvi.ProjectedACVI(beta)
        v = np.asarray(path(problem, method, jnp.zeros(6), jnp.zeros(6), 400).v)
        g, lipschitz = 1 / beta, np.hypot(sigma, skew)
        rate = 0.5 + 0.5 * np.sqrt(1 - 4 * g * sigma / (1 + 2 * g * sigma + g**2 * lipschitz**2))
        error = np.linalg.norm(v - v[-1], axis=1)
        assert (error[1:] <= rate * error[:-1] + 1e-14).all()


def test_the_entropy_barrier_ends_at_the_quantal_response():
    mu = 0.3
    y = np.asarray(path(GAME, acvi.ACVI(1.0, mu, acvi.EntropyBarrier()), GAME.start(0), jnp.zeros(12), 2000).y[-1])
    softmax = lambda a: np.exp(a) / np.exp(a).sum()
    np.testing.assert_allclose(y[:5], softmax(-A @ y[5:] / mu), atol=1e-12)
    np.testing.assert_allclose(y[5:], softmax(A.T @ y[:5] / mu), atol=1e-12)


def test_the_value_of_the_game_is_that_of_the_linear_program():
    y = path(GAME, acvi.ProjectedACVI(1.0), GAME.start(0), jnp.zeros(12), 3000).y[-1]
    low, high = np.asarray(GAME.value_interval(GAME.repair(y)))
    assert low - 1e-12 <= value_of(A) <= high + 1e-12 and high - low < 1e-10


def test_the_projected_method_selects_the_equilibrium_that_the_specification_gives():
    rows = np.array([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0], [-0.5, 0.5, 0.0]])
    game, start = acvi.MatrixGame(rows), jnp.array([1.0, 0, 0, 0, 1.0, 0, 0])
    for beta, expected in ((0.5, (0.32423884, 0.32423884, 1 / 3, 0.01818898)), (1.0, (0.31765857, 0.31765857, 1 / 3, 0.03134953))):
        np.testing.assert_allclose(path(game, acvi.ProjectedACVI(beta), start, jnp.zeros(7), 3000).y[-1, :4], expected, atol=2e-8)
    mu = acvi.MuSchedule(1e-1, 0.5, stages=30, inner_steps=100)
    np.testing.assert_allclose(path(game, acvi.ACVI(0.5, mu), start, jnp.zeros(7), 5000).y[-1, :4], (2 / 9, 2 / 9, 1 / 3, 2 / 9), atol=1e-7)


def test_hyper_parameters_do_not_compile_again():
    traces = []

    def counted(x, a):
        traces.append(1)
        return a * x

    problem = acvi.VariationalInequality(counted, 3, jnp.asarray(2.0), acvi.Nonnegative(), x0=jnp.ones(3))
    run = lambda penalty, mu: tl.iterate(problem, acvi.ACVI(penalty, mu), steps=3)
    run(0.5, acvi.MuSchedule(1e-2, 0.5, 3, 2))
    before = len(traces)
    run(0.7, acvi.MuSchedule(1e-3, 0.4, 9, 5))
    assert len(traces) == before


def test_runs_from_many_starts_equal_single_runs():
    starts = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1.0, (3, 12)))
    method = acvi.ACVI(0.5, 1e-3)
    batch = tl.iterate(GAME, method, starts, steps=30, runs=3)
    for lane in range(3):
        alone = path(GAME, method, starts[lane], jnp.zeros(12), 30)
        np.testing.assert_allclose(batch.value[lane], alone.y[-1], atol=1e-12)
        np.testing.assert_allclose(batch.history["difference"][1:, lane], np.linalg.norm(alone.x - alone.y, axis=1), atol=1e-12)


def test_metrics_and_counters_are_recorded():
    sol = tl.iterate(GAME, acvi.ACVI(0.5, acvi.MuSchedule(1e-2, 0.5, 3, 2)), steps=6)
    assert sol.history["operator_evaluations"].tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert sol.history["factorizations"].tolist() == [1] * 7
    np.testing.assert_allclose(sol.history["mu"], np.array([5e-3, 5e-3, 5e-3, 2.5e-3, 2.5e-3, 1.25e-3, 1.25e-3]), rtol=1e-12)
    assert set(sol.history["penalty"].tolist()) == {0.5}


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: acvi.ACVI(0.0, 1.0), ArgumentError, "penalty must be above 0"),
    (lambda: acvi.ACVI(1.0, -1.0), ArgumentError, "mu must be above 0"),
    (lambda: acvi.ACVI(1.0, 1.0, linear="magic"), ArgumentError, "linear must be one of"),
    (lambda: acvi.ACVI(1.0, 1.0, output="z"), ArgumentError, "output must be one of"),
    (lambda: acvi.ProjectedACVI(-1.0), ArgumentError, "penalty must be above 0"),
    (lambda: tl.iterate(GAME, acvi.ProjectedACVI(1.0), jnp.ones(11), steps=1), ShapeError, r"x0 must have shape \(12,\)"),
    (lambda: tl.iterate(tl.Problem(), acvi.Extragradient(1.0), jnp.ones(2), steps=1), ArgumentError, "must be a VariationalInequality"),
])
def test_wrong_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
