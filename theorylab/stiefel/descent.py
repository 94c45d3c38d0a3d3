"""Riemannian descent with retractions, on the whole data and on running means of batches: the baselines of the paper."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core.keys import Key
from theorylab.core.module import choice, count, number, size
from theorylab.core.psd import product
from theorylab.core.schedule import at
from theorylab.stiefel.baselines import Measured, State, bare, evaluated
from theorylab.stiefel.contract import Batch, BlockProblem, Blocks, Point, total
from theorylab.stiefel.fields import _sym
from theorylab.stiefel.landing import factor_of, solve_with
from theorylab.stiefel.operators import ORDERS, Dense, plus
from theorylab.stiefel.retractions import KINDS, correct

Array = jax.Array
SUFFICIENT, REDUCTION, TRIALS = 1e-2, 0.1, 25           # backtracking, as in the official code


def riemannian_of(point: Point, factors: Any) -> Blocks:
    """The Riemannian gradient of each block, from Cholesky factors of the constraint matrices."""
    return tuple(solve_with(lower, gt) - _sym(product(xt, gt.mT)) @ xt for lower, xt, gt in zip(factors, point.x, point.gradients, strict=True))


def retracted(problem: BlockProblem, batch: Batch, x: Blocks, kind: str) -> Point:
    """The point retracted and evaluated, with one product with B."""
    images = batch.images(x)
    grams = batch.grams(x, images)
    pairs = [(correct(m, xt, kind), correct(m, im, kind)) for m, xt, im in zip(grams, x, images, strict=True)]
    return evaluated(problem, batch, tuple(xt for xt, _ in pairs), tuple(im for _, im in pairs))


class RiemannianDescent(Measured):
    r"""Riemannian gradient descent: $X \leftarrow R(X - \eta(B^{-1} G - X\,\mathrm{sym}(X^\top G)))$ (the baseline of the paper).

    B is factored once. With `search` a step is accepted if $f \le f_0 - 10^{-2}\,\eta\,\langle D, G\rangle$, is else cut to a tenth (at most 25
    times), and doubled for the next step if it was accepted at once, as in the official code.

    Args:
        step_size: the step $\eta$, a number or a schedule; the first trial of the search.
        retraction: `"cholesky"`, `"polar"` or `"newton_schulz"`, see `retract`.
        search: whether steps are found by backtracking.

    Raises:
        ArgumentError: a step size that is not above 0, or another retraction.

    Example:
        >>> from theorylab import stiefel
        >>> problem = stiefel.GEVP(jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.diag(jnp.array([1.0, 2.0, 1.0])), p=1)
        >>> tl.iterate(problem, RiemannianDescent(0.3), steps=200, stop=tl.Below("gap", 1e-10)).status.name
        'CONVERGED'
    """

    step_size: Any = number(above=0.0)
    retraction: str = choice("cholesky", among=KINDS)
    search: bool = choice(False, among=(False, True))
    factors: Any = None

    def prepare(self, problem: BlockProblem) -> RiemannianDescent:
        return self if self.factors is not None else self.replace(factors=tuple(factor_of(op) for op in problem.exact().operators))

    def check(self, problem: BlockProblem, x0: Any) -> None:
        """Refuse a start whose columns are dependent; see `BlockProblem.check_start`."""
        problem.check_start(x0)

    def init(self, problem: BlockProblem, x0: Any, *, key: Key) -> State:
        point = retracted(problem, problem.exact(), problem.pack(x0), self.retraction)
        return self.started(point, key, jnp.asarray(at(self.step_size, jnp.zeros((), jnp.int32)), point.objective.dtype) if self.search else None)

    def step(self, problem: BlockProblem, state: State, *, key: Key) -> State:
        batch, point = problem.exact(), state.point
        field = riemannian_of(point, self.factors)
        after = lambda eta: retracted(problem, batch, tuple(xt - eta * d for xt, d in zip(point.x, field, strict=True)), self.retraction)  # noqa: E731
        if not self.search:
            eta = jnp.asarray(at(self.step_size, state.step), state.step_size.dtype)
            return self.moved(state, after(eta), eta, field)
        slope = total(jnp.sum(d * gt) for d, gt in zip(field, point.gradients, strict=True))

        def refused(trial: tuple[Array, Point, Array]) -> Array:
            eta, reached, tried = trial
            return ~(reached.objective <= point.objective - SUFFICIENT * eta * slope) & (tried < TRIALS)

        def shorter(trial: tuple[Array, Point, Array]) -> tuple[Array, Point, Array]:
            eta = REDUCTION * trial[0]
            return eta, after(eta), trial[2] + 1

        eta, reached, tried = lax.while_loop(refused, shorter, (state.average, after(state.average), jnp.zeros((), jnp.int32)))
        return self.moved(state, reached, eta, field, jnp.where(tried == 0, 2 * eta, eta))

    def cost(self, problem: BlockProblem) -> dict[str, float]:
        return {} if self.search else {"gradients": 1.0}


class RollingRiemannian(Measured):
    r"""Riemannian descent on running means of the matrices, regularized by $\epsilon I$: the stochastic baseline of the paper.

    The means are those of all batches so far, and from the end of the first pass on of all rows. Solve and retraction use the regularized matrix,
    so in the end $X^\top B X = I - \epsilon X^\top X$. It forms matrices of size n by n.

    Args:
        step_size: the step $\eta$, a number or a schedule.
        batch_size: as for `StochasticLanding`.
        ridge: $\epsilon$; the paper has 1e-10 for CCA and 1e-6 for ICA.
        retraction: as for `RiemannianDescent`.
        order: as for `StochasticLanding`.
        per_pass: batches in a pass, for data that are fed.

    Raises:
        ArgumentError: a number outside its range.

    Example:
        >>> from theorylab import stiefel
        >>> x = jax.random.normal(jax.random.key(0), (100, 2))
        >>> sol = tl.iterate(stiefel.ICA(x, p=2), RollingRiemannian(0.1, batch_size=25, ridge=1e-6), steps=20)
        >>> bool(sol.history["infeasibility"][-1] < 1e-5)
        True
    """

    step_size: Any = number(above=0.0)
    batch_size: Any = size(None)
    ridge: Any = number(1e-6, above=0.0)
    retraction: str = choice("cholesky", among=KINDS)
    order: str = choice("sequential", among=ORDERS)
    per_pass: Any = count(None, low=1)

    @property
    def average(self) -> str:
        return "first_pass"

    def init(self, problem: BlockProblem, x0: Any, *, key: Key) -> State:
        return self.started(bare(problem.pack(x0)), key, self.no_average(problem, key))

    def step(self, problem: BlockProblem, state: State, *, key: Key) -> State:
        batch = self.held(problem, state.key, state.step)
        average = self.averaged(problem, batch, state.average, state.step)
        batch = problem.from_dense(average[0], batch)
        batch = Batch(tuple(Dense(plus(op.matrix(), self.ridge)) for op in batch.operators), batch.cost)
        x = state.point.x
        point = evaluated(problem, batch, x, batch.images(x))
        field = riemannian_of(point, tuple(factor_of(op) for op in batch.operators))
        eta = jnp.asarray(at(self.step_size, state.step), state.step_size.dtype)
        after = retracted(problem, batch, tuple(xt - eta * d for xt, d in zip(x, field, strict=True)), self.retraction)
        return self.moved(state, bare(after.x), eta, field, average)
