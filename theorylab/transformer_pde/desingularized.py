"""The covariance flow in a time that never ends: blow-up, growth, decay and freezing all become convergence of a bounded direction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from theorylab.core.module import Module, number
from theorylab.core.problem import Event, Flow
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, NoClosedFormError, ShapeError
from theorylab.transformer_pde.attention import Attention, is_concrete
from theorylab.transformer_pde.contract import check_attention, check_single
from theorylab.transformer_pde.flow import _ratio
from theorylab.transformer_pde.gaussian import Gaussian, _symmetric

Array = jax.Array

STEADY = 0.005
"""A trace grows at a constant rate if the rate changes by less than this fraction over an e-fold of the trace."""
UNIT = 1e6
"""Of `Direction.trend`."""
LASTING = 1.05
"""A rate that falls like a power of the time up to this adds up to infinity: the exponent is measured to about 0.01."""
CALM = 0.01
"""A direction counts as nearly settled if it moves by less than this while the trace changes by a factor e."""
BLURRED = 1e-3
"""Rounding may move the direction by this much in a unit of the clock; beyond that a run has lost its state."""


class Direction(Module):
    r"""A covariance $\Sigma = e^{\rho} R R^\top$ with $\|R\|_F = 1$, and the time at which it is reached.

    Attributes:
        matrix: $R$, shape `(..., dim, columns)`.
        log_trace: $\rho = \log \operatorname{tr} \Sigma$.
        time: $t$.
        trend: the logarithm of $\|\Sigma'\| / \operatorname{tr}\Sigma$ averaged over the last unit of the clock (with weights $e^{-s}$), and that
            averaged again; in units of 1e6, so small that the error control of an integration does not look at them. Shape `(..., 2)`.
    """

    matrix: Array
    log_trace: Array
    time: Array
    trend: Array

    @property
    def cov(self) -> Array:
        r"""The normalized covariance $R R^\top$, of trace one up to the tolerance of the integration."""
        return _symmetric(self.matrix @ jnp.swapaxes(self.matrix, -1, -2))

    def square(self) -> Array:
        r"""$\|R\|_F^2$."""
        return (self.matrix * self.matrix).sum((-1, -2))


class Signs(NamedTuple):
    r"""What a state of `Desingularized` points to.

    Attributes:
        blow_up_time: the extrapolated blow-up time, infinite where the trace does not point to one.
        certain: it is certain to round-off.
        at_rest: what moves in an e-fold of the time is below 1e-8 of the trace, or has shrunk like $t^{-p}$ for eight decades of time.
        order: the exponent $p$ with which $\Sigma$ approaches its limit in the time, from its motion against `trend`; kept between 1/4 and 2.
        falls: the exponents $q$ with which $\|\Sigma'\| / \operatorname{tr}\Sigma$ falls like $t^{-q}$, over the last unit of the clock and over
            the one before. Shape `(2,)`.
        settled: $\Sigma / \operatorname{tr}\Sigma$ has converged while the trace goes on shrinking.
        growing: the trace grows at a constant rate, or along a nearly settled direction at one that falls no faster than $1/t$, and has come far: to
            where rounding or stiffness hide what drives it.
        unsettled: how far $R R^\top$ moves while the trace changes by a factor $e$ or so.
        blurred: rounding of $R$ changes the velocity by so much that the motion over one e-fold of the time is not known.
    """

    blow_up_time: Array
    certain: Array
    at_rest: Array
    order: Array
    falls: Array
    settled: Array
    growing: Array
    unsettled: Array
    blurred: Array


class Desingularized(Flow):
    r"""The covariance flow in a clock that never ends: blow-up, growth, decay and freezing all become convergence of a bounded direction.

    With $\rho = \log\operatorname{tr}\Sigma$, $R = L e^{-\rho/2}$, $D = B(e^{\rho/2}R)\,R$ and $c = \langle R, D\rangle$,

    $$ \frac{dR}{dt} = D - cR, \qquad \frac{d\rho}{dt} = 2c, \qquad \frac{ds}{dt} = \sqrt{\|D\|^2 + (t + 1/\pi)^{-2}} $$

    where $\pi$ (`pace`) bounds $\|D\|$ through the size of the weights. Near a blow-up the clock $s$ is half the logarithm of the trace,
    elsewhere it is the logarithm of the time, so steps of order one suffice throughout. A blow-up is reached at $t^* = t - u / (du/dt)$ with
    $u = 1/\rho'$, whatever its exponent; softmax is homogeneous, which fixes the exponent, and $t^* = t + u$.

    A run ends with `BLOWUP` when $t^*$ is certain to round-off, with `CONVERGED` when the covariance is at rest, decays along a settled
    direction, or grows at a constant rate, and with `UNDECIDED` when rounding hides where it goes; a run that reaches the end of its clock has not
    been decided either. The times given to `integrate` are times of this clock. Near frozen states and in steady growth the equation is stiff:
    `limit` uses `rosenbrock`, which needs fewer steps there than an explicit solver.

    Args:
        attention: a variant that maps Gaussians to Gaussians and whose covariance does not feel the mean.
        settle: go on after $t^*$ is certain until the direction $R R^\top$ is within this of its limit, by the estimate `unsettled`; that takes
            longer where eigenvalues of $V$ are close.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> flow = tp.Desingularized(tp.Softmax(jnp.eye(2), jnp.eye(2), 1.0))
        >>> sol = tl.integrate(flow, tp.Gaussian.standard(2), jnp.array([0.0, 100.0]))
        >>> sol.status.name, round(float(sol.history["blow_up_time"][-1]), 9)
        ('BLOWUP', 0.5)
    """

    attention: Attention
    settle: Any = number(math.inf, above=0.0, finite=False)

    def __init__(self, attention: Attention, settle: Any = math.inf):
        check_attention(attention)
        if not attention.keeps_gaussians:
            raise ArgumentError(f"attention must map Gaussians to Gaussians, which {type(attention).__name__} does not: follow tokens with Particles")
        self.attention, self.settle = attention, settle

    def lift(self, y0: Any) -> Direction:
        """The direction, trace and time of a Gaussian; a state that is a `Direction` already is kept, so that a run can go on."""
        if isinstance(y0, Direction):
            return y0
        if not isinstance(y0, Gaussian):
            raise ArgumentError(f"the state of a Desingularized flow must be a Gaussian, got {type(y0).__name__}")
        if y0.dim != self.attention.dim:
            raise ShapeError(f"the state must have dimension {self.attention.dim} to match the attention, got {y0.dim}")
        if self.attention.feels_mean and is_concrete(y0.mean) and bool((y0.mean != 0).any()):
            raise NoClosedFormError("a Desingularized flow has no mean, which acts on the covariance under linear attention: use a state of zero "
                                    "mean, or a GaussianFlow")
        factor = y0.factor
        trace = (factor * factor).sum((-1, -2))
        safe = jnp.where(trace > 0, trace, 1.0).astype(factor.dtype)                    # the zero covariance stays at R = 0
        still = jnp.zeros_like(safe)
        matrix, log_trace = factor / jnp.sqrt(safe)[..., None, None], jnp.log(safe)

        def trend(matrix: Array, log_trace: Array, time: Array) -> Array:
            return _log_size(matrix, self.rates(Direction(matrix, log_trace, time, time))[0]) / UNIT

        now = jnp.vectorize(trend, signature="(d,r),(),()->()")(matrix, log_trace, still)
        return Direction(matrix, log_trace, still, jnp.stack([now, now], -1))

    def pace(self, y: Direction) -> Array:
        r"""A bound of $\|D\|$ from norms of the weights, 1 if they vanish."""
        bound = self.attention.rate_bound(jnp.exp(y.log_trace))
        return jnp.where(bound > 0, bound, 1.0).astype(y.log_trace.dtype)

    def rates(self, y: Direction) -> tuple[Array, Array, Array]:
        r"""$D$, $c$ and $ds/dt$."""
        factor = jnp.exp(y.log_trace / 2) * y.matrix
        drift = self.attention.factor_velocity(jnp.zeros(factor.shape[0], factor.dtype), factor)[1] * jnp.exp(-y.log_trace / 2)
        growth = _ratio((y.matrix * drift).sum(), y.square())
        return drift, growth, jnp.sqrt((drift * drift).sum() + (y.time + 1 / self.pace(y)) ** -2)

    def field(self, t: Array, y: Direction) -> Direction:
        check_single(y.log_trace.shape)
        return self._field(y, *self.rates(y))

    def _field(self, y: Direction, drift: Array, growth: Array, speed: Array) -> Direction:
        # the norm of R is neutral on exact solutions; the last term keeps rounding from carrying it away
        return Direction((drift - (growth + jnp.abs(growth) * (y.square() - 1)) * y.matrix) / speed, 2 * growth / speed, 1 / speed,
                         jnp.stack([_log_size(y.matrix, drift) / UNIT, y.trend[0]]) - y.trend)

    def signs(self, y: Direction) -> Signs:
        """All that decides what a state is on its way to, from one look at the velocity and at its derivative along the flow."""
        drift, growth, speed = self.rates(y)
        some, rising = jnp.abs(growth) > 0, growth > 0
        u = 1 / (2 * jnp.where(some, growth, 1.0))
        if self.attention.degree == 2:                                                # homogeneity fixes the slope of u at -1
            remaining, slope = jnp.where(rising, u, jnp.inf), None
        else:
            change = jax.jvp(lambda z: self.rates(z)[1], (y,), (self._field(y, drift, growth, speed),))[1] * speed
            slope = jnp.where(some, -2 * u * u * change, 0.0)
            falling = rising & (slope < 0)
            remaining = jnp.where(falling, -u / jnp.where(falling, slope, -1.0), jnp.inf)
        certain = remaining < 1000 * jnp.finfo(remaining.dtype).eps * (y.time + remaining)
        motion = 2 * _symmetric(drift @ y.matrix.T)
        unsettled = _ratio(jnp.linalg.norm(motion - 2 * growth * y.cov), jnp.abs(growth))

        # derivatives of the velocity are lost in stiff directions, which the lagged logarithm is not
        bend, bent = _log_size(y.matrix, drift) - UNIT * y.trend[0], UNIT * (y.trend[0] - y.trend[1])
        level, size, order = _level(y, 1e-8), jnp.linalg.norm(motion) / speed, jnp.clip(-1 - bend, 0.25, 2.0)
        long = (bend < -1.25) & (bent < -1.25) & (y.time * self.pace(y) > 1 / level) & (size < level ** jnp.minimum(order, 1.0))
        if slope is None:                                    # slow against what could drive it: only a constant rate says that growth lasts
            steady = jnp.maximum(jnp.abs(bend), jnp.abs(bent)) * speed < 2 * STEADY * growth
        else:                                                # far beyond the size at which the velocity saturates, no acceleration says so
            steady = (slope > -0.1) & (slope < 5)
        falls = -jnp.stack([bend, bent]) * speed * y.time
        least = 2 - LASTING if slope is not None else 1 - LASTING                 # exponential growth that is not stiff is followed for longer
        lasting = (falls < LASTING).all() & (falls > least).all() & (unsettled < CALM)
        growing = ((self._is_far(y, growth, 1e8) & steady) | (self._is_far(y, growth, 1e6) & lasting)) & (growth > 0.05 * speed) & ~certain
        spread = jnp.cos(jnp.arange(y.matrix.size, dtype=y.matrix.dtype)).reshape(y.matrix.shape)     # a direction that nothing singles out
        changed = jax.jvp(lambda r: self.rates(y.replace(matrix=r))[0], (y.matrix,), (spread / jnp.linalg.norm(spread),))[1]
        blurred = (jnp.finfo(drift.dtype).eps * jnp.linalg.norm(changed) > BLURRED * speed) & ~certain
        settled = (growth < 0) & (unsettled < _level(y, 1e-8))
        return Signs(y.time + remaining, certain, (size < level) | long, order, falls, settled, growing, unsettled, blurred)

    def _is_far(self, y: Direction, growth: Array, limit: float) -> Array:
        """Whether growth has come so far that rounding (keys above `limit`) or stiffness (a velocity far below its bound) hides what drives it."""
        size = self.attention.key_size(y.matrix)
        large = y.log_trace + jnp.log(jnp.where(size > 0, size, 1.0)) * (size > 0).astype(size.dtype) > math.log(limit)
        return (large & (size > 0)) | (y.log_trace > 100) | ((growth < 1e-4 * self.pace(y)) if self.attention.degree == 2 else False)

    def metrics(self, t: Array, y: Direction) -> dict[str, Array]:
        r"""`blow_up_time` (the running estimate, infinite where the trace does not point to one), `log_trace`, and `depth` (the time $t$)."""
        return {"blow_up_time": self.signs(y).blow_up_time, "log_trace": y.log_trace, "depth": y.time}

    def size(self, y: Direction) -> Array:
        """Constant: nothing grows in this clock."""
        return jnp.ones((), y.matrix.dtype)

    def events(self) -> tuple[Event, ...]:
        """Blow-up; rest, decay or growth; the end of what rounding lets one know."""
        seen: list[Any] = [None, None]

        def signs(y: Direction) -> Signs:                                              # the tests of one state share them: traced once
            if seen[0] is not y:
                seen[:] = y, self.signs(y)
            return seen[1]

        def blow_up(s: Array, y: Direction) -> Array:
            return signs(y).certain & (signs(y).unsettled < jnp.maximum(self.settle, _level(y, 0.0)).astype(y.matrix.dtype))

        def other(s: Array, y: Direction) -> Array:
            return signs(y).at_rest | signs(y).settled | signs(y).growing

        return (Event("blow-up", blow_up, Status.BLOWUP), Event("rest, decay or growth", other, Status.CONVERGED),
                Event("rounding", lambda s, y: signs(y).blurred, Status.UNDECIDED))


def last(states: Any) -> Any:
    """The last entry along the leading axis of times of an integrated state.

    Example:
        >>> last(Direction(jnp.ones((3, 2, 2)), jnp.zeros(3), jnp.arange(3.0), jnp.zeros((3, 2)))).time.item()
        2.0
    """
    return jax.tree.map(lambda a: a[-1], states)


def _log_size(matrix: Array, drift: Array) -> Array:
    r"""The logarithm of $\|\Sigma'\| / \operatorname{tr}\Sigma$; that of the smallest normal number squared where nothing moves."""
    motion = drift @ matrix.T
    moved = motion + motion.T
    return jnp.log(jnp.linalg.norm(moved) + jnp.finfo(moved.dtype).tiny)


def _level(y: Direction, level: float) -> float:
    """A decision level that a float32 run can reach."""
    return max(level, float(jnp.finfo(y.matrix.dtype).eps) ** 0.5 / 2)
