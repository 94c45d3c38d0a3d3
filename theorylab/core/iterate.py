"""`iterate`: a method applied to a problem again and again until a test passes. `solve`: the same with nothing to choose."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from theorylab import runtime
from theorylab.core import kernel, tree
from theorylab.core.driver import Clock, Run, drive
from theorylab.core.kernel import Carry, Recorded
from theorylab.core.keys import Key, as_key, run_keys
from theorylab.core.problem import Method, Problem
from theorylab.core.progress import Progress, resolve
from theorylab.core.recorder import traced_history
from theorylab.core.solution import History, Solution, Stats, Status, count_statuses
from theorylab.core.stop import Never, Stop
from theorylab.errors import ArgumentError, NonFiniteError, NotConvergedError, RunWarning, ShapeError

ROW_BUFFER_BYTES = 2**20
MAX_SLOTS = 8192


def iterate(
    problem: Problem,
    method: Method,
    x0: Any = None,
    *,
    steps: int,
    key: Key | int = 0,
    stop: Stop | None = None,
    every: int = 1,
    record: Callable[[Any, Any], dict] | None = None,
    keep: Literal["all", "last"] = "all",
    runs: int | None = None,
    data: Any = None,
    seconds: float | None = None,
    progress: bool | Progress = False,
    checkpoint: str | Path | None = None,
    loop: Literal["auto", "while", "scan"] = "auto",
    throw: bool = True,
) -> Solution:
    """Apply `method` to `problem` until `stop` is met or `steps` steps are done.

    The loop is compiled once per structure and shape; other hyper-parameters, tolerances, keys, step counts and recording periods
    reuse it. Inside `jit`, `vmap`, `grad` or a sweep the same run becomes one in-graph loop, statuses are returned and nothing raises.

    Args:
        problem: what is solved and measured.
        method: how to move.
        x0: starting point; `problem.start` if None. With `runs`, its leaves have a leading axis of that length.
        steps: most steps of each run.
        key: seed or JAX key. Step k of run r draws from a key that is a function of (key, r, k).
        stop: rule looked at after each recorded row, x0 included; None does all steps.
        every: steps between rows, stop tests and finite tests.
        record: more columns, a function of (problem, x); `theorylab.whole` records x. Defined at module level, it compiles once.
        keep: `"all"` rows, or only the `"last"`.
        runs: number of independent runs in one batch, or None for a single run.
        data: a `Stream` or an iterable of batches; step k sees `problem.feed(batch k)`.
        seconds: time budget for this call; when it is spent the run ends with `STOPPED`.
        progress: True for a bar, or an object that follows `Progress`.
        checkpoint: file written while running and read at the start; a resumed run equals an uninterrupted one bit for bit.
        loop: `"auto"` is chunked from the host, or `"while"` under a transformation; `"scan"` has reverse-mode derivatives.
        throw: raise if a single run ends NONFINITE, or misses its stop rule. A batch never raises; it warns.

    Returns:
        A `Solution`. Ctrl-C ends the run with status `STOPPED` and what was done until then.

    Raises:
        ArgumentError, ShapeError, NonFiniteInputError: an argument is wrong; the message names it.
        ToleranceError: a stop level is under the round-off of the data.
        CheckpointMismatchError: the checkpoint is damaged or foreign; it is left as it is.
        NonFiniteError, NotConvergedError: with `throw`; `.solution` has the partial result.

    Example:
        >>> class Parabola(tl.Problem):
        ...     def metrics(self, x):
        ...         return {"residual": jnp.linalg.norm(x)}
        >>> class Descent(tl.Method):
        ...     step_size: object = tl.number(0.5)
        ...     def init(self, problem, x0, *, key): return x0
        ...     def step(self, problem, x, *, key): return x - self.step_size * x
        ...     def value(self, problem, x): return x
        >>> tl.iterate(Parabola(), Descent(), jnp.ones(2), steps=100, stop=tl.Below("residual", 1e-6)).steps
        21
    """
    _check(problem, method, steps, every, keep, runs, seconds, loop, stop)
    x0 = _as_point(x0)
    traced = tree.is_traced(problem, method, x0, key, stop, steps, seconds)
    if not traced:
        tree.check_finite("x0", x0)
    _check_lanes(x0, runs)
    if not traced and x0 is not None:
        for lane in range(runs or 1):
            method.check(problem, x0 if runs is None else jax.tree.map(lambda a, i=lane: a[i], x0))
    if (traced or loop != "auto") and (data is not None or checkpoint is not None):
        name = "data" if data is not None else "checkpoint"
        raise ArgumentError(f"{name} needs the host loop: it cannot be used inside jit, vmap, grad or a sweep, nor with loop={loop!r}")
    rule = Never() if stop is None else stop
    keys = as_key(key) if runs is None else run_keys(key, runs)
    whole = (problem, method, rule, record)
    run = Run(whole, x0, keys, steps, every, runs, keep == "last")
    if traced or loop != "auto":
        solution = _in_graph(run, scan=loop == "scan")
        return solution if traced else _finish(_to_host(solution), stop, runs, every, throw)
    settings = {"problem": type(problem).__name__, "method": type(method).__name__, "steps": steps, "every": every, "runs": runs,
                "seed": int(key) if isinstance(key, (int, np.integer)) else None}
    return _finish(_on_host(run, data, seconds, resolve(progress), checkpoint, settings), stop, runs, every, throw)


def solve(problem: Problem, x0: Any = None, *, tolerance: float = 1e-6, steps: int = 100_000, **options: Any) -> Solution:
    """Solve `problem` with its default method until its own certificate (or residual) is below `tolerance`.

    Args:
        problem: a problem whose family names a default method.
        x0: starting point; `problem.start` if None.
        tolerance: level for the rule that `problem.goal` makes.
        steps: most steps.
        **options: further arguments of `iterate`.

    Returns:
        A `Solution`; `.method` tells what ran.

    Raises:
        NotConvergedError: the tolerance was not met; `.solution` has the partial result.
    """
    if "stop" in options:
        raise ArgumentError("solve takes no stop: it stops when the problem's own certificate is below tolerance; use iterate to choose a rule")
    if not tree.is_traced(tolerance) and not tolerance > 0:
        raise ArgumentError(f"tolerance must be above 0, got {tolerance:g}")
    if not isinstance(problem, Problem):
        raise ArgumentError(f"problem must be a Problem, got {type(problem).__name__}")
    return iterate(problem, problem.default_method(), x0, steps=steps, stop=problem.goal(tolerance), **options)


def whole(problem: Problem, x: Any) -> dict[str, Any]:
    """A record function: the iterate itself, as column `x` (one column per leaf if x is a tree)."""
    leaves = jax.tree_util.tree_leaves_with_path(x)
    return {f"x{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}


def _check(problem: Any, method: Any, steps: Any, every: Any, keep: str, runs: Any, seconds: Any, loop: str, stop: Any) -> None:
    if not isinstance(problem, Problem):
        raise ArgumentError(f"problem must be a Problem, got {type(problem).__name__}; an ODE (Flow) goes to integrate")
    if not isinstance(method, Method):
        raise ArgumentError(f"method must be a Method object, got {method!r}")
    if stop is not None and not isinstance(stop, Stop):
        raise ArgumentError(f"stop must be a stop rule such as Below('gap', 1e-6), got {stop!r}")
    for name, number, low in (("steps", steps, 0), ("every", every, 1), ("runs", runs, 1)):
        if (number is None and name == "runs") or isinstance(number, Tracer):
            continue
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < low:
            raise ArgumentError(f"{name} must be a whole number of at least {low}, got {number!r}")
    if not isinstance(steps, Tracer) and steps >= 2**31:
        raise ArgumentError(f"steps must be below 2**31, got {steps}")
    if seconds is not None and not seconds > 0:
        raise ArgumentError(f"seconds must be above 0, got {seconds!r}")
    for name, word, words in (("keep", keep, ("all", "last")), ("loop", loop, ("auto", "while", "scan"))):
        if word not in words:
            raise ArgumentError(f"{name} must be one of {', '.join(map(repr, words))}, got {word!r}")


def _as_point(x0: Any) -> Any:
    """Array-likes become arrays; a bare array of whole numbers becomes floating point."""
    if isinstance(x0, list):
        x0 = np.asarray(x0)
    if isinstance(x0, (float, int)):
        x0 = np.asarray(float(x0))
    if isinstance(x0, (np.ndarray, jax.Array)) and np.issubdtype(x0.dtype, np.integer):
        x0 = jnp.asarray(x0, float)
    return jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, (np.ndarray, np.generic, float)) else a, x0)


def _check_lanes(x0: Any, runs: int | None) -> None:
    if x0 is None or runs is None:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(x0):
        shape = np.shape(leaf)
        if not shape or shape[0] != runs:
            raise ShapeError(f"x0{jax.tree_util.keystr(path)} must have a leading axis of {runs} (runs={runs}), got shape {shape}")


class _Started(NamedTuple):
    arrays: list[Any]
    static: kernel.Static
    method: Any
    carry: Carry
    row: dict[str, Any]
    good: Any


def _begin(run: Run, batch: Any = None) -> _Started:
    """Compile and run `prepare`, `init` and the first row; then bind the prepared method for the loop."""
    problem, method, rule, record = run.whole
    arrays, static = kernel.bind(run.whole)
    parts, kept, carry, row, good = kernel.begin(arrays, run.keys, run.x0, batch, static=static, runs=run.runs, fresh=run.x0 is None)
    rule.check(row)
    method = kernel.unbind(parts, kept.value)
    arrays, static = kernel.bind((problem, method, rule, record))
    return _Started(arrays, static, method, carry, row, good)


def _in_graph(run: Run, scan: bool) -> Solution:
    """The whole run as one compiled loop, with its history as an output."""
    if not run.last and isinstance(run.steps, Tracer):
        raise ArgumentError("steps must be a Python integer inside compiled code, because it shapes the history; or pass keep='last'")
    if isinstance(run.every, Tracer):
        raise ArgumentError("every must be a Python integer inside compiled code")
    start = _begin(run)
    problem = run.whole[0]
    try:
        if scan:
            if isinstance(run.steps, Tracer):
                raise ArgumentError("steps must be a Python integer with loop='scan'")
            carry, rows, value = kernel.unrolled(start.arrays, start.carry, static=start.static, runs=run.runs, every=run.every, steps=run.steps)
            if run.last:
                rows = _last_row(rows)
        else:
            slots = 1 if run.last else max(1, -(-run.steps // run.every))
            limit = jnp.asarray(run.steps, jnp.int32)
            carry, rows, value = kernel.advance(start.arrays, start.carry, limit, limit, np.int32(run.every), None, np.int32(0), static=start.static,
                                         runs=run.runs, slots=slots, last=run.last)
    except TypeError as error:
        _explain(run, start, error)
        raise
    history = traced_history(start.row, start.good, rows, start.method.cost(problem), run.last)
    ending = Status.COMPLETED if isinstance(run.whole[2], Never) else Status.MAX_STEPS
    open_lane = (carry.status == Status.RUNNING) | (carry.status == Status.MAX_STEPS)
    status = jnp.where(open_lane, jnp.asarray(int(ending), jnp.int32), carry.status)
    return Solution(value, status, carry.ended, history)


def _last_row(rows: Recorded) -> Recorded:
    """The last valid row of each lane of a full history."""
    valid = rows.valid
    at = valid.shape[0] - 1 - jnp.argmax(valid[::-1], axis=0)

    def pick(column: jax.Array) -> jax.Array:
        index = at.reshape((1, *at.shape) + (1,) * (column.ndim - valid.ndim))
        return jnp.take_along_axis(column, index, axis=0)

    return Recorded(jax.tree.map(pick, rows.columns), rows.step[-1:], valid.any(axis=0)[None], jnp.minimum(rows.filled, 1))


def _on_host(run: Run, data: Any, seconds: float | None, progress: Progress, checkpoint: Any, settings: dict) -> Solution:
    """The host loop: chunks of compiled steps with progress, budget, checkpoint and interrupt between them."""
    began = time.perf_counter()
    reader = None
    if data is not None:
        from theorylab.core.stream import BlockReader, as_stream

        reader = BlockReader(as_stream(data), steps=run.steps)
    try:
        start = _begin(run, None if reader is None else reader.first())
        row_bytes = max(1, sum(np.asarray(v).nbytes for v in start.row.values()))
        slots = 1 if run.last else int(2 ** np.clip(np.floor(np.log2(ROW_BUFFER_BYTES / row_bytes)), 0, np.log2(MAX_SLOTS)))
        try:
            result = drive(run, start, slots, reader, Clock(seconds, began), progress, checkpoint)
        except TypeError as error:
            _explain(run, start, error)
            raise
    finally:
        if reader is not None:
            reader.close()
    problem = run.whole[0]
    value = result.value
    codes, ended = np.asarray(result.carry.status).copy(), np.asarray(result.carry.ended)
    done = result.step >= run.steps
    codes[codes == Status.RUNNING] = Status.MAX_STEPS if done else Status.STOPPED
    if isinstance(run.whole[2], Never):
        codes[codes == Status.MAX_STEPS] = Status.COMPLETED
    leaves = tree.inexact_leaves(value) or [jnp.zeros(())]
    device = next(iter(leaves[0].devices())).device_kind
    stats = Stats(result.compile_seconds, result.run_seconds, 0.0 if reader is None else reader.wait_seconds, result.chunks, leaves[0].dtype.name,
                  device)
    single = run.runs is None
    return Solution(value, Status(int(codes)) if single else codes, int(ended) if single else ended,
                    result.recorder.history(start.method.cost(problem)), stats, runtime.provenance(**settings), start.method)


def _explain(run: Run, start: _Started, error: TypeError) -> None:
    """If the step does not return a state like the one of `init`, say which leaf differs."""
    lane = (lambda t: jax.tree.map(lambda a: a[0], t)) if run.runs is not None else (lambda t: t)
    try:
        found = kernel.describe_mismatch(run.whole[0], start.method, lane(start.carry.state), lane(start.carry.key))
    except Exception:  # the step itself fails: its own error is the better one
        return
    if found:
        raise ShapeError(found) from error


def _to_host(solution: Solution) -> Solution:
    """An in-graph solution with NumPy history and plain statuses."""
    history = jax.tree.map(np.asarray, solution.history)
    valid = history.valid.reshape(len(history.valid), -1).any(axis=1)
    history = jax.tree.map(lambda a: a[valid], history)
    if np.ndim(solution.status) == 0:
        return Solution(solution.value, Status(int(solution.status)), int(solution.steps), History(history.columns, history.axes, history.valid))
    return Solution(solution.value, np.asarray(solution.status), np.asarray(solution.steps), history)


def _finish(solution: Solution, stop: Stop | None, runs: int | None, every: int, throw: bool) -> Solution:
    """Raise for a single run that ended badly; warn once for a batch."""
    if runs is None:
        if throw and solution.status == Status.NONFINITE:
            raise NonFiniteError(f"NaN or infinity appeared within {every} step{'s' * (every > 1)} after step {solution.steps}; the method most "
                                 "likely diverges: try a smaller step size. The last finite iterate is in .solution.value", solution)
        if throw and solution.status == Status.MAX_STEPS:
            raise NotConvergedError(f"the stop rule {_words(stop)} was not met within {solution.steps} steps{_reached(solution, stop)}; allow more "
                                    "steps or a looser rule, or pass throw=False. The partial result is in .solution", solution)
        return solution
    bad = {name: n for name, n in count_statuses(solution.status).items() if not Status[name].good}
    if bad:
        warnings.warn(f"{sum(bad.values())} of {runs} runs did not end as asked: " + ", ".join(f"{n} {name}" for name, n in bad.items())
                      + "; see .status", RunWarning, stacklevel=3)
    return solution


def _reached(solution: Solution, stop: Any) -> str:
    """Where the tested metrics stood at the end, for the error message."""
    names = [rule.name for rule in _rules(stop) if hasattr(rule, "name")]
    seen = [f"{name} = {np.max(np.asarray(solution.history.last(name))):.3g}" for name in dict.fromkeys(names)]
    return f" ({', '.join(seen)} at the end)" if seen else ""


def _words(stop: Any) -> str:
    """The rule as a user writes it, with its numbers."""
    if hasattr(stop, "first"):
        return f"{_words(stop.first)} {'&' if type(stop).__name__ == 'And' else '|'} {_words(stop.second)}"
    fields = [getattr(stop, f.name) for f in dataclasses.fields(stop)]
    return f"{type(stop).__name__}({', '.join(repr(v) if isinstance(v, str) else f'{float(v):g}' for v in fields)})"


def _rules(stop: Any) -> Iterable[Any]:
    if hasattr(stop, "first"):
        yield from _rules(stop.first)
        yield from _rules(stop.second)
    else:
        yield stop
