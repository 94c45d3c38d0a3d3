"""Constrained variational inequalities: a general operator, an affine one, and matrix games."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi import intersection
from theorylab.acvi.constraints import ConstraintSet, Free, Nonnegative
from theorylab.acvi.equality import BlockSimplex, Equality, as_equality
from theorylab.acvi.lifting import Extended, lift
from theorylab.acvi.prox import like
from theorylab.core import checks, tree
from theorylab.core.keys import Key
from theorylab.core.module import choice
from theorylab.core.problem import Problem
from theorylab.errors import ArgumentError, InfeasibleStartError, NoClosedFormError, NonFiniteInputError, ShapeError

Array = jax.Array
MONOTONE_UNITS = 100
STRUCTURES = ("affine", "bilinear", "blocks")


class Inequality(Problem):
    r"""What all variational inequalities share: find $x^*$ in C with $\langle F(x^*), x - x^*\rangle \ge 0$ for all x in C.

    C is the set `constraints` intersected with the solutions of `equality`.
    """

    constraints: ConstraintSet
    equality: Equality
    solution: Any
    x0: Any

    def _attach(self, dim: int, constraints: Any, equality: Any, solution: Any, x0: Any) -> None:
        """Check and set the fields that all classes share."""
        if constraints is not None and not isinstance(constraints, ConstraintSet):
            raise ArgumentError(f"constraints must be a constraint set such as Nonnegative(), got {constraints!r}")
        dim = checks.whole("dim", dim, low=1)
        self.constraints = (Free() if constraints is None else constraints).bind(dim)
        self.equality = as_equality(equality, dim)
        self.solution = None if solution is None else checks.array("solution", solution, (dim,))
        self.x0 = None if x0 is None else checks.array("x0", x0, (dim,))
        if not tree.is_traced(self.constraints, self.equality):
            intersection.check_nonempty(self.constraints, self.equality)

    def replace(self, **changes: Any) -> Any:
        """A copy with some arguments of the constructor changed; every check runs again."""
        return type(self)(**{**self._arguments(), **changes})

    def _arguments(self) -> dict[str, Any]:
        return {"constraints": self.constraints, "equality": self.equality, "solution": self.solution, "x0": self.x0}

    @property
    def dim(self) -> int:
        """Number of unknowns n."""
        return self.equality.dim or 0

    @property
    def dtype(self) -> Any:
        """Precision of the data."""
        return jnp.result_type(float)

    @property
    def is_affine(self) -> bool:
        """Whether the operator is F(x) = M x + q with known `matrix` M and `offset` q."""
        return False

    @property
    def has_norm(self) -> bool:
        """Whether the operator is affine, with a matrix or without, so that it has one Lipschitz constant that products with it tell."""
        return self.is_affine or getattr(self, "structure", None) is not None

    @property
    def matrix(self) -> Array:
        """The matrix M of an affine operator, shape `(n, n)`."""
        raise NoClosedFormError(f"{type(self).__name__} has no matrix: its operator is not affine")

    @property
    def offset(self) -> Array:
        """The vector q of an affine operator, shape `(n,)`."""
        raise NoClosedFormError(f"{type(self).__name__} has no offset: its operator is not affine")

    @property
    def certified(self) -> bool:
        """Whether the class of the feasible set makes the gap computable in closed form, so that `metrics` has it."""
        return intersection.has_closed_support(self.constraints, self.equality)

    def operator(self, x: Array) -> Array:
        """F(x), shape `(n,)`."""
        raise NotImplementedError(f"{type(self).__name__} must define operator(x)")

    def project(self, x: Array) -> Array:
        """The nearest feasible point."""
        return intersection.project(self.constraints, self.equality, x)

    def support(self, s: Array) -> Array:
        """The support function of the feasible set."""
        return intersection.support(self.constraints, self.equality, s)

    def repair(self, x: Array) -> Array:
        """A feasible point near `x`: simplices are clipped at 0 and rescaled, other sets projected onto."""
        return intersection.repair(self.constraints, self.equality, x)

    def infeasibility(self, x: Array) -> Array:
        """Norm of the violation of inequalities and equations together."""
        return jnp.hypot(self.constraints.violation(x), self.equality.residual(x))

    def start(self, key: Key) -> Array:
        """`x0` if the problem has one; else a point inside the inequalities that satisfies the equations where one step of projection gives it."""
        if self.x0 is not None:
            return self.x0
        if intersection.is_simplex(self.constraints, self.equality):
            return jnp.asarray(self.equality.point, self.dtype)
        inside = jnp.asarray(self.constraints.interior_point(self.dim), self.dtype)
        moved = self.equality.project(inside)
        return jnp.where(self.constraints.slack(moved) > 0, moved, inside)

    def metrics(self, x: Array) -> dict[str, Array]:
        r"""`residual` $|x - \Pi_C(x - F(x))|$ and `infeasibility` at `x`; `gap` at the repaired point, where it is a certificate.

        The gap is $\max_{x' \in C}\langle F(z), z - x'\rangle$ with z = `repair(x)`, and is there if C is bounded with a support function in
        closed form. With a known solution, `error` is the distance to it, relative to its norm unless it is 0.
        """
        row = {"residual": jnp.linalg.norm(x - self.project(x - self.operator(x))), "infeasibility": self.infeasibility(x)}
        if self.certified:
            z = self.repair(x)
            force = self.operator(z)
            row["gap"] = jnp.maximum(force @ z + self.support(-force), 0)
        if self.solution is not None:
            solution = like(self.solution, x)
            length = jnp.linalg.norm(solution)
            row["error"] = jnp.linalg.norm(x - solution) / jnp.where(length > 0, length, jnp.ones_like(length))
        return row

    def goal(self, tolerance: float) -> Any:
        """Stop when the gap of the repaired point, a proved bound, is below `tolerance` and the point itself is that close to feasible.

        Where there is no such bound, when `residual` is below `tolerance`.
        """
        from theorylab.core.stop import Below

        return Below("gap", tolerance) & Below("infeasibility", tolerance) if self.certified else Below("residual", tolerance)

    def default_method(self) -> Any:
        """The restarted, anchored form of ACVI; for a matrix game, of the primal-dual hybrid gradient."""
        from theorylab.acvi.restarted import HalpernACVI

        return HalpernACVI()

    def _check_operator(self) -> None:
        """Shape of F, and finite values at the start."""
        shape = jax.eval_shape(self.operator, jax.ShapeDtypeStruct((self.dim,), self.dtype))
        found = getattr(shape, "shape", shape)
        if found != (self.dim,):
            raise ShapeError(f"operator must return shape ({self.dim},), got {found}; points are vectors, never columns")
        if tree.is_traced(self):
            return
        at = self.start(jax.random.key(0))
        if not bool(jnp.all(jnp.isfinite(self.operator(at)))):
            raise NonFiniteInputError(f"operator must be finite at the start, got {np.asarray(self.operator(at))} at {np.asarray(at)}")

    def check_interior(self, x: Any, name: str = "x0") -> Array:
        """`x` as a vector, refused unless strictly inside the inequalities; methods that take steps on a log barrier need it.

        Raises:
            ShapeError: not a vector of the dimension of the problem.
            InfeasibleStartError: on the boundary or outside.
        """
        x = checks.array(name, x, (self.dim,))
        room = self.constraints.slack(x)
        if checks.known(room) and not float(room) > 0:
            raise InfeasibleStartError(f"{name} must be strictly inside the constraints, its smallest slack is {float(room):.3g}; "
                                       "problem.start gives such a point")
        return x


class VariationalInequality(Inequality):
    r"""A variational inequality with any continuous monotone operator.

    Args:
        operator: `operator(x, args)`, shape `(n,)` to `(n,)`; a plain function, whose arrays are in `args`.
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
    structure: str | None = choice(None)

    def __init__(self, operator: Callable, dim: int, args: Any = (), constraints: ConstraintSet | None = None, equality: Any = None, *,
                 structure: str | None = None, solution: Any = None, x0: Any = None):
        if not callable(operator):
            raise ArgumentError(f"operator must be a function of (x, args), got {operator!r}")
        self.function = operator
        self.structure = None if structure is None else checks.among("structure", structure, STRUCTURES)
        self.args = tree.check_finite("args", jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, args))
        self._attach(dim, constraints, equality, solution, x0)
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
        M: shape `(n, n)`; monotone iff $M + M^\top$ is positive semidefinite on the null space of the equality.
        q: shape `(n,)`; 0 if None.
        constraints: a constraint set, or None.
        equality: a pair `(C, d)`, an Equality object, or None.
        solution: a known solution, measured as `error`.
        x0: where runs start by default.

    Raises:
        ShapeError: shapes that do not match.

    Example:
        >>> problem = AffineVariationalInequality(jnp.eye(2), jnp.array([1.0, -1.0]), Nonnegative())
        >>> problem.metrics(jnp.array([0.0, 1.0]))["residual"].item()
        0.0
    """

    M: Array
    q: Array

    def __init__(self, M: Any, q: Any = None, constraints: ConstraintSet | None = None, equality: Any = None, *, solution: Any = None,
                 x0: Any = None):
        self.M = checks.square("M", M)
        n = self.M.shape[0]
        self.q = jnp.zeros(n, self.M.dtype) if q is None else like(checks.array("q", q, (n,)), self.M)
        self._attach(n, constraints, equality, solution, x0)
        if not tree.is_traced(M, self.equality):
            self._warn_unless_monotone()

    def _arguments(self) -> dict[str, Any]:
        return {"M": self.M, "q": self.q, **super()._arguments()}

    def _warn_unless_monotone(self) -> None:
        inside = jax.vmap(self.equality.null)
        host = np.asarray(inside(inside((self.M + self.M.T) / 2).T))
        size = np.abs(np.asarray(self.M)).max()
        level = MONOTONE_UNITS * self.dim * np.finfo(host.dtype).eps * size
        if np.abs(host).max() <= level:
            return
        host = (host + host.T) / 2
        try:  # a Cholesky factor is ten times cheaper than the eigenvalues, which only the warning needs
            np.linalg.cholesky(host + 2 * level * np.eye(self.dim, dtype=host.dtype))
        except np.linalg.LinAlgError:
            lowest = float(np.linalg.eigvalsh(host)[0])
            if lowest < -level:
                warnings.warn(f"M is not monotone, no guarantee: the smallest eigenvalue of (M + M')/2 on the equality is {lowest:.3g}", stacklevel=3)

    @property
    def dtype(self) -> Any:
        return self.M.dtype

    @property
    def is_affine(self) -> bool:
        return True

    @property
    def matrix(self) -> Array:
        """The matrix M."""
        return self.M

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
        pad = parts.pop("slacks")
        return AffineVariationalInequality(jnp.pad(self.M, (0, pad)), jnp.pad(self.q, (0, pad)), **parts)


class MatrixGame(Inequality):
    r"""A zero-sum game: the row player minimises $x_1^\top A x_2$ over mixed strategies, the column player maximises it.

    The unknown is $(x_1, x_2)$ on two simplices, $F(x) = (A x_2, -A^\top x_1)$; no matrix of size n by n is formed.

    Args:
        A: payments of the row player, shape `(n1, n2)`.
        solution: a known equilibrium, measured as `error`.
        x0: where runs start by default; uniform strategies if None.

    Raises:
        ShapeError: `A` is no matrix, or a single pair of actions.

    Example:
        >>> rock_paper_scissors = MatrixGame(jnp.array([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]]))
        >>> rock_paper_scissors.metrics(jnp.array([0.5, 0.5, 0.0, 1.0, 0.0, 0.0]))["gap"].item()
        1.5
    """

    A: Array

    def __init__(self, A: Any, *, solution: Any = None, x0: Any = None):
        self.A = checks.array("A", A, (None, None))
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
        n1, n2 = self.A.shape
        return jnp.block([[jnp.zeros((n1, n1), self.A.dtype), self.A], [-self.A.T, jnp.zeros((n2, n2), self.A.dtype)]])

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
        from theorylab.acvi.pdhg import PrimalDualHybridGradient

        return PrimalDualHybridGradient(restart="halpern")
