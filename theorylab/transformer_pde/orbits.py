r"""Exact solutions on one orbit: heads and states of rank one move along $e^{\tau V} z_0$, each variant with its own clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.errors import ArgumentError, NoClosedFormError
from theorylab.transformer_pde.attention import L2, Head
from theorylab.transformer_pde.entropic import Sinkhorn
from theorylab.transformer_pde.gaussian import Gaussian

Array = jax.Array

HYPOTHESIS = 1e-12
"""Relative size below which a hypothesis (symmetry, proportional matrices, zero mean) counts as met."""
NODES, WEIGHTS = np.polynomial.legendre.leggauss(20)


def rank_one_state(attention: Head, state: Gaussian, times: Array) -> Gaussian:
    r"""$\Sigma_0 = u_0 u_0^\top$: $\Sigma = z z^\top$, $z = e^{\tau V} u_0$, with the clock of $a = z^\top A z$ and $p = z^\top P z$."""
    centered(state)
    u0, A, P = np.asarray(state.factor)[:, 0], np.asarray(attention.A), np.asarray(attention.P)

    def zero(z: np.ndarray) -> np.ndarray:
        return np.einsum("ni,ij,nj->n", z, A, z)

    def rate(z: np.ndarray) -> np.ndarray:
        return _clock(attention, zero(z), np.einsum("ni,ij,nj->n", z, P, z))

    z = _follow(np.asarray(attention.value_matrix), u0, rate, zero, np.asarray(times))
    return Gaussian.from_factor(jnp.zeros((len(z), state.dim)), jnp.asarray(z)[:, :, None])


def rank_one_head(attention: Head, state: Gaussian, times: Array) -> Gaussian:
    r"""One query $Q = r K = r q^\top$: $y_0 = \Sigma_0 q$, $s_0 = q^\top y_0$, $z = e^{\tau V} y_0$: $L = L_0 + (z - y_0)\, q^\top L_0 / s_0$."""
    centered(state)
    ratio, parallel = proportion(attention)
    if not bool(parallel):
        raise NoClosedFormError("no closed form is known for one row of queries that is not a multiple of K: use integrate")
    factor, q, c, r = np.asarray(state.factor), np.asarray(attention.K)[0], float(attention.scale), float(ratio)
    row = q @ factor
    s0 = float(row @ row)
    if s0 == 0 or r == 0:
        return Gaussian.from_factor(jnp.zeros((times.shape[0], state.dim)), jnp.broadcast_to(state.factor, (times.shape[0], *factor.shape)))
    y0 = factor @ row

    def zero(z: np.ndarray) -> np.ndarray:
        return z @ q

    def rate(z: np.ndarray) -> np.ndarray:
        p = c * zero(z) ** 2 / s0
        return _clock(attention, r * p, p)

    z = _follow(np.asarray(attention.value_matrix), y0, rate, zero, np.asarray(times))
    moved = factor[None] + (z - y0)[:, :, None] * row[None, None, :] / s0
    return Gaussian.from_factor(jnp.zeros((len(z), state.dim)), jnp.asarray(moved))


def _clock(attention: Head, a: np.ndarray, p: np.ndarray) -> np.ndarray:
    r"""$d\tau/dt$ of each variant: all three trace the same orbit at their own pace."""
    if isinstance(attention, L2):
        return 2 * a / (1 + 2 * p)
    if isinstance(attention, Sinkhorn):
        n = a / float(attention.temperature)
        return 2 * n / (float(attention.temperature) * (1 + np.sqrt(1 + 4 * n * n)))
    return a


def _follow(V: np.ndarray, z0: np.ndarray, rate: Callable, zero: Callable, times: np.ndarray) -> np.ndarray:
    r"""The points of the orbit $z = e^{\tau V} z_0$ at `times`, for the clock $\tau' = \mathrm{rate}(z)$ which stops where `zero` vanishes.

    $t(\tau) = \int d\tau / \mathrm{rate}$ is summed over panels by Gauss--Legendre quadrature, panels shrinking towards a zero of the rate, and
    inverted inside a panel through its Legendre series.
    """
    from scipy.linalg import expm

    speed0 = float(rate(z0[None])[0])
    if speed0 == 0 or not V.any():
        return np.repeat(z0[None], len(times), 0)
    sign, goal = np.sign(speed0), times.max(initial=0.0)

    def at(sigma: Any) -> np.ndarray:
        return np.stack([expm(sign * s * V) @ z0 for s in np.atleast_1d(sigma)])

    step = 0.2 / np.linalg.norm(V, 2)
    edges, clock, series = [0.0], [0.0], []

    def panel(right: Any) -> None:
        left = edges[-1]
        half = (right - left) / 2
        integrand = 1 / np.abs(rate(at(left + half * (1 + NODES))))
        coefficients = np.polynomial.legendre.legfit(NODES, integrand * half, len(NODES) - 1)
        series.append(np.polynomial.legendre.legint(coefficients, lbnd=-1))
        edges.append(right)
        clock.append(clock[-1] + float((WEIGHTS * integrand).sum() * half))

    while clock[-1] <= goal:
        left, right = edges[-1], edges[-1] + step
        fine = np.linspace(left, right, 9)
        values = zero(at(fine))
        if np.any(np.sign(values[1:]) != np.sign(values[0])):
            stop = _bisect(lambda s: float(zero(at(s))[0]), left, fine[1 + int(np.argmax(np.sign(values[1:]) != np.sign(values[0])))])
            while clock[-1] <= goal and (stop - edges[-1]) > 1e-15 * max(stop, 1e-300):
                panel((edges[-1] + stop) / 2)
            break
        panel(right)
        added = clock[-1] - clock[-2]
        if added < 1e-17 * clock[-1] or not np.isfinite(added):
            raise ArgumentError(f"times must lie below the blow-up time {clock[-1]:.15g}, got {goal:.15g}")
    tau = np.array([_invert(t, edges, clock, series) for t in times])
    return at(tau) if len(tau) else np.zeros((0, len(z0)))


def _invert(t: float, edges: list[float], clock: list[float], series: list[np.ndarray]) -> float:
    """The orbit parameter at clock time `t`."""
    i = int(np.searchsorted(clock, t, side="right")) - 1
    if i >= len(series):
        return edges[-1]                                                     # the orbit has stopped to round-off
    target, low, high = t - clock[i], -1.0, 1.0
    slope = np.polynomial.legendre.legder(series[i])
    x = 0.0
    for _ in range(60):
        miss = np.polynomial.legendre.legval(x, series[i]) - target
        low, high = (low, x) if miss > 0 else (x, high)
        new = x - miss / np.polynomial.legendre.legval(x, slope)
        new = new if low < new < high else (low + high) / 2
        if abs(new - x) < 1e-16:
            break
        x = new
    return float(edges[i] + (edges[i + 1] - edges[i]) * (1 + x) / 2)


def _bisect(f: Callable[[float], float], left: float, right: float) -> float:
    from scipy.optimize import brentq

    if f(left) * f(right) >= 0:
        return right
    root: Any = brentq(f, left, right, xtol=1e-300, rtol=np.float64(1e-15))
    return float(root)


@jax.jit
def proportion(attention: Head) -> tuple[Array, Array]:
    """The number r with Q = r K in least squares, and whether that is exact."""
    size = (attention.K * attention.K).sum()
    ratio = jnp.where(size > 0, (attention.Q * attention.K).sum() / jnp.where(size > 0, size, 1.0), 0.0).astype(size.dtype)
    rest = jnp.linalg.norm(attention.Q - ratio * attention.K)
    return ratio, (rest <= HYPOTHESIS * jnp.linalg.norm(attention.Q)) | (size == 0)


def centered(state: Gaussian) -> None:
    """Raise unless the mean is zero."""
    if np.any(np.asarray(state.mean)):
        raise NoClosedFormError("the covariance has a closed form but the mean has none here: use integrate, or a state of zero mean")
