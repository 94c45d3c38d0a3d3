"""Sparse matrices in problems, and the x-step for them: one sparse LU factorization of the KKT system, kept on the host and reused."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi.equality import DenseEquality, MatrixFree
from theorylab.acvi.prox import like
from theorylab.acvi.xstep import Solved, XStep, solved
from theorylab.core import checks
from theorylab.core.module import Module, choice
from theorylab.errors import ShapeError

Array = jax.Array

FILL, PER_NONZERO = 1_000_000, 20
"""A matrix whose envelope is at most this, or this multiple of its nonzeros, is factored; products serve the others better."""
KEPT = 32
"""Factorizations that are kept on the host."""
LANCZOS = 300


class SparseMatrix(Module):
    """A matrix by its nonzeros, in row order. Made from what SciPy or JAX call sparse by `as_sparse`.

    Attributes:
        values, rows, columns: of the nonzeros.
        shape: of the matrix.
        envelope: entries between the first nonzero of each row and the diagonal after the reverse Cuthill-McKee ordering, a bound of the fill of a
            factorization; None for a matrix that is traced or not square.
    """

    values: Array
    rows: Array
    columns: Array
    shape: tuple[int, int] = choice()
    envelope: int | None = choice(None)

    @property
    def dtype(self) -> Any:
        """Precision."""
        return self.values.dtype

    @property
    def T(self) -> SparseMatrix:
        """The transpose."""
        return SparseMatrix(self.values, self.columns, self.rows, (self.shape[1], self.shape[0]), self.envelope)

    def __matmul__(self, x: Any) -> Array:
        x = jnp.asarray(x)
        return jnp.zeros(self.shape[0], x.dtype).at[self.rows].add(like(self.values, x) * x[self.columns])

    def todense(self) -> Array:
        """The whole matrix."""
        return jnp.zeros(self.shape, self.dtype).at[self.rows, self.columns].add(self.values)


def dense(M: Any) -> Array:
    """A matrix as an array."""
    return M.todense() if isinstance(M, SparseMatrix) else M


def as_sparse(name: str, value: Any, *, square: bool = False) -> SparseMatrix | None:
    """`value` as a `SparseMatrix` if it is a sparse matrix of SciPy, a `BCOO` of JAX, or one already; else None.

    Raises:
        ShapeError: no matrix, or not square where that is asked for.
        NonFiniteInputError, PrecisionError: as for arrays.
    """
    if not (isinstance(value, SparseMatrix) or type(value).__module__.startswith(("scipy.sparse", "jax.experimental.sparse"))):
        return None
    if len(value.shape) != 2 or (square and value.shape[0] != value.shape[1]):
        raise ShapeError(f"{name} must be a {'square ' if square else ''}matrix, got shape {tuple(value.shape)}")
    shape = int(value.shape[0]), int(value.shape[1])
    if isinstance(value, SparseMatrix):
        return value
    if type(value).__module__.startswith("jax"):
        whole = value.to_bcoo() if hasattr(value, "to_bcoo") else value
        if whole.n_batch or whole.n_dense:
            raise ShapeError(f"{name} must have no batch or dense axes, got n_batch={whole.n_batch} and n_dense={whole.n_dense}")
        values, rows, columns = whole.data, whole.indices[:, 0], whole.indices[:, 1]
        if not checks.known(values, rows):
            return SparseMatrix(values, rows, columns, shape)
        values, rows, columns = (np.asarray(part) for part in (values, rows, columns))
        inside = (rows < shape[0]) & (columns < shape[1])                          # JAX pads with entries outside
        values, rows, columns = values[inside], rows[inside], columns[inside]
    else:
        entries = value.tocoo()
        values, (rows, columns) = entries.data, entries.coords if hasattr(entries, "coords") else (entries.row, entries.col)
    from scipy.sparse import coo_array

    host = coo_array((np.asarray(checks.array(name, values)) if len(values) else np.zeros(0), (rows, columns)), shape).tocsr()
    host.sum_duplicates()
    entries = host.tocoo()
    values, (rows, columns) = entries.data, entries.coords
    if not len(values):
        values, rows, columns = np.zeros(1), np.zeros(1, int), np.zeros(1, int)    # no array is empty
    fill = _envelope(host) if shape[0] == shape[1] else None
    return SparseMatrix(checks.array(name, values), jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32), shape, fill)


def _envelope(M: Any) -> int:
    """Size of the envelope of the pattern of M + M' after reverse Cuthill-McKee, rows of many nonzeros taken as a border."""
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    n = M.shape[0]
    pattern = (abs(M) + abs(M.T)).tocsr()
    busy = np.diff(pattern.indptr) > max(16, 10 * n**0.5)
    rest = pattern[~busy][:, ~busy].tocsr()
    order = np.asarray(reverse_cuthill_mckee(rest, symmetric_mode=True)) if rest.shape[0] else np.zeros(0, int)
    ordered = rest[order][:, order].tocoo()
    first = np.arange(rest.shape[0])
    np.minimum.at(first, ordered.coords[0], ordered.coords[1])
    return int(np.sum(np.arange(rest.shape[0]) - first) + busy.sum() * n)


def factors_well(problem: Any) -> bool:
    """Whether the x-step of a sparse problem is better factored than iterated: by its pattern and the class of its equality."""
    M = problem.M
    small = M.envelope is not None and M.envelope <= max(FILL, PER_NONZERO * M.values.shape[0])
    return small and not isinstance(problem.equality, MatrixFree)


def lowest_eigenvalue(M: SparseMatrix, null: Callable[[Array], Array]) -> float:
    """The smallest eigenvalue of the symmetric part of M where `null` projects to, by Lanczos and from above; 0 if discs show that none is below."""
    from scipy.sparse import coo_array
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    host = coo_array((np.asarray(M.values, float), (np.asarray(M.rows), np.asarray(M.columns))), M.shape).tocsr()
    S, n = (host + host.T) / 2, M.shape[0]
    if np.min(2 * S.diagonal() - np.abs(S).sum(axis=1)) >= 0:  # Gershgorin's discs
        return 0.0
    compiled = jax.jit(null)
    project = lambda v: np.asarray(compiled(jnp.asarray(v.ravel(), M.dtype)), float)  # noqa: E731
    apply = LinearOperator((n, n), lambda v: project(S @ project(v)))
    try:
        options: dict[str, Any] = {"tol": 1e-3, "maxiter": LANCZOS, "v0": np.cos(np.arange(n)), "return_eigenvectors": False}
        return float(eigsh(apply, k=1, which="SA", **options)[0])
    except ArpackNoConvergence as end:
        return float(min(end.eigenvalues, default=0.0))


_factors: OrderedDict[bytes, Any] = OrderedDict()
_lock = threading.Lock()


def _key(system: tuple[np.ndarray, ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for part in system:
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.digest()


def _factor(key: bytes, system: tuple[np.ndarray, ...]) -> Any:
    """The LU factor of the KKT matrix [[beta I + M, C'], [C, 0]] in double precision, from the store or computed."""
    with _lock:
        if key in _factors:
            _factors.move_to_end(key)
            return _factors[key]
    from scipy.sparse import block_array, coo_array, csc_array, eye_array
    from scipy.sparse.linalg import splu

    values, rows, columns, penalty, given, basis = system
    n, held = given.shape[1], np.any(basis != 0, axis=1)
    C: Any = csc_array(np.asarray(given if held.all() else basis[held], float))      # the rows as given are sparser than orthonormal ones
    top = coo_array((np.asarray(values, float), (rows, columns)), (n, n)) + float(penalty) * eye_array(n)
    whole = block_array([[top, C.T], [C, None]], format="csc") if C.shape[0] else top.tocsc()
    made = splu(whole, permc_spec="MMD_AT_PLUS_A")
    with _lock:
        _factors[key] = made
        while len(_factors) > KEPT:
            _factors.popitem(last=False)
    return made


def _on_host(*parts: Any) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(part) for part in parts)


def _prepare(*system: Any) -> np.ndarray:
    host = _on_host(*system)
    key = _key(host)
    _factor(key, host)
    return np.frombuffer(key, np.uint32)


def _solve(key: Any, right: Any, *system: Any) -> np.ndarray:
    right, host = np.asarray(right), _on_host(*system)
    made = _factor(np.asarray(key).tobytes(), host)
    whole = np.zeros(made.shape[0])
    whole[: len(right)] = right
    return made.solve(whole)[: len(right)].astype(right.dtype)


class SparseLU(XStep):
    r"""Affine F with a sparse M: SciPy's sparse LU of $[[\beta I + M, C^\top], [C, 0]]$, computed once per penalty and reused in every step.

    Factor and solves are host callbacks. The factor stays on the host under a digest of the system, which is what the compiled program carries; a
    factor that has been dropped from the store is computed again, so the callbacks are pure.
    """

    free: ClassVar[bool] = False
    factorizations: ClassVar[int] = 1
    key: Array
    force: Array
    """F at the point of the equality."""

    @classmethod
    def make(cls, problem: Any, penalty: Array) -> Self:
        key = jax.pure_callback(_prepare, jax.ShapeDtypeStruct((2,), jnp.uint32), *_system(problem, penalty), vmap_method="sequential")
        return cls(key, problem.operator(jnp.asarray(problem.equality.point, problem.dtype)))

    def __call__(self, problem: Any, u: Array, x: Array, penalty: Array, tolerance: Any = 0.0) -> Solved:
        point = like(problem.equality.point, u)
        right = penalty * (u - point) - like(self.force, u)
        z = jax.pure_callback(_solve, jax.ShapeDtypeStruct(u.shape, u.dtype), self.key, right, *_system(problem, penalty), vmap_method="sequential")
        return solved(point + z, 1)


def _system(problem: Any, penalty: Array) -> tuple[Array, ...]:
    """What the KKT matrix is made of."""
    M, E = problem.M, problem.equality
    basis = E.normal_rows()[0]
    return M.values, M.rows, M.columns, jnp.asarray(penalty, M.dtype), E.C if isinstance(E, DenseEquality) else basis, basis
