r"""Bilevel methods without second derivatives: penalties and differences instead of an adjoint (F2SA, BOME, PZOBO).

Updates and default numbers are those of the public benchmark benchopt/benchmark_bilevel, in the letters of this family: x inner, y outer,
$E_2$ the derivative of the inner energy in y.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core.keys import Key, step_key, stream
from theorylab.core.module import number, size
from theorylab.errors import ArgumentError
from theorylab.hypergradient.stochastic import SteppedMethod, StochasticMethod, StochasticState

Array = jax.Array


def _check_energy(method: Any, problem: Any) -> None:
    """Refuse a root problem: its F is not the gradient of an energy whose slope in y there could be."""
    if not problem.has_energy:
        raise ArgumentError(f"{type(method).__name__} needs an inner energy, and {type(problem).__name__} is a root problem; use OuterDescent")


def _descended(problem: Any, x: Array, y: Array, rate: Array, steps: int) -> Array:
    """Steps of gradient descent on x at fixed y."""
    return lax.fori_loop(0, steps, lambda _, x: x - rate * problem.residual(x, y), x)


class F2SA(StochasticMethod):
    r"""Fully first-order stochastic approximation (Kwon, Kwon, Wright and Nowak, 2023): two inner sequences and a growing penalty.

    SGD on $G + \lambda E$ gives $x_\lambda$, SGD on E gives x; then $y \leftarrow y - \gamma (G_2(x_\lambda) + \lambda (E_2(x_\lambda) - E_2(x)))$,
    which tends to the hypergradient as $\lambda$ grows. The step sizes of $x_\lambda$, x and y fall as $(t+1)^{-5/7}$, $(t+1)^{-4/7}$ and
    $(t+1)^{-4/7}$, and $\lambda$ grows by $\Delta (t+1)^{-1/7}$.

    Args:
        step_size, outer_ratio, batch_size: as in `SOBA`. The step of $x_\lambda$ is not divided by $\lambda$, so it must be small: 0.01 as in
            the benchmark.
        inner_steps: steps of both sequences for each step of y.
        penalty: $\lambda$ at the start.
        growth: $\Delta$.

    Raises:
        ArgumentError: as in `SOBA`; a problem without an inner energy.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> F2SA(0.01, batch_size=32).cost(hg.simulated(0, samples=64))
        {'samples': 1056.0}
    """

    step_size: Any = number(0.01, above=0.0)
    inner_steps: int = size(10)
    penalty: Any = number(1.0, above=0.0)
    growth: Any = number(0.1, low=0.0)
    exponents: ClassVar[tuple[float, float, float]] = (5 / 7, 4 / 7, 4 / 7)

    @property
    def inner_batches(self) -> int:  # type: ignore[override]
        """Inner batches of one step: two for each inner step, and two for the step of y."""
        return 2 * self.inner_steps + 2

    @property
    def outer_batches(self) -> int:  # type: ignore[override]
        """Outer batches of one step."""
        return self.inner_steps + 1

    def check_parts(self, problem: Any) -> None:
        super().check_parts(problem)
        _check_energy(self, problem)

    def remember(self, problem: Any, state: StochasticState) -> Any:
        return state.x, jnp.asarray(self.penalty, state.x.dtype)

    def move(self, problem: Any, state: StochasticState, inner: Array, outer: Array) -> StochasticState:
        eta, eta_plain, gamma = self.rates(state)
        y, (x_penalized, penalty) = state.y, state.memory

        def descend(j: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
            x, plain = pair
            slope = penalty * problem.inner_batch(inner[2 * j]).residual(x, y) + jax.grad(problem.outer_batch(outer[j]).outer)(x, y)
            return x - eta * slope, plain - eta_plain * problem.inner_batch(inner[2 * j + 1]).residual(plain, y)

        x_penalized, x = lax.fori_loop(0, self.inner_steps, descend, (x_penalized, state.x))
        above, below = (jax.grad(problem.inner_batch(rows).energy, 1)(z, y) for rows, z in ((inner[-2], x_penalized), (inner[-1], x)))
        y = y - gamma * (jax.grad(problem.outer_batch(outer[-1]).outer, 1)(x_penalized, y) + penalty * (above - below))
        t = (state.step + 1).astype(y.dtype)
        return state._replace(x=x, y=y, memory=(x_penalized, penalty + self.growth / t ** (1 / 7)))

    def metrics(self, problem: Any, state: StochasticState) -> dict[str, Array]:
        """`penalty`: lambda."""
        return {"penalty": state.memory[1]}


class BOME(SteppedMethod):
    r"""Bilevel optimization made easy (Ye, Liu, Wright, Stone and Liu, 2022): descent on G held back by the value function of E. Full batches.

    With $\tilde x$ after some gradient steps on E from x, and $q = E(x, y) - E(\tilde x, y)$, both variables move along $\nabla G + \lambda\nabla q$
    with $\lambda = \max(\eta |\nabla q|^2 - \nabla G\cdot\nabla q, 0) / |\nabla q|^2$, so that q falls at least at the rate $\eta |\nabla q|^2$.
    Constant step sizes.

    Args:
        step_size, outer_ratio: as in `SOBA`.
        inner_steps: gradient steps from x to $\tilde x$.
        control: $\eta$.

    Raises:
        ArgumentError: a number outside its range, or a problem without an inner energy.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> BOME(0.1).cost(hg.simulated(0, samples=64))
        {'gradients': 11.0}
    """

    inner_steps: int = size(10)
    control: Any = number(0.5, above=0.0)

    def check_parts(self, problem: Any) -> None:
        _check_energy(self, problem)

    def step(self, problem: Any, state: StochasticState, *, key: Key) -> StochasticState:
        eta, _, gamma = self.rates(state)
        x, y = state.x, state.y
        settled = _descended(problem, x, y, eta, self.inner_steps)
        outer_x, outer_y = jax.grad(problem.outer, (0, 1))(x, y)
        energy_x, energy_y = jax.grad(problem.energy, (0, 1))(x, y)
        energy_y = energy_y - jax.grad(problem.energy, 1)(settled, y)
        size = energy_x @ energy_x + energy_y @ energy_y
        needed = jnp.maximum(self.control * size - outer_x @ energy_x - outer_y @ energy_y, 0)
        weight = jnp.where(size > 0, needed / jnp.where(size > 0, size, jnp.ones_like(size)), jnp.zeros_like(size))
        return state._replace(x=x - eta * (outer_x + weight * energy_x), y=y - gamma * (outer_y + weight * energy_y), step=state.step + 1)

    def cost(self, problem: Any) -> dict[str, float]:
        return {"gradients": self.inner_steps + 1.0}


class PZOBO(SteppedMethod):
    r"""Partial zeroth-order bilevel optimizer (Sow, Ji and Liang, 2022): the Jacobian of the inner run by random differences. Full batches.

    x moves by gradient descent; $J^\top G_1$ is estimated by the mean of $u\, (x(y + \mu u) - x(y))\cdot G_1 / \mu$ over Gaussian vectors u, where
    $x(\cdot)$ is the same run of gradient descent from the same start. Constant step sizes.

    Args:
        step_size, outer_ratio: as in `SOBA`.
        inner_steps: gradient steps on x for each step of y.
        directions: number of vectors u.
        smoothing: $\mu$.

    Raises:
        ArgumentError: a number outside its range.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> PZOBO(0.1).cost(hg.simulated(0, samples=64))
        {'gradients': 110.0}
    """

    inner_steps: int = size(10)
    directions: int = size(10)
    smoothing: Any = number(0.1, above=0.0)

    def step(self, problem: Any, state: StochasticState, *, key: Key) -> StochasticState:
        eta, _, gamma = self.rates(state)
        y, mu = state.y, self.smoothing
        vectors = jax.random.normal(step_key(stream(state.key, "directions"), state.step), (self.directions, y.shape[0]), y.dtype)
        run = lambda y: _descended(problem, state.x, y, eta, self.inner_steps)  # noqa: E731
        x = run(y)
        outer_x, outer_y = jax.grad(problem.outer, (0, 1))(x, y)
        changes = (jax.vmap(run)(y + mu * vectors) - x) @ outer_x / mu
        return state._replace(x=x, y=y - gamma * (changes @ vectors / self.directions + outer_y), step=state.step + 1)

    def cost(self, problem: Any) -> dict[str, float]:
        return {"gradients": self.inner_steps * (1.0 + self.directions)}
