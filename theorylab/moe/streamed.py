"""EM over data that do not fit in memory: one pass of the stream is one evaluation of the likelihood."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import tree
from theorylab.core.module import choice, number, size
from theorylab.core.problem import Method
from theorylab.errors import ArgumentError
from theorylab.moe import gate as gates
from theorylab.moe.em import FRACTIONS, acceptable, m_step, moved, quality
from theorylab.moe.model import Mixture
from theorylab.moe.moments import Statistics, statistics

Array = jax.Array


class StreamedState(NamedTuple):
    """The last accepted mixture with its sums, and the candidate whose sums are being taken."""

    mixture: Mixture
    sums: Statistics
    candidate: Mixture
    partial: Statistics
    batches: Array
    fraction: Array
    gain: Array
    rejected: Array
    starved: Array


class StreamedEM(Method):
    """The method `EM` on a stream, in memory that does not depend on the number of rows.

    A step adds the sums of one batch for the candidate. After the last batch of a pass the candidate is accepted or not by the likelihood of
    the whole pass, and the next one is made. The mixtures are those of `EM`, whose step k is known here after pass k + 1 if no fraction of a
    gate step was refused; each refusal costs a pass.

    Args:
        per_pass: batches in one pass.
        gate: as for `EM`.
        ridge: as for `EM`.
        variance_floor: as for `EM`.

    Metrics:
        Those of `EM`, of the last accepted mixture; -inf and infinity in the first pass. Record with `every=per_pass`.

    Example:
        >>> from theorylab import moe
        >>> x, y = moe.weyl_sample(moe.example("S1"), 400, -1.0, 1.0)
        >>> rows = tl.Rows((np.asarray(x), np.asarray(y)), 64, remainder="weight")
        >>> likelihood, em = moe.Likelihood.streamed(rows, experts=3, active=2), moe.StreamedEM(rows.per_pass)
        >>> fit = tl.iterate(likelihood, em, moe.example("S1"), steps=20 * rows.per_pass, every=rows.per_pass, data=rows)
        >>> float(fit.history["log_likelihood"][-1].round(5))
        -360.01985
    """

    per_pass: int = size()
    gate: str = choice("newton", among=tuple(gates.STEPS))
    ridge: Any = number(1e-8, low=0.0)
    variance_floor: Any = number(1e-6, low=0.0)

    def check(self, problem: Any, x0: Any) -> None:
        problem.check_mixture(x0)

    def prepare(self, problem: Any) -> StreamedEM:
        if problem.per_pass not in (0, self.per_pass):
            raise ArgumentError(f"StreamedEM: per_pass must be that of the problem, {problem.per_pass}, got {self.per_pass}; make the problem with "
                                "Likelihood.streamed(stream, ...), or use EM for data in memory")
        return self

    def _sums(self, problem: Any, m: Mixture) -> Statistics:
        return statistics(problem, m, curvature=self.gate == "newton" and m.active > 1)

    def init(self, problem: Any, x0: Mixture, *, key: Array) -> StreamedState:
        shapes = jax.eval_shape(lambda m: self._sums(problem, m), x0)
        empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        zero = jnp.zeros((), jnp.int32)
        nothing = empty._replace(log_likelihood=jnp.full_like(empty.log_likelihood, -jnp.inf), count=jnp.ones_like(empty.count))
        return StreamedState(x0, nothing, x0, empty, zero, zero, jnp.full_like(empty.log_likelihood, jnp.inf), zero, zero)

    def step(self, problem: Any, state: StreamedState, *, key: Array) -> StreamedState:
        partial = jax.tree.map(jnp.add, state.partial, self._sums(problem, state.candidate))
        state = state._replace(partial=tree.strong(partial), batches=state.batches + 1)
        return jax.lax.cond(state.batches == self.per_pass, lambda s: self._close(problem, s), lambda s: s, state)

    def _close(self, problem: Any, s: StreamedState) -> StreamedState:
        """The end of a pass: accept or refuse the candidate, and make the next one."""
        before, after = s.sums.log_likelihood, s.partial.log_likelihood
        good = acceptable(after, before, s.partial.weight, s.mixture.dtype)
        mixture, sums = tree.select(good, (s.candidate, s.partial), (s.mixture, s.sums))
        last = s.fraction == len(FRACTIONS) - 1
        fraction = jnp.where(good | last, jnp.zeros_like(s.fraction), s.fraction + 1)
        gain = jnp.where(good, (after - before) / sums.weight.astype(before.dtype), jnp.where(last, jnp.zeros_like(s.gain), s.gain))
        move = m_step(problem, mixture, sums, self.gate, self.ridge, self.variance_floor)
        candidate = moved(mixture, move, jnp.asarray(np.asarray(FRACTIONS), mixture.dtype)[fraction])
        empty = jax.tree.map(jnp.zeros_like, s.partial)
        rejected = s.rejected + (~good).astype(s.rejected.dtype)
        return tree.strong(StreamedState(mixture, sums, candidate, empty, jnp.zeros_like(s.batches), fraction, gain, rejected, move.starved))

    def value(self, problem: Any, state: StreamedState) -> Mixture:
        return state.mixture

    def measure(self, problem: Any, state: StreamedState) -> dict[str, Array]:
        return {"log_likelihood": state.sums.log_likelihood}

    def metrics(self, problem: Any, state: StreamedState) -> dict[str, Array]:
        row = quality(problem, state.mixture, state.sums)
        seen = jnp.isfinite(state.sums.log_likelihood)
        row["score_norm"] = jnp.where(seen, row["score_norm"], jnp.inf)
        return {"gain": state.gain, "rejected": state.rejected, "starved": state.starved, **row}
