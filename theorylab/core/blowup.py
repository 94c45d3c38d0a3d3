"""Is a solution about to leave every bound in finite time? A test by growth time, not by size.

A size never answers it: near a blow-up at t* a factor grows only like (t* - t)^(-1/2), so the step size underflows before a large bound
is met, and a moderate bound mistakes exponential growth for blow-up. The growth time, size / (d size / dt), tells them apart: it stays
constant under exponential growth and goes to zero like t* - t before a blow-up.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

GROWTH = 1e3
STUCK_UNITS = 1e4


@jax.custom_batching.custom_vmap
def any_lane(where: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether `where` holds in any lane of the enclosing `vmap`s; `where` itself outside of them.

    As the condition of a loop or branch it stays a scalar under `vmap`, so the body runs as long as one lane needs it, without a
    copy of all lanes' buffers in each pass. The body must then leave finished lanes alone by itself.

    Example:
        >>> jax.vmap(any_lane)(jnp.array([False, True, False]))
        Array([ True,  True,  True], dtype=bool)
    """
    return where


@any_lane.def_vmap
def _any_lane_rule(axis_size: int, batched: Any, where: Array) -> tuple[Array, bool]:
    return any_lane(jnp.any(where, axis=0) if batched[0] else where), False


def is_blow_up(flow: Any, t: Float[Array, ""], y: Any, *, first_size: Float[Array, ""], elapsed: Float[Array, ""], collapse: Float[Array, ""],
               moved: Bool[Array, ""], stuck: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether the growth time of `flow.size` at (t, y) is below `collapse` times `elapsed`.

    It is looked at (one `jvp`) after a thousandfold growth since the start, or when the step size has shrunk to round-off; in the
    second case the growth time only has to vanish at the resolution of t.

    Args:
        flow: the equation.
        t: time reached.
        y: state there.
        first_size: size at the start.
        elapsed: time since the start.
        collapse: the fraction; 0 never reports a blow-up before the step size is stuck.
        moved: whether a step was accepted just now.
        stuck: whether no step is short enough.
    """
    size = flow.size(y).astype(t.dtype)
    look = (moved & (size > GROWTH * first_size)) | stuck

    def rate() -> Array:
        return jax.jvp(flow.size, (y,), (flow.field(t, y),))[1].astype(t.dtype)

    growth = lax.cond(any_lane(look), rate, lambda: jnp.zeros_like(size))
    resolution = STUCK_UNITS * jnp.finfo(t.dtype).eps * jnp.abs(t)
    level = collapse * elapsed
    # beyond the root of the largest number the square in the rate overflows, which says nothing about the growth time
    return look & jnp.isfinite(growth) & (size < growth * jnp.where(stuck, jnp.maximum(level, resolution), level))
