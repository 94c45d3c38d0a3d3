"""The look of figures: settings, cycle, widths, slope triangles, names at the ends of lines."""

from __future__ import annotations

import warnings

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from theorylab.errors import ArgumentError, UnknownNameError
from theorylab.lab import style


def test_the_style_ends_with_its_block():
    before = dict(mpl.rcParams)
    with style.paper_style(font_size=11, **{"lines.linewidth": 3}):
        assert mpl.rcParams["svg.fonttype"] == "none" and mpl.rcParams["font.size"] == 11 and mpl.rcParams["lines.linewidth"] == 3
    assert dict(mpl.rcParams) == before
    with pytest.raises(UnknownNameError, match="did you mean"), style.paper_style(font_sise=3):
        pass


def test_neighbours_of_the_cycle_differ_in_colour_and_line_style():
    with style.paper_style():
        looks = [(c["color"], str(c["linestyle"])) for c in mpl.rcParams["axes.prop_cycle"]]
    assert len({c for c, _ in looks}) == len({s for _, s in looks}) == len(looks) == 7
    assert [(look["color"], str(look["linestyle"])) for look in map(style.look, range(7))] == looks
    assert style.look(7) == style.look(0)


def test_widths_are_columns():
    assert style.figsize(2, 0.5) == (6.75, 3.375)
    for options, words in (({"columns": 3}, "columns must be 1 or 2"), ({"aspect": 0}, "aspect must be above 0")):
        with pytest.raises(ArgumentError, match=words):
            style.figsize(**options)


@pytest.mark.parametrize("flip", [False, True])
def test_the_long_side_of_the_triangle_has_the_slope(flip):
    ax = plt.subplots()[1]
    ax.set(xscale="log", yscale="log")
    x, y = np.log(style.slope_triangle(ax, -0.5, (10, 2.0), width=8, flip=flip, interval=(-0.6, -0.4)).get_xy()[:3]).T
    assert (y[2] - y[0]) / (x[2] - x[0]) == pytest.approx(-0.5) and x[2] - x[0] == pytest.approx(np.log(8))
    assert np.isclose(x[1], x[0] if flip else x[2]) and np.isclose(y[1], y[2] if flip else y[0])
    assert ax.texts[0].get_text() == "\N{MINUS SIGN}0.5 [\N{MINUS SIGN}0.60, \N{MINUS SIGN}0.40]"


def test_a_triangle_needs_logarithmic_axes_and_a_positive_place():
    ax = plt.subplots()[1]
    with pytest.raises(ArgumentError, match="two logarithmic axes, got linear and linear"):
        style.slope_triangle(ax, 1.0, (1, 1))
    ax.set(xscale="log", yscale="log")
    with pytest.raises(ArgumentError, match="positive point"):
        style.slope_triangle(ax, 1.0, (0, 1))


def test_lines_are_named_at_their_ends_in_their_colour():
    ax = plt.subplots()[1]
    first = ax.plot([1, 2], [1, 2], label="first")[0]
    ax.plot([1, 2, np.nan], [3, 4, 5], label="second")
    ax.axhline(0)
    texts = style.label_lines(ax, {"second": "renamed"})
    assert [t.get_text() for t in texts] == ["first", "renamed"]
    assert texts[0].get_color() == first.get_color() and tuple(texts[0].xy) == pytest.approx((2, 2)) and tuple(texts[1].xy) == pytest.approx((2, 4))
    with pytest.raises(ArgumentError, match="labels must name 3 lines, got 1"):
        style.label_lines(ax, ["only"])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(wanted=st.lists(st.floats(0, 50), min_size=1, max_size=6), gap=st.floats(0.5, 20))
def test_names_keep_their_distance_and_order_and_move_no_more_than_needed(wanted, gap):
    from scipy.optimize import minimize

    wanted = np.array(wanted)
    placed = style._spread(wanted, gap)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(placed[order]) >= gap - 1e-9).all()
    rules = {"type": "ineq", "fun": lambda h: np.diff(h[order]) - gap} if len(wanted) > 1 else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = minimize(lambda h: np.sum((h - wanted) ** 2), np.sort(wanted)[np.argsort(order)] + gap * np.argsort(order), constraints=rules,
                        method="SLSQP", options={"maxiter": 300, "ftol": 1e-12})
    assert np.sum((placed - wanted) ** 2) <= best.fun + 1e-6
