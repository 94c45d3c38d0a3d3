"""Exact solutions of the Gaussian flow. Which one applies is read off classes and shapes; its hypotheses on values are then checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from theorylab.core import tree
from theorylab.errors import ArgumentError, NoClosedFormError
from theorylab.transformer_pde.attention import L2, Softmax, check_state, is_concrete
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Gaussian, _floating

Array = jax.Array

HYPOTHESIS = 1e-12
"""Relative size below which a hypothesis (symmetry, proportional matrices, zero mean) counts as met."""


def closed_form(flow: GaussianFlow, state: Gaussian, times: Any) -> Gaussian:
    r"""The exact state at `times`, as a `Gaussian` with a leading axis of times, like `integrate(flow, state, times).value`.

    | attention | values | state | solution (paper, closed forms) |
    |---|---|---|---|
    | softmax | a number $v$ | any | $\Sigma(t) = L_0 (I - v t\, L_0^\top (A + A^\top) L_0)^{-1} L_0^\top$; mean if $A$ is symmetric or it is 0 |
    | L2 | a number $v$ | any | one scalar equation for each eigenvalue of $L_0^\top P L_0$, if $Q = r K$ |
    | softmax, L2 | any | factor of one column, zero mean | the orbit $z = e^{\tau V} u_0$ with its clock |
    | softmax, L2 | any, `k = 1`, $Q = r K$ | zero mean | the orbit of $\Sigma_0 K^\top$ with its clock |

    The last two rows invert a quadrature on the host, so they cannot be traced. Inside compiled code a hypothesis on values that fails gives NaN in
    what depends on it.

    Args:
        flow: a `GaussianFlow` without feed-forward, noise and normalization.
        state: one Gaussian.
        times: shape `(count,)`, at least 0.

    Raises:
        NoClosedFormError: none is known for this input; the message says which hypothesis fails.
        ArgumentError: a time lies at or beyond the blow-up.

    Example:
        >>> flow = GaussianFlow(Softmax(jnp.eye(2), jnp.eye(2), 1.0))
        >>> closed_form(flow, Gaussian.standard(2), jnp.array([0.0, 0.25])).cov[:, 0, 0].tolist()
        [1.0, 2.0]
    """
    attention = plain_attention(flow, "closed_form")
    check_state(attention, state, Gaussian)
    times = _times(times).astype(state.factor.dtype)
    concrete = is_concrete(attention, state, times)
    if attention.V.ndim == 0:
        if isinstance(attention, Softmax):
            return _softmax_scalar(attention, state, times)
        if state.columns > 1 or not concrete or bool(_proportion(attention)[1]):
            return _l2_scalar(attention, state, times)
    if not concrete:
        raise NoClosedFormError("closed_form with a value matrix inverts a quadrature on the host and cannot be traced: use integrate")
    if state.columns == 1:
        return _rank_one_state(attention, state, times)
    if attention.Q.shape[0] == 1:
        return _rank_one_head(attention, state, times)
    raise NoClosedFormError(f"no closed form is known for {type(attention).__name__} with a {attention.dim} x {attention.dim} value matrix, "
                            f"{attention.Q.shape[0]} rows of queries and a state of {state.columns} columns (a number as V, one row of queries or a "
                            "rank-one state would have one): use integrate")


def plain_attention(flow: Any, user: str) -> Softmax | L2:
    """The attention of a flow that has nothing else, or an error that says what `user` cannot take."""
    if not isinstance(flow, GaussianFlow):
        raise ArgumentError(f"flow must be a GaussianFlow, got {type(flow).__name__}")
    extra = [name for name in ("feed_forward", "noise") if getattr(flow, name) is not None] + ["normalize"] * flow.normalize
    if extra:
        raise NoClosedFormError(f"{user} is known for attention alone, and this flow has {' and '.join(extra)}: use integrate")
    if not isinstance(flow.attention, (Softmax, L2)):
        raise NoClosedFormError(f"{user} is not known for {type(flow.attention).__name__}: use integrate")
    return flow.attention


def scalar_blow_up_time(attention: Softmax, factor: Float[Array, "*lead d r"]) -> Float[Array, "*lead"]:
    r"""$t^* = 1 / \lambda_{\max}(v L_0^\top (A + A^\top) L_0)$, infinite where that eigenvalue is not positive; $V = vI$."""
    form, level = quadratic_form(attention, factor)
    top = jnp.linalg.eigvalsh(attention.V * form)[..., -1]
    above = top > jnp.abs(attention.V) * level
    return jnp.where(above, 1 / jnp.where(above, top, 1.0), jnp.inf)


def quadratic_form(attention: Softmax, factor: Float[Array, "*lead d r"]) -> tuple[Float[Array, "*lead r r"], Float[Array, "*lead"]]:
    r"""$L^\top (A + A^\top) L$, and the level below which its eigenvalues count as zero."""
    keys, queries = attention.K @ factor, attention.scale * (attention.Q @ factor)
    half = jnp.swapaxes(keys, -1, -2) @ queries
    sizes = (jnp.linalg.norm(jax.lax.stop_gradient(a), axis=(-1, -2)) for a in (keys, queries))
    return half + jnp.swapaxes(half, -1, -2), 10 * factor.shape[-1] * jnp.finfo(factor.dtype).eps * next(sizes) * next(sizes)


def _softmax_scalar(attention: Softmax, state: Gaussian, times: Float[Array, "t"]) -> Gaussian:
    from theorylab.core.psd import sqrtm

    v, factor, A = attention.V, state.factor, attention.A
    if is_concrete(attention, state, times):
        _below_blow_up(times, float(scalar_blow_up_time(attention, factor)))
    form, _ = quadratic_form(attention, factor)
    eye = jnp.eye(form.shape[0], dtype=form.dtype)
    symmetric = _has_mean_form(jnp.linalg.norm(A - A.T) <= HYPOTHESIS * jnp.linalg.norm(A), state,
                               "of V = v I with a matrix A = K^T Q that is not symmetric")
    pull = factor.T @ (A @ state.mean)

    def at(t: Array) -> tuple[Array, Array]:
        shifted = eye - v * t * form
        moved = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(shifted), factor.T, lower=True).T
        # the components of e^{-vt} mean along the factor solve c' = v (I - v t N)^{-1} (pull + N c / 2), N the form: integrated without dividing by N
        root = sqrtm(shifted)
        along = 2 * v * t * jnp.linalg.solve(root + shifted, pull)
        return moved, jnp.exp(v * t) * (state.mean + factor @ along)

    moved, mean = jax.vmap(at)(times)
    return Gaussian._raw(jnp.where(symmetric, mean, jnp.nan).astype(mean.dtype), moved, None)


def _l2_scalar(attention: L2, state: Gaussian, times: Float[Array, "t"]) -> Gaussian:
    v, factor = attention.V, state.factor
    ratio, parallel = _proportion(attention)
    if is_concrete(parallel) and not bool(parallel):
        raise NoClosedFormError("no closed form is known for L2 attention whose Q is not a multiple of K: use integrate")
    keys = attention.K @ factor
    p, vectors = jnp.linalg.eigh(attention.scale * (keys.T @ keys))
    p = jnp.clip(p, 0.0)
    basis = factor @ vectors
    pull = basis.T @ (attention.P @ state.mean)

    def at(t: Array) -> tuple[Array, Array]:
        log_inverse = _log_inverse_growth(p, 1 - 4 * v * ratio * p * t)                     # -log of the growth of each eigenvalue
        # the mean along each eigenvector grows like e^{vt} times a power of the same growth, (r - 1) / (2 r); r -> 0 by its limit
        some = jnp.abs(ratio) > 1e-8
        exponent = jnp.where(some, -log_inverse * (ratio - 1) / (2 * jnp.where(some, ratio, 1.0)), -2 * v * p * t / (1 + 2 * p))
        along = pull * jnp.where(p > 0, jnp.expm1(exponent) / jnp.where(p > 0, p, 1.0), 0.0)
        return basis * jnp.exp(-log_inverse / 2), jnp.exp(v * t) * (state.mean + basis @ along)

    moved, mean = jax.vmap(at)(times)
    hide = lambda a: jnp.where(parallel, a, jnp.nan).astype(a.dtype)  # noqa: E731
    return Gaussian._raw(hide(mean), hide(moved), None)


def _log_inverse_growth(p: Float[Array, "r"], y: Float[Array, "r"]) -> Float[Array, "r"]:
    r"""The root $w$ of $e^w + 2 p w = y$ (a Wright omega function, written so that small and large $p$ are harmless).

    The left side is increasing and convex, so Newton from above the root descends to it; both starts are upper bounds.
    """
    start = (y - 1) / (1 + 2 * p)
    start = jnp.where(y > 1, jnp.minimum(start, jnp.log(jnp.where(y > 1, y, 1.0))), start)
    newton = lambda _, w: w - (jnp.exp(w) + 2 * p * w - y) / (jnp.exp(w) + 2 * p)  # noqa: E731
    still = p == 0
    w = jax.lax.stop_gradient(jnp.where(still, 0.0, jax.lax.fori_loop(0, 30, newton, jax.lax.stop_gradient(start))))
    return jnp.where(still, 0.0, newton(0, w)).astype(y.dtype)                            # one more step carries the derivative


def _rank_one_state(attention: Softmax | L2, state: Gaussian, times: Array) -> Gaussian:
    r"""$\Sigma_0 = u_0 u_0^\top$: $\Sigma = z z^\top$, $z = e^{\tau V} u_0$; $\tau' = z^\top A z$, or $2 z^\top A z / (1 + 2 z^\top P z)$ for L2."""
    _centered(state)
    u0, A, P = np.asarray(state.factor)[:, 0], np.asarray(attention.A), np.asarray(attention.P)

    def zero(z: np.ndarray) -> np.ndarray:
        return np.einsum("ni,ij,nj->n", z, A, z)

    def rate(z: np.ndarray) -> np.ndarray:
        if isinstance(attention, Softmax):
            return zero(z)
        return 2 * zero(z) / (1 + 2 * np.einsum("ni,ij,nj->n", z, P, z))

    _, z = _follow(np.asarray(attention.value_matrix), u0, rate, zero, np.asarray(times))
    return Gaussian.from_factor(jnp.zeros((len(z), state.dim)), jnp.asarray(z)[:, :, None])


def _rank_one_head(attention: Softmax | L2, state: Gaussian, times: Array) -> Gaussian:
    r"""One query $Q = r K = r q^\top$: $y_0 = \Sigma_0 q$, $s_0 = q^\top y_0$, $z = e^{\tau V} y_0$: $L = L_0 + (z - y_0)\, q^\top L_0 / s_0$."""
    _centered(state)
    ratio, parallel = _proportion(attention)
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
        s = zero(z) ** 2 / s0
        return c * r * s if isinstance(attention, Softmax) else 2 * c * r * s / (1 + 2 * c * s)

    _, z = _follow(np.asarray(attention.value_matrix), y0, rate, zero, np.asarray(times))
    moved = factor[None] + (z - y0)[:, :, None] * row[None, None, :] / s0
    return Gaussian.from_factor(jnp.zeros((len(z), state.dim)), jnp.asarray(moved))


NODES, WEIGHTS = np.polynomial.legendre.leggauss(20)


def _follow(V: np.ndarray, z0: np.ndarray, rate: Callable, zero: Callable, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""The points of the orbit $z = e^{\tau V} z_0$ at `times`, for the clock $\tau' = \mathrm{rate}(z)$ which stops where `zero` vanishes.

    $t(\tau) = \int d\tau / \mathrm{rate}$ is summed over panels by Gauss--Legendre quadrature, panels shrinking towards a zero of the rate, and
    inverted inside a panel through its Legendre series.
    """
    from scipy.linalg import expm

    speed0 = float(rate(z0[None])[0])
    if speed0 == 0 or not V.any():
        return np.zeros(len(times)), np.repeat(z0[None], len(times), 0)
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
    return sign * tau, at(tau) if len(tau) else np.zeros((0, len(z0)))


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


def _proportion(attention: Softmax | L2) -> tuple[Array, Array]:
    """The number r with Q = r K in least squares, and whether that is exact."""
    size = (attention.K * attention.K).sum()
    ratio = jnp.where(size > 0, (attention.Q * attention.K).sum() / jnp.where(size > 0, size, 1.0), 0.0).astype(size.dtype)
    rest = jnp.linalg.norm(attention.Q - ratio * attention.K)
    return ratio, (rest <= HYPOTHESIS * jnp.linalg.norm(attention.Q)) | (size == 0)


def _has_mean_form(symmetric: Array, state: Gaussian, what: str) -> Array:
    known = symmetric | (state.mean == 0).all()
    if is_concrete(known) and not bool(known):
        raise NoClosedFormError(f"the covariance has a closed form but the mean {what} has none: use integrate, or a state of zero mean")
    return known


def _centered(state: Gaussian) -> None:
    if np.any(np.asarray(state.mean)):
        raise NoClosedFormError("the covariance has a closed form but the mean has none here: use integrate, or a state of zero mean")


def _below_blow_up(times: Array, end: float) -> None:
    if times.size and float(times.max()) >= end:
        raise ArgumentError(f"times must lie below the blow-up time {end:.15g}, got {float(times.max()):.15g}")


def _times(times: Any) -> Array:
    array = _floating("times", times)
    if array.ndim != 1:
        raise ArgumentError(f"times must be one-dimensional, got shape {array.shape}")
    if not tree.is_traced(array) and array.size and float(array.min()) < 0:
        raise ArgumentError(f"times must be at least 0, got {float(array.min()):g}")
    return array
