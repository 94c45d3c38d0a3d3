"""Convex sets with closed proximal maps of their log barriers: half-lines, boxes, halfspaces and balls."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi import prox as scalar
from theorylab.acvi.prox import like
from theorylab.core import checks
from theorylab.core.module import Module, number
from theorylab.errors import ArgumentError, NoClosedFormError, ShapeError

Array = jax.Array


def _length(value: Any) -> int | None:
    return None if value is None or np.ndim(value) == 0 else np.shape(value)[-1]


def _default() -> Any:
    return jnp.result_type(float)


def safe_norm(x: Array) -> Array:
    """Euclidean norm whose derivative at 0 is 0."""
    square = jnp.sum(x * x)
    zero = square == 0
    return jnp.where(zero, jnp.zeros_like(square), jnp.sqrt(jnp.where(zero, jnp.ones_like(square), square)))


class ConstraintSet(Module):
    r"""The contract of a constraint set $\{x : \varphi_i(x) \le 0\}$ with its log barrier $B(x) = -\sum_i \log(-\varphi_i(x))$.

    Points are vectors of shape `(n,)`; batches go through `jax.vmap`. The precision follows the point.
    """

    @property
    def dim(self) -> int | None:
        """Number of coordinates, or None if the set exists in every dimension."""
        return None

    @property
    def bounded(self) -> bool:
        """Whether the class of the set (never its values) makes it bounded, so that its support function is finite."""
        return False

    @property
    def straight(self) -> bool:
        """Whether all inequalities are affine."""
        return False

    def inequalities(self, x: Array) -> Array:
        r"""The values $\varphi_i(x)$, shape `(m,)`; all are negative strictly inside."""
        raise NotImplementedError(f"{type(self).__name__} must define inequalities(x)")

    def prox(self, v: Array, t: Any) -> Array:
        r"""$\arg\min_y t B(y) + |y - v|^2 / 2$, strictly inside; `t` is `mu / penalty`, and 0 gives the projection."""
        raise NotImplementedError(f"{type(self).__name__} must define prox(v, t)")

    def project(self, v: Array) -> Array:
        """The nearest point of the set."""
        raise NotImplementedError(f"{type(self).__name__} must define project(v)")

    def support(self, s: Array) -> Array:
        r"""The support function $\sigma(s) = \max_{x} \langle s, x\rangle$ over the set; infinite where the set is unbounded along `s`."""
        raise NoClosedFormError(f"{type(self).__name__} has no support function in closed form")

    def interior_point(self, dim: int | None = None) -> Array:
        """A point strictly inside; `dim` is needed if the set exists in every dimension."""
        raise NotImplementedError(f"{type(self).__name__} must define interior_point(dim)")

    def barrier_terms(self, dim: int | None = None) -> int:
        """The number m of terms of the barrier; the gap on the central path is at most m times mu."""
        shape = jax.ShapeDtypeStruct((self._size(dim),), _default())
        return jax.eval_shape(self.inequalities, shape).shape[0]

    def barrier(self, y: Array) -> Array:
        """The log barrier at `y`; infinite on the boundary and outside."""
        gaps = -self.inequalities(y)
        inside = jnp.all(gaps > 0)
        return jnp.where(inside, -jnp.sum(jnp.log(jnp.where(inside, gaps, jnp.ones_like(gaps)))), like(jnp.inf, y))

    def barrier_gradient(self, y: Array) -> Array:
        """Gradient of the barrier strictly inside."""
        phi, pull = jax.vjp(self.inequalities, y)
        return pull(-1 / phi)[0]

    def slack(self, x: Array) -> Array:
        """The smallest slack: positive strictly inside, negative outside."""
        return jnp.min(-self.inequalities(x), initial=math.inf)

    def violation(self, x: Array) -> Array:
        """Norm of the violated parts of the inequalities; 0 inside."""
        return jnp.linalg.norm(jnp.maximum(self.inequalities(x), 0))

    def bind(self, dim: int) -> ConstraintSet:
        """The set ready for a problem of `dim` unknowns.

        Raises:
            ShapeError: the set has another dimension.
        """
        if self.dim not in (None, dim):
            raise ShapeError(f"constraints: {type(self).__name__} has dimension {self.dim}, the problem has {dim} unknowns")
        return self

    def _size(self, dim: int | None) -> int:
        size = self.dim if dim is None else dim
        if size is None:
            raise ArgumentError(f"{type(self).__name__} exists in every dimension: pass dim")
        return size


class Free(ConstraintSet):
    """No inequality at all: the whole space.

    Example:
        >>> Free().project(jnp.array([-1.0, 2.0])).tolist()
        [-1.0, 2.0]
    """

    @property
    def straight(self) -> bool:
        return True

    def inequalities(self, x: Array) -> Array:
        return x[:0]

    def prox(self, v: Array, t: Any) -> Array:
        return v

    def project(self, v: Array) -> Array:
        return v

    def support(self, s: Array) -> Array:
        return jnp.where(jnp.all(s == 0), like(0.0, s), like(jnp.inf, s))

    def interior_point(self, dim: int | None = None) -> Array:
        return jnp.zeros(self._size(dim), _default())


class Nonnegative(ConstraintSet):
    """The orthant x >= 0, in any dimension. With a sum constraint as equality it is a simplex.

    Example:
        >>> Nonnegative().prox(jnp.array([-1.0, 2.0]), 0.0).tolist()
        [0.0, 2.0]
    """

    @property
    def straight(self) -> bool:
        return True

    def inequalities(self, x: Array) -> Array:
        return -x

    def prox(self, v: Array, t: Any) -> Array:
        return scalar.slack(v, t)

    def project(self, v: Array) -> Array:
        return jnp.maximum(v, 0)

    def support(self, s: Array) -> Array:
        return jnp.where(jnp.all(s <= 0), like(0.0, s), like(jnp.inf, s))

    def interior_point(self, dim: int | None = None) -> Array:
        return jnp.ones(self._size(dim), _default())


def _side(name: str, value: Any) -> Any:
    if value is None:
        return None
    return checks.array(name, value, (None,)) if np.ndim(value) else value


class Box(ConstraintSet):
    """The box lower <= x <= upper. A number bounds every coordinate; None leaves that side open.

    Args:
        lower: number, vector of shape `(n,)`, or None.
        upper: number, vector of shape `(n,)`, or None.

    Raises:
        ArgumentError: a lower bound is not below its upper bound, or both sides are open.

    Example:
        >>> Box(0.0, 1.0).project(jnp.array([-1.0, 0.25, 2.0])).tolist()
        [0.0, 0.25, 1.0]
    """

    lower: Any = number(None)
    upper: Any = number(None)

    def __init__(self, lower: Any = None, upper: Any = None):
        self.lower, self.upper = _side("lower", lower), _side("upper", upper)
        if lower is None and upper is None:
            raise ArgumentError("Box: give lower or upper; Free() is the set without bounds")
        if lower is not None and upper is not None:
            if None not in (_length(lower), _length(upper)) and _length(lower) != _length(upper):
                raise ShapeError(f"Box: lower and upper must have one length, got {_length(lower)} and {_length(upper)}")
            if checks.known(lower, upper):
                low, high = np.broadcast_arrays(np.asarray(lower, float), np.asarray(upper, float))
                bad = np.argwhere(~(low < high))
                if len(bad):
                    at = tuple(map(int, bad[0]))
                    raise ArgumentError(f"Box: lower must be below upper, got {low[at]:g} and {high[at]:g}" + (f" at index {at[0]}" if at else ""))

    @property
    def dim(self) -> int | None:
        return _length(self.lower) or _length(self.upper)

    @property
    def bounded(self) -> bool:
        return self.lower is not None and self.upper is not None

    @property
    def straight(self) -> bool:
        return True

    def inequalities(self, x: Array) -> Array:
        parts = [] if self.lower is None else [like(self.lower, x) - x]
        return jnp.concatenate(parts if self.upper is None else [*parts, x - like(self.upper, x)])

    def prox(self, v: Array, t: Any) -> Array:
        if self.upper is None:
            lower = like(self.lower, v)
            return lower + scalar.slack(v - lower, t)
        upper = like(self.upper, v)
        return upper - scalar.slack(upper - v, t) if self.lower is None else scalar.box(v, self.lower, upper, t)

    def project(self, v: Array) -> Array:
        v = v if self.lower is None else jnp.maximum(v, like(self.lower, v))
        return v if self.upper is None else jnp.minimum(v, like(self.upper, v))

    def support(self, s: Array) -> Array:
        low = like(-jnp.inf if self.lower is None else self.lower, s)
        high = like(jnp.inf if self.upper is None else self.upper, s)
        wall = jnp.where(s > 0, high, low)
        return jnp.sum(jnp.where(s == 0, jnp.zeros_like(s), s * wall))

    def interior_point(self, dim: int | None = None) -> Array:
        if self.lower is None:
            inside = self.upper - 1.0
        else:
            inside = self.lower + 1.0 if self.upper is None else (self.lower + self.upper) / 2
        inside = jnp.asarray(inside)
        return jnp.broadcast_to(jnp.asarray(inside, inside.dtype), (self._size(dim),))


class HalfSpace(ConstraintSet):
    """The halfspace normal' x <= offset.

    Args:
        normal: nonzero vector of shape `(n,)`.
        offset: number.

    Raises:
        ArgumentError: the normal is 0.

    Example:
        >>> HalfSpace(jnp.array([1.0, 1.0]), 1.0).project(jnp.array([1.0, 1.0])).tolist()
        [0.5, 0.5]
    """

    normal: Array
    offset: Any = number()

    def __init__(self, normal: Any, offset: Any):
        self.normal, self.offset = checks.array("normal", normal, (None,)), offset
        if checks.known(normal) and not np.any(np.asarray(normal)):
            raise ArgumentError("HalfSpace: normal must not be 0")

    @property
    def dim(self) -> int | None:
        return self.normal.shape[0]

    @property
    def straight(self) -> bool:
        return True

    def inequalities(self, x: Array) -> Array:
        return (like(self.normal, x) @ x - like(self.offset, x))[None]

    def prox(self, v: Array, t: Any) -> Array:
        a = like(self.normal, v)
        square, gap = a @ a, like(self.offset, v) - a @ v
        return v + a * ((gap - scalar.slack(gap, like(t, v) * square)) / square)

    def project(self, v: Array) -> Array:
        a = like(self.normal, v)
        return v + a * (jnp.minimum(like(self.offset, v) - a @ v, 0) / (a @ a))

    def support(self, s: Array) -> Array:
        a = like(self.normal, s)
        multiple = (a @ s) / (a @ a)
        along = jnp.linalg.norm(s - multiple * a) <= 8 * jnp.finfo(s.dtype).eps * jnp.linalg.norm(s)
        return jnp.where(along & (multiple >= 0), multiple * like(self.offset, s), like(jnp.inf, s))

    def interior_point(self, dim: int | None = None) -> Array:
        self._size(dim)
        length = jnp.linalg.norm(self.normal)
        return self.normal * (jnp.minimum(like(self.offset, self.normal) / length - 1, 0) / length)


class Ball(ConstraintSet):
    r"""The Euclidean ball $|x - c| \le r$ with the barrier $-\log(r^2 - |x - c|^2)$.

    Args:
        center: vector of shape `(n,)`, or a number for the same center in every coordinate and any dimension.
        radius: above 0.

    Example:
        >>> Ball(0.0, 1.0).project(jnp.array([3.0, 4.0])).tolist()
        [0.6, 0.8]
    """

    center: Any = number()
    radius: Any = number(above=0.0)

    def __init__(self, center: Any, radius: Any):
        self.center, self.radius = _side("center", center), radius
        if np.ndim(radius):
            raise ShapeError(f"Ball: radius must be a number, got shape {np.shape(radius)}")

    @property
    def dim(self) -> int | None:
        return _length(self.center)

    @property
    def bounded(self) -> bool:
        return True

    def inequalities(self, x: Array) -> Array:
        away, r = x - like(self.center, x), like(self.radius, x)
        return (away @ away - r * r)[None]

    def prox(self, v: Array, t: Any) -> Array:
        center, r = like(self.center, v), like(self.radius, v)
        away = v - center
        length = safe_norm(away)
        near = scalar.wall_slack(r - length, 2 * r, like(t, v))
        return center + away * ((r - near) / jnp.where(length == 0, jnp.ones_like(length), length))

    def project(self, v: Array) -> Array:
        center, r = like(self.center, v), like(self.radius, v)
        length = safe_norm(v - center)
        return jnp.where(length <= r, v, center + (v - center) * (r / jnp.where(length <= r, r, length)))

    def support(self, s: Array) -> Array:
        center = jnp.broadcast_to(like(self.center, s), s.shape)
        return s @ center + like(self.radius, s) * safe_norm(s)

    def violation(self, x: Array) -> Array:
        return jnp.maximum(safe_norm(x - like(self.center, x)) - like(self.radius, x), 0)

    def interior_point(self, dim: int | None = None) -> Array:
        return jnp.broadcast_to(jnp.asarray(self.center), (self._size(dim),))
