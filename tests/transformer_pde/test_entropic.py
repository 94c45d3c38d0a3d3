"""Sinkhorn attention: the closed form on Gaussians against Sinkhorn--Knopp on quadrature tokens, its contraction and its derivative."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.special import logsumexp

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError
from theorylab.transformer_pde.entropic import contraction

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
V = np.array([[0.6, -0.3], [0.2, 0.5]])
MEAN, COV = np.array([0.3, -0.2]), np.array([[0.8, 0.25], [0.25, 0.5]])
HEAD = tp.Sinkhorn(Q, K, V, temperature=0.7)


def knopp(x: np.ndarray, w: np.ndarray, temperature: float) -> np.ndarray:
    """Velocities of weighted tokens, by alternating normalization in the log domain."""
    logits, f, g = (x @ Q.T) @ (x @ K.T).T / temperature, np.zeros(len(x)), np.zeros(len(x))
    for _ in range(60):
        f = -logsumexp(logits + g[None] + np.log(w)[None], axis=1)
        g = -logsumexp(logits + f[:, None] + np.log(w)[:, None], axis=0)
    plan = np.exp(logits + f[:, None] + g[None]) * w[None]
    return plan / plan.sum(1, keepdims=True) @ x @ V.T / temperature


def test_the_velocity_on_a_gaussian_is_that_of_its_quadrature_cloud():
    state = tp.Gaussian(MEAN, COV)
    cloud = state.quadrature(18)
    x, w = np.asarray(cloud.points), np.asarray(cloud.weights)
    mean, matrix = tp.velocity(HEAD, state)
    error = knopp(x, w, 0.7) - np.asarray(mean + (x - MEAN) @ matrix.T)
    assert np.sqrt(w @ (error**2).sum(1)) < 1e-10


def test_the_coupling_solves_the_optimality_equation_of_entropic_transport():
    # S^-1 C = (M / eps) (S - C^T S^-1 C), with C the cross-covariance of the plan and M = A^T
    B = np.asarray(tp.velocity(HEAD, tp.Gaussian(MEAN, COV)).matrix)
    C = (0.7 * np.linalg.inv(V) @ B @ COV).T                           # B = V C^T S^-1 / eps
    M = np.asarray(HEAD.A).T / 0.7
    np.testing.assert_allclose(np.linalg.inv(COV) @ C, M @ (COV - C.T @ np.linalg.inv(COV) @ C), atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_contraction_is_the_root_that_the_matrix_square_root_gives(size, rng):
    N = rng.normal(size=(size, size))
    by_root = 2 * N @ np.linalg.inv(np.eye(size) + sqrtm(np.eye(size) + 4 * N.T @ N).real)
    np.testing.assert_allclose(contraction(jnp.asarray(N)), by_root, atol=1e-13)


def test_small_singular_values_keep_their_digits_beside_large_ones():
    left, right = (np.linalg.qr(np.random.default_rng(s).normal(size=(2, 2)))[0] for s in (0, 1))
    T = np.asarray(contraction(jnp.asarray(left @ np.diag([1e6, 1e-6]) @ right.T)))
    assert (left.T @ T @ right)[1, 1] == pytest.approx(1e-6, rel=1e-3)      # the product of three matrices loses what is 1e-16 of 1e6


@pytest.mark.parametrize("N", [np.eye(2), np.zeros((2, 2)), np.diag([2.0, 0.0]), np.array([[0.3, -1.0], [0.4, 0.2]])])
def test_derivatives_are_finite_at_repeated_and_vanishing_singular_values(N):
    E, h = np.array([[0.2, 0.5], [-0.7, 1.1]]), 1e-5
    difference = (contraction(jnp.asarray(N + h * E)) - contraction(jnp.asarray(N - h * E))) / (2 * h)
    slope = jax.jvp(contraction, (jnp.asarray(N),), (jnp.asarray(E),))[1]
    np.testing.assert_allclose(slope, difference, atol=1e-9)
    pulled = jax.vjp(contraction, jnp.asarray(N))[1](jnp.asarray(E))[0]
    np.testing.assert_allclose((pulled * E).sum(), (slope * E).sum(), atol=1e-12)


def test_a_singular_covariance_and_a_singular_head_need_no_inverse(rng):
    factor, one = rng.normal(size=(3, 1)), rng.normal(size=(1, 3))
    head = tp.Sinkhorn(one, 2 * one, 1.0)
    moved = np.asarray(head.factor_velocity(jnp.zeros(3), jnp.asarray(factor))[1])
    n = float((one @ factor)[0, 0] * 2 * (one @ factor)[0, 0])
    np.testing.assert_allclose(moved, factor * 2 * n / (1 + np.sqrt(1 + 4 * n * n)), rtol=1e-13)
    B = np.asarray(tp.velocity(head, tp.Gaussian.from_factor(np.zeros(3), factor)).matrix)
    np.testing.assert_allclose(B @ factor, moved, rtol=1e-6)              # the root of a singular covariance has half the digits


def test_a_high_temperature_turns_it_into_linear_attention():
    linear = np.asarray(tp.velocity(tp.Linear(Q, K, V), tp.Gaussian(np.zeros(2), COV)).matrix)
    sinkhorn = lambda eps: np.asarray(tp.velocity(tp.Sinkhorn(Q, K, V, temperature=eps), tp.Gaussian(MEAN, COV)).matrix)
    gaps = [np.linalg.norm(eps**2 * sinkhorn(eps) - linear) for eps in (10.0, 20.0)]
    assert gaps[0] / gaps[1] == pytest.approx(4, abs=0.05)              # the deviation is of second order in 1 / eps


def test_the_mean_only_translates():
    sol = tl.integrate(tp.GaussianFlow(HEAD), tp.Gaussian(MEAN, COV), [0.0, 1.0], rtol=1e-10)
    values, vectors = np.linalg.eig(V / 0.7)
    exact = (vectors @ np.diag(np.exp(values)) @ np.linalg.inv(vectors)).real @ MEAN
    np.testing.assert_allclose(sol.value.mean[-1], exact, rtol=1e-9)


def test_golden_values_at_depth_one():
    sol = tl.integrate(tp.GaussianFlow(HEAD), tp.Gaussian(MEAN, COV), [0.0, 1.0], rtol=1e-12, atol=1e-13)
    cov = np.asarray(sol.value.cov[-1])
    np.testing.assert_allclose([cov[0, 0], cov[0, 1], cov[1, 1]], [1.0946216692166, 0.328482886108, 0.6481483138641], atol=2e-13)


def test_a_temperature_that_is_not_positive_is_refused():
    for bad in (0.0, -1.0):
        with pytest.raises(ArgumentError, match="temperature must be above 0"):
            tp.Sinkhorn(Q, K, V, temperature=bad)
    with pytest.raises(ArgumentError, match="cannot be masked"):
        HEAD.token_velocity(jnp.zeros((3, 2)), causal=True)
