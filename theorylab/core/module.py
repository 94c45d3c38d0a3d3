"""Frozen pytree classes, and the four kinds of field that decide what is traced and what is static."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from theorylab.errors import ArgumentError, ShapeError

_MISSING = dataclasses.MISSING


class Module(eqx.Module):
    """A frozen dataclass that is a pytree. Fields are declared with `number`, `count`, `size`, `choice` or left plain (arrays, Modules)."""

    def __check_init__(self) -> None:
        for field in dataclasses.fields(self):
            rule = field.metadata.get("rule")
            if rule is not None:
                rule(type(self).__name__, field.name, getattr(self, field.name))

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; every check of the constructor runs again.

        Example:
            >>> from theorylab.core.schedule import Constant
            >>> float(Constant(0.5).replace(value=0.25).value)
            0.25
        """
        return dataclasses.replace(self, **changes)


def _field(convert: Callable[[Any], Any] | None, rule: Callable | None, default: Any, static: bool, doc: str | None) -> Any:
    options: dict[str, Any] = {"metadata": {"rule": rule, "doc": doc}, "static": static}
    if convert is not None:
        options["converter"] = convert
    if default is not _MISSING:
        options["default"] = default
    return eqx.field(**options)


def _interval(above: float | None, low: float | None, high: float | None, below: float | None) -> str:
    parts = [f"above {above:g}" if above is not None else "", f"at least {low:g}" if low is not None else "",
             f"at most {high:g}" if high is not None else "", f"below {below:g}" if below is not None else ""]
    return " and ".join(p for p in parts if p) or "finite"


def _range_rule(above: float | None = None, low: float | None = None, high: float | None = None, below: float | None = None,
                finite: bool = True, scalar: bool = True) -> Callable:
    """The check of a number: the message says the class, the field, the value and the interval."""

    def rule(owner: str, name: str, value: Any) -> None:
        if value is None or isinstance(value, (eqx.Module, Tracer)) or not isinstance(value, (jax.Array, np.ndarray, float, int)):
            return
        entries = np.asarray(value)
        if entries.dtype.kind not in "fiub":
            return
        seen = entries.ravel().tolist()
        bad = [v for v in seen if (finite and not math.isfinite(v)) or math.isnan(v) or (above is not None and not v > above)
               or (low is not None and not v >= low) or (high is not None and not v <= high) or (below is not None and not v < below)]
        if bad:
            raise ArgumentError(f"{owner}: {name} must be {_interval(above, low, high, below)}, got {bad[0]:g}")

    return rule


def _as_number(value: Any) -> Any:
    if value is None or isinstance(value, (jax.Array, eqx.Module)) or type(value) is object:
        return value
    if not isinstance(value, str) and np.ndim(value) > 0:
        return jnp.asarray(value)
    try:
        return jnp.asarray(float(value))
    except (TypeError, ValueError):
        raise ArgumentError(f"expected a number or a schedule, got {value!r}") from None


def number(default: Any = _MISSING, *, above: float | None = None, low: float | None = None, high: float | None = None,
           below: float | None = None, finite: bool = True, doc: str | None = None) -> Any:
    """Field for a real hyper-parameter: traced, so a new value never recompiles; weakly typed, so it adopts the precision of the data.

    A schedule (a Module) may stand in its place. `above`, `low`, `high`, `below` bound the value; a violation raises
    `ArgumentError` naming the class and the field when the object is made.
    """
    return _field(_as_number, _range_rule(above, low, high, below, finite), default, False, doc)


def _whole(value: Any) -> int:
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.number, np.ndarray)) or int(value) != value:
        raise ArgumentError(f"expected a whole number, got {value!r}")
    return int(value)


def _as_count(value: Any) -> Any:
    if value is None or isinstance(value, jax.Array):
        return value
    return jnp.asarray(_whole(value))


def count(default: Any = _MISSING, *, low: int | None = 0, high: int | None = None, doc: str | None = None) -> Any:
    """Field for a traced whole number (patience, inner steps, stages): a new value never recompiles."""
    return _field(_as_count, _range_rule(low=low, high=high), default, False, doc)


def _as_size(value: Any) -> Any:
    if value is None:
        return value
    return _whole(value)


def size(default: Any = _MISSING, *, low: int | None = 1, high: int | None = None, doc: str | None = None) -> Any:
    """Field for a whole number that shapes arrays (rows of a batch, rank, memory of L-BFGS): static, a new value recompiles."""
    return _field(_as_size, _range_rule(low=low, high=high), default, True, doc)


def choice(default: Any = _MISSING, *, among: Sequence[Any] | None = None, doc: str | None = None) -> Any:
    """Field for a string, flag or callable: static, compared by value (callables by identity). `among` lists what is allowed."""

    def rule(owner: str, name: str, value: Any) -> None:
        if among is not None and value not in among:
            raise ArgumentError(f"{owner}: {name} must be one of {', '.join(map(repr, among))}, got {value!r}")

    return _field(None, rule, default, True, doc)


def square(name: str, matrix: Any, dim: int | None = None) -> Any:
    """Check that `matrix` is square (and `dim` by `dim`); return it."""
    shape = np.shape(matrix)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ShapeError(f"{name} must be a square matrix, got shape {shape}")
    if dim is not None and shape[0] != dim:
        raise ShapeError(f"{name} must be {dim} x {dim} to match the other arguments, got {shape[0]} x {shape[1]}")
    return matrix
