"""What every flow keeps: rank, equivariance, conserved quantities, order."""

from __future__ import annotations

import jax
import numpy as np

from theorylab.core.keys import stream
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.transformer_pde.claims._ensembles import (
    BLIND,
    DIM,
    KINDS,
    SAVES,
    apart,
    follow,
    form,
    formula,
    heads,
    safe_time,
    trace,
    turned,
    velocities,
)


@claim("transformer_pde.rank-is-preserved", source="companion derivation, rank and volume",
       statement=r"For finite $t$ the covariance stays positive semidefinite with the rank of $\Sigma_0$, $\operatorname{range}\Sigma(t) = "
                 r"\Phi(t)\operatorname{range}\Sigma_0$, and $\frac{d}{dt}\log\det\Sigma = 2\operatorname{tr}B$.",
       fast={"count": 8}, full={"count": 100})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=21)
    flat = base.but(factor=np.concatenate([base.factor[..., :2], base.factor[..., :1] + base.factor[..., 1:2]], axis=-1))      # rank two
    nodes, weights = np.polynomial.legendre.leggauss(SAVES - 1)
    part = np.append((1 + nodes) / 2, 1.0)
    for kind in KINDS:
        t = safe_time(kind, base)
        whole, thin = follow((kind, base, t[:, None] * part), (kind, flat, t[:, None]))
        growth = np.zeros(count)
        for i in range(SAVES - 1):                                            # Gauss quadrature of 2 tr B, with B from its formula
            there = base.but(mean=whole.mean[:, i], factor=whole.factor[:, i])
            growth += t * weights[i] * trace(formula(kind, there)[1])
        volume = np.linalg.slogdet(whole.cov[:, -1])[1] - np.linalg.slogdet(base.cov)[1]
        check.below(f"{kind}: log det against the integral of 2 tr B", np.abs(volume - growth), 1e-9)
        values = np.linalg.svd(thin.factor[:, -1], compute_uv=False)
        check.below(f"{kind}: third singular value of a factor of rank two", values[:, 2] / values[:, 0], 1e-13)
        # the norm of B is at most c |M|, and the second moment M at most doubles until the safe time
        check.above(f"{kind}: second singular value over its start", values[:, 1] / np.linalg.svd(flat.factor, compute_uv=False)[:, 1], 0.5**0.5)


@claim("transformer_pde.equivariance", source="companion derivation, change of basis",
       statement=r"$(\alpha, \Sigma, V, A, P) \mapsto (M\alpha, M\Sigma M^\top, MVM^{-1}, M^{-\top}AM^{-1}, M^{-\top}PM^{-1})$ maps solutions to "
                 r"solutions, for every variant.",
       fast={"count": 8}, full={"count": 100})
def _(check: Check, count: int) -> None:
    base, M = heads(count, seed=1), np.eye(DIM) + 0.4 * np.asarray(jax.random.normal(stream(1, "M"), (DIM, DIM)))
    inverse = np.linalg.inv(M)
    moved = base.but(Q=base.Q @ inverse, K=base.K @ inverse, V=M @ base.V @ inverse, mean=base.mean @ M.T, factor=M @ base.factor)
    for kind in KINDS:
        (mean, matrix), (there_mean, there_matrix) = velocities((kind, base), (kind, moved))
        check.below(f"{kind}: relative distance of the velocities", apart(there_matrix, M @ matrix @ inverse), 1e-12)
        check.below(f"{kind}: distance of the velocities of the mean", np.abs(there_mean - mean @ M.T), 1e-12)
        t = safe_time(kind, base)[:, None]
        here, there = follow((kind, base, t), (kind, moved, t))
        check.below(f"{kind}: relative distance of the covariances", apart(there.cov, M @ here.cov @ M.T), 1e-12)
        check.below(f"{kind}: distance of the means", np.abs(there.mean - here.mean @ M.T), 1e-12)


@claim("transformer_pde.scaling", source="companion derivation, homogeneity of softmax",
       statement=r"Softmax: $\Sigma(t;\, s\Sigma_0) = s\,\Sigma(st;\, \Sigma_0)$; and every flow has the semigroup property.",
       fast={"count": 8}, full={"count": 100})
def _(check: Check, count: int) -> None:
    base, s = heads(count, seed=2), 1.7
    t = (safe_time("softmax", base) / s)[:, None]
    scaled, plain = follow(("softmax", base.but(factor=np.sqrt(s) * base.factor), t), ("softmax", base, s * t))
    check.below("softmax: relative distance of the scaled solutions", apart(scaled.cov, s * plain.cov), 1e-11)
    for kind in KINDS:
        t = safe_time(kind, base)[:, None]
        whole, = follow((kind, base, np.concatenate([t / 2, t], axis=1)))
        again, = follow((kind, base.but(mean=whole.mean[:, 0], factor=np.linalg.cholesky(whole.cov[:, 0])), t / 2))
        check.below(f"{kind}: two halves against the whole", apart(again.cov[:, 0], whole.cov[:, 1]), 1e-10)


@claim("transformer_pde.mean-decouples", source="companion derivation, covariance and mean",
       statement=r"The covariance does not depend on the mean for softmax, L2 and Sinkhorn attention and their sums; for linear attention it "
                 r"does.",
       fast={"count": 8}, full={"count": 100})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=22)
    shifted = base.but(mean=base.mean + 1.0)
    for kind in (*BLIND, "blind heads", "linear"):
        t = np.minimum(safe_time(kind, base), safe_time(kind, shifted))[:, None]
        here, there = follow((kind, base, t), (kind, shifted, t))
        if kind == "linear":
            check.above("linear: relative distance of the covariances", apart(there.cov, here.cov), 1e-3)
        else:
            check.below(f"{kind}: relative distance of the covariances", apart(there.cov, here.cov), 1e-11)


@claim("transformer_pde.conserved-quantities", source="companion derivation, conservation laws",
       statement=r"$\Phi(t)u = u$ for $u \in \ker A$, so $u^\top\Sigma(t)^{-1}u$ is constant there; $w^\top\Sigma(t)w$ and $w^\top\alpha$ are "
                 r"for $w \in \ker V^\top$. For every variant.",
       fast={"count": 8}, full={"count": 100})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=3)
    query, value = base.Q.copy(), base.V.copy()
    query[..., -1], value[:, -1] = 0, 0                                       # the last axis spans ker A and ker V'
    turn = np.linalg.qr(np.asarray(jax.random.normal(stream(3, "turn"), (DIM, DIM))))[0]
    base, u = base.but(Q=query @ turn.T, V=turn @ value @ turn.T), turn[:, -1]
    for kind in KINDS:
        there, = follow((kind, base, safe_time(kind, base)[:, None]))
        mean, factor, cov = there.mean[:, 0], there.factor[:, 0], there.cov[:, 0]
        check.below(f"{kind}: distance of Phi u from u", np.abs(factor @ np.linalg.inv(base.factor) @ u - u), 1e-12)
        check.below(f"{kind}: relative change of u' inv(cov) u", np.abs(form(np.linalg.inv(cov), u) / form(np.linalg.inv(base.cov), u) - 1), 1e-12)
        check.below(f"{kind}: relative change of w' cov w", np.abs(form(cov, u) / form(base.cov, u) - 1), 1e-12)
        check.below(f"{kind}: change of w' mean", np.abs((mean - base.mean) @ u), 1e-12)


@claim("transformer_pde.inverse-is-affine", source="companion derivation, closed form for V = vI",
       statement=r"Softmax with $V = vI$: $\Sigma(t)^{-1} + v t\,(A + A^\top)$ is constant, and $\Sigma_0 \preceq \Sigma_0'$ stays so; with "
                 r"another $V$ the order can be lost.",
       fast={"count": 40}, full={"count": 500})
def _(check: Check, count: int) -> None:
    free = heads(count, seed=4)
    scalar = free.but(V=-0.8 * np.eye(DIM))
    symmetric, shift = free.A + turned(free.A), np.asarray(jax.random.normal(stream(4, "shift"), (count, DIM)))
    higher = np.linalg.cholesky(free.cov + 0.3 * shift[:, :, None] * shift[:, None])              # a difference of rank one: the edge of the order
    for name, base in (("a number", scalar), ("a matrix", free)):
        larger = base.but(factor=higher)
        t = np.minimum(safe_time("softmax", base), safe_time("softmax", larger))[:, None]
        below, above = follow(("softmax", base, t), ("softmax", larger, t))
        lowest = np.linalg.eigvalsh(above.cov[:, 0] - below.cov[:, 0])[:, 0]
        if name == "a number":
            check.below("relative distance", apart(np.linalg.inv(below.cov[:, 0]) - 0.8 * t[..., None] * symmetric, np.linalg.inv(base.cov)), 1e-10)
            check.above("V a number: smallest eigenvalue of the difference of ordered states", lowest, -1e-12)
        else:
            check.below("V a matrix: least of these eigenvalues", lowest.min(), -0.01)
