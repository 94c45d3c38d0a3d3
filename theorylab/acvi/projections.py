"""Projections onto intersections: simplices, boxes with sums, halfspaces, and a convex set with linear equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.acvi.prox import like
from theorylab.core import checks
from theorylab.errors import ArgumentError

Array = jax.Array
NEWTON_STEPS = 50


def project_simplex(v: Any, total: Any = 1.0) -> Array:
    r"""The nearest point of $\{x \ge 0, \sum_i x_i = \mathrm{total}\}$, in a few passes over v.

    Args:
        v: shape `(n,)`.
        total: the sum, above 0.

    Raises:
        ShapeError: `v` is not a vector.
        ArgumentError: `total` is not above 0.

    Example:
        >>> project_simplex(jnp.array([1.0, 0.5, -1.0])).tolist()
        [0.75, 0.25, 0.0]
    """
    v = checks.array("v", v, (None,))
    checks.real("total", total, above=0.0)
    return simplex(v, like(total, v))


def simplex(v: Array, total: Array) -> Array:
    r"""`project_simplex` without checks.

    The level $\lambda$ with $\sum_i\max(v_i - \lambda, 0) = \mathrm{total}$ is the root of a convex, piecewise linear function. Newton's iteration
    from below climbs to it without passing it and ends when the support repeats: a few passes over v, where a sort costs fifty times as much.
    """
    count = lambda held: jnp.sum(held.astype(v.dtype))  # noqa: E731

    def newton(state: tuple[Array, Array]) -> tuple[Array, Array]:
        held = v > state[0]
        return (jnp.sum(jnp.where(held, v, 0)) - total) / count(held), count(held)

    def shrinks(state: tuple[Array, Array]) -> Array:
        return count(v > state[0]) < state[1]

    low = jnp.maximum(jnp.mean(v) - total / v.shape[0], jnp.max(v) - total)  # the level if all are held, or only the largest
    level, _ = lax.while_loop(shrinks, newton, newton((lax.stop_gradient(low), low)))
    held = v > lax.stop_gradient(level)
    # The mean over the support, repeated once, removes the round-off of the large sum; it also carries the derivative.
    level = lax.stop_gradient(level)
    level = level + (jnp.sum(jnp.where(held, v - level, 0)) - total) / count(held)
    return jnp.maximum(v - level, 0)


def box_sum(v: Array, lower: Array, upper: Array, total: Array) -> Array:
    r"""The nearest point of $\{l \le x \le u, \sum_i x_i = \mathrm{total}\}$; an infinite bound is open.

    The sum of $\mathrm{clip}(v - \nu, l, u)$ falls from segment to segment of $\nu$; a binary search over the sorted kinks finds the segment
    and the linear equation in it gives $\nu$ exactly.
    """
    kinks = jnp.sort(jnp.concatenate([v - upper, v - lower]))
    kinks = jnp.where(jnp.isfinite(kinks), kinks, jnp.sign(kinks) * jnp.finfo(v.dtype).max / 4)
    place = lambda nu: jnp.clip(v - nu, lower, upper)  # noqa: E731
    n = kinks.shape[0]

    def halve(bounds: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bounds  # the sum at kinks[low] is at least the total, at kinks[high] below it
        middle = (low + high) // 2
        above = jnp.sum(place(kinks[middle])) >= total
        return (jnp.where(above, middle, low), jnp.where(above, high, middle)), None

    start = jnp.zeros((), jnp.int32)
    (low, high), _ = lax.scan(halve, (start, start + (n - 1)), None, length=max(1, n.bit_length()))
    inside = (v - lower > kinks[low]) & (v - upper < kinks[high])
    fixed = jnp.where(v - upper >= kinks[high], upper, lower)
    rest = jnp.sum(jnp.where(inside, v, fixed)) - total
    nu = jnp.where(jnp.any(inside), rest / jnp.maximum(jnp.sum(inside.astype(v.dtype)), 1), kinks[low])
    return place(nu)


def dual_newton(project: Callable[[Array], Array], v: Array, rows: Array, level: Array) -> Array:
    r"""The nearest point of {x in K, Q x = e}, where `project` is the projection onto K and the rows of Q are orthonormal (or 0).

    Semismooth Newton on the dual: $x = \Pi_K(v - Q^\top\nu)$ with $Q x = e$. The dual is concave with the gradient $Q x - e$, so a step is
    halved until it climbs; on boxes and orthants the iteration ends after finitely many steps.
    """
    eps = jnp.finfo(v.dtype).eps
    rows, level = like(rows, v), like(level, v)
    tolerance = 4 * eps * (jnp.linalg.norm(v) + jnp.linalg.norm(level))

    def gradient(nu: Array) -> tuple[Array, Array]:
        x = project(v - rows.T @ nu)
        return rows @ x - level, x

    def height(nu: Array) -> Array:
        g, x = gradient(nu)
        return jnp.sum((x - v) ** 2) / 2 + nu @ g

    def newton(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        nu, _, k = state
        g, _ = gradient(nu)
        matrix = -jax.jacfwd(lambda z: gradient(z)[0])(nu)
        shift = jnp.minimum(1e-2 * jnp.linalg.norm(g), 1e-4) + 10 * eps
        move = jnp.linalg.solve(matrix + shift * jnp.eye(nu.shape[0], dtype=v.dtype), g)
        here, climb = height(nu), g @ move

        def low(step: Array) -> Array:
            return (height(nu + step * move) < here + 1e-4 * step * climb - 10 * eps * jnp.abs(here)) & (step > 1e-12)

        step = lax.while_loop(low, lambda s: s / 2, jnp.ones((), v.dtype))
        nu = nu + step * move
        return nu, jnp.linalg.norm(gradient(nu)[0]), k + 1

    def going(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > tolerance) & (state[2] < NEWTON_STEPS)

    nu = jnp.zeros_like(level)
    first = jnp.linalg.norm(gradient(nu)[0])
    nu, _, _ = lax.while_loop(going, newton, (nu, first, jnp.zeros((), jnp.int32)))
    return gradient(nu)[1]


def hildreth(v: Any, A: Any, b: Any, *, cycles: int = 10_000) -> Array:
    r"""The nearest point of $\{x : A x \le b\}$ by dual coordinate ascent on the Gram matrix: $y = v - A^\top u$, $u \ge 0$.

    It costs O(m^2) a cycle after one Gram matrix, whatever the dimension, and converges linearly; `Polyhedron.project` reaches round-off.
    Repeated projection onto the most violated halfspace, in contrast, ends at a feasible point that is not the nearest.

    Args:
        v: shape `(n,)`.
        A: shape `(m, n)`, without zero rows.
        b: shape `(m,)`.
        cycles: most passes over the m multipliers; fewer if no multiplier moves any more.

    Raises:
        ShapeError: shapes that do not match.
        ArgumentError: a row of A is 0, or `cycles` is below 1.

    Example:
        >>> hildreth(jnp.array([1.0, 1.0]), jnp.eye(2), jnp.array([0.0, 2.0])).tolist()
        [0.0, 1.0]
    """
    A = checks.array("A", A, (None, None))
    v, b = checks.array("v", v, (A.shape[1],)), checks.array("b", b, (A.shape[0],))
    checks.whole("cycles", cycles, low=1)
    if checks.known(A) and not bool(jnp.all(jnp.any(A != 0, axis=1))):
        raise ArgumentError("A must have no zero row")
    v, b = like(v, A), like(b, A)
    gram, right = A @ A.T, A @ v - b
    diagonal = jnp.diagonal(gram)

    def coordinate(u: Array, i: Array) -> tuple[Array, None]:
        return u.at[i].set(jnp.maximum(u[i] + (right[i] - gram[i] @ u) / diagonal[i], 0)), None

    def cycle(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        u, _, k = state
        new, _ = lax.scan(coordinate, u, jnp.arange(u.shape[0]))
        return new, jnp.max(jnp.abs(new - u)), k + 1

    def going(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > jnp.finfo(A.dtype).eps * (1 + jnp.max(state[0]))) & (state[2] < cycles)

    u, _, _ = lax.while_loop(going, cycle, (jnp.zeros_like(right), like(jnp.inf, right), jnp.zeros((), jnp.int32)))
    return v - A.T @ u


def dykstra(projections: Sequence[Callable[[Array], Array]], v: Any, *, cycles: int = 10_000, tolerance: float | None = None) -> Array:
    """The nearest point of an intersection of convex sets from the projections onto each: Dykstra's algorithm.

    Args:
        projections: functions that project a vector.
        v: shape `(n,)`.
        cycles: most passes over the sets.
        tolerance: a pass that moves the point by less, relative to its norm, ends the iteration; four units of round-off unless given.

    Raises:
        ArgumentError: no projection is given, or `cycles` is below 1.
        ShapeError: `v` is not a vector.

    Example:
        >>> dykstra([lambda x: jnp.maximum(x, 0), lambda x: x - (jnp.sum(x) - 1) / 2], jnp.array([3.0, 0.0])).tolist()
        [1.0, 0.0]
    """
    if not projections:
        raise ArgumentError("projections must name at least one set")
    checks.whole("cycles", cycles, low=1)
    v = checks.array("v", v, (None,))
    small = like(4 * jnp.finfo(v.dtype).eps if tolerance is None else tolerance, v)

    def cycle(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        x, corrections, _, k = state
        old, moved = x, corrections
        for i, project in enumerate(projections):
            shifted = x + corrections[i]
            x = project(shifted)
            moved = moved.at[i].set(shifted - x)
        change = jnp.linalg.norm(x - old) + jnp.linalg.norm(moved - corrections)
        return x, moved, change / jnp.maximum(jnp.linalg.norm(x), 1), k + 1

    start = (v, jnp.zeros((len(projections), *v.shape), v.dtype), like(jnp.inf, v), jnp.zeros((), jnp.int32))
    x, _, _, _ = lax.while_loop(lambda s: (s[2] > small) & (s[3] < cycles), cycle, start)
    return x


def interior_newton(phi: Callable[[Array], Array], jacobian: Callable[[Array], Array], curvature: Callable[[Array, Array], Array] | None, *,
                    start: Array, rows: Array, level: Array, t: Any = 0.0, center: Array | None = None,
                    slope: Array | None = None, steps: int = 80) -> tuple[Array, Array, Array]:
    r"""Minimise $\tfrac12|y - c|^2 + g^\top y$ over $\varphi(y) \le 0$, $Q y = e$, on its central path at $u_i s_i = t$, by primal-dual Newton.

    Damped Newton steps on the perturbed optimality conditions, with 0.995 of the way to the boundary of s, u > 0 at most; the slacks s are
    unknowns of their own, so the iteration may cut through a curved wall. The primal Newton iteration of the barrier problem stagnates for
    small t; this form has no such limit, and t = 0 gives the minimiser.

    Args:
        phi: the inequalities, `(n,) -> (m,)`.
        jacobian: their Jacobian, `(n,) -> (m, n)`.
        curvature: $(y, u) \mapsto \sum_i u_i \nabla^2\varphi_i(y)$, or None if phi is affine.
        start: strictly inside.
        rows: orthonormal rows Q, shape `(p, n)`; p = 0 for no equation.
        level: e, shape `(p,)`.
        t: the product of slack and multiplier that is aimed at.
        center: c; without it the quadratic term is absent.
        slope: g.
        steps: most Newton steps.

    Returns:
        The point, its multipliers, and the relative residual of the optimality conditions.
    """
    dtype, n, p, m = start.dtype, start.shape[0], rows.shape[0], jax.eval_shape(phi, start).shape[0]
    eps, eye = jnp.finfo(dtype).eps, jnp.eye(n, dtype=dtype)
    t = like(t, start)
    weight = like(0.0 if center is None else 1.0, start)
    shift = -center if center is not None else jnp.zeros_like(start)
    shift = shift if slope is None else shift + slope

    def residual(y: Array, s: Array, u: Array, nu: Array, target: Array) -> Array:
        dual = weight * y + shift + jacobian(y).T @ u + rows.T @ nu
        return jnp.concatenate([dual, phi(y) + s, rows @ y - level, u * s - target])

    def scale(y: Array, u: Array) -> Array:
        return 1 + jnp.linalg.norm(shift) + weight * jnp.linalg.norm(y) + jnp.linalg.norm(jacobian(y).T @ u)

    def step(state: tuple) -> tuple:
        y, s, u, nu, k, _, _ = state
        J, average = jacobian(y), jnp.mean(u * s)
        # without the quadratic term the matrix may be singular far from the solution; the shift fades as the iteration converges
        bent = jnp.maximum(weight, eps**2 if curvature is None else 1e-2 * average) * eye
        bent = bent if curvature is None else bent + curvature(y, u)
        # condensing to n unknowns would add numbers of size u / s to numbers of size 1 and lose the directions along the active walls
        whole = jnp.block([[bent, J.T, rows.T], [J, -jnp.diag(s / u), jnp.zeros((m, p), dtype)],
                           [rows, jnp.zeros((p, m), dtype), -1e-2 * eps * jnp.eye(p, dtype=dtype)]])
        outside, off = phi(y), rows @ y - level
        dual = weight * y + shift + J.T @ u + rows.T @ nu
        # the right-hand side is affine in the target: one factor and two columns serve the predictor and the step
        columns = jnp.stack([jnp.concatenate([-dual, -outside, -off]), jnp.concatenate([jnp.zeros_like(y), -1 / u, jnp.zeros_like(nu)])], axis=1)
        base, by_target = jnp.linalg.solve(whole, columns).T

        def direction(target: Array) -> tuple[Array, Array, Array, Array]:
            both = base + target * by_target
            dy = both[:n]
            return dy, -(outside + s) - J @ dy, both[n: n + m], both[n + m:]

        def longest(ds: Array, du: Array) -> Array:
            both, moves = jnp.concatenate([s, u]), jnp.concatenate([ds, du])
            falling = moves < 0
            return jnp.minimum(0.995 * jnp.min(jnp.where(falling, -both / jnp.where(falling, moves, -jnp.ones_like(moves)), like(jnp.inf, s)),
                                               initial=jnp.inf), 1)

        _, ds, du, _ = direction(jnp.zeros((), dtype))
        target = jnp.maximum(t, average * jnp.clip((1 - longest(ds, du)) ** 3, 1e-6 if curvature is None else 0.1, 0.8))
        moves = direction(target)
        length = longest(moves[1], moves[2])

        def move(a: Array) -> tuple[Array, Array, Array, Array]:
            return y + a * moves[0], s + a * moves[1], u + a * moves[2], nu + a * moves[3]

        if curvature is not None:
            here = jnp.linalg.norm(residual(y, s, u, nu, target))

            def refused(a: Array) -> Array:
                there = jnp.linalg.norm(residual(*move(a), target))
                return ~(there <= (1 - 0.01 * a) * here + 10 * eps * scale(y, u)) & (a > 1e-10)

            length = lax.while_loop(refused, lambda a: a / 2, length)
        trial = move(length)
        good = jnp.isfinite(sum((jnp.sum(part) for part in trial), start=jnp.zeros((), dtype)))
        y, s, u, nu = (jnp.where(good, new, old) for new, old in zip(trial, (y, s, u, nu), strict=True))
        left, size = residual(y, s, u, nu, t), scale(y, u)
        # products are wanted to 11 digits of t, or to the square of round-off: then u or s is exact to round-off
        off = jnp.max(jnp.abs(left[-m:])) / jnp.maximum(t * 1e4, size * eps)
        return y, s, u, nu, k + 1, jnp.maximum(jnp.linalg.norm(left[:-m]) / size, off), ~good

    def going(state: tuple) -> Array:
        return (state[5] > 4 * eps) & (state[4] < steps) & ~state[6]

    s = -phi(start)
    u = jnp.maximum(t, jnp.mean(s)) / s
    state = (start, s, u, jnp.zeros_like(level), jnp.zeros((), jnp.int32), like(jnp.inf, start), jnp.zeros((), bool))
    y, s, u, nu, *_ = lax.while_loop(going, step, state)
    error = jnp.max(jnp.abs(residual(y, s, u, nu, t))) / scale(y, u)
    # what round-off left on or outside a wall is drawn towards the start, by the convexity of phi
    depth, first = jnp.max(phi(y)), jnp.max(phi(start))
    back = jnp.where(depth >= 0, (depth + jnp.finfo(dtype).tiny) / (depth - first), jnp.zeros((), dtype))
    return y + jnp.minimum(jnp.where(depth >= 0, back * (1 + 4 * eps) + eps, back), 1) * (start - y), u, error
