"""States of the mean-field flow: `Gaussian`, held through a factor of its covariance, and `Cloud`, a set of weighted tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import tree
from theorylab.core.keys import Key, as_key, stream
from theorylab.core.module import Module
from theorylab.errors import ArgumentError, MatrixError, ShapeError

Array = jax.Array

SYMMETRY = 1e-8
"""Relative asymmetry above which a covariance is refused."""
INDEFINITE = 1e-10
"""Negative eigenvalue, relative to the norm, below which a covariance is refused."""
FAINT_WEIGHT = 1e-22
"""Quadrature weights below this are dropped: their nodes lie so far out that the logits there overflow."""


class Gaussian(Module):
    r"""The Gaussian measure $\mathcal N(\alpha, \Sigma)$, held as a mean and a factor: $\Sigma = L L^\top$ with $L$ of shape `(dim, rank)`.

    The factor is chosen when the object is made, on the host: the Cholesky factor if the covariance is well conditioned, else the eigenvectors with
    the negligible eigenvalues left out, so that the rank of a singular covariance is decided once. All arrays may carry leading axes
    (times, runs, starts).

    Args:
        mean: $\alpha$, shape `(..., dim)`.
        cov: $\Sigma$, shape `(..., dim, dim)`, symmetric positive semidefinite; it may be singular.

    Raises:
        ShapeError: `cov` is not square or does not match `mean`.
        MatrixError: `cov` is not symmetric, or has a negative eigenvalue.
        NonFiniteInputError: an entry is NaN or infinite.

    Example:
        >>> state = Gaussian(jnp.zeros(2), jnp.diag(jnp.array([4.0, 0.0])))
        >>> state.dim, state.columns
        (2, 1)
        >>> state.cov.tolist()
        [[4.0, 0.0], [0.0, 0.0]]
    """

    mean: Array
    _factor: Array | None
    _cov: Array | None

    def __init__(self, mean: Any, cov: Any):
        mean, cov = _floating("mean", mean), _floating("cov", cov)
        if cov.ndim < 2 or cov.shape[-1] != cov.shape[-2]:
            raise ShapeError(f"cov must be a square matrix (with leading axes, if any), got shape {cov.shape}")
        mean = _with_dim(mean, cov.shape[:-2], cov.shape[-1], "cov")
        dtype = jnp.promote_types(mean.dtype, cov.dtype)
        self.mean, self._factor, self._cov = mean.astype(dtype), _initial_factor(cov).astype(dtype), None

    @classmethod
    def from_factor(cls, mean: Any, factor: Any) -> Gaussian:
        """The Gaussian with covariance `factor @ factor.T`; the factor is kept as it is, so its columns bound the rank for all time.

        Args:
            mean: shape `(..., dim)`.
            factor: shape `(..., dim, rank)`.

        Example:
            >>> Gaussian.from_factor(jnp.zeros(3), jnp.ones((3, 1))).cov.shape
            (3, 3)
        """
        mean, factor = _floating("mean", mean), _floating("factor", factor)
        if factor.ndim < 2:
            raise ShapeError(f"factor must have shape (dim, rank) (with leading axes, if any), got shape {factor.shape}")
        mean = _with_dim(mean, factor.shape[:-2], factor.shape[-2], "factor")
        dtype = jnp.promote_types(mean.dtype, factor.dtype)
        return cls._raw(mean.astype(dtype), factor.astype(dtype), None)

    @classmethod
    def standard(cls, dim: int) -> Gaussian:
        """The standard Gaussian in `dim` dimensions.

        Example:
            >>> Gaussian.standard(2).cov.tolist()
            [[1.0, 0.0], [0.0, 1.0]]
        """
        if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)) or dim < 1:
            raise ArgumentError(f"dim must be a whole number of at least 1, got {dim!r}")
        return cls._raw(jnp.zeros(int(dim)), jnp.eye(int(dim)), None)

    @classmethod
    def _raw(cls, mean: Any, factor: Any, cov: Any) -> Gaussian:
        """No checks: for derivatives and states inside compiled code. One of `factor` and `cov` is None."""
        made = object.__new__(cls)
        for name, value in (("mean", mean), ("_factor", factor), ("_cov", cov)):
            object.__setattr__(made, name, value)
        return made

    def replace(self, **changes: Any) -> Gaussian:
        """A copy with another `mean` and/or `cov`, checked as in the constructor.

        Example:
            >>> Gaussian.standard(2).replace(mean=jnp.ones(2)).mean.tolist()
            [1.0, 1.0]
        """
        unknown = set(changes) - {"mean", "cov"}
        if unknown:
            raise ArgumentError(f"replace takes mean and cov, got {', '.join(sorted(unknown))}")
        mean = changes.get("mean", self.mean)
        if "cov" in changes or self._factor is None:
            return type(self)(mean, changes.get("cov", self.cov))
        return type(self).from_factor(mean, self._factor)

    @property
    def dim(self) -> int:
        """Dimension of a token."""
        return self.mean.shape[-1]

    @property
    def cov(self) -> Array:
        """The covariance, shape `(..., dim, dim)`; exactly symmetric."""
        if self._factor is None:
            return self._cov  # type: ignore[return-value]
        return _gram(self._factor)

    @property
    def factor(self) -> Array:
        r"""A matrix $L$ of shape `(..., dim, columns)` with $L L^\top$ the covariance."""
        return _initial_factor(self._cov) if self._factor is None else self._factor

    @property
    def columns(self) -> int:
        """Columns of the factor: a bound on the rank, known from the shape alone. The numerical rank is `effective_rank`."""
        return self.dim if self._factor is None else self._factor.shape[-1]

    def sample(self, count: int, *, key: Key | int = 0) -> Cloud:
        """`count` independent tokens with equal weights.

        Example:
            >>> Gaussian.standard(2).sample(5, key=0).points.shape
            (5, 2)
        """
        _whole("count", count)
        factor = self.factor
        noise = jax.random.normal(stream(as_key(key), "gaussian.sample"), (*self.mean.shape[:-1], int(count), factor.shape[-1]), factor.dtype)
        return Cloud(self.mean[..., None, :] + noise @ jnp.swapaxes(factor, -1, -2))

    def quadrature(self, order: int) -> Cloud:
        r"""Tensor Gauss--Hermite tokens: they integrate polynomials of degree below `2 order` in each axis of the factor exactly.

        A weighted cloud without sampling noise, with at most `order ** columns` tokens; nodes of weight below 1e-22 are dropped.

        Example:
            >>> cloud = Gaussian.standard(2).quadrature(8)
            >>> bool(jnp.allclose(moments(cloud).cov, jnp.eye(2)))
            True
        """
        _whole("order", order)
        factor = self.factor
        axes = factor.shape[-1]
        if int(order) ** axes > 2_000_000:
            raise ArgumentError(f"order must give at most 2000000 nodes, got {order} ** {axes} columns; lower it or use sample")
        nodes, weights = np.polynomial.hermite_e.hermegauss(int(order))
        grid = np.stack([g.ravel() for g in np.meshgrid(*[nodes] * axes, indexing="ij")], axis=-1)
        mass = np.ones(1)
        for _ in range(axes):
            mass = np.multiply.outer(mass, weights / weights.sum()).ravel()
        kept = mass > FAINT_WEIGHT
        grid, mass = jnp.asarray(grid[kept], factor.dtype), jnp.asarray(mass[kept] / mass[kept].sum(), factor.dtype)
        points = self.mean[..., None, :] + grid @ jnp.swapaxes(factor, -1, -2)
        return Cloud(points, jnp.broadcast_to(mass, points.shape[:-1]))


class Cloud(Module):
    r"""Weighted tokens: the measure $\sum_j w_j \delta_{x_j}$.

    Args:
        points: shape `(..., count, dim)`, one token per row.
        weights: shape `(..., count)`, positive with sum one; None means `1 / count` each.

    Raises:
        ShapeError: `points` is not a table of tokens, or `weights` does not match it.
        ArgumentError: a weight is negative or the weights do not sum to one.

    Example:
        >>> Cloud(jnp.zeros((5, 2))).count
        5
    """

    points: Array
    _weights: Array | None

    def __init__(self, points: Any, weights: Any = None):
        points = _floating("points", points)
        if points.ndim < 2 or 0 in points.shape[-2:]:
            raise ShapeError(f"points must have shape (count, dim) with at least one token, got shape {points.shape}")
        if weights is not None:
            weights = _floating("weights", weights)
            if weights.shape != points.shape[:-1]:
                raise ShapeError(f"weights must have shape {points.shape[:-1]}, one for each token of points, got {weights.shape}")
            if not tree.is_traced(weights):
                total = np.asarray(weights).sum(-1)
                if np.any(np.asarray(weights) < 0) or np.any(np.abs(total - 1) > 1e-6):
                    raise ArgumentError(f"weights must be non-negative and sum to one, got smallest {np.asarray(weights).min():g} "
                                        f"and sum {np.ravel(total)[0]:g}")
        self.points, self._weights = points, weights

    @classmethod
    def _raw(cls, points: Any, weights: Any) -> Cloud:
        """No checks: for derivatives inside compiled code."""
        made = object.__new__(cls)
        object.__setattr__(made, "points", points)
        object.__setattr__(made, "_weights", weights)
        return made

    def replace(self, **changes: Any) -> Cloud:
        """A copy with other `points` and/or `weights`, checked as in the constructor.

        Example:
            >>> Cloud(jnp.zeros((5, 2))).replace(points=jnp.ones((5, 2))).points[0].tolist()
            [1.0, 1.0]
        """
        unknown = set(changes) - {"points", "weights"}
        if unknown:
            raise ArgumentError(f"replace takes points and weights, got {', '.join(sorted(unknown))}")
        return type(self)(changes.get("points", self.points), changes.get("weights", self._weights))

    @property
    def weights(self) -> Array:
        """The weights, shape `(..., count)`."""
        return jnp.full(self.points.shape[:-1], 1 / self.count, self.points.dtype) if self._weights is None else self._weights

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.points.shape[-2]

    @property
    def dim(self) -> int:
        """Dimension of a token."""
        return self.points.shape[-1]


def moments(cloud: Cloud | Any) -> Gaussian:
    r"""The Gaussian with the mean and the covariance of `cloud`; the covariance has divisor one, as a measure has.

    $$ \alpha = \sum_j w_j x_j, \qquad \Sigma = \sum_j w_j (x_j - \alpha)(x_j - \alpha)^\top $$

    Args:
        cloud: a `Cloud`, or its points if all weights are equal.

    Raises:
        ArgumentError: `cloud` is neither.

    Example:
        >>> moments(Cloud(jnp.array([[1.0], [-1.0]]))).cov.tolist()
        [[1.0]]
    """
    cloud = Cloud(cloud) if isinstance(cloud, (jax.Array, np.ndarray, list)) else cloud
    if not isinstance(cloud, Cloud):
        raise ArgumentError(f"cloud must be a Cloud or an array of tokens, got {type(cloud).__name__}")
    mean, cov = _moments(cloud)
    return Gaussian(mean, cov)


def _moments(cloud: Cloud) -> tuple[Array, Array]:
    """Mean and covariance of a cloud, without the factor."""
    points = cloud.points
    if cloud._weights is None:
        mean = points.mean(-2)
        centered = points - mean[..., None, :]
        return mean, _symmetric(jnp.swapaxes(centered, -1, -2) @ centered / points.shape[-2])
    mean = jnp.einsum("...n,...nd->...d", cloud._weights, points)
    centered = points - mean[..., None, :]
    return mean, _symmetric(jnp.swapaxes(centered, -1, -2) @ (cloud._weights[..., None] * centered))


def effective_rank(state: Gaussian | Any, tolerance: float = 1e-9) -> Array:
    r"""Number of eigenvalues of the covariance above `tolerance` times the largest.

    Args:
        state: a Gaussian, or a covariance of shape `(..., dim, dim)`.
        tolerance: relative threshold; eigenvalues taken from a factor are accurate far below round-off, those of a matrix to about 1e-15.

    Example:
        >>> int(effective_rank(jnp.diag(jnp.array([2.0, 1.0, 0.0]))))
        2
    """
    if isinstance(tolerance, (int, float)) and not 0 < tolerance < 1:
        raise ArgumentError(f"tolerance must be above 0 and below 1, got {tolerance}")
    values = spectrum(state) if isinstance(state, Gaussian) else jnp.linalg.eigvalsh(_square_floating("state", state))
    return _count_large(values, tolerance)


def _count_large(values: Array, tolerance: float = 1e-9) -> Array:
    """Number of eigenvalues above `tolerance` times the largest."""
    return (values > tolerance * values.max(-1, keepdims=True)).sum(-1, dtype=jnp.int32)


def spectrum(state: Gaussian) -> Array:
    """Eigenvalues of the covariance in ascending order, shape `(..., dim)`: squared singular values of the factor where there is one."""
    if state._factor is None:
        return _spectrum_2x2(state.cov) if state.dim == 2 else jnp.linalg.eigvalsh(state.cov)
    values = jnp.linalg.svd(state._factor, compute_uv=False)[..., ::-1] ** 2
    missing = state.dim - values.shape[-1]
    return jnp.concatenate([jnp.zeros((*values.shape[:-1], missing), values.dtype), values], -1) if missing else values


def _spectrum_2x2(cov: Array) -> Array:
    """The closed form, because the published figures take millions of steps on 2 x 2 matrices."""
    mean = (cov[..., 0, 0] + cov[..., 1, 1]) / 2
    radius = jnp.hypot((cov[..., 0, 0] - cov[..., 1, 1]) / 2, cov[..., 0, 1])
    return jnp.stack([mean - radius, mean + radius], -1)


def _gram(factor: Array) -> Array:
    return _symmetric(factor @ jnp.swapaxes(factor, -1, -2))


def _symmetric(matrix: Array) -> Array:
    return (matrix + jnp.swapaxes(matrix, -1, -2)) / 2


def _initial_factor(cov: Any) -> Array:
    """Cholesky only if well conditioned (it can succeed on a rounded singular matrix and misreport its rank), else eigenvectors.

    Negligible eigenvalues are dropped. A traced covariance gives its symmetric root, whose rank cannot be looked at.
    """
    if tree.is_traced(cov):
        from theorylab.core.psd import sqrtm

        return jnp.vectorize(sqrtm, signature="(d,d)->(d,d)")(cov)
    matrix, values, vectors = check_semidefinite("cov", np.asarray(cov))
    eps, top = np.finfo(matrix.dtype).eps, np.abs(values).max(-1, initial=0.0, keepdims=True)
    negligible = max(1e-14, 10 * matrix.shape[-1] * eps) * top
    if np.all(values > negligible):
        return jnp.asarray(np.linalg.cholesky(matrix))
    values = np.where(values > negligible, values, 0.0)
    columns = max(int((values > 0).sum(-1).max()), 1)                       # a zero covariance keeps one zero column
    return jnp.asarray((vectors * np.sqrt(values)[..., None, :])[..., ::-1][..., :columns].astype(matrix.dtype))


def check_semidefinite(name: str, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The symmetric part of a matrix (or of several), its eigenvalues and eigenvectors; raises unless it is positive semidefinite."""
    size = np.abs(matrix).max(initial=0.0, axis=(-1, -2), keepdims=True)
    gap = np.abs(matrix - np.swapaxes(matrix, -1, -2))
    if np.any(gap > SYMMETRY * size):
        raise MatrixError(f"{name} must be symmetric, got entries that differ from their mirror image by up to {gap.max():.2g}; "
                          f"use ({name} + {name}.T) / 2 if that is rounding")
    matrix = (matrix + np.swapaxes(matrix, -1, -2)) / 2
    values, vectors = np.linalg.eigh(matrix)
    if np.any(values < -max(INDEFINITE, 10 * np.finfo(matrix.dtype).eps) * np.abs(values).max(-1, initial=0.0, keepdims=True)):
        raise MatrixError(f"{name} must be positive semidefinite, got the eigenvalue {values.min():.6g}")
    return matrix, values, vectors


def _floating(name: str, value: Any) -> Array:
    """`value` as a finite floating-point array; integers become the default precision."""
    try:
        array = jnp.asarray(float(value) if isinstance(value, int) else value)         # a Python number stays weakly typed
    except (TypeError, ValueError):
        raise ArgumentError(f"{name} must be an array of real numbers, got {type(value).__name__}") from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise ArgumentError(f"{name} must be real, got dtype {array.dtype}")
        array = array.astype(jnp.result_type(float))
    return tree.check_finite(name, array)


def _square_floating(name: str, value: Any) -> Array:
    array = _floating(name, value)
    if array.ndim < 2 or array.shape[-1] != array.shape[-2]:
        raise ShapeError(f"{name} must be a Gaussian or a square matrix (with leading axes, if any), got shape {array.shape}")
    return array


def _with_dim(mean: Array, lead: tuple[int, ...], dim: int, other: str) -> Array:
    if mean.ndim < 1 or mean.shape[-1] != dim:
        raise ShapeError(f"mean must have {dim} entries to match {other}, got shape {mean.shape}")
    if mean.shape[:-1] not in ((), lead):
        raise ShapeError(f"mean must have leading axes {lead} to match {other}, got shape {mean.shape}")
    return jnp.broadcast_to(mean, (*lead, dim))


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ArgumentError(f"{name} must be a whole number of at least 1, got {value!r}")
