"""How bundles of 2 x 2 covariances are drawn: in their cone, or normalized in the disc. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from theorylab.lab.style import figsize

START = r"start: $2\Sigma_{12}$"
MOST_PATHS = 700                                                           # in a disc; of more starts, every second path and all ends are drawn
PLAIN = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8}
CONE = r"in the cone of covariances, with coordinates $(\Sigma_{11} - \Sigma_{22},\, 2\Sigma_{12},\, \Sigma_{11} + \Sigma_{22})$, the last one upward"
DISC = (r"of $\Sigma / \operatorname{tr}\Sigma$ in the coordinates $(\Sigma_{11} - \Sigma_{22},\, 2\Sigma_{12})$; "
        "the unit circle holds the matrices of rank one")


def bar(picture: Any, shown: Any, label: str, **place: Any) -> None:
    """The scale of the colors, without the transparency of the paths."""
    scale = picture.colorbar(shown, label=label, **place)
    scale.solids.set_alpha(1.0)
    scale.outline.set_visible(False)


def layout(count: int) -> tuple[int, int]:
    """Rows and columns for so many panels."""
    return (2, 2) if count == 4 else (1, count)


def cones(shown: dict[str, SimpleNamespace], names: dict[str, str], azimuths: Sequence[float], color: str, label: str, rays: Callable,
          reach: float = 1.1) -> Any:
    """Paths in the cone of covariances of trace up to `reach`, colored by an array of the panel.

    `rays(kind, panel)` lists ends of lines from zero, names, colors and places of the names.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import Normalize
    from mpl_toolkits.mplot3d.art3d import Line3DCollection

    rows, columns = layout(len(shown))
    picture = plt.figure(figsize=figsize(2, 0.86 * rows / columns))
    picture.set_layout_engine("none")                                       # it would leave half of a three-dimensional panel empty
    every = np.concatenate([getattr(panel, color) for panel in shown.values()])
    norm, turn, lines = Normalize(every.min(), every.max()), np.linspace(0, 2 * np.pi, 121), None
    for i, (kind, panel) in enumerate(shown.items()):
        place = (0.9 / columns * (i % columns), (rows - 1 - i // columns) / rows, 0.88 / columns, 0.97 / rows)
        ax: Any = picture.add_axes(place, projection="3d", computed_zorder=False)
        around, height = np.meshgrid(turn, [0.0, reach])
        ax.plot_surface(height * np.cos(around), height * np.sin(around), height, color="0.4", alpha=0.07, linewidth=0, rasterized=True, zorder=1)
        ax.plot(reach * np.cos(turn), reach * np.sin(turn), reach, color="0.6", linewidth=0.5, linestyle="-", zorder=1)
        values = {"cmap": "viridis", "norm": norm}
        lines = Line3DCollection(list(panel.lines), array=getattr(panel, color), alpha=0.6, linewidths=0.6, zorder=3, **values)
        ax.add_collection(lines)
        ax.scatter(*panel.lines[:, -1].T, c=getattr(panel, color), s=5, linewidths=0, depthshade=False, zorder=5, **values)
        for end, text, shade, where in rays(kind, panel):
            ax.plot(*np.stack([0 * end, end], -1), color=shade, linewidth=1.0, linestyle="--", zorder=4)
            ax.text(*end, text, color=shade, fontsize="small", zorder=6, bbox=PLAIN, **where)
        ax.set(xlim=(-1.1 * reach, 1.1 * reach), ylim=(-1.1 * reach, 1.1 * reach), zlim=(0.08 * reach, 1.18 * reach))
        ax.set_box_aspect((2, 2, 1.6), zoom=1.6)
        ax.view_init(elev=20, azim=azimuths[i])
        ax.set_axis_off()
        ax.text2D(0.02, 1.0, f"({'abcd'[i]}) {names[kind]}", transform=ax.transAxes, va="top")
    bar(picture, lines, label, cax=picture.add_axes((0.905, 0.16, 0.012, 0.66)))
    return picture


def discs(shown: dict[str, SimpleNamespace], names: dict[str, str], marks: Callable) -> Any:
    """Paths of normalized covariances in the unit disc, whose boundary holds rank one.

    `marks(kind, panel)` lists points, names, colors and places of the names.
    """
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize

    rows, columns = layout(len(shown))
    picture, axes = plt.subplots(rows, columns, figsize=figsize(2, 0.93 * rows / columns), sharex=True, sharey=True, squeeze=False)
    norm, turn, lines = Normalize(-1, 1), np.linspace(0, 2 * np.pi, 361), None
    for i, (ax, (kind, panel)) in enumerate(zip(axes.flat, shown.items(), strict=True)):
        ax.plot(np.cos(turn), np.sin(turn), color="0.55", linewidth=0.7, linestyle="-", zorder=1)
        values = {"cmap": "viridis", "norm": norm, "rasterized": True}          # a thousand paths as vectors are 3 MB
        drawn = slice(None, None, -(-len(panel.lines) // MOST_PATHS))
        lines = LineCollection(list(panel.lines[drawn]), array=panel.color[drawn], alpha=0.6, linewidths=0.45, zorder=2, **values)
        ax.add_collection(lines)
        ax.scatter(*panel.lines[:, -1].T, c=panel.color, s=4, linewidths=0, zorder=3, **values)
        for at, text, shade, place in marks(kind, panel):
            ax.plot(*at[:2], marker="o", markersize=6, markerfacecolor="none", markeredgecolor=shade, markeredgewidth=1.1, linestyle="none", zorder=4)
            ax.annotate(text, at[:2], xytext=place, color=shade, fontsize="small", ha="center", va="center", zorder=5,
                        arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 0.7, "shrinkB": 3})
        ax.text(0.76, 0.76, "rank one", rotation=-45, ha="center", va="center", color="0.35", fontsize="small")
        ax.set(xlim=(-1.12, 1.12), ylim=(-1.12, 1.12), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        ax.text(0.0, 1.0, f"({'abcd'[i]}) {names[kind]}", transform=ax.transAxes, va="bottom")
    for ax in axes[-1]:
        ax.set_xlabel(r"$(\Sigma_{11} - \Sigma_{22})\,/\,\mathrm{tr}\,\Sigma$")
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$2\Sigma_{12}\,/\,\mathrm{tr}\,\Sigma$")
    bar(picture, lines, START, ax=axes, shrink=0.75, aspect=30, pad=0.02)
    return picture
