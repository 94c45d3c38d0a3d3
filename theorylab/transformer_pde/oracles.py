"""What a Gaussian does in the long run: its regime, its limit, its blow-up time and its energy."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from theorylab.core.integrate import integrate
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, MatrixError, ShapeError
from theorylab.transformer_pde.attention import L2, Attention, Softmax, check_state, is_concrete
from theorylab.transformer_pde.closed_forms import HYPOTHESIS, _proportion, plain_attention, quadratic_form, scalar_blow_up_time
from theorylab.transformer_pde.desingularized import Desingularized, Direction, last
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Gaussian, _symmetric

Array = jax.Array

CLOCK_END = 1000.0
"""End of the desingularized clock; it counts e-folds of the time and of the trace, so what is not decided by then rotates."""
SETTLED = 1e-8
"""A limit direction at a blow-up is followed until it moves less than this; the blow-up time needs no such thing."""
STEPS = 2000
"""Steps after which a lane that still moves (a rotation, weights of very different sizes) is left undecided."""
PERSISTENT = 0.5
"""An eigenvalue belongs to the limit if extrapolation to infinite time keeps this fraction of it; one that decays like 1/t loses all."""
FAINT = 1e-10
"""Eigenvalues below this fraction of the largest are not told from round-off."""


class Regime(enum.IntEnum):
    """How the covariance behaves in the long run. Integers, so that a batch of regimes is an array."""

    FROZEN = 0
    ZERO = 1
    BLOWUP = 2
    GROWING = 3
    ROTATING = 4
    UNDECIDED = 5

    @property
    def sentence(self) -> str:
        """One line that a user reads."""
        return _SENTENCES[self]


_SENTENCES = {
    Regime.FROZEN: "the covariance converges to a matrix that is not zero, and every token comes to rest",
    Regime.ZERO: "the covariance converges to zero",
    Regime.BLOWUP: "the covariance grows without bound in finite time",
    Regime.GROWING: "the covariance grows without bound for all times",
    Regime.ROTATING: "the covariance converges while tokens go on turning",
    Regime.UNDECIDED: "the numbers do not decide",
}


class Limit(NamedTuple):
    r"""The long-run behavior of a covariance. With leading axes of states, each entry has them.

    Attributes:
        cov: $\lim \Sigma(t)$ for `FROZEN`, `ROTATING` and `ZERO`; $\lim \Sigma / \operatorname{tr}\Sigma$ for `BLOWUP` and `GROWING`;
            the last state for `UNDECIDED`.
        rank: rank of `cov`, by persistence: eigenvalues that decay to zero do not count however slowly they do.
        regime: a `Regime`; an integer array for a batch or inside compiled code.
        error: estimate of the Frobenius error of `cov`: round-off for closed forms, else the part that was extrapolated.
    """

    cov: Array
    rank: Array
    regime: Any
    error: Array


def blow_up_time(flow: GaussianFlow, state: Gaussian) -> Array:
    r"""The time at which the covariance blows up; infinite if it never does, NaN if the numbers do not decide.

    With a number as $V$, softmax has $t^* = 1 / \lambda_{\max}(v L_0^\top (A + A^\top) L_0)$ (paper, closed form for $V = vI$), differentiable in all
    arguments. Anything else runs through `Desingularized`. L2 attention with injective keys never blows up.

    Args:
        flow: a `GaussianFlow` of attention alone.
        state: Gaussians, with any leading axes.

    Raises:
        NoClosedFormError: the flow has feed-forward, noise or normalization.

    Example:
        >>> flow = GaussianFlow(Softmax(jnp.eye(2), jnp.eye(2), 1.0))
        >>> float(blow_up_time(flow, Gaussian.standard(2)))
        0.5
    """
    attention = _checked(flow, state, "blow_up_time")
    if isinstance(attention, Softmax) and attention.V.ndim == 0:
        return scalar_blow_up_time(attention, state.factor)
    return _over_states(lambda factor: _run(attention, factor, jnp.inf)[1], state)


def limit(flow: GaussianFlow, state: Gaussian) -> Limit:
    r"""What the covariance tends to, with its rank, its regime and an error estimate.

    Softmax with a number as $V$ has the closed form $L_0 \Pi L_0^\top$, with $\Pi$ the projection on the kernel of $v L_0^\top (A + A^\top) L_0$ if
    that is negative semidefinite. Anything else runs through `Desingularized` and removes the $1/t$ tail by extrapolation.

    Args:
        flow: a `GaussianFlow` of attention alone.
        state: Gaussians, with any leading axes.

    Raises:
        NoClosedFormError: the flow has feed-forward, noise or normalization.

    Example:
        >>> head = Softmax(jnp.array([[1.0, 0.0]]), jnp.array([[-1.0, 0.0]]), 1.0)
        >>> found = limit(GaussianFlow(head), Gaussian(jnp.zeros(2), jnp.array([[2.0, 1.0], [1.0, 2.0]])))
        >>> found.regime.name, int(found.rank), float(found.cov[1, 1].round(9))
        ('FROZEN', 1, 1.5)
    """
    attention = _checked(flow, state, "limit")
    if isinstance(attention, Softmax) and attention.V.ndim == 0:
        found = _over_states(lambda factor: _scalar_limit(attention, factor), state)
    else:
        found = _over_states(lambda factor: _run(attention, factor, SETTLED)[0], state)
    if is_concrete(found.regime) and found.regime.ndim == 0:
        return found._replace(regime=Regime(int(found.regime)))
    return found


def regime(flow: GaussianFlow, state: Gaussian) -> Any:
    """The `Regime` of a state; for a batch, or inside compiled code, an integer array.

    Example:
        >>> regime(GaussianFlow(Softmax(jnp.eye(2), jnp.eye(2), -1.0)), Gaussian.standard(2)).name
        'ZERO'
    """
    return limit(flow, state).regime


def energy(attention: Attention, state: Gaussian) -> Array:
    r"""The potential $F$ whose Bures gradient descent is the flow: $\Sigma' = -2(\nabla F\,\Sigma + \Sigma\,\nabla F)$ (paper, gradient flows).

    Softmax with $A$ symmetric and $V = sA$: $F = -\tfrac14 \operatorname{tr}(V\Sigma A\Sigma)$.
    L2 with $Q = rK$ and $V = sP$: $F = -rs\,[\tfrac12\operatorname{tr}(P\Sigma) - \tfrac14\log\det(I + 2P\Sigma)]$.

    Args:
        attention: softmax or L2; its hypotheses are checked on values, outside compiled code only.
        state: one Gaussian of zero mean.

    Raises:
        MatrixError: a hypothesis fails; the flow is then not a gradient flow of this kind.

    Example:
        >>> float(energy(Softmax(jnp.eye(2), jnp.eye(2), jnp.eye(2)), Gaussian.standard(2)))
        -0.5
    """
    check_state(attention, state, Gaussian)
    if not isinstance(attention, (Softmax, L2)):
        raise ArgumentError(f"energy is known for softmax and L2 attention, got {type(attention).__name__}")
    A, P, V, cov = attention.A, attention.P, attention.value_matrix, state.cov
    ratio, parallel = _proportion(attention)
    softmax = isinstance(attention, Softmax)
    target = A if softmax else P
    size = (target * target).sum()
    s = jnp.where(size > 0, (V * target).sum() / jnp.where(size > 0, size, 1.0), 0.0).astype(size.dtype)
    if is_concrete(attention, state):
        name = "A = K^T Q" if softmax else "P = K^T K"
        if softmax and bool(jnp.linalg.norm(A - A.T) > HYPOTHESIS * jnp.linalg.norm(A)):
            raise MatrixError("energy needs a symmetric matrix A = K^T Q, got one that is not: the flow has no potential")
        if not softmax and not bool(parallel):
            raise MatrixError("energy of L2 attention needs Q to be a multiple of K: otherwise the flow has no potential")
        if bool(jnp.linalg.norm(V - s * target) > HYPOTHESIS * jnp.linalg.norm(V)):
            raise MatrixError(f"energy needs V to be a multiple of {name}: otherwise the flow is no Bures gradient flow")
        if bool((state.mean != 0).any()):
            raise MatrixError("energy needs a state of zero mean: with another mean the flow is no Bures gradient flow")
    if softmax:
        return -jnp.trace(V @ cov @ A @ cov) / 4
    keys = attention.K @ state.factor
    gram = attention.scale * (keys.T @ keys)
    return -ratio * s * (jnp.trace(gram) / 2 - jnp.linalg.slogdet(jnp.eye(gram.shape[0], dtype=gram.dtype) + 2 * gram)[1] / 4)


def _checked(flow: GaussianFlow, state: Any, user: str) -> Softmax | L2:
    attention = plain_attention(flow, user)
    if not isinstance(state, Gaussian):
        raise ArgumentError(f"state must be a Gaussian, got {type(state).__name__}")
    if state.dim != attention.dim:
        raise ShapeError(f"state must have dimension {attention.dim} to match the attention, got {state.dim}")
    return attention


def _over_states(function: Any, state: Gaussian) -> Any:
    """Apply a function of one factor over the leading axes of a state, flattened into one axis so that every batch shape shares the code."""
    factor = state.factor
    lead = factor.shape[:-2]
    if not lead:
        return function(factor)
    out = jax.vmap(function)(factor.reshape(-1, *factor.shape[-2:]))
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), out)


def _scalar_limit(attention: Softmax, factor: Float[Array, "d r"]) -> Limit:
    """The limit for V = v I from one eigendecomposition."""
    form, level = quadratic_form(attention, factor)
    values, vectors = jnp.linalg.eigh(attention.V * form)
    small = jnp.abs(attention.V) * level
    blows, dies = values[-1] > small, values[-1] < -small
    top = values >= values[-1] - jnp.maximum(small, 1e-9 * jnp.abs(values[-1]))
    chosen = jnp.where(blows, top, jnp.abs(values) <= small)
    keep = chosen.astype(values.dtype)
    kept = factor @ (vectors * keep)
    trace = (kept * kept).sum()
    cov = _symmetric(kept @ kept.T) / jnp.where(blows & (trace > 0), trace, 1.0)
    turning = vectors.T @ (attention.V * attention.scale * ((attention.K @ factor).T @ (attention.Q @ factor))) @ vectors
    turning = jnp.linalg.norm(turning * keep[:, None] * keep[None, :])
    zero = dies | (trace == 0)
    kind = jnp.where(blows, Regime.BLOWUP, jnp.where(zero, Regime.ZERO, jnp.where(turning > small, Regime.ROTATING, Regime.FROZEN)))
    rank = jnp.where(zero, 0, chosen.sum(dtype=jnp.int32))
    return Limit(cov, rank.astype(jnp.int32), kind.astype(jnp.int32), 10 * jnp.finfo(cov.dtype).eps * jnp.linalg.norm(cov))


@jax.jit
def _run(attention: Attention, factor: Float[Array, "d r"], settle: Any) -> tuple[Limit, Array]:
    """Limit and blow-up time from one run in the desingularized clock; one compiled loop serves both questions, batches and sweeps."""
    flow = Desingularized(attention, jnp.asarray(settle, factor.dtype))
    start = Gaussian._raw(jnp.zeros(factor.shape[0], factor.dtype), factor, None)
    single = factor.dtype == jnp.float32
    sol = integrate(flow, start, jnp.array([0.0, CLOCK_END], factor.dtype), rtol=1e-5 if single else 1e-10, atol=1e-6 if single else 1e-12,
                    max_steps=STEPS, throw=False)
    return _read(flow, last(sol.value), sol.status)


def _read(flow: Desingularized, y: Direction, status: Array) -> tuple[Limit, Array]:
    """Regime, limit and blow-up time from the state at which a run ended."""
    attention = flow.attention
    drift, _, speed = flow.rates(y)
    signs, motion = flow.signs(y), 2 * _symmetric(drift @ y.matrix.T)
    ended, blows = status == Status.CONVERGED, (status == Status.BLOWUP) | signs.certain
    grows, settled = ended & signs.growing, ended & signs.settled
    rests = ended & ~grows & ~settled
    empty = (y.matrix == 0).all()
    turns = jnp.linalg.norm(drift) > 1e-3 * speed                                        # at rest, a frozen state has a drift below 1e-4
    kind = jnp.where(blows, Regime.BLOWUP, jnp.where(grows, Regime.GROWING, jnp.where(settled | (rests & empty), Regime.ZERO, jnp.where(
        rests, jnp.where(turns, Regime.ROTATING, Regime.FROZEN), Regime.UNDECIDED))))

    tail = jnp.where(rests, y.time, 0.0) * motion                         # t times the derivative: what a 1/t tail still has to go
    direction = y.cov + tail
    values, before = jnp.linalg.eigvalsh(direction), jnp.linalg.eigvalsh(y.cov)
    rank = (values > jnp.maximum(PERSISTENT * before, FAINT * before[-1])).sum(dtype=jnp.int32)
    trace = jnp.where(blows | grows, 1 / jnp.trace(direction), jnp.exp(y.log_trace))
    zero = kind == Regime.ZERO
    cov = jnp.where(zero, 0.0, trace * direction).astype(direction.dtype)
    # a settling direction has about its present motion still to go; the tail of a frozen state is removed up to its square
    rest = jnp.where(blows | grows, signs.unsettled, jnp.linalg.norm(tail))
    error = jnp.where(zero, 0.0, trace * jnp.maximum(rest, 1e-10)).astype(direction.dtype)
    error = jnp.where(kind == Regime.UNDECIDED, jnp.inf, error).astype(direction.dtype)
    found = Limit(cov, jnp.where(zero, 0, rank).astype(jnp.int32), kind.astype(jnp.int32), error)

    time = jnp.where(blows, signs.blow_up_time, jnp.where(ended, jnp.inf, jnp.nan))
    if isinstance(attention, L2):                                                    # injective keys bound the velocity: no blow-up
        keys = jnp.linalg.eigvalsh(attention.P)
        time = jnp.where(keys[0] > 100 * jnp.finfo(keys.dtype).eps * keys[-1], jnp.inf, time)
    return found, time.astype(y.time.dtype)
