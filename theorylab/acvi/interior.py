"""A primal-dual interior-point method for monotone affine problems: the reference solution to compare with."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np

from theorylab.acvi.baselines import starting_point
from theorylab.acvi.constraints import Free, Nonnegative
from theorylab.acvi.prox import like
from theorylab.acvi.sets_general import Product
from theorylab.core import tree
from theorylab.core.module import number
from theorylab.core.problem import Method
from theorylab.errors import ArgumentError

Array = jax.Array


class InteriorState(NamedTuple):
    r"""The state of `InteriorPoint`: x > 0, the multiplier nu of C x = d and the slack s > 0 of the complementarity."""

    x: Array
    nu: Array
    s: Array


class InteriorPoint(Method):
    r"""Mehrotra's predictor-corrector for $0 \le x \perp s = Mx + q + C^\top\nu \ge 0$, $Cx = d$ with monotone M (companion derivation; not in the
    papers).

    One LU factorization of the system $[[M + \mathrm{diag}(s/x), C^\top], [C, 0]]$ per step, one step length for x, s and $\nu$. Games of 50 x 50
    take about 11 steps to a gap of 1e-10. A step that is not finite is not taken, so a batch may go on after its fastest members are at round-off.
    Unknowns without an inequality are allowed, so a polyhedron can be solved after `problem.lifted()`. Entries of the start that should be positive
    and are not become 1.

    Args:
        boundary: fraction of the way to the boundary that a step may go.

    Raises:
        ArgumentError: the problem is not affine, or has other constraints than `Nonnegative` (and `Free` blocks beside it).

    Example:
        >>> from theorylab import acvi
        >>> game = acvi.MatrixGame(jnp.array([[3.0, -1.0], [-1.0, 1.0]]))
        >>> np.round(tl.iterate(game, acvi.InteriorPoint(), steps=20, stop=tl.Below("gap", 1e-10)).value, 6).tolist()
        [0.333333, 0.666667, 0.333333, 0.666667]
    """

    boundary: Any = number(0.9995, above=0.0, below=1.0)

    def init(self, problem: Any, x0: Array, *, key: Array) -> InteriorState:
        x0, held = starting_point(problem, x0), _held(problem)
        x = jnp.where(held & (x0 <= 0), 1, x0)
        s = jnp.where(held, jnp.maximum(1, jnp.max(jnp.abs(problem.operator(x)))), 0)
        return InteriorState(x, jnp.zeros(problem.equality.normal_rows()[1].shape, x0.dtype), s)

    def step(self, problem: Any, state: InteriorState, *, key: Array) -> InteriorState:
        x, nu, s = state
        held, (rows, level) = _held(problem), (like(a, x) for a in problem.equality.normal_rows())
        n, mu, divisor = x.shape[0], _complementarity(problem, state), jnp.where(held, x, 1)  # s and its change stay 0 where there is no inequality
        dual, primal = s - problem.operator(x) - rows.T @ nu, level - rows @ x
        absent = jnp.diag(jnp.where(jnp.any(rows != 0, axis=1), jnp.zeros_like(level), jnp.ones_like(level)))  # rows that were redundant are zero
        factor = jsl.lu_factor(jnp.block([[like(problem.matrix, x) + jnp.diag(s / divisor), rows.T], [rows, absent]]))

        def direction(target: Array) -> tuple[Array, Array, Array]:
            solved = jsl.lu_solve(factor, jnp.concatenate([dual + target / divisor, primal]))
            dx = solved[:n]
            return dx, solved[n:], (target - s * dx) / divisor

        def length(dx: Array, ds: Array) -> Array:
            change, value = jnp.stack([dx, ds]), jnp.stack([x, s])
            falling = (change < 0) & held
            return jnp.minimum(1, self.boundary * jnp.min(jnp.where(falling, -value / jnp.where(falling, change, -1), jnp.inf)))

        dx, _, ds = direction(-x * s)
        a = length(dx, ds)
        ahead = _complementarity(problem, InteriorState(x + a * dx, nu, s + a * ds))
        dx, dnu, ds = direction(jnp.where(held, (ahead / mu) ** 3 * mu - dx * ds, 0) - x * s)
        a = length(dx, ds)
        after = InteriorState(x + a * dx, nu + a * dnu, s + a * ds)
        inside = tree.finite(after) & jnp.all(~held | ((after.x > 0) & (after.s > 0)))
        return tree.select(inside, after, state)

    def value(self, problem: Any, state: InteriorState) -> Array:
        return state.x

    def metrics(self, problem: Any, state: InteriorState) -> dict[str, Array]:
        return {"mu": _complementarity(problem, state)}

    def cost(self, problem: Any) -> dict[str, float]:
        return {"operator_evaluations": 1.0, "factorizations": 1.0}


def _held(problem: Any) -> np.ndarray:
    """Which unknowns are nonnegative; the others are free."""
    K = problem.constraints
    blocks = list(zip(K.sets, K.sizes, strict=True)) if isinstance(K, Product) else [(K, problem.dim)]
    kinds = {type(K) for K, _ in blocks}
    if not problem.is_affine or not kinds <= {Free, Nonnegative} or Nonnegative not in kinds:
        raise ArgumentError(f"InteriorPoint needs an affine problem with constraints Nonnegative(), got {type(problem).__name__} with "
                            f"{', '.join(sorted(kind.__name__ for kind in kinds))}; problem.lifted() turns a Polyhedron into that form")
    return np.concatenate([np.full(size, isinstance(K, Nonnegative)) for K, size in blocks])


def _complementarity(problem: Any, state: InteriorState) -> Array:
    """The mean of x s over the inequalities."""
    return state.x @ state.s / int(_held(problem).sum())
