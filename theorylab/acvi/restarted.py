"""ACVI anchored and restarted: the reflected Halpern iteration of its Douglas-Rachford map, with a penalty that tunes itself."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.acvi.barriers import Barrier, LogBarrier, check_barrier
from theorylab.acvi.baselines import starting_point
from theorylab.acvi.prox import like
from theorylab.acvi.resolvent import KINDS, choose, step_norm
from theorylab.core import tree
from theorylab.core.module import choice, number
from theorylab.core.problem import Method
from theorylab.core.schedule import at

Array = jax.Array

SUFFICIENT, NECESSARY, ARTIFICIAL, SHORTEST = 0.2, 0.8, 0.36, 50
"""Restart when the residual fell to the first fraction, or to the second and began to rise, or when the epoch is the third of all steps."""
INITIAL_PENALTY = 10.0
RETUNED = 1.5
"""Where another penalty costs a factorization, only a change by more than this factor is made."""
RELEASE, LOWEST = 0.1, 1e-8
"""While no inequality presses (the multiplier stays 0) each restart takes this fraction of the penalty, down to this fraction of the first one."""


class HalpernState(NamedTuple):
    r"""The state of `HalpernACVI`.

    Attributes:
        x, y: of the last step.
        v: where the next step begins.
        anchor: v at the last restart.
        y_anchor, multiplier_anchor: y and $\lambda$ there.
        penalty: $\beta$ now.
        residual: $|T v - v| = |x - y|$ of the last step; first_residual: of the first step of the epoch.
        since: steps since the restart; step: steps in all; restarts: their number.
        evaluations, factorizations: counters.
        solver: the x-step for this penalty, where another penalty costs a factorization.
    """

    x: Array
    y: Array
    v: Array
    anchor: Array
    y_anchor: Array
    multiplier_anchor: Array
    penalty: Array
    residual: Array
    first_residual: Array
    since: Array
    step: Array
    restarts: Array
    evaluations: Array
    factorizations: Array
    solver: Any


class HalpernACVI(Method):
    r"""Restarted reflected-Halpern ACVI with a self-tuned penalty (companion derivation; not in the papers).

    With the ACVI map T: $v_{k+1} = \frac{1}{j+2} v_0 + \frac{j+1}{j+2}(2 T v_k - v_k)$ at the j-th step of an epoch. It restarts from $T v$ when the
    residual $|Tv - v|$ has fallen enough, and there moves the penalty in the logarithm halfway to $|\Delta\lambda| / |\Delta y|$ between restarts.
    Without restarts and at a fixed penalty $|T v_k - v_k| \le |v_0 - v^*| / (k + 1)$.

    Args:
        penalty: the first $\beta$; ten times the norm of F along C x = d unless given (1 where F is not affine).
        adapt: whether the penalty is tuned at restarts. On affine problems with a dense or factored matrix each change costs a factorization (and
            within `runs` or `vmap` one per step), so changes by less than a factor 1.5 are left out; other x-steps take every penalty.
        mu: weight of the barrier, a number or a schedule whose changes restart the epoch; None projects instead, the limit of mu to 0.
        barrier: as in `ACVI`.
        linear: as in `ACVI`.
        restart: False never restarts.
        accuracy: an x-step that iterates (`"cg"`, `"krylov"`, `"newton"`) ends where its residual $|G|$, a bound of the error of x, is below this
            fraction of the last $|x - y|$; None goes on to round-off.
        solver: made by `prepare`.

    Metrics: `difference` $|x - y|$, which is the residual $|Tv - v|$, `mu`, `penalty`, `restarts` and the counters. The iterate is y, inside the
    inequalities.

    Example:
        >>> from theorylab import acvi
        >>> game = acvi.MatrixGame(jax.random.normal(jax.random.key(0), (20, 30)))
        >>> sol = tl.iterate(game, acvi.HalpernACVI(), steps=5000, every=10, stop=tl.Below("gap", 1e-9))
        >>> sol.status.name
        'CONVERGED'
    """

    penalty: Any = number(None, above=0.0)
    adapt: bool = choice(True)
    mu: Any = number(None, above=0.0)
    barrier: Barrier = LogBarrier()
    linear: str = choice("auto", among=KINDS)
    restart: bool = choice(True)
    accuracy: Any = number(0.01, above=0.0, below=1.0)
    solver: Any = None

    def __check_init__(self) -> None:
        check_barrier(self)

    def prepare(self, problem: Any) -> Self:
        kind = choose(problem, self.linear)
        penalty = self.penalty
        if penalty is None:
            penalty = INITIAL_PENALTY * step_norm(problem) if problem.has_norm else jnp.asarray(1.0)
        return self.replace(penalty=penalty, solver=kind.make(problem, penalty))

    def init(self, problem: Any, x0: Array, *, key: Array) -> HalpernState:
        x0 = starting_point(problem, x0)
        zero, inf, none = jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, x0.dtype), jnp.zeros_like(x0)
        return HalpernState(x0, x0, x0, x0, x0, none, like(self.penalty, x0), inf, inf, zero, zero, zero, zero, zero + self.solver.factorizations,
                            None if self.solver.free or not self.adapt else self.solver)

    def step(self, problem: Any, state: HalpernState, *, key: Array) -> HalpernState:
        v, beta, j = state.v, state.penalty, state.since
        y = self._inside(problem, state, v, state.step)
        solver = self.solver if state.solver is None else state.solver
        loose = 0.0 if self.accuracy is None else jnp.where(jnp.isfinite(state.residual), self.accuracy * state.residual, 0)
        solved = solver(problem, 2 * y - v, state.x, beta, loose)
        moved = v + solved.x - y
        r = jnp.linalg.norm(solved.x - y)
        first = jnp.where(j == 0, r, state.first_residual)
        share = (j + 1).astype(v.dtype) / (j + 2).astype(v.dtype)
        ahead = (1 - share) * state.anchor + share * (2 * moved - v)

        again = self._restarts(state, r, first)
        y_new = self._inside(problem, state, moved, state.step)
        lam_new = beta * (moved - y_new)
        tuned = self._tuned(state, y_new, lam_new) if self.adapt else beta
        worth = again if state.solver is None else again & (jnp.abs(jnp.log(tuned / beta)) > math.log(RETUNED))
        tuned = jnp.where(worth, tuned, beta)
        begin = y_new + lam_new / tuned
        kept = (ahead, state.anchor, state.y_anchor, state.multiplier_anchor)
        v, anchor, y_anchor, lam_anchor = tree.select(again, (begin, begin, y_new, lam_new), kept)
        refit, factorizations = state.solver, state.factorizations + solved.factorizations
        if refit is not None:
            changed = tuned != beta
            # a loop of at most one round: unlike the branches of a condition it leaves an unchanged matrix where it is
            refit, _ = lax.while_loop(lambda loop: loop[1], lambda _: (type(solver).make(problem, tuned), jnp.asarray(False)), (refit, changed))
            factorizations = factorizations + changed.astype(jnp.int32) * solver.factorizations
        return HalpernState(solved.x, y, v, anchor, y_anchor, lam_anchor, tuned, r, first, jnp.where(again, 0, j + 1), state.step + 1,
                            state.restarts + again.astype(jnp.int32), state.evaluations + solved.evaluations, factorizations, refit)

    def value(self, problem: Any, state: HalpernState) -> Array:
        return state.y

    def metrics(self, problem: Any, state: HalpernState) -> dict[str, Array]:
        mu = 0.0 if self.mu is None else at(self.mu, jnp.maximum(state.step - 1, 0))
        return {"difference": jnp.linalg.norm(state.x - state.y), "mu": like(mu, state.x), "penalty": state.penalty, "restarts": state.restarts,
                "operator_evaluations": state.evaluations, "factorizations": state.factorizations}

    def _inside(self, problem: Any, state: HalpernState, v: Array, step: Array) -> Array:
        if self.mu is None:
            return problem.constraints.project(v)
        return self.barrier.prox(problem.constraints, v, at(self.mu, step), state.penalty)

    def _restarts(self, state: HalpernState, r: Array, first: Array) -> Array:
        """Whether this step ends the epoch."""
        if not self.restart:
            return jnp.asarray(False)
        j = state.since
        long = j.astype(r.dtype) >= jnp.maximum(SHORTEST, ARTIFICIAL * state.step.astype(r.dtype))
        again = (j > 0) & ((r <= SUFFICIENT * first) | ((r <= NECESSARY * first) & (r > state.residual)) | long)
        if self.mu is not None:
            again = again | (at(self.mu, state.step) != at(self.mu, state.step + 1))
        return again

    def _tuned(self, state: HalpernState, y: Array, multiplier: Array) -> Array:
        """The geometric mean of the penalty and of the ratio of what the multiplier and y have moved since the last restart."""
        moved, pressed = jnp.linalg.norm(y - state.y_anchor), jnp.linalg.norm(multiplier - state.multiplier_anchor)
        moves, presses = moved >= 1e-14, pressed >= 1e-14
        ratio = jnp.where(presses, pressed, state.penalty) / jnp.where(moves, moved, jnp.ones_like(moved))
        released = jnp.maximum(RELEASE * state.penalty, jnp.minimum(LOWEST * like(self.penalty, y), state.penalty))
        return jnp.where(moves & presses, jnp.sqrt(ratio * state.penalty), jnp.where(moves, released, state.penalty))
