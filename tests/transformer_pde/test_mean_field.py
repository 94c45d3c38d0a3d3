"""Distances between clouds against transport by hand, the Monte-Carlo rate, and error bars against the spread of replicates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from scipy.spatial.distance import cdist

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, RunWarning, ShapeError
from theorylab.transformer_pde.mean_field import mean_field_error, velocity_error, wasserstein

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
V = np.array([[0.6, -0.3], [0.2, 0.5]])
HEAD = tp.Softmax(Q, K, V)
STATE = tp.Gaussian(np.array([0.3, -0.2]), np.array([[0.8, 0.25], [0.25, 0.5]]))


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_the_distance_is_that_of_the_best_assignment(order):
    x, y = np.random.default_rng(0).normal(size=(2, 40, 3))
    cost = cdist(x, y) ** order
    best = cost[scipy.optimize.linear_sum_assignment(cost)].mean() ** (1 / order)
    assert wasserstein(tp.Cloud(x), tp.Cloud(y), order) == pytest.approx(best, rel=1e-12)


def test_the_distance_of_weighted_tokens_on_a_line_is_that_of_scipy():
    rng = np.random.default_rng(1)
    x, y, v, w = rng.normal(size=30), rng.normal(size=20), rng.dirichlet(np.ones(30)), rng.dirichlet(np.ones(20))
    found = wasserstein(tp.Cloud(x[:, None], v), tp.Cloud(y[:, None], w), 1.0)
    assert found == pytest.approx(scipy.stats.wasserstein_distance(x, y, v, w), rel=1e-12)


def test_the_distance_to_a_translate_is_the_translation():
    cloud = STATE.sample(50, key=0)
    assert wasserstein(cloud, tp.Cloud(cloud.points + np.array([3.0, 4.0]))) == pytest.approx(5.0)


@pytest.mark.slow
def test_the_error_falls_like_the_root_of_the_number_of_tokens():
    found = mean_field_error(HEAD, STATE, 1.0, [50, 200, 800], 24, key=0)
    for error in found[1:]:
        assert error.shape == (3, 24)
        assert tl.fit_rate(found.counts, error).slope == pytest.approx(-0.5, abs=0.15)          # the bound that the statement is tested with


@pytest.mark.slow
def test_the_coupling_bounds_the_exact_distance():
    """The same key gives the same tokens, so the two clouds can be built again."""
    sol = tl.integrate(tp.Particles(HEAD), STATE.sample(100, key=0), [0.0, 1.0])
    exact = tl.integrate(tp.GaussianFlow(HEAD), STATE, [0.0, 1.0]).value
    z = np.linalg.solve(STATE.factor, (np.asarray(sol.value.points[0]) - STATE.mean).T)
    limit = np.asarray(exact.mean[-1]) + (np.asarray(exact.factor[-1]) @ z).T
    coupling = np.sqrt(((np.asarray(sol.value.points[-1]) - limit) ** 2).sum(1).mean())
    assert wasserstein(tp.Cloud(sol.value.points[-1]), tp.Cloud(limit)) <= coupling * (1 + 1e-9)
    typical = mean_field_error(HEAD, STATE, 1.0, [100], 24, key=0).coupling
    assert typical.min() / 2 < coupling < 2 * typical.max()


def test_logits_too_large_for_the_rate_are_warned_of():
    with pytest.warns(RunWarning, match="infinite variance"):
        mean_field_error(tp.Softmax(Q, K, -V, scale=8.0), STATE, 0.1, [10], 2, key=0)


@pytest.mark.slow
def test_the_error_bar_is_the_spread_of_the_velocity():
    where = jnp.array([[0.0, 0.0], [1.0, -0.5]])
    exact = tp.velocity(HEAD, STATE)
    truth = np.asarray(exact.mean) + (where - np.asarray(STATE.mean)) @ np.asarray(exact.matrix).T
    both = jax.jit(lambda key: (HEAD.token_velocity(STATE.sample(200, key=key).points, None, where)[0],
                                velocity_error(HEAD, STATE.sample(200, key=key), where)))
    velocities, bars = map(np.stack, zip(*[both(key) for key in jax.random.split(jax.random.key(0), 300)], strict=True))
    spread = np.sqrt(((velocities - truth) ** 2).sum(2).mean(0))
    np.testing.assert_allclose(np.sqrt((bars**2).mean(0)), spread, rtol=0.15)                   # 300 replicates: about 4 % each


def test_error_bars_of_a_weighted_cloud_do_not_see_the_scale_of_its_halves():
    points = STATE.sample(50, key=0).points
    weights = np.where(np.arange(50) % 2, 0.01, 0.03)
    twice = tp.Cloud(np.repeat(points, 2, 0), np.repeat(weights, 2) / 2)                        # both halves are the same measure
    np.testing.assert_allclose(velocity_error(tp.Linear(Q, K, V), twice), 0.0, atol=1e-14)


def test_wrong_arguments_are_named():
    cloud = STATE.sample(10, key=0)
    with pytest.raises(ShapeError, match="second must have dimension 2"):
        wasserstein(cloud, tp.Cloud(np.zeros((3, 1))))
    with pytest.raises(ShapeError, match="first must have no leading axes"):
        wasserstein(tp.Cloud(np.zeros((2, 3, 2))), cloud)
    with pytest.raises(ArgumentError, match="first must be a Cloud"):
        wasserstein(STATE, cloud)
    with pytest.raises(ArgumentError, match="order must be a number at least 1"):
        wasserstein(cloud, cloud, 0.5)
    with pytest.raises(ArgumentError, match="at most 25000000 pairs"):
        wasserstein(tp.Cloud(np.zeros((6000, 1))), tp.Cloud(np.zeros((6000, 1))))
    with pytest.raises(ArgumentError, match="counts must be a whole number at least 1, got 0"):
        mean_field_error(HEAD, STATE, 1.0, [0], 2, key=0)
    with pytest.raises(ArgumentError, match="does not"):
        mean_field_error(tp.Exponential(Q, K, V), STATE, 1.0, [10], 2, key=0)
    with pytest.raises(ArgumentError, match="state must be a Gaussian"):
        mean_field_error(HEAD, cloud, 1.0, [10], 2, key=0)
    with pytest.raises(ShapeError, match="at least two tokens"):
        velocity_error(HEAD, tp.Cloud(np.zeros((1, 2))))
    with pytest.raises(ShapeError, match="queries must have shape"):
        velocity_error(HEAD, cloud, np.zeros((3, 5)))
