"""The exponent: witnesses and residuals in closed form, certificates against published costs, the system against its generating function."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import sympy

from theorylab.errors import ArgumentError, ShapeError
from theorylab.moe.exponent import exponent, exponent_certificate, nontrivial_solution, rates, series_residuals
from theorylab.moe.polynomials import polynomial_system


def coefficients(weight, shift, scale, order):
    """Of t, ..., t^order in sum_j w_j exp(b_j t + s_j t^2), from the double series."""
    return [sum(w * b ** (power - 2 * i) * s**i / math.factorial(power - 2 * i) / math.factorial(i)
                for w, b, s in zip(weight, shift, scale, strict=True) for i in range(power // 2 + 1)) for power in range(1, order + 1)]


def test_the_series_is_the_double_sum():
    rng = np.random.default_rng(0)
    w, b, s = rng.normal(size=(3, 4))
    np.testing.assert_allclose(series_residuals(w, b, s, 9), coefficients(w, b, s, 9), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("m", range(2, 7))
def test_gauss_hermite_solves_the_system_below_2m_and_misses_it_there_by_the_formula(m):
    found = nontrivial_solution(m)
    left = np.array(coefficients(found.weight, found.shift, found.scale, 2 * m))
    assert np.abs(left[:-1]).max() < 1e-12
    assert left[-1] == pytest.approx(-math.factorial(m) / math.factorial(2 * m), rel=1e-10)
    assert found.residual == pytest.approx(left[-1], rel=1e-10)
    assert (found.weight > 0).all()
    assert np.abs(found.shift).max() > 0


@pytest.mark.parametrize(("m", "order", "cost"), [(2, 3, None), (2, 4, 0.12711), (3, 6, 0.010103),
                                                  *(pytest.param(*row, marks=pytest.mark.slow) for row in [
                                                      (3, 5, None), (4, 7, None), (4, 8, 8.967e-4), (5, 9, None), (5, 10, 7.611e-5)])])
def test_orders_below_2m_are_solvable_and_2m_is_not(m, order, cost):
    found = exponent_certificate(m, order)
    assert found.solvable == (cost is None)
    assert found.agreeing >= 16
    if cost is None:
        assert found.cost < 1e-28
    else:
        assert found.cost == pytest.approx(cost, rel=2e-4)
    left = np.array(coefficients(found.weight, found.shift, found.scale, order))
    factor = [math.factorial(power) for power in range(1, order + 1)]
    assert found.cost == pytest.approx(float(np.sum(factor * left**2)), rel=1e-6, abs=1e-28)
    assert found.weight.sum() == pytest.approx(1)
    assert float(found.weight @ found.shift**2) == pytest.approx(1)
    assert ("has a solution" in repr(found)) == found.solvable


def test_for_two_atoms_elimination_proves_it():
    """By hand: the orders 2 and 3 give s, and order 4 is then -(W+1)(W^2+W+1)/(36 W^3)."""
    found = exponent_certificate(2, 4, iterations=50)
    (W,) = found.proof.free_symbols
    assert sympy.expand(found.proof - (W + 1) * (W**2 + W + 1)) == 0
    s = (-(W + 2) / (6 * W), -(2 * W + 1) / (6 * W**2))
    left = coefficients((1, W), (1, -1 / W), s, 4)
    assert [sympy.simplify(c) for c in left[:3]] == [0, 0, 0]
    assert sympy.simplify(left[3] + (W + 1) * (W**2 + W + 1) / (36 * W**3)) == 0
    assert "proved" in repr(found)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_system_has_the_coefficients_of_its_generating_function(dim):
    """sum_j p5^2 exp(p1.s + p2.s t + p3 t + p4 t^2), whose derivatives at 0 are taken by SymPy."""
    system = polynomial_system(2, 3, dim)
    rng = np.random.default_rng(dim)
    values = {symbol: sympy.Rational(int(v), 7) for group in (*system.p1, *system.p2, system.p3, system.p4, system.p5)
              for symbol, v in zip(group, rng.integers(-9, 9, len(group)), strict=True)}
    s, t = sympy.symbols(f"s0:{dim}"), sympy.Symbol("t")
    function = sum(p5**2 * sympy.exp(sum((a + b * t) * u for a, b, u in zip(p1, p2, s, strict=True)) + p3 * t + p4 * t**2)
                   for p1, p2, p3, p4, p5 in zip(system.p1, system.p2, system.p3, system.p4, system.p5, strict=True)).subs(values)
    assert len(system.equations) == math.comb(3 + dim + 1, dim + 1) - 1
    for index, equation in list(system.equations.items())[::3]:
        derivative = function
        for variable, power in zip((*s, t), index, strict=True):
            derivative = sympy.diff(derivative, variable, power) / math.factorial(power)
        assert sympy.simplify(derivative.subs(dict.fromkeys((*s, t), 0)) - equation.subs(values)) == 0


def test_exponents_and_their_status():
    assert [exponent(m) for m in (1, 2, 3, 4, 5, 6)] == [exponent(m).value for m in (1, 2, 3, 4, 5, 6)] == [1, 4, 6, 8, 10, 12]
    assert pickle.loads(pickle.dumps(exponent(2))).status == "proved"
    assert [exponent(m).status for m in (2, 3, 4, 6)] == ["proved", "literature", "certified numerically", "lower bound"]


def test_rates_of_the_paper_and_the_sharper_ones():
    one, three = rates(1), rates(3)
    assert set(one.paper.values()) == set(one.sharp.values()) == {Fraction(1, 2)}
    assert three.paper == {"density": Fraction(1, 2), "gate_weight": Fraction(1, 2), "gate_coef": Fraction(1, 12), "expert_coef": Fraction(1, 6),
                           "expert_intercept": Fraction(1, 12), "variance": Fraction(1, 6)}
    assert three.sharp == three.paper | {"gate_coef": Fraction(1, 4), "expert_coef": Fraction(1, 4)}
    assert "n^-1/12" in repr(three)
    assert "n^-1/12" in three._repr_html_()


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: exponent(0), ArgumentError, "m must be a whole number at least 1, got 0"),
    (lambda: exponent(2.5), ArgumentError, "m must be a whole number"),
    (lambda: nontrivial_solution(1), ArgumentError, "at least 2"),
    (lambda: rates(-1), ArgumentError, "at least 1, got -1"),
    (lambda: exponent_certificate(1, 2), ArgumentError, "m must be"),
    (lambda: exponent_certificate(2, 1), ArgumentError, "order must be"),
    (lambda: exponent_certificate(2, 4, starts=0), ArgumentError, "starts must be"),
    (lambda: polynomial_system(2, 0), ArgumentError, "order must be"),
    (lambda: polynomial_system(2, 2, dim=-1), ArgumentError, "dim must be"),
    (lambda: series_residuals([1.0], [1.0, 2.0], [0.0], 2), ShapeError, "shift must have shape"),
    (lambda: series_residuals(jnp.ones(2), jnp.ones(2), jnp.ones(2), 0), ArgumentError, "order must be"),
])
def test_wrong_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
