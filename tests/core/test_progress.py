"""Progress: what is reported, and to whom."""

from __future__ import annotations

import io

import numpy as np
import pytest

import theorylab as tl
from tests.shapes import DIM, Descent, quadratic
from theorylab.core.progress import Bar, Silent, resolve
from theorylab.errors import ArgumentError


class Log:
    """Remembers every call."""

    def start(self, label: str, total: int | None) -> None:
        self.calls = [(label, total)]

    def update(self, done: int, note: str = "") -> None:
        self.calls.append((done, note))

    def close(self) -> None:
        self.calls.append("closed")


def test_a_run_reports_from_zero_to_its_last_step():
    log = Log()
    tl.iterate(quadratic(), Descent(0.5), np.ones(DIM), steps=30, progress=log)
    assert log.calls[0] == ("Descent", 30) and log.calls[1] == (0, "") and log.calls[-1] == "closed"
    done, note = log.calls[-2]
    assert done == 30 and note.startswith("objective ")


def test_the_bar_writes_to_its_stream():
    text = io.StringIO()
    tl.iterate(quadratic(), Descent(0.5), np.ones(DIM), steps=30, progress=Bar(text))
    assert "Descent" in text.getvalue() and "30/30" in text.getvalue()


def test_true_false_and_objects_are_understood_and_the_rest_refused():
    assert isinstance(resolve(True), Bar) and isinstance(resolve(False), Silent)
    log = Log()
    assert resolve(log) is log
    with pytest.raises(ArgumentError, match="progress must be True, False or an object with start, update and close, got int"):
        resolve(3)
