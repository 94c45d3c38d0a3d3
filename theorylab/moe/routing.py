r"""The search for the routing: which inputs go to which experts is fixed by no step of EM, and the likelihood jumps with it.

A step of EM cannot take an expert from an input it serves, so EM stays in the partition of its start. The search anneals a model with soft
selection, then moves the gate along coordinates and random directions, always judged by the observed log-likelihood (companion derivation).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks, tree
from theorylab.core.keys import Key, as_key, stream
from theorylab.core.module import choice, count, number, size
from theorylab.core.problem import Method, Problem
from theorylab.core.psd import product
from theorylab.core.stop import Below
from theorylab.errors import ArgumentError
from theorylab.moe import density
from theorylab.moe.em import EM, quality
from theorylab.moe.lbfgs import lbfgs
from theorylab.moe.model import Mixture
from theorylab.moe.moments import over_chunks, standardized, statistics, to_inputs
from theorylab.moe.problem import Likelihood

Array = jax.Array
STEPS = (0.0, *(sign * size * power for power in (1e-3, 1e-2, 1e-1, 1.0) for size in (1.0, 3.0) for sign in (1.0, -1.0)))
SETTLED = 1e-4  # nats that no start gains any more in a round when the pattern search has ended
EM_STEPS, FINISH = 5, 20  # EM steps after a round, and in each step once the search has ended
GATE_PENALTY, SMALLEST_VARIANCE = 1e-6, 1e-4  # of the soft model: keep its gate bounded, its variances above this multiple of that of y


class Routing(Problem):
    """Maximum likelihood over partitions and parameters: the `Likelihood` with starts that know nothing of the truth.

    Args:
        likelihood: the problem whose observed log-likelihood is maximised; its rows are in memory.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S0")
        >>> routing = moe.Routing(moe.Likelihood(*truth.sample(300, key=0), experts=2, active=1, selection="logit"))
        >>> found = tl.iterate(routing, moe.RoutingSearch(), steps=25, stop=routing.goal(1e-6), runs=4)
        >>> fit = moe.best_run(found)
        >>> bool(routing.metrics(fit)["log_likelihood"] > routing.metrics(truth)["log_likelihood"])
        True
    """

    likelihood: Likelihood

    def __check_init__(self) -> None:
        if not isinstance(self.likelihood, Likelihood):
            raise ArgumentError(f"likelihood must be a Likelihood, got {type(self.likelihood).__name__}")

    def start(self, key: Key) -> Mixture:
        """Experts around rows drawn as centers, and a gate that prefers the nearest center."""
        return scattered(self.likelihood, key=key)

    def metrics(self, x: Mixture) -> dict[str, Array]:
        return self.likelihood.metrics(x)

    def default_method(self) -> Method:
        return RoutingSearch()

    def goal(self, tolerance: float) -> Any:
        """Stop when a round of the search gains less than `tolerance` per row."""
        return Below("gain", tolerance)


def scattered(likelihood: Likelihood, *, key: Key | int) -> Mixture:
    r"""A start that knows nothing: k rows as centers $c_j$, the gate of their Voronoi cells, experts fitted to softly assigned rows.

    In standardized inputs $\beta_{1j} = 2 c_j$, $\beta_{0j} = -\|c_j\|^2$; a row belongs to its nearest center by 0.9 and to all others equally.

    Args:
        likelihood: the problem.
        key: seed or random key.

    Raises:
        ArgumentError: `likelihood` is none.

    Example:
        >>> from theorylab import moe
        >>> likelihood = moe.Likelihood(*moe.example("S1").sample(300, key=0, low=-1.0), experts=3, active=2)
        >>> moe.scattered(likelihood, key=1).experts
        3
    """
    return _scattered(_likelihood(likelihood), as_key(key))


@jax.jit
def _scattered(problem: Likelihood, key: Array) -> Mixture:
    k, z = problem.experts, standardized(problem.x, problem.center, problem.scale)
    rows = jax.random.choice(key, len(problem.y), (k,), replace=False, p=problem.weight / jnp.sum(problem.weight))
    centers = z[1:, rows].T
    gate = jnp.concatenate([-jnp.sum(centers**2, axis=1, keepdims=True), 2 * centers], axis=1)
    nearest = jax.nn.one_hot(jnp.argmax(product(gate, z), axis=0), k, dtype=z.dtype).T
    r = problem.weight * (0.9 * nearest + 0.1 / k)
    gram = jnp.einsum("kn,in,jn->kij", r, z, z)
    ridge = 1e-9 * jnp.trace(gram, axis1=1, axis2=2)[:, None, None] * jnp.eye(len(z), dtype=z.dtype)
    experts = jnp.linalg.solve(gram + ridge, jnp.einsum("kn,in,n->ki", r, z, problem.y)[:, :, None])[:, :, 0]
    variance = jnp.sum(r * (problem.y - product(experts, z)) ** 2, axis=1) / jnp.sum(r, axis=1)
    variance = jnp.maximum(variance, (SMALLEST_VARIANCE * problem.spread).astype(z.dtype))
    raw = partial(to_inputs, center=problem.center, scale=problem.scale)
    return Mixture.from_matrices(raw(gate), raw(experts), variance, problem.active, problem.selection)


def perturbed(likelihood: Likelihood, mixture: Mixture, runs: int, *, key: Key | int) -> Mixture:
    r"""A batch of starts: `mixture` and copies whose gate has normal noise of half its root mean square, in standardized inputs.

    Args:
        likelihood: the problem.
        mixture: the informed start.
        runs: length of the batch, for `iterate(..., runs=runs)`.
        key: seed or random key.

    Raises:
        ArgumentError, ShapeError: `mixture` does not belong to the problem, or `runs` is below 1.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S1")
        >>> likelihood = moe.Likelihood(*truth.sample(300, key=0, low=-1.0), experts=3, active=2)
        >>> moe.perturbed(likelihood, truth, 4, key=1).gate_coef.shape
        (4, 3, 1)
    """
    problem = _likelihood(likelihood)
    problem.check_mixture(mixture, "mixture")
    keys = jax.random.split(as_key(key), checks.whole("runs", runs, low=1))
    return jax.vmap(lambda k, first: _shaken(problem, mixture, k, first))(keys, jnp.arange(runs) == 0)


def _shaken(problem: Likelihood, m: Mixture, key: Array, still: Array) -> Mixture:
    gate = _standard(problem, m.gate_matrix)
    spread = gate - jnp.mean(gate, axis=0)
    noise = jnp.sqrt(jnp.mean(spread**2)) / 2 * jax.random.normal(key, gate.shape, gate.dtype)
    return _with_gate(problem, m, gate + jnp.where(still, 0, noise))


def _standard(problem: Likelihood, matrix: Array) -> Array:
    """The coefficients on z of those on (1, x): the inverse of `to_inputs`."""
    return jnp.concatenate([matrix[:, :1] + product(matrix[:, 1:], problem.center)[:, None], matrix[:, 1:] * problem.scale], axis=1)


def _with_gate(problem: Likelihood, m: Mixture, gate: Array) -> Mixture:
    raw = to_inputs(gate, problem.center, problem.scale)
    return m.replace(gate_intercept=raw[:, 0], gate_coef=raw[:, 1:])


def _likelihood(problem: Any) -> Likelihood:
    found = problem.likelihood if isinstance(problem, Routing) else problem
    if not isinstance(found, Likelihood):
        raise ArgumentError(f"the problem must be a Likelihood or a Routing, got {type(found).__name__}")
    return found


def best_run(solution: Any) -> Mixture:
    """The mixture with the largest final log-likelihood among the runs of a solution.

    Raises:
        ArgumentError: the solution has no column `log_likelihood`, or no run with a finite one.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S1")
        >>> likelihood = moe.Likelihood(*truth.sample(300, key=0, low=-1.0), experts=3, active=2)
        >>> starts = moe.perturbed(likelihood, truth, 2, key=1)
        >>> moe.best_run(tl.iterate(likelihood, moe.EM(), starts, steps=5, runs=2)).experts
        3
    """
    if "log_likelihood" not in solution.history.columns:
        raise ArgumentError("solution must come from a run on a Likelihood or a Routing: it has no column log_likelihood")
    last = np.asarray(solution.history.last("log_likelihood"))
    if not np.isfinite(last).any():
        raise ArgumentError("solution has no run that ended with a finite log-likelihood")
    at = int(np.nanargmax(np.where(np.isfinite(last), last, np.nan))) if last.ndim else None
    return solution.value if at is None else jax.tree.map(lambda leaf: leaf[at], solution.value)


class SearchState(NamedTuple):
    """The starts side by side, their log-likelihoods, what the last step gained per row, and whether all have settled."""

    mixtures: Mixture
    values: Array
    gain: Array
    settled: Array
    rounds: Array


class RoutingSearch(Method):
    r"""Anneal a soft selection, then search the gate by patterns; from one or several starts at once, the best being the iterate.

    Before its first step it takes each start through EM; then through the soft model, in which expert j of row i has the logit
    $u_{ij} + \log \mathrm{sigmoid}((s_{ij} - t_i)/\tau)$ with $t_i$ between the K-th and the next score, maximised by L-BFGS for each temperature
    $\tau$; then, with hard selection, through EM again. Each step is one round of pattern search: along each coordinate of the gate and as many random
    directions, in random order, 17 step lengths from -3 to 3 are tried at once, with the routing computed anew, and the best is taken;
    EM steps end the round. When no start gains 1e-4 nats in a round, further steps are EM steps. The log-likelihood
    never falls. (Companion derivation.)

    The first of several starts is x0; then x0 with gate noise and starts drawn by `scattered` alternate. Or give `runs` to `iterate`.

    Args:
        starts: starts within one run.
        anneal: whether the soft model is used.
        random: whether random directions are searched besides coordinates.
        temperatures: $\tau$, descending, in units of the scores.
        descents: most L-BFGS steps at each temperature.
        refinements: most EM steps at each of the two places.

    Metrics:
        `log_likelihood` of the data, `gain` per unit of weight in the last step (the largest over starts), `score_norm`, `gate_diverging`,
        `rounds` of pattern search so far.

    Raises:
        ArgumentError: a problem with streamed rows, or temperatures that are not positive.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S0")
        >>> likelihood = moe.Likelihood(*truth.sample(300, key=0), experts=2, active=1, selection="logit")
        >>> wrong = truth.replace(gate_intercept=truth.gate_intercept + jnp.array([3.0, 0.0]))
        >>> found = tl.iterate(likelihood, moe.RoutingSearch(), wrong, steps=25, stop=tl.Below("gain", 1e-8))
        >>> bool(likelihood.log_likelihood(found.value) > likelihood.log_likelihood(truth))
        True
    """

    starts: int = size(1)
    anneal: bool = choice(True, among=(True, False))
    random: bool = choice(True, among=(True, False))
    temperatures: Any = number((1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01), above=0.0)
    descents: Any = count(60, low=1)
    refinements: Any = count(50, low=1)

    def check(self, problem: Any, x0: Any) -> None:
        _likelihood(problem).check_mixture(x0)

    def prepare(self, problem: Any) -> RoutingSearch:
        if _likelihood(problem).per_pass is not None:
            raise ArgumentError("RoutingSearch needs all rows in every step: give it a Likelihood whose rows are in memory")
        return self

    def init(self, problem: Any, x0: Mixture, *, key: Array) -> SearchState:
        problem = _likelihood(problem)
        lanes, hard = jnp.arange(self.starts, dtype=jnp.int32), problem.active == problem.experts

        def begin(i: Array) -> Mixture:
            k = jax.random.fold_in(key, i)
            shaken = _shaken(problem, x0, k, i == 0)
            return tree.select(i % 2 == 1, _scattered(problem, k), shaken) if self.starts > 1 else shaken

        def phase(best: tuple[Mixture, Array], anneal: Array) -> tuple[tuple[Mixture, Array], None]:
            soften = jax.vmap(lambda m: _annealed(problem, m, self.temperatures, self.descents))
            found = jax.vmap(lambda m: _refined(problem, m, self.refinements))(jax.lax.cond(anneal, soften, lambda m: m, best[0]))
            values = jax.vmap(problem.log_likelihood)(found)
            # Annealing may lose what EM had from the given start; the other starts are there to be different.
            kept = anneal & (lanes == 0) & (best[1] >= values)
            return (jax.vmap(tree.select)(kept, best[0], found), jnp.where(kept, best[1], values)), None

        none = jnp.full((self.starts,), -jnp.inf, jnp.result_type(float))
        phases = jnp.arange(1 if hard or not self.anneal else 2) == 1
        (mixtures, values), _ = jax.lax.scan(phase, tree.strong((jax.vmap(begin)(lanes), none)), phases)
        return SearchState(mixtures, values, jnp.full((), jnp.inf, values.dtype), jnp.asarray(hard), jnp.zeros((), jnp.int32))

    def step(self, problem: Any, state: SearchState, *, key: Array) -> SearchState:
        problem = _likelihood(problem)
        keys = jax.random.split(key, self.starts)
        search = jax.vmap(lambda m, k: _patterns(problem, m, k, self.random))
        moved = jax.lax.cond(state.settled, lambda m: m, lambda m: search(m, keys), state.mixtures)
        steps = jnp.where(state.settled, FINISH, EM_STEPS)
        new = jax.vmap(lambda m: _refined(problem, m, steps))(moved)
        values = jax.vmap(problem.log_likelihood)(new)
        better = values > state.values
        gain = jnp.max(jnp.where(better, values - state.values, 0))
        weight = jnp.sum(problem.weight).astype(values.dtype)
        return SearchState(jax.vmap(tree.select)(better, new, state.mixtures), jnp.where(better, values, state.values), gain / weight,
                           state.settled | (gain < SETTLED), state.rounds + (~state.settled).astype(jnp.int32))

    def value(self, problem: Any, state: SearchState) -> Mixture:
        best = jnp.argmax(state.values)
        return jax.tree.map(lambda leaf: leaf[best], state.mixtures)

    def measure(self, problem: Any, state: SearchState) -> dict[str, Array]:
        return {"log_likelihood": jnp.max(state.values)}

    def metrics(self, problem: Any, state: SearchState) -> dict[str, Array]:
        problem, best = _likelihood(problem), self.value(problem, state)
        sums = statistics(problem, best, curvature=False)
        return {"gain": state.gain, "rounds": state.rounds, **quality(problem, best, sums)}


def _refined(problem: Likelihood, m: Mixture, steps: Array) -> Mixture:
    """EM of the observed log-likelihood until it gains no more, or for `steps` steps."""
    method, limit = EM(), jnp.asarray(steps, jnp.int32)
    state = tree.strong(method.init(problem, m, key=jax.random.key(0)))

    def more(loop: tuple) -> Array:
        i, s = loop
        return (i < limit) & (s.gain > 1e-9)

    def one(loop: tuple) -> tuple:
        i, s = loop
        return i + 1, tree.strong(method.step(problem, s, key=jax.random.key(0)))

    return jax.lax.while_loop(more, one, (jnp.zeros((), jnp.int32), state))[1].mixture


def _patterns(problem: Likelihood, m: Mixture, key: Array, random: bool) -> Mixture:
    """One round of pattern search on the gate, in standardized inputs."""
    gate = _standard(problem, m.gate_matrix)
    k, p = gate.shape
    steps = jnp.asarray(STEPS, gate.dtype)
    shape_key, row_key, order_key = jax.random.split(key, 3)
    directions = jnp.eye(k * p, dtype=gate.dtype).reshape(-1, k, p)
    if random:
        noise = jax.random.normal(shape_key, (k * p, k, p), gate.dtype)
        row = jax.random.randint(row_key, (k * p,), 0, 2 * k)  # below k: that row only
        alone = (row[:, None] == jnp.arange(k)) | (row[:, None] >= k)
        directions = jax.random.permutation(order_key, jnp.concatenate([directions, noise * alone[:, :, None].astype(gate.dtype)]))

    def along(gate: Array, direction: Array) -> tuple[Array, None]:
        values = jax.vmap(lambda t: problem.log_likelihood(_with_gate(problem, m, gate + t * direction)))(steps)
        return gate + steps[jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))] * direction, None

    return tree.strong(_with_gate(problem, m, jax.lax.scan(along, gate, directions)[0]))


def _annealed(problem: Likelihood, m: Mixture, temperatures: Array, descents: Array) -> Mixture:
    """Maximise the soft models for descending temperatures, each from the last, over gate, experts and log variances."""
    k, p = m.experts, m.dim + 1
    weight = jnp.sum(problem.weight)
    unit = jnp.sqrt(problem.spread).astype(m.dtype)
    floor = jnp.log(SMALLEST_VARIANCE * problem.spread).astype(m.dtype)
    raw = partial(to_inputs, center=problem.center, scale=problem.scale)

    def unpack(flat: Array) -> Mixture:
        gate, experts = flat[: k * p].reshape(k, p), flat[k * p:2 * k * p].reshape(k, p) * unit
        return Mixture.from_matrices(raw(gate), raw(experts), jnp.exp(jnp.maximum(flat[2 * k * p:], floor)), m.active, m.selection)

    def loss(flat: Array, temperature: Array) -> Array:
        soft = unpack(flat)
        total = over_chunks(lambda x, y, w, _: jnp.sum(w * _soft_log_density(soft, x, y, temperature)), problem)
        spread = soft.gate_matrix - jnp.mean(soft.gate_matrix, axis=0)
        return -total / weight + GATE_PENALTY * jnp.sum(spread**2)

    flat = jnp.concatenate([_standard(problem, m.gate_matrix).ravel(), (_standard(problem, m.expert_matrix) / unit).ravel(),
                            jnp.log(m.variance)])
    flat, _ = jax.lax.scan(lambda at, t: (lbfgs(partial(loss, temperature=t), at, descents)[0], None), tree.strong(flat), temperatures.astype(m.dtype))
    return unpack(flat)


def _soft_log_density(m: Mixture, x: Array, y: Array, temperature: Array) -> Array:
    """log density when an expert is kept by degrees: by the sigmoid of its score above the threshold, over the temperature."""
    logits, scores = density.gate_scores(m, x)
    kept = density.top(jax.lax.stop_gradient(scores), m.active)
    lowest = jnp.min(jnp.where(kept, scores, jnp.inf), axis=0)
    highest = jnp.max(jnp.where(kept, -jnp.inf, scores), axis=0)
    soft = logits + jax.nn.log_sigmoid((scores - (lowest + highest) / 2) / temperature)
    joint = soft + density.log_normal(m, y - density.expert_means(m, x))
    return jax.nn.logsumexp(joint, axis=0) - jax.nn.logsumexp(soft, axis=0)
