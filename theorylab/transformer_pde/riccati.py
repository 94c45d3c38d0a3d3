r"""Softmax attention with a number as $V$, an affine feed-forward layer and noise: the covariance solves a matrix Riccati equation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from theorylab.errors import ArgumentError, MatrixError, NoClosedFormError
from theorylab.transformer_pde.attention import Softmax, is_concrete
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Gaussian, _symmetric

Array = jax.Array

SUBSTEPS = 16
"""A time is reached in this many exact steps, so that no exponential is large and a pole in between is noticed."""
SIGN_STEPS = 40


def riccati_states(attention: Softmax, feed_forward: Any, noise: Any, state: Gaussian, times: Float[Array, "t"]) -> Gaussian:
    r"""The states at `times` for $\Sigma' = W\Sigma + \Sigma W^\top + 2D + v\,\Sigma(A + A^\top)\Sigma$ and zero mean.

    Without noise $L(h) = e^{hW} L (I - L^\top J L)^{-1/2}$, $J = \int_0^h e^{sW^\top} v(A + A^\top) e^{sW} ds$; with it $\Sigma(h) = X Z^{-1}$ for
    the exponential of the Hamiltonian matrix applied to $(\Sigma, I)$ (companion derivation, closed forms with feed-forward and noise).
    """
    drift = _terms(attention, feed_forward, noise)[1]
    known = (state.mean == 0).all() & (drift == 0).all()
    if is_concrete(known) and not bool(known):
        raise NoClosedFormError("with feed_forward or noise the covariance has a closed form but the mean has none: use integrate, or take "
                                "zero mean and b")
    moved = _path(attention, feed_forward, noise, state, times)
    if is_concrete(moved) and not bool(jnp.isfinite(moved).all()):
        raise ArgumentError(f"times must lie below the blow-up time, got {float(times.max()):.15g}")
    moved = jnp.where(known, moved, jnp.nan).astype(moved.dtype)
    mean = jnp.broadcast_to(state.mean, (times.shape[0], attention.dim))
    return Gaussian._raw(mean, moved, None) if noise is None else Gaussian._raw(mean, None, moved)


@jax.jit
def _path(attention: Softmax, feed_forward: Any, noise: Any, state: Gaussian, times: Float[Array, "t"]) -> Array:
    """Factors at `times`, covariances with noise; NaN beyond a pole."""
    W, _, twice, form = _terms(attention, feed_forward, noise)
    d = attention.dim
    generator = jnp.block([[-W.T, form], [jnp.zeros_like(W), W]]) if noise is None else jnp.block([[W, twice], [-form, -W.T]])

    def without_noise(t: Array) -> Array:
        step = jax.scipy.linalg.expm(t / SUBSTEPS * generator)
        carry, pull = step[d:, d:], _symmetric(step[d:, d:].T @ step[:d, d:])

        def go(_: Any, factor: Array) -> Array:
            shifted = jnp.eye(factor.shape[1], dtype=factor.dtype) - factor.T @ pull @ factor
            return carry @ jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(shifted), factor.T, lower=True).T

        return lax.fori_loop(0, SUBSTEPS, go, state.factor)

    def with_noise(t: Array) -> Array:
        step = jax.scipy.linalg.expm(t / SUBSTEPS * generator)

        def go(_: Any, cov: Array) -> Array:
            top, bottom = step[:d, :d] @ cov + step[:d, d:], step[d:, :d] @ cov + step[d:, d:]
            cov = _symmetric(jnp.linalg.solve(bottom.T, top.T).T)
            values = jnp.linalg.eigvalsh(lax.stop_gradient(cov))
            return jnp.where(values[0] < -1e-9 * jnp.abs(values).max(), jnp.nan, cov).astype(cov.dtype)    # beyond a pole

        return lax.fori_loop(0, SUBSTEPS, go, state.cov)

    return jax.vmap(without_noise if noise is None else with_noise)(times)


def equilibrium(flow: GaussianFlow) -> Float[Array, "d d"]:
    r"""The attracting covariance $\Sigma_\infty$ of softmax attention with $V = vI$, $v(A + A^\top) \prec 0$, feed-forward and noise.

    It is the stabilizing solution of $W\Sigma + \Sigma W^\top + 2D + v\,\Sigma(A + A^\top)\Sigma = 0$: every $\Sigma_0 \succ 0$ tends to it, and with
    $D \succ 0$ every $\Sigma_0$ (companion derivation). Found by Newton iterations for the matrix sign of the Hamiltonian, differentiable.

    Args:
        flow: a `GaussianFlow` of softmax attention with a number as $V$, with `feed_forward` or `noise`.

    Raises:
        NoClosedFormError: the flow is of another kind.
        MatrixError: $v(A + A^\top)$ is not negative definite, or the Hamiltonian has an imaginary eigenvalue, so that nothing attracts in general.

    Example:
        >>> flow = GaussianFlow(Softmax(jnp.eye(1), jnp.eye(1), -1.0), feed_forward=(jnp.eye(1), None))
        >>> equilibrium(flow).round(12).tolist()                                   # 2 s - 2 s^2 = 0
        [[1.0]]
    """
    if not isinstance(flow, GaussianFlow):
        raise ArgumentError(f"flow must be a GaussianFlow, got {type(flow).__name__}")
    head = flow.attention
    if not isinstance(head, Softmax) or head.V.ndim or flow.normalize or (flow.feed_forward is None and flow.noise is None):
        raise NoClosedFormError("equilibrium is known for softmax attention with a number as V and feed_forward or noise, without normalize")
    cov, valid = attractor(head, flow.feed_forward, flow.noise)
    if is_concrete(valid) and not bool(valid):
        raise MatrixError("equilibrium needs v (A + A^T) to be negative definite and no imaginary eigenvalue of the linear part: nothing "
                          "attracts here")
    return cov


@jax.jit
def attractor(attention: Softmax, feed_forward: Any, noise: Any) -> tuple[Float[Array, "d d"], Array]:
    """The stabilizing covariance, and whether the hypotheses hold under which every regular start tends to it."""
    W, _, twice, form = _terms(attention, feed_forward, noise)
    d = attention.dim
    eye = jnp.eye(d, dtype=W.dtype)

    def newton(_: Any, x: Array) -> Array:
        inverse = jnp.linalg.inv(x)
        scale = jnp.exp(-lax.stop_gradient(jnp.linalg.slogdet(x)[1]) / (2 * d)).astype(x.dtype)           # takes the eigenvalues to the unit circle
        return (scale * x + inverse / scale) / 2

    sign = lax.fori_loop(0, SIGN_STEPS, newton, jnp.block([[W, twice], [-form, -W.T]]))
    # (Sigma, I) spans the invariant subspace that grows: (sign - I)(Sigma, I) = 0, solved in least squares by its normal equations
    left = jnp.concatenate([sign[:d, :d] - eye, sign[d:, :d]])
    right = jnp.concatenate([-sign[:d, d:], eye - sign[d:, d:]])
    cov = _symmetric(jnp.linalg.solve(left.T @ left, left.T @ right))
    values = jnp.linalg.eigvalsh(form)
    residual = jnp.linalg.norm(W @ cov + cov @ W.T + twice + cov @ form @ cov)
    size = jnp.linalg.norm(W) * jnp.linalg.norm(cov) + jnp.linalg.norm(twice)
    tolerance = jnp.sqrt(jnp.finfo(W.dtype).eps).astype(W.dtype)
    return cov, (values[-1] < -tolerance * jnp.abs(values).max()) & (residual <= tolerance * size)


def _terms(attention: Softmax, feed_forward: Any, noise: Any) -> tuple[Array, Array, Array, Array]:
    """$W$, $b$, $2D$ and $v(A + A^T)$."""
    A = attention.A
    form = attention.V * (A + A.T)
    zero = jnp.zeros_like(form)
    W, drift = (zero, zero[0]) if feed_forward is None else feed_forward
    return W.astype(form.dtype), drift, zero if noise is None else 2 * _symmetric(noise).astype(form.dtype), form
