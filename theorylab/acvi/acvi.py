r"""ACVI with exact steps: alternate the resolvent of F on C x = d with the prox of a barrier (or a projection) on the inequalities.

For fixed mu this is Douglas-Rachford splitting: with $v = y + \lambda/\beta$ a step is $x = J_\beta(2y - v)$, $v \leftarrow v + x - y$,
$y = \mathrm{prox}_{\mu B/\beta}(v)$, and the multiplier $\lambda = \beta(v - y)$ is never accumulated.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self, cast

import jax
import jax.numpy as jnp

from theorylab.acvi.barriers import Barrier, LogBarrier, check_barrier
from theorylab.acvi.baselines import starting_point
from theorylab.acvi.resolvent import KINDS, choose
from theorylab.acvi.xstep import Solved
from theorylab.core.module import choice, number
from theorylab.core.problem import Method
from theorylab.core.schedule import at

Array = jax.Array


class SplittingState(NamedTuple):
    r"""The state of the ACVI family; $\lambda = \beta(v - y)$.

    Attributes:
        x: on the plane C x = d.
        y: inside the inequalities.
        v: $y + \lambda/\beta$, what the iteration carries.
        step: steps done.
        evaluations: of F, or products of the same cost.
        factorizations: of matrices.
    """

    x: Array
    y: Array
    v: Array
    step: Array
    evaluations: Array
    factorizations: Array


class Splitting(Method):
    """What the variants with a fixed penalty share: one step, their iterate and their metrics. They differ in how x and y are found."""

    output = "y"
    penalty: Any = number(above=0.0)

    def init(self, problem: Any, x0: Array, *, key: Array) -> SplittingState:
        x0 = starting_point(problem, x0)
        zero = jnp.zeros((), jnp.int32)
        return SplittingState(x0, x0, x0, zero, zero, zero + self._prepared())

    def step(self, problem: Any, state: SplittingState, *, key: Array) -> SplittingState:
        solved = self._root(problem, state, key)
        v = state.v + solved.x - state.y
        y = self._inside(problem, state, v)
        return SplittingState(solved.x, y, v, state.step + 1, state.evaluations + solved.evaluations, state.factorizations + solved.factorizations)

    def value(self, problem: Any, state: SplittingState) -> Array:
        return state.x if self.output == "x" else state.y

    def multiplier(self, state: SplittingState) -> Array:
        r"""$\lambda = \beta(v - y)$, the gradient of the barrier at y after an exact y-step: $\lambda_i y_i = -\mu$ for the log barrier of
        $y \ge 0$.
        """
        return self.penalty * (state.v - state.y)

    def metrics(self, problem: Any, state: SplittingState) -> dict[str, Array]:
        dtype = state.x.dtype
        return {"difference": jnp.linalg.norm(state.x - state.y), "mu": jnp.asarray(self._mu(jnp.maximum(state.step - 1, 0)), dtype),
                "penalty": jnp.asarray(self.penalty, dtype), "operator_evaluations": state.evaluations, "factorizations": state.factorizations}

    def _prepared(self) -> int:
        """Factorizations that `prepare` made."""
        return 0

    def _mu(self, step: Array) -> Any:
        """The weight of the barrier in step number `step`."""
        return 0.0

    def _root(self, problem: Any, state: SplittingState, key: Array) -> Solved:
        """The x-step at $u = 2y - v$."""
        raise NotImplementedError(f"{type(self).__name__} must define _root(problem, state, key)")

    def _inside(self, problem: Any, state: SplittingState, v: Array) -> Array:
        """The y-step at `v`."""
        raise NotImplementedError(f"{type(self).__name__} must define _inside(problem, state, v)")


class ExactSplitting(Splitting):
    """Exact x-steps: the resolvent is chosen and factored in `prepare`."""

    linear = "auto"
    solver = cast("Any", None)

    def prepare(self, problem: Any) -> Self:
        return self.replace(solver=choose(problem, self.linear).make(problem, self.penalty))

    def _prepared(self) -> int:
        return self.solver.factorizations

    def _root(self, problem: Any, state: SplittingState, key: Array) -> Solved:
        return self.solver(problem, 2 * state.y - state.v, state.x, self.penalty)


class ACVI(ExactSplitting):
    r"""ACVI with exact steps (Yang, Jordan and Chavdarova, Algorithm 1), in Douglas-Rachford form and as one flat loop.

    For monotone F and fixed mu the last iterate has $|x_K - y_K| = O(1/\sqrt K)$ and a gap of that order plus m mu, with no Lipschitz constant.

    Args:
        penalty: $\beta$.
        mu: weight of the barrier, a number or a `MuSchedule`.
        barrier: `LogBarrier()`, `ExtendedLogBarrier(switch)` or `EntropyBarrier()`.
        linear: how the x-step is solved: `"dense"` (precomputed resolvent), `"svd"` (games), `"blocks"` (M = B x I with equal blocks), `"cg"` (large
            games), `"krylov"` (affine without a matrix), `"sparse"` (one sparse LU), `"newton"` (nonlinear); `"auto"` decides by class, shape and
            pattern, never by values.
        output: `"y"`, strictly inside the inequalities, or `"x"`, on the plane of the equalities, is the iterate that is judged.
        solver: made by `prepare`.

    Metrics: `difference` $|x - y|$, `mu`, `penalty`, and the counters `operator_evaluations` and `factorizations`; a product with a precomputed
    matrix counts as the evaluation that costs the same.

    Example:
        >>> from theorylab import acvi
        >>> vi = acvi.AffineVariationalInequality(jnp.array([[0.1, 1.0], [-1.0, 0.1]]), jnp.zeros(2), constraints=acvi.Nonnegative())
        >>> method = acvi.ACVI(penalty=0.08, mu=acvi.MuSchedule(1e-5, 0.5, stages=20, inner_steps=1))
        >>> round(float(tl.iterate(vi, method, jnp.ones(2), steps=10).value[1]), 9)
        0.005366332
    """

    mu: Any = number(above=0.0)
    barrier: Barrier = LogBarrier()
    linear: str = choice("auto", among=KINDS)
    output: str = choice("y", among=("x", "y"))
    solver: Any = None

    def __check_init__(self) -> None:
        check_barrier(self)

    def _mu(self, step: Array) -> Any:
        return at(self.mu, step)

    def _inside(self, problem: Any, state: SplittingState, v: Array) -> Array:
        return self.barrier.prox(problem.constraints, v, self._mu(state.step), self.penalty)


class ProjectedACVI(ExactSplitting):
    r"""P-ACVI (Chavdarova, Yang, Pagliardini and Jordan): the y-step is the projection onto the inequalities, and there is no mu.

    It is the limit of ACVI as mu falls to 0. With several solutions it may end at another one than ACVI, and where depends on the start.

    Args:
        penalty: $\beta$.
        linear: as in `ACVI`.
        output: as in `ACVI`.
        solver: made by `prepare`.

    Example:
        >>> from theorylab import acvi
        >>> game = acvi.MatrixGame(jnp.array([[3.0, -1.0], [-1.0, 1.0]]))
        >>> sol = tl.iterate(game, acvi.ProjectedACVI(0.5), steps=500, stop=tl.Below("gap", 1e-9))
        >>> np.round(sol.value, 6).tolist()
        [0.333333, 0.666667, 0.333333, 0.666667]
    """

    linear: str = choice("auto", among=KINDS)
    output: str = choice("y", among=("x", "y"))
    solver: Any = None

    def _inside(self, problem: Any, state: SplittingState, v: Array) -> Array:
        return problem.constraints.project(v)
