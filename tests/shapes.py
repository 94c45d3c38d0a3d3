"""The small problems and methods that many tests share, so that the suite compiles few programs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl

DIM = 4


class Quadratic(tl.Problem):
    """f(x) = x' A x / 2, minimum at 0."""

    matrix: jax.Array

    def start(self, key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (self.matrix.shape[0],), self.matrix.dtype)

    def metrics(self, x: jax.Array) -> dict[str, jax.Array]:
        gradient = self.matrix @ x
        return {"objective": x @ gradient / 2, "residual": jnp.linalg.norm(gradient)}

    def default_method(self) -> tl.Method:
        return Descent(0.5)


class Descent(tl.Method):
    """Gradient descent; counts its traces."""

    step_size: Any = tl.number(0.5, above=0.0)

    def init(self, problem: Any, x0: jax.Array, *, key: jax.Array) -> jax.Array:
        return x0

    def step(self, problem: Any, x: jax.Array, *, key: jax.Array) -> jax.Array:
        TRACES.append("Descent")
        return x - self.step_size * (problem.matrix @ x)

    def value(self, problem: Any, x: jax.Array) -> jax.Array:
        return x

    def cost(self, problem: Any) -> dict[str, float]:
        return {"gradients": 1.0}


class NoisyDescent(Descent):
    """Gradient descent with Gaussian noise: exercises keys."""

    noise: Any = tl.number(0.1, low=0.0)

    def step(self, problem: Any, x: jax.Array, *, key: jax.Array) -> jax.Array:
        TRACES.append("NoisyDescent")
        return x - self.step_size * (problem.matrix @ x) + self.noise * jax.random.normal(key, x.shape, x.dtype)


TRACES: list[str] = []


def quadratic(dim: int = DIM, dtype: Any = float) -> Quadratic:
    """Spectrum from 0.1 to 1 in a fixed basis."""
    angle = np.arange(dim * dim, dtype=float).reshape(dim, dim)
    basis = np.linalg.qr(np.cos(angle))[0]
    return Quadratic(jnp.asarray(basis @ np.diag(np.linspace(0.1, 1.0, dim)) @ basis.T, dtype))


def quadratic_path(problem: Quadratic, x0: np.ndarray, step_size: float, steps: int) -> np.ndarray:
    """Iterates of gradient descent in plain NumPy."""
    matrix, path = np.asarray(problem.matrix), [np.asarray(x0)]
    for _ in range(steps):
        path.append(path[-1] - step_size * (matrix @ path[-1]))
    return np.stack(path)
