"""Sinkhorn attention: the bistochastic kernel of entropic optimal transport, in closed form on Gaussians."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from theorylab.core.module import number
from theorylab.errors import ArgumentError
from theorylab.transformer_pde.attention import Head, Velocity, _scalar
from theorylab.transformer_pde.kernels import sinkhorn_bias, tiled_average

Array = jax.Array


class Sinkhorn(Head):
    r"""Sinkhorn attention, $\Gamma_\mu(x) = \frac1\varepsilon \int \kappa(x, y)\, V y\,d\mu(y)$ with a bistochastic kernel $\kappa$.

    $\kappa(x, y) = e^{f(x) + \ell(x, y)/\varepsilon + g(y)}$ with $\int\kappa(x, y)\,d\mu(y) = 1 = \int\kappa(x, y)\,d\mu(x)$ is the density of the
    optimal plan $\pi$ of cost $-\ell$ and entropic term $\varepsilon\,\mathrm{KL}(\pi \,|\, \mu\otimes\mu)$. The $1/\varepsilon$ in front is the
    paper's.
    On $\mathcal N(\alpha, L L^\top)$, with $N = L^\top A^\top L/\varepsilon$ and $F = 2\,(I + (I + 4 N^\top N)^{1/2})^{-1}$:
    $m = V\alpha/\varepsilon$, $B = V L F L^\top A/\varepsilon^2$ (companion derivation). Nothing is inverted, so singular matrices are fine.

    Args:
        Q: queries, shape `(k, dim)`.
        K: keys, shape `(k, dim)`.
        V: values, shape `(dim, dim)`, or a number.
        scale: the logit scale $c$.
        temperature: $\varepsilon$, above 0.

    Raises:
        ShapeError: the shapes do not match.
        NonFiniteInputError: an entry is NaN or infinite.
        ArgumentError: `temperature` is not positive.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> head = tp.Sinkhorn(jnp.eye(1), jnp.eye(1), 1.0, temperature=2.0)
        >>> round(tp.velocity(head, tp.Gaussian.standard(1)).matrix.item(), 12)                 # F = 2 / (1 + sqrt 2), over 4
        0.207106781187
    """

    temperature: Any = number(1.0, above=0.0)

    def __init__(self, Q: Any, K: Any, V: Any, scale: Any = 1.0, temperature: Any = 1.0):
        super().__init__(Q, K, V, scale)
        self.temperature = _scalar("temperature", temperature)

    def _form(self, factor: Float[Array, "d r"]) -> Float[Array, "r r"]:
        return (self.scale / self.temperature) * ((self.Q @ factor).T @ (self.K @ factor))

    def gain(self, factor: Float[Array, "d r"]) -> Float[Array, "r r"]:
        return contraction(self._form(factor)).T / self.temperature

    def factor_velocity(self, mean: Float[Array, "d"], factor: Float[Array, "d r"]) -> tuple[Float[Array, "d"], Float[Array, "d r"]]:
        return self._value(mean) / self.temperature, self._value(factor @ self.gain(factor))

    def velocity(self, mean: Float[Array, "d"], cov: Float[Array, "d d"]) -> Velocity:
        from theorylab.core.psd import sqrtm

        factor = sqrtm(cov)
        form = self._form(factor)
        eye = jnp.eye(form.shape[0], dtype=form.dtype)
        weight = jnp.linalg.solve(eye + sqrtm(eye + 4 * (form.T @ form)), 2 * factor.T)
        matrix = self._value(factor @ weight @ self.K.T @ self.Q) * (self.scale / self.temperature**2)
        return Velocity(self._value(mean) / self.temperature, matrix)

    def rate_bound(self, trace: Array) -> Array:
        return self._weight_size() * trace / self.temperature**2 / (1 + jnp.linalg.norm(self.A) * trace / self.temperature)

    def key_size(self, factor: Array) -> Array:
        return (self.scale / self.temperature) * jnp.linalg.norm(self.Q @ factor) * jnp.linalg.norm(self.K @ factor)

    def token_velocity(self, points: Float[Array, "n d"], weights: Float[Array, "n"] | None = None, queries: Float[Array, "m d"] | None = None,
                       tile: int = 1024, causal: bool = False) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
        if causal:
            raise ArgumentError("Sinkhorn attention cannot be masked: a bistochastic kernel looks at all tokens")
        size = points.shape[0]
        log_weights = jnp.full(size, -jnp.log(size), points.dtype) if weights is None else jnp.log(weights)
        asked, keys = (self.scale / self.temperature) * (points @ self.Q.T), points @ self.K.T
        bias = sinkhorn_bias(asked, keys, log_weights, tile)[0] + log_weights
        if queries is not None:
            asked = (self.scale / self.temperature) * (queries @ self.Q.T)
        average, sample_size = tiled_average(asked, keys, bias, points, tile)
        return self._value(average.T).T / self.temperature, sample_size


@jax.custom_jvp
def contraction(form: Float[Array, "r r"]) -> Float[Array, "r r"]:
    r"""The root $T$ of $T = N (I - T^\top T)$: with $N = U s W^\top$, $T = U \tau W^\top$, $\tau = 2s / (1 + \sqrt{1 + 4s^2})$, all below 1.

    Written as $N W \operatorname{diag}(2/(1 + \sqrt{1 + 4 s^2}))\, W^\top$, which needs neither $U$ nor a quotient by $s$. The singular values are
    never taken from $N^\top N$, which would lose those below $10^{-8}$ of the largest.
    """
    size = form.shape[0]
    if size == 1:
        return 2 * form / (1 + jnp.sqrt(1 + 4 * form * form))
    if size == 2:
        right = _right_vectors_2x2(form)
        turned = form @ right
        values = jnp.sqrt((turned * turned).sum(0))
    else:
        _, values, rows = jnp.linalg.svd(form)
        right, turned = rows.T, form @ rows.T
    return (turned * (2 / (1 + jnp.sqrt(1 + 4 * values * values)))) @ right.T


@contraction.defjvp
def _contraction_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Divided differences in tau have no cancellation and no poles: repeated and vanishing singular values are harmless.
    (form,), (change,) = primals, tangents
    left, s, rows = jnp.linalg.svd(form)
    root = jnp.sqrt(1 + 4 * s * s)
    tau, short = 2 * s / (1 + root), (1 + 1 / (root + 2 * s)) / (1 + root)                 # short = 1 - tau
    rest = short * (1 + tau)
    product = tau[:, None] * tau[None, :]
    missing = short[:, None] + tau[:, None] * short[None, :]                               # 1 - tau_i tau_j
    inner = left.T @ change @ rows.T
    even, odd = (inner + inner.T) / 2, (inner - inner.T) / 2
    moved = rest[:, None] * rest[None, :] * (even / (1 + product) + odd / missing)
    return contraction(form), left @ moved @ rows


def _right_vectors_2x2(form: Float[Array, "2 2"]) -> Float[Array, "2 2"]:
    """One Jacobi rotation makes two columns orthogonal to high relative accuracy, and batches over thousands of states."""
    a, b = form[:, 0], form[:, 1]
    cross, gap = a @ b, (b @ b - a @ a) / 2
    some = cross != 0
    ratio = gap / jnp.where(some, cross, 1.0)
    tangent = jnp.where(some, jnp.where(ratio >= 0, 1.0, -1.0) / (jnp.abs(ratio) + jnp.sqrt(1 + ratio * ratio)), 0.0).astype(form.dtype)
    cosine = 1 / jnp.sqrt(1 + tangent * tangent)
    return cosine * jnp.stack([jnp.stack([jnp.ones_like(tangent), tangent]), jnp.stack([-tangent, jnp.ones_like(tangent)])])
