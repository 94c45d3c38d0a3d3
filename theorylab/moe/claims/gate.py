"""The gate: its golden values, ties, invariances, regions and what is identified of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.keys import stream
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.moe.claims import _reference as reference
from theorylab.moe.claims._programs import DERIVED, PAPER
from theorylab.moe.identifiability import coactivation_graph
from theorylab.moe.losses import voronoi_loss
from theorylab.moe.model import Mixture, example, weyl_sample
from theorylab.moe.moments import statistics
from theorylab.moe.problem import Likelihood

LOG_DENSITY = {
    "slope": (-0.545791352644727, -0.559470229091025, -0.723501234162861, -0.801646868826787),
    "logit": (-0.545791352644727, -0.730650320289477, -0.723501234162861, -0.801646868826787),
}
GATE = {
    "slope": {2: (0.876532952435, 0.123467047565, 0, 0), 3: (0.72074389628, 0.101522847118, 0, 0.177733256602),
              4: (0.66229033465, 0.09328917073, 0.0811017088477, 0.163318785773)},
    "logit": {2: (0.802183888559, 0, 0, 0.197816111441)},
}


def four(active: int, selection: str) -> Mixture:
    """The four experts in the plane of the golden gate."""
    return Mixture([0.5, -1.0, 0.2, 0.0], [[1.0, -0.5], [0.8, 0.3], [-0.6, 1.2], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.3, -0.7]],
                   [0.0, 1.0, -1.0, 2.0], [0.25, 0.5, 1.0, 2.0], active, selection)


def normal(name: str, *shape: int) -> np.ndarray:
    """Standard normal numbers."""
    return np.asarray(jax.random.normal(stream(0, name), shape))


def random_mixture(name: str, k: int, active: int, d: int, selection: str, scale: float = 2.0) -> Mixture:
    """A Gaussian mixture of experts whose last gate is 0."""
    gate = scale * normal(f"{name} gate", k, d + 1)
    gate[-1] = 0
    return Mixture.from_matrices(gate, normal(f"{name} experts", k, d + 1), np.linspace(0.2, 0.5, k), active, selection)


@claim("moe.gate-golden", source=f"model of {PAPER}; values in 40 digits from the {DERIVED}",
       statement=r"Gate and log density of four experts in the plane at one point, for every K and both rules of selection.",
       fast={"tol": 1e-12})
def _(check: Check, tol: float) -> None:
    x, y = np.array([[0.7, -0.4]]), np.array([0.3])
    for selection, values in LOG_DENSITY.items():
        found = np.array([float(four(K, selection).log_density(x, y)[0]) for K in (1, 2, 3, 4)])
        check.equal(f"log density by {selection}, K = 1 to 4", found, np.array(values), tol)
        for K, gate in GATE[selection].items():
            check.equal(f"gate by {selection}, K = {K}", np.asarray(four(K, selection).gate(x))[0], np.array(gate), 1e-11)


@claim("moe.gate-sums-to-one", source=f"model of {PAPER}",
       statement=r"Every row of the gate sums to 1 and has exactly K entries that are not 0, at ties too; logits of size $10^4$ cost no more than "
                 r"their round-off.",
       fast={"rows": 400})
def _(check: Check, rows: int) -> None:
    mixture, x = random_mixture("rows", 5, 3, 2, "logit"), normal("x", rows, 2).copy()
    x[: rows // 4] = 0                                                                       # slopes tie there
    for selection in ("slope", "logit"):
        m = Mixture.from_matrices(mixture.gate_matrix, mixture.expert_matrix, mixture.variance, 3, selection)
        for name, one, tol in (("moderate logits", m, 2e-15), ("logits of size 10^4", m.replace(gate_coef=4000 * m.gate_coef), 4e-12)):
            gate, mask = np.asarray(one.gate(x)), np.asarray(one.routing(x))
            check.below(f"{selection}, {name}: sums minus 1", np.abs(gate.sum(axis=1) - 1), tol)
            check.true(f"{selection}, {name}: K experts are kept", mask.sum(axis=1) == 3)
            check.true(f"{selection}, {name}: those of a stable sort", mask == reference.routing(one, x))
            check.true(f"{selection}, {name}: no weight elsewhere", (gate == 0) | mask)


@claim("moe.translation-invariance", source=DERIVED,
       statement=r"Adding one vector $(t_0, t_1)$ to all gates changes neither the density nor the routing, in both modes.",
       fast={"shifts": 5})
def _(check: Check, shifts: int) -> None:
    x, y = weyl_sample(example("S1"), 400, -1.0, 1.0)
    for selection in ("slope", "logit"):
        truth = example("S1", selection=selection)
        before, mask = truth.log_density(x, y), truth.routing(x)
        worst, same = 0.0, True
        for t in np.clip(3 * normal("shift", shifts, 2), -5, 5):
            moved = truth.replace(gate_intercept=truth.gate_intercept + t[0], gate_coef=truth.gate_coef + t[1])
            worst = max(worst, float(jnp.max(jnp.abs(moved.log_density(x, y) - before))))
            same = same and bool(jnp.all(moved.routing(x) == mask))
        check.below(f"{selection}: change of log g", worst, 1e-12)
        check.true(f"{selection}: the routing is the same", same)


def mismatch(p: Mixture, q: Mixture) -> float:
    """Probability under uniform x on [-1, 1] that two mixtures of one input keep other experts, exactly."""
    edges = np.unique(np.clip(np.concatenate([[-1, 1], reference.crossings(p), reference.crossings(q)]), -1, 1))
    middle = (edges[1:] + edges[:-1]) / 2
    other = (reference.routing(p, middle) != reference.routing(q, middle)).any(axis=1)
    return float(np.diff(edges)[other].sum() / 2)


@claim("moe.regions-move-linearly", source=f"{DERIVED}; {PAPER} has a lemma that they stay",
       statement=r"For gates close to the truth regions stay the same only for slope selection in one dimension. Otherwise the mass that changes "
                 r"region is linear in the perturbation.",
       fast={"directions": 8, "points": 20_000}, full={"directions": 40, "points": 100_000})
def _(check: Check, directions: int, points: int) -> None:
    sizes = np.array([0.1, 0.03, 0.01, 0.003])
    turn = lambda m, e, i: m.replace(gate_intercept=m.gate_intercept + e * normal(f"intercept {i}", m.experts),  # noqa: E731
                                     gate_coef=m.gate_coef + e * normal(f"slope {i}", m.experts, m.dim))
    of = lambda m, f: np.array([np.mean([f(m, turn(m, e, i)) for i in range(directions)]) for e in sizes])  # noqa: E731
    line = lambda values: np.polyfit(np.log(sizes), np.log(values), 1)[0]  # noqa: E731
    check.below("S1, slope: mass that changes region", of(example("S1"), mismatch), 0)
    check.equal("S1, logit: log-log slope", line(of(example("S1", selection="logit"), mismatch)), 1, 0.1)
    x = np.asarray(jax.random.uniform(stream(0, "square"), (points, 2), minval=-1.0))
    plane = lambda p, q: (reference.routing(p, x) != reference.routing(q, x)).any(axis=1).mean()  # noqa: E731
    moved = of(example("S3"), plane)
    check.equal("S3, slope: log-log slope", line(moved), 1, 0.1, note="masses " + ", ".join(f"{m:.2g}" for m in moved))


GRAPHS = ((4, 2, 1, "slope"), (4, 2, 1, "logit"), (5, 3, 1, "slope"), (5, 2, 2, "slope"), (6, 2, 3, "logit"), (6, 3, 1, "slope"))
KNOWN = {(4, 2, 1, "slope"): 4, (5, 3, 1, "slope"): 2, (6, 3, 1, "slope"): 4}
"""Dimensions that do not depend on the draw of the gate."""


def gate_information(m: Mixture, x: np.ndarray) -> np.ndarray:
    """Mean over x of minus the second derivatives of log pi weighted by pi, in all k p coordinates."""
    u, mask, z = reference.logits(m, x), reference.routing(m, x), reference.design(x)
    pi = np.where(mask, np.exp(u - np.max(np.where(mask, u, -np.inf), axis=1, keepdims=True)), 0)
    pi /= pi.sum(axis=1, keepdims=True)
    blocks = np.einsum("nj,jl,na,nb->jalb", pi, np.eye(m.experts), z, z) - np.einsum("nj,nl,na,nb->jalb", pi, pi, z, z)
    return blocks.reshape(z.shape[1] * m.experts, -1) / len(x)


@claim("moe.identifiability-is-a-graph", source=f"{DERIVED}; {PAPER} proves identifiability up to one translation",
       statement=r"The gate has (components of the co-activation graph) x (d + 1) free directions: the dimension of the null space of its population "
                 r"information. Beyond a connected graph equal densities do not imply equal parameters.",
       fast={"points": 2000, "graphs": GRAPHS[:3]}, full={"points": 20_000, "graphs": GRAPHS})
def _(check: Check, points: int, graphs: tuple[tuple[int, int, int, str], ...]) -> None:
    for k, K, d, selection in graphs:
        mixture = random_mixture(f"{k} {K} {d} {selection}", k, K, d, selection)
        x = np.asarray(jax.random.uniform(stream(0, "x"), (points, d), minval=-1.0))
        values = np.linalg.eigvalsh(gate_information(mixture, x))
        free = coactivation_graph(mixture, x).components * (d + 1)
        name = f"k = {k}, K = {K}, d = {d}, {selection}"
        check.equal(f"{name}: dimension of the null space", int((values < 1e-9 * values[-1]).sum()), free, 0)
        if (k, K, d, selection) in KNOWN:
            check.equal(f"{name}: the same, by the order of the slopes", free, KNOWN[k, K, d, selection], 0)
    p = Mixture([0.3, 0.1, -0.2, 0.0], [[-3.0], [-1.0], [1.5], [0.0]], [[1.0], [2.0], [-1.0], [0.5]], [0.0, 1.0, 2.0, -1.0], [0.1, 0.2, 0.3, 0.4], 2)
    shift = np.array([1.0, 1.0, 0.0, 0.0])
    q = p.replace(gate_intercept=p.gate_intercept + 0.7 * shift, gate_coef=p.gate_coef - 0.4 * shift[:, None])
    check.below("two components: H after a shift of one of them alone", reference.distances(p, q, -1.0, 1.0).hellinger, 1e-14)


@claim("moe.one-active-expert-is-degenerate", source=f"{DERIVED}; {PAPER} uses K = 1 in its experiments",
       statement=r"With K = 1 the gate is identified through its partition only: its gradient and curvature vanish, and gates (-8, 25) and (-4, "
                 r"12.5) have one density but loss D1 0.2469, so no inequality $H \ge C D_1$ can hold.",
       fast={"n": 400})
def _(check: Check, n: int) -> None:
    truth = example("S0")
    other = truth.replace(gate_intercept=truth.gate_intercept / 2, gate_coef=truth.gate_coef / 2)
    sums = statistics(Likelihood(*weyl_sample(truth, n), 2, 1, "logit"), other)
    check.below("gradient in the gate", np.abs(sums.gate_gradient), 0)
    check.below("curvature in the gate", np.abs(sums.gate_curvature), 0)
    check.below("H of the two gates", reference.distances(truth, other, 0.0, 1.0).hellinger, 0)
    check.equal("D1 of the two gates", voronoi_loss(other, truth), 12.5 * np.exp(-4.0) + np.exp(-4.0) - np.exp(-8.0), 1e-12)
    check.equal("the same, as reported", voronoi_loss(other, truth), 0.2469, 5e-5)


@claim("moe.temperature-is-not-identified", source=DERIVED,
       statement=r"The gate softmax$((\beta_1 x + \beta_0)/\tau)$ is unchanged by $(c\beta_1, c\beta_0, c\tau)$; hence the score is orthogonal to "
                 r"$(\beta_0, \beta_1, \tau)$ at every parameter and on all data.",
       fast={"draws": 5})
def _(check: Check, draws: int) -> None:
    truth = example("S1")
    x, y = weyl_sample(truth, 400, -1.0, 1.0)

    @jax.jit
    def value(gate: jax.Array, tau: jax.Array) -> jax.Array:
        cooled = truth.replace(gate_intercept=gate[:, 0] / tau, gate_coef=gate[:, 1:] / tau)
        return jnp.sum(cooled.log_density(x, y))

    scores = jax.jit(jax.grad(value, argnums=(0, 1)))
    for i in range(draws):
        gate, tau = truth.gate_matrix + normal(f"gate {i}", 3, 2), jnp.exp(jnp.asarray(normal(f"tau {i}", 1)[0] / 2))
        slope, along = scores(gate, tau)
        size = float(jnp.linalg.norm(slope) * jnp.linalg.norm(gate) + jnp.abs(along * tau))
        check.below(f"draw {i}: score along (beta0, beta1, tau), relative", abs(float(jnp.sum(slope * gate) + along * tau)) / size, 1e-12)
        check.below(f"draw {i}: change of L when all three double, relative", abs(float(value(2 * gate, 2 * tau) / value(gate, tau)) - 1), 1e-13)
