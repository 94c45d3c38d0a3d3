"""A stopwatch that keeps tracing and compiling apart from computing."""

from __future__ import annotations

import functools
import time
from collections import deque
from typing import Any

import jax

_PHASES = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")
_SEEN: deque[tuple[float, float]] = deque(maxlen=100_000)


@functools.cache
def _listen() -> None:
    """Ask JAX, once per process, to report the duration of each phase of compilation when it ends."""
    jax.monitoring.register_event_duration_secs_listener(_note)


def _note(event: str, duration_secs: float, **_: Any) -> None:
    if event.rsplit("/", 1)[-1] in _PHASES:
        now = time.perf_counter()
        _SEEN.append((now - duration_secs, now))


class Stopwatch:
    """Wall, processor and compile seconds of a `with` block.

    Attributes:
        seconds: wall time, compiling included.
        cpu_seconds: processor time of this process, all threads.
        compile_seconds: wall time during which JAX was tracing or compiling.

    Example:
        >>> with Stopwatch() as watch:
        ...     total = sum(range(1000))
        >>> 0 < watch.seconds < 1
        True
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    compile_seconds: float = 0.0

    def __enter__(self) -> Stopwatch:
        _listen()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: Any) -> None:
        end = time.perf_counter()
        self.seconds, self.cpu_seconds = end - self._wall, time.process_time() - self._cpu
        self.compile_seconds = min(self.seconds, _union([(max(a, self._wall), b) for a, b in tuple(_SEEN) if b > self._wall]))

    def to_dict(self) -> dict[str, float]:
        """The three numbers, to the millisecond."""
        return {name: round(getattr(self, name), 3) for name in ("seconds", "cpu_seconds", "compile_seconds")}


def _union(intervals: list[tuple[float, float]]) -> float:
    """Length of the union: the trace of an inner function is reported by itself and again inside that of the outer one."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
