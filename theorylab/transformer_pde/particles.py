"""The interacting particle system: every token moves with the velocity that attention gives it in the cloud of all tokens."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.module import size
from theorylab.core.problem import Flow
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.attention import Attention
from theorylab.transformer_pde.gaussian import Cloud, _moments, effective_rank

Array = jax.Array


class Particles(Flow):
    r"""Tokens under attention, $x_i' = \Gamma_\mu(x_i)$ with $\mu = \sum_j w_j \delta_{x_j}$ (paper, interacting particle system).

    A finite cloud never blows up, whatever its Gaussian limit does: its velocity is bounded by $\|V\| \max_j |x_j|$. Memory is linear in the
    number of tokens: logits exist one `tile` by `tile` block at a time. Integrated, it gives a `Cloud` with a leading axis of times.

    Args:
        attention: any variant.
        tile: tokens in a block.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> cloud = tp.Gaussian.standard(2).sample(100, key=0)
        >>> sol = tl.integrate(tp.Particles(tp.Softmax(jnp.eye(2), jnp.eye(2), -1.0)), cloud, jnp.array([0.0, 1.0]))
        >>> sol.value.points.shape, bool(sol.history["trace"][1] < sol.history["trace"][0])
        ((2, 100, 2), True)
    """

    attention: Attention
    tile: int = size(1024, low=1)

    def __init__(self, attention: Attention, tile: int = 1024):
        if not isinstance(attention, Attention):
            raise ArgumentError(f"attention must be a Softmax, an L2 or another Attention, got {type(attention).__name__}")
        self.attention, self.tile = attention, tile

    def lift(self, y0: Any) -> Cloud:
        """The cloud; a bare table of tokens gets equal weights."""
        cloud = Cloud(y0) if isinstance(y0, (jax.Array, np.ndarray, list)) else y0
        if not isinstance(cloud, Cloud):
            raise ArgumentError(f"the state of Particles must be a Cloud or an array of tokens, got {type(y0).__name__}; "
                                "a Gaussian gives one by sample or quadrature")
        if cloud.dim != self.attention.dim:
            raise ShapeError(f"the tokens must have dimension {self.attention.dim} to match the attention, got {cloud.dim}")
        return cloud

    def field(self, t: Array, y: Cloud) -> Cloud:
        moved = self.attention.token_velocity(y.points, y.weights, tile=self.tile)[0]
        return eqx.tree_at(lambda c: c.points, jax.tree.map(jnp.zeros_like, y), moved)

    def metrics(self, t: Array, y: Cloud) -> dict[str, Array]:
        r"""`eigenvalues` (ascending), `rank`, `trace` and `mean` of the cloud; `effective_sample_size`, the least $1 / \sum_j p_{ij}^2$ of a token.

        Where the effective sample size is small, few tokens decide an average and the Monte-Carlo error exceeds $n^{-1/2}$.
        """
        mean, cov = _moments(y)
        values = jnp.linalg.eigvalsh(cov)
        sample_size = self.attention.token_velocity(y.points, y.weights, tile=self.tile)[1]
        return {"eigenvalues": values, "rank": effective_rank(cov), "trace": values.sum(), "mean": mean, "effective_sample_size": sample_size.min()}
