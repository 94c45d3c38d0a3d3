"""Where bounded covariances come to rest: stationary states, their rank, and which of them attract."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.transformer_pde.attention import L2, Softmax
from theorylab.transformer_pde.claims._ensembles import BLIND, DIM, Heads, apart, definite, follow, form, heads, spectral, trace, turned
from theorylab.transformer_pde.entropic import Sinkhorn
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Gaussian
from theorylab.transformer_pde.oracles import limit
from theorylab.transformer_pde.stability import frozen_lines

CLASSES = {"softmax": Softmax, "l2": L2, "sinkhorn": Sinkhorn}


def _unit(base: Heads) -> np.ndarray:
    """The time after which a start begins to be forgotten."""
    return spectral(np.linalg.inv(base.cov))[:, None]


@claim("transformer_pde.stationary-points", source="companion derivation, stationary points",
       statement=r"Frozen covariances, on which every token rests, are those with $L^\top A L = 0$, the same for softmax, L2 and Sinkhorn "
                 r"attention. A covariance can stand still while tokens rotate: $V = \begin{pmatrix}0 & 1\\ -1 & 0\end{pmatrix}$, $A = \Sigma = "
                 r"I$.",
       fast={"count": 4}, full={"count": 40})
def _(check: Check, count: int) -> None:
    A, L = np.diag([1.0, 2.0, -1.0, -3.0]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, (2 / 3) ** 0.5]])
    rng = np.random.default_rng(32)
    values, still = rng.normal(size=(count, 4, 4)), jnp.zeros(4)
    for kind, made in CLASSES.items():
        moved = jax.jit(jax.vmap(lambda V, L, made=made: made(jnp.asarray(A), jnp.eye(4), V).factor_velocity(still, L)[1]))
        check.below(f"{kind}: norm of V L G at a frozen state", np.linalg.norm(moved(values, np.broadcast_to(L, (count, 4, 2))), axis=(1, 2)), 1e-15)
        other = L + 0.1 * rng.normal(size=(count, 4, 2))
        twisted = turned(other) @ A @ other
        check.above(f"{kind}: norm of V L G over that of L' A L elsewhere",
                    np.linalg.norm(moved(values, other), axis=(1, 2)) / np.linalg.norm(twisted, axis=(1, 2)), 1e-3)
    turn = Heads.of(1.0, 1.0, [[0.0, 1.0], [-1.0, 0.0]], np.eye(2))
    turn = turn.but(Q=np.diag([1.0, 1.0, 0.0]), K=np.diag([1.0, 1.0, 0.0]))
    run, = follow(("softmax", turn, [1.0, np.pi]))
    check.below("rotating state: change of the covariance", np.abs(run.cov - turn.cov), 1e-9)
    check.below("rotating state: distance of the tokens from their mirror image at t = pi", np.abs(run.factor[0, 1] + turn.factor[0]), 1e-9)


@claim("transformer_pde.rank-of-frozen-states", source="companion derivation, totally isotropic subspaces",
       statement=r"$L^\top A L = 0$ needs $\operatorname{rank}\Sigma \le d - \operatorname{rank}(A)/2$, and $\operatorname{rank}\Sigma \le d - "
                 r"\operatorname{rank}A$ for a semidefinite symmetric $A$. Both are attained.",
       fast={"count": 3, "starts": 6}, full={"count": 12, "starts": 20})
def _(check: Check, count: int, starts: int) -> None:
    rng, dim = np.random.default_rng(33), 4
    reached, beyond, definite_gap = [], [], []
    for _ in range(count):
        B, C = rng.normal(size=(2, 2, 2))
        turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        split = turn @ np.block([[np.zeros((2, 2)), B], [C, np.zeros((2, 2))]]) @ turn.T          # the first two axes are totally isotropic
        reached.append(_least(split, dim // 2, rng, starts))
        for rank in (dim, dim - 1, dim - 2):
            A = rng.normal(size=(dim, rank)) @ rng.normal(size=(rank, dim))
            beyond.append(_least(A, dim - rank // 2 + (0 if rank % 2 else 1), rng, starts) / spectral(A))
        q = rng.normal(size=(2, dim))
        A = q.T @ q
        definite_gap.append(_least(A, 3, rng, starts) / np.linalg.eigvalsh(A)[2])
        reached.append(_least(A, 2, rng, starts))
    check.below("least |L'AL| over orthonormal L with as many columns as the bound", reached, 1e-6)
    check.above("the same with one column more, relative to |A|", beyond, 1e-3)
    check.above("semidefinite A: with one column more, over the least eigenvalue that is not zero", definite_gap, 1 - 1e-6)


def _least(A: np.ndarray, columns: int, rng: np.random.Generator, starts: int) -> float:
    """The least Frobenius norm of L'AL over orthonormal L, by a few local searches."""
    from scipy.optimize import minimize

    def cost(x: np.ndarray) -> tuple[float, np.ndarray]:
        X = x.reshape(len(A), columns)
        half = np.linalg.inv(np.linalg.cholesky(X.T @ X)).T
        L = X @ half
        F = L.T @ A @ L
        slope = 2 * (A @ L @ F.T + A.T @ L @ F)
        tangent = slope - L @ (L.T @ slope + slope.T @ L) / 2                 # the norm depends on the columns' span alone
        return float((F * F).sum()), (tangent @ half.T).ravel()

    options = {"gtol": 1e-12, "maxiter": 500}
    found = [minimize(cost, rng.normal(size=len(A) * columns), jac=True, method="BFGS", options=options).fun for _ in range(starts)]
    return max(min(found), 0.0) ** 0.5


@claim("transformer_pde.limit-has-rank-of-the-kernel", source="companion derivation, rank of the limit",
       statement=r"$K = -Q$, $V \succ 0$ symmetric, $\Sigma_0 \succ 0$: every limit has $Q\Sigma_\infty = 0$ and rank exactly $d - "
                 r"\operatorname{rank} Q$, for softmax, L2 and Sinkhorn.",
       fast={"count": 6}, full={"count": 60})
def _(check: Check, count: int) -> None:
    for rank in (1, 2):
        base = heads(count, seed=34 + rank, rank=rank, size=1.0)
        base = base.but(K=-base.Q, V=definite(0.5 * base.V, 0.5), mean=0.0)
        seen = base.Q[:, :rank] @ base.cov @ turned(base.Q[:, :rank])
        times = np.array([1e2, 1e4]) / np.linalg.eigvalsh(seen)[:, :1]
        for kind, run in zip(BLIND, follow(*((kind, base, times) for kind in BLIND)), strict=True):
            early, late = (np.linalg.svd(run.factor[:, i], compute_uv=False) ** 2 for i in (0, 1))
            check.equal(f"{kind}, rank Q = {rank}: eigenvalues that persist from t to 100 t", (late > 0.5 * early).sum(-1), DIM - rank, 0)
            check.below(f"{kind}, rank Q = {rank}: trace of Q cov Q' at 100 t over its start",
                        trace(base.Q @ run.cov[:, 1] @ turned(base.Q)) / trace(seen), 1e-2)


@claim("transformer_pde.limit-is-the-schur-complement", source="companion derivation, rank of the limit",
       statement=r"$V = I$, $K = -Q$: $\Sigma_\infty = \Sigma_0 - \Sigma_0Q^\top(Q\Sigma_0Q^\top)^{-1}Q\Sigma_0$, the covariance of $x$ given "
                 r"$Qx$, for softmax, L2 and Sinkhorn; for softmax $t(\Sigma - \Sigma_\infty) \to \frac12EE^\top$ with $E = "
                 r"\Sigma_0Q^\top(Q\Sigma_0Q^\top)^{-1}$.",
       fast={"count": 8, "solve": False}, full={"count": 100, "solve": True})
def _(check: Check, count: int, solve: bool) -> None:
    base = heads(count, seed=10, rank=1, size=1.0)
    base = base.but(K=-base.Q, V=np.eye(DIM), mean=0.0)
    q = base.Q[:, :1]
    size = q @ base.cov @ turned(q)
    E = base.cov @ turned(q) / size
    exact = base.cov - E @ turned(E) * size
    time = 1e4 / size[:, 0]
    for kind, run in zip(BLIND, follow(*((kind, base, np.concatenate([time, 2 * time], axis=1)) for kind in BLIND)), strict=True):
        half, whole = run.cov[:, 0], run.cov[:, 1]
        check.below(f"{kind}: relative distance, the 1/t tail removed", apart(2 * whole - half, exact), 1e-6)
        if kind == "softmax":
            tail = time[..., None] * (half - exact)
            check.below("softmax: relative distance of t (cov - limit) from E E' / 2", apart(tail, E @ turned(E) / 2), 1e-3)
        if solve:
            state = Gaussian.from_factor(np.zeros((3, DIM)), base.factor[:3])
            found = [limit(GaussianFlow(CLASSES[kind](q[i], -q[i], 1.0)), jax.tree.map(lambda a, i=i: a[i], state)) for i in range(3)]
            check.below(f"{kind}: relative distance of limit()", apart(np.stack([f.cov for f in found]), exact[:3]), 1e-6)
            check.equal(f"{kind}: rank by limit()", [int(f.rank) for f in found], DIM - 1, 0)


@claim("transformer_pde.decay", source="companion derivation, decay",
       statement=r"Softmax with $V = I$, $A + A^\top \prec 0$: $t\,\Sigma(t) \to (-(A + A^\top))^{-1}$ at rate $1/t$, whatever $\Sigma_0$. With "
                 r"$V \succ 0$, $A \prec 0$ symmetric: $t\,\Sigma(t) \to S$ with $VSAS + SASV + S = 0$, whatever $\Sigma_0$.",
       fast={"count": 8}, full={"count": 100})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=11)
    A = -definite(base.K, 0.3) + base.Q - turned(base.Q)
    base = base.but(Q=A, K=np.eye(DIM), V=np.eye(DIM), mean=0.0)            # the mean would grow like e^t
    target = np.linalg.inv(-(A + turned(A)))
    times = np.array([1e2, 1e4]) * _unit(base)
    run, = follow(("softmax", base, times))
    errors = [apart(times[:, i, None, None] * run.cov[:, i], target) for i in (0, 1)]
    check.below("V = I: relative distance at t = 1e4 |inv(Sigma_0)|", errors[1], 1e-3)
    check.between("V = I: order of convergence in 1/t", np.log(errors[0] / errors[1]) / np.log(100), 0.9, 1.1)
    V, A = definite(0.5 * heads(count, seed=36).V, 0.5), -definite(base.K + 0.5 * heads(count, seed=37).K, 0.3)
    first = base.but(V=V, Q=A)
    second = first.but(factor=np.linalg.cholesky(0.5 * base.cov + np.eye(DIM)))
    times = 1e5 * np.maximum(_unit(first), _unit(second))
    one, two = (times[..., None] * run.cov[:, 0] for run in follow(("softmax", first, times), ("softmax", second, times)))
    check.below("V positive definite: relative distance of two starts at t = 1e5", apart(one, two), 1e-3)
    rest = V @ one @ A @ one
    check.below("V positive definite: residual of the equation of S, relative", np.linalg.norm(rest + turned(rest) + one, axis=(1, 2))
                / np.linalg.norm(one, axis=(1, 2)), 1e-3)


@claim("transformer_pde.frozen-lines", source="companion derivation, stability of frozen lines",
       statement=r"A frozen line $u^\top Au = 0$ attracts if $u^\top(A + A^\top)Vu < 0$ and $u^\top AVu < 0$ and repels if one is positive; "
                 r"$|u|^2$ times these are the growth rates of $x^\top Ax$ along the line and of $u^\top Aw$ across it. For $d = 2$ and an "
                 r"indefinite $A + A^\top$ there are exactly two lines.",
       fast={"count": 12}, full={"count": 200})
def _(check: Check, count: int) -> None:
    rng = np.random.default_rng(38)
    A = rng.normal(size=(8 * count, 2, 2))
    A = A[np.linalg.det(A + turned(A)) < -0.1][:count]
    V, lines = rng.normal(size=(len(A), 2, 2)), []
    for a, v in zip(A, V, strict=True):
        u = np.asarray(frozen_lines(Softmax.bilinear(a, v)).directions)
        lines.append(u)
    lines = np.stack(lines)
    check.below("u'Au of the two lines", np.abs(form(A[:, None], lines)), 1e-12)
    check.above("angle between them", np.abs(lines[:, 0, 0] * lines[:, 1, 1] - lines[:, 0, 1] * lines[:, 1, 0]), 1e-3)
    A, V, u = np.repeat(A, 2, 0), np.repeat(V, 2, 0), lines.reshape(-1, 2)
    along, across = form((A + turned(A)) @ V, u), form(A @ V, u)
    off, small = u[:, ::-1] * [1, -1], 1e-6
    batch = Heads.of(A, 1.0, V, np.stack([u + small * off, small * off], axis=-1))
    batch = batch.but(K=np.diag([1.0, 1.0, 0.0]))
    run, = follow(("softmax", batch, [0.1, 0.2]))
    x, w = run.factor[:, :, :2, 0], run.factor[:, :, :2, 1]
    rates = [np.log(np.abs(b[:, 1] / b[:, 0])) / 0.1 for b in (form(A[:, None], x), form(A[:, None], u[:, None], w))]
    check.below("growth rate along the line against u'(A + A')Vu", np.abs(rates[0] - along), 1e-3)
    check.below("growth rate across the line against u'AVu", np.abs(rates[1] - across), 1e-3)
    slowest = np.maximum(along, across)
    calm = np.flatnonzero(slowest < -0.1)
    near = batch.take(calm).but(factor=_filled(np.stack([u + 0.01 * off, 0.01 * off], axis=-1)[calm]))
    end, = follow(("softmax", near, 20 / -slowest[calm, None]))
    top = np.linalg.eigh(end.cov[:, 0])[1][..., :2, -1]
    angle = np.abs((top * off[calm]).sum(-1))
    check.below("attracting lines: angle at the end of a start 0.01 away", angle, 1e-5, note=f"{len(calm)} of {len(u)} lines")
    check.true("repelling lines: a perturbation grows", np.maximum(*rates)[slowest > 0.1] > 0, f"{int((slowest > 0.1).sum())} lines")


def _filled(factor: np.ndarray) -> np.ndarray:
    return np.pad(factor, ((0, 0), (0, DIM - factor.shape[1]), (0, DIM - factor.shape[2])))
