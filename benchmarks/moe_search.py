"""How often the routing search finds the maximum: the companion's settings, and random mixtures of up to 8 experts and 5 inputs.

Each data set is searched from eight starts that know nothing of the truth. A start succeeds if it ends at most 2e-3 nats per row below EM from
the truth; a data set, if one of its first four starts (or of all eight, the default of `tl.solve`) does. Random mixtures are new for every data
set: gates with slopes of size 3 (ranked by slopes) or the Voronoi cells of random centers (ranked by logits), lines of unit slopes whose levels are
2 apart, variances 0.1, every expert active on a third of its fair share at least; inputs uniform on [-1, 1] in each coordinate. Bounds are
one-sided, 95 % (Clopper and Pearson).

    python benchmarks/moe_search.py [--quick] [--only NUMBER ...] [--sets N] [--out FOLDER] [--json | --markdown]

With `--out` finished data sets are kept, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import moe
from theorylab.core.keys import stream
from theorylab.lab.files import load_module

report: ModuleType = load_module(Path(__file__).with_name("_report.py"))

SUCCESS = -2e-3
STARTS, GROUP, ROUNDS = 8, 4, 25
SLOPE, CELL = 3.0, 6.0  # of gates ranked by slopes, and how steep logits are across a Voronoi cell
LEVEL, VARIANCE, SHARE = 2.0, 0.1, 1 / 3


class Setting(NamedTuple):
    """A row of the table: how the truth is made, and the size of the study."""

    name: str
    experts: int
    active: int
    dim: int
    selection: str
    rows: int
    sets: int


SETTINGS = (
    Setting("S0", 2, 1, 1, "logit", 1000, 40), Setting("S3", 4, 2, 2, "slope", 1500, 20), Setting("S3", 4, 2, 2, "logit", 1500, 20),
    Setting("random", 3, 2, 1, "logit", 1000, 20), Setting("random", 3, 1, 2, "logit", 1000, 20), Setting("random", 4, 2, 3, "slope", 1500, 20),
    Setting("random", 6, 2, 2, "logit", 2000, 10), Setting("random", 6, 3, 3, "slope", 2000, 10), Setting("random", 6, 2, 5, "slope", 2000, 10),
    Setting("random", 8, 2, 2, "logit", 3000, 5), Setting("random", 8, 2, 5, "logit", 3000, 5), Setting("random", 8, 4, 5, "slope", 3000, 5),
)


def truth_of(name: str, k: int, K: int, d: int, selection: str, key: jax.Array) -> moe.Mixture:
    """The true mixture of one data set."""
    if name != "random":
        return moe.example(name, selection=selection)

    def draw(key: jax.Array) -> moe.Mixture:
        centers = jax.random.uniform(stream(key, "centers"), (k, d), minval=-1.0, maxval=1.0)
        ways = jax.random.normal(stream(key, "ways"), (k, d))
        slopes = SLOPE * ways / jnp.linalg.norm(ways, axis=1, keepdims=True)
        small = 0.2 * jax.random.normal(stream(key, "small"), (k,))
        gate, intercept = (slopes, small) if selection == "slope" else (CELL * centers, small - CELL * jnp.sum(centers**2, axis=1) / 2)
        levels = LEVEL * (jax.random.permutation(stream(key, "levels"), k).astype(gate.dtype) - (k - 1) / 2)
        return moe.Mixture(intercept, gate, jax.random.normal(stream(key, "lines"), (k, d)), levels, jnp.full(k, VARIANCE), K, selection)

    x = jax.random.uniform(stream(key, "grid"), (1000, d), minval=-1.0, maxval=1.0)
    poor = lambda m: jnp.min(jnp.mean(m.routing(x).astype(x.dtype), axis=0)) < SHARE * K / k
    again = lambda state: (state[0] + 1, draw(jax.random.fold_in(key, state[0])))
    return jax.lax.while_loop(lambda state: poor(state[1]), again, again((jnp.zeros((), jnp.int32), None)))[1]


def deficits(params: dict[str, Any], key: jax.Array, i: Any) -> dict[str, jax.Array]:
    """Log-likelihood per row above that of EM from the truth, at the end of each start; traced."""
    name, k, K, d, selection, n = (params[field] for field in Setting._fields[:-1])
    truth = truth_of(name, k, K, d, selection, stream(key, "truth"))
    likelihood = moe.Likelihood(*truth.sample(n, key=stream(key, "data"), low=0.0 if name == "S0" else -1.0), k, K, selection)
    aim = tl.iterate(likelihood, moe.EM(), truth, steps=300, stop=tl.Below("gain", 1e-10), keep="last").history.columns["log_likelihood"][-1]

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        # One start after another: on one core a batch would wait for its slowest lane.
        found = tl.iterate(moe.Routing(likelihood), moe.RoutingSearch(), key=key, steps=ROUNDS, stop=tl.Below("gain", 1e-4 / n), keep="last")
        return found.history.columns["log_likelihood"][-1], found.steps

    values, steps = jax.lax.map(one, jax.random.split(stream(key, "starts"), STARTS))
    return {"deficit": (values - aim) / n, "steps": steps}


def bound(good: int, tried: int) -> float:
    """One-sided lower bound of a share, level 95 %."""
    from scipy.stats import beta

    return float(beta.ppf(0.05, good, tried - good + 1)) if good else 0.0


def row_of(setting: Setting, sets: int, out: Path | None) -> dict[str, Any]:
    """Search all data sets of a setting."""
    params = dict(zip(Setting._fields[:-1], setting[:-1], strict=True))
    folder = None if out is None else out / "-".join(map(str, setting[:-1]))

    def study(count: int) -> np.ndarray:
        return tl.sweep(deficits, params, count, key=2026, chunk=1, out=folder, shapes=("experts", "active", "dim", "rows"))["deficit"]

    study(1)  # compiles
    began = time.process_time()
    found = study(sets)
    took = (time.process_time() - began) / max(sets - 1, 1) / STARTS
    good = found > SUCCESS
    four, eight = (int(good[:, :m].any(axis=1).sum()) for m in (GROUP, STARTS))
    return {"setting": setting.name, "k": setting.experts, "K": setting.active, "d": setting.dim, "ranked by": setting.selection, "n": setting.rows,
            "data sets": sets, "one start": f"{int(good.sum())}/{good.size}", "best of 4": f"{four}/{sets}", "share at least": bound(four, sets),
            "best of 8": f"{eight}/{sets}", "this share at least": bound(eight, sets),
            "mean surplus, best of 4 (nats per row)": f"{float(found[:, :GROUP].max(axis=1).mean()):+.4f}", "CPU s per start": took}


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    parser = report.parser(__doc__, "one small setting, two data sets")
    parser.add_argument("--only", nargs="+", type=int, default=None, help="numbers of the settings, from 0")
    parser.add_argument("--sets", type=int, default=None, help="data sets of each setting, in place of its own number")
    parser.add_argument("--out", type=Path, default=None, help="folder for finished data sets")
    options = parser.parse_args(argv)
    chosen = (Setting("S0", 2, 1, 1, "logit", 200, 2),) if options.quick else [SETTINGS[i] for i in options.only or range(len(SETTINGS))]
    rows = []
    for setting in chosen:
        rows.append(row_of(setting, options.sets or setting.sets, options.out))
        print(" ".join(map(str, rows[-1].values())), file=sys.stderr, flush=True)
    report.show({"Routing search from starts that know nothing": rows}, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
