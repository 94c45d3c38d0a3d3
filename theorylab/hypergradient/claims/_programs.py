"""What the claims share: the generic problem of the companion derivation, its derivatives by dense autodiff, and errors along a line."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core.module import Module
from theorylab.hypergradient.baselines import OneStep
from theorylab.hypergradient.bilevel import Bilevel
from theorylab.hypergradient.estimators import Estimator, Hypergradient, NewtonPoint, OnePoint, Plain, Polish, Preconditioned, compiled
from theorylab.hypergradient.reparametrize import Reparametrized
from theorylab.hypergradient.selection import LogisticSelection, RidgeSelection

Array = jax.Array
PAPER = "Ye, Peyré, Cremers and Ablin, Enhancing Hypergradients Estimation"
DERIVED = "companion derivation"
BOTH = f"{PAPER}; {DERIVED}"
T = np.array([1e-1, 1e-2, 1e-3, 1e-4])
"""Distances to the inner solution."""


# ------------------------------------------------------------------------------------------------ problems


def _energy(x, y, A, b, W, Q, c, Bq, linear, affine, skew):
    scale = jnp.exp(0.3 * (W @ y))
    return (jnp.sum(jax.nn.softplus(A @ x - b * (1 + 0.1 * jnp.sum(y)))) + jnp.sum(scale * x**2) / 2 + 0.05 * jnp.sum(x**4)
            + 0.1 * jnp.sum(jnp.sin(x) * jnp.cos(W @ y)))


def _outer(x, y, A, b, W, Q, c, Bq, linear, affine, skew):
    bent = jnp.sum((Q @ x - c) ** 2) / 2 + y @ jnp.sin(Bq @ x) + 0.3 * y @ y + jnp.sum(jnp.cosh(0.3 * x))
    return (1 - affine) * bent + affine * (linear @ x + jnp.sum(jnp.cos(y)))


def _residual(x, y, A, b, W, Q, c, Bq, linear, affine, skew):
    """The gradient of the energy, plus a rotation that depends on y where `skew` is not 0."""
    turn = (1 + 0.2 * y[0]) * (jnp.tanh(Q - Q.T) @ x) + 0.1 * jnp.roll(x, 1) * x
    return jax.grad(_energy)(x, y, A, b, W, Q, c, Bq, linear, affine, skew) + skew * turn


class _Draw(NamedTuple):
    args: tuple
    y: np.ndarray
    d: np.ndarray
    rho: np.ndarray


@cache
def draw() -> _Draw:
    """The arrays of the generic problem (n = 4, m = 3), in the draw order of the companion derivation."""
    rng = np.random.default_rng(0)
    A, b, W, Q, c, Bq = (rng.standard_normal(shape) for shape in ((9, 4), 9, (4, 3), (4, 4), 4, (3, 4)))
    y, d, linear, rho = rng.standard_normal(3), rng.standard_normal(4), rng.standard_normal(4), rng.standard_normal(4)
    return _Draw((A, b, W, Q, c, Bq, linear), y, d / np.linalg.norm(d), rho / np.linalg.norm(rho))


def generic(affine: float = 0.0) -> Bilevel:
    """The generic problem; `affine` = 1 replaces G by an objective that is affine in x and not coupled to y."""
    return Bilevel(_energy, _outer, _arguments(affine, 0.0), x=jnp.zeros(4), y=jnp.asarray(draw().y))


def rooted(affine: float = 0.0, skew: float = 0.0) -> Bilevel:
    """The same by its residual, or with `skew` = 1 a root problem that is no gradient."""
    return Bilevel(None, _outer, _arguments(affine, skew), residual=_residual, x=jnp.zeros(4), y=jnp.asarray(draw().y))


def _arguments(affine: float, skew: float) -> tuple:
    return (*(jnp.asarray(a) for a in draw().args), jnp.asarray(affine), jnp.asarray(skew))


def ridge(objective: str = "quadratic") -> RidgeSelection:
    """A ridge problem of the family (n = m = 4) from the same arrays."""
    A, b, _, Q, c, *_ = draw().args
    return RidgeSelection((jnp.asarray(A), jnp.asarray(b)), (jnp.asarray(Q), jnp.asarray(c)), objective)


def logistic() -> LogisticSelection:
    """A logistic problem of the family (n = m = 4) from the same arrays."""
    A, b, _, Q, c, *_ = draw().args
    return LogisticSelection((jnp.asarray(A), jnp.asarray(np.sign(b))), (jnp.asarray(Q), jnp.asarray(np.sign(c))))


def penalties() -> np.ndarray:
    """The y of the ridge and the logistic problem."""
    return draw().args[6]


# ------------------------------------------------------------------------------------------------ derivatives


class Tensors(NamedTuple):
    """F, G and their derivatives at one point by autodiff: `F12[k, i, a]` is that of `F1[k, i]` in `y[a]`; `omega` is G_2 + J' G_1."""

    F: np.ndarray
    F1: np.ndarray
    F2: np.ndarray
    F11: np.ndarray
    F12: np.ndarray
    F22: np.ndarray
    G: np.ndarray
    G1: np.ndarray
    G2: np.ndarray
    G11: np.ndarray
    G12: np.ndarray
    G22: np.ndarray
    omega: np.ndarray
    omega1: np.ndarray
    omega2: np.ndarray

    @property
    def J(self) -> np.ndarray:
        """The Jacobian of the solution, shape (n, m)."""
        return -np.linalg.solve(self.F1, self.F2)

    @property
    def v(self) -> np.ndarray:
        """The adjoint."""
        return np.linalg.solve(self.F1.T, self.G1)

    @property
    def newton(self) -> np.ndarray:
        """The Newton step."""
        return np.linalg.solve(self.F1, self.F)

    @property
    def limit(self) -> np.ndarray:
        """G_21 + J' G_11, shape (m, n)."""
        return self.G12.T + self.J.T @ self.G11

    def bend(self, h: np.ndarray) -> np.ndarray:
        """F_21[h] + F_11[h] J, shape (n, m)."""
        return np.einsum("kia,i->ka", self.F12, h) + (self.F11 @ h) @ self.J


def plain_formula(F: Any, G: Any, x: Any, y: Any) -> Any:
    """G_2 + J' G_1 by dense autodiff."""
    J = -jnp.linalg.solve(jax.jacfwd(F)(x, y), jax.jacfwd(F, 1)(x, y))
    return jax.grad(G, 1)(x, y) + J.T @ jax.grad(G)(x, y)


@eqx.filter_jit
def _tensors(problem: Any, x: Any, y: Any) -> Any:
    F, G = problem.residual, problem.outer
    F1, F2, G1, G2 = jax.jacfwd(F), jax.jacfwd(F, 1), jax.grad(G), jax.grad(G, 1)
    omega = lambda x, y: plain_formula(F, G, x, y)  # noqa: E731
    return (F(x, y), F1(x, y), F2(x, y), jax.jacfwd(F1)(x, y), jax.jacfwd(F1, 1)(x, y), jax.jacfwd(F2, 1)(x, y), G(x, y), G1(x, y), G2(x, y),
            jax.jacfwd(G1)(x, y), jax.jacfwd(G1, 1)(x, y), jax.jacfwd(G2, 1)(x, y), omega(x, y), *jax.jacfwd(omega, (0, 1))(x, y))


def tensors(problem: Any, x: Any, y: Any) -> Tensors:
    """All derivatives at (x, y)."""
    return Tensors(*map(np.asarray, _tensors(problem, jnp.asarray(x), jnp.asarray(y))))


def solution(problem: Any, y: Any) -> np.ndarray:
    """The inner solution to round-off by Newton's method on these derivatives, halved while the residual grows."""
    x = np.zeros(problem.n)
    at = tensors(problem, x, y)
    for _ in range(60):
        size, move = 1.0, at.newton
        after = tensors(problem, x - move, y)
        while np.linalg.norm(after.F) > np.linalg.norm(at.F) and size > 1e-3:
            size /= 2
            after = tensors(problem, x - size * move, y)
        x, at = x - size * move, after
        if np.linalg.norm(move) <= 1e-15 * max(1.0, float(np.linalg.norm(x))):
            return x
    return x


class Case(NamedTuple):
    """The generic problem with its inner solution, the hypergradient there, and all derivatives."""

    problem: Any
    rooted: Any
    x: np.ndarray
    y: np.ndarray
    at: Tensors

    @property
    def gradient(self) -> np.ndarray:
        """The hypergradient: the formula at the solution, which `hypergradient.implicit-formula` compares with finite differences."""
        return self.at.omega


@cache
def case(affine: bool = False) -> Case:
    """The generic problem, with the affine outer objective if asked."""
    form, y = rooted(float(affine)), draw().y
    x = solution(form, y)
    return Case(generic(float(affine)), form, x, y, tensors(form, x, y))


# ------------------------------------------------------------------------------------------------ errors


def _each(ways: dict[str, Estimator], problem: Any, xs: Array, y: Array) -> Any:
    return {name: jax.vmap(lambda x, how=how: how.estimate(problem, x, y))(xs) for name, how in ways.items()}


def estimates(ways: dict[str, Estimator], problem: Any, xs: Any, y: Any) -> dict[str, Hypergradient]:
    """The results of estimators of the library at each of some points, in one program; equal shapes share it."""
    return jax.tree.map(np.asarray, compiled(_each, ways, problem, jnp.asarray(xs), jnp.asarray(y)))


def measure(one: Case, xs: Any) -> dict[str, Hypergradient]:
    """The results of all estimators on the generic problem at four points."""
    P = jnp.diagonal(jnp.asarray(one.at.F1))
    ways = {"Plain": Plain(), "NewtonPoint": NewtonPoint(), "OnePoint": OnePoint(), "Polish": Polish(), "OneStep": OneStep(),
            "Precond": Preconditioned(P, steps=3), "agnostic": Reparametrized("outer_agnostic")}
    return estimates(ways, one.problem, xs, one.y)


def line(one: Case, t: np.ndarray = T) -> np.ndarray:
    """The points at the distances t from the solution, along d."""
    return one.x + t[:, None] * draw().d


def errors(name: str, one: Case, power: int) -> np.ndarray:
    """Errors of an estimator along the line over t^power, a row for each t."""
    return (measure(one, line(one))[name].value - one.gradient) / T[:, None] ** power


def norms(rows: np.ndarray) -> np.ndarray:
    """Euclidean norms of rows."""
    return np.linalg.norm(rows, axis=-1)


# ------------------------------------------------------------------------------------------------ changes of variable


class Chart(Module):
    """The map z -> x of second degree with these derivatives at (z, y): A, B of first order, K mixed, M of second order in z."""

    x: Array
    z: Array
    y: Array
    A: Array
    B: Array
    K: Array
    M: Array

    def __call__(self, z: Array, y: Array) -> Array:
        u, w = z - self.z, y - self.y
        return self.x + self.A @ u + self.B @ w + (self.K @ w) @ u + (self.M @ u) @ u / 2


def chart(x: np.ndarray, y: np.ndarray, *, z: Any = None, A: Any = None, B: Any = None, K: Any = None, M: Any = None) -> Chart:
    """A chart with x at z; the identity, but for what is given."""
    n, m = len(x), len(y)
    parts = (x, x if z is None else z, y, np.eye(n) if A is None else A, np.zeros((n, m)) if B is None else B,
             np.zeros((n, n, m)) if K is None else K, np.zeros((n, n, n)) if M is None else M)
    return Chart(*map(jnp.asarray, parts))


@eqx.filter_jit
def _differentiated(problem: Any, x: Any, y: Any) -> Any:
    F = problem.residual
    hessian = jax.jacfwd(F)
    step = lambda x, y: jnp.linalg.solve(hessian(x, y), F(x, y))  # noqa: E731
    once = lambda y: x - step(x, y)  # noqa: E731
    twice = lambda y: once(y) - step(once(y), y)  # noqa: E731
    J = -jnp.linalg.solve(hessian(x, y), jax.jacfwd(F, 1)(x, y))

    def polished(z: Array, held: bool) -> Array:
        start = x + J @ (z - y)
        H = hessian(start, z)
        return problem.outer(start - jnp.linalg.solve(lax.stop_gradient(H) if held else H, F(start, z)), z)

    rescaled = -jnp.linalg.solve(jax.jacfwd(step)(x, y), jax.jacfwd(step, 1)(x, y))
    return (jax.jacfwd(once)(y), jax.jacfwd(twice)(y), rescaled, *(jax.grad(polished)(y, held) for held in (False, True)))


class Differentiated(NamedTuple):
    """What autodiff through Newton steps gives at one point.

    Attributes:
        once: Jacobian in y, at fixed x, of one step.
        twice: that of two steps.
        rescaled: Jacobian of the root of F_1^-1 F.
        polished: derivative of G after a step on top of the implicit derivative of x.
        held: the same with F_1 held constant.
    """

    once: np.ndarray
    twice: np.ndarray
    rescaled: np.ndarray
    polished: np.ndarray
    held: np.ndarray


def differentiated(problem: Any, x: Any, y: Any) -> Differentiated:
    """Autodiff through Newton steps at (x, y)."""
    return Differentiated(*map(np.asarray, _differentiated(problem, jnp.asarray(x), jnp.asarray(y))))


@eqx.filter_jit
def _changed(problem: Any, phi: Any, z: Any, y: Any) -> Any:
    F = jax.grad(lambda z, y: problem.energy(phi(z, y), y))
    omega = lambda z: plain_formula(F, lambda z, y: problem.outer(phi(z, y), y), z, y)  # noqa: E731
    return phi(z, y), omega(z), jax.jacfwd(omega)(z)


def changed(problem: Any, phi: Any, z: Any, y: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The point x, and the plain formula of the problem in z by dense autodiff, with its Jacobian in z."""
    x, value, jacobian = map(np.asarray, _changed(problem, phi, jnp.asarray(z), jnp.asarray(y)))
    return x, value, jacobian
