"""Barriers and the schedule of mu: gradients against automatic differentiation, proxes against the optimality condition and SciPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from theorylab import acvi
from theorylab.errors import ArgumentError

ORTHANT = acvi.Nonnegative()
MU, PENALTY = 0.03, 0.7
BARRIERS = {"log": acvi.LogBarrier(), "extended": acvi.ExtendedLogBarrier(switch=0.2), "level": acvi.ExtendedLogBarrier(level=0.05),
            "entropy": acvi.EntropyBarrier()}
V = jnp.array([-3.0, -0.4, -1e-3, 0.0, 0.15, 0.9, 20.0])


def test_mu_is_multiplied_before_its_first_use_and_the_last_stage_does_not_end():
    schedule = acvi.MuSchedule(1e-5, 0.5, stages=20, inner_steps=1)
    values = np.asarray(schedule(jnp.arange(49)))
    np.testing.assert_allclose(values[:20], 1e-5 * 0.5 ** np.arange(1, 21), rtol=1e-14)
    np.testing.assert_allclose(values[20:], 1e-5 * 0.5**20, rtol=1e-14)


def test_stages_have_their_lengths_and_ends():
    schedule = acvi.MuSchedule(1.0, 0.5, stages=4, inner_steps=3, first_steps=5)
    steps = jnp.arange(20)
    stages = np.asarray(schedule.stage(steps))
    assert stages.tolist() == [0] * 5 + [1] * 3 + [2] * 3 + [3] * 9
    ends = np.asarray(schedule.end(steps))
    assert ends[:11].tolist() == [5] * 5 + [8] * 3 + [11] * 3 and ends[11:].tolist() == list(range(12, 21))


def test_new_numbers_of_a_schedule_do_not_compile_again():
    traces = []

    @jax.jit
    def value(schedule, step):
        traces.append(1)
        return schedule(step)

    for start, inner in ((1.0, 2), (0.3, 7)):
        assert float(value(acvi.MuSchedule(start, 0.5, 3, inner), jnp.asarray(inner))) == pytest.approx(start / 4)
    assert len(traces) == 1


@pytest.mark.parametrize("name", BARRIERS)
def test_the_gradient_is_the_derivative_of_the_value(name):
    barrier, y = BARRIERS[name], jnp.array([0.01, 0.19, 0.21, 0.5, 2.0])
    slope = jax.grad(lambda y: barrier.value(ORTHANT, y, MU))(y)
    np.testing.assert_allclose(barrier.gradient(ORTHANT, y, MU), slope, rtol=1e-12)


@pytest.mark.parametrize("name", BARRIERS)
def test_the_prox_is_the_minimizer(name):
    barrier = BARRIERS[name]
    y = barrier.prox(ORTHANT, V, MU, PENALTY)
    if name != "entropy":  # entries of the entropy prox may be too small for a stationarity test in the logarithm
        np.testing.assert_allclose(barrier.gradient(ORTHANT, y, MU) + PENALTY * (y - V), 0, atol=1e-12)
    for v, found in zip(np.asarray(V), np.asarray(y), strict=True):

        def height(p, v=v):
            point = jnp.asarray([p])
            return float(barrier.value(ORTHANT, point, MU)) + PENALTY * (p - v) ** 2 / 2

        low = -5.0 if name in ("extended", "level") else 1e-300
        assert found == pytest.approx(minimize_scalar(height, bounds=(low, 21.0), method="bounded", options={"xatol": 1e-10}).x, abs=1e-5)


def test_the_extended_barrier_is_finite_and_continuously_differentiable_everywhere():
    barrier, at = acvi.ExtendedLogBarrier(switch=0.2), 0.2
    around = [float(barrier.gradient(ORTHANT, jnp.array([at + d]), MU)[0]) for d in (-1e-12, 1e-12)]
    assert around[0] == pytest.approx(around[1], rel=1e-9)
    heights = [float(barrier.value(ORTHANT, jnp.array([at + d]), MU)) for d in (-1e-12, 1e-12)]
    assert heights[0] == pytest.approx(heights[1], abs=1e-11)
    assert np.isfinite(float(barrier.value(ORTHANT, jnp.array([-100.0]), MU)))


def test_a_level_whose_distance_underflows_leaves_the_plain_logarithm():
    barrier, mu = acvi.ExtendedLogBarrier(level=1.0), 1e-4                                # exp(-1e4) is 0
    np.testing.assert_array_equal(barrier.prox(ORTHANT, V, mu, PENALTY), acvi.LogBarrier().prox(ORTHANT, V, mu, PENALTY))
    assert float(barrier.distance(jnp.asarray(0.5))) == pytest.approx(np.exp(-2.0))


def test_values_are_infinite_outside_the_domain():
    outside = jnp.array([0.5, -0.1])
    assert np.isinf(float(acvi.LogBarrier().value(ORTHANT, outside, MU)))
    assert np.isinf(float(acvi.EntropyBarrier().value(ORTHANT, outside, MU)))


def test_a_fixed_gradient_step_on_the_log_barrier_keeps_positive_exactly_above_the_bound():
    rng = np.random.default_rng(0)
    mu, beta, eta = 10 ** rng.uniform(-8, 0, 2000), 10 ** rng.uniform(-1, 1, 2000), rng.uniform(0.01, 0.09, 2000)
    bound = -2 / beta * np.sqrt(mu * (1 - eta * beta) / eta)
    worst = np.sqrt(eta * mu / (1 - eta * beta))                                          # where y + eta mu / y - eta beta y is least
    for factor, positive in ((0.999, True), (1.001, False)):
        gradient = np.asarray(acvi.LogBarrier().gradient(ORTHANT, jnp.asarray(worst), jnp.asarray(mu)))
        after = worst - eta * (beta * (worst - bound * factor) + gradient)
        assert ((after > 0) == positive).all()


@pytest.mark.parametrize(("make", "words"), [
    (lambda: acvi.MuSchedule(0.0, 0.5, 1, 1), "start must be above 0"),
    (lambda: acvi.MuSchedule(1.0, 1.0, 1, 1), "factor must be above 0 and below 1"),
    (lambda: acvi.MuSchedule(1.0, 0.5, 0, 1), "stages must be at least 1"),
    (lambda: acvi.MuSchedule(1.0, 0.5, 1, 1, first_steps=0), "first_steps must be at least 1"),
    (acvi.ExtendedLogBarrier, "exactly one of switch"),
    (lambda: acvi.ExtendedLogBarrier(switch=0.1, level=1.0), "exactly one of switch"),
    (lambda: acvi.ExtendedLogBarrier(switch=-0.1), "switch must be above 0"),
    (lambda: acvi.EntropyBarrier().prox(acvi.Box(0.0, 1.0), V, MU, PENALTY), "defined for Nonnegative"),
    (lambda: acvi.ACVI(1.0, 1e-3, barrier=1.0), "ACVI: barrier must be a LogBarrier, .* got float"),
    (lambda: acvi.InexactACVI(1.0, barrier=acvi.MuSchedule(1.0, 0.5, 1, 1)), "InexactACVI: barrier must be .* got MuSchedule"),
    (lambda: acvi.HalpernACVI(barrier="log"), "HalpernACVI: barrier must be .* got str"),
    (lambda: acvi.ExtendedLogBarrier(switch=0.1).gradient(acvi.Ball(0.0, 1.0), V, MU), "defined for Nonnegative"),
])
def test_wrong_arguments_are_named(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()
