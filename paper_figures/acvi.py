"""Two-dimensional pictures of ACVI: trajectories over the field, and the central path."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import acvi
from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS, figsize

pictures: ModuleType = load_module(Path(__file__).with_name("_acvi_pictures.py"))
FIRST = "Yang, Jordan and Chavdarova, Solving Constrained Variational Inequalities via a First-order Interior Point-based Method"
SECOND = "Chavdarova, Yang, Pagliardini and Jordan, A Primal-Dual Approach to Solving Variational Inequalities with General Constraints"

# ------------------------------------------------------------------------------------------------ trajectories

STEPS = 49
PANELS = {
    "bilinear": "bilinear game", "ratio": "ratio game", "forsaken": "forsaken, disc", "gan": "toy GAN", "right": r"forsaken, $u \geq 0.08$",
    "upper": r"forsaken, $v \geq 0.4$",
}
WINDOWS = {"bilinear": (0, 1.5, 0, 1.5), "ratio": (0, 1, 0, 1), "forsaken": (-2, 2, -2, 2), "gan": (-2, 2, -2, 2), "right": (0, 1, 0.3, 1.4),
           "upper": (-1.5, 1.5, 0.3, 1.4)}
SOLUTIONS = {"bilinear": [(0, 0)], "ratio": [(0.951941016011038, 0.0504852540027595)], "forsaken": [(0.0780266687384601, 0.411933851365820)],
             "gan": [(1.0064154732985, 0)], "right": [(0.08, 1.32237050569908)], "upper": [(0.0780266687384601, 0.411933851365820), (-1.296, 0.4)]}
SHORTER = {"forsaken": 3}  # inner steps of the published Lookahead; 4 on the other problems, where the text says 5
ENDS = {  # after 49 steps
    "bilinear": {"GDA": (0, 0.899887), "EG": (0, 0.834326), "OGDA": (0, 0.833724), "LA5-GDA": (3e-15, 0.404550), "ACVI": (2.379e-9, 0.00396920),
                 "LA4": (4e-15, 0.520546)},
    "ratio": {"GDA": (1, 0.408990), "EG": (1, 0.319639), "OGDA": (1, 0.318802), "LA5-GDA": (0.947196, 0.056807), "ACVI": (0.95194102, 0.05048525),
              "LA4": (0.930464, 0.071518)},
    "forsaken": {"GDA": (0.152975, -1.330536), "EG": (0.538601, -1.206520), "OGDA": (0.523840, -1.224403), "LA5-GDA": (0.742560, -1.135607),
                 "ACVI": (0.07802667, 0.41193385), "LA4": (1.032609, 1.403454)},
    "gan": {"GDA": (-0.000311, -0.161978), "EG": (1.006577, -0.001097), "OGDA": (-1.264272, -1.549715), "LA5-GDA": (1.221331, -0.231845),
            "ACVI": (1.00641547, 8e-13), "LA4": (1.007193, -0.000520)},
}


def _problem(name: str) -> acvi.VariationalInequality | acvi.AffineVariationalInequality:
    wall = {"right": ([-1.0, 0.0], -0.08), "upper": ([0.0, -1.0], -0.4)}
    if name in wall:
        return acvi.forsaken(constraints=acvi.HalfSpace(*wall[name]), x0=(0.5, 0.5))
    return {"bilinear": acvi.bilinear_quadrant, "ratio": acvi.ratio_game, "forsaken": acvi.forsaken, "gan": acvi.toy_gan}[name]()


@partial(jax.jit, static_argnames="steps")
def _path(problem: Any, method: tl.Method, steps: int) -> jax.Array:
    """The iterates, the start first; one compiled program for every constant of the method."""
    return tl.iterate(problem, method, steps=steps, record=tl.whole).history["x"]


@figure("acvi/planar-trajectories", source=f"{FIRST}, trajectories in the plane and in the appendix",
        quick={"panels": ("bilinear",), "longer": 2000}, paper={"panels": tuple(PANELS), "longer": 2000},
        caption=r"49 steps of each method (step 0.1; ACVI: $\beta = 0.08$, $\mu_{-1} = 10^{-5}$, the iterates $y$) over the direction of $-F$; stars "
                "are solutions, the grey line bounds the feasible set. ACVI takes exact steps and lands at the star; GDA, EG and OGDA slide along "
                "the boundary or circle, but EG finds the star of (d). LA5 takes the five inner steps of its name (the published code takes four, "
                "and three for forsaken). (e) The published mark (cross) is no solution: after 49 steps ACVI is near it and still drifts, to the "
                "star. (f) Two solutions. The forsaken game is not monotone, so no theorem applies to it.")
class PlanarTrajectories:
    """Four panels of the paper and two of its appendix."""

    @staticmethod
    def compute(progress, panels, longer):
        data, schedule = {}, acvi.MuSchedule(1e-5, 0.5, stages=20, inner_steps=1)
        methods = {"GDA": acvi.GradientDescentAscent(0.1), "EG": acvi.Extragradient(0.1), "OGDA": acvi.OptimisticGradient(0.1),
                   "LA5-GDA": acvi.Lookahead(0.1, inner_steps=5), "ACVI": acvi.ACVI(0.08, schedule)}
        progress.start("panels", len(panels))
        for i, name in enumerate(panels):
            problem = _problem(name)
            methods["LA4"] = acvi.Lookahead(0.1, inner_steps=SHORTER.get(name, 4))
            for method, settings in methods.items():
                data[f"{name}/{method}"] = np.asarray(_path(problem, settings, longer if method == "ACVI" else STEPS))
            if name == "bilinear":
                data["bilinear/x"] = np.asarray(_path(problem, acvi.ACVI(0.08, schedule, output="x"), 1))
            progress.update(i + 1, name)
            left, right, low, high = WINDOWS[name]
            grid = np.stack([a.ravel() for a in np.meshgrid(np.linspace(left, right, 17), np.linspace(low, high, 17))], -1)
            data |= {f"{name}/grid": grid, f"{name}/field": -np.asarray(jax.vmap(problem.operator)(jnp.asarray(grid)))}
        return data

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        shown = [name for name in PANELS if f"{name}/GDA" in data]
        rows = -(-len(shown) // 3)
        picture, axes = plt.subplots(rows, min(3, len(shown)), figsize=figsize(2, 0.37 * rows + 0.03), squeeze=False)
        turn = np.linspace(0, 2 * np.pi, 200)
        for ax, name in zip(axes.flat, shown, strict=False):
            left, right, low, high = WINDOWS[name]
            walls = {"bilinear": ((0, 0, right), (high, 0, 0)), "ratio": ((0, 1, 1, 0, 0), (0, 0, 1, 1, 0)), "right": ((0.08, 0.08), (low, high)),
                     "upper": ((left, right), (0.4, 0.4))}
            ax.plot(*walls.get(name, (2 * np.cos(turn), 2 * np.sin(turn))), color="0.45", linestyle="-", linewidth=0.8, zorder=1)
            pictures.arrows(ax, data[f"{name}/grid"], data[f"{name}/field"])
            for method in ("GDA", "EG", "OGDA", "LA5-GDA", "ACVI"):
                path = data[f"{name}/{method}"][: STEPS + 1]
                pictures.trail(ax, path, method, linewidth=1.5 if method == "ACVI" else 1.0, zorder=5 if method == "ACVI" else 3)
                ax.plot(*path[-1], marker=pictures.MARKS[method], color=pictures.LOOKS[method]["color"], markersize=3.5, zorder=5, clip_on=False)
            for solution in SOLUTIONS[name]:
                pictures.star(ax, solution)
            if name == "right":
                ax.plot(0.08, 0.4, marker="x", color="black", markersize=5, zorder=7)
            room = 0.04 * (right - left), 0.04 * (high - low)
            ax.set(xlim=(left - room[0], right + room[0]), ylim=(low - room[1], high + room[1]), xlabel="$x_1$", ylabel="$x_2$",
                   box_aspect=1)
        pictures.letters(axes.flat, [PANELS[name] for name in shown])
        pictures.legend(picture, axes.flat, ncols=5)
        return picture

    @staticmethod
    def expect(check, data, panels, longer):
        for name in panels:
            for method, end in ENDS.get(name, {}).items():
                path = data[f"{name}/{method}"]
                tolerance = 5e-9 if method == "ACVI" else 5e-7  # the digits that are known
                check.equal(f"{name}: {method} after {STEPS} steps", path[STEPS], np.array(end, float), tolerance)
            if name in ENDS:
                away = {method: np.linalg.norm(data[f"{name}/{method}"][STEPS] - SOLUTIONS[name][0]) for method in ("ACVI", "GDA", "EG", "OGDA")}
                check.below(f"{name}: distance of ACVI from the solution", away["ACVI"], 4e-3)
                closest = {"gan": ("GDA", "OGDA")}.get(name, ("GDA", "EG", "OGDA"))
                check.above(f"{name}: smallest distance of {', '.join(closest)}", min(away[m] for m in closest), 0.2)
        if "bilinear" in panels:
            y = data["bilinear/ACVI"]
            check.equal("bilinear: first x of ACVI", data["bilinear/x"][1], np.array([-0.063541263076, 0.091437427354]), 1e-12)
            check.equal("bilinear: first y of ACVI", y[1], np.array([0.000968840485, 0.092115920277]), 1e-12)
            check.equal("bilinear: third y", y[3], np.array([0.000218784193, 0.005267172288]), 1e-12)
            check.equal("bilinear: tenth y", y[10], np.array([1.794385200680e-6, 5.366332204955e-3]), 1e-15)
            check.equal("bilinear: second coordinate of y after 50 steps", y[50, 1], 3.938202284758e-3, 1e-15)
            check.equal("bilinear: y after 2000 steps", y[2000], np.array([6.8796e-7, 1.37935e-5]), 5e-11)
        if "right" in panels:
            check.below("right: distance of ACVI from the star after many steps", np.abs(data["right/ACVI"][longer] - SOLUTIONS["right"][0]), 1e-4)
            check.above("right: its distance after 49 steps", np.abs(data["right/ACVI"][STEPS] - SOLUTIONS["right"][0]).max(), 0.5)
            field = -np.asarray(_problem("right").operator(jnp.array([0.08, 0.40652])))
            check.equal("right: first component of F on the wall near the published mark", -field[0], -0.0045, 5e-5)
            for method in ("GDA", "EG"):
                away = np.abs(data[f"right/{method}"][STEPS] - SOLUTIONS["right"][0])
                check.below(f"right: distance of {method} from the star after 49 steps", away, 0.1)
        if "upper" in panels:
            star, other = SOLUTIONS["upper"]
            check.below("upper: distance of ACVI from the interior solution after 49 steps", np.abs(data["upper/ACVI"][STEPS] - star), 5e-2)
            check.below("upper: the same after many steps", np.abs(data["upper/ACVI"][longer] - star), 1e-6)
            check.below("upper: distance of EG from the other solution", np.abs(data["upper/EG"][STEPS] - other), 1e-2)


# ------------------------------------------------------------------------------------------------ central path

STAGES, INNER = 18, 10
PATH = {  # mu and the point of the central path
    10.0: (0.8940570220288553, 1.087277073685843), 3.0: (0.6339600660055722, 1.20275018800092), 1.0: (0.2051000898891326, 1.197017515650712),
    0.3: (-0.06819538005399255, 0.7826002493042843), 0.1: (-0.09742767833240265, 0.2904582970743786),
    0.03: (-0.0504515882154831, 0.07358238024942187), 0.01: (-0.0194829611392872, 0.02214691765601772),
}
COUNTED = {  # steps until the norm is below 1e-6
    "P-ACVI": {r"$\beta=0.1$": 7, r"$\beta=0.5$": 19, r"$\beta=1$": 44, r"$\beta=2$": 129},
    "PI-ACVI": {"10 steps of 0.2": 9, "20 steps of 0.05": 56}, "EG": {"0.1": 2662, "0.3": 325}, "OGDA": {"0.1": 2609, "0.3": 266},
    "LA5-GDA": {"0.1": 712, "0.3": 83},
}
SHOWN = {"P-ACVI": r"$\beta=0.5$", "PI-ACVI": "20 steps of 0.05", "GDA": "0.3", "EG": "0.3", "OGDA": "0.3", "LA5-GDA": "0.3"}


def _rotation_methods() -> dict[str, dict[str, tl.Method]]:
    """The methods of the last panel with their settings."""
    baselines = {"GDA": acvi.GradientDescentAscent, "EG": acvi.Extragradient, "OGDA": acvi.OptimisticGradient, "LA5-GDA": acvi.Lookahead}

    def inner(step_size: float, steps: int) -> tl.Method:
        return acvi.InexactProjectedACVI(0.5, inner=acvi.GradientDescentAscent(step_size), inner_steps=steps)

    return {
        "P-ACVI": {f"$\\beta={beta:g}$": acvi.ProjectedACVI(beta) for beta in (0.1, 0.5, 1.0, 2.0)},
        "PI-ACVI": {"10 steps of 0.2": inner(0.2, 10), "20 steps of 0.05": inner(0.05, 20), "5 steps of 0.5": inner(0.5, 5)},
        **{name: {f"{step:g}": kind(step) for step in (0.1, 0.3)} for name, kind in baselines.items()},
    }


@figure("acvi/central-path", source=f"{SECOND}, central path on a square",
        quick={"methods": ("P-ACVI",), "steps": 5000}, paper={"methods": tuple(SHOWN), "steps": 5000},
        caption=r"The game $x_1x_2$ on $[-0.4, 2.4]^2$, start (2, 2), solution at the star, arrows along $-F$. The central path (grey) runs "
                r"from the center of the square to the solution. (a) ACVI and (b) I-ACVI (10 inner gradient steps of 0.2 in $x$), with $\beta = 0.5$ "
                r"and 18 stages of 10 steps: a dot ends each stage, $\mu = 1, 1/2, 1/4, \dots$ (c) Distance to the solution by step: P-ACVI and "
                r"PI-ACVI (20 inner steps of 0.05) with $\beta = 0.5$, the others with step 0.3; GDA circles for ever. A step takes one evaluation "
                "of $F$ in GDA and OGDA, two in EG, five in LA5, 20 in PI-ACVI. The settings of the published picture are not known; these are ours.")
class CentralPath:
    """The central path with its followers."""

    @staticmethod
    def compute(progress, methods, steps):
        problem, schedule = acvi.constrained_bilinear(), acvi.MuSchedule(2.0, 0.5, stages=STAGES, inner_steps=INNER)
        mus = np.geomspace(1e3, 1e-6, 120)
        points = np.asarray(acvi.central_path(problem, np.append(mus, list(PATH))))
        data = {"path": points[: len(mus)], "points": points[len(mus):]}
        grid = np.stack([a.ravel() for a in np.meshgrid(*[np.linspace(-0.4, 2.4, 15)] * 2)], -1)
        data |= {"grid": grid, "field": -np.asarray(jax.vmap(problem.operator)(jnp.asarray(grid)))}
        inexact = acvi.InexactACVI(0.5, schedule, inner=acvi.GradientDescentAscent(0.2), inner_steps=10)
        for name, method in {"ACVI": acvi.ACVI(0.5, schedule), "I-ACVI": inexact}.items():
            data[f"iterates/{name}"] = np.asarray(_path(problem, method, STAGES * INNER))
        thorough = acvi.ACVI(0.5, acvi.MuSchedule(2.0, 0.5, stages=STAGES, inner_steps=50))
        data["thorough"] = np.asarray(_path(problem, thorough, STAGES * INNER))[50]
        progress.start("methods", len(methods))
        for i, name in enumerate(methods):
            for setting, method in _rotation_methods()[name].items():
                run = tl.iterate(problem, method, steps=steps, stop=tl.Below("error", 1e-6), throw=False)
                data[f"count/{name}/{setting}"] = np.array(run.steps if run.status == tl.Status.CONVERGED else -1)
                data[f"status/{name}/{setting}"] = np.array(int(run.status))
                if SHOWN[name] == setting:
                    data[f"error/{name}"] = np.asarray(run.history["error"])
            progress.update(i + 1, name)
        return data

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, axes = plt.subplots(1, 3, figsize=figsize(2, 0.4))
        for ax, name in zip(axes, ("ACVI", "I-ACVI"), strict=False):
            ax.plot((-0.4, 2.4, 2.4, -0.4, -0.4), (-0.4, -0.4, 2.4, 2.4, -0.4), color="0.45", linestyle="-", linewidth=0.8)
            pictures.arrows(ax, data["grid"], data["field"])
            ax.plot(*data["path"].T, color=COLORS["black"], linestyle="-", linewidth=2.2, alpha=0.55, label="central path", zorder=2)
            path = data[f"iterates/{name}"]
            pictures.trail(ax, path, name)
            ax.plot(*path[INNER::INNER].T, marker="o", markersize=3.5, linestyle="none", color=pictures.LOOKS[name]["color"], zorder=5)
            pictures.star(ax, (0, 0))
            ax.set(xlim=(-0.5, 2.5), ylim=(-0.5, 2.5), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
        for name in SHOWN:
            if f"error/{name}" in data:
                axes[2].loglog(np.arange(1, len(data[f"error/{name}"])), data[f"error/{name}"][1:], label=name, **pictures.LOOKS[name])
        axes[2].set(xlim=(1, 2000), ylim=(5e-7, 6), xlabel="step", ylabel="distance to the solution", box_aspect=1)
        pictures.letters(axes, ["ACVI", "I-ACVI", "steps to the solution"])
        pictures.legend(picture, axes, ncols=9)
        return picture

    @staticmethod
    def expect(check, data, methods, steps):
        check.equal("points of the central path", data["points"], np.array(list(PATH.values())), 1e-13)
        check.equal("end of the first stage, 10 steps", data["iterates/ACVI"][INNER], np.array([0.199036, 1.186411]), 5e-7)
        check.equal("end of the first stage, 50 steps, and the path at mu = 1", data["thorough"], np.array(PATH[1.0]), 5e-7)
        for name in ("ACVI", "I-ACVI"):
            away = np.linalg.norm(data[f"iterates/{name}"][INNER::INNER, None] - data["path"], axis=-1).min(1)
            check.below(f"{name}: distance of the ends of stages from the path", away, 0.05)
            check.below(f"{name}: distance of the last iterate from the solution", np.linalg.norm(data[f"iterates/{name}"][-1]), 1e-4)
        for name in methods:
            for setting, count in COUNTED.get(name, {}).items():
                check.equal(f"{name}, {setting}: steps to 1e-6", data[f"count/{name}/{setting}"], count, 0)
        if "PI-ACVI" in methods:
            check.equal("PI-ACVI, 5 steps of 0.5: status, not finite", data["status/PI-ACVI/5 steps of 0.5"], int(tl.Status.NONFINITE), 0)
        if "GDA" in methods:
            check.true("GDA never arrives", np.array([data[f"count/GDA/{setting}"] for setting in ("0.1", "0.3")]) == -1)
            check.above("GDA: distance from the solution in the end", data["error/GDA"][-1000:], 0.3)
