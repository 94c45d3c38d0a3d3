"""CPU time of the test run by part, as a table; with `THEORYLAB_BUDGET=1` a part that exceeds its share by half fails the run.

Process CPU time is summed, children included, over all pytest-xdist workers, so a loaded machine changes nothing.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import PurePosixPath

import pytest

# CPU-seconds on an empty compilation cache; 1200 are ten minutes on two cores
FAMILIES = ("transformer_pde", "acvi", "stiefel", "hypergradient", "moe")
SHARES = {
    "core and lab": 110.0,
    "transformer_pde": 130.0,
    "acvi": 125.0,
    "stiefel": 80.0,
    "hypergradient": 140.0,
    "moe": 125.0,
    **{f"{family} claims": 40.0 if family == "transformer_pde" else 20.0 for family in FAMILIES},
    **{f"{family} figures": 45.0 if family == "transformer_pde" else 25.0 for family in FAMILIES},
    "examples": 165.0,
    "interop": 20.0,
    "other": 40.0,
}
MARGIN = 1.5
LONG_TEST = 5.0

_mark = time.process_time()
_seconds: dict[str, float] = defaultdict(float)
_collection: list[float] = []


def cpu() -> float:
    """CPU-seconds of this process and of its finished children."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def part(nodeid: str) -> str:
    """The row of the table that a test belongs to.

    The folder decides; for tests in `tests/` itself the family that the parameter names (`test_claims.py::test_fast[moe.rate]`) does.
    """
    path, _, rest = nodeid.partition("::")
    places = PurePosixPath(path).parts
    folder = places[1] if len(places) > 2 else ""
    if folder in {"core", "lab"}:
        return "core and lab"
    if folder in SHARES:
        return folder
    parameter = rest.partition("[")[2].removeprefix("theorylab.")
    family = next((f for f in FAMILIES if parameter == f or parameter.startswith((f + ".", f + "/", f + "]"))), "")
    name = places[-1]
    if "claims" in name:
        return f"{family} claims" if family else "other"
    if "figures" in name:
        return f"{family} figures" if family else "other"
    return "examples" if "examples" in name else "other"


def spent(seconds: dict[str, float]) -> dict[str, float]:
    """CPU-seconds by part, in the order of `SHARES`."""
    total = dict.fromkeys(SHARES, 0.0)
    for nodeid, value in seconds.items():
        total[part(nodeid)] += value
    return {name: value for name, value in total.items() if value > 0}


def exceeded(seconds: dict[str, float]) -> list[str]:
    """Parts that used more than `MARGIN` times their share."""
    return [name for name, value in spent(seconds).items() if value > MARGIN * SHARES[name]]


def slowest(seconds: dict[str, float], name: str | None = None, count: int = 8) -> list[tuple[float, str]]:
    """The tests of a part (or of all) that used the most."""
    rows = [(value, nodeid) for nodeid, value in seconds.items() if name is None or part(nodeid) == name]
    return sorted(rows, reverse=True)[:count]


def enforced() -> bool:
    """Whether this run must keep the shares."""
    return os.environ.get("THEORYLAB_BUDGET", "") == "1"


def pytest_collection_finish(session):
    """Note what starting up took: imports and collection, in each worker."""
    global _mark
    _mark = cpu()
    output = getattr(session.config, "workeroutput", None)
    if output is None:
        _collection.append(_mark)
    else:
        output["collection_cpu"] = _mark


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Take over what a worker noted."""
    _collection.append(getattr(node, "workeroutput", {}).get("collection_cpu", 0.0))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Attach to each report the CPU time since the report before; runs where the test runs."""
    global _mark
    report = yield
    now = cpu()
    report.cpu_seconds, _mark = now - _mark, now
    return report


def pytest_runtest_logreport(report):
    """Collect; with xdist this also runs in the main process, on reports that came from the workers."""
    _seconds[report.nodeid] += getattr(report, "cpu_seconds", 0.0)


def pytest_sessionfinish(session):
    """Fail a run that exceeds a share, where shares are enforced."""
    if enforced() and not hasattr(session.config, "workeroutput") and session.exitstatus == 0 and exceeded(_seconds):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    """Print the table."""
    write, table = terminalreporter.write_line, spent(_seconds)
    if not table:
        return
    terminalreporter.section("CPU time by part", sep="-")
    write(f"{'part':<26}{'CPU-s':>8}{'share':>8}")
    for name, value in table.items():
        write(f"{name:<26}{value:>8.1f}{SHARES[name]:>8.0f}{'  over' if value > MARGIN * SHARES[name] else ''}")
    write(f"{'start-up and collection':<26}{sum(_collection):>8.1f}")
    write(f"{'all':<26}{sum(table.values()) + sum(_collection):>8.1f}{sum(SHARES.values()):>8.0f}")
    long = [row for row in slowest(_seconds) if row[0] > LONG_TEST]
    if long:
        write(f"tests above {LONG_TEST:.0f} CPU-s (mark them slow, or make them smaller):")
        for value, nodeid in long:
            write(f"{value:>8.1f}  {nodeid}")
    if enforced():
        for name in exceeded(_seconds):
            write(f"BUDGET EXCEEDED: {name} used {table[name]:.1f} CPU-s, over {MARGIN} times its share of {SHARES[name]:.0f}; its slowest tests:")
            for value, nodeid in slowest(_seconds, name):
                write(f"{value:>8.1f}  {nodeid}")
