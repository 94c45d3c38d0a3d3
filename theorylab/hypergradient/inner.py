"""Inner methods: how x moves at fixed y. Each is a core `Method` on `problem.inner(y)`, with the gradient at the iterate kept in its state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax

from theorylab.core import tree
from theorylab.core.keys import stream
from theorylab.core.module import choice, number, size
from theorylab.core.problem import Method
from theorylab.core.sample import minibatch
from theorylab.core.schedule import at as at_step
from theorylab.errors import ArgumentError, NotConvergedError
from theorylab.hypergradient.contract import BilevelProblem, InnerProblem, PyTree

Array = jax.Array
SLACK_UNITS = 10        # units of round-off of the energy that do not count as a rise
SHIFT_FACTOR = 8
NEWTON_STEPS, POLISH_STEPS = 200, 3


def starting_point(problem: Any, x0: Any) -> Array:
    """`x0`, a tree of the user or a packed vector, as a vector of shape (n,).

    Raises:
        ArgumentError: `problem` is no inner problem.
        ShapeError: `x0` does not fit.
    """
    if not isinstance(problem, InnerProblem):
        raise ArgumentError(f"problem must be an inner problem, made by problem.inner(y), got {type(problem).__name__}")
    return problem.problem.pack_x(x0)


class _Point(NamedTuple):
    x: Array
    merit: Array
    F: Array
    size: Array
    gradients: Array


class InnerMethod(Method):
    """What the methods share: the state holds the energy (or half the squared residual) and F at its x."""

    needs_energy = False

    def check(self, problem: Any, x0: Any) -> None:
        starting_point(problem, x0)
        if self.needs_energy and not problem.has_energy:
            raise ArgumentError(f"{type(self).__name__} needs an inner energy, and {type(problem.problem).__name__} is a root problem; use Newton()")

    def value(self, problem: Any, state: Any) -> Array:
        return state.x

    def measure(self, problem: Any, state: Any) -> dict[str, Array]:
        return problem.measured(state.x, state.merit, state.F)

    def metrics(self, problem: Any, state: Any) -> dict[str, Array]:
        return {"gradients": state.gradients}


def begin(problem: InnerProblem, x0: Any, first_size: Any) -> _Point:
    """The first state at `x0`, with the step size where a search begins."""
    x = starting_point(problem, x0)
    merit, F = problem.evaluate(x)
    return _Point(x, merit, F, jnp.asarray(first_size, x.dtype), jnp.ones((), jnp.int32))


def _descend(problem: InnerProblem, at: _Point, direction: Array, first_size: Array) -> _Point:
    """The point x - size * direction, the size halved while the merit rises by more than round-off."""
    eps = jnp.finfo(at.x.dtype).eps
    limit = at.merit + SLACK_UNITS * eps * jnp.abs(at.merit)
    length, reach = tree.norm(direction), tree.norm(at.x)

    def trial(size: Array, gradients: Array) -> _Point:
        x = at.x - size * direction
        merit, F = problem.evaluate(x)
        return _Point(x, merit, F, size, gradients + 1)

    def rises(p: _Point) -> Array:
        return ~(p.merit <= limit) & (p.size * length > 4 * eps * reach) & (p.size > eps * first_size)

    first = jnp.asarray(first_size, at.x.dtype)
    return lax.while_loop(rises, lambda p: trial(p.size / 2, p.gradients), trial(first, at.gradients))


class GradientDescent(InnerMethod):
    r"""Gradient descent $x \leftarrow x - \eta F(x, y)$.

    Args:
        step_size: $\eta$, a number or a schedule. None: $\eta$ starts at 1 and is halved while the energy rises; the halved step is kept for all
            later iterations (the rule of the official code for logistic regression; for ridge it takes the constant $1.8/\lambda_{\max}(F_1)$).

    Raises:
        ArgumentError: no step size for a root problem.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: (x - y) ** 2, lambda x, y: x, x=0.0, y=1.0)
        >>> sol = tl.iterate(problem.inner(1.0), hg.GradientDescent(), jnp.zeros(1), steps=2)
        >>> sol.value.tolist(), sol.history["objective"].tolist()
        ([0.0], [1.0, 1.0, 1.0])
    """

    step_size: Any = number(None, above=0.0)

    @property
    def needs_energy(self) -> bool:  # type: ignore[override]
        """Whether the step size is found by descent."""
        return self.step_size is None

    def init(self, problem: Any, x0: Any, *, key: Array) -> _Point:
        return begin(problem, x0, 1.0 if self.step_size is None else at_step(self.step_size, jnp.zeros((), jnp.int32)))

    def step(self, problem: Any, state: _Point, *, key: Array) -> _Point:
        if self.step_size is None:
            return _descend(problem, state, state.F, state.size)
        size = jnp.asarray(at_step(self.step_size, state.gradients - 1), state.x.dtype)
        x = state.x - size * state.F
        merit, F = problem.evaluate(x)
        return _Point(x, merit, F, size, state.gradients + 1)

    def metrics(self, problem: Any, state: _Point) -> dict[str, Array]:
        return {"gradients": state.gradients, "step_size": state.size}


class _Momentum(NamedTuple):
    x: Array
    w: Array


class AcceleratedGradient(Method):
    r"""Nesterov's method for strongly convex energies: $x_{k+1} = w_k - F(w_k)/L$, $w_{k+1} = x_{k+1} + \beta(x_{k+1} - x_k)$, $w_0 = x_0$.

    $\beta = (1 - \sqrt{\mu/L})/(1 + \sqrt{\mu/L})$. Measuring at x takes one more gradient per recorded row.

    Args:
        convexity: $\mu$, a constant of strong convexity; from `problem.curvature` if None.
        smoothness: L, a Lipschitz constant of the gradient; likewise.

    Raises:
        NoClosedFormError: the problem knows no constants and none were given.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.RidgeSelection((jnp.eye(2), jnp.array([3.0, 3.0])), (jnp.eye(2), jnp.ones(2)))
        >>> tl.iterate(problem.inner(jnp.zeros(2)), hg.AcceleratedGradient(), steps=200, stop=tl.Below("residual", 1e-8)).value.round(6).tolist()
        [1.5, 1.5]
    """

    convexity: Any = number(None, above=0.0)
    smoothness: Any = number(None, above=0.0)

    def check(self, problem: Any, x0: Any) -> None:
        starting_point(problem, x0)
        if not problem.has_energy:
            raise ArgumentError(f"AcceleratedGradient needs an inner energy, and {type(problem.problem).__name__} is a root problem; use Newton()")

    def prepare(self, problem: Any) -> AcceleratedGradient:
        if self.convexity is not None and self.smoothness is not None:
            return self
        mu, L = problem.curvature()
        return AcceleratedGradient(mu if self.convexity is None else self.convexity, L if self.smoothness is None else self.smoothness)

    def init(self, problem: Any, x0: Any, *, key: Array) -> _Momentum:
        x = starting_point(problem, x0)
        return _Momentum(x, x)

    def step(self, problem: Any, state: _Momentum, *, key: Array) -> _Momentum:
        root = jnp.sqrt(self.convexity / self.smoothness)
        x = state.w - problem.gradient(state.w) / self.smoothness
        return _Momentum(x, x + (1 - root) / (1 + root) * (x - state.x))

    def value(self, problem: Any, state: _Momentum) -> Array:
        return state.x

    def cost(self, problem: Any) -> dict[str, float]:
        return {"gradients": 1.0}


class _Sampled(NamedTuple):
    x: Array
    step: Array
    key: Array


class StochasticGradient(Method):
    r"""Stochastic gradient descent on minibatches of the inner samples, each row once in a pass.

    Args:
        step_size: a number or a schedule.
        batch_size: rows of a batch.

    Raises:
        ArgumentError: a problem that is not a mean over samples, or has fewer than `batch_size`.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.simulated(0, dim_inner=4, dim_outer=2, samples=64)
        >>> sol = tl.iterate(problem.inner(jnp.ones(2)), hg.StochasticGradient(0.1, 16), steps=200, every=200)
        >>> bool(sol.history["error"][-1] < 0.3 * sol.history["error"][0])
        True
    """

    step_size: Any = number(0.1, above=0.0)
    batch_size: int = size(64)

    def check(self, problem: Any, x0: Any) -> None:
        starting_point(problem, x0)
        rows = problem.problem.samples[0]
        if self.batch_size > rows:
            raise ArgumentError(f"batch_size must be at most the {rows} samples of the inner objective, got {self.batch_size}")

    def init(self, problem: Any, x0: Any, *, key: Array) -> _Sampled:
        return _Sampled(starting_point(problem, x0), jnp.zeros((), jnp.int32), key)

    def step(self, problem: Any, state: _Sampled, *, key: Array) -> _Sampled:
        rows = minibatch(stream(state.key, "inner rows"), problem.problem.samples[0], self.batch_size, state.step)
        slope = problem.problem.inner_batch(rows).residual(state.x, problem.y)
        return _Sampled(state.x - at_step(self.step_size, state.step) * slope, state.step + 1, state.key)

    def value(self, problem: Any, state: _Sampled) -> Array:
        return state.x

    def cost(self, problem: Any) -> dict[str, float]:
        return {"samples": float(self.batch_size)}


class _NewtonPoint(NamedTuple):
    x: Array
    merit: Array
    F: Array
    gradients: Array
    shift: Array


class Newton(InnerMethod):
    r"""Newton's method with a dense factor: Cholesky of the Hessian, LU for a root problem.

    Where the Hessian is not positive definite the step is not taken and a multiple of I is added until it is; the multiple falls again later.

    Args:
        damping: halve the step while the energy (for a root problem $|F|$) rises.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> sol = tl.iterate(problem.inner(1.0), hg.Newton(), steps=20, stop=tl.Below("residual", 1e-12))
        >>> sol.steps, round(float(sol.value[0]), 12)
        (5, 0.88137358702)
    """

    damping: bool = choice(True, among=(True, False))

    def init(self, problem: Any, x0: Any, *, key: Array) -> _NewtonPoint:
        x, merit, F, _, gradients = begin(problem, x0, 1.0)
        return _NewtonPoint(x, merit, F, gradients, jnp.zeros((), x.dtype))

    def step(self, problem: Any, state: _NewtonPoint, *, key: Array) -> _NewtonPoint:
        H = problem.linearization(state.x).matrix()
        move, shift = _newton_move(H, state.F, state.shift, problem.has_energy)
        one = jnp.ones((), move.dtype)
        if self.damping:
            new = _descend(problem, _Point(state.x, state.merit, state.F, one, state.gradients), move, one)
            return _NewtonPoint(new.x, new.merit, new.F, new.gradients, shift)
        x = state.x - move
        merit, F = problem.evaluate(x)
        return _NewtonPoint(x, merit, F, state.gradients + 1, shift)

    def cost(self, problem: Any) -> dict[str, float]:
        return {"factorizations": 1.0}


def _newton_move(H: Array, F: Array, shift: Array, definite: bool) -> tuple[Array, Array]:
    """The Newton step, zero where the shifted matrix is not positive definite, and the shift for the next one."""
    if not definite:
        return jnp.linalg.solve(H, F), shift
    scale = jnp.mean(jnp.abs(jnp.diagonal(H)))
    factor = jnp.linalg.cholesky(H + shift * jnp.eye(len(F), dtype=F.dtype))
    good = jnp.all(jnp.isfinite(factor)) | ~jnp.all(jnp.isfinite(H))  # a Hessian that is not finite must be seen in the iterate
    move = jnp.where(good, jsl.cho_solve((factor, True), F), jnp.zeros_like(F))
    smaller = shift / SHIFT_FACTOR
    smaller = jnp.where(smaller > jnp.finfo(F.dtype).eps * scale, smaller, jnp.zeros_like(shift))
    return move, jnp.where(good, smaller, jnp.maximum(SHIFT_FACTOR * shift, 1e-3 * scale))


def reference(problem: BilevelProblem, y: PyTree, x0: PyTree = None) -> PyTree:
    r"""The inner solution $x^*(y)$ to round-off: a closed form or damped Newton, then three full Newton steps. Dense, $O(n^3)$ a step.

    Errors of estimators are measured against it, so it must be better than any of them.

    Args:
        problem: a bilevel problem.
        y: the outer variable.
        x0: where Newton's method starts; the start of the problem if None.

    Returns:
        A tree like x. Inside compiled code nothing is raised, and the last iterate is returned.

    Raises:
        NotConvergedError: Newton's method does not settle.
        ShapeError: y or x0 does not fit.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> round(float(reference(problem, 1.0)), 12)
        0.88137358702
    """
    if not isinstance(problem, BilevelProblem):
        raise ArgumentError(f"problem must be a bilevel problem, got {type(problem).__name__}")
    problem = problem.shaped(x0, y)
    flat = problem.pack_y(y)
    x, last, residual = _reference(problem, flat, problem.start_x(flat) if x0 is None else problem.pack_x(x0))
    if not tree.is_traced(x):
        root = float(jnp.sqrt(jnp.finfo(x.dtype).eps))
        if not float(last) <= root * (float(tree.norm(x)) + root):
            raise NotConvergedError(f"Newton's method did not settle on an inner solution: |F| = {float(residual):.3g}, last step {float(last):.3g}; "
                                    "pass x0 closer to it, or check that the inner problem has a solution")
    return problem.unpack_x(x)


@jax.jit
def _reference(problem: BilevelProblem, y: Array, x0: Array) -> tuple[Array, Array, Array]:
    """The solution, the length of the last step and the residual."""
    inner, key = InnerProblem(problem, y), jax.random.key(0)
    closed = problem.exact(y)

    def advance(method: Newton, state: _NewtonPoint) -> tuple[_NewtonPoint, Array]:
        new = tree.strong(method.step(inner, state, key=key))
        return new, tree.norm(new.x - state.x)

    def moving(loop: tuple[_NewtonPoint, Array, Array]) -> Array:
        state, last, steps = loop
        settled = (last <= jnp.sqrt(jnp.finfo(x0.dtype).eps) * tree.norm(state.x)) & (state.shift == 0)
        return (steps < NEWTON_STEPS) & ~settled

    state = tree.strong(Newton().init(inner, x0 if closed is None else closed, key=key))
    last = jnp.zeros((), x0.dtype)
    if closed is None:
        start = (state, jnp.full((), jnp.inf, x0.dtype), jnp.zeros((), jnp.int32))
        state, last, _ = lax.while_loop(moving, lambda loop: (*advance(Newton(), loop[0]), loop[2] + 1), start)
    full = Newton(damping=False)
    state, last = lax.fori_loop(0, POLISH_STEPS, lambda _, loop: advance(full, loop[0]), (state, last))
    return state.x, last, tree.norm(state.F)
