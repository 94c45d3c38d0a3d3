r"""Losses as functions of the margin, with the derivatives that the data problems need, and checks of data sets."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core import checks
from theorylab.errors import ArgumentError
from theorylab.hypergradient.contract import gram, pull

Array = jax.Array


class Squares:
    r"""Half squares: $\ell(t, b) = |t - b|^2 / 2$, summed over outputs."""

    smoothness: ClassVar[float] = 1.0

    @staticmethod
    def value(t: Array, b: Array) -> Array:
        """Sum of the losses over rows; t and b of shape (N,) or (N, q)."""
        return jnp.sum((t - b) ** 2) / 2

    @staticmethod
    def slope(t: Array, b: Array) -> Array:
        """Derivative of each loss in t."""
        return t - b

    @staticmethod
    def weights(t: Array) -> Any:
        """What `second` and `third` need of t; computed once per point."""
        return ()

    @staticmethod
    def second(weights: Any, u: Array) -> Array:
        """Second derivative of each loss times u."""
        return u

    @staticmethod
    def third(weights: Any, u: Array, v: Array) -> Array:
        """Third derivative of each loss along u and v."""
        return jnp.zeros_like(u)

    @staticmethod
    def hessian(A: Array, weights: Any, shape: tuple[int, ...]) -> Array:
        """Hessian of the sum of the losses in x, rows of x varying slowest."""
        return gram(A) if len(shape) == 1 else jnp.kron(gram(A), jnp.eye(shape[1], dtype=A.dtype))

    @staticmethod
    def diagonal(A: Array, weights: Any, shape: tuple[int, ...]) -> Array:
        """Its diagonal, in the shape of x."""
        squares = jnp.sum(A * A, axis=0)
        return squares if len(shape) == 1 else jnp.broadcast_to(squares[:, None], shape)


class Logistic:
    r"""Logistic losses $\ell(t, b) = \log(1 + e^{-bt})$ with b = -1 or 1."""

    smoothness: ClassVar[float] = 0.25

    @staticmethod
    def value(t: Array, b: Array) -> Array:
        return jnp.sum(jax.nn.softplus(-b * t))

    @staticmethod
    def slope(t: Array, b: Array) -> Array:
        return -b * jax.nn.sigmoid(-b * t)

    @staticmethod
    def weights(t: Array) -> Any:
        up, down = jax.nn.sigmoid(t), jax.nn.sigmoid(-t)  # 1 - up in place of down cancels in float32
        return up * down, up * down * (down - up)

    @staticmethod
    def second(weights: Any, u: Array) -> Array:
        return weights[0] * u

    @staticmethod
    def third(weights: Any, u: Array, v: Array) -> Array:
        return weights[1] * u * v

    @staticmethod
    def hessian(A: Array, weights: Any, shape: tuple[int, ...]) -> Array:
        return gram(A, weights[0])

    @staticmethod
    def diagonal(A: Array, weights: Any, shape: tuple[int, ...]) -> Array:
        return pull(A * A, weights[0])


class Softmax:
    r"""Cross-entropies $\ell(t, b) = \log \sum_k e^{t_k} - b^\top t$ with one-hot b; the weights are the probabilities."""

    smoothness: ClassVar[float] = 0.5

    @staticmethod
    def value(t: Array, b: Array) -> Array:
        return jnp.sum(jax.nn.logsumexp(t, axis=1) - jnp.sum(b * t, axis=1))

    @staticmethod
    def slope(t: Array, b: Array) -> Array:
        return jax.nn.softmax(t, axis=1) - b

    @staticmethod
    def weights(t: Array) -> Any:
        return jax.nn.softmax(t, axis=1)

    @staticmethod
    def second(weights: Any, u: Array) -> Array:
        return weights * _centered(weights, u)

    @staticmethod
    def third(weights: Any, u: Array, v: Array) -> Array:
        return weights * _centered(weights, _centered(weights, u) * _centered(weights, v))

    @staticmethod
    def hessian(A: Array, weights: Any, shape: tuple[int, ...]) -> Array:
        p, q = shape

        def rows(k: Array) -> Array:  # one class at a time: all at once would need N p q^2 numbers
            coupling = weights[:, k, None] * (jnp.eye(q, dtype=A.dtype)[k] - weights)
            return A.T @ (A[:, :, None] * coupling[:, None, :]).reshape(-1, p * q)

        return lax.map(rows, jnp.arange(q)).transpose(1, 0, 2).reshape(p * q, p * q)

    @staticmethod
    def diagonal(A: Array, weights: Any, shape: tuple[int, ...]) -> Array:
        return pull(A * A, weights * (1 - weights))


def _centered(weights: Array, u: Array) -> Array:
    return u - jnp.sum(weights * u, axis=1, keepdims=True)


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """`value` as the pair (features, targets)."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ArgumentError(f"{name} must be a pair (features, targets), got {type(value).__name__}"
                            + (f" of length {len(value)}" if hasattr(value, "__len__") else ""))
    return value[0], value[1]


def signs(name: str, b: Any, A: Array) -> Array:
    """Labels -1 and 1 of the rows of A, of any dtype, in the dtype of A."""
    labels = checks.array(name, b, (len(A),)).astype(A.dtype)
    if checks.known(labels):
        host = np.asarray(labels)
        bad = host[np.abs(host) != 1]
        if bad.size:
            raise ArgumentError(f"{name} must hold labels -1 and 1, got {bad[0]:g}; map labels 0 and 1 by 2 * b - 1")
    return labels


def warn_single_class(b: Array) -> None:
    """Say so if all training labels are equal: legal, and rarely meant."""
    if checks.known(b) and len(b) > 1 and bool(jnp.all(b == b[0])):
        warnings.warn(f"b of train holds the single class {float(b[0]):g}; only the penalty keeps x finite", stacklevel=3)


def top_eigenvalue(A: Array) -> Array:
    r"""The largest eigenvalue of $A^\top A$, by the smaller of the two Gram matrices."""
    return jnp.linalg.eigvalsh(gram(A) if A.shape[0] >= A.shape[1] else gram(A.T))[-1]
