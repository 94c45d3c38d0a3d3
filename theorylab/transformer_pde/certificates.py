"""What the weights alone decide: exact limits of one head, and who can never blow up. Everything here holds lane by lane under `vmap`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from theorylab.transformer_pde.attention import L2, Attention, Head, Softmax
from theorylab.transformer_pde.closed_forms import is_symmetric, quadratic_form
from theorylab.transformer_pde.combined import FeedForward, MultiHead, parts
from theorylab.transformer_pde.entropic import Sinkhorn
from theorylab.transformer_pde.gaussian import _symmetric
from theorylab.transformer_pde.orbits import HYPOTHESIS, proportion

Array = jax.Array
FROZEN, ZERO, BLOWUP, GROWING, ROTATING = range(5)
"""The codes of `Regime`, which is defined above this file."""


class Known(NamedTuple):
    """An exact limit, and whether its hypotheses hold."""

    holds: Array
    cov: Array
    rank: Array
    regime: Array
    error: Array


def certificate(attention: Attention, factor: Float[Array, "d r"]) -> Known:
    r"""The exact limit of a head with $V = vI$, where its class and its weights give one (companion derivation, closed forms).

    Softmax always; L2 if $Q = rK$; Sinkhorn if $A$ is symmetric. Their modes are the eigenvectors of $L_0^\top (A + A^\top) L_0$.
    """
    if not isinstance(attention, (Softmax, L2, Sinkhorn)):
        d = factor.shape[0]
        none = jnp.zeros((), factor.dtype)
        return Known(jnp.zeros((), bool), jnp.zeros((d, d), factor.dtype), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), none)
    v, scalar = _multiple(attention)
    if isinstance(attention, Softmax):
        found = scalar_softmax(attention, factor, v)
        return found._replace(holds=scalar)
    form, level = quadratic_form(attention, factor)
    values, vectors = jnp.linalg.eigh(form / 2)
    pushed, small = v * values, jnp.abs(v) * level
    up, still = pushed > small, jnp.abs(pushed) <= small
    if isinstance(attention, L2):
        ratio, known = proportion(attention)
        size = jnp.abs(values) / jnp.where(ratio == 0, 1.0, jnp.abs(ratio))                  # eigenvalues of L'PL
        log_weight = -0.5 / jnp.where(up, size, 1.0)
    else:
        known = is_symmetric(attention.A)
        first = jnp.arcsinh(2 * jnp.where(up, jnp.abs(values), 1.0) / attention.temperature)
        log_weight = first - 1 / jnp.tanh(first / 2) - jnp.log(jnp.where(up, jnp.abs(values), 1.0))
    grows = up.any()
    top = jnp.where(up, log_weight, -jnp.inf).max(initial=-jnp.inf)
    weight = jnp.where(up, jnp.exp((log_weight - jnp.where(grows, top, 0.0)) / 2), 0.0)
    return _kept(factor, vectors, jnp.where(grows, weight, still.astype(factor.dtype)), grows, GROWING, small, jnp.zeros((), bool), scalar & known)


def scalar_softmax(attention: Softmax, factor: Float[Array, "d r"], v: Any = None) -> Known:
    """The limit of softmax for V = v I from one eigendecomposition."""
    v = attention.V if v is None else v
    form, level = quadratic_form(attention, factor)
    values, vectors = jnp.linalg.eigh(v * form)
    small = jnp.abs(v) * level
    blows = values[-1] > small
    top = values >= values[-1] - jnp.maximum(small, 1e-9 * jnp.abs(values[-1]))
    keep = jnp.where(blows, top, jnp.abs(values) <= small).astype(values.dtype)
    turning = vectors.T @ (v * attention.scale * ((attention.K @ factor).T @ (attention.Q @ factor))) @ vectors
    turns = jnp.linalg.norm(turning * keep[:, None] * keep[None, :]) > small
    return _kept(factor, vectors, keep, blows, BLOWUP, small, turns, jnp.ones((), bool))


def _kept(factor: Array, vectors: Array, weight: Array, leaves: Array, code: int, small: Array, turns: Array, holds: Array) -> Known:
    """The limit in which each mode keeps its weight; a direction if the trace leaves."""
    kept = factor @ (vectors * weight)
    trace = (kept * kept).sum()
    cov = _symmetric(kept @ kept.T) / jnp.where(leaves & (trace > 0), trace, 1.0)
    zero = trace == 0
    kind = jnp.where(leaves, code, jnp.where(zero, ZERO, jnp.where(turns, ROTATING, FROZEN)))
    values = jnp.linalg.svd(kept, compute_uv=False)
    rank = jnp.where(zero, 0, (values > 10 * factor.shape[0] * jnp.finfo(factor.dtype).eps * values[0]).sum(dtype=jnp.int32))
    return Known(holds, cov, rank.astype(jnp.int32), kind.astype(jnp.int32), 10 * jnp.finfo(cov.dtype).eps * jnp.linalg.norm(cov))


def never_blows_up(attention: Attention) -> Array:
    r"""Whether a bound of the velocity, or a Lyapunov function, excludes a blow-up (companion derivation).

    The velocity of Sinkhorn, of L2 with injective keys and of a feed-forward layer is bounded by a linear one; softmax and linear attention with
    $V \succ 0$ symmetric and $A + A^\top \preceq 0$ have $\operatorname{tr}(V^{-1}\Sigma)$.
    """
    heads = [part for part in parts(attention) if not isinstance(part, MultiHead)]
    bounded = jnp.stack([_linear_growth(head) for head in heads]).all()
    if len(heads) == 1 and isinstance(heads[0], Head) and heads[0].degree == 2:
        V, form = heads[0].value_matrix, heads[0].A + heads[0].A.T
        low, high = jnp.linalg.eigvalsh(_symmetric(V)), jnp.linalg.eigvalsh(form)
        level = HYPOTHESIS * jnp.abs(high).max()
        return bounded | (is_symmetric(V) & (low[0] > HYPOTHESIS * low[-1]) & (high[-1] <= level))
    return bounded


def _linear_growth(head: Attention) -> Array:
    if isinstance(head, (Sinkhorn, FeedForward)):
        return jnp.ones((), bool)
    if isinstance(head, L2):
        keys = jnp.linalg.eigvalsh(head.P)
        return keys[0] > 100 * jnp.finfo(keys.dtype).eps * keys[-1]
    return jnp.zeros((), bool)


def _multiple(attention: Head) -> tuple[Array, Array]:
    """The number v with V = v I, and whether V is that."""
    V = attention.V
    if V.ndim == 0:
        return V, jnp.ones((), bool)
    v = jnp.trace(V) / V.shape[0]
    rest = jnp.linalg.norm(V - v * jnp.eye(V.shape[0], dtype=V.dtype))
    return v, rest <= HYPOTHESIS * jnp.linalg.norm(V)
