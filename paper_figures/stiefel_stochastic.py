"""B known through samples: canonical correlations of half images, independent components of a mixture, and the bias of a single batch."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import stiefel
from theorylab.lab import datasets
from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS, figsize

pictures: ModuleType = load_module(Path(__file__).with_name("_stiefel_pictures.py"))

# ------------------------------------------------------------------------------------------------ canonical correlations

P, ROWS, BATCH, EPOCHS = 5, 1797, 128, 20
MNIST_OPTIMUM = -4.711973667
DIGITS_VALUES = (0.81362574, 0.79992832, 0.69068892, 0.66886005, 0.62681697)  # correlations of the two halves with ridge 1e-3
DIGITS_SUM = 3.62283405431                                                     # their sum without a ridge
DIGITS = {  # step size, normal term, radius of the safe step, look
    "BXh, 0.3": (0.3, "gradient", None, ("orange", "-.")), "Xh, 0.3": (0.3, "newton_schulz", None, ("blue", "-")),
    "Xh, 1": (1.0, "newton_schulz", None, ("black", ":")), "BXh, 1, safe": (1.0, "gradient", 0.75, ("vermilion", "--")),
    "Xh, 1, safe": (1.0, "newton_schulz", 0.75, ("purple", "-")),
}
KNOWN = {  # end: objective, infeasibility, captured correlation for seeds 0 and 1, and their tolerance
    "BXh, 0.3": (((-3.459, 0.175, 3.601), (-3.414, 0.148, 3.533)), 6e-4), "Xh, 0.3": (((-3.602, 0.020, 3.607), (-3.562, 0.026, 3.559)), 6e-4),
    "Xh, 1, safe": (((-3.610, 0.039, 3.612), (-3.608, 0.038, 3.612)), 5e-3), "BXh, 1, safe": (((-3.465, 0.173, 3.603), (-3.476, 0.160, 3.606)), 5e-3),
}
MNIST = {"landing avg.": ("blue", "-"), "PLAM avg.": ("orange", "-."), "landing online": ("vermilion", "--"), "Riem. GD avg.": ("black", ":")}


class Epochs:
    """Batches of both views: each epoch in a fresh order, rows left over dropped."""

    def __init__(self, views: tuple[np.ndarray, np.ndarray], rng: np.random.Generator, epochs: int):
        self.per_pass, self._views = len(views[0]) // BATCH, views
        self._orders = [rng.permutation(len(views[0])) for _ in range(epochs)]

    def batch(self, step: int) -> tuple[np.ndarray, ...]:
        """Batch number `step`."""
        rows = self._orders[step // self.per_pass][(step % self.per_pass) * BATCH:][:BATCH]
        return tuple(view[rows] for view in self._views)


def _halves(images: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The left and the right halves of images with values from 0 to 1, mapped to [-1, 1] and centred."""
    width = images.shape[2] // 2

    def centred(half: np.ndarray) -> np.ndarray:
        flat = ((half.reshape(len(images), -1) - 0.5) / 0.5).astype(dtype)
        return flat - flat.mean(0)

    return centred(images[:, :, :width]), centred(images[:, :, width:])


def _root(c: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(c)
    return (vectors * values**exponent) @ vectors.T


def _captured(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """The sum of canonical correlations between two subspaces, without a ridge."""
    return float(np.linalg.svd(_root(x.T @ a.T @ a @ x, -0.5) @ (x.T @ a.T @ b @ y) @ _root(y.T @ b.T @ b @ y, -0.5), compute_uv=False).sum())


def _correlations(a: np.ndarray, b: np.ndarray, ridge: float) -> np.ndarray:
    """All canonical correlations with a ridge."""
    rows = len(a)
    ends = [_root(v.T @ v / rows + ridge * np.eye(v.shape[1]), -0.5) for v in (a, b)]
    return np.linalg.svd(ends[0] @ (a.T @ b / rows) @ ends[1], compute_uv=False)


def _digits(progress: Any, seeds: int, curves: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The preconditioned online runs on 1797 small digits."""
    views = _halves(datasets.load("digits").x.reshape(-1, 8, 8) / 16, float)
    data = {"set": np.array("digits"), "values": _correlations(*views, 1e-3)[:P]}
    order = np.random.default_rng(0).permutation(ROWS)
    left, right = (view[order] @ _root(view[order[:512]].T @ view[order[:512]] / 512 + 1e-2 * np.eye(view.shape[1]), -0.5) for view in views)
    white = left, right
    problem = stiefel.CCA(left, right, p=P, ridge=1e-3, reference="value")
    steps = EPOCHS * (ROWS // BATCH)
    progress.start("runs", len(curves) * seeds)
    for i, name in enumerate(curves):
        step, normal, radius, _ = DIGITS[name]
        method = stiefel.StochasticLanding(tl.Cosine(step, steps), normal=normal, safe=radius)
        rows: dict[str, list[Any]] = {"objective": [], "infeasibility": [], "gap": [], "captured": []}
        for seed in range(seeds):
            rng, start = np.random.default_rng(seed), []
            for view in white:
                q = np.linalg.qr(rng.standard_normal((view.shape[1], P)))[0]
                c = view.T @ view / ROWS + 1e-3 * np.eye(view.shape[1])
                start.append(jnp.asarray(np.linalg.solve(np.linalg.cholesky(q.T @ c @ q), q.T).T))
            sol = tl.iterate(problem, method, tuple(start), steps=steps, data=Epochs(white, rng, EPOCHS), throw=False,
                             record=_both)
            length = steps + 1 - len(sol.history["objective"])
            for column, key in (("objective", "objective"), ("infeasibility", "distance"), ("gap", "gap")):
                rows[column].append(np.pad(np.asarray(sol.history[key]), (0, length), constant_values=np.nan))
            x, y = map(np.asarray, sol.value)
            fine = np.isfinite(x).all() and np.isfinite(y).all() and np.abs(x).max() < 1e6
            rows["captured"].append(_captured(x, y, left, right) if fine else np.nan)
            progress.update(i * seeds + seed + 1, name)
        data |= {f"{name}/gap": np.array(rows["gap"]) / abs(float(problem.optimum)), f"{name}/f": np.array(rows["objective"])[:, -1],
                 f"{name}/d": np.array(rows["infeasibility"]), f"{name}/captured": np.array(rows["captured"])}
    return data


def _both(problem: Any, x: Any) -> dict[str, Any]:
    """The sum of the distances of both blocks."""
    operators = problem.exact().operators
    parts = [jnp.linalg.norm(block.T @ op.matrix() @ block - jnp.eye(P, dtype=block.dtype)) for op, block in zip(operators, x, strict=True)]
    return {"distance": parts[0] + parts[1]}


def _mnist(progress: Any, images: np.ndarray, epochs: int) -> dict[str, np.ndarray]:
    """The four methods of the paper on halves of MNIST, with the settings of its plot."""
    views = _halves(images, np.float32)
    optimum = -_correlations(views[0].astype(float), views[1].astype(float), 1e-3)[:P].sum()
    rng, start = np.random.default_rng(0), []
    for view in views:
        q = np.linalg.qr(rng.standard_normal((view.shape[1], P)))[0].astype(np.float32)
        batch = view[:512]
        start.append(jnp.asarray(np.linalg.solve(np.linalg.cholesky((batch @ q).T @ (batch @ q) / view.shape[1]), q.T).T))
    per_pass = -(-len(images) // 512)
    steps, drop = epochs * per_pass, [4 * per_pass]
    eta, common = tl.Staircase([1e-2, 1e-3], drop), {"batch_size": 512, "order": "sequential"}
    landing = partial(stiefel.StochasticLanding, eta, normal="gradient", attraction=2.0, safe=None, **common)
    methods = {"landing avg.": landing(average="first_pass"), "PLAM avg.": stiefel.PLAM(eta, 2.0, average="first_pass", **common),
               "landing online": landing(), "Riem. GD avg.": stiefel.RollingRiemannian(tl.Staircase([2e-2, 2e-3], drop), ridge=1e-10, **common)}
    data = {"set": np.array("MNIST"), "optimum": np.array(optimum), "per_pass": np.array(per_pass)}
    progress.start("methods", len(methods))
    for i, (name, method) in enumerate(methods.items()):
        kind = np.float64 if name.startswith("Riem") else np.float32                          # single precision cannot factor C + 1e-10 I
        problem = stiefel.CCA(*(view.astype(kind) for view in views), p=P, reference="none")
        sol = tl.iterate(problem, method, tuple(x.astype(kind) for x in start), steps=steps, throw=False, record=_both)
        rest = (0, steps + 1 - len(sol.history["distance"]))                                 # of a run that ended early
        data |= {f"{name}/gap": np.pad(np.abs(np.asarray(sol.history["objective"]) - optimum) / abs(optimum), rest, constant_values=np.nan)[None],
                 f"{name}/d": np.pad(np.asarray(sol.history["distance"]), rest, constant_values=np.nan)[None]}
        progress.update(i + 1, name)
    return data


@figure("stiefel/canonical-correlations", source=f"{pictures.PAPER}, stochastic canonical correlations of split MNIST",
        quick={"seeds": 1, "curves": ("Xh, 1, safe",), "epochs": 8}, paper={"seeds": 5, "curves": tuple(DIGITS), "epochs": 8},
        caption="Canonical correlations of the left and the right halves of handwritten digits, p = 5. On MNIST: the four methods and settings of "
                "the paper. Where MNIST is not at hand, 1797 digits of 8 by 8 pixels stand in, as the panels say: online landing in preconditioned "
                r"coordinates, batches of 128, 20 epochs, cosine steps from $\eta$; medians and ranges over seeds. Without a safe step $\eta = 1$ "
                r"diverges; the exact safe step on each batch makes it the best setting. One batch for both factors leaves a bias with the normal "
                r"term $BXh$, and none with $Xh$.")
class CanonicalCorrelations:
    """Gap of the objective and distance to both manifolds."""

    @staticmethod
    def compute(progress, seeds, curves, epochs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", datasets.SubstituteDataWarning)                   # the panels say it
            found = datasets.load("mnist")
        if found.substitute is not None:
            return _digits(progress, seeds, curves)
        return _mnist(progress, found.x.reshape(-1, 28, 28) / 255, epochs)

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        digits = str(data["set"]) == "digits"
        looks = {name: values[-1] for name, values in DIGITS.items()} if digits else MNIST
        picture, axes = plt.subplots(1, 2, figsize=figsize(2, 0.46))
        for name, (shade, style) in looks.items():
            if f"{name}/gap" not in data:
                continue
            label = "$" + name.split(", ", maxsplit=1)[0] + r"$, $\eta = $" + name.split(", ", maxsplit=1)[1] if digits else name
            for ax, column in zip(axes, ("gap", "d"), strict=True):
                values = np.where(data[f"{name}/{column}"] < 1e3, data[f"{name}/{column}"], np.nan)
                values = values[:, 1:] if column == "d" else values                          # the start is feasible to round-off
                steps, live = np.arange(values.shape[1]) + (column == "d"), np.isfinite(values).all(0)
                middle = np.median(values[:, live], 0)
                ax.semilogy(steps[live], middle, label=label, color=COLORS[shade], linestyle=style)
                ax.fill_between(steps[live], values[:, live].min(0), values[:, live].max(0), color=COLORS[shade], alpha=0.15, linewidth=0)
                if not live.all():
                    ax.plot(steps[live][-1], middle[-1], marker="x", color=COLORS[shade], markersize=6, markeredgewidth=1.5)
        axes[0].set(xlabel="step", ylabel="relative gap after retraction" if digits else r"$|f - f^*|/|f^*|$", ylim=(1e-3 if digits else 1e-2, 2))
        axes[1].set(xlabel="step", ylabel=r"$\|h_X\| + \|h_Y\|$", ylim=(5e-3, 10) if digits else (5e-7, 2e3))
        title = "8 x 8 digits in place of MNIST" if digits else "MNIST"
        pictures.letters(axes, [title, "infeasibility"])
        pictures.legend(picture, axes, ncols=3 if digits else 4)
        return picture

    @staticmethod
    def expect(check, data, seeds, curves, epochs):
        if str(data["set"]) == "digits":
            check.equal("digits: leading correlations with ridge 1e-3", data["values"], np.array(DIGITS_VALUES), 1e-8)
            for name in curves:
                if name == "Xh, 1":
                    check.true("step 1 without a safe step: every run diverges", ~(np.nanmax(data[f"{name}/d"], axis=1) < 1e3))
                    continue
                ends, tolerance = KNOWN[name]
                for seed, (f, d, captured) in list(enumerate(ends))[:seeds]:
                    check.equal(f"digits, {name}, seed {seed}: objective", data[f"{name}/f"][seed], f, tolerance)
                    check.equal(f"digits, {name}, seed {seed}: infeasibility", data[f"{name}/d"][seed, -1], d, tolerance)
                    check.equal(f"digits, {name}, seed {seed}: captured correlation", data[f"{name}/captured"][seed], captured, tolerance)
                check.below(f"digits, {name}: captured over the largest", data[f"{name}/captured"] / DIGITS_SUM, 1 + 1e-9)
            return
        check.equal("MNIST: optimum with ridge 1e-3", data["optimum"], MNIST_OPTIMUM, 1e-5, relative=True)
        epoch = int(data["per_pass"])
        gap, d = ({name: data[f"{name}/{column}"][0] for name in MNIST} for column in ("gap", "d"))
        for name in ("landing avg.", "PLAM avg.", "landing online"):
            check.above(f"MNIST: gap of Riem. GD after one epoch over that of {name}", gap["Riem. GD avg."][epoch] / gap[name][epoch], 3)
        check.below("MNIST: distance of averaged landing after four epochs", d["landing avg."][4 * epoch], 1e-5)
        check.above("MNIST: distance of PLAM over that of averaged landing then", d["PLAM avg."][4 * epoch] / d["landing avg."][4 * epoch], 1e3)
        check.between("MNIST: distance of online landing after four epochs, both views", d["landing online"][4 * epoch], 0.4, 1.2)
        if epochs >= 8:
            check.above("MNIST: the same over that in the end", d["landing online"][4 * epoch] / d["landing online"][-1], 3)


# ------------------------------------------------------------------------------------------------ independent components

SAMPLES, SOURCES, STEPS = 100_000, 10, 500
LEAST, LEAST_AMARI = 3.380776835552, 1.1177e-4    # constrained minimum of the sample objective, and the Amari distance there
ICA = {"landing online": ("vermilion", "--"), "landing avg.": ("blue", "-"), "PLAM avg.": ("orange", "-."), "Riem. GD avg.": ("black", ":"),
       "U-statistic": ("green", (0, (5, 1, 1, 1))), "online, Xh": ("purple", "-")}
ENDS = {  # step: objective, |h|, Amari distance
    "landing online": {100: (3.32973, 0.20891, 1.9096e-3), 300: (3.32973, 0.20891, 1.9096e-3), 400: (3.33678, 6.8294e-2, 2.1161e-4),
                       500: (3.33851, 5.9499e-2, 1.7648e-4)},
    "landing avg.": {100: (3.38558, 6.1692e-3, 1.1354e-3), 300: (3.38542, 5.0807e-3, 1.1356e-3), 400: (3.38122, 4.9478e-4, 1.7290e-4),
                     500: (3.38108, 3.4451e-4, 1.5349e-4)},
    "U-statistic": {500: (3.3749, 0.0328, 1.754e-4)}, "online, Xh": {300: (None, 0.1206, None), 500: (3.3782, 0.0286, 1.736e-4)},
}
FINE = {"U-statistic": 5e-3, "online, Xh": 5e-3}


@figure("stiefel/independent-components", source=f"{pictures.PAPER}, independent components of a synthetic mixture",
        quick={"every": 50, "curves": ("landing online", "landing avg.")}, paper={"every": 10, "curves": tuple(ICA)},
        caption=r"A mixture of 10 Laplace sources, batches of 1000, step sizes a tenth from steps 300 and 400 on. Top: objective; the grey line is "
                r"its constrained minimum over the sample, and what is below it is infeasible. Middle: Amari distance to the mixing matrix. Bottom: "
                r"$\|h\|$. Online landing with the same batch in both factors B ends at a biased point. The U-statistic and the normal term $Xh$, "
                r"which are not in the paper, have no bias: the noise of the batches leaves half of that distance. Running means converge. B is "
                r"nearly 2I, so that PLAM and Riemannian descent take the same steps at first.")
class IndependentComponents:
    """Objective, Amari distance and infeasibility."""

    @staticmethod
    def compute(progress, every, curves):
        rng = np.random.RandomState(42)
        sources = rng.laplace(size=(SAMPLES, SOURCES))
        mixing = np.linalg.qr(rng.randn(SOURCES, SOURCES))[0]
        rows = sources @ mixing.T
        problem = stiefel.ICA(rows, p=SOURCES, sign=1, center=False, mixing=mixing)
        q = np.linalg.qr(np.random.default_rng(0).standard_normal((SOURCES, SOURCES)))[0]
        first = rows[:10_000]
        x0 = jnp.asarray(np.linalg.solve(np.linalg.cholesky(q.T @ (first.T @ first / len(first)) @ q), q.T).T)
        step = lambda start: tl.Staircase([start, start / 10, start / 100], [300, 400])  # noqa: E731
        common = {"batch_size": 1000, "order": "sequential"}
        landing = partial(stiefel.StochasticLanding, step(0.4), attraction=0.25, safe=None, **common)
        methods = {"landing online": landing(normal="gradient"), "landing avg.": landing(normal="gradient", average="first_pass"),
                   "PLAM avg.": stiefel.PLAM(step(0.1), 1.0, average="first_pass", **common),
                   "Riem. GD avg.": stiefel.RollingRiemannian(step(0.2), ridge=1e-6, **common),
                   "U-statistic": landing(estimator="u_statistic", normal="gradient"), "online, Xh": landing()}
        data = {"condition": np.linalg.cond(rows.T @ rows)}
        progress.start("methods", len(curves))
        for i, name in enumerate(curves):
            sol = tl.iterate(problem, methods[name], x0, steps=STEPS, every=every)
            data |= {f"{name}/{column}": np.asarray(sol.history[key]) for column, key in
                     (("f", "objective"), ("d", "infeasibility"), ("amari", "error"))}
            progress.update(i + 1, name)
        return data | {"step": np.arange(0, STEPS + 1, every)}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, axes = plt.subplots(3, 1, figsize=figsize(1, 1.6), sharex=True)
        axes[0].axhline(LEAST, color="0.75", linewidth=2.5, linestyle="-", label="constrained minimum")
        for name, (shade, style) in ICA.items():
            if f"{name}/f" in data:
                for ax, column in zip(axes, ("f", "amari", "d"), strict=True):
                    ax.plot(data["step"], data[f"{name}/{column}"], label=name.replace("Xh", "$Xh$"), color=COLORS[shade], linestyle=style)
        axes[0].set(ylabel="objective", ylim=(3.25, 3.75))
        axes[1].set(ylabel="Amari distance", yscale="log", ylim=(8e-5, 3))
        axes[2].set(ylabel=r"$\|h\|$", yscale="log", ylim=(2e-7, 1), xlabel="step")
        pictures.legend(picture, axes, ncols=2)
        return picture

    @staticmethod
    def expect(check, data, every, curves):
        at = {int(step): i for i, step in enumerate(data["step"])}
        check.equal("condition of the covariance", data["condition"], 1.03934, 1e-5)
        for name in curves:
            check.equal(f"{name}: |h| at the start", data[f"{name}/d"][0], 0.10730, 1e-5)
            for step, values in ENDS.get(name, {}).items():
                for column, value in zip(("f", "d", "amari"), values, strict=True):
                    if value is not None:
                        check.equal(f"{name}, step {step}: {column}", data[f"{name}/{column}"][at[step]], value, FINE.get(name, 1e-4), relative=True)
        check.below("landing: Amari distance at step 50", [data[f"landing {kind}/amari"][at[50]] for kind in ("online", "avg.")], 5e-2)
        check.below("online landing: objective in the end less the constrained minimum", data["landing online/f"][-1] - LEAST, -0.04,
                    note="infeasible, not better")
        check.above("averaged landing: objective in the end less the constrained minimum", data["landing avg./f"][-1] - LEAST, 0.0)
        if "Riem. GD avg." in curves:
            late = data["Riem. GD avg./amari"][at[200]] / data["landing avg./amari"][at[200]]
            check.above("step 200: Amari distance of Riem. GD over that of averaged landing", late, 10)
            check.equal("Riem. GD: |h| in the end, the ridge", data["Riem. GD avg./d"][-1], 1.5813e-6, 1e-3, relative=True)
        if "PLAM avg." in curves:
            check.below("PLAM: Amari distance in the end", data["PLAM avg./amari"][-1], 1e-2)


# ------------------------------------------------------------------------------------------------ the bias of one batch

KINDS = {"gradient": (r"one batch, $BXh$", "vermilion", "o"), "newton_schulz": (r"one batch, $Xh$", "purple", "s"),
         "u_statistic": (r"U-statistic, $BXh$", "green", "^")}


@partial(jax.jit, static_argnames=("rows", "steps", "kind"))
def _stationary(key: Any, eye: Any, rows: int, steps: int, kind: str) -> jax.Array:
    """The mean diagonal entry of X'X - I in each step, on fresh batches of white Laplace sources."""

    def step(x: jax.Array, key: Any) -> tuple[jax.Array, jax.Array]:
        batch = jax.random.laplace(key, (rows, x.shape[0])) / jnp.sqrt(2.0)
        scores = batch @ x
        if kind == "u_statistic":
            field = stiefel.u_statistic_field(batch, jnp.tanh(scores), x, normal="gradient")
        else:
            field = stiefel.landing_field(batch.T @ jnp.tanh(scores) / rows, x, batch.T @ scores / rows, normal=kind)
        after = x - 0.02 * field
        return after, jnp.mean(jnp.sum(after**2, axis=0)) - 1

    return jax.lax.scan(step, eye, jax.random.split(key, steps))[1]


@figure("stiefel/one-batch-bias", source="companion derivation, on white Laplace sources",
        quick={"rows": (100,), "steps": 2000, "kinds": ("gradient",)},
        paper={"rows": (30, 60, 100, 200, 400, 1000), "steps": 4000, "kinds": tuple(KINDS)},
        caption=r"Where stochastic landing settles for independent components ($p = 10$, $\eta = 0.02$, $\omega = 1$): the mean of $1 - x_j^\top B "
                r"x_j$ over the columns and over the steps after the first 500. The normal term $BXh$ with one batch in both factors is biased by "
                r"$c/(r + c)$, $c = p + k - 2 = 14$ (line), whatever the step size; the term $Xh$ and the U-statistic are biased by noise only.")
class OneBatchBias:
    """Stationary infeasibility against the size of a batch."""

    @staticmethod
    def compute(progress, rows, steps, kinds):
        data = {"rows": np.array(rows)}
        progress.start("runs", len(rows) * len(kinds))
        for k, kind in enumerate(kinds):
            found = []
            for i, r in enumerate(rows):
                path = _stationary(jax.random.key(r), jnp.eye(SOURCES), r, steps + 500, kind)
                found.append(-float(np.mean(np.asarray(path)[500:])))
                progress.update(k * len(rows) + i + 1, f"{kind}, {r} rows")
            data[kind] = np.array(found)
        return data

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, ax = plt.subplots(figsize=figsize(1, 0.85))
        rows = np.geomspace(data["rows"].min() / 1.3, data["rows"].max() * 1.3, 100)
        ax.loglog(rows, 14 / (rows + 14), color="0.6", linestyle="-", label="$c/(r + c)$, $c = 14$")
        for kind, (shown, shade, mark) in KINDS.items():
            if kind in data:
                ax.loglog(data["rows"], np.abs(data[kind]), label=shown, color=COLORS[shade], marker=mark, linestyle="none", markersize=5)
        ax.set(xlabel="rows r of a batch", ylabel=r"$|1 - x_j^\top B x_j|$, mean")
        pictures.ticks(ax, data["rows"])
        pictures.legend(picture, (ax,), ncols=2)
        return picture

    @staticmethod
    def expect(check, data, rows, steps, kinds):
        r = np.array(rows)
        check.equal("one batch, B X h: over the formula", data["gradient"][r >= 100] / (14 / (r + 14))[r >= 100], 1.0, 0.05)
        for kind in kinds[1:]:
            check.below(f"{kind}: size for 100 rows or more", np.abs(data[kind])[r >= 100], np.where(r[r >= 100] < 1000, 0.01, 0.002))
