r"""The polynomial system that defines the exponent, in exact arithmetic."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any, NamedTuple

from theorylab.core import checks


class PolynomialSystem(NamedTuple):
    """The equations of the exponent, as SymPy expressions that must vanish.

    Attributes:
        equations: from the multi-index $(l_1, l_2)$, with $l_1$ spread out, to the expression.
        p1: deviations of the gate slopes, m lists of `dim` symbols.
        p2: deviations of the expert slopes, likewise.
        p3: deviations of the intercepts, m symbols.
        p4: deviations of the variances.
        p5: square roots of the weights.
    """

    equations: dict[tuple[int, ...], Any]
    p1: list[list[Any]]
    p2: list[list[Any]]
    p3: list[Any]
    p4: list[Any]
    p5: list[Any]


def polynomial_system(m: int, order: int, dim: int = 1) -> PolynomialSystem:
    r"""The system whose solvability defines $\bar r(m)$ (paper).

    For every $(l_1, l_2)$ with $1 \le |l_1| + l_2 \le r$,
    $\sum_j \sum_\alpha p_{5j}^2 p_{1j}^{\alpha_1} p_{2j}^{\alpha_2} p_{3j}^{\alpha_3} p_{4j}^{\alpha_4} / \alpha! = 0$ over
    $\alpha_1 + \alpha_2 = l_1$ and $|\alpha_2| + \alpha_3 + 2\alpha_4 = l_2$. A solution is nontrivial if all $p_{5j}$ and some $p_{3j}$ are not 0.

    Args:
        m: number of atoms.
        order: r.
        dim: dimension of x; 0 gives the reduced system $p_1 = p_2 = 0$, which decides solvability in every dimension (companion derivation).

    Raises:
        ArgumentError: an argument is not a whole number in its range.

    Example:
        >>> system = polynomial_system(1, 2, dim=0)
        >>> sorted(system.equations), system.equations[2,]
        ([(1,), (2,)], p3_0**2*p5_0**2/2 + p4_0*p5_0**2)
    """
    import sympy

    m, order, dim = checks.whole("m", m, low=1), checks.whole("order", order, low=1), checks.whole("dim", dim, low=0)
    p1, p2 = ([[sympy.Symbol(f"{name}_{j}_{u}", real=True) for u in range(dim)] for j in range(m)] for name in ("p1", "p2"))
    p3, p4, p5 = ([sympy.Symbol(f"{name}_{j}", real=True) for j in range(m)] for name in ("p3", "p4", "p5"))

    def term(j: int, l1: tuple[int, ...], l2: int) -> Any:
        total = sympy.Integer(0)
        for alpha2 in itertools.product(*(range(power + 1) for power in l1)):
            rest = l2 - sum(alpha2)
            gate = sympy.prod([p1[j][u] ** (l1[u] - a) * p2[j][u] ** a / math.factorial(l1[u] - a) / math.factorial(a) for u, a in enumerate(alpha2)])
            for alpha4 in range(rest // 2 + 1):
                alpha3 = rest - 2 * alpha4
                total += gate * p3[j] ** alpha3 * p4[j] ** alpha4 / math.factorial(alpha3) / math.factorial(alpha4)
        return p5[j] ** 2 * total

    indices = [index for index in itertools.product(range(order + 1), repeat=dim + 1) if 1 <= sum(index) <= order]
    equations = {index: sympy.expand(sum(term(j, index[:-1], index[-1]) for j in range(m))) for index in indices}
    return PolynomialSystem(equations, p1, p2, p3, p4, p5)


@cache
def eliminate() -> Any:
    """The polynomial in the ratio W of two weights that the system of order 4 implies, with b = (1, -1/W) by the first equation and scale."""
    import sympy

    W, inverse, *scale = sympy.symbols("W V s_0 s_1")
    t = sympy.Symbol("t")
    shift, weight = (sympy.Integer(1), -inverse), (sympy.Integer(1), W)
    system = [W * inverse - 1]
    for power in (2, 3, 4):
        each = [sympy.series(sympy.exp(b * t + s * t**2), t, 0, 5).removeO().coeff(t, power) for b, s in zip(shift, scale, strict=True)]
        system.append(sympy.expand(sum(w * c for w, c in zip(weight, each, strict=True))))
    basis = sympy.groebner(system, *scale, inverse, W, order="lex")
    alone = [p for p in basis.exprs if p.free_symbols == {W}]
    if len(alone) != 1 or min(sympy.Poly(alone[0], W).all_coeffs()) < 0:
        raise AssertionError(f"elimination gave {basis.exprs}, which proves nothing")
    return sympy.expand(alone[0] / sympy.Poly(alone[0], W).LC())
