"""Checks of arguments on the host, shared by all families: each error names the argument, what it was and what was expected.

Shapes and dtypes are checked always; values only when they are known, so a tracer passes. A check returns its argument, as a
JAX array where the name says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from theorylab.core.tree import check_finite
from theorylab.errors import ArgumentError, MatrixError, PrecisionError, ShapeError, ToleranceError, UnknownNameError

ROUND_OFF_UNITS = 10
ASYMMETRY_UNITS = 1000


def known(*values: Any) -> bool:
    """Whether no argument is a tracer, so that values can be looked at."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def _shape_text(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("any" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def array(name: str, value: Any, shape: Sequence[int | None] | None = None, *, batched: bool = False, finite: bool = True) -> jax.Array:
    """`value` as a real JAX array of float32 or float64; whole numbers become the default float.

    Args:
        name: how the caller calls it.
        value: anything array-like.
        shape: the expected shape; None stands for any length of an axis.
        batched: whether leading axes before `shape` are allowed.
        finite: whether NaN and infinity are refused.

    Raises:
        PrecisionError: the dtype is not a real one, or is half precision.
        ShapeError: another shape than expected, or an axis of length 0.
        NonFiniteInputError: an entry is NaN or infinite.

    Example:
        >>> array("x", [1, 2, 3], (None,)).dtype.name
        'float64'
        >>> array("x", jnp.ones((2, 3)), (None, 2))
        Traceback (most recent call last):
        ...
        theorylab.errors.ShapeError: x must have shape (any, 2), got (2, 3)
    """
    if not isinstance(value, (jax.Array, np.ndarray)):
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise ShapeError(f"{name} must be an array, got nested sequences of unequal lengths") from error
    kind, dtype = np.dtype(value.dtype).kind if not jnp.issubdtype(value.dtype, jax.dtypes.extended) else "key", value.dtype
    half = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    if half or kind not in "iufb" or (kind == "f" and np.dtype(dtype).itemsize > 8):
        raise PrecisionError(f"{name} must hold real numbers of float32 or float64, got dtype {dtype}")
    if shape is not None:
        tail = value.shape[value.ndim - len(shape):] if value.ndim >= len(shape) else None
        wrong = tail is None or (not batched and value.ndim != len(shape)) or any(n is not None and n != m for n, m in zip(shape, tail, strict=True))
        if wrong:
            raise ShapeError(f"{name} must have shape {_shape_text(shape)}{' after leading axes' if batched else ''}, got {_shape_text(value.shape)}")
    if 0 in value.shape:
        raise ShapeError(f"{name} must not be empty, got shape {_shape_text(value.shape)}")
    if finite:
        check_finite(name, value)
    return jnp.asarray(value, dtype=None if kind == "f" else jnp.result_type(float))


def square(name: str, value: Any, dim: int | None = None, *, batched: bool = False) -> jax.Array:
    """`value` as a finite real square matrix (`dim` by `dim`), or with `batched` as matrices along leading axes.

    Raises:
        ShapeError: not square, or not of size `dim`.
    """
    if np.ndim(value) < 2 or (np.ndim(value) > 2 and not batched) or np.shape(value)[-1] != np.shape(value)[-2]:
        raise ShapeError(f"{name} must be a square matrix{' (leading axes allowed)' if batched else ''}, got shape {_shape_text(np.shape(value))}")
    if dim is not None and np.shape(value)[-1] != dim:
        raise ShapeError(f"{name} must be {dim} x {dim} to match the other arguments, got {np.shape(value)[-2]} x {np.shape(value)[-1]}")
    return array(name, value)


def symmetric(name: str, value: Any, dim: int | None = None, *, batched: bool = False) -> jax.Array:
    """`value` as a symmetric matrix; asymmetry up to a thousand units of round-off is accepted.

    Raises:
        MatrixError: not symmetric; the message shows the worst pair of entries.
    """
    matrix = square(name, value, dim, batched=batched)
    if known(value):
        host = np.asarray(value, np.dtype(matrix.dtype))
        gap = np.abs(host - np.swapaxes(host, -1, -2))
        excess = gap - ASYMMETRY_UNITS * np.finfo(host.dtype).eps * _largest(host)
        if excess.max() > 0:
            where = tuple(int(i) for i in np.unravel_index(np.argmax(excess), gap.shape))
            mirror = (*where[:-2], where[-1], where[-2])
            raise MatrixError(f"{name} must be symmetric, got {host[where]:.6g} at {where} and {host[mirror]:.6g} at {mirror}; "
                              f"if the difference is noise, pass symmetrize({name})")
    return matrix


def _largest(host: np.ndarray) -> np.ndarray:
    """The largest magnitude in each matrix, with axes of length 1 in its place."""
    return np.abs(host).max(axis=(-2, -1), keepdims=True)


def _check_spectrum(name: str, words: str, host: np.ndarray, level: np.ndarray, advice: str) -> None:
    """Refuse matrices with an eigenvalue below their `level`, showing the worst one."""
    try:  # a Cholesky factor is ten times cheaper than the eigenvalues, which only a refusal needs
        np.linalg.cholesky(host - level * np.eye(host.shape[-1], dtype=host.dtype))
        return
    except np.linalg.LinAlgError:
        values = np.linalg.eigvalsh(host)
    margin = (values[..., 0] - level[..., 0, 0]) / np.maximum(_largest(host), np.finfo(host.dtype).tiny)[..., 0, 0]
    where = np.unravel_index(np.argmin(margin), margin.shape)
    if margin[where] < 0:
        which = f" (matrix {tuple(map(int, where))})" if where else ""
        raise MatrixError(f"{name} must be {words}, its smallest eigenvalue is {values[where][0]:.3g} and its largest "
                          f"{values[where][-1]:.3g}{which}; {advice}")


def definite(name: str, value: Any, dim: int | None = None, *, batched: bool = False) -> jax.Array:
    """`value` as a symmetric positive definite matrix: the smallest eigenvalue above round-off of the largest entry.

    Raises:
        MatrixError: not symmetric, or not positive definite; the message shows the smallest eigenvalue.

    Example:
        >>> definite("B", jnp.diag(jnp.array([1.0, -2.0])))
        Traceback (most recent call last):
        ...
        theorylab.errors.MatrixError: B must be positive definite, its smallest eigenvalue is -2 and its largest 1; add a ridge to B or drop rows
    """
    matrix = symmetric(name, value, dim, batched=batched)
    if known(value):
        host = np.asarray(value, np.dtype(matrix.dtype))
        info = np.finfo(host.dtype)
        level = host.shape[-1] * info.eps * _largest(host) + info.tiny
        _check_spectrum(name, "positive definite", host, level, f"add a ridge to {name} or drop rows")
    return matrix


def semidefinite(name: str, value: Any, dim: int | None = None, *, batched: bool = False) -> jax.Array:
    """`value` as a symmetric positive semidefinite matrix, up to round-off.

    Raises:
        MatrixError: not symmetric, or an eigenvalue is negative beyond round-off; the message shows it.
    """
    matrix = symmetric(name, value, dim, batched=batched)
    if known(value):
        host = np.asarray(value, np.dtype(matrix.dtype))
        slack = ROUND_OFF_UNITS * host.shape[-1] * np.finfo(host.dtype).eps * _largest(host)
        _check_spectrum(name, "positive semidefinite", host, -slack, "project_psd gives the nearest such matrix")
    return matrix


def same_dtype(**arrays: Any) -> None:
    """All arguments have one dtype; None is passed over.

    Raises:
        PrecisionError: two dtypes; the message lists them.
    """
    found = {name: np.dtype(a.dtype).name for name, a in arrays.items() if a is not None}
    if len(set(found.values())) > 1:
        raise PrecisionError(f"{' and '.join(found)} must have one dtype, got {', '.join(f'{n} {d}' for n, d in found.items())}; convert one of them")


def broadcastable(axes: int, **arrays: Any) -> tuple[int, ...]:
    """The leading axes, without the last `axes`, broadcast against each other; returns their common shape.

    Raises:
        ShapeError: they do not.
    """
    found = {name: a.shape[: a.ndim - axes] for name, a in arrays.items() if a is not None}
    try:
        return np.broadcast_shapes(*found.values())
    except ValueError:
        text = ", ".join(f"{name} {_shape_text(shape)}" for name, shape in found.items())
        raise ShapeError(f"leading axes of {' and '.join(found)} must broadcast, got {text}") from None


def same_length(axis: int = 0, **arrays: Any) -> int:
    """All arguments have the same length along `axis`; returns it.

    Raises:
        ShapeError: two lengths; the message lists them.
    """
    found = {name: np.shape(a)[axis] for name, a in arrays.items()}
    if len(set(found.values())) > 1:
        raise ShapeError(f"{' and '.join(found)} must have the same length along axis {axis}, got {', '.join(f'{n} {k}' for n, k in found.items())}")
    return next(iter(found.values()))


def _bounds(above: float | None, low: float | None, high: float | None, below: float | None) -> str:
    parts = [f"{words} {bound:g}" for words, bound in (("above", above), ("at least", low), ("at most", high), ("below", below)) if bound is not None]
    return " and ".join(parts)


def real(name: str, value: Any, *, above: float | None = None, low: float | None = None, high: float | None = None,
         below: float | None = None) -> Any:
    """`value`, a finite number within the bounds; a tracer passes.

    Raises:
        ArgumentError: not a number, or outside.
    """
    if not known(value):
        return value
    text = f"{name} must be a number {_bounds(above, low, high, below)}".rstrip()
    try:
        v = float(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"{text}, got {value!r}") from None
    inside = (above is None or v > above) and (low is None or v >= low) and (high is None or v <= high) and (below is None or v < below)
    if not math.isfinite(v) or not inside:
        raise ArgumentError(f"{text}, got {v:g}")
    return value


def whole(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """`value` as a Python integer within the bounds.

    Raises:
        ArgumentError: not a whole number, outside, or a tracer (it shapes arrays, so it must be known).

    Example:
        >>> whole("experts", 0, low=1)
        Traceback (most recent call last):
        ...
        theorylab.errors.ArgumentError: experts must be a whole number at least 1, got 0
    """
    text = f"{name} must be a whole number {_bounds(None, low, high, None)}".rstrip()
    if not known(value):
        raise ArgumentError(f"{text} known before compilation, got a traced value; pass a Python integer")
    if isinstance(value, (bool, str)) or np.ndim(value) != 0 or int(value) != value:
        raise ArgumentError(f"{text}, got {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ArgumentError(f"{text}, got {int(value)}")
    return int(value)


def among(name: str, value: Any, options: Sequence[Any] | Mapping[Any, Any]) -> Any:
    """`value`, one of `options`.

    Raises:
        UnknownNameError: it is not; the message lists the nearest.
    """
    if value not in options:
        raise UnknownNameError.of(name, value, options)
    return value


def tolerance(name: str, value: Any, dtype: Any) -> Any:
    """`value`, a positive relative tolerance that `dtype` can resolve: at least ten units of round-off; a tracer passes.

    Raises:
        ArgumentError: not a positive number.
        ToleranceError: too small for the dtype.
    """
    floor = ROUND_OFF_UNITS * float(jnp.finfo(dtype).eps)
    if known(real(name, value, above=0.0)) and float(value) < floor:
        raise ToleranceError(f"{name} must be at least {floor:.1e} for {jnp.dtype(dtype).name} data, got {float(value):g}; "
                             "raise it or pass data of higher precision")
    return value
