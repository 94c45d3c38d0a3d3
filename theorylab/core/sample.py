"""Random matrices with known properties, and minibatch indices addressed by the step."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from theorylab import runtime
from theorylab.core import checks
from theorylab.core.keys import Key, as_key, step_key, stream
from theorylab.core.psd import _symmetrize, product
from theorylab.errors import PrecisionError

ROUNDS = 8


def minibatch(key: Key | int, n: int, batch_size: int, step: Any, *, replace: bool = False) -> Array:
    r"""Row numbers of minibatch number `step`: a function of (key, step), so any step can be asked for in any order.

    Without replacement, pass number e consists of steps e m to (e + 1) m - 1 with $m = \lfloor n / \mathrm{batch\_size} \rfloor$ and visits
    the rows in an order of its own, each at most once; the `n - m batch_size` rows left over differ from pass to pass. The
    order is a keyed Feistel network, so a batch costs work in `batch_size`, not in n.

    Args:
        key: seed or random key of the stream.
        n: number of rows, below 2**31.
        batch_size: rows in a batch.
        step: number of the batch, possibly traced.
        replace: draw each row independently instead.

    Returns:
        Integers in [0, n), shape (batch_size,), dtype int32.

    Raises:
        ArgumentError: `batch_size` is not between 1 and n, or `step` is negative.

    Example:
        >>> sorted(int(i) for step in range(3) for i in minibatch(0, 6, 2, step))
        [0, 1, 2, 3, 4, 5]
    """
    n = checks.whole("n", n, low=1, high=2**31 - 1)
    batch_size = checks.whole("batch_size", batch_size, low=1, high=None if replace else n)
    if checks.known(step):
        step = checks.whole("step", step, low=0)
    return _minibatch(as_key(key), jnp.asarray(step), n=n, batch_size=batch_size, replace=bool(replace))


@partial(jax.jit, static_argnames=("n", "batch_size", "replace"))
def _minibatch(key: Key, step: Int[Array, ""], *, n: int, batch_size: int, replace: bool) -> Int[Array, " rows"]:
    if replace:
        return jax.random.randint(step_key(stream(key, "replace"), step), (batch_size,), 0, n, dtype=jnp.int32)
    per_pass = n // batch_size
    first = (step % per_pass).astype(jnp.uint32) * np.uint32(batch_size)
    return _permuted(step_key(stream(key, "pass"), step // per_pass), first + jnp.arange(batch_size, dtype=jnp.uint32), n).astype(jnp.int32)


def _mix(x: UInt32[Array, " rows"], round_key: UInt32[Array, ""]) -> UInt32[Array, " rows"]:
    """A keyed 32-bit hash in which every input bit reaches every output bit (the finalizer of MurmurHash3)."""
    x = x * np.uint32(0x9E3779B9) + round_key
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _permuted(key: Key, index: UInt32[Array, " rows"], n: int) -> UInt32[Array, " rows"]:
    """The images of `index` under a pseudo-random permutation of 0, ..., n - 1.

    A balanced Feistel network permutes the next power of four; an image outside [0, n) is permuted again until it falls inside, which
    leaves a permutation of [0, n) (cycle walking; Mitchell, Stokes, Frank and Holmes, 2022, use the same for shuffles on GPUs).
    """
    half = max(1, -(-(n - 1).bit_length() // 2))
    mask, width = np.uint32(2**half - 1), np.uint32(half)
    round_keys = jax.random.bits(key, (ROUNDS,), jnp.uint32)

    def walk(loop: tuple[Array, Array]) -> tuple[Array, Array]:
        x, outside = loop
        left, right = x >> width, x & mask
        for i in range(ROUNDS):
            left, right = right, left ^ (_mix(right, round_keys[i]) & mask)
        x = jnp.where(outside, (left << width) | right, x)
        return x, x >= np.uint32(n)

    return lax.while_loop(lambda loop: jnp.any(loop[1]), walk, (index, jnp.ones(index.shape, bool)))[0]


def _float_dtype(dtype: Any) -> Any:
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    if dtype not in (jnp.dtype("float32"), jnp.dtype("float64")):
        raise PrecisionError(f"dtype must be float32 or float64, got {dtype}")
    if dtype == jnp.dtype("float64") and not runtime.x64():
        raise PrecisionError("dtype float64 needs 64-bit mode, which JAX_ENABLE_X64=0 has switched off")
    return dtype


def random_orthogonal(key: Key | int, dim: int, columns: int | None = None, *, dtype: Any = None) -> Array:
    """A Haar-distributed orthogonal matrix, or its first `columns` columns: uniform on the Stiefel manifold.

    Raises:
        ArgumentError: `dim` below 1, or `columns` not between 1 and `dim`.

    Example:
        >>> q = random_orthogonal(0, 3)
        >>> bool(jnp.allclose(q.T @ q, jnp.eye(3)))
        True
    """
    dim = checks.whole("dim", dim, low=1)
    columns = dim if columns is None else checks.whole("columns", columns, low=1, high=dim)
    return _orthogonal(as_key(key), dim=dim, columns=columns, dtype=_float_dtype(dtype))


@partial(jax.jit, static_argnames=("dim", "columns", "dtype"))
def _orthogonal(key: Key, *, dim: int, columns: int, dtype: Any) -> Float[Array, "dim columns"]:
    # QR of a Gaussian matrix; signs that make the diagonal of R positive make it unique, hence Haar-distributed.
    q, r = jnp.linalg.qr(jax.random.normal(key, (dim, columns), dtype))
    return q * jnp.where(jnp.diagonal(r) < 0, -jnp.ones((), dtype), jnp.ones((), dtype))


def spd_with_spectrum(key: Key | int, eigenvalues: Any) -> Array:
    """A symmetric matrix with the given eigenvalues and Haar-distributed eigenvectors.

    Args:
        key: seed or random key.
        eigenvalues: shape (n,), not negative; the dtype of the matrix follows them.

    Raises:
        ShapeError: not a vector.
        ArgumentError: a negative eigenvalue.

    Example:
        >>> jnp.linalg.eigvalsh(spd_with_spectrum(0, jnp.array([1.0, 2.0]))).round(12).tolist()
        [1.0, 2.0]
    """
    eigenvalues = checks.array("eigenvalues", eigenvalues, (None,))
    if checks.known(eigenvalues):
        checks.real("smallest of eigenvalues", jnp.min(eigenvalues), low=0.0)
    return _with_spectrum(as_key(key), eigenvalues)


@jax.jit
def _with_spectrum(key: Key, eigenvalues: Float[Array, " n"]) -> Float[Array, "n n"]:
    q = _orthogonal(key, dim=eigenvalues.shape[0], columns=eigenvalues.shape[0], dtype=eigenvalues.dtype)
    return _symmetrize(product(q * eigenvalues, q.T))


def low_rank_factor(key: Key | int, dim: int, rank: int, *, dtype: Any = None) -> Array:
    r"""A Gaussian factor N of shape (dim, rank) whose covariance $N N^\top$ has rank `rank` and mean I.

    Raises:
        ArgumentError: `dim` or `rank` below 1.

    Example:
        >>> low_rank_factor(0, 4, 2).shape
        (4, 2)
    """
    dim, rank = checks.whole("dim", dim, low=1), checks.whole("rank", rank, low=1)
    dtype = _float_dtype(dtype)
    return jax.random.normal(as_key(key), (dim, rank), dtype) / np.sqrt(rank).astype(dtype)


def wishart(key: Key | int, dim: int, dof: int, *, dtype: Any = None) -> Array:
    """A draw of the Wishart law with identity scale: the sum of `dof` outer products of standard normal vectors.

    Its mean is `dof` times I and its rank min(dim, dof).

    Raises:
        ArgumentError: `dim` or `dof` below 1.

    Example:
        >>> int(jnp.linalg.matrix_rank(wishart(0, 4, 2)))
        2
    """
    dim, dof = checks.whole("dim", dim, low=1), checks.whole("dof", dof, low=1)
    return _wishart(as_key(key), dim=dim, dof=dof, dtype=_float_dtype(dtype))


@partial(jax.jit, static_argnames=("dim", "dof", "dtype"))
def _wishart(key: Key, *, dim: int, dof: int, dtype: Any) -> Float[Array, "dim dim"]:
    factor = jax.random.normal(key, (dim, dof), dtype)
    return _symmetrize(product(factor, factor.T))
