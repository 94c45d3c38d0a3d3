r"""The top-K sparse softmax-gated Gaussian mixture of linear experts: gate, density, mean, quantiles, sampling.

Source: Nguyen, Akbarian, Yan and Ho, "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts" (ICLR 2024).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from theorylab.core import checks, tree
from theorylab.core.keys import Key, as_key, stream
from theorylab.core.module import Module, choice, size
from theorylab.errors import ArgumentError, UnknownNameError
from theorylab.moe import density

Array = jax.Array
SELECTIONS = ("slope", "logit")


class Draw(NamedTuple):
    """Inputs `x` of shape `(n, d)` and responses `y` of shape `(n,)`."""

    x: Array
    y: Array


class Mixture(Module):
    r"""Parameters of the model, and everything that follows from them.

    With logits $u_j(x) = \beta_{0j} + \beta_{1j}^\top x$, the K experts with the largest scores are kept, and

    $$ g(y \mid x) = \sum_{j \in S(x)} \pi_j(x)\, N(y;\, a_j^\top x + b_j, \sigma_j), \qquad \pi = \mathrm{softmax}(u \text{ on } S(x)). $$

    Equal scores go to the expert of lower index. K = k is the dense model; with K = 1 the gate is 1 on the selected expert, so that only the
    partition is identified. A batch of mixtures is the same class with leading axes on the arrays, made and used by `jax.vmap`.

    Args:
        gate_intercept: $\beta_0$, shape `(k,)`.
        gate_coef: $\beta_1$, shape `(k, d)`.
        expert_coef: a, shape `(k, d)`.
        expert_intercept: b, shape `(k,)`.
        variance: $\sigma$, shape `(k,)`: variances, so standard deviations (used in some of the public codes) must be squared.
        active: K, the number of experts that the gate keeps.
        selection: score that ranks the experts: `"slope"` $\beta_{1j}^\top x$ (the paper), or `"logit"` $u_j(x)$ (its script, and deep learning).

    Raises:
        ShapeError, PrecisionError, NonFiniteInputError: an array is wrong; the message names it.
        ArgumentError: a variance that is not positive, `active` outside 1..k, or another `selection`.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.Mixture([0.5, 0.0], [[-1.5], [0.0]], [[1.5], [-1.0]], [0.0, 1.5], [0.5, 0.3], active=2)
        >>> truth.mean(jnp.array([[0.0], [1.0]])).round(4).tolist()
        [0.5663, 0.7689]
    """

    gate_intercept: Any
    gate_coef: Any
    expert_coef: Any
    expert_intercept: Any
    variance: Any
    active: int = size()
    selection: str = choice(among=SELECTIONS)

    def __init__(self, gate_intercept: Any, gate_coef: Any, expert_coef: Any, expert_intercept: Any, variance: Any, active: int,
                 selection: str = "slope"):
        self.gate_coef = checks.array("gate_coef", gate_coef, (None, None))
        k, d = self.gate_coef.shape
        self.expert_coef = checks.array("expert_coef", expert_coef, (k, d))
        self.gate_intercept = checks.array("gate_intercept", gate_intercept, (k,))
        self.expert_intercept = checks.array("expert_intercept", expert_intercept, (k,))
        self.variance = checks.array("variance", variance, (k,))
        checks.same_dtype(gate_intercept=self.gate_intercept, gate_coef=self.gate_coef, expert_coef=self.expert_coef,
                          expert_intercept=self.expert_intercept, variance=self.variance)
        if checks.known(self.variance) and not np.all(np.asarray(self.variance) > 0):
            raise ArgumentError(f"variance must be positive for every expert, got {np.asarray(self.variance).tolist()}")
        self.active = checks.whole("active", active, low=1, high=k)
        self.selection = selection

    @classmethod
    def from_matrices(cls, gate: Any, experts: Any, variance: Any, active: int, selection: str = "slope") -> Self:
        """The mixture of the matrices `gate` = (beta0 | beta1) and `experts` = (b | a), both of shape `(k, d + 1)`."""
        return cls(gate[..., 0], gate[..., 1:], experts[..., 1:], experts[..., 0], variance, active, selection)

    @property
    def experts(self) -> int:
        """Number of experts k."""
        return self.variance.shape[-1]

    @property
    def dim(self) -> int:
        """Number of inputs d."""
        return self.gate_coef.shape[-1]

    @property
    def dtype(self) -> Any:
        """Precision of the parameters."""
        return self.variance.dtype

    @property
    def gate_matrix(self) -> Array:
        """(beta0 | beta1), shape `(k, d + 1)`."""
        return jnp.concatenate([self.gate_intercept[..., None], self.gate_coef], axis=-1)

    @property
    def expert_matrix(self) -> Array:
        """(b | a), shape `(k, d + 1)`."""
        return jnp.concatenate([self.expert_intercept[..., None], self.expert_coef], axis=-1)

    def inputs(self, x: Any) -> Array:
        """`x` checked, with shape `(n, d)`; for d = 1 a vector of length n will do."""
        x = checks.array("x", x, (None,))[:, None] if self.dim == 1 and np.ndim(x) == 1 else x
        x = checks.array("x", x, (None, self.dim))
        checks.same_dtype(**{"parameters of the mixture": self.variance, "x": x})
        return x

    def pairs(self, x: Any, y: Any) -> tuple[Array, Array]:
        """`x` and `y` checked, of shapes `(n, d)` and `(n,)`."""
        x = self.inputs(x)
        y = checks.array("y", y, (x.shape[0],))
        checks.same_dtype(x=x, y=y)
        return x, y

    def logits(self, x: Any) -> Array:
        """u, shape `(n, k)`."""
        return density.logits(self, self.inputs(x)).T

    def scores(self, x: Any) -> Array:
        """What ranks the experts, shape `(n, k)`."""
        return density.scores(self, self.inputs(x)).T

    def routing(self, x: Any) -> Array:
        """Which experts are kept, boolean of shape `(n, k)` with exactly K true per row.

        Example:
            >>> from theorylab import moe
            >>> moe.example("S1").routing([[-0.5], [0.5]]).tolist()
            [[True, True, False], [False, True, True]]
        """
        return density.routing(self, self.inputs(x)).T

    def log_gate(self, x: Any) -> Array:
        """Logarithms of the gate, shape `(n, k)`, -inf off the kept experts; gradients through those are 0."""
        return density.log_gate(self, self.inputs(x)).T

    def gate(self, x: Any) -> Array:
        """Gate probabilities, shape `(n, k)`."""
        return jnp.exp(self.log_gate(x))

    def log_density(self, x: Any, y: Any) -> Array:
        """The logarithm of g(y | x) per row, shape `(n,)`; the routing is held fixed by derivatives."""
        return density.log_density(self, *self.pairs(x, y))

    def density(self, x: Any, y: Any) -> Array:
        """g(y | x) per row, shape `(n,)`."""
        return jnp.exp(self.log_density(x, y))

    def responsibilities(self, x: Any, y: Any) -> Array:
        """Posterior probability of each expert given (x, y), shape `(n, k)`."""
        return density.responsibilities(self, *self.pairs(x, y)).T

    def mean(self, x: Any) -> Array:
        """E[y | x], shape `(n,)`."""
        return density.moments(self, self.inputs(x))[0]

    def variance_at(self, x: Any) -> Array:
        """Var[y | x], shape `(n,)`."""
        return density.moments(self, self.inputs(x))[1]

    def cdf(self, x: Any, y: Any) -> Array:
        """P(Y <= y | x) per row, shape `(n,)`."""
        return density.cdf(self, *self.pairs(x, y))

    def quantile(self, x: Any, q: Any) -> Array:
        """The quantile of order `q` of y given x, by Newton steps safeguarded by bisection; differentiable.

        Args:
            x: shape `(n, d)`.
            q: a number in (0, 1), for shape `(n,)`; or m of them, for shape `(n, m)`.

        Raises:
            ArgumentError: an order outside (0, 1).

        Example:
            >>> from theorylab import moe
            >>> truth = moe.example("S2")
            >>> float(truth.cdf([[0.3]], truth.quantile([[0.3]], 0.9))[0].round(12))
            0.9
        """
        x = self.inputs(x)
        if checks.known(q) and not np.all((np.asarray(q) > 0) & (np.asarray(q) < 1)):
            raise ArgumentError(f"q must lie strictly between 0 and 1, got {np.asarray(q).tolist()}")
        q = jnp.asarray(q, self.dtype)
        return density.quantile(self, x, q) if q.ndim == 0 else jax.vmap(lambda order: density.quantile(self, x, order), out_axes=1)(q)

    def sample(self, x: Any, *, key: Key | int, low: Any = 0.0, high: Any = 1.0) -> Draw:
        """Draw responses.

        Args:
            x: inputs of shape `(n, d)`; or a number n of inputs, drawn uniformly between `low` and `high` in each coordinate.
            key: seed or JAX key.
            low: lower end, a number or shape `(d,)`.
            high: upper end.

        Returns:
            `Draw(x, y)`. `sample_experts` has the index of the expert too.

        Example:
            >>> from theorylab import moe
            >>> x, y = moe.example("S1").sample(5, key=0, low=-1.0)
            >>> x.shape, y.shape
            ((5, 1), (5,))
        """
        if np.ndim(x) == 0:
            n = checks.whole("x", x, low=1)
            if checks.known(low, high) and not np.all(np.asarray(low) < np.asarray(high)):
                raise ArgumentError(f"low must be below high, got {np.asarray(low)} and {np.asarray(high)}")
            x = _uniform(self, stream(key, "inputs"), jnp.asarray(low, self.dtype), jnp.asarray(high, self.dtype), n)
        x = self.inputs(x)
        return Draw(x, self.sample_experts(x, key=key)[0])

    def sample_experts(self, x: Any, *, key: Key | int) -> tuple[Array, Array]:
        """Responses at `x` and the index of the expert that each came from, both of shape `(n,)`."""
        return _sampled(self, self.inputs(x), as_key(key))

    def canonical(self) -> Self:
        """The same density with the gate of the last expert 0: gates are defined up to one common translation."""
        return self.replace(gate_intercept=self.gate_intercept - self.gate_intercept[-1], gate_coef=self.gate_coef - self.gate_coef[-1])

    def permuted(self, order: Any) -> Self:
        """The mixture whose expert i is expert `order[i]` of this one."""
        order = jnp.asarray(order)
        return jax.tree.map(lambda leaf: leaf[order], self)

    def pack(self) -> Array:
        """The identified coordinates of the canonical form as one vector: beta0, beta1 (all but the last), a, b, sigma."""
        m = self.canonical()
        parts = (m.gate_intercept[:-1], m.gate_coef[:-1], m.expert_coef, m.expert_intercept, m.variance)
        return jnp.concatenate([part.ravel() for part in parts])

    def unpack(self, vector: Array) -> Self:
        """The mixture of such a vector, with the shapes of this one.

        Example:
            >>> from theorylab import moe
            >>> truth = moe.example("S1")
            >>> bool(jnp.all(truth.unpack(truth.pack()).gate_matrix == truth.gate_matrix))
            True
        """
        k, d = self.gate_coef.shape
        ends = np.cumsum([k - 1, (k - 1) * d, k * d, k])
        intercept, coef, a, b, variance = jnp.split(vector, ends)
        last = jnp.zeros((1, d), vector.dtype)
        return type(self)(jnp.concatenate([intercept, last[0, :1]]), jnp.concatenate([coef.reshape(k - 1, d), last]), a.reshape(k, d), b, variance,
                          self.active, self.selection)

    def region_ids(self, x: Any) -> Array:
        """A number for the set of kept experts of each row: the sum of 2^j over its members, shape `(n,)`.

        Raises:
            ArgumentError: more experts than bits.
        """
        if self.experts > 30:
            raise ArgumentError(f"region_ids codes sets as integers of 31 bits, for at most 30 experts, got {self.experts}; compare rows of routing")
        bits = jnp.asarray(2 ** np.arange(self.experts), jnp.int32)
        return self.routing(x).astype(jnp.int32) @ bits

    def region_masses(self, law: Any = (0.0, 1.0), **options: Any) -> Any:
        """Probabilities of the sets of experts: see `moe.region_masses`."""
        from theorylab.moe.regions import region_masses

        return region_masses(self, law, **options)

    def plot(self, **options: Any) -> Any:
        """Mean, predictive band and experts for d = 1, regions for d = 2: see `moe.plot`."""
        from theorylab.moe.regions import plot

        return plot(self, **options)

    def __repr__(self) -> str:
        head = f"Mixture(experts={self.experts}, active={self.active}, dim={self.dim}, selection={self.selection!r}"
        if tree.is_traced(self) or self.variance.ndim != 1 or self.experts * self.dim > 64:
            return f"{head}, {jnp.dtype(self.dtype).name}{list(self.variance.shape[:-1]) if self.variance.ndim > 1 else ''})"
        with np.printoptions(precision=5, suppress=True):
            rows = [f"  {j}: gate {np.asarray(w)}, expert {np.asarray(t)}, variance {float(s):.5g}"
                    for j, (w, t, s) in enumerate(zip(self.gate_matrix, self.expert_matrix, self.variance, strict=True))]
        return "\n".join([head + ")", *rows])


# ---------------------------------------------------------------------------------------------------------------- reference settings

_SETTINGS: dict[str, tuple[Any, ...]] = {
    "S0": ([-8.0, 0.0], [[25.0], [0.0]], [[-20.0], [20.0]], [15.0, -5.0], [0.3, 0.4], 1, "logit"),
    "S1": ([0.4, -0.2, 0.0], [[-4.0], [-1.5], [0.0]], [[2.0], [-1.5], [1.0]], [-1.0, 0.5, 2.0], [0.10, 0.20, 0.15], 2, "slope"),
    "S2": ([0.5, 0.0], [[-1.5], [0.0]], [[1.5], [-1.0]], [0.0, 1.5], [0.5, 0.3], 2, "slope"),
    "S3": ([0.2, -0.1, 0.1, 0.0], [[3.0, 0.0], [0.0, 3.0], [-3.0, -1.0], [0.0, 0.0]],
           [[1.0, 1.0], [-1.0, 2.0], [2.0, -1.0], [0.0, 0.0]], [0.0, 3.0, -3.0, 6.0], [0.1, 0.1, 0.1, 0.1], 2, "slope"),
}

# Two of them by what they are; the two lines ranked by slopes, as in the paper's text, so that on [0, 1] the first serves every input.
_SETTINGS |= {"two-experts": (*_SETTINGS["S0"][:-1], "slope"), "dense": _SETTINGS["S2"]}


def example(name: str, *, active: int | None = None, selection: str | None = None) -> Mixture:
    """A reference setting: `"S0"` (the two lines of both papers), `"S1"` (identifiable, K = 2 of 3), `"S2"` or `"dense"`, `"S3"` (d = 2).

    `"two-experts"` is S0 with the selection of the paper's text, by slopes, which uses one of its lines only for inputs on [0, 1].
    Inputs are uniform on [0, 1] for S0 and S2, on [-1, 1] in each coordinate for S1 and S3. S1 to S3 are companion settings.

    Args:
        name: of the setting.
        active: another K.
        selection: another rule.

    Raises:
        UnknownNameError: no such setting.

    Example:
        >>> example("S1").experts, example("S1", selection="logit").selection
        (3, 'logit')
    """
    if name not in _SETTINGS:
        raise UnknownNameError.of("example", name, _SETTINGS)
    gate, slopes, lines, levels, variance, kept, rule = _SETTINGS[name]
    return Mixture(gate, slopes, lines, levels, variance, kept if active is None else active, rule if selection is None else selection)


def weyl_sample(mixture: Mixture, n: int, low: float = 0.0, high: float = 1.0) -> Draw:
    """Deterministic data for d = 1 that every library can reproduce: equidistant inputs, Weyl sequences for experts and noise.

    Raises:
        ArgumentError: d is not 1, or n is below 1.

    Example:
        >>> weyl_sample(example("S1"), 400, -1.0, 1.0).y[:3].round(8).tolist()
        [-3.15268338, -2.52514976, -2.93918629]
    """
    if mixture.dim != 1:
        raise ArgumentError(f"weyl_sample makes data of one input, got a mixture of {mixture.dim}; use mixture.sample")
    return Draw(*_weyl(mixture, low, high, checks.whole("n", n, low=1)))


@partial(jax.jit, static_argnames="n")
def _weyl(mixture: Mixture, low: Any, high: Any, n: int) -> tuple[Array, Array]:
    at = jnp.arange(n, dtype=mixture.dtype) + 0.5
    x = (low + (high - low) * at / n)[:, None]
    return x, density.respond(mixture, x, (at * 0.7548776662466927) % 1.0, ndtri((at * 0.6180339887498949) % 1.0))[0]


@partial(jax.jit, static_argnames="n")
def _uniform(mixture: Mixture, key: Array, low: Array, high: Array, n: int) -> Array:
    return low + (high - low) * jax.random.uniform(key, (n, mixture.dim), mixture.dtype)


@jax.jit
def _sampled(mixture: Mixture, x: Array, key: Array) -> tuple[Array, Array]:
    u = jax.random.uniform(stream(key, "experts"), x.shape[:1], x.dtype)
    return density.respond(mixture, x, u, jax.random.normal(stream(key, "noise"), x.shape[:1], x.dtype))
