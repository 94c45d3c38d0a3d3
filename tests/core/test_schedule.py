"""Schedules: values, precision, compile counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from theorylab.core import schedule
from theorylab.errors import ArgumentError, ShapeError

EVERY_KIND = [schedule.Constant(0.5), schedule.InverseSqrt(0.5), schedule.Inverse(0.5, 3.0), schedule.Geometric(0.5, 0.9, every=2, floor=0.1),
              schedule.Staircase([0.5, 0.1], [3]), schedule.Cosine(0.5, 7)]


def values(rule, steps):
    return [float(rule(k)) for k in steps]


def test_values_are_those_of_the_formulas():
    steps = range(6)
    assert values(schedule.Constant(0.3), steps) == [0.3] * 6
    np.testing.assert_allclose(values(schedule.InverseSqrt(0.1), steps), [0.1 / (k + 1) ** 0.5 for k in steps], rtol=1e-15)
    np.testing.assert_allclose(values(schedule.Inverse(2.0, 5.0), steps), [2 * 5 / (5 + k) for k in steps], rtol=1e-15)
    np.testing.assert_allclose(values(schedule.Geometric(1.0, 0.1, every=2, floor=0.05), steps), [1, 1, 0.1, 0.1, 0.05, 0.05], rtol=1e-15)
    assert values(schedule.Staircase([3.0, 2.0, 1.0], [2, 4]), steps) == [3, 3, 2, 2, 1, 1]
    np.testing.assert_allclose(values(schedule.Cosine(2.0, 4), steps), [1 + np.cos(np.pi * min(k, 4) / 4) for k in steps], atol=1e-15)


def test_a_geometric_schedule_that_underflows_rests_on_its_floor():
    assert float(schedule.Geometric(1.0, 0.5, floor=1e-3)(10**9)) == 1e-3
    assert float(schedule.Geometric(1.0, 0.5)(10**9)) == 0.0


@pytest.mark.parametrize("rule", EVERY_KIND, ids=repr)
def test_a_schedule_takes_the_precision_of_the_data_and_any_integer_step(rule):
    for step in (3, np.int64(3), jnp.asarray(3, jnp.int32), jnp.asarray(3, jnp.int64)):
        for dtype in (jnp.float32, jnp.float64):
            assert (rule(step) * jnp.ones(2, dtype)).dtype == dtype
    inside = jax.jit(lambda r, k, x: r(k) * x)(rule, jnp.asarray(3, jnp.int32), jnp.ones(2, jnp.float32))
    assert inside.dtype == jnp.float32
    np.testing.assert_allclose(inside, np.full(2, float(rule(3))), rtol=1e-6)
    assert rule(jnp.arange(4)).shape == (4,)


@pytest.mark.parametrize("make", [
    schedule.Constant,
    schedule.InverseSqrt,
    lambda v: schedule.Inverse(v, 10 * v),
    lambda v: schedule.Geometric(v, v, every=int(10 * v), floor=v / 100),
    lambda v: schedule.Staircase([v, v / 2], [int(10 * v)]),
    lambda v: schedule.Cosine(v, int(100 * v)),
])
def test_new_values_do_not_recompile(make):
    traces = []

    @jax.jit
    def run(rule, k):
        traces.append(1)
        return rule(k)

    for v in (0.1, 0.2, 0.3):
        np.testing.assert_allclose(run(make(v), 5), make(v)(5), rtol=1e-15)
    assert len(traces) == 1


def test_values_can_be_differentiated():
    slope = jax.grad(lambda start: schedule.InverseSqrt(start)(3))(0.1)
    assert float(slope) == 0.5


def test_a_float32_value_stays_float32():
    assert schedule.InverseSqrt(jnp.asarray(0.1, jnp.float32))(3).dtype == jnp.float32
    assert schedule.Staircase(jnp.ones(2, jnp.float32), [3])(1).dtype == jnp.float32


def test_at_accepts_a_number_or_a_schedule():
    assert schedule.at(0.5, 3) == 0.5
    assert float(schedule.at(schedule.InverseSqrt(1.0), 3)) == 0.5


def test_a_schedule_stands_in_a_number_field():
    class Walk(tl.Method):
        step_size: object = tl.number(0.1)

    assert float(schedule.at(Walk(schedule.InverseSqrt(1.0)).step_size, 3)) == 0.5
    assert float(schedule.at(Walk(0.25).step_size, 3)) == 0.25


def test_repr_shows_the_numbers():
    assert repr(schedule.Geometric(1.0, 0.5, every=10)) == "Geometric(start=1, factor=0.5, every=10, floor=0)"
    assert repr(schedule.Staircase([1.0, 0.1], [100])) == "Staircase(values=(1, 0.1), boundaries=(100))"
    seen = []
    jax.jit(lambda rule: seen.append(repr(rule)))(schedule.Constant(1.0))
    assert seen == ["Constant(value=traced)"]


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: schedule.Constant(np.nan), ArgumentError, "Constant: value must be finite"),
    (lambda: schedule.Constant("fast"), ArgumentError, "expected a number or a schedule, got 'fast'"),
    (lambda: schedule.Inverse(1.0, offset=0.0), ArgumentError, "Inverse: offset must be above 0, got 0"),
    (lambda: schedule.Geometric(1.0, -0.5), ArgumentError, "Geometric: factor must be above 0, got -0.5"),
    (lambda: schedule.Geometric(1.0, 0.5, every=0), ArgumentError, "Geometric: every must be at least 1, got 0"),
    (lambda: schedule.Staircase([1.0], [5]), ShapeError, "values must be one more than boundaries, got 1 and 1"),
    (lambda: schedule.Staircase([1.0, 0.5, 0.1], [5, 5]), ArgumentError, r"boundaries must be positive and increasing, got \[5, 5\]"),
    (lambda: schedule.Staircase([1.0, 0.5], [2.5]), ArgumentError, "boundaries must be whole numbers, got 2.5"),
    (lambda: schedule.Staircase([1.0, np.inf], [2]), ArgumentError, "values must be finite, got inf"),
    (lambda: schedule.Constant(1.0)(2.5), ArgumentError, "step must be a whole number, got dtype float64"),
])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
