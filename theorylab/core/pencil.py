r"""The symmetric pencil $A v = \lambda B v$ and the geometry of the inner product $\langle x, y \rangle = x^\top B y$.

One route serves every B, compiled or not: B is scaled to unit diagonal and whitened by its eigenvectors, so the inverse of B is
never formed, units of the variables do not matter, and directions in which B vanishes are dropped and counted. A Cholesky
factor would be cheaper but says nothing when B is singular, and choosing between the two by value would run both under `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from theorylab.core import checks
from theorylab.core.psd import _cut, _lyapunov, _sqrtm, _symmetrize, product, rank_cut
from theorylab.errors import MatrixError, ShapeError

Matrices = Float[Array, "*batch n n"]
Columns = Float[Array, "*batch n p"]


class Eigenpairs(NamedTuple):
    r"""Solution of a symmetric pencil.

    Attributes:
        values: ascending, shape (..., n); infinite in the last n - rank places.
        vectors: columns with $v^\top B v = 1$, orthogonal in B; zero in the last n - rank places.
        rank: numerical rank of B.
    """

    values: Array
    vectors: Array
    rank: Array


class Whitening(NamedTuple):
    r"""A matrix W with $W^\top B W = I$ on its first `rank` columns; the others are zero."""

    matrix: Array
    rank: Array


def whiten(b: Any, cut: float | None = None) -> Whitening:
    r"""A whitening matrix of B: $W^\top B W = I$ on its first `rank` columns, and zero columns for directions in which B vanishes.

    For the symmetric choice $B^{-1/2}$, which can also be differentiated, use `inv_sqrtm`.

    Args:
        b: symmetric positive semidefinite, shape (..., n, n).
        cut: eigenvalues of B, scaled to unit diagonal, below `cut` times the largest count as zero; `10 n` units of round-off unless given.

    Raises:
        ShapeError: b is not square.
        MatrixError: b is not symmetric positive semidefinite.
        ArgumentError: `cut` is not in [0, 1).

    Example:
        >>> w = whiten(jnp.diag(jnp.array([4.0, 0.0])))
        >>> jnp.abs(w.matrix).tolist(), int(w.rank)
        ([[0.5, 0.0], [0.0, 0.0]], 1)
    """
    b = checks.semidefinite("b", b, batched=True)
    return Whitening(*_whiten_of(b, _cut("cut", cut, b)))


@jax.jit
def _whiten_of(b: Matrices, cut: Float[Array, ""]) -> tuple[Matrices, Int[Array, "*batch"]]:
    return _whiten(_symmetrize(b), cut)


def _whiten(b: Matrices, cut: Float[Array, ""]) -> tuple[Matrices, Int[Array, "*batch"]]:
    diagonal = jnp.diagonal(b, axis1=-2, axis2=-1)
    used = diagonal > 0
    scale = jnp.where(used, 1 / jnp.sqrt(jnp.where(used, diagonal, jnp.ones_like(diagonal))), jnp.zeros_like(diagonal))
    values, vectors = jnp.linalg.eigh(scale[..., :, None] * b * scale[..., None, :])
    values, vectors = values[..., ::-1], vectors[..., ::-1]
    kept = values > cut * jnp.maximum(values[..., :1], 0)
    weight = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, jnp.ones_like(values))), jnp.zeros_like(values))
    return scale[..., :, None] * vectors * weight[..., None, :], jnp.sum(kept, axis=-1, dtype=jnp.int32)


def eigh(a: Any, b: Any = None, cut: float | None = None) -> Eigenpairs:
    r"""All eigenpairs of $A v = \lambda B v$ for symmetric A and positive semidefinite B, with $V^\top B V = I$.

    For singular B the pencil is restricted to the range of B; this gives its finite eigenvalues when A vanishes on the kernel of
    B (as in canonical correlation analysis). The places that remain hold infinite values and zero vectors.

    Derivatives: those of values are exact for simple eigenvalues whatever the spectrum of B; those of vectors hold
    $1 / (\lambda_i - \lambda_j)$ and are not finite at repeated values, where vectors are not functions of the matrices.

    Args:
        a: symmetric, shape (..., n, n).
        b: symmetric positive semidefinite, shape (..., n, n); the identity unless given.
        cut: eigenvalues of B, scaled to unit diagonal, below `cut` times the largest count as zero; `10 n` units of round-off unless given.

    Raises:
        ShapeError: shapes that do not match.
        MatrixError: a is not symmetric, or b is not symmetric positive semidefinite.
        PrecisionError: two dtypes.

    Example:
        >>> pairs = eigh(jnp.diag(jnp.array([2.0, 3.0])), jnp.diag(jnp.array([4.0, 1.0])))
        >>> pairs.values.tolist(), int(pairs.rank)
        ([0.5, 3.0], 2)
    """
    a = checks.symmetric("a", a, batched=True)
    b = jnp.eye(a.shape[-1], dtype=a.dtype) if b is None else checks.semidefinite("b", b, a.shape[-1], batched=True)
    checks.same_dtype(a=a, b=b)
    batch = checks.broadcastable(2, a=a, b=b)
    a, b = (jnp.broadcast_to(m, batch + m.shape[-2:]) for m in (a, b))
    values, vectors = _eigh_of(a, b, _cut("cut", cut, b))
    return Eigenpairs(values, vectors, jnp.sum(jnp.isfinite(values), axis=-1, dtype=jnp.int32))


@jax.jit
def _eigh_of(a: Matrices, b: Matrices, cut: Float[Array, ""]) -> tuple[Float[Array, "*batch n"], Matrices]:
    return _eigh(_symmetrize(a), _symmetrize(b), cut)


@jax.custom_jvp
def _eigh(a: Matrices, b: Matrices, cut: Float[Array, ""]) -> tuple[Float[Array, "*batch n"], Matrices]:
    white, rank = _whiten(b, cut)
    inside = _symmetrize(product(white.mT, a, white))
    # Dropped directions are decoupled zero rows; a diagonal entry above the spectrum sends them to the end.
    dropped = jnp.arange(a.shape[-1], dtype=jnp.int32) >= rank[..., None]
    above = 2 * jnp.sqrt(jnp.sum(inside**2, axis=(-2, -1), keepdims=True)) + 1
    values, vectors = jnp.linalg.eigh(jnp.where(dropped[..., :, None] & dropped[..., None, :], above * jnp.eye(a.shape[-1], dtype=a.dtype), inside))
    return jnp.where(dropped, jnp.full_like(values, jnp.inf), values), product(white, vectors)


@_eigh.defjvp
def _eigh_rule(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[tuple, tuple]:
    # v_j moves by sum_i v_i (v_i' (dA - l_j dB) v_j) / (l_j - l_i), and by -v_j (v_j' dB v_j) / 2 to stay of unit length in B.
    a, b, cut = primals
    da, db = _symmetrize(tangents[0]), _symmetrize(tangents[1])
    values, vectors = _eigh(a, b, cut)
    finite = jnp.isfinite(values)
    level = jnp.where(finite, values, jnp.zeros_like(values))
    stretch = product(vectors.mT, db, vectors)
    push = product(vectors.mT, da, vectors) - stretch * level[..., None, :]
    own = jnp.eye(a.shape[-1], dtype=bool)
    apart = ~own & finite[..., :, None] & finite[..., None, :]
    gap = jnp.where(apart, level[..., None, :] - level[..., :, None], jnp.ones_like(push))
    mix = jnp.where(apart, push / gap, jnp.where(own, -stretch / 2, jnp.zeros_like(push)))
    change = jnp.where(finite, jnp.diagonal(push, axis1=-2, axis2=-1), jnp.zeros_like(values))
    return (values, vectors), (change, product(vectors, mix))


Product = Callable[[Array], Array]


def orthonormalize(x: Any, b: Any = None, kind: str = "cholesky") -> Array:
    r"""A B-orthonormal basis Q of the span of the columns of x: $Q^\top B Q = I$.

    The Gram matrix $x^\top B x$ is factored twice, so that Q is orthonormal to round-off as long as the factor exists (condition
    of x in B up to about the inverse root of round-off). Compiled code answers dependent columns with NaN.

    Args:
        x: shape (..., n, p) with p at most n.
        b: symmetric positive definite matrix, shape (..., n, n), or a function x -> B x; the identity unless given.
        kind: `"cholesky"` keeps the span of the first columns, as Gram-Schmidt does; `"polar"` is nearest to x, see `polar`.

    Raises:
        ShapeError: shapes that do not match, or more columns than rows.
        MatrixError: the columns are dependent in the inner product of b.
        UnknownNameError: another `kind`.

    Example:
        >>> orthonormalize(jnp.array([[2.0], [0.0]])).tolist()
        [[1.0], [0.0]]
    """
    checks.among("kind", kind, ("cholesky", "polar"))
    x, b, apply = _basis(x, b)
    # A function may close over anything, so only a matrix goes through the compiled form.
    result, gram = _orthonormalize_of(x, b, kind) if apply is None else _orthonormalize(x, apply, kind)
    _check_independent(gram)
    return result


def polar(x: Any, b: Any = None) -> Array:
    r"""The B-polar factor $x (x^\top B x)^{-1/2}$: the B-orthonormal basis nearest to x in the norm of B.

    Derivatives of every order are finite, also at x that is B-orthonormal already. Arguments and errors are those of `orthonormalize`.

    Example:
        >>> polar(2 * jnp.eye(2)).round(12).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return orthonormalize(x, b, "polar")


def _tall(name: str, value: Any, rows: int | None = None) -> Array:
    value = checks.array(name, value, (rows, None), batched=True)
    if value.shape[-1] > value.shape[-2]:
        raise ShapeError(f"{name} must have at most as many columns as rows, got shape {value.shape}")
    return value


def _basis(x: Any, b: Any) -> tuple[Array, Any, Any]:
    x = _tall("x", x)
    n, p = x.shape[-2:]
    if b is None or callable(b):
        return x, None, b
    b = checks.semidefinite("b", b, n, batched=True)
    checks.same_dtype(x=x, b=b)
    return jnp.broadcast_to(x, checks.broadcastable(2, x=x, b=b) + (n, p)), b, None


def _check_independent(gram: Array) -> None:
    if not checks.known(gram):
        return
    host = np.asarray(gram)
    scale = 1 / np.sqrt(np.maximum(np.diagonal(host, axis1=-2, axis2=-1), np.finfo(host.dtype).tiny))
    low = np.linalg.eigvalsh(scale[..., :, None] * host * scale[..., None, :])[..., 0].min()
    if not low > rank_cut(host.shape[-1], host.dtype) / 10:
        raise MatrixError("columns of x must be independent in the inner product of b, the Gram matrix of the columns, scaled to unit "
                          f"length, has smallest eigenvalue {low:.3g}; drop columns or pass data of higher precision")


@partial(jax.jit, static_argnames="kind")
def _orthonormalize_of(x: Columns, b: Array | None, kind: str) -> tuple[Columns, Array]:
    return _orthonormalize(x, lambda x: x if b is None else product(_symmetrize(b), x), kind)


def _orthonormalize(x: Columns, apply: Product, kind: str) -> tuple[Columns, Array]:
    def gram(x: Array) -> Array:
        return _symmetrize(product(x.mT, apply(x)))

    def divide(x: Array, lower: Array) -> Array:
        return lax.linalg.triangular_solve(lower, x, left_side=False, lower=True, transpose_a=True)

    first = gram(x)
    coarse = jnp.linalg.cholesky(first, symmetrize_input=False)
    x = divide(x, coarse)
    fine = jnp.linalg.cholesky(gram(x), symmetrize_input=False)
    x = divide(x, fine)  # now the argument is x (coarse fine)'
    return (product(x, _orthogonal_factor(product(fine.mT, coarse.mT))) if kind == "polar" else x), first


@jax.custom_jvp
def _orthogonal_factor(r: Matrices) -> Matrices:
    """The orthogonal factor u of the polar decomposition r = u h of an invertible matrix."""
    left, _, right = jnp.linalg.svd(r)
    return product(left, right)


@_orthogonal_factor.defjvp
def _orthogonal_factor_rule(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # u' du is skew and solves h w + w h = u' dr - dr' u.
    (r,), (dr,) = primals, tangents
    u = _orthogonal_factor(r)
    stretch, turned = _symmetrize(product(u.mT, r)), product(u.mT, dr)
    values, vectors = jnp.linalg.eigh(lax.stop_gradient(stretch))
    total = values[..., :, None] + values[..., None, :]
    return u, product(u, _lyapunov(values, vectors, stretch, turned - turned.mT, total > 0))


def principal_angles(x: Any, y: Any, b: Any = None) -> Array:
    r"""Principal angles between the spans of the columns of x and of y, ascending, in the inner product of B.

    Each is the two-argument arctangent of its sine and its cosine (singular values of $(I - Q_x Q_x^\top) Q_y$ and of $Q_x^\top Q_y$), so
    angles near 0 and near $\pi/2$ are both accurate to round-off; the cosine alone resolves 1e-8 at best.

    Args:
        x: shape (..., n, p), independent columns.
        y: shape (..., n, q), independent columns.
        b: symmetric positive definite, shape (..., n, n); the identity unless given.

    Returns:
        The min(p, q) angles in $[0, \pi/2]$, shape (..., min(p, q)).

    Raises:
        ShapeError: shapes that do not match, or more columns than rows.
        MatrixError: columns of x or y are dependent, or b is not positive semidefinite.
        PrecisionError: two dtypes.

    Example:
        >>> float(principal_angles(jnp.array([[1.0], [0.0]]), jnp.array([[1.0], [1e-12]]))[0])
        1e-12
    """
    x = _tall("x", x)
    y = _tall("y", y, x.shape[-2])
    b = None if b is None else checks.semidefinite("b", b, x.shape[-2], batched=True)
    checks.same_dtype(x=x, y=y, b=b)
    checks.broadcastable(2, x=x, y=y, b=b)
    angles, upper_x, upper_y = _angles_of(x, y, b)
    for name, upper in (("x", upper_x), ("y", upper_y)):
        _check_full(name, upper)
    return angles


def _check_full(name: str, upper: Array) -> None:
    if checks.known(upper):
        pivots = np.linalg.svd(np.asarray(upper), compute_uv=False)
        if not np.all(pivots[..., -1] > 10 * max(upper.shape[-2:]) * np.finfo(upper.dtype).eps * pivots[..., 0]):
            raise MatrixError(f"columns of {name} must be independent, their singular values range from {pivots.min():.3g} to {pivots.max():.3g} "
                              "at unit length; drop columns")


@jax.jit
def _angles_of(x: Array, y: Array, b: Array | None) -> tuple[Array, Array, Array]:
    if b is not None:
        root = _sqrtm(_symmetrize(b))
        x, y = product(root, x), product(root, y)
    (qx, upper_x), (qy, upper_y) = (jnp.linalg.qr(m / jnp.linalg.norm(m, axis=-2, keepdims=True)) for m in (x, y))
    if qx.shape[-1] < qy.shape[-1]:
        qx, qy = qy, qx
    inner = product(qx.mT, qy)
    cosines = jnp.linalg.svd(inner, compute_uv=False)
    sines = jnp.linalg.svd(qy - product(qx, inner), compute_uv=False)[..., ::-1]
    return jnp.arctan2(sines, cosines), upper_x, upper_y
