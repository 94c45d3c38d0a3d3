"""The density and what is made of it, as pure functions of a mixture and of rows.

Arrays over experts and rows have shape `(k, n)` here, so that compiled loops run along the rows; what users see has shape `(n, k)`.
Nothing is checked: the methods of `Mixture` do that.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr

from theorylab.core.psd import product

Array = jax.Array
COMPARED_RANKS = 24                                 # up to so many experts, ranks by comparing all pairs beat a sort
REACH = 12.0                                        # quantiles lie within so many standard deviations of an active expert
HALVINGS = 70                                       # to the last bit of float64
LOG_TWO_PI = float(np.log(2 * np.pi))


def linear(coef: Array, x: Array) -> Array:
    """The products coef x, shape `(k, n)`, for rows x of shape `(n, d)`."""
    return coef * x[:, 0] if x.shape[1] == 1 else product(coef, x.T)


def gate_scores(m: Any, x: Array) -> tuple[Array, Array]:
    """Logits and scores."""
    slopes = linear(m.gate_coef, x)
    logits = slopes + m.gate_intercept[:, None]
    return logits, slopes if m.selection == "slope" else logits


def top(scores: Array, active: int) -> Array:
    """Which entries of each column are among its `active` largest; equal scores go to the lower index."""
    k = scores.shape[0]
    if active == k:
        return jnp.ones(scores.shape, bool)
    if k > COMPARED_RANKS:
        chosen = jax.lax.top_k(scores.T, active)[1]
        rows = jnp.arange(scores.shape[1])[:, None]
        return jnp.zeros(scores.shape[::-1], bool).at[rows, chosen].set(True).T
    # Expert j beats i if its score is larger, or equal at a lower index; an expert is kept if fewer than K beat it.
    ranks = []
    for i in range(k):
        beaten = [(scores[j] >= scores[i]) if j < i else (scores[j] > scores[i]) for j in range(k) if j != i]
        ranks.append(sum(b.astype(jnp.int32) for b in beaten[1:]) + beaten[0].astype(jnp.int32) < active)
    return jnp.stack(ranks)


def log_sum(values: Array, mask: Array) -> Array:
    """Logarithm of the sum of exp over the true entries of each column, with gradient 0 for the others."""
    peak = jax.lax.stop_gradient(jnp.max(jnp.where(mask, values, -jnp.inf), axis=0))
    return peak + jnp.log(jnp.sum(jnp.where(mask, jnp.exp(jnp.where(mask, values, peak) - peak), 0), axis=0))


def expert_means(m: Any, x: Array) -> Array:
    """Values a x + b, shape `(k, n)`."""
    return linear(m.expert_coef, x) + m.expert_intercept[:, None]


def log_normal(m: Any, residual: Array) -> Array:
    """Logarithms of the densities of the experts at residuals of shape `(k, n)`."""
    variance = m.variance[:, None]
    return -(residual * residual / variance + jnp.log(variance) + LOG_TWO_PI) / 2


def respond(m: Any, x: Array, u: Array, noise: Array) -> tuple[Array, Array]:
    """Responses and expert indices made from uniforms `u` and standard normals `noise`, all of shape `(n,)`.

    The expert is the first kept one, in the order of the index, whose cumulative gate probability exceeds u.
    """
    gate, mask = jnp.exp(log_gate(m, x)), routing(m, x)
    passed = mask & (jnp.cumsum(gate, axis=0) > u)
    last = m.experts - 1 - jnp.argmax(mask[::-1], axis=0)
    expert = jnp.where(jnp.any(passed, axis=0), jnp.argmax(passed, axis=0), last)
    pick = lambda a: jnp.take_along_axis(a, expert[None], axis=0)[0]  # noqa: E731
    return pick(expert_means(m, x)) + jnp.sqrt(m.variance)[expert] * noise, expert


@jax.jit
def logits(m: Any, x: Array) -> Array:
    """The logits u."""
    return gate_scores(m, x)[0]


@jax.jit
def scores(m: Any, x: Array) -> Array:
    """What ranks the experts."""
    return gate_scores(m, x)[1]


@jax.jit
def routing(m: Any, x: Array) -> Array:
    """Which experts are kept."""
    return top(gate_scores(m, x)[1], m.active)


@jax.jit
def log_gate(m: Any, x: Array) -> Array:
    """Logarithms of the gate, -inf off the kept experts."""
    logits, scores = gate_scores(m, x)
    mask = top(scores, m.active)
    return jnp.where(mask, logits - log_sum(logits, mask), -jnp.inf)


@jax.jit
def log_density(m: Any, x: Array, y: Array, mask: Array | None = None) -> Array:
    """Values log g(y | x), shape `(n,)`, with the given routing or that of the mixture."""
    logits, scores = gate_scores(m, x)
    mask = top(scores, m.active) if mask is None else mask
    return log_sum(logits + log_normal(m, y - expert_means(m, x)), mask) - log_sum(logits, mask)


@jax.jit
def responsibilities(m: Any, x: Array, y: Array) -> Array:
    """Posterior probabilities of the experts."""
    logits, scores = gate_scores(m, x)
    mask = top(scores, m.active)
    joint = logits + log_normal(m, y - expert_means(m, x))
    return jnp.where(mask, jnp.exp(jnp.where(mask, joint - log_sum(joint, mask), 0)), 0)


@jax.jit
def moments(m: Any, x: Array) -> tuple[Array, Array]:
    """Mean and variance of y given x, shape `(n,)` each."""
    gate, means = jnp.exp(log_gate(m, x)), expert_means(m, x)
    mean = jnp.sum(gate * means, axis=0)
    return mean, jnp.sum(gate * (m.variance[:, None] + (means - mean) ** 2), axis=0)


@jax.jit
def cdf(m: Any, x: Array, y: Array) -> Array:
    """P(Y <= y | x), shape `(n,)`."""
    return jnp.sum(jnp.exp(log_gate(m, x)) * ndtr((y - expert_means(m, x)) / jnp.sqrt(m.variance)[:, None]), axis=0)


@jax.jit
def quantile(m: Any, x: Array, q: Array) -> Array:
    """The root y of cdf(y) = q per row, with the derivative of that equation."""
    y = _root(*jax.lax.stop_gradient((m, x, q)))
    slope = jax.lax.stop_gradient(jnp.maximum(jnp.exp(log_density(m, x, y)), jnp.finfo(x.dtype).tiny))
    excess = cdf(m, x, y) - q
    return y - (excess - jax.lax.stop_gradient(excess)) / slope


def _root(m: Any, x: Array, q: Array) -> Array:
    mask, means, reach = routing(m, x), expert_means(m, x), REACH * jnp.sqrt(m.variance)[:, None]
    low = jnp.min(jnp.where(mask, means - reach, jnp.inf), axis=0)
    high = jnp.max(jnp.where(mask, means + reach, -jnp.inf), axis=0)
    units = 4 * jnp.finfo(x.dtype).eps

    def narrow(state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, y, step = state
        excess = cdf(m, x, y) - q
        low, high = jnp.where(excess < 0, y, low), jnp.where(excess < 0, high, y)
        newton = y - excess / jnp.exp(log_density(m, x, y))
        # Every third step halves the bracket: Newton steps from one side alone would never close it.
        inside = (newton > low) & (newton < high) & (step % 3 != 2)
        return low, high, jnp.where(inside, newton, (low + high) / 2), step + 1

    def wide(state: tuple[Array, ...]) -> Array:
        low, high, _, step = state
        return (step < 3 * HALVINGS) & jnp.any(high - low > units * jnp.maximum(jnp.abs(low), jnp.abs(high)))

    return jax.lax.while_loop(wide, narrow, (low, high, (low + high) / 2, jnp.zeros((), jnp.int32)))[2]
