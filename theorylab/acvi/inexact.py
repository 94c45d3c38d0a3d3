"""ACVI with inexact, warm-started steps: a few inner iterations for the root in x, and gradient steps for the barrier in y."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.acvi.acvi import Splitting, SplittingState
from theorylab.acvi.barriers import Barrier, ExtendedLogBarrier, LogBarrier, MuSchedule, check_barrier
from theorylab.acvi.baselines import starting_point
from theorylab.acvi.prox import like
from theorylab.acvi.xstep import Solved
from theorylab.core import tree
from theorylab.core.module import Module, choice, count, number, size
from theorylab.core.problem import Method
from theorylab.core.schedule import at
from theorylab.errors import ArgumentError

Array = jax.Array

MOST_ROUNDS = 50
"""Rounds of inner steps in one x-step that `accuracy` asks for."""
HALVINGS = 60


class Root(Module):
    r"""The x-step as a problem for an inner method: the root of $G(x) = x + P_c F(x)/\beta - P_c u - d_c$, without constraints."""

    problem: Any
    target: Array
    penalty: Array

    @property
    def dim(self) -> int:
        """Number of unknowns."""
        return self.problem.dim

    def operator(self, x: Array) -> Array:
        """G."""
        return x + self.problem.equality.null(self.problem.operator(x)) / self.penalty - self.target

    def project(self, x: Array) -> Array:
        """Nothing to project on."""
        return x


class _KrylovState(NamedTuple):
    base: Array
    move: Array
    left: Array
    inputs: Array
    outputs: Array
    step: Array


class Krylov(Method):
    r"""An inner method without a step size: generalized conjugate residuals on the x-step, linearized where the inner loop starts.

    After l steps $|G|$ is the least over the Krylov space of l products (of the last `memory` directions). On a nonlinear F the inner loop is one
    inexact Newton step. A step costs one product with the derivative of F, counted as an evaluation.

    Args:
        memory: directions kept; shapes arrays.

    Example:
        >>> from theorylab import acvi
        >>> vi = acvi.AffineVariationalInequality(jnp.array([[1.0, 2.0], [-2.0, 1.0]]), jnp.ones(2), constraints=acvi.Nonnegative())
        >>> method = acvi.InexactProjectedACVI(0.5, inner=Krylov(), inner_steps=2)
        >>> tl.iterate(vi, method, steps=100, stop=tl.Below("residual", 1e-9)).status.name
        'CONVERGED'
    """

    memory: int = size(20)

    def init(self, problem: Any, x0: Array, *, key: Array) -> _KrylovState:
        x0 = starting_point(problem, x0)
        none = jnp.zeros((self.memory, *x0.shape), x0.dtype)
        return _KrylovState(x0, jnp.zeros_like(x0), -problem.operator(x0), none, none, jnp.zeros((), jnp.int32))

    def step(self, problem: Any, state: _KrylovState, *, key: Array) -> _KrylovState:
        p, q = state.left, jax.jvp(problem.operator, (state.base,), (state.left,))[1]
        for _ in range(2):  # the second pass removes what round-off left of the first
            share = state.outputs @ q
            p, q = p - share @ state.inputs, q - share @ state.outputs
        length = jnp.linalg.norm(q)
        inverse = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
        p, q = p * inverse, q * inverse
        weight, row = q @ state.left, state.step % self.memory
        return _KrylovState(state.base, state.move + weight * p, state.left - weight * q, state.inputs.at[row].set(p), state.outputs.at[row].set(q),
                            state.step + 1)

    def value(self, problem: Any, state: _KrylovState) -> Array:
        return state.base + state.move

    def metrics(self, problem: Any, state: _KrylovState) -> dict[str, Array]:
        return {"operator_evaluations": state.step + 1}


def _inner(method: Any) -> Any:
    """The inner method of a field that may be None."""
    inner = Krylov() if method is None else method
    if not isinstance(inner, Method):
        raise ArgumentError(f"inner must be a method such as GradientDescentAscent(0.05), Extragradient(0.05) or Krylov(), got {inner!r}")
    return inner


def _evaluations(inner: Any, root: Root, state: Any, steps: Array) -> Array:
    """What `steps` inner steps cost, from the counter of the inner method or its constant cost."""
    counted = inner.metrics(root, state).get("operator_evaluations")
    if counted is not None:
        return counted.astype(jnp.int32)
    return steps * int(inner.cost(root)["operator_evaluations"])


def inner_root(problem: Any, method: Any, state: SplittingState, key: Array) -> Solved:
    """The x-step of an inexact method: rounds of `inner_steps` inner steps from the previous x, one round unless `accuracy` asks for more."""
    equality, inner, steps = problem.equality, _inner(method.inner), method.inner_steps.astype(jnp.int32)
    target = equality.null(2 * state.y - state.v) + like(equality.point, state.y)
    root, zero = Root(problem, target, method.penalty), jnp.zeros((), jnp.int32)

    def one(x: Array) -> tuple[Array, Array]:
        start = tree.strong(inner.init(root, x, key=key))
        end = lax.fori_loop(zero, steps, lambda _, s: tree.strong(inner.step(root, s, key=key)), start)
        return inner.value(root, end), _evaluations(inner, root, end, steps)

    x, spent = one(state.x)
    if method.accuracy is not None:

        def rough(loop: tuple[Array, Array, Array]) -> Array:
            x, _, rounds = loop
            return (jnp.linalg.norm(root.operator(x)) > method.accuracy * jnp.linalg.norm(x - state.y)) & (rounds < MOST_ROUNDS)

        def more(loop: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x, spent, rounds = loop
            x, used = one(x)
            return x, spent + used + 1, rounds + 1  # one evaluation for the test that led here

        x, spent, _ = lax.while_loop(rough, more, (x, spent + 1, zero + 1))
    return Solved(x, spent, zero)


class InexactACVI(Splitting):
    r"""I-ACVI (Chavdarova, Yang, Pagliardini and Jordan): warm-started inner steps in place of the exact x-step, and of the y-step if asked.

    Gradient steps inside converge for a step size below $2/(1 + L/\beta)^2$ (skew F: $2/(1 + L^2/\beta^2)$, companion derivation). On rotations 1 to
    3 of them per step are too few; extragradient steps or `Krylov` are safe.

    Args:
        penalty: $\beta$.
        mu: weight of the barrier, a number or a `MuSchedule`, whose `first_steps` and `inner_steps` are $K_0$ and $K_+$;
            `MuSchedule(1e-6, 0.8, stages=100, inner_steps=10)` unless given, as in the published experiments.
        barrier: `LogBarrier()`, `ExtendedLogBarrier(switch)` or `EntropyBarrier()`.
        inner: method of the x-step, a baseline such as `GradientDescentAscent(0.05)` or `Extragradient(0.05)`, or `Krylov()`, which is the default.
        inner_steps: inner steps per x-step, $\ell_x$.
        barrier_steps: gradient steps per y-step, $\ell_y$; None takes the exact prox.
        barrier_step_size: their step size, $\eta_y$.
        leave: `"backtrack"` halves a gradient step in y that would leave the domain of the barrier, or raise what it minimizes; `"fail"` takes every
            step and ends the run NONFINITE at the first that leaves the domain.
        accuracy: further rounds of `inner_steps` until $|G(x)|$ is at most this fraction of $|x - y|$ (companion derivation), one more evaluation a
            round.
        advance: ends a stage of mu as soon as the certified gap is below this multiple of m mu (2 is sensible; companion derivation). Needs a
            bounded set with a support function and costs one evaluation a step.
        output: `"y"` or `"x"`, the iterate that is judged.

    Raises:
        InfeasibleStartError: with `barrier_steps`, a start that is not strictly inside (`ExtendedLogBarrier` takes any).

    Example:
        >>> from theorylab import acvi
        >>> M, q = jnp.array([[1.0, 2.0], [-2.0, 1.0]]), jnp.array([1.0, -1.0])
        >>> vi = acvi.VariationalInequality(lambda z, a: a[0] @ z + a[1], dim=2, args=(M, q), constraints=acvi.Nonnegative())
        >>> tl.iterate(vi, acvi.InexactACVI(inner_steps=20), steps=500, stop=tl.Below("residual", 1e-8)).status.name
        'CONVERGED'
    """

    penalty: Any = number(0.5, above=0.0)
    mu: Any = number(None, above=0.0)
    barrier: Barrier = LogBarrier()
    inner: Any = None
    inner_steps: Any = count(10, low=1)
    barrier_steps: Any = count(None, low=1)
    barrier_step_size: Any = number(0.05, above=0.0)
    leave: str = choice("backtrack", among=("backtrack", "fail"))
    accuracy: Any = number(None, above=0.0)
    advance: Any = number(None, above=0.0)
    output: str = choice("y", among=("x", "y"))

    def __check_init__(self) -> None:
        check_barrier(self)

    def prepare(self, problem: Any) -> InexactACVI:
        mu = MuSchedule(1e-6, 0.8, stages=100, inner_steps=10) if self.mu is None else self.mu
        if self.advance is not None and not isinstance(mu, MuSchedule):
            raise ArgumentError(f"advance needs a MuSchedule, whose stages it ends; got mu={mu!r}")
        return self.replace(mu=mu, inner=_inner(self.inner))

    def check(self, problem: Any, x0: Any) -> None:
        """Gradient steps in y need a given start strictly inside, unless the barrier is finite everywhere."""
        if self.barrier_steps is not None and x0 is not None and not isinstance(self.barrier, ExtendedLogBarrier):
            problem.check_interior(x0)

    def init(self, problem: Any, x0: Array, *, key: Array) -> SplittingState:
        state = super().init(problem, x0, key=key)
        if self.barrier_steps is None:
            return state
        # gradient steps need a start in the domain; from the start of the problem one exact y-step leads inside, with the multiplier 0
        mu = self._mu(state.step)
        inside = jnp.isfinite(self.barrier.value(problem.constraints, state.y, mu))
        y = jnp.where(inside, state.y, self.barrier.prox(problem.constraints, state.y, mu, self.penalty))
        return state._replace(y=y, v=y)

    def step(self, problem: Any, state: SplittingState, *, key: Array) -> SplittingState:
        after = super().step(problem, state, key=key)
        if self.advance is None:
            return after
        terms, mu = problem.constraints.barrier_terms(problem.dim), self._mu(state.step)
        done = self._bound(problem, state, after, terms, mu) <= self.advance * terms * mu
        clock = jnp.where(done, self.mu.end(state.step), after.step)
        return after._replace(step=clock, evaluations=after.evaluations + 1)

    def _bound(self, problem: Any, before: SplittingState, after: SplittingState, terms: int, mu: Array) -> Array:
        """A proved bound of the gap at x, with the errors of both inexact steps (companion derivation)."""
        x, y, lam = after.x, after.y, self.multiplier(after)
        root = Root(problem, problem.equality.null(2 * before.y - before.v) + like(problem.equality.point, x), self.penalty)
        moved = self.penalty * (y - before.y)
        wrong_x = self.penalty * root.operator(x)
        wrong_y = self.barrier.gradient(problem.constraints, y, mu) - lam
        bound = terms * mu - lam @ (x - y)
        for force, point in ((-moved, x), (wrong_x, x), (wrong_y, y)):
            bound = bound + force @ point + problem.support(-force)
        return bound

    def _mu(self, step: Array) -> Any:
        return at(self.mu, step)

    def _root(self, problem: Any, state: SplittingState, key: Array) -> Solved:
        return inner_root(problem, self, state, key)

    def _inside(self, problem: Any, state: SplittingState, v: Array) -> Array:
        mu, constraints, barrier = self._mu(state.step), problem.constraints, self.barrier
        if self.barrier_steps is None:
            return barrier.prox(constraints, v, mu, self.penalty)

        def height(y: Array) -> Array:
            return barrier.value(constraints, y, mu) + self.penalty * jnp.sum((y - v) ** 2) / 2

        def step(_: Array, y: Array) -> Array:
            move = self.barrier_step_size * (barrier.gradient(constraints, y, mu) + self.penalty * (y - v))
            if self.leave == "fail":
                return jnp.where(jnp.isfinite(barrier.value(constraints, y - move, mu)), y - move, jnp.nan)
            here = height(y)
            level = here + 8 * jnp.finfo(y.dtype).eps * jnp.abs(here)

            def refused(trial: tuple[Array, Array]) -> Array:
                return ~(height(y - trial[0]) <= level) & (trial[1] < HALVINGS)

            move, halvings = lax.while_loop(refused, lambda trial: (trial[0] / 2, trial[1] + 1), (move, jnp.zeros((), jnp.int32)))
            return jnp.where(halvings < HALVINGS, y - move, y)

        steps = self.barrier_steps.astype(jnp.int32)
        return lax.fori_loop(jnp.zeros_like(steps), steps, step, state.y)


class InexactProjectedACVI(Splitting):
    r"""PI-ACVI (Chavdarova, Yang, Pagliardini and Jordan): warm-started inner steps in x, projection onto the inequalities in y, no mu.

    Args:
        penalty: $\beta$.
        inner: as in `InexactACVI`.
        inner_steps: inner steps per x-step.
        accuracy: as in `InexactACVI`.
        output: as in `ACVI`.

    Example:
        >>> from theorylab import acvi
        >>> vi = acvi.AffineVariationalInequality(jnp.array([[0.0, 1.0], [-1.0, 0.0]]), jnp.zeros(2), constraints=acvi.Box(-0.4, 2.4))
        >>> method = acvi.InexactProjectedACVI(0.5, acvi.GradientDescentAscent(0.2), inner_steps=10)
        >>> bool(jnp.linalg.norm(tl.iterate(vi, method, jnp.array([2.0, 2.0]), steps=9).value) < 1e-6)
        True
    """

    penalty: Any = number(0.5, above=0.0)
    inner: Any = None
    inner_steps: Any = count(10, low=1)
    accuracy: Any = number(None, above=0.0)
    output: str = choice("y", among=("x", "y"))

    def prepare(self, problem: Any) -> InexactProjectedACVI:
        return self.replace(inner=_inner(self.inner))

    def _root(self, problem: Any, state: SplittingState, key: Array) -> Solved:
        return inner_root(problem, self, state, key)

    def _inside(self, problem: Any, state: SplittingState, v: Array) -> Array:
        return problem.constraints.project(v)
