"""Newton on the observed log-likelihood: golden maximum, information, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from tests.moe import cases
from theorylab import errors, moe

S1 = moe.example("S1")


def finished(start: moe.Mixture, steps: int = 12, **options: object) -> tl.Solution:
    return tl.iterate(cases.s1_likelihood(), moe.LikelihoodNewton(**options), start, steps=steps)


def test_a_few_steps_after_em_reach_the_golden_maximum_and_its_standard_errors():
    rough = tl.iterate(cases.s1_likelihood(), moe.EM(), S1, steps=6).value
    sol = finished(rough, 4)
    assert sol.history["score_norm"][-1] < 1e-13
    assert abs(sol.history["log_likelihood"][-1] - cases.A5_LIKELIHOOD) < 1e-9
    np.testing.assert_allclose(sol.value.pack(), cases.A5_FIT, atol=1e-8)
    errors_ = np.sqrt(np.diag(np.linalg.inv(moe.information(cases.s1_likelihood(), sol.value))))
    np.testing.assert_allclose(errors_, cases.A5_ERRORS, rtol=5e-4)


def test_information_is_minus_the_hessian_by_differences_of_the_score():
    likelihood, m = cases.s1_likelihood(), cases.A4_OTHER
    point, step = np.asarray(m.pack()), 1e-5
    score = jax.jit(jax.grad(lambda v: likelihood.log_likelihood(m.unpack(v))))
    columns = [(score(point + step * e) - score(point - step * e)) / (2 * step) for e in np.eye(13)]
    found = np.asarray(moe.information(likelihood, m))
    np.testing.assert_allclose(found, -np.stack(columns), atol=2e-5 * np.abs(found).max() ** 0.5)
    np.testing.assert_allclose(found, found.T, atol=1e-9)


def test_far_starts_are_monotone_and_stay_in_the_domain():
    rng = np.random.default_rng(1)
    for _ in range(4):
        start = moe.Mixture.from_matrices(S1.gate_matrix + rng.normal(size=(3, 2)), S1.expert_matrix + rng.normal(size=(3, 2)), S1.variance, 2)
        sol = finished(start, radius=3.0)
        assert (np.diff(sol.history["log_likelihood"]) > -1e-10).all()
        assert sol.history["log_likelihood"][-1] > sol.history["log_likelihood"][0] + 1
        assert float(sol.value.variance.min()) > 0


def test_what_is_not_identified_stays_where_it_is():
    truth = moe.example("S0")
    likelihood = moe.Likelihood(*moe.weyl_sample(truth, 400), 2, 1, "logit")
    found = np.asarray(moe.information(likelihood, truth))
    assert (found[:2] == 0).all()
    sol = tl.iterate(likelihood, moe.LikelihoodNewton(), truth, steps=8)
    assert (sol.value.gate_matrix == truth.gate_matrix).all()
    x, y = np.asarray(likelihood.x[:, 0]), np.asarray(likelihood.y)
    for expert, rows in ((0, x > 0.32), (1, x < 0.32)):
        slope, intercept = np.polyfit(x[rows], y[rows], 1)
        np.testing.assert_allclose(sol.value.expert_matrix[expert], [intercept, slope], rtol=1e-9)
    assert sol.history["score_norm"][-1] < 1e-10


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: moe.LikelihoodNewton(radius=0.0), errors.ArgumentError, "radius must be above 0"),
    (lambda: tl.iterate(cases.s1_likelihood(), moe.LikelihoodNewton(), moe.example("S2"), steps=1), errors.ShapeError, "x0 must have 3"),
    (lambda: tl.iterate(cases.s1_likelihood(per_pass=2), moe.LikelihoodNewton(), S1, steps=1), errors.ArgumentError, "StreamedEM"),
    (lambda: moe.information(cases.s1_likelihood(per_pass=2), S1), errors.ArgumentError, "streamed"),
    (lambda: moe.information(cases.s1_likelihood(), moe.example("S2")), errors.ShapeError, "fit must have 3 experts"),
])
def test_wrong_arguments_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_derivatives_do_not_depend_on_chunks():
    likelihood = cases.s1_likelihood()
    whole, parts = moe.information(likelihood, S1), moe.information(likelihood.replace(chunk=150), S1)
    np.testing.assert_allclose(parts, whole, rtol=1e-10, atol=1e-10 * float(jnp.abs(whole).max()))
