"""Tangent and normal terms against exact rationals, autodiff and brute-force enumeration of the estimators."""

from __future__ import annotations

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from theorylab import stiefel
from theorylab.errors import ArgumentError, NonFiniteInputError, PrecisionError, ShapeError, UnknownNameError
from theorylab.stiefel.fields import u_statistic_of

N, P = 6, 3


def exact(rows: str) -> np.ndarray:
    """A matrix of fractions, row by row."""
    return np.array([[float(Fraction(v)) for v in row.split()] for row in rows.split(";")])


A3, B3 = exact("1 0 1; 0 2 0; 1 0 3"), exact("2 1 0; 1 3 1; 0 1 2")
X3 = exact("1/2 0; 0 1/2; 1/4 -1/4")
G3 = -A3 @ X3
SOLVED3 = np.linalg.solve(B3, G3)


def instance(seed: int, spread: float = 10.0) -> tuple:
    """A random positive definite B, a point near its manifold, a gradient, and the products."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(N, N)))[0]
    b = q @ np.diag(np.geomspace(1, 1 / spread, N)) @ q.T
    x, g = rng.normal(size=(N, P)), rng.normal(size=(N, P))
    x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ b @ x)).T @ (np.eye(P) + 0.2 * rng.normal(size=(P, P)))
    return b, x, g, b @ x, np.linalg.solve(b, g)


def skew(a: np.ndarray) -> np.ndarray:
    return (a - a.T) / 2


@pytest.mark.parametrize(("found", "expected"), [
    (lambda: stiefel.relative(G3, X3, B3 @ X3), "7/32 5/32; -1/8 -1/16; -1/4 -1/8"),
    (lambda: stiefel.relative_solved(G3, X3, B3 @ X3, SOLVED3), "5/64 0; -1/32 0; -7/64 0"),
    (lambda: stiefel.riemannian(G3, X3, SOLVED3), "-9/32 11/32; 11/32 -13/32; -5/8 1/2"),
    (lambda: stiefel.plam(G3, X3, B3 @ X3), "-7/32 9/32; 1/8 -3/8; -29/32 19/32"),
    (lambda: stiefel.normal_gradient(X3, B3 @ X3), "-1/4 1/16; 1/32 -9/32; -3/16 1/8"),
    (lambda: stiefel.normal_newton_schulz(X3, B3 @ X3), "-3/16 1/8; 1/8 -3/16; -5/32 5/32"),
], ids=["relative", "relative_solved", "riemannian", "plam", "normal_gradient", "normal_newton_schulz"])
def test_the_worked_example_in_exact_rationals(found, expected):
    assert np.abs(found() - exact(expected)).max() < 1e-15


def test_one_step_of_the_worked_example():
    moved = X3 - 0.1 * stiefel.landing_field(G3, X3, B3 @ X3, normal="gradient")
    assert np.abs(moved - np.array([[0.503125, -0.021875], [0.009375, 0.534375], [0.29375, -0.25]])).max() < 1e-15
    assert abs(stiefel.infeasibility(moved, B3) - 0.5775888108831381) < 1e-15
    assert abs(jnp.sum(stiefel.relative(G3, X3, B3 @ X3) * G3) - 5 / 32) < 1e-15


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_relative_fields_are_tangent_and_ascend_off_the_manifold_too(seed):
    b, x, g, bx, solved = instance(seed)
    w, v = np.linalg.eigh(b)
    root = (v * np.sqrt(w)) @ v.T
    for field, ascent in ((stiefel.relative(g, x, bx), np.sum(skew(g @ x.T @ b) ** 2)),
                          (stiefel.relative_solved(g, x, bx, solved), 2 * np.sum((root @ skew(np.linalg.solve(b, g) @ x.T) @ root) ** 2))):
        turn = np.asarray(bx.T @ field)
        assert np.abs(turn + turn.T).max() < 1e-12 * np.abs(turn).max()
        assert abs(np.sum(np.asarray(field) * g) - ascent) < 1e-11 * ascent


def test_riemannian_and_plam_are_not_tangent_off_the_manifold():
    _, x, g, bx, solved = instance(0)
    for field in (stiefel.riemannian(g, x, solved), stiefel.plam(g, x, bx)):
        turn = np.asarray(bx.T @ field)
        assert np.abs(turn + turn.T).max() > 0.01


def test_fields_turn_with_the_basis_and_only_the_solved_one_is_invariant_under_congruence():
    b, x, g, bx, solved = instance(1)
    rng = np.random.default_rng(1)
    o = np.linalg.qr(rng.normal(size=(P, P)))[0]
    assert np.abs(stiefel.relative(g @ o, x @ o, bx @ o) - stiefel.relative(g, x, bx) @ o).max() < 1e-13
    t = np.linalg.qr(rng.normal(size=(N, N)))[0] @ np.diag(np.linspace(1, 5, N))
    z, gz, bz = np.linalg.solve(t, x), t.T @ g, t.T @ b @ t
    again = t @ stiefel.relative_solved(gz, z, bz @ z, np.linalg.solve(bz, gz))
    assert np.abs(again - stiefel.relative_solved(g, x, bx, solved)).max() < 1e-11
    assert np.abs(t @ stiefel.relative(gz, z, bz @ z) - stiefel.relative(g, x, bx)).max() > 0.1


def test_the_normal_terms_are_gradients_of_the_squared_violation():
    b, x, _, bx, _ = instance(2)
    gradient = jax.grad(lambda x: jnp.sum((x.T @ b @ x - jnp.eye(P)) ** 2) / 4)(jnp.asarray(x))
    assert np.abs(stiefel.normal_gradient(x, bx) - gradient).max() < 1e-13
    assert np.abs(b @ stiefel.normal_newton_schulz(x, bx) - gradient).max() < 1e-13      # the gradient in the metric of B


@pytest.mark.parametrize("normal", ["gradient", "newton_schulz"])
@pytest.mark.parametrize("tangent", ["relative", "relative_solved", "riemannian", "plam"])
def test_the_fused_field_is_the_sum_of_its_terms(tangent, normal):
    _, x, g, bx, solved = instance(3)
    parts = {"relative": (g, x, bx), "relative_solved": (g, x, bx, solved), "riemannian": (g, x, solved), "plam": (g, x, bx)}
    apart = getattr(stiefel, tangent)(*parts[tangent]) + 0.7 * getattr(stiefel, f"normal_{normal}")(x, bx)
    assert np.abs(stiefel.landing_field(g, x, bx, 0.7, tangent=tangent, normal=normal, solved=solved) - apart).max() < 1e-13


def test_with_newton_schulz_and_half_a_step_the_violation_is_squared():
    b, x, _, bx, _ = instance(4)
    h = x.T @ bx - np.eye(P)
    after = x - np.asarray(stiefel.landing_field(np.zeros_like(x), x, bx)) / 2
    assert np.abs(after.T @ b @ after - np.eye(P) - (-0.75 * h @ h + 0.25 * h @ h @ h)).max() < 1e-13


# ------------------------------------------------------------------------------- estimators, over every batch of a population of five points


POINTS = np.random.default_rng(5).normal(size=(5, N))
COEFFICIENTS = np.random.default_rng(6).normal(size=(5, P))
X5 = np.random.default_rng(7).normal(size=(N, P)) / 2
RIDGE = np.cov(np.random.default_rng(8).normal(size=(N, 2 * N)))


def population_field(ridge: np.ndarray, normal: str, attraction: float) -> np.ndarray:
    b, g = POINTS.T @ POINTS / 5 + ridge, POINTS.T @ COEFFICIENTS / 5
    pull = b @ X5 if normal == "gradient" else X5
    return skew(g @ X5.T @ b) @ b @ X5 + attraction * pull @ (X5.T @ b @ X5 - np.eye(P))


@pytest.mark.parametrize("normal", ["gradient", "newton_schulz"])
@pytest.mark.parametrize("ridge", [None, 0.3, RIDGE], ids=["none", "number", "matrix"])
def test_the_u_statistic_is_unbiased_over_all_batches(ridge, normal):
    batches = np.array(list(itertools.product(range(5), repeat=3)))
    estimate = jax.vmap(lambda i: stiefel.u_statistic_field(jnp.asarray(POINTS)[i], jnp.asarray(COEFFICIENTS)[i], X5, ridge, 0.7, normal=normal))
    matrix = 0.0 * np.eye(N) if ridge is None else ridge * np.eye(N) if np.ndim(ridge) == 0 else ridge
    expected = population_field(matrix, normal, 0.7)
    assert np.abs(estimate(batches).mean(0) - expected).max() < 2e-14 * np.abs(np.asarray(estimate(batches))).max()


def test_the_u_statistic_is_the_mean_over_ordered_triples_of_distinct_rows():
    rng = np.random.default_rng(9)
    a, c, ridge = rng.normal(size=(7, N)), rng.normal(size=(7, P)), RIDGE
    total = np.zeros((N, P))
    for i, j, k in itertools.permutations(range(7), 3):
        one, two = np.outer(a[j], a[j]) + ridge, np.outer(a[k], a[k]) + ridge
        total += skew(np.outer(a[i], c[i]) @ X5.T @ one) @ two @ X5
    found = stiefel.u_statistic_field(a, c, X5, ridge, 0.0)
    assert np.abs(found - total / (7 * 6 * 5)).max() < 1e-12


def test_rows_of_padding_do_not_change_the_u_statistic():
    rng = np.random.default_rng(10)
    a, c = rng.normal(size=(7, N)), rng.normal(size=(7, P))
    pad = lambda m: jnp.asarray(np.concatenate([m, np.zeros((3, m.shape[1]))]))
    xt = jnp.asarray(X5.T)
    for normal in ("gradient", "newton_schulz"):
        plain = stiefel.u_statistic_field(a, c, X5, 0.2, normal=normal)
        padded = u_statistic_of(stiefel.Gram(pad(a), jnp.asarray(7.0), 0.2), pad(c).T, xt, xt @ pad(a).T, 1.0, normal=normal).T
        assert np.abs(plain - padded).max() < 1e-12


@pytest.mark.parametrize("normal", ["gradient", "newton_schulz"])
def test_the_two_sample_field_is_unbiased_over_independent_draws(normal):
    draws = np.array(list(itertools.product(range(5), repeat=3)))
    points, coefficients = jnp.asarray(POINTS), jnp.asarray(COEFFICIENTS)

    def estimate(i):
        gradient = jnp.outer(points[i[0]], coefficients[i[0]])
        one, two = (jnp.outer(points[k], points[k] @ X5) for k in (i[1], i[2]))
        return stiefel.two_sample_field(gradient, X5, one, two, 0.7, normal=normal)

    found = jax.vmap(estimate)(draws)
    assert np.abs(found.mean(0) - population_field(np.zeros((N, N)), normal, 0.7)).max() < 1e-14 * np.abs(np.asarray(found)).max()


def test_the_one_sample_normal_term_has_the_bias_of_the_formula():
    batches = np.array(list(itertools.product(range(5), repeat=2)))

    def normal(i):
        a = jnp.asarray(POINTS)[i]
        return stiefel.normal_gradient(X5, a.T @ (a @ X5) / 2)

    b = POINTS.T @ POINTS / 5
    fourth = np.mean([np.outer(a, a) @ X5 @ X5.T @ np.outer(a, a) for a in POINTS], axis=0)
    bias = jax.vmap(normal)(batches).mean(0) - b @ X5 @ (X5.T @ b @ X5 - np.eye(P))
    assert np.abs(bias - (fourth - b @ X5 @ X5.T @ b) @ X5 / 2).max() < 1e-12


# ------------------------------------------------------------------------------- precision, batching, refusals


def test_float32_stays_and_leading_axes_are_batched():
    _, x, g, bx, _ = instance(0)
    single = [jnp.asarray(a, jnp.float32) for a in (g, x, bx)]
    assert stiefel.landing_field(*single, 0.5).dtype == jnp.float32
    assert stiefel.u_statistic_field(jnp.asarray(POINTS, jnp.float32), jnp.asarray(COEFFICIENTS, jnp.float32), single[1], 0.5).dtype == jnp.float32
    stacked = stiefel.landing_field(*(jnp.stack([a, 2 * a]) for a in (g, x, bx)))
    assert np.abs(stacked[1] - stiefel.landing_field(2 * g, 2 * x, 2 * bx)).max() < 1e-12


@pytest.mark.parametrize("p", [1, N])
def test_one_column_and_square_points_work_with_the_identity(p):
    rng = np.random.default_rng(0)
    x, g = np.linalg.qr(rng.normal(size=(N, p)))[0], rng.normal(size=(N, p))
    field = stiefel.landing_field(g, x, x)
    assert np.abs(field - skew(g @ x.T) @ x).max() < 1e-14


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: stiefel.relative(np.ones((3, 2)), np.ones((3, 2)), np.ones((3, 1))), ShapeError, "gradient and x and bx must have the same shape"),
    (lambda: stiefel.relative(*[np.ones((2, 3))] * 3), ShapeError, "at most as many columns as rows"),
    (lambda: stiefel.plam(*[np.ones(3)] * 3), ShapeError, "gradient must have shape"),
    (lambda: stiefel.plam(*[np.ones((3, 0))] * 3), ShapeError, "must not be empty"),
    (lambda: stiefel.normal_gradient(np.full((2, 1), np.nan), np.ones((2, 1))), NonFiniteInputError, "x must be finite"),
    (lambda: stiefel.normal_newton_schulz(np.ones((2, 1), complex), np.ones((2, 1))), PrecisionError, "x must hold real numbers"),
    (lambda: stiefel.riemannian(np.ones((2, 1), np.float32), np.ones((2, 1)), np.ones((2, 1))), PrecisionError, "must have one dtype"),
    (lambda: stiefel.landing_field(*[np.ones((2, 1))] * 3, tangent="riemannian"), ArgumentError, "solved must be given"),
    (lambda: stiefel.landing_field(*[np.ones((2, 1))] * 3, tangent="relatif"), UnknownNameError, "did you mean 'relative'"),
    (lambda: stiefel.landing_field(*[np.ones((2, 1))] * 3, -1.0), ArgumentError, "attraction must be a number at least 0"),
    (lambda: stiefel.two_sample_field(*[np.ones((2, 1))] * 4, normal="x"), UnknownNameError, "normal"),
    (lambda: stiefel.u_statistic_field(np.ones((2, 3)), np.ones((2, 1)), np.ones((3, 1))), ArgumentError, "at least 3 rows"),
    (lambda: stiefel.u_statistic_field(np.ones((4, 3)), np.ones((5, 1)), np.ones((3, 1))), ShapeError, "coefficients must have shape"),
    (lambda: stiefel.u_statistic_field(np.ones((4, 3)), np.ones((4, 1)), np.ones((3, 1)), -1.0), ArgumentError, "ridge must be a number at least 0"),
    (lambda: stiefel.u_statistic_field(np.ones((4, 3)), np.ones((4, 1)), np.ones((3, 1)), np.ones((2, 2))), ShapeError, "ridge must be 3 x 3"),
    (lambda: stiefel.relative_solved(*[np.ones((2, 1))] * 3, np.ones((1, 1))), ShapeError, "solved"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
