"""The draws of the published histograms of ranks, the published procedure on them, and limits of many heads at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import transformer_pde as tp

DIMS = (3, 4, 5)
COUNT = 100                                                                # draws of each dimension
STARTS = 2000                                                              # more than any run of the procedure consumes
LANES = 25                                                                 # runs of the scheme at a time
SLICE = 500                                                                # of steps; it divides every number of steps of the procedure


class Draws(NamedTuple):
    """Random weights and starts of one dimension, with K = -Q: arrays with a leading axis of draws (of starts)."""

    Q: np.ndarray
    V: np.ndarray
    starts: np.ndarray


def draws(dim: int, seed: int | None) -> Draws:
    """The published draws, from the legacy generator of NumPy; `seed` is that of the values, and None means V = I."""
    Q, V, generator = {}, {}, np.random.RandomState(40)
    for d in DIMS:
        Q[d] = np.array([generator.randn(d // 2, d) for _ in range(COUNT)])
    if seed is not None:
        generator = np.random.RandomState(seed)
        for d in DIMS:
            V[d] = _grams(np.array([generator.randn(d, d).T for _ in range(COUNT)]))
    generator = np.random.RandomState(41)
    starts = _grams(np.array([generator.randn(dim, dim) for _ in range(STARTS)]))
    return Draws(Q[dim], V.get(dim, np.broadcast_to(np.eye(dim), (COUNT, dim, dim))), starts)


def _grams(factors: np.ndarray) -> np.ndarray:
    return factors @ np.swapaxes(factors, -1, -2)


def heads(kind: str, Q: np.ndarray, V: np.ndarray) -> tp.Attention:
    """Heads with the published scaling and a leading axis of draws; the scale of L2 goes to its queries, for it would also act on its keys."""
    scale = Q.shape[-1] ** -0.5
    make: Callable = (lambda q, v: tp.Softmax(q, -q, v, scale=scale)) if kind == "softmax" else (lambda q, v: tp.L2(scale * q, -q, v))
    return jax.vmap(make)(jnp.asarray(Q), jnp.asarray(V))


@jax.jit
def limits(heads: tp.Attention, starts: tp.Gaussian) -> tp.Limit:
    """The limit of each head from its own start."""
    return jax.vmap(lambda head, start: tp.limit(tp.GaussianFlow(head), start))(heads, starts)


@jax.jit
def _slice(heads: tp.Attention, states: tp.Gaussian, step: Any, low: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    def run(head: tp.Attention, state: tp.Gaussian) -> tuple[jax.Array, jax.Array, jax.Array]:
        stop = tl.Below("residual", low) | tl.Above("trace", 1e3)
        sol = tl.iterate(head, tp.OfficialEuler(step), state, steps=SLICE, keep="last", stop=stop)
        return sol.value.cov, sol.steps, sol.status

    return jax.vmap(run)(heads, states)


def published(kind: str, given: Draws, count: int, step: float, low: float, steps: int) -> dict[str, np.ndarray]:
    """The published procedure on the first `count` draws: a draw takes the next start of the sequence until a run of the scheme converges.

    So the start of a draw depends on how often the draws before it failed. Runs are begun as if none failed; a failure cancels those of later draws.
    """
    dim, queue, ahead, failures = given.Q.shape[-1], [], (0, 0), 0            # entries: draw, start, covariance, steps, done
    while True:
        for _ in range(LANES - sum(not entry[4] for entry in queue)):
            if ahead[0] < count:
                queue.append([*ahead, given.starts[ahead[1]], 0, False])
                ahead = ahead[0] + 1, ahead[1] + 1
        running = [entry for entry in queue if not entry[4]]
        if not running:
            break
        which = np.resize([entry[0] for entry in running], LANES)
        roots = np.zeros((LANES, dim, dim))                                 # idle lanes hold zero, which is cheap
        values, vectors = np.linalg.eigh(np.array([entry[2] for entry in running]))
        roots[: len(running)] = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
        state = tp.Gaussian.from_factor(jnp.zeros((LANES, dim)), jnp.asarray(roots))
        covs, taken, status = map(np.asarray, _slice(heads(kind, given.Q[which], given.V[which]), state, step, low))
        failed = []
        for lane, entry in enumerate(running):
            entry[2], entry[3] = covs[lane], entry[3] + int(taken[lane])
            exploded = not np.trace(covs[lane]) <= 1e3
            entry[4] = status[lane] == tl.Status.CONVERGED and not exploded
            if not entry[4] and (exploded or entry[3] >= steps):
                failed.append(entry)
        if failed:
            first = min(failed, key=lambda entry: entry[0])
            failures, ahead = failures + 1, (first[0], first[1] + 1)
            queue = [entry for entry in queue if entry[0] < first[0]]
    ends = np.linalg.eigvalsh(np.array([entry[2] for entry in queue]))
    return {"scheme_eigenvalues": ends, "scheme_steps": np.array([entry[3] for entry in queue]), "scheme_failures": np.array(failures)}
