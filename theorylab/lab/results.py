"""The cache of computed figure data: one `.npz` per figure and settings, keyed by everything that can change the numbers."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from theorylab import runtime
from theorylab.core import store
from theorylab.errors import ArgumentError, CheckpointMismatchError, RunWarning, StorageError
from theorylab.lab.files import jsonable

_KEEP = 3  # results of earlier settings or sources that stay per figure and preset


@functools.cache
def source_hash() -> str:
    """SHA-256 of the text of every Python file of the package, with its place in it."""
    import theorylab as tl

    root, total = Path(tl.__file__).resolve().parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def key(settings: Mapping[str, Any], source: str) -> str:
    """SHA-256 of the settings, the text of the figure's module, the text of the package, the versions, the devices and the precision."""
    facts = {"settings": jsonable(settings), "source": source, "package": source_hash(), "made_by": runtime.provenance()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def checked(who: str, data: Any) -> dict[str, np.ndarray]:
    """What `compute` returned, as a dictionary of plain NumPy arrays.

    Raises:
        ArgumentError: it is not a dictionary of arrays of numbers, truth values or text.
    """
    if not isinstance(data, Mapping) or not data:
        raise ArgumentError(f"compute of {who} must return a dictionary of arrays, got {type(data).__name__}{' without entries' * (data == {})}")
    arrays = {}
    for name, value in data.items():
        array = np.asarray(value)
        if not isinstance(name, str) or array.dtype.kind not in "fiubcUS":
            raise ArgumentError(f"compute of {who} returned {name!r} as {type(value).__name__}: expected a name with an array of numbers or text")
        arrays[name] = array
    return arrays


class Store:
    """The folder that holds results. A result that cannot be read is computed again; one that cannot be written costs a warning only."""

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder) if folder is not None else runtime.cache_folder() / "figures"

    def _path(self, name: str, preset: str, digest: str) -> Path:
        return self.folder / f"{name.replace('/', '--')}--{preset}--{digest[:16]}.npz"

    def __contains__(self, result: tuple[str, str, str]) -> bool:
        return self._path(*result).is_file()

    def load(self, name: str, preset: str, digest: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The arrays and the header stored for these settings; None where there are none, or where the file is damaged (with a warning)."""
        path = self._path(name, preset, digest)
        if not path.is_file():
            return None
        try:
            arrays, header = store.read(path)
            if header.get("key") != digest or "times" not in header:
                raise CheckpointMismatchError(f"{path} belongs to other settings")
            return arrays, header
        except (CheckpointMismatchError, StorageError) as error:
            warnings.warn(f"the stored result of {name} ({preset}) cannot be used and is computed again: {error}", RunWarning, stacklevel=2)
            return None

    def save(self, name: str, preset: str, digest: str, data: Mapping[str, np.ndarray], times: Mapping[str, float]) -> None:
        """Store a result, and drop the oldest results of the same figure and preset."""
        try:
            store.write(self._path(name, preset, digest), data, {"key": digest, "times": dict(times)})
            for old in self._all(name, preset)[_KEEP:]:
                old.unlink(missing_ok=True)
        except OSError as error:  # StorageError is one of them
            warnings.warn(f"the result of {name} ({preset}) is not kept for the next time: {error}", RunWarning, stacklevel=2)

    def _all(self, name: str, preset: str) -> list[Path]:
        """Results of a figure and preset, the newest first."""
        return sorted(self.folder.glob(f"{name.replace('/', '--')}--{preset}--*.npz"), key=lambda p: p.stat().st_mtime_ns, reverse=True)

    def seconds(self, name: str, preset: str) -> float | None:
        """How long the newest stored result took to compute, whatever its settings; None where nothing readable is stored."""
        for path in self._all(name, preset):
            try:
                return float(store.read_header(path)["times"]["seconds"])
            except (CheckpointMismatchError, StorageError, KeyError, TypeError, ValueError):
                continue
        return None
