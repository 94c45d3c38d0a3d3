"""When softmax attention blows up, and how."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.solution import Status
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.transformer_pde.attention import Softmax
from theorylab.transformer_pde.claims._ensembles import DIM, Heads, apart, definite, explode, follow, form, heads, spectral, trace, turned
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Gaussian
from theorylab.transformer_pde.oracles import Regime, limits


def _lowest(a: np.ndarray) -> np.ndarray:
    """The smallest eigenvalues of the symmetric parts."""
    return np.linalg.eigvalsh((a + turned(a)) / 2)[:, 0]


@claim("transformer_pde.blow-up-bounds", source="companion derivation, bounds of the blow-up time",
       statement=r"Softmax: $t^* \ge 1 / (2\|V\|\|A\|\|\Sigma_0\|)$ and $\|\Sigma(t)\| \le \|\Sigma_0\|/(1 - 2\|V\|\|A\|\|\Sigma_0\|t)$; and "
                 r"$t^* \le d / (2\lambda_{\min}(\operatorname{sym} A)\lambda_{\min}(V)^2 \operatorname{tr}(V^{-1}\Sigma_0))$ for $V \succ 0$ "
                 r"symmetric, $\operatorname{sym} A \succ 0$.",
       fast={"count": 40}, full={"count": 500})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=6)
    limit = 1 / (2 * spectral(base.V) * spectral(base.A) * spectral(base.cov))
    times = explode(base).time
    check.above("blow-up time over its lower bound", np.where(np.isnan(times), np.inf, times) / limit, 1.0,
                note=f"{int(np.isfinite(times).sum())} of {count} blow up, {int(np.isnan(times).sum())} undecided")
    part = np.array([0.5, 0.9, 0.98])
    run, = follow(("softmax", base, limit[:, None] * part))
    check.below("norm over its bound at 0.5, 0.9 and 0.98 of that time", spectral(run.cov) * (1 - part) / spectral(base.cov)[:, None], 1.0)
    A = definite(base.K) + base.Q - turned(base.Q)
    positive = base.but(Q=A, K=np.eye(DIM), V=definite(base.V))
    upper = DIM / (2 * _lowest(A) * _lowest(positive.V) ** 2 * trace(np.linalg.solve(positive.V, base.cov)))
    times = explode(positive).time
    check.true("every positive head blows up", np.isfinite(times).all(), f"{int(np.isfinite(times).sum())} of {count}")
    check.below("blow-up time over its upper bound", times / upper, 1.0)


@claim("transformer_pde.dichotomy", source="companion derivation, Sylvester inertia",
       statement=r"Softmax with $V = vI$, $\Sigma_0 \succ 0$: global iff $v(A + A^\top) \preceq 0$, else blow-up at $1/\lambda_{\max}(v L_0^\top "
                 r"(A + A^\top) L_0)$.",
       fast={"count": 40}, full={"count": 500})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=7)
    Q = np.where((np.arange(count) % 2 == 0)[:, None, None], -definite(base.K, 0.0), base.Q)      # every second head has a negative form
    base = base.but(Q=Q, K=np.eye(DIM), V=np.eye(DIM))
    top = np.linalg.eigvalsh(turned(base.factor) @ (Q + turned(Q)) @ base.factor)[:, -1]
    measured, finite = explode(base).time, top > 0
    check.true("blow-up exactly where the form has a positive eigenvalue", (np.isfinite(measured) == finite).all(),
               f"{int(finite.sum())} of {count} blow up")
    check.below("relative error of the blow-up time", np.abs(measured[finite] * top[finite] - 1), 1e-8)


@claim("transformer_pde.blow-up-profile", source="companion derivation, profile at the blow-up; the exception is a finding of this package",
       statement=r"At the blow-up $\Sigma / \operatorname{tr}\Sigma$ tends to a matrix whose range is invariant under $V$. It is $uu^\top$ with "
                 r"$Vu = \lambda u$, $\lambda\,u^\top A u > 0$, for most heads; if tokens keep rotating, its range is a plane.",
       fast={"count": 40, "decide": False}, full={"count": 500, "decide": True})
def _(check: Check, count: int, decide: bool) -> None:
    base = heads(count, seed=8)
    base = base.but(V=definite(base.V))
    times = explode(base).time
    blown = int(np.isfinite(times).sum())
    found = explode(base, 1e-8)
    settled = (found.status == Status.BLOWUP) & (found.unsettled < 1e-6)
    check.above("heads that blow up", blown, count // 4)
    check.above("share of profiles that settled within the clock", settled.sum() / blown, 0.95, note=f"{int(settled.sum())} of {blown}")
    if decide:
        flows = jax.vmap(lambda Q, K, V: GaussianFlow(Softmax(Q, K, V)))(*map(jnp.asarray, (base.Q, base.K, base.V)))
        ends = limits(flows, Gaussian.from_factor(jnp.zeros((count, DIM)), base.factor))
        regimes = np.bincount(np.asarray(ends.regime), minlength=len(Regime))
        other = np.isfinite(times) & (np.asarray(ends.regime) != Regime.BLOWUP)
        check.equal("heads that blow up to which the implicit solver gives another regime", int(other.sum()), 0, 0,
                    note="it finds " + ", ".join(f"{n} {Regime(i).name}" for i, n in enumerate(regimes) if n))
        sure = settled & (np.asarray(ends.regime) == Regime.BLOWUP) & (np.asarray(ends.error) < 1e-5)
        ranks = (np.linalg.eigvalsh(found.profile[sure]) > 1e-5).sum(-1)
        check.equal("rank of the profiles, by the implicit solver", np.asarray(ends.rank)[sure], ranks, 0)
    values, vectors = np.linalg.eigh(found.profile[settled])
    V, A = base.V[settled], base.A[settled]
    plane = np.where((values > 1e-5)[:, None, :], vectors, 0.0)                             # eigenvectors of the range, zero elsewhere
    inside = plane @ turned(plane)
    line, u = (values > 1e-5).sum(-1) == 1, vectors[..., -1]
    check.below("part of V that leaves the range", np.linalg.norm((np.eye(DIM) - inside) @ V @ inside, axis=(1, 2)), 1e-5)
    check.above("share of profiles that are lines", line.mean(), 0.8, note=f"{int((~line).sum())} of {len(line)} are planes")
    check.above("lambda u'Au of the lines", (form(A, u) * form(V, u))[line], 0.0)


@claim("transformer_pde.blow-up-rate", source="companion derivation, profile at the blow-up",
       statement=r"Softmax, $V = I$: $(t^* - t)\Sigma(t) \to L_0 uu^\top L_0^\top/\lambda$ with the top eigenvector of $L_0^\top(A + "
                 r"A^\top)L_0$, of a rank equal to the multiplicity. A line $Vu = \lambda u$ has $\operatorname{tr}\Sigma \sim "
                 r"1/(2\lambda(u^\top Au)(t^* - t))$ and attracts iff $(u^\top Au)(\operatorname{Re}\mu - \lambda) < 0$ for all other "
                 r"eigenvalues $\mu$ of $V$.",
       fast={"count": 40}, full={"count": 400})
def _(check: Check, count: int) -> None:
    base, short = heads(count, seed=30), 1e-6
    plain = base.but(V=np.eye(DIM), Q=base.Q + np.eye(DIM), K=np.eye(DIM))
    L = plain.factor
    values, vectors = np.linalg.eigh(turned(L) @ (plain.Q + turned(plain.Q)) @ L)
    kept = np.flatnonzero((values[:, -1] > 0.3) & (values[:, -1] - values[:, -2] > 0.1))
    top, u = values[kept, -1], (L @ vectors[..., -1:])[kept, :, 0]
    near, = follow(("softmax", plain.take(kept), ((1 - short) / top)[:, None]))
    profile = u[:, :, None] * u[:, None] / top[:, None, None]
    check.below("V = I: relative distance of (t* - t) cov from its limit", apart(short / top[:, None, None] * near.cov[:, 0], profile), 1e-3)
    double = Heads.of(np.diag([1.0, 1.0, 0.3]), 1.0, 1.0, 1.0)
    twice, = follow(("softmax", double, [0.5 * (1 - short)]))
    check.equal("V = I: eigenvalues of (t* - t) cov with a double eigenvalue", np.linalg.eigvalsh(twice.cov[0, 0]) * 0.5 * short,
                np.array([0.0, 0.5, 0.5]), 1e-5)

    found = explode(base, 1e-8)
    line = np.flatnonzero((found.status == Status.BLOWUP) & (found.unsettled < 1e-6) & (np.linalg.eigvalsh(found.profile)[:, -2] < 1e-6))
    u = np.linalg.eigh(found.profile[line])[1][..., -1]
    lam, slope = form(base.V[line], u), form(base.A[line], u)
    others = np.linalg.eigvals(base.V[line])
    gap = np.where(np.abs(others - lam[:, None]) < 1e-4, -np.inf, slope[:, None] * (others.real - lam[:, None]))
    off = np.einsum("nij,nj->ni", base.V[line], u) - lam[:, None] * u
    check.below("general V: distance of V u from a multiple of u", np.linalg.norm(off, axis=1), 1e-5,
                note=f"{len(line)} lines, {int((found.status != Status.BLOWUP).sum())} heads without a settled profile")
    check.below("general V: largest stability number of the lines that are reached", gap.max(-1), 0.0)
    for sign in (1, -1):                                                      # the top and the bottom of V = u u' - w w' - ..., with u'Au of its sign
        V = sign * np.diag([1.0, -1.0, -1.0])
        A = base.Q + sign * 2 * np.eye(DIM)
        steep = base.but(V=V, Q=A, K=np.eye(DIM))
        found = explode(steep, 1e-8)
        kept = np.flatnonzero((found.status == Status.BLOWUP) & (found.profile[:, 0, 0] > 0.99))
        chosen, left = steep.take(kept), 1e-5
        near, = follow(("softmax", chosen, (found.time[kept] * (1 - left))[:, None]))
        scaled = trace(near.cov[:, 0]) * 2 * sign * chosen.Q[:, 0, 0] * left * found.time[kept]
        check.equal(f"lambda = {sign}: trace times 2 lambda u'Au (t* - t)", scaled, 1.0, 1e-2, note=f"{len(kept)} heads")


@claim("transformer_pde.scalar-laws", source="companion derivation, one dimension",
       statement=r"$d = 1$, $V = 1$, $A = a$. For $a < 0$: $t\sigma \to 1/(2|a|)$ (softmax), $1/(4|a|)$ (L2, $K = -Q$), $\varepsilon^2/(2|a|)$ "
                 r"(Sinkhorn). For $a > 0$: softmax blows up at $1/(2a\sigma_0)$, L2 ($K = Q$) grows like $e^{2t}$ and Sinkhorn like "
                 r"$e^{2t/\varepsilon}$.",
       fast={"far": 1e4}, full={"far": 1e6})
def _(check: Check, far: float) -> None:
    a, eps = 0.7, 0.8
    q, L = [[a**0.5]], [[1.2]]
    falling, rising = Heads.of(q, [[-(a**0.5)]], 1.0, L, temperature=eps), Heads.of(q, q, 1.0, L, temperature=eps)
    constants = {"softmax": 1 / (2 * a), "l2": 1 / (4 * a), "sinkhorn": eps**2 / (2 * a)}
    for (kind, constant), run in zip(constants.items(), follow(*((kind, falling, [far]) for kind in constants)), strict=True):
        check.equal(f"{kind}: t times the variance over its limit", far * run.cov[0, 0, 0, 0] / constant, 1.0, 100 / far)
    check.equal("softmax: blow-up time", explode(rising).time, 1 / (2 * a * 1.44), 1e-12)
    rates = {"l2": 2.0, "sinkhorn": 2 / eps}
    for (kind, rate), run in zip(rates.items(), follow(*((kind, rising, [8.0, 10.0]) for kind in rates)), strict=True):
        check.equal(f"{kind}: growth rate of the variance", np.log(run.cov[0, 1, 0, 0] / run.cov[0, 0, 0, 0]) / 2, rate, 1e-5)
