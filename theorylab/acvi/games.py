"""The test problems of the two papers and their companions, each with its constants, its start and its known solution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.acvi.constraints import Ball, Box, ConstraintSet, Nonnegative
from theorylab.acvi.equality import BlockSimplex
from theorylab.acvi.problem import AffineVariationalInequality, MatrixGame, VariationalInequality
from theorylab.acvi.sets_general import Product
from theorylab.acvi.sparse import SparseMatrix
from theorylab.core import checks
from theorylab.core.keys import Key, as_key, stream
from theorylab.errors import ArgumentError, ShapeError

Array = jax.Array


def matrix_game(A: Any = None, *, rows: int = 10, columns: int | None = None, key: Key | int = 0) -> MatrixGame:
    """A zero-sum game; without a matrix its payments are standard normal.

    Args:
        A: payments of the row player, who minimises, shape `(n1, n2)`.
        rows: number of actions of the row player, if no matrix is given.
        columns: of the column player; as many as rows if None.
        key: seed or key of the payments.

    Example:
        >>> matrix_game(rows=3, columns=5).A.shape
        (3, 5)
    """
    if A is not None:
        return MatrixGame(A)
    shape = (checks.whole("rows", rows, low=1), checks.whole("columns", rows if columns is None else columns, low=1))
    return MatrixGame(jax.random.normal(stream(key, "matrix_game"), shape))


def sparse_game(rows: int = 20_000, columns: int | None = None, per_row: int = 10, *, key: Key | int = 0) -> MatrixGame:
    """A matrix game with a few standard normal payments in each row and 0 elsewhere, as a sparse matrix.

    Args:
        rows: number of actions of the row player.
        columns: of the column player; as many as rows if None.
        per_row: nonzero payments per row, at columns drawn with replacement (payments at one place add up).
        key: seed or key.

    Example:
        >>> sparse_game(rows=100, per_row=3).dim
        200
    """
    columns = rows if columns is None else columns
    shape = (checks.whole("rows", rows, low=2), checks.whole("per_row", per_row, low=1))
    values = jax.random.normal(stream(key, "values"), shape)
    places = jax.random.randint(stream(key, "columns"), shape, 0, checks.whole("columns", columns, low=2))
    whose = jnp.repeat(jnp.arange(rows, dtype=places.dtype), per_row)
    return MatrixGame(SparseMatrix(values.reshape(-1), whose, places.reshape(-1), (rows, columns)))


def _random_strategies(dim: int, key: Key | int) -> Array:
    """Two strategies, uniform random numbers divided by their sum."""
    halves = jax.random.uniform(stream(key, "start"), (2, dim))
    return (halves / jnp.sum(halves, axis=1, keepdims=True)).reshape(-1)


def bilinear_simplex(dim: int = 500, curvature: float = 0.05, *, key: Key | int = 0, x0: Any = None) -> AffineVariationalInequality:
    r"""The high-dimensional bilinear game $\tfrac\eta2|x_1|^2 + (1-\eta)x_1^\top x_2 - \tfrac\eta2|x_2|^2$ on two simplices (HBG).

    $\eta$ (`curvature`) weighs attraction against rotation. The solution is uniform, in the interior: a single step of ACVI with a small penalty
    solves it, so compare solvers on `matrix_game` instead. Source: the HBG experiments of Yang, Jordan and Chavdarova (2023) and Chavdarova,
    Yang, Pagliardini and Jordan (2024).

    Args:
        dim: actions of each player.
        curvature: $\eta$, in [0, 1].
        key: seed or key of the start, uniform random numbers divided by their sum in each half.
        x0: another start.

    Example:
        >>> game = bilinear_simplex(dim=4)
        >>> game.metrics(game.solution)["gap"].item() < 1e-15
        True
    """
    n = checks.whole("dim", dim, low=2)
    checks.real("curvature", curvature, low=0.0, high=1.0)
    eye = jnp.eye(n)
    M = jnp.block([[curvature * eye, (1 - curvature) * eye], [-(1 - curvature) * eye, curvature * eye]])
    return AffineVariationalInequality(M, None, Nonnegative(), BlockSimplex((n, n)), structure="blocks", solution=jnp.full(2 * n, 1.0 / n),
                                       x0=_random_strategies(n, key) if x0 is None else x0)


def conditioned_bilinear(dim: int = 500, condition: float = 10.0, *, key: Key | int = 0, x0: Any = None) -> AffineVariationalInequality:
    r"""The game $x_1^\top D x_2$ with $D = \mathrm{diag}(1, \dots, \kappa)$ on two simplices (v-HBG); solution proportional to $1/D$.

    Source: the conditioning experiment of Chavdarova, Yang, Pagliardini and Jordan (2024).

    Args:
        dim: actions of each player.
        condition: $\kappa$, at least 1.
        key: seed or key of the start.
        x0: another start.

    Example:
        >>> conditioned_bilinear(dim=2, condition=3.0).solution.tolist()
        [0.75, 0.25, 0.75, 0.25]
    """
    n = checks.whole("dim", dim, low=2)
    checks.real("condition", condition, low=1.0)
    diagonal = jnp.linspace(1.0, condition, n)
    M = jnp.zeros((2 * n, 2 * n)).at[:n, n:].set(jnp.diag(diagonal)).at[n:, :n].set(-jnp.diag(diagonal))
    strategy = (1 / diagonal) / jnp.sum(1 / diagonal)
    return AffineVariationalInequality(M, None, Nonnegative(), BlockSimplex((n, n)), solution=jnp.concatenate([strategy, strategy]),
                                       x0=_random_strategies(n, key) if x0 is None else x0)


def constrained_bilinear(lower: float = -0.4, upper: float = 2.4, *, x0: Any = (2.0, 2.0)) -> AffineVariationalInequality:
    r"""The game $x_1 x_2$ on a square (cBG); solution 0. Its central path spirals in from the centre of the square.

    Source: the central-path figure of Chavdarova, Yang, Pagliardini and Jordan (2024).

    Args:
        lower: below 0, so that the solution is inside.
        upper: above 0.
        x0: start.

    Example:
        >>> constrained_bilinear().operator(jnp.array([1.0, 2.0])).tolist()
        [2.0, -1.0]
    """
    checks.real("lower", lower, below=0.0)
    checks.real("upper", upper, above=0.0)
    return AffineVariationalInequality(jnp.array([[0.0, 1.0], [-1.0, 0.0]]), None, Box(lower, upper), solution=jnp.zeros(2), x0=x0)


def bilinear_quadrant(damping: float = 0.1, coupling: float = 1.0, *, x0: Any = (1.0, 1.0)) -> AffineVariationalInequality:
    """The damped rotation F(z) = A z, A = [[damping, coupling], [-coupling, damping]], on the quadrant z >= 0 (BG); solution 0, at a corner.

    Source: the two-dimensional trajectories of Yang, Jordan and Chavdarova (2023).

    Args:
        damping: at least 0.
        coupling: speed of the rotation, above 0.
        x0: start.

    Example:
        >>> bilinear_quadrant().solution.tolist()
        [0.0, 0.0]
    """
    checks.real("damping", damping, low=0.0)
    checks.real("coupling", coupling, above=0.0)
    return AffineVariationalInequality(jnp.array([[damping, coupling], [-coupling, damping]]), None, Nonnegative(), solution=jnp.zeros(2), x0=x0)


RATIO = (-1.2, 0.9, -0.3, 0.1, 0.4, 0.4)
RATIO_SOLUTION = (0.951941016011038, 0.0504852540027595)


def _ratio_value(z: Array, a: Array) -> Array:
    u, v = z
    return (a[0] * u * v + a[1] * v + a[2]) / (a[3] * u + a[4] * v + a[5])


def _ratio(z: Array, a: Array) -> Array:
    return jax.grad(_ratio_value)(z, a) * jnp.array([1.0, -1.0], z.dtype)


def ratio_game(coefficients: Sequence[float] = RATIO, lower: float = 0.0, upper: float = 1.0, *,
               x0: Any = (0.5, 0.5)) -> VariationalInequality:
    r"""The ratio game $V(u, v) = (a_1 uv + a_2 v + a_3)/(a_4 u + a_5 v + a_6)$ on a square; u minimises, v maximises.

    At the interior solution of the default coefficients the Jacobian is a pure rotation, so gradient methods cycle. Source: the
    two-dimensional trajectories of Yang, Jordan and Chavdarova (2023).

    Args:
        coefficients: $a_1, \dots, a_6$; the denominator must be positive on the square.
        lower: of both players.
        upper: of both players.
        x0: start.

    Example:
        >>> game = ratio_game()
        >>> float(jnp.linalg.norm(game.operator(game.solution))) < 1e-14
        True
    """
    a = checks.array("coefficients", coefficients, (6,))
    known = tuple(np.asarray(a).tolist()) == RATIO and lower <= RATIO_SOLUTION[1] and upper >= RATIO_SOLUTION[0]
    return VariationalInequality(_ratio, 2, a, Box(lower, upper), solution=RATIO_SOLUTION if known else None, x0=x0)


FORSAKEN_SHIFT = 0.45
FORSAKEN_SOLUTION = (0.0780266687384601, 0.411933851365820)


def _forsaken(z: Array, shift: Array) -> Array:
    slope = z / 2 - 2 * z**3 + z**5
    return jnp.stack([slope[0] + z[1] - shift, -(z[0] - slope[1])])


def forsaken(shift: float = FORSAKEN_SHIFT, radius: float = 2.0, constraints: ConstraintSet | None = None, *,
             x0: Any = (0.5, 0.5)) -> VariationalInequality:
    r"""The forsaken game $u(v - s) + \psi(u) - \psi(v)$, $\psi(z) = z^2/4 - z^4/2 + z^6/6$, on a disc. Not monotone: no theorem applies.

    The one interior critical point is the solution on the disc. Source: the two-dimensional trajectories of Yang, Jordan and Chavdarova (2023);
    their appendix has it on half-planes, where the point (0.08, 0.4) that they mark is no solution.

    Args:
        shift: s.
        radius: of the disc around 0.
        constraints: another set instead of the disc; then no solution is attached.
        x0: start.

    Example:
        >>> game = forsaken()
        >>> float(jnp.linalg.norm(game.operator(game.solution))) < 1e-14
        True
    """
    checks.real("shift", shift)
    known = constraints is None and shift == FORSAKEN_SHIFT and radius >= 0.5
    return VariationalInequality(_forsaken, 2, jnp.asarray(shift, float), Ball(0.0, radius) if constraints is None else constraints,
                                 solution=FORSAKEN_SOLUTION if known else None, x0=x0)


def _toy_gan(z: Array, moments: Array) -> Array:
    return jnp.stack([-2 * z[0] * z[1] * moments[1], -(moments[0] - z[0] ** 2 * moments[1])])


def toy_gan(data_moment: float = 3.9051305035400294, noise_moment: float = 3.855502076390913, radius: float = 2.0, *,
            x0: Any = (1.0, 1.0)) -> VariationalInequality:
    r"""A generator $\theta z$ against a discriminator $\phi x^2$: F = $(-2\theta\phi m_2, \theta^2 m_2 - m_1)$ on a disc.

    The solution is $(\sqrt{m_1/m_2}, 0)$. Source: the two-dimensional trajectories of Yang, Jordan and Chavdarova (2023); the default
    moments are those of the samples there.

    Args:
        data_moment: $m_1$, mean square of the data, above 0.
        noise_moment: $m_2$, mean square of the noise, above 0.
        radius: of the disc around 0.
        x0: start.

    Example:
        >>> toy_gan(4.0, 1.0, radius=3.0).solution.tolist()
        [2.0, 0.0]
    """
    checks.real("data_moment", data_moment, above=0.0)
    checks.real("noise_moment", noise_moment, above=0.0)
    root = (data_moment / noise_moment) ** 0.5
    return VariationalInequality(_toy_gan, 2, jnp.array([data_moment, noise_moment]), Ball(0.0, radius),
                                 solution=(root, 0.0) if root < radius else None, x0=x0)


COURNOT_COSTS, COURNOT_EXPONENTS = (10.0, 8.0, 6.0, 4.0, 2.0), (1.2, 1.1, 1.0, 0.9, 0.8)
COURNOT_SOLUTION = (36.93251081573577, 41.81814166043763, 43.70657852227421, 42.65923974330512, 39.17895251662502)


def _cournot(q: Array, args: dict[str, Array]) -> Array:
    total = jnp.sum(q)
    price = (args["demand"] / total) ** (1 / args["elasticity"])
    slope = -price / (args["elasticity"] * total)
    return args["costs"] + (q / args["scale"]) ** (1 / args["exponents"]) - price - q * slope


def cournot(costs: Sequence[float] = COURNOT_COSTS, exponents: Sequence[float] = COURNOT_EXPONENTS, scale: Any = 5.0, caps: Any = None,
            demand: float = 5000.0, elasticity: float = 1.1, *, x0: Any = None) -> VariationalInequality:
    r"""The Nash-Cournot market: firm i sells $q_i$ at the price $p(Q) = (d/Q)^{1/e}$, its marginal cost is $c_i + (q_i/L_i)^{1/b_i}$.

    Args:
        costs: $c_i$, one per firm.
        exponents: $b_i$, above 0.
        scale: $L_i$, a number or one per firm, above 0.
        caps: capacities, a number or one per firm; None for no limit.
        demand: d, above 0.
        elasticity: e, at least 1.
        x0: start; 20 for each firm, or half the capacity if that is less, if None.

    Raises:
        ShapeError: costs and exponents of different length.

    Example:
        >>> market = cournot()
        >>> float(market.metrics(market.solution)["residual"]) < 1e-10
        True
    """
    c, b = checks.array("costs", costs, (None,)), checks.array("exponents", exponents, (None,))
    firms = c.shape[0]
    if b.shape != c.shape:
        raise ShapeError(f"exponents must have length {firms} like costs, got {b.shape[0]}")
    for name, value in (("demand", demand), ("exponents", np.min(np.asarray(b))), ("scale", np.min(np.asarray(scale)))):
        checks.real(name, value, above=0.0)
    checks.real("elasticity", elasticity, low=1.0)
    args = {"costs": c, "exponents": b, "scale": jnp.broadcast_to(checks.array("scale", scale), (firms,)), "demand": jnp.asarray(demand, float),
            "elasticity": jnp.asarray(elasticity, float)}
    given = (tuple(np.asarray(c).tolist()), tuple(np.asarray(b).tolist()), set(np.asarray(args["scale"]).tolist()), demand, elasticity)
    known = given == (COURNOT_COSTS, COURNOT_EXPONENTS, {5.0}, 5000.0, 1.1) and caps is None
    limits = None if caps is None else jnp.broadcast_to(checks.array("caps", caps), (firms,))
    if x0 is None:
        x0 = jnp.full(firms, 20.0) if limits is None else jnp.minimum(20.0, limits / 2)
    return VariationalInequality(_cournot, firms, args, Nonnegative() if limits is None else Box(0.0, limits),
                                 solution=COURNOT_SOLUTION if known else None, x0=x0)


BRAESS_LINKS = np.array([[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 1, 1]])


def braess(demand: float = 6.0, slopes: Sequence[float] = (10.0, 1.0, 1.0, 10.0, 1.0),
           constants: Sequence[float] = (0.0, 50.0, 50.0, 0.0, 10.0), *, bridge: bool = True) -> AffineVariationalInequality:
    """Traffic on Braess's network: flows on the paths (a, c), (b, d), (a, e, d), whose links cost `slope * flow + constant`.

    At the Wardrop equilibrium all used paths cost the same and no unused path costs less. Without the bridge e everyone travels faster.

    Args:
        demand: total flow, above 0.
        slopes: of the links a to e, at least 0.
        constants: of the links a to e.
        bridge: whether the link e and its path exist.

    Example:
        >>> with_bridge, without = braess(), braess(bridge=False)
        >>> with_bridge.operator(with_bridge.solution).tolist(), without.operator(without.solution).tolist()
        ([92.0, 92.0, 92.0], [83.0, 83.0])
    """
    checks.real("demand", demand, above=0.0)
    slope, constant = checks.array("slopes", slopes, (5,)), checks.array("constants", constants, (5,))
    if float(jnp.min(slope)) < 0:
        raise ArgumentError(f"slopes must be at least 0, got {float(jnp.min(slope)):g}")
    links = jnp.asarray(BRAESS_LINKS[: 3 if bridge else 2], float)
    solution = None
    if np.asarray(slope).tolist() == [10.0, 1.0, 1.0, 10.0, 1.0] and np.asarray(constant).tolist() == [0.0, 50.0, 50.0, 0.0, 10.0]:
        outer = min(max((11 * demand - 40) / 13, 0.0), demand / 2) if bridge else demand / 2
        solution = [outer, outer, demand - 2 * outer][: 3 if bridge else 2]
    return AffineVariationalInequality((links * slope) @ links.T, links @ constant, Nonnegative(), BlockSimplex((len(links),), demand),
                                       solution=solution)


def ball_bilinear(B: Any = None, c: Any = None, e: Any = None, radii: tuple[float, float] = (1.0, 2.0), *, rows: int = 6, columns: int = 4,
                  key: Key | int = 0) -> AffineVariationalInequality:
    r"""The game $x_1^\top B x_2 + c^\top x_1 - e^\top x_2$ on two balls.

    Its value is the minimum of $c^\top x_1 + r_2|B^\top x_1 - e|$ over $|x_1| \le r_1$.

    Args:
        B: shape `(n1, n2)`; standard normal if None, as are c and e.
        c: shape `(n1,)`.
        e: shape `(n2,)`.
        radii: of the two balls around 0.
        rows: n1, if no matrix is given.
        columns: n2, if no matrix is given.
        key: seed or key of what is not given.

    Example:
        >>> ball_bilinear().dim
        10
    """
    if len(radii) != 2:
        raise ShapeError(f"radii must be two numbers, got {len(radii)}")
    key = as_key(key)
    B = jax.random.normal(stream(key, "B"), (rows, columns)) if B is None else checks.array("B", B, (None, None))
    n1, n2 = B.shape
    c = jax.random.normal(stream(key, "c"), (n1,), B.dtype) if c is None else checks.array("c", c, (n1,))
    e = jax.random.normal(stream(key, "e"), (n2,), B.dtype) if e is None else checks.array("e", e, (n2,))
    M = jnp.block([[jnp.zeros((n1, n1), B.dtype), B], [-B.T, jnp.zeros((n2, n2), B.dtype)]])
    return AffineVariationalInequality(M, jnp.concatenate([c, e]), Product([(Ball(0.0, radii[0]), n1), (Ball(0.0, radii[1]), n2)]))


def rotations(pairs: int = 40, slowest: float = 1e-4, fastest: float = 1.0, *, start: float = 0.5) -> AffineVariationalInequality:
    r"""Independent planar rotations with speeds in geometric progression, on the box $[-1, 1]^{2\,\mathrm{pairs}}$; solution 0.

    On it the rate $1/\sqrt K$ of ACVI's last iterate is attained (companion derivation).

    Args:
        pairs: number of rotations.
        slowest: lowest speed, above 0.
        fastest: highest speed.
        start: first coordinate of each pair at the start; the second is 0.

    Example:
        >>> rotations(pairs=2).operator(jnp.ones(4)).tolist()
        [0.0001, -0.0001, 1.0, -1.0]
    """
    n = checks.whole("pairs", pairs, low=1)
    checks.real("slowest", slowest, above=0.0)
    checks.real("fastest", fastest, low=float(slowest))
    speeds = jnp.geomspace(slowest, fastest, n)
    M = jnp.kron(jnp.diag(speeds), jnp.array([[0.0, 1.0], [-1.0, 0.0]]))
    return AffineVariationalInequality(M, None, Box(-1.0, 1.0), solution=jnp.zeros(2 * n), x0=jnp.tile(jnp.array([start, 0.0]), n))
