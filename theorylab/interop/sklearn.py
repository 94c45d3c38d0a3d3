"""Scikit-learn: estimators that fit the problems of this package and follow the conventions of that one."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from theorylab.core.iterate import iterate
from theorylab.core.keys import as_key, stream
from theorylab.core.schedule import Cosine, Inverse
from theorylab.core.stop import Below
from theorylab.interop.sklearn_moe import TopKMoERegressor as TopKMoERegressor
from theorylab.stiefel.cca import CCA
from theorylab.stiefel.eigen import GEVP
from theorylab.stiefel.ica import ICA
from theorylab.stiefel.polish import polish
from theorylab.stiefel.stochastic import DEFAULT_OFFSET, StochasticLanding

FLOATS: Any = (np.float64, np.float32)
LEAST_STEPS = 400


@jax.jit
def _advance(method: Any, problem: Any, state: Any, batch: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return method.step(problem.feed(batch), state, key=None)


class _Estimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What the estimators of this module share: seeds, numbers of components, and one stochastic step for each chunk of data."""

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))  # type: ignore[attr-defined]

    def _components(self, most: int, words: str) -> int:
        p = most if self.n_components is None else self.n_components  # type: ignore[attr-defined]
        if isinstance(p, bool) or not isinstance(p, (int, np.integer)) or not 1 <= p <= most:
            raise ValueError(f"n_components must be a whole number between 1 and {most}, {words}, got {p!r}")
        return int(p)

    def _follow(self, make: Any, chunk: Any, parts: tuple[np.ndarray, ...]) -> Any:
        """One step of preconditioned stochastic landing on a chunk; the first chunk makes the problem and its preconditioner."""
        if not hasattr(self, "_state"):
            problem, key = make(), as_key(self._seed())
            method = StochasticLanding(Inverse(self.step_size, DEFAULT_OFFSET), preconditioner="auto").prepare(problem)  # type: ignore[attr-defined]
            state = method.init(problem.feed(chunk), problem.start(stream(key, "start")), key=key)
            self._problem, self._method = problem, method
            self._state = jax.tree.map(lambda a: jax.lax.convert_element_type(a, a.dtype), state)
            self._seen, self._means = 0, tuple(np.zeros(part.shape[1]) for part in parts)
        rows = len(parts[0])
        self._seen += rows
        self._means = tuple(mean + (part.mean(axis=0) - mean) * (rows / self._seen) for mean, part in zip(self._means, parts, strict=True))
        self._state = _advance(self._method, self._centred(), self._state, chunk)
        return self._method.value(self._problem, self._state)

    def _centred(self) -> Any:
        """The problem with the means of all rows so far."""
        return self._problem

    def _forget(self) -> None:
        if hasattr(self, "_state"):
            del self._state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class StochasticCCA(_Estimator):
    """Canonical correlation analysis by stochastic landing: minibatches, no covariance inverted in the loop, data of any number of rows.

    `fit` runs preconditioned stochastic landing with a cosine schedule and finishes with exact retraction and pairing of the directions.
    `partial_fit` makes one step for each chunk; its first chunk sets the coordinates, so it should hold a few times as many rows as columns.

    Args:
        n_components: directions of each view; None is as many as the narrower view has columns.
        ridge: added to both covariances.
        batch_size: rows of a batch; None is the largest power of two up to min(512, rows / 14).
        step_size: the first step; what the batch forbids is cut.
        epochs: passes over the data in `fit`, and at least 400 steps.
        unbiased: whether the tangent term is the U-statistic, better on long runs.
        random_state: seed, generator or None.

    Attributes:
        x_rotations_: directions of the first view, shape `(n_features, n_components)`.
        y_rotations_: directions of the second view.
        correlations_: correlations of the pairs on the data of `fit`, descending.
        x_mean_, y_mean_: means of the columns.
        n_iter_: steps made.

    Raises:
        ValueError: data or parameters that do not fit; the message says why.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(200, 3))
        >>> model = StochasticCCA(n_components=1, random_state=0).fit(x, x @ np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        >>> bool(model.correlations_[0] > 0.99)
        True
    """

    def __init__(self, n_components: int | None = None, *, ridge: float = 1e-3, batch_size: int | None = None, step_size: float = 0.7,
                 epochs: int = 40, unbiased: bool = False, random_state: Any = None):
        self.n_components = n_components
        self.ridge = ridge
        self.batch_size = batch_size
        self.step_size = step_size
        self.epochs = epochs
        self.unbiased = unbiased
        self.random_state = random_state

    def _views(self, X: Any, y: Any, reset: bool) -> tuple[np.ndarray, np.ndarray]:
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=FLOATS, ensure_min_samples=2, reset=reset)
        return X, np.asarray(y, X.dtype).reshape(len(X), -1)

    def _width(self, X: np.ndarray, Y: np.ndarray) -> int:
        return self._components(min(X.shape[1], Y.shape[1]), f"the columns of the narrower view (n_features = {X.shape[1]}, targets = {Y.shape[1]})")

    def fit(self, X: Any, y: Any) -> StochasticCCA:
        """Fit the directions of X, shape `(rows, n_features)`, and y, shape `(rows,)` or `(rows, n_targets)`."""
        X, Y = self._views(X, y, True)
        self._forget()
        problem = CCA(X, Y, self._width(X, Y), ridge=self.ridge, reference="none")
        method = StochasticLanding(self.step_size, self.batch_size, estimator="u_statistic" if self.unbiased else "one_batch", preconditioner="auto")
        steps = max(int(self.epochs) * (len(X) // method.rows_per_batch(problem)), LEAST_STEPS)
        sol = iterate(problem, method.replace(step_size=Cosine(self.step_size, steps)), steps=steps, every=steps, key=self._seed())
        x, y_ = polish(problem, sol.value, steps=0)
        self.x_rotations_, self.y_rotations_ = np.asarray(x), np.asarray(y_)
        self.x_mean_, self.y_mean_ = (np.asarray(c) for c in problem.centre)
        self.n_iter_ = steps
        self._n_features_out = self.x_rotations_.shape[1]
        self.correlations_ = self._correlations(X, Y)
        return self

    def partial_fit(self, X: Any, y: Any) -> StochasticCCA:
        """One step on a chunk of rows; `correlations_` are then those of the chunk."""
        X, Y = self._views(X, y, not hasattr(self, "_state"))
        chunk = (X.astype(self.x_rotations_.dtype), Y.astype(self.x_rotations_.dtype)) if hasattr(self, "_state") else (X, Y)
        if hasattr(self, "_state") and Y.shape[1] != self.y_rotations_.shape[0]:
            raise ValueError(f"y must have {self.y_rotations_.shape[0]} columns as in the chunks before, got {Y.shape[1]}")
        x, y_ = self._follow(lambda: CCA.streamed((X, Y), self._width(X, Y), ridge=self.ridge), chunk, (X, Y))
        self.x_rotations_, self.y_rotations_ = np.asarray(x), np.asarray(y_)
        self.x_mean_, self.y_mean_ = (m.astype(self.x_rotations_.dtype) for m in self._means)
        self.n_iter_ = int(self._state.step)
        self._n_features_out = self.x_rotations_.shape[1]
        self.correlations_ = self._correlations(X, Y)
        return self

    def _centred(self) -> Any:
        return self._problem.replace(centre=tuple(jnp.asarray(m, self._problem.dtype) for m in self._means))

    def transform(self, X: Any, y: Any = None) -> Any:
        """Scores of X, shape `(rows, n_components)`; with y the pair of scores of both views."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=FLOATS, reset=False)
        scores = (X - self.x_mean_) @ self.x_rotations_
        if y is None:
            return scores
        Y = check_array(y, ensure_2d=False, dtype=FLOATS, input_name="y").reshape(len(X), -1)
        return scores, (Y - self.y_mean_) @ self.y_rotations_

    def score(self, X: Any, y: Any) -> float:
        """Sum of the correlations between the scores of both views."""
        check_is_fitted(self)
        X, Y = self._views(X, y, False)
        return float(self._correlations(X, Y).sum())

    def _correlations(self, X: np.ndarray, Y: np.ndarray) -> np.ndarray:
        a, b = (X - self.x_mean_) @ self.x_rotations_, (Y - self.y_mean_) @ self.y_rotations_
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        lengths = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
        return np.where(lengths > 0, (a * b).sum(axis=0) / np.where(lengths > 0, lengths, 1), 0.0)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.target_tags.one_d_labels = False
        return tags


class _Solved(_Estimator):
    """Estimators of one view that solve their problem to a tolerance and have components."""

    mean_: np.ndarray
    components_: np.ndarray

    def _solve(self, problem: Any) -> np.ndarray:
        """The point of the default method, finished to round-off."""
        sol = iterate(problem, problem.default_method(), steps=int(self.max_iter), stop=Below("residual", self.tol), key=self._seed(),  # type: ignore[attr-defined]
                      throw=False)
        if not sol.status.good:
            warnings.warn(f"{type(self).__name__} did not converge in {self.max_iter} steps (status {sol.status.name}); raise max_iter or tol",  # type: ignore[attr-defined]
                          ConvergenceWarning, stacklevel=3)
        self.n_iter_ = max(int(sol.steps), 1)
        return np.asarray(polish(problem, sol.value))

    def _rank(self, X: np.ndarray) -> int:
        return int(np.linalg.matrix_rank(X - X.mean(axis=0)))

    def transform(self, X: Any) -> np.ndarray:
        """Scores, shape `(rows, n_components)`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=FLOATS, reset=False)
        return (X - self.mean_) @ self.components_.T


class GeneralizedEigen(_Solved):
    r"""Directions in which the variance of the data is largest relative to a metric: $\max \mathrm{tr}(W^\top C W)$ over $W^\top B W = I$.

    The metric B is the covariance of `background` rows given to `fit` (signal against noise), or the matrix `metric`, or the identity (principal
    components).

    Args:
        n_components: number of directions; None is the number of features.
        metric: symmetric positive definite matrix B of shape `(n_features, n_features)`; None is the identity.
        ridge: added to B.
        tol: of the residual of the iteration that precedes the finishing steps.
        max_iter: most steps of it.
        step_size: the first step of `partial_fit`.
        random_state: seed, generator or None.

    Attributes:
        components_: directions in rows, shape `(n_components, n_features)`.
        eigenvalues_: variance along each relative to the metric, descending.
        mean_: means of the columns.
        n_iter_: steps made.

    Raises:
        ValueError: data or parameters that do not fit; the message says why.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(100, 3)) * np.array([3.0, 2.0, 1.0])
        >>> model = GeneralizedEigen(1, metric=np.diag([9.0, 1.0, 1.0])).fit(x)
        >>> int(np.abs(model.components_[0]).argmax())
        1
    """

    def __init__(self, n_components: int | None = None, *, metric: Any = None, ridge: float = 0.0, tol: float = 1e-4, max_iter: int = 1000,
                 step_size: float = 0.7, random_state: Any = None):
        self.n_components = n_components
        self.metric = metric
        self.ridge = ridge
        self.tol = tol
        self.max_iter = max_iter
        self.step_size = step_size
        self.random_state = random_state

    def _checked(self, X: Any, background: Any, reset: bool) -> tuple[np.ndarray, Any]:
        X = validate_data(self, X, dtype=FLOATS, ensure_min_samples=2, reset=reset)
        if background is None:
            return X, None
        if self.metric is not None:
            raise ValueError("background and metric must not both be given: each of them is B")
        background = check_array(background, dtype=X.dtype, ensure_min_samples=2, input_name="background")
        if background.shape[1] != X.shape[1]:
            raise ValueError(f"background must have {X.shape[1]} columns as X, got {background.shape[1]}")
        return X, background

    def _matrix(self, X: np.ndarray, background: Any) -> np.ndarray:
        """The metric B."""
        n, kind = X.shape[1], X.dtype
        if self.metric is not None and np.shape(self.metric) != (n, n):
            raise ValueError(f"metric must have shape ({n}, {n}) to match X, got {np.shape(self.metric)}")
        b = np.eye(n, dtype=kind) if self.metric is None else np.asarray(self.metric, kind)
        if background is not None:
            apart = background - background.mean(axis=0)
            b = apart.T @ apart / len(apart)
        return b + np.asarray(self.ridge, kind) * np.eye(n, dtype=kind)

    def fit(self, X: Any, y: Any = None, background: Any = None) -> GeneralizedEigen:
        """Fit to rows X, shape `(rows, n_features)`, against the rows `background`; y is ignored."""
        X, background = self._checked(X, background, True)
        self._forget()
        p = self._components(X.shape[1], f"n_features = {X.shape[1]}")
        self.mean_ = X.mean(axis=0)
        apart = X - self.mean_
        problem = GEVP(apart.T @ apart / len(X), self._matrix(X, background), p, reference="none")
        self._finish(self._solve(problem), apart)
        return self

    def partial_fit(self, X: Any, y: Any = None, background: Any = None) -> GeneralizedEigen:
        """One step on a chunk of rows and a chunk of background."""
        started = hasattr(self, "_state")
        X, background = self._checked(X, background, not started)
        p = self._components(X.shape[1], f"n_features = {X.shape[1]}")
        parts = (X,) if background is None else (X, background)
        if started and len(parts) != len(self._means):
            raise ValueError("background must be given for all chunks, or for none")
        kind = self.components_.dtype if started else X.dtype
        before = self._means if started else tuple(part.mean(axis=0) for part in parts)
        apart = tuple((part - mean).astype(kind) for part, mean in zip(parts, before, strict=True))
        root = np.linalg.cholesky(self._matrix(X, None)).T * np.sqrt(X.shape[1])    # rows whose mean of squares is the metric
        other = apart[1] if background is not None else root.astype(kind)
        point = self._follow(lambda: GEVP.streamed(apart[0].T @ apart[0] / len(X), self._matrix(X, background), p, reference="none"),
                             (apart[0], other), parts)
        self.mean_ = self._means[0].astype(kind)
        self.n_iter_ = int(self._state.step)
        self._finish(np.asarray(point), apart[0])
        return self

    def _finish(self, point: np.ndarray, apart: np.ndarray) -> None:
        self.components_ = point.T
        self.eigenvalues_ = ((apart @ point) ** 2).mean(axis=0)
        self._n_features_out = len(self.components_)


class LandingICA(_Solved):
    r"""Independent component analysis by landing: the constraint whitens, so the data are not whitened beforehand.

    `fit` minimizes the contrast on all rows and finishes to round-off; `partial_fit` makes one stochastic step for each chunk.

    Args:
        n_components: number of components; None is the rank of the data.
        contrast: `"logcosh"` or `"gauss"`.
        sign: `"auto"`, or 1 for super-Gaussian and -1 for sub-Gaussian sources.
        tol: of the residual of the iteration that precedes the finishing steps.
        max_iter: most steps of it.
        step_size: the first step of `partial_fit`.
        random_state: seed, generator or None.

    Attributes:
        components_: unmixing matrix, shape `(n_components, n_features)`: scores have unit variance and are uncorrelated.
        mixing_: its pseudo-inverse, shape `(n_features, n_components)`.
        mean_: means of the columns.
        n_iter_: steps made.

    Raises:
        ValueError: data or parameters that do not fit; the message says why.

    Example:
        >>> sources = np.random.default_rng(0).laplace(size=(2000, 2))
        >>> model = LandingICA(random_state=0).fit(sources @ np.array([[1.0, 0.5], [0.0, 1.0]]))
        >>> np.abs(np.corrcoef(model.transform(sources @ np.array([[1.0, 0.5], [0.0, 1.0]])).T, sources.T)[:2, 2:]).max(axis=1).round(1).tolist()
        [1.0, 1.0]
    """

    def __init__(self, n_components: int | None = None, *, contrast: str = "logcosh", sign: str | int = "auto", tol: float = 1e-4,
                 max_iter: int = 1000, step_size: float = 0.7, random_state: Any = None):
        self.n_components = n_components
        self.contrast = contrast
        self.sign = sign
        self.tol = tol
        self.max_iter = max_iter
        self.step_size = step_size
        self.random_state = random_state

    def _width(self, X: np.ndarray) -> int:
        rank = self._rank(X)
        if rank == 0:
            raise ValueError("X must not be constant: no component has variance")
        return self._components(rank, f"the rank of X (n_samples = {X.shape[0]}, n_features = {X.shape[1]})")

    def fit(self, X: Any, y: Any = None) -> LandingICA:
        """Fit to rows X, shape `(rows, n_features)`; y is ignored."""
        X = validate_data(self, X, dtype=FLOATS, ensure_min_samples=2)
        self._forget()
        problem = ICA(X, self._width(X), self.contrast, sign=self.sign)
        self.mean_ = np.asarray(problem.centre)
        self._finish(self._solve(problem))
        return self

    def partial_fit(self, X: Any, y: Any = None) -> LandingICA:
        """One step on a chunk of rows."""
        started = hasattr(self, "_state")
        X = validate_data(self, X, dtype=FLOATS, ensure_min_samples=2, reset=not started)
        chunk = X.astype(self.components_.dtype) if started else X
        point = self._follow(lambda: ICA.streamed(X, self._width(X), self.contrast, sign=self.sign), chunk, (X,))
        self.n_iter_ = int(self._state.step)
        self.mean_ = self._means[0].astype(np.asarray(point).dtype)
        self._finish(np.asarray(point))
        return self

    def _centred(self) -> Any:
        return self._problem.replace(centre=jnp.asarray(self._means[0], self._problem.dtype))

    def _finish(self, point: np.ndarray) -> None:
        self.components_ = point.T
        self.mixing_ = np.linalg.pinv(self.components_)
        self._n_features_out = len(self.components_)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Rows of data from scores."""
        check_is_fitted(self)
        X = check_array(X, dtype=FLOATS)
        return X @ self.mixing_.T + self.mean_
