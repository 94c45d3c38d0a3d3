"""The flow in continuous time: the distance to the manifold follows one formula whatever is minimized."""

from __future__ import annotations

from typing import Any

import numpy as np

from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.stiefel.claims._programs import DERIVED, FEW, all_fields, follow, instances, norm, normal, residuals, skew, spectral, sym, t, uniform


def _velocity(b: np.ndarray, objective: Any, tangent: str, attraction: float, kind: str) -> Any:
    """The landing flow in plain NumPy, from the printed formulas."""
    inverse = np.linalg.inv(b)

    def velocity(_: float, flat: np.ndarray) -> np.ndarray:
        x = flat.reshape(len(b), -1)
        g, bx = objective(x), b @ x
        psi = skew(g @ bx.T) @ bx if tangent == "relative" else 2 * skew(inverse @ g @ x.T) @ bx
        h = x.T @ bx - np.eye(x.shape[1])
        return -(psi + attraction * (x if kind == "newton_schulz" else bx) @ h).ravel()

    return velocity


def _ratio(h: np.ndarray) -> np.ndarray:
    """The matrix h (I + h)^-1, which the flow multiplies by a number."""
    return h @ np.linalg.inv(np.eye(len(h)) + h)


@claim("stiefel.feasibility-flow", source=DERIVED,
       statement=r"On $X' = -(\Psi + \omega Xh)$, whatever the objective and B, $h' = -2\omega h(I + h)$, so that $h(I + h)^{-1}$ decays like "
                 r"$e^{-2\omega t}$. With $BXh$ instead, $h' = -\omega(S_2h + hS_2)$, $S_2 = X^\top B^2X$: the same for $B = I$ only.",
       fast={"times": (0.3, 1.0)}, full={"times": (0.1, 0.3, 1.0, 2.0, 4.0)})
def _(check: Check, times: tuple[float, ...]) -> None:
    from scipy.integrate import solve_ivp

    (n, p), omega = FEW[1], 0.8
    one = instances(11, (n, p), 2, spread=20.0, distance=np.array([0.5, 0.9]))
    a, c = sym(normal(11, "A", n, n)), normal(11, "C", n, p)
    objectives = {"eigenvalues": lambda x: -a @ x, "log cosh": lambda x: c @ np.diag([1.0, 2.0, 3.0]) * np.tanh(c * x), "none": np.zeros_like}
    off: dict[str, list[float]] = {name: [] for name in objectives}
    for b, x, h0 in zip(one.b, one.x, one.h, strict=True):
        for name, objective in objectives.items():
            for tangent in ("relative", "relative_solved")[: 1 if name == "none" else 2]:
                velocity = _velocity(b, objective, tangent, omega, "newton_schulz")
                run = solve_ivp(velocity, (0, times[-1]), x.ravel(), t_eval=times, rtol=1e-11, atol=1e-12)
                for time, flat in zip(times, run.y.T, strict=True):
                    h = residuals(b, flat.reshape(n, p))
                    off[name].append(float(norm(_ratio(h) - np.exp(-2 * omega * time) * _ratio(h0))))
    for name, values in off.items():
        check.below(f"objective {name}: h (I + h)^-1 against its exponential decay", np.array(values), 1e-9)
    more = instances(12, (n, p), 8)
    found = all_fields(more)
    for tangent in ("relative", "relative_solved"):
        for kind in ("gradient", "newton_schulz"):
            move = found[tangent] + omega * found[kind]
            slope, m = -2 * sym(t(more.bx) @ move), more.h + np.eye(p)
            square = t(more.bx) @ more.bx if kind == "gradient" else m
            rest = norm(slope + omega * (square @ more.h + more.h @ square)) / (norm(more.bx) * norm(move))
            check.below(f"{tangent}, {kind}: h' against -w (S h + h S), relative", rest, 1e-13)


@claim("stiefel.step-limits", source=DERIVED,
       statement=r"Near $h = 0$ the normal term alone converges for $\eta\omega < 1$ (term $Xh$) or $\eta\omega\beta_1 < 1$ ($BXh$, if X reaches "
                 r"the leading eigenvector of B), and not beyond. At $\eta\omega = 1$ the first oscillates with $\lVert h\rVert \approx "
                 r"\sqrt{p/(4k)}$.",
       fast={"steps": 3000}, full={"steps": 30_000})
def _(check: Check, steps: int) -> None:
    n, p = 6, 2
    b = spectral(np.eye(n)[None], np.array([3.0, 2.0, 1.5, 1.0, 0.7, 0.5]))
    x = np.eye(n, p) @ np.diag([3.0**-0.5, 2.0**-0.5])
    start = x @ np.diag(np.sqrt(1 + uniform(13, "h", p, 0.02, 0.05)))
    for kind, scale in (("newton_schulz", 1.0), ("gradient", 3.0)):
        for share in (0.95, 1.05):
            path = np.asarray(follow(np.zeros((n, n)), b, start[None], share / scale, 1.0, steps, "relative", kind))[:, 0]
            d = norm(residuals(b[0], path))
            label = f"{kind}: |h| at {share:g} of the limit after {steps} steps"
            check.below(label, d[-1], 1e-10) if share < 1 else check.above(label, d[-1], 0.02)
    path = np.asarray(follow(np.zeros((n, n)), b, start[None], 1.0, 1.0, steps, "relative", "newton_schulz"))[:, 0]
    h = residuals(b[0], path)
    check.equal("newton_schulz at the limit: |h| over the root of p / (4 k)", norm(h[-1]) / np.sqrt(p / (4 * steps)), 1.0, 0.2)
    turning = np.diagonal(h, axis1=1, axis2=2)[-100:]
    check.true("the same: every entry changes its sign in every step", turning[1:] * turning[:-1] < 0)


