"""A soft selection of experts, cooled down to the hard one: the start of the search for the routing."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from theorylab.core import tree
from theorylab.core.psd import product
from theorylab.moe import density
from theorylab.moe.lbfgs import lbfgs
from theorylab.moe.model import Mixture
from theorylab.moe.moments import over_chunks, to_inputs
from theorylab.moe.problem import Likelihood

Array = jax.Array
GATE_PENALTY, SMALLEST_VARIANCE = 1e-6, 1e-4  # keep the gate bounded, and variances above this multiple of that of y


def standard(problem: Likelihood, matrix: Array) -> Array:
    """The coefficients on z of those on (1, x): the inverse of `to_inputs`."""
    return jnp.concatenate([matrix[:, :1] + product(matrix[:, 1:], problem.center)[:, None], matrix[:, 1:] * problem.scale], axis=1)


def with_gate(problem: Likelihood, m: Mixture, gate: Array) -> Mixture:
    """`m` with the gate of coefficients `gate` on z."""
    raw = to_inputs(gate, problem.center, problem.scale)
    return m.replace(gate_intercept=raw[:, 0], gate_coef=raw[:, 1:])


def annealed(problem: Likelihood, m: Mixture, temperatures: Array, descents: Array) -> Mixture:
    """Maximise the soft models for descending temperatures, each from the last, over gate, experts and log variances."""
    k, p = m.experts, m.dim + 1
    weight = jnp.sum(problem.weight)
    unit = jnp.sqrt(problem.spread).astype(m.dtype)
    floor = jnp.log(SMALLEST_VARIANCE * problem.spread).astype(m.dtype)
    raw = partial(to_inputs, center=problem.center, scale=problem.scale)

    def unpack(flat: Array) -> Mixture:
        gate, experts = flat[: k * p].reshape(k, p), flat[k * p:2 * k * p].reshape(k, p) * unit
        return Mixture.from_matrices(raw(gate), raw(experts), jnp.exp(jnp.maximum(flat[2 * k * p:], floor)), m.active, m.selection)

    def loss(flat: Array, temperature: Array) -> Array:
        soft = unpack(flat)
        total = over_chunks(lambda x, y, w, _: jnp.sum(w * _soft_log_density(soft, x, y, temperature)), problem)
        spread = soft.gate_matrix - jnp.mean(soft.gate_matrix, axis=0)
        return -total / weight + GATE_PENALTY * jnp.sum(spread**2)

    flat = jnp.concatenate([standard(problem, m.gate_matrix).ravel(), (standard(problem, m.expert_matrix) / unit).ravel(),
                            jnp.log(m.variance)])
    cooler = lambda at, t: (lbfgs(partial(loss, temperature=t), at, descents)[0], None)  # noqa: E731
    return unpack(jax.lax.scan(cooler, tree.strong(flat), temperatures.astype(m.dtype))[0])


def _soft_log_density(m: Mixture, x: Array, y: Array, temperature: Array) -> Array:
    """Log density when an expert is kept by degrees: by the sigmoid of its score above the threshold, over the temperature."""
    logits, scores = density.gate_scores(m, x)
    kept = density.top(jax.lax.stop_gradient(scores), m.active)
    lowest = jnp.min(jnp.where(kept, scores, jnp.inf), axis=0)
    highest = jnp.max(jnp.where(kept, -jnp.inf, scores), axis=0)
    soft = logits + jax.nn.log_sigmoid((scores - (lowest + highest) / 2) / temperature)
    joint = soft + density.log_normal(m, y - density.expert_means(m, x))
    return jax.nn.logsumexp(joint, axis=0) - jax.nn.logsumexp(soft, axis=0)
