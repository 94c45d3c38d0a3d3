r"""Numbers and matrices that belong to a point: constraint violation, multiplier, merit function, Amari distance."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from theorylab.core import checks
from theorylab.core.psd import _lyapunov, product
from theorylab.errors import ShapeError
from theorylab.stiefel.fields import _gram, _residual, _sym, _tall
from theorylab.stiefel.operators import as_operator
from theorylab.stiefel.retractions import gram_of

Array = jax.Array


def infeasibility(X: Any, B: Any = None) -> Array:
    r"""The violation $\lVert X^\top B X - I\rVert_F$ of the constraint, written d or $\lVert h\rVert$ elsewhere.

    Args:
        X: shape `(n, p)`.
        B: a matrix, an operator, a function x -> B x, rows of data ($A^\top A / r$), or None for the identity.

    Raises:
        ShapeError: shapes that do not match, or more columns than rows.

    Example:
        >>> float(infeasibility(jnp.array([[2.0], [0.0]])))
        3.0
    """
    xt = _tall(X=X)[0]
    operator = as_operator("B", B, xt.shape[-1], dtype=xt.dtype)
    return jnp.linalg.norm(_residual(gram_of(operator, xt)))


def multiplier(X: Any, B: Any, gradient: Any) -> Array:
    r"""The multiplier $\lambda = \arg\min_S \lVert G - 2 B X S\rVert_F$ over symmetric S.

    It solves $S_2 \lambda + \lambda S_2 = \mathrm{sym}(X^\top B G)$ with $S_2 = X^\top B^2 X$ (companion derivation).

    Args:
        X: shape `(n, p)`.
        B: a matrix, an operator, a function x -> B x, rows of data, or None for the identity.
        gradient: Euclidean gradient G, shape `(n, p)`.

    Raises:
        ShapeError: shapes that do not match, or more columns than rows.

    Example:
        >>> multiplier(jnp.eye(2), None, jnp.diag(jnp.array([2.0, 4.0]))).round(12).tolist()
        [[1.0, 0.0], [0.0, 2.0]]
    """
    xt, gt = _tall(X=X, gradient=gradient)
    operator = as_operator("B", B, xt.shape[-1], dtype=xt.dtype)
    return multiplier_of(operator.product(xt, operator.image(xt)), gt)


@jax.jit
def multiplier_of(bt: Array, gt: Array) -> Array:
    """The same from the transposed product B x and gradient."""
    square = _gram(bt, bt)
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(square))
    total = values[..., :, None] + values[..., None, :]
    return _sym(_lyapunov(values, vectors, square, _sym(product(bt, gt.mT)), total > 0))


def merit(problem: Any, x: Any, penalty: Any = 1.0) -> Array:
    r"""The merit function $f(X) - \langle\lambda(X), h(X)\rangle + \mu \tfrac14\lVert h(X)\rVert^2$, summed over blocks.

    It is Fletcher's augmented Lagrangian (paper). For $\mu$ large enough the landing field is a direction of ascent of it on
    the safe region. It can be differentiated.

    Args:
        problem: a problem of this family.
        x: a point of the problem.
        penalty: the weight $\mu$.

    Raises:
        ShapeError: x is no point of the problem.

    Example:
        >>> from theorylab.stiefel.eigen import GEVP
        >>> round(float(merit(GEVP(jnp.eye(2), jnp.eye(2), p=1), jnp.array([[1.0], [0.0]]))), 12)
        -0.5
    """
    point = problem.at(problem.pack(x))
    total = point.objective
    for operator, xt, image, gram, gt in zip(problem.exact().operators, point.x, point.images, point.grams, point.gradients, strict=True):
        h = _residual(gram)
        total = total - jnp.sum(multiplier_of(operator.product(xt, image), gt) * h) + penalty / 4 * jnp.sum(h**2)
    return total


def amari_distance(W: Any, A: Any) -> Array:
    r"""The distance of W A from a scaled permutation.

    $\tfrac{1}{2p}(s(P) + s(P^\top))$ with $P = (WA)^{\circ 2}$ and $s(P) = \sum_i (\sum_j P_{ij} / \max_j P_{ij} - 1)$: with squares, as
    in the official code of the paper. It is 0 iff W undoes A up to order, sign and scale.

    Args:
        W: unmixing matrix, shape `(p, n)`: the transposed point of `ICA`.
        A: mixing matrix, shape `(n, p)`.

    Raises:
        ShapeError: shapes that do not match.

    Example:
        >>> float(amari_distance(jnp.array([[0.0, 2.0], [1.0, 0.0]]), jnp.eye(2)))
        0.0
    """
    W, A = checks.array("W", W, (None, None)), checks.array("A", A, (None, None))
    if W.shape != A.shape[::-1]:
        raise ShapeError(f"W must have shape {A.shape[::-1]} to match A, got {W.shape}")
    checks.same_dtype(W=W, A=A)
    return amari_of(product(W, A))


def amari_of(mixed: Array) -> Array:
    """The same from the product W A."""
    squares = mixed**2

    def excess(p: Array) -> Array:
        return jnp.sum(jnp.sum(p, axis=-1) / jnp.max(p, axis=-1) - 1)

    return (excess(squares) + excess(squares.mT)) / (2 * squares.shape[-1])
