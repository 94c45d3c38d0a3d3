"""Noisy top K: the experts are ranked by scores plus noise, over which the density is averaged exactly."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr

from theorylab.core import checks
from theorylab.core.keys import Key, as_key
from theorylab.core.psd import product
from theorylab.errors import ArgumentError
from theorylab.moe import density
from theorylab.moe.general.gates import Gate, GateAround

Array = jax.Array
MOST_SETS = 256                                     # sets of kept experts that a noisy gate sums over
REACH, SPACING = 8.0, 0.4                           # of the trapezoidal rule over the noise: exact to 1e-15 at k = 4, to 1e-10 at k = 8


class NoisyGate(GateAround):
    r"""Noisy top K: experts are ranked by their scores plus independent normal noise, anew for every row.

    Given the noise the weights are those of `gate` on the kept set; the density of y averages over it. The average is taken exactly, by a sum
    over the sets L of K experts with
    $P(L) = \sum_{i \in L} \int \varphi(z) \prod_{j \in L \setminus i} \Phi(\tfrac{s_j - s_i}{\varsigma} - z)
    \prod_{j \notin L} \Phi(\tfrac{s_i - s_j}{\varsigma} + z)\, dz$, where i is the last kept expert, and the integral is a trapezoidal
    rule. So the likelihood has no jumps, and its derivative includes that of the selection, which one of a few fixed draws of the noise would
    not (companion derivation). As the scale goes to 0 the gate becomes the plain one.

    Args:
        gate: a gate of another kind.
        scale: standard deviation $\varsigma$ of the noise, above 0, in units of the scores; a fit leaves it as it is.

    Raises:
        ArgumentError: `gate` is none or noisy itself, a scale that is not positive, or (when weights are asked for) more than 256 sets.

    Example:
        >>> from theorylab.moe import general
        >>> gate = general.NoisyGate(general.SoftmaxGate([0.0, 0.0], [[1.0], [0.0]]), scale=0.5)
        >>> jnp.exp(gate.log_weights(jnp.array([[0.0], [1.0]]), active=1)).round(4).tolist()
        [[0.5, 0.5], [0.9214, 0.0786]]
    """

    scale: Any

    def __init__(self, gate: Gate, scale: Any):
        if not isinstance(gate, Gate) or isinstance(gate, NoisyGate):
            raise ArgumentError(f"gate must be a Gate without noise, got {type(gate).__name__}")
        self.gate = gate
        self.scale = jnp.asarray(checks.real("scale", scale, above=0.0), gate.dtype)

    def logits(self, x: Array) -> Array:
        return self.gate.logits(x)

    def scores(self, x: Array) -> Array:
        return self.gate.scores(x)

    def fresh(self, key: Key) -> Self:
        return self.replace(gate=self.gate.fresh(key))

    def drawn(self, x: Array, active: int, *, key: Key | int) -> Array:
        """The experts kept under one fresh draw of the noise, boolean of shape `(n, k)`: what a layer in training does."""
        scores = self.scores(x)
        return density.top((scores + self.scale * jax.random.normal(as_key(key), scores.shape, scores.dtype)).T, active).T

    def log_weights(self, x: Array, active: int) -> Array:
        k = self.experts
        if math.comb(k, active) > MOST_SETS:
            raise ArgumentError(f"NoisyGate sums over the sets of kept experts, at most {MOST_SETS}, got {math.comb(k, active)} sets of {active} out "
                                f"of {k}; use fewer experts")
        member = np.zeros((math.comb(k, active), k), bool)
        for row, kept in zip(member, combinations(range(k), active), strict=True):
            row[list(kept)] = True
        logits, scores, tiny = self.logits(x), self.scores(x) / self.scale, float(jnp.finfo(x.dtype).tiny)
        z = np.arange(-REACH, REACH + SPACING / 2, SPACING)
        mass = jnp.asarray(np.exp(-z * z / 2) * SPACING / np.sqrt(2 * np.pi), x.dtype)
        # Axes: rows, the last kept expert i, its noise z, the other expert j.
        lead = (scores[:, :, None] - scores[:, None, :])[:, :, None, :] + jnp.asarray(z, x.dtype)[:, None]
        other = ~np.eye(k, dtype=bool)[:, None, :]
        beaten, beats = (jnp.where(other, jnp.log(jnp.maximum(ndtr(v), tiny)), 0) for v in (lead, -lead))
        inside = jnp.asarray(member, x.dtype)
        chance = jnp.exp(product(beats, inside.T) + product(beaten, 1 - inside.T))
        sets = jnp.einsum("niqc,q,ci->nc", chance, mass, inside, precision=jax.lax.Precision.HIGHEST)
        normalizer = jax.vmap(lambda mask: density.log_sum(logits.T, jnp.broadcast_to(mask[:, None], logits.T.shape)))(jnp.asarray(member)).T
        weights = jnp.where(member, jnp.exp(jnp.where(member, logits[:, None, :] - normalizer[:, :, None], 0)), 0)
        return jnp.log(jnp.maximum(jnp.sum(sets[:, :, None] * weights, axis=1), tiny))
