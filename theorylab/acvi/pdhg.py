"""The primal-dual hybrid gradient method for matrix games, plain and restarted: the fair rival of restarted ACVI."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from theorylab.acvi.baselines import starting_point
from theorylab.acvi.problem import MatrixGame
from theorylab.acvi.projections import simplex
from theorylab.acvi.prox import like
from theorylab.acvi.resolvent import step_norm
from theorylab.core import tree
from theorylab.core.module import choice, number
from theorylab.core.problem import Method
from theorylab.errors import ArgumentError

Array = jax.Array

SUFFICIENT, NECESSARY, ARTIFICIAL = 0.2, 0.8, 0.36
"""Restart when the merit fell to the first fraction, or to the second and began to rise, or when the epoch is the third of all steps."""


class Pair(NamedTuple):
    """Strategies of both players with their images: x, z, A z and A'x. All are affine in the point, so combinations need no product."""

    x: Array
    z: Array
    az: Array
    atx: Array


class PairState(NamedTuple):
    """The state of `PrimalDualHybridGradient`.

    Attributes:
        now: where the next step begins.
        reported: the feasible point that is judged.
        anchor: the point of the last restart.
        total: sum of the iterates of the epoch.
        weight: the primal weight.
        merit: gap of the last candidate, or residual of the last step; first: at the start of the epoch.
        since: steps since the restart; step: steps in all; restarts: their number.
        begin: the gap of the start, repaired: every later point is feasible.
    """

    now: Pair
    reported: Pair
    anchor: Pair
    total: Pair
    weight: Array
    merit: Array
    first: Array
    since: Array
    step: Array
    restarts: Array
    begin: Array


class PrimalDualHybridGradient(Method):
    r"""The primal-dual method of Chambolle and Pock for a matrix game; one product with A and one with its transpose a step.

    $x^+ = \Pi(x - \tau A z)$ and $z^+ = \Pi(z + \sigma A^\top(2x^+ - x))$, where
    $\tau = \theta/(w L)$ and $\sigma = \theta w/L$ with the norm L of the double-centered A and a primal weight w that is tuned at restarts.

    Args:
        restart: `"none"`; `"average"`: from the better of iterate and running average, when its gap has fallen enough; `"halpern"`: the reflected
            Halpern iteration of the map, restarted on its residual.
        weight: the first w.
        step_size: $\theta$, below 1.
        norm: L, made by `prepare`.

    Raises:
        ArgumentError: the problem is no `MatrixGame`.

    Example:
        >>> from theorylab import acvi
        >>> game = acvi.MatrixGame(jax.random.normal(jax.random.key(0), (20, 30)))
        >>> tl.iterate(game, acvi.PrimalDualHybridGradient("halpern"), steps=5000, every=10, stop=tl.Below("gap", 1e-9)).status.name
        'CONVERGED'
    """

    restart: str = choice("none", among=("none", "average", "halpern"))
    weight: Any = number(1.0, above=0.0)
    step_size: Any = number(0.99, above=0.0, below=1.0)
    norm: Any = None

    def prepare(self, problem: Any) -> Self:
        if not isinstance(problem, MatrixGame):
            raise ArgumentError(f"PrimalDualHybridGradient needs a MatrixGame, got {type(problem).__name__}; Extragradient takes every problem")
        return self.replace(norm=step_norm(problem))

    def init(self, problem: Any, x0: Array, *, key: Array) -> PairState:
        x0 = starting_point(problem, x0)
        now = self._images(problem, x0)
        x = now.x
        gap, zero = _gap(now), jnp.zeros((), jnp.int32)
        merit = jnp.full_like(gap, jnp.inf) if self.restart == "halpern" else gap
        return PairState(now, now, now, jax.tree.map(jnp.zeros_like, now), like(self.weight, x), merit, merit, zero, zero, zero,
                         _gap(self._images(problem, problem.repair(x0))))

    def _images(self, problem: Any, at: Array) -> Pair:
        x, z = problem.split(at)
        return Pair(x, z, problem.A @ z, problem.A.T @ x)

    def step(self, problem: Any, state: PairState, *, key: Array) -> PairState:
        tau, sigma = self.step_size / (state.weight * self.norm), self.step_size * state.weight / self.norm
        moved = _advance(problem, state.now, tau, sigma)
        if self.restart == "none":
            return state._replace(now=moved, reported=moved, step=state.step + 1)
        return self._halpern(state, moved, tau, sigma) if self.restart == "halpern" else self._averaged(state, moved)

    def _averaged(self, state: PairState, moved: Pair) -> PairState:
        length = state.since + 1
        total = jax.tree.map(jnp.add, state.total, moved)
        average = jax.tree.map(lambda a: a / length.astype(a.dtype), total)
        gap, mean_gap = _gap(moved), _gap(average)
        candidate = tree.select(mean_gap < gap, average, moved)
        merit = jnp.minimum(gap, mean_gap)
        long = length.astype(merit.dtype) >= jnp.maximum(2, ARTIFICIAL * (state.step + 1).astype(merit.dtype))
        again = (merit <= SUFFICIENT * state.first) | ((merit <= NECESSARY * state.first) & (merit > state.merit)) | long
        now, anchor = tree.select(again, (candidate, candidate), (moved, state.anchor))
        total = tree.select(again, jax.tree.map(jnp.zeros_like, total), total)
        return PairState(now, candidate, anchor, total, _tuned(state, candidate, again), merit, jnp.where(again, merit, state.first),
                         jnp.where(again, 0, length), state.step + 1, state.restarts + again.astype(jnp.int32), state.begin)

    def _halpern(self, state: PairState, moved: Pair, tau: Array, sigma: Array) -> PairState:
        j, change = state.since, jax.tree.map(jnp.subtract, moved, state.now)
        square = change.x @ change.x / tau + change.z @ change.z / sigma - 2 * change.z @ change.atx
        r = jnp.sqrt(jnp.maximum(square, 0))
        first = jnp.where(j == 0, r, state.first)
        share = (j + 1).astype(r.dtype) / (j + 2).astype(r.dtype)
        ahead = jax.tree.map(lambda a, m, v: (1 - share) * a + share * (2 * m - v), state.anchor, moved, state.now)
        long = j.astype(r.dtype) >= jnp.maximum(50, ARTIFICIAL * state.step.astype(r.dtype))
        again = (j > 0) & ((r <= SUFFICIENT * first) | ((r <= NECESSARY * first) & (r > state.merit)) | long)
        now, anchor = tree.select(again, (moved, moved), (ahead, state.anchor))
        return PairState(now, moved, anchor, state.total, _tuned(state, moved, again), r, first, jnp.where(again, 0, j + 1), state.step + 1,
                         state.restarts + again.astype(jnp.int32), state.begin)

    def value(self, problem: Any, state: PairState) -> Array:
        return jnp.concatenate([state.reported.x, state.reported.z])

    def measure(self, problem: Any, state: PairState) -> dict[str, Array]:
        at = state.reported
        gap = jnp.where(state.step == 0, state.begin, _gap(at))
        return problem.judged(self.value(problem, state), jnp.concatenate([at.az, -at.atx]), gap)

    def metrics(self, problem: Any, state: PairState) -> dict[str, Array]:
        return {"weight": state.weight, "restarts": state.restarts}

    def cost(self, problem: Any) -> dict[str, float]:
        return {"operator_evaluations": 1.0}


def _gap(at: Pair) -> Array:
    """The saddle gap of a feasible pair."""
    return jnp.max(at.atx) - jnp.min(at.az)


def _advance(problem: MatrixGame, now: Pair, tau: Array, sigma: Array) -> Pair:
    """One step of the map, with one product by A and one by A'."""
    one = jnp.ones((), now.x.dtype)
    x = simplex(now.x - tau * now.az, one)
    atx = problem.A.T @ x
    z = simplex(now.z + sigma * (2 * atx - now.atx), one)
    return Pair(x, z, problem.A @ z, atx)


def _tuned(state: PairState, new: Pair, again: Array) -> Array:
    """The primal weight after a restart: the geometric mean of itself and of what z and x have moved since the last one."""
    dx, dz = jnp.linalg.norm(new.x - state.anchor.x), jnp.linalg.norm(new.z - state.anchor.z)
    both = again & (dx >= 1e-14) & (dz >= 1e-14)
    return jnp.where(both, jnp.sqrt(state.weight * jnp.where(both, dz, 1) / jnp.where(both, dx, 1)), state.weight)
