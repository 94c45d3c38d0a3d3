"""What a poor approximation of the Hessian does: constants of the paper's remedies, conjugate gradients at the same cost, whitening."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from theorylab import hypergradient as hg
from theorylab.hypergradient.claims.family import Parts, whitening
from theorylab.hypergradient.plan import DampedDiagonal
from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS, figsize

shared: ModuleType = load_module(Path(__file__).with_name("_hypergradient.py"))
KINDS = ("Vanilla", "Precond", "PzPhi", "ExpPhi", "OptPhi")
MEDIANS = {  # least y: median of |I - P^-1 F_1|, of the constants of KINDS, and shares of Pz < Pre, Pre < Van, Pz < Van; 50 seeds
    -6.0: (3.478, 50, 71.4, 63.4, 1650, 43.4, 0.68, 0.14, 0.18), -4.0: (3.302, 138, 192, 164, 2140, 112, 0.76, 0.08, 0.26),
    -2.0: (2.594, 190, 220, 196, 591, 133, 0.68, 0.30, 0.50), -1.0: (1.994, 176, 169, 164, 377, 126, 0.46, 0.62, 0.78),
    0.0: (1.311, 147, 93.0, 118, 182, 96.8, 0.24, 0.94, 0.94), 1.0: (0.758, 97.4, 31.6, 67.7, 87.1, 62.9, 0.08, 1.00, 1.00),
    2.0: (0.361, 51.4, 9.09, 32.3, 32.2, 31.0, 0.00, 1.00, 1.00), 3.0: (0.152, 22.9, 1.89, 13.8, 14.4, 14.0, 0.00, 1.00, 0.98),
}
PAIRS = (("PzPhi", "Precond"), ("Precond", "Vanilla"), ("PzPhi", "Vanilla"))


def _solved(seed: int, low: float) -> tuple[Any, np.ndarray, np.ndarray]:
    """A ridge problem of the published kind with quadratic G, its y and its solution."""
    problem, _, y = shared.ridge("quadratic", seed, low)
    A, b = shared.data("ridge")[0]
    N, p = A.shape
    return problem, y, np.linalg.solve(A.T @ A / N + np.diag(np.exp(y)) / p, A.T @ b / N)


@figure("hypergradient/poor-hessian", source=f"{shared.PAPER}, in place of Figure 2a, which its code does not produce; companion derivation",
        quick={"seeds": 6, "lows": (-4.0, 0.0, 3.0)}, paper={"seeds": 50, "lows": tuple(MEDIANS)},
        caption=r"Ridge regression, quadratic G, the diagonal P of $F_1$ in place of $F_1$, y uniform in intervals of length 3. (a) Constants of "
                r"the first-order error against $\|I - P^{-1}F_1\|$, a point for each interval and seed, and medians. (b) In how many of the seeds "
                r"one estimator has a smaller constant than another. Below 1 preconditioning wins; above 2 it is worse than the plain formula, and "
                r"the linear map is damaged in one term only.")
class PoorHessian:
    """Constants against the quality of the diagonal."""

    @staticmethod
    def compute(progress, seeds, lows):
        constants, quality = np.zeros((len(lows), seeds, len(KINDS))), np.zeros((len(lows), seeds))
        progress.start("intervals", len(lows))
        for i, low in enumerate(lows):
            for seed in range(seeds):
                problem, y, x = _solved(seed, low)
                parts = Parts(problem, x, y)
                jacobians = parts.jacobians()
                constants[i, seed] = [np.linalg.norm(jacobians["Plain" if name == "Vanilla" else name], 2) for name in KINDS]
                quality[i, seed] = np.linalg.norm(parts.M, 2)
            progress.update(i + 1, f"from {low:g}")
        return {"lows": np.array(lows), "constants": constants, "quality": quality, "source": np.array(shared.source("ridge")),
                "substitute": np.array(shared.data("ridge")[2])}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.46))
        middle = np.median(data["quality"], axis=1)
        order = np.argsort(middle)
        for j, name in enumerate(KINDS):
            look, mark = shared.LOOKS[name], shared.MARKS[name]
            left.semilogy(data["quality"].ravel(), data["constants"][..., j].ravel(), linestyle="none", marker=mark, markersize=1.8,
                        color=look["color"], alpha=0.35, markeredgewidth=0)
            left.semilogy(middle[order], np.median(data["constants"][..., j], axis=1)[order], label=name, marker=mark, markersize=4, **look)
        shades = ("black", "green", "orange")
        for (better, worse), shade, style in zip(PAIRS, shades, ("-", "-.", "--"), strict=True):
            share = (data["constants"][..., KINDS.index(better)] < data["constants"][..., KINDS.index(worse)]).mean(1)
            right.plot(middle[order], share[order], marker="o", label=f"{better} below {worse}", color=COLORS[shade], linestyle=style)
        for ax in (left, right):
            ax.axvline(1, color="0.6", linewidth=0.7, linestyle=":")
            ax.set_xlabel(r"$\|I - P^{-1}F_1\|$")
        left.set(ylabel="constant of the first-order error", ylim=(0.3, 1e5))
        right.set(ylabel="share of seeds", ylim=(-0.03, 1.03))
        left.legend(loc="upper left", ncols=2)
        right.legend(loc="center left")
        shared.letters((left, right), [f"constants, {data['source']}", "who is better"])
        return picture

    @staticmethod
    def expect(check, data, seeds, lows):
        middle, medians = np.median(data["quality"], axis=1), np.median(data["constants"], axis=1)
        shares = np.array([(data["constants"][..., KINDS.index(a)] < data["constants"][..., KINDS.index(b)]).mean(1) for a, b in PAIRS]).T
        real = not str(data["substitute"])
        if real and seeds == 50:
            for i, low in enumerate(lows):
                known = np.array(MEDIANS[low])
                check.equal(f"y from {low:g}: median of |I - P^-1 F_1|", middle[i], known[0], 5e-4)
                check.equal(f"y from {low:g}: median constants of {', '.join(KINDS)}", medians[i], known[1:6], 1e-2, relative=True)
                check.equal(f"y from {low:g}: shares", shares[i], known[6:], 1e-9)
        check.above("quality of P, over the least y", -np.diff(middle), 0)
        good, bad = int(np.argmin(middle)), int(np.argmax(middle))
        check.below("good P: medians of Precond over Vanilla", medians[good, 1] / medians[good, 0], 0.5)
        check.below("good P: medians of Precond over PzPhi", medians[good, 1] / medians[good, 2], 0.5)
        check.above("bad P: medians of Precond over Vanilla", medians[bad, 1] / medians[bad, 0], 1 if real else 0.5)
        check.above("bad P: medians of Precond over PzPhi", medians[bad, 1] / medians[bad, 2], 1 if real else 0.5)
        check.below("constant of Precond over C |I - P^-1 F_1|", data["constants"][..., 1] / (data["constants"][..., 0] * data["quality"]), 1 + 1e-12)


# ------------------------------------------------------------------------------------------------ budget

KNOWN = {  # least y: medians of |error| / t over 50 seeds
    -2.0: {"Vanilla": 92.1, "Jacobi": 86.5, "damped": 73.8, "PCG-1": 64.3, "PCG-2": 43.0, "PCG-4": 4.97},
    3.0: {"Vanilla": 9.69, "Jacobi": 0.599, "damped": 0.71, "PCG-1": 0.525, "PCG-2": 0.022, "PCG-4": 3.3e-6},
}
WORSE = {"Jacobi": 0.62, "damped": 0.36, "PCG-1": 0.28, "PCG-2": 0.28, "PCG-4": 0.04}  # share of seeds worse than Vanilla, y from -4
DISTANCE = 1e-2


@eqx.filter_jit
def _errors(problem: Any, outer: Any, y: Any, x: Any, d: Any, products: tuple[int, ...]) -> dict[str, Any]:
    """Norms of the errors at x + DISTANCE d for each seed, the first axis of the arrays."""

    def one(outer: Any, y: Any, x: Any, d: Any) -> dict[str, Any]:
        mine = eqx.tree_at(lambda p: (p.A_out, p.b_out), problem, outer)
        at = mine.at(x, y)
        root = jnp.sqrt(at.diagonal())
        values = jnp.linalg.eigvalsh(at.matrix() / root[:, None] / root)
        damped = DampedDiagonal(2 / (values[0] + values[-1]))
        ways = {"Vanilla": hg.Plain(), "Jacobi": hg.Preconditioned("jacobi"), "damped": hg.Preconditioned(damped)}
        ways |= {f"PCG-{k}": hg.Preconditioned(hg.CG(max_steps=k, preconditioner="jacobi")) for k in products}
        exact = hg.Plain().estimate(mine, x, y).value
        return {name: jnp.linalg.norm(how.estimate(mine, x + DISTANCE * d, y).value - exact) for name, how in ways.items()}

    return jax.vmap(one)(outer, y, x, d)


@figure("hypergradient/budget", source="companion derivation; not in the paper",
        quick={"seeds": 6, "lows": (3.0,), "products": (1, 4)}, paper={"seeds": 50, "lows": (-4.0, -2.0, 3.0), "products": (1, 2, 3, 4, 5, 6, 7)},
        caption=r"The error of $\Omega(x - s)$ at distance t = 0.01 in a random direction, over t, where s is k steps of conjugate gradients for "
                r"$F_1s = F$, preconditioned by the diagonal of $F_1$: medians and quartiles of 50 seeds of the ridge problem with quadratic G. "
                r"Diagonal corrections (Jacobi, and damped in the best way) cost no product with $F_1$ beyond the residual; one step of conjugate "
                r"gradients is better than both. Seven, as many as there are unknowns, reach round-off, below the frame.")
class Budget:
    """Corrections at equal numbers of Hessian-vector products."""

    @staticmethod
    def compute(progress, seeds, lows, products):
        data = {"lows": np.array(lows), "source": np.array(shared.source("ridge")), "substitute": np.array(shared.data("ridge")[2])}
        progress.start("intervals", len(lows))
        for i, low in enumerate(lows):
            each = [_solved(seed, low) for seed in range(seeds)]
            d = np.array([np.random.RandomState(1000 + seed).randn(each[0][0].n) for seed in range(seeds)])
            d /= np.linalg.norm(d, axis=1, keepdims=True)
            outer = tuple(jnp.stack([getattr(p, name) for p, _, _ in each]) for name in ("A_out", "b_out"))
            y, x = (jnp.asarray(np.array([case[k] for case in each])) for k in (1, 2))
            found = _errors(each[0][0], outer, y, x, jnp.asarray(d), products)
            data |= {f"{low:g}/{name}": np.asarray(error) / DISTANCE for name, error in found.items()}
            progress.update(i + 1, f"from {low:g}")
        return data

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        lows = data["lows"]
        shape = figsize(2, 0.42) if len(lows) > 1 else figsize(1, 0.8)
        picture, axes = plt.subplots(1, len(lows), figsize=shape, sharey=True, squeeze=False)
        for ax, low in zip(axes.flat, lows, strict=True):
            steps = sorted(int(key.split("-")[-1]) for key in data if key.startswith(f"{low:g}/PCG"))
            rows = np.array([data[f"{low:g}/{name}"] for name in ("Vanilla", *(f"PCG-{k}" for k in steps))])
            ks = np.array([0, *steps])
            ax.semilogy(ks, np.median(rows, 1), marker="o", color=COLORS["blue"], linestyle="-", label="conjugate gradients")
            ax.fill_between(ks, *np.quantile(rows, (0.25, 0.75), axis=1), color=COLORS["blue"], alpha=0.15, linewidth=0)
            for name, shade, style in (("Vanilla", "purple", (0, (5, 1, 1, 1, 1, 1))), ("Jacobi", "green", "-."), ("damped", "orange", "--")):
                ax.axhline(np.median(data[f"{low:g}/{name}"]), color=COLORS[shade], linestyle=style, label=name, linewidth=1.0)
            ax.set(xlabel="products with $F_1$, k", xticks=ks, ylim=(1e-6, 300))
        axes[0, 0].set_ylabel("error / t")
        shared.letters(axes.flat, [f"$y \\in [{low:g}, {low + 3:g}]$" + (f", {data['source']}" if i == 0 and str(data["substitute"]) else "")
                                   for i, low in enumerate(lows)])
        shared.legend(picture, axes.flat, ncols=4 if len(lows) > 1 else 2)
        return picture

    @staticmethod
    def expect(check, data, seeds, lows, products):
        real = not str(data["substitute"])
        for low in lows:
            errors = {key.split("/")[1]: value for key, value in data.items() if key.startswith(f"{low:g}/")}
            medians = {name: np.median(value) for name, value in errors.items()}
            if real and seeds == 50:
                for name, value in KNOWN.get(low, {}).items():
                    check.equal(f"y from {low:g}: {name}, median", medians[name], value, 2e-2, relative=True)
                if low == -4:
                    for name, share in WORSE.items():
                        found = np.mean(errors[name] > errors["Vanilla"])
                        check.equal(f"y from -4: share of seeds with {name} worse than Vanilla", found, share, 1e-9)
            if low == 3:
                check.below("y from 3: Jacobi over Vanilla, medians", medians["Jacobi"] / medians["Vanilla"], 0.5)
                check.below("y from 3: one step of CG over Jacobi, medians", medians["PCG-1"] / medians["Jacobi"], 1 if real else 1.2)
            diagonal = min(medians["Jacobi"], medians["damped"])
            check.below(f"y from {low:g}: four steps of CG over the better diagonal, medians", medians["PCG-4"] / diagonal, 0.5)
            if 7 in products and real:
                check.below(f"y from {low:g}: seven steps, as many as unknowns", errors["PCG-7"], 1e-6)


# ------------------------------------------------------------------------------------------------ whitening


@figure("hypergradient/whitening", source="companion derivation; not in the paper",
        quick={"points": 7, "shared": 2, "separate": 1}, paper={"points": 41, "shared": 5, "separate": 8},
        caption=r"Affine G, quadratic inner energy, $x = H(y)^{-s}z$: the error over that of the plain formula. With one ridge parameter (signed) "
                r"it is $1 - s$: whitening, $s = 1/2$, makes the Hessian isotropic and only halves the error; at $s = 1$ the minimizer in z does "
                r"not depend on y. With one parameter for each unknown (ratio of norms, random problems) $s = 1$ is exact as well, and $s = 1/2$ is "
                r"near one half.")
class Whitening:
    """The factor of the error against the exponent."""

    @staticmethod
    def compute(progress, points, shared, separate):
        s = np.sort(np.append(np.linspace(0, 2, points), (0.5, 1.0)))
        progress.start("problems", shared + separate)
        found: dict[str, list] = {"shared": [], "separate": []}
        for i, (kind, seed) in enumerate([("shared", k) for k in range(shared)] + [("separate", k) for k in range(separate)]):
            found[kind].append(whitening(kind, s, seed))
            progress.update(i + 1, kind)
        return {"s": s} | {kind: np.array(values) for kind, values in found.items()}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, ax = plt.subplots(figsize=figsize(1, 0.8))
        s = data["s"]
        for i, row in enumerate(data["separate"]):
            label = "one parameter each, ratio of norms" if i == 0 else None
            ax.plot(s, row, color=COLORS["orange"], linestyle="-", linewidth=0.8, alpha=0.7, label=label)
        ax.plot(s, 1 - s, color="0.4", linestyle="--", linewidth=1.0, label="$1 - s$")
        for i, row in enumerate(data["shared"]):
            label = "one shared parameter, signed" if i == 0 else None
            ax.plot(s, row, color=COLORS["blue"], marker="o", markersize=2.5, linestyle="none", label=label)
        ax.axhline(0, color="0.7", linewidth=0.6, linestyle="-")
        for at, word in ((0.5, "whitening"), (1.0, "exact")):
            ax.axvline(at, color="0.7", linewidth=0.6, linestyle=":")
            ax.annotate(word, (at, -1.0), xytext=(2, 0), textcoords="offset points", fontsize=6, color="0.35", rotation=90, va="bottom")
        ax.set(xlabel="s", ylabel="error over that of the plain formula", xlim=(0, 2), ylim=(-1.1, 2.1))
        ax.legend(loc="upper right", fontsize=6)
        return picture

    @staticmethod
    def expect(check, data, points, shared, separate):
        s = data["s"]
        check.equal("one shared parameter: 1 - s", data["shared"], np.tile(1 - s, (shared, 1)), 1e-9)
        check.below("one parameter each: s = 1", data["separate"][:, s == 1.0], 1e-9)
        check.equal("one parameter each: s = 0", data["separate"][:, s == 0.0], 1, 1e-12)
        half = data["separate"][:, s == 0.5]
        spread = f"from {half.min():.3f} to {half.max():.3f}"
        check.between("one parameter each: s = 1/2, between no effect and none left", half, 0.01, 0.99, note=spread)
