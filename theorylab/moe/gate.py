r"""Proposals for the gate, made from the sums of one pass: maximize $Q(W) = \sum_i \sum_{j \in S_i} r_{ij} \log \pi_{ij}(W)$ for fixed sets $S_i$.

Q is concave. All steps are in the standardized coordinates of the sums, of shape `(k, p)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from theorylab.core.psd import product
from theorylab.moe.moments import Statistics

Array = jax.Array
SINGLE_RIDGE = 2e-6                                 # added to the ridge in float32, whose round-off is larger


def newton(sums: Statistics, ridge: Any) -> Array:
    """One Newton step with the last expert held fixed, damped by `ridge` times the mean eigenvalue of the curvature.

    Held fixed is one translation of the gate; where the experts fall into several components that are never active together, more
    directions are undetermined, and the ridge keeps them where they are (Nguyen et al. 2024; the components: companion derivation).
    """
    assert sums.gate_curvature is not None
    k, p = sums.gate_gradient.shape
    dim = (k - 1) * p
    matrix = sums.gate_curvature[:-1, :-1].transpose(0, 2, 1, 3).reshape(dim, dim)
    least = 0.0 if matrix.dtype == jnp.float64 else SINGLE_RIDGE
    damping = (ridge + least) * jnp.trace(matrix) / dim
    factor = jnp.linalg.cholesky(matrix + damping * jnp.eye(dim, dtype=matrix.dtype))
    move = cho_solve((factor, True), sums.gate_gradient[:-1].ravel()).reshape(k - 1, p)
    return jnp.concatenate([move, jnp.zeros((1, p), move.dtype)])


def _scaled(factor: float, sums: Statistics) -> Array:
    moment = jnp.sum(sums.gram, axis=0)             # responsibilities add to the weights, so this is the second moment of the inputs
    return factor * product(sums.gate_gradient, jnp.linalg.pinv(moment, hermitian=True))


def bohning(sums: Statistics, ridge: Any) -> Array:
    r"""The maximizer of the quadratic minorant with curvature $\tfrac12 (I - 11^\top/k) \otimes \sum_i w_i z_i z_i^\top$ (Böhning 1992).

    It never decreases Q, and costs one p by p factor whatever k is.
    """
    return _scaled(2.0, sums)


def official(sums: Statistics, ridge: Any) -> Array:
    """The coordinate scheme of the public code: for each expert alone, least squares on working responses of weight 1/4, solved exactly.

    Its curvature bounds each expert's own, not the joint one: the step is twice the one of `bohning`, the limit at which Q may stall.
    """
    return _scaled(4.0, sums)


STEPS: dict[str, Callable[[Statistics, Any], Array]] = {"newton": newton, "bohning": bohning, "official": official}


def direction(kind: str, sums: Statistics, ridge: Any) -> Array:
    """The proposed change of the gate; 0 where it would not be finite, as on a gate that is 0 or 1 at every row."""
    move = STEPS[kind](sums, ridge)
    return jnp.where(jnp.all(jnp.isfinite(move)), move, jnp.zeros_like(move))
