"""The barriers in the y-step of ACVI, and the schedule of their weight mu."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from theorylab.acvi import prox as scalar
from theorylab.acvi.constraints import ConstraintSet, Nonnegative
from theorylab.core.module import Module, count, number
from theorylab.core.schedule import Schedule
from theorylab.errors import ArgumentError

Array = jax.Array


class MuSchedule(Schedule):
    r"""The outer loop of ACVI as one flat schedule: $\mu_t = \mu_{-1}\delta^{t+1}$ in stage $t = 0, 1, \dots$; the last stage does not end.

    As in Algorithm 1 of both papers, mu is multiplied by the factor before its first use. Stage 0 lasts `first_steps` steps, each other one
    `inner_steps`; after `stages` stages mu stays at $\mu_{-1}\delta^{\text{stages}}$ for all further steps. With m barrier terms the gap of the
    central path is at most $m\mu$, so a final value of `tolerance / (2 m)` is small enough.

    Args:
        start: $\mu_{-1}$.
        factor: $\delta$ in (0, 1).
        stages: number of stages, T.
        inner_steps: steps of a stage, K (and $K_+$ of the inexact method).
        first_steps: steps of stage 0, $K_0$ of the inexact method; `inner_steps` unless given.

    Example:
        >>> from theorylab import acvi
        >>> schedule = acvi.MuSchedule(1.0, 0.5, stages=3, inner_steps=2, first_steps=3)
        >>> [float(schedule(k)) for k in range(9)]
        [0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125, 0.125]
    """

    start: Any = number(above=0.0)
    factor: Any = number(above=0.0, below=1.0)
    stages: Any = count(low=1)
    inner_steps: Any = count(low=1)
    first_steps: Any = count(None, low=1)

    def stage(self, step: Any) -> Array:
        """The stage that step number `step` belongs to."""
        step, first, inner, stages = self._whole(step)
        return jnp.minimum(jnp.where(step < first, jnp.zeros_like(step), 1 + (step - first) // inner), stages - 1)

    def end(self, step: Any) -> Array:
        """The first step after the stage of `step`; `step + 1` in the last stage."""
        step, first, inner, stages = self._whole(step)
        stage = self.stage(step)
        return jnp.where(stage == stages - 1, step + 1, first + stage * inner)

    def _whole(self, step: Any) -> tuple[Array, ...]:
        step = jnp.asarray(step)
        first = self.inner_steps if self.first_steps is None else self.first_steps
        return step, *(a.astype(step.dtype) for a in (first, self.inner_steps, self.stages))

    def __call__(self, step: Any) -> Array:
        stage = self.stage(step)
        with jax.numpy_dtype_promotion("standard"):  # a whole number becomes a weakly typed real one only here
            return self.start * self.factor ** ((stage + 1) * jnp.asarray(1.0))


class Barrier(Module):
    """What keeps y inside the inequalities, weighted by mu."""

    def prox(self, constraints: ConstraintSet, v: Array, mu: Array, penalty: Array) -> Array:
        r"""The exact y-step, $\arg\min_z B_\mu(z) + \frac\beta2|z - v|^2$."""
        raise NotImplementedError(f"{type(self).__name__} must define prox(constraints, v, mu, penalty)")

    def gradient(self, constraints: ConstraintSet, y: Array, mu: Array) -> Array:
        r"""$\nabla B_\mu(y)$, for the inexact y-step."""
        raise NotImplementedError(f"{type(self).__name__} must define gradient(constraints, y, mu)")

    def value(self, constraints: ConstraintSet, y: Array, mu: Array) -> Array:
        r"""$B_\mu(y)$, infinite outside its domain, which a gradient step must not leave."""
        raise NotImplementedError(f"{type(self).__name__} must define value(constraints, y, mu)")


def check_barrier(method: Any) -> None:
    """Raise unless the `barrier` of a method is one."""
    if not isinstance(method.barrier, Barrier):
        raise ArgumentError(f"{type(method).__name__}: barrier must be a LogBarrier, ExtendedLogBarrier or EntropyBarrier, got "
                            f"{type(method.barrier).__name__}")


class LogBarrier(Barrier):
    r"""The logarithmic barrier $B_\mu(y) = -\mu\sum_i \log(-\varphi_i(y))$, for every set.

    Example:
        >>> from theorylab import acvi
        >>> float(acvi.LogBarrier().prox(acvi.Nonnegative(), jnp.array([0.0]), 0.5, 2.0)[0])
        0.5
    """

    def prox(self, constraints: ConstraintSet, v: Array, mu: Array, penalty: Array) -> Array:
        return constraints.prox(v, mu / penalty)

    def gradient(self, constraints: ConstraintSet, y: Array, mu: Array) -> Array:
        return mu * constraints.barrier_gradient(y)

    def value(self, constraints: ConstraintSet, y: Array, mu: Array) -> Array:
        return mu * constraints.barrier(y)


def _nonnegative(barrier: Barrier, constraints: Any) -> None:
    if not isinstance(constraints, Nonnegative):
        raise ArgumentError(f"{type(barrier).__name__} is defined for Nonnegative() constraints, got {type(constraints).__name__}; use LogBarrier, "
                            "or lift a polyhedron with problem.lifted()")


class ExtendedLogBarrier(Barrier):
    r"""The log barrier of $y \ge 0$ continued linearly below the distance $\varepsilon$ from the wall: finite everywhere, convex, $C^1$.

    $-\mu\log y$ for $y \ge \varepsilon$, else $-\mu\,(y/\varepsilon - 1 + \log\varepsilon)$. Gradient steps on it cannot leave its domain. The
    second paper gives the level $c = -\mu\log\varepsilon$ at which the continuation begins; pass `level` for a fixed c, and then
    $\varepsilon = e^{-c/\mu}$ shrinks with mu. Where that underflows to zero the plain log barrier remains.

    Args:
        switch: $\varepsilon$; or
        level: c.

    Raises:
        ArgumentError: not exactly one of the two is given, or (in use) other constraints than `Nonnegative`.

    Example:
        >>> from theorylab import acvi
        >>> barrier = acvi.ExtendedLogBarrier(switch=0.1)
        >>> barrier.prox(acvi.Nonnegative(), jnp.array([0.0, -10.0]), 0.5, 2.0).tolist()
        [0.5, -7.5]
    """

    switch: Any = number(None, above=0.0)
    level: Any = number(None, above=0.0)

    def __check_init__(self) -> None:
        if (self.switch is None) == (self.level is None):
            raise ArgumentError("ExtendedLogBarrier: give exactly one of switch (a distance) and level (a value of the barrier)")

    def distance(self, mu: Array) -> Array:
        r"""$\varepsilon$ at this mu."""
        return self.switch if self.level is None else jnp.exp(-self.level / mu)

    def prox(self, constraints: ConstraintSet, v: Array, mu: Array, penalty: Array) -> Array:
        _nonnegative(self, constraints)
        return scalar.extended(v, mu / penalty, self.distance(mu))

    def gradient(self, constraints: ConstraintSet, y: Array, mu: Array) -> Array:
        _nonnegative(self, constraints)
        return -mu / jnp.maximum(y, self._floor(y, mu))

    def value(self, constraints: ConstraintSet, y: Array, mu: Array) -> Array:
        _nonnegative(self, constraints)
        floor = self._floor(y, mu)
        held = jnp.maximum(y, floor)
        return -mu * jnp.sum(jnp.log(held) + jnp.minimum(y / floor - 1, 0))

    def _floor(self, y: Array, mu: Array) -> Array:
        """The distance, kept off 0, where the linear part has left the range of the precision."""
        return jnp.maximum(jnp.asarray(self.distance(mu), y.dtype), jnp.finfo(y.dtype).tiny)


class EntropyBarrier(Barrier):
    r"""The entropy $B_\mu(y) = \mu\sum_i y_i\log y_i$ of $y \ge 0$ in the place of the logarithm.

    On a matrix game its fixed points are the logit quantal responses $x_1 = \mathrm{softmax}(-A x_2/\mu)$, $x_2 = \mathrm{softmax}(A^\top x_1/\mu)$,
    and as mu falls they tend to the equilibrium of largest entropy (companion derivation).

    Example:
        >>> from theorylab import acvi
        >>> float(acvi.EntropyBarrier().prox(acvi.Nonnegative(), jnp.array([2.0]), 1.0, 1.0)[0])
        1.0
    """

    def prox(self, constraints: ConstraintSet, v: Array, mu: Array, penalty: Array) -> Array:
        _nonnegative(self, constraints)
        return scalar.entropy(v, mu / penalty)

    def gradient(self, constraints: ConstraintSet, y: Array, mu: Array) -> Array:
        _nonnegative(self, constraints)
        return mu * (1 + jnp.log(y))

    def value(self, constraints: ConstraintSet, y: Array, mu: Array) -> Array:
        _nonnegative(self, constraints)
        inside = jnp.all(y > 0)
        return jnp.where(inside, mu * jnp.sum(y * jnp.log(jnp.where(inside, y, 1))), jnp.inf)
