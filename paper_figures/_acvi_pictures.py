"""What the pictures of the family share: the look of each method, the plane with its field, axes of counts. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from theorylab.lab.style import COLORS

LOOKS: dict[str, dict[str, Any]] = {
    "ACVI": {"color": COLORS["blue"], "linestyle": "-"},
    "P-ACVI": {"color": COLORS["blue"], "linestyle": (0, (4, 1))},
    "I-ACVI": {"color": COLORS["vermilion"], "linestyle": "-"},
    "PI-ACVI": {"color": COLORS["vermilion"], "linestyle": (0, (4, 1))},
    "GDA": {"color": "0.55", "linestyle": ":"},
    "EG": {"color": COLORS["green"], "linestyle": "--"},
    "OGDA": {"color": COLORS["orange"], "linestyle": "-."},
    "LA5-GDA": {"color": COLORS["purple"], "linestyle": (0, (5, 1, 1, 1, 1, 1))},
}
MARKS = {"ACVI": "o", "P-ACVI": "o", "I-ACVI": "s", "PI-ACVI": "s", "GDA": "x", "EG": "^", "OGDA": "v", "LA5-GDA": "D"}
"""The second cue where a curve has few points."""


def arrows(ax: Any, points: np.ndarray, field: np.ndarray) -> None:
    """The direction of the field, as thin grey arrows of equal length."""
    length = np.maximum(np.linalg.norm(field, axis=-1, keepdims=True), 1e-12)
    ax.quiver(*points.T, *(field / length).T, color="0.82", width=0.004, scale=28, headwidth=4, pivot="mid", zorder=0)


def trail(ax: Any, path: np.ndarray, name: str, *, every: int = 0, **options: Any) -> None:
    """A trajectory in the plane in the look of a method, with a dot at each `every`-th point."""
    ax.plot(*path.T, label=name, **{"linewidth": 1.0, "zorder": 3, **LOOKS[name], **options})
    if every:
        ax.plot(*path[::every].T, marker=".", markersize=3.5, linestyle="none", color=LOOKS[name]["color"], zorder=4)


def star(ax: Any, at: Sequence[float], label: str | None = None) -> None:
    """A solution."""
    ax.plot(*at, marker="*", markersize=10, markerfacecolor="#F0E442", markeredgecolor="black", markeredgewidth=0.6, linestyle="none", zorder=6,
            label=label, clip_on=False)


def letters(axes: Any, titles: Sequence[str]) -> None:
    """Titles of panels with their letters, at the left."""
    for letter, ax, title in zip("abcdefgh", axes, titles, strict=False):
        ax.set_title(f"({letter}) {title}", loc="left")


def legend(picture: Any, axes: Any, **options: Any) -> None:
    """One legend below all panels, with each name once."""
    named = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    options = {"ncols": 5, "handlelength": 2.4, "columnspacing": 1.2, **options}
    picture.legend(list(named.values()), list(named), loc="outside lower center", **options)
