"""Tokens on the sphere: the definition, the equiangular reduction, the energy, and the clusters at the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.clusters import clusters
from theorylab.transformer_pde.spherical import Spherical, equiangular_rate

BETA, D = 1.5, 4
KINDS = {True: tp.Softmax, False: tp.Exponential}
TIMES = np.array([0.0, 0.7, 2.0])


def head(normalized, scale=BETA):
    return KINDS[normalized](jnp.eye(D), jnp.eye(D), 1.0, scale=scale)


def dense_rate(x, normalized):
    """From the definition."""
    weight = np.exp(BETA * x @ x.T)
    moved = (weight / (weight.sum(1, keepdims=True) if normalized else len(x))) @ x
    return moved - (x * moved).sum(1, keepdims=True) * x


@pytest.mark.parametrize("normalized", [True, False])
def test_the_velocity_is_the_projected_one(normalized):
    x = np.random.default_rng(0).normal(size=(D, D))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = Spherical(head(normalized)).field(0.0, tp.Cloud(x)).points
    np.testing.assert_allclose(found, dense_rate(x, normalized), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose((np.asarray(found) * x).sum(1), 0.0, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("normalized", [True, False])
def test_equal_angles_follow_the_scalar_equation(normalized):
    rho = 0.1
    x = np.linalg.cholesky((1 - rho) * np.eye(D) + rho)
    sol = tl.integrate(Spherical(head(normalized)), x, TIMES, rtol=1e-10, atol=1e-12)
    rate = jax.jit(lambda c: equiangular_rate(c, D, BETA, normalized))
    exact = scipy.integrate.solve_ivp(lambda t, y: np.asarray(rate(jnp.asarray(y))), (0, 2), [rho], t_eval=TIMES, rtol=1e-11, atol=1e-13,
                                      method="DOP853").y[0]
    grams = np.asarray(sol.value.points @ jnp.swapaxes(sol.value.points, 1, 2))
    apart = ~np.eye(D, dtype=bool)
    np.testing.assert_allclose(grams[:, apart], np.broadcast_to(exact[:, None], (3, apart.sum())), atol=1e-9)
    np.testing.assert_allclose(grams[:, ~apart], 1.0, atol=1e-10)


def test_the_ends_of_the_scalar_equation_are_at_rest():
    assert float(equiangular_rate(1.0, 5, 2.0)) == 0 == float(equiangular_rate(-0.25, 5, 2.0, False))
    np.testing.assert_allclose(equiangular_rate(jnp.array([0.0, 0.5]), 3, 0.0), [2 / 3, 2 / 3])                 # beta 0: the plain mean attracts


@pytest.mark.parametrize("normalized", [True, False])
def test_the_energy_increases_and_tokens_gather(normalized):
    start = tp.Gaussian.standard(D).sample(20, key=1)
    sol = tl.integrate(Spherical(head(normalized)), start, np.array([0.0, 0.5, 1.0, 2.0, 4.0, 30.0]))
    points = np.asarray(sol.value.points)
    energy = np.exp(BETA * points @ np.swapaxes(points, 1, 2)).mean((1, 2)) / (2 * BETA)
    assert (np.diff(energy) > 0).all()
    last = jax.tree.map(lambda a: a[-1], sol.value)
    assert clusters(last, 1e-3).count == 1 and clusters(jax.tree.map(lambda a: a[0], sol.value), 1e-3).count == 20
    np.testing.assert_allclose(sol.history["radius"], 1.0, atol=1e-8)


def test_initial_tokens_are_put_on_the_sphere_and_single_precision_is_kept():
    lifted = Spherical(head(True)).lift(np.full((3, D), 7.0, np.float32))
    np.testing.assert_allclose(lifted.points, 0.5, rtol=1e-6)
    assert lifted.points.dtype == np.float32


def test_a_zero_token_and_wrong_arguments_are_named():
    with pytest.raises(ArgumentError, match="got a zero token"):
        tl.integrate(Spherical(head(True)), np.zeros((3, D)), TIMES)
    with pytest.raises(ShapeError, match="must have dimension 4"):
        tl.integrate(Spherical(head(True)), np.ones((3, 2)), TIMES)
    with pytest.raises(ArgumentError, match="the state of Spherical must be a Cloud"):
        tl.integrate(Spherical(head(True)), tp.Gaussian.standard(D), TIMES)
    with pytest.raises(ArgumentError, match="count must be a whole number at least 2, got 1"):
        equiangular_rate(0.0, 1, 1.0)
    with pytest.raises(ArgumentError, match="cosine must be at least"):
        equiangular_rate(-0.9, 5, 1.0)
