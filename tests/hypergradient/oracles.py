"""The formulas written directly, dense and by autodiff of F and G: what the estimators are compared with."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp


def jacobian(problem: Any, x: Any, y: Any) -> Any:
    """J = -F_1^{-1} F_2, shape (n, m)."""
    return -jnp.linalg.solve(jax.jacfwd(problem.residual)(x, y), jax.jacfwd(problem.residual, 1)(x, y))


def omega(problem: Any, x: Any, y: Any) -> Any:
    """The plain formula G_2 + J' G_1."""
    return jax.grad(problem.outer, 1)(x, y) + jacobian(problem, x, y).T @ jax.grad(problem.outer)(x, y)


def omega_x(problem: Any, x: Any, y: Any) -> Any:
    """Its Jacobian in x, shape (m, n)."""
    return jax.jacfwd(lambda x: omega(problem, x, y))(x)


def newton(problem: Any, x: Any, y: Any) -> Any:
    """F_1^{-1} F."""
    return jnp.linalg.solve(jax.jacfwd(problem.residual)(x, y), problem.residual(x, y))


@eqx.filter_jit
def solution(problem: Any, y: Any, x0: Any = None) -> Any:
    """x*(y) by 30 Newton steps; for problems where plain Newton from `x0` (zero) converges, which the caller checks by the residual."""
    start = jnp.zeros(problem.n, y.dtype) if x0 is None else x0
    return jax.lax.fori_loop(0, 30, lambda _, x: x - newton(problem, x, y), start)


@eqx.filter_jit
def flat(estimator: Any, problem: Any, x: Any, y: Any) -> Any:
    """The whole result of an estimator at flat x and y, compiled."""
    return estimator.estimate(problem, x, y)


@eqx.filter_jit
def along(estimator: Any, problem: Any, xs: Any, y: Any) -> Any:
    """Values of an estimator at each row of `xs`."""
    return jax.vmap(lambda x: estimator.estimate(problem, x, y).value)(xs)
