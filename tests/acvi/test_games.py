from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from theorylab import acvi
from theorylab.acvi import games
from theorylab.errors import ArgumentError, ShapeError

METRICS = jax.jit(lambda problem, x: problem.metrics(x))
WITH_SOLUTIONS = {
    "bilinear_simplex": lambda: games.bilinear_simplex(dim=6), "conditioned_bilinear": lambda: games.conditioned_bilinear(dim=6),
    "constrained_bilinear": games.constrained_bilinear, "bilinear_quadrant": games.bilinear_quadrant, "ratio_game": games.ratio_game,
    "forsaken": games.forsaken, "toy_gan": games.toy_gan, "cournot": games.cournot, "rotations": lambda: games.rotations(pairs=3),
    **{f"braess {d}": (lambda d=d: games.braess(demand=float(d))) for d in (2, 6, 10, 20)}, "no bridge": lambda: games.braess(bridge=False),
}


@pytest.mark.parametrize("name", WITH_SOLUTIONS)
def test_the_attached_solution_solves_the_problem(name):
    problem = WITH_SOLUTIONS[name]()
    row = METRICS(problem, problem.solution)
    assert float(row["residual"]) < 1e-12 and float(row["infeasibility"]) < 1e-14 and float(row["error"]) == 0
    assert float(row.get("gap", 0.0)) < 1e-12


def test_the_operators_are_the_gradients_of_the_games(rng):
    z = rng.uniform(0.2, 0.9, 2)
    u, v = z
    D, top = 0.4 * v + 0.1 * u + 0.4, -1.2 * u * v + 0.9 * v - 0.3
    np.testing.assert_allclose(np.asarray(games.ratio_game().operator(jnp.asarray(z))),
                               [-1.2 * v / D - 0.1 * top / D**2, -((0.9 - 1.2 * u) / D - 0.4 * top / D**2)], atol=1e-14)
    np.testing.assert_allclose(np.asarray(games.forsaken().operator(jnp.asarray(z))),
                               [u**5 - 2 * u**3 + 0.5 * u + v - 0.45, -(u - v**5 + 2 * v**3 - 0.5 * v)], atol=1e-14)
    m1, m2 = 3.9051305035400294, 3.855502076390913
    np.testing.assert_allclose(np.asarray(games.toy_gan().operator(jnp.asarray(z))), [-2 * u * v * m2, -(m1 - u**2 * m2)], atol=1e-14)
    eta = 0.3
    hbg = games.bilinear_simplex(dim=1 + 1, curvature=eta)
    x = rng.uniform(size=4)
    np.testing.assert_allclose(np.asarray(hbg.operator(jnp.asarray(x))),
                               np.r_[eta * x[:2] + (1 - eta) * x[2:], eta * x[2:] - (1 - eta) * x[:2]], atol=1e-15)


def test_quoted_properties_of_the_planar_games():
    ratio, forsaken = games.ratio_game(), games.forsaken()
    jacobian = np.asarray(jax.jacfwd(ratio.operator)(ratio.solution))
    np.testing.assert_allclose(jacobian + jacobian.T, 0, atol=1e-12)
    assert abs(jacobian[0, 1]) == pytest.approx(2.32834, abs=5e-6)
    jacobian = np.asarray(jax.jacfwd(forsaken.operator)(forsaken.solution))
    np.testing.assert_allclose(np.linalg.eigvalsh((jacobian + jacobian.T) / 2), [-0.374, 0.464], atol=5e-4)
    np.testing.assert_allclose(np.linalg.eigvals(jacobian)[0], 0.0447 + 0.908j, atol=5e-4)
    assert games.toy_gan().solution.tolist() == pytest.approx([1.0064154732985, 0.0], abs=1e-13)


def test_the_point_marked_in_the_appendix_is_no_solution_on_the_half_plane():
    half_plane = acvi.Product([(acvi.Box(0.08), 1), (acvi.Free(), 1)])
    problem = games.forsaken(constraints=half_plane)
    assert problem.solution is None
    assert float(METRICS(problem, jnp.array([0.08, 0.4]))["residual"]) > 4e-3
    assert float(METRICS(problem, jnp.array([0.08, 1.32237050569908]))["residual"]) < 1e-12


def test_the_cournot_operator_is_marginal_cost_minus_marginal_revenue(rng):
    q, c, b = rng.uniform(20, 60, 5), np.array(games.COURNOT_COSTS), np.array(games.COURNOT_EXPONENTS)
    price = lambda total: 5000 ** (1 / 1.1) * total ** (-1 / 1.1)
    h = 1e-4
    for i, found in enumerate(np.asarray(games.cournot().operator(jnp.asarray(q)))):
        revenue = lambda z, i=i: (q[i] + z) * price(q.sum() + z)
        assert found == pytest.approx(c[i] + (q[i] / 5) ** (1 / b[i]) - (revenue(h) - revenue(-h)) / (2 * h), abs=1e-6)


def test_capacities_and_constants_change_the_market():
    capped = games.cournot(caps=40.0)
    assert capped.solution is None and float(capped.constraints.slack(capped.start(None))) > 0
    known = jnp.array([38.51768347, 40, 40, 40, 39.80156643])
    assert float(METRICS(capped, known)["residual"]) < 1e-7
    assert games.cournot(demand=4000.0).solution is None


def test_braess_costs_are_the_quoted_ones():
    for demand, flows, costs in ((6, (2, 2, 2), (92, 92, 92)), (2, (0, 0, 2), (70, 70, 52)), (10, (5, 5, 0), (105, 105, 110)),
                                 (20, (10, 10, 0), (160, 160, 210))):
        problem = games.braess(demand=float(demand))
        np.testing.assert_allclose(np.asarray(problem.solution), flows, atol=1e-13)
        np.testing.assert_allclose(np.asarray(problem.operator(problem.solution)), costs, atol=1e-12)
    assert games.braess(slopes=(10.0, 2.0, 1.0, 10.0, 1.0)).solution is None


def test_the_value_of_the_ball_game_is_that_of_its_cone_program():
    problem = games.ball_bilinear()
    n1 = 6
    B, c, e = np.asarray(problem.matrix)[:n1, n1:], np.asarray(problem.offset)[:n1], np.asarray(problem.offset)[n1:]
    program = minimize(lambda x: c @ x + 2 * np.linalg.norm(B.T @ x - e), np.zeros(n1), method="SLSQP", options={"ftol": 1e-14},
                       constraints={"type": "ineq", "fun": lambda x: 1 - x @ x})
    x1 = program.x
    x2 = 2 * (B.T @ x1 - e) / np.linalg.norm(B.T @ x1 - e)
    assert float(METRICS(problem, jnp.asarray(np.r_[x1, x2]))["gap"]) < 1e-5
    assert c @ x1 + x2 @ (B.T @ x1 - e) == pytest.approx(program.fun, abs=1e-10)


def test_the_sparse_game_is_the_game_of_its_matrix(rng):
    problem = games.sparse_game(rows=30, columns=20, per_row=4, key=3)
    dense = np.zeros((30, 20))
    np.add.at(dense, (np.asarray(problem.A.rows), np.asarray(problem.A.columns)), np.asarray(problem.A.values))
    assert (np.count_nonzero(dense, axis=1) <= 4).all() and len(problem.A.values) == 120
    x = jnp.asarray(rng.uniform(size=50))
    np.testing.assert_allclose(np.asarray(problem.operator(x)), np.asarray(acvi.MatrixGame(dense).operator(x)), atol=1e-13)
    assert type(problem.default_method()).__name__ == "PrimalDualHybridGradient"


def test_starts_are_strategies_and_keys_repeat():
    for make in (games.bilinear_simplex, games.conditioned_bilinear):
        start = make(dim=5, key=1).start(None)
        assert float(make(dim=5, key=1).infeasibility(start)) < 1e-15 and float(start.min()) > 0
        assert np.array_equal(start, make(dim=5, key=1).start(None)) and not np.array_equal(start, make(dim=5, key=2).start(None))
    assert np.array_equal(games.matrix_game(rows=3, key=5).A, games.matrix_game(rows=3, key=5).A)
    assert games.matrix_game(np.eye(2)).A.tolist() == [[1, 0], [0, 1]]


def test_rotations_turn_at_speeds_in_geometric_progression():
    problem = games.rotations()
    M = np.asarray(problem.matrix)
    np.testing.assert_allclose(np.diag(M, 1)[::2], np.geomspace(1e-4, 1, 40), rtol=1e-12)
    assert np.array_equal(M, -M.T) and problem.dim == 80
    assert problem.start(None)[:4].tolist() == [0.5, 0, 0.5, 0]


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: games.matrix_game(rows=0), ArgumentError, "rows"),
    (lambda: games.sparse_game(rows=1), ArgumentError, "rows"),
    (lambda: games.bilinear_simplex(dim=1), ArgumentError, "dim"),
    (lambda: games.bilinear_simplex(dim=3, curvature=1.5), ArgumentError, "curvature"),
    (lambda: games.conditioned_bilinear(condition=0.5), ArgumentError, "condition"),
    (lambda: games.constrained_bilinear(lower=0.5), ArgumentError, "lower"),
    (lambda: games.bilinear_quadrant(coupling=0.0), ArgumentError, "coupling"),
    (lambda: games.ratio_game(np.ones(5)), ShapeError, "coefficients"),
    (lambda: games.toy_gan(radius=-1.0), ArgumentError, "radius"),
    (lambda: games.cournot(costs=(1.0, 2.0)), ShapeError, "exponents must have length 2"),
    (lambda: games.cournot(elasticity=0.5), ArgumentError, "elasticity"),
    (lambda: games.cournot(scale=0.0), ArgumentError, "scale"),
    (lambda: games.braess(demand=0.0), ArgumentError, "demand"),
    (lambda: games.braess(slopes=(1.0, -1, 1, 1, 1)), ArgumentError, "slopes"),
    (lambda: games.ball_bilinear(np.ones((2, 3)), c=np.ones(3)), ShapeError, "c must have shape"),
    (lambda: games.ball_bilinear(radii=(1.0, 2.0, 3.0)), ShapeError, "radii"),
    (lambda: games.rotations(pairs=0), ArgumentError, "pairs"),
    (lambda: games.rotations(fastest=1e-5), ArgumentError, "fastest"),
    (lambda: games.bilinear_simplex(dim=3, x0=np.ones(5)), ShapeError, "x0"),
])
def test_bad_constants_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
