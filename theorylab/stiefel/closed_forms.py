"""Exact solutions by dense linear algebra: what the iterative methods are compared with."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from theorylab.core.psd import product
from theorylab.errors import NoClosedFormError
from theorylab.stiefel.contract import BlockProblem, Blocks, total, white_of
from theorylab.stiefel.operators import Operator

Array = jax.Array


class Exact(NamedTuple):
    """An exact solution.

    Attributes:
        point: a minimizer: an array of shape `(n, p)`, or a tuple of them.
        objective: the minimum.
        values: leading eigenvalues or canonical correlations in descending order; None where there are none.
    """

    point: Any
    objective: Array
    values: Any = None


def closed_form(problem: Any) -> Exact:
    r"""The exact solution of `GEVP`, `LDA`, `CCA` and some `Procrustes` problems, by dense linear algebra of cost $O(n^3)$.

    Columns are in descending order of eigenvalue or correlation, with the largest entry of each positive. A singular B or covariance is taken on
    its range.

    Raises:
        NoClosedFormError: none is known.

    Example:
        >>> from theorylab.stiefel.eigen import GEVP
        >>> closed_form(GEVP(jnp.diag(jnp.array([4.0, 1.0])), jnp.diag(jnp.array([2.0, 1.0])), p=2)).values.round(12).tolist()
        [2.0, 1.0]
    """
    from theorylab.stiefel.cca import CCA, correlations
    from theorylab.stiefel.eigen import GEVP, leading
    from theorylab.stiefel.problem import Procrustes

    if isinstance(problem, GEVP):
        pairs = leading(problem.cost.matrix(), problem.operator.matrix(), problem.p, warn=False)
        return Exact(pairs.vectors * signs(pairs.vectors), -jnp.sum(pairs.values) / 2, pairs.values)
    if isinstance(problem, CCA):
        values, x, y = correlations(problem)
        sign = signs(x)
        return Exact((x * sign, y * sign), -jnp.sum(values), values)
    if isinstance(problem, Procrustes) and problem.solution is not None:
        return Exact(problem.solution.mT, problem.optimum)
    raise NoClosedFormError(f"no closed form is known for this {type(problem).__name__}; theorylab.solve finds a solution by iteration")


def signs(x: Array) -> Array:
    """The sign of the entry of largest magnitude in each column, shape `(1, p)`."""
    largest = jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), axis=0)[None], axis=0)
    return jnp.where(largest < 0, -jnp.ones_like(largest), jnp.ones_like(largest))


def ordered(problem: BlockProblem, x: Blocks) -> Blocks:
    r"""All blocks turned by the eigenvectors of $-\mathrm{sym}\sum_i X_i^\top G_i$ in descending order, largest entries in the first positive.

    For objectives that do not change under a common rotation of the columns, such as a trace: the Ritz vectors.
    """
    gradients = problem.at(x).gradients
    inside = total(product(xt, gt.mT) for xt, gt in zip(x, gradients, strict=True))
    vectors = jnp.linalg.eigh(-(inside + inside.mT) / 2)[1][:, ::-1]
    sign = signs((vectors.mT @ x[0]).mT).mT
    return tuple(sign * (vectors.mT @ xt) for xt in x)


@jax.jit
def nearest(operator: Operator, A: Any, C: Array) -> Array:
    r"""The transposed solution of a Procrustes problem with p = n, or without A and B.

    It is $W U V^\top$ with a whitening W of B and $U S V^\top = W^\top A^\top C$.
    """
    white, _ = white_of(operator.matrix())
    left, _, right = jnp.linalg.svd(product(white.mT, C if A is None else product(A.mT, C)), full_matrices=False)
    return product(white, left, right).mT
