"""Networks of finite depth: the residual layers and the published Euler scheme, against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, ShapeError

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
V = np.array([[0.6, -0.3], [0.2, 0.5]])
HEAD = tp.Softmax(Q, K, V)
START = tp.Gaussian(np.array([0.3, -0.2]), np.array([[0.8, 0.25], [0.25, 0.5]]))


def test_a_layer_moves_every_token_by_its_velocity():
    state, x = START, np.random.default_rng(0).normal(size=(3, 2))
    mean, cov = np.asarray(state.mean), np.asarray(state.cov)
    for _ in range(5):
        m, B = (np.asarray(a) for a in tp.velocity(HEAD, tp.Gaussian(mean, cov)))
        J = np.eye(2) + 0.1 * B
        mean, cov, x = mean + 0.1 * m, J @ cov @ J.T, x + 0.1 * (m + (x - mean) @ B.T)
    sol = tl.iterate(HEAD, tp.ResidualLayers(0.1), state, steps=5)
    np.testing.assert_allclose(sol.value.cov, cov, rtol=1e-12)
    np.testing.assert_allclose(sol.value.mean, mean, rtol=1e-12)


def test_both_schemes_approach_the_flow_at_first_order():
    exact = np.asarray(tl.integrate(tp.GaussianFlow(HEAD), START, [0.0, 1.0]).value.cov[-1])
    depths = np.array([20, 40, 80, 160])
    for method in (tp.ResidualLayers, tp.OfficialEuler):
        errors = [np.linalg.norm(tl.iterate(HEAD, method(1 / n), START, steps=int(n), keep="last", every=int(n)).value.cov - exact) for n in depths]
        assert tl.fit_rate(depths, errors).slope == pytest.approx(-1, abs=0.03)


def test_the_published_scheme_clips_a_step_that_leaves_the_cone():
    head = tp.Softmax.bilinear(np.array([[-1.0, 0.0], [0.0, -0.1]]), 1.0)
    sol = tl.iterate(head, tp.OfficialEuler(1.0), tp.Gaussian.standard(2), steps=1)
    np.testing.assert_allclose(np.linalg.eigvalsh(sol.value.cov), [1e-14, 0.8], rtol=1e-9)
    assert tl.iterate(head, tp.ResidualLayers(1.0), tp.Gaussian.standard(2), steps=1).history["eigenvalues"][-1].min() >= 0


def test_the_published_scheme_stops_where_a_numpy_loop_stops():
    head = tp.Softmax(Q, -Q, 1.0)
    cov, count = np.asarray(START.cov), 0
    while True:
        B = -cov @ Q.T @ Q
        rate = B @ cov + cov @ B.T
        if np.linalg.norm(rate) < 1e-3:
            break
        cov, count = cov + 0.1 * rate, count + 1
    sol = tl.iterate(head, tp.OfficialEuler(0.1), START, steps=5000, stop=tl.Below("residual", 1e-3) | tl.Above("trace", 1e3))
    assert sol.steps == count
    np.testing.assert_allclose(sol.value.cov, cov, rtol=1e-9)


def test_wrong_arguments_are_named():
    with pytest.raises(ArgumentError, match="x0 must be a Gaussian or a Cloud, got"):
        tl.iterate(HEAD, tp.ResidualLayers(0.1), np.eye(2), steps=1)
    with pytest.raises(ShapeError, match="x0 must have dimension 2 to match the attention, got 3"):
        tl.iterate(HEAD, tp.OfficialEuler(0.1), tp.Gaussian.standard(3), steps=1)
    with pytest.raises(ArgumentError, match="ResidualLayers: step_size must be above 0, got 0"):
        tp.ResidualLayers(0)
