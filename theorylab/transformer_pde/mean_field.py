"""How far n tokens are from their mean-field limit: exact distances, errors over n, and error bars of a velocity."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks
from theorylab.core.integrate import integrate
from theorylab.core.keys import Key, stream
from theorylab.errors import ArgumentError, RunWarning, ShapeError
from theorylab.lab.sweep import sweep_grid
from theorylab.transformer_pde.attention import Softmax
from theorylab.transformer_pde.contract import Attention, check_state
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Cloud, Gaussian, _moments
from theorylab.transformer_pde.particles import Particles

Array = jax.Array

MOST_PAIRS = 25_000_000
"""Largest cost matrix of an exact transport problem: 200 MB."""
HEAVY_TAIL = 0.5**0.5
r"""Size of $\Sigma^{1/2} A \Sigma^{1/2}$ above which the weights of softmax have infinite variance."""


class MeanFieldError(NamedTuple):
    """Errors of n tokens against the mean-field limit.

    Attributes:
        counts: numbers of tokens, shape `(sizes,)`.
        coupling: root mean square distance of the tokens from the tokens that start at the same places and move with the exact velocity of the
            Gaussian; it bounds the 2-Wasserstein distance of the two clouds. Shape `(sizes, replicates)`, as the others.
        mean: norm of the difference of the means of these two clouds.
        cov: Frobenius norm of the difference of their covariances.
    """

    counts: np.ndarray
    coupling: np.ndarray
    mean: np.ndarray
    cov: np.ndarray


def wasserstein(first: Cloud, second: Cloud, order: float = 2.0) -> float:
    r"""The exact Wasserstein distance $W_p$ of two clouds, $p \ge 1$, by the network simplex of POT on the host.

    Its memory and time are at least quadratic in the tokens.

    Args:
        first: one cloud, without leading axes.
        second: a cloud of the same dimension.
        order: $p$.

    Raises:
        ShapeError: the dimensions differ, or a cloud has leading axes.
        ArgumentError: there are more than 25 million pairs of tokens, or `order` is below 1.

    Example:
        >>> wasserstein(Cloud(jnp.array([[0.0], [1.0]])), Cloud(jnp.array([[3.0], [4.0]])))
        3.0
    """
    import ot

    for name, cloud in (("first", first), ("second", second)):
        if not isinstance(cloud, Cloud):
            raise ArgumentError(f"{name} must be a Cloud, got {type(cloud).__name__}")
        if cloud.points.ndim != 2:
            raise ShapeError(f"{name} must have no leading axes, got points of shape {cloud.points.shape}; take one time")
    if first.dim != second.dim:
        raise ShapeError(f"second must have dimension {first.dim} to match first, got {second.dim}")
    checks.real("order", order, low=1.0)
    if first.count * second.count > MOST_PAIRS:
        raise ArgumentError(f"the clouds must have at most {MOST_PAIRS} pairs of tokens for an exact distance, got {first.count} x {second.count}")
    x, y = np.asarray(first.points, float), np.asarray(second.points, float)
    cost = ot.dist(x, y, "euclidean") ** order if order != 2 else ot.dist(x, y)
    v, w = (np.asarray(c.weights, float) for c in (first, second))
    paid: Any = ot.emd2(v / v.sum(), w / w.sum(), cost, numItermax=10**7)
    return float(max(paid, 0.0) ** (1 / order))


def mean_field_error(attention: Attention, state: Gaussian, time: float, counts: Sequence[int], replicates: int, *, key: Key | int,
                     rtol: float = 1e-6, tile: int = 1024) -> MeanFieldError:
    r"""How far n tokens, drawn from `state`, are at `time` from their mean-field limit, over n: the input of `fit_rate`.

    Each token of the system is compared with the token that starts at the same place and moves with the exact velocity of the Gaussian,
    $\alpha(t) + L(t) z_i$ (synchronous coupling). For softmax the error decays like $n^{-1/2}$ only while
    $\|\Sigma^{1/2} A \Sigma^{1/2}\| < 1/\sqrt2$, where the weights have finite variance (companion derivation); beyond that a warning says so.

    Args:
        attention: a variant that keeps Gaussians Gaussian.
        state: the law of the tokens at time 0.
        time: when they are compared.
        counts: numbers of tokens.
        replicates: independent systems for each number.
        key: random key or seed.
        rtol: relative tolerance of the integration; the error that is measured should be far above it.
        tile: tokens in a block.

    Raises:
        ArgumentError: the attention does not keep Gaussians Gaussian, or a count is below 1.
        ShapeError: the dimensions differ, or `state` has leading axes.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> head = tp.Softmax(jnp.eye(1), jnp.eye(1), -1.0, scale=0.2)
        >>> mean_field_error(head, tp.Gaussian.standard(1), 0.5, [10, 20], 3, key=0).coupling.shape
        (2, 3)
    """
    check_state(attention, state, Gaussian)
    flow = GaussianFlow(attention)
    checks.real("time", time, above=0.0)
    sizes = [checks.whole("counts", count, low=1) for count in counts]
    if isinstance(attention, Softmax) and float(jnp.linalg.norm(state.factor.T @ attention.A @ state.factor, 2)) > HEAVY_TAIL:
        warnings.warn("the logits are so large that the softmax weights have infinite variance: expect a rate slower than n^(-1/2)",
                      RunWarning, stacklevel=2)
    times = jnp.asarray([0.0, time], state.mean.dtype)
    end = jax.tree.map(lambda a: a[-1], integrate(flow, state, times, rtol=rtol, atol=rtol / 100).value)
    params = {"particles": Particles(attention, tile), "start": (state.mean, state.factor), "end": (end.mean, end.factor), "times": times,
              "rtol": rtol}
    table = sweep_grid(_coupled, {"count": sizes}, replicates, key=key, params=params, shapes=("count",))
    return MeanFieldError(np.asarray(sizes), table["coupling"], table["mean"], table["cov"])


def velocity_error(attention: Attention, cloud: Cloud, queries: Array | None = None, tile: int = 1024) -> Array:
    r"""The standard error of the velocity at each query, from tokens taken as a sample of their law: half the difference of the two halves.

    $e_i = \tfrac12 |\Gamma_{\mu'}(x_i) - \Gamma_{\mu''}(x_i)|$ with the tokens of even and of odd number as $\mu'$ and $\mu''$; both are as far
    apart as two independent samples, so the root mean square of $e$ is the root mean square error of $\Gamma_\mu$ for independent tokens.

    Args:
        attention: any variant but masked attention.
        cloud: one cloud in random order, without leading axes.
        queries: where the velocity is asked, shape `(m, dim)`; the tokens themselves unless given.
        tile: tokens in a block.

    Returns:
        The error at each query, shape `(m,)`.

    Raises:
        ShapeError: there are fewer than two tokens, or the dimensions differ.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> velocity_error(tp.Softmax(jnp.zeros((1, 1)), jnp.zeros((1, 1)), 1.0), Cloud(jnp.array([[0.0], [2.0]]))).tolist()
        [1.0, 1.0]
    """
    check_state(attention, cloud, Cloud)
    if cloud.count < 2:
        raise ShapeError(f"cloud must have at least two tokens to be split, got {cloud.count}")
    asked = cloud.points if queries is None else checks.array("queries", queries, (None, cloud.dim))
    found = []
    for part in (slice(0, None, 2), slice(1, None, 2)):
        weights = None if cloud._weights is None else cloud._weights[part] / cloud._weights[part].sum()
        found.append(attention.token_velocity(cloud.points[part], weights, asked, tile)[0])
    return jnp.linalg.norm(found[0] - found[1], axis=1) / 2


def _coupled(params: Any, key: Key, i: Any) -> dict[str, Array]:
    """The error of one system of tokens."""
    (mean, factor), (end_mean, end_factor) = params["start"], params["end"]
    noise = jax.random.normal(stream(key, "mean_field"), (params["count"], factor.shape[1]), factor.dtype)
    start = Cloud._raw(mean + noise @ factor.T, None)
    rtol = params["rtol"]
    sol = integrate(params["particles"], start, params["times"], rtol=rtol, atol=rtol / 100)
    reached, exact = Cloud._raw(sol.value.points[-1], None), Cloud._raw(end_mean + noise @ end_factor.T, None)
    missed = reached.points - exact.points
    (mean, cov), (exact_mean, exact_cov) = _moments(reached), _moments(exact)
    return {"coupling": jnp.sqrt((missed * missed).sum(1).mean()), "mean": jnp.linalg.norm(mean - exact_mean),
            "cov": jnp.linalg.norm(cov - exact_cov), "status": sol.status}
