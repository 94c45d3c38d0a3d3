"""Orbits of heads and states of rank one against an integrator that shares no code with the package."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, NoClosedFormError

RNG = np.random.default_rng(0)
ROOT, Q, K, V, MEAN = RNG.normal(size=(3, 3)), *(RNG.normal(size=(3, 3, 3)) * 0.5), RNG.normal(size=3)
STEADY = V + 1.5 * np.eye(3)                                        # eigenvalues with positive real parts: the orbits below do not escape
FULL, LINE = (tp.Gaussian.from_factor(np.zeros(3), ROOT[:, :r]) for r in (3, 1))


def assert_follows(head: tp.Attention, state: tp.Gaussian, end: float) -> None:
    """The covariances are those of the factor equation in NumPy, to 1e-12."""
    A, P, V, r = np.asarray(head.A), np.asarray(head.P), np.asarray(head.value_matrix), state.columns

    def field(t: float, y: np.ndarray) -> np.ndarray:
        L = y.reshape(3, r)
        form, gram = L.T @ A @ L, L.T @ P @ L
        if isinstance(head, tp.L2):
            form = 2 * np.linalg.solve(np.eye(r) + 2 * gram, form)
        elif isinstance(head, tp.Sinkhorn):
            left, s, right = np.linalg.svd(form / float(head.temperature))
            form = left @ np.diag(2 * s / (1 + np.sqrt(1 + 4 * s * s))) @ right / float(head.temperature)
        return (V @ L @ form).ravel()

    times = np.linspace(0, end, 5)
    sol = scipy.integrate.solve_ivp(field, (0, end), np.asarray(state.factor).ravel(), method="DOP853", rtol=1e-13, atol=1e-14, t_eval=times)
    factors = sol.y.T.reshape(-1, 3, r)
    got, cov = tp.closed_form(tp.GaussianFlow(head), state, times), factors @ np.swapaxes(factors, 1, 2)
    assert np.abs(got.cov - cov).max() < 2e-12 * np.abs(cov).max()


@pytest.mark.parametrize("kind", [tp.Softmax, tp.L2, tp.Sinkhorn])
def test_rank_one_states(kind):
    assert_follows(kind(Q, K, V), LINE, 0.3)
    assert_follows(kind(-Q, K, V), LINE, 0.3)
    assert_follows(kind(-K, K, STEADY), LINE, 50.0)


@pytest.mark.parametrize("kind", [tp.Softmax, tp.L2, tp.Sinkhorn])
def test_rank_one_heads(kind):
    q = Q[:1]
    assert_follows(kind(0.5 * q, q, V, 0.7), FULL, 0.3)
    assert_follows(kind(-q, q, STEADY, 0.7), FULL, 100.0)           # freezes: the clock stops at a zero of the orbit
    frozen = tp.closed_form(tp.GaussianFlow(kind(-q, q, STEADY, 0.7)), FULL, [1e9]).cov[0]
    assert np.abs(q @ frozen).max() < 1e-6                          # the limit has Q Sigma = 0


def test_a_rank_one_state_blows_up_where_a_number_as_value_says_so():
    flow = tp.GaussianFlow(tp.Softmax(K, K, np.eye(3)))
    end = float(tp.blow_up_time(tp.GaussianFlow(tp.Softmax(K, K, 1.0)), LINE))
    near = tp.closed_form(flow, LINE, [0.999 * end]).cov[0]
    np.testing.assert_allclose(near, LINE.cov * 1000, rtol=1e-9)    # 1 / (1 - t/t*)
    with pytest.raises(ArgumentError, match=f"times must lie below the blow-up time {end:.8f}"):
        tp.closed_form(flow, LINE, [1.001 * end])


BAD = {
    "mean of a state": (lambda: asked(LINE.replace(mean=MEAN), Q, K), NoClosedFormError, "state of zero mean"),
    "mean of a head": (lambda: asked(FULL.replace(mean=MEAN), K[:1], K[:1]), NoClosedFormError, "state of zero mean"),
    "ratio": (lambda: asked(FULL, Q[:1], K[:1]), NoClosedFormError, "not a multiple of K"),
    "traced": (lambda: jax.jit(lambda t: asked(LINE, Q, K, t).cov)(jnp.ones(1)), NoClosedFormError, "traced"),
}


def asked(state: tp.Gaussian, Q: np.ndarray, K: np.ndarray, times: object = (0.1,)) -> tp.Gaussian:
    return tp.closed_form(tp.GaussianFlow(tp.L2(Q, K, V)), state, times)


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_orbit_is_refused_with_the_reason(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
