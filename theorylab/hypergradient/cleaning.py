r"""Data cleaning: one weight per training sample, learned so that the fit does well on clean held-out data."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks
from theorylab.core.module import number, size
from theorylab.errors import ShapeError
from theorylab.hypergradient.contract import BilevelProblem, Linearization, gram, leaf, pull
from theorylab.hypergradient.losses import Logistic, pair, signs, top_eigenvalue, warn_single_class

Array = jax.Array


class CleaningLinearization(Linearization):
    """The derivatives of `DataCleaning` at one point: margins, sample weights and Hessian weights are cached, each a vector of length N."""

    problem: DataCleaning
    sample: Array
    turned: Array
    slope: Array
    curvature: Array
    bend: Array
    outer_weights: Array

    @classmethod
    def of(cls, problem: DataCleaning, x: Array, y: Array) -> CleaningLinearization:
        """The derivatives of `problem` at (x, y)."""
        up, down = problem.sample_weights(y)
        t, t_out = problem.A @ x, problem.A_out @ x
        (curvature, bend), slope = Logistic.weights(t), Logistic.slope(t, problem.b)
        outer_x = pull(problem.A_out, Logistic.slope(t_out, problem.b_out)) / len(problem.A_out)
        residual = pull(problem.A, up * slope) / len(problem.A) + problem.penalty * x
        return cls(residual, outer_x, jnp.zeros_like(y), problem, up, up * down, slope, curvature, bend, Logistic.weights(t_out)[0])

    def product(self, h: Array) -> Array:
        A = self.problem.A
        return pull(A, self.sample * self.curvature * (A @ h)) / len(A) + self.problem.penalty * h

    def matrix(self) -> Array:
        A = self.problem.A
        return gram(A, self.sample * self.curvature) / len(A) + self.problem.penalty * jnp.eye(A.shape[1], dtype=A.dtype)

    def diagonal(self) -> Array:
        A = self.problem.A
        return pull(A * A, self.sample * self.curvature) / len(A) + self.problem.penalty

    def cross_pullback(self, v: Array) -> Array:
        A = self.problem.A
        return self.problem.scatter(self.turned * self.slope * (A @ v) / len(A))

    def cross_product(self, u: Array) -> Array:
        A = self.problem.A
        return pull(A, self.turned * self.slope * self.problem.gather(u)) / len(A)

    def turn(self, v: Array, d: Array) -> tuple[Array, Array]:
        A, A_out = self.problem.A, self.problem.A_out
        along_v, along_d = A @ v, A @ d
        outer = pull(A_out, self.outer_weights * (A_out @ d)) / len(A_out)
        a = outer - pull(A, self.sample * self.bend * along_d * along_v) / len(A)
        return a, -self.problem.scatter(self.turned * self.curvature * along_d * along_v / len(A))


class DataCleaning(BilevelProblem):
    r"""Weighted logistic regression with one weight $\sigma(y_i)$ per training sample, judged by the mean loss on clean data.

    $$ E(x, y) = \frac1N \sum_i \sigma(y_i) \log(1 + e^{-b_i a_i^\top x}) + \tfrac12 C |x|^2, \qquad
       G(x) = \frac1{N_v} \sum_i \log(1 + e^{-b^v_i a_i^{v\top} x}) . $$

    There are as many hyper-parameters as samples and nothing of size n by N besides the data: a product with $F_1$ reads A twice, and the
    hypergradient is $(\nabla L)_i = \frac1N \sigma(y_i)(1 - \sigma(y_i))\, \sigma(-b_i a_i^\top x)\, b_i\, a_i^\top v$ (companion derivation).

    Args:
        train: pair (A, b) of shapes (N, n) and (N,), labels -1 and 1, some of them wrong.
        valid: pair (A_out, b_out) of clean data.
        penalty: C, above 0.

    Raises:
        ArgumentError: a label that is not -1 or 1, `penalty` not above 0, or no pairs.
        ShapeError: shapes that do not match.
        PrecisionError: complex or half-precision entries, or two precisions.
        NonFiniteInputError: NaN or infinity.

    Example:
        >>> problem = DataCleaning((jnp.ones((3, 1)), [1, 1, -1]), (jnp.ones((2, 1)), [1, 1]))
        >>> problem.n, problem.m
        (1, 3)
    """

    A: Array
    b: Array
    A_out: Array
    b_out: Array
    penalty: Any = number(above=0.0)
    rows: Any = None
    weights: int = size(default=1)

    def __init__(self, train: Any, valid: Any, penalty: Any = 0.1):
        (A, b), (A_out, b_out) = pair("train", train), pair("valid", valid)
        self.A = checks.array("A of train", A, (None, None))
        p, dtype = self.A.shape[1], self.A.dtype
        if np.ndim(A_out) == 2 and np.shape(A_out)[1] != p:
            raise ShapeError(f"A_out of valid must have the {p} features of A of train, got {np.shape(A_out)[1]}")
        self.A_out = leaf("A_out of valid", A_out, (None, p), dtype)
        self.b, self.b_out = signs("b of train", b, self.A), signs("b_out of valid", b_out, self.A_out)
        warn_single_class(self.b)
        self.penalty, self.rows, self.weights = jnp.asarray(checks.real("penalty", penalty, above=0.0), dtype), None, len(self.A)

    def replace(self, **changes: Any) -> DataCleaning:
        """A copy with some arguments of the constructor changed; every check runs again."""
        return DataCleaning(**{"train": (self.A, self.b), "valid": (self.A_out, self.b_out), "penalty": self.penalty, **changes})

    @property
    def x_structure(self) -> Any:
        return jax.ShapeDtypeStruct(self.A.shape[1:], self.A.dtype)

    @property
    def y_structure(self) -> Any:
        return jax.ShapeDtypeStruct((self.weights,), self.A.dtype)

    def gather(self, u: Array) -> Array:
        """The entries of u, shape (m,), that belong to the rows of A."""
        return u if self.rows is None else u[self.rows]

    def scatter(self, z: Array) -> Array:
        """One number per row of A as a vector of shape (m,); a row drawn twice counts twice."""
        return z if self.rows is None else jnp.zeros(self.weights, z.dtype).at[self.rows].add(z)

    def sample_weights(self, y: Array) -> tuple[Array, Array]:
        r"""$\sigma(y_i)$ and $\sigma(-y_i)$ for the rows of A."""
        mine = self.gather(y)
        return jax.nn.sigmoid(mine), jax.nn.sigmoid(-mine)

    def energy(self, x: Array, y: Array) -> Array:
        losses = jax.nn.softplus(-self.b * (self.A @ x))
        return jnp.sum(self.sample_weights(y)[0] * losses) / len(self.A) + self.penalty * jnp.sum(x**2) / 2

    def residual(self, x: Array, y: Array) -> Array:
        return self.energy_and_residual(x, y)[1]

    def energy_and_residual(self, x: Array, y: Array) -> tuple[Array, Array]:
        t, weight = self.A @ x, self.sample_weights(y)[0]
        energy = jnp.sum(weight * jax.nn.softplus(-self.b * t)) / len(self.A) + self.penalty * jnp.sum(x**2) / 2
        return energy, pull(self.A, weight * Logistic.slope(t, self.b)) / len(self.A) + self.penalty * x

    def outer(self, x: Array, y: Array) -> Array:
        return Logistic.value(self.A_out @ x, self.b_out) / len(self.A_out)

    def at(self, x: Array, y: Array) -> CleaningLinearization:
        return CleaningLinearization.of(self, x, y)

    def curvature(self, y: Array) -> tuple[Array, Array]:
        r"""$\mu = C$ and $L = \frac14 \max_i \sigma(y_i)\, \lambda_{\max}(A^\top A / N) + C$."""
        top = jnp.max(self.sample_weights(y)[0]) * top_eigenvalue(self.A) / (4 * len(self.A))
        return self.penalty, top + self.penalty

    @property
    def samples(self) -> tuple[int, int]:
        return len(self.A), len(self.A_out)

    def inner_batch(self, indices: Array) -> DataCleaning:
        """The problem on these training rows, with their weights; y keeps its length."""
        rows = indices if self.rows is None else self.rows[indices]
        return eqx.tree_at(lambda p: (p.A, p.b, p.rows), self, (self.A[indices], self.b[indices], rows), is_leaf=lambda leaf: leaf is None)

    def outer_batch(self, indices: Array) -> DataCleaning:
        return eqx.tree_at(lambda p: (p.A_out, p.b_out), self, (self.A_out[indices], self.b_out[indices]))
