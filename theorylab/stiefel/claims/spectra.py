"""Local linear rates for generalized eigenvalues: the derivative of each field at a solution, and how the condition of B enters."""

from __future__ import annotations

from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import jax
import numpy as np

from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.stiefel.claims._programs import BOTH, DERIVED, basis, eigenproblem, field_at, follow, norm, normal, residuals, spectral, t

N, P = 9, 3
VALUES = np.linspace(1, 0.1, N)
EXPECTED = {"relative": (8, 29, 324, 3730), "plam": (8, 17, 74, 286), "relative_solved": (8, 8, 8, 8)}
CONDITIONS = (1.0, 10.0, 100.0, 1000.0)


@partial(jax.jit, static_argnames=("tangent", "normal"))
def _jacobians(a: Any, b: Any, x: Any, attraction: Any, tangent: str, normal: str) -> jax.Array:
    """Derivatives of the field as np by np matrices, by automatic differentiation."""
    n, p = x.shape[-2:]

    def one(a: Any, b: Any, x: Any) -> jax.Array:
        return jax.jacfwd(lambda v: field_at(a, b, v.reshape(n, p), attraction, tangent, normal).ravel())(x.ravel())

    return jax.vmap(one)(a, b, x)


def _pencils(seed: int, condition: float, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B and the B-orthonormal eigenvectors; B of this condition in random directions."""
    b = spectral(basis(seed, f"B {condition:g}", count, N), np.geomspace(1, 1 / condition, N))
    a, vectors = eigenproblem(seed, b, VALUES)
    return a, b, vectors


def _operators(b: np.ndarray, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """The tangential operators K -> ... as matrices on the entries of K, from the formulas; D(K) = K Lam1 - Lam2 K."""
    q = N - P
    units = np.eye(q * P).reshape(-1, q, P)
    turned = units * VALUES[:P] - VALUES[P:, None] * units                              # D(K)
    square = t(vectors) @ b @ b @ vectors
    p11, p21, p22 = (block[:, None] for block in (square[:, :P, :P], square[:, P:, :P], square[:, P:, P:]))
    images = {"relative": (p22 @ turned @ p11 - p21 @ t(turned) @ p21) / 2,
              "plam": (p22 - p21 @ np.linalg.inv(p11) @ t(p21)) @ turned,
              "relative_solved": np.broadcast_to(turned, (len(b), *turned.shape))}
    return {name: np.swapaxes(value.reshape(len(b), q * P, q * P), 1, 2) for name, value in images.items()}


def _sorted(values: np.ndarray) -> np.ndarray:
    return np.sort(np.real(values), axis=-1)


@claim("stiefel.local-spectrum", source=DERIVED,
       statement=r"At a solution of the generalized eigenvalue problem the derivative of the field has $p(p-1)/2$ zeros, normal eigenvalues "
                 r"$\omega(\mu_i + \mu_j)$ with $\mu$ those of $X^\top B^2X$ (or $2\omega$ for the normal term $Xh$), and tangential ones: for "
                 r"$\Psi_R$ exactly $\lambda_i - \lambda_j$, $i \le p < j$; for $\Psi_B$ those of $K \to \frac12(P_{22}D(K)P_{11} - P_{21}D(K)^\top "
                 r"P_{21})$.",
       fast={"count": 8}, full={"count": 32})
def _(check: Check, count: int) -> None:
    a, b, vectors = _pencils(17, 5.0, count)
    x = vectors[:, :, :P] @ basis(17, "turn", count, P)
    operators, omega = _operators(b, vectors), 0.7
    pairs = list(combinations_with_replacement(range(P), 2))
    squares = np.linalg.eigvalsh(t(x) @ b @ b @ x)
    pulls = {"gradient": omega * np.stack([squares[:, i] + squares[:, j] for i, j in pairs], -1),
             "newton_schulz": np.full((count, len(pairs)), 2 * omega)}
    for tangent, kind in (("relative", "gradient"), ("relative_solved", "newton_schulz")):
        found = np.linalg.eigvals(np.asarray(_jacobians(a, b, x, omega, tangent, kind)))
        tangential = np.linalg.eigvals(operators[tangent])
        predicted = np.concatenate([tangential, pulls[kind], np.zeros((count, P * (P - 1) // 2))], axis=1)
        check.equal(f"{tangent}, {kind}: all eigenvalues against the formula", _sorted(found), _sorted(predicted), 1e-9)
        check.below(f"{tangent}, {kind}: imaginary parts", np.abs(found.imag), 1e-6)
    differences = (VALUES[:P, None] - VALUES[None, P:]).ravel()
    check.equal("relative_solved: tangential eigenvalues against differences", _sorted(np.linalg.eigvals(operators["relative_solved"])),
                np.sort(differences)[None], 1e-12)


@claim("stiefel.conditioning", source=DERIVED,
       statement=r"With a fixed generalized spectrum the tangential condition number of $\Psi_B$ grows like $\kappa_B$ to $\kappa_B^2$ and that of "
                 r"PLAM more slowly, while that of $\Psi_R$ does not depend on $\kappa_B$.",
       fast={"count": 8}, full={"count": 64})
def _(check: Check, count: int) -> None:
    medians: dict[str, list[float]] = {name: [] for name in EXPECTED}
    for condition in CONDITIONS:
        for name, operator in _operators(*_pencils(18, condition, count)[1:]).items():
            values = np.linalg.eigvals(operator).real
            medians[name].append(float(np.median(values.max(1) / values.min(1))))
    for name, expected in EXPECTED.items():
        text = ", ".join(f"{value:.3g}" for value in medians[name])
        check.between(f"{name}: median over the number of the specification", np.array(medians[name]) / np.array(expected), 0.4, 2.5,
                      note=f"{text} for condition 1, 10, 100, 1000")
    check.equal("relative_solved: medians", np.array(medians["relative_solved"]), (VALUES[0] - VALUES[-1]) / (VALUES[P - 1] - VALUES[P]), 1e-6)
    check.above("relative over plam at condition 1000", medians["relative"][-1] / medians["plam"][-1], 3)


@claim("stiefel.local-rate", source=BOTH,
       statement=r"Near a solution landing contracts by $1 - \eta(\lambda_p - \lambda_{p+1})$ with $\Psi_R$, and by the extreme eigenvalue of its "
                 r"tangential operator with $\Psi_B$; with $\Psi_R$ it is stable for $\eta < 2/(\lambda_1 - \lambda_n)$ and no longer.",
       fast={"steps": 1200}, full={"steps": 4000})
def _(check: Check, steps: int) -> None:
    a, b, vectors = _pencils(19, 10.0, 1)
    solution, omega = vectors[:, :, :P], 2.0
    x = solution + 1e-4 * normal(19, "away", 1, N, P)
    for tangent, kind, eta in (("relative_solved", "newton_schulz", 0.25), ("relative", "gradient", 0.3)):
        values = np.linalg.eigvals(_operators(b, vectors)[tangent]).real
        path = np.asarray(follow(a, b, x, eta, omega, steps, tangent, kind))[:, 0]
        overlap = t(vectors[0, :, P:]) @ b[0] @ path                                    # 0 at every basis of the solution
        away = norm(overlap)
        late = (away > 1e-11) & (np.arange(steps + 1) > 60)
        at = np.flatnonzero(late)[-1]
        measured = (away[at] / away[at - 20]) ** (1 / 20)
        check.equal(f"{tangent}: contraction over 20 late steps", measured, np.abs(1 - eta * values).max(), 2e-4)
        check.below(f"{tangent}: |h| there", norm(residuals(b[0], path[at])), 1e-9)
    limit = 2 / (VALUES[0] - VALUES[-1])
    for share in (0.97, 1.03):
        path = np.asarray(follow(a, b, x, share * limit, 0.5 / (share * limit), steps, "relative_solved", "newton_schulz"))[:, 0]
        away = norm(t(vectors[0, :, P:]) @ b[0] @ path)
        label = f"relative_solved: distance to the solution at {share:g} of the largest step"
        check.below(label, away[-1], 1e-6) if share < 1 else check.above(label, np.nanmax(away), 1e-2)
