r"""Stochastic bilevel methods on minibatches: one loop for x, the adjoint v and y together (SOBA, SABA, SRBA, FSLA).

Updates and default numbers are those of the public benchmark benchopt/benchmark_bilevel, in the letters of this family: x inner, y outer,
$F = \nabla_1 E$, $H = F_1$. The methods with inner loops and Neumann series are in `nested`.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core import tree
from theorylab.core.keys import Key, stream
from theorylab.core.module import number, size
from theorylab.core.problem import Method
from theorylab.core.sample import minibatch
from theorylab.errors import ArgumentError
from theorylab.hypergradient.contract import BilevelProblem
from theorylab.hypergradient.estimators import OnePoint, Plain

Array = jax.Array
PyTree = Any


class StochasticState(NamedTuple):
    """The iterates, the step number, the key of the sampler, and what else a method remembers."""

    x: Array
    y: Array
    v: Array
    step: Array
    key: Array
    memory: Any


class Directions(NamedTuple):
    r"""The parts of a step, each a mean over rows: F, $H v$, $F_2^\top v$ over inner rows, $G_1$, $G_2$ over outer rows."""

    F: Array
    Hv: Array
    cross: Array
    outer_x: Array
    outer_y: Array

    @property
    def steps(self) -> tuple[Array, Array, Array]:
        r"""The directions of x, of v (which solves $H v = -G_1$) and of y."""
        return self.F, self.Hv + self.outer_x, self.cross + self.outer_y


class SteppedMethod(Method):
    r"""What the methods share: step sizes $\rho/(t+1)^a$ and metrics. Subclasses define `exponents` and `step`.

    The metrics are those of the whole problem: `objective` G and `residual` at the iterates, and `gradient_norm` of the hypergradient at y,
    at the inner solution where it is known in closed form and else estimated from x by `OnePoint`, and `error`, the distance to a known solution;
    rows of the history cost that much, so space them by `every`.
    """

    step_size: Any = number(0.1, above=0.0)
    outer_ratio: Any = number(1.0, above=0.0)
    exponents: ClassVar[tuple[float, float, float]] = (0.0, 0.0, 0.0)

    def check(self, problem: Any, x0: Any) -> None:
        """Refuse a problem that the method cannot use, or a start of another shape."""
        if not isinstance(problem, BilevelProblem):
            raise ArgumentError(f"problem must be a bilevel problem, got {type(problem).__name__}")
        self.check_parts(problem)
        if x0 is not None:
            problem.pack_y(x0)

    def check_parts(self, problem: Any) -> None:
        """Refuse a problem without what the method needs."""

    def init(self, problem: Any, x0: Any, *, key: Key) -> StochasticState:
        self.check_parts(problem)
        y = problem.pack_y(x0)
        x = problem.start_x(y)
        state = StochasticState(x, y, jnp.zeros_like(x), jnp.zeros((), jnp.int32), key, None)
        return state._replace(memory=self.remember(problem, state))

    def remember(self, problem: Any, state: StochasticState) -> Any:
        """What the method keeps besides the iterates, at the start."""
        return ()

    def rates(self, state: StochasticState) -> tuple[Array, Array, Array]:
        """The step sizes of x, v and y."""
        t = (state.step + 1).astype(state.y.dtype)
        return tuple(self.step_size / r / t**a for a, r in zip(self.exponents, (1.0, 1.0, self.outer_ratio), strict=True))  # type: ignore[return-value]

    def value(self, problem: Any, state: StochasticState) -> Any:
        return problem.unpack_y(state.y)

    def measure(self, problem: Any, state: StochasticState) -> dict[str, Array]:
        x, y = state.x, state.y
        exact = problem.exact(y)
        found = OnePoint().estimate(problem, x, y) if exact is None else Plain().estimate(problem, exact, y)
        return {"objective": problem.outer(x, y), "residual": tree.norm(problem.residual(x, y)), "gradient_norm": tree.norm(found.value),
                **problem.error(y)}


class StochasticMethod(SteppedMethod):
    r"""A method on minibatches. Subclasses define `move` and `exponents`.

    A batch without replacement visits each row once in a pass; passes are shuffled anew.
    """

    batch_size: int = size(64)
    inner_batches: ClassVar[int] = 1                # drawn in one step
    outer_batches: ClassVar[int] = 1

    def check_parts(self, problem: Any) -> None:
        """Refuse a problem without samples, or a batch that is larger than the data."""
        rows = problem.samples
        if self.batch_size > min(rows):
            raise ArgumentError(f"batch_size must be at most the {min(rows)} samples of the {'inner' if rows[0] <= rows[1] else 'outer'} "
                                f"objective, got {self.batch_size}")

    def step(self, problem: Any, state: StochasticState, *, key: Key) -> StochasticState:
        return self.move(problem, state, *self.draw(problem, state))._replace(step=state.step + 1)

    def draw(self, problem: Any, state: StochasticState) -> tuple[Array, Array]:
        """Row numbers of the inner and of the outer batches of this step, each with axes (batch, row)."""

        def rows(name: str, total: int, batches: int) -> Array:
            number = state.step * batches + jnp.arange(batches, dtype=jnp.int32)
            return jax.vmap(lambda k: minibatch(stream(state.key, name), total, self.batch_size, k))(number)

        inner, outer = problem.samples
        return rows("inner rows", inner, self.inner_batches), rows("outer rows", outer, self.outer_batches)

    def move(self, problem: Any, state: StochasticState, inner: Array, outer: Array) -> StochasticState:
        """The state after one iteration on the batches of `draw`, its step number aside."""
        raise NotImplementedError(f"{type(self).__name__} must define move(problem, state, inner, outer)")

    def cost(self, problem: Any) -> dict[str, float]:
        return {"samples": float(self.batch_size * (self.inner_batches + self.outer_batches))}


def directions(problem: Any, x: Array, y: Array, v: Array) -> Directions:
    """All parts of a step at one point, over the rows that `problem` holds."""
    at = problem.at(x, y)
    return Directions(at.residual, at.product(v), at.cross_pullback(v), at.outer_x, at.outer_y)


def _moved(method: StochasticMethod, state: StochasticState, steps: tuple[Array, Array, Array]) -> StochasticState:
    """One step of x, v and y along their directions."""
    eta, eta_v, gamma = method.rates(state)
    return state._replace(x=state.x - eta * steps[0], v=state.v - eta_v * steps[1], y=state.y - gamma * steps[2])


class SOBA(StochasticMethod):
    r"""Stochastic bilevel algorithm (Dagréou, Ablin, Vaiter and Moreau, 2022): SGD on x, v and y at once.

    $x \leftarrow x - \eta F$, $v \leftarrow v - \eta(Hv + G_1)$, $y \leftarrow y - \gamma(F_2^\top v + G_2)$, all at the old point, with step sizes
    falling as $1/\sqrt{t+1}$.

    Args:
        step_size: $\rho$, of x and v in the first step.
        outer_ratio: the step size of y is $\rho$ divided by this.
        batch_size: rows of the inner and of the outer batch.

    Raises:
        ArgumentError: a number outside its range, a problem without samples, or with fewer than `batch_size`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> sol = tl.iterate(hg.simulated(0), SOBA(0.1), jnp.ones(10), steps=1000, every=1000)
        >>> bool(sol.history["gradient_norm"][-1] < 0.3 * sol.history["gradient_norm"][0])
        True
    """

    exponents: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)

    def move(self, problem: Any, state: StochasticState, inner: Array, outer: Array) -> StochasticState:
        batch = problem.inner_batch(inner[0]).outer_batch(outer[0])
        return _moved(self, state, directions(batch, state.x, state.y, state.v).steps)


class _Table(NamedTuple):
    """Directions of every batch when it was last seen, with a leading axis of batches, and their mean."""

    entries: Array
    mean: Array


class SABA(StochasticMethod):
    r"""Stochastic average bilevel algorithm (Dagréou, Ablin, Vaiter and Moreau, 2022): the directions of SOBA, each with a SAGA table.

    The rows are cut into fixed batches, seen in a new order in each pass. A direction is $g_i - g_i^{old} + \bar g$ with the table of the last
    directions of each batch and their mean, five tables in all, zero at the start: (n + m) numbers for each batch. Constant step sizes.

    Args:
        step_size, outer_ratio, batch_size: as in `SOBA`.

    Raises:
        ArgumentError: as in `SOBA`; or `batch_size` does not divide the numbers of samples.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> SABA(0.1, batch_size=32).cost(hg.simulated(0, samples=64))
        {'samples': 64.0}
    """

    def check_parts(self, problem: Any) -> None:
        super().check_parts(problem)
        for name, rows in zip(("inner", "outer"), problem.samples, strict=True):
            if rows % self.batch_size:
                raise ArgumentError(f"batch_size must divide the {rows} samples of the {name} objective, whose batches are fixed, "
                                    f"got {self.batch_size}")

    def remember(self, problem: Any, state: StochasticState) -> tuple[_Table, ...]:
        inner, outer = (rows // self.batch_size for rows in problem.samples)
        shapes = ((inner, state.x), (inner, state.x), (inner, state.y), (outer, state.x), (outer, state.y))
        return tuple(_Table(jnp.zeros((batches, *like.shape), like.dtype), jnp.zeros_like(like)) for batches, like in shapes)

    def draw(self, problem: Any, state: StochasticState) -> tuple[Array, Array]:
        """The numbers of the inner and of the outer batch."""
        inner, outer = (minibatch(stream(state.key, name), rows // self.batch_size, 1, state.step)
                        for name, rows in zip(("inner batches", "outer batches"), problem.samples, strict=True))
        return inner, outer

    def move(self, problem: Any, state: StochasticState, inner: Array, outer: Array) -> StochasticState:
        (i,), (j,), rows = inner, outer, jnp.arange(self.batch_size, dtype=jnp.int32)
        batch = problem.inner_batch(i * self.batch_size + rows).outer_batch(j * self.batch_size + rows)
        fresh, where = directions(batch, state.x, state.y, state.v), (i, i, i, j, j)
        steps, tables = [], []
        for new, at, table in zip(fresh, where, state.memory, strict=True):
            change = new - table.entries[at]
            steps.append(change + table.mean)
            tables.append(_Table(table.entries.at[at].set(new), table.mean + change / len(table.entries)))
        return _moved(self, state, Directions(*steps).steps)._replace(memory=tuple(tables))


class PeriodicMethod(StochasticMethod):
    """A method that uses all rows from time to time. Its metric `samples` is the last entry of its memory."""

    period_fraction: Any = number(0.5, above=0.0)

    def period(self, problem: Any) -> Array:
        """Steps from one full batch to the next, at least 1."""
        return jnp.maximum(jnp.floor(self.period_fraction * (sum(problem.samples) / self.batch_size)), 1).astype(jnp.int32)

    def metrics(self, problem: Any, state: StochasticState) -> dict[str, Array]:
        """`samples`: rows drawn so far."""
        return {"samples": state.memory[-1]}

    def cost(self, problem: Any) -> dict[str, float]:
        return {}


class SRBA(PeriodicMethod):
    r"""Stochastic recursive bilevel algorithm (Dagréou, Moreau, Vaiter and Ablin, 2023): the directions of SOBA by SARAH differences.

    All rows are used at each start of a period of `period_fraction` $(N + N_v)$ / `batch_size` steps; in between, the difference of a minibatch
    at the new and at the last point is added to each direction. Constant step sizes.

    Args:
        step_size, outer_ratio, batch_size: as in `SOBA`.
        period_fraction: length of a period in passes over both data sets.

    Raises:
        ArgumentError: as in `SOBA`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> int(SRBA(0.1, batch_size=32).period(hg.simulated(0, samples=64)))
        2
    """

    def remember(self, problem: Any, state: StochasticState) -> Any:
        zeros = Directions(*(jnp.zeros_like(a) for a in (state.x, state.x, state.y, state.x, state.y)))
        return zeros, (state.x, state.y, state.v), jnp.zeros((), jnp.result_type(int))

    def move(self, problem: Any, state: StochasticState, inner: Array, outer: Array) -> StochasticState:
        last, before, seen = state.memory
        point = (state.x, state.y, state.v)

        def whole() -> tuple[Directions, Array]:
            return directions(problem, *point), jnp.asarray(sum(problem.samples))

        def difference() -> tuple[Directions, Array]:
            batch = problem.inner_batch(inner[0]).outer_batch(outer[0])
            pairs = zip(last, directions(batch, *point), directions(batch, *before), strict=True)
            return Directions(*(d + (new - old) for d, new, old in pairs)), jnp.asarray(2 * self.batch_size)

        found, rows = lax.cond(state.step % self.period(problem) == 0, whole, difference)
        return _moved(self, state, found.steps)._replace(memory=(found, point, seen + rows))


class FSLA(StochasticMethod):
    r"""Fully single loop algorithm (Li, Gu and Huang, 2022): SGD on x, then on v, then a step of y along a direction with momentum.

    The direction is $d \leftarrow g + (1 - \eta_t)(d - g_{old})$ with $g = G_2 - F_2^\top v$ at the new point and $g_{old}$ at the last one, over
    the same rows, and $\eta_t = \eta/\sqrt{t+1}$; v solves $Hv = G_1$. All step sizes fall as $1/\sqrt{t+1}$.

    Args:
        step_size, outer_ratio, batch_size: as in `SOBA`.
        momentum: $\eta$.

    Raises:
        ArgumentError: as in `SOBA`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> FSLA(0.1, batch_size=32).cost(hg.simulated(0, samples=64))
        {'samples': 160.0}
    """

    momentum: Any = number(0.5, above=0.0, high=1.0)
    exponents: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    inner_batches: ClassVar[int] = 3
    outer_batches: ClassVar[int] = 2

    def remember(self, problem: Any, state: StochasticState) -> Any:
        return state.y, jnp.zeros_like(state.y)

    def move(self, problem: Any, state: StochasticState, inner: Array, outer: Array) -> StochasticState:
        eta, eta_v, gamma = self.rates(state)
        y, (y_old, d) = state.y, state.memory
        x = state.x - eta * problem.inner_batch(inner[0]).at(state.x, y).residual
        at = problem.inner_batch(inner[1]).outer_batch(outer[0]).at(x, y)
        v = state.v - eta_v * (at.product(state.v) - at.outer_x)
        batch = problem.inner_batch(inner[2]).outer_batch(outer[1])
        now, past = batch.at(x, y), batch.at(state.x, y_old)
        change = d - (past.outer_y - past.cross_pullback(state.v))
        keep = 1 - self.momentum / jnp.sqrt((state.step + 1).astype(y.dtype))
        d = now.outer_y - now.cross_pullback(v) + keep * change
        return state._replace(x=x, v=v, y=y - gamma * d, memory=(y, d))
