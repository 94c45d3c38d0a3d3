"""The clock that never ends: it traces the same covariances, stops for the right reason, and its solver has its order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, NoClosedFormError, ShapeError
from theorylab.transformer_pde.rosenbrock import rosenbrock

Q = np.array([[0.5, 0.2], [-0.1, 0.4]])
K = np.array([[0.3, -0.4], [0.2, 0.5]])
V = np.array([[0.6, -0.3], [0.2, 0.5]])
HEAD = tp.Softmax(Q, K, V)
START = tp.Gaussian(np.zeros(2), np.array([[0.8, 0.25], [0.25, 0.5]]))
KINDS = {"softmax": tp.Softmax, "l2": tp.L2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_desingularized_clock_traces_the_same_covariances(kind):
    flow = tp.Desingularized(KINDS[kind](Q, K, V))
    path = tl.integrate(flow, START, [0.0, 3.0], rtol=1e-11, atol=1e-13).value
    assert path.time[1] > path.time[0] == 0
    there = tl.integrate(tp.GaussianFlow(KINDS[kind](Q, K, V)), START, np.asarray(path.time), rtol=1e-11, atol=1e-13).value
    np.testing.assert_allclose(np.exp(path.log_trace)[:, None, None] * path.cov, there.cov, rtol=1e-8)
    np.testing.assert_allclose(path.square(), 1, atol=1e-9)
    going_on = tl.integrate(flow, tp.last(path), [3.0, 4.0], rtol=1e-11, atol=1e-13).value
    assert float(going_on.time[-1]) > float(path.time[-1]) == float(going_on.time[0])


def test_the_zero_covariance_and_zero_weights_stay_where_they_are():
    zero = np.zeros((2, 2))
    for head, state in ((HEAD, tp.Gaussian.from_factor(np.zeros(2), zero)), (tp.L2(Q, K, zero), START), (tp.Softmax(zero, zero, V), START)):
        sol = tl.integrate(tp.Desingularized(head), state, [0.0, 3.0])
        assert sol.status == tl.Status.CONVERGED and np.isfinite(jax.tree.leaves(sol.value)[0]).all()
        assert sol.steps == 0


def test_the_motion_along_the_clock_gives_the_exponent_of_an_approach():
    # along Sigma = S + t^-p E the lagged logarithm of the motion t^-(p+1) stands p + 1 above it; a state is put there by hand
    flow = tp.Desingularized(tp.Softmax(-np.eye(2), np.eye(2), np.diag([1.0, 2.0])))
    y = flow.lift(START)
    size = float(y.trend[0]) * 1e6
    for p in (0.5, 1.0):
        there = y.replace(trend=jnp.array([size + p + 1, size + 2 * (p + 1)]) / 1e6)
        assert float(flow.signs(there).order) == pytest.approx(p, abs=1e-9)


def test_the_implicit_solver_has_order_five_and_crosses_stiffness():
    class Spiral(tl.Flow):
        def field(self, t, y):
            return jnp.stack([-(y[0] ** 3) - y[1] / 2, y[0] - y[1] ** 2])

    y0 = jnp.array([1.0, 0.5])
    exact = tl.integrate(Spiral(), y0, [0.0, 2.0], rtol=1e-12, atol=1e-14).value[-1]
    errors = [np.abs(tl.integrate(Spiral(), y0, [0.0, 2.0], step=h, solver=rosenbrock()).value[-1] - exact).max() for h in (0.05, 0.025)]
    assert 4.6 < np.log2(errors[0] / errors[1]) < 5.4


BAD = {
    "clock state": (lambda: tl.integrate(tp.Desingularized(HEAD), 1.0, [0.0, 1.0]), ArgumentError, "must be a Gaussian, got"),
    "clock attention": (lambda: tp.Desingularized(np.eye(2)), ArgumentError, "attention must be a Softmax, .* got ndarray"),
    "clock tokens": (lambda: tp.Desingularized(tp.Masked(HEAD)), ArgumentError, "which Masked does not"),
    "clock mean": (lambda: tl.integrate(tp.Desingularized(tp.Linear(*[np.eye(2)] * 3)), tp.Gaussian(np.ones(2), np.eye(2)), [0.0, 1.0]),
                   NoClosedFormError, "use a state of zero mean"),
    "clock dim": (lambda: tl.integrate(tp.Desingularized(HEAD), tp.Gaussian.standard(1), [0.0, 1.0]), ShapeError, "must have dimension 2 .* got 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
