"""Rates of convergence: exact and over-specified fits, and a fit with the wrong number of active experts."""

from __future__ import annotations

import numpy as np

from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.moe.claims import _reference as reference
from theorylab.moe.claims._programs import DERIVED, PAPER, atoms, fits, losses, measured
from theorylab.moe.model import Mixture, example

EXACT = {"sizes": (250, 1000), "replicates": 60, "rows": 1000}
EXACT_FULL = {"sizes": (250, 1000, 4000, 16_000), "replicates": 60, "rows": None}
"""Settings that the claims about exactly specified fits share, so that they share the fits."""
REGULAR = 13 / 8
"""n times the mean of H^2 in a regular model of 13 parameters tends to this."""


def exact(sizes: tuple[int, ...], replicates: int, rows: int | None) -> dict[str, np.ndarray]:
    """Distances of fits with k = 3, K = 2."""
    return measured(3, 2, sizes, replicates, rows=rows, information=True)


@claim("moe.density-rate-exact", source=f"{PAPER}, density estimation in the exactly specified case; constants from the {DERIVED}",
       statement=r"With $k = k^*$ and $\bar K = K$ the maximum likelihood density converges at $n^{-1/2}$ up to a logarithm, and "
                 r"$n\,\mathbb{E} H^2 \to \mathrm{df}/8$.",
       fast=EXACT, full=EXACT_FULL)
def _(check: Check, sizes: tuple[int, ...], replicates: int, rows: int | None) -> None:
    found = exact(sizes, replicates, rows)
    h, large = found["hellinger"], np.asarray(sizes) >= 1000
    n = np.asarray(sizes)[large]
    low, high = 0.505 - 0.075, 0.505 + 0.075
    slope = np.polyfit(np.log(sizes), np.log(h.mean(axis=1)), 1)[0]
    check.between("slope of the mean of H", slope, -high, -low, note=f"{replicates} fits at each of n = {sizes}")
    check.slope("slope of the mean total variation", sizes, found["variation"], expected=-0.5, tol=0.08)
    check.equal("mean of H times the root of n, for n from 1000", h.mean(axis=1)[large] * np.sqrt(n), 1.22, 0.25, relative=True)
    scaled = (h[large] ** 2).mean(axis=1) * n
    error = (h[large] ** 2).std(axis=1, ddof=1) * n / np.sqrt(replicates)
    check.below("n E[H^2] against 13/8, in standard errors", np.abs(scaled - REGULAR) / error, 4)


@claim("moe.parameter-rate-exact", source=f"{PAPER}, parameter estimation in the exactly specified case",
       statement=r"With $k = k^*$ and $\bar K = K$ the loss D1 of the maximum likelihood estimate converges at $n^{-1/2}$ up to a logarithm. Means "
                 r"have a heavy tail at small n, so medians are fitted.",
       fast={**EXACT, "tol": 0.2}, full={**EXACT_FULL, "tol": 0.09})
def _(check: Check, sizes: tuple[int, ...], replicates: int, rows: int | None, tol: float) -> None:
    truth, points = reference.read(example("S1")), exact(sizes, replicates, rows)["point"]
    d1 = np.array([[losses(atoms(v, 3, 2), truth, np.arange(3)) for v in row] for row in points])
    within = None if len(sizes) == 2 else (1000, max(sizes))
    check.slope("slope of the median of D1" + " from n = 1000" * bool(within), sizes, d1, expected=-0.51, tol=tol, center="median", within=within)
    at = list(sizes).index(1000)
    error = 1.2533 * d1[at].std(ddof=1) / np.sqrt(replicates)
    check.below("median of D1 at n = 1000 against 1.34, in standard errors", abs(np.median(d1[at]) - 1.34) / error, 4)


@claim("moe.density-rate-over", source=f"{PAPER}, density estimation in the over-specified case; the admissible case is a {DERIVED}",
       statement=r"With more experts than the truth and an admissible $\bar K$ (here $k = 4$, $\bar K = 3$ for S1) the density still converges at "
                 r"$n^{-1/2}$.",
       fast=None, full={"sizes": (500, 2000, 8000, 32_000), "replicates": 12, "steps": 300, "finish": 30})
def _(check: Check, sizes: tuple[int, ...], replicates: int, steps: int, finish: int) -> None:
    h = measured(4, 3, sizes, replicates, steps=steps, finish=finish)["hellinger"]
    check.slope("slope of the mean of H", sizes, h, expected=-0.505, tol=0.08)
    check.equal("mean of H at n = 500, 2000, 8000, 32000", h.mean(axis=1), np.array([0.0723, 0.0383, 0.0176, 0.0089]), 0.25, relative=True)


CELLS = np.array([0, 1, 1, 2])


@claim("moe.parameter-rate-over", source=f"{PAPER}, parameter estimation in the over-specified case; exponents of its companion paper",
       statement=r"In the same fits the loss D2 converges at about $n^{-1/2}$, while within the doubled cell deviations converge much more slowly.",
       fast=None, full={"sizes": (500, 2000, 8000, 32_000), "replicates": 40, "steps": 300, "finish": 30})
def _(check: Check, sizes: tuple[int, ...], replicates: int, steps: int, finish: int) -> None:
    truth = reference.read(example("S1"))
    points = fits(4, 3, sizes, replicates, rows=None, steps=steps, finish=finish)["point"]
    of = lambda kind: np.array([[losses(atoms(v, 4, 3), truth, CELLS, kind) for v in row] for row in points])  # noqa: E731
    d1, d2 = of("exact"), of("over_specified")
    check.slope("slope of the median of D2", sizes, d2, expected=-0.55, tol=0.2, center="median")
    inside = points[..., [11, 12]] - truth.experts[1, 0]                                      # intercepts of the two copies
    rms = np.sqrt((inside**2).mean(axis=(1, 2)))
    slow = np.polyfit(np.log(sizes), np.log(rms), 1)[0]
    check.between("slope of the deviations of b in the doubled cell", slow, -0.45, -0.1)
    check.below("slope of D2 minus that of D1 (medians)", np.diff([np.polyfit(np.log(sizes), np.log(np.median(d, 1)), 1)[0] for d in (d1, d2)]), 0)


@claim("moe.wrong-number-active", source=DERIVED,
       statement=r"A dense fit (K = 3) to S1, which has K = 2, does not converge: its Hellinger distance tends to about 0.138, while the fit with "
                 r"K = 2 has $1.27/\sqrt n$.",
       fast={"sizes": (), "replicates": 0}, full={"sizes": (500, 2000, 8000, 32_000), "replicates": 12})
def _(check: Check, sizes: tuple[int, ...], replicates: int) -> None:
    truth = example("S1")
    check.equal("H of the dense mixture that is nearest in divergence", reference.distances(nearest_dense(truth), truth, -1.0, 1.0).hellinger, 0.1377,
                1e-3)
    if sizes:
        h = measured(3, 3, sizes, replicates)["hellinger"].mean(axis=1)
        check.equal("mean of H at n = 500, 2000, 8000, 32000", h, np.array([0.147, 0.140, 0.138, 0.1377]), 0.03, relative=True)


def nearest_dense(truth: Mixture) -> reference.Atoms:
    """The dense mixture of as many experts with the least Kullback-Leibler divergence from the truth, by BFGS on quadrature."""
    from scipy.optimize import minimize

    x, weight = reference.nodes_of(truth, truth, -1.0, 1.0, 4, 8)
    components = reference.parts(truth, x[:, None])
    low, high = (components.mean - 9 * components.sd).min(axis=1), (components.mean + 9 * components.sd).max(axis=1)
    y, dy = reference.gauss(np.linspace(low, high, 15, axis=1), 10)
    mass = (weight[:, None] * dy * reference.densities(components, y)).ravel()
    used = mass > 1e-16
    mass, rows, ys = mass[used], np.repeat(x, y.shape[1])[used, None], y.ravel()[used]
    plain = reference.read(truth)

    def unpack(v: np.ndarray) -> reference.Atoms:
        return reference.Atoms(np.vstack([v[:4].reshape(2, 2), np.zeros(2)]), v[4:10].reshape(3, 2), np.exp(v[10:]), 3, "slope")

    def loss(v: np.ndarray) -> tuple[float, np.ndarray]:
        g, gate, lines, spread = reference.dense_score(unpack(v), rows, ys)
        slope = np.concatenate([np.tensordot(mass, part, 1).ravel() for part in (gate[:, :2], lines, spread)])
        return -float(mass @ np.log(np.maximum(g, 1e-300))), -slope

    begin = np.concatenate([plain.gate[:2].ravel(), plain.experts.ravel(), np.log(plain.variance)])
    return unpack(minimize(loss, begin, jac=True, method="BFGS", options={"gtol": 1e-8}).x)
