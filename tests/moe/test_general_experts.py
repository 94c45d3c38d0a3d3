"""Experts against SciPy, NumPy least squares and plain optimizers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from tests.moe import general_cases as cases
from theorylab import errors
from theorylab.moe import general as g

fitted = jax.jit(lambda experts, x, y, weights: experts.fitted(x, y, weights))
values = jax.jit(lambda experts, x, y: experts.log_density(x, y))


def prepared(kind: str) -> tuple[g.Experts, jax.Array, jax.Array, jax.Array]:
    """Experts, rows and random shares."""
    experts, x = cases.experts(kind), cases.inputs()
    shares = np.random.default_rng(7).dirichlet(np.ones(cases.K), cases.N)
    return experts, x, experts.responses(cases.responses(kind, x), cases.N), jnp.asarray(shares)


def objective(experts: g.Experts, x: jax.Array, y: jax.Array, weights: jax.Array) -> np.ndarray:
    return np.asarray(jnp.sum(weights * values(experts, x, y), axis=0))


@pytest.mark.parametrize("kind", cases.EXPERTS)
def test_a_fit_never_lowers_the_weighted_likelihood_of_any_expert(kind):
    experts, x, y, weights = prepared(kind)
    before = objective(experts, x, y, weights)
    for _ in range(6):
        experts = fitted(experts, x, y, weights)
        after = objective(experts, x, y, weights)
        assert np.all(after >= before - 1e-10)
        before = after


def test_polynomial_experts_are_weighted_least_squares():
    experts, x, y, weights = prepared("polynomial")
    x1, x2 = np.asarray(x).T
    design = np.stack([np.ones(cases.N), x1, x2, x1**2, x1 * x2, x2**2], axis=1)
    np.testing.assert_allclose(experts.mean(x), design @ np.asarray(experts.coef).T, rtol=1e-13)
    expected = stats.norm(design @ np.asarray(experts.coef).T, np.sqrt(experts.variance)).logpdf(np.asarray(y)[:, None])
    np.testing.assert_allclose(values(experts, x, y), expected, rtol=1e-12)
    new = fitted(experts, x, y, weights)
    for j, w in enumerate(np.asarray(weights).T):
        root = np.sqrt(w)
        coef = np.linalg.lstsq(design * root[:, None], np.asarray(y) * root, rcond=None)[0]
        np.testing.assert_allclose(new.coef[j], coef, rtol=1e-9)
        np.testing.assert_allclose(new.variance[j], w @ (np.asarray(y) - design @ coef) ** 2 / w.sum(), rtol=1e-12)


def test_inputs_far_from_zero_lose_no_digits():
    experts, x, y, weights = prepared("polynomial")
    near = fitted(experts.fresh(x, y, jnp.ones(cases.N), key=jax.random.key(0)), x, y, weights)
    far = fitted(experts.fresh(x + 1e4, y, jnp.ones(cases.N), key=jax.random.key(0)), x + 1e4, y, weights)
    np.testing.assert_allclose(far.mean(x + 1e4), near.mean(x), atol=1e-9)


def test_linear_experts_are_weighted_least_squares_of_all_responses():
    experts, x, y, weights = prepared("linear")
    for j in range(cases.K):
        mean = np.asarray(x) @ np.asarray(experts.coef[j]).T + np.asarray(experts.intercept[j])
        expected = [stats.multivariate_normal(m, experts.covariance[j]).logpdf(v) for m, v in zip(mean, np.asarray(y), strict=True)]
        np.testing.assert_allclose(values(experts, x, y)[:, j], expected, rtol=1e-10)
    new, design = fitted(experts, x, y, weights), np.column_stack([np.ones(cases.N), x])
    for j, w in enumerate(np.asarray(weights).T):
        root = np.sqrt(w)[:, None]
        coef = np.linalg.lstsq(design * root, np.asarray(y) * root, rcond=None)[0]
        np.testing.assert_allclose(np.column_stack([new.intercept[j], new.coef[j]]).T, coef, rtol=1e-9)
        error = np.asarray(y) - design @ coef
        np.testing.assert_allclose(new.covariance[j], (error * w[:, None]).T @ error / w.sum(), rtol=1e-10)


def test_a_covariance_that_collapses_stops_at_the_floor():
    experts, x, y, weights = prepared("linear")
    exact = jnp.stack([y[:, 0], 2 * y[:, 0]], axis=1)                  # the second response repeats the first
    smallest = np.linalg.eigvalsh(fitted(experts, x, exact, weights).covariance)[:, 0]
    assert np.all(smallest > 0.5e-6 * float(jnp.var(y[:, 0])))
    assert np.all(np.isfinite(values(fitted(experts, x, exact, weights), x, exact)))


def test_student_experts_have_the_density_of_scipy_and_tend_to_normal_ones():
    experts, x, y, _ = prepared("student")
    mean = np.asarray(experts.mean(x))
    np.testing.assert_allclose(values(experts, x, y), stats.t(experts.df, mean, experts.scale).logpdf(np.asarray(y)[:, None]), rtol=1e-11)
    normal = stats.norm(mean, experts.scale).logpdf(np.asarray(y)[:, None])
    np.testing.assert_allclose(values(experts.replace(df=jnp.full(3, 1e7)), x, y), normal, atol=1e-4)


def test_student_fits_find_the_maximum_of_a_plain_optimizer():
    x = cases.inputs()
    y = jnp.asarray(np.asarray(x) @ [1.0, -2.0] + 0.5 * stats.t(3).rvs(cases.N, random_state=4))
    experts, weights = cases.experts("student"), jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, (cases.N, cases.K)))
    for _ in range(300):
        experts = fitted(experts, x, y, weights)
    w, n = np.asarray(weights[:, 0]), np.asarray(y)

    def loss(p: np.ndarray) -> float:
        return -w @ stats.t(np.exp(p[4]), np.asarray(x) @ p[:2] + p[2], np.exp(p[3])).logpdf(n)

    best = optimize.minimize(loss, [1.0, -2.0, 0.0, np.log(0.5), np.log(3.0)], method="BFGS", options={"gtol": 1e-7})
    assert abs(float(objective(experts, x, y, weights)[0]) + best.fun) < 1e-8
    found = [*experts.coef[0], experts.intercept[0], experts.scale[0], experts.df[0]]
    np.testing.assert_allclose(found, [*best.x[:3], *np.exp(best.x[3:])], rtol=2e-4)
    fixed = g.StudentExperts(experts.coef, experts.intercept, experts.scale, [4.0, 5.0, 6.0], learn=False)
    assert fixed.fitted(x, y, weights).df.tolist() == [4.0, 5.0, 6.0]


def test_an_outlier_hardly_moves_a_student_expert():
    experts, x, _, weights = prepared("student")
    y = jnp.asarray(np.asarray(x) @ [1.0, -2.0] + 0.1 * np.random.default_rng(0).normal(size=cases.N)).at[0].set(1e8)
    for _ in range(30):
        experts = fitted(experts, x, y, weights)
    np.testing.assert_allclose(experts.coef, [[1.0, -2.0]] * 3, atol=0.2)


def test_logistic_fits_find_the_maximum_of_a_plain_optimizer():
    experts, x, y, weights = prepared("logistic")
    for _ in range(25):
        experts = fitted(experts, x, y, weights)
    design, w, chosen = np.column_stack([np.ones(cases.N), x]), np.asarray(weights), np.eye(3)[np.asarray(y)]

    def loss(p: np.ndarray, j: int) -> float:
        logits = design @ np.concatenate([p, np.zeros(3)]).reshape(3, 3).T
        return -w[:, j] @ (np.sum(chosen * logits, axis=1) - np.log(np.exp(logits).sum(axis=1)))

    for j in range(cases.K):
        best = optimize.minimize(loss, np.zeros(6), args=(j,), method="BFGS", options={"gtol": 1e-7})
        assert abs(float(objective(experts, x, y, weights)[j]) + best.fun) < 1e-8
        matrix = np.column_stack([experts.intercept[j], experts.coef[j]])
        np.testing.assert_allclose((matrix - matrix[2])[:2].ravel(), best.x, atol=1e-4)


def test_separated_classes_stay_finite():
    experts, x, _, weights = prepared("logistic")
    y = experts.responses((np.asarray(x)[:, 0] > 0).astype(int), cases.N)
    for _ in range(60):
        experts = fitted(experts, x, y, weights)
    total = objective(experts, x, y, weights)
    assert np.all(np.isfinite(experts.coef)) and np.all(total <= 0) and np.all(total > -1e-6)


@pytest.mark.slow
def test_networks_learn_a_curve():
    x = jnp.linspace(-1, 1, 60)[:, None]
    y, weights = jnp.sin(4 * x[:, 0]), jnp.ones((60, 8))               # eight random first weights
    experts = g.NeuralExperts.of_size(experts=8, dim=1, hidden=6).fresh(x, y, jnp.ones(60), key=jax.random.key(0))
    for _ in range(100):
        experts = fitted(experts, x, y, weights)
    error = jnp.max(jnp.abs(experts.mean(x) - y[:, None]), axis=0)
    assert float(jnp.min(error)) < 0.03 and float(jnp.median(error)) < 0.1


@pytest.mark.parametrize("kind", ["polynomial", "linear", "student", "neural"])
def test_an_expert_without_rows_stays_as_it_is(kind):
    experts, x, y, weights = prepared(kind)
    new = fitted(experts, x, y, weights.at[:, 1].set(0.0))
    for old, now in zip(jax.tree.leaves(experts), jax.tree.leaves(new), strict=True):
        if old.shape[0] == cases.K:
            np.testing.assert_allclose(now[1], old[1], rtol=1e-12)
            assert np.all(np.isfinite(now)) and not np.allclose(now[0], old[0], rtol=1e-6)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: g.PolynomialExperts([[0.0, 1.0, 2.0]], [1.0], degree=1).replace(degree=3), errors.ShapeError, "one column per monomial"),
    (lambda: g.PolynomialExperts([[0.0, 1.0]], [0.0], degree=1), errors.ArgumentError, "variance must be positive"),
    (lambda: g.PolynomialExperts([[0.0, 1.0]], [1.0], degree=0), errors.ArgumentError, "degree"),
    (lambda: g.PolynomialExperts([[0.0, 1.0]], [1.0], degree=1, scale=[-1.0]), errors.ArgumentError, "scale must be positive"),
    (lambda: g.LinearExperts(np.zeros((1, 2, 1)), np.zeros((1, 2)), [[[1.0, 2.0], [2.0, 1.0]]]), errors.MatrixError, "must be positive definite"),
    (lambda: g.LinearExperts(np.zeros((1, 2, 1)), np.zeros((1, 3)), [np.eye(2)]), errors.ShapeError, "intercept"),
    (lambda: g.StudentExperts([[0.0]], [0.0], [1.0], [0.0]), errors.ArgumentError, "df must be positive"),
    (lambda: g.StudentExperts([[0.0]], [0.0], [-1.0], [3.0]), errors.ArgumentError, "scale must be positive"),
    (lambda: g.LogisticExperts([[[1.0]]], [[0.0]]), errors.ArgumentError, "at least two classes"),
    (lambda: cases.experts("logistic").responses([0, 1, 3], 3), errors.ArgumentError, "y must hold classes 0 to 2, got 3"),
    (lambda: cases.experts("logistic").responses([0, 1.5, 2], 3), errors.ArgumentError, "got 1.5"),
    (lambda: cases.experts("linear").responses([0.0, 1.0], 2), errors.ShapeError, r"y must have shape \(2, 2\)"),
    (lambda: g.NeuralExperts.of_size(2, 1, 0), errors.ArgumentError, "hidden"),
    (lambda: g.NeuralExperts([[[0.0]]], [[0.0]], [[0.0]], [0.0], [-1.0]), errors.ArgumentError, "variance must be positive"),
    (lambda: g.Experts().mean(jnp.zeros((1, 1))), NotImplementedError, "Experts must define mean"),
])
def test_bad_experts_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
