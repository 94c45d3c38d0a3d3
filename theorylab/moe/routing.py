r"""The search for the routing: which inputs go to which experts is fixed by no step of EM, and the likelihood jumps with it.

A step of EM cannot take an expert from an input it serves, so EM stays in the partition of its start. The search anneals a model with soft
selection, then moves the gate along coordinates and random directions, always judged by the observed log-likelihood (companion derivation).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks, tree
from theorylab.core.keys import Key, as_key
from theorylab.core.module import choice, count, number, size
from theorylab.core.problem import Method, Problem
from theorylab.core.psd import product
from theorylab.core.stop import Below
from theorylab.errors import ArgumentError
from theorylab.moe import density
from theorylab.moe.annealing import SMALLEST_VARIANCE, annealed, standard, with_gate
from theorylab.moe.em import EM, m_step, moved, quality
from theorylab.moe.model import Mixture
from theorylab.moe.moments import of_rows, over_chunks, standardized, statistics, to_inputs
from theorylab.moe.problem import Likelihood

Array = jax.Array
STEPS = (0.0, *(sign * size * power for power in (1e-3, 1e-2, 1e-1, 1.0) for size in (1.0, 3.0) for sign in (1.0, -1.0)))
SETTLED = 1e-4  # nats that no start gains any more in a round when the pattern search has ended
EM_STEPS, FINISH = 5, 20  # EM steps after a round, and in each step once the search has ended


class Routing(Problem):
    """Maximum likelihood over partitions and parameters: the `Likelihood` with starts that know nothing of the truth.

    `iterate(Routing(likelihood), RoutingSearch(), steps=25, runs=8)` searches from eight such starts, and `best_run` picks the best.

    Args:
        likelihood: the problem whose observed log-likelihood is maximised; its rows are in memory.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S0")
        >>> routing = moe.Routing(moe.Likelihood(*truth.sample(300, key=0), experts=2, active=1, selection="logit"))
        >>> sorted(routing.metrics(truth))
        ['log_likelihood']
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
    share = 0.9 * nearest + 0.1 / k
    raw = to_inputs(gate, problem.center, problem.scale)
    middle = problem.weight @ problem.y / jnp.sum(problem.weight)
    flat = Mixture.from_matrices(raw, jnp.zeros_like(raw).at[:, 0].set(middle), jnp.broadcast_to(problem.spread, (k,)), problem.active,
                                 problem.selection)
    sums = over_chunks(lambda x, y, w, s: of_rows(flat, x, y, w, None, problem.center, problem.scale, False, s), problem, share)
    return moved(flat, m_step(problem, flat, sums, "bohning", 0.0, SMALLEST_VARIANCE), jnp.zeros((), flat.dtype))


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
    gate = standard(problem, m.gate_matrix)
    spread = gate - jnp.mean(gate, axis=0)
    noise = jnp.sqrt(jnp.mean(spread**2)) / 2 * jax.random.normal(key, gate.shape, gate.dtype)
    return with_gate(problem, m, gate + jnp.where(still, 0, noise))


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
    $\tau$; then, with hard selection, through EM again. Each step is one round of pattern search: along each coordinate of the gate and as many
    random directions, in random order, 17 step lengths from -3 to 3 are tried at once, in standardized inputs and with the routing computed
    anew, and the best is taken; EM steps end the round. When no start gains 1e-4 nats in a round, further steps are EM steps. The log-likelihood
    never falls. (Companion derivation; one start finds a maximizer most of the time, the best of four or more almost always.)

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
        lanes, dense = jnp.arange(self.starts, dtype=jnp.int32), problem.active == problem.experts

        def begin(i: Array) -> Mixture:
            k = jax.random.fold_in(key, i)
            shaken = _shaken(problem, x0, k, i == 0)
            return tree.select(i % 2 == 1, _scattered(problem, k), shaken) if self.starts > 1 else shaken

        def phase(best: tuple[Mixture, Array], anneal: Array) -> tuple[tuple[Mixture, Array], None]:
            soften = jax.vmap(lambda m: annealed(problem, m, self.temperatures, self.descents))
            found = jax.vmap(lambda m: _refined(problem, m, self.refinements))(jax.lax.cond(anneal, soften, lambda m: m, best[0]))
            values = jax.vmap(problem.log_likelihood)(found)
            # Annealing may lose what EM had from the given start; the other starts are there to be different.
            kept = anneal & (lanes == 0) & (best[1] >= values)
            return (jax.vmap(tree.select)(kept, best[0], found), jnp.where(kept, best[1], values)), None

        none = jnp.full((self.starts,), -jnp.inf, jnp.result_type(float))
        phases = jnp.arange(1 if dense or not self.anneal else 2) == 1
        (mixtures, values), _ = jax.lax.scan(phase, tree.strong((jax.vmap(begin)(lanes), none)), phases)
        return SearchState(mixtures, values, jnp.full((), jnp.inf, values.dtype), jnp.asarray(dense), jnp.zeros((), jnp.int32))

    def step(self, problem: Any, state: SearchState, *, key: Array) -> SearchState:
        problem = _likelihood(problem)
        keys = jax.random.split(key, self.starts)
        search = jax.vmap(lambda m, k: _patterns(problem, m, k, self.random))
        dense = problem.active == problem.experts
        tried = state.mixtures if dense else jax.lax.cond(state.settled, lambda m: m, lambda m: search(m, keys), state.mixtures)
        steps = jnp.where(state.settled, FINISH, EM_STEPS)
        new = jax.vmap(lambda m: _refined(problem, m, steps))(tried)
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
    gate = standard(problem, m.gate_matrix)
    k, p = gate.shape
    steps, wide = jnp.asarray(STEPS, gate.dtype), jnp.result_type(float)
    shape_key, row_key, order_key = jax.random.split(key, 3)
    directions = jnp.eye(k * p, dtype=gate.dtype).reshape(-1, k, p)
    if random:
        noise = jax.random.normal(shape_key, (k * p, k, p), gate.dtype)
        row = jax.random.randint(row_key, (k * p,), 0, 2 * k)  # below k: that row only
        alone = (row[:, None] == jnp.arange(k)) | (row[:, None] >= k)
        directions = jax.random.permutation(order_key, jnp.concatenate([directions, noise * alone[:, :, None].astype(gate.dtype)]))

    # Along a direction logits and scores are linear in the step, and the experts' densities do not change: all are made once.
    z = standardized(problem.x, problem.center, problem.scale)
    joint = density.log_normal(m, problem.y - density.expert_means(m, problem.x))
    shift = lambda gate: to_inputs(gate, problem.center, problem.scale)[:, :1] if m.selection == "slope" else 0  # noqa: E731

    def along(gate: Array, direction: Array) -> tuple[Array, None]:
        lines = jnp.concatenate([product(gate, z), product(direction, z), joint])

        def value(t: Array) -> Array:
            def of_rows(x: Array, y: Array, w: Array, rows: Array) -> Array:
                logits = rows[:k] + t * rows[k:2 * k]
                mask = density.top(logits - shift(gate + t * direction), m.active)
                return jnp.sum(w * (density.log_sum(logits + rows[2 * k:], mask) - density.log_sum(logits, mask)), dtype=wide)

            return over_chunks(of_rows, problem, lines)

        values = jax.vmap(value)(steps)
        return gate + steps[jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))] * direction, None

    return tree.strong(with_gate(problem, m, jax.lax.scan(along, gate, directions)[0]))
