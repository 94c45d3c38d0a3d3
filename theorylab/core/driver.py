"""The host loop of `iterate`: how far each compiled call goes, and what happens between calls."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from theorylab.core import kernel
from theorylab.core.checkpoint import Checkpoint, fingerprint
from theorylab.core.kernel import Carry
from theorylab.core.progress import Progress
from theorylab.core.recorder import Recorder
from theorylab.core.solution import Status

CALL_SECONDS = 0.25
GROWTH = 4096


class Run(NamedTuple):
    """What is asked for."""

    whole: tuple[Any, Any, Any, Any]
    x0: Any
    keys: jax.Array
    steps: int
    every: int
    runs: int | None
    last: bool


class Result(NamedTuple):
    """What the host loop leaves."""

    carry: Carry
    value: Any
    recorder: Recorder
    step: int
    compile_seconds: float
    run_seconds: float
    chunks: int


class Clock:
    """Chooses how many steps the next call takes, and knows when the time budget is spent.

    Args:
        budget: seconds for this call, or None.
        began: `time.perf_counter()` at the beginning of the call.
    """

    def __init__(self, budget: float | None, began: float):
        self._deadline = None if budget is None else began + budget
        self._next = 1

    @property
    def spent(self) -> bool:
        """Whether the budget is used up."""
        return self._deadline is not None and time.perf_counter() >= self._deadline

    def next(self) -> int:
        """Steps for the next call."""
        return self._next

    def took(self, steps: int, seconds: float) -> None:
        """Learn from a call: aim at a quarter of a second, or at what is left of the budget."""
        aim = CALL_SECONDS
        if self._deadline is not None:
            aim = min(aim, max(1e-3, self._deadline - time.perf_counter()))
        self._next = int(np.clip(aim * steps / max(seconds, 1e-9), 1, GROWTH * steps))


def drive(run: Run, start: Any, slots: int, reader: Any, clock: Clock, progress: Progress, path: Any) -> Result:
    """Run to the end, to the budget, to Ctrl-C or to the end of the data."""
    carry, recorder = start.carry, Recorder(start.row, start.good, run.last)
    spent, saver = 0.0, None
    if path is not None:
        problem, method, rule, record = run.whole
        saver = Checkpoint(path, fingerprint((problem, method, record), run.keys, run.x0, (run.every, run.runs, run.last)), fingerprint(rule))
        carry, spent = _resume(saver, run, start, carry, recorder)
    step, status = int(carry.step), np.asarray(carry.status)
    if reader is not None:
        reader.seek(step)
    value, compile_seconds = _compile(run, start, carry, slots, reader)
    run_seconds, chunks, saved = 0.0, 0, step
    progress.start(type(run.whole[1]).__name__, run.steps)
    progress.update(step)
    try:
        while step < run.steps and (status == Status.RUNNING).any() and not clock.spent:
            block, first, until = None, 0, step + clock.next()
            if reader is not None:
                block, first, end = reader.block(step)
                if end <= step:
                    break
                until = min(until, end)
            began = time.perf_counter()
            after, rows, latest = _call(run, start, carry, min(until, run.steps), slots, block, first)
            at, codes = int(after.step), np.asarray(after.status)
            took = time.perf_counter() - began
            recorder.add(rows, (step, spent), (at, spent + took))
            clock.took(max(1, at - step), took)
            carry, value, step, status = after, latest, at, codes
            spent, run_seconds, chunks = spent + took, run_seconds + took, chunks + 1
            progress.update(step, _note(recorder, run))
            if saver is not None and saver.due():
                _save(saver, carry, recorder, spent)
                saved = step
    except KeyboardInterrupt:
        pass  # the chunks that were finished are the result; their lanes end as STOPPED
    finally:
        progress.close()
        if saver is not None and (saved != step or not saver.path.exists()):
            _save(saver, carry, recorder, spent)
    return Result(carry, value, recorder, step, compile_seconds, run_seconds, chunks)


def _call(run: Run, start: Any, carry: Carry, until: int, slots: int, block: Any, first: int) -> Any:
    return kernel.advance(start.arrays, carry, np.int32(until), np.int32(run.steps), np.int32(run.every), block, np.int32(first),
                          static=start.static, runs=run.runs, slots=slots, last=run.last)


def _compile(run: Run, start: Any, carry: Carry, slots: int, reader: Any) -> tuple[Any, float]:
    """Call the kernel with zero steps: it compiles and gives the iterate, so that compile time stays out of every clock."""
    began = time.perf_counter()
    block, first = (None, 0) if reader is None else reader.block(int(carry.step))[:2]
    value = jax.block_until_ready(_call(run, start, carry, int(carry.step), slots, block, first)[2])
    return value, time.perf_counter() - began


def _note(recorder: Recorder, run: Run) -> str:
    """The first scalar metric of the latest row: the worst run of a batch."""
    for name, value in recorder.row().items():
        if value.ndim == (run.runs is not None) and value.dtype.kind == "f":
            return f"{name} {np.max(value):.3g}"
    return ""


def _save(saver: Checkpoint, carry: Carry, recorder: Recorder, spent: float) -> None:
    saver.write(jax.tree.leaves(carry), recorder.dump(), spent)


def _resume(saver: Checkpoint, run: Run, start: Any, carry: Carry, recorder: Recorder) -> tuple[Carry, float]:
    """Go on from the file, if there is one. Runs that ended at a step limit or under another stop rule are live again."""
    leaves, treedef = jax.tree.flatten(carry)
    found = saver.read(leaves)
    if found is None:
        return carry, 0.0
    leaves, rows, spent, same_goal = found
    carry = jax.tree.unflatten(treedef, leaves)
    recorder.load(rows, run.every)
    codes = np.asarray(carry.status).copy()
    reopened = codes == Status.MAX_STEPS if int(carry.step) < run.steps else np.zeros_like(codes, bool)
    if not same_goal:
        reopened = reopened | (codes == Status.CONVERGED)
        carry = carry._replace(memory=start.carry.memory)
    codes[reopened] = Status.RUNNING
    return carry._replace(status=jax.device_put(codes, carry.status.sharding)), spent
