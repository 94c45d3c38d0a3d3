"""How good a point is: gaps, residuals and proved bounds; and the central path as an oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.acvi import intersection
from theorylab.acvi.constraints import Nonnegative
from theorylab.acvi.problem import Inequality, MatrixGame
from theorylab.acvi.prox import like
from theorylab.core import checks
from theorylab.errors import ArgumentError, NoClosedFormError

Array = jax.Array
PATH_RATIO = 0.3
PATH_NEWTON = 60
PATH_STAGES = 400
ASCENT_STEPS = 20_000


def _point(problem: Any, x: Any, name: str = "x") -> Array:
    if not isinstance(problem, Inequality):
        raise ArgumentError(f"problem must be a variational inequality or a MatrixGame, got {type(problem).__name__}")
    return checks.array(name, x, (problem.dim,))


def gap(problem: Inequality, x: Any) -> Array:
    r"""The gap $\max_{x' \in C}\langle F(x), x - x'\rangle = \langle F(x), x\rangle + \sigma_C(-F(x))$.

    At a feasible point it is at least 0, and 0 exactly at the solutions; at an infeasible one it may be negative, so `repair` first.

    Raises:
        NoClosedFormError: the support function of the feasible set is not available.

    Example:
        >>> gap(MatrixGame(jnp.eye(2)), jnp.array([1.0, 0.0, 0.5, 0.5])).item()
        0.5
    """
    x = _point(problem, x)
    force = problem.operator(x)
    return force @ x + problem.support(-force)


def saddle_gap(game: MatrixGame, x: Any) -> Array:
    r"""The saddle gap $\max_j (A^\top x_1)_j - \min_i (A x_2)_i$ of a matrix game; equal to `gap`, because the game is bilinear.

    Raises:
        NoClosedFormError: not a MatrixGame.

    Example:
        >>> saddle_gap(MatrixGame(jnp.eye(2)), jnp.array([0.5, 0.5, 0.5, 0.5])).item()
        0.0
    """
    x = _point(game, x)
    if not isinstance(game, MatrixGame):
        raise NoClosedFormError(f"saddle_gap is known for MatrixGame, got {type(game).__name__}; use gap")
    low, high = game.value_interval(x)
    return high - low


def minty_gap(problem: Inequality, x: Any) -> Array:
    r"""The Minty gap $\max_{x' \in C}\langle F(x'), x - x'\rangle$ of an affine problem; at most `gap` if F is monotone.

    The maximum of a concave quadratic: for a skew matrix the closed form of `gap`, else by accelerated projected ascent, to round-off of the
    projected gradient.

    Raises:
        NoClosedFormError: the operator is not affine; then the maximum is not that of a concave function.

    Example:
        >>> minty_gap(MatrixGame(jnp.eye(2)), jnp.array([1.0, 0.0, 0.5, 0.5])).item()
        0.5
    """
    x = _point(problem, x)
    if isinstance(problem, MatrixGame):
        return gap(problem, x)
    if not problem.is_affine:
        raise NoClosedFormError(f"minty_gap is known for affine operators, got {type(problem).__name__}; use gap")
    return _ascend(problem, x)


@jax.jit
def _ascend(problem: Inequality, x: Array) -> Array:
    """The Minty gap of an affine problem."""
    M, q = problem.matrix, problem.offset
    bend = M + M.T
    length = jnp.max(jnp.abs(jnp.linalg.eigvalsh(bend)))
    flat = length <= 10 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(M))
    step = 1 / jnp.where(flat, jnp.ones_like(length), length)
    height = lambda z: (M @ z + q) @ (x - z)  # noqa: E731
    slope = lambda z: M.T @ (x - z) - M @ z - q  # noqa: E731
    small = 8 * jnp.finfo(x.dtype).eps * (1 + jnp.linalg.norm(x))

    def ascend(state: tuple) -> tuple:
        z, ahead, pace, _, k = state
        new = problem.project(ahead + step * slope(ahead))
        pace = jnp.where((new - z) @ (ahead - new) > 0, jnp.ones_like(pace), pace)  # moving against the momentum: start it afresh
        after = (1 + jnp.sqrt(1 + 4 * pace * pace)) / 2
        return new, new + ((pace - 1) / after) * (new - z), after, jnp.linalg.norm(new - ahead) + jnp.linalg.norm(new - z), k + 1

    start = problem.repair(x)
    state = (start, start, jnp.ones((), x.dtype), like(jnp.inf, x), jnp.zeros((), jnp.int32))
    best, *_ = lax.while_loop(lambda s: ~flat & (s[3] > small) & (s[4] < ASCENT_STEPS), ascend, state)
    closed = problem.support(M.T @ x - q) + q @ x if problem.certified else like(jnp.nan, x)
    return jnp.where(flat, closed, height(best))


def natural_residual(problem: Inequality, x: Any) -> Array:
    r"""The natural residual $|x - \Pi_C(x - F(x))|$: 0 exactly at the solutions, for any x.

    Example:
        >>> natural_residual(MatrixGame(jnp.eye(2)), jnp.array([0.5, 0.5, 0.5, 0.5])).item()
        0.0
    """
    x = _point(problem, x)
    return jnp.linalg.norm(x - problem.project(x - problem.operator(x)))


def repair(problem: Inequality, x: Any) -> Array:
    """A feasible point near `x`: simplices are clipped at 0 and rescaled, other sets are projected onto. Its gap is a certificate.

    Example:
        >>> repair(MatrixGame(jnp.eye(2)), jnp.array([0.5, -0.5, 1.0, 1.0])).tolist()
        [1.0, 0.0, 0.5, 0.5]
    """
    return problem.repair(_point(problem, x))


class Certificate(NamedTuple):
    """A proved bound.

    Attributes:
        bound: an upper bound of the gap at `point`.
        point: what the bound is about.
        value_interval: the interval that holds the value of a matrix game, shape `(2,)`; None for other problems.
    """

    bound: Array
    point: Array
    value_interval: Array | None


def certificate(problem: Inequality, x: Any, y: Any = None, multiplier: Any = None, change: Any = None, *, mu: Any = 0.0,
                x_error: Any = None, y_error: Any = None, sharp: bool = False) -> Certificate:
    r"""A bound of the gap, from the point alone or from the quantities of an ACVI iteration.

    With `x` alone the point is repaired and its gap evaluated. With the iteration's $y_{k+1}$, $\lambda_{k+1}$ and $s = \beta(y_{k+1} - y_k)$ the
    bound of the gap at $x_{k+1}$ is
    $$ m\mu - \langle\lambda, x - y\rangle + \sigma_C(s) - \langle s, x\rangle, $$
    plus $\langle e_x, x\rangle + \sigma_C(-e_x)$ and $\langle e_y, y\rangle + \sigma_C(-e_y)$ if the two steps left the residuals
    $e_x = \beta G(x)$ and $e_y = \nabla B_\mu(y) - \lambda$. No operator is evaluated. Source: companion derivation.

    Args:
        problem: the variational inequality.
        x: the point; for the second form it satisfies the equality.
        y: the iterate inside the inequalities.
        multiplier: $\lambda$, which is the gradient of the barrier at y up to `y_error`.
        change: penalty times the last move of y.
        mu: weight of the barrier; 0 for the projected form.
        x_error: $e_x$, shape `(n,)`, in the precision of x.
        y_error: $e_y$.
        sharp: replace $m\mu$ by $\sigma_C(\lambda) - \langle\lambda, y\rangle$, which is never larger and is tight on convergence.

    Raises:
        ArgumentError: only some of y, multiplier and change are given.
        NoClosedFormError: the support function of the feasible set is not available.

    Example:
        >>> certificate(MatrixGame(jnp.eye(2)), jnp.array([1.0, 0.0, 0.5, 0.5])).value_interval.tolist()
        [0.5, 1.0]
    """
    x = _point(problem, x)
    given = [a is not None for a in (y, multiplier, change)]
    if any(given) != all(given):
        raise ArgumentError("certificate needs y, multiplier and change together, or none of them")
    if not any(given):
        if any(a is not None for a in (x_error, y_error)) or sharp:
            raise ArgumentError("x_error, y_error and sharp belong to the form with y, multiplier and change")
        x = problem.repair(x)
        return Certificate(jnp.maximum(gap(problem, x), 0), x, problem.value_interval(x) if isinstance(problem, MatrixGame) else None)
    y, multiplier, change = _point(problem, y, "y"), _point(problem, multiplier, "multiplier"), _point(problem, change, "change")
    terms = like(mu, x) * problem.constraints.barrier_terms(problem.dim)
    first = problem.support(multiplier) - multiplier @ y if sharp else terms
    bound = first - multiplier @ (x - y) + problem.support(change) - change @ x
    for name, error, at in (("x_error", x_error, x), ("y_error", y_error, y)):
        if error is not None:
            error = _point(problem, error, name)
            bound = bound + error @ at + problem.support(-error)
    interval = problem.value_interval(problem.repair(x)) if isinstance(problem, MatrixGame) else None
    return Certificate(bound, x, interval)


def central_path(problem: Inequality, mus: Any, *, barrier: str = "log") -> Array:
    r"""Points of the central path: the solutions of $F(x) + \nabla B_\mu(x) + C^\top\nu = 0$, $C x = d$, strictly inside.

    Newton's method on these equations along falling mu, each stage started on the tangent of the path. As mu goes to 0 the path of the log
    barrier tends to the analytic centre of the solutions, that of the entropy to the solution of largest entropy (companion derivation).
    Dense: $O((n + p)^3)$ a step.

    Args:
        problem: a monotone variational inequality with an equality that has a matrix.
        mus: the weights, shape `(k,)`, each above 0, in any order; or one number.
        barrier: `"log"`, or `"entropy"` ($\mu\sum_i x_i\log x_i$, for `Nonnegative` constraints).

    Returns:
        The points, shape `(k, n)`, or `(n,)` for one number; NaN where Newton's method failed, as it may on degenerate games for mu below 1e-9.

    Raises:
        ArgumentError: a weight is not above 0, or the entropy barrier on other constraints than `Nonnegative`.

    Example:
        >>> from theorylab.acvi.games import constrained_bilinear
        >>> central_path(constrained_bilinear(), [0.1])[0].round(6).tolist()
        [-0.097428, 0.290458]
    """
    if not isinstance(problem, Inequality):
        raise ArgumentError(f"problem must be a variational inequality or a MatrixGame, got {type(problem).__name__}")
    single = np.ndim(mus) == 0
    mus = checks.array("mus", mus, () if single else (None,)).reshape(-1)
    checks.among("barrier", barrier, ("log", "entropy"))
    if barrier == "entropy" and not isinstance(problem.constraints, Nonnegative):
        raise ArgumentError(f"the entropy barrier needs Nonnegative constraints, got {type(problem.constraints).__name__}")
    if checks.known(mus) and not bool(jnp.all(mus > 0)):
        raise ArgumentError(f"mus must be above 0, got {np.asarray(mus).min():g}")
    points = _central_path(problem.start(jax.random.key(0)), mus, problem, barrier)
    return points[0] if single else points


@partial(jax.jit, static_argnames="barrier")
def _central_path(start: Array, mus: Array, problem: Inequality, barrier: str) -> Array:
    rows, level = (like(a, start) for a in problem.equality.normal_rows())
    kept = jnp.sum(rows * rows, axis=1) > 0.5  # a redundant row is 0: its multiplier stays 0
    mus, n = like(mus, start), problem.dim
    entropic = barrier == "entropy"
    place = jnp.exp if entropic else (lambda z: z)

    def residual(z: Array, mu: Array) -> Array:
        x, nu = place(z[:n]), z[n:]
        force = problem.operator(x) + rows.T @ nu
        force = force + mu * (1 + z[:n] if entropic else problem.constraints.barrier_gradient(x))
        return jnp.concatenate([force, jnp.where(kept, rows @ x - level, nu)])

    def inside(z: Array) -> Array:
        return jnp.asarray(True) if entropic else problem.constraints.slack(z[:n]) > 0

    order = jnp.argsort(-mus)
    inner = problem.constraints.interior_point(n) if barrier == "log" else start
    inner = jnp.where(problem.constraints.slack(start) > 0, start, like(inner, start))
    first = jnp.concatenate([jnp.log(inner) if entropic else inner, jnp.zeros_like(level)])
    points = follow_path(residual, inside, first, mus[order])
    return jnp.zeros_like(points[:, :n]).at[order].set(place(points[:, :n]))


def follow_path(residual: Callable, inside: Callable, z: Array, mus: Array) -> Array:
    """The roots of `residual(., mu)` where `inside` holds, along the falling `mus`; NaN where a Newton step would still move."""
    eps = jnp.finfo(z.dtype).eps

    def longest(z: Array, move: Array, accept: Callable) -> Array:
        return lax.while_loop(lambda a: ~accept(z + a * move, a) & (a > 1e-12), lambda a: a / 2, jnp.ones((), z.dtype))

    def newton(z: Array, mu: Array) -> Array:
        def step(state: tuple) -> tuple:
            z, size, k, _ = state
            value = residual(z, mu)
            move = -jnp.linalg.solve(jax.jacfwd(residual)(z, mu), value)
            fits = lambda new, a: inside(new) & (jnp.linalg.norm(residual(new, mu)) <= (1 - 0.01 * a) * size)  # noqa: E731
            a = longest(z, move, fits)
            new = z + a * move
            good = fits(new, a)
            z = jnp.where(good, new, z)
            return z, jnp.where(good, jnp.linalg.norm(residual(new, mu)), size), k + 1, ~good

        size = jnp.linalg.norm(residual(z, mu))
        state = (z, size, jnp.zeros((), jnp.int32), ~jnp.isfinite(size))
        return lax.while_loop(lambda s: ~s[3] & (s[2] < PATH_NEWTON), step, state)[0]

    def stage(state: tuple) -> tuple:
        z, mu, target, k = state
        after = jnp.where(k < 0, mu, jnp.maximum(target, PATH_RATIO * mu))  # the first stage finds the path, the others follow its tangent
        slopes, change = jax.jacfwd(residual)(z, mu), jax.jvp(lambda m: residual(z, m), (mu,), (jnp.ones_like(mu),))[1]
        move = jnp.where(k < 0, jnp.zeros_like(z), (mu - after) * jnp.linalg.solve(slopes, change))
        a = longest(z, move, lambda new, a: inside(new + 0.01 * a * move))
        z = jnp.where(inside(z + a * move), z + a * move, z)
        return newton(z, after), after, target, k + 1

    def reach(carry: tuple[Array, Array, Array], target: Array) -> tuple[tuple[Array, Array, Array], Array]:
        z, mu, k = carry
        z, mu, _, k = lax.while_loop(lambda s: (s[3] < 0) | (s[1] > s[2]) & (s[3] < PATH_STAGES), stage, (z, mu, target, k))
        left = jnp.linalg.solve(jax.jacfwd(residual)(z, mu), residual(z, mu))
        exact = inside(z) & (jnp.linalg.norm(left) <= eps**0.5 * (1 + jnp.linalg.norm(z)))
        return (z, mu, k), jnp.where(exact, z, like(jnp.nan, z))

    start = (z, jnp.maximum(mus[0], 1), jnp.full((), -1, jnp.int32))
    return lax.scan(reach, start, mus)[1]


def quantal_response(game: Inequality, mu: Any) -> Array:
    r"""The logit quantal-response equilibrium: $x_1 = \mathrm{softmax}(-A x_2/\mu)$, $x_2 = \mathrm{softmax}(A^\top x_1/\mu)$.

    It is the point of the entropy barrier's central path; its gap is at most $\mu(\log n_1 + \log n_2)$, and as mu goes to 0 it tends to the
    equilibrium of largest entropy (companion derivation). On other problems over simplices: each block is the softmax of $-F(x)/\mu$.

    Args:
        game: a MatrixGame or another problem over simplices.
        mu: the temperature, above 0.

    Raises:
        ArgumentError: the feasible set is no product of simplices, or `mu` is not above 0.

    Example:
        >>> quantal_response(MatrixGame(jnp.array([[2.0, 0.0], [0.0, 1.0]])), 1e-4).round(2).tolist()
        [0.33, 0.67, 0.33, 0.67]
    """
    if not isinstance(game, Inequality) or not intersection.is_simplex(game.constraints, game.equality):
        raise ArgumentError(f"quantal_response needs a problem over simplices such as MatrixGame, got {type(game).__name__}")
    checks.real("mu", mu, above=0.0)
    return central_path(game, jnp.asarray(mu, game.dtype)[None], barrier="entropy")[0]
