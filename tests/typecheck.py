"""Which annotations the test run checks: those that state array shapes.

The public boundary takes array-likes and refuses bad ones in its own words; a type checker in front of it would answer first. So only
functions whose annotations hold jaxtyping shapes, which are the internal ones, are checked on each call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import beartype

_SHAPED = re.compile(r"\b(Float|Float32|Float64|Int|Int32|Integer|Bool|Inexact|Num|Complex|Shaped|Real|Key|UInt|UInt32)\[")
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with checked annotations if one of them states a shape, else `function` itself."""
    stated = getattr(function, "__annotations__", {}).values()
    return _check(function) if any(_SHAPED.search(str(annotation)) for annotation in stated) else function
