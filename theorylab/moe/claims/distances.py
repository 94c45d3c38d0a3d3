"""Losses and distances: golden values, the local inequality, and which over-specified models contain the truth."""

from __future__ import annotations

import numpy as np

from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.moe.claims import _reference as reference
from theorylab.moe.claims._programs import DERIVED, PAPER, atoms, losses
from theorylab.moe.claims.gate import normal
from theorylab.moe.distances import hellinger, kullback_leibler, total_variation
from theorylab.moe.identifiability import admissible_multiplicities
from theorylab.moe.losses import voronoi_cells, voronoi_loss
from theorylab.moe.model import Mixture, example

FOUR = Mixture([0.3, -0.9, -0.8, 0.0], [[-3.9], [-1.6], [-1.35], [0.0]], [[2.1], [-1.4], [-1.7], [0.95]], [-1.05, 0.7, 0.25, 2.1],
               [0.12, 0.16, 0.17, 0.15], 2)
NEAR = Mixture([0.5, -0.1, 0.0], [[-3.8], [-1.6], [0.0]], [[2.05], [-1.45], [1.0]], [-1.0, 0.55, 1.95], [0.12, 0.2, 0.15], 2)
D1 = (0.506427768110788, 1.00556353657034, 1.15556353657034)
D2 = (0.506427768110788, 0.656427768110788, 0.719363234051738)


@claim("moe.golden-losses", source=f"losses of {PAPER}; values from the {DERIVED}",
       statement=r"Cells and the losses D1 and D2 of a fit of four experts to S1, for K = 1, 2, 3; the maximum over sets of K atoms is the sum of "
                 r"the K largest terms.",
       fast={"tol": 1e-13})
def _(check: Check, tol: float) -> None:
    truth = example("S1")
    cells = np.asarray(voronoi_cells(FOUR, truth))
    check.equal("cells", cells, np.array([0, 1, 1, 2]), 0)
    for kind, values in (("exact", D1), ("over_specified", D2)):
        found = [float(voronoi_loss(FOUR, example("S1", active=K), kind)) for K in (1, 2, 3)]
        check.equal(f"{kind}: K = 1, 2, 3", found, np.array(values), tol)
        plain = [losses(reference.read(FOUR), reference.read(example("S1", active=K)), cells, kind) for K in (1, 2, 3)]
        check.equal(f"{kind}: against the definition", found, np.array(plain), tol)


@claim("moe.golden-distances", source=DERIVED,
       statement=r"Hellinger, Kullback-Leibler and total variation between S1 and a neighbour, by quadrature.",
       fast={"tol": 1e-10, "others": False}, full={"tol": 1e-10, "others": True})
def _(check: Check, tol: float, others: bool) -> None:
    truth, law = example("S1"), (-1.0, 1.0)
    plain = reference.distances(truth, NEAR, *law)
    h = hellinger(truth, NEAR, law).value
    check.equal("mean of h^2", h**2, 0.0027221301896, 1e-12)
    check.equal("H", h, 0.0521740375, tol)
    check.equal("mean of h", plain.mean_hellinger, 0.0516156064, tol)
    check.equal("H and divergence by NumPy", [plain.hellinger, plain.divergence], np.array([0.0521740375, 0.0105925979416]), tol)
    check.equal("total variation by NumPy", plain.variation, 0.05657, 1e-5)
    if others:
        check.equal("divergence", kullback_leibler(truth, NEAR, law).value, 0.0105925979416, 1e-12)
        check.equal("total variation", total_variation(truth, NEAR, law).value, 0.05657, 1e-5)


@claim("moe.local-inequality", source=f"{PAPER}, the inequality behind its parameter rates",
       statement=r"$\mathbb{E}_X\,\mathrm{TV} \ge C D_1$ near the truth, for $K \ge 2$ and a connected graph: the ratio stays away from 0 in all "
                 r"directions.",
       fast={"directions": 10}, full={"directions": 25})
def _(check: Check, directions: int) -> None:
    truth = example("S1")
    point, plain, least = np.asarray(truth.pack()), reference.read(truth), {}
    for size in (0.1, 0.01, 0.001):
        ratios = []
        for i in range(directions):
            step = normal(f"direction {i}", len(point))
            near = atoms(point + size * step / np.linalg.norm(step), 3, 2)
            ratios.append(reference.coarse(near, plain, -1.0, 1.0).variation / losses(near, plain, np.arange(3)))
        least[size] = min(ratios)
        check.above(f"TV / D1 at distance {size:g}", ratios, 0.03, note=f"largest {max(ratios):.3f}")
    check.above("smallest ratio at 0.001 over that at 0.1", least[0.001] / least[0.1], 0.7)


S1_CASES = {((1, 2, 1), 3): 0.0, ((1, 2, 1), 2): 0.0887, ((1, 2, 1), 4): 0.1787, ((2, 1, 1), 3): 0.0988, ((2, 2, 1), 3): 0.0543,
            ((2, 1, 2), 3): 0.0, ((1, 3, 1), 4): 0.0, ((2, 2, 2), 4): 0.0}
S1_LOGIT = {((1, 2, 1), 3): 0.124, ((2, 1, 2), 3): 0.213, ((2, 2, 2), 4): 0.0}
S0_CASES = {("slope", (1, 2), 1): 0.0, ("slope", (2, 2), 2): 0.0, ("slope", (1, 2), 2): 0.4884, ("slope", (2, 2), 1): 0.0,
            ("logit", (1, 2), 1): 0.1665, ("logit", (2, 2), 2): 0.0, ("logit", (2, 2), 1): 0.0}
ZERO = 1e-8


@claim("moe.too-few-active", source=f"{PAPER}, over-specified setting; caveats from the {DERIVED}",
       statement=r"With K below the largest number of copies in a region the truth is at a positive distance: S1 with expert 2 doubled at half "
                 r"weight and $\bar K = 2$ has D2 = 0 but H = 0.0887. The statement is local in D2 (with full weights H = 0), and fails for K = 1.",
       fast={"tol": 5e-5})
def _(check: Check, tol: float) -> None:
    truth = example("S1")
    half, whole = reference.copies(truth, (1, 2, 1), 2), reference.copies(truth, (1, 2, 1), 2, share=False)
    found, cells = reference.distances(half, truth, -1.0, 1.0), np.array([0, 1, 1, 2])
    check.equal("H with half weights", found.hellinger, 0.0887, tol)
    check.equal("total variation", found.variation, 0.0919, tol)
    check.below("D2 with half weights", losses(reference.read(half), reference.read(truth), cells, "over_specified"), 1e-15)
    check.below("H with full weights", reference.distances(whole, truth, -1.0, 1.0).hellinger, ZERO)
    check.equal("D2 with full weights", losses(reference.read(whole), reference.read(truth), cells, "over_specified"), 0.819, 5e-4)
    lines = example("S0", selection="slope")
    check.below("K = 1: H of S0 with expert 2 doubled", reference.distances(reference.copies(lines, (1, 2), 1), lines, 0.0, 1.0).hellinger, ZERO)


@claim("moe.admissible-multiplicities", source=f"{DERIVED}; {PAPER} asks for an inequality",
       statement=r"For $K \ge 2$ and slopes, copies that share weights have the true density if and only if $\sum_{j \in L} m_j = \bar K$ for every "
                 r"region L. With K = 1: $m_j \ge \bar K$ for every active j. By logits numbers must be equal too. The over-specified experiment "
                 r"of the paper ($k^* = 2$, K = 1, k = 3, $\bar K = 2$) has none.",
       fast={"tol": 5e-5})
def _(check: Check, tol: float) -> None:
    line, unit = np.linspace(-1, 1, 401), np.linspace(0, 1, 401)
    cases = [("S1", "slope", *case, h, line, -1.0) for case, h in S1_CASES.items()]
    cases += [("S1", "logit", *case, h, line, -1.0) for case, h in S1_LOGIT.items()]
    cases += [("S0", selection, m, K, h, unit, 0.0) for (selection, m, K), h in S0_CASES.items()]
    for name, selection, m, K, expected, x, low in cases:
        truth = example(name, selection=selection)
        h = reference.distances(reference.copies(truth, m, K), truth, low, 1.0).hellinger
        label = f"{name}, {selection}, copies {m}, K = {K}"
        if expected:
            check.equal(f"{label}: H", h, expected, 10 * tol if selection == "logit" and name == "S1" else tol)
        else:
            check.below(f"{label}: H", h, ZERO)
        listed = m in admissible_multiplicities(truth, sum(m), K, x)
        check.true(f"{label}: the list agrees", listed == (h < ZERO))
    check.equal("numbers of copies that fit the paper's experiment", len(admissible_multiplicities(example("S0"), 3, 2, unit)), 0, 0)
