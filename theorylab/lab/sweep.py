"""`sweep`: the same run many times, over devices, processes and machines. `sweep_grid`: sweeps over a grid of parameters."""

from __future__ import annotations

import hashlib
import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from theorylab import runtime
from theorylab.core import tree
from theorylab.core.keys import Key, as_key, stream
from theorylab.core.progress import Progress, resolve
from theorylab.core.rows import whole_number
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, RunWarning
from theorylab.lab.blocks import Plan, Task, column_shapes, execute, open_plan, ranks, refresh, traced
from theorylab.lab.replicates import Columns, Replicates, Table, gather

__all__ = ["Replicates", "Table", "gather", "sweep", "sweep_grid"]

CHUNK = 64


def sweep(
    run: Callable[[Any, Key, Any], dict[str, Any]],
    params: Any,
    replicates: int,
    *,
    key: Key | int,
    chunk: int | None = None,
    shapes: Sequence[str] = (),
    out: str | Path | None = None,
    rank: int | None = None,
    world: int | None = None,
    client: Any = None,
    progress: bool | Progress = False,
) -> Replicates:
    """Compute `run(params, key_i, i)` for replicates i = 0, 1, ..., and stack what it returns.

    `run` is compiled once and mapped over a block of replicates on every local device; replicate i draws from a key that is a function
    of (`key`, i), so results do not depend on blocks, devices, ranks or interruptions, apart from round-off of batched kernels.

    With `out`, each finished block is a file in that folder: a killed sweep goes on where it stopped, more replicates can be added
    later, and several processes share the work, each taking every `world`-th block. The whole is read from the folder by whichever
    process calls last (or calls again).

    Args:
        run: a function of (params, key, i) that returns a dict of arrays; it is traced. An entry `status` is counted and reported.
        params: a pytree. Numbers and arrays are traced, so a new value does not recompile; bools, strings and functions are static.
        replicates: how many.
        key: seed or JAX key.
        chunk: replicates per block, and per file; at most 64 unless given.
        shapes: entries of `params` (a dict then) whose whole numbers shape arrays: static, a new value recompiles.
        out: folder for the blocks.
        rank: number of this process among those that share the work.
        world: how many share it. Both default to those of `jax.distributed` if it is initialised; else, if `out` is given, to the
            variables of the queue (SLURM, Open MPI, PMI); else this process does everything.
        client: a `distributed.Client`; its workers then compute the blocks, and this process writes them.
        progress: True for a bar, or an object that follows `Progress`.

    Returns:
        `Replicates`. If blocks of other ranks are not there yet, or after Ctrl-C, it holds what is there and `.missing` tells the rest.

    Raises:
        ArgumentError: an argument is wrong, or `run` does not return a dict of arrays.
        CheckpointMismatchError: a file in `out` is damaged or belongs to another sweep; found before anything is computed.
        StorageError: `out` cannot be written.

    Example:
        >>> def run(params, key, i):
        ...     return {"x": params["scale"] * jax.random.normal(key)}
        >>> table = tl.sweep(run, {"scale": 2.0}, 100, key=0)
        >>> table["x"].shape
        (100,)
    """
    seed = key
    key, replicates, chunk = _check(run, params, replicates, key, chunk, client)
    fixed = _fixed(params, _names(shapes))
    place, size, origin = ranks(rank, world, out is not None)
    task = Task(run, fixed, {}, {}, key[None])
    plan = open_plan(task, replicates, chunk, None if out is None else Path(out))
    whole = execute([plan], place, size, client, resolve(progress))
    columns, index = _merge(plan)
    provenance = runtime.provenance(run=plan.identity["run"], replicates=replicates, chunk=chunk, seed=_seed(seed))
    result = Replicates(columns, index, replicates, provenance)
    _report(result, len(index), replicates, whole, place, size, origin)
    return result


def sweep_grid(
    run: Callable[[Any, Key, Any], dict[str, Any]],
    grid: Mapping[str, Sequence],
    replicates: int,
    *,
    key: Key | int,
    params: Mapping[str, Any] | None = None,
    chunk: int | None = None,
    shapes: Sequence[str] = (),
    out: str | Path | None = None,
    rank: int | None = None,
    world: int | None = None,
    client: Any = None,
    progress: bool | Progress = False,
) -> Table:
    """Sweep over every combination of the values in `grid`; `run` gets a dict with one value of each axis.

    Points that differ in numbers only share one compilation and run side by side. Points that differ in what is static get their own:
    axes named in `shapes`, strings, bools, functions, Modules of different structure.

    The key of a point is a function of `key` and of the point's values, so points are independent of each other, and adding values to
    an axis does not change the results at the others.

    Args:
        run: as in `sweep`.
        grid: values of each axis; numbers, strings, Modules or anything else that `run` understands.
        replicates: how many at each point.
        key: seed or JAX key.
        params: entries common to all points (data, for instance).
        chunk: runs per block, over all points of one shape; at most 64 unless given.
        shapes: axes (or entries of `params`) whose whole numbers shape arrays, as in `shapes=("n",)`.
        out: folder; points of one shape share a folder inside it.
        rank: as in `sweep`.
        world: as in `sweep`.
        client: as in `sweep`.
        progress: as in `sweep`.

    Returns:
        A `Table`: `table.n` are the values of the axis `n`; `table["loss"]` has the axes of the grid in order, then the replicates.

    Raises:
        ArgumentError, CheckpointMismatchError, StorageError: as in `sweep`.

    Example:
        >>> def run(params, key, i):
        ...     return {"error": jnp.abs(jax.random.normal(key, (params["n"],)).mean())}
        >>> table = tl.sweep_grid(run, {"n": [100, 400]}, 50, key=0, shapes=("n",))
        >>> table.n.tolist(), table["error"].shape
        ([100, 400], (2, 50))
    """
    seed, common = key, dict(params or {})
    axes = _check_grid(grid, common)
    key, replicates, chunk = _check(run, (common, axes), replicates, key, chunk, client)
    named = _names(shapes)
    unknown = named - set(axes) - set(common)
    if unknown:
        raise ArgumentError(f"shapes names {min(unknown)!r}, which is neither an axis of grid nor an entry of params")
    place, size, origin = ranks(rank, world, out is not None)
    fixed = _fixed(common, named & set(common))
    plans, members = [], []
    for label, points in _groups(axes, named).items():
        task = _stack(run, fixed, [{name: axes[name][i] for name, i in zip(axes, point, strict=True)} for point in points], named, key)
        plans.append(open_plan(task, replicates * len(points), chunk, None if out is None else Path(out) / label))
        members.append(points)
    whole = execute(plans, place, size, client, resolve(progress))
    provenance = runtime.provenance(run=plans[0].identity["run"], replicates=replicates, chunk=chunk, seed=_seed(seed), axes=list(axes))
    table = _assemble(axes, plans, members, replicates, provenance)
    _report(table, int(table.done.sum()), table.done.size, whole, place, size, origin)
    return table


# ---------------------------------------------------------------------------------------------------------------- arguments


def _check(run: Any, params: Any, replicates: Any, key: Any, chunk: Any, client: Any) -> tuple[Key, int, int]:
    if not callable(run):
        raise ArgumentError(f"run must be a function of (params, key, i), got {type(run).__name__}")
    if tree.is_traced(params, key):
        raise ArgumentError("sweep runs on the host and cannot be called inside jit, vmap or grad; use jax.vmap there")
    count = whole_number("replicates", replicates, 1)
    if client is not None and not (hasattr(client, "submit") and hasattr(client, "scatter")):
        raise ArgumentError(f"client must be a distributed.Client, got {type(client).__name__}")
    return as_key(key), count, CHUNK if chunk is None else whole_number("chunk", chunk, 1)


def _names(shapes: Any) -> set[str]:
    if isinstance(shapes, str) or not all(isinstance(name, str) for name in shapes):
        raise ArgumentError(f"shapes must be a tuple of names such as ('n',), got {shapes!r}")
    return set(shapes)


def _fixed(params: Any, named: set[str]) -> Any:
    if not named:
        return traced(params)
    if not isinstance(params, Mapping) or named - set(params):
        known = ", ".join(map(repr, params)) if isinstance(params, Mapping) else f"a {type(params).__name__}"
        raise ArgumentError(f"shapes names entries of params that are not there: shapes={sorted(named)}, params has {known}")
    return {name: _static(name, value) if name in named else traced(value) for name, value in params.items()}


def _static(name: str, value: Any) -> Any:
    """Whole numbers as Python integers, so that they can shape arrays."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, (np.integer, jax.Array, np.ndarray)) and np.ndim(leaf) == 0 and jnp.issubdtype(leaf.dtype, jnp.integer):
            return int(leaf)
        if isinstance(leaf, (jax.Array, np.ndarray)):
            raise ArgumentError(f"shapes names {name!r}, which holds an array; only whole numbers shape arrays")
        return leaf

    return jax.tree.map(convert, value)


def _check_grid(grid: Any, common: Mapping[str, Any]) -> dict[str, list]:
    if not isinstance(grid, Mapping) or not grid:
        raise ArgumentError(f"grid must be a dict from names to values, got {grid!r}")
    axes = {}
    for name, values in grid.items():
        if not isinstance(name, str) or hasattr(Table, name) or name in {"axes", "columns", "done", "provenance"}:
            raise ArgumentError(f"grid: {name!r} cannot name an axis; choose another string")
        if name in common:
            raise ArgumentError(f"grid and params both have an entry {name!r}")
        if isinstance(values, str) or not hasattr(values, "__len__") or len(values) == 0:
            raise ArgumentError(f"grid[{name!r}] must be a sequence of at least one value, got {values!r}")
        axes[name] = values.tolist() if isinstance(values, (np.ndarray, jax.Array)) and np.ndim(values) == 1 else list(values)
        texts = [_text(value) for value in axes[name]]
        if len(set(texts)) < len(texts):
            raise ArgumentError(f"grid[{name!r}] holds {next(t for t in texts if texts.count(t) > 1)} twice")
    return axes


def _seed(key: Any) -> int | None:
    return int(key) if isinstance(key, (int, np.integer)) else None


# ---------------------------------------------------------------------------------------------------------------- points of a grid


def _text(value: Any) -> str:
    """A short name of a value: the same in every process, different for different values."""
    if isinstance(value, (bool, int, float, str, np.generic)):
        return str(value.item() if isinstance(value, np.generic) else value)
    from theorylab.core.checkpoint import fingerprint

    return f"{getattr(value, '__name__', type(value).__name__)}-{fingerprint(value)[:8]}"


def _split(name: str, value: Any, named: set[str]) -> tuple[Any, Any]:
    """The traced part and the static part of one entry."""
    return eqx.partition(_static(name, value) if name in named else traced(value), eqx.is_array)


def _groups(axes: Mapping[str, list], named: set[str]) -> dict[str, list[tuple[int, ...]]]:
    """Grid points by what must be compiled apart: folder name -> places in the grid."""

    def kind(name: str, value: Any) -> str:
        arrays, static = _split(name, value, named)
        shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(arrays)]
        return "" if isinstance(value, (int, float, complex)) and shapes else f"{_text(static)} {shapes} {jax.tree.structure(arrays)}"

    kinds = {name: [kind(name, value) for value in values] for name, values in axes.items()}
    groups: dict[str, list[tuple[int, ...]]] = {}
    for point in itertools.product(*(range(len(values)) for values in axes.values())):
        label = []
        for (name, values), i in zip(axes.items(), point, strict=True):
            mine = kinds[name][i]
            first = values[kinds[name].index(mine)]
            if mine and len(set(kinds[name])) > 1:
                label.append(f"{name}={_text(first)}" if kinds[name].count(mine) == 1 else f"{name}={hashlib.sha256(mine.encode()).hexdigest()[:8]}")
        groups.setdefault(re.sub(r"[^\w.=,+-]", "_", ",".join(label)) or "points", []).append(point)
    return groups


def _stack(run: Callable, fixed: Any, points: list[dict[str, Any]], named: set[str], key: Key) -> Task:
    """Points of one kind as one task; stacking weakly typed numbers keeps them weakly typed."""
    parts = [{name: _split(name, value, named) for name, value in point.items()} for point in points]
    varied, stacked = {}, {}
    for name in points[0]:
        arrays = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(part[name][0] for part in parts))
        varied[name] = eqx.combine(arrays, parts[0][name][1])
        stacked[name] = jax.tree.map(eqx.is_array, varied[name])
    keys = jnp.stack([stream(key, ",".join(f"{name}={_text(value)}" for name, value in point.items())) for point in points])
    return Task(run, fixed, varied, stacked, keys)


# ---------------------------------------------------------------------------------------------------------------- results


def _merge(plan: Plan) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns and lane numbers of all blocks that are there, those of other ranks included."""
    if plan.folder is not None:
        refresh(plan)
    there = sorted(plan.finished)
    if not there:
        return column_shapes(plan.task), np.zeros(0, int)
    columns = {name: np.concatenate([plan.finished[b][name] for b in there]) for name in plan.finished[there[0]]}
    return columns, np.concatenate([b * plan.chunk + np.arange(plan.count(b)) for b in there])


def _assemble(axes: dict[str, list], plans: list[Plan], members: list[list[tuple[int, ...]]], replicates: int, provenance: dict) -> Table:
    done = np.zeros((*map(len, axes.values()), replicates), bool)
    parts = []
    for plan, points in zip(plans, members, strict=True):
        columns, lanes = _merge(plan)
        where = (*np.array(points)[lanes % len(points)].T, lanes // len(points))
        done[where] = True
        parts.append((columns, where))
    table = {name: _spread_out(name, [(columns[name], where) for columns, where in parts], done) for name in parts[0][0]}
    return Table({name: _shown(values) for name, values in axes.items()}, table, done, provenance)


def _spread_out(name: str, parts: list[tuple[np.ndarray, tuple]], done: np.ndarray) -> np.ndarray:
    """One column over the whole grid; NaN where a replicate is missing, and then no whole numbers."""
    shapes = {values.shape[1:] for values, _ in parts}
    if len(shapes) > 1:
        raise ArgumentError(f"run must return {name!r} in one shape at all points of the grid, got {' and '.join(map(str, sorted(shapes)))}")
    dtype = np.result_type(*(values.dtype for values, _ in parts))
    if not done.all() and dtype.kind in "biu":
        dtype = np.result_type(dtype, np.float32)
    column = np.full((*done.shape, *shapes.pop()), 0 if done.all() else np.nan, dtype)
    for values, where in parts:
        column[where] = values
    return column


def _shown(values: list) -> Any:
    """Values of an axis for the reader: an array of numbers, else the list."""
    return np.asarray(values) if all(isinstance(v, (int, float, np.generic)) for v in values) else values


def _report(result: Columns, here: int, total: int, whole: bool, rank: int, world: int, origin: str) -> None:
    """One warning for what a reader of the columns must know."""
    if not whole:
        warnings.warn(f"the sweep was interrupted: {here} of {total} replicates are there; .missing tells which are not", RunWarning, stacklevel=3)
    elif here < total and origin not in ("given", "jax.distributed"):
        warnings.warn(f"{here} of {total} replicates are there: this is rank {rank} of {world} ({origin}), and others have not finished; call sweep "
                      "again when they have, or pass rank=0, world=1 to do everything here", RunWarning, stacklevel=3)
    if result.failed:
        bad = ", ".join(f"{n} {name}" for name, n in result.statuses.items() if not Status[name].good)
        warnings.warn(f"{result.failed} of {here} replicates did not end as asked: {bad}; they are in the columns, see column 'status'", RunWarning,
                      stacklevel=3)
