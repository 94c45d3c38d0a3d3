"""Schedules: a number as a function of the step count, traced, so that new values never recompile.

A schedule may stand in every field made by `number()`; the method that owns the field calls `at(field, step)`. A value given
as a Python number stays weakly typed through all formulas, so a schedule takes the precision of the data it multiplies.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from theorylab.core.module import Module, count, number
from theorylab.errors import ArgumentError, ShapeError

Array = jax.Array


def _step(step: Any) -> Array:
    step = jnp.asarray(step)
    if not jnp.issubdtype(step.dtype, jnp.integer):
        raise ArgumentError(f"step must be a whole number, got dtype {step.dtype}")
    return step


def _weak(whole: Array) -> Array:
    """A whole number as a weakly typed real one; strict promotion has no such conversion, the standard lattice does."""
    with jax.numpy_dtype_promotion("standard"):
        return whole * jnp.asarray(1.0)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_text, value)) + ")"
    if isinstance(value, Tracer):
        return "traced"
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"{value:g}" if value.ndim == 0 else str(np.asarray(value).tolist())
    return repr(value)


class Schedule(Module):
    """A number as a function of the step count. Subclasses define `__call__`."""

    def __call__(self, step: Any) -> Array:
        """The value at step number `step` (0 is the first), a whole number or an integer array, possibly traced."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(step)")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{f.name}={_text(getattr(self, f.name))}' for f in dataclasses.fields(self))})"


class Constant(Schedule):
    """The same number at every step.

    Example:
        >>> Constant(0.5)
        Constant(value=0.5)
        >>> float(Constant(0.5)(7))
        0.5
    """

    value: Any = number()

    def __call__(self, step: Any) -> Array:
        return jnp.broadcast_to(self.value, _step(step).shape)


class InverseSqrt(Schedule):
    r"""$\eta_k = \eta_0 / \sqrt{k + 1}$, the decay of stochastic methods.

    Example:
        >>> float(InverseSqrt(0.1)(3))
        0.05
    """

    start: Any = number()

    def __call__(self, step: Any) -> Array:
        return self.start / jnp.sqrt(_weak(_step(step)) + 1.0)


class Inverse(Schedule):
    r"""$\eta_k = \eta_0\, c / (c + k)$ with the offset $c$: the first value is $\eta_0$, and it is halved after $c$ steps.

    Example:
        >>> float(Inverse(1.0, offset=10.0)(10))
        0.5
    """

    start: Any = number()
    offset: Any = number(1.0, above=0.0)

    def __call__(self, step: Any) -> Array:
        return self.start * (self.offset / (self.offset + _weak(_step(step))))


class Geometric(Schedule):
    r"""$\eta_k = \max(\text{floor}, \eta_0\, q^{\lfloor k / \text{every} \rfloor})$ with the factor $q > 0$.

    Example:
        >>> float(Geometric(1.0, 0.5, every=10)(25))
        0.25
    """

    start: Any = number()
    factor: Any = number(above=0.0)
    every: Any = count(1, low=1)
    floor: Any = number(0.0)

    def __call__(self, step: Any) -> Array:
        step = _step(step)
        return jnp.maximum(self.floor, self.start * self.factor ** _weak(step // self.every.astype(step.dtype)))


class Cosine(Schedule):
    r"""$\eta_k = \tfrac12 \eta_0 (1 + \cos(\pi k / K))$: from $\eta_0$ down to 0 at step $K$ = `steps`, and 0 from there on.

    Example:
        >>> [round(float(Cosine(1.0, 100)(k)), 3) for k in (0, 50, 100, 150)]
        [1.0, 0.5, 0.0, 0.0]
    """

    start: Any = number()
    steps: Any = count(low=1)

    def __call__(self, step: Any) -> Array:
        done = jnp.minimum(_weak(_step(step)) / _weak(self.steps), 1.0)
        return self.start * (0.5 * (1.0 + jnp.cos(jnp.pi * done)))


def _numbers(values: Any) -> tuple[Array, ...]:
    # One weakly typed scalar per value: an array of them would be strongly typed and refuse float32 data.
    return tuple(v if isinstance(v, jax.Array) else jnp.asarray(float(v)) for v in values)


def _whole_numbers(values: Any) -> tuple[Array, ...]:
    for v in values:
        if not isinstance(v, jax.Array) and int(v) != v:
            raise ArgumentError(f"Staircase: boundaries must be whole numbers, got {v!r}")
    return tuple(v if isinstance(v, jax.Array) else jnp.asarray(int(v)) for v in values)


class Staircase(Schedule):
    """`values[0]` before step `boundaries[0]`, then `values[1]` until `boundaries[1]`, and so on: piecewise constant.

    Example:
        >>> [float(Staircase([1.0, 0.1], [100])(k)) for k in (99, 100)]
        [1.0, 0.1]
    """

    values: Any = eqx.field(converter=_numbers)
    boundaries: Any = eqx.field(converter=_whole_numbers)

    def __check_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1:
            raise ShapeError(f"Staircase: values must be one more than boundaries, got {len(self.values)} and {len(self.boundaries)}")
        for v in self.values:
            if not isinstance(v, Tracer) and not np.isfinite(v):
                raise ArgumentError(f"Staircase: values must be finite, got {v:g}")
        known = [int(b) for b in self.boundaries if not isinstance(b, Tracer)]
        if any(late <= early for early, late in zip([0, *known], known)):
            raise ArgumentError(f"Staircase: boundaries must be positive and increasing, got {known}")

    def __call__(self, step: Any) -> Array:
        step = _step(step)
        result = jnp.broadcast_to(self.values[0], step.shape)
        for boundary, value in zip(self.boundaries, self.values[1:], strict=True):
            result = jnp.where(step >= boundary.astype(step.dtype), value, result)
        return result


def at(value: Any, step: Any) -> Any:
    """The number in a field that may hold a number or a schedule: `value(step)` for a schedule, else `value`.

    Example:
        >>> at(0.5, 3), float(at(InverseSqrt(1.0), 3))
        (0.5, 0.5)
    """
    return value(step) if isinstance(value, Schedule) else value
