"""Hypergradients: one from a given inner point, one from nothing, and one with a million hyper-parameters, beside other packages.

One: logistic regression with 200 penalties and 2000 rows, float64; the inner point is 1e-3 from the solution. Every row gets the same point; errors
are relative, against the hypergradient at the solution.
Whole: the same problem from x = 0: inner solver and hypergradient together, at several inner tolerances. The bar is a relative error of 1e-6. Rows
named *inside jit* run as one compiled program, as the peers do; the others return to Python in between, with history and checks.
Cleaning: one weight per sample, float32, conjugate gradients.
Batch: 64 settings of the breast cancer problem, one vmap against a loop over a compiled call.
Peers (jaxopt, optimistix) are used as their documentation shows, with the tolerances named in the row; those that are not installed are left out.

    python benchmarks/hypergradient.py [--quick] [--only one whole cleaning batch] [--json | --markdown]
"""

from __future__ import annotations

import importlib.util
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
from theorylab.lab.files import load_module

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))

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
    """Median milliseconds of interleaved calls, after one call of each that compiles."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - began)
    return {name: 1e3 * float(np.median(took)) for name, took in times.items()}


def energy(x: jax.Array, y: jax.Array, data: Any) -> jax.Array:
    """The inner energy as a user of another package writes it."""
    A, b = data
    return jnp.mean(jax.nn.softplus(-b * (A @ x))) + jnp.sum(jnp.exp(y) * x * x) / (2 * x.shape[0])


def outer_loss(x: jax.Array, data: Any) -> jax.Array:
    A, b = data
    return jnp.mean(jax.nn.softplus(-b * (A @ x)))


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def one(rounds: int, size: tuple[int, int, int]) -> Rows:
    """One hypergradient from one inner point."""
    problem, y, u = logistic(*size)
    y = jnp.asarray(y)
    solution = hg.reference(problem, y)
    exact = hg.hypergradient(problem, solution, y, hg.NewtonPoint()).value
    x, train, valid = solution + 1e-3 * u, (problem.A, problem.b), (problem.A_out, problem.b_out)
    calls: dict[str, Callable[[], Any]] = {
        name: (lambda how=how: hg.hypergradient(problem, x, y, how).value) for name, how in {
            "plain, Cholesky": hg.Plain(), "one-point, Cholesky (default)": hg.OnePoint(), "Newton point": hg.NewtonPoint(),
            "plain, CG 1e-6": hg.Plain(linear=hg.CG(tolerance=1e-6)), "one-point, CG 1e-10": hg.OnePoint(linear=hg.CG(tolerance=1e-10)),
            "Neumann, 100 terms": hg.Neumann(100)}.items()}

    @jax.jit
    def dense(x: jax.Array, y: jax.Array, train: Any, valid: Any) -> jax.Array:
        H, F2 = jax.hessian(energy)(x, y, train), jax.jacobian(jax.grad(energy), 1)(x, y, train)
        return -F2.T @ jnp.linalg.solve(H, jax.grad(outer_loss)(x, valid))

    calls["jax.hessian and solve, all derivatives by autodiff"] = lambda: dense(x, y, train, valid)
    if installed("jaxopt"):
        from jaxopt import linear_solve
        from jaxopt.implicit_diff import root_vjp

        def peer(solve: Callable) -> Callable:
            F = jax.grad(energy)
            return jax.jit(lambda x, y, train, valid: root_vjp(F, x, (y, train), jax.grad(outer_loss)(x, valid), solve=solve)[0])

        for name, solve in (("jaxopt root_vjp, normal CG (default)", linear_solve.solve_normal_cg), ("jaxopt root_vjp, CG", linear_solve.solve_cg)):
            run = peer(lambda matvec, b, solve=solve, **kw: solve(matvec, b, tol=1e-10, **kw))
            calls[name + " 1e-10"] = lambda run=run: run(x, y, train, valid)
    took = clock(calls, rounds)
    size_of = float(jnp.linalg.norm(exact))
    return [{"row": name, "relative error": float(jnp.linalg.norm(call() - exact)) / size_of, "median (ms)": took[name],
             "row / plain": took[name] / took["plain, Cholesky"]} for name, call in calls.items()]


def whole(rounds: int, size: tuple[int, int, int]) -> Rows:
    """From x = 0 to the hypergradient."""
    problem, y, _ = logistic(*size)
    y = jnp.asarray(y)
    exact = hg.hypergradient(problem, hg.reference(problem, y), y, hg.NewtonPoint()).value
    train, valid, zero = (problem.A, problem.b), (problem.A_out, problem.b_out), jnp.zeros(problem.n)
    calls: dict[str, Callable[[], Any]] = {}

    def ours(level: float, how: Any, compiled: bool) -> Callable[[], Any]:
        def run() -> Any:
            sol = tl.iterate(problem.inner(y), hg.LBFGS(), steps=1000, stop=tl.Below("residual", level), keep="last")
            return hg.hypergradient(problem, sol.value, y, how).value
        inside = jax.jit(lambda problem, y: hg.hypergradient(problem, tl.iterate(
            problem.inner(y), hg.LBFGS(), steps=1000, stop=tl.Below("residual", level), keep="last").value, y, how).value)
        return (lambda: inside(problem, y)) if compiled else run

    for level in (1e-3, 1e-4, 1e-5, 1e-6):
        for name, how in (("plain", hg.Plain()), ("one-point", hg.OnePoint())):
            calls[f"L-BFGS {level:.0e}, {name}"] = ours(level, how, False)
        calls[f"L-BFGS {level:.0e}, one-point, inside jit"] = ours(level, hg.OnePoint(), True)
    if installed("jaxopt"):
        import jaxopt

        for level in (1e-3, 1e-6, 1e-9):
            solver = jaxopt.LBFGS(energy, tol=level, maxiter=1000)
            gradient = jax.jit(jax.grad(lambda y, train, valid, zero, solver=solver: outer_loss(solver.run(zero, y, train).params, valid)))
            calls[f"jaxopt LBFGS {level:.0e}"] = lambda gradient=gradient: gradient(y, train, valid, zero)
    import optimistix

    for level in (1e-4, 1e-8):
        minimizer = optimistix.LBFGS(rtol=level, atol=level)

        def solved(y: jax.Array, train: Any, valid: Any, zero: jax.Array, minimizer: Any = minimizer) -> jax.Array:
            found = optimistix.minimise(lambda x, args: energy(x, *args), minimizer, zero, (y, train), max_steps=1000, throw=False).value
            return outer_loss(found, valid)

        gradient = jax.jit(jax.grad(solved))
        calls[f"optimistix LBFGS {level:.0e}"] = lambda gradient=gradient: gradient(y, train, valid, zero)

    def unrolled(y: jax.Array, train: Any, valid: Any, zero: jax.Array) -> jax.Array:
        step = 1.0 / (jnp.max(jnp.sum(train[0] ** 2, axis=1)) / 4 + jnp.max(jnp.exp(y)) / zero.shape[0])
        x = jax.lax.scan(lambda x, _: (x - 200 * step * jax.grad(energy)(x, y, train) / 10, None), zero, length=200)[0]
        return outer_loss(x, valid)

    gradient = jax.jit(jax.grad(unrolled))
    calls["200 gradient steps, unrolled"] = lambda: gradient(y, train, valid, zero)
    took = clock(calls, rounds)
    size_of = float(jnp.linalg.norm(exact))
    return [{"row": name, "relative error": float(jnp.linalg.norm(call() - exact)) / size_of, "median (ms)": took[name]}
            for name, call in calls.items()]


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

    @jax.jit
    def single(y: jax.Array) -> jax.Array:
        x = tl.iterate(problem.inner(y), hg.Newton(), steps=12, keep="last").value
        return hg.hypergradient(problem, x, y).value

    together = jax.jit(jax.vmap(single))
    took = clock({"vmap": lambda: together(ys), "loop over a compiled call": lambda: [single(y) for y in ys]}, rounds)
    return [{"settings": settings, "row": name, "median (ms)": value, "row / vmap": value / took["vmap"]} for name, value in took.items()]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    parser = report.parser(__doc__, "smaller problems, fewer rounds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the tables")
    options = parser.parse_args(argv)
    quick, rounds = options.quick, 3 if options.quick else 21
    size, tables = (400, 40, 200) if quick else (2000, 200, 1000), {}
    if "one" in options.only:
        tables["One hypergradient"] = one(rounds, size)
    if "whole" in options.only:
        tables["From x = 0"] = whole(rounds, size)
    if "cleaning" in options.only:
        tables["Data cleaning"] = cleaning(3 if quick else 7, (20_000,) if quick else (200_000, 1_000_000))
    if "batch" in options.only:
        tables["A batch of settings"] = batch(3 if quick else 7, 8 if quick else 256)
    left_out = ", ".join(name for name in ("jaxopt",) if not installed(name))
    report.show(tables, options, **{"left out": left_out or "nothing"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
