"""Random keys that are addressed, not threaded: the key of step k of run r is a function of (seed, r, k)."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.errors import ArgumentError

Key = jax.Array


def as_key(key: Key | int) -> Key:
    """A typed JAX key from a seed, a typed key or an old-style `uint32[2]` key.

    Raises:
        ArgumentError: `key` is none of these.

    Example:
        >>> as_key(0).shape
        ()
    """
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return jax.random.key(int(key))
    if isinstance(key, (jax.Array, np.ndarray)):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return jnp.asarray(key)
        if key.dtype == np.uint32 and key.shape == (2,):
            return jax.random.wrap_key_data(jnp.asarray(key))
        if key.ndim == 0 and jnp.issubdtype(key.dtype, jnp.integer):
            return jax.random.key(key)
    raise ArgumentError(f"key must be an integer seed or one JAX random key, got {type(key).__name__} {getattr(key, 'shape', key)!r}")


def stream(key: Key | int, purpose: str) -> Key:
    """The key of a named purpose, so that two uses of one key never share random numbers.

    Example:
        >>> bool(stream(0, "data") == stream(0, "start"))
        False
    """
    return jax.random.fold_in(as_key(key), np.uint32(zlib.crc32(purpose.encode())))


def run_key(key: Key | int, run: int | jax.Array) -> Key:
    """The key of replicate `run`: `iterate(..., key=run_key(seed, r))` repeats run r of `iterate(..., key=seed, runs=R)` alone."""
    return jax.random.fold_in(as_key(key), run)


def run_keys(key: Key | int, runs: int) -> Key:
    """The keys of replicates 0 to `runs` - 1, with a leading axis."""
    return jax.vmap(lambda r: jax.random.fold_in(as_key(key), r))(jnp.arange(runs, dtype=jnp.uint32))


def step_key(key: Key, step: int | jax.Array) -> Key:
    """The key of one step of a run."""
    return jax.random.fold_in(key, step)
