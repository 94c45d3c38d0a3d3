"""Random problems and the programs that follow them, shared by the claims.

Everything is affine on x >= 0 with Cx = d, so that the claims about exact ACVI share one compiled program per shape. `literal` is Algorithm 1 as it
is printed, in plain NumPy, independent of the package.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi.acvi import ACVI, ProjectedACVI
from theorylab.acvi.constraints import Nonnegative
from theorylab.acvi.equality import BlockSimplex
from theorylab.acvi.merit import central_path
from theorylab.acvi.problem import AffineVariationalInequality, Inequality
from theorylab.core import tree
from theorylab.core.keys import stream

Array = jax.Array
P1 = "Yang, Jordan and Chavdarova, ICLR 2023"
P2 = "Chavdarova, Yang, Pagliardini and Jordan, ICLR 2024"
DERIVED = "companion derivation"
KEY = jax.random.key(0)
ROUND_OFF = 1e-24
"""Allowed excess of squared distances."""
LANES = 4
STARTS = 2
"""Two starts per problem, so that pairs of orbits of one map can be compared."""

Case = tuple[int, int, float, float]
"""Actions of the two players, mu and beta."""
SMALL: tuple[Case, ...] = ((5, 7, 1e-2, 0.5), (5, 7, 1e-3, 0.2), (5, 7, 1e-5, 0.05), (5, 7, 1e-5, 1.0))
LARGE: tuple[Case, ...] = ((5, 7, 1e-2, 0.5), (20, 30, 1e-3, 0.2), (40, 25, 1e-5, 0.05), (40, 25, 1e-5, 1.0))


class Problem(NamedTuple):
    """Arrays of one problem Mx + q on x >= 0, Cx = d with its parameters and its start; or of several, with leading axes."""

    M: np.ndarray
    q: np.ndarray
    C: np.ndarray
    d: np.ndarray
    mu: np.ndarray
    beta: np.ndarray
    y: np.ndarray
    lam: np.ndarray


class Path(NamedTuple):
    """Iterates 0, 1, ..., K of one run, shape (K + 1, n); x has no iterate 0 and holds y there."""

    x: np.ndarray
    y: np.ndarray
    lam: np.ndarray


def normal(seed: int, name: str, *shape: int) -> np.ndarray:
    """Standard normal numbers."""
    return np.asarray(jax.random.normal(stream(seed, name), shape))


def skew(A: np.ndarray) -> np.ndarray:
    """The operator of the game x1' A x2."""
    n1, n2 = A.shape
    return np.block([[np.zeros((n1, n1)), A], [-A.T, np.zeros((n2, n2))]])


def simplices(n1: int, n2: int) -> tuple[np.ndarray, np.ndarray]:
    """The equations of two simplices."""
    return np.repeat(np.eye(2), (n1, n2), axis=1), np.ones(2)


def game(case: Case, seed: int, start: int = 0, strength: float = 0.0) -> Problem:
    """A Gaussian game with a positive y and a Gaussian multiplier; `strength` adds a random positive definite part to it."""
    n1, n2, mu, beta = case
    name = f"{n1} {n2} {mu} {beta}"
    M, n = skew(normal(seed, name, n1, n2)), n1 + n2
    if strength:
        R = normal(seed, f"{name} definite", n, n) / np.sqrt(n)
        M = M + strength * (np.eye(n) + R @ R.T)
    y = np.asarray(jax.random.uniform(stream(seed, f"{name} y {start}"), (n,), minval=0.01))
    return Problem(M, np.zeros(n), *simplices(n1, n2), np.asarray(mu), np.asarray(beta), y, normal(seed, f"{name} lam {start}", n))


def _make(p: Problem) -> AffineVariationalInequality:
    return AffineVariationalInequality(p.M, p.q, Nonnegative(), (p.C, p.d))


def simplex_problem(M: Any, q: Any, sizes: tuple[int, ...]) -> AffineVariationalInequality:
    """The affine problem over a product of simplices."""
    return AffineVariationalInequality(M, q, Nonnegative(), BlockSimplex(sizes))


def trace(problem: Inequality, method: Any, y: Any, lam: Any, steps: int, key: Array = KEY) -> tuple[Array, Array, Array]:
    """The iterates x, y, lambda 1, 2, ..., K of a method of the ACVI family from any y and lambda, inside a compiled program."""
    method = method.prepare(problem)
    state = tree.strong(method.init(problem, y, key=key)._replace(v=y + lam / method.penalty))

    def step(state: Any, k: Array) -> tuple[Any, tuple[Array, Array, Array]]:
        after = tree.strong(method.step(problem, state, key=jax.random.fold_in(key, k)))
        return after, (after.x, after.y, method.multiplier(after))

    return jax.lax.scan(step, state, jnp.arange(steps))[1]


@partial(jax.jit, static_argnames=("steps", "projected"))
def _follow(lanes: Problem, steps: int, projected: bool) -> tuple[Array, Array, Array]:
    def one(p: Any) -> tuple[Array, Array, Array]:
        return trace(_make(p), ProjectedACVI(p.beta) if projected else ACVI(p.beta, p.mu), p.y, p.lam, steps)

    return jax.vmap(one)(lanes)


@jax.jit
def _centres(lanes: Problem) -> Array:
    return jax.vmap(lambda p: central_path(_make(p), p.mu[None])[0])(lanes)


def _in_lanes(program: Any, problems: list[Problem]) -> list[np.ndarray]:
    """A program of `LANES` lanes over any number of problems of one shape; lanes left over repeat the last problem."""
    out = []
    for at in range(0, len(problems), LANES):
        some = problems[at:at + LANES]
        filled = some + [some[-1]] * (LANES - len(some))
        result = jax.tree.map(np.asarray, program(Problem(*(np.stack(a) for a in zip(*filled, strict=True)))))
        out += [jax.tree.map(lambda a, i=i: a[i], result) for i in range(len(some))]
    return out


def follow(problems: list[Problem], steps: int, projected: bool = False) -> list[Path]:
    """The iterates of exact ACVI (or of P-ACVI) on problems of one shape."""
    runs = _in_lanes(partial(_follow, steps=steps, projected=projected), problems)
    return [Path(np.vstack([p.y, x]), np.vstack([p.y, y]), np.vstack([p.lam, lam])) for p, (x, y, lam) in zip(problems, runs, strict=True)]


def centres(problems: list[Problem]) -> list[np.ndarray]:
    """The points of the central path of problems of one shape, by Newton's method."""
    return _in_lanes(_centres, problems)


class Run(NamedTuple):
    """A problem, its iterates, and the fixed point (x, lam) of its map."""

    problem: Problem
    path: Path
    x: np.ndarray
    lam: np.ndarray

    @property
    def V(self) -> np.ndarray:
        """The distances to the fixed point, by iterate."""
        beta = self.problem.beta
        return beta * np.sum((self.path.y - self.x) ** 2, 1) + np.sum((self.path.lam - self.lam) ** 2, 1) / beta

    @property
    def W(self) -> np.ndarray:
        """The squared moves from iterate k to k + 1."""
        return self.problem.beta * np.sum(np.diff(self.path.y, axis=0) ** 2, 1) + np.sum(np.diff(self.path.lam, axis=0) ** 2, 1) / self.problem.beta

    @property
    def label(self) -> str:
        """Sizes and parameters."""
        n1, n2 = self.problem.C.sum(1).astype(int)
        return f"{n1} x {n2}, mu {self.problem.mu:g}, beta {self.problem.beta:g}"


@cache
def exact(cases: tuple[Case, ...], steps: int, seed: int = 0) -> tuple[Run, ...]:
    """Runs of exact ACVI at fixed mu on Gaussian games, `STARTS` for each case in turn."""
    runs: list[Run] = []
    for shape in dict.fromkeys(case[:2] for case in cases):
        problems = [game(case, seed, start) for case in cases if case[:2] == shape for start in range(STARTS)]
        ends = centres(problems[::STARTS])
        for i, (problem, path) in enumerate(zip(problems, follow(problems, steps), strict=True)):
            x = ends[i // STARTS]
            runs.append(Run(problem, path, x, -problem.mu / x))
    return tuple(runs)


def x_step(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """R and r of the x-step R u + r, by its KKT system."""
    n, rows = len(p.y), len(p.d)
    inverse = np.linalg.inv(np.block([[np.eye(n) + p.M / p.beta, p.C.T], [p.C, np.zeros((rows, rows))]]))[:n]
    return inverse[:, :n], inverse @ np.concatenate([-p.q / p.beta, p.d])


def literal(p: Problem, steps: int) -> Path:
    """Algorithm 1 as printed: the x-step by its KKT system, the prox by the quadratic formula, the multiplier by adding up."""
    R, r = x_step(p)
    y, lam, t = p.y, p.lam, p.mu / p.beta
    path = [(y, y, lam)]
    for _ in range(steps):
        x = R @ (y - lam / p.beta) + r
        v = x + lam / p.beta
        root = np.sqrt(v * v + 4 * t)
        y = np.where(v >= 0, (v + root) / 2, 2 * t / np.where(v >= 0, 1, root - v))
        lam = lam + p.beta * (x - y)
        path.append((x, y, lam))
    return Path(*map(np.array, zip(*path, strict=True)))


def blocks(a: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """The parts of the last axis that belong to each player."""
    return np.split(a, np.cumsum(sizes)[:-1].astype(int), axis=-1)


def support(s: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The support function of a product of simplices."""
    return np.sum([part.max(-1) for part in blocks(s, sizes)], axis=0)


def gaps(p: Problem, x: np.ndarray) -> np.ndarray:
    """The gap at each point over a product of simplices, from its definition."""
    force = x @ p.M.T + p.q
    return np.sum(force * x, -1) + support(-force, p.C.sum(1))


def reach(p: Problem, x: np.ndarray) -> np.ndarray:
    """The largest distance from each point to a product of simplices: that to its farthest vertex."""
    squares = [np.sum(part**2, -1) + 1 - 2 * part.min(-1) for part in blocks(x, p.C.sum(1))]
    return np.sqrt(np.sum(squares, axis=0))
