"""Canonical correlation analysis of two or more views: in memory, from moments, or fed from a stream."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp

from theorylab.core import checks
from theorylab.core.keys import Key
from theorylab.core.module import choice, size
from theorylab.core.psd import product
from theorylab.errors import ArgumentError, MatrixError, ShapeError
from theorylab.stiefel.closed_forms import ordered, signs
from theorylab.stiefel.contract import (
    Batch,
    BlockProblem,
    Blocks,
    Point,
    check_rank,
    columns_argument,
    fill,
    measured,
    sines,
    total,
    white_of,
    whitened,
)
from theorylab.stiefel.moments import Moments, column_means, unweighted
from theorylab.stiefel.operators import TESTED, Dense, Gram, batch_rows, fed_gram, plus, ridge_argument

Array = jax.Array


class MultiviewCCA(BlockProblem):
    r"""Directions of several views with the largest sum of correlations.

    Minimize $-\sum_{i<j} \mathrm{tr}(X_i^\top C_{ij} X_j)$ over $X_i^\top C_{ii} X_i = I$. A point is a tuple of one block for each
    view. Views are centred. The exact covariances are formed where no view has more than 1024 columns; beyond that everything goes through the
    rows, and no array of size n by n exists.

    Args:
        views: data of each view, shapes `(rows, n_i)` with the same rows.
        p: number of directions of each view.
        ridge: added to each $C_{ii}$: a number, or a sequence of numbers or matrices, one for each view.
        center: whether the mean of each column is subtracted.
        reference: `"auto"` and the others as for `GEVP`; more than two views have no known solution.

    Raises:
        ShapeError, NonFiniteInputError: views are no such arrays, or have different numbers of rows.
        ArgumentError: p is not between 1 and the columns of the smallest view.

    Example:
        >>> x = jnp.array([[1.0], [-1.0]])
        >>> problem = MultiviewCCA((x, x, -x), p=1)
        >>> one = jnp.ones((1, 1))
        >>> problem.metrics((one, one, -one))["objective"].item()
        -3.0
    """

    views: Any
    operators: Any
    cross: Any
    centre: Any
    ridge: Any
    optimum: Any
    solution: Any
    batch: Batch | None
    p: int = size()
    fed: bool = choice()

    def __init__(self, views: Sequence[Any], p: int, *, ridge: Any = 0.0, center: bool = True, reference: str = "auto"):
        if not isinstance(views, (tuple, list)) or len(views) < 2:
            raise ArgumentError(f"views must be at least two arrays, got {type(views).__name__}")
        parts = [checks.array(self._name(i, len(views)), view, (None, None)) for i, view in enumerate(views)]
        named = {self._name(i, len(parts)): part for i, part in enumerate(parts)}
        checks.same_length(0, **named)
        checks.same_dtype(**named)
        rows, centre = centred(parts, center)
        fill(self, self._fields(rows, centre, p, ridge), reference)

    @classmethod
    def _fields(cls, rows: Any, centre: Any, p: int, ridge: Any, moments: Moments | None = None) -> dict[str, Any]:
        """All fields but the reference: exact operators come from moments, or from rows where views are narrow."""
        dims = tuple(mean.shape[0] for mean in centre)
        given = ridge if isinstance(ridge, (tuple, list)) else (ridge,) * len(dims)
        if len(given) != len(dims):
            raise ShapeError(f"ridge must be one number or one for each of the {len(dims)} views, got {len(given)}")
        ridges = tuple(ridge_argument("ridge", value, n) for value, n in zip(given, dims, strict=True))
        operators = cross = None
        if moments is not None or max(dims) <= TESTED:
            operators, cross = _covariances(rows if moments is None else moments, ridges)
        return {"views": rows, "operators": operators, "cross": cross, "centre": centre, "ridge": ridges, "p": columns_argument(p, *dims),
                "optimum": None, "solution": None, "batch": None, "fed": False}

    def referred(self, reference: str) -> dict[str, Any]:
        """What the metrics compare with; no closed form is known for more than two views."""
        measured(reference, self.dims)
        if reference in ("value", "solution"):
            raise ArgumentError(f"reference must be 'auto' or 'none' for {len(self.dims)} views: no closed form is known, got {reference!r}")
        self._check_ranks()
        return {}

    def _check_ranks(self) -> None:
        names = (f"the covariance of {self._name(i, len(self.dims))}" for i in range(len(self.dims)))
        check_rank(self.p, **dict(zip(names, self.exact().operators, strict=True)))

    @staticmethod
    def _name(i: int, views: int) -> str:
        return f"views[{i}]"

    @classmethod
    def streamed(cls, reference: Any, p: int, *, ridge: Any = 0.0, dtype: Any = None) -> Self:
        """The problem for `iterate(..., data=)`: a batch is a tuple of rows of the views, to be centred with the means of the reference.

        Args:
            reference: what metrics refer to: `Moments` from a pass over the data, or a tuple of held-out rows.
            p: number of directions of each view.
            ridge: as above.
            dtype: precision of the run; that of the reference if None.

        Raises:
            ShapeError: the reference does not fit.
        """
        dims = reference.dims if isinstance(reference, Moments) else tuple(reference)
        if len(dims) < 2 or (cls is CCA and len(dims) != 2):
            raise ShapeError(f"reference must hold {'two' if cls is CCA else 'at least two'} views, got {len(dims)}")
        if isinstance(reference, Moments):
            if checks.known(reference) and not float(reference.count) >= 2:
                raise ArgumentError(f"reference must hold at least 2 rows, got {float(reference.count):g}; fold add_moments over the data first")
            cast = jax.tree.map(lambda a: a if dtype is None else a.astype(dtype), reference)
            fields = cls._fields(None, cast.means(), p, ridge, cast)
        else:
            parts = [checks.array(f"reference[{i}]", part, (None, None)) for i, part in enumerate(reference)]
            parts = [part if dtype is None else part.astype(dtype) for part in parts]
            checks.same_length(0, **{f"reference[{i}]": part for i, part in enumerate(parts)})
            rows, centre = centred(parts, True)
            fields = cls._fields(rows, centre, p, ridge)
        return fill(object.__new__(cls), fields | {"fed": True}, "auto")

    def feed(self, batch: Any) -> Self:
        parts, weight = unweighted(batch, len(self.centre))
        if tuple(part.shape[1] for part in parts) != self.dims:
            raise ShapeError(f"batch must have views of {self.dims} columns, got {tuple(part.shape[1] for part in parts)}")
        operators = (fed_gram(part, weight, mean, ridge) for part, mean, ridge in zip(parts, self.centre, self.ridge, strict=True))
        return self.holding(Batch(tuple(operators)))

    @property
    def single(self) -> bool:
        return False

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(mean.shape[0] for mean in self.centre)

    @property
    def dtype(self) -> Any:
        return self.centre[0].dtype

    @property
    def rows(self) -> int | None:
        return None if self.views is None else self.views[0].shape[0]

    def exact(self) -> Batch:
        if self.operators is not None:
            return Batch(self.operators, self.cross)
        return Batch(tuple(Gram(part, None, ridge) for part, ridge in zip(self.views, self.ridge, strict=True)))

    def oracle(self, batch: Batch, x: Blocks, images: Blocks) -> tuple[Array, Blocks]:
        if batch.cost is None:  # the images are the scores of the same rows
            others = self.coefficients(batch, x, images)
            gradients = tuple(op.lift(c) for op, c in zip(batch.operators, others, strict=True))
            value = total(jnp.sum(im * c) for im, c in zip(images, others, strict=True)) / (2 * batch.operators[0].number)
            return value, gradients
        sums: list[Any] = [0] * len(x)
        for (i, j), cov in zip(_pairs(len(x)), batch.cost, strict=True):
            sums[i], sums[j] = sums[i] - x[j] @ cov.mT, sums[j] - x[i] @ cov
        return total(jnp.sum(xt * gt) for xt, gt in zip(x, sums, strict=True)) / 2, tuple(sums)

    def coefficients(self, batch: Batch, x: Blocks, images: Blocks) -> Blocks:
        return tuple(-total(images[j] for j in range(len(images)) if j != i) for i in range(len(images)))

    def draw(self, key: Key, batch_size: int, step: Any, order: str, padded: bool) -> Batch:
        if self.views is None:
            return super().draw(key, batch_size, step, order, padded)
        index, inside = batch_rows(key, self.views[0].shape[0], batch_size, step, order, padded)
        return Batch(tuple(Gram(part, None, ridge).take(index, inside) for part, ridge in zip(self.views, self.ridge, strict=True)))

    def dense(self, batch: Batch) -> Any:
        rows = [op.centred for op in batch.operators]
        cross = tuple(product(rows[i].mT, rows[j]) / batch.operators[0].number for i, j in _pairs(len(rows)))
        return tuple(op.matrix() for op in batch.operators), cross

    def from_dense(self, matrices: Any, batch: Batch) -> Batch:
        return Batch(tuple(Dense(matrix) for matrix in matrices[0]), matrices[1])

    def arranged(self, x: Blocks) -> Blocks:
        """Directions in descending order of their part in the sum, the largest entry of each in the first view positive."""
        return ordered(self, x)


class CCA(MultiviewCCA):
    r"""Canonical correlation analysis: minimize $-\mathrm{tr}(X^\top C_{AB} Y)$ over $X^\top C_A X = I$, $Y^\top C_B Y = I$.

    A point is a pair `(x, y)`. The minimum is minus the sum of the p leading canonical correlations. `gap` is the part of that sum that the two
    subspaces do not capture, whatever their bases; `error` is the norm of the sines of all principal angles to the solution.

    Args:
        X: first view, shape `(rows, n_a)`.
        Y: second view, shape `(rows, n_b)`.
        p: number of directions of each view.
        ridge: added to $C_A$ and $C_B$: a number, or a pair of numbers or matrices.
        center: whether the mean of each column is subtracted.
        reference: as for `GEVP`: `"auto"` computes the solution where no view has more than 1024 columns.

    Raises:
        ShapeError, NonFiniteInputError: X or Y are no such arrays, or have different numbers of rows.
        ArgumentError: p is not between 1 and the columns of the smaller view.
        MatrixError: the rank of a covariance is below p.

    Example:
        >>> x = jnp.array([[1.0], [-1.0]])
        >>> row = CCA(x, 2 * x, p=1).metrics((jnp.ones((1, 1)), 0.5 * jnp.ones((1, 1))))
        >>> [round(float(row[name]), 12) for name in ("objective", "gap", "infeasibility")]
        [-1.0, 0.0, 0.0]
    """

    def __init__(self, X: Any, Y: Any, p: int, *, ridge: Any = 0.0, center: bool = True, reference: str = "auto"):
        super().__init__((X, Y), p, ridge=ridge, center=center, reference=reference)

    @staticmethod
    def _name(i: int, views: int) -> str:
        return "XY"[i]

    def referred(self, reference: str) -> dict[str, Any]:
        value, solution = measured(reference, self.dims)
        if not value:
            self._check_ranks()
            return {}
        values, x, y = correlations(self)
        if not solution:
            return {"optimum": -jnp.sum(values)}
        known = tuple((xt, op.product(xt, op.image(xt))) for op, xt in zip(self.exact().operators, (x.mT, y.mT), strict=True))
        return {"optimum": -jnp.sum(values), "solution": known}

    def quality(self, point: Point, lowers: Blocks) -> dict[str, Array]:
        row = {}
        if self.optimum is not None:
            inside = -product(point.x[0], point.gradients[0].mT)
            captured = jnp.sum(jnp.linalg.svd(whitened(lowers, inside), compute_uv=False))
            row["gap"] = jnp.maximum(-captured - self.optimum, 0)
        if self.solution is not None:
            parts = [sines(known, xt, op.product(xt, im), lower) ** 2 for known, op, xt, im, lower in
                     zip(self.solution, self.exact().operators, point.x, point.images, lowers, strict=True)]
            row["error"] = jnp.sqrt(parts[0] + parts[1])
        return row

    def arranged(self, x: Blocks) -> Blocks:
        """Canonical directions of the two subspaces in descending order of correlation, the largest entry of each in the first view positive."""
        gt = self.at(x).gradients[0]
        left, _, right = jnp.linalg.svd(-product(x[0], gt.mT))
        sign = signs((left.mT @ x[0]).mT).mT
        return sign * (left.mT @ x[0]), sign * (right @ x[1])


def correlations(problem: CCA) -> tuple[Array, Array, Array]:
    """The p leading canonical correlations and directions of both views; singular covariances on their range.

    Raises:
        MatrixError: the rank of a covariance is below p.
    """
    batch = problem.exact()
    if batch.cost is None:
        a, b = (op.matrix() for op in batch.operators)
        between = product(problem.views[0].mT, problem.views[1]) / problem.views[0].shape[0]
    else:
        a, b, between = batch.operators[0].matrix(), batch.operators[1].matrix(), batch.cost[0]
    values, x, y, ranks = _correlations(a, b, between, problem.p)
    for name, rank in zip("XY", ranks, strict=True):
        if checks.known(rank) and int(rank) < problem.p:
            raise MatrixError(f"the covariance of {name} must have rank at least p = {problem.p}, got rank {int(rank)}; lower p or give a ridge")
    return values, x, y


@partial(jax.jit, static_argnames="p")
def _correlations(a: Array, b: Array, between: Array, p: int) -> tuple[Array, Array, Array, tuple[Array, Array]]:
    (white_a, rank_a), (white_b, rank_b) = white_of(a), white_of(b)
    left, values, right = jnp.linalg.svd(product(white_a.mT, between, white_b), full_matrices=False)
    return values[:p], product(white_a, left[:, :p]), product(white_b, right[:p].mT), (rank_a, rank_b)


@partial(jax.jit, static_argnames="center")
def centred(parts: Sequence[Array], center: bool) -> tuple[Blocks, Blocks]:
    """Views without their means, and the means; zeros where they stay."""
    means = tuple(column_means(part) if center else jnp.zeros(part.shape[1], part.dtype) for part in parts)
    return tuple(part - mean for part, mean in zip(parts, means, strict=True)), means


@jax.jit
def _covariances(source: Any, ridges: tuple[Any, ...]) -> tuple[tuple[Dense, ...], Blocks]:
    """The operators of all views and the covariances between them, from moments or from centred rows."""
    cov = source.cov if isinstance(source, Moments) else lambda i, j: product(source[i].mT, source[j]) / source[0].shape[0]
    return tuple(Dense(plus(cov(i, i), r)) for i, r in enumerate(ridges)), tuple(cov(i, j) for i, j in _pairs(len(ridges)))


def _pairs(views: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(views) for j in range(i + 1, views)]
