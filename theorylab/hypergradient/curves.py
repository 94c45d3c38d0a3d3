"""Errors measured along a path of inner iterates, and the order of an estimator against the one that theory predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core import checks, tree
from theorylab.errors import ArgumentError, ShapeError
from theorylab.hypergradient.analysis import predicted
from theorylab.hypergradient.contract import BilevelProblem
from theorylab.hypergradient.estimators import Estimator, Plain, as_estimator, compiled, flat_point
from theorylab.hypergradient.inner import reference
from theorylab.lab.rates import fit_rate

Array = jax.Array
FLOOR = 1e-13


class ErrorCurve(NamedTuple):
    """Errors along a path of inner iterates.

    Attributes:
        inner: distance of each iterate to the inner solution, shape (K,).
        outer: error of the estimator there, shape (K,); NaN where it failed.
        estimate: its own estimate of the error of the plain formula, shape (K,), or None.
        status: shape (K,).
        gradient: the hypergradient at the solution, shape (m,).
    """

    inner: Array
    outer: Array
    estimate: Any
    status: Array
    gradient: Array


def _errors(estimator: Estimator, problem: Any, path: Array, y: Array, solution: Array) -> tuple[ErrorCurve, Array]:
    exact = Plain().estimate(problem, solution, y).value
    found = lax.map(lambda x: estimator.estimate(problem, x, y), path)
    away, error = path - solution, found.value - exact
    return ErrorCurve(jnp.linalg.norm(away, axis=1), jnp.linalg.norm(error, axis=1), found.error_estimate, found.status, exact), error


def error_curve(problem: Any, path: Any, y: Any, estimator: Estimator | Mapping[str, Estimator] | None = None, *, solution: Any = None) -> Any:
    r"""The error of an estimator against the inner error, along a path of inner iterates.

    Args:
        problem: a bilevel problem.
        path: inner iterates, shape (K, n), as `record=tl.whole` keeps them.
        y: hyper-parameters, like the problem's y.
        estimator: an estimator, or a dictionary of named ones; `OnePoint()` unless given.
        solution: the inner solution, like the problem's x; `reference` finds it from the last iterate unless given. It is finished by three
            Newton steps, because an error in it bends the curve at its end.

    Returns:
        An `ErrorCurve`, or a dictionary of them. `tl.fit_rate(curve.inner, curve.outer, within=...)` fits the order: 1 for plain estimators,
        2 for super-efficient ones.

    Raises:
        ShapeError: path or y does not match the problem.
        NonFiniteInputError: NaN or infinity.
        ArgumentError: no estimator.
        NotConvergedError: the inner solution was not found.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> path = jnp.arcsinh(1.0) + jnp.geomspace(1e-3, 1e-1, 5)[:, None]
        >>> curves = hg.error_curve(problem, path, 1.0, {"plain": hg.Plain(), "one-point": hg.OnePoint()})
        >>> [round(tl.fit_rate(c.inner, c.outer).slope) for c in curves.values()]
        [1, 2]
    """
    problem, path, flat_y, chosen, x = _measured_on(problem, path, y, estimator, solution)
    curves = {name: compiled(_errors, how, problem, path, flat_y, x)[0] for name, how in chosen.items()}
    return curves if isinstance(estimator, Mapping) else curves[""]


def _solution(problem: Any, y: Array, near: Any) -> Array:
    return problem.pack_x(reference(problem, y, near))


def _measured_on(problem: Any, path: Any, y: Any, estimator: Any, solution: Any) -> tuple[Any, Array, Array, dict[str, Estimator], Array]:
    chosen = {name: as_estimator(how) for name, how in estimator.items()} if isinstance(estimator, Mapping) else {"": as_estimator(estimator)}
    path = checks.array("path", path)
    if path.ndim != 2:
        raise ShapeError(f"path must have shape (K, n), one iterate in each row, got {path.shape}")
    problem, _, flat_y = flat_point(problem, path[0], y)
    return problem, path, flat_y, chosen, _solution(problem, flat_y, path[-1] if solution is None else solution)


class Order(NamedTuple):
    """The order of an estimator at a solution, observed and predicted.

    Attributes:
        super_efficient: whether the predicted error has no term of first order.
        slope: of log error against log distance; NaN where fewer than two errors are above round-off (the estimator is exact there).
        predicted: coefficient of the leading term along the direction, shape (m,).
        observed: error over distance to the power 1 (or 2 where super-efficient), shape (K, m); tends to `predicted` as the distance falls.
        distances: shape (K,).
        errors: norms of the errors, shape (K,).
    """

    super_efficient: bool
    slope: float
    predicted: np.ndarray
    observed: np.ndarray
    distances: np.ndarray
    errors: np.ndarray


def check_super_efficiency(estimator: Estimator, problem: Any, y: Any, *, solution: Any = None, direction: Any = None,
                           distances: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4)) -> Order:
    r"""Compare the error of an estimator at $x^* + t d$ with the leading term that theory predicts, a sharper test than a slope.

    An estimator is super-efficient if its error is quadratic in the inner error (paper).

    Args:
        estimator: an estimator.
        problem: a bilevel problem.
        y: hyper-parameters, like the problem's y.
        solution: the inner solution, like the problem's x; found unless given.
        direction: d, like the problem's x; normalized; random unless given.
        distances: values of t.

    Raises:
        ArgumentError: no estimator; d is 0; fewer than two distances, or one not above 0.
        NotConvergedError: the inner solution was not found.

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> order = hg.check_super_efficiency(hg.OnePoint(), problem, 1.0, direction=1.0)
        >>> order.super_efficient, round(order.slope, 1), order.predicted.round(4).tolist()
        (True, 2.0, [-0.1768])
    """
    if estimator is None:
        raise ArgumentError("estimator must be an estimator such as OnePoint(), got None")
    estimator = as_estimator(estimator)
    t = np.asarray(distances, float)
    if t.ndim != 1 or t.size < 2 or not (t > 0).all():
        raise ArgumentError(f"distances must be at least two positive numbers, got {distances!r}")
    if isinstance(problem, BilevelProblem):
        problem = problem.shaped(direction if solution is None else solution, y)
    problem, _, flat_y = flat_point(problem, jnp.zeros(problem.n, problem.dtype), y)
    d = jax.random.normal(jax.random.key(0), (problem.n,), problem.dtype) if direction is None else problem.pack_x(direction)
    if not float(tree.norm(d)) > 0:
        raise ArgumentError("direction must not be 0")
    d = d / tree.norm(d)
    x = _solution(problem, flat_y, solution)
    first, second = compiled(predicted, estimator, problem, x, flat_y, d)
    plain_first = compiled(predicted, Plain(), problem, x, flat_y, d).first
    quadratic = float(tree.norm(first)) <= float(jnp.finfo(x.dtype).eps) ** 0.5 * float(tree.norm(plain_first))
    curve, error = compiled(_errors, estimator, problem, x + jnp.asarray(t, x.dtype)[:, None] * d, flat_y, x)
    size, observed = np.asarray(curve.outer, float), np.asarray(error, float) / t[:, None] ** (2 if quadratic else 1)
    above = size > FLOOR * max(1.0, float(tree.norm(curve.gradient)))
    slope = fit_rate(t[above], size[above]).slope if above.sum() >= 2 else float("nan")
    return Order(quadratic, slope, np.asarray(second if quadratic else first), observed, t, size)
