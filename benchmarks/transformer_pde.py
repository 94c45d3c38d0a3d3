"""Blow-up times of 1184 Gaussians, and one trajectory close to its blow-up: theorylab beside the published scheme, SciPy and diffrax.

Sweep: the starts of the blow-up figure of the paper (softmax, V = I, logits divided by the root of the dimension). Every row delivers
all blow-up times; the error is the largest relative one against the closed form. Rows that use a formula or a number as V say so; the
others know the attention as matrices only.

Trajectory: softmax with V = I in 8 dimensions up to 99 % of the blow-up time, end state only. The error is the relative Frobenius
error of the covariance against the closed form. For `integrate`, the last table names the fastest bare compiled diffrax call that is at least as
accurate, over a ladder of tolerances, both solvers, both step-size controllers and both adjoints.

First call: process CPU seconds, compilation included. Median: wall time over interleaved rounds; of a call under 0.1 s, a round takes the
fastest of three.

    python benchmarks/transformer_pde.py [--quick] [--json | --markdown]
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffrax
import jax
import numpy as np
from scipy.integrate import solve_ivp

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.core.stepping import I_COEFFICIENT, P_COEFFICIENT
from theorylab.errors import RunWarning
from theorylab.lab.files import load_module

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))

Array = np.ndarray

# the matrices of the blow-up figure: the second draw of its script, seed 33
QUERIES = np.array([[-0.09678415830991538, 0.42220166048145347], [-0.22546156340099752, -0.6379430932117882]])
KEYS = np.array([[-0.016286303695742424, 1.0442167783791647], [-1.0848803286340662, -2.2059248271588077]])
SCALE = 2**-0.5
DIM, NEAR = 8, 0.99
QUICK = 0.1  # seconds; a shorter call is made three times in a round
EIGHTH = diffrax.Dopri8()


class Race:
    """Contestants measured in turn, so that drift of the machine meets all alike."""

    def __init__(self) -> None:
        self.runs: dict[str, Callable[[], Any]] = {}
        self.share: dict[str, tuple[int, float]] = {}
        self.value: dict[str, Any] = {}
        self.first: dict[str, float] = {}
        self.times: dict[str, list[float]] = {}

    def add(self, name: str, run: Callable[[], Any], most: int = 10**9, part: float = 1.0) -> None:
        """A contestant, timed in at most `most` rounds; it does the fraction `part` of the work, and its times are scaled accordingly."""
        self.runs[name], self.share[name] = run, (most, part)

    def go(self, rounds: int) -> None:
        """First calls, then the rounds."""
        for name, run in self.runs.items():
            began = time.process_time()
            self.value[name] = run()
            self.first[name], self.times[name] = time.process_time() - began, []
        for i in range(rounds):
            for name, run in self.runs.items():
                most, part = self.share[name]
                if i < most:
                    taken = [self._once(run)]
                    if taken[0] < QUICK:
                        taken += [self._once(run), self._once(run)]
                    self.times[name].append(min(taken) / part)

    @staticmethod
    def _once(run: Callable[[], Any]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def median(self, name: str) -> float:
        """Milliseconds."""
        return 1e3 * float(np.median(self.times[name]))


def starts(side: int) -> Array:
    """Covariances of trace one on a grid of the disc, shape (count, 2, 2); 40 a side in the figure."""
    u, w = (g.ravel() for g in np.meshgrid(*[np.linspace(-1, 1, side)] * 2, indexing="ij"))
    inside = 1 - u**2 > w**2
    u, w = u[inside], w[inside]
    return np.stack([np.stack([(1 + u) / 2, w / 2], -1), np.stack([w / 2, (1 - u) / 2], -1)], -2)


def published(cov: Array, V: Array, step: float = 0.01, most: float = 1e3, max_iter: int = 50_000) -> float:
    """The published scheme on one start: an Euler step, a projection, until the trace exceeds `most`; the time at which it stops."""
    A = KEYS.T @ QUERIES * SCALE
    for i in range(max_iter):
        half = V @ cov @ A @ cov
        change = half + half.T
        cov = cov + step * change
        values, vectors = np.linalg.eigh(cov)
        cov = vectors @ np.diag(np.where(values < 0, 1e-14, values)) @ vectors.T
        if np.linalg.norm(change) < 1e-5 or np.trace(cov) > most:
            return step * i
    return np.nan


def host_blow_up(cov: Array, V: Array, rtol: float = 1e-8) -> float:
    """SciPy on the factor equation of one start until the trace is 1e9, and the time that a trace of blow-up rate has left there."""
    A = KEYS.T @ QUERIES * SCALE

    def field(t: float, y: Array) -> Array:
        L = y.reshape(2, 2)
        return (V @ L @ (L.T @ A @ L)).ravel()

    def large(t: float, y: Array) -> float:
        return float(y @ y) - 1e9

    large.terminal = True
    found = solve_ivp(field, (0.0, 100.0), np.linalg.cholesky(cov).ravel(), "DOP853", rtol=rtol, atol=rtol / 100, events=large)
    y = found.y[:, -1]
    return float(found.t[-1] + (y @ y) / (2 * y @ field(0.0, y)))


def sweep(side: int, rounds: int, sample: int) -> list[dict[str, Any]]:
    """Blow-up times of all starts, one row per way to get them."""
    covs, V = starts(side), np.eye(2)
    state, count = tp.Gaussian(np.zeros((len(covs), 2)), covs), len(covs)
    scalar = tp.GaussianFlow(tp.Softmax(QUERIES, KEYS, 1.0, scale=SCALE))
    matrix = tp.GaussianFlow(tp.Softmax(QUERIES, KEYS, V, scale=SCALE))
    flow = tp.Desingularized(matrix.attention)
    roots = np.linalg.cholesky(covs)
    form = np.swapaxes(roots, 1, 2) @ ((KEYS.T @ QUERIES + QUERIES.T @ KEYS) * SCALE) @ roots
    exact = 1 / np.linalg.eigvalsh(form)[:, -1]
    few = covs[np.linspace(0, count - 1, sample).astype(int)]

    def follow(end: float, rtol: float, solver: Any) -> Any:
        """A run to `end` in the clock that never ends; without an end, every lane runs until its time is certain."""
        times = np.array([0.0, end])
        return tl.integrate(flow, state, times, rtol=rtol, atol=rtol, solver=solver, runs=count, max_steps=2000, throw=False)

    def compiled_euler() -> Array:
        sol = tl.iterate(matrix.attention, tp.OfficialEuler(0.01), state, steps=50_000, runs=count, stop=tl.Above("trace", 1e3), keep="last")
        return 0.01 * (np.asarray(sol.steps) - 1)

    race = Race()
    race.add("closed form (V a number)", lambda: np.asarray(tp.blow_up_time(scalar, state)))
    race.add("blow_up_time (V a matrix)", lambda: np.asarray(tp.blow_up_time(matrix, state)))
    race.add("integrate, Dopri8 1e-6, until certain", lambda: np.asarray(follow(1000.0, 1e-6, EIGHTH).value.time[-1]))
    race.add("integrate, Dopri8 1e-6, clock to 8", lambda: follow(8.0, 1e-6, EIGHTH).history["blow_up_time"][-1])
    race.add("integrate, Tsit5 3e-7, clock to 8", lambda: follow(8.0, 3e-7, diffrax.Tsit5()).history["blow_up_time"][-1])
    race.add("published scheme, compiled: iterate, OfficialEuler", compiled_euler, most=5)
    race.add("published scheme, NumPy", lambda: np.array([published(cov, V) for cov in covs]), most=3)
    race.add(f"SciPy DOP853 with an event ({len(few)} starts, scaled)", lambda: np.array([host_blow_up(cov, V) for cov in few]), most=3,
             part=len(few) / count)
    race.go(rounds)
    slow = race.median("published scheme, NumPy")
    table = []
    for name, value in race.value.items():
        truth = exact if len(value) == count else exact[np.linspace(0, count - 1, sample).astype(int)]
        table.append({"row": name, "max error": float(np.abs(value / truth - 1).max()), "median error": float(np.median(np.abs(value / truth - 1))),
                      "first call (CPU-s)": race.first[name], "median (ms)": race.median(name), "published / row": slow / race.median(name)})
    return table


def bare(solver: Any, adjoint: Any, controller: dict[str, Any]) -> Callable:
    """A jitted `diffeqsolve` with nothing around it."""

    @jax.jit
    def run(flow: Any, y0: Any, end: Any, rtol: Any) -> Any:
        control = diffrax.PIDController(rtol=rtol, atol=rtol / 100, **controller)
        return diffrax.diffeqsolve(diffrax.ODETerm(lambda t, y, flow: flow.field(t, y)), solver, 0.0, end, None, y0, flow,
                                   stepsize_controller=control, adjoint=adjoint, throw=False).ys

    return run


def projected_euler(A: Array, end: float, steps: int) -> Array:
    """The published scheme with V = I from the identity."""
    cov, h = np.eye(DIM), end / steps
    for _ in range(steps):
        half = cov @ A @ cov
        cov = cov + h * (half + half.T)
        values, vectors = np.linalg.eigh(cov)
        cov = vectors @ np.diag(np.where(values < 0, 1e-14, values)) @ vectors.T
    return cov


def trajectory(rounds: int, ladder: list[float], steps: tuple[int, ...], seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row per solver and tolerance; and for `integrate` the fastest bare call of at least its accuracy."""
    Q, K = np.random.default_rng(seed).standard_normal((2, DIM, DIM)) / DIM**0.5
    scalar, start = tp.GaussianFlow(tp.Softmax(Q, K, 1.0)), tp.Gaussian.standard(DIM)
    flow = tp.GaussianFlow(tp.Softmax(Q, K, np.eye(DIM)))
    other = tp.GaussianFlow(flow.attention, form="covariance")
    end = NEAR * float(tp.blow_up_time(scalar, start))
    times, form = np.array([0.0, end]), K.T @ Q + Q.T @ K
    exact = np.linalg.inv(np.eye(DIM) - end * form)

    def ours(flow: Any, rtol: float) -> Array:
        value = tl.integrate(flow, start, times, rtol=rtol, atol=rtol / 100, solver=EIGHTH).value
        return np.asarray(value.factor)[-1] if flow.form == "factor" else np.asarray(value.cov)[-1]

    def host(t: float, y: Array) -> Array:
        L = y.reshape(DIM, DIM)
        return (L @ ((K @ L).T @ (Q @ L))).ravel()

    def scipy(method: str, rtol: float) -> Array:
        return solve_ivp(host, (0.0, end), np.eye(DIM).ravel(), method, rtol=rtol, atol=rtol / 100, t_eval=[end]).y[:, -1].reshape(DIM, DIM)

    compiled = {}
    for solver in (diffrax.Tsit5(), EIGHTH):
        for controller, about in (({}, ""), ({"pcoeff": P_COEFFICIENT, "icoeff": I_COEFFICIENT}, ", PI")):
            for adjoint, name in ((diffrax.RecursiveCheckpointAdjoint(), ""), (diffrax.ForwardMode(), ", forward")):
                compiled[f"diffrax {type(solver).__name__}{about}{name}"] = bare(solver, adjoint, controller)
    tasks: dict[tuple[str, float | None], Callable[[], Array]] = {}
    main: set[tuple[str, float | None]] = set()
    for rtol in dict.fromkeys([1e-6, 1e-10, *ladder]):
        listed = rtol in (1e-6, 1e-10)
        if listed:
            tasks["integrate, factor form", rtol] = lambda rtol=rtol: ours(flow, rtol)
            tasks["integrate, covariance form", rtol] = lambda rtol=rtol: ours(other, rtol)
            for method in ("DOP853", "RK45", "LSODA", "Radau"):
                tasks[f"SciPy {method}", rtol] = lambda rtol=rtol, method=method: scipy(method, rtol)
        for name, run in compiled.items():
            tasks[name, rtol] = lambda rtol=rtol, run=run: np.asarray(run(flow, start, end, rtol).factor)[-1]
            if listed and ("forward" in name or "PI" in name):
                continue
            main.update({(name, rtol)} if listed else ())
    for count in steps:
        tasks[f"published scheme, NumPy, {count} steps", None] = lambda count=count: projected_euler(K.T @ Q, end, count)
    tasks["closed_form", None] = lambda: np.asarray(tp.closed_form(scalar, start, times[1:]).factor)[0]
    formula = jax.jit(tp.closed_form)
    tasks["closed_form, inside jit", None] = lambda: np.asarray(formula(scalar, start, times[1:]).factor)[0]

    race = Race()
    for task, run in tasks.items():
        slow = "NumPy" in task[0] or "Radau" in task[0]
        race.add(f"{task[0]}|{task[1]}", run, most=min(rounds, 3) if slow else rounds)
    race.go(rounds)

    def error(task: tuple[str, float | None]) -> float:
        value = race.value[f"{task[0]}|{task[1]}"]
        cov = value if "covariance" in task[0] or "NumPy" in task[0] else value @ value.T
        return float(np.linalg.norm(cov - exact) / np.linalg.norm(exact))

    rows, equal, seen = [], [], set()
    for task in sorted(tasks, key=lambda t: list(dict.fromkeys(name for name, _ in tasks)).index(t[0])):
        if task[0].startswith("diffrax") and task not in main:
            continue
        first = None if task[0] in seen else race.first[f"{task[0]}|{task[1]}"]                     # a new tolerance compiles nothing
        seen.add(task[0])
        rows.append({"row": task[0], "rtol": task[1], "error": error(task), "first call (CPU-s)": first,
                     "median (ms)": race.median(f"{task[0]}|{task[1]}")})
    for rtol in (1e-6, 1e-10):
        mine, reached = ("integrate, factor form", rtol), error(("integrate, factor form", rtol))
        rivals = [t for t in tasks if t[0].startswith("diffrax") and error(t) <= reached]
        best = min(rivals, key=lambda t: race.median(f"{t[0]}|{t[1]}"))
        took, least = race.median(f"{mine[0]}|{rtol}"), race.median(f"{best[0]}|{best[1]}")
        equal.append({"integrate, rtol": rtol, "error": reached, "median (ms)": took, "best bare call": best[0], "its rtol": best[1],
                      "its error": error(best), "its median (ms)": least, "ratio": took / least})
    return rows, equal


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables; `--json` for machines, `--markdown` for the documentation."""
    parser = report.parser(__doc__, "fewer starts, rounds and tolerances")
    parser.add_argument("--rounds", type=int, help="timed rounds of interleaved calls (default 21; 3 with --quick)")
    options = parser.parse_args(argv)
    rounds = options.rounds or (3 if options.quick else 21)
    ladder = [1e-6, 1e-10] if options.quick else [10.0 ** (-k / 2) for k in range(8, 25)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        starting = sweep(10 if options.quick else 40, rounds, 4 if options.quick else 24)
    rows, equal = trajectory(rounds, ladder, (1000,) if options.quick else (1000, 10_000))
    sizes = f"Blow-up times of {len(starts(10 if options.quick else 40))} starts"
    report.show({sizes: starting, f"One trajectory to {NEAR} of its blow-up time": rows, "At equal error": equal}, options, rounds=rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
