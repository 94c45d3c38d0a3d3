r"""One pass over the data: the additive sums from which every step of estimation is made.

Sums are taken in standardized coordinates z = (1, (x - center) / scale) and of residuals about the current experts, so that they lose no
digits when inputs or responses lie far from 0; `to_inputs` and `gradient_to_inputs` translate. Batching, chunks, shards and streams all
add the same sums (companion derivation: all of them are one matrix product of responsibilities with products of inputs).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import tree
from theorylab.core.psd import product
from theorylab.moe import density

Array = jax.Array
FUSED = 4                                           # up to so many standardized inputs, first-order sums join the product of second order


class Statistics(NamedTuple):
    r"""Sums over the rows, with responsibilities $r_{ij}$ (weights included), gate $\pi_{ij}$ and residuals $e_{ij}$ of the experts.

    Attributes:
        log_likelihood: $\sum_i w_i \log g(y_i \mid x_i)$, in the widest float that is enabled.
        count: $\sum_i r_{ij}$, shape `(k,)`; its sum is the total weight.
        gram: $\sum_i r_{ij} z_i z_i^\top$, shape `(k, p, p)`.
        cross: $\sum_i r_{ij} e_{ij} z_i$, shape `(k, p)`.
        square: $\sum_i r_{ij} e_{ij}^2$, shape `(k,)`.
        gate_gradient: $\sum_i (r_{ij} - w_i \pi_{ij}) z_i$, shape `(k, p)`.
        gate_impurity: $\sum_i w_i \pi_{ij}(1 - \pi_{ij})$, shape `(k,)`.
        gate_mass: $\sum_i w_i \pi_{ij}$, shape `(k,)`.
        gate_curvature: $\sum_i w_i \pi_{ij}(1_{j=l} - \pi_{il}) z_i z_i^\top$, shape `(k, k, p, p)`, or None where it is not asked for.
    """

    log_likelihood: Array
    count: Array
    gram: Array
    cross: Array
    square: Array
    gate_gradient: Array
    gate_impurity: Array
    gate_mass: Array
    gate_curvature: Array | None

    @property
    def weight(self) -> Array:
        """Total weight of the rows."""
        return jnp.sum(self.count)


def standardized(x: Array, center: Array, scale: Array) -> Array:
    """The design z, shape `(p, n)`."""
    z = (x - center) / scale
    return jnp.concatenate([jnp.ones((1, x.shape[0]), x.dtype), z.T])


def to_inputs(change: Array, center: Array, scale: Array) -> Array:
    """Coefficients on (1, x) of a function with coefficients `change` on z; shape `(k, p)`."""
    slopes = change[:, 1:] / scale
    return jnp.concatenate([change[:, :1] - product(slopes, center)[:, None], slopes], axis=1)


def gradient_to_inputs(gradient: Array, center: Array, scale: Array) -> Array:
    """The gradient for coefficients on (1, x), of one for coefficients on z; shape `(k, p)`."""
    return jnp.concatenate([gradient[:, :1], gradient[:, 1:] * scale + gradient[:, :1] * center], axis=1)


def _second_order(weights: Array, z: Array) -> Array:
    """Sums of weight z z', shape `(m, p, p)`, as one product with the upper triangle of z z'."""
    p = z.shape[0]
    rows, columns = np.triu_indices(p)
    upper = product(weights, (z[rows] * z[columns]).T)
    place = np.zeros((p, p), int)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    return upper[:, place]


def _curvature(pairs: Array, k: int) -> Array:
    """The blocks of the gate curvature from the sums of pi_j pi_l z z' over pairs j < l: rows of blocks add to 0."""
    place = np.zeros((k, k), int)
    place[np.triu_indices(k, 1)] = np.arange(1, len(pairs) + 1)
    place += place.T
    blocks = -jnp.concatenate([jnp.zeros((1, *pairs.shape[1:]), pairs.dtype), pairs])[place]
    return blocks.at[np.arange(k), np.arange(k)].set(-jnp.sum(blocks, axis=1))


def of_rows(m: Any, x: Array, y: Array, weight: Array, mask: Array | None, center: Array, scale: Array, curvature: bool,
            share: Array | None = None) -> Statistics:
    """The sums over a few rows; with the responsibilities `share`, shape `(k, n)`, in place of those of the mixture if they are given."""
    k = m.experts
    logits, scores = density.gate_scores(m, x)
    mask = density.top(scores, m.active) if mask is None else mask
    residual = y - density.expert_means(m, x)
    gate, log_normalizer = _softmax(logits, mask)
    posterior, log_total = _softmax(logits + density.log_normal(m, residual), mask)
    total = jnp.sum(weight * (log_total - log_normalizer), dtype=jnp.result_type(float))
    z = standardized(x, center, scale)
    r, pi = weight * (posterior if share is None else share), weight * gate
    moved = r * residual
    first, upper = [r, moved, moved * residual, r - pi, pi], np.triu_indices(k, 1)
    pairs = [pi[upper[0]] * gate[upper[1]]] if curvature else []
    if z.shape[0] <= FUSED:
        sums = _second_order(jnp.concatenate([*first, *pairs]), z)
        gram, moved_z, square, slope, mass = (sums[i * k:(i + 1) * k] for i in range(5))
        pairs, cross, slope, square, mass = sums[5 * k:], moved_z[:, 0], slope[:, 0], square[:, 0, 0], mass[:, 0, 0]
    else:
        sums = _second_order(jnp.concatenate([r, *pairs]), z)
        gram, pairs = sums[:k], sums[k:]
        cross, slope = jnp.split(product(jnp.concatenate([moved, first[3]]), z.T), 2)
        square, mass = jnp.sum(first[2], axis=1), jnp.sum(pi, axis=1)
    blocks = _curvature(pairs, k) if curvature else None
    impurity = jnp.sum(pi * (1 - gate), axis=1) if blocks is None else blocks[np.arange(k), np.arange(k), 0, 0]
    return Statistics(total, gram[:, 0, 0], gram, cross, square, slope, impurity, mass, blocks)


def _softmax(values: Array, mask: Array) -> tuple[Array, Array]:
    """Probabilities over the true entries of each column, and the logarithm of the normalizer."""
    peak = jnp.max(jnp.where(mask, values, -jnp.inf), axis=0)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, values, peak) - peak), 0)
    total = jnp.sum(weights, axis=0)
    return weights / total, peak + jnp.log(total)


def over_chunks(function: Any, problem: Any, mask: Array | None = None) -> Any:
    """The sum of `function(x, y, weight, mask)` over chunks of rows of `problem`, and over the shards of its axis.

    The last chunk overlaps the one before it and gives weight 0 to what was counted, so that one program serves all chunks.
    """
    n = problem.y.shape[0]
    pieces = -(-n // problem.chunk)
    chunk = -(-n // pieces)
    if pieces == 1:
        total = function(problem.x, problem.y, problem.weight, mask)
    else:
        def one(i: Array) -> Any:
            first = i * chunk
            start = jnp.minimum(first, n - chunk)
            cut = lambda a, axis=0: jax.lax.dynamic_slice_in_dim(a, start, chunk, axis)  # noqa: E731
            fresh = start + jnp.arange(chunk, dtype=start.dtype) >= first
            return function(cut(problem.x), cut(problem.y), jnp.where(fresh, cut(problem.weight), 0), None if mask is None else cut(mask, 1))

        shapes = jax.eval_shape(one, jnp.zeros((), jnp.int32))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        add = lambda i, total: jax.tree.map(jnp.add, total, one(i))  # noqa: E731
        total = jax.lax.fori_loop(0, pieces, add, zeros)
    return tree.strong(total if problem.axis is None else jax.lax.psum(total, problem.axis))


@partial(jax.jit, static_argnames="curvature")
def statistics(problem: Any, mixture: Any, mask: Array | None = None, *, curvature: bool = True) -> Statistics:
    """The sums of one pass over the data of `problem` at `mixture`.

    Args:
        problem: a `Likelihood`.
        mixture: where responsibilities and residuals are taken.
        mask: the routing of the rows, shape `(k, n)`; that of `mixture` if None.
        curvature: whether the second derivatives of the gate are wanted: they cost most of a pass.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S1")
        >>> sums = moe.statistics(moe.Likelihood(*moe.weyl_sample(truth, 400, -1.0, 1.0), experts=3, active=2), truth)
        >>> float(sums.log_likelihood.round(8)), float(sums.weight.round(8))
        (-360.66473307, 400.0)
    """
    center, scale = problem.center, problem.scale
    return over_chunks(lambda x, y, w, s: of_rows(mixture, x, y, w, s, center, scale, curvature), problem, mask)
