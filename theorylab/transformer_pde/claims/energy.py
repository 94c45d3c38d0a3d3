"""Energies, Lyapunov functions and gradient flows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.transformer_pde.attention import L2, Linear, Softmax
from theorylab.transformer_pde.claims import _tokens as tokens
from theorylab.transformer_pde.claims._ensembles import BLIND, DIM, PAPER, Heads, apart, definite, follow, formula, heads, spectral, trace, turned
from theorylab.transformer_pde.energy import energy, interaction_energy
from theorylab.transformer_pde.entropic import Sinkhorn
from theorylab.transformer_pde.gaussian import Gaussian
from theorylab.transformer_pde.unnormalized import Sigmoid

Array = jax.Array
CLASSES = {"softmax": Softmax, "linear": Linear, "l2": L2, "sinkhorn": Sinkhorn}


@claim("transformer_pde.lyapunov", source="companion derivation, Lyapunov function",
       statement=r"$V \succ 0$ symmetric, $\operatorname{sym} A \preceq 0$: $\operatorname{tr}(V^{-1}\Sigma)$ does not increase, for softmax, "
                 r"where its derivative is $2\operatorname{tr}(\Sigma A\Sigma)$, and for Sinkhorn; for L2 if $A = -P$, but not for every such "
                 r"$A$.",
       fast={"count": 8, "draws": 2000}, full={"count": 100, "draws": 20000})
def _(check: Check, count: int, draws: int) -> None:
    base = heads(count, seed=12)
    base = base.but(V=definite(base.V), temperature=0.7, mean=0.0)
    skew = base.but(Q=-definite(base.K, 0.0) + base.Q - turned(base.Q), K=np.eye(DIM))
    opposite = base.but(Q=-base.K)
    times = np.array([0.1, 1.0, 10.0])
    for (kind, batch), run in zip((("softmax", skew), ("sinkhorn", skew), ("l2", opposite)),
                                  follow(("softmax", skew, times), ("sinkhorn", skew, times), ("l2", opposite, times)), strict=True):
        level = trace(np.linalg.solve(batch.V[:, None], np.concatenate([batch.cov[:, None], run.cov], axis=1)))
        check.below(f"{kind}: largest increase, relative", np.diff(level, axis=1) / level[:, :1], 0.0)
    many = heads(draws, seed=40)
    many = many.but(V=definite(many.V, 0.05), Q=-definite(many.K, 0.0) + many.Q - turned(many.Q), K=np.eye(DIM), temperature=0.7)
    rates = {kind: 2 * trace(np.linalg.solve(many.V, formula(kind, many)[1] @ many.cov)) for kind in BLIND}
    size = spectral(many.cov) ** 2 * spectral(many.A)
    check.below("softmax: derivative against 2 tr(cov A cov)", np.abs(rates["softmax"] - 2 * trace(many.cov @ many.A @ many.cov)) / size, 1e-12)
    for kind in ("softmax", "sinkhorn"):
        check.below(f"{kind}: largest derivative of random heads, relative", rates[kind] / size, 1e-12)
    # for L2 the derivative is 4 tr(A cov N) with N = inv(inv(cov) + 2P), and the product of the two has a quadratic form of both signs
    steep = many.but(K=3 * many.V)
    product = many.cov @ np.linalg.inv(np.linalg.inv(many.cov) + 2 * steep.P)
    w = np.linalg.eigh(product + turned(product))[1][..., 0]
    steep = steep.but(Q=-np.linalg.solve(turned(steep.K), w[:, :, None] * w[:, None]))
    rising = trace(np.linalg.solve(steep.V, formula("l2", steep)[1] @ steep.cov)) / size
    check.above("l2 with A = -ww': largest derivative, relative", rising.max(), 1e-3, note=f"{int((rising > 0).sum())} of {draws} increase")


@jax.jit
def _slopes(K: Array, form: Array, mobility: Array, mean: Array, factor: Array) -> dict[str, tuple[Array, ...]]:
    """By kind: the gradients of the energy in mean and factor, and the velocity, of heads with these symmetric forms."""

    def one(head: Any, mean: Array, factor: Array, mobility: Array) -> tuple[Array, ...]:
        slopes = jax.grad(lambda m, L: energy(head, Gaussian.from_factor(m, L), mobility), argnums=(0, 1))(mean, factor)
        return (*slopes, *head.velocity(mean, factor @ factor.T), mobility)

    heads_of = lambda K, A, M: {"softmax": Softmax(A, jnp.eye(DIM), M @ A), "linear": Linear(A, jnp.eye(DIM), M @ A),  # noqa: E731
                                "sinkhorn": Sinkhorn(A, jnp.eye(DIM), M @ A, 1.0, 0.7), "l2": L2(K, K, M @ K.T @ K)}
    return {name: jax.vmap(lambda K, A, M, m, L, name=name: one(heads_of(K, A, M)[name], m if name in ("linear", "sinkhorn") else 0 * m, L, M))(
        K, form, mobility, mean, factor) for name in CLASSES}


def _check_descent(check: Check, base: Heads, mobility: np.ndarray) -> None:
    symmetric = base.Q + turned(base.Q)
    found = _slopes(*map(jnp.asarray, (base.K, symmetric, mobility, base.mean, base.factor)))
    for kind, arrays in found.items():
        of_mean, of_factor, mean, matrix, M = map(np.asarray, arrays)
        slope = of_factor @ np.linalg.inv(base.factor) / 2                    # d/dL = 2 (gradient of F) L for a symmetric gradient
        field = matrix @ base.cov
        expected = -2 * (M @ slope @ base.cov + base.cov @ slope @ M)
        check.below(f"{kind}: field against the gradient by automatic differentiation", apart(field + turned(field), expected), 1e-10)
        if kind in ("linear", "sinkhorn"):
            check.below(f"{kind}: velocity of the mean against its gradient", np.abs(mean + (M @ of_mean[..., None])[..., 0]), 1e-10)


@claim("transformer_pde.gradient-flow", source=f"{PAPER}, gradient flow structure; the energies by a companion derivation",
       statement=r"With $V = A$ symmetric, or $V = P$ for L2 with $Q = K$, softmax, linear, Sinkhorn and L2 attention are Bures gradient flows, "
                 r"$\Sigma' = -2(\nabla F\,\Sigma + \Sigma\nabla F)$: softmax has $F = -\frac14\operatorname{tr}(A\Sigma A\Sigma)$ and Sinkhorn "
                 r"the entropic transport cost of $\mu$ to itself over $2\varepsilon$. For linear and Sinkhorn the mean descends too.",
       fast={"count": 8}, full={"count": 100})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=5)
    _check_descent(check, base, np.broadcast_to(np.eye(DIM), base.Q.shape))
    for i in range(2):                                                        # the entropic cost on quadrature tokens
        nodes, weights = tokens.gauss_hermite(28)
        A, L = 0.3 * (base.Q[i] + base.Q[i].T)[:2, :2], base.factor[i, :2, :2]
        points, eps = nodes @ L.T, 0.7
        logits, logs = points @ A @ points.T / eps, np.log(weights)[None]
        g = tokens.sinkhorn_potential(logits, logs)[0]
        f = -np.log(np.exp(logits + g + logs) @ np.ones(len(g)))
        cost = float(weights @ f + weights @ g) / 2                           # OT_eps = eps times the sum of the potentials, over 2 eps
        state = Gaussian.from_factor(np.zeros(2), L)
        found = energy(Sinkhorn(A, np.eye(2), A, 1.0, eps), state)
        check.equal(f"sinkhorn: energy {i} against the potentials of quadrature tokens", found, cost, 1e-12)


@claim("transformer_pde.preconditioned-gradient-flow", source="companion derivation, gradient flows with a mobility",
       statement=r"$V = MA$ with $M \succ 0$: $\Sigma' = -2(M\nabla F\,\Sigma + \Sigma\nabla F M)$ with the energy of $V = A$. So $V = I$, $A "
                 r"\prec 0$ decreases $\frac14\operatorname{tr}(A\Sigma A\Sigma)$.",
       fast={"count": 8}, full={"count": 100})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=41)
    _check_descent(check, base, definite(base.V))
    A = -definite(base.K)
    run, = follow(("softmax", base.but(V=np.eye(DIM), Q=A, K=np.eye(DIM), mean=0.0), [0.1, 1.0, 10.0]))
    level = trace(A[:, None] @ run.cov @ A[:, None] @ run.cov) / 4
    check.below("V = I: largest increase of the energy, relative", np.diff(level, axis=1) / level[:, :1], 0.0)


@claim("transformer_pde.interaction-energy", source="companion derivation, softmax on general measures",
       statement=r"Softmax with $V = A$ symmetric ascends $F(\mu) = \frac12\iint e^{x^\top Ay}$: $\Gamma = \nabla(\delta F/\delta\mu)/Z_\mu$, so "
                 r"$F' = \int|\nabla\delta F|^2/Z_\mu\,d\mu$ on every measure. A centered Gaussian has $F = \frac12\det(I - \Sigma A\Sigma "
                 r"A)^{-1/2}$, finite iff $\|\Sigma^{1/2}A\Sigma^{1/2}\| < 1$.",
       fast={"count": 4}, full={"count": 40})
def _(check: Check, count: int) -> None:
    rng = np.random.default_rng(42)
    nodes, weights = tokens.gauss_hermite(32)
    for i in range(count):
        A, L = rng.normal(size=(2, 2)), np.eye(2) + 0.3 * rng.normal(size=(2, 2))
        A = A + A.T
        A *= 0.25 / spectral(L.T @ A @ L)
        points, state, head = nodes @ L.T, Gaussian.from_factor(np.zeros(2), L), Softmax.bilinear(A, A)
        kernel = np.exp(points @ A @ points.T)
        F = weights @ kernel @ weights / 2
        check.equal(f"Gaussian {i}: F against quadrature", interaction_energy(head, state), F, 1e-12)
        Z, slope = kernel @ weights, kernel @ (weights[:, None] * points) @ A
        B = A @ L @ L.T @ A
        inside = L @ L.T @ A
        inverse = np.linalg.inv(np.eye(2) - inside @ inside)
        change = B @ L @ L.T + L @ L.T @ B.T
        rate = F * np.trace(inverse @ inside @ change @ A)                    # derivative of det^(-1/2) along the covariance flow
        check.equal(f"Gaussian {i}: F' along the covariance flow against the dissipation", rate, weights @ ((slope**2).sum(1) / Z), 1e-11)
        cloud = rng.normal(size=(12, 2))                                      # any cloud, far from Gaussian
        kernel = np.exp(cloud @ A @ cloud.T)
        moved = tokens.velocity("softmax", (A, np.eye(2), A), cloud)
        slope = kernel @ cloud @ A / 12
        value = lambda x, A=A: np.exp(x @ A @ x.T).mean() / 2  # noqa: E731
        rate = value(cloud + 1e-30j * moved).imag / 1e-30                     # a complex step has no cancellation
        check.equal(f"cloud {i}: F' against the dissipation", rate, ((slope**2).sum(1) / kernel.mean(1)).mean(), 1e-12, relative=True)
    heavy = Gaussian.from_factor(np.zeros(2), np.eye(2) / 0.24)
    check.equal("F beyond the threshold", interaction_energy(Softmax.bilinear(np.diag([0.1, 0.06]), np.diag([0.1, 0.06])), heavy), np.inf, 0.0)


@claim("transformer_pde.sigmoid-gradient-flow", source="companion derivation, gradient flow of sigmoid attention",
       statement=r"Sigmoid attention with $V = A$ symmetric is the Wasserstein descent of $-\frac12\iint\operatorname{softplus}(x^\top Ay + b)$.",
       fast={"count": 4}, full={"count": 40})
def _(check: Check, count: int) -> None:
    rng = np.random.default_rng(43)
    A, x, w = rng.normal(size=(count, 3, 3)), rng.normal(size=(count, 9, 3)), rng.uniform(0.5, 1.5, size=(count, 9))
    A, w = A + turned(A), w / w.sum(-1, keepdims=True)

    @jax.jit
    @jax.vmap
    def both(A: Array, x: Array, w: Array) -> tuple[Array, Array]:
        loss = lambda x: -(w @ jax.nn.softplus(x @ A @ x.T + 0.4) @ w) / 2  # noqa: E731
        return -jax.grad(loss)(x) / w[:, None], Sigmoid(A, jnp.eye(3), A, 1.0, 0.4).token_velocity(x, w)[0]

    descent, moved = map(np.asarray, both(*map(jnp.asarray, (A, x, w))))
    check.below("relative distance of the velocity from the descent", apart(moved, descent), 1e-12)


@claim("transformer_pde.energy-is-not-convex", source="companion derivation, convexity along Bures geodesics",
       statement=r"Along Bures geodesics $F = -\frac14\operatorname{tr}(A\Sigma A\Sigma)$ with $A = \operatorname{diag}(1, -1)$ has second "
                 r"derivatives of both signs; $\frac14\operatorname{tr}\Sigma^2$ is convex.",
       fast={"count": 500}, full={"count": 5000})
def _(check: Check, count: int) -> None:
    rng = np.random.default_rng(44)
    first, second = (definite(a, 0.0) for a in rng.normal(size=(2, count, 2, 2)))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values)[:, None]) @ turned(vectors)
    inverse = np.linalg.inv(root)
    values, vectors = np.linalg.eigh(root @ second @ root)
    step = inverse @ (vectors * np.sqrt(np.maximum(values, 0.0))[:, None]) @ turned(vectors) @ inverse - np.eye(2)      # T - I
    # cov(t) = C + t (D C + C D) + t^2 D C D: a second derivative at t = 0 is exact
    change, bend = step @ first + first @ step, step @ first @ step

    def second_derivative(A: np.ndarray) -> np.ndarray:
        return 2 * trace(A @ change @ A @ change) + 4 * trace(A @ bend @ A @ first)

    saddle = -second_derivative(np.diag([1.0, -1.0])) / 4
    check.below("A = diag(1, -1): least second derivative", saddle.min(), -1.0)
    check.above("A = diag(1, -1): largest second derivative", saddle.max(), 1.0)
    check.above("tr(cov^2) / 4: least second derivative", second_derivative(np.eye(2)).min() / 4, 0.0)
