r"""Voronoi cells and losses: how far a fitted mixing measure is from the true one, atom by atom."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from theorylab.core import checks
from theorylab.errors import RunWarning, ShapeError
from theorylab.moe.model import Mixture

Array = jax.Array
KINDS = ("exact", "over_specified", "sharp")
FEATURES = ("all", "experts")
NORMS = ("l2", "sum")
SMOOTHINGS, DESCENTS, SHRINK = 26, 12, 0.4  # 0.4^26 = 5e-11: what is left of the smoothing at the end


class _Blocks(NamedTuple):
    """Norms of the differences of slopes of the gate, slopes, intercepts and variances of the experts."""

    gate: Array
    coef: Array
    intercept: Array
    variance: Array


def _blocks(fit: Mixture, truth: Mixture, smooth: Any = 0.0) -> _Blocks:
    """For each fitted and each true atom, shape (k, k*) each; `smooth` replaces |v| by (|v|^2 + smooth^2)^(1/2)."""
    size = lambda v: jnp.sqrt(jnp.sum(v**2, axis=-1) + smooth**2)  # noqa: E731
    apart = lambda a, b: size(a[:, None] - b[None]) if a.ndim == 2 else size((a[:, None] - b[None])[..., None])  # noqa: E731
    return _Blocks(apart(fit.gate_coef, truth.gate_coef), apart(fit.expert_coef, truth.expert_coef),
                   apart(fit.expert_intercept, truth.expert_intercept), apart(fit.variance, truth.variance))


def _cells(fit: Mixture, truth: Mixture, features: str, norm: str) -> Array:
    blocks = _blocks(fit, truth)
    seen = blocks if features == "all" else blocks[1:]
    distance = sum(seen[1:], seen[0]) if norm == "sum" else sum((block**2 for block in seen[1:]), seen[0] ** 2)
    return jnp.argmin(distance, axis=1)


def _check(fit: Any, truth: Any, features: str, norm: str) -> None:
    for name, mixture in (("fit", fit), ("truth", truth)):
        if not isinstance(mixture, Mixture):
            raise ShapeError(f"{name} must be a Mixture, got {type(mixture).__name__}")
    if fit.dim != truth.dim:
        raise ShapeError(f"fit and truth must have one dimension, got {fit.dim} and {truth.dim}")
    checks.same_dtype(fit=fit.variance, truth=truth.variance)
    checks.among("features", features, FEATURES)
    checks.among("norm", norm, NORMS)


def voronoi_cells(fit: Mixture, truth: Mixture, *, features: str = "all", norm: str = "l2") -> Array:
    r"""The true atom that each fitted atom is nearest to; equal distances go to the lower index.

    Atoms are compared in $(\beta_1, a, b, \sigma)$ (paper). Gate slopes are defined up to a common translation, so align the gate first (`align`) or
    compare the experts alone, which is the better choice for over-specified fits.

    Args:
        fit: the fitted mixture, k atoms.
        truth: the true one.
        features: `"all"`, or `"experts"` for (a, b, sigma).
        norm: `"l2"`, the norm of the joined vector (paper), or `"sum"` of the norms of the blocks (its public codes).

    Returns:
        Integers in 0..k*-1, shape (k,).

    Raises:
        ShapeError: not two mixtures of one dimension.
        UnknownNameError: another `features` or `norm`.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S1")
        >>> moe.voronoi_cells(truth.permuted([2, 0, 1]), truth).tolist()
        [2, 0, 1]
    """
    _check(fit, truth, features, norm)
    return _cells(fit, truth, features, norm)


def _terms(fit: Mixture, truth: Mixture, cells: Array, kind: str, smooth: Any = 0.0, total: Any = 1.0) -> Array:
    """The term of each true atom, shape (k*,), without regard to empty cells; `total` multiplies all weights of the fit."""
    member = cells[:, None] == jnp.arange(truth.experts)

    def over(values: Array) -> Array:
        return jnp.sum(jnp.where(member, values[:, None], 0), axis=0)  # a product would make NaN of a weight that overflows

    weight = total * jnp.exp(fit.gate_intercept)
    own = _Blocks(*(jnp.take_along_axis(block, cells[:, None], axis=1)[:, 0] for block in _blocks(fit, truth, smooth)))
    each = sum(own[1:], own[0])
    if kind != "exact":
        order = 2 * jnp.sum(member, axis=0).astype(fit.dtype)[cells]
        one = jnp.ones_like(order)
        slopes = (order, order / 2) if kind == "over_specified" else (2 * one, 2 * one)
        alone = order <= 2  # a cell of one: all powers are 1
        powers = [jnp.where(alone, one, power) for power in (*slopes, order, order / 2)]
        each = sum(block**power for block, power in zip(own, powers, strict=True))
    gap = over(weight) - jnp.exp(truth.gate_intercept)
    return over(jnp.where(each > 0, weight * each, 0)) + jnp.sqrt(gap**2 + smooth**2)


def voronoi_loss(fit: Mixture, truth: Mixture, kind: str = "exact", *, align: str | None = None, norm: str = "l2", features: str = "all") -> Array:
    r"""The loss D1 or D2 of a fitted mixture.

    The term of a true atom j with cell $C_j$ is
    $\sum_{i \in C_j} e^{\beta_{0i}} D_{ij} + |\sum_{i \in C_j} e^{\beta_{0i}} - e^{\beta^*_{0j}}|$; the loss is the maximum over sets of K
    true atoms of the sum of their terms, K = `truth.active`, that is the sum of the K largest terms. `kind` says what $D_{ij}$ is:

    * `"exact"`: $\|\Delta\beta_1\| + \|\Delta a\| + |\Delta b| + |\Delta\sigma|$ (paper, D1).
    * `"over_specified"`: the same in cells of one atom, else $\|\Delta\beta_1\|^r + \|\Delta a\|^{r/2} + |\Delta b|^r + |\Delta\sigma|^{r/2}$ with
      $r = \bar r(|C_j|) = 2 |C_j|$ (paper, D2; see `exponent`).
    * `"sharp"`: the same with $\|\Delta\beta_1\|^2 + \|\Delta a\|^2$ (companion derivation).

    An empty cell makes the loss infinite, with a warning. The weights of the fit are used as they are, so a fit whose gate is translated has another
    loss: give `align`, or compare `canonical` mixtures.

    Args:
        fit: the fitted mixture.
        truth: the true one.
        kind: see above.
        align: None, or how the gate of the fit is translated first, `"reference"` or `"infimum"`: see `align`.
        norm: of `voronoi_cells`.
        features: of `voronoi_cells`, which are found after the alignment.

    Raises:
        ShapeError: not two mixtures of one dimension.
        UnknownNameError: another `kind`, `align`, `norm` or `features`.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S1")
        >>> fit = truth.replace(expert_intercept=truth.expert_intercept + 0.1)
        >>> round(float(moe.voronoi_loss(fit, truth)), 6)
        0.249182
    """
    _check(fit, truth, features, norm)
    checks.among("kind", kind, KINDS)
    if align is not None:
        fit = _aligned(fit, truth, align, kind)
    loss = _loss(fit, truth, kind=kind, norm=norm, features=features)
    if checks.known(loss) and bool(jnp.isinf(loss)):
        warnings.warn("a true atom has an empty cell: no fitted atom is nearest to it (or exp(gate_intercept) overflows), so the loss is infinite",
                      RunWarning, stacklevel=2)
    return loss


@partial(jax.jit, static_argnames=("kind", "norm", "features"))
def _loss(fit: Mixture, truth: Mixture, *, kind: str, norm: str, features: str) -> Array:
    cells = _cells(fit, truth, features, norm)
    largest = jnp.sort(_terms(fit, truth, cells, kind))[truth.experts - truth.active:]
    full = jnp.all(jnp.any(cells[:, None] == jnp.arange(truth.experts), axis=0))
    return jnp.where(full, jnp.sum(largest), jnp.inf)


def align(fit: Mixture, truth: Mixture, how: str = "reference", *, kind: str = "exact") -> Mixture:
    r"""The same density as `fit` with its gate translated to that of `truth`: $\beta_0 + t_0$, $\beta_1 + t_1$.

    Cells are found from the experts alone.

    * `"reference"`: the cell of the last true atom gets its total weight and, as weighted mean, its gate slope.
    * `"infimum"`: the translation that minimises the loss `kind` for these cells; it is jointly convex in $(e^{t_0}, e^{t_0} t_1)$ and is minimised
      by Newton steps on smoothed norms, whose smoothing shrinks to 1e-10. The earlier paper on the dense gate has this infimum in its loss.

    Args:
        fit: the fitted mixture.
        truth: the true one.
        how: see above.
        kind: loss that `"infimum"` minimises.

    Raises:
        ShapeError: not two mixtures of one dimension.
        UnknownNameError: another `how` or `kind`.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S1")
        >>> moved = truth.replace(gate_intercept=truth.gate_intercept + 3.0, gate_coef=truth.gate_coef - 1.0)
        >>> float(moe.voronoi_loss(moe.align(moved, truth), truth).round(12))
        0.0
    """
    _check(fit, truth, "experts", "l2")
    checks.among("kind", kind, KINDS)
    return _aligned(fit, truth, how, kind)


def _aligned(fit: Mixture, truth: Mixture, how: str, kind: str) -> Mixture:
    checks.among("align", how, ("reference", "infimum"))
    return _by_reference(fit, truth) if how == "reference" else _by_infimum(fit, truth, kind=kind)


@jax.jit
def _by_reference(fit: Mixture, truth: Mixture) -> Mixture:
    inside = _cells(fit, truth, "experts", "l2") == truth.experts - 1
    log_total = jax.nn.logsumexp(jnp.where(inside, fit.gate_intercept, -jnp.inf))
    some = jnp.isfinite(log_total)
    share = jnp.where(inside, jnp.exp(fit.gate_intercept - jnp.where(some, log_total, 0)), 0)
    zero = jnp.zeros((), fit.dtype)
    up = jnp.where(some, truth.gate_intercept[-1] - log_total, zero)
    return _translated(fit, up, jnp.where(some, truth.gate_coef[-1] - share @ fit.gate_coef, zero))


def _translated(fit: Mixture, up: Array, along: Array) -> Mixture:
    return fit.replace(gate_intercept=fit.gate_intercept + up, gate_coef=fit.gate_coef + along)


@partial(jax.jit, static_argnames="kind")
def _by_infimum(fit: Mixture, truth: Mixture, *, kind: str) -> Mixture:
    """Minimise over v = (u, u t_1, level): the sum of the K largest terms is the minimum over a level of K level + sum of excesses."""
    fit = _by_reference(fit, truth)
    cells = _cells(fit, truth, "experts", "l2")
    dense = truth.active == truth.experts

    def objective(v: Array, smooth: Array) -> Array:
        moved = _translated(fit, jnp.zeros((), fit.dtype), v[1:-1] / v[0])
        terms = _terms(moved, truth, cells, kind, smooth, v[0])
        excess = terms - v[-1]
        total = jnp.sum(terms) + v[-1] ** 2 if dense else truth.active * v[-1] + jnp.sum(excess + jnp.sqrt(excess**2 + smooth**2)) / 2
        return jnp.where(v[0] > 0, total - smooth * jnp.log(jnp.abs(v[0])), jnp.inf)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        v, damping = carry
        smooth = SHRINK ** (i // DESCENTS).astype(fit.dtype)
        now, slope = jax.value_and_grad(objective)(v, smooth)
        curved = jax.hessian(objective)(v, smooth)
        move = jnp.linalg.solve(curved + damping * jnp.eye(len(v), dtype=v.dtype), slope)
        better = objective(v - move, smooth) < now
        return jnp.where(better, v - move, v), jnp.clip(jnp.where(better, damping / 8, damping * 4), 1e-12, 1e12)

    level = jnp.zeros(()) if dense else jnp.sort(_terms(fit, truth, cells, kind))[truth.experts - truth.active]
    begin = jnp.concatenate([jnp.ones((1,), fit.dtype), jnp.zeros((fit.dim,), fit.dtype), level[None].astype(fit.dtype)])
    v, _ = jax.lax.fori_loop(0, SMOOTHINGS * DESCENTS, step, (begin, jnp.ones((), fit.dtype)))
    found = _translated(fit, jnp.log(v[0]), v[1:-1] / v[0])
    # The start is kept if rounding left the search above it.
    score = lambda m: jnp.sum(jnp.sort(_terms(m, truth, cells, kind))[truth.experts - truth.active:])  # noqa: E731
    return jax.tree.map(lambda a, b: jnp.where(score(found) <= score(fit), a, b), found, fit)
