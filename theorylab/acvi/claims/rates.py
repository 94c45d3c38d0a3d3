"""Rates: where the slow one is attained, linear ones, those of inexact steps, and those of the anchored and restarted form."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi.acvi import ACVI, ProjectedACVI
from theorylab.acvi.baselines import Extragradient, GradientDescentAscent
from theorylab.acvi.claims._programs import DERIVED, KEY, P1, P2, normal, trace
from theorylab.acvi.constraints import Box
from theorylab.acvi.games import matrix_game, rotations
from theorylab.acvi.inexact import InexactProjectedACVI
from theorylab.acvi.problem import AffineVariationalInequality, MatrixGame
from theorylab.acvi.resolvent import Solved
from theorylab.acvi.restarted import HalpernACVI
from theorylab.core.iterate import iterate
from theorylab.core.keys import stream
from theorylab.core.module import number
from theorylab.core.solution import Status
from theorylab.core.stop import Below
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.lab.rates import fit_rate

SPINNING = rotations()
"""40 rotations with speeds from 1e-4 to 1 on the box [-1, 1]^80."""


def spin_gap(x: np.ndarray) -> np.ndarray:
    """The gap of the rotations at points in the box, from its definition: F is skew, so it is the sum of |F|."""
    return np.abs(x @ np.asarray(SPINNING.matrix).T).sum(-1)


def slope(values: np.ndarray, low: int, high: int) -> float:
    """The slope of log values[k - 1] against log k over all whole k from low to high."""
    k = np.arange(low, high + 1)
    return fit_rate(k, values[k - 1]).slope


@cache
def spin(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Iterates x and y of P-ACVI on the rotations from their start, index 0 included."""
    run = jax.jit(lambda y: trace(SPINNING, ProjectedACVI(1.0), y, jnp.zeros_like(y), steps))
    x, y, _ = map(np.asarray, run(SPINNING.x0))
    return np.vstack([SPINNING.x0, x]), np.vstack([SPINNING.x0, y])


@claim("acvi.rate-is-attained", source=f"{DERIVED}; the last-iterate rate of {P1} and {P2} cannot be improved",
       statement=r"On 40 rotations with speeds from $10^{-4}$ to 1 and $\beta = 1$ the gap and $|x_k - y_{k-1}|$ of P-ACVI fall as $k^{-1/2}$; on "
                 r"one rotation with speed $\beta/\sqrt K$ $\sqrt K|x_K - x_{K-1}|/|x_0| = (1 + 1/K)^{-K/2} \to e^{-1/2}$.",
       fast={"steps": 10_000}, full={"steps": 10_000})
def _(check: Check, steps: int) -> None:
    x, y = spin(steps)
    gap, near = spin_gap(x), np.linalg.norm(x[1:] - y[:-1], axis=1)
    average = np.cumsum(x[1:], axis=0) / np.arange(1, steps + 1)[:, None]
    check.equal("slope of the gap", slope(gap[1:], 30, steps), -0.503, 1e-3)
    check.equal("slope of |x_k - y_k-1|", slope(near, 30, steps), -0.501, 1e-3)
    check.equal("slope of the gap of the average", slope(spin_gap(average), 30, steps), -0.91, 5e-3)
    at = np.array([10, 100, 1000, 10_000])
    check.equal("gap times the root of k, at 10 to 10^4", gap[at] * np.sqrt(at), np.array([3.63, 3.36, 3.57, 3.45]), 0.005)
    check.below("|x_k - y_k|, since no iterate leaves the box", np.linalg.norm(x - y, axis=1), 1e-15)
    turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    one = lambda w, y: trace(AffineVariationalInequality(w * turn, None, Box(-1.0, 1.0)), ProjectedACVI(1.0), y, jnp.zeros(2), steps)[0]  # noqa: E731
    single = np.asarray(jax.jit(jax.vmap(one, in_axes=(0, None)))(at**-0.5, jnp.array([0.5, 0.0])))
    moved = np.array([np.linalg.norm(path[K - 1] - path[K - 2]) for K, path in zip(at, single, strict=True)])
    check.equal("one rotation: constants at K = 10 to 10^4", np.sqrt(at) * moved / 0.5, np.array([0.6209, 0.6080, 0.6067, 0.6065]), 5e-5)
    check.equal("one rotation: the same by the formula", np.sqrt(at) * moved / 0.5, (1 + 1 / at) ** (-at / 2), 1e-9)


@jax.jit(static_argnames=("projected", "steps"))
def _linear(M: Any, q: Any, beta: Any, y: Any, projected: bool, steps: int) -> jax.Array:
    def one(M: Any, q: Any, beta: Any, y: Any) -> jax.Array:
        method = ProjectedACVI(beta) if projected else ACVI(beta, 1e-3)
        _, y, lam = trace(AffineVariationalInequality(M, q, Box(-0.5, 0.5)), method, y, jnp.zeros_like(y), steps)
        return y + lam / beta

    return jax.vmap(one)(M, q, beta, y)


def _rho(sigma: np.ndarray, lipschitz: np.ndarray, beta: np.ndarray) -> np.ndarray:
    g = 1 / beta
    return 0.5 + 0.5 * np.sqrt(1 - 4 * g * sigma / (1 + 2 * g * sigma + (g * lipschitz) ** 2))


@claim("acvi.linear-rate", source=DERIVED,
       statement=r"Without equalities, for $\sigma$-strongly monotone, L-Lipschitz F and any convex y-term "
                 r"$|v_{k+1} - v^*| \le \rho|v_k - v^*|$ with $\rho = \frac12 + \frac12\sqrt{1 - 4g\sigma/(1 + 2g\sigma + g^2L^2)}$, $g = 1/\beta$; "
                 r"it is tight for $F = \sigma I$ and least at $\beta = L$.",
       fast={"count": 20, "steps": 700}, full={"count": 200, "steps": 3000})
def _(check: Check, count: int, steps: int) -> None:
    n = 6
    draws = 10 ** np.asarray(jax.random.uniform(stream(0, "linear rate"), (3, 50 * count), minval=-1.0, maxval=1.0))
    rates = _rho(draws[0], np.hypot(*draws[:2]), draws[2])
    sigma, turn, beta = draws[:, rates**steps < 1e-12][:, :count]                            # so that the last iterate is the fixed point
    S = normal(0, "skew", count, n, n)
    S = S - np.swapaxes(S, 1, 2)
    S *= (turn / np.linalg.norm(S, 2, axis=(1, 2)))[:, None, None]
    M, q, y = sigma[:, None, None] * np.eye(n) + S, normal(0, "q", count, n), np.clip(normal(0, "y", count, n), -0.4, 0.4)
    rho = _rho(sigma, np.hypot(sigma, turn), beta)
    for projected, label in ((True, "projection on a box"), (False, "barrier of a box, mu 1e-3")):
        v = np.asarray(_linear(M, q, beta, y, projected, steps))
        away = np.linalg.norm(v - v[:, -1:], axis=2)
        live = away[:, :-1] > 1e-7
        check.below(f"{label}: |v_k+1 - v*| / (rho |v_k - v*|)", (away[:, 1:] / rho[:, None] / np.maximum(away[:, :-1], 1e-300))[live], 1 + 1e-6)
    # F = sigma I: the map contracts by 1/(1 + g sigma) where y = v and by g sigma/(1 + g sigma) where y is held
    ratio = np.array([1.0, 0.5, 3.0, 0.1])
    M, held = np.resize(ratio, count)[:, None, None] * np.eye(n), np.where(np.resize(ratio, count) > 1, 1e3, 0.0)[:, None] * np.ones(n)
    v = np.asarray(_linear(M, held, np.ones(count), np.full((count, n), 0.3), True, steps))
    away = np.linalg.norm(v - v[:, -1:], axis=2)
    check.equal("F = sigma I: contraction of the second step", (away[:, 1] / away[:, 0])[:4], _rho(ratio, ratio, np.ones(4)), 1e-9)
    check.equal("F = sigma I: rho for sigma / beta = 1, 1/2, 3, 1/10", _rho(ratio, ratio, np.ones(4)), np.array([0.5, 0.6667, 0.75, 0.9091]), 5e-5)
    lipschitz, betas = np.hypot(sigma, turn), np.geomspace(1e-3, 1e3, 601)
    least = _rho(sigma[:, None], lipschitz[:, None], betas).min(1)
    check.below("rho at beta = L, less its least value over beta", _rho(sigma, lipschitz, lipschitz) - least, 1e-15)


class Disturbed(ProjectedACVI):
    """P-ACVI with an error of norm $k^{-p}$ and random direction in the x-step number k."""

    decay: Any = number(1.0)

    def _root(self, problem: Any, state: Any, key: jax.Array) -> Solved:
        solved = super()._root(problem, state, key)
        error = jax.random.normal(key, solved.x.shape)
        k = (state.step + 1).astype(error.dtype)
        return solved._replace(x=solved.x + error / (jnp.linalg.norm(error) * k**self.decay))


@jax.jit(static_argnames="steps")
def _disturbed(decay: Any, keys: Any, steps: int) -> jax.Array:
    one = lambda p, key: trace(SPINNING, Disturbed(1.0, decay=p), SPINNING.x0, jnp.zeros(80), steps, key)[0]  # noqa: E731
    return _box_gap(jax.vmap(one)(decay, keys))


@jax.jit(static_argnames=("inner", "steps"))
def _inner(inner: Any, counts: Any, sizes: Any, steps: int) -> jax.Array:
    one = lambda count, eta: trace(SPINNING, InexactProjectedACVI(1.0, inner(eta), count), SPINNING.x0, jnp.zeros(80), steps)[0]  # noqa: E731
    return _box_gap(jax.vmap(one)(counts, sizes))


def _box_gap(x: jax.Array) -> jax.Array:
    """The gap over the box, also outside it: F is skew, so <F(x), x> = 0."""
    return jnp.sum(jnp.abs(x @ SPINNING.matrix.T), axis=-1)


EXPECTED = {(10, 0.3): -0.502, (20, 0.05): -0.501, (10, 0.05): -0.495}
"""Slopes over [100, 20000] for counts and sizes of gradient steps."""


@claim("acvi.inexact-rate", source=f"{P2}, theorem on inexact ACVI; {DERIVED}",
       statement=r"Errors of size $k^{-p}$, $p \ge 1$, in the x-steps keep the rate $k^{-1/2}$ of the last iterate, and so do enough warm-started "
                 r"gradient steps; 1 or 3 of them do not converge on rotations, one extragradient step does.",
       fast={"steps": 3000, "decays": (1.0, 1.5), "seeds": 1, "gradient": ((10, 0.3), (1, 0.3), (3, 0.3))},
       full={"steps": 20_000, "decays": (0.5, 1.0, 1.5, 2.0), "seeds": 7, "gradient": (*EXPECTED, (1, 0.05), (1, 0.3), (3, 0.05), (3, 0.3))})
def _(check: Check, steps: int, decays: tuple[float, ...], seeds: int, gradient: tuple[tuple[int, float], ...]) -> None:
    complete = steps == 20_000
    exact = spin_gap(spin(max(steps, 10_000))[0])[1:]
    check.equal("exact steps: slope of the gap", slope(exact, 100, steps), -0.503, 1e-3 if complete else 0.02)
    lanes = [(p, seed) for p in decays for seed in range(seeds)]
    keys = jax.vmap(lambda s: jax.random.fold_in(KEY, s))(jnp.array([seed for _, seed in lanes]))
    found = np.array([slope(gap, 100, steps) for gap in np.asarray(_disturbed(jnp.array([p for p, _ in lanes]), keys, steps))])
    for p, slopes in zip(decays, found.reshape(len(decays), seeds), strict=True):
        low, high = (-0.6, -0.42) if p >= 1 else (-0.5, -0.39)
        check.between(f"errors k^-{p:g}: slope of the gap", slopes, low, high, note=f"from {slopes.min():.3f} to {slopes.max():.3f}")
    counts, sizes = (jnp.array(column) for column in zip(*gradient, strict=True))
    for (count, size), gap in zip(gradient, np.asarray(_inner(GradientDescentAscent, counts, sizes, steps)), strict=True):
        label = f"gradient steps, {count} of {size:g}"
        if count >= 10:
            check.equal(f"{label}: slope of the gap", slope(gap, 100, steps), EXPECTED[count, size], 1e-3 if complete else 0.02)
            if complete and (count, size) == (10, 0.3):
                check.equal(f"{label}: last gap, and that of exact steps", np.array([gap[-1], exact[-1]]), np.array([0.0271, 0.0243]), 5e-5)
        else:
            check.between(f"{label}: last gap", gap[-1], 5.4 if complete else 1.0, 6.4 if complete else 40.0)
    gap = np.asarray(_inner(Extragradient, jnp.array([1]), jnp.array([0.3]), steps))[0]
    check.equal("extragradient steps, 1 of 0.3: slope of the gap", slope(gap, 100, steps), -0.501, 1e-3 if complete else 0.02)
    if complete:
        check.equal("extragradient steps, 1 of 0.3: last gap", gap[-1], 0.063, 5e-4)


def _halpern(steps: int) -> np.ndarray:
    """The residuals |v_k - T v_k| of the Halpern iteration of T itself on the rotations, a pair of coordinates as a complex number."""
    speed, start = np.geomspace(1e-4, 1.0, 40), np.full(40, 0.5 + 0j)
    v, out = start, []
    for k in range(steps):
        y = np.clip(np.real(v), -1, 1) + 1j * np.clip(np.imag(v), -1, 1)
        after = v + (2 * y - v) / (1 - 1j * speed) - y
        out.append(np.linalg.norm(after - v))
        v = start / (k + 2) + (k + 1) / (k + 2) * after
    return np.array(out)


@claim("acvi.anchored-rate", source=f"{DERIVED}; not in the papers",
       statement=r"The reflected Halpern iteration of the ACVI map T, unrestarted with fixed $\beta$, has $|v_k - Tv_k| \le |v_0 - v^*|/(k + 1)$ at "
                 r"the last iterate, on a problem where ACVI itself only has $k^{-1/2}$; the Halpern iteration of T has twice that bound.",
       fast={"steps": 20_000}, full={"steps": 20_000})
def _(check: Check, steps: int) -> None:
    sol = iterate(SPINNING, HalpernACVI(1.0, adapt=False, restart=False), steps=steps)
    residual = sol.history["difference"][1:]                                                 # row j + 1 holds |T v_j - v_j|
    bound = np.linalg.norm(SPINNING.x0) / np.arange(1, steps + 1)                              # the solution 0 is v* as well
    check.below("residual over its bound", residual / bound, 1)
    check.equal("the largest such ratio", (residual / bound).max(), 0.833, 5e-4)
    check.equal("slope of the residual over [100, 20000]", slope(residual, 100, steps), -0.97, 5e-3)
    check.equal("slope of the residual over [30, 10^4]", slope(residual, 30, 10_000), -0.95, 5e-3)
    plain = _halpern(steps)
    check.below("Halpern iteration of T itself: residual over the bound", plain / bound, 2)
    check.equal("Halpern iteration of T itself: the largest such ratio", (plain / bound).max(), 1.32, 5e-3)
    check.below("last gap of the anchored form over that of ACVI", sol.history["gap"][-1] / spin_gap(spin(steps)[0])[-1], 0.05)


@jax.jit(static_argnames=("method", "steps"))
def _counts(A: Any, beta: Any, tolerance: Any, method: Any, steps: int) -> tuple[jax.Array, ...]:
    def one(A: Any, beta: Any, tolerance: Any) -> tuple[jax.Array, ...]:
        sol = iterate(MatrixGame(A), method(beta), steps=steps, every=10, stop=Below("gap", tolerance), keep="last")
        return sol.steps, sol.status, sol.history["penalty"][-1]

    return jax.vmap(one)(A, beta, tolerance)


PLAIN = np.array([0.1, 0.3, 1.0])


def _count(A: np.ndarray, betas: np.ndarray, tolerance: float, method: Any, steps: int) -> np.ndarray:
    """Steps of a method on one game until its gap is below `tolerance`, for several penalties."""
    return np.asarray(_counts(np.tile(A, (len(betas), 1, 1)), betas, np.full(len(betas), tolerance), method, steps)[0])


def _adaptive(beta: Any) -> HalpernACVI:
    return HalpernACVI(beta)


def _fixed(beta: Any) -> HalpernACVI:
    return HalpernACVI(beta, adapt=False)


def _unrestarted(beta: Any) -> HalpernACVI:
    return HalpernACVI(beta, adapt=False, restart=False)


@claim("acvi.restarts", source=f"{DERIVED}; not in the papers",
       statement=r"On Gaussian games the restarted anchored form reaches a gap of $10^{-6}$ in a tenth of the steps of ACVI at the best $\beta$ "
                 r"(median), and unrestarted it is usually slower than ACVI. The self-tuned penalty ends between 0.2 and 0.6 of the norm of F, makes "
                 r"the count independent of the first $\beta$ up to a factor 2, and does not see the scale of the game.",
       fast={"size": 50, "games": 1, "steps": 10_000, "complete": False}, full={"size": 50, "games": 8, "steps": 40_000, "complete": True})
def _(check: Check, size: int, games: int, steps: int, complete: bool) -> None:
    factors, scales = np.array([0.01, 0.3, 1.0, 10.0, 100.0, 1.0, 1.0]), np.array([1.0] * 5 + [1e2, 1e-2])
    gains, spreads, bare = [], [], []
    for seed in range(games):
        A = np.asarray(matrix_game(rows=size, key=seed).A)
        L = np.linalg.norm(A - A.mean(0) - A.mean(1, keepdims=True) + A.mean(), 2)
        count, status, penalty = map(np.asarray, _counts(scales[:, None, None] * A, factors * scales * L, 1e-6 * scales, _adaptive, steps))
        check.true(f"game {seed}: every self-tuned run reaches the goal", status == Status.CONVERGED)
        check.below(f"game {seed}: largest over smallest count from beta/L between 0.01 and 100", count[:5].max() / count[:5].min(), 2,
                    note=f"counts {count[:5].tolist()}")
        check.equal(f"game {seed}: counts at scales 100 and 1/100", count[5:], int(count[2]), 0)
        check.between(f"game {seed}: last penalty / L", penalty / (L * scales), 0.2, 0.6)
        gains.append(_count(A, L * PLAIN, 1e-6, ProjectedACVI, steps).min() / count[2])
        if complete:
            fixed = _count(A, factors[:5] * L, 1e-6, _fixed, steps)
            spreads.append(fixed.max() / fixed.min())
            bare.append(np.divide(*(_count(A, np.array([0.3 * L]), 1e-3, method, steps)[0] for method in (_unrestarted, ProjectedACVI))))
    for label, ratios, least in (("count of ACVI at the best of three penalties over that of the self-tuned form", gains, 10),
                                 ("largest over smallest count with a fixed penalty", spreads, 10),
                                 ("unrestarted count over that of ACVI, to 1e-3 at beta = 0.3 L", bare, 1)):
        if ratios:
            check.above(f"{label}, median", float(np.median(ratios)), least, note=", ".join(f"{ratio:.2g}" for ratio in ratios))
