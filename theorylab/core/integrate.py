"""`integrate`: an ordinary differential equation observed at given times."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab import runtime
from theorylab.core import checks, stepping, tree
from theorylab.core.kernel import bind
from theorylab.core.problem import Flow, Problem
from theorylab.core.progress import Progress, resolve
from theorylab.core.recorder import masked
from theorylab.core.segments import Plan, Watched, watch
from theorylab.core.solution import History, Solution, Stats, Status, count_statuses
from theorylab.errors import ArgumentError, NonFiniteError, NotConvergedError, PrecisionError, RunWarning, ShapeError

PyTree = Any
TIGHT = 1e-6
_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
_compiled: set[Any] = set()


def integrate(
    flow: Flow,
    y0: Any,
    times: Any,
    *,
    rtol: float = 1e-8,
    atol: float = 1e-10,
    solver: Any = None,
    step: float | None = None,
    stiff: bool = False,
    collapse: float = 1e-9,
    max_steps: int = 4096,
    record: Callable[[Any, Any], dict] | None = None,
    runs: int | None = None,
    segment: int | None = None,
    progress: bool | Progress = False,
    checkpoint: str | Path | None = None,
    throw: bool = True,
) -> Solution:
    r"""Solve $y' = f(t, y)$ from `y0` at `times[0]` and keep the states at `times`.

    Steps and error control are those of diffrax. A solution that blows up in finite time is a result: the run ends with `BLOWUP` when
    the growth time, size / (d size / dt), falls below `collapse` times the time elapsed, or when an event of the flow says so.

    The value has the structure of the state with axes (row, [run], ...). A single run that ends early keeps the rows that it reached and
    one more, the state at its end with its own time (`history.axis("time")`). In a batch the axis of times is the one that was asked for;
    after its end a lane repeats its last state, and `history.valid` tells those rows apart.

    Inside `jit`, `vmap`, `grad` or a sweep the run is one in-graph loop, statuses are returned and nothing raises. Derivatives exist in
    forward and reverse mode, with respect to the arrays of the flow, the initial state and the times; step sizes count as constants.

    Args:
        flow: the equation.
        y0: initial state, a tree of arrays of one floating dtype. With `runs`, its leaves have a leading axis of that length.
        times: increasing; `times[0]` is where `y0` is given.
        rtol: relative tolerance of a step. New numbers never recompile; crossing 1e-6 chooses another solver.
        atol: absolute tolerance of a step.
        solver: a diffrax solver; None takes Tsit5 for `rtol` of 1e-6 and above, Dopri8 below, Kvaerno5 if `stiff`.
        step: a fixed step size instead of error control.
        stiff: whether to use an implicit solver. It steps on the save times, because its interpolation is of third order only.
        collapse: fraction of the time elapsed below which a growth time means blow-up; 0 waits until no step is short enough.
        max_steps: most steps of a run, rejected ones included.
        record: more columns, a function of (t, y). Defined at module level, it compiles once.
        runs: number of trajectories in one batch, or None for a single one.
        segment: save times per compiled call. The result does not depend on it.
        progress: True for a bar, or an object that follows `Progress`.
        checkpoint: file written while running and read at the start; a resumed run equals an uninterrupted one.
        throw: raise if a single run ends with NONFINITE or MAX_STEPS. A batch never raises; it warns.

    Returns:
        A `Solution`; `.steps` are accepted steps, `.stats.counters` holds `accepted`, `rejected`, `last_time` and `event` (the name of the
        event that ended a run, or None), per run in a batch. Ctrl-C ends a run in segments with `STOPPED` and what was done until then.

    Raises:
        ArgumentError, ShapeError, PrecisionError, NonFiniteInputError: an argument is wrong; the message names it.
        ToleranceError: `rtol` is under the round-off of the data.
        CheckpointMismatchError: the checkpoint is damaged or foreign; it is left as it is.
        NonFiniteError, NotConvergedError: with `throw`; `.solution` has the partial result.

    Example:
        >>> class Square(tl.Flow):
        ...     def field(self, t, y): return y * y
        >>> sol = tl.integrate(Square(), jnp.array([1.0]), jnp.array([0.0, 0.5, 2.0]))
        >>> sol.status.name, round(float(sol.value[1, 0]), 6), round(float(sol.stats.counters["last_time"]), 6)
        ('BLOWUP', 2.0, 1.0)
    """
    y0 = _as_state(flow, y0, runs)
    dtype = jax.tree.leaves(y0)[0].dtype
    max_steps = checks.whole("max_steps", max_steps, low=1)
    traced = tree.is_traced(flow, y0, times, rtol, atol, step, collapse)
    grid = _as_times(times, dtype)
    plain = all(type(v) is float or v is None for v in (rtol, atol, collapse, step))  # usual, and then checked and packed once
    numbers = (_plain_numbers if plain else _numbers)(rtol, atol, collapse, step, dtype)
    fixed = step is not None
    if fixed:
        _check_count(step, grid, max_steps)
    solver = _as_solver(solver, rtol, stiff, fixed)
    whole = (flow, record, solver)
    if traced:
        if segment is not None or checkpoint is not None or progress is not False:
            name = next(n for n, v in (("segment", segment), ("checkpoint", checkpoint), ("progress", progress)) if v is not None and v is not False)
            raise ArgumentError(f"{name} needs the host: it cannot be used inside jit, vmap, grad or a sweep")
        return _in_graph(whole, y0, grid, numbers, max_steps, runs, fixed)
    plan = Plan(whole, y0, grid, numbers, max_steps, runs is not None, fixed)
    if segment is None and checkpoint is None and progress is False:
        found = _at_once(plan)
    else:
        found = watch(plan, segment, resolve(progress), checkpoint)
    settings = {"flow": type(flow).__name__, "solver": type(solver).__name__, "rtol": float(rtol), "atol": float(atol),
                "step": None if step is None else float(step), "collapse": float(collapse), "max_steps": max_steps, "runs": runs, "segment": segment}
    return _finish(plan, found, settings, throw)


def _as_state(flow: Any, y0: Any, runs: int | None) -> PyTree:
    """The initial state as the flow integrates it: JAX arrays of one floating dtype, with the axis of runs."""
    if not isinstance(flow, Flow):
        hint = "; a Problem goes to iterate" if isinstance(flow, Problem) else "; make a function the method field(t, y) of a class"
        raise ArgumentError(f"flow must be a Flow, got {type(flow).__name__}{hint}")
    if isinstance(y0, (list, float, int)):
        y0 = np.asarray(y0, float)
    if type(flow).lift is not Flow.lift:
        y0 = flow.lift(y0)
    if runs is None and _is_plain(jax.tree.leaves(y0)):
        return y0
    leaves = jax.tree_util.tree_leaves_with_path(y0)
    if not leaves:
        raise ArgumentError("y0 must hold at least one array, got none")
    if runs is not None:
        checks.whole("runs", runs, low=1)
    dtypes = {}
    for path, leaf in leaves:
        name = f"y0{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, float)):
            raise ArgumentError(f"{name} must be an array, got {type(leaf).__name__}")
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
            raise PrecisionError(f"{name} must be of dtype float32 or float64, got {dtype}; convert it"
                                 + (", or integrate real and imaginary parts" if jnp.issubdtype(dtype, jnp.complexfloating) else ""))
        dtypes[dtype] = name
        if runs is not None and (np.ndim(leaf) == 0 or np.shape(leaf)[0] != runs):
            raise ShapeError(f"{name} must have a leading axis of {runs} (runs={runs}), got shape {np.shape(leaf)}")
    if len(dtypes) > 1:
        raise PrecisionError("y0 must be of one dtype, got " + " and ".join(f"{dtype} at {name}" for dtype, name in dtypes.items()) + "; convert one")
    return jax.tree.map(lambda a: a if isinstance(a, jax.Array) and not a.weak_type else jnp.asarray(a, jnp.result_type(a)), y0)


def _is_plain(leaves: list[Any]) -> bool:
    """Whether nothing needs to be checked or converted: the fast path of repeated calls."""
    return bool(leaves) and all(isinstance(a, jax.Array) and a.dtype in _DTYPES and a.dtype == leaves[0].dtype and not a.weak_type for a in leaves)


def _as_times(times: Any, dtype: Any) -> Any:
    """The save times in the precision of the state."""
    if not checks.known(times):
        grid = jnp.asarray(times, dtype)
        if grid.ndim != 1 or grid.size < 1:
            raise ShapeError(f"times must be one axis of at least one time, got shape {grid.shape}")
        return grid
    try:
        grid = np.asarray(times, float)
    except (TypeError, ValueError):
        raise ArgumentError(f"times must be real numbers, got {times!r}") from None
    if grid.ndim != 1 or grid.size < 1:
        raise ShapeError(f"times must be one axis of at least one time, got shape {grid.shape}")
    bad = ~np.isfinite(grid)
    if bad.any():
        at = int(bad.argmax())
        raise ArgumentError(f"times must be finite, got {grid[at]} at index {at}; integrate to a large time and let an event or BLOWUP end the run")
    grid = grid.astype(dtype)
    still = grid[1:] <= grid[:-1]
    if still.any():
        at = int(still.argmax())
        if (grid[1:] < grid[:-1]).all():
            raise ArgumentError("times must increase, got decreasing times: time does not run backward here, because events and blow-up refer to its "
                                "direction; integrate the flow of -field(-t, y) over the negated times")
        raise ArgumentError(f"times must increase strictly, got {grid[at]:.17g} at index {at} and {grid[at + 1]:.17g} after it "
                            f"(in {np.dtype(dtype).name})")
    return grid


def _numbers(rtol: Any, atol: Any, collapse: Any, step: Any, dtype: Any) -> Any:
    """The traced numbers as one array, after checks."""
    if step is None:
        checks.tolerance("rtol", rtol, dtype)
    else:
        checks.real("rtol", rtol, above=0.0)
        checks.real("step", step, above=0.0)
    checks.real("atol", atol, low=0.0)
    checks.real("collapse", collapse, low=0.0, below=1.0)
    values = (rtol, atol, collapse, 0.0 if step is None else step)
    return np.array([float(v) for v in values], dtype) if checks.known(values) else jnp.stack([jnp.asarray(v, dtype) for v in values])


_plain_numbers = functools.lru_cache(maxsize=256)(_numbers)


def _check_count(step: Any, grid: Any, max_steps: int) -> None:
    """A fixed step must get to the end."""
    needed = (grid[-1] - grid[0]) / float(step) if checks.known(step, grid) else 0
    if needed > max_steps + 0.5:
        raise ArgumentError(f"step={float(step):g} needs {needed:.0f} steps, more than max_steps={max_steps}: raise one of them")


def _as_solver(solver: Any, rtol: Any, stiff: bool, fixed: bool) -> Any:
    import diffrax

    if solver is None:
        if stiff:
            return diffrax.Kvaerno5()
        return diffrax.Tsit5() if checks.known(rtol) and float(rtol) >= TIGHT else diffrax.Dopri8()
    if stiff:
        raise ArgumentError("stiff chooses a solver, and solver names one: pass one of them")
    if not isinstance(solver, diffrax.AbstractSolver):
        raise ArgumentError(f"solver must be a diffrax solver such as diffrax.Tsit5(), got {solver!r}")
    if not fixed and not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise ArgumentError(f"solver {type(solver).__name__} estimates no error and cannot adapt its step size: pass step=, a fixed one")
    return solver


def _in_graph(whole: Any, y0: PyTree, grid: Any, numbers: Any, max_steps: int, runs: int | None, fixed: bool) -> Solution:
    """The whole run as one compiled loop, with its history as an output."""
    from theorylab.core.replay import differentiable

    flow, record, solver = whole
    grid, numbers = jnp.asarray(grid), jnp.asarray(numbers)
    with jax.default_matmul_precision("highest"):

        def lane(y0: PyTree) -> tuple[PyTree, stepping.Ended]:
            return differentiable(flow, solver, y0, grid, numbers, max_steps, fixed)

        value, ended = jax.vmap(lane, out_axes=(1, 0))(y0) if runs is not None else lane(y0)
        columns = stepping.measure(flow, record, stepping.row_times(grid, 0, ended), value, runs is not None)
    rows = jnp.arange(grid.shape[0], dtype=jnp.int32)
    valid = rows.reshape(rows.shape + (1,) * ended.row.ndim) < ended.row

    def blank(column: jax.Array) -> jax.Array:
        mask = valid.reshape(valid.shape + (1,) * (column.ndim - valid.ndim))
        hole = jnp.nan if jnp.issubdtype(column.dtype, jnp.inexact) else 0
        return jnp.where(mask, column, jnp.asarray(hole, column.dtype))

    return Solution(value, ended.status, ended.accepted, History({k: blank(v) for k, v in columns.items()}, {"time": grid}, valid))


def _at_once(plan: Plan) -> Watched:
    """One compiled call."""
    arrays, static = bind(plan.whole)
    spent = np.int32(plan.max_steps)

    def call(limit: Any) -> tuple[PyTree, dict[str, np.ndarray], stepping.Ended]:
        value, columns, ended = stepping.solve(arrays, plan.y0, plan.times, plan.numbers, limit, static=static, runs=plan.runs, fixed=plan.fixed)
        return value, {name: np.asarray(column) for name, column in columns.items()}, stepping.unpack(*ended)

    began = time.perf_counter()
    key = (static, plan.runs, plan.fixed, plan.times.shape, tuple((a.shape, a.dtype) for a in (*arrays, *jax.tree.leaves(plan.y0))))
    if key not in _compiled:
        call(np.int32(0))  # compiles and takes no step, so that compile time stays out of the clock
        _compiled.add(key)
    compiled = time.perf_counter()
    value, columns, ended = call(spent)
    took = time.perf_counter() - compiled
    return Watched(value, columns, ended, plan.times, compiled - began, took, 1)


def _finish(plan: Plan, found: Watched, settings: dict, throw: bool) -> Solution:
    """From rows on the device to a `Solution`; raise or warn if a run ended badly."""
    flow, _, solver = plan.whole
    ended, axis, value, columns = found.ended, found.times, found.value, found.columns
    if np.any(ended.status == int(Status.NONFINITE)):
        tree.check_finite("y0", plan.y0)
    names = [event.name for event in flow.events()] if np.any(ended.event >= 0) else []
    if plan.runs:
        valid = np.arange(len(axis))[:, None] < ended.row
        event = [names[i] if i >= 0 else None for i in ended.event]
    else:
        kept, event = int(ended.row), names[int(ended.event)] if names else None
        if kept < len(axis):  # the row after the last save time that was reached holds the state at the end
            axis = np.append(axis[:kept], ended.t) if ended.t > axis[kept - 1] else axis[:kept]
            value, columns = jax.tree.map(lambda a: a[: len(axis)], (value, columns))
        valid = np.ones(len(axis), bool)
    counters = {"accepted": _plain(ended.accepted), "rejected": _plain(ended.rejected), "last_time": _plain(ended.t), "event": event}
    leaf = jax.tree.leaves(plan.y0)[0]
    stats = Stats(found.compile_seconds, found.run_seconds, 0.0, found.calls, leaf.dtype.name, next(iter(leaf.devices())).device_kind, counters)
    history = History({k: masked(v, valid) for k, v in columns.items()}, {"time": axis}, valid)
    status = ended.status if plan.runs else Status(int(ended.status))
    solution = Solution(value, status, counters["accepted"], history, stats, runtime.provenance(**settings), solver)
    _report(solution, plan, throw)
    return solution


def _plain(value: Any) -> Any:
    return value.item() if value.ndim == 0 else value


def _report(solution: Solution, plan: Plan, throw: bool) -> None:
    """Raise for a single run that ended badly; warn once for a batch."""
    counters = solution.stats.counters if solution.stats is not None else {}
    if plan.runs:
        bad = {name: n for name, n in count_statuses(solution.status).items() if not Status[name].good}
        if bad:
            warnings.warn(f"{sum(bad.values())} of {len(solution.status)} runs did not end as asked: "
                          + ", ".join(f"{n} {name}" for name, n in bad.items()) + "; see .status", RunWarning, stacklevel=4)
    elif throw and solution.status == Status.NONFINITE:
        cause = "try a smaller step" if plan.fixed else "no step is short enough there: the field is singular, or the solution overflows"
        raise NonFiniteError(f"NaN or infinity appeared after t = {counters['last_time']:.12g}; {cause}. The states until then are in "
                             ".solution.value", solution)
    elif throw and solution.status == Status.MAX_STEPS:
        raise NotConvergedError(f"max_steps={plan.max_steps} steps were spent at t = {counters['last_time']:.12g}, before "
                                f"{float(plan.times[-1]):.12g} ({counters['accepted']} accepted, {counters['rejected']} rejected): raise max_steps, "
                                "loosen rtol, or pass stiff=True if the equation has much faster modes than the solution. The states until then are "
                                "in .solution.value", solution)
