"""The public names of the package and the API pages that list every one of them."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.util
import inspect
import pkgutil
import re
import types
from typing import Any, Generic

# page, title, package whose public names it holds, layer folders those names are defined in (empty: any), further modules shown whole
PAGES = (
    ("core", "Core", "theorylab", ("core", "runtime", "errors"), ("theorylab.errors",)),
    ("lab", "Lab", "theorylab", ("lab",), ("theorylab.lab.evidence", "theorylab.lab.claims", "theorylab.lab.figures")),
)
_WIDTH = 88


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public name: where users find it, where it is defined, and the object."""

    name: str
    public: str
    module: str
    thing: Any

    @property
    def path(self) -> str:
        """The place of the definition."""
        return f"{self.module}.{getattr(self.thing, '__qualname__', self.name)}" if self.documented else f"{self.module}.{self.name}"

    @property
    def documented(self) -> bool:
        """Whether it is a class or a function, and so has a docstring of its own."""
        return inspect.isclass(self.thing) or callable(self.thing)


def families() -> list[str]:
    """Packages above the lab, in alphabetical order; `interop` is last, module by module."""
    import theorylab

    found = [m.name for m in pkgutil.iter_modules(theorylab.__path__) if m.ispkg and m.name not in {"core", "lab", "interop"}]
    return sorted(found)


def public(package: str) -> list[str]:
    """The names in `__all__`, else every name that does not begin with an underscore and is defined in theorylab."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None)
    if names is None:
        own = [n for n, v in vars(module).items() if not isinstance(v, types.ModuleType) and _home(v).startswith(package)]
        names = [n for n in own if not n.startswith("_")]
    return sorted(n for n in names if not n.startswith("__"))


def _home(thing: Any) -> str:
    return getattr(thing, "__module__", None) or ""


def entries(package: str, folders: tuple[str, ...] = ()) -> list[Entry]:
    """The public names of a package with their homes; a public module stands for its own public functions and classes."""
    module, found = importlib.import_module(package), []
    for name in public(package):
        thing = getattr(module, name)
        if isinstance(thing, types.ModuleType):
            # the front door offers the families, which have pages of their own
            if package != "theorylab":
                found += whole(thing.__name__)
            continue
        home = _home(thing) if _home(thing).startswith("theorylab.") else package
        if not folders or home.split(".")[1:2] == [] or home.split(".")[1] in folders:
            found.append(Entry(name, f"{package}.{name}", home, thing))
    return found


def whole(module: str) -> list[Entry]:
    """The public functions and classes that a module defines, in the order of its source."""
    space = importlib.import_module(module)
    own = [(n, v) for n, v in vars(space).items() if not n.startswith("_") and callable(v) and _home(v) == module]
    return [Entry(n, f"{module}.{n}", module, v) for n, v in own if inspect.isclass(v) or inspect.isfunction(v)]


def pages() -> dict[str, tuple[str, list[Entry]]]:
    """Title and entries of every API page, by file stem."""
    found: dict[str, tuple[str, list[Entry]]] = {}
    for stem, title, package, folders, extra in PAGES:
        rows = entries(package, folders)
        known = {id(e.thing) for e in rows}
        rows += [e for module in extra if importlib.util.find_spec(module) for e in whole(module) if id(e.thing) not in known]
        found[stem] = (title, rows)
    for family in families():
        found[family] = (f"theorylab.{family}", entries(f"theorylab.{family}"))
    interop = [e for m in _interop() for e in whole(m)]
    if interop:
        found["interop"] = ("theorylab.interop", interop)
    return found


def _interop() -> list[str]:
    if importlib.util.find_spec("theorylab.interop") is None:
        return []
    package = importlib.import_module("theorylab.interop")
    return [f"theorylab.interop.{m.name}" for m in pkgutil.iter_modules(package.__path__)]


def signature(thing: Any, name: str) -> str:
    """The call as one writes it, one argument per line when it is long; for an enumeration its members, for an exception what it derives from."""
    if inspect.isclass(thing) and issubclass(thing, enum.Enum):
        return "\n".join(f"{name}.{member.name}" for member in thing)
    if inspect.isclass(thing) and (issubclass(thing, BaseException) or getattr(thing, "_is_protocol", False)):
        return f"class {name}({', '.join(base.__name__ for base in thing.__bases__ if base is not Generic)})"
    try:
        call = inspect.signature(thing)
    except (TypeError, ValueError):
        return name
    parts, named = [], False
    for p in call.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not named:
            parts.append("*")
        named = named or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        note = "" if p.annotation in (p.empty, "Any", Any) else f": {_type(p.annotation)}"
        default = "" if p.default is p.empty else f"{' = ' if note else '='}{_default(p.default)}"
        parts.append(text + note + default)
    result = "" if call.return_annotation is call.empty or inspect.isclass(thing) else f" -> {_type(call.return_annotation)}"
    short = f"{name}({', '.join(parts)}){result}"
    return short if len(short) <= _WIDTH else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){result}"


def _type(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        return annotation.__name__
    return re.sub(r"\b(typing|theorylab[\w.]*)\.", "", str(annotation))


def _default(value: Any) -> str:
    """A default as text that could be typed in: no addresses, arrays by their value."""
    if hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        return f"{value.item():g}"
    text = getattr(value, "__qualname__", None) or repr(value)
    return "..." if " at 0x" in text or "\n" in text else text


def page(title: str, rows: list[Entry], stem: str) -> str:
    """The Markdown of an API page: a table of contents by module, then every name with signature and docstring."""
    front = {"core": "Names of `import theorylab as tl`, and the exceptions.", "lab": "Names for experiments: `import theorylab as tl`."}
    blocks = [f"# {title}", front.get(stem, f"`from theorylab import {stem}`" if stem != "interop" else "Faces for other packages.")]
    by_module: dict[str, list[Entry]] = {}
    for row in rows:
        by_module.setdefault(row.module, []).append(row)
    for module in sorted(by_module):
        blocks += [f"## {module.split('.')[-1]} {{ #{module} }}", first_line(importlib.import_module(module))]
        blocks += [entry(row) for row in by_module[module]]
    return "\n\n".join(block for block in blocks if block) + "\n"


def entry(row: Entry) -> str:
    """Heading, signature and docstring of one name."""
    head = f"### {row.name} {{ #{row.public} }}"
    if not row.documented:
        return f"{head}\n\n```python\n{row.name} = {_default(row.thing)}\n```"
    inner = "\n".join(f"    {line}" for line in (
        "options:", "  show_root_heading: false", "  show_root_toc_entry: false", "  show_bases: false", "  heading_level: 4"))
    return f"{head}\n\n```python\n{signature(row.thing, row.name)}\n```\n\n::: {row.path}\n{inner}"


def first_line(module: Any) -> str:
    """What a module says it is."""
    return (inspect.getdoc(module) or "").split("\n\n")[0].strip()
