"""Where tokens gather: clusters of a cloud, the rank of an attention matrix, and the scale on which growing clusters are seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core import checks, tree
from theorylab.core.keys import Key, as_key, stream
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.attention import Head, _Kernel
from theorylab.transformer_pde.contract import check_state
from theorylab.transformer_pde.gaussian import Cloud
from theorylab.transformer_pde.kernels import fold_tiles, tiled_average, tiled_log_sum, tiled_sum

Array = jax.Array


class Clusters(NamedTuple):
    """The clusters of a cloud, ordered by their first token.

    Attributes:
        labels: number of the cluster of each token, shape `(tokens,)`.
        count: number of clusters.
        centers: mean of each cluster, shape `(count, dim)`.
        masses: total weight of each cluster, shape `(count,)`.
    """

    labels: np.ndarray
    count: int
    centers: np.ndarray
    masses: np.ndarray


def clusters(cloud: Cloud, radius: float, tile: int = 1024) -> Clusters:
    """The connected components of the graph that joins tokens at a distance of at most `radius`.

    The pairs are visited in tiles, so memory is linear in the tokens; the time is quadratic, a few passes.

    Args:
        cloud: one cloud, without leading axes.
        radius: largest distance of two tokens that are joined; twice the numerical error of a token finds clusters that have merged.
        tile: tokens in a block.

    Raises:
        ArgumentError: `radius` is negative, or the call is inside compiled code, where `cluster_count` is available.
        ShapeError: the cloud has leading axes.

    Example:
        >>> found = clusters(Cloud(jnp.array([[0.0], [5.0], [0.1]])), radius=0.2)
        >>> found.count, found.labels.tolist(), found.centers.ravel().tolist()
        (2, [0, 1, 0], [0.05, 5.0])
    """
    if tree.is_traced(cloud):
        raise ArgumentError("clusters looks at numbers and cannot be called inside compiled code: use cluster_count there")
    roots = np.asarray(_roots(*_checked(cloud, radius, tile)))
    first, labels = np.unique(roots, return_inverse=True)
    weights = np.asarray(cloud.weights)
    masses = np.bincount(labels, weights)
    shares = weights / np.where(masses > 0, masses, 1)[labels]
    centers = np.stack([np.bincount(labels, shares * column) for column in np.asarray(cloud.points).T], 1)
    return Clusters(labels, len(first), centers, masses)


def cluster_count(cloud: Cloud, radius: float, tile: int = 1024) -> Array:
    """The number of `clusters`, also inside compiled code, as in `record` of `integrate`.

    Raises:
        ArgumentError: `radius` is negative.
        ShapeError: the cloud has leading axes.

    Example:
        >>> cluster_count(Cloud(jnp.array([[0.0], [5.0], [0.1]])), radius=0.2).item()
        2
    """
    roots = _roots(*_checked(cloud, radius, tile))
    return (roots == jnp.arange(len(roots))).sum()


def attention_rank(attention: Any, cloud: Cloud, tolerance: float = 1e-6, most: int = 64, tile: int = 1024, *, key: Key | int = 0) -> Array:
    r"""Number of singular values of the attention matrix $p_{ij}$ above `tolerance` times the largest, if it is below `most`.

    The matrix is not formed: it is multiplied with `most` random vectors, and its transpose with a basis of the result (randomized range finder).
    A return value of `most` says that the rank is at least about that. When tokens gather in m clusters, the rank tends to at most m.

    Args:
        attention: softmax or L2.
        cloud: one cloud, without leading axes.
        tolerance: relative threshold.
        most: random vectors, the largest rank that can be found.
        tile: tokens in a block.
        key: random key or seed.

    Raises:
        ArgumentError: the attention has no normalized exponential kernel, or `tolerance` or `most` is out of range.
        ShapeError: the dimensions differ, or the cloud has leading axes.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> attention_rank(tp.Softmax(jnp.eye(1), jnp.eye(1), 1.0), Cloud(jnp.array([[0.0], [1.0], [1.0]]))).item()
        2
    """
    check_state(attention, cloud, Cloud)
    if not isinstance(attention, _Kernel):
        raise ArgumentError(f"attention must be softmax or L2, whose weights form a stochastic matrix, got {type(attention).__name__}")
    checks.real("tolerance", tolerance, above=0.0, below=1.0)
    columns = min(checks.whole("most", most, low=1), cloud.count)
    points, weights = cloud.points, cloud._weights
    keys = points @ attention.K.T
    queries = attention._logit_factor * attention.scale * (points @ attention.Q.T)
    bias = attention._key_bias(keys) if weights is None else attention._key_bias(keys) + jnp.log(weights)
    probe = jax.random.normal(stream(as_key(key), "attention_rank"), (cloud.count, columns), points.dtype)
    basis = jnp.linalg.qr(tiled_average(queries, keys, bias, probe, tile)[0])[0]
    size = tiled_log_sum(queries, keys, bias, tile)
    one = jnp.ones_like(size)[:, None]
    rows = jnp.concatenate([keys, jnp.maximum(bias, -1e30)[:, None], one], 1)
    turned = tiled_sum(rows, jnp.concatenate([queries, one, -size[:, None]], 1), basis, tile, jnp.exp)
    values = jnp.linalg.svd(turned, compute_uv=False)
    return (values > tolerance * values[0]).sum()


def rescaled(attention: Any, cloud: Cloud, times: Any) -> Cloud:
    r"""The cloud on the scale $z = e^{-tV} x$, on which the clusters of growing tokens are seen (literature on emergence of clusters).

    Args:
        attention: a single head, for its $V$.
        cloud: one cloud, or the value of `integrate` with a leading axis of times.
        times: $t$, a number, or the times of the leading axis.

    Raises:
        ArgumentError: the attention is not a single head.
        ShapeError: the dimensions differ, or `times` do not match the leading axis.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> round(rescaled(tp.Softmax(jnp.eye(1), jnp.eye(1), 1.0), Cloud(jnp.array([[jnp.e]])), 1.0).points.item(), 12)
        1.0
    """
    if not isinstance(attention, Head):
        raise ArgumentError(f"attention must be a single head with a value matrix V, got {type(attention).__name__}")
    if not isinstance(cloud, Cloud):
        raise ArgumentError(f"cloud must be a Cloud, got {type(cloud).__name__}")
    if cloud.dim != attention.dim:
        raise ShapeError(f"cloud must have dimension {attention.dim} to match the attention, got {cloud.dim}")
    t = jnp.asarray(times, cloud.points.dtype)
    if t.shape != cloud.points.shape[:-2]:
        raise ShapeError(f"times must have shape {cloud.points.shape[:-2]} to match the leading axes of the cloud, got {t.shape}")
    if attention.V.ndim == 0:
        return Cloud._raw(jnp.exp(-t * attention.V)[..., None, None] * cloud.points, cloud._weights)
    shrink = jax.scipy.linalg.expm(-t[..., None, None] * attention.V)
    return Cloud._raw(cloud.points @ jnp.swapaxes(shrink, -1, -2), cloud._weights)


def _checked(cloud: Any, radius: Any, tile: Any) -> tuple[Array, Any, int]:
    if not isinstance(cloud, Cloud):
        raise ArgumentError(f"cloud must be a Cloud, got {type(cloud).__name__}")
    if cloud.points.ndim != 2:
        raise ShapeError(f"cloud must have no leading axes here, got points of shape {cloud.points.shape}; take one time, or use jax.vmap")
    return cloud.points, checks.real("radius", radius, low=0.0), checks.whole("tile", tile, low=1)


@jax.jit(static_argnums=2)
def _roots(points: Array, radius: Any, tile: int) -> Array:
    """The smallest token of the component of each token: labels fall along the edges and along themselves until they rest."""

    def visit(lowest: Array, block: Array, part: tuple[Array, ...], seen: None) -> Array:
        # by differences: the product form of a squared distance loses all digits of a tight cluster
        square = sum((block[:, a, None] - part[0][None, :, a]) ** 2 for a in range(points.shape[1]))
        return jnp.minimum(lowest, jnp.where(square <= radius**2, part[1][None, :], count).min(1))

    def step(state: tuple[Array, Any]) -> tuple[Array, Any]:
        labels, _ = state
        new = fold_tiles(visit, labels, points, (points, labels), (jnp.inf, count), tile, False)
        new = jnp.minimum(new, labels.at[labels].min(new))                       # a root learns what its members have seen
        new = new[new]
        return new, (new != labels).any()

    count = points.shape[0]
    return lax.while_loop(lambda state: state[1], step, (jnp.arange(count), jnp.asarray(True)))[0]
