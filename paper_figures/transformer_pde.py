"""Covariances that converge: to zero, to a line or a plane of the cone, to two lines.

Every start of a panel is followed by `Desingularized` until it is at rest or decays along a settled direction, so an end point is a limit and not
the state at which a threshold was met. `expect` compares with closed forms and with the published scheme, `OfficialEuler`, on the same starts.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np

from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS

numbers: ModuleType = load_module(Path(__file__).with_name("_panels.py"))
pictures: ModuleType = load_module(Path(__file__).with_name("_covariances.py"))           # the drawing, which no stored result depends on
PAPER, KINDS, CONE = numbers.PAPER, numbers.KINDS, pictures.CONE
RED, INK = COLORS["vermilion"], COLORS["black"]


@figure("transformer_pde/convergence-to-zero", source=f"{PAPER}, convergence to zero", quick={"starts": 100}, paper={"starts": 100},
        caption=rf"$K = -Q$ and $V \succ 0$: paths {CONE}. All reach zero like $1/t$ along a direction (dashed) that does not depend on the start. "
                r"Softmax, L2 and Sinkhorn share the direction $S_*$, of rank two; two heads have another one, of rank one.")
class ConvergenceToZero:
    """Figure A: 100 starts."""

    @staticmethod
    def compute(progress, starts):
        settings = {"step": 0.3, "low": 1e-5}
        schemes = {"softmax": settings, "l2": settings, "multihead": settings, "sinkhorn": {"step": 0.5, "low": 1e-5}}
        weights = (numbers.DECAY_Q, -numbers.DECAY_Q, numbers.DECAY_V)
        return numbers.compute(progress, weights, numbers.grid(10, 0.5, starts), schemes, normalized=False)

    @staticmethod
    def draw(data):
        def rays(kind, panel):
            name, shade = ("$uu^\\top$", INK) if kind == "multihead" else ("$S_*$", RED)
            return [(1.1 * numbers.shape(panel.direction[0]), name, shade, {"ha": "left", "va": "top"})]

        return pictures.cones(numbers.panels(data), KINDS, (-174,) * 4, "color", pictures.START, rays)

    @staticmethod
    def expect(check, data, starts):
        Q, V = numbers.DECAY_Q, numbers.DECAY_V
        counts = {"softmax": (5055, 5436, 5527), "l2": (3700, 3889, 3934), "multihead": (5269, 6235, 6408), "sinkhorn": (2582, 2758, 2796)}
        largest = {"softmax": (0.01691, 0.01696), "l2": (0.01196, 0.01198), "multihead": (0.019830, 0.019833), "sinkhorn": (0.01422, 0.01425)}
        thin = {"softmax": (0.0305, 0.0328), "l2": (0.0305, 0.0319), "sinkhorn": (0.0305, 0.0324)}
        whole, (top, low) = [(V, -Q.T @ Q)], np.eye(2)[:, :, None]
        # a small L2 state moves with 2 A in the place of A; Sinkhorn of temperature 1 with A
        forms = {"softmax": (whole, 2**-0.5), "l2": (whole, 2**0.5), "sinkhorn": (whole, 1.0),
                 "multihead": ([(row * V, -(row * Q).T @ (row * Q)) for row in (top, low)], 1.0)}
        for kind, panel in numbers.panels(data).items():
            numbers.settles(check, kind, panel, counts[kind])
            numbers.spread(check, f"{kind}: largest eigenvalue at its stop", np.linalg.eigvalsh(panel.scheme_cov)[:, 1], largest[kind], 5e-6)
            if kind == "multihead":
                check.below(f"{kind}: smallest over largest eigenvalue at its stop", numbers.thinness(panel.scheme_cov), 8.5e-6)
                check.below(f"{kind}: smallest over largest eigenvalue of the direction", numbers.thinness(panel.direction), 1e-8)
                check.below(f"{kind}: spread of the normalized ends", np.abs(panel.direction - panel.direction[0]), 1e-7)
            else:
                numbers.spread(check, f"{kind}: smallest over largest eigenvalue at its stop", numbers.thinness(panel.scheme_cov), thin[kind], 5e-5)
                check.equal(f"{kind}: normalized end", panel.direction, np.array([[0.383, -0.455], [-0.455, 0.617]]), 3e-3)
                away = np.abs(panel.direction - data["softmax_direction"][0])
                check.below(f"{kind}: distance of the normalized end from that of softmax", away, 1e-7)
            # Sigma = S / (t + s) near the end, with the sum of V_h S A_h S and its transpose equal to -S
            scaled, heads = -(panel.trace / panel.rate)[:, None, None] * panel.direction, forms[kind]
            moved = heads[1] * sum(v @ scaled @ a @ scaled for v, a in heads[0])
            check.below(f"{kind}: residual of the equation of lim t Sigma", np.abs(moved + np.swapaxes(moved, -1, -2) + scaled), 1e-5)


@figure("transformer_pde/convergence-to-a-line", source=f"{PAPER}, convergence to rank one", quick={"starts": 100}, paper={"starts": 100},
        caption=rf"$V = I$ and $K = -Q = -q^\top$: paths {CONE}. (a, b) Each reaches the covariance of $x$ given $q^\top x$, a multiple of $pp^\top$ "
                r"with $p \perp q$; it is the same for softmax and L2. (c) Of two heads only the first acts, on $x_1$: the limits fill a part of the "
                r"plane $e_1^\top \Sigma q = 0$ (its trace on the cone is dashed), and $\Sigma_{22}$ never changes.")
class ConvergenceToALine:
    """Figure B: 100 starts."""

    @staticmethod
    def compute(progress, starts):
        settings = {"step": 0.5, "low": 1e-4}
        weights = (numbers.LINE_Q, -numbers.LINE_Q, np.eye(2))
        return numbers.compute(progress, weights, numbers.grid(10, 0.5, starts), dict.fromkeys(("softmax", "l2", "multihead"), settings),
                               normalized=False)

    @staticmethod
    def draw(data):
        q = numbers.LINE_Q[0]

        def rays(kind, panel):
            if kind != "multihead":
                return [(1.1 * numbers.shape(panel.direction[0]), r"$pp^\top$, $p \perp q$", RED, {"ha": "left", "va": "top"})]
            # the matrices of rank one in the plane: uu' with u_1 = 0 or u'q = 0
            edges = ((np.array([0.0, 1.0]), "$e_2e_2^\\top$", "right"), (np.array([-q[1], q[0]]), r"$pp^\top$", "left"))
            return [(1.1 * numbers.shape(np.outer(u, u)), name, RED, {"ha": side, "va": "top"}) for u, name, side in edges]

        return pictures.cones(numbers.panels(data), KINDS, (-86, -76, -45), "color", pictures.START, rays)

    @staticmethod
    def expect(check, data, starts):
        q, p = numbers.LINE_Q[0], np.array([-numbers.LINE_Q[0, 1], numbers.LINE_Q[0, 0]])
        counts = {"softmax": (157, 166, 202), "l2": (116, 122, 148), "multihead": (11, 31, 85)}
        check.equal("direction of the line", numbers.coordinates(np.outer(p, p)) / np.sqrt(2), np.array([0.47362, -0.52505, 0.70711]), 1e-5)
        for kind, panel in numbers.panels(data).items():
            numbers.settles(check, kind, panel, counts[kind])
            end, seen = panel.trace[:, None, None] * panel.direction, panel.start @ q
            if kind == "multihead":
                # the orbit Sigma + (zz' - yy') / q'y of y = Sigma q under z = (e^tau y_1, y_2), tau falling to the zero of q'z or for ever
                zero = -q[1] * seen[:, 1] / (q[0] * seen[:, 0])
                there = seen * np.stack([np.where((zero > 0) & (zero < 1), zero, 0.0), np.ones(len(zero))], -1)
                limit = panel.start + (_squares(there) - _squares(seen)) / (seen @ q)[:, None, None]
                check.below(f"{kind}: distance of the end from its closed form", np.abs(end - limit), 1e-7)
                check.below(f"{kind}: distance from the plane", np.abs(end[:, 0] @ q), 1e-7)
                check.below(f"{kind}: change of the variance of x_2", np.abs(end[:, 1, 1] - panel.start[:, 1, 1]), 1e-10)
                check.below(f"{kind}: change of it in the published scheme", np.abs(panel.scheme_cov[:, 1, 1] - panel.start[:, 1, 1]), 1.6e-15)
                continue
            limit = panel.start - _squares(seen) / (seen @ q)[:, None, None]
            check.below(f"{kind}: distance of the end from the Schur complement", np.abs(end - limit), 1e-7)
            numbers.spread(check, f"{kind}: p' Sigma p", end @ p @ p, (0.1465, 0.8510), 3e-4)
            check.below(f"{kind}: q' Sigma q where the published scheme stops", panel.scheme_cov @ q @ q, {"softmax": 0.00845, "l2": 0.00605}[kind])
            far = np.abs(panel.scheme_cov - limit).max()
            check.equal(f"{kind}: its largest distance from the limit", far, {"softmax": 0.0099, "l2": 0.0070}[kind], 5e-5)


def _squares(vectors: np.ndarray) -> np.ndarray:
    """The matrices vv' of the rows."""
    return vectors[:, :, None] * vectors[:, None, :]


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
        weights = (numbers.MIXED_Q, numbers.MIXED_K, numbers.TWO_LINES_V)
        return numbers.compute(progress, weights, numbers.grid(20, 1.0, starts), dict.fromkeys(("softmax", "l2"), settings), normalized=False)

    @staticmethod
    def draw(data):
        lines, looks = [np.outer(u, u) for u in numbers.isotropic(numbers.MIXED_K.T @ numbers.MIXED_Q).T], ((RED, "center"), (INK, "right"))

        def rays(kind, panel):
            near = [int((np.abs(numbers.angle(panel.direction) - numbers.angle(line)) < 1).sum()) for line in lines]
            return [(1.5 * numbers.shape(line), rf"${numbers.angle(line):.1f}\degree$: {count} starts", shade, {"ha": side, "va": "bottom"})
                    for line, count, (shade, side) in zip(lines, near, looks, strict=True)]

        return pictures.cones(numbers.panels(data), KINDS, (-88, -88), "trace", "trace of the limit", rays, reach=1.4)

    @staticmethod
    def expect(check, data, starts, steps):
        A, V = numbers.MIXED_K.T @ numbers.MIXED_Q, numbers.TWO_LINES_V
        u = numbers.isotropic(A)
        lines = np.degrees(np.arctan2(u[1], u[0]))
        check.equal("angles of the isotropic directions", lines, np.array([-58.144, -7.599]), 5e-4)
        check.equal("u'(A + A')Vu", np.diag(u.T @ (A + A.T) @ V @ u), np.array([-1.154, -0.782]), 5e-4)
        check.equal("u'AVu", np.diag(u.T @ A @ V @ u), np.array([-0.313, -0.569]), 5e-4)
        for kind, panel in numbers.panels(data).items():
            numbers.settles(check, kind, panel)
            near, there = (np.abs(numbers.angle(c)[:, None] - lines).argmin(1) for c in (panel.direction, panel.scheme_cov))
            check.below(f"{kind}: degrees between the end and its line", np.abs(numbers.angle(panel.direction) - lines[near]), 1e-4)
            check.below(f"{kind}: smallest over largest eigenvalue of the end", numbers.thinness(panel.direction), 1e-7)
            check.true(f"{kind}: the published scheme, where it stops, is on the same line", (near == there)[panel.scheme_stop == 1])
            if len(near) == 276:
                numbers.number_of(check, f"{kind}: starts on the line at -58.1 degrees", near == 0, 127)
                converged = {"softmax": 263, "l2": 270}[kind]
                numbers.number_of(check, f"{kind}: runs of the published scheme that converge", panel.scheme_stop == 1, converged)
                limits = {"softmax": (0.00848, 1.4707), "l2": (0.00595, 1.4530)}[kind]
                numbers.spread(check, f"{kind}: trace of the limit", panel.trace, limits, 5e-5)
