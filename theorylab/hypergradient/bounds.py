r"""Certificates: bounds on the error of a hypergradient that hold at run time, proved from the inner residual and curvature alone.

For any point x, any $\hat v$ with $r = G_1 - F_1^\top\hat v$ and $\hat\Omega = G_2 - F_2^\top\hat v$, with differences between x and $x^*$
(companion derivation),

$$ \hat\Omega - \nabla L = \Delta\Lambda_y + J(x^*)^\top \Delta\Lambda_x - J(x^*)^\top r, \qquad \Lambda = G - \hat v^\top F . $$

Bounds of the second derivatives of $\Lambda$ over a ball that holds $x^*$ turn this identity into a certificate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core import checks, tree
from theorylab.errors import ArgumentError
from theorylab.hypergradient.contract import gram
from theorylab.hypergradient.estimators import Estimator, Hypergradient, as_estimator, compiled, flat_point
from theorylab.hypergradient.linear import Cholesky, Work
from theorylab.hypergradient.losses import Logistic, Softmax, Squares
from theorylab.hypergradient.selection import Selection

Array = jax.Array
KINDS = ("sharp", "raw")
REFINEMENTS = 30
SETTLED = 0.99                          # the radius is refined while a step takes more than 1 % off it
ROUNDING_UNITS = 4
STEEPEST = float(np.log(2 + np.sqrt(3)))    # where the third derivative of the logistic loss is largest
LARGEST_THIRD = float(1 / (6 * np.sqrt(3)))


class _Envelope(NamedTuple):
    r"""Bounds of the derivatives of a loss over all margins within r of t, row by row; t of shape (N,) or (N, q), r of shape (N,).

    Attributes:
        concordance: c with $|\ell'''[u, u, h]| \le c\, |h|\, \ell''[u, u]$.
        second: (t, r) -> w with $\ell'' \preceq w I$.
        third: (t, r, v) -> w with $|\ell'''[u, u, v]| \le w |u|^2$.
    """

    concordance: float
    second: Callable[[Array, Array], Array]
    third: Callable[[Array, Array, Array], Array]


def _bump(t: Array) -> Array:
    return jax.nn.sigmoid(t) * jax.nn.sigmoid(-t)


def _steepness(t: Array) -> Array:
    """The magnitude of the derivative of `_bump` at t >= 0; it rises up to STEEPEST and falls from there."""
    return _bump(t) * jnp.tanh(t / 2)


def _logistic_third(t: Array, r: Array, v: Array) -> Array:
    near, far = jnp.maximum(jnp.abs(t) - r, 0), jnp.abs(t) + r
    ends = jnp.maximum(_steepness(near), _steepness(far))
    return jnp.where((near <= STEEPEST) & (far >= STEEPEST), LARGEST_THIRD, ends) * jnp.abs(v)


# Softmax: the variance of u under any weights is at most |u|^2 / 2, and |h_k - mean of h| at most the range of h, itself at most sqrt(2) |h|.
ENVELOPES: dict[Any, _Envelope] = {
    Squares: _Envelope(0.0, lambda t, r: jnp.ones_like(r), lambda t, r, v: jnp.zeros_like(r)),
    Logistic: _Envelope(1.0, lambda t, r: _bump(jnp.maximum(jnp.abs(t) - r, 0)), _logistic_third),
    Softmax: _Envelope(2**0.5, lambda t, r: jnp.full_like(r, 0.5), lambda t, r, v: 0.5 * (jnp.max(v, axis=1) - jnp.min(v, axis=1))),
}


class Ball(NamedTuple):
    """A ball around x that holds the inner solution, a constant of strong convexity of the energy on it, and the eigenvalue problems it took."""

    radius: Array
    convexity: Array
    refinements: Array


def ball(problem: Selection, at: Any) -> Ball:
    r"""The ball $|x - x^*| \le \lVert F\rVert / \mu$, with $\mu$ refined by generalized self-concordance.

    The curvature of the data falls at most by the factor $e^{-c R\rho}$ within $\rho$ of x, R the largest row of A. From $\mu = \min_j D_j$ on,
    $\rho = \lVert F\rVert/\mu$ and $\mu = \lambda_{\min}(e^{-cR\rho} A^\top S A / N + \mathrm{diag}\, D)$ are iterated; every iterate is valid.
    The round-off of the sum F is added to its norm.
    """
    A, rows = problem.A, jnp.linalg.norm(problem.A, axis=1)
    curvature = problem.loss.hessian(A, at.weights, problem.shape) / len(A)
    penalties = jnp.broadcast_to(at.penalties, problem.shape).reshape(-1)
    slopes = problem.loss.slope(A @ at.x, problem.b)
    terms = jnp.mean(rows * jnp.linalg.norm(slopes.reshape(len(A), -1), axis=1)) + _height(at) * tree.norm(at.x)
    left = tree.norm(at.residual) + ROUNDING_UNITS * float(jnp.finfo(rows.dtype).eps) * terms
    rate = ENVELOPES[problem.loss].concordance * jnp.max(rows)

    def refine(loop: tuple[Ball, Array, Array]) -> tuple[Ball, Array, Array]:
        (radius, *_), _, steps = loop
        mu = jnp.linalg.eigvalsh(jnp.exp(-rate * radius) * curvature + jnp.diag(penalties))[0]
        mu = jnp.maximum(mu, jnp.min(penalties))
        return Ball(left / mu, mu, steps + 1), radius, steps + 1

    def unsettled(loop: tuple[Ball, Array, Array]) -> Array:
        found, before, steps = loop
        return (found.radius < SETTLED * before) & (steps < REFINEMENTS)

    zero = jnp.zeros((), jnp.int32)
    start = (Ball(left / jnp.min(penalties), jnp.min(penalties), zero), jnp.full_like(left, jnp.inf), zero)
    return lax.while_loop(unsettled, refine, start)[0]


def _height(at: Any) -> Array:
    """An upper bound of the largest eigenvalue of F_1: the largest sum of magnitudes of a row."""
    return jnp.max(jnp.sum(jnp.abs(at.matrix()), axis=1))


def _anchored(problem: Selection, x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    """The plain formula at x, a bound on its error, the Newton point, and the number of factorizations and eigenvalue problems."""
    at = problem.at(x, y)
    system = Cholesky().factor(at, True)
    adjoint = system.solve(at.outer_x, True)
    value = at.outer_y - at.cross_pullback(adjoint.value)
    radius, mu, refinements = ball(problem, at)

    A, shape = problem.A, problem.shape
    size = lambda z: jnp.linalg.norm(z.reshape(len(z), -1), axis=1)  # noqa: E731
    X, V, D = x.reshape(shape), adjoint.value.reshape(shape), at.penalties.reshape(-1)
    bend = gram(A, ENVELOPES[problem.loss].third(A @ X, size(A) * radius, A @ V)) / len(A)  # both terms by their majorants, so that they add
    if problem.objective != "linear":
        A_out = problem.A_out
        bend = bend + gram(A_out, ENVELOPES[problem.outer_loss].second(A_out @ X, size(A_out) * radius)) / problem.outer_rows
    slope = jnp.max(D * (size(X) + radius)) / mu
    bound = (jnp.max(D * size(V)) + slope * jnp.linalg.eigvalsh(bend)[-1]) * radius + slope * adjoint.residual
    # Round-off of the adjoint solve beyond its residual, and of the last products.
    rounding = _height(at) / mu * (tree.norm(at.outer_y) + jnp.max(D * size(X)) * tree.norm(adjoint.value))
    bound = bound + ROUNDING_UNITS * float(jnp.finfo(x.dtype).eps) * rounding
    return value, bound, x - system.solve(at.residual).value, refinements + 2


def error_bound(problem: Selection, x: Array, y: Array, value: Array, kind: str = "sharp") -> tuple[Array, Work]:
    r"""A bound on $\lVert g - \nabla L(y)\rVert$ for any estimate g = `value`, from flat x and y, and its cost; see `certificate`. Pure."""

    def anchor(_: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        z, best, count = carry
        plain, bound, newton, factorizations = _anchored(problem, z, y)
        bound = tree.norm(value - plain) + bound
        return newton, jnp.where(bound < best, bound, best), count + factorizations  # a Newton step astray gives NaN or a large number

    anchors = 2 if kind == "sharp" else 1
    start = (x, jnp.full((), jnp.inf, x.dtype), jnp.zeros((), jnp.int32))
    _, bound, factorizations = lax.fori_loop(0, anchors, anchor, start)
    return bound, Work(anchors - 1, 0, factorizations)


def check_certifiable(problem: Any) -> None:
    """Raise unless certificates are known for `problem`.

    Raises:
        ArgumentError: another problem.
    """
    if not isinstance(problem, Selection):
        raise ArgumentError("problem must be a RidgeSelection, LogisticSelection or SoftmaxSelection, whose curvature is bounded in closed form, "
                            f"got {type(problem).__name__}; hypergradient(...).error_estimate estimates the error of others")


def _certified(estimator: Estimator, problem: Selection, x: Array, y: Array, kind: str) -> Hypergradient:
    found = estimator.estimate(problem, x, y)
    bound, work = error_bound(problem, x, y, found.value, kind)
    return found._replace(error_bound=bound, work=found.work.plus(work))


def certificate(problem: Any, x: Any, y: Any, estimator: Estimator | None = None, kind: str = "sharp") -> Hypergradient:
    r"""The hypergradient with a proved bound on its error, for the selection problems.

    At an anchor point z the plain formula $\Omega(z)$ has the error bound

    $$ \beta(z) = \bigl(\lVert\Lambda_{21}\rVert + \bar J \lVert\Lambda_{11}\rVert\bigr) \rho + \bar J \lVert r\rVert , \qquad
       \rho = \lVert F\rVert / \mu, \quad \bar J = \max_j D_j (|z_j| + \rho) / \mu, $$

    with suprema over the ball of radius $\rho$, where $\mu$ comes from `ball`. Any estimate g then has the bound
    $\lVert g - \Omega(z)\rVert + \beta(z)$. With the anchor at x the bound is valid but loose, by factors of hundreds; with the anchor at the Newton
    point $x - F_1^{-1} F$ it is close to the true error as soon as Newton's method converges (companion derivation). Terms
    $c\,\epsilon\,\kappa$ stand for rounding errors. Dense: two factorizations and some tens of eigenvalue problems of size n.

    Args:
        problem: a `RidgeSelection`, `LogisticSelection` or `SoftmaxSelection`.
        x: an approximate inner solution, like the problem's x.
        y: hyper-parameters, like the problem's y.
        estimator: whose estimate is certified; `OnePoint()` unless given. `NewtonPoint()` has the smallest bound.
        kind: `"sharp"`, the smaller of the bounds with the two anchors; `"raw"`, the one with the anchor at x.

    Returns:
        A `Hypergradient` whose `error_bound` is set; infinite where nothing can be proved.

    Raises:
        ArgumentError: another problem.
        UnknownNameError: another `kind`.
        ShapeError, NonFiniteInputError: x or y does not match the problem, or is not finite.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.RidgeSelection((jnp.eye(2), jnp.array([3.0, 3.0])), (jnp.eye(2), jnp.ones(2)))
        >>> near = certificate(problem, jnp.array([1.6, 1.5]), jnp.zeros(2), hg.Plain())
        >>> exact = certificate(problem, jnp.array([1.5, 1.5]), jnp.zeros(2), hg.Plain())
        >>> bool(jnp.linalg.norm(near.value - exact.value) <= near.error_bound), bool(exact.error_bound < 1e-14)
        (True, True)
    """
    estimator = as_estimator(estimator)
    problem, flat_x, flat_y = flat_point(problem, x, y)
    check_certifiable(problem)
    checks.among("kind", kind, KINDS)
    if not tree.is_traced(problem, flat_x, flat_y, estimator):
        estimator.check(problem, flat_x, flat_y)
    found = compiled(_certified, estimator, problem, flat_x, flat_y, kind)
    return found._replace(value=problem.unpack_y(found.value), adjoint=problem.unpack_x(found.adjoint), correction=problem.unpack_y(found.correction))
