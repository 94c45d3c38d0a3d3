"""Blow-up directions, frozen lines and stationary states: the published matrices, and runs that go where the numbers say."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.stability import blow_up_lines, frozen_lines, stationarity

Q = np.array([[0.6764132657544725, 1.5210991859339182], [-0.5118762450490144, 1.150194635377595]])
K = np.array([[-0.5907168066359194, -0.7687652516461853], [-0.33500916605030867, 0.09299944353450965]])
V_TWO = np.array([[-0.3488944509894251, 0.9837034333517989], [0.5809228307171408, 0.07028444085744995]])
V_MIXED = np.array([[1.8317530059587854, -0.37688784393619434], [0.34811234158600607, -0.11628155656536983]])
EYE, TURN = np.eye(2), np.array([[0.0, 1.0], [-1.0, 0.0]])


def angles(directions: np.ndarray) -> np.ndarray:
    return np.degrees(np.arctan(directions[:, 1] / directions[:, 0]))


def test_the_published_lines_have_the_published_stability():
    published = ((V_TWO, [[-1.154, -0.313], [-0.782, -0.569]], [True, True]), (V_MIXED, [[1.948, 0.529], [-0.947, -0.690]], [False, True]))
    for V, numbers, attracting in published:
        found = frozen_lines(tp.Softmax(Q, K, V))
        order = np.argsort(angles(np.asarray(found.directions)))
        np.testing.assert_allclose(angles(np.asarray(found.directions))[order], [-58.144, -7.599], atol=2e-3)
        np.testing.assert_allclose(np.asarray(found.numbers)[order], numbers, atol=2e-3)
        assert np.asarray(found.attracting)[order].tolist() == attracting
        assert np.asarray(found.repelling)[order].tolist() == [not a for a in attracting]
        given = frozen_lines(tp.Softmax(Q, K, V), 2 * np.asarray(found.directions))
        np.testing.assert_allclose(given.numbers, found.numbers, rtol=1e-9)


def test_a_definite_form_has_no_frozen_line():
    found = frozen_lines(tp.Softmax(EYE, EYE, V_TWO))
    assert np.isnan(np.asarray(found.directions)).all() and not np.asarray(found.attracting).any()


def test_the_published_blow_up_direction_is_the_stable_one():
    found = blow_up_lines(tp.Softmax(Q, K, V_MIXED))
    np.testing.assert_allclose(angles(np.asarray(found.directions)), [10.50, 78.65], atol=5e-3)
    np.testing.assert_allclose(found.rates, [-1.035, 0.06441], atol=5e-4)
    assert found.attracting.tolist() == [False, True]


def test_complex_eigenvalues_have_no_line_and_count_with_their_real_part():
    V = np.zeros((3, 3))
    V[:2, :2], V[2, 2] = 0.5 * EYE + TURN, 2.0
    found = blow_up_lines(tp.Softmax(np.eye(3), np.eye(3), V))
    assert np.isnan(np.asarray(found.directions)[1:]).all() and np.abs(np.asarray(found.directions)[0]).tolist() == [0, 0, 1]
    assert found.numbers[0] == pytest.approx(-1.5) and found.attracting.tolist() == [True, False, False]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_run_that_blows_up_ends_on_the_attracting_line_at_its_rate(sign):
    V = sign * np.array([[1.5, 0.4, 0.1], [0.2, 1.0, -0.1], [0.0, 0.3, 0.4]])
    A = sign * (np.eye(3) + np.array([[0.0, 0.4, 0.2], [-0.1, 0.2, 0.0], [0.1, 0.0, -0.1]]))
    found = blow_up_lines(tp.Softmax.bilinear(A, V))
    assert int(found.attracting.sum()) == 1
    i = int(np.argmax(found.attracting))
    u, rate = np.asarray(found.directions)[i], float(found.rates[i])

    def field(s, y):                                                     # desingularized: the trace is one, the last entry is its logarithm
        R = y[:9].reshape(3, 3)
        D = V @ R @ (R.T @ A @ R)
        c = (R * D).sum()
        return np.append((D - c * R).ravel(), 2 * c)

    y = scipy.integrate.solve_ivp(field, (0, 60), np.append(np.eye(3).ravel() / np.sqrt(3), 0.0), rtol=1e-10, atol=1e-13).y[:, -1]
    R = y[:9].reshape(3, 3)
    np.testing.assert_allclose(R @ R.T, np.outer(u, u), atol=1e-6)
    assert field(0, y)[-1] == pytest.approx(2 * rate, rel=1e-6)                           # tr ~ 1 / (2 rate (t* - t))


def test_stationary_states_freeze_or_rotate():
    A = np.diag([1.0, 2.0, -1.0, -3.0])
    L = np.zeros((4, 2))
    L[[0, 2], 0], L[1, 1], L[3, 1] = 1, 1, np.sqrt(2 / 3)
    frozen = tp.Gaussian.from_factor(np.zeros(4), L)
    V = np.arange(16.0).reshape(4, 4)
    for head in (tp.Softmax.bilinear(A, V), tp.L2(A, np.eye(4), V), tp.Sinkhorn(A, np.eye(4), V)):
        assert float(stationarity(head, frozen).motion) < 1e-13
    turning = stationarity(tp.Softmax(EYE, EYE, TURN), tp.Gaussian.standard(2))
    assert float(turning.residual) < 1e-15 and float(turning.motion) == pytest.approx(np.sqrt(2))
    np.testing.assert_allclose(turning.rotation, TURN, atol=1e-15)


def test_the_residual_is_the_distance_to_the_nearest_rotation():
    head, L = tp.Softmax(Q, K, V_MIXED), np.array([[1.0, 0.3], [-0.2, 0.8]])
    moved = np.asarray(head.factor_velocity(jnp.zeros(2), jnp.asarray(L))[1])
    angles = np.linspace(-20, 20, 200001)                                                # all skew matrices of this size
    distance = np.sqrt(((moved[None] - angles[:, None, None] * (L @ TURN)) ** 2).sum((1, 2))).min()
    assert float(stationarity(head, tp.Gaussian.from_factor(np.zeros(2), L)).residual) == pytest.approx(distance, rel=1e-6)


BAD = {
    "blow-up class": (lambda: blow_up_lines(tp.L2(Q, K, V_TWO)), ArgumentError, "softmax or linear head, got L2"),
    "frozen class": (lambda: frozen_lines(tp.MultiHead([tp.Softmax(Q, K, V_TWO)])), ArgumentError, "single head, got MultiHead"),
    "frozen dim": (lambda: frozen_lines(tp.Softmax(np.eye(3), np.eye(3), 1.0)), ShapeError, "directions must be given in dimension 3"),
    "shape": (lambda: frozen_lines(tp.Softmax(Q, K, V_TWO), [1.0, 0.0]), ShapeError, r"shape \(count, 2\), got \(2,\)"),
    "not isotropic": (lambda: frozen_lines(tp.Softmax(Q, K, V_TWO), [[1.0, 0.0]]), ArgumentError, "must satisfy u.T A u = 0"),
    "state": (lambda: stationarity(tp.Softmax(Q, K, V_TWO), tp.Gaussian.standard(3)), ShapeError, "dimension 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
