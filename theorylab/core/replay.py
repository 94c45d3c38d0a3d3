"""Derivatives of a trajectory: the accepted steps are taken again, on their recorded grid, by a loop that has derivatives in every mode.

A `while` loop has no reverse mode, and a rejected step may hold infinities that turn a derivative into NaN. So the run itself stays a
`while` loop, and its derivative (`custom_jvp`) comes from a second pass over the accepted steps only, made of nested `scan`s. It is the
exact derivative of the discrete solution on a fixed grid, forward, reverse, batched or repeated; step sizes count as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core import tree
from theorylab.core.blowup import any_lane
from theorylab.core.kernel import bind, unbind
from theorylab.core.stepping import Ended, Numbers, Stepper, trajectory

Array = jax.Array
PyTree = Any
BRANCHING = 16


class Place(NamedTuple):
    """Where the second pass stands: after `taken` steps, the last of which went from `t_last` to `t` with `info` to interpolate it."""

    taken: Array
    t_last: Array
    t: Array
    y: PyTree
    solver_state: PyTree
    info: dict


def repeat_while(live: Callable[[Any], Array], body: Callable[[Any], Any], state: Any, most: int) -> Any:
    """`lax.while_loop(live, body, state)` for at most `most` passes, with reverse mode: nested scans that skip what is not live.

    Memory grows like the logarithm of `most`, and each level recomputes once. Under `vmap` the body must leave finished lanes alone.
    """

    def level(inner: Callable[[Any], Any], depth: int) -> Callable[[Any], Any]:
        if depth == 0:
            return inner

        def one(state: Any, _: None) -> tuple[Any, None]:
            return lax.cond(any_lane(live(state)), inner, lambda s: s, state), None

        outer = jax.checkpoint(lambda state: lax.scan(one, state, None, length=BRANCHING)[0], prevent_cse=False)
        return level(outer, depth - 1)

    depth = 1
    while BRANCHING**depth < most:
        depth += 1
    return level(body, depth)(state)


def follow(flow: Any, solver: Any, y0: PyTree, times: Array, numbers: Array, fixed: bool, grid: Array, ended: Ended, max_steps: int) -> PyTree:
    """The states at the times along the accepted steps of `grid`."""
    stepper = Stepper(flow, solver, Numbers(*lax.stop_gradient(numbers)), fixed, reverse=True)
    # the first step starts where the run does, so that the initial time has its derivative
    grid = jnp.concatenate([times[:1], lax.stop_gradient(grid[1:])])
    solver_state = stepper.solver_state(times[0], times[0], y0)
    shapes = jax.eval_shape(lambda y: stepper.step(times[0], times[0], y, solver_state)[2], y0)
    info = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    place = Place(jnp.zeros((), jnp.int32), times[0], times[0], y0, solver_state, info)

    def advance(live: Callable[[Place], Array], p: Place) -> Place:
        on = live(p)
        t = grid[jnp.minimum(p.taken + 1, ended.accepted)]
        y, _, info, solver_state = stepper.step(p.t, t, p.y, p.solver_state)
        return tree.select(on, Place(p.taken + 1, p.t, t, y, solver_state, info), p)

    def row(place: Place, at: tuple[Array, Array]) -> tuple[Place, PyTree]:
        i, t = at
        reached = i < ended.row

        def live(p: Place) -> Array:
            return (p.taken < ended.accepted) & ((p.t < t) | ~reached)

        place = repeat_while(live, partial(advance, live), place, max_steps)
        here = stepper.between(place.t_last, place.t, place.info).evaluate(t)
        return place, tree.select(reached, here, place.y)

    _, rows = lax.scan(row, place, (jnp.arange(1, times.shape[0], dtype=jnp.int32), times[1:]))
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), y0, rows)


def differentiable(flow: Any, solver: Any, y0: PyTree, times: Array, numbers: Array, max_steps: int, fixed: bool) -> tuple[PyTree, Ended]:
    """`trajectory` with derivatives with respect to the arrays of the flow, the initial state and the times."""
    arrays, static = bind((flow, solver, y0, times))

    @jax.custom_jvp
    def run(arrays: list[Array], numbers: Array) -> tuple[PyTree, Ended]:
        flow, solver, y0, times = unbind(arrays, static)
        return trajectory(flow, solver, y0, times, numbers, max_steps, fixed)[:2]

    @partial(run.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        (arrays, numbers), (dots, _) = primals, tangents
        flow, solver, y0, times = unbind(arrays, static)
        value, ended, grid = trajectory(flow, solver, y0, times, numbers, max_steps, fixed, jnp.full((max_steps + 1,), times[0]))
        assert grid is not None
        moving = [i for i, dot in enumerate(dots) if not isinstance(dot, jax.custom_derivatives.SymbolicZero)]

        def path(parts: list[Array]) -> PyTree:
            filled = list(arrays)
            for i, part in zip(moving, parts, strict=True):
                filled[i] = part
            flow, solver, y0, times = unbind(filled, static)
            return follow(flow, solver, y0, times, numbers, fixed, grid, ended, max_steps)

        _, moved = jax.jvp(path, ([arrays[i] for i in moving],), ([dots[i] for i in moving],))
        still = jax.tree.map(lambda a: jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.inexact) else np.zeros(a.shape, jax.dtypes.float0), ended)
        return (value, ended), (moved, still)

    return run(arrays, numbers)
