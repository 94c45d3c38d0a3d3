r"""Hypergradients without an accurate adjoint: truncated series, unrolled descent, differentiation of the last step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core import tree
from theorylab.core.module import choice, number, size
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError
from theorylab.hypergradient.estimators import Estimator, Hypergradient, assemble, compiled, inner_turn, linearize, plain
from theorylab.hypergradient.linear import POWER_STEPS, LinearSolver, NeumannSeries, Solved, Work, code, largest, top_of

Array = jax.Array


def _step(step_size: Any, at: Any) -> Array:
    """The step, or the inverse of the estimated largest eigenvalue."""
    return 1 / largest(at.product, at.residual) if step_size is None else jnp.asarray(step_size, at.residual.dtype)


def _searched(step_size: Any, work: Work) -> Work:
    """The work, with that of `_step`."""
    return work.plus(Work(products=POWER_STEPS if step_size is None else 0))


class Neumann(Estimator):
    r"""The plain formula with the adjoint $v = \eta\sum_{k<K}(I - \eta F_1^\top)^k G_1$; its bias is $-J^\top (I - \eta F_1^\top)^K G_1$.

    Args:
        terms: K.
        step_size: eta, below $2/\lambda_{\max}(F_1)$; the inverse of an estimate of it unless given.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: x**2 - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> hg.hypergradient(problem, 0.5, 1.0, Neumann(2, 0.25)).value.item()
        0.375
    """

    terms: int = size()
    step_size: Any = number(None, above=0.0)

    def __check_init__(self) -> None:
        super().__check_init__()
        if not isinstance(self.linear, str):
            raise ArgumentError(f"{type(self).__name__} takes no linear solver, got linear={self.linear!r}; its adjoint is the series")

    def solver(self, problem: Any, x: Array) -> LinearSolver:
        return NeumannSeries(self.terms, self.step_size)

    def estimate(self, problem: Any, x: Array, y: Array, *, v0: Array | None = None) -> Hypergradient:
        at = problem.at(x, y)
        system = self.system(problem, at)
        value, adjoint = plain(at, system)
        return assemble(at, adjoint, value, work=system.work(adjoint))


class JacobianFree(Estimator):
    r"""The plain formula with $v = \eta G_1$: the inverse of the inner Hessian replaced by a number (Jacobian-free backpropagation; DARTS).

    It does not tend to the hypergradient as x tends to the solution: the factor $I - \eta F_1$ is left.

    Args:
        step_size: eta, the step of the inner gradient descent.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: x**2 - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> hg.hypergradient(problem, 0.5, 1.0, JacobianFree(0.25)).value.item()
        0.25
    """

    step_size: Any = number(1.0, above=0.0)

    def estimate(self, problem: Any, x: Array, y: Array, *, v0: Array | None = None) -> Hypergradient:
        at = problem.at(x, y)
        v = jnp.asarray(self.step_size, x.dtype) * at.outer_x
        return assemble(at, implied(at, v), at.outer_y - at.cross_pullback(v), work=Work())


def implied(at: Any, v: Array) -> Solved:
    """An adjoint that was not solved for, with its residual."""
    return Solved(v, tree.norm(at.outer_x - at.transposed(v)), jnp.ones((), jnp.int32), code(Status.COMPLETED))


class OneStep(Estimator):
    r"""The derivative of $G(x^+(y), y)$ where only the last inner step $x \mapsto x^+$ depends on y (one-step differentiation).

    With a Newton step its Jacobian is $J^* - F_1^{-1} F_{11}[\delta] J^*$ to first order: consistent, with an error of first order, of second where E
    is quadratic in x. With a gradient step it is not consistent (companion derivation).

    Args:
        step: `"newton"` or `"gradient"`.
        step_size: of the gradient step; the inverse of an estimate of $\lambda_{\max}(F_1)$ unless given.
        linear: solver of the Newton step and its adjoint.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: x**2 - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> round(hg.hypergradient(problem, 0.3, 1.0, OneStep()).value.item(), 12)
        0.5
    """

    step: str = choice("newton", among=("newton", "gradient"))
    step_size: Any = number(None, above=0.0)

    def estimate(self, problem: Any, x: Array, y: Array, *, v0: Array | None = None) -> Hypergradient:
        at = problem.at(x, y)
        if self.step == "gradient":
            eta = _step(self.step_size, at)
            after = problem.at(x - eta * at.residual, y)
            v = eta * after.outer_x
            adjoint = implied(at, v)._replace(residual=tree.norm(after.outer_x - at.transposed(v)))
            return assemble(at, adjoint, after.outer_y - at.cross_pullback(v), work=_searched(self.step_size, Work(gradients=1)))
        system = self.system(problem, at)
        newton = system.solve(at.residual)
        after = problem.at(x - newton.value, y)
        w = system.solve(after.outer_x, True, v0)
        mixed = inner_turn(at, w.value, newton.value)[1]
        value = after.outer_y - at.cross_pullback(w.value) - mixed
        return assemble(at, w, value, newton.status, work=system.work(newton, w, gradients=1, products=1))


class Unrolled(Estimator):
    r"""Iterative differentiation: K steps of gradient descent from x, differentiated with respect to y by a backward pass.

    $J_{k+1} = (I - \eta F_1(x_k)) J_k - \eta F_2(x_k)$, $J_0 = 0$; the value is $G_2 + J_K^\top G_1$ at $x_K$. Started at the solution it equals
    `Neumann(K)`. The K points are stored; nothing of the inner problem is differentiated twice.

    Args:
        steps: K.
        step_size: eta; the inverse of an estimate of $\lambda_{\max}(F_1)$ at the start unless given.
        window: only the last `window` steps are differentiated (truncated backpropagation); all unless given.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: x**2 - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> hg.hypergradient(problem, 0.0, 1.0, Unrolled(2, 0.25)).value.item()
        0.375
    """

    steps: int = size()
    step_size: Any = number(None, above=0.0)
    window: Any = size(None)

    def __check_init__(self) -> None:
        super().__check_init__()
        if self.window is not None and self.window > self.steps:
            raise ArgumentError(f"Unrolled: window must be at most steps = {self.steps}, got {self.window}")

    def estimate(self, problem: Any, x: Array, y: Array, *, v0: Array | None = None) -> Hypergradient:
        first = problem.at(x, y)
        eta = _step(self.step_size, first)

        def forward(x: Array, _: None) -> tuple[Array, Array]:
            return x - eta * problem.at(x, y).residual, x

        def backward(carry: tuple[Array, Array, Array], x: Array) -> tuple[tuple[Array, Array, Array], None]:
            p, total, v = carry
            at = problem.at(x, y)
            return (p - eta * at.transposed(p), total - eta * at.cross_pullback(p), v + eta * p), None

        end, path = lax.scan(forward, x, None, length=self.steps)
        at = problem.at(end, y)
        kept = path if self.window is None else path[-self.window:]
        (_, value, v), _ = lax.scan(backward, (at.outer_x, at.outer_y, jnp.zeros_like(x)), kept, reverse=True)
        work = _searched(self.step_size, Work(gradients=self.steps, products=len(kept)))
        return assemble(at, implied(at, v), value, work=work, inner=first.residual)

    def explain(self, problem: Any, x: Array, y: Array) -> None:
        top = float(top_of(compiled(linearize, problem, x, y)))
        eta = None if self.step_size is None else float(self.step_size)
        if eta is not None and eta * top >= 2:
            raise ArgumentError(f"step_size must be below 2/lambda_max = {2 / top:.3g} for gradient descent to converge, got {eta:.3g}")
