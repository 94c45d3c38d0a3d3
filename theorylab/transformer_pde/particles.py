"""The interacting particle system: every token moves with the velocity that attention gives it in the cloud of all tokens."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from theorylab.core import tree
from theorylab.core.module import choice, size
from theorylab.core.problem import Flow
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.contract import Attention, check_attention, check_single, cloud_metrics
from theorylab.transformer_pde.flow import _affine
from theorylab.transformer_pde.gaussian import Cloud
from theorylab.transformer_pde.ring import AXIS

Array = jax.Array


class Particles(Flow):
    r"""Tokens under attention, $x_i' = \Gamma_\mu(x_i)$ with $\mu = \sum_j w_j \delta_{x_j}$ (paper, interacting particle system).

    A finite cloud never blows up under softmax, whatever its Gaussian limit does: its velocity is bounded by $\|V\| \max_j |x_j|$. Memory is linear
    in the number of tokens, in derivatives too: logits exist one `tile` by `tile` block at a time. Integrated, it gives a `Cloud` with a leading
    axis of times.

    Args:
        attention: any variant; its weights may change with depth (`Layered`).
        tile: tokens in a block.
        feed_forward: a pair `(W, b)` adding $W x + b$ to the velocity, or a `FeedForward`; without `b`, the matrix $W$.
        mesh: devices over which the tokens are spread, a `jax.sharding.Mesh` with an axis called `tokens`. Each device holds its share of them;
            keys and values travel round the ring of devices. The number of tokens must be a multiple of the number of devices: fill up with
            tokens of weight zero.

    Raises:
        ArgumentError: `attention` or `mesh` is of the wrong kind.
        ShapeError: `feed_forward` does not match the dimension of the attention.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> cloud = tp.Gaussian.standard(2).sample(100, key=0)
        >>> sol = tl.integrate(tp.Particles(tp.Softmax(jnp.eye(2), jnp.eye(2), -1.0)), cloud, jnp.array([0.0, 1.0]))
        >>> sol.value.points.shape, bool(sol.history["trace"][1] < sol.history["trace"][0])
        ((2, 100, 2), True)
    """

    attention: Attention
    feed_forward: Any = None
    tile: int = size(1024, low=1)
    mesh: Mesh | None = choice(None)

    def __init__(self, attention: Attention, tile: int = 1024, feed_forward: Any = None, mesh: Mesh | None = None):
        check_attention(attention)
        if mesh is not None and (not isinstance(mesh, Mesh) or AXIS not in mesh.axis_names):
            raise ArgumentError(f"mesh must be a jax.sharding.Mesh with an axis called {AXIS!r}, got "
                                f"{mesh.axis_names if isinstance(mesh, Mesh) else type(mesh).__name__}")
        self.attention, self.tile = attention, tile
        self.mesh = None if mesh is None else Mesh(mesh.devices, mesh.axis_names)      # shardings follow by inference, not by types
        self.feed_forward = None if feed_forward is None else _affine(feed_forward, attention.dim)

    def lift(self, y0: Any) -> Cloud:
        """The cloud, spread over the mesh if there is one; a bare table of tokens gets equal weights."""
        cloud = Cloud(y0) if isinstance(y0, (jax.Array, np.ndarray, list)) else y0
        if not isinstance(cloud, Cloud):
            raise ArgumentError(f"the state of {type(self).__name__} must be a Cloud or an array of tokens, got {type(y0).__name__}; "
                                "a Gaussian gives one by sample or quadrature")
        if cloud.dim != self.attention.dim:
            raise ShapeError(f"the tokens must have dimension {self.attention.dim} to match the attention, got {cloud.dim}")
        if self.mesh is None:
            return cloud
        devices = self.mesh.shape[AXIS]
        if cloud.count % devices:
            raise ShapeError(f"the number of tokens must be a multiple of the {devices} devices of the mesh, got {cloud.count}; "
                             "fill up with tokens of weight zero")
        if tree.is_traced(cloud):
            return cloud
        lead = cloud.points.ndim - 2
        return jax.device_put(cloud, NamedSharding(self.mesh, PartitionSpec(*[None] * lead, AXIS)))

    def token_velocity(self, t: Any, y: Cloud) -> tuple[Array, Array]:
        """The velocity that attention gives to every token, and the effective sample size of its average."""
        attention = self.attention.at(t)
        if self.mesh is None:
            return attention.token_velocity(y.points, y._weights, tile=self.tile)
        arrays, rest = eqx.partition(attention, eqx.is_array)
        share = PartitionSpec(AXIS)

        def of_shard(arrays: Any, points: Array, weights: Array) -> tuple[Array, Array]:
            return eqx.combine(arrays, rest).token_velocity(points, weights, tile=self.tile)

        spread = jax.shard_map(of_shard, mesh=self.mesh, in_specs=(PartitionSpec(), share, share), out_specs=share, check_vma=False)
        return spread(arrays, y.points, y.weights)                                      # a shard alone cannot count the tokens

    def velocities(self, t: Any, y: Cloud) -> Array:
        """The velocity of every token: attention and feed-forward."""
        moved = self.token_velocity(t, y)[0]
        if self.feed_forward is None:
            return moved
        W, b = self.feed_forward
        return moved + y.points @ W.T + b

    def field(self, t: Array, y: Cloud) -> Cloud:
        check_single(y.points.shape[:-2])
        return eqx.tree_at(lambda c: c.points, jax.tree.map(jnp.zeros_like, y), self.velocities(t, y))

    def metrics(self, t: Array, y: Cloud) -> dict[str, Array]:
        r"""`eigenvalues` (ascending), `rank`, `trace` and `mean` of the cloud, its `radius` $\max_i |x_i|$, and `effective_sample_size`, the least
        $1 / \sum_j p_{ij}^2$ of a token.

        Where the effective sample size is small, few tokens decide an average and the Monte-Carlo error exceeds $n^{-1/2}$.
        """
        radius = jnp.sqrt((y.points * y.points).sum(1).max())
        return {**cloud_metrics(y), "radius": radius, "effective_sample_size": self.token_velocity(t, y)[1].min()}
