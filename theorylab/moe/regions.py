"""The regions on which the gate keeps one set of experts: boundaries, masses and pictures."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from theorylab.core import checks
from theorylab.core.keys import Key, stream
from theorylab.errors import ArgumentError, ShapeError
from theorylab.moe.model import Mixture

SAMPLES = 2**16


class Regions(NamedTuple):
    """Sets of experts and their probabilities, the largest first.

    Attributes:
        members: which experts are kept, boolean of shape `(regions, k)`.
        masses: probabilities, shape `(regions,)`.
        error: standard errors of the masses; 0 where they are exact.
    """

    members: np.ndarray
    masses: np.ndarray
    error: np.ndarray


def boundaries(mixture: Mixture, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """The points between `low` and `high` where the routing changes, for d = 1, in increasing order.

    With `selection="slope"` there is none but 0; with `"logit"` they are crossings of two logits.

    Raises:
        ArgumentError: d is not 1, or `low` is not below `high`.

    Example:
        >>> from theorylab import moe
        >>> boundaries(moe.example("S0")).tolist()
        [0.32]
    """
    if mixture.dim != 1:
        raise ArgumentError(f"boundaries are points for one input only, got a mixture of {mixture.dim}; use region_masses")
    if not low < high:
        raise ArgumentError(f"low must be below high, got {low:g} and {high:g}")
    slope, intercept = np.asarray(mixture.gate_coef[:, 0]), np.asarray(mixture.gate_intercept)
    intercept = np.zeros_like(intercept) if mixture.selection == "slope" else intercept
    i, j = np.triu_indices(mixture.experts, 1)
    tilt, rise = slope[i] - slope[j], intercept[j] - intercept[i]
    crossings = np.unique(rise[tilt != 0] / tilt[tilt != 0]) + 0.0
    crossings = crossings[(crossings > low) & (crossings < high)]
    ends = np.concatenate([[low], crossings, [high]])
    inside = np.asarray(mixture.routing(jnp.asarray((ends[1:] + ends[:-1])[:, None] / 2, mixture.dtype)))
    return crossings[np.any(inside[1:] != inside[:-1], axis=1)]


def region_masses(mixture: Mixture, law: Any = (0.0, 1.0), *, samples: int = SAMPLES, key: Key | int = 0) -> Regions:
    """Probabilities of the sets of kept experts under a law of the inputs.

    Args:
        mixture: the model.
        law: `(low, high)` for uniform inputs, numbers or shape `(d,)`; or `(points, weights)`, of shapes `(m, d)` and `(m,)`, or points alone;
            or a function of (key, n) that draws n inputs. For a uniform law and d = 1 masses are exact; for points those of that law.
        samples: draws, where masses are estimated.
        key: seed or JAX key of the draws.

    Raises:
        ArgumentError, ShapeError: `law` is none of these.

    Example:
        >>> from theorylab import moe
        >>> moe.example("S1").region_masses((-1.0, 3.0)).masses.tolist()
        [0.75, 0.25]
    """
    samples = checks.whole("samples", samples, low=1)
    if callable(law):
        points = np.asarray(law(stream(key, "law"), samples))
        return _tally(mixture, points, np.full(len(points), 1 / len(points)), len(points))
    if not isinstance(law, (tuple, list)) and np.ndim(law) == 2:
        law = (law, np.ones(len(law)))
    if not isinstance(law, (tuple, list)) or len(law) != 2:
        raise ArgumentError("law must be (low, high), (points, weights), an array of points or a function of (key, n)")
    if np.ndim(law[0]) == 2:
        points, weights = np.asarray(law[0]), np.asarray(law[1])
        if weights.shape != points.shape[:1]:
            raise ShapeError(f"weights must have shape ({len(points)},) to match the points, got {weights.shape}")
        if not (weights >= 0).all() or not weights.sum() > 0:
            raise ArgumentError("weights must not be negative, and must not all be 0")
        return _tally(mixture, points, weights / weights.sum(), None)
    if mixture.dim == 1 and np.size(law[0]) == 1 and np.size(law[1]) == 1:
        low, high = (np.asarray(end, float).item() for end in law)
        ends = np.concatenate([[low], boundaries(mixture, low, high), [high]])
        return _tally(mixture, (ends[1:] + ends[:-1])[:, None] / 2, np.diff(ends) / (high - low), None)
    drawn = mixture.sample(samples, key=stream(key, "law"), low=law[0], high=law[1]).x
    return _tally(mixture, drawn, np.full(samples, 1 / samples), samples)


def _tally(mixture: Mixture, points: Any, weights: np.ndarray, draws: int | None) -> Regions:
    routing = np.asarray(mixture.routing(jnp.asarray(points, mixture.dtype)))
    members, place = np.unique(routing, axis=0, return_inverse=True)
    masses = np.bincount(place.ravel(), weights=weights, minlength=len(members))
    order = np.argsort(-masses, kind="stable")
    masses = masses[order]
    error = np.zeros_like(masses) if draws is None else np.sqrt(masses * (1 - masses) / draws)
    return Regions(members[order], masses, error)


def plot_regions(mixture: Mixture, low: float = -1.0, high: float = 1.0, *, ax: Any = None, points: int = 300) -> Any:
    """Draw the regions as bands (d = 1) or on a square (d = 2); labels name the experts that are kept.

    Args:
        mixture: the model.
        low: lower end of each input.
        high: upper end.
        ax: where to draw; new axes unless given.
        points: per axis, for d = 2.

    Returns:
        The axes.

    Raises:
        ArgumentError: more than two inputs, or `low` is not below `high`.

    Example:
        >>> from theorylab import moe
        >>> plot_regions(moe.example("S3"), points=20).get_xlabel()
        'x1'
    """
    import matplotlib.pyplot as plt

    from theorylab.lab.style import COLORS

    if mixture.dim > 2:
        raise ArgumentError(f"regions are drawn for one or two inputs, got a mixture of {mixture.dim}; use region_masses")
    if not low < high:
        raise ArgumentError(f"low must be below high, got {low:g} and {high:g}")
    ax = plt.subplots()[1] if ax is None else ax
    colors = list(COLORS.values())
    name = lambda members: "{" + ", ".join(str(int(j)) for j in np.flatnonzero(members)) + "}"  # noqa: E731
    if mixture.dim == 1:
        ends = np.concatenate([[low], boundaries(mixture, low, high), [high]])
        for a, b in pairwise(ends):
            members = np.asarray(mixture.routing(jnp.asarray([[(a + b) / 2]], mixture.dtype)))[0]
            ax.axvspan(a, b, color=colors[int(np.flatnonzero(members) @ np.arange(1, members.sum() + 1)) % len(colors)], alpha=0.12, lw=0)
            ax.annotate(name(members), ((a + b) / 2, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7)
        ax.set(xlim=(low, high), xlabel="x")
        return ax
    side = np.linspace(low, high, points)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    members, place = np.unique(np.asarray(mixture.routing(jnp.asarray(grid, mixture.dtype))), axis=0, return_inverse=True)
    place = place.reshape(points, points)
    ax.imshow(place, extent=(low, high, low, high), origin="lower", cmap="tab20", alpha=0.5, interpolation="nearest", aspect="auto")
    for region, which in enumerate(members):
        row, column = np.argwhere(place == region).mean(axis=0)
        ax.annotate(name(which), (np.interp(column, np.arange(points), side), np.interp(row, np.arange(points), side)), ha="center", fontsize=7)
    ax.set(xlabel="x1", ylabel="x2")
    return ax


def plot(mixture: Mixture, data: Any = None, *, low: float | None = None, high: float | None = None, level: float = 0.9, ax: Any = None) -> Any:
    """Draw the mean, the predictive band and the kept experts for d = 1, with the data if given; the regions for d = 2.

    Args:
        mixture: the model.
        data: `(x, y)`.
        low: lower end of x; that of the data, or 0.
        high: upper end; that of the data, or 1.
        level: probability of the band at each x.
        ax: where to draw; new axes unless given.

    Returns:
        The axes.

    Raises:
        ArgumentError: more than two inputs, or `level` outside (0, 1).

    Example:
        >>> from theorylab import moe
        >>> moe.example("S2").plot(level=0.8).get_ylabel()
        'y'
    """
    import matplotlib.pyplot as plt

    checks.real("level", level, above=0.0, below=1.0)
    seen = None if data is None else np.asarray(data[0])
    low = (0.0 if seen is None else float(seen.min())) if low is None else low
    high = (1.0 if seen is None else float(seen.max())) if high is None else high
    if mixture.dim != 1:
        return plot_regions(mixture, low, high, ax=ax)
    ax = plt.subplots()[1] if ax is None else ax
    x = jnp.linspace(low, high, 400, dtype=mixture.dtype)[:, None]
    if data is not None:
        ax.plot(np.ravel(data[0]), np.asarray(data[1]), ".", color="0.6", markersize=2, zorder=0)
    bottom, top = np.asarray(mixture.quantile(x, jnp.asarray([(1 - level) / 2, (1 + level) / 2]))).T
    grid = np.asarray(x[:, 0])
    ax.fill_between(grid, bottom, top, alpha=0.2, lw=0, label=f"{level:.0%} band")
    ax.plot(grid, np.asarray(mixture.mean(x)), label="mean")
    lines = np.asarray(mixture.expert_intercept) + grid[:, None] * np.asarray(mixture.expert_coef[:, 0])
    for j, line in enumerate(np.where(np.asarray(mixture.routing(x)), lines, np.nan).T):
        ax.plot(grid, line, ":", label=f"expert {j}")
    for point in boundaries(mixture, low, high):
        ax.axvline(point, color="0.5", lw=0.6)
    ax.set(xlabel="x", ylabel="y")
    ax.legend()
    return ax
