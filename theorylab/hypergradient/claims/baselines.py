"""Baselines: truncated series, unrolled descent, and minibatches of the Hessian."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core.keys import stream
from theorylab.hypergradient.baselines import Neumann, Unrolled
from theorylab.hypergradient.claims._programs import DERIVED, draw, norms, penalties, ridge
from theorylab.hypergradient.claims.family import Parts
from theorylab.hypergradient.estimators import compiled
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check


def _pair(problem: Any, how: Any, x: Any, y: Any) -> list:
    return [one.estimate(problem, x, y).value for one in how]


@claim("hypergradient.neumann-and-unrolled", source=DERIVED,
       statement=r"At the solution the error of K terms of the Neumann series is $-J^\top(I - \eta F_1)^K G_1$, and K unrolled gradient steps "
                 r"started there give the same number.",
       fast={"terms": (7,)}, full={"terms": (1, 2, 3, 5, 10, 30, 100)})
def _(check: Check, terms: tuple[int, ...]) -> None:
    problem, y = ridge(), jnp.asarray(penalties())
    x = problem.exact(y)
    at = Parts(problem, x, y)
    eta = 1.5 / np.linalg.eigvalsh(at.H)[-1]
    for K in terms:
        series, unrolled = map(np.asarray, compiled(_pair, problem, (Neumann(K, eta), Unrolled(K, eta)), x, y))
        predicted = -at.J.T @ np.linalg.matrix_power(np.eye(4) - eta * at.H, K) @ at.G1
        check.below(f"K = {K}: error of the series less the prediction", np.abs(series - (at.G2 + at.J.T @ at.G1) - predicted), 1e-13)
        check.below(f"K = {K}: unrolled less the series", np.abs(unrolled - series), 1e-14)
        check.above(f"K = {K}: size of that error", np.linalg.norm(predicted), 1e-3 if K < 10 else 0)


class Unrolling(NamedTuple):
    """Unrolled descent and the implicit formula after each number of steps, the first axis.

    Attributes:
        x: iterates.
        unrolled, implicit: values.
        unrolled_jacobian, implicit_jacobian: of the iterate in y.
    """

    x: Any
    unrolled: Any
    implicit: Any
    unrolled_jacobian: Any
    implicit_jacobian: Any


def unrolling(problem: Any, x: Any, y: Any, eta: Any, steps: int) -> Unrolling:
    """Unrolled descent from x by the forward recursion: `Unrolled` of the library goes backwards, for one number of steps. Pure."""

    def crossed(at):
        return jax.vmap(at.cross_product, out_axes=1)(jnp.eye(y.shape[0], dtype=y.dtype))

    def step(carry, _):
        x, J = carry
        at = problem.at(x, y)
        H, F2 = at.matrix(), crossed(at)
        x, J = x - eta * at.residual, J - eta * (H @ J + F2)
        after = problem.at(x, y)
        exact = -jnp.linalg.solve(after.matrix(), crossed(after))
        return (x, J), Unrolling(x, after.outer_y + J.T @ after.outer_x, after.outer_y + exact.T @ after.outer_x, J, exact)

    return lax.scan(step, (x, jnp.zeros((x.shape[0], y.shape[0]), x.dtype)), None, length=steps)[1]


@claim("hypergradient.unrolled-factor", source=DERIVED,
       statement=r"Along gradient descent from a start that is no solution the error of unrolled differentiation is that of the implicit formula "
                 r"times a factor that grows linearly with the number K of steps.",
       fast={"steps": 160}, full={"steps": 400})
def _(check: Check, steps: int) -> None:
    problem, y = ridge(), penalties()
    x = np.asarray(problem.exact(jnp.asarray(y)))
    at = Parts(problem, x, y)
    lambdas = np.linalg.eigvalsh(at.H)
    eta = 1.0 / lambdas[-1]
    rate = 1 - eta * lambdas[0]
    start = jnp.asarray(x + 2 * draw().d)
    found = compiled(unrolling, problem, start, jnp.asarray(y), jnp.asarray(eta), steps)
    gradient = at.G2 + at.J.T @ at.G1
    ratio = norms(found.unrolled - gradient) / norms(found.implicit - gradient)
    last = int(min(steps, np.log(1e-9) / np.log(rate)))                                     # before rounding
    K = np.arange(1, steps + 1)
    check.above("steps before rounding", last, 40, note=f"contraction {rate:.3f}")
    third = K[last // 3 : last]
    line = np.polyfit(third, ratio[last // 3 : last], 1)
    check.above("slope of the ratio of errors against K", line[0], 1e-2)
    check.below("its distance to a line over the last two thirds, relative", np.abs(np.polyval(line, third) / ratio[last // 3 : last] - 1), 0.1)
    check.above("ratio at the end over that at a third", ratio[last - 1] / ratio[last // 3], 2)
    library = np.asarray(compiled(_pair, problem, (Unrolled(40, eta),), start, jnp.asarray(y))[0])
    check.below("Unrolled(40) less the forward recursion", np.abs(library - found.unrolled[39]), 1e-12)


@claim("hypergradient.stochastic-hessian", source=DERIVED,
       statement=r"With a minibatch of size B for the Hessian of the adjoint system, and all else exact, the bias falls as 1/B and the standard "
                 r"deviation as $B^{-1/2}$: averaging independent minibatch hypergradients never removes the bias.",
       fast={"sizes": (25, 50, 100, 200, 400), "draws": 1000}, full={"sizes": (25, 50, 100, 200, 400), "draws": 40_000})
def _(check: Check, sizes: tuple[int, ...], draws: int) -> None:
    from theorylab.hypergradient.claims.references import shipped
    from theorylab.hypergradient.inner import reference

    problem, y, _ = shipped("breast_cancer")
    x, A = np.asarray(reference(problem, y)), np.asarray(problem.A)
    at = Parts(problem, x, y)
    H, D, weight, G1, (N, p) = at.H, at.D, at.weight, at.G1, A.shape
    squares = (weight[:, None, None] * A[:, :, None] * A[:, None, :]).reshape(N, -1)
    v, F2 = np.linalg.solve(H, G1), D * x
    bias, std = [], []
    for B in sizes:
        rows = np.asarray(jax.random.randint(jax.random.fold_in(stream(0, "rows"), B), (draws, B), 0, N))
        counts = np.zeros((draws, N))
        np.add.at(counts, (np.arange(draws)[:, None], rows), 1.0)
        total, square, linear = np.zeros(p), np.zeros(p), np.zeros(p)
        for part in np.array_split(counts, max(1, draws // 500)):
            sampled = (part @ squares / B).reshape(-1, p, p) + np.diag(D)
            error = -F2 * (np.linalg.solve(sampled, np.tile(G1[:, None], (len(part), 1, 1)))[..., 0] - v)
            # The linear part has mean zero; without it the mean needs few draws.
            first = F2 * np.linalg.solve(H, ((sampled - H) @ v).T).T
            total, square, linear = total + error.sum(0), square + (error**2).sum(0), linear + first.sum(0)
        bias.append(np.linalg.norm((total - linear) / draws))
        std.append(np.sqrt((square / draws - (total / draws) ** 2).sum()))
    check.slope("bias against B", np.array(sizes), np.array(bias), expected=-1.0, tol=0.25,
                note="bias times B: " + ", ".join(f"{b * B:.3g}" for b, B in zip(bias, sizes, strict=True)))
    check.slope("standard deviation against B", np.array(sizes), np.array(std), expected=-0.5, tol=0.05,
                note="times the root of B: " + ", ".join(f"{s * B**0.5:.3g}" for s, B in zip(std, sizes, strict=True)))
