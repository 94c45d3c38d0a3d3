"""Orders: how the error of each estimator falls with the inner error, as a vector and not only as a slope."""

from __future__ import annotations

import numpy as np

from theorylab.hypergradient.claims._programs import (
    BOTH,
    DERIVED,
    PAPER,
    Case,
    T,
    Tensors,
    case,
    differentiated,
    draw,
    errors,
    line,
    measure,
    norms,
    tensors,
)
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check

DIGITS = 5e-4                           # of a constant printed with three decimals


def _second(one: Case, step: float = 2e-3) -> np.ndarray:
    """Omega_11[d, d] by differences of fourth order of the autodiff derivative."""
    d = draw().d
    far, near, back, away = (tensors(one.rooted, one.x + s * step * d, one.y).omega1 @ d for s in (2, 1, -1, -2))
    return (8 * (near - back) - (far - away)) / (12 * step)


def _newton_term(at: Tensors) -> np.ndarray:
    """Omega_1 F_1^-1 F_11[d, d] / 2."""
    d = draw().d
    return at.omega1 @ np.linalg.solve(at.F1, (at.F11 @ d) @ d) / 2


@claim("hypergradient.first-order-error", source=BOTH,
       statement=r"$\Omega(x, y) - \nabla L(y) = \Omega_1(x^*, y)\delta + O(\lVert\delta\rVert^2)$, so the worst error per unit of inner error is "
                 r"$C_y = \lVert\Omega_1(x^*, y)\rVert$.",
       fast={"tol": DIGITS})
def _(check: Check, tol: float) -> None:
    one, d = case(), draw().d
    found = errors("Plain", one, 1)
    check.equal("|error| / t at t = 0.1 to 0.0001", norms(found), np.array([1.4315, 1.3972, 1.3940, 1.3936]), 5e-5)
    check.equal("its limit |Omega_1 d|", np.linalg.norm(one.at.omega1 @ d), 1.393603662841, 6e-13)
    check.equal("|error - t Omega_1 d| / t^2", norms(found - one.at.omega1 @ d) / T, np.array([0.744, 0.745, 0.745, 0.745]), tol)
    check.equal("its limit |Omega_11[d, d]| / 2", np.linalg.norm(_second(one)) / 2, 0.745, tol)
    worst = np.linalg.svd(one.at.omega1)[2][0]
    ratio = norms(measure(one, one.x + T[:, None] * worst)["Plain"].value - one.gradient) / T
    check.equal("|error| / t along the first singular vector, at t = 0.0001", ratio[-1], 4.928050347235, 1e-3)


@claim("hypergradient.newton-point", source=f"{PAPER} (the preconditioner $P = F_1$); {DERIVED} (the constant)",
       statement=r"With $x^+ = x - F_1^{-1}F$ the error is quadratic for every G: $\Omega(x^+, y) - \nabla L = \frac12\Omega_1 "
                 r"F_1^{-1}F_{11}[\delta, \delta] + O(\lVert\delta\rVert^3)$.",
       fast={"tol": 5e-4})
def _(check: Check, tol: float) -> None:
    one = case()
    leading, found = _newton_term(one.at), errors("NewtonPoint", one, 2)
    check.equal("the predicted vector", leading, np.array([0.273828277422, 0.098376051530, 0.128543416285]), 6e-13)
    check.equal("its norm", np.linalg.norm(leading), 0.318093, 5e-7)
    check.equal("|error - t^2 times it| / t^3 at t = 0.1 to 0.001", (norms(found - leading) / T)[:3], np.array([0.0909, 0.0878, 0.0875]), 6e-5)
    check.between("the same at t = 0.0001, where rounding begins", (norms(found - leading) / T)[3], 0.0865, 0.0885)


@claim("hypergradient.one-point-correction", source=DERIVED,
       statement=r"$\Omega - \Omega_1 F_1^{-1}F$, all at the same x with one factorization, has the error $\frac12\Omega_1 F_1^{-1}F_{11}[\delta, "
                 r"\delta] - \frac12\Omega_{11}[\delta, \delta] + O(\lVert\delta\rVert^3)$ for every G.",
       fast={"tol": 1e-14})
def _(check: Check, tol: float) -> None:
    one = case()
    at = [tensors(one.rooted, x, one.y) for x in line(one)]
    values = measure(one, line(one))["OnePoint"]
    direct = np.array([a.omega - a.omega1 @ a.newton for a in at])
    check.below("OnePoint less the same with the autodiff derivative of Omega", np.abs(values.value - direct), tol)
    check.below("its error estimate less |Omega_1 F_1^-1 F|", np.abs(values.error_estimate - [np.linalg.norm(a.omega1 @ a.newton) for a in at]), tol)
    leading, found = _newton_term(one.at) - _second(one) / 2, errors("OnePoint", one, 2)
    known = np.array([0.599060218700, 0.587358464491, 0.586954435018])
    check.equal("the predicted vector, with Omega_11 by differences of fourth order", leading, known, 1e-10)
    check.equal("|error| / t^2 at t = 0.0001", norms(found)[3], 1.023904, 5e-5)
    check.equal("|error - t^2 times it| / t^3 at t = 0.01 and 0.001", (norms(found - leading) / T)[1:3], 0.25, 5e-3)


@claim("hypergradient.general-preconditioner", source=BOTH,
       statement=r"$\Omega(x - P^{-1}F, y)$ is consistent for every invertible P, and its x-Jacobian at the solution is $\Omega_1(I - P^{-1}F_1)$; "
                 r"k steps with one P give $\Omega_1(I - P^{-1}F_1)^k$.",
       fast={"tol": DIGITS})
def _(check: Check, tol: float) -> None:
    one, d = case(), draw().d
    P = np.diag(one.at.F1)
    M = np.eye(4) - one.at.F1 / P[:, None]
    check.equal("|I - diag(F_1)^-1 F_1|", np.linalg.norm(M, 2), 0.406974453496, 6e-13)
    moved, value = line(one), {}
    for k in (1, 2, 3):
        moved = moved - np.array([tensors(one.rooted, x, one.y).F for x in moved]) / P
        value[k] = measure(one, moved)["Plain"].value
        first = one.at.omega1 @ np.linalg.matrix_power(M, k) @ d
        left = norms((value[k] - one.gradient) / T[:, None] - first) / T
        check.equal(f"k = {k}: |error - t Omega_1 M^k d| / t^2 at t = 0.0001", left[-1], {1: 0.139, 2: 0.151, 3: 0.030}[k], tol)
        power, bound = np.linalg.matrix_power(M, k), np.linalg.norm(one.at.omega1, 2) * np.linalg.norm(M, 2) ** k
        check.below(f"k = {k}: |Omega_1 M^k| over C_y |M|^k", np.linalg.norm(one.at.omega1 @ power, 2) / bound, 1)
    library = measure(one, line(one))["Precond"].value
    check.below("Preconditioned of the library, k = 3, less the same", np.abs(library - value[3]), 1e-14)
    P = np.random.default_rng(2).standard_normal((4, 4))
    off = []
    for t in (0.0, 1e-5):
        x = one.x + t * d
        moved = x - np.linalg.solve(P, tensors(one.rooted, x, one.y).F)
        off.append((tensors(one.rooted, moved, one.y).omega - one.gradient) / max(t, 1.0 if t == 0 else t))
    check.below("a random P: error at the solution", np.abs(off[0]), 1e-14)
    first = one.at.omega1 @ (d - np.linalg.solve(P, one.at.F1 @ d))
    away = np.linalg.norm(off[1] - first) / np.linalg.norm(first)
    check.below("a random P: |error / t - Omega_1 (I - P^-1 F_1) d| at t = 0.00001, relative", away, 1e-3)


@claim("hypergradient.inexact-newton", source=DERIVED,
       statement=r"If $\lVert F_1 s - F\rVert \le \tau\lVert F\rVert$, the error of $\Omega(x - s, y)$ is at most $C_y\tau\lVert F\rVert/\mu + "
                 r"O(\lVert\delta\rVert^2)$: of first order with constant $\propto\tau$ for fixed $\tau$, quadratic for $\tau = \lVert F\rVert$.",
       fast={"tau": 1e-2})
def _(check: Check, tau: float) -> None:
    one, (_, _, d, rho) = case(), draw()
    at = [tensors(one.rooted, x, one.y) for x in line(one)]
    size = np.array([np.linalg.norm(a.F) for a in at])
    found, bound = {}, {}
    for name, taus in (("fixed", np.full(4, tau)), ("relative", size)):
        moved = [one.x + t * d - np.linalg.solve(a.F1, a.F + k * np.linalg.norm(a.F) * rho) for t, a, k in zip(T, at, taus, strict=True)]
        found[name] = norms(measure(one, np.array(moved))["Plain"].value - one.gradient)
        bound[name] = np.linalg.norm(one.at.omega1, 2) * taus * size / np.array([np.linalg.eigvalsh(a.F1)[0] for a in at])
    check.equal("tau = 0.01: |error| / t at t = 0.0001", (found["fixed"] / T)[-1], 0.0252, 5e-5)
    check.equal("tau = |F|: |error| / t^2 at t = 0.0001", (found["relative"] / T**2)[-1], 6.511, 1e-3)
    for name, error in found.items():
        check.below(f"tau {name}: error less the bound, over t^2", (error - bound[name]) / T**2, 1)


@claim("hypergradient.polish", source=DERIVED,
       statement=r"The derivative of $G(x^+(y), y)$, $x^+ = x - F_1^{-1}F$ with the implicit derivative $J(x)$ of x, has a quadratic error for "
                 r"every G. With $F_1$ held constant in the differentiation it is $G_2(x^+) + J(x)^\top G_1(x^+)$, and the error is of first order.",
       fast={"tol": 1e-14})
def _(check: Check, tol: float) -> None:
    one = case()
    found = errors("Polish", one, 2)
    check.equal("|error| / t^2 at t = 0.0001", norms(found)[-1], 0.7351, 5e-5)
    off, frozen, formula = [], [], []
    for t, x, library in zip(T, line(one), found, strict=True):
        at, by_autodiff = tensors(one.rooted, x, one.y), differentiated(one.rooted, x, one.y)
        off.append(by_autodiff.polished - one.gradient - library * t**2)
        frozen.append((by_autodiff.held - one.gradient) / t)
        after = tensors(one.rooted, x - at.newton, one.y)
        formula.append(by_autodiff.held - after.G2 - at.J.T @ after.G1)
    check.below("Polish of the library less the autodiff of that step", np.abs(off), tol)
    check.equal("frozen F_1: |error| / t at t = 0.0001", np.linalg.norm(frozen[-1]), 1.6355, 5e-4)
    check.below("frozen F_1: autodiff less the formula", np.abs(formula), tol)


@claim("hypergradient.differentiated-newton", source=DERIVED,
       statement=r"Of one Newton step differentiated at fixed x (one-step differentiation) the Jacobian is $J^* - F_1^{-1}F_{11}[\delta]J^*$ to "
                 r"first order; where E is quadratic in x it is exact. Of two unrolled Newton steps the error is $O(\lVert\delta\rVert^3)$.",
       fast={"tol": 5e-5})
def _(check: Check, tol: float) -> None:
    one, d = case(), draw().d
    J, found = one.at.J, [differentiated(one.rooted, x, one.y) for x in line(one)]
    first = -np.linalg.solve(one.at.F1, one.at.F11 @ d) @ J
    error = np.array([(f.once - J) / t for f, t in zip(found, T, strict=True)])
    check.below("one step: |error - t times the predicted matrix| / t^2", np.linalg.norm(error - first, axis=(1, 2)) / T, 1)
    check.equal("one step: |error| / t at t = 0.0001, Frobenius", np.linalg.norm(error[-1]), 0.0603, tol)
    check.equal("one step: the same, spectral", np.linalg.norm(error[-1], 2), 0.0597, tol)
    cubic = np.array([np.linalg.norm(f.twice - J) / t**3 for f, t in zip(found, T, strict=True)])
    check.equal("two steps: |error| / t^3 at t = 0.01, Frobenius", cubic[1], 7.6e-3, 1e-4)
    values = measure(one, line(one))["OneStep"].value
    after = [tensors(one.rooted, x - tensors(one.rooted, x, one.y).newton, one.y) for x in line(one)]
    direct = [a.G2 + f.once.T @ a.G1 for f, a in zip(found, after, strict=True)]
    check.below("OneStep of the library less G_2 + J_1' G_1 at the new point", np.abs(values - direct), 1e-14)


@claim("hypergradient.root-problems", source=DERIVED,
       statement=r"For a root system the substitution $x = \varphi(z, y)$ does not change the Jacobian of the solution; rescaling the residual "
                 r"does: that of $F_1^{-1}F$ has a quadratic error.",
       fast={"tol": 1e-3})
def _(check: Check, tol: float) -> None:
    one, rng = case(), np.random.default_rng(3)
    J = one.at.J
    error = [(differentiated(one.rooted, x, one.y).rescaled - J) / t**2 for t, x in zip(T, line(one), strict=True)]
    check.equal("rescaled: |error| / t^2 at t = 0.001, Frobenius", np.linalg.norm(error[2]), 0.056, tol)
    check.equal("rescaled: the same, spectral", np.linalg.norm(error[2], 2), 0.053, tol)
    at = tensors(one.rooted, one.x + draw().d, one.y)
    A, B = np.eye(4) + 0.2 * rng.standard_normal((4, 4)), rng.standard_normal((4, 3))
    in_z = -np.linalg.solve(at.F1 @ A, at.F1 @ B + at.F2)
    check.below("substitution: A dz/dy + B less J, by the chain rule at a point that is no solution", np.abs(A @ in_z + B - at.J), 1e-14)
