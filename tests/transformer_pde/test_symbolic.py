"""Derivations by computer algebra: nothing remains, the code agrees to round-off, and a wrong formula would be seen."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from docs import symbolic as page
from theorylab import transformer_pde as tp
from theorylab.errors import UnknownNameError
from theorylab.transformer_pde import symbolic

NAMES = ("softmax", "l2", "linear", "sinkhorn", "moment-equations", "softmax-covariance", "softmax-mean", "scalar-laws", "rank-one-head",
         "rank-one-state", "riccati", "softmax-blow-up", "l2-blow-up")


@functools.cache
def found(name: str) -> symbolic.Derivation:
    return symbolic.derivations(name)[0]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_remains_and_the_code_agrees(name):
    one = found(name)
    assert one.name == name and one.residual.is_zero_matrix and len(one.residual) > 0
    assert one.compare(3, samples=2) < 1e-13                               # the largest seen over 8 seeds is 1e-15
    assert one.statement and one.steps and one.kernel


def test_an_unknown_derivation_is_refused_with_a_suggestion():
    with pytest.raises(UnknownNameError, match="softmax"):
        symbolic.derivations("softmx")


def test_a_wrong_formula_leaves_a_remainder_and_a_wrong_expression_a_difference():
    import sympy as sp

    A, S, V = symbolic.matrix("a"), symbolic.matrix("s", symmetric=True), symbolic.matrix("v")
    assert not symbolic.remainder(V * S * A - V * S * A.T).is_zero_matrix
    kernel = lambda A, S, V: tp.Softmax.bilinear(A, V).velocity(jnp.zeros(2), S).matrix
    draw = lambda d: [d.array(2, 2), d.definite(), d.array(2, 2)]
    right, wrong = (symbolic.comparison("check", [A, S, V], V * S * form, draw, kernel)(0) for form in (A, A.T))
    assert right < 1e-15 and wrong > 1e-2
    x, mean = symbolic.vector("x"), symbolic.vector("m")
    found = symbolic.velocity_of(V * S * A * x, x, mean)
    assert symbolic.remainder(found - sp.Matrix.hstack(V * S * A, V * S * A * mean)).is_zero_matrix


def test_draws_are_addressed_by_key_and_name():
    one, same, other = symbolic.Draw(1, "a"), symbolic.Draw(1, "a"), symbolic.Draw(1, "b")
    drawn = one.array(2, 2)
    assert np.array_equal(drawn, same.array(2, 2)) and not np.array_equal(drawn, other.array(2, 2))
    assert np.abs(drawn).max() <= 1 and np.array_equal(drawn * symbolic.GRID, np.round(drawn * symbolic.GRID))
    assert np.linalg.eigvalsh(one.definite())[0] >= 0.25 and 0.125 <= one.positive() <= 1.125


def test_the_page_states_every_derivation(monkeypatch):
    monkeypatch.setattr(symbolic, "derivations", lambda: tuple(map(found, NAMES)))
    monkeypatch.setattr(page, "SAMPLES", 1)
    text = page.derivations()
    assert all(f"{{ #{name} }}" in text and found(name).statement in text for name in NAMES)
    assert text.count("Remainder: zero") == len(NAMES)


def test_the_list_names_every_derivation_once():
    assert tuple(symbolic._makers()) == NAMES


def test_the_page_refuses_a_derivation_that_leaves_something():
    broken = found("linear")._replace(residual=symbolic.remainder(symbolic.vector("x")))
    with pytest.raises(RuntimeError, match="the derivation linear leaves the remainder"):
        page.entry(broken)
