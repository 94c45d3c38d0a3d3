"""Clouds of bounded support: how far tokens come, how the velocity depends on token and cloud, and that no cloud blows up."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np

from theorylab.core.integrate import integrate
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.transformer_pde.attention import Softmax
from theorylab.transformer_pde.claims import _tokens as tokens
from theorylab.transformer_pde.claims._ensembles import PAPER, heads, spectral, turned
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Cloud, Gaussian, moments
from theorylab.transformer_pde.oracles import blow_up_time
from theorylab.transformer_pde.particles import Particles

TEMPERATURE = 0.7
AVERAGING = ("softmax", "l2", "masked", "sigmoid", "sinkhorn")


def _clouds(count: int, size: int, seed: int) -> np.ndarray:
    """Tokens of very different spread, so that the averages are of all kinds from flat to few tokens alone."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-1.0, 1.0, size=(count, size, 2)) * np.exp(rng.uniform(-1.5, 1.0, (count, 1, 1)))


def _milder(points: np.ndarray, form: np.ndarray, size: float) -> np.ndarray:
    """Clouds so small that no logit exceeds `size`: alternating scaling of a sharp kernel takes too long."""
    return points * np.minimum(1.0, np.sqrt(size / (spectral(form) * _norms(points).max(-1) ** 2)))[:, None, None]


def _norms(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points, axis=-1)


@claim("transformer_pde.support-growth", source=f"{PAPER}, well-posedness for compact support; constants by a companion derivation",
       statement=r"$\max_i |x_i(t)| \le e^{\|V\| t}\max_i |x_i(0)|$ for softmax, L2, masked and sigmoid attention; $e^{\|V\|t/\varepsilon}$ for "
                 r"Sinkhorn; the sum over heads for several.",
       fast={"count": 4}, full={"count": 40})
def _(check: Check, count: int) -> None:
    base, times = heads(count, seed=23), np.linspace(0.0, 1.0, 6)
    base = base.but(V=base.V / np.maximum(1.0, spectral(base.V))[:, None, None])
    clouds = _clouds(count, 24, seed=23)
    small = _milder(clouds, base.A[:, :2, :2], 0.3)
    bounds = {kind: spectral(tokens.head(base)[2]) / (TEMPERATURE if kind == "sinkhorn" else 1.0) for kind in AVERAGING}
    for kind in (*AVERAGING, "all heads"):
        used = AVERAGING if kind == "all heads" else (kind,)
        worst, start = [], small if "sinkhorn" in used else clouds
        for i in range(count):
            def field(x: np.ndarray, i: int = i, used: tuple[str, ...] = used) -> np.ndarray:
                return np.asarray(sum(tokens.velocity(name, tokens.head(base, i), x, temperature=TEMPERATURE) for name in used))

            radius = _norms(tokens.transport(field, start[i], times, 1e-9)).max(-1)
            worst.append(radius[1:] / (radius[0] * np.exp(sum(bounds[name][i] for name in used) * times[1:])))
        check.below(f"{kind}: largest radius over its bound", worst, 1 + 1e-9)


@claim("transformer_pde.lipschitz-on-compact-sets", source=f"{PAPER}, well-posedness for compact support; constants by a companion derivation",
       statement=r"For support in $B(0, R)$: $\|D_x\Gamma\| \le \|V\|\|A\|R^2$ for softmax, twice that for L2, $\varepsilon^{-2}$ of it for "
                 r"Sinkhorn and a quarter for sigmoid; softmax has $D_x\Gamma = V\operatorname{Cov}A$ with the covariance of the weights, and "
                 r"$|\Gamma_\mu(x) - \Gamma_\nu(x)| \le \|V\|(1 + 2\|A\|R^2)e^{2\|A\|R^2}W_1(\mu, \nu)$.",
       fast={"count": 300}, full={"count": 3000})
def _(check: Check, count: int) -> None:
    base = heads(count, seed=24)
    part = Q, K, V = tokens.head(base)
    A = turned(K) @ Q
    first, second = _clouds(count, 5, seed=24), _clouds(count, 5, seed=25)
    x, h = first[:, :1], 1e-5
    constants = {"softmax": 1.0, "l2": 2.0, "sinkhorn": TEMPERATURE**-2, "sigmoid": 0.25}
    for kind, constant in constants.items():
        points = _milder(first, A, 3.0) if kind == "sinkhorn" else first
        at, y = partial(tokens.velocity, kind, part, points, temperature=TEMPERATURE), points[:, :1]
        slope = np.concatenate([at(queries=y + h * e) - at(queries=y - h * e) for e in np.eye(2)], axis=1) / (2 * h)
        bound = constant * spectral(V) * spectral(A) * _norms(points).max(-1) ** 2
        check.below(f"{kind}: norm of the derivative over its bound", spectral(slope) / bound, 1.0)
        if kind == "softmax":
            logits = x @ turned(A) @ turned(first)
            weight = np.exp(logits - logits.max(-1, keepdims=True))
            weight = turned(weight / weight.sum(-1, keepdims=True))
            centered = first - (weight * first).sum(1, keepdims=True)
            exact = V @ (turned(centered) @ (weight * centered)) @ A
            check.below("softmax: derivative against V Cov A", np.abs(turned(slope) - exact) / (1 + spectral(exact)[:, None, None]), 1e-7)
    there = tokens.velocity("softmax", part, second, queries=x) - tokens.velocity("softmax", part, first, queries=x)
    size = spectral(A) * np.maximum(_norms(first), _norms(second)).max(-1) ** 2
    distance = np.array([_wasserstein(a, b) for a, b in zip(first, second, strict=True)])
    bound = spectral(V) * (1 + 2 * size) * np.exp(2 * size) * distance
    check.below("softmax: change of the velocity over its bound", _norms(there[:, 0]) / bound, 1.0)


def _wasserstein(first: np.ndarray, second: np.ndarray) -> float:
    """W_1 of clouds of equally many equal tokens: an assignment."""
    from scipy.optimize import linear_sum_assignment

    cost = _norms(first[:, None] - second[None])
    return float(cost[linear_sum_assignment(cost)].mean())


@claim("transformer_pde.stability-in-wasserstein", source=f"{PAPER}, stability estimate; constants by a companion derivation",
       statement=r"Softmax on clouds in $B(0, R)$: $W_1(\mu_t, \nu_t) \le C(t, R)\,W_1(\mu_0, \nu_0)$ with the integral over $s \le t$ of the "
                 r"two Lipschitz constants at $R_s = e^{\|V\|s}R$ as $\log C$.",
       fast={"count": 20}, full={"count": 200})
def _(check: Check, count: int) -> None:
    base, t = heads(count, seed=26), 0.5
    Q, K, V = tokens.head(base)
    a, v = spectral(turned(K) @ Q), spectral(V)
    first = _clouds(count, 6, seed=26)
    second = first + 0.1 * _clouds(count, 6, seed=27)
    radius = np.maximum(_norms(first), _norms(second)).max(-1)
    s = np.linspace(0.0, t, 201)[:, None]
    size = a * (np.exp(v * s) * radius) ** 2
    log_constant = np.trapezoid(v * size + v * (1 + 2 * size) * np.exp(np.minimum(2 * size, 700.0)), s, axis=0)
    worst = []
    for i in range(count):
        field = partial(tokens.velocity, "softmax", tokens.head(base, i))
        ends = [tokens.transport(field, start[i], [t], 1e-9)[0] for start in (first, second)]
        worst.append(np.log(_wasserstein(*ends) / _wasserstein(first[i], second[i])) - log_constant[i])
    check.below("logarithm of the growth of the distance minus its bound", worst, 0.0)


@claim("transformer_pde.finite-clouds-never-blow-up", source=f"{PAPER}, well-posedness for compact support",
       statement=r"A finite cloud outlives the blow-up $t^* = 1/2$ of its Gaussian limit ($V = A = \Sigma_0 = I$) and falls behind it before.",
       fast={"tokens": 200, "tol": None}, full={"tokens": 2000, "tol": 0.1})
def _(check: Check, tokens: int, tol: float | None) -> None:
    head, start = Softmax(jnp.eye(2), jnp.eye(2), 1.0), Gaussian.standard(2)
    check.equal("blow-up time of the Gaussian", blow_up_time(GaussianFlow(head), start), 0.5, 1e-14)
    cloud = start.sample(tokens, key=0)
    root = np.linalg.cholesky(np.linalg.inv(np.asarray(moments(cloud).cov)))
    white = Cloud((cloud.points - cloud.points.mean(0)) @ root)
    times = np.array([0.0, 0.2, 0.3, 0.45, 0.5, 1.0])
    sol = integrate(Particles(head), white, times, rtol=1e-6)
    points = np.asarray(sol.value.points)
    check.true("all tokens are finite at twice the blow-up time", np.isfinite(points).all())
    radius = _norms(points).max(1)
    check.below("largest radius over its bound", radius[1:] / (radius[0] * np.exp(times[1:])), 1 + 1e-9)
    size = np.trace(np.asarray(moments(sol.value).cov), axis1=1, axis2=2)
    check.below("trace over that of the Gaussian at t = 0.2, 0.3, 0.45", size[1:4] * (1 - 2 * times[1:4]) / 2, 1.0,
                note="traces " + ", ".join(f"{s:.3g}" for s in size[1:]))
    if tol is not None:
        check.equal("trace at t = 0.2, 0.3, 0.45, 0.5 against another sample", size[1:5], np.array([3.10, 4.04, 6.35, 7.45]), tol, relative=True)
