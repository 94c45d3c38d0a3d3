"""The four kinds of field: what is traced, what is static, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import theorylab as tl
from theorylab.core.module import square
from theorylab.errors import ArgumentError, ShapeError


class Box(tl.Module):
    """One field of each kind."""

    real: Any = tl.number(0.5, above=0.0, high=2.0)
    whole: Any = tl.count(3)
    rows: int = tl.size(4)
    kind: str = tl.choice("a", among=("a", "b"))


def test_only_sizes_and_choices_recompile():
    traces = []

    @jax.jit
    def f(box, x):
        traces.append(box.kind)
        return x * box.real

    for box in (Box(), Box(0.7), Box(1, whole=9), Box(real=jnp.asarray(0.2))):
        f(box, jnp.ones(2))
    assert len(traces) == 1
    f(Box(rows=5), jnp.ones(2))
    f(Box(kind="b"), jnp.ones(2))
    assert len(traces) == 3


def test_a_number_takes_the_precision_of_the_data():
    assert (jnp.ones(2, jnp.float32) * Box(0.7).real).dtype == jnp.float32
    assert (jnp.ones(2) * Box(0.7).real).dtype == jnp.float64


def test_a_schedule_may_stand_for_a_number():
    assert isinstance(Box(tl.InverseSqrt(0.1)).real, tl.InverseSqrt)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"real": 0}, "Box: real must be above 0 and at most 2, got 0"),
        ({"real": 3.0}, "Box: real must be above 0 and at most 2, got 3"),
        ({"real": float("inf")}, "Box: real must be"),
        ({"real": "big"}, "expected a number or a schedule, got 'big'"),
        ({"whole": -1}, "Box: whole must be at least 0, got -1"),
        ({"whole": 2.5}, "expected a whole number, got 2.5"),
        ({"whole": "two"}, "expected a whole number, got 'two'"),
        ({"rows": 0}, "Box: rows must be at least 1, got 0"),
        ({"rows": True}, "expected a whole number, got True"),
        ({"kind": "c"}, "Box: kind must be one of 'a', 'b', got 'c'"),
    ],
)
def test_bad_values_are_named(options, words):
    with pytest.raises(ArgumentError, match=words):
        Box(**options)


def test_replace_checks_again():
    assert Box().replace(rows=7).rows == 7
    with pytest.raises(ArgumentError, match="real"):
        Box().replace(real=-1.0)


def test_inside_compiled_code_nothing_is_checked_and_nothing_fails():
    assert float(jax.jit(lambda r: Box().replace(real=r).real * 2)(-1.0)) == -2.0


def test_square_says_what_it_saw():
    with pytest.raises(ShapeError, match=r"B must be a square matrix, got shape \(3, 2\)"):
        square("B", jnp.ones((3, 2)))
    with pytest.raises(ShapeError, match="B must be 4 x 4 to match the other arguments, got 3 x 3"):
        square("B", jnp.ones((3, 3)), 4)
