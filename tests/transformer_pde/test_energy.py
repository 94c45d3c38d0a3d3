"""Energies: the flow is their gradient flow by automatic differentiation, they agree with transport costs, and hypotheses are checked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, MatrixError
from theorylab.transformer_pde.energy import energy, interaction_energy, lyapunov

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
COV = np.array([[0.8, 0.25], [0.25, 0.5]])
FORM = np.array([[0.7, 0.3], [0.3, -0.4]])
MOBILITY = np.array([[1.0, 0.2], [0.2, 0.6]])
MEAN = np.array([0.4, -0.3])
EYE, ZERO = np.eye(2), np.zeros(2)
STATE = tp.Gaussian(ZERO, [[1.1, -0.3], [-0.3, 0.6]])
MOVED = STATE.replace(mean=MEAN)

HEADS = {
    "softmax": (tp.Softmax.bilinear(FORM, 1.3 * FORM), STATE, None),
    "softmax, ascent": (tp.Softmax.bilinear(FORM, -FORM), STATE, None),
    "softmax, mobility": (tp.Softmax.bilinear(FORM, MOBILITY @ FORM), STATE, MOBILITY),
    "V = I, A negative": (tp.Softmax.bilinear(-COV, 1.0), STATE, np.linalg.inv(COV)),
    "linear with mean": (tp.Linear(FORM, EYE, 0.7 * FORM), MOVED, None),
    "l2": (tp.L2(0.6 * K, K, -0.8 * K.T @ K), STATE, None),
    "l2, mobility": (tp.L2(-K, K, MOBILITY @ K.T @ K), STATE, MOBILITY),
    "sinkhorn with mean": (tp.Sinkhorn(FORM, EYE, FORM, temperature=0.7), MOVED, None),
    "sinkhorn, ascent": (tp.Sinkhorn(COV, EYE, -2 * COV), MOVED, None),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_flow_descends_its_energy_in_the_bures_geometry(name):
    head, state, mobility = HEADS[name]
    M = EYE if mobility is None else mobility
    slope, mean_slope = jax.grad(lambda L, m: energy(head, tp.Gaussian.from_factor(m, L), mobility), argnums=(0, 1))(state.factor, state.mean)
    mean, moved = head.factor_velocity(state.mean, state.factor)
    np.testing.assert_allclose(moved, -M @ slope, rtol=1e-11, atol=1e-13)                  # slope is 2 (gradient of F) L
    np.testing.assert_allclose(mean, -M @ mean_slope if state is MOVED else 0, rtol=1e-11, atol=1e-13)


def test_the_sinkhorn_energy_is_the_entropic_cost_of_the_measure_to_itself():
    eps, nodes = 0.7, STATE.replace(mean=MEAN).quadrature(20)
    points, weights = np.asarray(nodes.points), np.asarray(nodes.weights)
    logits, log_w = points @ FORM @ points.T / eps, np.log(weights)
    f = g = np.zeros(len(weights))
    logsumexp = lambda a: a.max(1) + np.log(np.exp(a - a.max(1)[:, None]).sum(1))
    for _ in range(300):
        f = -logsumexp(logits + (g + log_w))
        g = -logsumexp(logits.T + (f + log_w))
    cost = eps * (weights @ (f + g))                                                     # the dual value: -x'Ay + eps KL(pi | mu x mu)
    head = tp.Sinkhorn(FORM, EYE, FORM, temperature=eps)
    assert float(energy(head, MOVED)) == pytest.approx(cost / (2 * eps), abs=1e-10)


def test_the_interaction_energy_is_the_double_integral_and_is_infinite_where_that_is():
    head = tp.Softmax.bilinear(0.5 * FORM, 0.5 * FORM)
    nodes = STATE.quadrature(30)
    points, weights = np.asarray(nodes.points), np.asarray(nodes.weights)
    assert float(interaction_energy(head, STATE)) == pytest.approx(weights @ np.exp(points @ head.A @ points.T) @ weights / 2, rel=1e-12)
    far = tp.Gaussian(ZERO, 20 * np.asarray(STATE.cov))
    assert float(interaction_energy(head, far)) == np.inf
    slope = jax.grad(lambda s: interaction_energy(head, tp.Gaussian.from_factor(ZERO, s * far.factor)))(1.0)
    assert not np.isnan(float(slope))


def test_the_interaction_energy_rises_as_the_weighted_metric_says():
    head, L = tp.Softmax.bilinear(0.5 * FORM, 0.5 * FORM), STATE.factor
    rate = jax.jvp(lambda L: interaction_energy(head, tp.Gaussian.from_factor(ZERO, L)), (L,), (head.factor_velocity(STATE.mean, L)[1],))[1]
    nodes = STATE.quadrature(30)
    points, weights = np.asarray(nodes.points), np.asarray(nodes.weights)
    Z = np.exp(points @ head.A @ points.T) @ weights
    speed = np.asarray(head.token_velocity(nodes.points, nodes.weights)[0])               # the gradient of the variation is Z times the velocity
    assert float(rate) == pytest.approx(weights @ (Z * (speed**2).sum(1)), rel=1e-10)


@pytest.mark.parametrize("head", [tp.Softmax(-K, K, MOBILITY), tp.Linear(-K, K, MOBILITY), tp.L2(-0.5 * K, K, MOBILITY),
                                  tp.Sinkhorn(Q - 1.5 * EYE, EYE, MOBILITY)], ids=["softmax", "linear", "l2", "sinkhorn, not symmetric"])
def test_the_lyapunov_function_does_not_increase(head, rng):
    for factor in rng.normal(size=(20, 2, 2)):
        moved = head.factor_velocity(STATE.mean, jnp.asarray(factor))[1]
        rate = jax.jvp(lambda L: lyapunov(head, tp.Gaussian.from_factor(ZERO, L)), (jnp.asarray(factor),), (moved,))[1]
        assert float(rate) <= 1e-13
        if isinstance(head, tp.Softmax):
            cov = factor @ factor.T
            assert float(rate) == pytest.approx(2 * np.trace(cov @ head.A @ cov), rel=1e-9)


def test_compiled_calls_and_single_precision():
    head = tp.Softmax.bilinear(jnp.asarray(FORM, jnp.float32), jnp.asarray(FORM, jnp.float32))
    state = tp.Gaussian.from_factor(jnp.zeros(2, jnp.float32), jnp.asarray(STATE.factor, jnp.float32))
    value = jax.jit(energy)(head, state)
    assert value.dtype == jnp.float32 and float(value) == pytest.approx(float(energy(HEADS["softmax"][0], STATE)) / 1.3, rel=1e-5)


S = tp.Softmax
BAD = {
    "A": (lambda: energy(S(Q, K, Q), STATE), MatrixError, "energy needs a symmetric matrix A"),
    "V": (lambda: energy(S(K, K, Q), STATE), MatrixError, "V to be a multiple of A"),
    "V of L2": (lambda: energy(tp.L2(K, K, Q), STATE), MatrixError, "V to be a multiple of P"),
    "Q": (lambda: energy(tp.L2(Q, K, K.T @ K), STATE), MatrixError, "needs Q to be a multiple of K"),
    "mean": (lambda: energy(tp.L2(K, K, K.T @ K), MOVED), MatrixError, "zero mean"),
    "mobility": (lambda: energy(S(K, K, Q), STATE, mobility=FORM), MatrixError, "mobility must be symmetric positive definite, got .* -0.4"),
    "V and mobility": (lambda: energy(S(K, K, Q), STATE, mobility=EYE), MatrixError, "multiple of mobility times the form"),
    "class": (lambda: energy(tp.MultiHead([S(K, K, Q)]), STATE), ArgumentError, "energy is known for softmax, .* got MultiHead"),
    "interaction sign": (lambda: interaction_energy(S.bilinear(FORM, -FORM), STATE), MatrixError, "positive multiple of A"),
    "interaction class": (lambda: interaction_energy(tp.L2(K, K, Q), STATE), ArgumentError, "defined for softmax attention, got L2"),
    "interaction mean": (lambda: interaction_energy(S.bilinear(FORM, FORM), MOVED), MatrixError, "zero mean"),
    "lyapunov V": (lambda: lyapunov(S(-K, K, FORM), STATE), MatrixError, "symmetric positive definite, got the eigenvalue -0.4"),
    "lyapunov A": (lambda: lyapunov(S(K, K, MOBILITY), STATE), MatrixError, "negative semidefinite"),
    "lyapunov L2": (lambda: lyapunov(tp.L2(-EYE - 0.1 * Q, EYE, MOBILITY), STATE), MatrixError, "Q to be a multiple of K"),
    "lyapunov mean": (lambda: lyapunov(tp.Linear(-K, K, MOBILITY), MOVED), MatrixError, "zero mean"),
    "lyapunov state": (lambda: lyapunov(S(-K, K, MOBILITY), tp.Gaussian.standard(3)), ArgumentError, "a Gaussian of dimension 2, got 3"),
    "lyapunov class": (lambda: lyapunov(tp.FeedForward(EYE), STATE), ArgumentError, "got FeedForward"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
