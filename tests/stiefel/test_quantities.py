"""Violation, multiplier, merit and Amari distance against dense least squares, autodiff and loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from theorylab import stiefel
from theorylab.errors import PrecisionError, ShapeError

N, P = 6, 3
B3 = np.array([[2.0, 1, 0], [1, 3, 1], [0, 1, 2]])
A3 = np.array([[1.0, 0, 1], [0, 2, 0], [1, 0, 3]])
X3 = np.array([[0.5, 0], [0, 0.5], [0.25, -0.25]])


def instance(seed: int) -> tuple:
    rng = np.random.default_rng(seed)
    m = rng.normal(size=(N, N))
    return m @ m.T / N + 0.2 * np.eye(N), rng.normal(size=(N, P)) / 2, rng.normal(size=(N, P))


def test_the_worked_example():
    assert abs(stiefel.infeasibility(X3, B3) - np.sqrt(13 / 32)) < 1e-15
    expected = np.array([[-1847 / 2262, 43 / 78], [43 / 78, -1691 / 2262]])
    assert np.abs(stiefel.multiplier(X3, B3, -A3 @ X3) - expected).max() < 1e-14


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_the_multiplier_is_the_least_squares_one_and_its_rest_is_orthogonal(seed):
    b, x, g = instance(seed)
    found = np.asarray(stiefel.multiplier(x, b, g))
    basis = [np.eye(P)[[i]].T @ np.eye(P)[[j]] + (i != j) * np.eye(P)[[j]].T @ np.eye(P)[[i]] for i in range(P) for j in range(i, P)]
    weights = np.linalg.lstsq(np.stack([(2 * b @ x @ s).ravel() for s in basis], 1), g.ravel(), rcond=None)[0]
    assert np.abs(found - sum(w * s for w, s in zip(weights, basis))).max() < 1e-10
    rest, h = g - 2 * b @ x @ found, x.T @ b @ x - np.eye(P)
    assert abs(np.sum(rest * (b @ x @ h))) < 1e-10 * np.linalg.norm(rest) * np.linalg.norm(b @ x @ h)


def test_the_merit_function_is_the_augmented_lagrangian_and_increases_along_the_field():
    rng = np.random.default_rng(0)
    b, _, _ = instance(1)
    a = rng.normal(size=(N, N))
    problem = stiefel.GEVP(a + a.T, b, p=P)
    x = np.asarray(problem.start(jax.random.key(0))) @ np.diag([1.1, 0.9, 1.05])
    g, h = -(a + a.T) @ x, x.T @ b @ x - np.eye(P)
    expected = np.sum(x * g) / 2 - np.sum(np.asarray(stiefel.multiplier(x, b, g)) * h) + 2.5 / 4 * np.sum(h**2)
    assert abs(stiefel.merit(problem, x, 2.5) - expected) < 1e-12
    slope = jax.grad(lambda y: stiefel.merit(problem, y, 100.0))(jnp.asarray(x))
    field = stiefel.landing_field(g, x, b @ x, normal="gradient")
    along, t = float(jnp.sum(slope * field)), 1e-6
    difference = (stiefel.merit(problem, x + t * field, 100.0) - stiefel.merit(problem, x - t * field, 100.0)) / (2 * t)
    assert abs(along - difference) < 1e-5 * abs(along)
    assert along > 0


def test_the_merit_function_sums_over_blocks():
    rng = np.random.default_rng(2)
    data = rng.normal(size=(40, 5))
    problem = stiefel.CCA(data[:, :3], data[:, 2:] + data[:, :3], p=2)
    x, y = problem.start(jax.random.key(1))
    assert abs(stiefel.merit(problem, (x, y)) - problem.metrics((x, y))["objective"]) < 1e-12       # no violation, nothing to add


def test_the_amari_distance_is_that_of_its_loops_and_zero_for_scaled_permutations():
    rng = np.random.default_rng(3)
    w, a = rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    p = (w @ a) ** 2
    loops = sum(p[i].sum() / p[i].max() - 1 + p[:, i].sum() / p[:, i].max() - 1 for i in range(3)) / 6
    assert abs(stiefel.amari_distance(w, a) - loops) < 1e-14
    mixed = np.diag([1.0, -3.0, 0.1]) @ np.eye(3)[[2, 0, 1]]
    assert stiefel.amari_distance(mixed @ np.linalg.inv(a), a) < 1e-12


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: stiefel.infeasibility(np.ones(3)), ShapeError, "X must have shape"),
    (lambda: stiefel.infeasibility(np.ones((2, 3))), ShapeError, "at most as many columns"),
    (lambda: stiefel.infeasibility(np.ones((3, 1)), np.ones((4, 2))), ShapeError, "B must have shape"),
    (lambda: stiefel.multiplier(np.ones((3, 1)), None, np.ones((3, 2))), ShapeError, "same shape"),
    (lambda: stiefel.merit(stiefel.GEVP(np.eye(3), np.eye(3), p=2), np.ones((3, 1))), ShapeError, r"x must have shape \(3, 2\)"),
    (lambda: stiefel.amari_distance(np.ones((2, 3)), np.ones((2, 3))), ShapeError, "W must have shape"),
    (lambda: stiefel.amari_distance(np.ones((2, 2), complex), np.ones((2, 2))), PrecisionError, "W must hold real numbers"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
