"""Linear systems: one factor reused for many right-hand sides, and conjugate gradients that report how they ended.

Derivatives are those of the equation A x = b: the factor or the iteration is never differentiated, only the matrix and the
right-hand side, and the same factor or iteration solves the tangent and the adjoint system.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax import lax

from theorylab.core import checks, tree
from theorylab.core.module import Module, choice
from theorylab.core.psd import product, rank_cut
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, MatrixError, ShapeError

Array = jax.Array
PyTree = Any
Map = jax.tree_util.Partial
KINDS = ("diagonal", "cholesky", "lu", "eigh")


class Factored(Module):
    """One factor of a matrix, reused across right-hand sides, steps and lanes. A pytree; build it with `Factored.of`.

    Attributes:
        matrix: what was factored; derivatives flow through it.
        factor: arrays of the factor.
        kind: `"diagonal"`, `"cholesky"`, `"lu"` or `"eigh"`.
    """

    matrix: Any
    factor: Any
    kind: str = choice(among=KINDS)

    @classmethod
    def of(cls, matrix: Any, kind: str = "auto") -> Factored:
        """Factor a square matrix, or a diagonal given as a vector. Batches: `jax.vmap(Factored.of)`.

        Args:
            matrix: shape (n, n), or (n,) for a diagonal matrix.
            kind: `"auto"` decides by shape: a vector is a diagonal, a matrix is factored by `"lu"`. `"cholesky"` (symmetric positive
                definite) takes half the work; `"eigh"` (symmetric) also solves for shifted matrices, and singular systems in the
                least-norm sense.

        Raises:
            ShapeError: neither a vector nor a square matrix.
            MatrixError: singular (`lu`, `diagonal`), not symmetric, or not positive definite (`cholesky`).
            UnknownNameError: another `kind`.

        Example:
            >>> Factored.of(jnp.array([[2.0, 0.0], [0.0, 4.0]])).solve(jnp.ones(2)).tolist()
            [0.5, 0.25]
        """
        checks.among("kind", kind, ("auto", *KINDS))
        diagonal = np.ndim(matrix) == 1
        if np.ndim(matrix) not in (1, 2) or (kind == "diagonal" and not diagonal) or (kind not in ("auto", "diagonal") and diagonal):
            expected = "a vector" if kind == "diagonal" else "a square matrix" + (" or a vector" if kind == "auto" else "")
            raise ShapeError(f"matrix must be {expected} for kind {kind!r}, got shape {np.shape(matrix)}; use jax.vmap(Factored.of) for batches")
        kind = ("diagonal" if diagonal else "lu") if kind == "auto" else kind
        checked = {"diagonal": checks.array, "lu": checks.square, "cholesky": checks.definite, "eigh": checks.symmetric}
        matrix = checked[kind]("matrix", matrix)
        factor = _factor(lax.stop_gradient(matrix), kind)
        if kind in ("diagonal", "lu") and checks.known(factor):
            pivots = np.abs(np.asarray(matrix if diagonal else jnp.diagonal(factor[0])))
            if pivots.min() == 0:
                raise MatrixError(f"matrix must be invertible, got a zero pivot at row {int(pivots.argmin())}; "
                                  "kind='eigh' solves singular symmetric systems")
        return cls(matrix, factor, kind)

    def solve(self, b: Any) -> Array:
        """The solution x of A x = b; of least norm where a symmetric A of kind `"eigh"` is singular.

        Args:
            b: shape (n,) or (n, k).

        Raises:
            ShapeError: another number of rows.
            PrecisionError: another dtype than the matrix.
        """
        return self._solve(b, None)

    def solve_shifted(self, b: Any, shift: Any) -> Array:
        """The solution x of (A + shift I) x = b without a new factor; for kinds `"eigh"` and `"diagonal"`.

        Args:
            b: shape (n,) or (n, k).
            shift: a number, possibly traced; differentiable.

        Raises:
            ArgumentError: the factor is of another kind.

        Example:
            >>> Factored.of(jnp.diag(jnp.array([1.0, 3.0])), "eigh").solve_shifted(jnp.ones(2), 1.0).tolist()
            [0.5, 0.25]
        """
        if self.kind not in ("eigh", "diagonal"):
            raise ArgumentError(f"solve_shifted needs a factor of kind 'eigh' or 'diagonal', got {self.kind!r}; use Factored.of(matrix, 'eigh')")
        return self._solve(b, jnp.asarray(checks.real("shift", shift), self.matrix.dtype))

    def _solve(self, b: Any, shift: Array | None) -> Array:
        n = self.matrix.shape[0]
        b = checks.array("b", b)
        if b.ndim not in (1, 2) or b.shape[0] != n:
            raise ShapeError(f"b must have shape ({n},) or ({n}, any), got {b.shape}; use jax.vmap for batches")
        checks.same_dtype(matrix=self.matrix, b=b)
        return _solve(self, b, shift)

    def log_det(self) -> Array:
        """The logarithm of the absolute value of the determinant.

        Example:
            >>> round(float(Factored.of(jnp.diag(jnp.array([2.0, 8.0])), "cholesky").log_det() / jnp.log(2.0)), 12)
            4.0
        """
        return _log_det(self.matrix, self)


@jax.jit
def _solve(factored: Factored, b: Array, shift: Array | None) -> Array:
    kind, matrix, factor = factored.kind, factored.matrix, lax.stop_gradient(factored.factor)
    fixed = None if shift is None else lax.stop_gradient(shift)
    symmetric = kind != "lu"
    return lax.custom_linear_solve(
        lambda x: _apply(matrix, x) if shift is None else _apply(matrix, x) + shift * x, b,
        lambda _, rhs: _substitute(kind, factor, rhs, fixed, 0),
        None if symmetric else lambda _, rhs: _substitute(kind, factor, rhs, fixed, 1), symmetric=symmetric)


@partial(jax.jit, static_argnames="kind")
def _factor(matrix: Array, kind: str) -> tuple[Array, ...]:
    if kind == "cholesky":
        return (jnp.linalg.cholesky(matrix),)
    if kind == "lu":
        return tuple(jsl.lu_factor(matrix))
    if kind == "eigh":
        return tuple(jnp.linalg.eigh(matrix))
    return (matrix,)


def _apply(matrix: Array, x: Array) -> Array:
    if matrix.ndim == 2:
        return product(matrix, x)
    return matrix * x if x.ndim == 1 else matrix[:, None] * x


def _substitute(kind: str, factor: tuple[Array, ...], rhs: Array, shift: Array | None, trans: int) -> Array:
    if kind == "cholesky":
        return jsl.cho_solve((factor[0], True), rhs)
    if kind == "lu":
        return jsl.lu_solve((factor[0], factor[1]), rhs, trans=trans)
    values = factor[0] if shift is None else factor[0] + shift
    if kind == "diagonal":
        return _apply(1 / values, rhs)
    size = jnp.abs(values)
    kept = size > rank_cut(values.shape[0], values.dtype) * jnp.max(size)
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, jnp.ones_like(values)), jnp.zeros_like(values))
    return product(factor[1], _apply(inverse, product(factor[1].T, rhs)))


@jax.custom_jvp
def _log_det(matrix: Array, factored: Factored) -> Array:
    kind, factor = factored.kind, factored.factor
    pivots = jnp.diagonal(factor[0]) if kind in ("cholesky", "lu") else factor[0]
    return jnp.sum(jnp.log(jnp.abs(pivots))) * (2 if kind == "cholesky" else 1)


@_log_det.defjvp
def _log_det_rule(primals: tuple[Array, Factored], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    (matrix, factored), (change, _) = primals, tangents
    dense = change if change.ndim == 2 else jnp.diag(change)
    return _log_det(matrix, factored), jnp.trace(factored.replace(matrix=matrix).solve(dense))


class CGResult(NamedTuple):
    """The end of `cg`.

    Attributes:
        value: the last finite iterate.
        residual: norm of b - A x at `value`, computed from it and not by recursion.
        steps: products with A in the iteration.
        status: a `Status` as an integer. CONVERGED: the residual is below tolerance times the norm of b. MAX_STEPS: the limit came first.
            UNDECIDED: A or the preconditioner is not positive definite, or round-off lets the residual go no lower. NONFINITE: NaN or infinity.
    """

    value: Any
    residual: Array
    steps: Array
    status: Array


def cg(operator: Any, b: PyTree, *, preconditioner: Any = None, x0: PyTree = None, tolerance: Any = None, max_steps: Any = None) -> CGResult:
    r"""Solve A x = b by preconditioned conjugate gradients, for symmetric positive definite A given as a matrix or as a function.

    It works inside `jit` and `vmap` (a status per lane) and has derivatives in b and in what `operator` depends on; x0 and the
    preconditioner have none. Nothing is raised for a failed iteration: look at `status`. A matrix compiles once; a function
    compiles in each call, unless the call is inside `jit`.

    Args:
        operator: x -> A x on pytrees like b; or a matrix; or an object with such a method `mv`.
        b: array or pytree of arrays of one dtype.
        preconditioner: r -> z, close to the inverse of A; or a matrix; or a `Factored`.
        x0: starting point, like b; zero unless given, and zero where that has the smaller residual.
        tolerance: relative: stops when $|b - A x| \le \mathrm{tolerance} \cdot |b|$; the root of round-off unless given.
        max_steps: ten times the number of unknowns unless given.

    Raises:
        ShapeError: x0 or the result of `operator` does not match b.
        ToleranceError: `tolerance` is below ten units of round-off.
        NonFiniteInputError: b or x0 holds NaN or infinity.

    Example:
        >>> end = cg(lambda x: 2.0 * x, jnp.ones(3))
        >>> end.value.tolist(), Status(int(end.status)).name
        ([0.5, 0.5, 0.5], 'CONVERGED')
    """
    b = jax.tree.map(lambda leaf: checks.array("b", leaf), b)
    leaves = jax.tree.leaves(b)
    checks.same_dtype(**{f"b leaf {i}": leaf for i, leaf in enumerate(leaves)})
    dtype = leaves[0].dtype
    tolerance = float(jnp.finfo(dtype).eps) ** 0.5 if tolerance is None else checks.tolerance("tolerance", tolerance, dtype)
    max_steps = 10 * sum(leaf.size for leaf in leaves) if max_steps is None else _limit(max_steps)
    apply, precondition = _as_map("operator", operator, b), _as_map("preconditioner", preconditioner, b)
    for name, like in (("operator(b)", jax.eval_shape(apply, b)), ("preconditioner(b)", jax.eval_shape(precondition, b))):
        _check_like(name, like, b)
    if x0 is not None:
        x0 = lax.stop_gradient(jax.tree.map(lambda leaf: checks.array("x0", leaf), x0))
        _check_like("x0", x0, b)
    # What is a pytree compiles once; a function may close over anything, so without an outer `jit` it compiles in each call.
    run = _cg_compiled if isinstance(apply, Map) and isinstance(precondition, Map) else _cg
    return run(apply, precondition, b, x0, jnp.asarray(tolerance, dtype), jnp.asarray(max_steps, jnp.int32))


def _cg(apply: Callable, precondition: Callable, b: PyTree, x0: PyTree, relative: Array, limit: Array) -> CGResult:
    def solve(matvec: Callable, rhs: PyTree) -> tuple[PyTree, tuple[Array, Array, Array]]:
        zero = jax.tree.map(jnp.zeros_like, rhs)
        start, left, length = zero, rhs, _norm(rhs)
        if x0 is not None:  # the tangent and adjoint systems come here too; for them zero is the better start
            nearer = jax.tree.map(jnp.subtract, rhs, matvec(x0))
            start, left = tree.select(_norm(nearer) < length, (x0, nearer), (zero, rhs))
        value, *rest = _iterate(matvec, precondition, rhs, start, left, relative * length, limit)
        return value, tuple(rest)

    value, (residual, steps, status) = lax.custom_linear_solve(apply, b, solve, symmetric=True, has_aux=True)
    return CGResult(value, residual, steps, status)


_cg_compiled = jax.jit(_cg)


def _limit(max_steps: Any) -> Any:
    return checks.whole("max_steps", max_steps, low=1) if checks.known(max_steps) else max_steps


def _as_map(name: str, operator: Any, b: PyTree) -> Callable[[PyTree], PyTree]:
    if operator is None:
        return Map(_same)
    if isinstance(operator, Factored):
        return Map(_solve_vector if name == "preconditioner" else _apply, operator if name == "preconditioner" else operator.matrix)
    if hasattr(operator, "mv"):
        return operator.mv
    if callable(operator):
        return operator
    if not hasattr(b, "shape") or b.ndim != 1:
        raise ShapeError(f"{name} may be a matrix only when b is a vector; pass a function")
    matrix = checks.symmetric(name, operator, b.shape[0])
    checks.same_dtype(**{name: matrix, "b": b})
    return Map(_apply, matrix)


def _same(x: PyTree) -> PyTree:
    return x


def _solve_vector(factored: Factored, r: Array) -> Array:
    return factored.solve(r)


def _check_like(name: str, value: PyTree, b: PyTree) -> None:
    describe = lambda t: jax.tree.map(lambda a: f"{np.dtype(a.dtype).name}{list(a.shape)}", t)  # noqa: E731
    if describe(value) != describe(b):
        raise ShapeError(f"{name} must match b in structure, shape and dtype, got {describe(value)} instead of {describe(b)}")


def _inner(a: PyTree, b: PyTree) -> Array:
    terms = jax.tree.leaves(jax.tree.map(partial(jnp.vdot, precision=lax.Precision.HIGHEST), a, b))
    return reduce(operator.add, terms)


def _finite(a: PyTree) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(a)]).all()


def _norm(a: PyTree) -> Array:
    """Euclidean norm without overflow or underflow of squares."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(a)]))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
    scaled = jax.tree.map(lambda leaf: leaf / unit, a)
    return unit * jnp.sqrt(_inner(scaled, scaled))


class _State(NamedTuple):
    x: PyTree
    r: PyTree
    p: PyTree
    energy: Array
    length: Array
    steps: Array
    status: Array


def _iterate(apply: Callable, precondition: Callable, rhs: PyTree, x0: PyTree, r0: PyTree, target: Array, limit: Array) -> tuple[PyTree, ...]:
    """Conjugate gradients from x0 with residual r0, restarted from the computed residual while that helps."""
    codes = {s: jnp.asarray(int(s), jnp.int32) for s in Status}

    def restart(x: PyTree, r: PyTree, steps: Array) -> _State:
        z = precondition(r)
        energy, length = _inner(r, z), _norm(r)
        status = jnp.where(length <= target, codes[Status.CONVERGED],
                           jnp.where(steps >= limit, codes[Status.MAX_STEPS], jnp.where(energy > 0, codes[Status.RUNNING], codes[Status.UNDECIDED])))
        return _State(x, r, z, energy, length, steps, jnp.where(_finite((r, z, length)), status, codes[Status.NONFINITE]))

    def advance(s: _State) -> _State:
        image = apply(s.p)
        curvature = _inner(s.p, image)
        alpha = s.energy / jnp.where(curvature > 0, curvature, jnp.ones_like(curvature))
        x = jax.tree.map(lambda a, d: a + alpha * d, s.x, s.p)
        r = jax.tree.map(lambda a, d: a - alpha * d, s.r, image)
        z = precondition(r)
        energy, length, steps = _inner(r, z), _norm(r), s.steps + 1
        p = jax.tree.map(lambda a, d: a + (energy / s.energy) * d, z, s.p)
        good = _finite((x, p, length, curvature))
        status = jnp.where(length <= target, codes[Status.CONVERGED], jnp.where(steps >= limit, codes[Status.MAX_STEPS],
                           jnp.where(energy > 0, codes[Status.RUNNING], codes[Status.UNDECIDED])))
        status = jnp.where(good, jnp.where(curvature > 0, status, codes[Status.UNDECIDED]), codes[Status.NONFINITE])
        accept = good & (curvature > 0)
        x, r, p, energy, length = tree.select(accept, (x, r, p, energy, length), (s.x, s.r, s.p, s.energy, s.length))
        return _State(x, r, p, energy, length, steps, status)

    def round_(carry: tuple[_State, Array]) -> tuple[_State, Array]:
        start, _ = carry
        end = lax.while_loop(lambda s: s.status == Status.RUNNING, advance, start)
        fresh = restart(end.x, jax.tree.map(jnp.subtract, rhs, apply(end.x)), end.steps)
        gained = fresh.length < start.length / 2  # else round-off forbids more, and the recursion alone would go on forever
        status = jnp.where(fresh.status == Status.RUNNING, jnp.where(gained, fresh.status, codes[Status.UNDECIDED]), fresh.status)
        failed = (end.status == Status.UNDECIDED) | (end.status == Status.NONFINITE)
        status = jnp.where(failed & (status != Status.CONVERGED), end.status, status)
        return fresh._replace(status=status), fresh.length

    start = restart(x0, r0, jnp.zeros((), jnp.int32))
    end, residual = lax.while_loop(lambda c: c[0].status == Status.RUNNING, round_, (start, start.length))
    return end.x, residual, end.steps, end.status
