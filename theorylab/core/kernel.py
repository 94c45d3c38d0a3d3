"""The compiled loop: slots of `every` steps, each followed by metrics, stop test and finite test.

One slot serves three loops. `advance` is a `while` over slots that the host calls in chunks or that stands alone inside compiled
code; `unrolled` is a `scan` with static lengths, for reverse-mode derivatives. All numbers (steps, period, tolerances,
hyper-parameters) are traced; only structure is static.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core import tree
from theorylab.core.keys import step_key, stream
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError

Array = jax.Array
PyTree = Any


class Static(NamedTuple):
    """The part of a pytree that is not arrays: its structure and its other leaves, hashable."""

    treedef: Any
    rest: tuple[tuple[type, Hashable] | None, ...]


def bind(whole: PyTree) -> tuple[list[Array], Static]:
    """Split a pytree into its arrays and a hashable rest, so that `jax.jit` can key on the rest."""
    leaves, treedef = jax.tree.flatten(whole)
    is_array = [isinstance(a, (jax.Array, np.ndarray, np.generic)) for a in leaves]
    rest = tuple(None if array else (type(a), a) for a, array in zip(leaves, is_array, strict=True))
    return [a for a, array in zip(leaves, is_array, strict=True) if array], Static(treedef, rest)


def unbind(arrays: list[Array], static: Static) -> PyTree:
    """The inverse of `bind`."""
    source = iter(arrays)
    return jax.tree.unflatten(static.treedef, [next(source) if kept is None else kept[1] for kept in static.rest])


@jax.tree_util.register_static
class Kept:
    """A static value among the outputs of a compiled function."""

    def __init__(self, value: Hashable):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


class Carry(NamedTuple):
    """All that a run needs to go on. With runs, state, memory, ended, status and key have a leading axis."""

    state: PyTree
    memory: PyTree
    step: Array
    ended: Array
    status: Array
    key: Array


class Recorded(NamedTuple):
    """A buffer of recorded rows: the first `filled` are meant."""

    columns: dict[str, Array]
    step: Array
    valid: Array
    filled: Array


def measure(problem: Any, method: Any, record: Callable | None, state: PyTree) -> dict[str, Array]:
    """One row: the problem's metrics, the method's metrics, and what the user records."""
    parts = {"problem.metrics": method.measure(problem, state), "method.metrics": method.metrics(problem, state)}
    if record is not None:
        parts["record"] = record(problem, method.value(problem, state))
    row: dict[str, Array] = {}
    for source, part in parts.items():
        for name, value in part.items():
            if name in row or name in ("step", "seconds"):
                raise ArgumentError(f"{source} repeats the name {name!r}: every recorded name must be used once (step and seconds are taken)")
            row[name] = jnp.asarray(value)
    return tree.strong(row)


def healthy(problem: Any, method: Any, state: PyTree) -> Array:
    """Whether the iterate is finite and nothing else in the state is NaN: an infinite "best so far" is no divergence."""
    value = tree.inexact_leaves(method.value(problem, state))
    rest = [a for a in tree.inexact_leaves(state) if not any(a is b for b in value)]
    return jnp.stack([jnp.asarray(True), *(jnp.isfinite(a).all() for a in value), *(~jnp.isnan(a).any() for a in rest)]).all()


def _lanes(runs: int | None) -> Callable:
    return jax.vmap if runs is not None else (lambda f: f)


def _put(at: Array, buffer: Array, value: Array) -> Array:
    return lax.dynamic_update_index_in_dim(buffer, value, at, axis=0)


def _code(status: Status) -> Array:
    return jnp.asarray(int(status), jnp.int32)


@partial(jax.jit, static_argnames=("static", "runs", "fresh"))
def begin(arrays: list[Array], key: Array, x0: PyTree, batch: PyTree, *, static: Static, runs: int | None, fresh: bool) -> Any:
    """Prepare the method, make the carry at x0 (from `problem.start` when `fresh`), and record the row of x0."""
    problem, method, stop, record = unbind(arrays, static)
    with jax.default_matmul_precision("highest"):
        over = _lanes(runs)
        method = method.prepare(problem)
        seen = problem if batch is None else problem.feed(batch)
        if fresh:
            x0 = over(lambda k: problem.start(stream(k, "start")))(key)
        state = tree.strong(over(lambda x, k: method.init(seen, x, key=stream(k, "init")))(x0, key))
        row = over(lambda s: measure(problem, method, record, s))(state)
        memory, hit = over(lambda r: stop(stop.init(r), r))(row)
        good = over(lambda s: healthy(problem, method, s))(state)
        status = jnp.where(good, jnp.where(hit, _code(Status.CONVERGED), _code(Status.RUNNING)), _code(Status.NONFINITE))
        zero = jnp.zeros((), jnp.int32)
        carry = Carry(state, tree.strong(memory), zero, jnp.zeros_like(status), status, key)
    parts, kept = bind(method)
    return parts, Kept(kept), carry, row, good


def _slot(problem: Any, method: Any, stop: Any, record: Callable | None, runs: int | None, every: Array,
          max_steps: Array) -> tuple[Callable, Callable]:
    """The body shared by the loops: from a carry, `todo` steps, then a row, the stop test and the finite test."""
    over = _lanes(runs)

    def step(seen: Any, k: Array, state: PyTree, key: Array) -> PyTree:
        return tree.strong(over(lambda s, r: method.step(seen, s, key=step_key(r, k)))(state, key))

    def close(carry: Carry, state: PyTree, now: Array) -> tuple[Carry, dict[str, Array], Array, Array]:
        row, on = over(lambda s: measure(problem, method, record, s))(state), carry.status == Status.RUNNING
        whole = now % every == 0
        full = whole | (now >= max_steps)
        memory, hit = over(stop)(carry.memory, row)
        good = on & over(lambda s: healthy(problem, method, s))(state)
        live = jnp.where(full & hit, _code(Status.CONVERGED), jnp.where(now >= max_steps, _code(Status.MAX_STEPS), _code(Status.RUNNING)))
        status = jnp.where(on, jnp.where(good, live, _code(Status.NONFINITE)), carry.status)
        # The memory of the stop rule moves on whole slots only, so a run that is extended later tests what an uninterrupted one tests.
        carry = Carry(tree.select(good, state, carry.state), tree.select(good & whole, tree.strong(memory), carry.memory), now,
                      jnp.where(good, now, carry.ended), status, carry.key)
        return carry, row, good, full

    return step, close


@partial(jax.jit, static_argnames=("static", "runs", "slots", "last"))
def advance(arrays: list[Array], carry: Carry, until: Array, max_steps: Array, every: Array, block: PyTree, first: Array, *,
            static: Static, runs: int | None, slots: int, last: bool) -> tuple[Carry, Recorded, PyTree]:
    """Go to step `until`, or until no run is live, or until `slots` rows are full; the carry, the rows, and the iterates.

    A row is kept at every multiple of `every` and at `max_steps`; with `last` each row replaces the one before.
    `block` holds the batches first, first + 1, ... along its leading axis, or is None.
    """
    problem, method, stop, record = unbind(arrays, static)
    step, close = _slot(problem, method, stop, record, runs, every, max_steps)
    until = jnp.minimum(until, max_steps)

    with jax.default_matmul_precision("highest"):
        shapes = jax.eval_shape(_lanes(runs)(lambda s: measure(problem, method, record, s)), carry.state)
        rows = Recorded(jax.tree.map(lambda a: jnp.zeros((slots, *a.shape), a.dtype), shapes), jnp.zeros((slots,), jnp.int32),
                    jnp.zeros((slots, *carry.status.shape), bool), jnp.zeros((), jnp.int32))

        def live(loop: tuple[Carry, Recorded]) -> Array:
            carry, rows = loop
            return (last | (rows.filled < slots)) & (carry.step < until) & jnp.any(carry.status == Status.RUNNING)

        def slot(loop: tuple[Carry, Recorded]) -> tuple[Carry, Recorded]:
            carry, rows = loop
            now = carry.step + jnp.minimum(every - carry.step % every, until - carry.step)

            def one(k: Array, state: PyTree) -> PyTree:
                seen = problem if block is None else problem.feed(jax.tree.map(lambda b: b[k - first], block))
                return step(seen, k, state, carry.key)

            state = lax.fori_loop(carry.step, now, one, carry.state)
            carry, row, good, full = close(carry, state, now)
            at = jnp.zeros_like(rows.filled) if last else rows.filled
            put = partial(_put, at)
            if last:  # a lane that has ended keeps its last row
                row = jax.tree.map(lambda buffer, value: tree.select(good & full, value, buffer[0]), rows.columns, row)
                good = rows.valid[0] | (good & full)
            filled = jnp.ones_like(at) if last else at + full.astype(jnp.int32)
            filled = jnp.where(full | (rows.filled > 0), filled, rows.filled)
            return carry, Recorded(jax.tree.map(put, rows.columns, row), put(rows.step, now), put(rows.valid, good), filled)

        carry, rows = lax.while_loop(live, slot, (carry, rows))
        return carry, rows, _lanes(runs)(lambda s: method.value(problem, s))(carry.state)


@partial(jax.jit, static_argnames=("static", "runs", "every", "steps"))
def unrolled(arrays: list[Array], carry: Carry, *, static: Static, runs: int | None, every: int,
             steps: int) -> tuple[Carry, Recorded, PyTree]:
    """The same run as a `scan`, for reverse mode: one state per slot is stored and the steps inside a slot are recomputed."""
    problem, method, stop, record = unbind(arrays, static)
    step, close = _slot(problem, method, stop, record, runs, jnp.asarray(every, jnp.int32), jnp.asarray(steps, jnp.int32))

    @jax.checkpoint
    def slot(carry: Carry, _: None) -> tuple[Carry, tuple]:
        def one(state: PyTree, j: Array) -> tuple[PyTree, None]:
            k = carry.step + j
            moved = step(problem, k, state, carry.key)
            return tree.select(k < steps, moved, state), None

        state, _ = lax.scan(one, carry.state, jnp.arange(every, dtype=jnp.int32))
        now = jnp.minimum(carry.step + every, steps).astype(jnp.int32)
        ran = jnp.any(carry.status == Status.RUNNING)
        carry, row, good, _ = close(carry, state, now)
        return carry, (row, now, good, ran)

    with jax.default_matmul_precision("highest"):
        carry, (columns, at, valid, ran) = lax.scan(slot, carry, None, length=-(-steps // every))
        value = _lanes(runs)(lambda s: method.value(problem, s))(carry.state)
    return carry, Recorded(columns, at, valid, jnp.sum(ran, dtype=jnp.int32)), value


def describe_mismatch(problem: Any, method: Any, state: PyTree, key: Array) -> str | None:
    """In words, how `method.step` changes the structure, shapes or dtypes of its state; None if it does not."""
    after = eqx.filter_eval_shape(lambda s: tree.strong(method.step(problem, s, key=key)), state)
    before_leaves, before_def = jax.tree_util.tree_flatten_with_path(state)
    after_leaves, after_def = jax.tree_util.tree_flatten_with_path(after)
    if before_def != after_def:
        return f"{type(method).__name__}.step returns a state of another structure than init: {after_def} instead of {before_def}"
    for (path, a), (_, b) in zip(before_leaves, after_leaves, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            leaf = f"state{jax.tree_util.keystr(path)}"
            return (f"{type(method).__name__}.step changes {leaf} from {a.dtype}{list(a.shape)} to {b.dtype}{list(b.shape)}; "
                    "init and step must agree in shape and dtype")
    return None
