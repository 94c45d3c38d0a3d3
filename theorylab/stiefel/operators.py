r"""The constraint matrix B seen through its products: a matrix, rows of data, a function, or a population that is sampled.

Points are transposed here, `p` by `n`. An operator splits a product into an `image` (B x itself for a matrix; the scores $A x$ for
$B = A^\top A / r$), which is what a method carries from step to step, and `product`, which finishes B x from the image. All inner
products of two points then cost nothing of size n by n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks, sample
from theorylab.core.keys import Key, step_key, stream
from theorylab.core.module import Module, choice, size
from theorylab.core.psd import _sqrtm, product
from theorylab.errors import ArgumentError, MatrixError, ShapeError

Array = jax.Array
SYMMETRY = 1e-8                 # relative asymmetry of B that is taken for round-off and averaged away
NEGATIVE = 1e-10                # relative size of a negative eigenvalue of B that is taken for round-off
TESTED = 1024                   # matrices up to this size are tested and solved when a problem is made
ORDERS = ("shuffled", "sequential", "independent")


class Operator(Module):
    """A symmetric positive semidefinite matrix B of size n, known through products with transposed points (p by n)."""

    @property
    def dim(self) -> int:
        """The size n."""
        raise NotImplementedError(f"{type(self).__name__} must define dim")

    @property
    def dtype(self) -> Any:
        """The dtype of products."""
        raise NotImplementedError(f"{type(self).__name__} must define dtype")

    def image(self, xt: Array) -> Array:
        """What is linear in the point and gives all products: (B x)ᵀ itself unless a subclass knows better."""
        raise NotImplementedError(f"{type(self).__name__} must define image(xt)")

    def product(self, xt: Array, image: Array) -> Array:
        """(B x)ᵀ from the point and its image."""
        return image

    def inner(self, xt: Array, image_x: Array, yt: Array, image_y: Array) -> Array:
        """The p by p matrix xᵀ B y."""
        return product(xt, image_y.mT)

    def matrix(self) -> Array:
        """B as an n by n matrix."""
        return self.product(jnp.eye(self.dim, dtype=self.dtype), self.image(jnp.eye(self.dim, dtype=self.dtype)))

    def split(self, image: Array, parts: int) -> list[tuple[Operator, Array]]:
        """Independent parts of a batch, each with its image; an exact operator is all of its parts."""
        return [(self, image)] * parts

    def draw(self, key: Key, batch_size: int, step: Any, order: str, padded: bool) -> Operator:
        """The operator of one minibatch; an exact operator is its own."""
        return self

    @property
    def exact(self) -> bool:
        """Whether `draw` gives the operator itself."""
        return True


class Dense(Operator):
    """A matrix.

    Example:
        >>> Dense(jnp.diag(jnp.array([1.0, 2.0]))).image(jnp.ones((1, 2))).tolist()
        [[1.0, 2.0]]
    """

    array: Array

    @property
    def dim(self) -> int:
        return self.array.shape[-1]

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def image(self, xt: Array) -> Array:
        return xt @ self.array

    def matrix(self) -> Array:
        return self.array


class Identity(Operator):
    """B = I: the Stiefel manifold."""

    n: int = size()
    kind: Any = choice(jnp.dtype("float64"))

    @property
    def dim(self) -> int:
        return self.n

    @property
    def dtype(self) -> Any:
        return self.kind

    def image(self, xt: Array) -> Array:
        return xt


class Gram(Operator):
    r"""$B = A^\top A / r + R$ for r rows of data A and a ridge R; no matrix of size n by n is formed, and no centred copy of the rows.

    Args:
        rows: the data A, shape `(rows, n)`; rows of zeros are padding.
        count: the number r of rows that count; all of them if None.
        ridge: None, a number $\rho$ for $R = \rho I$, or a symmetric matrix R.
        mean: what is subtracted from each row, shape `(n,)`, or None; not with rows of padding.

    Example:
        >>> Gram(jnp.array([[1.0, 1.0], [1.0, -1.0]])).matrix().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    rows: Array
    count: Any = None
    ridge: Any = None
    mean: Any = None

    @property
    def dim(self) -> int:
        return self.rows.shape[-1]

    @property
    def dtype(self) -> Any:
        return self.rows.dtype

    @property
    def number(self) -> Array:
        """How many rows count, in the dtype of the data."""
        return jnp.asarray(self.rows.shape[-2] if self.count is None else self.count, self.rows.dtype)

    @property
    def centred(self) -> Array:
        """The rows without their mean."""
        return self.rows if self.mean is None else self.rows - self.mean

    def image(self, xt: Array) -> Array:
        scores = xt @ self.rows.mT
        return scores if self.mean is None else scores - (xt @ self.mean)[..., None]

    def lift(self, scores: Array) -> Array:
        """Rows of data weighted by scores and averaged: (Aᵀ s / r)ᵀ."""
        weights = scores / self.number
        plain = weights @ self.rows
        return plain if self.mean is None else plain - jnp.sum(weights, axis=-1, keepdims=True) * self.mean

    def product(self, xt: Array, image: Array) -> Array:
        return ridged(self.lift(image), xt, self.ridge)

    def inner(self, xt: Array, image_x: Array, yt: Array, image_y: Array) -> Array:
        plain = product(image_x, image_y.mT) / self.number
        return plain if self.ridge is None else plain + product(xt, ridged(jnp.zeros_like(yt), yt, self.ridge).mT)

    def split(self, image: Array, parts: int) -> list[tuple[Operator, Array]]:
        return [(Gram(self.rows[i::parts], self._share(i, parts), self.ridge, self.mean), image[..., i::parts]) for i in range(parts)]

    def _share(self, i: int, parts: int) -> Any:
        """How many of the rows i, i + parts, ... count; padding stands at the end, so it is shared evenly."""
        if self.count is None:
            return None
        return jnp.maximum(jnp.ceil((self.number - i) / parts), 1)

    def draw(self, key: Key, batch_size: int, step: Any, order: str, padded: bool) -> Operator:
        index, inside = batch_rows(key, self.rows.shape[0], batch_size, step, order, padded)
        return self.take(index, inside)

    def take(self, index: Array, inside: Array | None) -> Gram:
        """The operator of some rows; those outside become zeros and do not count."""
        rows, count = _taken(self.rows, index, inside)
        return Gram(rows, count, self.ridge)

    @property
    def exact(self) -> bool:
        return False


@jax.jit
def _taken(rows: Array, index: Array, inside: Array | None) -> tuple[Array, Array | None]:
    rows = jnp.take(rows, index, axis=0)
    return (rows, None) if inside is None else (jnp.where(inside[:, None], rows, jnp.zeros_like(rows)), jnp.sum(inside.astype(rows.dtype)))


class Population(Dense):
    """A known matrix that is seen through samples: each batch holds fresh independent rows drawn from N(0, B).

    Example:
        >>> Population(jnp.eye(3)).draw(jax.random.key(0), 5, 0, "independent", False).rows.shape
        (5, 3)
    """

    root: Array

    def __init__(self, array: Any):
        self.array = matrix_argument("B", array)
        self.root = _sqrtm(self.array)

    def draw(self, key: Key, batch_size: int, step: Any, order: str, padded: bool) -> Operator:
        return Gram(jax.random.normal(step_key(stream(key, "population"), step), (batch_size, self.dim), self.dtype) @ self.root)

    @property
    def exact(self) -> bool:
        return False


class Implicit(Operator):
    """B given by a function x -> B x of `n` by `p` points.

    Args:
        function: `function(x, args)`; a plain function, whose arrays are in `args`.
        n: the size of B.
        args: arrays handed to the function.
        kind: the dtype of products; that of `args`, else the default float, if None.

    Example:
        >>> Implicit(lambda x, d: d[:, None] * x, 2, jnp.array([1.0, 3.0])).matrix().tolist()
        [[1.0, 0.0], [0.0, 3.0]]
    """

    function: Callable = choice()
    n: int = size()
    args: Any = ()
    kind: Any = choice(None)

    @property
    def dim(self) -> int:
        return self.n

    @property
    def dtype(self) -> Any:
        if self.kind is not None:
            return self.kind
        leaves = [a for a in jax.tree.leaves(self.args) if jnp.issubdtype(jnp.result_type(a), jnp.floating)]
        return jnp.result_type(*leaves) if leaves else jnp.result_type(float)

    def image(self, xt: Array) -> Array:
        return self.function(xt.mT, self.args).mT


def ridged(bx: Array, xt: Array, ridge: Any) -> Array:
    """(B x + R x)ᵀ for a ridge that is None, a number or a matrix."""
    if ridge is None:
        return bx
    return bx + (xt @ ridge if jnp.ndim(ridge) == 2 else ridge * xt)


def plus(matrix: Array, ridge: Any) -> Array:
    """B + R for a ridge that is None, a number or a matrix."""
    if ridge is None:
        return matrix
    return matrix + (ridge if jnp.ndim(ridge) == 2 else ridge * jnp.eye(matrix.shape[-1], dtype=matrix.dtype))


def batch_rows(key: Key, rows: int, batch_size: int, step: Any, order: str, padded: bool) -> tuple[Array, Array | None]:
    """Row numbers of a minibatch, and which of them count (None: all): a function of (key, step).

    `"independent"` draws each row anew; `"sequential"` walks through the rows and ends each pass with a shorter batch; `"shuffled"` visits
    each row once in a pass, in an order of the pass, and leaves the rows over unless `padded`.
    """
    step = jnp.asarray(step, jnp.int32)
    if order == "independent" or (order == "shuffled" and not padded):
        return sample.minibatch(key, rows, batch_size, step, replace=order == "independent"), None
    per_pass = -(-rows // batch_size)
    place = (step % per_pass) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    inside = place < rows
    place = jnp.minimum(place, rows - 1)
    if order == "shuffled":
        place = sample._permuted(step_key(stream(key, "pass"), step // per_pass), place.astype(jnp.uint32), rows).astype(jnp.int32)
    return place, None if rows % batch_size == 0 else inside


# ---------------------------------------------------------------------------------------------------------------- arguments


def matrix_argument(name: str, value: Any, dim: int | None = None, *, positive: bool = True) -> Array:
    """`value` as a symmetric matrix, without negative eigenvalues if `positive`; asymmetry below 1e-8 (round-off in float32) is averaged away.

    Raises:
        ShapeError: not square, or of another size than `dim`.
        MatrixError: not symmetric, or with a negative eigenvalue.
    """
    matrix = checks.square(name, value, dim)
    if checks.known(matrix):
        host = np.asarray(matrix)
        scale, slack = max(np.abs(host).max(), np.finfo(host.dtype).tiny), 1000 * np.finfo(host.dtype).eps
        gap = np.abs(host - host.T)
        if gap.max() > max(SYMMETRY, slack) * scale:
            i, j = (int(k) for k in np.unravel_index(gap.argmax(), gap.shape))
            raise MatrixError(f"{name} must be symmetric, got {host[i, j]:.6g} at {(i, j)} and {host[j, i]:.6g} at {(j, i)}")
        if positive and host.shape[0] <= TESTED:
            _check_positive(name, (host + host.T) / 2, max(NEGATIVE, slack) * scale)
    return _symmetric(matrix)


@jax.jit
def _symmetric(matrix: Array) -> Array:
    return (matrix + matrix.mT) / 2


def _check_positive(name: str, host: np.ndarray, slack: float) -> None:
    try:  # a Cholesky factor is ten times cheaper than the eigenvalues, which only a refusal needs
        np.linalg.cholesky(host + slack * np.eye(host.shape[0], dtype=host.dtype))
    except np.linalg.LinAlgError:
        values = np.linalg.eigvalsh(host)
        if values[0] < -slack:
            raise MatrixError(f"{name} must be positive semidefinite, its smallest eigenvalue is {values[0]:.3g} and its largest "
                              f"{values[-1]:.3g}") from None


def ridge_argument(name: str, value: Any, dim: int) -> Any:
    """None, a number of at least 0, or a positive semidefinite matrix of size `dim`; the number 0 becomes None."""
    if value is None or (not isinstance(value, jax.Array) and np.ndim(value) == 0 and float(value) == 0.0):
        return None
    if np.ndim(value) == 0:
        checks.real(name, value, low=0.0)
        return value if isinstance(value, jax.Array) else jnp.asarray(float(value))
    return matrix_argument(name, value, dim)


def as_operator(name: str, value: Any, dim: int | None = None, *, dtype: Any = None, positive: bool = True) -> Operator:
    """An operator from an operator, None (identity), a square matrix, rows of data (a matrix that is not square) or a function x -> B x.

    Raises:
        ArgumentError: the size cannot be known: a function or None without `dim`.
        ShapeError, MatrixError, NonFiniteInputError: as for matrices.
    """
    if isinstance(value, Operator):
        if dim is not None and value.dim != dim:
            raise ShapeError(f"{name} must have size {dim} to match the other arguments, got {value.dim}")
        return value
    if value is None or callable(value):
        if dim is None:
            raise ArgumentError(f"n must be given when {name} is {'the identity' if value is None else 'a function'}: its size is not known")
        kind = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
        return Identity(dim, kind) if value is None else Implicit(WithoutArgs(value), dim, (), kind)
    if np.ndim(value) == 2 and np.shape(value)[0] != np.shape(value)[1]:
        return Gram(checks.array(name, value, (None, dim)))
    return Dense(matrix_argument(name, value, dim, positive=positive))


def fed_rows(rows: Any, n: int, dtype: Any) -> Array:
    """Rows of a fed batch in the dtype of the problem.

    Raises:
        ShapeError: another number of columns.
    """
    rows = checks.array("batch", rows, (None, n), finite=False)
    return rows.astype(dtype)


def fed_gram(rows: Any, weight: Any, mean: Array, ridge: Any) -> Gram:
    """The operator of fed rows in the dtype of their mean, which is subtracted; rows of weight 0 are padding."""
    rows = jnp.asarray(rows).astype(mean.dtype)
    if weight is None:
        return Gram(rows, None, ridge, mean)
    return Gram(jnp.where(weight[:, None] > 0, rows - mean, jnp.zeros_like(rows)), jnp.sum(weight).astype(mean.dtype), ridge)


class WithoutArgs(Module):
    """A function of x alone as a function of (x, args); compared by the identity of the function."""

    function: Callable = choice()

    def __call__(self, x: Array, args: Any) -> Array:
        return self.function(x)
