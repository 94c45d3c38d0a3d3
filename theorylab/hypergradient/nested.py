r"""Stochastic bilevel methods with inner loops or Neumann series (AmIGO, StocBiO, BSA, TTSA, MRBO, SUSTAIN, VRBO).

Updates and default numbers are those of the public benchmark benchopt/benchmark_bilevel; here v solves $H v = G_1$. The single-loop methods and
what all share are in `stochastic`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core.keys import step_key, stream
from theorylab.core.module import number, size
from theorylab.hypergradient.stochastic import PeriodicMethod, StochasticMethod, StochasticState

Array = jax.Array


class _Nested(StochasticMethod):
    """An outer step along $G_2 - F_2' v$, then SGD on x at the new y. The batches of a step: first those of v, one for F_2, then those of x."""

    inner_steps: int = size(10)

    @property
    def adjoint_steps(self) -> int:
        """Inner batches that the adjoint takes."""
        raise NotImplementedError

    @property
    def inner_batches(self) -> int:  # type: ignore[override]
        """Inner batches of one step."""
        return self.adjoint_steps + 1 + self.inner_steps

    def adjoint(self, product: Any, right: Array, rate: Array, state: StochasticState) -> Array:
        """An approximate solution v of H v = `right`, with `product(j, p)` = $H_j p$ over batch j."""
        raise NotImplementedError

    def descend(self, problem: Any, inner: Array, x: Array, y: Array, rate: Array) -> Array:
        """SGD steps on x at fixed y, over the last batches of `inner`."""
        rows = inner[-self.inner_steps:]
        return lax.fori_loop(0, self.inner_steps, lambda j, x: x - rate * problem.inner_batch(rows[j]).at(x, y).residual, x)

    def init(self, problem: Any, x0: Any, *, key: Array) -> StochasticState:
        state = super().init(problem, x0, key=key)
        inner, _ = self.draw(problem, state._replace(key=stream(key, "first inner steps")))
        return state._replace(x=self.descend(problem, inner, state.x, state.y, self.rates(state)[0]))

    def move(self, problem: Any, state: StochasticState, inner: Array, outer: Array) -> StochasticState:
        eta, rate, gamma = self.rates(state)
        x, y = state.x, state.y
        at = problem.outer_batch(outer[0]).inner_batch(inner[self.adjoint_steps]).at(x, y)
        v = self.adjoint(lambda j, p: problem.inner_batch(inner[j]).at(x, y).product(p), at.outer_x, rate, state)
        y = y - gamma * (at.outer_y - at.cross_pullback(v))
        return state._replace(x=self.descend(problem, inner, x, y, eta), y=y, v=v)


class AmIGO(_Nested):
    r"""Amortized implicit gradient optimization (Arbel and Mairal, 2022): SGD on x and on v, both warm-started, for each step of y.

    Args:
        step_size, outer_ratio, batch_size: as in `SOBA`; the step sizes are constant.
        inner_steps: SGD steps on x, and on v, for each step of y.

    Raises:
        ArgumentError: as in `SOBA`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> sol = tl.iterate(hg.simulated(0), AmIGO(0.1), jnp.ones(10), steps=500, every=500)
        >>> bool(sol.history["gradient_norm"][-1] < 0.3 * sol.history["gradient_norm"][0])
        True
    """

    @property
    def adjoint_steps(self) -> int:
        return self.inner_steps

    def adjoint(self, product: Any, right: Array, rate: Array, state: StochasticState) -> Array:
        return lax.fori_loop(0, self.adjoint_steps, lambda j, v: v - rate * (product(j, v) - right), state.v)


class StocBiO(_Nested):
    r"""Stochastic bilevel optimizer (Ji, Yang and Liang, 2021): SGD on x, and $v = \rho\sum_{k=0}^{K}\prod_{j<k}(I - \rho H_j) G_1$ from scratch.

    Args:
        step_size, outer_ratio, batch_size: as in `SOBA`; the step sizes are constant.
        inner_steps: SGD steps on x for each step of y.
        terms: K, one less than the number of terms.

    Raises:
        ArgumentError: as in `SOBA`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> StocBiO(0.1, batch_size=32).cost(hg.simulated(0, samples=64))
        {'samples': 704.0}
    """

    terms: int = size(10, low=0)

    @property
    def adjoint_steps(self) -> int:
        return self.terms

    def adjoint(self, product: Any, right: Array, rate: Array, state: StochasticState) -> Array:
        return neumann(product, right, rate, self.terms)


def neumann(product: Any, right: Array, rate: Array, terms: int) -> Array:
    r"""$\rho\sum_{k \le K}\prod_{j<k}(I - \rho H_j)\, b$ with `product(j, p)` = $H_j p$."""

    def term(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        p, total = carry
        p = p - rate * product(j, p)
        return p, total + p

    return rate * lax.fori_loop(0, terms, term, (right, right))[1]


def truncated(product: Any, right: Array, rate: Array, terms: int, key: Array) -> Array:
    r"""One term of the series, drawn: $K\rho\prod_{j<k}(I - \rho H_j)\, b$ with k uniform on {0, ..., K - 1}; its mean is the series of K terms."""
    k = jax.random.randint(key, (), 0, terms)
    p = lax.fori_loop(0, k, lambda j, p: p - rate * product(j, p), right)
    return terms * rate * p


class BSA(_Nested):
    r"""Bilevel stochastic approximation (Ghadimi and Wang, 2018): SGD on x, and one random term of the Neumann series.

    $v = K\rho\prod_{j<k}(I - \rho H_j) G_1$ with k uniform on {0, ..., K - 1}. The step sizes of x and y fall as $1/\sqrt{t+1}$.

    Args:
        step_size, outer_ratio, batch_size: as in `SOBA`.
        inner_steps: SGD steps on x for each step of y.
        terms: K.

    Raises:
        ArgumentError: as in `SOBA`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> BSA(0.1, batch_size=32).cost(hg.simulated(0, samples=64))
        {'samples': 704.0}
    """

    terms: int = size(10)
    exponents: ClassVar[tuple[float, float, float]] = (0.5, 0.0, 0.5)

    @property
    def adjoint_steps(self) -> int:
        return self.terms

    def adjoint(self, product: Any, right: Array, rate: Array, state: StochasticState) -> Array:
        return truncated(product, right, rate, self.terms, step_key(stream(state.key, "terms"), state.step))


class TTSA(BSA):
    r"""Two-timescale stochastic approximation (Hong, Wai, Wang and Yang, 2023): as `BSA` with one SGD step on x.

    The step size of x falls as $(t+1)^{-2/5}$, that of y as $(t+1)^{-3/5}$.

    Args:
        step_size, outer_ratio, batch_size, inner_steps, terms: as in `BSA`.

    Raises:
        ArgumentError: as in `SOBA`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> TTSA(0.1, batch_size=32).cost(hg.simulated(0, samples=64))
        {'samples': 416.0}
    """

    inner_steps: int = size(1)
    exponents: ClassVar[tuple[float, float, float]] = (0.4, 0.0, 0.6)


class MRBO(StochasticMethod):
    r"""Momentum-based recursive bilevel optimizer (Yang, Ji and Liang, 2021): STORM momentum on the directions of x and of y.

    A direction is $d \leftarrow g + (1 - \eta_t)(d - g_{old})$, g and $g_{old}$ over the same rows at the new and at the last point, with
    $\eta_t = \eta (t+1)^{-2/3}$; the adjoint is the Neumann series of `StocBiO`. The step sizes of x and y fall as $(t+1)^{-1/3}$.

    Args:
        step_size, outer_ratio, batch_size: as in `SOBA`.
        momentum: $\eta$.
        terms: K, one less than the number of terms of the series.

    Raises:
        ArgumentError: as in `SOBA`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> MRBO(0.1, batch_size=32).cost(hg.simulated(0, samples=64))
        {'samples': 384.0}
    """

    momentum: Any = number(0.5, above=0.0, high=1.0)
    terms: int = size(10)
    exponents: ClassVar[tuple[float, float, float]] = (1 / 3, 0.0, 1 / 3)

    @property
    def inner_batches(self) -> int:  # type: ignore[override]
        """Inner batches of one step: one for the gradients, the others for the series."""
        return 1 + self.terms

    def remember(self, problem: Any, state: StochasticState) -> Any:
        return (state.x, state.y), (jnp.zeros_like(state.x), jnp.zeros_like(state.y))

    def adjoint(self, product: Any, right: Array, rate: Array, state: StochasticState) -> Array:
        """An approximate solution v of H v = `right`, with `product(j, p)` = $H_j p$ over batch j."""
        return neumann(product, right, rate, self.terms)

    def move(self, problem: Any, state: StochasticState, inner: Array, outer: Array) -> StochasticState:
        eta, rate, gamma = self.rates(state)
        batch = problem.inner_batch(inner[0]).outer_batch(outer[0])

        def gradients(x: Array, y: Array) -> tuple[Array, Array]:
            at = batch.at(x, y)
            v = self.adjoint(lambda j, p: problem.inner_batch(inner[1 + j]).at(x, y).product(p), at.outer_x, rate, state)
            return at.residual, at.outer_y - at.cross_pullback(v)

        before, last = state.memory
        now, past = gradients(state.x, state.y), gradients(*before)
        keep = 1 - self.momentum / (state.step + 1).astype(state.y.dtype) ** (2 / 3)
        dx, dy = (g + keep * (d - old) for g, d, old in zip(now, last, past, strict=True))
        return state._replace(x=state.x - eta * dx, y=state.y - gamma * dy, memory=((state.x, state.y), (dx, dy)))


class SUSTAIN(MRBO):
    r"""Single-timescale double-momentum stochastic approximation (Khanduri et al., 2021): as `MRBO` with one random term of the Neumann series.

    Args:
        step_size, outer_ratio, batch_size, momentum, terms: as in `MRBO`.

    Raises:
        ArgumentError: as in `SOBA`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> SUSTAIN(0.1, batch_size=32).cost(hg.simulated(0, samples=64))
        {'samples': 384.0}
    """

    def adjoint(self, product: Any, right: Array, rate: Array, state: StochasticState) -> Array:
        return truncated(product, right, rate, self.terms, step_key(stream(state.key, "terms"), state.step))


class VRBO(PeriodicMethod):
    r"""Variance-reduced bilevel optimizer (Yang, Ji and Liang, 2021): SARAH differences inside each step of y.

    All rows give the directions of x and of y at the start of each period. A step moves y along its direction, then takes `inner_steps` steps
    of x; before each of them the difference of a minibatch at the new and at the last point is added to both directions, that of y with the
    Neumann series of `StocBiO` over the same rows. Constant step sizes. (The benchmark leaves the move of y out of the differences, so that its
    directions drift until all rows are used again; here they do not, as in the paper.)

    Args:
        step_size, outer_ratio, batch_size: as in `SOBA`.
        period_fraction: length of a period in passes over both data sets.
        inner_steps: steps of x for each step of y.
        terms: K, one less than the number of terms of the series.

    Raises:
        ArgumentError: as in `SOBA`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> method = VRBO(0.1, batch_size=32)
        >>> method.inner_batches, method.outer_batches
        (110, 10)
    """

    inner_steps: int = size(10)
    terms: int = size(10, low=0)

    @property
    def inner_batches(self) -> int:  # type: ignore[override]
        """Inner batches of one step: for each step of x one for the gradients, the others for the series."""
        return self.inner_steps * (1 + self.terms)

    @property
    def outer_batches(self) -> int:  # type: ignore[override]
        """Outer batches of one step."""
        return self.inner_steps

    def remember(self, problem: Any, state: StochasticState) -> Any:
        return (state.x, state.y), (jnp.zeros_like(state.x), jnp.zeros_like(state.y)), jnp.zeros((), jnp.result_type(int))

    def move(self, problem: Any, state: StochasticState, inner: Array, outer: Array) -> StochasticState:
        eta, rate, gamma = self.rates(state)
        last, before, seen = state.memory

        def directions(batch: Any, product: Any, x: Array, y: Array) -> tuple[Array, Array]:
            at = batch.at(x, y)
            v = neumann(lambda j, p: product(j, x, y, p), at.outer_x, rate, self.terms)
            return at.residual, at.outer_y - at.cross_pullback(v)

        def whole() -> Any:
            here = (state.x, state.y)
            return here, directions(problem, lambda j, x, y, p: problem.at(x, y).product(p), *here)

        fresh = state.step % self.period(problem) == 0
        last, found = lax.cond(fresh, whole, lambda: (last, before))
        y = state.y - gamma * found[1]
        rows = inner.reshape(self.inner_steps, 1 + self.terms, -1)

        def advance(k: Array, carry: tuple[Array, Any, tuple[Array, Array]]) -> tuple[Array, Any, tuple[Array, Array]]:
            x, old, now = carry
            batch = problem.inner_batch(rows[k, 0]).outer_batch(outer[k])
            both = jax.vmap(lambda x, y: directions(batch, lambda j, x, y, p: problem.inner_batch(rows[k, 1 + j]).at(x, y).product(p), x, y))
            changes = both(jnp.stack([x, old[0]]), jnp.stack([y, old[1]]))
            now = (now[0] + changes[0][0] - changes[0][1], now[1] + changes[1][0] - changes[1][1])
            return x - eta * now[0], (x, y), now

        x, last, found = lax.fori_loop(0, self.inner_steps, advance, (state.x, last, found))
        drawn = self.batch_size * (self.inner_batches + self.outer_batches) + jnp.where(fresh, sum(problem.samples), 0)
        return state._replace(x=x, y=y, memory=(last, found, seen + drawn))
