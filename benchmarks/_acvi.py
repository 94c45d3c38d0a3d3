"""What the tables of `acvi.py` share: games, runs to a gap with their counts and seconds, and the solvers that are not ours."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack

import theorylab as tl

Array = np.ndarray
LEVELS = (1e-3, 1e-6, 1e-9)
LOOK = 10  # steps between looks at the gap


def norm(A: Array) -> float:
    """Norm of the double-centred payments, the Lipschitz constant of F on the strategies."""
    return float(np.linalg.norm(A - A.mean(0) - A.mean(1, keepdims=True) + A.mean(), 2))


def payments(size: int, seed: int) -> Array:
    """Standard normal payments."""
    return np.random.default_rng(seed).standard_normal((size, size))


def to_gap(problem: Any, method: Any, level: float, steps: int, seconds: float, every: int = LOOK) -> Any:
    """A run until the gap is below the level."""
    return tl.iterate(problem, method, steps=steps, every=every, stop=tl.Below("gap", level), seconds=seconds, throw=False)


def work(sol: Any, level: float, column: str = "operator_evaluations") -> float:
    """What had been counted when the gap was first at most the level; infinite if never."""
    good = np.flatnonzero(np.asarray(sol.history["gap"]) <= level)
    return float(np.asarray(sol.history.axis(column))[good[0]]) if len(good) else np.inf


def tuned(make: Callable, values: Sequence[float], problems: Sequence[tuple[Any, Any]], steps: int) -> float | None:
    """The value with the least evaluations to a gap of 1e-3, a run that does not get there counting as twice the limit.

    `problems` are pairs of a problem and what `make` needs of it.
    """
    costs = []
    for c in values:
        spent = [work(to_gap(problem, make(c, about), 1e-3, steps, 20.0), 1e-3) for problem, about in problems]
        costs.append(np.mean(np.log(np.minimum(spent, 4.0 * steps))))
    return values[int(np.argmin(costs))] if values else None


def mean(values: Sequence[float]) -> float | None:
    """The geometric mean; None if an entry is infinite."""
    return float(np.exp(np.mean(np.log(values)))) if len(values) and np.all(np.isfinite(values)) else None


def timed(call: Callable[[], Any], rounds: int, enough: float = 1.0, *, compiled: bool = True) -> float:
    """Seconds of the fastest of some calls; no more calls once they took `enough` together. One call before them if it is not compiled yet."""
    if not compiled:
        jax.block_until_ready(call())
    taken: list[float] = []
    while len(taken) < rounds and sum(taken) < enough:
        began = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - began)
    return min(taken)


def saddle(A: Any, x: Array, z: Array) -> float:
    """The gap of two strategies, clipped and rescaled first."""
    x, z = (np.maximum(s, 0) / np.maximum(s, 0).sum() for s in (x, z))
    return float((A.T @ x).max() - (A @ z).min())


def highs(A: Any, method: str, limit: float | None = None) -> tuple[Array, Array] | None:
    """Both strategies from one linear program; those of the column player are its multipliers. None if the limit came first."""
    n1, n2 = A.shape
    value = -np.ones((n2, 1))
    rows = np.hstack([A.T, value]) if isinstance(A, np.ndarray) else hstack([A.T, csr_array(value)])
    found = linprog(np.append(np.zeros(n1), 1.0), A_ub=rows, b_ub=np.zeros(n2), A_eq=np.append(np.ones(n1), 0.0)[None], b_eq=[1.0],
                    bounds=[(0, None)] * n1 + [(None, None)], method=method, options={} if limit is None else {"time_limit": limit})
    return (found.x[:n1], -found.ineqlin.marginals) if found.status == 0 else None


def clarabel(A: Array) -> tuple[Array, Array]:
    """The same program through cvxpy."""
    cp = importlib.import_module("cvxpy")
    x, value = cp.Variable(A.shape[0], nonneg=True), cp.Variable()
    bound = A.T @ x <= value
    cp.Problem(cp.Minimize(value), [bound, cp.sum(x) == 1]).solve(solver="CLARABEL")
    return x.value, bound.dual_value


def nash(A: Array) -> tuple[Array, Array]:
    """The linear program of nashpy, whose row player maximises."""
    return importlib.import_module("nashpy").Game(-A).linear_program()


def outside() -> tuple[dict[str, Callable[[Array], Any]], list[str]]:
    """Solvers that are not ours, and the names of those that are not installed."""
    found: dict[str, Callable[[Array], Any]] = {"HiGHS simplex (SciPy)": lambda A: highs(A, "highs-ds"),
                                                "HiGHS interior point (SciPy)": lambda A: highs(A, "highs-ipm")}
    absent = []
    for name, needs, run in (("Clarabel (cvxpy)", ("cvxpy", "clarabel"), clarabel), ("nashpy linear program", ("nashpy",), nash)):
        missing = [m for m in needs if importlib.util.find_spec(m) is None]
        if missing:
            absent.append(f"{name}: {', '.join(missing)} not installed")
        else:
            found[name] = run
    return found, absent


def reached(problems: Sequence[Any], methods: Sequence[Any], steps: int, limit: float, rounds: int, column: str = "operator_evaluations",
            every: int = LOOK) -> dict[str, Any]:
    """The work and the seconds of each level, and the largest of the last gaps."""
    to_gap(problems[0], methods[0], LEVELS[-1], 0, 1e9, every)                         # compiles
    runs = [to_gap(p, m, LEVELS[-1], steps, limit, every) for p, m in zip(problems, methods, strict=True)]
    cells: dict[str, Any] = {f"to {level:.0e}": mean([work(sol, level, column) for sol in runs]) for level in LEVELS}
    for level in LEVELS:
        seconds = []
        if cells[f"to {level:.0e}"] is not None:
            for p, m in zip(problems, methods, strict=True):
                seconds.append(timed(lambda p=p, m=m, level=level: to_gap(p, m, level, steps, 1e9, every).value, rounds))
        cells[f"s to {level:.0e}"] = mean(seconds)
    return cells | {"worst gap": max(float(sol.history.last("gap")) for sol in runs)}
