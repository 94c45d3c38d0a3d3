"""The compiled loop of `integrate`: steps and step-size control of diffrax, with save times, events and blow-up per lane.

The loop is written for one trajectory and batched by `vmap`. Its state can be handed out after any save time and taken up again, so
segments and resumed runs repeat an uninterrupted run bit for bit. All numbers are traced; the solver, the equation's structure and
the number of save times are static.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core import tree
from theorylab.core.blowup import any_lane, is_blow_up
from theorylab.core.kernel import Static, unbind
from theorylab.core.problem import Event
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, ShapeError

Array = jax.Array
PyTree = Any

# Measured on flows that blow up, decay and oscillate: fewer rejected steps than an integral controller at the same error.
P_COEFFICIENT, I_COEFFICIENT = 0.1, 0.5
STUCK_UNITS = 16
SNAP_UNITS = 100
ROWS_AT_ONCE = 2**16


class Numbers(NamedTuple):
    """The traced numbers of a run, in one array so that a call transfers one."""

    rtol: Array
    atol: Array
    collapse: Array
    step: Array


class Carry(NamedTuple):
    """All that a trajectory needs to go on. `t_next` is where the controller wants to go, `row` the next save time."""

    t: Array
    t_next: Array
    y: PyTree
    solver_state: PyTree
    controller_state: PyTree
    status: Array
    accepted: Array
    rejected: Array
    row: Array
    event: Array
    first_size: Array


class Ended(NamedTuple):
    """How a trajectory ended: arrays of JAX, or of NumPy on the host."""

    t: Any
    status: Any
    accepted: Any
    rejected: Any
    row: Any
    event: Any


class Stepper:
    """Solver and controller of diffrax, bound to one equation.

    Args:
        flow: the equation.
        solver: a diffrax solver.
        numbers: tolerances and step size.
        fixed: whether the step size is fixed.
        reverse: whether reverse-mode derivatives are to be taken of a step.
    """

    def __init__(self, flow: Any, solver: Any, numbers: Numbers, fixed: bool, reverse: bool = False):
        import diffrax

        self.flow, self.numbers, self.fixed = flow, numbers, fixed
        self.term = diffrax.ODETerm(_field)
        self.implicit = isinstance(solver, diffrax.AbstractImplicitSolver)
        self.solver = _prepared(solver, numbers, "bounded" if reverse else "lax")
        self.order = self.solver.error_order(self.term)
        self.control = diffrax.PIDController(rtol=numbers.rtol, atol=numbers.atol, pcoeff=P_COEFFICIENT, icoeff=I_COEFFICIENT)

    def start(self, t: Array, end: Array, y: PyTree) -> tuple[Array, PyTree, PyTree]:
        """Where the first step goes, the state of the solver and that of the controller."""
        if self.fixed:
            t_next, state = t + self.numbers.step, ()
        else:
            t_next, state = self.control.init(self.term, t, end, y, None, self.flow, self.solver.func, self.order)
            # a field that is not finite at the start gives no first step; the loop then shrinks this one and reports it
            t_next = jnp.where(t_next > t, t_next, t + 1e-6 * (end - t))
        return t_next, self.solver_state(t, t_next, y), jax.tree.map(jnp.asarray, state)

    def solver_state(self, t: Array, t_next: Array, y: PyTree) -> PyTree:
        """The solver's memory before the first step."""
        return jax.tree.map(jnp.asarray, self.solver.init(self.term, t, t_next, y, self.flow))

    def step(self, t: Array, t_next: Array, y: PyTree, solver_state: PyTree) -> tuple[PyTree, PyTree, dict, PyTree]:
        """One step: state, error estimate, what interpolation needs, memory of the solver."""
        y, error, info, state, _ = self.solver.step(self.term, t, t_next, y, self.flow, solver_state, False)
        return y, error, info, jax.tree.map(jnp.asarray, state)

    def between(self, t: Array, t_next: Array, info: dict) -> Any:
        """The interpolation over a step."""
        return self.solver.interpolation_cls(t0=t, t1=t_next, **info)

    def judge(self, t: Array, t_next: Array, old: PyTree, new: PyTree, error: PyTree, good: Array, state: PyTree) -> tuple[Array, Array, PyTree]:
        """Whether the step is accepted, where to go next, memory of the controller. A step that is not finite counts as infinitely wrong."""
        error = jax.tree.map(lambda e: jnp.where(good, e, jnp.inf), error)
        new = tree.select(good, new, old)
        keep, _, after, _, state, _ = self.control.adapt_step_size(t, t_next, old, new, self.flow, error, self.order, state)
        return good & keep, jnp.asarray(after), jax.tree.map(jnp.asarray, state)


def _field(t: Any, y: PyTree, flow: Any) -> PyTree:
    return flow.field(t, y)


def _prepared(solver: Any, numbers: Numbers, scan_kind: str) -> Any:
    """The solver with a stage loop that can be differentiated as needed, and with the tolerances of the run in its root finder."""
    if getattr(solver, "scan_kind", scan_kind) is None:
        solver = eqx.tree_at(lambda s: s.scan_kind, solver, scan_kind, is_leaf=lambda a: a is None)
    finder = getattr(solver, "root_finder", None)
    # diffrax marks a tolerance to be taken from the run by an object that is neither number nor norm
    given = {"rtol": numbers.rtol, "atol": numbers.atol, "norm": _rms_norm()}
    unset = [name for name in given if hasattr(finder, name) and not _is_set(getattr(finder, name))]
    if unset:
        solver = eqx.tree_at(lambda s: [getattr(s.root_finder, name) for name in unset], solver, [given[name] for name in unset])
    return solver


def _is_set(value: Any) -> bool:
    return callable(value) or isinstance(value, (int, float, np.ndarray, jax.Array))


def _rms_norm() -> Callable:
    import optimistix

    return optimistix.rms_norm


def _finite(values: PyTree) -> Array:
    return jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves(values)]).all()


def _code(status: Status) -> Array:
    return jnp.asarray(int(status), jnp.int32)


def _hit(events: tuple[Event, ...], t: Array, y: PyTree) -> tuple[Array, Array]:
    """Index of the first event whose test holds, -1 if none does, and its status."""
    index, status = jnp.asarray(-1, jnp.int32), _code(Status.RUNNING)
    for i, event in reversed(list(enumerate(events))):
        held = jnp.asarray(event.test(t, y))
        if held.shape != () or held.dtype != bool:
            raise ShapeError(f"event {event.name!r}: its test must return one truth value, got {held.dtype}{list(held.shape)}")
        index, status = jnp.where(held, jnp.asarray(i, jnp.int32), index), jnp.where(held, _code(event.status), status)
    return index, status


def _check_field(flow: Any, t: Array, y: PyTree) -> None:
    """The time derivative has the structure, shapes and dtypes of the state."""
    change = eqx.filter_eval_shape(flow.field, t, y)
    if jax.tree.structure(change) != jax.tree.structure(y):
        raise ShapeError(f"{type(flow).__name__}.field must return the structure of the state, {jax.tree.structure(y)}, "
                         f"got {jax.tree.structure(change)}")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(y), jax.tree.leaves(change), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ShapeError(f"{type(flow).__name__}.field must return at y{jax.tree_util.keystr(path)} an array like the state, "
                             f"{a.dtype}{list(a.shape)}, got {b.dtype}{list(b.shape)}")


def begin(flow: Any, stepper: Stepper, y0: PyTree, times: Array) -> Carry:
    """The carry at the initial time. An event that holds there ends the trajectory at once."""
    t, end, zero = times[0], times[-1], jnp.zeros((), jnp.int32)
    _check_field(flow, t, y0)
    t_next, solver_state, controller_state = stepper.start(t, end, y0)
    event, status = _hit(flow.events(), t, y0)
    status = jnp.where((status == Status.RUNNING) & (end <= t), _code(Status.COMPLETED), status)
    status = jnp.where(_finite(y0), status, _code(Status.NONFINITE))
    return Carry(t, t_next, y0, solver_state, controller_state, status, zero, zero, zero + 1, event, flow.size(y0).astype(t.dtype))


def march(flow: Any, stepper: Stepper, carry: Carry, times: Array, first: Array, until: Array, length: int, max_steps: Array,
          grid: Array | None = None) -> tuple[Carry, PyTree, Array | None]:
    """Go on until save time `until` is stored, or to the end; states at save times first, ..., first + length - 1 fill the rows.

    A step that passes more save times than a segment holds is not taken into the carry: the next segment takes the same step again. With
    `grid`, the time after each accepted step is stored in it. Rows that are not reached repeat the last state.
    """
    start, end, last, events = times[0], times[-1], times.shape[0] - 1, flow.events()
    eps, fixed = jnp.finfo(times.dtype).eps, stepper.fixed
    land = stepper.implicit and not fixed  # diffrax interpolates implicit steps to third order only: step on the save times instead
    rows = jax.tree.map(lambda a: jnp.zeros((length, *a.shape), a.dtype), carry.y)

    def save_time(row: Array) -> Array:
        return times[jnp.minimum(row, last)]

    def live(c: Carry) -> Array:
        return (c.status == Status.RUNNING) & (c.row < until) & (c.accepted + c.rejected < max_steps)

    def body(loop: tuple[Carry, PyTree, Array | None]) -> tuple[Carry, PyTree, Array | None]:
        c, rows, grid = loop
        on, goal = live(c), save_time(c.row) if land else end
        near = SNAP_UNITS * eps * jnp.maximum(jnp.abs(c.t), jnp.abs(goal))
        if fixed:
            near = jnp.maximum(near, 1e-6 * stepper.numbers.step)
        t1 = jnp.where(c.t_next > goal - near, goal, c.t_next)
        y, error, info, solver_state = stepper.step(c.t, t1, c.y, c.solver_state)
        good = _finite((y, error))
        if fixed:
            keep, t_next, memory = good, start + (c.accepted + 2).astype(start.dtype) * stepper.numbers.step, c.controller_state
        else:
            keep, t_next, memory = stepper.judge(c.t, t1, c.y, y, error, good, c.controller_state)
        if land:  # a step cut short by a save time says nothing against the length that was planned
            t_next = jnp.where(keep & (c.t_next > t1), jnp.maximum(t_next, t1 + (c.t_next - c.t)), t_next)

        between = stepper.between(c.t, t1, info)

        def pending(row: Array) -> Array:
            return on & keep & (row < until) & (row <= last) & (save_time(row) <= t1)

        def put(save: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
            row, rows = save
            now, at = pending(row), save_time(row)
            state = tree.select(at == t1, y, between.evaluate(at))
            place = jnp.where(now, row - first, length)
            return row + now.astype(jnp.int32), jax.tree.map(lambda b, v: b.at[place].set(v, mode="drop"), rows, state)

        row = c.row
        if length > 0:
            row, rows = lax.while_loop(lambda save: any_lane(pending(save[0])), put, (row, rows))
        hold = keep & (row >= until) & (row <= last) & (save_time(row) <= t1)
        moved, refused = on & keep & ~hold, on & ~keep
        stuck = refused & (t_next - c.t <= STUCK_UNITS * eps * jnp.abs(c.t) + eps**2 * (end - start)) if not fixed else jnp.zeros_like(on)

        t, y = jnp.where(moved, t1, c.t), tree.select(moved, y, c.y)
        first_size = jnp.where(moved & (c.accepted == 0), jnp.maximum(c.first_size, flow.size(y).astype(t.dtype)), c.first_size)
        blow = is_blow_up(flow, t, y, first_size=first_size, elapsed=t - start, collapse=stepper.numbers.collapse, moved=moved, stuck=stuck)
        event, status = _hit(events, t, y)
        event = jnp.where(moved, event, -1)
        lost = refused if fixed else stuck
        otherwise = jnp.where(moved & (t >= end), _code(Status.COMPLETED), jnp.where(blow, _code(Status.BLOWUP),
                              jnp.where(lost, _code(Status.NONFINITE), _code(Status.RUNNING))))
        status = jnp.where(moved & (event >= 0), status, otherwise)
        accepted, change = c.accepted + moved.astype(jnp.int32), moved | refused
        if grid is not None:
            grid = grid.at[jnp.where(moved, accepted, grid.shape[0])].set(t, mode="drop")
        after = Carry(t, jnp.where(change, t_next, c.t_next), y, tree.select(moved, solver_state, c.solver_state),
                      tree.select(change, memory, c.controller_state), jnp.where(on, status, c.status), accepted,
                      c.rejected + refused.astype(jnp.int32), jnp.where(on, row, c.row), jnp.where(on, event, c.event), first_size)
        return after, rows, grid

    carry, rows, grid = lax.while_loop(lambda loop: any_lane(live(loop[0])), body, (carry, rows, grid))
    reached = first + jnp.arange(length, dtype=jnp.int32) < carry.row
    return carry, jax.tree.map(lambda b, v: tree.select(reached, b, jnp.broadcast_to(v, b.shape)), rows, carry.y), grid


def trajectory(flow: Any, solver: Any, y0: PyTree, times: Array, numbers: Array, max_steps: Any, fixed: bool,
               grid: Array | None = None) -> tuple[PyTree, Ended, Array | None]:
    """A whole trajectory: the states at the times, how it ended, and the filled grid if one is given."""
    stepper = Stepper(flow, solver, Numbers(*numbers), fixed)
    count = times.shape[0]
    total = jnp.asarray(count, jnp.int32)
    carry, rows, grid = march(flow, stepper, begin(flow, stepper, y0, times), times, jnp.ones_like(total), total, count - 1, max_steps, grid)
    value = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), y0, rows)
    return value, ending(carry, max_steps), grid


def ending(carry: Carry, max_steps: Any) -> Ended:
    """How a trajectory stands; a live one has come to its step limit or was stopped."""
    spent = carry.accepted + carry.rejected >= max_steps
    open_end = jnp.where(spent, _code(Status.MAX_STEPS), _code(Status.STOPPED))
    return Ended(carry.t, jnp.where(carry.status == Status.RUNNING, open_end, carry.status), carry.accepted, carry.rejected, carry.row, carry.event)


def pack(ended: Ended) -> tuple[Array, Array]:
    """An ending as two arrays, the end time and the codes, so that the host fetches two."""
    return ended.t, jnp.stack(ended[1:])


def unpack(t: Any, codes: Any) -> Ended:
    """The inverse of `pack`, on the host."""
    return Ended(np.asarray(t), *np.asarray(codes))


def measure(flow: Any, record: Callable | None, times: Array, value: PyTree, runs: bool) -> dict[str, Array]:
    """Metrics of the flow and of `record` at `times` and states with axes (row, [run], ...): names to arrays with these axes."""

    def row(t: Array, y: PyTree) -> dict[str, Array]:
        columns = {name: jnp.asarray(column) for name, column in flow.metrics(t, y).items()}
        for name, column in (record(t, y) if record is not None else {}).items():
            if name in columns:
                raise ArgumentError(f"record repeats the name {name!r}, which the metrics of {type(flow).__name__} have: choose another")
            columns[name] = jnp.asarray(column)
        if "time" in columns:
            raise ArgumentError("a recorded column is called 'time', the name of the axis of save times: choose another")
        return tree.strong(columns)

    over = jax.vmap(row) if runs else row
    if sum(a.size for a in jax.tree.leaves(value)) <= ROWS_AT_ONCE:
        return jax.vmap(over)(times, value)
    return lax.map(lambda at: over(*at), (times, value))  # large states: one row at a time, so that scratch memory does not grow with the rows


def row_times(times: Array, first: Any, ended: Ended) -> Array:
    """The time of each row of states, axes (row, [run]): save times first, first + 1, ..., and the end time in rows that were not reached."""
    index = first + jnp.arange(times.shape[0], dtype=jnp.int32)
    column = (-1,) + (1,) * ended.row.ndim
    return jnp.where(index.reshape(column) < ended.row, times.reshape(column), ended.t)


@partial(jax.jit, static_argnames=("static", "runs", "fixed"))
def solve(arrays: list[Array], y0: PyTree, times: Array, numbers: Array, max_steps: Array, *, static: Static, runs: bool,
          fixed: bool) -> tuple[PyTree, dict[str, Array], tuple[Array, Array]]:
    """A run without interruption: states with axes (row, [run], ...), recorded columns, how each lane ended (packed)."""
    flow, record, solver = unbind(arrays, static)
    with jax.default_matmul_precision("highest"):

        def lane(y0: PyTree) -> tuple[PyTree, Ended]:
            return trajectory(flow, solver, y0, times, numbers, max_steps, fixed)[:2]

        value, ended = jax.vmap(lane, out_axes=(1, 0))(y0) if runs else lane(y0)
        return value, measure(flow, record, row_times(times, 0, ended), value, runs), pack(ended)


@partial(jax.jit, static_argnames=("static", "runs", "fixed"))
def open_run(arrays: list[Array], y0: PyTree, times: Array, numbers: Array, *, static: Static, runs: bool, fixed: bool) -> Carry:
    """The carry at the initial time."""
    flow, _, solver = unbind(arrays, static)
    with jax.default_matmul_precision("highest"):
        over = jax.vmap if runs else (lambda f: f)
        return over(lambda y: begin(flow, Stepper(flow, solver, Numbers(*numbers), fixed), y, times))(y0)


@partial(jax.jit, static_argnames=("static", "runs"))
def one_row(arrays: list[Array], t: Array, y: PyTree, *, static: Static, runs: bool) -> tuple[PyTree, dict[str, Array]]:
    """The row of one state: itself and its columns, with a leading axis of one row."""
    flow, record, _ = unbind(arrays, static)
    with jax.default_matmul_precision("highest"):
        t, y = jax.tree.map(lambda a: a[None], (t, y))
        return y, measure(flow, record, t, y, runs)


@partial(jax.jit, static_argnames=("static", "runs", "fixed", "length"))
def advance(arrays: list[Array], carry: Carry, times: Array, numbers: Array, first: Array, until: Array, max_steps: Array, *, static: Static,
            runs: bool, fixed: bool, length: int) -> tuple[Carry, PyTree, dict[str, Array], tuple[Array, Array]]:
    """One segment: the carry after it, its rows, their columns, and how each lane stands (packed)."""
    flow, record, solver = unbind(arrays, static)
    with jax.default_matmul_precision("highest"):
        stepper = Stepper(flow, solver, Numbers(*numbers), fixed)

        def lane(carry: Carry) -> tuple[PyTree, Carry, Ended]:
            carry, rows, _ = march(flow, stepper, carry, times, first, until, length, max_steps)
            return rows, carry, ending(carry, max_steps)

        rows, carry, ended = jax.vmap(lane, out_axes=(1, 0, 0))(carry) if runs else lane(carry)
        at = times[jnp.minimum(first + jnp.arange(length, dtype=jnp.int32), times.shape[0] - 1)]
        return carry, rows, measure(flow, record, row_times(at, first, ended), rows, runs), pack(ended)
