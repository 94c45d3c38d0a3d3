"""EM and starts for every gate and all experts: monotone, right at the fixed point, and from the data alone as good as the truth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import theorylab as tl
from tests.moe import cases, general_cases
from theorylab import errors, moe
from theorylab.moe import general as g
from theorylab.moe.general.em import advance, posterior

STEPS = 12
FAST = [("slope", "polynomial"), ("cosine", "student"), ("quadratic", "logistic")]
ALL = [(gate, experts) for gate in general_cases.GATES for experts in general_cases.EXPERTS]


@jax.jit
def path(mixture, x, y, weight):
    """Log-likelihoods along EM, computed anew at each iterate."""

    def step(m, _):
        new, value, refused = advance(m, x, y, weight, *posterior(m, x, y, weight), 1e-9, 1e-6)
        return new, (value, refused)

    last, (values, refused) = jax.lax.scan(step, mixture, None, STEPS)
    return last, values, refused


def check_path(gate: str, experts: str, seed: int = 0, active: int = 2) -> g.GeneralMixture:
    x = general_cases.inputs(seed)
    mixture = g.GeneralMixture(general_cases.gate(gate, seed), general_cases.experts(experts, seed), active)
    y = mixture.experts.responses(general_cases.responses(experts, x, seed), len(x))
    weight = jnp.asarray(np.random.default_rng(seed).uniform(0.2, 2.0, len(x)))
    last, values, _ = path(mixture, x, y, weight)
    before = float(mixture.log_likelihood(x, y, weight))
    steps = np.diff([before, *values])
    assert np.all(steps > -1e-10 * abs(before)) and values[-1] > before + 1
    assert abs(float(last.log_likelihood(x, y, weight)) - values[-1]) < 1e-9 * abs(before)
    return last


@pytest.mark.parametrize(("gate", "experts"), FAST)
def test_the_likelihood_never_falls(gate, experts):
    check_path(gate, experts)


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "experts"), [pair for pair in ALL if pair not in FAST])
def test_the_likelihood_never_falls_for_any_gate_and_experts(gate, experts):
    check_path(gate, experts)
    check_path(gate, experts, seed=1)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_likelihood_never_falls_from_any_start(seed):
    check_path("slope", "polynomial", seed)


def test_em_ends_in_the_golden_estimate():
    x, y = cases.s1_data()
    start = general_cases.as_general(moe.example("S1"))
    likelihood = g.GeneralLikelihood(x, y, start)
    fit = tl.iterate(likelihood, g.GeneralEM(), start, steps=100, stop=tl.Below("gain", 1e-14))
    found = moe.Mixture.from_matrices(jnp.column_stack([fit.value.gate.intercept, fit.value.gate.coef]), fit.value.experts.coef,
                                      fit.value.experts.variance, 2)
    assert abs(fit.history["log_likelihood"][-1] - cases.A5_LIKELIHOOD) < 1e-8
    np.testing.assert_allclose(found.pack(), cases.A5_FIT, atol=2e-6)
    assert set(fit.history.columns) == {"log_likelihood", "gain", "rejected"}


@pytest.mark.slow
def test_solve_finds_the_golden_estimate_from_the_data_alone():
    x, y = cases.s1_data()
    model = jax.tree.map(jnp.ones_like, general_cases.as_general(moe.example("S1")))  # values of the model say nothing
    fit = tl.solve(g.GeneralLikelihood(x, y, model), key=1)
    assert fit.history["log_likelihood"][-1] > cases.A5_LIKELIHOOD - 1e-4
    again = tl.solve(g.GeneralLikelihood(x, y, model), key=2)
    assert again.history["log_likelihood"][-1] > cases.A5_LIKELIHOOD - 1e-4


def test_rows_of_weight_zero_change_nothing():
    mixture, x = g.GeneralMixture(general_cases.gate("slope"), general_cases.experts("polynomial"), 2), general_cases.inputs()
    y = jnp.asarray(general_cases.responses("polynomial", x))
    used = jnp.arange(60) < 40
    last, values, _ = path(mixture, x, y, used.astype(x.dtype))
    np.testing.assert_allclose(path(mixture, jnp.where(used[:, None], x, 7.0), jnp.where(used, y, 1e3), used.astype(x.dtype))[1], values, rtol=1e-9)
    assert abs(float(last.log_likelihood(x[:40], y[:40])) - values[-1]) < 1e-10


def line(*rows: list[float]) -> g.PolynomialExperts:
    return g.PolynomialExperts(list(rows), [0.1, 0.2, 0.15], degree=1)


LINES = line([-1.0, 2.0], [0.5, -1.5], [2.0, 1.0])
SLOPES = g.SoftmaxGate([0.4, -0.2, 0.0], [[-4.0], [-1.5], [0.0]])
SWITCH = g.SoftmaxGate([0.0, 0.0], [[4.0], [0.0]], selection="logit")
BUMPS = g.QuadraticGate.from_gaussians([0.3, 0.4, 0.3], [[-0.6], [0.0], [0.6]], [[[0.05]], [[0.02]], [[0.05]]])
TRUTHS = {
    "temperature": lambda: g.GeneralMixture(g.SoftmaxGate([0.0, 0.5, 0.0], [[-3.0], [0.0], [3.0]], 0.5, "logit"), LINES, 1),
    "sigmoid": lambda: g.GeneralMixture(g.SigmoidGate([0.0, 0.5, 0.0], [[-4.0], [0.5], [4.0]]), LINES, 2),
    "cosine": lambda: g.GeneralMixture(g.CosineGate([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]], 0.3),
                                       line([0, 1, 1.0], [3, -1, 2.0], [-3, 2, -1.0]), 2),
    "quadratic": lambda: g.GeneralMixture(BUMPS, LINES, 1),
    "noisy": lambda: g.GeneralMixture(g.NoisyGate(SLOPES, 0.5), LINES, 1),
    "polynomial": lambda: g.GeneralMixture(SWITCH, g.PolynomialExperts([[0, 0, 2.0], [1, -1, 0.0]], [0.05, 0.1], degree=2), 1),
    "linear": lambda: g.GeneralMixture(SLOPES, g.LinearExperts(
        [[[2.0], [1.0]], [[-1.5], [0.0]], [[1.0], [-2.0]]], [[-1.0, 0.0], [0.5, 1.0], [2.0, -1.0]],
        [[[0.1, 0.05], [0.05, 0.1]], [[0.2, 0.0], [0.0, 0.1]], [[0.1, -0.05], [-0.05, 0.2]]]), 2),
    "student": lambda: g.GeneralMixture(SLOPES, g.StudentExperts([[2.0], [-1.5], [1.0]], [-1.0, 0.5, 2.0], [0.3] * 3, [3.0, 5.0, 4.0]), 2),
    "logistic": lambda: g.GeneralMixture(SWITCH, g.LogisticExperts([[[0.0], [3.0], [-3.0]], [[0.0], [-4.0], [2.0]]],
                                                                   [[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), 1),
    "neural": lambda: g.GeneralMixture(SWITCH, g.NeuralExperts([[[3.0], [-2.0]], [[5.0], [1.0]]], [[0.0, 1.0], [2.0, 0.0]],
                                                               [[2.0, 1.0], [-1.0, 2.0]], [0.0, 1.0], [0.02, 0.02]), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRUTHS)
def test_a_fit_from_the_data_alone_is_at_least_as_likely_as_the_truth(kind):
    truth = TRUTHS[kind]()
    for seed in (11, 12):
        x, y = truth.sample(600, key=seed, low=-1.0)
        likelihood = g.GeneralLikelihood(x, y, truth)
        fit = tl.solve(likelihood, key=seed, tolerance=1e-3)
        assert float(fit.history["log_likelihood"][-1]) > float(likelihood.log_likelihood(truth))


@pytest.mark.slow
def test_fits_run_in_a_batch_and_inside_vmap():
    truth = general_cases.as_general(moe.example("S1"))
    x, y = cases.s1_data()
    likelihood = g.GeneralLikelihood(x, y, truth)
    batch = tl.iterate(likelihood, g.GeneralEM(), steps=3, runs=2, key=4)
    assert np.all(batch.history["log_likelihood"][-1] > cases.A5_LIKELIHOOD - 1e-3)
    fit = lambda weight: tl.iterate(g.GeneralLikelihood(x, y, truth, weight), g.GeneralEM(), truth, steps=3, keep="last").value
    fits = jax.jit(jax.vmap(fit))(jnp.stack([jnp.ones(400), jnp.full(400, 2.0)]))
    np.testing.assert_allclose(fits.experts.coef[0], fits.experts.coef[1], rtol=1e-8)


@pytest.mark.slow
def test_single_precision_fits_stay_single():
    x = general_cases.inputs().astype(jnp.float32)
    single = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    mixture = single(g.GeneralMixture(general_cases.gate("slope"), general_cases.experts("polynomial"), 2))
    y = jnp.asarray(general_cases.responses("polynomial", x), jnp.float32)
    last, values, _ = path(mixture, x, y, jnp.ones(60, jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(last)} == {jnp.dtype(jnp.float32)}
    assert np.all(np.diff(values) > -1e-4 * np.abs(values[0]))


MIXTURE = g.GeneralMixture(general_cases.gate("slope"), general_cases.experts("polynomial"), 2)
X = general_cases.inputs()
Y = general_cases.responses("polynomial", X)
LIKELIHOOD = g.GeneralLikelihood(X, Y, MIXTURE)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: g.GeneralLikelihood(X, Y, MIXTURE.experts), errors.ArgumentError, "model must be a GeneralMixture, got PolynomialExperts"),
    (lambda: g.GeneralLikelihood(X, Y[:-1], MIXTURE), errors.ShapeError, "y must have shape"),
    (lambda: g.GeneralLikelihood(X[:20], Y[:20], MIXTURE), errors.ArgumentError, "at least 21 rows of positive weight"),
    (lambda: g.GeneralLikelihood(X, np.ones(60), MIXTURE), errors.ArgumentError, "y must vary, got 1 in every row"),
    (lambda: g.GeneralLikelihood(X, Y, MIXTURE, -np.ones(60)), errors.ArgumentError, "weight must not be negative"),
    (lambda: g.GeneralLikelihood(X, np.where(np.arange(60) == 3, np.nan, Y), MIXTURE), errors.NonFiniteInputError, "y"),
    (lambda: tl.iterate(LIKELIHOOD, g.GeneralEM(), moe.example("S1"), steps=1), errors.ArgumentError, "x0 must be of the kind of the model"),
    (lambda: tl.iterate(LIKELIHOOD, g.GeneralEM(), g.GeneralMixture(MIXTURE.gate, MIXTURE.experts, 1), steps=1), errors.ArgumentError, "x0"),
    (lambda: LIKELIHOOD.check_mixture(jax.tree.map(lambda a: jnp.stack([a, a]), MIXTURE)), errors.ShapeError, "x0 must have arrays of the shapes"),
    (lambda: g.GeneralEM(ridge=-1.0), errors.ArgumentError, "ridge"),
    (lambda: g.general_start(MIXTURE, key=0), errors.ArgumentError, "likelihood must be a GeneralLikelihood"),
    (lambda: g.general_start(LIKELIHOOD, key=0, starts=0), errors.ArgumentError, "starts"),
])
def test_bad_problems_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
