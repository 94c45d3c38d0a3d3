r"""Selection of regularization: one log-penalty per feature, chosen on held-out data; ridge, logistic and softmax regression.

Data A of shape (N, p) with rows $a_i$, unknown x with one row per feature, $y \in R^p$ and $D = e^y / p$:

$$ E(x, y) = \frac1N \sum_i \ell(a_i^\top x, b_i) + \frac12 \sum_j D_j |x_j|^2 . $$

The data term is divided by N and the penalty by p, as in the official code of the paper (Ye, Peyré, Cremers and Ablin, Enhancing
hypergradients estimation, 2024). With it $F_2 = \mathrm{diag}(D \circ x)$: the whole derivative in y is one elementwise product, and
neither $F_2$ nor the Jacobian of the solution is ever formed.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np

from theorylab.core import checks
from theorylab.core.module import choice
from theorylab.errors import ArgumentError, ShapeError
from theorylab.hypergradient.contract import BilevelProblem, Linearization, gram, leaf, pull
from theorylab.hypergradient.losses import Logistic, Softmax, Squares, pair, signs, top_eigenvalue, warn_single_class

Array = jax.Array
OBJECTIVES = ("validation", "linear", "quadratic")


class SelectionLinearization(Linearization):
    """The derivatives of a selection problem at one point, with margins and weights cached. X and V stand for x and v in rows per feature."""

    problem: Selection
    x: Array
    penalties: Array
    weights: Any
    outer_weights: Any

    @classmethod
    def of(cls, problem: Selection, x: Array, y: Array) -> SelectionLinearization:
        """The derivatives of `problem` at (x, y)."""
        X, D = x.reshape(problem.shape), problem.penalties(y)
        t, A_out = problem.A @ X, problem.A_out
        outer_y, outer_weights = jnp.zeros_like(y), None
        if problem.objective == "linear":
            outer_x, outer_y = problem.b_out, 2 * y
        else:
            loss, mean = problem.outer_loss, problem.outer_rows
            t_out = A_out @ X
            outer_x, outer_weights = pull(A_out, loss.slope(t_out, problem.b_out)) / mean, loss.weights(t_out)
        residual = pull(problem.A, problem.loss.slope(t, problem.b)) / len(problem.A) + D * X
        return cls(residual.reshape(-1), outer_x.reshape(-1), outer_y, problem, X, D, problem.loss.weights(t), outer_weights)

    def product(self, h: Array) -> Array:
        A, H = self.problem.A, h.reshape(self.x.shape)
        return (pull(A, self.problem.loss.second(self.weights, A @ H)) / len(A) + self.penalties * H).reshape(-1)

    def matrix(self) -> Array:
        A, shape = self.problem.A, self.x.shape
        return self.problem.loss.hessian(A, self.weights, shape) / len(A) + jnp.diag(jnp.broadcast_to(self.penalties, shape).reshape(-1))

    def diagonal(self) -> Array:
        A = self.problem.A
        return (self.problem.loss.diagonal(A, self.weights, self.x.shape) / len(A) + self.penalties).reshape(-1)

    def cross_pullback(self, v: Array) -> Array:
        return self.problem.per_feature(self.penalties * self.x * v.reshape(self.x.shape))

    def cross_product(self, u: Array) -> Array:
        return (self.problem.spread(u) * self.penalties * self.x).reshape(-1)

    def turn(self, v: Array, d: Array) -> tuple[Array, Array]:
        problem, V, H = self.problem, v.reshape(self.x.shape), d.reshape(self.x.shape)
        A, A_out = problem.A, problem.A_out
        a = -pull(A, problem.loss.third(self.weights, A @ H, A @ V)) / len(A)
        if problem.objective != "linear":
            a = a + pull(A_out, problem.outer_loss.second(self.outer_weights, A_out @ H)) / problem.outer_rows
        return a.reshape(-1), -problem.per_feature(self.penalties * H * V)


class Selection(BilevelProblem):
    """What the selection problems share; use `RidgeSelection`, `LogisticSelection` or `SoftmaxSelection`.

    Attributes:
        A, b: training data, `b` as the loss takes it (one-hot rows for softmax).
        A_out, b_out: outer data.
        objective: name of the outer objective.
    """

    A: Array
    b: Array
    A_out: Any
    b_out: Array
    objective: str = choice(among=OBJECTIVES)
    loss: ClassVar[Any] = Squares

    def __init__(self, train: Any, valid: Any, objective: str = "validation"):
        checks.among("objective", objective, OBJECTIVES)
        A, b = pair("train", train)
        A_out, b_out = pair("valid", valid)
        self.A = checks.array("A of train", A, (None, None))
        p, dtype = self.A.shape[1], self.A.dtype
        self.b = self._targets("b of train", b, self.A)
        self.objective = objective
        if objective == "linear":
            self.A_out, self.b_out = None, leaf("b_out of valid", b_out, self.shape, dtype)
            return
        if np.ndim(A_out) == 2 and np.shape(A_out)[1] != p:
            raise ShapeError(f"A_out of valid must have the {p} features of A of train, got {np.shape(A_out)[1]}")
        self.A_out = leaf("A_out of valid", A_out, (None, p), dtype)
        if objective == "validation":
            self.b_out = self._targets("b_out of valid", b_out, self.A_out)
        else:
            self.b_out = leaf("b_out of valid", b_out, (len(self.A_out), *self.shape[1:]), dtype)

    def _targets(self, name: str, b: Any, A: Array) -> Array:
        """The targets of the rows of A, checked, as the loss takes them."""
        raise NotImplementedError(f"{type(self).__name__} must define _targets")

    def _arguments(self) -> dict[str, Any]:
        return {"train": (self.A, self.b), "valid": (self.A_out, self.b_out), "objective": self.objective}

    def replace(self, **changes: Any) -> Any:
        """A copy with some arguments of the constructor changed; every check runs again."""
        return type(self)(**{**self._arguments(), **changes})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that x has for the user: (p,), or (p, q) with several outputs or classes."""
        return (self.A.shape[1], *self.b.shape[1:])

    @property
    def x_structure(self) -> Any:
        return jax.ShapeDtypeStruct(self.shape, self.A.dtype)

    @property
    def y_structure(self) -> Any:
        return jax.ShapeDtypeStruct(self.A.shape[1:], self.A.dtype)

    @property
    def outer_loss(self) -> Any:
        """The loss of the outer data."""
        return self.loss if self.objective == "validation" else Squares

    @property
    def outer_rows(self) -> int:
        """What the outer losses are divided by: the rows for `"validation"`, nothing for `"quadratic"`."""
        return len(self.A_out) if self.objective == "validation" else 1

    def spread(self, u: Array) -> Array:
        """One number per feature, in a form that multiplies x."""
        return u if len(self.shape) == 1 else u[:, None]

    def per_feature(self, z: Array) -> Array:
        """Sums of z, of the shape of x, over outputs."""
        return z if len(self.shape) == 1 else jnp.sum(z, axis=1)

    def penalties(self, y: Array) -> Array:
        """$D = e^y / p$, in a form that multiplies x."""
        return self.spread(jnp.exp(y) / self.A.shape[1])

    def energy(self, x: Array, y: Array) -> Array:
        X = x.reshape(self.shape)
        return self.loss.value(self.A @ X, self.b) / len(self.A) + jnp.sum(self.penalties(y) * X**2) / 2

    def residual(self, x: Array, y: Array) -> Array:
        return self.energy_and_residual(x, y)[1]

    def energy_and_residual(self, x: Array, y: Array) -> tuple[Array, Array]:
        X, D = x.reshape(self.shape), self.penalties(y)
        t = self.A @ X
        energy = self.loss.value(t, self.b) / len(self.A) + jnp.sum(D * X**2) / 2
        return energy, (pull(self.A, self.loss.slope(t, self.b)) / len(self.A) + D * X).reshape(-1)

    def outer(self, x: Array, y: Array) -> Array:
        X = x.reshape(self.shape)
        if self.objective == "linear":
            return jnp.sum(self.b_out * X) + y @ y
        return self.outer_loss.value(self.A_out @ X, self.b_out) / self.outer_rows

    def at(self, x: Array, y: Array) -> SelectionLinearization:
        return SelectionLinearization.of(self, x, y)

    def curvature(self, y: Array) -> tuple[Array, Array]:
        r"""$\mu = \min_j D_j$ and $L = c\,\lambda_{\max}(A^\top A / N) + \max_j D_j$ with c = 1 (ridge), 1/4 (logistic), 1/2 (softmax)."""
        D = self.penalties(y)
        return jnp.min(D), self.loss.smoothness * top_eigenvalue(self.A) / len(self.A) + jnp.max(D)

    @property
    def samples(self) -> tuple[int, int]:
        return len(self.A), 1 if self.A_out is None else len(self.A_out)

    def inner_batch(self, indices: Array) -> Any:
        return eqx.tree_at(lambda p: (p.A, p.b), self, (self.A[indices], self.b[indices]))

    def outer_batch(self, indices: Array) -> Any:
        """The problem with these outer rows; a `"quadratic"` sum is scaled to all rows, a `"linear"` objective has no rows and stays."""
        if self.objective == "linear":
            return self
        A_out, b_out = self.A_out[indices], self.b_out[indices]
        if self.objective == "quadratic":
            scale = np.sqrt(len(self.A_out) / len(A_out)).astype(self.A.dtype)
            A_out, b_out = scale * A_out, scale * b_out
        return eqx.tree_at(lambda p: (p.A_out, p.b_out), self, (A_out, b_out))


class RidgeSelection(Selection):
    r"""Ridge regression with one log-penalty per feature: $E = |Ax - b|^2 / (2N) + \frac1{2p} \sum_j e^{y_j} |x_j|^2$.

    Args:
        train: pair (A, b) of shapes (N, p) and (N,), or (N, q) for q outputs, whose losses are summed.
        valid: pair (A_out, b_out) of outer data.
        objective: `"validation"`, half the mean squared error over the outer rows; `"quadratic"`, $|A_{out} x - b_{out}|^2 / 2$, not
            divided; `"linear"`, $b_{out}^\top x + |y|^2$ with `b_out` of the shape of x (`A_out` is not used and may be None).

    Raises:
        ArgumentError: `train` or `valid` is no pair.
        UnknownNameError: another `objective`.
        ShapeError: shapes that do not match.
        PrecisionError: complex or half-precision entries, or two precisions.
        NonFiniteInputError: NaN or infinity.

    Example:
        >>> problem = RidgeSelection((jnp.eye(2), jnp.array([3.0, 3.0])), (jnp.eye(2), jnp.ones(2)))
        >>> problem.exact(jnp.zeros(2)).tolist()
        [1.5, 1.5]
    """

    def __init__(self, train: Any, valid: Any, objective: str = "validation"):
        super().__init__(train, valid, objective)

    def _targets(self, name: str, b: Any, A: Array) -> Array:
        tail = np.shape(b)[1:] if name.startswith("b of") else self.shape[1:]
        return leaf(name, b, (len(A), *tail) if len(tail) < 2 else (len(A), None), A.dtype)

    def exact(self, y: Array) -> Array:
        H = gram(self.A) / len(self.A) + jnp.diag(jnp.exp(y) / self.A.shape[1])
        return jsl.cho_solve(jsl.cho_factor(H), pull(self.A, self.b) / len(self.A)).reshape(-1)


class LogisticSelection(Selection):
    r"""Logistic regression with one log-penalty per feature: $E = \frac1N \sum_i \log(1 + e^{-b_i a_i^\top x}) + \frac1{2p} \sum_j e^{y_j} x_j^2$.

    Args:
        train: pair (A, b) of shapes (N, p) and (N,), labels -1 and 1. There is no intercept; add a column of ones for one.
        valid: pair (A_out, b_out) of outer data.
        objective: `"validation"`, the mean logistic loss over the outer rows; `"quadratic"` and `"linear"` as in `RidgeSelection`.

    Raises:
        ArgumentError: a label that is not -1 or 1; further errors as in `RidgeSelection`.

    Example:
        >>> A = jnp.array([[1.0], [-2.0], [0.5]])
        >>> problem = LogisticSelection((A, jnp.array([1.0, 1.0, -1.0])), (jnp.ones((1, 1)), jnp.ones(1)))
        >>> round(float(tl.solve(problem.inner(jnp.zeros(1)), tolerance=1e-10).value[0]), 9)
        -0.174344862
    """

    loss: ClassVar[Any] = Logistic

    def __init__(self, train: Any, valid: Any, objective: str = "validation"):
        super().__init__(train, valid, objective)
        warn_single_class(self.b)

    def _targets(self, name: str, b: Any, A: Array) -> Array:
        return signs(name, b, A)


class SoftmaxSelection(Selection):
    r"""Softmax regression with one log-penalty per feature, shared by the classes: mean cross-entropy $+ \frac1{2p} \sum_j e^{y_j} |x_j|^2$.

    x has shape (p, q) for q classes; the logits are A x, without intercept.

    Args:
        train: pair (A, b) of shapes (N, p) and (N,), labels 0, ..., q - 1.
        valid: pair (A_out, b_out) of outer data.
        objective: `"validation"`, the mean cross-entropy over the outer rows; `"quadratic"` and `"linear"` as in `RidgeSelection`.
        classes: q; from the labels if None.

    Raises:
        ArgumentError: a label that is no whole number in [0, q), or fewer than two classes; further errors as in `RidgeSelection`.

    Example:
        >>> problem = SoftmaxSelection((jnp.eye(3), [0, 1, 2]), (jnp.eye(3), [0, 1, 2]))
        >>> problem.unpack_x(problem.start_x(jnp.zeros(3))).shape
        (3, 3)
    """

    classes: int = choice()
    loss: ClassVar[Any] = Softmax

    def __init__(self, train: Any, valid: Any, objective: str = "validation", classes: int | None = None):
        (_, b), (_, b_out) = pair("train", train), pair("valid", valid)
        if classes is None:
            labels = [b, b_out] if objective == "validation" else [b]
            if not checks.known(*labels):
                raise ArgumentError("classes must be given where the labels are traced")
            classes = 1 + max((int(np.max(one)) if np.size(one) else 0) for one in map(np.asarray, labels) if one.dtype.kind in "iuf")
        self.classes = checks.whole("classes", classes, low=2)
        super().__init__(train, valid, objective)

    def _arguments(self) -> dict[str, Any]:
        b_out = jnp.argmax(self.b_out, axis=1) if self.objective == "validation" else self.b_out
        return {**super()._arguments(), "train": (self.A, jnp.argmax(self.b, axis=1)), "valid": (self.A_out, b_out), "classes": self.classes}

    def _targets(self, name: str, b: Any, A: Array) -> Array:
        labels = checks.array(name, b, (len(A),))
        if checks.known(labels):
            host = np.asarray(labels)
            bad = host[(host != np.floor(host)) | (host < 0) | (host >= self.classes)]
            if bad.size:
                raise ArgumentError(f"{name} must hold whole labels from 0 to {self.classes - 1}, got {bad[0]:g}")
        return jax.nn.one_hot(labels.astype(jnp.int32), self.classes, dtype=A.dtype)


def standardize(train: Any, valid: Any) -> tuple[Array, Array]:
    """Features (or targets) with the mean of `train` subtracted, divided by its population standard deviation.

    A column that is constant on `train` keeps the scale 1, with a warning that names it.

    Args:
        train: shape (N,) or (N, p).
        valid: further rows, standardized with the numbers of `train`.

    Raises:
        ShapeError: the columns of the two do not match.
        NonFiniteInputError: NaN or infinity.

    Example:
        >>> [a.tolist() for a in standardize([[1.0], [3.0]], [[5.0]])]
        [[[-1.0], [1.0]], [[3.0]]]
    """
    train = checks.array("train", train, (None,) if np.ndim(train) == 1 else (None, None))
    valid = leaf("valid", valid, (None, *train.shape[1:]), train.dtype)
    mean, spread = jnp.mean(train, axis=0), jnp.std(train, axis=0)
    floor = 10 * jnp.finfo(train.dtype).eps * jnp.max(jnp.abs(train), axis=0)  # a constant column rounds to a spread of this order
    flat = spread <= floor
    if checks.known(flat) and bool(jnp.any(flat)):
        columns = np.flatnonzero(np.atleast_1d(np.asarray(flat))).tolist()
        shown = ", ".join(map(str, columns[:5])) + (", ..." if len(columns) > 5 else "")
        warnings.warn(f"train is constant in {len(columns)} of {flat.size} columns ({shown}); they keep the scale 1", stacklevel=2)
    scale = jnp.where(flat, jnp.ones_like(spread), spread)
    return (train - mean) / scale, (valid - mean) / scale
