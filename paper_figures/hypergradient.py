"""Errors of the estimators along inner gradient descent: the figures of the paper on ridge and on logistic regression, against the true distance."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from theorylab import hypergradient as hg
from theorylab.hypergradient.claims.family import Parts
from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import figsize

shared: ModuleType = load_module(Path(__file__).with_name("_hypergradient.py"))
STEPS = 400
DISTANCES = (30.0, 10.0, 1.0, 0.1, 0.01, 0.001)
EXACT = 1e-12
FLOOR = 1e-17                           # of what is drawn


class Experiment(NamedTuple):
    """One figure of the paper: its inner and outer problem, the least y, its curves, and what is known about them.

    Attributes:
        table: for each curve the geometric means over ten seeds at `DISTANCES`, the median slope below 10^-1.5 and the median constant.
        spread: largest distance to a median slope that passes.
        seed: constants of the first seed.
        gradients: norms of the hypergradients of the first three seeds.
    """

    kind: str
    objective: str
    low: float
    curves: tuple[str, ...]
    table: dict[str, tuple[tuple[float, ...], float, float]]
    spread: float
    seed: dict[str, float]
    gradients: tuple[float, ...]


def compute(this: Experiment, seeds: int, progress: Any) -> dict[str, np.ndarray]:
    """Distances and errors at the raw iterates up to the first one below 10^-3.5, a row for each seed; constants at the solution."""
    rows: dict[str, list] = {name: [] for name in ("distance", "gradient", *this.curves)}
    constants: dict[str, list[float]] = {}
    progress.start("seeds", seeds)
    for seed in range(seeds):
        run = shared.run(this.kind, this.objective, this.low, seed, STEPS)
        ways = {name: shared.ESTIMATORS[name] for name in this.curves}
        curves = hg.error_curve(run.problem, jnp.asarray(run.path), jnp.asarray(run.y), ways, solution=jnp.asarray(run.solution))
        distance = np.asarray(curves[this.curves[0]].inner)
        beyond = np.arange(len(distance)) > np.argmax(distance < shared.LAST)
        rows["distance"].append(np.where(beyond, np.nan, distance))
        rows["gradient"].append(np.linalg.norm(curves[this.curves[0]].gradient))
        for name in this.curves:
            rows[name].append(np.where(beyond, np.nan, np.asarray(curves[name].outer)))
        parts = Parts(run.problem, run.solution, run.y)
        for name, jacobian in {"Vanilla" if k == "Plain" else k: v for k, v in parts.jacobians().items()}.items():
            constants.setdefault(name, []).append(float(np.linalg.norm(jacobian, 2)))
        constants.setdefault("M", []).append(float(np.linalg.norm(parts.M, 2)))
        progress.update(seed + 1, f"seed {seed}")
    found = {name: np.array(values) for name, values in rows.items()} | {f"C {name}": np.array(values) for name, values in constants.items()}
    used = int(np.isfinite(found["distance"]).sum(1).max())
    trimmed = {name: values[:, :used] if values.ndim == 2 else values for name, values in found.items()}
    return trimmed | {"source": np.array(shared.source(this.kind)), "substitute": np.array(shared.data(this.kind)[2])}


def draw(this: Experiment, data: Any) -> Any:
    """Thin lines for the seeds, a thick one for the geometric mean."""
    import matplotlib.pyplot as plt

    picture, ax = plt.subplots(figsize=figsize(1, 0.85))
    grid = np.geomspace(shared.DISPLACED, shared.LAST, 60)
    exact = all(not this.table[name][0] for name in this.curves)
    means = {}
    for name in this.curves:
        look = shared.LOOKS[name]
        for distance, error in zip(data["distance"], data[name], strict=True):
            ax.loglog(distance, np.maximum(error, FLOOR), **{**look, "linestyle": "-"}, linewidth=0.5, alpha=0.35)
        each = [[shared.crossing(d, e, at) for d, e in zip(data["distance"], data[name], strict=True)] for at in grid]
        # Exact estimators often have an error of 0, which has no logarithm: their thick line is the arithmetic mean.
        means[name] = np.array([shared.geometric(row) if this.table[name][0] else np.mean(row) for row in each])
        ax.loglog(grid, np.maximum(means[name], FLOOR), label=name, linewidth=1.8, **look)
    ax.set(xlim=(shared.DISPLACED, shared.LAST), xlabel=r"$\|x - x^*\|$", ylabel="error of the hypergradient")
    if exact:
        ax.set_ylim(FLOOR, 1e-12)
    else:
        k = int(np.argmin(np.abs(grid - 3e-2)))
        levels = {1: 20 * max(mean[k] for mean in means.values())}
        if "Newton" in this.curves and this.table["Newton"][0]:
            levels[2] = means["Newton"][k] / 300
        for power, size in levels.items():
            ends = np.array([3e-2, 1e-3])
            line = size * (ends / 3e-2) ** power
            ax.loglog(ends, line, color="0.35", linestyle="-", linewidth=0.7)
            ax.annotate(f"order {power}", (float(np.sqrt(ends.prod())), float(np.sqrt(line.prod()))), xytext=(0, 6 if power == 1 else -8),
                        textcoords="offset points", fontsize=6, color="0.35", ha="center", va="center")
    what = f"ridge, {this.objective} G" if this.kind == "ridge" else "logistic"
    ax.set_title(f"{what}, {data['source']}", loc="left")
    shared.legend(picture, [ax], ncols=3)
    return picture


def expect(this: Experiment, check: Any, data: Any, seeds: int) -> None:
    """The numbers of the ten seeds with the data of the paper; orders alone with a substitute."""
    real = not str(data["substitute"])
    slopes, means, reached = {}, {}, np.nanmin(data["distance"], axis=1)
    check.below("every run reaches the last distance", reached, shared.LAST)
    for name in this.curves:
        pairs = list(zip(data["distance"], data[name], strict=True))
        means[name] = [shared.geometric([shared.crossing(d, e, at) for d, e in pairs]) for at in DISTANCES]
        tail = [(d <= 10**-1.5) for d, _ in pairs]
        slopes[name] = [np.polyfit(np.log(d[k]), np.log(np.maximum(e[k], 1e-300)), 1)[0] for (d, e), k in zip(pairs, tail, strict=True)]
        known, slope, constant = this.table[name]
        if not known:
            relative = (data[name] / np.maximum(1, data["gradient"])[:, None])[np.isfinite(data["distance"])]
            check.below(f"{name}: every error, over the larger of 1 and |gradient|", relative, EXACT, note="" if real else "substitute data")
            continue
        if real and seeds == 10:
            for at, measured, value in zip(DISTANCES, means[name], known, strict=True):
                note = f"{measured:.2e}; {value:.1e} known"
                check.between(f"{name}: geometric mean of the error at {at:g}", measured / value, 1 / 1.5, 1.5, note=note)
            check.equal(f"{name}: median slope", np.median(slopes[name]), slope, this.spread)
            if constant:
                check.equal(f"{name}: median constant", np.median(data[f"C {name}"]), constant, 1e-3, relative=True)
        elif real or this is not STRONG or name == "Newton":  # else too far from the asymptote
            order = 2 if name == "Newton" else 1
            check.equal(f"{name}: median slope", np.median(slopes[name]), order, 0.25, note="" if real else "substitute data")
        if name != "Newton":
            ratio = means[name][-1] / (DISTANCES[-1] * shared.geometric(data[f"C {name}"]))
            check.below(f"{name}: mean error at 0.001 over 0.001 times the mean constant", ratio, 1.1)
    if real:
        for name, value in this.seed.items():
            label = "norm of I - P^-1 F_1" if name == "M" else f"constant of {name}"
            check.equal(f"seed 0: {label}", data[f"C {name}"][0], value, 1e-5, relative=True)
        check.equal("|gradient| of the first seeds", data["gradient"][:3], np.array(this.gradients[:seeds]), 6e-3, relative=True)
    at = {name: values[-1] for name, values in means.items()}
    for better, worse in ORDER[this.kind if this.kind == "ridge" else f"logistic {this.low:g}"]:
        if (better == "Newton" or this.kind == "ridge" or (real and seeds == 10)) and better in at and worse in at:
            check.below(f"at 0.001: {better} over {worse}", at[better] / at[worse], 1)


ORDER = {
    "ridge": (("Precond", "PzPhi"), ("Precond", "ExpPhi"), ("PzPhi", "Vanilla"), ("ExpPhi", "Vanilla")),
    "logistic -1": (("Newton", "Precond"), ("Precond", "ExpPhi"), ("PzPhi", "ExpPhi"), ("ExpPhi", "Vanilla")),
    "logistic 3": (("Newton", "Precond"), ("Precond", "PzPhi"), ("Precond", "ExpPhi"), ("PzPhi", "Vanilla"), ("ExpPhi", "Vanilla")),
}
EXACTLY = ((), 0.0, 0.0)
OPT = ((1.7e2, 6.1e1, 5.7e0, 6.0e-1, 6.1e-2, 6.2e-3), 1.0, 15.97)
LINEAR = Experiment("ridge", "linear", 3.0, ("OptPhi", "Newton"), {"Newton": EXACTLY, "OptPhi": EXACTLY}, 0.05,
                    {"Vanilla": 1.18344, "Precond": 0.0514389, "PzPhi": 0.0514389, "ExpPhi": 0.0638988}, (22.3, 25.7, 24.3))
SEED = {"Vanilla": 27.419, "Precond": 4.69327, "PzPhi": 13.8776, "ExpPhi": 15.023, "OptPhi": 14.332, "M": 0.196837}
QUADRATIC = Experiment("ridge", "quadratic", 3.0, ("OptPhi", "Newton"), {"Newton": EXACTLY, "OptPhi": OPT}, 0.05, SEED, (18.0, 4.73, 20.1))
REMEDIES = Experiment("ridge", "quadratic", 3.0, ("Vanilla", "ExpPhi", "PzPhi", "Precond"), {
    "Vanilla": ((4.0e3, 4.7e2, 1.0e1, 8.7e-1, 8.7e-2, 8.7e-3), 1.0, 25.29),
    "Precond": ((2.1e1, 6.4e0, 5.0e-1, 5.1e-2, 5.3e-3, 5.4e-4), 1.0, 2.270),
    "PzPhi": ((2.0e2, 6.1e1, 5.6e0, 6.0e-1, 6.1e-2, 6.2e-3), 1.0, 15.66), "ExpPhi": ((2.0e3, 2.3e2, 8.6e0, 6.3e-1, 6.3e-2, 6.3e-3), 1.0, 16.45)},
    0.05, SEED, (18.0, 4.73, 20.1))
ALL = ("Vanilla", "ExpPhi", "PzPhi", "Precond", "Newton")
WEAK = Experiment("logistic", "logistic", -1.0, ALL, {
    "Vanilla": ((6.5e2, 2.0e2, 1.4e1, 1.6e0, 1.6e-1, 1.5e-2), 1.0, 37.41), "Newton": ((3.9e1, 2.2e1, 1.4e-1, 1.2e-3, 1.2e-5, 1.2e-7), 2.002, 0.0),
    "Precond": ((4.5e1, 2.8e1, 1.8e0, 1.9e-1, 1.9e-2, 1.9e-3), 1.0, 9.407), "PzPhi": ((5.3e1, 3.4e1, 2.6e0, 2.1e-1, 2.1e-2, 2.0e-3), 1.0, 9.631),
    "ExpPhi": ((3.2e2, 9.7e1, 1.0e1, 4.1e-1, 3.9e-2, 4.3e-3), 0.99, 49.97)}, 0.1,
    {"Vanilla": 37.688, "Precond": 7.94993, "PzPhi": 7.95934, "ExpPhi": 23.645, "M": 0.536184}, (11.6, 13.6, 16.0))
STRONG = Experiment("logistic", "logistic", 3.0, ALL, {
    "Vanilla": ((5.4e2, 1.9e2, 2.1e1, 2.1e0, 1.7e-1, 1.7e-2), 1.005, 35.82),
    "Newton": ((3.3e-1, 2.8e-1, 1.5e-2, 1.5e-5, 4.6e-8, 4.1e-10), 2.08, 0.0),
    "Precond": ((3.1e-1, 2.9e-1, 7.8e-2, 6.7e-3, 7.0e-4, 7.1e-5), 0.999, 0.2913),
    "PzPhi": ((6.2e-1, 6.1e-1, 3.1e-1, 1.8e-1, 4.2e-2, 4.3e-3), 0.996, 12.78),
    "ExpPhi": ((2.7e2, 9.6e1, 1.1e1, 1.1e0, 1.0e-1, 4.9e-3), 1.18, 12.98)}, 0.1,
    {"Vanilla": 23.0747, "Precond": 0.0507106, "PzPhi": 10.912, "ExpPhi": 10.9291, "M": 0.00825872}, (0.062, 0.512, 0.246))
PROTOCOL = (r"Inner gradient descent from a start displaced 32-fold, ten seeds (thin) and their geometric mean (thick), at the raw iterates and "
            r"against the true distance to the inner solution.")


def _register(name: str, place: str, this: Experiment, caption: str, seeds: int = 2) -> None:
    class Errors:
        """Errors of the estimators against the inner error."""

        @staticmethod
        def compute(progress, seeds):
            return compute(this, seeds, progress)

        @staticmethod
        def draw(data):
            return draw(this, data)

        @staticmethod
        def expect(check, data, seeds):
            expect(this, check, data, seeds)

    figure(f"hypergradient/{name}", source=f"{shared.PAPER}, {place}", caption=f"{caption} {PROTOCOL}", quick={"seeds": seeds},
           paper={"seeds": 10})(Errors)


_register("ridge-linear", "Figure 1a", LINEAR,
          r"Ridge regression, linear G, $y \in [3, 6]^7$: the Newton point and the Hessian map are exact at every distance.")
_register("ridge-quadratic", "Figure 1b", QUADRATIC,
          r"Ridge regression, quadratic G, $y \in [3, 6]^7$: the Newton point is exact, the Hessian map of first order.")
_register("diagonal-remedies", "Figure 2b", REMEDIES,
          r"Ridge regression, quadratic G, $y \in [3, 6]^7$, where the diagonal is a good approximation of the Hessian: preconditioning gains "
          r"a factor of 11 on the plain formula, the maps a factor of 1.5.")
_register("logistic-weak", "Figure 3a", WEAK,
          r"Logistic regression, $y \in [-1, 1]^5$; the outer rows are in raw units, as in the official code. The Newton point is of second order.")
_register("logistic-strong", "Figure 3b", STRONG,
          r"Logistic regression, $y \in [3, 6]^5$; the outer rows are in raw units. Here $\|x^*\| \approx 0.03$, so that the orders appear "
          r"below 0.01 only.")
