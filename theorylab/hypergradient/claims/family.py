"""The family of the experiments (selection of regularization) and worked scalar cases: constants in closed form, and maps that cancel the error."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.module import Module
from theorylab.hypergradient.analysis import efficiency_constant
from theorylab.hypergradient.bilevel import Bilevel
from theorylab.hypergradient.claims._programs import BOTH, DERIVED, T, draw, estimates, logistic, norms, penalties, ridge
from theorylab.hypergradient.estimators import Hypergradient, NewtonPoint, OnePoint, Plain, Preconditioned, compiled
from theorylab.hypergradient.inner import reference
from theorylab.hypergradient.reparametrize import Reparametrized
from theorylab.hypergradient.selection import RidgeSelection
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check

WAYS = {"Plain": Plain(), "NewtonPoint": NewtonPoint(), "OnePoint": OnePoint(), "Precond": Preconditioned(), "PzPhi": Reparametrized("linear"),
        "ExpPhi": Reparametrized("exponential"), "OptPhi": Reparametrized("hessian")}
"""The estimators of the library; those of the paper by the names of its code."""


def _slope_and_weight(curved: bool, t: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and second derivative of the losses at the margins t."""
    if not curved:
        return t - b, np.ones(len(b))
    up = (1 + np.tanh(t / 2)) / 2
    return -b * (1 - np.tanh(b * t / 2)) / 2, up * (1 - up)


class Parts:
    """The pieces of a problem of the family at (x, y), in NumPy from the data alone."""

    def __init__(self, problem: Any, x: Any, y: Any):
        A, b, x, y = (np.asarray(a) for a in (problem.A, problem.b, x, y))
        N, p = A.shape
        curved = type(problem).__name__ == "LogisticSelection"
        self.x, self.D = x, np.exp(y) / p
        slope, weight = _slope_and_weight(curved, A @ x, b)
        bend, self.weight = -weight * np.tanh(A @ x / 2) if curved else np.zeros(N), weight
        self.F = A.T @ slope / N + self.D * x
        self.H = (A.T * weight) @ A / N + np.diag(self.D)
        self.G2, self.G11 = np.zeros(p), np.zeros((p, p))
        if problem.objective == "linear":
            self.G1, self.G2 = np.asarray(problem.b_out), 2 * y
        else:
            A_out, mean = np.asarray(problem.A_out), problem.objective == "validation"
            slope, outer = _slope_and_weight(curved and mean, A_out @ x, np.asarray(problem.b_out))
            rows = len(A_out) if mean else 1
            self.G1, self.G11 = A_out.T @ slope / rows, (A_out.T * outer) @ A_out / rows
        self.v = np.linalg.solve(self.H, self.G1)
        self.J = -np.linalg.solve(self.H, np.diag(self.D * x))
        self.W = (A.T * (bend * (A @ self.v))) @ A / N                       # F_11[h] v = W h
        self.M = np.eye(p) - self.H / np.diag(self.H)[:, None]

    def jacobians(self) -> dict[str, np.ndarray]:
        """The x-Jacobians of the estimators at the solution, shape (p, p)."""
        outer, bent, mixed = self.J.T @ self.G11, self.J.T @ self.W, np.diag(self.D * self.v)
        plain = outer - bent - mixed
        return {"Plain": plain, "Precond": plain @ self.M, "PzPhi": outer - bent - mixed @ self.M,
                "ExpPhi": plain - self.J.T @ np.diag(self.v / self.x) @ self.H, "OptPhi": outer - 2 * bent}


def values(problem: Any, xs: Any, y: Any) -> dict[str, Hypergradient]:
    """The results of all estimators that the problem has, at some points."""
    ways = {name: how for name, how in WAYS.items() if name != "OptPhi" or type(problem) is RidgeSelection}
    return estimates(ways, problem, xs, y)


def _solved(problem: Any) -> tuple[np.ndarray, np.ndarray]:
    y = penalties()
    return np.asarray(reference(problem, jnp.asarray(y))), y


@claim("hypergradient.linear-map", source=BOTH,
       statement=r"In the family, with P the diagonal of $F_1$, the linear map uses $F_2$ at the preconditioned point and $F_1$, $G_1$ at x. So it "
                 r"is the preconditioned estimator, identically, where E is quadratic and G affine. The other closed forms hold as well.",
       fast={"distances": (3.0, 1.0, 0.3, 0.1)})
def _(check: Check, distances: tuple[float, ...]) -> None:
    for problem in (ridge("linear"), ridge(), logistic()):
        star, y = _solved(problem)
        xs = star + np.array(distances)[:, None] * draw().d
        at = [Parts(problem, x, y) for x in xs]
        moved = [x - a.F / np.diag(a.H) for x, a in zip(xs, at, strict=True)]
        name = f"{type(problem).__name__}, {problem.objective} G"
        found = {way: result.value for way, result in values(problem, xs, y).items()}
        linear, precond = found["PzPhi"], found["Precond"]
        closed = np.array([a.G2 - a.D * z * a.v for a, z in zip(at, moved, strict=True)])
        check.below(f"{name}: the linear map less its closed form, relative", norms(linear - closed) / norms(closed), 1e-14)
        there = [Parts(problem, z, y) for z in moved]
        closed = np.array([a.G2 - a.D * a.x * a.v for a in there])
        check.below(f"{name}: the preconditioned estimator less its closed form, relative", norms(precond - closed) / norms(closed), 1e-13)
        if problem.objective == "linear":
            check.below(f"{name}: the one less the other, relative", norms(linear - precond) / norms(precond), 1e-14)
        else:
            check.above(f"{name}: the one less the other, relative", norms(linear - precond) / norms(precond), 1e-6)
        closed = np.array([a.G2 - a.D * a.x * np.linalg.solve(a.H + np.diag(a.F / a.x), a.G1) for a in at])
        check.below(f"{name}: the exponential map less its closed form, relative", norms(found["ExpPhi"] - closed) / norms(closed), 1e-12)


@claim("hypergradient.precondition-or-map", source=BOTH,
       statement=r"Same P, $M = I - P^{-1}F_1$: $\Omega_1 M$ for preconditioning, $(G_{21} + J^\top G_{11}) - v\cdot F_{11}[\cdot]J - v\cdot "
                 r"F_{21}[M\cdot]$ for the linear map, $\Omega_1 - J^\top\mathrm{diag}(v/x^*)F_1$ for the exponential one. A good P ($\lVert "
                 r"M\rVert < 1$) serves preconditioning in all terms; a bad one damages the linear map in one.",
       fast={"step": 1e-5})
def _(check: Check, step: float) -> None:
    for problem in (ridge(), logistic()):
        x, y = _solved(problem)
        parts = Parts(problem, x, y)
        formula = parts.jacobians()
        up, down = (values(problem, x + s * step * np.eye(4), y) for s in (1, -1))
        for name in filter(up.__contains__, formula):
            found = ((up[name].value - down[name].value) / (2 * step)).T
            check.below(f"{type(problem).__name__}, {name}: formula less finite differences, relative",
                        np.linalg.norm(found - formula[name]) / np.linalg.norm(formula[name]), 6e-6)
        top = np.linalg.norm(formula["Plain"], 2)
        if type(problem) is RidgeSelection:
            found = float(efficiency_constant(problem, x, y).value)
            check.equal("RidgeSelection: efficiency_constant against the formula", found, top, 1e-12, relative=True)
        check.below(f"{type(problem).__name__}: constant of Precond over C |M|",
                    np.linalg.norm(formula["Precond"], 2) / (top * np.linalg.norm(parts.M, 2)), 1 + 1e-14)


@claim("hypergradient.hessian-map-quadratic", source=f"the official code of the paper; {DERIVED}",
       statement=r"For a quadratic inner energy the map $F_1(\hat x, y)^{-1}F(z, \hat y) + \hat x$ gives the exact Jacobian at every x, and only "
                 r"$G_1$ is at the wrong point: exact for affine G, and otherwise with the constant $\lVert G_{21} + J^\top G_{11}\rVert$.",
       fast={"distances": (30.0, 3.0, 1.0, 0.1)})
def _(check: Check, distances: tuple[float, ...]) -> None:
    for objective in ("linear", "quadratic"):
        problem = ridge(objective)
        x, y = _solved(problem)
        parts = Parts(problem, x, y)
        t = np.array(distances)
        error = values(problem, x + t[:, None] * draw().d, y)["OptPhi"].value - (parts.G2 + parts.J.T @ parts.G1)
        if objective == "linear":
            check.below("affine G: errors at distances up to 30", np.abs(error), 1e-13)
        else:
            check.below("quadratic G: error less t (G_21 + J' G_11) d, relative",
                        norms(error - t[:, None] * (parts.J.T @ parts.G11 @ draw().d)) / norms(error), 1e-12)


@claim("hypergradient.quadratic-energy", source=BOTH,
       statement=r"For ridge regression the estimate at the Newton point is exact at every distance, for every G; the one-point correction is exact "
                 r"for affine G only.",
       fast={"distances": (0.1, 1.0, 10.0, 30.0)})
def _(check: Check, distances: tuple[float, ...]) -> None:
    for objective in ("linear", "quadratic"):
        problem = ridge(objective)
        x, y = _solved(problem)
        parts = Parts(problem, x, y)
        found = values(problem, x + np.array(distances)[:, None] * draw().d, y)
        error = {way: norms(found[way].value - (parts.G2 + parts.J.T @ parts.G1)) for way in ("Plain", "NewtonPoint", "OnePoint")}
        check.below(f"{objective} G: NewtonPoint, errors at distances up to 30", error["NewtonPoint"], 2e-13)
        check.above(f"{objective} G: Plain at distance 30", error["Plain"][-1], 1)
        if objective == "linear":
            check.below("linear G: OnePoint, errors at distances up to 30", error["OnePoint"], 2e-13)
        else:
            check.above("quadratic G: OnePoint at distance 30", error["OnePoint"][-1], 1)


# ------------------------------------------------------------------------------------------------ whitening


class Power(Module):
    """H(y)^{-s} z for H = V diag(values + e^y) V'."""

    V: jax.Array
    values: jax.Array
    s: jax.Array

    def __call__(self, z, y):
        return self.V @ ((self.values + jnp.exp(y[0])) ** -self.s * (self.V.T @ z))


class Symmetric(Module):
    """H(y)^{-s} z for H = B + diag(e^y), by the eigenvectors of H, whose derivative is taken too."""

    B: jax.Array
    s: jax.Array

    def __call__(self, z, y):
        values, V = jnp.linalg.eigh(self.B + jnp.diag(jnp.exp(y)))
        return V @ (values**-self.s * (V.T @ z))


def _shared_energy(x, y, B, b, g):
    return x @ B @ x / 2 + jnp.sum(jnp.exp(y) * x**2) / 2 - b @ x


def _affine(x, y, B, b, g):
    return g @ x


def _whitened(kind: type, problem: Any, known: tuple, s: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.vmap(lambda s: Reparametrized(kind(*known, s)).estimate(problem, x, y).value)(s)


def whitening(kind: str, s: np.ndarray, seed: int, n: int = 4) -> np.ndarray:
    """The error of the map H^{-s} over that of the plain formula, for an affine G and a random quadratic E.

    Args:
        kind: `"shared"`, one ridge parameter; `"separate"`, one for each unknown (the ratio of norms then).
        s: exponents.
        seed: of the problem.
        n: unknowns.
    """
    rng = np.random.default_rng(seed)
    R, b, g, away = rng.standard_normal((n, n)), rng.standard_normal(n), rng.standard_normal(n), rng.standard_normal(n)
    B, y = R @ R.T / n + 0.1 * np.eye(n), rng.standard_normal(1 if kind == "shared" else n) / 2
    problem = Bilevel(_shared_energy, _affine, tuple(map(jnp.asarray, (B, b, g))), x=jnp.zeros(n), y=jnp.asarray(y))
    H = B + np.diag(np.exp(y) * np.ones(n))
    star = np.linalg.solve(H, b)
    each = -np.exp(y) * np.linalg.solve(H, g) * star
    truth, x = (each.sum(keepdims=True) if kind == "shared" else each), jnp.asarray(star + 0.3 * away)
    values, V = np.linalg.eigh(B)
    known = (jnp.asarray(V), jnp.asarray(values)) if kind == "shared" else (jnp.asarray(B),)
    found = compiled(_whitened, Power if kind == "shared" else Symmetric, problem, known, jnp.asarray(s), x, jnp.asarray(y))
    plain = -np.exp(y) * np.linalg.solve(H, g) * np.asarray(x)
    if kind == "shared":
        return (np.asarray(found)[:, 0] - truth[0]) / (plain.sum() - truth[0])
    return norms(np.asarray(found) - truth) / np.linalg.norm(plain - truth)


@claim("hypergradient.whitening", source=DERIVED,
       statement=r"Affine G, quadratic E, one shared ridge parameter, $\varphi = H(y)^{-s}z$: the error is multiplied by $1 - s$. Whitening, $s = "
                 r"1/2$, only halves it; at $s = 1$ the minimizer in z does not depend on y. With one parameter per feature $s = 1$ is still exact.",
       fast={"seeds": 3, "separate": False}, full={"seeds": 100, "separate": True})
def _(check: Check, seeds: int, separate: bool) -> None:
    s = np.array([0.0, 0.25, 0.5, 1.0, 1.5, 2.0])
    shared = np.array([whitening("shared", s, seed) for seed in range(seeds)])
    check.equal("one parameter: error over that of the plain formula, s = 0, 1/4, 1/2, 1, 3/2, 2", shared, np.tile(1 - s, (seeds, 1)), 1e-9)
    if separate:
        each = np.array([whitening("separate", s, seed) for seed in range(seeds)])
        check.equal("one per feature, s = 0", each[:, 0], 1.0, 1e-9)
        check.below("one per feature, s = 1", each[:, 3], 1e-9, note=f"at s = 1/2 between {each[:, 2].min():.3f} and {each[:, 2].max():.3f}")


# ------------------------------------------------------------------------------------------------ one unknown


class Monomial(Module):
    """z^q for positive z."""

    q: jax.Array

    def __call__(self, z, y):
        return z**self.q


def _scalar_energy(x, y, a, b):
    return a * x**2 / 2 - b * x + jnp.exp(y) * x**2 / 2


def _x(x, y, *args):
    return x


def _cosh(x, y):
    return jnp.cosh(x) - y * x


def _sinh_map(z, y):
    return jnp.arcsinh(z)


def _sinh(x, y):
    return jnp.sinh(x)


def _monomials(problem: Any, qs: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    def slope(q):
        value = lambda x: Reparametrized(Monomial(q), lambda x, y: x ** (1 / q)).estimate(problem, x, y).value  # noqa: E731
        return jax.jacfwd(value)(x)[0, 0]

    return jax.vmap(slope)(qs)


@claim("hypergradient.scalar-maps", source=DERIVED,
       statement=r"One unknown: a map that does not depend on y cancels the error of the Jacobian iff $\varphi''/\varphi'^2 = F_{21}/F_2 - "
                 r"F_{11}/F_1$ at the solution. For $E = \frac12ax^2 - bx + \frac12e^yx^2$, $c = a + e^y$: $x = z^q$ has the constant $-(e^y/c)/q$, "
                 r"and $x = \pm e^z$ the error $-(e^y/c)\delta^2/(x^* + 2\delta)$ exactly. For $E = \cosh x - yx$ it is $x = \mathrm{asinh}\,z$.",
       fast={"a": 1.3, "b": 0.9, "y": 0.4})
def _(check: Check, a: float, b: float, y: float) -> None:
    problem = Bilevel(_scalar_energy, _x, (jnp.asarray(a), jnp.asarray(b)), x=0.0, y=0.0)
    c, at = a + np.exp(y), jnp.array([y])
    x, gradient = b / c, -np.exp(y) * b / c**2
    q = np.array([1.0, 2.0, 3.0, 5.0, -1.0, -2.0])
    check.equal("x = z^q: constants, q = 1, 2, 3, 5, -1, -2", np.asarray(compiled(_monomials, problem, jnp.asarray(q), jnp.array([x]), at)),
                -np.exp(y) / c / q, 1e-13)
    for sign in (1.0, -1.0):
        other = Bilevel(_scalar_energy, _x, (jnp.asarray(a), jnp.asarray(sign * b)), x=0.0, y=0.0)
        delta = np.array([0.5, 0.1, -0.1, -0.4]) * x
        found = estimates({"map": WAYS["ExpPhi"]}, other, sign * (x + delta)[:, None], at)["map"].value[:, 0]
        check.equal(f"x = {'+' if sign > 0 else '-'}e^z: error against the formula", found - sign * gradient,
                    -sign * np.exp(y) / c * delta**2 / (x + 2 * delta), 1e-15)
    bent = Bilevel(_cosh, _x, x=0.0, y=0.0)
    xs, one = np.arcsinh(1.0) + T[:, None], jnp.array([1.0])
    found = estimates({"map": Reparametrized(_sinh_map, _sinh)}, bent, xs, one)["map"].value[:, 0] - 0.5**0.5
    check.equal("x = asinh z: |error| / t^2 at t = 0.0001", abs(found[3]) / T[3] ** 2, 0.1767, 1e-4)


@claim("hypergradient.separable-maps", source=BOTH,
       statement=r"With a diagonal Hessian and affine G the exponential map is super-efficient, with the scalar formula in each coordinate. For a "
                 r"Hessian that is not diagonal no map without y is: $\mathrm{diag}(h/x^*)F_1$ would have to be symmetric for all h.",
       fast={"scale": 0.2})
def _(check: Check, scale: float) -> None:
    general, rng = ridge("linear"), np.random.default_rng(5)
    columns = 3 * np.linalg.qr(np.asarray(general.A))[0]
    problem = RidgeSelection((jnp.asarray(columns), general.b), (None, general.b_out), "linear")
    y, g = penalties(), np.asarray(general.b_out)
    D, N = np.exp(y) / 4, len(columns)
    c = 9 / N + D
    x = columns.T @ np.asarray(general.b) / N / c
    delta = scale * x * rng.uniform(-1, 1, (4, 4))
    found = values(problem, x + delta, y)["ExpPhi"].value - (2 * y - g * D * x / c)
    formula = -g * D / c * delta**2 / (x + 2 * delta)
    check.below("diagonal Hessian: error less -g (D / c) d^2 / (x* + 2 d) in each coordinate", np.abs(found - formula), 1e-14)
    x, y = _solved(general)
    parts = Parts(general, x, y)
    off = max(np.linalg.norm(S - S.T) for S in (np.diag(h / x) @ parts.H for h in np.eye(4)))
    check.above("another Hessian: asymmetry of diag(h / x*) F_1", off, 0.1)
    check.above("another Hessian: constant of the exponential map", np.linalg.norm(parts.jacobians()["ExpPhi"], 2), 1e-2)
