"""What is proved about a point, whatever method found it, and what held-out batches say about it where B is not known."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks, tree
from theorylab.core.psd import product
from theorylab.core.stream import EndOfData, as_stream
from theorylab.errors import ArgumentError
from theorylab.stiefel.contract import BlockProblem, Blocks, total, white_of
from theorylab.stiefel.fields import _residual
from theorylab.stiefel.operators import TESTED, Gram, Implicit, ridged
from theorylab.stiefel.quantities import multiplier_of
from theorylab.stiefel.retractions import divide

Array = jax.Array


class Certificate(NamedTuple):
    r"""What is known of a point X.

    Attributes:
        infeasibility: $d = \lVert h\rVert_F$ over all blocks, with the B of the problem or its reference.
        safe_radius: every point within this distance of X, in the norm of B, has $\lVert h\rVert_F$ within the radius; 0 outside it.
        residual: $\lVert G - 2BX\lambda\rVert_F$ with the multiplier $\lambda$ of least squares; 0 exactly at critical points, on the manifold.
        gap_bound: the objective of X, retracted within its span, exceeds the minimum by at most this; infinite where no bound is known.
        ritz_gap: smallest Ritz value of X less the largest eigenvalue of what is orthogonal to it in B: above 0, X spans the right subspace up to
            the error that `gap_bound` allows. NaN where it is not defined.
        interval: lower and upper end of the confidence interval of $\lVert h\rVert_F$ from held-out batches; None without them.
    """

    infeasibility: float
    safe_radius: float
    residual: float
    gap_bound: float
    ritz_gap: float
    interval: tuple[float, float] | None


def certificate(problem: BlockProblem, x: Any, batches: Any = None, *, radius: float = 0.5, confidence: float = 0.95) -> Certificate:
    r"""Numbers that certify a point (companion derivation).

    * `safe_radius` $= \sqrt{s^2 + \epsilon - d} - s$ with $s^2 = \lambda_{\max}(X^\top B X)$, from
      $\lVert h(X + U)\rVert_F \le d + 2 s \lVert U\rVert_B + \lVert U\rVert_B^2$; for several blocks the smallest. It is sharp for p = 1.
    * `gap_bound` for eigenvalue problems: with Ritz values $\theta$, the residual E of the Ritz vectors in the dual norm of B, and the largest
      eigenvalue $\mu$ on the complement of X, the sum of the p leading eigenvalues is at most $\sum\theta_i + \max_s (2\lVert E\rVert_F s -
      (\theta_p - \mu) s^2)$ over $s^2 \le \min(p, n - p)$: $\lVert E\rVert_F^2 / (\theta_p - \mu)$ once that is small. Correlations are the
      eigenvalue problem of both views together. It is computed, up to round-off, from matrices of up to 1024 rows; elsewhere it is the gap of a
      known optimum, or infinite.
    * `interval`: each held-out batch gives the unbiased estimate of $\lVert X^\top B X - I\rVert_F^2$ over pairs of distinct rows; Student's interval
      of their mean. It needs no B, and says nothing about batches that are not drawn as these are.

    Args:
        problem: a problem of this family.
        x: a point of it.
        batches: a `Stream` (one pass is read) or an iterable of batches, as the problem is fed, that were not used to find x; at least two.
        radius: $\epsilon$ in (0, 1), of the safe region.
        confidence: of the interval, in (0, 1).

    Raises:
        ShapeError: x is no point of the problem.
        NonFiniteInputError: x holds NaN or infinity.
        ArgumentError: a number outside its interval, fewer than two batches, or batches of fewer than two rows.

    Example:
        >>> from theorylab import stiefel
        >>> problem = stiefel.GEVP(jnp.diag(jnp.array([4.0, 1.0])), jnp.diag(jnp.array([2.0, 1.0])), p=1)
        >>> found = certificate(problem, jnp.array([[0.7], [0.1]]))
        >>> round(found.infeasibility, 12), bool(problem.metrics(jnp.array([[0.7], [0.1]]))["gap"] <= found.gap_bound < 0.01)
        (0.01, True)
    """
    checks.real("radius", radius, above=0.0, below=1.0)
    checks.real("confidence", confidence, above=0.0, below=1.0)
    tree.check_finite("x", x)
    packed = problem.pack(x)
    d, reach, residual, bound, apart = (float(a) for a in _numbers(problem, packed, radius))
    if not math.isfinite(bound):
        bound = float(problem.metrics(x).get("gap", jnp.inf))
    return Certificate(d, reach, residual, bound, apart, None if batches is None else _interval(problem, packed, batches, confidence))


@jax.jit
def _numbers(problem: BlockProblem, x: Blocks, radius: Any) -> tuple[Array, ...]:
    with jax.default_matmul_precision("highest"):
        point, operators = problem.at(x), problem.exact().operators
        parts = tuple(jnp.sum(_residual(m) ** 2) for m in point.grams)
        reach = []
        for m, part in zip(point.grams, parts, strict=True):
            s = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(m)[-1], 0))
            room = jnp.maximum(radius - jnp.sqrt(part), 0)
            reach.append(room / (s + jnp.sqrt(s**2 + room)))
        products = tuple(op.product(xt, im) for op, xt, im in zip(operators, x, point.images, strict=True))
        off = total(jnp.sum((gt - 2 * multiplier_of(bt, gt) @ bt) ** 2) for gt, bt in zip(point.gradients, products, strict=True))
        pencil = _pencil(problem, x)
        nothing = jnp.full((), jnp.inf, x[0].dtype), jnp.full((), jnp.nan, x[0].dtype)
        bound, apart = nothing if pencil is None else _ky_fan(*pencil)
        return jnp.sqrt(total(parts)), jnp.min(jnp.stack(reach)), jnp.sqrt(off), bound, apart


def _pencil(problem: BlockProblem, x: Blocks) -> tuple[Array, Array, Array, float] | None:
    """The eigenvalue problem of this problem: its matrices, the point in it, and how many of its gaps are one gap here."""
    from theorylab.stiefel.cca import CCA
    from theorylab.stiefel.eigen import GEVP

    batch = problem.exact()
    if sum(problem.dims) > TESTED or any(isinstance(op, Implicit) for op in batch.operators):
        return None
    if isinstance(problem, GEVP) and not isinstance(batch.cost, Implicit):
        return batch.cost.matrix(), batch.operators[0].matrix(), x[0], 1.0
    if isinstance(problem, CCA) and batch.cost is not None:
        return *joined(batch), jnp.concatenate(_balanced(problem, x), axis=1), 2.0
    return None


def joined(batch: Any) -> tuple[Array, Array]:
    """The matrices of correlations as one eigenvalue problem: both views side by side, whose leading eigenvalues are the correlations."""
    a, b = (op.matrix() for op in batch.operators)
    (between,) = batch.cost
    corner = jnp.zeros_like(between)
    whole = jnp.block([[a, corner], [corner.mT, b]])
    return jnp.block([[jnp.zeros_like(a), between], [between.mT, jnp.zeros_like(b)]]), whole


def _balanced(problem: BlockProblem, x: Blocks) -> Blocks:
    """Feasible blocks of the same spans whose columns are paired by correlation."""
    from theorylab.stiefel.retractions import retract_of

    return problem.arranged(tuple(retract_of(op, xt, "cholesky") for op, xt in zip(problem.exact().operators, x, strict=True)))


def _ky_fan(a: Array, b: Array, xt: Array, copies: float) -> tuple[Array, Array]:
    """The bound of the gap for the pencil (a, b) at a transposed point, and the distance of its Ritz values from the rest of the spectrum."""
    n, p = a.shape[-1], xt.shape[0]
    q = divide(jnp.linalg.cholesky(product(xt, b, xt.mT)), xt)
    white, rank = white_of(b)
    inside = product(q, a, q.mT)
    ritz = jnp.linalg.eigvalsh((inside + inside.mT) / 2)
    off = product(white.mT, a @ q.mT - product(b, q.mT, inside))
    error = jnp.sqrt(jnp.sum(off**2))
    # the whitened matrix on the complement of q; q and what whitening dropped are sent below everything
    z = product(white.mT, b, q.mT)
    rest = jnp.eye(n, dtype=a.dtype) - product(z, z.mT)
    held = product(white.mT, a, white)
    low = jnp.sqrt(jnp.sum(held**2)) + 1
    dropped = (jnp.arange(n, dtype=jnp.int32) >= rank).astype(a.dtype)
    most = jnp.linalg.eigvalsh(product(rest, held, rest) - low * (product(z, z.mT) + jnp.diag(dropped)))[-1]
    most = jnp.where(rank > p, most, -low)
    apart = ritz[0] - most
    widest = jnp.sqrt(jnp.minimum(jnp.asarray(p, a.dtype), (rank - p).astype(a.dtype)))
    s = jnp.where(apart * widest > error, error / jnp.where(apart > 0, apart, jnp.ones_like(apart)), widest)
    return copies * (2 * error * s - apart * s**2) / 2, apart


# --------------------------------------------------------------------------------------------------------- where B is not known


def _interval(problem: BlockProblem, x: Blocks, batches: Any, confidence: float) -> tuple[float, float]:
    from scipy.special import stdtrit

    stream = as_stream(batches)
    seen, step = [], 0
    while stream.per_pass is None or step < stream.per_pass:
        try:
            batch = stream.batch(step)
        except EndOfData:
            break
        seen.append(float(_squared_violation(problem.feed(jax.tree.map(jnp.asarray, batch)), x)))
        step += 1
    if len(seen) < 2:
        raise ArgumentError(f"batches must be at least two for an interval, got {len(seen)}")
    half = stdtrit(len(seen) - 1, (1 + confidence) / 2) * np.std(seen, ddof=1) / math.sqrt(len(seen))
    low, high = np.mean(seen) - half, np.mean(seen) + half
    return math.sqrt(max(low, 0.0)), math.sqrt(max(high, 0.0))


@jax.jit
def _squared_violation(problem: BlockProblem, x: Blocks) -> Array:
    """The unbiased estimate of the squared violation from the batch that the problem holds."""
    return total(squared_violation(op, xt) for op, xt in zip(problem.batch.operators, x, strict=True))


def squared_violation(op: Gram, xt: Array) -> Array:
    r"""The mean of $\langle y_i y_i^\top + T, y_j y_j^\top + T\rangle$ over pairs of distinct rows, $y_i = X^\top a_i$, $T = X^\top R X - I$."""
    if not isinstance(op, Gram) or op.rows.shape[0] < 2:
        raise ArgumentError("a held-out batch must hold at least two rows of data for each block")
    scores, r = op.image(xt), op.number
    shift = _residual(product(xt, ridged(jnp.zeros_like(xt), xt, op.ridge).mT))
    squares = product(scores, scores.mT)
    lengths = jnp.sum(scores**2, axis=0)
    pairs = (jnp.sum(squares**2) - jnp.sum(lengths**2)) / (r * (r - 1))
    return pairs + 2 * jnp.sum(squares * shift) / r + jnp.sum(shift**2)
