"""Single steps: how far a step may go without leaving the safe region, and what a step does to the residual."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.stiefel import fields
from theorylab.stiefel.claims._programs import (
    BOTH,
    DERIVED,
    FEW,
    MANY,
    TANGENT,
    Shape,
    all_fields,
    follow,
    inner,
    instances,
    norm,
    normal,
    power,
    residuals,
    sym,
    t,
    uniform,
)
from theorylab.stiefel.retractions import retract
from theorylab.stiefel.safe_step import safe_step_size

CASES = (("relative", "gradient"), ("relative_solved", "newton_schulz"))


@partial(jax.jit, static_argnames=("tangent", "normal"))
def _fields(one: Any, omega: Any, tangent: str, normal: str) -> jax.Array:
    _, x, g, bx, solved = one
    return fields.landing_field(g, x, bx, omega[:, None, None], tangent=tangent, normal=normal, solved=solved)


@partial(jax.jit, static_argnames=("rule", "normal"))
def _steps(one: Any, field: Any, omega: Any, radius: Any, ends: Any, rule: str, normal: str = "gradient") -> jax.Array:
    """The safe step of each trial by one rule."""
    step = lambda x, field, b, radius, omega, low, high: safe_step_size(  # noqa: E731
        x, field, b, radius, rule, attraction=omega, normal=normal, spectrum=(low, high))
    return jax.vmap(step)(one[1], field, one[0], radius, omega, *ends)


def _first_crossing(h: np.ndarray, w: np.ndarray, z: np.ndarray, level: float) -> float:
    """The least positive root of |h - eta W + eta^2 Z|^2 = level with a positive slope, from the eigenvalues of the companion matrix."""
    quartic = np.array([np.sum(z * z), -2 * np.sum(w * z), np.sum(w * w) + 2 * np.sum(h * z), -2 * np.sum(h * w), np.sum(h * h) - level])
    roots = np.roots(quartic)
    real = roots.real[(np.abs(roots.imag) < 1e-9 * np.abs(roots)) & (roots.real > 0)]
    return min(root for root in real if np.polyval(np.polyder(quartic), root) > 0)


@claim("stiefel.safe-step", source=BOTH,
       statement=r"No step up to $\eta_{safe} = (\omega n^2 + \sqrt{\omega^2n^4 + \frac12 L_N l^2(\epsilon^2 - d^2)})/(L_N l^2)$, $L_N = \beta_1(2 + "
                 r"3\epsilon)$, leaves $\lVert h\rVert \le \epsilon$. The first upward crossing of a quartic is the largest such step. The rule of "
                 r"the official code has another constant and is no bound.",
       fast={"shapes": FEW[1:2], "trials": 60}, full={"shapes": MANY, "trials": 300})
def _(check: Check, shapes: tuple[Shape, ...], trials: int) -> None:
    worst, landed, reference, ratio, left, lower, half, conditions = [], [], [], [], [], [], [], []
    for shape in shapes:
        radius = uniform(8, f"{shape} radius", trials, 0.1, 0.9)
        one = instances(8, shape, trials, distance=radius * uniform(8, f"{shape} share", trials, 0.0, 0.98))
        omega, (low, high), d = 10 ** uniform(8, f"{shape} omega", trials, -1, 1), one.ends, norm(one.h)
        for tangent, kind in CASES:
            field = np.asarray(_fields(one, omega, tangent, kind))
            exact, rigorous, official = (np.asarray(_steps(one, field, omega, radius, one.ends, rule, kind if rule == "rigorous" else "gradient"))
                                         for rule in ("exact", "rigorous", "official"))
            after = lambda eta: norm(residuals(one.b, one.x - eta[:, None, None] * field)) / radius  # noqa: B023, E731
            worst += [after(share * rigorous) for share in (0.25, 0.5, 0.75, 1.0)]
            landed.append(after(exact))
            left.append(after(official))
            conditions.append(high / low)
            w, z = 2 * sym(t(one.bx) @ field), t(field) @ one.b @ field
            crossing = np.array([_first_crossing(*each) for each in zip(one.h, w, z, radius**2, strict=True)])
            reference.append(exact / crossing)
            ratio.append(exact / rigorous)
            if kind == "gradient":
                pull, length = norm(all_fields(one)["gradient"]) ** 2, norm(field) ** 2
                curve = high * (2 + 3 * radius) * length
                lower.append(rigorous / (2 * omega * pull / curve))
                near = d <= radius / 2
                half.append((rigorous * np.sqrt(curve) / (radius * np.sqrt(3 / 8)))[near])
    check.below("rigorous rule: |h| / radius at 1/4, 1/2, 3/4 and all of the step", np.concatenate(worst), 1 + 1e-12)
    check.equal("exact rule: |h| / radius after the step", np.concatenate(landed), 1.0, 1e-6)
    check.equal("exact rule over the root from the companion matrix", np.concatenate(reference), 1.0, 1e-6)
    check.above("exact over rigorous", np.concatenate(ratio), 1 - 1e-12, note=f"median {np.median(np.concatenate(ratio)):.3g}")
    check.above("rigorous over its bound 2 w n^2 / (L l^2)", np.concatenate(lower), 1 - 1e-12)
    check.above("rigorous over its bound for |h| at most half the radius", np.concatenate(half), 1 - 1e-12)
    gone, bad = np.concatenate(left) > 1, np.concatenate(conditions) > 100
    check.above("official rule: share of steps that leave", np.mean(gone), 0.1, note=f"{np.mean(gone[bad]):.2f} where B has a condition above 100")
    check.above("official rule: largest |h| / radius after its step", np.max(np.concatenate(left)), 2)


@claim("stiefel.infeasible-start", source=BOTH,
       statement=r"With a constant objective, $\lVert h_0\rVert < 1$ and $\eta\omega \le 1/(3\beta_1)$ the distance falls in every step, in the end "
                 r"by the factor $1 - 2\eta\omega\mu_{\min}(X^\top B^2X)$. For the normal term $Xh$ with $\eta\omega = \frac12$ a step is $h \to "
                 r"-\frac34h^2 + \frac14h^3$. A tangent step changes h by $\eta^2\Psi^\top B\Psi$ exactly.",
       fast={"trials": 24, "steps": 300}, full={"trials": 300, "steps": 3000})
def _(check: Check, trials: int, steps: int) -> None:
    n, _ = shape = FEW[1]
    one = instances(9, shape, trials, spread=10.0, distance=uniform(9, "d", trials, 0.2, 0.99))
    none, high = np.zeros((n, n)), one.ends[1][:, None, None]
    path = np.asarray(follow(none, one.b, one.x, 1 / (3 * high), 1.0, steps, "relative", "gradient"))
    d = norm(residuals(one.b, path))
    live = d[:-1] > 1e-11
    check.below("normal term B X h: |h_k+1| / |h_k|", (d[1:] / np.maximum(d[:-1], 1e-300))[live], 1.0)
    last = live.sum(0) - 1                                                              # the last step above round-off
    square = t(path[-1]) @ one.b @ one.b @ path[-1]
    predicted = 1 - 2 / (3 * one.ends[1]) * np.linalg.eigvalsh(square)[:, 0]
    near = d[last, np.arange(trials)] < 1e-5
    measured = d[last, np.arange(trials)] / d[last - 1, np.arange(trials)]
    check.above("runs that come below 1e-5", near.sum(), trials // 2)
    check.below("ratio in the end over 1 - 2 eta omega mu", (measured / predicted)[near], 1.001)
    check.equal("the same, median", np.median((measured / predicted)[near]), 1.0, 0.01, note="lower where the slowest part is small at first")
    path = np.asarray(follow(none, one.b, one.x, 0.5, 1.0, 14, "relative", "newton_schulz"))
    h = residuals(one.b, path)
    check.below("normal term X h: h_k+1 against -3/4 h^2 + 1/4 h^3", norm(h[1:] - (-0.75 * h[:-1] @ h[:-1] + 0.25 * h[:-1] @ h[:-1] @ h[:-1])), 3e-14)
    check.below("|h| after 14 steps", norm(h[-1]), 1e-13)
    found, eta = all_fields(one), 0.3
    for name in TANGENT:
        psi = found[name]
        change = residuals(one.b, one.x - eta * psi) - one.h - eta**2 * t(psi) @ one.b @ psi
        check.below(f"{name}: change of h by a tangent step against eta^2 Psi'B Psi, relative",
                    norm(change) / (1 + eta**2 * norm(t(psi) @ one.b @ psi)), 1e-13)


@claim("stiefel.polar-factor", source=DERIVED,
       statement=r"$X \leftarrow X(3I - X^\top BX)/2$ converges to $X(X^\top BX)^{-1/2}$ for $\lVert h\rVert < 1$, the point of the manifold that "
                 r"is nearest to X in the norm of B.",
       fast={"trials": 12}, full={"trials": 100})
def _(check: Check, trials: int) -> None:
    from scipy.optimize import minimize

    one = instances(10, FEW[1], trials, spread=30.0, distance=uniform(10, "d", trials, 0.1, 0.9))
    polar = one.x @ power(one.h + np.eye(FEW[1][1]), -0.5)
    found = np.stack([np.asarray(retract(x, b, "newton_schulz")) for x, b in zip(one.x, one.b, strict=True)])
    check.below("Newton-Schulz against the polar factor, relative", norm(found - polar) / norm(polar), 1e-13)
    b, x = one.b[0], one.x[0]
    onto = lambda v: np.linalg.solve(np.linalg.cholesky(v.T @ b @ v), v.T).T  # noqa: E731
    gap = lambda v: float(inner(onto(v.reshape(x.shape)) - x, b @ (onto(v.reshape(x.shape)) - x)))  # noqa: E731
    least = min(minimize(gap, (x + 0.1 * normal(10, f"start {i}", *x.shape)).ravel(), method="BFGS", options={"gtol": 1e-8}).fun for i in range(2))
    check.equal("its squared distance in B against the least that scipy finds", inner(polar[0] - x, b @ (polar[0] - x)), least, 1e-8)
