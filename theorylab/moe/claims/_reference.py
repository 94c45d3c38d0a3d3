"""Plain NumPy versions of the model, its distances and its derivatives, independent of the family's compiled ones: what claims compare with."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from theorylab.moe.model import Mixture

AROUND = (0.0, 1.2, 2.5, 4.0, 6.0, 9.0)
BESIDE = (0.0, 2.0, 6.0, 15.0, 40.0)
ROWS = 64


class Atoms(NamedTuple):
    """The parameters of a mixture as NumPy arrays: gate (beta0 | beta1), experts (b | a), variances."""

    gate: np.ndarray
    experts: np.ndarray
    variance: np.ndarray
    active: int
    selection: str


def read(m: Any) -> Atoms:
    """The arrays of a `Mixture`."""
    return m if isinstance(m, Atoms) else Atoms(np.asarray(m.gate_matrix), np.asarray(m.expert_matrix), np.asarray(m.variance), m.active, m.selection)


def design(x: np.ndarray) -> np.ndarray:
    """Rows (1, x)."""
    x = np.reshape(x, (len(x), -1))
    return np.column_stack([np.ones(len(x)), x])


def logits(m: Any, x: np.ndarray) -> np.ndarray:
    """The logits, shape (n, k)."""
    return design(x) @ read(m).gate.T


def kept(m: Any, x: np.ndarray) -> np.ndarray:
    """Indices of the kept experts, best first, shape (n, K): a stable sort of the scores."""
    m = read(m)
    scores = design(x)[:, 1:] @ m.gate[:, 1:].T if m.selection == "slope" else logits(m, x)
    return np.argsort(-scores, axis=1, kind="stable")[:, : m.active]


def routing(m: Any, x: np.ndarray) -> np.ndarray:
    """Which experts are kept, boolean of shape (n, k)."""
    mask = np.zeros((len(x), len(read(m).variance)), bool)
    np.put_along_axis(mask, kept(m, x), True, axis=1)
    return mask


class Parts(NamedTuple):
    """The kept components at each x: weight, mean and standard deviation, shape (n, K)."""

    weight: np.ndarray
    mean: np.ndarray
    sd: np.ndarray


def parts(m: Any, x: np.ndarray) -> Parts:
    """The components at each x."""
    m, on = read(m), kept(m, x)
    u = np.take_along_axis(logits(m, x), on, axis=1)
    weight = np.exp(u - u.max(axis=1, keepdims=True))
    mean = np.take_along_axis(design(x) @ m.experts.T, on, axis=1)
    return Parts(weight / weight.sum(axis=1, keepdims=True), mean, np.sqrt(m.variance)[on])


def densities(c: Parts, y: np.ndarray) -> np.ndarray:
    """g(y | x), shape (n, m) for y of that shape."""
    total = np.zeros_like(y)
    for j in range(c.weight.shape[1]):
        z = (y - c.mean[:, j, None]) / c.sd[:, j, None]
        total += (c.weight[:, j] / c.sd[:, j] / np.sqrt(2 * np.pi))[:, None] * np.exp(-z * z / 2)
    return total


def gauss(edges: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on the pieces between neighbouring edges of the last axis."""
    t, w = np.polynomial.legendre.leggauss(nodes)
    half, middle = np.diff(edges) / 2, (edges[..., 1:] + edges[..., :-1]) / 2
    flat = (*edges.shape[:-1], -1)
    return (middle[..., None] + half[..., None] * t).reshape(flat), (half[..., None] * w).reshape(flat)


def crossings(m: Any, beside: tuple[float, ...] = (0.0,)) -> np.ndarray:
    """Points of the line where two logits cross (and some units of the logit beside), and 0, where slopes tie."""
    m = read(m)
    i, j = np.triu_indices(len(m.gate), 1)
    rise, steep = m.gate[j, 0] - m.gate[i, 0], m.gate[i, 1] - m.gate[j, 1]
    real = np.abs(steep) > 1e-12
    return np.append(0.0, [(rise[real] + c) / steep[real] for c in (*beside, *(-c for c in beside))])


class Distances(NamedTuple):
    """Averages over uniform x: Hellinger H (root of the mean square), mean of h, Kullback-Leibler, total variation."""

    hellinger: float
    mean_hellinger: float
    divergence: float
    variation: float


def nodes_of(p: Any, q: Any, low: float, high: float, panels: int, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in x and weights that add to 1, with breakpoints where the gates of p or q change."""
    found = np.concatenate([crossings(m, BESIDE) for m in (p, q)] + [np.linspace(low, high, panels + 1)])
    edges = np.unique(np.clip(found, low, high))
    x, weight = gauss(edges[np.append(True, np.diff(edges) > 1e-13)], nodes)
    return x, weight / (high - low)


def distances(p: Any, q: Any, low: float, high: float, panels: int = 16, nodes: int = 16) -> Distances:
    """Distances of two mixtures of one input by Gauss-Legendre quadrature; the total variation has kinks and is good to about 1e-5 of itself."""
    x, weight = nodes_of(p, q, low, high, panels, nodes)
    around = np.array(sorted({*AROUND, *(-c for c in AROUND)}))
    sums = np.zeros(4)
    for at in range(0, len(x), ROWS):
        rows, w = x[at:at + ROWS, None], weight[at:at + ROWS]
        one, two = parts(p, rows), parts(q, rows)
        mean, sd = np.concatenate([one.mean, two.mean], 1), np.concatenate([one.sd, two.sd], 1)
        y, dy = gauss(np.sort((mean[:, :, None] + sd[:, :, None] * around).reshape(len(rows), -1), axis=1), nodes)
        f, g = densities(one, y), densities(two, y)
        tiny = np.finfo(float).tiny
        h2 = np.sum(dy * (np.sqrt(f) - np.sqrt(g)) ** 2, axis=1) / 2
        ratio = np.log(np.maximum(f, tiny)) - np.log(np.maximum(g, tiny))
        sums += [w @ h2, w @ np.sqrt(h2), w @ np.sum(dy * f * ratio, axis=1), w @ np.sum(dy * np.abs(f - g), axis=1) / 2]
    return Distances(float(np.sqrt(sums[0])), *map(float, sums[1:]))


def coarse(p: Any, q: Any, low: float, high: float) -> Distances:
    """The same to about 1e-4 of itself, at a tenth of the time: for averages over replicates."""
    return distances(p, q, low, high, panels=4, nodes=6)


def copies(truth: Mixture, numbers: tuple[int, ...], active: int, share: bool = True) -> Mixture:
    """`truth` with `numbers[j]` copies of expert j, which share its weight unless told otherwise."""
    place = np.repeat(np.arange(truth.experts), numbers)
    drop = np.log(np.asarray(numbers, float))[place] if share else 0.0
    gate = np.asarray(truth.gate_matrix)[place]
    gate[:, 0] -= drop
    return Mixture.from_matrices(gate, np.asarray(truth.expert_matrix)[place], np.asarray(truth.variance)[place], active, truth.selection)


def log_likelihood(m: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Sum of log densities of the rows."""
    return float(np.sum(np.log(densities(parts(m, x), np.asarray(y)[:, None]))))


def dense_score(m: Atoms, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For a dense gate: g(y | x), and its log derivatives in gate (k, p), experts (k, p) and log variance (k,), axes (rows, k, ...)."""
    z = design(x)
    u, mean = z @ m.gate.T, z @ m.experts.T
    pi = np.exp(u - u.max(axis=1, keepdims=True))
    pi /= pi.sum(axis=1, keepdims=True)
    e = y[:, None] - mean
    each = pi * np.exp(-e * e / m.variance / 2) / np.sqrt(2 * np.pi * m.variance)
    g = each.sum(axis=1)
    r = each / np.maximum(g, np.finfo(float).tiny)[:, None]
    return g, (r - pi)[..., None] * z[:, None], (r * e / m.variance)[..., None] * z[:, None], r * (e * e / m.variance - 1) / 2
