"""Solution, History and Status: what a reader of a result meets."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import theorylab as tl
from tests.shapes import DIM, Descent, quadratic
from theorylab.core.solution import count_statuses
from theorylab.errors import UnknownNameError

SOL = tl.iterate(quadratic(), Descent(0.5), np.ones(DIM), steps=6)
BATCH = tl.iterate(quadratic(), Descent(0.5), np.stack([np.ones(DIM) * 1e-3, np.ones(DIM)]), steps=200, runs=2, stop=tl.Below("residual", 1e-3))


def test_every_status_has_a_sentence_and_a_verdict():
    assert all(status.sentence for status in tl.Status)
    assert {s.name for s in tl.Status if s.good} == {"CONVERGED", "COMPLETED", "BLOWUP"}
    assert SOL.success and BATCH.success.all()
    assert count_statuses(BATCH.status) == {"CONVERGED": 2}


def test_columns_and_axes_are_found_by_name_and_wrong_names_get_a_hint():
    assert "objective" in SOL.history and SOL.history.names == ("objective", "residual", "gradients")
    assert SOL.history.axis("gradients").tolist() == SOL.history.axis("step").tolist()
    with pytest.raises(UnknownNameError, match="did you mean 'residual'"):
        SOL.history["residuals"]
    with pytest.raises(UnknownNameError, match="axis"):
        SOL.history.axis("operator_evaluations")


def test_the_repr_tells_how_it_ended():
    assert "COMPLETED" in repr(SOL) and "objective" in repr(SOL)
    assert "2 CONVERGED" in repr(BATCH) or "CONVERGED" in repr(BATCH)
    assert SOL._repr_html_().startswith("<table") and "rows" in repr(SOL.history)


def test_provenance_names_versions_and_settings_but_no_machine():
    text = str(SOL.provenance)
    assert SOL.provenance["settings"]["method"] == "Descent" and "jax" in SOL.provenance["versions"]
    import os
    import platform

    assert platform.node() not in text and os.path.expanduser("~") not in text


def test_a_saved_solution_comes_back_whole(tmp_path):
    for sol in (SOL, BATCH):
        back = tl.load(sol.save(tmp_path / "sol.npz"))
        jax.tree.map(np.testing.assert_array_equal, back.value, sol.value)
        np.testing.assert_array_equal(back.status, sol.status)
        np.testing.assert_array_equal(back.steps, sol.steps)
        for name in sol.history:
            np.testing.assert_array_equal(back.history[name], sol.history[name])
        assert back.provenance == sol.provenance and back.stats == sol.stats


def test_a_solution_travels_through_compiled_code():
    sol = jax.jit(lambda x: tl.iterate(quadratic(), Descent(0.5), x, steps=6))(np.ones(DIM))
    again = jax.jit(lambda s: s)(sol)
    np.testing.assert_array_equal(again.history["objective"], sol.history["objective"])
    assert repr(sol)


def test_pandas_has_one_row_per_row_and_run():
    assert len(SOL.to_pandas()) == 7
    assert len(BATCH.to_pandas()) == int(np.sum(BATCH.history.valid))


def test_the_plot_draws_the_named_column():
    ax = SOL.plot("residual")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), SOL.history["residual"])
