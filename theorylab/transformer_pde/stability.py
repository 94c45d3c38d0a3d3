"""States at rest and directions of blow-up: where they are, and whether they attract."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.psd import lyapunov as solve_lyapunov
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.attention import Attention, Head, check_state, is_concrete
from theorylab.transformer_pde.gaussian import Gaussian, _floating

Array = jax.Array


class BlowUpLines(NamedTuple):
    r"""The directions along which softmax attention can blow up, one for each eigenvector of $V$.

    Attributes:
        directions: unit eigenvectors $u$ of $V$ as rows; NaN where the eigenvalue is not real.
        rates: $\lambda\,u^\top A u$: the blow-up needs it positive, and then $\operatorname{tr}\Sigma \sim 1 / (2\lambda\,u^\top Au\,(t^* - t))$.
        numbers: $\max (u^\top A u)(\operatorname{Re}\mu - \lambda)$ over the other eigenvalues $\mu$ of $V$; negative where the direction attracts.
        attracting: whether nearby directions tend to this one.
    """

    directions: Array
    rates: Array
    numbers: Array
    attracting: Array


class FrozenLines(NamedTuple):
    r"""Lines on which a covariance $uu^\top$ of rank one is at rest, $u^\top A u = 0$.

    Attributes:
        directions: unit vectors $u$ as rows; NaN where there is no such line.
        numbers: $u^\top(A + A^\top)Vu$ and $u^\top A V u$, shape `(..., 2)`.
        attracting: both numbers are negative.
        repelling: one of them is positive.
    """

    directions: Array
    numbers: Array
    attracting: Array
    repelling: Array


class Stationarity(NamedTuple):
    r"""How far a state is from being stationary.

    Attributes:
        residual: $\min_J \|BL - LJ\|$ over skew-symmetric $J$: zero exactly where the covariance stands still.
        motion: $\|BL\|$: zero where every token is at rest.
        rotation: the minimizing $J$, by which tokens turn inside a covariance that stands still.
    """

    residual: Array
    motion: Array
    rotation: Array


def blow_up_lines(attention: Head) -> BlowUpLines:
    r"""The rank-one profiles of a blow-up of softmax attention and their stability (companion derivation, profile at the blow-up).

    On the host, because the eigenvectors of a matrix that is not symmetric are.

    Args:
        attention: a softmax or linear head.

    Raises:
        ArgumentError: the attention is not a single head of degree two.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> lines = blow_up_lines(tp.Softmax(jnp.eye(2), jnp.eye(2), jnp.diag(jnp.array([2.0, 1.0]))))
        >>> lines.rates.tolist(), lines.attracting.tolist()
        ([2.0, 1.0], [True, False])
    """
    if not isinstance(attention, Head) or attention.degree != 2:
        raise ArgumentError(f"attention must be a softmax or linear head, got {type(attention).__name__}")
    A, V = np.asarray(attention.A), np.asarray(attention.value_matrix)
    values, vectors = (np.asarray(a, complex) for a in np.linalg.eig(V))
    order = np.argsort(-np.real(values), kind="stable")
    re, im, vectors = np.real(values)[order], np.imag(values)[order], np.real(vectors)[:, order].T
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    directions[np.abs(im) > 1e-12 * np.abs(values).max()] = np.nan
    form = np.einsum("ni,ij,nj->n", directions, A, directions)
    gaps = form[:, None] * (re[None, :] - re[:, None])
    numbers = np.max(np.where(np.eye(len(re), dtype=bool), -np.inf, gaps), axis=1, initial=-np.inf)
    rates = re * form
    return BlowUpLines(*map(jnp.asarray, (directions, rates, numbers, (rates > 0) & (numbers < 0))))


def frozen_lines(attention: Head, directions: Any = None) -> FrozenLines:
    r"""Frozen states of rank one and their stability (companion derivation, frozen lines).

    Args:
        attention: a softmax, linear, L2 or Sinkhorn head: what is frozen is the same for all; stability is that of softmax.
        directions: vectors $u$ with $u^\top A u = 0$, shape `(count, dim)`; None finds the two lines of a two-dimensional head.

    Raises:
        ShapeError: `directions` does not match, or is None in another dimension than two, where the lines form a cone.
        ArgumentError: a direction has $u^\top A u \ne 0$, or the attention is not a single head.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> lines = frozen_lines(tp.Softmax.bilinear(jnp.diag(jnp.array([1.0, -1.0])), jnp.diag(jnp.array([1.0, 3.0]))))
        >>> (2 * lines.directions**2).round(9).tolist(), lines.attracting.tolist()        # the two diagonals
        ([[1.0, 1.0], [1.0, 1.0]], [True, True])
    """
    if not isinstance(attention, Head):
        raise ArgumentError(f"attention must be a single head, got {type(attention).__name__}")
    A, V = attention.A, attention.value_matrix
    if directions is None:
        if attention.dim != 2:
            raise ShapeError(f"directions must be given in dimension {attention.dim}: only in dimension 2 are there finitely many frozen lines")
        values, vectors = jnp.linalg.eigh(A + A.T)
        both = jnp.sqrt(jnp.stack([values[1], -values[0]]) / jnp.where(values[1] > values[0], values[1] - values[0], 1.0))   # NaN if definite
        u = jnp.stack([vectors @ both, vectors @ (both * jnp.array([1, -1], both.dtype))])
    else:
        u = _floating("directions", directions)
        if u.ndim != 2 or u.shape[1] != attention.dim:
            raise ShapeError(f"directions must have shape (count, {attention.dim}), got {u.shape}")
        u = u / jnp.linalg.norm(u, axis=1, keepdims=True)
        off = jnp.abs(jnp.einsum("ni,ij,nj->n", u, A, u)).max(initial=0.0)
        if is_concrete(off, A) and float(off) > 1e-6 * float(jnp.linalg.norm(A)):
            raise ArgumentError(f"directions must satisfy u^T A u = 0, got {float(off):.3g}")
    numbers = jnp.stack([jnp.einsum("ni,ij,nj->n", u, form @ V, u) for form in (A + A.T, A)], axis=-1)
    return FrozenLines(u, numbers, (numbers < 0).all(-1), (numbers > 0).any(-1))


def stationarity(attention: Attention, state: Gaussian) -> Stationarity:
    r"""Whether a covariance stands still: $BL = LJ$ with a skew-symmetric $J$ (companion derivation, stationary points).

    Frozen states have $L^\top A L = 0$ and $BL = 0$, for softmax, L2 and Sinkhorn alike; rotating ones have $J \ne 0$.

    Args:
        attention: a variant that maps Gaussians to Gaussians.
        state: one Gaussian.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
        >>> found = stationarity(tp.Softmax(jnp.eye(2), jnp.eye(2), turn), tp.Gaussian.standard(2))
        >>> float(found.residual), round(float(found.motion), 6), found.rotation.tolist()
        (0.0, 1.414214, [[0.0, 1.0], [-1.0, 0.0]])
    """
    check_state(attention, state, Gaussian)
    factor = state.factor
    moved = attention.factor_velocity(state.mean, factor)[1]
    cross = factor.T @ moved
    rotation = solve_lyapunov(factor.T @ factor, cross - cross.T)                        # the normal equations over skew matrices
    rotation = (rotation - rotation.T) / 2
    return Stationarity(jnp.linalg.norm(moved - factor @ rotation), jnp.linalg.norm(moved), rotation)
