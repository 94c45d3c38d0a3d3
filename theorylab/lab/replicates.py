"""What a sweep returns: columns of NumPy arrays with an axis of replicates, whole or clearly marked as partial."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from theorylab.core import store
from theorylab.core.solution import Status, count_statuses
from theorylab.errors import ArgumentError, UnknownNameError


class Columns:
    """Named columns; the part that `Replicates` and `Table` share."""

    columns: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.columns:
            raise UnknownNameError.of("column", name, self.columns)
        return self.columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.columns)

    @property
    def statuses(self) -> dict[str, int]:
        """How many replicates ended in which way, from the column `status`; empty if `run` returns none."""
        if "status" not in self.columns:
            return {}
        codes = np.asarray(self.columns["status"], float)
        return count_statuses(codes[np.isfinite(codes)].astype(int))

    @property
    def failed(self) -> int:
        """Number of replicates whose status is not a good end. They are in the columns with the others."""
        return sum(n for name, n in self.statuses.items() if not Status[name].good)

    def save(self, path: str | Path) -> Path:
        """Write one `.npz` file with a JSON header, atomically; `theorylab.load` reads it back.

        Raises:
            StorageError: the file cannot be written; an older file of that name is left whole.
        """
        return store.save(path, self)

    def _facts(self) -> list[tuple[str, str]]:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(" + ", ".join(f"{name}={text}" for name, text in self._facts()) + ")"

    def _repr_html_(self) -> str:
        facts = [(html.escape(a), html.escape(b)) for a, b in self._facts()]
        facts += [(html.escape(name), html.escape(_spread_of(column))) for name, column in self.columns.items()]
        left = "style='text-align:left'"
        return "<table>" + "".join(f"<tr><th {left}>{a}</th><td {left}>{b}</td></tr>" for a, b in facts) + "</table>"


def _spread_of(column: np.ndarray) -> str:
    """Shape and range of a column, for people."""
    good = column[np.isfinite(column)] if column.dtype.kind in "fiu" else np.empty(0)
    text = f"{column.dtype}{list(column.shape)}"
    return f"{text}, {good.min():.4g} to {good.max():.4g}, mean {good.mean():.4g}" if good.size else text


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Replicates(Columns):
    """The replicates of one sweep.

    Attributes:
        columns: one array per entry that `run` returned, with the replicates along the leading axis.
        index: number of the replicate in each line, increasing.
        total: replicates that were asked for.
        provenance: versions, devices and settings.
    """

    columns: dict[str, np.ndarray]
    index: np.ndarray
    total: int
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def n(self) -> int:
        """Number of replicates that are here; `total` unless others are missing."""
        return len(self.index)

    @property
    def missing(self) -> np.ndarray:
        """Numbers of the replicates that are not here: other ranks have them, or the sweep was interrupted."""
        return np.setdiff1d(np.arange(self.total), self.index)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with one line per replicate; vectors are spread over `name_0`, `name_1`, ...."""
        import pandas as pd

        frame = {"replicate": self.index}
        for name, column in self.columns.items():
            frame.update(store.spread(name, column))
        return pd.DataFrame(frame)

    def _facts(self) -> list[tuple[str, str]]:
        gone = self.missing
        count = f"{self.n}" if not gone.size else f"{self.n} of {self.total}"
        facts = [("n", count), ("columns", ", ".join(self.columns) or "none")]
        if gone.size:
            facts.append(("missing", _ranges(gone)))
        if self.statuses:
            facts.append(("statuses", ", ".join(f"{n} {name}" for name, n in self.statuses.items())))
        return facts


def _ranges(numbers: np.ndarray) -> str:
    """`[0, 1, 2, 7]` as `0-2, 7`."""
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    texts = [f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts]
    return ", ".join(texts[:6]) + (f", ... ({len(numbers)} in all)" if len(texts) > 6 else "")


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Table(Columns):
    """Sweeps over a grid. `table.n` holds the values of the axis `n`; `table["loss"]` has the axes of the grid, then the replicates.

    Attributes:
        axes: values of each axis, in the order of the leading axes of the columns.
        columns: one array per entry that `run` returned. Entries of missing replicates are NaN (whole numbers become floats then).
        done: whether a replicate is there, axes (grid..., replicates).
        provenance: versions, devices and settings.
    """

    axes: dict[str, Any]
    columns: dict[str, np.ndarray]
    done: np.ndarray
    provenance: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        axes = self.__dict__.get("axes", {})
        if name in axes:
            return axes[name]
        raise AttributeError(f"a sweep table has no attribute {name!r}; its axes are {', '.join(axes) or 'not set'}")

    @property
    def missing(self) -> np.ndarray:
        """Places in the columns, one line each, of replicates that are not there."""
        return np.argwhere(~self.done)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with one line per grid point and replicate that is there."""
        import pandas as pd

        where = np.nonzero(self.done)
        frame: dict[str, Any] = {name: [values[i] for i in places] for (name, values), places in zip(self.axes.items(), where, strict=False)}
        frame["replicate"] = where[-1]
        for name, column in self.columns.items():
            frame.update(store.spread(name, column[where]))
        return pd.DataFrame(frame)

    def _facts(self) -> list[tuple[str, str]]:
        facts = [(name, f"{len(values)} values") for name, values in self.axes.items()]
        facts += [("replicates", f"{self.done.shape[-1]}"), ("columns", ", ".join(self.columns))]
        if not self.done.all():
            facts.append(("missing", f"{int((~self.done).sum())} of {self.done.size}"))
        if self.statuses:
            facts.append(("statuses", ", ".join(f"{n} {name}" for name, n in self.statuses.items())))
        return facts


def gather(replicates: Replicates) -> Replicates:
    """All replicates in every process, from the parts that the processes of `jax.distributed` hold. All of them must call it.

    Raises:
        ArgumentError: `jax.distributed` was not initialised; ranks without it meet in the folder `out`.
    """
    if not jax.distributed.is_initialized():
        raise ArgumentError("gather needs jax.distributed.initialize(); without it, give sweep a folder `out` that all ranks share")
    from jax.experimental.multihost_utils import process_allgather

    own = [replicates.index, *(np.ascontiguousarray(replicates.columns[name]) for name in sorted(replicates.columns))]
    counts = np.asarray(process_allgather(np.int32(replicates.n))).reshape(-1)
    width = sum(array.itemsize * int(np.prod(array.shape[1:])) for array in own)
    # one collective on bytes: whatever the dtypes, there is one thing to compile
    sent = np.zeros(int(counts.max()) * width, np.uint8)
    mine = np.frombuffer(b"".join(array.tobytes() for array in own), np.uint8)
    sent[: mine.size] = mine
    received = np.asarray(process_allgather(sent)).reshape(len(counts), -1)

    def whole(place: int) -> np.ndarray:
        array, parts = own[place], []
        for count, data in zip(counts, received, strict=True):
            start = int(count) * sum(a.itemsize * int(np.prod(a.shape[1:])) for a in own[:place])
            size = int(count) * array.itemsize * int(np.prod(array.shape[1:]))
            parts.append(np.frombuffer(data[start:start + size].tobytes(), array.dtype).reshape(int(count), *array.shape[1:]))
        return np.concatenate(parts)

    index, first = np.unique(whole(0), return_index=True)
    columns = {name: whole(place)[first] for place, name in enumerate(sorted(replicates.columns), 1)}
    return Replicates(columns, index, replicates.total, replicates.provenance)
