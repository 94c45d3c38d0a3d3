"""EM for mixtures of any experts under any gate, monotone in the observed likelihood with recomputed routing."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import tree
from theorylab.core.module import number
from theorylab.core.problem import Method
from theorylab.moe.em import FRACTIONS, acceptable
from theorylab.moe.general.experts import FLOOR
from theorylab.moe.general.mixture import GeneralMixture, log_likelihood, responsibilities
from theorylab.moe.general.scoring import RIDGE, location, scoring

Array = jax.Array


class GeneralEMState(NamedTuple):
    """The iterate, its log-likelihood, what the last step gained per unit of weight, and the fractions refused so far."""

    mixture: GeneralMixture
    value: Array
    gain: Array
    rejected: Array


class GeneralEM(Method):
    r"""EM with the fit of the experts and a Fisher scoring step of the gate, accepted by the observed log-likelihood.

    A step takes the responsibilities at the iterate, fits the experts to them (`Experts.fitted`), and moves the gate by the fraction 1, 1/2, 1/4,
    1/8 or 0 of the scoring move for $Q = \sum_{ij} r_{ij} \log \pi_{ij}$, the first for which the log-likelihood, with the routing computed anew,
    has not fallen. It is monotone for every gate and all experts (companion derivation). As in `EM`, rows of a hard top-K gate seldom change
    sides: the start must have the routing right, and `GeneralLikelihood.start` looks for it.

    A step holds the derivatives of the gate, one number for each row, expert and gate coordinate.

    Args:
        ridge: damping of the scoring move, relative to the diagonal of the information.
        variance_floor: variances are at least this multiple of the variance of y.

    Metrics:
        `log_likelihood` of the data, `gain` in it per unit of weight at the last step, `rejected` fractions so far.

    Example:
        >>> from theorylab.moe import general
        >>> gate = general.SigmoidGate([0.0, 0.0], [[4.0], [-4.0]])
        >>> truth = general.GeneralMixture(gate, general.PolynomialExperts([[0.0, 1.0], [1.0, -1.0]], [0.1, 0.1], degree=1), active=2)
        >>> x, y = truth.sample(200, key=0, low=-1.0)
        >>> fit = tl.iterate(general.GeneralLikelihood(x, y, truth), general.GeneralEM(), truth, steps=10)
        >>> bool(np.all(np.diff(fit.history["log_likelihood"]) > -1e-9))
        True
    """

    ridge: Any = number(RIDGE, low=0.0)
    variance_floor: Any = number(FLOOR, low=0.0)

    def check(self, problem: Any, x0: Any) -> None:
        problem.check_mixture(x0)

    def init(self, problem: Any, x0: GeneralMixture, *, key: Array) -> GeneralEMState:
        value = problem.log_likelihood(x0)
        return GeneralEMState(x0, value, jnp.full_like(value, jnp.inf), jnp.zeros((), jnp.int32))

    def step(self, problem: Any, state: GeneralEMState, *, key: Array) -> GeneralEMState:
        data = problem.x, problem.y, problem.weight
        share, before = posterior(state.mixture, *data)
        new, value, refused = advance(state.mixture, *data, share, before, self.ridge, self.variance_floor)
        gain = (value - state.value) / jnp.sum(problem.weight).astype(value.dtype)
        return GeneralEMState(new, value, gain, state.rejected + refused)

    def value(self, problem: Any, state: GeneralEMState) -> GeneralMixture:
        return state.mixture

    def measure(self, problem: Any, state: GeneralEMState) -> dict[str, Array]:
        return {"log_likelihood": state.value}

    def metrics(self, problem: Any, state: GeneralEMState) -> dict[str, Array]:
        return {"gain": state.gain, "rejected": state.rejected}


def posterior(m: GeneralMixture, x: Array, y: Array, weight: Array) -> tuple[Array, Array]:
    """Responsibilities times weights, shape `(n, k)`, and the log-likelihood."""
    share, values = responsibilities(m, x, y)
    return weight[:, None] * share, jnp.sum(weight * values, dtype=jnp.result_type(float))


def advance(m: GeneralMixture, x: Array, y: Array, weight: Array, share: Array, before: Array, ridge: Any,
            floor: Any) -> tuple[GeneralMixture, Array, Array]:
    """The mixture after an M-step for `share`, its log-likelihood, not below `before`, and how many fractions of the gate's move were refused."""
    experts = m.experts.fitted(x, y, share, floor)
    center, scale = location(x, weight)
    move = scoring(lambda change: m.gate.moved(change, center, scale).log_weights(x, m.active), m.gate.coordinates, share, ridge)
    fractions, total = jnp.asarray(np.asarray(FRACTIONS), m.dtype), jnp.sum(weight)

    def attempt(loop: tuple) -> tuple:
        i, *_ = loop
        new = tree.strong(GeneralMixture(m.gate.moved(fractions[i] * move, center, scale), experts, m.active))
        value = log_likelihood(new, x, y, weight)
        return i + 1, new, value, acceptable(value, before, total, m.dtype)

    start = (jnp.zeros((), jnp.int32), tree.strong(m), before, jnp.asarray(False))
    tries, new, value, good = jax.lax.while_loop(lambda loop: ~loop[3] & (loop[0] < len(FRACTIONS)), attempt, start)
    mixture, value = tree.select(good, (new, value), (tree.strong(m), before))
    return mixture, value, tries - good.astype(tries.dtype)
