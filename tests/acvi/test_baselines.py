"""The baselines: end points and counts of the specification, and plain NumPy for those that the papers do not have."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from theorylab import acvi
from theorylab.errors import ArgumentError

A = np.random.default_rng(1).standard_normal((5, 7))
GAME = acvi.MatrixGame(A)
KEY = jax.random.key(0)


@partial(jax.jit, static_argnames="steps")
def last(problem, method, x0, steps):
    """The iterate after `steps` steps."""
    state = tl.core.tree.strong(method.init(problem, x0, key=KEY))
    state = jax.lax.fori_loop(0, steps, lambda _, s: tl.core.tree.strong(method.step(problem, s, key=KEY)), state)
    return method.value(problem, state)


@partial(jax.jit, static_argnames="steps")
def path(problem, method, x0, steps):
    """The iterates after 1, 2, ... steps."""

    def step(state, _):
        state = tl.core.tree.strong(method.step(problem, state, key=KEY))
        return state, method.value(problem, state)

    return jax.lax.scan(step, tl.core.tree.strong(method.init(problem, x0, key=KEY)), None, length=steps)[1]


@pytest.mark.parametrize(("problem", "lookahead", "table"), [
    (acvi.bilinear_quadrant(), 4, [(0, 0.899887), (0, 0.834326), (0, 0.833724), (4e-15, 0.520546), (3e-15, 0.404550)]),
    (acvi.ratio_game(), 4, [(1, 0.408990), (1, 0.319639), (1, 0.318802), (0.930464, 0.071518), (0.947196, 0.056807)]),
    (acvi.forsaken(), 3, [(0.152975, -1.330536), (0.538601, -1.206520), (0.523840, -1.224403), (1.032609, 1.403454), (0.742560, -1.135607)]),
    (acvi.toy_gan(), 4, [(-0.000311, -0.161978), (1.006577, -0.001097), (-1.264272, -1.549715), (1.007193, -0.000520), (1.221331, -0.231845)])])
def test_the_trajectories_in_the_plane_end_where_the_specification_says(problem, lookahead, table):
    methods = [acvi.GradientDescentAscent(0.1), acvi.Extragradient(0.1), acvi.OptimisticGradient(0.1), acvi.Lookahead(0.1, lookahead),
               acvi.Lookahead(0.1, 5)]
    start = problem.start(KEY)
    found = [np.asarray(last(problem, method, start, 49)) for method in methods]
    np.testing.assert_allclose(found, table, atol=1e-6)


def test_counts_on_the_square_and_the_cycle_of_gradient_descent():
    problem = acvi.constrained_bilinear()
    for method, count in ((acvi.Extragradient(0.1), 2662), (acvi.OptimisticGradient(0.3), 266), (acvi.Lookahead(0.3), 83)):
        before, after = (float(jnp.linalg.norm(last(problem, method, problem.x0, k))) for k in (count - 1, count))
        assert after <= 1e-6 < before
    assert float(jnp.linalg.norm(last(problem, acvi.GradientDescentAscent(0.1), problem.x0, 5000))) > 0.1


def quadratic_game(z, eta):
    a, b = z[:500], z[500:]
    return jnp.concatenate([eta * a + (1 - eta) * b, eta * b - (1 - eta) * a])


def test_counts_on_the_quadratic_game():
    uniform = np.random.RandomState(0).uniform(size=1000)
    x0 = np.concatenate([half / half.sum() for half in uniform.reshape(2, -1)])
    problem = acvi.VariationalInequality(quadratic_game, 1000, jnp.asarray(0.5), acvi.Nonnegative(), acvi.BlockSimplex((500, 500)))

    def count(method, curvature):
        z = path(problem.replace(args=jnp.asarray(curvature)), method, jnp.asarray(x0), 80)
        return 1 + int(np.argmax(np.linalg.norm(z - 1 / 500, axis=1) <= 0.02 * np.sqrt(1 / 250)))

    assert [2 * count(acvi.Extragradient(0.3), c) for c in (0.01, 0.99)] == [150, 30]
    assert [5 * count(acvi.Lookahead(0.3), c) for c in (0.255, 0.99)] == [60, 35]
    assert [count(acvi.GradientDescentAscent(0.3), c) for c in (0.255, 0.99)] == [66, 10]


def test_counts_on_a_gaussian_game():
    A = np.random.default_rng(0).standard_normal((50, 50))
    game, norm = acvi.MatrixGame(A), np.linalg.norm(A, 2)
    for method, count, cost in ((acvi.Extragradient(0.9 / norm), 1040, 2), (acvi.Popov(0.45 / norm), 3080, 1)):
        x1, x2 = np.split(np.asarray(path(game, method, game.start(KEY), count))[19::20], [50], axis=1)
        gap = (x1 @ A).max(axis=1) - (x2 @ A.T).min(axis=1)
        assert gap[-1] < 1e-3 <= gap[:-1].min()
        assert method.cost(game) == {"operator_evaluations": cost}


def test_mirror_prox_is_the_published_recursion():
    step, w1, w2, total = 0.2, np.full(5, 0.2), np.full(7, 1 / 7), np.zeros(12)
    normalize = lambda w: w / w.sum()
    for _ in range(60):
        h1, h2 = normalize(w1 * np.exp(-step * A @ w2)), normalize(w2 * np.exp(step * A.T @ w1))
        w1, w2 = normalize(w1 * np.exp(-step * A @ h2)), normalize(w2 * np.exp(step * A.T @ h1))
        total += np.r_[h1, h2]
    np.testing.assert_allclose(last(GAME, acvi.MirrorProx(step), GAME.start(KEY), 60), total / 60, rtol=1e-12)


def test_mirror_prox_keeps_the_totals_of_blocks():
    problem = acvi.VariationalInequality(lambda x, _: 10 * x, 5, constraints=acvi.Nonnegative(), equality=acvi.BlockSimplex((2, 3), (2.0, 0.5)))
    x = last(problem, acvi.MirrorProx(0.1), jnp.array([1.5, 0.5, 0.1, 0.2, 0.2]), 4000)
    np.testing.assert_allclose(x, [1, 1, 1 / 6, 1 / 6, 1 / 6], atol=1e-3)
    np.testing.assert_allclose([x[:2].sum(), x[2:].sum()], [2.0, 0.5], rtol=1e-12)


def test_the_golden_ratio_method_is_the_published_recursion():
    M = np.asarray(GAME.matrix)
    project = lambda v: np.asarray(GAME.project(jnp.asarray(v)))
    phi, size, theta = 1.5, 0.1, 1.0
    x_old = np.asarray(GAME.start(KEY))
    x = center = project(x_old - size * M @ x_old)
    for _ in range(39):
        change = np.sum((M @ x - M @ x_old) ** 2)
        after = min((1 / phi + 1 / phi**2) * size, phi * theta / (4 * size) * np.sum((x - x_old) ** 2) / change)
        center = ((phi - 1) * x + center) / phi
        x_old, x = x, project(center - after * M @ x)
        theta, size = phi * after / size, after
    np.testing.assert_allclose(last(GAME, acvi.GoldenRatio(0.1), GAME.start(KEY), 40), x, atol=1e-10)


def test_the_golden_ratio_method_converges_without_a_lipschitz_constant():
    problem = acvi.VariationalInequality(lambda x, _: x**3 - 1, 3, constraints=acvi.Nonnegative(), x0=jnp.array([5.0, 0.0, 2.0]))
    np.testing.assert_allclose(last(problem, acvi.GoldenRatio(0.01), problem.x0, 500), 1, atol=1e-8)


def test_lookahead_counts_its_inner_steps():
    sol = tl.iterate(GAME, acvi.Lookahead(0.1, inner_steps=3), steps=4)
    assert sol.history["operator_evaluations"].tolist() == [0, 3, 6, 9, 12]


@pytest.mark.parametrize(("make", "words"), [
    (lambda: acvi.Extragradient(0.0), "step_size must be above 0"), (lambda: acvi.Lookahead(0.1, 0), "inner_steps must be at least 1"),
    (lambda: acvi.Lookahead(0.1, weight=2.0), "weight must be at least 0 and at most 1"),
    (lambda: acvi.GoldenRatio(0.1, 1.0), "ratio must be above 1"),
    (lambda: tl.iterate(acvi.bilinear_quadrant(), acvi.MirrorProx(0.1), steps=1), "product of simplices")])
def test_wrong_arguments_are_named(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()
