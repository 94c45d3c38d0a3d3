"""The formulas written directly, dense and by autodiff of F and G: what the estimators are compared with."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from theorylab.hypergradient.bilevel import Bilevel

X3, Y2 = jnp.array([0.3, -0.4, 0.9]), jnp.array([0.6, -0.2])


def _energy(x: Any, y: Any, M: Any, S: Any, B: Any, Q: Any) -> Any:
    z = B @ y
    return x @ M @ x / 2 + jnp.sum(x**4) / 10 + jnp.sum((z * x) ** 2) / 2 - jnp.sum(x * z) - x[0] + y[0] * x[1] ** 2 * x[2] / 5


def _residual(x: Any, y: Any, M: Any, S: Any, B: Any, Q: Any) -> Any:
    return jax.grad(_energy)(x, y, M, S, B, Q) + (1 + y[1] ** 2) * (S @ x)


def _outer(x: Any, y: Any, M: Any, S: Any, B: Any, Q: Any) -> Any:
    return jnp.sum((Q @ x - 1) ** 2) / 2 + y[0] * x[0] * x[1] ** 2 + y @ y


def tiny(kind: str = "energy", dtype: Any = float) -> Bilevel:
    """A problem of polynomials with n = 3, m = 2 and every derivative present: `"energy"`, or `"root"` with a Jacobian that is not symmetric."""
    rng = np.random.default_rng(2)
    R, K, B, Q = (rng.standard_normal(shape) for shape in ((3, 3), (3, 3), (3, 2), (3, 3)))
    args = tuple(jnp.asarray(a, dtype) for a in (R @ R.T / 3 + 2 * np.eye(3), K - K.T, B, Q))
    given = {"inner": _energy} if kind == "energy" else {"residual": _residual}
    return Bilevel(outer=_outer, args=args, x=jnp.zeros(3, dtype), y=jnp.zeros(2, dtype), **given)


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
def each(estimators: Any, problem: Any, x: Any, y: Any) -> Any:
    """The results of several estimators at flat x and y, in one program."""
    return [how.estimate(problem, x, y) for how in estimators]


@eqx.filter_jit
def along(estimator: Any, problem: Any, xs: Any, y: Any) -> Any:
    """Values of an estimator at each row of `xs`."""
    return jax.vmap(lambda x: estimator.estimate(problem, x, y).value)(xs)


def logistic_gradient(problem: Any, y: Any) -> np.ndarray:
    """The hypergradient of a `LogisticSelection` with the validation loss, by Newton's method and the dense formula in NumPy."""
    A, b, A_out, b_out = (np.asarray(a) for a in (problem.A, problem.b, problem.A_out, problem.b_out))
    D, x = np.exp(np.asarray(y)) / A.shape[1], np.zeros(A.shape[1])
    slope = lambda A, b, x: (-b / (1 + np.exp(b * (A @ x)))) @ A / len(A)
    for _ in range(15):
        weight = 1 / (2 + 2 * np.cosh(A @ x))
        H = (A.T * weight) @ A / len(A) + np.diag(D)
        x = x - np.linalg.solve(H, slope(A, b, x) + D * x)
    assert np.linalg.norm(slope(A, b, x) + D * x) < 1e-13
    return -D * x * np.linalg.solve(H, slope(A_out, b_out, x))
