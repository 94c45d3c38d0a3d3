"""Tokens in plain NumPy and SciPy: what the integrals of the statements say, independent of the package. All arrays may have leading axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from theorylab.transformer_pde.claims._ensembles import Heads, turned

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
FAINT_WEIGHT = 1e-22


def head(batch: Heads, i: Any = slice(None), dim: int = 2) -> Arrays:
    """Queries, keys and values of the first dimensions of heads."""
    return batch.Q[i][..., :dim], batch.K[i][..., :dim], batch.V[i][..., :dim, :dim]


def gauss_hermite(order: int, dim: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the standard Gaussian, without the faintest."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    grid = np.stack(np.meshgrid(*[nodes] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
    mass = np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * dim, indexing="ij"), axis=-1), axis=-1).ravel()
    kept = mass > FAINT_WEIGHT
    return grid[kept], mass[kept] / mass[kept].sum()


def averages(kind: str, logits: np.ndarray, points: np.ndarray, log_weights: np.ndarray, bias: float = 0.0) -> np.ndarray:
    """The averages of points that a kind takes; the logits are those of the kernel, with 2 for L2 and 1/eps for Sinkhorn already in them."""
    if kind == "linear":
        kernel = logits * np.exp(log_weights)
    elif kind == "sigmoid":
        kernel = np.exp(log_weights) / (1 + np.exp(-logits - bias))
    else:
        exponent = logits + log_weights
        if kind == "masked":
            exponent = np.where(np.tri(logits.shape[-1], dtype=bool), exponent, -np.inf)
        kernel = np.exp(exponent - exponent.max(-1, keepdims=True))
        kernel = kernel / kernel.sum(-1, keepdims=True)
    return kernel @ points


def velocity(kind: str, weights_of_head: Arrays, points: np.ndarray, weights: np.ndarray | None = None, queries: np.ndarray | None = None,
             temperature: float = 1.0, bias: float = 0.0) -> np.ndarray:
    """The velocity at each query, by default at each token."""
    Q, K, V = weights_of_head
    asked = points if queries is None else queries
    log_weights = np.full(points.shape[:-1], -np.log(points.shape[-2])) if weights is None else np.log(weights)
    log_weights = log_weights[..., None, :]
    logits, keys = asked @ turned(Q) @ K @ turned(points), points @ turned(K)
    if kind == "l2":
        logits = 2 * logits - (keys * keys).sum(-1)[..., None, :]
    if kind == "sinkhorn":
        square = points @ turned(Q) @ K @ turned(points) / temperature
        return averages(kind, logits / temperature, points, log_weights + sinkhorn_potential(square, log_weights)) @ turned(V) / temperature
    return averages(kind, logits, points, log_weights, bias) @ turned(V)


def sinkhorn_potential(logits: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """The potential of the keys of the bistochastic scaling, by alternating updates; for logits of moderate size."""
    kernel, weights = np.exp(logits - logits.max((-2, -1), keepdims=True)), np.exp(log_weights)
    v = np.ones_like(weights)
    for _ in range(20000):
        u = 1 / (kernel @ turned(v * weights))
        new = 1 / (turned(u * turned(weights)) @ kernel)
        change, v = np.abs(new / v - 1).max(), new
        if change < 1e-13:
            return np.log(v)
    return np.full_like(v, np.nan)                                            # what did not converge must not pass


def transport(field: Any, points: np.ndarray, times: Any, tolerance: float = 1e-11) -> np.ndarray:
    """Tokens that move with `field(points)`, at these times: shape (times, *points.shape)."""
    from scipy.integrate import solve_ivp

    run = solve_ivp(lambda t, y: field(y.reshape(points.shape)).ravel(), (0.0, float(np.max(times))), points.ravel(), method="DOP853",
                    t_eval=np.asarray(times, float), rtol=tolerance, atol=tolerance * 1e-2)
    return np.moveaxis(run.y, -1, 0).reshape(len(np.asarray(times)), *points.shape)
