r"""How many experts: merging and splitting of atoms, the dendrogram of a fit, information criteria, and a search over (k, K)."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from theorylab.core import checks
from theorylab.core.iterate import iterate
from theorylab.core.keys import Key, as_key, stream
from theorylab.core.show import html_table, text_table
from theorylab.core.stop import Below
from theorylab.errors import ArgumentError, RunWarning
from theorylab.moe.em import EM
from theorylab.moe.exponent import nontrivial_solution
from theorylab.moe.identifiability import coactivation_graph
from theorylab.moe.model import Mixture
from theorylab.moe.problem import Likelihood
from theorylab.moe.routing import RoutingSearch, best_run

CRITERIA = ("bic", "aic")
EM_STEPS = 1000


def merge(mixture: Mixture, cells: Any, *, active: int | None = None) -> Mixture:
    r"""One atom for each cell, with matched moments.

    With weights w proportional to $e^{\beta_0}$ within the cell: the logarithm of the summed weights; the means of $\beta_1$ and b;
    $a = \mathrm{mean}(a) + \mathrm{cov}_w(\beta_1, b)$ and $\sigma = \mathrm{mean}(\sigma) + \mathrm{var}_w(b)$. Where the atoms of a cell
    differ by t in b only, the density changes by $O(t^3)$, against $O(t^2)$ for plain means (companion derivation).

    Args:
        mixture: k atoms.
        cells: cell number of each, shape (k,), every number 0..c-1 used.
        active: K of the result; the smaller of that of `mixture` and c unless given.

    Raises:
        ArgumentError, ShapeError: `cells` are no such numbers.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S2")
        >>> two = moe.split(truth, 0, 0.1)
        >>> bool(jnp.allclose(moe.merge(two, [0, 0, 1]).variance, truth.variance))
        True
    """
    labels = np.asarray(checks.array("cells", cells, (mixture.experts,)))
    found = np.unique(labels)
    if not np.array_equal(found, np.arange(len(found))):
        raise ArgumentError(f"cells must number the cells 0, 1, ... without gaps, got {labels.tolist()}")
    active = min(mixture.active, len(found)) if active is None else active
    member = jnp.asarray(labels[:, None] == found, mixture.dtype)
    peak = jnp.max(mixture.gate_intercept)
    total = jnp.exp(mixture.gate_intercept - peak) @ member
    share = member * jnp.exp(mixture.gate_intercept - peak)[:, None] / total  # (k, c)
    gate, b = share.T @ mixture.gate_coef, share.T @ mixture.expert_intercept
    own = (mixture.expert_intercept[:, None] - b) * share
    coef = share.T @ mixture.expert_coef + own.T @ mixture.gate_coef
    variance = share.T @ mixture.variance + jnp.sum(share * (mixture.expert_intercept[:, None] - b) ** 2, axis=0)
    return Mixture(peak + jnp.log(total), gate, coef, b, variance, active, mixture.selection)


def split(mixture: Mixture, expert: int, distance: Any, m: int = 2, *, active: int | None = None) -> Mixture:
    r"""One expert replaced by m copies that are hard to tell from it: intercepts $b + t z_j$, variances $\sigma - t^2$, weights $w_j$.

    With the Gauss-Hermite nodes and weights (`nontrivial_solution`) the density changes by $O(t^{2m})$ only: the family behind the slow rates of
    over-specified fits (companion derivation).

    Args:
        mixture: k atoms.
        expert: which one; the copies stand in its place.
        distance: t, at most the standard deviation of the expert.
        m: number of copies.
        active: K of the result; m - 1 more than that of `mixture` unless given.

    Raises:
        ArgumentError: no such expert, fewer than 2 copies, or t too large.

    Example:
        >>> from theorylab import moe
        >>> moe.split(moe.example("S2"), 0, 0.1, 3).experts
        4
    """
    expert = checks.whole("expert", expert, low=0, high=mixture.experts - 1)
    found = nontrivial_solution(m)
    if checks.known(distance, mixture) and not float(distance) ** 2 < float(mixture.variance[expert]):
        raise ArgumentError(f"distance must be below the standard deviation {float(mixture.variance[expert]) ** 0.5:.4g} of expert {expert}, got "
                            f"{float(distance):g}")
    t = jnp.asarray(distance, mixture.dtype)
    places = np.concatenate([np.arange(expert), np.full(len(found.weight), expert), np.arange(expert + 1, mixture.experts)])
    copies = slice(expert, expert + len(found.weight))
    shift, weight = (jnp.asarray(a, mixture.dtype) for a in (found.shift, found.weight))
    gate, b, variance = mixture.gate_intercept[places], mixture.expert_intercept[places], mixture.variance[places]
    return Mixture(gate.at[copies].add(jnp.log(weight)), mixture.gate_coef[places], mixture.expert_coef[places], b.at[copies].add(t * shift),
                   variance.at[copies].add(-(t**2)), mixture.active + len(found.weight) - 1 if active is None else active, mixture.selection)


@dataclasses.dataclass(frozen=True, repr=False)
class Dendrogram:
    """Successive merges of the closest atoms of a fit.

    Attributes:
        mixtures: with k, k - 1, ..., 1 atoms.
        heights: cost of each merge, shape (k - 1,): `heights[i]` leads from `mixtures[i]` to `mixtures[i + 1]`.
        pairs: the atoms of `mixtures[i]` that were merged.
    """

    mixtures: list[Mixture]
    heights: np.ndarray
    pairs: list[tuple[int, int]]

    def at(self, experts: int) -> Mixture:
        """The level with that many atoms."""
        return self.mixtures[len(self.mixtures) - checks.whole("experts", experts, low=1, high=len(self.mixtures))]

    def by_gap(self) -> Mixture:
        """The level before the merge whose height grows most over the one before it; needs three atoms."""
        if len(self.heights) < 2:
            raise ArgumentError(f"a gap between heights needs at least 3 atoms, got {len(self.mixtures)}; use by_likelihood")
        floor = np.finfo(float).tiny
        return self.mixtures[1 + int(np.argmax(np.log(self.heights[1:] + floor) - np.log(self.heights[:-1] + floor)))]

    def by_likelihood(self, likelihood: Likelihood) -> Mixture:
        """The level with the largest log-likelihood plus log n times the height of the merge that would follow it."""
        n = float(jnp.sum(likelihood.weight > 0))
        follow = np.append(self.heights, 0.0)
        scores = [float(likelihood.replace(experts=m.experts, active=m.active).log_likelihood(m)) + np.log(n) * h
                  for m, h in zip(self.mixtures, follow, strict=True)]
        return self.mixtures[int(np.argmax(scores))]

    def plot(self, ax: Any = None) -> Any:
        """Draw the heights against the number of atoms left; returns the matplotlib Axes."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        left = np.arange(len(self.mixtures) - 1, 0, -1)
        ax.plot(left, self.heights, "o-")
        ax.set(xlabel="atoms after the merge", ylabel="height", yscale="log", xticks=left)
        return ax

    def __repr__(self) -> str:
        rows = [[m.experts, f"{i} and {j}", h] for m, (i, j), h in zip(self.mixtures, self.pairs, self.heights.tolist(), strict=False)]
        return "Dendrogram\n" + text_table(["atoms", "merged", "height"], rows)


def dendrogram(mixture: Mixture) -> Dendrogram:
    r"""Merge the closest two atoms again and again.

    The distance of two is $\frac{w_i w_j}{w_i + w_j} (\|\Delta\beta_1\|^2 + \|\Delta a\|^2 + \Delta b^2 + \Delta\sigma^2)$ with the normalised
    weights $w \propto e^{\beta_0}$ (companion derivation).

    Args:
        mixture: an (over-specified) fit.

    Raises:
        ArgumentError: not a `Mixture`.

    Example:
        >>> from theorylab import moe
        >>> tree = moe.dendrogram(moe.split(moe.split(moe.example("S2"), 0, 0.05), 2, 0.05))
        >>> tree.by_gap().experts
        2
    """
    if not isinstance(mixture, Mixture):
        raise ArgumentError(f"mixture must be a Mixture, got {type(mixture).__name__}")
    levels, heights, pairs = [mixture], [], []
    while levels[-1].experts > 1:
        m = levels[-1]
        atoms = np.column_stack([m.gate_coef, m.expert_coef, m.expert_intercept, m.variance])
        weight = np.exp(np.asarray(m.gate_intercept) - float(jnp.max(m.gate_intercept)))
        weight = weight / weight.sum()
        first, second = np.triu_indices(m.experts, 1)
        height = weight[first] * weight[second] / (weight[first] + weight[second]) * np.sum((atoms[first] - atoms[second]) ** 2, axis=1)
        at = int(np.argmin(height))
        i, j = int(first[at]), int(second[at])
        cells = np.arange(m.experts)
        cells[j] = i
        levels.append(merge(m, np.unique(cells, return_inverse=True)[1]))
        heights.append(float(height[at]))
        pairs.append((i, j))
    return Dendrogram(levels, np.asarray(heights), pairs)


def degrees_of_freedom(mixture: Mixture, x: Any = None) -> int:
    """Number of identified parameters: (k - c)(d + 1) of the gate, c components of the co-activation graph, and k (d + 2) of the experts.

    Args:
        mixture: the model.
        x: points that stand for the law of x, which decide the components; without them the graph counts as connected (for K = 1, as having
            no edge).

    Raises:
        ArgumentError, ShapeError: as in `coactivation_graph`.

    Example:
        >>> from theorylab import moe
        >>> moe.degrees_of_freedom(moe.example("S1"))
        13
    """
    if not isinstance(mixture, Mixture):
        raise ArgumentError(f"mixture must be a Mixture, got {type(mixture).__name__}")
    components = (mixture.experts if mixture.active == 1 else 1) if x is None else coactivation_graph(mixture, x).components
    return (mixture.experts - components) * (mixture.dim + 1) + mixture.experts * (mixture.dim + 2)


def _counted(likelihood: Any, fit: Any) -> tuple[float, int, float]:
    """Log-likelihood, degrees of freedom, log n."""
    if not isinstance(likelihood, Likelihood):
        raise ArgumentError(f"likelihood must be a Likelihood, got {type(likelihood).__name__}")
    likelihood.check_mixture(fit, "fit")
    used = np.asarray(likelihood.weight) > 0
    return float(likelihood.log_likelihood(fit)), degrees_of_freedom(fit, likelihood.x[used]), float(np.log(used.sum()))


def bic(likelihood: Likelihood, fit: Mixture) -> float:
    r"""The Bayesian information criterion $-2\ell + \mathrm{df} \log n$; smaller is better. n counts rows of positive weight.

    Args:
        likelihood: a problem with rows in memory.
        fit: its maximizer.

    Raises:
        ArgumentError, ShapeError: `fit` does not belong to `likelihood`.

    Example:
        >>> from theorylab import moe
        >>> likelihood = moe.Likelihood(*moe.weyl_sample(moe.example("S1"), 400, -1.0, 1.0), experts=3, active=2)
        >>> round(moe.bic(likelihood, moe.example("S1")), 3)
        799.219
    """
    value, df, log_n = _counted(likelihood, fit)
    return -2 * value + df * log_n


def aic(likelihood: Likelihood, fit: Mixture) -> float:
    r"""Akaike's information criterion $-2\ell + 2\,\mathrm{df}$; smaller is better.

    Args:
        likelihood: a problem with rows in memory.
        fit: its maximizer.

    Raises:
        ArgumentError, ShapeError: `fit` does not belong to `likelihood`.

    Example:
        >>> from theorylab import moe
        >>> likelihood = moe.Likelihood(*moe.weyl_sample(moe.example("S1"), 400, -1.0, 1.0), experts=3, active=2)
        >>> round(moe.aic(likelihood, moe.example("S1")), 3)
        747.329
    """
    value, df, _ = _counted(likelihood, fit)
    return -2 * value + 2 * df


@dataclasses.dataclass(frozen=True, repr=False)
class OrderSelection:
    """Fits for several numbers of experts, and their criteria.

    Attributes:
        fits: from (k, K) to the fit.
        log_likelihood: from (k, K) to that of the data.
        degrees: identified parameters.
        bic: Bayesian information criterion.
        aic: Akaike's.
    """

    fits: dict[tuple[int, int], Mixture]
    log_likelihood: dict[tuple[int, int], float]
    degrees: dict[tuple[int, int], int]
    bic: dict[tuple[int, int], float]
    aic: dict[tuple[int, int], float]

    def best(self, criterion: str = "bic") -> tuple[int, int]:
        """The pair (k, K) with the smallest criterion."""
        values = getattr(self, checks.among("criterion", criterion, CRITERIA))
        return min(values, key=values.__getitem__)

    def _rows(self) -> tuple[list[str], list[list[Any]]]:
        head = ["experts", "active", "log_likelihood", "df", "bic", "aic"]
        return head, [[*pair, self.log_likelihood[pair], self.degrees[pair], self.bic[pair], self.aic[pair]] for pair in self.fits]

    def __repr__(self) -> str:
        return f"OrderSelection: (experts, active) = {self.best()} by bic\n{text_table(*self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(*self._rows(), caption=f"(experts, active) = {self.best()} by bic")


def select_order(x: Any, y: Any, experts: Sequence[int], active: Sequence[int] | None = None, *, selection: str = "slope", weight: Any = None,
                 starts: int = 4, rounds: int = 25, key: Key | int = 0) -> OrderSelection:
    """Fit every (k, K) from several starts, by `RoutingSearch` or, for K = k, by `EM`, and compare the criteria.

    Args:
        x: inputs, shape (n, d).
        y: responses, shape (n,).
        experts: numbers k to try.
        active: numbers K to try, each with every k that is not smaller; K = k (the dense model) unless given.
        selection: as in `Likelihood`.
        weight: as in `Likelihood`.
        starts: of each fit.
        rounds: most steps of each search.
        key: seed or random key.

    Raises:
        ArgumentError, ShapeError: as in `Likelihood`, or no pair with K <= k.

    Example:
        >>> from theorylab import moe
        >>> moe.select_order(*moe.example("S2").sample(100, key=0), experts=[1]).degrees
        {(1, 1): 3}
    """
    numbers = [checks.whole("experts", k, low=1) for k in experts]
    kept = None if active is None else [checks.whole("active", K, low=1) for K in active]
    pairs = [(k, K) for k in numbers for K in (kept or [k]) if k >= K]
    if not pairs:
        raise ArgumentError(f"experts and active must allow a pair with active <= experts, got {list(experts)} and {active and list(active)}")
    key, fits, values, degrees, by_bic, by_aic = as_key(key), {}, {}, {}, {}, {}
    for pair in pairs:
        likelihood = Likelihood(x, y, *pair, selection, weight)
        used = likelihood.x[np.asarray(likelihood.weight) > 0]
        # With one expert every start ends in the least squares fit; a dense gate has no routing to search for.
        method, steps, runs = (RoutingSearch(starts), rounds, None) if pair[1] < pair[0] else (EM(), EM_STEPS, starts if pair[0] > 1 else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RunWarning)  # a start that is still climbing after many steps is compared where it stands
            fit = best_run(iterate(likelihood, method, steps=steps, stop=Below("gain", 1e-9), keep="last", throw=False, runs=runs,
                                   key=stream(key, str(pair))))
        value, df = float(likelihood.log_likelihood(fit)), degrees_of_freedom(fit, used)
        fits[pair], values[pair], degrees[pair] = fit, value, df
        by_bic[pair], by_aic[pair] = -2 * value + df * float(np.log(len(used))), -2 * value + 2 * df
    return OrderSelection(fits, values, degrees, by_bic, by_aic)
