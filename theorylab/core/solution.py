"""What a run returns: `Solution` with its `Status`, its `History` and its `Stats`."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import equinox as eqx
import numpy as np
from jax.core import Tracer

from theorylab.errors import UnknownNameError

X = TypeVar("X")


class Status(enum.IntEnum):
    """How a run ended. Integers, so that a batch of statuses is an array; compare with `sol.status == Status.CONVERGED`."""

    RUNNING = 0
    CONVERGED = 1
    COMPLETED = 2
    MAX_STEPS = 3
    NONFINITE = 4
    BLOWUP = 5
    STOPPED = 6
    UNDECIDED = 7

    def __str__(self) -> str:
        return self.name

    @property
    def sentence(self) -> str:
        """One line that a user reads."""
        return _SENTENCES[self]

    @property
    def good(self) -> bool:
        """Whether the run did what was asked (a blow-up is a result, not a failure)."""
        return self in (Status.CONVERGED, Status.COMPLETED, Status.BLOWUP)


_SENTENCES = {
    Status.RUNNING: "the run has not ended",
    Status.CONVERGED: "the stop rule was met",
    Status.COMPLETED: "all that was asked for was done",
    Status.MAX_STEPS: "the step limit came before the stop rule was met",
    Status.NONFINITE: "NaN or infinity appeared; the value is the last finite one",
    Status.BLOWUP: "the solution grows without bound in finite time; the value is the last good one",
    Status.STOPPED: "stopped from outside: time budget, interrupt or end of the data",
    Status.UNDECIDED: "the numbers do not decide the question asked",
}


def count_statuses(status: Any) -> dict[str, int]:
    """How many runs ended in which way, by name.

    Example:
        >>> count_statuses(np.array([1, 1, 5]))
        {'CONVERGED': 2, 'BLOWUP': 1}
    """
    codes, counts = np.unique(np.asarray(status), return_counts=True)
    return {Status(int(c)).name: int(n) for c, n in zip(codes, counts, strict=True)}


class History(eqx.Module):
    """Named columns recorded along a run, with the axes they can be drawn against.

    Attributes:
        columns: arrays with axes (row, [run], ...).
        axes: `step`, `seconds`, `time` or counters, each with axis (row,) or (row, run).
        valid: whether a row belongs to a live run, axes (row, [run]); other rows hold NaN.
    """

    columns: dict[str, Any]
    axes: dict[str, Any]
    valid: Any

    def __getitem__(self, name: str) -> Any:
        if name in self.columns:
            return self.columns[name]
        if name in self.axes:
            return self.axes[name]
        raise UnknownNameError.of("column", name, [*self.columns, *self.axes])

    def __contains__(self, name: object) -> bool:
        return name in self.columns or name in self.axes

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return int(self.valid.shape[0])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.columns)

    def axis(self, name: str) -> Any:
        """The numbers to draw against: `step`, `seconds`, `time`, or a counter that was recorded.

        Raises:
            UnknownNameError: the run recorded no such axis.
        """
        if name in self.axes:
            return self.axes[name]
        if name in self.columns:
            return self.columns[name]
        raise UnknownNameError.of("axis", name, [*self.axes, *self.columns])

    def last(self, name: str) -> Any:
        """The last valid entry of a column, per run."""
        column, valid = np.asarray(self[name]), np.asarray(self.valid)
        if valid.ndim == 1:
            return column[np.flatnonzero(valid)[-1]]
        rows = valid.shape[0] - 1 - np.argmax(valid[::-1], axis=0)
        return column[rows, np.arange(valid.shape[1])] if column.shape[:2] == valid.shape else column[rows]

    def __repr__(self) -> str:
        if isinstance(self.valid, Tracer):
            return f"History(columns={list(self.columns)}, traced)"
        runs = f", {self.valid.shape[1]} runs" if self.valid.ndim == 2 else ""
        return f"History({len(self)} rows{runs}; columns: {', '.join(self.columns) or 'none'}; axes: {', '.join(self.axes)})"


class Stats(eqx.Module):
    """Where the time went, and in what precision and on what device.

    Attributes:
        compile_seconds: tracing and compiling, kept out of every clock.
        run_seconds: compiled code running, this call only.
        wait_seconds: waiting for streamed data.
        chunks: calls of the compiled kernel.
        dtype: precision of the iterate.
        device: kind of device.
        counters: integrator counters or other whole-run numbers.
    """

    compile_seconds: float = 0.0
    run_seconds: float = 0.0
    wait_seconds: float = 0.0
    chunks: int = 0
    dtype: str = ""
    device: str = ""
    counters: Mapping[str, Any] = eqx.field(default_factory=dict)


class Solution(eqx.Module, Generic[X]):
    """The result of `iterate`, `integrate` and `solve`. Inside compiled code it is a pytree without `stats` and `provenance`.

    Attributes:
        value: last finite iterate (`iterate`), or the saved states with a leading axis of times (`integrate`), as JAX arrays.
        status: a `Status`; with `runs`, an integer array with one entry per run.
        steps: steps that led to `value`; with `runs`, one entry per run.
        history: what was recorded.
        stats: `Stats`, or None inside compiled code.
        provenance: versions, devices and settings, or None inside compiled code.
        method: the method (or integrator) that ran, prepared for the problem, or None inside compiled code.
    """

    value: X
    status: Any
    steps: Any
    history: History
    stats: Stats | None = None
    provenance: dict[str, Any] | None = None
    method: Any = None

    @property
    def success(self) -> Any:
        """Whether the run ended as asked (`CONVERGED`, `COMPLETED`, or a `BLOWUP` that was found), per run."""
        good = [s.value for s in Status if s.good]
        if isinstance(self.status, Status):
            return self.status.good
        return np.isin(np.asarray(self.status), good)

    def save(self, path: str | Path) -> Path:
        """Write one `.npz` file with a JSON header, atomically; `theorylab.load` reads it back.

        Raises:
            StorageError: the file cannot be written; an older file of that name is left whole.
        """
        from theorylab.core.store import save

        return save(path, self)

    def to_pandas(self) -> Any:
        """The history as a `pandas.DataFrame` with one row per recorded row and run."""
        from theorylab.core.store import to_pandas

        return to_pandas(self.history)

    def plot(self, *names: str, axis: str | None = None, ax: Any = None, log: bool = True) -> Any:
        """Draw columns of the history against an axis (the first one recorded: step or time); returns the matplotlib Axes."""
        from theorylab.core.show import plot_history

        return plot_history(self.history, names, axis=next(iter(self.history.axes)) if axis is None else axis, ax=ax, log=log)

    def _summary(self) -> list[tuple[str, str]]:
        from theorylab.core.show import summary

        return summary(self)

    def __repr__(self) -> str:
        if isinstance(self.status, Tracer):
            return "Solution(traced)"
        return "Solution(" + ", ".join(f"{name}={text}" for name, text in self._summary()) + ")"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th style='text-align:left'>{name}</th><td style='text-align:left'>{text}</td></tr>" for name, text in self._summary())
        return f"<table>{rows}</table>"
