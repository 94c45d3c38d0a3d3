"""How the variants are related, and what replaces the Gaussian where it is not kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.transformer_pde.attention import Softmax
from theorylab.transformer_pde.claims import _tokens as tokens
from theorylab.transformer_pde.claims._ensembles import DIM, apart, definite, heads, turned, velocities
from theorylab.transformer_pde.closures import moment_closure
from theorylab.transformer_pde.gaussian import Gaussian
from theorylab.transformer_pde.unnormalized import Sigmoid


def _matrices(*runs: tuple) -> list[np.ndarray]:
    return [matrix for _, matrix in velocities(*runs)]


@claim("transformer_pde.softmax-is-linear-when-centered", source="companion derivation, relations between variants",
       statement=r"On centered Gaussians softmax and linear attention have the same velocity.",
       fast={"count": 40}, full={"count": 400})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=50)
    centered = base.but(mean=0.0)
    softmax, linear, other = _matrices(("softmax", centered), ("linear", centered), ("linear", base))
    check.below("relative distance at zero mean", apart(linear, softmax), 1e-14)
    check.above("relative distance at another mean", apart(other, softmax).max(), 0.1)


@claim("transformer_pde.sinkhorn-at-high-temperature", source="companion derivation, relations between variants",
       statement=r"$\varepsilon \to \infty$: $\varepsilon^2B_{\mathrm{Sinkhorn}} \to V\Sigma A$ with a relative deviation $O(\varepsilon^{-2})$, "
                 r"so that it is $B_{\mathrm{softmax}}$ of $A/\varepsilon$, over $\varepsilon$.",
       fast={"count": 20}, full={"count": 200})
def _(check: Check, count: int) -> None:
    base, temperatures = heads(count, seed=51, size=1.0), (10.0, 30.0, 100.0)
    softmax, *rest = _matrices(("softmax", base), *(("sinkhorn", base.but(temperature=eps)) for eps in temperatures))
    far = np.stack([apart(eps**2 * B, softmax) for eps, B in zip(temperatures, rest, strict=True)])
    check.slope("log-log slope of the deviation", np.array(temperatures), far, expected=-2.0, tol=0.1,
                note=f"deviation times eps^2 up to {(far[-1] * temperatures[-1] ** 2).max():.3g}")
    scaled, sinkhorn = _matrices(("softmax", base.but(Q=base.Q / 100)), ("sinkhorn", base.but(temperature=100.0)))
    check.below("relative distance from softmax of A / eps, over eps, at eps = 100", apart(sinkhorn, scaled / 100), 1e-2)


@claim("transformer_pde.sinkhorn-at-low-temperature", source="companion derivation, relations between variants",
       statement=r"$\varepsilon \to 0$, $\Sigma \succ 0$: $\varepsilon B \to V$ for symmetric $A \succ 0$ and $-V$ for $A \prec 0$, at rate "
                 r"$O(\varepsilon)$; for an invertible $A$, $\varepsilon B \to V L O^\top L^{-1}$ with the orthogonal polar factor $O$ of "
                 r"$L^\top A^\top L$.",
       fast={"count": 12}, full={"count": 120})
def _(check: Check, count: int) -> None:
    base, temperatures = heads(count, seed=52, size=1.0), np.array([1e-4, 1e-3, 1e-2])
    base = base.but(factor=np.eye(DIM) + 0.3 * base.V)                        # the deviation is eps over the least eigenvalue of the form
    positive, L = definite(base.K, 0.5), base.factor
    general = base.but(Q=base.Q + 2 * np.eye(DIM), K=np.eye(DIM))
    left, _, right = np.linalg.svd(turned(L) @ turned(general.Q) @ L)
    cases = {"A positive": (base.but(Q=positive, K=np.eye(DIM)), base.V), "A negative": (base.but(Q=-positive, K=np.eye(DIM)), -base.V),
             "A invertible": (general, base.V @ L @ turned(left @ right) @ np.linalg.inv(L))}
    for name, (batch, goal) in cases.items():
        found = _matrices(*(("sinkhorn", batch.but(temperature=eps)) for eps in temperatures))
        far = np.stack([apart(eps * B, goal) for eps, B in zip(temperatures, found, strict=True)])
        check.slope(f"{name}: log-log slope of the deviation", temperatures, far, expected=1.0, tol=0.1)
        check.below(f"{name}: relative deviation at eps = 1e-4", far[0], 1e-2)


@claim("transformer_pde.l2-at-large-and-small-covariance", source="companion derivation, relations between variants",
       statement=r"L2, $k = d$: $B \to VK^{-1}Q$ for large $\Sigma$; $B \approx 2V\Sigma A$ for small $\Sigma$.",
       fast={"count": 12}, full={"count": 120})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=53)
    base = base.but(K=np.eye(DIM) + 0.3 * base.K, factor=np.eye(DIM) + 0.3 * base.V)
    sizes = np.array([1e3, 1e4, 1e5])
    goals = {"large": (1.0, lambda s: base.V @ np.linalg.inv(base.K) @ base.Q), "small": (-1.0, lambda s: 2 * base.V @ (s * base.cov) @ base.A)}
    for name, (power, goal) in goals.items():
        found = _matrices(*(("l2", base.but(factor=s ** (power / 2) * base.factor)) for s in sizes))
        far = np.stack([apart(B, goal(s**power)) for s, B in zip(sizes, found, strict=True)])
        check.slope(f"{name}: log-log slope of the deviation", sizes, far, expected=-1.0, tol=0.1)


@claim("transformer_pde.sigmoid-closure", source="companion derivation, moment closure of sigmoid attention",
       statement=r"The closure of sigmoid attention, $m = E\,\Gamma$ and $B = V E[\sigma'(z)yy^\top]A$ by one integral over a frequency, is the "
                 r"regression of $\Gamma$ on tokens of the Gaussian; following it costs under one percent of the covariance at $t = 1$.",
       fast={"order": 20}, full={"order": 28})
def _(check: Check, order: int) -> None:
    Q, K, V = np.array([[0.9, 0.2], [-0.1, 0.7]]), np.array([[0.8, -0.4], [0.2, 0.9]]), np.array([[0.6, -0.3], [0.2, 0.5]])
    L, (nodes, weights) = np.linalg.cholesky([[0.8, 0.25], [0.25, 0.5]]), tokens.gauss_hermite(40)
    head = Sigmoid(Q, K, 3 * V)
    closure = jax.jit(lambda mean, L: moment_closure(head, Gaussian.from_factor(mean, L)))
    for mean in (np.zeros(2), np.array([0.5, -0.3])):
        points = mean + nodes @ L.T
        moved = tokens.velocity("sigmoid", (Q, K, 3 * V), points, weights)
        closed = closure(mean, L)
        slope = moved.T @ (weights[:, None] * nodes) @ np.linalg.inv(L)
        check.below(f"mean velocity at mean {mean.tolist()} against quadrature tokens", np.abs(closed.mean - weights @ moved), 1e-8)
        check.below(f"matrix at mean {mean.tolist()} against their regression", np.abs(closed.matrix - slope), 1e-8)
    nodes, weights = tokens.gauss_hermite(order)
    end = tokens.transport(lambda x: tokens.velocity("sigmoid", (Q, K, 3 * V), x, weights), nodes @ L.T, [1.0])[0]
    exact = end.T @ (weights[:, None] * end)
    factor = tokens.transport(lambda L: np.asarray(closure(np.zeros(2), L).matrix) @ L, L, [1.0])[0]
    found = factor @ factor.T
    note = f"variance {found[0, 0]:.4f} for {exact[0, 0]:.4f}"
    check.between("relative error of the covariance of the closure at t = 1", apart(found, exact), 1e-4, 1e-2, note=note)


@claim("transformer_pde.equal-angles", source="companion derivation, after the literature on clustering in self-attention on the sphere",
       statement=r"$n$ unit tokens that all enclose the angle $\arccos\rho$ keep equal angles under $x_i' = P_{x_i}\Gamma(x_i)$ with logits "
                 r"$\beta\langle x, y\rangle$: $\rho' = 2e^{\beta\rho}(1 - \rho)((n - 1)\rho + 1)/(e^\beta + (n - 1)e^{\beta\rho})$; and "
                 r"$\frac{1}{2\beta}\iint e^{\beta\langle x, y\rangle}$ increases.",
       fast={"count": 20}, full={"count": 200})
def _(check: Check, count: int) -> None:
    n, beta, rng = 6, 2.5, np.random.default_rng(54)
    for rho in (-0.15, 0.0, 0.3, 0.9):
        x = np.linalg.cholesky((1 - rho) * np.eye(n) + rho)
        moved = np.asarray(Softmax(np.eye(n), np.eye(n), 1.0, beta).token_velocity(jnp.asarray(x))[0])
        moved = moved - (moved * x).sum(1, keepdims=True) * x
        rates = (moved @ x.T + x @ moved.T)[~np.eye(n, dtype=bool)]
        exact = 2 * np.exp(beta * rho) * (1 - rho) * ((n - 1) * rho + 1) / (np.exp(beta) + (n - 1) * np.exp(beta * rho))
        check.below(f"rate of every cosine at rho = {rho}", np.abs(rates - exact), 1e-12)
    x = rng.normal(size=(count, n, 3))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    kernel = np.exp(beta * x @ turned(x))
    for name, norm in (("softmax", kernel.sum(-1, keepdims=True)), ("unnormalized", float(n))):
        moved = kernel @ x / norm
        moved -= (moved * x).sum(-1, keepdims=True) * x
        check.above(f"{name}: derivative of the energy on random clouds", (kernel @ x * moved).sum((-2, -1)) / n**2, 0.0)
