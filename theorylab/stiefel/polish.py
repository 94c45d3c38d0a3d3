"""Finishing: from a point near a solution to one on the manifold that solves the problem to round-off."""

from __future__ import annotations

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
from theorylab.stiefel.quantities import multiplier_of
from theorylab.stiefel.retractions import retract_of

Array = jax.Array
FORCING = 1e-4                          # relative residual of each Newton equation: four of them reach round-off


class _Near(NamedTuple):
    x: Blocks
    residual: Array
    steps: Array
    going: Array


def polish(problem: BlockProblem, x: Any, *, steps: int = 8) -> Any:
    r"""The solution near x: feasible and stationary to round-off, with columns in the order of the problem (companion derivation).

    x is retracted. Then Newton's equation on the tangent space, $\Pi(G'[U] - B U\,\mathrm{sym}(X^\top G)) = -\Pi(G)$, is solved by conjugate
    gradients, and x moves along U and is retracted, as long as that lowers the residual. In the end the columns of eigenvalue problems and
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

        def better(near: _Near) -> _Near:
            moved = _retracted(batch, tuple(xt + u for xt, u in zip(near.x, _newton(problem, batch, near.x, factors), strict=True)))
            residual = _residual(problem, batch, moved)
            good = residual < near.residual
            return _Near(tree.select(good, moved, near.x), jnp.where(good, residual, near.residual), near.steps + 1, good)

        start = _Near(x, _residual(problem, batch, x), jnp.zeros((), jnp.int32), jnp.asarray(True))
        x = lax.while_loop(lambda near: near.going & (near.steps < steps), better, start).x if steps else x
        return _retracted(batch, problem.arranged(x))


def _retracted(batch: Batch, x: Blocks) -> Blocks:
    return tuple(retract_of(op, xt, "polar") for op, xt in zip(batch.operators, x, strict=True))


def _projected(products: Blocks, blocks: Blocks) -> Blocks:
    """Blocks orthogonally projected to the tangent space, where xᵀ B u is skew."""
    return tuple(v - 2 * multiplier_of(bt, v) @ bt for bt, v in zip(products, blocks, strict=True))


def _residual(problem: BlockProblem, batch: Batch, x: Blocks) -> Array:
    images = batch.images(x)
    products = tuple(op.product(xt, im) for op, xt, im in zip(batch.operators, x, images, strict=True))
    off = _projected(products, problem.oracle(batch, x, images)[1])
    return jnp.sqrt(total(jnp.sum(a**2) for a in off))


def _newton(problem: BlockProblem, batch: Batch, x: Blocks, factors: Any) -> Blocks:
    """The Newton direction at a feasible point; zero where the equation has none of descent."""
    gradient = lambda x: problem.oracle(batch, x, batch.images(x))[1]  # noqa: E731
    gradients, along = jax.linearize(gradient, x)
    apply = lambda u: tuple(op.product(ut, op.image(ut)) for op, ut in zip(batch.operators, u, strict=True))  # noqa: E731
    products = apply(x)
    inside = tuple(_sym(product(xt, gt.mT)) for xt, gt in zip(x, gradients, strict=True))

    def hessian(u: Blocks) -> Blocks:
        return _projected(products, tuple(d - s @ bu for d, s, bu in zip(along(u), inside, apply(u), strict=True)))

    def inverse(r: Blocks) -> Blocks:  # of B on the tangent space, so that the condition of B does not matter
        return tuple(solve_with(lower, v) - _sym(product(xt, v.mT)) @ xt for lower, xt, v in zip(factors, x, r, strict=True))

    rest = tuple(-r for r in _projected(products, gradients))
    size = sum(xt.size for xt in x)
    end = linear.cg(hessian, rest, preconditioner=None if factors is None else inverse, tolerance=max(FORCING, 10 * float(jnp.finfo(x[0].dtype).eps)),
                    max_steps=min(2 * size, 500))
    return end.value
