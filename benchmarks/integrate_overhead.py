"""What `integrate` costs beside a bare compiled diffrax call and SciPy, on one trajectory close to its blow-up.

The problem is the factor equation of a Gaussian under softmax attention, L' = L (K L)^T (Q L) in 8 dimensions, up to 99 % of its blow-up
time. Its closed form, Sigma(t) = (I - t (A + A^T))^{-1} with A = K^T Q, gives the error. Compile time and warm time are apart.

    python benchmarks/integrate_overhead.py [--repeat 50] [--json]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import theorylab as tl
from theorylab.core.integrate import integrate
from theorylab.core.stepping import I_COEFFICIENT, P_COEFFICIENT
from theorylab.lab.files import load_module

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))

DIM = 8
NEAR = 0.99


class FactorFlow(tl.Flow):
    """L' = V L (K L)^T (Q L) with V = I."""

    Q: jax.Array
    K: jax.Array

    def field(self, t: jax.Array, y: jax.Array) -> jax.Array:
        return y @ ((self.K @ y).T @ (self.Q @ y))


def problem(seed: int = 0) -> tuple[FactorFlow, np.ndarray, np.ndarray]:
    """The flow, the save times, and the exact covariance at the last of them."""
    rng = np.random.default_rng(seed)
    Q, K = rng.standard_normal((2, DIM, DIM)) / DIM**0.5
    form = K.T @ Q + Q.T @ K
    end = NEAR / np.linalg.eigvalsh(form)[-1]
    return FactorFlow(jnp.asarray(Q), jnp.asarray(K)), np.linspace(0.0, end, 11), np.linalg.inv(np.eye(DIM) - end * form)


def bare(adjoint: Any) -> Callable:
    """A jitted `diffeqsolve` with nothing around it: same solver, same controller, no blow-up test."""

    @jax.jit
    def run(flow: FactorFlow, y0: jax.Array, times: jax.Array, rtol: jax.Array, atol: jax.Array) -> Any:
        control = diffrax.PIDController(rtol=rtol, atol=atol, pcoeff=P_COEFFICIENT, icoeff=I_COEFFICIENT)
        return diffrax.diffeqsolve(diffrax.ODETerm(lambda t, y, flow: flow.field(t, y)), diffrax.Dopri8(), times[0], times[-1], None, y0, flow,
                                   saveat=diffrax.SaveAt(ts=times), stepsize_controller=control, adjoint=adjoint, throw=False).ys

    return run


def contenders(flow: FactorFlow, times: np.ndarray) -> dict[str, Callable[[float], np.ndarray]]:
    """Name to a function of the tolerance that returns the factor at the last time."""
    start, grid = jnp.eye(DIM), jnp.asarray(times)
    Q, K = np.asarray(flow.Q), np.asarray(flow.K)
    forward, default = bare(diffrax.ForwardMode()), bare(diffrax.RecursiveCheckpointAdjoint())
    solver = diffrax.Dopri8()

    def host(t: float, y: np.ndarray) -> np.ndarray:
        L = y.reshape(DIM, DIM)
        return (L @ ((K @ L).T @ (Q @ L))).ravel()

    return {
        "integrate": lambda tol: np.asarray(integrate(flow, start, times, rtol=tol, atol=tol / 100, solver=solver).value[-1]),
        "diffrax, forward mode": lambda tol: np.asarray(forward(flow, start, grid, jnp.asarray(tol), jnp.asarray(tol / 100))[-1]),
        "diffrax, default adjoint": lambda tol: np.asarray(default(flow, start, grid, jnp.asarray(tol), jnp.asarray(tol / 100))[-1]),
        "scipy DOP853": lambda tol: solve_ivp(host, times[[0, -1]], np.eye(DIM).ravel(), "DOP853", times, rtol=tol,
                                              atol=tol / 100).y[:, -1].reshape(DIM, DIM),
    }


def clock(function: Callable[[], Any], repeat: int) -> float:
    """Median wall time in milliseconds."""
    taken = []
    for _ in range(repeat):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return 1e3 * float(np.median(taken))


def measure(repeat: int) -> list[dict[str, Any]]:
    """One row per contender and tolerance."""
    flow, times, exact = problem()
    rows = []
    for name, solve in contenders(flow, times).items():
        for tol in (1e-6, 1e-10):
            wall, cpu = time.perf_counter(), time.process_time()
            factor = solve(tol)
            first = {"first call (s)": time.perf_counter() - wall, "first call (CPU-s)": time.process_time() - cpu}
            error = float(np.abs(factor @ factor.T - exact).max() / np.abs(exact).max())
            rows.append({"solver": name, "rtol": tol, **first, "warm (ms)": clock(lambda: solve(tol), repeat), "error": error})  # noqa: B023
    return rows


def overhead(repeat: int) -> dict[str, float]:
    """Milliseconds that the host side of `integrate` adds: both take one fixed step, so the work inside is the same small amount."""
    flow, times, _ = problem()
    grid, start, solver = times[[0, 1]], jnp.eye(DIM), diffrax.Tsit5()
    step = float(grid[1])

    @jax.jit
    def plain(flow: FactorFlow, y0: jax.Array, times: jax.Array, step: jax.Array) -> Any:
        return diffrax.diffeqsolve(diffrax.ODETerm(lambda t, y, flow: flow.field(t, y)), solver, times[0], times[-1], step, y0, flow,
                                   saveat=diffrax.SaveAt(ts=times), adjoint=diffrax.ForwardMode(), throw=False).ys

    on_device = jnp.asarray(grid), jnp.asarray(step)
    plain(flow, start, *on_device)
    integrate(flow, start, grid, step=step, solver=solver)
    return {"integrate (ms)": clock(lambda: integrate(flow, start, grid, step=step, solver=solver), 4 * repeat),
            "jitted diffeqsolve (ms)": clock(lambda: jax.block_until_ready(plain(flow, start, *on_device)), 4 * repeat)}


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = report.parser(__doc__, "fewer calls per warm time")
    parser.add_argument("--repeat", type=int, help="calls per warm time (default 50; 5 with --quick)")
    options = parser.parse_args(argv)
    repeat = options.repeat or (5 if options.quick else 50)
    report.show({"Ten save times on the way to a blow-up": measure(repeat), "One fixed step, host overhead included": [overhead(repeat)]}, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
