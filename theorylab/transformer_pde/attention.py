"""Single attention heads that keep Gaussians Gaussian and need one matrix product or one ridge system: softmax, L2 and linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from theorylab.core.module import number, square
from theorylab.errors import ShapeError
from theorylab.transformer_pde.contract import (
    Attention as Attention,
    Velocity as Velocity,
    check_state as check_state,
    is_concrete as is_concrete,
    state_metrics as state_metrics,
    velocity as velocity,
)
from theorylab.transformer_pde.gaussian import _floating
from theorylab.transformer_pde.kernels import ridge_basis, solve_shifted, tiled_average, tiled_sum
from theorylab.transformer_pde.ring import cumulative, total

Array = jax.Array


def _scalar(name: str, value: Any) -> Any:
    """`value`, which is one number."""
    if np.ndim(value):
        raise ShapeError(f"{name} must be one number, got shape {np.shape(value)}")
    return value


class Head(Attention):
    """One head: queries, keys and values, and the logit scale."""

    Q: Array
    K: Array
    V: Array
    scale: Any = number(1.0, above=0.0)

    def __init__(self, Q: Any, K: Any, V: Any, scale: Any = 1.0):
        self.Q, self.K, self.V = _floating("Q", Q), _floating("K", K), _floating("V", V)
        self.scale = _scalar("scale", scale)
        if self.Q.ndim != 2:
            raise ShapeError(f"Q must have shape (k, dim), got {self.Q.shape}")
        if self.K.shape != self.Q.shape:
            raise ShapeError(f"K must have the shape {self.Q.shape} of Q, got {self.K.shape}")
        if self.V.ndim:
            square("V", self.V, self.dim)

    @classmethod
    def bilinear(cls, A: Any, V: Any, scale: Any = 1.0, **options: Any) -> Self:
        r"""The head with logit $(A x) \cdot y$: queries `A`, keys the identity, so that $P = cI$ for L2. `options` go to the class.

        Example:
            >>> Softmax.bilinear(A=jnp.diag(jnp.array([1.0, 0.5])), V=-jnp.eye(2)).A.tolist()
            [[1.0, 0.0], [0.0, 0.5]]
        """
        form = square("A", _floating("A", A))
        return cls(form, jnp.eye(form.shape[0], dtype=form.dtype), V, scale, **options)

    @property
    def dim(self) -> int:
        """Dimension of a token."""
        return self.Q.shape[1]

    @property
    def A(self) -> Array:
        r"""The logit matrix $A = c K^\top Q$; the logit of query x and key y is $(A x) \cdot y$."""
        return self.scale * (self.K.T @ self.Q)

    @property
    def P(self) -> Array:
        r"""The Gram matrix of the keys, $P = c K^\top K$."""
        return self.scale * (self.K.T @ self.K)

    @property
    def value_matrix(self) -> Array:
        """$V$ as a matrix, also when it was given as a number."""
        return self.V if self.V.ndim else self.V * jnp.eye(self.dim, dtype=self.V.dtype)

    def _weight_size(self) -> Array:
        return jnp.linalg.norm(self.value_matrix) * jnp.linalg.norm(self.A)

    def _value(self, columns: Array) -> Array:
        return self.V @ columns if self.V.ndim else self.V * columns

    def gain(self, factor: Float[Array, "d r"]) -> Float[Array, "r r"]:
        r"""The matrix $G$ of the factor form $L' = V L\, G(L)$."""
        raise NotImplementedError

    def _value_sum(self, activation: Callable[[Array], Array], points: Array, weights: Array | None, queries: Array | None, tile: int,
                   causal: bool) -> tuple[Array, Array]:
        r"""$\sum_j w_j\, a(\ell_{ij}) V x_j$ for an activation that is not normalized, and the number of tokens that count."""
        w = jnp.full(points.shape[0], 1 / points.shape[0], points.dtype) if weights is None else weights
        asked = self.scale * ((points if queries is None else queries) @ self.Q.T)
        summed = tiled_sum(asked, points @ self.K.T, w[:, None] * points, tile, activation, causal)
        mass, square_mass = (cumulative(w), cumulative(w * w)) if causal else (total(w.sum())[None], total((w * w).sum())[None])
        moved = summed / mass[:, None] if causal else summed                      # the past is a measure of its own
        return self._value(moved.T).T, jnp.broadcast_to(mass**2 / square_mass, moved.shape[:1])


class _Kernel(Head):
    """A head with a normalized exponential kernel: softmax and L2 differ in the gain and in the bias of a key only."""

    _logit_factor: ClassVar[int] = 1

    def _gain(self, factor: Float[Array, "d r"], queries: Float[Array, "k n"]) -> Float[Array, "r n"]:
        raise NotImplementedError

    def _mean_query(self, mean: Float[Array, "d"]) -> Float[Array, "k 1"]:
        raise NotImplementedError

    def _key_bias(self, keys: Float[Array, "n k"]) -> Float[Array, "n"]:
        raise NotImplementedError

    def gain(self, factor: Float[Array, "d r"]) -> Float[Array, "r r"]:
        return self._gain(factor, self.Q @ factor)

    def factor_velocity(self, mean: Float[Array, "d"], factor: Float[Array, "d r"]) -> tuple[Float[Array, "d"], Float[Array, "d r"]]:
        gains = self._gain(factor, jnp.concatenate([self.Q @ factor, self._mean_query(mean)], axis=1))
        moved = self._value(factor @ gains)
        return self._value(mean) + moved[:, -1], moved[:, :-1]

    def token_velocity(self, points: Float[Array, "n d"], weights: Float[Array, "n"] | None = None, queries: Float[Array, "m d"] | None = None,
                       tile: int = 1024, causal: bool = False) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
        keys = points @ self.K.T
        asked = self._logit_factor * self.scale * ((points if queries is None else queries) @ self.Q.T)
        bias = self._key_bias(keys) if weights is None else self._key_bias(keys) + jnp.log(weights)
        average, sample_size = tiled_average(asked, keys, bias, points, tile, causal)
        return self._value(average.T).T, sample_size


class Softmax(_Kernel):
    r"""Softmax attention, $\Gamma_\mu(x) = \int e^{c\langle Qx, Ky\rangle} V y\,d\mu(y) \big/ \int e^{c\langle Qx, Ky\rangle} d\mu(y)$.

    On $\mathcal N(\alpha, \Sigma)$, with $A = c K^\top Q$: $m = V(\alpha + \Sigma A \alpha)$, $B = V \Sigma A$ (paper, softmax on Gaussians).

    Args:
        Q: queries, shape `(k, dim)`.
        K: keys, shape `(k, dim)`.
        V: values, shape `(dim, dim)`; a number `v` stands for `v` times the identity, which the closed forms recognize by its shape.
        scale: the logit scale $c$; networks use `1 / sqrt(k)`.

    Raises:
        ShapeError: the shapes do not match.
        NonFiniteInputError: an entry is NaN or infinite.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> head = tp.Softmax(jnp.eye(2), jnp.eye(2), 1.0)
        >>> tp.velocity(head, tp.Gaussian.standard(2)).matrix.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, Q: Any, K: Any, V: Any, scale: Any = 1.0):
        super().__init__(Q, K, V, scale)

    @property
    def degree(self) -> int:
        """2: the covariance moves with the square of its size."""
        return 2

    def velocity(self, mean: Float[Array, "d"], cov: Float[Array, "d d"]) -> Velocity:
        pulled = self.scale * (cov @ self.K.T)
        return Velocity(self._value(mean + pulled @ (self.Q @ mean)), self._value(pulled @ self.Q))

    def rate_bound(self, trace: Array) -> Array:
        return self._weight_size() * trace

    def _gain(self, factor: Float[Array, "d r"], queries: Float[Array, "k n"]) -> Float[Array, "r n"]:
        return self.scale * ((self.K @ factor).T @ queries)

    def _mean_query(self, mean: Float[Array, "d"]) -> Float[Array, "k 1"]:
        return (self.Q @ mean)[:, None]

    def _key_bias(self, keys: Float[Array, "n k"]) -> Float[Array, "n"]:
        return jnp.zeros_like(keys[:, 0])


class L2(_Kernel):
    r"""L2 attention, $\Gamma_\mu(x) = \int e^{-c|Qx-Ky|^2} V y\,d\mu(y) \big/ \int e^{-c|Qx-Ky|^2} d\mu(y)$.

    On $\mathcal N(\alpha, \Sigma)$, with $A = c K^\top Q$ and $P = c K^\top K$: $m = V (I + 2\Sigma P)^{-1}(\alpha + 2\Sigma A\alpha)$ and
    $B = 2 V (I + 2\Sigma P)^{-1}\Sigma A$ (paper, L2 attention on Gaussians). Arguments and errors are those of `Softmax`.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> head = tp.L2(jnp.eye(2), jnp.eye(2), 1.0, scale=0.5)
        >>> tp.velocity(head, tp.Gaussian.standard(2)).matrix.tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """

    _logit_factor: ClassVar[int] = 2                 # -|Qx - Ky|^2 = 2 <Qx, Ky> - |Ky|^2 - |Qx|^2, and the last term cancels

    def __init__(self, Q: Any, K: Any, V: Any, scale: Any = 1.0):
        super().__init__(Q, K, V, scale)

    def velocity(self, mean: Float[Array, "d"], cov: Float[Array, "d d"]) -> Velocity:
        # (I + 2 S P)^-1 S K^T = S K^T (I + 2c K S K^T)^-1: a symmetric k x k system instead of a general d x d one
        pulled = cov @ self.K.T
        right = jnp.concatenate([self.Q, self._mean_query(mean)], axis=1)
        moved = self._value(2 * self.scale * (pulled @ solve_shifted(2 * self.scale * (self.K @ pulled), right)))
        return Velocity(self._value(mean) + moved[:, -1], moved[:, :-1])

    def rate_bound(self, trace: Array) -> Array:
        return 2 * self._weight_size() * trace / (1 + 2 * jnp.linalg.norm(self.P) * trace)

    def key_size(self, factor: Array) -> Array:
        keys = self.K @ factor
        return self.scale * (keys * keys).sum()

    def _gain(self, factor: Float[Array, "d r"], queries: Float[Array, "k n"]) -> Float[Array, "r n"]:
        keys = self.K @ factor
        root = jnp.sqrt(2 * self.scale).astype(keys.dtype)
        upper, lower = ridge_basis(root * (keys.T if keys.shape[0] <= keys.shape[1] else keys))
        if keys.shape[0] <= keys.shape[1]:
            return root * (upper @ (lower.T @ queries))
        return root * (lower @ (upper.T @ queries))

    def _mean_query(self, mean: Float[Array, "d"]) -> Float[Array, "k 1"]:
        return ((self.Q - self.K) @ mean)[:, None]

    def _key_bias(self, keys: Float[Array, "n k"]) -> Float[Array, "n"]:
        return -self.scale * (keys * keys).sum(1)


class Linear(Head):
    r"""Linear attention, $\Gamma_\mu(x) = \int c\langle Qx, Ky\rangle V y\,d\mu(y) = V(\Sigma + \alpha\alpha^\top) A x$ for any measure.

    Gaussians stay Gaussian, and the moment equations are exact for every measure with these moments (companion derivation). Here alone the mean acts
    on the covariance. At zero mean the velocity is that of softmax. Arguments and errors are those of `Softmax`.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> head = tp.Linear(jnp.eye(2), jnp.eye(2), 1.0)
        >>> tp.velocity(head, tp.Gaussian(jnp.array([1.0, 0.0]), jnp.eye(2))).matrix.tolist()
        [[2.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, Q: Any, K: Any, V: Any, scale: Any = 1.0):
        super().__init__(Q, K, V, scale)

    @property
    def degree(self) -> int:
        """2, at zero mean."""
        return 2

    @property
    def feels_mean(self) -> bool:
        """True: the second moment about zero drives the covariance."""
        return True

    def velocity(self, mean: Float[Array, "d"], cov: Float[Array, "d d"]) -> Velocity:
        matrix = self._value((self.scale * ((cov + jnp.outer(mean, mean)) @ self.K.T)) @ self.Q)
        return Velocity(matrix @ mean, matrix)

    def factor_velocity(self, mean: Float[Array, "d"], factor: Float[Array, "d r"]) -> tuple[Float[Array, "d"], Float[Array, "d r"]]:
        columns = jnp.concatenate([factor, mean[:, None]], axis=1)
        moved = self._value(columns @ self.gain(columns))
        return moved[:, -1], moved[:, :-1]

    def gain(self, factor: Float[Array, "d r"]) -> Float[Array, "r r"]:
        return self.scale * ((self.K @ factor).T @ (self.Q @ factor))

    def rate_bound(self, trace: Array) -> Array:
        return self._weight_size() * trace

    def token_velocity(self, points: Float[Array, "n d"], weights: Float[Array, "n"] | None = None, queries: Float[Array, "m d"] | None = None,
                       tile: int = 1024, causal: bool = False) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
        if causal:
            return self._value_sum(lambda logit: logit, points, weights, queries, tile, causal)
        w = jnp.full(points.shape[0], 1 / points.shape[0], points.dtype) if weights is None else weights
        asked = self.scale * ((points if queries is None else queries) @ self.Q.T)
        moved = asked @ total((points @ self.K.T).T @ (w[:, None] * points))                  # sums over the tokens first: linear cost
        return self._value(moved.T).T, jnp.broadcast_to(total(w.sum()) ** 2 / total((w * w).sum()), moved.shape[:1])
