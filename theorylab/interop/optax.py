"""Optax: the landing field as a gradient transformation, and any optax optimizer as a method of `iterate`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from theorylab.core import checks
from theorylab.core.keys import Key
from theorylab.core.module import choice
from theorylab.core.problem import Method, Problem
from theorylab.errors import ArgumentError, ShapeError
from theorylab.stiefel.contract import BlockProblem
from theorylab.stiefel.fields import NORMALS, _gram, _residual, field_of, two_sample_of
from theorylab.stiefel.operators import Operator, as_operator
from theorylab.stiefel.safe_step import check_radius, exact_step, moves

Array = jax.Array
MARGIN = 0.9


class TwoSamples(NamedTuple):
    """Two independent sets of rows for one leaf: the two factors B of the field then come from different samples.

    Example:
        >>> TwoSamples(jnp.ones((4, 2)), jnp.ones((3, 2))).second.shape
        (3, 2)
    """

    first: Any
    second: Any


class LandingState(NamedTuple):
    """State of `landing`: how many updates were made."""

    count: Array


def landing(learning_rate: Any, attraction: Any = 1.0, constraint: Any = True, *, normal: str = "newton_schulz",
            safe: float | None = None) -> optax.GradientTransformationExtraArgs:
    r"""The landing field (paper) on the leaves of a pytree that shall satisfy $X^\top B X = I$; other leaves follow plain gradient descent.

    `update(gradients, state, params)` takes Euclidean gradients and returns updates for `optax.apply_updates`. In a chain it stands last: what
    comes before it acts on the Euclidean gradient, and the field that is made of the result is tangent again. Constrained leaves have shape
    `(..., n, p)`; leading axes hold separate matrices with the same B.

    Args:
        learning_rate: the step $\eta$, a number or a schedule of optax or of this package.
        attraction: the weight $\omega$ of the normal term, or `"auto"`: $1/(2\eta)$, a Newton-Schulz step in each update, for B without noise.
        constraint: a prefix of the parameters' pytree with leaves False (free), True (B = I), a matrix, rows of data ($B = A^\top A / r$), a function
            X -> B X, or an operator. `update(..., constraint=...)` takes another one for that update, such as the rows of the batch, with
            `TwoSamples` as one more kind of leaf.
        normal: `"newton_schulz"` (X h) or `"gradient"` (B X h).
        safe: radius in (0, 1): steps are cut so that no leaf leaves $\lVert h\rVert_F \le \epsilon$. None does not cut.

    Raises:
        ArgumentError: a number outside its range, or `"auto"` with the normal term `"gradient"`.
        ShapeError: in `update`, a constrained leaf is no tall matrix; transpose it, or mark it False.

    Example:
        >>> params = {"w": 1.1 * jnp.eye(3, 2), "b": jnp.zeros(2)}
        >>> tx = landing(0.5, constraint={"w": True, "b": False})
        >>> state = tx.init(params)
        >>> for _ in range(30):
        ...     updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        ...     params = jax.tree.map(jnp.add, params, updates)
        >>> params["w"].round(6).tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    checks.among("normal", normal, NORMALS)
    if not callable(learning_rate):
        checks.real("learning_rate", learning_rate, above=0.0)
    if isinstance(attraction, str):
        checks.among("attraction", attraction, ("auto",))
        if normal == "gradient":
            raise ArgumentError("attraction must be a number for normal 'gradient': the size of B sets its scale")
    else:
        checks.real("attraction", attraction, low=0.0)
    if safe is not None:
        check_radius("safe", safe, "exact")

    def init(params: Any) -> LandingState:
        return LandingState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, LandingState]:
        if params is None:
            raise ValueError("landing needs the parameters: call update(gradients, state, params)")
        eta: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        pull = 1 / (2 * eta) if isinstance(attraction, str) else attraction

        def below(kind: Any, gradients: Any, points: Any) -> Any:
            return jax.tree.map(lambda g, x: _moved(kind, g, x, eta, pull, normal, safe), gradients, points)

        now = extra.get("constraint")
        moved = jax.tree.map(below, constraint if now is None else now, updates, params, is_leaf=_is_constraint)
        return moved, LandingState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_constraint(value: Any) -> bool:
    return isinstance(value, (bool, Operator, TwoSamples)) or callable(value)


def _moved(kind: Any, gradient: Array, x: Array, eta: Any, pull: Any, normal: str, safe: Any) -> Array:
    """The update of one leaf."""
    if kind is False:
        return (-jnp.asarray(eta, gradient.dtype) * gradient).astype(gradient.dtype)
    if x.ndim < 2 or x.shape[-1] > x.shape[-2]:
        raise ShapeError(f"a constrained leaf must have shape (..., n, p) with p at most n, got {x.shape}; transpose it, or mark it False")
    dtype = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    pair = kind if isinstance(kind, TwoSamples) else (kind,)
    operators = [as_operator("constraint", None if k is True else k, x.shape[-2], dtype=dtype) for k in pair]

    def one(gt: Array, xt: Array) -> Array:
        seen = [(op, op.image(xt)) for op in operators]
        products = [op.product(xt, image) for op, image in seen]
        grams = [_gram(xt, bt) for bt in products]
        if len(products) == 2:
            field = two_sample_of(gt, xt, products[0], products[1], pull, normal=normal)
        else:
            field = field_of(gt, xt, products[0], grams[0], pull, tangent="relative", normal=normal)
        step = jnp.asarray(eta, dtype)
        if safe is not None:
            for (op, image), gram in zip(seen, grams, strict=True):
                ahead = op.image(field)
                w, z = moves(op.inner(xt, image, field, ahead), op.inner(field, ahead, field, ahead))
                step = jnp.minimum(step, MARGIN * exact_step(_residual(gram), w, z, safe, step / MARGIN))
        return -step * field

    flat = [a.astype(dtype).reshape(-1, *a.shape[-2:]).mT for a in (gradient, x)]
    return jax.vmap(one)(*flat).mT.reshape(x.shape).astype(x.dtype)


class _State(NamedTuple):
    x: Any
    inner: Any


class OptaxMethod(Method):
    """An optax optimizer as a method: `iterate(problem, OptaxMethod(optax.adam(1e-2)), ...)`.

    The gradient is the one the problem gives (the oracle of a Stiefel problem on its batch, or a method `gradient`), else the derivative of its
    metric `objective`. Optimizers that ask for more get `value`, `grad`, `value_fn` and, for Stiefel problems, `constraint`, the operators B of the
    data or of the batch, which `landing` uses. Another `tx` recompiles; `optax.inject_hyperparams` keeps its numbers in the state.

    Args:
        tx: a gradient transformation that returns updates to be added.

    Raises:
        ArgumentError: tx is none, or the problem measures no `objective`.

    Example:
        >>> import optax
        >>> from theorylab import stiefel
        >>> problem = stiefel.GEVP(jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.diag(jnp.array([1.0, 2.0, 1.0])), p=1)
        >>> tl.iterate(problem, OptaxMethod(landing(0.3)), steps=500, stop=tl.Below("gap", 1e-8)).status.name
        'CONVERGED'
    """

    tx: Any = choice()

    def __check_init__(self) -> None:
        if not callable(getattr(self.tx, "init", None)) or not callable(getattr(self.tx, "update", None)):
            raise ArgumentError(f"OptaxMethod: tx must be an optax gradient transformation, got {self.tx!r}")

    def init(self, problem: Problem, x0: Any, *, key: Key) -> _State:
        return _State(x0, self.tx.init(x0))

    def step(self, problem: Any, state: _State, *, key: Key) -> _State:
        x, extra = state.x, {}
        if isinstance(problem, BlockProblem):
            batch = problem.exact() if problem.batch is None else problem.batch
            extra["constraint"] = batch.operators[0] if problem.single else batch.operators

            def value_fn(x: Any) -> Array:
                blocks = problem.pack(x)
                return problem.oracle(batch, blocks, batch.images(blocks))[0]

            blocks = problem.pack(x)
            value, gradients = problem.oracle(batch, blocks, batch.images(blocks))
            gradient = problem.unpack(gradients)
        else:
            value_fn = lambda x: _objective(problem, x)  # noqa: E731
            value = value_fn(x)
            gradient = problem.gradient(x) if hasattr(problem, "gradient") else jax.grad(value_fn)(x)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its counts with numbers
            tx = optax.with_extra_args_support(self.tx)
            updates, inner = tx.update(gradient, state.inner, x, value=value, grad=gradient, value_fn=value_fn, **extra)
            return _State(optax.apply_updates(x, updates), inner)

    def value(self, problem: Problem, state: _State) -> Any:
        return state.x

    def cost(self, problem: Problem) -> dict[str, float]:
        return {"gradients": 1.0}


def _objective(problem: Problem, x: Any) -> Array:
    row = problem.metrics(x)
    if "objective" not in row:
        raise ArgumentError(f"OptaxMethod needs a problem that measures its objective, {type(problem).__name__} measures "
                            f"{', '.join(row) or 'nothing'}")
    return row["objective"]
