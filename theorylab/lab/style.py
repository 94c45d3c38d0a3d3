"""One look for all figures: colours that survive colour blindness, line styles as the second cue, column widths, direct labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from theorylab.errors import ArgumentError, UnknownNameError

# Okabe and Ito (2008), ordered so that neighbours differ in lightness too; their yellow is too pale for lines on white.
COLORS = {"blue": "#0072B2", "vermilion": "#D55E00", "green": "#009E73", "purple": "#CC79A7", "sky": "#56B4E9", "orange": "#E69F00",
          "black": "#000000"}
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)), (0, (1, 1)))
WIDTHS = {1: 3.25, 2: 6.75}  # inches: one and two columns of a printed page
_LINE = 1.15  # height of a line of text in units of its size


def style() -> dict[str, Any]:
    """The matplotlib settings of `paper_style`, as a dictionary for `matplotlib.rc_context`."""
    from cycler import cycler

    return {
        "axes.prop_cycle": cycler(color=list(COLORS.values())) + cycler(linestyle=list(LINE_STYLES)),
        "figure.figsize": figsize(), "figure.dpi": 120, "figure.constrained_layout.use": True, "savefig.dpi": 200, "savefig.bbox": None,
        "font.family": "sans-serif", "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "legend.fontsize": 7, "legend.frameon": False, "mathtext.fontset": "dejavusans",
        "lines.linewidth": 1.3, "lines.markersize": 3.5, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False, "image.cmap": "viridis",
        # The SVG is text that can be searched, and the same bytes for the same picture.
        "svg.fonttype": "none", "svg.hashsalt": "theorylab", "path.simplify": True,
    }


@contextmanager
def paper_style(**changes: Any) -> Iterator[None]:
    """Use the style of the paper figures inside a `with` block; the settings outside are as before.

    Args:
        **changes: matplotlib settings to override, with `_` in place of the first `.` only where Python needs it (`font_size=10`).

    Raises:
        UnknownNameError: a setting is not known to matplotlib.

    Example:
        >>> import matplotlib
        >>> with paper_style(font_size=9):
        ...     matplotlib.rcParams["font.size"]
        9.0
    """
    import matplotlib as mpl

    settings: dict[Any, Any] = style()
    for name, value in changes.items():
        full = next((k for k in mpl.rcParams if k == name or k.replace(".", "_") == name), None)
        if full is None:
            raise UnknownNameError.of("matplotlib setting", name, mpl.rcParams)
        settings[full] = value
    with mpl.rc_context(settings):
        yield


def figsize(columns: int = 1, aspect: float = 0.72) -> tuple[float, float]:
    """Width and height in inches of a figure that is one or two columns wide; `aspect` is height over width.

    Example:
        >>> figsize(1, 0.5)
        (3.25, 1.625)
    """
    if columns not in WIDTHS:
        raise ArgumentError(f"columns must be 1 or 2, got {columns!r}")
    if not aspect > 0:
        raise ArgumentError(f"aspect must be above 0, got {aspect!r}")
    return WIDTHS[columns], WIDTHS[columns] * aspect


def look(index: int) -> dict[str, Any]:
    """Colour and line style number `index` of the cycle, to repeat the look of a curve elsewhere.

    Example:
        >>> look(0)
        {'color': '#0072B2', 'linestyle': '-'}
    """
    return {"color": list(COLORS.values())[index % len(COLORS)], "linestyle": LINE_STYLES[index % len(LINE_STYLES)]}


def slope_triangle(ax: Any, slope: float, at: tuple[float, float], *, width: float = 4.0, label: str | None = None, flip: bool = False,
                   interval: tuple[float, float] | None = None, color: str = "0.3") -> Any:
    """Draw a right triangle whose long side has a given slope on log-log axes; returns its patch.

    Args:
        ax: Axes with two logarithmic axes.
        slope: slope in logarithms.
        at: left end of the sloped side, in data units.
        width: ratio of the right end to the left end.
        label: text beside the vertical side; the slope (and its interval) unless given.
        flip: draw the right angle on the other side of the sloped side.
        interval: fitted interval, written after the slope.
        color: of lines and text.

    Raises:
        ArgumentError: the axes are not logarithmic, or `at` or `width` is out of range.
    """
    if ax.get_xscale() != "log" or ax.get_yscale() != "log":
        raise ArgumentError(f"slope_triangle needs two logarithmic axes, got {ax.get_xscale()} and {ax.get_yscale()}")
    x, y = map(float, at)
    if not (x > 0 and y > 0 and width > 1):
        raise ArgumentError(f"slope_triangle needs a positive point and a width above 1, got at = {at} and width = {width}")
    far, end = x * width, y * width**slope
    corner = (x, end) if flip else (far, y)
    patch = ax.fill([x, corner[0], far], [y, corner[1], end], facecolor="none", edgecolor=color, linewidth=0.8, linestyle="-")[0]
    if label is None:
        label = (f"{slope:.2g}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval is not None else "")).replace("-", "\N{MINUS SIGN}")
    side = "right" if flip else "left"
    ax.annotate(label, (corner[0], float(np.sqrt(y * end))), xytext=(-3 if flip else 3, 0), textcoords="offset points", ha=side, va="center",
                fontsize="small", color=color)
    return patch


def label_lines(ax: Any, labels: Mapping[str, str] | Sequence[str] | None = None, *, pad: float = 3.0) -> list[Any]:
    """Write the name of each line at its right end, in its colour, moved apart where names would overlap; returns the texts.

    Call it last: the limits of the axes must be final.

    Args:
        ax: Axes with labelled lines.
        labels: new names, by old name or in the order of the lines; the labels of the lines unless given.
        pad: distance from the end of the line, in points.
    """
    lines = [line for line in ax.lines if not line.get_label().startswith("_") or not (labels is None or isinstance(labels, Mapping))]
    if labels is not None and not isinstance(labels, Mapping) and len(labels) != len(lines):
        raise ArgumentError(f"labels must name {len(lines)} lines, got {len(labels)}")
    ax.figure.draw_without_rendering()  # constrained layout moves the axes, and the heights below are in pixels
    ends = []
    for i, line in enumerate(lines):
        xy = np.column_stack([np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)])
        pixels = ax.transData.transform(xy[np.isfinite(xy).all(axis=1)])
        pixels = pixels[np.isfinite(pixels).all(axis=1)]
        if len(pixels):
            old = line.get_label()
            text = labels.get(old, old) if isinstance(labels, Mapping) else labels[i] if labels is not None else old
            ends.append((pixels[-1], text, line.get_color()))
    per_point = ax.figure.dpi / 72
    from matplotlib.font_manager import FontProperties

    size = FontProperties(size="small").get_size_in_points()
    heights = _spread(np.array([end[1] for end, _, _ in ends]), _LINE * size * per_point)
    return [ax.annotate(text, ax.transData.inverted().transform(end), xytext=(pad, (height - end[1]) / per_point), textcoords="offset points",
                        va="center", ha="left", color=color, fontsize="small", annotation_clip=False)
            for (end, text, color), height in zip(ends, heights, strict=True)]


def _spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Heights at least `gap` apart, in the same order and as near to the wanted ones as possible (isotonic regression)."""
    order = np.argsort(wanted, kind="stable")
    blocks: list[list[float]] = []  # mean and number of pooled values of wanted - rank * gap
    for rank, value in enumerate(wanted[order]):
        blocks.append([float(value) - rank * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * count) / (blocks[-1][1] + count), blocks[-1][1] + count]
    level = [mean for mean, count in blocks for _ in range(int(count))]
    placed = np.empty(len(wanted))
    placed[order] = np.array(level) + gap * np.arange(len(wanted))
    return placed
