"""Figures: classes with compute, draw and expect; their registry, and the runner that caches, draws, judges and writes."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from theorylab import runtime
from theorylab.core.progress import Progress, resolve
from theorylab.core.show import html_table, seconds_text, text_table
from theorylab.errors import ArgumentError, StorageError, UnknownNameError
from theorylab.lab.claims import matches
from theorylab.lab.clock import Stopwatch
from theorylab.lab.evidence import Check, Row
from theorylab.lab.files import blame, checkout_folder, jsonable, load_module, to_json, write_atomic
from theorylab.lab.results import Store, checked, key
from theorylab.lab.style import paper_style

Preset = Literal["quick", "paper", "full"]
Verdict = Literal["passed", "failed", "error", "not offered"]
C = TypeVar("C", bound=type)

PRESETS = ("quick", "paper", "full")
_NAME = re.compile(r"[a-z][a-z0-9_]*/[a-z0-9]+(-[a-z0-9]+)*")
_PARTS = ("compute", "draw", "expect")
_DRAW_SECONDS = 1.0  # a figure whose numbers are stored costs about this


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
    """The text of the module that defines a figure, or of the class alone in a notebook."""
    file = getattr(sys.modules.get(body.__module__), "__file__", None)
    if file is not None:
        return Path(file).read_text(encoding="utf-8")
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


def select(patterns: str | Iterable[str] | None = None) -> list[Figure]:
    """The loaded figures that a name, family or glob (or any of several) asks for.

    Raises:
        UnknownNameError: a pattern fits nothing.
    """
    chosen: dict[str, Figure] = {}
    if not _REGISTRY:
        raise UnknownNameError("no figure is registered: a figure is a class with @figure in a module of paper_figures/")
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns or ["*"]):
        found = {n: f for n, f in _REGISTRY.items() if matches(n, pattern, "/")}
        if not found:
            raise UnknownNameError.of("figure", pattern, [*_REGISTRY, *{f.family for f in _REGISTRY.values()}])
        chosen |= found
    return [chosen[name] for name in sorted(chosen)]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one figure."""

    name: str
    preset: str
    verdict: Verdict
    rows: tuple[Row, ...] = ()
    files: tuple[str, ...] = ()
    message: str = ""
    cached: bool = False
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether nothing failed (a preset that a figure does not have was not asked)."""
        return self.verdict in ("passed", "not offered")

    def problems(self) -> list[str]:
        """One line for the error and for each failed row."""
        return [f"{self.name}: {text}" for text in ([self.message] if self.message else []) + [r.sentence() for r in self.rows if not r.passed]]


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
        folder: where the figure modules are; `paper_figures/` of the checkout unless given.
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
    say(_estimate(chosen, preset, store, digests, out, force))
    for stem, error in broken.items():
        gallery.outcomes.append(Outcome(f"{stem}.py", preset, "error", message=f"cannot be loaded: {blame(error)}"))
    for i, one in enumerate(chosen):
        say(f"[{i + 1}/{len(chosen)}] {one.name}")
        if one.presets[preset] is None:
            gallery.outcomes.append(Outcome(one.name, preset, "not offered"))
            continue
        gallery.outcomes.append(_make(one, preset, digests[one.name], store, out, bar, force, png))
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
        chosen = select(names)
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


def _sidecar(one: Figure, out: Path) -> Path:
    return out / one.family / (one.name.split("/")[1] + ".json")


def _estimate(chosen: list[Figure], preset: str, store: Store, digests: Mapping[str, str], out: Path, force: bool) -> str:
    """How long a run will take, from what the same figures took before."""
    total, unknown, stored = 0.0, [], 0
    for one in chosen:
        if one.name not in digests:
            continue
        if not force and (one.name, preset, digests[one.name]) in store:
            stored += 1
            total += _DRAW_SECONDS
            continue
        before = store.seconds(one.name, preset) or _seconds_before(_sidecar(one, out), preset)
        if before is None:
            unknown.append(one.name)
        total += before or 0.0
    parts = [f"{stored} stored"] * bool(stored) + [f"{len(unknown)} of unknown duration"] * bool(unknown)
    time = "unknown" if unknown and len(unknown) == len(digests) else f"about {seconds_text(total)}" + " or more" * bool(unknown)
    return f"{len(digests)} figure{'s' * (len(digests) != 1)}, preset {preset}: time {time}" + (f" ({', '.join(parts)})" if parts else "")


def _seconds_before(sidecar: Path, preset: str) -> float | None:
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
        return float(facts["times"]["compute"]["seconds"]) if facts["preset"] == preset else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make(one: Figure, preset: str, digest: str, store: Store, out: Path, bar: Progress, force: bool, png: bool) -> Outcome:
    """One figure from numbers to files."""
    settings: Mapping[str, Any] = one.presets[preset] or {}
    check, message, verdict, files = Check(one.name), "", "passed", []
    times: dict[str, Any] = {}
    data, cached, picture = {}, False, {}
    try:
        data, times["compute"], cached = _data(one, preset, settings, digest, store, bar, force)
        try:
            one.body.expect(check, data, **settings)
        except Exception as error:  # the picture is the best help to see why
            verdict, message = "error", f"expect: {blame(error)}"
        if not message and not check.rows:
            verdict, message = "error", "expect measured nothing"
        verdict = "failed" if verdict == "passed" and not check.passed else verdict
        with Stopwatch() as watch:
            picture = _draw(one, data, "" if verdict == "passed" else message or "; ".join(r.sentence() for r in check.failed), png)
        times["draw"] = watch.to_dict()
    except Exception as error:
        verdict, message = "error", f"{message}; {blame(error)}" if message else blame(error)
    seconds = sum(t["seconds"] for stage, t in times.items() if not (cached and stage == "compute"))
    sidecar = _sidecar(one, out)
    try:
        for ending, content in picture.items():
            files.append(write_atomic(sidecar.with_suffix(f".{ending}"), content).relative_to(out).as_posix())
        facts = {k: str(v) for k, v in data.items() if v.dtype.kind in "US" and v.ndim == 0}
        write_atomic(sidecar, to_json({"name": one.name, "source": one.source, "caption": one.caption, "preset": preset, "settings": settings,
                                       "passed": verdict == "passed", "verdict": verdict, "message": message, "facts": facts,
                                       "checks": [row.to_dict() for row in check.rows], "files": files, "times": times, "cached": cached,
                                       "key": digest, "provenance": runtime.provenance()}))
    except StorageError as error:
        verdict, message = "error", str(error)
    return Outcome(one.name, preset, verdict, tuple(check.rows), tuple(files), message, cached, round(seconds, 3))  # type: ignore[arg-type]


def _data(one: Figure, preset: str, settings: Mapping[str, Any], digest: str, store: Store, bar: Progress,
          force: bool) -> tuple[dict[str, np.ndarray], dict[str, float], bool]:
    """The numbers of a figure, how long they took, and whether they were stored."""
    found = None if force else store.load(one.name, preset, digest)
    if found is not None:
        return found[0], found[1]["times"], True
    with Stopwatch() as watch:
        try:
            data = checked(one.name, one.body.compute(bar, **settings))
        finally:
            bar.close()
    store.save(one.name, preset, digest, data, watch.to_dict())
    return data, watch.to_dict(), False


def _draw(one: Figure, data: Mapping[str, np.ndarray], failure: str, png: bool) -> dict[str, bytes]:
    """The picture as the bytes of its files; a failure is written across its foot."""
    from matplotlib.figure import Figure as Picture

    with paper_style():
        picture = one.body.draw(data)
        if not isinstance(picture, Picture):
            raise ArgumentError(f"draw of {one.name} must return a matplotlib Figure, got {type(picture).__name__}")
        try:
            if failure:
                short = failure if len(failure) <= 110 else failure[:107] + "..."
                picture.text(0.01, 0.01, f"CHECK FAILED: {short}".replace("$", r"\$"), color="#B00020", fontsize=6, wrap=True, zorder=100)
            content = {}
            for ending in ("svg", "png") if png else ("svg",):
                buffer = io.BytesIO()
                # No date and no version inside, so that equal data give equal bytes.
                picture.savefig(buffer, format=ending, metadata={"Date": None, "Creator": None} if ending == "svg" else {"Software": None})
                content[ending] = buffer.getvalue()
            return content
        finally:
            if "matplotlib.pyplot" in sys.modules:
                sys.modules["matplotlib.pyplot"].close(picture)
