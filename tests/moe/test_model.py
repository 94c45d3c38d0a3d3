"""The model: golden numbers, brute force, SciPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings, strategies as st

from tests.moe import cases
from theorylab import errors, moe

S1 = moe.example("S1")
X = np.linspace(-1, 1, 7)[:, None]


def plain_density(m: moe.Mixture, x: np.ndarray, y: float) -> float:
    """g(y | x) at one point, by loops and a stable sort."""
    slopes = [float(np.dot(m.gate_coef[j], x)) for j in range(m.experts)]
    logits = [slopes[j] + float(m.gate_intercept[j]) for j in range(m.experts)]
    ranked = sorted(range(m.experts), key=lambda j: -(slopes if m.selection == "slope" else logits)[j])
    weights = {j: np.exp(logits[j]) for j in ranked[:m.active]}
    return sum(w / sum(weights.values()) * scipy.stats.norm.pdf(y, np.dot(m.expert_coef[j], x) + m.expert_intercept[j], np.sqrt(m.variance[j]))
               for j, w in weights.items())


@pytest.mark.parametrize(("selection", "active"), list(cases.A1_LOG_DENSITY))
def test_log_density_and_gate_are_those_of_the_golden_point(selection, active):
    m = cases.a1(active, selection)
    x, y = cases.A1_POINT
    assert abs(float(m.log_density(x, y)[0]) - cases.A1_LOG_DENSITY[selection, active]) < 1e-12
    if (selection, active) in cases.A1_GATE:
        np.testing.assert_allclose(m.gate(x)[0], cases.A1_GATE[selection, active], atol=1e-12)
    assert abs(float(m.log_density(x, y)[0]) - np.log(plain_density(m, x[0], y[0]))) < 1e-13


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=30, max_size=30), st.sampled_from([1, 2, 4]))
def test_routing_keeps_k_experts_and_ties_go_to_the_lower_index(scores, active):
    m = moe.Mixture(np.zeros(5), np.eye(5), np.zeros((5, 5)), np.zeros(5), np.ones(5), active)
    x = np.array(scores, float).reshape(6, 5)
    expected = [[j in sorted(range(5), key=lambda j, row=row: -row[j])[:active] for j in range(5)] for row in x]
    assert m.routing(x).tolist() == expected


def test_routing_of_many_experts_follows_the_same_rule(rng):
    k = 30
    x = rng.integers(-3, 4, (50, k)).astype(float)
    m = moe.Mixture(np.zeros(k), np.eye(k), np.zeros((k, k)), np.zeros(k), np.ones(k), 7)
    order = np.argsort(-x, axis=1, kind="stable")[:, :7]
    assert all(set(np.flatnonzero(row)) == set(kept) for row, kept in zip(np.asarray(m.routing(x)), order, strict=True))


def test_at_the_origin_slope_selection_keeps_the_first_experts():
    assert S1.routing([[0.0]]).tolist() == [[True, True, False]]


def test_gradients_through_the_gate_are_finite_and_vanish_off_the_kept_experts():
    jacobian = jax.jacobian(lambda b: S1.replace(gate_intercept=b).gate(X))(S1.gate_intercept)
    gate, mask = np.asarray(S1.gate(X)), np.asarray(S1.routing(X))
    np.testing.assert_allclose(jacobian, gate[:, :, None] * (np.eye(3) - gate[:, None, :]), atol=1e-15)
    assert (np.asarray(jacobian)[~mask] == 0).all()
    log = jax.grad(lambda b: jnp.sum(jnp.where(mask, S1.replace(gate_intercept=b).log_gate(X), 0)))(S1.gate_intercept)
    np.testing.assert_allclose(log, (mask - gate * mask.sum(axis=1, keepdims=True)).sum(axis=0), atol=1e-13)


@pytest.mark.parametrize("selection", ["slope", "logit"])
def test_a_translation_of_the_gate_changes_nothing(selection, rng):
    m = moe.example("S3", selection=selection)
    x, y = rng.uniform(-1, 1, (40, 2)), rng.normal(size=40)
    moved = m.replace(gate_intercept=m.gate_intercept + 0.7, gate_coef=m.gate_coef + jnp.asarray([-0.4, 1.3]))
    np.testing.assert_allclose(moved.log_density(x, y), m.log_density(x, y), atol=1e-13)
    np.testing.assert_allclose(moved.canonical().gate_matrix, m.canonical().gate_matrix, atol=1e-14)
    assert (moved.canonical().gate_matrix[-1] == 0).all()


def test_far_inputs_and_responses_have_finite_log_densities():
    m = cases.a1(2, "logit")
    far = np.array([[1e6, -1e6], [-1e6, 1e6], [1e6, 1e6]])
    assert np.isfinite(m.log_density(far, np.array([0.0, 1e8, -1e8]))).all()
    gradient = jax.grad(lambda w: jnp.sum(m.replace(gate_coef=w).log_density(far, np.zeros(3))))(m.gate_coef)
    assert np.isfinite(gradient).all()


def test_cdf_is_the_integral_of_the_density_and_quantile_its_inverse():
    x = np.array([[-0.7]])
    y = np.linspace(-8, 8, 20001)
    at = np.repeat(x, len(y), axis=0)
    mass = scipy.integrate.cumulative_simpson(np.asarray(S1.density(at, y)), x=y, initial=0)
    np.testing.assert_allclose(S1.cdf(at, y), mass, atol=1e-9)
    gate, mean = np.asarray(S1.gate(x))[0], np.asarray(S1.expert_intercept + S1.expert_coef[:, 0] * -0.7)
    plain = lambda v: gate @ scipy.stats.norm.cdf(v, mean, np.sqrt(np.asarray(S1.variance)))
    for q in (1e-6, 0.03, 0.5, 0.97):
        root = scipy.optimize.brentq(lambda v, q=q: plain(v) - q, -20, 20, xtol=1e-14)
        assert abs(float(S1.quantile(x, q)[0]) - root) < 1e-11


def test_quantiles_are_found_in_the_gap_between_two_narrow_modes():
    m = moe.Mixture([0.0, 0.0], [[0.0], [0.0]], [[0.0], [0.0]], [0.0, 100.0], [1e-4, 1e-4], 2)
    q = np.array([0.1, 0.499, 0.501, 0.9])
    found = np.asarray(m.quantile([[0.0]], q))[0]
    expected = np.where(q < 0.5, 0, 100) + 0.01 * scipy.stats.norm.ppf(np.where(q < 0.5, 2 * q, 2 * q - 1))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_derivative_of_a_quantile_is_that_of_the_root():
    quantile = lambda b: S1.replace(expert_intercept=S1.expert_intercept + jnp.asarray([0.0, 1.0, 0.0]) * b).quantile([[0.4]], 0.7)[0]
    step = 1e-5
    assert abs(float(jax.grad(quantile)(0.0)) - float(quantile(step) - quantile(-step)) / (2 * step)) < 1e-8


def test_mean_and_variance_are_moments_of_the_density():
    y = np.linspace(-15, 15, 40001)
    for x in (-0.5, 0.5):
        at = np.full((len(y), 1), x)
        density = np.asarray(S1.density(at, y))
        mean = scipy.integrate.simpson(density * y, x=y)
        variance = scipy.integrate.simpson(density * (y - mean) ** 2, x=y)
        assert abs(float(S1.mean([[x]])[0]) - mean) < 1e-10
        assert abs(float(S1.variance_at([[x]])[0]) - variance) < 1e-9


def test_responsibilities_are_posterior_probabilities():
    m = cases.A2_START
    r = np.asarray(m.responsibilities(cases.A2_X, cases.A2_Y))
    for row, expected in cases.A2_RESPONSIBILITIES.items():
        np.testing.assert_allclose(r[row], expected, rtol=1e-11)
    np.testing.assert_allclose(r.sum(axis=1), 1, atol=1e-15)


def test_samples_follow_the_density():
    x, y = S1.sample(4000, key=0, low=-1.0)
    assert scipy.stats.kstest(np.asarray(S1.cdf(x, y)), "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(np.asarray(x[:, 0]), scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3
    at = np.full((4000, 1), -0.2)
    _, expert = S1.sample_experts(at, key=1)
    share, gate = np.bincount(expert, minlength=3) / 4000, np.asarray(S1.gate(at[:1]))[0]
    assert share[2] == 0
    np.testing.assert_allclose(share, gate, atol=4 * np.sqrt(0.25 / 4000))


def test_weyl_data_are_those_of_the_companion():
    x, y = cases.s1_data()
    assert abs(float(y.sum()) - 39.3625674054004) < 1e-10
    np.testing.assert_allclose(y[:3], [-3.15268338, -2.52514976, -2.93918629], atol=1e-8)
    assert float(x[0, 0]) == -1 + 1 / 400
    at = (np.arange(400) + 0.5) * 0.7548776662466927 % 1
    _, expert = moe.density.respond(S1, x, jnp.asarray(at), jnp.zeros(400))
    assert np.bincount(expert).tolist() == [169, 88, 143]


def test_packing_keeps_the_identified_coordinates_and_the_density():
    m = moe.example("S3").replace(gate_intercept=jnp.asarray([0.2, -0.1, 0.1, 5.0]))
    again = m.unpack(m.pack())
    assert m.pack().shape == (3 * 3 + 4 * 4,)
    x, y = m.sample(20, key=0, low=-1.0)
    np.testing.assert_allclose(again.log_density(x, y), m.log_density(x, y), atol=1e-13)
    single = moe.Mixture([0.3], [[1.0]], [[2.0]], [0.5], [1.5], 1)
    assert single.unpack(single.pack()).gate_intercept.tolist() == [0.0]


def test_permuted_experts_have_the_same_density():
    x, y = S1.sample(30, key=0, low=-1.0)
    m = S1.permuted([2, 0, 1])
    np.testing.assert_allclose(m.log_density(x, y), S1.log_density(x, y), atol=1e-14)
    assert float(m.variance[0]) == 0.15


def test_region_numbers_are_sums_of_powers_of_two():
    assert S1.region_ids([[-0.5], [0.5]]).tolist() == [0b011, 0b110]


def test_the_two_rules_differ_only_in_which_experts_they_keep():
    x, _ = cases.A1_POINT
    slope, logit = cases.a1(2, "slope"), cases.a1(2, "logit")
    np.testing.assert_allclose(slope.scores(x)[0], slope.logits(x)[0] - slope.gate_intercept, atol=1e-15)
    np.testing.assert_array_equal(logit.scores(x), logit.logits(x))


def test_single_precision_stays_single_and_close():
    m = jax.tree.map(lambda a: a.astype(jnp.float32), S1)
    x, y = (jnp.asarray(a, jnp.float32) for a in cases.s1_data(50))
    for value, reference in ((m.log_density(x, y), S1.log_density(*cases.s1_data(50))), (m.quantile(x, 0.3), S1.quantile(cases.s1_data(50).x, 0.3))):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, reference, rtol=2e-5, atol=2e-5)


def test_a_batch_of_mixtures_is_evaluated_by_vmap():
    batch = jax.tree.map(lambda a, b: jnp.stack([a, b]), S1, cases.A4_OTHER)
    x, y = cases.s1_data(20)
    together = jax.vmap(lambda m: m.log_density(x, y))(batch)
    np.testing.assert_allclose(together, jnp.stack([S1.log_density(x, y), cases.A4_OTHER.log_density(x, y)]), atol=1e-14)
    assert "float64[2]" in repr(batch)


def test_settings_have_names_too():
    assert (moe.example("dense").pack() == moe.example("S2").pack()).all()
    lines = moe.example("two-experts")
    assert (lines.pack() == moe.example("S0").pack()).all() and lines.selection == "slope"
    assert np.asarray(lines.routing(np.linspace(0.01, 1, 5))).tolist() == [[True, False]] * 5


def test_the_printed_form_shows_every_expert():
    assert repr(S1).startswith("Mixture(experts=3, active=2, dim=1, selection='slope')") and repr(S1).count("variance") == 3


ARRAYS = {"gate_intercept": np.zeros(3), "gate_coef": np.zeros((3, 2)), "expert_coef": np.zeros((3, 2)), "expert_intercept": np.zeros(3),
          "variance": np.ones(3), "active": 2}


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: moe.Mixture(**ARRAYS | {"variance": [1.0, 0.0, 1.0]}), errors.ArgumentError, "variance must be positive"),
    (lambda: moe.Mixture(**ARRAYS | {"active": 4}), errors.ArgumentError, "active must be a whole number at least 1 and at most 3, got 4"),
    (lambda: moe.Mixture(**ARRAYS | {"active": 0}), errors.ArgumentError, "active"),
    (lambda: moe.Mixture(**ARRAYS, selection="both"), errors.ArgumentError, "selection must be one of 'slope', 'logit'"),
    (lambda: moe.Mixture(**ARRAYS | {"gate_coef": np.zeros(3)}), errors.ShapeError, "gate_coef"),
    (lambda: moe.Mixture(**ARRAYS | {"expert_coef": np.zeros((3, 1))}), errors.ShapeError, "expert_coef must have shape"),
    (lambda: moe.Mixture(**ARRAYS | {"gate_intercept": [0.0, np.nan, 0.0]}), errors.NonFiniteInputError, "gate_intercept"),
    (lambda: moe.Mixture(**ARRAYS | {"variance": np.ones(3, np.float32)}), errors.PrecisionError, "variance"),
    (lambda: S1.mean(np.zeros((4, 2))), errors.ShapeError, "x must have shape"),
    (lambda: S1.mean([[np.inf]]), errors.NonFiniteInputError, "x"),
    (lambda: S1.mean(np.zeros((4, 1), np.float32)), errors.PrecisionError, "x"),
    (lambda: S1.log_density(np.zeros((4, 1)), np.zeros(3)), errors.ShapeError, "y must have shape"),
    (lambda: S1.quantile([[0.0]], 1.0), errors.ArgumentError, "strictly between 0 and 1"),
    (lambda: S1.sample(0, key=0), errors.ArgumentError, "x must be a whole number"),
    (lambda: S1.sample(5, key=0, low=2.0), errors.ArgumentError, "low must be below high"),
    (lambda: moe.example("S9"), errors.UnknownNameError, "S9"),
    (lambda: moe.weyl_sample(moe.example("S3"), 10), errors.ArgumentError, "one input"),
    (lambda: moe.weyl_sample(S1, 0), errors.ArgumentError, "n must be"),
    (lambda: moe.Mixture(np.zeros(31), np.zeros((31, 1)), np.zeros((31, 1)), np.zeros(31), np.ones(31), 1).region_ids([[0.0]]),
     errors.ArgumentError, "at most 30 experts"),
])
def test_wrong_arguments_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
