"""The differentiable layer: derivatives of central-path points against closed forms and central differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from theorylab import acvi
from theorylab.acvi.implicit import smoothed_equilibrium
from theorylab.errors import ArgumentError, NoClosedFormError

A = np.random.default_rng(0).standard_normal((3, 4))
WEIGHTS = np.random.default_rng(1).standard_normal(7)
H = 1e-5


def point(A, mu):
    return smoothed_equilibrium(acvi.MatrixGame(A), mu)


JACOBIAN = jax.jacrev(point, argnums=(0, 1))


def central(function, at, h=H):
    """Central differences of a scalar or vector function of one array, last axes that of the array."""
    flat = np.eye(np.size(at)).reshape(-1, *np.shape(at)) * h
    rows = [(np.asarray(function(at + e)) - np.asarray(function(at - e))) / (2 * h) for e in flat]
    return np.moveaxis(np.array(rows), 0, -1).reshape(*np.shape(rows[0]), *np.shape(at))


def wall(q, mu):
    """x - q - mu / x = 0, coordinate by coordinate."""
    return smoothed_equilibrium(acvi.AffineVariationalInequality(jnp.eye(2), -q, acvi.Nonnegative()), mu)


@pytest.mark.slow
def test_one_wall_has_the_derivatives_of_its_quadratic_equation():
    q, mu = jnp.array([1.0, -2.0]), 0.3
    x = (q + np.sqrt(q**2 + 4 * mu)) / 2
    np.testing.assert_allclose(wall(q, mu), x, rtol=1e-13)
    np.testing.assert_allclose(jax.jacobian(wall)(q, mu), np.diag(x**2 / (x**2 + mu)), atol=1e-13)
    np.testing.assert_allclose(jax.jacfwd(wall, 1)(q, mu), x / (x**2 + mu), rtol=1e-12)
    root = np.sqrt(q**2 + 4 * mu)
    np.testing.assert_allclose(jax.jacfwd(jax.jacrev(wall, 1), 1)(q, mu), -2 / root**3, rtol=1e-11)


def test_the_derivative_of_a_game_is_that_of_central_differences():
    mu = 0.3
    slope, speed = JACOBIAN(A, mu)
    np.testing.assert_allclose(slope, central(lambda A: point(A, mu), A), rtol=0, atol=3e-10)
    np.testing.assert_allclose(speed, central(lambda mu: point(A, mu), mu, 3e-6), rtol=0, atol=3e-10)


def test_the_value_with_its_barriers_has_the_derivative_of_the_envelope():
    mu = 0.02
    x, slope = np.asarray(point(A, mu)), np.asarray(JACOBIAN(A, mu)[0])
    x1, x2 = x[:3], x[3:]
    total = np.outer(x1, x2) + np.einsum("i,ijk->jk", np.concatenate([A @ x2 - mu / x1, A.T @ x1 + mu / x2]), slope)
    np.testing.assert_allclose(total, np.outer(x1, x2), atol=4e-12)


@pytest.mark.slow
def test_forward_mode_batches_and_the_problem_as_argument_agree():
    slope = JACOBIAN(A, 0.1)[0]
    np.testing.assert_allclose(jax.jacfwd(point)(A, 0.1), slope, atol=1e-13)
    batch = jax.jit(jax.vmap(jax.grad(lambda A: WEIGHTS @ point(A, 0.1))))(jnp.stack([A, 2 * A]))
    np.testing.assert_allclose(batch[0], np.einsum("i,ijk->jk", WEIGHTS, slope), atol=1e-13)
    in_game = jax.grad(lambda game: WEIGHTS @ smoothed_equilibrium(game, 0.1))(acvi.MatrixGame(A))
    np.testing.assert_allclose(in_game.A, batch[0], atol=1e-13)


def test_a_pullback_contains_no_iteration():
    _, pull = jax.vjp(point, A, 0.1)
    text = str(jax.make_jaxpr(pull)(WEIGHTS))
    assert text.count("custom_linear_solve[") == 1 and " while[" not in text and " lu[" not in text


M = np.random.default_rng(2).standard_normal((4, 4))
M = M - M.T + 0.1 * np.eye(4)
C = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])


def cut(C, d, q):
    """Equations with equal singular values, whose singular vectors have no derivative."""
    return smoothed_equilibrium(acvi.AffineVariationalInequality(M, q, acvi.Nonnegative(), (C, d)), 0.05)


@pytest.mark.slow
def test_equations_are_differentiated_in_both_sides():
    d, q = jnp.ones(2), jnp.zeros(4)
    for i, at in enumerate((jnp.asarray(C), d)):
        slope = jax.jacrev(cut, i)(C, d, q)
        found = central(lambda a, i=i: cut(*((a, d) if i == 0 else (C, a)), q), at)
        np.testing.assert_allclose(slope, found, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_redundant_equations_change_no_derivative():
    with pytest.warns(UserWarning, match="redundant"):
        doubled = acvi.DenseEquality(np.vstack([C, C[0] + C[1]]), np.array([1.0, 1.0, 2.0]))
    solve = lambda q: smoothed_equilibrium(acvi.AffineVariationalInequality(M, q, acvi.Nonnegative(), doubled), 0.05)
    np.testing.assert_allclose(jax.jacrev(solve)(jnp.zeros(4)), jax.jacrev(cut, 2)(C, jnp.ones(2), jnp.zeros(4)), atol=1e-12)


def walls(at):
    lower, upper, radius = at
    sets = acvi.Product([(acvi.Box(lower, upper), 2), (acvi.Ball(0.0, radius), 2)])
    return smoothed_equilibrium(acvi.AffineVariationalInequality(M, jnp.array([1.0, 1.0, 1.0, -1.0]), sets), 0.1)


@pytest.mark.slow
def test_walls_and_radii_are_differentiated():
    at = jnp.array([-1.0, 1.0, 1.5])
    np.testing.assert_allclose(jax.jacrev(walls)(at), central(walls, at), rtol=0, atol=1e-9)


def test_the_quantal_response_is_differentiated():
    entropic = lambda A: smoothed_equilibrium(acvi.MatrixGame(A), 0.3, barrier="entropy")
    x, slope = entropic(A), np.asarray(jax.jacrev(entropic)(A))
    x1, x2 = x[:3], x[3:]
    np.testing.assert_allclose(x1, jax.nn.softmax(-A @ x2 / 0.3), atol=1e-12)
    # the same derivative from x1 = softmax(-A x2 / mu), x2 = softmax(A' x1 / mu)
    S1, S2 = (np.diag(s) - np.outer(s, s) for s in (np.asarray(x1), np.asarray(x2)))
    system = np.block([[np.eye(3), S1 @ A / 0.3], [-S2 @ A.T / 0.3, np.eye(4)]])
    right = np.concatenate([-np.einsum("ij,k->ijk", S1, x2), np.einsum("ik,j->ijk", S2, x1)]) / 0.3
    np.testing.assert_allclose(slope.reshape(7, 12), np.linalg.solve(system, right.reshape(7, 12)), atol=1e-11)


def test_single_precision_stays():
    game = acvi.MatrixGame(A.astype(np.float32))
    assert smoothed_equilibrium(game, 0.1).dtype == jnp.float32
    np.testing.assert_allclose(smoothed_equilibrium(game, 0.1), point(A, 0.1), atol=1e-5)


def without_matrix(d):
    equality = acvi.MatrixFree(lambda x, a: jnp.sum(x)[None], lambda z, a: jnp.broadcast_to(z, (3,)), d)
    return smoothed_equilibrium(acvi.VariationalInequality(lambda x, a: x, 3, (), acvi.Nonnegative(), equality), 0.1)


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: smoothed_equilibrium(tl.Problem(), 0.1), ArgumentError, "problem must be a variational inequality"),
    (lambda: smoothed_equilibrium(acvi.MatrixGame(A), 0.0), ArgumentError, "mu must be a number above 0"),
    (lambda: smoothed_equilibrium(acvi.MatrixGame(A), 0.1, barrier="magic"), LookupError, "barrier"),
    (lambda: smoothed_equilibrium(acvi.constrained_bilinear(), 0.1, barrier="entropy"), ArgumentError, "entropy barrier needs Nonnegative"),
    (lambda: jax.eval_shape(without_matrix, jnp.ones(1)), NoClosedFormError, "MatrixFree"),
])
def test_wrong_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
