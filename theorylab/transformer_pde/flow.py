"""The moment equations of a Gaussian under attention, in depth and in a desingularized time that never ends."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from theorylab.core.module import Module, choice, number, square
from theorylab.core.problem import Event, Flow
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.attention import Attention, state_metrics
from theorylab.transformer_pde.gaussian import Gaussian, _floating, _symmetric

Array = jax.Array


class GaussianFlow(Flow):
    r"""The exact flow of a Gaussian under attention (paper, Gaussian invariance): with $\Gamma(x) = m + B(x - \alpha)$ the velocity of a token,

    $$ \alpha' = m, \qquad L' = B L, \qquad \Sigma = L L^\top, \quad\text{so that}\quad \Sigma' = B\Sigma + \Sigma B^\top. $$

    The factor form keeps the covariance positive semidefinite and its rank bounded under any integrator. Integrated, it gives a `Gaussian`
    with a leading axis of times.

    Args:
        attention: a variant that maps Gaussians to Gaussians.
        feed_forward: a pair `(W, b)` adding $W x + b$ to the velocity; `b` may be None.
        noise: the diffusion matrix $D$ (or a number times the identity) of independent noise $\sqrt{2D}\,dB$, which adds $2D$ to $\Sigma'$.
        normalize: subtract $c(t)\,x$ with the $c$ that keeps $E|x|^2$ constant (mean-field normalization).
        form: `"factor"`, or `"covariance"` to integrate $\Sigma$ itself. Noise raises the rank, so it needs `"covariance"`.

    Raises:
        ShapeError: `feed_forward` or `noise` does not match the dimension of the attention.
        ArgumentError: `noise` with `form="factor"`.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> flow = tp.GaussianFlow(tp.Softmax(jnp.eye(2), jnp.eye(2), -1.0))
        >>> sol = tl.integrate(flow, tp.Gaussian.standard(2), jnp.array([0.0, 1.0]))
        >>> round(float(sol.value.cov[-1, 0, 0]), 6)
        0.333333
    """

    attention: Attention
    feed_forward: Any = None
    noise: Any = None
    normalize: bool = choice(False, among=(True, False))
    form: str = choice("factor", among=("factor", "covariance"))

    def __init__(self, attention: Attention, feed_forward: Any = None, noise: Any = None, normalize: bool = False, form: str = "factor"):
        if not isinstance(attention, Attention):
            raise ArgumentError(f"attention must be a Softmax, an L2 or another Attention, got {type(attention).__name__}")
        self.attention, self.normalize, self.form = attention, normalize, form
        self.feed_forward = None if feed_forward is None else _affine(feed_forward, attention.dim)
        self.noise = None if noise is None else _diffusion(noise, attention.dim)
        if noise is not None and form == "factor":
            raise ArgumentError("noise raises the rank of the covariance, which a factor cannot follow: use form='covariance'")

    def lift(self, y0: Any) -> Gaussian:
        """The state in the form that is integrated."""
        if not isinstance(y0, Gaussian):
            raise ArgumentError(f"the state of a GaussianFlow must be a Gaussian, got {type(y0).__name__}")
        if y0.dim != self.attention.dim:
            raise ShapeError(f"the state must have dimension {self.attention.dim} to match the attention, got {y0.dim}")
        if self.form == "covariance":
            return Gaussian._raw(y0.mean, None, y0.cov)
        return Gaussian._raw(y0.mean, y0.factor, None)

    def field(self, t: Array, y: Gaussian) -> Gaussian:
        if y._factor is not None:
            mean, moved = self.attention.factor_velocity(y.mean, y._factor)
            if self.feed_forward is not None:
                W, b = self.feed_forward
                mean, moved = mean + W @ y.mean + b, moved + W @ y._factor
            if self.normalize:
                shrink = _ratio((mean @ y.mean) + (moved * y._factor).sum(), (y.mean @ y.mean) + (y._factor * y._factor).sum())
                mean, moved = mean - shrink * y.mean, moved - shrink * y._factor
            return Gaussian._raw(mean, moved, None)
        cov = y.cov
        mean, matrix = self.attention.velocity(y.mean, cov)
        if self.feed_forward is not None:
            W, b = self.feed_forward
            mean, matrix = mean + W @ y.mean + b, matrix + W
        moved = 2 * _symmetric(matrix @ cov)
        if self.noise is not None:
            moved = moved + 2 * self.noise
        if self.normalize:
            shrink = _ratio((mean @ y.mean) + jnp.trace(moved) / 2, (y.mean @ y.mean) + jnp.trace(cov))
            mean, moved = mean - shrink * y.mean, moved - 2 * shrink * cov
        return Gaussian._raw(mean, None, moved)

    def metrics(self, t: Array, y: Gaussian) -> dict[str, Array]:
        """`eigenvalues` (ascending), `rank`, `trace` and `mean`."""
        return state_metrics(y)


class Direction(Module):
    r"""A covariance $\Sigma = e^{\rho} R R^\top$ with $\|R\|_F = 1$, and the time at which it is reached.

    Attributes:
        matrix: $R$, shape `(..., dim, columns)`.
        log_trace: $\rho = \log \operatorname{tr} \Sigma$.
        time: $t$.
    """

    matrix: Array
    log_trace: Array
    time: Array

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
        at_rest: $t\,\|\Sigma'\|$ is below 1e-8 of the trace: an approach like $1/t$ would change no more than that.
        settled: $\Sigma / \operatorname{tr}\Sigma$ has converged while the trace goes on shrinking.
        growing: the trace grows without acceleration, and has come far: to where rounding or stiffness hide what drives it.
        unsettled: how far $R R^\top$ moves while the trace changes by a factor $e$ or so.
    """

    blow_up_time: Array
    certain: Array
    at_rest: Array
    settled: Array
    growing: Array
    unsettled: Array


class Desingularized(Flow):
    r"""The covariance flow in a clock that never ends: blow-up, growth, decay and freezing all become convergence of a bounded direction.

    With $\rho = \log\operatorname{tr}\Sigma$, $R = L e^{-\rho/2}$, $D = B(e^{\rho/2}R)\,R$ and $c = \langle R, D\rangle$,

    $$ \frac{dR}{dt} = D - cR, \qquad \frac{d\rho}{dt} = 2c, \qquad \frac{ds}{dt} = \sqrt{\|D\|^2 + (t + 1/\pi)^{-2}} $$

    where $\pi$ (`pace`) bounds $\|D\|$ through the size of the weights. Near a blow-up the clock $s$ is half the logarithm of the trace,
    elsewhere it is the logarithm of the time, so steps of order one suffice throughout. A blow-up is reached at $t^* = t - u / (du/dt)$ with
    $u = 1/\rho'$, whatever its exponent; softmax is homogeneous, which fixes the exponent, and $t^* = t + u$.

    A run ends with `BLOWUP` when $t^*$ is certain to round-off and with `CONVERGED` when the covariance is at rest, decays along a settled
    direction, or grows without acceleration; a run that reaches the end of its clock has not been decided. The times given to `integrate`
    are times of this clock. Rest is told at a level of 1e-8: integrate starts that may freeze with `rtol=1e-10`, since coarser steps jitter above it.

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

    def lift(self, y0: Any) -> Direction:
        """The direction, trace and time of a Gaussian; a state that is a `Direction` already is kept, so that a run can go on."""
        if isinstance(y0, Direction):
            return y0
        if not isinstance(y0, Gaussian):
            raise ArgumentError(f"the state of a Desingularized flow must be a Gaussian, got {type(y0).__name__}")
        if y0.dim != self.attention.dim:
            raise ShapeError(f"the state must have dimension {self.attention.dim} to match the attention, got {y0.dim}")
        factor = y0.factor
        trace = (factor * factor).sum((-1, -2))
        safe = jnp.where(trace > 0, trace, 1.0).astype(factor.dtype)                    # the zero covariance stays at R = 0
        return Direction(factor / jnp.sqrt(safe)[..., None, None], jnp.log(safe), jnp.zeros_like(safe))

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
        return self._field(y, *self.rates(y))

    def _field(self, y: Direction, drift: Array, growth: Array, speed: Array) -> Direction:
        # the norm of R is neutral on exact solutions; the last term keeps rounding from carrying it away
        return Direction((drift - (growth + jnp.abs(growth) * (y.square() - 1)) * y.matrix) / speed, 2 * growth / speed, 1 / speed)

    def signs(self, y: Direction) -> Signs:
        """All that decides what a state is on its way to, from one look at the velocity and at its derivative along the flow."""
        drift, growth, speed = self.rates(y)
        some = jnp.abs(growth) > 0
        u = 1 / (2 * jnp.where(some, growth, 1.0))
        change = jax.jvp(lambda z: self.rates(z)[1], (y,), (self._field(y, drift, growth, speed),))[1] * speed
        slope = jnp.where(some, -2 * u * u * change, 0.0)
        rising = growth > 0
        if self.attention.degree == 2:                                                # homogeneity fixes the slope at -1
            remaining = jnp.where(rising, u, jnp.inf)
        else:
            falling = rising & (slope < 0)
            remaining = jnp.where(falling, -u / jnp.where(falling, slope, -1.0), jnp.inf)
        motion = 2 * _symmetric(drift @ y.matrix.T)
        at_rest = jnp.linalg.norm(motion) < _level(y, 1e-8) * speed
        unsettled = _ratio(jnp.linalg.norm(motion - 2 * growth * y.cov), jnp.abs(growth))
        settled = (growth < 0) & (unsettled < _level(y, 1e-8))
        certain = remaining < 1000 * jnp.finfo(remaining.dtype).eps * (y.time + remaining)
        growing = self._is_far(y, growth) & (growth > 0.05 * speed) & (slope > -0.1) & (slope < 5) & ~certain
        return Signs(y.time + remaining, certain, at_rest, settled, growing, unsettled)

    def _is_far(self, y: Direction, growth: Array) -> Array:
        """Whether growth has come so far that rounding (large keys) or stiffness (a velocity far below its bound) will soon hide what drives it."""
        size = self.attention.key_size(y.matrix)
        large = y.log_trace + jnp.log(jnp.where(size > 0, size, 1.0)) * (size > 0).astype(size.dtype) > math.log(1e8)
        return (large & (size > 0)) | (y.log_trace > 100) | ((growth < 1e-4 * self.pace(y)) if self.attention.degree == 2 else False)

    def metrics(self, t: Array, y: Direction) -> dict[str, Array]:
        r"""`blow_up_time` (the running estimate, infinite where the trace does not point to one), `log_trace`, and `depth` (the time $t$)."""
        return {"blow_up_time": self.signs(y).blow_up_time, "log_trace": y.log_trace, "depth": y.time}

    def size(self, y: Direction) -> Array:
        """Constant: nothing grows in this clock."""
        return jnp.ones((), y.matrix.dtype)

    def events(self) -> tuple[Event, ...]:
        """Blow-up; rest, decay or growth."""

        def blow_up(s: Array, y: Direction) -> Array:
            signs = self.signs(y)
            return signs.certain & (signs.unsettled < jnp.maximum(self.settle, _level(y, 0.0)).astype(signs.unsettled.dtype))

        def other(s: Array, y: Direction) -> Array:
            signs = self.signs(y)
            return signs.at_rest | signs.settled | signs.growing

        return (Event("blow-up", blow_up, Status.BLOWUP), Event("rest, decay or growth", other, Status.CONVERGED))


def last(states: Any) -> Any:
    """The last entry along the leading axis of times of an integrated state.

    Example:
        >>> last(Direction(jnp.ones((3, 2, 2)), jnp.zeros(3), jnp.arange(3.0))).time.item()
        2.0
    """
    return jax.tree.map(lambda a: a[-1], states)


def _ratio(top: Array, bottom: Array) -> Array:
    """The quotient, and zero where the denominator is zero."""
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1.0), 0.0).astype(top.dtype)


def _level(y: Direction, level: float) -> float:
    """A decision level that a float32 run can reach."""
    return max(level, 100 * float(jnp.finfo(y.matrix.dtype).eps))


def _affine(feed_forward: Any, dim: int) -> tuple[Array, Array]:
    try:
        W, b = feed_forward
    except (TypeError, ValueError):
        raise ArgumentError(f"feed_forward must be a pair (W, b), got {type(feed_forward).__name__}") from None
    W = square("feed_forward W", _floating("feed_forward W", W), dim)
    b = jnp.zeros(dim, W.dtype) if b is None else _floating("feed_forward b", b)
    if b.shape != (dim,):
        raise ShapeError(f"feed_forward b must have shape ({dim},), got {b.shape}")
    return W, b


def _diffusion(noise: Any, dim: int) -> Array:
    D = _floating("noise", noise)
    return D * jnp.eye(dim, dtype=D.dtype) if D.ndim == 0 else square("noise", D, dim)
