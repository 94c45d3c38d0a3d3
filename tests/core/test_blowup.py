"""Blow-up in finite time: found where it is, and not found where there is none.

All equations here are y' = rate * y^power in one compiled program, so each test is a new set of numbers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import theorylab as tl
from theorylab.core.blowup import any_lane
from theorylab.core.integrate import integrate
from theorylab.errors import NonFiniteError, RunWarning

QUICK = settings(max_examples=20, deadline=None, derandomize=True)


class Power(tl.Flow):
    """y' = rate * y^power: blows up at t* = y0^(1 - power) / (rate (power - 1)) if rate > 0 and power > 1."""

    power: Any = tl.number(2.0)
    rate: Any = tl.number(1.0)

    def field(self, t: jax.Array, y: jax.Array) -> jax.Array:
        return self.rate * y**self.power

    def metrics(self, t: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        return {"size": jnp.linalg.norm(y), "t": t}


class Quadratic(tl.Flow):
    """S' = 2 S A S, with S(t) = (S0^-1 - 2 t A)^-1."""

    form: jax.Array

    def field(self, t: jax.Array, y: jax.Array) -> jax.Array:
        return 2 * y @ self.form @ y


def solve(power: float, rate: float, y0: float, times: Any, **options: Any) -> tl.Solution:
    return integrate(Power(power, rate), jnp.array([y0]), np.asarray(times, float), **options)


def blow_up_time(power: float, rate: float, y0: float) -> float:
    return y0 ** (1 - power) / (rate * (power - 1))


@pytest.mark.parametrize("power", [1.1, 1.5, 2.0, 3.0, 5.0, 9.0])
@pytest.mark.parametrize("y0", [1e-3, 1.0, 30.0])
def test_the_last_good_time_is_the_blow_up_time_to_a_millionth(power, y0):
    exact = blow_up_time(power, 1.0, y0)
    sol = solve(power, 1.0, y0, [0.0, 0.5 * exact, 3.0 * exact])
    assert sol.status == tl.Status.BLOWUP
    # the run ends a growth time of 1e-9 before its own blow-up, and rtol = 1e-8 shifts that by some 1e-8
    assert abs(sol.stats.counters["last_time"] / exact - 1) < 1e-6 / 2


@QUICK
@given(st.floats(1.2, 6.0), st.floats(0.1, 10.0), st.floats(0.1, 10.0), st.floats(-1e4, 1e4))
def test_the_blow_up_time_does_not_depend_on_units_or_on_where_time_starts(power, rate, y0, start):
    exact = blow_up_time(power, rate, y0)
    sol = solve(power, rate, y0, start + exact * np.array([0.0, 0.5, 3.0]))
    assert sol.status == tl.Status.BLOWUP
    assert abs((sol.stats.counters["last_time"] - start) / exact - 1) < 1e-6 + 1e5 * np.spacing(abs(start)) / exact


def test_a_blow_up_between_save_times_keeps_the_rows_before_it_and_the_state_at_its_end():
    sol = solve(2.0, 1.0, 1.0, [0.0, 0.5, 2.0])
    assert sol.history["time"].tolist() == [0.0, 0.5, sol.stats.counters["last_time"]]
    assert sol.history["t"].tolist() == sol.history["time"].tolist()
    np.testing.assert_allclose(sol.value[:2, 0], [1.0, 2.0], rtol=1e-7)
    assert sol.value.shape == (3, 1) and sol.value[2, 0] > 1e8 and sol.history.valid.all()
    assert sol.history["size"][2] == sol.value[2, 0]


def test_rows_just_before_the_blow_up_are_accurate():
    times = np.array([0.0, 0.9, 1 - 1e-5])
    sol = solve(2.0, 1.0, 1.0, times)
    assert sol.status == tl.Status.COMPLETED
    np.testing.assert_allclose(sol.value[:, 0], 1 / (1 - times), rtol=1e-3)  # the relative condition number there is 1e5


@pytest.mark.parametrize(("rate", "end"), [(1.0, 40.0), (1.0, 300.0), (1e6, 1e-4), (-1.0, 40.0), (-50.0, 1.0)])
def test_exponential_growth_and_decay_are_not_blow_up(rate, end):
    sol = solve(1.0, rate, 1.0, [0.0, end / 2, end])
    assert sol.status == tl.Status.COMPLETED
    np.testing.assert_allclose(sol.value[-1, 0], np.exp(rate * end), rtol=2e-5, atol=1e-10)


def test_growth_to_overflow_is_not_finite_rather_than_a_blow_up():
    with pytest.raises(NonFiniteError, match=r"after t = 709\.7") as caught:
        solve(1.0, 1.0, 1.0, [0.0, 1.0, 1000.0])
    assert np.isfinite(np.asarray(caught.value.solution.value)).all()


def test_an_end_by_a_singular_field_is_not_a_blow_up():
    with pytest.raises(NonFiniteError, match="singular") as caught:  # y = sqrt(1 - 2 t), whose slope is infinite at the end
        solve(-1.0, -1.0, 1.0, [0.0, 0.25, 2.0])
    assert caught.value.solution.status == tl.Status.NONFINITE
    np.testing.assert_allclose(caught.value.solution.stats.counters["last_time"], 0.5, rtol=1e-6)


def test_collapse_zero_waits_until_no_step_is_short_enough():
    early, late = solve(2.0, 1.0, 1.0, [0.0, 0.5, 2.0], collapse=1e-4), solve(2.0, 1.0, 1.0, [0.0, 0.5, 2.0], collapse=0.0)
    assert early.status == late.status == tl.Status.BLOWUP
    assert early.steps < late.steps and early.value[-1, 0] < 1e6 and late.value[-1, 0] > 1e12


def test_each_lane_of_a_batch_blows_up_at_its_own_time():
    y0, times = np.array([[1.0], [2.0], [0.1]]), np.array([0.0, 0.25, 2.0])
    sol = integrate(Power(), y0, times, runs=3)
    assert [tl.Status(s).name for s in sol.status] == ["BLOWUP", "BLOWUP", "COMPLETED"]
    np.testing.assert_allclose(sol.stats.counters["last_time"], [1.0, 0.5, 2.0], rtol=1e-6)
    assert sol.value.shape == (3, 3, 1) and sol.history["time"].tolist() == times.tolist()
    assert sol.history.valid.tolist() == [[True] * 3, [True] * 3, [False, False, True]]
    np.testing.assert_allclose(sol.value[1, :, 0], y0[:, 0] / (1 - 0.25 * y0[:, 0]), rtol=1e-7)
    assert (sol.value[2, :2, 0] > 1e8).all() and np.isnan(sol.history["size"][2, :2]).all() and sol.history["size"][2, 2] == sol.value[2, 2, 0]


def test_a_lane_equals_the_single_run_to_the_tolerance():
    batch = integrate(Power(), np.array([[1.0], [2.0], [0.1]]), np.array([0.0, 0.25, 2.0]), runs=3)
    for lane, y0 in enumerate([1.0, 2.0, 0.1]):
        single = solve(2.0, 1.0, y0, [0.0, 0.25, 2.0])
        assert batch.status[lane] == single.status and abs(batch.steps[lane] - single.steps) <= 1
        np.testing.assert_allclose(batch.value[:2, lane], single.value[:2], rtol=1e-9)


def test_a_batch_warns_once_of_lanes_that_ended_badly():
    with pytest.warns(RunWarning, match="1 of 3 runs did not end as asked: 1 MAX_STEPS") as seen:
        sol = integrate(Power(), np.array([[1.0], [1e-2], [1e-3]]), np.array([0.0, 0.25, 2.0]), runs=3, max_steps=20)
    assert len(seen) == 1 and [tl.Status(s).name for s in sol.status] == ["MAX_STEPS", "COMPLETED", "COMPLETED"]


def test_a_matrix_riccati_equation_blows_up_at_the_time_of_its_closed_form(rng):
    raw = rng.standard_normal((4, 4))
    form = (raw + raw.T) / 4
    exact = 1 / (2 * np.linalg.eigvalsh(form)[-1])
    times = exact * np.array([0.0, 0.9, 1.5])
    sol = integrate(Quadratic(jnp.asarray(form)), jnp.eye(4), times)
    assert sol.status == tl.Status.BLOWUP
    assert abs(sol.stats.counters["last_time"] / exact - 1) < 1e-7
    np.testing.assert_allclose(sol.value[1], np.linalg.inv(np.eye(4) - 2 * times[1] * form), rtol=1e-6, atol=1e-8)


def test_float32_states_stay_float32_and_their_blow_up_is_found_at_round_off():
    flow, y0 = Power(), jnp.array([1.0], jnp.float32)
    sol = integrate(flow, y0, [0.0, 0.5, 2.0], rtol=1e-5, atol=1e-6)
    assert sol.value.dtype == sol.history["size"].dtype == sol.history["time"].dtype == np.float32
    assert sol.status == tl.Status.BLOWUP
    assert abs(sol.stats.counters["last_time"] - 1) < 1e-4
    np.testing.assert_allclose(sol.value[1, 0], 2.0, rtol=1e-3)


def test_any_lane_is_an_or_over_nested_lanes():
    where = jnp.array([[False, True], [False, False]])
    assert jax.vmap(any_lane)(where[0]).tolist() == [True, True]
    assert jax.vmap(jax.vmap(any_lane))(where).tolist() == [[True, True], [True, True]]
    assert not any_lane(where[0, 0])
