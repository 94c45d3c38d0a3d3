r"""Distances between conditional densities, averaged over the law of x: Hellinger, total variation, Kullback-Leibler.

All three are means of a function of $\ell = \log(q/p)$ under the half-half mixture of the two densities, so one integrand serves quadrature and
Monte Carlo: $h^2$ of $1 - 1/\cosh(\ell/2)$, the total variation of $|\tanh(\ell/2)|$, and the divergence of
$2(\tanh(\ell/2) - \ell/(1+e^\ell))$, none of which is negative.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr

from theorylab.core import checks
from theorylab.core.keys import Key, as_key, stream
from theorylab.errors import ArgumentError, ShapeError
from theorylab.moe import density

Array = jax.Array
SPREAD = (0.0, 1.2, 2.5, 4.0, 6.0, 9.0)  # panel edges around a mean, in standard deviations; beyond nine the mass is below 1e-18
TRANSITION = (0.0, 2.0, 6.0, 15.0, 40.0)  # panel edges around a crossing of two logits, in units of the logit: e^-40 is below round-off
NODES, PLANE_NODES = 16, 8  # of each piece in y and, for d = 1, in x; on each axis for d = 2
ROWS = 32  # points x that are integrated over y side by side: bounds the memory
SECANTS = 3


class Estimate(NamedTuple):
    """A number and its standard error, which is 0 for quadrature."""

    value: Array
    standard_error: Array


def hellinger(p: Any, q: Any, law: Any = (0.0, 1.0), *, average: str = "rms", key: Key | int | None = None, samples: int = 100_000,
              panels: int | None = None) -> Estimate:
    r"""The Hellinger distance $H = (\mathbb{E}_X h^2)^{1/2}$ of two mixtures, with $h^2 = \tfrac12\int(\sqrt{p} - \sqrt{q})^2\,dy$.

    Args:
        p: a `Mixture`.
        q: another of the same dimension.
        law: of x. A pair (low, high) is the uniform law on a box; for d = 1 and 2 it is integrated with breakpoints at the region boundaries of both
            mixtures, to about 1e-12 in d = 1. A pair (points of shape (n, d), weights), or an array of points alone, is summed. A function of
            (key, n), and a box of higher dimension, is sampled: y comes from the half-half mixture of p and q, with the same x for both.
        average: `"rms"`, or `"mean"` for $\mathbb{E}_X h$, which the papers state their rates for (it is at most H).
        key: seed or random key, needed where x is sampled.
        samples: number of sampled x.
        panels: equal parts that each axis of a box is cut into, besides the breakpoints; None chooses 32 in d = 1 and 4 in d = 2.

    Returns:
        `Estimate(value, standard_error)`.

    Raises:
        ArgumentError: `law` cannot be read, a key is missing, or the mean is asked for where x is sampled.
        ShapeError: dimensions that differ.

    Example:
        >>> from theorylab import moe
        >>> p = moe.example("S1")
        >>> q = p.replace(variance=p.variance * 1.1)
        >>> round(float(moe.hellinger(p, q, (-1.0, 1.0)).value), 5)
        0.02346
    """
    checks.among("average", average, ("rms", "mean"))
    found = _measure(p, q, law, "hellinger" if average == "rms" else "mean", key, samples, panels)
    if average == "mean":
        return found
    root = jnp.sqrt(found.value)
    return Estimate(root, found.standard_error / jnp.where(root > 0, 2 * root, jnp.ones_like(root)))


def total_variation(p: Any, q: Any, law: Any = (0.0, 1.0), *, key: Key | int | None = None, samples: int = 100_000,
                    panels: int | None = None) -> Estimate:
    r"""The total variation $\mathbb{E}_X\,\tfrac12\int|p - q|\,dy$.

    By quadrature, the sign changes of p - q in y are found and the integral between them is a difference of distribution functions.

    Args:
        p: a `Mixture`.
        q: another of the same dimension.
        law: as in `hellinger`.
        key: as in `hellinger`.
        samples: as in `hellinger`.
        panels: as in `hellinger`.

    Raises:
        ArgumentError, ShapeError: as in `hellinger`.

    Example:
        >>> from theorylab import moe
        >>> p = moe.example("S1")
        >>> float(moe.total_variation(p, p, (-1.0, 1.0)).value)
        0.0
    """
    return _measure(p, q, law, "variation", key, samples, panels)


def kullback_leibler(p: Any, q: Any, law: Any = (0.0, 1.0), *, key: Key | int | None = None, samples: int = 100_000,
                     panels: int | None = None) -> Estimate:
    r"""The divergence $\mathbb{E}_X \int p \log(p/q)\,dy$.

    Args:
        p: a `Mixture`.
        q: another of the same dimension.
        law: as in `hellinger`.
        key: as in `hellinger`.
        samples: as in `hellinger`.
        panels: as in `hellinger`.

    Raises:
        ArgumentError, ShapeError: as in `hellinger`.

    Example:
        >>> from theorylab import moe
        >>> p = moe.example("S1")
        >>> float(moe.kullback_leibler(p, p, (-1.0, 1.0)).value)
        0.0
    """
    return _measure(p, q, law, "divergence", key, samples, panels)


def _integrand(kind: str, ratio: Array) -> Array:
    """The function of log(q/p) whose mean under (p+q)/2 is the distance."""
    if kind == "variation":
        return jnp.abs(jnp.tanh(ratio / 2))
    if kind == "divergence":
        return 2 * (jnp.tanh(ratio / 2) - ratio * jax.nn.sigmoid(-ratio))
    half = jnp.clip(jnp.abs(ratio) / 2, 0, 80)  # cosh(80) is finite in float32, and 1/cosh there is below round-off
    return 2 * jnp.sinh(half / 2) ** 2 / jnp.cosh(half)


def _measure(p: Any, q: Any, law: Any, kind: str, key: Any, samples: int, panels: int | None) -> Estimate:
    if p.dim != q.dim:
        raise ShapeError(f"p and q must have one dimension, got {p.dim} and {q.dim}")
    checks.same_dtype(p=p.variance, q=q.variance)
    law, box = read_law(law, p.dim)
    if isinstance(law, tuple) and not box:
        return _summed(p, q, law[0].astype(p.dtype), law[1].astype(p.dtype), kind=kind)
    if isinstance(law, tuple) and p.dim <= 2:
        cut = (32, 4)[p.dim - 1] if panels is None else checks.whole("panels", panels, low=1)
        points, weights = _box(p, q, law[0].astype(p.dtype), law[1].astype(p.dtype), cut)
        return _summed(p, q, points, weights, kind=kind)
    if kind == "mean":
        raise ArgumentError("average='mean' needs the distance at each x: draw the points and pass law=(points, weights), or use average='rms'")
    if key is None:
        raise ArgumentError("key is needed: x is sampled from this law; pass a seed, as in key=0")
    samples = checks.whole("samples", samples, low=2)
    if isinstance(law, tuple):
        x = jax.random.uniform(stream(key, "x"), (samples, p.dim), p.dtype, *(corner.astype(p.dtype) for corner in law))
    else:
        x = checks.array("law(key, n)", law(stream(key, "x"), samples), (samples, p.dim)).astype(p.dtype)
    return _sampled(p, q, x, as_key(key), kind=kind)


def read_law(law: Any, dim: int) -> tuple[Any, bool]:
    """The corners of a box, points with weights that sum to 1, or a sampler; and whether it is a box."""
    if callable(law):
        return law, False
    if isinstance(law, (jax.Array, np.ndarray)) and (law.ndim == 2 or (dim == law.ndim == 1 and len(law) > 2)):
        law = (jnp.reshape(law, (len(law), -1)), jnp.ones(len(law)))
    if not isinstance(law, (tuple, list)) or len(law) != 2:
        raise ArgumentError(f"law must be a pair (low, high) or (points, weights), an array of points, or a function of (key, n), got {law!r}")
    if np.ndim(law[0]) < 2:
        low, high = (jnp.broadcast_to(checks.array(name, end), (dim,)) if np.ndim(end) == 0 else checks.array(name, end, (dim,))
                     for name, end in zip(("low of law", "high of law"), law, strict=True))
        if checks.known(low, high) and not bool(jnp.all(low < high)):
            raise ArgumentError(f"law: low must be below high, got {low.tolist()} and {high.tolist()}")
        return (low, high), True
    points = checks.array("points of law", law[0], (None, dim))
    weights = checks.array("weights of law", law[1], (len(points),))
    if checks.known(weights) and not (float(jnp.min(weights)) >= 0 and float(jnp.sum(weights)) > 0):
        raise ArgumentError(f"weights of law must not be negative nor all zero, got a smallest one of {float(jnp.min(weights)):g}")
    return (points, weights / jnp.sum(weights)), False


# ------------------------------------------------------------------------------------------------------------ at given points x


class _Parts(NamedTuple):
    """The active components at each x: log weight, mean, standard deviation, shape (n, K) each."""

    log_weight: Array
    mean: Array
    sd: Array


def _parts(mixture: Any, x: Array) -> _Parts:
    on = jnp.argsort(~density.routing(mixture, x).T, axis=1, stable=True)[:, : mixture.active]
    take = partial(jnp.take_along_axis, indices=on, axis=1)
    return _Parts(take(density.log_gate(mixture, x).T), take(density.expert_means(mixture, x).T), jnp.sqrt(mixture.variance)[on])


def _log_density(parts: _Parts, y: Array) -> Array:
    """Shape (n, m) for y of that shape."""
    z = (y[:, :, None] - parts.mean[:, None]) / parts.sd[:, None]
    return jax.nn.logsumexp(parts.log_weight[:, None] - jnp.log(parts.sd)[:, None] - z**2 / 2, axis=-1) - 0.5 * float(np.log(2 * np.pi))


def _cdf(parts: _Parts, y: Array) -> Array:
    return jnp.sum(jnp.exp(parts.log_weight)[:, None] * ndtr((y[:, :, None] - parts.mean[:, None]) / parts.sd[:, None]), axis=-1)


def _gauss(edges: Array, count: int = NODES) -> tuple[Array, Array]:
    """Nodes and weights of the rule on each piece between neighbouring edges (last axis), flattened along it and ascending."""
    nodes, weights = (jnp.asarray(a, edges.dtype) for a in np.polynomial.legendre.leggauss(count))
    half = (edges[..., 1:] - edges[..., :-1]) / 2
    middle = (edges[..., 1:] + edges[..., :-1]) / 2
    flat = (*edges.shape[:-1], -1)
    return (middle[..., None] + half[..., None] * nodes).reshape(flat), (half[..., None] * weights).reshape(flat)


def _at_points(p: Any, q: Any, x: Array, kind: str) -> Array:
    """The distance at each row of x: h, h^2, total variation or divergence, shape (n,)."""
    one, two = _parts(p, x), _parts(q, x)
    mean, sd = jnp.concatenate([one.mean, two.mean], 1), jnp.concatenate([one.sd, two.sd], 1)
    around = jnp.asarray(sorted({*SPREAD, *(-c for c in SPREAD)}), x.dtype)
    y, weights = _gauss(jnp.sort((mean[:, :, None] + sd[:, :, None] * around).reshape(len(x), -1), axis=1))
    if kind == "variation":
        return _between_roots(one, two, y)
    first, second = _log_density(one, y), _log_density(two, y)
    middle = jnp.exp(jnp.logaddexp(first, second)) / 2
    total = jnp.sum(weights * middle * _integrand(kind, second - first), axis=1)
    return jnp.sqrt(total) if kind == "mean" else total


def _between_roots(one: _Parts, two: _Parts, y: Array) -> Array:
    """Half the integral of |p - q|: between sign changes it is a difference of distribution functions, so an error e of a root costs O(e^2)."""
    def gap(at: Array) -> Array:
        return _log_density(one, at) - _log_density(two, at)

    low, high = y[:, :-1], y[:, 1:]
    g = gap(y)
    a, b, ga, gb = low, high, g[:, :-1], g[:, 1:]
    change = ga * gb < 0
    root = a
    for _ in range(SECANTS):  # regula falsi: the bracket is a panel's node spacing, so each step multiplies the error by about that spacing
        root = jnp.where(change, a - ga * (b - a) / jnp.where(change, gb - ga, jnp.ones_like(ga)), a)
        value = gap(root)
        right = value * ga > 0
        a, ga = jnp.where(right, root, a), jnp.where(right, value, ga)
        b, gb = jnp.where(right, b, root), jnp.where(right, gb, value)

    def excess(at: Array) -> Array:
        return _cdf(one, at) - _cdf(two, at)

    ends, at_root = excess(y), excess(root)
    pieces = jnp.abs(at_root - ends[:, :-1]) + jnp.abs(ends[:, 1:] - at_root)
    return jnp.sum(pieces, axis=1) / 2


@partial(jax.jit, static_argnames="kind")
def _summed(p: Any, q: Any, x: Array, weights: Array, *, kind: str) -> Estimate:
    pad = -len(x) % ROWS
    blocks = jnp.concatenate([x, jnp.broadcast_to(x[:1], (pad, x.shape[1]))]).reshape(-1, ROWS, x.shape[1])
    values = jax.lax.map(lambda block: _at_points(p, q, block, kind), blocks).reshape(-1)[: len(x)]
    return Estimate(weights @ values, jnp.zeros((), x.dtype))


@partial(jax.jit, static_argnames="kind")
def _sampled(p: Any, q: Any, x: Array, key: Array, *, kind: str) -> Estimate:
    one, two = _parts(p, x), _parts(q, x)

    def draw(parts: _Parts, purpose: str) -> Array:
        which, noise = jax.random.split(stream(key, purpose))
        index = jax.random.categorical(which, parts.log_weight, axis=1)[:, None]
        mean, sd = (jnp.take_along_axis(a, index, axis=1) for a in (parts.mean, parts.sd))
        return mean + sd * jax.random.normal(noise, mean.shape, mean.dtype)

    y = jnp.concatenate([draw(one, "first"), draw(two, "second")], axis=1)
    values = jnp.mean(_integrand(kind, _log_density(two, y) - _log_density(one, y)), axis=1)
    return Estimate(jnp.mean(values), jnp.std(values, ddof=1) / float(np.sqrt(len(x))))


# ------------------------------------------------------------------------------------------------------------ quadrature over a box


def _crossings(intercept: Array, slope: Array, offsets: tuple[float, ...]) -> Array:
    """Where each two of the lines intercept + slope t cross, with panel edges around it in units of their difference."""
    first, second = np.triu_indices(len(intercept), 1)
    steep = slope[first] - slope[second]
    safe = jnp.where(steep == 0, jnp.full_like(steep, jnp.inf), steep)
    around = jnp.asarray(sorted({*offsets, *(-c for c in offsets)}), slope.dtype)
    return ((intercept[second] - intercept[first] + around[:, None]) / safe).reshape(-1)


def _lines(mixture: Any, shift: Array, axis: int) -> list[tuple[Array, Array, tuple[float, ...]]]:
    """Scores and logits along one axis as lines; `shift` is what the other axes contribute to the slopes' part."""
    slope = mixture.gate_coef[:, axis]
    logits = (mixture.gate_intercept + shift, slope, TRANSITION)
    return [logits, (shift, slope, (0.0,))] if mixture.selection == "slope" else [logits]


@partial(jax.jit, static_argnames=("axis", "panels"))
def _edges(p: Any, q: Any, shifts: tuple[Array, Array], axis: int, low: Array, high: Array, panels: int, extra: Array | None = None) -> Array:
    found = [_crossings(*line) for mixture, shift in zip((p, q), shifts, strict=True) for line in _lines(mixture, shift, axis)]
    grid = low + (high - low) * jnp.linspace(0, 1, panels + 1, dtype=low.dtype)
    return jnp.sort(jnp.clip(jnp.concatenate([grid, *found] + ([] if extra is None else [extra])), low, high))


def _few(edges: Array) -> Array:
    """The distinct edges, padded with the last to a power of two so that few shapes are compiled; a tracer is left as it is."""
    if not checks.known(edges):
        return edges
    distinct = np.unique(np.asarray(edges))
    return jnp.asarray(np.pad(distinct, (0, (1 << int(len(distinct) - 2).bit_length()) + 1 - len(distinct)), mode="edge"))


def _box(p: Any, q: Any, low: Array, high: Array, panels: int) -> tuple[Array, Array]:
    """Nodes and weights on the box: pieces between all region boundaries and around all crossings of logits."""
    volume = jnp.prod(high - low)
    still = jnp.zeros_like(p.gate_intercept), jnp.zeros_like(q.gate_intercept)
    if len(low) == 1:
        x, weights = _gauss(_few(_edges(p, q, still, 0, low[0], high[0], panels)))
        return x[:, None], weights / volume
    corners = [_corners(mixture, low[1], high[1]) for mixture in (p, q)]
    meet = _meetings(*(jnp.concatenate([a[i] for a in (_boundaries(p), _boundaries(q))]) for i in range(2)))
    outer, outer_weights = _gauss(_few(_edges(p, q, still, 0, low[0], high[0], panels, jnp.concatenate([*corners, meet]))), PLANE_NODES)

    def inner(t: Array) -> tuple[Array, Array]:
        return _gauss(_edges(p, q, (p.gate_coef[:, 0] * t, q.gate_coef[:, 0] * t), 1, low[1], high[1], panels), PLANE_NODES)

    x, weights = jax.vmap(inner)(outer)
    points = jnp.stack([jnp.broadcast_to(outer[:, None], x.shape), x], axis=-1).reshape(-1, 2)
    flat = (outer_weights[:, None] * weights / volume).reshape(-1)
    if checks.known(flat):
        kept = np.flatnonzero(np.asarray(flat) > 0)
        points, flat = points[kept], flat[kept]
    return points, flat


def _boundaries(mixture: Any) -> tuple[Array, Array]:
    """Region boundaries in the plane as lines c + v.x = 0."""
    first, second = np.triu_indices(mixture.experts, 1)
    offset = jnp.zeros_like(mixture.gate_intercept) if mixture.selection == "slope" else mixture.gate_intercept
    return offset[first] - offset[second], mixture.gate_coef[first] - mixture.gate_coef[second]


def _corners(mixture: Any, low: Array, high: Array) -> Array:
    """First coordinates at which boundaries leave the strip low <= x_2 <= high."""
    offset, normal = _boundaries(mixture)
    steep = jnp.where(normal[:, 0] == 0, jnp.full_like(offset, jnp.inf), normal[:, 0])
    return jnp.concatenate([-(offset + normal[:, 1] * end) / steep for end in (low, high)])


def _meetings(offset: Array, normal: Array) -> Array:
    """First coordinates of the points where two boundaries meet."""
    first, second = np.triu_indices(len(offset), 1)
    determinant = normal[first, 0] * normal[second, 1] - normal[first, 1] * normal[second, 0]
    top = -(offset[first] * normal[second, 1] - offset[second] * normal[first, 1])
    return top / jnp.where(determinant == 0, jnp.full_like(top, jnp.inf), determinant)
