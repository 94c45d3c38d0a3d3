"""Tangent and normal terms: what they are orthogonal to, how much they descend, what they are invariant under; and the worked example."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.stiefel import fields
from theorylab.stiefel.claims._programs import (
    BOTH,
    DERIVED,
    FEW,
    MANY,
    PAPER,
    TANGENT,
    Shape,
    all_fields,
    at,
    basis,
    feasible,
    inner,
    instances,
    norm,
    normal,
    power,
    skew,
    spectral,
    sym,
    t,
)
from theorylab.stiefel.eigen import GEVP
from theorylab.stiefel.quantities import infeasibility, multiplier

Shapes = tuple[Shape, ...]
OFF = 1e-6                              # size from which a direction that is not tangent is told from one that is


@claim("stiefel.tangency", source=PAPER,
       statement=r"For every X, also off the manifold, $X^\top B \Psi$ is skew for $\Psi_B$ and $\Psi_R$, so that $\langle\Psi, BXS\rangle = 0$ for "
                 r"symmetric S; the Riemannian gradient and the direction of PLAM are tangent at $h = 0$ only.",
       fast={"shapes": FEW, "trials": 40}, full={"shapes": MANY, "trials": 300})
def _(check: Check, shapes: Shapes, trials: int) -> None:
    part: dict[str, list[np.ndarray]] = {}
    normals, formula = [], []
    for shape in shapes:
        one = instances(1, shape, trials)
        found = all_fields(one)
        for name in (*TANGENT, "riemannian", "plam"):
            cross = t(one.bx) @ found[name]
            part.setdefault(name, []).append(norm(sym(cross)) / (norm(one.bx) * norm(found[name])))
        printed = {"relative": skew(one.g @ t(one.x) @ one.b) @ one.bx, "relative_solved": 2 * skew(one.solved @ t(one.x)) @ one.bx}
        for name, value in printed.items():
            size = norm(found[name]) * norm(found["gradient"])
            normals.append(np.abs(inner(found[name], found["gradient"])) / np.where(size > 0, size, 1))
            terms = norm(one.solved if name == "relative_solved" else one.b @ one.g) * norm(one.x) * norm(one.bx)
            formula.append(norm(found[name] - value) / terms)
    check.below("factored against printed formula, relative to its terms", np.concatenate(formula), 1e-14)
    for name in TANGENT:
        check.below(f"{name}: symmetric part of X'B Psi over |BX| |Psi|", np.concatenate(part[name]), 1e-14)
    check.below("inner product of both with the gradient of |h|^2 / 4, cosine", np.concatenate(normals), 1e-13)
    away = np.concatenate([instances(1, shape, trials).h for shape in shapes if shape[1] == shapes[1][1]])
    far = norm(away) > 0.1
    for name in ("riemannian", "plam"):
        off = np.concatenate([value for value, shape in zip(part[name], shapes, strict=True) if shape[1] == shapes[1][1]])
        check.above(f"{name}: the same for |h| > 0.1, the least", off[far].min(), OFF, note="not tangent")
    flat = instances(1, shapes[1], trials, distance=0.0)
    found = all_fields(flat)
    on = norm(sym(t(flat.bx) @ found["riemannian"])) / (norm(flat.bx) * norm(found["riemannian"]))
    check.below("riemannian: the same for h = 0", on, 1e-13)


@claim("stiefel.ascent", source=BOTH,
       statement=r"$\langle\Psi_B, G\rangle = \lVert\mathrm{skew}(G X^\top B)\rVert^2 \ge \rho_B\lVert\Psi_B\rVert^2$ with $\rho_B = "
                 r"1/\lVert BX\rVert_2^2 \ge 1/(\beta_1(1+\epsilon))$, and $\langle\Psi_R, G\rangle = 2\lVert "
                 r"B^{1/2}\mathrm{skew}(B^{-1}GX^\top)B^{1/2}\rVert^2 \ge \rho_R\lVert\Psi_R\rVert^2$ with $\rho_R = \beta_n/(2(1+\epsilon))$, "
                 r"where $\lVert h\rVert \le \epsilon$.",
       fast={"shapes": FEW, "trials": 40}, full={"shapes": MANY, "trials": 300})
def _(check: Check, shapes: Shapes, trials: int) -> None:
    off: dict[str, list[np.ndarray]] = {name: [] for name in TANGENT}
    ratio: dict[str, list[np.ndarray]] = {name: [] for name in TANGENT}
    sizes = []
    for shape in shapes:
        one = instances(2, shape, trials)
        found, (low, high), d = all_fields(one), one.ends, norm(one.h)
        root = power(one.b, 0.5)
        square = {"relative": norm(skew(one.g @ t(one.x) @ one.b)) ** 2, "relative_solved": 2 * norm(root @ skew(one.solved @ t(one.x)) @ root) ** 2}
        spectral_norm = np.linalg.norm(one.bx, 2, axis=(-2, -1)) ** 2
        rho = {"relative": 1 / spectral_norm, "relative_solved": low / (2 * (1 + d))}
        sizes.append(spectral_norm / (high * (1 + d)))
        for name in TANGENT:
            value = inner(found[name], one.g)
            off[name].append(np.abs(value - square[name]) / square[name])
            ratio[name].append(value / (rho[name] * norm(found[name]) ** 2))
    for name in TANGENT:
        check.below(f"{name}: <Psi, G> against the square, relative", np.concatenate(off[name]), 1e-12)
        check.above(f"{name}: <Psi, G> over rho |Psi|^2", np.concatenate(ratio[name]), 1 - 1e-12)
    check.below("|BX|_2^2 over beta_1 (1 + |h|)", np.concatenate(sizes), 1 + 1e-12)


@claim("stiefel.critical-points", source=BOTH,
       statement=r"For $\lVert h\rVert < 1$ and $\omega > 0$ the landing field is 0 exactly at the critical points of the manifold, since "
                 r"$\lVert\Lambda\rVert^2 = \lVert\Psi\rVert^2 + \omega^2\lVert BXh\rVert^2$. There $\Psi_B$, $\Psi_R$ and the Riemannian gradient "
                 r"vanish together, and $G = BX(X^\top G)$ with symmetric $X^\top G$.",
       fast={"trials": 12}, full={"trials": 100})
def _(check: Check, trials: int) -> None:
    from scipy.linalg import eigh

    (n, p), omega = FEW[1], 0.7
    one = instances(3, (n, p), trials)
    found = all_fields(one)
    for name in TANGENT:
        whole = np.asarray(fields.landing_field(one.g, one.x, one.bx, omega, tangent=name, normal="gradient", solved=one.solved))
        parts = norm(found[name]) ** 2 + omega**2 * norm(found["gradient"]) ** 2
        check.below(f"{name}: |field|^2 against the sum of squares, relative", np.abs(norm(whole) ** 2 - parts) / parts, 1e-13)
    a = sym(normal(3, "A", trials, n, n))
    pairs = [eigh(a_, b_) for a_, b_ in zip(a, one.b, strict=True)]
    chosen = np.argsort(normal(3, "which", trials, n), axis=1)[:, :p]                   # any p eigenvectors: minima and saddle points
    x = np.stack([vectors[:, index] for (_, vectors), index in zip(pairs, chosen, strict=True)]) @ basis(3, "turn", trials, p)
    critical = at(one.b, x, -a @ x)
    sizes = {"relative": norm(one.b @ critical.g) * norm(x) * norm(critical.bx), "relative_solved": 2 * norm(critical.solved),
             "riemannian": 2 * norm(critical.solved)}
    there = all_fields(critical)
    for name, size in sizes.items():
        check.below(f"{name}: norm at eigenvectors of scipy, relative to its terms", norm(there[name]) / size, 1e-11)
    inside = t(x) @ critical.g
    check.below("G - BX (X'G) there, relative", norm(critical.g - critical.bx @ inside) / norm(critical.g), 1e-11)
    check.below("skew part of X'G there, relative", norm(skew(inside)) / norm(critical.g) / norm(x), 1e-12)
    moved = feasible(one.b, x + 1e-3 * norm(x)[:, None, None] / np.sqrt(n * p) * normal(3, "away", trials, n, p))
    near = at(one.b, moved, -a @ moved)
    beyond = all_fields(near)
    for name in sizes:
        check.above(f"{name}: norm a thousandth away on the manifold, over that at the eigenvectors", norm(beyond[name]) / norm(there[name]), 1e5)


@claim("stiefel.metrics", source=DERIVED,
       statement=r"On the manifold the Riemannian gradient is the gradient for $\mathrm{tr}(U^\top B V)$, and $\Psi_R = \mathrm{grad} + "
                 r"X\,\mathrm{skew}(X^\top G)$ is the gradient for $\mathrm{tr}(U^\top B(I - \tfrac12 XX^\top B)V)$.",
       fast={"shapes": FEW, "trials": 40}, full={"shapes": MANY, "trials": 300})
def _(check: Check, shapes: Shapes, trials: int) -> None:
    plain, canonical, both = [], [], []
    for shape in shapes:
        one = instances(4, shape, trials, spread=100.0, distance=0.0)
        found, x = all_fields(one), one.x
        u = normal(4, f"{shape} U", trials, *shape)
        u = u - x @ sym(t(one.bx) @ u)                                                  # X'BU is skew
        bu, wanted = one.b @ u, inner(one.g, u)
        size = norm(one.g) * norm(u)
        plain.append(np.abs(inner(bu, found["riemannian"]) - wanted) / size)
        canonical.append(np.abs(inner(bu - 0.5 * one.bx @ (t(x) @ bu), found["relative_solved"]) - wanted) / size)
        rest = found["relative_solved"] - found["riemannian"] - x @ skew(t(x) @ one.g)
        both.append(norm(rest) / (norm(one.solved) + norm(x) * norm(t(x) @ one.g)))
    check.below("<G, U> against the metric of B with the Riemannian gradient, relative", np.concatenate(plain), 1e-13)
    check.below("<G, U> against the canonical metric with Psi_R, relative", np.concatenate(canonical), 1e-13)
    check.below("Psi_R against grad + X skew(X'G), relative", np.concatenate(both), 1e-14)


@claim("stiefel.invariances", source=DERIVED,
       statement=r"$\Psi(XO, GO) = \Psi(X, G)O$ for orthogonal O; $B^{1/2}\Psi_R$ is the field of $Z = B^{1/2}X$ on the plain Stiefel manifold; "
                 r"$\Psi_R(X) = T\Psi_R'(Z)$ for $X = TZ$, $B' = T^\top BT$, $G' = T^\top G$. $\Psi_B$ has no such invariance: its speed depends on "
                 r"the condition of B.",
       fast={"shapes": FEW[1:], "trials": 40}, full={"shapes": MANY[1:], "trials": 300})
def _(check: Check, shapes: Shapes, trials: int) -> None:
    turned: dict[str, list[np.ndarray]] = {name: [] for name in TANGENT}
    isometry, congruence, broken = [], [], []
    for n, p in shapes:
        one = instances(5, (n, p), trials, spread=10.0)
        found, o = all_fields(one), basis(5, f"{n} {p} O", trials, p)
        other = all_fields(at(one.b, one.x @ o, one.g @ o))
        for name in TANGENT:
            turned[name].append(norm(other[name] - found[name] @ o) / norm(found[name]))
        root = power(one.b, 0.5)
        z, gz = root @ one.x, power(one.b, -0.5) @ one.g
        isometry.append(norm(root @ found["relative_solved"] - 2 * skew(gz @ t(z)) @ z) / norm(root @ found["relative_solved"]))
        stretch = np.geomspace(1, 0.1, n)
        T = basis(5, f"{n} left", trials, n) * stretch @ t(basis(5, f"{n} right", trials, n))
        there = all_fields(at(sym(t(T) @ one.b @ T), np.linalg.solve(T, one.x), t(T) @ one.g))
        congruence.append(norm(T @ there["relative_solved"] - found["relative_solved"]) / norm(found["relative_solved"]))
        broken.append(norm(T @ there["relative"] - found["relative"]) / norm(found["relative"]))
    for name in TANGENT:
        check.below(f"{name}: turned by O, relative", np.concatenate(turned[name]), 1e-13)
    check.below("Psi_R against the field on the Stiefel manifold, relative", np.concatenate(isometry), 1e-13)
    check.below("Psi_R under congruence with condition 10, relative", np.concatenate(congruence), 4e-13)
    check.above("Psi_B under the same congruence, the least change", np.concatenate(broken).min(), 0.05, note="not invariant")


@jax.jit
def _curvature(b: Any, x: Any) -> tuple[jax.Array, jax.Array]:
    """Gradient and Hessian of |h|^2 / 4 by differentiation."""
    n, p = x.shape[-2:]
    value = lambda b, v: infeasibility(v.reshape(n, p), b) ** 2 / 4  # noqa: E731
    flat = x.reshape(-1, n * p)
    return jax.vmap(jax.grad(value, 1))(b, flat).reshape(x.shape), jax.vmap(jax.hessian(value, 1))(b, flat)


@claim("stiefel.infeasibility-curvature", source=BOTH,
       statement=r"$N = \tfrac14\lVert h\rVert^2$ has the gradient $BXh$, $\beta_n(1-d)d^2 \le \lVert BXh\rVert^2 \le \beta_1(1+d)d^2$ with $d = "
                 r"\lVert h\rVert$, and $\lambda_{\max}(\nabla^2 N) \le \beta_1(2 + 3d)$; the last constant is attained.",
       fast={"shapes": FEW[:2], "trials": 40}, full={"shapes": MANY[:8], "trials": 300})
def _(check: Check, shapes: Shapes, trials: int) -> None:
    gradients, lower, upper, curved = [], [], [], []
    for shape in shapes:
        one = instances(6, shape, trials)
        slope, hessian = map(np.asarray, _curvature(one.b, one.x))
        found, (low, high), d = all_fields(one)["gradient"], one.ends, norm(one.h)
        gradients.append(norm(found - slope) / norm(slope))
        lower.append(norm(found) ** 2 / (low * (1 - d) * d**2))
        upper.append(norm(found) ** 2 / (high * (1 + d) * d**2))
        curved.append(np.linalg.eigvalsh(hessian)[:, -1] / (high * (2 + 3 * d)))
    check.below("B X h against automatic differentiation, relative", np.concatenate(gradients), 1e-11)
    check.above("|BXh|^2 over its lower bound", np.concatenate(lower), 1 - 1e-10)
    check.below("|BXh|^2 over its upper bound", np.concatenate(upper), 1 + 1e-10)
    check.below("largest curvature of |h|^2 / 4 over its bound", np.concatenate(curved), 1 + 1e-10)
    d = np.linspace(0.05, 0.9, trials)
    b = spectral(basis(6, "top", trials, 3), np.array([1.0, 2.0, 5.0]))
    x = np.linalg.eigh(b)[1][:, :, -1:] * np.sqrt((1 + d) / 5)[:, None, None]
    top = np.linalg.eigvalsh(np.asarray(_curvature(b, x)[1]))[:, -1]
    check.equal("the same at the leading eigenvector of B for p = 1", top / (5 * (2 + 3 * d)), 1.0, 1e-12)


@claim("stiefel.multiplier", source=DERIVED,
       statement=r"$\lambda(X) = \arg\min_S\lVert G - 2BXS\rVert$ over symmetric S solves $S_2 S + S S_2 = \mathrm{sym}(X^\top BG)$ with $S_2 = "
                 r"X^\top B^2X$, and $\langle G - 2BX\lambda, BXh\rangle = 0$.",
       fast={"shapes": FEW, "trials": 40}, full={"shapes": MANY, "trials": 300})
def _(check: Check, shapes: Shapes, trials: int) -> None:
    solved, equation, orthogonal = [], [], []
    for shape in shapes:
        one, p = instances(7, shape, trials, spread=30.0), shape[1]
        found = np.asarray(_multipliers(one.x, one.b, one.g))
        rows, columns = np.triu_indices(p)
        symmetric = np.zeros((len(rows), p, p))
        symmetric[np.arange(len(rows)), rows, columns] = symmetric[np.arange(len(rows)), columns, rows] = 1.0
        for bx, g, value in zip(one.bx, one.g, found, strict=True):
            design = (2 * bx @ symmetric).reshape(len(rows), -1).T
            least = np.tensordot(np.linalg.lstsq(design, g.ravel(), rcond=None)[0], symmetric, 1)
            solved.append(norm(value - least) / norm(least))
        square = t(one.bx) @ one.bx
        equation.append(norm(square @ found + found @ square - sym(t(one.bx) @ one.g)) / norm(t(one.bx) @ one.g))
        rest, pull = one.g - 2 * one.bx @ found, one.bx @ one.h
        orthogonal.append(np.abs(inner(rest, pull)) / (norm(one.g) * norm(pull)))
    check.below("against a dense least-squares solution, relative", np.array(solved), 1e-10)
    check.below("residual of the Lyapunov equation, relative", np.concatenate(equation), 1e-12)
    check.below("<G - 2BX lambda, BXh>, cosine", np.concatenate(orthogonal), 1e-12)


_multipliers = jax.jit(jax.vmap(multiplier))


def _exact(rows: str) -> np.ndarray:
    return np.array([[float(Fraction(v)) for v in row.split()] for row in rows.split(";")])


@claim("stiefel.worked-example", source=f"{DERIVED}, exact rationals",
       statement=r"With $B = [2,1,0;1,3,1;0,1,2]$, $A = [1,0,1;0,2,0;1,0,3]$, $X = [\frac12,0;0,\frac12;\frac14,-\frac14]$, $G = -AX$: all fields, "
                 r"the multiplier, the residual and one landing step are known rationals.",
       fast={"tol": 1e-15})
def _(check: Check, tol: float) -> None:
    a, b, x = _exact("1 0 1; 0 2 0; 1 0 3"), _exact("2 1 0; 1 3 1; 0 1 2"), _exact("1/2 0; 0 1/2; 1/4 -1/4")
    one = at(b[None], x[None], -(a @ x)[None])
    found = {name: value[0] for name, value in all_fields(one).items()}
    expected = {"relative": "7/32 5/32; -1/8 -1/16; -1/4 -1/8", "relative_solved": "5/64 0; -1/32 0; -7/64 0",
                "riemannian": "-9/32 11/32; 11/32 -13/32; -5/8 1/2", "plam": "-7/32 9/32; 1/8 -3/8; -29/32 19/32",
                "gradient": "-1/4 1/16; 1/32 -9/32; -3/16 1/8", "newton_schulz": "-3/16 1/8; 1/8 -3/16; -5/32 5/32"}
    for name, rows in expected.items():
        check.equal(name, found[name], _exact(rows), tol)
    check.equal("BX", one.bx[0], _exact("1 1/2; 3/4 5/4; 1/2 0"), tol)
    check.equal("h", one.h[0], _exact("-3/8 1/4; 1/4 -3/8"), tol)
    check.equal("<Psi_B, G>", inner(found["relative"], one.g[0]), 5 / 32, tol)
    check.equal("f", GEVP(a, b, p=2).metrics(jnp.asarray(x))["objective"], -11 / 16, tol)
    check.equal("|h|^2", infeasibility(x, b) ** 2, 13 / 32, tol)
    check.equal("multiplier", multiplier(x, b, one.g[0]), _exact("-1847/2262 43/78; 43/78 -1691/2262"), 2 * tol)
    moved = x - 0.1 * np.asarray(fields.landing_field(one.g[0], x, one.bx[0], 1.0, normal="gradient"))
    check.equal("one step of 0.1", moved, np.array([[0.503125, -0.021875], [0.009375, 0.534375], [0.29375, -0.25]]), tol)
    check.equal("|h| after it", infeasibility(moved, b), 0.5775888108831381, 2 * tol)
