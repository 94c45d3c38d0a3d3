"""B known through samples: which estimates of the field are unbiased, what the bias of the others does, and the stochastic rate."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core.keys import run_keys, stream
from theorylab.lab.claims import claim
from theorylab.lab.evidence import Check
from theorylab.stiefel import fields
from theorylab.stiefel.claims._programs import BOTH, DERIVED, basis, feasible, field_at, norm, normal, power, spectral

Array = jax.Array
POINTS, ROWS = 5, 3


@partial(jax.jit, static_argnames="normal")
def _u_statistics(rows: Any, coefficients: Any, x: Any, ridge: Any, normal: str) -> Array:
    return jnp.mean(jax.vmap(lambda a, c: fields.u_statistic_field(a, c, x, ridge, 0.7, normal=normal))(rows, coefficients), axis=0)


@partial(jax.jit, static_argnames="normal")
def _two_samples(g: Any, x: Any, b1: Any, b2: Any, normal: str) -> Array:
    return jnp.mean(jax.vmap(lambda g, b1, b2: fields.two_sample_field(g, x, b1, b2, 0.7, normal=normal))(g, b1, b2), axis=0)


@claim("stiefel.unbiased-estimators", source=BOTH,
       statement=r"The estimate from three independent samples and the U-statistic over distinct rows of one batch have exactly the landing field "
                 r"as their mean. The normal term $BXh$ of one batch of r rows is off by $\frac1r(E[aa^\top XX^\top aa^\top] - BXX^\top B)X$, and "
                 r"$Xh$ by nothing.",
       fast={"populations": 2}, full={"populations": 10})
def _(check: Check, populations: int) -> None:
    n, p, omega = 4, 2, 0.7
    off: dict[str, list[Any]] = {}
    batches = np.array(list(product(range(POINTS), repeat=ROWS)))                        # all ordered batches, drawn with replacement
    for i in range(populations):
        points, x = normal(i, "population", POINTS, n), 0.6 * normal(i, "x", n, p)
        coefficients = np.tanh(points @ x)
        b, g = points.T @ points / POINTS, points.T @ coefficients / POINTS
        root = normal(i, "ridge", n, n)
        for ridge in (None, 0.1 * root @ root.T):
            whole = b if ridge is None else b + ridge
            for kind in fields.NORMALS:
                exact = np.asarray(field_at(np.zeros((n, n)), whole, x, omega, "relative", kind)) + _tangent(g, x, whole)
                found = _u_statistics(points[batches], coefficients[batches], x, ridge, kind)
                label = f"U-statistic, {kind}, {'no ridge' if ridge is None else 'matrix ridge'}: mean against the field, relative"
                off.setdefault(label, []).append(norm(np.asarray(found) - exact) / norm(exact))
        first, second, third = (points[batches[:, j]] for j in range(3))
        products = [rows[:, :, None] * (rows @ x)[:, None, :] for rows in (second, third)]
        for kind in fields.NORMALS:
            exact = np.asarray(field_at(np.zeros((n, n)), b, x, omega, "relative", kind)) + _tangent(g, x, b)
            found = _two_samples(first[:, :, None] * np.tanh(first @ x)[:, None, :], x, *products, kind)
            off.setdefault(f"two samples, {kind}: mean against the field, relative", []).append(norm(np.asarray(found) - exact) / norm(exact))
        rows = points[batches]
        bx = np.swapaxes(rows, 1, 2) @ (rows @ x) / ROWS
        h = x.T @ b @ x - np.eye(p)
        xs = np.broadcast_to(x, bx.shape)
        fourth = np.mean(points[:, :, None] * (np.sum((points @ x) ** 2, 1)[:, None] * points)[:, None, :], axis=0)
        bias = (fourth - b @ x @ x.T @ b) @ x / ROWS
        mean = np.mean(np.asarray(fields.normal_gradient(xs, bx)), axis=0)
        off.setdefault("one batch, B X h: bias against its formula, relative", []).append(norm(mean - b @ x @ h - bias) / norm(bias))
        mean = np.mean(np.asarray(fields.normal_newton_schulz(xs, bx)), axis=0)
        off.setdefault("one batch, X h: bias over that of B X h", []).append(norm(mean - x @ h) / norm(bias))
    for label, values in off.items():
        check.below(label, np.array(values), 2e-14)


def _tangent(g: np.ndarray, x: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The relative tangent term as printed."""
    cross = g @ x.T @ b
    return (cross - cross.T) @ b @ x / 2


@partial(jax.jit, static_argnames=("rows", "steps", "estimator", "normal"))
def _diagonals(key: Any, step_size: Any, p: Any, rows: int, steps: int, estimator: str, normal: str) -> Array:
    """The mean diagonal entry of X'BX - I in each step on fresh batches of white Laplace sources, begun at the sources."""

    def step(x: Array, key: Array) -> tuple[Array, Array]:
        batch = jax.random.laplace(key, (rows, x.shape[0])) / jnp.sqrt(2.0)
        scores = batch @ x
        if estimator == "u_statistic":
            field = fields.u_statistic_field(batch, jnp.tanh(scores), x, normal=normal)
        else:
            field = fields.landing_field(batch.T @ jnp.tanh(scores) / rows, x, batch.T @ scores / rows, normal=normal)
        after = x - step_size * field
        return after, jnp.mean(jnp.sum(after**2, axis=0)) - 1

    return lax.scan(step, p, jax.random.split(key, steps))[1]


@claim("stiefel.one-batch-bias", source=DERIVED,
       statement=r"On white independent sources of kurtosis k the normal term $BXh$ of one batch vanishes at $X^\top BX = I/(1 + c/r)$, $c = p + k "
                 r"- 2$, not on the manifold, whatever the step size. The U-statistic and the term $Xh$ have no such floor.",
       fast={"rows": (100,), "steps": 2000}, full={"rows": (100, 1000), "steps": 8000})
def _(check: Check, rows: tuple[int, ...], steps: int) -> None:
    p, kurtosis, burn = 10, 6.0, 500
    for r in rows:
        c = p + kurtosis - 2
        run = lambda estimator, kind: float(np.mean(np.asarray(_diagonals(  # noqa: E731
            stream(21, f"batches {r}"), 0.02, jnp.eye(p), r, steps + burn, estimator, kind))[burn:]))  # noqa: B023
        check.equal(f"{r} rows, one batch, B X h: mean diagonal of h", run("one_batch", "gradient"), -(c / r) / (1 + c / r), 0.05, relative=True)
        for estimator, kind in (("u_statistic", "gradient"), ("one_batch", "newton_schulz")):
            check.below(f"{r} rows, {estimator}, {kind}: size of the same", abs(run(estimator, kind)), 0.01 if r == 100 else 0.002)


@partial(jax.jit, static_argnames="estimator")
def _averages(keys: Any, a: Any, b: Any, roots: Any, x: Any, step_size: Any, steps: Any, estimator: str) -> Array:
    """The means of |field|^2 and |h|^2 over the steps, on fresh Gaussian batches of 20 rows; one run for each key."""
    rows, n = 20, a.shape[0]

    def step(k: Array, carry: tuple[Array, Array], key: Any) -> tuple[Array, Array]:
        x, sums = carry
        gradient, first, second = (draw @ root for draw, root in
                                   zip(jax.random.normal(jax.random.fold_in(key, k), (3, rows, n)), (roots[0], roots[1], roots[1]), strict=True))
        h = x.T @ b @ x - jnp.eye(x.shape[1])
        sums = sums + jnp.stack([jnp.sum(field_at(a, b, x, 1.0, "relative", "gradient") ** 2), jnp.sum(h**2)])
        g, bx = -gradient.T @ (gradient @ x) / rows, first.T @ (first @ x) / rows
        if estimator == "two_sample":
            field = fields.two_sample_field(g, x, bx, second.T @ (second @ x) / rows, normal="gradient")
        else:
            field = fields.landing_field(g, x, bx, normal="gradient")
        return x - step_size * field, sums

    return jax.vmap(lambda key: lax.fori_loop(0, steps, partial(step, key=key), (x, jnp.zeros(2)))[1])(keys) / steps


@claim("stiefel.stochastic-rate", source=BOTH,
       statement=r"With three independent samples in each step and $\eta = \eta_0/\sqrt K$ the mean of $\lVert\Lambda(X_k)\rVert^2$ over K steps is "
                 r"$O(1/\sqrt K)$. With the same batch in both factors B it flattens, and the distance to the manifold stays.",
       fast={"counts": (256, 1024), "runs": 8, "factor": 1.5}, full={"counts": (256, 1024, 4096, 16384), "runs": 32, "factor": 3.0})
def _(check: Check, counts: tuple[int, ...], runs: int, factor: float) -> None:
    n, p = 10, 3
    vectors = basis(22, "eigenvectors", 2, n)
    a, b = spectral(vectors[0], np.linspace(1, 0.05, n)), spectral(vectors[1], np.linspace(1, 0.4, n))
    roots, x = np.stack([power(a, 0.5), power(b, 0.5)]), feasible(b, normal(22, "x", n, p))
    squares, distances = {}, {}
    for name in ("two_sample", "one_batch"):
        means = np.stack([np.asarray(_averages(run_keys(3, runs), a, b, roots, x, 2 / count**0.5, count, name)) for count in counts])
        squares[name], distances[name] = means[:, :, 0], means[:, :, 1].mean(1)
    check.slope("independent samples: mean of |field|^2 against K", np.array(counts), np.array(squares["two_sample"]), expected=-0.535, tol=0.115)
    if counts[-1] >= 16384:                                                              # the floor shows late
        slopes = {name: np.polyfit(np.log(counts), np.log(np.mean(values, axis=1)), 1)[0] for name, values in squares.items()}
        check.above("slope with one batch less that with independent samples", slopes["one_batch"] - slopes["two_sample"], 0.05,
                    note=f"{slopes['one_batch']:.3f} and {slopes['two_sample']:.3f}")
    ratio = distances["one_batch"][-1] / distances["two_sample"][-1]
    check.above(f"mean |h|^2 at K = {counts[-1]}, one batch over independent samples", ratio, factor)
