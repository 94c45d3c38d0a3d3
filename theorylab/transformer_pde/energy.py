"""Energies whose gradient flow in the Bures geometry is attention, and a Lyapunov function where there is none."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from theorylab.core.module import square
from theorylab.errors import ArgumentError, MatrixError
from theorylab.transformer_pde.attention import L2, Attention, Head, Linear, Softmax, check_state, is_concrete
from theorylab.transformer_pde.entropic import Sinkhorn
from theorylab.transformer_pde.gaussian import Gaussian, _floating
from theorylab.transformer_pde.orbits import HYPOTHESIS, proportion

Array = jax.Array


def energy(attention: Attention, state: Gaussian, mobility: Any = None) -> Array:
    r"""The potential $F$ whose Bures gradient descent is the flow: $\Sigma' = -2(\nabla F\,\Sigma + \Sigma\,\nabla F)$ (paper, gradient flows).

    With $V = sA$, or $V = sP$ for L2, and any sign of $s$ (companion derivation):

    | attention | needs | $F / s$ |
    |---|---|---|
    | softmax | $A$ symmetric, zero mean | $-\tfrac14\operatorname{tr}(A\Sigma A\Sigma)$ |
    | linear | $A$ symmetric | $-\tfrac14[\operatorname{tr}(A\Sigma A\Sigma) + 2\alpha^\top A\Sigma A\alpha + (\alpha^\top A\alpha)^2]$ |
    | Sinkhorn | $A$ symmetric | $\tfrac12\sum_i [(1 - r_i)/2 + \tfrac12\log((1 + r_i)/2)] - \alpha^\top A\alpha / (2\varepsilon)$ |
    | L2 | $Q = rK$, zero mean | $-r\,[\tfrac12\operatorname{tr}(P\Sigma) - \tfrac14\log\det(I + 2P\Sigma)]$ |

    where $r_i = \sqrt{1 + 4 s_i^2}$ with the singular values $s_i$ of $L^\top A^\top L / \varepsilon$: for Sinkhorn $F$ is the entropic transport
    cost of the measure to itself, up to its prefactor. Where the mean is allowed, it descends too: $\alpha' = -\nabla_\alpha F$. With a mobility $M$
    and $V = sMA$ the flow is $\Sigma' = -2(M\,\nabla F\,\Sigma + \Sigma\,\nabla F\,M)$: $V = I$ and $A \prec 0$ has $M = -A^{-1}$.

    Args:
        attention: a single head; its hypotheses are checked on values, outside compiled code only.
        state: one Gaussian.
        mobility: $M$, symmetric positive definite; None means the identity.

    Raises:
        MatrixError: a hypothesis fails; the flow is then not a gradient flow of this kind.
        ArgumentError: no energy is known for this class.

    Example:
        >>> float(energy(Softmax(jnp.eye(2), jnp.eye(2), jnp.eye(2)), Gaussian.standard(2)))
        -0.5
    """
    check_state(attention, state, Gaussian)
    if not isinstance(attention, (Softmax, L2, Linear, Sinkhorn)):
        raise ArgumentError(f"energy is known for softmax, linear, Sinkhorn and L2 attention, got {type(attention).__name__}")
    form = attention.P if isinstance(attention, L2) else attention.A
    moved = form if mobility is None else _mobility(mobility, attention) @ form
    size = (moved * moved).sum()
    s = jnp.where(size > 0, (attention.value_matrix * moved).sum() / jnp.where(size > 0, size, 1.0), 0.0).astype(size.dtype)
    ratio, parallel = proportion(attention)
    if is_concrete(attention, state, moved):
        name = ("P = K^T K" if isinstance(attention, L2) else "A = K^T Q") if mobility is None else "mobility times the form"
        if isinstance(attention, L2):
            if not bool(parallel):
                raise MatrixError("energy of L2 attention needs Q to be a multiple of K: otherwise the flow has no potential")
        else:
            _symmetric_form(attention, "energy")
        if bool(jnp.linalg.norm(attention.value_matrix - s * moved) > HYPOTHESIS * jnp.linalg.norm(attention.value_matrix)):
            raise MatrixError(f"energy needs V to be a multiple of {name}: otherwise the flow is no Bures gradient flow")
        if isinstance(attention, (Softmax, L2)):
            _zero_mean(state, "energy")
    factor, mean = state.factor, state.mean
    inside = factor.T @ form @ factor
    if isinstance(attention, L2):
        return -ratio * s * (jnp.trace(inside) / 2 - jnp.linalg.slogdet(jnp.eye(inside.shape[0], dtype=inside.dtype) + 2 * inside)[1] / 4)
    if isinstance(attention, Sinkhorn):
        scaled = inside / attention.temperature
        square_values = jnp.clip(jnp.linalg.eigvalsh(scaled @ scaled.T), 0.0)
        root = jnp.sqrt(1 + 4 * square_values)
        half = 2 * square_values / (1 + root)                                          # (r - 1) / 2 without cancellation
        return s * ((jnp.log1p(half) / 2 - half).sum() / 2 - mean @ form @ mean / (2 * attention.temperature))
    total = (inside * inside.T).sum()
    if isinstance(attention, Linear):
        pulled = form @ mean
        total = total + 2 * ((factor.T @ pulled) ** 2).sum() + (mean @ pulled) ** 2
    return -s * total / 4


def interaction_energy(attention: Softmax, state: Gaussian) -> Array:
    r"""$F(\mu) = \tfrac12\iint e^{x^\top A y}\,d\mu(x)\,d\mu(y) = \tfrac12\det(I - \Sigma A\Sigma A)^{-1/2}$ of a centered Gaussian.

    Softmax attention with $A$ symmetric and $V = A$ ascends it in the metric weighted by $Z_\mu(x) = \int e^{x^\top A y} d\mu(y)$, on every measure
    (companion derivation, from the paper's gradient-flow structure). It is infinite where $\|\Sigma^{1/2} A \Sigma^{1/2}\| \ge 1$.

    Args:
        attention: a softmax head with $V = sA$, $s > 0$, and $A$ symmetric.
        state: one Gaussian of zero mean.

    Raises:
        MatrixError: a hypothesis fails.

    Example:
        >>> head = Softmax.bilinear(0.6 * jnp.eye(1), 0.6 * jnp.eye(1))
        >>> round(float(interaction_energy(head, Gaussian.standard(1))), 12), float(interaction_energy(head, Gaussian(jnp.zeros(1), 2 * jnp.eye(1))))
        (0.625, inf)
    """
    check_state(attention, state, Gaussian)
    if not isinstance(attention, Softmax):
        raise ArgumentError(f"interaction_energy is defined for softmax attention, got {type(attention).__name__}")
    A, V = attention.A, attention.value_matrix
    if is_concrete(attention, state):
        _symmetric_form(attention, "interaction_energy")
        s = (V * A).sum() / jnp.where((A * A).sum() > 0, (A * A).sum(), 1.0)
        if bool(jnp.linalg.norm(V - s * A) > HYPOTHESIS * jnp.linalg.norm(V)) or float(s) < 0:
            raise MatrixError("interaction_energy needs V to be a positive multiple of A = K^T Q: otherwise the flow does not ascend it")
        _zero_mean(state, "interaction_energy")
    inside = state.factor.T @ A @ state.factor
    inside = (inside + inside.T) / 2
    finite = jnp.abs(jnp.linalg.eigvalsh(jax.lax.stop_gradient(inside))).max(initial=0.0) < 1
    kept = jnp.where(finite, inside, 0.0).astype(inside.dtype)
    log_det = jnp.linalg.slogdet(jnp.eye(kept.shape[0], dtype=kept.dtype) - kept @ kept)[1]
    return jnp.where(finite, jnp.exp(-log_det / 2) / 2, jnp.inf)


def lyapunov(attention: Attention, state: Gaussian) -> Array:
    r"""$\operatorname{tr}(V^{-1}\Sigma)$, which does not increase where $V \succ 0$ is symmetric and $A + A^\top \preceq 0$.

    For softmax its derivative is $2\operatorname{tr}(\Sigma A\Sigma)$; it holds for Sinkhorn, for linear attention at zero mean, and for L2 if $Q$
    is a negative multiple of $K$ (companion derivation). So the covariance stays bounded, and a limit has $Q\Sigma_\infty = 0$ if $K = -Q$.

    Args:
        attention: a single head; its hypotheses are checked on values, outside compiled code only.
        state: Gaussians, with any leading axes.

    Raises:
        MatrixError: a hypothesis fails: the function may increase.
        ArgumentError: the class or the state does not fit.

    Example:
        >>> float(lyapunov(Softmax(-jnp.eye(2), jnp.eye(2), 2 * jnp.eye(2)), Gaussian.standard(2)))
        1.0
    """
    if not isinstance(attention, (Softmax, L2, Linear, Sinkhorn)):
        raise ArgumentError(f"lyapunov is known for softmax, linear, Sinkhorn and L2 attention, got {type(attention).__name__}")
    if not isinstance(state, Gaussian) or state.dim != attention.dim:
        raise ArgumentError(f"state must be a Gaussian of dimension {attention.dim}, got {getattr(state, 'dim', type(state).__name__)}")
    V = attention.value_matrix
    if is_concrete(attention):
        values, form = jnp.linalg.eigvalsh(V + V.T), attention.A + attention.A.T
        if bool(jnp.linalg.norm(V - V.T) > HYPOTHESIS * jnp.linalg.norm(V)) or not float(values[0]) > 0:
            low = float(values[0]) / 2
            raise MatrixError(f"lyapunov needs V to be symmetric positive definite, got the eigenvalue {low:.6g} of its symmetric part")
        if float(jnp.linalg.eigvalsh(form)[-1]) > HYPOTHESIS * float(jnp.linalg.norm(form)):
            raise MatrixError("lyapunov needs A + A^T to be negative semidefinite: otherwise the function may increase")
        if isinstance(attention, L2) and not bool(proportion(attention)[1]):
            raise MatrixError("lyapunov of L2 attention needs Q to be a multiple of K: otherwise the function may increase")
    if is_concrete(attention.feels_mean, state.mean) and attention.feels_mean:
        _zero_mean(state, "lyapunov")
    return (state.factor * jnp.linalg.solve(V, state.factor)).sum((-1, -2))


def _mobility(mobility: Any, attention: Head) -> Float[Array, "d d"]:
    M = square("mobility", _floating("mobility", mobility), attention.dim)
    if is_concrete(M):
        low = float(jnp.linalg.eigvalsh((M + M.T) / 2)[0])
        if bool(jnp.linalg.norm(M - M.T) > HYPOTHESIS * jnp.linalg.norm(M)) or not low > 0:
            raise MatrixError(f"mobility must be symmetric positive definite, got the eigenvalue {low:.6g} of its symmetric part")
    return M


def _symmetric_form(attention: Head, user: str) -> None:
    A = attention.A
    if bool(jnp.linalg.norm(A - A.T) > HYPOTHESIS * jnp.linalg.norm(A)):
        raise MatrixError(f"{user} needs a symmetric matrix A = K^T Q, got one that is not: the flow has no potential")


def _zero_mean(state: Gaussian, user: str) -> None:
    if bool((state.mean != 0).any()):
        raise MatrixError(f"{user} needs a state of zero mean: with another mean the flow is no Bures gradient flow")
