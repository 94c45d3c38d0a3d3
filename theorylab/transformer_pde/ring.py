"""Tokens spread over devices: keys and values travel round the ring of devices, a shard at a time, and no device holds them all.

Inside `jax.shard_map` over a mesh axis called `tokens`, every array of tokens is one shard. Elsewhere there is one shard and nothing travels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

AXIS = "tokens"
"""Name of the mesh axis over which tokens are spread."""


def shards() -> int:
    """Number of shards, known while tracing."""
    try:
        return lax.axis_size(AXIS)
    except NameError:                                                                # no such axis around
        return 1


def shard() -> Any:
    """Number of the shard at hand."""
    return lax.axis_index(AXIS).astype(jnp.result_type(int)) if shards() > 1 else 0


def total(part: Array) -> Array:
    """The sum of `part` over all shards."""
    return lax.psum(part, AXIS) if shards() > 1 else part


def largest(part: Array) -> Array:
    """The maximum of `part` over all shards."""
    return lax.pmax(part, AXIS) if shards() > 1 else part


def cumulative(rows: Array) -> Array:
    """The cumulative sum over all tokens, in their order, of which `rows` is one shard."""
    sums = jnp.cumsum(rows, 0)
    if shards() == 1:
        return sums
    ends = lax.all_gather(sums[-1], AXIS)
    earlier = jnp.arange(shards()) < shard()
    return sums + jnp.tensordot(earlier.astype(rows.dtype), ends, 1)


def round_trip(fold: Callable[[Any, Any, Any], Any], carry: Any, part: Any) -> Any:
    """The carry after `fold(carry, part, number)` has seen the part of every shard, its own one first."""
    count = shards()
    if count == 1:
        return fold(carry, part, 0)
    onward = [(i, (i + 1) % count) for i in range(count)]

    def stop(state: tuple[Any, Any], hop: Array) -> tuple[tuple[Any, Any], None]:
        carry, part = state
        coming = jax.tree.map(lambda a: lax.ppermute(a, AXIS, onward), part)         # sent before it is used: the two overlap
        return (fold(carry, part, (shard() - hop) % count), coming), None

    return lax.scan(stop, (carry, part), jnp.arange(count))[0][0]
