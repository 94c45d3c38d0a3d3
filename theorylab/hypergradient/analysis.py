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
from theorylab.hypergradient.linear import code, fixed_start, solver

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

    def __float__(self) -> float:
        return float(self.value)


def singular_triple(forward: Map, backward: Map, rows: Array, steps: int) -> tuple[Array, Array, Array, Array]:
    """The largest singular value of a map A given by products, with its vectors and a residual, by the Lanczos process on A'A.

    Args:
        forward: h -> A h.
        backward: u -> A' u.
        rows: an array like A h, for its shape.
        steps: dimension of the Krylov space, at most the smaller side of A; static.
    """
    start = backward(fixed_start(rows))  # in the row space: a Krylov space of the smaller side is all of it
    eps = 10 * float(jnp.finfo(rows.dtype).eps)

    def unit(w: Array, level: Array) -> tuple[Array, Array]:
        length = tree.norm(w)
        kept = length > level
        return jnp.where(kept, w / jnp.where(kept, length, jnp.ones_like(length)), jnp.zeros_like(w)), jnp.where(kept, length, jnp.zeros_like(length))

    def step(carry: tuple[Array, Array], j: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        V, scale = carry
        image = forward(V[j])
        w, alpha = backward(image), tree.inner(image, image)
        w = lax.fori_loop(0, 2, lambda _, w: w - (V @ w) @ V, w)  # once more than in exact arithmetic keeps the basis orthogonal
        scale = jnp.maximum(scale, alpha)
        v, beta = unit(w, eps * scale)
        return (V.at[j + 1].set(v), scale), (image, alpha, beta)

    V = jnp.zeros((steps + 1, *start.shape), rows.dtype).at[0].set(unit(start, jnp.zeros((), rows.dtype))[0])
    (V, _), (images, alpha, beta) = lax.scan(step, (V, jnp.zeros((), rows.dtype)), jnp.arange(steps))
    mix = jnp.linalg.eigh(jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1))[1][:, -1]
    left = mix @ images
    sigma = tree.norm(left)
    safe = jnp.where(sigma > 0, sigma, jnp.ones_like(sigma))
    return sigma, left / safe, mix @ V[:-1], beta[-1] * jnp.abs(mix[-1]) / safe


class PlainJacobian:
    r"""The x-Jacobian of the plain formula at any (x, y) by its products, without forming anything.

    $\Omega_1 h = \Lambda_{21} h + J^\top \Lambda_{11} h$ costs one adjoint solve, $\Omega_1^\top u$ one forward solve (companion derivation).
    With 0 in place of the adjoint v only $G_{21} + J^\top G_{11}$ is left.
    """

    def __init__(self, problem: Any, x: Array, y: Array, linear: Any = "auto"):
        self.at = problem.at(x, y)
        self.system = solver(linear, x.shape[0], problem.symmetric).factor(self.at, problem.symmetric)
        self.v = plain(self.at, self.system)[1].value

    def forward(self, h: Array, v: Array) -> Array:
        """The product with h, for the adjoint v."""
        return turned(self.at, self.system, self.at.turn(v, h))[0]

    def backward(self, u: Array, v: Array) -> Array:
        """The product of the transpose with u, for the adjoint v."""
        moved = -self.system.solve(self.at.cross_product(u)).value
        return jax.linear_transpose(lambda h: self.at.turn(v, h), v)((moved, u))[0]


def _constant(estimator: Estimator, problem: Any, x: Array, y: Array) -> EfficiencyConstant:
    steps = min(x.shape[0], y.shape[0], KRYLOV)
    if not isinstance(estimator, Plain):
        _, forward = jax.linearize(lambda x: estimator.estimate(problem, x, y).value, x)
        transposed = jax.linear_transpose(forward, x)
        sigma, left, right, residual = singular_triple(forward, lambda u: transposed(u)[0], y, steps)
        return EfficiencyConstant(sigma, left, right, None, None, None, None, residual, _converged(residual, sigma))
    J = PlainJacobian(problem, x, y, estimator.linear)
    # Both constants in one loop: with the adjoint, and with 0 in its place.
    each = jax.vmap(lambda v: singular_triple(lambda h: J.forward(h, v), lambda u: J.backward(u, v), y, steps))
    (sigma, limit), (left, _), (right, _), (residual, _) = each(jnp.stack([J.v, jnp.zeros_like(J.v)]))
    a, c = jax.vmap(lambda v: J.at.turn(v, right))(jnp.stack([jnp.zeros_like(J.v), J.v]))
    pulled = jax.vmap(lambda a: J.at.cross_pullback(J.system.solve(a, True).value))(a)
    outer, mixed, bent = c[0] - pulled[0], c[1] - c[0], pulled[0] - pulled[1]
    return EfficiencyConstant(sigma, left, right, outer, mixed, bent, limit, residual, _converged(residual, sigma))


def _converged(residual: Array, sigma: Array) -> Array:
    small = residual <= float(jnp.finfo(sigma.dtype).eps) ** 0.5 * sigma
    status = jnp.where(small, code(Status.CONVERGED), code(Status.MAX_STEPS))
    return jnp.where(jnp.isfinite(residual), status, code(Status.NONFINITE))


def efficiency_constant(problem: Any, x: Any, y: Any, estimator: Estimator | None = None) -> EfficiencyConstant:
    r"""The efficiency constant $C_y = \lVert\Omega_1(x^*(y), y)\rVert$ (paper), with its singular vectors and what it is made of.

    The first-order error of an estimator is its Jacobian in x times the inner error, so this is the worst error per unit of inner error. Only
    products are used: two solves for each step of the Lanczos process, at most 60.

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
    problem, flat_x, flat_y = flat_point(problem, x, y)
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

    def slope(x: Array) -> Array:
        J = PlainJacobian(problem, x, y, estimator.linear)
        return J.forward(delta, J.v)

    first, twice = jax.jvp(slope, (x,), (delta,))
    if isinstance(estimator, Plain):
        return PredictedError(first, twice / 2)
    J = PlainJacobian(problem, x, y, estimator.linear)
    bend = jax.jvp(lambda x: problem.at(x, y).product(delta), (x,), (delta,))[1]  # F_11[delta, delta]
    newton = J.forward(J.system.solve(bend).value, J.v) / 2
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
    problem, x, flat_y = flat_point(problem, solution, y)
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
    problem, flat_x, flat_y = flat_point(problem, x, y)
    v = None if adjoint is None else problem.pack_x(adjoint)
    return compiled(_corrected, problem, flat_x, flat_y, v, solver(linear, problem.n, problem.symmetric))
