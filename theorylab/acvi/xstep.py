"""The contract of an x-step: one way to evaluate the resolvent of F on the plane of the equalities."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from theorylab.core.module import Module

Array = jax.Array


class Solved(NamedTuple):
    """An x-step: the root, evaluations of F (or products that cost the same) and matrix factorizations spent."""

    x: Array
    evaluations: Array
    factorizations: Array


def solved(x: Array, evaluations: Any, factorizations: Any = 0) -> Solved:
    """`Solved` with counters as arrays."""
    return Solved(x, jnp.asarray(evaluations, jnp.int32), jnp.asarray(factorizations, jnp.int32))


class XStep(Module):
    """One way to evaluate the resolvent. `make` does once what does not depend on the point."""

    free: ClassVar[bool] = True
    """Whether another penalty costs nothing; else `make` must run again for it."""
    factorizations: ClassVar[int] = 0
    """Factorizations that `make` computes."""

    @classmethod
    def make(cls, problem: Any, penalty: Array) -> Self:
        """The step for this problem and penalty."""
        return cls()

    def __call__(self, problem: Any, u: Array, x: Array, penalty: Array, tolerance: Any = 0.0) -> Solved:
        """The root for `u`; `x` is a guess. What iterates may stop where $|G|$ is below `tolerance`, which is at least the error of x."""
        raise NotImplementedError
