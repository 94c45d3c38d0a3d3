r"""Estimators of the hypergradient from an approximate inner solution, and `hypergradient`, which checks, compiles once and unpacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core import checks, tree
from theorylab.core.kernel import Static, bind, unbind
from theorylab.core.linear import Factored
from theorylab.core.module import Module, size
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, NotConvergedError, ShapeError
from theorylab.hypergradient.contract import BilevelProblem
from theorylab.hypergradient.linear import LinearSolver, Solved, System, Work, measured, solver, worst

Array = jax.Array
PRECONDITIONERS = ("jacobi", "newton")
UNSOLVED = 1e-3


class Hypergradient(NamedTuple):
    r"""An estimate of the hypergradient with what is known about its errors.

    Attributes:
        value: the estimate, like y.
        error_estimate: norm of `correction`: an estimate of the error of the plain formula, not a bound; it is too small far from the solution.
            None where the estimator has none.
        error_bound: a proved bound where one was computed, else None.
        inner_residual: norm of F at the given x.
        adjoint_residual: norm of $G_1 - F_1^\top v$.
        status: COMPLETED, or the worst status of the linear solves.
        adjoint: v, like x; start of the next adjoint solve.
        correction: e, like y: its entries are error bars of the plain formula for each hyper-parameter; zero where the estimator has none.
        work: gradients, products and factorizations that the estimate took.
    """

    value: Any
    error_estimate: Any
    error_bound: Any
    inner_residual: Array
    adjoint_residual: Array
    status: Array
    adjoint: Any
    correction: Any
    work: Work


class Estimator(Module):
    """How a hypergradient is formed from an approximate inner solution. Subclasses define `estimate`."""

    linear: Any = eqx.field(default="auto", kw_only=True)

    def __check_init__(self) -> None:
        super().__check_init__()
        solver(self.linear, 1, True)

    def estimate(self, problem: Any, x: Array, y: Array, *, v0: Array | None = None) -> Hypergradient:
        """The estimate at flat arrays x (n,) and y (m,); v0 starts an iterative adjoint solve."""
        raise NotImplementedError(f"{type(self).__name__} must define estimate(problem, x, y, *, v0=None)")

    def check(self, problem: Any, x: Array, y: Array) -> None:
        """Raise if the estimate does not exist at flat x and y: called once on the host."""

    def explain(self, problem: Any, x: Array, y: Array) -> None:
        """Raise the reason of a failed status where it can be found: called on the host."""
        self.solver(problem, x).diagnose(compiled(linearize, problem, x, y))

    def solver(self, problem: Any, x: Array) -> LinearSolver:
        """The linear solver for this problem."""
        return solver(self.linear, x.shape[0], problem.symmetric)

    def system(self, problem: Any, at: Any) -> System:
        """The factored system at a linearization."""
        return self.solver(problem, at.residual).factor(at, problem.symmetric)


def assemble(at: Any, adjoint: Solved, value: Array, *statuses: Any, work: Work, correction: Array | None = None,
             inner: Array | None = None) -> Hypergradient:
    """The result from its parts; `inner` is the residual vector F at the given x where `at` is another point."""
    estimate = None if correction is None else tree.norm(correction)
    status = worst(adjoint.status, measured(value), *statuses)
    return Hypergradient(value, estimate, None, tree.norm(at.residual if inner is None else inner), adjoint.residual, status, adjoint.value,
                         jnp.zeros_like(value) if correction is None else correction, work.plus())


def plain(at: Any, system: System, v0: Array | None = None) -> tuple[Array, Solved]:
    r"""The formula $G_2 - F_2^\top v$ at a linearization, and its adjoint solve."""
    adjoint = system.solve(at.outer_x, True, v0)
    return at.outer_y - at.cross_pullback(adjoint.value), adjoint


def turned(at: Any, system: System, turn: tuple[Array, Array]) -> tuple[Array, Solved]:
    r"""The change c - F_2' F_1^{-T} a of the hypergradient that belongs to a change (a, c) of the derivatives of the Lagrangian."""
    a, c = turn
    q = system.solve(a, True)
    return c - at.cross_pullback(q.value), q


def inner_turn(at: Any, v: Array, d: Array) -> tuple[Array, Array]:
    r"""The part $(-F_{11}[d]^\top v, -F_{21}[d]^\top v)$ of `turn` that belongs to F alone."""
    both, outer = at.turn(v, d), at.turn(jnp.zeros_like(v), d)
    return both[0] - outer[0], both[1] - outer[1]


class Plain(Estimator):
    r"""The formula of the implicit function theorem at x: $\Omega = G_2 - F_2^\top v$ with $F_1^\top v = G_1$ (the paper's vanilla estimator).

    Its error is $\Omega_1 (x - x^*)$ to first order.

    Args:
        linear: a linear solver, or `"auto"`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> round(float(hypergradient(problem, 0.98137358702, 1.0, Plain()).value), 9)
        0.657264595
    """

    def estimate(self, problem: Any, x: Array, y: Array, *, v0: Array | None = None) -> Hypergradient:
        at = problem.at(x, y)
        system = self.system(problem, at)
        value, adjoint = plain(at, system, v0)
        return assemble(at, adjoint, value, work=system.work(adjoint))


class OnePoint(Estimator):
    r"""The plain formula minus its first-order error: $\Omega - \Omega_1 F_1^{-1} F$, all at the same x with one factorization.

    Three solves with one matrix and one directional derivative: $v = F_1^{-\top} G_1$, $d = F_1^{-1} F$, the derivative (a, c) along d of the
    gradient of the Lagrangian $G - v^\top F$ in (x, y), $q = F_1^{-\top} a$, and the correction $e = c - F_2^\top q$. The error is quadratic in the
    inner error for every G, and $\lVert e\rVert$ estimates the error of the plain formula (companion derivation).

    Args:
        linear: a linear solver, or `"auto"`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> round(float(hypergradient(problem, 0.98137358702, 1.0, OnePoint()).value), 9)
        0.705014395
    """

    def estimate(self, problem: Any, x: Array, y: Array, *, v0: Array | None = None) -> Hypergradient:
        at = problem.at(x, y)
        system = self.system(problem, at)
        value, adjoint = plain(at, system, v0)
        newton = system.solve(at.residual)
        error, q = turned(at, system, at.turn(adjoint.value, newton.value))
        work = system.work(adjoint, newton, q, products=1)
        return assemble(at, adjoint, value - error, newton.status, q.status, work=work, correction=error)


def _as_array(P: Any) -> Any:
    return checks.array("preconditioner", P) if isinstance(P, (list, np.ndarray)) else P


class Preconditioned(Estimator):
    r"""The plain formula at $x - P^{-1} F(x, y)$ (paper); its Jacobian in x is $\Omega_1 (I - P^{-1} F_1)^k$ at the solution.

    P belongs to the given x and is kept over the k steps.

    Args:
        preconditioner: P as `"jacobi"` (the diagonal of F_1), `"newton"` (F_1 itself, by `linear`), a vector (a diagonal), a matrix, a `Factored`, a
            linear solver (`CG(max_steps=k)` gives k steps of conjugate gradients), or a function (at, r) -> $P^{-1} r$ (with an attribute
            `products` if it is to count in the work).
        steps: k.
        linear: solver of the adjoint system.

    Raises:
        UnknownNameError: another name.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> round(float(hypergradient(problem, 0.98137358702, 1.0, Preconditioned("jacobi")).value), 9)
        0.705304444
    """

    preconditioner: Any = eqx.field(default="jacobi", converter=_as_array)
    steps: int = size(1)

    def __check_init__(self) -> None:
        super().__check_init__()
        P = self.preconditioner
        if isinstance(P, str):
            checks.among("preconditioner", P, PRECONDITIONERS)
        elif not isinstance(P, (LinearSolver, Factored)) and not callable(P) and not (isinstance(P, jax.Array) and P.ndim in (1, 2)):
            raise ArgumentError(f"preconditioner must be a name, a vector, a matrix, a linear solver or a function, got {P!r}")

    def check(self, problem: Any, x: Array, y: Array) -> None:
        P = self.preconditioner
        if isinstance(P, jax.Array) and P.shape not in ((x.size,), (x.size, x.size)):
            raise ShapeError(f"preconditioner must have shape ({x.size},) or ({x.size}, {x.size}) to match x, got {P.shape}")

    def _inverse(self, problem: Any, at: Any) -> tuple[Callable[[Array], tuple[Array, Any]], Work]:
        """The map r -> (P^{-1} r, products), and what it took to make it."""
        P: Any = self.preconditioner
        if isinstance(P, str) and P == "jacobi":
            return lambda r: (r / at.diagonal(), 0), Work()
        if isinstance(P, (str, LinearSolver)):
            system = self.system(problem, at) if isinstance(P, str) else P.factor(at, problem.symmetric)

            def solved(r: Array) -> tuple[Array, Any]:
                end = system.solve(r)
                return end.value, end.steps

            return solved, system.setup
        if isinstance(P, (Factored, jax.Array)):
            given = P if isinstance(P, Factored) else Factored.of(P)
            return lambda r: (given.solve(r), 0), Work(factorizations=int(P is not given and given.kind != "diagonal"))
        return lambda r: (P(at, r), getattr(P, "products", 0)), Work()

    def estimate(self, problem: Any, x: Array, y: Array, *, v0: Array | None = None) -> Hypergradient:
        start = problem.at(x, y)
        inverse, made = self._inverse(problem, start)

        def correct(x: Array, F: Array) -> tuple[Array, Array]:
            d, products = inverse(F)
            return x - d, jnp.asarray(products, jnp.int32)

        moved, products = correct(x, start.residual)
        if self.steps > 1:
            moved, more = lax.scan(lambda x, _: correct(x, problem.at(x, y).residual), moved, None, length=self.steps - 1)
            products = products + jnp.sum(more, dtype=jnp.int32)
        at = problem.at(moved, y)
        system = self.system(problem, at)
        value, adjoint = plain(at, system, v0)
        work = system.work(adjoint, gradients=self.steps).plus(made, Work(products=products))
        return assemble(at, adjoint, value, work=work, inner=start.residual)


class NewtonPoint(Estimator):
    r"""The plain formula at the Newton point $x - F_1^{-1} F(x, y)$ (paper: the preconditioner $P = F_1$): two factorizations.

    The error is $\tfrac12\Omega_1 F_1^{-1} F_{11}[\delta, \delta]$ to second order for every G, and 0 where E is quadratic in x.

    Args:
        linear: a linear solver, or `"auto"`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> round(float(hypergradient(problem, 0.98137358702, 1.0, NewtonPoint()).value), 9)
        0.705304444
    """

    def estimate(self, problem: Any, x: Array, y: Array, *, v0: Array | None = None) -> Hypergradient:
        return Preconditioned("newton", linear=self.linear).estimate(problem, x, y, v0=v0)


class Polish(Estimator):
    r"""The derivative of $G(x^+(y), y)$ through one differentiated Newton step on top of the implicit derivative (companion derivation).

    $x^+ = x - F_1^{-1} F$ carries the derivative $J - J_1[d]$, so the value is $G_2 - F_2^\top w + (F_{21}[d] + F_{11}[d] J)^\top w$ with
    $F_1^\top w = G_1$, where the derivatives of G are taken at $x^+$ and those of F at x. The error is quadratic in the inner error for every G.

    Args:
        linear: a linear solver, or `"auto"`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> abs(float(hypergradient(problem, 0.98137358702, 1.0, Polish()).value) - 0.5**0.5) < 0.003
        True
    """

    def estimate(self, problem: Any, x: Array, y: Array, *, v0: Array | None = None) -> Hypergradient:
        at = problem.at(x, y)
        system = self.system(problem, at)
        newton = system.solve(at.residual)
        after = problem.at(x - newton.value, y)
        w = system.solve(after.outer_x, True, v0)
        error, q = turned(at, system, inner_turn(at, w.value, newton.value))
        work = system.work(newton, w, q, gradients=1, products=1)
        return assemble(at, w, after.outer_y - at.cross_pullback(w.value) - error, newton.status, q.status, work=work)


@partial(jax.jit, static_argnames=("function", "static"))
def _compiled(function: Callable, arrays: list[Array], *, static: Static) -> Any:
    with jax.default_matmul_precision("highest"):
        return function(*unbind(arrays, static))


def compiled(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` compiled once for each structure: the arrays in the arguments are traced, the rest is static.

    `function` is compared by identity, so it must be defined at the top of a module.
    """
    arrays, static = bind(arguments)
    return _compiled(function, arrays, static=static)


def linearize(problem: Any, x: Array, y: Array) -> Any:
    """`problem.at(x, y)`, to be compiled for host code."""
    return problem.at(x, y)


def _estimate(estimator: Estimator, problem: Any, x: Array, y: Array, v0: Array | None) -> Hypergradient:
    return estimator.estimate(problem, x, y, v0=v0)


def _residual_at_zero(problem: Any, x: Array, y: Array) -> Array:
    return tree.norm(problem.at(jnp.zeros_like(x), y).residual)


def as_estimator(estimator: Any) -> Estimator:
    """`estimator`, or `OnePoint()` for None.

    Raises:
        ArgumentError: something else than an estimator.
    """
    if estimator is None:
        return OnePoint()
    if not isinstance(estimator, Estimator):
        raise ArgumentError(f"estimator must be an estimator such as OnePoint() or Plain(), got {estimator!r}")
    return estimator


def flat_point(problem: Any, x: Any, y: Any) -> tuple[Any, Array, Array]:
    """The problem, its shapes known, and the points x and y as flat finite arrays.

    Raises:
        ArgumentError: not a bilevel problem.
        ShapeError: x or y does not match the problem.
        NonFiniteInputError: NaN or infinity.
    """
    if not isinstance(problem, BilevelProblem):
        raise ArgumentError(f"problem must be a bilevel problem such as Bilevel(...), got {type(problem).__name__}")
    problem = problem.shaped(x, y)
    return problem, problem.pack_x(x), problem.pack_y(y)


def hypergradient(problem: Any, x: Any, y: Any, estimator: Estimator | None = None, *, v0: Any = None, strict: bool = False) -> Hypergradient:
    r"""Estimate the derivative of $y \mapsto G(x^*(y), y)$ from an approximate inner solution x.

    Compiles once for each structure: other numbers or data of the same shapes do not compile again. It works inside `jit`, `vmap` and `grad`.

    Args:
        problem: a bilevel problem.
        x: an approximate inner solution, like the problem's x.
        y: hyper-parameters, like the problem's y.
        estimator: an estimator; `OnePoint()` unless given.
        v0: where an iterative adjoint solve starts, like x: the `adjoint` of an earlier result.
        strict: raise where x does not solve the inner problem to $\lVert F(x, y)\rVert \le 10^{-3} \lVert F(0, y)\rVert$, and where the status is
            not a good one. Otherwise the residuals and the status in the result say so.

    Returns:
        A `Hypergradient`; `value` and `correction` like y, `adjoint` like x.

    Raises:
        ShapeError: x, y or v0 does not match the problem.
        NonFiniteInputError: x or y holds NaN or infinity.
        MatrixError: Cholesky or CG met an inner Hessian that is not positive definite; LU met a singular one.
        ArgumentError: CG or Cholesky on a root problem not declared symmetric; a Neumann step that diverges; `strict` and x no solution.
        NotConvergedError: `strict`, and a linear solve failed.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.sum((x - y["a"]) ** 2), lambda x, y: jnp.sum(x), x=jnp.zeros(2), y={"a": jnp.ones(2)})
        >>> hypergradient(problem, jnp.ones(2), {"a": jnp.ones(2)}).value["a"].round(12).tolist()
        [1.0, 1.0]
    """
    estimator = as_estimator(estimator)
    problem, flat_x, flat_y = flat_point(problem, x, y)
    start = None if v0 is None else problem.pack_x(v0)
    eager = not tree.is_traced(problem, flat_x, flat_y, start, estimator)
    if eager:
        estimator.check(problem, flat_x, flat_y)
    found = compiled(_estimate, estimator, problem, flat_x, flat_y, start)
    if eager:
        status = Status(int(found.status))
        if status in (Status.NONFINITE, Status.UNDECIDED):
            estimator.explain(problem, flat_x, flat_y)
        if strict:
            _check_solved(problem, flat_x, flat_y, found, status)
    return found._replace(value=problem.unpack_y(found.value), adjoint=problem.unpack_x(found.adjoint), correction=problem.unpack_y(found.correction))


def _check_solved(problem: Any, x: Array, y: Array, found: Hypergradient, status: Status) -> None:
    left, scale = float(found.inner_residual), float(compiled(_residual_at_zero, problem, x, y))
    if left > UNSOLVED * scale > 0:
        raise ArgumentError(f"x must solve the inner problem for strict=True: |F(x, y)| is {left:.3g}, which is {left / scale:.1e} of |F(0, y)|; "
                            "run the inner method longer or pass strict=False")
    if not status.good:
        raise NotConvergedError(f"the linear solve ended with {status} and an adjoint residual of {float(found.adjoint_residual):.3g}; "
                                "give the solver more steps or pass linear=LU()", found)
