"""Methods of products only that landing is compared with: multipliers, penalties, and Oja's iterations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from theorylab.core.keys import Key
from theorylab.core.module import choice, count, number, size
from theorylab.core.psd import product
from theorylab.core.schedule import at
from theorylab.errors import ArgumentError
from theorylab.stiefel.batches import AVERAGES, Sampled
from theorylab.stiefel.contract import Batch, BlockProblem, Blocks, Point, total
from theorylab.stiefel.fields import _residual, _sym
from theorylab.stiefel.operators import ORDERS

Array = jax.Array


class State(NamedTuple):
    """The point with its products where they are those of the whole data, and the last step."""

    point: Point
    key: Array
    step: Array
    step_size: Array
    field_norm: Array
    average: Any


def _length(blocks: Blocks) -> Array:
    return jnp.sqrt(total(jnp.sum(a**2) for a in blocks))


def bare(x: Blocks) -> Point:
    """A point of which nothing but its place is known."""
    return Point(x, (), (), (), jnp.zeros((), x[0].dtype))


def evaluated(problem: BlockProblem, batch: Batch, x: Blocks, images: Blocks) -> Point:
    """A point with all that is known of it on a batch."""
    objective, gradients = problem.oracle(batch, x, images)
    return Point(x, images, batch.grams(x, images), gradients, objective)


class Measured(Sampled):
    """What the methods of this file report."""

    def value(self, problem: BlockProblem, state: State) -> Any:
        return problem.unpack(state.point.x)

    def measure(self, problem: BlockProblem, state: State) -> dict[str, Array]:
        """The metrics of the problem, from products that the state holds where there are any."""
        return problem.judge(state.point) if state.point.images else problem.metrics(self.value(problem, state))

    def metrics(self, problem: BlockProblem, state: State) -> dict[str, Array]:
        """`step_size`: of the last step, 0 at the start. `field_norm`: the norm of its direction, infinite at the start."""
        return {"step_size": state.step_size, "field_norm": state.field_norm}

    def started(self, point: Point, key: Key, average: Any) -> State:
        zero = jnp.zeros((), point.x[0].dtype)
        return State(point, key, jnp.zeros((), jnp.int32), zero, zero + jnp.inf, average)

    def moved(self, state: State, point: Point, eta: Any, field: Blocks, average: Any = None) -> State:
        kind = state.step_size.dtype
        return State(point, state.key, state.step + 1, jnp.asarray(eta, kind), _length(field), average)


class _Explicit(Measured):
    """Steps along a direction made of products: exact, or on batches where `batch_size` or a fed batch or an average says so."""

    if TYPE_CHECKING:
        step_size: ClassVar[Any]

    def direction(self, xt: Array, bt: Array, gt: Array, gram: Array) -> Array:
        """The direction of one transposed block."""
        raise NotImplementedError(f"{type(self).__name__} must define direction(xt, bt, gt, gram)")

    def finished(self, batch: Batch, x: Blocks) -> tuple[Blocks, Blocks]:
        """The blocks after the step, and their images."""
        return x, batch.images(x)

    def stochastic(self, problem: BlockProblem) -> bool:
        """Whether a step sees a batch."""
        return self.batch_size is not None or self.average != "none" or problem.batch is not None

    def init(self, problem: BlockProblem, x0: Any, *, key: Key) -> State:
        x = problem.pack(x0)
        return self.started(bare(x) if self.stochastic(problem) else problem.at(x), key, self.no_average(problem, key))

    def step(self, problem: BlockProblem, state: State, *, key: Key) -> State:
        point, average, sampled = state.point, state.average, self.stochastic(problem)
        batch = self.held(problem, state.key, state.step) if sampled else problem.exact()
        if average is not None:
            average = self.averaged(problem, batch, average, state.step)
            batch = problem.from_dense(average[0], batch)
        if sampled:
            point = evaluated(problem, batch, point.x, batch.images(point.x))
        field = tuple(self.direction(xt, op.product(xt, im), gt, m) for op, xt, im, gt, m in
                      zip(batch.operators, point.x, point.images, point.gradients, point.grams, strict=True))
        eta = jnp.asarray(at(self.step_size, state.step), state.step_size.dtype)
        x, images = self.finished(batch, tuple(xt - eta * f for xt, f in zip(point.x, field, strict=True)))
        return self.moved(state, bare(x) if sampled else evaluated(problem, batch, x, images), eta, field, average)

    def cost(self, problem: BlockProblem) -> dict[str, float]:
        return super().cost(problem) if self.stochastic(problem) and self.batch_size is not None else {"gradients": 1.0}


class PLAM(_Explicit):
    r"""The augmented Lagrangian method PLAM (Gao, Liu, Yuan 2019, with B): $X \leftarrow X - \eta(G - BX\,\mathrm{sym}(X^\top G) + \beta BXh)$.

    Its direction is not tangent off the manifold, so no step is safe and step sizes must be small.

    Args:
        step_size: the step $\eta$, a number or a schedule.
        penalty: the weight $\beta$ of the normal term.
        batch_size: rows of a batch; None is exact unless the problem is fed or averaged.
        average: `"none"` or `"first_pass"`, as for `StochasticLanding`.
        order: as for `StochasticLanding`.
        per_pass: batches in a pass, for averages of data that are fed.

    Raises:
        ArgumentError: a number outside its range.

    Example:
        >>> from theorylab import stiefel
        >>> problem = stiefel.GEVP(jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.diag(jnp.array([1.0, 2.0, 1.0])), p=1)
        >>> tl.iterate(problem, PLAM(0.2), steps=500, stop=tl.Below("gap", 1e-8) & tl.Below("infeasibility", 1e-8)).status.name
        'CONVERGED'
    """

    step_size: Any = number(above=0.0)
    penalty: Any = number(1.0, low=0.0)
    batch_size: Any = size(None)
    average: str = choice("none", among=AVERAGES)
    order: str = choice("shuffled", among=ORDERS)
    per_pass: Any = count(None, low=1)

    def direction(self, xt: Array, bt: Array, gt: Array, gram: Array) -> Array:
        return gt + (self.penalty * _residual(gram) - _sym(product(xt, gt.mT))) @ bt


class PCAL(PLAM):
    """PLAM whose columns are scaled to unit length in B after each step (Gao, Liu, Yuan 2019, with B). Arguments are those of `PLAM`.

    Example:
        >>> from theorylab import stiefel
        >>> problem = stiefel.GEVP(jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.diag(jnp.array([1.0, 2.0, 1.0])), p=2)
        >>> tl.iterate(problem, PCAL(0.2), steps=500, stop=tl.Below("gap", 1e-8) & tl.Below("infeasibility", 1e-8)).status.name
        'CONVERGED'
    """

    def finished(self, batch: Batch, x: Blocks) -> tuple[Blocks, Blocks]:
        images = batch.images(x)
        scales = tuple(1 / jnp.sqrt(jnp.diagonal(m))[:, None] for m in batch.grams(x, images))
        return tuple(s * xt for s, xt in zip(scales, x, strict=True)), tuple(s * im for s, im in zip(scales, images, strict=True))


class QuadraticPenalty(PLAM):
    r"""Gradient descent on $f + \tfrac\beta4\lVert h\rVert_F^2$: $X \leftarrow X - \eta(G + \beta BXh)$.

    It ends off the manifold: for `GEVP` with $X^\top B X$ of eigenvalues $1 + \lambda_i/\beta$ (companion derivation). Arguments are those of `PLAM`.

    Example:
        >>> from theorylab import stiefel
        >>> problem = stiefel.GEVP(jnp.diag(jnp.array([3.0, 1.0])), None, p=1)
        >>> x = tl.iterate(problem, QuadraticPenalty(0.02, penalty=10.0), steps=500, every=500).value
        >>> round(float(jnp.sum(x**2)), 6)
        1.3
    """

    def direction(self, xt: Array, bt: Array, gt: Array, gram: Array) -> Array:
        return gt + (self.penalty * _residual(gram)) @ bt


class GeneralizedHebbian(_Explicit):
    r"""Stochastic generalized Hebbian iteration of Oja's type: $X \leftarrow X - \eta(G - BX (X^\top G))$, for `GEVP` $X + \eta(AX - BX(X^\top AX))$.

    It is linear in each of the samples of A and B, without bias if they are independent. Arguments are those of `PLAM` without `penalty`.

    Example:
        >>> from theorylab import stiefel
        >>> problem = stiefel.GEVP(jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.diag(jnp.array([1.0, 2.0, 1.0])), p=1)
        >>> tl.iterate(problem, GeneralizedHebbian(0.2), steps=500, stop=tl.Below("gap", 1e-8) & tl.Below("infeasibility", 1e-8)).status.name
        'CONVERGED'
    """

    step_size: Any = number(above=0.0)
    batch_size: Any = size(None)
    average: str = choice("none", among=AVERAGES)
    order: str = choice("shuffled", among=ORDERS)
    per_pass: Any = count(None, low=1)

    def direction(self, xt: Array, bt: Array, gt: Array, gram: Array) -> Array:
        return gt - product(gt, xt.mT) @ bt


class _TwoScale(NamedTuple):
    v: Array
    w: Array
    key: Array
    step: Array


class GenOja(Sampled):
    r"""Gen-Oja (Bhatia and others 2018) for one generalized eigenvector, on two time scales.

    $w \leftarrow w - \alpha(B_t w - A_t v)$ solves $B w = A v$ with a constant step, and $v \leftarrow (v + \beta_t w)/|v + \beta_t w|$ follows with
    steps that fall as 1/t. The point v has length 1, and not length 1 in B: look at `gap` and `error`.

    Args:
        step_size: the schedule $\beta_t$.
        inner_step: the step $\alpha$, below 2 over the largest eigenvalue of the batches.
        batch_size: rows of a batch; None is exact unless the problem is fed.
        order: as for `StochasticLanding`.

    Raises:
        ArgumentError: the problem has more than one column or block, or a number is outside its range.

    Example:
        >>> from theorylab import stiefel
        >>> problem = stiefel.GEVP(jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.diag(jnp.array([1.0, 2.0, 1.0])), p=1)
        >>> tl.iterate(problem, GenOja(tl.Inverse(0.5, 50.0), 0.4), steps=2000, stop=tl.Below("error", 1e-3)).status.name
        'CONVERGED'
    """

    step_size: Any = number(above=0.0)
    inner_step: Any = number(0.5, above=0.0)
    batch_size: Any = size(None)
    order: str = choice("shuffled", among=ORDERS)

    def init(self, problem: BlockProblem, x0: Any, *, key: Key) -> _TwoScale:
        if problem.p != 1 or not problem.single:
            raise ArgumentError(f"GenOja finds one eigenvector of one block: the problem must have p = 1, got p = {problem.p} and "
                                f"{len(problem.dims)} blocks; use GeneralizedHebbian")
        x = problem.pack(x0)[0]
        v = x / jnp.linalg.norm(x)
        return _TwoScale(v, jnp.zeros_like(v), key, jnp.zeros((), jnp.int32))

    @property
    def average(self) -> str:
        return "none"

    def step(self, problem: BlockProblem, state: _TwoScale, *, key: Key) -> _TwoScale:
        sampled = self.batch_size is not None or problem.batch is not None
        batch = self.held(problem, state.key, state.step) if sampled else problem.exact()
        op = batch.operators[0]
        _, (gt,) = problem.oracle(batch, (state.v,), (op.image(state.v),))
        w = state.w - self.inner_step * (op.product(state.w, op.image(state.w)) + gt)
        v = state.v + at(self.step_size, state.step) * w
        return _TwoScale(v / jnp.linalg.norm(v), w, state.key, state.step + 1)

    def value(self, problem: BlockProblem, state: _TwoScale) -> Any:
        return problem.unpack((state.v,))
