r"""Confidence intervals for the identified parameters of a fit: Wald, profile likelihood, parametric bootstrap."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks
from theorylab.core.iterate import iterate
from theorylab.core.keys import Key, as_key, run_keys
from theorylab.core.psd import product
from theorylab.core.show import html_table, text_table
from theorylab.core.stop import Below
from theorylab.errors import ArgumentError, RunWarning
from theorylab.moe.em import EM
from theorylab.moe.model import Mixture
from theorylab.moe.newton import derivatives
from theorylab.moe.problem import Likelihood

Array = jax.Array
KINDS = ("wald", "profile", "bootstrap")
LOOSE = 1e-6  # share of a coordinate in the directions without information, above which it is not identified
DECREMENT = 0.01  # nats that a Newton step would gain; a fit that is farther from its maximum has no intervals of this kind
PROFILE_STEPS = 25


class Parameters(NamedTuple):
    """One number for each parameter of a mixture, in its shapes; those of the last expert's gate are 0, which is its convention."""

    gate_intercept: np.ndarray
    gate_coef: np.ndarray
    expert_coef: np.ndarray
    expert_intercept: np.ndarray
    variance: np.ndarray


def _parameters(vector: Any, fit: Mixture) -> Parameters:
    k, d = fit.gate_coef.shape
    parts = np.split(np.asarray(vector), np.cumsum([k - 1, (k - 1) * d, k * d, k]))
    return Parameters(np.append(parts[0], 0.0), np.concatenate([parts[1].reshape(k - 1, d), np.zeros((1, d))]), parts[2].reshape(k, d), parts[3],
                      parts[4])


class Delta(NamedTuple):
    """A function of the parameters with its interval by the delta method."""

    value: np.ndarray
    standard_error: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


@dataclasses.dataclass(frozen=True, repr=False)
class Intervals:
    """Intervals of all parameters; NaN for those that are not identified (with K = 1 those of the gate).

    Attributes:
        fit: the estimate, canonical (last expert's gate 0).
        lower: lower ends.
        upper: upper ends.
        standard_error: standard errors; for `profile` those of `wald`.
        covariance: in the coordinates of `Mixture.pack`.
        level: confidence level of each interval.
        kind: how they were made.
    """

    fit: Mixture
    lower: Parameters
    upper: Parameters
    standard_error: Parameters
    covariance: np.ndarray
    level: float
    kind: str

    def of(self, function: Callable[[Mixture], Any]) -> Delta:
        """The interval of a differentiable function of the mixture (a mean, a quantile) by the delta method.

        Boundaries of regions are change points: their error is of order 1/n and no such interval holds for them.
        """
        point = self.fit.pack()
        value, slope = (f(point) for f in (lambda v: jnp.asarray(function(self.fit.unpack(v))),
                                           jax.jacobian(lambda v: jnp.asarray(function(self.fit.unpack(v))))))
        slope = np.asarray(slope)
        # A parameter that is not identified matters only where the function depends on it.
        lost = np.isnan(np.diag(self.covariance))
        spread = np.sqrt(np.einsum("...i,ij,...j->...", slope, np.nan_to_num(self.covariance), slope))
        error = np.where((np.abs(slope) > 0)[..., lost].any(axis=-1), np.nan, spread)
        reach = _normal_quantile(self.level) * error
        return Delta(np.asarray(value), error, np.asarray(value) - reach, np.asarray(value) + reach)

    def _rows(self) -> tuple[list[str], list[list[Any]]]:
        rows, last = [], self.fit.experts - 1
        for name in Parameters._fields:
            at = np.asarray(getattr(self.fit, name))
            for index in np.ndindex(at.shape):
                if not (name.startswith("gate") and index[0] == last):
                    label = f"{name}[{', '.join(map(str, index))}]"
                    rows.append([label, *(float(a[index]) for a in (at, getattr(self.standard_error, name), getattr(self.lower, name),
                                                                     getattr(self.upper, name)))])
        return ["parameter", "estimate", "standard error", "lower", "upper"], rows

    def __repr__(self) -> str:
        return f"Intervals: {self.kind}, {100 * self.level:g} %\n{text_table(*self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(*self._rows(), caption=f"{self.kind}, {100 * self.level:g} %")


def _normal_quantile(level: float) -> float:
    return float(jax.scipy.special.ndtri(0.5 + level / 2))


def confidence_intervals(likelihood: Likelihood, fit: Mixture, kind: str = "wald", *, level: float = 0.95, key: Key | int = 0,
                         replicates: int = 200, steps: int = 500) -> Intervals:
    r"""Intervals for the parameters of a maximum likelihood fit, with the routing of the rows held fixed.

    * `"wald"`: from the inverse of the observed information; for regular parameters (companion derivation).
    * `"profile"`: where twice the loss of profile log-likelihood is the chi-square quantile, found for all ends at once by Newton's method on the
      likelihood equations (Venzon and Moolgavkar); NaN where it finds no end.
    * `"bootstrap"`: quantiles over fits, by EM from `fit`, to data drawn from the fit at the same x, all in one batch.

    Nothing here covers region boundaries, which are change points.

    Args:
        likelihood: the problem, with rows in memory.
        fit: its maximizer: finish EM with `LikelihoodNewton`.
        kind: see above.
        level: confidence level.
        key: seed or random key of the bootstrap.
        replicates: of the bootstrap.
        steps: most EM steps of each replicate.

    Raises:
        ArgumentError, ShapeError: `fit` does not belong to `likelihood`, or a number is out of range.
        UnknownNameError: another `kind`.

    Warns:
        RunWarning: `fit` is not a maximizer.

    Example:
        >>> from theorylab import moe
        >>> likelihood = moe.Likelihood(*moe.weyl_sample(moe.example("S1"), 400, -1.0, 1.0), experts=3, active=2)
        >>> fit = tl.iterate(likelihood, moe.EM(), moe.example("S1"), steps=60).value
        >>> moe.confidence_intervals(likelihood, fit).standard_error.variance.round(5).tolist()
        [0.0109, 0.03134, 0.01925]
    """
    checks.among("kind", kind, KINDS)
    if not isinstance(likelihood, Likelihood) or likelihood.per_pass is not None:
        raise ArgumentError("likelihood must be a Likelihood with rows in memory")
    fit = likelihood.check_mixture(fit, "fit").canonical()
    checks.real("level", level, above=0.0, below=1.0)
    if kind == "bootstrap":
        replicates, steps = checks.whole("replicates", replicates, low=2), checks.whole("steps", steps, low=1)
        return _bootstrap(likelihood, fit, float(level), as_key(key), replicates, steps)
    at = derivatives(likelihood, fit)
    covariance, gain = _covariance(at.information, at.score)
    if not float(gain) < DECREMENT:
        warnings.warn(f"fit is not a maximizer: a Newton step would gain {float(gain):.3g} nats; finish it with LikelihoodNewton", RunWarning,
                      stacklevel=2)
    error = jnp.sqrt(jnp.where(jnp.diag(covariance) >= 0, jnp.diag(covariance), jnp.nan))
    point, reach = fit.pack(), _normal_quantile(level)
    lower, upper = point - reach * error, point + reach * error
    if kind == "profile":
        ends = _profile(likelihood, fit, covariance, jnp.asarray(reach, point.dtype))
        lower, upper = ends[0], ends[1]
    return _assemble(fit, lower, upper, error, np.asarray(covariance), float(level), kind)


def _assemble(fit: Mixture, lower: Any, upper: Any, error: Any, covariance: np.ndarray, level: float, kind: str) -> Intervals:
    return Intervals(fit, _parameters(lower, fit), _parameters(upper, fit), _parameters(error, fit), covariance, level, kind)


@jax.jit
def _covariance(information: Array, score: Array) -> tuple[Array, Array]:
    """The inverse of the information on what is identified, NaN elsewhere, and the gain that a Newton step promises."""
    diagonal = jnp.abs(jnp.diagonal(information))
    unit = jnp.sqrt(jnp.where(diagonal > 0, diagonal, jnp.ones_like(diagonal)))
    values, vectors = jnp.linalg.eigh(information / unit[:, None] / unit)
    live = values > len(values) * 100 * float(jnp.finfo(values.dtype).eps) * jnp.max(jnp.abs(values))
    inverse = jnp.where(live, 1 / jnp.where(live, values, 1), 0)
    covariance = product(vectors * inverse, vectors.T) / unit[:, None] / unit
    slope = product(vectors.T, score / unit)
    lost = jnp.sum(jnp.where(live, 0, vectors**2), axis=1) > LOOSE
    return jnp.where(lost[:, None] | lost, jnp.nan, covariance), jnp.sum(jnp.where(live, slope**2 * inverse, 0)) / 2


@jax.jit
def _profile(problem: Likelihood, fit: Mixture, covariance: Array, reach: Array) -> Array:
    """Lower and upper ends, shape (2, parameters): L = max - reach^2 / 2 and no slope in the other coordinates."""
    point, size = fit.pack(), covariance.shape[0]
    error = jnp.sqrt(jnp.diag(covariance))
    unit = jnp.where(error > 0, error, jnp.ones_like(error))
    target = problem.log_likelihood(fit).astype(point.dtype) - reach**2 / 2
    positive = fit.variance.shape[0]

    def end(i: Array, side: Array) -> Array:
        own = jnp.arange(size) == i
        start = point + side * reach * jnp.nan_to_num(covariance[:, i]) / unit[i]

        def residual(v: Array) -> tuple[Array, Array, Array]:
            at = derivatives(problem, fit.unpack(v))
            slope = at.score * unit
            value = jnp.where(own, at.log_likelihood.astype(v.dtype) - target, slope)
            return value, jnp.where(own[:, None], slope, -at.information * unit[:, None] * unit), at.log_likelihood

        def bounded(v: Array) -> Array:
            return v.at[-positive:].set(jnp.maximum(v[-positive:], fit.variance / 50))

        def step(_: Any, v: Array) -> Array:
            value, jacobian, _ = residual(v)
            move = jnp.linalg.lstsq(jacobian, value)[0] * unit
            longest = jnp.max(jnp.abs(move) / unit)
            return bounded(v - move * jnp.minimum(1, 2 / jnp.maximum(longest, 1e-12)))  # at most two standard errors a step

        v = jax.lax.fori_loop(0, PROFILE_STEPS, step, bounded(start))
        value, _, _ = residual(v)
        found = (jnp.max(jnp.abs(value)) < 1e-6) & (side * (v[i] - point[i]) > 0) & jnp.isfinite(error[i])
        return jnp.where(found, v[i], jnp.nan)

    coordinates = jnp.arange(size)
    return jnp.stack([jax.lax.map(partial(end, side=jnp.asarray(side, point.dtype)), coordinates) for side in (-1.0, 1.0)])


def _bootstrap(likelihood: Likelihood, fit: Mixture, level: float, key: Array, replicates: int, steps: int) -> Intervals:
    drawn = _replicates(likelihood, fit, run_keys(key, replicates), steps=steps)
    good = jnp.isfinite(drawn).all(axis=1)
    if not bool(good.all()):
        warnings.warn(f"{int((~good).sum())} of {replicates} bootstrap fits are not finite and are left out", RunWarning, stacklevel=3)
    draws = np.asarray(drawn)[np.asarray(good)]
    if fit.active == 1:
        draws[:, : (fit.experts - 1) * (fit.dim + 1)] = np.nan
    lower, upper = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    covariance = np.atleast_2d(np.cov(draws, rowvar=False))
    return _assemble(fit, lower, upper, np.sqrt(np.diag(covariance)), covariance, level, "bootstrap")


@partial(jax.jit, static_argnames="steps")
def _replicates(likelihood: Likelihood, fit: Mixture, keys: Array, *, steps: int) -> Array:
    def one(key: Array) -> Array:
        y = fit.sample_experts(likelihood.x, key=key)[0]
        solution = iterate(likelihood.replace(y=y), EM(), fit, steps=steps, stop=Below("gain", 1e-9), keep="last")
        return solution.value.pack()

    return jax.vmap(one)(keys)
