r"""Estimators that change the inner variable, $x = \varphi(z, y)$, and apply the plain formula in z (paper), each in closed form in x."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core import checks, tree
from theorylab.core.module import Module
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, MatrixError, NoClosedFormError
from theorylab.hypergradient.estimators import Estimator, Hypergradient, OnePoint, assemble, compiled, inner_turn, linearize, plain, turned
from theorylab.hypergradient.linear import LinearSolver, Solved, code, solver

Array = jax.Array
KINDS = ("linear", "exponential", "hessian", "outer_agnostic", "outer_aware")
CHART_STEPS = 50


class Shifted(Module):
    """F_1 plus a diagonal (a vector) or a symmetric matrix, as what linear solvers need of a linearization."""

    at: Any
    shift: Array

    @property
    def residual(self) -> Array:
        """F, for its shape."""
        return self.at.residual

    def _shifted(self, h: Array) -> Array:
        return self.shift * h if self.shift.ndim == 1 else self.shift @ h

    def product(self, h: Array) -> Array:
        """(F_1 + S) h."""
        return self.at.product(h) + self._shifted(h)

    def transposed(self, h: Array) -> Array:
        """(F_1 + S)' h."""
        return self.at.transposed(h) + self._shifted(h)

    def matrix(self) -> Array:
        """F_1 + S."""
        return self.at.matrix() + (jnp.diag(self.shift) if self.shift.ndim == 1 else self.shift)

    def diagonal(self) -> Array:
        """Its diagonal."""
        return self.at.diagonal() + (self.shift if self.shift.ndim == 1 else jnp.diagonal(self.shift))


class Reparametrized(Estimator):
    r"""The plain formula for $\tilde E(z, y) = E(\varphi(z, y), y)$, $\tilde G(z, y) = G(\varphi(z, y), y)$ at $z = \varphi^{-1}(x, y)$.

    With $A = \varphi_1$, $B = \varphi_2$, $S = A^{-\top}(\sum_k F_k \varphi^k_{11}) A^{-1}$ and $T = A^{-\top} \sum_k F_k \varphi^k_{12}$ it is
    $G_2 + \tilde J^\top G_1$ with $\tilde J = (F_1 + S)^{-1} (S B - F_2 - T)$ (companion derivation); nothing is differentiated through.

    * `"linear"`: $\varphi(z, y) = P(\hat x, y)^{-1} z$ with P the diagonal of F_1, frozen in $\hat x = x$ and live in y (the paper's PzPhi).
    * `"exponential"`: $\varphi(z) = \mathrm{sign}(\hat x) \exp(z)$ in each coordinate (ExpPhi); no entry of x may be 0.
    * `"hessian"`: $\varphi(z, y) = F_1(\hat x, y)^{-1} F(z, \hat y) + \hat x$ (OptPhi): for problems with `exact`, quadratic in x.
    * `"outer_agnostic"`: the local map with $\varphi_{12}$ such that the Jacobian is $J - J_1[F_1^{-1} F]$, with an error of second order;
      the hypergradient is of second order where $G_{21} + J^\top G_{11} = 0$ (companion derivation).
    * `"outer_aware"`: a local map that uses G too; its value is that of `OnePoint` (companion derivation). It needs $G_1 \ne 0$.

    Args:
        map: one of these names, or a function $\varphi(z, y)$ from flat z (n,) and y (m,) to x (n,), smooth and invertible in z.
        inverse: for a function: (x, y) -> z. Newton's method from z = x unless given.
        linear: a linear solver, or `"auto"`.

    Raises:
        UnknownNameError: another name.
        ArgumentError: no function; `inverse` with a name.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> sinh = hg.Reparametrized(lambda z, y: jnp.arcsinh(z), inverse=lambda x, y: jnp.sinh(x))
        >>> plain, changed = (float(hg.hypergradient(problem, 0.89, 1.0, how).value) - 0.5**0.5 for how in (hg.Plain(), sinh))
        >>> abs(changed) < 0.01 * abs(plain)
        True
    """

    map: Any = "linear"
    inverse: Any = None

    def __check_init__(self) -> None:
        super().__check_init__()
        if isinstance(self.map, str):
            checks.among("map", self.map, KINDS)
            if self.inverse is not None:
                raise ArgumentError(f"inverse belongs to a map given as a function, got one with map={self.map!r}")
        elif not callable(self.map) or (self.inverse is not None and not callable(self.inverse)):
            raise ArgumentError(f"map must be one of {', '.join(map(repr, KINDS))} or a function of (z, y), got {self.map!r}")

    def check(self, problem: Any, x: Array, y: Array) -> None:
        if self.map == "exponential" and not np.all(np.asarray(x)):
            where = int(np.flatnonzero(np.asarray(x) == 0)[0])
            raise ArgumentError(f"x must have no zero entry for the exponential map, got 0 at index {where}; use another map")
        if not isinstance(self.map, str):
            at, jacobian = self._chart(x, y)
            miss, size = float(tree.norm(self.map(at, y) - x)), float(tree.norm(x))
            if not miss <= np.finfo(np.dtype(x.dtype)).eps ** 0.5 * max(1.0, size):
                raise ArgumentError(f"map must reach x: inverse(x, y) gives z with |map(z, y) - x| = {miss:.3g}; pass inverse=")
            condition = float(np.linalg.cond(np.asarray(jacobian)))
            if not condition <= np.finfo(np.dtype(x.dtype)).eps ** -0.5:
                raise MatrixError(f"map must be invertible in z, the condition number of its Jacobian is {condition:.3g} at this x")

    def explain(self, problem: Any, x: Array, y: Array) -> None:
        if self.map == "exponential":
            at = compiled(linearize, problem, x, y)
            self.solver(problem, x).diagnose(Shifted(at, at.residual / x))
        elif isinstance(self.map, str):
            super().explain(problem, x, y)

    def solver(self, problem: Any, x: Array) -> LinearSolver:
        bends = self.map == "exponential" or not isinstance(self.map, str)  # then F_1 + S may be indefinite
        return solver(self.linear, x.shape[0], problem.symmetric and not bends)

    def estimate(self, problem: Any, x: Array, y: Array, *, v0: Array | None = None) -> Hypergradient:
        if not isinstance(self.map, str):
            return self._general(problem, x, y, v0)
        if self.map == "outer_aware":
            found = OnePoint(linear=self.linear).estimate(problem, x, y, v0=v0)
            defined = jnp.where(tree.norm(found.adjoint) > 0, found.status, code(Status.UNDECIDED))
            return found._replace(status=defined)
        at = problem.at(x, y)
        seen = Shifted(at, at.residual / x) if self.map == "exponential" else at
        system = self.solver(problem, x).factor(seen, problem.symmetric)
        value, adjoint = plain(at, system, v0)
        v, F = adjoint.value, at.residual
        work = system.work(adjoint)
        if self.map == "exponential":
            return assemble(at, adjoint, value, work=work)
        if self.map == "linear":
            weight = v * F / at.diagonal()
            bend = jax.grad(lambda y: jnp.vdot(weight, problem.at(x, y).diagonal()))(y)
            return assemble(at, adjoint, value + bend, work=work)
        if self.map == "hessian":
            solution = problem.exact(y)
            if solution is None:
                raise NoClosedFormError(f"map='hessian' needs the exact inner solution, which {type(problem).__name__} has not in closed form; "
                                        "use NewtonPoint() or OnePoint()")
            return assemble(at, adjoint, at.outer_y - problem.at(solution, y).cross_pullback(v), work=work)
        newton = system.solve(F)
        error, q = turned(at, system, inner_turn(at, v, newton.value))
        return assemble(at, adjoint, value - error, newton.status, q.status, work=system.work(adjoint, newton, q, products=1))

    def _chart(self, x: Array, y: Array) -> tuple[Array, Array]:
        """The z with map(z, y) = x, and the Jacobian of the map in z."""
        jacobian = jax.jacfwd(self.map)
        if self.inverse is not None:
            z = self.inverse(x, y)
            return z, jacobian(z, y)
        target = float(jnp.finfo(x.dtype).eps) * 10 * jnp.maximum(tree.norm(x), jnp.ones((), x.dtype))

        def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            z, miss, k = carry
            z = z - jnp.linalg.solve(jacobian(z, y), miss)
            return z, self.map(z, y) - x, k + 1

        def live(carry: tuple[Array, Array, Array]) -> Array:
            return (tree.norm(carry[1]) > target) & (carry[2] < CHART_STEPS)

        z = lax.while_loop(live, step, (x, self.map(x, y) - x, jnp.zeros((), jnp.int32)))[0]
        return z, jacobian(z, y)

    def _general(self, problem: Any, x: Array, y: Array, v0: Array | None) -> Hypergradient:
        z, A = self._chart(x, y)
        at = problem.at(x, y)
        F = at.residual
        along = lambda z, y: jnp.vdot(F, self.map(z, y))  # noqa: E731
        bent = jax.hessian(along)(z, y)  # sum_k F_k phi^k_11
        right = jnp.linalg.solve(A.T, bent)
        S = jnp.linalg.solve(A.T, right.T)
        S = (S + S.T) / 2
        system = self.solver(problem, x).factor(Shifted(at, S), problem.symmetric)
        w = system.solve(at.outer_x, True, v0)
        u = jnp.linalg.solve(A, w.value)
        mixed = jax.jvp(lambda z: jax.grad(along, 1)(z, y), (z,), (u,))[1]
        drift = jax.vjp(lambda y: self.map(z, y), y)[1](S @ w.value)[0]
        value = at.outer_y - at.cross_pullback(w.value) + drift - mixed
        # A map that is not invertible here shows in its Jacobian, a search for z that failed in what the map makes of it.
        root = float(jnp.finfo(x.dtype).eps) ** 0.5
        missed = jnp.max(jnp.abs(self.map(z, y) - x)) > root * jnp.maximum(1.0, jnp.max(jnp.abs(x)))
        lost = missed | ~(jnp.linalg.cond(A) * root <= 1)
        adjoint = Solved(*w[:3], jnp.where(lost, code(Status.UNDECIDED), w.status))
        return assemble(at, adjoint, value, work=system.work(w))
