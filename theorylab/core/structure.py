"""The structure of a result as JSON, with its arrays set apart: what `store.save` and `store.load` use instead of pickle."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.module import Module
from theorylab.errors import CheckpointMismatchError, PrecisionError

TRUSTED = ("theorylab", "equinox", "diffrax", "lineax", "optimistix", "optax", "jax", "numpy")


class NotStored:
    """Stands for what a file could not hold: a lambda, a closure, an object without a name. Calling it raises `TypeError`."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return f"NotStored({self.text})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NotStored) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self.text} was not stored in the file (only functions with a name at module level are); pass it again")


# ---------------------------------------------------------------------------------------------------------------- to JSON


def describe(value: Any, arrays: dict[str, Any]) -> Any:
    """JSON that describes `value`; its arrays are put into `arrays` under the names the description uses."""
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return value
    if isinstance(value, enum.Enum):
        return {"enum": _address(type(value)), "name": value.name}
    if isinstance(value, complex) and not isinstance(value, np.generic):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return _describe_array(value, arrays)
    fields = getattr(value, "_fields", None)
    if isinstance(value, tuple) and fields is not None:
        return {"named": _address(type(value)), "fields": dict(zip(fields, (describe(v, arrays) for v in value), strict=True))}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [describe(v, arrays) for v in value]}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) for k in value):
            return {"dict": {k: describe(v, arrays) for k, v in value.items()}}
        return {"pairs": [[describe(k, arrays), describe(v, arrays)] for k, v in value.items()]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        return {"class": _address(type(value)), "fields": {name: describe(getattr(value, name), arrays) for name in held}}
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    return _describe_named(value)


def _describe_array(value: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    name = f"array{len(arrays)}"
    arrays[name] = value
    if isinstance(value, jax.Array):
        return {"array": name, "as": "weak" if getattr(value, "weak_type", False) and value.ndim == 0 else "jax"}
    return {"array": name, "as": "numpy" if isinstance(value, np.ndarray) else "scalar"}


def _describe_named(value: Any) -> dict[str, str]:
    """A function or class that its module holds under its own name; anything else as text."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str) and _find(f"{module}:{name}") is value:
        return {"name": f"{module}:{name}"}
    return {"text": repr(value)[:200]}


def _address(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


# ---------------------------------------------------------------------------------------------------------------- from JSON


def rebuild(described: Any, arrays: Mapping[str, Any], source: str) -> Any:
    """The value that `describe` saw. `source` is named in errors and warnings."""
    if not isinstance(described, dict):
        return described
    again = functools.partial(rebuild, arrays=arrays, source=source)
    (kind, body), *_ = described.items()
    match kind:
        case "complex":
            return complex(*body)
        case "array":
            return _rebuild_array(arrays[body], described["as"], source)
        case "list":
            return [again(v) for v in body]
        case "tuple":
            return tuple(again(v) for v in body)
        case "dict":
            return {k: again(v) for k, v in body.items()}
        case "pairs":
            return {again(k): again(v) for k, v in body}
        case "dtype":
            return jnp.dtype(body)
        case "text":
            return NotStored(body)
        case "name":
            found = _find(body)
            return NotStored(body) if found is None else found
        case "enum":
            return _rebuild_enum(body, described["name"], source)
        case "named" | "class":
            return _rebuild_class(body, {k: again(v) for k, v in described["fields"].items()}, kind, source)
    raise CheckpointMismatchError(f"{source} describes a {kind!r}, which this version of theorylab does not know")


def _rebuild_array(value: Any, how: str, source: str) -> Any:
    if how == "numpy":
        return value
    if how == "scalar":
        return value[()]
    if isinstance(value, jax.Array):                # a typed key
        return value
    if how == "weak":
        return jnp.asarray(value.item())            # a Python number, so that it adopts the precision of what it meets
    result = jnp.asarray(value)
    if result.dtype != value.dtype:
        raise PrecisionError(f"{source} holds {value.dtype} arrays and 64-bit mode is off: "
                             "unset the environment variable JAX_ENABLE_X64 before theorylab is imported")
    return result


def _find(address: str) -> Any:
    """The class or function of that address, or None.

    A file must not decide what code runs: modules outside `TRUSTED` are not imported, the standard library is out of reach, and what
    is found must be defined under that very address, so that a name imported by another module leads nowhere.
    """
    module, _, name = address.partition(":")
    root = module.split(".")[0]
    if root in sys.stdlib_module_names:
        return None
    if module not in sys.modules:
        if root not in TRUSTED:
            return None
        try:
            importlib.import_module(module)
        except ImportError:
            return None
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    own = (getattr(found, "__module__", None), getattr(found, "__qualname__", None)) == (module, name)
    return found if own and callable(found) else None


def _rebuild_enum(address: str, name: str, source: str) -> Any:
    cls = _find(address)
    if isinstance(cls, type) and issubclass(cls, enum.Enum) and name in cls.__members__:
        return cls[name]
    warnings.warn(f"{source}: the enumeration {address} was not found; its member comes back as the string {name!r}", stacklevel=4)
    return name


def _rebuild_class(address: str, fields: dict[str, Any], kind: str, source: str) -> Any:
    """An instance with these fields, without running its constructor; a dict of the fields where the class cannot be used."""
    cls = _find(address)
    reason = _unusable(cls, address, fields, kind)
    if reason:
        warnings.warn(f"{source}: {address} comes back as a dict of its fields: {reason}", stacklevel=4)
        return fields
    if kind == "named":
        return tuple.__new__(cls, [fields[name] for name in cls._fields])
    value = object.__new__(cls)
    for name, field in fields.items():
        object.__setattr__(value, name, field)
    return value


def _unusable(cls: Any, address: str, fields: Mapping[str, Any], kind: str) -> str:
    module = address.partition(":")[0]
    if cls is None:
        return f"it was not found; import {module} before loading" if module not in sys.modules else f"{module} no longer has it"
    if not isinstance(cls, type):
        return "it is not a class"
    if kind == "named":
        known = getattr(cls, "_fields", None) if issubclass(cls, tuple) else None
    else:
        ours = issubclass(cls, Module) or (module.split(".")[0] in TRUSTED and (issubclass(cls, eqx.Module) or dataclasses.is_dataclass(cls)))
        known = [f.name for f in dataclasses.fields(cls)] if ours else None
    if known is None:
        return "it is neither a theorylab Module nor a named tuple"
    if set(known) != set(fields):
        return f"its fields are now {', '.join(known)}, and the file holds {', '.join(fields)}"
    return ""
