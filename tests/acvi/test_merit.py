from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from theorylab import acvi
from theorylab.errors import ArgumentError, NoClosedFormError, ShapeError

A = np.random.default_rng(0).standard_normal((5, 7))
GAME = acvi.MatrixGame(A)
RPS = np.array([[0.0, 1, -1], [-1, 0, 1], [1, -1, 0]])


def value_by_linear_program(A):
    """The value and a minimising strategy, by HiGHS."""
    n1, n2 = A.shape
    program = linprog(np.append(np.zeros(n1), 1.0), A_ub=np.c_[A.T, -np.ones(n2)], b_ub=np.zeros(n2), A_eq=np.append(np.ones(n1), 0.0)[None],
                      b_eq=[1.0], bounds=[(0, None)] * n1 + [(None, None)])
    return program.fun, program.x[:-1]


def test_the_value_interval_of_any_strategies_holds_the_value(rng):
    value, best = value_by_linear_program(A)
    worst, other = value_by_linear_program(-A.T)
    assert value == pytest.approx(-worst, abs=1e-9)
    for _ in range(5):
        low, high = acvi.certificate(GAME, rng.uniform(size=12)).value_interval
        assert low <= value <= high
    exact = acvi.certificate(GAME, np.append(best, other))
    assert 0 <= float(exact.bound) < 1e-8
    np.testing.assert_allclose(np.asarray(exact.value_interval), value, atol=1e-8)


def test_all_gaps_of_a_game_agree(rng):
    x = GAME.repair(jnp.asarray(rng.standard_normal(12)))
    gaps = [float(f(GAME, x)) for f in (acvi.gap, acvi.saddle_gap, acvi.minty_gap)]
    same = acvi.AffineVariationalInequality(GAME.matrix, None, acvi.Nonnegative(), acvi.BlockSimplex((5, 7)))
    gaps += [float(acvi.gap(same, x)), float(acvi.minty_gap(same, x))]
    np.testing.assert_allclose(gaps, gaps[0], atol=1e-12)


def test_the_minty_gap_is_the_maximum_of_a_concave_quadratic(rng):
    R = rng.standard_normal((3, 3))
    problem = acvi.AffineVariationalInequality(R @ R.T + R - R.T, rng.standard_normal(3), acvi.Box(-1.0, 1.0))
    x, M, q = rng.uniform(-1, 1, 3), np.asarray(problem.matrix), np.asarray(problem.offset)
    found = float(acvi.minty_gap(problem, x))
    best = max(-minimize(lambda z: -(M @ z + q) @ (x - z), start, bounds=[(-1, 1)] * 3, tol=1e-12).fun for start in rng.uniform(-1, 1, (4, 3)))
    assert found == pytest.approx(best, abs=1e-8)
    assert 0 <= found <= float(acvi.gap(problem, x))


def splitting(mu, penalty, steps, error=0.0):
    """The iteration of the companion's section 2.2 in plain NumPy, with perturbed x-steps: x, y, multiplier, change, x-residual."""
    rng, n = np.random.default_rng(1), 12
    M, C, d = np.asarray(GAME.matrix), np.zeros((2, n)), np.ones(2)
    C[0, :5], C[1, 5:] = 1, 1
    P = np.eye(n) - C.T @ np.linalg.solve(C @ C.T, C)
    dc = C.T @ np.linalg.solve(C @ C.T, d)
    y, multiplier = rng.uniform(size=n), rng.standard_normal(n)
    for _ in range(steps):
        u = y - multiplier / penalty
        x = np.linalg.solve(np.eye(n) + P @ M / penalty, P @ u + dc) + error * (P @ rng.standard_normal(n))
        residual = penalty * (x + P @ M @ x / penalty - P @ u - dc)
        v, old = x + multiplier / penalty, y
        y = (v + np.sqrt(v * v + 4 * mu / penalty)) / 2
        multiplier = penalty * (v - y)
        yield x, y, multiplier, penalty * (y - old), residual


BOUND = jax.jit(lambda x, y, multiplier, change, mu, e, sharp=False: acvi.certificate(GAME, x, y, multiplier, change, mu=mu, x_error=e,
                                                                                    sharp=sharp).bound, static_argnames="sharp")
GAP = jax.jit(lambda x: acvi.gap(GAME, x))


@pytest.mark.parametrize("mu", [1e-2, 0.0])
def test_the_certificate_bounds_the_gap_of_every_iterate(mu):
    for x, y, multiplier, change, _ in splitting(mu, 0.5, 150):
        bound, sharp = (float(BOUND(x, y, multiplier, change, mu, np.zeros(12), sharp=s)) for s in (False, True))
        assert float(GAP(x)) <= sharp + 1e-9 and sharp <= bound + 1e-9


def test_the_sharp_certificate_is_the_gap_on_convergence():
    *_, (x, y, multiplier, change, _) = splitting(1e-2, 0.5, 4000)
    assert float(BOUND(x, y, multiplier, change, 1e-2, np.zeros(12), sharp=True)) == pytest.approx(float(GAP(x)), abs=1e-9)
    np.testing.assert_allclose(x, np.asarray(acvi.central_path(GAME, [1e-2])[0]), atol=1e-8)


def test_the_inexact_certificate_holds_with_perturbed_steps_and_the_exact_one_does_not():
    broken = 0
    for x, y, multiplier, change, residual in splitting(1e-3, 0.5, 150, error=0.3):
        assert float(GAP(x)) <= float(BOUND(x, y, multiplier, change, 1e-3, residual)) + 1e-9
        broken += float(GAP(x)) > float(BOUND(x, y, multiplier, change, 1e-3, np.zeros(12))) + 1e-9
    assert broken, "the perturbation is large enough to matter"


def test_the_y_error_enters_the_certificate():
    x, y, multiplier, change, _ = next(iter(splitting(1e-2, 0.5, 1)))
    moved = y * 1.1                                  # not the prox any more: the multiplier is not the gradient of the barrier
    error = -1e-2 / moved - multiplier
    loose = acvi.certificate(GAME, x, moved, multiplier, change, mu=1e-2, y_error=error).bound
    plain = acvi.certificate(GAME, x, moved, multiplier, change, mu=1e-2).bound
    support = max(-error[:5]) + max(-error[5:])
    assert float(loose - plain) == pytest.approx(error @ moved + support, abs=1e-12)


CUBE_PATH = {10: (.8940570220288553, 1.087277073685843), 3: (.6339600660055722, 1.20275018800092), 1: (.2051000898891326, 1.197017515650712),
             .3: (-.06819538005399255, .7826002493042843), .1: (-.09742767833240265, .2904582970743786),
             .03: (-.0504515882154831, .07358238024942187), .01: (-.0194829611392872, .02214691765601772)}


def test_the_central_path_of_the_square_passes_through_the_quoted_points():
    path = acvi.central_path(acvi.games.constrained_bilinear(), list(CUBE_PATH)[::-1])
    np.testing.assert_allclose(np.asarray(path)[::-1], np.array(list(CUBE_PATH.values())), atol=1e-14)


def test_one_weight_gives_one_point():
    square = acvi.constrained_bilinear()
    assert np.array_equal(acvi.central_path(square, 1.0), acvi.central_path(square, [1.0])[0])


def test_the_central_path_gap_of_a_game_has_its_closed_form():
    mus = [1e-1, 1e-3, 1e-6]
    for mu, x in zip(mus, acvi.central_path(GAME, mus)):
        x1, x2 = GAME.split(x)
        assert float(acvi.gap(GAME, x)) == pytest.approx(mu * (12 - 1 / float(x1.max()) - 1 / float(x2.max())), rel=1e-9)


def test_the_log_path_of_a_degenerate_game_ends_at_the_analytic_centre_and_the_entropy_path_at_the_largest_entropy():
    game = acvi.MatrixGame(np.vstack([RPS, 0.75 * RPS[0] + 0.25 * RPS[1]]))
    for barrier, weight in (("log", 0.20062943539784), ("entropy", 0.20263726458926)):
        row = np.asarray(acvi.central_path(game, [1e-9], barrier=barrier)[0, :4])
        np.testing.assert_allclose(row, [1 / 3 - 0.75 * weight, 1 / 3 - 0.25 * weight, 1 / 3, weight], atol=1e-7)
    half = acvi.MatrixGame(np.vstack([RPS, (RPS[0] + RPS[1]) / 2]))
    np.testing.assert_allclose(np.asarray(acvi.central_path(half, [1e-10])[0, :4]), [2 / 9, 2 / 9, 1 / 3, 2 / 9], atol=1e-9)


def test_quantal_responses_are_softmax_replies_with_a_small_gap():
    for mu in (1.0, 1e-1, 1e-3):
        x = acvi.quantal_response(GAME, mu)
        x1, x2 = (np.asarray(part) for part in GAME.split(x))
        for found, logits in ((x1, -A @ x2 / mu), (x2, A.T @ x1 / mu)):
            weights = np.exp(logits - logits.max())
            np.testing.assert_allclose(found, weights / weights.sum(), atol=1e-13)
        assert float(acvi.gap(GAME, x)) <= mu * np.log(35)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["braess", "toy_gan", "cournot"])
def test_the_central_path_ends_at_known_solutions(name):
    problem = {"braess": acvi.games.braess, "toy_gan": acvi.games.toy_gan, "cournot": lambda: acvi.games.cournot(caps=40.0)}[name]()
    x = acvi.central_path(problem, [1e-9])[0]
    known = np.array([38.51768347, 40, 40, 40, 39.80156643]) if name == "cournot" else problem.solution
    np.testing.assert_allclose(np.asarray(x), np.asarray(known), atol=2e-8)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: acvi.gap(GAME, np.ones((12, 1))), ShapeError, "x must have shape"),
    (lambda: acvi.gap(GAME, np.ones(11)), ShapeError, "x must have shape"),
    (lambda: acvi.gap(A, np.ones(12)), ArgumentError, "problem must be"),
    (lambda: acvi.saddle_gap(acvi.games.braess(), np.ones(3)), NoClosedFormError, "use gap"),
    (lambda: acvi.minty_gap(acvi.games.toy_gan(), np.ones(2)), NoClosedFormError, "affine"),
    (lambda: acvi.certificate(GAME, np.ones(12), y=np.ones(12)), ArgumentError, "together"),
    (lambda: acvi.certificate(GAME, np.ones(12), sharp=True), ArgumentError, "belong to the form"),
    (lambda: acvi.certificate(GAME, np.ones(12), np.ones(12), np.ones(11), np.ones(12)), ShapeError, "multiplier must have shape"),
    (lambda: acvi.central_path(GAME, [1.0, -1.0]), ArgumentError, "mus must be above 0"),
    (lambda: acvi.central_path(GAME, np.ones((2, 2))), ShapeError, "mus must have shape"),
    (lambda: acvi.central_path(GAME, [1.0], barrier="cubic"), LookupError, "barrier"),
    (lambda: acvi.central_path(acvi.games.toy_gan(), [1.0], barrier="entropy"), ArgumentError, "Nonnegative"),
    (lambda: acvi.quantal_response(GAME, 0.0), ArgumentError, "mu must be a number above 0"),
    (lambda: acvi.quantal_response(acvi.games.toy_gan(), 1.0), ArgumentError, "over simplices"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
