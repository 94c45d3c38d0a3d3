"""Independent component analysis: directions of data that are as far from Gaussian as possible, white by the constraint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from theorylab.core import checks
from theorylab.core.keys import Key
from theorylab.core.module import choice, size
from theorylab.core.psd import product
from theorylab.errors import ShapeError
from theorylab.stiefel.cca import centred
from theorylab.stiefel.contract import Batch, BlockProblem, Blocks, Point, check_rank, columns_argument, fill
from theorylab.stiefel.moments import Moments, unweighted
from theorylab.stiefel.operators import Dense, Gram, Operator, fed_gram, plus, ridge_argument
from theorylab.stiefel.quantities import amari_of

Array = jax.Array


class Contrast(NamedTuple):
    """A function of one variable with its first two derivatives."""

    value: Callable[[Array], Array]
    score: Callable[[Array], Array]
    curvature: Callable[[Array], Array]


def log_cosh(t: Array) -> Array:
    """The logarithm of the hyperbolic cosine, without overflow.

    Example:
        >>> log_cosh(jnp.array([0.0, 1000.0])).round(6).tolist()
        [0.0, 999.306853]
    """
    size = jnp.abs(t)
    return size + jnp.log1p(jnp.exp(-2 * size)) - jnp.log(jnp.asarray(2.0, t.dtype))


CONTRASTS = {
    "logcosh": Contrast(log_cosh, jnp.tanh, lambda t: 1 - jnp.tanh(t) ** 2),
    "gauss": Contrast(lambda t: -jnp.exp(-(t**2) / 2), lambda t: t * jnp.exp(-(t**2) / 2), lambda t: (1 - t**2) * jnp.exp(-(t**2) / 2)),
}


class ICA(BlockProblem):
    r"""Independent component analysis: minimize $\sum_j \sigma_j\, E\, s(x_j^\top a)$ over $X^\top E[a a^\top] X = I$.

    With $s = \log\cosh$ and $\sigma_j = 1$ the minimizers are super-Gaussian sources only. With `sign="auto"` the sign of each component
    follows its density: $\sigma_j = \mathrm{sign}(E s''(y)\, E y^2 - E\, y s'(y))$, as in extended infomax. The constraint whitens; the data need
    not be white.

    Args:
        X: data, shape `(rows, n)`.
        p: number of components.
        contrast: `"logcosh"` or `"gauss"` ($-e^{-t^2/2}$).
        sign: `"auto"`, +1 for super-Gaussian or -1 for sub-Gaussian sources.
        ridge: added to the covariance: a number or a matrix.
        center: whether the mean of each column is subtracted.
        mixing: the mixing matrix of shape `(n, p)`, if known; `error` is then the Amari distance.

    Raises:
        ShapeError, NonFiniteInputError: X is no such array.
        ArgumentError: p is not between 1 and n.
        MatrixError: the rank of the covariance is below p.
        UnknownNameError: another contrast or sign.

    Example:
        >>> problem = ICA(jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]), p=1, sign=1)
        >>> round(float(problem.metrics(jnp.array([[2.0**0.5], [0.0]]))["objective"]), 6)
        0.389246
    """

    data: Any
    moment: Any
    centre: Array
    ridge: Any
    mixing: Any
    batch: Batch | None
    p: int = size()
    contrast: str = choice()
    sign: Any = choice()
    fed: bool = choice()

    def __init__(self, X: Any, p: int, contrast: str = "logcosh", *, sign: str | int = "auto", ridge: Any = 0.0, center: bool = True,
                 mixing: Any = None):
        X = checks.array("X", X, (None, None))
        (X,), (centre,) = centred((X,), center)
        fill(self, self._fields(X, None, centre, p, contrast, sign, ridge, mixing))
        check_rank(self.p, **{"the covariance of X": self.exact().operators[0]})

    @classmethod
    def _fields(cls, data: Any, moment: Any, centre: Array, p: int, contrast: str, sign: Any, ridge: Any, mixing: Any,
                fed: bool = False) -> dict[str, Any]:
        """All fields, checked."""
        n = centre.shape[0]
        p, ridge = columns_argument(p, n), ridge_argument("ridge", ridge, n)
        contrast, sign = checks.among("contrast", contrast, CONTRASTS), checks.among("sign", sign, ("auto", 1, -1))
        mixing = None if mixing is None else checks.array("mixing", mixing, (n, p))
        checks.same_dtype(X=centre, mixing=mixing)
        return {"data": data, "moment": None if moment is None else plus(moment, ridge), "centre": centre, "ridge": ridge, "mixing": mixing, "p": p,
                "contrast": contrast, "sign": sign, "batch": None, "fed": fed}

    @classmethod
    def streamed(cls, reference: Any, p: int, contrast: str = "logcosh", *, sign: str | int = "auto", ridge: Any = 0.0, mixing: Any = None,
                 dtype: Any = None) -> Self:
        """The problem for `iterate(..., data=)`: a batch is an array of rows, to be centred with the mean of the reference.

        Args:
            reference: what metrics refer to: held-out rows, or `Moments` of a pass over the data, which measure no objective.
            p: number of components.
            contrast: as above.
            sign: as above.
            ridge: as above.
            mixing: as above.
            dtype: precision of the run; that of the reference if None.

        Raises:
            ShapeError: the reference does not fit.
        """
        if isinstance(reference, Moments):
            if len(reference.dims) != 1:
                raise ShapeError(f"reference must hold one view, got {len(reference.dims)}")
            cast = jax.tree.map(lambda a: a if dtype is None else a.astype(dtype), reference)
            return fill(object.__new__(cls), cls._fields(None, cast.second, cast.mean, p, contrast, sign, ridge, mixing, fed=True))
        rows = checks.array("reference", reference, (None, None))
        rows = rows if dtype is None else rows.astype(dtype)
        (rows,), (centre,) = centred((rows,), True)
        return fill(object.__new__(cls), cls._fields(rows, None, centre, p, contrast, sign, ridge, mixing, fed=True))

    def feed(self, batch: Any) -> Self:
        (rows,), weight = unweighted(batch, 1)
        if rows.shape[1] != self.centre.shape[0]:
            raise ShapeError(f"batch must have {self.centre.shape[0]} columns, got {rows.shape[1]}")
        return self.holding(Batch((fed_gram(rows, weight, self.centre, self.ridge),)))

    def exact(self) -> Batch:
        return Batch((Dense(self.moment) if self.data is None else Gram(self.data, None, self.ridge),))

    def signs(self, scores: Array, count: Any = None) -> Array:
        """The sign of each component from its scores, shape `(p, rows)`; see the class. Rows beyond `count` are padding, of score 0."""
        if self.sign != "auto":
            return jnp.full(scores.shape[:-1], self.sign, scores.dtype)
        of, rows = CONTRASTS[self.contrast], scores.shape[-1]
        count = jnp.asarray(rows if count is None else count, scores.dtype)
        curvature = (jnp.sum(of.curvature(scores), axis=-1) - (rows - count)) / count     # the curvature of both contrasts at 0 is 1
        bend = curvature * jnp.sum(scores**2, axis=-1) / count - jnp.sum(scores * of.score(scores), axis=-1) / count
        return jnp.where(bend < 0, -jnp.ones_like(bend), jnp.ones_like(bend))

    def _scores(self, batch: Batch, x: Blocks, images: Blocks) -> tuple[Gram, Array]:
        """The rows that carry the objective, and the scores on them."""
        if isinstance(batch.cost, Gram):  # the constraint is a running mean
            return batch.cost, batch.cost.image(x[0])
        return batch.operators[0], images[0]  # type: ignore[return-value]

    def oracle(self, batch: Batch, x: Blocks, images: Blocks) -> tuple[Array, Blocks]:
        if isinstance(batch.operators[0], Dense) and batch.cost is None:  # moments alone do not measure the objective
            return jnp.asarray(jnp.inf, self.dtype), (jnp.zeros_like(x[0]),)
        rows, scores = self._scores(batch, x, images)
        of, signs = CONTRASTS[self.contrast], self.signs(scores, rows.number)
        empty = scores.shape[-1] - rows.number  # rows of padding have the value s(0)
        value = (jnp.sum(of.value(scores), axis=-1) - empty * of.value(jnp.zeros((), scores.dtype))) / rows.number
        return jnp.sum(signs * value), (rows.lift(signs[:, None] * of.score(scores)),)

    def coefficients(self, batch: Batch, x: Blocks, images: Blocks) -> Blocks:
        rows, scores = self._scores(batch, x, images)
        return (self.signs(scores, rows.number)[:, None] * CONTRASTS[self.contrast].score(scores),)

    def draw(self, key: Key, batch_size: int, step: Any, order: str, padded: bool) -> Batch:
        if self.data is None:
            return super().draw(key, batch_size, step, order, padded)
        return Batch((Gram(self.data, None, self.ridge).draw(key, batch_size, step, order, padded),))

    def dense(self, batch: Batch) -> Any:
        return (batch.operators[0].matrix(),)

    def from_dense(self, matrices: Any, batch: Batch) -> Batch:
        operator: Operator = batch.operators[0]
        return Batch((Dense(matrices[0]),), operator)

    def judge(self, point: Point) -> dict[str, Array]:
        row = super().judge(point)
        return row if self.data is not None else {name: row[name] for name in row if name not in ("objective", "residual")}

    def quality(self, point: Point, lowers: Blocks) -> dict[str, Array]:
        return {} if self.mixing is None else {"error": amari_of(product(point.x[0], self.mixing))}
