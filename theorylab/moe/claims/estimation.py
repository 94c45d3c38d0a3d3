"""EM and its sums: golden steps, the golden maximum, derivatives, bounds, monotonicity, chunks; and the search for the routing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.iterate import iterate
from theorylab.core.keys import run_keys, stream
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.moe.claims import _reference as reference
from theorylab.moe.claims._programs import DERIVED, PAPER
from theorylab.moe.claims.gate import normal, random_mixture
from theorylab.moe.em import EM, score
from theorylab.moe.model import Mixture, example, weyl_sample
from theorylab.moe.moments import statistics
from theorylab.moe.newton import information
from theorylab.moe.problem import Likelihood
from theorylab.moe.routing import Routing, RoutingSearch, best_run
from theorylab.moe.selection import aic, bic

ROWS = 400
X = -1 + (2 * np.arange(10) + 1) / 10
Y = np.array([-2.6, -2.9, 0.9, 1.9, 0.1, 0.4, 2.1, -0.3, 2.4, -0.9])
RESPONSIBILITIES = {0: [0.999999949813, 5.01874897142e-8, 0], 3: [0.000377146362091, 0.999622853638, 0], 6: [0, 0.0136873681572, 0.986312631843]}
EXPERTS = np.array([[0.0307638662063874, 3.38246853271432], [0.54927706133358, -1.61378523555127], [1.43642283752591, 1.46483808766743]])
VARIANCE = np.array([0.252587263314923, 0.228849199252899, 0.12526228778233])
COUNT = np.array([2.32951096853343, 5.55759254842267, 2.1128964830439])
ARGMAX = np.array([[-3.64280616227763, -6.48062593697951], [0.0810212666390549, 0.465022562464294], [0.0, 0.0]])
NEWTON = np.array([[-2.72070671631257, -4.56689404285395], [0.0235313970518889, 0.728499672415315], [0.0, 0.0]])
MAXIMUM = np.array([0.40567742, -0.22899485, -3.90454756, -1.47312864, 1.97323873, -1.45524054, 1.01664706, -1.0192731, 0.52281925, 1.97170521,
                    0.09919757, 0.19228501, 0.15713951])
ERRORS = np.array([0.4684, 0.3125, 0.9615, 0.5822, 0.08564, 0.10387, 0.12174, 0.05168, 0.05097, 0.07490, 0.01090, 0.03134, 0.01925])
UNITS = np.repeat([1e-4, 1e-5], [4, 9])


def ten() -> tuple[Likelihood, Mixture]:
    """Ten rows, padded to the shape of the other problems with rows of weight 0, and a start."""
    pad = lambda a: np.append(a, np.zeros(ROWS - 10))  # noqa: E731
    start = Mixture([0.0, 0.0, 0.0], [[-3.0], [-1.0], [0.0]], [[1.5], [-1.0], [0.5]], [-0.8, 0.4, 1.8], [0.5, 0.5, 0.5], 2)
    return Likelihood(pad(X), pad(Y), 3, 2, weight=pad(np.ones(10))), start


def s1(**options: Any) -> Likelihood:
    """The Weyl data of S1."""
    return Likelihood(*weyl_sample(example("S1"), ROWS, -1.0, 1.0), 3, 2, **options)


def frozen_argmax(x: np.ndarray, r: np.ndarray, gate: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The maximizer of sum r log pi over gates with last row 0 and this routing, by Newton's method."""
    z, k = reference.design(x), len(gate)
    gate = gate - gate[-1]
    for _ in range(60):
        u = np.where(mask, z @ gate.T, -np.inf)
        pi = np.exp(u - u.max(axis=1, keepdims=True))
        pi /= pi.sum(axis=1, keepdims=True)
        slope = ((r - pi).T @ z)[:-1].ravel()
        blocks = np.einsum("nj,jl,na,nb->jalb", pi, np.eye(k), z, z) - np.einsum("nj,nl,na,nb->jalb", pi, pi, z, z)
        size = (k - 1) * z.shape[1]
        gate = gate + np.vstack([np.linalg.solve(blocks[:-1, :, :-1].reshape(size, size), slope).reshape(k - 1, -1), np.zeros(z.shape[1])])
    return gate


@claim("moe.golden-em-step", source=f"algorithm of {PAPER}; values in 40 digits from the {DERIVED}",
       statement=r"One step of EM on ten rows: likelihood, responsibilities, experts and the Newton step of the gate; the maximizer of the gate "
                 r"with frozen routing flips the routing.",
       fast={"tol": 1e-12})
def _(check: Check, tol: float) -> None:
    likelihood, start = ten()
    sums = statistics(likelihood, start)
    check.equal("log-likelihood of the start", sums.log_likelihood, -15.8177998762369, 1e-12)
    r = np.asarray(start.responsibilities(X, Y))
    check.equal("responsibilities of rows 0, 3, 6", r[list(RESPONSIBILITIES)], np.array(list(RESPONSIBILITIES.values())), 1e-12)
    check.equal("effective numbers of rows", sums.count, COUNT, tol)
    # No ridge, as in the golden numbers; the whole Newton step is accepted.
    after = iterate(likelihood, EM(ridge=0.0), start, steps=1)
    check.equal("experts (b, a)", after.value.expert_matrix, EXPERTS, 5e-14 + tol)
    check.equal("variances", after.value.variance, VARIANCE, tol)
    check.equal("gate after a Newton step", after.value.canonical().gate_matrix, NEWTON, 10 * tol)
    check.equal("its log-likelihood, routing computed anew", after.history["log_likelihood"][-1], -12.8002996331936, 10 * tol)
    gate = frozen_argmax(X, r, np.asarray(start.gate_matrix), reference.routing(start, X))
    check.equal("gate that maximizes Q with frozen routing", gate, ARGMAX, 1e-12)
    flipped = Mixture.from_matrices(gate, EXPERTS, VARIANCE, 2)
    check.equal("its log-likelihood, routing computed anew", likelihood.log_likelihood(flipped), -13.1008510905403, 1e-12)
    check.equal("rows whose experts it changes", (reference.routing(flipped, X) != reference.routing(start, X)).any(axis=1).sum(), 5, 0)


@claim("moe.golden-maximum", source=DERIVED,
       statement=r"The maximum likelihood estimate on 400 rows of Weyl data of S1, its standard errors, BIC and AIC.",
       fast={"steps": 60})
def _(check: Check, steps: int) -> None:
    likelihood, truth = s1(), example("S1")
    check.equal("sum of y", likelihood.y.sum(), 39.3625674054004, 1e-10)
    check.equal("log-likelihood of the truth", likelihood.log_likelihood(truth), -360.66473306765783, 1e-10)
    fit = iterate(likelihood, EM(), truth, steps=steps)
    check.below("score per row", fit.history["score_norm"][-1], 1e-11)
    check.equal("log-likelihood", likelihood.log_likelihood(fit.value), -360.019850321, 1e-8)
    check.equal("the same by NumPy", reference.log_likelihood(fit.value, np.asarray(likelihood.x), np.asarray(likelihood.y)), -360.019850321, 1e-8)
    check.equal("parameters", fit.value.pack(), MAXIMUM, 1e-7)
    errors = np.sqrt(np.diag(np.linalg.inv(information(likelihood, fit.value))))
    check.below("Wald standard errors against the printed ones, in units of their last digit", np.abs(errors - ERRORS) / UNITS, 0.51)
    check.equal("BIC", bic(likelihood, fit.value), 797.92874, 1e-5)
    check.equal("AIC", aic(likelihood, fit.value), 746.03970, 1e-5)


@claim("moe.derivatives", source=DERIVED,
       statement=r"$\partial Q/\partial W_j = \sum_i (r_{ij} - w_i\pi_{ij}) z_i$ and blocks $-\sum_i w_i\pi_{ij}(1_{jl} - \pi_{il}) z_i z_i^\top$, "
                 r"against automatic differentiation of $Q$, and the closed form of the score against that of $L$.",
       fast={"tol": 1e-12})
def _(check: Check, tol: float) -> None:
    truth = example("S1")
    x, y = (np.asarray(a) for a in weyl_sample(truth, ROWS, -1.0, 1.0))
    likelihood = s1()
    # In standardized inputs, so that the sums can be compared entry by entry.
    scaled = np.asarray((x - np.asarray(likelihood.center)) / np.asarray(likelihood.scale))
    z, r, mask = reference.design(scaled), np.asarray(truth.responsibilities(x, y)), reference.routing(truth, x)
    center, scale = float(likelihood.center[0]), float(likelihood.scale[0])
    gate = np.column_stack([truth.gate_intercept + center * truth.gate_coef[:, 0], scale * truth.gate_coef[:, 0]])

    def Q(W: jax.Array) -> jax.Array:
        u = z @ W.T
        norm = jax.nn.logsumexp(jnp.where(mask, u, -jnp.inf), axis=1, keepdims=True)
        return jnp.sum(jnp.where(mask, r * (u - norm), 0))

    sums = statistics(likelihood, truth)
    slope, curved = (np.asarray(a) for a in jax.jit(lambda W: (jax.grad(Q)(W), jax.hessian(Q)(W)))(gate))
    check.below("gradient of Q, relative to its sum of sizes", np.abs(slope - np.asarray(sums.gate_gradient)) / np.abs(z).sum(), tol)
    check.below("Hessian of Q, relative", np.abs(np.swapaxes(curved, 1, 2) + np.asarray(sums.gate_curvature)) / np.abs(curved).max(), tol)

    def L(v: jax.Array) -> jax.Array:
        beta0, beta1 = (jnp.append(a, 0.0) for a in (v[:2], v[2:4]))
        u = beta0 + x * beta1
        e = y[:, None] - v[7:10] - x * v[4:7]
        joint = u - e * e / (2 * v[10:]) - jnp.log(2 * jnp.pi * v[10:]) / 2
        of = lambda a: jax.nn.logsumexp(jnp.where(mask, a, -jnp.inf), axis=1)  # noqa: E731
        return jnp.sum(of(joint) - of(u))

    parts = score(likelihood, truth, sums)
    gate_part, expert_part, variance_part = (np.asarray(a) for a in parts)
    closed = np.concatenate([gate_part[:2, 0], gate_part[:2, 1], expert_part[:, 1], expert_part[:, 0], variance_part])
    slope = np.asarray(jax.jit(jax.grad(L))(truth.pack()))
    check.below("score, relative", np.abs(closed - slope) / np.abs(slope).max(), tol)


@claim("moe.bohning-bound", source=DERIVED,
       statement=r"$B = \sum_i w_i \frac12(\mathrm{diag}(1_{S_i}) - 1_{S_i}1_{S_i}^\top/K) \otimes z_i z_i^\top$ bounds the curvature of the gate: "
                 r"$B + \nabla^2 Q \succeq 0$.",
       fast={"draws": 5}, full={"draws": 100})
def _(check: Check, draws: int) -> None:
    k, K, n = 5, 3, 60
    x = normal("bohning x", n, 2)
    z = reference.design((x - x.mean(axis=0)) / x.std(axis=0))
    likelihood, least = Likelihood(x, normal("bohning y", n), k, K, "logit"), []
    for i in range(draws):
        m = random_mixture(f"bohning {i}", k, K, 2, "logit")
        mask = reference.routing(m, x).astype(float)
        bound = (np.einsum("nj,jl,na,nb->jalb", mask, np.eye(k), z, z) - np.einsum("nj,nl,na,nb->jalb", mask, mask, z, z) / K) / 2
        gap = bound.reshape(3 * k, 3 * k) - np.swapaxes(statistics(likelihood, m).gate_curvature, 1, 2).reshape(3 * k, 3 * k)
        least.append(np.linalg.eigvalsh(gap)[0] / np.linalg.norm(bound.reshape(3 * k, 3 * k), 2))
    check.above("smallest eigenvalue, relative to the norm of B", least, -1e-10)


@claim("moe.em-is-monotone", source=f"{DERIVED}; the algorithm of {PAPER} is the frozen one",
       statement=r"With acceptance the observed log-likelihood never decreases, from any start; nor does it with frozen routing, "
                 r"which changes the experts of no row.",
       fast={"steps": 60, "starts": 4, "kinds": ("accept",)}, full={"steps": 60, "starts": 50, "kinds": ("accept", "frozen")})
def _(check: Check, steps: int, starts: int, kinds: tuple[str, ...]) -> None:
    likelihood, truth = s1(), example("S1")
    x, y = np.asarray(likelihood.x), np.asarray(likelihood.y)
    for routing in kinds:
        least, misses, moves = np.inf, [], 0
        for i in range(starts):
            gate = truth.gate_matrix + normal(f"monotone {i}", 3, 2)
            begin = Mixture.from_matrices(gate, truth.expert_matrix + 0.3, 2 * truth.variance, 2)
            run = iterate(likelihood, EM(routing=routing), begin, steps=steps)
            gains, values = np.asarray(run.history["gain"])[1:], np.asarray(run.history["log_likelihood"])
            least = min(least, float(gains.min() * ROWS / np.abs(values).max()))
            if routing == "frozen":
                # The likelihood is also that of the mask of the start.
                mask = reference.routing(begin, x)
                moves += int((reference.routing(run.value, x) != mask).any(axis=1).sum())
                misses.append(masked_likelihood(run.value, x, y, mask) - masked_likelihood(begin, x, y, mask) - ROWS * gains.sum())
        check.above(f"{routing}: smallest gain over the size of L", least, -1e-9)
        if misses:
            check.equal("frozen: rows that change experts", moves, 0, 0)
            check.below("frozen: its gains add up to that of the likelihood with the routing of the start", np.abs(misses), 1e-8)


def masked_likelihood(m: Mixture, x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> float:
    """The log-likelihood with a given routing."""
    u = np.where(mask, reference.logits(m, x), -np.inf)
    e = y[:, None] - reference.design(x) @ np.asarray(m.expert_matrix).T
    variance = np.asarray(m.variance)
    joint = u - e * e / (2 * variance) - np.log(2 * np.pi * variance) / 2
    return float(np.sum(np.logaddexp.reduce(joint, axis=1) - np.logaddexp.reduce(u, axis=1)))


@claim("moe.sums-do-not-depend-on-chunks", source=DERIVED,
       statement=r"Statistics over chunks of any length, and over rows padded with weight 0, equal those of one pass.",
       fast={"chunks": (150,), "pads": ()}, full={"chunks": (7, 64, 150), "pads": (1, 112)})
def _(check: Check, chunks: tuple[int, ...], pads: tuple[int, ...]) -> None:
    truth, whole = example("S1"), s1()
    x, y = np.asarray(whole.x), np.asarray(whole.y)
    padded = {f"{m} rows of weight 0": Likelihood(np.vstack([x, np.zeros((m, 1))]), np.append(y, np.ones(m)), 3, 2,
                                                  weight=np.append(np.ones(ROWS), np.zeros(m))) for m in pads}
    half = np.append(np.ones(ROWS // 2), np.zeros(ROWS // 2))
    parts = [Likelihood(x, y, 3, 2, weight=w) for w in (half, 1 - half)]
    leaves = lambda p: [np.asarray(a) for a in jax.tree.leaves(statistics(p, truth))]  # noqa: E731
    plain = leaves(whole)
    for name, other in ({f"chunks of {c}": s1(chunk=c) for c in chunks} | padded).items():
        check.below(name, [np.abs(a - b).max() / (1 + np.abs(a).max()) for a, b in zip(plain, leaves(other), strict=True)], 1e-12)
    # Sums in standardized inputs depend on the center, so two halves are compared in what does not: likelihood, counts, squares.
    sums = [statistics(p, truth) for p in (whole, *parts)]
    for name in ("log_likelihood", "count", "square", "gate_mass"):
        first, *others = (np.asarray(getattr(s, name)) for s in sums)
        check.below(f"two halves: {name}", np.abs(first - sum(others)) / (1 + np.abs(first)), 1e-12)


@claim("moe.routing-search-repairs-the-gate", source=DERIVED,
       statement=r"From gates with noise EM alone stays far below the maximum; annealing and pattern search from four starts reach that of EM from "
                 r"the truth on at least nine of ten samples.",
       fast=None, full={"samples": 10, "starts": 4})
def _(check: Check, samples: int, starts: int) -> None:
    for name, selection, n, low, noise in (("S0", "logit", 1000, 0.0, 1.5), ("S3", "slope", 1500, -1.0, 0.5), ("S3", "logit", 1500, -1.0, 0.5)):
        truth, frozen, found = example(name, selection=selection), [], []
        for key in run_keys(0, samples):
            likelihood = Likelihood(*truth.sample(n, key=key, low=low), truth.experts, truth.active, selection)
            best = iterate(likelihood, EM(), truth, steps=300).history["log_likelihood"][-1]
            shaken = truth.gate_matrix + noise * jax.random.normal(stream(key, "noise"), truth.gate_matrix.shape)
            begin = Mixture.from_matrices(shaken, truth.expert_matrix, truth.variance, truth.active, selection)
            frozen.append((iterate(likelihood, EM(), begin, steps=200).history["log_likelihood"][-1] - best) / n)
            search = iterate(Routing(likelihood), RoutingSearch(starts), begin, steps=25, key=key)
            found.append((float(likelihood.log_likelihood(best_run(search))) - best) / n)
        check.above(f"{name}, {selection}: samples with deficit above -2e-3", (np.asarray(found) > -2e-3).sum(), 0.9 * samples)
        check.below(f"{name}, {selection}: mean deficit of EM alone", np.mean(frozen), -0.1, note=f"of the search {np.mean(found):.4f}")
