r"""Variational inequalities as a differentiable layer: the point of the central path, with the derivative of the equations that define it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.acvi.equality import DenseEquality, MatrixFree
from theorylab.acvi.merit import central_path
from theorylab.acvi.problem import Inequality
from theorylab.acvi.prox import like
from theorylab.core import checks
from theorylab.errors import ArgumentError, NoClosedFormError

Array = jax.Array


def smoothed_equilibrium(problem: Inequality, mu: Any, *, barrier: str = "log") -> Array:
    r"""The point $x^\mu$ of the central path, differentiable in mu and in every array of the problem.

    It solves $F(x) + \mu\nabla B(x) + C^\top\nu = 0$, $Cx = d$ strictly inside the inequalities, by the Newton iteration of `central_path`. Its
    derivative solves
    $$ \begin{pmatrix} F' + \mu\nabla^2 B & C^\top \\ C & 0 \end{pmatrix} \begin{pmatrix} dx \\ d\nu \end{pmatrix}
       = -\begin{pmatrix} d_\theta (F + \mu\nabla B + C^\top\nu) \\ d_\theta (Cx - d) \end{pmatrix}, $$
    so a pullback costs one transposed solve and no iteration is unrolled (companion derivation). It exists where the equilibrium itself jumps,
    and tends to its derivative elsewhere as mu falls. `grad`, `jacobian`, `vmap`, `jit` and higher derivatives work; make the problem from the
    parameters inside the function that is differentiated, or differentiate in the problem itself. Dense: $O((n + p)^3)$.

    Args:
        problem: a monotone variational inequality with an equality that has a matrix.
        mu: weight of the barrier, above 0.
        barrier: `"log"`, or `"entropy"` for `Nonnegative` constraints (on simplices the quantal response).

    Returns:
        The point, shape `(n,)`; NaN where Newton's method failed.

    Raises:
        ArgumentError: not a variational inequality, mu is not above 0, or the barrier does not fit the constraints.
        NoClosedFormError: the equality is `MatrixFree`.

    Example:
        >>> from theorylab import acvi
        >>> pennies = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
        >>> weight = lambda bonus: smoothed_equilibrium(acvi.MatrixGame(pennies.at[0, 0].add(bonus)), 1e-3)[2]
        >>> round(float(jax.grad(weight)(0.0)), 3)
        -0.125
    """
    if not isinstance(problem, Inequality):
        raise ArgumentError(f"problem must be a variational inequality or a MatrixGame, got {type(problem).__name__}")
    checks.real("mu", mu, above=0.0)
    if isinstance(problem.equality, MatrixFree):
        raise NoClosedFormError("smoothed_equilibrium needs an equality with a matrix, got MatrixFree; pass equality=(C, d)")
    mu = jnp.asarray(mu, problem.dtype)
    x = central_path(lax.stop_gradient(problem), lax.stop_gradient(mu)[None], barrier=barrier)[0]
    return _attach(problem, mu, lax.stop_gradient(x), barrier)


@partial(jax.jit, static_argnames="barrier")
def _attach(problem: Inequality, mu: Array, x: Array, barrier: str) -> Array:
    """The point x with the derivative of the equations that it solves."""
    n = x.shape[0]
    equations, kept = _equations(problem, x)

    def force(x: Array) -> Array:
        inner = 1 + jnp.log(x) if barrier == "entropy" else problem.constraints.barrier_gradient(x)
        return problem.operator(x) + mu * inner

    def residual(z: Array) -> Array:
        values, pull = jax.vjp(equations, z[:n])
        return jnp.concatenate([force(z[:n]) + pull(z[n:])[0], jnp.where(kept, values, z[n:])])

    # the rows of the equations are orthonormal at the solution, so the pullback of the force gives the multiplier
    nu = -jax.jvp(equations, (x,), (force(x),))[1]
    z = lax.stop_gradient(jnp.concatenate([x, nu]))
    return lax.custom_root(residual, z, lambda _, z: z, _solve)[:n]


def _equations(problem: Inequality, x: Array) -> tuple[Callable[[Array], Array], Array]:
    """The equations as a function with orthonormal rows, and which of them are not redundant.

    An equality with a matrix is differentiated in C and d, with the combination of its rows held fixed: the singular vectors that make them
    orthonormal have no derivative where singular values coincide, and the solution does not depend on them.
    """
    E = problem.equality
    rows, level = (like(a, x) for a in E.normal_rows())
    held = lax.stop_gradient(rows)
    kept = jnp.sum(held * held, axis=1) > 0.5
    if isinstance(E, DenseEquality):
        combine = held @ jnp.linalg.pinv(lax.stop_gradient(like(E.C, x)))
        return lambda x: combine @ (like(E.C, x) @ x - like(E.d, x)), kept
    return lambda x: rows @ x - level, kept


def _solve(linear: Callable[[Array], Array], b: Array) -> Array:
    """The system of the derivative, by one factorization."""
    return jnp.linalg.solve(jax.jacfwd(linear)(b), b)
