"""Networks of finite depth on a Gaussian, as methods for `iterate`: the exact residual network, and the published Euler scheme."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from theorylab.core.module import number
from theorylab.core.problem import Method
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.contract import Attention, check_attention
from theorylab.transformer_pde.gaussian import Cloud, Gaussian, _symmetric

Array = jax.Array

CLIP = 1e-14
"""What the published scheme puts in the place of a negative eigenvalue."""


class Depth(NamedTuple):
    """A state and the number of layers behind it."""

    state: Any
    layer: Array


def _check(attention: Any, state: Any, kinds: tuple[type, ...]) -> Any:
    check_attention(attention, "problem")
    if not isinstance(state, kinds):
        raise ArgumentError(f"x0 must be a {' or a '.join(kind.__name__ for kind in kinds)}, got {type(state).__name__}")
    if state.dim != attention.dim:
        raise ShapeError(f"x0 must have dimension {attention.dim} to match the attention, got {state.dim}")
    return state


class ResidualLayers(Method):
    r"""One step is one residual layer $x \mapsto x + h\,\Gamma(x)$ of a Transformer: exact on a Gaussian, and the network itself on a `Cloud`.

    With $m$ and $B$ of the state before the layer: $\alpha \leftarrow \alpha + h m$, $L \leftarrow (I + hB) L$. The covariance stays positive
    semidefinite for any $h$, and the state converges to the flow at first order. On `Layered` weights, layer $l$ uses those in force at depth
    $(l + \tfrac12) h$.

    Args:
        step_size: $h$, the depth of a layer; 1 for a network as it is used.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> head = tp.Softmax(jnp.eye(2), jnp.eye(2), -1.0)
        >>> network = tl.iterate(head, tp.ResidualLayers(0.01), tp.Gaussian.standard(2), steps=100)
        >>> round(float(network.value.cov[0, 0]), 3)                      # the flow reaches 1/3
        0.331
    """

    step_size: Any = number(above=0.0)

    def init(self, problem: Attention, x0: Gaussian | Cloud, *, key: Array) -> Depth:
        state = _check(problem, x0, (Gaussian, Cloud))
        return Depth(state if isinstance(state, Cloud) else Gaussian._raw(state.mean, state.factor, None), jnp.zeros((), jnp.int32))

    def step(self, problem: Attention, state: Depth, *, key: Array) -> Depth:
        x, layer = state
        h = self.step_size
        if isinstance(x, Cloud):
            attention = problem.at((layer.astype(x.points.dtype) + 0.5) * h)
            moved = attention.token_velocity(x.points, x._weights)[0]
            return Depth(Cloud._raw(x.points + h * moved, x._weights), layer + 1)
        attention = problem.at((layer.astype(x.mean.dtype) + 0.5) * h)
        mean, moved = attention.factor_velocity(x.mean, x.factor)
        return Depth(Gaussian._raw(x.mean + h * mean, x.factor + h * moved, None), layer + 1)

    def value(self, problem: Attention, state: Depth) -> Gaussian | Cloud:
        return state.state


class OfficialEuler(Method):
    r"""The published scheme: an Euler step of $\Sigma' = B\Sigma + \Sigma B^\top$, then every negative eigenvalue is replaced by 1e-14.

    It drops the $h^2 B \Sigma B^\top$ of a layer, so it is not the network and can leave the cone; a clip destroys the rank for good. It is here for
    comparison. The published stopping index counts the step that stops: it is `steps` for a run that converged
    (`Below("residual", ...)`) and `steps - 1` for one that exploded (`Above("trace", ...)`).

    Args:
        step_size: the Euler step.
    """

    step_size: Any = number(above=0.0)

    def init(self, problem: Attention, x0: Gaussian, *, key: Array) -> Gaussian:
        state = _check(problem, x0, (Gaussian,))
        return Gaussian._raw(state.mean, None, state.cov)

    def step(self, problem: Attention, state: Gaussian, *, key: Array) -> Gaussian:
        mean, matrix = problem.velocity(state.mean, state.cov)
        cov = _clip(state.cov + 2 * self.step_size * _symmetric(matrix @ state.cov))
        return Gaussian._raw(state.mean + self.step_size * mean, None, cov)

    def value(self, problem: Attention, state: Gaussian) -> Gaussian:
        return state


def _clip(cov: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """`cov` with negative eigenvalues replaced by `CLIP`; 2 x 2 in closed form, because the published figures take millions of such steps."""
    if cov.shape[0] != 2:
        values, vectors = jnp.linalg.eigh(cov)
        values = jnp.where(values < 0, jnp.asarray(CLIP, values.dtype), values)
        return _symmetric((vectors * values) @ vectors.T)
    mean, radius = (cov[0, 0] + cov[1, 1]) / 2, jnp.hypot((cov[0, 0] - cov[1, 1]) / 2, cov[0, 1])
    low, high = mean - radius, mean + radius
    eye = jnp.eye(2, dtype=cov.dtype)
    top = jnp.where(radius > 0, (cov - low * eye) / jnp.where(radius > 0, 2 * radius, 1.0), eye / 2)      # projection on the top eigenvector
    return jnp.where(low < 0, jnp.where(high < 0, CLIP, high) * top + CLIP * (eye - top), cov)
