"""Derivatives through `integrate`: forward, reverse, batched and repeated, against closed forms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import theorylab as tl
from theorylab.core.integrate import integrate
from theorylab.core.replay import repeat_while


class Power(tl.Flow):
    """y' = rate y^2: y(t) = y0 / (1 - rate (t - t0) y0)."""

    rate: Any

    def field(self, t: jax.Array, y: jax.Array) -> jax.Array:
        return self.rate * y * y

    def metrics(self, t: jax.Array, y: jax.Array) -> dict:
        return {"total": y.sum()}


TIMES = jnp.array([0.0, 0.3, 0.8])
POINT = jnp.asarray(0.9), jnp.array([0.5, 1.0]), TIMES
WEIGHTS = np.array([[0.3, -1.0], [2.0, 0.7], [1.0, 0.5]])


def exact(rate: jax.Array, y0: jax.Array, times: jax.Array) -> jax.Array:
    return (y0 / (1 - rate * (times - times[0])[:, None] * y0) * WEIGHTS).sum()


def solved(rate: jax.Array, y0: jax.Array, times: jax.Array) -> jax.Array:
    return (integrate(Power(rate), y0, times, max_steps=200).value * WEIGHTS).sum()


@pytest.fixture(scope="module")
def gradient():
    """One compiled program: a batch of reverse-mode derivatives with respect to the flow and the initial state."""
    return jax.jit(jax.vmap(jax.grad(solved, (0, 1)), (0, 0, None)))


def test_reverse_mode_in_a_batch_agrees_with_the_closed_form(gradient):
    rates, y0 = jnp.array([0.9, -2.0, 0.4]), jnp.array([[0.5, 1.0], [0.3, 3.0], [1.0, 2.0]])
    found, wanted = gradient(rates, y0, TIMES), jax.vmap(jax.grad(exact, (0, 1)), (0, 0, None))(rates, y0, TIMES)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_forward_mode_agrees_with_the_closed_form():
    dots = jnp.asarray(0.7), jnp.array([-0.2, 0.4]), jnp.array([0.1, -0.3, 0.2])
    found, wanted = jax.jit(lambda *dots: jax.jvp(solved, POINT, dots))(*dots), jax.jvp(exact, POINT, dots)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_the_derivative_of_a_run_that_blows_up_is_that_of_its_last_state(gradient):
    """Beyond t* the rows repeat the state at a fixed end time, so every derivative is finite."""
    found = gradient(jnp.array([0.9, 0.9, 0.9]), jnp.broadcast_to(POINT[1], (3, 2)), 3.0 * TIMES)
    assert all(np.isfinite(np.asarray(a)).all() for a in found)
    # the component that is finite at the end, t* = 1 / 0.9: d/dy0 of y0 / (1 - rate t y0) for y0 = 0.5 at t = 0, 0.9 and t*
    slope = [1.0, (1 - 0.9 * 0.9 * 0.5) ** -2, (1 - 0.9 / 0.9 * 0.5) ** -2]
    np.testing.assert_allclose(found[1][0, 0], np.dot(WEIGHTS[:, 0], slope), rtol=1e-6)


def test_columns_have_derivatives_too():
    def total(y0: jax.Array) -> jax.Array:
        return integrate(Power(0.9), y0, TIMES).history["total"][-1]

    y0 = POINT[1]
    tangent = jax.jit(lambda y0: jax.jvp(total, (y0,), (jnp.ones(2),))[1])(y0)
    np.testing.assert_allclose(tangent, ((1 - 0.9 * 0.8 * y0) ** -2).sum(), rtol=1e-6)


def test_repeat_while_is_a_while_loop_with_reverse_mode():
    def run(x: jax.Array) -> jax.Array:
        body = lambda s: (s[0] + 1, jnp.where(s[0] < 5, s[1] * jnp.sin(s[1] + x), s[1]))
        return repeat_while(lambda s: s[0] < 5, body, (jnp.asarray(0), x), 300)[1]

    def plain(x: jax.Array) -> jax.Array:
        y = x
        for _ in range(5):
            y = y * jnp.sin(y + x)
        return y

    x = jnp.asarray(1.3)
    np.testing.assert_allclose(run(x), plain(x), rtol=1e-14)
    np.testing.assert_allclose(jax.grad(run)(x), jax.grad(plain)(x), rtol=1e-13)
