"""EM over a stream: the same mixtures as EM in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from tests.moe import cases
from tests.moe.cases import perturbed
from theorylab import errors, moe

S1 = moe.example("S1")


def stream(batch_size: int = 64) -> tl.Rows:
    return tl.Rows(tuple(np.asarray(a) for a in cases.s1_data()), batch_size, remainder="weight")


def test_passes_are_the_steps_of_em_in_memory():
    rows = stream()
    likelihood = moe.Likelihood.streamed(rows, 3, 2)
    sol = tl.iterate(likelihood, moe.StreamedEM(rows.per_pass), S1, steps=13 * rows.per_pass, every=rows.per_pass, data=rows)
    memory = tl.iterate(cases.s1_likelihood(), moe.EM(), S1, steps=12)
    assert sol.history["log_likelihood"][0] == -np.inf and sol.history["gain"][0] == np.inf
    np.testing.assert_allclose(sol.history["log_likelihood"][1:], memory.history["log_likelihood"], rtol=1e-12)
    np.testing.assert_allclose(sol.history["gain"][2:], memory.history["gain"][1:], atol=1e-12)
    np.testing.assert_allclose(sol.value.pack(), memory.value.pack(), atol=1e-11)
    assert abs(sol.history["log_likelihood"][-1] - cases.A5_LIKELIHOOD) < 1e-8


def test_a_stream_need_not_be_read_beforehand():
    x, y = (np.asarray(a) for a in cases.s1_data())
    rows = tl.Rows(np.column_stack([x, y]), 64, columns=(1, 1), remainder="weight")
    sol = tl.iterate(moe.Likelihood.streamed(experts=3, active=2), moe.StreamedEM(rows.per_pass), S1, steps=13 * rows.per_pass,
                     every=rows.per_pass, data=rows)
    assert abs(sol.history["log_likelihood"][-1] - cases.A5_LIKELIHOOD) < 1e-8
    np.testing.assert_allclose(sol.value.pack(), cases.A5_FIT, atol=2e-5)
    assert sol.history["score_norm"][-1] < 1e-6


def test_refused_steps_cost_a_pass_and_keep_the_likelihood_monotone():
    rows = stream()
    likelihood = moe.Likelihood.streamed(rows, 3, 2)
    start = perturbed(S1, 2)                        # EM in memory refuses a fraction in each of its first two steps from here
    sol = tl.iterate(likelihood, moe.StreamedEM(rows.per_pass), start, steps=13 * rows.per_pass, every=rows.per_pass, data=rows)
    memory = tl.iterate(cases.s1_likelihood(), moe.EM(), start, steps=12)
    assert memory.history["rejected"][:4].tolist() == [0, 1, 2, 2]
    assert sol.history["rejected"][:7].tolist() == [0, 0, 1, 1, 2, 2, 2]
    accepted = sol.history["log_likelihood"][[1, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13]]
    np.testing.assert_allclose(accepted, memory.history["log_likelihood"][:11], rtol=1e-11)
    assert (np.diff(sol.history["log_likelihood"][1:]) > -1e-10).all()


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: moe.StreamedEM(0), errors.ArgumentError, "StreamedEM: per_pass must be at least 1"),
    (lambda: tl.iterate(moe.Likelihood.streamed(experts=3, active=2), moe.EM(), S1, steps=1), errors.ArgumentError, "use StreamedEM"),
    (lambda: moe.Likelihood.streamed(experts=3, active=4), errors.ArgumentError, "active must be"),
    (lambda: moe.StreamedEM(3, gate="no"), errors.ArgumentError, "gate must be one of"),
    (lambda: tl.iterate(cases.s1_likelihood(), moe.StreamedEM(3), S1, steps=1), errors.ArgumentError, "per_pass must be that of the problem, None"),
    (lambda: tl.iterate(cases.s1_likelihood(per_pass=3), moe.StreamedEM(3), moe.example("S2"), steps=1), errors.ShapeError, "x0 must have 3"),
])
def test_wrong_arguments_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_state_does_not_grow_with_the_rows():
    sizes = []
    for batch_size in (64, 256):
        likelihood = moe.Likelihood.streamed(stream(batch_size), 3, 2)
        state = jax.eval_shape(lambda m, likelihood=likelihood: moe.StreamedEM(2).init(likelihood, m, key=jnp.zeros(2)), S1)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(state)))
    assert sizes[0] == sizes[1] < 200
