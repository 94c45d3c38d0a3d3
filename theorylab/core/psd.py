r"""Symmetric positive semidefinite matrices: roots, the Lyapunov equation, projection, and the Bures geometry of covariances.

Functions take one matrix or matrices along leading axes. Forward values come from eigendecompositions; derivatives come from the
equation that defines the result, so derivatives of every order are finite at repeated eigenvalues, where differentiating an
eigendecomposition gives NaN.

On rank-deficient input the first derivative is the one along curves of constant rank. Higher derivatives there are finite and
are those of the range alone.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from theorylab.core import checks
from theorylab.errors import ArgumentError

CUT_UNITS = 10
Matrices = Float[Array, "*batch n n"]


def product(*factors: Array) -> Array:
    """Matrix product of all arguments, in the full precision of their dtype also on devices that round products by default."""
    return reduce(partial(jnp.matmul, precision=lax.Precision.HIGHEST), factors)


def rank_cut(dim: int, dtype: Any) -> float:
    """Eigenvalues below this multiple of the largest are round-off of a `dim` by `dim` matrix and count as zero."""
    return CUT_UNITS * dim * float(jnp.finfo(dtype).eps)


def symmetrize(a: Any) -> Array:
    """The symmetric part (a + aᵀ) / 2.

    Example:
        >>> symmetrize(jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    return _symmetrize(checks.square("a", a, batched=True))


def _symmetrize(a: Matrices) -> Matrices:
    return (a + a.mT) / 2


def _assemble(vectors: Matrices, values: Float[Array, "*batch n"]) -> Matrices:
    return _symmetrize(product(vectors * values[..., None, :], vectors.mT))


def _lyapunov(values: Float[Array, "*_ n"], vectors: Float[Array, "*_ n n"], s: Float[Array, "*_ n n"], c: Matrices,
              solvable: Bool[Array, "*_ n n"]) -> Matrices:
    """Solve s x + x s = c where (values, vectors) are the eigenpairs of s, not differentiated; x is zero on pairs that are not solvable."""
    total = values[..., :, None] + values[..., None, :]

    def solve(_: Any, rhs: Array) -> Array:
        inside = product(vectors.mT, rhs, vectors)
        return product(vectors, jnp.where(solvable, inside / jnp.where(solvable, total, jnp.ones_like(total)), jnp.zeros_like(inside)), vectors.mT)

    return lax.custom_linear_solve(lambda x: product(s, x) + product(x, s), c, solve, symmetric=True)


def lyapunov(s: Any, c: Any) -> Array:
    r"""The solution x of $s x + x s = c$ for symmetric s, differentiable in both arguments to any order.

    Pairs of eigenvalues of s whose sum is below `rank_cut` times the largest magnitude have no solution; x is zero on them.

    Args:
        s: symmetric, shape (..., n, n); no two eigenvalues opposite.
        c: shape (..., n, n), any matrix.

    Raises:
        ShapeError: not square, or sizes that do not match.
        MatrixError: s is not symmetric.

    Example:
        >>> lyapunov(2 * jnp.eye(2), jnp.ones((2, 2))).tolist()
        [[0.25, 0.25], [0.25, 0.25]]
    """
    s = checks.symmetric("s", s, batched=True)
    c = checks.square("c", c, s.shape[-1], batched=True)
    checks.same_dtype(s=s, c=c)
    batch = checks.broadcastable(2, s=s, c=c)
    return _lyapunov_of(s, jnp.broadcast_to(c, batch + c.shape[-2:]))


@jax.jit
def _lyapunov_of(s: Float[Array, "*_ n n"], c: Matrices) -> Matrices:
    s = _symmetrize(s)
    values, vectors = jnp.linalg.eigh(lax.stop_gradient(s))
    total = jnp.abs(values[..., :, None] + values[..., None, :])
    limit = rank_cut(s.shape[-1], s.dtype) * jnp.max(jnp.abs(values), axis=-1)[..., None, None]
    return _lyapunov(values, vectors, s, c, total > limit)


def sqrtm(a: Any) -> Array:
    r"""The symmetric square root of a positive semidefinite matrix.

    The derivative S solves the Lyapunov equation $a^{1/2} S + S a^{1/2} = \dot a$. Sums of two root eigenvalues below ten times
    the root of round-off, relative to the largest, count as zero, so on rank-deficient input the derivative is that of the range.

    Args:
        a: symmetric positive semidefinite up to round-off, shape (..., n, n).

    Raises:
        ShapeError: a is not square.
        MatrixError: a is not symmetric, or has a negative eigenvalue.

    Example:
        >>> sqrtm(jnp.diag(jnp.array([4.0, 9.0]))).round(12).tolist()
        [[2.0, 0.0], [0.0, 3.0]]
        >>> jax.grad(lambda a: jnp.trace(sqrtm(a)))(jnp.eye(2)).round(12).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    return _sqrtm_of(checks.semidefinite("a", a, batched=True))


@jax.jit
def _sqrtm_of(a: Matrices) -> Matrices:
    return _sqrtm(_symmetrize(a))


@jax.custom_jvp
def _sqrtm(a: Matrices) -> Matrices:
    values, vectors = jnp.linalg.eigh(a)
    return _assemble(vectors, jnp.sqrt(jnp.maximum(values, 0)))


@_sqrtm.defjvp
def _sqrtm_rule(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (a,), (da,) = primals, tangents
    root = _sqrtm(a)
    values, vectors = jnp.linalg.eigh(lax.stop_gradient(a))  # the same expression as in `_sqrtm`: compiled once
    values = jnp.sqrt(jnp.maximum(values, 0))
    limit = CUT_UNITS * jnp.sqrt(jnp.finfo(a.dtype).eps).astype(a.dtype) * values[..., -1:, None]
    return root, _lyapunov(values, vectors, root, _symmetrize(da), values[..., :, None] + values[..., None, :] > limit)


def inv_sqrtm(a: Any, cut: float | None = None) -> Array:
    r"""The symmetric inverse square root $a^{-1/2}$; the pseudo-inverse of the root where a is rank-deficient.

    Args:
        a: symmetric positive semidefinite up to round-off, shape (..., n, n).
        cut: eigenvalues below `cut` times the largest count as zero; `10 n` times round-off unless given.

    Raises:
        ShapeError: a is not square.
        MatrixError: a is not symmetric, or has a negative eigenvalue.
        ArgumentError: `cut` is not in [0, 1).

    Example:
        >>> inv_sqrtm(jnp.diag(jnp.array([4.0, 0.0]))).round(12).tolist()
        [[0.5, 0.0], [0.0, 0.0]]
    """
    a = checks.semidefinite("a", a, batched=True)
    return _inv_sqrtm_of(a, _cut("cut", cut, a))


def _cut(name: str, cut: Any, a: Array) -> Array:
    if cut is None:
        cut = rank_cut(a.shape[-1], a.dtype)
    return jnp.asarray(checks.real(name, cut, low=0.0, below=1.0), a.dtype)


@jax.jit
def _inv_sqrtm_of(a: Matrices, cut: Float[Array, ""]) -> Matrices:
    return _inv_sqrtm(_symmetrize(a), cut)


def _kept(values: Float[Array, "*batch n"], cut: Float[Array, ""]) -> Bool[Array, "*batch n"]:
    return values > cut * jnp.maximum(values[..., -1:], 0)


@jax.custom_jvp
def _inv_sqrtm(a: Matrices, cut: Float[Array, ""]) -> Matrices:
    values, vectors = jnp.linalg.eigh(a)
    kept = _kept(values, cut)
    return _assemble(vectors, jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, jnp.ones_like(values))), jnp.zeros_like(values)))


@_inv_sqrtm.defjvp
def _inv_sqrtm_rule(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (a, cut), (da, _) = primals, tangents
    da = _symmetrize(da)
    inverse, root = _inv_sqrtm(a, cut), _sqrtm(a)
    values, vectors = jnp.linalg.eigh(lax.stop_gradient(a))
    kept = _kept(values, cut)
    # Inside the range: root r a r = projector gives root' dr + dr root = -r da r. Between range and kernel the derivative of
    # f(a) is f(l) / l = l^(-3/2), which that equation does not see.
    values = jnp.sqrt(jnp.maximum(values, 0))
    within = _lyapunov(values, vectors, root, -product(inverse, da, inverse), kept[..., :, None] & kept[..., None, :])
    kernel = jnp.eye(a.shape[-1], dtype=a.dtype) - product(root, inverse)
    across = product(inverse, inverse, inverse, da, kernel)
    full = jnp.all(kept, axis=-1)[..., None, None]
    return inverse, within + jnp.where(full, jnp.zeros_like(across), across + across.mT)


def project_psd(a: Any, floor: Any = 0.0) -> Array:
    r"""The nearest symmetric matrix, in Frobenius norm, with eigenvalues of at least `floor`.

    Differentiable where no eigenvalue equals `floor`; on eigenvalues equal to it the derivative is one half.

    Args:
        a: symmetric, shape (..., n, n).
        floor: a number, possibly traced.

    Raises:
        ShapeError: a is not square.
        MatrixError: a is not symmetric.

    Example:
        >>> project_psd(jnp.diag(jnp.array([1.0, -1.0]))).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    a = checks.symmetric("a", a, batched=True)
    return _project_psd_of(a, jnp.asarray(checks.real("floor", floor), a.dtype))


@jax.jit
def _project_psd_of(a: Matrices, floor: Float[Array, ""]) -> Matrices:
    shift = floor * jnp.eye(a.shape[-1], dtype=a.dtype)
    return _positive_part(_symmetrize(a) - shift) + shift


@jax.custom_jvp
def _positive_part(a: Matrices) -> Matrices:
    values, vectors = jnp.linalg.eigh(a)
    return _assemble(vectors, jnp.maximum(values, 0))


@_positive_part.defjvp
def _positive_part_rule(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The positive part is (a + |a|) / 2, and |a|² = a² gives |a| d|a| + d|a| |a| = a da + da a.
    (a,), (da,) = primals, tangents
    da, part = _symmetrize(da), _positive_part(a)
    values, vectors = jnp.linalg.eigh(lax.stop_gradient(a))
    values = jnp.abs(values)
    limit = rank_cut(a.shape[-1], a.dtype) * jnp.max(values, axis=-1)[..., None, None]
    turned = product(a, da)
    change = _lyapunov(values, vectors, 2 * part - a, turned + turned.mT, values[..., :, None] + values[..., None, :] > limit)
    return part, (da + change) / 2


def bures(a: Any, b: Any, mean_a: Any = None, mean_b: Any = None) -> Array:
    r"""The Bures distance between covariance matrices; with means, the 2-Wasserstein distance between Gaussians.

    $$ d(a, b)^2 = |m_a - m_b|^2 + \operatorname{tr} a + \operatorname{tr} b - 2 \operatorname{tr} (a^{1/2} b\, a^{1/2})^{1/2} $$

    It is computed as the smallest $\|a^{1/2} - b^{1/2} U\|_F$ over orthogonal U, which does not cancel: the error of d is a few
    units of round-off of $\|a^{1/2}\|$ for invertible matrices, also when a and b are nearly equal. Of a singular matrix the
    root is known to the root of round-off only, and so is d. At distance zero, where d has no derivative, 0 is returned for it.

    Args:
        a: covariance, shape (..., n, n). Leading axes of all arguments broadcast; a matrix given once is factored once.
        b: covariance, shape (..., n, n).
        mean_a: mean, shape (..., n); given with `mean_b` or not at all.
        mean_b: mean, shape (..., n).

    Returns:
        Distances with the broadcast leading axes.

    Raises:
        ShapeError: shapes that do not match.
        MatrixError: a matrix is not symmetric positive semidefinite.
        PrecisionError: arguments of two dtypes.

    Example:
        >>> round(float(bures(jnp.eye(2), 4 * jnp.eye(2)) ** 2), 12)
        2.0
    """
    squared = bures_squared(a, b, mean_a, mean_b)
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, jnp.ones_like(squared))), jnp.zeros_like(squared))


def bures_squared(a: Any, b: Any, mean_a: Any = None, mean_b: Any = None) -> Array:
    r"""The square of `bures`. Its gradient in a is $I - T$ with T = `bures_map(a, b)`, and it is 0 where a equals b.

    Example:
        >>> jax.grad(bures_squared)(jnp.eye(2), 4 * jnp.eye(2)).round(12).tolist()
        [[-1.0, 0.0], [0.0, -1.0]]
    """
    a = checks.semidefinite("a", a, batched=True)
    b = checks.semidefinite("b", b, a.shape[-1], batched=True)
    if (mean_a is None) != (mean_b is None):
        given, missing = ("mean_b", "mean_a") if mean_a is None else ("mean_a", "mean_b")
        raise ArgumentError(f"{missing} must be given with {given}, got None")
    if mean_a is not None:
        mean_a = checks.array("mean_a", mean_a, (a.shape[-1],), batched=True)
        mean_b = checks.array("mean_b", mean_b, (a.shape[-1],), batched=True)
        checks.broadcastable(1, mean_a=mean_a, mean_b=mean_b)
    checks.same_dtype(a=a, b=b, mean_a=mean_a, mean_b=mean_b)
    checks.broadcastable(2, a=a, b=b)
    return _bures_squared_of(a, b, mean_a, mean_b)


@jax.jit
def _bures_squared_of(a: Array, b: Array, mean_a: Array | None, mean_b: Array | None) -> Array:
    squared = _bures_squared(_symmetrize(a), _symmetrize(b))
    return squared if mean_a is None or mean_b is None else squared + jnp.sum((mean_a - mean_b) ** 2, axis=-1)


def _aligned(root_a: Float[Array, "*_ n n"], root_b: Float[Array, "*__ n n"]) -> Matrices:
    """The root of b turned to lie nearest the root of a: root_b U, with U the orthogonal polar factor of root_b root_a."""
    left, _, right = jnp.linalg.svd(product(root_b, root_a))
    return product(root_b, left, right)


@jax.custom_jvp
def _bures_squared(a: Float[Array, "*_ n n"], b: Float[Array, "*__ n n"]) -> Float[Array, "*batch"]:
    root_a = _sqrtm(a)
    return jnp.sum((root_a - _aligned(root_a, _sqrtm(b))) ** 2, axis=(-2, -1))


@_bures_squared.defjvp
def _bures_squared_rule(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    def by_traces(a: Array, b: Array) -> Array:
        root = _sqrtm(a)
        middle = _sqrtm(_symmetrize(product(root, b, root)))
        return jnp.trace(a, axis1=-2, axis2=-1) + jnp.trace(b, axis1=-2, axis2=-1) - 2 * jnp.trace(middle, axis1=-2, axis2=-1)

    return _bures_squared(*primals), jax.jvp(by_traces, primals, tangents)[1]


def bures_map(a: Any, b: Any) -> Array:
    r"""The matrix T of the optimal transport map x -> T x from N(0, a) to N(0, b): symmetric, with $T a T = b$.

    $$ T = a^{-1/2} (a^{1/2} b\, a^{1/2})^{1/2} a^{-1/2} $$

    For singular a it is taken on the range of a, and $T a T$ is the part of b that this range reaches.

    Args:
        a: covariance, shape (..., n, n). Leading axes broadcast; a matrix given once is factored once.
        b: covariance, shape (..., n, n).

    Raises:
        ShapeError: shapes that do not match.
        MatrixError: a matrix is not symmetric positive semidefinite.
        PrecisionError: two dtypes.

    Example:
        >>> bures_map(jnp.eye(2), 4 * jnp.eye(2)).round(12).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    a = checks.semidefinite("a", a, batched=True)
    b = checks.semidefinite("b", b, a.shape[-1], batched=True)
    checks.same_dtype(a=a, b=b)
    checks.broadcastable(2, a=a, b=b)
    return _bures_map_of(a, b)


@jax.jit
def _bures_map_of(a: Array, b: Array) -> Array:
    return _bures_map(_symmetrize(a), _symmetrize(b))


@jax.custom_jvp
def _bures_map(a: Float[Array, "*_ n n"], b: Float[Array, "*__ n n"]) -> Matrices:
    root = _sqrtm(a)
    inverse = _inv_sqrtm(a, _cut("cut", None, a))
    return _symmetrize(product(inverse, root, _aligned(root, _sqrtm(b)), inverse))


@_bures_map.defjvp
def _bures_map_rule(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # T a T = b gives dT a T + T a dT = db - T da T; times the root s of a from both sides, with s T s = (s b s)^(1/2),
    # it is a Lyapunov equation for s dT s.
    (a, b), (da, db) = primals, tangents
    mapping = _bures_map(a, b)
    root, inverse = _sqrtm(a), _inv_sqrtm(a, _cut("cut", None, a))
    middle = _symmetrize(product(root, mapping, root))
    values, vectors = jnp.linalg.eigh(lax.stop_gradient(middle))
    values = jnp.maximum(values, 0)
    limit = CUT_UNITS * jnp.sqrt(jnp.finfo(a.dtype).eps).astype(a.dtype) * values[..., -1:, None]
    right = product(root, _symmetrize(db) - product(mapping, _symmetrize(da), mapping), root)
    change = _lyapunov(values, vectors, middle, right, values[..., :, None] + values[..., None, :] > limit)
    return mapping, product(inverse, change, inverse)
