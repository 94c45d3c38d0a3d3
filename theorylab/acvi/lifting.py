"""Slack lifting: a polyhedron A x <= b becomes A x + s = b with s >= 0, so that every prox of the barrier is closed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi.constraints import Free, Nonnegative
from theorylab.acvi.equality import MatrixFree
from theorylab.acvi.prox import like
from theorylab.acvi.sets_general import Polyhedron, Product
from theorylab.core import checks
from theorylab.errors import ArgumentError

Array = jax.Array


@dataclass(frozen=True)
class Extended:
    """An operator extended by 0 over slack variables."""

    function: Callable
    dim: int

    def __call__(self, z: Array, args: Any) -> Array:
        return jnp.zeros_like(z).at[: self.dim].set(self.function(z[: self.dim], args))


def lift(problem: Any) -> dict[str, Any]:
    """Constraints, equality, solution and start of the lifted problem, and its number of slacks."""
    K, E = problem.constraints, problem.equality
    if not isinstance(K, Polyhedron) or isinstance(E, MatrixFree):
        raise ArgumentError("lifted needs Polyhedron constraints" + (" and an equality with a matrix" if isinstance(K, Polyhedron) else
                                                                    f", got {type(K).__name__}, whose prox is closed already or no polyhedron's"))
    m, n = K.A.shape
    rows, level = E.normal_rows()
    C = jnp.block([[K.A, jnp.eye(m, dtype=K.A.dtype)], [like(rows, K.A), jnp.zeros((rows.shape[0], m), K.A.dtype)]])
    kept = np.asarray(jnp.any(C != 0, axis=1)) if checks.known(C) else slice(None)
    extend = lambda x: None if x is None else jnp.concatenate([x, like(K.b, x) - like(K.A, x) @ x])  # noqa: E731
    return {"constraints": Product([(Free(), n), (Nonnegative(), m)]), "equality": (C[kept], jnp.concatenate([K.b, like(level, K.b)])[kept]),
            "solution": extend(problem.solution), "x0": extend(problem.x0), "slacks": m}
