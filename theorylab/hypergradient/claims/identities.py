"""Identities: the hypergradient itself, the derivative of its estimate, the Hessian of the outer problem, and errors written exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.hypergradient.analysis import PlainJacobian, value_correction
from theorylab.hypergradient.claims._programs import BOTH, DERIVED, case, draw, estimates, measure, rooted, solution, tensors
from theorylab.hypergradient.estimators import Plain, compiled
from theorylab.hypergradient.linear import LU
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check

SOLUTION = np.array([0.384749771213, 0.060224964623, -0.221445912118, -0.811741096012])
GRADIENT = np.array([1.188568274063, -0.057092888186, 0.443384580765])
CONSTANT, TURNED = 4.928050347235, 1.393603662841
ROUND = 6e-13                           # half a unit of the last printed digit, and some


@claim("hypergradient.implicit-formula", source=BOTH,
       statement=r"$\nabla L(y) = \Omega(x^*(y), y)$ with $\Omega = G_2 - F_2^\top v$, $F_1^\top v = G_1$: the central differences of L, step "
                 r"$10^{-5}$ and the inner problem solved again, agree to $10^{-9}$, also for a root problem whose $F_1$ is not symmetric.",
       fast={"step": 1e-5})
def _(check: Check, step: float) -> None:
    one = case()
    check.equal("the solution of the generic problem", one.x, SOLUTION, ROUND)
    check.equal("its outer value", one.at.G, 10.278912551589, 1e-11)
    value = measure(one, np.tile(one.x, (4, 1)))["Plain"].value[0]
    check.equal("Plain at the solution", value, GRADIENT, ROUND)
    check.below("Plain less the central differences of L", np.abs(value - _differences(one.rooted, one.y, step)), 1e-9)
    turned = rooted(skew=1.0)
    x = solution(turned, one.y)
    at = tensors(turned, x, one.y)
    truth = _differences(turned, one.y, step)
    check.above("root problem: |F_1 - F_1'|", np.linalg.norm(at.F1 - at.F1.T), 0.1)
    value = estimates({"Plain": Plain(linear=LU())}, turned, x[None], one.y)["Plain"].value[0]
    check.below("root problem: Plain less the central differences", np.abs(value - truth), 1e-9)
    wrong = at.G2 - at.F2.T @ np.linalg.solve(at.F1, at.G1)
    check.above("root problem: error of the formula with F_1 in place of its transpose", np.linalg.norm(wrong - truth), 0.1)


def _differences(problem, y: np.ndarray, step: float) -> np.ndarray:
    """Central differences of L."""
    value = lambda y: tensors(problem, solution(problem, y), y).G  # noqa: E731
    return np.array([(value(y + step * e) - value(y - step * e)) / (2 * step) for e in np.eye(len(y))])


def _points(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [(rng.standard_normal(4), rng.standard_normal(3)) for _ in range(count)]


def _products(problem, x, y):
    """The x-Jacobian of the plain formula by the forward and by the backward products of the library."""
    J = PlainJacobian(problem, x, y)
    return jax.vmap(lambda h: J.forward(h, J.v), out_axes=1)(jnp.eye(len(x))), jax.vmap(lambda u: J.backward(u, J.v))(jnp.eye(len(y)))


@claim("hypergradient.lagrangian-form", source=DERIVED,
       statement=r"At every (x, y), with the adjoint v and J frozen, $\Omega_1 h = \Lambda_{21}h + J^\top\Lambda_{11}h = (G_{21} + J^\top G_{11})h "
                 r"- (F_{21}[h] + F_{11}[h]J)^\top v$. A product with $\Omega_1$ takes one adjoint solve, with its transpose one forward solve, so "
                 r"200 power iterations give $C_y$ to 15 digits without a matrix.",
       fast={"points": 6}, full={"points": 300})
def _(check: Check, points: int) -> None:
    one = case()
    off, forward, backward = [], [], []
    for x, y in [(one.x, one.y), *_points(points)]:
        at = tensors(one.rooted, x, y)
        formula = at.limit - np.stack([at.bend(h).T @ at.v for h in np.eye(4)], axis=1)
        size = np.linalg.norm(at.limit) + np.linalg.norm(formula)
        off.append(np.linalg.norm(formula - at.omega1) / size)
        found = [np.asarray(a) for a in compiled(_products, one.problem, jnp.asarray(x), jnp.asarray(y))]
        forward.append(np.linalg.norm(found[0] - at.omega1) / size)
        backward.append(np.linalg.norm(found[1] - at.omega1) / size)
    check.below("formula less the derivative of Omega by autodiff, relative", np.array(off), 1e-14)
    check.below("forward products of the library less the same", np.array(forward), 1e-14)
    check.below("backward products of the library less the same", np.array(backward), 1e-14)
    forward, backward = map(np.asarray, compiled(_products, one.problem, jnp.asarray(one.x), jnp.asarray(one.y)))
    h = np.ones(4)
    for _ in range(200):
        h = backward.T @ (forward @ h)
        h /= np.linalg.norm(h)
    exact = np.linalg.svd(one.at.omega1, compute_uv=False)[0]
    check.equal("largest singular value of the autodiff derivative", exact, CONSTANT, ROUND)
    check.equal("200 power iterations against it", np.linalg.norm(forward @ h), exact, 1e-14, relative=True)


@claim("hypergradient.outer-hessian", source=DERIVED,
       statement=r"$\nabla^2 L = \Omega_2 + \Omega_1 J$ at the solution. The right side is $\Lambda_{22} + \Lambda_{21}J + (\Lambda_{21}J)^\top + "
                 r"J^\top\Lambda_{11}J$ and therefore symmetric at every (x, y).",
       fast={"points": 6, "step": 1e-5}, full={"points": 300, "step": 1e-5})
def _(check: Check, points: int, step: float) -> None:
    one = case()
    off, skew = [], []
    for x, y in _points(points):
        at = tensors(one.rooted, x, y)
        H, J, v = at.omega2 + at.omega1 @ at.J, at.J, at.v
        L11, L12, L22 = (G - np.tensordot(v, F, 1) for G, F in ((at.G11, at.F11), (at.G12, at.F12), (at.G22, at.F22)))
        formula = L22 + L12.T @ J + (L12.T @ J).T + J.T @ L11 @ J
        size = np.linalg.norm(at.omega2) + np.linalg.norm(at.omega1 @ J)
        off.append(np.linalg.norm(H - formula) / size)
        skew.append(np.linalg.norm(H - H.T) / size)
    check.below("away from the solution: both sides by autodiff, relative", np.array(off), 1e-14)
    check.below("away from the solution: asymmetry, relative", np.array(skew), 1e-14)
    gradient = lambda y: tensors(one.rooted, solution(one.rooted, y), y).omega  # noqa: E731
    rows = np.array([(gradient(one.y + step * e) - gradient(one.y - step * e)) / (2 * step) for e in np.eye(3)])
    check.below("at the solution: less the central differences of the gradient", np.abs(one.at.omega2 + one.at.omega1 @ one.at.J - rows), 1e-9)


@claim("hypergradient.adjoint-residual", source=DERIVED,
       statement=r"For any $\hat v$ with $r = G_1 - F_1^\top\hat v$: $G_2 - F_2^\top\hat v = \Omega(x, y) - J^\top r$ exactly.",
       fast={"points": 6}, full={"points": 300})
def _(check: Check, points: int) -> None:
    off = []
    for skew in (0.0, 1.0):
        problem = rooted(skew=skew)
        for i, (x, y) in enumerate(_points(points)):
            at, v = tensors(problem, x, y), np.random.default_rng(i).standard_normal(4)
            r = at.G1 - at.F1.T @ v
            off.append(np.linalg.norm(at.G2 - at.F2.T @ v - at.omega + at.J.T @ r) / (np.linalg.norm(at.omega) + np.linalg.norm(at.J.T @ r)))
    check.below("any v, energy and root problem, relative", np.array(off), 1e-14)


@claim("hypergradient.global-identity", source=DERIVED,
       statement=r"For any x and any $\hat v$, with $\Delta$ the change from $x^*$ to x at frozen $\hat v$: $\hat\Omega - \nabla L = "
                 r"\Delta\Lambda_y + J(x^*)^\top\Delta\Lambda_x - J(x^*)^\top r$, with no smallness; certificates rest on it.",
       fast={"points": 6}, full={"points": 300})
def _(check: Check, points: int) -> None:
    off, far = [], []
    for skew in (0.0, 1.0):
        problem, y = rooted(skew=skew), draw().y
        star = tensors(problem, solution(problem, y), y)
        for i, (x, _) in enumerate(_points(points)):
            v = np.random.default_rng(i).standard_normal(4)
            at = tensors(problem, 3 * x, y)
            (y_here, r), (y_star, x_star) = ((a.G2 - a.F2.T @ v, a.G1 - a.F1.T @ v) for a in (at, star))
            error = y_here - star.omega
            exact = y_here - y_star + star.J.T @ (r - x_star) - star.J.T @ r
            off.append(np.linalg.norm(error - exact) / np.linalg.norm(error))
            far.append(np.linalg.norm(error))
    check.below("both sides, relative", np.array(off), 1e-13)
    check.above("error that is explained, the least", min(far), 0.1)


@claim("hypergradient.value-correction", source=DERIVED,
       statement=r"$|G(x, y) - v(x, y)^\top F(x, y) - L(y)| = O(\lVert\delta\rVert^2)$ with leading term $-\frac12\delta^\top\Lambda_{11}\delta$, "
                 r"against $O(\lVert\delta\rVert)$ for $G(x, y)$.",
       fast={"distances": (1e-1, 1e-2, 1e-3, 1e-4)})
def _(check: Check, distances: tuple[float, ...]) -> None:
    one, d = case(), draw().d
    leading = -d @ (one.at.G11 - np.tensordot(one.at.v, one.at.F11, 1)) @ d / 2
    check.equal("the leading coefficient", leading, -0.40173, 5e-6)
    found, raw = [], []
    for t in distances:
        x = one.x + t * d
        found.append((float(value_correction(one.problem, x, one.y)) - one.at.G) / t**2)
        raw.append((tensors(one.rooted, x, one.y).G - one.at.G) / t)
    check.below("error / t^2 less it, over t", np.abs(np.array(found) - leading)[:3] / np.array(distances[:3]), 2, note=str(np.round(found, 5)))
    check.equal("error / t^2 at the smallest t", found[-1], -0.4017, 5e-5)
    check.equal("without the correction: error / t at the smallest t, against G_1 d", raw[-1], one.at.G1 @ d, 1e-3)
    check.above("that number, in size", abs(one.at.G1 @ d), 0.1)
