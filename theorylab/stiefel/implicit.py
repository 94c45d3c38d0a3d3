r"""Solutions as differentiable functions of the data: eigenvalues, correlations, and what belongs to the subspace and not to a basis of it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from theorylab.core import pencil
from theorylab.core.psd import product, rank_cut
from theorylab.errors import NoClosedFormError
from theorylab.stiefel.certificate import joined
from theorylab.stiefel.contract import BlockProblem

Array = jax.Array


class SolutionMap(NamedTuple):
    r"""The parts of a solution that do not depend on the choice of a basis.

    Attributes:
        values: the p leading eigenvalues or correlations, descending.
        outer: $X X^\top$, shape `(n, n)`; for two views the pair $X X^\top$, $Y Y^\top$.
        projector: $X X^\top B$, the projector on the subspace that is orthogonal in B; for two views a pair.
        cross: $X Y^\top$ for two views, else None.
    """

    values: Array
    outer: Any
    projector: Any
    cross: Any = None


def solution_map(problem: BlockProblem) -> SolutionMap:
    r"""The solution of `GEVP`, `LDA` or `CCA`, with the derivative of the equations that define it (companion derivation).

    Raw eigenvectors have no derivative where eigenvalues coincide; the subspace has one as long as $\lambda_p > \lambda_{p+1}$. With the leading
    eigenvectors X, the others Y, and $\dot A$, $\dot B$,
    $$ d(XX^\top) = Y K X^\top + X K^\top Y^\top - X (X^\top \dot B X) X^\top, \qquad
       K_{ij} = \frac{y_i^\top(\dot A - \lambda_j \dot B)x_j}{\lambda_j - \mu_i}, \qquad
       d\lambda_j = x_j^\top (\dot A - \lambda_j \dot B) x_j, $$
    where no difference of two of the p leading eigenvalues occurs. Of eigenvalues that coincide, functions that do not depend on their order
    (their sum) have exact derivatives; single ones have none. Canonical correlations are the eigenvalue problem of both views together. Make the
    problem from the parameters inside the function that is differentiated, with `reference="none"`. A singular B is taken on its range, and is
    moved within it. Dense: $O(n^3)$. `grad`, `jacobian`, `jit` and `vmap` work; second derivatives need simple eigenvalues.

    Args:
        problem: a `GEVP`, an `LDA` or a `CCA`, whose matrices can be formed.

    Raises:
        NoClosedFormError: another problem.

    Example:
        >>> from theorylab import stiefel
        >>> def loss(t):
        ...     problem = stiefel.GEVP(jnp.diag(jnp.array([2.0, 2.0, 1.0])) + t * jnp.ones((3, 3)), None, p=2, reference="none")
        ...     return solution_map(problem).outer[0, 2]
        >>> round(float(jax.grad(loss)(0.0)), 12)
        1.0
    """
    from theorylab.stiefel.cca import CCA
    from theorylab.stiefel.eigen import GEVP

    batch = problem.exact()
    if isinstance(problem, GEVP):
        b = batch.operators[0].matrix()
        values, outer = _leading(batch.cost.matrix(), b, problem.p)
        return SolutionMap(values, outer, product(outer, b))
    if isinstance(problem, CCA):
        if batch.cost is None:
            raise NoClosedFormError("solution_map forms the covariances, which this CCA of wide views does not hold")
        n = problem.dims[0]
        values, outer = _leading(*joined(batch), problem.p)
        parts = 2 * outer[:n, :n], 2 * outer[n:, n:]
        return SolutionMap(values, parts, tuple(product(part, op.matrix()) for part, op in zip(parts, batch.operators, strict=True)),
                           2 * outer[:n, n:])
    raise NoClosedFormError(f"solution_map is known for GEVP, LDA and CCA, got {type(problem).__name__}; differentiate a run with loop='scan'")


@partial(jax.jit, static_argnums=2)
def _leading(a: Array, b: Array, p: int) -> tuple[Array, Array]:
    return _subspace((a + a.mT) / 2, (b + b.mT) / 2, p)


def _split(a: Array, b: Array, p: int) -> tuple[Array, Array, Array, Array]:
    """Leading eigenvalues and vectors in descending order, and the others with infinity where B vanishes."""
    n = a.shape[-1]
    values, vectors = pencil._eigh_of(a, b, jnp.asarray(rank_cut(n, b.dtype), b.dtype))
    rank = jnp.sum(jnp.isfinite(values), dtype=jnp.int32)
    order = (rank - 1 - jnp.arange(n, dtype=jnp.int32)) % n          # places of infinite values come last
    values, vectors = values[order], vectors[:, order]
    return values[:p], vectors[:, :p], values[p:], vectors[:, p:]


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _subspace(a: Array, b: Array, p: int) -> tuple[Array, Array]:
    values, x, _, _ = _split(a, b, p)
    return values, product(x, x.mT)


@_subspace.defjvp
def _subspace_rule(p: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[tuple, tuple]:
    (a, b), (da, db) = primals, tangents
    values, x, rest, y = _split(a, b, p)
    push = product(da, x) - product(db, x) * values
    used = jnp.isfinite(rest)[:, None]
    gap = values - jnp.where(used, rest[:, None], values - 1)
    turn = jnp.where(used, product(y.mT, push) / gap, jnp.zeros_like(gap))
    across = product(y, turn, x.mT)
    stretch = product(x, x.mT, db, x, x.mT)
    return (values, product(x, x.mT)), (jnp.sum(x * push, axis=0), across + across.mT - stretch)
