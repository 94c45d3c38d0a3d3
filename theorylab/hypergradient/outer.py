r"""Descent on the outer variable: each step solves the inner problem, warm-started, as far as a rule asks, inside the compiled loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core import tree
from theorylab.core.keys import Key, step_key, stream
from theorylab.core.module import Module, count, number
from theorylab.core.problem import Method
from theorylab.core.schedule import at as at_step
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError
from theorylab.hypergradient.bounds import check_certifiable, error_bound
from theorylab.hypergradient.contract import BilevelProblem, InnerProblem
from theorylab.hypergradient.estimators import Estimator, Hypergradient, OnePoint, Plain, as_estimator
from theorylab.hypergradient.linear import Work

Array = jax.Array
DECREASE, SHRINK, LONGEST = 1e-4, 0.25, 10.0    # of the automatic step size: sufficient decrease, cut after a rise, growth in one step
MEMORY = 0.85                                   # weight of the past in the level below which the objective must fall (Zhang and Hager, 2004)
SLACK_UNITS = 100                               # units of round-off of the objective that do not count as a rise


class Look(NamedTuple):
    """The answer of an `InnerRule`.

    Attributes:
        done: whether x will do.
        error: what is known of the error of the hypergradient, infinite if nothing.
        found: the estimate at x where the answer needed it, else None.
    """

    done: Array
    error: Array
    found: Hypergradient | None = None


class InnerRule(Module):
    """When an inner solution is good enough. Subclasses define `look`."""

    def look(self, problem: BilevelProblem, estimator: Estimator, x: Array, y: Array, v: Array, residual: Array) -> Look:
        """Whether x will do. Pure.

        Args:
            problem: a bilevel problem.
            estimator: what drives the outer step.
            x: shape (n,).
            y: shape (m,).
            v: where an adjoint solve may start, shape (n,).
            residual: norm of F(x, y).
        """
        raise NotImplementedError(f"{type(self).__name__} must define look(problem, estimator, x, y, v, residual)")

    def gives(self, estimator: Estimator) -> bool:
        """Whether `Look.found` is what this estimator would say."""
        return True

    def check(self, problem: BilevelProblem) -> None:
        """Raise if the rule has no meaning for `problem`: called once on the host."""


class InnerResidual(InnerRule):
    """The norm of F is at most `level`; it says nothing of the hypergradient. A number given as `inner_tolerance` means this.

    Example:
        >>> InnerResidual(1e-3).level.item()
        0.001
    """

    level: Any = number(above=0.0)

    def look(self, problem: BilevelProblem, estimator: Estimator, x: Array, y: Array, v: Array, residual: Array) -> Look:
        return Look(residual <= self.level, jnp.full_like(residual, jnp.inf))


class InnerEstimate(InnerRule):
    r"""The estimated relative error of the plain formula is at most `theta`: $\lVert e\rVert \le \frac{\theta}{1 + \theta} \lVert\Omega\rVert$.

    e is the correction of `OnePoint`. It is an estimate and can miss `theta`, far from the inner solution above all. An estimator that applies the
    correction is more accurate than what is asked here. `inner_tolerance="estimate"` means `InnerEstimate(0.1)`.

    Example:
        >>> InnerEstimate(0.1).theta.item()
        0.1
    """

    theta: Any = number(0.1, above=0.0)

    def look(self, problem: BilevelProblem, estimator: Estimator, x: Array, y: Array, v: Array, residual: Array) -> Look:
        found = OnePoint(linear=estimator.linear).estimate(problem, x, y, v0=v)
        plain, error = found.value + found.correction, tree.norm(found.correction)
        if type(estimator) is Plain:
            found = found._replace(value=plain)
        return Look(error <= self.theta / (1 + self.theta) * tree.norm(plain), error, found)

    def gives(self, estimator: Estimator) -> bool:
        return type(estimator) in (OnePoint, Plain)


class InnerCertificate(InnerRule):
    r"""The proved relative error is at most `theta`: $\text{bound} \le \frac{\theta}{1 + \theta} \lVert\hat\Omega\rVert$; for the selection problems.

    For theta < 1 the estimate then has a positive inner product with the hypergradient: each outer step goes down for small steps (companion
    derivation). The bound is that of `certificate`. `inner_tolerance="certified"` means `InnerCertificate(0.1)`.

    Example:
        >>> InnerCertificate(0.5).theta.item()
        0.5
    """

    theta: Any = number(0.1, above=0.0)

    def look(self, problem: BilevelProblem, estimator: Estimator, x: Array, y: Array, v: Array, residual: Array) -> Look:
        found = estimator.estimate(problem, x, y, v0=v)
        bound, work = error_bound(problem, x, y, found.value)  # pyright: ignore[reportArgumentType]  (checked on the host)
        return Look(bound <= self.theta / (1 + self.theta) * tree.norm(found.value), bound, found._replace(work=found.work.plus(work)))

    def check(self, problem: BilevelProblem) -> None:
        check_certifiable(problem)


NAMED = {"estimate": InnerEstimate, "certified": InnerCertificate}


def _rule(value: Any) -> Any:
    if isinstance(value, InnerRule) or type(value) is object:
        return value
    if isinstance(value, str):
        if value not in NAMED:
            raise ArgumentError(f"inner_tolerance must be a number, 'estimate', 'certified' or a rule such as InnerEstimate(0.1), got {value!r}")
        return NAMED[value]()
    return InnerResidual(value)


class _Solved(NamedTuple):
    """What one inner solve leaves: the point, the hypergradient there, and how it went."""

    y: Array
    x: Array
    v: Array
    gradient: Array
    objective: Array
    corrected: Array
    residual: Array
    error: Array


class _State(NamedTuple):
    at: _Solved
    size: Array
    step: Array
    key: Array
    counts: dict[str, Array]
    inner_steps: Array
    unsolved: Array
    failed: Array
    rejected: Array
    level: Array
    weight: Array


class OuterDescent(Method):
    r"""Gradient descent on y with an estimated hypergradient: $y \leftarrow y - \eta\, \hat\Omega(x, y)$.

    The state holds x solved at its y: after y has moved, the inner method runs from the last x until `inner_tolerance` is met, and an iterative
    adjoint solve starts from the last adjoint. An inner solve that ends at `inner_steps` is counted in the metric `unsolved`, a linear solve
    without success in `failed`; a run that diverges ends with the status NONFINITE.

    Args:
        step_size: $\eta$, a number or a schedule. None: Barzilai-Borwein steps, of which those are rejected that do not bring the corrected
            objective $G - v^\top F$, whose error is quadratic in the inner error (companion derivation), below a running mean of its past values; a
            rejected step leaves y and cuts $\eta$.
        estimator: what drives the step; `OnePoint()` unless given.
        inner: the inner method; the default method of the inner problem unless given. It is prepared anew at each y.
        inner_tolerance: a number, the norm of F to reach; `"estimate"` or `"certified"`, a relative error of the hypergradient of 0.1; or an
            `InnerResidual`, `InnerEstimate` or `InnerCertificate`.
        inner_steps: most inner steps at one y.
        every: inner steps between two tests; the first test is before the first step.

    Raises:
        ArgumentError: a number outside its range, another `inner_tolerance`, or `"certified"` on a problem without certificates.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: (x - y) ** 2, lambda x, y: (x - 1.0) ** 2, x=0.0, y=3.0)
        >>> round(float(tl.iterate(problem, OuterDescent(0.25), steps=40).value), 9)
        1.0
        >>> round(float(tl.solve(problem, tolerance=1e-8).value), 9)
        1.0
    """

    step_size: Any = number(None, above=0.0)
    estimator: Any = None
    inner: Any = None
    inner_tolerance: Any = eqx.field(default="estimate", converter=_rule)
    inner_steps: Any = count(1000, low=0)
    every: Any = count(1, low=1)

    def __check_init__(self) -> None:
        super().__check_init__()
        as_estimator(self.estimator)
        if self.inner is not None and not isinstance(self.inner, Method):
            raise ArgumentError(f"OuterDescent: inner must be an inner method such as Newton(), got {self.inner!r}")

    def check(self, problem: Any, x0: Any) -> None:
        """Refuse a problem that is no bilevel one, a start of another shape, or parts that do not fit the problem."""
        if not isinstance(problem, BilevelProblem):
            raise ArgumentError(f"problem must be a bilevel problem such as Bilevel(...), got {type(problem).__name__}")
        if x0 is None:
            return
        y = problem.pack_y(x0)
        self.inner_tolerance.check(problem)
        x = problem.start_x(y)
        as_estimator(self.estimator).check(problem, x, y)
        self._method(InnerProblem(problem, y)).check(InnerProblem(problem, y), x)

    def _method(self, inner: InnerProblem) -> Method:
        return inner.default_method() if self.inner is None else self.inner

    def init(self, problem: Any, x0: Any, *, key: Key) -> _State:
        y = problem.pack_y(x0)
        self.inner_tolerance.check(problem)
        zero = jnp.zeros((), jnp.int32)
        x = problem.start_x(y)
        at, counts, steps, unsolved, failed = self._solve(problem, y, x, jnp.zeros_like(x), stream(key, "first"))
        length = tree.norm(at.gradient)
        size = 1 / jnp.where(length > 0, length, jnp.ones_like(length)) if self.step_size is None else at_step(self.step_size, zero)
        return _State(at, jnp.asarray(size, y.dtype), zero, key, counts, steps, unsolved, failed, zero, at.corrected, jnp.ones_like(at.corrected))

    def _solve(self, problem: Any, y: Array, x: Array, v: Array, key: Key) -> tuple[_Solved, dict[str, Array], Array, Array, Array]:
        """The inner problem at y from x; then the hypergradient. Also: counters, inner steps, whether the rule was missed, whether a solve failed."""
        inner, estimator, rule = InnerProblem(problem, y), as_estimator(self.estimator), self.inner_tolerance
        method = self._method(inner).prepare(inner)
        limit, every = self.inner_steps.astype(jnp.int32), self.every.astype(jnp.int32)

        def looked(state: Any) -> tuple[Look, Array]:
            residual = method.measure(inner, state)["residual"]
            return tree.strong((rule.look(problem, estimator, method.value(inner, state), y, v, residual), residual))

        def unsolved(loop: tuple[Any, tuple[Look, Array], Work, Array, Array]) -> Array:
            _, (seen, residual), _, steps, todo = loop
            return (todo == 0) | (~seen.done & (steps < limit) & jnp.isfinite(residual))

        def advance(loop: tuple[Any, tuple[Look, Array], Work, Array, Array]) -> tuple[Any, tuple[Look, Array], Work, Array, Array]:
            state, _, spent, steps, todo = loop  # none in the first round: the start may be good enough
            state = lax.fori_loop(steps, steps + todo, lambda j, s: tree.strong(method.step(inner, s, key=step_key(key, j))), state)
            new = looked(state)
            return state, new, spent if new[0].found is None else spent.plus(new[0].found.work), steps + todo, every

        state, zero = tree.strong(method.init(inner, x, key=stream(key, "init"))), jnp.zeros((), jnp.int32)
        blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(looked, state))  # the first round fills it
        state, ((done, error, found), residual), spent, steps, _ = lax.while_loop(unsolved, advance, (state, blank, Work().plus(), zero, zero))
        x = method.value(inner, state)
        if found is None or not rule.gives(estimator):
            found = estimator.estimate(problem, x, y, v0=v)
            spent = spent.plus(found.work)
        objective = problem.outer(x, y)
        corrected = objective - found.adjoint @ problem.residual(x, y)
        counters, costs = method.metrics(inner, state), method.cost(inner)
        counts = {name: counters.get(name, zero) + steps * int(costs.get(name, 0)) + getattr(spent, name) for name in Work._fields}
        good = (found.status == Status.COMPLETED) | (found.status == Status.CONVERGED)
        at = _Solved(y, x, found.adjoint, found.value, objective, corrected, residual, error)
        return at, counts, steps, (~done).astype(jnp.int32), (~good).astype(jnp.int32)

    def step(self, problem: Any, state: _State, *, key: Key) -> _State:
        old = state.at
        size = state.size if self.step_size is None else jnp.asarray(at_step(self.step_size, state.step), old.y.dtype)
        new, counts, steps, unsolved, failed = self._solve(problem, old.y - size * old.gradient, old.x, old.v, key)
        counts = {name: before + counts[name] for name, before in state.counts.items()}
        state = state._replace(step=state.step + 1, counts=counts, inner_steps=steps, unsolved=state.unsolved + unsolved,
                               failed=state.failed + failed)
        return state._replace(at=new, size=size) if self.step_size is not None else self._judged(state, new, size)

    @staticmethod
    def _judged(state: _State, new: _Solved, size: Array) -> _State:
        """Accept or reject the step to `new`, and choose the size of the next one."""
        old = state.at
        slope = old.gradient @ old.gradient
        slack = SLACK_UNITS * jnp.finfo(size.dtype).eps * jnp.abs(state.level)
        accepted = tree.finite(new._replace(error=slope)) & (new.corrected <= state.level - DECREASE * size * slope + slack)
        moved, turned = new.y - old.y, new.gradient - old.gradient
        bend = moved @ turned
        newton = jnp.where(bend > 0, moved @ moved / jnp.where(bend > 0, bend, jnp.ones_like(bend)), jnp.inf)
        size = jnp.where(accepted, jnp.clip(newton, size / LONGEST, LONGEST * size), SHRINK * size)
        weight = MEMORY * state.weight + 1
        level = state.level + (new.corrected - state.level) / weight
        at, level, weight = tree.select(accepted, (new, level, weight), (old, state.level, state.weight))
        return state._replace(at=at, size=size, level=level, weight=weight, rejected=state.rejected + (~accepted).astype(jnp.int32))

    def value(self, problem: Any, state: _State) -> Any:
        return problem.unpack_y(state.at.y)

    def measure(self, problem: Any, state: _State) -> dict[str, Array]:
        """`objective`: G at the x of the state. `residual`: norm of F there. `gradient_norm`: norm of the estimated hypergradient.
        `error`: distance to the solution, where the problem knows it.
        """
        at = state.at
        return {"objective": at.objective, "residual": at.residual, "gradient_norm": tree.norm(at.gradient), **problem.error(at.y)}

    def metrics(self, problem: Any, state: _State) -> dict[str, Array]:
        """Counters, and `inner_steps` (at this y), `unsolved`, `failed`, `step_size`, `hypergradient_error` (what the rule knows of it; infinite
        for a number), `rejected` (automatic step size).

        The counters `gradients`, `products` and `factorizations` hold the work of the inner method, of the rule and of the estimator. The gradient
        at a point where the inner method stands is counted once, so that with `Plain` or `OnePoint` the gradients are those of the inner method.
        """
        report = {**state.counts, "inner_steps": state.inner_steps, "unsolved": state.unsolved, "failed": state.failed, "step_size": state.size,
                  "hypergradient_error": state.at.error}
        return {**report, "rejected": state.rejected} if self.step_size is None else report
