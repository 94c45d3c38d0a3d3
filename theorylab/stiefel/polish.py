"""Finishing: from a point near a solution to one on the manifold that solves the problem to round-off."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core import checks, linear, tree
from theorylab.core.psd import product
from theorylab.stiefel.contract import Batch, BlockProblem, Blocks, total
from theorylab.stiefel.fields import _sym
from theorylab.stiefel.landing import factor_of, solve_with
from theorylab.stiefel.operators import TESTED, Implicit
from theorylab.stiefel.retractions import retract_of

Array = jax.Array
FORCING = 1e-4                          # relative residual of each Newton equation: four of them reach round-off
RETRY, MOST = 8.0, 500.0                # growth of the shift after a refused step, and the shift that ends the search


class _Near(NamedTuple):
    x: Blocks
    residual: Array
    steps: Array
    shift: Array


def polish(problem: BlockProblem, x: Any, *, steps: int = 20) -> Any:
    r"""The solution near x: feasible and stationary to round-off, with columns in the order of the problem (companion derivation).

    x is retracted. Then Newton's equation on the tangent space, $\Pi(G'[U] - B U\,\mathrm{sym}(X^\top G) + \tau B U) = -\Pi(G)$, is solved by
    conjugate gradients, with a shift $\tau$ in proportion to the residual, and x moves along U and is retracted. A step that does not lower the
    residual is tried again with a larger shift. In the end the columns of eigenvalue problems and
    correlations are turned to Ritz vectors, in descending order and with fixed signs. A point that is far from a minimizer is only retracted and
    turned. It uses the whole data, or the reference of a streamed problem.

    Args:
        problem: a problem of this family.
        x: a point of it, such as the end of a run; its columns must be independent in the inner product of B.
        steps: most Newton steps; 0 retracts and turns alone.

    Returns:
        A point like x.

    Raises:
        ShapeError: x is no point of the problem.
        NonFiniteInputError: x holds NaN or infinity.
        InfeasibleStartError: columns that are dependent in the inner product of B.

    Example:
        >>> from theorylab import stiefel
        >>> problem = stiefel.GEVP(jnp.diag(jnp.array([4.0, 1.0])), jnp.diag(jnp.array([2.0, 1.0])), p=1)
        >>> x = polish(problem, jnp.array([[0.6], [0.2]]))
        >>> bool(jnp.abs(x - jnp.array([[0.5**0.5], [0.0]])).max() < 1e-15)
        True
    """
    checks.whole("steps", steps, low=0)
    tree.check_finite("x", x)
    problem.check_start(x)
    return problem.unpack(_polished(problem, problem.pack(x), steps))


@partial(jax.jit, static_argnames="steps")
def _polished(problem: BlockProblem, x: Blocks, steps: int) -> Blocks:
    batch = problem.exact()
    with jax.default_matmul_precision("highest"):
        small = all(op.dim <= TESTED and not isinstance(op, Implicit) for op in batch.operators)
        factors = tuple(factor_of(op) for op in batch.operators) if small else None
        x = _retracted(batch, x)

        floor = 10 * jnp.finfo(x[0].dtype).eps * jnp.sqrt(total(jnp.sum(g**2) for g in problem.at(x).gradients))

        def better(near: _Near) -> _Near:
            direction = _newton(problem, batch, near.x, factors, near.shift * near.residual)
            moved = _retracted(batch, tuple(xt + u for xt, u in zip(near.x, direction, strict=True)))
            residual = _residual(problem, batch, moved)
            good = residual < near.residual
            shift = jnp.where(good, jnp.maximum(near.shift / RETRY, 1), near.shift * RETRY).astype(residual.dtype)
            return _Near(tree.select(good, moved, near.x), jnp.where(good, residual, near.residual), near.steps + 1, shift)

        def unfinished(near: _Near) -> Array:
            return (near.residual > floor) & (near.steps < steps) & (near.shift < MOST)

        residual = _residual(problem, batch, x)
        x = lax.while_loop(unfinished, better, _Near(x, residual, jnp.zeros((), jnp.int32), jnp.ones_like(residual))).x if steps else x
        return _retracted(batch, problem.arranged(x))


def _retracted(batch: Batch, x: Blocks) -> Blocks:
    return tuple(retract_of(op, xt, "cholesky") for op, xt in zip(batch.operators, x, strict=True))


def _projection(products: Blocks) -> Callable[[Blocks], Blocks]:
    """The orthogonal projection of blocks to the tangent space, where xᵀ B u is skew, from the products B x; see `multiplier`."""
    pairs = [jnp.linalg.eigh(_sym(product(bt, bt.mT))) for bt in products]

    def normal(bt: Array, pair: Any, v: Array) -> Array:
        values, vectors = pair
        inside = product(vectors.mT, _sym(product(bt, v.mT)), vectors)
        return 2 * product(vectors, inside / (values[:, None] + values), vectors.mT) @ bt

    return lambda blocks: tuple(v - normal(bt, pair, v) for bt, pair, v in zip(products, pairs, blocks, strict=True))


def _residual(problem: BlockProblem, batch: Batch, x: Blocks) -> Array:
    images = batch.images(x)
    products = tuple(op.product(xt, im) for op, xt, im in zip(batch.operators, x, images, strict=True))
    off = _projection(products)(problem.oracle(batch, x, images)[1])
    return jnp.sqrt(total(jnp.sum(a**2) for a in off))


def _newton(problem: BlockProblem, batch: Batch, x: Blocks, factors: Any, shift: Array) -> Blocks:
    """The Newton direction at a feasible point; zero where the equation has none of descent."""
    gradient = lambda x: problem.oracle(batch, x, batch.images(x))[1]  # noqa: E731
    gradients, along = jax.linearize(gradient, x)
    apply = lambda u: tuple(op.product(ut, op.image(ut)) for op, ut in zip(batch.operators, u, strict=True))  # noqa: E731
    products = apply(x)
    project = _projection(products)
    inside = tuple(_sym(product(xt, gt.mT)) for xt, gt in zip(x, gradients, strict=True))

    # rotations of the columns have no curvature for many objectives; the shift keeps the equation definite near a minimizer
    shift = shift * jnp.sqrt(total(jnp.sum(xt**2) for xt in x)) / x[0].shape[0]

    def hessian(u: Blocks) -> Blocks:
        return project(tuple(d - s @ bu + shift * bu for d, s, bu in zip(along(u), inside, apply(u), strict=True)))

    def inverse(r: Blocks) -> Blocks:  # of B on the tangent space, so that the condition of B does not matter
        return tuple(solve_with(lower, v) - _sym(product(xt, v.mT)) @ xt for lower, xt, v in zip(factors, x, r, strict=True))

    rest = tuple(-r for r in project(gradients))
    size = sum(xt.size for xt in x)
    end = linear.cg(hessian, rest, preconditioner=None if factors is None else inverse, tolerance=max(FORCING, 10 * float(jnp.finfo(x[0].dtype).eps)),
                    max_steps=min(2 * size, 500))
    return end.value
