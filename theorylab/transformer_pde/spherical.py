"""Attention with layer normalization: tokens on the unit sphere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks, tree
from theorylab.errors import ArgumentError
from theorylab.transformer_pde.gaussian import Cloud
from theorylab.transformer_pde.particles import Particles

Array = jax.Array


class Spherical(Particles):
    r"""Tokens on the unit sphere under attention and layer normalization, $x_i' = P_{x_i} \Gamma_\mu(x_i)$ with $P_x = I - x x^\top$.

    With `Softmax` this is self-attention on the sphere, with `Exponential` its unnormalized form. For $Q^\top K = \beta I$ and $V = I$ both increase
    the energy $\frac{1}{2\beta}\iint e^{\beta\langle x, y\rangle}d\mu\,d\mu$, and tokens gather in clusters (companion derivation, after the
    literature on clustering in self-attention). Arguments and errors are those of `Particles`; `feed_forward` is projected as well. Initial tokens
    are divided by their norms.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> start = tp.Gaussian.standard(3).sample(20, key=0)
        >>> sol = tl.integrate(Spherical(tp.Softmax(jnp.eye(3), jnp.eye(3), 1.0, scale=4.0)), start, jnp.array([0.0, 5.0]))
        >>> bool(jnp.allclose(jnp.linalg.norm(sol.value.points, axis=-1), 1.0))
        True
    """

    def lift(self, y0: Any) -> Cloud:
        """The cloud, its tokens divided by their norms."""
        cloud = super().lift(y0)
        norms = jnp.linalg.norm(cloud.points, axis=-1, keepdims=True)
        if not tree.is_traced(norms) and not np.all(np.asarray(norms) > 0):
            raise ArgumentError("the tokens must not be zero to be put on the sphere, got a zero token")
        return Cloud._raw(cloud.points / norms, cloud._weights)

    def velocities(self, t: Any, y: Cloud) -> Array:
        """The velocity of every token, tangent to the sphere."""
        norms = jnp.linalg.norm(y.points, axis=-1, keepdims=True)
        unit = y.points / norms                                                  # a numerical step leaves the sphere by its error
        moved = super().velocities(t, Cloud._raw(unit, y._weights))
        return norms * (moved - (unit * moved).sum(-1, keepdims=True) * unit)


def equiangular_rate(cosine: Any, count: int, beta: Any, normalized: bool = True) -> Array:
    r"""$\rho'$ for `count` tokens on the sphere that all enclose the angle $\arccos\rho$, with logits $\beta\langle x, y\rangle$ and $V = I$.

    $$ \rho' = \frac{2 e^{\beta\rho} (1 - \rho)\,((n - 1)\rho + 1)}{e^\beta + (n - 1) e^{\beta\rho}}, $$

    with the denominator $n$ for unnormalized attention (companion derivation). Equal angles stay equal, so this equation is all of the flow.

    Args:
        cosine: $\rho$, from $-1/(n - 1)$ to 1; any shape.
        count: $n$, at least 2.
        beta: $\beta$.
        normalized: softmax weights; False for the weights $e^{\beta\langle x, y\rangle}/n$.

    Raises:
        ArgumentError: `count` is below 2, or `cosine` is out of range.

    Example:
        >>> equiangular_rate(0.0, 2, 0.0).item()
        1.0
    """
    n = checks.whole("count", count, low=2)
    rho = jnp.asarray(cosine, jnp.result_type(float)) if isinstance(cosine, (int, float)) else checks.array("cosine", cosine)
    if checks.known(rho) and not bool(((rho >= -1 / (n - 1) - 1e-12) & (rho <= 1 + 1e-12)).all()):
        raise ArgumentError(f"cosine must be at least -1 / (count - 1) = {-1 / (n - 1):g} and at most 1, got {np.ravel(np.asarray(rho)).tolist()}")
    top = 2 * (1 - rho) * ((n - 1) * rho + 1)
    if normalized:
        return top / (jnp.exp(beta * (1 - rho)) + (n - 1))
    return top * jnp.exp(beta * rho) / n
