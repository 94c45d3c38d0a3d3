"""Symmetric cones: the proximal map of the barrier acts on the eigenvalues."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from theorylab.acvi import prox as scalar
from theorylab.acvi.constraints import ConstraintSet, safe_norm
from theorylab.acvi.prox import like
from theorylab.core.module import choice
from theorylab.errors import ShapeError

Array = jax.Array


class Cone(ConstraintSet):
    r"""A symmetric cone: positive semidefinite matrices, or the second-order cone.

    Args:
        kind: `"psd"`: a point is a matrix of shape `(k, k)` in row order, so n = k^2; the set holds symmetric matrices only, and the barrier is
            $-\log\det$ with k terms. `"second_order"`: $x_1 \ge |(x_2, \dots, x_n)|$ with two terms.

    Example:
        >>> Cone("psd").project(jnp.array([1.0, 0.0, 0.0, -1.0])).tolist()
        [1.0, 0.0, 0.0, 0.0]
    """

    kind: str = choice("psd", among=("psd", "second_order"))

    def bind(self, dim: int) -> ConstraintSet:
        if self.kind == "psd" and math.isqrt(dim) ** 2 != dim:
            raise ShapeError(f"constraints: Cone('psd') needs a square number of unknowns (a matrix in row order), got {dim}")
        if self.kind == "second_order" and dim < 2:
            raise ShapeError(f"constraints: Cone('second_order') needs at least 2 unknowns, got {dim}")
        return self

    def _spectrum(self, x: Array) -> tuple[Array, Any]:
        """Eigenvalues, and the map from new eigenvalues to the point with the same frame."""
        if self.kind == "psd":
            k = math.isqrt(x.shape[0])
            matrix = x.reshape(k, k)
            values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
            return values, lambda new: ((vectors * new) @ vectors.T).reshape(-1)
        length = safe_norm(x[1:])
        direction = x[1:] / jnp.where(length == 0, jnp.ones_like(length), length)
        values = jnp.stack([x[0] - length, x[0] + length])
        return values, lambda new: jnp.concatenate([(new[0] + new[1])[None], (new[1] - new[0]) * direction]) / 2

    def inequalities(self, x: Array) -> Array:
        return -self._spectrum(x)[0]

    def prox(self, v: Array, t: Any) -> Array:
        values, rebuild = self._spectrum(v)
        weight = like(t, v) if self.kind == "psd" else 2 * like(t, v)  # |x|^2 is half the sum of squared eigenvalues of the second-order cone
        return rebuild(scalar.slack(values, weight))

    def project(self, v: Array) -> Array:
        values, rebuild = self._spectrum(v)
        return rebuild(jnp.maximum(values, 0))

    def barrier_gradient(self, y: Array) -> Array:
        values, rebuild = self._spectrum(y)
        return rebuild(-1 / values) if self.kind == "psd" else 2 * rebuild(-1 / values)

    def violation(self, x: Array) -> Array:
        return jnp.linalg.norm(x - self.project(x))

    def support(self, s: Array) -> Array:
        return jnp.where(jnp.all(self._spectrum(s)[0] <= 0), like(0.0, s), like(jnp.inf, s))

    def interior_point(self, dim: int | None = None) -> Array:
        n = self._size(dim)
        if self.kind == "psd":
            return jnp.eye(math.isqrt(n), dtype=jnp.result_type(float)).reshape(-1)
        return jnp.zeros(n, jnp.result_type(float)).at[0].set(1.0)
