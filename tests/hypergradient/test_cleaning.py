"""Data cleaning: closed forms against autodiff, batches with their weights, memory linear in the samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.hypergradient import cases
from theorylab import hypergradient as hg
from theorylab.core import linear
from theorylab.errors import ArgumentError, NonFiniteInputError, PrecisionError, ShapeError
from theorylab.hypergradient.bilevel import AutodiffLinearization

RNG = np.random.default_rng(0)
A, A_OUT = RNG.standard_normal((8, 3)), RNG.standard_normal((6, 3))
B, B_OUT = np.array([1, -1, -1, 1, 1, 1, -1, 1]), np.array([1, 1, -1, 1, -1, -1])
Y = jnp.asarray(RNG.standard_normal(8))
PROBLEM = hg.DataCleaning((A, B), (A_OUT, B_OUT), penalty=0.2)


@jax.jit
def both(problem, x, y, v, d, u):
    def all_of(at):
        return {"residual": at.residual, "outer_x": at.outer_x, "outer_y": at.outer_y, "product": at.product(d), "matrix": at.matrix(),
                "diagonal": at.diagonal(), "pullback": at.cross_pullback(v), "cross": at.cross_product(u),
                "turn": at.turn(v, d)}

    return all_of(problem.at(x, y)), all_of(AutodiffLinearization.of(problem, x, y))


@pytest.mark.parametrize("rows", [None, [0, 3, 3, 6]])
def test_closed_forms_are_the_derivatives_of_the_energy(rows):
    problem = PROBLEM if rows is None else PROBLEM.inner_batch(jnp.array(rows))
    x, v, d = (jnp.asarray(np.random.default_rng(k).standard_normal(3)) for k in range(3))
    closed, automatic = both(problem, x, Y, v, d, jnp.linspace(-1, 1, 8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14), closed, automatic)
    np.testing.assert_allclose(problem.energy_and_residual(x, Y)[0], problem.energy(x, Y), rtol=1e-14)
    np.testing.assert_allclose(problem.residual(x, Y), automatic["residual"], rtol=1e-12)


def test_the_energy_and_the_hypergradient_are_the_formulas():
    x = np.array([0.5, -1.0, 0.2])
    weight = 1 / (1 + np.exp(-np.asarray(Y)))
    assert float(PROBLEM.energy(x, Y)) == pytest.approx(np.mean(weight * np.log1p(np.exp(-B * (A @ x)))) + 0.1 * x @ x, rel=1e-14)
    assert float(PROBLEM.outer(x, Y)) == pytest.approx(np.mean(np.log1p(np.exp(-B_OUT * (A_OUT @ x)))), rel=1e-14)
    solution = np.asarray(hg.reference(PROBLEM, Y))
    np.testing.assert_allclose(solution, cases.solved(PROBLEM, Y), atol=1e-14)
    gradient = implicit_dense(PROBLEM, jnp.asarray(solution), Y)
    at = jax.jit(PROBLEM.at.__func__)(PROBLEM, jnp.asarray(solution), Y)
    H = A.T @ (A * np.asarray(at.sample * at.curvature)[:, None]) / 8 + 0.2 * np.eye(3)
    v = np.linalg.solve(H, at.outer_x)
    formula = weight * (1 - weight) / (1 + np.exp(B * (A @ solution))) * B * (A @ v) / 8
    np.testing.assert_allclose(gradient, formula, rtol=1e-12)
    h = 1e-5
    value = lambda y: float(PROBLEM.outer(hg.reference(PROBLEM, y), y))
    slopes = [(value(Y + h * e) - value(Y - h * e)) / (2 * h) for e in np.eye(8)[:3]]
    np.testing.assert_allclose(formula[:3], slopes, atol=1e-10)


@jax.jit
def oracles(problem, x, y):
    at = problem.at(x, y)
    return at.residual, at.cross_pullback(x), at.outer_x


def test_batches_average_to_the_whole_and_touch_their_own_weights():
    x = jnp.array([0.5, -1.0, 0.2])
    assert PROBLEM.samples == (8, 6)
    batches = [PROBLEM.inner_batch(jnp.array(i)) for i in ([0, 7, 2, 5], [1, 3, 4, 6])]
    parts, whole = [oracles(batch, x, Y) for batch in batches], oracles(PROBLEM, x, Y)
    np.testing.assert_allclose((parts[0][0] + parts[1][0]) / 2, whole[0], rtol=1e-13)
    np.testing.assert_allclose((parts[0][1] + parts[1][1]) / 2, whole[1], rtol=1e-13)
    assert np.flatnonzero(parts[0][1]).tolist() == [0, 2, 5, 7] and batches[0].m == 8
    twice = batches[0].inner_batch(jnp.array([1, 3]))
    np.testing.assert_allclose(twice.residual(x, Y), PROBLEM.inner_batch(jnp.array([7, 5])).residual(x, Y), rtol=1e-13)
    outer = [oracles(PROBLEM.outer_batch(jnp.array(i)), x, Y)[2] for i in ([0, 4, 5], [1, 2, 3])]
    np.testing.assert_allclose((outer[0] + outer[1]) / 2, whole[2], rtol=1e-13)


def test_the_constants_of_curvature_bound_the_spectrum():
    low, high = map(float, PROBLEM.curvature(Y))
    xs = jnp.asarray(np.random.default_rng(2).standard_normal((20, 3))) * jnp.linspace(0, 2, 20)[:, None]
    values = jax.jit(jax.vmap(lambda x: jnp.linalg.eigvalsh(PROBLEM.at(x, Y).matrix())))(xs)
    assert low == 0.2 and low <= values.min() and values.max() <= high


def flipped(N, valid, dtype=np.float32):
    """Workload W3 of the specification: a label in three is flipped."""
    rs = np.random.RandomState(0)
    X, w = rs.randn(N, 64), rs.randn(64) * 3 / 8
    b = np.sign(X @ w + 0.3 * rs.randn(N))
    wrong = rs.rand(N) < 0.3
    Xv = rs.randn(valid, 64)
    bv = np.sign(Xv @ w + 0.3 * rs.randn(valid))
    cast = lambda a: a.astype(dtype)
    return hg.DataCleaning((cast(X), cast(np.where(wrong, -b, b))), (cast(Xv), cast(bv))), wrong


@jax.jit
def by_conjugate_gradients(problem, x, y):
    at = problem.at(x, y)
    return at.outer_y - at.cross_pullback(linear.cg(at.product, at.outer_x, tolerance=1e-5).value)


@pytest.mark.parametrize("N", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_wrong_labels_lose_weight_and_memory_is_linear_in_the_samples(N):
    problem, wrong = flipped(N, 20_000)
    y = jnp.zeros(N, jnp.float32)
    x = hg.reference(problem, y)
    gradient = np.asarray(by_conjugate_gradients(problem, x, y)) * N
    assert gradient.dtype == np.float32
    assert gradient[wrong].mean() == pytest.approx(0.17, abs=0.02) and gradient[~wrong].mean() == pytest.approx(-0.11, abs=0.02)
    exact = np.asarray(implicit_dense(problem, x, y)) * N
    assert np.linalg.norm(gradient - exact) < 1e-5 * np.linalg.norm(exact)
    temporary = by_conjugate_gradients.lower(problem, x, y).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 10 * 4 * (N + 20_000)      # ten vectors over all samples; the data alone are 64


@jax.jit
def implicit_dense(problem, x, y):
    at = problem.at(x, y)
    return at.outer_y - at.cross_pullback(jnp.linalg.solve(at.matrix(), at.outer_x))


def test_settings_form_a_batch_and_a_new_penalty_is_traced():
    other = PROBLEM.replace(penalty=0.4)
    x = jnp.ones(3)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), PROBLEM, other)
    residuals = jax.vmap(lambda p: p.residual(x, Y))(stacked)
    np.testing.assert_allclose(residuals[1] - residuals[0], 0.2 * x, rtol=1e-12)
    ys = jnp.stack([Y, -Y])
    np.testing.assert_allclose(jax.vmap(lambda y: PROBLEM.residual(x, y))(ys)[1], PROBLEM.residual(x, -Y), rtol=1e-12)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: hg.DataCleaning((A, np.where(B > 0, 1, 0)), (A_OUT, B_OUT)), ArgumentError, "b of train must hold labels -1 and 1, got 0"),
    (lambda: hg.DataCleaning((A, B), A_OUT), ArgumentError, "valid must be a pair"),
    (lambda: hg.DataCleaning((A, B), (A_OUT, B_OUT), penalty=0.0), ArgumentError, "penalty must be a number above 0"),
    (lambda: hg.DataCleaning((A, B[:4]), (A_OUT, B_OUT)), ShapeError, r"b of train must have shape \(8,\)"),
    (lambda: hg.DataCleaning((A, B), (A_OUT[:, :2], B_OUT)), ShapeError, "must have the 3 features"),
    (lambda: hg.DataCleaning((A * np.inf, B), (A_OUT, B_OUT)), NonFiniteInputError, "A of train must be finite"),
    (lambda: hg.DataCleaning((A, B), (A_OUT.astype(np.float32), B_OUT)), PrecisionError, "A_out of valid must have the dtype float64"),
    (lambda: PROBLEM.inner(jnp.ones(3)), ShapeError, r"y must have shape \(8,\)")])
def test_wrong_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
