"""Hypergradients: one from a given inner point, one from nothing, and one with a million hyper-parameters, beside other packages.

One: logistic regression with 200 penalties and 2000 rows, float64; the inner point is 1e-3 from the solution. Every row gets the same point; errors
are relative, against the hypergradient at the solution. Calls of the library check their arguments each time, unless they are *inside jit*.
Whole: the same problem from x = 0: inner solver and hypergradient together, at several inner tolerances. The bar is a relative error of 1e-6 in the
time of the fastest peer that reaches 1e-2. Rows named *inside jit* run as one compiled program, as the peers do; the others return to Python in
between, with history and checks.
Cleaning: one weight per sample, float32, conjugate gradients. Each row holds at most the data and some vectors.
Batch: 256 settings of the breast cancer problem, one vmap against loops.
Peers (jaxopt, optimistix, lineax, torch, torchopt) are in `_hypergradient_peers.py`; those that are not installed are left out, which is said.
A table is printed when it is finished.

    python benchmarks/hypergradient.py [--quick] [--only one whole cleaning batch] [--json | --markdown]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import hypergradient as hg
from theorylab.core.show import text_table
from theorylab.lab.files import load_module

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))
peers: ModuleType = load_module(Path(__file__).with_name("_hypergradient_peers.py"))

Rows = list[dict[str, Any]]
PARTS = ("one", "whole", "cleaning", "batch")


def logistic(rows: int, features: int, outer: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """The problem, y, and a unit direction, drawn with the legacy generator so that anybody gets the same numbers."""
    rs, scale = np.random.RandomState(0), np.linspace(1, 0.1, features)
    X = rs.randn(rows, features) * scale
    w = rs.randn(features)
    b = np.sign(X @ w + 0.5 * rs.randn(rows))
    Xv = rs.randn(outer, features) * scale
    bv = np.sign(Xv @ w + 0.5 * rs.randn(outer))
    y, u = -1 + 0.5 * rs.randn(features), rs.randn(features)
    return hg.LogisticSelection((X, b), (Xv, bv)), y, u / np.linalg.norm(u)


def clock(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of interleaved calls, after two calls of each, the first of which compiles."""
    for call in calls.values():
        jax.block_until_ready(call())
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - began)
    return {name: 1e3 * float(np.median(took)) for name, took in times.items()}


def one(rounds: int, size: tuple[int, int, int]) -> Rows:
    """One hypergradient from one inner point."""
    problem, y, u = logistic(*size)
    y = jnp.asarray(y)
    solution = hg.reference(problem, y)
    exact = hg.hypergradient(problem, solution, y, hg.NewtonPoint()).value
    x, train, valid = solution + 1e-3 * u, (problem.A, problem.b), (problem.A_out, problem.b_out)
    ways = {"plain, Cholesky": hg.Plain(), "one-point, Cholesky (default)": hg.OnePoint(), "Newton point": hg.NewtonPoint(),
            "plain, CG 1e-6": hg.Plain(linear=hg.CG(tolerance=1e-6)), "one-point, CG 1e-10": hg.OnePoint(linear=hg.CG(tolerance=1e-10)),
            "Neumann, 100 terms": hg.Neumann(100), "unrolled, 100 steps": hg.Unrolled(100)}
    calls = {name: lambda how=how: hg.hypergradient(problem, x, y, how).value for name, how in ways.items()}
    for name, how in (("plain", hg.Plain()), ("one-point", hg.OnePoint())):
        compiled = jax.jit(lambda problem, x, y, how=how: hg.hypergradient(problem, x, y, how).value)
        calls[f"{name}, Cholesky, inside jit"] = lambda compiled=compiled: compiled(problem, x, y)
    calls |= peers.at_a_point(x, y, train, valid)
    took, size_of = clock(calls, rounds), float(jnp.linalg.norm(exact))
    return [{"row": name, "relative error": float(jnp.linalg.norm(jnp.asarray(call()) - exact)) / size_of, "median (ms)": took[name],
             "row / plain": took[name] / took["plain, Cholesky"]} for name, call in calls.items()]


def whole(rounds: int, size: tuple[int, int, int]) -> Rows:
    """From x = 0 to the hypergradient."""
    problem, y, _ = logistic(*size)
    y = jnp.asarray(y)
    exact = hg.hypergradient(problem, hg.reference(problem, y), y, hg.NewtonPoint()).value
    train, valid, zero = (problem.A, problem.b), (problem.A_out, problem.b_out), jnp.zeros(problem.n)
    calls: dict[str, Callable[[], Any]] = {}

    def run(problem: Any, y: Any, level: Any, how: Any) -> Any:
        sol = tl.iterate(problem.inner(y), hg.LBFGS(), steps=1000, stop=tl.Below("residual", level), keep="last")
        return hg.hypergradient(problem, sol.value, y, how).value

    inside = jax.jit(lambda problem, y, level: run(problem, y, level, hg.OnePoint()))
    for level in (1e-3, 1e-4, 1e-5, 1e-6):
        for name, how in (("plain", hg.Plain()), ("one-point", hg.OnePoint())):
            calls[f"L-BFGS {level:.0e}, {name}"] = lambda level=level, how=how: run(problem, y, level, how)
        calls[f"L-BFGS {level:.0e}, one-point, inside jit"] = lambda level=level: inside(problem, y, level)
    ours = tuple(calls)
    calls |= peers.from_nothing(y, train, valid, zero)
    took, size_of = clock(calls, rounds), float(jnp.linalg.norm(exact))
    error = {name: float(jnp.linalg.norm(call() - exact)) / size_of for name, call in calls.items()}
    rows = [{"row": name, "relative error": error[name], "median (ms)": took[name]} for name in calls]
    for title, names, level in (("fastest row of theorylab below 1e-6", ours, 1e-6), ("fastest other row below 1e-2", set(calls) - set(ours), 1e-2)):
        best = min((name for name in names if error[name] <= level), key=took.__getitem__, default=None)
        if best is not None:
            rows.append({"row": f"*{title}:* {best}", "relative error": error[best], "median (ms)": took[best]})
    return rows


def cleaning(rounds: int, sizes: tuple[int, ...]) -> Rows:
    """Data cleaning: as many hyper-parameters as samples."""
    return [row for samples in sizes for row in cleaned(rounds, samples)]


def cleaned(rounds: int, samples: int) -> Rows:
    """The rows of one size."""
    rs = np.random.RandomState(0)
    X, w, noise = rs.randn(samples, 64).astype(np.float32), rs.randn(64) * 3 / 8, rs.randn(samples)
    b = np.where(rs.rand(samples) < 0.3, -1, 1) * np.sign(X @ w + 0.3 * noise)
    Xv = rs.randn(20_000, 64).astype(np.float32)
    problem = hg.DataCleaning((X, b.astype(np.float32)), (Xv, np.sign(Xv @ w + 0.3 * rs.randn(20_000)).astype(np.float32)), penalty=0.1)
    y = jnp.zeros(samples, jnp.float32)
    x = tl.iterate(problem.inner(y), hg.Newton(), steps=6, keep="last").value
    linear = hg.CG(tolerance=1e-5)
    calls: dict[str, Callable[[], Any]] = {"plain, CG 1e-5": lambda: hg.hypergradient(problem, x, y, hg.Plain(linear=linear)).value,
                                           "one-point, CG 1e-5": lambda: hg.hypergradient(problem, x, y, hg.OnePoint(linear=linear)).value}
    return [{"hyper-parameters": samples, "row": name, "median (ms)": took} for name, took in clock(calls, rounds).items()]


def batch(rounds: int, settings: int) -> Rows:
    """Many settings of one problem."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    labels = 2.0 * data.target - 1.0
    train, valid = hg.standardize(data.data[::2], data.data[1::2])
    problem = hg.LogisticSelection((train, labels[::2]), (valid, labels[1::2]))
    ys = jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (settings, 30)))
    near = hg.reference(problem, jnp.zeros(30))

    def estimated(y: jax.Array) -> jax.Array:
        return hg.hypergradient(problem, near, y).value

    def solved(y: jax.Array) -> jax.Array:
        x = tl.iterate(problem.inner(y), hg.Newton(), steps=12, keep="last").value
        return hg.hypergradient(problem, x, y).value

    rows: Rows = []
    for what, single in (("hypergradient at one x", estimated), ("12 Newton steps and hypergradient", solved)):
        compiled, together = jax.jit(single), jax.jit(jax.vmap(single))
        took = clock({"vmap": lambda together=together: together(ys),
                      "loop over a compiled call": lambda compiled=compiled: [compiled(y) for y in ys],
                      "loop over calls of the library": lambda single=single: [single(y) for y in ys]}, rounds)
        rows += [{"settings": settings, "what": what, "row": name, "median (ms)": value, "row / vmap": value / took["vmap"]}
                 for name, value in took.items()]
    return rows


def printed(title: str, table: Rows, markdown: bool) -> None:
    """Print one table."""
    names = list(table[0])
    body = [[report._cell(row[name], "error" in name) for name in names] for row in table]
    lines = "\n".join("| " + " | ".join(cells) + " |" for cells in [names, ["---"] * len(names), *body]) if markdown else text_table(names, body)
    print(f"\n{'### ' if markdown else ''}{title}\n\n{lines}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    parser = report.parser(__doc__, "smaller problems, fewer rounds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the tables")
    options = parser.parse_args(argv)
    quick, rounds = options.quick, 3 if options.quick else 21
    size = (400, 40, 200) if quick else (2000, 200, 1000)
    parts: dict[str, tuple[str, Callable[[], Rows]]] = {
        "one": ("One hypergradient", lambda: one(rounds, size)), "whole": ("From x = 0", lambda: whole(rounds, size)),
        "cleaning": ("Data cleaning", lambda: cleaning(3 if quick else 7, (20_000,) if quick else (200_000, 1_000_000))),
        "batch": ("A batch of settings", lambda: batch(3 if quick else 7, 8 if quick else 256))}
    tables: dict[str, Rows] = {}
    for title, part in (parts[name] for name in options.only):
        tables[title] = part()
        if not options.json:
            printed(title, tables[title], options.markdown)
    left_out = ", ".join(name for name in peers.PEERS if not peers.installed(name))
    report.show(tables if options.json else {}, options, **{"left out": left_out or "nothing"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
