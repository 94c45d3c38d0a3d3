"""Oracles: every regime on a case that is known by hand, blow-up times and their derivatives, limits, ranks, energies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, MatrixError, NoClosedFormError, ShapeError

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
V = np.array([[0.6, -0.3], [0.2, 0.5]])
COV = np.array([[0.8, 0.25], [0.25, 0.5]])
START = tp.Gaussian(np.zeros(2), COV)
EYE = np.eye(2)
TURN = np.array([[0.0, 1.0], [-1.0, 0.0]])
ROW = np.array([[0.6, 0.8], [0.0, 0.0]])                              # rank one, padded so that all heads have one shape
SCHUR = COV - np.outer(COV @ ROW[0], COV @ ROW[0]) / (ROW[0] @ COV @ ROW[0])
FLOW = tp.GaussianFlow

CASES = {
    "softmax number, positive form": (tp.Softmax(EYE, EYE, 1.0), "BLOWUP", 1),
    "softmax number, negative form": (tp.Softmax(-EYE, EYE, 1.0), "ZERO", 0),
    "softmax number, negative rank one": (tp.Softmax(ROW, -ROW, 1.0), "FROZEN", 1),
    "softmax number, skew form": (tp.Softmax(TURN, EYE, 1.0), "ROTATING", 2),
    "softmax matrix, positive form": (tp.Softmax(EYE, EYE, EYE), "BLOWUP", 1),
    "softmax matrix, negative form": (tp.Softmax(-EYE, EYE, EYE), "ZERO", 0),
    "softmax matrix, negative rank one": (tp.Softmax(ROW, -ROW, EYE), "FROZEN", 1),
    "l2, keys equal queries": (tp.L2(EYE, EYE, EYE), "GROWING", 2),
    "l2, keys opposite": (tp.L2(-EYE, EYE, EYE), "ZERO", 0),
    "l2, one row": (tp.L2(ROW, -ROW, EYE), "FROZEN", 1),
    "l2, singular keys": (tp.L2([[0.0, 1.0], [0, 0]], [[1.0, 0.0], [0, 0]], np.diag([0.0, 1.0])), "BLOWUP", 1),
}


@pytest.mark.parametrize("name", CASES)
def test_each_regime_is_recognized(name):
    head, regime, rank = CASES[name]
    found = tp.limit(FLOW(head), START)
    assert (found.regime.name, int(found.rank)) == (regime, rank)
    assert found.regime is tp.regime(FLOW(head), START) and found.regime.sentence.startswith("the covariance")
    time = float(tp.blow_up_time(FLOW(head), START))
    assert np.isfinite(time) == (regime == "BLOWUP") and time > 0
    if regime == "FROZEN":
        np.testing.assert_allclose(found.cov, SCHUR, atol=1e-9)
        assert np.linalg.norm(found.cov - SCHUR) <= max(float(found.error), 1e-15)
    if regime in ("BLOWUP", "GROWING"):
        assert float(jnp.trace(found.cov)) == pytest.approx(1, abs=1e-9)


def test_a_rotation_is_told_from_a_frozen_state():
    found = tp.limit(FLOW(tp.Softmax(EYE, EYE, TURN)), tp.Gaussian.standard(2))
    assert found.regime is tp.Regime.ROTATING and int(found.rank) == 2
    np.testing.assert_allclose(found.cov, EYE, atol=1e-12)


def test_the_blow_up_of_singular_keys_is_found_without_knowing_its_exponent():
    start = tp.Gaussian(np.zeros(2), [[1.0, 0.5], [0.5, 2.0]])
    assert float(tp.blow_up_time(FLOW(CASES["l2, singular keys"][0]), start)) == pytest.approx(3.0, rel=1e-10)      # 3 / (2 b0), exponent 2


def test_a_batch_has_the_closed_form_of_its_lanes_and_the_clock_agrees(rng):
    roots = rng.normal(size=(2, 3, 2, 2))
    starts = tp.Gaussian.from_factor(np.zeros((2, 3, 2)), roots)
    closed = FLOW(tp.Softmax(Q, K, 1.0))
    form = np.swapaxes(roots, -1, -2) @ (K.T @ Q + Q.T @ K) @ roots
    exact = 1 / np.linalg.eigvalsh(form)[..., -1]
    np.testing.assert_allclose(tp.blow_up_time(closed, starts), exact, rtol=1e-12)
    found = tp.limit(closed, starts)
    assert found.regime.shape == (2, 3) and (found.regime == tp.Regime.BLOWUP).all()
    one = tp.Gaussian.from_factor(np.zeros(2), roots[1, 2])
    clock = FLOW(tp.Softmax(Q, K, EYE))
    np.testing.assert_allclose(tp.limit(clock, one).cov, found.cov[1, 2], atol=1e-7)
    assert float(tp.blow_up_time(clock, one)) == pytest.approx(exact[1, 2], rel=1e-9)


def test_the_gradient_of_the_blow_up_time_is_that_of_the_formula():
    # dt*/dA = -2 v t*^2 (L u)(L u)', u the top eigenvector
    L, v = np.asarray(START.factor), 0.7
    values, vectors = np.linalg.eigh(v * L.T @ (K.T @ Q + Q.T @ K) @ L)
    t, u = 1 / values[-1], L @ vectors[:, -1]
    change = np.array([[0.3, -1.0], [0.4, 0.2]])
    got = jax.jvp(lambda A: tp.blow_up_time(FLOW(tp.Softmax.bilinear(A, v)), START), (jnp.asarray(K.T @ Q),), (jnp.asarray(change),))
    assert float(got[0]) == pytest.approx(t, rel=1e-13)
    assert float(got[1]) == pytest.approx(-2 * v * t**2 * u @ change @ u, rel=1e-11)


def test_no_blow_up_has_no_gradient_and_no_nan():
    slope = jax.grad(lambda s: tp.blow_up_time(FLOW(tp.Softmax(s * EYE, EYE, -1.0)), START))(1.0)
    assert float(slope) == 0.0


@pytest.mark.parametrize("head", [tp.Softmax.bilinear(COV, 1.3 * COV), tp.Softmax.bilinear(-COV, COV), tp.L2(0.6 * K, K, -0.8 * K.T @ K)],
                         ids=["softmax", "softmax negative", "l2"])
def test_the_flow_descends_its_energy_in_the_bures_geometry(head):
    state = tp.Gaussian(np.zeros(2), [[1.1, -0.3], [-0.3, 0.6]])
    L = state.factor
    slope = jax.grad(lambda factor: tp.energy(head, tp.Gaussian.from_factor(jnp.zeros(2), factor)))(L)     # 2 (gradient of F) L
    np.testing.assert_allclose(head.factor_velocity(state.mean, L)[1], -slope, rtol=1e-11, atol=1e-13)     # L' = -2 (gradient of F) L


BAD = {
    "noise": (lambda: tp.limit(FLOW(tp.Softmax(Q, K, V), noise=0.1, form="covariance"), START), NoClosedFormError, "for attention alone"),
    "feed-forward": (lambda: tp.blow_up_time(FLOW(tp.L2(Q, K, V), (V, None)), START), NoClosedFormError, "this flow has feed_forward"),
    "flow": (lambda: tp.regime(tp.Softmax(Q, K, V), START), ArgumentError, "flow must be a GaussianFlow, got Softmax"),
    "state": (lambda: tp.limit(FLOW(tp.Softmax(Q, K, V)), COV), ArgumentError, "state must be a Gaussian, got ndarray"),
    "dim": (lambda: tp.blow_up_time(FLOW(tp.Softmax(Q, K, 1.0)), tp.Gaussian.standard(3)), ShapeError, "state must have dimension 2"),
    "A": (lambda: tp.energy(tp.Softmax(Q, K, V), START), MatrixError, "needs a symmetric matrix A"),
    "V": (lambda: tp.energy(tp.Softmax(K, K, V), START), MatrixError, "V to be a multiple of A"),
    "V of L2": (lambda: tp.energy(tp.L2(K, K, V), START), MatrixError, "V to be a multiple of P"),
    "Q": (lambda: tp.energy(tp.L2(Q, K, K.T @ K), START), MatrixError, "needs Q to be a multiple of K"),
    "mean": (lambda: tp.energy(tp.L2(K, K, K.T @ K), START.replace(mean=np.ones(2))), MatrixError, "zero mean"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
