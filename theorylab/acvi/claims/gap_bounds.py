"""Bounds of the gap along exact and inexact runs: certificates, rates of the last iterate and of the average, distances."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi.baselines import GradientDescentAscent
from theorylab.acvi.claims._programs import (
    DERIVED,
    LARGE,
    P1,
    P2,
    ROUND_OFF,
    SMALL,
    STARTS,
    Case,
    Path,
    Problem,
    Run,
    centres,
    exact,
    follow,
    game,
    gaps,
    reach,
    simplex_problem,
    trace,
)
from theorylab.acvi.inexact import InexactACVI
from theorylab.acvi.merit import certificate, gap
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check

FAST, FULL = {"cases": SMALL, "steps": 3000}, {"cases": LARGE, "steps": 3000}


def _certified(p: Problem, path: Path, mu: float, e_x: np.ndarray | None = None, e_y: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Gap, certificate and sharp certificate of the iterates 1, ..., K, by the package."""
    none = np.zeros_like(path.x[1:])
    args = (path.x[1:], path.y[1:], path.lam[1:], p.beta * np.diff(path.y, axis=0), none if e_x is None else e_x, none if e_y is None else e_y)
    return tuple(map(np.asarray, _certify(p.M, p.q, jnp.asarray(mu), *args, sizes=tuple(p.C.sum(1).astype(int).tolist()))))


@jax.jit(static_argnames="sizes")
def _certify(M: Any, q: Any, mu: Any, *points: Any, sizes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    problem = simplex_problem(M, q, sizes)

    def one(x: Any, y: Any, lam: Any, change: Any, e_x: Any, e_y: Any) -> tuple[jax.Array, ...]:
        bounds = [certificate(problem, x, y, lam, change, mu=mu, x_error=e_x, y_error=e_y, sharp=sharp).bound for sharp in (False, True)]
        return gap(problem, x), *bounds

    return jax.vmap(one)(*points)


@cache
def _projected(cases: tuple[Case, ...], steps: int, seed: int = 0) -> tuple[Run, ...]:
    """Runs of P-ACVI on the games of the cases; the fixed point is an equilibrium from linear programs, with its slacks."""
    runs: list[Run] = []
    for shape in dict.fromkeys(case[:2] for case in cases):
        problems = [game(case, seed)._replace(mu=np.zeros(())) for case in cases if case[:2] == shape]
        for problem, path in zip(problems, follow(problems, steps, projected=True), strict=True):
            x = equilibrium(problem)
            force = problem.M @ x
            runs.append(Run(problem, path, x, -(force - problem.C.T @ _lowest(problem, force))))
    return tuple(runs)


def equilibrium(p: Problem) -> np.ndarray:
    """An equilibrium of a game, by HiGHS."""
    from scipy.optimize import linprog

    n1 = int(p.C[0].sum())
    A = p.M[:n1, n1:]
    strategies = []
    for payments in (A, -A.T):
        rows, columns = payments.shape
        most, total = np.append(np.zeros(rows), 1.0), np.append(np.ones(rows), 0.0)[None]
        program = linprog(most, np.c_[payments.T, -np.ones(columns)], np.zeros(columns), total, [1.0], bounds=[(0, None)] * rows + [(None, None)])
        strategies.append(program.x[:-1])
    return np.concatenate(strategies)


def _lowest(p: Problem, force: np.ndarray) -> np.ndarray:
    """The least entry of each player's block."""
    return np.array([force[row > 0].min() for row in p.C])


@claim("acvi.certificate", source=DERIVED,
       statement=r"With $s = \beta(y_{k+1} - y_k)$ and m barrier terms "
                 r"$G(x_{k+1}, C) \le m\mu - \langle\lambda_{k+1}, x_{k+1} - y_{k+1}\rangle + \sigma_C(s) - \langle s, x_{k+1}\rangle$, for P-ACVI "
                 r"with $\mu = 0$; with $\sigma_C(\lambda) - \langle\lambda, y\rangle$ in place of $m\mu$ it is sharper, and equal to the gap in the "
                 r"limit.",
       fast=FAST, full=FULL)
def _(check: Check, cases: tuple[Case, ...], steps: int) -> None:
    for run in exact(cases, steps)[::STARTS]:
        path = run.path
        gap, bound, sharp = _certified(run.problem, path, float(run.problem.mu))
        check.below(f"{run.label}: gap - certificate", gap - bound, 1e-9)
        check.below(f"{run.label}: gap - sharp certificate", gap - sharp, 1e-9)
        check.below(f"{run.label}: sharp - plain certificate", sharp - bound, 1e-9)
        check.equal(f"{run.label}: gap by the package and by its definition", gap, gaps(run.problem, path.x[1:]), 1e-12)
        if np.linalg.norm(path.x[-1] - path.y[-1]) + np.linalg.norm(path.y[-1] - path.y[-2]) < 1e-12:
            check.equal(f"{run.label}: sharp certificate of the converged run", sharp[-1], gap[-1], 1e-10)
    for run in _projected(cases, steps):
        gap, bound, sharp = _certified(run.problem, run.path, 0.0)
        check.below(f"{run.label} (projected): gap - certificate", gap - np.minimum(bound, sharp), 1e-9)


@jax.jit(static_argnames=("sizes", "steps"))
def _inexact(p: Any, step_size: Any, inner_steps: Any, sizes: tuple[int, ...], steps: int) -> tuple[jax.Array, ...]:
    def one(count: Any) -> tuple[jax.Array, ...]:
        inner = GradientDescentAscent(step_size)
        method = InexactACVI(p.beta, p.mu, inner=inner, inner_steps=count, barrier_steps=count, barrier_step_size=step_size)
        return trace(simplex_problem(p.M, p.q, sizes), method, p.y, p.lam, steps)

    return jax.vmap(one)(inner_steps)


@claim("acvi.inexact-certificate", source=f"{DERIVED}, for Algorithm 1 of {P2}",
       statement=r"With the residuals $e_x = \beta G(x_{k+1})$ (x on $Cx = d$) and $e_y = \nabla B_\mu(y_{k+1}) - \lambda_{k+1}$ of inexact steps "
                 r"the certificate plus $\langle e_x, x\rangle + \sigma_C(-e_x) + \langle e_y, y\rangle + \sigma_C(-e_y)$ bounds the gap of every "
                 r"iterate.",
       fast={"case": (5, 7, 1e-3, 0.5), "steps": 1000}, full={"case": (20, 30, 1e-3, 0.5), "steps": 4000})
def _(check: Check, case: Case, steps: int) -> None:
    p = game(case, seed=1)
    p = p._replace(y=p.y / (p.C.T @ (p.C @ p.y)))                                            # on the plane, where the inner steps stay
    n, beta = len(p.y), float(p.beta)
    step_size = 1 / (1 + np.linalg.norm(p.M, 2) ** 2 / beta**2)
    counts = (1, 3, 10)
    x, y, lam = map(np.asarray, _inexact(p, jnp.asarray(step_size), jnp.array(counts), tuple(p.C.sum(1).astype(int).tolist()), steps))
    P = np.eye(n) - p.C.T @ np.linalg.solve(p.C @ p.C.T, p.C)
    for lane, count in enumerate(counts):
        path = Path(np.vstack([p.y, x[lane]]), np.vstack([p.y, y[lane]]), np.vstack([p.lam, lam[lane]]))
        e_x = (beta * (path.x[1:] - path.y[:-1]) + path.lam[:-1] + path.x[1:] @ p.M.T) @ P
        e_y = -p.mu / path.y[1:] - path.lam[1:]
        gap, bound, sharp = _certified(p, path, float(p.mu), e_x, e_y)
        check.below(f"{count} inner steps: |Cx - d|", np.abs(path.x[1:] @ p.C.T - p.d), 1e-12)
        check.above(f"{count} inner steps: largest residual of a step", max(np.abs(e_x).max(), np.abs(e_y).max()), 1e-3, note="the steps are inexact")
        check.below(f"{count} inner steps: gap - certificate", gap - bound, 1e-9)
        check.below(f"{count} inner steps: gap - sharp certificate", gap - sharp, 1e-9)


def _last_iterate_bound(run: Run) -> np.ndarray:
    """The bound of the gap at x_2, ..., x_K beyond m mu."""
    p, path, beta = run.problem, run.path, run.problem.beta
    k = np.arange(2, len(path.x))
    return (np.linalg.norm(path.lam[2:], axis=1) + beta * reach(p, path.x[2:])) * np.sqrt(run.V[1] / (beta * (k - 1)))


@claim("acvi.last-iterate-gap", source=f"{DERIVED}; implies the last-iterate theorems on ACVI and P-ACVI of {P2}",
       statement=r"For $K \ge 2$ $G(x_K, C) \le m\mu + (|\lambda_K| + \beta D_K)\sqrt{V_1/(\beta(K-1))}$ with $D_K = \max_{x' \in C}|x' - x_K|$ and "
                 r"$|\lambda_K| \le |\lambda^\mu| + \sqrt{\beta V_1}$, for monotone F without Lipschitz constant; for P-ACVI with $\mu = 0$.",
       fast=FAST, full=FULL)
def _(check: Check, cases: tuple[Case, ...], steps: int) -> None:
    for run in (*exact(cases, steps)[::STARTS], *_projected(cases, steps)):
        p, path = run.problem, run.path
        bound = len(p.y) * p.mu + _last_iterate_bound(run)
        check.below(f"{run.label}: gap / bound", gaps(p, path.x[2:]) / bound, 1)
        allowed = np.linalg.norm(run.lam) + np.sqrt(p.beta * run.V[1])
        check.below(f"{run.label}: |lambda_K| / bound", np.linalg.norm(path.lam[1:], axis=1) / allowed, 1 + 1e-9)


@claim("acvi.average-iterate-gap", source=f"{DERIVED}; implies the statements on averages of {P1}",
       statement=r"For all $x' \in C_=$, $\lambda'$, K: $\sum_{k<K}[\langle F(x_{k+1}), x_{k+1} - x'\rangle + "
                 r"\langle\lambda_{k+1}, y_{k+1} - x'\rangle + \langle\lambda', x_{k+1} - y_{k+1}\rangle] "
                 r"\le \frac\beta2|y_0 - x'|^2 + \frac1{2\beta}|\lambda_0 - \lambda'|^2$; so with "
                 r"$\lambda_0 = 0$ the average has $G(\bar x_K, C) \le m\mu + \beta D_0^2/(2K)$ for skew affine F.",
       fast=FAST, full=FULL)
def _(check: Check, cases: tuple[Case, ...], steps: int) -> None:
    k = np.arange(1, steps + 1)
    for run in exact(cases, steps)[::STARTS]:
        p, path = run.problem, run.path
        x, y, lam = path.x[1:], path.y[1:], path.lam[1:]
        force = x @ p.M.T + p.q
        total, pull, push = (np.cumsum(a, axis=0) for a in (np.sum(force * x + lam * y, 1), force + lam, x - y))
        # the worst x' and lambda' of each K in closed form: where the difference of both sides, a concave quadratic, is largest
        away = p.y - pull / p.beta - p.y @ p.C.T @ (inverse := np.linalg.inv(p.C @ p.C.T)) @ p.C
        anchor = away + (pull / p.beta @ p.C.T + p.d) @ inverse @ p.C
        left = total - np.sum(pull * anchor, 1) + np.sum(push * (p.lam + p.beta * push), 1)
        right = p.beta / 2 * np.sum((p.y - anchor) ** 2, 1) + p.beta / 2 * np.sum(push**2, 1)
        check.below(f"{run.label}: sum over its bound for the worst x' and lambda'", left / right, 1)
    for n1, n2 in dict.fromkeys(case[:2] for case in cases):
        problems = [game((n1, n2, 1e-3, beta), seed=3) for beta in (20.0, 100.0, 500.0)]
        problems = [p._replace(lam=np.zeros(n1 + n2)) for p in problems]
        for p, path in zip(problems, follow(problems, steps), strict=True):
            excess = gaps(p, np.cumsum(path.x[1:], axis=0) / k[:, None]) - (n1 + n2) * p.mu
            constant = 2 * k * excess / (p.beta * reach(p, p.y) ** 2)
            check.below(f"{n1} x {n2}, beta {p.beta:g}: (gap of the average - m mu) 2K / (beta D_0^2)", constant, 1)


@claim("acvi.distance-rate", source=f"{DERIVED}; implies both rate theorems of {P1}",
       statement=r"$\langle F(x_{k+1}) - F(x^\mu), x_{k+1} - x^\mu\rangle \le |\lambda_{k+1} - \lambda^\mu||x_{k+1} - y_{k+1}| + "
                 r"\beta|y_{k+1} - y_k||x_{k+1} - x^\mu|$, and its sum over k is at most $V_0/2$; so c-strong monotonicity gives "
                 r"$|\bar x_K - x^\mu|^2 \le V_0/(2cK)$, and $\langle F(x), x - x^*\rangle \ge a|x - x^*|$ gives "
                 r"$|x_K - x^*| \le (m\mu + O(1/\sqrt K))/a$.",
       fast={"shape": (5, 7), "count": 4, "steps": 3000}, full={"shape": (12, 18), "count": 8, "steps": 3000})
def _(check: Check, shape: tuple[int, int], count: int, steps: int) -> None:
    parameters = [(mu, beta) for mu in (1e-2, 1e-4) for beta in (0.2, 1.0, 0.5, 5.0)]
    problems = [game((*shape, *parameters[i * 8 // count]), seed=10 + i, strength=0.3) for i in range(count)]
    k = np.arange(1, steps + 1)
    for p, path, x in zip(problems, follow(problems, steps), centres(problems), strict=True):
        run = Run(p, path, x, -p.mu / x)
        away, gap = path.x[1:] - x, np.linalg.norm(path.x[1:] - path.y[1:], axis=1)
        inner = np.einsum("ki,ij,kj->k", away, p.M, away)
        moved = p.beta * np.linalg.norm(np.diff(path.y, axis=0), axis=1)
        right = np.linalg.norm(path.lam[1:] - run.lam, axis=1) * gap + moved * np.linalg.norm(away, axis=1)
        live = right > ROUND_OFF
        check.below(f"{run.label}: monotonicity over its bound", inner[live] / right[live], 1)
        check.below(f"{run.label}: its sum over V_0 / 2", np.cumsum(inner) / (run.V[0] / 2), 1)
        null = np.linalg.svd(p.C)[2][2:]
        c = np.linalg.eigvalsh(null @ (p.M + p.M.T) @ null.T / 2)[0]
        average = np.cumsum(path.x[1:], axis=0) / k[:, None]
        check.below(f"{run.label}: |average - x^mu| over its bound", np.linalg.norm(average - x, axis=1) / np.sqrt(run.V[0] / (2 * c * k)), 1)
    corner = np.zeros(sum(shape))
    corner[[0, shape[0]]] = 1
    sharp = [p._replace(q=np.where(corner > 0, 0, 1.0) - p.M @ corner) for p in problems]     # <F(x), x - corner> >= |x - corner| / sqrt 2 inside C
    for p, path, x in zip(sharp, follow(sharp, steps), centres(sharp), strict=True):
        run = Run(p, path, x, -p.mu / x)
        bound = np.sqrt(2) * (len(corner) * p.mu + _last_iterate_bound(run))
        check.below(f"{run.label}: distance to a sharp solution over its bound", np.linalg.norm(path.x[2:] - corner, axis=1) / bound, 1)
