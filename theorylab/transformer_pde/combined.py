"""What heads are put together to: several heads, an affine layer, a causal mask, weights that change with depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from theorylab.core.module import square
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.attention import Head, Softmax
from theorylab.transformer_pde.contract import Attention, Velocity, check_attention, cloud_metrics, is_concrete, state_metrics
from theorylab.transformer_pde.entropic import Sinkhorn
from theorylab.transformer_pde.gaussian import Cloud, Gaussian, _floating

Array = jax.Array


class MultiHead(Attention):
    r"""The sum of several heads, $\Gamma = \sum_h W_h \Gamma^{(h)}$ (paper, multi-head attention).

    The value matrix of a head is the product $W_h V_h$. Heads may be of different kinds, with their own key size, scale and temperature, and a
    `FeedForward` may stand among them.

    Args:
        heads: attention variants of one token dimension.

    Raises:
        ShapeError: the heads have different dimensions.
        ArgumentError: there is no head.

    Example:
        >>> head = Softmax(jnp.eye(2), jnp.eye(2), 1.0)
        >>> MultiHead([head, head]).velocity(jnp.zeros(2), jnp.eye(2)).matrix.tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """

    heads: tuple[Attention, ...]

    def __init__(self, heads: Sequence[Attention]):
        self.heads = _members("heads", heads)

    @classmethod
    def split(cls, Q: Any, K: Any, V: Any, heads: int, output: Any = None, kind: type[Head] = Softmax, **options: Any) -> MultiHead:
        r"""The heads of stacked matrices, as networks store them: head $h$ has the $h$-th block of rows of each and of columns of `output`.

        Args:
            Q: queries of all heads, shape `(heads * k, dim)`.
            K: keys of all heads, shape `(heads * k, dim)`.
            V: values of all heads, shape `(heads * m, dim)`.
            heads: the number of heads.
            output: output matrix, shape `(dim, heads * m)`; None means the identity, for `heads * m == dim`.
            kind: the class of a head.
            options: further arguments of the head, such as `scale` (default $1/\sqrt k$ here, as in networks) or `temperature`.

        Raises:
            ShapeError: the number of heads does not divide the rows, or the shapes do not match.

        Example:
            >>> MultiHead.split(jnp.eye(4), jnp.eye(4), jnp.eye(4), heads=2).heads[1].Q.shape
            (2, 4)
        """
        Q, K, V = _floating("Q", Q), _floating("K", K), _floating("V", V)
        if isinstance(heads, bool) or not isinstance(heads, (int, np.integer)) or heads < 1:
            raise ArgumentError(f"heads must be a whole number of at least 1, got {heads!r}")
        for name, rows in (("Q", Q), ("K", K), ("V", V)):
            if rows.ndim != 2 or rows.shape[1] != Q.shape[-1]:
                raise ShapeError(f"{name} must have shape (heads * rows of a head, dim) with the dim {Q.shape[-1]} of Q, got {rows.shape}")
            if rows.shape[0] % heads or not rows.shape[0]:
                raise ShapeError(f"heads must divide the rows of {name}: {heads} heads and {rows.shape[0]} rows")
        dim, depth = Q.shape[1], V.shape[0]
        if output is None and depth != dim:
            raise ShapeError(f"output must be given when V has {depth} rows and tokens have dimension {dim}")
        mixed = jnp.eye(dim, dtype=V.dtype) if output is None else _floating("output", output)
        if mixed.shape != (dim, depth):
            raise ShapeError(f"output must have shape {(dim, depth)}, got {mixed.shape}")
        options = {"scale": (Q.shape[0] // heads) ** -0.5, **options}
        cut = lambda a, h: a[h * (a.shape[0] // heads):(h + 1) * (a.shape[0] // heads)]  # noqa: E731
        return cls([kind(cut(Q, h), cut(K, h), cut(mixed.T, h).T @ cut(V, h), **options) for h in range(heads)])

    @property
    def dim(self) -> int:
        """Dimension of a token."""
        return self.heads[0].dim

    @property
    def degree(self) -> int | None:
        """That of the heads, if they have one in common."""
        degrees = {head.degree for head in self.heads}
        return degrees.pop() if len(degrees) == 1 else None

    @property
    def feels_mean(self) -> bool:
        """Whether that is so for a head."""
        return any(head.feels_mean for head in self.heads)

    @property
    def keeps_gaussians(self) -> bool:
        """Whether every head does."""
        return all(head.keeps_gaussians for head in self.heads)

    def at(self, t: Any) -> MultiHead:
        """The heads in force at depth `t`."""
        return MultiHead([head.at(t) for head in self.heads])

    def velocity(self, mean: Array, cov: Array) -> Velocity:
        parts = [head.velocity(mean, cov) for head in self.heads]
        return Velocity(_sum(part.mean for part in parts), _sum(part.matrix for part in parts))

    def factor_velocity(self, mean: Array, factor: Array) -> tuple[Array, Array]:
        parts = [head.factor_velocity(mean, factor) for head in self.heads]
        return _sum(part[0] for part in parts), _sum(part[1] for part in parts)

    def rate_bound(self, trace: Array) -> Array:
        return _sum(head.rate_bound(trace) for head in self.heads)

    def key_size(self, factor: Array) -> Array:
        return _sum(head.key_size(factor) for head in self.heads)

    def token_velocity(self, points: Array, weights: Array | None = None, queries: Array | None = None, tile: int = 1024,
                       causal: bool = False) -> tuple[Array, Array]:
        parts = [head.token_velocity(points, weights, queries, tile, causal) for head in self.heads]
        return _sum(part[0] for part in parts), jnp.stack([part[1] for part in parts]).min(0)


class FeedForward(Attention):
    r"""An affine layer $x \mapsto W x + b$ that stands among the heads of a `MultiHead`; it looks at no other token.

    Args:
        W: shape `(dim, dim)`.
        b: shape `(dim,)`; None means zero.

    Raises:
        ShapeError: `W` is not square or `b` does not match it.

    Example:
        >>> block = MultiHead([Softmax(jnp.eye(2), jnp.eye(2), -1.0), FeedForward(jnp.eye(2))])
        >>> block.velocity(jnp.ones(2), jnp.zeros((2, 2))).mean.tolist()
        [0.0, 0.0]
    """

    W: Array
    b: Array

    def __init__(self, W: Any, b: Any = None):
        self.W = square("W", _floating("W", W))
        self.b = jnp.zeros(self.W.shape[:1], self.W.dtype) if b is None else _floating("b", b)
        if self.b.shape != self.W.shape[:1]:
            raise ShapeError(f"b must have shape {self.W.shape[:1]} to match W, got {self.b.shape}")

    @property
    def dim(self) -> int:
        """Dimension of a token."""
        return self.W.shape[0]

    def velocity(self, mean: Float[Array, "d"], cov: Float[Array, "d d"]) -> Velocity:
        return Velocity(self.W @ mean + self.b, self.W)

    def factor_velocity(self, mean: Float[Array, "d"], factor: Float[Array, "d r"]) -> tuple[Float[Array, "d"], Float[Array, "d r"]]:
        return self.W @ mean + self.b, self.W @ factor

    def rate_bound(self, trace: Array) -> Array:
        return jnp.linalg.norm(self.W)

    def token_velocity(self, points: Float[Array, "n d"], weights: Float[Array, "n"] | None = None, queries: Float[Array, "m d"] | None = None,
                       tile: int = 1024, causal: bool = False) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
        asked = points if queries is None else queries
        return asked @ self.W.T + self.b, jnp.full(asked.shape[0], jnp.inf, points.dtype)


class Masked(Attention):
    r"""Causal attention: token $i$ averages over the tokens $j \le i$, in the order of the cloud, renormalized (paper, masked attention).

    The exact law of masked tokens is one measure for each position, so a single Gaussian does not describe it: `PositionFlow` follows one for each.

    Args:
        attention: what is masked; not Sinkhorn, whose kernel looks at all tokens.

    Raises:
        ArgumentError: the attention cannot be masked.

    Example:
        >>> head = Masked(Softmax(jnp.zeros((1, 1)), jnp.zeros((1, 1)), 1.0))
        >>> head.token_velocity(jnp.array([[1.0], [3.0]]))[0].tolist()                    # running means
        [[1.0], [2.0]]
    """

    attention: Attention

    def __init__(self, attention: Attention):
        check_attention(attention)
        if any(isinstance(part, (Sinkhorn, Masked)) for part in parts(attention)):
            raise ArgumentError("attention must be one that can be masked: Sinkhorn looks at all tokens, and Masked is masked already")
        self.attention = attention

    @property
    def dim(self) -> int:
        """Dimension of a token."""
        return self.attention.dim

    @property
    def keeps_gaussians(self) -> bool:
        """False: there is one law for each position."""
        return False

    def at(self, t: Any) -> Masked:
        """The mask over the attention in force at depth `t`."""
        return Masked(self.attention.at(t))

    def token_velocity(self, points: Array, weights: Array | None = None, queries: Array | None = None, tile: int = 1024,
                       causal: bool = True) -> tuple[Array, Array]:
        if queries is not None:
            raise ArgumentError("queries must be None for masked attention: the place of a query in the order decides what it sees")
        return self.attention.token_velocity(points, weights, None, tile, True)


class Layered(Attention):
    r"""Weights that change with depth: `layers[l]` is in force for depths in `[edges[l], edges[l + 1])`, the first and the last also outside.

    With the default edges and `ResidualLayers(1.0)` this is a network, layer for layer; integrated, it is the flow with piecewise constant weights.

    Args:
        layers: attentions of one kind and of equal shapes.
        edges: increasing depths, shape `(len(layers) + 1,)`; None means 0, 1, 2, ...

    Raises:
        ShapeError: the layers differ in kind or shapes, or `edges` has the wrong length.
        ArgumentError: `edges` do not increase, or there is no layer.

    Example:
        >>> early, late = Softmax(jnp.eye(1), jnp.eye(1), 1.0), Softmax(jnp.eye(1), jnp.eye(1), -1.0)
        >>> Layered([early, late]).at(1.5).V.item()
        -1.0
    """

    layers: Attention
    edges: Array

    def __init__(self, layers: Sequence[Attention], edges: Any = None):
        members = _members("layers", layers)
        first = jax.tree.structure(members[0])
        shapes = [leaf.shape for leaf in jax.tree.leaves(members[0])]
        for i, layer in enumerate(members):
            if jax.tree.structure(layer) != first or [leaf.shape for leaf in jax.tree.leaves(layer)] != shapes:
                raise ShapeError(f"layers must be of one kind and of equal shapes, got a layer {i} ({type(layer).__name__}) unlike layer 0")
        self.layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        self.edges = jnp.arange(len(members) + 1, dtype=jnp.result_type(float)) if edges is None else _floating("edges", edges)
        if self.edges.shape != (len(members) + 1,):
            raise ShapeError(f"edges must have shape {(len(members) + 1,)} for {len(members)} layers, got {self.edges.shape}")
        if is_concrete(self.edges) and not bool((jnp.diff(self.edges) > 0).all()):
            raise ArgumentError(f"edges must increase, got {np.asarray(self.edges).tolist()}")

    @property
    def count(self) -> int:
        """Number of layers."""
        return self.edges.shape[0] - 1

    @property
    def dim(self) -> int:
        """Dimension of a token."""
        return self._layer(0).dim

    @property
    def feels_mean(self) -> bool:
        """Whether that is so for a layer."""
        return self._layer(0).feels_mean

    @property
    def keeps_gaussians(self) -> bool:
        """Whether every layer does."""
        return self._layer(0).keeps_gaussians

    def _layer(self, index: Any) -> Attention:
        return jax.tree.map(lambda leaf: leaf[index], self.layers)

    def at(self, t: Any) -> Attention:
        """The layer in force at depth `t`."""
        index = jnp.searchsorted(self.edges, jnp.asarray(t, self.edges.dtype), side="right") - 1
        return self._layer(jnp.clip(index, 0, self.count - 1)).at(t)

    def token_velocity(self, points: Array, weights: Array | None = None, queries: Array | None = None, tile: int = 1024,
                       causal: bool = False) -> tuple[Array, Array]:
        raise ArgumentError("Layered has a velocity at a depth only: ask at(depth), or integrate")

    def velocity(self, mean: Array, cov: Array) -> Velocity:
        raise ArgumentError("Layered has a velocity at a depth only: ask at(depth), or integrate")

    def metrics(self, x: Gaussian | Cloud) -> dict[str, Array]:
        """`eigenvalues`, `rank`, `trace` and `mean` of the state."""
        return cloud_metrics(x) if isinstance(x, Cloud) else state_metrics(x)


def _members(name: str, given: Sequence[Attention]) -> tuple[Attention, ...]:
    """A tuple of attentions of one dimension."""
    if isinstance(given, Attention) or not isinstance(given, Sequence) or not given:
        raise ArgumentError(f"{name} must be a sequence of at least one attention, got {type(given).__name__}"
                            + ("" if isinstance(given, Attention) or not isinstance(given, Sequence) else " of length 0"))
    for i, member in enumerate(given):
        check_attention(member, f"{name}[{i}]")
        if member.dim != given[0].dim:
            raise ShapeError(f"{name}[{i}] must have dimension {given[0].dim} like {name}[0], got {member.dim}")
    return tuple(given)


def parts(attention: Attention) -> list[Attention]:
    """An attention and everything inside it."""
    inside = attention.heads if isinstance(attention, MultiHead) else (attention.layers,) if isinstance(attention, Layered) else ()
    return [attention, *(part for member in inside for part in parts(member))]


def _sum(arrays: Any) -> Array:
    """The sum of at least one array."""
    total, *rest = arrays
    for array in rest:
        total = total + array
    return total
