"""Expectation-maximization for top-K mixtures, monotone in the observed likelihood with recomputed routing."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from theorylab.core import tree
from theorylab.core.module import choice, number
from theorylab.core.problem import Method
from theorylab.errors import ArgumentError
from theorylab.moe import gate as gates
from theorylab.moe.model import Mixture
from theorylab.moe.moments import Statistics, gradient_to_inputs, statistics, to_inputs

Array = jax.Array
FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.0)            # of the proposed gate step, tried in this order
RIDGE = 1e-12                                       # relative, for an expert whose rows do not determine it
IMPURITY = 1e-6                                     # a gate that is this certain about an expert has no finite maximizer
UNITS = 16                                          # of round-off, below which a loss of likelihood is not seen


class Move(NamedTuple):
    """An M-step: new experts, and a gate step of which a fraction may be taken."""

    experts: Array
    variance: Array
    gate: Array
    starved: Array


def m_step(problem: Any, m: Mixture, sums: Statistics, kind: str, ridge: Any, floor: Any) -> Move:
    """New experts in closed form, and the proposal for the gate.

    An expert whose effective number of rows is below the number p of its coefficients keeps its parameters (`starved`).
    """
    p = sums.cross.shape[1]
    starved = sums.count < p
    gram = jnp.where(starved[:, None, None], jnp.eye(p, dtype=sums.gram.dtype), sums.gram)
    factor = jnp.linalg.cholesky(gram)
    extra = RIDGE * jnp.trace(gram, axis1=1, axis2=2) / p
    damped = jnp.linalg.cholesky(gram + extra[:, None, None] * jnp.eye(p, dtype=gram.dtype))
    bad = ~jnp.all(jnp.isfinite(factor), axis=(1, 2), keepdims=True)
    factor = jnp.where(bad, damped, factor)
    half = solve_triangular(factor, sums.cross[:, :, None], lower=True)
    change = solve_triangular(factor, half, lower=True, trans=1)[:, :, 0]
    count = jnp.where(starved, jnp.ones_like(sums.count), sums.count)
    variance = jnp.maximum((sums.square - jnp.sum(half * half, axis=(1, 2))) / count, (floor * problem.spread).astype(count.dtype))
    experts = m.expert_matrix + jnp.where(starved[:, None], 0, to_inputs(change, problem.center, problem.scale))
    move = jnp.zeros_like(experts)
    if m.active > 1:  # with K = 1 the likelihood does not depend on the gate but through the routing
        move = to_inputs(gates.direction(kind, sums, ridge), problem.center, problem.scale)
    return Move(experts, jnp.where(starved, m.variance, variance), move, jnp.sum(starved, dtype=jnp.int32))


def moved(m: Mixture, move: Move, fraction: Array) -> Mixture:
    """The mixture after an M-step with a fraction of its gate step."""
    gate = m.gate_matrix + fraction.astype(m.dtype) * move.gate
    return Mixture.from_matrices(gate, move.experts, move.variance, m.active, m.selection)


def acceptable(new: Array, old: Array, weight: Array, dtype: Any) -> Array:
    """Whether the log-likelihood has not fallen by more than round-off of the data."""
    return new >= old - UNITS * float(jnp.finfo(dtype).eps) * (jnp.abs(old) + weight.astype(old.dtype))


def score(problem: Any, m: Mixture, sums: Statistics) -> tuple[Array, Array, Array]:
    """Derivatives of the log-likelihood with fixed routing in the gate and expert matrices and in the variances."""
    to = lambda g: gradient_to_inputs(g, problem.center, problem.scale)  # noqa: E731
    return to(sums.gate_gradient), to(sums.cross / m.variance[:, None]), (sums.square / m.variance - sums.count) / (2 * m.variance)


def quality(problem: Any, m: Mixture, sums: Statistics) -> dict[str, Array]:
    """What the sums say about the fit: norm of the score per row, and whether an expert's gate has run off to certainty."""
    largest = jnp.stack([jnp.max(jnp.abs(part)) for part in score(problem, m, sums)])
    uncertain = jnp.where(sums.gate_mass > 0, sums.gate_impurity >= IMPURITY * sums.gate_mass, True)
    diverging = jnp.any(~uncertain) if m.active > 1 else jnp.asarray(False)
    return {"score_norm": jnp.max(largest) / sums.weight, "gate_diverging": diverging}


class EMState(NamedTuple):
    """The iterate, the sums at it, the routing if it is frozen, and what the last step did."""

    mixture: Mixture
    sums: Statistics
    mask: Array | None
    gain: Array
    rejected: Array
    starved: Array


class EM(Method):
    r"""EM with an exact expert step and one gate step, accepted by the observed log-likelihood.

    A step takes the responsibilities at the iterate, moves the experts to their weighted least squares fits, and the gate by the fraction
    1, 1/2, 1/4, 1/8 or 0 of the proposal, the first for which the log-likelihood, with the routing computed anew, has not fallen. It is
    monotone, and seldom changes the routing of a row: that is the work of `RoutingSearch` (companion derivation; the plain EM of
    the paper's script is `routing="frozen"`, `gate="official"`).

    Args:
        gate: `"newton"` (few steps, any K), `"bohning"` (cheap steps for many experts and inputs), or `"official"` (the public code's scheme).
        routing: `"accept"`, or `"frozen"`: also a fraction that would take an expert from a row is refused. That is EM in the strict sense:
            a row of which an expert has a positive share cannot lose it, so every row keeps the experts of the start.
        ridge: damping of the Newton step, relative to the mean eigenvalue.
        variance_floor: variances are at least this multiple of the variance of y.

    Metrics:
        `log_likelihood` of the data, `gain` in it per unit of weight at the last step, `score_norm` (largest derivative per unit of weight),
        `rejected` fractions so far, `starved` experts (too few rows: kept as they are), `gate_diverging` (separated data: some expert's
        gate is 0 or 1 at all its rows, and its parameters have no finite maximizer).

    Example:
        >>> from theorylab import moe
        >>> likelihood = moe.Likelihood(*moe.weyl_sample(moe.example("S1"), 400, -1.0, 1.0), experts=3, active=2)
        >>> fit = tl.iterate(likelihood, moe.EM(), moe.example("S1"), steps=20)
        >>> bool(np.all(np.diff(fit.history["log_likelihood"]) > -1e-10)), float(fit.history["log_likelihood"][-1].round(5))
        (True, -360.01985)
    """

    gate: str = choice("newton", among=tuple(gates.STEPS))
    routing: str = choice("accept", among=("accept", "frozen"))
    ridge: Any = number(1e-8, low=0.0)
    variance_floor: Any = number(1e-6, low=0.0)

    def check(self, problem: Any, x0: Any) -> None:
        problem.check_mixture(x0)

    def prepare(self, problem: Any) -> EM:
        if problem.per_pass is not None:
            raise ArgumentError("EM needs all rows in every step: for a streamed Likelihood use StreamedEM(per_pass)")
        return self

    def _sums(self, problem: Any, m: Mixture) -> Statistics:
        return statistics(problem, m, curvature=self.gate == "newton" and m.active > 1)

    def init(self, problem: Any, x0: Mixture, *, key: Array) -> EMState:
        mask = problem.routing(x0) if self.routing == "frozen" else None
        sums = self._sums(problem, x0)
        zero = jnp.zeros((), jnp.int32)
        return EMState(x0, sums, mask, jnp.full_like(sums.log_likelihood, jnp.inf), zero, zero)

    def step(self, problem: Any, state: EMState, *, key: Array) -> EMState:
        old, before = state.mixture, state.sums.log_likelihood
        move = m_step(problem, old, state.sums, self.gate, self.ridge, self.variance_floor)
        fractions = jnp.asarray(np.asarray(FRACTIONS), old.dtype)

        def attempt(loop: tuple) -> tuple:
            i, _, _, _ = loop
            new = tree.strong(moved(old, move, fractions[i]))
            sums = self._sums(problem, new)
            good = acceptable(sums.log_likelihood, before, sums.weight, old.dtype)
            return i + 1, new, sums, good if state.mask is None else good & problem.routed(new, state.mask)

        start = (jnp.zeros((), jnp.int32), tree.strong(old), state.sums, jnp.asarray(False))
        tries, new, sums, good = jax.lax.while_loop(lambda loop: ~loop[3] & (loop[0] < len(FRACTIONS)), attempt, start)
        mixture, sums = tree.select(good, (new, sums), (old, state.sums))
        refused = tries - good.astype(tries.dtype)
        gain = (sums.log_likelihood - before) / sums.weight.astype(before.dtype)
        return EMState(mixture, sums, state.mask, gain, state.rejected + refused, move.starved)

    def value(self, problem: Any, state: EMState) -> Mixture:
        return state.mixture

    def measure(self, problem: Any, state: EMState) -> dict[str, Array]:
        return {"log_likelihood": state.sums.log_likelihood}

    def metrics(self, problem: Any, state: EMState) -> dict[str, Array]:
        return {"gain": state.gain, "rejected": state.rejected, "starved": state.starved, **quality(problem, state.mixture, state.sums)}
