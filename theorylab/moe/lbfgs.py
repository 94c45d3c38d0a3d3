"""Limited-memory BFGS for a few dozen parameters, compiled and mapped over starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
MEMORY, HALVINGS = 10, 12
DECREASE = 1e-4  # of the linear prediction, as in Armijo's rule
UNITS = 4.0


class _State(NamedTuple):
    x: Array
    value: Array
    slope: Array
    moves: Array
    changes: Array
    count: Array
    going: Array


def lbfgs(function: Callable[[Array], Array], x0: Array, iterations: Any) -> tuple[Array, Array]:
    """Minimise `function` from the vector x0 by at most `iterations` steps; the point with the smallest value, and that value.

    It stops when a step changes the value by round-off only. Pairs of negative curvature are forgotten, so no second Wolfe condition is needed.
    """
    both = jax.value_and_grad(function)
    value, slope = both(x0)
    empty = jnp.zeros((MEMORY, x0.size), x0.dtype)
    state = _State(x0, value, slope, empty, empty, jnp.zeros((), jnp.int32), jnp.isfinite(value))
    limit = jnp.asarray(iterations, jnp.int32)

    def step(loop: tuple[Array, _State]) -> tuple[Array, _State]:
        i, s = loop
        move = -_apply(s)
        # Without pairs the gradient has no scale: the first move is at most of length 1.
        first = 1 / jnp.maximum(jnp.linalg.norm(s.slope), 1)
        move = jnp.where(s.count == 0, -first * s.slope, move)
        move = jnp.where(move @ s.slope < 0, move, -first * s.slope)
        predicted = move @ s.slope

        def shorter(trial: tuple) -> tuple:
            j, t, *_ = trial
            t = jnp.where(j > 0, t / 2, t)
            value, slope = both(s.x + t * move)
            return j + 1, t, value, slope, value <= s.value + DECREASE * t * predicted

        start = (jnp.zeros((), jnp.int32), jnp.ones((), s.x.dtype), s.value, s.slope, jnp.asarray(False))
        _, t, value, slope, good = jax.lax.while_loop(lambda trial: ~trial[4] & (trial[0] < HALVINGS) & s.going, shorter, start)
        dx, dg = t * move, slope - s.slope
        curved = good & (dx @ dg > 1e-10 * jnp.linalg.norm(dx) * jnp.linalg.norm(dg))
        moves, changes = (jnp.where(curved, jnp.roll(old, -1, axis=0).at[-1].set(new), old) for old, new in ((s.moves, dx), (s.changes, dg)))
        enough = s.value - value > UNITS * float(jnp.finfo(s.x.dtype).eps) * (1 + jnp.abs(s.value))
        return i + 1, _State(jnp.where(good, s.x + dx, s.x), jnp.where(good, value, s.value), jnp.where(good, slope, s.slope), moves, changes,
                             s.count + curved.astype(jnp.int32), s.going & good & enough)

    _, state = jax.lax.while_loop(lambda loop: (loop[0] < limit) & loop[1].going, step, (jnp.zeros((), jnp.int32), state))
    return state.x, state.value


def _apply(s: _State) -> Array:
    """The inverse Hessian of the pairs times the gradient: the two-loop recursion; empty pairs do nothing."""
    inner = jnp.sum(s.moves * s.changes, axis=1)
    rho = jnp.where(inner > 0, 1 / jnp.where(inner > 0, inner, jnp.ones_like(inner)), jnp.zeros_like(inner))

    def back(q: Array, pair: tuple) -> tuple[Array, Array]:
        move, change, r = pair
        alpha = r * (move @ q)
        return q - alpha * change, alpha

    q, alpha = jax.lax.scan(back, s.slope, (s.moves, s.changes, rho), reverse=True)
    last = s.changes[-1] @ s.changes[-1]
    q = jnp.where(last > 0, inner[-1] / jnp.where(last > 0, last, jnp.ones_like(last)), jnp.ones_like(last)) * q

    def forth(q: Array, pair: tuple) -> tuple[Array, None]:
        move, change, r, a = pair
        return q + (a - r * (change @ q)) * move, None

    return jax.lax.scan(forth, q, (s.moves, s.changes, rho, alpha))[0]
