"""Exact solutions of the Gaussian flow. Which one applies is read off classes and shapes; its hypotheses on values are then checked."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from theorylab.core import tree
from theorylab.core.integrate import integrate
from theorylab.core.problem import Flow
from theorylab.errors import ArgumentError, NoClosedFormError
from theorylab.transformer_pde.attention import L2, Head, Linear, Softmax, check_state, is_concrete
from theorylab.transformer_pde.combined import MultiHead
from theorylab.transformer_pde.entropic import Sinkhorn
from theorylab.transformer_pde.flow import GaussianFlow, _ratio
from theorylab.transformer_pde.gaussian import Gaussian, _floating
from theorylab.transformer_pde.orbits import HYPOTHESIS, proportion, rank_one_head, rank_one_state
from theorylab.transformer_pde.riccati import riccati_states

Array = jax.Array


def closed_form(flow: GaussianFlow, state: Gaussian, times: Any) -> Gaussian:
    r"""The exact state at `times`, as a `Gaussian` with a leading axis of times, like `integrate(flow, state, times).value`.

    | attention | values | hypotheses | solution (companion derivation, closed forms) |
    |---|---|---|---|
    | softmax | a number $v$ | none | $\Sigma(t) = L_0 (I - v t\, L_0^\top (A + A^\top) L_0)^{-1} L_0^\top$; mean if $A$ is symmetric or it is 0 |
    | softmax, feed-forward, noise | a number $v$ | zero mean and $b$ | a linear system for $\Sigma^{-1}$, the Riccati equation with noise |
    | L2 | a number $v$ | $Q = r K$ | one scalar equation for each eigenvalue of $L_0^\top P L_0$ |
    | Sinkhorn | a number $v$ | $A$ symmetric | one scalar equation for each eigenvalue of $L_0^\top A L_0$ |
    | each of the three | any | factor of one column, zero mean | the orbit $z = e^{\tau V} u_0$ with its clock |
    | each of the three | any, `k = 1` | $Q = r K$, zero mean | the orbit of $\Sigma_0 K^\top$ with its clock |
    | each of the three | diagonal | $A$, $P$ and $\Sigma_0$ diagonal | the first rows in each coordinate |

    Linear attention at zero mean is softmax attention, and a matrix $V = vI$ counts as the number. The last three rows cannot be traced: they
    look at values, or invert a quadrature on the host. Inside compiled code a hypothesis on values that fails gives NaN in what depends on it.
    With a number as V round-off grows like t: at t = 1e9 nine digits are left; `limit` has the end itself.

    Args:
        flow: a `GaussianFlow` without normalization.
        state: one Gaussian.
        times: shape `(count,)`, at least 0; a single number gives a state without the leading axis.

    Raises:
        NoClosedFormError: none is known for this input; the message says which hypothesis fails.
        ArgumentError: a time lies at or beyond the blow-up.

    Example:
        >>> flow = GaussianFlow(Softmax(jnp.eye(2), jnp.eye(2), 1.0))
        >>> closed_form(flow, Gaussian.standard(2), jnp.array([0.0, 0.25])).cov[:, 0, 0].round(12).tolist()
        [1.0, 2.0]
    """
    attention = plain_attention(flow, "closed_form", terms=("feed_forward", "noise"))
    check_state(attention, state, Gaussian)
    if np.ndim(times) == 0:
        return jax.tree.map(lambda rows: rows[0], closed_form(flow, state, jnp.reshape(_floating("times", times), 1)))
    times = _times(times).astype(state.factor.dtype)
    attention, state = without_mean(attention, state)
    if not isinstance(attention, (Softmax, L2, Sinkhorn)):
        raise NoClosedFormError(f"no closed form is known for {type(attention).__name__}: use integrate")
    concrete = is_concrete(attention, state, times)
    attention = _with_number(attention)
    if flow.feed_forward is not None or flow.noise is not None:
        if not (isinstance(attention, Softmax) and attention.V.ndim == 0):
            raise NoClosedFormError("with feed_forward or noise, closed_form is known for softmax attention with a number as V: use integrate")
        return riccati_states(attention, flow.feed_forward, flow.noise, state, times)
    if attention.V.ndim == 0:
        if isinstance(attention, Softmax):
            return _softmax_scalar(attention, state, times)
        known = proportion(attention)[1] if isinstance(attention, L2) else is_symmetric(attention.A)
        if state.columns > 1 or not concrete or bool(known):
            return (_l2_scalar if isinstance(attention, L2) else _sinkhorn_scalar)(attention, state, times)  # type: ignore[operator]
    if not concrete:
        raise NoClosedFormError("closed_form with a value matrix inverts a quadrature on the host and cannot be traced: use integrate")
    diagonal = _is_diagonal(attention, state)
    if state.columns == 1 and not (diagonal and bool((state.mean != 0).any())):
        return rank_one_state(attention, state, times)
    if diagonal:
        return _diagonal(attention, state, times)
    if attention.Q.shape[0] == 1:
        return rank_one_head(attention, state, times)
    raise NoClosedFormError(f"no closed form is known for {type(attention).__name__} with a {attention.dim} x {attention.dim} value matrix, "
                            f"{attention.Q.shape[0]} rows of queries and a state of {state.columns} columns (a number as V, one row of queries or a "
                            "rank-one state would have one): use integrate")


def _with_number(attention: Any) -> Any:
    """The head with a number as V if its matrix is a multiple of the identity, entry for entry."""
    V = attention.V
    if V.ndim == 0 or not is_concrete(V) or not bool((V[0, 0] * jnp.eye(attention.dim, dtype=V.dtype) == V).all()):
        return attention
    return eqx.tree_at(lambda head: head.V, attention, V[0, 0])


def _is_diagonal(attention: Head, state: Gaussian) -> bool:
    forms = [attention.value_matrix, attention.A, state.cov, *([attention.P] if isinstance(attention, L2) else [])]
    return all(bool((form == jnp.diag(jnp.diagonal(form))).all()) for form in forms)


def _diagonal(attention: Head, state: Gaussian, times: Float[Array, "t"]) -> Gaussian:
    """Diagonal matrices decouple the coordinates: a head of dimension one for each."""
    form, keys = jnp.diagonal(attention.A), jnp.diagonal(attention.P) if isinstance(attention, L2) else jnp.ones(attention.dim, state.mean.dtype)
    keys = jnp.sqrt(keys)
    queries = jnp.where(keys > 0, form / jnp.where(keys > 0, keys, 1.0), 0.0)
    options = {"temperature": attention.temperature} if isinstance(attention, Sinkhorn) else {}

    def coordinate(q: Array, k: Array, v: Array, mean: Array, variance: Array) -> tuple[Array, Array]:
        head = type(attention)(q.reshape(1, 1), k.reshape(1, 1), v, **options)
        found = closed_form(GaussianFlow(head), Gaussian._raw(mean[None], jnp.sqrt(variance).reshape(1, 1), None), times)
        return found.mean[:, 0], found.factor[:, 0, 0]

    values, variances = jnp.diagonal(attention.value_matrix), jnp.diagonal(state.cov)
    if isinstance(attention, Softmax):
        _below_blow_up(times, float(1 / jnp.maximum((2 * values * form * variances).max(), 0.0)))
    means, roots = jax.vmap(coordinate, out_axes=-1)(queries, keys, values, state.mean, variances)
    return Gaussian._raw(means, roots[..., None] * jnp.eye(attention.dim, dtype=roots.dtype), None)


def flow_map(flow: GaussianFlow, state: Gaussian, times: Any, rtol: float = 1e-10) -> Array:
    r"""The matrices $\Phi(t)$ that carry tokens: $x(t) = \alpha(t) + \Phi(t)(x(0) - \alpha(0))$; shape `(count, dim, dim)`.

    $\Phi' = B\Phi$, $\Phi(0) = I$. Softmax with a number $v$ as $V$ and a symmetric $A$ has $\Phi = I + 2vt\,L_0 (S + S^2)^{-1} L_0^\top A$,
    $S^2 = I - 2vt\,L_0^\top A L_0$ (companion derivation; for $\Sigma_0 \succ 0$ this is $\Sigma_0^{1/2} S^{-1} \Sigma_0^{-1/2}$ with
    $\Sigma_0^{1/2}$ as the factor). Anything else is integrated, along with the state, in the form of `flow`.

    Args:
        flow: a `GaussianFlow`.
        state: one Gaussian.
        times: shape `(count,)`, at least 0.
        rtol: relative tolerance, where the map is integrated.

    Raises:
        ArgumentError: a time is negative, or lies at or beyond the blow-up.

    Example:
        >>> flow = GaussianFlow(Softmax(jnp.eye(2), jnp.eye(2), 1.0))
        >>> flow_map(flow, Gaussian.standard(2), jnp.array([0.375])).round(9).tolist()
        [[[2.0, 0.0], [0.0, 2.0]]]
    """
    if not isinstance(flow, GaussianFlow):
        raise ArgumentError(f"flow must be a GaussianFlow, got {type(flow).__name__}")
    check_state(flow.attention, state, Gaussian)
    times, head = _times(times).astype(state.factor.dtype), flow.attention
    plain = flow.feed_forward is None and flow.noise is None and not flow.normalize
    if plain and isinstance(head, Softmax) and head.V.ndim == 0 and is_concrete(head.A) and bool(is_symmetric(head.A)):
        if is_concrete(head, state, times):
            _below_blow_up(times, float(scalar_blow_up_time(head, state.factor)))
        return _softmax_map(head, state.factor, times)
    from_zero = jnp.concatenate([jnp.zeros_like(times[:1]), times]) if not is_concrete(times) or float(times[:1].sum()) > 0 else times
    found = integrate(_Carried(flow), state, from_zero, rtol=rtol, atol=rtol / 100).value[1]
    if found.shape[0] != from_zero.shape[0]:
        raise ArgumentError(f"times must lie below the blow-up time, got {float(times.max()):.15g}")
    return found[from_zero.shape[0] - times.shape[0]:]


class _Carried(Flow):
    """A Gaussian flow and its map."""

    flow: GaussianFlow

    def lift(self, y0: Any) -> tuple[Gaussian, Array]:
        lifted = self.flow.lift(y0)
        return lifted, jnp.eye(lifted.dim, dtype=lifted.mean.dtype)

    def field(self, t: Array, y: tuple[Gaussian, Array]) -> tuple[Gaussian, Array]:
        state, carried = y
        change, cov = self.flow.field(t, state), state.cov
        matrix = self.flow.attention.at(t).velocity(state.mean, cov).matrix
        if self.flow.feed_forward is not None:
            matrix = matrix + self.flow.feed_forward[0]
        if self.flow.normalize:                                                        # what it takes away shows in the trace
            factor, carried_factor = state._factor, change._factor
            moved = jnp.trace(change.cov) / 2 if factor is None or carried_factor is None else (carried_factor * factor).sum()
            noise = 0.0 if self.flow.noise is None else jnp.trace(self.flow.noise)
            matrix = matrix - _ratio(jnp.trace(matrix @ cov) + noise - moved, jnp.trace(cov)) * jnp.eye(cov.shape[0], dtype=cov.dtype)
        return change, matrix @ carried


def plain_attention(flow: Any, user: str, terms: tuple[str, ...] = ()) -> Any:
    """The attention of a flow that has nothing else than `terms`, or an error that says what `user` cannot take."""
    if not isinstance(flow, GaussianFlow):
        raise ArgumentError(f"flow must be a GaussianFlow, got {type(flow).__name__}")
    extra = [name for name in ("feed_forward", "noise") if getattr(flow, name) is not None and name not in terms] + ["normalize"] * flow.normalize
    if extra:
        raise NoClosedFormError(f"{user} is not known for a flow with {' and '.join(extra)}: use integrate")
    if not flow.attention.keeps_gaussians:
        raise NoClosedFormError(f"{user} is not known for {type(flow.attention).__name__}, which does not keep Gaussians Gaussian: use Particles")
    return flow.attention


def without_mean(attention: Any, state: Gaussian) -> tuple[Any, Gaussian]:
    """Linear attention as the softmax attention that it is at zero mean; elsewhere the mean acts on the covariance."""
    if not attention.feels_mean:
        return attention, state
    at_zero = (state.mean == 0).all()
    if is_concrete(at_zero) and not bool(at_zero):
        raise NoClosedFormError("linear attention is solved at zero mean only, where it is softmax attention: use integrate")
    factor = jnp.where(at_zero, state.factor, jnp.nan).astype(state.factor.dtype)
    return _as_softmax(attention), Gaussian._raw(state.mean, factor, None)


def _as_softmax(attention: Any) -> Any:
    if isinstance(attention, MultiHead):
        return MultiHead([_as_softmax(head) for head in attention.heads])
    return Softmax(attention.Q, attention.K, attention.V, attention.scale) if isinstance(attention, Linear) else attention


@jax.jit
def scalar_blow_up_time(attention: Softmax, factor: Float[Array, "*lead d r"]) -> Float[Array, "*lead"]:
    r"""$t^* = 1 / \lambda_{\max}(v L_0^\top (A + A^\top) L_0)$, infinite where that eigenvalue is not positive; $V = vI$."""
    form, level = quadratic_form(attention, factor)
    top = jnp.linalg.eigvalsh(attention.V * form)[..., -1]
    above = top > jnp.abs(attention.V) * level
    return jnp.where(above, 1 / jnp.where(above, top, 1.0), jnp.where(jnp.isnan(top), jnp.nan, jnp.inf))


def quadratic_form(attention: Head, factor: Float[Array, "*lead d r"]) -> tuple[Float[Array, "*lead r r"], Float[Array, "*lead"]]:
    r"""$L^\top (A + A^\top) L$, and the level below which its eigenvalues count as zero."""
    keys, queries = attention.K @ factor, attention.scale * (attention.Q @ factor)
    half = jnp.swapaxes(keys, -1, -2) @ queries
    sizes = (jnp.linalg.norm(jax.lax.stop_gradient(a), axis=(-1, -2)) for a in (keys, queries))
    return half + jnp.swapaxes(half, -1, -2), 10 * factor.shape[-1] * jnp.finfo(factor.dtype).eps * next(sizes) * next(sizes)


@jax.jit
def is_symmetric(matrix: Float[Array, "d d"]) -> Array:
    """Whether a matrix is symmetric up to round-off."""
    return jnp.linalg.norm(matrix - matrix.T) <= HYPOTHESIS * jnp.linalg.norm(matrix)


def _softmax_scalar(attention: Softmax, state: Gaussian, times: Float[Array, "t"]) -> Gaussian:
    if is_concrete(attention, state, times):
        _below_blow_up(times, float(scalar_blow_up_time(attention, state.factor)))
    symmetric = _has_mean_form(is_symmetric(attention.A), state, "of V = v I with a matrix A = K^T Q that is not symmetric")
    moved, mean = _softmax_path(attention, state, times)
    return Gaussian._raw(jnp.where(symmetric, mean, jnp.nan).astype(mean.dtype), moved, None)


@jax.jit
def _softmax_path(attention: Softmax, state: Gaussian, times: Float[Array, "t"]) -> tuple[Array, Array]:
    v, factor = attention.V, state.factor
    form, _ = quadratic_form(attention, factor)
    eye = jnp.eye(form.shape[0], dtype=form.dtype)
    pull = factor.T @ (attention.A @ state.mean)

    def at(t: Array) -> tuple[Array, Array]:
        moved = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(eye - v * t * form), factor.T, lower=True).T
        return moved, jnp.exp(v * t) * (state.mean + factor @ _along(attention, form, pull, t))

    return jax.vmap(at)(times)


@jax.jit
def _softmax_map(attention: Softmax, factor: Float[Array, "d r"], times: Float[Array, "t"]) -> Float[Array, "t d d"]:
    pull, eye, form = factor.T @ attention.A, jnp.eye(attention.dim, dtype=factor.dtype), quadratic_form(attention, factor)[0]
    return jax.vmap(lambda t: eye + factor @ _along(attention, form, pull, t))(times)


def _along(attention: Softmax, form: Float[Array, "r r"], pull: Array, t: Array) -> Array:
    r"""The components $c$ of what has moved along the factor: $c' = v (I - v t N)^{-1} (\text{pull} + N c / 2)$, without dividing by N, the form."""
    from theorylab.core.psd import sqrtm

    shifted = jnp.eye(form.shape[0], dtype=form.dtype) - attention.V * t * form
    return 2 * attention.V * t * jnp.linalg.solve(sqrtm(shifted) + shifted, pull)


def _l2_scalar(attention: L2, state: Gaussian, times: Float[Array, "t"]) -> Gaussian:
    ratio, parallel = proportion(attention)
    if is_concrete(parallel) and not bool(parallel):
        raise NoClosedFormError("no closed form is known for L2 attention whose Q is not a multiple of K: use integrate")
    moved, mean = _l2_path(attention, ratio, state, times)
    hide = lambda a: jnp.where(parallel, a, jnp.nan).astype(a.dtype)  # noqa: E731
    return Gaussian._raw(hide(mean), hide(moved), None)


@jax.jit
def _l2_path(attention: L2, ratio: Array, state: Gaussian, times: Float[Array, "t"]) -> tuple[Array, Array]:
    v, factor = attention.V, state.factor
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

    return jax.vmap(at)(times)


@jax.jit
def _log_inverse_growth(p: Float[Array, "r"], y: Float[Array, "r"]) -> Float[Array, "r"]:
    r"""The root $w$ of $e^w + 2 p w = y$ (a Wright omega function, written so that small and large $p$ are harmless).

    The left side is increasing and convex, so Newton from above the root descends to it; both starts are upper bounds.
    """
    start = (y - 1) / (1 + 2 * p)
    start = jnp.where(y > 1, jnp.minimum(start, jnp.log(jnp.where(y > 1, y, 1.0))), start)
    newton = lambda _, w: w - (jnp.exp(w) + 2 * p * w - y) / (jnp.exp(w) + 2 * p)  # noqa: E731
    still = p == 0
    w = lax.stop_gradient(jnp.where(still, 0.0, lax.fori_loop(0, 30, newton, lax.stop_gradient(start))))
    return jnp.where(still, 0.0, newton(0, w)).astype(y.dtype)                            # one more step carries the derivative


def _sinkhorn_scalar(attention: Sinkhorn, state: Gaussian, times: Float[Array, "t"]) -> Gaussian:
    symmetric = is_symmetric(attention.A)
    if is_concrete(symmetric) and not bool(symmetric):
        raise NoClosedFormError("no closed form is known for Sinkhorn attention whose matrix A = K^T Q is not symmetric: use integrate")
    moved, mean = _sinkhorn_path(attention, state, times)
    return Gaussian._raw(mean, jnp.where(symmetric, moved, jnp.nan).astype(moved.dtype), None)


@jax.jit
def _sinkhorn_path(attention: Sinkhorn, state: Gaussian, times: Float[Array, "t"]) -> tuple[Array, Array]:
    v, temperature, factor = attention.V, attention.temperature, state.factor
    form, level = quadratic_form(attention, factor)
    values, vectors = jnp.linalg.eigh(form / 2)
    moves = jnp.abs(values) > level
    twice = 2 * jnp.where(moves, jnp.abs(values), 1.0) / temperature
    before = jnp.arcsinh(twice)

    def at(t: Array) -> tuple[Array, Array]:
        after = _entropic_clock(before, 2 * jnp.sign(values) * v * t / temperature)
        # sinh w / sinh w_0 in logarithms: both overflow long before the covariance does
        log_growth = after - before + jnp.log1p(-jnp.exp(-2 * after)) - jnp.log1p(-jnp.exp(-2 * before))
        growth = jnp.exp(jnp.where(moves, log_growth, 0.0) / 2)
        return factor @ (vectors * growth), jnp.exp(v * t / temperature) * state.mean

    return jax.vmap(at)(times)


@jax.jit
def _entropic_clock(before: Float[Array, "r"], shift: Float[Array, "r"]) -> Float[Array, "r"]:
    r"""The root $w$ of $g(w) = g(w_0) + \text{shift}$, $g(w) = w - \coth(w/2)$, for $w_0 > 0$.

    $g$ is increasing and concave, so Newton from below the root ascends to it; the starts are lower bounds.
    """
    coth = lambda w: 1 / jnp.tanh(w / 2)  # noqa: E731
    gap = coth(before) + jnp.maximum(-shift, 0.0)                                 # a bound of coth(w / 2) where w shrinks
    start = jnp.where(shift >= 0, jnp.maximum(before, before - coth(before) + shift + 1), jnp.log1p(2 / (gap - 1)))

    def newton(_: Any, w: Array) -> Array:
        return w - (w - coth(w) - (before - coth(before)) - shift) / (1 + 0.5 / jnp.sinh(jnp.minimum(w, 80.0) / 2) ** 2)

    w = lax.stop_gradient(lax.fori_loop(0, 40, newton, lax.stop_gradient(start)))
    return newton(0, w).astype(shift.dtype)                                        # one more step carries the derivative


def _has_mean_form(symmetric: Array, state: Gaussian, what: str) -> Array:
    known = symmetric | (state.mean == 0).all()
    if is_concrete(known) and not bool(known):
        raise NoClosedFormError(f"the covariance has a closed form but the mean {what} has none: use integrate, or a state of zero mean")
    return known


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
