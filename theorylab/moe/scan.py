"""Change points in one dimension with one active expert: the best partition for given experts, exactly."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from theorylab.errors import ArgumentError
from theorylab.moe import density
from theorylab.moe.model import Mixture
from theorylab.moe.problem import Likelihood

MOST = 12  # experts: the dynamic programme visits all their subsets


class Scan(NamedTuple):
    """The best partition of the line.

    Attributes:
        mixture: the given experts with a gate of that partition.
        breakpoints: where the active expert changes, ascending.
        order: the active experts from left to right.
        log_likelihood: of the data.
    """

    mixture: Mixture
    breakpoints: np.ndarray
    order: tuple[int, ...]
    log_likelihood: float


def scan_breakpoints(likelihood: Likelihood, mixture: Mixture) -> Scan:
    r"""The gate that maximises the likelihood for the experts of `mixture`, for d = 1 and K = 1, by dynamic programming over the sorted inputs.

    With K = 1 the gate matters only through its partition: in logit mode intervals, each served by another expert and in any order; in slope mode
    the two half lines. All of them are compared, in time $2^k k n$; breakpoints are midpoints between inputs, and equal inputs are not parted.
    Alternated with `EM` steps it climbs in both. (Companion derivation.)

    Args:
        likelihood: the problem, of one input and one active expert, with rows in memory.
        mixture: gives the experts.

    Raises:
        ArgumentError: more inputs, more active experts (use `RoutingSearch`), or more than 12 experts.
        ShapeError: `mixture` does not belong to the problem.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S0")
        >>> likelihood = moe.Likelihood(*moe.weyl_sample(truth, 200), experts=2, active=1, selection="logit")
        >>> found = moe.scan_breakpoints(likelihood, truth)
        >>> found.order, found.breakpoints.tolist()
        ((1, 0), [0.32])
    """
    if not isinstance(likelihood, Likelihood):
        raise ArgumentError(f"likelihood must be a Likelihood, got {type(likelihood).__name__}")
    likelihood.check_mixture(mixture, "mixture")
    k = mixture.experts
    if likelihood.dim != 1 or likelihood.active != 1 or likelihood.per_pass is not None or k > MOST:
        streamed = ", streamed" if likelihood.per_pass is not None else ""
        raise ArgumentError(f"scan_breakpoints needs one input, one active expert, at most {MOST} experts and rows in memory, got {likelihood.dim} "
                            f"inputs, {likelihood.active} active of {k} experts{streamed}; use RoutingSearch")
    used = np.flatnonzero(np.asarray(likelihood.weight) > 0)
    rows = used[np.argsort(np.asarray(likelihood.x)[used, 0], kind="stable")]
    x = np.asarray(likelihood.x, float)[rows, 0]
    logs = np.asarray(density.log_normal(mixture, likelihood.y - density.expert_means(mixture, likelihood.x)), float)[:, rows]
    values = logs * np.asarray(likelihood.weight, float)[rows]
    order, cuts = _half_lines(x, values) if likelihood.selection == "slope" else _intervals(x, values)
    others = [j for j in range(k) if j not in order]
    intercept, slope = _gate(order, cuts, 1 / max(float(x[-1] - x[0]), np.finfo(float).tiny), others, likelihood.selection == "logit")
    cast = lambda a: jnp.asarray(a, mixture.dtype)  # noqa: E731
    found = mixture.replace(gate_intercept=cast(intercept), gate_coef=cast(slope)[:, None])
    return Scan(found, np.asarray(cuts), tuple(order), float(likelihood.log_likelihood(found)))


def _half_lines(x: np.ndarray, values: np.ndarray) -> tuple[list[int], list[float]]:
    """Slope mode: an expert for x < 0 and another for x > 0; or the first for all, with all slopes equal. At x = 0 all tie and the first wins."""
    left, right = values[:, x < 0].sum(axis=1), values[:, x > 0].sum(axis=1)
    pairs = [(0, 0), *itertools.permutations(range(len(values)), 2)]
    first, second = max(pairs, key=lambda pair: left[pair[0]] + right[pair[1]])
    return ([0], []) if first == second else ([first, second], [0.0])


def _intervals(x: np.ndarray, values: np.ndarray) -> tuple[list[int], list[float]]:
    """The best ordered choice of experts and cuts. `best[S]` is the best value of the first i rows by exactly the experts S, for i = 0..n."""
    k, n = values.shape
    sums = np.concatenate([np.zeros((k, 1)), np.cumsum(values, axis=1)], axis=1)
    open_cut = np.concatenate([[True], x[1:] > x[:-1], [False]])
    nothing = np.full(n + 1, -np.inf)
    nothing[0] = 0.0
    best, whence = {0: nothing}, {}
    for subset in sorted(range(1, 2**k), key=int.bit_count):
        tables = []
        for j in (j for j in range(k) if subset >> j & 1):
            before = np.where(open_cut, best[subset & ~(1 << j)] - sums[j], -np.inf)
            top = np.maximum.accumulate(before)
            fresh = np.concatenate([[True], before[1:] > top[:-1]])
            tables.append((top + sums[j], np.maximum.accumulate(np.where(fresh, np.arange(n + 1), 0)), j))
        stacked = np.stack([table[0] for table in tables])
        pick = np.argmax(stacked, axis=0)
        best[subset] = stacked[pick, np.arange(n + 1)]
        whence[subset] = (np.stack([table[1] for table in tables])[pick, np.arange(n + 1)], np.asarray([table[2] for table in tables])[pick])
    subset = max(range(1, 2**k), key=lambda s: best[s][n])
    order, cuts, end = [], [], n
    while subset:
        begin, j = (int(a[end]) for a in whence[subset])
        order.append(j)
        if begin > 0:
            cuts.append((x[begin - 1] + x[begin]) / 2)
        subset, end = subset & ~(1 << j), begin
    return order[::-1], [float(c) for c in cuts[::-1]]


def _gate(order: list[int], cuts: list[float], unit: float, others: list[int], parallel: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lines whose upper envelope has the experts of `order` between the cuts.

    The others run below the first of them, parallel to it; in slope mode, where parallels tie, their slope lies between instead.
    """
    slope, intercept = np.zeros(len(order) + len(others)), np.zeros(len(order) + len(others))
    for place, j in enumerate(order):
        slope[j] = unit * (place - (len(order) - 1) / 2)
        intercept[j] = intercept[order[place - 1]] - unit * cuts[place - 1] if place else 0.0
    slope[others] = slope[order[0]] if parallel else 0.0
    intercept[others] = intercept[order[0]] - 1.0
    return intercept, slope
