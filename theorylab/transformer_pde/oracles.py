"""What a Gaussian does in the long run: its regime, its limit and its blow-up time."""

from __future__ import annotations

import enum
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from theorylab.core.integrate import integrate
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, NoClosedFormError, ShapeError
from theorylab.transformer_pde.attention import Attention, Softmax, is_concrete
from theorylab.transformer_pde.certificates import Known, certificate, never_blows_up, scalar_softmax
from theorylab.transformer_pde.closed_forms import plain_attention, scalar_blow_up_time, without_mean
from theorylab.transformer_pde.combined import FeedForward, Layered, MultiHead, parts
from theorylab.transformer_pde.desingularized import CALM, LASTING, Desingularized, Direction, last
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Gaussian, _symmetric
from theorylab.transformer_pde.riccati import attractor
from theorylab.transformer_pde.rosenbrock import rosenbrock

Array = jax.Array

CLOCK_END = 1000.0
"""End of the desingularized clock; it counts e-folds of the time and of the trace, so what is not decided by then rotates."""
SETTLED = 1e-8
"""A limit direction at a blow-up is followed until it moves less than this."""
ROUND, ROUNDS = 100, 30
"""Lanes of a batch advance by so many steps at a time, those that are not decided only, and at most so often."""
EXPLICIT_STEPS = 1000
LANES = 16
"""Lanes that advance together."""
TOLERANCE = 1e-7
"""Relative tolerance of the implicit run that decides; a blow-up time is found again by an explicit one at 1e-10."""
PERSISTENT = 0.5
"""An eigenvalue belongs to the limit if extrapolation to infinite time keeps this fraction of it; one that decays loses all."""
FAINT = 1e-7
"""Eigenvalues below this fraction of the largest are not told from those that decay: rest is told at 1e-8."""


class Regime(enum.IntEnum):
    """How the covariance behaves in the long run. Integers, so that a batch of regimes is an array."""

    FROZEN = 0
    ZERO = 1
    BLOWUP = 2
    GROWING = 3
    ROTATING = 4
    UNDECIDED = 5
    EQUILIBRIUM = 6

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
    Regime.EQUILIBRIUM: "the covariance converges to an equilibrium of attention, feed-forward layer and noise",
}


class Limit(NamedTuple):
    r"""The long-run behavior of a covariance. With leading axes of states, each entry has them.

    Attributes:
        cov: $\lim \Sigma(t)$ for `FROZEN`, `ROTATING`, `EQUILIBRIUM` and `ZERO`; $\lim \Sigma / \operatorname{tr}\Sigma$ for `BLOWUP` and `GROWING`;
            the last state for `UNDECIDED`.
        rank: rank of `cov`, by persistence: eigenvalues that decay to zero do not count however slowly they do.
        regime: a `Regime`; an integer array for a batch or inside compiled code.
        error: estimate of the Frobenius error of `cov`: round-off for closed forms, else the part that was extrapolated, and the tolerance.
    """

    cov: Array
    rank: Array
    regime: Any
    error: Array


def blow_up_time(flow: GaussianFlow, state: Gaussian) -> Array:
    r"""The time at which the covariance blows up; infinite if it never does, NaN if the numbers do not decide.

    With a number as $V$, softmax has $t^* = 1 / \lambda_{\max}(v L_0^\top (A + A^\top) L_0)$ (companion derivation, closed form for $V = vI$).
    Sinkhorn and L2 attention with injective keys never blow up, nor does softmax with $V \succ 0$ and $A + A^\top \preceq 0$. Anything else runs
    through `Desingularized`. Differentiable in all arguments.

    Args:
        flow: a `GaussianFlow` of attention, with feed-forward or not; with noise only where everything tends to an `equilibrium`.
        state: Gaussians, with any leading axes; of zero mean if the attention is linear.

    Raises:
        NoClosedFormError: the flow has normalization, noise that may lead to a blow-up, or weights that change with depth.

    Example:
        >>> flow = GaussianFlow(Softmax(jnp.eye(2), jnp.eye(2), 1.0))
        >>> float(blow_up_time(flow, Gaussian.standard(2)))
        0.5
    """
    attention, state, rests = _asked(flow, state, "blow_up_time")
    lead, factors = _flat(state)
    if isinstance(attention, Softmax) and attention.V.ndim == 0 and rests is None:
        return scalar_blow_up_time(attention, factors).reshape(lead)
    if flow.noise is not None and rests is not None:
        return jnp.broadcast_to(jnp.where(rests.holds, jnp.inf, jnp.nan).astype(factors.dtype), lead)
    lanes, still, rests = lax.stop_gradient((_repeated(attention, factors), factors, rests))
    known, never = _known(lanes, still, rests)
    if is_concrete(never) and bool(never.all()):
        return jnp.full(lead, jnp.inf, factors.dtype)
    _, times, blows = _answers(lanes, still, known, never, jnp.asarray(0.05, factors.dtype), True)
    if not is_concrete(blows) or bool(blows.any()):
        fine = _times_of(attention, jnp.where(blows[:, None, None], factors, 0.0).astype(factors.dtype))
        times = jnp.where(blows & jnp.isfinite(fine), fine, times)
    return times.reshape(lead)


def limit(flow: GaussianFlow, state: Gaussian) -> Limit:
    r"""What the covariance tends to, with its rank, its regime and an error estimate.

    Where the weights allow it the limit is exact: for a number as $V$ (or a multiple of the identity), softmax has $L_0 \Pi L_0^\top$ with $\Pi$ the
    projection on the kernel of $v L_0^\top (A + A^\top) L_0$ if that is negative semidefinite, L2 with $Q = rK$ and Sinkhorn with a symmetric $A$
    likewise; softmax with $v(A + A^\top) \prec 0$ and a feed-forward layer or noise has its `equilibrium` (companion derivation). Anything else runs
    through `Desingularized` by an implicit solver, and the algebraic tail $t^{-p}$ is removed by extrapolation.

    A batch of states, or of heads (`limits`), goes in groups of lanes, so that the hard ones do not hold up the rest.

    Args:
        flow: a `GaussianFlow` of attention, with feed-forward or not; with noise only where it has an `equilibrium`.
        state: Gaussians, with any leading axes; of zero mean if the attention is linear.

    Raises:
        NoClosedFormError: the flow has normalization, noise without an attracting equilibrium, or weights that change with depth.

    Example:
        >>> head = Softmax(jnp.array([[1.0, 0.0]]), jnp.array([[-1.0, 0.0]]), 1.0)
        >>> found = limit(GaussianFlow(head), Gaussian(jnp.zeros(2), jnp.array([[2.0, 1.0], [1.0, 2.0]])))
        >>> found.regime.name, int(found.rank), float(found.cov[1, 1].round(9))
        ('FROZEN', 1, 1.5)
    """
    attention, state, rests = _asked(flow, state, "limit")
    lead, factors = _flat(state)
    if isinstance(attention, Softmax) and attention.V.ndim == 0 and rests is None:
        found = _scalar_limits(_repeated(attention, factors), factors)
    else:
        found = _limits_of(_repeated(attention, factors), factors, rests)
    found = jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), found)
    if is_concrete(found.regime) and found.regime.ndim == 0:
        return found._replace(regime=Regime(int(found.regime)))
    return found


def limits(flows: GaussianFlow, states: Gaussian) -> Limit:
    """The limits of many heads at once: `flows` and `states` hold arrays with one leading axis, as `jax.vmap` over a constructor makes them.

    The same as `jax.vmap(limit)`, but hard heads do not hold up the others.

    Args:
        flows: a `GaussianFlow` of attention alone whose arrays have a leading axis.
        states: Gaussians with that leading axis.

    Raises:
        ShapeError: the leading axes differ.
        NoClosedFormError: as for `limit`.

    Example:
        >>> heads = jax.vmap(lambda q: GaussianFlow(Softmax(q[None], -q[None], jnp.eye(2))))(jnp.eye(2))
        >>> states = Gaussian.from_factor(jnp.zeros((2, 2)), jnp.stack([jnp.eye(2)] * 2))
        >>> limits(heads, states).rank.tolist()
        [1, 1]
    """
    if not isinstance(flows, GaussianFlow) or not isinstance(states, Gaussian):
        raise ArgumentError(f"flows and states must be a GaussianFlow and a Gaussian, got {type(flows).__name__} and {type(states).__name__}")
    count = states.factor.shape[0]
    if states.factor.ndim != 3 or any(jnp.ndim(leaf) == 0 or leaf.shape[0] != count for leaf in jax.tree.leaves(flows)):
        raise ShapeError(f"flows and states must have one leading axis of equal length, got states of shape {states.factor.shape[:-2]} and arrays "
                         f"of flows of shapes {sorted({jnp.shape(leaf) for leaf in jax.tree.leaves(flows)})}")
    if flows.feed_forward is not None or flows.noise is not None:
        raise NoClosedFormError("limits takes attention alone: put a FeedForward among the heads of a MultiHead")
    attention, _, _ = _asked(jax.tree.map(lambda leaf: leaf[0], flows), jax.tree.map(lambda leaf: leaf[0], states), "limits")
    whole = without_mean(flows.attention, states)[0]
    if isinstance(attention, Softmax) and attention.V.ndim == 0:
        return _scalar_limits(whole, states.factor)
    return _limits_of(whole, states.factor, None)


def regime(flow: GaussianFlow, state: Gaussian) -> Any:
    """The `Regime` of a state; for a batch, or inside compiled code, an integer array.

    Example:
        >>> regime(GaussianFlow(Softmax(jnp.eye(2), jnp.eye(2), -1.0)), Gaussian.standard(2)).name
        'ZERO'
    """
    return limit(flow, state).regime


class _Rests(NamedTuple):
    """The equilibrium of a flow, whether every regular start tends to it, and the noise, which makes a start regular."""

    cov: Array
    holds: Array
    noise: Array | None


def _asked(flow: GaussianFlow, state: Any, user: str) -> tuple[Any, Gaussian, _Rests | None]:
    """The attention that acts, feed-forward included, after checks; and the equilibrium of the flow if it has one."""
    attention = plain_attention(flow, user, terms=("feed_forward", "noise"))
    if not isinstance(state, Gaussian):
        raise ArgumentError(f"state must be a Gaussian, got {type(state).__name__}")
    if state.dim != attention.dim:
        raise ShapeError(f"state must have dimension {attention.dim} to match the attention, got {state.dim}")
    if any(isinstance(part, Layered) for part in parts(attention)):
        raise NoClosedFormError(f"{user} is not known for weights that change with depth: use integrate")
    attention, state = without_mean(attention, state)
    if flow.feed_forward is None and flow.noise is None:
        return attention, state, None
    rests = None
    if isinstance(attention, Softmax) and attention.V.ndim == 0:
        cov, holds = attractor(attention, flow.feed_forward, flow.noise)
        rests = _Rests(cov, holds, flow.noise)
    if flow.noise is not None and (rests is None or (is_concrete(rests.holds) and not bool(rests.holds))):
        raise NoClosedFormError(f"{user} with noise is known for softmax attention with a number v as V and v (A + A^T) negative definite")
    if flow.feed_forward is not None:
        attention = MultiHead([attention, FeedForward(*flow.feed_forward)])
    return attention, state, rests


def _flat(state: Gaussian) -> tuple[tuple[int, ...], Float[Array, "n d r"]]:
    """The leading axes of a state, and its factors along one axis, so that every batch shape shares the code."""
    factor = state.factor if state.columns else jnp.zeros((*state.mean.shape, 1), state.mean.dtype)
    return factor.shape[:-2], factor.reshape(-1, *factor.shape[-2:])


def _attracted(rests: _Rests, factors: Float[Array, "n d r"]) -> Known:
    """The certificate that each start tends to the equilibrium: its covariance is regular, or the noise makes it so."""
    def one(factor: Array) -> Known:
        cov = factor @ factor.T
        values = jnp.linalg.eigvalsh(cov if rests.noise is None else cov + _symmetric(rests.noise).astype(cov.dtype))
        regular = rests.holds & (values[0] > FAINT * values[-1])
        rank = (jnp.linalg.eigvalsh(rests.cov) > FAINT * jnp.maximum(jnp.trace(rests.cov), values[-1])).sum(dtype=jnp.int32)
        kind = jnp.where(rank > 0, Regime.EQUILIBRIUM, Regime.ZERO)
        error = 1e-12 * jnp.linalg.norm(rests.cov)
        if rests.noise is not None:                                   # without the noise the run that a certificate spares would be another flow
            kind, rank = jnp.where(regular, kind, Regime.UNDECIDED), jnp.where(regular, rank, 0)
            error, regular = jnp.where(regular, error, jnp.inf), jnp.ones((), bool)
        cov = jnp.where(rank > 0, rests.cov, 0.0)
        return Known(regular, cov.astype(factor.dtype), rank.astype(jnp.int32), kind.astype(jnp.int32), error.astype(factor.dtype))

    return jax.vmap(one)(factors)


@jax.jit
def _scalar_limits(attentions: Softmax, factors: Float[Array, "n d r"]) -> Limit:
    return Limit(*jax.vmap(scalar_softmax)(attentions, factors)[1:])


def _limits_of(attentions: Attention, factors: Float[Array, "n d r"], rests: _Rests | None) -> Limit:
    """Limits of lanes of heads and factors; what the weights decide for every lane is not run, and not compiled."""
    known, never = _known(attentions, factors, rests)
    if (rests is not None and rests.noise is not None) or (is_concrete(known) and bool(known.holds.all())):
        return Limit(*known[1:])
    return _answers(attentions, factors, known, never, jnp.asarray(SETTLED, factors.dtype), False)[0]


@jax.jit
def _known(attentions: Attention, factors: Float[Array, "n d r"], rests: _Rests | None) -> tuple[Known, Array]:
    """What is known without a run, and which lanes can never blow up."""
    known = jax.vmap(certificate)(attentions, factors) if rests is None else _attracted(rests, factors)
    return known, known.holds & (known.regime != Regime.BLOWUP) | jax.vmap(never_blows_up)(attentions)


@jax.jit
def _answers(attentions: Attention, factors: Float[Array, "n d r"], known: Known, never: Array, settle: Array,
             quick: Any) -> tuple[Limit, Array, Array]:
    """Limits and blow-up times of lanes of heads and factors, and which lanes blow up; one compiled program for all questions.

    Lanes with a certificate start at zero, where nothing is left to do. With `quick` only the time is asked for, so lanes that cannot blow up do.
    """
    done = jnp.where(quick, never, known.holds)
    ends = _followed(attentions, jnp.where(done[:, None, None], 0.0, factors).astype(factors.dtype), settle)
    found, times = jax.vmap(_read)(attentions, *ends, (factors * factors).sum((-1, -2)))
    exact = Limit(*known[1:])
    found = jax.tree.map(lambda a, b: jnp.where(known.holds.reshape(-1, *[1] * (a.ndim - 1)), a, b), exact, found)
    blows = (found.regime == Regime.BLOWUP) & ~never
    times = jnp.where(blows, times, jnp.where(never | (found.regime != Regime.UNDECIDED), jnp.inf, jnp.nan))
    return found, times.astype(factors.dtype), blows


def _repeated(attention: Attention, factors: Float[Array, "n d r"]) -> Attention:
    """The same head for every lane."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (factors.shape[0], *jnp.shape(leaf))), attention)


def _start(attention: Attention, factor: Float[Array, "d r"], settle: Array) -> Direction:
    return Desingularized(attention, settle).lift(Gaussian._raw(jnp.zeros(factor.shape[0], factor.dtype), factor, None))


def _advance(attention: Attention, y: Direction, settle: Array, steps: int) -> tuple[Direction, Array]:
    dtype = y.matrix.dtype
    tolerance = 1e-5 if dtype == jnp.float32 else TOLERANCE
    sol = integrate(Desingularized(attention, settle), y, jnp.array([0.0, CLOCK_END], dtype), rtol=tolerance, atol=tolerance / 100, max_steps=steps,
                    solver=rosenbrock(), throw=False)
    return last(sol.value), jnp.asarray(sol.status, jnp.int32)


def _followed(attentions: Attention, factors: Float[Array, "n d r"], settle: Array) -> tuple[Direction, Array]:
    """Each start to its end, and how it ended. Lanes advance in groups, least advanced first, until each is decided or has spent its steps."""
    if factors.shape[0] == 1:
        attention = jax.tree.map(lambda leaf: leaf[0], attentions)
        return jax.tree.map(lambda leaf: leaf[None], _advance(attention, _start(attention, factors[0], settle), settle, ROUND * ROUNDS))
    count = factors.shape[0]
    group = min(LANES, count)

    def alive(status: Array, rounds: Array) -> Array:
        return (status == Status.MAX_STEPS) & (rounds < ROUNDS)

    def go(carry: tuple[Direction, Array, Array]) -> tuple[Direction, Array, Array]:
        y, status, rounds = carry
        waits = alive(status, rounds)
        chosen = jnp.argsort(jnp.where(waits, rounds, ROUNDS + 1))[:group]
        some, old = jax.tree.map(lambda leaf: leaf[chosen], ((attentions, y), (y, status)))
        new = jax.vmap(lambda attention, y: _advance(attention, y, settle, ROUND))(*some)
        on = waits[chosen]
        new = jax.tree.map(lambda a, b: jnp.where(on.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)
        y, status = jax.tree.map(lambda whole, part: whole.at[chosen].set(part), (y, status), new)
        return y, status, rounds.at[chosen].add(on.astype(rounds.dtype))

    y = jax.vmap(lambda attention, factor: _start(attention, factor, settle))(attentions, factors)
    begin = y, jnp.full(count, int(Status.MAX_STEPS), jnp.int32), jnp.zeros(count, jnp.int32)
    return lax.while_loop(lambda carry: alive(*carry[1:]).any(), go, begin)[:2]


@jax.jit
def _times_of(attention: Attention, factors: Float[Array, "n d r"]) -> Array:
    """Blow-up times to round-off by an explicit solver, infinite where the run does not end so."""
    single = factors.dtype == jnp.float32

    def one(factor: Array) -> Array:
        flow = Desingularized(attention)
        y0 = _start(attention, factor, flow.settle)
        sol = integrate(flow, y0, jnp.array([0.0, CLOCK_END], factor.dtype), rtol=1e-5 if single else 1e-10, atol=1e-6 if single else 1e-12,
                        max_steps=EXPLICIT_STEPS, throw=False)
        time = flow.signs(last(sol.value)).blow_up_time
        return jnp.where(sol.status == Status.BLOWUP, time, jnp.inf)

    return one(factors[0])[None] if factors.shape[0] == 1 else jax.vmap(one)(factors)


def _read(attention: Attention, y: Direction, status: Array, began: Array) -> tuple[Limit, Array]:
    """Limit and rough blow-up time from the state at which a run ended, and from the trace with which it began.

    A run that was not decided, because rounding or fast turns cost it its steps, is read with less digits: what has lost eight of them, or goes on
    falling along a nearly settled direction, vanishes, and what moves by less than 1 % in an e-fold of the time, less and less, rests.
    """
    flow = Desingularized(attention)
    drift, growth, speed = flow.rates(y)
    signs, motion = flow.signs(y), 2 * _symmetric(drift @ y.matrix.T)
    ended, blows = status == Status.CONVERGED, (status == Status.BLOWUP) | signs.certain
    falls = (signs.falls < LASTING).all() & (signs.unsettled < CALM) & (growth < 0)
    faint = ~ended & (falls | (y.log_trace < jnp.log(began) + math.log(FAINT / 10)))
    slows = ~ended & (signs.falls > LASTING).all() & (jnp.linalg.norm(motion) * y.time < CALM)
    grows, settled = ended & signs.growing, (ended & signs.settled) | faint
    rests = (ended & ~grows & ~settled) | (slows & ~settled)
    empty = (y.matrix == 0).all()
    turns = jnp.linalg.norm(drift) > 0.1 * speed                            # a rotation drives the clock, a frozen state leaves that to the time
    layer = any(isinstance(part, FeedForward) for part in parts(attention))
    still = Regime.EQUILIBRIUM if layer else jnp.where(turns, Regime.ROTATING, Regime.FROZEN)          # tokens may turn in an equilibrium too
    kind = jnp.where(blows, Regime.BLOWUP, jnp.where(grows, Regime.GROWING, jnp.where(settled | (rests & empty), Regime.ZERO,
                     jnp.where(rests, still, Regime.UNDECIDED))))

    tail = jnp.where(rests, 1 / signs.order, 0.0) * motion / speed              # what a motion like t^-p still has to go
    direction = y.cov + tail
    values, before = jnp.linalg.eigvalsh(direction), jnp.linalg.eigvalsh(y.cov)
    # a direction is not followed for long: what is as small as its motion may still vanish
    present = jnp.where(blows | grows, jnp.minimum(3 * signs.unsettled, 0.5), PERSISTENT * before)
    rank = (values > jnp.maximum(present, FAINT * before[-1])).sum(dtype=jnp.int32)
    trace = jnp.where(blows | grows, 1 / jnp.trace(direction), jnp.exp(y.log_trace))
    zero = kind == Regime.ZERO
    cov = jnp.where(zero, 0.0, trace * direction).astype(direction.dtype)
    # a settling direction has about its present motion still to go; the tail of a frozen state is removed up to its square
    rest = jnp.where(blows | grows, signs.unsettled, jnp.linalg.norm(tail) + 10 * TOLERANCE)
    error = jnp.where(zero, jnp.where(faint & ~falls, trace, 0.0), trace * jnp.maximum(rest, 1e-10)).astype(direction.dtype)
    error = jnp.where(kind == Regime.UNDECIDED, jnp.inf, error).astype(direction.dtype)
    return Limit(cov, jnp.where(zero, 0, rank).astype(jnp.int32), kind.astype(jnp.int32), error), signs.blow_up_time.astype(y.time.dtype)
