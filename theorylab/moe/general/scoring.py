"""Steps of maximization that all gates and experts share: Fisher scoring for probabilities, weighted least squares, the best of some moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from theorylab.core.psd import product
from theorylab.moe.moments import to_inputs

Array = jax.Array
RIDGE = 1e-9                                        # damping of a scoring step, relative to the diagonal
SINGLE_RIDGE = 1e-5                                 # added to it in float32, whose round-off is larger
RANK_RIDGE = 1e-12                                  # relative, where rows do not determine a regression
FRACTIONS = (0.0, 1.0, 0.5, 0.25, 0.125)            # of a move, of which the best is taken


def location(values: Array, weight: Array) -> tuple[Array, Array]:
    """Weighted mean and standard deviation of the columns of `values`; 1 for the deviation of a constant."""
    total = jnp.sum(weight)
    mean = weight @ values / total
    variance = weight @ (values - mean) ** 2 / total
    return mean, jnp.sqrt(jnp.where(variance > 0, variance, jnp.ones_like(variance)))


def standardized(features: Array, center: Array, scale: Array) -> Array:
    """The design (1, (features - center) / scale), shape `(n, p)`."""
    return jnp.concatenate([jnp.ones((features.shape[0], 1), features.dtype), (features - center) / scale], axis=1)


class Regression(NamedTuple):
    """Changes of the coefficients on (1, features), shape `(k, m, p)`, and which experts have fewer rows than coefficients."""

    change: Array
    starved: Array


def regression(features: Array, residual: Array, weights: Array) -> Regression:
    """Weighted least squares of `residual` (n, k, m) on (1, features), expert by expert, with `weights` (n, k).

    Solved in standardized features, so that inputs far from 0 lose no digits; a starved expert does not change.
    """
    center, scale = location(features, jnp.sum(weights, axis=1))
    z = standardized(features, center, scale)
    k, m, p = weights.shape[1], residual.shape[2], z.shape[1]
    starved = jnp.sum(weights, axis=0) < p

    def solve(weight: Array, target: Array, starved: Array) -> Array:
        weighted = z * weight[:, None]
        eye = jnp.eye(p, dtype=z.dtype)
        gram = jnp.where(starved, eye, product(weighted.T, z))
        factor = jnp.linalg.cholesky(gram)
        damped = jnp.linalg.cholesky(gram + RANK_RIDGE * jnp.trace(gram) / p * eye)
        factor = jnp.where(jnp.all(jnp.isfinite(factor)), factor, damped)
        return cho_solve((factor, True), product(weighted.T, target)).T

    change = jax.vmap(solve, in_axes=(1, 1, 0))(weights, residual, starved)
    raw = to_inputs(change.reshape(k * m, p), center, scale).reshape(k, m, p)
    return Regression(jnp.where(starved[:, None, None], jnp.zeros_like(raw), raw), starved)


def damped(matrix: Array, gradient: Array, damping: Any) -> Array:
    """The solution of (matrix + damping diag(matrix)) move = gradient; coordinates without curvature are damped like the stiffest."""
    diagonal = jnp.diagonal(matrix)
    largest = jnp.max(diagonal)
    unit = jnp.where(diagonal > float(jnp.finfo(matrix.dtype).eps) * largest, diagonal, jnp.where(largest > 0, largest, jnp.ones_like(largest)))
    unit = jnp.sqrt(unit)
    least = 0.0 if matrix.dtype == jnp.float64 else SINGLE_RIDGE
    scaled = matrix / (unit[:, None] * unit) + (damping + least) * jnp.eye(len(unit), dtype=matrix.dtype)
    move = cho_solve((jnp.linalg.cholesky(scaled), True), gradient / unit) / unit
    return jnp.where(jnp.all(jnp.isfinite(move)), move, jnp.zeros_like(move))


def scoring(log_probabilities: Callable[[Array], Array], size: int, share: Array, ridge: Any = RIDGE) -> Array:
    r"""The Fisher scoring move for $Q(\theta) = \sum_{ij} r_{ij} \log \pi_{ij}(\theta)$ at $\theta = 0$, with `share` r of shape `(n, c)`.

    The curvature $\sum_{ij} w_i \pi_{ij} \nabla \log \pi_{ij} \nabla \log \pi_{ij}^\top$ with $w_i = \sum_j r_{ij}$ is never indefinite, and is the
    exact one, so that this is Newton's move, where the logits are linear in the parameters.
    """
    slopes, value = jax.jacfwd(lambda change: (log_probabilities(change),) * 2, has_aux=True)(jnp.zeros(size, share.dtype))
    rows = (jnp.sqrt(jnp.sum(share, axis=1, keepdims=True) * jnp.exp(value))[:, :, None] * slopes).reshape(-1, size)
    return damped(product(rows.T, rows), jnp.tensordot(share, slopes, 2, precision=jax.lax.Precision.HIGHEST), ridge)


def best(objective: Callable[[Array], Array], moves: Array) -> Array:
    """The row of `moves` with the largest objective; the first is 0, so that nothing is lost."""
    values = jax.vmap(objective)(moves)
    return moves[jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))]


def fractions(move: Array) -> Array:
    """Fractions of a move as rows, 0 first."""
    return jnp.asarray(FRACTIONS, move.dtype)[:, None] * move
