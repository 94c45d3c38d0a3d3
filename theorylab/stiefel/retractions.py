r"""Return to the manifold: $X^\top B X = I$ to round-off from a nearby point."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core import checks
from theorylab.core.psd import product
from theorylab.errors import MatrixError
from theorylab.stiefel.fields import _residual, _sym, _tall
from theorylab.stiefel.operators import Operator, as_operator

Array = jax.Array
KINDS = ("cholesky", "polar", "newton_schulz")


def retract(X: Any, B: Any = None, kind: str = "cholesky", *, steps: int = 12) -> Array:
    r"""A point of the manifold near X, with the same column span.

    `"cholesky"`: $X L^{-\top}$ with $L L^\top = X^\top B X$; keeps the span of the first columns. `"polar"`: $X (X^\top B X)^{-1/2}$, the nearest
    point in the norm of B. `"newton_schulz"`: the polar factor by $X \leftarrow X (3I - X^\top B X)/2$, products only,
    $h \to -\tfrac34 h^2 + \tfrac14 h^3$; it converges if the eigenvalues of $X^\top B X$ are in (0, 3). The correction is made twice, each with one
    product with B; the second removes the round-off of the first. Compiled code answers dependent columns with NaN.

    Args:
        X: shape `(n, p)`.
        B: a matrix, an operator, a function x -> B x, rows of data ($A^\top A / r$), or None for the identity.
        kind: `"cholesky"`, `"polar"` or `"newton_schulz"`.
        steps: most Newton-Schulz steps; they cost p by p products.

    Raises:
        ShapeError: shapes that do not match, or more columns than rows.
        MatrixError: the columns are dependent in the inner product of B, or out of reach of Newton-Schulz.
        UnknownNameError: another kind.

    Example:
        >>> retract(jnp.array([[3.0], [4.0]])).round(12).tolist()
        [[0.6], [0.8]]
        >>> retract(1.2 * jnp.eye(2), kind="newton_schulz").round(12).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    checks.among("kind", kind, KINDS)
    checks.whole("steps", steps, low=1)
    xt = _tall(X=X)[0]
    operator = as_operator("B", B, xt.shape[-1], dtype=xt.dtype)
    checks.same_dtype(X=xt, B=operator)
    gram = gram_of(operator, xt)
    if checks.known(gram):
        values = np.linalg.eigvalsh(np.asarray(gram))
        if not values[0] > 0:
            raise MatrixError(f"columns of X must be independent in the inner product of B, X'BX has smallest eigenvalue {values[0]:.3g}")
        if kind == "newton_schulz" and not values[-1] < 3:
            raise MatrixError(f"X'BX must have eigenvalues in (0, 3) for kind 'newton_schulz', the largest is {values[-1]:.3g}; "
                              "use 'polar', which gives the same point")
    return retract_of(operator, xt, kind, steps).mT


@partial(jax.jit, static_argnames=("kind", "steps"))
def retract_of(operator: Operator, xt: Array, kind: str, steps: int = 12) -> Array:
    """The same on a transposed point, with the products of an operator."""
    for _ in range(2):
        xt = correct(gram_of(operator, xt), xt, kind, steps)
    return xt


@jax.jit
def gram_of(operator: Operator, xt: Array) -> Array:
    """The Gram matrix xᵀ B x of a transposed point."""
    image = operator.image(xt)
    return _sym(operator.inner(xt, image, xt, image))


def correct(gram: Array, xt: Array, kind: str, steps: int = 12) -> Array:
    """The transposed point, or anything linear in it such as its image, after one correction with the Gram matrix xᵀ B x."""
    if kind == "cholesky":
        return divide(jnp.linalg.cholesky(gram, symmetrize_input=False), xt)
    if kind == "polar":
        values, vectors = jnp.linalg.eigh(gram)
        return product(vectors / jnp.sqrt(values), vectors.mT) @ xt
    return newton_schulz_factor(gram, steps) @ xt


def divide(lower: Array, a: Array) -> Array:
    """L⁻¹ a for a lower triangular matrix L."""
    return lax.linalg.triangular_solve(lower, a, left_side=True, lower=True)


@partial(jax.jit, static_argnames="steps")
def newton_schulz_factor(gram: Array, steps: int) -> Array:
    """The symmetric K for which x K is x after some Newton-Schulz steps; K and the Gram matrix commute."""

    def step(_: Any, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, m = pair
        half = jnp.eye(m.shape[-1], dtype=m.dtype) - _residual(m) / 2
        return _sym(product(factor, half)), _sym(product(half, m, half))

    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return lax.fori_loop(0, steps, step, (eye, gram))[0]
