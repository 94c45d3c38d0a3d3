"""Figures: classes with compute, draw and expect; their registry, and the runner that caches, draws, judges and writes."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from theorylab.core.progress import Progress, resolve
from theorylab.core.show import html_table, text_table
from theorylab.errors import ArgumentError, StorageError, UnknownNameError
from theorylab.lab.claims import matches
from theorylab.lab.drawing import Outcome, estimate, make
from theorylab.lab.evidence import Check
from theorylab.lab.files import blame, checkout_folder, jsonable, load_module, write_atomic
from theorylab.lab.results import Store, key

Preset = Literal["quick", "paper", "full"]
C = TypeVar("C", bound=type)

PRESETS = ("quick", "paper", "full")
_NAME = re.compile(r"[a-z][a-z0-9_]*/[a-z0-9]+(-[a-z0-9]+)*")
_PARTS = ("compute", "draw", "expect")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A registered figure: where it is from, its caption, its settings, and the class that computes, draws and judges."""

    name: str
    source: str
    caption: str
    presets: Mapping[str, Mapping[str, Any] | None]
    body: Any
    text: str = dataclasses.field(repr=False)

    @property
    def family(self) -> str:
        """The part of the name before the slash."""
        return self.name.split("/")[0]


_REGISTRY: dict[str, Figure] = {}


def figure(name: str, *, source: str, caption: str, quick: dict[str, Any], paper: dict[str, Any],
           full: dict[str, Any] | None = None) -> Callable[[C], C]:
    r"""Register a class as a figure. It has three static methods:

    `compute(progress, **preset)` returns a dictionary of NumPy arrays, which is stored; `draw(data)` returns a matplotlib Figure and computes
    nothing; `expect(check, data, **preset)` states what the figure shows, as inequalities.

    Args:
        name: `family/kebab-case`, unique.
        source: paper and figure, as in `"moe, Figure 2"`.
        caption: what is seen, with mathematics in `$...$`.
        quick: settings that take seconds; the tests use them.
        paper: settings of the paper.
        full: settings that need a GPU or hours, if there are any.

    Raises:
        ArgumentError: the name has another form or is taken, or the class does not have the three methods with these settings.

    Example:
        >>> @figure("demo/squares", source="arithmetic", caption="Squares.", quick={"count": 3}, paper={"count": 30})
        ... class Squares:
        ...     @staticmethod
        ...     def compute(progress, count):
        ...         return {"n": np.arange(count), "square": np.arange(count) ** 2}
        ...     @staticmethod
        ...     def draw(data):
        ...         figure, ax = plt.subplots()
        ...         ax.plot(data["n"], data["square"])
        ...         return figure
        ...     @staticmethod
        ...     def expect(check, data, count):
        ...         check.above("growth", np.diff(data["square"]), 1)
        >>> registered()["demo/squares"].family
        'demo'
        >>> forget("demo/squares")
    """
    if not _NAME.fullmatch(name):
        raise ArgumentError(f"name of a figure must be family/kebab-case in lower case, got {name!r}")
    presets = {"quick": quick, "paper": paper, "full": full}

    def register(body: C) -> C:
        missing = [part for part in _PARTS if not isinstance(inspect.getattr_static(body, part, None), staticmethod)]
        if missing:
            raise ArgumentError(f"figure {name!r}: {body.__name__} needs the static methods {', '.join(_PARTS)}; {', '.join(missing)} is not one")
        for preset, settings in presets.items():
            if settings is not None:
                _fits(name, preset, "compute", body.compute, (None,), settings)  # type: ignore[attr-defined]
                _fits(name, preset, "expect", body.expect, (Check(), {}), settings)  # type: ignore[attr-defined]
        known = _REGISTRY.get(name)
        if known is not None and (known.body.__module__, known.body.__qualname__) != (body.__module__, body.__qualname__):
            raise ArgumentError(f"figure {name!r} is registered twice: by {known.body.__module__}.{known.body.__qualname__} and by "
                                f"{body.__module__}.{body.__qualname__}")
        _REGISTRY[name] = Figure(name, source, caption, presets, body, _module_text(body))
        return body

    return register


def _fits(name: str, preset: str, part: str, function: Callable, leading: tuple, settings: Mapping[str, Any]) -> None:
    try:
        inspect.signature(function).bind(*leading, **settings)
    except TypeError as error:
        raise ArgumentError(f"figure {name!r}: {part} does not take the settings of {preset!r} ({', '.join(settings)}): {error}") from None


def _module_text(body: type) -> str:
    """The text of the module that defines a figure and of the `_*.py` beside it that it names, or of the class alone in a notebook."""
    file = getattr(sys.modules.get(body.__module__), "__file__", None)
    if file is not None:
        texts, helpers = [Path(file).read_text(encoding="utf-8")], sorted(Path(file).parent.glob("_[!_]*.py"))
        for text in texts:                                                            # grows while it is walked: helpers load helpers
            named = [helper for helper in helpers if helper.name in text and helper != Path(file)]
            texts += [helper.read_text(encoding="utf-8") for helper in named]
            helpers = [helper for helper in helpers if helper not in named]
        return "\n".join(texts)
    try:
        return inspect.getsource(body)
    except (OSError, TypeError):
        raise ArgumentError(f"the source text of {body.__qualname__} cannot be read, so its result could not be told from another one") from None


def forget(name: str) -> None:
    """Remove a figure from the registry, as a test or a notebook may want."""
    _REGISTRY.pop(name, None)


def registered() -> dict[str, Figure]:
    """All figures that have been loaded, by name."""
    return dict(sorted(_REGISTRY.items()))


def discover(folder: str | Path | None = None) -> dict[str, BaseException]:
    """Load every module of `paper_figures/` (beside the package or in the current folder); returns what could not be loaded, by module.

    Raises:
        StorageError: there is no such folder; the message says where it was looked for.
    """
    place = Path(folder) if folder is not None else checkout_folder("paper_figures")
    if not place.is_dir():
        raise StorageError(f"{place} is not a folder of figure modules")
    broken: dict[str, BaseException] = {}
    for path in sorted(place.glob("[!_]*.py")):
        try:
            load_module(path)
        except Exception as error:  # the figures of the other papers must still be drawn
            broken[path.stem] = error
    return broken


def select(patterns: str | Iterable[str] | None = None, folder: str | Path | None = None) -> list[Figure]:
    """The loaded figures (of the modules in `folder`, if given) that a name, family or glob (or any of several) asks for.

    Raises:
        UnknownNameError: a pattern fits nothing.
    """
    known = {n: f for n, f in _REGISTRY.items() if folder is None or _folder(f) == Path(folder).resolve()}
    chosen: dict[str, Figure] = {}
    if not known:
        raise UnknownNameError("no figure is registered: a figure is a class with @figure in a module of paper_figures/")
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns or ["*"]):
        found = {n: f for n, f in known.items() if matches(n, pattern, "/")}
        if not found:
            raise UnknownNameError.of("figure", pattern, [*known, *{f.family for f in known.values()}])
        chosen |= found
    return [chosen[name] for name in sorted(chosen)]


def _folder(one: Figure) -> Path | None:
    """The folder of the module that defines a figure."""
    file = getattr(sys.modules.get(one.body.__module__), "__file__", None)
    return Path(file).parent if file is not None else None


@dataclasses.dataclass(repr=False)
class Gallery:
    """The outcomes of a run of figures."""

    preset: str
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every figure was drawn and met its expectations."""
        return bool(self.outcomes) and all(outcome.good for outcome in self.outcomes)

    def text(self) -> str:
        """The table of figures and what went wrong."""
        return "\n".join([text_table(*self._table()), *(line for o in self.outcomes for line in o.problems())])

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        return {"preset": self.preset, "passed": self.passed, "figures": [jsonable(dataclasses.asdict(o)) for o in self.outcomes]}

    def _table(self) -> tuple[tuple[str, ...], list[list[Any]]]:
        rows = [[o.name, o.preset, f"{sum(r.passed for r in o.rows)} of {len(o.rows)}", o.verdict if o.good else o.verdict.upper(),
                 f"{o.seconds:.1f}" + (" (stored)" if o.cached else ""), ", ".join(o.files)] for o in self.outcomes]
        return ("figure", "preset", "checks", "verdict", "seconds", "files"), rows

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return html_table(*self._table())


def run_figures(names: str | Iterable[str] | None = None, preset: Preset = "paper", out: str | Path = "paper_figures/out",
                progress: bool | Progress = False, force: bool = False, *, png: bool = False, folder: str | Path | None = None,
                cache: str | Path | None = None, say: Callable[[str], None] = print) -> Gallery:
    """Compute (or take from the cache), draw, judge and write figures; one that breaks does not stop the others.

    For each figure `out/family/name.svg` is written with `name.json` beside it: settings, versions, the checks with their measured values,
    and times. A figure that fails its checks is written too, with the failure marked in the picture and in the JSON.

    Args:
        names: a name, a family, a glob, or several of them; all figures unless given.
        preset: `"quick"`, `"paper"` or `"full"`.
        out: folder for the pictures.
        progress: True for a bar, or an object that follows `Progress`; it is handed to `compute`.
        force: compute again even where a result is stored.
        png: write `name.png` too.
        folder: where the figure modules are, and no others are drawn; `paper_figures/` of the checkout unless given.
        cache: folder of stored results; in the user's cache folder unless given.
        say: receives the time estimate and one line per figure.

    Raises:
        UnknownNameError: a name or the preset is not known.
        StorageError: the modules are not found, or `out` cannot be written.
    """
    if preset not in PRESETS:
        raise UnknownNameError.of("preset", preset, PRESETS)
    chosen, broken = _load(names, folder)
    store, out = Store(cache), Path(out)
    _writable(out)
    bar, gallery = resolve(progress), Gallery(preset)
    digests = {one.name: key({"name": one.name, **settings}, one.text) for one in chosen if (settings := one.presets[preset]) is not None}
    say(estimate(chosen, preset, store, digests, out, force))
    for stem, error in broken.items():
        gallery.outcomes.append(Outcome(f"{stem}.py", preset, "error", message=f"cannot be loaded: {blame(error)}"))
    for i, one in enumerate(chosen):
        say(f"[{i + 1}/{len(chosen)}] {one.name}")
        if one.presets[preset] is None:
            gallery.outcomes.append(Outcome(one.name, preset, "not offered"))
            continue
        gallery.outcomes.append(make(one, preset, digests[one.name], store, out, bar, force, png))
        for line in gallery.outcomes[-1].problems():
            say(f"  {line}")
    return gallery


def _load(names: str | Iterable[str] | None, folder: str | Path | None) -> tuple[list[Figure], dict[str, BaseException]]:
    """The figures asked for, and the modules that may hold some of them and could not be loaded."""
    try:
        broken = discover(folder)
    except StorageError:
        if folder is not None or not _REGISTRY:  # figures that a notebook registered need no folder
            raise
        broken = {}
    try:
        chosen = select(names, folder)
    except UnknownNameError as error:
        if not broken:
            raise
        if names is not None:
            raise UnknownNameError(f"{error}; not loaded: " + "; ".join(f"{stem}.py: {blame(e)}" for stem, e in broken.items())) from None
        chosen = []
    patterns = [names] if isinstance(names, str) else list(names or ["*"])
    return chosen, {stem: e for stem, e in broken.items() if any(matches(f"{stem}/module", p, "/") for p in patterns)}


def _writable(out: Path) -> None:
    """Find out before the work, not after it, that pictures cannot be written."""
    probe = write_atomic(out / ".writable", b"")
    probe.unlink(missing_ok=True)


