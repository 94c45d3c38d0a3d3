"""How results look: numbers and tables as text and HTML, the summary of a `Solution`, and the plot of a `History`."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from theorylab.core.solution import History, Solution, Status, count_statuses
from theorylab.errors import ArgumentError

# What a run is judged by, in the order of interest; other columns follow in the order of recording.
_FIRST = ("gap", "residual", "error", "infeasibility", "objective", "log_likelihood", "gain")
_SUMMARY_COLUMNS = 4
_BAND = (0.1, 0.9)
_MANY_LINES = 12


def number_text(value: Any, digits: int = 4) -> str:
    """A number, truth value, pair or short text in a few characters.

    Example:
        >>> number_text(0.000123456), number_text(12), number_text((0.0, 1.5)), number_text(float("nan"))
        ('1.235e-04', '12', '[0, 1.5]', 'nan')
    """
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(number_text(v, digits) for v in value) + "]"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (complex, np.complexfloating)):
        return f"{value:.{digits}g}"
    if isinstance(value, (float, np.floating)):
        size = abs(float(value))
        if 10**digits <= size < 1e6:
            return f"{float(value):.0f}"
        plain = not np.isfinite(size) or size == 0 or 1e-3 <= size < 1e6
        return f"{float(value):.{digits}g}" if plain else f"{float(value):.{digits - 1}e}"
    return "" if value is None else str(value)


def seconds_text(seconds: float) -> str:
    """A duration as a person says it.

    Example:
        >>> seconds_text(0.0123), seconds_text(9.87), seconds_text(200), seconds_text(8000)
        ('0.012 s', '9.9 s', '3 min 20 s', '2 h 13 min')
    """
    if seconds < 59.95:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def text_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of plain text: columns aligned, numbers to the right.

    Example:
        >>> print(text_table(["n", "error"], [[10, 0.5], [1000, 0.05]]))
           n  error
        ----  -----
          10    0.5
        1000   0.05
    """
    body = [[number_text(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(head), *body]) for i in range(len(head))]
    right = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, body)])


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """The same table for a notebook; every cell is escaped.

    Example:
        >>> html_table(["a<b"], [[1]])
        '<table><thead><tr><th>a&lt;b</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>'
    """
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(number_text(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def summary(solution: Solution) -> list[tuple[str, str]]:
    """Label and text of what a person asks first about a run: method, status, steps, last metrics, time, precision."""
    lines = [] if solution.method is None else [("method", type(solution.method).__name__)]
    lines.append(("status", _status_text(solution.status)))
    lines.append(("steps", _spread_text(np.asarray(solution.steps))))
    history = solution.history
    if np.any(np.asarray(history.valid)):
        lines += [(name, _spread_text(np.asarray(history.last(name)))) for name in _ordered(history)[:_SUMMARY_COLUMNS]]
    if solution.stats is not None:
        stats = solution.stats
        lines.append(("time", f"{seconds_text(stats.run_seconds)} (compile {seconds_text(stats.compile_seconds)})"))
        if stats.dtype:
            lines.append(("precision", stats.dtype))
    return lines


def _status_text(status: Any) -> str:
    if isinstance(status, Status):
        return status.name
    codes = np.asarray(status)
    if codes.ndim == 0:
        return Status(int(codes)).name
    counted = ", ".join(f"{count} {name}" for name, count in count_statuses(codes).items())
    return counted or "no runs"


def _spread_text(values: np.ndarray) -> str:
    """One number, or the median and range of several."""
    if values.size == 0:
        return "none"
    if values.ndim == 0:
        return number_text(values.item())
    finite = values[np.isfinite(values)]
    lost = f", {values.size - finite.size} not finite" if finite.size < values.size else ""
    if finite.size == 0:
        return f"no finite value among {values.size}"
    low, middle, high = float(finite.min()), float(np.median(finite)), float(finite.max())
    if low == high:
        return number_text(finite.ravel()[0].item()) + lost
    return f"{number_text(middle)} (from {number_text(low)} to {number_text(high)}{lost})"


def _is_scalar(history: History, name: str) -> bool:
    """Whether a column holds one number per row (and run)."""
    return np.asarray(history.columns[name]).ndim == np.asarray(history.valid).ndim


def _ordered(history: History) -> list[str]:
    """Names of the columns with one number per row: the metrics of judgement first."""
    scalar = [name for name in history.columns if _is_scalar(history, name)]
    return [n for n in _FIRST if n in scalar] + [n for n in scalar if n not in _FIRST]


def plot_history(history: History, names: Sequence[str] = (), axis: str = "step", ax: Any = None, log: bool = True) -> Any:
    """Draw columns of a history; returns the matplotlib Axes.

    A batch of runs is drawn as its median with a band from the 10 to the 90 percent quantile; a run that has ended counts with its last
    value, so that those which end early do not drop out of the median. A column with several numbers per row
    (eigenvalues) is drawn as one line per number.

    Args:
        history: what a run recorded.
        names: columns to draw; without names, the first of gap, residual, error, infeasibility, objective, ... that was recorded.
        axis: `step`, `seconds`, `time` or a counter.
        ax: Axes to draw on; a new figure unless given.
        log: logarithmic vertical axis, where all values are at least 0 and one is positive (zeros are left out); otherwise linear.

    Raises:
        UnknownNameError: a column or the axis was not recorded.
        ArgumentError: nothing can be drawn.
    """
    names = list(names) or _ordered(history)[:1]
    if not names:
        raise ArgumentError(f"names must list columns to draw: this history has none with one number per row ({', '.join(history) or 'no columns'})")
    valid = np.asarray(history.valid)
    columns = {name: np.asarray(history[name], dtype=float) for name in names}
    across = np.asarray(history.axis(axis), dtype=float)
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1]
    lowest, highest = np.inf, -np.inf
    for name, column in columns.items():
        for label, lines in _lines(name, column, valid):
            drawn = lines[np.isfinite(lines)]
            lowest, highest = min(lowest, drawn.min(initial=np.inf)), max(highest, drawn.max(initial=-np.inf))
            _draw(ax, across, lines, label)
    if log and lowest >= 0 and highest > 0:
        ax.set_yscale("log", nonpositive="mask")
    ax.set_xlabel(axis.replace("_", " "))
    if len(names) == 1:
        ax.set_ylabel(names[0].replace("_", " "))
    if 1 < len(ax.lines) <= _MANY_LINES:
        ax.legend()
    return ax


def _lines(name: str, column: np.ndarray, valid: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Split a column into parts with axes (row, [run]); rows of ended runs become NaN."""
    if column.ndim <= valid.ndim:
        mask = valid if column.ndim == valid.ndim else valid.any(axis=tuple(range(column.ndim, valid.ndim)))
        return [(name.replace("_", " "), np.where(mask, column, np.nan))]
    parts = column.reshape(*valid.shape, -1)
    return [(f"{name.replace('_', ' ')} {i}", np.where(valid, parts[..., i], np.nan)) for i in range(parts.shape[-1])]


def _draw(ax: Any, across: np.ndarray, lines: np.ndarray, label: str) -> None:
    if lines.ndim == 1:
        ax.plot(middle(across), lines, label=label)
        return
    (drawn,) = ax.plot(middle(across), middle(lines), label=f"{label} (median of {lines.shape[1]})")
    ax.fill_between(middle(across), *band(lines), alpha=0.2, color=drawn.get_color(), linewidth=0)


def held(lines: np.ndarray) -> np.ndarray:
    """A column with axes (row, run) in which a run that has ended, or overflows, keeps its last finite value.

    Runs without a finite value in the first row are left out, unless all are.

    Example:
        >>> held(np.array([[1.0, 4.0], [np.nan, 3.0]])).tolist()
        [[1.0, 4.0], [1.0, 3.0]]
    """
    began = np.isfinite(lines[0])
    lines = lines[:, began] if began.any() else np.zeros((len(lines), 1)) * np.nan
    rows = np.where(np.isfinite(lines), np.arange(len(lines))[:, None], 0)
    return np.take_along_axis(lines, np.maximum.accumulate(rows, axis=0), axis=0)


def middle(lines: np.ndarray) -> np.ndarray:
    """Median over runs of a column with axes (row, [run]), ended runs held."""
    return lines if lines.ndim == 1 else np.median(held(lines), axis=1)


def band(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 10 and 90 percent quantiles over runs of a column with axes (row, run), ended runs held."""
    low, high = np.quantile(held(lines), _BAND, axis=1)
    return low, high
