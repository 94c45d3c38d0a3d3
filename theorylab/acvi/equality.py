"""Linear equalities C x = d through the projector onto the null space of C and the least-norm point, however C is given."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi.functions import as_call
from theorylab.acvi.prox import like
from theorylab.core import checks, linear
from theorylab.core.module import Module, choice
from theorylab.errors import ArgumentError, MatrixError, NoClosedFormError, ShapeError

Array = jax.Array


class Equality(Module):
    r"""The contract of C x = d. With $P = I - C^+ C$ and the least-norm solution $c = C^+ d$, a point is feasible iff $x = P x + c$.

    Source: section 1 of Yang, Jordan and Chavdarova (2023), which writes $P_c$ and $d_c$ for them.
    """

    @property
    def dim(self) -> int | None:
        """Number of unknowns, or None if any."""
        return None

    @property
    def rows(self) -> int:
        """Number of equations p."""
        raise NotImplementedError(f"{type(self).__name__} must define rows")

    @property
    def point(self) -> Array:
        """The least-norm solution, shape `(n,)`."""
        raise NotImplementedError(f"{type(self).__name__} must define point")

    def null(self, u: Array) -> Array:
        """The projection of `u` onto the null space of C."""
        raise NotImplementedError(f"{type(self).__name__} must define null(u)")

    def residual(self, x: Array) -> Array:
        """The norm of C x - d."""
        raise NotImplementedError(f"{type(self).__name__} must define residual(x)")

    def project(self, x: Array) -> Array:
        """The nearest solution of C x = d."""
        return self.null(x) + like(self.point, x)

    def normal_rows(self) -> tuple[Array, Array]:
        """Orthonormal rows Q of shape `(p, n)`, zero where C was redundant, and e with `Q x = e` equivalent to `C x = d`."""
        raise NoClosedFormError(f"{type(self).__name__} has no matrix of its equations, which is needed here: pass equality=(C, d)")

    def bind(self, dim: int) -> Equality:
        """The equality ready for a problem of `dim` unknowns.

        Raises:
            ShapeError: it has another number of unknowns.
        """
        if self.dim not in (None, dim):
            raise ShapeError(f"equality: {type(self).__name__} has {self.dim} unknowns, the problem has {dim}")
        return self


class NoEquality(Equality):
    """No equation at all: the projector is the identity.

    Example:
        >>> NoEquality().null(jnp.ones(2)).tolist()
        [1.0, 1.0]
    """

    length: int | None = choice(None)

    @property
    def dim(self) -> int | None:
        return self.length

    @property
    def rows(self) -> int:
        return 0

    @property
    def point(self) -> Array:
        if self.length is None:
            raise ArgumentError("NoEquality has no point before it belongs to a problem: use bind(dim)")
        return jnp.zeros(self.length, jnp.result_type(float))

    def null(self, u: Array) -> Array:
        return u

    def project(self, x: Array) -> Array:
        return x

    def residual(self, x: Array) -> Array:
        return jnp.zeros((), x.dtype)

    def normal_rows(self) -> tuple[Array, Array]:
        point = self.point
        return jnp.zeros((0, point.shape[0]), point.dtype), jnp.zeros((0,), point.dtype)

    def bind(self, dim: int) -> Equality:
        super().bind(dim)
        return NoEquality(dim)


class DenseEquality(Equality):
    """C x = d with a matrix. Redundant rows are dropped through the singular values, with a warning.

    Args:
        C: shape `(p, n)`, rank below n.
        d: shape `(p,)`.

    Raises:
        ShapeError: shapes that do not match, or p >= n (for a matrix without redundant rows).
        MatrixError: C is 0, or C x = d has no solution.

    Example:
        >>> DenseEquality(jnp.ones((1, 2)), jnp.ones(1)).point.tolist()
        [0.5, 0.5]
    """

    C: Array
    d: Array
    basis: Array
    level: Array

    def __init__(self, C: Any, d: Any):
        self.C = checks.array("equality C", C, (None, None))
        p, n = self.C.shape
        d = checks.array("equality d", d, (p,))
        self.d = like(d, self.C)
        left, values, rows = jnp.linalg.svd(self.C, full_matrices=False)
        cut = max(p, n) * jnp.finfo(values.dtype).eps * values[0]
        keep = values > cut
        self.basis = jnp.where(keep[:, None], rows, jnp.zeros_like(rows))
        self.level = jnp.where(keep, (left.T @ self.d) / jnp.where(keep, values, jnp.ones_like(values)), jnp.zeros_like(values))
        if checks.known(C, d):
            self._check(int(keep.sum()))
        elif p >= n:
            raise ShapeError(f"equality C must have fewer rows than columns, got shape {(p, n)}")

    def replace(self, **changes: Any) -> DenseEquality:
        """A copy with another C or d, decomposed again."""
        return DenseEquality(**{"C": self.C, "d": self.d, **changes})

    def _check(self, rank: int) -> None:
        p, n = self.C.shape
        if rank == 0:
            raise MatrixError("equality C must not be 0")
        if rank >= n:
            raise ShapeError(f"equality C must have rank below its number of columns, got rank {rank} of shape {(p, n)}: it leaves a single point")
        left = float(self.residual(self.point))
        size = float(jnp.linalg.norm(self.C) * jnp.linalg.norm(self.point) + jnp.linalg.norm(self.d))
        if left > 100 * max(p, n) * float(jnp.finfo(self.C.dtype).eps) * size:
            raise MatrixError(f"equality C x = d has no solution: the least-squares residual is {left:.3g}; drop the contradicting rows")
        if rank < p:
            warnings.warn(f"equality C has {p - rank} redundant row{'s' * (p - rank > 1)} (rank {rank} of {p}); they are dropped", stacklevel=4)

    @property
    def dim(self) -> int | None:
        return self.C.shape[1]

    @property
    def rows(self) -> int:
        return self.C.shape[0]

    @property
    def point(self) -> Array:
        return self.basis.T @ self.level

    def null(self, u: Array) -> Array:
        basis = like(self.basis, u)
        return u - basis.T @ (basis @ u)

    def project(self, x: Array) -> Array:
        basis = like(self.basis, x)
        return x - basis.T @ (basis @ x - like(self.level, x))

    def residual(self, x: Array) -> Array:
        return jnp.linalg.norm(like(self.C, x) @ x - like(self.d, x))

    def normal_rows(self) -> tuple[Array, Array]:
        return self.basis, self.level


class BlockSimplex(Equality):
    """Consecutive blocks whose entries sum to a total: strategies of players, flows between pairs. O(n), no matrix.

    Args:
        sizes: length of each block.
        totals: the sums, a number or one per block.

    Example:
        >>> BlockSimplex((2, 3)).null(jnp.array([1.0, 3.0, 1.0, 1.0, 1.0])).tolist()
        [-1.0, 1.0, 0.0, 0.0, 0.0]
    """

    totals: Any
    sizes: tuple[int, ...] = choice()

    def __init__(self, sizes: Sequence[int], totals: Any = 1.0):
        if not isinstance(sizes, Sequence):
            raise ArgumentError(f"BlockSimplex: sizes must be a sequence of block lengths, got {sizes!r}")
        self.sizes = tuple(checks.whole("BlockSimplex sizes", size, low=1) for size in sizes)
        if sum(self.sizes) <= len(self.sizes):
            raise ShapeError(f"BlockSimplex: at least one block must have more than one entry, got sizes {self.sizes}")
        totals = checks.array("BlockSimplex totals", totals)
        if totals.shape not in ((), (len(self.sizes),)):
            raise ShapeError(f"BlockSimplex: totals must be a number or have shape ({len(self.sizes)},), got {totals.shape}")
        if checks.known(totals) and not np.all(np.asarray(totals) > 0):
            raise ArgumentError(f"BlockSimplex: totals must be above 0, got {np.asarray(totals).tolist()}")
        self.totals = jnp.broadcast_to(totals, (len(self.sizes),))

    @property
    def dim(self) -> int | None:
        return sum(self.sizes)

    @property
    def rows(self) -> int:
        return len(self.sizes)

    def split(self, x: Array) -> list[Array]:
        """The blocks of `x`."""
        ends = list(itertools.accumulate(self.sizes))
        return [x[end - size: end] for end, size in zip(ends, self.sizes, strict=True)]

    def sums(self, x: Array) -> Array:
        """The sum of each block, shape `(p,)`."""
        if len(set(self.sizes)) == 1:
            return jnp.sum(x.reshape(len(self.sizes), -1), axis=1)
        return jnp.stack([jnp.sum(block) for block in self.split(x)])

    def spread(self, values: Array) -> Array:
        """One number per block, repeated over its entries."""
        return jnp.repeat(values, np.asarray(self.sizes), total_repeat_length=sum(self.sizes))

    @property
    def point(self) -> Array:
        return self.spread(self.totals / like(np.asarray(self.sizes), self.totals))

    def null(self, u: Array) -> Array:
        return u - self.spread(self.sums(u) / like(np.asarray(self.sizes), u))

    def project(self, x: Array) -> Array:
        return x - self.spread((self.sums(x) - like(self.totals, x)) / like(np.asarray(self.sizes), x))

    def residual(self, x: Array) -> Array:
        return jnp.linalg.norm(self.sums(x) - like(self.totals, x))

    def normal_rows(self) -> tuple[Array, Array]:
        scale = 1 / np.sqrt(np.asarray(self.sizes, float))
        rows = np.repeat(np.diag(scale), self.sizes, axis=1)
        return like(rows, self.totals), self.totals * like(scale, self.totals)


class MatrixFree(Equality):
    """C x = d through two functions; each projection solves C C' z = r by conjugate gradients.

    Args:
        apply: `apply(x, args)` is C x.
        adjoint: `adjoint(z, args)` is C' z.
        d: shape `(p,)`.
        args: arrays handed to both functions.

    Example:
        >>> flow = MatrixFree(lambda x, a: x[1:] - x[:-1], lambda z, a: jnp.pad(z, (1, 0)) - jnp.pad(z, (0, 1)), jnp.ones(2))
        >>> flow.point.round(9).tolist()
        [-1.0, 0.0, 1.0]
    """

    d: Array
    args: Any
    least: Array
    apply: Callable = choice()
    adjoint: Callable = choice()

    def __init__(self, apply: Callable, adjoint: Callable, d: Any, args: Any = ()):
        for name, function in (("apply", apply), ("adjoint", adjoint)):
            if not callable(function):
                raise ArgumentError(f"MatrixFree: {name} must be a function of (vector, args), got {function!r}")
        self.apply, self.adjoint, self.d, self.args = as_call(apply), as_call(adjoint), checks.array("equality d", d, (None,)), args
        self.least = self._lift(self.d)
        if self.least.ndim != 1:
            raise ShapeError(f"MatrixFree: adjoint must return a vector of shape (n,), got {self.least.shape}")
        image = jax.eval_shape(self.apply, self.least, self.args)
        if image.shape != self.d.shape:
            raise ShapeError(f"MatrixFree: apply must return shape {self.d.shape} like d, got {image.shape}")
        if checks.known(d, args):
            left, size = float(self.residual(self.least)), float(jnp.linalg.norm(self.d))
            if left > float(jnp.finfo(self.d.dtype).eps) ** 0.5 * max(size, 1e-300):
                raise MatrixError(f"equality C x = d has no solution that conjugate gradients find: the residual is {left:.3g}")

    def replace(self, **changes: Any) -> MatrixFree:
        """A copy with other functions, d or args, solved again."""
        return MatrixFree(**{"apply": self.apply, "adjoint": self.adjoint, "d": self.d, "args": self.args, **changes})

    def _lift(self, r: Array) -> Array:
        """C' (C C')^+ r."""
        eps = float(jnp.finfo(r.dtype).eps)
        solved = linear.cg(lambda z: self.apply(self.adjoint(z, self.args), self.args), r, tolerance=20 * eps)
        return self.adjoint(solved.value, self.args)

    @property
    def dim(self) -> int | None:
        return self.least.shape[0]

    @property
    def rows(self) -> int:
        return self.d.shape[0]

    @property
    def point(self) -> Array:
        return self.least

    def null(self, u: Array) -> Array:
        return u - self._lift(self.apply(u, self.args))

    def project(self, x: Array) -> Array:
        return x - self._lift(self.apply(x, self.args) - like(self.d, x))

    def residual(self, x: Array) -> Array:
        return jnp.linalg.norm(self.apply(x, self.args) - like(self.d, x))


def as_equality(equality: Any, dim: int) -> Equality:
    """What the argument `equality` of a problem means: None, a pair `(C, d)`, or an object of this module, checked against `dim`.

    Raises:
        ArgumentError: something else.
        ShapeError: another number of unknowns than `dim`.
    """
    if equality is None:
        equality = NoEquality()
    elif isinstance(equality, (tuple, list)) and len(equality) == 2:
        C = np.shape(equality[0])
        if len(C) == 2 and C[1] != dim:
            raise ShapeError(f"equality C must have {dim} columns, one per unknown, got shape {C}")
        equality = DenseEquality(*equality)
    if not isinstance(equality, Equality):
        raise ArgumentError(f"equality must be a pair (C, d) or an Equality object, got {equality!r}")
    return equality.bind(dim)
