"""Stop rules: tests on the recorded row, with a memory that travels in the carry of the loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from theorylab.core.module import Module, choice, count, number
from theorylab.errors import ToleranceError, UnknownNameError

Row = dict[str, Any]
ROUND_OFF_UNITS = 10


class Stop(Module):
    """A rule that looks at each recorded row. Combine rules with `&` and `|`."""

    def init(self, row: Row) -> Any:
        """The memory before the first row is seen; `row` gives shapes and dtypes."""
        return ()

    def __call__(self, memory: Any, row: Row) -> tuple[Any, jax.Array]:
        """The new memory, and whether the rule is met."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(memory, row)")

    def check(self, row: Row) -> None:
        """Refuse a rule that can never be met on rows of this kind. Runs on the host, before compilation."""

    def __and__(self, other: Stop) -> Stop:
        return And(self, other)

    def __or__(self, other: Stop) -> Stop:
        return Or(self, other)


def _named(rule: Stop, name: str, row: Row) -> Any:
    if name not in row:
        raise UnknownNameError.of(f"metric of {type(rule).__name__}", name, row)
    return row[name]


class Never(Stop):
    """No test: the run does all its steps."""

    def __call__(self, memory: Any, row: Row) -> tuple[Any, jax.Array]:
        return memory, jnp.asarray(False)


class Below(Stop):
    """Met when every entry of the metric `name` is below `level`.

    Example:
        >>> bool(Below("gap", 1e-3)((), {"gap": jnp.asarray(1e-4)})[1])
        True
    """

    name: str = choice()
    level: Any = number()

    def __call__(self, memory: Any, row: Row) -> tuple[Any, jax.Array]:
        return memory, jnp.all(_named(self, self.name, row) < self.level)

    def check(self, row: Row) -> None:
        dtype = jnp.result_type(_named(self, self.name, row))
        if isinstance(self.level, Tracer) or not jnp.issubdtype(dtype, jnp.inexact):
            return
        level, floor = float(np.max(np.asarray(self.level))), ROUND_OFF_UNITS * float(jnp.finfo(dtype).eps)
        if 0 < level < floor:
            raise ToleranceError(f"Below({self.name!r}, {level:g}): the metric is {jnp.dtype(dtype).name}, whose round-off lets no level "
                                 f"under {floor:.1e} be tested; raise the level or pass data of higher precision")


class Above(Stop):
    """Met when every entry of the metric `name` is above `level`: an explosion, a reward, a likelihood.

    Example:
        >>> bool(Above("trace", 1e3)((), {"trace": jnp.asarray(2e3)})[1])
        True
    """

    name: str = choice()
    level: Any = number()

    def __call__(self, memory: Any, row: Row) -> tuple[Any, jax.Array]:
        return memory, jnp.all(_named(self, self.name, row) > self.level)

    def check(self, row: Row) -> None:
        _named(self, self.name, row)


class Stalled(Stop):
    """Met when the metric `name` (its largest entry) has not improved by the fraction `relative` for `patience` rows in a row."""

    name: str = choice()
    patience: Any = count(10, low=1)
    relative: Any = number(1e-3, low=0.0, below=1.0)

    def init(self, row: Row) -> Any:
        worst = jnp.max(_named(self, self.name, row))
        return jnp.full_like(worst, jnp.inf), jnp.zeros((), jnp.int32)

    def __call__(self, memory: Any, row: Row) -> tuple[Any, jax.Array]:
        best, idle = memory
        worst = jnp.max(_named(self, self.name, row))
        better = (worst < best - self.relative * jnp.abs(best)) | (~jnp.isfinite(best) & jnp.isfinite(worst))
        idle = jnp.where(better, jnp.zeros_like(idle), idle + jnp.ones_like(idle))
        return (jnp.where(better, worst, best), idle), idle >= self.patience.astype(idle.dtype)

    def check(self, row: Row) -> None:
        _named(self, self.name, row)


class _Pair(Stop):
    first: Stop
    second: Stop

    def init(self, row: Row) -> Any:
        return self.first.init(row), self.second.init(row)

    def check(self, row: Row) -> None:
        self.first.check(row)
        self.second.check(row)

    def _both(self, memory: Any, row: Row) -> tuple[Any, jax.Array, jax.Array]:
        (one, hit_one), (two, hit_two) = self.first(memory[0], row), self.second(memory[1], row)
        return (one, two), hit_one, hit_two


class And(_Pair):
    """Met when both rules are met on the same row."""

    def __call__(self, memory: Any, row: Row) -> tuple[Any, jax.Array]:
        memory, one, two = self._both(memory, row)
        return memory, one & two


class Or(_Pair):
    """Met when one of the rules is met."""

    def __call__(self, memory: Any, row: Row) -> tuple[Any, jax.Array]:
        memory, one, two = self._both(memory, row)
        return memory, one | two
