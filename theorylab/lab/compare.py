"""Several methods on one problem, judged by the same numbers: end values, work, and time to accuracy."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from theorylab.core.problem import Method, Problem
from theorylab.core.show import band, html_table, middle, number_text, text_table
from theorylab.core.solution import History, Solution, Status, count_statuses
from theorylab.errors import ArgumentError, RunWarning, UnknownNameError
from theorylab.lab.files import jsonable

COUNTERS = ("gradients", "operator_evaluations", "products", "factorizations", "samples")
ROUND_OFF = 1e-15
# Metrics by which a run is judged, the most telling first; those that fall to zero at a solution have levels.
_JUDGED = ("gap", "residual", "error", "infeasibility", "objective", "log_likelihood", "gain")
_FALLING = ("gap", "residual", "error", "infeasibility", "gain")
_MOST_LEVELS = 3


@dataclasses.dataclass(repr=False, eq=False)
class Comparison:
    """The solutions of several methods on one problem, as a table and a plot.

    Attributes:
        problem: class of the problem.
        axis: what work is counted in: `seconds`, `step` or a counter.
        metric: the shared metric that the table shows.
        levels: accuracies whose first passage the table shows.
        solutions: `Solution` by method.
    """

    problem: str
    axis: str
    metric: str
    levels: tuple[float, ...]
    solutions: dict[str, Solution]

    def __getitem__(self, name: str) -> Solution:
        if name not in self.solutions:
            raise UnknownNameError.of("method", name, self.solutions)
        return self.solutions[name]

    def __iter__(self) -> Any:
        return iter(self.solutions)

    def __len__(self) -> int:
        return len(self.solutions)

    def reach(self, name: str, level: float, metric: str | None = None) -> float:
        """Work along the axis until the metric is first at most `level`; infinite if never, the median over runs."""
        history = self[name].history
        work = _per_run(history, history.axis(self.axis))
        values = _per_run(history, history[metric or self.metric])
        good = np.asarray(history.valid).reshape(len(history), -1) & (values <= level)
        first = np.argmax(good, axis=0)
        reached = np.where(good.any(axis=0), work[first, np.arange(work.shape[1])], np.inf)
        return float(np.median(reached))

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per method; numbers of a batch are medians over its runs."""
        table = []
        for name, solution in self.solutions.items():
            history = solution.history
            row: dict[str, Any] = {"method": name, "status": _statuses(solution), "steps": _middle(solution.steps),
                                   "seconds": float(np.asarray(history.axis("seconds"))[-1])}
            row |= {counter: _middle(history.last(counter)) for counter in COUNTERS if counter in history}
            row[self.metric] = _middle(history.last(self.metric))
            row |= {f"{self.axis} to {level:.0e}": self.reach(name, level) for level in self.levels}
            table.append(row)
        return table

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Head and cells; a counter that a method does not report is a dash."""
        rows = self.rows()
        head = [*dict.fromkeys(name for name in rows[0] if name not in COUNTERS)]
        counters = [c for c in COUNTERS if any(c in row for row in rows)]
        at = head.index("seconds") + 1
        head = head[:at] + counters + head[at:]
        return head, [[row.get(name, "-") for name in head] for row in rows]

    def to_dict(self) -> dict[str, Any]:
        """The table as values that JSON can hold."""
        return {"problem": self.problem, "axis": self.axis, "metric": self.metric, "levels": list(self.levels), "rows": jsonable(self.rows())}

    def to_pandas(self) -> Any:
        """The table as a `pandas.DataFrame`, one line per method."""
        import pandas as pd

        return pd.DataFrame(self.rows()).set_index("method")

    def plot(self, metric: str | None = None, ax: Any = None) -> Any:
        """Draw a metric of every method against the axis, the median with a 10 to 90 percent band for batches; returns the Axes."""
        metric = metric or self.metric
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        from theorylab.lab.style import look

        lowest = np.inf
        for i, (name, solution) in enumerate(self.solutions.items()):
            history = solution.history
            work, values = _per_run(history, history.axis(self.axis)), _per_run(history, history[metric])
            lowest = min(lowest, np.nanmin(values, initial=np.inf))
            ax.plot(middle(work), middle(values), label=name, **look(i))
            if values.shape[1] > 1:
                ax.fill_between(middle(work), *band(values), color=look(i)["color"], alpha=0.2, linewidth=0)
        if lowest >= 0 and metric in _FALLING:
            ax.set_yscale("log", nonpositive="mask")
        ax.set(xlabel=self.axis.replace("_", " "), ylabel=metric.replace("_", " "))
        ax.legend()
        return ax

    def __repr__(self) -> str:
        return f"{self.problem}, {self.metric} against {self.axis}\n" + text_table(*self.table())

    def _repr_html_(self) -> str:
        return html_table(*self.table(), caption=f"{self.problem}: {self.metric} against {self.axis}")


def compare(problem: Problem, methods: Mapping[str, Method], *, axis: str = "seconds", x0: Any = None, metric: str | None = None,
            levels: Sequence[float] | None = None, **options: Any) -> Comparison:
    """Run several methods on one problem from one start, with the same options and keys.

    A method that fails does not stop the others: its status is in the table (`throw=True` raises instead). Compile time is never part of
    the axis `seconds`.

    Args:
        problem: what is solved; its metrics are the judge.
        methods: methods by the name to show.
        axis: `seconds`, `step`, or a counter that every method reports (`gradients`, `operator_evaluations`, `products`, `factorizations`,
            `samples`).
        x0: common start; `problem.start` if None.
        metric: metric of the table; unless given the one of the stop rule, else the first of gap, residual, error, ... that all runs have.
        levels: accuracies of the columns "axis to level"; unless given, up to three powers of ten that at least one method reaches.
        **options: further arguments of `iterate`: `steps` (needed), `stop`, `key`, `every`, `runs`, ...

    Raises:
        ArgumentError: `methods` is empty or holds something else, or a method does not report `axis`; the message names it and its axes.
        UnknownNameError: no method reports `metric`.

    Example:
        >>> class Parabola(tl.Problem):
        ...     def start(self, key): return jnp.ones(2)
        ...     def metrics(self, x): return {"residual": jnp.linalg.norm(x)}
        >>> class Descent(tl.Method):
        ...     step_size: object = tl.number()
        ...     def init(self, problem, x0, *, key): return x0
        ...     def step(self, problem, x, *, key): return x - self.step_size * x
        ...     def value(self, problem, x): return x
        >>> table = compare(Parabola(), {"short": Descent(0.1), "long": Descent(0.5)}, steps=100, stop=tl.Below("residual", 1e-6), axis="step")
        >>> [(row["method"], row["status"], row["steps"]) for row in table.rows()]
        [('short', 'MAX_STEPS', 100), ('long', 'CONVERGED', 21)]
    """
    if not isinstance(methods, Mapping) or not methods:
        raise ArgumentError(f"methods must be a dictionary of methods by name, got {type(methods).__name__}{' without entries' * (methods == {})}")
    for name, method in methods.items():
        if not isinstance(method, Method):
            raise ArgumentError(f"methods[{name!r}] must be a Method object, got {method!r}")
    if "steps" not in options:
        raise ArgumentError("compare needs steps=, the most steps of each method")
    if levels is not None and not all(math.isfinite(level) for level in levels):
        raise ArgumentError(f"levels must be finite numbers, got {list(levels)!r}")
    from theorylab.core.iterate import iterate

    options = {"throw": False, **options}
    if axis not in ("seconds", "step") and "data" not in options:
        # Measure the start alone first: a method without the counter is refused before any of them has run, and what compiles is used again.
        before = {k: v for k, v in options.items() if k not in ("steps", "checkpoint", "seconds", "progress", "throw")}
        for name, method in methods.items():
            _has_axis(name, iterate(problem, method, x0, steps=0, throw=False, **before).history, axis)
    solutions = {}
    for name, method in methods.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RunWarning)  # the table says how each run ended
            solutions[name] = iterate(problem, method, x0, **options)
        _has_axis(name, solutions[name].history, axis)
    metric = _metric(solutions, metric, options.get("stop"))
    found = tuple(float(level) for level in levels) if levels is not None else _levels(solutions, metric)
    return Comparison(type(problem).__name__, axis, metric, found, solutions)


def _has_axis(name: str, history: History, axis: str) -> None:
    known = [*history.axes, *(c for c in history.columns if c in COUNTERS)]
    if axis not in known:
        raise ArgumentError(f"axis={axis!r} cannot be compared: method {name!r} does not report it; it reports {', '.join(known)}")


def _shared(solutions: Mapping[str, Solution]) -> list[str]:
    """Columns with one number per row and run that every solution has, counters left out."""
    columns = [[n for n in s.history.names if np.ndim(s.history[n]) == np.ndim(s.history.valid) and n not in COUNTERS] for s in solutions.values()]
    return [name for name in columns[0] if all(name in others for others in columns[1:])]


def _metric(solutions: Mapping[str, Solution], metric: str | None, stop: Any) -> str:
    shared = _shared(solutions)
    if metric is not None:
        if metric not in shared:
            raise UnknownNameError.of("metric common to all methods", metric, shared)
        return metric
    if not shared:
        raise ArgumentError("the methods share no metric with one number per row: give the problem a metric, or pass record=")
    wanted = [getattr(stop, "name", None), *_JUDGED]
    return next((name for name in wanted if name in shared), shared[0])


def _levels(solutions: Mapping[str, Solution], metric: str) -> tuple[float, ...]:
    """Powers of ten between the start and the best end, evenly chosen."""
    if metric not in _FALLING:
        return ()
    values = [np.asarray(s.history[metric], dtype=float) for s in solutions.values()]
    ends = [np.median(np.asarray(s.history.last(metric), dtype=float)) for s in solutions.values()]
    top, best = max(float(np.nanmax(v[0])) for v in values), min((float(e) for e in ends if np.isfinite(e)), default=np.nan)
    if not (np.isfinite(top) and top > 0 and best < top):
        return ()
    high = math.ceil(math.log10(top)) - 1
    low = math.ceil(math.log10(max(best, ROUND_OFF * top)))  # a metric that ends at 0, or at round-off, has no smaller level worth a column
    powers = list(range(high, low - 1, -1))
    chosen = sorted({powers[round(i)] for i in np.linspace(0, len(powers) - 1, _MOST_LEVELS)}, reverse=True) if powers else []
    return tuple(10.0**p for p in chosen)


def _per_run(history: History, column: Any) -> np.ndarray:
    """A column with axes (row, run), one run where there is no batch, NaN in the rows of ended runs."""
    valid = np.asarray(history.valid).reshape(len(history), -1)
    values = np.asarray(column, dtype=float)
    if values.ndim > np.ndim(history.valid):
        raise ArgumentError(f"only metrics with one number per row can be compared, got one of shape {values.shape[np.ndim(history.valid):]} per row")
    return np.where(valid, values.reshape(len(history), -1), np.nan)


def _middle(values: Any) -> float:
    array = np.asarray(values)
    middle = float(np.median(array)) if array.ndim else array.item()
    return int(middle) if array.dtype.kind in "iu" and float(middle).is_integer() else middle


def _statuses(solution: Solution) -> str:
    if isinstance(solution.status, Status):
        return solution.status.name
    counted = count_statuses(solution.status)
    return next(iter(counted)) if len(counted) == 1 else ", ".join(f"{number_text(n)} {name}" for name, n in counted.items())
