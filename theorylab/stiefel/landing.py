r"""Landing: follow a field that decreases the objective along the manifold and the distance to it, without ever projecting."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core import checks
from theorylab.core.keys import Key
from theorylab.core.module import choice, number
from theorylab.core.problem import Method
from theorylab.core.psd import product
from theorylab.core.schedule import Schedule, at
from theorylab.errors import ArgumentError
from theorylab.stiefel.contract import Batch, BlockProblem, Blocks, Point, total
from theorylab.stiefel.fields import SOLVED, TANGENTS, _residual, _sym, field_of
from theorylab.stiefel.operators import TESTED, Dense, Identity, Operator
from theorylab.stiefel.safe_step import RULES, bounded_step, check_radius, decrease, exact_steps, moves

Array = jax.Array
CORRECTIONS = ("newton_schulz", "gradient", "correction")
ADAPTIVE_RADIUS = 0.1                   # of steps of own choice where no radius is given: 0.5 lets them wander where B is badly conditioned
FIRST_MOVE = 0.1                        # relative length of the first step of own choice


class _State(NamedTuple):
    point: Point
    field: Blocks
    step: Array
    step_size: Array
    following: Array


class Landing(Method):
    r"""The landing method with exact gradients (paper): $X \leftarrow X - \eta(\Psi + \omega N)$, matrix products only.

    One product with B and one gradient for each step; with `safe` the product is that of B with the field, and B X follows by linearity (one
    column of it is computed afresh in each step, so that round-off cannot add up).

    Args:
        step_size: the step $\eta$, a number or a schedule. None chooses each step from the two last fields (Barzilai and Borwein) within the safe
            step.
        attraction: the weight $\omega$ of the normal term. With `normal="newton_schulz"` keep $\eta\omega \le 1/2$, with `"gradient"`
            $\eta\,\omega\,\lambda_{\max}(B) < 1$.
        tangent: `"relative"` (matrix products only), `"relative_solved"` (B is factored once; the speed does not depend on its condition),
            `"plam"`, or `"riemannian"`, which off the manifold pushes away with the multiplier $X^\top G$: attraction must exceed its size.
        normal: `"newton_schulz"` (X h), `"gradient"` (B X h, as in the paper), or `"correction"`: a whole Newton-Schulz step after the
            tangent step, $h \to -\tfrac34 h^2 + \tfrac14 h^3$, which needs no attraction and keeps iterates practically feasible.
        safe: radius $\epsilon$ in (0, 1): steps are cut so that no block leaves $\lVert h\rVert_F \le \epsilon$. None does not cut.
        rule: how the safe step is found: `"exact"`, `"rigorous"`, or `"official"` (no bound; it also takes a radius of 1).
        margin: the fraction of the safe step that is used.

    Raises:
        ArgumentError: a number outside its range; `"correction"` with `"plam"` or `"riemannian"`, which are no tangents off the manifold.

    Example:
        >>> from theorylab.stiefel.eigen import GEVP
        >>> problem = GEVP(jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.diag(jnp.array([1.0, 2.0, 1.0])), p=1)
        >>> sol = tl.iterate(problem, Landing(0.3, safe=0.5), steps=200, stop=tl.Below("gap", 1e-10))
        >>> sol.status.name, round(abs(float(sol.value[0, 0])), 4)
        ('CONVERGED', 1.0)
    """

    step_size: Any = number(None, above=0.0)
    attraction: Any = number(1.0, low=0.0)
    tangent: str = choice("relative", among=TANGENTS)
    normal: str = choice("newton_schulz", among=CORRECTIONS)
    safe: Any = number(None)
    rule: str = choice("exact", among=RULES)
    margin: Any = number(0.9, above=0.0, high=1.0)
    factors: Any = None
    spectra: Any = None

    def __check_init__(self) -> None:
        if not isinstance(self.safe, Schedule):
            check_radius("Landing: safe", self.safe, self.rule)
        if self.normal == "correction" and self.tangent not in ("relative", "relative_solved"):
            raise ArgumentError(f"Landing: normal 'correction' needs the tangent 'relative' or 'relative_solved', got {self.tangent!r}")
        if self.step_size is None and self.rule != "exact":
            raise ArgumentError(f"Landing: rule must be 'exact' for steps of own choice (step_size=None), got {self.rule!r}")

    def prepare(self, problem: BlockProblem) -> Landing:
        operators = problem.exact().operators
        factors = tuple(factor_of(op) for op in operators) if self.tangent in SOLVED and self.factors is None else self.factors
        spectra = self.spectra
        if self.rule != "exact" and self.safe is not None and spectra is None:
            spectra = tuple((values[0], values[-1]) for values in (jnp.linalg.eigvalsh(op.matrix()) for op in operators))
        return self.replace(factors=factors, spectra=spectra)

    def check(self, problem: BlockProblem, x0: Any) -> None:
        """Refuse a start from which no safe step can be taken; see `BlockProblem.check_start`."""
        problem.check_start(x0, self.safe)

    def init(self, problem: BlockProblem, x0: Any, *, key: Key) -> _State:
        point = problem.at(problem.pack(x0))
        field = self._field(problem, point)
        length, size = (jnp.sqrt(total(jnp.sum(a**2) for a in blocks)) for blocks in (field, point.x))
        following = FIRST_MOVE * size / jnp.where(length > 0, length, jnp.ones_like(length))
        return _State(point, field, jnp.zeros((), jnp.int32), jnp.zeros_like(length), following)

    def step(self, problem: BlockProblem, state: _State, *, key: Key) -> _State:
        batch, point = problem.exact(), state.point
        eta = state.following if self.step_size is None else at(self.step_size, state.step)
        radius = ADAPTIVE_RADIUS if self.safe is None and self.step_size is None else at(self.safe, state.step)
        eta = jnp.broadcast_to(jnp.asarray(eta, state.step_size.dtype), (len(point.x),))
        if radius is None and self.normal != "correction":
            x = tuple(xt - e * f for xt, e, f in zip(point.x, eta, state.field, strict=True))
            images = batch.images(x)
        else:
            x, images, eta = self._guarded(batch, state, eta, radius)
        objective, gradients = problem.oracle(batch, x, images)
        after = Point(x, images, batch.grams(x, images), gradients, objective)
        field, used = self._field(problem, after), jnp.min(eta)
        following = adapted(state.field, field, used, state.step) if self.step_size is None else state.following
        return _State(after, field, state.step + 1, used, following)

    def _guarded(self, batch: Batch, state: _State, etas: Array, radius: Any) -> tuple[Blocks, Blocks, Array]:
        """The blocks moved by at most the safe step, with their images by linearity, and the steps."""
        blocks, moved = [], []
        for i, (op, xt, image, field) in enumerate(zip(batch.operators, state.point.x, state.point.images, state.field, strict=True)):
            row = state.step % xt.shape[0]
            fresh = op.image(jnp.concatenate([field, lax.dynamic_slice_in_dim(xt, row, 1)]))
            image_field = fresh[:-1]
            image = lax.dynamic_update_slice_in_dim(image, fresh[-1:], row, axis=0)
            w, z = moves(op.inner(xt, image, field, image_field), op.inner(field, image_field, field, image_field))
            if radius is not None and self.tangent in ("plam", "riemannian"):
                field, image_field, w, z = turned_back(xt, image, state.point.grams[i], field, image_field, w, z, radius, self.attraction)
            blocks.append((xt, image, field, image_field))
            moved.append((w, z))
        if radius is not None:
            etas = jnp.minimum(etas, self.margin * self._limits(batch, state, tuple(moved), radius, etas[0] / self.margin))
        x, images = [], []
        for (xt, image, field, image_field), (w, z), gram, eta in zip(blocks, moved, state.point.grams, etas, strict=True):
            xt, image = xt - eta * field, image - eta * image_field
            if self.normal == "correction":
                half = jnp.eye(gram.shape[-1], dtype=gram.dtype) - _residual(gram - eta * w + eta**2 * z) / 2
                xt, image = half @ xt, half @ image
            x.append(xt)
            images.append(image)
        return tuple(x), tuple(images), etas

    def _limits(self, batch: Batch, state: _State, moved: tuple[tuple[Array, Array], ...], radius: Any, largest: Array) -> Array:
        """The safe step of each block."""
        point = state.point
        if self.rule == "exact":
            return exact_steps(point.grams, moved, radius, largest)
        limits = []
        for op, xt, image, gram, field, spectrum in zip(batch.operators, point.x, point.images, point.grams, state.field, self.spectra, strict=True):
            bt = op.product(xt, image)
            slope = decrease(gram, _sym(product(bt, bt.mT)), self.normal)
            limits.append(bounded_step(gram, slope, jnp.sum(field**2), radius, largest, self.rule, self.attraction, *spectrum))
        return jnp.stack(limits)

    def _field(self, problem: BlockProblem, point: Point) -> Blocks:
        """The field of each block; its tangent term alone where the correction follows the step."""
        pull = jnp.zeros_like(point.objective) if self.normal == "correction" else self.attraction
        normal = "newton_schulz" if self.normal == "correction" else self.normal
        field = []
        for i, op in enumerate(problem.exact().operators):
            xt, gt = point.x[i], point.gradients[i]
            solved = solve_with(self.factors[i], gt) if self.tangent in SOLVED else None
            field.append(field_of(gt, xt, op.product(xt, point.images[i]), point.grams[i], pull, tangent=self.tangent, normal=normal,
                                  solved=solved))
        return tuple(field)

    def value(self, problem: BlockProblem, state: _State) -> Any:
        return problem.unpack(state.point.x)

    def measure(self, problem: BlockProblem, state: _State) -> dict[str, Array]:
        """The metrics of the problem from the products that the state holds."""
        return problem.judge(state.point)

    def metrics(self, problem: BlockProblem, state: _State) -> dict[str, Array]:
        """`step_size`: the smallest over the blocks in the last step, 0 at the start. `field_norm`: the norm of the field at the iterate."""
        return {"step_size": state.step_size, "field_norm": jnp.sqrt(total(jnp.sum(a**2) for a in state.field))}

    def cost(self, problem: BlockProblem) -> dict[str, float]:
        return {"gradients": 1.0}


def default_landing(problem: BlockProblem) -> Landing:
    """Steps of own choice and Newton-Schulz corrections; with a factored B where it is a matrix of at most 1024 rows."""
    small = all(isinstance(op, (Dense, Identity)) and op.dim <= TESTED for op in problem.exact().operators)
    return Landing(tangent="relative_solved" if small else "relative", normal="correction")


def factor_of(operator: Operator) -> Array | None:
    """The lower Cholesky factor of B; None for the identity."""
    return None if isinstance(operator, Identity) else jnp.linalg.cholesky(operator.matrix())


def solve_with(lower: Array | None, gt: Array) -> Array:
    """(B⁻¹ g)ᵀ from the Cholesky factor of B."""
    if lower is None:
        return gt
    half = lax.linalg.triangular_solve(lower, gt, left_side=False, lower=True, transpose_a=True)
    return lax.linalg.triangular_solve(lower, half, left_side=False, lower=True)


def turned_back(xt: Array, image: Array, gram: Array, field: Array, image_field: Array, w: Array, z: Array, radius: Any,
                attraction: Any) -> tuple[Array, Array, Array, Array]:
    """The field, its image, W and Z; those of the normal term X h alone where the field would lead further out from outside the radius.

    A field whose tangent term is not tangent in the metric at hand (a sampled B, or another direction) may increase the distance to first order.
    """
    h = _residual(gram)
    away = (jnp.sum(h**2) >= radius**2) & (jnp.sum(h * w) <= 0)
    pull = jnp.where(attraction > 0, attraction, 1.0).astype(h.dtype) * h
    instead = pull @ xt, pull @ image, 2 * _sym(product(pull, gram)), _sym(product(pull, gram, pull))
    return tuple(jnp.where(away, new, old) for new, old in zip(instead, (field, image_field, w, z), strict=True))  # type: ignore[return-value]


def adapted(before: Blocks, after: Blocks, used: Array, step: Array) -> Array:
    """The next step size from two fields and the step between them: the long and the short form of Barzilai and Borwein in turn."""
    change = tuple(a - b for a, b in zip(before, after, strict=True))
    inner = lambda one, two: total(jnp.sum(a * b) for a, b in zip(one, two, strict=True))  # noqa: E731
    length, along, turn = inner(before, before), jnp.abs(inner(before, change)), inner(change, change)
    steady = (along > 0) & (turn > 0)
    safe = lambda a: jnp.where(steady, a, jnp.ones_like(a))  # noqa: E731
    ratio = jnp.where(step % 2 == 0, safe(length) / safe(along), safe(along) / safe(turn))
    return jnp.where(steady, used * ratio, 2 * used)


def check_radius_argument(name: str, radius: Any) -> None:
    """None, a schedule, or a number in (0, 1)."""
    if radius is not None and not isinstance(radius, Schedule) and checks.known(radius):
        check_radius(name, radius, "exact")
