r"""Softmax and L2 attention on 2 x 2 covariances: decay, clustering on a line, on two lines, blow-up, and several of these at once.

Every start of a panel is followed by `Desingularized` until it is at rest, decays, grows or has blown up, so an end point is a limit and not the
state at which a threshold was met. Starts run in blocks of `LANES`, and a single row of queries is padded with a row of zeros, so two compiled
programs (softmax, L2) serve all figures and presets. `expect` compares with closed forms and with the published scheme, `OfficialEuler`, on the
same starts; its count of iterations is the published one, which leaves out the last step of a run that exploded. Its slowest panel, growing L2
(19000 steps of 0.001), runs on a subset of at most `LANES` starts.

The weights are those of the published scripts: $A = K^\top Q / \sqrt 2$ for both variants, and $P = K^\top K$ without a factor for L2.
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
POINTS = 60                                                                # of a drawn path
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
    length = np.pad(np.linalg.norm(np.diff(paths, axis=1), axis=-1).cumsum(1), ((0, 0), (1, 0)))
    at = np.linspace(0, 1, POINTS) * length[:, -1:]
    return np.array([np.stack([np.interp(a, s, column) for column in path.T], -1) for a, s, path in zip(at, length, paths, strict=True)], np.float32)


@jax.jit
def outlook(flow: tp.Desingularized, ends: tp.Direction) -> tuple[jax.Array, jax.Array]:
    """The blow-up time that each end state points to, and the growth rate of its log trace."""
    return jax.vmap(lambda y: (flow.signs(y).blow_up_time, 2 * flow.rates(y)[1]))(ends)


def follow(head: Any, starts: np.ndarray, normalized: bool, rtol: float) -> dict[str, np.ndarray]:
    """Each start to its end; `lines` are paths of the covariance, or of the covariance over its trace in the plane."""
    flow, found = tp.Desingularized(head), []
    for state, count in blocks(starts):
        sol = tl.integrate(flow, state, CLOCK, rtol=rtol, atol=rtol / 100, max_steps=2000, runs=LANES)
        end = tp.last(sol.value)
        time, rate = outlook(flow, end)
        size = np.ones(()) if normalized else np.exp(np.asarray(sol.value.log_trace))[..., None, None]
        paths = coordinates(np.swapaxes(size * np.asarray(sol.value.cov), 0, 1))
        one = {"lines": thinned(paths[..., :2] if normalized else paths), "direction": end.cov, "trace": np.exp(end.log_trace), "time": end.time,
               "status": sol.status, "blow_up_time": time, "rate": rate}
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


def compute(progress: Any, weights: tuple[np.ndarray, ...], starts: np.ndarray, normalized: bool = False, **schemes: Any) -> dict[str, np.ndarray]:
    """Both panels of a figure. `schemes` holds, by variant, the settings of the published scheme and, if not the usual ones, `rtol` and `most`."""
    data: dict[str, np.ndarray] = {}
    progress.start("panels", 2 * len(KINDS))
    for i, (kind, head) in enumerate(heads(*weights).items()):
        settings = {"rtol": 1e-10, "most": len(starts), "high": 1e3, "steps": 50000} | schemes[kind]
        found = follow(head, starts, normalized, settings.pop("rtol"))
        progress.update(2 * i + 1, KINDS[kind])
        found |= published(head, starts[:: math.ceil(len(starts) / settings.pop("most"))], **settings)
        progress.update(2 * i + 2, f"{KINDS[kind]}, published scheme")
        data |= {f"{kind}_{name}": value for name, value in found.items()}
    return data


def panels(data: dict[str, np.ndarray]) -> dict[str, SimpleNamespace]:
    """The arrays of each panel as attributes."""
    return {kind: SimpleNamespace(**{name.removeprefix(f"{kind}_"): a for name, a in data.items() if name.startswith(f"{kind}_")}) for kind in KINDS}


# ------------------------------------------------------------------------------------------------ what is known


def angle(cov: np.ndarray) -> np.ndarray:
    """Angle of the top eigenvector in degrees, from -90 to 90."""
    return np.degrees(np.arctan2(2 * cov[..., 0, 1], cov[..., 0, 0] - cov[..., 1, 1])) / 2


def thinness(cov: np.ndarray) -> np.ndarray:
    """Smallest over largest eigenvalue: 0 for rank one."""
    values = np.linalg.eigvalsh(cov)
    return values[..., 0] / values[..., 1]


def isotropic(A: np.ndarray) -> np.ndarray:
    """The unit vectors with u'Au = 0, on whose lines a covariance of rank one is at rest, as columns, the steeper one first."""
    slopes = np.sort(np.roots([A[1, 1], A[0, 1] + A[1, 0], A[0, 0]]))
    return np.stack([np.ones(2), slopes]) / np.hypot(1, slopes)


def schur(starts: np.ndarray) -> np.ndarray:
    """The covariance of x given the query of the one-line figure."""
    seen = starts @ LINE_Q[0]
    return starts - seen[:, :, None] * seen[:, None, :] / (seen @ LINE_Q[0])[:, None, None]


def blow_up(A: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blow-up times 1 / lambda_max(L'(A + A')L) of V = I, and the projections on L u, u the eigenvector of lambda_max."""
    factor = np.linalg.cholesky(starts)
    values, vectors = np.linalg.eigh(np.swapaxes(factor, -1, -2) @ (A + A.T) @ factor)
    top = (factor @ vectors)[..., -1]
    return 1 / values[:, -1], np.einsum("ni,nj->nij", top, top) / (top**2).sum(-1)[:, None, None]


def fastest(matrix: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest eigenvalue (all are real here) and its unit eigenvector."""
    values, vectors = np.linalg.eig(matrix)
    return values.max(), vectors[:, values.argmax()]


def number_of(check: Any, label: str, which: np.ndarray, expected: int) -> None:
    """Record a number of starts."""
    check.equal(label, int(which.sum()), expected, 0)


def spread(check: Any, label: str, values: np.ndarray, expected: tuple[float, ...], tol: float) -> None:
    """Compare minimum, maximum and, if three numbers are given, the median between them."""
    seen = np.quantile(values, np.linspace(0, 1, len(expected)))
    check.equal(f"{label}: {'minimum, median, maximum' if len(expected) == 3 else 'minimum and maximum'}", seen, np.array(expected), tol)


# ------------------------------------------------------------------------------------------------ pictures


def start_color(panel: SimpleNamespace) -> np.ndarray:
    """Twice the covariance of the start, which colors its path."""
    return 2 * panel.start[:, 0, 1]


def bar(picture: Any, shown: Any, axes: Any, label: str) -> None:
    """The scale of the colors, without the transparency of the paths."""
    scale = picture.colorbar(shown, ax=axes, label=label, shrink=0.75, aspect=30, pad=0.02)
    scale.solids.set_alpha(1.0)
    scale.outline.set_visible(False)


def cones(data: dict[str, np.ndarray], azimuths: tuple[float, float], values: Callable, label: str, rays: Callable, reach: float = 1.05) -> Any:
    """Paths in the cone of covariances up to the trace `reach`, colored by `values(panel)`; `rays(panel)` lists limit directions with names."""
    import matplotlib.pyplot as plt
    from mpl_toolkits.mplot3d.art3d import Line3DCollection

    picture, shown = plt.figure(figsize=figsize(2, 0.44)), panels(data)
    every = np.concatenate([values(panel) for panel in shown.values()])
    norm, turn, axes = plt.Normalize(every.min(), every.max()), np.linspace(0, 2 * np.pi, 121), []
    for i, (kind, panel) in enumerate(shown.items()):
        ax: Any = picture.add_subplot(1, 2, i + 1, projection="3d", computed_zorder=False)
        around, height = np.meshgrid(turn, [0.0, reach])
        ax.plot_surface(height * np.cos(around), height * np.sin(around), height, color="0.4", alpha=0.07, linewidth=0, rasterized=True, zorder=1)
        ax.plot(reach * np.cos(turn), reach * np.sin(turn), reach, color="0.6", linewidth=0.5, linestyle="-", zorder=1)
        lines = Line3DCollection(list(panel.lines), cmap="viridis", norm=norm, array=values(panel), alpha=0.6, linewidths=0.6, zorder=3)
        ax.add_collection(lines)
        ax.scatter(*panel.lines[:, -1].T, c=values(panel), cmap="viridis", norm=norm, s=5, linewidths=0, depthshade=False, zorder=5)
        for cov, text, shade, place in rays(panel):
            end = coordinates(cov) / np.trace(cov) * reach
            ax.plot(*np.stack([0 * end, end], -1), color=shade, linewidth=1.0, linestyle="--", zorder=4)
            ax.text(*end, text, color=shade, fontsize="small", zorder=6, bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8}, **place)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(0.1 * reach, 1.1 * reach))
        ax.set_box_aspect((2, 2, 1), zoom=1.5)
        ax.view_init(elev=20, azim=azimuths[i])
        ax.set_axis_off()
        ax.text2D(0.0, 1.0, f"({'ab'[i]}) {KINDS[kind]}", transform=ax.transAxes, va="top")
        axes.append(ax)
    bar(picture, lines, axes, label)
    return picture


def discs(data: dict[str, np.ndarray], marks: Callable) -> Any:
    """Paths of the normalized covariance in the unit disc, whose boundary holds the matrices of rank one; `marks(kind, panel)` lists limits with names."""
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection

    picture, axes = plt.subplots(1, 2, figsize=figsize(2, 0.48), sharey=True)
    norm, turn = plt.Normalize(-1, 1), np.linspace(0, 2 * np.pi, 361)
    for i, (ax, (kind, panel)) in enumerate(zip(axes, panels(data).items(), strict=True)):
        color = start_color(panel)
        ax.plot(np.cos(turn), np.sin(turn), color="0.55", linewidth=0.7, linestyle="-", zorder=1)
        lines = LineCollection(list(panel.lines), cmap="viridis", norm=norm, array=color, alpha=0.6, linewidths=0.45, zorder=2, rasterized=True)
        ax.add_collection(lines)
        ax.scatter(*panel.lines[:, -1].T, c=color, cmap="viridis", norm=norm, s=4, linewidths=0, zorder=3, rasterized=True)
        for cov, text, shade, place in marks(kind, panel):
            at = coordinates(cov)[:2] / np.trace(cov)
            ax.plot(*at, marker="o", markersize=6, markerfacecolor="none", markeredgecolor=shade, markeredgewidth=1.1, linestyle="none", zorder=4)
            ax.annotate(text, at, xytext=place, color=shade, fontsize="small", ha="center", va="center", zorder=5,
                        arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 0.7, "shrinkB": 3})
        ax.text(-0.76, 0.76, "rank one", rotation=45, ha="center", va="center", color="0.35", fontsize="small")
        ax.set(xlim=(-1.12, 1.12), ylim=(-1.12, 1.12), xlabel=r"$(\Sigma_{11} - \Sigma_{22})\,/\,\mathrm{tr}\,\Sigma$", aspect="equal")
        ax.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        ax.text(0.0, 1.0, f"({'ab'[i]}) {KINDS[kind]}", transform=ax.transAxes, va="bottom")
    axes[0].set_ylabel(r"$2\Sigma_{12}\,/\,\mathrm{tr}\,\Sigma$")
    bar(picture, lines, axes, START)
    return picture


START = r"start: twice its covariance, $2\Sigma_{12}(0)$"
RED, PINK = COLORS["vermilion"], COLORS["purple"]
CONE = r"in the cone of covariances, with coordinates $(\Sigma_{11} - \Sigma_{22},\, 2\Sigma_{12},\, \Sigma_{11} + \Sigma_{22})$, the last one upward"
DISC = r"of $\Sigma / \operatorname{tr}\Sigma$ in the coordinates $(\Sigma_{11} - \Sigma_{22},\, 2\Sigma_{12})$; the unit circle holds the matrices of rank one"

# ------------------------------------------------------------------------------------------------ figures


@figure("transformer_pde/convergence-to-zero", source=f"{PAPER}, convergence to zero",
        caption=rf"$K = -Q$ and $V \succ 0$: paths {CONE}. All reach zero like $1/t$ along one direction $S_*$, which softmax and L2 share.",
        quick={"starts": 100}, paper={"starts": 100})
class ConvergenceToZero:
    """Figure A: 100 starts."""

    @staticmethod
    def compute(progress, starts):
        settings = {"step": 0.3, "low": 1e-5}
        return compute(progress, (DECAY_Q, -DECAY_Q, DECAY_V), grid(10, 0.5, starts), softmax=settings, l2=settings)

    @staticmethod
    def draw(data):
        place = {"ha": "left", "va": "center"}
        return cones(data, (-174, -174), start_color, START, lambda panel: [(panel.direction[0], "common\ndirection $S_*$", RED, place)])

    @staticmethod
    def expect(check, data, starts):
        counts = {"softmax": (5055, 5436, 5527), "l2": (3700, 3889, 3934)}
        largest = {"softmax": (0.01691, 0.01696), "l2": (0.01196, 0.01198)}
        thin = {"softmax": (0.0305, 0.0328), "l2": (0.0305, 0.0319)}
        for kind, panel in panels(data).items():
            number_of(check, f"{kind}: starts that decay along a settled direction", panel.status == tl.Status.CONVERGED, len(panel.start))
            check.equal(f"{kind}: normalized end", panel.direction, np.array([[0.383, -0.455], [-0.455, 0.617]]), 3e-3)
            check.below(f"{kind}: spread of the normalized ends, both variants", np.abs(panel.direction - data["softmax_direction"][0]), 1e-7)
            # t Sigma tends to the solution of V S A S + (V S A S)' + S = 0; a small L2 state moves with 2A in the place of A
            scaled = (panel.time * panel.trace)[:, None, None] * panel.direction
            moved = DECAY_V @ scaled @ (-DECAY_Q.T @ DECAY_Q / np.sqrt(2) * {"softmax": 1, "l2": 2}[kind]) @ scaled
            check.below(f"{kind}: residual of the equation of lim t Sigma", np.abs(moved + np.swapaxes(moved, -1, -2) + scaled), 1e-5)
            number_of(check, f"{kind}: runs of the published scheme that converge", panel.scheme_stop == 1, len(panel.start))
            spread(check, f"{kind}: iterations of the published scheme", panel.scheme_count, counts[kind], 1)
            spread(check, f"{kind}: largest eigenvalue at its stop", np.linalg.eigvalsh(panel.scheme_cov)[:, 1], largest[kind], 5e-6)
            spread(check, f"{kind}: smallest over largest eigenvalue at its stop", thinness(panel.scheme_cov), thin[kind], 5e-5)


@figure("transformer_pde/convergence-to-a-line", source=f"{PAPER}, convergence to rank one",
        caption=rf"$V = I$ and $K = -Q = -q^\top$: paths {CONE}. Each reaches the covariance of $x$ given $q^\top x$, a multiple of $pp^\top$ with $p \perp q$; "
                "it is the same for softmax and L2.",
        quick={"starts": 100}, paper={"starts": 100})
class ConvergenceToALine:
    """Figure B: 100 starts."""

    @staticmethod
    def compute(progress, starts):
        settings = {"step": 0.5, "low": 1e-4}
        return compute(progress, (LINE_Q, -LINE_Q, np.eye(2)), grid(10, 0.5, starts), softmax=settings, l2=settings)

    @staticmethod
    def draw(data):
        place = {"ha": "left", "va": "center"}
        return cones(data, (-86, -76), start_color, START, lambda panel: [(panel.direction[0], r"$pp^\top$, $p \perp q$", RED, place)])

    @staticmethod
    def expect(check, data, starts):
        q, p = LINE_Q[0], np.array([-LINE_Q[0, 1], LINE_Q[0, 0]])
        counts, left, far = {"softmax": (157, 166, 202), "l2": (116, 122, 148)}, {"softmax": 0.0084, "l2": 0.0060}, {"softmax": 0.0099, "l2": 0.0070}
        check.equal("direction of the line", coordinates(np.outer(p, p)) / np.sqrt(2), np.array([0.47362, -0.52505, 0.70711]), 1e-5)
        for kind, panel in panels(data).items():
            end = panel.trace[:, None, None] * panel.direction
            number_of(check, f"{kind}: starts that come to rest", panel.status == tl.Status.CONVERGED, len(panel.start))
            check.below(f"{kind}: distance of the end from the Schur complement", np.abs(end - schur(panel.start)), 1e-7)
            spread(check, f"{kind}: p' Sigma p", end @ p @ p, (0.1465, 0.8510), 3e-4)
            number_of(check, f"{kind}: runs of the published scheme that converge", panel.scheme_stop == 1, len(panel.start))
            spread(check, f"{kind}: iterations of the published scheme", panel.scheme_count, counts[kind], 1)
            check.below(f"{kind}: q' Sigma q at its stop", panel.scheme_cov @ q @ q, left[kind] + 5e-5)
            check.equal(f"{kind}: largest distance of its states from the limit", np.abs(panel.scheme_cov - schur(panel.start)).max(), far[kind], 5e-5)


@figure("transformer_pde/two-lines", source=f"{PAPER}, convergence to two lines",
        caption=rf"$A + A^\top$ indefinite: paths {CONE}, colored by the trace of the limit. Each freezes on one of the two lines of covariances $s\,uu^\top$ "
                r"with $u^\top A u = 0$, named by the angle of $u$. The published pair shows the L2 data twice; here (a) is softmax and (b) is L2.",
        quick={"starts": 100, "steps": 5000}, paper={"starts": 276, "steps": 50000})
class TwoLines:
    """Figure C: 276 starts."""

    @staticmethod
    def compute(progress, starts, steps):
        settings = {"step": 0.01, "low": 1e-7, "steps": steps}
        return compute(progress, (MIXED_Q, MIXED_K, TWO_LINES_V), grid(20, 1.0, starts), softmax=settings, l2=settings)

    @staticmethod
    def draw(data):
        lines = [np.outer(u, u) for u in isotropic(MIXED_K.T @ MIXED_Q).T]

        def rays(panel):
            counts = [int((np.abs(angle(panel.direction) - angle(line)) < 1).sum()) for line in lines]
            return [(line, rf"${angle(line):.1f}\degree$: {count}", shade, {"ha": side, "va": "bottom"})
                    for line, count, shade, side in zip(lines, counts, (RED, PINK), ("center", "right"), strict=True)]

        return cones(data, (-88, -88), lambda panel: panel.trace, "trace of the limit", rays, reach=1.5)

    @staticmethod
    def expect(check, data, starts, steps):
        A, V, u = MIXED_K.T @ MIXED_Q, TWO_LINES_V, isotropic(MIXED_K.T @ MIXED_Q)
        lines = np.degrees(np.arctan2(u[1], u[0]))
        check.equal("angles of the isotropic directions", lines, np.array([-58.144, -7.599]), 5e-4)
        check.equal("u'(A + A')Vu", np.diag(u.T @ (A + A.T) @ V @ u), np.array([-1.154, -0.782]), 5e-4)
        check.equal("u'AVu", np.diag(u.T @ A @ V @ u), np.array([-0.313, -0.569]), 5e-4)
        for kind, panel in panels(data).items():
            near, there = (np.abs(angle(c)[:, None] - lines).argmin(1) for c in (panel.direction, panel.scheme_cov))
            number_of(check, f"{kind}: starts that freeze", panel.status == tl.Status.CONVERGED, len(panel.start))
            check.below(f"{kind}: degrees between the end and its line", np.abs(angle(panel.direction) - lines[near]), 1e-4)
            check.below(f"{kind}: smallest over largest eigenvalue of the end", thinness(panel.direction), 1e-7)
            check.true(f"{kind}: the published scheme, where it stops, is on the same line", (near == there)[panel.scheme_stop == 1])
            if len(panel.start) == 276:
                number_of(check, f"{kind}: starts on the line at -58.1 degrees", near == 0, 127)
                number_of(check, f"{kind}: starts on the line at -7.6 degrees", near == 1, 149)
                number_of(check, f"{kind}: runs of the published scheme that converge", panel.scheme_stop == 1, {"softmax": 263, "l2": 270}[kind])
                if kind == "softmax":
                    spread(check, "softmax: trace of the limit", panel.trace, (0.00848, 1.4707), 5e-5)


@figure("transformer_pde/blow-up-and-divergence", source=f"{PAPER}, explosion and divergence",
        caption=rf"$V = I$ and $A + A^\top \succ 0$: paths {DISC}. (a) Softmax blows up in finite time; paths run straight away from $(A + A^\top)^{{-1}}$ to a point "
                r"of the circle. (b) L2 grows exponentially at the rate $\sqrt 2\,\lambda_{\max}(K^{-1}Q) = 0.7537$, and turns toward its eigenvector.",
        quick={"starts": 100}, paper={"starts": 1184})
class BlowUpAndDivergence:
    """Figure D: 1184 starts."""

    @staticmethod
    def compute(progress, starts):
        # in a growing L2 run the rounding of (I + 2 Sigma P)^-1 soon exceeds a tolerance of 1e-10
        return compute(progress, (GROWTH_Q, GROWTH_K, np.eye(2)), grid(40, 1.0, starts), normalized=True, softmax={"step": 0.01, "low": 1e-5},
                       l2={"step": 0.001, "low": 1e-5, "high": 1e4, "rtol": 1e-8, "most": LANES})

    @staticmethod
    def draw(data):
        A, u = GROWTH_K.T @ GROWTH_Q, fastest(np.linalg.solve(GROWTH_K, GROWTH_Q))[1]
        marks = {"softmax": [(np.linalg.inv(A + A.T), r"$(A + A^\top)^{-1}$", RED, (0.85, -0.97))],
                 "l2": [(np.outer(u, u), "fastest\ngrowth", RED, (0.85, -0.95))]}
        return discs(data, lambda kind, panel: marks[kind])

    @staticmethod
    def expect(check, data, starts):
        softmax, l2 = panels(data).values()
        A, P = GROWTH_K.T @ GROWTH_Q / np.sqrt(2), GROWTH_K.T @ GROWTH_K
        times, profile = blow_up(A, softmax.start)
        number_of(check, "softmax: starts that blow up", softmax.status == tl.Status.BLOWUP, len(softmax.start))
        check.equal("softmax: blow-up time over its closed form", softmax.blow_up_time / times, 1, 1e-7)
        check.below("softmax: smallest over largest eigenvalue of the profile", thinness(softmax.direction), 1e-8)
        check.below("softmax: distance of the profile from its closed form", np.abs(softmax.direction - profile), 1e-7)
        center = coordinates(np.linalg.inv(A + A.T))
        path, start = softmax.lines - center[:2] / center[2], coordinates(softmax.start)[:, None, :2] - center[:2] / center[2]
        check.below("softmax: sine-like distance of a path from its straight line", np.abs(path[..., 0] * start[..., 1] - path[..., 1] * start[..., 0]), 1e-6)
        number_of(check, "softmax: runs of the published scheme that explode", softmax.scheme_stop == -1, len(softmax.start))
        check.between("softmax: its stop over the blow-up time", 0.01 * softmax.scheme_count / times, 1.005, 1.145)
        if len(softmax.start) == 1184:
            spread(check, "softmax: blow-up time", softmax.blow_up_time, (0.353145, 8.937339), 5e-7)
            spread(check, "softmax: iterations of the published scheme", softmax.scheme_count, (40, 75, 899), 1)
        number_of(check, "l2: starts that grow for all times", l2.status == tl.Status.CONVERGED, len(l2.start))
        rate, w = fastest(np.linalg.solve(GROWTH_K, GROWTH_Q).T)
        cov = l2.trace[:, None, None] * l2.direction
        cov = cov[np.linalg.eigvalsh(l2.direction)[:, 0] * l2.trace > 100]
        moved = 2 * np.linalg.solve(np.eye(2) + 2 * cov @ P, cov @ A @ cov)
        check.equal("l2: predicted growth rate", np.sqrt(2) * rate, 0.7537, 5e-5)
        check.equal("l2: rate of w' Sigma w, w the left eigenvector, where Sigma > 100", 2 * (moved @ w @ w) / (cov @ w @ w), np.sqrt(2) * rate, 2e-3)
        check.equal("l2: median rate of the trace at the end", np.median(l2.rate), np.sqrt(2) * rate, 2e-3)
        number_of(check, "l2: runs of the published scheme that pass a trace of 1e4", l2.scheme_stop == -1, len(l2.scheme_start))
        check.between("l2: iterations of the published scheme", l2.scheme_count, 13635, 32581)
        check.equal("l2: median of these iterations", np.median(l2.scheme_count), 19284, 0.03, relative=True)


@figure("transformer_pde/mixed", source=f"{PAPER}, convergence and blow-up",
        caption=rf"$Q$, $K$ of the two lines and another $V$: paths {DISC}. (a) Softmax: 57 of 648 starts blow up along an eigenvector of $V$ at $78.65\degree$, the "
                r"others freeze on the line at $-7.60\degree$. (b) L2: all converge to that line; the published panel calls 6 of them diverged, because "
                "their trace passes the threshold of 1000 on the way.",
        quick={"starts": 100, "steps": 10000}, paper={"starts": 648, "steps": 50000})
class Mixed:
    """Figure E: 648 starts."""

    @staticmethod
    def compute(progress, starts, steps):
        return compute(progress, (MIXED_Q, MIXED_K, MIXED_V), grid(30, 1.0, starts), normalized=True, softmax={"step": 0.003, "low": 1e-4, "steps": steps},
                       l2={"step": 0.002, "low": 1e-4, "steps": steps})

    @staticmethod
    def draw(data):
        def marks(kind, panel):
            blown = panel.status == tl.Status.BLOWUP
            found = [(panel.direction[~blown][0], f"at rest:\n{(~blown).sum()} starts", PINK, (0.85, -0.95))]
            return found + [(panel.direction[blown][0], f"blow-up:\n{blown.sum()} starts", RED, (-0.85, 1.0))] * bool(blown.any())

        return discs(data, marks)

    @staticmethod
    def expect(check, data, starts, steps):
        A, V, line = MIXED_K.T @ MIXED_Q, MIXED_V, isotropic(MIXED_K.T @ MIXED_Q)[:, 1]
        value, u = fastest(-V)
        at_rest, at_blow_up = (float(angle(np.outer(x, x))) for x in (line, u))
        check.equal("angles of the attracting line and of the eigenvector of V", np.array([at_rest, at_blow_up]), np.array([-7.60, 78.65]), 5e-3)
        check.equal("lambda u'Au of that eigenvector", -value * (u @ A @ u), 0.06441, 5e-6)
        check.equal("u'(A + A')Vu of the line", line @ (A + A.T) @ V @ line, -0.947, 5e-4)
        check.equal("u'AVu of the line", line @ A @ V @ line, -0.690, 5e-4)
        softmax, l2 = panels(data).values()
        blown, exploded = softmax.status == tl.Status.BLOWUP, softmax.scheme_stop == -1
        check.true("softmax: every start blows up or freezes", blown | (softmax.status == tl.Status.CONVERGED))
        check.true("softmax: the published scheme, where it stops, agrees", (exploded == blown)[softmax.scheme_stop != 0])
        check.equal("softmax: angle of the blow-up", angle(softmax.direction[blown]), at_blow_up, 1e-4)
        check.equal("softmax: angle of the others", angle(softmax.direction[~blown]), at_rest, 1e-4)
        check.between("softmax: blow-up times", softmax.blow_up_time[blown], 10.05415, 50.57885)
        check.between("softmax: frozen traces", softmax.trace[~blown], 0.099945, 36.285)
        number_of(check, "l2: starts that freeze", l2.status == tl.Status.CONVERGED, len(l2.start))
        check.equal("l2: angle of the end", angle(l2.direction), at_rest, 1e-4)
        if len(softmax.start) == 648:
            number_of(check, "softmax: starts that blow up", blown, 57)
            number_of(check, "softmax: runs of the published scheme that explode", exploded, 57)
            spread(check, "softmax: blow-up time", softmax.blow_up_time[blown], (10.0542, 50.5788), 5e-5)
            check.equal("softmax: frozen traces, minimum", softmax.trace[~blown].min(), 0.09995, 5e-6)
            check.equal("softmax: frozen traces, maximum", softmax.trace[~blown].max(), 36.28, 5e-3)
            number_of(check, "l2: runs that the published scheme calls diverged", l2.scheme_stop == -1, 6)
            number_of(check, "l2: limits of trace above 1000", l2.trace > 1e3, 5)
            check.equal("l2: largest trace of a limit", l2.trace.max(), 8.4e4, 500)
