"""Fits in use: the search for the routing, coverage of intervals, and what a wrong number of active experts costs."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import theorylab as tl
from theorylab import moe
from theorylab.core.keys import run_keys, stream
from theorylab.lab.figures import figure
from theorylab.lab.style import COLORS, figsize
from theorylab.moe.claims import _reference as reference
from theorylab.moe.claims._programs import measured
from theorylab.moe.claims.inference import wald
from theorylab.moe.claims.rates import EXACT, nearest_dense

SETTINGS = {"S0": ("S0", "logit", 1000, 0.0, 1.5), "S3, slope": ("S3", "slope", 1500, -1.0, 0.5), "S3, logit": ("S3", "logit", 1500, -1.0, 0.5)}
ENOUGH = -2e-3


def _deficits(setting: str, rows: int | None, seed: Any, starts: int) -> tuple[float, float]:
    """Log-likelihood per row below that of EM from the truth: of EM from a wrong gate, and of the search from there."""
    name, selection, n, low, noise = SETTINGS[setting]
    n, truth = rows or n, moe.example(name, selection=selection)
    likelihood = moe.Likelihood(*truth.sample(n, key=seed, low=low), truth.experts, truth.active, selection)
    shaken = truth.gate_matrix + noise * jax.random.normal(stream(seed, "noise"), truth.gate_matrix.shape)
    begin = moe.Mixture.from_matrices(shaken, truth.expert_matrix, truth.variance, truth.active, selection)
    best = tl.iterate(likelihood, moe.EM(), truth, steps=200).history["log_likelihood"][-1]
    frozen = tl.iterate(likelihood, moe.EM(), begin, steps=200).history["log_likelihood"][-1]
    found = tl.iterate(moe.Routing(likelihood), moe.RoutingSearch(starts), begin, steps=25, key=seed)
    return float(frozen - best) / n, float(found.history["log_likelihood"][-1] - best) / n


@figure("moe/routing-search", source="companion derivation; EM alone is the algorithm of the paper",
        quick={"settings": ("S0",), "samples": 3, "starts": 2, "rows": 300},
        paper={"settings": ("S0", "S3, slope"), "samples": 6, "starts": 2, "rows": None},
        full={"settings": tuple(SETTINGS), "samples": 16, "starts": 4, "rows": None},
        caption="Log-likelihood per row, against that of EM from the truth, after EM from a gate with normal noise (deviation 1.5 for S0, 0.5 for "
                "S3) and after the routing search from the same gate; one mark per sample, shifted sideways. EM takes no row from its experts, so a "
                "wrong gate costs it several tenths; the search (annealing, then patterns) reaches the maximum.")
class RoutingSearch:
    """Deficits."""

    @staticmethod
    def compute(progress, settings, samples, starts, rows):
        data = {}
        progress.start("samples", len(settings) * samples)
        for i, name in enumerate(settings):
            found = []
            for j, key in enumerate(run_keys(0, samples)):
                found.append(_deficits(name, rows, key, starts))
                progress.update(i * samples + j + 1, name)
            data[f"frozen/{name}"], data[f"search/{name}"] = np.array(found).T
        return data

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        names = [key.partition("/")[2] for key in data if key.startswith("frozen/")]
        picture, ax = plt.subplots(figsize=figsize(1, 0.8))
        for i, name in enumerate(names):
            for kind, shade, mark, shift in (("frozen", "vermilion", "x", -0.15), ("search", "blue", "o", 0.15)):
                values = data[f"{kind}/{name}"]
                at = i + shift + 0.08 * np.linspace(-1, 1, len(values))
                label = {"frozen": "EM alone", "search": "routing search"}[kind] if i == 0 else None
                ax.plot(at, values, mark, color=COLORS[shade], markersize=4, linestyle="none", label=label)
        ax.axhline(0, color="0.5", linewidth=0.7, linestyle=":")
        ax.set_xticks(range(len(names)), names)
        ax.set(ylabel="log-likelihood per row\nbelow EM from the truth", xlim=(-0.5, len(names) - 0.5))
        ax.set_yscale("symlog", linthresh=1e-2)
        ax.set_ylim(2 * min(float(values.min()) for values in data.values()), 0.02)
        ax.legend(loc="center right")
        return picture

    @staticmethod
    def expect(check, data, settings, samples, starts, rows):
        for name in settings:
            check.below(f"{name}: mean of EM alone", data[f"frozen/{name}"].mean(), -0.1)
            check.above(f"{name}: share of samples at which the search reaches the maximum", (data[f"search/{name}"] > ENOUGH).mean(), 0.8)


LABELS = (r"$\beta_{01}$", r"$\beta_{02}$", r"$\beta_{11}$", r"$\beta_{12}$", "$a_1$", "$a_2$", "$a_3$", "$b_1$", "$b_2$", "$b_3$",
          r"$\sigma_1$", r"$\sigma_2$", r"$\sigma_3$")


@figure("moe/wald-coverage", source="companion derivation", quick=EXACT, paper={"sizes": (1000,), "replicates": 300, "rows": 1000},
        caption="Wald intervals at 95 % on fits of S1 to n = 1000 rows. (a) Coverage of each parameter with two standard errors; (b) Wald statistics "
                r"of all 13 parameters against quantiles of $\chi^2_{13}$.")
class WaldCoverage:
    """Coverage and the Wald statistic."""

    @staticmethod
    def compute(progress, sizes, replicates, rows):
        covers, statistic = wald(1000, sizes, replicates, rows)
        return {"coverage": covers.mean(axis=0), "statistic": np.sort(statistic), "replicates": np.array(replicates)}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt
        from scipy.stats import chi2

        picture, axes = plt.subplots(1, 2, figsize=figsize(2, 0.4), width_ratios=[1.6, 1])
        count = int(data["replicates"])
        error = 2 * np.sqrt(0.95 * 0.05 / count)
        axes[0].axhspan(0.95 - error, 0.95 + error, color="0.9")
        axes[0].axhline(0.95, color="0.4", linewidth=0.8, linestyle=":")
        axes[0].plot(data["coverage"], "o", color=COLORS["blue"], linestyle="none")
        axes[0].set_xticks(range(13), LABELS)
        axes[0].set(ylabel="coverage", ylim=(min(0.85, data["coverage"].min() - 0.01), 1.005))
        axes[1].plot(chi2.ppf((np.arange(count) + 0.5) / count, 13), data["statistic"], ".", color=COLORS["blue"], linestyle="none", markersize=3)
        axes[1].plot([2, 35], [2, 35], color="0.4", linewidth=0.8, linestyle=":")
        axes[1].set(xlabel=r"quantile of $\chi^2_{13}$", ylabel="Wald statistic")
        for letter, ax in zip("ab", axes, strict=True):
            ax.set_title(f"({letter})", loc="left")
        return picture

    @staticmethod
    def expect(check, data, sizes, replicates, rows):
        error = np.sqrt(0.95 * 0.05 / replicates)
        check.equal("mean coverage", data["coverage"].mean(), 0.95, max(3 * error, 0.02))
        check.equal("coverage of each parameter", data["coverage"], 0.95, max(4 * error, 0.05))
        check.equal("mean of the Wald statistic", data["statistic"].mean(), 13.3, 4 * np.sqrt(26 / replicates))


@figure("moe/wrong-active", source="companion derivation",
        quick={"sizes": (), "replicates": 12, "rows": 1000, "exact": EXACT},
        paper={"sizes": (500, 2000, 8000), "replicates": 12, "rows": None, "exact": {"sizes": (500, 2000, 8000), "replicates": 12, "rows": None}},
        full={"sizes": (500, 2000, 8000, 32_000), "replicates": 20, "rows": None,
              "exact": {"sizes": (500, 2000, 8000, 32_000), "replicates": 20, "rows": None}},
        caption="S1 has K = 2. Fits with K = 2 converge; dense fits (K = 3) do not, for their Hellinger distance tends to that of the dense mixture "
                "nearest in divergence (dotted). Means, with the range of the replicates.")
class WrongActive:
    """Hellinger distance against n."""

    @staticmethod
    def compute(progress, sizes, replicates, rows, exact):
        right = measured(3, 2, exact["sizes"], exact["replicates"], rows=exact["rows"], information=True)["hellinger"]
        wrong = measured(3, 3, sizes, replicates, rows=rows)["hellinger"] if sizes else np.zeros((0, replicates))
        truth = moe.example("S1")
        limit = reference.distances(nearest_dense(truth), truth, -1.0, 1.0).hellinger
        return {"n": np.array(exact["sizes"]), "dense n": np.array(sizes), "right": right, "wrong": wrong, "limit": np.array(limit)}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, ax = plt.subplots(figsize=figsize(1, 0.8))
        for name, sizes, shown, shade, mark in (("wrong", "dense n", "K = 3 (dense)", "vermilion", "s"), ("right", "n", "K = 2", "blue", "o")):
            if len(data[sizes]):
                ax.loglog(data[sizes], data[name].mean(axis=1), color=COLORS[shade], marker=mark, markersize=4, linestyle="-", label=shown)
                ax.fill_between(data[sizes], data[name].min(axis=1), data[name].max(axis=1), color=COLORS[shade], alpha=0.15, linewidth=0)
        ax.axhline(float(data["limit"]), color="black", linestyle=":", linewidth=1, label=f"limit {float(data['limit']):.4f}")
        ax.set(xlabel="n", ylabel="Hellinger distance to S1")
        ax.set_xticks(data["n"], [str(n) for n in data["n"]])
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        ax.legend(loc="lower left")
        return picture

    @staticmethod
    def expect(check, data, sizes, replicates, rows, exact):
        check.equal("limit", data["limit"], 0.1377, 1e-3)
        if sizes:
            check.equal("dense fits at the largest n over the limit", data["wrong"].mean(axis=1)[-1] / data["limit"], 1, 0.08)
        check.slope("K = 2: slope", exact["sizes"], data["right"], expected=-0.505, tol=0.08)
        check.below("K = 2 at the largest n over the limit of dense fits", data["right"].mean(axis=1)[-1] / data["limit"], 0.4)
