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
    r"""The covariance flow in a clock that never ends: both blow-up and decay become convergence of a bounded direction.

    With $\rho = \log\operatorname{tr}\Sigma$, $R = L e^{-\rho/2}$, $D = B(e^{\rho/2}R)\,R$ and $c = \langle R, D\rangle$,

    $$ \frac{dR}{dt} = D - cR, \qquad \frac{d\rho}{dt} = 2c. $$

    Softmax is homogeneous, so the clock $d\tau = \kappa\operatorname{tr}\Sigma\,dt$ makes $R$ autonomous, and a blow-up is reached at
    $t^* = t + e^{-\rho}/(2c)$ with $c$ taken at $R$. Other variants use $ds = (\kappa^2 + \rho'^2)^{1/2}\,dt$ and
    $t^* = t - u/(du/dt)$ with $u = 1/\rho'$, which needs no exponent of the blow-up.
    The constant $\kappa$ is the size of the weights, so that the clock has no unit. The times given to `integrate` are times of this clock.

    A run ends with `BLOWUP` when $t^*$ is certain to round-off and with `CONVERGED` when the covariance is at rest, decays along a settled
    direction, or grows without blow-up; a run that reaches the end of its clock has not been decided.

    Args:
        attention: a variant that maps Gaussians to Gaussians and whose covariance does not feel the mean.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> flow = tp.Desingularized(tp.Softmax(jnp.eye(2), jnp.eye(2), 1.0))
        >>> sol = tl.integrate(flow, tp.Gaussian.standard(2), jnp.array([0.0, 100.0]))
        >>> sol.status.name, round(float(flow.blow_up_time(tp.last(sol.value))), 9)
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

    def weight_size(self) -> Array:
        r"""The constant $\kappa$: $\|V\|\,\|A\|$ for softmax, $\|V\|\,\|A\| / \|P\|$ otherwise (Frobenius norms, 1 if zero)."""
        size = jnp.linalg.norm(self.attention.value_matrix) * jnp.linalg.norm(self.attention.A)
        if self.attention.degree is None:
            size = _ratio(size, jnp.linalg.norm(self.attention.P))
        return jnp.where(size > 0, size, 1.0).astype(size.dtype)

    def rates(self, y: Direction) -> tuple[Array, Array, Array]:
        r"""$D / s$, $c / s$ and $dt/d\text{clock}$, where $s$ is the speed of the clock."""
        factor = y.matrix if self.attention.degree == 2 else jnp.exp(y.log_trace / 2) * y.matrix
        drift = self.attention.factor_velocity(jnp.zeros(factor.shape[0], factor.dtype), factor)[1]
        kappa = self.weight_size()
        if self.attention.degree == 2:
            drift = drift / kappa
            return drift, _ratio((y.matrix * drift).sum(), y.square()), jnp.exp(jnp.minimum(-y.log_trace, _exponent(factor))) / kappa
        drift = drift * jnp.exp(-y.log_trace / 2)
        growth = _ratio((y.matrix * drift).sum(), y.square())
        speed = jnp.sqrt(kappa**2 + 4 * growth**2)
        return drift / speed, growth / speed, 1 / speed

    def field(self, t: Array, y: Direction) -> Direction:
        drift, growth, slowness = self.rates(y)
        # the last term holds the norm at one, which rounding would leave while the trace decays; it is zero on exact solutions
        return Direction(drift - (growth + jnp.abs(growth) * (y.square() - 1)) * y.matrix, 2 * growth, slowness)

    def remaining(self, y: Direction) -> Array:
        """Time from now to the blow-up by extrapolation, infinite where the trace does not point to one."""
        _, growth, slowness = self.rates(y)
        if self.attention.degree == 2:
            return jnp.where(growth > 0, slowness / (2 * jnp.where(growth > 0, growth, 1.0)), jnp.inf)

        def inverse_rate(z: Direction) -> Array:
            _, c, slow = self.rates(z)
            return slow / (2 * jnp.where(jnp.abs(c) > 0, c, 1.0))

        u, du = jax.jvp(inverse_rate, (y,), (self.field(y.time, y),))
        falling = (growth > 0) & (du < 0)
        return jnp.where(falling, -u * slowness / jnp.where(falling, du, -1.0), jnp.inf)

    def blow_up_time(self, y: Direction) -> Array:
        """The estimate of the blow-up time at a state; it converges along a run."""
        return y.time + self.remaining(y)

    def is_blow_up(self, y: Direction) -> Array:
        """Whether the blow-up time is certain to round-off."""
        rest = self.remaining(y)
        return rest < 1000 * jnp.finfo(rest.dtype).eps * (y.time + rest)

    def is_at_rest(self, t: Array, y: Direction) -> Array:
        r"""Whether the covariance has stopped moving: also an approach like $1/t$ would change it by less than 1e-8 of its trace."""
        return (1 + t) * jnp.linalg.norm(self.motion(y)) < _level(y, 1e-8)

    def is_settled(self, y: Direction) -> Array:
        r"""Whether $R R^\top$ has converged while the trace goes on shrinking; $R$ itself may go on turning."""
        growth = self.rates(y)[1]
        return (growth < 0) & (jnp.linalg.norm(self.motion(y) - 2 * growth * y.cov) < _level(y, 1e-8) * jnp.abs(growth))

    def is_growing(self, y: Direction) -> Array:
        """Whether the keys have grown to 1e12 and the trace does not accelerate; never for softmax, where that is a blow-up.

        Beyond that size the digits of the other directions are lost in the kernel of the keys.
        """
        if self.attention.degree == 2:
            return jnp.asarray(False)
        _, growth, slowness = self.rates(y)
        keys = self.attention.K @ y.matrix
        large = y.log_trace + jnp.log(self.attention.scale * (keys * keys).sum() + jnp.finfo(keys.dtype).tiny) > math.log(1e12)
        # near a blow-up like (t* - t)^-p the time that is left is p / 2c: 50 of them mean that there is none
        return large & (growth > 0) & (2 * growth * self.remaining(y) > 50 * slowness)

    def motion(self, y: Direction) -> Float[Array, "d d"]:
        """The derivative of the covariance in the clock, in units of the trace."""
        drift, _, _ = self.rates(y)
        return 2 * _symmetric(drift @ y.matrix.T)

    def metrics(self, t: Array, y: Direction) -> dict[str, Array]:
        r"""`blow_up_time` (the running estimate), `log_trace`, `depth` (the time $t$) and `growth`, the rate $c$ in the clock."""
        return {"blow_up_time": self.blow_up_time(y), "log_trace": y.log_trace, "depth": y.time, "growth": self.rates(y)[1]}

    def size(self, y: Direction) -> Array:
        """Constant: nothing grows in this clock."""
        return jnp.ones((), y.matrix.dtype)

    def events(self) -> tuple[Event, ...]:
        """Blow-up, rest, decay and growth."""
        return (Event("blow-up", lambda t, y: self.is_blow_up(y), Status.BLOWUP),
                Event("rest, decay or growth", lambda t, y: self.is_at_rest(t, y) | self.is_settled(y) | self.is_growing(y), Status.CONVERGED))


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


def _exponent(like: Array) -> float:
    """The largest exponent kept in exp, below overflow."""
    return 80.0 if like.dtype == jnp.float32 else 650.0


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
