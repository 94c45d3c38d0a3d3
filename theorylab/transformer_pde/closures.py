r"""The Gaussian moment closure of attention that does not keep Gaussians Gaussian: an approximation, exact only where the attention is."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from theorylab.core import checks
from theorylab.core.module import size
from theorylab.core.problem import Flow
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.combined import Masked, MultiHead
from theorylab.transformer_pde.contract import Attention, Velocity, check_attention, check_state, state_metrics
from theorylab.transformer_pde.gaussian import Gaussian
from theorylab.transformer_pde.unnormalized import Sigmoid

Array = jax.Array

NODES = 128
"""Quadrature nodes of a sigmoid head: enough for round-off while the mean of the logits stays below about 20, whatever their spread."""
FREQUENCY = 12.0
"""Frequencies above this have weight below $e^{-12\\pi}$, the round-off of double precision."""


class Moments(NamedTuple):
    r"""Moments of the logistic function of a logit $z = (A x) \cdot y + b$ of independent $x, y = \alpha + L u$, in coordinates of $L$.

    Attributes:
        share: $E\,\sigma(z)$.
        pull: $E\,\sigma(z)\,u$ of the key.
        slope: $E\,\sigma'(z)$.
        lean: $E\,\sigma'(z)\,u$.
        spread: $E\,\sigma'(z)\,u u^\top$.
    """

    share: Array
    pull: Array
    slope: Array
    lean: Array
    spread: Array


def moment_closure(attention: Attention, state: Gaussian, nodes: int = NODES) -> Velocity:
    r"""The affine field nearest to the velocity of `attention` on the Gaussian `state`: a closure, not an exact velocity.

    It is $m + B(x - \alpha)$ with $m = E\,\Gamma(x)$ and $\operatorname{Cov}(\Gamma(x), x) = B\Sigma$, the regression of $\Gamma$ on $x$ in
    $L^2(\mu)$; by Stein's identity $B = E\,D\Gamma(x)$. Mean and covariance then move with the first two moments of the true law *as if* it were
    Gaussian at every time. For variants that keep Gaussians Gaussian it is their exact velocity; for a `MultiHead`, the sum over heads.

    For `Sigmoid`, $m = V E[\sigma(z) y]$ and $B = V E[\sigma'(z)\, y y^\top] A$ with $z = (Ax)\cdot y + b$ (companion derivation). Writing $\sigma'$
    as a Fourier integral, the Gaussian averages become one integral over a frequency $\omega$, whatever the dimension:

    $$ \sigma'(z) = \frac1{2\pi}\int \frac{\pi\omega}{\sinh\pi\omega}\, e^{i\omega z}\, d\omega, \qquad
       E\,e^{i\omega z} = \det(I + \omega^2 N N^\top)^{-1/2} e^{\dots}, \quad N = L^\top A L. $$

    The singularities of the integrand nearest to the real axis lie at $|\mathrm{Im}\,\omega| = \min(1, 1/\|N\|)$. With
    $\omega = \delta \sinh u$ and $\delta$ below that distance all of them move to $\mathrm{Im}\,u = \pm\pi/2$, so the midpoint rule in $u$ converges
    exponentially at a rate that does not depend on the weights, and a fixed number of nodes does for all: shapes never depend on values. Only logits
    of a large mean, where the head is saturated, need more nodes (the integrand then oscillates); `ClosureFlow` records the error.

    Args:
        attention: `Sigmoid`, a variant that keeps Gaussians Gaussian, or a `MultiHead` of these.
        state: one Gaussian, without leading axes; its covariance may be singular.
        nodes: quadrature nodes of a sigmoid head.

    Raises:
        ShapeError: the dimensions differ, or `state` has leading axes.
        ArgumentError: no closure is known, as for `Exponential`; or `nodes` is below 2.

    Example:
        >>> head = Sigmoid(jnp.zeros((1, 1)), jnp.zeros((1, 1)), 2.0)
        >>> moment_closure(head, Gaussian(jnp.array([3.0]), jnp.eye(1))).mean.round(12).tolist()       # half of twice the mean
        [3.0]
    """
    check_state(attention, state, Gaussian)
    _check_closed(attention)
    nodes = checks.whole("nodes", nodes, low=2)
    return _sum_heads(attention, state, nodes)


def _sum_heads(attention: Attention, state: Gaussian, nodes: int) -> Velocity:
    if isinstance(attention, MultiHead):
        parts = [_sum_heads(head, state, nodes) for head in attention.heads]
        return Velocity(sum((p.mean for p in parts[1:]), parts[0].mean), sum((p.matrix for p in parts[1:]), parts[0].matrix))
    if not isinstance(attention, Sigmoid):
        return attention.velocity(state.mean, state.cov)
    mean, factor = state.mean, state.factor
    found = _moments(attention, mean, factor, nodes)
    lean = jnp.outer(factor @ found.lean, mean)
    second = factor @ found.spread @ factor.T + lean + lean.T + found.slope * jnp.outer(mean, mean)
    return Velocity(attention._value(found.share * mean + factor @ found.pull), attention._value(second @ attention.A))


def _closed_factor_velocity(attention: Attention, mean: Array, factor: Array, nodes: int) -> tuple[Array, Array]:
    r"""The derivatives $(m, B L)$ of the closure."""
    if isinstance(attention, MultiHead):
        parts = [_closed_factor_velocity(head, mean, factor, nodes) for head in attention.heads]
        return sum((p[0] for p in parts[1:]), parts[0][0]), sum((p[1] for p in parts[1:]), parts[0][1])
    if not isinstance(attention, Sigmoid):
        return attention.factor_velocity(mean, factor)
    found = _moments(attention, mean, factor, nodes)
    form = _form(attention, mean, factor)
    moved = factor @ (found.spread @ form.matrix + jnp.outer(found.lean, form.right))
    moved = moved + jnp.outer(mean, found.lean @ form.matrix + found.slope * form.right)
    return attention._value(found.share * mean + factor @ found.pull), attention._value(moved)


class _Form(NamedTuple):
    """The logit as a form in the coordinates of key and query: matrix, linear part of the key, of the query, constant."""

    matrix: Array
    left: Array
    right: Array
    level: Array


def _form(attention: Sigmoid, mean: Float[Array, "d"], factor: Float[Array, "d r"]) -> _Form:
    r"""Of $z = (A x)\cdot y + b$ with $x = \alpha + Lv$ and $y = \alpha + Lu$: $u^\top N v + \ell \cdot u + r \cdot v + z_0$."""
    asked = attention.scale * (attention.Q @ jnp.concatenate([factor, mean[:, None]], axis=1))
    keys = attention.K @ jnp.concatenate([factor, mean[:, None]], axis=1)
    whole = keys.T @ asked
    return _Form(whole[:-1, :-1], whole[:-1, -1], whole[-1, :-1], whole[-1, -1] + attention.bias.astype(whole.dtype))


@partial(jax.jit, static_argnames="nodes")
def _moments(attention: Sigmoid, mean: Float[Array, "d"], factor: Float[Array, "d r"], nodes: int) -> Moments:
    return _averages(*_form(attention, mean, factor), nodes)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _averages(N: Float[Array, "r r"], left: Float[Array, "r"], right: Float[Array, "r"], level: Float[Array, ""], nodes: int) -> Moments:
    r"""The moments by quadrature over $\omega > 0$; the other half is the complex conjugate.

    Given $u$, the logit is Gaussian in $v$, which leaves $E\,e^{i\omega z} = E_u\,e^{i\omega(z_0 + \ell\cdot u) - \omega^2|r + N^\top u|^2/2}$: the
    measure of $u$ is tilted to precision $M = I + \omega^2 N N^\top$ and (complex) mean $\xi = M^{-1}(i\omega\ell - \omega^2 N r)$. In singular
    coordinates of $N$ all this is a sum over directions, one pass for all frequencies.
    """
    turn, s, other = jnp.linalg.svd(N)
    a, b = left @ turn, other @ right
    w, step = _frequencies(N, left, right, nodes)
    ratio = w[:, None] * s
    shrink = 1 / (1 + ratio * ratio)
    log_size = -(w * w) / 2 * (shrink @ (a * a + b * b)) - jnp.log1p(ratio * ratio).sum(1) / 2
    phase = w * level - w**3 * (shrink @ (s * a * b))
    slope, found = _sums(w, step, log_size, phase, -(w[:, None] ** 2) * shrink * s * b, w[:, None] * shrink * a)
    spread = found.spread + jnp.diag(slope @ shrink)
    return found._replace(pull=turn @ found.pull, lean=turn @ found.lean, spread=turn @ spread @ turn.T)


@_averages.defjvp
def _averages_rule(nodes: int, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Moments, Moments]:
    # derivatives of singular vectors have poles where singular values meet, those of the solution of a system have none
    return _averages(*primals, nodes), jax.jvp(partial(_averages_by_solves, nodes=nodes), primals, tangents)[1]


def _averages_by_solves(N: Float[Array, "r r"], left: Float[Array, "r"], right: Float[Array, "r"], level: Float[Array, ""], nodes: int) -> Moments:
    """The same without singular vectors: one linear system for each frequency."""
    w, step = _frequencies(N, left, right, nodes)
    eye = jnp.eye(N.shape[0], dtype=N.dtype)
    root = jnp.linalg.cholesky(eye + (w * w)[:, None, None] * (N @ N.T))
    inverse = jax.vmap(lambda r: jax.scipy.linalg.cho_solve((r, True), eye))(root)
    along, across = inverse @ left, inverse @ (N @ right)
    decay = along @ left + (right - (w * w)[:, None] * (across @ N)) @ right
    log_size = -(w * w) / 2 * decay - jnp.log(jnp.diagonal(root, axis1=1, axis2=2)).sum(1)
    phase = w * level - w**3 * (along @ (N @ right))
    slope, found = _sums(w, step, log_size, phase, -(w[:, None] ** 2) * across, w[:, None] * along)
    return found._replace(spread=found.spread + jnp.einsum("n,nij->ij", slope, inverse))


def _frequencies(N: Array, left: Array, right: Array, nodes: int) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    r"""Nodes $\omega = \delta\sinh u$ at midpoints in $u$, and their steps. Any $\delta$ gives the same integral: it has no derivative."""
    spread = (N * N).sum() + (left * left).sum() + (right * right).sum()
    delta = jax.lax.stop_gradient(1 / jnp.sqrt(1 + spread))
    top = jnp.log(2 * FREQUENCY / delta)
    sinh = jnp.sinh(top * jnp.asarray((np.arange(nodes) + 0.5) / nodes, N.dtype))
    return jax.lax.optimization_barrier((delta * sinh, delta * jnp.sqrt(1 + sinh * sinh) * top / nodes))


def _sums(w: Float[Array, "n"], step: Float[Array, "n"], log_size: Float[Array, "n"], phase: Float[Array, "n"], real: Float[Array, "n r"],
          imaginary: Float[Array, "n r"]) -> tuple[Float[Array, "n"], Moments]:
    r"""The weights of $M^{-1}$ in the spread, and the moments without it, from $E e^{i\omega z}$ and $\xi$."""
    modulus, kernel = jnp.exp(log_size), step / jnp.sinh(jnp.pi * w)           # the kernel of sigma; its derivative has one more factor w
    sine, cosine = kernel * modulus * jnp.sin(phase), kernel * modulus * jnp.cos(phase)
    columns = jnp.concatenate([jnp.ones_like(w)[:, None], real, imaginary], axis=1)
    # without the barrier the compiler repeats the exponentials in every sum, which costs more time than they do
    rows, columns = jax.lax.optimization_barrier((jnp.stack([sine, cosine, w * sine, w * cosine]), columns))
    r = real.shape[1]
    linear = rows @ columns
    constant, of_real, of_imaginary = linear[:, 0], linear[:, 1:1 + r], linear[:, 1 + r:]
    x, y = columns[:, 1:1 + r], columns[:, 1 + r:]
    mixed = _outer(rows[2], x, y)
    return rows[3], Moments(
        share=0.5 + constant[0],
        pull=of_real[0] + of_imaginary[1],
        slope=constant[3],
        lean=of_real[3] - of_imaginary[2],
        spread=_outer(rows[3], x, x) - _outer(rows[3], y, y) - mixed - mixed.T,
    )


def _outer(weights: Float[Array, "n"], a: Float[Array, "n r"], b: Float[Array, "n r"]) -> Float[Array, "r r"]:
    return (weights[:, None] * a).T @ b


def _check_closed(attention: Attention) -> None:
    """Raise unless every head has a closure."""
    for head in attention.heads if isinstance(attention, MultiHead) else (attention,):
        if isinstance(head, MultiHead):
            _check_closed(head)
        elif isinstance(head, Masked):
            raise ArgumentError("attention must have one law for all tokens, which Masked has not: use PositionFlow")
        elif not (head.keeps_gaussians or isinstance(head, Sigmoid)):
            raise ArgumentError(f"no moment closure is known for {type(head).__name__}: follow tokens with Particles")


class ClosureFlow(Flow):
    r"""The flow of a Gaussian under the `moment_closure` of an attention: $\alpha' = m$, $L' = BL$. A closure, not exact.

    The error is that of replacing the true law by a Gaussian at each time; compare with `Particles` on `state.quadrature(order)` to see it
    (about half a percent of the covariance for a sigmoid head at unit depth, companion derivation). With exact heads alone it is `GaussianFlow`.

    Args:
        attention: `Sigmoid`, or a `MultiHead` of sigmoid heads and variants that keep Gaussians Gaussian; weights may change with depth.
        nodes: quadrature nodes of a sigmoid head.

    Raises:
        ArgumentError: no closure is known for the attention.

    Example:
        >>> from theorylab import transformer_pde as tp
        >>> head = tp.Sigmoid(jnp.zeros((1, 2)), jnp.zeros((1, 2)), 1.0)                 # every token takes half of the mean
        >>> sol = tl.integrate(ClosureFlow(head), tp.Gaussian(jnp.ones(2), jnp.eye(2)), jnp.array([0.0, 1.0]))
        >>> round(float(sol.value.mean[1, 0]), 6), round(float(sol.value.cov[1, 0, 0]), 6)
        (1.648721, 1.0)
    """

    attention: Attention
    nodes: int = size(NODES, low=2)

    def __init__(self, attention: Attention, nodes: int = NODES):
        check_attention(attention)
        _check_closed(attention.at(0.0))
        self.attention, self.nodes = attention, nodes

    def lift(self, y0: Any) -> Gaussian:
        """The state as mean and factor."""
        if not isinstance(y0, Gaussian):
            raise ArgumentError(f"the state of a ClosureFlow must be a Gaussian, got {type(y0).__name__}")
        if y0.dim != self.attention.dim:
            raise ShapeError(f"the state must have dimension {self.attention.dim} to match the attention, got {y0.dim}")
        return Gaussian._raw(y0.mean, y0.factor, None)

    def field(self, t: Array, y: Gaussian) -> Gaussian:
        return Gaussian._raw(*_closed_factor_velocity(self.attention.at(t), y.mean, y.factor, self.nodes), None)

    def metrics(self, t: Array, y: Gaussian) -> dict[str, Array]:
        r"""`eigenvalues` (ascending), `rank`, `trace` and `mean`; `quadrature_error`, the change of $(m, BL)$ with half the nodes.

        The quadrature error bounds that of the integral over frequencies only; it says nothing about the closure.
        """
        attention = self.attention.at(t)
        fine, coarse = (_closed_factor_velocity(attention, y.mean, y.factor, n) for n in (self.nodes, self.nodes // 2))
        error = jnp.sqrt(((fine[0] - coarse[0]) ** 2).sum() + ((fine[1] - coarse[1]) ** 2).sum())
        return {**state_metrics(y), "quadrature_error": error}
