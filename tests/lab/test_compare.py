"""`compare`: the table against the solutions, first passage against brute force, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

import theorylab as tl
from tests.shapes import DIM, TRACES, Descent, NoisyDescent, quadratic, quadratic_path
from theorylab.errors import ArgumentError, NonFiniteError, UnknownNameError
from theorylab.lab.compare import compare

PROBLEM, X0 = quadratic(), np.ones(DIM)
STOP = tl.Below("residual", 1e-8)


class Uncounted(Descent):
    """Reports no counter."""

    def cost(self, problem):
        return {}


class Broken(Descent):
    """Leaves the finite numbers at the first step."""

    def step(self, problem, x, *, key):
        TRACES.append("Broken")
        return x / 0.0


@pytest.fixture(scope="module")
def table():
    return compare(PROBLEM, {"slow": Descent(0.1), "fast": Descent(1.5)}, x0=X0, steps=300, stop=STOP, axis="gradients")


def test_each_method_is_run_as_if_alone(table):
    alone = tl.iterate(PROBLEM, Descent(1.5), X0, steps=300, stop=STOP)
    np.testing.assert_array_equal(table["fast"].value, alone.value)
    assert list(table) == ["slow", "fast"] and len(table) == 2
    assert [row["status"] for row in table.rows()] == ["MAX_STEPS", "CONVERGED"]


def test_rows_hold_the_ends_of_the_histories(table):
    for row in table.rows():
        solution = table[row["method"]]
        assert row["steps"] == solution.steps
        assert row["residual"] == solution.history["residual"][-1]
        assert row["gradients"] == solution.history["gradients"][-1]
        assert row["seconds"] == solution.history["seconds"][-1]


def test_work_to_a_level_is_the_first_passage(table):
    residual = np.linalg.norm(quadratic_path(PROBLEM, X0, 1.5, 300) @ np.asarray(PROBLEM.matrix), axis=1)
    for level in (1.0, 1e-3, 1e-7):
        assert table.reach("fast", level) == np.flatnonzero(residual <= level)[0]
    assert table.reach("fast", 1e-9) == np.inf
    assert table.levels == (1.0, 1e-4, 1e-8)  # from the start, near 1.4, to the best end, just below 1e-8
    assert table.rows()[0]["gradients to 1e-08"] == np.inf


def test_levels_and_metric_can_be_given():
    one = compare(PROBLEM, {"fast": Descent(1.5)}, x0=X0, steps=30, metric="objective", levels=[0.1], axis="step")
    objective = one["fast"].history["objective"]
    assert one.metric == "objective" and one.rows()[0]["step to 1e-01"] == np.flatnonzero(objective <= 0.1)[0]
    assert compare(PROBLEM, {"fast": Descent(1.5)}, x0=X0, steps=30).metric == "residual"


def test_in_a_batch_numbers_are_medians_over_runs():
    many = compare(PROBLEM, {"plain": Descent(0.5), "noisy": NoisyDescent(0.5)}, runs=5, steps=40, levels=[0.2], axis="step", key=3)
    history = many["noisy"].history
    first = [np.flatnonzero(history["residual"][:, r] <= 0.2)[0] if (history["residual"][:, r] <= 0.2).any() else np.inf for r in range(5)]
    assert many.reach("noisy", 0.2) == np.median(first)
    assert many.rows()[1]["residual"] == np.median(history["residual"][-1])


def test_a_method_that_breaks_is_a_line_of_the_table():
    with np.errstate(all="ignore"):
        mixed = compare(PROBLEM, {"broken": Broken(), "fast": Descent(1.5)}, x0=X0, steps=20)
    assert [row["status"] for row in mixed.rows()] == ["NONFINITE", "COMPLETED"]
    assert "NONFINITE" in repr(mixed)
    with pytest.raises(NonFiniteError):
        compare(PROBLEM, {"broken": Broken()}, x0=X0, steps=20, throw=True)


def test_an_axis_that_a_method_does_not_report_is_refused_before_anything_runs():
    seen = []

    class Log:
        def start(self, label, total):
            seen.append(label)

        def update(self, done, note=""):
            seen.append(done)

        def close(self):
            pass

    with pytest.raises(ArgumentError, match=r"axis='gradients' cannot be compared: method 'bare' does not report it; it reports step, seconds"):
        compare(PROBLEM, {"fast": Descent(1.5), "bare": Uncounted(0.5)}, x0=X0, steps=300, axis="gradients", progress=Log())
    assert seen == []


def test_reports_read_alike(table):
    text, page, facts = repr(table), table._repr_html_(), table.to_dict()
    assert "residual against gradients" in text and "fast" in text and "gradients to 1e-08" in text
    assert "<td>fast</td>" in page
    assert json.loads(json.dumps(facts, allow_nan=False))["rows"][0]["gradients to 1e-08"] == "inf"
    frame = table.to_pandas()
    assert frame.loc["fast", "gradients"] == table["fast"].steps


def test_the_plot_shows_each_method_against_the_axis(table):
    ax = table.plot()
    assert [line.get_label() for line in ax.lines] == ["slow", "fast"]
    np.testing.assert_array_equal(ax.lines[1].get_xdata(), table["fast"].history["gradients"])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), table["fast"].history["residual"])
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "gradients"
    assert table.plot("objective", ax=ax) is ax


@pytest.mark.parametrize(("methods", "options", "kind", "words"), [
    ({}, {"steps": 5}, ArgumentError, "methods must be a dictionary of methods by name, got dict without entries"),
    ([Descent(0.5)], {"steps": 5}, ArgumentError, "methods must be a dictionary of methods by name, got list"),
    ({"a": 0.5}, {"steps": 5}, ArgumentError, r"methods\['a'\] must be a Method object, got 0.5"),
    ({"a": Descent(0.5)}, {}, ArgumentError, "compare needs steps="),
    ({"a": Descent(0.5)}, {"steps": 5, "levels": [np.nan]}, ArgumentError, "levels must be finite"),
    ({"a": Descent(0.5)}, {"steps": 5, "metric": "residul"}, UnknownNameError, "did you mean 'residual'"),
    ({"a": Descent(0.5)}, {"steps": 5, "axis": "flops"}, ArgumentError, "axis='flops' cannot be compared: method 'a'"),
])
def test_bad_input_is_named(methods, options, kind, words):
    with pytest.raises(kind, match=words):
        compare(PROBLEM, methods, x0=X0, **options)


def test_an_unknown_method_of_the_table_suggests_near_ones(table):
    with pytest.raises(UnknownNameError, match="method 'fas' is not known; did you mean 'fast'"):
        table["fas"]
