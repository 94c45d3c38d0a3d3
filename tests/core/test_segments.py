"""`integrate` in segments: the same bits for any length, progress, Ctrl-C, and checkpoints that resume."""

from __future__ import annotations

import diffrax
import jax
import numpy as np
import pytest

import theorylab as tl
from tests.core.flows import TIMES, Decay, Oscillator, clock, oscillate, start
from theorylab.core import segments, store
from theorylab.core.integrate import integrate
from theorylab.errors import CheckpointMismatchError, RunWarning


class Stop:
    """A progress object that interrupts after some segments."""

    def __init__(self, after: int):
        self.after, self.seen = after, []

    def start(self, label: str, total: int | None) -> None:
        self.seen.append((label, total))

    def update(self, done: int, note: str = "") -> None:
        self.seen.append((done, note))
        if len(self.seen) > self.after:
            raise KeyboardInterrupt

    def close(self) -> None:
        self.seen.append("closed")


def same(a: tl.Solution, b: tl.Solution) -> None:
    for x, y in zip(jax.tree.leaves(a.value), jax.tree.leaves(b.value), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.array_equal(a.status, b.status) and np.array_equal(a.steps, b.steps) and a.history["time"].tolist() == b.history["time"].tolist()
    for name in a.history:
        np.testing.assert_allclose(a.history[name], b.history[name], rtol=1e-15)


@pytest.mark.parametrize("length", [1, 5, 50])
def test_the_length_of_a_segment_does_not_change_a_bit(length):
    sol = oscillate(segment=length)
    same(sol, oscillate())
    assert sol.stats.chunks == -(-(len(TIMES) - 1) // min(length, len(TIMES) - 1)) and sol.stats.counters == oscillate().stats.counters


def test_segments_of_a_batch_with_events_agree():
    y0 = np.array([[1.0, 1.0], [0.15, 0.1], [0.01, 0.05]])
    with pytest.warns(RunWarning):
        same(integrate(Decay(level=0.1, limit=1.0), y0, [0.0, 0.25, 5.0], runs=3, segment=1),
             integrate(Decay(level=0.1, limit=1.0), y0, [0.0, 0.25, 5.0], runs=3))


def test_a_run_that_ends_early_in_segments_keeps_its_end():
    same(oscillate(segment=5, max_steps=12, throw=False), oscillate(max_steps=12, throw=False))


def test_progress_hears_of_every_segment():
    watcher = Stop(after=10**9)
    oscillate(segment=5, progress=watcher)
    assert watcher.seen == [("Oscillator", 12), (0, ""), (5, "t = 2.5"), (10, "t = 5"), (12, "t = 6"), "closed"]


def test_an_interrupt_keeps_the_finished_segments():
    sol = oscillate(segment=5, progress=Stop(after=3))
    assert sol.status == tl.Status.STOPPED and sol.history["time"].tolist()[:11] == TIMES[:11].tolist()
    np.testing.assert_array_equal(sol.value["q"][:11], oscillate().value["q"][:11])


@pytest.mark.parametrize("done", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, done):
    file = tmp_path / "run.npz"
    part = oscillate(segment=5, progress=Stop(after=1 + done), checkpoint=file)
    assert part.status == tl.Status.STOPPED and part.stats.chunks == done
    again = oscillate(segment=5, checkpoint=file)
    same(again, oscillate())
    assert again.stats.chunks == 3 - done and oscillate(segment=5, checkpoint=file).stats.chunks == 0


def test_a_run_resumes_with_another_segment_and_more_steps(tmp_path):
    file = tmp_path / "run.npz"
    assert oscillate(segment=5, max_steps=12, checkpoint=file, throw=False).status == tl.Status.MAX_STEPS
    same(oscillate(segment=1, checkpoint=file), oscillate())


def test_lanes_that_ran_out_of_steps_resume_where_they_stood(tmp_path):
    file, flow = tmp_path / "run.npz", Decay(limit=1e6)
    y0, times = np.array([[1e6, 1e6], [1e-9, 1e-9], [1.0, 1e-3]]), [0.0, 0.25, 5.0]  # a lane below atol takes longer steps
    with pytest.warns(RunWarning, match="2 of 3 runs did not end as asked: 2 MAX_STEPS"):
        part = integrate(flow, y0, times, runs=3, segment=1, max_steps=4, checkpoint=file)
    assert part.history.valid.sum(0).tolist() == [2, 3, 2]
    same(integrate(flow, y0, times, runs=3, segment=1, checkpoint=file), integrate(flow, y0, times, runs=3))


def test_a_foreign_or_damaged_checkpoint_is_refused_and_left_as_it_is(tmp_path):
    file = tmp_path / "run.npz"
    oscillate(segment=5, checkpoint=file)
    whole = file.read_bytes()
    for change in ({"rtol": 1e-9}, {"atol": 1e-9}, {"solver": diffrax.Tsit5()}):
        with pytest.raises(CheckpointMismatchError, match="belongs to another run"):
            oscillate(segment=5, checkpoint=file, **change)
    with pytest.raises(CheckpointMismatchError, match="belongs to another run"):
        integrate(Oscillator(1.5), start(), TIMES, record=clock, segment=5, checkpoint=file)
    assert file.read_bytes() == whole
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointMismatchError):
        oscillate(segment=5, checkpoint=file)
    store.write(file, {}, {"kind": "something else"})
    with pytest.raises(CheckpointMismatchError, match="not written by integrate"):
        oscillate(segment=5, checkpoint=file)


def test_the_checkpoint_is_written_while_running(tmp_path, monkeypatch):
    monkeypatch.setattr(segments._File, "due", lambda self: True)
    rows = []

    class Watch(Stop):
        def update(self, done: int, note: str = "") -> None:
            file = tmp_path / "run.npz"
            rows.append(store.read(file)[1]["row"] if file.exists() else None)

    oscillate(segment=5, checkpoint=tmp_path / "run.npz", progress=Watch(0))
    assert rows == [None, None, 6, 11] and store.read(tmp_path / "run.npz")[1]["row"] == 13
