"""Top-K mixtures of experts without rates: regions and cells, the two lines, the table of rates, the exponent, copies of experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from theorylab import moe
from theorylab.lab.figures import figure
from theorylab.lab.style import COLORS, figsize
from theorylab.moe.claims import _reference as reference
from theorylab.moe.claims._programs import fits
from theorylab.moe.claims.exponents import gap_of

PAPER = "Nguyen, Akbarian, Yan and Ho, Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts (ICLR 2024)"
SHADES = tuple(COLORS.values())
OVER = {"sizes": (250, 1000), "replicates": 12, "rows": 1000, "steps": 100}
"""The quick settings of over-specified fits, shared by the figures that use them."""


def title(axes: Any, names: list[str]) -> None:
    """Titles of panels with their letters."""
    for letter, ax, name in zip("abcdefgh", axes, names, strict=False):
        ax.set_title(f"({letter}) {name}", loc="left")


@figure("moe/regions", source=f"{PAPER}, sketch of Voronoi cells, computed here; settings S3 and S1 of the companion",
        quick={"points": 200, "fitting": OVER}, paper={"points": 400, "fitting": {**OVER, "replicates": 60, "steps": 300}},
        caption="(a, b) The regions of S3 (four experts in the plane, K = 2), labelled by the experts that are kept: cones with apex 0 where slopes "
                "rank, polygons where logits do. (c) Experts of S1 (stars) in the plane of slope a and intercept b, with the Voronoi cells of the "
                "true ones, and the atoms of fits with k = 4, K = 3 to n = 1000 rows: two share the middle cell and are known less well.")
class Regions:
    """Maps of the plane."""

    @staticmethod
    def compute(progress, points, fitting):
        side, data = np.linspace(-1, 1, points), {}
        grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
        progress.start("panels", 3)
        for i, selection in enumerate(("slope", "logit")):
            data[selection] = np.asarray(moe.example("S3", selection=selection).region_ids(grid)).reshape(points, points)
            progress.update(i + 1, selection)
        point = fits(4, 3, **fitting)["point"][-1]
        data["a"], data["b"] = point[:, 6:10], point[:, 10:14]
        truth = moe.example("S1")
        return data | {"true a": np.asarray(truth.expert_coef[:, 0]), "true b": np.asarray(truth.expert_intercept)}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap

        picture, axes = plt.subplots(1, 3, figsize=figsize(2, 0.36))
        codes = np.unique(np.concatenate([data["slope"].ravel(), data["logit"].ravel()]))
        light = [tuple(0.55 + 0.45 * np.array(plt.matplotlib.colors.to_rgb(c))) for c in (*SHADES, "#F0E442")]
        for ax, selection in zip(axes, ("slope", "logit"), strict=False):
            place = np.searchsorted(codes, data[selection])
            ax.imshow(place, extent=(-1, 1, -1, 1), origin="lower", cmap=ListedColormap(light[: len(codes)]), vmin=-0.5, vmax=len(codes) - 0.5,
                      interpolation="nearest")
            side = np.linspace(-1, 1, len(place))
            for code in np.unique(place):
                inside = np.argwhere(place == code)
                near = inside[np.argmin(((inside - inside.mean(axis=0)) ** 2).sum(axis=1))]
                name = ", ".join(str(j + 1) for j in range(4) if codes[code] >> j & 1)
                ax.annotate(f"{{{name}}}", (side[near[1]], side[near[0]]), ha="center", va="center")
            ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
        ax = axes[2]
        a, b = np.meshgrid(np.linspace(-3, 4, 300), np.linspace(-2.2, 3.2, 300))
        cell = np.argmin((a[..., None] - data["true a"]) ** 2 + (b[..., None] - data["true b"]) ** 2, axis=-1)
        ax.contour(a, b, cell, levels=[0.5, 1.5], colors="0.4", linewidths=0.8)
        for j, (shade, mark) in enumerate(zip((SHADES[0], SHADES[1], SHADES[1], SHADES[2]), "os^D", strict=True)):
            ax.plot(data["a"][:, j], data["b"][:, j], mark, color=shade, markersize=2.5, linestyle="none", alpha=0.7, label=f"fitted {j + 1}")
        ax.plot(data["true a"], data["true b"], "*", color="#F0E442", markeredgecolor="black", markeredgewidth=0.6, markersize=7, linestyle="none",
                label="true")
        ax.set(xlabel="slope a", ylabel="intercept b", xlim=(-3, 4), ylim=(-2.2, 3.2))
        ax.legend(loc="lower left", fontsize=6, handletextpad=0.2)
        title(axes, ["slopes rank", "logits rank", "cells of fits"])
        return picture

    @staticmethod
    def expect(check, data, points, fitting):
        side = np.linspace(-1, 1, points)
        grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
        for selection in ("slope", "logit"):
            plain = reference.routing(moe.example("S3", selection=selection), grid) @ 2 ** np.arange(4)
            check.true(f"{selection}: regions are those of a stable sort", data[selection].ravel() == plain)
        check.true("slopes: cones, so halving a point keeps its region", _cones(data["slope"]))
        check.true("logits: some region is no cone", not _cones(data["logit"]))
        cell = np.argmin((data["a"][..., None] - data["true a"]) ** 2 + (data["b"][..., None] - data["true b"]) ** 2, axis=-1)
        check.above("share of fits whose cells are 1, 2, 2, 3", (cell == [0, 1, 1, 2]).all(axis=1).mean(), 0.8)
        inside, alone = np.abs(data["b"][:, 1:3] - data["true b"][1]).mean(), np.abs(data["b"][:, 3] - data["true b"][2]).mean()
        check.above("mean deviation of b in the doubled cell over that of expert 3", inside / alone, 1.5)


def _cones(ids: np.ndarray) -> bool:
    """Whether points on rays from 0 have one region: each point of the map against the one at half its place, off the boundaries."""
    n = len(ids)
    side = np.linspace(-1, 1, n)
    near = np.abs(side[:, None] / 2 - side).argmin(axis=1)
    return bool((ids[np.ix_(near, near)] == ids).mean() > 0.97)


@figure("moe/two-lines", source=f"{PAPER}, scatter plots of its setting", quick={"n": 1000}, paper={"n": 1000},
        caption="A sample of S0 with K = 1 (a) and K = 2 (b), logit selection, uniform inputs; marks tell the expert of each point, lines are the "
                "mean. With one active expert the line of slope 20 stops at x = 0.32, where that of slope -20 begins; with two the lines overlap. "
                "Had slopes alone ranked the experts, expert 1 would serve all x > 0.")
class TwoLines:
    """Scatter plots."""

    @staticmethod
    def compute(progress, n):
        x, data = (np.arange(n)[:, None] + 0.5) / n, {}
        for K in (1, 2):
            truth = moe.example("S0", active=K)
            y, expert = truth.sample_experts(x, key=1)
            data |= {f"y{K}": np.asarray(y), f"expert{K}": np.asarray(expert), f"mean{K}": np.asarray(truth.mean(x))}
        return data | {"x": x[:, 0]}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, axes = plt.subplots(1, 2, figsize=figsize(2, 0.4), sharey=True)
        for ax, K in zip(axes, (1, 2), strict=True):
            for j, mark in enumerate("x."):
                on = data[f"expert{K}"] == j
                ax.plot(data["x"][on], data[f"y{K}"][on], mark, color=SHADES[1 - j], markersize=3, linestyle="none", alpha=0.6,
                        label=f"expert {j + 1}")
            shown = data[f"mean{K}"].copy()
            if K == 1:
                shown[np.argmax(np.diff(data["expert1"] == 0))] = np.nan
            ax.plot(data["x"], shown, color="black", linewidth=1.2, label="mean")
            ax.axvline(0.32, color="0.5", linewidth=0.7, linestyle=":")
            ax.set(xlabel="x")
        axes[0].set_ylabel("y")
        axes[0].legend(loc="lower left", bbox_to_anchor=(0.37, 0.0))
        title(axes, ["K = 1", "K = 2"])
        return picture

    @staticmethod
    def expect(check, data, n):
        first = data["expert1"] == 0
        check.true("K = 1: expert 2 before x = 0.32, expert 1 after", first == (data["x"] > 0.32))
        for j, line in enumerate(([15.0, -20.0], [-5.0, 20.0])):
            on = data["expert1"] == j
            found, spread = np.polyfit(data["x"][on], data["y1"][on], 1, cov="unscaled")
            error = np.sqrt(np.diag(spread) * (0.3, 0.4)[j])
            check.below(f"K = 1: least squares line of expert {j + 1}, in standard errors", np.abs(found - line[::-1]) / error, 4)
        levels = [data["mean1"][first][0], data["mean1"][~first][-1]]
        check.equal("levels at the switch", levels, np.array([8.6, 1.4]), 0.03)
        both = np.quantile(data["x"][data["expert2"] == 0], 0.02), np.quantile(data["x"][data["expert2"] == 1], 0.98)
        check.between("K = 2: quantiles 2 % of the inputs of expert 1 and 98 % of those of expert 2", both, 0.2, 0.45)
        check.below("K = 2: they overlap", both[0], both[1])


QUANTITIES = {"gate_weight": ("weights", "black", "o", "-"), "gate_coef": (r"$\beta_1$", "blue", "s", "-"), "expert_coef": ("a", "green", "^", "--"),
              "variance": (r"$\sigma$", "orange", "D", ":"), "expert_intercept": ("b", "vermilion", "v", "-.")}


@figure("moe/rate-table", source=f"{PAPER}, table of rates; sharper column by a companion derivation", quick={"most": 5}, paper={"most": 5},
        caption="Rates $n^{-p}$ (up to logarithms) of the parameters of a true expert whose Voronoi cell holds m fitted ones. (a) As the paper "
                r"states them with $\bar r(m) = 2m$: $\beta_1$ and b have one curve, a and $\sigma$ another. (b) Sharper: $\beta_1$ and a enter "
                r"quadratically in cells of two and more. The density has p = 1/2 throughout.")
class RateTable:
    """Powers by number of fitted experts."""

    @staticmethod
    def compute(progress, most):
        found = [moe.rates(m) for m in range(1, most + 1)]
        data = {f"{kind}/{name}": np.array([float(getattr(r, kind)[name]) for r in found]) for kind in ("paper", "sharp") for name in QUANTITIES}
        return data | {"m": np.arange(1, most + 1)}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, axes = plt.subplots(1, 2, figsize=figsize(2, 0.42), sharey=True)
        for ax, kind in zip(axes, ("paper", "sharp"), strict=True):
            for place, (name, (shown, shade, mark, dash)) in enumerate(QUANTITIES.items()):
                at = data["m"] + 0.04 * (place - 2)
                ax.plot(at, data[f"{kind}/{name}"], marker=mark, markersize=4, color=COLORS[shade], linestyle=dash,
                        label=shown)
            ax.set(xlabel="fitted experts in the cell m", xticks=data["m"], yscale="log")
            ax.set_yticks([1 / 2, 1 / 4, 1 / 6, 1 / 8, 1 / 12, 1 / 20], ["1/2", "1/4", "1/6", "1/8", "1/12", "1/20"])
            ax.minorticks_off()
        axes[0].set_ylabel("power p of the rate $n^{-p}$")
        axes[1].legend(loc="lower left", ncols=2)
        title(axes, ["as published", "sharper"])
        return picture

    @staticmethod
    def expect(check, data, most):
        m = np.arange(2, most + 1)
        check.equal("b: 1 / (4m)", data["paper/expert_intercept"][1:], 1 / (4 * m), 1e-15)
        check.equal("variance: 1 / (2m)", data["paper/variance"][1:], 1 / (2 * m), 1e-15)
        check.equal("one expert in the cell: 1/2 for all", [data[f"{k}/{q}"][0] for k in ("paper", "sharp") for q in QUANTITIES], 0.5, 0)
        check.equal("sharper: gate and expert slopes", np.concatenate([data["sharp/gate_coef"][1:], data["sharp/expert_coef"][1:]]), 0.25, 0)


GAPS = (0.4, 0.3, 0.2, 0.14, 0.1)


@figure("moe/exponents", source="companion derivation; the exponents 4 and 6 are those of both papers", quick={"gaps": GAPS}, paper={"gaps": GAPS},
        caption="Distance between S2 and the mixture in which m atoms stand for its first expert, at the Gauss-Hermite places $b + t z_j$ with "
                "variances $\\sigma - t^2$: Hellinger (lines) and total variation (open marks) fall as $t^{2m}$, so data cannot tell t below "
                "$n^{-1/(4m)}$.")
class Exponents:
    """Distance against the gap."""

    @staticmethod
    def compute(progress, gaps):
        data = {}
        for m in (2, 3, 4):
            found = [gap_of(m, t) for t in gaps]
            data |= {f"H{m}": np.array([d.hellinger for d in found]), f"TV{m}": np.array([d.variation for d in found])}
        return data | {"t": np.array(gaps)}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, ax = plt.subplots(figsize=figsize(1, 0.9))
        for m, shade, mark in ((2, "blue", "o"), (3, "vermilion", "s"), (4, "green", "^")):
            ax.loglog(data["t"], data[f"H{m}"], color=COLORS[shade], linestyle="-", marker=mark, markersize=4, label=f"H, m = {m}")
            ax.loglog(data["t"], data[f"TV{m}"], color=COLORS[shade], linestyle="none", marker=mark, markersize=4, markerfacecolor="white")
            ax.loglog(data["t"], data[f"H{m}"][-1] * (data["t"] / data["t"][-1]) ** (2 * m), color="0.6", linestyle=":", linewidth=0.9, zorder=0,
                      label="exact slopes 4, 6, 8" if m == 4 else None)
        ax.set(xlabel="gap t", ylabel="distance to S2", xlim=(0.09, 0.5))
        ax.set_xticks(GAPS, [f"{t:g}" for t in GAPS])
        ax.minorticks_off()
        ax.legend(loc="lower right")
        return picture

    @staticmethod
    def expect(check, data, gaps):
        for m, variation in ((2, 2.10e-5), (3, 2.10e-7), (4, 2.11e-9)):
            local = np.diff(np.log(data[f"H{m}"])) / np.diff(np.log(gaps))
            check.equal(f"m = {m}: last slope of H", local[-1], 2 * m, 0.05)
            check.equal(f"m = {m}: total variation at t = 0.1", data[f"TV{m}"][-1], variation, 0.005, relative=True)


NUMBERS = ((1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1), (1, 3, 1), (2, 2, 2), (1, 3, 2), (2, 3, 2))
KEPT = (2, 3, 4, 5)


@figure("moe/multiplicities", source=f"companion derivation, against the condition of {PAPER}", quick={"panels": 8}, paper={"panels": 16},
        caption="Hellinger distance to S1 (regions {1, 2} and {2, 3}) of the mixture with $m_j$ copies of expert j that share its weight, of which "
                r"$\bar K$ are kept. It is 0 (boxes) exactly where $m_1 + m_2 = m_2 + m_3 = \bar K$: a larger $\bar K$ is as wrong as a smaller one.")
class Multiplicities:
    """Heat map."""

    @staticmethod
    def compute(progress, panels):
        truth, line = moe.example("S1"), np.linspace(-1, 1, 401)
        H = np.full((len(KEPT), len(NUMBERS)), np.nan)
        listed = np.zeros(H.shape, bool)
        for i, j in np.ndindex(H.shape):
            m, K = NUMBERS[j], KEPT[i]
            if sum(m) >= K:
                H[i, j] = reference.distances(reference.copies(truth, m, K), truth, -1.0, 1.0, panels=panels, nodes=12).hellinger
                listed[i, j] = m in moe.admissible_multiplicities(truth, sum(m), K, line)
        return {"H": H, "listed": listed}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt

        picture, ax = plt.subplots(figsize=figsize(2, 0.36))
        drawn = ax.imshow(np.where(data["H"] < 1e-8, 0, data["H"]), cmap="Oranges", vmin=0, aspect="auto", origin="lower")
        for i, j in np.ndindex(data["H"].shape):
            h = data["H"][i, j]
            if np.isfinite(h):
                ax.annotate("0" if h < 1e-8 else f"{h:.3f}".lstrip("0"), (j, i), ha="center", va="center", color="white" if h > 0.25 else "black")
            if data["listed"][i, j]:
                ax.add_patch(plt.Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, fill=False, edgecolor=COLORS["blue"], linewidth=2))
        ax.set_xticks(range(len(NUMBERS)), ["(" + ", ".join(map(str, m)) + ")" for m in NUMBERS])
        ax.set_yticks(range(len(KEPT)), [str(K) for K in KEPT])
        ax.set(xlabel="copies of the three experts $(m_1, m_2, m_3)$", ylabel=r"kept $\bar K$")
        picture.colorbar(drawn, label="H")
        return picture

    @staticmethod
    def expect(check, data, panels):
        known = {((1, 2, 1), 3): 0.0, ((1, 2, 1), 2): 0.0887, ((1, 2, 1), 4): 0.1787, ((2, 1, 1), 3): 0.0988, ((2, 2, 1), 3): 0.0543,
                 ((2, 1, 2), 3): 0.0, ((1, 3, 1), 4): 0.0, ((2, 2, 2), 4): 0.0, ((1, 1, 1), 2): 0.0}
        for (m, K), h in known.items():
            check.equal(f"copies {m}, K = {K}: H", data["H"][KEPT.index(K), NUMBERS.index(m)], h, 6e-5 if h else 1e-8)
        seen = np.isfinite(data["H"])
        condition = np.array([[m[0] + m[1] == K == m[1] + m[2] for m in NUMBERS] for K in KEPT])
        check.true("H is 0 exactly under the condition", ((data["H"] < 1e-8) == condition)[seen])
        check.true("and the list agrees", (data["listed"] == condition)[seen])
