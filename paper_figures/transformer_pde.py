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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import RunWarning
from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS

pictures = load_module(Path(__file__).with_name("_covariances.py"))           # the drawing, which no stored result depends on
KINDS, panels = pictures.KINDS, pictures.panels

PAPER = "A Unified Perspective on the Dynamics of Deep Transformers"
RED, INK = COLORS["vermilion"], COLORS["black"]
LANES = 100
CLOCK = np.append(24 * np.linspace(0, 1, 161) ** 2, 1000.0)                  # dense at the start; every run ends by itself before the last entry
POINTS = {2: 160, 3: 60}                                                   # of a drawn path, in the plane and in space
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


def packed(starts: np.ndarray) -> tp.Gaussian:
    """At most LANES starts as one state, filled up with copies of the last one."""
    return tp.Gaussian(np.zeros((LANES, 2)), np.pad(starts, ((0, LANES - len(starts)), (0, 0), (0, 0)), mode="edge"))


def coordinates(cov: np.ndarray) -> np.ndarray:
    r"""$(\Sigma_{11} - \Sigma_{22}, 2\Sigma_{12}, \Sigma_{11} + \Sigma_{22})$: the cone of covariances is $z \ge |(x, y)|$."""
    return np.stack([cov[..., 0, 0] - cov[..., 1, 1], 2 * cov[..., 0, 1], cov[..., 0, 0] + cov[..., 1, 1]], -1)


def shape(cov: np.ndarray) -> np.ndarray:
    """The coordinates of the covariance of trace one."""
    return coordinates(cov / np.trace(cov))


def thinned(paths: np.ndarray) -> np.ndarray:
    """Points at equal distances along each path, shape (starts, points, axes)."""
    length = np.pad(np.linalg.norm(np.diff(paths, axis=1), axis=-1).cumsum(1), ((0, 0), (1, 0)))
    at = np.linspace(0, 1, POINTS[paths.shape[-1]]) * length[:, -1:]
    return np.array([np.stack([np.interp(a, s, column) for column in path.T], -1) for a, s, path in zip(at, length, paths, strict=True)], np.float32)


@jax.jit
def growth_rates(flow: tp.Desingularized, ends: tp.Direction) -> jax.Array:
    """The growth rate of the trace at each end."""
    return jax.vmap(lambda y: 2 * flow.rates(y)[1])(ends)


def follow(head: Any, starts: np.ndarray, normalized: bool, rtol: float) -> dict[str, np.ndarray]:
    """Each start to its end; `lines` are paths of the covariance, or of the covariance over its trace in the plane."""
    flow, found = tp.Desingularized(head), []
    for part in np.split(starts, range(LANES, len(starts), LANES)):
        sol = tl.integrate(flow, packed(part), CLOCK, rtol=rtol, atol=rtol / 100, max_steps=2000, runs=LANES)
        end = tp.last(sol.value)
        time, rate = np.asarray(end.time), np.asarray(growth_rates(flow, end))          # before a blow-up of softmax, 1 / rate is what is left
        size = np.ones(()) if normalized else np.exp(np.asarray(sol.value.log_trace))[..., None, None]
        paths = coordinates(np.swapaxes(size * np.asarray(sol.value.cov), 0, 1))
        one = {"lines": thinned(paths[..., :2] if normalized else paths), "direction": end.cov, "trace": np.exp(end.log_trace), "time": time,
               "status": sol.status, "rate": rate, "blow_up_time": np.where(sol.status == tl.Status.BLOWUP, time + 1 / rate, np.inf)}
        found.append({name: np.asarray(value)[: len(part)] for name, value in one.items()})
    return {"start": starts, "color": 2 * starts[:, 0, 1], **{name: np.concatenate([one[name] for one in found]) for name in found[0]}}


def published(head: Any, starts: np.ndarray, step: float, low: float, high: float, steps: int) -> dict[str, np.ndarray]:
    """The published scheme on each start: its count of iterations, how it stopped (1 converged, -1 exploded, 0 neither) and its last state."""
    cov, count, stop = starts.copy(), np.zeros(len(starts), int), np.zeros(len(starts), int)
    for begun in range(0, steps, SLICE):
        alive = np.flatnonzero(stop == 0)
        for lanes in np.split(alive, range(LANES, len(alive), LANES)) if len(alive) else ():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RunWarning)                 # runs that this slice does not finish go on in the next
                sol = tl.iterate(head, tp.OfficialEuler(step), packed(cov[lanes]), steps=min(SLICE, steps - begun), runs=LANES, keep="last",
                                 stop=tl.Below("residual", low) | tl.Above("trace", high))
            new, taken, status = (np.asarray(a)[: len(lanes)] for a in (sol.value.cov, sol.steps, sol.status))
            exploded = np.trace(new, axis1=1, axis2=2) > high
            cov[lanes], count[lanes] = new, begun + taken - exploded
            stop[lanes] = np.where(status == tl.Status.CONVERGED, np.where(exploded, -1, 1), 0)
    return {"scheme_count": count, "scheme_stop": stop, "scheme_cov": cov}


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
    slopes = np.sort(np.roots([A[1, 1], A[0, 1] + A[1, 0], A[0, 0]]).real)
    return np.stack([np.ones(2), slopes]) / np.hypot(1, slopes)


def fastest(matrix: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest eigenvalue and its unit eigenvector; all are real here, though some versions of NumPy return them as complex numbers."""
    values, vectors = (a.real for a in np.linalg.eig(matrix))
    return values.max(), vectors[:, values.argmax()]


def number_of(check: Any, label: str, which: np.ndarray, expected: int) -> None:
    """Record a number of starts."""
    check.equal(label, int(which.sum()), expected, 0)


def spread(check: Any, label: str, values: np.ndarray, expected: tuple[float, ...], tol: float) -> None:
    """Compare minimum and maximum, or minimum, median and maximum."""
    check.equal(label, np.quantile(values, np.linspace(0, 1, len(expected))), np.array(expected), tol, note="minimum, (median,) maximum")


def settles(check: Any, kind: str, panel: SimpleNamespace, count: tuple[float, ...] = ()) -> None:
    """Every start ends at rest or decays, and the published scheme converges with these numbers of iterations."""
    number_of(check, f"{kind}: starts that settle", panel.status == tl.Status.CONVERGED, len(panel.start))
    if count:
        number_of(check, f"{kind}: runs of the published scheme that converge", panel.scheme_stop == 1, len(panel.start))
        spread(check, f"{kind}: iterations of the published scheme", panel.scheme_count, count, 1)


CONE = r"in the cone of covariances, with coordinates $(\Sigma_{11} - \Sigma_{22},\, 2\Sigma_{12},\, \Sigma_{11} + \Sigma_{22})$, the last one upward"
DISC = (r"of $\Sigma / \operatorname{tr}\Sigma$ in the coordinates $(\Sigma_{11} - \Sigma_{22},\, 2\Sigma_{12})$; "
        "the unit circle holds the matrices of rank one")

# ------------------------------------------------------------------------------------------------ figures


@figure("transformer_pde/convergence-to-zero", source=f"{PAPER}, convergence to zero", quick={"starts": 100}, paper={"starts": 100},
        caption=rf"$K = -Q$ and $V \succ 0$: paths {CONE}. All reach zero like $1/t$ along one direction $S_*$ (dashed), which softmax and L2 share.")
class ConvergenceToZero:
    """Figure A: 100 starts."""

    @staticmethod
    def compute(progress, starts):
        settings = {"step": 0.3, "low": 1e-5}
        return compute(progress, (DECAY_Q, -DECAY_Q, DECAY_V), grid(10, 0.5, starts), softmax=settings, l2=settings)

    @staticmethod
    def draw(data):
        ray = (1.1 * shape(data["softmax_direction"][0]), "$S_*$", RED, {"ha": "left", "va": "top"})
        return pictures.cones(data, (-174, -174), "color", pictures.START, lambda panel: [ray])

    @staticmethod
    def expect(check, data, starts):
        counts = {"softmax": (5055, 5436, 5527), "l2": (3700, 3889, 3934)}
        largest = {"softmax": (0.01691, 0.01696), "l2": (0.01196, 0.01198)}
        thin = {"softmax": (0.0305, 0.0328), "l2": (0.0305, 0.0319)}
        for kind, panel in panels(data).items():
            settles(check, kind, panel, counts[kind])
            spread(check, f"{kind}: largest eigenvalue at its stop", np.linalg.eigvalsh(panel.scheme_cov)[:, 1], largest[kind], 5e-6)
            spread(check, f"{kind}: smallest over largest eigenvalue at its stop", thinness(panel.scheme_cov), thin[kind], 5e-5)
            check.equal(f"{kind}: normalized end", panel.direction, np.array([[0.383, -0.455], [-0.455, 0.617]]), 3e-3)
            check.below(f"{kind}: spread of the normalized ends, both variants", np.abs(panel.direction - data["softmax_direction"][0]), 1e-7)
            # t Sigma tends to the solution of V S A S + (V S A S)' + S = 0; a small L2 state moves with 2A in the place of A
            scaled = (panel.time * panel.trace)[:, None, None] * panel.direction
            moved = DECAY_V @ scaled @ (-DECAY_Q.T @ DECAY_Q / np.sqrt(2) * {"softmax": 1, "l2": 2}[kind]) @ scaled
            check.below(f"{kind}: residual of the equation of lim t Sigma", np.abs(moved + np.swapaxes(moved, -1, -2) + scaled), 1e-5)


@figure("transformer_pde/convergence-to-a-line", source=f"{PAPER}, convergence to rank one", quick={"starts": 100}, paper={"starts": 100},
        caption=rf"$V = I$ and $K = -Q = -q^\top$: paths {CONE}. Each reaches the covariance of $x$ given $q^\top x$, a multiple of $pp^\top$ with "
                r"$p \perp q$; it is the same for softmax and L2.")
class ConvergenceToALine:
    """Figure B: 100 starts."""

    @staticmethod
    def compute(progress, starts):
        settings = {"step": 0.5, "low": 1e-4}
        return compute(progress, (LINE_Q, -LINE_Q, np.eye(2)), grid(10, 0.5, starts), softmax=settings, l2=settings)

    @staticmethod
    def draw(data):
        ray = (1.1 * shape(data["softmax_direction"][0]), r"$pp^\top$, $p \perp q$", RED, {"ha": "left", "va": "top"})
        return pictures.cones(data, (-86, -76), "color", pictures.START, lambda panel: [ray])

    @staticmethod
    def expect(check, data, starts):
        q, p = LINE_Q[0], np.array([-LINE_Q[0, 1], LINE_Q[0, 0]])
        counts = {"softmax": (157, 166, 202), "l2": (116, 122, 148)}
        check.equal("direction of the line", coordinates(np.outer(p, p)) / np.sqrt(2), np.array([0.47362, -0.52505, 0.70711]), 1e-5)
        for kind, panel in panels(data).items():
            settles(check, kind, panel, counts[kind])
            end, seen = panel.trace[:, None, None] * panel.direction, panel.start @ q
            limit = panel.start - np.einsum("ni,nj->nij", seen, seen) / (seen @ q)[:, None, None]
            check.below(f"{kind}: distance of the end from the Schur complement", np.abs(end - limit), 1e-7)
            spread(check, f"{kind}: p' Sigma p", end @ p @ p, (0.1465, 0.8510), 3e-4)
            check.below(f"{kind}: q' Sigma q where the published scheme stops", panel.scheme_cov @ q @ q, {"softmax": 0.00845, "l2": 0.00605}[kind])
            far = np.abs(panel.scheme_cov - limit).max()
            check.equal(f"{kind}: its largest distance from the limit", far, {"softmax": 0.0099, "l2": 0.0070}[kind], 5e-5)


@figure("transformer_pde/two-lines", source=f"{PAPER}, convergence to two lines",
        quick={"starts": 100, "steps": 5000}, paper={"starts": 276, "steps": 50000},
        caption=rf"$A + A^\top$ indefinite: paths {CONE}, colored by the trace of the limit. Each freezes on one of the two lines of covariances "
                r"$s\,uu^\top$ with $u^\top A u = 0$, named by the angle of $u$ and with the number of its starts. The published pair shows the "
                "same data, those of L2, twice; here (a) is softmax and (b) is L2.")
class TwoLines:
    """Figure C: 276 starts."""

    @staticmethod
    def compute(progress, starts, steps):
        settings = {"step": 0.01, "low": 1e-7, "steps": steps}
        return compute(progress, (MIXED_Q, MIXED_K, TWO_LINES_V), grid(20, 1.0, starts), softmax=settings, l2=settings)

    @staticmethod
    def draw(data):
        lines, looks = [np.outer(u, u) for u in isotropic(MIXED_K.T @ MIXED_Q).T], ((RED, "center"), (INK, "right"))

        def rays(panel):
            near = [int((np.abs(angle(panel.direction) - angle(line)) < 1).sum()) for line in lines]
            return [(1.5 * shape(line), rf"${angle(line):.1f}\degree$: {count} starts", shade, {"ha": side, "va": "bottom"})
                    for line, count, (shade, side) in zip(lines, near, looks, strict=True)]

        return pictures.cones(data, (-88, -88), "trace", "trace of the limit", rays, reach=1.4)

    @staticmethod
    def expect(check, data, starts, steps):
        A, V, u = MIXED_K.T @ MIXED_Q, TWO_LINES_V, isotropic(MIXED_K.T @ MIXED_Q)
        lines = np.degrees(np.arctan2(u[1], u[0]))
        check.equal("angles of the isotropic directions", lines, np.array([-58.144, -7.599]), 5e-4)
        check.equal("u'(A + A')Vu", np.diag(u.T @ (A + A.T) @ V @ u), np.array([-1.154, -0.782]), 5e-4)
        check.equal("u'AVu", np.diag(u.T @ A @ V @ u), np.array([-0.313, -0.569]), 5e-4)
        for kind, panel in panels(data).items():
            settles(check, kind, panel)
            near, there = (np.abs(angle(c)[:, None] - lines).argmin(1) for c in (panel.direction, panel.scheme_cov))
            check.below(f"{kind}: degrees between the end and its line", np.abs(angle(panel.direction) - lines[near]), 1e-4)
            check.below(f"{kind}: smallest over largest eigenvalue of the end", thinness(panel.direction), 1e-7)
            check.true(f"{kind}: the published scheme, where it stops, is on the same line", (near == there)[panel.scheme_stop == 1])
            if len(near) == 276:
                number_of(check, f"{kind}: starts on the line at -58.1 degrees", near == 0, 127)
                number_of(check, f"{kind}: runs of the published scheme that converge", panel.scheme_stop == 1, {"softmax": 263, "l2": 270}[kind])
                spread(check, f"{kind}: trace of the limit", panel.trace, {"softmax": (0.00848, 1.4707), "l2": (0.00595, 1.4530)}[kind], 5e-5)


@figure("transformer_pde/blow-up-and-divergence", source=f"{PAPER}, explosion and divergence", quick={"starts": 100}, paper={"starts": 1184},
        caption=rf"$V = I$ and $A + A^\top \succ 0$: paths {DISC}. (a) Softmax blows up in finite time; the paths run straight away from "
                r"$(A + A^\top)^{-1}$ to a point of the circle. (b) L2 grows exponentially, at the rate $\sqrt 2\,\lambda_{\max}(K^{-1}Q) = 0.7537$ "
                "and toward the eigenvector; it is followed up to traces of $10^7$ to $10^9$.")
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
        marks = {"softmax": [(shape(np.linalg.inv(A + A.T)), r"$(A + A^\top)^{-1}$", RED, (0.88, -1.0))],
                 "l2": [(shape(np.outer(u, u)), "fastest\ngrowth", RED, (0.88, -0.97))]}
        return pictures.discs(data, lambda kind, panel: marks[kind])

    @staticmethod
    def expect(check, data, starts):
        softmax, l2 = panels(data).values()
        A, P = GROWTH_K.T @ GROWTH_Q / np.sqrt(2), GROWTH_K.T @ GROWTH_K
        # V = I: t* = 1 / lambda_max(L'(A + A')L), and the profile is the projection on L u, u the eigenvector
        factor = np.linalg.cholesky(softmax.start)
        values, vectors = np.linalg.eigh(np.swapaxes(factor, -1, -2) @ (A + A.T) @ factor)
        time, top = 1 / values[:, -1], (factor @ vectors)[..., -1]
        profile = np.einsum("ni,nj->nij", top, top) / (top**2).sum(-1)[:, None, None]
        number_of(check, "softmax: starts that blow up", softmax.status == tl.Status.BLOWUP, len(softmax.start))
        check.equal("softmax: blow-up time over its closed form", softmax.blow_up_time / time, 1, 1e-7)
        check.below("softmax: distance of the profile from its closed form", np.abs(softmax.direction - profile), 1e-7)
        path, start = (x - shape(np.linalg.inv(A + A.T))[:2] for x in (softmax.lines, coordinates(softmax.start)[:, None, :2]))
        check.below("softmax: path away from a straight line", np.abs(path[..., 0] * start[..., 1] - path[..., 1] * start[..., 0]), 1e-6)
        number_of(check, "softmax: runs of the published scheme that explode", softmax.scheme_stop == -1, len(softmax.start))
        check.between("softmax: their stop over the blow-up time", 0.01 * softmax.scheme_count / time, 1.005, 1.145)
        if len(softmax.start) == 1184:
            spread(check, "softmax: blow-up time", softmax.blow_up_time, (0.353145, 8.937339), 5e-7)
            spread(check, "softmax: iterations of the published scheme", softmax.scheme_count, (40, 75, 899), 1)
        number_of(check, "l2: starts that grow for all times", l2.status == tl.Status.CONVERGED, len(l2.start))
        rate, w = fastest(np.linalg.solve(GROWTH_K, GROWTH_Q).T)
        large = (l2.trace[:, None, None] * l2.direction)[np.linalg.eigvalsh(l2.direction)[:, 0] * l2.trace > 1000]
        moved = 2 * np.linalg.solve(np.eye(2) + 2 * large @ P, large @ A @ large)
        check.equal("l2: predicted growth rate", np.sqrt(2) * rate, 0.7537, 5e-5)
        along = 2 * (moved @ w @ w) / (large @ w @ w)
        check.equal("l2: rate of w' Sigma w, w its left eigenvector, where Sigma > 1000 I", along, np.sqrt(2) * rate, 1e-3)
        check.equal("l2: median rate of the trace at the end", np.median(l2.rate), np.sqrt(2) * rate, 2e-3)
        number_of(check, "l2: runs of the published scheme that pass a trace of 1e4", l2.scheme_stop == -1, len(l2.scheme_stop))
        check.between("l2: their iterations", l2.scheme_count, 13635, 32581)
        check.equal("l2: median of their iterations", np.median(l2.scheme_count), 19284, 0.03, relative=True)


@figure("transformer_pde/mixed", source=f"{PAPER}, convergence and blow-up",
        quick={"starts": 100, "steps": 10000}, paper={"starts": 648, "steps": 50000},
        caption=rf"$Q$, $K$ of the two lines and another $V$: paths {DISC}. (a) Softmax: 57 of 648 starts blow up along an eigenvector of $V$ at "
                r"$78.65\degree$, the others freeze on the line at $-7.60\degree$. (b) L2: all converge to that line; the published panel calls "
                "6 of them diverged, because their trace passes the threshold of 1000 on the way.")
class Mixed:
    """Figure E: 648 starts."""

    @staticmethod
    def compute(progress, starts, steps):
        return compute(progress, (MIXED_Q, MIXED_K, MIXED_V), grid(30, 1.0, starts), normalized=True,
                       softmax={"step": 0.003, "low": 1e-4, "steps": steps}, l2={"step": 0.002, "low": 1e-4, "steps": steps})

    @staticmethod
    def draw(data):
        looks = {tl.Status.CONVERGED: ("at rest", INK, (0.85, -0.97)), tl.Status.BLOWUP: ("blow-up", RED, (-0.85, 0.92))}

        def marks(kind, panel):
            found = [(panel.direction[panel.status == status], *look) for status, look in looks.items()]
            return [(shape(ends[0]), f"{text}:\n{len(ends)} starts", shade, place) for ends, text, shade, place in found if len(ends)]

        return pictures.discs(data, marks)

    @staticmethod
    def expect(check, data, starts, steps):
        A, V, line = MIXED_K.T @ MIXED_Q, MIXED_V, isotropic(MIXED_K.T @ MIXED_Q)[:, 1]
        value, u = fastest(-V)
        at_rest, at_blow_up = (float(angle(np.outer(x, x))) for x in (line, u))
        check.equal("angles of the line and of the eigenvector of V", np.array([at_rest, at_blow_up]), np.array([-7.60, 78.65]), 5e-3)
        check.equal("lambda u'Au of that eigenvector", -value * (u @ A @ u), 0.06441, 5e-6)
        check.equal("u'(A + A')Vu and u'AVu of the line", np.array([line @ (A + A.T), line @ A]) @ V @ line, np.array([-0.947, -0.690]), 5e-4)
        softmax, l2 = panels(data).values()
        blown, exploded, frozen = softmax.status == tl.Status.BLOWUP, softmax.scheme_stop == -1, softmax.status == tl.Status.CONVERGED
        check.true("softmax: every start blows up or freezes", blown | frozen)
        check.true("softmax: the published scheme, where it stops, agrees", (exploded == blown)[softmax.scheme_stop != 0])
        check.equal("softmax: angle of the blow-up", angle(softmax.direction[blown]), at_blow_up, 1e-4)
        check.equal("softmax: angle of the others", angle(softmax.direction[frozen]), at_rest, 1e-4)
        check.between("softmax: blow-up times", softmax.blow_up_time[blown], 10.05415, 50.57885)
        check.between("softmax: frozen traces", softmax.trace[frozen], 0.099945, 36.285)
        settles(check, "l2", l2)
        check.equal("l2: angle of the end", angle(l2.direction), at_rest, 1e-4)
        if len(blown) == 648:
            number_of(check, "softmax: starts that blow up", blown, 57)
            number_of(check, "softmax: runs of the published scheme that explode", exploded, 57)
            spread(check, "softmax: blow-up times", softmax.blow_up_time[blown], (10.0542, 50.5788), 5e-5)
            spread(check, "softmax: logarithms of the frozen traces", np.log(softmax.trace[frozen]), (np.log(0.09995), np.log(36.28)), 1e-4)
            number_of(check, "l2: runs that the published scheme calls diverged", l2.scheme_stop == -1, 6)
            number_of(check, "l2: limits of trace above 1000", l2.trace > 1e3, 5)
            check.equal("l2: largest trace of a limit", l2.trace.max(), 8.4e4, 500)
