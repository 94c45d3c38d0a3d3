"""Checkpoints: a stopped run goes on as if it had never stopped, and a wrong file is refused and left whole."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import theorylab as tl
from tests.shapes import DIM, Descent, NoisyDescent, quadratic
from theorylab.core.checkpoint import fingerprint
from theorylab.errors import CheckpointMismatchError, StorageError

PROBLEM = quadratic()
X0 = np.linspace(1.0, 2.0, DIM)


def run(path=None, steps=30, **options):
    arguments = {"x0": X0, "key": 5, "every": 4, "record": tl.whole, "checkpoint": path} | options
    return tl.iterate(PROBLEM, NoisyDescent(0.5), steps=steps, **arguments)


def assert_same_run(a, b):
    np.testing.assert_array_equal(a.value, b.value)
    np.testing.assert_array_equal(a.status, b.status)
    np.testing.assert_array_equal(a.steps, b.steps)
    np.testing.assert_array_equal(a.history["step"], b.history["step"])
    for name in b.history:
        np.testing.assert_array_equal(a.history[name], b.history[name])


@pytest.mark.parametrize("cut", [0, 1, 8, 13, 29])
def test_a_run_cut_anywhere_and_extended_equals_the_uninterrupted_one(cut, tmp_path):
    run(tmp_path / "c.npz", steps=cut)
    assert_same_run(run(tmp_path / "c.npz"), run())


def test_a_batch_resumes_with_its_finished_runs_frozen(tmp_path):
    starts, stop = np.stack([X0 * 1e-4, X0]), tl.Below("residual", 1e-3)
    options = {"x0": starts, "runs": 2, "stop": stop, "throw": False}
    base = tl.iterate(PROBLEM, Descent(0.5), steps=400, **options)
    with pytest.warns(tl.errors.RunWarning, match="1 MAX_STEPS"):
        tl.iterate(PROBLEM, Descent(0.5), steps=20, **options, checkpoint=tmp_path / "c.npz")
    assert_same_run(tl.iterate(PROBLEM, Descent(0.5), steps=400, **options, checkpoint=tmp_path / "c.npz"), base)


def test_a_finished_run_is_read_and_not_run_again(tmp_path):
    first = run(tmp_path / "c.npz", stop=tl.Below("residual", 10.0))
    again = run(tmp_path / "c.npz", stop=tl.Below("residual", 10.0))
    assert again.stats.chunks == 0
    assert_same_run(again, first)


def test_a_tighter_rule_reopens_a_converged_run(tmp_path):
    loose = tl.iterate(PROBLEM, Descent(0.5), X0, steps=900, stop=tl.Below("residual", 1e-2), checkpoint=tmp_path / "c.npz")
    tight = tl.iterate(PROBLEM, Descent(0.5), X0, steps=900, stop=tl.Below("residual", 1e-4), checkpoint=tmp_path / "c.npz")
    assert loose.status == tight.status == tl.Status.CONVERGED and tight.steps > loose.steps
    assert tight.steps == tl.iterate(PROBLEM, Descent(0.5), X0, steps=900, stop=tl.Below("residual", 1e-4)).steps


def test_the_memory_of_a_patience_rule_survives(tmp_path):
    stop = tl.Stalled("residual", patience=6, relative=0.5)
    base = tl.iterate(PROBLEM, Descent(0.5), X0, steps=400, stop=stop)
    tl.iterate(PROBLEM, Descent(0.5), X0, steps=base.steps - 2, stop=stop, checkpoint=tmp_path / "c.npz", throw=False)
    assert_same_run(tl.iterate(PROBLEM, Descent(0.5), X0, steps=400, stop=stop, checkpoint=tmp_path / "c.npz"), base)


@pytest.mark.parametrize("change", [{"key": 6}, {"x0": X0 + 1}, {"every": 5}, {"record": None}])
def test_a_file_of_another_run_is_refused_and_left_as_it_is(change, tmp_path):
    run(tmp_path / "c.npz", steps=10)
    before = (tmp_path / "c.npz").read_bytes()
    with pytest.raises(CheckpointMismatchError, match="belongs to another run"):
        run(tmp_path / "c.npz", **change)
    assert (tmp_path / "c.npz").read_bytes() == before


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not a checkpoint", lambda b: b""])
def test_a_damaged_file_is_refused_and_left_as_it_is(damage, tmp_path):
    run(tmp_path / "c.npz", steps=10)
    (tmp_path / "c.npz").write_bytes(damage((tmp_path / "c.npz").read_bytes()))
    before = (tmp_path / "c.npz").read_bytes()
    with pytest.raises(CheckpointMismatchError, match=r"c\.npz"):
        run(tmp_path / "c.npz")
    assert (tmp_path / "c.npz").read_bytes() == before


def test_another_result_file_is_not_taken_for_a_checkpoint(tmp_path):
    run(steps=3).save(tmp_path / "solution.npz")
    with pytest.raises(CheckpointMismatchError, match="not a checkpoint of iterate"):
        run(tmp_path / "solution.npz")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        run(tmp_path / "file" / "c.npz", steps=3)


def test_an_interrupted_run_leaves_a_file_that_goes_on(tmp_path, monkeypatch):
    class Interrupting:
        calls = 0

        def start(self, label, total):
            self.calls = 0

        def update(self, done, note=""):
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt

        def close(self):
            self.closed = True

    monkeypatch.setattr("theorylab.core.driver.GROWTH", 1)
    part = run(tmp_path / "c.npz", progress=Interrupting())
    assert part.status == tl.Status.STOPPED and part.steps == 3
    monkeypatch.undo()
    assert_same_run(run(tmp_path / "c.npz"), run())


def test_the_fingerprint_sees_values_structure_and_names_but_not_addresses():
    assert fingerprint(PROBLEM, 1.0) == fingerprint(quadratic(), 1.0)
    assert fingerprint(PROBLEM) != fingerprint(quadratic(3))
    assert fingerprint(Descent(0.5)) != fingerprint(Descent(0.25)) and fingerprint(Descent(0.5)) != fingerprint(NoisyDescent(0.5))
    assert fingerprint(tl.whole) == fingerprint(tl.whole) != fingerprint(np.sin)
    assert fingerprint(jax.random.key(0)) != fingerprint(jax.random.key(1))
