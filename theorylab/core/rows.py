"""Rows of arrays and of `.npy` files as a stream of equal batches, in their order or permuted by blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.errors import ArgumentError, ShapeError, StorageError

PyTree = Any


class Rows:
    """Batches of consecutive rows of arrays, memory-mapped when they are files: only the rows in use are read.

    Batch k of a pass holds the rows of the k-th group of `batch_size` rows; after `per_pass` batches the next pass begins. The order of
    a pass is a function of (seed, pass), so any step can be read at any time, in any process, with the same result.

    Args:
        data: a `.npy` file, an array (anything with `shape`, `dtype` and slices; rows of a sparse matrix are filled in), or a tuple,
            list or dict of them with equal numbers of rows. The batches have the same structure.
        batch_size: rows of a batch.
        columns: widths that split the columns of one matrix; a batch is then a tuple, as in `(x, y)`.
        shuffle: `"none"`, or `"blocks"`: blocks of `block_rows` consecutive rows are permuted anew in each pass. Rows of a block stay
            together, so rows of a sorted file should be shuffled once beforehand.
        block_rows: length of those blocks; a divisor of `batch_size`, which is also the default.
        seed: of the permutations (`jax.random`, drawn on the host, equal on all backends).
        remainder: rows left over when `batch_size` does not divide the number of rows. `"drop"` leaves them out of the pass (others
            in each pass if shuffled). `"weight"` ends the pass with a batch that repeats rows to keep its shape, and makes every batch
            a pair `(batch, weight)` whose weights are 1, and 0 for the repeats.

    Raises:
        StorageError: a file is missing, damaged or not a `.npy` file.
        ShapeError: numbers of rows differ, or `columns` do not add up.
        ArgumentError: another argument is out of range; the message names it.

    Example:
        >>> rows = Rows(np.arange(20.0).reshape(10, 2), batch_size=4, columns=(1, 1))
        >>> rows.per_pass, [part.ravel().tolist() for part in rows.batch(1)]
        (2, [[8.0, 10.0, 12.0, 14.0], [9.0, 11.0, 13.0, 15.0]])
    """

    def __init__(self, data: Any, batch_size: int, *, columns: tuple[int, ...] | None = None, shuffle: Literal["none", "blocks"] = "none",
                 block_rows: int | None = None, seed: int = 0, remainder: Literal["drop", "weight"] = "drop"):
        self._leaves, self._treedef = jax.tree.flatten(data, is_leaf=lambda part: not isinstance(part, (tuple, list, dict)))
        self._leaves = [_open(part) for part in self._leaves]
        self.rows = _common_rows(self._leaves, data)
        self.batch_size = whole_number("batch_size", batch_size, 1)
        self._block = self.batch_size if block_rows is None else whole_number("block_rows", block_rows, 1)
        self._columns = None if columns is None else _check_columns(tuple(columns), self._leaves, self._treedef)
        self._shuffle, self._seed, self._weighted = shuffle, whole_number("seed", seed), remainder == "weight"
        if self.batch_size % self._block:
            raise ArgumentError(f"block_rows must divide batch_size = {self.batch_size}, got {self._block}")
        for name, word, words in (("shuffle", shuffle, ("none", "blocks")), ("remainder", remainder, ("drop", "weight"))):
            if word not in words:
                raise ArgumentError(f"{name} must be {' or '.join(map(repr, words))}, got {word!r}")
        if self.batch_size > self.rows:
            raise ArgumentError(f"batch_size must be at most the number of rows, {self.rows}, got {self.batch_size}")
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    @property
    def per_pass(self) -> int:
        """Batches in one pass over the data."""
        return -(-self.rows // self.batch_size) if self._weighted else self.rows // self.batch_size

    def batch(self, step: int) -> PyTree:
        """The batch of one step, a pytree of NumPy arrays; files are read here."""
        number, position = divmod(whole_number("step", step, 0), self.per_pass)
        starts, leftover = self._layout(number)
        per_batch = self.batch_size // self._block
        if self._weighted and position == self.per_pass - 1 and leftover:
            return self._padded(leftover)
        mine = starts[position * per_batch:(position + 1) * per_batch]
        batch = self._take([(int(s), int(s) + self._block) for s in mine])
        return (batch, np.ones(self.batch_size, self._weight_dtype())) if self._weighted else batch

    def left_over(self, number: int) -> PyTree | None:
        """The rows that pass `number` leaves out under `remainder="drop"`, or None; `fold` adds them, so that its sums are exact."""
        ranges = [] if self._weighted else self._layout(number)[1]
        return self._take(ranges) if ranges else None

    def _layout(self, number: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """First rows of the blocks of a pass in their order, and the ranges of rows that fill no batch."""
        whole = self.rows // self.batch_size * (self.batch_size // self._block)     # blocks that fill batches
        if self._shuffle == "none":
            edge = whole * self._block
            return np.arange(whole) * self._block, [(edge, self.rows)] if edge < self.rows else []
        if self._order[0] != number:
            self._order = (number, self._permutation(number))
        offset, order = int(self._order[1][0]), self._order[1][1:]
        starts = offset + order * self._block
        ends = [(0, offset), (offset + len(order) * self._block, self.rows)]
        kept = [(int(s), int(s) + self._block) for s in starts[whole:]] + [(a, b) for a, b in ends if a < b]
        return starts[:whole], kept

    def _permutation(self, number: int) -> np.ndarray:
        """Where the first block of a pass begins, followed by the order of the blocks."""
        blocks, spare = divmod(self.rows, self._block)
        with jax.default_device(_host()):
            key = jax.random.fold_in(jax.random.key(self._seed, impl="threefry2x32"), number)
            offset = jax.random.randint(jax.random.fold_in(key, 0), (), 0, spare + 1)
            order = jax.random.permutation(jax.random.fold_in(key, 1), blocks)
        return np.concatenate([np.asarray(offset)[None], np.asarray(order)]).astype(np.int64)

    def _padded(self, leftover: list[tuple[int, int]]) -> PyTree:
        """The last batch of a pass: the rows left over, repeated to the full shape, and their weights."""
        count = sum(b - a for a, b in leftover)
        short = self._take(leftover)
        index = np.arange(self.batch_size) % count
        weight = (np.arange(self.batch_size) < count).astype(self._weight_dtype())
        return jax.tree.map(lambda a: a[index], short), weight

    def _weight_dtype(self) -> Any:
        inexact = [leaf.dtype for leaf in self._leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return np.result_type(*inexact) if inexact else np.float32

    def _take(self, ranges: list[tuple[int, int]]) -> PyTree:
        def of(leaf: Any) -> np.ndarray:
            parts = [np.asarray(dense(leaf[a:b])) for a, b in ranges]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        taken = [of(leaf) for leaf in self._leaves]
        if self._columns is not None:
            return tuple(np.split(taken[0], np.cumsum(self._columns)[:-1], axis=1))
        return jax.tree.unflatten(self._treedef, taken)

    def __repr__(self) -> str:
        return f"Rows({self.rows} rows, batch_size={self.batch_size}, per_pass={self.per_pass}, shuffle={self._shuffle!r})"


def dense(part: Any) -> Any:
    """A sparse matrix of SciPy as an array; anything else as it is."""
    return part.toarray() if hasattr(part, "toarray") else part


def _open(part: Any) -> Any:
    if isinstance(part, (str, Path)):
        try:
            part = np.lib.format.open_memmap(part, mode="r")
        except OSError as error:
            raise StorageError(f"{part} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise StorageError(f"{part} is damaged or not a .npy file: {error}") from error
    if not (hasattr(part, "shape") and hasattr(part, "dtype") and hasattr(part, "__getitem__")):
        raise ArgumentError(f"data must be arrays or names of .npy files, got {type(part).__name__}")
    if not part.shape:
        raise ShapeError("data: an array must have an axis of rows, got shape ()")
    if np.dtype(part.dtype).hasobject:
        raise ArgumentError("data: an array holds Python objects; only numbers can be read as rows")
    return part


def _common_rows(leaves: list[Any], data: Any) -> int:
    if not leaves:
        raise ArgumentError(f"data holds no arrays: {data!r}")
    counts = [int(leaf.shape[0]) for leaf in leaves]
    if len(set(counts)) > 1:
        raise ShapeError(f"data: all arrays must have the same number of rows, got {', '.join(map(str, counts))}")
    return counts[0]


def _check_columns(columns: tuple[int, ...], leaves: list[Any], treedef: Any) -> tuple[int, ...]:
    if not jax.tree_util.treedef_is_leaf(treedef) or len(leaves[0].shape) != 2:
        raise ArgumentError("columns splits one matrix; data must be a single file or array with two axes")
    widths = tuple(whole_number("columns", width, 1) for width in columns)
    if sum(widths) != leaves[0].shape[1]:
        raise ShapeError(f"columns must add up to the {leaves[0].shape[1]} columns of the data, got {' + '.join(map(str, widths))} = {sum(widths)}")
    return widths


def whole_number(name: str, value: Any, low: int | None = None) -> int:
    """`value` as an int; `ArgumentError` naming the argument if it is not a whole number or below `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or (low is not None and value < low):
        raise ArgumentError(f"{name} must be a whole number{'' if low is None else f' of at least {low}'}, got {value!r}")
    return int(value)


def _host() -> Any:
    """The CPU where there is one, so that permutations do not occupy an accelerator."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return None
