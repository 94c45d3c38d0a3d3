r"""What every problem of this family answers: `BilevelProblem`, its inner problem, and the derivatives at one point, `Linearization`.

The outer problem is $\min_y L(y) = G(x^*(y), y)$, where $x^*(y)$ is a root of $F(\cdot, y)$; in the energy case $F = \nabla_x E$. The
subscripts 1 and 2 stand for derivatives in x and in y. Oracles speak flat arrays, x of shape (n,) and y of shape (m,); the trees of the
user are packed and unpacked at the public boundary and nowhere else.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks, tree
from theorylab.core.keys import Key
from theorylab.core.module import Module
from theorylab.core.problem import Problem
from theorylab.core.stop import Below
from theorylab.errors import ArgumentError, NoClosedFormError, PrecisionError, ShapeError

Array = jax.Array
PyTree = Any
DENSE_INNER = 500
TALL_BYTES = 12 * 2**20
WIDE = 128


def pull(A: Array, u: Array) -> Array:
    """`A.T @ u` for `A` (N, p) and `u` (N,) or (N, q), in the order that a processor streams.

    Inside compiled code on a CPU `A.T @ u` runs 4 to 19 times below the speed of memory when `A` is an argument. A row times a matrix is
    fast while `A` fits the cache, a sum of scaled rows when it is tall and does not.

    Example:
        >>> pull(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, 1.0])).tolist()
        [4.0, 6.0]
    """
    if u.ndim == 2:
        return (u.T @ A).T
    if A.size * A.dtype.itemsize >= TALL_BYTES and A.shape[0] >= 32 * A.shape[1] and jax.default_backend() == "cpu":
        return jnp.sum(A * u[:, None], axis=0)
    return u @ A


def gram(A: Array, weight: Array | None = None) -> Array:
    """`A.T @ diag(weight) @ A` with weights that are not negative; ones if None."""
    tall = A.size * A.dtype.itemsize >= TALL_BYTES
    scaled = A if weight is None else A * (jnp.sqrt(weight) if tall else weight)[:, None]
    other = scaled if tall else A  # an A without weights is shared by a batch of weights, whose products are then a single one
    if A.shape[1] < WIDE or jax.default_backend() != "cpu":
        return scaled.T @ other
    half = A.shape[1] // 2  # a processor gains from leaving out one of the two equal blocks
    corner = scaled[:, :half].T @ other[:, half:]
    return jnp.block([[scaled[:, :half].T @ other[:, :half], corner], [corner.T, scaled[:, half:].T @ other[:, half:]]])


class Linearization(Module):
    """A problem at one point (x, y): residual and outer gradients, and products with the second derivatives.

    Attributes:
        residual: $F(x, y)$, shape (n,).
        outer_x: $G_1$, shape (n,).
        outer_y: $G_2$, shape (m,).
    """

    residual: Array
    outer_x: Array
    outer_y: Array

    def product(self, h: Array) -> Array:
        """$F_1 h$ for h of shape (n,)."""
        raise NotImplementedError(f"{type(self).__name__} must define product(h)")

    def transposed(self, h: Array) -> Array:
        r"""$F_1^\top h$; the same as `product` where the problem is symmetric."""
        return self.product(h)

    def matrix(self) -> Array:
        """$F_1$, shape (n, n)."""
        raise NotImplementedError(f"{type(self).__name__} must define matrix()")

    def diagonal(self) -> Array:
        """The diagonal of $F_1$, shape (n,)."""
        raise NotImplementedError(f"{type(self).__name__} must define diagonal()")

    def cross_pullback(self, v: Array) -> Array:
        r"""$F_2^\top v$, shape (m,)."""
        raise NotImplementedError(f"{type(self).__name__} must define cross_pullback(v)")

    def cross_product(self, u: Array) -> Array:
        """$F_2 u$ for u of shape (m,), shape (n,)."""
        raise NotImplementedError(f"{type(self).__name__} must define cross_product(u)")

    def turn(self, v: Array, d: Array) -> tuple[Array, Array]:
        r"""Derivative along d (in x) of the gradient of $\Lambda = G - v^\top F$, v frozen.

        Returns:
            $\Lambda_{11} d = G_{11} d - F_{11}[d]^\top v$, shape (n,), and $\Lambda_{21} d = G_{21} d - F_{21}[d]^\top v$, shape (m,).
        """
        raise NotImplementedError(f"{type(self).__name__} must define turn(v, d)")


class BilevelProblem(Problem):
    """Contract of every problem of the family; as a core Problem its iterate is y.

    A subclass defines `x_structure`, `y_structure`, `energy` (or `residual`, with `has_energy` False) and `outer`. All derivatives then
    come from autodiff; `at`, `energy_and_residual`, `exact` and `curvature` may be overridden by what is known in closed form.
    """

    @property
    def x_structure(self) -> PyTree:
        """The tree of `jax.ShapeDtypeStruct` that x has for the user."""
        raise NotImplementedError(f"{type(self).__name__} must define x_structure")

    @property
    def y_structure(self) -> PyTree:
        """The tree of `jax.ShapeDtypeStruct` that y has for the user."""
        raise NotImplementedError(f"{type(self).__name__} must define y_structure")

    @property
    def has_energy(self) -> bool:
        """Whether F is the gradient of an energy that is known."""
        return True

    @property
    def symmetric(self) -> bool:
        """Whether $F_1$ is symmetric."""
        return self.has_energy

    @property
    def n(self) -> int:
        """Entries of x."""
        return _entries(self.x_structure)

    @property
    def m(self) -> int:
        """Entries of y."""
        return _entries(self.y_structure)

    @property
    def dense(self) -> bool:
        """Whether x is small enough for a dense factorization in each inner step."""
        return self.n <= DENSE_INNER

    @property
    def dtype(self) -> Any:
        """Precision of x, y and all oracles."""
        return jax.tree.leaves(self.x_structure)[0].dtype

    def pack_x(self, x: PyTree) -> Array:
        """The tree x (or a vector packed already) as a vector of shape (n,).

        Raises:
            ShapeError: another tree or other shapes.
            PrecisionError: another dtype than the problem.
            NonFiniteInputError: NaN or infinity.
        """
        return _pack("x", x, self.x_structure, self.dtype)

    def pack_y(self, y: PyTree) -> Array:
        """The tree y (or a vector packed already) as a vector of shape (m,); raises as `pack_x`."""
        return _pack("y", y, self.y_structure, self.dtype)

    def shaped(self, x: PyTree = None, y: PyTree = None) -> BilevelProblem:
        """The problem, with its shapes taken from x and y where it does not know them."""
        return self

    def unpack_x(self, x: Array) -> PyTree:
        """The vector x, shape (n,), as the tree of the user."""
        return _unpack(x, self.x_structure)

    def unpack_y(self, y: Array) -> PyTree:
        """The vector y, shape (m,), as the tree of the user."""
        return _unpack(y, self.y_structure)

    def energy(self, x: Array, y: Array) -> Array:
        """$E(x, y)$, a scalar.

        Raises:
            NoClosedFormError: the problem is a root problem.
        """
        raise NoClosedFormError(f"{type(self).__name__} is a root problem without an energy; use residual(x, y)")

    def residual(self, x: Array, y: Array) -> Array:
        """$F(x, y)$, shape (n,)."""
        return jax.grad(self.energy)(x, y)

    def energy_and_residual(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Both at once, sharing what they share; a root problem gives $|F|^2 / 2$ in place of the energy."""
        if self.has_energy:
            return jax.value_and_grad(self.energy)(x, y)
        F = self.residual(x, y)
        return F @ F / 2, F

    def outer(self, x: Array, y: Array) -> Array:
        """$G(x, y)$, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define outer(x, y)")

    def at(self, x: Array, y: Array) -> Linearization:
        """The derivatives at one point."""
        from theorylab.hypergradient.bilevel import AutodiffLinearization

        return AutodiffLinearization.of(self, x, y)

    def inner(self, y: PyTree) -> InnerProblem:
        """The inner problem at y, for inner methods.

        Raises:
            ShapeError: y has another structure than `y_structure`.
        """
        return InnerProblem(self, self.pack_y(y))

    def start_x(self, y: Array) -> Array:
        """Where inner runs start by default."""
        return jnp.zeros(self.n, self.dtype)

    def exact(self, y: Array) -> Array | None:
        """$x^*(y)$ where a closed form is known, else None."""
        return None

    def solution(self) -> Array | None:
        """The minimizer of L where it is known in closed form, shape (m,), else None."""
        return None

    def error(self, y: Array) -> dict[str, Array]:
        """The metric `error` of outer runs, the distance of y to the solution, where that is known."""
        solution = self.solution()
        return {} if solution is None else {"error": tree.norm(y - solution)}

    def curvature(self, y: Array) -> tuple[Array, Array]:
        """Constants of strong convexity and of smoothness of the inner energy, valid at every x.

        Raises:
            NoClosedFormError: they are not known.
        """
        raise NoClosedFormError(f"{type(self).__name__} knows no constants of curvature; pass them to the method")

    @property
    def samples(self) -> tuple[int, int]:
        """Numbers of samples of the inner and of the outer objective.

        Raises:
            ArgumentError: the problem is not a mean over samples.
        """
        raise self._no_samples()

    def inner_batch(self, indices: Array) -> BilevelProblem:
        """The problem with the inner data term replaced by its mean over these rows; raises as `samples`."""
        raise self._no_samples()

    def outer_batch(self, indices: Array) -> BilevelProblem:
        """The problem with the outer data term replaced by its estimate from these rows; raises as `samples`."""
        raise self._no_samples()

    def _no_samples(self) -> ArgumentError:
        return ArgumentError(f"{type(self).__name__} is not a mean over samples, so it has no batches; "
                             "define samples, inner_batch and outer_batch, or pass inner_data and outer_data to Bilevel")

    def start(self, key: Key) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.y_structure)

    def default_method(self) -> Any:
        from theorylab.hypergradient.outer import OuterDescent

        return OuterDescent()

    def goal(self, tolerance: float) -> Any:
        return Below("gradient_norm", tolerance)


class InnerProblem(Problem):
    """The inner problem at one y as a core Problem: x of shape (n,) moves. Made by `problem.inner(y)`.

    Attributes:
        problem: the bilevel problem.
        y: shape (m,).

    Example:
        >>> from theorylab import hypergradient as hg
        >>> problem = hg.Bilevel(lambda x, y: jnp.cosh(x) - y * x, lambda x, y: x, x=0.0, y=1.0)
        >>> round(float(tl.solve(problem.inner(1.0), tolerance=1e-10).value[0]), 9)
        0.881373587
    """

    problem: BilevelProblem
    y: Array

    @property
    def n(self) -> int:
        """Entries of x."""
        return self.problem.n

    @property
    def has_energy(self) -> bool:
        """Whether there is an energy to descend on."""
        return self.problem.has_energy

    def start(self, key: Key) -> Array:
        return self.problem.start_x(self.y)

    def energy(self, x: Array) -> Array:
        """$E(x, y)$; raises `NoClosedFormError` for a root problem."""
        return self.problem.energy(x, self.y)

    def gradient(self, x: Array) -> Array:
        """$F(x, y)$, shape (n,)."""
        return self.problem.residual(x, self.y)

    def evaluate(self, x: Array) -> tuple[Array, Array]:
        """What is descended on (the energy, or $|F|^2/2$ for a root problem), and $F$."""
        return self.problem.energy_and_residual(x, self.y)

    def linearization(self, x: Array) -> Linearization:
        """The derivatives at x."""
        return self.problem.at(x, self.y)

    def curvature(self) -> tuple[Array, Array]:
        """Constants of strong convexity and of smoothness; raises `NoClosedFormError` where they are not known."""
        return self.problem.curvature(self.y)

    def measured(self, x: Array, merit: Array, F: Array) -> dict[str, Array]:
        """The metrics from values that a method holds already; `error`, the distance to the solution, where that is known and n at most 500."""
        exact = self.problem.exact(self.y) if self.problem.dense else None
        found = {"residual": tree.norm(F), **({} if exact is None else {"error": tree.norm(x - exact)})}
        return {"objective": merit, **found} if self.has_energy else found

    def metrics(self, x: Array) -> dict[str, Array]:
        return self.measured(x, *self.evaluate(x))

    def default_method(self) -> Any:
        from theorylab.hypergradient.inner import Newton
        from theorylab.hypergradient.quasi_newton import LBFGS

        return Newton() if self.problem.dense or not self.has_energy else LBFGS()


# ------------------------------------------------------------------------------------------------------------------ packing


def _entries(structure: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(structure))


def structure_of(value: PyTree) -> PyTree:
    """Shapes and dtypes of the leaves of `value`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), value)


def leaf(name: str, value: Any, shape: tuple[int | None, ...] | None, dtype: Any) -> Array:
    """`value` as a finite real array of `dtype`: numbers, lists and whole numbers are converted, a float array must have it already."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        value = np.asarray(value) if not isinstance(value, (list, tuple)) else checks.array(name, value, finite=False)
        if value.dtype == np.float64:
            value = value.astype(dtype)
    whole = np.dtype(value.dtype).kind in "iub" if not jnp.issubdtype(value.dtype, jax.dtypes.extended) else False
    out = checks.array(name, value, shape)
    if whole or getattr(value, "weak_type", False):
        return jnp.asarray(out, dtype)
    if out.dtype != dtype:
        raise PrecisionError(f"{name} must have the dtype {jnp.dtype(dtype).name} of the problem, got {out.dtype.name}; convert one of them")
    return out


def _pack(name: str, value: PyTree, structure: PyTree, dtype: Any) -> Array:
    size = _entries(structure)
    if isinstance(value, (jax.Array, np.ndarray)) and value.shape == (size,):
        return leaf(name, value, (size,), dtype)
    expected = jax.tree_util.tree_leaves_with_path(structure)
    if len(expected) == 1 and jax.tree.structure(structure) == jax.tree.structure(0):
        return leaf(name, value, expected[0][1].shape, dtype).reshape(-1)
    try:
        found = jax.tree.structure(structure).flatten_up_to(value)
    except ValueError:
        raise ShapeError(f"{name} must be a tree like {jax.tree.structure(structure)}, got {jax.tree.structure(value)}") from None
    parts = zip(expected, found, strict=True)
    return jnp.concatenate([leaf(name + jax.tree_util.keystr(path), part, like.shape, dtype).reshape(-1) for (path, like), part in parts])


def _unpack(flat: Array, structure: PyTree) -> PyTree:
    leaves, kind = jax.tree.flatten(structure)
    ends = np.cumsum([math.prod(one.shape) for one in leaves])
    pieces = [flat[end - math.prod(one.shape): end].reshape(one.shape) for one, end in zip(leaves, ends, strict=True)]
    return jax.tree.unflatten(kind, pieces)
