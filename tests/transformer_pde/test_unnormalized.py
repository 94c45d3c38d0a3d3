"""Sigmoid and unnormalized exponential attention, and the linear one, against sums written out."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from theorylab import transformer_pde as tp

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
V = np.array([[0.6, -0.3], [0.2, 0.5]])
WEIGHTS = {"sigmoid": (tp.Sigmoid(Q, K, V, 0.7, -0.4), lambda z: 1 / (1 + np.exp(0.4 - z))), "exponential": (tp.Exponential(Q, K, V, 0.7), np.exp),
           "linear": (tp.Linear(Q, K, V, 0.7), lambda z: z)}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_velocity_of_a_token_is_the_sum_over_all(kind, rng):
    head, activation = WEIGHTS[kind]
    x, w, asked = rng.normal(size=(9, 2)), rng.dirichlet(np.ones(9)), rng.normal(size=(4, 2))
    direct = (activation(0.7 * (asked @ Q.T) @ (x @ K.T).T) * w) @ x @ V.T
    for tile in (1024, 3):
        moved, count = head.token_velocity(jnp.asarray(x), jnp.asarray(w), jnp.asarray(asked), tile)
        np.testing.assert_allclose(moved, direct, rtol=1e-12)
        np.testing.assert_allclose(count, 1 / (w @ w), rtol=1e-12)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_equal_weights_need_not_be_given(kind, rng):
    x = jnp.asarray(rng.normal(size=(9, 2)))
    head = WEIGHTS[kind][0]
    np.testing.assert_allclose(head.token_velocity(x)[0], head.token_velocity(x, jnp.full(9, 1 / 9))[0], rtol=1e-13)


def test_linear_attention_knows_the_moments_of_any_measure_only(rng):
    x = rng.exponential(size=(50, 2))                                             # far from Gaussian
    state = tp.moments(tp.Cloud(x))
    mean, matrix = tp.velocity(WEIGHTS["linear"][0], state)
    np.testing.assert_allclose(WEIGHTS["linear"][0].token_velocity(jnp.asarray(x))[0], mean + (x - state.mean) @ matrix.T, rtol=1e-11)


def test_linear_attention_is_softmax_attention_at_zero_mean():
    state = tp.Gaussian(np.zeros(2), np.array([[0.8, 0.25], [0.25, 0.5]]))
    np.testing.assert_allclose(tp.velocity(tp.Linear(Q, K, V), state).matrix, tp.velocity(tp.Softmax(Q, K, V), state).matrix, rtol=1e-14)
