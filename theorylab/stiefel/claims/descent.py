"""Descent of the merit function, the rate that follows from it, and where a penalty ends instead."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.iterate import iterate
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.stiefel.baselines import QuadraticPenalty
from theorylab.stiefel.claims._programs import BOTH, DERIVED, basis, field_at, instances, norm, spectral
from theorylab.stiefel.eigen import GEVP
from theorylab.stiefel.landing import Landing
from theorylab.stiefel.quantities import merit

RADIUS = 0.5
PENALTY = 1.0
N, P = 8, 3


@jax.jit
def _slopes(problem: GEVP, x: Any) -> jax.Array:
    """Gradients of the merit function at points along the leading axis."""
    return jax.vmap(jax.grad(lambda x: merit(problem, x, PENALTY)))(x)


def _problem(seed: int) -> GEVP:
    """B with eigenvalues from 1 to 1/10 and A with eigenvalues from 1 to -1/2, in random directions."""
    vectors = basis(seed, "eigenvectors", 2, N)
    return GEVP(spectral(vectors[0], np.linspace(1, -0.5, N)), spectral(vectors[1], np.linspace(1, 0.1, N)), p=P)


def _points(problem: GEVP, seed: int, count: int) -> np.ndarray:
    """Points of the safe region of the problem."""
    b = np.asarray(problem.operator.matrix())
    plain = instances(seed, (N, P), count, distance=RADIUS)
    lower = np.linalg.cholesky(b)
    return np.linalg.solve(lower.T, np.swapaxes(np.linalg.cholesky(plain.b), 1, 2) @ plain.x)   # the same X'BX for this B


@claim("stiefel.merit-rate", source=BOTH,
       statement=r"$L = f - \langle\lambda, h\rangle + \mu N$ satisfies $\langle\nabla L, \Lambda\rangle \ge \frac\rho2\lVert\Lambda\rVert^2$ on "
                 r"the safe region for $\mu$ large enough, so that with a constant step $\eta \le \min(\eta_{safe}, \rho/(2L_L))$ the mean of "
                 r"$\lVert\Lambda(X_k)\rVert^2$ over K steps is at most $4(L(X_0) - L_*)/(\eta\rho K)$.",
       fast={"points": 288, "steps": 5000}, full={"points": 2880, "steps": 20_000})
def _(check: Check, points: int, steps: int) -> None:
    problem = _problem(15)
    a, b = (np.asarray(op.matrix()) for op in (problem.cost, problem.operator))
    rho, x = 1 / (1 + RADIUS), _points(problem, 15, points)                             # the largest eigenvalue of B is 1
    field = np.asarray(field_at(a, b, x, 1.0, "relative", "gradient"))
    slopes = np.asarray(_slopes(problem, x))
    descent, square = np.sum(slopes * field, axis=(1, 2)), norm(field) ** 2
    h = np.swapaxes(x, 1, 2) @ b @ x - np.eye(P)
    pull = norm(b @ x @ h) ** 2                                                         # what mu multiplies in <grad L, field>
    needed = PENALTY + np.max((rho / 2 * square - descent) / pull)
    check.above(f"<grad L, field> over rho/2 |field|^2 for mu = {PENALTY:g}", descent / (rho / 2 * square), 1.0, note=f"mu needed: {needed:.3g}")
    few, t = x[: points // (N * P)], 1e-5
    shifts = t * np.eye(N * P).reshape(-1, N, P)
    both = [np.asarray(_slopes(problem, (few[:, None] + s * shifts).reshape(-1, N, P))).reshape(len(few), N * P, N * P) for s in (1, -1)]
    hessian = (both[0] - both[1]) / (2 * t)
    check.below("asymmetry of the Hessian of L from differences, relative", norm(hessian - np.swapaxes(hessian, 1, 2)) / norm(hessian), 1e-5)
    smooth = np.abs(np.linalg.eigvalsh((hessian + np.swapaxes(hessian, 1, 2)) / 2)).max()
    eta = rho / (2 * smooth)
    start = jnp.asarray(few[0])
    method = Landing(eta, 1.0, "relative", "gradient", safe=RADIUS, rule="rigorous", margin=1.0)
    sol = iterate(problem, method, start, steps=steps)
    check.equal("smallest step taken over the step chosen", np.min(sol.history["step_size"][1:]) / eta, 1.0, 1e-12, note="the safe step never cuts")
    drop = float(merit(problem, start, PENALTY)) - float(merit(problem, sol.value, PENALTY))
    mean = np.cumsum(np.asarray(sol.history["field_norm"])[:-1] ** 2) / np.arange(1, steps + 1)
    bound = 4 * drop / (eta * rho * np.arange(1, steps + 1))
    check.below("mean of |field|^2 over its bound, for every K", mean / bound, 1.0, note=f"smoothness of L about {smooth:.3g}")
    late = np.arange(steps // 10, steps + 1, steps // 10)
    check.slope("mean of |field|^2 against K", late, mean[late - 1], expected=-1.0, tol=0.02)
    check.below("|field| in the end", np.asarray(sol.history["field_norm"])[-1], 1e-6)


@claim("stiefel.penalty-bias", source=DERIVED,
       statement=r"Gradient descent on $f + \omega N$ for the generalized eigenvalue problem ends where $X^\top BX$ has the eigenvalues $1 + "
                 r"\lambda_i/\omega$: off the manifold, unlike landing with any attraction.",
       fast={"steps": 6000}, full={"steps": 20_000})
def _(check: Check, steps: int) -> None:
    from scipy.linalg import eigh

    problem = _problem(16)
    a, b = (np.asarray(op.matrix()) for op in (problem.cost, problem.operator))
    values = eigh(a, b, eigvals_only=True)[::-1][:P]
    start = jnp.asarray(_points(problem, 16, 1)[0])
    for omega in (10.0, 30.0):
        x = np.asarray(iterate(problem, QuadraticPenalty(0.5 / omega, penalty=omega), start, steps=steps, every=steps).value)
        check.equal(f"omega {omega:g}: eigenvalues of X'BX", np.linalg.eigvalsh(x.T @ b @ x)[::-1], 1 + values / omega, 1e-8)
    method = Landing(0.1, 1.0, "relative", "gradient", safe=RADIUS, rule="rigorous", margin=1.0)
    sol = iterate(problem, method, start, steps=steps)
    check.below("landing: |h| in the end", sol.history["infeasibility"][-1], 1e-9)
