"""Fits of top-K mixtures: many small ones, one dense one, a wide one, and how often the routing search succeeds.

Many: 200 replicates of the three-expert example (n = 1000, K = 2), 50 EM iterations each, in one batch; nanoseconds per sample and iteration.
Beside it a plain NumPy EM of the dense model (no routing, no acceptance test), and scikit-learn's GaussianMixture, another model, for scale. Dense:
the two-line example with both experts active, from a start that knows nothing, to the maximum; beside R's flexmix and mixtools where R is
installed. Wide: one EM iteration with n = 50,000, 16 experts of which 4 are active, 32 inputs. Search: share of fresh data sets on which the best
of four uninformed starts reaches the likelihood of EM from the truth (within 2e-3 nats per row).

    python benchmarks/moe.py [--quick] [--only many dense wide search] [--json | --markdown]
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import moe
from theorylab.lab.files import load_module

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))

Rows = list[dict[str, Any]]
PARTS = ("many", "dense", "wide", "search")
SUCCESS = -2e-3


def cpu(call: Any, rounds: int) -> float:
    """Median CPU seconds of a call, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        began = time.process_time()
        jax.block_until_ready(call())
        times.append(time.process_time() - began)
    return float(np.median(times))


def numpy_em(x: np.ndarray, y: np.ndarray, truth: moe.Mixture, steps: int) -> float:
    """A straightforward EM of the dense model with one Newton step for the gate; the final log-likelihood."""
    k, z = truth.experts, np.stack([np.ones_like(x), x], axis=1)
    W, theta, var = (np.array(a) for a in (truth.gate_matrix, truth.expert_matrix, truth.variance))
    total = 0.0
    for _ in range(steps):
        u = z @ W.T
        gate = np.exp(u - u.max(1, keepdims=True))
        gate /= gate.sum(1, keepdims=True)
        q = np.log(gate) - 0.5 * np.log(2 * np.pi * var) - (y[:, None] - z @ theta.T) ** 2 / (2 * var)
        top = q.max(1, keepdims=True)
        r = np.exp(q - top)
        total = float((np.log(r.sum(1)) + top[:, 0]).sum())
        r /= r.sum(1, keepdims=True)
        for j in range(k):
            gram = (z * r[:, j: j + 1]).T @ z
            theta[j] = np.linalg.solve(gram, z.T @ (r[:, j] * y))
            var[j] = (r[:, j] * (y - z @ theta[j]) ** 2).sum() / r[:, j].sum()
        slope = ((r - gate)[:, :-1].T @ z).ravel()
        bent = np.zeros((2 * (k - 1), 2 * (k - 1)))
        for a in range(k - 1):
            for b in range(k - 1):
                weight = gate[:, a] * ((a == b) - gate[:, b])
                bent[2 * a: 2 * a + 2, 2 * b: 2 * b + 2] = (z * weight[:, None]).T @ z
        W[:-1] += np.linalg.solve(bent + 1e-8 * np.trace(bent) / len(bent) * np.eye(len(bent)), slope).reshape(k - 1, 2)
    return total


def many(rounds: int, replicates: int, n: int, steps: int) -> Rows:
    """A batch of small fits."""
    from sklearn.mixture import GaussianMixture

    truth = moe.example("S1")
    draws = [truth.sample(n, key=seed, low=-1.0, high=1.0) for seed in range(replicates)]
    x, y = jnp.stack([d.x for d in draws]), jnp.stack([d.y for d in draws])

    @jax.jit
    def fit(x: jax.Array, y: jax.Array) -> jax.Array:
        return tl.iterate(moe.Likelihood(x, y, 3, 2), moe.EM(), truth, steps=steps, every=steps, keep="last").history["log_likelihood"][-1]

    together = jax.jit(jax.vmap(fit))
    work, few = replicates * n * steps, min(10, replicates)
    seconds = {"one batch, K = 2, with the acceptance test": cpu(lambda: together(x, y), rounds) / work,
               "one fit after another, compiled": cpu(lambda: [fit(*pair) for pair in zip(x[:few], y[:few], strict=True)], rounds) / few / n / steps}
    plain = np.asarray(draws[0].x)[:, 0], np.asarray(draws[0].y)
    seconds["NumPy EM, K = 3 (dense)"] = cpu(lambda: numpy_em(*plain, truth, steps), rounds) / (n * steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is stopped on purpose
        began = time.process_time()
        found = GaussianMixture(3, max_iter=steps, tol=0.0, init_params="random", random_state=0).fit(np.stack(plain, axis=1))
    seconds["scikit-learn GaussianMixture of (x, y), another model"] = (time.process_time() - began) / (n * found.n_iter_)
    return [{"row": name, "ns per sample and iteration": 1e9 * value} for name, value in seconds.items()]


R_CODE = """
d <- read.csv("{data}"); suppressMessages(library({package}))
t0 <- sum(proc.time()[1:2])
{body}
cat(sprintf("%.6f %.6f", l, sum(proc.time()[1:2]) - t0))
"""
R_BODIES = {"flexmix": 'set.seed(1); m <- flexmix(y ~ x, data = d, k = 2, concomitant = FLXPmultinom(~x)); l <- as.numeric(logLik(m))',
            "mixtools": 'set.seed(1); m <- hmeEM(d$y, cbind(d$x), k = 2, maxit = 1000, verb = FALSE); l <- m$loglik'}


def dense(rounds: int, sizes: tuple[int, ...]) -> Rows:
    """One dense fit from an uninformed start."""
    rows: Rows = []
    for n in sizes:
        truth = moe.example("S0", active=2, selection="slope")
        x, y = truth.sample(n, key=0)
        likelihood = moe.Likelihood(x, y, 2, 2)

        def ours(likelihood: Any = likelihood) -> Any:
            start = likelihood.start(jax.random.key(0))
            return tl.iterate(likelihood, moe.EM(), start, steps=500, stop=likelihood.goal(1e-6), keep="last", throw=False)

        reached = float(ours().history["log_likelihood"][-1])
        rows.append({"n": n, "row": "start and EM, until the score is below 1e-6", "log-likelihood": reached,
                     "seconds": cpu(lambda ours=ours: ours().value, rounds)})
        rows += [{"n": n, "row": f"R {name}", "log-likelihood": value, "seconds": took}
                 for name, value, took in in_r(np.asarray(x)[:, 0], np.asarray(y))]
    return rows


def in_r(x: np.ndarray, y: np.ndarray) -> list[tuple[str, float, float]]:
    """Log-likelihood and CPU seconds of the R packages that are installed."""
    if shutil.which("Rscript") is None:
        return []
    found = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.csv"
        np.savetxt(data, np.stack([x, y], axis=1), delimiter=",", header="x,y", comments="")
        for name, body in R_BODIES.items():
            done = subprocess.run(["Rscript", "-e", R_CODE.format(data=data, package=name, body=body)], capture_output=True, text=True, check=False)
            numbers = done.stdout.split()[-2:]
            if done.returncode == 0 and len(numbers) == 2:
                found.append((name, float(numbers[0]), float(numbers[1])))
    return found


def wide(rounds: int, sizes: tuple[int, ...], k: int, d: int, K: int) -> Rows:
    """One iteration of a wide fit."""
    rows: Rows = []
    for n in sizes:
        rng = np.random.default_rng(0)
        gates, experts = rng.standard_normal((k, d + 1)), rng.standard_normal((k, d + 1))
        truth = moe.Mixture.from_matrices(jnp.asarray(gates), jnp.asarray(experts), jnp.ones(k), K, "logit")
        x, y = truth.sample(rng.standard_normal((n, d)), key=0)
        likelihood = moe.Likelihood(x, y, k, K, "logit")
        for gate in ("newton", "bohning"):
            run = {steps: cpu(lambda steps=steps, gate=gate, likelihood=likelihood, truth=truth: tl.iterate(
                likelihood, moe.EM(gate=gate), truth, steps=steps, every=steps, keep="last").value, rounds) for steps in (1, 4)}
            tried = int(tl.iterate(likelihood, moe.EM(gate=gate), truth, steps=4, every=4, keep="last").history["rejected"][-1])
            rows.append({"n": n, "gate": gate, "CPU seconds per iteration": (run[4] - run[1]) / 3, "fractions refused in 4 iterations": tried})
    return rows


def search(seeds: int, cases: tuple[tuple[str, int, dict[str, Any]], ...]) -> Rows:
    """Successes of the routing search."""
    rows: Rows = []
    for name, n, settings in cases:
        deficits, took = [], []
        for seed in range(seeds):
            truth = moe.example(name, **settings)
            x, y = truth.sample(n, key=1000 + seed, low=-1.0 if name == "S3" else 0.0)
            likelihood = moe.Likelihood(x, y, truth.experts, truth.active, truth.selection)
            aim = tl.iterate(likelihood, moe.EM(), truth, steps=300, keep="last").history["log_likelihood"][-1]
            began = time.process_time()
            sol = tl.iterate(moe.Routing(likelihood), moe.RoutingSearch(), runs=4, steps=25, key=seed, keep="last")
            took.append(time.process_time() - began)
            deficits.append((float(np.max(sol.history.last("log_likelihood"))) - float(aim)) / n)
        rows.append({"setting": f"{name}, K = {truth.active}, {truth.selection}", "k": truth.experts, "d": truth.dim, "n": n, "data sets": seeds,
                     "successes": int(sum(deficit > SUCCESS for deficit in deficits)), "mean surplus (nats per row)": f"{np.mean(deficits):+.4f}",
                     "CPU s per data set": float(np.median(took))})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    parser = report.parser(__doc__, "smaller problems, fewer rounds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the tables")
    options = parser.parse_args(argv)
    quick, tables = options.quick, {}
    rounds = 1 if quick else 5
    if "many" in options.only:
        tables["Many small fits"] = many(rounds, *((10, 200, 10) if quick else (200, 1000, 50)))
    if "dense" in options.only:
        tables["One dense fit"] = dense(rounds, (500,) if quick else (1000, 10_000))
    if "wide" in options.only:
        tables["A wide fit"] = wide(rounds, *(((1000,), 4, 3, 2) if quick else ((25_000, 50_000), 16, 32, 4)))
    if "search" in options.only:
        cases = (("S0", 1000, {}), ("S3", 1500, {}), ("S3", 1500, {"selection": "logit"}))
        tables["Routing search, best of four uninformed starts"] = search(1 if quick else 20, cases[:1] if quick else cases)
    report.show(tables, options, **{"left out": "R packages (no Rscript)" if shutil.which("Rscript") is None else "nothing"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
