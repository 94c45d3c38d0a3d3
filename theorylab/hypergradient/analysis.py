r"""How wrong an estimator is: its Jacobian in x and the largest singular value of it, and predicted errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core import tree
from theorylab.core.solution import Status
from theorylab.hypergradient.estimators import Estimator, NewtonPoint, OnePoint, Plain, as_estimator, compiled, flat_point, plain, turned
from theorylab.hypergradient.linear import code, solver

Array = jax.Array
Map = Callable[[Array], Array]
KRYLOV = 60


class EfficiencyConstant(NamedTuple):
    r"""The largest singular value of the Jacobian of an estimator in x: the worst error per unit of inner error.

    Attributes:
        value: $C_y$ of the paper, if x is the inner solution.
        left: its left singular vector, like y: how the error is shared among the hyper-parameters.
        right: its right singular vector, like x: the worst direction of the inner error.
        outer: $(G_{21} + J^\top G_{11}) r$ along the right vector r, like y; None unless the estimator is `Plain`, as the next three.
        mixed: $-F_{21}[r]^\top v$.
        bent: $-J^\top F_{11}[r]^\top v$. The three add up to `value` times `left`.
        limit: $\lVert G_{21} + J^\top G_{11}\rVert$, what is left of `value` where a reparametrization that does not use G has done all it can.
        residual: norm of $A^\top l - \sigma r$, for the found triple.
        status: CONVERGED, or MAX_STEPS where the residual is above the root of round-off.
    """

    value: Array
    left: Any
    right: Any
    outer: Any
    mixed: Any
    bent: Any
    limit: Any
    residual: Array
    status: Array


def singular_triple(forward: Map, backward: Map, rows: Array, steps: int) -> tuple[Array, Array, Array, Array]:
    """The largest singular value of a map given by products, with its vectors and a residual, by Golub-Kahan bidiagonalization.

    Args:
        forward: h -> A h.
        backward: u -> A' u.
        rows: an array like A h, for its shape.
        steps: dimension of the Krylov space, at most the smaller side of A; static.
    """
    start = backward(jax.random.normal(jax.random.key(0), rows.shape, rows.dtype))  # in the row space: `steps` = smaller side is exact
    eps = 10 * float(jnp.finfo(rows.dtype).eps)

    def unit(w: Array, basis: Array, scale: Array) -> tuple[Array, Array]:
        for _ in range(2):
            w = w - basis.T @ (basis @ w)
        length = tree.norm(w)
        kept = length > eps * scale
        return jnp.where(kept, w / jnp.where(kept, length, jnp.ones_like(length)), jnp.zeros_like(w)), jnp.where(kept, length, jnp.zeros_like(length))

    def step(carry: tuple, j: Array) -> tuple[tuple, tuple[Array, Array]]:
        V, U, scale = carry
        u, alpha = unit(forward(V[j]), U, scale)
        scale = jnp.maximum(scale, alpha)
        U = U.at[j].set(u)
        v, beta = unit(backward(u), V, scale)
        return (V.at[j + 1].set(v), U, jnp.maximum(scale, beta)), (alpha, beta)

    zero = jnp.zeros((), rows.dtype)
    V = jnp.zeros((steps + 1, *start.shape), rows.dtype).at[0].set(unit(start, jnp.zeros((1, *start.shape), rows.dtype), zero)[0])
    (V, U, _), (alpha, beta) = lax.scan(step, (V, jnp.zeros((steps, *rows.shape), rows.dtype), zero), jnp.arange(steps))
    P, values, Q = jnp.linalg.svd(jnp.diag(alpha) + jnp.diag(beta[:-1], 1))
    left, right = P[:, 0] @ U, Q[0] @ V[:-1]
    return values[0], left, right, tree.norm(backward(left) - values[0] * right)


def plain_jacobian(problem: Any, x: Array, y: Array, linear: Any = "auto", outer_only: bool = False) -> tuple[Map, Map, Any, Any, Array]:
    r"""Products with $\Omega_1$ and its transpose at any (x, y), without forming anything; then linearization, system and adjoint.

    $\Omega_1 h = \Lambda_{21} h + J^\top \Lambda_{11} h$ costs one adjoint solve, $\Omega_1^\top u$ one forward solve (companion derivation).
    `outer_only` drops what depends on F: $G_{21} + J^\top G_{11}$.
    """
    at = problem.at(x, y)
    system = solver(linear, x.shape[0], problem.symmetric).factor(at, problem.symmetric)
    v = plain(at, system)[1].value
    seen = jnp.zeros_like(v) if outer_only else v

    def forward(h: Array) -> Array:
        return turned(at, system, at.turn(seen, h))[0]

    def backward(u: Array) -> Array:
        moved = -system.solve(at.cross_product(u)).value
        return jax.linear_transpose(lambda h: at.turn(seen, h), x)((moved, u))[0]

    return forward, backward, at, system, v


def _constant(estimator: Estimator, problem: Any, x: Array, y: Array) -> EfficiencyConstant:
    steps = min(x.shape[0], y.shape[0], KRYLOV)
    if not isinstance(estimator, Plain):
        _, forward = jax.linearize(lambda x: estimator.estimate(problem, x, y).value, x)
        transposed = jax.linear_transpose(forward, x)
        sigma, left, right, residual = singular_triple(forward, lambda u: transposed(u)[0], y, steps)
        return EfficiencyConstant(sigma, left, right, None, None, None, None, residual, _converged(residual, sigma))
    forward, backward, at, system, v = plain_jacobian(problem, x, y, estimator.linear)
    sigma, left, right, residual = singular_triple(forward, backward, y, steps)
    only, only_back, *_ = plain_jacobian(problem, x, y, estimator.linear, outer_only=True)
    limit = singular_triple(only, only_back, y, steps)[0]
    outer, whole = at.turn(jnp.zeros_like(v), right), at.turn(v, right)
    mixed = whole[1] - outer[1]
    bent = turned(at, system, (whole[0] - outer[0], jnp.zeros_like(y)))[0]
    return EfficiencyConstant(sigma, left, right, turned(at, system, outer)[0], mixed, bent, limit, residual, _converged(residual, sigma))


def _converged(residual: Array, sigma: Array) -> Array:
    small = residual <= float(jnp.finfo(sigma.dtype).eps) ** 0.5 * sigma
    status = jnp.where(small, code(Status.CONVERGED), code(Status.MAX_STEPS))
    return jnp.where(jnp.isfinite(residual), status, code(Status.NONFINITE))


def efficiency_constant(problem: Any, x: Any, y: Any, estimator: Estimator | None = None) -> EfficiencyConstant:
    r"""The efficiency constant $C_y = \lVert\Omega_1(x^*(y), y)\rVert$ (paper), with its singular vectors and what it is made of.

    The first-order error of an estimator is its Jacobian in x times the inner error, so this is the worst error per unit of inner error. Only
    products are used: two solves for each step of Golub-Kahan bidiagonalization, at most 60 steps.

    Args:
        problem: a bilevel problem.
        x: the inner solution, like the problem's x. Another x gives the norm of the Jacobian there.
        y: hyper-parameters, like the problem's y.
        estimator: `Plain()` unless given; the Jacobian of another one comes from autodiff, and the parts are None.

    Raises:
        ShapeError: x or y does not match the problem.
        ArgumentError: no bilevel problem or no estimator.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> round(float(efficiency_constant(problem, jnp.arcsinh(1.0), 1.0).value), 9)
        0.5
    """
    flat_x, flat_y = flat_point(problem, x, y)
    found = compiled(_constant, Plain() if estimator is None else as_estimator(estimator), problem, flat_x, flat_y)
    like_y = {name: None if (part := getattr(found, name)) is None else problem.unpack_y(part) for name in ("left", "outer", "mixed", "bent")}
    return found._replace(right=problem.unpack_x(found.right), **like_y)


class PredictedError(NamedTuple):
    """The error of an estimator at solution + delta, by order in delta.

    Attributes:
        first: term of first order, shape (m,).
        second: term of second order, shape (m,).
    """

    first: Array
    second: Array


def predicted(estimator: Estimator, problem: Any, x: Array, y: Array, delta: Array) -> PredictedError:
    """`predicted_error` on flat arrays."""
    if not isinstance(estimator, (Plain, OnePoint, NewtonPoint)):
        value = lambda x: estimator.estimate(problem, x, y).value  # noqa: E731
        first, second = jax.jvp(lambda x: jax.jvp(value, (x,), (delta,))[1], (x,), (delta,))
        return PredictedError(first, second / 2)
    first, twice = jax.jvp(lambda x: plain_jacobian(problem, x, y, estimator.linear)[0](delta), (x,), (delta,))
    if isinstance(estimator, Plain):
        return PredictedError(first, twice / 2)
    forward, _, _, system, _ = plain_jacobian(problem, x, y, estimator.linear)
    bend = jax.jvp(lambda x: problem.at(x, y).product(delta), (x,), (delta,))[1]  # F_11[delta, delta]
    newton = forward(system.solve(bend).value) / 2
    return PredictedError(jnp.zeros_like(first), newton if isinstance(estimator, NewtonPoint) else newton - twice / 2)


def predicted_error(problem: Any, solution: Any, y: Any, delta: Any, estimator: Estimator | None = None) -> PredictedError:
    r"""The error that theory predicts for an estimator at $x = x^* + \delta$: the vectors of first and of second order.

    Plain: $\Omega_1\delta$ and $\tfrac12\Omega_{11}[\delta,\delta]$. `NewtonPoint`: 0 and $n = \tfrac12\Omega_1 F_1^{-1} F_{11}[\delta, \delta]$.
    `OnePoint`: 0 and $n - \tfrac12\Omega_{11}[\delta,\delta]$ (companion derivation). Others: the Taylor terms of the estimator, by autodiff.

    Args:
        problem: a bilevel problem.
        solution: $x^*(y)$, like the problem's x.
        y: hyper-parameters, like the problem's y.
        delta: the inner error, like the problem's x.
        estimator: `OnePoint()` unless given.

    Raises:
        ShapeError: solution, y or delta does not match the problem.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> predicted_error(problem, jnp.arcsinh(1.0), 1.0, 1.0, NewtonPoint()).second.round(9).tolist()
        [-0.176776695]
    """
    x, flat_y = flat_point(problem, solution, y)
    return compiled(predicted, as_estimator(estimator), problem, x, flat_y, problem.pack_x(delta))


def _corrected(problem: Any, x: Array, y: Array, adjoint: Array | None, linear: Any) -> Array:
    at = problem.at(x, y)
    v = plain(at, linear.factor(at, problem.symmetric))[1].value if adjoint is None else adjoint
    return problem.outer(x, y) - v @ at.residual


def value_correction(problem: Any, x: Any, y: Any, *, adjoint: Any = None, linear: Any = "auto") -> Array:
    r"""The outer value $G(x, y) - v^\top F(x, y)$, whose error is $-\tfrac12\delta^\top\Lambda_{11}\delta$ to leading order (companion derivation).

    The error of G(x, y) itself is of first order in the inner error; the adjoint v is at hand where a hypergradient was computed.

    Args:
        problem: a bilevel problem.
        x: an approximate inner solution, like the problem's x.
        y: hyper-parameters, like the problem's y.
        adjoint: v, like x, the `adjoint` of a `Hypergradient`; solved for unless given.
        linear: solver for v.

    Raises:
        ShapeError: x, y or adjoint does not match the problem.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> x = jnp.arcsinh(1.0)
        >>> abs(hg.value_correction(problem, x + 1e-3, 1.0) - x) < 1e-6
        Array(True, dtype=bool)
    """
    flat_x, flat_y = flat_point(problem, x, y)
    v = None if adjoint is None else problem.pack_x(adjoint)
    return compiled(_corrected, problem, flat_x, flat_y, v, solver(linear, problem.n, problem.symmetric))
