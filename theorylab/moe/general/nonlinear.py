"""Experts that have no closed form: classes by multinomial logits, and small neural networks."""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from theorylab.core import checks
from theorylab.core.keys import Key
from theorylab.core.psd import product
from theorylab.errors import ArgumentError
from theorylab.moe.general.contract import Coefficients
from theorylab.moe.general.experts import FLOOR, Experts, mean_square, normal_log_density, positive, spread
from theorylab.moe.general.scoring import best, damped, fractions, location, scoring, standardized
from theorylab.moe.moments import to_inputs

Array = jax.Array
DAMPINGS = (1e-8, 1e-4, 1e-2, 1.0, 100.0)           # of the moves among which a network takes its best
SLOPE = 1.5                                         # deviation of the random slopes of a fresh network, in standardized inputs


class LogisticExperts(Coefficients, Experts):
    r"""Multinomial logits: y is a class 0..c-1 and $P_j(y \mid x) \propto \exp(a_{jy}^\top x + b_{jy})$.

    Args:
        coef: a, shape `(k, c, d)`.
        intercept: b, shape `(k, c)`.

    Raises:
        ShapeError, PrecisionError, NonFiniteInputError: an array is wrong; the message names it.
        ArgumentError: fewer than two classes.

    Example:
        >>> from theorylab.moe import general
        >>> experts = general.LogisticExperts([[[0.0], [1.0]]], [[0.0, 0.0]])
        >>> experts.mean(jnp.zeros((1, 1))).tolist()
        [[[0.5, 0.5]]]
    """

    intercept: Any

    def __init__(self, coef: Any, intercept: Any):
        self.coef = checks.array("coef", coef, (None, None, None))
        k, c, _ = self.coef.shape
        self.intercept = checks.array("intercept", intercept, (k, c))
        checks.same_dtype(coef=self.coef, intercept=self.intercept)
        if c < 2:
            raise ArgumentError(f"coef must have at least two classes, of shape (k, c, d), got shape {self.coef.shape}")

    @property
    def experts(self) -> int:
        return self.coef.shape[-3]

    @property
    def classes(self) -> int:
        """Number of classes c."""
        return self.coef.shape[-2]

    @property
    def free(self) -> int:
        return self.experts * (self.classes - 1) * (self.dim + 1)

    def responses(self, y: Any, rows: int) -> Array:
        """`y` checked: classes of shape `(n,)`, as whole numbers."""
        y = checks.array("y", y, (rows,))
        if checks.known(y):
            seen = np.asarray(y)
            bad = seen[(seen != np.round(seen)) | (seen < 0) | (seen >= self.classes)]
            if bad.size:
                raise ArgumentError(f"y must hold classes 0 to {self.classes - 1}, got {bad[0]:g}")
        return y.astype(jnp.int32)

    def features(self, y: Array) -> Array:
        return jax.nn.one_hot(y, self.classes, dtype=self.dtype)

    def _log_probabilities(self, x: Array) -> Array:
        k, c, d = self.coef.shape
        return jax.nn.log_softmax(product(x, self.coef.reshape(k * c, d).T).reshape(-1, k, c) + self.intercept, axis=2)

    def log_density(self, x: Array, y: Array) -> Array:
        return jnp.take_along_axis(self._log_probabilities(x), y[:, None, None], axis=2)[:, :, 0]

    def mean(self, x: Array) -> Array:
        """Probabilities of the classes, shape `(n, k, c)`."""
        return jnp.exp(self._log_probabilities(x))

    def sample(self, x: Array, *, key: Key) -> Array:
        """Classes, shape `(n, k)`."""
        return jax.random.categorical(key, self._log_probabilities(x), axis=2).astype(jnp.int32)

    def fitted(self, x: Array, y: Array, weights: Array, floor: Any = FLOOR) -> Self:
        """One damped Newton step, of which the best fraction is taken; on separated classes each step is finite and gains less and less."""
        center, scale = location(x, jnp.sum(weights, axis=1))
        z, chosen = standardized(x, center, scale), self.features(y)
        c, p = self.classes, self.dim + 1

        def step(logits: Array, weight: Array) -> Array:
            log_probabilities = lambda change: jax.nn.log_softmax(logits + product(z, change.reshape(c, p).T), axis=1)  # noqa: E731
            share = weight[:, None] * chosen
            moves = fractions(scoring(log_probabilities, c * p, share))
            return to_inputs(best(lambda change: jnp.sum(share * log_probabilities(change)), moves).reshape(c, p), center, scale)

        change = jax.vmap(step, in_axes=(1, 1))(self._log_probabilities(x), weights)
        return self.replace(coef=self.coef + change[:, :, 1:], intercept=self.intercept + change[:, :, 0])

    def fresh(self, x: Array, y: Array, weight: Array, *, key: Key) -> Self:
        return jax.tree.map(jnp.zeros_like, self)


class NeuralExperts(Experts):
    r"""Small neural networks with normal noise: $N(y;\, v_j^\top \tanh(H_j x + g_j) + b_j, \sigma_j)$.

    Args:
        hidden_coef: H, shape `(k, h, d)` with h hidden units.
        hidden_intercept: g, shape `(k, h)`.
        coef: v, shape `(k, h)`.
        intercept: b, shape `(k,)`.
        variance: $\sigma$, shape `(k,)`.

    Raises:
        ShapeError, PrecisionError, NonFiniteInputError: an array is wrong; the message names it.
        ArgumentError: a variance that is not positive.

    Example:
        >>> from theorylab.moe import general
        >>> experts = general.NeuralExperts.of_size(experts=2, dim=1, hidden=4)
        >>> experts.mean(jnp.zeros((3, 1))).shape
        (3, 2)
    """

    hidden_coef: Any
    hidden_intercept: Any
    coef: Any
    intercept: Any
    variance: Any

    def __init__(self, hidden_coef: Any, hidden_intercept: Any, coef: Any, intercept: Any, variance: Any):
        self.hidden_coef = checks.array("hidden_coef", hidden_coef, (None, None, None))
        k, h, _ = self.hidden_coef.shape
        self.hidden_intercept = checks.array("hidden_intercept", hidden_intercept, (k, h))
        self.coef = checks.array("coef", coef, (k, h))
        self.intercept, self.variance = checks.array("intercept", intercept, (k,)), checks.array("variance", variance, (k,))
        positive("variance", self.variance)
        checks.same_dtype(hidden_coef=self.hidden_coef, hidden_intercept=self.hidden_intercept, coef=self.coef, intercept=self.intercept,
                          variance=self.variance)

    @classmethod
    def of_size(cls, experts: int, dim: int, hidden: int, dtype: Any = jnp.float64) -> Self:
        """Experts of these sizes, as the model of a fit: `GeneralLikelihood` draws their first weights."""
        k, d, h = (checks.whole(name, value, low=1) for name, value in (("experts", experts), ("dim", dim), ("hidden", hidden)))
        zeros = lambda *shape: jnp.zeros(shape, dtype)  # noqa: E731
        return cls(zeros(k, h, d), zeros(k, h), zeros(k, h), zeros(k), jnp.ones(k, dtype))

    @property
    def experts(self) -> int:
        return self.hidden_coef.shape[-3]

    @property
    def dim(self) -> int:
        return self.hidden_coef.shape[-1]

    @property
    def dtype(self) -> Any:
        return self.coef.dtype

    @property
    def free(self) -> int:
        k, h, d = self.hidden_coef.shape[-3:]
        return k * (h * (d + 2) + 2)

    def mean(self, x: Array) -> Array:
        parts = (self.hidden_coef, self.hidden_intercept, self.coef, self.intercept)
        return jax.vmap(lambda one: _network(one, x), out_axes=1)(parts)

    def log_density(self, x: Array, y: Array) -> Array:
        return normal_log_density(self.variance, y[:, None] - self.mean(x))

    def sample(self, x: Array, *, key: Key) -> Array:
        mean = self.mean(x)
        return mean + jnp.sqrt(self.variance) * jax.random.normal(key, mean.shape, mean.dtype)

    def fitted(self, x: Array, y: Array, weights: Array, floor: Any = FLOOR) -> Self:
        """One Levenberg-Marquardt step on the weighted squares, the best of several dampings or none; then the variance."""

        def step(parts: tuple[Array, ...], weight: Array) -> tuple[Array, ...]:
            flat, restore = ravel_pytree(parts)
            predict = lambda at: _network(restore(at), x)  # noqa: E731
            slopes, mean = jax.jacfwd(lambda at: (predict(at),) * 2, has_aux=True)(flat)
            weighted = slopes * weight[:, None]
            curvature, gradient = product(weighted.T, slopes), product(y - mean, weighted)
            moves = jax.vmap(lambda damping: damped(curvature, gradient, damping))(jnp.asarray(DAMPINGS, flat.dtype))
            objective = lambda move: -jnp.sum(weight * (y - predict(flat + move)) ** 2)  # noqa: E731
            return restore(flat + best(objective, jnp.concatenate([jnp.zeros_like(moves[:1]), moves])))

        parts = (self.hidden_coef, self.hidden_intercept, self.coef, self.intercept)
        starved = jnp.sum(weights, axis=0) < self.free // self.experts
        new = self.replace(**dict(zip(("hidden_coef", "hidden_intercept", "coef", "intercept"), jax.vmap(step, in_axes=(0, 1))(parts, weights),
                                      strict=True)))
        variance = mean_square(y[:, None] - new.mean(x), weights, (floor * spread(y, weights)).astype(self.dtype))
        new = new.replace(variance=variance)
        return jax.tree.map(lambda old, now: jnp.where(starved.reshape((-1,) + (1,) * (old.ndim - 1)), old, now), self, new)

    def fresh(self, x: Array, y: Array, weight: Array, *, key: Key) -> Self:
        center, scale = location(x, weight)
        middle, deviation = location(y[:, None], weight)
        slope_key, level_key = jax.random.split(key)
        slopes = SLOPE * jax.random.normal(slope_key, self.hidden_coef.shape, self.dtype) / scale
        levels = SLOPE * jax.random.normal(level_key, self.hidden_intercept.shape, self.dtype)
        return self.replace(hidden_coef=slopes, hidden_intercept=levels - product(slopes, center), coef=jnp.zeros_like(self.coef),
                            intercept=jnp.broadcast_to(middle, self.intercept.shape), variance=jnp.broadcast_to(deviation**2, self.variance.shape))


def _network(parts: tuple[Array, ...], x: Array) -> Array:
    hidden_coef, hidden_intercept, coef, intercept = parts
    return product(jnp.tanh(product(x, hidden_coef.T) + hidden_intercept), coef) + intercept
