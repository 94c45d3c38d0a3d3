"""Steering: the plan is the Bures geodesic, flow and network reach the target, ranges may turn, ranks may not change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.core.psd import bures_map
from theorylab.errors import ArgumentError, MatrixError, ShapeError
from theorylab.transformer_pde.steering import steer

START = tp.Gaussian(np.array([0.3, -0.2, 0.5]), np.array([[0.8, 0.25, 0.1], [0.25, 0.5, -0.1], [0.1, -0.1, 0.4]]))
TARGET = tp.Gaussian(np.array([-1.0, 0.4, 0.2]), np.array([[0.3, -0.2, 0.0], [-0.2, 1.5, 0.3], [0.0, 0.3, 0.7]]))
FLAT = tp.Gaussian.from_factor(np.ones(3), np.array([[1.0, 0.2], [0.3, 0.8], [0.0, 0.0]]))
TURNED = tp.Gaussian.from_factor(np.zeros(3), np.array([[0.0, 0.1], [0.9, -0.4], [0.5, 1.0]]))


@pytest.mark.slow
def test_the_flow_follows_the_geodesic_to_the_target():
    plan = steer(START, TARGET, 2.0)
    sol = tl.integrate(tp.GaussianFlow(plan), START, jnp.array([0.0, 0.5, 2.0]), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(sol.value.cov[-1], TARGET.cov, rtol=0, atol=1e-12)
    np.testing.assert_allclose(sol.value.mean[-1], TARGET.mean, rtol=0, atol=1e-12)
    T = np.asarray(bures_map(START.cov, TARGET.cov))                       # displacement interpolation with the transport map
    between = np.eye(3) + 0.25 * (T - np.eye(3))
    np.testing.assert_allclose(sol.value.cov[1], between @ np.asarray(START.cov) @ between.T, rtol=0, atol=1e-12)


def test_the_linear_part_is_that_of_the_transport_map():
    T = np.asarray(bures_map(START.cov, TARGET.cov))
    plan = steer(START, TARGET)
    for t in (0.0, 0.6, 1.0):
        state = plan.path(t)
        move = tp.velocity(plan.at(t), state)
        np.testing.assert_allclose(move.matrix, (T - np.eye(3)) @ np.linalg.inv(np.eye(3) + t * (T - np.eye(3))), rtol=0, atol=1e-12)
        np.testing.assert_allclose(move.mean, np.asarray(TARGET.mean - START.mean), rtol=0, atol=1e-13)


def test_a_network_reaches_a_target_of_another_range_without_error():
    plan = steer(FLAT, TURNED, 2.0)
    sol = tl.iterate(plan.network(3), tp.ResidualLayers(2.0 / 3), FLAT, steps=3)
    np.testing.assert_allclose(sol.value.cov, TURNED.cov, rtol=0, atol=1e-13)
    np.testing.assert_allclose(sol.value.mean, TURNED.mean, rtol=0, atol=1e-14)
    assert sol.history["rank"].tolist() == [2, 2, 2, 2]


def test_superfluous_columns_do_not_matter():
    wide = tp.Gaussian.from_factor(FLAT.mean, np.concatenate([np.asarray(FLAT.factor), np.asarray(FLAT.factor)], 1) / np.sqrt(2))
    plan, plain = steer(wide, TURNED, 2.0), steer(FLAT, TURNED, 2.0)
    assert plan.factor.shape == (3, 2)
    for t in (0.0, 1.3, 2.0):
        np.testing.assert_allclose(plan.path(t).cov, plain.path(t).cov, rtol=0, atol=1e-14)
        np.testing.assert_allclose(plan.at(t).heads[0].V, plain.at(t).heads[0].V, rtol=0, atol=1e-11)


def test_a_point_is_carried_by_the_bias_alone():
    point = lambda mean: tp.Gaussian(np.array(mean), np.zeros((2, 2)))
    plan = steer(point([1.0, 2.0]), point([0.0, -1.0]))
    assert not plan.at(0.3).heads[0].V.any()
    np.testing.assert_allclose(tp.velocity(plan.at(0.3), point([5.0, 5.0])).mean, [-1.0, -3.0], atol=1e-15)


def test_the_plan_is_differentiable_in_the_target():
    def effort(shift):
        plan = steer(START, tp.Gaussian._raw(TARGET.mean + shift, TARGET.factor * (1 + shift), None))
        return (plan.at(0.5).heads[0].V ** 2).sum()

    slope = jax.jit(jax.grad(effort))(0.0)
    np.testing.assert_allclose(slope, (effort(1e-5) - effort(-1e-5)) / 2e-5, rtol=1e-6)


def test_what_cannot_be_steered_is_refused():
    with pytest.raises(MatrixError, match="attention keeps the rank of a covariance: start has rank 3 and target rank 2"):
        steer(START, TURNED)
    with pytest.raises(ArgumentError, match="target must be a Gaussian, got ndarray"):
        steer(START, np.eye(3))
    with pytest.raises(ShapeError, match="target must have dimension 3 like start, got 2"):
        steer(START, tp.Gaussian.standard(2))
    with pytest.raises(ShapeError, match="start must have no leading axes"):
        steer(tp.Gaussian(np.zeros((2, 3)), np.tile(np.eye(3), (2, 1, 1))), START)
    with pytest.raises(ArgumentError, match="duration must be a number above 0, got 0"):
        steer(START, TARGET, 0.0)
    with pytest.raises(ArgumentError, match="count must be"):
        steer(START, TARGET).network(0)
    with pytest.raises(ArgumentError, match="ask at"):
        tp.velocity(steer(START, TARGET), START)
