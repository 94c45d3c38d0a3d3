"""Progress of long work: a protocol, a bar for terminal and notebook, and silence."""

from __future__ import annotations

import sys
from typing import Any, Protocol, runtime_checkable

from theorylab.errors import ArgumentError


@runtime_checkable
class Progress(Protocol):
    """What long work reports to. `Bar` and `Silent` follow it; so may any object of the user's."""

    def start(self, label: str, total: int | None) -> None:
        """Work called `label` begins; `total` units of it, if known."""

    def update(self, done: int, note: str = "") -> None:
        """`done` units are finished; `note` says where the work stands."""

    def close(self) -> None:
        """The work has ended, well or not."""


class Silent:
    """Reports nothing."""

    def start(self, label: str, total: int | None) -> None:
        """Nothing."""

    def update(self, done: int, note: str = "") -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Bar:
    """A tqdm bar: text on standard error in a terminal, a widget in a notebook.

    Args:
        stream: where text goes; standard error unless given.
    """

    def __init__(self, stream: Any = None):
        self._stream = stream
        self._bar: Any = None

    def start(self, label: str, total: int | None) -> None:
        """Open the bar."""
        from tqdm.auto import tqdm

        self.close()
        self._bar = tqdm(total=total, desc=label, file=self._stream or sys.stderr, leave=True, dynamic_ncols=True, mininterval=0.2)

    def update(self, done: int, note: str = "") -> None:
        """Move the bar to `done` units."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Draw the last state and free the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def resolve(progress: bool | Progress) -> Progress:
    """The object behind a `progress=` argument: a bar for True, silence for False.

    Raises:
        ArgumentError: it is neither a bool nor follows `Progress`.
    """
    if isinstance(progress, bool):
        return Bar() if progress else Silent()
    if isinstance(progress, Progress):
        return progress
    raise ArgumentError(f"progress must be True, False or an object with start, update and close, got {type(progress).__name__}")
