"""Gaussians stay Gaussian, and what n tokens know of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.keys import stream
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.transformer_pde.attention import Linear, Softmax
from theorylab.transformer_pde.claims import _tokens as tokens
from theorylab.transformer_pde.claims._ensembles import KINDS, PAPER, Heads, follow, formula, heads, parts, safe_time, spectral, turned, velocities
from theorylab.transformer_pde.gaussian import Gaussian
from theorylab.transformer_pde.positions import mixture_velocity

Array = jax.Array
GOLDEN = Heads.of([[0.5, 0.2], [-0.1, 0.4]], [[0.3, -0.4], [0.2, 0.5]], [[0.6, -0.3], [0.2, 0.5]],
                  np.linalg.cholesky([[0.8, 0.25], [0.25, 0.5]]), [0.3, -0.2], 0.7)


def _planar(count: int, seed: int, size: float) -> Heads:
    """Heads in two dimensions, with starts so small that the exponents, in standard coordinates, have this norm for every kind."""
    base = heads(count, seed=seed)
    L = np.eye(2) + 0.3 * base.factor[:, :2, :2]
    base = Heads.of(*(a[:, :2, :2] for a in (base.Q, base.K, base.V)), L, base.mean[:, :2], 0.7)
    exponents = [2 * a for part in parts("multi-head", base).values() for a in (part.A, part.P)]
    tilt = np.max([spectral(turned(base.factor) @ a @ base.factor) for a in exponents], axis=0)
    return base.but(factor=base.factor * np.sqrt(size / tilt)[:, None, None])


def _tokens_of(batch: Heads, i: int, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    nodes, weights = tokens.gauss_hermite(order)
    return nodes, weights, batch.mean[i, :2] + nodes @ batch.factor[i, :2, :2].T


def _sum(kind: str, batch: Heads, i: int, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The velocity of tokens under a variant, by NumPy."""
    return np.asarray(sum(tokens.velocity(name, tokens.head(single, i), points, weights, temperature=float(batch.temperature[i]))
                          for name, single in parts(kind, batch).items()))


@claim("transformer_pde.velocity-on-gaussians", source=f"{PAPER}, attention on Gaussian measures; linear and Sinkhorn by a companion derivation",
       statement=r"On $\mathcal N(\alpha, \Sigma)$ attention is affine, $\Gamma(x) = m + B(x - \alpha)$: softmax $B = V\Sigma A$, L2 $B = 2V(I + "
                 r"2\Sigma P)^{-1}\Sigma A$, linear $B = V(\Sigma + \alpha\alpha^\top)A$, Sinkhorn $B = V C^\top\Sigma^{-1}/\varepsilon$ with "
                 r"the covariance $C$ of the entropic plan; several heads add up.",
       fast={"count": 3}, full={"count": 30})
def _(check: Check, count: int) -> None:
    base = _planar(count, seed=27, size=0.6)
    for kind in KINDS:
        worst = []
        (mean, matrix), = velocities((kind, base))
        for i in range(count):
            _, weights, points = _tokens_of(base, i, 28)
            exact = mean[i, :2] + (points - base.mean[i, :2]) @ matrix[i, :2, :2].T
            worst.append(np.sqrt(weights @ ((_sum(kind, base, i, points, weights) - exact) ** 2).sum(1)))
        check.below(f"{kind}: L2(mu) distance of the formula from quadrature tokens", worst, 1e-11)
    nodes, weights = tokens.gauss_hermite(40)
    A, L = np.array([[0.8, 0.5], [-0.3, 0.6]]), np.array([[1.0, 0.0], [0.3, 0.8]])
    A, points = A / spectral(L.T @ A @ L), nodes @ L.T
    gaps = [tokens.velocity("softmax", (s * A, np.eye(2), np.eye(2)), points, weights) - s * points @ A.T @ L @ L.T for s in (0.4, 0.6, 0.8, 1.2)]
    error = [np.sqrt(weights @ (gap**2).sum(1)) for gap in gaps]
    note = "at 0.4, 0.6, 0.8, 1.2: " + ", ".join(f"{e:.1g}" for e in error)
    check.below("softmax: the same with 40 nodes per axis at norm 0.4 and 0.6 of L'AL", error[:2], [1e-14, 1e-11], note=note)
    check.above("softmax: the same at norm 1.2, where the tilted measure leaves the nodes", error[-1], 1e-8)
    whole = heads(8 * count, seed=28)
    for kind in KINDS:
        (found, (m, B)) = velocities((kind, whole))[0], formula(kind, whole)
        check.below(f"{kind}: matrix against inverses and singular values", np.linalg.norm(found[1] - B, axis=(1, 2)) / spectral(B), 1e-11)
        check.below(f"{kind}: velocity of the mean", np.abs(found[0] - m), 1e-12)


@claim("transformer_pde.tokens-follow-the-flow", source="companion derivation, tokens and flow map",
       statement=r"The Gaussian flow transports tokens: $x(t) = \alpha(t) + \Phi(t)(x(0) - \alpha(0))$ for every token, for each variant.",
       fast={"order": 12, "time": 0.5}, full={"order": 22, "time": 1.0})
def _(check: Check, order: int, time: float) -> None:
    base = _planar(4, seed=29, size=0.2).take(slice(0, 1) if order < 20 else slice(0, 4))
    base = GOLDEN if base.count == 1 else base
    for kind in KINDS:
        end = np.minimum(time, safe_time(kind, base))
        (found,), worst = follow((kind, base, end[:, None])), []
        for i in range(base.count):
            nodes, weights, points = _tokens_of(base, i, order)
            moved = tokens.transport(partial(_sum, kind, base, i, weights=weights), points, end[i:i + 1])[0]
            exact = found.mean[i, 0, :2] + nodes @ found.factor[i, 0, :2, :2].T
            worst.append(np.sqrt(weights @ ((moved - exact) ** 2).sum(1)))
        check.below(f"{kind}: L2(mu) distance of the tokens", worst, 1e-8)


def _kurtosis(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The excess kurtosis along the axes."""
    centered = points - weights @ points
    return (weights @ centered**4) / (weights @ centered**2) ** 2 - 3


@claim("transformer_pde.gaussians-stay-gaussian", source=f"{PAPER}, attention on Gaussian measures; sigmoid by a companion derivation",
       statement=r"Third and fourth cumulants stay zero under softmax attention; under sigmoid attention the excess kurtosis becomes negative.",
       fast={"order": 16}, full={"order": 24})
def _(check: Check, order: int) -> None:
    nodes, weights, points = _tokens_of(GOLDEN, 0, order)
    moved = tokens.transport(partial(_sum, "softmax", GOLDEN, 0, weights=weights), points, [0.6])[0]
    centered = moved - weights @ moved
    check.below("softmax: excess kurtosis at t = 0.6", np.abs(_kurtosis(moved, weights)), 2e-8)
    check.below("softmax: third moments at t = 0.6", np.abs(weights @ centered**3), 2e-8)
    head = np.array([[0.9, 0.2], [-0.1, 0.7]]), np.array([[0.8, -0.4], [0.2, 0.9]]), 3 * np.array([[0.6, -0.3], [0.2, 0.5]])
    start = nodes @ GOLDEN.factor[0, :2, :2].T
    moved = tokens.transport(partial(tokens.velocity, "sigmoid", head, weights=weights), start, [1.0])[0]
    bent = _kurtosis(moved, weights)
    check.between("sigmoid with 3V: excess kurtosis at t = 1", bent, -0.35, -0.05, note=", ".join(f"{b:.3f}" for b in bent))


@claim("transformer_pde.mean-field-rate", source="companion derivation, Monte-Carlo rate",
       statement=r"The velocity of $n$ independent tokens is within $O(n^{-1/2})$ of the mean field while $\|\Sigma^{1/2} A \Sigma^{1/2}\|_2 < "
                 r"1/\sqrt 2$, and converges more slowly beyond.",
       fast={"sizes": (100, 400, 1600), "replicates": 40, "tol": 0.12, "slow": None},
       full={"sizes": (100, 400, 1600, 6400), "replicates": 300, "tol": 0.05, "slow": ((0.6, -0.45), (1.2, -0.3), (2.4, -0.13), (4.8, -0.05))})
def _(check: Check, sizes: tuple[int, ...], replicates: int, tol: float, slow: tuple[tuple[float, float], ...] | None) -> None:
    places = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)))

    def error(n: int, size: Array, key: Array) -> Array:
        sample = jax.random.normal(key, (n, 2))
        moved = Softmax(jnp.eye(2), jnp.eye(2), 1.0, size).token_velocity(sample, queries=places)[0]
        return ((moved - size * places) ** 2).sum(1).mean()                   # Sigma = I and V = I: the mean field is A x

    at_all = [jax.jit(jax.vmap(partial(error, n), in_axes=(None, 0))) for n in sizes]
    squares = lambda size: np.stack([np.asarray(f(jnp.asarray(size), jax.random.split(stream(0, f"n={n}"), replicates)))  # noqa: E731
                                     for n, f in zip(sizes, at_all, strict=True)])
    check.slope("log-log slope of the squared error at norm 0.36", np.array(sizes), squares(0.36), expected=-1.0, tol=2 * tol)
    for size, slope in slow or ():
        check.slope(f"log-log slope of the squared error at norm {size:g}", np.array(sizes), squares(size), expected=2 * slope, tol=0.08)


@claim("transformer_pde.sinkhorn-tokens", source="companion derivation, Sinkhorn attention on a sample",
       statement=r"The velocity of $n$ tokens of a Gaussian under discrete Sinkhorn attention has the least-squares slope $B$ of the Gaussian "
                 r"with the moments of the sample, up to an error that vanishes with $n$.",
       fast={"tokens": 400, "pot": False}, full={"tokens": 1500, "pot": True})
def _(check: Check, tokens: int, pot: bool) -> None:
    from theorylab.transformer_pde.claims import _tokens as numpy_tokens

    points = np.random.default_rng(7).normal(size=(tokens, 2)) @ GOLDEN.factor[0, :2, :2].T + GOLDEN.mean[0, :2]
    mean, cov = points.mean(0), np.cov(points.T, bias=True)
    sample = Heads.of(*numpy_tokens.head(GOLDEN), np.linalg.cholesky(cov), mean, 0.7)
    m, B = (a[0] for a in velocities(("sinkhorn", sample))[0])
    Q, K, V = (a[0] for a in numpy_tokens.head(GOLDEN))
    if pot:
        import ot

        cost, mass = -(points @ Q.T @ K @ points.T), np.full(tokens, 1 / tokens)
        plan: Any = ot.sinkhorn(mass, mass, cost, 0.7, method="sinkhorn_log", stopThr=1e-12, numItermax=10000)
        moved = tokens * (plan @ points) @ V.T / 0.7
    else:
        moved = numpy_tokens.velocity("sinkhorn", (Q, K, V), points, temperature=0.7)
    centered = points - mean
    slope = np.linalg.lstsq(centered, moved - moved.mean(0), rcond=None)[0].T
    check.below("distance of the slope from B", np.abs(slope - B[:2, :2]), 1e-3 if pot else 5e-3)
    rest = moved - m[:2] - centered @ B[:2, :2].T
    check.below("root mean square distance relative to the velocity", np.sqrt((rest**2).sum() / (moved**2).sum()), 0.03)


@claim("transformer_pde.masked-mixtures", source=f"{PAPER}, masked attention; the mixture formula is a companion derivation",
       statement=r"Causal softmax on one Gaussian for each position has the velocity $\Gamma_i(x) = V\sum_{j \le i}\omega_j(x)(\alpha_j + "
                 r"\Sigma_jAx)$, $\omega_j \propto \theta_j e^{\alpha_j\cdot Ax + (Ax)^\top\Sigma_jAx/2}$, which is affine if all positions "
                 r"share one law; causal linear attention is affine always.",
       fast={"order": 20}, full={"order": 32})
def _(check: Check, order: int) -> None:
    Q, K, V = (a[0] for a in tokens.head(GOLDEN))
    A, nodes, weights = K.T @ Q, *tokens.gauss_hermite(order)
    means = np.array([[0.3, -0.2], [-1.0, 0.6], [1.2, 0.9]])
    roots = np.array([[[0.8, 0.0], [0.2, 0.6]], [[0.5, 0.0], [-0.3, 0.9]], [[0.7, 0.0], [0.4, 0.5]]])
    theta = np.array([0.5, 0.2, 0.3])
    for shared in (False, True):
        alpha, L = (np.broadcast_to(a[0], a.shape) if shared else a for a in (means, roots))
        clouds = alpha[:, None] + nodes @ turned(L)
        states = Gaussian.from_factor(jnp.asarray(alpha), jnp.asarray(L))
        exact = np.asarray(mixture_velocity(Softmax(Q, K, V), states, clouds, theta))
        error, bent = [], []
        for i in range(len(theta)):
            past, mass = clouds[:i + 1].reshape(-1, 2), (theta[:i + 1, None] * weights).ravel() / theta[:i + 1].sum()
            moved = tokens.velocity("softmax", (Q, K, V), past, mass, queries=clouds[i])
            error.append(np.sqrt(weights @ ((moved - exact[i]) ** 2).sum(1)))
            slope = np.einsum("n,nd,nr->dr", weights, exact[i], nodes)
            rest = exact[i] - weights @ exact[i] - nodes @ slope.T
            bent.append(np.sqrt((weights @ (rest**2).sum(1)) / (weights @ (exact[i] ** 2).sum(1))))
        if shared:
            unmasked = (alpha[:, None] + clouds @ A.T @ L @ turned(L)) @ V.T
            check.below("one law: distance from unmasked attention", np.sqrt(((exact - unmasked) ** 2).sum(-1) @ weights), 1e-14)
            check.below("one law: part of the velocity that is not affine", bent, 1e-12)
        else:
            check.below("L2(mu) distance of the formula from quadrature tokens", error, 1e-11)
            check.between("part of the velocity that is not affine, later positions", bent[1:], 0.002, 0.05)
            linear = np.asarray(mixture_velocity(Linear(Q, K, V), states, clouds, theta))
            seen = [tokens.velocity("linear", (Q, K, V), clouds[:i + 1].reshape(-1, 2), (theta[:i + 1, None] * weights).ravel() / theta[:i + 1].sum(),
                                    queries=clouds[i]) for i in range(len(theta))]
            check.below("linear: distance from quadrature tokens", np.sqrt((weights * ((linear - seen) ** 2).sum(-1)).sum(-1)), 1e-14)
