"""Landing beside the matrix products that it cannot avoid, LAPACK, PyTorch and pymanopt; peers that are not installed are left out.

step: one step on a dense eigenvalue problem (n = 1000, p = 500, float64). stream: one step of canonical correlations on a batch (2048 columns in each
step: one step on a dense eigenvalue problem (n = 1000, p = 500, float64). stream: one step of canonical correlations on a batch (2048 columns in each
small problems in one call. whole: time to a relative gap of 1e-8.

    python benchmarks/stiefel.py [--quick] [--only step stream growth memory batch whole] [--json | --markdown]
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from scipy.sparse.linalg import lobpcg

import theorylab as tl
from theorylab import stiefel
from theorylab.core.show import text_table
from theorylab.lab.files import load_module
from theorylab.stiefel.contract import Batch

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))

Rows = list[dict[str, Any]]
FEW, MANY = 2, 12                                   # steps of two runs, whose difference is free of what a call costs
PEERS = ("torch", "pymanopt", "cca_zoo", "picard")


def present(name: str) -> bool:
    """Whether a peer is installed."""
    return importlib.util.find_spec(name) is not None


def clock(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Median CPU milliseconds of interleaved calls, after one call of each."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.process_time()
            jax.block_until_ready(call())
            times[name].append(time.process_time() - began)
    return {name: 1e3 * float(np.median(took)) for name, took in times.items()}


def per_step(calls: dict[str, Callable[[int], Any]], rounds: int, few: int = FEW, many: int = MANY) -> dict[str, float]:
    """CPU milliseconds of a step, from runs of two lengths."""
    took = clock({(name, steps): lambda call=call, steps=steps: call(steps) for name, call in calls.items() for steps in (few, many)}, rounds)
    return {name: (took[name, many] - took[name, few]) / (many - few) for name in calls}


def once(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of a second call, its wall and its CPU seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.block_until_ready(call())
        wall, cpu = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(call())
        return result, time.perf_counter() - wall, time.process_time() - cpu


def pencil(n: int, condition: float = 100.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric A and a B of the given condition with a basis of its own."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, n))
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (A + A.T) / (2 * n**0.5) + np.eye(n), (Q * np.geomspace(1.0, condition, n)) @ Q.T


def repeated(step: Callable[[Any], Any], x: Any) -> Callable[[int], Any]:
    """A plain Python loop over `step`."""
    def call(steps: int) -> Any:
        y = x
        for _ in range(steps):
            y = step(y)
        return np.asarray(y[0])
    return call


# ------------------------------------------------------------------------------------------------ one step


def step(rounds: int, n: int, p: int) -> Rows:
    """One deterministic step."""
    A, B = pencil(n)
    problem = stiefel.GEVP(A, B, p=p, reference="none")
    x0 = stiefel.retract(np.random.default_rng(1).standard_normal((n, p)), B)
    a, b = jnp.asarray(A), jnp.asarray(B)

    @jax.jit
    def products(xt: jax.Array, steps: int) -> jax.Array:
        def one(_: int, xt: jax.Array) -> jax.Array:
            first, second = xt @ a, xt @ b
            gram, inside = second @ xt.T, first @ xt.T
            return xt + 1e-12 * (gram @ first + inside @ second + (gram @ inside) @ xt)
        return jax.lax.fori_loop(0, steps, one, xt)

    def run(method: Any) -> Callable[[int], Any]:
        return lambda steps: tl.iterate(problem, method, x0, steps=steps, every=steps, keep="last").value

    def formula(A: Any, B: Any, eye: Any) -> Callable[[Any], Any]:  # the same in NumPy and in PyTorch
        def one(x: Any) -> Any:
            bx, g = B @ x, -(A @ x)
            return x - 1e-5 * (g @ (bx.T @ bx / 2) + bx @ (bx.T @ x - eye - g.T @ bx / 2))
        return one

    floor = "the products alone: A X, B X, five of size p"
    calls = {floor: lambda steps: products(jnp.asarray(x0.T), steps), "Landing, fixed step": run(stiefel.Landing(1e-5, normal="gradient")),
             "Landing, exact safe step": run(stiefel.Landing(1e-5, safe=0.5)),
             "RiemannianDescent, B factored once": run(stiefel.RiemannianDescent(1e-3, "cholesky")),
             "NumPy, the formula": repeated(formula(A, B, np.eye(p)), np.asarray(x0))}
    if present("torch"):
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(1)
        eye = torch.eye(p, dtype=torch.float64)
        calls["PyTorch, the formula"] = repeated(formula(torch.tensor(A), torch.tensor(B), eye), torch.tensor(np.asarray(x0)))
    each = per_step(calls, rounds)
    began = time.process_time()
    scipy.linalg.eigh(A, B, subset_by_index=(n - p, n - 1))
    return [*({"row": name, "CPU ms per step": value, "row / products": value / each[floor]} for name, value in each.items()),
            {"row": "scipy eigh, the whole problem", "CPU ms per step": 1e3 * (time.process_time() - began), "row / products": None}]


def correlated(n: int, rows: int, p: int) -> tuple[Any, Any, Any]:
    """A problem of canonical correlations that holds one batch, a start, and the batch."""
    rng = np.random.default_rng(0)
    views = tuple(rng.standard_normal((rows, n), dtype=np.float32) for _ in range(2))
    problem = stiefel.CCA.streamed(views, p=p, ridge=1e-3)
    return problem, tuple(np.asarray(x) for x in problem.start(jax.random.key(0))), tuple(view - view.mean(0) for view in views)


@jax.jit
def kernel(problem: Any, method: Any, x0: Any, views: Any, steps: int) -> Any:
    """Steps on one batch."""
    held = problem.holding(Batch(tuple(stiefel.Gram(view, None, ridge) for view, ridge in zip(views, problem.ridge, strict=True))))
    state = jax.tree.map(lambda a: jax.lax.convert_element_type(a, a.dtype), method.init(held, x0, key=jax.random.key(0)))
    return method.value(held, jax.lax.fori_loop(0, steps, lambda _, state: method.step(held, state, key=None), state))


def stream(rounds: int, n: int, rows: int, p: int) -> Rows:
    """One stochastic step of canonical correlations, both views."""
    problem, x0, views = correlated(n, rows, p)
    held = tuple(jnp.asarray(view) for view in views)

    @jax.jit
    def products(x: Any, steps: int) -> Any:
        def one(_: int, x: Any) -> Any:
            scores = tuple(xt @ a.T for xt, a in zip(x, held, strict=True))
            lifts = tuple((s @ a, c @ a) for s, c, a in zip(scores, scores[::-1], held, strict=True))
            return tuple(xt + 1e-12 * (u + v) for xt, (u, v) in zip(x, lifts, strict=True))
        return jax.lax.fori_loop(0, steps, one, x)

    def field(x: Any, y: Any, b: Any, eye: Any) -> Any:  # of one view, by the formula of the official code without matrices of size n
        def lift(a: Any, s: Any) -> Any:
            return a.T @ s / rows
        bx, g = lift(b, y[0]) + 1e-3 * x, -lift(b, y[1])
        return g @ (bx.T @ bx / 2) + bx @ (bx.T @ x - eye - g.T @ bx / 2)

    def formula(views: Any, eye: Any) -> Callable[[Any], Any]:
        def one(x: Any) -> Any:
            scores = [a @ z for a, z in zip(views, x, strict=True)]
            return tuple(z - 1e-3 * field(z, pair, a, eye) for z, pair, a in zip(x, (scores, scores[::-1]), views, strict=True))
        return one

    def run(method: Any) -> Callable[[int], Any]:
        return lambda steps: kernel(problem, method, x0, held, steps)

    def fed(steps: int) -> Any:
        return tl.iterate(problem, stiefel.StochasticLanding(1e-3), x0, steps=steps, every=steps, keep="last", data=[views] * steps).value

    floor = "the products alone: three of each view"
    calls = {floor: lambda steps: products(tuple(jnp.asarray(x.T) for x in x0), steps),
             "StochasticLanding, fixed step": run(stiefel.StochasticLanding(1e-3, safe=None, normal="gradient")),
             "StochasticLanding, exact safe step": run(stiefel.StochasticLanding(1e-3)),
             "U-statistic, exact safe step": run(stiefel.StochasticLanding(1e-3, estimator="u_statistic")),
             "StochasticLanding through iterate, batches from Python": fed,
             "NumPy, the formula": repeated(formula(views, np.eye(p, dtype=np.float32)), x0)}
    if present("torch"):
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(1)
        calls["PyTorch, the formula"] = repeated(formula([torch.tensor(v) for v in views], torch.eye(p)), [torch.tensor(x) for x in x0])
    each = per_step(calls, rounds, 10, 60)
    return [{"row": name, "CPU ms per step": value, "row / products": value / each[floor]} for name, value in each.items()]


def growth(rounds: int, columns: tuple[int, ...], rows: tuple[int, ...], p: int) -> Rows:
    """The step against columns at the first number of rows, then against rows at the first number of columns."""
    table: Rows = []
    method = stiefel.StochasticLanding(1e-3)
    for label, cases in (("columns", [(n, rows[0]) for n in columns]), ("rows", [(columns[0], r) for r in rows])):
        took = []
        for n, r in cases:
            problem, x0, views = correlated(n, r, p)
            took.append(per_step({"step": lambda steps, p=problem, x=x0, v=views: kernel(p, method, x, v, steps)}, rounds)["step"])
        slopes = np.polyfit(np.log([case[label == "rows"] for case in cases]), np.log(took), 1)
        table += [{"against": label, "columns of a view": n, "rows of a batch": r, "CPU ms per step": value, "slope": None}
                  for (n, r), value in zip(cases, took, strict=True)]
        table[-1]["slope"] = float(slopes[0])
    return table


CHILD = r"""
import re, sys
from pathlib import Path
import numpy as np, jax
import theorylab as tl
from theorylab import stiefel
n, rows, p = map(int, sys.argv[1:])
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024   # of this program alone; ru_maxrss counts the parent
def run(n, rows, steps):
    rng = np.random.default_rng(0)
    batches = (tuple(rng.standard_normal((rows, n), dtype=np.float32) for _ in range(2)) for _ in range(steps))
    held_out = tuple(rng.standard_normal((16, n), dtype=np.float32) for _ in range(2))
    problem = stiefel.CCA.streamed(held_out, p=p, ridge=1e-3)
    method = stiefel.StochasticLanding(0.1, preconditioner="diagonal")
    sol = tl.iterate(problem, method, steps=steps, every=steps, data=batches)
    assert np.isfinite(sol.history["infeasibility"]).all()
run(4 * p, rows, 4)
before = peak()
run(n, rows, 4)
print(before, peak())
"""


def memory(n: int, rows: tuple[int, ...], p: int) -> Rows:
    """Peak memory of a process of its own."""
    table: Rows = []
    for r in rows:
        done = subprocess.run([sys.executable, "-c", CHILD, str(n), str(r), str(p)], capture_output=True, text=True, check=True, env=dict(os.environ))
        before, peak = map(float, done.stdout.split())
        table.append({"columns of a view": n, "rows of a batch": r, "p": p, "one batch (MB)": 2 * 4 * n * r / 2**20, "process before (MB)": before,
                      "added at the peak (MB)": peak - before, "three covariances (MB)": 3 * 4 * n * n / 2**20})
    return table


def batch(rounds: int, count: int, n: int, p: int) -> Rows:
    """Many small problems."""
    pairs = [pencil(n, 10.0, seed) for seed in range(count)]
    A, B = (jnp.asarray(np.stack(parts)) for parts in zip(*pairs, strict=True))
    x0 = jnp.stack([stiefel.retract(np.random.default_rng(1).standard_normal((n, p)), b) for b in B])

    @jax.jit
    def single(a: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
        return tl.iterate(stiefel.GEVP(a, b, p=p, reference="none"), stiefel.Landing(1e-2, safe=0.5), x, steps=50, keep="last").value

    def separately() -> list[Any]:
        return [tl.iterate(stiefel.GEVP(a, b, p=p, reference="none"), stiefel.Landing(1e-2, safe=0.5), x, steps=50, keep="last").value
                for a, b, x in zip(A, B, x0, strict=True)]

    together = jax.jit(jax.vmap(single))
    took = clock({"vmap": lambda: together(A, B, x0), "loop over a compiled call": lambda: [single(*part) for part in zip(A, B, x0, strict=True)],
                  "loop over iterate": separately}, rounds)
    return [{"problems": count, "n": n, "p": p, "row": name, "CPU ms": value, "row / vmap": value / took["vmap"]}
            for name, value in took.items()]


# ------------------------------------------------------------------------------------------------ whole problems


def whole(n: int, p: int, level: float) -> Rows:
    """A whole solution; wall and CPU seconds of one call after a first one that compiles."""
    rows: Rows = []
    for name, (A, B) in {"B of condition 100": pencil(n), "B = I": (pencil(n)[0], np.eye(n))}.items():
        problem = stiefel.GEVP(A, B, p=p)
        best = float(problem.optimum)
        scale = abs(best)
        x0 = np.asarray(stiefel.retract(np.random.default_rng(1).standard_normal((n, p)), B))
        rule = tl.Below("gap", level * scale) & tl.Below("infeasibility", 1e-6)

        def run(method: Any, problem: Any = problem, x0: Any = x0, rule: Any = rule) -> Callable[[], Any]:
            return lambda: tl.iterate(problem, method, x0, steps=20_000, every=10, stop=rule, keep="last", throw=False).value

        calls: dict[str, Callable[[], Any]] = {
            "tl.solve's Landing (B factored)": run(problem.default_method()), "Landing, products only": run(stiefel.Landing(normal="correction")),
            "RiemannianDescent with search": run(stiefel.RiemannianDescent(1e-2, "cholesky", search=True)),
            "scipy eigh": lambda A=A, B=B: scipy.linalg.eigh(A, B, subset_by_index=(n - p, n - 1))[1],
            "scipy LOBPCG": lambda A=A, B=B, x=x0, t=1e-6 * scale: lobpcg(A, x, B=B, largest=True, maxiter=2000, tol=t)[1]}
        if present("pymanopt"):
            calls["pymanopt SteepestDescent" + (", whitened" if name != "B = I" else "")] = lambda A=A, B=B, x=x0: manopt(A, B, x)
        for row, call in calls.items():
            x, wall, cpu = once(call)
            q = np.asarray(stiefel.retract(np.asarray(x), B))
            gap = (-0.5 * float(np.trace(q.T @ A @ q)) - best) / scale
            rows.append({"constraint": name, "row": row, "relative gap": max(gap, 0.0), "seconds": wall, "CPU seconds": cpu})
    return rows


def manopt(A: np.ndarray, B: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """Steepest descent on the Stiefel manifold after whitening: the package has no B."""
    import pymanopt
    from pymanopt.manifolds import Stiefel
    from pymanopt.optimizers import SteepestDescent

    lower = np.linalg.cholesky(B)
    white = np.linalg.solve(lower, np.linalg.solve(lower, A).T).T
    manifold = Stiefel(*x0.shape)

    @pymanopt.function.numpy(manifold)
    def cost(y: np.ndarray) -> float:
        return -0.5 * float(np.trace(y.T @ white @ y))

    @pymanopt.function.numpy(manifold)
    def gradient(y: np.ndarray) -> np.ndarray:
        return -white @ y

    optimizer = SteepestDescent(max_iterations=2000, min_gradient_norm=1e-4, verbosity=0)
    found = optimizer.run(pymanopt.Problem(manifold, cost, euclidean_gradient=gradient), initial_point=np.linalg.qr(lower.T @ x0)[0])
    return np.linalg.solve(lower.T, found.point)


def parts(quick: bool) -> dict[str, tuple[str, Callable[[], Rows]]]:
    """Title and table of each part."""
    rounds = 3 if quick else 5
    return {
        "step": ("One step", lambda: step(rounds, *((200, 50) if quick else (1000, 500)))),
        "stream": ("One step of streaming canonical correlations", lambda: stream(rounds, *((256, 64, 4) if quick else (2048, 512, 16)))),
        "growth": ("Growth of that step", lambda: growth(rounds, *(((256, 512), (64, 128), 4) if quick
                                                                   else ((4096, 8192, 16_384, 32_768), (128, 256, 512, 1024), 16)))),
        "memory": ("Peak memory", lambda: memory(*((2000, (32,), 4) if quick else (50_000, (64, 128, 512), 16)))),
        "batch": ("A batch of problems", lambda: batch(rounds, *((8, 16, 2) if quick else (64, 64, 8)))),
        "whole": ("A whole solution", lambda: whole(*((100, 5, 1e-6) if quick else (1000, 10, 1e-8)))),
    }


def main(argv: list[str] | None = None, doc: str | None = __doc__, parts: Callable[[bool], Any] = parts) -> int:
    """Measure and print each table when it is finished."""
    parser = report.parser(doc, "smaller problems, fewer rounds")
    names = list(parts(True))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the tables")
    options = parser.parse_args(argv)
    tables: dict[str, Rows] = {}
    for name, (title, table) in parts(options.quick).items():
        if name not in options.only:
            continue
        tables[title] = rows = table()
        if not options.json:
            head = list(rows[0])
            cells = [[report._cell(row[column], any(word in column for word in ("error", "gap", "tol"))) for column in head] for row in rows]
            print(f"\n{'### ' if options.markdown else ''}{title}\n")
            print("\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells]) if options.markdown
                  else text_table(head, cells), flush=True)
    missing = ", ".join(name for name in PEERS if not present(name))
    report.show(tables if options.json else {}, options, **{"left out (not installed)": missing or "nothing"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
