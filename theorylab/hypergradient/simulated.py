r"""Quadratic bilevel problems that are means over random samples, with everything known in closed form: the test bench of stochastic methods."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from theorylab.core import checks
from theorylab.core.keys import Key, as_key, step_key, stream
from theorylab.core.psd import product
from theorylab.core.sample import random_orthogonal
from theorylab.errors import ArgumentError
from theorylab.hypergradient.contract import BilevelProblem

Array = jax.Array
DRAWS = 20


class Samples(NamedTuple):
    r"""Terms $\tfrac12 (a^\top x)^2 + \tfrac12 (h^\top y)^2 + (c^\top y)(d^\top x) + s^\top x + t^\top y$, one a row.

    Attributes:
        a, d, s: shape (N, n).
        h, c, t: shape (N, m).
    """

    a: Array
    h: Array
    c: Array
    d: Array
    s: Array
    t: Array

    def mean(self, x: Array, y: Array) -> Array:
        """The mean of the terms."""
        terms = (self.a @ x) ** 2 / 2 + (self.h @ y) ** 2 / 2 + (self.c @ y) * (self.d @ x) + self.s @ x + self.t @ y
        return jnp.mean(terms)

    @property
    def hessian(self) -> Array:
        """The mean of the second derivative in x, (n, n)."""
        return product(self.a.T, self.a) / len(self.a)

    @property
    def outer_hessian(self) -> Array:
        """The mean of the second derivative in y, (m, m)."""
        return product(self.h.T, self.h) / len(self.h)

    @property
    def cross(self) -> Array:
        """The mean of the mixed second derivative, (n, m)."""
        return product(self.d.T, self.c) / len(self.c)


class Quadratics(BilevelProblem):
    r"""E and G are means of quadratic `Samples`; made by `simulated`. $x^*(y)$, the hypergradient and the solution are known in closed form.

    Attributes:
        inner_rows: the samples of E.
        outer_rows: the samples of G.
    """

    inner_rows: Samples
    outer_rows: Samples

    @property
    def x_structure(self) -> Any:
        return jax.ShapeDtypeStruct(self.inner_rows.a.shape[1:], self.inner_rows.a.dtype)

    @property
    def y_structure(self) -> Any:
        return jax.ShapeDtypeStruct(self.inner_rows.h.shape[1:], self.inner_rows.h.dtype)

    def energy(self, x: Array, y: Array) -> Array:
        return self.inner_rows.mean(x, y)

    def outer(self, x: Array, y: Array) -> Array:
        return self.outer_rows.mean(x, y)

    def exact(self, y: Array) -> Array:
        rows = self.inner_rows
        return -jnp.linalg.solve(rows.hessian, product(rows.cross, y) + jnp.mean(rows.s, axis=0))

    def value_curvature(self) -> Array:
        r"""$\nabla^2 L = G_{22} + G_{21} J + (G_{21} J)^\top + J^\top G_{11} J$, which does not depend on y; shape (m, m)."""
        J = -jnp.linalg.solve(self.inner_rows.hessian, self.inner_rows.cross)
        mixed = product(self.outer_rows.cross.T, J)
        return self.outer_rows.outer_hessian + mixed + mixed.T + product(J.T, self.outer_rows.hessian, J)

    def solution(self) -> Array:
        """The minimizer of L, shape (m,)."""
        zero = jnp.zeros(self.m, self.dtype)
        slope = jax.grad(lambda y: self.outer(self.exact(y), y))(zero)
        return -jnp.linalg.solve(self.value_curvature(), slope)

    @property
    def samples(self) -> tuple[int, int]:
        return len(self.inner_rows.a), len(self.outer_rows.a)

    def inner_batch(self, indices: Array) -> Quadratics:
        return eqx.tree_at(lambda p: p.inner_rows, self, jax.tree.map(lambda a: a[indices], self.inner_rows))

    def outer_batch(self, indices: Array) -> Quadratics:
        return eqx.tree_at(lambda p: p.outer_rows, self, jax.tree.map(lambda a: a[indices], self.outer_rows))


def simulated(key: Key | int = 0, *, dim_inner: int = 20, dim_outer: int = 10, samples: int = 1024, convexity: float = 0.1,
              smoothness: float = 1.0, coupling: float = 0.1, dtype: Any = None) -> Quadratics:
    r"""Random quadratics in the manner of the simulated data of the public benchmark of bilevel solvers (benchopt/benchmark_bilevel).

    Every sample has rank-one Hessians. Their means are those of Gaussian rows with covariances of log-spaced eigenvalues from `convexity` to
    `smoothness` (that in y with one eigenvalue 0 more), the mixed blocks have log-spaced singular values from `convexity` to `coupling`, and the
    linear terms are standard normal. Inner and outer samples are drawn alike, again until L is convex.

    Args:
        key: seed or random key.
        dim_inner: n.
        dim_outer: m, at least 2.
        samples: rows of the inner objective and of the outer one.
        convexity: smallest eigenvalue of the mean inner Hessian, in expectation.
        smoothness: largest eigenvalue.
        coupling: largest singular value of the mixed block.
        dtype: float64 unless given.

    Raises:
        ArgumentError: a number outside its range, or no convex L in 20 draws.

    Example:
        >>> problem = simulated(0, dim_inner=4, dim_outer=2, samples=64)
        >>> x, y = problem.exact(problem.solution()), problem.solution()
        >>> from theorylab import hypergradient as hg
        >>> bool(jnp.linalg.norm(hg.hypergradient(problem, x, y, hg.Plain()).value) < 1e-12)
        True
    """
    n, m = checks.whole("dim_inner", dim_inner, low=1), checks.whole("dim_outer", dim_outer, low=2)
    samples = checks.whole("samples", samples, low=2)
    checks.real("convexity", convexity, above=0.0)
    checks.real("smoothness", smoothness, low=convexity)
    checks.real("coupling", coupling, above=0.0)
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    for draw in range(DRAWS):
        one = step_key(stream(as_key(key), "simulated"), draw)
        rows = [_rows(stream(one, name), n, m, samples, convexity, smoothness, coupling, dtype) for name in ("inner", "outer")]
        problem = Quadratics(*rows)
        if float(jnp.linalg.eigvalsh(problem.value_curvature())[0]) >= 1e-12:
            return problem
    raise ArgumentError(f"no convex outer objective in {DRAWS} draws; lower coupling = {coupling:g}")


def _rows(key: Key, n: int, m: int, samples: int, convexity: float, smoothness: float, coupling: float, dtype: Any) -> Samples:
    normal = lambda name, *shape: jax.random.normal(stream(key, name), shape, dtype)  # noqa: E731
    turn = lambda name, dim: random_orthogonal(stream(key, name), dim, dtype=dtype)  # noqa: E731
    spread = lambda low, high, count: jnp.geomspace(low, high, count, dtype=dtype)  # noqa: E731
    U, V, r = turn("basis of x", n), turn("basis of y", m), min(n, m)
    a = normal("a", samples, n) @ (U * jnp.sqrt(spread(convexity, smoothness, n))) @ U.T
    h = normal("h", samples, m) @ (V * jnp.sqrt(jnp.concatenate([jnp.zeros(1, dtype), spread(convexity, smoothness, m - 1)]))) @ V.T
    z = normal("z", samples, n)  # E[c d'] = left diag(sigma) right'
    left, right = turn("left", m)[:, :r], turn("right", n)
    c = (z[:, :r] * spread(convexity, coupling, r)) @ left.T
    return Samples(a, h, c, z @ right.T, normal("s", samples, n), normal("t", samples, m))
