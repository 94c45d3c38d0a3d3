"""Exact ACVI at fixed mu: what its map is, and what its iterates satisfy."""

from __future__ import annotations

import numpy as np

from theorylab.acvi.claims._programs import DERIVED, LARGE, P1, P2, ROUND_OFF, SMALL, STARTS, Case, exact, literal, x_step
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check

FAST, FULL = {"cases": SMALL, "steps": 3000}, {"cases": LARGE, "steps": 3000}

@claim("acvi.multiplier-identity", source=f"{DERIVED}, for Algorithm 1 of {P1}",
       statement=r"$\lambda_{k+1} = \nabla B_\mu(y_{k+1})$ from any start; on $y \ge 0$ this is $\lambda_i y_i = -\mu$ for every i and k.",
       fast=FAST, full=FULL)
def _(check: Check, cases: tuple[Case, ...], steps: int) -> None:
    for run in exact(cases, steps)[::STARTS]:
        path, mu = run.path, run.problem.mu
        check.below(f"{run.label}: |lambda y + mu| / mu", np.abs(path.lam[1:] * path.y[1:] + mu) / mu, 1e-8)


@claim("acvi.douglas-rachford", source=f"{DERIVED}, for Algorithm 1 of {P1}",
       statement=r"With $v = y + \lambda/\beta$ Algorithm 1 at fixed $\mu$ is $v_{k+1} = v_k + J(2\,\mathrm{prox}(v_k) - v_k) - \mathrm{prox}(v_k)$ "
                 r"for $k \ge 1$, J the x-step; this map T is firmly nonexpansive: $|Tu - Tv|^2 + |(u - Tu) - (v - Tv)|^2 \le |u - v|^2$.",
       fast=FAST, full=FULL)
def _(check: Check, cases: tuple[Case, ...], steps: int) -> None:
    runs = exact(cases, steps)
    for run, other in zip(runs[::STARTS], runs[1::STARTS], strict=True):
        p, printed, (R, r) = run.problem, literal(run.problem, steps), x_step(run.problem)
        y, v = printed.y[1:], printed.y[1:] + printed.lam[1:] / p.beta                      # y = prox(v) after every y-step
        step = v + (2 * y - v) @ R.T + r - y
        check.below(f"{run.label}: Algorithm 1 as printed against the recursion", np.abs(step[:-1] - v[1:]), 1.3e-13)
        apart = np.abs(run.path.y - printed.y).max() / np.abs(v).max()
        check.below(f"{run.label}: Algorithm 1 as printed against the package, over |v|", apart, 1e-12)
        u, v = (each.path.y[1:] + each.path.lam[1:] / p.beta for each in (run, other))
        moved = np.diff(u, axis=0) - np.diff(v, axis=0)
        apart = np.sum((u - v) ** 2, 1)
        check.below(f"{run.label}: firm nonexpansiveness between two orbits, excess", np.diff(apart) + np.sum(moved**2, 1), ROUND_OFF)


@claim("acvi.fejer", source=DERIVED,
       statement=r"With $V_k = \beta|y_k - x^\mu|^2 + |\lambda_k - \lambda^\mu|^2/\beta$: $V_{k+1} \le V_k - \beta|x_{k+1} - y_k|^2$ for every k and "
                 r"every start.",
       fast=FAST, full=FULL)
def _(check: Check, cases: tuple[Case, ...], steps: int) -> None:
    for i, run in enumerate(exact(cases, steps)):
        fall = run.problem.beta * np.sum((run.path.x[1:] - run.path.y[:-1]) ** 2, 1)
        check.below(f"{run.label}, start {i % STARTS + 1}: excess", np.diff(run.V) + fall, ROUND_OFF)


@claim("acvi.monotone-residual", source=f"{DERIVED}; implies the consensus rate of {P2}, theorem on ACVI",
       statement=r"For $k \ge 1$ the squared move $W_k = \beta|y_{k+1} - y_k|^2 + |\lambda_{k+1} - \lambda_k|^2/\beta$ and $|x_{k+1} - y_k|$ do not "
                 r"increase, and $W_K \le V_1/K$; so $|x_{K+1} - y_{K+1}|, |y_{K+1} - y_K| \le \sqrt{V_1/(\beta K)}$ at the last iterate, without "
                 r"Lipschitz constant.",
       fast=FAST, full=FULL)
def _(check: Check, cases: tuple[Case, ...], steps: int) -> None:
    for run in exact(cases, steps)[::STARTS]:
        path, beta, k = run.path, run.problem.beta, np.arange(1, steps)
        near = np.linalg.norm(path.x[2:] - path.y[1:-1], axis=1)
        check.below(f"{run.label}: increase of W", np.diff(run.W[1:]), ROUND_OFF)
        check.below(f"{run.label}: increase of |x_k+1 - y_k|", np.diff(near), 1e-13 * near[0])
        check.below(f"{run.label}: K W_K / V_1", k * run.W[1:] / run.V[1], 1)
        worst = np.maximum(np.linalg.norm(path.x[2:] - path.y[2:], axis=1), np.linalg.norm(np.diff(path.y[1:], axis=0), axis=1))
        check.below(f"{run.label}: the larger of both norms over its bound", worst / np.sqrt(run.V[1] / (beta * k)), 1)
        check.below(f"{run.label}: beta |x_K+1 - y_K|^2 (K + 1) / V_0", beta * near**2 * (k + 1) / run.V[0], 1)
