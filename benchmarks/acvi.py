"""Equilibria: operator evaluations and seconds of the ACVI family beside first-order methods, interior points and linear programming.

Games: standard normal payments, N x N. A gap is that of the repaired, feasible point, looked at every tenth step; those looks are in the seconds
and not in the evaluations. An evaluation is the pair (A z, A'x) or what costs the same, so an exact x-step of ACVI counts 2; of InteriorPoint, which
factors a matrix of 2N + 2 rows each time, steps are counted. Every first-order method has one scalar (a step size, a penalty, a primal weight, in
units of the norm of the game): of five values the one with the least evaluations to a gap of 1e-3 on other games (seeds 0 to 3, all of N = 50) is
taken for all sizes. Rows with a dash for the scalar take what the class takes by default. Numbers are geometric means over the games, and blank
unless every game got there within the limit. Seconds are wall time of a whole call without compilation: factorizations, norms and the driver are in
it. A linear program stops at its own tolerance: its seconds stand in every column that its gap satisfies.

Batches: games of one size; ours in one compiled call, the linear programs one after another (a sample, scaled).
Sparse: a game with ten payments a row, its matrix never formed; the smallest gap after so many seconds. Of so many rows some have no positive
payment, of the columns some no negative one: the value is 0 and there are pure equilibria, which a presolver may find.
x-step: one product with the precomputed resolvent, per step of ACVI, beside a bare product with such a matrix.
HBG: the bilinear game of the papers with its published settings; every projection and prox exact. Published seconds are those stored with the
notebooks, whose clock measures a generic solver for projections and proxes.

    python benchmarks/acvi.py [--quick] [--only games batches sparse xstep hbg] [--json | --markdown]
"""

from __future__ import annotations

import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack

import theorylab as tl
from theorylab import acvi
from theorylab.errors import RunWarning
from theorylab.lab.files import load_module

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))

Array = np.ndarray
Rows = list[dict[str, Any]]
LEVELS = (1e-3, 1e-6, 1e-9)
LOOK = 10  # steps between looks at the gap
TUNING = range(4)
FRESH = (200, 201, 202)
PUBLISHED = {"EG": 657, "OGDA": 329, "LA5": 627, "ACVI": 141}  # seconds to a relative error of 5e-4, as stored with the notebooks


def norm(A: Array) -> float:
    """Norm of the double-centred payments, the Lipschitz constant of F on the strategies."""
    return float(np.linalg.norm(A - A.mean(0) - A.mean(1, keepdims=True) + A.mean(), 2))


def payments(size: int, seed: int) -> Array:
    """Standard normal payments."""
    return np.random.default_rng(seed).standard_normal((size, size))


# name, method of (scalar, norm, largest payment), values of the scalar
FIRST_ORDER: tuple[tuple[str, Callable[[Any, float, float], Any], tuple[float, ...]], ...] = (
    ("HalpernACVI, penalty c L", lambda c, L, _: acvi.HalpernACVI(c * L), (0.1, 0.3, 1.0, 3.0, 10.0)),
    ("HalpernACVI", lambda c, L, _: acvi.HalpernACVI(), ()),
    ("ProjectedACVI, penalty c L", lambda c, L, _: acvi.ProjectedACVI(c * L), (0.03, 0.1, 0.3, 1.0, 3.0)),
    ("Extragradient, step c / L", lambda c, L, _: acvi.Extragradient(c / L), (0.5, 0.7, 0.9, 0.95, 0.99)),
    ("Popov, step c / L", lambda c, L, _: acvi.Popov(c / L), (0.2, 0.3, 0.4, 0.45, 0.49)),
    ("MirrorProx, step c / max|A|", lambda c, _, m: acvi.MirrorProx(c / m), (0.5, 1.0, 2.0, 4.0, 8.0)),
    ("PDHG, weight c", lambda c, *_: acvi.PrimalDualHybridGradient("none", c), (0.1, 0.3, 1.0, 3.0, 10.0)),
    ("PDHG averaged, weight c", lambda c, *_: acvi.PrimalDualHybridGradient("average", c), (0.1, 0.3, 1.0, 3.0, 10.0)),
    ("PDHG halpern, weight c", lambda c, *_: acvi.PrimalDualHybridGradient("halpern", c), (0.1, 0.3, 1.0, 3.0, 10.0)),
    ("PDHG halpern (tl.solve)", lambda c, *_: acvi.PrimalDualHybridGradient("halpern"), ()),
)


def to_gap(A: Array, method: Any, level: float, steps: int, seconds: float, every: int = LOOK, keep: Any = "all") -> Any:
    """A run until the gap is below the level."""
    return tl.iterate(acvi.MatrixGame(A), method, steps=steps, every=every, stop=tl.Below("gap", level), seconds=seconds, keep=keep, throw=False)


def work(sol: Any, level: float, column: str = "operator_evaluations") -> float:
    """What had been counted when the gap was first at most the level; infinite if never."""
    good = np.flatnonzero(np.asarray(sol.history["gap"]) <= level)
    return float(np.asarray(sol.history.axis(column))[good[0]]) if len(good) else np.inf


def tuned(make: Callable, values: Sequence[float], games: Sequence[Array], steps: int) -> float:
    """The value with the least evaluations to a gap of 1e-3, a run that does not get there counting as twice the limit."""
    costs = []
    for c in values:
        spent = [work(to_gap(A, make(c, norm(A), np.abs(A).max()), 1e-3, steps, 60.0), 1e-3) for A in games]
        costs.append(np.mean(np.log(np.minimum(spent, 4.0 * steps))))
    return values[int(np.argmin(costs))]


def mean(values: Sequence[float]) -> float | None:
    """The geometric mean; None if an entry is infinite."""
    return float(np.exp(np.mean(np.log(values)))) if len(values) and np.all(np.isfinite(values)) else None


def timed(call: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of some calls."""
    taken = []
    for _ in range(rounds):
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


def games(sizes: Sequence[int], tuning: Sequence[int], fresh: Sequence[int], steps: int, limit: float, rounds: int) -> Rows:
    """Work and time to three gaps."""
    scalars = {name: tuned(make, values, [payments(50, s) for s in tuning], 5000) if values else None for name, make, values in FIRST_ORDER}
    table = []
    for size in sizes:
        matrices = [payments(size, seed) for seed in fresh]
        for name, make, _ in FIRST_ORDER:
            row: dict[str, Any] = {"N": size, "row": name, "c": "-" if scalars[name] is None else f"{scalars[name]:g}"}
            methods = [make(scalars[name], norm(A), np.abs(A).max()) for A in matrices]
            table.append(row | reached(matrices, methods, steps, limit, rounds, "operator_evaluations", LOOK))
        row = {"N": size, "row": "InteriorPoint (steps)", "c": "-"}
        table.append(row | reached(matrices, [acvi.InteriorPoint()] * len(matrices), 60, limit, rounds, "step", 1))
        for name, solve in outside()[0].items():
            gaps, seconds = [], []
            for A in matrices:
                seconds.append(timed(lambda A=A, solve=solve: solve(A), rounds))
                gaps.append(saddle(A, *solve(A)))
            took = {f"s to {level:.0e}": mean(seconds) if max(gaps) <= level else None for level in LEVELS}
            table.append({"N": size, "row": name, "c": "-", **{f"to {level:.0e}": None for level in LEVELS}, **took, "worst gap": max(gaps)})
    return table


def reached(matrices: Sequence[Array], methods: Sequence[Any], steps: int, limit: float, rounds: int, column: str, every: int) -> dict[str, Any]:
    """The work and the seconds of each level, and the largest of the last gaps."""
    runs = [to_gap(A, m, LEVELS[-1], steps, limit, every) for A, m in zip(matrices, methods, strict=True)]
    cells: dict[str, Any] = {f"to {level:.0e}": mean([work(sol, level, column) for sol in runs]) for level in LEVELS}
    for level in LEVELS:
        seconds = []
        if cells[f"to {level:.0e}"] is not None:
            for A, m in zip(matrices, methods, strict=True):
                call = lambda A=A, m=m, level=level: to_gap(A, m, level, steps, np.inf, every, "last").value
                call()
                seconds.append(timed(call, rounds))
        cells[f"s to {level:.0e}"] = mean(seconds)
    return cells | {"worst gap": max(float(sol.history.last("gap")) for sol in runs)}


def batches(count: int, sizes: Sequence[int], sample: int, rounds: int) -> Rows:
    """Many small games: one compiled call against a loop."""

    def many(method: Any, steps: int, level: float, every: int) -> Callable[[Array], Any]:
        def one(A: Any) -> Any:
            game = acvi.MatrixGame(A)
            sol = tl.iterate(game, method, steps=steps, every=every, stop=tl.Below("gap", level), keep="last")
            return acvi.certificate(game, sol.value).bound, sol.value

        return jax.jit(jax.vmap(one))

    table = []
    for size in sizes:
        As = np.random.default_rng(0).standard_normal((count, size, size))
        halpern = many(acvi.PrimalDualHybridGradient("halpern"), 5000, 1e-6, 10)
        for name, run in (("InteriorPoint to 1e-10, vmap", many(acvi.InteriorPoint(), 40, 1e-10, 1)), ("PDHG halpern to 1e-6, vmap", halpern)):
            began = time.process_time()
            gaps = np.asarray(run(As)[0])
            first = time.process_time() - began
            took = 1e3 * timed(lambda run=run, As=As: run(As)[0], rounds) / count
            table.append({"n": size, "row": name, "games": count, "first call (CPU-s)": first, "ms per game": took, "games per second": 1e3 / took,
                          "median gap": float(np.median(gaps)), "worst gap": float(gaps.max())})
        for name, solve in outside()[0].items():
            few = As[:sample]
            taken = timed(lambda few=few, solve=solve: [solve(A) for A in few] and None, rounds)
            gaps, took = [saddle(A, *solve(A)) for A in few], 1e3 * taken / sample
            table.append({"n": size, "row": f"{name}, looped", "games": sample, "first call (CPU-s)": None, "ms per game": took,
                          "games per second": 1e3 / took, "median gap": float(np.median(gaps)), "worst gap": max(gaps)})
    return table


def sparse(size: int, marks: Sequence[float], limit: float) -> Rows:
    """The smallest gap that was seen after so many seconds."""
    game = acvi.sparse_game(size, key=0)
    point = jnp.asarray(game.equality.point)
    force = game.operator(point)
    z = game.equality.null(jax.random.normal(jax.random.key(1), point.shape))
    for _ in range(60):  # F is skew on the strategies, so its norm is that of its square's root
        z = game.equality.null(game.operator(point + z / jnp.linalg.norm(z)) - force)
    L = float(jnp.linalg.norm(z))
    methods = {"HalpernACVI, cg": acvi.HalpernACVI(10 * L, linear="cg"), "Extragradient, step 0.9 / L": acvi.Extragradient(0.9 / L),
               "Popov, step 0.45 / L": acvi.Popov(0.45 / L), "GoldenRatio": acvi.GoldenRatio(0.1 / L)}
    table = []
    for name, method in methods.items():
        stop = tl.Below("gap", 1e-9)
        tl.iterate(game, method, steps=0, every=LOOK, stop=stop, throw=False)                      # compiles
        sol = tl.iterate(game, method, steps=10**6, every=LOOK, stop=stop, seconds=marks[-1], throw=False)
        clock, gap = np.asarray(sol.history.axis("seconds")), np.asarray(sol.history["gap"])
        row = {"N": size, "row": name, "steps": int(sol.steps), "evaluations": float(sol.history.last("operator_evaluations"))}
        table.append(row | {f"gap at {mark:g} s": float(gap[clock <= mark].min()) for mark in marks} | {"end": sol.status.name})
    values, columns = (np.asarray(a) for a in game.args)
    A = csr_array((values.ravel(), (np.repeat(np.arange(size), values.shape[1]), columns.ravel())), shape=(size, size))
    began = time.perf_counter()
    found = highs(A, "highs-ipm", limit)
    end = f"gap {saddle(A, *found):.1e}" if found else "no solution"
    row = {"N": size, "row": "HiGHS interior point (SciPy)", **dict.fromkeys(list(table[0])[2:])}
    return [*table, row | {"end": f"{end} after {time.perf_counter() - began:.3g} s"}]


def xstep(sizes: Sequence[int], flops: float, rounds: int) -> Rows:
    """Bytes of the precomputed resolvent per second, and those of a bare product."""

    def bare(R: Any, v: Any, count: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, v: R @ v, v)

    def steps(game: Any, method: Any, state: Any, count: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, s: method.step(game, s, key=jax.random.key(0)), state).y

    table, product, several = [], jax.jit(bare), jax.jit(steps)
    for n in sizes:
        game, count, size = acvi.bilinear_simplex(dim=n // 2), int(flops / (2 * n * n)), 8e-9 * n * n
        row: dict[str, Any] = {"n": n}
        for linear in ("dense", "blocks"):
            method = acvi.ACVI(0.5, 1e-6, linear=linear)
            row[f"{linear} setup (ms)"] = 1e3 * timed(lambda game=game, m=method: m.prepare(game).solver, rounds + 1)
            ready = method.prepare(game)
            given = (game, ready, ready.init(game, game.x0, key=jax.random.key(0)), count)
            row[f"{linear} step (ms)"] = 1e3 * timed(lambda given=given: several(*given), rounds + 1) / count
        R, v = jnp.eye(n), jnp.ones(n)
        row["bare product (ms)"] = 1e3 * timed(lambda R=R, v=v, count=count: product(R, v, count), rounds + 1) / count
        table.append(row | {"dense (GB/s)": 1e3 * size / row["dense step (ms)"], "bare (GB/s)": 1e3 * size / row["bare product (ms)"]})
    return table


def hbg(rounds: int) -> tuple[Rows, Rows]:
    """Steps to a relative error of 0.02 at five rotations (step 0.3), and the way to 5e-4 at curvature 0.05 (step 0.1)."""
    halves = np.random.RandomState(0).rand(1000).reshape(2, 500)
    x0 = (halves / halves.sum(1, keepdims=True)).ravel()
    inexact = acvi.MuSchedule(1e-6, 0.8, stages=100, inner_steps=10)
    exact = acvi.ACVI(0.5, acvi.MuSchedule(1e-6, 0.5, stages=10, inner_steps=1), output="x")
    one = {"ACVI": exact, "I-ACVI": acvi.InexactACVI(0.5, inexact, inner=acvi.GradientDescentAscent(0.05), barrier_steps=10, output="x")}

    def methods(step: float) -> dict[str, Any]:
        return {"GDA": acvi.GradientDescentAscent(step), "EG": acvi.Extragradient(step), "OGDA": acvi.OptimisticGradient(step),
                "LA5": acvi.Lookahead(step, 5), **one}

    rotation: Rows = []
    for name, method in methods(0.3).items():
        row: dict[str, Any] = {"row": name}
        for eta in np.linspace(0.01, 0.99, 5):
            sol = tl.iterate(acvi.bilinear_simplex(500, float(eta), x0=x0), method, steps=500, stop=tl.Below("error", 0.02), throw=False)
            row[f"curvature {eta:g}"] = int(sol.steps) * {"EG": 2, "LA5": 5}.get(name, 1) if sol.status.good else None
        rotation.append(row)
    game, path, marks = acvi.bilinear_simplex(500, 0.05, x0=x0), [], (0.5, 0.1, 0.05, 0.01, 0.001, 0.0005)
    for name, method in methods(0.1).items():
        sol = tl.iterate(game, method, steps=1500, stop=tl.Below("error", marks[-1]), throw=False)
        error = np.asarray(sol.history["error"])
        steps = [int(np.argmax(error <= m)) if (error <= m).any() else None for m in marks]
        taken = None
        if steps[-1] is not None:
            count = steps[-1]
            taken = 1e3 * timed(lambda m=method, k=count: tl.iterate(game, m, steps=k, every=k, keep="last").value, rounds + 1)
        path.append({"row": name, **dict(zip((f"steps to {m:g}" for m in marks), steps, strict=True)),
                     "evaluations": float(sol.history.last("operator_evaluations")), "ms": taken, "published (s)": PUBLISHED.get(name)})
    return rotation, path


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables; `--json` for machines, `--markdown` for the documentation."""
    parts = ("games", "batches", "sparse", "xstep", "hbg")
    parser = report.parser(__doc__, "smaller games, fewer rounds, short limits")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="some of the tables")
    parser.add_argument("--sizes", nargs="+", type=int, default=(50, 200, 500), help="of the games (default 50 200 500)")
    options = parser.parse_args(argv)
    quick, tables = options.quick, {}
    rounds = 1 if quick else 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        if "games" in options.only:
            tables["Gaussian games"] = (games((50,), TUNING[:1], FRESH[:1], 20_000, 5.0, rounds) if quick
                                        else games(tuple(options.sizes), TUNING, FRESH, 500_000, 60.0, rounds))
        if "batches" in options.only:
            tables["Batches of games"] = batches(200, (10,), 20, rounds) if quick else batches(1000, (10, 30), 200, rounds)
        if "sparse" in options.only:
            tables["A sparse game"] = sparse(2000, (1.0, 3.0), 10.0) if quick else sparse(20_000, (3.0, 10.0, 30.0, 60.0), 300.0)
        if "xstep" in options.only:
            tables["One x-step"] = xstep((500,) if quick else (500, 1000, 2000, 4000), 1e8 if quick else 2e9, rounds)
        if "hbg" in options.only:
            rotation, path = hbg(rounds)
            tables["Steps to a relative error of 0.02, by rotation (published counting: EG 2, LA5 5 a step)"] = rotation
            tables["Curvature 0.05: steps to a relative error"] = path
    report.show(tables, options, **{"left out": "; ".join(outside()[1]) or "nothing"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
