r"""The starts, weights and runs behind the figures of 2 x 2 covariances: every start to its end, and the published scheme on the same starts.

Starts run in blocks of `LANES`, and every panel of softmax heads has two of them with two rows of queries (rows of zeros fill up what a panel does
not have), so three compiled programs (softmax, L2, Sinkhorn) serve all panels and presets.

The weights are those of the published scripts. Softmax and L2: $A = K^\top Q / \sqrt 2$, with $P = K^\top K$ without a factor for L2. Two heads: head
h has row h of Q, K and V and the other rows zero, without a factor. Sinkhorn: $A = K^\top Q$ and temperature 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import RunWarning

PAPER = "A Unified Perspective on the Dynamics of Deep Transformers"
KINDS = {"softmax": "softmax", "l2": "L2", "multihead": "softmax, two heads", "sinkhorn": "Sinkhorn"}
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
    return thinned_starts(starts, most)


def thinned_starts(starts: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the starts, at equal distances in their order."""
    return starts[:: math.ceil(len(starts) / most)]


def attention(kind: str, Q: np.ndarray, K: np.ndarray, V: np.ndarray) -> tp.Attention:
    """A variant with the published scaling; that of L2 goes to its queries, because a scale would also act on its keys."""
    if kind == "l2":
        return tp.L2(0.5**0.5 * Q, K, V)
    if kind == "sinkhorn":
        return tp.Sinkhorn(Q, K, V)
    one, two = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    if kind == "multihead":
        return tp.MultiHead([tp.Softmax(row @ Q, row @ K, row @ V) for row in (one, two)])
    return tp.MultiHead([tp.Softmax(Q, K, V, scale=0.5**0.5), tp.Softmax(0 * Q, 0 * K, 0 * V)])


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


def follow(head: tp.Attention, starts: np.ndarray, normalized: bool, rtol: float = 1e-10, times: tuple[float, ...] = ()) -> dict[str, np.ndarray]:
    """Each start to its end; `lines` are paths of the covariance, or of the covariance over its trace in the plane.

    `traces_at` are traces at the given times, by interpolation of its logarithm along the logarithm of the time.
    """
    flow, found = tp.Desingularized(head), []
    for part in np.split(starts, range(LANES, len(starts), LANES)):
        sol = tl.integrate(flow, packed(part), CLOCK, rtol=rtol, atol=rtol / 100, max_steps=2000, runs=LANES)
        end = tp.last(sol.value)
        time, rate = np.asarray(end.time), np.asarray(growth_rates(flow, end))          # before a blow-up of softmax, 1 / rate is what is left
        log_trace, depth = np.asarray(sol.value.log_trace), np.asarray(sol.value.time)
        size = np.ones(()) if normalized else np.exp(log_trace)[..., None, None]
        paths = coordinates(np.swapaxes(size * np.asarray(sol.value.cov), 0, 1))
        if not normalized:                                                              # a direction that has settled leads straight to the tip
            settled = ((sol.status == tl.Status.CONVERGED) & (rate * time < -0.5))[:, None, None]
            paths = np.concatenate([paths, np.where(settled, 0.0, paths[:, -1:])], 1)
        one = {"lines": thinned(paths[..., :2] if normalized else paths), "direction": end.cov, "trace": np.exp(end.log_trace), "time": time,
               "status": sol.status, "rate": rate, "blow_up_time": np.where(sol.status == tl.Status.BLOWUP, time + 1 / rate, np.inf)}
        if times:
            log_depth = np.log(np.maximum(depth, 1e-300))
            one["traces_at"] = np.exp([np.interp(np.log(times), log_depth[:, i], log_trace[:, i]) for i in range(LANES)])
        found.append({name: np.asarray(value)[: len(part)] for name, value in one.items()})
    return {"start": starts, "color": 2 * starts[:, 0, 1], **{name: np.concatenate([one[name] for one in found]) for name in found[0]}}


def published(head: tp.Attention, starts: np.ndarray, step: float, low: float, high: float, steps: int) -> dict[str, np.ndarray]:
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


def compute(progress: Any, weights: tuple[np.ndarray, ...], starts: np.ndarray, schemes: dict[str, dict[str, Any]],
            **shared: Any) -> dict[str, np.ndarray]:
    """All panels of a figure. `schemes` holds, by variant, settings of the published scheme and, if not the usual ones, of `follow` and `most`."""
    data: dict[str, np.ndarray] = {}
    progress.start("panels", 2 * len(schemes))
    for i, (kind, settings) in enumerate(schemes.items()):
        head, own = attention(kind, *weights), {"high": 1e3, "steps": 50000, "most": len(starts)} | shared | settings
        found = follow(head, starts, **{name: own.pop(name) for name in ("normalized", "rtol", "times") if name in own})
        progress.update(2 * i + 1, KINDS[kind])
        found |= published(head, thinned_starts(starts, own.pop("most")), **own)
        progress.update(2 * i + 2, f"{KINDS[kind]}, published scheme")
        data |= {f"{kind}_{name}": value for name, value in found.items()}
    return data


def panels(data: dict[str, np.ndarray]) -> dict[str, SimpleNamespace]:
    """The arrays of each panel as attributes."""

    def parts() -> Iterator[tuple[str, SimpleNamespace]]:
        for kind in KINDS:
            mine = {name.removeprefix(f"{kind}_"): array for name, array in data.items() if name.startswith(f"{kind}_")}
            if mine:
                yield kind, SimpleNamespace(**mine)

    return dict(parts())


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
    values, vectors = map(np.real, np.linalg.eig(matrix))
    return values.max(), vectors[:, values.argmax()]


def number_of(check: Any, label: str, which: np.ndarray, expected: int) -> None:
    """Record a number of starts."""
    check.equal(label, int(which.sum()), expected, 0)


def spread(check: Any, label: str, values: np.ndarray, expected: tuple[float, ...], tol: float, relative: bool = False) -> None:
    """Compare minimum and maximum, or minimum, median and maximum."""
    check.equal(label, np.quantile(values, np.linspace(0, 1, len(expected))), np.array(expected), tol, relative, note="minimum, (median,) maximum")


def settles(check: Any, kind: str, panel: SimpleNamespace, count: tuple[float, ...] = ()) -> None:
    """Every start ends at rest or decays, and the published scheme converges with these numbers of iterations."""
    number_of(check, f"{kind}: starts that settle", panel.status == tl.Status.CONVERGED, len(panel.start))
    if count:
        number_of(check, f"{kind}: runs of the published scheme that converge", panel.scheme_stop == 1, len(panel.start))
        spread(check, f"{kind}: iterations of the published scheme", panel.scheme_count, count, 1)
