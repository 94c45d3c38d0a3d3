"""Experts with Student noise, whose fit resists outliers."""

from __future__ import annotations

import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaln

from theorylab.core import checks
from theorylab.core.keys import Key
from theorylab.core.module import choice
from theorylab.core.psd import product
from theorylab.moe.general.contract import Coefficients
from theorylab.moe.general.experts import FLOOR, Experts, positive, spread
from theorylab.moe.general.scoring import location, regression

Array = jax.Array
FREEDOM = (0.1, 1000.0)                             # degrees of freedom of a Student fit
HALVINGS = 35                                       # of the search for their logarithm: to 3e-10


class StudentExperts(Coefficients, Experts):
    r"""Linear functions with Student noise, for data with outliers: $y = a_j^\top x + b_j + s_j T$ with T of $\nu_j$ degrees of freedom.

    Args:
        coef: a, shape `(k, d)`.
        intercept: b, shape `(k,)`.
        scale: s, shape `(k,)`; the variance is $s^2 \nu / (\nu - 2)$.
        df: $\nu$, shape `(k,)`.
        learn: whether a fit moves the degrees of freedom too, between 0.1 and 1000.

    Raises:
        ShapeError, PrecisionError, NonFiniteInputError: an array is wrong; the message names it.
        ArgumentError: a scale or degrees of freedom that are not positive.

    Example:
        >>> from theorylab.moe import general
        >>> experts = general.StudentExperts([[0.0]], [0.0], [1.0], [1.0])
        >>> jnp.exp(experts.log_density(jnp.zeros((1, 1)), jnp.zeros(1))).round(6).tolist()
        [[0.31831]]
    """

    intercept: Any
    scale: Any
    df: Any
    learn: bool = choice(among=(True, False))

    def __init__(self, coef: Any, intercept: Any, scale: Any, df: Any, learn: bool = True):
        self.coef = checks.array("coef", coef, (None, None))
        k = self.coef.shape[0]
        self.intercept = checks.array("intercept", intercept, (k,))
        self.scale, self.df = checks.array("scale", scale, (k,)), checks.array("df", df, (k,))
        positive("scale", self.scale)
        positive("df", self.df)
        checks.same_dtype(coef=self.coef, intercept=self.intercept, scale=self.scale, df=self.df)
        self.learn = learn

    @property
    def free(self) -> int:
        return self.experts * (self.dim + 2 + self.learn)

    def mean(self, x: Array) -> Array:
        """Centers a x + b: the means where there are more than one degree of freedom."""
        return product(x, self.coef.T) + self.intercept

    def log_density(self, x: Array, y: Array) -> Array:
        return _student(self.df, self.scale, y[:, None] - self.mean(x))

    def sample(self, x: Array, *, key: Key) -> Array:
        mean = self.mean(x)
        return mean + self.scale * jax.random.t(key, jnp.broadcast_to(self.df, mean.shape), mean.shape, mean.dtype)

    def fitted(self, x: Array, y: Array, weights: Array, floor: Any = FLOOR) -> Self:
        """A step of ECME: least squares with rows down-weighted by their distance, then the best degrees of freedom for it."""
        residual = y[:, None] - self.mean(x)
        near = weights * (self.df + 1) / (self.df + (residual / self.scale) ** 2)
        fit = regression(x, residual[:, :, None], near)
        count = jnp.sum(weights, axis=0)
        starved = fit.starved | (count < self.dim + 1)
        move = jnp.where(starved[:, None], jnp.zeros_like(fit.change[:, 0]), fit.change[:, 0])
        new = self.replace(coef=self.coef + move[:, 1:], intercept=self.intercept + move[:, 0])
        residual = y[:, None] - new.mean(x)
        square = jnp.sum(near * residual**2, axis=0) / jnp.where(count > 0, count, jnp.ones_like(count))
        scale = jnp.sqrt(jnp.maximum(square, (floor * spread(y, weights)).astype(self.dtype)))
        new = new.replace(scale=jnp.where(starved, self.scale, scale))
        return new.replace(df=jnp.where(starved, self.df, _freedom(new, residual, weights))) if self.learn else new

    def fresh(self, x: Array, y: Array, weight: Array, *, key: Key) -> Self:
        middle, deviation = location(y[:, None], weight)
        flat = jnp.ones_like(self.scale)
        return self.replace(coef=jnp.zeros_like(self.coef), intercept=middle * flat, scale=deviation * flat, df=10 * flat if self.learn else self.df)


def _student(df: Array, scale: Array, residual: Array) -> Array:
    """Logarithms of Student densities at residuals of shape `(n, k)`."""
    constant = gammaln((df + 1) / 2) - gammaln(df / 2) - jnp.log(df * math.pi) / 2 - jnp.log(scale)
    return constant - (df + 1) / 2 * jnp.log1p((residual / scale) ** 2 / df)


def _freedom(experts: StudentExperts, residual: Array, weights: Array) -> Array:
    """Degrees of freedom that maximize the weighted log-likelihood at fixed residuals: its derivative is bisected in their logarithm."""
    count = jnp.sum(weights, axis=0)
    count, square = jnp.where(count > 0, count, jnp.ones_like(count)), (residual / experts.scale) ** 2
    value = lambda df: jnp.sum(weights * _student(df, experts.scale, residual), axis=0)  # noqa: E731
    low, high = (jnp.full(experts.df.shape, math.log(end), experts.dtype) for end in FREEDOM)

    def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        df = jnp.exp((low + high) / 2)
        rows = (df + 1) / df * square / (df + square) - jnp.log1p(square / df)
        up = digamma((df + 1) / 2) - digamma(df / 2) - 1 / df + jnp.sum(weights * rows, axis=0) / count > 0
        return jnp.where(up, jnp.log(df), low), jnp.where(up, high, jnp.log(df))

    low, high = jax.lax.fori_loop(0, HALVINGS, halve, (low, high))
    found = jnp.exp((low + high) / 2)
    return jnp.where(value(found) > value(experts.df), found, experts.df)
