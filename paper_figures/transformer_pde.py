r"""Softmax and L2 attention on 2 x 2 covariances: decay, clustering on a line, on two lines, blow-up, and both at once (paper, Gaussian experiments).

Every start of a panel is followed by `Desingularized` until it is at rest, decays, grows or has blown up, so an end point is a limit and not the
state at which a threshold was met. Starts run in blocks of `LANES`, and a single row of queries is padded with a row of zeros, so two compiled programs
(softmax, L2) serve all figures and presets. `expect` compares with closed forms and with the published scheme, `OfficialEuler`, on the same
starts; its count of iterations is the published one, which leaves out the last step of a run that exploded. The slowest panel of that scheme, growing L2 (19000 steps
of 0.001), runs on a subset of at most `LANES` starts.

Weights are those of the published scripts: $A = K^\top Q / \sqrt 2$ for both variants, and $P = K^\top K$ without a factor for L2.
"""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import RunWarning
from theorylab.lab.figures import figure
from theorylab.lab.style import COLORS, figsize

PAPER = "A Unified Perspective on the Dynamics of Deep Transformers"
KINDS = {"softmax": "softmax attention", "l2": "L2 attention"}
LANES = 100
CLOCK = np.append(24 * np.linspace(0, 1, 161) ** 2, 1000.0)                  # dense at the start; every run ends by itself before the last entry
POINTS = 40                                                                # of a drawn trajectory
SLICE = 5000                                                               # steps after which the runs still alive are packed into fewer blocks

DECAY_Q = np.array([[0.45805494822409054, 0.30834960696491165], [0.23148704503556228, 0.2774245517561259]])
DECAY_V = np.array([[2.6693776102802937, -0.6915301722052816], [-0.6915301722052816, 2.6874461223198938]])
LINE_Q = np.array([[0.4063236466758838, 0.913729223649989], [0.0, 0.0]])
MIXED_Q = np.array([[0.6764132657544725, 1.5210991859339182], [-0.5118762450490144, 1.150194635377595]])
MIXED_K = np.array([[-0.5907168066359194, -0.7687652516461853], [-0.33500916605030867, 0.09299944353450965]])
TWO_LINES_V = np.array([[-0.3488944509894251, 0.9837034333517989], [0.5809228307171408, 0.07028444085744995]])
MIXED_V = np.array([[1.8317530059587854, -0.37688784393619434], [0.34811234158600607, -0.11628155656536983]])
GROWTH_Q = np.array([[-0.09678415830991538, 0.42220166048145347], [-0.22546156340099752, -0.6379430932117882]])
GROWTH_K = np.array([[-0.016286303695742424, 1.0442167783791647], [-1.0848803286340662, -2.2059248271588077]])

# ------------------------------------------------------------------------------------------------ numbers


def grid(side: int, limit: float, most: int) -> np.ndarray:
    """The published grid of starts of trace one, thinned to at most `most`, shape (starts, 2, 2)."""
    u, w = (a.ravel() for a in np.meshgrid(*[np.linspace(-limit, limit, side)] * 2, indexing="ij"))
    u, w = (a[1 - u**2 > w**2] for a in (u, w))
    starts = np.stack([np.stack([1 + u, w], -1), np.stack([w, 1 - u], -1)], -2) / 2
    return starts[:: math.ceil(len(starts) / most)]


def heads(Q: np.ndarray, K: np.ndarray, V: np.ndarray) -> dict[str, Any]:
    """Both variants with the published scaling: the scale of L2 would also act on its keys, so the factor goes to its queries."""
    return {"softmax": tp.Softmax(Q, K, V, scale=0.5**0.5), "l2": tp.L2(0.5**0.5 * Q, K, V)}


def blocks(starts: np.ndarray) -> list[tuple[tp.Gaussian, int]]:
    """States of LANES starts each, the last one filled up, and how many of them count."""
    parts = [starts[i : i + LANES] for i in range(0, len(starts), LANES)]
    return [(tp.Gaussian(np.zeros((LANES, 2)), np.concatenate([part, np.repeat(part[-1:], LANES - len(part), axis=0)])), len(part)) for part in parts]


def coordinates(cov: np.ndarray) -> np.ndarray:
    r"""$(\Sigma_{11} - \Sigma_{22}, 2\Sigma_{12}, \Sigma_{11} + \Sigma_{22})$: the cone of covariances is $z \ge |(x, y)|$."""
    return np.stack([cov[..., 0, 0] - cov[..., 1, 1], 2 * cov[..., 0, 1], cov[..., 0, 0] + cov[..., 1, 1]], -1)


def thinned(paths: np.ndarray) -> np.ndarray:
    """POINTS points at equal distances along each path, shape (starts, POINTS, axes)."""
    length = np.concatenate([np.zeros((len(paths), 1)), np.linalg.norm(np.diff(paths, axis=1), axis=-1).cumsum(1)], 1)
    at = np.linspace(0, 1, POINTS)[None] * length[:, -1:]
    return np.stack([np.stack([np.interp(a, s, column) for column in path.T], -1) for a, s, path in zip(at, length, paths, strict=True)]).astype(np.float32)


@jax.jit
def _outlook(flow: tp.Desingularized, ends: tp.Direction) -> tuple[jax.Array, jax.Array]:
    """The blow-up time that each end state points to, and the growth rate of its log trace."""
    return jax.vmap(lambda y: (flow.signs(y).blow_up_time, 2 * flow.rates(y)[1]))(ends)


def follow(head: Any, starts: np.ndarray, normalized: bool, rtol: float) -> dict[str, np.ndarray]:
    """Each start to its end; `lines` are paths of the covariance, or of the covariance over its trace in the plane."""
    flow, found = tp.Desingularized(head), []
    for state, count in blocks(starts):
        sol = tl.integrate(flow, state, CLOCK, rtol=rtol, atol=rtol / 100, max_steps=2000, runs=LANES)
        end = tp.last(sol.value)
        blow_up_time, rate = _outlook(flow, end)
        size = np.ones(()) if normalized else np.exp(np.asarray(sol.value.log_trace))[..., None, None]
        paths = coordinates(np.swapaxes(size * np.asarray(sol.value.cov), 0, 1))
        one = {"lines": thinned(paths[..., :2] if normalized else paths), "direction": end.cov, "log_trace": end.log_trace, "time": end.time,
               "status": sol.status, "blow_up_time": blow_up_time, "rate": rate}
        found.append({name: np.asarray(value)[:count] for name, value in one.items()})
    return {"start": starts, **{name: np.concatenate([one[name] for one in found]) for name in found[0]}}


def published(head: Any, starts: np.ndarray, step: float, low: float, high: float, steps: int) -> dict[str, np.ndarray]:
    """The published scheme on each start: its count of iterations, how it stopped (1 converged, -1 exploded, 0 neither) and its last state."""
    cov, count, stop = starts.copy(), np.zeros(len(starts), int), np.zeros(len(starts), int)
    alive = np.arange(len(starts))
    for begun in range(0, steps, SLICE):
        ended, at = [], 0
        for state, size in blocks(cov[alive]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RunWarning)                 # runs that this slice does not finish go on in the next
                sol = tl.iterate(head, tp.OfficialEuler(step), state, steps=min(SLICE, steps - begun), runs=LANES, keep="last",
                                 stop=tl.Below("residual", low) | tl.Above("trace", high))
            lanes, at = alive[at : at + size], at + size
            cov[lanes], count[lanes] = np.asarray(sol.value.cov)[:size], begun + np.asarray(sol.steps)[:size]
            ended.append(np.asarray(sol.status)[:size] == tl.Status.CONVERGED)
        done = alive[np.concatenate(ended)]
        exploded = np.trace(cov[done], axis1=1, axis2=2) > high
        stop[done], count[done] = np.where(exploded, -1, 1), count[done] - exploded
        alive = np.setdiff1d(alive, done)
        if not len(alive):
            break
    return {"scheme_start": starts, "scheme_count": count, "scheme_stop": stop, "scheme_cov": cov}


def compute(progress: Any, weights: tuple[np.ndarray, ...], starts: np.ndarray, schemes: dict[str, dict[str, Any]],
            normalized: bool = False) -> dict[str, np.ndarray]:
    """Both panels of a figure. `schemes` holds, by variant, settings of the published scheme and, if they are not the usual ones, `rtol` and `most`."""
    data: dict[str, np.ndarray] = {}
    progress.start("panels", 2 * len(KINDS))
    for i, (kind, head) in enumerate(heads(*weights).items()):
        settings = {"rtol": 1e-10, "most": len(starts)} | schemes[kind]
        progress.update(2 * i, KINDS[kind])
        found = follow(head, starts, normalized, settings.pop("rtol"))
        progress.update(2 * i + 1, f"{KINDS[kind]}, published scheme")
        found |= published(head, starts[:: math.ceil(len(starts) / settings.pop("most"))], **settings)
        data |= {f"{kind}_{name}": value for name, value in found.items()}
    progress.update(2 * len(KINDS))
    return data


def panels(data: dict[str, np.ndarray]) -> dict[str, SimpleNamespace]:
    """The arrays of each panel as attributes."""
    return {kind: SimpleNamespace(**{name.removeprefix(f"{kind}_"): a for name, a in data.items() if name.startswith(f"{kind}_")}) for kind in KINDS}


def trace(panel: SimpleNamespace) -> np.ndarray:
    """Traces of the end states."""
    return np.exp(panel.log_trace)


def angle(cov: np.ndarray) -> np.ndarray:
    """Angle of the top eigenvector in degrees, from -90 to 90."""
    return np.degrees(np.arctan2(2 * cov[..., 0, 1], cov[..., 0, 0] - cov[..., 1, 1])) / 2


def thinness(cov: np.ndarray) -> np.ndarray:
    """Smallest over largest eigenvalue."""
    values = np.linalg.eigvalsh(cov)
    return values[..., 0] / values[..., 1]


def all_are(check: Any, kind: str, label: str, panel: SimpleNamespace, status: tl.Status) -> None:
    """Record that every run ended in the same way."""
    check.equal(f"{kind}: starts that {label}", int((panel.status == status).sum()), len(panel.start), 0)


def spread(check: Any, label: str, values: np.ndarray, expected: tuple[float, ...], tol: float, relative: bool = False) -> None:
    """Compare minimum, median and maximum (or minimum and maximum) with published ones."""
    seen = (values.min(), np.median(values), values.max()) if len(expected) == 3 else (values.min(), values.max())
    for name, one, bound in zip(("min", "median", "max") if len(expected) == 3 else ("min", "max"), seen, expected, strict=True):
        check.equal(f"{label}, {name}", one, bound, tol, relative)


def scheme(check: Any, kind: str, panel: SimpleNamespace, count: tuple[float, ...], **stops: int) -> None:
    """The published scheme: iterations (minimum, median, maximum) and how many runs `converged`, `exploded` or were `open`."""
    spread(check, f"{kind}: iterations of the published scheme", panel.scheme_count, count, 1)
    for name, code in (("converged", 1), ("exploded", -1), ("open", 0)):
        check.equal(f"{kind}: runs of the published scheme that are {name}", int((panel.scheme_stop == code).sum()), stops.get(name, 0), 0)


def isotropic(A: np.ndarray) -> np.ndarray:
    """The two unit vectors with u'Au = 0 (the lines on which a rank-one covariance is at rest), as columns, the steeper one first."""
    slopes = np.sort(np.roots([A[1, 1], A[0, 1] + A[1, 0], A[0, 0]]))
    return np.stack([np.ones(2), slopes]) / np.hypot(1, slopes)


def decay_residual(head: Any, V: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """Relative residual of V S A S + (V S A S)' + S = 0, which the limit S of t times the covariance solves; L2 has 2A in the place of A."""
    A = np.asarray(head.A) * (2 if isinstance(head, tp.L2) else 1)
    moved = V @ scaled @ A @ scaled
    return np.linalg.norm(moved + np.swapaxes(moved, -1, -2) + scaled, axis=(-1, -2)) / np.linalg.norm(scaled, axis=(-1, -2))


def schur(starts: np.ndarray) -> np.ndarray:
    """The covariance of x given the query."""
    seen = starts @ LINE_Q[0]
    return starts - seen[:, :, None] * seen[:, None, :] / (seen @ LINE_Q[0])[:, None, None]


def blow_up(A: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blow-up times 1 / lambda_max(L'(A + A')L) of V = I, and the projections on L u, u the eigenvector of lambda_max."""
    factor = np.linalg.cholesky(starts)
    values, vectors = np.linalg.eigh(np.swapaxes(factor, -1, -2) @ (A + A.T) @ factor)
    top = (factor @ vectors)[..., -1]
    top /= np.linalg.norm(top, axis=-1, keepdims=True)
    return 1 / values[:, -1], top[:, :, None] * top[:, None, :]


# ------------------------------------------------------------------------------------------------ pictures


def cones(data: dict[str, np.ndarray], azimuths: tuple[float, float], values: str, label: str, rays: Any, reach: float = 1.08) -> Any:
    """One three-dimensional panel per variant: paths in the cone of covariances, its apex below."""
    import matplotlib.pyplot as plt
    from mpl_toolkits.mplot3d.art3d import Line3DCollection

    picture = plt.figure(figsize=figsize(2, 0.5))
    shown = panels(data)
    norm = plt.Normalize(*np.percentile(np.concatenate([getattr(p, values) for p in shown.values()]), (0, 100)))
    axes = []
    for i, (kind, panel) in enumerate(shown.items()):
        ax: Any = picture.add_subplot(1, 2, i + 1, projection="3d", computed_zorder=False)
        around, height = np.meshgrid(np.linspace(0, 2 * np.pi, 73), [0.0, reach])
        ax.plot_surface(height * np.cos(around), height * np.sin(around), height, color="0.4", alpha=0.07, linewidth=0, rasterized=True, zorder=1)
        turn = np.linspace(0, 2 * np.pi, 181)
        ax.plot(reach * np.cos(turn), reach * np.sin(turn), reach, color="0.6", linewidth=0.5, linestyle="-", zorder=1)
        lines = Line3DCollection(list(panel.lines), cmap="viridis", norm=norm, array=getattr(panel, values), alpha=0.6, linewidths=0.6, zorder=3)
        ax.add_collection(lines)
        ax.scatter(*panel.lines[:, -1].T, c=getattr(panel, values), cmap="viridis", norm=norm, s=5, linewidths=0, depthshade=False, zorder=5)
        rays(ax, kind, panel)
        ax.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(0, 1))
        ax.set_box_aspect((2, 2, 1.6), zoom=1.5)
        ax.view_init(elev=20, azim=azimuths[i])
        ax.set_axis_off()
        ax.text2D(0.02, 0.92, f"({'ab'[i]}) {KINDS[kind]}", transform=ax.transAxes)
        axes.append(ax)
    picture.colorbar(lines, ax=axes, label=label, shrink=0.7, aspect=30, pad=0.01)
    return picture


def ray(ax: Any, cov: np.ndarray, length: float, text: str, color: str, **place: Any) -> None:
    """The line of multiples of a covariance, with its name at its end."""
    end = coordinates(cov) / np.trace(cov) * length
    ax.plot(*np.stack([0 * end, end], -1), color=color, linewidth=1.0, linestyle="--", zorder=4)
    ax.text(*(1.04 * end), text, color=color, fontsize="small", zorder=6, **place)


def discs(data: dict[str, np.ndarray], marks: dict[str, list[tuple[float, str, str, tuple[float, float]]]]) -> Any:
    """One panel per variant: paths of the normalized covariance in the unit disc, whose boundary holds the matrices of rank one.

    `marks` are angles of limit directions, with name, color and the place of the name.
    """
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection

    picture, axes = plt.subplots(1, 2, figsize=figsize(2, 0.48), sharey=True)
    norm, turn = plt.Normalize(-1, 1), np.linspace(0, 2 * np.pi, 361)
    for i, (ax, (kind, panel)) in enumerate(zip(axes, panels(data).items(), strict=True)):
        start = 2 * panel.start[:, 0, 1]
        ax.plot(np.cos(turn), np.sin(turn), color="0.55", linewidth=0.7, linestyle="-", zorder=1)
        lines = ax.add_collection(LineCollection(list(panel.lines), cmap="viridis", norm=norm, array=start, alpha=0.6, linewidths=0.45, zorder=2))
        ax.scatter(*panel.lines[:, -1].T, c=start, cmap="viridis", norm=norm, s=4, linewidths=0, zorder=3)
        for degrees, text, color, place in marks[kind]:
            at = np.cos(2 * np.radians(degrees)), np.sin(2 * np.radians(degrees))
            ax.plot(*at, marker="o", markersize=6, markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.1, linestyle="none", zorder=4)
            ax.annotate(text, at, xytext=place, color=color, fontsize="small", ha="center", va="center", zorder=5,
                        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.0},
                        arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkB": 3})
        ax.set(xlim=(-1.12, 1.12), ylim=(-1.12, 1.12), xlabel=r"$(\Sigma_{11} - \Sigma_{22})\,/\,\mathrm{tr}\,\Sigma$", aspect="equal")
        ax.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        ax.text(0.0, 1.0, f"({'ab'[i]}) {KINDS[kind]}", transform=ax.transAxes, va="bottom")
    axes[0].set_ylabel(r"$2\Sigma_{12}\,/\,\mathrm{tr}\,\Sigma$")
    picture.colorbar(lines, ax=axes, label=r"start: twice its covariance, $2\Sigma_{12}(0)$", shrink=0.8, aspect=30, pad=0.02)
    return picture
