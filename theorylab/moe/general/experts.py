"""Experts: what each says about y at x, and how it is fitted to weighted rows; polynomials, and linear functions with several responses."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from theorylab.core import checks
from theorylab.core.keys import Key
from theorylab.core.module import size
from theorylab.core.psd import product
from theorylab.errors import ArgumentError, ShapeError
from theorylab.moe import density
from theorylab.moe.general.contract import Coefficients, Part
from theorylab.moe.general.scoring import location, regression

Array = jax.Array
FLOOR = 1e-6                                        # least variance, relative to that of y


class Experts(Part):
    """Conditional laws of y given x, one for each of k experts, with a step that fits them to weighted rows.

    A new kind is a subclass whose arrays have one row per expert. It defines `experts`, `dim`, `dtype`, `free` and the methods below; rows x have
    shape `(n, d)`. `fitted` must not lower the weighted log-likelihood, so that EM is monotone.

    Example:
        >>> from theorylab.moe import general
        >>> experts = general.PolynomialExperts([[0.0, 1.0], [1.0, 0.0]], [0.1, 0.1], degree=1)
        >>> isinstance(experts, general.Experts), experts.mean(jnp.array([[3.0]])).tolist()
        (True, [[3.0, 1.0]])
    """

    @property
    def free(self) -> int:
        """Number of free parameters of all experts."""
        raise NotImplementedError(f"{type(self).__name__} must define free")

    def responses(self, y: Any, rows: int) -> Array:
        """`y` checked, in the form that the other methods take: here numbers of shape `(n,)`."""
        y = checks.array("y", y, (rows,))
        checks.same_dtype(**{"parameters of the experts": self, "y": y})
        return y

    def features(self, y: Array) -> Array:
        """Responses as points, shape `(n, m)`, whose distances tell regimes apart."""
        return y.reshape(y.shape[0], -1)

    def log_density(self, x: Array, y: Array) -> Array:
        """Logarithms of the densities (or probabilities) of y, shape `(n, k)`."""
        raise NotImplementedError(f"{type(self).__name__} must define log_density(x, y)")

    def mean(self, x: Array) -> Array:
        """Means of the experts, shape `(n, k)` and the shape of one response."""
        raise NotImplementedError(f"{type(self).__name__} must define mean(x)")

    def sample(self, x: Array, *, key: Key) -> Array:
        """One response of every expert at every row, with the shape of `mean`."""
        raise NotImplementedError(f"{type(self).__name__} must define sample(x, *, key)")

    def fitted(self, x: Array, y: Array, weights: Array, floor: Any = FLOOR) -> Self:
        """The experts after a step of weighted maximum likelihood, with `weights` of shape `(n, k)`, variances at least `floor` times that of y."""
        raise NotImplementedError(f"{type(self).__name__} must define fitted(x, y, weights, floor)")

    def fresh(self, x: Array, y: Array, weight: Array, *, key: Key) -> Self:
        """Experts of the same shape that know nothing but location and scale of the data: where a fit begins."""
        raise NotImplementedError(f"{type(self).__name__} must define fresh(x, y, weight, *, key)")


def positive(name: str, value: Any) -> None:
    """Refuse entries that are not positive."""
    if checks.known(value) and not np.all(np.asarray(value) > 0):
        raise ArgumentError(f"{name} must be positive for every expert, got {np.asarray(value).tolist()}")


def normal_log_density(variance: Array, residual: Array) -> Array:
    """Logarithms of normal densities at residuals of shape `(n, k)`."""
    return -(residual * residual / variance + jnp.log(variance) + density.LOG_TWO_PI) / 2


def spread(y: Array, weights: Array) -> Array:
    """Variance of y under the weights of all experts together."""
    return location(y[:, None], jnp.sum(weights, axis=1))[1][0] ** 2


def mean_square(residual: Array, weights: Array, least: Array) -> Array:
    """Weighted mean of squared residuals per expert, at least `least`."""
    count = jnp.sum(weights, axis=0)
    return jnp.maximum(jnp.sum(weights * residual**2, axis=0) / jnp.where(count > 0, count, jnp.ones_like(count)), least)


class PolynomialExperts(Coefficients, Experts):
    r"""Polynomials with normal noise: $N(y;\, \sum_a c_{ja} z^a, \sigma_j)$ over all monomials of z up to a total degree.

    Monomials come by degree, then in the order $z_1^2, z_1 z_2, z_2^2$; those of degree 1 are (1, x), so that degree 1 is the expert of `Mixture`.

    Args:
        coef: coefficients c, shape `(k, q)` with q monomials.
        variance: $\sigma$, shape `(k,)`.
        degree: largest total degree.
        center: z is (x - center) / scale, shape `(d,)`; 0 unless given. A fit started by `GeneralLikelihood` takes those of its data.
        scale: 1 unless given.

    Raises:
        ShapeError, PrecisionError, NonFiniteInputError: an array is wrong; the message names it.
        ArgumentError: a variance or scale that is not positive.

    Example:
        >>> from theorylab.moe import general
        >>> experts = general.PolynomialExperts([[0.0, 0.0, 1.0], [1.0, -1.0, 0.0]], [0.1, 0.1], degree=2)
        >>> experts.mean(jnp.array([[2.0]])).tolist()
        [[4.0, -1.0]]
    """

    variance: Any
    center: Any
    scale: Any
    degree: int = size()

    def __init__(self, coef: Any, variance: Any, degree: int, center: Any = None, scale: Any = None):
        self.coef = checks.array("coef", coef, (None, None))
        k, q = self.coef.shape
        self.variance = checks.array("variance", variance, (k,))
        positive("variance", self.variance)
        self.degree = checks.whole("degree", degree, low=1)
        d = next((d for d in range(1, q + 1) if math.comb(d + self.degree, d) >= q), 1)
        if math.comb(d + self.degree, d) != q:
            raise ShapeError(f"coef must have one column per monomial up to degree {self.degree}: {1 + self.degree} for one input, "
                             f"{math.comb(2 + self.degree, 2)} for two, got {q}")
        self.center = jnp.zeros(d, self.coef.dtype) if center is None else checks.array("center", center, (d,))
        self.scale = jnp.ones(d, self.coef.dtype) if scale is None else checks.array("scale", scale, (d,))
        positive("scale", self.scale)
        checks.same_dtype(coef=self.coef, variance=self.variance, center=self.center, scale=self.scale)

    @property
    def dim(self) -> int:
        return self.center.shape[-1]

    @property
    def free(self) -> int:
        return self.experts * (self.coef.shape[-1] + 1)

    def _monomials(self, x: Array) -> Array:
        z = (x - self.center) / self.scale
        terms = [c for total in range(1, self.degree + 1) for c in combinations_with_replacement(range(self.dim), total)]
        return jnp.stack([jnp.prod(z[:, list(term)], axis=1) for term in terms], axis=1)

    def mean(self, x: Array) -> Array:
        return product(self._monomials(x), self.coef[:, 1:].T) + self.coef[:, 0]

    def log_density(self, x: Array, y: Array) -> Array:
        return normal_log_density(self.variance, y[:, None] - self.mean(x))

    def sample(self, x: Array, *, key: Key) -> Array:
        mean = self.mean(x)
        return mean + jnp.sqrt(self.variance) * jax.random.normal(key, mean.shape, mean.dtype)

    def fitted(self, x: Array, y: Array, weights: Array, floor: Any = FLOOR) -> Self:
        """Weighted least squares, in closed form; an expert with fewer rows than coefficients stays as it is."""
        fit = regression(self._monomials(x), (y[:, None] - self.mean(x))[:, :, None], weights)
        new = self.replace(coef=self.coef + fit.change[:, 0])
        variance = mean_square(y[:, None] - new.mean(x), weights, (floor * spread(y, weights)).astype(self.dtype))
        return new.replace(variance=jnp.where(fit.starved, self.variance, variance))

    def fresh(self, x: Array, y: Array, weight: Array, *, key: Key) -> Self:
        center, scale = location(x, weight)
        middle, deviation = location(y[:, None], weight)
        return self.replace(coef=jnp.zeros_like(self.coef).at[:, 0].set(middle[0]), variance=jnp.broadcast_to(deviation**2, self.variance.shape),
                            center=center, scale=scale)


class LinearExperts(Coefficients, Experts):
    r"""Linear functions with normal noise and several responses: $N(y;\, A_j x + b_j, \Sigma_j)$.

    Args:
        coef: A, shape `(k, m, d)`.
        intercept: b, shape `(k, m)`.
        covariance: $\Sigma$, symmetric positive definite, shape `(k, m, m)`.

    Raises:
        ShapeError, PrecisionError, NonFiniteInputError: an array is wrong; the message names it.
        MatrixError: a covariance that is not symmetric positive definite.

    Example:
        >>> from theorylab.moe import general
        >>> experts = general.LinearExperts([[[1.0], [2.0]]], [[0.0, 1.0]], [jnp.eye(2)])
        >>> experts.mean(jnp.array([[3.0]])).tolist()
        [[[3.0, 7.0]]]
    """

    intercept: Any
    covariance: Any

    def __init__(self, coef: Any, intercept: Any, covariance: Any):
        self.coef = checks.array("coef", coef, (None, None, None))
        k, m, _ = self.coef.shape
        self.intercept = checks.array("intercept", intercept, (k, m))
        checks.array("covariance", covariance, (k, m, m))
        self.covariance = checks.definite("covariance", covariance, m, batched=True)
        checks.same_dtype(coef=self.coef, intercept=self.intercept, covariance=self.covariance)

    @property
    def experts(self) -> int:
        return self.coef.shape[-3]

    @property
    def outputs(self) -> int:
        """Number of responses m."""
        return self.coef.shape[-2]

    @property
    def free(self) -> int:
        m = self.outputs
        return self.experts * (m * (self.dim + 1) + m * (m + 1) // 2)

    def responses(self, y: Any, rows: int) -> Array:
        """`y` checked: shape `(n, m)`, or `(n,)` for m = 1."""
        y = jnp.reshape(y, (-1, 1)) if self.outputs == 1 and np.ndim(y) == 1 else y
        y = checks.array("y", y, (rows, self.outputs))
        checks.same_dtype(**{"parameters of the experts": self, "y": y})
        return y

    def mean(self, x: Array) -> Array:
        k, m, d = self.coef.shape
        return product(x, self.coef.reshape(k * m, d).T).reshape(-1, k, m) + self.intercept

    def log_density(self, x: Array, y: Array) -> Array:
        factor = jnp.linalg.cholesky(self.covariance)
        residual = (y[:, None, :] - self.mean(x)).transpose(1, 2, 0)
        half = solve_triangular(factor, residual, lower=True)
        log_volume = jnp.sum(jnp.log(jnp.diagonal(factor, axis1=1, axis2=2)), axis=1)
        return -jnp.sum(half * half, axis=1).T / 2 - log_volume - self.outputs * density.LOG_TWO_PI / 2

    def sample(self, x: Array, *, key: Key) -> Array:
        mean = self.mean(x)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return mean + product(jnp.linalg.cholesky(self.covariance), noise[..., None])[..., 0]

    def fitted(self, x: Array, y: Array, weights: Array, floor: Any = FLOOR) -> Self:
        """Weighted least squares, in closed form; an expert with fewer rows than coefficients per response stays as it is."""
        fit = regression(x, y[:, None, :] - self.mean(x), weights)
        new = self.replace(coef=self.coef + fit.change[:, :, 1:], intercept=self.intercept + fit.change[:, :, 0])
        residual = y[:, None, :] - new.mean(x)
        count = jnp.sum(weights, axis=0)[:, None, None]
        moment = jnp.einsum("nk,nkp,nkq->kpq", weights, residual, residual, precision=jax.lax.Precision.HIGHEST)
        # The best covariance that is at least `floor` in units of the deviations of y: eigenvalues below it are raised.
        unit = location(y, jnp.sum(weights, axis=1))[1]
        values, vectors = jnp.linalg.eigh(moment / jnp.where(count > 0, count, jnp.ones_like(count)) / (unit[:, None] * unit))
        raised = product(vectors * jnp.maximum(values, jnp.asarray(floor, self.dtype))[:, None, :], vectors.mT) * (unit[:, None] * unit)
        return new.replace(covariance=jnp.where(fit.starved[:, None, None], self.covariance, (raised + raised.mT) / 2))

    def fresh(self, x: Array, y: Array, weight: Array, *, key: Key) -> Self:
        middle, deviation = location(y, weight)
        return self.replace(coef=jnp.zeros_like(self.coef), intercept=jnp.broadcast_to(middle, self.intercept.shape),
                            covariance=jnp.broadcast_to(jnp.diag(deviation**2), self.covariance.shape))
