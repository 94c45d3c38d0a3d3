"""Problems with one block: any objective, and Procrustes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks, tree
from theorylab.core.keys import Key
from theorylab.core.module import choice, size
from theorylab.core.stream import Stream
from theorylab.errors import ArgumentError, ShapeError
from theorylab.stiefel.contract import Batch, BlockProblem, Blocks, Point, check_rank, columns_argument, fill, reference_of, sines
from theorylab.stiefel.operators import Dense, Gram, Operator, WithoutArgs, as_operator, fed_rows
from theorylab.stiefel.retractions import correct

Array = jax.Array


class StiefelProblem(BlockProblem):
    r"""Minimize any differentiable $f(X)$ over $X^\top B X = I$; the gradient is taken by automatic differentiation.

    Args:
        objective: `objective(x, args)`, a number for x of shape `(n, p)`; a plain function, whose arrays are in `args`. A function of x alone is
            taken too.
        B: a symmetric positive semidefinite matrix, rows of data ($B = A^\top A / r$; wrap square ones in `Gram`), a function x -> B x, an
            operator, or a stream of rows: then the problem is `streamed` and the first batch is the reference for metrics; None is the identity.
        p: number of columns.
        args: arrays handed to the objective.
        n: number of rows, where B is a function or None.
        optimum: the minimum of f, if known; measured as `gap` at the polar retraction.
        solution: a minimizer, shape `(n, p)`, if known; `error` is the norm of the sines of the principal angles to its span.

    Raises:
        ShapeError, MatrixError, NonFiniteInputError: B or args are no such thing; the message says why.
        ArgumentError: p is not between 1 and n.

    Example:
        >>> problem = StiefelProblem(lambda x, c: -jnp.sum(c * x), jnp.eye(2), p=1, args=jnp.array([[3.0], [4.0]]), optimum=-5.0)
        >>> round(float(problem.metrics(jnp.array([[1.0], [0.0]]))["gap"]), 12)
        2.0
    """

    operator: Operator
    args: Any
    optimum: Any
    solution: Any
    batch: Batch | None
    p: int = size()
    function: Callable = choice()
    fed: bool = choice()

    def __init__(self, objective: Callable, B: Any, p: int, args: Any = (), *, n: int | None = None, optimum: Any = None, solution: Any = None):
        if not callable(objective):
            raise ArgumentError(f"objective must be a function of (x, args), got {objective!r}")
        self.function = objective if _takes_args(objective) else WithoutArgs(objective)
        self.args = tree.check_finite("args", jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, args))
        leaves = tree.inexact_leaves(self.args)
        rows = B.batch(0) if isinstance(B, Stream) and not isinstance(B, Operator) else None
        B = B if rows is None else Gram(checks.array("B", rows, (None, n)))
        self.operator = as_operator("B", B, n, dtype=leaves[0].dtype if leaves else None)
        self.p = columns_argument(p, self.operator.dim)
        check_rank(self.p, B=self.operator)
        self.batch, self.fed = None, rows is not None
        self.optimum = None if optimum is None else jnp.asarray(checks.real("optimum", optimum), self.dtype)
        self.solution = None if solution is None else reference_of(self.operator, checks.array("solution", solution, (self.operator.dim, self.p)))
        shape = jax.eval_shape(self.function, jax.ShapeDtypeStruct((self.operator.dim, self.p), self.dtype), self.args)
        if getattr(shape, "shape", shape) != ():
            raise ShapeError(f"objective must return one number, got shape {getattr(shape, 'shape', shape)}")

    @classmethod
    def streamed(cls, objective: Callable, B: Any, p: int, args: Any = (), **options: Any) -> Self:
        """The problem for `iterate(..., data=)`: B (a matrix, `Moments` of a pass, or held-out rows) is what metrics refer to.

        A batch is an array of rows, whose mean of $a a^T$ stands for B in that step, or a pair of rows and the `args` of that step.

        Example:
            >>> problem = StiefelProblem.streamed(lambda x, c: jnp.sum(c * x), jnp.eye(2), p=1, args=jnp.ones((2, 1)))
            >>> problem.feed(jnp.ones((4, 2))).batch.operators[0].rows.shape
            (4, 2)
        """
        return fill(cls(objective, getattr(B, "second", B), p, args, **options), {"fed": True})

    def feed(self, batch: Any) -> Self:
        rows, args = batch if isinstance(batch, tuple) else (batch, None)
        return self.holding(Batch((Gram(fed_rows(rows, self.operator.dim, self.dtype)),), args))

    def exact(self) -> Batch:
        return Batch((self.operator,))

    def oracle(self, batch: Batch, x: Blocks, images: Blocks) -> tuple[Array, Blocks]:
        value, gradient = jax.value_and_grad(self.function)(x[0].mT, self.args if batch.cost is None else batch.cost)
        return value, (gradient.mT,)

    def draw(self, key: Key, batch_size: int, step: Any, order: str, padded: bool) -> Batch:
        if self.operator.exact:
            return super().draw(key, batch_size, step, order, padded)
        return Batch((self.operator.draw(key, batch_size, step, order, padded),))

    def dense(self, batch: Batch) -> Any:
        return (batch.operators[0].matrix(),)

    def from_dense(self, matrices: Any, batch: Batch) -> Batch:
        return Batch((Dense(matrices[0]),), batch.cost)

    def quality(self, point: Point, lowers: Blocks) -> dict[str, Array]:
        row = {}
        if self.optimum is not None:
            feasible = correct(point.grams[0], point.x[0], "polar")
            row["gap"] = jnp.maximum(self.oracle(self.exact(), (feasible,), ())[0] - self.optimum, 0)
        if self.solution is not None:
            row["error"] = sines(self.solution, point.x[0], self.operator.product(point.x[0], point.images[0]), lowers[0])
        return row


def _takes_args(function: Callable) -> bool:
    """Whether a function can be called as `function(x, args)`; one that hides its parameters is taken to."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


class Procrustes(BlockProblem):
    r"""Minimize $\tfrac12\lVert A X - C\rVert_F^2$ over $X^\top B X = I$.

    With B = I and p = n it is the orthogonal Procrustes problem; its solution is known for p = n, and for A = None, which is the identity: the
    point of the manifold nearest to C in a norm. For p = n the manifold has two components, and a run stays in that of its start.

    Args:
        A: shape `(m, n)`, or None for the identity.
        C: shape `(m, p)`.
        B: as for `StiefelProblem`; None is the identity.

    Raises:
        ShapeError, MatrixError, NonFiniteInputError: the message says what does not fit.

    Example:
        >>> problem = Procrustes(None, jnp.array([[2.0], [0.0]]))
        >>> problem.metrics(jnp.array([[0.0], [1.0]]))["objective"].item()
        2.5
    """

    A: Any
    C: Array
    operator: Operator
    optimum: Any
    solution: Any
    batch: Batch | None
    p: int = size()
    fed: bool = choice()

    def __init__(self, A: Any, C: Any, B: Any = None):
        self.C = checks.array("C", C, (None, None))
        self.A = None if A is None else checks.array("A", A, (self.C.shape[0], None))
        checks.same_dtype(A=self.A, C=self.C)
        self.operator = as_operator("B", B, self.C.shape[0] if self.A is None else self.A.shape[1], dtype=self.C.dtype)
        if self.C.shape[1] > self.operator.dim:
            raise ShapeError(f"C must have at most {self.operator.dim} columns, the size of B, got {self.C.shape[1]}")
        self.p = columns_argument(self.C.shape[1], self.operator.dim)
        check_rank(self.p, B=self.operator)
        self.batch = self.optimum = self.solution = None
        self.fed = False
        if self.p == self.operator.dim or (self.A is None and B is None):
            from theorylab.stiefel.closed_forms import nearest

            self.solution = nearest(self.operator, self.A, self.C)
            self.optimum = self.oracle(self.exact(), (self.solution,), ())[0]

    def exact(self) -> Batch:
        return Batch((self.operator,))

    def start(self, key: Key) -> Array:
        """A random point; for p = n in that of the two components of the manifold which holds the solution."""
        x = super().start(key)
        if self.solution is None or self.p < self.operator.dim:
            return x
        other = jnp.linalg.det(x) * jnp.linalg.det(self.solution) < 0
        return x.at[:, 0].multiply(jnp.where(other, -1, 1).astype(x.dtype))

    def oracle(self, batch: Batch, x: Blocks, images: Blocks) -> tuple[Array, Blocks]:
        apart = (x[0] if self.A is None else x[0] @ self.A.mT) - self.C.mT
        return jnp.sum(apart**2) / 2, (apart if self.A is None else apart @ self.A,)

    def quality(self, point: Point, lowers: Blocks) -> dict[str, Array]:
        """`gap` at the polar retraction, and as `error` the Frobenius distance to the solution."""
        if self.solution is None:
            return {}
        feasible = correct(point.grams[0], point.x[0], "polar")
        return {"gap": jnp.maximum(self.oracle(self.exact(), (feasible,), ())[0] - self.optimum, 0),
                "error": jnp.linalg.norm(point.x[0] - self.solution)}
