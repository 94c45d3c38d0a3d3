"""EM: golden steps, monotonicity, degenerate data, batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import theorylab as tl
from tests.moe import cases
from tests.moe.cases import perturbed
from theorylab import errors, moe
from theorylab.core.keys import run_key

S1 = moe.example("S1")


def test_one_step_is_the_golden_one():
    sol = tl.iterate(cases.a2_likelihood(), moe.EM(ridge=0.0), cases.A2_START, steps=1)
    np.testing.assert_allclose(sol.value.expert_matrix, cases.A2_EXPERTS, atol=1e-12)
    np.testing.assert_allclose(sol.value.variance, cases.A2_VARIANCE, atol=1e-12)
    np.testing.assert_allclose(sol.value.gate_matrix, cases.A2_NEWTON, atol=1e-12)
    np.testing.assert_allclose(sol.history["log_likelihood"], [cases.A2_LOG_LIKELIHOOD, cases.A2_NEWTON_LIKELIHOOD], atol=1e-12)
    np.testing.assert_allclose(moe.statistics(cases.a2_likelihood(), cases.A2_START).count, cases.A2_COUNT, atol=1e-13)
    assert sol.history["gain"][0] == np.inf
    assert abs(sol.history["gain"][1] - (cases.A2_NEWTON_LIKELIHOOD - cases.A2_LOG_LIKELIHOOD) / 10) < 1e-13


def test_the_frozen_gate_argmax_of_the_golden_case_flips_the_routing():
    start, likelihood = cases.A2_START, cases.a2_likelihood()
    r, mask = np.asarray(start.responsibilities(cases.A2_X, cases.A2_Y)), np.asarray(start.routing(cases.A2_X))
    z = np.column_stack([np.ones(10), cases.A2_X])

    def loss(free):
        logits = np.where(mask, z @ np.vstack([free.reshape(2, 2), [[0, 0]]]).T, -np.inf)
        log_pi = logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
        gradient = -(r - np.exp(log_pi)).T @ z
        return -np.sum(r * np.where(mask, log_pi, 0)), gradient[:2].ravel()

    found = scipy.optimize.minimize(loss, np.zeros(4), jac=True, method="BFGS", options={"gtol": 1e-10}).x
    np.testing.assert_allclose(found.reshape(2, 2), cases.A2_ARGMAX[:2], atol=1e-6)
    there = moe.Mixture.from_matrices(cases.A2_ARGMAX, cases.A2_EXPERTS, cases.A2_VARIANCE, 2)
    assert abs(float(likelihood.log_likelihood(there)) - cases.A2_ARGMAX_LIKELIHOOD) < 1e-11
    assert (np.asarray(there.routing(cases.A2_X)) != mask).any()


@pytest.mark.parametrize(("gate", "steps"), [("newton", 14), ("bohning", 400), pytest.param("official", 200, marks=pytest.mark.slow)])
def test_every_gate_step_reaches_the_golden_maximum(gate, steps):
    sol = tl.iterate(cases.s1_likelihood(), moe.EM(gate), S1, steps=steps)
    assert abs(sol.history["log_likelihood"][-1] - cases.A5_LIKELIHOOD) < 1e-8
    np.testing.assert_allclose(sol.value.pack(), cases.A5_FIT, atol=2e-5)
    assert sol.history["score_norm"][-1] < 1e-8 and sol.history["gain"][-1] < 1e-12 and sol.history["rejected"][-1] == 0


def test_the_likelihood_never_falls_and_a_batch_of_runs_is_its_single_runs():
    likelihood, starts = cases.s1_likelihood(), [perturbed(S1, seed) for seed in range(6)]
    batch = tl.iterate(likelihood, moe.EM(), jax.tree.map(lambda *a: jnp.stack(a), *starts), steps=40, runs=6)
    assert np.diff(batch.history["log_likelihood"], axis=0).min() > -1e-10
    assert batch.history["rejected"][-1].max() > 0
    single = tl.iterate(likelihood, moe.EM(), starts[1], steps=10)
    np.testing.assert_allclose(batch.history["log_likelihood"][:11, 1], single.history["log_likelihood"], atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["slope", "logit"])
def test_the_likelihood_never_falls_in_two_dimensions(selection):
    truth = moe.example("S3", selection=selection)
    likelihood = moe.Likelihood(*truth.sample(200, key=0, low=-1.0), 4, 2, selection)
    starts = jax.tree.map(lambda *a: jnp.stack(a), *(perturbed(truth, seed) for seed in range(6)))
    sol = tl.iterate(likelihood, moe.EM(), starts, steps=60, runs=6)
    assert np.diff(sol.history["log_likelihood"], axis=0).min() > -1e-10
    assert sol.history["rejected"][-1].max() > 0


def test_frozen_routing_keeps_the_rows_where_they_were():
    likelihood = cases.s1_likelihood()
    for seed in range(3):
        start = perturbed(S1, seed)
        mask = np.asarray(likelihood.routing(start))
        sol = tl.iterate(likelihood, moe.EM(routing="frozen"), start, steps=30)
        assert sol.history["gain"][1:].min() > -1e-13
        assert (np.asarray(likelihood.routing(sol.value)) == mask).all()
        for given in (None, jnp.asarray(mask)):
            np.testing.assert_allclose(sol.history["log_likelihood"][-1], float(likelihood.log_likelihood(sol.value, given)), rtol=1e-13)


def test_a_frozen_step_goes_as_far_as_the_routing_allows():
    """The golden Newton step would turn the second slope to 0.73, above the third; half of it leaves the order of the slopes alone."""
    sol = tl.iterate(cases.a2_likelihood(), moe.EM(routing="frozen", ridge=0.0), cases.A2_START, steps=1)
    np.testing.assert_allclose(sol.value.gate_matrix, (cases.A2_START.gate_matrix + cases.A2_NEWTON) / 2, atol=1e-12)
    np.testing.assert_allclose(sol.value.expert_matrix, cases.A2_EXPERTS, atol=1e-12)
    assert sol.history["rejected"][-1] == 1


def test_one_kept_expert_leaves_the_gate_alone():
    truth = moe.example("S0")
    likelihood = moe.Likelihood(*moe.weyl_sample(truth, 400), 2, 1, "logit")
    sol = tl.iterate(likelihood, moe.EM(), truth, steps=3)
    assert (sol.value.gate_matrix == truth.gate_matrix).all()
    x, y = np.asarray(likelihood.x[:, 0]), np.asarray(likelihood.y)
    for expert, rows in ((0, x > 0.32), (1, x < 0.32)):
        slope, intercept = np.polyfit(x[rows], y[rows], 1)
        np.testing.assert_allclose(sol.value.expert_matrix[expert], [intercept, slope], rtol=1e-10)
    assert sol.history["score_norm"][-1] < 1e-10 and not sol.history["gate_diverging"].any()


def test_an_expert_with_too_few_rows_keeps_its_parameters_and_is_counted():
    start = S1.replace(expert_intercept=jnp.asarray([-1.0, 0.5, 500.0]))
    sol = tl.iterate(cases.s1_likelihood(), moe.EM(), start, steps=10)
    assert (sol.history["starved"][1:] == 1).all()
    assert sol.value.expert_intercept[2] == 500.0 and sol.value.variance[2] == S1.variance[2]
    assert np.isfinite(sol.history["log_likelihood"]).all() and (np.diff(sol.history["log_likelihood"]) > -1e-10).all()


def test_a_gross_outlier_leaves_a_finite_fit():
    x, y = cases.s1_data()
    likelihood = moe.Likelihood(x, np.where(np.arange(400) == 50, 1e8, y), 3, 2)
    sol = tl.iterate(likelihood, moe.EM(), S1, steps=30)
    assert np.isfinite(sol.history["log_likelihood"]).all() and np.isfinite(sol.value.pack()).all()
    assert float(sol.value.variance.min()) >= 1e-6 * float(likelihood.spread) * (1 - 1e-12)


def test_points_on_lines_stop_at_the_variance_floor():
    x, y = moe.weyl_sample(S1.replace(variance=np.full(3, 1e-20)), 400, -1.0, 1.0)
    likelihood = moe.Likelihood(x, y, 3, 2)
    sol = tl.iterate(likelihood, moe.EM(variance_floor=1e-4), S1, steps=5)
    np.testing.assert_allclose(sol.value.variance, 1e-4 * float(likelihood.spread), rtol=1e-12)
    np.testing.assert_allclose(sol.value.expert_matrix, S1.expert_matrix, atol=1e-8)


def test_separated_experts_are_flagged():
    x = np.asarray(cases.s1_data().x)
    at = x[:, 0]
    expert = np.digitize(at, [-0.5, 0.5])
    lines = np.asarray(S1.expert_intercept)[expert] + np.asarray(S1.expert_coef)[expert, 0] * at
    likelihood = moe.Likelihood(x, lines + 0.1 * np.cos(50 * at), 3, 2)
    sol = tl.iterate(likelihood, moe.EM(), S1, steps=60)
    assert not sol.history["gate_diverging"][1] and sol.history["gate_diverging"][-1]
    assert np.isfinite(sol.value.pack()).all()
    good = tl.iterate(cases.s1_likelihood(), moe.EM(), S1, steps=60)
    assert not good.history["gate_diverging"].any()


@pytest.mark.slow
def test_a_constant_column_gets_a_fit_of_the_same_likelihood():
    x, y = (np.asarray(a) for a in cases.s1_data())
    with pytest.warns(errors.RunWarning):
        likelihood = moe.Likelihood(np.column_stack([x, np.ones(400)]), y, 3, 2)
    pad = lambda a: np.column_stack([a, np.zeros(3)])
    start = S1.replace(gate_coef=pad(S1.gate_coef), expert_coef=pad(S1.expert_coef))
    sol = tl.iterate(likelihood, moe.EM(), start, steps=20)
    assert abs(sol.history["log_likelihood"][-1] - cases.A5_LIKELIHOOD) < 1e-6


def test_far_and_scaled_inputs_give_the_same_fit():
    x, y = (np.asarray(a) for a in cases.s1_data())
    truth = moe.example("S1", selection="logit")
    near = tl.iterate(moe.Likelihood(x, y, 3, 2, "logit"), moe.EM(), truth, steps=25)
    move = lambda w: np.column_stack([w[:, 0] - 1000 * w[:, 1], w[:, 1]])
    gate, experts = move(np.asarray(truth.gate_matrix)), move(np.asarray(truth.expert_matrix)) + [500, 0]
    start = moe.Mixture.from_matrices(gate, experts, truth.variance, 2, "logit")
    far = tl.iterate(moe.Likelihood(x + 1000, y + 500, 3, 2, "logit"), moe.EM(), start, steps=25)
    np.testing.assert_allclose(far.history["log_likelihood"], near.history["log_likelihood"], atol=1e-6)
    np.testing.assert_allclose(far.value.variance, near.value.variance, rtol=1e-7)


def fit_padded(params, key, i):
    """A fit of a sample whose size is a number, not a shape."""
    x, y = S1.sample(128, key=key, low=-1.0)
    weight = (jnp.arange(128) < params["rows"]).astype(x.dtype)
    sol = tl.iterate(moe.Likelihood(x, y, 3, 2, weight=weight), moe.EM(), S1, steps=15, keep="last")
    return {"log_likelihood": sol.history["log_likelihood"][-1], "variance": sol.value.variance}


@pytest.mark.slow
def test_a_sweep_fits_many_samples_of_any_size():
    table = tl.sweep(fit_padded, {"rows": 100}, 4, key=0)
    x, y = S1.sample(128, key=run_key(0, 2), low=-1.0)
    alone = tl.iterate(moe.Likelihood(x[:100], y[:100], 3, 2), moe.EM(), S1, steps=15)
    np.testing.assert_allclose(table["log_likelihood"][2], alone.history["log_likelihood"][-1], atol=1e-8)
    np.testing.assert_allclose(table["variance"][2], alone.value.variance, rtol=1e-6)


@pytest.mark.slow
def test_single_precision_fits_in_single_precision():
    likelihood = cases.s1_likelihood(dtype=jnp.float32)
    start = jax.tree.map(lambda a: a.astype(jnp.float32), S1)
    sol = tl.iterate(likelihood, moe.EM(), start, steps=20)
    assert sol.value.dtype == jnp.float32
    assert abs(sol.history["log_likelihood"][-1] - cases.A5_LIKELIHOOD) < 2e-2
    assert (np.diff(sol.history["log_likelihood"]) > -1e-3).all()


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: moe.EM("gradient"), errors.ArgumentError, "EM: gate must be one of 'newton', 'bohning', 'official'"),
    (lambda: moe.EM(routing="search"), errors.ArgumentError, "EM: routing must be one of"),
    (lambda: moe.EM(ridge=-1.0), errors.ArgumentError, "ridge"),
    (lambda: moe.EM(variance_floor=-1.0), errors.ArgumentError, "variance_floor"),
    (lambda: tl.iterate(cases.a2_likelihood(), moe.EM(), moe.example("S2"), steps=1), errors.ShapeError, "x0 must have 3 experts"),
    (lambda: tl.iterate(cases.a2_likelihood(), moe.EM(), jnp.ones(3), steps=1), errors.ArgumentError, "x0 must be a Mixture"),
    (lambda: tl.iterate(cases.s1_likelihood(per_pass=2), moe.EM(), S1, steps=1), errors.ArgumentError, "StreamedEM"),
])
def test_wrong_arguments_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
