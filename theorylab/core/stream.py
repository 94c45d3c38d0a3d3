"""Data that do not fit on the device: streams of equal batches, read ahead on a helper thread, and sums over them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import tree
from theorylab.core.progress import Progress, resolve
from theorylab.core.rows import Rows, dense, whole_number
from theorylab.errors import ArgumentError, PrecisionError, ShapeError, TheorylabError

__all__ = ["Batches", "Block", "BlockReader", "EndOfData", "Rows", "Stream", "as_stream", "fold"]

PyTree = Any
A = TypeVar("A")
BLOCK_BYTES = 64 * 2**20
BLOCK_LENGTH = 256
PATIENCE = 1.0                                      # seconds that `close` waits for a reader stuck in somebody's iterator
_CONFIG: Any = jax.config


class EndOfData(TheorylabError, IndexError):
    """A stream has no batch of that number: its data are used up."""


@runtime_checkable
class Stream(Protocol):
    """Batches addressed by step. `Rows` and `Batches` follow it; so may any object of the user's.

    `batch(step)` gives a pytree of NumPy arrays whose structure, shapes and dtypes are the same for every step, and raises `EndOfData`
    when there is none. It is called on a helper thread, one call at a time. For a resumed run to equal an uninterrupted one, the batch
    must be a function of the step.
    """

    @property
    def per_pass(self) -> int | None:
        """Batches in one pass over the data, or None if that is not known."""

    def batch(self, step: int) -> PyTree:
        """The batch of one step."""


class Batches:
    """Batches from any iterable, in its order, once. Resuming at step k reads and discards the k batches before it.

    It reads ahead of the computation, so what the iterator has given is more than what was used.

    Args:
        iterable: gives pytrees of arrays, all of one structure, shape and dtype.

    Example:
        >>> batches = Batches(np.full(2, k) for k in range(3))
        >>> batches.batch(1).tolist()
        [1, 1]
    """

    per_pass: int | None = None

    def __init__(self, iterable: Iterable[PyTree]):
        if isinstance(iterable, (str, bytes, Path, Mapping)) or not isinstance(iterable, Iterable):
            raise ArgumentError(f"iterable must give batches one after the other, got {type(iterable).__name__}")
        self._iterator: Iterator[PyTree] = iter(iterable)
        self._next, self._last = 0, None

    def batch(self, step: int) -> PyTree:
        """The batch of `step`, which must not lie before the last one asked for.

        Raises:
            EndOfData: the iterator ended before that step.
            ArgumentError: the batch has been given already.
        """
        if step < self._next - 1:
            raise ArgumentError(f"an iterator cannot go back: batch {step} was asked for, and {self._next} batches have been taken; "
                                "begin each run with a new iterator, or use Rows")
        while self._next <= step:
            try:
                self._last = next(self._iterator)
            except StopIteration:
                raise EndOfData(f"the data ended after {self._next} batches; batch {step} was asked for") from None
            self._next += 1
        return self._last


def as_stream(data: Any) -> Stream:
    """`data` itself if it is a `Stream`, else `Batches` around the iterable.

    Raises:
        ArgumentError: it is neither; arrays and files go through `Rows`.
    """
    if isinstance(data, Stream):
        return data
    if isinstance(data, (np.ndarray, jax.Array, str, Path, Mapping)):
        raise ArgumentError(f"data must be a stream or an iterable of batches, got {type(data).__name__}; "
                            "Rows(data, batch_size) makes a stream of an array or of a .npy file")
    if not isinstance(data, Iterable):
        raise ArgumentError(f"data must be a stream (per_pass and batch(step)) or an iterable of batches, got {type(data).__name__}")
    return Batches(data)


# ---------------------------------------------------------------------------------------------------------------- reading ahead


class Block(NamedTuple):
    """Batches `first` to `end` - 1 stacked along a leading axis that is longer where the data end: one shape, one compile."""

    arrays: PyTree
    first: int
    end: int


class BlockReader:
    """Reads blocks of batches on a helper thread while the current block is in use.

    A block holds as many batches as fit into 64 MiB, at most 256, and lies on the default device of the thread that made the reader. A batch
    beyond that size is a block by itself and is not read ahead, so that one of them is in memory at a time.

    Args:
        stream: where batches come from.
        steps: no batch from this step on is read; None reads to the end of the data.

    Attributes:
        wait_seconds: time that `block` spent waiting for data.

    Raises:
        ShapeError: batches differ in structure or shape; the message names step and leaf.
        PrecisionError: batches differ in dtype, or are 64-bit while 64-bit mode is off.
    """

    def __init__(self, stream: Stream, steps: int | None = None):
        self._stream, self._steps = stream, steps
        self._device = _CONFIG.jax_default_device            # a setting of the calling thread
        self._model: list[tuple[str, jax.ShapeDtypeStruct]] = []
        self._batch0: Any = None
        self._treedef: Any = None
        self._current: Block | None = None
        self._ahead: _Reading | None = None
        self._start, self._closed = 0, False
        self.wait_seconds = 0.0

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def first(self) -> PyTree:
        """Batch 0, for shapes and for starting points.

        Raises:
            EndOfData: the stream is empty.
        """
        self._get_model()
        return self._ask(0) if self._batch0 is None else self._batch0

    def seek(self, step: int) -> None:
        """Begin at `step`; what was read ahead is dropped unless it begins there."""
        self._start = step

    @property
    def length(self) -> int:
        """Batches in a block."""
        size = self._batch_bytes()
        length = min(max(BLOCK_BYTES // size, 1), BLOCK_LENGTH)
        return length if self._steps is None else min(length, 1 << max(0, self._steps - 1).bit_length())

    def next(self) -> Block:
        """The block after the one given last; at the end of the data its `end` equals its `first`."""
        return self.block(self._start if self._current is None else self._current.end)

    def block(self, step: int) -> Block:
        """The block that holds `step`: the current one while it does, else the next. `end == step` says that there are no data left.

        What the stream raises is raised here, with a note that names the batch.
        """
        current = self._current
        if current is not None and current.first <= step < current.end:
            return current
        self._get_model()
        began = time.perf_counter()
        if self._batch_bytes() > BLOCK_BYTES:
            self._current = current = None
        reading = self._ahead if self._ahead is not None and self._ahead.first == step else self._begin(step)
        try:
            block = reading.result()
        finally:
            self.wait_seconds += time.perf_counter() - began
        self._current, self._ahead = block, None
        large = self._batch_bytes() > BLOCK_BYTES
        if not large and block.end - block.first == self.length and (self._steps is None or block.end < self._steps):
            self._ahead = self._begin(block.end)
        return block

    def close(self) -> None:
        """Stop reading and end the thread. It is safe to call it twice."""
        self._closed = True
        if self._ahead is not None:
            self._ahead.thread.join(PATIENCE)
            self._ahead = None

    def _begin(self, first: int) -> _Reading:
        if self._ahead is not None:                 # a seek elsewhere: streams serve one call at a time
            self._ahead.thread.join()
        self._ahead = _Reading(self._read, first)
        return self._ahead

    def _batch_bytes(self) -> int:
        return max(1, sum(leaf.size * leaf.dtype.itemsize for _, leaf in self._get_model()))

    def _get_model(self) -> list[tuple[str, jax.ShapeDtypeStruct]]:
        """Names, shapes and dtypes of the leaves of batch 0, which all others must match."""
        if not self._model:
            batch = self._ask(0)
            leaves, self._treedef = jax.tree_util.tree_flatten_with_path(batch)
            model = [(jax.tree_util.keystr(path) or "(the batch itself)", np.asarray(leaf)) for path, leaf in leaves]
            if not model:
                raise ShapeError("data: batch 0 holds no arrays")
            for name, leaf in model:
                _check_dtype(f"data: leaf {name}", leaf.dtype)
            self._batch0 = jax.tree.unflatten(self._treedef, [leaf for _, leaf in model])
            self._model = [(name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)) for name, leaf in model]
        return self._model

    def _ask(self, step: int) -> PyTree:
        try:
            return jax.tree.map(dense, self._stream.batch(step))
        except Exception as error:
            error.add_note(f"while reading batch {step} of the data")
            raise

    def _read(self, first: int) -> Block:
        """Runs on the helper thread."""
        limit = first + self.length if self._steps is None else min(first + self.length, self._steps)
        arrays = [np.zeros((self.length, *leaf.shape), leaf.dtype) for _, leaf in self._model]
        end = first
        while end < limit and not self._closed:
            try:
                batch, self._batch0 = (self._batch0, None) if end == 0 and self._batch0 is not None else (self._ask(end), self._batch0)
            except EndOfData:
                break
            self._put(arrays, end - first, end, batch)
            end += 1
        with jax.default_device(self._device):
            placed = jax.device_put(arrays)
        return Block(jax.tree.unflatten(self._treedef, placed), first, end)

    def _put(self, arrays: list[np.ndarray], place: int, step: int, batch: PyTree) -> None:
        leaves, treedef = jax.tree.flatten(batch)
        if treedef != self._treedef:
            raise ShapeError(f"data: batch {step} has the structure {treedef}, and batch 0 had {self._treedef}")
        for (name, model), array, leaf in zip(self._model, arrays, map(np.asarray, leaves), strict=True):
            if leaf.shape != model.shape:
                raise ShapeError(f"data: batch {step}, leaf {name} has shape {leaf.shape}, and in batch 0 it was {model.shape}; "
                                 "all batches must have one shape")
            if leaf.dtype != model.dtype:
                raise PrecisionError(f"data: batch {step}, leaf {name} is {leaf.dtype}, and in batch 0 it was {model.dtype}")
            array[place] = leaf


class _Reading:
    """One block being read."""

    def __init__(self, read: Callable[[int], Block], first: int):
        self.first = first
        self._block: Block | None = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(read,), name="theorylab-reader", daemon=True)
        self.thread.start()

    def _run(self, read: Callable[[int], Block]) -> None:
        try:
            self._block = read(self.first)
        except BaseException as error:              # raised where the block is asked for
            self._error = error

    def result(self) -> Block:
        self.thread.join()
        if self._error is not None:
            raise self._error
        assert self._block is not None
        return self._block


# ---------------------------------------------------------------------------------------------------------------- sums


def fold(update: Callable[[A, Any], A], stream: Any, initial: A, *, passes: int = 1, progress: bool | Progress = False) -> A:
    """Carry `update(total, batch)` over a stream: any sum over data that do not fit, in one compile and with each row counted once.

    Rows that fill no batch (see `Rows`) are given to `update` at the end of each pass as a smaller batch, at the price of a second compile.

    Args:
        update: gives a total like the one it gets; pure, and compiled once if it is defined at module level.
        stream: a `Stream` or an iterable of batches.
        initial: the total before the first batch, a pytree of arrays.
        passes: passes over the data; more than one needs a stream that knows its length.
        progress: True for a bar, or an object that follows `Progress`.

    Returns:
        The total, as JAX arrays.

    Raises:
        ShapeError: `update` changes the structure, a shape or a dtype of the total, or batches differ in shape.
        PrecisionError: a 64-bit array is asked for while 64-bit mode is off.

    Example:
        >>> float(fold(lambda total, x: total + x.sum(), Rows(np.arange(10.0), 3), 0.0))
        45.0
    """
    source, passes, bar = as_stream(stream), whole_number("passes", passes, 1), resolve(progress)
    size = source.per_pass
    if size is None and passes > 1:
        raise ArgumentError(f"passes must be 1 for an iterator, which can be read once, got {passes}; use Rows")
    for path, leaf in jax.tree_util.tree_leaves_with_path(initial):
        if isinstance(leaf, np.ndarray):
            _check_dtype(f"initial{jax.tree_util.keystr(path)}", leaf.dtype)
    total = tree.strong(jax.tree.map(jnp.asarray, initial))
    bar.start("fold", None if size is None else passes * size)
    try:
        for number in range(passes):
            with BlockReader(source, None if size is None else (number + 1) * size) as reader:
                if number == 0:
                    _check_total(update, total, reader.first())
                reader.seek(number * (size or 0))
                block = reader.next()
                while block.end > block.first:
                    total = _add_block(update, total, block.arrays, np.int32(block.end - block.first))
                    bar.update(block.end)
                    block = reader.next()
            rest = source.left_over(number) if isinstance(source, Rows) else None
            if rest is not None:
                total = _add_one(update, total, jax.tree.map(jnp.asarray, rest))
    finally:
        bar.close()
    return total


@eqx.filter_jit
def _add_block(update: Callable, total: PyTree, block: PyTree, count: jax.Array | np.int32) -> PyTree:
    def one(i: jax.Array, total: PyTree) -> PyTree:
        return tree.strong(update(total, jax.tree.map(lambda leaf: leaf[i], block)))

    return jax.lax.fori_loop(0, count, one, total)


@eqx.filter_jit
def _add_one(update: Callable, total: PyTree, batch: PyTree) -> PyTree:
    return tree.strong(update(total, batch))


def _check_total(update: Callable, total: PyTree, batch: PyTree) -> None:
    after = jax.eval_shape(lambda t, b: tree.strong(update(t, b)), total, batch)
    if jax.tree.structure(after) != jax.tree.structure(total):
        raise ShapeError(f"update must give a total of the structure of initial, {jax.tree.structure(total)}, got {jax.tree.structure(after)}")
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(total), jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ShapeError(f"update must keep shape and dtype of the total{jax.tree_util.keystr(path)}: initial has {old.dtype}{list(old.shape)}, "
                             f"update gives {new.dtype}{list(new.shape)}")


def _check_dtype(name: str, dtype: np.dtype) -> None:
    if not (jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_):
        raise ArgumentError(f"{name} must hold numbers, got {dtype}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise PrecisionError(f"{name} is {dtype} and 64-bit mode is off: store it in 32 bits, or unset the environment variable JAX_ENABLE_X64 "
                             "before theorylab is imported")
