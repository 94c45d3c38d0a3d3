"""Where fits begin: regions around rows drawn as centers, and a soft selection of experts that is cooled down to the hard one."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks, tree
from theorylab.core.keys import Key, as_key, stream
from theorylab.core.module import size
from theorylab.errors import ArgumentError
from theorylab.moe import density
from theorylab.moe.general.em import advance, posterior
from theorylab.moe.general.experts import FLOOR, Experts
from theorylab.moe.general.gates import Gate, GateAround
from theorylab.moe.general.likelihood import GeneralLikelihood
from theorylab.moe.general.mixture import GeneralMixture
from theorylab.moe.general.noise import NoisyGate
from theorylab.moe.general.scoring import RIDGE, best, location
from theorylab.moe.routing import STEPS

Array = jax.Array
TEMPERATURES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
COOLING, FINISH = 8, 20                             # steps of EM at each temperature, and at the end
ROUNDS, SETTLE = 4, 3                               # of pattern search, and steps of EM from one to the next
FIRST, GATE_RIDGE = 5, 1e-4                         # fits of the experts and of the gate to the first regions; these may be separable
OWN = 0.9                                           # share of a region's expert in its rows


class Softened(GateAround):
    """A gate that keeps each expert by degrees: by the sigmoid of its score above the threshold of the top K, over a temperature; 0 is hard."""

    temperature: Array
    among: int = size()

    def log_weights(self, x: Array, active: int) -> Array:
        if self.among == self.experts:
            return self.gate.log_weights(x, self.among)
        scores, kept = self.gate.scores(x), self.gate.kept(x, self.among)
        lowest = jnp.min(jnp.where(kept, scores, jnp.inf), axis=1, keepdims=True)
        highest = jnp.max(jnp.where(kept, -jnp.inf, scores), axis=1, keepdims=True)
        hard = self.temperature == 0
        degree = jax.nn.log_sigmoid((scores - (lowest + highest) / 2) / jnp.where(hard, 1, self.temperature))
        soft = jax.nn.log_softmax(self.gate.logits(x) + degree, axis=1)
        return jnp.where(hard, self.gate.log_weights(x, self.among), soft)


def general_start(likelihood: GeneralLikelihood, *, key: Key | int, starts: int = 8) -> GeneralMixture:
    r"""The best, by the likelihood, of several short fits that know nothing, made in one batch.

    Each draws k rows as centers; a row belongs to the nearest by 0.9 and to all others equally, by the distance of inputs in every other start, of
    inputs and responses in the rest. Experts and gate are fitted to that. Where the gate leaves experts out, EM then goes through soft selections,
    with $\log \mathrm{sigmoid}((s_j - t) / \tau)$ added to the logits (t between the K-th and the next score) and $\tau$ descending from 1 to 0.01,
    and through rounds of pattern search, as in `RoutingSearch`; EM with the hard selection ends the fit (companion derivation). A noisy gate
    starts from the fit of its plain gate.

    Args:
        likelihood: the problem.
        key: seed or JAX key.
        starts: how many.

    Raises:
        ArgumentError: not a `GeneralLikelihood`, or `starts` below 1.

    Example:
        >>> from theorylab.moe import general
        >>> gate = general.SoftmaxGate([0.0, 0.0], [[8.0], [0.0]])
        >>> truth = general.GeneralMixture(gate, general.PolynomialExperts([[1.0, 0.0], [0.0, 1.0]], [0.1, 0.1], degree=1), active=2)
        >>> x, y = truth.sample(200, key=0, low=-1.0)
        >>> general.general_start(general.GeneralLikelihood(x, y, truth), key=1)
        GeneralMixture(SoftmaxGate, PolynomialExperts, experts=2, active=2, dim=1, float64)
    """
    if not isinstance(likelihood, GeneralLikelihood):
        raise ArgumentError(f"likelihood must be a GeneralLikelihood, got {type(likelihood).__name__}")
    keys = jax.random.split(as_key(key), checks.whole("starts", starts, low=1))
    fits, values = _fits(likelihood, keys)
    return jax.tree.map(lambda leaf: leaf[jnp.nanargmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))], fits)


class Stage(NamedTuple):
    """What one step of a start does; as arrays, the schedule of all its steps."""

    temperature: Any
    ridge: Any
    regions: Any
    search: Any


def _schedule(soft: bool) -> Stage:
    """Fits to the regions with all experts kept, cooling, pattern search, EM with the hard selection."""
    parts = [Stage(np.inf, GATE_RIDGE, 1.0, 0.0)] * FIRST
    if soft:
        parts += [Stage(t, RIDGE, 0.0, 0.0) for t in np.repeat(TEMPERATURES, COOLING)]
        parts += [Stage(0.0, RIDGE, 0.0, float(i % SETTLE == 0)) for i in range(SETTLE, SETTLE * (ROUNDS + 1))]
    return Stage(*np.array(parts + [Stage(0.0, RIDGE, 0.0, 0.0)] * FINISH).T)


@jax.jit
def _fits(likelihood: GeneralLikelihood, keys: Key) -> tuple[GeneralMixture, Array]:
    return jax.vmap(lambda key, number: _one(likelihood, key, number))(keys, jnp.arange(len(keys), dtype=jnp.int32))


def _one(likelihood: GeneralLikelihood, key: Key, number: Array) -> tuple[GeneralMixture, Array]:
    model, x, y, weight = likelihood.model, likelihood.x, likelihood.y, likelihood.weight
    regions = weight[:, None] * _regions(likelihood, key, (number % 2).astype(x.dtype))
    noisy = model.gate if isinstance(model.gate, NoisyGate) else None
    plain = model.gate if noisy is None else noisy.gate
    begin = (plain.fresh(stream(key, "gate")), model.experts.fresh(x, y, weight, key=stream(key, "experts")))
    soft = model.active < plain.experts
    schedule = jax.tree.map(lambda column: jnp.asarray(column, x.dtype), _schedule(soft))
    keys = jax.random.split(stream(key, "directions"), len(schedule.ridge))

    def step(pair: tuple, item: tuple) -> tuple:
        (gate, experts), (stage, key) = pair, item
        if soft:
            look = lambda gate: _patterns(gate, experts, likelihood, key)  # noqa: E731
            gate = jax.lax.cond(stage.search > 0, look, lambda gate: gate, gate)
        mixture = GeneralMixture(Softened(gate, stage.temperature, model.active), experts, plain.experts)
        share, before = posterior(mixture, x, y, weight)
        share = jnp.where(stage.regions > 0, regions, share)
        new, value, _ = advance(mixture, x, y, weight, share, before, stage.ridge, FLOOR)
        assert isinstance(new.gate, Softened)
        return (new.gate.gate, new.experts), value

    (gate, experts), values = jax.lax.scan(step, tree.strong(begin), (schedule, keys))
    return GeneralMixture(gate if noisy is None else noisy.replace(gate=gate), experts, model.active), values[-1]


def _patterns(gate: Gate, experts: Experts, likelihood: GeneralLikelihood, key: Key) -> Gate:
    """One round of pattern search: the best of 17 steps along each coordinate and as many random directions, with the routing computed anew."""
    x, weight, size = likelihood.x, likelihood.weight, gate.coordinates
    values = experts.log_density(x, likelihood.y).T
    center, scale = location(x, weight)
    steps = jnp.asarray(np.asarray(STEPS), x.dtype)
    noise_key, order_key = jax.random.split(key)
    directions = jnp.concatenate([jnp.eye(size, dtype=x.dtype), jax.random.normal(noise_key, (size, size), x.dtype)])

    def value(gate: Gate) -> Array:
        chances = gate.log_weights(x, likelihood.model.active).T
        mask = chances > -jnp.inf
        return jnp.sum(weight * density.log_sum(jnp.where(mask, chances, 0) + values, mask))

    def along(gate: Gate, direction: Array) -> tuple[Gate, None]:
        objective = lambda change: value(gate.moved(change, center, scale))  # noqa: E731
        return tree.strong(gate.moved(best(objective, steps[:, None] * direction), center, scale)), None

    return jax.lax.scan(along, gate, jax.random.permutation(order_key, directions))[0]


def _regions(likelihood: GeneralLikelihood, key: Key, joint: Array) -> Array:
    """Shares of k regions around drawn rows, shape `(n, k)`; responses count in the distance if `joint` is 1."""
    x, weight, k = likelihood.x, likelihood.weight, likelihood.model.gate.experts
    features = likelihood.model.experts.features(likelihood.y)
    columns = []
    for values, unit in ((x, jnp.ones_like(joint)), (features, joint)):
        center, scale = location(values, weight)
        columns.append(unit * (values - center) / scale)
    points = jnp.concatenate(columns, axis=1)
    rows = jax.lax.top_k(jnp.log(weight) + jax.random.gumbel(stream(key, "centers"), weight.shape, weight.dtype), k)[1]
    distance = jnp.sum((points[:, None, :] - points[rows]) ** 2, axis=2)
    return OWN * jax.nn.one_hot(jnp.argmin(distance, axis=1), k, dtype=x.dtype) + (1 - OWN) / k
