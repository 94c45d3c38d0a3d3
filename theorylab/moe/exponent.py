r"""The exponent $\bar r(m)$: how slowly the parameters of m atoms that fit one expert converge, with witnesses, certificates and rates."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from theorylab import runtime
from theorylab.core import checks
from theorylab.core.keys import Key, as_key
from theorylab.core.show import html_table, text_table
from theorylab.errors import ArgumentError
from theorylab.moe.polynomials import eliminate

Array = jax.Array
SOLVED = 1e-24  # of the sum of squared residuals: round-off of a solution in float64 is below 1e-29, the smallest nonzero minimum known 7e-5


class Exponent(int):
    """An exponent: a whole number that says how it is known.

    Attributes:
        status: `"proved"`, `"literature"`, `"certified numerically"` or `"lower bound"`.
    """

    status: str

    def __new__(cls, value: int, status: str) -> Self:
        made = super().__new__(cls, value)
        made.status = status
        return made

    def __getnewargs__(self) -> tuple[int, str]:  # for copies and pickles
        return int(self), self.status

    @property
    def value(self) -> int:
        """The number alone."""
        return int(self)

    def __repr__(self) -> str:
        return f"Exponent({int(self)}, {self.status!r})"


class Witness(NamedTuple):
    r"""Atoms with $\sum_j w_j e^{b_j t + s_j t^2} = 1 + \rho\, t^{2m} + O(t^{2m+1})$.

    Attributes:
        weight: $w_j$, positive, summing to 1.
        shift: $b_j$, deviations of the intercepts.
        scale: $s_j$, deviations of the variances (halved).
        residual: $\rho = -m!/(2m)!$.
    """

    weight: np.ndarray
    shift: np.ndarray
    scale: np.ndarray
    residual: float


def exponent(m: int) -> Exponent:
    r"""$\bar r(m)$: the smallest order r at which the polynomial system of m atoms has no nontrivial real solution.

    It is 2m: by algebra for m = 2 (`exponent_certificate`), by the literature that both papers cite for m = 3, by numerical certificates for
    m = 4 and 5; for larger m, 2m is a lower bound (`nontrivial_solution`, companion derivation; the papers state 4, 6 and at least 7). A
    single atom has exponent 1.

    Args:
        m: number of fitted atoms in one cell.

    Raises:
        ArgumentError: `m` is not a positive whole number.

    Example:
        >>> exponent(2)
        Exponent(4, 'proved')
        >>> exponent(6) == 12, exponent(6).status
        (True, 'lower bound')
    """
    m = checks.whole("m", m, low=1)
    known = {1: "proved", 2: "proved", 3: "literature", 4: "certified numerically", 5: "certified numerically"}
    return Exponent(1 if m == 1 else 2 * m, known.get(m, "lower bound"))


def nontrivial_solution(m: int) -> Witness:
    r"""The Gauss-Hermite solution of the system up to order 2m - 1.

    With the nodes $z_j$ and weights $w_j$ of the m-point rule for the standard normal law, $b_j = z_j$ and $s_j = -1/2$: the moments agree up to
    order 2m - 1 and the first residual is exactly $-m!/(2m)!$, so $\bar r(m) \ge 2m$ (companion derivation).

    Args:
        m: number of atoms, at least 2.

    Raises:
        ArgumentError: `m` is not a whole number of at least 2.

    Example:
        >>> found = nontrivial_solution(2)
        >>> found.shift.round(12).tolist(), found.weight.round(12).tolist(), round(found.residual, 6)
        ([-1.0, 1.0], [0.5, 0.5], -0.083333)
    """
    m = checks.whole("m", m, low=2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(m)
    return Witness(weights / weights.sum(), nodes, np.full(m, -0.5), -math.factorial(m) / math.factorial(2 * m))


def series_residuals(weight: Any, shift: Any, scale: Any, order: int) -> Array:
    r"""Coefficients of $t, \dots, t^r$ in $\sum_j w_j \exp(b_j t + s_j t^2)$: the reduced system, whose solutions make all of them zero.

    Args:
        weight: $w$, shape (m,).
        shift: $b$, shape (m,).
        scale: $s$, shape (m,).
        order: r.

    Returns:
        Shape (r,).

    Raises:
        ArgumentError: `order` is not a positive whole number.
        ShapeError: arrays of different lengths.

    Example:
        >>> [round(float(c), 6) for c in series_residuals([0.5, 0.5], [-1.0, 1.0], [-0.5, -0.5], 4)]
        [0.0, 0.0, 0.0, -0.083333]
    """
    weight = checks.array("weight", weight, (None,))
    shift, scale = (checks.array(name, a, weight.shape) for name, a in (("shift", shift), ("scale", scale)))
    return _series(weight, shift, scale, checks.whole("order", order, low=1))


def _series(weight: Array, shift: Array, scale: Array, order: int) -> Array:
    before, now, sums = jnp.zeros_like(shift), jnp.ones_like(shift), []
    for power in range(1, order + 1):  # the coefficients of exp(b t + s t^2) obey power c = b c' + 2 s c''
        before, now = now, (shift * now + 2 * scale * before) / power
        sums.append(weight @ now)
    return jnp.stack(sums)


@dataclasses.dataclass(frozen=True, repr=False)
class Certificate:
    """What a search for solutions of the reduced system found.

    Attributes:
        m: number of atoms.
        order: order of the system.
        cost: smallest sum of squared residuals over all starts.
        solvable: whether that is round-off.
        starts: number of starts.
        agreeing: how many of them ended at the same cost, to a millionth (or at round-off as well).
        weight: weights of the best point.
        shift: its deviations of the intercepts.
        scale: its deviations of the variances.
        proof: for m = 2 and order 4 the polynomial in the ratio W of the weights that every solution would satisfy, by elimination; its
            coefficients are positive, so it has no root W > 0. None otherwise.
    """

    m: int
    order: int
    cost: float
    solvable: bool
    starts: int
    agreeing: int
    weight: np.ndarray
    shift: np.ndarray
    scale: np.ndarray
    proof: Any = None

    def __repr__(self) -> str:
        verdict = "has a solution" if self.solvable else "has no solution that was found"
        proof = f"; proved: {self.proof} = 0 has no root W > 0" if self.proof is not None else ""
        return (f"Certificate(m={self.m}, order {self.order} {verdict}: smallest cost {self.cost:.4g}, "
                f"reached from {self.agreeing} of {self.starts} starts{proof})")


def exponent_certificate(m: int, order: int, *, starts: int = 32, iterations: int = 300, key: Key | int = 0) -> Certificate:
    r"""Search for a nontrivial solution of the reduced system of m atoms at the given order.

    It minimises $\sum_{l \le r} l!\, c_l^2$ over the coefficients $c_l$ of `series_residuals`, with positive weights that sum to 1 and
    $\sum_j w_j b_j^2 = 1$, by Newton steps with Levenberg damping from random starts, all at once. An order below $\bar r(m)$ gives round-off,
    the order $\bar r(m)$ a positive minimum. For m = 2 at order 4 elimination (a Groebner basis) proves that there is no solution.
    (Companion derivation.)

    Args:
        m: number of atoms, at least 2.
        order: r, at least 2.
        starts: number of random starts.
        iterations: Newton steps from each.
        key: seed or random key of the starts.

    Raises:
        ArgumentError: an argument is not a whole number in its range.

    Example:
        >>> found = exponent_certificate(2, 4, starts=4)
        >>> found.solvable, round(found.cost, 5), found.proof
        (False, 0.12711, W**3 + 2*W**2 + 2*W + 1)
    """
    m, order = checks.whole("m", m, low=2), checks.whole("order", order, low=2)
    starts, iterations = checks.whole("starts", starts, low=1), checks.whole("iterations", iterations, low=1)
    if not runtime.x64():
        raise ArgumentError("exponent_certificate needs float64: its verdict is a cost at the level of round-off; switch JAX_ENABLE_X64 on")
    begin = jax.random.normal(as_key(key), (starts, 3, m), jnp.float64) * jnp.asarray([[0.5], [1.0], [0.5]])
    costs, points = jax.device_get(_search(begin, jnp.asarray(iterations), order=order))
    best = int(np.argmin(costs))
    same = np.abs(costs - costs[best]) <= 1e-6 * costs[best] + SOLVED
    weight, shift, scale = (np.asarray(a) for a in _atoms(points[best]))
    solvable = bool(costs[best] < SOLVED)
    proof = eliminate() if (m, order) == (2, 4) else None
    return Certificate(m, order, float(costs[best]), solvable, starts, int(same.sum()), weight, shift, scale, proof)


def _atoms(point: Array) -> tuple[Array, Array, Array]:
    weight = jax.nn.softmax(point[0])
    return weight, point[1] / jnp.sqrt(weight @ point[1] ** 2), point[2]


@partial(jax.jit, static_argnames="order")
def _search(begin: Array, iterations: Array, *, order: int) -> tuple[Array, Array]:
    size = begin[0].size
    factor = jnp.asarray([math.sqrt(math.factorial(power)) for power in range(1, order + 1)], begin.dtype)

    def cost(flat: Array) -> Array:
        return jnp.sum((factor * _series(*_atoms(flat.reshape(3, -1)), order)) ** 2)

    def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        flat, damping = carry
        move = jnp.linalg.solve(jax.hessian(cost)(flat) + damping * jnp.eye(size, dtype=flat.dtype), jax.grad(cost)(flat))
        better = cost(flat - move) < cost(flat)
        return jnp.where(better, flat - move, flat), jnp.clip(jnp.where(better, damping / 4, damping * 3), 1e-14, 1e8)

    def run(flat: Array) -> tuple[Array, Array]:
        flat, _ = jax.lax.fori_loop(0, iterations, step, (flat, jnp.ones((), flat.dtype)))
        return cost(flat), flat.reshape(3, -1)

    return jax.vmap(run)(begin.reshape(len(begin), -1))


@dataclasses.dataclass(frozen=True, repr=False)
class Rates:
    r"""Powers p of the rates $n^{-p}$, up to logarithms, of a cell of m fitted atoms.

    Attributes:
        m: fitted atoms in the cell.
        paper: power by name: `density`, `gate_weight` (summed over the cell), `gate_coef`, `expert_coef`, `expert_intercept`, `variance`.
        sharp: the same with the exponents of the companion derivation, in which gate and expert slopes enter quadratically.
        status: how the exponent is known.
    """

    m: int
    paper: dict[str, Fraction]
    sharp: dict[str, Fraction]
    status: str

    def _table(self) -> tuple[list[str], list[list[str]]]:
        return ["quantity", "paper", "sharp"], [[name, f"n^-{self.paper[name]}", f"n^-{self.sharp[name]}"] for name in self.paper]

    def __repr__(self) -> str:
        return f"Rates of a cell of {self.m} (exponent {self.status})\n{text_table(*self._table())}"

    def _repr_html_(self) -> str:
        return html_table(*self._table(), caption=f"Rates of a cell of {self.m} (exponent {self.status})")


def rates(m: int) -> Rates:
    r"""The table of rates: a cell of one atom is estimated at $n^{-1/2}$, a cell of $m \ge 2$ more slowly.

    Gate slopes and expert intercepts $\beta_1, b$ at $n^{-1/(2\bar r)}$ and $a, \sigma$ at $n^{-1/\bar r}$ (paper, from its loss D2); the
    sharper column has $\beta_1, a$ at $n^{-1/4}$ (companion derivation).

    Args:
        m: fitted atoms in the cell.

    Raises:
        ArgumentError: `m` is not a positive whole number.

    Example:
        >>> table = rates(2)
        >>> str(table.paper["expert_intercept"]), str(table.paper["gate_coef"]), str(table.sharp["gate_coef"])
        ('1/8', '1/8', '1/4')
    """
    found = exponent(m)
    half = Fraction(1, 2)
    slow, fast = (half, half) if m == 1 else (Fraction(1, 2 * found.value), Fraction(1, found.value))
    whole = {"density": half, "gate_weight": half}
    paper = {**whole, "gate_coef": slow, "expert_coef": fast, "expert_intercept": slow, "variance": fast}
    slopes = half if m == 1 else Fraction(1, 4)
    return Rates(int(m), paper, {**paper, "gate_coef": slopes, "expert_coef": slopes}, found.status)
