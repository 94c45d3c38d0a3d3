"""First-order methods that the papers compare with: projections or entropy steps on the whole set C, and no barrier."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from theorylab.acvi.constraints import Nonnegative
from theorylab.acvi.equality import BlockSimplex
from theorylab.acvi.prox import like
from theorylab.core import checks
from theorylab.core.module import count, number
from theorylab.core.problem import Method
from theorylab.errors import ArgumentError

Array = jax.Array


def starting_point(problem: Any, x0: Any) -> Array:
    """`x0` as a vector of the dimension of `problem`.

    Raises:
        ArgumentError: `problem` is no variational inequality.
        ShapeError: `x0` is not a vector of that length.
    """
    if not hasattr(problem, "operator") or not hasattr(problem, "project"):
        raise ArgumentError(f"problem must be a VariationalInequality or a MatrixGame, got {type(problem).__name__}")
    return checks.array("x0", x0, (problem.dim,))


class GradientDescentAscent(Method):
    r"""Projected gradient descent-ascent, $z \leftarrow \Pi_C(z - \gamma F(z))$.

    It cycles on rotations; on a bilinear game the iterates move away from an interior solution.

    Args:
        step_size: $\gamma$.

    Example:
        >>> from theorylab import acvi
        >>> vi = acvi.AffineVariationalInequality(jnp.eye(2), jnp.array([1.0, -1.0]), constraints=acvi.Nonnegative())
        >>> tl.iterate(vi, acvi.GradientDescentAscent(0.5), jnp.ones(2), steps=2).value.tolist()
        [0.0, 1.0]
    """

    step_size: Any = number(above=0.0)

    def init(self, problem: Any, x0: Array, *, key: Array) -> Array:
        return starting_point(problem, x0)

    def step(self, problem: Any, state: Array, *, key: Array) -> Array:
        return problem.project(state - self.step_size * problem.operator(state))

    def value(self, problem: Any, state: Array) -> Array:
        return state

    def cost(self, problem: Any) -> dict[str, float]:
        return {"operator_evaluations": 1.0}


class Extragradient(GradientDescentAscent):
    r"""Korpelevich's method: $\hat z = \Pi_C(z - \gamma F(z))$, $z \leftarrow \Pi_C(z - \gamma F(\hat z))$; two evaluations a step.

    It needs $\gamma L < 1$ with the Lipschitz constant $L$ of $F$; beyond that it may settle on a cycle. The papers count each step as two
    iterations.

    Args:
        step_size: $\gamma$.

    Example:
        >>> from theorylab import acvi
        >>> game = acvi.MatrixGame(jnp.array([[1.0, -1.0], [-1.0, 1.0]]), x0=jnp.array([0.9, 0.1, 0.5, 0.5]))
        >>> sol = tl.iterate(game, acvi.Extragradient(0.2), steps=500, stop=tl.Below("gap", 1e-6))
        >>> np.round(sol.value, 4).tolist()
        [0.5, 0.5, 0.5, 0.5]
    """

    def step(self, problem: Any, state: Array, *, key: Array) -> Array:
        ahead = problem.project(state - self.step_size * problem.operator(state))
        return problem.project(state - self.step_size * problem.operator(ahead))

    def cost(self, problem: Any) -> dict[str, float]:
        return {"operator_evaluations": 2.0}


class _Remembering(NamedTuple):
    z: Array
    force: Array
    step: Array


class OptimisticGradient(Method):
    r"""Optimistic gradient: $z_{k+1} = \Pi_C(z_k - 2\gamma F(z_k) + \gamma F(z_{k-1}))$ with $z_{-1} = z_0$; one evaluation a step.

    Args:
        step_size: $\gamma$.

    Example:
        >>> from theorylab import acvi
        >>> vi = acvi.AffineVariationalInequality(jnp.array([[0.1, 1.0], [-1.0, 0.1]]), jnp.zeros(2), constraints=acvi.Nonnegative())
        >>> round(float(tl.iterate(vi, acvi.OptimisticGradient(0.1), jnp.ones(2), steps=49).value[1]), 6)
        0.833724
    """

    step_size: Any = number(above=0.0)

    def init(self, problem: Any, x0: Array, *, key: Array) -> _Remembering:
        z = starting_point(problem, x0)
        return _Remembering(z, jnp.zeros_like(z), jnp.zeros((), jnp.int32))

    def step(self, problem: Any, state: _Remembering, *, key: Array) -> _Remembering:
        force = problem.operator(state.z)
        before = jnp.where(state.step == 0, force, state.force)
        return _Remembering(problem.project(state.z - self.step_size * (2 * force - before)), force, state.step + 1)

    def value(self, problem: Any, state: _Remembering) -> Array:
        return state.z

    def cost(self, problem: Any) -> dict[str, float]:
        return {"operator_evaluations": 1.0}


class Popov(OptimisticGradient):
    r"""Popov's method: $\bar z_k = \Pi_C(z_k - \gamma F(\bar z_{k-1}))$, $z_{k+1} = \Pi_C(z_k - \gamma F(\bar z_k))$, $\bar z_0 = z_0$; one
    evaluation a step.

    Args:
        step_size: $\gamma$, below $1/(2L)$.

    Example:
        >>> from theorylab import acvi
        >>> game = acvi.MatrixGame(jnp.eye(2), x0=jnp.array([0.9, 0.1, 0.5, 0.5]))
        >>> tl.iterate(game, acvi.Popov(0.4), steps=500, stop=tl.Below("gap", 1e-6)).status.name
        'CONVERGED'
    """

    def step(self, problem: Any, state: _Remembering, *, key: Array) -> _Remembering:
        ahead = jnp.where(state.step == 0, state.z, problem.project(state.z - self.step_size * state.force))
        force = problem.operator(ahead)
        return _Remembering(problem.project(state.z - self.step_size * force), force, state.step + 1)


class _Counting(NamedTuple):
    z: Array
    evaluations: Array


class Lookahead(Method):
    r"""Lookahead around gradient descent-ascent: `inner_steps` projected steps lead from $z$ to $z'$, then
    $z \leftarrow \Pi_C((1-\alpha) z' + \alpha z)$.

    Args:
        step_size: $\gamma$ of the inner steps.
        inner_steps: inner steps per step. The published two-dimensional experiments run one fewer than they state (4, and 3 on `forsaken`).
        weight: $\alpha$, the share of the old point.

    Example:
        >>> from theorylab import acvi
        >>> vi = acvi.AffineVariationalInequality(jnp.array([[0.1, 1.0], [-1.0, 0.1]]), jnp.zeros(2), constraints=acvi.Nonnegative())
        >>> round(float(tl.iterate(vi, acvi.Lookahead(0.1, inner_steps=4), jnp.ones(2), steps=49).value[1]), 6)
        0.520546
    """

    step_size: Any = number(above=0.0)
    inner_steps: Any = count(5, low=1)
    weight: Any = number(0.5, low=0.0, high=1.0)

    def init(self, problem: Any, x0: Array, *, key: Array) -> _Counting:
        return _Counting(starting_point(problem, x0), jnp.zeros((), jnp.int32))

    def step(self, problem: Any, state: _Counting, *, key: Array) -> _Counting:
        inner = self.inner_steps.astype(jnp.int32)
        ahead = jax.lax.fori_loop(jnp.zeros_like(inner), inner, lambda _, z: problem.project(z - self.step_size * problem.operator(z)), state.z)
        return _Counting(problem.project((1 - self.weight) * ahead + self.weight * state.z), state.evaluations + inner)

    def value(self, problem: Any, state: _Counting) -> Array:
        return state.z

    def metrics(self, problem: Any, state: _Counting) -> dict[str, Array]:
        return {"operator_evaluations": state.evaluations}


class _Golden(NamedTuple):
    z: Array
    center: Array
    before: Array
    force: Array
    size: Array
    theta: Array
    step: Array


class GoldenRatio(Method):
    r"""The adaptive golden-ratio algorithm (aGRAAL): a step size from local Lipschitz estimates, one evaluation and one projection a step.

    With $\rho = 1/\varphi + 1/\varphi^2$ and the local estimate $\ell_k = |F(z_k) - F(z_{k-1})| / |z_k - z_{k-1}|$ of the Lipschitz constant,
    $\lambda_k = \min\{\rho\lambda_{k-1},\ \varphi\theta_{k-1}/(4\lambda_{k-1}\ell_k^2),\ \lambda_{\max}\}$,
    $\bar z_k = ((\varphi - 1) z_k + \bar z_{k-1})/\varphi$, $z_{k+1} = \Pi_C(\bar z_k - \lambda_k F(z_k))$ and
    $\theta_k = \varphi\lambda_k/\lambda_{k-1}$ (Malitsky, Golden ratio algorithms for variational inequalities).

    Args:
        step_size: $\lambda_0$, the step from $z_0$ to $z_1$.
        ratio: $\varphi$, above 1 and at most $(1 + \sqrt 5)/2$.
        largest: $\lambda_{\max}$.

    Example:
        >>> from theorylab import acvi
        >>> game = acvi.MatrixGame(jnp.eye(2), x0=jnp.array([0.9, 0.1, 0.5, 0.5]))
        >>> tl.iterate(game, acvi.GoldenRatio(0.1), steps=500, stop=tl.Below("gap", 1e-6)).status.name
        'CONVERGED'
    """

    step_size: Any = number(above=0.0)
    ratio: Any = number(1.5, above=1.0, high=1.6180339887498949)
    largest: Any = number(1e6, above=0.0)

    def init(self, problem: Any, x0: Array, *, key: Array) -> _Golden:
        z = starting_point(problem, x0)
        return _Golden(z, z, z, jnp.zeros_like(z), jnp.asarray(self.step_size, z.dtype), jnp.ones((), z.dtype), jnp.zeros((), jnp.int32))

    def step(self, problem: Any, state: _Golden, *, key: Array) -> _Golden:
        z, first, force = state.z, state.step == 0, problem.operator(state.z)
        moved, changed = jnp.sum((z - state.before) ** 2), jnp.sum((force - state.force) ** 2)
        local = self.ratio * state.theta / (4 * state.size) * moved / jnp.where(changed > 0, changed, 1)
        grown = (1 / self.ratio + 1 / self.ratio**2) * state.size
        size = jnp.minimum(jnp.minimum(grown, jnp.where(changed > 0, local, grown)), self.largest)
        size = jnp.where(first, state.size, size)
        center = jnp.where(first, z, ((self.ratio - 1) * z + state.center) / self.ratio)
        ahead = problem.project(center - size * force)
        theta = jnp.where(first, state.theta, self.ratio * size / state.size)
        return _Golden(ahead, jnp.where(first, ahead, center), z, force, size, theta, state.step + 1)

    def value(self, problem: Any, state: _Golden) -> Array:
        return state.z

    def metrics(self, problem: Any, state: _Golden) -> dict[str, Array]:
        return {"step_size": state.size}

    def cost(self, problem: Any) -> dict[str, float]:
        return {"operator_evaluations": 1.0}


class _Mirror(NamedTuple):
    logs: Array
    total: Array
    step: Array


class MirrorProx(Method):
    r"""Mirror-Prox with the entropy on blocks of simplices, and the average of the extrapolated points as its iterate.

    $\hat w \propto w e^{-\gamma F(w)}$ and $w \leftarrow\ \propto w e^{-\gamma F(\hat w)}$ in each block; the logarithms are stored, so nothing
    underflows.

    Args:
        step_size: $\gamma$, at most $1/\max_{ij}|A_{ij}|$ on a matrix game.

    Raises:
        ArgumentError: the set of the problem is not a product of simplices.

    Example:
        >>> from theorylab import acvi
        >>> sol = tl.iterate(acvi.MatrixGame(jnp.array([[3.0, -1.0], [-1.0, 1.0]])), acvi.MirrorProx(0.3), steps=2000, stop=tl.Below("gap", 1e-3))
        >>> np.round(sol.value, 2).tolist()
        [0.33, 0.67, 0.33, 0.67]
    """

    step_size: Any = number(above=0.0)

    def init(self, problem: Any, x0: Array, *, key: Array) -> _Mirror:
        x0 = starting_point(problem, x0)
        _simplex_blocks(problem)
        tiny = jnp.asarray(jnp.finfo(x0.dtype).tiny, x0.dtype)
        return _Mirror(_log_normalized(problem, jnp.log(jnp.maximum(x0, tiny))), jnp.zeros_like(x0), jnp.zeros((), jnp.int32))

    def step(self, problem: Any, state: _Mirror, *, key: Array) -> _Mirror:
        ahead = jnp.exp(_log_normalized(problem, state.logs - self.step_size * problem.operator(jnp.exp(state.logs))))
        logs = _log_normalized(problem, state.logs - self.step_size * problem.operator(ahead))
        return _Mirror(logs, state.total + ahead, state.step + 1)

    def value(self, problem: Any, state: _Mirror) -> Array:
        return jnp.where(state.step == 0, jnp.exp(state.logs), state.total / jnp.maximum(state.step, 1).astype(state.total.dtype))

    def cost(self, problem: Any) -> dict[str, float]:
        return {"operator_evaluations": 2.0}


def _simplex_blocks(problem: Any) -> None:
    if not isinstance(problem.equality, BlockSimplex) or not isinstance(problem.constraints, Nonnegative):
        raise ArgumentError("MirrorProx needs a product of simplices: constraints Nonnegative() and equality BlockSimplex(sizes), got "
                            f"{type(problem.constraints).__name__} and {type(problem.equality).__name__}")


def _log_normalized(problem: Any, logs: Array) -> Array:
    """`logs` shifted in each block so that the exponentials have the sum of that block."""
    equality = problem.equality
    totals = jnp.log(like(equality.totals, logs))
    return jnp.concatenate([block - jax.nn.logsumexp(block) + total for block, total in zip(equality.split(logs), totals, strict=True)])
