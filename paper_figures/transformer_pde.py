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
from collections.abc import Callable
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


def start_color(panel: SimpleNamespace) -> np.ndarray:
    """Twice the covariance of the start, which colors its path."""
    return 2 * panel.start[:, 0, 1]


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


def cones(data: dict[str, np.ndarray], azimuths: tuple[float, float], values: Callable, label: str, rays: Callable) -> Any:
    """One three-dimensional panel per variant: paths in the cone of covariances, colored by `values(panel)`; `rays(ax)` draws the limits."""
    import matplotlib.pyplot as plt
    from mpl_toolkits.mplot3d.art3d import Line3DCollection

    picture = plt.figure(figsize=figsize(2, 0.5))
    shown = panels(data)
    every = np.concatenate([values(panel) for panel in shown.values()])
    norm, reach = plt.Normalize(every.min(), every.max()), 1.05
    axes = []
    for i, (kind, panel) in enumerate(shown.items()):
        ax: Any = picture.add_subplot(1, 2, i + 1, projection="3d", computed_zorder=False)
        around, height = np.meshgrid(np.linspace(0, 2 * np.pi, 73), [0.0, reach])
        ax.plot_surface(height * np.cos(around), height * np.sin(around), height, color="0.4", alpha=0.07, linewidth=0, rasterized=True, zorder=1)
        turn = np.linspace(0, 2 * np.pi, 181)
        ax.plot(reach * np.cos(turn), reach * np.sin(turn), reach, color="0.6", linewidth=0.5, linestyle="-", zorder=1)
        lines = Line3DCollection(list(panel.lines), cmap="viridis", norm=norm, array=values(panel), alpha=0.6, linewidths=0.6, zorder=3)
        ax.add_collection(lines)
        ax.scatter(*panel.lines[:, -1].T, c=values(panel), cmap="viridis", norm=norm, s=5, linewidths=0, depthshade=False, zorder=5)
        rays(ax)
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
        start = start_color(panel)
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


START_LABEL = r"start: twice its covariance, $2\Sigma_{12}(0)$"
CONE = r"in the cone of covariances, coordinates $(\Sigma_{11} - \Sigma_{22},\, 2\Sigma_{12},\, \Sigma_{11} + \Sigma_{22})$ with the last one upward"
DISC = r"of $\Sigma / \operatorname{tr}\Sigma$ in the coordinates $(\Sigma_{11} - \Sigma_{22},\, 2\Sigma_{12})$, whose unit circle holds the matrices of rank one"

# ------------------------------------------------------------------------------------------------ figures


@figure("transformer_pde/convergence-to-zero", source=f"{PAPER}, convergence to zero",
        caption=rf"$K = -Q$ and $V \succ 0$: trajectories {CONE}, from 100 starts of trace one. All reach zero like $1/t$ along one direction $S_*$, which "
                r"softmax and L2 attention share.",
        quick={"starts": 100}, paper={"starts": 100})
class ConvergenceToZero:
    @staticmethod
    def compute(progress, starts):
        return compute(progress, (DECAY_Q, -DECAY_Q, DECAY_V), grid(10, 0.5, starts),
                       dict.fromkeys(KINDS, {"step": 0.3, "low": 1e-5, "high": 1e3, "steps": 50000}))

    @staticmethod
    def draw(data):
        limit = data["softmax_direction"][0]
        return cones(data, (-174, -174), start_color, START_LABEL,
                     lambda ax: ray(ax, limit, 0.75, "common direction $S_*$", COLORS["vermilion"], ha="center", va="bottom"))

    @staticmethod
    def expect(check, data, starts):
        counts = {"softmax": (5055, 5436, 5527), "l2": (3700, 3889, 3934)}
        largest = {"softmax": (0.01691, 0.01696), "l2": (0.01196, 0.01198)}
        thin = {"softmax": (0.0305, 0.0328), "l2": (0.0305, 0.0319)}
        attention = heads(DECAY_Q, -DECAY_Q, DECAY_V)
        for kind, panel in panels(data).items():
            all_are(check, kind, "decay along a settled direction", panel, tl.Status.CONVERGED)
            check.equal(f"{kind}: normalized end", panel.direction, np.array([[0.383, -0.455], [-0.455, 0.617]]), 3e-3)
            check.below(f"{kind}: spread of the normalized ends", np.abs(panel.direction - data["softmax_direction"][0]), 1e-7)
            scaled = (panel.time * trace(panel))[:, None, None] * panel.direction
            check.below(f"{kind}: residual of the equation of lim t Sigma(t)", decay_residual(attention[kind], DECAY_V, scaled), 1e-6)
            scheme(check, kind, panel, counts[kind], converged=len(panel.start))
            values = np.linalg.eigvalsh(panel.scheme_cov)
            spread(check, f"{kind}: largest eigenvalue where the published scheme stops", values[:, 1], largest[kind], 5e-6)
            spread(check, f"{kind}: smallest over largest eigenvalue there", values[:, 0] / values[:, 1], thin[kind], 5e-5)


@figure("transformer_pde/convergence-to-a-line", source=f"{PAPER}, convergence to rank one",
        caption=rf"$V = I$ and $K = -Q = -q^\top$: trajectories {CONE}, from 100 starts. Each converges to the covariance of $x$ given $q^\top x$, a multiple of "
                r"$pp^\top$ with $p \perp q$, the same for softmax and L2 attention.",
        quick={"starts": 100}, paper={"starts": 100})
class ConvergenceToALine:
    @staticmethod
    def compute(progress, starts):
        return compute(progress, (LINE_Q, -LINE_Q, np.eye(2)), grid(10, 0.5, starts),
                       dict.fromkeys(KINDS, {"step": 0.5, "low": 1e-4, "high": 1e3, "steps": 50000}))

    @staticmethod
    def draw(data):
        limit = np.outer([-LINE_Q[0, 1], LINE_Q[0, 0]], [-LINE_Q[0, 1], LINE_Q[0, 0]])
        return cones(data, (-86, -76), start_color, START_LABEL, lambda ax: ray(ax, limit, 1.0, r"$pp^\top,\ p \perp q$", COLORS["vermilion"], ha="center"))

    @staticmethod
    def expect(check, data, starts):
        q, p = LINE_Q[0], np.array([-LINE_Q[0, 1], LINE_Q[0, 0]])
        counts = {"softmax": (157, 166, 202), "l2": (116, 122, 148)}
        left, far = {"softmax": 0.0084, "l2": 0.0060}, {"softmax": 0.0099, "l2": 0.0070}
        check.equal("direction of the line", coordinates(np.outer(p, p)) / np.sqrt(2), np.array([0.47362, -0.52505, 0.70711]), 1e-5)
        for kind, panel in panels(data).items():
            all_are(check, kind, "come to rest", panel, tl.Status.CONVERGED)
            end = trace(panel)[:, None, None] * panel.direction
            check.below(f"{kind}: distance of the end from the Schur complement", np.abs(end - schur(panel.start)), 1e-7)
            spread(check, f"{kind}: p' Sigma p", end @ p @ p, (0.1465, 0.8510), 3e-4)
            scheme(check, kind, panel, counts[kind], converged=len(panel.start))
            check.below(f"{kind}: q' Sigma q where the published scheme stops", panel.scheme_cov @ q @ q, left[kind] + 5e-5)
            check.equal(f"{kind}: largest distance of those states from the limit", np.abs(panel.scheme_cov - schur(panel.start)).max(), far[kind], 5e-5)


@figure("transformer_pde/two-lines", source=f"{PAPER}, convergence to two lines",
        caption=rf"$A + A^\top$ indefinite: trajectories {CONE}, colored by the trace of their limit. Each freezes on one of the two lines of covariances $s\,uu^\top$ "
                r"with $u^\top A u = 0$, named by the angle of $u$. The published pair shows the L2 data twice; here (a) is softmax and (b) is L2.",
        quick={"starts": 100, "steps": 5000}, paper={"starts": 276, "steps": 50000})
class TwoLines:
    @staticmethod
    def compute(progress, starts, steps):
        return compute(progress, (MIXED_Q, MIXED_K, TWO_LINES_V), grid(20, 1.0, starts),
                       dict.fromkeys(KINDS, {"step": 0.01, "low": 1e-7, "high": 1e3, "steps": steps}))

    @staticmethod
    def draw(data):
        lines = isotropic(MIXED_K.T @ MIXED_Q).T

        def rays(ax):
            for u, color in zip(lines, (COLORS["vermilion"], COLORS["purple"]), strict=True):
                ray(ax, np.outer(u, u), 1.0, rf"${np.degrees(np.arctan2(u[1], u[0])):.1f}\degree$", color, ha="center", va="bottom")

        return cones(data, (-88, -88), trace, r"trace of the limit", rays)

    @staticmethod
    def expect(check, data, starts, steps):
        A, V = MIXED_K.T @ MIXED_Q, TWO_LINES_V
        u = isotropic(A)
        lines = np.degrees(np.arctan2(u[1], u[0]))
        spread(check, "angles of the isotropic directions", lines, (-58.144, -7.599), 5e-4)
        check.equal("u'(A + A')Vu", np.diag(u.T @ (A + A.T) @ V @ u), np.array([-1.154, -0.782]), 5e-4)
        check.equal("u'AVu", np.diag(u.T @ A @ V @ u), np.array([-0.313, -0.569]), 5e-4)
        for kind, panel in panels(data).items():
            whole = len(panel.start) == 276
            all_are(check, kind, "freeze", panel, tl.Status.CONVERGED)
            near, there = (np.abs(angle(c)[:, None] - lines).argmin(1) for c in (panel.direction, panel.scheme_cov))
            check.below(f"{kind}: degrees between the end and its line", np.abs(angle(panel.direction) - lines[near]), 1e-4)
            check.below(f"{kind}: smallest over largest eigenvalue of the end", thinness(panel.direction), 1e-7)
            check.true(f"{kind}: the published scheme, where it stops, is on the same line", (near == there)[panel.scheme_stop == 1])
            if whole:
                check.equal(f"{kind}: starts on the line at -58.1 degrees", int((near == 0).sum()), 127, 0)
                check.equal(f"{kind}: starts on the line at -7.6 degrees", int((near == 1).sum()), 149, 0)
                check.equal(f"{kind}: runs of the published scheme that stop", int((panel.scheme_stop == 1).sum()), {"softmax": 263, "l2": 270}[kind], 0)
        if whole:
            spread(check, "softmax: trace of the limit", trace(panels(data)["softmax"]), (0.00848, 1.4707), 5e-5)


@figure("transformer_pde/blow-up-and-divergence", source=f"{PAPER}, explosion and divergence",
        caption=rf"$V = I$ and $A + A^\top \succ 0$: trajectories {DISC}. (a) Softmax attention blows up in finite time, from every start at a point of the circle that "
                r"depends on the start. (b) L2 attention grows exponentially, at the rate $2\lambda_{\max}(K^{-1}Q)/\sqrt 2 = 0.7537$ and toward its eigenvector.",
        quick={"starts": 100}, paper={"starts": 1184})
class BlowUpAndDivergence:
    @staticmethod
    def compute(progress, starts):
        # rounding in (I + 2 Sigma P)^-1 outweighs a tolerance of 1e-10 long before a growing L2 run is over
        schemes = {"softmax": {"step": 0.01, "low": 1e-5, "high": 1e3, "steps": 50000},
                   "l2": {"step": 0.001, "low": 1e-5, "high": 1e4, "steps": 50000, "rtol": 1e-8, "most": LANES}}
        return compute(progress, (GROWTH_Q, GROWTH_K, np.eye(2)), grid(40, 1.0, starts), schemes, normalized=True)

    @staticmethod
    def draw(data):
        values, vectors = np.linalg.eig(np.linalg.solve(GROWTH_K, GROWTH_Q))
        u = vectors[:, values.argmax()]
        rank_one = (45.0, "rank one", "0.35", (0.45, 0.62))
        return discs(data, {"softmax": [], "l2": [(np.degrees(np.arctan2(u[1], u[0])), "direction of\nfastest growth", COLORS["vermilion"], (0.3, 0.3))]})

    @staticmethod
    def expect(check, data, starts):
        softmax, l2 = panels(data).values()
        whole = len(softmax.start) == 1184
        times, profile = blow_up(np.asarray(heads(GROWTH_Q, GROWTH_K, np.eye(2))["softmax"].A), softmax.start)
        all_are(check, "softmax", "blow up", softmax, tl.Status.BLOWUP)
        check.equal("softmax: blow-up time against its closed form", softmax.blow_up_time / times, 1, 1e-7)
        check.below("softmax: smallest over largest eigenvalue of the profile", thinness(softmax.direction), 1e-8)
        check.below("softmax: distance of the profile from its closed form", np.abs(softmax.direction - profile), 1e-7)
        late = 0.01 * softmax.scheme_count / times - 1
        check.between("softmax: delay of the published stop", late, 0.005, 0.145)
        check.equal("softmax: runs of the published scheme that explode", int((softmax.scheme_stop == -1).sum()), len(softmax.start), 0)
        all_are(check, "l2", "grow for all times", l2, tl.Status.CONVERGED)
        check.equal("l2: twice the largest eigenvalue of K^-1 Q", 2 * np.linalg.eigvals(np.linalg.solve(GROWTH_K, GROWTH_Q)).max() / np.sqrt(2), 0.7537, 5e-5)
        check.equal("l2: median growth rate of the trace at the end", np.median(l2.rate), 0.7537, 2e-3)
        check.equal("l2: runs of the published scheme that pass a trace of 1e4", int((l2.scheme_stop == -1).sum()), len(l2.scheme_start), 0)
        check.between("l2: iterations of the published scheme", l2.scheme_count, 13635, 32581)
        check.equal("l2: median of them", np.median(l2.scheme_count), 19284, 0.03, relative=True)
        if whole:
            spread(check, "softmax: blow-up time", softmax.blow_up_time, (0.353145, 8.937339), 5e-7)
            spread(check, "softmax: iterations of the published scheme", softmax.scheme_count, (40, 75, 899), 1)


@figure("transformer_pde/mixed", source=f"{PAPER}, convergence and blow-up",
        caption=rf"The same $Q$, $K$ as for the two lines and another $V$: trajectories {DISC}. (a) Softmax: 57 of 648 starts blow up along an eigenvector of $V$ at "
                r"$78.65\degree$, the others freeze on the line at $-7.60\degree$. (b) L2: all converge to that line; the published panel calls 6 of them diverged, because "
                "their trace passes a threshold of 1000 on the way.",
        quick={"starts": 100, "steps": 10000}, paper={"starts": 648, "steps": 50000})
class Mixed:
    @staticmethod
    def compute(progress, starts, steps):
        schemes = {kind: {"step": step, "low": 1e-4, "high": 1e3, "steps": steps} for kind, step in (("softmax", 0.003), ("l2", 0.002))}
        return compute(progress, (MIXED_Q, MIXED_K, MIXED_V), grid(30, 1.0, starts), schemes, normalized=True)

    @staticmethod
    def draw(data):
        frozen, blown = -7.599, 78.653
        rest = (frozen, "at rest", COLORS["purple"], (0.5, -0.75))
        return discs(data, {"softmax": [rest, (blown, "blow-up", COLORS["vermilion"], (-0.5, 0.8))], "l2": [rest]})

    @staticmethod
    def expect(check, data, starts, steps):
        A, V = MIXED_K.T @ MIXED_Q, MIXED_V
        line = isotropic(A)[:, 1]
        values, vectors = np.linalg.eig(V)
        blow = vectors[:, values.argmin()]
        at_rest, at_blow_up = (np.degrees(np.arctan2(x[1], x[0])) for x in (line, blow * np.sign(blow[0])))
        check.equal("angle of the attracting line", at_rest, -7.60, 5e-3)
        check.equal("angle of the eigenvector of V with lambda u'Au > 0", at_blow_up, 78.65, 5e-3)
        check.equal("lambda u'Au of that eigenvector", values.min() * (blow @ A @ blow), 0.06441, 5e-6)
        check.equal("u'(A + A')Vu and u'AVu of the line", np.array([line @ (A + A.T) @ V @ line, line @ A @ V @ line]), np.array([-0.947, -0.690]), 5e-4)
        softmax, l2 = panels(data).values()
        whole = len(softmax.start) == 648
        blown, decided = softmax.status == tl.Status.BLOWUP, softmax.scheme_stop != 0
        check.true("softmax: every start blows up or freezes", blown | (softmax.status == tl.Status.CONVERGED))
        check.true("softmax: the published scheme, where it stops, agrees", ((softmax.scheme_stop == -1) == blown)[decided])
        check.equal("softmax: angle of the blow-up", angle(softmax.direction[blown]), at_blow_up, 1e-4)
        check.equal("softmax: angle of the others", angle(softmax.direction[~blown]), at_rest, 1e-4)
        check.between("softmax: blow-up times", softmax.blow_up_time[blown], 10.0541, 50.5789)
        check.between("softmax: frozen traces", trace(softmax)[~blown], 0.09994, 36.285)
        all_are(check, "l2", "freeze", l2, tl.Status.CONVERGED)
        check.equal("l2: angle of the end", angle(l2.direction), at_rest, 1e-4)
        check.below("l2: largest trace of a limit", trace(l2).max(), 8.45e4)
        check.above("l2: trace of the limits of the runs that the published scheme calls diverged", trace(l2)[l2.scheme_stop == -1], 0.0)
        if whole:
            check.equal("softmax: starts that blow up", int(blown.sum()), 57, 0)
            check.equal("softmax: starts that freeze", int((~blown).sum()), 591, 0)
            spread(check, "softmax: blow-up time", softmax.blow_up_time[blown], (10.0542, 50.5788), 5e-5)
            spread(check, "softmax: frozen trace", trace(softmax)[~blown], (0.09995, 36.28), 1e-3, relative=True)
            check.equal("softmax: runs of the published scheme that explode", int((softmax.scheme_stop == -1).sum()), 57, 0)
            check.equal("l2: runs that the published scheme calls diverged", int((l2.scheme_stop == -1).sum()), 6, 0)
            check.equal("l2: limits of trace above 1000", int((trace(l2) > 1e3).sum()), 5, 0)
