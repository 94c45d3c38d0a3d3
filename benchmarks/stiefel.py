"""Landing steps against the matrix products that they cannot avoid, and whole solutions beside LAPACK, LOBPCG, pymanopt and scikit-learn.

Step: one step of `Landing` on a dense eigenvalue problem (n = 1000, p = 500, float64), beside the bare products with A and B and a Riemannian step
with a factored B. Stream: one step of `StochasticLanding` for CCA (2048 columns in each view, p = 16, 512 rows, float32), and how it grows with n.
Batch: many small problems in one call. Whole: time to a relative gap of 1e-8. Digits: canonical correlations of the halves of the digits, batches
and seconds to a gap of one per cent.

    python benchmarks/stiefel.py [--quick] [--only step stream batch whole digits] [--json | --markdown]
"""

from __future__ import annotations

import importlib.util
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
from theorylab.lab.files import load_module

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))

Rows = list[dict[str, Any]]
FEW, MANY = 2, 12                                   # steps of two runs, whose difference is free of what a call costs
PARTS = ("step", "stream", "batch", "whole", "digits")


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


def pencil(n: int, condition: float = 100.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric A and a B of the given condition with a basis of its own."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, n))
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (A + A.T) / (2 * n**0.5) + np.eye(n), (Q * np.geomspace(1.0, condition, n)) @ Q.T


def per_step(problem: Any, method: Any, x0: Any, steps: int, **options: Any) -> Callable[[], Any]:
    """A run of `steps` steps that records its last row alone."""
    return lambda: tl.iterate(problem, method, x0, steps=steps, every=steps, keep="last", **options).value


def step(rounds: int, n: int, p: int) -> Rows:
    """One deterministic step."""
    A, B = pencil(n)
    problem = stiefel.GEVP(A, B, p=p, reference="none")
    x0 = stiefel.retract(np.random.default_rng(1).standard_normal((n, p)), B)
    a, b, xt = jnp.asarray(A), jnp.asarray(B), jnp.asarray(x0.T)

    @jax.jit
    def products(xt: jax.Array, steps: int) -> jax.Array:
        def once(_: int, xt: jax.Array) -> jax.Array:
            first, second = xt @ a, xt @ b
            gram, inside = second @ xt.T, first @ xt.T
            return xt + 1e-12 * (gram @ first + inside @ second + (gram @ inside) @ xt)
        return jax.lax.fori_loop(0, steps, once, xt)

    bare = "the products alone: A X, B X, five of size p"
    methods = {"Landing, fixed step": stiefel.Landing(1e-5), "Landing, exact safe step": stiefel.Landing(1e-5, safe=0.5),
               "RiemannianDescent, B factored once": stiefel.RiemannianDescent(1e-3, "cholesky")}
    calls = {(name, steps): per_step(problem, method, x0, steps) for name, method in methods.items() for steps in (FEW, MANY)}
    calls |= {(bare, steps): lambda steps=steps: products(xt, steps) for steps in (FEW, MANY)}
    took = clock(calls, rounds)
    each = {name: (took[name, MANY] - took[name, FEW]) / (MANY - FEW) for name in (bare, *methods)}
    rows: Rows = [{"row": name, "CPU ms per step": value, "row / products": value / each[bare]} for name, value in each.items()]
    began = time.process_time()
    scipy.linalg.eigh(A, B, subset_by_index=(n - p, n - 1))
    return [*rows, {"row": "scipy eigh, the whole problem", "CPU ms per step": 1e3 * (time.process_time() - began), "row / products": None}]


def stream(rounds: int, sizes: tuple[int, ...], rows: int, p: int) -> Rows:
    """One stochastic step of CCA with rows that are held in memory."""
    table: Rows = []
    for n in sizes:
        rng = np.random.default_rng(0)
        views = tuple(rng.standard_normal((2 * rows, n), dtype=np.float32) for _ in range(2))
        problem = stiefel.CCA(*views, p=p, ridge=1e-3, reference="none")
        start = tuple(stiefel.retract(rng.standard_normal((n, p), dtype=np.float32) / n**0.5, None) for _ in range(2))
        method = stiefel.StochasticLanding(1e-3, batch_size=rows)
        took = clock({steps: per_step(problem, method, start, steps) for steps in (FEW, MANY)}, rounds)
        table.append({"columns of a view": n, "rows of a batch": rows, "p": p, "CPU ms per step": (took[MANY] - took[FEW]) / (MANY - FEW)})
    return table


def batch(rounds: int, count: int, n: int, p: int) -> Rows:
    """Many small problems."""
    pairs = [pencil(n, 10.0, seed) for seed in range(count)]
    A, B = (jnp.asarray(np.stack(parts)) for parts in zip(*pairs, strict=True))
    x0 = jnp.stack([stiefel.retract(np.random.default_rng(1).standard_normal((n, p)), b) for b in B])

    @jax.jit
    def single(a: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
        return tl.iterate(stiefel.GEVP(a, b, p=p, reference="none"), stiefel.Landing(1e-2, safe=0.5), x, steps=50, keep="last").value

    together = jax.jit(jax.vmap(single))
    took = clock({"vmap": lambda: together(A, B, x0), "loop over a compiled call": lambda: [single(*part) for part in zip(A, B, x0, strict=True)]},
                 rounds)
    return [{"problems": count, "n": n, "p": p, "row": name, "CPU ms": value, "row / vmap": value / took["vmap"]}
            for name, value in took.items()]


def whole(n: int, p: int, level: float) -> Rows:
    """A whole solution; wall and CPU seconds of one call after a first one that compiles."""
    A, B = pencil(n)
    problem = stiefel.GEVP(A, B, p=p)
    scale, best = abs(float(problem.optimum)), float(problem.optimum)
    x0 = stiefel.retract(np.random.default_rng(1).standard_normal((n, p)), B)
    rule = tl.Below("gap", level * scale) & tl.Below("infeasibility", 1e-6)

    def run(method: Any) -> Callable[[], Any]:
        return lambda: tl.iterate(problem, method, x0, steps=20_000, every=10, stop=rule, keep="last", throw=False).value

    calls: dict[str, Callable[[], Any]] = {
        "tl.solve's Landing (B factored)": run(problem.default_method()), "Landing, products only": run(stiefel.Landing(normal="correction")),
        "RiemannianDescent with search": run(stiefel.RiemannianDescent(1e-2, "cholesky", search=True)),
        "scipy eigh": lambda: scipy.linalg.eigh(A, B, subset_by_index=(n - p, n - 1))[1],
        "scipy LOBPCG": lambda: lobpcg(A, np.asarray(x0), B=B, largest=True, maxiter=2000, tol=1e-6 * scale)[1]}
    if importlib.util.find_spec("pymanopt"):
        calls["pymanopt SteepestDescent, whitened"] = lambda: pymanopt_solution(A, B, np.asarray(x0))
    rows = []
    for name, call in calls.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jax.block_until_ready(call())
            wall, cpu = time.perf_counter(), time.process_time()
            x = np.asarray(jax.block_until_ready(call()))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        q = np.asarray(stiefel.retract(x, B))
        gap = (-0.5 * float(np.trace(q.T @ A @ q)) - best) / scale
        rows.append({"row": name, "relative gap": max(gap, 0.0), "seconds": wall, "CPU seconds": cpu})
    return rows


def pymanopt_solution(A: np.ndarray, B: np.ndarray, x0: np.ndarray) -> np.ndarray:
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


def digits(steps: int) -> Rows:
    """Canonical correlations of the halves of the digits, from batches and from all data."""
    from sklearn.cross_decomposition import CCA
    from sklearn.datasets import load_digits

    images = load_digits().images / 16.0
    views = images[:, :, :4].reshape(-1, 32), images[:, :, 4:].reshape(-1, 32)
    exact = stiefel.CCA(*views, p=5, ridge=1e-3)
    best, rows = -float(exact.optimum), []
    methods = {"flagship: one batch, preconditioned": stiefel.StochasticLanding(tl.Inverse(0.7, offset=50.0), preconditioner="auto"),
               "u-statistic, preconditioned": stiefel.StochasticLanding(tl.Inverse(0.7, offset=50.0), estimator="u_statistic",
                                                                             preconditioner="auto"),
               "the paper's averaged landing": stiefel.StochasticLanding(0.1, batch_size=128, average="first_pass", safe=None),
               "rolling Riemannian": stiefel.RollingRiemannian(0.1)}
    for name, method in methods.items():
        for _ in range(2):
            began = time.perf_counter()
            sol = tl.iterate(exact, method, steps=steps, every=5, stop=tl.Below("gap", 0.01 * best), throw=False)
            took = time.perf_counter() - began
        rows.append({"row": name, "batches to 1 %": sol.steps if sol.status.good else None, "relative gap": float(sol.history["gap"][-1]) / best,
                     "seconds": took})
    centred = [view - view.mean(0) for view in views]
    began = time.perf_counter()
    scores = CCA(n_components=5, max_iter=1000).fit(*centred).transform(*centred)
    took = time.perf_counter() - began
    found = sum(np.corrcoef(scores[0][:, i], scores[1][:, i])[0, 1] for i in range(5))
    return [*rows, {"row": "scikit-learn CCA (NIPALS, no ridge)", "batches to 1 %": None, "relative gap": 1 - found / best, "seconds": took}]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    parser = report.parser(__doc__, "smaller problems, fewer rounds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the tables")
    options = parser.parse_args(argv)
    quick, tables = options.quick, {}
    rounds = 3 if quick else 7
    if "step" in options.only:
        tables["One step"] = step(rounds, *((200, 50) if quick else (1000, 500)))
    if "stream" in options.only:
        tables["One step of streaming CCA"] = stream(rounds, *(((256, 512), 64, 4) if quick else ((2048, 4096, 8192), 512, 16)))
    if "batch" in options.only:
        tables["A batch of problems"] = batch(rounds, *((8, 16, 2) if quick else (64, 64, 8)))
    if "whole" in options.only:
        tables["A whole solution"] = whole(*((100, 5, 1e-6) if quick else (1000, 10, 1e-8)))
    if "digits" in options.only:
        tables["Canonical correlations of digits"] = digits(100 if quick else 2000)
    left_out = ", ".join(name for name in ("pymanopt",) if importlib.util.find_spec(name) is None)
    report.show(tables, options, **{"left out": left_out or "nothing"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
