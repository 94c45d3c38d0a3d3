r"""What the density determines: the graph of experts that are active together, free directions of the gate, admissible copies of experts."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from theorylab.core import checks
from theorylab.core.show import html_table, text_table
from theorylab.errors import ArgumentError, ShapeError
from theorylab.moe.model import Mixture

SEPARABLE = 50.0  # a spread of gate logits beyond which the softmax is 0 or 1 to round-off on most of the data


@dataclasses.dataclass(frozen=True, repr=False)
class CoactivationGraph:
    """Experts as vertices; two are joined if some region holds both.

    Attributes:
        adjacency: boolean, shape (k, k), true on the diagonal of experts that are ever active.
        component: number of the component of each expert, shape (k,).
        regions: the sets of active experts that occur, each as a tuple.
        masses: share of the points in each.
    """

    adjacency: np.ndarray
    component: np.ndarray
    regions: list[tuple[int, ...]]
    masses: np.ndarray

    @property
    def components(self) -> int:
        """Number of connected components; an expert that is never active is one of its own."""
        return int(self.component.max()) + 1

    @property
    def dead(self) -> np.ndarray:
        """Experts that are active nowhere."""
        return np.flatnonzero(~np.diag(self.adjacency))

    def __repr__(self) -> str:
        groups = ", ".join("{" + ", ".join(map(str, np.flatnonzero(self.component == c))) + "}" for c in range(self.components))
        return f"CoactivationGraph({len(self.component)} experts, {len(self.regions)} regions, components {groups})"


def coactivation_graph(mixture: Mixture, x: Any) -> CoactivationGraph:
    r"""The graph of experts that are active together somewhere on the points x.

    Within a connected component only differences of gate parameters are identified, so the gate has (number of components) x (d + 1) free
    directions (companion derivation). With K = 1 there is no edge: nothing but the partition is identified.

    Args:
        mixture: k experts.
        x: points that stand for the law of x, shape (n, d): a sample or a fine grid.

    Raises:
        ArgumentError, ShapeError: `mixture` is no `Mixture`, or x has another dimension.

    Example:
        >>> from theorylab import moe
        >>> moe.coactivation_graph(moe.example("S1"), jnp.linspace(-1, 1, 100))
        CoactivationGraph(3 experts, 2 regions, components {0, 1, 2})
    """
    routing = np.asarray(_mixture(mixture).routing(x))
    rows, counts = np.unique(routing, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rows, counts = rows[order], counts[order]
    adjacency = (rows.T.astype(int) @ rows.astype(int)) > 0
    component = np.full(mixture.experts, -1)
    for first in range(mixture.experts):
        if component[first] < 0:
            reached = np.arange(mixture.experts) == first
            while True:  # breadth-first: at most k rounds
                further = reached | adjacency[reached].any(axis=0)
                if (further == reached).all():
                    break
                reached = further
            component[reached] = component.max() + 1
    return CoactivationGraph(adjacency, component, [tuple(map(int, np.flatnonzero(row))) for row in rows], counts / counts.sum())


def _mixture(mixture: Any) -> Mixture:
    if not isinstance(mixture, Mixture):
        raise ArgumentError(f"mixture must be a Mixture, got {type(mixture).__name__}")
    if mixture.variance.ndim != 1:
        raise ShapeError(f"mixture must be a single one, got a batch of shape {mixture.variance.shape[:-1]}")
    return mixture


def null_directions(mixture: Mixture, x: Any) -> np.ndarray:
    r"""Directions in the gate matrix $(\beta_0 | \beta_1)$ along which the density does not change while the routing stays the same.

    One for each component of the co-activation graph and each coordinate of (1, x): the same shift for all experts of the component. They span
    the null space of the Hessian of the gate (companion derivation).

    Args:
        mixture: k experts.
        x: points, shape (n, d).

    Returns:
        Orthonormal, shape (components x (d + 1), k, d + 1).

    Raises:
        ArgumentError, ShapeError: as in `coactivation_graph`.

    Example:
        >>> from theorylab import moe
        >>> moe.null_directions(moe.example("S1"), jnp.linspace(-1, 1, 100)).shape
        (2, 3, 2)
    """
    graph = coactivation_graph(mixture, x)
    members = (graph.component == np.arange(graph.components)[:, None]).astype(float)
    members /= np.linalg.norm(members, axis=1, keepdims=True)
    return np.einsum("ck,ij->cikj", members, np.eye(mixture.dim + 1)).reshape(-1, mixture.experts, mixture.dim + 1)


def admissible_multiplicities(truth: Mixture, experts: int, active: int, x: Any) -> list[tuple[int, ...]]:
    r"""Numbers of copies $m_j$ of the true experts with which a model of `experts` experts, `active` kept, has the true density.

    Copies share the weight of their expert. For K of at least 2 the condition is $\sum_{j \in L} m_j = \bar K$ for every region L that occurs;
    with K = 1 it is $m_j \ge \bar K$ for every active expert. In logit mode shared weights lower the scores, so all active $m_j$ must be equal as
    well, and no larger than those of experts that are never active (companion derivation; the paper requires $\bar K$ to be at least the largest
    of the sums).

    Args:
        truth: the true mixture.
        experts: k of the fitted model, at least that of the truth.
        active: its K.
        x: points that stand for the law of x, shape (n, d).

    Returns:
        All such tuples in ascending order; an empty list means that the truth lies outside the model.

    Raises:
        ArgumentError, ShapeError: a number out of range, or as in `coactivation_graph`.

    Example:
        >>> from theorylab import moe
        >>> moe.admissible_multiplicities(moe.example("S1"), 4, 3, jnp.linspace(-1, 1, 100))
        [(1, 2, 1)]
        >>> moe.admissible_multiplicities(moe.example("S0"), 3, 2, jnp.linspace(0, 1, 100))
        []
    """
    graph = coactivation_graph(truth, x)
    experts = checks.whole("experts", experts, low=truth.experts)
    active = checks.whole("active", active, low=1, high=experts)
    alive = np.setdiff1d(np.arange(truth.experts), graph.dead)

    def fits(m: tuple[int, ...]) -> bool:
        copies = np.asarray(m)
        if truth.selection == "logit" and not ((copies[alive] == copies[alive[0]]).all() and (copies >= copies[alive[0]]).all()):
            return False
        if truth.active == 1:
            return bool((copies[alive] >= active).all())
        return all(copies[list(region)].sum() == active for region in graph.regions)

    cuts = itertools.combinations(range(1, experts), truth.experts - 1)
    return [m for m in (tuple(b - a for a, b in itertools.pairwise((0, *cut, experts))) for cut in cuts) if fits(m)]


@dataclasses.dataclass(frozen=True, repr=False)
class Identifiability:
    """What can be estimated of a mixture.

    Attributes:
        graph: the co-activation graph.
        free: free directions of the gate beyond the common translation.
        parameters: number of identified parameters: (k - components)(d + 1) of the gate, d + 2 of each expert that is ever active.
        separation: smallest distance between two experts in (b, a, variance): 0 means that one of them is redundant.
        closest: the pair that attains it, or None for a single expert.
        diverging: pairs of experts whose gate is 0 or 1 to round-off on most of the points that have both active: their gate slope is
            determined up to a lower bound only.
        ties: share of the points at which the K-th and the next score are equal.
        partition_only: whether K = 1, so that of the gate only the partition is identified.
    """

    graph: CoactivationGraph
    free: int
    parameters: int
    separation: float
    closest: tuple[int, int] | None
    diverging: list[tuple[int, int]]
    ties: float
    partition_only: bool

    @property
    def identified(self) -> bool:
        """Whether equal densities imply equal parameters up to translation and order (the paper's proposition, for a connected graph)."""
        return self.free == 0 and not len(self.graph.dead) and self.separation > 0

    def _lines(self) -> list[list[str]]:
        graph = self.graph
        sets = ", ".join("{" + ", ".join(map(str, region)) + f"}} {mass:.3g}" for region, mass in zip(graph.regions[:6], graph.masses, strict=False))
        lines = [["regions", sets + (f", ... ({len(graph.regions)} in all)" if len(graph.regions) > 6 else "")],
                 ["components", f"{graph.components}: {repr(graph)[:-1].partition('components ')[2]}"],
                 ["dead experts", ", ".join(map(str, graph.dead)) or "none"],
                 ["free gate directions", f"{self.free}" + (" (K = 1: only the partition is identified)" if self.partition_only else "")],
                 ["identified parameters", str(self.parameters)],
                 ["closest experts", f"{' and '.join(map(str, self.closest))}, at distance {self.separation:.4g}" if self.closest else "none"],
                 ["diverging gates", ", ".join(f"{i} and {j}" for i, j in self.diverging) or "none"]]
        return lines + ([["tied points", f"{self.ties:.3g}: the lower index is kept there"]] if self.ties > 0 else [])

    def __repr__(self) -> str:
        verdict = "identified" if self.identified else "not identified"
        return f"Identifiability: {verdict}\n" + text_table(["what", "found"], self._lines())

    def _repr_html_(self) -> str:
        return html_table(["what", "found"], self._lines(), caption=f"Identifiability: {'identified' if self.identified else 'not identified'}")


def identifiability(mixture: Mixture, x: Any) -> Identifiability:
    """A report to read before any estimate is quoted: dead experts, free gate directions, separation of the experts, diverging gates.

    Args:
        mixture: the truth or a fit.
        x: points that stand for the law of x, shape (n, d).

    Raises:
        ArgumentError, ShapeError: as in `coactivation_graph`.

    Example:
        >>> from theorylab import moe
        >>> report = moe.identifiability(moe.example("S0"), jnp.linspace(0, 1, 100))
        >>> report.identified, report.free, report.partition_only
        (False, 2, True)
    """
    graph = coactivation_graph(mixture, x)
    experts = np.column_stack([mixture.expert_matrix, mixture.variance])
    first, second = np.triu_indices(mixture.experts, 1)
    apart = np.linalg.norm(experts[first] - experts[second], axis=1)
    at = int(np.argmin(apart)) if apart.size else None
    logits, routing = np.asarray(mixture.logits(x)), np.asarray(mixture.routing(x))
    scores = np.sort(np.asarray(mixture.scores(x)), axis=1)[:, ::-1]
    tied = scores[:, mixture.active - 1] == scores[:, mixture.active] if mixture.active < mixture.experts else np.zeros(len(scores), bool)
    diverging = []
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        both = routing[:, i] & routing[:, j]
        if both.any() and np.median(np.abs(logits[both, i] - logits[both, j])) > SEPARABLE:
            diverging.append((i, j))
    alive, directions = mixture.experts - len(graph.dead), mixture.dim + 1
    return Identifiability(graph, (graph.components - 1) * directions, (mixture.experts - graph.components) * directions + alive * (directions + 1),
                           np.inf if at is None else float(apart[at]), None if at is None else (int(first[at]), int(second[at])), diverging,
                           float(tied.mean()), mixture.active == 1)
