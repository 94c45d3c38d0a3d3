"""`Check`: every relation on numbers and arrays, NaN and infinity, and what its reports say."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from theorylab.errors import ArgumentError, ClaimFailed, ShapeError
from theorylab.lab.evidence import Check

RELATIONS = {
    "below": lambda check, m: check.below("m", m, 1.0),
    "above": lambda check, m: check.above("m", m, 1.0),
    "equal": lambda check, m: check.equal("m", m, 1.0, tol=0.5),
    "relative": lambda check, m: check.equal("m", m, 2.0, tol=0.25, relative=True),
    "between": lambda check, m: check.between("m", m, 0.0, 1.0),
}


@pytest.mark.parametrize(("relation", "inside", "outside"), [
    ("below", [1.0, 0.5, -np.inf], [np.nextafter(1, 2), np.inf]),
    ("above", [1.0, 1.5, np.inf], [np.nextafter(1, 0), -np.inf]),
    ("equal", [1.0, 0.5, 1.5], [0.49, 1.51, np.inf, -np.inf]),
    ("relative", [2.0, 1.5, 2.5], [1.49, 2.51, np.inf]),
    ("between", [0.0, 0.5, 1.0], [-1e-300, np.nextafter(1, 2), np.inf, -np.inf]),
])
def test_each_relation_passes_up_to_its_bound_and_no_further(relation, inside, outside):
    for value in inside:
        assert RELATIONS[relation](Check(), value) is True, value
    for value in [*outside, np.nan]:
        assert RELATIONS[relation](Check(), value) is False, value


@pytest.mark.parametrize("relation", RELATIONS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(values=st.lists(st.one_of(st.floats(-3, 3), st.sampled_from([np.nan, np.inf, -np.inf])), min_size=1, max_size=6))
def test_an_array_passes_exactly_when_each_entry_does_and_shows_one_that_fails(relation, values):
    whole = Check()
    each = [RELATIONS[relation](Check(), v) for v in values]
    assert RELATIONS[relation](whole, np.array(values)) == all(each)
    if not all(each):
        shown = whole.rows[0].measured
        assert any((v == shown or (np.isnan(v) and np.isnan(shown))) for v, good in zip(values, each, strict=True) if not good)
        if np.isnan(values).any():
            assert np.isnan(shown)


def test_the_worst_entry_is_shown_with_its_place():
    check = Check()
    check.below("error", jnp.array([[0.1, 0.9], [0.3, 0.2]]), 1.0)
    check.above("margin", [3.0, 2.0, 5.0], [1.0, 1.9, 4.0])
    assert check.rows[0].measured == 0.9 and "worst of 4, at [0, 1]" in check.rows[0].note
    assert (check.rows[1].measured, check.rows[1].bound) == (2.0, 1.9)


def test_a_bound_that_is_nan_never_passes():
    assert not Check().below("x", 1.0, np.nan)
    assert not Check().equal("x", np.nan, np.nan, tol=np.inf)


def test_equal_infinities_are_equal():
    assert Check().equal("x", [np.inf, -np.inf], [np.inf, -np.inf], tol=0.0)
    assert not Check().equal("x", np.inf, -np.inf, tol=1.0)


def test_differences_of_narrow_and_unsigned_integers_do_not_wrap():
    assert not Check().equal("x", np.uint8(1), np.uint8(255), tol=3)
    check = Check()
    assert check.below("x", np.array([3, 1], np.uint8), np.array([4, 200], np.uint8)) and check.rows[0].measured == 3
    assert not Check().equal("x", np.int32(-(2**31)), np.int32(2**31 - 1), tol=1)


def test_an_equality_that_fails_by_little_says_by_how_much():
    check = Check()
    check.equal("pi", np.pi + 1e-9, np.pi, tol=1e-12)
    assert "off by 1.000e-09" in check.rows[0].note


def test_complex_numbers_are_compared_by_distance_and_have_no_order():
    assert Check().equal("z", 1 + 1j, 1 + 1.01j, tol=0.02)
    with pytest.raises(ArgumentError, match="complex numbers, which have no order"):
        Check().below("z", 1j, 2.0)


def test_conditions_are_true_in_every_entry():
    check = Check()
    assert check.true("scalar", True) and check.true("numpy", np.bool_(True)) and check.true("jax", jnp.array([True, True]))
    assert not check.true("array", [[True, False], [False, True]], note="seed 3")
    assert "false in 2 of 4 entries, first at [0, 1]" in check.rows[-1].note and "seed 3" in check.rows[-1].note
    with pytest.raises(ArgumentError, match="must be true or false, got float64"):
        check.true("number", 0.5)


def test_a_slope_is_judged_by_its_distance_to_the_expected_one():
    n = np.geomspace(10, 1e4, 6)
    check = Check()
    assert check.slope("half", n, n**-0.5, expected=-0.5, tol=0.01)
    assert not check.slope("one", n, n**-0.5, expected=-1.0, tol=0.1)
    assert check.slope("log", n, np.sqrt(np.log(n) / n), expected=-0.5, tol=1e-9, log_power=0.5)
    assert check.slope("inside", n, np.where(n < 50, 1.0, n**-1.0), expected=-1.0, tol=1e-9, within=(50, 1e5))
    assert not check.slope("nan", n, np.where(n < 50, np.nan, 1 / n), expected=-1.0, tol=0.1)
    assert "95% interval" in check.rows[0].note and "local slopes" in check.rows[0].note
    assert np.isnan(check.rows[-1].measured) and "n = 10" in check.rows[-1].note


def test_an_empty_check_does_not_pass():
    assert not Check().passed
    with pytest.raises(ClaimFailed, match="demo: nothing was measured"):
        Check("demo").raise_if_failed()


def test_a_failure_shows_measured_value_relation_and_bound():
    check = Check("demo")
    check.below("fine", 1, 2)
    check.raise_if_failed()
    check.below("gap", 0.5, 0.25)
    check.between("rank", 7, 0, 3)
    with pytest.raises(ClaimFailed, match=r"demo: gap: 0.5 <= 0.25: FAILED; rank: 7 in \[0, 3\]: FAILED") as caught:
        check.raise_if_failed()
    assert "fine" not in str(caught.value)


def test_reports_hold_every_row():
    check = Check("demo")
    check.below("a<b", [1.0, np.nan], np.inf)
    check.true("holds", True)
    text, page, facts = repr(check), check._repr_html_(), check.to_dict()
    assert "1 of 2 passed" in text and "FAILED" in text and "a<b" in text
    assert "a&lt;b" in page and "a<b" not in page
    again = json.loads(json.dumps(facts, allow_nan=False))
    assert again == facts and again["rows"][0]["measured"] == "nan" and again["rows"][0]["bound"] == "inf" and again["passed"] is False


@pytest.mark.parametrize(("call", "kind", "words"), [
    (lambda c: c.below("x", [], 1.0), ArgumentError, "measured of check 'x' is an empty array"),
    (lambda c: c.true("x", []), ArgumentError, "'x' was given an empty array"),
    (lambda c: c.below("x", "much", 1.0), ArgumentError, "measured of check 'x' must be a number .*, got str"),
    (lambda c: c.below("x", 1.0, None), ArgumentError, "bound of check 'x' must be a number"),
    (lambda c: c.below("x", [1.0, 2.0], [1.0, 2.0, 3.0]), ShapeError, r"do not match: measured \(2,\), bound \(3,\)"),
    (lambda c: c.equal("x", 1.0, 1.0, tol=-1), ArgumentError, "tol of check 'x' must be at least 0, got -1"),
    (lambda c: c.equal("x", 1.0, 1.0, tol=np.nan), ArgumentError, "tol of check 'x' must be at least 0, got nan"),
    (lambda c: c.between("x", 1.0, 2.0, 1.0), ArgumentError, "low <= high, got low = 2.0 and high = 1.0"),
    (lambda c: c.slope("x", [1, 2], [1, 2], expected=1, tol=-1), ArgumentError, "tol of check 'x'"),
    (lambda c: c.slope("x", [1, 2], [1, -2], expected=1, tol=1), ArgumentError, "error must be positive"),
])
def test_bad_input_is_named_and_records_nothing(call, kind, words):
    check = Check()
    with pytest.raises(kind, match=words):
        call(check)
    assert check.rows == []
