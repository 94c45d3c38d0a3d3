"""Evidence: measured numbers beside the bounds they must meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from theorylab.core.show import html_table, number_text, text_table
from theorylab.errors import ArgumentError, ClaimFailed, NonFiniteInputError, ShapeError
from theorylab.lab.files import jsonable

HEAD = ("check", "measured", "relation", "bound", "verdict")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement and its verdict; `measured`, `relation`, `bound` read as a sentence.

    Attributes:
        label: what was measured.
        measured: the number, of an array its worst entry.
        relation: as in `<=` or `within 1e-12 of`.
        bound: the number, pair or truth value to compare with.
        passed: the verdict; NaN never passes.
        note: which entry was the worst, an interval, a remark.
    """

    label: str
    measured: Any
    relation: str
    bound: Any
    passed: bool
    note: str = ""

    def sentence(self) -> str:
        """The row as one line."""
        note = f" ({self.note})" if self.note else ""
        return f"{self.label}: {number_text(self.measured)} {self.relation} {number_text(self.bound)}: {_verdict(self.passed)}{note}"

    def to_dict(self) -> dict[str, Any]:
        """The row as values that JSON can hold."""
        return {field.name: jsonable(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"


class Check:
    """Collects rows. Every method records one row and returns its verdict; nothing raises until `raise_if_failed`.

    Arrays are judged by their worst entry, and the note of the row says which one that is.

    Example:
        >>> check = Check("demo")
        >>> check.below("error", 1e-9, 1e-6), check.equal("pi", 3.14, np.pi, tol=1e-3)
        (True, False)
        >>> check.passed
        False
    """

    def __init__(self, name: str = ""):
        self.name = name
        self.rows: list[Row] = []

    @property
    def passed(self) -> bool:
        """Whether something was measured and every row passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failed(self) -> list[Row]:
        """The rows that did not pass."""
        return [row for row in self.rows if not row.passed]

    def below(self, label: str, measured: Any, bound: Any, *, note: str = "") -> bool:
        """Measured values are at most `bound`."""
        return self._judge(label, measured, bound, "<=", lambda m, b: m <= b, lambda m, b: b - m, note)

    def above(self, label: str, measured: Any, bound: Any, *, note: str = "") -> bool:
        """Measured values are at least `bound`."""
        return self._judge(label, measured, bound, ">=", lambda m, b: m >= b, lambda m, b: m - b, note)

    def equal(self, label: str, measured: Any, expected: Any, tol: float, relative: bool = False, *, note: str = "") -> bool:
        """Measured values differ from `expected` by at most `tol`, or by `tol` times the size of the expected value."""
        if not tol >= 0:
            raise ArgumentError(f"tol of check {label!r} must be at least 0, got {tol!r}")
        relation = f"within {tol:g} {'relative to' if relative else 'of'}"

        def slack(m: np.ndarray, e: np.ndarray) -> np.ndarray:
            return tol * (np.abs(e) if relative else 1.0) - np.abs(m - e)

        # Equal infinities have no difference; they are equal all the same.
        return self._judge(label, measured, expected, relation, lambda m, e: (m == e) | (slack(m, e) >= 0), slack, note)

    def between(self, label: str, measured: Any, low: float, high: float, *, note: str = "") -> bool:
        """Measured values lie in the closed interval from `low` to `high`."""
        if not low <= high:
            raise ArgumentError(f"check {label!r} must have low <= high, got low = {low!r} and high = {high!r}")
        return self._judge(label, measured, low, "in", lambda m, _: (m >= low) & (m <= high), lambda m, _: np.minimum(m - low, high - m), note,
                           shown=(float(low), float(high)))

    def true(self, label: str, condition: Any, note: str = "") -> bool:
        """The condition holds; of an array, in every entry."""
        holds = np.asarray(condition)
        if holds.size == 0:
            raise ArgumentError(f"check {label!r} was given an empty array: nothing was measured")
        if holds.dtype.kind not in "biu":
            raise ArgumentError(f"condition of check {label!r} must be true or false, got {holds.dtype.name}")
        holds = holds.astype(bool)
        if holds.ndim and not holds.all():
            at = _index(np.unravel_index(int(np.argmin(holds)), holds.shape))
            note = _join(f"false in {int((~holds).sum())} of {holds.size} entries, first at {at}", note)
        return self._add(Row(label, bool(holds.all()), "is", True, bool(holds.all()), note))

    def slope(self, label: str, n: Any, errors: Any, *, expected: float, tol: float, log_power: float = 0.0,
              within: tuple[float, float] | None = None, center: Any = "mean", note: str = "") -> bool:
        """The fitted slope of log error against log n is within `tol` of `expected`; the note holds its interval and the local slopes.

        Args:
            label: what the slope is of.
            n: sizes, shape (sizes,).
            errors: shape (sizes,) or (sizes, replicates).
            expected: slope that the theory gives.
            tol: largest difference that passes.
            log_power: see `fit_rate`.
            within: see `fit_rate`.
            center: see `fit_rate`.
            note: a remark.
        """
        from theorylab.lab.rates import fit_rate

        if not tol >= 0:
            raise ArgumentError(f"tol of check {label!r} must be at least 0, got {tol!r}")
        relation = f"within {tol:g} of"
        try:
            fit = fit_rate(n, errors, log_power=log_power, within=within, center=center)
        except NonFiniteInputError as error:
            return self._add(Row(label, float("nan"), relation, float(expected), False, _join(str(error), note)))
        low, high = fit.interval
        interval = f"{100 * fit.level:g}% interval [{low:.3f}, {high:.3f}]" if np.isfinite(low) else "two sizes give no interval"
        local = "local slopes " + ", ".join(f"{s:.3f}" for s in fit.local_slopes)
        return self._add(Row(label, fit.slope, relation, float(expected), abs(fit.slope - expected) <= tol, _join(interval, local, note)))

    def raise_if_failed(self) -> None:
        """Raise when a row failed or when nothing was measured.

        Raises:
            ClaimFailed: the message holds every failed row: measured value, relation and bound.
        """
        if not self.passed:
            who = f"{self.name}: " if self.name else ""
            raise ClaimFailed(who + ("; ".join(row.sentence() for row in self.failed) or "nothing was measured"))

    def to_dict(self) -> dict[str, Any]:
        """Verdict and rows as values that JSON can hold."""
        return {"name": self.name, "passed": self.passed, "rows": [row.to_dict() for row in self.rows]}

    def __repr__(self) -> str:
        return f"Check({self.name or 'unnamed'}: {self._count()})" + ("\n" + text_table((*HEAD, "note"), self._cells()) if self.rows else "")

    def _repr_html_(self) -> str:
        return html_table((*HEAD, "note"), self._cells(), caption=f"{self.name} {self._count()}".strip())

    def _count(self) -> str:
        return f"{len(self.rows) - len(self.failed)} of {len(self.rows)} passed"

    def _cells(self) -> list[list[Any]]:
        return [[r.label, r.measured, r.relation, r.bound, _verdict(r.passed), r.note] for r in self.rows]

    def _add(self, row: Row) -> bool:
        self.rows.append(row)
        return row.passed

    def _judge(self, label: str, measured: Any, bound: Any, relation: str, holds: Callable, slack: Callable, note: str, shown: Any = None) -> bool:
        values, bounds = _numeric(label, "measured", measured), _numeric(label, "bound", bound)
        if relation in ("<=", ">=", "in") and "c" in (values.dtype.kind, bounds.dtype.kind):
            raise ArgumentError(f"check {label!r} compares complex numbers, which have no order: pass their size")
        try:
            values, bounds = np.broadcast_arrays(values, bounds)
        except ValueError:
            raise ShapeError(f"check {label!r} compares shapes that do not match: measured {values.shape}, bound {bounds.shape}") from None
        with np.errstate(invalid="ignore", over="ignore"):
            good, room = np.asarray(holds(values, bounds)), np.asarray(slack(values, bounds), dtype=float)
        room = np.where(np.isnan(room), np.where(good, np.inf, -np.inf), room)
        # The worst is a NaN, or else the entry with the least room, among those that fail if any does.
        lost = np.isnan(values) & ~good
        rank = ~lost if lost.any() else np.where(good, room if good.all() else np.inf, room)
        at = np.unravel_index(int(np.argmin(rank)), values.shape)
        if relation.startswith("within") and values[at] != bounds[at]:
            with np.errstate(invalid="ignore"):
                note = _join(f"off by {number_text(float(np.abs(values[at] - bounds[at])))}", note)
        if values.ndim:
            failing = f", {int((~good).sum())} fail" if not good.all() else ""
            note = _join(f"worst of {values.size}, at {_index(at)}{failing}", note)
        return self._add(Row(label, values[at].item(), relation, bounds[at].item() if shown is None else shown, bool(good.all()), note))


def _numeric(label: str, role: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiubc":
        raise ArgumentError(f"{role} of check {label!r} must be a number or an array of numbers, got {type(value).__name__}")
    if array.size == 0:
        raise ArgumentError(f"{role} of check {label!r} is an empty array: nothing was measured")
    # Differences are taken, so nothing narrow or unsigned may wrap around.
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64 if array.dtype.kind == "f" or array.dtype == np.uint64 else np.int64)


def _index(at: Any) -> str:
    return "[" + ", ".join(str(int(i)) for i in at) + "]"


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
