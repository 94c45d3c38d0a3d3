r"""Linear solvers for the two systems of implicit differentiation, $F_1 d = b$ and $F_1^\top v = b$, each with a measured residual and a status.

A solver is a Module with `factor(at, symmetric)`; the `System` it returns solves with the matrix or its transpose, any number of times.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core import checks, tree
from theorylab.core.linear import Factored, cg
from theorylab.core.module import Module, number, size
from theorylab.core.psd import product
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, MatrixError

Array = jax.Array
DENSE_UP_TO = 1000
POWER_STEPS = 12
BACKWARD_UNITS = 100
NAME = "the inner Hessian F_1"


class Solved(NamedTuple):
    """The end of one linear solve.

    Attributes:
        value: the solution.
        residual: norm of b - A x at `value`, computed from it.
        steps: products with A in the iteration; 0 for a factorization.
        status: a `Status` as an integer. COMPLETED or CONVERGED: as accurate as asked. MAX_STEPS: the limit came first. UNDECIDED: the matrix is
            not what the solver needs (not positive definite, not symmetric, a diverging series). NONFINITE: NaN or infinity.
    """

    value: Array
    residual: Array
    steps: Array
    status: Array

    @property
    def converged(self) -> Array:
        """Whether the status is a good one."""
        return (self.status == Status.CONVERGED) | (self.status == Status.COMPLETED)


class Work(NamedTuple):
    """What something cost: evaluations of F beyond those at the given point; products with F_1, its transpose or its directional derivative;
    dense factorizations, eigenvalue problems included.
    """

    gradients: Any = 0
    products: Any = 0
    factorizations: Any = 0

    def plus(self, *others: Work) -> Work:
        """The sum, as int32 arrays.

        Example:
            >>> Work(1).plus(Work(products=3), Work(1, 2)).products.item()
            5
        """
        return Work(*(sum((jnp.asarray(part, jnp.int32) for part in parts), jnp.int32(0)) for parts in zip(self, *others, strict=True)))


def code(status: Status) -> Array:
    """A status as an integer array."""
    return jnp.asarray(int(status), jnp.int32)


def worst(*statuses: Any) -> Array:
    """The worst of several statuses; COMPLETED if all are good."""
    found = jnp.stack([jnp.asarray(s, jnp.int32) for s in statuses])
    result = code(Status.COMPLETED)
    for status in (Status.MAX_STEPS, Status.UNDECIDED, Status.NONFINITE):
        result = jnp.where(jnp.any(found == status), code(status), result)
    return result


def measured(value: Any) -> Array:
    """COMPLETED where every entry is finite, else NONFINITE."""
    return jnp.where(tree.finite(value), code(Status.COMPLETED), code(Status.NONFINITE))


def default_tolerance(dtype: Any) -> float:
    """Relative residual that iterations aim at: 4e-11 in float64, 2e-5 in float32."""
    return float(jnp.finfo(dtype).eps) ** (2 / 3)


def fixed_start(like: Array) -> Array:
    """A vector without structure, to start Krylov and power iterations from: random ones would double the size of their programs."""
    return jnp.cos(jnp.arange(1, like.size + 1, dtype=like.dtype) ** 2).reshape(like.shape)


def largest(apply: Any, like: Array, steps: int = POWER_STEPS) -> Array:
    """A lower estimate of the largest eigenvalue of a symmetric positive definite map, by power iteration from a fixed start."""
    start = fixed_start(like)

    def step(q: Array, _: None) -> tuple[Array, Array]:
        image = apply(q)
        length = tree.norm(image)
        return image / jnp.where(length > 0, length, jnp.ones_like(length)), length

    return lax.scan(step, start / tree.norm(start), None, length=steps)[1][-1]


@eqx.filter_jit
def _matrix(at: Any) -> Array:
    return at.matrix()


@eqx.filter_jit
def top_of(at: Any) -> Array:
    """The estimate of the largest eigenvalue of F_1, compiled: for host code."""
    return largest(at.product, at.residual)


def _check_definite(at: Any) -> None:
    try:
        checks.definite(NAME, _matrix(at))
    except MatrixError as error:
        raise MatrixError(f"{error}; or pass linear=LU()") from None


class System(Module):
    """A factored or an iterated system at one linearization.

    Attributes:
        setup: what it took before the first right-hand side.
    """

    setup: ClassVar[Work] = Work()

    def work(self, *solves: Solved, gradients: int = 0, products: int = 0) -> Work:
        """What the system, solves with it, and other evaluations cost."""
        return self.setup.plus(Work(gradients, sum((one.steps for one in solves), products)))

    def solve(self, b: Array, transpose: bool = False, x0: Array | None = None) -> Solved:
        """The solution of A x = b, or with `transpose` of A' x = b.

        Args:
            b: shape (n,).
            transpose: static.
            x0: start of an iteration; a factorization ignores it.
        """
        raise NotImplementedError


class LinearSolver(Module):
    """How systems with F_1 are solved. Subclasses define `_system(at)`, and `diagnose` where a failure has a reason that can be named."""

    needs_symmetry: ClassVar[bool] = False

    def factor(self, at: Any, symmetric: bool = False) -> System:
        """The system at a linearization, ready for many right-hand sides.

        Args:
            at: a `Linearization`, or any object with `product`, `transposed`, `matrix` and `diagonal`.
            symmetric: whether F_1 is known to be symmetric.

        Raises:
            ArgumentError: the solver needs a symmetric matrix, and this one is not declared so.
        """
        if self.needs_symmetry and not symmetric:
            raise ArgumentError(f"linear must be a solver for general matrices, got {type(self).__name__}: the inner problem is a root problem "
                                "that is not declared symmetric; use GMRES() or LU()")
        return self._system(at)

    def _system(self, at: Any) -> System:
        raise NotImplementedError(f"{type(self).__name__} must define _system(at)")

    def diagnose(self, at: Any) -> None:
        """Called on the host after a solve failed: raise a sentence that says why, where the reason can be found."""


class _Dense(System):
    factored: Factored
    setup: ClassVar[Work] = Work(factorizations=1)

    def solve(self, b: Array, transpose: bool = False, x0: Array | None = None) -> Solved:
        solve, matrix, general = self.factored.solve, self.factored.matrix, self.factored.kind == "lu"
        value = jax.linear_transpose(solve, b)(b)[0] if transpose and general else solve(b)
        # Where the factor is symmetric, always with the transposed matrix: one that was wrongly declared so shows here.
        residual = tree.norm(b - product(matrix.T if transpose or not general else matrix, value))
        units = BACKWARD_UNITS * b.shape[0] * float(jnp.finfo(b.dtype).eps)
        small = residual <= units * (tree.norm(matrix) * tree.norm(value) + tree.norm(b))
        status = jnp.where(small, code(Status.COMPLETED), code(Status.UNDECIDED))
        return Solved(value, residual, jnp.zeros((), jnp.int32), worst(status, measured(value)))


class Cholesky(LinearSolver):
    """One Cholesky factorization; for symmetric positive definite F_1. Default of energy problems with at most 1000 unknowns.

    A matrix that is not positive definite gives the status NONFINITE; `hypergradient` raises `MatrixError` with the smallest eigenvalue.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: 2 * jnp.sum(x**2) - x @ y, lambda x, y: jnp.sum(x), x=jnp.zeros(2), y=jnp.ones(2))
        >>> Cholesky().factor(problem.at(jnp.zeros(2), jnp.ones(2)), symmetric=True).solve(jnp.ones(2)).value.tolist()
        [0.25, 0.25]
    """

    needs_symmetry: ClassVar[bool] = True

    def _system(self, at: Any) -> System:
        return _Dense(Factored.of(at.matrix(), "cholesky"))

    def diagnose(self, at: Any) -> None:
        _check_definite(at)


class LU(LinearSolver):
    """One LU factorization; for any invertible F_1. Default of root problems with at most 1000 unknowns.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(None, lambda x, y: jnp.sum(x), residual=lambda x, y: 4 * x - y, x=jnp.zeros(2), y=jnp.ones(2))
        >>> LU().factor(problem.at(jnp.zeros(2), jnp.ones(2))).solve(jnp.ones(2), transpose=True).value.tolist()
        [0.25, 0.25]
    """

    def _system(self, at: Any) -> System:
        return _Dense(Factored.of(at.matrix(), "lu"))

    def diagnose(self, at: Any) -> None:
        values = np.linalg.svd(np.asarray(_matrix(at)), compute_uv=False)
        if not values[-1] > np.finfo(values.dtype).eps * values[0]:
            raise MatrixError(f"{NAME} must be invertible, its smallest singular value is {values[-1]:.3g} and its largest {values[0]:.3g}; "
                              "add a ridge to the inner problem")


class _Conjugate(System):
    at: Any
    how: CG

    def solve(self, b: Array, transpose: bool = False, x0: Array | None = None) -> Solved:
        tolerance = default_tolerance(b.dtype) if self.how.tolerance is None else jnp.asarray(self.how.tolerance, b.dtype)
        inverse = self.how.preconditioner
        if isinstance(inverse, str):
            diagonal = self.at.diagonal()
            inverse = lambda r: r / diagonal  # noqa: E731
        end = cg(self.at.product, b, preconditioner=inverse, x0=x0, tolerance=tolerance, max_steps=self.how.max_steps)
        # `cg` measures with the product; a matrix that was wrongly declared symmetric shows in the true transposed product only.
        residual = tree.norm(b - jax.linear_transpose(self.at.product, b)(end.value)[0]) if transpose else end.residual
        agrees = residual <= 10 * end.residual + BACKWARD_UNITS * float(jnp.finfo(b.dtype).eps) ** 0.5 * tree.norm(b)
        return Solved(end.value, residual, end.steps, jnp.where(agrees, end.status, worst(end.status, Status.UNDECIDED)))


class CG(LinearSolver):
    """Conjugate gradients; for symmetric positive definite F_1 given by its products. Default of energy problems with over 1000 unknowns.

    Args:
        tolerance: relative residual; a tenth of the relative error that the hypergradient may have. 4e-11 (2e-5 in float32) unless given.
        max_steps: ten times the number of unknowns unless given.
        preconditioner: None, `"jacobi"` (the diagonal), a function r -> z close to the inverse, its matrix, or a `Factored`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: 2 * jnp.sum(x**2) - x @ y, lambda x, y: jnp.sum(x), x=jnp.zeros(2), y=jnp.ones(2))
        >>> CG().factor(problem.at(jnp.zeros(2), jnp.ones(2)), symmetric=True).solve(jnp.ones(2)).steps.item()
        1
    """

    needs_symmetry: ClassVar[bool] = True
    tolerance: Any = number(None, above=0.0)
    max_steps: Any = size(None)
    preconditioner: Any = None

    def __check_init__(self) -> None:
        super().__check_init__()
        if isinstance(self.preconditioner, str):
            checks.among("preconditioner", self.preconditioner, ("jacobi",))

    def _system(self, at: Any) -> System:
        return _Conjugate(at, self)

    def diagnose(self, at: Any) -> None:
        if at.residual.shape[0] <= DENSE_UP_TO:
            _check_definite(at)


class _Krylov(System):
    at: Any
    how: GMRES

    def solve(self, b: Array, transpose: bool = False, x0: Array | None = None) -> Solved:
        import lineax

        apply = self.at.transposed if transpose else self.at.product
        tolerance = jnp.asarray(default_tolerance(b.dtype) if self.how.tolerance is None else self.how.tolerance, b.dtype)
        # lineax tests entries against atol + rtol |b|; with both halves of this size its test implies |r| <= tolerance |b|.
        scale = jnp.maximum(jnp.max(jnp.abs(b)), jnp.finfo(b.dtype).tiny)
        method = lineax.GMRES(rtol=tolerance / 2, atol=tolerance / 2 * scale, norm=tree.norm, max_steps=self.how.max_steps, restart=self.how.restart)  # pyright: ignore[reportArgumentType]
        operator = lineax.FunctionLinearOperator(apply, jax.eval_shape(lambda: b))
        end = lineax.linear_solve(operator, b, method, options={} if x0 is None else {"y0": x0}, throw=False)
        residual, cycles = tree.norm(b - apply(end.value)), jnp.asarray(end.stats["num_steps"], jnp.int32)
        status = jnp.where(residual <= tolerance * tree.norm(b), code(Status.CONVERGED), code(Status.MAX_STEPS))
        return Solved(end.value, residual, cycles * min(self.how.restart, b.shape[0]), worst(status, measured(end.value)))


class GMRES(LinearSolver):
    """Restarted GMRES of lineax; for any invertible F_1 given by its products. Default of root problems with over 1000 unknowns.

    Args:
        tolerance: relative residual; 4e-11 (2e-5 in float32) unless given.
        max_steps: number of restarts; ten times the number of unknowns unless given.
        restart: dimension of the Krylov space.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(None, lambda x, y: jnp.sum(x), residual=lambda x, y: 4 * x - y, x=jnp.zeros(2), y=jnp.ones(2))
        >>> GMRES().factor(problem.at(jnp.zeros(2), jnp.ones(2))).solve(jnp.ones(2), transpose=True).value.round(12).tolist()
        [0.25, 0.25]
    """

    tolerance: Any = number(None, above=0.0)
    max_steps: Any = size(None)
    restart: int = size(20)

    def _system(self, at: Any) -> System:
        return _Krylov(at, self)


class _Series(System):
    at: Any
    terms: int = size()
    step_size: Any = None
    valid: Any = None
    setup: ClassVar[Work] = Work(products=POWER_STEPS)

    def solve(self, b: Array, transpose: bool = False, x0: Array | None = None) -> Solved:
        apply, eta = self.at.transposed if transpose else self.at.product, self.step_size

        def term(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            total, left = carry
            return (total + eta * left, left - eta * apply(left)), None

        (value, left), _ = lax.scan(term, (jnp.zeros_like(b), b), None, length=self.terms)
        status = jnp.where(self.valid, code(Status.COMPLETED), code(Status.UNDECIDED))
        return Solved(value, tree.norm(left), jnp.asarray(self.terms, jnp.int32), worst(status, measured(value)))


class NeumannSeries(LinearSolver):
    r"""The truncated series $\eta\sum_{k<K}(I - \eta F_1)^k b$; its residual is $(I - \eta F_1)^K b$.

    It converges only for $0 < \eta < 2/\lambda_{\max}$. A few power iterations estimate $\lambda_{\max}$ from below; a step above the limit gives
    the status UNDECIDED, and `hypergradient` raises.

    Args:
        terms: K.
        step_size: eta; the inverse of the estimate unless given.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: 2 * jnp.sum(x**2) - x @ y, lambda x, y: jnp.sum(x), x=jnp.zeros(2), y=jnp.ones(2))
        >>> NeumannSeries(2, 0.125).factor(problem.at(jnp.zeros(2), jnp.ones(2)), symmetric=True).solve(jnp.ones(2)).value.tolist()
        [0.1875, 0.1875]
    """

    terms: int = size()
    step_size: Any = number(None, above=0.0)

    def _system(self, at: Any) -> System:
        top = largest(at.product, at.residual)
        eta = 1 / top if self.step_size is None else jnp.asarray(self.step_size, top.dtype)
        return _Series(at, self.terms, eta, eta * top < 2)

    def diagnose(self, at: Any) -> None:
        top = float(top_of(at))
        if self.step_size is not None and checks.known(self.step_size) and float(self.step_size) * top >= 2:
            raise ArgumentError(f"step_size must be below 2/lambda_max = {2 / top:.3g} for the Neumann series to converge, "
                                f"got {float(self.step_size):.3g}")


def solver(linear: Any, unknowns: int, symmetric: bool) -> LinearSolver:
    """`linear` as a solver: `"auto"` is Cholesky or LU for at most 1000 unknowns, CG or GMRES above.

    Raises:
        ArgumentError: neither `"auto"` nor a linear solver.

    Example:
        >>> solver("auto", 10, True), solver("auto", 2000, False).restart
        (Cholesky(), 20)
    """
    if isinstance(linear, LinearSolver):
        return linear
    if not isinstance(linear, str) or linear != "auto":
        raise ArgumentError(f"linear must be 'auto' or a linear solver such as CG() or LU(), got {linear!r}")
    if unknowns <= DENSE_UP_TO:
        return Cholesky() if symmetric else LU()
    return CG() if symmetric else GMRES()
