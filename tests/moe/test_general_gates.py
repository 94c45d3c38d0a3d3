"""Gates against brute force, closed forms, quadrature and sampling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from tests.moe import general_cases as cases
from theorylab import errors
from theorylab.moe import general as g

PLAIN = ("slope", "logit", "sigmoid", "cosine", "quadratic")


_weights = jax.jit(lambda gate, x, active: jnp.exp(gate.log_weights(x, active)), static_argnums=2)


def weights(gate: g.Gate, x: object, active: int) -> np.ndarray:
    return np.asarray(_weights(gate, jnp.asarray(x), active))


def by_hand(kind: str, gate: g.Gate, x: np.ndarray, active: int) -> np.ndarray:
    """Scores, the K largest by a stable sort, weights; row by row in NumPy."""
    a = {name: np.asarray(value) for name, value in vars(gate).items()}
    rows = []
    for v in x:
        if kind == "cosine":
            score = np.array([c @ v / np.linalg.norm(c) / np.linalg.norm(v) for c in a["coef"]]) / a["temperature"]
            weight = np.exp(score)
        elif kind == "quadratic":
            score = np.array([b + c @ v + v @ C @ v / 2 for b, c, C in zip(a["intercept"], a["coef"], a["curvature"], strict=True)])
            weight = np.exp(score)
        elif kind == "sigmoid":
            score = a["coef"] @ v + a["intercept"]
            weight = 1 / (1 + np.exp(-score))
        else:
            score = a["coef"] @ v + (a["intercept"] if kind == "logit" else 0)
            weight = np.exp((a["coef"] @ v + a["intercept"]) / a["temperature"])
        kept = np.argsort(-score, kind="stable")[:active]
        row = np.zeros(len(score))
        row[kept] = weight[kept] / weight[kept].sum()
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("kind", PLAIN)
def test_weights_are_those_of_a_loop_over_rows(kind):
    gate, x = cases.gate(kind), np.asarray(cases.inputs())
    for active in (1, 2):
        np.testing.assert_allclose(weights(gate, x, active), by_hand(kind, gate, x, active), atol=1e-14)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_move_in_standardized_inputs_is_one_in_the_inputs(kind):
    gate, x, rng = cases.gate(kind), cases.inputs(), np.random.default_rng(1)
    center, scale, change = jnp.asarray([0.3, -2.0]), jnp.asarray([2.0, 0.1]), jnp.asarray(rng.normal(size=gate.coordinates))
    moved = gate.moved(change, center, scale)
    z, c = (np.asarray(x) - np.asarray(center)) / np.asarray(scale), np.asarray(change).reshape(cases.K, -1) if kind != "cosine" else None
    if kind == "cosine":
        target = np.asarray(gate.coef) + np.asarray(change)[:-1].reshape(gate.coef.shape)
        np.testing.assert_allclose(moved.coef, target / np.linalg.norm(target, axis=1, keepdims=True), rtol=1e-14)
        np.testing.assert_allclose(moved.temperature, 0.4 * np.exp(np.clip(change[-1], -2, 2)), rtol=1e-14)
        return
    expected = c[:, 0] + z @ c[:, 1:3].T
    if kind == "quadratic":
        expected += np.array([[v @ np.array([[q[3], q[4]], [q[4], q[5]]]) @ v / 2 for q in c] for v in z])
    linear = (lambda gate: gate.scores(x)) if kind == "sigmoid" else (lambda gate: gate.logits(x) * getattr(gate, "temperature", 1.0))
    np.testing.assert_allclose(linear(moved) - linear(gate), expected, rtol=1e-10, atol=1e-9)


def test_ties_go_to_the_lower_index():
    x = jnp.zeros((1, cases.D))
    for kind in ("slope", "cosine"):
        assert cases.gate(kind).kept(x, 2).tolist() == [[True, True, False]]


def test_temperature_is_not_identified():
    x, rng = cases.inputs(), np.random.default_rng(5)
    likely = jnp.asarray(rng.normal(size=(cases.N, 3)))                 # logarithms of densities of the experts

    @jax.jit
    @jax.value_and_grad
    def value(point):
        return jnp.sum(jax.nn.logsumexp(g.SoftmaxGate(*point).log_weights(x, 2) + likely, axis=1))

    point = (jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=(3, 2))), jnp.asarray(0.8))
    (one, score), (two, _) = value(point), value(tuple(3.7 * part for part in point))
    assert abs(float(one - two)) < 1e-11
    terms = [a * b for a, b in zip(score, point, strict=True)]
    assert abs(sum(float(jnp.sum(t)) for t in terms)) < 1e-13 * sum(float(jnp.sum(abs(t))) for t in terms)


def test_a_gaussian_gate_is_the_posterior_of_its_gaussians():
    rng = np.random.default_rng(2)
    mean, root, weight = rng.normal(size=(3, 2)), rng.normal(size=(3, 2, 2)), np.array([0.2, 0.5, 0.3])
    covariance = root @ root.transpose(0, 2, 1) + 0.3 * np.eye(2)
    x = np.asarray(cases.inputs())
    joint = np.stack([w * stats.multivariate_normal(m, s).pdf(x) for w, m, s in zip(weight, mean, covariance, strict=True)], axis=1)
    gate = g.QuadraticGate.from_gaussians(weight, mean, covariance)
    np.testing.assert_allclose(weights(gate, x, 3), joint / joint.sum(1, keepdims=True), atol=1e-13)


def selected_first(scores: np.ndarray, scale: float, j: int) -> float:
    """The probability that expert j has the largest noisy score."""
    others = np.delete(scores, j)
    return integrate.quad(lambda e: stats.norm.pdf(e) * np.prod(stats.norm.cdf((scores[j] - others) / scale + e)), -9, 9, epsabs=1e-13)[0]


def test_a_noisy_gate_with_one_kept_expert_has_the_probabilities_of_quadrature():
    gate, x = cases.gate("noisy"), np.asarray(cases.inputs())[:5]
    scores = np.asarray(gate.scores(jnp.asarray(x)))
    expected = [[selected_first(row, 0.5, j) for j in range(3)] for row in scores]
    np.testing.assert_allclose(weights(gate, x, 1), expected, atol=1e-12)
    pair = g.NoisyGate(g.SoftmaxGate([0.0, 0.0], [[1.0], [-0.5]]), scale=0.3)
    at = np.linspace(-0.5, 0.5, 5)[:, None]
    np.testing.assert_allclose(weights(pair, at, 1)[:, 0], stats.norm.cdf(1.5 * at[:, 0] / (0.3 * np.sqrt(2))), atol=1e-13)


def test_a_noisy_gate_that_leaves_one_expert_out_averages_the_plain_weights():
    gate, x = cases.gate("noisy"), np.asarray(cases.inputs())[:5]
    logits, scores = np.asarray(gate.logits(jnp.asarray(x))), np.asarray(gate.scores(jnp.asarray(x)))
    expected = np.zeros((5, 3))
    for out in range(3):
        kept = [j for j in range(3) if j != out]
        softmax = np.exp(logits[:, kept]) / np.exp(logits[:, kept]).sum(1, keepdims=True)
        lowest = np.array([selected_first(-row, 0.5, out) for row in scores])  # the noise is symmetric
        expected[:, kept] += lowest[:, None] * softmax
    np.testing.assert_allclose(weights(gate, x, 2), expected, atol=1e-12)
    np.testing.assert_allclose(weights(gate, x, 3), weights(gate.gate, x, 3), atol=1e-13)


@pytest.mark.slow
def test_fresh_noise_keeps_experts_as_often_as_the_noisy_gate_says():
    gate, x = cases.gate("noisy"), cases.inputs()[:5]
    draws = 4000
    kept = jax.jit(jax.vmap(lambda key: gate.drawn(x, 1, key=key)))(jax.random.split(jax.random.key(0), draws))
    chance = weights(gate, x, 1)
    assert np.all(kept.sum(axis=2) == 1)
    assert np.max(np.abs(np.asarray(kept).mean(axis=0) - chance) / np.sqrt(chance * (1 - chance) / draws + 1e-9)) < 4.5


def test_without_noise_the_gate_is_the_plain_one():
    gate, x = cases.gate("noisy"), np.asarray(cases.inputs())[:5]
    scores = np.sort(np.asarray(gate.scores(jnp.asarray(x))), axis=1)
    far = np.min(np.diff(scores, axis=1), axis=1) > 0.02
    assert far.sum() > 3
    np.testing.assert_allclose(weights(g.NoisyGate(gate.gate, 1e-3), x, 2)[far], weights(gate.gate, x, 2)[far], atol=1e-12)


def test_the_derivative_of_a_noisy_gate_is_that_of_its_probabilities():
    x = cases.inputs()[:5]
    gate = cases.gate("noisy")
    zero, one = jnp.zeros(2), jnp.ones(2)
    both = jax.jit(jax.value_and_grad(lambda change: jnp.sum(gate.moved(change, zero, one).log_weights(x, 1)[:, 0])))
    direction, step = jnp.asarray(np.random.default_rng(3).normal(size=gate.coordinates)), 1e-5
    slope = both(jnp.zeros(gate.coordinates))[1] @ direction
    assert abs(float(slope)) > 0.1                                     # the plain gate with K = 1 has derivative 0
    np.testing.assert_allclose(slope, (both(step * direction)[0] - both(-step * direction)[0]) / (2 * step), rtol=1e-8)


@pytest.mark.slow
def test_noisy_weights_add_to_one_for_eight_experts():
    rng = np.random.default_rng(0)
    gate = g.NoisyGate(g.SoftmaxGate(rng.normal(size=8), rng.normal(size=(8, 1)), selection="logit"), scale=1.0)
    total = weights(gate, np.linspace(-2, 2, 5)[:, None], 2).sum(axis=1)
    np.testing.assert_allclose(total, 1.0, atol=1e-8)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: g.SoftmaxGate([0.0, 0.0], [[1.0], [0.0]], temperature=0.0), errors.ArgumentError, "temperature must be a number above 0"),
    (lambda: g.SoftmaxGate([0.0, 0.0], [[1.0], [0.0]], selection="best"), errors.ArgumentError, "selection must be one of 'slope', 'logit'"),
    (lambda: g.SoftmaxGate([0.0], [[1.0], [0.0]]), errors.ShapeError, "intercept must have shape"),
    (lambda: g.SigmoidGate([0.0, np.nan], [[1.0], [0.0]]), errors.NonFiniteInputError, "intercept"),
    (lambda: g.SigmoidGate(np.zeros(2, np.float32), np.ones((2, 1))), errors.PrecisionError, "intercept and coef must have one dtype"),
    (lambda: g.CosineGate([[1.0, 0.0], [0.0, 0.0]]), errors.ArgumentError, "coef must have no row of zeros"),
    (lambda: g.CosineGate([[1.0]], temperature=-1.0), errors.ArgumentError, "temperature"),
    (lambda: g.QuadraticGate([0.0], [[0.0, 0.0]], [[[1.0, 2.0], [0.0, 1.0]]]), errors.MatrixError, "curvature must be symmetric"),
    (lambda: g.QuadraticGate([0.0], [[0.0, 0.0]], [[[1.0]]]), errors.ShapeError, "curvature"),
    (lambda: g.QuadraticGate.from_gaussians([1.0], [[0.0]], [[[-1.0]]]), errors.MatrixError, "covariance must be positive definite"),
    (lambda: g.QuadraticGate.from_gaussians([0.0], [[0.0]], [[[1.0]]]), errors.ArgumentError, "weight must be positive"),
    (lambda: g.NoisyGate(cases.gate("noisy"), 1.0), errors.ArgumentError, "without noise, got NoisyGate"),
    (lambda: g.NoisyGate(cases.gate("slope"), 0.0), errors.ArgumentError, "scale must be a number above 0"),
    (lambda: g.NoisyGate(g.SigmoidGate(np.zeros(12), np.zeros((12, 1))), 1.0).log_weights(jnp.zeros((1, 1)), 6), errors.ArgumentError, "924 sets"),
    (lambda: g.Gate().logits(jnp.zeros((1, 1))), NotImplementedError, "Gate must define logits"),
])
def test_bad_gates_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
