"""How results look: numbers, tables, the summary of a solution, the plot of a history."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.shapes import Descent
from theorylab.core import show
from theorylab.core.solution import History, Solution, Stats, Status
from theorylab.errors import ArgumentError, UnknownNameError

STEP = np.arange(4)


def history(valid=None, **columns):
    valid = np.ones(4, bool) if valid is None else valid
    return History({k: np.asarray(v) for k, v in columns.items()}, {"step": STEP, "seconds": STEP / 10}, valid)


def solution(status=Status.CONVERGED, steps=3, stats=None, **columns):
    past = columns.pop("past", None)
    return Solution(np.zeros(2), status, steps, past if past is not None else history(**columns), stats, {}, Descent(0.5))


LIVE = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
BATCH = history(LIVE, gap=np.where(LIVE, np.array([[8, 6, 4], [4, 3, 2], [2, 1, 0], [1, 0, 0]]), np.nan))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(-1e300, 1e300))
def test_a_number_is_short_and_right_to_its_digits(value):
    text = show.number_text(value)
    assert len(text) <= 11 and float(text) == pytest.approx(value, rel=5e-4, abs=0)


@pytest.mark.parametrize(("value", "text"), [
    (True, "yes"), (np.bool_(False), "no"), (np.int64(12345678), "12345678"), (np.float32(0.5), "0.5"), (np.nan, "nan"), (-np.inf, "-inf"),
    (None, ""), ("text", "text"), ((1, 2.5), "[1, 2.5]"), (1 + 2j, "1+2j"), (0.0, "0"),
    (999999.4, "999999"), (12345.0, "12345"), (-1e6, "-1.000e+06"), (1e-3, "0.001"),
])
def test_other_values_read_well(value, text):
    assert show.number_text(value) == text


def test_a_table_is_aligned():
    lines = show.text_table(["name", "n"], [["a", 1], ["longer", 1000]]).splitlines()
    assert lines == ["name       n", "------  ----", "a          1", "longer  1000"]
    assert show.text_table(["a", "b"], []).splitlines() == ["a  b", "-  -"]


def test_html_is_escaped():
    page = show.html_table(["<b>"], [["<script>"]], caption="a & b")
    assert "<script>" not in page and "&lt;script&gt;" in page and "a &amp; b" in page


def test_the_summary_of_one_run_says_method_status_steps_metrics_and_time():
    one = solution(gap=[1, 0.1, 0.01, 0.001], objective=[4.0, 3, 2, 1], stats=Stats(0.5, 0.01, dtype="float64"))
    assert show.summary(one) == [("method", "Descent"), ("status", "CONVERGED"), ("steps", "3"), ("gap", "0.001"), ("objective", "1"),
                                 ("time", "0.01 s (compile 0.5 s)"), ("precision", "float64")]
    assert repr(one).startswith("Solution(method=Descent, status=CONVERGED, steps=3, gap=0.001")
    assert "<td style='text-align:left'>CONVERGED</td>" in one._repr_html_()


def test_the_statuses_of_a_batch_are_counted_by_name():
    many = solution(np.array([1, 4, 1]), np.array([3, 2, 1]), past=BATCH)
    facts = dict(show.summary(many))
    assert facts["status"] == "2 CONVERGED, 1 NONFINITE" and facts["steps"] == "2 (from 1 to 3)" and facts["gap"] == "1 (from 1 to 2)"


def test_a_batch_says_how_many_ends_are_not_finite():
    wild = history(np.ones((4, 3), bool), gap=np.array([[1.0, 1, 1]] * 3 + [[2.0, np.nan, np.inf]]))
    assert dict(show.summary(solution(np.array([3, 3, 3]), np.array([3, 3, 3]), past=wild)))["gap"] == "2, 2 not finite"


def test_vector_columns_and_missing_parts_are_left_out():
    assert dict(show.summary(solution(eigenvalues=np.ones((4, 2))))).keys() == {"method", "status", "steps"}
    bare = Solution(np.zeros(2), Status.MAX_STEPS, 3, history(gap=np.ones(4)))
    assert dict(show.summary(bare)) == {"status": "MAX_STEPS", "steps": "3", "gap": "1"}


def test_judged_metrics_come_first_and_four_at_most():
    many = solution(a=np.ones(4), b=np.ones(4), residual=np.ones(4), c=np.ones(4), gap=np.ones(4))
    assert [name for name, _ in show.summary(many)][3:] == ["gap", "residual", "a", "b"]


# ------------------------------------------------------------------------------------------------------------------------------ plots


def test_one_column_is_drawn_against_the_axis():
    ax = show.plot_history(history(gap=[1, 0.1, 0.01, 0.001], objective=[4, 3, 2, 1]), axis="seconds")
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), STEP / 10)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [1, 0.1, 0.01, 0.001])
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale(), ax.get_legend()) == ("seconds", "gap", "log", None)


def test_several_columns_have_a_legend_and_share_the_axes_given():
    ax = show.plot_history(history(gap=[1, 0.1, 0.01, 0.001]), ["gap"])
    assert show.plot_history(history(objective=[4, 3, 2, 1], residual=[1, 1, 1, 1]), ["objective", "residual"], ax=ax) is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["gap", "objective", "residual"]


@pytest.mark.parametrize(("values", "log", "scale"), [
    ([1, 0.1, 0.0, 0.0], True, "log"), ([1, 0.1, -0.1, 0.1], True, "linear"), ([0, 0, 0, 0], True, "linear"), ([1, 0.1, 0.01, 1], False, "linear"),
])
def test_the_axis_is_logarithmic_where_the_values_allow(values, log, scale):
    assert show.plot_history(history(gap=np.array(values, float)), ["gap"], log=log).get_yscale() == scale


def test_a_column_of_vectors_is_drawn_as_one_line_per_number():
    values = np.arange(1.0, 9).reshape(4, 2)
    ax = show.plot_history(history(eigenvalues=values), ["eigenvalues"])
    np.testing.assert_array_equal([line.get_ydata() for line in ax.lines], values.T)
    assert [line.get_label() for line in ax.lines] == ["eigenvalues 0", "eigenvalues 1"]


def test_a_batch_is_its_median_with_ended_runs_held():
    ax = show.plot_history(BATCH, ["gap"])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [6, 3, 2, 1])  # the runs end at 1, 1 and 2
    edge = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert edge.max() == pytest.approx(np.quantile([8, 6, 4], 0.9)) and edge.min() == pytest.approx(np.quantile([1, 1, 2], 0.1))


def test_runs_that_overflow_or_never_began_do_not_spoil_the_median():
    gap = np.array([[8, 6, np.nan], [4, np.inf, np.nan], [2, np.inf, np.nan], [1, np.nan, np.nan]])
    ax = show.plot_history(history(np.ones((4, 3), bool), gap=gap), ["gap"])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [7, 5, 4, 3.5])
    assert np.isnan(show.middle(np.full((4, 2), np.nan))).all()


def test_a_counter_of_each_run_is_drawn_at_its_median():
    work = np.array([[0, 0, 0], [1, 2, 3], [2, 4, np.nan], [3, np.nan, np.nan]], float)
    past = History(BATCH.columns | {"gradients": work}, BATCH.axes, BATCH.valid)
    np.testing.assert_array_equal(show.plot_history(past, ["gap"], axis="gradients").lines[0].get_xdata(), [0, 2, 3, 3])


def test_what_was_not_recorded_is_named():
    with pytest.raises(UnknownNameError, match="column 'gapp' is not known; did you mean 'gap'"):
        show.plot_history(history(gap=np.ones(4)), ["gapp"])
    with pytest.raises(UnknownNameError, match="axis 'second' is not known; did you mean 'seconds'"):
        show.plot_history(history(gap=np.ones(4)), axis="second")
    with pytest.raises(ArgumentError, match="names must list columns to draw"):
        show.plot_history(history(eigenvalues=np.ones((4, 2))))


def test_matplotlib_is_loaded_only_to_draw():
    code = ("import sys, theorylab.core.show, theorylab.cli\n"
            "from theorylab.lab import claims, compare, evidence, figures, rates, style\n"
            "slow = {'matplotlib', 'pandas', 'scipy', 'sklearn', 'sympy', 'ot', 'tqdm', 'diffrax', 'lineax', 'optimistix'} & set(sys.modules)\n"
            "print(sorted(slow))")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("[]\n", "")
