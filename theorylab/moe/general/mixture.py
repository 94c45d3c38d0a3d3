"""A mixture of any experts under any top-K gate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks
from theorylab.core.keys import Key, stream
from theorylab.core.module import Module, size
from theorylab.errors import ArgumentError, ShapeError
from theorylab.moe import density
from theorylab.moe.general.experts import Experts
from theorylab.moe.general.gates import Gate
from theorylab.moe.model import Draw

Array = jax.Array


class GeneralMixture(Module):
    r"""The density $\sum_{j \in S(x)} \pi_j(x)\, f_j(y \mid x)$ of a gate $\pi$ that keeps K experts and of experts f.

    With `SoftmaxGate` and `PolynomialExperts` of degree 1 this is `Mixture`, which has faster methods and the theory.

    Args:
        gate: a `Gate`, such as `SoftmaxGate`, `SigmoidGate`, `CosineGate`, `QuadraticGate`, `NoisyGate`.
        experts: `Experts`, such as `PolynomialExperts`, `LinearExperts`, `StudentExperts`, `LogisticExperts`, `NeuralExperts`.
        active: K, the number of experts that the gate keeps.

    Raises:
        ArgumentError: not a gate or not experts, or `active` outside 1..k.
        ShapeError: gate and experts of different k or d.
        PrecisionError: gate and experts of different dtypes.

    Example:
        >>> from theorylab.moe import general
        >>> gate = general.SoftmaxGate([0.0, 0.0], [[4.0], [0.0]])
        >>> mixture = general.GeneralMixture(gate, general.PolynomialExperts([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [0.1, 0.1], degree=2), active=1)
        >>> mixture.mean(jnp.array([[-3.0], [3.0]])).tolist()
        [-3.0, 9.0]
        >>> mixture
        GeneralMixture(SoftmaxGate, PolynomialExperts, experts=2, active=1, dim=1, float64)
    """

    gate: Gate
    experts: Experts
    active: int = size()

    def __init__(self, gate: Gate, experts: Experts, active: int):
        for name, value, kind in (("gate", gate, Gate), ("experts", experts, Experts)):
            if not isinstance(value, kind):
                raise ArgumentError(f"{name} must be {'a Gate' if kind is Gate else 'Experts'}, got {type(value).__name__}")
        if (gate.experts, gate.dim) != (experts.experts, experts.dim):
            raise ShapeError(f"gate and experts must have the same k and d, got a gate of {gate.experts} experts with {gate.dim} inputs "
                             f"and {experts.experts} experts with {experts.dim} inputs")
        checks.same_dtype(gate=gate, experts=experts)
        self.gate, self.experts = gate, experts
        self.active = checks.whole("active", active, low=1, high=gate.experts)

    @property
    def dim(self) -> int:
        """Number of inputs d."""
        return self.gate.dim

    @property
    def dtype(self) -> Any:
        """Precision of the parameters."""
        return self.gate.dtype

    def inputs(self, x: Any) -> Array:
        """`x` checked, with shape `(n, d)`; for d = 1 a vector of length n will do."""
        x = jnp.reshape(x, (-1, 1)) if self.dim == 1 and np.ndim(x) == 1 else x
        x = checks.array("x", x, (None, self.dim))
        checks.same_dtype(**{"parameters of the mixture": self, "x": x})
        return x

    def pairs(self, x: Any, y: Any) -> tuple[Array, Array]:
        """`x` and `y` checked, in the form that gate and experts take."""
        x = self.inputs(x)
        return x, self.experts.responses(y, x.shape[0])

    def routing(self, x: Any) -> Array:
        """Which experts the gate keeps (a noisy gate: without noise), boolean of shape `(n, k)` with exactly K true per row."""
        return _kept(self, self.inputs(x))

    def log_gate(self, x: Any) -> Array:
        """Logarithms of the gate probabilities, shape `(n, k)`, -inf off the kept experts."""
        return _log_gate(self, self.inputs(x))

    def gate_probabilities(self, x: Any) -> Array:
        """Gate probabilities, shape `(n, k)`."""
        return jnp.exp(self.log_gate(x))

    def log_density(self, x: Any, y: Any) -> Array:
        """The logarithm of the density (or probability) of y given x per row, shape `(n,)`."""
        return log_density(self, *self.pairs(x, y))

    def log_likelihood(self, x: Any, y: Any, weight: Any = None) -> Array:
        """The sum of `log_density`, with weights of shape `(n,)` if given: on new rows, the predictive score.

        Raises:
            ArgumentError: a negative weight.
        """
        x, y = self.pairs(x, y)
        weight = jnp.ones(x.shape[0], x.dtype) if weight is None else row_weights(weight, x)
        return log_likelihood(self, x, y, weight)

    def responsibilities(self, x: Any, y: Any) -> Array:
        """Posterior probability of each expert given (x, y), shape `(n, k)`."""
        return responsibilities(self, *self.pairs(x, y))[0]

    def mean(self, x: Any) -> Array:
        """E[y | x], shape `(n,)`; `(n, m)` for m responses; probabilities `(n, c)` for c classes."""
        return _mean(self, self.inputs(x))

    def sample(self, x: Any, *, key: Key | int, low: Any = 0.0, high: Any = 1.0) -> Draw:
        """Draw responses.

        Args:
            x: inputs of shape `(n, d)`; or a number n of inputs, drawn uniformly between `low` and `high` in each coordinate.
            key: seed or JAX key.
            low: lower end, a number or shape `(d,)`.
            high: upper end.

        Returns:
            `Draw(x, y)`.

        Raises:
            ArgumentError: `low` is not below `high`.
        """
        if np.ndim(x) == 0:
            n = checks.whole("x", x, low=1)
            if checks.known(low, high) and not np.all(np.asarray(low) < np.asarray(high)):
                raise ArgumentError(f"low must be below high, got {np.asarray(low)} and {np.asarray(high)}")
            low, high = jnp.asarray(low, self.dtype), jnp.asarray(high, self.dtype)
            x = low + (high - low) * jax.random.uniform(stream(key, "inputs"), (n, self.dim), self.dtype)
        x = self.inputs(x)
        return Draw(x, _drawn(self, x, stream(key, "experts"), stream(key, "noise")))

    def __repr__(self) -> str:
        return (f"GeneralMixture({type(self.gate).__name__}, {type(self.experts).__name__}, experts={self.gate.experts}, active={self.active}, "
                f"dim={self.dim}, {jnp.dtype(self.dtype).name})")


def row_weights(weight: Any, x: Array) -> Array:
    """`weight` checked: not negative, one for each row."""
    weight = checks.array("weight", weight, (x.shape[0],))
    checks.same_dtype(x=x, weight=weight)
    if checks.known(weight) and not np.all(np.asarray(weight) >= 0):
        raise ArgumentError(f"weight must not be negative, got {np.asarray(weight).min():g} at index {int(np.asarray(weight).argmin())}")
    return weight


def _joint(m: GeneralMixture, x: Array, y: Array) -> tuple[Array, Array]:
    """Logarithms of gate times density, and where they are finite, shape `(k, n)`."""
    gate = m.gate.log_weights(x, m.active).T
    mask = gate > -jnp.inf
    return jnp.where(mask, gate, 0) + m.experts.log_density(x, y).T, mask


@jax.jit
def log_density(m: GeneralMixture, x: Array, y: Array) -> Array:
    """Logarithms of the density, shape `(n,)`."""
    return density.log_sum(*_joint(m, x, y))


@jax.jit
def log_likelihood(m: GeneralMixture, x: Array, y: Array, weight: Array) -> Array:
    """Their weighted sum, in the widest float that is enabled."""
    return jnp.sum(weight * log_density(m, x, y), dtype=jnp.result_type(float))


@jax.jit
def responsibilities(m: GeneralMixture, x: Array, y: Array) -> tuple[Array, Array]:
    """Posterior probabilities of the experts, shape `(n, k)`, and logarithms of the density."""
    joint, mask = _joint(m, x, y)
    total = density.log_sum(joint, mask)
    return jnp.where(mask, jnp.exp(jnp.where(mask, joint - total, 0)), 0).T, total


@jax.jit
def _kept(m: GeneralMixture, x: Array) -> Array:
    return m.gate.kept(x, m.active)


@jax.jit
def _log_gate(m: GeneralMixture, x: Array) -> Array:
    return m.gate.log_weights(x, m.active)


@jax.jit
def _mean(m: GeneralMixture, x: Array) -> Array:
    means = m.experts.mean(x)
    return jnp.sum(_spread_over(jnp.exp(m.gate.log_weights(x, m.active)), means) * means, axis=1)


@jax.jit
def _drawn(m: GeneralMixture, x: Array, expert_key: Key, noise_key: Key) -> Array:
    expert = jax.random.categorical(expert_key, m.gate.log_weights(x, m.active), axis=1)
    responses = m.experts.sample(x, key=noise_key)
    return jnp.take_along_axis(responses, _spread_over(expert[:, None], responses), axis=1)[:, 0]


def _spread_over(values: Array, responses: Array) -> Array:
    """`values` with axes of length 1 added for those of a response."""
    return values.reshape(values.shape + (1,) * (responses.ndim - 2))
