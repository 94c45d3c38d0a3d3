"""The general mixture is `Mixture` where both exist; laws, sampling, transformations, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe import cases, general_cases
from theorylab import errors, moe
from theorylab.moe import general as g


@pytest.mark.parametrize("selection", ["slope", pytest.param("logit", marks=pytest.mark.slow)])
def test_softmax_gate_and_lines_are_the_mixture(selection):
    m, (x, y) = cases.a1(2, selection), cases.A1_POINT
    general = general_cases.as_general(m)
    assert abs(float(general.log_density(x, y)[0]) - cases.A1_LOG_DENSITY[selection, 2]) < 1e-12
    np.testing.assert_allclose(general.gate_probabilities(x)[0], cases.A1_GATE[selection, 2], atol=1e-12)
    x = general_cases.inputs()
    y = jnp.asarray(general_cases.responses("linear", x)[:, 0])
    np.testing.assert_allclose(general.log_density(x, y), m.log_density(x, y), rtol=1e-12)
    np.testing.assert_allclose(general.responsibilities(x, y), m.responsibilities(x, y), atol=1e-14)
    np.testing.assert_allclose(general.mean(x), m.mean(x), rtol=1e-12)
    assert np.array_equal(general.routing(x), m.routing(x))
    one = g.LinearExperts(m.expert_coef[:, None], m.expert_intercept[:, None], m.variance[:, None, None])
    np.testing.assert_allclose(g.GeneralMixture(general.gate, one, 2).log_density(x, y), m.log_density(x, y), rtol=1e-12)


def test_probabilities_of_classes_add_to_one():
    mixture, x = g.GeneralMixture(general_cases.gate("sigmoid"), general_cases.experts("logistic"), 2), general_cases.inputs()
    each = np.stack([np.exp(mixture.log_density(x, np.full(len(x), label))) for label in range(3)], axis=1)
    np.testing.assert_allclose(each.sum(axis=1), 1, rtol=1e-13)
    np.testing.assert_allclose(mixture.mean(x), each, rtol=1e-12)


@pytest.mark.parametrize("kind", ["polynomial", "logistic", *(pytest.param(k, marks=pytest.mark.slow) for k in ("linear", "student", "neural"))])
def test_samples_have_the_mean_of_the_mixture(kind):
    experts = general_cases.experts(kind)
    if kind == "student":
        experts = experts.replace(df=jnp.full(3, 6.0))                  # a variance, for the error of the mean
    mixture = g.GeneralMixture(general_cases.gate("noisy" if kind == "polynomial" else "cosine"), experts, 2)
    x = jnp.tile(jnp.asarray([[0.4, -0.7]]), (8000, 1))
    y = np.asarray(mixture.sample(x, key=3).y)
    assert np.array_equal(y, mixture.sample(x, key=3).y) and not np.array_equal(y, mixture.sample(x, key=4).y)
    y = np.eye(3)[y] if kind == "logistic" else y
    assert np.all(np.abs(y.mean(axis=0) - np.asarray(mixture.mean(x[:1])[0])) < 4.5 * y.std(axis=0) / np.sqrt(8000) + 1e-12)


def test_the_log_likelihood_weighs_its_rows():
    mixture, x = g.GeneralMixture(general_cases.gate("logit"), general_cases.experts("student"), 1), general_cases.inputs()
    y, weight = general_cases.responses("student", x), np.arange(60.0)
    assert abs(float(mixture.log_likelihood(x, y, weight)) - weight @ np.asarray(mixture.log_density(x, y))) < 1e-10


def test_a_batch_of_mixtures_works_under_vmap_and_jit():
    x = general_cases.inputs()
    y = general_cases.responses("polynomial", x)
    one, two = (g.GeneralMixture(general_cases.gate("sigmoid", seed), general_cases.experts("polynomial", seed), 2) for seed in (0, 1))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, two)
    found = jax.jit(jax.vmap(lambda m: m.log_density(x, y)))(both)
    np.testing.assert_allclose(found, [one.log_density(x, y), two.log_density(x, y)], rtol=1e-13)


def test_single_precision_stays_single():
    m = jax.tree.map(lambda a: a.astype(jnp.float32), g.GeneralMixture(general_cases.gate("noisy"), general_cases.experts("polynomial"), 2))
    x = general_cases.inputs().astype(jnp.float32)
    draw = m.sample(x, key=0)
    assert {draw.y.dtype, m.mean(x).dtype, m.log_density(*draw).dtype} == {jnp.dtype(jnp.float32)}


def test_the_name_of_a_mixture_says_its_kind():
    text = repr(g.GeneralMixture(general_cases.gate("cosine"), general_cases.experts("neural"), 2))
    assert text == "GeneralMixture(CosineGate, NeuralExperts, experts=3, active=2, dim=2, float64)"


GATE, EXPERTS = general_cases.gate("slope"), general_cases.experts("polynomial")
MIXTURE = g.GeneralMixture(GATE, EXPERTS, 2)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: g.GeneralMixture(EXPERTS, EXPERTS, 2), errors.ArgumentError, "gate must be a Gate, got PolynomialExperts"),
    (lambda: g.GeneralMixture(GATE, GATE, 2), errors.ArgumentError, "experts must be Experts, got SoftmaxGate"),
    (lambda: g.GeneralMixture(GATE, EXPERTS, 4), errors.ArgumentError, "active"),
    (lambda: g.GeneralMixture(GATE, EXPERTS, 0), errors.ArgumentError, "active"),
    (lambda: g.GeneralMixture(g.SigmoidGate([0.0], [[1.0, 0.0]]), EXPERTS, 1), errors.ShapeError, "gate of 1 experts with 2 inputs and 3 experts"),
    (lambda: g.GeneralMixture(jax.tree.map(lambda a: a.astype(jnp.float32), GATE), EXPERTS, 1), errors.PrecisionError, "gate and experts"),
    (lambda: MIXTURE.mean(jnp.ones((4, 3))), errors.ShapeError, r"x must have shape \(any, 2\)"),
    (lambda: MIXTURE.log_density(jnp.ones((4, 2)), jnp.ones(3)), errors.ShapeError, "y must have shape"),
    (lambda: MIXTURE.log_density(jnp.ones((1, 2)), [np.inf]), errors.NonFiniteInputError, "y"),
    (lambda: MIXTURE.log_density(jnp.ones((1, 2), jnp.float32), [1.0]), errors.PrecisionError, "x"),
    (lambda: MIXTURE.log_likelihood(jnp.ones((2, 2)), [1.0, 2.0], [1.0, -1.0]), errors.ArgumentError, "weight must not be negative, got -1"),
    (lambda: MIXTURE.sample(0, key=0), errors.ArgumentError, "x"),
    (lambda: MIXTURE.sample(5, key=0, low=1.0), errors.ArgumentError, "low must be below high"),
])
def test_bad_mixtures_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_reference_setting_has_the_golden_likelihood():
    general = general_cases.as_general(moe.example("S1"))
    assert abs(float(general.log_likelihood(*cases.s1_data())) - cases.A5_TRUTH_LIKELIHOOD) < 1e-11
