"""Claims: statements of the papers as measurements that pass or fail; their registry, runner and report."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar

from theorylab import runtime
from theorylab.core.progress import Progress, resolve
from theorylab.core.show import html_table, number_text, seconds_text, text_table
from theorylab.errors import ArgumentError, ClaimFailed, UnknownNameError
from theorylab.lab.clock import Stopwatch
from theorylab.lab.evidence import Check, Row
from theorylab.lab.files import blame, jsonable, to_json, write_atomic

Preset = Literal["fast", "full"]
Verdict = Literal["passed", "failed", "error", "full only"]
Body = TypeVar("Body", bound=Callable[..., None])

PRESETS = ("fast", "full")
_NAME = re.compile(r"[a-z][a-z0-9_]*\.[a-z0-9]+(-[a-z0-9]+)*")
HEAD = ("claim", "preset", "check", "measured", "relation", "bound", "verdict", "seconds")


@dataclasses.dataclass(frozen=True)
class Claim:
    """A registered claim: its name, LaTeX statement, source, two presets and the body that measures."""

    name: str
    statement: str
    source: str
    fast: Mapping[str, Any] | None
    full: Mapping[str, Any] | None
    body: Callable[..., None]

    @property
    def family(self) -> str:
        """The part of the name before the dot."""
        return self.name.split(".")[0]

    def settings(self, preset: str) -> Mapping[str, Any] | None:
        """The arguments of a preset; `full` falls back to `fast` where only that was given. None: not offered."""
        return self.full if preset == "full" and self.full is not None else self.fast


_REGISTRY: dict[str, Claim] = {}


def claim(name: str, *, statement: str, source: str, fast: dict[str, Any] | None, full: dict[str, Any] | None = None) -> Callable[[Body], Body]:
    r"""Register a function `(check, **preset)` as the measurement behind a statement.

    Args:
        name: `family.kebab-case`, unique.
        statement: the statement, with mathematics in `$...$`.
        source: paper and place in it, as in `"moe, main theorem"`.
        fast: arguments of the small case that runs with the tests; None where no small case is honest (the report then says "full only").
        full: arguments of the case that the statement deserves; None uses `fast` for both.

    Raises:
        ArgumentError: the name has another form or is taken, no preset is given, or the body does not take the arguments of a preset.

    Example:
        >>> @claim("demo.half", statement="$1/2 = 0.5$", source="arithmetic", fast={"tol": 1e-15})
        ... def half(check, tol):
        ...     check.equal("half", 1 / 2, 0.5, tol)
        >>> run("demo.half").passed
        True
        >>> forget("demo.half")
    """
    if not _NAME.fullmatch(name):
        raise ArgumentError(f"name of a claim must be family.kebab-case in lower case, got {name!r}")
    if fast is None and full is None:
        raise ArgumentError(f"claim {name!r} has no preset: give fast, full or both")

    def register(body: Body) -> Body:
        for preset in (fast, full):
            if preset is not None:
                try:
                    inspect.signature(body).bind(Check(), **preset)
                except TypeError as error:
                    raise ArgumentError(f"claim {name!r}: its body does not take (check, {', '.join(preset)}): {error}") from None
        known = _REGISTRY.get(name)
        if known is not None and _place(known.body) != _place(body):
            raise ArgumentError(f"claim {name!r} is registered twice: in {_place(known.body)[0]} and in {_place(body)[0]}")
        _REGISTRY[name] = Claim(name, statement, source, fast, full, body)
        return body

    return register


def _place(body: Callable) -> tuple[str, int]:
    """Module and line, so that loading a module again is not taken for a second claim."""
    return body.__module__, body.__code__.co_firstlineno


def forget(name: str) -> None:
    """Remove a claim from the registry, as a test or a notebook may want."""
    _REGISTRY.pop(name, None)


def discover(family: str | None = None) -> dict[str, BaseException]:
    """Import `theorylab.<family>.claims` of every family that has one, or of one family; returns what could not be imported, by family."""
    import theorylab as tl

    broken: dict[str, BaseException] = {}
    for module in pkgutil.iter_modules(tl.__path__):
        if not module.ispkg or (family is not None and module.name != family):
            continue
        try:
            if importlib.util.find_spec(f"theorylab.{module.name}.claims") is not None:
                importlib.import_module(f"theorylab.{module.name}.claims")
        except Exception as error:  # the claims of the other families must still run
            broken[module.name] = error
    return broken


def registered() -> dict[str, Claim]:
    """All claims that have been imported, by name."""
    return dict(sorted(_REGISTRY.items()))


def matches(name: str, pattern: str, separator: str = ".") -> bool:
    """Whether `pattern` is the name, its family, or a glob that fits it."""
    return name == pattern or name.split(separator, maxsplit=1)[0] == pattern or fnmatchcase(name, pattern)


def select(patterns: str | Iterable[str] | None = None) -> tuple[list[Claim], dict[str, BaseException]]:
    """The claims that a name, family or glob (or any of several) asks for, and the families among them that could not be imported.

    Raises:
        UnknownNameError: a pattern fits nothing.
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns or ["*"])
    families = {re.split(r"[.*?\[]", p)[0] for p in wanted}
    literal = all(p == f or p.startswith(f + ".") for p, f in ((p, re.split(r"[.*?\[]", p)[0]) for p in wanted))
    broken: dict[str, BaseException] = {}
    for family in sorted(families) if literal else [None]:
        broken |= discover(family)
    chosen: dict[str, Claim] = {}
    for pattern in wanted:
        found = {n: c for n, c in _REGISTRY.items() if matches(n, pattern)}
        if patterns is None and not _REGISTRY and not broken:
            raise UnknownNameError("no claim is registered: a claim is a function with @claim in theorylab/<family>/claims.py")
        if not found and not any(matches(f"{f}.claims", pattern) or pattern.startswith(f + ".") for f in broken):
            discover()
            raise UnknownNameError.of("claim", pattern, [*_REGISTRY, *{c.family for c in _REGISTRY.values()}])
        chosen |= found
    return [chosen[n] for n in sorted(chosen)], broken


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one claim measured: its rows, the verdict, and how long it took."""

    name: str
    preset: str
    verdict: Verdict
    rows: tuple[Row, ...] = ()
    statement: str = ""
    source: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    message: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether nothing failed (a claim without a fast preset was not asked)."""
        return self.verdict in ("passed", "full only")

    def cells(self) -> list[list[Any]]:
        """Lines of the text table: one per measured row, and one for an error or a claim that was not asked."""
        lines = [[self.name, self.preset, r.label, number_text(r.measured), r.relation, number_text(r.bound),
                  "passed" if r.passed else "FAILED", ""] for r in self.rows]
        if self.verdict in ("error", "full only"):
            lines.append([self.name, self.preset, "", "", "", "", "ERROR" if self.verdict == "error" else self.verdict, ""])
        lines[0][-1] = f"{self.seconds:.2f}"
        return lines

    def problems(self) -> list[str]:
        """One line for the error and for each failed row, with its note."""
        return [f"{self.name}: {text}" for text in ([self.message] if self.message else []) + [r.sentence() for r in self.rows if not r.passed]]

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        return jsonable(dataclasses.asdict(self))


@dataclasses.dataclass(repr=False)
class Report:
    """The outcomes of a run of claims, as text, HTML or JSON."""

    preset: str
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    complete: bool = False
    date: str = dataclasses.field(default_factory=lambda: datetime.now(UTC).date().isoformat())
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the run is complete and nothing failed."""
        return self.complete and all(outcome.good for outcome in self.outcomes)

    def raise_if_failed(self) -> None:
        """Raise when a claim failed or broke.

        Raises:
            ClaimFailed: the message holds the measured value, relation and bound of every failed row, and every error.
        """
        bad = [line for o in self.outcomes for line in o.problems()]
        if bad or not self.complete:
            raise ClaimFailed("\n".join(bad) or "the run of claims was interrupted")

    def summary(self) -> str:
        """One line: how many passed, failed, broke, were not asked, and the time."""
        count = {v: sum(o.verdict == v for o in self.outcomes) for v in ("passed", "failed", "error", "full only")}
        parts = [f"{n} {v}" for v, n in count.items() if n or v == "passed"]
        seconds, compiling = sum(o.seconds for o in self.outcomes), sum(o.compile_seconds for o in self.outcomes)
        end = "" if self.complete else "; interrupted"
        return (f"{', '.join(parts)} of {len(self.outcomes)} claim{'s' * (len(self.outcomes) != 1)} ({self.preset}) in {seconds_text(seconds)}, "
                f"{seconds_text(compiling)} of it compiling{end}")

    def text(self) -> str:
        """The table, what went wrong, and the summary."""
        table = text_table(HEAD, [line for o in self.outcomes for line in o.cells()])
        return "\n".join([table, *(line for o in self.outcomes for line in o.problems()), self.summary()])

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        return {"preset": self.preset, "date": self.date, "complete": self.complete, "passed": self.passed, "provenance": jsonable(self.provenance),
                "claims": [outcome.to_dict() for outcome in self.outcomes]}

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, atomically.

        Raises:
            StorageError: the file cannot be written; an older one is left whole.
        """
        return write_atomic(path, to_json(self.to_dict()))

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return html_table(HEAD, [line for o in self.outcomes for line in o.cells()], caption=self.summary())


def run(name: str | Iterable[str] | None = None, preset: Preset = "fast", progress: bool | Progress = False, out: str | Path | None = None, *,
        show: Callable[[Outcome], None] | None = None) -> Report:
    """Measure claims, one after another; what fails or breaks does not stop the others.

    Args:
        name: a name, a family, a glob, or several of them; all claims unless given.
        preset: `"fast"` or `"full"`.
        progress: True for a bar, or an object that follows `Progress`.
        out: JSON file that is rewritten after each claim, so an interrupted run keeps what it measured.
        show: called with each outcome when it is known.

    Raises:
        UnknownNameError: a name or the preset is not known.
        StorageError: `out` cannot be written.
    """
    if preset not in PRESETS:
        raise UnknownNameError.of("preset", preset, PRESETS)
    chosen, broken = select(name)
    report = Report(preset, provenance=runtime.provenance(preset=preset))
    bar = resolve(progress)

    def add(outcome: Outcome) -> None:
        report.outcomes.append(outcome)
        if out is not None:
            report.save(out)
        if show is not None:
            show(outcome)

    bar.start(f"claims ({preset})", len(chosen))
    try:
        for family, error in broken.items():
            add(Outcome(f"{family}.claims", preset, "error", message=f"cannot be imported: {blame(error)}"))
        for i, one in enumerate(chosen):
            bar.update(i, one.name)
            add(measure(one, preset))
        bar.update(len(chosen))
        report.complete = True
        if out is not None:
            report.save(out)
    finally:
        bar.close()
    return report


def measure(one: Claim, preset: str) -> Outcome:
    """Run the body of one claim and judge what it measured."""
    settings = one.settings(preset)
    if settings is None:
        return Outcome(one.name, preset, "full only", statement=one.statement, source=one.source)
    check, message, watch = Check(one.name), "", Stopwatch()
    verdict: Verdict = "passed"
    with watch:
        try:
            one.body(check, **settings)
        except Exception as error:
            verdict, message = "error", blame(error)
    if verdict == "passed":
        if not check.rows:
            verdict, message = "error", "the claim measured nothing"
        elif not check.passed:
            verdict = "failed"
    return Outcome(one.name, preset, verdict, tuple(check.rows), one.statement, one.source, settings, message,
                   watch.seconds, watch.cpu_seconds, watch.compile_seconds)
