"""Bilinear games on two simplices of 500 actions with interior solutions: counts of steps, time, conditioning, warm-up.

Both published games are F(x) = (a x_1 + b x_2, a x_2 - b x_1) with vectors a and b. F is evaluated in this form, O(n), by every method, so six
compiled programs serve four figures. The start is the published one.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import acvi
from theorylab.lab.clock import Stopwatch
from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS, figsize

pictures: ModuleType = load_module(Path(__file__).with_name("_acvi_pictures.py"))
FIRST = "Yang, Jordan and Chavdarova, Solving Constrained Variational Inequalities via a First-order Interior Point-based Method"
SECOND = "Chavdarova, Yang, Pagliardini and Jordan, A Primal-Dual Approach to Solving Variational Inequalities with General Constraints"
N = 500
EASY = ("The solution is interior, so a step with a small penalty nearly solves the problem: see acvi/work-precision for games with solutions on the "
        "boundary.")


class Kind(NamedTuple):
    """A method, and how many of its steps or inner steps the paper counts for one of ours."""

    method: tl.Method
    counted: int = 1


def _force(z: jax.Array, args: tuple[jax.Array, jax.Array]) -> jax.Array:
    (a, b), (x1, x2) = args, (z[:N], z[N:])
    return jnp.concatenate([a * x1 + b * x2, a * x2 - b * x1])


class SimplexGame(acvi.VariationalInequality):
    """A game of this form with its solution, `strategy` for both players; judged by the relative error alone, as in the papers."""

    def __init__(self, a: Any, b: Any, strategy: Any):
        start = np.random.RandomState(0).random_sample((2, N))  # the published generator
        start /= start.sum(axis=1, keepdims=True)
        super().__init__(_force, 2 * N, (jnp.asarray(a), jnp.asarray(b)), acvi.Nonnegative(), acvi.BlockSimplex((N, N)),
                         solution=np.tile(strategy, 2), x0=start.ravel())

    def metrics(self, x):
        return {"error": jnp.linalg.norm(x - self.solution) / jnp.linalg.norm(self.solution)}


def _rotating(eta: float) -> SimplexGame:
    """The game of `acvi.bilinear_simplex`, without its matrix."""
    return SimplexGame(np.full(N, eta), np.full(N, 1 - eta), np.full(N, 1 / N))


def _conditioned(kappa: float) -> SimplexGame:
    """The game of `acvi.conditioned_bilinear`, without its matrix."""
    diagonal = np.linspace(1.0, kappa, N)
    return SimplexGame(np.zeros(N), diagonal, (1 / diagonal) / (1 / diagonal).sum())


def _exact(start: float, linear: str, **schedule: Any) -> tl.Method:
    return acvi.ACVI(0.5, acvi.MuSchedule(start, 0.5, **{"stages": 10, "inner_steps": 1, **schedule}), linear=linear, output="x")


def _inexact(start: float = 1e-6, factor: float = 0.8, stages: int = 100, inner_steps: int = 10, first_steps: int | None = None, *, inner: int = 10,
             step_size: float = 0.05) -> tl.Method:
    """I-ACVI with the published gradient steps inside, of one number and size for x and y."""
    schedule = acvi.MuSchedule(start, factor, stages, inner_steps, inner_steps if first_steps is None else first_steps)
    return acvi.InexactACVI(0.5, schedule, inner=acvi.GradientDescentAscent(step_size), inner_steps=inner, barrier_steps=inner,
                            barrier_step_size=step_size, leave="fail", output="x")


def _kinds(step_size: float) -> dict[str, Kind]:
    """The methods of the two figures of the rotating game."""
    return {"GDA": Kind(acvi.GradientDescentAscent(step_size)), "EG": Kind(acvi.Extragradient(step_size), 2),
            "OGDA": Kind(acvi.OptimisticGradient(step_size)), "LA5-GDA": Kind(acvi.Lookahead(step_size), 5),
            "ACVI": Kind(_exact(1e-6, "blocks")), "I-ACVI": Kind(_inexact())}


def _track(problem: tl.Problem, method: tl.Method, steps: int, level: float = -1.0, every: int = 1) -> tl.Solution:
    """A run to relative error `level`. One form for all uses, so that they share their compiled programs."""
    return tl.iterate(problem, method, steps=steps, every=every, stop=tl.Below("error", level), throw=False)


def _run(problem: tl.Problem, method: tl.Method, level: float, steps: int) -> tuple[int, int]:
    """Steps until the relative error is below `level`, and evaluations of F; -1 where it is not in so many steps."""
    run = _track(problem, method, steps, level)
    there = run.status == tl.Status.CONVERGED
    return (int(run.steps), int(run.history["operator_evaluations"][-1])) if there else (-1, -1)


# ------------------------------------------------------------------------------------------------ rotation

FIVE = {"GDA": [500, 66, 23, 14, 10], "EG": [150, 64, 44, 36, 30], "OGDA": [63, 32, 23, 17, 14], "LA5-GDA": [95, 60, 45, 40, 35],
        "ACVI": [4, 5, 5, 4, 3], "I-ACVI": [44, 25, 17, 12, 9]}
THIRTY = {
    "GDA": [300] * 5 + [151, 96, 71, 56, 46, 39, 34, 30, 27, 25, 22, 21, 19, 18, 17, 16, 15, 14, 13, 13, 12, 11, 11, 10, 10],
    "EG": [150, 124, 108, 94, 86, 78, 72, 66, 62, 58, 54, 52, 50, 48, 46, 44, 42, 40, 40, 38, 38, 36, 36, 34, 34, 32, 32, 32, 30, 30],
    "OGDA": [63, 55, 49, 45, 41, 38, 35, 33, 31, 29, 28, 26, 25, 24, 23, 22, 21, 20, 20, 19, 18, 18, 17, 17, 16, 16, 15, 15, 14, 14],
    "LA5-GDA": [95, 85, 80, 75, 70, 65, 60, 60, 55, 55, *[50] * 4, *[45] * 4, *[40] * 6, *[35] * 6],
    "ACVI": [4, 4, 4, *[5] * 13, *[4] * 13, 3],
    "I-ACVI": [44, 40, 37, 34, 31, 29, 27, 26, 24, 23, 21, 20, 19, 18, 17, 16, 16, 15, 14, 13, 13, 12, 11, 11, 10, 10, 10, 10, 9, 9],
}
QUICK = ("EG", "ACVI", "I-ACVI")


@figure("acvi/rotation", source=f"{FIRST} (HBG), and {SECOND}", quick={"points": 5, "cap": 500, "methods": QUICK, "against_matrix": False},
        paper={"points": 30, "cap": 300, "methods": tuple(THIRTY), "against_matrix": True},
        caption=r"Iterations to relative error 0.02 on $\frac{\eta}{2}|x_1|^2 + (1-\eta)x_1^\top x_2 - \frac{\eta}{2}|x_2|^2$ over two simplices of "
                r"500 actions; small $\eta$ is rotation. As in the papers an EG step counts as two iterations, one of LA5 as five, one of ACVI or "
                "I-ACVI as one, although I-ACVI takes 20 gradient steps in it. GDA reaches the limit of 300 where its curve ends. ACVI needs 3 to 5 "
                "iterations; the 18, 9, 6, 6, 5 of the published code at five points come from a broadcasting error in its y-step. " + EASY)
class Rotation:
    """Iterations against the share of rotation."""

    @staticmethod
    def compute(progress, points, cap, methods, against_matrix):
        kinds = {name: kind for name, kind in _kinds(0.3).items() if name in methods}
        etas = np.linspace(0.01, 0.99, points)
        counts: dict[str, Any] = {name: [] for name in kinds}
        progress.start("points", points)
        for i, eta in enumerate(etas):
            problem = _rotating(eta)
            for name, kind in kinds.items():
                steps = _run(problem, kind.method, 0.02, cap // kind.counted)[0]
                counts[name].append(cap if steps < 0 else kind.counted * steps)
            progress.update(i + 1)
        if against_matrix:
            at = jnp.linspace(0, 1, 2 * N)
            counts["difference"] = np.asarray(acvi.bilinear_simplex(N, 0.3).operator(at) - _rotating(0.3).operator(at))
        return {"eta": etas, "cap": np.array(cap), **counts}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, ax = plt.subplots(figsize=figsize(1, 0.8))
        for name in THIRTY:
            if name in data:
                counts, look = np.where(data[name] < data["cap"], data[name], np.nan), pictures.LOOKS[name]
                ax.semilogy(data["eta"], counts, label=name, marker=pictures.MARKS[name], markersize=2.5, **look)
        ax.set(xlabel=r"$\eta$ (the rotation has the weight $1-\eta$)", ylabel="iterations", xlim=(0, 1), ylim=(2, 400))
        pictures.legend(picture, [ax], ncols=3)
        return picture

    @staticmethod
    def expect(check, data, points, cap, methods, against_matrix):
        if against_matrix:
            check.below("F without a matrix, difference from acvi.bilinear_simplex", np.abs(data["difference"]), 1e-15)
        for name in methods:
            check.equal(f"{name}: iterations", data[name], np.array({5: FIVE, 30: THIRTY}[points][name]), 0)
        check.below("ACVI: iterations", data["ACVI"], 5)


# ------------------------------------------------------------------------------------------------ time

LEVELS = np.array([0.5, 0.1, 0.05, 0.01, 0.001, 0.0005])
REACHED = {  # steps; 0 where the level is never reached
    "ACVI": [1, 2, 3, 5, 8, 9], "I-ACVI": [2, 15, 24, 53, 120, 146], "EG": [16, 184, 256, 424, 665, 737], "OGDA": [16, 183, 255, 421, 660, 732],
    "LA5-GDA": [5, 59, 83, 137, 214, 237], "GDA": [239, 0, 0, 0, 0, 0],
}
EVALUATIONS = {"ACVI": 1, "I-ACVI": 10, "EG": 2, "OGDA": 1, "LA5-GDA": 5, "GDA": 1}


def _seconds_per_step(problem: tl.Problem, method: tl.Method, few: int, many: int) -> float:
    """Processor seconds of one step, without compiling, starting or measuring: the least of three differences of two run lengths."""

    def spent(steps: int) -> float:
        with Stopwatch() as watch:
            _track(problem, method, steps, every=steps)
        return watch.cpu_seconds

    spent(few)
    return max(min(spent(many) - spent(few) for _ in range(3)) / (many - few), 1e-7)


@figure("acvi/time-to-accuracy", source=f"{FIRST}, error against time (HBG)", quick={"steps": 800, "timed": 500, "methods": QUICK},
        paper={"steps": 3000, "timed": 4000, "methods": tuple(THIRTY)},
        caption=r"The same game at $\eta = 0.05$, step 0.1. (a) Relative error by processor time, (b) processor time and (c) evaluations of $F$ to "
                "relative error. Every method is timed with exact O(n log n) projections or closed-form proxes and an O(n) operator; the published "
                "clocks measure a generic QP projection and a numerical y-step in their place. Steps to 0.5, 0.1, 0.05, 0.01, 0.001, 0.0005: "
                "ACVI 1, 2, 3, 5, 8, 9; I-ACVI 2, 15, 24, 53, 120, 146; EG 16, 184, 256, 424, 665, 737; OGDA 16, 183, 255, 421, 660, 732; "
                "LA5 5, 59, 83, 137, 214, 237; GDA 239, then it stalls. OGDA is constant in the published plot by a mistake. " + EASY)
class TimeToAccuracy:
    """Error against time and work."""

    @staticmethod
    def compute(progress, steps, timed, methods):
        kinds, problem, data = {name: kind for name, kind in _kinds(0.1).items() if name in methods}, _rotating(0.05), {}
        lengths: dict[str, Any] = {**dict.fromkeys(methods, steps), "ACVI": 50, "I-ACVI": 200}
        progress.start("methods", len(kinds))
        for i, (name, kind) in enumerate(kinds.items()):
            history = _track(problem, kind.method, lengths[name]).history
            data |= {f"error/{name}": np.asarray(history["error"]), f"evaluations/{name}": np.asarray(history["operator_evaluations"])}
            many = timed // 10 if name == "I-ACVI" else timed
            data[f"seconds/{name}"] = np.array(_seconds_per_step(problem, kind.method, many // 5, many))
            progress.update(i + 1, name)
        smaller = _track(problem, _exact(1e-7, "blocks"), 50).history
        return data | {"error/smaller mu": np.asarray(smaller["error"])}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, axes = plt.subplots(1, 3, figsize=figsize(2, 0.4))
        for name in (name for name in REACHED if f"error/{name}" in data):
            error, second = data[f"error/{name}"], data[f"seconds/{name}"]
            axes[0].loglog(second * np.arange(1, len(error)), error[1:], label=name, **pictures.LOOKS[name])
            steps = np.array([np.argmax(error <= level) if (error <= level).any() else np.nan for level in LEVELS])
            for ax, cost in ((axes[1], second), (axes[2], EVALUATIONS[name])):
                ax.loglog(LEVELS, steps * cost, marker=pictures.MARKS[name], label=name, **pictures.LOOKS[name])
        axes[0].set(xlabel="processor seconds", ylabel="relative error", ylim=(1e-5, 1), xlim=(4e-6, 1))
        for ax, what in ((axes[1], "processor seconds"), (axes[2], "evaluations of $F$")):
            ax.set(xlabel="relative error", ylabel=what, xlim=(0.7, 3e-4))
        pictures.letters(axes, ["error by time", "time to error", "work to error"])
        pictures.legend(picture, axes, ncols=6)
        return picture

    @staticmethod
    def expect(check, data, steps, timed, methods):
        for name in methods:
            error = data[f"error/{name}"]
            check.equal(f"{name}: steps to the levels", [_first(error, level) for level in LEVELS], np.array(REACHED[name]), 0)
            rows = np.arange(len(data[f"error/{name}"]))
            check.equal(f"{name}: evaluations of F", data[f"evaluations/{name}"], EVALUATIONS[name] * rows, 0)
        check.equal("ACVI, mu tenfold smaller: steps to the levels", [_first(data["error/smaller mu"], level) for level in LEVELS],
                    np.array([1, 3, 4, 6, 9, 9]), 0)
        check.equal("ACVI: error after 10 steps", data["error/ACVI"][10], 1.7e-4, 5e-6)
        check.equal("ACVI: error after 20 steps", data["error/ACVI"][20], 6.4e-8, 5e-10)
        check.below("ACVI: error after 50 steps", data["error/ACVI"][50], 1e-15)
        if "GDA" in methods:
            check.equal("GDA: least error", data["error/GDA"].min(), 0.1346, 5e-5)
        needed = {name: REACHED[name][-1] * float(data[f"seconds/{name}"]) for name in methods if name not in ("GDA", "I-ACVI")}
        check.below("processor time to 0.0005: ACVI over the fastest baseline", needed.pop("ACVI") / min(needed.values()), 0.5)


def _first(error: np.ndarray, level: float) -> int:
    """The first step with an error of at most `level`; 0 if there is none."""
    return int(np.argmax(error <= level))


# ------------------------------------------------------------------------------------------------ conditioning

BY_KAPPA = {  # for kappa = 1, ..., 10; -1 is never
    "I-ACVI": [75, 177, 274, 224, 265, 271, 163, 163, 162, 162], "EG": [97, 80, 87, 102, 124, 152, -1, -1, -1, -1],
    "EG, step 0.9/L": {1: 40, 3: 49, 5: 120, 7: 232, 10: 482}, "P-ACVI": {1: 3, 3: 6, 5: 11, 7: 20, 10: 38},
    "P-ACVI, 0.1": {1: 2, 3: 3, 5: 3, 7: 4, 10: 7}, "ACVI": [3, 154, 202],
}
NAMES = {"I-ACVI": "I-ACVI, published", "EG": "EG, published step", "EG, step 0.9/L": r"EG, step $0.9/\kappa$",
         "P-ACVI": r"P-ACVI, $\beta=0.3\kappa$",
         "P-ACVI, 0.1": r"P-ACVI, $\beta=0.1\kappa$", "ACVI": r"ACVI, $\mu$ of I-ACVI"}
SHADES = {"EG, step 0.9/L": {"color": COLORS["black"], "linestyle": "-."}, "P-ACVI, 0.1": {"color": COLORS["sky"], "linestyle": "-"}}


@figure("acvi/conditioning", source=f"{SECOND}, conditioning (v-HBG)",
        quick={"kappas": (1, 3, 10), "cap": 1000, "methods": ("I-ACVI", "EG", "EG, step 0.9/L", "P-ACVI", "P-ACVI, 0.1"), "against_matrix": False},
        paper={"kappas": tuple(range(1, 11)), "cap": 1000, "methods": tuple(BY_KAPPA), "against_matrix": True},
        caption=r"The game $x_1^\top D x_2$, $D = \mathrm{diag}(1, \dots, \kappa)$, on two simplices of 500 actions: (a) steps, (b) evaluations of "
                r"$F$ to relative error 0.02. The published EG step $0.3 \cdot 0.9^\kappa$ exceeds $1/L = 1/\kappa$ from $\kappa = 7$ on, where EG "
                r"never arrives; with $0.9/\kappa$ it does. ACVI with the parameters of I-ACVI waits for $\mu$ to become small. Evaluations of the "
                "conjugate gradients in the x-steps of ACVI and P-ACVI are counted. I-ACVI needs far more evaluations than EG. " + EASY)
class Conditioning:
    """Counts against the condition number."""

    @staticmethod
    def compute(progress, kappas, cap, methods, against_matrix):
        data: dict[str, Any] = {f"{what}/{name}": [] for name in methods for what in ("steps", "evaluations")} | {"kappa": np.array(kappas)}
        progress.start("condition numbers", len(kappas))
        for i, kappa in enumerate(kappas):
            problem, inner = _conditioned(kappa), 20 if kappa <= 3 else 50 if kappa <= 6 else 100
            kinds = {
                "I-ACVI": _inexact(1e-5, 0.5, 200, 50, inner=inner, step_size=0.003), "EG": acvi.Extragradient(0.3 * 0.9**kappa),
                "EG, step 0.9/L": acvi.Extragradient(0.9 / kappa), "P-ACVI": acvi.ProjectedACVI(0.3 * kappa, linear="cg", output="x"),
                "P-ACVI, 0.1": acvi.ProjectedACVI(0.1 * kappa, linear="cg", output="x"), "ACVI": _exact(1e-5, "cg", stages=200, inner_steps=50),
            }
            for name in methods:
                steps, evaluations = _run(problem, kinds[name], 0.02, cap)
                data[f"steps/{name}"].append(steps)
                data[f"evaluations/{name}"].append(evaluations)
            progress.update(i + 1)
        if against_matrix:
            at = jnp.linspace(0, 1, 2 * N)
            data["difference"] = np.asarray(acvi.conditioned_bilinear(N, 7.0).operator(at) - _conditioned(7.0).operator(at))
        return data

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, axes = plt.subplots(1, 2, figsize=figsize(2, 0.42))
        for ax, what in zip(axes, ("steps", "evaluations"), strict=True):
            for name in (name for name in NAMES if f"{what}/{name}" in data):
                counts, kind = np.where(data[f"{what}/{name}"] < 0, np.nan, data[f"{what}/{name}"]), name.split(",")[0]
                ax.semilogy(data["kappa"], counts, label=NAMES[name], marker=pictures.MARKS[kind], **{**pictures.LOOKS[kind], **SHADES.get(name, {})})
            ax.set(xlabel=r"$\kappa$", ylabel={"steps": "steps", "evaluations": "evaluations of $F$"}[what], xticks=data["kappa"])
        pictures.letters(axes, ["steps", "work"])
        pictures.legend(picture, axes, ncols=3)
        return picture

    @staticmethod
    def expect(check, data, kappas, cap, methods, against_matrix):
        if against_matrix:
            check.below("F without a matrix, difference from acvi.conditioned_bilinear", np.abs(data["difference"]), 1e-14)
        for name in methods:
            known = BY_KAPPA[name] if isinstance(BY_KAPPA[name], dict) else dict(enumerate(BY_KAPPA[name], 1))
            which = [i for i, kappa in enumerate(kappas) if kappa in known]
            check.equal(f"{name}: steps", data[f"steps/{name}"][which], np.array([known[kappas[i]] for i in which]), 0)
        at = list(kappas).index(1)
        check.equal("kappa = 1: evaluations of I-ACVI", data["evaluations/I-ACVI"][at], 1500, 0)
        check.equal("kappa = 1: evaluations of EG", data["evaluations/EG"][at], 194, 0)
        others = np.stack([data[f"evaluations/{name}"] for name in methods if name not in ("I-ACVI", "ACVI")])
        check.above("evaluations of I-ACVI over the most of EG and P-ACVI", data["evaluations/I-ACVI"] / others.max(0), 5)


# ------------------------------------------------------------------------------------------------ warm-up

FIRSTS, LATERS = (5, *range(10, 131, 10)), (1, 5, *range(10, 71, 10))
WARM = {  # inner gradient steps by K+, for K0 in FIRSTS, as far as they are known
    1: [8770, 8430, 7830, 7230, 6630, 6030, 5430, 4850, 4250, 3650, 3050, 2470, 2330, 2330],
    5: [7770, 7470, 6870, 6270, 5670, 5070, 4490, 3890, 3310, 2810, 2490, 2350, 2330, 2330],
    10: [6590, 6290, 5690, 5090, 4530, 3970, 3490, 3070, 2750, 2550, 2410, 2350, 2330, 2330],
    20: [4590, 4370, 3950, 3590, 3290, 3030, 2830, 2670, 2550, 2450, 2370, 2350, 2330, 2330],
    30: [3690, 3570, 3330, 3130, 2950, 2790, 2670, 2570, 2490, 2410, 2370, 2350, 2330, 2330],
    40: [3310, 3230, 3070, 2930, 2810, 2690, 2610, 2530, 2450, 2410, 2370], 50: [3110, 3050, 2950, 2830, 2730, 2650, 2570, 2510, 2450, 2410],
    60: [3010, 2970, 2850, 2770, 2690, 2610, 2550, 2490, 2450], 70: [2910, 2890, 2810, 2730, 2650, 2590, 2530, 2490, 2450],
}
FLOOR = 2330


@figure("acvi/warm-up", source=f"{SECOND}, warm-up", quick={"firsts": (5, 60, 120), "laters": (1, 10, 70)},
        paper={"firsts": FIRSTS, "laters": LATERS},
        caption=r"Inner gradient steps (10 in $x$ and 10 in $y$ per outer step) of I-ACVI to relative error $10^{-5}$ on the rotating game with "
                r"$\eta = 0.05$, by the number $K_0$ of outer steps at the first $\mu$ and $K_+$ at each later one. More steps at the first $\mu$ "
                "help, down to 2330 (line) once everything happens there.")
class WarmUp:
    """Heat map and its columns."""

    @staticmethod
    def compute(progress, firsts, laters):
        problem, table = _rotating(0.05), np.zeros((len(laters), len(firsts)), int)
        progress.start("settings", table.size)
        for i, later in enumerate(laters):
            for j, first in enumerate(firsts):
                table[i, j] = _run(problem, _inexact(inner_steps=later, first_steps=first), 1e-5, 1000)[0]
                progress.update(i * len(firsts) + j + 1)
        # a last outer step counts with its x-step only
        return {"first": np.array(firsts), "later": np.array(laters), "steps": np.where(table > 0, 20 * (table - 1) + 10, -1)}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.4), width_ratios=(1.25, 1))
        mesh = left.imshow(data["steps"], origin="lower", aspect="auto", cmap="viridis_r")
        left.set(xticks=range(len(data["first"])), xticklabels=data["first"], yticks=range(len(data["later"])), yticklabels=data["later"],
                 xlabel="$K_0$", ylabel="$K_+$")
        left.tick_params(axis="x", labelsize=6)
        scale = picture.colorbar(mesh, ax=left, label="inner gradient steps")
        scale.outline.set_visible(False)
        chosen = [i for i, later in enumerate(data["later"]) if later in (1, 10, 20, 30, 70)]
        for i, style in zip(chosen, ("-", "--", "-.", ":", (0, (5, 1, 1, 1))), strict=False):
            right.plot(data["first"], data["steps"][i], linestyle=style, marker=".", color=plt.get_cmap("plasma")(0.85 * i / len(data["later"])),
                       label=f"$K_+ = {data['later'][i]}$")
        right.axhline(FLOOR, color="0.7", linestyle="-", linewidth=0.8, zorder=0)
        right.set(xlabel="$K_0$", ylabel="inner gradient steps", ylim=(2000, 9000))
        right.legend()
        pictures.letters((left, right), ["all settings", r"by $K_0$"])
        return picture

    @staticmethod
    def expect(check, data, firsts, laters):
        places = {first: j for j, first in enumerate(FIRSTS)}
        for row, later in zip(data["steps"], laters, strict=True):
            known = [(j, WARM[later][places[first]]) for j, first in enumerate(firsts) if places[first] < len(WARM[later])]
            check.equal(f"K+ = {later}: inner gradient steps", row[[j for j, _ in known]], np.array([count for _, count in known]), 0)
        check.below("increase with K0", np.diff(data["steps"], axis=1), 0)
        check.equal("inner steps from K0 = 120 on", data["steps"][:, np.array(firsts) >= 120], FLOOR, 0)
