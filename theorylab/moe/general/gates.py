"""Gates: what ranks the experts at an input, and how the kept ones share it."""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks
from theorylab.core.keys import Key
from theorylab.core.module import choice
from theorylab.core.psd import product
from theorylab.errors import ArgumentError
from theorylab.moe import density
from theorylab.moe.general.contract import Coefficients, Part
from theorylab.moe.model import SELECTIONS
from theorylab.moe.moments import to_inputs

Array = jax.Array
LARGEST_FACTOR = 2.0                                # logarithm by which one step may change a temperature


class Gate(Part):
    """What ranks k experts at an input, and the logits whose softmax over the kept ones are their weights.

    A new gate is a subclass whose arrays have one row per expert. It defines `experts`, `dim`, `dtype`, `logits`, `coordinates`, `moved` and
    `fresh`; also `scores` if something else ranks, or `log_weights` if the selection is not the plain top K. Rows x have shape `(n, d)`.

    Example:
        >>> from theorylab.moe import general
        >>> gate = general.SoftmaxGate([0.0, 0.0, 0.0], [[-1.0], [0.0], [1.0]])
        >>> isinstance(gate, general.Gate), jnp.exp(gate.log_weights(jnp.array([[2.0]]), active=1)).tolist()
        (True, [[0.0, 0.0, 1.0]])
    """

    @property
    def coordinates(self) -> int:
        """Number of coordinates that a fit moves."""
        raise NotImplementedError(f"{type(self).__name__} must define coordinates")

    def logits(self, x: Array) -> Array:
        """Logarithms of the weights up to normalization, shape `(n, k)`."""
        raise NotImplementedError(f"{type(self).__name__} must define logits(x)")

    def scores(self, x: Array) -> Array:
        """What ranks the experts, shape `(n, k)`: the logits unless a gate says otherwise."""
        return self.logits(x)

    def moved(self, change: Array, center: Array, scale: Array) -> Self:
        """The gate after a change of its coordinates; where it can, in those of the inputs (x - center) / scale."""
        raise NotImplementedError(f"{type(self).__name__} must define moved(change, center, scale)")

    def fresh(self, key: Key) -> Self:
        """A gate of the same shape that knows nothing: where a fit begins."""
        raise NotImplementedError(f"{type(self).__name__} must define fresh(key)")

    def kept(self, x: Array, active: int) -> Array:
        """The `active` experts of largest score, boolean of shape `(n, k)`; equal scores go to the lower index."""
        return density.top(self.scores(x).T, active).T

    def log_weights(self, x: Array, active: int) -> Array:
        """Logarithms of the weights, shape `(n, k)`, -inf off the kept experts; derivatives hold the selection fixed."""
        logits, mask = self.logits(x), self.kept(x, active)
        return jnp.where(mask, logits - density.log_sum(logits.T, mask.T)[:, None], -jnp.inf)


class GateAround(Gate):
    """A gate that changes how another one selects; its coordinates are those of the other."""

    gate: Gate

    @property
    def experts(self) -> int:
        return self.gate.experts

    @property
    def dim(self) -> int:
        return self.gate.dim

    @property
    def dtype(self) -> Any:
        return self.gate.dtype

    @property
    def coordinates(self) -> int:
        return self.gate.coordinates

    def moved(self, change: Array, center: Array, scale: Array) -> Self:
        return self.replace(gate=self.gate.moved(change, center, scale))


class _LinearGate(Coefficients, Gate):
    """Linear functions of the inputs."""

    intercept: Any

    def _set(self, intercept: Any, coef: Any) -> None:
        self.coef = checks.array("coef", coef, (None, None))
        self.intercept = checks.array("intercept", intercept, (self.coef.shape[0],))
        checks.same_dtype(intercept=self.intercept, coef=self.coef)

    @property
    def coordinates(self) -> int:
        return self.experts * (self.dim + 1)

    def moved(self, change: Array, center: Array, scale: Array) -> Self:
        raw = to_inputs(change.reshape(self.experts, self.dim + 1), center, scale)
        return self.replace(intercept=self.intercept + raw[:, 0], coef=self.coef + raw[:, 1:])

    def fresh(self, key: Key) -> Self:
        return self.replace(intercept=jnp.zeros_like(self.intercept), coef=jnp.zeros_like(self.coef))


class SoftmaxGate(_LinearGate):
    r"""The gate of `Mixture` with a temperature: logits $(\beta_{0j} + \beta_{1j}^\top x) / \tau$.

    Multiplying $\beta_0$, $\beta_1$ and $\tau$ by one number changes nothing, so a fit leaves the temperature as it is (companion derivation).

    Args:
        intercept: $\beta_0$, shape `(k,)`.
        coef: $\beta_1$, shape `(k, d)`.
        temperature: $\tau$, above 0.
        selection: score: `"slope"` $\beta_{1j}^\top x / \tau$, or `"logit"`.

    Raises:
        ShapeError, PrecisionError, NonFiniteInputError: an array is wrong; the message names it.
        ArgumentError: a temperature that is not positive, or another `selection`.

    Example:
        >>> from theorylab.moe import general
        >>> x = jnp.array([[0.5]])
        >>> one = general.SoftmaxGate([0.0, 1.0], [[2.0], [0.0]])
        >>> two = general.SoftmaxGate([0.0, 3.0], [[6.0], [0.0]], temperature=3.0)
        >>> bool(jnp.allclose(one.log_weights(x, 2), two.log_weights(x, 2)))
        True
    """

    temperature: Any
    selection: str = choice(among=SELECTIONS)

    def __init__(self, intercept: Any, coef: Any, temperature: Any = 1.0, selection: str = "slope"):
        self._set(intercept, coef)
        self.temperature = jnp.asarray(checks.real("temperature", temperature, above=0.0), self.coef.dtype)
        self.selection = selection

    def logits(self, x: Array) -> Array:
        return (product(x, self.coef.T) + self.intercept) / self.temperature

    def scores(self, x: Array) -> Array:
        return product(x, self.coef.T) / self.temperature if self.selection == "slope" else self.logits(x)


class SigmoidGate(_LinearGate):
    r"""Sigmoids of linear functions, normalized over the kept experts: $\pi_j \propto \mathrm{sigmoid}(\beta_{0j} + \beta_{1j}^\top x)$.

    Args:
        intercept: $\beta_0$, shape `(k,)`.
        coef: $\beta_1$, shape `(k, d)`.

    Raises:
        ShapeError, PrecisionError, NonFiniteInputError: an array is wrong; the message names it.

    Example:
        >>> from theorylab.moe import general
        >>> jnp.exp(general.SigmoidGate([0.0, 0.0], [[1.0], [-1.0]]).log_weights(jnp.zeros((1, 1)), 2)).round(12).tolist()
        [[0.5, 0.5]]
    """

    def __init__(self, intercept: Any, coef: Any):
        self._set(intercept, coef)

    def logits(self, x: Array) -> Array:
        return jax.nn.log_sigmoid(self.scores(x))

    def scores(self, x: Array) -> Array:
        return product(x, self.coef.T) + self.intercept


class CosineGate(Coefficients, Gate):
    r"""Cosines of the angles between the input and one direction per expert, over a temperature.

    The logits are $c_j^\top x / (\tau \|x\|)$ with unit vectors $c_j$: only the direction of the input matters. At x = 0 all are 0.

    Args:
        coef: directions, shape `(k, d)`; rows are divided by their norm.
        temperature: $\tau$, above 0.
        learn: whether a fit moves the temperature too.

    Raises:
        ShapeError, PrecisionError, NonFiniteInputError: an array is wrong; the message names it.
        ArgumentError: a row of zeros, or a temperature that is not positive.

    Example:
        >>> from theorylab.moe import general
        >>> gate = general.CosineGate([[2.0, 0.0], [0.0, 3.0]], temperature=0.5)
        >>> gate.logits(jnp.array([[5.0, 0.0]])).tolist()
        [[2.0, 0.0]]
    """

    temperature: Any
    learn: bool = choice(among=(True, False))

    def __init__(self, coef: Any, temperature: Any = 1.0, learn: bool = True):
        coef = checks.array("coef", coef, (None, None))
        norm = jnp.linalg.norm(coef, axis=1, keepdims=True)
        if checks.known(norm) and not np.all(np.asarray(norm) > 0):
            raise ArgumentError(f"coef must have no row of zeros, got norms {np.asarray(norm)[:, 0].tolist()}: a direction has unit length")
        self.coef = coef / norm
        self.temperature = jnp.asarray(checks.real("temperature", temperature, above=0.0), coef.dtype)
        self.learn = learn

    @property
    def coordinates(self) -> int:
        return self.coef.shape[-2] * self.coef.shape[-1] + self.learn

    def logits(self, x: Array) -> Array:
        square = jnp.sum(x * x, axis=1, keepdims=True)
        unit = x / jnp.sqrt(jnp.where(square > 0, square, jnp.ones_like(square)))
        return product(unit, self.coef.T) / self.temperature

    def moved(self, change: Array, center: Array, scale: Array) -> Self:
        factor = jnp.exp(jnp.clip(change[-1], -LARGEST_FACTOR, LARGEST_FACTOR)) if self.learn else jnp.ones_like(self.temperature)
        return self.replace(coef=self.coef + change[: self.coef.size].reshape(self.coef.shape), temperature=self.temperature * factor)

    def fresh(self, key: Key) -> Self:
        return self.replace(coef=jax.random.normal(key, self.coef.shape, self.dtype), temperature=jnp.ones_like(self.temperature)
                            if self.learn else self.temperature)


class QuadraticGate(_LinearGate):
    r"""Quadratic logits $\beta_{0j} + \beta_{1j}^\top x + \tfrac12 x^\top C_j x$: every expert may own a bounded region.

    Gaussian gates, $\pi_j \propto w_j N(x; m_j, S_j)$, are of this form: see `from_gaussians`. Adding one quadratic function to all logits changes
    nothing, so the curvatures of a fit need not be negative.

    Args:
        intercept: $\beta_0$, shape `(k,)`.
        coef: $\beta_1$, shape `(k, d)`.
        curvature: C, symmetric, shape `(k, d, d)`.

    Raises:
        ShapeError, PrecisionError, NonFiniteInputError: an array is wrong; the message names it.
        MatrixError: a curvature that is not symmetric.

    Example:
        >>> from theorylab.moe import general
        >>> gate = general.QuadraticGate.from_gaussians([0.5, 0.5], [[0.0], [0.0]], [[[1.0]], [[9.0]]])
        >>> gate.kept(jnp.array([[0.0], [3.0]]), 1).tolist()
        [[True, False], [False, True]]
    """

    curvature: Any

    def __init__(self, intercept: Any, coef: Any, curvature: Any):
        self._set(intercept, coef)
        k, d = self.coef.shape
        checks.array("curvature", curvature, (k, d, d))
        self.curvature = checks.symmetric("curvature", curvature, d, batched=True)
        checks.same_dtype(coef=self.coef, curvature=self.curvature)

    @classmethod
    def from_gaussians(cls, weight: Any, mean: Any, covariance: Any) -> Self:
        """The gate of positive weights `(k,)`, means `(k, d)` and covariances `(k, d, d)`.

        Raises:
            ArgumentError: a weight that is not positive.
            MatrixError: a covariance that is not positive definite.
        """
        mean = checks.array("mean", mean, (None, None))
        k, d = mean.shape
        weight = checks.array("weight", weight, (k,))
        checks.array("covariance", covariance, (k, d, d))
        covariance = checks.definite("covariance", covariance, d, batched=True)
        if checks.known(weight) and not np.all(np.asarray(weight) > 0):
            raise ArgumentError(f"weight must be positive for every expert, got {np.asarray(weight).tolist()}")
        precision = jnp.linalg.inv(covariance)
        precision = (precision + precision.mT) / 2
        coef = product(precision, mean[:, :, None])[:, :, 0]
        return cls(jnp.log(weight) - (jnp.linalg.slogdet(covariance)[1] + jnp.sum(coef * mean, axis=1)) / 2, coef, -precision)

    @property
    def coordinates(self) -> int:
        return self.experts * (1 + self.dim + self.dim * (self.dim + 1) // 2)

    def logits(self, x: Array) -> Array:
        bend = jnp.sum(product(x[None], self.curvature) * x[None], axis=2).T / 2
        return product(x, self.coef.T) + self.intercept + bend

    def moved(self, change: Array, center: Array, scale: Array) -> Self:
        k, d = self.experts, self.dim
        change = change.reshape(k, -1)
        rows, columns = np.triu_indices(d)
        bend = jnp.zeros((k, d, d), self.dtype).at[:, rows, columns].set(change[:, 1 + d:]).at[:, columns, rows].set(change[:, 1 + d:])
        bend = bend / (scale[:, None] * scale)
        slope = change[:, 1:1 + d] / scale
        shift = product(bend, center)
        level = change[:, 0] - product(slope, center) + product(shift, center) / 2
        return self.replace(intercept=self.intercept + level, coef=self.coef + slope - shift, curvature=self.curvature + bend)

    def fresh(self, key: Key) -> Self:
        return jax.tree.map(jnp.zeros_like, self)
