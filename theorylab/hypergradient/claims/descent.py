"""Outer descent: what an adaptive inner tolerance costs and keeps, beside fixed ones."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from theorylab.core.iterate import iterate, whole
from theorylab.hypergradient.claims._programs import DERIVED, norms
from theorylab.hypergradient.claims.family import Parts
from theorylab.hypergradient.claims.references import shipped
from theorylab.hypergradient.estimators import Plain
from theorylab.hypergradient.inner import AcceleratedGradient
from theorylab.hypergradient.outer import InnerCertificate, InnerEstimate, InnerResidual, OuterDescent
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check

STEPS, SIZE = 60, 100.0
RULES = {"residual": InnerResidual, "estimate": InnerEstimate, "certificate": InnerCertificate}
# rule, its number -> largest relative error over the run, half a unit of its last digit, inner gradients in all
TABLE = {("residual", 1e-3): (0.60, 5e-3, 1565), ("estimate", 0.1): (0.11, 5e-3, 1685), ("residual", 1e-4): (0.058, 5e-4, 4415),
         ("estimate", 0.01): (0.0099, 5e-5, 4390), ("residual", 1e-6): (5.6e-4, 5e-6, 26755), ("estimate", 0.5): (0.55, 5e-3, 700)}
CERTIFIED = tuple(("certificate", theta) for theta in (0.5, 0.1))


def _gradients(problem: Any, ys: np.ndarray) -> np.ndarray:
    """The hypergradient at each row of `ys`, by Newton's method in NumPy."""
    x, found = np.zeros(problem.n), []
    for y in ys:
        for _ in range(30):
            at = Parts(problem, x, y)
            if np.linalg.norm(at.F) < 1e-13:
                break
            x = x - np.linalg.solve(at.H, at.F)
        found.append(at.G2 + at.J.T @ at.G1)
    return np.array(found)


@claim("hypergradient.adaptive-tolerance", source=DERIVED,
       statement=r"Stop the inner solver when a bound of the error is at most $\frac{\theta}{1+\theta}\lVert\hat\Omega\rVert$: the relative error is "
                 r"at most $\theta$, so every step of the outer descent goes down. The estimate $\lVert e\rVert$ in place of the bound costs less "
                 r"and can miss $\theta$ by a little. Breast-cancer data, 60 outer steps of size 100, accelerated inner gradient descent.",
       fast=None, full={"rules": (*TABLE, *CERTIFIED)})
def _(check: Check, rules: tuple[tuple[str, float], ...]) -> None:
    problem, _, _ = shipped("breast_cancer")
    for kind, number in rules:
        method = OuterDescent(SIZE, Plain(), AcceleratedGradient(), RULES[kind](number), every=5)
        sol = iterate(problem, method, jnp.zeros(30), steps=STEPS, record=whole)
        ys = np.asarray(sol.history["x"])
        truth, used = _gradients(problem, ys[:-1]), (ys[:-1] - ys[1:]) / SIZE
        error, spent = norms(used - truth) / norms(truth), int(sol.history["gradients"][-2])
        name = f"{kind} {number:g}"
        check.equal(f"{name}: inner runs that missed the rule", sol.history["unsolved"][-1], 0, 0.0)
        check.above(f"{name}: least cosine of the angle to the hypergradient", np.sum(used * truth, 1) / (norms(used) * norms(truth)), 0)
        if (kind, number) in TABLE:
            worst, half, count = TABLE[kind, number]
            check.equal(f"{name}: largest relative error", error.max(), worst, half)
            check.equal(f"{name}: inner gradients", spent, count, 10)
        else:
            check.below(f"{name}: largest relative error over {number:g}", error.max() / number, 1, note=f"{spent} inner gradients")
            check.below(f"{name}: objective at the end", sol.history["objective"][-1], 0.0735)
