"""Mean and second moments of rows, accumulated batch by batch: any pass over data that do not fit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from theorylab.core import checks
from theorylab.core.module import Module, choice
from theorylab.core.psd import product
from theorylab.errors import ShapeError

Array = jax.Array


class Moments(Module):
    r"""Count, mean and sum of centred squares of rows with one or more views side by side; made by `moments`, filled by `add_moments`.

    Attributes:
        count: number of rows seen.
        mean: mean of all columns, shape `(n,)`.
        scatter: $\sum (a - \bar a)(a - \bar a)^\top$, shape `(n, n)`.
        dims: columns of each view.
    """

    count: Array
    mean: Array
    scatter: Array
    dims: tuple[int, ...] = choice()

    @property
    def second(self) -> Array:
        """The covariance of all columns, shape `(n, n)`, divided by the count."""
        return self.scatter / jnp.maximum(self.count, 1)

    def cov(self, i: int, j: int) -> Array:
        """The covariance of view i with view j."""
        return self.second[_part(self.dims, i), _part(self.dims, j)]

    def means(self) -> tuple[Array, ...]:
        """The mean of each view."""
        return tuple(self.mean[_part(self.dims, i)] for i in range(len(self.dims)))


def _part(dims: tuple[int, ...], i: int) -> slice:
    return slice(sum(dims[:i]), sum(dims[: i + 1]))


def moments(*dims: int, dtype: Any = None) -> Moments:
    """What `theorylab.fold(add_moments, stream, ...)` starts from: the moments of no rows.

    Args:
        dims: columns of each view.
        dtype: float32 or float64; the default float if None. Batches are added in this precision.

    Raises:
        ArgumentError: a dimension is no whole number of at least 1.

    Example:
        >>> total = add_moments(moments(1, 1), (jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [2.0]])))
        >>> total.mean.tolist(), total.cov(0, 1).tolist()
        ([2.0, 1.0], [[1.0]])
    """
    n = sum(checks.whole("dims", d, low=1) for d in dims)
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    return Moments(jnp.zeros((), dtype), jnp.zeros(n, dtype), jnp.zeros((n, n), dtype), tuple(int(d) for d in dims))


def add_moments(total: Moments, batch: Any) -> Moments:
    """The moments with the rows of one more batch, an array or a tuple of views; each row counts once, whatever the size of its batch.

    Sums are kept about the running mean, so no digits are lost to a large mean. A batch of the stream `Rows(..., remainder="weight")` is a pair
    `(batch, weight)`; rows of weight 0 do not count.

    Raises:
        ShapeError: the views do not match.

    Example:
        >>> float(add_moments(moments(1), jnp.array([[1.0], [3.0]])).cov(0, 0)[0, 0])
        1.0
    """
    views, weight = unweighted(batch, len(total.dims))
    if tuple(v.shape[-1] for v in views) != total.dims:
        raise ShapeError(f"batch must have views of {total.dims} columns, got {tuple(v.shape[-1] for v in views)}")
    return _add(total, tuple(views), weight)


@jax.jit
def _add(total: Moments, views: tuple[Any, ...], weight: Any) -> Moments:
    rows = jnp.concatenate([jnp.asarray(v, total.mean.dtype) for v in views], axis=1)
    weight = jnp.ones(rows.shape[0], rows.dtype) if weight is None else jnp.asarray(weight, rows.dtype)
    seen = jnp.sum(weight)
    mean = column_means(rows, weight @ rows / jnp.maximum(seen, 1))
    apart = (rows - mean) * jnp.sqrt(weight)[:, None]
    count, shift = total.count + seen, mean - total.mean
    share = seen / jnp.maximum(count, 1)
    scatter = total.scatter + product(apart.mT, apart) + jnp.outer(shift, shift) * total.count * share
    return Moments(count, total.mean + shift * share, scatter, total.dims)


def column_means(rows: Array, mean: Array | None = None) -> Array:
    """Means of the columns, those of constant columns without round-off: centred, they vanish and no whitening takes them for directions."""
    constant = jnp.max(rows, axis=0) == jnp.min(rows, axis=0)
    return jnp.where(constant, rows[0], jnp.mean(rows, axis=0) if mean is None else mean)


def unweighted(batch: Any, views: int) -> tuple[tuple[Any, ...], Any]:
    """The views of a batch and the weights of its rows, None if it has none."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and jnp.ndim(batch[1]) == 1:
        batch, weight = batch
    else:
        weight = None
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if len(parts) != views or any(jnp.ndim(part) != 2 for part in parts):
        raise ShapeError(f"batch must hold {views} arrays of rows, got shapes {[jnp.shape(part) for part in parts]}")
    if len({part.shape[0] for part in parts}) > 1:
        raise ShapeError(f"batch: all views must have the same number of rows, got {[part.shape[0] for part in parts]}")
    return parts, weight
