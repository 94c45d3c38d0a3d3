"""`integrate` in segments: compiled calls of some save times each, with progress, checkpoint and Ctrl-C served in between."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks, stepping, store
from theorylab.core.checkpoint import fingerprint, like, to_numpy
from theorylab.core.kernel import bind
from theorylab.core.progress import Progress
from theorylab.core.solution import Status
from theorylab.core.stepping import Carry, Ended
from theorylab.errors import CheckpointMismatchError

PyTree = Any
CALLS = 32
KIND = "theorylab integrate checkpoint"


class Plan(NamedTuple):
    """What is asked for: the flow with what it records and the solver, the start, and the numbers of the run."""

    whole: tuple[Any, Any, Any]
    y0: PyTree
    times: np.ndarray
    numbers: np.ndarray
    max_steps: int
    runs: bool
    fixed: bool


class Watched(NamedTuple):
    """What a run leaves: rows on the device, columns and ending on the host."""

    value: PyTree
    columns: dict[str, np.ndarray]
    ended: Ended
    times: np.ndarray
    compile_seconds: float
    run_seconds: float
    calls: int


def watch(plan: Plan, segment: int | None, progress: Progress, checkpoint: str | Path | None) -> Watched:
    """Run to the end or to Ctrl-C, `segment` save times a call.

    Raises:
        CheckpointMismatchError: the checkpoint is damaged or belongs to another run.
    """
    last = len(plan.times) - 1
    length = max(1, -(-last // CALLS)) if segment is None else min(checks.whole("segment", segment, low=1), max(1, last))
    began = time.perf_counter()
    arrays, static = bind(plan.whole)
    options = {"static": static, "runs": plan.runs, "fixed": plan.fixed}
    limit = np.int32(plan.max_steps)

    def call(carry: Carry, first: int, until: int) -> Any:
        return jax.block_until_ready(stepping.advance(arrays, carry, plan.times, plan.numbers, np.int32(first), np.int32(until), limit, length=length,
                                                      **options))

    def one_row(carry: Carry) -> tuple[PyTree, dict[str, np.ndarray]]:
        value, columns = stepping.one_row(arrays, carry.t, carry.y, static=static, runs=plan.runs)
        return value, jax.device_get(columns)

    carry = stepping.open_run(arrays, plan.y0, plan.times, plan.numbers, **options)
    first = one_row(carry)
    values, pieces, row, old = [first[0]], [first[1]], 1, None
    file = None
    if checkpoint is not None:
        file = _File(Path(checkpoint), fingerprint(plan.whole, plan.y0, plan.times, plan.numbers, plan.runs))
        found = file.read(carry, *first)
        if found is not None:
            carry, row = found[0], found[3]
            values, pieces, row, old = _reopen(carry, found[1], found[2], row)
    ended = stepping.unpack(*call(carry, row, 0)[3])  # compiles and takes no step
    compiled = time.perf_counter()
    calls, saved = 0, row
    progress.start(type(plan.whole[0]).__name__, last)
    progress.update(row - 1)
    try:
        while row <= last and (_live(ended)).any():
            after, rows, columns, stand = call(carry, row, min(row + length, last + 1))
            columns = jax.device_get(columns)
            take = min(length, last + 1 - row)
            rows, columns = jax.tree.map(lambda a: a[:take], (rows, columns))  # noqa: B023
            if old is not None:
                rows, columns = old.keep(row, rows, columns)
            values.append(rows)
            pieces.append(columns)
            carry, ended, row, calls = after, stepping.unpack(*stand), row + take, calls + 1
            progress.update(row - 1, f"t = {plan.times[row - 1]:.6g}")
            if file is not None and file.due():
                file.write(carry, values, pieces, row)
                saved = row
    except KeyboardInterrupt:
        pass  # the segments that were finished are the result; open lanes end as STOPPED
    finally:
        progress.close()
        if file is not None and (saved != row or not file.path.exists()):
            file.write(carry, values, pieces, row)
    missing = len(plan.times) - row
    if missing:  # rows after the end repeat the last state
        value, columns = one_row(carry)
        values.append(jax.tree.map(lambda a: jnp.broadcast_to(a, (missing, *a.shape[1:])), value))
        pieces.append({name: np.broadcast_to(column, (missing, *column.shape[1:])) for name, column in columns.items()})
    value = jax.tree.map(lambda *parts: jnp.concatenate(parts), *values)
    columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    return Watched(value, columns, ended, plan.times, compiled - began, time.perf_counter() - compiled, calls)


def _live(ended: Ended) -> Any:
    """Which lanes are open: one that only waits for the next segment stands as STOPPED."""
    return ended.status == int(Status.STOPPED)


class _Old(NamedTuple):
    """Rows from a checkpoint, of which each lane has reached so many."""

    value: PyTree
    columns: dict[str, np.ndarray]
    reached: np.ndarray
    count: int

    def keep(self, first: int, value: PyTree, columns: dict[str, np.ndarray]) -> tuple[PyTree, dict[str, np.ndarray]]:
        """Rows first, first + 1, ... with those put back that a lane has reached before."""
        count = max(0, min(self.count - first, len(next(iter(jax.tree.leaves(value))))))
        kept = first + np.arange(count)[:, None] < self.reached

        def put(new: Any, old: Any) -> Any:
            mask = kept.reshape(kept.shape + (1,) * (new.ndim - 2))
            numpy = np if isinstance(new, np.ndarray) else jnp
            return numpy.concatenate([numpy.where(mask, old[first : first + count], new[:count]), new[count:]])

        return jax.tree.map(put, value, self.value), {name: put(column, self.columns[name]) for name, column in columns.items()}


def _reopen(carry: Carry, value: PyTree, columns: dict[str, np.ndarray], row: int) -> tuple[list[PyTree], list[dict], int, _Old | None]:
    """Where to go on from a checkpoint: at the first save time that an open lane has not reached.

    A run that had come to its step limit stands before the last row of the file; a batch then keeps the rows of the lanes that are further.
    """
    reached, count = np.asarray(carry.row), row
    waiting = reached[np.asarray(carry.status) == Status.RUNNING]
    row = int(min(row, waiting.min(initial=row)))
    old = _Old(value, columns, reached, count) if row < count and reached.ndim else None
    return [jax.tree.map(lambda a: a[:row], value)], [{name: column[:row] for name, column in columns.items()}], row, old


class _File:
    """The checkpoint of one run: its carry, its rows and a fingerprint that refuses a foreign file."""

    def __init__(self, path: Path, run: str):
        self.path, self.run = path, run
        self._saved_at, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time to write: at most one second in twenty goes into writing, and never more often than every two seconds."""
        return time.monotonic() - self._saved_at > max(2.0, 20 * self._cost)

    def write(self, carry: Carry, values: list[PyTree], pieces: list[dict], row: int) -> None:
        began = time.monotonic()
        arrays = {f"carry:{i}": to_numpy(leaf) for i, leaf in enumerate(jax.tree.leaves(carry))}
        rows = jax.tree.map(lambda *parts: np.concatenate([np.asarray(p) for p in parts]), *values)
        arrays |= {f"value:{i}": leaf for i, leaf in enumerate(jax.tree.leaves(rows))}
        arrays |= {f"column:{name}": np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
        store.write(self.path, arrays, {"kind": KIND, "run": self.run, "row": row})
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - began

    def read(self, carry: Carry, value: PyTree, columns: dict[str, Any]) -> tuple[Carry, PyTree, dict[str, np.ndarray], int] | None:
        """Carry, rows, columns and next row; None if there is no file."""
        if not self.path.exists():
            return None
        arrays, header = store.read(self.path)
        if header.get("kind") != KIND or header.get("run") != self.run:
            what = ("belongs to another run: flow, y0, times, rtol, atol, solver, step, collapse, record and runs must be those of the run that "
                    "wrote it; pass them, or") if header.get("kind") == KIND else "was not written by integrate;"
            raise CheckpointMismatchError(f"checkpoint {self.path} {what} name another file. It was left as it is")
        leaves, treedef = jax.tree.flatten(carry)
        data = [arrays.get(f"carry:{i}") for i in range(len(leaves))]
        lacking = [name for name in columns if f"column:{name}" not in arrays]
        if lacking or any(d is None or d.shape != np.shape(a) for d, a in zip(data, leaves, strict=True)):
            raise CheckpointMismatchError(f"checkpoint {self.path} does not hold the state of this run; it was left as it is")
        carry = jax.tree.unflatten(treedef, [like(a, d) for a, d in zip(leaves, data, strict=True) if d is not None])
        states, shape = jax.tree.flatten(value)
        rows = jax.tree.unflatten(shape, [like(a, arrays[f"value:{i}"]) for i, a in enumerate(states)])
        return carry, rows, {name: arrays[f"column:{name}"] for name in columns}, int(header["row"])
