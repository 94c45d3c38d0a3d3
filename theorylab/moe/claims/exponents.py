"""The exponent of over-specified fits: the polynomial system, the family that attains it, sharper exponents, the lower bound."""

from __future__ import annotations

from functools import partial
from math import factorial
from typing import Any

import numpy as np

from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.moe.claims import _reference as reference
from theorylab.moe.claims._programs import DERIVED, PAPER
from theorylab.moe.exponent import exponent, exponent_certificate, nontrivial_solution, rates
from theorylab.moe.model import Mixture, example
from theorylab.moe.selection import merge, split

COSTS = {2: 0.12711, 3: 0.010103, 4: 8.967e-4, 5: 7.611e-5}
GAPS = (0.4, 0.3, 0.2, 0.14, 0.1)


@claim("moe.exponent-is-2m", source=f"exponents 4 and 6 of {PAPER} and its companion paper; the others from the {DERIVED}",
       statement=r"The polynomial system of m atoms is solvable at order 2m - 1 (Gauss-Hermite nodes; first residual $-m!/(2m)!$) and not at 2m: "
                 r"$\bar r(m) = 2m$, so b converges at $n^{-1/(4m)}$.",
       fast={"numbers": (), "starts": 16}, full={"numbers": (2, 3, 4, 5), "starts": 40})
def _(check: Check, numbers: tuple[int, ...], starts: int) -> None:
    for m in (2, 3, 4, 5, 6):
        found = nontrivial_solution(m)
        moments = plain_series(found.weight, found.shift, found.scale, 2 * m)
        check.below(f"m = {m}: residuals below order 2m", np.abs(moments[:-1]), 1e-12)
        check.equal(f"m = {m}: residual at 2m", moments[-1], found.residual, 1e-12)
        check.equal(f"m = {m}: exponent", exponent(m).value, 2 * m, 0)
        check.equal(f"m = {m}: rate of b", float(rates(m).paper["expert_intercept"]), 1 / (4 * m), 1e-15)
    for m in numbers:
        below, at = exponent_certificate(m, 2 * m - 1, starts=starts), exponent_certificate(m, 2 * m, starts=starts)
        check.below(f"m = {m}, order {2 * m - 1}: cost of a solution", below.cost, 1e-24)
        check.equal(f"m = {m}, order {2 * m}: least cost, positive", at.cost, COSTS[m], 6e-4, relative=True)
        check.above(f"m = {m}, order {2 * m}: share of starts that end there", at.agreeing / starts, 0.5)
    W = np.geomspace(0.01, 100, 41)
    every = np.array([plain_series(np.array([1, w]), np.array([1, -1 / w]), np.array([-(w + 2) / (6 * w), -(2 * w + 1) / (6 * w * w)]), 4)
                      for w in W])
    check.below("m = 2: the solutions at order 3, by the ratio W of weights: residuals", np.abs(every[:, :3]) / (1 + W + W**-3)[:, None], 1e-14)
    check.equal("m = 2: their coefficient at order 4", every[:, 3], -(W + 1) * (W * W + W + 1) / (36 * W**3), 1e-12, relative=True)


def plain_series(weight: np.ndarray, shift: np.ndarray, scale: np.ndarray, order: int) -> np.ndarray:
    """Coefficients of sum w exp(b t + s t^2), as double sums."""
    return np.array([sum(float(weight @ (shift ** (r - 2 * i) * scale**i)) / factorial(r - 2 * i) / factorial(i) for i in range(r // 2 + 1))
                     for r in range(1, order + 1)])


def gap_of(m: int, t: float) -> reference.Distances:
    """Distances between S2 and the split of its first expert at distance t."""
    truth = example("S2")
    return reference.distances(split(truth, 0, t, m), truth, 0.0, 1.0, panels=4)


@claim("moe.exponent-in-the-density", source=DERIVED,
       statement=r"Replacing an expert of S2 by m atoms at the Gauss-Hermite places $b + t z_j$ with variances $\sigma - t^2$ changes the density by "
                 r"$O(t^{2m})$, while equal splits of $\beta_1$, a or $\sigma$ alone change it by $O(t^2)$.",
       fast={"gaps": (0.14, 0.1)}, full={"gaps": GAPS})
def _(check: Check, gaps: tuple[float, ...]) -> None:
    for m, last, variation in ((2, 4.002, 2.10e-5), (3, 5.998, 2.10e-7), (4, 7.997, 2.11e-9)):
        found = [gap_of(m, t) for t in gaps]
        slope = np.diff(np.log([d.hellinger for d in found]))[-1] / np.diff(np.log(gaps))[-1]
        check.equal(f"m = {m}: last slope of H", slope, 2 * m, 0.05)
        check.equal(f"m = {m}: the same, as reported", slope, last, 1e-3)
        check.equal(f"m = {m}: total variation at t = 0.1", found[-1].variation, variation, 0.005, relative=True)
    for name, slope in (("gate_coef", 2.00), ("expert_coef", 1.99), ("variance", 2.04)):
        found = [reference.distances(pulled(name, t), example("S2"), 0.0, 1.0, panels=4).variation for t in gaps[-2:]]
        check.equal(f"{name} alone: last slope of the total variation", np.diff(np.log(found))[0] / np.diff(np.log(gaps[-2:]))[0], slope, 0.006)


def pulled(name: str, t: float) -> Mixture:
    """S2 with two copies of its first expert at half weight, of which one field differs by plus and minus t."""
    both = reference.copies(example("S2"), (2, 1), 3)
    field = np.array(getattr(both, name))
    field[0], field[1] = field[0] + t, field[1] - t
    return both.replace(**{name: field})


@claim("moe.lower-bound", source=DERIVED,
       statement=r"Along this family $n H^2$ stays bounded at $t = n^{-1/(4m)}$, so no estimator of b in a cell of m atoms converges faster than "
                 r"$n^{-1/(4m)}$ uniformly.",
       fast={"tol": 0.006})
def _(check: Check, tol: float) -> None:
    n = 10.0 ** np.arange(3, 9)
    for m, values in ((2, (0.131, 0.106, 0.0986, 0.0962, 0.0956, 0.0955)), (3, (0.502, 0.232, 0.161, 0.135, 0.125, 0.121))):
        found = np.array([k * gap_of(m, k ** (-1 / (4 * m))).hellinger ** 2 for k in n])
        check.equal(f"m = {m}: n H^2 for n = 10^3 to 10^8", found, np.array(values), tol, relative=True)
        check.below(f"m = {m}: last ratio of neighbours, near 1", abs(found[-1] / found[-2] - 1), 0.05)


FIELDS = ("gate_coef", "expert_coef", "expert_intercept", "log_variance")
EXPECTED = {"gate_coef": 1.99, "expert_coef": 2.00, "expert_intercept": 3.98, "log_variance": 1.96}


@claim("moe.sharper-exponents", source=f"{DERIVED}; {PAPER} has exponents 4 and 2 for the slopes of gate and experts",
       statement=r"In a cell of two atoms of equal weight the least H at half-gap $\tau$ is of order $\tau^2$ in $\beta_1$ and in a, $\tau^4$ in b "
                 r"and $\tau^2$ in $\log\sigma$.",
       fast={"gaps": (0.14, 0.1), "fields": ("gate_coef", "expert_intercept")}, full={"gaps": (0.4, 0.28, 0.2, 0.14, 0.1), "fields": FIELDS})
def _(check: Check, gaps: tuple[float, ...], fields: tuple[str, ...]) -> None:
    for name in fields:
        h = profile(name, gaps)
        slope = np.diff(np.log(h))[-1] / np.diff(np.log(gaps))[-1]
        check.equal(f"{name}: last slope of the least H", slope, EXPECTED[name], 0.03, note="H " + ", ".join(f"{v:.3g}" for v in h))


def profile(name: str, gaps: tuple[float, ...]) -> list[float]:
    """The least Hellinger distance to S2 over fits of three experts, two of equal weight, whose `name`s differ by twice the gap."""
    from scipy.optimize import least_squares

    truth, place = example("S2"), FIELDS.index(name)
    x, weight = reference.gauss(np.linspace(0, 1, 3), 8)
    components = reference.parts(truth, x[:, None])
    low, high = (components.mean - 9 * components.sd).min(axis=1), (components.mean + 9 * components.sd).max(axis=1)
    y, dy = reference.gauss(np.linspace(low, high, 11, axis=1), 10)
    root = np.sqrt(reference.densities(components, y))
    scale = np.sqrt(weight[:, None] * dy / 2).ravel()
    rows, ys = np.repeat(x, y.shape[1])[:, None], y.ravel()
    # Free: beta0; middle and half-gap of each field; intercept, slope and log variance of the other expert; its gate is 0.
    middle = np.array([float(truth.gate_coef[0, 0]), float(truth.expert_coef[0, 0]), float(truth.expert_intercept[0]), np.log(truth.variance[0])])
    other = np.array([float(truth.expert_intercept[1]), float(truth.expert_coef[1, 0]), np.log(truth.variance[1])])
    fixed = 5 + place

    def unpack(v: np.ndarray) -> reference.Atoms:
        first, second = v[1:5] + v[5:9], v[1:5] - v[5:9]
        gate = np.array([[v[0], first[0]], [v[0], second[0]], [0.0, 0.0]])
        experts = np.array([[first[2], first[1]], [second[2], second[1]], [v[9], v[10]]])
        return reference.Atoms(gate, experts, np.exp([first[3], second[3], v[11]]), 3, "slope")

    def residual(free: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
        v = np.insert(free, fixed, tau)
        g, gate, lines, spread = reference.dense_score(unpack(v), rows, ys)
        half = (scale * np.sqrt(g) / 2)[:, None]
        ends = [np.column_stack([gate[:, j, 1], lines[:, j, 1], lines[:, j, 0], spread[:, j]]) for j in (0, 1)]
        slopes = np.column_stack([gate[:, 0, 0] + gate[:, 1, 0], ends[0] + ends[1], ends[0] - ends[1], lines[:, 2], spread[:, 2]])
        return scale * (np.sqrt(g) - root.ravel()), np.delete(half * slopes, fixed, axis=1)

    found, begin = [], np.delete(np.concatenate([[float(truth.gate_intercept[0]) - np.log(2)], middle, np.zeros(4), other]), fixed)
    best = None
    for tau in gaps:
        starts = [begin] if best is None else [begin, best]
        slopes: Any = lambda f, t=tau: residual(f, t)[1]  # noqa: E731
        runs = [least_squares(lambda f, t=tau: residual(f, t)[0], s, jac=slopes, method="lm", xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=400)
                for s in starts]
        best = min(runs, key=lambda r: r.cost).x
        found.append(float(np.sqrt(2 * min(r.cost for r in runs))))
    return found


@claim("moe.moment-matched-merge", source=DERIVED,
       statement=r"Merging atoms that differ by t in b only costs $O(t^2)$ in total variation with plain averages and $O(t^3)$ with matched moments.",
       fast={"gaps": (0.2, 0.1, 0.05)})
def _(check: Check, gaps: tuple[float, ...]) -> None:
    away = partial(reference.distances, low=0.0, high=1.0, panels=4)
    plain, matched = [], []
    for t in gaps:
        two = unequal(t)
        whole = merge(two, [0, 0, 1], active=2)
        flat = whole.replace(variance=np.append(np.asarray(two.variance)[0], np.asarray(two.variance)[2]))
        plain.append(away(two, flat).variation)
        matched.append(away(two, whole).variation)
    for name, values, power in (("plain", plain, 2), ("matched moments", matched, 3)):
        check.equal(f"{name}: last slope", np.diff(np.log(values))[-1] / np.diff(np.log(gaps))[-1], power, 0.1)


def unequal(t: float) -> Mixture:
    """S2 with two copies of its first expert of weights 0.3 and 0.7 at intercepts that differ by t."""
    both = reference.copies(example("S2"), (2, 1), 3)
    b, gate = np.array(both.expert_intercept), np.array(both.gate_intercept)
    b[:2] += t * np.array([0.5, -0.5])
    gate[:2] += np.log([0.6, 1.4])
    return both.replace(expert_intercept=b, gate_intercept=gate)
