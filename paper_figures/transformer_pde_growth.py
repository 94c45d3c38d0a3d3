"""Covariances that blow up or grow for ever, and those that do so from some starts only.

Runs are those of the figures of convergence. The count of iterations of a run of the published scheme that exploded leaves out its last step, as in
the published scripts. Its slowest panel, growing L2 (19000 steps of 0.001), runs on a subset of at most `LANES` starts.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np

import theorylab as tl
from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS

numbers: ModuleType = load_module(Path(__file__).with_name("_panels.py"))
pictures: ModuleType = load_module(Path(__file__).with_name("_covariances.py"))           # the drawing, which no stored result depends on
PAPER, KINDS, DISC = numbers.PAPER, numbers.KINDS, pictures.DISC
RED, INK = COLORS["vermilion"], COLORS["black"]


def shared_line() -> tuple[np.ndarray, float]:
    """The unit vector u with the same u'Au for both heads that attracts, and that number."""
    first, second = (np.outer(k, q) for k, q in zip(numbers.GROWTH_K, numbers.GROWTH_Q, strict=True))
    gap = second - first                                                   # the slope u_2 / u_1 grows at the rate u' gap u
    u = next(u for u in numbers.isotropic(gap).T if u[1] / u[0] * (np.array([-u[1], u[0]]) @ (gap + gap.T) @ u) < 0)
    return u, float(u @ first @ u)


@figure("transformer_pde/blow-up-and-divergence", source=f"{PAPER}, explosion and divergence", quick={"starts": 100}, paper={"starts": 1184},
        caption=rf"$V = I$ and $A + A^\top \succ 0$: paths {DISC}. (a) Softmax blows up in finite time; the paths run straight away from "
                r"$(A + A^\top)^{-1}$ to a point of the circle. (b) L2 grows exponentially, at the rate $\sqrt 2\,\lambda_{\max}(K^{-1}Q) = 0.7537$ "
                "and toward the eigenvector; it is followed up to traces of $10^7$ to $10^9$. (c) Two heads blow up too, along the second axis or, "
                r"83 starts of 1184, along $u$ with $u^\top A_1 u = u^\top A_2 u$. (d) Sinkhorn grows at the rate 2 in every direction, so its shape "
                "need not come near rank one. Every second path is drawn, and all ends.")
class BlowUpAndDivergence:
    """Figure D: 1184 starts."""

    @staticmethod
    def compute(progress, starts):
        # in a growing L2 run the rounding of (I + 2 Sigma P)^-1 soon exceeds a tolerance of 1e-10
        schemes = {"softmax": {"step": 0.01}, "l2": {"step": 0.001, "high": 1e4, "rtol": 1e-8, "most": numbers.LANES}, "multihead": {"step": 0.002},
                   "sinkhorn": {"step": 0.01, "high": 1e4, "rtol": 1e-8}}
        weights = (numbers.GROWTH_Q, numbers.GROWTH_K, np.eye(2))
        return numbers.compute(progress, weights, numbers.grid(40, 1.0, starts), schemes, normalized=True, low=1e-5)

    @staticmethod
    def draw(data):
        A, u = numbers.GROWTH_K.T @ numbers.GROWTH_Q, numbers.fastest(np.linalg.solve(numbers.GROWTH_K, numbers.GROWTH_Q))[1]
        both = shared_line()[0]
        marks = {"softmax": [(numbers.shape(np.linalg.inv(A + A.T)), r"$(A + A^\top)^{-1}$", RED, (0.88, -1.0))],
                 "l2": [(numbers.shape(np.outer(u, u)), "fastest\ngrowth", RED, (0.88, -0.97))],
                 "multihead": [(numbers.shape(np.diag([0.0, 1.0])), "$e_2e_2^\\top$", RED, (-0.9, -0.95)),
                               (numbers.shape(np.outer(both, both)), r"$uu^\top$", INK, (0.95, -0.95))], "sinkhorn": []}
        return pictures.discs(numbers.panels(data), KINDS, lambda kind, panel: marks[kind])

    @staticmethod
    def expect(check, data, starts):
        softmax, l2, heads, sinkhorn = (numbers.panels(data)[kind] for kind in ("softmax", "l2", "multihead", "sinkhorn"))
        A, P = numbers.GROWTH_K.T @ numbers.GROWTH_Q / np.sqrt(2), numbers.GROWTH_K.T @ numbers.GROWTH_K
        # V = I: t* = 1 / lambda_max(L'(A + A')L), and the profile is the projection on L u, u the eigenvector
        factor = np.linalg.cholesky(softmax.start)
        values, vectors = np.linalg.eigh(np.swapaxes(factor, -1, -2) @ (A + A.T) @ factor)
        time, top = 1 / values[:, -1], (factor @ vectors)[..., -1]
        profile = np.einsum("ni,nj->nij", top, top) / (top**2).sum(-1)[:, None, None]
        numbers.number_of(check, "softmax: starts that blow up", softmax.status == tl.Status.BLOWUP, len(softmax.start))
        check.equal("softmax: blow-up time over its closed form", softmax.blow_up_time / time, 1, 1e-7)
        check.below("softmax: distance of the profile from its closed form", np.abs(softmax.direction - profile), 1e-7)
        middle = numbers.shape(np.linalg.inv(A + A.T))[:2]
        path, start = (x - middle for x in (softmax.lines, numbers.coordinates(softmax.start)[:, None, :2]))
        check.below("softmax: path away from a straight line", np.abs(path[..., 0] * start[..., 1] - path[..., 1] * start[..., 0]), 1e-6)
        check.between("softmax: stop of the published scheme over the blow-up time", 0.01 * softmax.scheme_count / time, 1.005, 1.145)
        for kind, panel in (("softmax", softmax), ("multihead", heads)):
            numbers.number_of(check, f"{kind}: runs of the published scheme that explode", panel.scheme_stop == -1, len(panel.start))
            radius = np.hypot(*(numbers.coordinates(panel.scheme_cov)[:, :2] / numbers.coordinates(panel.scheme_cov)[:, 2:]).T)
            check.above(f"{kind}: radius where it stops", radius, {"softmax": 0.9979, "multihead": 0.9960}[kind])
        if len(softmax.start) == 1184:
            numbers.spread(check, "softmax: blow-up time", softmax.blow_up_time, (0.353145, 8.937339), 5e-7)
            numbers.spread(check, "softmax: iterations of the published scheme", softmax.scheme_count, (40, 75, 899), 1)
            numbers.spread(check, "multihead: iterations of the published scheme", heads.scheme_count, (169, 346, 9819), 1)
            numbers.spread(check, "sinkhorn: iterations of the published scheme", sinkhorn.scheme_count, (478, 512, 989), 1)

        numbers.number_of(check, "multihead: starts that blow up", heads.status == tl.Status.BLOWUP, len(heads.start))
        check.between("multihead: stop of the published scheme over the blow-up time", 0.002 * heads.scheme_count / heads.blow_up_time, 0.995, 1.04)
        # a profile uu' is kept if the heads pull u along itself, each its own coordinate: u = e_2, or u with the same u'Au for both
        u, pull = shared_line()
        there = heads.direction[:, 1, 1] < 0.5
        for name, which, line, rate in (("second axis", ~there, np.array([0.0, 1.0]), (numbers.GROWTH_K[1] * numbers.GROWTH_Q[1])[1]),
                                        ("line of equal pull", there, u, pull)):
            check.below(f"multihead: distance of the profile from the {name}", np.abs(heads.direction - np.outer(line, line))[which], 2e-2)
            check.equal(f"multihead: median growth rate over the trace, {name}", np.median((heads.rate / heads.trace)[which]), 2 * rate, 1e-4)

        if len(there) == 1184:
            numbers.number_of(check, "multihead: starts that blow up along the line of equal pull", there, 83)

        numbers.number_of(check, "l2: starts that grow for all times", l2.status == tl.Status.CONVERGED, len(l2.start))
        rate, w = numbers.fastest(np.linalg.solve(numbers.GROWTH_K, numbers.GROWTH_Q).T)
        large = (l2.trace[:, None, None] * l2.direction)[np.linalg.eigvalsh(l2.direction)[:, 0] * l2.trace > 1000]
        moved = 2 * np.linalg.solve(np.eye(2) + 2 * large @ P, large @ A @ large)
        check.equal("l2: predicted growth rate", np.sqrt(2) * rate, 0.7537, 5e-5)
        along = 2 * (moved @ w @ w) / (large @ w @ w)
        check.equal("l2: rate of w' Sigma w, w its left eigenvector, where Sigma > 1000 I", along, np.sqrt(2) * rate, 1e-3)
        check.equal("l2: median rate of the trace at the end", np.median(l2.rate), np.sqrt(2) * rate, 2e-3)
        numbers.number_of(check, "l2: runs of the published scheme that pass a trace of 1e4", l2.scheme_stop == -1, len(l2.scheme_stop))
        check.between("l2: their iterations", l2.scheme_count, 13635, 32581)
        check.equal("l2: median of their iterations", np.median(l2.scheme_count), 19284, 0.03, relative=True)

        numbers.number_of(check, "sinkhorn: starts that grow for all times", sinkhorn.status == tl.Status.CONVERGED, len(sinkhorn.start))
        check.below("sinkhorn: growth rate of the trace at the end", sinkhorn.rate, 2 + 1e-6)
        check.equal("sinkhorn: median of the growth rate", np.median(sinkhorn.rate), 2, 1e-4)
        numbers.number_of(check, "sinkhorn: runs of the published scheme that pass a trace of 1e4", sinkhorn.scheme_stop == -1, len(sinkhorn.start))


@figure("transformer_pde/mixed", source=f"{PAPER}, convergence and blow-up",
        quick={"starts": 100, "steps": 10000}, paper={"starts": 648, "steps": 50000},
        caption=rf"$Q$, $K$ of the two lines and another $V$: paths {DISC}. (a) Softmax: 57 of 648 starts blow up along an eigenvector of $V$ at "
                r"$78.65\degree$, the others freeze on the line at $-7.60\degree$. (b) L2: all converge to that line; the published panel calls "
                "6 of them diverged, because the trace passes 1000. (c) Two heads: all decay to zero like $1/t$, along "
                "one direction. The published panel of this name leaves the number of heads at one and so shows softmax again.")
class Mixed:
    """Figure E: 648 starts."""

    @staticmethod
    def compute(progress, starts, steps):
        settings = {"step": 0.002}
        schemes = {"softmax": {"step": 0.003}, "l2": settings, "multihead": settings | {"times": (100.0, 1000.0)}}
        weights, states = (numbers.MIXED_Q, numbers.MIXED_K, numbers.MIXED_V), numbers.grid(30, 1.0, starts)
        data = numbers.compute(progress, weights, states, schemes, normalized=True, low=1e-4, steps=steps)
        named = numbers.published(numbers.attention("softmax", *weights), states, step=0.002, low=1e-4, high=1e3, steps=steps)
        return data | {"named_multihead_stop": named["scheme_stop"]}

    @staticmethod
    def draw(data):
        looks = {tl.Status.CONVERGED: ("at rest", INK, (0.66, -1.04)), tl.Status.BLOWUP: ("blow up", RED, (-0.72, 1.04))}

        def marks(kind, panel):
            found = [(panel.direction[panel.status == status], *look) for status, look in looks.items()]
            return [(numbers.shape(ends[0]), f"{len(ends)} {'to zero' if kind == 'multihead' else text}", shade, place)
                    for ends, text, shade, place in found if len(ends)]

        return pictures.discs(numbers.panels(data), KINDS, marks)

    @staticmethod
    def expect(check, data, starts, steps):
        A, V = numbers.MIXED_K.T @ numbers.MIXED_Q, numbers.MIXED_V
        line = numbers.isotropic(A)[:, 1]
        value, u = numbers.fastest(-V)
        at_rest, at_blow_up = (float(numbers.angle(np.outer(x, x))) for x in (line, u))
        check.equal("angles of the line and of the eigenvector of V", np.array([at_rest, at_blow_up]), np.array([-7.60, 78.65]), 5e-3)
        check.equal("lambda u'Au of that eigenvector", -value * (u @ A @ u), 0.06441, 5e-6)
        check.equal("u'(A + A')Vu and u'AVu of the line", np.array([line @ (A + A.T), line @ A]) @ V @ line, np.array([-0.947, -0.690]), 5e-4)
        softmax, l2, heads = (numbers.panels(data)[kind] for kind in ("softmax", "l2", "multihead"))
        blown, exploded, frozen = softmax.status == tl.Status.BLOWUP, softmax.scheme_stop == -1, softmax.status == tl.Status.CONVERGED
        check.true("softmax: every start blows up or freezes", blown | frozen)
        check.true("softmax: the published scheme, where it stops, agrees", (exploded == blown)[softmax.scheme_stop != 0])
        check.equal("softmax: angle of the blow-up", numbers.angle(softmax.direction[blown]), at_blow_up, 1e-4)
        check.equal("softmax: angle of the others", numbers.angle(softmax.direction[frozen]), at_rest, 1e-4)
        check.between("softmax: blow-up times", softmax.blow_up_time[blown], 10.05415, 50.57885)
        check.between("softmax: frozen traces", softmax.trace[frozen], 0.099945, 36.285)
        numbers.settles(check, "l2", l2)
        check.equal("l2: angle of the end", numbers.angle(l2.direction), at_rest, 1e-4)
        numbers.settles(check, "multihead", heads)
        check.below("multihead: trace at the end", heads.trace, 1e-6)
        check.below("multihead: spread of the normalized ends", np.abs(heads.direction - heads.direction[0]), 1e-5)
        # decay like 1/t: the product of time and trace has a limit
        check.equal("multihead: minus the rate times the time at the end", -heads.rate * heads.time, 1, 1e-4)
        check.true("multihead: no run of the published scheme stops", heads.scheme_stop == 0)
        if len(blown) == 648:
            numbers.number_of(check, "softmax: starts that blow up", blown, 57)
            numbers.number_of(check, "softmax: runs of the published scheme that explode", exploded, 57)
            numbers.spread(check, "softmax: blow-up times", softmax.blow_up_time[blown], (10.0542, 50.5788), 5e-5)
            numbers.spread(check, "softmax: logarithms of the frozen traces", np.log(softmax.trace[frozen]), (np.log(0.09995), np.log(36.28)), 1e-4)
            numbers.number_of(check, "l2: runs that the published scheme calls diverged", l2.scheme_stop == -1, 6)
            numbers.number_of(check, "l2: limits of trace above 1000", l2.trace > 1e3, 5)
            check.equal("l2: largest trace of a limit", l2.trace.max(), 8.4e4, 500)
            numbers.spread(check, "multihead: traces at t = 100", heads.traces_at[:, 0], (0.0114, 0.66), 0.01, relative=True)
            numbers.spread(check, "multihead: traces at t = 1000", heads.traces_at[:, 1], (8.7e-4, 0.105), 0.01, relative=True)
            stops = [int((data["named_multihead_stop"] == stop).sum()) for stop in (1, -1, 0)]
            check.equal("one head where the published panel says two: runs that converge, explode, do neither", stops, (590, 57, 1), 0)
