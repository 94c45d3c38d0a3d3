"""How landing nears the manifold: one law for every objective, how long a safe step is, and corrections that keep iterates practically feasible."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import stiefel
from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS, figsize

pictures: ModuleType = load_module(Path(__file__).with_name("_stiefel_pictures.py"))
DERIVED = "companion derivation"

# ------------------------------------------------------------------------------------------------ one law for every objective

OBJECTIVES = {"eigenvalues": (1.0, 0.0, 0.0), "log cosh": (0.0, 1.0, 0.0), "distance": (0.0, 0.0, 1.0), "none": (0.0, 0.0, 0.0)}
NORMALS = {"newton_schulz": r"normal term $Xh$", "gradient": r"normal term $BXh$"}


def _objective(x: jax.Array, args: tuple) -> jax.Array:
    """A weighted sum of three objectives, so that all share one program."""
    weights, matrix, target = args
    parts = jnp.stack([-jnp.sum(x * (matrix @ x)) / 2, jnp.sum(jnp.log(jnp.cosh(matrix @ x))), jnp.sum((x - target) ** 2) / 2])
    return weights @ parts


@figure("stiefel/feasibility-flow", source=DERIVED,
        quick={"step": 0.01, "time": 3.0}, paper={"step": 0.001, "time": 4.0},
        caption=r"Distance to the manifold along landing with small steps, for four objectives of different strength (B with condition 20, start at "
                r"$\|h\| = 0.8$). (a) With the normal term $Xh$ all curves fall on the closed form $h(I + h)^{-1} = e^{-2\omega t} h_0(I + "
                r"h_0)^{-1}$, whatever is minimized. (b) With $BXh$ the speed depends on where the objective moves the point.")
class FeasibilityFlow:
    """Norms of the residual against time."""

    @staticmethod
    def compute(progress, step, time):
        n, p, rng = 12, 4, np.random.default_rng(1)
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        b = (q * np.geomspace(1, 1 / 20, n)) @ q.T
        h = rng.standard_normal((p, p))
        h = (h + h.T) / 2
        h *= 0.8 / np.linalg.norm(h)
        base = np.asarray(stiefel.retract(rng.standard_normal((n, p)), b))
        values, vectors = np.linalg.eigh(np.eye(p) + h)
        x0 = base @ (vectors * np.sqrt(values)) @ vectors.T
        matrix, target = rng.standard_normal((n, n)), rng.standard_normal((n, p))
        steps, data = round(time / step), {"h": h}
        progress.start("runs", len(NORMALS) * len(OBJECTIVES))
        done = 0
        for normal in NORMALS:
            for name, weights in OBJECTIVES.items():
                problem = stiefel.StiefelProblem(_objective, b, p, (jnp.array(weights), jnp.asarray(matrix + matrix.T) / 2, jnp.asarray(target)))
                sol = tl.iterate(problem, stiefel.Landing(step, 1.0, normal=normal), jnp.asarray(x0), steps=steps, record=tl.whole)
                x = np.asarray(sol.history["x"])
                data[f"{normal}/{name}"] = np.swapaxes(x, 1, 2) @ b @ x - np.eye(p)
                done += 1
                progress.update(done, f"{normal}, {name}")
        return data | {"time": step * np.arange(steps + 1)}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, axes = plt.subplots(1, 2, figsize=figsize(2, 0.42), sharey=True)
        shades = dict(zip(OBJECTIVES, ("blue", "vermilion", "green", "purple"), strict=True))
        styles = dict(zip(OBJECTIVES, ("-", "--", "-.", ":"), strict=True))
        exact = np.linalg.norm(_closed_form(data["h"], data["time"]), axis=(1, 2))
        for ax, normal in zip(axes, NORMALS, strict=True):
            ax.semilogy(data["time"], exact, color="0.75", linestyle="-", linewidth=4, label=r"closed form for $Xh$")
            for name in OBJECTIVES:
                ax.semilogy(data["time"], np.linalg.norm(data[f"{normal}/{name}"], axis=(1, 2)), color=COLORS[shades[name]],
                            linestyle=styles[name], label=f"objective: {name}")
            ax.set(xlabel=r"time $\eta k$")
        axes[0].set_ylabel(r"$\|h\|$")
        pictures.letters(axes, list(NORMALS.values()))
        pictures.legend(picture, axes, ncols=5)
        return picture

    @staticmethod
    def expect(check, data, step, time):
        exact = _closed_form(data["h"], data["time"])
        sizes = np.linalg.norm(exact, axis=(1, 2))
        for name in OBJECTIVES:
            apart = np.linalg.norm(data[f"newton_schulz/{name}"] - exact, axis=(1, 2))
            check.below(f"{name}, X h: largest distance from the closed form over the step size", apart.max() / step, 3.0)
        ends = np.array([np.linalg.norm(data[f"gradient/{name}"][-1]) for name in OBJECTIVES])
        check.above("B X h: largest over smallest |h| in the end", ends.max() / ends.min(), 1.2)
        check.above("B X h: smallest |h| in the end over the closed form for X h", ends.min() / sizes[-1], 3, note="slower: B is at most 1")


def _closed_form(h: np.ndarray, time: np.ndarray) -> np.ndarray:
    """The residuals of the flow with the normal term X h and attraction 1."""
    eye = np.eye(len(h))
    m = np.exp(-2 * time)[:, None, None] * (h @ np.linalg.inv(eye + h))
    return np.linalg.inv(eye - m) @ m


# ------------------------------------------------------------------------------------------------ safe steps

RULES = {"exact": ("exact", "blue", "-"), "rigorous": ("rigorous bound", "green", "--"), "official": ("official code", "vermilion", "-.")}
STORED = {1: 166.536776, 11: 88.002521, 51: 249.339312, 101: 575.359486}  # official safe steps of the published run
AT_START = {"exact": 374.6, "rigorous": 9.91, "official": 166.5}


@partial(jax.jit, static_argnames="rule")
def _safe(x: Any, b: Any, a: Any, attraction: Any, radius: Any, low: Any, high: Any, rule: str) -> tuple[jax.Array, jax.Array]:
    """The safe step of one rule at each point, and |h| after it."""

    def one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        bx = b @ x
        field = stiefel.landing_field(-(a @ x), x, bx, attraction, normal="gradient")
        eta = stiefel.safe_step_size(x, field, b, radius, rule, attraction=attraction, normal="gradient", spectrum=(low, high))
        after = x - eta * field
        return eta, jnp.linalg.norm(after.T @ (b @ after) - jnp.eye(x.shape[1]))

    return jax.lax.map(one, x)


@figure("stiefel/safe-steps", source=f"{pictures.PAPER}, safe step; the exact and the rigorous rule are companion derivations",
        quick={"n": 100, "steps": 40, "every": 4}, paper={"n": 1000, "steps": 100, "every": 10},
        caption=r"Along a run of landing on the eigenvalue problem, the longest steps that keep $\|h\| \leq 1$ by three rules. (a) The exact rule "
                "(root of a quartic) allows steps far longer than the rigorous closed form; the constant of the official code is no bound, and here "
                r"lies between. Grey: the step that was taken. (b) $\|h\|$ after such a step: the exact rule lands on the boundary.")
class SafeSteps:
    """Lengths of safe steps, and where they lead."""

    @staticmethod
    def compute(progress, n, steps, every):
        a, b, x0 = pictures.instance(n, n // 2)
        problem = stiefel.GEVP(a, b, p=n // 2, reference="none")
        eta, attraction = (170.0, 0.1) if n == 1000 else (20.0, 0.1)
        method = stiefel.Landing(eta, attraction, normal="gradient", safe=1.0, rule="official", margin=1.0)
        progress.start("rules", 1 + len(RULES))
        sol = tl.iterate(problem, method, jnp.asarray(x0), steps=steps, every=every, record=tl.whole)
        progress.update(1, "run")
        values = np.linalg.eigvalsh(b)
        data = {"step": np.arange(0, steps + 1, every), "taken": np.array(eta)}
        for i, rule in enumerate(RULES):
            found = _safe(sol.history["x"], jnp.asarray(b), jnp.asarray(a), attraction, 1.0, values[0], values[-1], rule)
            data |= {f"{rule}/eta": np.asarray(found[0]), f"{rule}/after": np.asarray(found[1])}
            progress.update(2 + i, rule)
        return data

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.42))
        for rule, (shown, shade, style) in RULES.items():
            left.semilogy(data["step"], data[f"{rule}/eta"], label=shown, color=COLORS[shade], linestyle=style, marker="o", markersize=2)
            right.semilogy(data["step"], data[f"{rule}/after"], color=COLORS[shade], linestyle=style, marker="o", markersize=2)
        left.axhline(float(data["taken"]), color="0.6", linestyle="-", linewidth=0.8)
        right.axhline(1.0, color="0.6", linestyle="-", linewidth=0.8)
        left.set(xlabel="step of the run", ylabel=r"largest $\eta$")
        right.set(xlabel="step of the run", ylabel=r"$\|h\|$ after that step")
        pictures.letters((left, right), ["safe steps", r"where they lead; the bound is 1"])
        pictures.legend(picture, (left,), ncols=3)
        return picture

    @staticmethod
    def expect(check, data, n, steps, every):
        etas = {rule: data[f"{rule}/eta"] for rule in RULES}
        check.above("exact over rigorous, along the run", etas["exact"] / etas["rigorous"], 1.0)
        check.below("rigorous rule: |h| after its step", data["rigorous/after"], 1.0)
        check.equal("exact rule: |h| after its step", data["exact/after"], 1.0, 1e-6)
        check.above("exact over rigorous at the start", etas["exact"][0] / etas["rigorous"][0], 5)
        if n == 1000:
            for rule, value in AT_START.items():
                check.equal(f"{rule} at the start", etas[rule][0], value, 1e-3, relative=True)
            for step, value in STORED.items():
                check.equal(f"official rule, used by step {step}", etas["official"][(step - 1) // every], value, 1e-7, relative=True)


# ------------------------------------------------------------------------------------------------ practically feasible

OPTIMUM = -950.0913492151884
CURVES = {
    "gradient": (r"landing, $BXh$", "orange", "-."), "newton_schulz": (r"landing, $Xh$", "vermilion", "--"),
    "correction": ("tangent step, then Newton-Schulz", "blue", "-"), "cholesky": ("tangent step, then Cholesky", "black", ":"),
    "long gradient": (r"landing, $BXh$, $\eta = 160$", "orange", (0, (1, 1))), "long safe": (r"landing, $\eta = 160$, safe", "purple", "-"),
}
ENDS = {  # gap and |h| after 600 steps of 80, largest |h|
    "gradient": (9.6e-6, 1.6e-6, 0.589), "newton_schulz": (1.1e-5, 5.1e-7, 0.654), "correction": (8.7e-6, 1.0e-13, 0.039),
    "cholesky": (8.8e-6, 6e-14, None),
}


def _feasible_method(name: str) -> stiefel.Landing:
    eta = 160.0 if name.startswith("long") else 80.0
    if name == "correction":
        return stiefel.Landing(eta, normal="correction")
    if name == "newton_schulz":
        return stiefel.Landing(eta, 1 / (2 * eta))
    return stiefel.Landing(eta, 0.1, normal="gradient", safe=0.5 if name == "long safe" else None)


@jax.jit(static_argnames="steps")
def _retracted(problem: Any, x: Any, eta: Any, steps: int) -> dict[str, jax.Array]:
    """Steps along the tangent term, each followed by a retraction."""
    b = problem.operator

    def step(x: jax.Array, _: None) -> tuple[jax.Array, dict[str, jax.Array]]:
        gradient = -(problem.cost.matrix() @ x)
        x = stiefel.retract(x - eta * stiefel.relative(gradient, x, b.matrix() @ x), b)
        row = problem.metrics(x)
        return x, {name: row[name] for name in ("gap", "infeasibility")}

    return jax.lax.scan(step, x, None, length=steps)[1]


@figure("stiefel/feasible-landing", source=f"{DERIVED}, on the eigenvalue problem of the paper",
        quick={"steps": 60, "curves": ("correction",)}, paper={"steps": 600, "curves": tuple(CURVES)},
        caption=r"n = 200, p = 100, steps of $\eta = 80$ along $\Psi_B$. A Newton-Schulz correction after each tangent step, which needs products "
                r"of p by p matrices only, keeps $\|h\|$ at $10^{-6}$ after 50 steps and at round-off in the end, as an exact retraction does, at "
                r"the same gap. Twice the step diverges without a safe step; with it the run goes on, at the border of the safe region $\|h\| = "
                r"0.5$.")
class FeasibleLanding:
    """Gap and infeasibility of corrected steps."""

    @staticmethod
    def compute(progress, steps, curves):
        a, b, x0 = pictures.instance(200, 100)
        problem = stiefel.GEVP(a, b, p=100, reference="value")
        data, size = {"optimum": np.asarray(problem.optimum)}, abs(float(problem.optimum))
        progress.start("curves", len(curves))
        for i, name in enumerate(curves):
            if name == "cholesky":
                history = _retracted(problem, jnp.asarray(x0), 80.0, steps)
            else:
                history = tl.iterate(problem, _feasible_method(name), jnp.asarray(x0), steps=steps, throw=False).history
            data |= {f"{name}/gap": np.asarray(history["gap"]) / size, f"{name}/d": np.asarray(history["infeasibility"])}
            progress.update(i + 1, name)
        return data

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, axes = plt.subplots(1, 2, figsize=figsize(2, 0.44))
        for name, (shown, shade, style) in CURVES.items():
            if f"{name}/d" in data:
                for ax, column in zip(axes, ("gap", "d"), strict=True):
                    values = data[f"{name}/{column}"]
                    fine = np.isfinite(values) & (values > 0) & (values < 1e3)
                    ax.semilogy(np.flatnonzero(fine), values[fine], label=shown, color=COLORS[shade], linestyle=style)
        axes[0].set(xlabel="step", ylabel="relative gap after retraction")
        axes[1].set(xlabel="step", ylabel=r"$\|h\|$", ylim=(1e-15, 1e2))
        pictures.letters(axes, ["objective", "infeasibility"])
        pictures.legend(picture, axes, ncols=3)
        return picture

    @staticmethod
    def expect(check, data, steps, curves):
        check.equal("f*", data["optimum"], OPTIMUM, 1e-11, relative=True)
        for name in curves:
            gap, d = data[f"{name}/gap"], data[f"{name}/d"]
            if name == "long gradient":
                check.between("steps of 160: step of divergence", pictures.diverged(d), 3, 6)
                continue
            if name == "long safe":
                check.equal("steps of 160 with the safe step: first step with a gap below 1e-2", int(np.argmax(gap < 1e-2)), 66, 3)
                check.between("the same: |h| in the end", d[-1], 0.4, 0.5)
                continue
            end, violation, largest = ENDS[name]
            if largest is not None:
                check.equal(f"{name}: largest |h|", d.max(), largest, 2e-2, relative=True)
            if steps >= 600:
                check.equal(f"{name}: gap in the end", gap[-1], end, 0.05, relative=True)
                check.below(f"{name}: |h| in the end", d[-1], 1e-12 if violation < 1e-10 else 1.1 * violation)
            if name == "correction":
                check.below("correction: |h| from step 50 on", d[50:], 1e-6)
