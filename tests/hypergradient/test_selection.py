"""Selection of regularization: closed-form derivatives against autodiff, the reference table, batches, data that are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.hypergradient import cases
from theorylab import hypergradient as hg
from theorylab.errors import ArgumentError, NonFiniteInputError, PrecisionError, ShapeError, UnknownNameError
from theorylab.hypergradient.bilevel import AutodiffLinearization
from theorylab.hypergradient.contract import gram, pull
from theorylab.hypergradient.losses import Logistic

RNG = np.random.default_rng(0)
A, A_OUT = RNG.standard_normal((8, 3)), RNG.standard_normal((6, 3))
T, T_OUT = RNG.standard_normal((8, 2)), RNG.standard_normal((6, 2))
SIGNS, SIGNS_OUT = np.array([1, -1, -1, 1, 1, 1, -1, 1]), np.array([1, 1, -1, 1, -1, -1])
LABELS, LABELS_OUT = np.array([0, 1, 2, 0, 1, 2, 2, 1]), np.array([2, 1, 0, 0, 1, 2])
Y = jnp.array([0.3, -0.5, 1.0])
PROBLEMS = {
    "ridge": lambda: hg.RidgeSelection((A, T[:, 0]), (A_OUT, T_OUT[:, 0])),
    "ridge, outputs": lambda: hg.RidgeSelection((A, T), (A_OUT, T_OUT)),
    "ridge, outputs, quadratic": lambda: hg.RidgeSelection((A, T), (A_OUT, T_OUT), objective="quadratic"),
    "logistic": lambda: hg.LogisticSelection((A, SIGNS), (A_OUT, SIGNS_OUT)),
    "logistic, linear": lambda: hg.LogisticSelection((A, SIGNS), (None, T[:3, 0]), objective="linear"),
    "softmax": lambda: hg.SoftmaxSelection((A, LABELS), (A_OUT, LABELS_OUT)),
}


@jax.jit
def products(at, v, d, u):
    return {"residual": at.residual, "outer_x": at.outer_x, "outer_y": at.outer_y, "product": at.product(d), "matrix": at.matrix(),
            "diagonal": at.diagonal(), "pullback": at.cross_pullback(v), "cross": at.cross_product(u), "turn": at.turn(v, d)}


@jax.jit
def oracles(problem, x, y):
    at = problem.at(x, y)
    return problem.energy_and_residual(x, y), problem.residual(x, y), at.outer_x


@jax.jit
def both(problem, x, y, v, d, u):
    """Every product, in closed form and by autodiff of the energy."""
    return products(problem.at(x, y), v, d, u), products(AutodiffLinearization.of(problem, x, y), v, d, u)


@pytest.mark.parametrize("name", [name if name not in ("ridge", "ridge, outputs") else pytest.param(name, marks=pytest.mark.slow)
                                  for name in PROBLEMS])
def test_closed_forms_are_the_derivatives_of_the_energy(name):
    problem = PROBLEMS[name]()
    x, v, d = (jnp.asarray(np.random.default_rng(k).standard_normal(problem.n)) for k in range(3))
    closed, automatic = both(problem, x, Y, v, d, jnp.array([1.0, 2.0, -1.0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), closed, automatic)
    (value, gradient), residual, _ = oracles(problem, x, Y)
    np.testing.assert_allclose(value, problem.energy(x, Y), rtol=1e-14)
    np.testing.assert_allclose([gradient, residual], [automatic["residual"]] * 2, rtol=1e-11)


def test_energies_and_objectives_are_the_formulas():
    x = np.array([0.5, -1.0, 0.2])
    penalty = np.sum(np.exp(Y) * x**2) / 6
    ridge, logistic = PROBLEMS["ridge"](), PROBLEMS["logistic"]()
    assert float(ridge.energy(x, Y)) == pytest.approx(np.sum((A @ x - T[:, 0]) ** 2) / 16 + penalty, rel=1e-14)
    assert float(ridge.outer(x, Y)) == pytest.approx(np.mean((A_OUT @ x - T_OUT[:, 0]) ** 2) / 2, rel=1e-14)
    assert float(logistic.energy(x, Y)) == pytest.approx(np.mean(np.log1p(np.exp(-SIGNS * (A @ x)))) + penalty, rel=1e-14)
    assert float(PROBLEMS["logistic, linear"]().outer(x, Y)) == pytest.approx(T[:3, 0] @ x + float(Y @ Y), rel=1e-14)
    X = np.random.default_rng(5).standard_normal((3, 3))
    scores = np.exp(A @ X)
    entropy = -np.mean(np.log(scores[np.arange(8), LABELS] / scores.sum(1)))
    softmax = PROBLEMS["softmax"]()
    assert float(softmax.energy(X.ravel(), Y)) == pytest.approx(entropy + np.sum(np.exp(Y) * (X**2).sum(1)) / 6, rel=1e-14)
    quadratic = PROBLEMS["ridge, outputs, quadratic"]()
    assert float(quadratic.outer(X[:, :2].ravel(), Y)) == pytest.approx(np.sum((A_OUT @ X[:, :2] - T_OUT) ** 2) / 2, rel=1e-14)


@jax.jit
def measured(problem, x, y):
    at = problem.at(x, y)
    H, P = at.matrix(), at.diagonal()
    gradient = at.outer_y - at.cross_pullback(jnp.linalg.solve(H, at.outer_x))
    values = jnp.linalg.eigvalsh(H)
    return {"L": problem.outer(x, y), "condition": values[-1] / values[0], "x_norm": jnp.linalg.norm(x), "gradient_norm": jnp.linalg.norm(gradient),
            "jacobi": jnp.linalg.norm(jnp.eye(len(P), dtype=P.dtype) - H / P[:, None], 2), "ends": gradient[jnp.array([0, -1])]}


@pytest.mark.filterwarnings("ignore:train is constant")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["diabetes", "breast_cancer", "wine", "iris", "linnerud", "digits"])
def test_the_table_of_the_specification(name):
    pytest.importorskip("sklearn")
    problem, y, _, known = cases.data(name)
    assert (*problem.samples, *problem.unpack_x(jnp.zeros(problem.n)).shape) == known["shape"][: 3 + (known["shape"][3] > 1)]
    found = measured(problem, problem.pack_x(hg.reference(problem, y)), y)
    for quantity, digits in (("L", 3e-11), ("x_norm", 3e-11), ("gradient_norm", 3e-11), ("condition", 5e-6), ("jacobi", 5e-6)):
        assert float(found[quantity]) == pytest.approx(known[quantity], rel=digits), quantity
    np.testing.assert_allclose(found["ends"], known["ends"], rtol=2e-9, atol=1e-18)


def test_the_ridge_problem_in_the_plane():
    problem, y, _, known = cases.p3()
    x = problem.exact(y)
    np.testing.assert_allclose(x, known["x"], atol=1e-12)
    np.testing.assert_allclose(measured(problem, x, y)["ends"], known["gradient"], atol=1e-12)
    assert float(problem.outer(x, y)) == pytest.approx(known["L"], abs=1e-12)
    hessian = jax.jit(jax.hessian(lambda y: problem.outer(problem.exact(y), y)))(y)
    np.testing.assert_allclose(hessian, known["hessian"], atol=1e-11)
    np.testing.assert_allclose(implicit(problem, x + jnp.array(known["at"]), y), known["Plain"], atol=1e-11)


@jax.jit
def implicit(problem, x, y):
    at = problem.at(x, y)
    return at.outer_y - at.cross_pullback(jnp.linalg.solve(at.matrix(), at.outer_x))


def test_the_logistic_problem_on_the_line():
    problem, y, _, known = cases.p4()
    x = jnp.array([known["x"]])
    assert abs(float(problem.residual(x, y)[0])) < 1e-12
    assert float(implicit(problem, x, y)[0]) == pytest.approx(known["gradient"], abs=1e-12)
    assert float(implicit(problem, x + 0.1, y)[0]) == pytest.approx(known["Plain"], abs=1e-11)


def test_the_closed_form_of_ridge_is_augmented_least_squares():
    problem = PROBLEMS["ridge, outputs"]()
    rows = np.vstack([A / np.sqrt(8), np.diag(np.sqrt(np.exp(np.asarray(Y)) / 3))])
    best = np.linalg.lstsq(rows, np.vstack([T / np.sqrt(8), np.zeros((3, 2))]), rcond=None)[0]
    np.testing.assert_allclose(problem.unpack_x(problem.exact(Y)), best, rtol=1e-12)
    assert PROBLEMS["logistic"]().exact(Y) is None


@pytest.mark.parametrize("name", ["ridge", "logistic", "softmax"])
def test_the_constants_of_curvature_bound_the_spectrum_everywhere(name):
    problem = PROBLEMS[name]()
    low, high = map(float, problem.curvature(Y))
    xs = jnp.asarray(np.random.default_rng(2).standard_normal((20, problem.n))) * jnp.linspace(0, 2, 20)[:, None]
    values = jax.jit(jax.vmap(lambda x: jnp.linalg.eigvalsh(problem.at(x, Y).matrix())))(xs)
    assert low * (1 - 1e-12) <= values.min() and values.max() <= high
    assert low == pytest.approx(np.exp(-0.5) / 3)


@pytest.mark.parametrize("name", ["ridge, outputs, quadratic", "logistic", pytest.param("softmax", marks=pytest.mark.slow)])
def test_batches_average_to_the_whole(name):
    problem = PROBLEMS[name]()
    x = jnp.asarray(np.random.default_rng(3).standard_normal(problem.n))
    assert problem.samples == (8, 6)
    _, residual, outer_x = oracles(problem, x, Y)
    inner = [oracles(problem.inner_batch(jnp.array(i)), x, Y)[1] for i in ([0, 7, 2, 5], [1, 3, 4, 6])]
    np.testing.assert_allclose(np.mean(inner, axis=0), residual, rtol=1e-12, atol=1e-15)
    outer = [oracles(problem.outer_batch(jnp.array(i)), x, Y)[2] for i in ([0, 4, 5], [1, 2, 3])]
    np.testing.assert_allclose(np.mean(outer, axis=0), outer_x, rtol=1e-12, atol=1e-15)


def test_the_linear_objective_has_no_rows():
    problem = PROBLEMS["logistic, linear"]()
    assert problem.samples == (8, 1) and problem.outer_batch(jnp.array([0])) is problem


def test_settings_and_data_sets_form_batches():
    problem = PROBLEMS["logistic"]()
    x, ys = jnp.ones(3), jnp.stack([Y, 2 * Y])
    one = lambda problem, y: implicit(problem, x, y)
    np.testing.assert_allclose(jax.vmap(one, (None, 0))(problem, ys)[1], one(problem, 2 * Y), rtol=1e-12)
    other = problem.replace(train=(A[::-1] + 1, SIGNS))
    folds = jax.tree.map(lambda *a: jnp.stack(a), problem, other)
    np.testing.assert_allclose(jax.vmap(one, (0, None))(folds, Y)[1], one(other, Y), rtol=1e-12)


def test_a_copy_with_another_objective_keeps_the_data():
    softmax = PROBLEMS["softmax"]()
    copy = softmax.replace(valid=(A_OUT[:2], LABELS_OUT[:2]))
    assert copy.classes == 3 and copy.samples == (8, 2)
    np.testing.assert_array_equal(copy.b, softmax.b)
    assert PROBLEMS["ridge"]().replace(objective="quadratic").outer_rows == 1


def test_float32_stays_float32_and_weights_do_not_cancel():
    problem = hg.LogisticSelection((A.astype(np.float32), SIGNS), (A_OUT.astype(np.float32), SIGNS_OUT))
    ones = jnp.ones(3, jnp.float32)
    every = jax.jit(lambda p, x: (products(p.at(x, x), x, x, x), p.outer(x, x), p.energy(x, x), p.curvature(x)))
    out = every(problem, ones)
    assert {a.dtype.name for a in jax.tree.leaves(out)} == {"float32"}
    t = np.array([3.0, 12.0, 20.0])
    exact = np.exp(-t) / (1 + np.exp(-t)) ** 2
    np.testing.assert_allclose(Logistic.weights(jnp.asarray(t, jnp.float32))[0], exact, rtol=1e-6)
    np.testing.assert_allclose(Logistic.weights(jnp.asarray(-t, jnp.float32))[0], exact, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (70_000, 24)])
def test_pulled_products_are_products_with_the_transpose(shape):
    M, u = np.random.default_rng(0).standard_normal(shape), np.random.default_rng(1).standard_normal((shape[0], 2))
    np.testing.assert_allclose(pull(jnp.asarray(M), jnp.asarray(u[:, 0])), M.T @ u[:, 0], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(pull(jnp.asarray(M), jnp.asarray(u)), M.T @ u, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(gram(jnp.asarray(M[:50]), jnp.asarray(u[:50, 0] ** 2)), M[:50].T @ (M[:50] * u[:50, :1] ** 2), atol=1e-12)


def test_standardized_features_use_the_numbers_of_the_training_rows():
    train, valid = hg.standardize(A, A_OUT)
    np.testing.assert_allclose(train, (A - A.mean(0)) / A.std(0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(valid, (A_OUT - A.mean(0)) / A.std(0), rtol=1e-13, atol=1e-13)
    targets = hg.standardize(T[:, 0], T_OUT[:, 0])
    assert targets[0].shape == (8,) and float(jnp.std(targets[0])) == pytest.approx(1)


def test_a_constant_feature_warns_and_keeps_its_scale():
    flat = A.copy()
    flat[:, 1] = 0.1
    with pytest.warns(UserWarning, match=r"constant in 1 of 3 columns \(1\)"):
        train, valid = hg.standardize(flat, A_OUT)
    assert np.abs(train[:, 1]).max() < 1e-15
    np.testing.assert_allclose(valid[:, 1], A_OUT[:, 1] - 0.1, rtol=1e-12)


def test_a_single_class_warns_and_is_legal():
    with pytest.warns(UserWarning, match="b of train holds the single class 1"):
        problem = hg.LogisticSelection((A, np.ones(8)), (A_OUT, np.ones(6)))
    assert problem.n == 3


LOGISTIC, SOFTMAX, RIDGE = hg.LogisticSelection, hg.SoftmaxSelection, hg.RidgeSelection
VALID = (A_OUT, SIGNS_OUT)
NAN = np.where(np.arange(24).reshape(8, 3) == 4, np.nan, A)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: LOGISTIC((A, LABELS), VALID), ArgumentError, r"b of train must hold labels -1 and 1, got 0; map labels 0 and 1 by 2 \* b - 1"),
    (lambda: LOGISTIC((A, SIGNS), (A_OUT, LABELS_OUT)), ArgumentError, "b_out of valid must hold labels -1 and 1"),
    (lambda: LOGISTIC(A, VALID), ArgumentError, "train must be a pair"),
    (lambda: LOGISTIC((A, SIGNS), (A_OUT,)), ArgumentError, "valid must be a pair .* length 1"),
    (lambda: LOGISTIC((A, SIGNS), VALID, objective="mean"), UnknownNameError, "objective 'mean'"),
    (lambda: LOGISTIC((A, SIGNS[:5]), VALID), ShapeError, r"b of train must have shape \(8,\), got \(5,\)"),
    (lambda: LOGISTIC((A, SIGNS), (A_OUT[:, :2], SIGNS_OUT)), ShapeError, "must have the 3 features of A of train, got 2"),
    (lambda: LOGISTIC((A[0], SIGNS), VALID), ShapeError, "A of train must have shape"),
    (lambda: LOGISTIC((NAN, SIGNS), VALID), NonFiniteInputError, "A of train must be finite, got nan"),
    (lambda: LOGISTIC((A * 1j, SIGNS), VALID), PrecisionError, "A of train must hold real numbers"),
    (lambda: LOGISTIC((A.astype(np.float32), SIGNS), VALID), PrecisionError, "A_out of valid must have the dtype float32 of the problem"),
    (lambda: RIDGE((A, T), (A_OUT, T_OUT[:, 0])), ShapeError, r"b_out of valid must have shape \(6, 2\)"),
    (lambda: RIDGE((A, T[:, :, None]), (A_OUT, T_OUT)), ShapeError, "b of train must have shape"),
    (lambda: RIDGE((A, T[:, 0]), (None, T_OUT[:, 0]), objective="linear"), ShapeError, r"b_out of valid must have shape \(3,\)"),
    (lambda: SOFTMAX((A, LABELS + 0.5), (A_OUT, LABELS_OUT)), ArgumentError, "whole labels from 0 to 2"),
    (lambda: SOFTMAX((A, LABELS - 1), (A_OUT, LABELS_OUT)), ArgumentError, "whole labels from 0 to 2, got -1"),
    (lambda: SOFTMAX((A, LABELS), (A_OUT, LABELS_OUT), classes=2), ArgumentError, "whole labels from 0 to 1, got 2"),
    (lambda: SOFTMAX((A, np.zeros(8, int)), (A_OUT, np.zeros(6, int))), ArgumentError, "classes must be a whole number at least 2"),
    (lambda: PROBLEMS["logistic"]().inner(jnp.ones(2)), ShapeError, r"y must have shape \(3,\)"),
    (lambda: hg.standardize(A, A_OUT[:, :2]), ShapeError, "valid must have shape"),
    (lambda: hg.standardize(NAN, A_OUT), NonFiniteInputError, "train must be finite")])
def test_wrong_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
