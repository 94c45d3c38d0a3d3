r"""Solvers as differentiable functions: the derivative of the equation that a solver solves, not of its iterations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from theorylab.core import checks, tree
from theorylab.errors import ArgumentError, MatrixError, PrecisionError, ShapeError
from theorylab.hypergradient.linear import LinearSolver, solver as chosen

Array = jax.Array
PyTree = Any
UNSOLVED = 1e-3                         # relative residual of a linear system that counts as not solved
CORRECTIONS = ("none", "one_point", "polish")


def implicit(residual: Callable, linear: Any = "auto", symmetric: bool = True, correction: str = "none") -> Callable[[Callable], Callable]:
    r"""Decorate `solver(x0, y, *args)`, which solves $F(x, y) = 0$ for x, so that its derivatives are those of the solution.

    $$ J(x, y) = -F_1(x, y)^{-1} F_2(x, y) $$

    at the point x that the solver returns. `grad`, `jvp`, `jacfwd`, `jacrev`, `hessian`, `vmap` and `jit` work, in any order and nested; x and y
    may be pytrees. Derivatives are taken in y and in `args`, and are zero in x0. Pass arrays through y or `args`: one that the solver or the
    residual closes over has no derivative.

    A solver that stops at a distance $\delta$ from the solution gives a Jacobian with an error of first order in $\delta$ and says nothing. With
    $\hat\delta = F_1^{-1} F$ (the Newton step) and $J_1[h] = -F_1^{-1}(F_{21}[h] + F_{11}[h] J)$, the two corrections give the Jacobian
    $J(x) - J_1(x)[\hat\delta]$, whose error is of second order (companion derivation):

    | `correction` | value | Jacobian | gradient of $G(x(y), y)$ |
    |---|---|---|---|
    | `"none"` | x | $J(x)$ | first order |
    | `"one_point"` | x | $J(x) - J_1(x)[\hat\delta]$ | second order for G affine in x and without coupling of x and y; else first order |
    | `"polish"` | $x - \hat\delta$ | $J(x) - J_1(x)[\hat\delta]$ | second order for every G |

    `"one_point"` leaves the value alone and evaluates everything at one point. What it lacks for a general G is $(G_{21} + J^\top G_{11})\hat\delta$,
    which a map of y alone cannot know: `hypergradient(problem, x, y, OnePoint())` has it. `"polish"` is one differentiated Newton step.

    Args:
        residual: F, a function `(x, y, *args)` that returns a tree like x; in the energy case the gradient of the inner objective.
        linear: how systems with $F_1$ are solved. `"auto"` (Cholesky or LU for at most 1000 unknowns, CG or GMRES above); a linear solver of this
            family such as `CG()`; a lineax solver; or a function `(matvec, b) -> z` on flat vectors. Where a solver of this family leaves a
            relative residual above 1e-3, the derivatives are NaN.
        symmetric: whether $F_1$ is symmetric positive definite. A wrong declaration is refused in the first call, for each structure of the
            arguments, whose values are known; under `jit` the derivatives are NaN then.
        correction: see the table.

    Returns:
        A decorator. The decorated function has the signature of the solver and returns the solution alone.

    Raises:
        ArgumentError: an argument is not what it must be; or, when called, the residual is not symmetric though declared so.
        ShapeError, PrecisionError: when called: the residual is not a tree like x, or x does not hold floats of one dtype.
        MatrixError: when called: $F_1$ is singular, or is not positive definite though declared so.

    Example:
        >>> @implicit(lambda x, y: x**2 - y)
        ... def root(x0, y):
        ...     return jax.lax.fori_loop(0, 6, lambda _, x: (x + y / x) / 2, x0)
        >>> round(float(jax.grad(root, 1)(1.0, 4.0)), 12), round(float(jax.hessian(root, 1)(1.0, 4.0)), 12)
        (0.25, -0.03125)
    """
    if not callable(residual):
        raise ArgumentError(f"residual must be a function (x, y, *args) -> tree like x, got {residual!r}")
    if not isinstance(symmetric, bool):
        raise ArgumentError(f"symmetric must be True or False, got {symmetric!r}")
    checks.among("correction", correction, CORRECTIONS)
    system = _System(residual, linear, symmetric)
    system.check()

    def decorate(solve: Callable) -> Callable:
        if not callable(solve):
            raise ArgumentError(f"implicit decorates a function solver(x0, y, *args), got {solve!r}")
        return _decorated(solve, system, correction)

    return decorate


def _decorated(solve: Callable, system: _System, correction: str) -> Callable:
    seen: set[Any] = set()

    @jax.custom_jvp
    def solution(x0: PyTree, theta: tuple) -> PyTree:
        return tree.strong(jax.tree.map(jnp.asarray, solve(x0, *theta)))

    @solution.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
        (x0, theta), (_, dtheta) = primals, tangents
        x = solution(x0, theta)  # the differentiable solution, not the solver: the second derivatives need dx here
        system.verify(x, theta, seen)
        flat, unravel = ravel_pytree(x)
        _, change = jax.jvp(lambda t: system.at(flat, unravel, t), (theta,), (dtheta,))
        return x, unravel(-system.solve(flat, unravel, theta, change))

    @wraps(solve)
    def call(x0: PyTree, y: PyTree, *args: PyTree) -> PyTree:
        theta = (y, *args)
        x = solution(x0, theta)
        system.verify(x, theta, seen)
        if correction == "none":
            return x
        flat, unravel = ravel_pytree(x)
        step = system.solve(flat, unravel, theta, system.at(flat, unravel, theta))
        if correction == "one_point":
            step = step - lax.stop_gradient(step)  # the value zero with the derivative of the Newton step
        return unravel(flat - step)

    return call


class _Point:
    """F_1 at one point, as the linear solvers want it."""

    def __init__(self, product: Callable, like: Array, transposed: Callable | None = None):
        self.product, self.residual = product, like
        self.transposed = product if transposed is None else transposed

    def matrix(self) -> Array:
        return jax.vmap(self.product, out_axes=1)(jnp.eye(self.residual.shape[0], dtype=self.residual.dtype))

    def diagonal(self) -> Array:
        return jnp.diagonal(self.matrix())


class _System(NamedTuple):
    """The equation, and how systems with its x-derivative are solved."""

    residual: Callable
    linear: Any
    symmetric: bool

    def check(self) -> None:
        """Refuse a `linear` that is none of the four kinds, or one that needs the symmetry that is denied."""
        linear, lineax = self.linear, sys.modules.get("lineax")
        kinds = LinearSolver if lineax is None else (LinearSolver, lineax.AbstractLinearSolver)
        if linear != "auto" if isinstance(linear, str) else not (callable(linear) or isinstance(linear, kinds)):
            raise ArgumentError(f"linear must be 'auto', a linear solver, a lineax solver or a function (matvec, b) -> z, got {linear!r}")
        if isinstance(linear, LinearSolver) and linear.needs_symmetry and not self.symmetric:
            raise ArgumentError(f"linear must be a solver for general matrices when symmetric=False, got {type(linear).__name__}; "
                                "use LU() or GMRES()")

    def at(self, flat: Array, unravel: Callable, theta: tuple) -> Array:
        """F at a flat x."""
        return ravel_pytree(self.residual(unravel(flat), *theta))[0]

    def solve(self, flat: Array, unravel: Callable, theta: tuple, b: Array) -> Any:
        """The solution of F_1 z = b, differentiable in all arguments."""
        _, product = jax.linearize(lambda z: self.at(z, unravel, theta), flat)
        return lax.custom_linear_solve(product, b, self._apply, None if self.symmetric else self._apply, symmetric=self.symmetric)

    def _apply(self, matvec: Callable, b: Array) -> Any:
        linear = self.linear
        if isinstance(linear, (str, LinearSolver)):
            z = chosen(linear, b.shape[0], self.symmetric).factor(_Point(matvec, b), self.symmetric).solve(b).value
            # With the transposed product, a matrix that was wrongly declared symmetric shows here. The status of the solve cannot be used:
            # nested linear solves lose under `vmap` whether what they report is batched.
            image = jax.linear_transpose(matvec, b)(z)[0] if self.symmetric else matvec(z)
            return jnp.where(tree.norm(image - b) <= UNSOLVED * tree.norm(b), z, jnp.nan)
        if callable(linear):
            return linear(matvec, b)
        import lineax

        tags = lineax.positive_semidefinite_tag if self.symmetric else ()
        operator = lineax.FunctionLinearOperator(matvec, jax.eval_shape(lambda: b), tags)
        return lineax.linear_solve(operator, b, linear, throw=False).value

    def verify(self, x: PyTree, theta: tuple, seen: set) -> None:
        """Check the shapes of x and F, and on known values what `symmetric` says of F_1; once for each structure of the arguments."""
        describe = lambda t: (jax.tree.structure(t), tuple((jnp.shape(a), jnp.result_type(a)) for a in jax.tree.leaves(t)))  # noqa: E731
        shapes = describe((x, theta))
        if shapes not in seen:
            self._verify_shapes(x, theta)
            seen.add(shapes)
        if (shapes, "values") in seen or not checks.known(x, theta) or tree.is_traced():
            return
        seen.add((shapes, "values"))
        self._verify_matrix(x, theta)

    def _verify_shapes(self, x: PyTree, theta: tuple) -> None:
        dtypes = {jnp.result_type(a) for a in jax.tree.leaves(x)}
        if len(dtypes) != 1 or next(iter(dtypes)) not in (jnp.dtype("float32"), jnp.dtype("float64")):
            raise PrecisionError(f"the solver must return floats of one dtype, float32 or float64, got {sorted(str(d) for d in dtypes)}")
        words = lambda t: jax.tree.map(lambda a: f"{jnp.result_type(a).name}{list(jnp.shape(a))}", t)  # noqa: E731
        found = words(jax.eval_shape(self.residual, x, *theta))
        if found != words(x):
            raise ShapeError(f"residual must return a tree like x, {words(x)}, got {found}")

    def _verify_matrix(self, x: PyTree, theta: tuple) -> None:
        flat, unravel = ravel_pytree(x)
        if not bool(jnp.isfinite(flat).all()):
            return  # a diverged solver shows in its value; there is no matrix to judge
        _, product = jax.linearize(lambda z: self.at(z, unravel, theta), flat)
        transpose = jax.linear_transpose(product, flat)
        point = _Point(product, flat, lambda h: transpose(h)[0])
        if self.symmetric:
            h = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
            one, two = product(h), point.transposed(h)
            gap, size = float(tree.norm(one - two)), float(tree.norm(one) + tree.norm(two))
            if gap > float(jnp.finfo(flat.dtype).eps) ** 0.5 * size:
                raise ArgumentError(f"symmetric must be False: the derivative F_1 of the residual is not symmetric, for a random h the norm of "
                                    f"F_1 h - F_1' h is {gap:.2g} and of F_1 h {size / 2:.2g}")
        if isinstance(self.linear, (str, LinearSolver)):
            try:
                chosen(self.linear, flat.shape[0], self.symmetric).diagnose(point)
            except MatrixError as error:
                hint = "; if F_1 is symmetric but indefinite, pass symmetric=False" if self.symmetric else ""
                raise MatrixError(f"{error}{hint}") from None
