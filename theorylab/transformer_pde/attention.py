"""Attention as a velocity field: what a token at x does, given the measure of all tokens; on particles and, exactly, on Gaussians."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from theorylab.core import tree
from theorylab.core.keys import Key, as_key, stream
from theorylab.core.module import number, square
from theorylab.core.problem import Problem
from theorylab.errors import ArgumentError, ShapeError, UnknownNameError
from theorylab.transformer_pde.gaussian import Cloud, Gaussian, _count_large, _floating, spectrum
from theorylab.transformer_pde.kernels import ridge_basis, solve_shifted, tiled_average

Array = jax.Array


class Velocity(NamedTuple):
    r"""The affine field $\Gamma(x) = m + B (x - \alpha)$ that attention is on a Gaussian.

    Attributes:
        mean: $m = \Gamma(\alpha)$, shape `(dim,)`.
        matrix: $B$, shape `(dim, dim)`.
    """

    mean: Array
    matrix: Array


class Attention(Problem):
    r"""The contract of an attention variant: a velocity $\Gamma_\mu(x)$ for every measure $\mu$ of tokens.

    A variant that keeps Gaussians Gaussian has `velocity` and `factor_velocity`; every variant has `token_velocity`. As a `Problem` it measures
    a Gaussian under its layers, so `iterate(attention, ResidualLayers(step_size), state, steps=depth)` runs a network of finite depth.
    """

    degree: ClassVar[int | None] = None
    """Degree in the covariance of its velocity when it is homogeneous (2 for softmax), else None."""

    @property
    def dim(self) -> int:
        """Dimension of a token."""
        raise NotImplementedError

    def velocity(self, mean: Array, cov: Array) -> Velocity:
        """The exact velocity on a Gaussian, from its covariance."""
        raise NotImplementedError(f"{type(self).__name__} does not map Gaussians to Gaussians")

    def factor_velocity(self, mean: Array, factor: Array) -> tuple[Array, Array]:
        """The derivatives $(m, B L)$ of mean and factor; no root or inverse of the covariance is formed."""
        raise NotImplementedError(f"{type(self).__name__} does not map Gaussians to Gaussians")

    def rate_bound(self, trace: Array) -> Array:
        r"""A bound of $\|B\|$ for covariances of this trace, from norms of the weights: the unit of rates."""
        raise NotImplementedError(f"{type(self).__name__} does not map Gaussians to Gaussians")

    def key_size(self, factor: Array) -> Array:
        r"""The trace of $L^\top P L$: where it is large, rounding hides the directions that keys do not see."""
        return jnp.zeros((), factor.dtype)

    def token_velocity(self, points: Array, weights: Array | None = None, queries: Array | None = None, tile: int = 1024) -> tuple[Array, Array]:
        """Velocity at each query (default: at each token) and the effective sample size of its average, in memory linear in the tokens."""
        raise NotImplementedError

    def start(self, key: Key) -> Gaussian:
        """The standard Gaussian."""
        return Gaussian.standard(self.dim)

    def metrics(self, x: Gaussian) -> dict[str, Array]:
        r"""`eigenvalues`, `rank`, `trace` and `mean` of the state, and `residual`, the Frobenius norm of $\Sigma'$."""
        matrix = self.velocity(x.mean, x.cov).matrix
        moved = matrix @ x.cov
        return {**state_metrics(x), "residual": jnp.linalg.norm(moved + moved.T)}


class _Kernel(Attention):
    """A single head with a normalized exponential kernel: softmax and L2 differ in the gain and in the bias of a key only."""

    Q: Array
    K: Array
    V: Array
    scale: Any = number(1.0, above=0.0)
    _logit_factor: ClassVar[int] = 1

    def __init__(self, Q: Any, K: Any, V: Any, scale: Any = 1.0):
        self.Q, self.K, self.V = _floating("Q", Q), _floating("K", K), _floating("V", V)
        self.scale = scale
        self._check_shapes()

    def _check_shapes(self) -> None:
        if self.Q.ndim != 2:
            raise ShapeError(f"Q must have shape (k, dim), got {self.Q.shape}")
        if self.K.shape != self.Q.shape:
            raise ShapeError(f"K must have the shape {self.Q.shape} of Q, got {self.K.shape}")
        if self.V.ndim:
            square("V", self.V, self.dim)

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

    def _gain(self, factor: Float[Array, "d r"], queries: Float[Array, "k n"]) -> Float[Array, "r n"]:
        raise NotImplementedError

    def _mean_query(self, mean: Float[Array, "d"]) -> Float[Array, "k 1"]:
        raise NotImplementedError

    def _key_bias(self, keys: Float[Array, "n k"]) -> Float[Array, "n"]:
        raise NotImplementedError

    def gain(self, factor: Float[Array, "d r"]) -> Float[Array, "r r"]:
        r"""The matrix $G$ of the factor form $L' = V L\, G(L)$."""
        return self._gain(factor, self.Q @ factor)

    def factor_velocity(self, mean: Float[Array, "d"], factor: Float[Array, "d r"]) -> tuple[Float[Array, "d"], Float[Array, "d r"]]:
        gains = self._gain(factor, jnp.concatenate([self.Q @ factor, self._mean_query(mean)], axis=1))
        moved = self._value(factor @ gains)
        return self._value(mean) + moved[:, -1], moved[:, :-1]

    def token_velocity(self, points: Float[Array, "n d"], weights: Float[Array, "n"] | None = None, queries: Float[Array, "m d"] | None = None,
                       tile: int = 1024) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
        keys = points @ self.K.T
        asked = self._logit_factor * self.scale * ((points if queries is None else queries) @ self.Q.T)
        bias = self._key_bias(keys) if weights is None else self._key_bias(keys) + jnp.log(weights)
        average, sample_size = tiled_average(asked, keys, bias, points, tile)
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
        >>> head = Softmax(jnp.eye(2), jnp.eye(2), 1.0)
        >>> velocity(head, Gaussian.standard(2)).matrix.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    degree: ClassVar[int | None] = 2

    def __init__(self, Q: Any, K: Any, V: Any, scale: Any = 1.0):
        super().__init__(Q, K, V, scale)

    @classmethod
    def bilinear(cls, A: Any, V: Any, scale: Any = 1.0) -> Softmax:
        r"""The head with logit $(A x) \cdot y$: queries `A`, keys the identity.

        Example:
            >>> Softmax.bilinear(A=jnp.diag(jnp.array([1.0, 0.5])), V=-jnp.eye(2)).A.tolist()
            [[1.0, 0.0], [0.0, 0.5]]
        """
        form = square("A", _floating("A", A))
        return cls(form, jnp.eye(form.shape[0], dtype=form.dtype), V, scale)

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
        >>> head = L2(jnp.eye(2), jnp.eye(2), 1.0, scale=0.5)
        >>> velocity(head, Gaussian.standard(2)).matrix.tolist()
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


def velocity(attention: Attention, state: Gaussian) -> Velocity:
    r"""The exact velocity $\Gamma(x) = m + B(x - \alpha)$ of `attention` on the Gaussian `state`.

    Args:
        attention: a variant that maps Gaussians to Gaussians.
        state: one Gaussian, without leading axes.

    Raises:
        ShapeError: the dimensions differ, or `state` has leading axes.

    Example:
        >>> velocity(Softmax(jnp.eye(2), jnp.eye(2), 2.0), Gaussian(jnp.ones(2), jnp.eye(2))).mean.tolist()
        [4.0, 4.0]
    """
    check_state(attention, state, Gaussian)
    return attention.velocity(state.mean, state.cov)


def random_attention(kind: str, key: Key | int, dim: int, rank: int | None = None, scale: float = 1.0) -> Attention:
    """A head whose matrices have independent normal entries of variance `1 / dim`.

    Args:
        kind: `"softmax"` or `"l2"`.
        key: random key or seed.
        dim: dimension of a token.
        rank: rows of the query and key matrices; `dim` unless given.
        scale: the logit scale.

    Raises:
        UnknownNameError: `kind` is not known.

    Example:
        >>> random_attention("softmax", 0, dim=4, rank=2).Q.shape
        (2, 4)
    """
    kinds = {"softmax": Softmax, "l2": L2}
    if kind not in kinds:
        raise UnknownNameError.of("attention", kind, kinds)
    rows = dim if rank is None else rank
    for name, value in (("dim", dim), ("rank", rows)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{name} must be a whole number of at least 1, got {value!r}")
    draw = lambda name, m: jax.random.normal(stream(as_key(key), f"attention.{name}"), (m, dim)) / math.sqrt(dim)  # noqa: E731
    return kinds[kind](draw("Q", rows), draw("K", rows), draw("V", dim), scale)


def state_metrics(state: Gaussian) -> dict[str, Array]:
    """What is recorded of a Gaussian along a run."""
    values = spectrum(state)
    return {"eigenvalues": values, "rank": _count_large(values), "trace": values.sum(-1), "mean": state.mean}


def check_state(attention: Attention, state: Any, kind: type) -> None:
    """Raise unless `state` is one Gaussian (or cloud) of the dimension of `attention`."""
    if not isinstance(attention, Attention):
        raise ArgumentError(f"attention must be a Softmax, an L2 or another Attention, got {type(attention).__name__}")
    if not isinstance(state, kind):
        raise ArgumentError(f"state must be a {kind.__name__}, got {type(state).__name__}")
    if state.dim != attention.dim:
        raise ShapeError(f"state must have dimension {attention.dim} to match the attention, got {state.dim}")
    lead = state.points.ndim - 2 if isinstance(state, Cloud) else state.mean.ndim - 1
    if lead:
        raise ShapeError("state must have no leading axes here, got shape "
                         f"{state.points.shape if isinstance(state, Cloud) else state.mean.shape}; use jax.vmap over it")


def is_concrete(*trees: Any) -> bool:
    """Whether values may be looked at: nothing is traced."""
    return not tree.is_traced(*trees)
