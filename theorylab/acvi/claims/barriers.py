"""The barrier: how far it moves the solution, which solution it selects, and which gradient steps it survives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi.acvi import ACVI, ProjectedACVI
from theorylab.acvi.barriers import Barrier, EntropyBarrier, LogBarrier, MuSchedule
from theorylab.acvi.claims._programs import DERIVED, P2, SMALL, STARTS, Case, exact, gaps, normal, trace
from theorylab.acvi.constraints import Ball, Box, HalfSpace, Nonnegative
from theorylab.acvi.games import constrained_bilinear
from theorylab.acvi.merit import central_path
from theorylab.acvi.problem import MatrixGame
from theorylab.core.keys import stream
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check


@claim("acvi.central-path-gap", source=DERIVED,
       statement=r"$G(x^\mu, C) = \mu\max_{x' \in C}\sum_i \nabla\varphi_i(x^\mu)^\top(x' - x^\mu)/(-\varphi_i(x^\mu)) \le m\mu$; on two simplices "
                 r"it is $\mu(n_1 + n_2 - 1/\max_i x_{1,i} - 1/\max_j x_{2,j})$. ACVI with fixed $\mu$ converges to $x^\mu$.",
       fast={"cases": SMALL, "steps": 3000}, full={"cases": (*SMALL, (20, 30, 1e-3, 0.2), (20, 30, 1e-5, 1.0)), "steps": 3000})
def _(check: Check, cases: tuple[Case, ...], steps: int) -> None:
    for run in exact(cases, steps)[::STARTS]:
        p, x = run.problem, run.x
        tops = sum(1 / x[row > 0].max() for row in p.C)
        gap = gaps(p, x)
        check.equal(f"{run.label}: gap of the central path", gap, p.mu * (len(x) - tops), 1e-12)
        check.below(f"{run.label}: gap / (m mu)", gap / (len(x) * p.mu), 1)
        if np.linalg.norm(np.diff(run.path.y[-2:], axis=0)) < 1e-15:
            check.below(f"{run.label}: distance of the converged run to the central path", np.linalg.norm(run.path.y[-1] - x), 1e-12)
    square, mus = constrained_bilinear(), np.array([10.0, 1.0, 1e-1, 1e-2, 1e-4, 1e-6])
    points = np.asarray(central_path(square, mus))
    force = points @ np.asarray(square.matrix).T
    lower, upper = points + 0.4, 2.4 - points                                                # the two slacks of the square [-0.4, 2.4]^2
    gap = np.sum(np.maximum(force * lower, -force * upper), 1)
    pull = 1 / upper - 1 / lower
    check.equal("square: gap of the central path / mu", gap / mus, np.sum(np.maximum(pull * upper, -pull * lower), 1), 1e-9)
    check.below("square: gap / (m mu)", gap / (4 * mus), 1)


@jax.jit(static_argnames=("barrier", "steps"))
def _ends(A: Any, mu: Any, beta: Any, y: Any, barrier: type[Barrier], steps: int) -> jax.Array:
    one = lambda mu, y: trace(MatrixGame(A), ACVI(beta, mu, barrier()), y, jnp.zeros_like(y), steps)[1][-1]  # noqa: E731
    return jax.vmap(one)(mu, y)


def _softmax(a: np.ndarray) -> np.ndarray:
    weights = np.exp(a - a.max())
    return weights / weights.sum()


@claim("acvi.quantal-response", source=DERIVED,
       statement=r"With the entropy as barrier the fixed point of ACVI on a matrix game is the logit quantal response "
                 r"$x_1 = \mathrm{softmax}(-Ax_2/\mu)$, $x_2 = \mathrm{softmax}(A^\top x_1/\mu)$, with gap at most $\mu(\log n_1 + \log n_2)$.",
       fast={"shape": (5, 7), "mus": (1.0, 0.3, 0.1), "steps": 3000}, full={"shape": (20, 30), "mus": (1.0, 0.3, 0.1, 0.03), "steps": 20_000})
def _(check: Check, shape: tuple[int, int], mus: tuple[float, ...], steps: int) -> None:
    A, (n1, n2) = normal(5, "quantal", *shape), shape
    starts = np.tile(np.repeat(1 / np.array(shape), shape), (len(mus), 1))
    for mu, y in zip(mus, np.asarray(_ends(A, jnp.array(mus), jnp.asarray(1.0), starts, EntropyBarrier, steps)), strict=True):
        x1, x2 = np.split(y, [n1])
        away = np.concatenate([x1 - _softmax(-A @ x2 / mu), x2 - _softmax(A.T @ x1 / mu)])
        check.below(f"mu {mu:g}: distance to the softmax of the payments", np.abs(away), 1e-12)
        check.below(f"mu {mu:g}: gap / (mu (log n1 + log n2))", ((A.T @ x1).max() - (A @ x2).min()) / (mu * np.log(n1 * n2)), 1)


@claim("acvi.prox-near-projection", source=f"{DERIVED}; why P-ACVI of {P2} is the limit of ACVI",
       statement=r"$|\mathrm{prox}_{t B}(v) - \Pi(v)| \le \sqrt{mt}$ for the log barrier with m terms, with equality at v = 0 on the half-line; so a "
                 r"step of ACVI is within $\sqrt{m\mu/\beta}$ of one of P-ACVI.",
       fast={"count": 2000}, full={"count": 200_000})
def _(check: Check, count: int) -> None:
    t = 10 ** np.asarray(jax.random.uniform(stream(0, "t"), (count,), minval=-12.0, maxval=1.0))
    v = normal(0, "v", count, 3) * 10 ** np.asarray(jax.random.uniform(stream(0, "size"), (count, 1), minval=-3.0, maxval=2.0))
    sets = {"half-line": (Nonnegative(), 1), "interval": (Box(-1.0, 0.5), 1), "halfspace": (HalfSpace(np.array([1.0, -2.0, 0.5]), 0.3), 3),
            "ball": (Ball(0.0, 1.3), 3)}
    for name, (K, dim) in sets.items():
        apart = jax.jit(jax.vmap(lambda v, t, K=K: jnp.linalg.norm(K.prox(v, t) - K.project(v))))(v[:, :dim], t)
        terms = K.barrier_terms(dim)
        check.below(f"{name}: |prox - projection| / sqrt(m t), m = {terms}", np.asarray(apart) / np.sqrt(terms * t), 1 + 1e-12)
    check.equal("half-line at v = 0: the same ratio", np.asarray(Nonnegative().prox(jnp.zeros(count), t)) / np.sqrt(t), 1.0, 1e-12)


ROCK = np.array([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]])
MUS = [1e-2, 1e-3, 1e-4, 1e-6]
CORNER = np.array([1.0, 0, 0, 0, 1, 0, 0])


def _weights(share: float) -> tuple[float, ...]:
    """Weights of the fourth row, share row1 + (1 - share) row2, at the analytic centre and at the largest entropy of the equilibria."""
    from scipy.optimize import root_scalar

    a, b = share, 1 - share                                                                  # rows one and two then weigh 1/3 - a s and 1/3 - b s
    conditions = (lambda s: 1 / s - a / (1 / 3 - a * s) - b / (1 / 3 - b * s),
                  lambda s: np.log(s) - a * np.log(1 / 3 - a * s) - b * np.log(1 / 3 - b * s))
    return tuple(root_scalar(slope, bracket=(1e-9, 1 / (3 * a) - 1e-9), xtol=1e-16).root for slope in conditions)


@jax.jit(static_argnames=("method", "steps"))
def _selected(A: Any, beta: Any, mu: Any, y: Any, method: type, steps: int) -> jax.Array:
    def one(beta: Any, y: Any) -> jax.Array:
        made = method(beta) if mu is None else method(beta, mu)
        return trace(MatrixGame(A), made, y, jnp.zeros_like(y), steps)[1][-1]

    return jax.vmap(one)(beta, y)


@claim("acvi.equilibrium-selection", source=DERIVED,
       statement=r"As $\mu \to 0$ the central path tends to the analytic centre of the solutions (to the one of largest entropy with the entropy "
                 r"barrier), and ACVI goes there from every start; P-ACVI ends where its start leads it.",
       fast={"stages": 44, "inner": 100, "steps": 3000}, full={"stages": 44, "inner": 400, "steps": 20_000})
def _(check: Check, stages: int, inner: int, steps: int) -> None:
    A = np.vstack([ROCK, (ROCK[0] + ROCK[1]) / 2])
    uniform, mixed = np.repeat([1 / 4, 1 / 3], [4, 3]), np.asarray(jax.random.uniform(stream(0, "mixed"), (7,)))
    starts = np.stack([CORNER, uniform, mixed])
    schedule = MuSchedule(0.1, 0.5, stages, inner)
    centred = np.asarray(_selected(A, jnp.full(3, 0.5), schedule, starts, ACVI, (stages + 1) * inner))[:, :4]
    check.equal("ACVI: row strategies from three starts", centred, np.array([2 / 9, 2 / 9, 1 / 3, 2 / 9]), 1e-12)
    starts = np.stack([CORNER, CORNER, uniform])
    projected = np.asarray(_selected(A, jnp.array([0.5, 1.0, 0.5]), None, starts, ProjectedACVI, steps))[:, :4]
    for label, found, expected in zip(("beta 0.5 from a corner", "beta 1 from a corner", "beta 0.5 from the centre"), projected,
                                      ((0.32423884, 0.32423884, 1 / 3, 0.01818898), (0.31765857, 0.31765857, 1 / 3, 0.03134953),
                                       (2 / 9, 2 / 9, 1 / 3, 2 / 9)), strict=True):
        check.equal(f"P-ACVI, {label}: row strategy", found, np.array(expected), 1e-8)
    skewed = MatrixGame(np.vstack([ROCK, 0.75 * ROCK[0] + 0.25 * ROCK[1]]))
    expected = {"log": 0.20062943539784, "entropy": 0.20263726458926}
    for (barrier, value), formula in zip(expected.items(), _weights(0.75), strict=True):
        rows = np.asarray(central_path(skewed, MUS, barrier=barrier))[:, :4]
        check.equal(f"{barrier} barrier: weight of the fourth row at the smallest mu", rows[-1, 3], value, 1e-11)
        check.equal(f"{barrier} barrier: its limit by a scalar equation", formula, value, 1e-13)
        check.equal(f"{barrier} barrier: the first two weights", rows[-1, :2], 1 / 3 - np.array([0.75, 0.25]) * rows[-1, 3], 1e-11)
        check.slope(f"{barrier} barrier: order of the distance to the limit in mu", MUS[:3], np.abs(rows[:3, 3] - formula), expected=2.0, tol=0.05)


@claim("acvi.safe-barrier-step", source=f"{DERIVED}, for the inexact y-step of {P2}",
       statement=r"The gradient step $y - \eta(\beta(y - v) - \mu/y)$ stays positive for every $y > 0$ iff "
                 r"$v > -\frac2\beta\sqrt{\mu(1 - \eta\beta)/\eta}$.",
       fast={"count": 20_000}, full={"count": 2_000_000})
def _(check: Check, count: int) -> None:
    draw = lambda name, low, high: np.asarray(jax.random.uniform(stream(0, name), (count,), minval=low, maxval=high))  # noqa: E731
    beta, mu, y = 10 ** draw("beta", -2.0, 2.0), 10 ** draw("mu", -8.0, 1.0), 10 ** draw("y", -8.0, 2.0)
    eta = draw("eta", 0.001, 0.999) / beta
    edge = -2 / beta * np.sqrt(mu * (1 - eta * beta) / eta)
    worst = np.sqrt(eta * mu / (1 - eta * beta))

    def step(y: np.ndarray, v: np.ndarray) -> np.ndarray:
        slope = np.asarray(LogBarrier().gradient(Nonnegative(), jnp.asarray(y), jnp.asarray(mu)))
        return y - eta * (beta * (y - v) + slope)

    above, below = edge + np.abs(edge) * 10 ** draw("above", -9.0, 1.0), edge * (1 + 1e-9)
    check.equal("steps above the edge that leave, from any y", int(np.sum(step(y, above) <= 0)), 0, 0)
    check.equal("steps above the edge that leave, from the worst y", int(np.sum(step(worst, above) <= 0)), 0, 0)
    check.equal("steps beyond the edge that stay, from the worst y", int(np.sum(step(worst, below) > 0)), 0, 0)
