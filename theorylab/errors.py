"""Every exception that theorylab raises on purpose.

Each class derives from `TheorylabError` and from the built-in a caller would expect, so `except ValueError` keeps working.
A message names the argument, what it was, what was expected, and the one change most likely to help.
"""

from __future__ import annotations

from typing import Any


class TheorylabError(Exception):
    """Base of all exceptions of this package."""


class ArgumentError(TheorylabError, ValueError):
    """An argument has a value outside its range, or arguments contradict each other."""


class ShapeError(TheorylabError, ValueError):
    """An argument has the wrong shape, or two arguments have shapes that do not match."""


class MatrixError(TheorylabError, ValueError):
    """A matrix lacks a property that is needed: symmetry, definiteness, rank."""


class NonFiniteInputError(TheorylabError, ValueError):
    """An argument holds NaN or infinity."""


class PrecisionError(TheorylabError, TypeError):
    """An argument has a dtype that the computation cannot take."""


class ToleranceError(TheorylabError, ValueError):
    """A tolerance cannot be reached in the precision of the data."""


class UnknownNameError(TheorylabError, LookupError, ValueError):
    """A name (figure, claim, preset, metric, choice) is not known; the message lists the nearest ones."""

    @classmethod
    def of(cls, kind: str, name: object, known: Any) -> UnknownNameError:
        """Build the error for `name`, with the nearest of the `known` names or, if none is near, all of them."""
        import difflib

        names = sorted(map(str, known))
        near = [n for n in names if str(name) and str(name) in n][:3] or difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names) or '(none)'}"
        return cls(f"{kind} {name!r} is not known; {hint}")


class InfeasibleStartError(TheorylabError, ValueError):
    """The starting point violates constraints that the method needs satisfied."""


class NoClosedFormError(TheorylabError, ValueError):
    """No closed form is known for this input; the message names the numerical way."""


class RunError(TheorylabError):
    """A run ended badly. The partial result is in `.solution`."""

    def __init__(self, message: str, solution: Any = None):
        super().__init__(message)
        self.solution = solution


class NonFiniteError(RunError, ArithmeticError):
    """A run met NaN or infinity; `.solution` holds the last finite iterate and the history up to it."""


class NotConvergedError(RunError, RuntimeError):
    """A stop rule was given and not met; `.solution` holds the last iterate and the whole history."""


class RunWarning(UserWarning):
    """A part of a batch of runs ended badly, or a run was stopped from outside; the result says which."""


class CheckpointMismatchError(TheorylabError, ValueError):
    """A checkpoint or block file is damaged or belongs to another run; it is left untouched."""


class StorageError(TheorylabError, OSError):
    """A file cannot be written or read: no permission, no space, not a folder."""


class DatasetError(TheorylabError, OSError):
    """A data set cannot be found, fetched or verified."""


class ClaimFailed(TheorylabError, AssertionError):
    """A check of a claim or of a figure does not hold; the message shows measured value, relation and bound."""
