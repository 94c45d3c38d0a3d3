r"""Stochastic landing: the field estimated from one minibatch, whose B is only a sample of the constraint matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core import tree
from theorylab.core.keys import Key
from theorylab.core.module import choice, count, number, size
from theorylab.core.psd import product
from theorylab.core.schedule import Inverse, at
from theorylab.errors import ArgumentError
from theorylab.stiefel.batches import AVERAGES, PRECISIONS, PRECONDITIONERS, Sampled, inverse_of, spread
from theorylab.stiefel.contract import Batch, BlockProblem, Blocks, gram_split, total
from theorylab.stiefel.fields import NORMALS, _sym, field_of, two_sample_of, u_statistic_of
from theorylab.stiefel.landing import check_radius_argument, turned_back
from theorylab.stiefel.operators import ORDERS
from theorylab.stiefel.safe_step import exact_steps, moves

Array = jax.Array
ESTIMATORS = ("one_batch", "two_sample", "u_statistic", "variance_reduced")
NEEDED = {"one_batch": 1, "two_sample": 3, "u_statistic": 3, "variance_reduced": 1}
RECOVERY = 1.05                         # growth of the factor on the step size after an accepted step, up to 1
DEFAULT_START, DEFAULT_OFFSET = 0.7, 50


class _Reference(NamedTuple):
    """A point with the products of the whole data there."""

    x: Blocks
    products: Blocks
    gradients: Blocks


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
    reference: Any


class StochasticLanding(Sampled):
    r"""The landing method on minibatches (paper): B and the gradient are seen only through a few rows in each step.

    The step is cut to the exact safe step on the batch, which turns divergence into convergence (companion derivation), and a step that gives a
    number that is not finite is rejected and halves the step size, which then recovers by 5 % for each accepted step. A point that has grown until
    X'BX has lost all digits of the identity is beyond help: there the run ends as not finite.

    The point stays in the precision of the problem, and so do all p by p products; `matmul` is for the large ones.

    Args:
        step_size: the step $\eta$, a number or a schedule.
        batch_size: rows of a batch; None is the largest power of two up to min(512, rows / 14). A fed batch has its own size.
        estimator: `"one_batch"`: the same rows everywhere (the official code); with `normal="newton_schulz"` only the tangent term is biased.
            `"two_sample"`: independent thirds of the batch for the gradient and the two factors B (the paper). `"u_statistic"`: all triples of
            distinct rows, unbiased and of least variance; it wins on long runs. Both are unbiased for independent rows, see `order`.
            `"variance_reduced"`: gradient and B X are those of the batch plus what the batch lacked at a reference point (companion derivation of
            SVRG for landing); the noise vanishes at a solution, at the price of a full gradient every `refresh` steps.
        normal: `"newton_schulz"` (X h; one sample is unbiased) or `"gradient"` (B X h, as in the paper).
        safe: radius in (0, 1) of the safe step on the batch; None does not cut.
        average: `"none"`, or `"first_pass"`: the matrices are running means over the first pass and fixed from then on (the paper's averaged form);
            it forms them, n by n.
        attraction: the weight $\omega$ of the normal term.
        margin: the fraction of the safe step that is used.
        order: rows of a batch held in memory: `"shuffled"` (each once in a pass), `"sequential"` (as they stand, with a shorter last batch), or
            `"independent"` (with replacement).
        per_pass: batches in a pass, for `"first_pass"` on fed data.
        preconditioner: the coordinates in which the field is formed: those of X (`"none"`), or those where the reference of the problem (all of
            its data, moments or held-out rows) is nearly white. `"full"` inverts B, `"diagonal"` its diagonal, `"auto"` B up to 1024 rows. The
            feasible set and the objective are the same; the speed no longer depends on the condition of B.
        refresh: steps between full gradients for `"variance_reduced"`; None is one pass.
        matmul: precision of the products with n by p arrays on devices that have several: `"highest"`, `"tensorfloat32"` or `"bfloat16"`.
        mesh: a `jax.sharding.Mesh` over whose first axis the rows of each batch are split; only p by n arrays are then added over the devices.

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
    average: str = choice("none", among=AVERAGES)
    attraction: Any = number(1.0, low=0.0)
    margin: Any = number(0.9, above=0.0, high=1.0)
    order: str = choice("shuffled", among=ORDERS)
    per_pass: Any = count(None, low=1)
    preconditioner: str = choice("none", among=PRECONDITIONERS)
    refresh: Any = count(None, low=1)
    matmul: str = choice("highest", among=PRECISIONS)
    mesh: Any = choice(None)
    inverses: Any = None

    def __check_init__(self) -> None:
        check_radius_argument("StochasticLanding: safe", self.safe)
        if self.estimator in NEEDED and self.batch_size is not None and self.batch_size < self.least:
            raise ArgumentError(f"StochasticLanding: batch_size must be at least {self.least} for estimator {self.estimator!r}, "
                                f"got {self.batch_size}")
        if self.average != "none" and self.estimator != "one_batch":
            raise ArgumentError(f"StochasticLanding: average 'first_pass' needs the estimator 'one_batch', got {self.estimator!r}")

    @property
    def least(self) -> int:
        return NEEDED[self.estimator]

    def check(self, problem: BlockProblem, x0: Any) -> None:
        """Refuse a start from which no safe step can be taken; see `BlockProblem.check_start`."""
        problem.check_start(x0, self.safe)

    def prepare(self, problem: BlockProblem) -> StochasticLanding:
        if self.preconditioner == "none" or self.inverses is not None:
            return self
        return self.replace(inverses=tuple(inverse_of(op, self.preconditioner) for op in problem.exact().operators))

    def init(self, problem: BlockProblem, x0: Any, *, key: Key) -> _State:
        x = problem.pack(x0)
        reference = None
        if self.estimator == "variance_reduced":
            reference = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(lambda x: self._whole(problem, x), x))
        zero, one = jnp.zeros((), x[0].dtype), jnp.ones((), x[0].dtype)
        return _State(x, key, jnp.zeros((), jnp.int32), zero, one * jnp.inf, one, jnp.zeros((), jnp.int32), zero, self.no_average(problem, key),
                      reference)

    def step(self, problem: BlockProblem, state: _State, *, key: Key) -> _State:
        with jax.default_matmul_precision(self.matmul):
            return self._step(problem, state)

    def _step(self, problem: BlockProblem, state: _State) -> _State:
        x, batch, average, reference = state.x, spread(self.held(problem, state.key, state.step), self.mesh), state.average, state.reference
        if average is not None:
            average = self.averaged(problem, batch, average, state.step)
            batch = problem.from_dense(average[0], batch)
        if reference is not None:
            period = self.pass_length(problem) if self.refresh is None else self.refresh
            reference = lax.cond(state.step % period.astype(state.step.dtype) == 0, lambda old: self._whole(problem, x), lambda old: old, reference)
        images = batch.images(x)
        field, grams = self._field(problem, batch, x, images, reference)
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
                      state.rejected + (~fine).astype(jnp.int32), keep(size, state.size), average, reference)

    def _whole(self, problem: BlockProblem, x: Blocks) -> _Reference:
        """The point as the new reference."""
        batch = problem.exact()
        images = batch.images(x)
        products = tuple(op.product(xt, im) for op, xt, im in zip(batch.operators, x, images, strict=True))
        return _Reference(x, products, problem.oracle(batch, x, images)[1])

    def _field(self, problem: BlockProblem, batch: Batch, x: Blocks, images: Blocks, reference: Any) -> tuple[Blocks, Blocks]:
        """The estimate of the landing field and that of the Gram matrix, block by block."""
        inverses = (None,) * len(x) if self.inverses is None else self.inverses
        grams = batch.grams(x, images)
        if self.estimator == "u_statistic":
            coefficients = problem.coefficients(batch, x, images)
            return tuple(u_statistic_of(op, c, xt, im, self.attraction, normal=self.normal, inverse=q)
                         for op, c, xt, im, q in zip(batch.operators, coefficients, x, images, inverses, strict=True)), grams
        if self.estimator == "two_sample":
            (first, seen), (one, im1), (two, im2) = gram_split(batch, images, 3)
            _, gradients = problem.oracle(first, x, seen)
            products = ([op.product(xt, im) for op, xt, im in zip(part.operators, x, ims, strict=True)] for part, ims in ((one, im1), (two, im2)))
            return tuple(two_sample_of(g, xt, b1, b2, self.attraction, normal=self.normal, inverse=q)
                         for g, xt, b1, b2, q in zip(gradients, x, *products, inverses, strict=True)), grams
        _, gradients = problem.oracle(batch, x, images)
        products = tuple(op.product(xt, im) for op, xt, im in zip(batch.operators, x, images, strict=True))
        if reference is not None:
            there = batch.images(reference.x)
            instead = problem.oracle(batch, reference.x, there)[1]
            gradients = tuple(g - a + b for g, a, b in zip(gradients, instead, reference.gradients, strict=True))
            products = tuple(bt - op.product(xt, im) + b for bt, op, xt, im, b in
                             zip(products, batch.operators, reference.x, there, reference.products, strict=True))
            grams = tuple(_sym(product(xt, bt.mT)) for xt, bt in zip(x, products, strict=True))
        return tuple(field_of(g, xt, bt, m, self.attraction, tangent="relative", normal=self.normal, inverse=q)
                     for g, xt, bt, m, q in zip(gradients, x, products, grams, inverses, strict=True)), grams

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

    def value(self, problem: BlockProblem, state: _State) -> Any:
        return problem.unpack(state.x)

    def metrics(self, problem: BlockProblem, state: _State) -> dict[str, Array]:
        """`step_size`: the smallest over the blocks in the last step, 0 at the start and for a rejected step. `field_norm`: of the estimate in the
        last step, infinite at the start. `rejected`: how many steps were.
        """
        return {"step_size": state.step_size, "field_norm": state.field_norm, "rejected": state.rejected}


def default_stochastic() -> StochasticLanding:
    """For data that are fed: preconditioned by the reference, steps that fall as 1/k from the 50th on, Newton-Schulz attraction, the safe step."""
    return StochasticLanding(Inverse(DEFAULT_START, DEFAULT_OFFSET), preconditioner="auto")
