"""Heads whose weights are not normalized: they do not keep Gaussians Gaussian and are followed on tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from theorylab.transformer_pde.attention import Head, _scalar
from theorylab.transformer_pde.gaussian import _floating

Array = jax.Array


class _Unnormalized(Head):
    """A head with weights that need not sum to one."""

    @property
    def keeps_gaussians(self) -> bool:
        """False."""
        return False

    def _activate(self, logits: Array) -> Array:
        raise NotImplementedError

    def token_velocity(self, points: Float[Array, "n d"], weights: Float[Array, "n"] | None = None, queries: Float[Array, "m d"] | None = None,
                       tile: int = 1024, causal: bool = False) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
        return self._value_sum(self._activate, points, weights, queries, tile, causal)


class Sigmoid(_Unnormalized):
    r"""Sigmoid attention, $\Gamma_\mu(x) = \int \sigma(\ell(x, y) + b)\, V y\,d\mu(y)$ with the logistic function $\sigma$.

    The formula is that of the literature on sigmoid attention. Each token decides for itself how much of every other it takes. On $n$ tokens the
    integral is $\frac1n\sum_j$; networks leave out the $1/n$ and use $b = -\log n$. Gaussians do not stay Gaussian: `moment_closure` is the
    Gaussian approximation.

    Args:
        Q: queries, shape `(k, dim)`.
        K: keys, shape `(k, dim)`.
        V: values, shape `(dim, dim)`, or a number.
        scale: the logit scale $c$.
        bias: $b$.

    Raises:
        ShapeError: the shapes do not match.
        NonFiniteInputError: an entry is NaN or infinite.

    Example:
        >>> head = Sigmoid(jnp.zeros((1, 1)), jnp.zeros((1, 1)), 2.0)
        >>> head.token_velocity(jnp.array([[1.0], [3.0]]))[0].tolist()                    # half of twice the mean
        [[2.0], [2.0]]
    """

    bias: Any = None

    def __init__(self, Q: Any, K: Any, V: Any, scale: Any = 1.0, bias: Any = 0.0):
        super().__init__(Q, K, V, scale)
        self.bias = _scalar("bias", _floating("bias", bias))

    def _activate(self, logits: Array) -> Array:
        return jax.nn.sigmoid(logits + self.bias.astype(logits.dtype))


class Exponential(_Unnormalized):
    r"""Unnormalized exponential attention, $\Gamma_\mu(x) = \int e^{\ell(x, y)}\, V y\,d\mu(y)$: a gradient flow on the sphere.

    Arguments and errors are those of `Softmax`.

    Example:
        >>> head = Exponential(jnp.zeros((1, 1)), jnp.zeros((1, 1)), 2.0)
        >>> head.token_velocity(jnp.array([[1.0], [3.0]]))[0].tolist()
        [[4.0], [4.0]]
    """

    def __init__(self, Q: Any, K: Any, V: Any, scale: Any = 1.0):
        super().__init__(Q, K, V, scale)

    def _activate(self, logits: Array) -> Array:
        return jnp.exp(logits)
