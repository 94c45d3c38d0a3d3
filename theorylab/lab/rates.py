"""Rates: the slope of log error against log size, with an interval that covers."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from theorylab.core.show import html_table, number_text
from theorylab.errors import ArgumentError, NonFiniteInputError, ShapeError

_CENTERS = ("mean", "median", "geometric")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RateFit:
    r"""The fit $\log e = a + s \log n + p \log\log n$ with given $p$.

    Attributes:
        slope: $s$.
        intercept: $a$.
        interval: Student interval of the slope; infinite when two sizes leave no degree of freedom.
        level: confidence level of the interval.
        local_slopes: slopes between neighbouring sizes, with the logarithm removed; a trend in them means that no power law is seen yet.
        n: sizes that were fitted, ascending.
        error: error at each size, over replicates taken by `center`.
        log_power: $p$.
        center: how replicates were joined.
        replicates: number of replicates per size.
    """

    slope: float
    intercept: float
    interval: tuple[float, float]
    level: float
    local_slopes: np.ndarray
    n: np.ndarray
    error: np.ndarray
    log_power: float
    center: str
    replicates: int

    def predict(self, n: Any) -> np.ndarray:
        """The fitted curve at sizes `n`."""
        n = np.asarray(n, dtype=float)
        return np.exp(self.intercept) * n**self.slope * (np.log(n) ** self.log_power if self.log_power else 1.0)

    def to_dict(self) -> dict[str, Any]:
        """All attributes as plain Python numbers and lists."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in dataclasses.asdict(self).items()}

    def plot(self, ax: Any = None) -> Any:
        """Draw the errors, the fitted curve and its slope with the interval; returns the matplotlib Axes."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        (points,) = ax.plot(self.n, self.error, "o", label="measured")
        grid = np.geomspace(self.n[0], self.n[-1], 64)
        ax.plot(grid, self.predict(grid), "-", color=points.get_color(), label=self._sentence())
        ax.set(xscale="log", yscale="log", xlabel="n", ylabel="error")
        ax.legend()
        return ax

    def _sentence(self) -> str:
        low, high = self.interval
        if not np.isfinite(low):
            return f"slope {self.slope:.3f} (two sizes give no interval)"
        return f"slope {self.slope:.3f}, {100 * self.level:g}% interval [{low:.3f}, {high:.3f}]"

    def __repr__(self) -> str:
        log = f", times log(n)^{self.log_power:g}" if self.log_power else ""
        many = f", {self.center} of {self.replicates} replicates" if self.replicates > 1 else ""
        local = ", ".join(f"{s:.3f}" for s in self.local_slopes)
        return (f"RateFit({self._sentence()}{log}; n = {number_text(self.n[0].item())} to {number_text(self.n[-1].item())}, "
                f"{len(self.n)} sizes{many}; local slopes {local})")

    def _repr_html_(self) -> str:
        local = [None, *self.local_slopes.tolist()] if len(self.local_slopes) == len(self.n) - 1 else [None] * len(self.n)
        rows = [[n, e, s] for n, e, s in zip(self.n.tolist(), self.error.tolist(), local, strict=True)]
        return html_table(["n", "error", "local slope"], rows, caption=self._sentence())


def fit_rate(n: Any, error: Any, *, log_power: float = 0.0, level: float = 0.95, within: tuple[float, float] | None = None,
             center: Literal["mean", "median", "geometric"] = "mean") -> RateFit:
    r"""Fit a power law to errors by least squares in logarithms.

    $$ \log e_i - p \log\log n_i = a + s \log n_i, \qquad s \pm t_{k-2}\, \hat\sigma / \sqrt{S_{xx}} $$

    Args:
        n: sizes, shape (sizes,); any positive numbers (sample sizes, steps, inner errors), at least two distinct.
        error: errors, shape (sizes,) or (sizes, replicates).
        log_power: power $p$ of the logarithm in the rate, as 0.5 for $\sqrt{\log n / n}$. Without it the slope of such a curve is off by
            several hundredths at all sizes that can be run.
        level: confidence level of the interval.
        within: only sizes in this closed range are fitted.
        center: how the replicates of one size are joined before the logarithm is taken.

    Raises:
        ShapeError: the shapes do not match, or fewer than two distinct sizes are left.
        NonFiniteInputError: a fitted entry is NaN or infinite.
        ArgumentError: a fitted entry is not positive, or an option is out of range.

    Example:
        >>> fit = fit_rate([10, 100, 1000], [1.0, 0.32, 0.1])
        >>> round(fit.slope, 3), fit.interval[0] < -0.5 < fit.interval[1]
        (-0.5, True)
    """
    if center not in _CENTERS:
        raise ArgumentError(f"center must be one of {', '.join(map(repr, _CENTERS))}, got {center!r}")
    if not 0 < level < 1:
        raise ArgumentError(f"level must be between 0 and 1, got {level!r}")
    sizes, table = _inputs(n, error, within)
    if log_power and sizes.min() <= 1:
        raise ArgumentError(f"n must be above 1 where log_power is not 0 (log n is divided out), got {sizes.min():g}")
    errors = _centered(sizes, table, center)

    x, y = np.log(sizes), np.log(errors) - (log_power * np.log(np.log(sizes)) if log_power else 0.0)
    shift = x - x.mean()
    spread = float(shift @ shift)
    slope = float(shift @ y) / spread
    intercept = float(y.mean() - slope * x.mean())
    freedom = len(x) - 2
    half = np.inf
    if freedom > 0:
        from scipy.special import stdtrit

        left = y - intercept - slope * x
        half = float(stdtrit(freedom, (1 + level) / 2)) * float(np.sqrt(left @ left / freedom / spread))
    distinct, group = np.unique(x, return_inverse=True)
    mean = np.bincount(group, weights=y) / np.bincount(group)  # errors of equal sizes share one local value
    return RateFit(slope, intercept, (slope - half, slope + half), float(level), np.diff(mean) / np.diff(distinct), sizes, errors,
                   float(log_power), center, table.shape[1])


def _inputs(n: Any, error: Any, within: tuple[float, float] | None) -> tuple[np.ndarray, np.ndarray]:
    """The sizes to fit, ascending, and their errors with axes (sizes, replicates)."""
    sizes = _numbers("n", n)
    table = _numbers("error", error)
    if sizes.ndim != 1:
        raise ShapeError(f"n must have shape (sizes,), got {sizes.shape}")
    if table.ndim not in (1, 2) or len(table) != len(sizes) or (table.ndim == 2 and table.shape[1] == 0):
        raise ShapeError(f"error must have shape ({len(sizes)},) or ({len(sizes)}, replicates) to match n, got {table.shape}")
    table = table.reshape(len(sizes), -1) if len(sizes) else table.reshape(0, 1)
    if within is not None:
        if len(within) != 2 or not within[0] < within[1]:
            raise ArgumentError(f"within must be a pair (low, high) with low below high, got {within!r}")
        inside = (sizes >= within[0]) & (sizes <= within[1])
        sizes, table = sizes[inside], table[inside]
    for name, entries in (("n", sizes), ("error", table)):
        bad = np.argwhere(~np.isfinite(entries))
        if len(bad):
            raise NonFiniteInputError(f"{name} must be finite, got {entries[tuple(bad[0])]} at size number {bad[0][0]}"
                                      f"{f' of n = {sizes[bad[0][0]]:g}' if name == 'error' else ''} ({len(bad)} of {entries.size} entries)")
    if np.any(sizes <= 0):
        raise ArgumentError(f"n must be positive to take its logarithm, got {sizes[sizes <= 0][0]:g}")
    distinct = len(np.unique(sizes))
    if distinct < 2:
        limits = f" within {within}" if within is not None else ""
        raise ShapeError(f"n must hold at least two distinct sizes to fit a slope, got {distinct}{limits}")
    order = np.argsort(sizes, kind="stable")
    return sizes[order], table[order]


def _numbers(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise TypeError
        return array.astype(float)
    except (TypeError, ValueError):
        raise ShapeError(f"{name} must be an array of real numbers with equal replicates per size, got {type(value).__name__}") from None


def _centered(sizes: np.ndarray, table: np.ndarray, center: str) -> np.ndarray:
    if center == "geometric":
        if np.any(table <= 0):
            row = int(np.argwhere(table <= 0)[0][0])
            raise ArgumentError(f"error must be positive to take its logarithm, got {table[row].min():g} at n = {sizes[row]:g}")
        return np.exp(np.log(table).mean(axis=1))
    errors = table.mean(axis=1) if center == "mean" else np.median(table, axis=1)
    if np.any(errors <= 0):
        row = int(np.argmax(errors <= 0))
        what = f"its {center} is" if table.shape[1] > 1 else "it is"
        raise ArgumentError(f"error must be positive to take its logarithm; at n = {sizes[row]:g} {what} {errors[row]:g} "
                            "(pass within=(low, high) to leave out sizes at round-off)")
    return errors
