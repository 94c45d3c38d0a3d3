"""Constrained variational inequalities: a general operator, an affine one, and matrix games."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi.constraints import ConstraintSet, Nonnegative
from theorylab.acvi.contract import Inequality
from theorylab.acvi.equality import BlockSimplex
from theorylab.acvi.functions import as_call
from theorylab.acvi.lifting import Extended, lift
from theorylab.acvi.prox import like
from theorylab.acvi.sparse import SparseMatrix, as_sparse, dense, lowest_eigenvalue
from theorylab.core import checks, tree
from theorylab.core.module import choice
from theorylab.errors import ArgumentError

Array = jax.Array
MONOTONE_UNITS = 100
LANCZOS_SIZE = 500
INTERIOR_SIZE = 2048
NOT_MONOTONE = "M is not monotone, no guarantee: the smallest eigenvalue of (M + M')/2 on the equality is {:.3g}"


class VariationalInequality(Inequality):
    r"""A variational inequality with any continuous monotone operator.

    Args:
        operator: `operator(x, args)`, shape `(n,)` to `(n,)`; a plain function, whose arrays are in `args`. A function of x alone will do.
        dim: number of unknowns n.
        args: arrays handed to the operator.
        constraints: a constraint set, or None.
        equality: a pair `(C, d)`, an Equality object, or None.
        structure: what is known of an operator without a matrix, so that ACVI takes the x-step for it: `"affine"`; `"bilinear"`,
            $F(x) = (A x_2 + q_1, -A^\top x_1 + q_2)$ on two simplices; `"blocks"`, a matrix $B \otimes I$ with one number per pair of players.
        solution: a known solution, measured as `error`.
        x0: where runs start by default.

    Raises:
        ShapeError: shapes that do not match, or an operator that returns another shape than `(n,)`.
        NonFiniteInputError: the operator is not finite at the start.

    Example:
        >>> problem = VariationalInequality(lambda x, a: a * x - 1.0, dim=2, args=jnp.array([1.0, 2.0]), constraints=Nonnegative())
        >>> problem.metrics(jnp.array([1.0, 0.5]))["residual"].item()
        0.0
    """

    args: Any
    function: Callable = choice()

    def __init__(self, operator: Callable, dim: int, args: Any = (), constraints: ConstraintSet | None = None, equality: Any = None, *,
                 structure: str | None = None, solution: Any = None, x0: Any = None):
        if not callable(operator):
            raise ArgumentError(f"operator must be a function of (x, args), got {operator!r}")
        self.function = as_call(operator)
        self.args = tree.check_finite("args", jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, args))
        self._attach(dim, constraints, equality, solution, x0, structure)
        self._check_operator()

    def _arguments(self) -> dict[str, Any]:
        return {"operator": self.function, "dim": self.dim, "args": self.args, "structure": self.structure, **super()._arguments()}

    @property
    def dtype(self) -> Any:
        leaves = tree.inexact_leaves((self.args, self.x0))
        return jnp.result_type(*leaves) if leaves else jnp.result_type(float)

    def operator(self, x: Array) -> Array:
        return self.function(x, self.args)

    def lifted(self) -> VariationalInequality:
        """The same problem over (x, s) with A x + s = b and s >= 0, for a `Polyhedron`: every prox of the barrier is then closed.

        Raises:
            ArgumentError: the constraints are no `Polyhedron`.

        Example:
            >>> from theorylab.acvi import Polyhedron
            >>> flat = VariationalInequality(lambda x, a: x, dim=2, constraints=Polyhedron(jnp.eye(2), jnp.ones(2))).lifted()
            >>> flat.dim, flat.equality.rows
            (4, 2)
        """
        parts = lift(self)
        return VariationalInequality(Extended(self.function, self.dim), self.dim + parts.pop("slacks"), self.args, **parts)


class AffineVariationalInequality(Inequality):
    r"""A variational inequality with the operator F(x) = M x + q.

    Args:
        M: shape `(n, n)`; monotone iff $M + M^\top$ is positive semidefinite on the null space of the equality. A matrix of `scipy.sparse` or a
            `BCOO` of JAX stays sparse: only its nonzeros are stored and multiplied, and ACVI factors its x-step by a sparse LU.
        q: shape `(n,)`; 0 if None.
        constraints: a constraint set, or None.
        equality: a pair `(C, d)`, an Equality object, or None.
        structure: `"blocks"` if $M = B \otimes I$ with one number per pair of players: ACVI then solves one tiny system a step.
        solution: a known solution, measured as `error`.
        x0: where runs start by default.

    Raises:
        ShapeError: shapes that do not match.

    Example:
        >>> problem = AffineVariationalInequality(jnp.eye(2), jnp.array([1.0, -1.0]), Nonnegative())
        >>> problem.metrics(jnp.array([0.0, 1.0]))["residual"].item()
        0.0
    """

    M: Any
    q: Array

    def __init__(self, M: Any, q: Any = None, constraints: ConstraintSet | None = None, equality: Any = None, *,
                 structure: str | None = None, solution: Any = None, x0: Any = None):
        sparse = as_sparse("M", M, square=True)
        self.M = checks.square("M", M) if sparse is None else sparse
        n = self.M.shape[0]
        self.q = jnp.zeros(n, self.M.dtype) if q is None else like(checks.array("q", q, (n,)), self.M)
        self._attach(n, constraints, equality, solution, x0, structure)
        if not tree.is_traced(self.M, self.equality):
            self._warn_unless_monotone()

    def _arguments(self) -> dict[str, Any]:
        return {"M": self.M, "q": self.q, "structure": self.structure, **super()._arguments()}

    def _warn_unless_monotone(self) -> None:
        size = float(jnp.max(jnp.abs(self.M.values if isinstance(self.M, SparseMatrix) else self.M)))
        level = MONOTONE_UNITS * self.dim * float(jnp.finfo(self.M.dtype).eps) * size
        large = isinstance(self.M, SparseMatrix) and self.dim > LANCZOS_SIZE
        lowest = lowest_eigenvalue(self.M, self.equality.null) if large else self._lowest(level)
        if lowest < -level:
            warnings.warn(NOT_MONOTONE.format(lowest), stacklevel=3)

    def _lowest(self, level: float) -> float:
        """The smallest eigenvalue of the symmetric part on the equality, or 0 if it is not below minus `level`."""
        inside, M = jax.vmap(self.equality.null), self.matrix
        host = np.asarray(inside(inside((M + M.T) / 2).T))
        if np.abs(host).max() <= level:
            return 0.0
        host = (host + host.T) / 2
        try:  # a Cholesky factor is ten times cheaper than the eigenvalues, which only the warning needs
            np.linalg.cholesky(host + 2 * level * np.eye(self.dim, dtype=host.dtype))
        except np.linalg.LinAlgError:
            return float(np.linalg.eigvalsh(host)[0])
        return 0.0

    @property
    def dtype(self) -> Any:
        return self.M.dtype

    @property
    def is_affine(self) -> bool:
        return True

    @property
    def matrix(self) -> Array:
        """The matrix M; a sparse one is formed on demand."""
        return dense(self.M)

    @property
    def offset(self) -> Array:
        """The vector q."""
        return self.q

    def operator(self, x: Array) -> Array:
        return self.M @ x + self.q

    def lifted(self) -> AffineVariationalInequality:
        """The same problem over (x, s) with A x + s = b and s >= 0, for a `Polyhedron`: every prox of the barrier is then closed.

        Raises:
            ArgumentError: the constraints are no `Polyhedron`.

        Example:
            >>> from theorylab.acvi import Polyhedron
            >>> AffineVariationalInequality(jnp.eye(2), None, Polyhedron(jnp.eye(2), jnp.ones(2))).lifted().dim
            4
        """
        parts = lift(self)
        pad, M = parts.pop("slacks"), self.M
        n = self.dim + pad
        larger = SparseMatrix(M.values, M.rows, M.columns, (n, n), M.envelope) if isinstance(M, SparseMatrix) else jnp.pad(M, (0, pad))
        return AffineVariationalInequality(larger, jnp.pad(self.q, (0, pad)), **parts)


class MatrixGame(Inequality):
    r"""A zero-sum game: the row player minimises $x_1^\top A x_2$ over mixed strategies, the column player maximises it.

    The unknown is $(x_1, x_2)$ on two simplices, $F(x) = (A x_2, -A^\top x_1)$; no matrix of size n by n is formed.

    Args:
        A: payments of the row player, shape `(n1, n2)`; an array, or a sparse matrix as in `AffineVariationalInequality`.
        solution: a known equilibrium, measured as `error`.
        x0: where runs start by default; uniform strategies if None.

    Raises:
        ShapeError: `A` is no matrix, or a single pair of actions.

    Example:
        >>> rock_paper_scissors = MatrixGame(jnp.array([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]]))
        >>> rock_paper_scissors.metrics(jnp.array([0.5, 0.5, 0.0, 1.0, 0.0, 0.0]))["gap"].item()
        1.5
    """

    A: Any

    def __init__(self, A: Any, *, solution: Any = None, x0: Any = None):
        sparse = as_sparse("A", A)
        self.A = checks.array("A", A, (None, None)) if sparse is None else sparse
        self._attach(sum(self.A.shape), Nonnegative(), BlockSimplex(self.A.shape), solution, x0)

    def _arguments(self) -> dict[str, Any]:
        return {"A": self.A, "solution": self.solution, "x0": self.x0}

    @property
    def dtype(self) -> Any:
        return self.A.dtype

    @property
    def is_affine(self) -> bool:
        return True

    @property
    def matrix(self) -> Array:
        """The skew matrix M of shape `(n, n)`, formed on demand."""
        (n1, n2), A = self.A.shape, dense(self.A)
        return jnp.block([[jnp.zeros((n1, n1), A.dtype), A], [-A.T, jnp.zeros((n2, n2), A.dtype)]])

    @property
    def offset(self) -> Array:
        """The zero vector."""
        return jnp.zeros(self.dim, self.A.dtype)

    def split(self, x: Array) -> tuple[Array, Array]:
        """The strategies of the row player and of the column player."""
        return x[: self.A.shape[0]], x[self.A.shape[0]:]

    def operator(self, x: Array) -> Array:
        x1, x2 = self.split(x)
        return jnp.concatenate([self.A @ x2, -(self.A.T @ x1)])

    def value_interval(self, x: Array) -> Array:
        """The interval that holds the value of the game, proved by the feasible strategies `x`: shape `(2,)`."""
        x1, x2 = self.split(x)
        return jnp.stack([jnp.min(self.A @ x2), jnp.max(self.A.T @ x1)])

    def default_method(self) -> Any:
        """The interior-point method for up to 2048 actions in double precision, where it is the fastest; else restarted primal-dual steps."""
        from theorylab.acvi.interior import InteriorPoint
        from theorylab.acvi.pdhg import PrimalDualHybridGradient

        factors = isinstance(self.A, jax.Array) and self.dim <= INTERIOR_SIZE and self.dtype == jnp.float64
        return InteriorPoint() if factors else PrimalDualHybridGradient(restart="halpern")
