"""The moment equations of a Gaussian under attention, in depth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.module import choice, square
from theorylab.core.problem import Flow
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.combined import FeedForward
from theorylab.transformer_pde.contract import Attention, check_attention, check_single, is_concrete, state_metrics
from theorylab.transformer_pde.gaussian import Gaussian, _floating, _symmetric, check_semidefinite

Array = jax.Array


class GaussianFlow(Flow):
    r"""The exact flow of a Gaussian under attention (paper, Gaussian invariance): with $\Gamma(x) = m + B(x - \alpha)$ the velocity of a token,

    $$ \alpha' = m, \qquad L' = B L, \qquad \Sigma = L L^\top, \quad\text{so that}\quad \Sigma' = B\Sigma + \Sigma B^\top. $$

    The factor form keeps the covariance positive semidefinite and its rank bounded under any integrator. Integrated, it gives a `Gaussian`
    with a leading axis of times.

    Args:
        attention: a variant that maps Gaussians to Gaussians; its weights may change with depth (`Layered`).
        feed_forward: a pair `(W, b)` adding $W x + b$ to the velocity, or a `FeedForward`; without `b`, the matrix $W$.
        noise: the diffusion matrix $D$ (or a number times the identity) of independent noise $\sqrt{2D}\,dB$, which adds $2D$ to $\Sigma'$.
        normalize: subtract $c(t)\,x$ with the $c$ that keeps $E|x|^2$ constant (mean-field normalization).
        form: `"factor"`, or `"covariance"` to integrate $\Sigma$ itself. Noise raises the rank, so with it None means `"covariance"`, else
            `"factor"`.

    Raises:
        ShapeError: `feed_forward` or `noise` does not match the dimension of the attention.
        MatrixError: `noise` is not symmetric positive semidefinite.
        ArgumentError: `noise` with `form="factor"`, or an attention that does not keep Gaussians Gaussian.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> flow = tp.GaussianFlow(tp.Softmax(jnp.eye(2), jnp.eye(2), -1.0))
        >>> sol = tl.integrate(flow, tp.Gaussian.standard(2), jnp.array([0.0, 1.0]))
        >>> round(float(sol.value.cov[-1, 0, 0]), 6)
        0.333333
    """

    attention: Attention
    feed_forward: Any = None
    noise: Any = None
    normalize: bool = choice(False, among=(True, False))
    form: str = choice("factor", among=("factor", "covariance"))

    def __init__(self, attention: Attention, feed_forward: Any = None, noise: Any = None, normalize: bool = False, form: str | None = None):
        check_attention(attention)
        if not attention.keeps_gaussians:
            raise ArgumentError(f"attention must map Gaussians to Gaussians, which {type(attention).__name__} does not: follow tokens with "
                                "Particles, or the Gaussian approximation with ClosureFlow or PositionFlow")
        self.attention, self.normalize = attention, normalize
        self.form = form if form is not None else "factor" if noise is None else "covariance"
        self.feed_forward = None if feed_forward is None else _affine(feed_forward, attention.dim)
        self.noise = None if noise is None else _diffusion(noise, attention.dim)
        if noise is not None and form == "factor":
            raise ArgumentError("noise raises the rank of the covariance, which a factor cannot follow: use form='covariance'")

    def lift(self, y0: Any) -> Gaussian:
        """The state in the form that is integrated."""
        if not isinstance(y0, Gaussian):
            raise ArgumentError(f"the state of a GaussianFlow must be a Gaussian, got {type(y0).__name__}")
        if y0.dim != self.attention.dim:
            raise ShapeError(f"the state must have dimension {self.attention.dim} to match the attention, got {y0.dim}")
        if self.form == "covariance":
            return Gaussian._raw(y0.mean, None, y0.cov)
        return Gaussian._raw(y0.mean, y0.factor, None)

    def field(self, t: Array, y: Gaussian) -> Gaussian:
        check_single(y.mean.shape[:-1])
        attention = self.attention.at(t)
        if y._factor is not None:
            mean, moved = attention.factor_velocity(y.mean, y._factor)
            if self.feed_forward is not None:
                W, b = self.feed_forward
                mean, moved = mean + W @ y.mean + b, moved + W @ y._factor
            if self.normalize:
                shrink = _ratio((mean @ y.mean) + (moved * y._factor).sum(), (y.mean @ y.mean) + (y._factor * y._factor).sum())
                mean, moved = mean - shrink * y.mean, moved - shrink * y._factor
            return Gaussian._raw(mean, moved, None)
        cov = y.cov
        mean, matrix = attention.velocity(y.mean, cov)
        if self.feed_forward is not None:
            W, b = self.feed_forward
            mean, matrix = mean + W @ y.mean + b, matrix + W
        moved = 2 * _symmetric(matrix @ cov)
        if self.noise is not None:
            moved = moved + 2 * self.noise
        if self.normalize:
            shrink = _ratio((mean @ y.mean) + jnp.trace(moved) / 2, (y.mean @ y.mean) + jnp.trace(cov))
            mean, moved = mean - shrink * y.mean, moved - 2 * shrink * cov
        return Gaussian._raw(mean, None, moved)

    def metrics(self, t: Array, y: Gaussian) -> dict[str, Array]:
        """`eigenvalues` (ascending), `rank`, `trace` and `mean`."""
        return state_metrics(y)


def _ratio(top: Array, bottom: Array) -> Array:
    """The quotient, and zero where the denominator is zero."""
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1.0), 0.0).astype(top.dtype)


def _affine(feed_forward: Any, dim: int) -> tuple[Array, Array]:
    if isinstance(feed_forward, FeedForward):
        feed_forward = feed_forward.W, feed_forward.b
    if isinstance(feed_forward, (jax.Array, np.ndarray)):
        feed_forward = feed_forward, None
    try:
        W, b = feed_forward
    except (TypeError, ValueError):
        raise ArgumentError(f"feed_forward must be a pair (W, b), got {type(feed_forward).__name__}") from None
    W = square("feed_forward W", _floating("feed_forward W", W), dim)
    b = jnp.zeros(dim, W.dtype) if b is None else _floating("feed_forward b", b)
    if b.shape != (dim,):
        raise ShapeError(f"feed_forward b must have shape ({dim},), got {b.shape}")
    return W, b


def _diffusion(noise: Any, dim: int) -> Array:
    D = _floating("noise", noise)
    D = D * jnp.eye(dim, dtype=D.dtype) if D.ndim == 0 else square("noise", D, dim)
    if is_concrete(D):
        check_semidefinite("noise", np.asarray(D))
    return D
