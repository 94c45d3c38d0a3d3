"""Inference: Wald regions, the number of experts by BIC, change points at the boundaries."""

from __future__ import annotations

from functools import cache

import numpy as np

from theorylab.core.keys import run_keys
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.moe.claims._programs import DERIVED, fits
from theorylab.moe.claims.rates import EXACT
from theorylab.moe.model import example
from theorylab.moe.problem import Likelihood
from theorylab.moe.scan import scan_breakpoints
from theorylab.moe.selection import select_order

NORMAL, CHI_SQUARE = 1.959963984540054, 22.362032494826934
"""Quantiles of order 0.95: two-sided normal, and chi-square with 13 degrees of freedom."""


@cache
def wald(n: int, sizes: tuple[int, ...], replicates: int, rows: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Whether each 95 % interval covers, shape (replicates, 13), and the Wald statistics, of fits of S1 to n rows."""
    table = fits(3, 2, sizes, replicates, rows=rows, information=True)
    at = sizes.index(n)
    truth = np.asarray(example("S1").pack())
    errors, information = table["point"][at] - truth, table["information"][at]
    sd = np.sqrt(np.diagonal(np.linalg.inv(information), axis1=1, axis2=2))
    return np.abs(errors) <= NORMAL * sd, np.einsum("ri,rij,rj->r", errors, information, errors)


@claim("moe.wald-coverage", source=DERIVED,
       statement=r"On S1 with n = 1000 Wald intervals from the observed information cover as they should, and the Wald statistic is close to "
                 r"$\chi^2_{13}$.",
       fast=EXACT, full={"sizes": (1000,), "replicates": 300, "rows": 1000})
def _(check: Check, sizes: tuple[int, ...], replicates: int, rows: int) -> None:
    covers, statistic = wald(1000, sizes, replicates, rows)
    # The mean over 13 correlated intervals varies at most as that of one of them.
    error = np.sqrt(0.95 * 0.05 / replicates)
    check.equal("mean coverage of the 13 intervals", covers.mean(), 0.95, max(3 * error, 0.02))
    check.equal("coverage of single parameters", covers.mean(axis=0), 0.95, max(4 * error, 0.05))
    check.equal("mean of the Wald statistic", statistic.mean(), 13.3, 4 * np.sqrt(26 / replicates))
    check.equal("coverage of the 95 % region", (statistic <= CHI_SQUARE).mean(), 0.943, max(4 * error, 0.04))


@claim("moe.boundaries-are-change-points", source=DERIVED,
       statement=r"With K = 1 and well separated experts the boundary is found at the rate 1/n: for uniform inputs on [0, 1] the mean error of the "
                 r"midpoint estimator is $1/(2n)$.",
       fast={"sizes": (400,), "replicates": 80}, full={"sizes": (100, 1000, 10_000), "replicates": 400})
def _(check: Check, sizes: tuple[int, ...], replicates: int) -> None:
    truth, scaled = example("S0"), []
    for n in sizes:
        errors = []
        for key in run_keys(0, replicates):
            x, y = truth.sample(n, key=key)
            likelihood = Likelihood(x, y, 2, 1, "logit")
            errors.append(n * abs(scan_breakpoints(likelihood, truth).breakpoints[0] - 0.32))
        scaled.append(errors)
    mean, error = np.mean(scaled, axis=1), np.std(scaled, axis=1, ddof=1) / np.sqrt(replicates)
    check.below("n times the mean error against 1/2, in standard errors", np.abs(mean - 0.5) / error, 4,
                note="means " + ", ".join(f"{m:.3f}" for m in mean))
    check.equal("n times the mean error", mean, 0.5, 0.5 * 8 / np.sqrt(replicates))


@claim("moe.bic-finds-the-number-of-experts", source=DERIVED,
       statement=r"For S2 with variances (0.15, 0.1), inputs on [-1, 1] and n = 600 the BIC chooses k = 2 among 1, 2, 3 for every one of 20 samples.",
       fast=None, full={"samples": 20, "n": 600})
def _(check: Check, samples: int, n: int) -> None:
    truth = example("S2").replace(variance=np.array([0.15, 0.1]))
    criteria, best = [], []
    for key in run_keys(0, samples):
        found = select_order(*truth.sample(n, key=key, low=-1.0), experts=[1, 2, 3], starts=4)
        criteria.append([found.bic[k, k] for k in (1, 2, 3)])
        best.append(found.best()[0])
    check.equal("choices of two experts", np.sum(np.equal(best, 2)), samples, 0)
    error = np.std(criteria, axis=0, ddof=1) * np.sqrt(1 / samples + 1 / 20)
    check.below("mean BIC of k = 1, 2, 3 against the companion's, in standard errors of the difference",
                np.abs(np.mean(criteria, axis=0) - [1628.5, 989.8, 1013.8]) / error, 4)
