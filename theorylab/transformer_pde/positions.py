r"""Causal attention on one Gaussian for each position: a token at position $s$ averages over the tokens at positions $s' \le s$."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from theorylab.core import checks
from theorylab.core.module import size
from theorylab.core.problem import Flow
from theorylab.core.psd import bures_squared
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.attention import L2, Linear, Softmax
from theorylab.transformer_pde.combined import FeedForward, Masked, MultiHead
from theorylab.transformer_pde.contract import Attention, check_attention, state_metrics
from theorylab.transformer_pde.gaussian import Gaussian

Array = jax.Array

ORDERS = {1: 32, 2: 16, 3: 8}
"""Gauss--Hermite nodes per axis for so many columns of the factor; above three columns, sigma points."""


def mixture_velocity(attention: Attention, states: Gaussian, points: Any, theta: Any = None) -> Array:
    r"""The exact velocity of masked attention at `points`, when the tokens of position $j$ have the law $\mathcal N(\alpha_j, \Sigma_j)$.

    A token at position $i$ sees the Gaussian mixture of the positions $j \le i$, and tilting a mixture by an exponential gives a mixture. For softmax

    $$ \Gamma_i(x) = V \sum_{j \le i} \omega_j(x)\,(\alpha_j + \Sigma_j A x), \qquad
       \omega_j(x) \propto \theta_j \exp\!\big(\alpha_j\cdot Ax + \tfrac12 (Ax)^\top \Sigma_j A x\big), $$

    for L2 with the tilted moments of L2 on a Gaussian for each component (masked attention is the paper's, this formula a companion derivation).
    The velocity is affine in $x$ only if all positions share one law, or for `Linear`, where $\Gamma_i(x) = V M_i A x$ with the second
    moment $M_i$ of the mixture.

    Args:
        attention: `Softmax`, `L2`, `Linear`, `FeedForward`, a `MultiHead` of these, or `Masked` around one.
        states: a Gaussian whose leading axis is the position, `count` of them.
        points: shape `(count, n, dim)`, the tokens asked about at each position.
        theta: shape `(count,)`, the weights of the positions; None means equal ones.

    Returns:
        Velocities of shape `(count, n, dim)`.

    Raises:
        ShapeError: `states` has not exactly one leading axis, or shapes do not match.
        ArgumentError: the attention has no mixture form, or `theta` is not positive.

    Example:
        >>> states = Gaussian(jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1, 1)))
        >>> mixture_velocity(Softmax(jnp.zeros((1, 1)), jnp.zeros((1, 1)), 1.0), states, jnp.zeros((2, 1, 1))).ravel().tolist()
        [1.0, 2.0]
    """
    attention = _unmasked(attention)
    _check_states(attention, states)
    points = checks.array("points", points, (states.mean.shape[0], None, states.dim))
    return _mixture(attention, states.mean, states.factor, points, _weights(theta, states.mean.shape[0], states.mean.dtype))


@jax.jit
def _mixture(attention: Attention, mean: Float[Array, "m d"], factor: Float[Array, "m d r"], points: Float[Array, "m n d"],
             theta: Float[Array, "m"]) -> Float[Array, "m n d"]:
    if isinstance(attention, MultiHead):
        return sum((_mixture(head, mean, factor, points, theta) for head in attention.heads), jnp.zeros_like(points))
    if isinstance(attention, FeedForward):
        return points @ attention.W.T + attention.b
    if isinstance(attention, Linear):
        return points @ attention.A.T @ _past_second_moment(mean, factor, theta) @ attention.value_matrix.T
    assert isinstance(attention, (Softmax, L2))
    twice = 2.0 if isinstance(attention, L2) else 1.0

    def component(mean: Array, factor: Array, theta: Array) -> tuple[Array, Array, Array, Array]:
        r"""Of one position: $\alpha$, $R^{-1} L^\top$ with $R R^\top = I + 2 L^\top P L$, $2 P\alpha$, and the constant of the log weight."""
        eye = jnp.eye(factor.shape[1], dtype=factor.dtype)
        keys = jnp.sqrt(2 * attention.scale).astype(factor.dtype) * (attention.K @ factor) if twice == 2 else jnp.zeros_like(factor)
        root = jnp.linalg.cholesky(eye + keys.T @ keys)
        narrow = jax.scipy.linalg.solve_triangular(root, factor.T, lower=True)
        pull = 2 * attention.scale * (attention.K.T @ (attention.K @ mean)) if twice == 2 else jnp.zeros_like(mean)
        return mean, narrow, pull, jnp.log(theta) - mean @ pull / 2 - jnp.log(jnp.diagonal(root)).sum()

    means, narrows, pulls, levels = jax.vmap(component)(mean, factor, theta)

    def at(seen: Array, x: Array) -> Array:
        push = twice * attention.scale * (attention.K.T @ (attention.Q @ x))
        inner = jnp.einsum("mrd,md->mr", narrows, push - pulls)
        logit = levels + means @ push + (inner * inner).sum(1) / 2
        weight = jax.nn.softmax(jnp.where(seen, logit, -jnp.inf))
        return weight @ (means + jnp.einsum("mrd,mr->md", narrows, inner))

    order = jnp.arange(points.shape[0])
    seen = order[None, :] <= order[:, None]
    return jax.vmap(lambda s, xs: jax.vmap(lambda x: at(s, x))(xs))(seen, points) @ attention.value_matrix.T


def _past_second_moment(mean: Float[Array, "m d"], factor: Float[Array, "m d r"], theta: Float[Array, "m"]) -> Float[Array, "m d d"]:
    r"""$M_i = \sum_{j \le i}\theta_j(\Sigma_j + \alpha_j\alpha_j^\top) / \sum_{j \le i}\theta_j$ of all positions at once, by prefix sums."""
    columns = jnp.concatenate([factor, mean[..., None]], axis=2)
    total = jnp.cumsum(theta[:, None, None] * (columns @ columns.mT), axis=0)
    return total / jnp.cumsum(theta)[:, None, None]


class PositionFlow(Flow):
    r"""The flow of one Gaussian for each position under causal attention (paper, masked attention as a measure on positions and tokens).

    Positions do not move; position $i$ has the moment equations $\alpha_i' = m_i$, $L_i' = B_i L_i$. For `Linear` they are exact,
    $\Gamma_i(x) = V M_i A x$, and cost one prefix sum (companion derivation). For `Softmax` and `L2` a position does not stay Gaussian and this
    is a *closure*: $m_i = E\,\Gamma_i$ and $B_i L_i = E\,\Gamma_i(\alpha_i + L_i z) z^\top$ with the exact `mixture_velocity`, by Gauss--Hermite
    nodes up to three columns of the factor and by $2r$ sigma points, exact for quadratic velocities, above. The metric `non_affine` says how
    much of the velocity the closure leaves out; where all positions share one law it is zero and the flow is that of unmasked attention.

    Integrated, it gives a `Gaussian` with leading axes of times and of positions.

    Args:
        attention: `Masked(...)`, or what is inside: `Linear`, `Softmax`, `L2`, `FeedForward` or a `MultiHead` of these.
        theta: shape `(count,)`, positive weights of the positions; None means equal ones.
        order: Gauss--Hermite nodes per axis; None decides by the columns of the factor, 0 means sigma points.

    Raises:
        ArgumentError: the attention has no mixture form; `theta` is not positive; `order` is negative.
        ShapeError: `theta` is not a vector.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> head = tp.Masked(tp.Linear(jnp.eye(1), jnp.eye(1), -1.0))
        >>> states = tp.Gaussian(jnp.zeros((2, 1)), jnp.array([[[1.0]], [[3.0]]]))
        >>> sol = tl.integrate(PositionFlow(head), states, jnp.array([0.0, 1.0]))
        >>> sol.value.cov.shape, round(float(sol.value.cov[1, 0, 0, 0]), 6)                # the first position sees itself alone
        ((2, 2, 1, 1), 0.333333)
    """

    attention: Attention
    theta: Array | None = None
    order: int | None = size(None, low=0)

    def __init__(self, attention: Attention, theta: Any = None, order: int | None = None):
        self.attention = _unmasked(attention)
        self.theta = None if theta is None else _weights(theta, None, None)
        self.order = order

    def lift(self, y0: Any) -> Gaussian:
        """The state of every position as mean and factor."""
        _check_states(self.attention, y0)
        if self.theta is not None and self.theta.shape != y0.mean.shape[:1]:
            raise ShapeError(f"theta must have one weight for each of the {y0.mean.shape[0]} positions, got shape {self.theta.shape}")
        return Gaussian._raw(y0.mean, y0.factor, None)

    def field(self, t: Array, y: Gaussian) -> Gaussian:
        mean, moved, _ = _regression(self.attention.at(t), y, self._theta(y), order=self.order)
        return Gaussian._raw(mean, moved, None)

    def metrics(self, t: Array, y: Gaussian) -> dict[str, Array]:
        r"""`eigenvalues`, `rank`, `trace` and `mean` of each position; `non_affine`, the share of $E|\Gamma_i|^2$ (its root) outside the closure."""
        return {**state_metrics(y), "non_affine": _regression(self.attention.at(t), y, self._theta(y), order=self.order)[2]}

    def _theta(self, y: Gaussian) -> Array:
        return _weights(self.theta, y.mean.shape[0], y.mean.dtype)


@partial(jax.jit, static_argnames="order")
def _regression(attention: Attention, y: Gaussian, theta: Array, order: int | None) -> tuple[Array, Array, Array]:
    r"""$m_i$, $B_i L_i$ and the relative part of the velocity that they leave out, for every position."""
    mean, factor = y.mean, y.factor
    if _is_affine(attention):
        columns = jnp.concatenate([factor, mean[..., None]], axis=2)
        moved = _mixture(attention, mean, factor, columns.mT, theta).mT
        still = _mixture(attention, mean, factor, jnp.zeros_like(mean)[:, None], theta).mT            # the bias of a feed-forward layer
        return moved[..., -1], moved[..., :-1] - still, jnp.zeros_like(mean[:, 0])
    nodes, weights = (jnp.asarray(a, factor.dtype) for a in _rule(factor.shape[-1], order))
    moved = _mixture(attention, mean, factor, mean[:, None] + nodes @ factor.mT, theta)
    center = jnp.einsum("n,mnd->md", weights, moved)
    slope = jnp.einsum("n,mnd,nr->mdr", weights, moved, nodes)
    rest = moved - center[:, None] - nodes @ slope.mT
    power = jnp.einsum("n,mnd->m", weights, moved**2)
    left = jnp.einsum("n,mnd->m", weights, rest**2)
    return center, slope, jnp.sqrt(jnp.where(power > 0, left / jnp.where(power > 0, power, 1.0), 0.0).astype(power.dtype))


def _rule(columns: int, order: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for the standard Gaussian in so many dimensions."""
    order = ORDERS.get(columns, 0) if order is None else order
    if order == 0:
        eye = np.sqrt(columns) * np.eye(columns)
        return np.concatenate([eye, -eye]), np.full(2 * columns, 0.5 / columns)
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    grid = np.stack([g.ravel() for g in np.meshgrid(*[nodes] * columns, indexing="ij")], axis=1)
    return grid, np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * columns, indexing="ij")), axis=0).ravel()


def conditional_bures(a: Gaussian, b: Gaussian, theta: Any = None) -> Array:
    r"""The conditional 2-Wasserstein distance of two laws of tokens given the position: $d(a, b)^2 = \sum_i \theta_i W_2^2(a_i, b_i)$.

    Masked attention is Lipschitz in it, where moving mass between positions is not allowed (paper, conditional Wasserstein distance); laws
    with different weights of positions are infinitely far apart.

    Args:
        a: a Gaussian whose last leading axis is the position; further leading axes are kept.
        b: another one with these positions.
        theta: shape `(count,)`, the weights of the positions; None means equal ones.

    Raises:
        ShapeError: the positions or dimensions differ.

    Example:
        >>> a = Gaussian(jnp.zeros((2, 1)), jnp.ones((2, 1, 1)))
        >>> b = Gaussian(jnp.array([[0.0], [2.0]]), jnp.ones((2, 1, 1)))
        >>> round(float(conditional_bures(a, b) ** 2), 12)
        2.0
    """
    for name, state in (("a", a), ("b", b)):
        if not isinstance(state, Gaussian):
            raise ArgumentError(f"{name} must be a Gaussian, got {type(state).__name__}")
        if state.mean.ndim < 2:
            raise ShapeError(f"{name} must have a leading axis of positions, got a mean of shape {state.mean.shape}")
    if a.mean.shape[-2:] != b.mean.shape[-2:]:
        raise ShapeError(f"b must have positions and dimension {a.mean.shape[-2:]} like a, got {b.mean.shape[-2:]}")
    weights = _weights(theta, a.mean.shape[-2], a.mean.dtype)
    squared = bures_squared(a.cov, b.cov, a.mean, b.mean) @ (weights / weights.sum())
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0).astype(squared.dtype)


def _every(attention: Attention, test: Callable[[Attention], bool]) -> bool:
    return all(_every(head, test) for head in attention.heads) if isinstance(attention, MultiHead) else test(attention)


def _is_affine(attention: Attention) -> bool:
    return _every(attention, lambda head: isinstance(head, (Linear, FeedForward)))


def _unmasked(attention: Any) -> Attention:
    """What is masked, if it has a mixture form."""
    check_attention(attention)
    inside = attention.attention if isinstance(attention, Masked) else attention
    if not _every(inside.at(0.0), lambda head: isinstance(head, (Softmax, L2, Linear, FeedForward))):
        raise ArgumentError(f"attention must be made of Softmax, L2, Linear and FeedForward to act on a mixture, got {type(inside).__name__}")
    return inside


def _check_states(attention: Attention, states: Any) -> None:
    if not isinstance(states, Gaussian):
        raise ArgumentError(f"states must be a Gaussian, got {type(states).__name__}")
    if states.mean.ndim != 2:
        raise ShapeError(f"states must have one leading axis, the position, got a mean of shape {states.mean.shape}")
    if states.dim != attention.dim:
        raise ShapeError(f"states must have dimension {attention.dim} to match the attention, got {states.dim}")


def _weights(theta: Any, count: int | None, dtype: Any) -> Array:
    """The weights of the positions; only their ratios matter."""
    if theta is None:
        return jnp.ones(count or 0, dtype)
    theta = checks.array("theta", theta, (count,))
    if checks.known(theta) and bool((theta <= 0).any()):
        raise ArgumentError(f"theta must be positive, got {float(theta.min()):g}")
    return theta if dtype is None else theta.astype(dtype)
