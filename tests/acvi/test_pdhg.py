"""The primal-dual hybrid gradient method: the recursion in NumPy, and the iteration counts of the specification."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from theorylab import acvi
from theorylab.errors import ArgumentError


@partial(jax.jit, static_argnames="steps")
def path(problem, method, steps):
    """The iterates after 1, 2, ... steps from uniform strategies."""
    method, key = method.prepare(problem), jax.random.key(0)

    def step(state, _):
        state = tl.core.tree.strong(method.step(problem, state, key=key))
        return state, method.value(problem, state)

    return jax.lax.scan(step, tl.core.tree.strong(method.init(problem, problem.start(key), key=key)), None, length=steps)[1]


def counts(A, method, levels=(1e-6,), every=10, steps=1300):
    """The first multiples of `every` steps at which the gap is below each level."""
    x1, x2 = np.split(np.asarray(path(acvi.MatrixGame(A), method, steps))[every - 1::every], [A.shape[0]], axis=1)
    gap = (x1 @ A).max(axis=1) - (x2 @ A.T).min(axis=1)
    return [every * (1 + int(np.argmax(gap < level))) if (gap < level).any() else None for level in levels]


def gaussian(seed):
    return np.random.default_rng(seed).standard_normal((50, 50))


def test_a_step_is_the_published_one():
    A = np.random.default_rng(1).standard_normal((5, 7))
    problem = acvi.MatrixGame(A)
    project = lambda x, z: np.split(np.asarray(problem.project(jnp.asarray(np.r_[x, z]))), [5])
    x, z, weight = np.full(5, 0.2), np.full(7, 1 / 7), 0.5
    norm = np.linalg.norm(A - A.mean(0) - A.mean(1, keepdims=True) + A.mean(), 2)
    tau, sigma = 0.99 / (weight * norm), 0.99 * weight / norm
    for _ in range(20):
        new = project(x - tau * A @ z, z)[0]
        z = project(x, z + sigma * A.T @ (2 * new - x))[1]
        x = new
    sol = tl.iterate(problem, acvi.PrimalDualHybridGradient(weight=weight), steps=20)
    np.testing.assert_allclose(sol.value, np.r_[x, z], atol=1e-13)
    assert sol.history["operator_evaluations"][-1] == 20


def test_the_plain_method_takes_the_counts_of_the_specification():
    A = gaussian(0)
    centered = np.linalg.norm(A - A.mean(0) - A.mean(1, keepdims=True) + A.mean(), 2)
    method = acvi.PrimalDualHybridGradient(step_size=0.9 * centered / np.linalg.norm(A, 2))
    assert counts(A, method, (1e-3, 1e-6), every=20, steps=11_400) == [1040, 11300]


@pytest.mark.parametrize(("method", "expected"), [(acvi.PrimalDualHybridGradient("average", weight=0.1), [950, 800, 1180]),
                                                  (acvi.PrimalDualHybridGradient("halpern"), [420, 410, 530])])
def test_the_restarted_methods_take_the_counts_of_the_specification(method, expected):
    assert [counts(gaussian(seed), method)[0] for seed in (100, 101, 102)] == expected


def test_scaling_the_game_changes_no_count():
    method = acvi.PrimalDualHybridGradient("halpern")
    assert [counts(scale * gaussian(100), method, (1e-6 * scale,)) for scale in (1e-2, 1e2)] == [[420], [420]]


def test_only_games_are_accepted():
    with pytest.raises(ArgumentError, match="needs a MatrixGame"):
        tl.iterate(acvi.bilinear_quadrant(), acvi.PrimalDualHybridGradient(), steps=1)
    with pytest.raises(ArgumentError, match="restart must be one of"):
        acvi.PrimalDualHybridGradient("sometimes")
    with pytest.raises(ArgumentError, match="step_size must be above 0 and below 1"):
        acvi.PrimalDualHybridGradient(step_size=1.0)
