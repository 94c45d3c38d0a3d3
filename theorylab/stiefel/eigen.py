"""Generalized eigenvalues and linear discriminant analysis."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks, pencil
from theorylab.core.keys import Key, stream
from theorylab.core.module import choice, size
from theorylab.core.psd import product, rank_cut
from theorylab.errors import ArgumentError, MatrixError, ShapeError
from theorylab.stiefel.closed_forms import ordered
from theorylab.stiefel.contract import Batch, BlockProblem, Blocks, Point, check_rank, columns_argument, fill, measured, reference_of, sines, whitened
from theorylab.stiefel.operators import Dense, Gram, Implicit, Operator, as_operator, fed_rows, plus, ridge_argument

Array = jax.Array


class GEVP(BlockProblem):
    r"""The generalized eigenvalue problem: minimize $-\tfrac12 \mathrm{tr}(X^\top A X)$ over $X^\top B X = I$.

    Minimizers are the B-orthonormal bases of the span of the p leading eigenvectors of $A v = \lambda B v$; the minimum is
    $-\tfrac12 \sum_{i \le p} \lambda_i$. Either matrix may be given by rows of data, whose means of $a a^\top$ are then drawn in batches.

    Args:
        A: symmetric matrix of shape `(n, n)`, rows of data, a function x -> A x, or an operator such as `Population`.
        B: likewise, positive semidefinite; None is the identity.
        p: number of columns.
        reference: what is computed at once for the metrics: `"solution"` (for `gap` and `error`), `"value"` (for `gap`), `"none"`, or
            `"auto"`, which is `"solution"` for n up to 1024.
        n: the size of both, where neither tells it: functions, or None.

    Raises:
        ShapeError, MatrixError, NonFiniteInputError: A or B are no such matrices.
        ArgumentError: p is not between 1 and n, or the size is not known.

    Example:
        >>> problem = GEVP(jnp.diag(jnp.array([4.0, 1.0])), jnp.diag(jnp.array([2.0, 1.0])), p=1)
        >>> [round(float(problem.metrics(jnp.array([[0.0], [1.0]]))[name]), 12) for name in ("objective", "gap", "error")]
        [-0.5, 0.5, 1.0]
    """

    cost: Operator
    operator: Operator
    optimum: Any
    solution: Any
    batch: Batch | None
    p: int = size()
    fed: bool = choice()

    def __init__(self, A: Any, B: Any, p: int, *, reference: str = "auto", n: int | None = None):
        a, b = (_plain(M) for M in (A, B))
        self.cost = as_operator("A", a, n or _size(a) or _size(b), positive=False)
        self.operator = as_operator("B", b, self.cost.dim, dtype=self.cost.dtype)
        if not isinstance(self.cost, Implicit) and not isinstance(self.operator, Implicit):
            checks.same_dtype(A=self.cost, B=self.operator)
        self.p = columns_argument(p, self.operator.dim)
        self.batch = self.optimum = self.solution = None
        self.fed = False
        fill(self, {}, reference)

    def referred(self, reference: str) -> dict[str, Any]:
        value, solution = measured(reference, self.dims)
        if not value:
            check_rank(self.p, B=self.operator)
            return {}
        pairs = leading(self.cost.matrix(), self.operator.matrix(), self.p)
        return {"optimum": -jnp.sum(pairs.values) / 2} | ({"solution": reference_of(self.operator, pairs.vectors)} if solution else {})

    @classmethod
    def streamed(cls, A: Any, B: Any, p: int, **options: Any) -> Self:
        """The problem for `iterate(..., data=)`: A and B (matrices, `Moments` or held-out rows) are what metrics refer to.

        A batch is a pair of arrays of rows: the means of $a a^T$ over the first stand for A in that step, over the second for B.

        Example:
            >>> GEVP.streamed(jnp.eye(2), jnp.eye(2), p=1).feed((jnp.ones((4, 2)), jnp.ones((5, 2)))).batch.cost.rows.shape
            (4, 2)
        """
        return fill(cls(A, B, p, **options), {"fed": True})

    def feed(self, batch: Any) -> Self:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ShapeError(f"batch must be a pair of arrays of rows, for A and for B, got {type(batch).__name__}")
        a, b = (Gram(fed_rows(rows, self.operator.dim, self.dtype)) for rows in batch)
        return self.holding(Batch((b,), a))

    def exact(self) -> Batch:
        return Batch((self.operator,), self.cost)

    def oracle(self, batch: Batch, x: Blocks, images: Blocks) -> tuple[Array, Blocks]:
        gradient = -batch.cost.product(x[0], batch.cost.image(x[0]))
        return jnp.sum(x[0] * gradient) / 2, (gradient,)

    def draw(self, key: Key, batch_size: int, step: Any, order: str, padded: bool) -> Batch:
        if self.operator.exact and self.cost.exact:
            return super().draw(key, batch_size, step, order, padded)
        of = lambda op, name: op.draw(stream(key, name), batch_size, step, order, padded)  # noqa: E731
        return Batch((of(self.operator, "B"),), of(self.cost, "A"))

    def dense(self, batch: Batch) -> Any:
        return batch.operators[0].matrix(), batch.cost.matrix()

    def from_dense(self, matrices: Any, batch: Batch) -> Batch:
        return Batch((Dense(matrices[0]),), Dense(matrices[1]))

    def quality(self, point: Point, lowers: Blocks) -> dict[str, Array]:
        row = {}
        if self.optimum is not None:
            inside = -product(point.x[0], point.gradients[0].mT)
            row["gap"] = jnp.maximum(-jnp.trace(whitened(lowers, inside)) / 2 - self.optimum, 0)
        if self.solution is not None:
            row["error"] = sines(self.solution, point.x[0], self.operator.product(point.x[0], point.images[0]), lowers[0])
        return row

    def arranged(self, x: Blocks) -> Blocks:
        """Ritz vectors in descending order of their values, the largest entry of each positive."""
        return ordered(self, x)


class LDA(GEVP):
    r"""Linear discriminant analysis: the `GEVP` of the scatter between classes and the scatter within classes, both divided by the number of rows.

    Args:
        X: data, shape `(rows, n)`.
        labels: class of each row, shape `(rows,)`; at least two classes.
        p: number of directions; at most the number of classes less one are of use.
        ridge: added to the scatter within: a number, or a matrix.
        reference: as for `GEVP`.

    Raises:
        ShapeError, NonFiniteInputError: X or labels are no such arrays.
        ArgumentError: fewer than two classes, or p is not between 1 and n.

    Example:
        >>> x = jnp.array([[0.0, 1.0], [0.0, -1.0], [2.0, 1.0], [2.0, -1.0]])
        >>> LDA(x, [0, 0, 1, 1], p=1, ridge=0.5).metrics(jnp.array([[2.0**0.5], [0.0]]))["objective"].round(12).item()
        -1.0
    """

    def __init__(self, X: Any, labels: Any, p: int, *, ridge: Any = 0.0, reference: str = "auto"):
        X = checks.array("X", X, (None, None))
        if np.shape(labels) != X.shape[:1]:
            raise ShapeError(f"labels must have shape ({X.shape[0]},) to match X, got {np.shape(labels)}")
        classes, index = np.unique(np.asarray(labels), return_inverse=True)
        if len(classes) < 2:
            raise ArgumentError(f"labels must name at least two classes, got {len(classes)}")
        member = jnp.asarray(index.reshape(-1)[:, None] == np.arange(len(classes)), X.dtype)
        between, within = _scatters(X, member)
        self.cost, self.operator = Dense(between), Dense(plus(within, ridge_argument("ridge", ridge, X.shape[1])))
        self.p, self.fed = columns_argument(p, X.shape[1]), False
        self.batch = self.optimum = self.solution = None
        fill(self, {}, reference)


@jax.jit
def _scatters(X: Array, member: Array) -> tuple[Array, Array]:
    """The scatter between classes and within them, from the indicators of the classes."""
    weight, mean = jnp.mean(member, axis=0), jnp.mean(X, axis=0)
    means = product(member.mT, X) / jnp.sum(member, axis=0)[:, None]
    apart, around = means - mean, X - product(member, means)
    return product(apart.mT * weight, apart), product(around.mT, around) / X.shape[0]


def leading(a: Array, b: Array, p: int, warn: bool = True) -> pencil.Eigenpairs:
    """The p leading eigenpairs of the pencil in descending order, and the rank of B.

    Raises:
        MatrixError: the rank of B is below p, so that no point is feasible.
    """
    n = a.shape[-1]
    values, vectors, rank = _leading(a, b, p)
    if checks.known(rank):
        if int(rank) < p:
            raise MatrixError(f"B must have rank at least p = {p} for a point with X'BX = I to exist, got rank {int(rank)}; lower p or add a "
                              "ridge to B")
        if int(rank) < n and warn:
            warnings.warn(f"B has rank {int(rank)} of {n}: points are unbounded along its kernel, and so may be the objective; add a ridge to B",
                          stacklevel=4)
    return pencil.Eigenpairs(values, vectors, rank)


@partial(jax.jit, static_argnames="p")
def _leading(a: Array, b: Array, p: int) -> tuple[Array, Array, Array]:
    values, vectors = pencil._eigh_of(a, b, jnp.asarray(rank_cut(a.shape[-1], b.dtype), b.dtype))
    rank = jnp.sum(jnp.isfinite(values), dtype=jnp.int32)
    last = rank - 1 - jnp.arange(p, dtype=rank.dtype)      # infinite values of a singular B stand at the end
    return values[last], vectors[:, last], rank


def _plain(M: Any) -> Any:
    """Moments as their matrix; anything else as it is."""
    return getattr(M, "second", M)


def _size(M: Any) -> int | None:
    """The size of a matrix; None where it is given by a function, which does not know it."""
    if isinstance(M, Operator):
        return M.dim
    return None if M is None or callable(M) else int((np.shape(M) or (0,))[-1])
