"""General convex sets: polyhedra, smooth inequalities, and products of sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.acvi.constraints import ConstraintSet
from theorylab.acvi.functions import as_call
from theorylab.acvi.projections import interior_newton
from theorylab.acvi.prox import like
from theorylab.core import checks
from theorylab.core.module import choice
from theorylab.errors import ArgumentError, ShapeError

Array = jax.Array
PHASE_ONE_WEIGHTS = (1.0, 1e2, 1e4, 1e6)


@jax.jit
def nearest(K: ConstraintSet, v: Array, t: Any, rows: Array, level: Array) -> Array:
    """The prox of the barrier of K at weight `t` (0: the projection) over the part of K where the orthonormal `rows` give `level`."""
    start = like(K.interior_point(v.shape[0]), v)
    y, _, _ = interior_newton(K.inequalities, *_derivatives(K), start=start, rows=like(rows, v), level=like(level, v), t=t, center=v)
    return y


@jax.jit
def support_over(K: ConstraintSet, s: Array, rows: Array, level: Array) -> Array:
    """The support function of the part of K where the orthonormal `rows` give `level`, by the primal-dual Newton iteration.

    The value is that of the dual, at least the maximum; infinity if the iteration does not converge, as for an unbounded direction.
    """
    start = like(K.interior_point(s.shape[0]), s)
    size = jnp.maximum(jnp.linalg.norm(s), jnp.finfo(s.dtype).tiny)
    y, u, error = interior_newton(K.inequalities, *_derivatives(K), start=start, rows=like(rows, s), level=like(level, s), slope=-s / size)
    surplus = u @ -K.inequalities(y)  # the duality gap: the maximum is at most this much above the value at y
    return jnp.where(error <= jnp.finfo(s.dtype).eps ** 0.5, s @ y + size * surplus, like(jnp.inf, s))


def _derivatives(K: ConstraintSet) -> tuple[Callable, Callable | None]:
    """The Jacobian of the inequalities of K, and the Hessian of their weighted sum unless they are affine."""
    if isinstance(K, Polyhedron):
        return lambda x: like(K.A, x), None
    curvature = None if K.straight else lambda y, u: jax.hessian(lambda z: u @ K.inequalities(z))(y)
    return jax.jacfwd(K.inequalities), curvature


def no_rows(v: Array) -> tuple[Array, Array]:
    """An empty system of equations for points like `v`."""
    return jnp.zeros((0, v.shape[0]), v.dtype), jnp.zeros((0,), v.dtype)


class Curved(ConstraintSet):
    """A set that is known through its inequalities only; prox and projection are damped primal-dual Newton iterations."""

    def prox(self, v: Array, t: Any) -> Array:
        return nearest(self, v, t, *no_rows(v))

    def project(self, v: Array) -> Array:
        return jnp.where(jnp.all(self.inequalities(v) <= 0), v, self.prox(v, 0.0))

    def support(self, s: Array) -> Array:
        return support_over(self, s, *no_rows(s))


class Polyhedron(Curved):
    """The polyhedron A x <= b, with an interior. `problem.lifted()` gives the form with closed proxes.

    Args:
        A: shape `(m, n)`, without zero rows.
        b: shape `(m,)`.

    Raises:
        ShapeError: shapes that do not match.
        ArgumentError: a row of A is 0, or no point is strictly inside.

    Example:
        >>> Polyhedron(jnp.array([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]), jnp.array([1.0, 0.0, 0.0])).project(jnp.array([1.0, 1.0])).round(9).tolist()
        [0.5, 0.5]
    """

    A: Array
    b: Array
    inside: Any

    def __init__(self, A: Any, b: Any):
        self.A = checks.array("Polyhedron A", A, (None, None))
        self.b = like(checks.array("Polyhedron b", b, (self.A.shape[0],)), self.A)
        lengths = jnp.linalg.norm(self.A, axis=1)
        if checks.known(A, b) and not bool(jnp.all(lengths > 0)):
            raise ArgumentError(f"Polyhedron: row {int(jnp.argmin(lengths))} of A is 0")
        self.inside, depth = _centre(self.A, self.b, lengths)
        if checks.known(A, b) and not float(depth) > 0:
            raise ArgumentError("Polyhedron: no point satisfies A x < b strictly; the set needs an interior (put equations into equality=)")

    def replace(self, **changes: Any) -> Polyhedron:
        """A copy with another A or b, and a new inner point."""
        return Polyhedron(**{"A": self.A, "b": self.b, **changes})

    @property
    def dim(self) -> int | None:
        return self.A.shape[1]

    @property
    def straight(self) -> bool:
        return True

    def inequalities(self, x: Array) -> Array:
        return like(self.A, x) @ x - like(self.b, x)

    def interior_point(self, dim: int | None = None) -> Array:
        return self.inside


@jax.jit
def _centre(A: Array, b: Array, lengths: Array) -> tuple[Array, Array]:
    """A deep point of A x <= b and its distance to the nearest wall: the largest ball, of radius at most 1 unit of the data."""
    n = A.shape[1]
    scaled, offsets = A / lengths[:, None], b / lengths
    unit = 1 + jnp.max(jnp.abs(offsets))
    rows = jnp.concatenate([scaled, jnp.ones_like(lengths)[:, None]], axis=1)
    cap = jnp.zeros((1, n + 1), A.dtype).at[0, n].set(1.0)
    G, h = jnp.concatenate([rows, cap]), jnp.concatenate([offsets, unit[None]])
    start = jnp.zeros(n + 1, A.dtype).at[n].set(jnp.min(offsets, initial=jnp.inf) - unit)
    # the quadratic term keeps the point near 0 along directions in which the set is unbounded
    rows, level = no_rows(start)
    y, _, _ = interior_newton(lambda z: G @ z - h, lambda z: G, None, start=start, rows=rows, level=level,
                              center=jnp.zeros_like(start).at[n].set(1e3 * unit))
    return y[:n], jnp.min(offsets - scaled @ y[:n], initial=jnp.inf)


class Smooth(Curved):
    """The set where every entry of a smooth convex function is at most 0.

    Args:
        function: `function(x, args)` or `function(x)`, a number or a vector of shape `(m,)`; convex, defined near the set. A trial point where
            it is not finite counts as outside.
        args: arrays handed to the function.
        inside: a point strictly inside; searched for when the set joins a problem unless given.

    Raises:
        ArgumentError: the point given is not strictly inside, or none is found.

    Example:
        >>> disc = Smooth(lambda x, a: x @ x - 1.0, inside=jnp.zeros(2))
        >>> disc.project(jnp.array([3.0, 4.0])).round(6).tolist()
        [0.6, 0.8]
    """

    function: Callable = choice()
    args: Any = ()
    inside: Any = None

    def __init__(self, function: Callable, args: Any = (), inside: Any = None):
        if not callable(function):
            raise ArgumentError(f"Smooth: function must be a function of (x, args), got {function!r}")
        self.function, self.args = as_call(function), args
        self.inside = None if inside is None else checks.array("Smooth inside", inside, (None,))
        if inside is not None and checks.known(inside, args) and not bool(jnp.all(self.inequalities(self.inside) < 0)):
            worst = float(jnp.max(self.inequalities(self.inside)))
            raise ArgumentError(f"Smooth: the point inside must make the function negative, got {worst:g}")

    @property
    def dim(self) -> int | None:
        return None if self.inside is None else self.inside.shape[0]

    def inequalities(self, x: Array) -> Array:
        return jnp.atleast_1d(self.function(x, self.args))

    def bind(self, dim: int) -> ConstraintSet:
        super().bind(dim)
        shape = jax.eval_shape(self.inequalities, jax.ShapeDtypeStruct((dim,), jnp.result_type(float)))
        if len(shape.shape) != 1:
            raise ShapeError(f"Smooth: function must return a number or a vector, got shape {shape.shape}")
        return self if self.inside is not None else Smooth(self.function, self.args, self._search(dim))

    def interior_point(self, dim: int | None = None) -> Array:
        return self._search(self._size(dim)) if self.inside is None else self.inside

    def _search(self, dim: int) -> Array:
        """A point strictly inside, refused if none is found."""
        z = _phase_one(self, dim)
        worst = jnp.max(self.inequalities(z[:-1]))
        if checks.known(worst) and not float(worst) < 0:
            raise ArgumentError(f"Smooth: no point strictly inside was found (the best makes the function {float(worst):.3g}); pass inside=")
        return z[:-1]


@partial(jax.jit, static_argnames="dim")
def _phase_one(K: Smooth, dim: int) -> Array:
    """Minimise |x|^2 / 2 plus a growing weight times the largest inequality, as a problem in (x, bound), until a point is strictly inside."""
    lifted = lambda z: K.inequalities(z[:-1]) - z[-1]  # noqa: E731
    first = jnp.zeros(dim + 1, jnp.result_type(float))
    rows, level = no_rows(first)

    def search(z: Array, weight: Array) -> tuple[Array, None]:
        worst = jnp.max(K.inequalities(z[:-1]))
        new, _, _ = interior_newton(lifted, jax.jacfwd(lifted), lambda y, u: jax.hessian(lambda q: u @ lifted(q))(y), start=z.at[-1].set(worst + 1.0),
                                    rows=rows, level=level, center=jnp.zeros_like(z).at[-1].set(-weight))
        return jnp.where(worst < 0, z, new), None

    return lax.scan(search, first, jnp.asarray(PHASE_ONE_WEIGHTS, first.dtype))[0]


class Product(ConstraintSet):
    """Consecutive blocks of coordinates, each in its own set.

    Args:
        blocks: pairs `(set, size)`; a set that has a dimension of its own may stand alone.

    Raises:
        ArgumentError: a block is something else.
        ShapeError: the size of a block is not the dimension of its set.

    Example:
        >>> from theorylab.acvi import Ball, Nonnegative
        >>> Product([(Ball(0.0, 1.0), 2), (Nonnegative(), 1)]).project(jnp.array([3.0, 4.0, -1.0])).tolist()
        [0.6, 0.8, 0.0]
    """

    sets: tuple[ConstraintSet, ...]
    sizes: tuple[int, ...] = choice()

    def __init__(self, blocks: Sequence[tuple[ConstraintSet, int]]):
        if isinstance(blocks, Sequence):
            blocks = [(b, b.dim) if isinstance(b, ConstraintSet) and b.dim is not None else b for b in blocks]
        if not isinstance(blocks, Sequence) or not blocks or not all(isinstance(b, (tuple, list)) and len(b) == 2 for b in blocks):
            raise ArgumentError(f"Product: blocks must be a sequence of pairs (set, size), got {blocks!r}")
        for member, _ in blocks:
            if not isinstance(member, ConstraintSet):
                raise ArgumentError(f"Product: each block begins with a constraint set, got {member!r}")
        self.sizes = tuple(checks.whole("Product size", size, low=1) for _, size in blocks)
        self.sets = tuple(member.bind(size) for (member, _), size in zip(blocks, self.sizes, strict=True))

    def replace(self, **changes: Any) -> Product:
        """A copy with other blocks."""
        return Product(**{"blocks": list(zip(self.sets, self.sizes, strict=True)), **changes})

    @property
    def dim(self) -> int | None:
        return sum(self.sizes)

    @property
    def bounded(self) -> bool:
        return all(member.bounded for member in self.sets)

    @property
    def straight(self) -> bool:
        return all(member.straight for member in self.sets)

    def split(self, x: Array) -> list[Array]:
        """The blocks of `x`."""
        ends = np.cumsum(self.sizes)
        return [x[end - size: end] for end, size in zip(ends, self.sizes, strict=True)]

    def inequalities(self, x: Array) -> Array:
        return jnp.concatenate([member.inequalities(part) for member, part in zip(self.sets, self.split(x), strict=True)])

    def prox(self, v: Array, t: Any) -> Array:
        weights = self.split(jnp.asarray(t)) if jnp.ndim(t) else [t] * len(self.sets)
        return jnp.concatenate([member.prox(part, w) for member, part, w in zip(self.sets, self.split(v), weights, strict=True)])

    def project(self, v: Array) -> Array:
        return jnp.concatenate([member.project(part) for member, part in zip(self.sets, self.split(v), strict=True)])

    def barrier_gradient(self, y: Array) -> Array:
        return jnp.concatenate([member.barrier_gradient(part) for member, part in zip(self.sets, self.split(y), strict=True)])

    def violation(self, x: Array) -> Array:
        return jnp.linalg.norm(jnp.stack([member.violation(part) for member, part in zip(self.sets, self.split(x), strict=True)]))

    def support(self, s: Array) -> Array:
        return jnp.sum(jnp.stack([member.support(part) for member, part in zip(self.sets, self.split(s), strict=True)]))

    def interior_point(self, dim: int | None = None) -> Array:
        parts = [member.interior_point(size) for member, size in zip(self.sets, self.sizes, strict=True)]
        return jnp.concatenate([jnp.asarray(part, jnp.result_type(*parts)) for part in parts])

    def barrier_terms(self, dim: int | None = None) -> int:
        return sum(member.barrier_terms(size) for member, size in zip(self.sets, self.sizes, strict=True))
