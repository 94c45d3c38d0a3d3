"""Results and checkpoints on disk: one `.npz` file with a JSON header, written atomically, read without pickle."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import structure
from theorylab.errors import ArgumentError, CheckpointMismatchError, ShapeError, StorageError

HEADER = "theorylab_header"
FORMAT = 1
_EPOCH = (1980, 1, 1, 0, 0, 0)                      # a fixed date: equal contents give equal bytes


# ---------------------------------------------------------------------------------------------------------------- arrays and a header


def write(path: str | Path, arrays: Mapping[str, Any], header: Mapping[str, Any]) -> Path:
    """Write named arrays and a JSON header to one uncompressed `.npz` file, whole or not at all.

    The bytes go to a temporary file in the same folder, are flushed to disk, and replace an older file in one step. Missing parent
    folders are made. Any NumPy program can read the arrays; typed keys are stored as their data, `bfloat16` and its kin as bits.

    Args:
        path: the file; the name is kept as it is.
        arrays: NumPy or JAX arrays, typed JAX keys included.
        header: what JSON can hold; NumPy scalars and tuples are converted.

    Raises:
        StorageError: no permission, no space, a folder in the way; an older file is left whole and no temporary file remains.
        ArgumentError: an array holds Python objects, or the header holds something that JSON cannot.

    Example:
        >>> import tempfile, pathlib
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = write(pathlib.Path(folder.name) / "a.npz", {"x": np.arange(3)}, {"step": 7})
        >>> arrays, header = read(file)
        >>> arrays["x"].tolist(), header
        ([0, 1, 2], {'step': 7})
        >>> folder.cleanup()
    """
    encoded, notes = {}, {}
    for name, array in arrays.items():
        if name == HEADER:
            raise ArgumentError(f"arrays: the name {HEADER!r} is taken by the header; choose another")
        encoded[name], notes[name] = _to_plain(name, array)
    text = _json({"theorylab": FORMAT, "arrays": notes, "header": dict(header)})
    encoded[HEADER] = np.frombuffer(text.encode(), np.uint8)
    return write_bytes(path, lambda file: _write_zip(file, encoded))


def write_bytes(path: str | Path, fill: Callable[[Any], None]) -> Path:
    """Let `fill` write into a binary file that takes the name `path` only when it is complete and on disk.

    Raises:
        StorageError: see `write`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise StorageError(f"{path} cannot be written: {_cause(error)}; an older file of that name is unchanged") from error
        raise
    _sync_folder(path.parent)
    return path


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the header of a file made by `write`. Typed keys come back as JAX keys, everything else as NumPy arrays.

    Every byte of content is verified against the checksum that was stored with it.

    Raises:
        StorageError: there is no such file, or it cannot be opened.
        CheckpointMismatchError: the file is damaged, cut short, or not made by theorylab.
    """
    with _opened(path) as archive:
        text = _parse_header(archive, path)
        return {name: _from_plain(_read_entry(archive, name), note) for name, note in text["arrays"].items()}, text["header"]


def read_header(path: str | Path) -> dict[str, Any]:
    """The header alone, without reading the arrays; errors as in `read`."""
    with _opened(path) as archive:
        return _parse_header(archive, path)["header"]


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """The archive, with every error that reading it can raise put into the words of this package."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            yield archive
    except CheckpointMismatchError:
        raise
    except Exception as error:                      # zipfile, numpy and json have their own words for a damaged file
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):      # EINVAL: a seek to a damaged address
            raise StorageError(f"{path} cannot be read: {_cause(error)}") from error
        raise CheckpointMismatchError(f"{path} is damaged or not a theorylab file: {error or type(error).__name__}; nothing was changed. "
                                      "Move it away or restore a copy") from error


def _cause(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where the system allows opening a folder."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_zip(file: Any, arrays: Mapping[str, np.ndarray]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as out:
                np.lib.format.write_array(out, array, allow_pickle=False)


def _read_entry(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    content = archive.read(f"{name}.npy")           # whole, so that the checksum is verified before the bytes are interpreted
    return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)


def _parse_header(archive: zipfile.ZipFile, path: str | Path) -> dict[str, Any]:
    if f"{HEADER}.npy" not in archive.namelist():
        found = ", ".join(archive.namelist()[:5]) or "nothing"
        raise CheckpointMismatchError(f"{path} was not made by theorylab: it has no header and holds {found}")
    text = json.loads(_read_entry(archive, HEADER).tobytes())
    if text.get("theorylab") != FORMAT:
        raise CheckpointMismatchError(f"{path} has format {text.get('theorylab')!r}, and this version of theorylab reads format {FORMAT}")
    missing = [name for name in text["arrays"] if f"{name}.npy" not in archive.namelist()]
    if missing:
        raise CheckpointMismatchError(f"{path} is damaged: its header names the array {missing[0]!r}, and the file does not hold it")
    return text


def _to_plain(name: str, array: Any) -> tuple[np.ndarray, dict[str, str]]:
    """`array` as NumPy saves it, and what is needed to undo the change."""
    if isinstance(array, jax.Array):
        if not array.is_fully_addressable:
            raise ArgumentError(f"arrays: {name!r} is spread over several processes; gather it first")
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return np.asarray(jax.random.key_data(array)), {"key": str(jax.random.key_impl(array))}
    plain = np.asarray(array)
    if plain.dtype.hasobject:
        raise ArgumentError(f"arrays: {name!r} holds Python objects ({type(array).__name__}); only numbers, strings and keys can be stored")
    if plain.dtype.kind == "V" and plain.dtype.names is None:
        return plain.view(f"u{plain.dtype.itemsize}"), {"bits": plain.dtype.name}
    return plain, {}


def _from_plain(array: np.ndarray, note: Mapping[str, str]) -> Any:
    if "key" in note:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=note["key"])
    if "bits" in note:
        return array.view(jnp.dtype(note["bits"]))
    return array


def _json(value: Any) -> str:
    def plain(item: Any) -> Any:
        if isinstance(item, np.generic) or (isinstance(item, (np.ndarray, jax.Array)) and item.size <= 4096):
            return np.asarray(item).tolist()
        if isinstance(item, Path):
            return str(item)
        raise ArgumentError(f"header holds {type(item).__name__} {item!r}, which JSON cannot store; use numbers, strings, lists and dicts")

    try:
        return json.dumps(value, default=plain)
    except TypeError as error:                      # keys that are not strings, complex numbers
        raise ArgumentError(f"header: {error}") from None


# ---------------------------------------------------------------------------------------------------------------- whole results


def save(path: str | Path, result: Any) -> Path:
    """Write a result (`Solution`, `Replicates`, or any pytree of arrays and theorylab classes) to one `.npz` file, atomically.

    Functions and classes are stored by name. What has no name (a lambda, a closure) is stored as text and does not come back.

    Raises:
        StorageError: the file cannot be written; an older file of that name is left whole.

    Example:
        >>> import tempfile, pathlib
        >>> folder = tempfile.TemporaryDirectory()
        >>> load(save(pathlib.Path(folder.name) / "r.npz", {"slope": -0.5, "sizes": (1, 2)}))
        {'slope': -0.5, 'sizes': (1, 2)}
        >>> folder.cleanup()
    """
    arrays: dict[str, Any] = {}
    described = structure.describe(result, arrays)
    return write(path, arrays, {"kind": "result", "class": type(result).__name__, "structure": described})


def load(path: str | Path) -> Any:
    """Read back what `save` wrote: a `Solution` with its history, status, statistics, provenance and method.

    Classes of theorylab and of the libraries below it are found by name. A class of another module comes back when that module has
    been imported and the class is a theorylab `Module` or a named tuple; otherwise its fields come back as a dict, with a warning.
    No code is taken from the file.

    Raises:
        StorageError: there is no such file, or it cannot be opened.
        CheckpointMismatchError: the file is damaged, or holds something other than a result.
        PrecisionError: the file holds 64-bit JAX arrays and 64-bit mode is off.
    """
    arrays, header = read(path)
    if header.get("kind") != "result":
        raise CheckpointMismatchError(f"{path} is a theorylab file of kind {header.get('kind')!r}, not a saved result; "
                                      "a checkpoint is resumed by passing it as checkpoint= to the same call")
    return structure.rebuild(header["structure"], arrays, str(path))


def to_pandas(history: Any) -> Any:
    """A history as a `pandas.DataFrame`: one line per valid row and run.

    Vector columns are spread over `name_0`, `name_1`, ...; matrices over `name_0_0`, `name_0_1`, .... With several runs the column
    `run` holds the index of the run.

    Raises:
        ShapeError: a column has another number of rows than the history.
    """
    import pandas as pd

    valid = np.asarray(history.valid, bool)
    where = np.nonzero(valid)
    frame: dict[str, np.ndarray] = {"run": where[1]} if valid.ndim == 2 else {}
    for name, values in {**history.axes, **history.columns}.items():
        column = np.asarray(values)
        if column.shape[:1] != valid.shape[:1]:
            raise ShapeError(f"history: {name!r} has shape {column.shape}, expected {valid.shape[0]} rows")
        frame.update(spread(name, column[where] if column.shape[: valid.ndim] == valid.shape else column[where[0]]))
    return pd.DataFrame(frame)


def spread(name: str, column: np.ndarray) -> dict[str, np.ndarray]:
    """A column with entries of any shape as columns of numbers.

    Example:
        >>> list(spread("x", np.zeros((3, 2))))
        ['x_0', 'x_1']
    """
    return {"_".join([name, *map(str, index)]): column[(slice(None), *index)] for index in np.ndindex(column.shape[1:])}
