r"""Weights that carry one Gaussian to another: softmax attention and a bias in every layer, along the Bures geodesic."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from theorylab.core import checks
from theorylab.core.tree import is_traced
from theorylab.errors import ArgumentError, MatrixError, ShapeError
from theorylab.transformer_pde.attention import Softmax
from theorylab.transformer_pde.combined import FeedForward, Layered, MultiHead
from theorylab.transformer_pde.contract import Attention, cloud_metrics, state_metrics
from theorylab.transformer_pde.gaussian import Cloud, Gaussian, effective_rank

Array = jax.Array


class Steering(Attention):
    r"""Attention whose weights change with depth so that a Gaussian moves along the Bures geodesic; made by `steer`.

    In factors the geodesic from $L_0$ to $L_1$ is a straight line, $L_t = L_0 + t\,(L_1 U - L_0)$ with the orthogonal $U$ that brings $L_1 U$
    nearest to $L_0$; this holds for singular covariances too, and $L_t$ keeps its rank. Softmax with $A = I$ has $B L_t = V_t \Sigma_t L_t$, so

    $$ V_t = L'\,(L_t^\top L_t)^{-2} L_t^\top, \qquad b_t = \alpha' - V_t(\alpha_t + \Sigma_t\alpha_t) $$

    give $L' = B L_t$ and the mean its velocity (companion derivation; for invertible $\Sigma_0$ this is $B = (T - I)(I + t(T - I))^{-1}$ with the
    transport map $T$). The weights are those of the plan, not a feedback. As the path is straight, a residual network of any
    depth with the weights of its layers' starting depths follows it without error as well: `network`.

    Attributes:
        mean: of the start.
        factor: $L_0$.
        shift: $\alpha_1 - \alpha_0$.
        change: $L_1 U - L_0$.
        duration: the depth at which the target is reached.
    """

    mean: Array
    factor: Array
    shift: Array
    change: Array
    duration: Array

    @property
    def dim(self) -> int:
        """Dimension of a token."""
        return self.mean.shape[0]

    def path(self, t: Any) -> Gaussian:
        """The Gaussian planned for depth `t`, which must be a number.

        Example:
            >>> steer(Gaussian.standard(1), Gaussian(jnp.ones(1), 4 * jnp.eye(1))).path(0.5).cov.tolist()
            [[2.25]]
        """
        share = jnp.clip(jnp.asarray(t, self.mean.dtype) / self.duration, 0.0, 1.0)
        return Gaussian._raw(self.mean + share * self.shift, self.factor + share * self.change, None)

    def at(self, t: Any) -> MultiHead:
        """The softmax head and the bias in force at depth `t`; before the start and after the end, those of there."""
        planned = self.path(t)
        V = _values(planned.factor, self.change / self.duration)
        eye = jnp.eye(self.dim, dtype=V.dtype)
        still = V @ (planned.mean + planned.factor @ (planned.factor.T @ planned.mean))
        return MultiHead([Softmax(eye, eye, V), FeedForward(jnp.zeros_like(eye), self.shift / self.duration - still)])

    def network(self, count: int) -> Layered:
        """The network of `count` residual layers of step `duration / count` that carries the start to the target exactly.

        Use it with `ResidualLayers(duration / count)`, on the Gaussian, or on tokens drawn from it.

        Raises:
            ArgumentError: `count` is not a whole number of at least 1.

        Example:
            >>> from theorylab import transformer_pde as tp
            >>> plan = steer(tp.Gaussian.standard(1), tp.Gaussian(jnp.ones(1), 4 * jnp.eye(1)))
            >>> sol = tl.iterate(plan.network(3), tp.ResidualLayers(1 / 3), tp.Gaussian.standard(1), steps=3)
            >>> round(float(sol.value.mean[0]), 12), round(float(sol.value.cov[0, 0]), 12)
            (1.0, 4.0)
        """
        count = checks.whole("count", count, low=1)
        edges = self.duration * jnp.arange(count + 1, dtype=self.mean.dtype) / count
        return Layered([self.at(edge) for edge in edges[:-1]], edges)

    def velocity(self, mean: Array, cov: Array) -> Any:
        raise ArgumentError("Steering has a velocity at a depth only: ask at(depth), or integrate")

    def token_velocity(self, points: Array, weights: Array | None = None, queries: Array | None = None, tile: int = 1024,
                       causal: bool = False) -> tuple[Array, Array]:
        raise ArgumentError("Steering has a velocity at a depth only: ask at(depth), or integrate")

    def metrics(self, x: Gaussian | Cloud) -> dict[str, Array]:
        """`eigenvalues`, `rank`, `trace` and `mean` of the state."""
        return cloud_metrics(x) if isinstance(x, Cloud) else state_metrics(x)


def steer(start: Gaussian, target: Gaussian, duration: Any = 1.0) -> Steering:
    r"""Time-dependent softmax attention with a bias that carries `start` to `target` along the Bures geodesic in depth `duration`.

    Attention never changes the rank of a covariance, and every target of the same rank can be reached, also one with another range (compare
    Alcalde, Ji and Zuazua, arXiv 2606.07600, on reachability; the construction is a companion derivation). `integrate(GaussianFlow(steer(start,
    target)), start, [0, duration])` ends in the target to the tolerance of the integrator.

    Args:
        start: one Gaussian.
        target: one Gaussian of the same dimension and rank.
        duration: above 0.

    Raises:
        MatrixError: the ranks differ. Traced states have the rank of their columns.
        ShapeError: the dimensions differ, or a state has leading axes.
        ArgumentError: a state is not a Gaussian, or `duration` is not positive.

    Example:
        >>> plan = steer(Gaussian.standard(2), Gaussian(jnp.ones(2), jnp.diag(jnp.array([4.0, 1.0]))))
        >>> plan.at(0.0).heads[0].V.tolist()                                               # B = T - I there
        [[1.0, 0.0], [0.0, 0.0]]
    """
    for name, state in (("start", start), ("target", target)):
        if not isinstance(state, Gaussian):
            raise ArgumentError(f"{name} must be a Gaussian, got {type(state).__name__}")
        if state.mean.ndim != 1:
            raise ShapeError(f"{name} must have no leading axes, got a mean of shape {state.mean.shape}; use jax.vmap over it")
    if start.dim != target.dim:
        raise ShapeError(f"target must have dimension {start.dim} like start, got {target.dim}")
    duration = checks.real("duration", duration, above=0.0)
    factor, goal = start.factor, target.factor
    ranks = factor.shape[1], goal.shape[1]
    if not is_traced(start, target):
        ranks = int(effective_rank(start)), int(effective_rank(target))
        factor, goal = (_columns(a, r) for a, r in zip((factor, goal), ranks, strict=True))
    if ranks[0] != ranks[1]:
        raise MatrixError(f"attention keeps the rank of a covariance: start has rank {ranks[0]} and target rank {ranks[1]}")
    if ranks[0]:
        left, _, right = jnp.linalg.svd(goal.T @ factor)                                   # left right is the polar factor of L_1' L_0
        goal = goal @ (left @ right)
    return Steering(start.mean, factor, target.mean - start.mean, goal - factor, jnp.asarray(duration, factor.dtype))


def _columns(factor: Float[Array, "d n"], rank: int) -> Float[Array, "d r"]:
    """A factor of the same covariance with as many columns as its rank."""
    if factor.shape[1] == rank:
        return factor
    left, values, _ = jnp.linalg.svd(factor, full_matrices=False)
    return left[:, :rank] * values[:rank]


def _values(factor: Float[Array, "d r"], change: Float[Array, "d r"]) -> Float[Array, "d d"]:
    r"""$L'\,(L^\top L)^{-2} L^\top$; with $L = QR$ it is $L' R^{-1} R^{-\top} R^{-1} Q^\top$, without the square of a condition number."""
    if not factor.shape[1]:
        return jnp.zeros((factor.shape[0], factor.shape[0]), factor.dtype)
    basis, upper = jnp.linalg.qr(factor)
    solve = jax.scipy.linalg.solve_triangular
    return change @ solve(upper, solve(upper, solve(upper, basis.T), trans=1))
