"""Checkpoints: one atomic file holding all that a run needs to go on, with a fingerprint that refuses a foreign file."""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import store
from theorylab.core.kernel import bind
from theorylab.errors import CheckpointMismatchError

PyTree = Any
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def to_numpy(leaf: Any) -> np.ndarray:
    """A leaf as NumPy; a typed random key becomes its data."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def like(template: jax.Array, data: np.ndarray) -> jax.Array:
    """`data` as a JAX array of the kind and placement of `template`."""
    if jnp.issubdtype(template.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(template))
    return jax.device_put(jnp.asarray(data, template.dtype), template.sharding)


def fingerprint(*parts: PyTree) -> str:
    """A hash of structure, static values and array contents; equal across processes, different for another problem.

    Callables count by their qualified name, so a lambda in place of another at the same spot is not told apart.
    """
    digest = hashlib.sha256()
    for part in parts:
        arrays, static = bind(part)
        names = [None if kept is None else (getattr(kept[1], "__qualname__", None) or repr(kept[1])) for kept in static.rest]
        digest.update(_ADDRESS.sub("", f"{static.treedef}|{names}").encode())
        for array in map(to_numpy, arrays):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.hexdigest()


class Checkpoint:
    """The file of one run.

    Args:
        path: where the file lies; its folder must exist or be creatable.
        run: fingerprint of problem, method, start and recording; a file with another one is refused.
        goal: fingerprint of the stop rule; a file with another one is continued under the new rule.
    """

    KIND = "theorylab iterate checkpoint"

    def __init__(self, path: str | Path, run: str, goal: str):
        self.path, self.run, self.goal = Path(path), run, goal
        self._saved_at, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time to write: at most one second in twenty goes into writing, and never more often than every two seconds."""
        return time.monotonic() - self._saved_at > max(2.0, 20 * self._cost)

    def write(self, leaves: list[Any], history: dict[str, np.ndarray], seconds: float) -> None:
        """Write the file; an older one is replaced only by a whole new one."""
        began = time.monotonic()
        arrays = {f"leaf:{i}": to_numpy(leaf) for i, leaf in enumerate(leaves)}
        arrays |= {f"history:{name}": column for name, column in history.items()}
        store.write(self.path, arrays, {"kind": self.KIND, "run": self.run, "goal": self.goal, "seconds": seconds})
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - began

    def read(self, template: list[jax.Array]) -> tuple[list[jax.Array], dict[str, np.ndarray], float, bool] | None:
        """Leaves, history, seconds spent and whether the stop rule is the same; None if there is no file.

        Raises:
            CheckpointMismatchError: the file is damaged or belongs to another run. It is left as it is.
        """
        if not self.path.exists():
            return None
        arrays, header = store.read(self.path)
        if header.get("kind") != self.KIND:
            kind = header.get("kind", "a file of another kind")
            raise CheckpointMismatchError(f"checkpoint {self.path} is not a checkpoint of iterate but {kind!r}; "
                                          "name another file, it was left as it is")
        if header.get("run") != self.run:
            raise CheckpointMismatchError(f"checkpoint {self.path} belongs to another run: problem, method, x0, key, runs, record and every must be "
                                          "those of the run that wrote it; pass them, or name another file. It was left as it is")
        data = [arrays.get(f"leaf:{i}") for i in range(len(template))]
        key_shape = [to_numpy(t).shape for t in template]
        if any(d is None or d.shape != s for d, s in zip(data, key_shape, strict=True)):
            raise CheckpointMismatchError(f"checkpoint {self.path} does not hold the state that this method makes; it was left as it is")
        leaves = [like(t, d) for t, d in zip(template, data, strict=True) if d is not None]
        history = {name.removeprefix("history:"): column for name, column in arrays.items() if name.startswith("history:")}
        return leaves, history, float(header["seconds"]), header.get("goal") == self.goal
