"""Bilevel problems from Python functions: any trees x and y, an inner energy or an inner root, derivatives by autodiff."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from theorylab.core import checks, tree
from theorylab.core.keys import Key
from theorylab.core.module import choice
from theorylab.errors import ArgumentError, PrecisionError, ShapeError
from theorylab.hypergradient.contract import BilevelProblem, InnerProblem, Linearization, PyTree, leaf, structure_of

Array = jax.Array
DIAGONAL_BLOCK = 64


class AutodiffLinearization(Linearization):
    r"""The derivatives of any `BilevelProblem` by autodiff; nothing of size n by m is formed.

    Second derivatives of the energy go through the directional derivative $v^\top F = \partial_v E$, reverse over forward.
    """

    problem: BilevelProblem
    x: Array
    y: Array

    @classmethod
    def of(cls, problem: BilevelProblem, x: Array, y: Array) -> AutodiffLinearization:
        """The derivatives of `problem` at (x, y)."""
        outer_x, outer_y = jax.grad(problem.outer, (0, 1))(x, y)
        return cls(problem.residual(x, y), outer_x, outer_y, problem, x, y)

    def _paired(self, v: Array, x: Array, y: Array) -> Array:
        r"""$v^\top F(x, y)$."""
        if self.problem.has_energy:
            return jax.jvp(lambda x: self.problem.energy(x, y), (x,), (v,))[1]
        return v @ self.problem.residual(x, y)

    def product(self, h: Array) -> Array:
        return jax.jvp(lambda x: self.problem.residual(x, self.y), (self.x,), (h,))[1]

    def transposed(self, h: Array) -> Array:
        return self.product(h) if self.problem.symmetric else jax.grad(lambda x: self._paired(h, x, self.y))(self.x)

    def matrix(self) -> Array:
        return jax.jacfwd(lambda x: self.problem.residual(x, self.y))(self.x)

    def diagonal(self) -> Array:
        n, blank = self.x.shape[0], jnp.zeros_like(self.x)
        return lax.map(lambda i: self.product(blank.at[i].set(1))[i], jnp.arange(n), batch_size=min(n, DIAGONAL_BLOCK))

    def cross_pullback(self, v: Array) -> Array:
        return jax.grad(lambda y: self._paired(v, self.x, y))(self.y)

    def cross_product(self, u: Array) -> Array:
        return jax.jvp(lambda y: self.problem.residual(self.x, y), (self.y,), (u,))[1]

    def turn(self, v: Array, d: Array) -> tuple[Array, Array]:
        gradient = jax.grad(lambda x, y: self.problem.outer(x, y) - self._paired(v, x, y), (0, 1))
        return jax.jvp(lambda x: gradient(x, self.y), (self.x,), (d,))[1]


class Bilevel(BilevelProblem):
    r"""A bilevel problem from functions: $\min_y G(x^*(y), y)$, where $x^*(y)$ minimizes `inner` in x, or is a root of `residual`.

    Args:
        inner: the inner energy, `inner(x, y, *args)` -> scalar; None with `residual`.
        outer: the outer objective, `outer(x, y, *args)` -> scalar.
        args: tuple of arrays (or trees of arrays) handed to every function; a new value never recompiles.
        x: example of x, a tree of float arrays of one precision; inner runs start there. Without it a function that is given x takes its shape
            from there, an inner run needs `x0`, and an outer run is refused.
        y: example of y; outer runs start there. Optional like x.
        residual: the root function, `residual(x, y, *args)` -> a tree like x, instead of `inner`.
        symmetric: whether the Jacobian of `residual` in x is known to be symmetric; conjugate gradients and Cholesky need it.
        inner_data: samples of the inner objective, a tree of arrays with a leading axis of samples. `inner` (or `residual`) is then called
            as `inner(x, y, rows, *args)` and takes the mean over `rows`, all of them or a batch.
        outer_data: samples of the outer objective, likewise: `outer(x, y, rows, *args)`.

    Raises:
        ArgumentError: not exactly one of `inner` and `residual`; not callable; `args` is no tuple; `symmetric` with `inner`.
        ShapeError: a function gives no scalar, or `residual` no tree like x; samples of unequal length.
        PrecisionError: complex or half-precision entries, or two precisions.
        NonFiniteInputError: NaN or infinity in x, y or the data.

    Example:
        >>> problem = Bilevel(lambda x, y: 0.5 * jnp.sum(jnp.exp(y) * x**2) - jnp.sum(x), lambda x, y: jnp.sum(x**2), x=jnp.zeros(2), y=jnp.zeros(2))
        >>> problem.at(jnp.ones(2), jnp.zeros(2)).cross_pullback(jnp.ones(2)).tolist()
        [1.0, 1.0]
    """

    x: PyTree
    y: PyTree
    args: tuple
    inner_data: PyTree
    outer_data: PyTree
    inner_function: Callable | None = choice()
    outer_function: Callable | None = choice()
    residual_function: Callable | None = choice()
    declared_symmetric: bool = choice()

    def __init__(self, inner: Callable | None = None, outer: Callable | None = None, args: tuple = (), *, x: PyTree = None, y: PyTree = None,
                 residual: Callable | None = None, symmetric: bool = False, inner_data: PyTree = None, outer_data: PyTree = None):
        if (inner is None) == (residual is None):
            raise ArgumentError("give either inner (an energy) or residual= (a root function), "
                                f"got {'both' if inner is not None else 'neither'}")
        for name, function in (("inner", inner), ("outer", outer), ("residual", residual)):
            if (function is not None or name == "outer") and not callable(function):
                raise ArgumentError(f"{name} must be a function of (x, y, *args), got {function!r}")
        if not isinstance(args, tuple):
            raise ArgumentError(f"args must be a tuple, got {type(args).__name__}; write args=(a,) for a single argument")
        if symmetric and inner is not None:
            raise ArgumentError("symmetric is for residual=; an energy is always symmetric")
        self.x = None if x is None else _example("x", x, None)
        self.y = None if y is None else _example("y", y, None if x is None else jax.tree.leaves(self.x)[0].dtype)
        self.args = tree.check_finite("args", args)
        self.inner_data, self.outer_data = _rows("inner_data", inner_data), _rows("outer_data", outer_data)
        self.inner_function, self.outer_function, self.residual_function = inner, outer, residual
        self.declared_symmetric = bool(symmetric)
        if self.x is not None and self.y is not None:
            self._check_functions()

    def replace(self, **changes: Any) -> Bilevel:
        """A copy with some arguments of the constructor changed; every check runs again."""
        same = {"inner": self.inner_function, "outer": self.outer_function, "residual": self.residual_function, "args": self.args, "x": self.x,
                "y": self.y, "symmetric": self.declared_symmetric, "inner_data": self.inner_data, "outer_data": self.outer_data}
        return Bilevel(**{**same, **changes})

    def shaped(self, x: PyTree = None, y: PyTree = None) -> Bilevel:
        """The problem with zeros like x and y as examples where it has none."""
        if (self.x is not None or x is None) and (self.y is not None or y is None):
            return self
        zeros = lambda name, value, dtype: jax.tree.map(jnp.zeros_like, _example(name, value, dtype))  # noqa: E731
        x = zeros("x", x, None if self.y is None else self.dtype) if self.x is None and x is not None else self.x
        return self.replace(x=x, y=zeros("y", y, None if x is None else jax.tree.leaves(x)[0].dtype) if self.y is None and y is not None else self.y)

    def _check_functions(self) -> None:
        """Shapes and precision of what the functions give, without running them."""
        for name, function, data in (("inner", self.inner_function, self.inner_data), ("outer", self.outer_function, self.outer_data)):
            if function is None:
                continue
            given = jax.eval_shape(lambda f=function, d=data: self._call(f, d, self.x, self.y))
            if jax.tree.structure(given) != jax.tree.structure(0) or given.shape != ():
                raise ShapeError(f"{name}(x, y, *args) must be a scalar, got {_describe(given)}")
            self._check_precision(name, given)
        if self.residual_function is not None:
            given = jax.eval_shape(lambda: self._call(self.residual_function, self.inner_data, self.x, self.y))
            if jax.tree.structure(given) != jax.tree.structure(self.x) or [a.shape for a in jax.tree.leaves(given)] != [
                    a.shape for a in jax.tree.leaves(self.x)]:
                raise ShapeError(f"residual(x, y, *args) must be a tree like x, {_describe(structure_of(self.x))}, got {_describe(given)}")
            jax.tree.map(lambda a: self._check_precision("residual", a), given)

    def _check_precision(self, name: str, given: Any) -> None:
        if given.dtype != self.dtype:
            raise PrecisionError(f"{name}(x, y, *args) must have the dtype {jnp.dtype(self.dtype).name} of x and y, got {given.dtype}; convert args")

    def _call(self, function: Callable | None, data: PyTree, x: PyTree, y: PyTree) -> Any:
        assert function is not None
        return function(x, y, *self.args) if data is None else function(x, y, data, *self.args)

    @property
    def x_structure(self) -> PyTree:
        return self._structure("x", self.x)

    @property
    def y_structure(self) -> PyTree:
        return self._structure("y", self.y)

    def _structure(self, name: str, example: PyTree) -> PyTree:
        if example is None:
            raise ArgumentError(f"{name} has no known shape: pass {name}= (an example of it) to Bilevel")
        return structure_of(example)

    @property
    def dense(self) -> bool:
        return self.x is None or super().dense

    @property
    def dtype(self) -> Any:
        known = jax.tree.leaves((self.x, self.y))
        return known[0].dtype if known else jnp.result_type(float)

    # Without an example a vector is what the functions are given.

    def pack_x(self, x: PyTree) -> Array:
        return _vector("x", x) if self.x is None else super().pack_x(x)

    def pack_y(self, y: PyTree) -> Array:
        return _vector("y", y) if self.y is None else super().pack_y(y)

    def unpack_x(self, x: Array) -> PyTree:
        return x if self.x is None else super().unpack_x(x)

    def unpack_y(self, y: Array) -> PyTree:
        return y if self.y is None else super().unpack_y(y)

    def inner(self, y: PyTree) -> InnerProblem:
        shaped = self.shaped(y=y)
        return InnerProblem(shaped, shaped.pack_y(y))

    @property
    def has_energy(self) -> bool:
        return self.inner_function is not None

    @property
    def symmetric(self) -> bool:
        return self.has_energy or self.declared_symmetric

    def energy(self, x: Array, y: Array) -> Array:
        if self.inner_function is None:
            return super().energy(x, y)
        return self._call(self.inner_function, self.inner_data, self.unpack_x(x), self.unpack_y(y))

    def residual(self, x: Array, y: Array) -> Array:
        if self.residual_function is None:
            return super().residual(x, y)
        given = self._call(self.residual_function, self.inner_data, self.unpack_x(x), self.unpack_y(y))
        return jnp.concatenate([part.reshape(-1) for part in jax.tree.leaves(given)])

    def outer(self, x: Array, y: Array) -> Array:
        return self._call(self.outer_function, self.outer_data, self.unpack_x(x), self.unpack_y(y))

    def start(self, key: Key) -> PyTree:
        self._structure("y", self.y)
        return self.y

    def start_x(self, y: Array) -> Array:
        self._structure("x", self.x)
        return jnp.concatenate([part.reshape(-1) for part in jax.tree.leaves(self.x)])

    @property
    def samples(self) -> tuple[int, int]:
        if self.inner_data is None or self.outer_data is None:
            raise self._no_samples()
        return jax.tree.leaves(self.inner_data)[0].shape[0], jax.tree.leaves(self.outer_data)[0].shape[0]

    def inner_batch(self, indices: Array) -> Bilevel:
        if self.inner_data is None:
            raise self._no_samples()
        return eqx.tree_at(lambda p: p.inner_data, self, jax.tree.map(lambda a: a[indices], self.inner_data))

    def outer_batch(self, indices: Array) -> Bilevel:
        if self.outer_data is None:
            raise self._no_samples()
        return eqx.tree_at(lambda p: p.outer_data, self, jax.tree.map(lambda a: a[indices], self.outer_data))


def _example(name: str, value: PyTree, dtype: Any) -> PyTree:
    """The leaves of an example as float arrays of one precision."""
    paths = jax.tree_util.tree_leaves_with_path(value)
    if not paths:
        raise ShapeError(f"{name} must hold at least one array, got {value!r}")
    if dtype is None:
        floats = [a.dtype for _, a in paths if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.inexact)]
        dtype = jnp.dtype(floats[0]) if floats and jnp.dtype(floats[0]).kind == "f" else jnp.result_type(float)
    return jax.tree_util.tree_map_with_path(lambda path, a: leaf(name + jax.tree_util.keystr(path), a, None, dtype), value)


def _vector(name: str, value: Any) -> Array:
    value = checks.array(name, value)
    if value.ndim != 1:
        raise ShapeError(f"{name} must be a vector, got shape {value.shape}; pass {name}= (an example of it) to Bilevel for anything else")
    return value


def _rows(name: str, data: PyTree) -> PyTree:
    """Samples as arrays with one common leading axis."""
    if data is None:
        return None
    data = jax.tree.map(jnp.asarray, tree.check_finite(name, data))
    leaves = jax.tree.leaves(data)
    lengths = {a.shape[0] if a.ndim else None for a in leaves}
    if len(lengths) != 1 or None in lengths or 0 in lengths:
        raise ShapeError(f"{name} must hold arrays with one common leading axis of samples, got shapes {[a.shape for a in leaves]}")
    return data


def _describe(given: Any) -> str:
    return str(jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", given))
