"""A user's function of (x, args), also where it was written as a function of x alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alone:
    """A function of x in the place of one of (x, args); equal if the functions are one, so that it compiles once."""

    function: Callable

    def __call__(self, x: Any, args: Any) -> Any:
        return self.function(x)


def as_call(function: Callable) -> Callable:
    """`function` itself if it takes (x, args), or something of that form if it takes one argument."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some compiled callables tell no signature
        return function
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return Alone(function) if len(places) == 1 and all(p.kind != p.VAR_POSITIONAL for p in parameters) else function
