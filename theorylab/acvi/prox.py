"""Scalar proximal maps of barriers, written so that the slack of a wall keeps its relative accuracy however small it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
BOX_STEPS = 6
ENTROPY_STEPS = 8


def like(value: Any, v: Array) -> Array:
    """`value` in the precision of `v`; in the default one if `v` holds whole numbers, which would cut it."""
    return jnp.asarray(value, v.dtype if jnp.issubdtype(v.dtype, jnp.inexact) else jnp.result_type(float))


def slack(w: Any, t: Any) -> Array:
    r"""The positive root $s$ of $s^2 - w s - t = 0$: the distance to a wall of the prox of $-t \log$, for a point at signed distance `w`.

    Source: the closed form of the log-barrier step of Yang, Jordan and Chavdarova (2023), in the branch without cancellation (companion
    derivation). $t = 0$ gives the projection $\max(w, 0)$.

    Args:
        w: signed distance to the wall, any shape.
        t: weight of the barrier, `mu / penalty`, at least 0; broadcasts against `w`.

    Example:
        >>> float(slack(-1.0, 1e-12))
        9.99999999999e-13
    """
    w = jnp.asarray(w)
    t = like(t, w)
    root = jnp.sqrt(w * w + 4 * t)
    inside = w >= 0
    return jnp.where(inside, (w + root) / 2, 2 * t / jnp.where(inside, jnp.ones_like(root), root - w))


def wall_slack(w: Array, width: Array, t: Array) -> Array:
    r"""The slack at the nearer of two walls `width` apart: the root $s \in (0, W/2]$ of $s - w - t/s + t/(W - s) = 0$, where $w \le W/2$.

    Newton's method from the one-wall slack; six steps reach round-off over the range of the tests.
    """
    tiny, half = jnp.finfo(w.dtype).tiny, width / 2

    def newton(s: Array, _: None) -> tuple[Array, None]:
        near, far = t / s, t / (width - s)
        move = s - (s - w - near + far) / (1 + near / s + far / (width - s))
        return jnp.clip(jnp.where(move > 0, move, s / 8), tiny, half), None

    start = jnp.clip(jnp.minimum(slack(w, t), half), tiny, half)
    s, _ = lax.scan(newton, start, None, length=BOX_STEPS)
    return jnp.where(s <= 2 * tiny, jnp.zeros_like(s), s)


def box(v: Array, lower: Any, upper: Any, t: Any) -> Array:
    r"""Prox of $-t \log(y - l) - t \log(u - y)$ at `v`, coordinate by coordinate; measured from the nearer wall."""
    lower, upper, t = like(lower, v), like(upper, v), like(t, v)
    low = v - lower <= upper - v
    s = wall_slack(jnp.where(low, v - lower, upper - v), upper - lower, t)
    return jnp.where(low, lower + s, upper - s)


def entropy(v: Any, t: Any) -> Array:
    r"""Prox of $t \sum_i y_i \log y_i$ at `v`: $y = t\, W_0(e^{v/t - 1}/t)$, the y-step of the entropy barrier.

    $\omega = y / t$ solves $\omega + \log\omega = v/t - 1 - \log t$ without overflow: Newton's method in $\log\omega$ where the right side is
    small, in $\omega$ where it is large.

    Args:
        v: any shape.
        t: weight of the entropy, `mu / penalty`, above 0.

    Example:
        >>> float(entropy(0.3 + 0.3 * (1 + jnp.log(0.3)), 0.3))
        0.3
    """
    v = jnp.asarray(v)
    t = like(t, v)
    c = v / t - 1 - jnp.log(t)

    def newton(x: Array, _: None) -> tuple[Array, None]:
        omega = jnp.exp(x)
        return x + (c - omega - x) / (1 + omega), None

    start = jnp.where(c > 1, jnp.log(jnp.maximum(c, 1) - jnp.log(jnp.maximum(c, 1))), c)
    x, _ = lax.scan(newton, jnp.where(c > 1, start, jnp.minimum(c, c - jnp.exp(jnp.minimum(c, 0)) / 2)), None, length=ENTROPY_STEPS)
    return t * jnp.exp(x)


def extended(v: Any, t: Any, switch: Any) -> Array:
    r"""Prox of the extended log barrier: $-t \log y$ down to $y = \varepsilon$ (`switch`), continued linearly with slope $-t/\varepsilon$ below.

    The barrier is finite everywhere and continuously differentiable. Source: the second barrier map of Chavdarova, Yang, Pagliardini and
    Jordan (2024), with the switch distance $\varepsilon = e^{-c/\mu}$ in place of their constant $c$, because $e^{c/\mu}$ overflows.

    Args:
        v: any shape.
        t: weight, `mu / penalty`.
        switch: distance at which the linear part begins; 0 is the plain log barrier.

    Example:
        >>> float(extended(-1.0, 0.1, 0.2))
        -0.5
    """
    v = jnp.asarray(v)
    t, switch = like(t, v), like(switch, v)
    y = slack(v, t)
    linear = switch > 0
    return jnp.where(~linear | (y >= switch), y, v + t / jnp.where(linear, switch, jnp.ones_like(switch)))
