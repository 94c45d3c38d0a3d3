"""Draws the picture of the README, `docs/assets/hero.svg`, from runs of the package.

Usage: `python docs/hero.py [OUTPUT]`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.lab.style import COLORS, paper_style

OUTPUT = Path(__file__).resolve().parent / "assets" / "hero.svg"
QUERY = np.array([[0.4, 0.9]])
START = np.array([[1.0, 0.3], [0.3, 0.6]])
# the head of the figure "convergence and blow-up" of the paper: a frozen line and a direction of blow-up attract
MIXED = {
    "Q": np.array([[0.6764132657544725, 1.5210991859339182], [-0.5118762450490144, 1.150194635377595]]),
    "K": np.array([[-0.5907168066359194, -0.7687652516461853], [-0.33500916605030867, 0.09299944353450965]]),
    "V": np.array([[1.8317530059587854, -0.37688784393619434], [0.34811234158600607, -0.11628155656536983]]),
    "scale": 2**-0.5,
}


class Runs(NamedTuple):
    """What is drawn.

    Attributes:
        collapse, blow_up: covariances along depth; the first row is the start.
        limit: what the first tends to.
        tokens: paths of tokens in each of the two, shape (depth, count, 2).
        blow_up_time: of the second.
        path: normalized covariances of all starts of the third panel, shape (row, start, 2, 2).
        explodes: which of them blow up.
    """

    collapse: np.ndarray
    blow_up: np.ndarray
    limit: np.ndarray
    tokens: tuple[np.ndarray, np.ndarray]
    blow_up_time: float
    path: np.ndarray
    explodes: np.ndarray


def disc(side: int) -> np.ndarray:
    """Covariances of trace one on a grid, as in the paper: shape (count, 2, 2)."""
    u, w = (g.ravel() for g in np.meshgrid(*[np.linspace(-1, 1, side)] * 2, indexing="ij"))
    u, w = u[u**2 + w**2 < 1], w[u**2 + w**2 < 1]
    return np.stack([np.stack([(1 + u) / 2, w / 2], -1), np.stack([w / 2, (1 - u) / 2], -1)], -2)


def compute(side: int = 30, tokens: int = 60) -> Runs:
    """All runs of the picture."""
    start = tp.Gaussian(np.zeros(2), START)
    collapse, spread = (tp.GaussianFlow(tp.Softmax(QUERY, -QUERY, v)) for v in (1.0, -1.0))
    end = float(tp.blow_up_time(spread, start))
    first = np.asarray(start.sample(tokens, key=7).points)
    covs, paths = [], []
    for flow, times in ((collapse, 40 * np.linspace(0, 1, 41) ** 3), (spread, 0.97 * end * (1 - (1 - np.linspace(0, 1, 41)) ** 2))):
        value = tl.integrate(flow, start, times).value
        covs.append(np.asarray(value.cov))
        move = np.asarray(value.factor) @ np.linalg.inv(np.asarray(start.factor))        # a token moves with the factor
        paths.append(np.einsum("tij,nj->tni", move, first))
    many = tp.Gaussian(np.zeros((len(disc(side)), 2)), disc(side))
    clock = np.append(20 * np.linspace(0, 1, 34) ** 1.8, 300.0)
    sol = tl.integrate(tp.Desingularized(tp.Softmax(**MIXED)), many, clock, rtol=1e-10, atol=1e-12, runs=len(many.mean), throw=False)
    if not np.isin(sol.status, (tl.Status.BLOWUP, tl.Status.CONVERGED)).all():
        raise RuntimeError("a start of the third panel was not decided")
    limit = np.asarray(tp.limit(collapse, start).cov)
    return Runs(covs[0], covs[1], limit, (paths[0], paths[1]), end, np.asarray(sol.value.cov), np.asarray(sol.status == tl.Status.BLOWUP))


def ellipse(cov: np.ndarray) -> np.ndarray:
    """The Gaussian at two standard deviations, shape (2, points)."""
    angle = np.linspace(0, 2 * np.pi, 121)
    values, vectors = np.linalg.eigh(cov)
    return vectors @ (2 * np.sqrt(np.maximum(values, 0))[:, None] * [np.cos(angle), np.sin(angle)])


def draw(runs: Runs) -> Any:
    """The figure."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle

    fig, axes = plt.subplots(1, 3, figsize=(8.6, 3.1), width_ratios=[1, 1, 1.2])
    rows = np.linspace(0, 40, 9).astype(int)
    shades = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, len(rows)))
    left, middle, right = axes
    for ax, covs, paths, limit in ((left, runs.collapse, runs.tokens[0], 2.3), (middle, runs.blow_up, runs.tokens[1], 7.0)):
        ax.add_collection(LineCollection(list(np.moveaxis(paths[::5], 1, 0)), colors="0.8", linewidths=0.5, zorder=0))
        ax.add_collection(LineCollection([ellipse(covs[row]).T for row in rows], colors=shades, linewidths=1.1))
        ax.plot(*paths[-1].T, ".", color="0.35", markersize=2.4, markeredgewidth=0)
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit))
    left.plot(*ellipse(runs.limit), "-", color=COLORS["black"], linewidth=1.4)
    _heading(left, "Collapse to a line", "tokens and covariance over depth;\nblack: the limit, of rank one")
    _heading(middle, f"Blow-up at depth {runs.blow_up_time:.3f}", "the same head and tokens\nwith the opposite sign of $V$")

    right.add_patch(Circle((0, 0), 1, fill=False, linewidth=0.8, color="0.6"))
    path = np.stack([runs.path[..., 0, 0] - runs.path[..., 1, 1], 2 * runs.path[..., 0, 1]], -1)
    count = int(runs.explodes.sum())
    for blows, color, every, text, offset in ((False, "blue", 4, f"{len(runs.explodes) - count} freeze\non a line", (7, -3)),
                                              (True, "vermilion", 1, f"{count} blow up", (-6, 9))):
        which = np.flatnonzero(runs.explodes == blows)
        right.add_collection(LineCollection(list(np.moveaxis(path[:, which[::every]], 1, 0)), colors=COLORS[color], linewidths=0.5, alpha=0.7))
        end = path[-1, which[0]]
        right.plot(*end, "o", color=COLORS[color], markersize=5)
        right.annotate(text, end, xytext=offset, textcoords="offset points", color=COLORS[color], ha="right" if blows else "left", fontsize="small")
    right.set(xlim=(-1.65, 1.65), ylim=(-1.375, 1.375))
    _heading(right, f"{len(runs.explodes)} starts under one head", "normalized covariances;\nthe circle: rank one")
    for ax in axes:
        ax.set(aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return fig


def _heading(ax: Any, title: str, text: str) -> None:
    ax.set_title(f"{title}\n", fontweight="bold", linespacing=2.4)
    ax.text(0.5, 1.02, text, transform=ax.transAxes, ha="center", va="bottom", fontsize="small", color="0.35")


def svg(runs: Runs) -> str:
    """The picture as SVG on white, coordinates of paths to a hundredth of a point."""
    import io

    buffer = io.StringIO()
    with paper_style(font_size=9, axes_titlesize=10):
        draw(runs).savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), buffer.getvalue())


def main(argv: list[str]) -> int:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    target = Path(argv[0]) if argv else OUTPUT
    target.write_text(svg(compute()), encoding="utf-8")
    print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
