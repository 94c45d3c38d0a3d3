"""From the buffers of the compiled loop to a `History`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.kernel import Recorded
from theorylab.core.solution import History

PyTree = Any


def masked(column: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`column` with NaN where `valid` is false; whole numbers become floats only if something is masked."""
    if valid.all():
        return column
    if column.dtype.kind in "biu":
        column = column.astype(np.float64)
    mask = valid.reshape(valid.shape + (1,) * (column.ndim - valid.ndim))
    return np.where(mask, column, np.asarray(np.nan, column.dtype))


class Recorder:
    """Collects rows on the host.

    Args:
        first: the row at the start, by column.
        valid: whether it is finite, per run.
        last: keep one row only, the latest of each run.
    """

    def __init__(self, first: dict[str, Any], valid: Any, last: bool):
        self._last = last
        self._pieces = [self._piece({k: np.asarray(v)[None] for k, v in first.items()}, np.zeros(1, np.int32), np.asarray(valid)[None], np.zeros(1))]

    @staticmethod
    def _piece(columns: dict[str, np.ndarray], step: np.ndarray, valid: np.ndarray, seconds: np.ndarray) -> dict[str, np.ndarray]:
        return {**columns, "axis:step": step, "axis:valid": valid, "axis:seconds": seconds}

    def add(self, rows: Recorded, began: tuple[int, float], ended: tuple[int, float]) -> None:
        """Take the filled rows of one call that went from (step, seconds) to (step, seconds); times in between are interpolated."""
        filled = int(rows.filled)
        if filled == 0:
            return
        step = np.asarray(rows.step)[:filled]
        share = (step - began[0]) / max(1, ended[0] - began[0])
        piece = self._piece({k: np.asarray(v)[:filled] for k, v in rows.columns.items()}, step, np.asarray(rows.valid)[:filled],
                            began[1] + share * (ended[1] - began[1]))
        if not self._last:
            self._pieces.append(piece)
            return
        before, valid = self._pieces[0], piece["axis:valid"]
        for name in rows.columns:
            mask = valid.reshape(valid.shape + (1,) * (piece[name].ndim - valid.ndim))
            piece[name] = np.where(mask, piece[name], before[name])
        piece["axis:valid"] = valid | before["axis:valid"]
        self._pieces = [piece]

    def dump(self) -> dict[str, np.ndarray]:
        """All rows so far, by column, for a checkpoint."""
        if len(self._pieces) > 1:
            self._pieces = [{name: np.concatenate([p[name] for p in self._pieces]) for name in self._pieces[0]}]
        return self._pieces[0]

    def load(self, rows: dict[str, np.ndarray], every: int) -> None:
        """Go on from the rows of a checkpoint. A closing row that is off the recording grid is dropped: an uninterrupted run has none there."""
        keep = np.ones(len(rows["axis:step"]), bool) if self._last else rows["axis:step"] % every == 0
        self._pieces = [{name: column[keep] for name, column in rows.items()}]

    def row(self) -> dict[str, np.ndarray]:
        """The latest row."""
        return {name: column[-1] for name, column in self._pieces[-1].items() if not name.startswith("axis:")}

    def history(self, cost: dict[str, float]) -> History:
        """The columns with axes; `cost` adds cumulative counters that grow by a constant per step."""
        rows = self.dump()
        live = rows["axis:valid"].reshape(len(rows["axis:valid"]), -1).any(axis=1)
        valid, step = rows["axis:valid"][live], rows["axis:step"][live]
        columns = {name: masked(column[live], valid) for name, column in rows.items() if not name.startswith("axis:")}
        return History(columns | {name: step * float(per_step) for name, per_step in cost.items()},
                       {"step": step, "seconds": rows["axis:seconds"][live]}, valid)


def traced_history(first: dict[str, jax.Array], valid: jax.Array, rows: Recorded, cost: dict[str, float], last: bool) -> History:
    """The history of an in-graph run: arrays of full length, NaN (0 for whole numbers) and step -1 where a row was not reached."""
    reached = jnp.arange(rows.step.shape[0], dtype=jnp.int32) < rows.filled
    live = rows.valid & reached.reshape(reached.shape + (1,) * (rows.valid.ndim - 1))
    step = jnp.where(reached, rows.step, jnp.full_like(rows.step, -1))

    def blank(column: jax.Array, keep: jax.Array) -> jax.Array:
        mask = keep.reshape(keep.shape + (1,) * (column.ndim - keep.ndim))
        hole = jnp.nan if jnp.issubdtype(column.dtype, jnp.inexact) else 0
        return jnp.where(mask, column, jnp.asarray(hole, column.dtype))

    if last:
        columns = {k: jnp.where(live.reshape(live.shape + (1,) * (v.ndim - live.ndim)), v, first[k][None]) for k, v in rows.columns.items()}
        live = live | valid[None]
        step = jnp.where(reached, step, jnp.zeros_like(step))
    else:
        columns = {k: jnp.concatenate([first[k][None], v]) for k, v in rows.columns.items()}
        live = jnp.concatenate([valid[None], live])
        step = jnp.concatenate([jnp.zeros((1,), step.dtype), step])
    columns = {k: blank(v, live) for k, v in columns.items()}
    return History(columns | {name: step.astype(float) * float(c) for name, c in cost.items()}, {"step": step}, live)
