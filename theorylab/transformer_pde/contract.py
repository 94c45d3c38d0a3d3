"""What an attention variant is: a velocity field for every measure of tokens, exact on Gaussians where it keeps them Gaussian."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from theorylab.core import tree
from theorylab.core.keys import Key
from theorylab.core.problem import Problem
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.gaussian import Cloud, Gaussian, _count_large, _moments, spectrum

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

    A variant that keeps Gaussians Gaussian has `velocity` and `factor_velocity`; every variant has `token_velocity`. As a `Problem` it measures a
    Gaussian or a cloud under its layers, so `iterate(attention, ResidualLayers(step_size), state, steps=depth)` runs a network of finite depth.
    """

    @property
    def degree(self) -> int | None:
        """Degree in the covariance of its velocity when it is homogeneous (2 for softmax), else None."""
        return None

    @property
    def feels_mean(self) -> bool:
        """Whether the mean acts on the covariance."""
        return False

    @property
    def keeps_gaussians(self) -> bool:
        """Whether a Gaussian stays Gaussian; only then are `velocity` and `factor_velocity` defined."""
        return True

    @property
    def dim(self) -> int:
        """Dimension of a token."""
        raise NotImplementedError

    def at(self, t: Any) -> Attention:
        """The attention in force at depth `t`: itself, unless its weights change with depth."""
        return self

    def velocity(self, mean: Array, cov: Array) -> Velocity:
        """The exact velocity on a Gaussian, from its covariance."""
        raise ArgumentError(f"{type(self).__name__} does not map Gaussians to Gaussians: follow tokens with Particles, or a moment_closure")

    def factor_velocity(self, mean: Array, factor: Array) -> tuple[Array, Array]:
        """The derivatives $(m, B L)$ of mean and factor; no root or inverse of the covariance is formed."""
        raise ArgumentError(f"{type(self).__name__} does not map Gaussians to Gaussians: follow tokens with Particles, or a moment_closure")

    def rate_bound(self, trace: Array) -> Array:
        r"""A bound of $\|B\|$ for covariances of this trace and zero mean, from norms of the weights: the unit of rates."""
        raise ArgumentError(f"{type(self).__name__} does not map Gaussians to Gaussians: follow tokens with Particles, or a moment_closure")

    def key_size(self, factor: Array) -> Array:
        r"""The trace of $L^\top P L$: where it is large, rounding hides the directions that keys do not see."""
        return jnp.zeros((), factor.dtype)

    def token_velocity(self, points: Array, weights: Array | None = None, queries: Array | None = None, tile: int = 1024,
                       causal: bool = False) -> tuple[Array, Array]:
        """Velocity at each query (default: at each token) and the effective sample size of its average, in memory linear in the tokens.

        With `causal`, token i averages over the tokens up to itself.
        """
        raise NotImplementedError

    def start(self, key: Key) -> Gaussian:
        """The standard Gaussian."""
        return Gaussian.standard(self.dim)

    def metrics(self, x: Gaussian | Cloud) -> dict[str, Array]:
        r"""`eigenvalues`, `rank`, `trace` and `mean` of the state, and of a Gaussian `residual`, the Frobenius norm of $\Sigma'$."""
        if isinstance(x, Cloud):
            return cloud_metrics(x)
        matrix = self.velocity(x.mean, x.cov).matrix
        moved = matrix @ x.cov
        return {**state_metrics(x), "residual": jnp.linalg.norm(moved + moved.T)}


def velocity(attention: Attention, state: Gaussian) -> Velocity:
    r"""The exact velocity $\Gamma(x) = m + B(x - \alpha)$ of `attention` on the Gaussian `state`.

    Args:
        attention: a variant that maps Gaussians to Gaussians.
        state: one Gaussian, without leading axes.

    Raises:
        ShapeError: the dimensions differ, or `state` has leading axes.
        ArgumentError: the variant does not keep Gaussians Gaussian; `moment_closure` is the approximation for those.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> tp.velocity(tp.Softmax(jnp.eye(2), jnp.eye(2), 2.0), tp.Gaussian(jnp.ones(2), jnp.eye(2))).mean.tolist()
        [4.0, 4.0]
    """
    check_state(attention, state, Gaussian)
    return attention.velocity(state.mean, state.cov)


def state_metrics(state: Gaussian) -> dict[str, Array]:
    """What is recorded of a Gaussian along a run."""
    values = spectrum(state)
    return {"eigenvalues": values, "rank": _count_large(values), "trace": values.sum(-1), "mean": state.mean}


def cloud_metrics(cloud: Cloud) -> dict[str, Array]:
    """What is recorded of the moments of a cloud along a run."""
    mean, cov = _moments(cloud)
    values = jnp.linalg.eigvalsh(cov)
    return {"eigenvalues": values, "rank": _count_large(values), "trace": values.sum(), "mean": mean}


def check_attention(attention: Any, name: str = "attention") -> None:
    """Raise unless this is an attention variant."""
    if not isinstance(attention, Attention):
        raise ArgumentError(f"{name} must be a Softmax, an L2 or another Attention, got {type(attention).__name__}")


def check_state(attention: Attention, state: Any, kind: type) -> None:
    """Raise unless `state` is one Gaussian (or cloud) of the dimension of `attention`."""
    check_attention(attention)
    if not isinstance(state, kind):
        raise ArgumentError(f"state must be a {kind.__name__}, got {type(state).__name__}")
    if state.dim != attention.dim:
        raise ShapeError(f"state must have dimension {attention.dim} to match the attention, got {state.dim}")
    lead = state.points.ndim - 2 if isinstance(state, Cloud) else state.mean.ndim - 1
    if lead:
        raise ShapeError("state must have no leading axes here, got shape "
                         f"{state.points.shape if isinstance(state, Cloud) else state.mean.shape}; use jax.vmap over it")


def check_single(lead: tuple[int, ...]) -> None:
    """Raise if a state has leading axes; a flow moves one state at a time."""
    if lead:
        raise ShapeError(f"the state must have no leading axes here, got {lead}; integrate takes a batch with runs={lead[0]}")


def is_concrete(*trees: Any) -> bool:
    """Whether values may be looked at: nothing is traced."""
    return not tree.is_traced(*trees)
