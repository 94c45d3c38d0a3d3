"""The moment equations of a Gaussian under attention, in depth and in a desingularized time that never ends."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from theorylab.core.module import Module, choice, square
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


class Desingularized(Flow):
    r"""The covariance flow in a clock that never ends: blow-up, growth, decay and freezing all become convergence of a bounded direction.

    With $\rho = \log\operatorname{tr}\Sigma$, $R = L e^{-\rho/2}$, $D = B(e^{\rho/2}R)\,R$ and $c = \langle R, D\rangle$,

    $$ \frac{dR}{dt} = D - cR, \qquad \frac{d\rho}{dt} = 2c, \qquad \frac{ds}{dt} = \sqrt{\|D\|^2 + (t + 1/\pi)^{-2}} $$

    where $\pi$ (`pace`) bounds $\|D\|$ through the size of the weights. Near a blow-up the clock $s$ is half the logarithm of the trace,
    elsewhere it is the logarithm of the time, so steps of order one suffice throughout. A blow-up is reached at $t^* = t - u / (du/dt)$ with
    $u = 1/\rho'$, whatever its exponent; softmax is homogeneous, which fixes the exponent, and $t^* = t + u$.

    A run ends with `BLOWUP` when $t^*$ is certain to round-off and with `CONVERGED` when the covariance is at rest, decays along a settled
    direction, or grows without acceleration; a run that reaches the end of its clock has not been decided. The times given to `integrate`
    are times of this clock.

    Args:
        attention: a variant that maps Gaussians to Gaussians and whose covariance does not feel the mean.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> flow = tp.Desingularized(tp.Softmax(jnp.eye(2), jnp.eye(2), 1.0))
        >>> sol = tl.integrate(flow, tp.Gaussian.standard(2), jnp.array([0.0, 100.0]))
        >>> sol.status.name, round(float(sol.history["blow_up_time"][-1]), 9)
        ('BLOWUP', 0.5)
    """

    attention: Attention

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
        r"""A bound of $\|D\|$ from norms of the weights, 1 if they vanish: $\|V\|\|A\|\operatorname{tr}\Sigma$, saturating for L2."""
        head = self.attention
        size = jnp.linalg.norm(head.value_matrix) * jnp.linalg.norm(head.A)
        trace = jnp.exp(y.log_trace)
        bound = size * trace if head.degree == 2 else 2 * size * trace / (1 + 2 * jnp.linalg.norm(head.P) * trace)
        return jnp.where(bound > 0, bound, 1.0).astype(trace.dtype)

    def rates(self, y: Direction) -> tuple[Array, Array, Array]:
        r"""$D$, $c$ and $ds/dt$."""
        factor = jnp.exp(y.log_trace / 2) * y.matrix
        drift = self.attention.factor_velocity(jnp.zeros(factor.shape[0], factor.dtype), factor)[1] * jnp.exp(-y.log_trace / 2)
        growth = _ratio((y.matrix * drift).sum(), y.square())
        return drift, growth, jnp.sqrt((drift * drift).sum() + (y.time + 1 / self.pace(y)) ** -2)

    def field(self, t: Array, y: Direction) -> Direction:
        drift, growth, speed = self.rates(y)
        # the norm of R is neutral on exact solutions; the last term keeps rounding from carrying it away
        return Direction((drift - (growth + jnp.abs(growth) * (y.square() - 1)) * y.matrix) / speed, 2 * growth / speed, 1 / speed)

    def remaining(self, y: Direction) -> Array:
        """Time from now to the blow-up by extrapolation, infinite where the trace does not point to one."""
        rising = self.rates(y)[1] > 0
        if self.attention.degree == 2:
            return jnp.where(rising, self._inverse_rate(y), jnp.inf)
        u, slope = self._inverse_rate(y), self._slope(y)
        falling = rising & (slope < 0)
        return jnp.where(falling, -u / jnp.where(falling, slope, -1.0), jnp.inf)

    def _inverse_rate(self, y: Direction) -> Array:
        c = self.rates(y)[1]
        return 1 / (2 * jnp.where(jnp.abs(c) > 0, c, 1.0))

    def _slope(self, y: Direction) -> Array:
        r"""$du/dt$ of $u = 1/\rho'$: $-1/p$ before a blow-up like $(t^* - t)^{-p}$, 0 in exponential growth, large on the way to rest."""
        return jax.jvp(self._inverse_rate, (y,), (self.field(y.time, y),))[1] * self.rates(y)[2]

    def blow_up_time(self, y: Direction) -> Array:
        """The estimate of the blow-up time at a state; it converges along a run."""
        return y.time + self.remaining(y)

    def is_blow_up(self, y: Direction) -> Array:
        """Whether the blow-up time is certain to round-off."""
        rest = self.remaining(y)
        return rest < 1000 * jnp.finfo(rest.dtype).eps * (y.time + rest)

    def is_at_rest(self, y: Direction) -> Array:
        r"""Whether $t\,\|\Sigma'\|$ is below 1e-8 of the trace: an approach like $1/t$ would change no more than that."""
        return jnp.linalg.norm(self.motion(y)) < _level(y, 1e-8) * self.rates(y)[2]

    def is_settled(self, y: Direction) -> Array:
        r"""Whether $R R^\top$ has converged while the trace goes on shrinking; $R$ itself may go on turning."""
        growth = self.rates(y)[1]
        return (growth < 0) & (jnp.linalg.norm(self.motion(y) - 2 * growth * y.cov) < _level(y, 1e-8) * jnp.abs(growth))

    def is_growing(self, y: Direction) -> Array:
        """Whether the trace grows steadily and has come so far that rounding will soon hide what drives it.

        That is a growth below 1e-4 of its bound for softmax, keys of size 1e10 for L2, or a trace beyond e^80 in units of the keys.
        """
        _, growth, speed = self.rates(y)
        if self.attention.degree == 2:
            far = growth < 1e-4 * self.pace(y)
        else:
            keys = self.attention.K @ y.matrix
            tiny = jnp.finfo(keys.dtype).tiny
            far = y.log_trace + jnp.log(self.attention.scale * (keys * keys).sum() + tiny) > math.log(1e10)
            far = far | (y.log_trace + jnp.log(jnp.linalg.norm(self.attention.P) + tiny) > 80)
        slope = self._slope(y)
        return far & (growth > 0.05 * speed) & (slope > -0.02) & (slope < 5)

    def motion(self, y: Direction) -> Float[Array, "d d"]:
        r"""$\Sigma' / \operatorname{tr}\Sigma$."""
        return 2 * _symmetric(self.rates(y)[0] @ y.matrix.T)

    def metrics(self, t: Array, y: Direction) -> dict[str, Array]:
        r"""`blow_up_time` (the running estimate), `log_trace`, `depth` (the time $t$) and `growth`, the rate $2c$ of the trace."""
        return {"blow_up_time": self.blow_up_time(y), "log_trace": y.log_trace, "depth": y.time, "growth": 2 * self.rates(y)[1]}

    def size(self, y: Direction) -> Array:
        """Constant: nothing grows in this clock."""
        return jnp.ones((), y.matrix.dtype)

    def events(self) -> tuple[Event, ...]:
        """Blow-up, rest, decay and growth."""
        return (Event("blow-up", lambda s, y: self.is_blow_up(y), Status.BLOWUP),
                Event("rest, decay or growth", lambda s, y: self.is_at_rest(y) | self.is_settled(y) | self.is_growing(y), Status.CONVERGED))


def last(states: Any) -> Any:
    """The last entry along the leading axis of times of an integrated state.

    Example:
        >>> last(Direction(jnp.ones((3, 2, 2)), jnp.zeros(3), jnp.arange(3.0))).time.item()
        2.0
    """
    return jax.tree.map(lambda a: a[-1], states)


def _ratio(top: Array, bottom: Array) -> Array:
    """top / bottom, and zero where the denominator is zero."""
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
