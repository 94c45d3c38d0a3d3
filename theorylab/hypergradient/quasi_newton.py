"""Quasi-Newton inner methods: L-BFGS, and the minimizers of optimistix."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core import tree
from theorylab.core.module import choice, size
from theorylab.core.problem import Method
from theorylab.errors import ArgumentError
from theorylab.hypergradient.contract import InnerProblem
from theorylab.hypergradient.inner import SLACK_UNITS, InnerMethod, begin, starting_point

Array = jax.Array
SEARCH_STEPS = 25
ARMIJO, WOLFE = 1e-4, 0.9


class _Search(NamedTuple):
    x: Array
    merit: Array
    F: Array
    gradients: Array
    direction: Array
    size: Array
    low: Array
    high: Array
    tries: Array
    moves: Array
    changes: Array
    weights: Array


class LBFGS(InnerMethod):
    r"""L-BFGS with a line search for the weak Wolfe conditions; one step is one evaluation of energy and gradient.

    A trial that is refused leaves the iterate where it is and narrows the bracket for the next step, so runs in one batch never wait for each
    other. Close to the solution, where differences of the energy are lost in round-off, slopes decide (Hager and Zhang, 2005). An update whose
    curvature $s^\top u$ is not positive is left out; a search that fails starts again from the gradient.

    Args:
        memory: pairs that are kept.

    Raises:
        ArgumentError: a root problem.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.sum(jnp.cosh(x) - y * x), lambda x, y: x[0], x=jnp.zeros(3), y=jnp.array([1.0, 2.0, 3.0]))
        >>> sol = tl.iterate(problem.inner(problem.y), hg.LBFGS(), steps=100, stop=tl.Below("residual", 1e-10))
        >>> sol.value.round(6).tolist()
        [0.881374, 1.443635, 1.818446]
    """

    memory: int = size(10)
    needs_energy = True

    def init(self, problem: Any, x0: Any, *, key: Array) -> _Search:
        x, merit, F, _, gradients = begin(problem, x0, 1.0)
        blank = jnp.zeros((self.memory, x.shape[0]), x.dtype)
        zero, one = jnp.zeros((), x.dtype), jnp.ones((), x.dtype)
        first = _two_loops(blank, blank, jnp.zeros(self.memory, x.dtype), F)
        return _Search(x, merit, F, gradients, first, one, zero, jnp.inf * one, jnp.zeros((), jnp.int32), blank, blank, jnp.zeros_like(blank[:, 0]))

    def step(self, problem: Any, state: _Search, *, key: Array) -> _Search:
        s, eps = state, jnp.finfo(state.x.dtype).eps
        x = s.x + s.size * s.direction
        merit, F = problem.evaluate(x)
        slope, slope_new = s.F @ s.direction, F @ s.direction
        flat = (merit <= s.merit + SLACK_UNITS * eps * jnp.abs(s.merit)) & (slope_new <= (2 * ARMIJO - 1) * slope)
        enough = (merit <= s.merit + ARMIJO * s.size * slope) | flat
        accept = enough & (slope_new >= WOLFE * slope)
        failed = ~accept & (s.tries + 1 >= SEARCH_STEPS)

        low, high = jnp.where(enough, s.size, s.low), jnp.where(enough, s.high, s.size)
        narrowed = s._replace(size=_next_size(s.size, slope, slope_new, low, high), low=low, high=high, tries=s.tries + 1)

        move, change = x - s.x, F - s.F
        curved = move @ change > eps * tree.norm(move) * tree.norm(change)
        product = jnp.where(curved, move @ change, jnp.ones_like(slope))
        pushed = tuple(jnp.roll(kept, -1, axis=0).at[-1].set(new) for kept, new in ((s.moves, move), (s.changes, change), (s.weights, 1 / product)))
        moves, changes, weights = tree.select(accept & curved, pushed, (s.moves, s.changes, s.weights))
        weights = jnp.where(failed, jnp.zeros_like(weights), weights)
        taken = s._replace(x=jnp.where(accept, x, s.x), merit=jnp.where(accept, merit, s.merit), F=jnp.where(accept, F, s.F), moves=moves,
                           changes=changes, weights=weights, size=jnp.ones_like(s.size), low=jnp.zeros_like(s.low),
                           high=jnp.full_like(s.high, jnp.inf), tries=jnp.zeros_like(s.tries))
        direction = _two_loops(moves, changes, weights, taken.F)
        new = tree.select(accept | failed, taken._replace(direction=direction), narrowed)
        return new._replace(gradients=s.gradients + 1)


def _two_loops(moves: Array, changes: Array, weights: Array, F: Array) -> Array:
    """The quasi-Newton direction from the kept pairs, newest last; a weight 0 marks an empty place. Without pairs: a bounded gradient step."""
    kept = (moves, changes, weights)

    def back(q: Array, pair: Any) -> tuple[Array, Array]:
        s, u, weight = pair
        share = weight * (s @ q)
        return q - share * u, share

    def forth(r: Array, pair: Any) -> tuple[Array, None]:
        s, u, weight, share = pair
        return r + (share - weight * (u @ r)) * s, None

    q, shares = lax.scan(back, F, kept, reverse=True)
    square, length = changes[-1] @ changes[-1] * weights[-1], tree.norm(F)
    scale = jnp.where(square > 0, 1 / jnp.where(square > 0, square, 1), 1 / jnp.maximum(length, 1))
    r, _ = lax.scan(forth, scale * q, (*kept, shares))
    return jnp.where(r @ F > 0, -r, -F / jnp.maximum(length, 1))


def _next_size(at: Array, slope: Array, slope_new: Array, low: Array, high: Array) -> Array:
    """The next trial: where the slope would vanish if it were linear, kept inside the bracket, or 2 to 10 times further out."""
    secant = at * slope / (slope - slope_new)
    width = high - low
    inside = jnp.clip(jnp.where(jnp.isfinite(secant), secant, low + width / 2), low + width / 10, high - width / 10)
    outside = jnp.where(secant > 0, jnp.clip(secant, 2 * at, 10 * at), 10 * at)
    return jnp.where(jnp.isfinite(high), inside, outside)


class _Foreign(NamedTuple):
    x: Array
    arrays: Any


class Optimistix(Method):
    """Any minimizer of optimistix as an inner method. What is static in its state is rebuilt while tracing, so the state holds arrays only.

    Args:
        minimizer: for example `optimistix.BFGS(rtol=1e-8, atol=1e-8)`; its own tolerances are not used, the stop rule of the run decides.

    Raises:
        ArgumentError: not a minimizer, or a root problem.
    """

    minimizer: Any = choice()

    def check(self, problem: Any, x0: Any) -> None:
        starting_point(problem, x0)
        if not all(hasattr(self.minimizer, name) for name in ("init", "step", "terminate")):
            raise ArgumentError(f"minimizer must be a minimizer of optimistix, got {type(self.minimizer).__name__}")
        if not problem.has_energy:
            raise ArgumentError(f"Optimistix needs an inner energy, and {type(problem.problem).__name__} is a root problem; use Newton()")

    def _arguments(self, problem: InnerProblem, x: Array) -> tuple:
        return (lambda x, _: (problem.energy(x), None), x, None, {})

    def _start(self, problem: InnerProblem, x: Array) -> Any:
        scalar = jax.ShapeDtypeStruct((), x.dtype)
        return self.minimizer.init(*self._arguments(problem, x), scalar, None, frozenset())

    def init(self, problem: Any, x0: Any, *, key: Array) -> _Foreign:
        x = starting_point(problem, x0)
        return _Foreign(x, eqx.filter(self._start(problem, x), eqx.is_array))

    def step(self, problem: Any, state: _Foreign, *, key: Array) -> _Foreign:
        shapes = eqx.filter_eval_shape(self._start, problem, state.x)
        static = eqx.filter(shapes, lambda a: isinstance(a, jax.ShapeDtypeStruct), inverse=True)
        x, new, _ = self.minimizer.step(*self._arguments(problem, state.x), eqx.combine(state.arrays, static), frozenset())
        return _Foreign(x, eqx.filter(new, eqx.is_array))

    def value(self, problem: Any, state: _Foreign) -> Array:
        return state.x
