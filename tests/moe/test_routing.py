"""The routing search finds partitions that EM cannot; the scan is the best of all partitions; the optimizer is SciPy's equal."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import theorylab as tl
from tests.moe.cases import s1_likelihood
from theorylab.errors import ArgumentError, ShapeError
from theorylab.moe.annealing import _soft_log_density, standard, with_gate
from theorylab.moe.em import EM
from theorylab.moe.lbfgs import lbfgs
from theorylab.moe.model import example
from theorylab.moe.problem import Likelihood
from theorylab.moe.routing import Routing, RoutingSearch, _patterns, best_run, perturbed, scattered
from theorylab.moe.scan import scan_breakpoints

S0, S1 = example("S0"), example("S1")


def s0_likelihood(n=300, key=0, **options):
    return Likelihood(*S0.sample(n, key=key), experts=2, active=1, selection="logit", **options)


def reference(likelihood, start):
    """What EM reaches."""
    return float(likelihood.log_likelihood(tl.iterate(likelihood, EM(), start, steps=100, stop=tl.Below("gain", 1e-9), throw=False).value))


@pytest.mark.slow
def test_four_starts_that_know_nothing_find_the_two_lines():
    likelihood = s0_likelihood()
    solution = tl.iterate(Routing(likelihood), RoutingSearch(), steps=25, stop=Routing(likelihood).goal(1e-7), runs=4, throw=False)
    fit = best_run(solution)
    assert float(likelihood.log_likelihood(fit)) > reference(likelihood, S0) - 1e-6 * 300
    assert (np.diff(solution.history["log_likelihood"], axis=0)[solution.history.valid[1:]] >= -1e-9).all()
    crossing = -float((fit.gate_intercept[0] - fit.gate_intercept[1]) / (fit.gate_coef[0, 0] - fit.gate_coef[1, 0]))
    assert crossing == pytest.approx(0.32, abs=0.02)
    # EM alone stays where it starts
    assert reference(likelihood, Routing(likelihood).start(jax.random.key(0))) < reference(likelihood, S0) - 0.1 * 300


@pytest.mark.slow
@pytest.mark.parametrize(("selection", "noise"), [("slope", 0.5), ("logit", 0.5)])
def test_nine_of_ten_wrong_gates_in_the_plane_are_repaired(selection, noise):
    truth, good = example("S3", selection=selection), 0
    for seed in range(10):
        likelihood = Likelihood(*truth.sample(1500, key=seed, low=-1.0), experts=4, active=2, selection=selection)
        rng = np.random.default_rng(seed)
        shift = noise * rng.normal(size=(4, 3))
        wrong = truth.replace(gate_intercept=truth.gate_intercept + shift[:, 0], gate_coef=truth.gate_coef + shift[:, 1:])
        found = tl.iterate(likelihood, RoutingSearch(4), wrong, steps=25, stop=tl.Below("gain", 1e-7), throw=False, key=seed)
        good += float(found.history.last("log_likelihood")) > reference(likelihood, truth) - 2e-3 * 1500
    assert good >= 9


@pytest.mark.slow
def test_solve_needs_no_start():
    likelihood = s1_likelihood()
    fit = tl.iterate(likelihood, RoutingSearch(4), steps=60, stop=likelihood.goal(1e-6))
    assert float(likelihood.log_likelihood(fit.value)) > -360.0198504
    assert fit.status == tl.Status.CONVERGED


def test_standardized_gates_are_the_same_gates():
    likelihood = s1_likelihood()
    again = with_gate(likelihood, S1, standard(likelihood, S1.gate_matrix))
    np.testing.assert_allclose(again.gate_matrix, S1.gate_matrix, atol=1e-13)


def test_the_soft_model_turns_into_the_hard_one_as_it_cools():
    likelihood = s1_likelihood()
    away = jnp.abs(likelihood.x[:, 0]) > 0.05  # from the boundary x = 0
    for truth in (S1, example("S1", selection="logit")):
        soft = _soft_log_density(truth, likelihood.x, likelihood.y, jnp.asarray(1e-4))
        kept = away if truth.selection == "slope" else jnp.ones_like(away)
        sure = np.asarray(kept & (jnp.sort(truth.scores(likelihood.x), axis=1)[:, 1] - jnp.sort(truth.scores(likelihood.x), axis=1)[:, 0] > 0.01))
        np.testing.assert_allclose(soft[sure], truth.log_density(likelihood.x, likelihood.y)[sure], atol=1e-12)


def test_lbfgs_minimises_as_scipy_does():
    def rosenbrock(v):
        return jnp.sum(100 * (v[1:] - v[:-1] ** 2) ** 2 + (1 - v[:-1]) ** 2)

    start = np.array([-1.2, 1.0, -0.5, 0.8])
    x, value = jax.jit(lambda v: lbfgs(rosenbrock, v, 300))(jnp.asarray(start))
    np.testing.assert_allclose(x, scipy.optimize.rosen(np.ones(4)) + np.ones(4), atol=1e-6)
    assert float(value) < 1e-12


def test_perturbed_starts_keep_the_first_and_move_gates_only():
    starts = perturbed(s1_likelihood(), S1, 5, key=0)
    np.testing.assert_allclose(starts.gate_matrix[0], S1.gate_matrix, atol=1e-13)
    assert np.abs(np.asarray(starts.gate_matrix[1:]) - np.asarray(S1.gate_matrix)).min() > 0
    np.testing.assert_array_equal(starts.expert_matrix, np.broadcast_to(S1.expert_matrix, (5, 3, 2)))


def test_a_scattered_start_fits_each_expert_to_its_neighbourhood():
    """By weighted least squares with weights .9 and .1 shares."""
    likelihood = s1_likelihood()
    start = scattered(likelihood, key=4)                                                     # no row lies midway between two centers
    z = np.column_stack([np.ones(400), likelihood.x])
    logits = z @ np.asarray(start.gate_matrix).T
    share = 0.9 * (logits.argmax(axis=1)[:, None] == np.arange(3)) + 0.1 / 3
    for j in range(3):
        w = np.sqrt(share[:, j])
        np.testing.assert_allclose(start.expert_matrix[j], np.linalg.lstsq(w[:, None] * z, w * np.asarray(likelihood.y), rcond=None)[0], atol=1e-8)
    standardized = standard(likelihood, start.gate_matrix)
    np.testing.assert_allclose(standardized[:, 0], -((standardized[:, 1] / 2) ** 2), atol=1e-12)


@pytest.mark.parametrize("selection", ["slope", "logit"])
def test_a_round_of_patterns_climbs_by_the_gate_alone(selection):
    truth = example("S3", selection=selection)
    likelihood = Likelihood(*truth.sample(200, key=0, low=-1.0), experts=4, active=2, selection=selection)
    wrong = truth.replace(gate_coef=truth.gate_coef[::-1])
    found = jax.jit(lambda m: _patterns(likelihood, m, jax.random.key(0), True))(wrong)
    np.testing.assert_array_equal(found.expert_matrix, wrong.expert_matrix)
    before, after, best = (float(likelihood.log_likelihood(m)) for m in (wrong, found, truth))
    assert after > before + 0.5 * (best - before)
    again = jax.jit(lambda m: _patterns(likelihood, m, jax.random.key(1), True))(found)
    assert float(likelihood.log_likelihood(again)) >= after - 1e-9


def brute_scan(logs):
    """The best value over all ordered choices of experts and cuts between sorted rows."""
    k, n = logs.shape
    sums = np.concatenate([np.zeros((k, 1)), np.cumsum(logs, axis=1)], axis=1)
    best = -np.inf
    for size in range(1, k + 1):
        for order in itertools.permutations(range(k), size):
            for cuts in itertools.combinations(range(1, n), size - 1):
                ends = (0, *cuts, n)
                best = max(best, sum(sums[j, b] - sums[j, a] for j, (a, b) in zip(order, itertools.pairwise(ends), strict=True)))
    return best


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_scan_is_the_best_of_all_partitions(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(-1, 1, 18), rng.normal(size=18)
    m = S1.replace(active=1, selection="logit", expert_coef=jnp.asarray(rng.normal(size=(3, 1))))
    found = scan_breakpoints(Likelihood(x, y, 3, 1, "logit"), m)
    order = np.argsort(x)
    mean = np.asarray(m.expert_intercept) + np.outer(x[order], np.asarray(m.expert_coef)[:, 0])
    logs = -0.5 * ((y[order, None] - mean) ** 2 / np.asarray(m.variance) + np.log(2 * np.pi * np.asarray(m.variance)))
    assert found.log_likelihood == pytest.approx(brute_scan(logs.T), rel=1e-12)
    middles = np.concatenate([[-1.0], found.breakpoints, [1.0]])
    at = found.mixture.routing(((middles[1:] + middles[:-1]) / 2)[:, None])
    assert tuple(np.argmax(at, axis=1).tolist()) == found.order


def test_the_scan_of_slopes_serves_two_half_lines():
    rng = np.random.default_rng(5)
    x, y = rng.uniform(-1, 1, 30), rng.normal(size=30)
    m = S1.replace(active=1)
    likelihood = Likelihood(x, y, 3, 1, "slope")
    found = scan_breakpoints(likelihood, m)
    values = []
    for order in itertools.permutations((-1.0, 0.0, 1.0)):
        values.append(float(likelihood.log_likelihood(m.replace(gate_coef=jnp.asarray(order)[:, None]))))
    values.append(float(likelihood.log_likelihood(m.replace(gate_coef=jnp.zeros((3, 1))))))
    assert found.log_likelihood == pytest.approx(max(values), rel=1e-12)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: Routing(S1), ArgumentError, "likelihood must be a Likelihood, got Mixture"),
    (lambda: scattered(S1, key=0), ArgumentError, "the problem must be a Likelihood or a Routing"),
    (lambda: perturbed(s1_likelihood(), S0, 2, key=0), ShapeError, "mixture must have 3 experts"),
    (lambda: perturbed(s1_likelihood(), S1, 0, key=0), ArgumentError, "runs must be"),
    (lambda: RoutingSearch(0), ArgumentError, "starts must be at least 1"),
    (lambda: RoutingSearch(temperatures=(1.0, 0.0)), ArgumentError, "temperatures must be above 0"),
    (lambda: RoutingSearch(anneal="no"), ArgumentError, "anneal must be one of"),
    (lambda: tl.iterate(s1_likelihood(), RoutingSearch(), S0, steps=1), ShapeError, "x0 must have 3 experts"),
    (lambda: scan_breakpoints(s1_likelihood(), S1), ArgumentError, "needs one input, one active expert"),
    (lambda: scan_breakpoints(3, S1), ArgumentError, "likelihood must be a Likelihood, got int"),
])
def test_wrong_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
