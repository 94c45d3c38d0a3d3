"""One figure from numbers to files: the time it will take, its data, its picture, its facts."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from theorylab import runtime
from theorylab.core.progress import Progress
from theorylab.core.show import seconds_text
from theorylab.errors import ArgumentError, StorageError
from theorylab.lab.clock import Stopwatch
from theorylab.lab.evidence import Check, Row
from theorylab.lab.files import blame, to_json, write_atomic
from theorylab.lab.results import Store, checked
from theorylab.lab.style import paper_style

if TYPE_CHECKING:
    from theorylab.lab.figures import Figure

Verdict = Literal["passed", "failed", "error", "not offered"]
_DRAW_SECONDS = 1.0  # a figure whose numbers are stored costs about this


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


def sidecar(one: Figure, out: Path) -> Path:
    """Where the facts of a figure are written."""
    return out / one.family / (one.name.split("/")[1] + ".json")


def estimate(chosen: list[Figure], preset: str, store: Store, digests: Mapping[str, str], out: Path, force: bool) -> str:
    """How long a run will take, from what the same figures took before."""
    total, unknown, stored = 0.0, [], 0
    for one in chosen:
        if one.name not in digests:
            continue
        if not force and (one.name, preset, digests[one.name]) in store:
            stored += 1
            total += _DRAW_SECONDS
            continue
        before = store.seconds(one.name, preset) or _seconds_before(sidecar(one, out), preset)
        if before is None:
            unknown.append(one.name)
        total += before or 0.0
    parts = [f"{stored} stored"] * bool(stored) + [f"{len(unknown)} of unknown duration"] * bool(unknown)
    time = "unknown" if unknown and len(unknown) == len(digests) else f"about {seconds_text(total)}" + " or more" * bool(unknown)
    return f"{len(digests)} figure{'s' * (len(digests) != 1)}, preset {preset}: time {time}" + (f" ({', '.join(parts)})" if parts else "")


def _seconds_before(place: Path, preset: str) -> float | None:
    try:
        facts = json.loads(place.read_text(encoding="utf-8"))
        return float(facts["times"]["compute"]["seconds"]) if facts["preset"] == preset else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make(one: Figure, preset: str, digest: str, store: Store, out: Path, bar: Progress, force: bool, png: bool) -> Outcome:
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
    place = sidecar(one, out)
    try:
        for ending, content in picture.items():
            files.append(write_atomic(place.with_suffix(f".{ending}"), content).relative_to(out).as_posix())
        facts = {k: str(v) for k, v in data.items() if v.dtype.kind in "US" and v.ndim == 0}
        write_atomic(place, to_json({"name": one.name, "source": one.source, "caption": one.caption, "preset": preset, "settings": settings,
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
