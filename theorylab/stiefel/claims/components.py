"""Independent components: what the objective is at the sources, and what it cannot be below."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.stiefel.claims._programs import DERIVED, basis
from theorylab.stiefel.ica import ICA, log_cosh

LAPLACE, GAUSSIAN = 0.338236772315562, 0.374567207491438
"""E log cosh of a variable of variance 1."""


@claim("stiefel.source-objective", source=DERIVED,
       statement=r"$E\log\cosh$ of a variable of variance 1 is 0.338236772315562 for Laplace and 0.374567207491438 for Gaussian ones: minimizing it "
                 r"over white projections finds super-Gaussian sources, and a value below p times the first proves that a point is infeasible.",
       fast={"nodes": 200, "turns": 20}, full={"nodes": 1000, "turns": 200})
def _(check: Check, nodes: int, turns: int) -> None:
    from scipy.integrate import quad

    densities = {"Laplace": (lambda s: np.exp(-np.sqrt(2) * s) * np.sqrt(2), LAPLACE),
                 "Gaussian": (lambda s: 2 * np.exp(-s * s / 2) / np.sqrt(2 * np.pi), GAUSSIAN)}
    for name, (density, value) in densities.items():
        found = quad(lambda s, density=density: float(log_cosh(jnp.asarray(s))) * density(s), 0, 40, epsabs=1e-13, epsrel=1e-13, limit=200)[0]
        check.equal(f"{name}: quadrature", found, value, 1e-12)
    # all pairs of quantiles: two independent sources whose sample is exactly symmetric, of variance 1
    level = (np.arange(nodes) + 0.5) / nodes
    one = -np.sign(level - 0.5) * np.log(1 - 2 * np.abs(level - 0.5)) / np.sqrt(2)
    one = one / np.sqrt(np.mean(one**2))
    sources = np.stack([a.ravel() for a in np.meshgrid(one, one)], -1)
    mixing = basis(20, "mixing", 1, 2)[0] @ np.diag([2.0, 0.5])
    problem = ICA(sources @ mixing.T, p=2, sign=1, mixing=mixing)
    at = lambda x: {k: float(v) for k, v in problem.metrics(jnp.asarray(x)).items()}  # noqa: E731
    unmixing = np.linalg.inv(mixing).T
    solved = at(unmixing)
    sample = 2 * float(np.mean(np.log(np.cosh(one))))
    check.equal("objective at the sources against 2 E log cosh of the sample", solved["objective"], sample, 1e-12)
    check.equal("the same against the population", solved["objective"], 2 * LAPLACE, 4 / nodes)
    for label, value in (("|h|", solved["infeasibility"]), ("Amari distance", solved["error"]), ("residual", solved["residual"])):
        check.below(f"{label} at the sources", value, 1e-12)
    angles = np.linspace(0, np.pi / 2, turns + 2)[1:-1]
    turned = [at(unmixing @ np.array([[np.cos(v), -np.sin(v)], [np.sin(v), np.cos(v)]]))["objective"] for v in angles]
    check.above("objective at other white points less that at the sources", np.array(turned) - solved["objective"], 0.0)
    check.below("objective at other white points", np.array(turned), 2 * GAUSSIAN, note="mixtures are more Gaussian, never beyond")
    check.below("objective of an infeasible point, 0.9 times the sources, over 2 x 0.3382", at(0.9 * unmixing)["objective"] / (2 * LAPLACE), 1.0)
