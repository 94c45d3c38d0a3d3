from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import theorylab as tl
from theorylab import acvi
from theorylab.errors import ArgumentError, InfeasibleStartError, NoClosedFormError, NonFiniteInputError, ShapeError

N = 4
RPS = np.array([[0.0, 1, -1], [-1, 0, 1], [1, -1, 0]])
GAME = acvi.MatrixGame(np.random.default_rng(0).standard_normal((3, 5)))
METRICS = jax.jit(lambda problem, x: problem.metrics(x))


def test_a_game_equals_the_affine_problem_that_it_stands_for(rng):
    same = acvi.AffineVariationalInequality(GAME.matrix, GAME.offset, acvi.Nonnegative(), acvi.BlockSimplex((3, 5)))
    x = jnp.asarray(rng.standard_normal(8))
    np.testing.assert_allclose(np.asarray(GAME.operator(x)), np.asarray(same.operator(x)), atol=1e-14)
    one, two = METRICS(GAME, x), METRICS(same, x)
    assert set(one) == {"gap", "residual", "infeasibility"} == set(two)
    assert all(float(one[k]) == pytest.approx(float(two[k]), abs=1e-13) for k in one)


@given(st.lists(st.floats(-3, 3), min_size=8, max_size=8))
@settings(max_examples=30, deadline=None)
def test_the_gap_is_that_of_the_best_replies_to_a_feasible_repaired_point(entries):
    row = METRICS(GAME, jnp.asarray(entries))
    x = GAME.repair(jnp.asarray(entries))
    A, (x1, x2) = np.asarray(GAME.A), (np.asarray(part) for part in GAME.split(x))
    assert abs(x1.sum() - 1) < 1e-12 and abs(x2.sum() - 1) < 1e-12 and x1.min() >= 0 and x2.min() >= 0
    assert float(row["gap"]) == pytest.approx(float(np.max(A.T @ x1) - np.min(A @ x2)), abs=1e-12)
    assert float(row["gap"]) >= 0
    low, high = GAME.value_interval(x)
    assert low <= high + 1e-12


def test_the_squared_residual_of_a_feasible_point_is_at_most_its_gap(rng):
    row = jax.jit(jax.vmap(lambda x: GAME.metrics(GAME.repair(x))))(jnp.asarray(rng.standard_normal((9, 8))))
    assert np.all(row["residual"] ** 2 <= row["gap"] * (1 + 1e-12))
    assert np.all(row["infeasibility"] < 1e-14)


def test_the_goal_is_the_gap_exactly_where_it_is_a_certificate():
    certified = {"game": GAME, "box": acvi.games.constrained_bilinear(), "ball": acvi.games.toy_gan(), "flow": acvi.games.braess()}
    open_ = {"orthant": acvi.games.bilinear_quadrant(), "firms": acvi.games.cournot(),
             "polytope": acvi.AffineVariationalInequality(np.eye(2), None, acvi.Polyhedron(np.eye(2), np.ones(2))),
             "matrix": acvi.AffineVariationalInequality(np.eye(3), None, acvi.Nonnegative(), (np.ones((1, 3)), np.ones(1)))}
    for name, problems in (("gap", certified), ("residual", open_)):
        for problem in problems.values():
            goal = problem.goal(1e-3)
            rules = jax.tree.leaves(goal, is_leaf=lambda rule: isinstance(rule, tl.Below))
            assert [rule.name for rule in rules] == (["gap", "infeasibility"] if name == "gap" else ["residual"])
            assert ("gap" in jax.eval_shape(problem.metrics, jnp.zeros(problem.dim))) == (name == "gap")


def test_an_infeasible_point_with_negative_gap_is_not_taken_for_a_solution():
    game, x = GAME.replace(A=GAME.A + 10.0), jnp.asarray(np.repeat([0.0, 0.2], [3, 5]))  # the row player plays nothing
    assert float(acvi.gap(game, x)) < -5
    assert float(METRICS(game, x)["gap"]) > 0.1 and float(METRICS(game, x)["infeasibility"]) == 1


def test_solve_ends_with_a_certified_gap():
    problem = acvi.MatrixGame(RPS)
    sol = tl.solve(problem, tolerance=1e-5, x0=problem.project(jnp.linspace(0.9, 0.1, problem.dim)), keep="last")
    assert sol.status == tl.Status.CONVERGED
    x = problem.repair(sol.value)
    assert float(problem.infeasibility(x)) < 1e-12
    assert 0 <= float(acvi.gap(problem, x)) < 1e-5


def test_the_default_method_depends_on_the_class():
    assert type(GAME.default_method()).__name__ == "InteriorPoint"
    large, single = np.zeros((2, 2047)), np.zeros((3, 5), np.float32)
    assert {type(acvi.MatrixGame(A).default_method()).__name__ for A in (large, single)} == {"PrimalDualHybridGradient"}
    assert type(acvi.games.constrained_bilinear().default_method()).__name__ == "HalpernACVI"
    assert type(acvi.games.toy_gan().default_method()).__name__ == "HalpernACVI"


def test_the_start_is_inside_and_satisfies_the_equality(rng):
    for problem in (GAME, acvi.games.braess(demand=7.0), acvi.games.ball_bilinear(), acvi.games.cournot(caps=40.0)):
        x = problem.start(None)
        assert float(problem.constraints.slack(x)) > 0 and float(problem.equality.residual(x)) < 1e-13
    assert np.array_equal(acvi.games.constrained_bilinear(x0=(1.0, 0.5)).start(None), [1.0, 0.5])


def test_the_error_is_relative_to_a_known_solution():
    problem = acvi.AffineVariationalInequality(np.eye(2), np.array([-3.0, -4.0]), solution=np.array([3.0, 4.0]))
    assert float(METRICS(problem, jnp.array([3.0, 9.0]))["error"]) == 1.0
    assert float(METRICS(acvi.games.bilinear_quadrant(), jnp.array([3.0, 4.0]))["error"]) == 5.0


@pytest.mark.slow
def test_a_lifted_polyhedron_has_the_same_solution():
    A, b = np.array([[1.0, 1], [-1, 2]]), np.array([1.0, 1.5])
    flat = acvi.AffineVariationalInequality(np.array([[1.0, 1], [-1, 1]]), np.array([-3.0, -2]), acvi.Polyhedron(A, b))
    lifted = flat.lifted()
    assert lifted.dim == 4 and lifted.constraints.barrier_terms() == 2
    z = jax.lax.fori_loop(0, 400, lambda _, z: flat.project(z - 0.2 * flat.operator(z)), jnp.array([0.5, 0.5]))
    whole = jnp.concatenate([z, jnp.asarray(b) - A @ z])
    assert float(METRICS(flat, z)["residual"]) < 1e-9
    assert float(METRICS(lifted, whole)["residual"]) < 1e-8
    general = acvi.VariationalInequality(_linear, 2, jnp.array([[1.0, 1], [-1, 1]]), acvi.Polyhedron(A, b), solution=z, x0=np.zeros(2)).lifted()
    np.testing.assert_allclose(np.asarray(general.operator(whole)[:2]), np.asarray(flat.matrix @ z))
    assert np.array_equal(general.operator(whole)[2:], np.zeros(2)) and np.array_equal(general.start(None), [0, 0, 1, 1.5])
    assert hash(general.function) == hash(general.replace().function), "the same lifted problem twice compiles once"


def _linear(x, a):
    return a @ x


def test_a_lifted_problem_keeps_its_equations():
    flat = acvi.AffineVariationalInequality(np.eye(3), None, acvi.Polyhedron(np.eye(3), np.ones(3)), (np.ones((1, 3)), np.ones(1)))
    assert flat.lifted().equality.rows == 4
    assert float(flat.lifted().equality.residual(jnp.concatenate([jnp.array([0.5, 0.25, 0.25]), jnp.array([0.5, 0.75, 0.75])]))) < 1e-14


def test_replace_checks_again_and_keeps_the_rest():
    other = GAME.replace(A=2 * GAME.A)
    assert np.array_equal(other.A, 2 * GAME.A)
    problem = acvi.VariationalInequality(_linear, 2, jnp.eye(2), acvi.Nonnegative())
    assert np.array_equal(problem.replace(args=2 * jnp.eye(2)).operator(jnp.ones(2)), [2, 2])
    with pytest.raises(ShapeError, match="operator must return"):
        problem.replace(dim=2, args=jnp.ones((3, 2)))


def test_functions_of_x_alone_stand_for_functions_of_x_and_args():
    turn = lambda x: jnp.stack([x[1], -x[0]])
    one, two = (acvi.VariationalInequality(function, 2, constraints=acvi.Box(-1.0, 1.0)) for function in (turn, lambda x, a: turn(x)))
    assert np.array_equal(one.operator(jnp.array([1.0, 2.0])), two.operator(jnp.array([1.0, 2.0])))
    again = acvi.VariationalInequality(turn, 2, constraints=acvi.Box(-1.0, 1.0))
    assert hash(one.function) == hash(again.function) and one.replace(x0=np.ones(2)).function == one.function, "compiles once"
    disc = acvi.Smooth(lambda x: x @ x - 1.0, inside=jnp.zeros(2))
    assert float(disc.barrier(jnp.array([0.6, 0.0]))) == pytest.approx(-np.log(0.64))


def test_a_matrix_that_is_not_monotone_is_warned_about():
    with pytest.warns(UserWarning, match=r"not monotone, no guarantee: the smallest eigenvalue .* is -1"):
        acvi.AffineVariationalInequality(np.diag([1.0, -1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # along the equality x1 - x2 = 0 the form is positive: monotone where it counts
        acvi.AffineVariationalInequality(np.array([[-1.0, 2], [2, -1]]), None, None, (np.array([[1.0, -1.0]]), np.zeros(1)))
        acvi.AffineVariationalInequality(np.array([[0.0, 1e9], [-1e9, 0]]))


def test_a_batch_of_games_is_the_games_of_the_batch(rng):
    payments = jnp.asarray(rng.standard_normal((4, 3, 5)))
    x = jnp.asarray(rng.uniform(size=(4, 8)))
    together = jax.jit(jax.vmap(lambda A, x: acvi.MatrixGame(A).metrics(x)["gap"]))(payments, x)
    apart = [float(METRICS(acvi.MatrixGame(A), z)["gap"]) for A, z in zip(payments, x)]
    np.testing.assert_allclose(np.asarray(together), apart, atol=1e-13)


def test_single_precision_stays_single():
    game = acvi.MatrixGame(np.asarray(GAME.A, np.float32))
    assert game.start(None).dtype == jnp.float32
    assert all(value.dtype == jnp.float32 for value in METRICS(game, game.start(None)).values())


def test_a_point_on_the_boundary_is_refused_by_methods_that_need_the_interior():
    assert GAME.check_interior(np.full(8, 0.1)).shape == (8,)
    with pytest.raises(InfeasibleStartError, match="strictly inside the constraints, its smallest slack is 0"):
        GAME.check_interior(np.zeros(8))


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: acvi.VariationalInequality(lambda x, a: x[:, None], 3), ShapeError, r"operator must return shape \(3,\), got \(3, 1\)"),
    (lambda: acvi.VariationalInequality(lambda x, a: x[:-1], 3), ShapeError, "operator must return shape"),
    (lambda: acvi.VariationalInequality(lambda x, a: jnp.log(x - 5), 3, constraints=acvi.Nonnegative()), NonFiniteInputError, "finite at the start"),
    (lambda: acvi.VariationalInequality(_linear, 2, np.full((2, 2), np.nan)), NonFiniteInputError, "args"),
    (lambda: acvi.VariationalInequality(3.0, 2), ArgumentError, "operator must be a function"),
    (lambda: acvi.VariationalInequality(lambda x, a: x, 0), ArgumentError, "dim"),
    (lambda: acvi.VariationalInequality(lambda x, a: x, 3, constraints=acvi.Box(np.zeros(2), np.ones(2))), ShapeError, "dimension 2"),
    (lambda: acvi.VariationalInequality(lambda x, a: x, 3, constraints="box"), ArgumentError, "constraints must be a constraint set"),
    (lambda: acvi.VariationalInequality(lambda x, a: x, 3, x0=np.ones((3, 1))), ShapeError, "x0 must have shape"),
    (lambda: acvi.VariationalInequality(lambda x, a: x, 3, solution=np.ones(2)), ShapeError, "solution must have shape"),
    (lambda: acvi.AffineVariationalInequality(np.ones((2, 3))), ShapeError, "M must be a square matrix"),
    (lambda: acvi.AffineVariationalInequality(np.eye(2), np.ones(3)), ShapeError, "q must have shape"),
    (lambda: acvi.AffineVariationalInequality(np.eye(2), np.ones((2, 1))), ShapeError, "q must have shape"),
    (lambda: acvi.AffineVariationalInequality(np.full((2, 2), np.inf)), NonFiniteInputError, "M must be finite"),
    (lambda: acvi.MatrixGame(np.ones(3)), ShapeError, "A must have shape"),
    (lambda: acvi.MatrixGame(np.ones((1, 1))), ShapeError, "more than one entry"),
    (lambda: acvi.MatrixGame(np.array([[np.nan, 1.0]])), NonFiniteInputError, "A must be finite"),
    (lambda: acvi.AffineVariationalInequality(np.eye(2), None, acvi.Nonnegative()).lifted(), ArgumentError, "needs Polyhedron"),
    (lambda: acvi.games.toy_gan().matrix, NoClosedFormError, "not affine"),
])
def test_bad_problems_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
