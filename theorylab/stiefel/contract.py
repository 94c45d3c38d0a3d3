r"""What every problem of this family gives to every method: operators, a gradient oracle, batches, and the measurement of a point.

A point has one block, an array of shape `(n, p)`, or several, a tuple of them. Inside, blocks are transposed, `(p, n)`: products with rows of
data are then plain matrix products on every backend (the transposed thin product is ten times slower on CPU).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from functools import reduce
from typing import Any, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core import checks, pencil
from theorylab.core.keys import Key
from theorylab.core.problem import Problem
from theorylab.core.psd import product, rank_cut
from theorylab.errors import ArgumentError, InfeasibleStartError, MatrixError, ShapeError
from theorylab.stiefel.fields import _residual, _sym
from theorylab.stiefel.operators import TESTED, Gram, Identity, Implicit, Operator
from theorylab.stiefel.retractions import correct, divide, gram_of, retract_of

Array = jax.Array
Blocks = tuple[Array, ...]
REFERENCES = ("auto", "solution", "value", "none")


class Batch(NamedTuple):
    """What one evaluation of the oracle sees: an operator for each block, and what the objective needs besides.

    Attributes:
        operators: the constraint operators, exact or those of a minibatch.
        cost: data of the objective that are not in the operators; of the problem's own making.
    """

    operators: tuple[Any, ...]
    cost: Any = None

    def images(self, x: Blocks) -> Blocks:
        """The images of the blocks."""
        return tuple(op.image(xt) for op, xt in zip(self.operators, x, strict=True))

    def grams(self, x: Blocks, images: Blocks) -> Blocks:
        """The Gram matrices xᵀ B x of the blocks."""
        return tuple(_sym(op.inner(xt, im, xt, im)) for op, xt, im in zip(self.operators, x, images, strict=True))


class Point(NamedTuple):
    """A point with all that its measurement needs, so that logging makes no product with B.

    Attributes:
        x: transposed blocks, each `(p, n)`.
        images: their images, see `Operator`.
        grams: their Gram matrices xᵀ B x.
        gradients: transposed Euclidean gradients.
        objective: value of the objective.
    """

    x: Blocks
    images: Blocks
    grams: Blocks
    gradients: Blocks
    objective: Array


class BlockProblem(Problem):
    r"""Minimize f over blocks with $X_i^\top B_i X_i = I$: the base class of the problems of this family.

    A subclass defines `exact` and `oracle`; a stochastic one also `draw` and, for the U-statistic, `coefficients`; one that can be averaged over a
    pass also `dense` and `from_dense`; one with a known solution `quality`; one whose minimizers are bases of a subspace `arranged`.
    """

    p: eqx.AbstractVar[int]
    batch: eqx.AbstractVar[Any]
    fed: eqx.AbstractVar[bool]

    # ------------------------------------------------------------------------------------------ what a subclass defines

    @property
    def dims(self) -> tuple[int, ...]:
        """Rows of each block."""
        return tuple(op.dim for op in self.exact().operators)

    @property
    def dtype(self) -> Any:
        """The dtype of points."""
        return self.exact().operators[0].dtype

    @property
    def single(self) -> bool:
        """Whether a point is one array; else it is a tuple of them."""
        return True

    def exact(self) -> Batch:
        """The whole data: what metrics and deterministic methods see."""
        raise NotImplementedError(f"{type(self).__name__} must define exact()")

    def oracle(self, batch: Batch, x: Blocks, images: Blocks) -> tuple[Array, Blocks]:
        """Value and transposed Euclidean gradients of the objective on a batch."""
        raise NotImplementedError(f"{type(self).__name__} must define oracle(batch, x, images)")

    def draw(self, key: Key, batch_size: int, step: Any, order: str, padded: bool) -> Batch:
        """A minibatch of the data held in memory."""
        raise ArgumentError(f"{type(self).__name__} holds no rows of data to draw batches from: use Landing, make the problem from rows, or feed it "
                            "with iterate(..., data=)")

    @property
    def rows(self) -> int | None:
        """Rows of data held in memory, None if there are none or they never end."""
        batch = self.exact()
        return next((op.rows.shape[0] for op in (*batch.operators, batch.cost) if isinstance(op, Gram)), None)

    def coefficients(self, batch: Batch, x: Blocks, images: Blocks) -> Blocks:
        """For gradients that are means of $a_i c_i^T$ over the rows $a_i$ of the operators: the transposed coefficients c, each `(p, rows)`."""
        raise ArgumentError(f"{type(self).__name__} has no gradient that is a sum over the rows of the constraint, which estimator 'u_statistic' "
                            "needs; use 'two_sample'")

    def dense(self, batch: Batch) -> Any:
        """The matrices of a batch as a pytree, for running means."""
        raise ArgumentError(f"{type(self).__name__} has no matrices to average over a pass: use average='none'")

    def from_dense(self, matrices: Any, batch: Batch) -> Batch:
        """A batch whose operators are running means."""
        raise NotImplementedError(f"{type(self).__name__} must define from_dense(matrices, batch)")

    def referred(self, reference: str) -> dict[str, Any]:
        """Fields with the known solution, for metrics; see `GEVP`."""
        return {}

    def quality(self, point: Point, lowers: Blocks) -> dict[str, Array]:
        """More metrics, from a point and the Cholesky factors of its Gram matrices: `gap` and `error` where a solution is known."""
        return {}

    def arranged(self, x: Blocks) -> Blocks:
        """A feasible point with the same objective whose columns are in the order that the problem gives them: by eigenvalue, for instance."""
        return x

    # ------------------------------------------------------------------------------------------ what they share

    def pack(self, x: Any) -> Blocks:
        """Transposed blocks of a point, in the precision of the data.

        Raises:
            ShapeError: x is no point of this problem.
            PrecisionError: x holds no real numbers.
        """
        parts = (x,) if self.single else x
        if not isinstance(parts, (tuple, list)) or len(parts) != len(self.dims):
            raise ShapeError(f"x must be a tuple of {len(self.dims)} blocks, got {type(x).__name__}")
        names = ["x"] if self.single else [f"x[{i}]" for i in range(len(self.dims))]
        kinds = (jnp.asarray(part).dtype if isinstance(op, (Identity, Implicit)) else self.dtype for op, part in
                 zip(self.exact().operators, parts, strict=True))
        return tuple(checks.array(name, part, (n, self.p), finite=False).astype(kind).mT
                     for name, part, n, kind in zip(names, parts, self.dims, kinds, strict=True))

    def unpack(self, x: Blocks) -> Any:
        """The point of transposed blocks: an array of shape `(n, p)`, or a tuple of them."""
        return x[0].mT if self.single else tuple(xt.mT for xt in x)

    def at(self, x: Blocks) -> Point:
        """A point with its images, Gram matrices, gradients and objective."""
        batch = self.exact()
        images = batch.images(x)
        objective, gradients = self.oracle(batch, x, images)
        return Point(x, images, batch.grams(x, images), gradients, objective)

    def start(self, key: Key) -> Any:
        """A random point of the manifold: Gaussian, then orthonormal in the inner product of B."""
        keys = jax.random.split(key, len(self.dims))
        draws = (jax.random.normal(k, (self.p, n), self.dtype) for k, n in zip(keys, self.dims, strict=True))
        return self.unpack(tuple(retract_of(op, xt, "cholesky") for op, xt in zip(self.exact().operators, draws, strict=True)))

    def metrics(self, x: Any) -> dict[str, Array]:
        """`objective`, `infeasibility` and `residual` at x; `gap` after exact retraction and `error` where a solution is known."""
        return _measure(self, self.pack(x))

    def judge(self, point: Point) -> dict[str, Array]:
        r"""The metrics of a point whose products are known.

        `infeasibility` is $\lVert h\rVert_F$ over all blocks. `residual` is the norm of $G - BX M^{-1} X^\top G$ together with that of
        $\mathrm{skew}(X^\top G)$: on the manifold it is 0 exactly at the critical points.
        """
        violation = total(jnp.sum(_residual(m) ** 2) for m in point.grams)
        lowers = tuple(jnp.linalg.cholesky(m, symmetrize_input=False) for m in point.grams)
        off = jnp.zeros_like(point.objective)
        for op, xt, im, lower, gt in zip(self.exact().operators, point.x, point.images, lowers, point.gradients, strict=True):
            inside = product(xt, gt.mT)
            normal = lax.linalg.triangular_solve(lower, divide(lower, inside), left_side=True, lower=True, transpose_a=True)
            off = off + jnp.sum((gt - normal.mT @ op.product(xt, im)) ** 2) + jnp.sum((inside - inside.mT) ** 2) / 4
        return {"objective": point.objective, "infeasibility": jnp.sqrt(violation), "residual": jnp.sqrt(off)} | self.quality(point, lowers)

    def sample(self, key: Key, batch_size: int, step: Any = 0, order: str = "independent", padded: bool = False) -> Self:
        """The same problem holding minibatch number `step`; a problem that was fed keeps its batch.

        Args:
            key: the key of the stream of batches.
            batch_size: rows of the batch.
            step: number of the batch.
            order: `"shuffled"`, `"sequential"` or `"independent"`.
            padded: whether a shuffled pass ends with a shorter batch instead of leaving rows over.
        """
        return self if self.batch is not None else self.holding(self.draw(key, batch_size, step, order, padded))

    def holding(self, batch: Batch) -> Self:
        """The same problem with this batch."""
        return eqx.tree_at(lambda problem: problem.batch, self, batch, is_leaf=lambda leaf: leaf is None)

    def check_start(self, x0: Any, safe: Any = None) -> None:
        r"""Refuse a start from which a safe step cannot be taken, on the host.

        Raises:
            ShapeError: x0 is no point of this problem.
            InfeasibleStartError: columns that are dependent in the inner product of B, or $\lVert h\rVert_F$ of at least 1 while a safe step is
                asked for.
        """
        x = self.pack(x0)
        if not checks.known(x, self):
            return
        batch = self.exact()
        for i, gram in enumerate(batch.grams(x, batch.images(x))):
            low, violation = float(jnp.linalg.eigvalsh(gram)[0]), float(jnp.linalg.norm(_residual(gram)))
            name = "x0" if self.single else f"x0[{i}]"
            if not low > 0 or (safe is not None and not violation < 1):
                raise InfeasibleStartError(f"{name} must have X'BX near the identity, its smallest eigenvalue is {low:.3g} and |X'BX - I| is "
                                           f"{violation:.3g}; begin at retract({name}, B), or pass safe=None")

    def default_method(self) -> Any:
        """Landing with steps of its own choice; for a problem that is fed, stochastic landing with preconditioning."""
        from theorylab.stiefel.landing import default_landing
        from theorylab.stiefel.stochastic import default_stochastic

        return default_stochastic() if self.fed else default_landing(self)

    def goal(self, tolerance: float) -> Any:
        """Stop when `gap` is below `tolerance`, relative to the optimum if that is above 1, and `infeasibility` is below `tolerance`.

        Where no solution is known, `residual` takes the place of `gap`.
        """
        from theorylab.core.stop import Below

        optimum = getattr(self, "optimum", None)
        if optimum is None:
            return Below("residual", tolerance) & Below("infeasibility", tolerance)
        return Below("gap", tolerance * jnp.maximum(jnp.abs(optimum), 1)) & Below("infeasibility", tolerance)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; constructors of this family take data, not fields, so they do not run again."""
        names = {field.name for field in dataclasses.fields(self)}
        if set(changes) - names:
            raise ArgumentError(f"{type(self).__name__} has no field {sorted(set(changes) - names)[0]!r}; known: {', '.join(sorted(names))}")
        return fill(object.__new__(type(self)), {name: changes.get(name, getattr(self, name)) for name in names})


@jax.jit
def _measure(problem: BlockProblem, x: Blocks) -> dict[str, Array]:
    return problem.judge(problem.at(x))


def fill(problem: Any, fields: dict[str, Any], reference: str | None = None) -> Any:
    """`problem` with its fields set, then with those that `referred(reference)` computes from them: for constructors."""
    for name, value in fields.items():
        object.__setattr__(problem, name, value)
    return problem if reference is None else fill(problem, problem.referred(reference))


def total(terms: Iterable[Array]) -> Array:
    """The sum of at least one array."""
    return reduce(operator.add, terms)


def columns_argument(p: Any, *dims: int) -> int:
    """The number of columns as a whole number between 1 and the smallest dimension.

    Raises:
        ArgumentError: it is not.
    """
    return checks.whole("p", p, low=1, high=min(dims))


def check_rank(p: int, **operators: Any) -> None:
    """Refuse operators of rank below p, on the host, by the Gram matrix of p random directions; functions are not tried.

    Raises:
        MatrixError: no p columns are independent in the inner product of an operator, so that no point is feasible.
    """
    for name, op in operators.items():
        if isinstance(op, (Identity, Implicit)) or not checks.known(op):
            continue
        values = np.linalg.eigvalsh(np.asarray(gram_of(op, jax.random.normal(jax.random.key(0), (p, op.dim), op.dtype))))
        rank = int(np.sum(values > rank_cut(p, op.dtype) * values[-1]))
        if rank < p:
            raise MatrixError(f"{name} must have rank at least p = {p} for a point with X'BX = I to exist, got rank {rank}; lower p or add a ridge")


def measured(reference: str, dims: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether the exact value, and the solution too, are computed when a problem is made: by shape only."""
    checks.among("reference", reference, REFERENCES)
    small = max(dims) <= TESTED
    return reference in ("solution", "value") or (reference == "auto" and small), reference == "solution" or (reference == "auto" and small)


def white_of(b: Array) -> tuple[Array, Array]:
    """A whitening matrix of B on its range and its rank, see `pencil.whiten`; negative eigenvalues of the size of round-off are dropped."""
    return pencil._whiten_of(b, jnp.asarray(rank_cut(b.shape[-1], b.dtype), b.dtype))


def whitened(lowers: Blocks, inner: Array) -> Array:
    """M₁^(-1/2) C M₂^(-1/2) up to rotations, from Cholesky factors of one or two Gram matrices and a p by p matrix between them."""
    return divide(lowers[-1], divide(lowers[0], inner).mT).mT


def sines(known: tuple[Array, Array], xt: Array, bt: Array, lower: Array) -> Array:
    """The norm of the sines of the principal angles in B between the spans of two points, from (B x)ᵀ of both; accurate near 0."""
    solution, images = known
    both = divide(lower, jnp.concatenate([xt, bt], axis=1))
    xt, bt = both[:, : xt.shape[1]], both[:, xt.shape[1]:]
    overlap = product(xt, images.mT)
    apart, apart_b = xt - overlap @ solution, bt - overlap @ images
    return jnp.sqrt(jnp.maximum(jnp.sum(apart * apart_b), 0))


@jax.jit
def reference_of(operator: Operator, solution: Array) -> tuple[Array, Array]:
    """A known solution, transposed and made B-orthonormal, with its product (B x)ᵀ."""
    xt = solution.mT
    xt = correct(gram_of(operator, xt), xt, "cholesky")
    return xt, operator.product(xt, operator.image(xt))


def gram_split(batch: Batch, images: Blocks, parts: int) -> list[tuple[Batch, Blocks]]:
    """Independent parts of a batch with their images. The cost is split too where it is an operator of rows."""
    pieces = [op.split(im, parts) for op, im in zip(batch.operators, images, strict=True)]
    cost = batch.cost
    costs = [part for part, _ in cost.split(cost.rows.mT, parts)] if isinstance(cost, Gram) else [cost] * parts
    return [(Batch(tuple(piece[i][0] for piece in pieces), costs[i]), tuple(piece[i][1] for piece in pieces)) for i in range(parts)]
