"""Equilibria: operator evaluations and seconds of the ACVI family beside first-order methods, interior points and linear programming.

Games: standard normal payments, N x N. A gap is that of the repaired, feasible point, looked at every tenth step; those looks are in the seconds
and not in the evaluations. An evaluation is the pair (A z, A'x) or what costs the same, so an exact x-step of ACVI counts 2; of InteriorPoint, which
factors a matrix each time, steps are counted. Every first-order method has one scalar (a step size, a penalty, a primal weight, in units of the norm
of the game): of five values the one with the least evaluations to a gap of 1e-3 on other games (seeds 0 to 3, all of N = 50) is taken for all sizes.
Rows with a dash for the scalar take what the class takes by default. Numbers are geometric means over the games, and blank unless every game got
there within the limit. Seconds are wall time of a whole call without compilation: factorizations, norms and the driver are in it. A linear program
stops at its own tolerance: its seconds stand in every column that its gap satisfies.

Monotone: problems that are no matrix games, on bounded sets where the gap is a certificate; the same rule for the one scalar, on other seeds.
Batches: games of one size; ours in one compiled call, the linear programs one after another (a sample, scaled).
Sparse: a game with ten payments a row, its matrix never formed; the smallest gap after so many seconds. Of so many rows some have no positive
payment, of the columns some no negative one: the value is 0 and there are pure equilibria, which a presolver may find.
Sparse x-step: a flow on a path or a grid with a sparse M; one factorization kept, and Krylov products.
x-step: one product with the precomputed resolvent, per step of ACVI, beside a bare product with such a matrix.
HBG: the bilinear game of the papers with its published settings; every projection and prox exact. Published seconds are those stored with the
notebooks, whose clock measures a generic solver for projections and proxes.

Each table is printed when it is finished, with where and when it was taken.

    python benchmarks/acvi.py [--quick] [--only games monotone batches sparse lu xstep hbg] [--sizes 50 200 500] [--json | --markdown]
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_array

import theorylab as tl
from theorylab import acvi
from theorylab.acvi.resolvent import operator_norm
from theorylab.errors import RunWarning
from theorylab.lab.files import load_module

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))

shared: ModuleType = load_module(Path(__file__).with_name("_acvi.py"))
norm, payments, saddle, timed, mean, work = shared.norm, shared.payments, shared.saddle, shared.timed, shared.mean, shared.work
LEVELS, LOOK, highs, outside, reached, tuned = shared.LEVELS, shared.LOOK, shared.highs, shared.outside, shared.reached, shared.tuned

Array = np.ndarray
Rows = list[dict[str, Any]]
TUNING = range(4)
FRESH = (200, 201, 202)
PUBLISHED = {"EG": 657, "OGDA": 329, "LA5": 627, "ACVI": 141}  # seconds to a relative error of 5e-4, as stored with the notebooks


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
    ("PDHG halpern", lambda c, *_: acvi.PrimalDualHybridGradient("halpern"), ()),
)


Size = tuple[float, float]


def sized(A: Array) -> tuple[Any, Size]:
    """The game, its norm and its largest payment."""
    return acvi.MatrixGame(A), (norm(A), float(np.abs(A).max()))


def scalars(tuning: Sequence[int], steps: int) -> dict[str, float | None]:
    """The tuned scalar of each first-order method, on games of N = 50."""
    problems = [sized(payments(50, seed)) for seed in tuning]
    return {name: tuned(lambda c, about, make=make: make(c, *about), values, problems, steps) for name, make, values in FIRST_ORDER}


def games(size: int, chosen: dict[str, float | None], fresh: Sequence[int], steps: int, limit: float, rounds: int) -> Rows:
    """Work and time to three gaps."""
    matrices = [payments(size, seed) for seed in fresh]
    problems = [sized(A) for A in matrices]
    default = type(problems[0][0].default_method()).__name__
    table: Rows = []
    row: dict[str, Any]
    for name, make, _ in FIRST_ORDER:
        row = {"row": name, "c": "-" if chosen[name] is None else f"{chosen[name]:g}"}
        methods = [make(chosen[name], *about) for _, about in problems]
        table.append(row | reached([game for game, _ in problems], methods, steps, limit, rounds))
    table.append({"row": "InteriorPoint (steps)", "c": "-"}
                 | reached([game for game, _ in problems], [acvi.InteriorPoint()] * len(problems), 60, limit, rounds, "step", 1))
    row = {"row": f"tl.solve ({default})", "c": "-"}
    for level in LEVELS:
        sols = [tl.solve(game, tolerance=level) for game, _ in problems]
        row[f"to {level:.0e}"] = mean([float(sol.history.last("operator_evaluations")) for sol in sols])
        row[f"s to {level:.0e}"] = mean([timed(lambda game=game, level=level: tl.solve(game, tolerance=level).value, rounds) for game, _ in problems])
        row["worst gap"] = max(float(sol.history.last("gap")) for sol in sols)
    table.append(row)
    for name, solve in outside()[0].items():
        gaps, seconds = [], []
        solve(np.eye(3))                                                               # imports
        for A in matrices:
            seconds.append(timed(lambda A=A, solve=solve: solve(A), rounds))
            gaps.append(saddle(A, *solve(A)))
        took = {f"s to {level:.0e}": mean(seconds) if max(gaps) <= level else None for level in LEVELS}
        table.append({"row": name, "c": "-", **{f"to {level:.0e}": None for level in LEVELS}, **took, "worst gap": max(gaps)})
    return table


def _bent(x: Any, args: Any) -> Any:
    M, q, scale = args
    return M @ x + q + scale * x**3


def monotone_problem(kind: str, size: int, seed: int) -> tuple[Any, float]:
    """A problem that is no matrix game, and a bound of the Lipschitz constant of its operator."""
    rng, n = np.random.default_rng(seed), 2 * size
    R, S = rng.standard_normal((n, n // 4)) / n**0.5, rng.standard_normal((n, n)) / n**0.5
    M, q = 0.1 * R @ R.T + S - S.T, rng.standard_normal(n)
    M, q = (M * n**0.5, 0.1 * q) if "simplices" in kind else (M, q)            # so that neither decides alone
    length = float(np.linalg.norm(M, 2))
    if kind == "affine, two simplices":
        return acvi.AffineVariationalInequality(M, q, acvi.Nonnegative(), acvi.BlockSimplex((size, size))), length
    if kind == "affine, box":
        return acvi.AffineVariationalInequality(M, q, acvi.Box(-1.0, 1.0)), length
    if kind == "cubic, box":
        return acvi.VariationalInequality(_bent, n, (M, q, np.asarray(1.0)), acvi.Box(-1.0, 1.0)), length + 3.0
    return acvi.VariationalInequality(_bent, n, (M, q, np.asarray(100.0)), acvi.Ball(0.0, 0.7)), length + 150.0


MONOTONE: tuple[tuple[str, Callable[[Any, float], Any], tuple[float, ...]], ...] = (
    ("tl.solve", lambda c, L: acvi.HalpernACVI(), ()),
    ("HalpernACVI, penalty c L", lambda c, L: acvi.HalpernACVI(c * L), (0.03, 0.1, 0.3, 1.0, 3.0)),
    ("ProjectedACVI, penalty c L", lambda c, L: acvi.ProjectedACVI(c * L), (0.03, 0.1, 0.3, 1.0, 3.0)),
    ("InexactProjectedACVI, penalty c L", lambda c, L: acvi.InexactProjectedACVI(c * L, inner_steps=5), (0.03, 0.1, 0.3, 1.0, 3.0)),
    ("Extragradient, step c / L", lambda c, L: acvi.Extragradient(c / L), (0.5, 0.7, 0.9, 0.95, 0.99)),
    ("Popov, step c / L", lambda c, L: acvi.Popov(c / L), (0.2, 0.3, 0.4, 0.45, 0.49)),
    ("OptimisticGradient, step c / L", lambda c, L: acvi.OptimisticGradient(c / L), (0.2, 0.3, 0.4, 0.45, 0.49)),
    ("GoldenRatio, first step c / L", lambda c, L: acvi.GoldenRatio(c / L), (0.01, 0.1, 1.0)),
)


def monotone(kind: str, size: int, tuning: Sequence[int], fresh: Sequence[int], steps: int, limit: float, rounds: int) -> Rows:
    """Work and time to three gaps on one kind of problem."""
    table, trials, problems = [], [monotone_problem(kind, size, s) for s in tuning], [monotone_problem(kind, size, s) for s in fresh]
    for name, make, values in MONOTONE:
        c = tuned(make, values, trials, 2000)
        cells = reached([p for p, _ in problems], [make(c, length) for _, length in problems], steps, limit, rounds)
        table.append({"row": name, "c": "-" if c is None else f"{c:g}"} | cells)
    if kind == "affine, two simplices":
        table.append({"row": "InteriorPoint (steps)", "c": "-"}
                     | reached([p for p, _ in problems], [acvi.InteriorPoint()] * len(problems), 60, limit, rounds, "step", 1))
    return table


def batches(count: int, sizes: Sequence[int], sample: int, rounds: int) -> Rows:
    """Many small games: one compiled call against a loop."""

    def many(method: Any, steps: int, level: float, every: int) -> Callable[[Array], Any]:
        def one(A: Any) -> Any:
            game = acvi.MatrixGame(A)
            sol = tl.iterate(game, method, steps=steps, every=every, stop=tl.Below("gap", level), keep="last")
            return acvi.certificate(game, sol.value).bound, sol.value

        return jax.jit(jax.vmap(one))

    def one(A: Any) -> Any:
        game = acvi.MatrixGame(A)
        sol = tl.solve(game, tolerance=1e-6, steps=5000, keep="last")
        return acvi.certificate(game, sol.value).bound, sol.value

    table, solved = [], jax.jit(jax.vmap(one))
    for size in sizes:
        As = np.random.default_rng(0).standard_normal((count, size, size))
        halpern = many(acvi.PrimalDualHybridGradient("halpern"), 5000, 1e-6, 10)
        for name, run in (("tl.solve to 1e-6, vmap", solved), ("InteriorPoint to 1e-10, vmap", many(acvi.InteriorPoint(), 40, 1e-10, 1)),
                          ("PDHG halpern to 1e-6, vmap", halpern)):
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
    L = float(operator_norm(game))
    default = game.default_method()
    runs = [(f"tl.solve ({type(default).__name__})", game, default), ("HalpernACVI, cg", game, acvi.HalpernACVI()),
            ("Extragradient, step 0.9 / L", game, acvi.Extragradient(0.9 / L)), ("Popov, step 0.45 / L", game, acvi.Popov(0.45 / L)),
            ("GoldenRatio", game, acvi.GoldenRatio(0.1 / L))]
    table = []
    for name, problem, method in runs:
        stop = tl.Below("gap", 1e-9)
        tl.iterate(problem, method, steps=0, every=LOOK, stop=stop, throw=False)                   # compiles
        sol = tl.iterate(problem, method, steps=10**6, every=LOOK, stop=stop, seconds=marks[-1], throw=False)
        clock, gap = np.asarray(sol.history.axis("seconds")), np.asarray(sol.history["gap"])
        row: dict[str, Any] = {"N": size, "row": name, "steps": int(sol.steps), "evaluations": float(sol.history.last("operator_evaluations"))}
        table.append(row | {f"gap at {mark:g} s": float(gap[clock <= mark].min()) for mark in marks} | {"end": sol.status.name})
    A = csr_array((np.asarray(game.A.values), (np.asarray(game.A.rows), np.asarray(game.A.columns))), shape=(size, size))
    began = time.perf_counter()
    found = highs(A, "highs-ipm", limit)
    end = f"gap {saddle(A, *found):.1e}" if found else "no solution"
    row = {"N": size, "row": "HiGHS interior point (SciPy)", **dict.fromkeys(list(table[0])[2:])}
    return [*table, row | {"end": f"{end} after {time.perf_counter() - began:.3g} s"}]


def transport(shape: tuple[int, ...], seed: int) -> tuple[Any, Any]:
    """A convection-diffusion operator on a path or a grid and a random load, as a sparse monotone M and q."""
    from scipy.sparse import eye_array, kron

    def line(n: int) -> Any:
        below, above = eye_array(n, k=-1), eye_array(n, k=1)
        return 2.0 * eye_array(n) - 1.5 * below - 0.5 * above

    M = line(shape[0]) if len(shape) == 1 else kron(line(shape[0]), eye_array(shape[1])) + kron(eye_array(shape[0]), line(shape[1]))
    return csr_array(M), np.random.default_rng(seed).standard_normal(int(np.prod(shape)))


def lu(shapes: Sequence[tuple[int, ...]], steps: int, rounds: int) -> Rows:
    """One x-step with the factor that is kept, and by Krylov products, at three penalties (the norm of M is near 4 per axis)."""
    table = []
    for shape in shapes:
        M, q = transport(shape, 0)
        problem = acvi.AffineVariationalInequality(M, q, acvi.Box(-1.0, 1.0))
        for penalty in (1.0, 0.1, 0.01):
            row: dict[str, Any] = {"grid": " x ".join(map(str, shape)), "nonzeros": int(M.nnz), "penalty": f"{penalty:g}"}
            for linear in ("sparse", "krylov"):
                method = acvi.ProjectedACVI(penalty, linear=linear)
                run = lambda p=problem, m=method, k=steps: tl.iterate(p, m, steps=k, every=k)
                row[f"{linear} evaluations a step"] = float(run().history.last("operator_evaluations")) / steps
                row[f"{linear} step (ms)"] = 1e3 * timed(lambda run=run: run().value, rounds) / steps
            row["chosen"] = "sparse" if type(acvi.ProjectedACVI(1.0).prepare(problem).solver).__name__ == "SparseLU" else "krylov"
            table.append(row)
    return table


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
            row[f"{linear} setup (ms)"] = 1e3 * timed(lambda game=game, m=method: m.prepare(game).solver, rounds, compiled=False)
            ready = method.prepare(game)
            given = (game, ready, ready.init(game, game.x0, key=jax.random.key(0)), count)
            row[f"{linear} step (ms)"] = 1e3 * timed(lambda given=given: several(*given), rounds, compiled=False) / count
        R, v = jnp.eye(n), jnp.ones(n)
        row["bare product (ms)"] = 1e3 * timed(lambda R=R, v=v, count=count: product(R, v, count), rounds, compiled=False) / count
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
            taken = 1e3 * timed(lambda m=method, k=count: tl.iterate(game, m, steps=k, every=k, keep="last").value, rounds, compiled=False)
        path.append({"row": name, **dict(zip((f"steps to {m:g}" for m in marks), steps, strict=True)),
                     "evaluations": float(sol.history.last("operator_evaluations")), "ms": taken, "published (s)": PUBLISHED.get(name)})
    return rotation, path


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables; `--json` for machines, `--markdown` for the documentation."""
    parts = ("games", "monotone", "batches", "sparse", "lu", "xstep", "hbg")
    parser = report.parser(__doc__, "smaller games, fewer rounds, short limits")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="some of the tables")
    parser.add_argument("--sizes", nargs="+", type=int, default=(50, 200, 500), help="of the games (default 50 200 500)")
    options = parser.parse_args(argv)
    quick, tables = options.quick, {}
    rounds, about = (1 if quick else 3), {"left out": "; ".join(outside()[1]) or "nothing"}

    def done(title: str, table: Rows) -> None:
        tables[title] = table
        if not options.json:
            report.show({title: table}, options, small=("error", "gap", "tol", "s to"), **about)
            sys.stdout.flush()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        if "games" in options.only:
            chosen = scalars(TUNING[:1] if quick else TUNING, 2000 if quick else 5000)
            for size in (50,) if quick else options.sizes:
                done(f"Gaussian games, N = {size}", games(size, chosen, FRESH[:1] if quick else FRESH, 500_000, 1.0 if quick else 4.0, rounds))
        if "monotone" in options.only:
            for kind in ("affine, two simplices", "affine, box", "cubic, box", "cubic, ball"):
                done(f"Monotone problems: {kind}", monotone(kind, 20, TUNING[:1], FRESH[:1], 50_000, 1.0, 1) if quick
                     else monotone(kind, 100, TUNING[:2], FRESH, 200_000, 3.0, rounds))
        if "batches" in options.only:
            done("Batches of games", batches(200, (10,), 20, rounds) if quick else batches(1000, (10, 30), 100, rounds))
            if not quick:
                done("A larger batch", batches(4000, (10,), 100, rounds))
        if "sparse" in options.only:
            done("A sparse game", sparse(2000, (1.0, 3.0), 10.0) if quick else sparse(20_000, (1.0, 3.0, 10.0), 60.0))
        if "lu" in options.only:
            done("A sparse x-step", lu(((500,),), 10, rounds) if quick else lu(((20_000,), (60, 60), (120, 120)), 50, rounds))
        if "xstep" in options.only:
            done("One x-step", xstep((500,) if quick else (500, 1000, 2000), 1e8 if quick else 1e9, rounds))
        if "hbg" in options.only:
            rotation, path = hbg(rounds)
            done("Steps to a relative error of 0.02, by rotation (published counting: EG 2, LA5 5 a step)", rotation)
            done("Curvature 0.05: steps to a relative error", path)
    if options.json:
        report.show(tables, options, **about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
