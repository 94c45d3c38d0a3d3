"""What the driver costs: `iterate` against a bare `lax.while_loop`, optimistix, and a Python loop over a compiled step.

Gradient descent on a quadratic, the same arithmetic in every row. First call: process CPU seconds, compilation included. Steady
state: median wall time of interleaved repeats. The bare loop computes and records nothing but the iterate.
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
from theorylab.lab.files import load_module

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))


class Quadratic(tl.Problem):
    """f(x) = x' A x / 2."""

    matrix: jax.Array

    def metrics(self, x: jax.Array) -> dict[str, jax.Array]:
        gradient = self.matrix @ x
        return {"objective": x @ gradient / 2, "residual": jnp.linalg.norm(gradient)}


class Descent(tl.Method):
    """Gradient descent."""

    step_size: Any = tl.number(0.5)

    def init(self, problem: Quadratic, x0: jax.Array, *, key: jax.Array) -> jax.Array:
        return x0

    def step(self, problem: Quadratic, x: jax.Array, *, key: jax.Array) -> jax.Array:
        return x - self.step_size * (problem.matrix @ x)

    def value(self, problem: Quadratic, x: jax.Array) -> jax.Array:
        return x


def rows(dim: int, steps: int) -> dict[str, Callable[[], Any]]:
    """The contestants, each a function that ends when the result is there."""
    import optimistix as optx

    spectrum = np.linspace(0.01, 1.0, dim)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))[0]
    matrix, x0 = jnp.asarray(basis @ np.diag(spectrum) @ basis.T), jnp.ones(dim)
    problem = Quadratic(matrix)

    @jax.jit
    def bare(matrix: jax.Array, x: jax.Array, step_size: float, limit: int) -> jax.Array:
        return jax.lax.while_loop(lambda c: c[0] < limit, lambda c: (c[0] + 1, c[1] - step_size * (matrix @ c[1])), (0, x))[1]

    @jax.jit
    def recording(matrix: jax.Array, x: jax.Array, step_size: float, limit: int) -> tuple:
        def body(c: tuple) -> tuple:
            k, x, objective, residual = c
            x = x - step_size * (matrix @ x)
            gradient = matrix @ x
            return k + 1, x, objective.at[k].set(x @ gradient / 2), residual.at[k].set(jnp.linalg.norm(gradient))

        return jax.lax.while_loop(lambda c: c[0] < limit, body, (0, x, jnp.zeros(steps), jnp.zeros(steps)))

    step = jax.jit(lambda matrix, x, step_size: x - step_size * (matrix @ x))

    def python_loop() -> None:
        x = x0
        for _ in range(steps):
            x = step(matrix, x, 0.5)
        x.block_until_ready()

    solver = optx.GradientDescent(learning_rate=0.5, rtol=0.0, atol=1e-300)
    energy = lambda x, a: x @ (a @ x) / 2

    def optimistix() -> None:
        optx.minimise(energy, solver, x0, args=matrix, max_steps=steps, throw=False).value.block_until_ready()

    return {
        "bare while_loop": lambda: bare(matrix, x0, 0.5, steps).block_until_ready(),
        "while_loop that records two metrics": lambda: jax.block_until_ready(recording(matrix, x0, 0.5, steps)),
        "iterate, row at every step": lambda: tl.iterate(problem, Descent(0.5), x0, steps=steps),
        "iterate, row at every 10th step": lambda: tl.iterate(problem, Descent(0.5), x0, steps=steps, every=10),
        "iterate, last row only": lambda: tl.iterate(problem, Descent(0.5), x0, steps=steps, every=steps, keep="last"),
        "optimistix GradientDescent, no history": optimistix,
        "Python loop over a jitted step": python_loop,
    }


def measure(dim: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """First call and steady state of each contestant; repeats are interleaved so that drift of the machine meets all alike."""
    contestants, first, times = rows(dim, steps), {}, {}
    for name, run in contestants.items():
        began = time.process_time()
        run()
        first[name] = time.process_time() - began
        run()
    for _ in range(repeats):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            times.setdefault(name, []).append(time.perf_counter() - began)
    base = np.array(times["bare while_loop"])
    return [{"d": dim, "steps": steps, "row": name, "first call (CPU-s)": first[name], "median (ms)": 1e3 * float(np.median(t)),
             "row / bare": float(np.median(np.array(t) / base))} for name, t in times.items()]


def main(argv: list[str] | None = None) -> int:
    """Print the table; `--json` for machines."""
    parser = report.parser(__doc__, "one small size, fewer repeats")
    parser.add_argument("--repeats", type=int, help="interleaved calls of every row (default 15; 3 with --quick)")
    parser.add_argument("--sizes", type=int, nargs="*", help="dimensions of the quadratic (default 50 200 400; 50 with --quick)")
    parser.add_argument("--steps", type=int, default=5000)
    options = parser.parse_args(argv)
    repeats, sizes = options.repeats or (3 if options.quick else 15), options.sizes or ([50] if options.quick else [50, 200, 400])
    report.show({"Gradient descent on a quadratic": [row for dim in sizes for row in measure(dim, options.steps, repeats)]}, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
