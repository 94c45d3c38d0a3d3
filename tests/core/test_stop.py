"""Stop rules against plain Python on sequences of numbers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import theorylab as tl
from theorylab.errors import ArgumentError, ToleranceError, UnknownNameError

numbers = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)


def first_hit(rule, values):
    """Index of the first row on which the rule is met, or None."""
    rows = [{"gap": jnp.asarray(v)} for v in values]
    memory = rule.init(rows[0])
    for i, row in enumerate(rows):
        memory, hit = rule(memory, row)
        if bool(hit):
            return i
    return None


@settings(max_examples=25, deadline=None, derandomize=True)
@given(numbers, st.floats(1e-2, 1e2))
def test_below_is_met_at_the_first_number_under_the_level(values, level):
    assert first_hit(tl.Below("gap", level), values) == next((i for i, v in enumerate(values) if v < level), None)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(numbers, st.floats(1e-2, 1e2))
def test_above_is_met_at_the_first_number_over_the_level(values, level):
    assert first_hit(tl.Above("gap", level), values) == next((i for i, v in enumerate(values) if v > level), None)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(numbers, st.integers(1, 4))
def test_stalled_counts_rows_since_the_last_improvement(values, patience):
    best, idle, expected = np.inf, 0, None
    for i, v in enumerate(values):
        if not np.isfinite(best) or v < best - 0.1 * abs(best):
            best, idle = v, 0
        else:
            idle += 1
        if idle >= patience:
            expected = i
            break
    assert first_hit(tl.Stalled("gap", patience, relative=0.1), values) == expected


def test_rules_combine():
    low, idle = tl.Below("gap", 1.0), tl.Stalled("gap", 2)
    values = [5.0, 5.0, 5.0, 0.5, 0.5, 0.5]
    assert first_hit(low | idle, values) == 2 and first_hit(low & idle, values) == 5


def test_every_entry_of_an_array_must_be_below():
    rule = tl.Below("gap", 1.0)
    assert not bool(rule((), {"gap": jnp.array([0.5, 2.0])})[1]) and bool(rule((), {"gap": jnp.array([0.5, 0.9])})[1])


def test_nan_never_meets_a_rule():
    assert first_hit(tl.Below("gap", 1.0), [np.nan]) is None


def test_levels_under_round_off_are_refused_by_dtype():
    with pytest.raises(ToleranceError, match="float32"):
        tl.Below("gap", 1e-7).check({"gap": jnp.ones((), jnp.float32)})
    tl.Below("gap", 1e-7).check({"gap": jnp.ones(())})
    tl.Below("gap", 0.0).check({"gap": jnp.ones(())})


def test_unknown_metrics_and_bad_numbers_are_named():
    with pytest.raises(UnknownNameError, match="'gap'"):
        tl.Below("gop", 1.0).check({"gap": jnp.ones(())})
    with pytest.raises(ArgumentError, match="Stalled: patience must be at least 1, got 0"):
        tl.Stalled("gap", 0)
    with pytest.raises(ArgumentError, match="Below: level must be finite, got nan"):
        tl.Below("gap", float("nan"))
