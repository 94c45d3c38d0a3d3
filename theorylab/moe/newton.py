"""Newton's method on the observed log-likelihood: finishes what EM has begun, and gives the observed information."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from theorylab.core import tree
from theorylab.core.module import number
from theorylab.core.problem import Method
from theorylab.core.psd import product, rank_cut
from theorylab.errors import ArgumentError
from theorylab.moe import density
from theorylab.moe.em import acceptable
from theorylab.moe.model import Mixture
from theorylab.moe.moments import over_chunks

Array = jax.Array
BISECTIONS = 60


class Derivatives(NamedTuple):
    """Log-likelihood, its gradient and minus its second derivatives in the coordinates of `Mixture.pack`."""

    log_likelihood: Array
    score: Array
    information: Array


@jax.jit
def derivatives(problem: Any, mixture: Mixture) -> Derivatives:
    """The log-likelihood and its derivatives in the identified coordinates, with the routing of `mixture` held fixed."""
    point, wide = mixture.pack(), jnp.result_type(float)

    def of_rows(x: Array, y: Array, w: Array, _: Any) -> Derivatives:
        def value(v: Array) -> Array:
            return jnp.sum(w * density.log_density(mixture.unpack(v), x, y))

        gradient, along = jax.linearize(jax.grad(value), point)
        hessian = jax.lax.map(along, jnp.eye(point.shape[0], dtype=point.dtype))
        return Derivatives(value(point).astype(wide), gradient, -hessian)

    return over_chunks(of_rows, problem)


def information(likelihood: Any, fit: Mixture) -> Array:
    r"""The observed information $-\nabla^2 \ell$ at `fit`, in the coordinates of `Mixture.pack` (last expert's gate 0).

    The routing is held fixed, so it says nothing about the boundaries of the regions, which are change points. Its inverse estimates the
    covariance of a regular fit; it is singular in what is not identified, as the gate for K = 1 (companion derivation).

    Args:
        likelihood: a `Likelihood` in memory.
        fit: its maximizer.

    Raises:
        ArgumentError, ShapeError: `fit` does not belong to `likelihood`, or the likelihood is streamed.

    Example:
        >>> from theorylab import moe
        >>> truth = moe.example("S2")
        >>> likelihood = moe.Likelihood(*moe.weyl_sample(truth, 400), experts=2, active=2)
        >>> information(likelihood, truth).shape
        (8, 8)
    """
    if likelihood.per_pass is not None:
        raise ArgumentError("information needs all rows in memory, got a streamed Likelihood")
    return derivatives(likelihood, likelihood.check_mixture(fit, "fit")).information


class NewtonState(NamedTuple):
    """The iterate with its derivatives, the radius of the trust region, and what the last step did."""

    mixture: Mixture
    at: Derivatives
    radius: Array
    gain: Array
    rejected: Array


class LikelihoodNewton(Method):
    """Trust-region Newton steps on the observed log-likelihood, from a fit by EM: two to five of them bring the score to round-off.

    Lengths are measured with the diagonal of the information, so that the radius is in standard deviations of single coordinates. The second
    derivatives cost as many gradients as there are parameters.

    Args:
        radius: of the first trust region.

    Metrics:
        `log_likelihood`, `gain` (per unit of weight), `score_norm`, `radius`, `rejected`.

    Example:
        >>> from theorylab import moe
        >>> likelihood = moe.Likelihood(*moe.weyl_sample(moe.example("S1"), 400, -1.0, 1.0), experts=3, active=2)
        >>> rough = tl.iterate(likelihood, moe.EM(), moe.example("S1"), steps=5).value
        >>> fit = tl.iterate(likelihood, moe.LikelihoodNewton(), rough, steps=20, stop=tl.Below("score_norm", 1e-12))
        >>> fit.steps < 8
        True
    """

    radius: Any = number(10.0, above=0.0)

    def check(self, problem: Any, x0: Any) -> None:
        problem.check_mixture(x0)

    def prepare(self, problem: Any) -> LikelihoodNewton:
        if problem.per_pass is not None:
            raise ArgumentError("LikelihoodNewton needs all rows in every step: for a streamed Likelihood use StreamedEM(per_pass)")
        return self

    def init(self, problem: Any, x0: Mixture, *, key: Array) -> NewtonState:
        at = derivatives(problem, x0)
        radius = jnp.asarray(self.radius, x0.dtype)
        return NewtonState(x0.canonical(), at, radius, jnp.full_like(at.log_likelihood, jnp.inf), jnp.zeros((), jnp.int32))

    def step(self, problem: Any, state: NewtonState, *, key: Array) -> NewtonState:
        m, at = state.mixture, state.at
        move, promised, length = _trust_region(at.information, at.score, state.radius)
        new = m.unpack(m.pack() + move)
        there = derivatives(problem, new)
        weight = self._weight(problem)
        actual = there.log_likelihood - at.log_likelihood
        # A gain beyond round-off is accepted; where round-off hides it, a smaller score decides.
        hidden = acceptable(at.log_likelihood, there.log_likelihood, weight, m.dtype)
        smaller = jnp.max(jnp.abs(there.score)) < jnp.max(jnp.abs(at.score))
        good = acceptable(there.log_likelihood, at.log_likelihood, weight, m.dtype) & (smaller | ~hidden) & tree.finite(there)
        trusted = hidden | (actual > 0.25 * promised.astype(actual.dtype))
        wide = good & trusted & (length > 0.9 * state.radius)
        radius = jnp.where(good & trusted, jnp.where(wide, 2 * state.radius, state.radius), jnp.minimum(state.radius, length) / 4)
        mixture, kept = tree.select(good, (new, there), (m, at))
        gain = jnp.where(good, actual / weight.astype(actual.dtype), jnp.zeros_like(actual))
        return NewtonState(mixture, kept, radius, gain, state.rejected + (~good).astype(jnp.int32))

    def _weight(self, problem: Any) -> Array:
        total = jnp.sum(problem.weight)
        return total if problem.axis is None else jax.lax.psum(total, problem.axis)

    def value(self, problem: Any, state: NewtonState) -> Mixture:
        return state.mixture

    def measure(self, problem: Any, state: NewtonState) -> dict[str, Array]:
        return {"log_likelihood": state.at.log_likelihood}

    def metrics(self, problem: Any, state: NewtonState) -> dict[str, Array]:
        score = jnp.max(jnp.abs(state.at.score)) / self._weight(problem)
        return {"gain": state.gain, "score_norm": score, "radius": state.radius, "rejected": state.rejected}


def _trust_region(information: Array, score: Array, radius: Array) -> tuple[Array, Array, Array]:
    """The maximizer of score.s - s.information.s / 2 over scaled lengths up to `radius`; the model's gain, and the length.

    Directions without curvature and slope, which are not identified, are left alone.
    """
    diagonal = jnp.abs(jnp.diagonal(information))
    unit = jnp.sqrt(jnp.where(diagonal > 0, diagonal, jnp.ones_like(diagonal)))
    values, vectors = jnp.linalg.eigh(information / unit[:, None] / unit)
    slope = product(vectors.T, score / unit)
    cut = rank_cut(score.shape[0], score.dtype) * jnp.max(jnp.abs(values))
    live = jnp.abs(values) > cut
    slope = jnp.where(live, slope, 0)

    def along(damping: Array) -> Array:
        bent = values + damping
        return jnp.where(live & (bent > cut), slope / jnp.where(bent > cut, bent, 1), 0)

    least = jnp.maximum(-jnp.min(jnp.where(live, values, jnp.inf)), 0) * (1 + 1e-6)
    most = least + jnp.linalg.norm(slope) / radius

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        long = jnp.linalg.norm(along(middle)) > radius
        return jnp.where(long, middle, ends[0]), jnp.where(long, ends[1], middle)

    short = jnp.linalg.norm(along(least)) <= radius
    damping = jnp.where(short, least, jax.lax.fori_loop(0, BISECTIONS, halve, (least, most))[1])
    s = along(damping)
    return product(vectors, s) / unit, jnp.sum(s * slope) - jnp.sum(values * s * s) / 2, jnp.linalg.norm(s)
