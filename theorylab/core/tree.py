"""Sums, norms and tests over the array leaves of a pytree."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from theorylab.errors import NonFiniteInputError

PyTree = Any


def inexact_leaves(tree: PyTree) -> list[jax.Array]:
    """The floating-point and complex leaves of `tree`, in order."""
    return [a for a in jax.tree.leaves(tree) if eqx.is_inexact_array(a)]


def inner(a: PyTree, b: PyTree) -> jax.Array:
    """Sum over all entries of `a * b`, real part for complex trees."""
    terms = [jnp.vdot(x, y).real for x, y in zip(inexact_leaves(a), inexact_leaves(b), strict=True)]
    return sum(terms[1:], start=terms[0]) if terms else jnp.zeros(())  # no zero to start from: it would turn float32 into float64


def norm(tree: PyTree) -> jax.Array:
    """Euclidean norm of all floating-point entries.

    Example:
        >>> float(norm({"a": jnp.array([3.0]), "b": jnp.array(4.0)}))
        5.0
    """
    return jnp.sqrt(inner(tree, tree))


def finite(tree: PyTree) -> jax.Array:
    """Whether every floating-point entry is finite; a scalar boolean array."""
    tests = [jnp.isfinite(a).all() for a in inexact_leaves(tree)]
    return jnp.stack(tests).all() if tests else jnp.asarray(True)


def select(where: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where `where` holds, else `old`; `where` has the leading axes of the leaves. Leaves that are not arrays come from `new`."""

    def pick(a: Any, b: Any) -> Any:
        if not eqx.is_array(a):
            return a
        return jnp.where(where.reshape(where.shape + (1,) * (a.ndim - where.ndim)), a, b)

    return jax.tree.map(pick, new, old)


def strong(tree: PyTree) -> PyTree:
    """Drop weak types, so that a second call with the outputs of the first one does not compile again."""
    return jax.tree.map(lambda a: jax.lax.convert_element_type(a, a.dtype) if eqx.is_array(a) and getattr(a, "weak_type", False) else a, tree)


def is_traced(*trees: PyTree) -> bool:
    """Whether any leaf is a tracer, or the caller is being compiled (then even constants are staged)."""
    return any(isinstance(a, Tracer) for a in jax.tree.leaves(trees)) or isinstance(jnp.add(0, 0), Tracer)


def check_finite(name: str, tree: PyTree) -> PyTree:
    """Return `tree`; raise `NonFiniteInputError` naming the argument and the first bad entry. Tracers are not checked."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, Tracer) or not eqx.is_inexact_array_like(leaf):
            continue
        good = np.isfinite(np.asarray(leaf))
        if not good.all():
            where = tuple(int(i) for i in np.argwhere(~good)[0])
            raise NonFiniteInputError(f"{name}{jax.tree_util.keystr(path)} must be finite, got {np.asarray(leaf)[where]} at index {where} "
                                      f"({int((~good).sum())} of {good.size} entries are not finite)")
    return tree
