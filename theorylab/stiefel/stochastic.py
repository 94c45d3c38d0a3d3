r"""Stochastic landing: the field estimated from one minibatch, whose B is only a sample of the constraint matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core import tree
from theorylab.core.keys import Key
from theorylab.core.module import choice, count, number, size
from theorylab.core.problem import Method
from theorylab.core.schedule import at
from theorylab.errors import ArgumentError
from theorylab.stiefel.contract import Batch, BlockProblem, Blocks, gram_split, total
from theorylab.stiefel.fields import NORMALS, field_of, two_sample_of, u_statistic_of
from theorylab.stiefel.landing import check_radius_argument, turned_back
from theorylab.stiefel.operators import ORDERS, Gram
from theorylab.stiefel.safe_step import exact_steps, moves

Array = jax.Array
ESTIMATORS = ("one_batch", "two_sample", "u_statistic")
NEEDED = {"one_batch": 1, "two_sample": 3, "u_statistic": 3}
RECOVERY = 1.05                         # growth of the factor on the step size after an accepted step, up to 1


class _State(NamedTuple):
    x: Blocks
    key: Array
    step: Array
    step_size: Array
    field_norm: Array
    factor: Array
    rejected: Array
    size: Array
    average: Any


class StochasticLanding(Method):
    r"""The landing method on minibatches (paper): B and the gradient are seen only through a few rows in each step.

    The step is cut to the exact safe step on the batch, which turns divergence into convergence (companion derivation), and a step that gives a
    number that is not finite is rejected and halves the step size, which then recovers by 5 % for each accepted step. A point that has grown until
    X'BX has lost all digits of the identity is beyond help: there the run ends as not finite.

    Args:
        step_size: the step $\eta$, a number or a schedule.
        batch_size: rows of a batch; None is the largest power of two up to min(512, rows / 14). A fed batch has its own size.
        estimator: `"one_batch"`: the same rows everywhere (the official code); with `normal="newton_schulz"` only the tangent term is biased.
            `"two_sample"`: independent thirds of the batch for the gradient and the two factors B (the paper). `"u_statistic"`: all triples of
            distinct rows, unbiased and of least variance; it wins on long runs. Both are unbiased for independent rows, see `order`.
        normal: `"newton_schulz"` (X h; one sample is unbiased) or `"gradient"` (B X h, as in the paper).
        safe: radius in (0, 1) of the safe step on the batch; None does not cut.
        average: `"none"`, or `"first_pass"`: the matrices are running means over the first pass and fixed from then on (the paper's averaged form);
            it forms them, n by n.
        attraction: the weight $\omega$ of the normal term.
        margin: the fraction of the safe step that is used.
        order: rows of a batch held in memory: `"shuffled"` (each once in a pass), `"sequential"` (as they stand, with a shorter last batch), or
            `"independent"` (with replacement).
        per_pass: batches in a pass, for `"first_pass"` on fed data.

    Raises:
        ArgumentError: a number outside its range, or too few rows for the estimator.

    Example:
        >>> from theorylab.stiefel.ica import ICA
        >>> x = jax.random.laplace(jax.random.key(0), (2000, 2)) @ jnp.array([[1.0, 0.5], [0.0, 1.0]])
        >>> sol = tl.iterate(ICA(x, p=2), StochasticLanding(0.1, batch_size=100, order="sequential"), steps=200, every=200)
        >>> bool(sol.history["infeasibility"][-1] < 0.1)
        True
    """

    step_size: Any = number(above=0.0)
    batch_size: Any = size(None)
    estimator: str = choice("one_batch", among=ESTIMATORS)
    normal: str = choice("newton_schulz", among=NORMALS)
    safe: Any = number(0.75)
    average: str = choice("none", among=("none", "first_pass"))
    attraction: Any = number(1.0, low=0.0)
    margin: Any = number(0.9, above=0.0, high=1.0)
    order: str = choice("shuffled", among=ORDERS)
    per_pass: Any = count(None, low=1)

    def __check_init__(self) -> None:
        check_radius_argument("StochasticLanding: safe", self.safe)
        if self.batch_size is not None and self.batch_size < NEEDED[self.estimator]:
            raise ArgumentError(f"StochasticLanding: batch_size must be at least {NEEDED[self.estimator]} for estimator {self.estimator!r}, "
                                f"got {self.batch_size}")
        if self.average != "none" and self.estimator != "one_batch":
            raise ArgumentError(f"StochasticLanding: average 'first_pass' needs the estimator 'one_batch', got {self.estimator!r}")

    def check(self, problem: BlockProblem, x0: Any) -> None:
        """Refuse a start from which no safe step can be taken; see `BlockProblem.check_start`."""
        problem.check_start(x0, self.safe)

    def rows_per_batch(self, problem: BlockProblem) -> int:
        """Rows drawn in each step from data held in memory."""
        rows = problem.rows
        if self.batch_size is not None:
            if rows is not None and self.batch_size > rows and self.order != "independent":
                raise ArgumentError(f"batch_size must be at most the {rows} rows of the data, got {self.batch_size}; use a smaller one or "
                                    "order='independent'")
            return self.batch_size
        if rows is None:
            raise ArgumentError(f"batch_size must be given: {type(problem).__name__} draws from a population, or holds no rows (feed it with data=)")
        return min(rows, max(2 ** (max(min(512, rows // 14), 1).bit_length() - 1), 8))

    def _held(self, problem: BlockProblem, key: Key, step: Array) -> Batch:
        """The batch of a step: fed, or drawn."""
        if problem.batch is None:
            problem = problem.sample(key, self.rows_per_batch(problem), step, self.order, self.average == "first_pass")
        batch = problem.batch
        rows = min((op.rows.shape[0] for op in batch.operators if isinstance(op, Gram)), default=NEEDED[self.estimator])
        if rows < NEEDED[self.estimator]:
            raise ArgumentError(f"a batch must hold at least {NEEDED[self.estimator]} rows for estimator {self.estimator!r}, got {rows}")
        return batch

    def init(self, problem: BlockProblem, x0: Any, *, key: Key) -> _State:
        x = problem.pack(x0)
        average = None
        if self.average == "first_pass":
            shapes = jax.eval_shape(lambda k: problem.dense(self._held(problem, k, jnp.zeros((), jnp.int32))), key)
            average = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), jnp.zeros((), problem.dtype)
        zero, one = jnp.zeros((), x[0].dtype), jnp.ones((), x[0].dtype)
        return _State(x, key, jnp.zeros((), jnp.int32), zero, one * jnp.inf, one, jnp.zeros((), jnp.int32), zero, average)

    def step(self, problem: BlockProblem, state: _State, *, key: Key) -> _State:
        x, batch, average = state.x, self._held(problem, state.key, state.step), state.average
        if average is not None:
            average = self._averaged(problem, batch, average, state.step)
            batch = problem.from_dense(average[0], batch)
        images = batch.images(x)
        grams = batch.grams(x, images)
        field = self._field(problem, batch, x, images, grams)
        wanted = at(self.step_size, state.step) * state.factor
        field, etas = self._guarded(batch, x, images, grams, field, wanted, at(self.safe, state.step))
        moved = tuple(xt - eta * f for xt, eta, f in zip(x, etas, field, strict=True))
        fine = tree.finite((moved, field)) | (state.size > 1 / jnp.finfo(state.size.dtype).eps)
        after = tuple(jnp.where(fine, new, old) for new, old in zip(moved, x, strict=True))
        norm = jnp.sqrt(total(jnp.sum(f**2) for f in field))
        factor = jnp.where(fine, jnp.minimum(RECOVERY * state.factor, 1), state.factor / 2).astype(norm.dtype)
        keep = lambda new, old: jnp.where(fine, new, old).astype(norm.dtype)  # noqa: E731
        size = jnp.sqrt(total(jnp.sum(m**2) for m in grams))
        if average is not None:
            average = tree.select(tree.finite(average), average, state.average)
        return _State(after, state.key, state.step + 1, keep(jnp.min(etas), jnp.zeros_like(norm)), keep(norm, state.field_norm), factor,
                      state.rejected + (~fine).astype(jnp.int32), keep(size, state.size), average)

    def _field(self, problem: BlockProblem, batch: Batch, x: Blocks, images: Blocks, grams: Blocks) -> Blocks:
        """The estimate of the landing field, block by block."""
        if self.estimator == "u_statistic":
            coefficients = problem.coefficients(batch, x, images)
            return tuple(u_statistic_of(op.rows, op.number, c, xt, im, op.ridge, self.attraction, normal=self.normal) for op, c, xt, im in
                         zip(batch.operators, coefficients, x, images, strict=True))
        if self.estimator == "one_batch":
            _, gradients = problem.oracle(batch, x, images)
            return tuple(field_of(g, xt, op.product(xt, im), m, self.attraction, tangent="relative", normal=self.normal) for op, g, xt, im, m in
                         zip(batch.operators, gradients, x, images, grams, strict=True))
        (first, seen), (one, im1), (two, im2) = gram_split(batch, images, 3)
        _, gradients = problem.oracle(first, x, seen)
        products = ([op.product(xt, im) for op, xt, im in zip(part.operators, x, ims, strict=True)] for part, ims in ((one, im1), (two, im2)))
        return tuple(two_sample_of(g, xt, b1, b2, self.attraction, normal=self.normal) for g, xt, b1, b2 in zip(gradients, x, *products, strict=True))

    def _guarded(self, batch: Batch, x: Blocks, images: Blocks, grams: Blocks, field: Blocks, wanted: Any, radius: Any) -> tuple[Blocks, Array]:
        """The field that is followed and the step of each block, at most the safe step on the batch."""
        etas = jnp.broadcast_to(jnp.asarray(wanted, x[0].dtype), (len(x),))
        if radius is None:
            return field, etas
        followed, moved = [], []
        for op, xt, im, m, f in zip(batch.operators, x, images, grams, field, strict=True):
            image = op.image(f)
            w, z = moves(op.inner(xt, im, f, image), op.inner(f, image, f, image))
            if self.estimator != "one_batch":  # not tangent in the metric of the batch
                f, _, w, z = turned_back(xt, im, m, f, image, w, z, radius, self.attraction)
            followed.append(f)
            moved.append((w, z))
        return tuple(followed), jnp.minimum(etas, self.margin * exact_steps(grams, tuple(moved), radius, etas[0] / self.margin))

    def _averaged(self, problem: BlockProblem, batch: Batch, average: tuple[Any, Array], step: Array) -> tuple[Any, Array]:
        """Running means of the matrices, each batch weighted by its rows; fixed after the first pass."""
        if self.per_pass is not None:
            last = self.per_pass
        elif problem.rows is not None:
            last = -(-problem.rows // self.rows_per_batch(problem))
        else:
            raise ArgumentError("per_pass must be given for average='first_pass' on data that are fed: StochasticLanding(..., "
                                "per_pass=rows.per_pass)")

        def update(before: tuple[Any, Array]) -> tuple[Any, Array]:
            means, seen = before
            rows = next((op.number for op in batch.operators if isinstance(op, Gram)), jnp.ones_like(seen)).astype(seen.dtype)
            share = rows / (seen + rows)
            return jax.tree.map(lambda old, new: old + share * (new - old), means, problem.dense(batch)), seen + rows

        return lax.cond(step < jnp.asarray(last, step.dtype), update, lambda before: before, average)

    def value(self, problem: BlockProblem, state: _State) -> Any:
        return problem.unpack(state.x)

    def metrics(self, problem: BlockProblem, state: _State) -> dict[str, Array]:
        """`step_size`: the smallest over the blocks in the last step, 0 at the start and for a rejected step. `field_norm`: of the estimate in the
        last step, infinite at the start. `rejected`: how many steps were.
        """
        return {"step_size": state.step_size, "field_norm": state.field_norm, "rejected": state.rejected}

    def cost(self, problem: BlockProblem) -> dict[str, float]:
        held = problem.batch is not None or problem.rows is None
        return {"gradients": 1.0} if held and self.batch_size is None else {"gradients": 1.0, "samples": float(self.rows_per_batch(problem))}
