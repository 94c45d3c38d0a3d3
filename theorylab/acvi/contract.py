"""What all variational inequalities share: the feasible set, the metrics, the start."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi import intersection
from theorylab.acvi.constraints import ConstraintSet, Free
from theorylab.acvi.equality import Equality, as_equality
from theorylab.acvi.prox import like
from theorylab.core import checks, tree
from theorylab.core.keys import Key
from theorylab.core.problem import Problem
from theorylab.errors import ArgumentError, InfeasibleStartError, NoClosedFormError, NonFiniteInputError, ShapeError

Array = jax.Array
STRUCTURES = ("affine", "bilinear", "blocks")


class Inequality(Problem):
    r"""What all variational inequalities share: find $x^*$ in C with $\langle F(x^*), x - x^*\rangle \ge 0$ for all x in C.

    C is the set `constraints` intersected with the solutions of `equality`.
    """

    constraints: ConstraintSet
    equality: Equality
    solution: Any
    x0: Any
    structure: str | None = eqx.field(static=True)

    def _attach(self, dim: int, constraints: Any, equality: Any, solution: Any, x0: Any, structure: str | None = None) -> None:
        """Check and set the fields that all classes share."""
        if constraints is not None and not isinstance(constraints, ConstraintSet):
            raise ArgumentError(f"constraints must be a constraint set such as Nonnegative(), got {constraints!r}")
        dim = checks.whole("dim", dim, low=1)
        self.constraints = (Free() if constraints is None else constraints).bind(dim)
        self.equality = as_equality(equality, dim)
        self.solution = None if solution is None else checks.array("solution", solution, (dim,))
        self.x0 = None if x0 is None else checks.array("x0", x0, (dim,))
        self.structure = None if structure is None else checks.among("structure", structure, STRUCTURES)
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
        return self.is_affine or self.structure is not None

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
        gap = None
        if self.certified:
            z = self.repair(x)
            force = self.operator(z)
            gap = force @ z + self.support(-force)
        return self.judged(x, self.operator(x), gap)

    def judged(self, x: Array, force: Array, gap: Array | None) -> dict[str, Array]:
        """The row of `metrics` at x, whose F is `force`, with the gap of its repaired point: for methods that carry them."""
        row = {"residual": jnp.linalg.norm(x - self.project(x - force)), "infeasibility": self.infeasibility(x)}
        if gap is not None:
            row["gap"] = jnp.maximum(gap, 0)
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
        """The restarted, anchored form of ACVI."""
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
