"""Where fits begin: near a known truth, as in the papers, or from the data alone. All work inside `jit` and `vmap`."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from theorylab.core import checks
from theorylab.core.iterate import iterate
from theorylab.core.keys import Key, as_key, stream
from theorylab.errors import ArgumentError
from theorylab.moe.em import EM, m_step, moved
from theorylab.moe.model import Mixture
from theorylab.moe.moments import of_rows, over_chunks
from theorylab.moe.problem import Likelihood

Array = jax.Array
LLOYD_STEPS = 25
SHORT_ROWS = 2048                                   # rows that the short fits of `best_start` see at most
GATE_STEPS = 5
GATE_RIDGE = 1e-4                                   # hard labels may be separable: a few damped steps stay finite
FLOOR = 1e-6


def near(truth: Mixture, experts: int, *, key: Key | int, rows: Any = 1000, active: int | None = None, variant: str = "script") -> Mixture:
    r"""A start near `truth`: each fitted expert is attached to a true one, every true one gets at least one, and noise is added.

    With n = `rows`, `"script"` (the public script of the top-K paper) adds $N(0, s^2)$ with $s = 0.005\, n^{-0.083}$ to every gate and expert
    coefficient and $|N(0, (0.0005\, n^{-0.25})^2)|$ to the variances. `"r"` (the companion paper's R code) shares one normal between
    intercept and slopes, with deviations $0.005\, n^{-0.083}$ for the gate and $0.05\, n^{-0.083}$ for the expert, starts variances at the
    true *standard deviation* plus $|N(0, (0.005\, n^{-0.25})^2)|$, and attaches the last fitted expert to the last true one.

    Args:
        truth: the true mixture, of k* experts.
        experts: fitted number k, at least k*.
        key: seed or JAX key.
        rows: sample size n of the data to be fitted; may be traced.
        active: K of the fit; that of the truth unless given.
        variant: `"script"` or `"r"`.

    Raises:
        ArgumentError: fewer experts than the truth has.
        UnknownNameError: another variant.

    Example:
        >>> from theorylab import moe
        >>> near(moe.example("S0"), 3, key=0).experts
        3
    """
    atoms = truth.experts
    experts = checks.whole("experts", experts, low=atoms)
    checks.among("variant", variant, ("script", "r"))
    return _near(truth, as_key(key), jnp.asarray(rows, truth.dtype), experts, truth.active if active is None else active, variant)


@partial(jax.jit, static_argnames=("experts", "active", "variant"))
def _near(truth: Mixture, key: Key, rows: Array, experts: int, active: int, variant: str) -> Mixture:
    cells = _attach(stream(key, "cells"), truth.experts, experts, last=variant == "r")
    draw = lambda name, shape: jax.random.normal(stream(key, name), shape, truth.dtype)  # noqa: E731
    shape = (experts, truth.dim + 1) if variant == "script" else (experts, 1)
    spread = rows**-0.083
    gate = truth.gate_matrix[cells] + 0.005 * spread * draw("gate", shape)
    lines = truth.expert_matrix[cells] + (0.005 if variant == "script" else 0.05) * spread * draw("experts", shape)
    noise = jnp.abs(draw("variance", (experts,))) * rows**-0.25
    variance = truth.variance[cells] + 0.0005 * noise if variant == "script" else jnp.sqrt(truth.variance[cells]) + 0.005 * noise
    return Mixture.from_matrices(gate, lines, variance, active, truth.selection)


def _attach(key: Key, atoms: int, experts: int, last: bool) -> Array:
    """A uniform map of the fitted experts onto the true ones, given that it is onto (and maps last to last)."""
    if experts == atoms and not last:
        return jax.random.permutation(key, atoms)
    if experts == atoms:
        return jnp.concatenate([jax.random.permutation(key, atoms - 1), jnp.asarray([atoms - 1])])

    def draw(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        key, _ = carry
        key, now = jax.random.split(key)
        cells = jax.random.randint(now, (experts,), 0, atoms)
        return key, cells.at[-1].set(atoms - 1) if last else cells

    missing = lambda carry: jnp.any(jnp.bincount(carry[1], length=atoms) == 0)  # noqa: E731
    return jax.lax.while_loop(missing, draw, draw((key, jnp.zeros(experts, int))))[1]


def kmeans(likelihood: Likelihood, *, key: Key | int) -> Mixture:
    """A start from clusters of the standardized (x, y): least squares in each cluster, and a gate that predicts the cluster.

    Centres are drawn among the rows with probability proportional to the squared distance to those drawn before, then moved by 25 steps of
    Lloyd; the gate takes five damped Newton steps.

    Args:
        likelihood: the problem.
        key: seed or JAX key.

    Raises:
        ArgumentError: not a `Likelihood` in memory.

    Example:
        >>> from theorylab import moe
        >>> likelihood = moe.Likelihood(*moe.weyl_sample(moe.example("S2"), 400), experts=2, active=2)
        >>> kmeans(likelihood, key=0).experts
        2
    """
    return _kmeans(_checked(likelihood), as_key(key))


def random_responsibilities(likelihood: Likelihood, *, key: Key | int) -> Mixture:
    """A start from rows dealt to the experts at random, as in the R code of the companion paper; poor for more than two experts.

    Args:
        likelihood: the problem.
        key: seed or JAX key.

    Raises:
        ArgumentError: not a `Likelihood` in memory.

    Example:
        >>> from theorylab import moe
        >>> likelihood = moe.Likelihood(*moe.weyl_sample(moe.example("S2"), 400), experts=2, active=2)
        >>> random_responsibilities(likelihood, key=0).active
        2
    """
    return _random(_checked(likelihood), stream(as_key(key), "labels"))


@jax.jit
def _random(likelihood: Likelihood, key: Key) -> Mixture:
    labels = jax.random.randint(key, likelihood.y.shape, 0, likelihood.experts)
    return _from_share(likelihood, _one_hot(labels, likelihood), 1)


def dense_first(likelihood: Likelihood, *, key: Key | int, steps: int = 100) -> Mixture:
    """A start from a fit of all experts (K = k) by EM from `kmeans`, whose gate is then truncated to the K largest.

    Args:
        likelihood: the problem.
        key: seed or JAX key.
        steps: of EM.

    Raises:
        ArgumentError: not a `Likelihood` in memory.

    Example:
        >>> from theorylab import moe
        >>> likelihood = moe.Likelihood(*moe.weyl_sample(moe.example("S2"), 400), experts=2, active=1)
        >>> dense_first(likelihood, key=0, steps=5).active
        1
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # what it says was said when the problem was made
        dense = _checked(likelihood).replace(active=likelihood.experts)
    fit = iterate(dense, EM(), kmeans(dense, key=key), steps=steps, keep="last", loop="while").value
    return Mixture.from_matrices(fit.gate_matrix, fit.expert_matrix, fit.variance, likelihood.active, likelihood.selection)


def best_start(likelihood: Likelihood, *, key: Key | int, starts: int = 8, steps: int = 30) -> Mixture:
    """The best, by the likelihood, of several short fits by EM from `kmeans`, made in one batch.

    Of more than 2048 rows they see 2048, spread evenly over those of positive weight: fits from here go on with all rows.

    Args:
        likelihood: the problem.
        key: seed or JAX key.
        starts: how many.
        steps: of EM from each.

    Raises:
        ArgumentError: not a `Likelihood` in memory, or a number is below 1.

    Example:
        >>> from theorylab import moe
        >>> likelihood = moe.Likelihood(*moe.weyl_sample(moe.example("S2"), 400), experts=2, active=2)
        >>> float(likelihood.log_likelihood(best_start(likelihood, key=0))) > -432
        True
    """
    checks.whole("steps", steps, low=1)
    keys = jax.random.split(as_key(key), checks.whole("starts", starts, low=1))
    fits, values = _fits(_checked(likelihood), as_key(key), keys, jnp.asarray(steps, jnp.int32))
    return jax.tree.map(lambda leaf: leaf[jnp.nanargmax(values)], fits)


@jax.jit
def _fits(likelihood: Likelihood, key: Key, keys: Key, steps: Any) -> tuple[Mixture, Array]:
    if len(likelihood.y) > SHORT_ROWS:
        likelihood = _thinned(likelihood, stream(key, "rows"))

    def one(key: Key) -> tuple[Mixture, Array]:
        run = iterate(likelihood, EM(), kmeans(likelihood, key=key), steps=steps, keep="last")
        return run.value, jnp.asarray(run.history["log_likelihood"])[-1]

    return jax.vmap(one)(keys)


def _thinned(likelihood: Likelihood, key: Key) -> Likelihood:
    """The problem on `SHORT_ROWS` of its rows: one at random from each of as many equal groups of the rows of positive weight."""
    passed = jnp.cumsum(likelihood.weight > 0)
    u = jax.random.uniform(key, (SHORT_ROWS,), likelihood.y.dtype)
    place = (jnp.arange(SHORT_ROWS, dtype=u.dtype) + u) / SHORT_ROWS * passed[-1].astype(u.dtype)
    rows = jnp.minimum(jnp.searchsorted(passed, place.astype(passed.dtype), side="right"), len(passed) - 1)
    x, y, weight = likelihood.x[rows], likelihood.y[rows], likelihood.weight[rows]
    return eqx.tree_at(lambda p: (p.x, p.y, p.weight), likelihood, (x, y, weight))


@jax.jit
def _kmeans(likelihood: Likelihood, key: Key) -> Mixture:
    return _from_share(likelihood, _clusters(likelihood, key), GATE_STEPS)


def _checked(likelihood: Any) -> Likelihood:
    if not isinstance(likelihood, Likelihood) or likelihood.per_pass is not None:
        kind = "a streamed one" if isinstance(likelihood, Likelihood) else type(likelihood).__name__
        raise ArgumentError(f"likelihood must be a Likelihood with its rows in memory, got {kind}")
    return likelihood


def _one_hot(labels: Array, likelihood: Likelihood) -> Array:
    return (labels == jnp.arange(likelihood.experts, dtype=labels.dtype)[:, None]).astype(likelihood.y.dtype)


def _clusters(likelihood: Likelihood, key: Key) -> Array:
    """Responsibilities 0 and 1 by k-means, shape `(k, n)`."""
    deviation = jnp.sqrt(jnp.where(likelihood.spread > 0, likelihood.spread, 1))
    response = (likelihood.y - jnp.mean(likelihood.y)) / deviation
    points = jnp.concatenate([(likelihood.x - likelihood.center) / likelihood.scale, response[:, None]], axis=1)
    k, weight = likelihood.experts, likelihood.weight

    def distances(centers: Array) -> Array:
        return jnp.sum(jnp.square(centers[:, None, :] - points), axis=2)

    def pick(j: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centers, nearest = carry
        mass = weight * jnp.where(jnp.isfinite(nearest), nearest, 1)
        u = jax.random.uniform(jax.random.fold_in(stream(key, "centers"), j), (), mass.dtype)
        sums = jnp.cumsum(mass)
        row = jnp.minimum(jnp.searchsorted(sums, u * sums[-1], side="right"), len(sums) - 1)
        centers = centers.at[j].set(points[row])
        return centers, jnp.minimum(nearest, jnp.sum(jnp.square(points - points[row]), axis=1))

    start = (jnp.zeros((k, points.shape[1]), points.dtype), jnp.full(points.shape[0], jnp.inf, points.dtype))
    centers = jax.lax.fori_loop(0, k, pick, start)[0]

    def lloyd(_: Any, centers: Array) -> Array:
        share = weight * _one_hot(jnp.argmin(distances(centers), axis=0), likelihood)
        mass = jnp.sum(share, axis=1)[:, None]
        return jnp.where(mass > 0, share @ points / jnp.where(mass > 0, mass, 1), centers)

    centers = jax.lax.fori_loop(0, LLOYD_STEPS, lloyd, centers)
    return _one_hot(jnp.argmin(distances(centers), axis=0), likelihood)


def _from_share(likelihood: Likelihood, share: Array, gate_steps: int) -> Mixture:
    """Experts by weighted least squares for the responsibilities `share`, and the dense gate that predicts them."""
    k, d = likelihood.experts, likelihood.dim
    zeros = jnp.zeros((k, d + 1), likelihood.x.dtype)
    middle = jnp.sum(likelihood.weight * likelihood.y) / jnp.sum(likelihood.weight)
    first = Mixture.from_matrices(zeros, zeros.at[:, 0].set(middle), jnp.broadcast_to(likelihood.spread, (k,)), k, likelihood.selection)
    center, scale = likelihood.center, likelihood.scale
    full = jnp.ones((), zeros.dtype)

    def step(_: Any, m: Mixture) -> Mixture:
        sums = over_chunks(lambda x, y, w, s: of_rows(m, x, y, w, None, center, scale, True, s), likelihood, share)
        return moved(m, m_step(likelihood, m, sums, "newton", GATE_RIDGE, FLOOR), full)

    m = jax.lax.fori_loop(0, gate_steps, step, first)
    return Mixture.from_matrices(m.gate_matrix, m.expert_matrix, m.variance, likelihood.active, likelihood.selection)
