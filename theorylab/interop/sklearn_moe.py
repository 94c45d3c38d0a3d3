"""Scikit-learn: the top-K mixture of experts as a regressor with a predictive distribution."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from theorylab.core.iterate import iterate
from theorylab.core.solution import Status
from theorylab.core.stop import Below
from theorylab.errors import RunWarning
from theorylab.moe.em import EM
from theorylab.moe.model import SELECTIONS, Mixture
from theorylab.moe.problem import Likelihood
from theorylab.moe.routing import Routing, RoutingSearch, best_run
from theorylab.moe.selection import aic, bic

FLOATS: Any = (np.float64, np.float32)
SEARCH_ROUNDS = 25
ROUND_OFF = 1e4                         # units of round-off below which no score norm and no gain can be tested


class Predictive:
    """The distribution of y at each row of X, as `TopKMoERegressor.predict_dist` returns it.

    Attributes:
        mean: shape `(rows,)`.
        std: standard deviation, shape `(rows,)`.
    """

    def __init__(self, mixture: Mixture, X: np.ndarray):
        self._mixture, self._x = mixture, X
        self.mean, self.std = np.asarray(mixture.mean(X)), np.sqrt(np.asarray(mixture.variance_at(X)))

    def quantile(self, q: Any) -> np.ndarray:
        """Quantiles of order q, a number (shape `(rows,)`) or m of them (shape `(rows, m)`)."""
        return np.asarray(self._mixture.quantile(self._x, q))

    def cdf(self, y: Any) -> np.ndarray:
        """P(Y <= y), one y for each row."""
        return np.asarray(self._mixture.cdf(self._x, np.asarray(y, self._x.dtype)))

    def log_prob(self, y: Any) -> np.ndarray:
        """Log-density at y, one for each row."""
        return np.asarray(self._mixture.log_density(self._x, np.asarray(y, self._x.dtype)))

    def sample(self, random_state: Any = None) -> np.ndarray:
        """One draw for each row."""
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        return np.asarray(self._mixture.sample(self._x, key=seed).y)


class TopKMoERegressor(RegressorMixin, BaseEstimator):
    """A mixture of linear experts with Gaussian noise, of which a softmax gate keeps the `top_k` best at each input.

    `fit` maximises the likelihood: by routing search from several starts where `top_k < n_experts`, by EM from several starts where the gate keeps
    all. Rows are padded to a power of two, so that similar sizes share one compilation.

    Args:
        n_experts: number of experts.
        top_k: experts kept at each input; None keeps all.
        selection: `"logit"` ranks experts by the logits of the gate, `"slope"` without its intercepts.
        n_init: starts; the best fit is kept.
        max_iter: most EM steps.
        tol: score norm per row at which EM ends.
        random_state: seed, generator or None.

    Attributes:
        mixture_: the fit, a `theorylab.moe.Mixture`.
        gate_intercept_, gate_coef_, expert_intercept_, expert_coef_, variances_: its arrays.
        log_likelihood_: of the training data.
        converged_: whether EM met `tol`.
        n_iter_: EM steps of the best start.

    Raises:
        ValueError: data or parameters that do not fit; the message says why.

    Example:
        >>> x = np.linspace(-1.0, 1.0, 200)[:, None]
        >>> y = np.abs(x[:, 0]) + 0.01 * np.random.default_rng(0).normal(size=200)
        >>> model = TopKMoERegressor(2, top_k=1, n_init=2, random_state=0).fit(x, y)
        >>> bool(model.score(x, y) > 0.99), model.predict_dist(x[:3]).quantile([0.05, 0.95]).shape
        (True, (3, 2))
    """

    def __init__(self, n_experts: int = 2, top_k: int | None = None, *, selection: str = "logit", n_init: int = 4, max_iter: int = 500,
                 tol: float = 1e-6, random_state: Any = None):
        self.n_experts = n_experts
        self.top_k = top_k
        self.selection = selection
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> TopKMoERegressor:
        """Fit to X, shape `(rows, n_features)`, and y, shape `(rows,)`."""
        checked: Any = validate_data(self, X, y, y_numeric=True, dtype=FLOATS, ensure_min_samples=2)
        X, y = checked
        weight: Any = np.ones(len(X), X.dtype) if sample_weight is None else _check_sample_weight(sample_weight, X, dtype=X.dtype)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        active = self.n_experts if self.top_k is None else self.top_k
        problem = self._likelihood(X, np.asarray(y, X.dtype), weight, active)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RunWarning)                                  # of single starts; the best one is judged below
            start = self._searched(problem, seed) if active < self.n_experts else None
            runs = None if start is not None or self.n_init == 1 else self.n_init
            rule = problem.goal(max(self.tol, ROUND_OFF * float(np.finfo(X.dtype).eps)))
            sol = iterate(problem, EM(), start, steps=self.max_iter, stop=rule, runs=runs, key=seed, throw=False)
        values = np.atleast_1d(sol.history.last("log_likelihood"))
        best = int(np.nanargmax(values))
        self.mixture_ = best_run(sol).canonical()
        self.n_iter_, self.log_likelihood_ = int(np.atleast_1d(sol.steps)[best]), float(values[best])
        self.converged_ = bool(np.atleast_1d(np.asarray(sol.status))[best] == Status.CONVERGED)
        if not self.converged_:
            warnings.warn(f"EM ended after max_iter={self.max_iter} steps before its score was below tol={self.tol:g}", ConvergenceWarning,
                          stacklevel=2)
        fit = self.mixture_
        self.gate_intercept_, self.gate_coef_ = np.asarray(fit.gate_intercept), np.asarray(fit.gate_coef)
        self.expert_intercept_, self.expert_coef_ = np.asarray(fit.expert_intercept), np.asarray(fit.expert_coef)
        self.variances_ = np.asarray(fit.variance)
        return self

    def _likelihood(self, X: np.ndarray, y: np.ndarray, weight: np.ndarray, active: int) -> Likelihood:
        extra = (1 << (len(X) - 1).bit_length()) - len(X)
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {SELECTIONS}, got {self.selection!r}")
        Likelihood(X, y, self.n_experts, active, self.selection, weight)                 # its checks are about the data as given
        x_filled, y_filled = (np.concatenate([part, np.repeat(part[:1], extra, axis=0)]) for part in (X, y))
        return Likelihood(x_filled, y_filled, self.n_experts, active, self.selection, np.concatenate([weight, np.zeros(extra, X.dtype)]))

    def _searched(self, problem: Likelihood, seed: int) -> Mixture:
        routing = Routing(problem)
        return best_run(iterate(routing, RoutingSearch(), steps=SEARCH_ROUNDS, stop=Below("gain", 1e-4), runs=self.n_init, key=seed, throw=False))

    def _inputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        checked: Any = validate_data(self, X, dtype=FLOATS, reset=False)
        return checked.astype(self.variances_.dtype, copy=False)

    def predict(self, X: Any) -> np.ndarray:
        """The mean of y at each row, shape `(rows,)`."""
        X = self._inputs(X)
        return np.asarray(self.mixture_.mean(X))

    def predict_dist(self, X: Any) -> Predictive:
        """The distribution of y at each row."""
        X = self._inputs(X)
        return Predictive(self.mixture_, X)

    def gate_proba(self, X: Any) -> np.ndarray:
        """Weights of the experts at each row, shape `(rows, n_experts)`; 0 for those that are not kept."""
        X = self._inputs(X)
        return np.asarray(self.mixture_.gate(X))

    def score_samples(self, X: Any, y: Any = None) -> np.ndarray:
        """Log-density of y given X, shape `(rows,)`; without y, at the predicted mean."""
        dist = self.predict_dist(X)
        return dist.log_prob(dist.mean if y is None else y)

    def sample(self, X: Any, random_state: Any = None) -> np.ndarray:
        """One draw of y for each row, shape `(rows,)`."""
        return self.predict_dist(X).sample(random_state)

    def bic(self, X: Any, y: Any) -> float:
        """Bayesian information criterion on (X, y); smaller is better."""
        return self._criterion(bic, X, y)

    def aic(self, X: Any, y: Any) -> float:
        """Akaike's information criterion on (X, y); smaller is better."""
        return self._criterion(aic, X, y)

    def _criterion(self, criterion: Any, X: Any, y: Any) -> float:
        X, fit = self._inputs(X), self.mixture_
        return float(criterion(Likelihood(X, np.asarray(y, X.dtype), fit.experts, fit.active, fit.selection), fit))
