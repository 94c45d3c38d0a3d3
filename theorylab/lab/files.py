"""Files of the laboratory: atomic writes, JSON without surprises, folders of a source checkout, modules loaded by path."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from theorylab.core.store import write_bytes
from theorylab.errors import StorageError


def write_atomic(path: str | Path, content: bytes | str) -> Path:
    """Write a whole file or leave the old one as it was; folders on the way are made.

    Raises:
        StorageError: the folder cannot be written, or the disk is full; the message names the file and the reason.
    """
    return write_bytes(path, lambda file: file.write(content.encode() if isinstance(content, str) else content))


def jsonable(value: Any) -> Any:
    """The nearest value that JSON can hold: arrays become lists, NaN and infinity become text, functions their names.

    Example:
        >>> jsonable({"a": np.arange(2), "b": float("inf"), "c": (1, None)})
        {'a': [0, 1], 'b': 'inf', 'c': [1, None]}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return jsonable(np.asarray(value).tolist())
    if isinstance(value, (list, tuple, range)):
        return [jsonable(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(v) for v in value), key=str)
    if isinstance(value, Path):
        return value.name
    return getattr(value, "__qualname__", None) or str(value)


def to_json(value: Any) -> str:
    """Indented JSON text, strictly within the standard."""
    return json.dumps(jsonable(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def checkout_folder(name: str) -> Path:
    """The folder `name` of the source checkout: beside the package, else in the current folder.

    Raises:
        StorageError: it is in neither place; the message says where it looked.
    """
    import theorylab as tl

    places = list(dict.fromkeys([Path(tl.__file__).resolve().parent.parent / name, Path.cwd() / name]))
    for place in places:
        if place.is_dir():
            return place
    raise StorageError(f"no folder {name!r} was found; looked for {' and '.join(map(str, places))}; run from a source checkout of theorylab")


def load_module(path: Path) -> ModuleType:
    """The module in the file `path`, executed once per process however often it is asked for."""
    path = path.resolve()
    name = f"{path.parent.name}.{path.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise StorageError(f"{path} is not a Python file that can be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def blame(error: BaseException) -> str:
    """One line about an exception: its class, its message, and the file and line that raised it (no folders)."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}: {error}{where}"
