"""Changes of the inner variable on the generic problem: what the implicit formula in z is, and what it can and cannot repair."""

from __future__ import annotations

import numpy as np

from theorylab.hypergradient.claims._programs import (
    BOTH,
    DERIVED,
    PAPER,
    Case,
    Chart,
    T,
    Tensors,
    case,
    changed,
    chart,
    draw,
    errors,
    estimates,
    line,
    measure,
    norms,
    tensors,
)
from theorylab.hypergradient.reparametrize import Reparametrized
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check


def _random(seed: int, x: np.ndarray, y: np.ndarray, away: float = 1.0) -> Chart:
    """A map with every derivative present, that takes a random z, about `away` from x, to x."""
    rng = np.random.default_rng(seed)
    M = 0.1 * rng.standard_normal((4, 4, 4))
    return chart(x, y, z=x + away * rng.standard_normal(4), A=np.eye(4) + 0.2 * rng.standard_normal((4, 4)), B=rng.standard_normal((4, 3)),
                 K=0.3 * rng.standard_normal((4, 4, 3)), M=M + M.transpose(0, 2, 1))


def _closed(at: Tensors, phi: Chart) -> np.ndarray:
    """G_2 + Jt' G_1 with Jt = (F_1 + S)^-1 (S B - F_2 - T), at the base point of the map."""
    A, B, K, M = (np.asarray(a) for a in (phi.A, phi.B, phi.K, phi.M))
    S = np.linalg.solve(A.T, np.linalg.solve(A.T, np.tensordot(at.F, M, 1)).T)
    J = np.linalg.solve(at.F1 + S, S @ B - at.F2 - np.linalg.solve(A.T, np.tensordot(at.F, K, 1)))
    return at.G2 + J.T @ at.G1


@claim("hypergradient.map-consistency", source=BOTH,
       statement=r"For every smooth $\varphi(z, y)$ invertible in z the implicit formula for $E(\varphi(z, y), y)$, $G(\varphi(z, y), y)$ is "
                 r"consistent: $\tilde\Omega(x^*, y) = \nabla L(y)$.",
       fast={"maps": 10}, full={"maps": 300})
def _(check: Check, maps: int) -> None:
    one = case()
    off = []
    for seed in range(maps):
        phi = _random(seed, one.x, one.y)
        off.append(changed(one.problem, phi, phi.z, one.y)[1] - one.gradient)
    check.below("error at the solution, random maps", np.abs(off), 1e-13, note=f"median {np.median(np.abs(off)):.1e}")


@claim("hypergradient.map-closed-form", source=DERIVED,
       statement=r"With $A = \varphi_1$, $B = \varphi_2$, $S = A^{-\top}(\sum_k F_k\varphi^k_{11})A^{-1}$, $T = A^{-\top}\sum_k F_k\varphi^k_{12}$ "
                 r"the formula in z is $G_2 + \tilde J^\top G_1$ with $\tilde J = (F_1 + S)^{-1}(SB - F_2 - T)$, at every x.",
       fast={"maps": 10, "library": False}, full={"maps": 300, "library": True})
def _(check: Check, maps: int, library: bool) -> None:
    one, off = case(), []
    for seed in range(maps):
        x = one.x + 0.5 * np.random.default_rng(100 + seed).standard_normal(4)
        phi = _random(seed, x, one.y)
        at, truth = tensors(one.rooted, x, one.y), changed(one.problem, phi, phi.z, one.y)[1]
        off.append(np.linalg.norm(_closed(at, phi) - truth) / np.linalg.norm(truth))
    check.below("closed form less autodiff in z, relative", np.array(off), 1e-12, note=f"median {np.median(off):.1e}")
    if not library:
        return
    phi = _random(0, one.x, one.y, 0.3)
    zs = np.asarray(phi.z) + 0.2 * np.random.default_rng(4).standard_normal((4, 4))
    xs, truth, _ = (np.array(a) for a in zip(*(changed(one.problem, phi, z, one.y) for z in zs), strict=True))
    found = estimates({"map": Reparametrized(phi)}, one.problem, xs, one.y)["map"].value
    check.below("Reparametrized of the library, its z by Newton's method, less the same", np.abs(found - truth), 1e-11)


@claim("hypergradient.map-first-order", source=DERIVED,
       statement=r"$\tilde\Omega_1 h = \Omega_1 h - (T[h] + S[h](J - B))^\top v$ at the solution, with $F_1 h$ in place of F in S and T.",
       fast={"maps": 10}, full={"maps": 300})
def _(check: Check, maps: int) -> None:
    one, off = case(), []
    J, v = one.at.J, one.at.v
    for seed in range(maps):
        phi = _random(seed, one.x, one.y)
        A, B, K, M = (np.asarray(a) for a in (phi.A, phi.B, phi.K, phi.M))
        truth = changed(one.problem, phi, phi.z, one.y)[2] @ np.linalg.inv(A)
        formula = []
        for h in np.eye(4):
            g = one.at.F1 @ h
            S = np.linalg.solve(A.T, np.linalg.solve(A.T, np.tensordot(g, M, 1)).T)
            formula.append(one.at.omega1 @ h - (np.linalg.solve(A.T, np.tensordot(g, K, 1)) + S @ (J - B)).T @ v)
        off.append(np.linalg.norm(np.stack(formula, 1) - truth) / np.linalg.norm(truth))
    check.below("formula less the autodiff derivative, random maps, relative", np.array(off), 1e-12, note=f"median {np.median(off):.1e}")


def _agnostic(at: Tensors, x: np.ndarray, y: np.ndarray) -> Chart:
    """The map z - sum_k e_k (z - x)' R[F_1^-1 e_k] (y - y_0), R[h] = F_21[h] + F_11[h] J."""
    inverse = np.linalg.inv(at.F1)
    return chart(x, y, K=-np.array([at.bend(h) for h in inverse.T]))


def _aware(at: Tensors, x: np.ndarray, y: np.ndarray) -> Chart:
    """The map z + sum_k e_k (z - x)' v / |v|^2 (Omega_1 F_1^-1 e_k)' (y - y_0)."""
    v = at.v / (at.v @ at.v)
    return chart(x, y, K=np.einsum("i,ak->kia", v, at.omega1 @ np.linalg.inv(at.F1)))


def _by_maps(one: Case, make) -> np.ndarray:
    """Values along the line, each with the map of its own point, by autodiff in z."""
    values = []
    for x in line(one):
        phi = make(tensors(one.rooted, x, one.y), x, one.y)
        values.append(changed(one.problem, phi, phi.z, one.y)[1])
    return np.array(values)


@claim("hypergradient.outer-agnostic-map", source=f"{DERIVED}; the affine case: {PAPER}",
       statement=r"A map that does not use G makes the Jacobian super-efficient iff $F_{21}[h] + F_{11}[h]J + T[h] + S[h](J - B) = 0$ for all h. "
                 r"What is left is $\lVert G_{21} + J^\top G_{11}\rVert$, zero where G is affine in x and not coupled to y; preconditioning has no "
                 r"such limit.",
       fast={"tol": 5e-5})
def _(check: Check, tol: float) -> None:
    d = draw().d
    for affine, one in ((True, case(True)), (False, case())):
        found = errors("agnostic", one, 0)
        check.below(f"{'affine' if affine else 'generic'} G: the library less the map itself by autodiff in z",
                    np.abs(found + one.gradient - _by_maps(one, _agnostic)), 1e-13)
        if affine:
            check.equal("affine G: |error| / t^2 at t = 0.0001", norms(found)[3] / T[3] ** 2, 0.0623, tol)
            check.equal("affine G: Plain, |error| / t at t = 0.0001", norms(errors("Plain", one, 1))[3], 0.2795, tol)
            check.below("affine G: |G_21 + J' G_11|", np.linalg.norm(one.at.limit), 0)
        else:
            left = np.linalg.norm(one.at.limit @ d)
            check.equal("generic G: |(G_21 + J' G_11) d|", left, 0.737728, 5e-7)
            check.equal("generic G: |error| / t at t = 0.0001", norms(found)[3] / T[3], 0.73776, 1e-5)
            rest = found / T[:, None] - one.at.limit @ d
            check.below("generic G: |error - t (G_21 + J' G_11) d| / t^2", norms(rest) / T, 1)


@claim("hypergradient.outer-aware-map", source=DERIVED,
       statement=r"A map that uses G (and $v \ne 0$) makes the formula super-efficient for every G: it is the one-point correction.",
       fast={"tol": 1e-13})
def _(check: Check, tol: float) -> None:
    one = case()
    by_map = _by_maps(one, _aware)
    check.below("the map itself by autodiff in z less OnePoint", np.abs(by_map - measure(one, line(one))["OnePoint"].value), tol)
    check.equal("|error| / t^2 at t = 0.0001", norms(by_map - one.gradient)[3] / T[3] ** 2, 1.0239, 5e-5)


def _linear(at: Tensors, x: np.ndarray, y: np.ndarray) -> Chart:
    """P(x, y)^-1 z with the diagonal P of F_1, x frozen."""
    P, n = np.diag(at.F1), len(x)
    slope = np.array([at.F12[k, k] for k in range(n)]) / P[:, None]
    K = np.zeros((n, n, len(y)))
    K[np.arange(n), np.arange(n)] = -slope / P[:, None]
    return chart(x, y, z=P * x, A=np.diag(1 / P), B=-slope * x[:, None], K=K)


def _hessian(sign: float, one: Case):
    """F_1(x, y)^-1 Q(z) + x with Q(z) = F(z, y_0), or with the map Q that is bent the other way."""

    def make(at: Tensors, x: np.ndarray, y: np.ndarray) -> Chart:
        A = np.linalg.solve(at.F1, one.at.F1)
        K = -np.linalg.solve(at.F1, np.einsum("kja,ji->kia", at.F12, A).reshape(4, -1)).reshape(4, 4, 3)
        M = np.linalg.solve(at.F1, sign * one.at.F11.reshape(4, -1)).reshape(4, 4, 4)
        return chart(x, y, z=one.x, A=A, K=K, M=M)

    return make


@claim("hypergradient.linear-map-generic", source=DERIVED,
       statement=r"$\varphi(z, y) = P(\hat x, y)^{-1}z$ with symmetric P, live in y: $S = 0$ and $T_{\cdot j} = -(\partial_{y_j}P)P^{-1}F$, at "
                 r"every x.",
       fast={"tol": 1e-13})
def _(check: Check, tol: float) -> None:
    one = case()
    for i, x in enumerate(line(one, np.array([1.0, 0.3, 0.1, 1e-2]))):
        at = tensors(one.rooted, x, one.y)
        T_ = -np.array([at.F12[k, k] for k in range(4)]) * (at.F / np.diag(at.F1))[:, None]
        formula = at.G2 - (at.F2 + T_).T @ at.v
        phi = _linear(at, x, one.y)
        truth = changed(one.problem, phi, phi.z, one.y)[1]
        check.below(f"point {i}: formula less the map by autodiff in z", np.abs(formula - truth), tol)


@claim("hypergradient.hessian-map", source=f"the official code of the paper; {DERIVED}",
       statement=r"$\varphi(z, y) = F_1(\hat x, y)^{-1}F(z, \hat y) + \hat x$ is not super-efficient for an inner energy that is not quadratic, "
                 r"even with affine G: $\tilde\Omega_1 h = (G_{21} + J^\top G_{11})h - 2(F_{11}[h]J)^\top v$, the curvature is doubled. A map Q "
                 r"with $Q_1 = F_1$, $Q_{11} = -F_{11}$ in place of F removes it.",
       fast={"tol": 1e-4})
def _(check: Check, tol: float) -> None:
    one, d = case(True), draw().d
    predicted = one.at.limit @ d - 2 * ((one.at.F11 @ d) @ one.at.J).T @ one.at.v
    found = (_by_maps(one, _hessian(1.0, one)) - one.gradient) / T[:, None]
    off = norms(found - predicted) / np.linalg.norm(predicted)
    check.equal("relative distance of error / t to the prediction, t = 0.001", off[2], 1.1e-3, tol)
    check.equal("the same, t = 0.0001", off[3], 1.1e-4, tol / 10)
    mirrored = norms(_by_maps(one, _hessian(-1.0, one)) - one.gradient)
    check.below("bent the other way: |error| / t^2", mirrored / T**2, 1, note=f"{mirrored[3] / T[3] ** 2:.3g} at t = 0.0001")
