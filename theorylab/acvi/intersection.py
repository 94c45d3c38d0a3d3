"""The feasible set of a problem, inequalities and equations together: projection, support function and repair, exact by class of the two."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi import projections
from theorylab.acvi.cones import Cone
from theorylab.acvi.constraints import Ball, Box, ConstraintSet, Free, HalfSpace, Nonnegative
from theorylab.acvi.equality import BlockSimplex, Equality, MatrixFree, NoEquality
from theorylab.acvi.prox import like
from theorylab.acvi.sets_general import Curved, Polyhedron, Product, nearest, support_over
from theorylab.errors import ArgumentError, NoClosedFormError

Array = jax.Array


def is_simplex(K: ConstraintSet, E: Equality) -> bool:
    """Whether the two make a product of simplices."""
    return isinstance(K, Nonnegative) and isinstance(E, BlockSimplex)


def has_closed_support(K: ConstraintSet, E: Equality) -> bool:
    """Whether the class of the two makes the set bounded with a support function in closed form."""
    if isinstance(E, NoEquality):
        return K.bounded and not _has(K, Curved)
    return is_simplex(K, E) or isinstance(K, Ball) or (isinstance(K, Box) and K.bounded and isinstance(E, BlockSimplex))


def _per_block(E: BlockSimplex, function: Any, *vectors: Array) -> list[Array]:
    """`function(*blocks, total)` for every block; one batched call if the blocks have one size."""
    totals = like(E.totals, vectors[0])
    if len(set(E.sizes)) == 1:
        shaped = [v.reshape(len(E.sizes), -1) for v in vectors]
        return list(jax.vmap(function)(*shaped, totals))
    return [function(*blocks, total) for *blocks, total in zip(*[E.split(v) for v in vectors], totals, strict=True)]


def _walls(K: Box, v: Array) -> tuple[Array, Array]:
    low, high = (-jnp.inf if K.lower is None else K.lower), (jnp.inf if K.upper is None else K.upper)
    return jnp.broadcast_to(like(low, v), v.shape), jnp.broadcast_to(like(high, v), v.shape)


def _disc(K: Ball, E: Equality, v: Array) -> tuple[Array, Array]:
    """Center and radius of a ball cut by equations."""
    center, radius = jnp.broadcast_to(like(K.center, v), v.shape), like(K.radius, v)
    moved = E.project(center)
    return moved, jnp.sqrt(jnp.maximum(radius**2 - jnp.sum((moved - center) ** 2), 0))


def _has(K: ConstraintSet, kind: type) -> bool:
    """Whether the set, or a block of it, is of this class."""
    return isinstance(K, kind) or (isinstance(K, Product) and any(_has(member, kind) for member in K.sets))


@jax.jit
def project(K: ConstraintSet, E: Equality, v: Array) -> Array:
    """The nearest point of K with the equations E.

    Closed forms for no equation, simplices, boxes with block sums and balls; primal-dual Newton for polyhedra and smooth sets; semismooth
    Newton on the multipliers of the equations for other sets with a closed projection; Dykstra's algorithm for cones and equations without a
    matrix.
    """
    if isinstance(E, NoEquality):
        return K.project(v)
    if isinstance(K, Free):
        return E.project(v)
    if isinstance(E, BlockSimplex) and isinstance(K, Nonnegative):
        return jnp.concatenate(_per_block(E, projections.simplex, v))
    if isinstance(E, BlockSimplex) and isinstance(K, Box):
        return jnp.concatenate(_per_block(E, projections.box_sum, v, *_walls(K, v)))
    if isinstance(K, Ball):
        return Ball(*_disc(K, E, v)).project(E.project(v))
    if isinstance(E, MatrixFree) or _has(K, Cone):
        return projections.dykstra([K.project, E.project], v)
    if _has(K, Curved):
        return nearest(K, v, 0.0, *E.normal_rows())
    return projections.dual_newton(K.project, v, *E.normal_rows())


def check_nonempty(K: ConstraintSet, E: Equality) -> None:
    """Refuse inequalities and equations without a common point, and warn if none is strictly inside; a linear program, for affine sets and balls.

    Raises:
        ArgumentError: they contradict each other.
    """
    if isinstance(E, (NoEquality, MatrixFree)) or is_simplex(K, E) or not isinstance(K, (Nonnegative, Box, HalfSpace, Polyhedron, Ball)):
        return
    point = E.point
    if isinstance(K, Ball):
        depth = float(K.radius - jnp.linalg.norm(E.project(jnp.broadcast_to(like(K.center, point), point.shape)) - K.center))
    else:
        from scipy.optimize import linprog

        n = point.shape[0]
        at = np.asarray(jax.vmap(K.inequalities)(jnp.concatenate([jnp.zeros((1, n), point.dtype), jnp.eye(n, dtype=point.dtype)])), float)
        walls, offsets = (at[1:] - at[0]).T, -at[0]
        rows, level = (np.asarray(part, float) for part in E.normal_rows())
        kept = np.abs(rows).max(axis=1) > 0
        lengths = np.linalg.norm(walls, axis=1)  # x in the set, and a ball of radius `depth` around it, at most 1
        program = linprog(np.append(np.zeros(n), -1.0), A_ub=np.c_[walls, lengths], b_ub=offsets, A_eq=np.c_[rows, np.zeros(len(rows))][kept],
                          b_eq=level[kept], bounds=[(None, None)] * n + [(None, 1.0)])
        if program.status not in (0, 2):
            return
        depth = -np.inf if program.status == 2 else float(program.x[-1])
    margin = float(jnp.finfo(point.dtype).eps) ** 0.5 * (1 + float(jnp.linalg.norm(point)))
    if depth < -margin:
        raise ArgumentError(f"constraints and equality have no common point: the best point violates an inequality by {-depth:.3g}")
    if depth <= 0:
        warnings.warn("no point of the equality is strictly inside the constraints: the barrier has no central path, no guarantee", stacklevel=5)


def _fill(s: Array, low: Array, high: Array, total: Array) -> Array:
    """The maximum of <s, x> over a box with a given sum: the largest entries of s are filled first."""
    order = jnp.argsort(-s)
    room = (high - low)[order]
    taken = jnp.clip(total - jnp.sum(low) - (jnp.cumsum(room) - room), 0, room)
    return s @ low + s[order] @ taken


@jax.jit
def support(K: ConstraintSet, E: Equality, s: Array) -> Array:
    """The support function of K with the equations E at `s`.

    Raises:
        NoClosedFormError: a cone with equations, or equations without a matrix (unless K is a ball).
    """
    if isinstance(E, NoEquality):
        return K.support(s)
    if is_simplex(K, E) and isinstance(E, BlockSimplex):
        return jnp.sum(jnp.stack(_per_block(E, lambda block, total: total * jnp.max(block), s)))
    if isinstance(E, BlockSimplex) and isinstance(K, Box) and K.bounded:
        return jnp.sum(jnp.stack(_per_block(E, _fill, s, *_walls(K, s))))
    if isinstance(K, Ball):
        center, radius = _disc(K, E, s)
        return s @ center + radius * jnp.linalg.norm(E.null(s))
    if isinstance(E, MatrixFree) or _has(K, Cone):
        kind = "equations without a matrix" if isinstance(E, MatrixFree) else "a cone with equations"
        raise NoClosedFormError(f"the support function over {type(K).__name__} is not available for {kind}; judge by natural_residual")
    return support_over(K, s, *E.normal_rows())


@jax.jit
def repair(K: ConstraintSet, E: Equality, x: Array) -> Array:
    """A feasible point near `x`: simplices are clipped at 0 and rescaled, other sets projected onto."""
    if not (is_simplex(K, E) and isinstance(E, BlockSimplex)):
        return project(K, E, x)

    def rescale(block: Array, total: Array) -> Array:
        positive = jnp.maximum(block, 0)
        mass = jnp.sum(positive)
        return jnp.where(mass > 0, total * (positive / jnp.where(mass > 0, mass, jnp.ones_like(mass))), total / block.shape[0])

    return jnp.concatenate(_per_block(E, rescale, x))
