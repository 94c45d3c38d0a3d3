"""What methods on minibatches share: batches of data in memory or fed, running means over a pass, preconditioning, batches over devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core.keys import Key
from theorylab.core.problem import Method
from theorylab.core.psd import product
from theorylab.errors import ArgumentError
from theorylab.stiefel.contract import Batch, BlockProblem
from theorylab.stiefel.operators import TESTED, Dense, Gram, Identity, Operator

Array = jax.Array
AVERAGES = ("none", "first_pass")
PRECONDITIONERS = ("none", "auto", "full", "diagonal")
PRECISIONS = ("highest", "tensorfloat32", "bfloat16")
DAMPING = 0.01                          # of the mean eigenvalue, added to B before it is inverted: batches are noisy where B is small


class Sampled(Method):
    """A method on minibatches, or on a problem that holds a batch it was fed. A subclass has the fields that are named here."""

    if TYPE_CHECKING:
        step_size: ClassVar[Any]
        batch_size: ClassVar[Any]
        average: ClassVar[Any]
        order: ClassVar[Any]
        per_pass: ClassVar[Any]

    def __check_init__(self) -> None:
        if self.step_size is None:
            raise ArgumentError(f"{type(self).__name__}: step_size must be a number or a schedule, got None")

    @property
    def least(self) -> int:
        """Rows that a batch must hold."""
        return 1

    def rows_per_batch(self, problem: BlockProblem) -> int:
        """Rows drawn in each step from data held in memory."""
        rows = problem.rows
        if self.batch_size is not None:
            if rows is not None and self.batch_size > rows and self.order != "independent":
                raise ArgumentError(f"batch_size must be at most the {rows} rows of the data, got {self.batch_size}; use a smaller one or "
                                    "order='independent'")
            return self.batch_size
        if rows is None:
            raise ArgumentError(f"batch_size must be given: {type(problem).__name__} draws from a population, or holds no rows (feed it with data=)")
        return min(rows, max(2 ** (max(min(512, rows // 14), 1).bit_length() - 1), 8))

    def held(self, problem: BlockProblem, key: Key, step: Any) -> Batch:
        """The batch of a step: fed, or drawn."""
        if problem.batch is None and problem.fed:
            raise ArgumentError(f"data must be given for a streamed {type(problem).__name__}: iterate(problem, method, data=rows)")
        if problem.batch is None:
            problem = problem.sample(key, self.rows_per_batch(problem), step, self.order, self.average == "first_pass")
        batch = problem.batch
        rows = min((op.rows.shape[0] for op in batch.operators if isinstance(op, Gram)), default=self.least)
        if rows < self.least:
            raise ArgumentError(f"a batch must hold at least {self.least} rows for this {type(self).__name__}, got {rows}")
        return batch

    def no_average(self, problem: BlockProblem, key: Key) -> Any:
        """The running means before the first batch; None where there are none."""
        if self.average == "none":
            return None
        shapes = jax.eval_shape(lambda k: problem.dense(self.held(problem, k, jnp.zeros((), jnp.int32))), key)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), jnp.zeros((), problem.dtype)

    def averaged(self, problem: BlockProblem, batch: Batch, average: tuple[Any, Array], step: Array) -> tuple[Any, Array]:
        """Running means of the matrices, each batch weighted by its rows; fixed after the first pass."""

        def update(before: tuple[Any, Array]) -> tuple[Any, Array]:
            means, seen = before
            rows = next((op.number for op in batch.operators if isinstance(op, Gram)), jnp.ones_like(seen)).astype(seen.dtype)
            share = rows / (seen + rows)
            return jax.tree.map(lambda old, new: old + share * (new - old), means, problem.dense(batch)), seen + rows

        return lax.cond(step < self.pass_length(problem).astype(step.dtype), update, lambda before: before, average)

    def pass_length(self, problem: BlockProblem) -> Array:
        """Batches in one pass over the data."""
        if self.per_pass is not None:
            return jnp.asarray(self.per_pass)
        if problem.rows is None or problem.batch is not None:
            raise ArgumentError(f"per_pass must be given for data that are fed: {type(self).__name__}(..., per_pass=rows.per_pass)")
        return jnp.asarray(-(-problem.rows // self.rows_per_batch(problem)), jnp.int32)

    def cost(self, problem: BlockProblem) -> dict[str, float]:
        held = problem.fed or problem.batch is not None or problem.rows is None
        return {"gradients": 1.0} if held and self.batch_size is None else {"gradients": 1.0, "samples": float(self.rows_per_batch(problem))}


def inverse_of(operator: Operator, kind: str) -> Array | None:
    r"""An approximate inverse of B: $(B + \delta I)^{-1}$, or that of its diagonal; None for the identity.

    `kind` `"auto"` inverts matrices of size up to 1024 and the diagonal beyond. The mean eigenvalue is the scale of $\delta$.

    Raises:
        ArgumentError: the diagonal of a function is asked for.
    """
    if kind == "none" or isinstance(operator, Identity):
        return None
    if kind == "diagonal" or (kind == "auto" and operator.dim > TESTED):
        diagonal = diagonal_of(operator)
        return 1 / (diagonal + DAMPING * jnp.mean(diagonal))
    matrix = operator.matrix()
    damped = matrix + DAMPING * jnp.trace(matrix) / operator.dim * jnp.eye(operator.dim, dtype=matrix.dtype)
    root = lax.linalg.triangular_solve(jnp.linalg.cholesky(damped), jnp.eye(operator.dim, dtype=matrix.dtype), left_side=True, lower=True)
    return product(root.mT, root)


def diagonal_of(operator: Operator) -> Array:
    """The diagonal of B without the matrix."""
    if isinstance(operator, Dense):
        return jnp.diagonal(operator.array)
    if not isinstance(operator, Gram):
        raise ArgumentError(f"preconditioner 'diagonal' needs a matrix or rows of data, got {type(operator).__name__}; use 'none'")
    plain = jnp.sum(operator.centred**2, axis=0) / operator.number
    ridge = operator.ridge
    return plain if ridge is None else plain + (jnp.diagonal(ridge) if jnp.ndim(ridge) == 2 else ridge)


def spread(batch: Batch, mesh: Any) -> Batch:
    """The batch with its rows split over the first axis of a mesh of devices: products with it add up over devices, rows never travel.

    Raises:
        ArgumentError: the rows do not divide evenly.
    """
    if mesh is None:
        return batch
    axis = mesh.axis_names[0]
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis))

    def over(op: Any) -> Any:
        if not isinstance(op, Gram):
            return op
        if op.rows.shape[0] % mesh.shape[axis]:
            raise ArgumentError(f"a batch must divide over the {mesh.shape[axis]} devices of mesh axis {axis!r}, got {op.rows.shape[0]} rows")
        return Gram(lax.with_sharding_constraint(op.rows, place), op.count, op.ridge, op.mean)

    return Batch(tuple(over(op) for op in batch.operators), over(batch.cost))
