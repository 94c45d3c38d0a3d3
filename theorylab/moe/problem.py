"""Maximum likelihood for top-K mixtures of experts: the problem that all methods of the family work on."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks, tree
from theorylab.core.keys import Key
from theorylab.core.module import choice, size
from theorylab.core.problem import Problem
from theorylab.core.rows import Rows
from theorylab.core.stream import Stream, fold
from theorylab.errors import ArgumentError, RunWarning, ShapeError
from theorylab.moe import density
from theorylab.moe.model import SELECTIONS, Mixture
from theorylab.moe.moments import over_chunks

Array = jax.Array
CHUNK = 2048                                        # rows whose arrays stay in the cache while their sums are taken


class Likelihood(Problem):
    r"""Maximize $\sum_i w_i \log g(y_i \mid x_i)$ over mixtures of `experts` experts of which the gate keeps `active`.

    Points are `Mixture`s. Rows of weight 0 pad: they change no sum. The problem may be made and used inside `jax.vmap`, for thousands of fits
    in one batch.

    Args:
        x: inputs, shape `(n, d)`, or `(n,)` for d = 1.
        y: responses, shape `(n,)`.
        experts: k.
        active: K, between 1 and k.
        selection: the rule of `Mixture`.
        weight: weights of the rows, not negative; 1 unless given.
        chunk: rows whose sums are taken at once; memory does not grow with n beyond the data.
        axis: name of a mapped axis (`shard_map`, `vmap`) over which the rows are split; sums are then added over it.
        per_pass: batches in one pass, where the rows are one batch of a stream (0: the method knows): see `streamed`.

    Raises:
        ShapeError, PrecisionError, NonFiniteInputError: the data are wrong; the message names the argument.
        ArgumentError: a negative weight, constant responses, `active` outside 1..k, or fewer than k (d + 2) rows.

    Warns:
        RunWarning: the columns of x and the intercept are linearly dependent; coefficients are then one choice among equals.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S1")
        >>> likelihood = moe.Likelihood(*moe.weyl_sample(truth, 400, -1.0, 1.0), experts=3, active=2)
        >>> fit = tl.iterate(likelihood, moe.EM(), truth, steps=200, stop=likelihood.goal(1e-6))
        >>> float(likelihood.log_likelihood(fit.value).round(5))
        -360.01985
    """

    x: Array
    y: Array
    weight: Array
    center: Array
    scale: Array
    spread: Array
    experts: int = size()
    active: int = size()
    selection: str = choice(among=SELECTIONS)
    chunk: int = size()
    axis: Any = choice()
    per_pass: int | None = size(low=0)

    def __init__(self, x: Any, y: Any, experts: int, active: int, selection: str = "slope", weight: Any = None, *, chunk: int = CHUNK,
                 axis: str | None = None, per_pass: int | None = None):
        x = checks.array("x", x, (None,))[:, None] if np.ndim(x) == 1 else x
        self.x = checks.array("x", x, (None, None))
        n = self.x.shape[0]
        self.y = checks.array("y", y, (n,))
        self.weight = jnp.asarray(np.ones(n, self.y.dtype)) if weight is None else checks.array("weight", weight, (n,))
        checks.same_dtype(x=self.x, y=self.y, weight=self.weight)
        self._settings(experts, active, selection, chunk, axis, per_pass)
        total, self.center, self.scale, self.spread = _describe(self.x, self.y, self.weight, axis)
        if not tree.is_traced(self.x, self.y, self.weight):
            self._check_data(total)

    def _settings(self, experts: Any, active: Any, selection: str, chunk: Any, axis: str | None, per_pass: int | None) -> None:
        self.experts = checks.whole("experts", experts, low=1)
        self.active = checks.whole("active", active, low=1, high=self.experts)
        self.selection = selection
        self.chunk, self.axis, self.per_pass = checks.whole("chunk", chunk, low=1), axis, per_pass

    def _check_data(self, total: Array) -> None:
        weight = np.asarray(self.weight)
        if not (weight >= 0).all():
            raise ArgumentError(f"weight must not be negative, got {weight.min():g} at index {int(weight.argmin())}")
        used, needed = int((weight > 0).sum()), self.experts * (self.dim + 2)
        if used < needed:
            raise ArgumentError(f"x must have at least experts (d + 2) = {needed} rows of positive weight, got {used}; use fewer experts")
        if not float(self.spread) > 0:
            raise ArgumentError(f"y must vary, got {float(self.y[0]):g} in every row: the likelihood of a constant is unbounded")
        z = (np.asarray(self.x) - np.asarray(self.center)) / np.asarray(self.scale)
        values = np.linalg.eigvalsh((z * np.asarray(self.weight)[:, None]).T @ z / float(total))
        if values[0] < 100 * self.dim * float(jnp.finfo(self.x.dtype).eps):
            warnings.warn("the columns of x and the intercept are linearly dependent (a constant or repeated column?): the fit is well defined, "
                          "its coefficients are not; drop the column", RunWarning, stacklevel=3)

    @classmethod
    def streamed(cls, stream: Stream | None = None, experts: int = 1, active: int = 1, selection: str = "slope", *, chunk: int = CHUNK) -> Self:
        """The problem for `iterate(..., StreamedEM(stream.per_pass), data=stream)`: rows are read, used and forgotten.

        One pass is made at once, for the location and scale of the data. Without `stream` there is none: sums are taken in the inputs as they
        are, which should then be of order 1 and near 0, and the floor of the variances follows the batch.

        Args:
            stream: batches (x, y), or ((x, y), weight) as `Rows(..., remainder="weight")` gives, which counts every row.
            experts: k.
            active: K.
            selection: the rule of `Mixture`.
            chunk: as for the class.

        Raises:
            ArgumentError: the stream does not know the length of a pass, or leaves rows out.

        Example:
            >>> from theorylab import moe
            >>> x, y = moe.weyl_sample(moe.example("S1"), 400, -1.0, 1.0)
            >>> rows = tl.Rows((np.asarray(x), np.asarray(y)), 64, remainder="weight")
            >>> moe.Likelihood.streamed(rows, experts=3, active=2).per_pass
            7
        """
        if stream is None:
            line = np.arange(3.0 * checks.whole("experts", experts, low=1))
            nothing = (jnp.zeros((1, 0)), jnp.zeros(1), jnp.zeros(1), jnp.asarray(0.0), jnp.asarray(1.0), jnp.asarray(0.0))
            return eqx.tree_at(_data, cls(line, line, experts, active, selection, chunk=chunk, per_pass=0), nothing)
        per_pass = getattr(stream, "per_pass", None)
        if per_pass is None:
            raise ArgumentError(f"stream must know its per_pass, because every step needs all data, got {type(stream).__name__}; use Rows")
        if isinstance(stream, Rows) and stream.left_over(0) is not None:
            raise ArgumentError("stream leaves rows out of each pass: make it with Rows(..., remainder='weight')")
        x, y, weight = (np.asarray(part) for part in _parts(stream.batch(0)))
        rows, needed = len(y), checks.whole("experts", experts, low=1) * (x[0].size + 2)
        if rows < needed:
            raise ArgumentError(f"stream must give batches of at least experts (d + 2) = {needed} rows, got {rows}")
        first = cls(x, y, experts, active, selection, weight, chunk=chunk, per_pass=per_pass)
        shift = jnp.concatenate([first.center, first.y[:1]])
        zeros = jnp.zeros_like(shift)
        total, moved, square, _ = fold(_add_moments, stream, (jnp.zeros((), shift.dtype), zeros, zeros, shift))
        tree.check_finite("stream", (moved, square))
        variance = square / total - (moved / total) ** 2
        found = ((moved / total + shift)[:-1], _positive_root(variance[:-1]), variance[-1])
        return eqx.tree_at(lambda p: (p.center, p.scale, p.spread), first, found)

    def replace(self, **changes: Any) -> Self:
        """A copy with some arguments of the constructor changed; every check runs again."""
        same = ("x", "y", "experts", "active", "selection", "weight", "chunk", "axis", "per_pass")
        return type(self)(**{name: getattr(self, name) for name in same} | changes)

    def feed(self, batch: Any) -> Self:
        x, y, weight = _parts(batch)
        if self.dim == 0:
            place = (jnp.zeros(x.shape[1], x.dtype), jnp.ones(x.shape[1], x.dtype), _describe(x, y, weight, None)[3])
            return eqx.tree_at(_data, self, (x, y, weight, *place))
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ShapeError(f"a batch must hold x of shape (rows, {self.dim}), got {x.shape}")
        return eqx.tree_at(lambda p: (p.x, p.y, p.weight), self, (x, y, weight))

    @property
    def dim(self) -> int:
        """Number of inputs d; 0 for a streamed problem that has seen no row."""
        return self.x.shape[-1]

    def log_likelihood(self, mixture: Mixture, mask: Array | None = None) -> Array:
        """The log-likelihood of the data; with the routing `mask`, shape `(k, n)`, in place of that of `mixture` if it is given."""
        wide = jnp.result_type(float)
        return over_chunks(lambda x, y, w, s: jnp.sum(w * density.log_density(mixture, x, y, s), dtype=wide), self, mask)

    def routing(self, mixture: Mixture) -> Array:
        """The routing of the rows, shape `(k, n)`."""
        return density.routing(mixture, self.x)

    def routed(self, mixture: Mixture, mask: Array) -> Array:
        """Whether `mixture` gives all rows of positive weight the routing `mask`."""
        others = jnp.sum(jnp.any(self.routing(mixture) != mask, axis=0) & (self.weight > 0))
        return (others if self.axis is None else jax.lax.psum(others, self.axis)) == 0

    def check_mixture(self, mixture: Any, name: str = "x0") -> Mixture:
        """`mixture`, refused unless it belongs to this problem.

        Raises:
            ArgumentError: not a `Mixture`, or another K or rule.
            ShapeError: another k or d.
        """
        if not isinstance(mixture, Mixture):
            raise ArgumentError(f"{name} must be a Mixture, got {type(mixture).__name__}; near, kmeans and dense_first make one")
        if mixture.gate_coef.shape != (self.experts, self.dim or mixture.dim):
            raise ShapeError(f"{name} must have {self.experts} experts of {self.dim} inputs, got gate_coef of shape {mixture.gate_coef.shape}")
        if (mixture.active, mixture.selection) != (self.active, self.selection):
            raise ArgumentError(f"{name} must keep active={self.active} experts by selection={self.selection!r}, "
                                f"got {mixture.active} and {mixture.selection!r}")
        if self.dim:
            checks.same_dtype(**{"x": self.x, name: mixture.variance})
        return mixture

    def start(self, key: Key) -> Mixture:
        """The best of several short fits from clusters of (x, y): see `best_start`."""
        from theorylab.moe.starts import best_start

        return best_start(self, key=key)

    def metrics(self, x: Mixture) -> dict[str, Array]:
        """`log_likelihood` of the data, with the routing of the mixture."""
        return {"log_likelihood": self.log_likelihood(x)}

    def default_method(self) -> Any:
        """`RoutingSearch` with eight starts where the gate leaves experts out; EM where it keeps all; the streamed EM for a stream."""
        from theorylab.moe.em import EM
        from theorylab.moe.routing import RoutingSearch
        from theorylab.moe.streamed import StreamedEM

        if self.per_pass is not None:
            return StreamedEM(self.per_pass)
        return RoutingSearch(starts=8) if self.active < self.experts and self.axis is None else EM()

    def goal(self, tolerance: float) -> Any:
        """Stop when the score, per row, is below `tolerance`, and the last gain in log-likelihood, per row, below its thousandth part."""
        from theorylab.core.stop import Below

        return Below("score_norm", tolerance) & Below("gain", tolerance / 1000)


def _data(problem: Likelihood) -> tuple[Array, ...]:
    return problem.x, problem.y, problem.weight, problem.center, problem.scale, problem.spread


def _parts(batch: Any) -> tuple[Any, Any, Any]:
    """x, y and weight of a batch."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], (tuple, list)):
        (x, y), weight = batch
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        x, y, weight = (*batch, None) if len(batch) == 2 else batch
    else:
        raise ArgumentError("a batch must be (x, y), (x, y, weight) or ((x, y), weight)")
    x, y = x.reshape(-1, 1) if x.ndim == 1 else x, y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    return x, y, jnp.ones(y.shape, y.dtype) if weight is None else weight.astype(y.dtype)


def _add_moments(total: Any, batch: Any) -> Any:
    x, y, weight = _parts(batch)
    count, mean, square, shift = total
    both = jnp.concatenate([x, y[:, None]], axis=1) - shift
    return count + jnp.sum(weight), mean + weight @ both, square + weight @ (both * both), shift


def _positive_root(variance: Array) -> Array:
    """Standard deviations, and 1 where there is none."""
    return jnp.sqrt(jnp.where(variance > 0, variance, jnp.ones_like(variance)))


@partial(jax.jit, static_argnames="axis")
def _describe(x: Array, y: Array, weight: Array, axis: str | None) -> tuple[Array, Array, Array, Array]:
    """Total weight, center and scale of x, variance of y."""
    add = (lambda a: a) if axis is None else (lambda a: jax.lax.psum(a, axis))
    total = add(jnp.sum(weight))
    both = jnp.concatenate([x, y[:, None]], axis=1)
    mean = add(jnp.sum(weight[:, None] * both, axis=0)) / total
    variance = add(jnp.sum(weight[:, None] * (both - mean) ** 2, axis=0)) / total
    return total, mean[:-1], _positive_root(variance[:-1]), variance[-1]

