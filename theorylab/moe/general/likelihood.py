"""Maximum likelihood for mixtures of any experts under any gate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core import checks
from theorylab.core.keys import Key
from theorylab.core.problem import Problem
from theorylab.errors import ArgumentError, ShapeError
from theorylab.moe.general.mixture import GeneralMixture, log_likelihood, row_weights

Array = jax.Array


class GeneralLikelihood(Problem):
    r"""Maximize $\sum_i w_i \log g(y_i \mid x_i)$ over mixtures of the kind and shape of `model`.

    `tl.solve` starts from the data alone: the values of `model` are used only where a fit leaves them as they are, such as a temperature, the
    scale of a noise, or degrees of freedom that are not learned.

    Args:
        x: inputs, shape `(n, d)`, or `(n,)` for d = 1.
        y: responses, shape `(n,)`; `(n, m)` for `LinearExperts`; classes for `LogisticExperts`.
        model: a `GeneralMixture`.
        weight: weights of the rows, not negative; 1 unless given. Rows of weight 0 pad: they change no sum.

    Raises:
        ShapeError, PrecisionError, NonFiniteInputError: the data are wrong; the message names the argument.
        ArgumentError: a negative weight, constant responses, or fewer rows than the experts have parameters.

    Example:
        >>> from theorylab.moe import general
        >>> gate = general.SigmoidGate([0.0, 0.0], [[4.0], [-4.0]])
        >>> truth = general.GeneralMixture(gate, general.PolynomialExperts([[0.0, 1.0], [1.0, -1.0]], [0.1, 0.1], degree=1), active=2)
        >>> x, y = truth.sample(200, key=0, low=-1.0)
        >>> likelihood = general.GeneralLikelihood(x, y, truth)
        >>> fit = tl.iterate(likelihood, likelihood.default_method(), truth, steps=10)
        >>> bool(fit.history["log_likelihood"][-1] > likelihood.log_likelihood(truth))
        True
    """

    x: Array
    y: Array
    model: GeneralMixture
    weight: Array

    def __init__(self, x: Any, y: Any, model: GeneralMixture, weight: Any = None):
        if not isinstance(model, GeneralMixture):
            raise ArgumentError(f"model must be a GeneralMixture, got {type(model).__name__}")
        self.model = model
        self.x, self.y = model.pairs(x, y)
        self.weight = jnp.ones(self.x.shape[0], self.x.dtype) if weight is None else row_weights(weight, self.x)
        if checks.known(self.x, self.y, self.weight):
            self._check_data()

    def _check_data(self) -> None:
        used, needed = np.asarray(self.weight) > 0, self.model.experts.free
        if used.sum() < needed:
            raise ArgumentError(f"x must have at least {needed} rows of positive weight, one for each parameter of the experts, got {used.sum()}; "
                                "use fewer or smaller experts")
        y = np.asarray(self.y)[used].reshape(int(used.sum()), -1)
        if not np.all(np.ptp(y, axis=0) > 0):
            raise ArgumentError(f"y must vary, got {y[0, int(np.argmin(np.ptp(y, axis=0)))]:g} in every row")

    def log_likelihood(self, mixture: GeneralMixture) -> Array:
        """The log-likelihood of the data."""
        return log_likelihood(mixture, self.x, self.y, self.weight)

    def check_mixture(self, mixture: Any, name: str = "x0") -> GeneralMixture:
        """`mixture`, refused unless it is of the kind and shape of the model.

        Raises:
            ArgumentError: of another kind.
            ShapeError: of another shape.
        """
        if not isinstance(mixture, GeneralMixture) or jax.tree.structure(mixture) != jax.tree.structure(self.model):
            raise ArgumentError(f"{name} must be of the kind of the model, {self.model}, got {mixture}")
        shapes = [[leaf.shape for leaf in jax.tree.leaves(m)] for m in (mixture, self.model)]
        if shapes[0] != shapes[1]:
            raise ShapeError(f"{name} must have arrays of the shapes of the model, {shapes[1]}, got {shapes[0]}")
        checks.same_dtype(**{"x": self.x, name: mixture})
        return mixture

    def start(self, key: Key) -> GeneralMixture:
        """The best of eight short fits from the data alone: see `general_start`."""
        from theorylab.moe.general.starts import general_start

        return general_start(self, key=key)

    def metrics(self, x: GeneralMixture) -> dict[str, Array]:
        """`log_likelihood` of the data, with the routing of the mixture."""
        return {"log_likelihood": self.log_likelihood(x)}

    def default_method(self) -> Any:
        """`GeneralEM`."""
        from theorylab.moe.general.em import GeneralEM

        return GeneralEM()

    def goal(self, tolerance: float) -> Any:
        """Stop when the last gain in log-likelihood, per row, is below a thousandth of `tolerance`."""
        from theorylab.core.stop import Below

        return Below("gain", tolerance / 1000)
