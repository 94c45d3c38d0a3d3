"""The rank of 600 limits, the factor form in high dimension, and thousands of heads in one call.

Ranks: the draws of the rank figure of the paper, softmax and L2 attention, V = I and V random, d = 3, 4, 5, 100 heads each. Ours is `limits`: limit,
rank and status of every head. The published scheme (NumPy: Euler steps and a projection, until the derivative is small) is run on a few draws of each
panel, with the step of the panel, and scaled; SciPy's LSODA follows the factor equation to depth 1e9 on the same few. Both tell a rank by counting
eigenvalues above 0.1, which is not the rank of the limit.

Form: one velocity, in the factor form with r columns and in the covariance form.

Ensemble: regimes and blow-up times of random heads in one call, every head with a status of its own.

    python benchmarks/transformer_ranks.py [--quick] [--json | --markdown]
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

from theorylab import transformer_pde as tp
from theorylab.errors import RunWarning
from theorylab.lab.files import load_module

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))

Array = np.ndarray
# step of the published scheme and its threshold, by kind, values and dimension
STEPS = {("softmax", "V = I"): (0.09, 0.05, 0.02), ("softmax", "V random"): (0.09, 0.06, 0.02),
         ("l2", "V = I"): (0.09, 0.06, 0.02), ("l2", "V random"): (0.15, 0.15, 0.15)}


def draws(kind: str, values: str, heads: int) -> dict[int, tuple[Array, Array, Array]]:
    """Queries, values and starts of the published figure by dimension, each with a leading axis of heads."""
    queries, starts, found = np.random.RandomState(40), None, {}
    matrices = np.random.RandomState(26 if kind == "softmax" else 27)
    for dim in (3, 4, 5):
        Q = np.stack([queries.randn(dim // 2, dim) for _ in range(100)])
        V = np.stack([np.eye(dim)] * 100)
        if values == "V random":
            roots = np.stack([matrices.randn(dim, dim) for _ in range(100)])
            V = np.swapaxes(roots, 1, 2) @ roots
        starts = np.random.RandomState(41)
        roots = np.stack([starts.randn(dim, dim) for _ in range(100)])
        found[dim] = tuple(a[:heads] for a in (Q, V, roots @ np.swapaxes(roots, 1, 2)))
    return found


def head(kind: str, dim: int, Q: Any, V: Any) -> tp.Attention:
    """The published scaling: the logits of both kinds are divided by the root of the dimension, the keys of L2 are not."""
    return tp.Softmax(Q, -Q, V, scale=dim**-0.5) if kind == "softmax" else tp.L2(Q * dim**-0.5, -Q, V)


def right_side(kind: str, dim: int, Q: Array, V: Array, cov: Array) -> Array:
    """The derivative of the covariance as the published scripts compute it."""
    A = -Q.T @ Q / np.sqrt(dim)
    half = V @ cov @ A @ cov if kind == "softmax" else 2 * V @ cov @ np.linalg.inv(np.eye(dim) + 2 * Q.T @ Q @ cov) @ A @ cov
    return half + half.T


def published(kind: str, dim: int, Q: Array, V: Array, cov: Array, step: float, low: float) -> Array:
    """The published scheme: its last covariance."""
    for _ in range(90_000):
        change = right_side(kind, dim, Q, V, cov)
        values, vectors = np.linalg.eigh(cov + step * change)
        cov = vectors @ np.diag(np.where(values < 0, 1e-14, values)) @ vectors.T
        if np.linalg.norm(change) < low:
            break
    return cov


def by_scipy(kind: str, dim: int, Q: Array, V: Array, cov: Array) -> Array:
    """LSODA on the factor equation to depth 1e9."""
    A, P = -Q.T @ Q / np.sqrt(dim), Q.T @ Q

    def field(t: float, y: Array) -> Array:
        L = y.reshape(dim, dim)
        gain = L.T @ A @ L
        return (V @ L @ (gain if kind == "softmax" else 2 * np.linalg.solve(np.eye(dim) + 2 * L.T @ P @ L, gain))).ravel()

    end = solve_ivp(field, (0.0, 1e9), np.linalg.cholesky(cov).ravel(), "LSODA", rtol=1e-7, atol=1e-12).y[:, -1].reshape(dim, dim)
    return end @ end.T


def ranks(heads: int, few: int) -> list[dict[str, Any]]:
    """A row for each panel: what `limits` finds and how long the three take."""
    table = []
    for (kind, values), steps in STEPS.items():
        data = draws(kind, values, heads)
        states = {dim: jax.vmap(lambda f: tp.Gaussian.from_factor(jnp.zeros(f.shape[0]), f))(jnp.linalg.cholesky(jnp.asarray(S)))
                  for dim, (_, _, S) in data.items()}
        given = {dim: (Q, np.ones(heads) if values == "V = I" else V) for dim, (Q, V, _) in data.items()}     # a number: the formula applies
        flows = {dim: jax.vmap(lambda Q, V, kind=kind, dim=dim: tp.GaussianFlow(head(kind, dim, Q, V)))(*map(jnp.asarray, given[dim]))
                 for dim in given}
        ask = lambda: {dim: jax.device_get(tp.limits(flows[dim], states[dim])) for dim in flows}  # noqa: B023
        began = time.process_time()
        found = ask()
        first = time.process_time() - began
        began = time.process_time()
        found = ask()
        warm = time.process_time() - began
        exact = sum(int((limit.rank == -(-dim // 2)).sum()) for dim, limit in found.items())
        undecided = sum(int((limit.regime == tp.Regime.UNDECIDED).sum()) for limit in found.values())
        spent = {}
        for name, run in (("published", published), ("SciPy", by_scipy)):
            began = time.process_time()
            for i, (dim, (Q, V, S)) in enumerate(data.items()):
                extra = (steps[i], 1e-4 if values == "V = I" else 5e-5) if name == "published" else ()
                for j in range(few):
                    run(kind, dim, Q[j], V[j], S[j], *extra)
            spent[name] = (time.process_time() - began) * heads / few
        table.append({"panel": f"{kind}, {values}", "heads": 3 * heads, "of the exact rank": exact, "undecided": undecided,
                      "first call (CPU-s)": first, "limits (CPU-s)": warm, "published, scaled (CPU-s)": spent["published"],
                      "LSODA, scaled (CPU-s)": spent["SciPy"], "published / limits": spent["published"] / warm})
    return table


def moved_covariance(attention: tp.Attention, mean: Any, cov: Any) -> Any:
    """The derivative of a covariance."""
    half = attention.velocity(mean, cov).matrix @ cov
    return half + half.T


def forms(sizes: tuple[tuple[int, int, int], ...], rounds: int) -> list[dict[str, Any]]:
    """One velocity of softmax attention in both forms."""
    table = []
    for dim, rank, rows in sizes:
        keys = jax.random.split(jax.random.key(0), 4)
        attention = tp.Softmax(*(jax.random.normal(k, (rows, dim)) / dim**0.5 for k in keys[:2]), jax.random.normal(keys[2], (dim, dim)) / dim**0.5)
        state = tp.Gaussian.from_factor(jnp.zeros(dim), jax.random.normal(keys[3], (dim, rank)) / dim**0.5)
        factor = jax.jit(lambda a, m, f: a.factor_velocity(m, f)[1])
        cov = jax.jit(moved_covariance)
        taken = {}
        for name, run, given in (("factor", factor, state.factor), ("covariance", cov, state.cov)):
            jax.block_until_ready(run(attention, state.mean, given))
            times = []
            for _ in range(rounds):
                began = time.perf_counter()
                jax.block_until_ready(run(attention, state.mean, given))
                times.append(time.perf_counter() - began)
            taken[name] = 1e3 * float(np.median(times))
        table.append({"d": dim, "r": rank, "k": rows, "factor form (ms)": taken["factor"], "covariance form (ms)": taken["covariance"],
                      "ratio": taken["covariance"] / taken["factor"]})
    return table


def ensemble(count: int) -> list[dict[str, Any]]:
    """Random heads in one call."""
    table = []
    for kind in ("softmax", "l2", "sinkhorn"):
        keys = jax.random.split(jax.random.key(0), count)
        flows = jax.vmap(lambda key, kind=kind: tp.GaussianFlow(tp.random_attention(kind, key, dim=3)))(keys)
        states = tp.Gaussian.from_factor(jnp.zeros((count, 3)), jnp.broadcast_to(jnp.eye(3), (count, 3, 3)))
        taken = []
        for _ in range(2):
            began = time.process_time()
            regimes = np.asarray(tp.limits(flows, states).regime)
            taken.append(time.process_time() - began)
        counts = {regime.name.lower(): int((regimes == regime).sum()) for regime in tp.Regime}
        table.append({"kind": kind, "heads": count, "first call (CPU-s)": taken[0], "warm (CPU-s)": taken[1], "ms per head": 1e3 * taken[1] / count,
                      **{name: str(number) for name, number in counts.items()}})
    return table


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables; `--json` for machines, `--markdown` for the documentation."""
    parser = report.parser(__doc__, "fewer heads and rounds")
    options = parser.parse_args(argv)
    quick = options.quick
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        tables = {"Ranks of limits": ranks(10 if quick else 100, 1 if quick else 2),
                  "Forms of one velocity": forms(((256, 16, 64),) if quick else ((64, 64, 64), (256, 16, 64), (1024, 16, 64)), 3 if quick else 15),
                  "Random heads": ensemble(50 if quick else 2000)}
    report.show(tables, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
