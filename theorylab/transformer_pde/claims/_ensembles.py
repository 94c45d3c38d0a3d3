"""Random heads and the programs that follow them, shared by the claims.

Every head has three rows and acts on three dimensions (smaller ones are filled up with zeros), and a lane of a batch holds the sum of one head of
each kind, all but one of them zero. So the whole family compiles a few programs of one shape, and a claim costs its arithmetic and not a compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.integrate import integrate
from theorylab.core.keys import stream
from theorylab.core.solution import Status, count_statuses
from theorylab.errors import NotConvergedError
from theorylab.transformer_pde.attention import L2, Linear, Softmax
from theorylab.transformer_pde.combined import MultiHead
from theorylab.transformer_pde.contract import Velocity
from theorylab.transformer_pde.desingularized import Desingularized, last
from theorylab.transformer_pde.entropic import Sinkhorn
from theorylab.transformer_pde.flow import GaussianFlow
from theorylab.transformer_pde.gaussian import Gaussian

Array = jax.Array
PAPER = "A Unified Perspective on the Dynamics of Deep Transformers"
DIM, LANES, SAVES = 3, 40, 8
SINGLE = ("softmax", "l2", "linear", "sinkhorn")
KINDS = (*SINGLE, "multi-head")
"""The variants that keep Gaussians Gaussian; a multi-head is the sum of one head of each single kind, "blind heads" that of those in `BLIND`."""
BLIND = ("softmax", "l2", "sinkhorn")
"""The single heads whose covariance does not feel the mean."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """A batch of heads and of starts: arrays with one leading axis. The temperature is that of Sinkhorn."""

    Q: np.ndarray
    K: np.ndarray
    V: np.ndarray
    mean: np.ndarray
    factor: np.ndarray
    temperature: np.ndarray

    @classmethod
    def of(cls, Q: Any, K: Any, V: Any, factor: Any, mean: Any = 0.0, temperature: Any = 1.0) -> Heads:
        """Heads from matrices of any smaller size, with or without the leading axis; a number stands for a multiple of the identity."""
        arrays = [np.asarray(a, float) for a in (Q, K, V, factor)]
        count = max([len(a) for a in arrays if a.ndim == 3], default=1)
        Q, K, V, factor = (_filled(a, count) for a in arrays)
        center = np.zeros((count, DIM))
        center[:, :np.shape(mean)[-1] if np.ndim(mean) else DIM] = mean
        return cls(Q, K, V, center, factor, np.broadcast_to(np.asarray(temperature, float), (count,)))

    def but(self, **changes: Any) -> Heads:
        """A copy with other arrays, given for all heads or for one that all share."""
        return dataclasses.replace(self, **{name: np.broadcast_to(value, getattr(self, name).shape) for name, value in changes.items()})

    def take(self, index: Any) -> Heads:
        """The heads of these indices."""
        return Heads(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    @property
    def count(self) -> int:
        return len(self.Q)

    @property
    def A(self) -> np.ndarray:
        return turned(self.K) @ self.Q

    @property
    def P(self) -> np.ndarray:
        return turned(self.K) @ self.K

    @property
    def cov(self) -> np.ndarray:
        return self.factor @ turned(self.factor)


def _filled(a: np.ndarray, count: int) -> np.ndarray:
    a = a * np.eye(DIM) if a.ndim == 0 else a
    out = np.zeros((count, DIM, DIM))
    out[:, :a.shape[-2], :a.shape[-1]] = a
    return out


def heads(count: int, seed: int, rank: int = DIM, size: float = 0.7) -> Heads:
    """Independent normal heads and starts; `size` scales the starts."""
    draw = lambda name, *shape: np.asarray(jax.random.normal(stream(seed, name), (count, *shape))) / np.sqrt(DIM)  # noqa: E731
    return Heads.of(draw("Q", rank, DIM), draw("K", rank, DIM), draw("V", DIM, DIM), size * (np.eye(DIM) + 0.5 * draw("factor", DIM, DIM)),
                    draw("mean", DIM))


def definite(matrices: np.ndarray, floor: float = 0.2) -> np.ndarray:
    """Positive definite matrices from general ones."""
    return matrices @ turned(matrices) + floor * np.eye(matrices.shape[-1])


# ------------------------------------------------------------------------------------------------ linear algebra of batches


def turned(a: np.ndarray) -> np.ndarray:
    """The transposes."""
    return np.swapaxes(a, -1, -2)


def spectral(a: np.ndarray) -> np.ndarray:
    """The spectral norms."""
    return np.linalg.norm(a, 2, axis=(-2, -1))


def form(matrix: np.ndarray, x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """The numbers x' M y; y is x unless given."""
    return np.einsum("...i,...ij,...j->...", x, matrix, x if y is None else y)


def trace(a: np.ndarray) -> np.ndarray:
    """The traces."""
    return np.trace(a, axis1=-2, axis2=-1)


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Frobenius distance relative to the size of b, per matrix."""
    return np.linalg.norm(a - b, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))


# ------------------------------------------------------------------------------------------------ programs


class States(NamedTuple):
    """Gaussians with leading axes of heads and times."""

    mean: np.ndarray
    factor: np.ndarray

    @property
    def cov(self) -> np.ndarray:
        return self.factor @ turned(self.factor)


Run = tuple[str, Heads, Any]
"""A kind, a batch, and the times at which it is asked for: shape (times,) or (heads, times)."""


def _lane(Q: Array, K: Array, V: Array, temperature: Array) -> MultiHead:
    return MultiHead([Softmax(Q[0], K[0], V[0]), L2(Q[1], K[1], V[1]), Linear(Q[2], K[2], V[2]), Sinkhorn(Q[3], K[3], V[3], 1.0, temperature)])


@jax.jit
def _follow(Q: Array, K: Array, V: Array, mean: Array, factor: Array, temperature: Array, times: Array) -> tuple[Array, Array, Array]:
    def one(Q: Array, K: Array, V: Array, mean: Array, factor: Array, temperature: Array, times: Array) -> tuple[Array, Array, Array]:
        flow, start = GaussianFlow(_lane(Q, K, V, temperature)), Gaussian.from_factor(mean, factor)
        sol = integrate(flow, start, times, rtol=1e-11, atol=1e-14, throw=False)
        return sol.value.mean, sol.value.factor, sol.status

    return jax.vmap(one)(Q, K, V, mean, factor, temperature, times)


@jax.jit
def _velocity(Q: Array, K: Array, V: Array, mean: Array, factor: Array, temperature: Array) -> Velocity:
    one = lambda Q, K, V, mean, factor, temperature: _lane(Q, K, V, temperature).velocity(mean, factor @ factor.T)  # noqa: E731
    return jax.vmap(one)(Q, K, V, mean, factor, temperature)


@jax.jit
def _explode(Q: Array, K: Array, V: Array, factor: Array, settle: Array) -> tuple[Array, Array, Array, Array]:
    def one(Q: Array, K: Array, V: Array, factor: Array, settle: Array) -> tuple[Array, Array, Array, Array]:
        flow = Desingularized(Softmax(Q, K, V), settle)
        start = Gaussian.from_factor(jnp.zeros(DIM), factor)
        sol = integrate(flow, start, jnp.array([0.0, 400.0]), rtol=1e-10, atol=1e-12, max_steps=2000, throw=False)
        end = last(sol.value)
        signs = flow.signs(end)
        blows = (sol.status == Status.BLOWUP) | signs.certain
        time = jnp.where(blows, signs.blow_up_time, jnp.where(sol.status == Status.CONVERGED, jnp.inf, jnp.nan))
        return time, end.cov, sol.status, signs.unsettled

    return jax.vmap(one)(Q, K, V, factor, settle)


def _in_lanes(program: Callable[..., Any], *arrays: np.ndarray) -> list[np.ndarray]:
    """A program of `LANES` lanes over any number of them; lanes left over repeat the first."""
    count, out = len(arrays[0]), []
    for start in range(0, count, LANES):
        index = np.arange(start, start + LANES) % count
        out.append([np.asarray(part) for part in program(*(jnp.asarray(a[index]) for a in arrays))])
    return [np.concatenate(parts)[:count] for parts in zip(*out, strict=True)]


def parts(kind: str, batch: Heads) -> dict[str, Heads]:
    """The single heads of a variant by kind: head h of several has the weights of the batch moved on by h."""
    if kind in SINGLE:
        return {kind: batch}
    moved = {name: np.roll(np.arange(batch.count), -h) for h, name in enumerate(SINGLE if kind == "multi-head" else BLIND)}
    return {name: batch.but(Q=batch.Q[i], K=batch.K[i], V=batch.V[i]) for name, i in moved.items()}


def _packed(kind: str, batch: Heads) -> tuple[np.ndarray, ...]:
    """Queries, keys and values of the lanes, with an axis of kinds."""
    single = parts(kind, batch)
    empty = np.zeros_like(batch.Q)
    return tuple(np.stack([getattr(single[name], which) if name in single else empty for name in SINGLE], 1) for which in "QKV")


def follow(*runs: Run) -> list[States]:
    """The states of each run at its times, at most `SAVES` of them after the start.

    Raises:
        NotConvergedError: a run did not reach its last time.
    """
    lanes, counts = [], []
    for kind, batch, times in runs:
        grid = np.broadcast_to(np.asarray(times, float), (batch.count, np.shape(times)[-1]))
        early = grid[:, :1] * np.arange(SAVES + 1 - grid.shape[1]) / (SAVES + 1 - grid.shape[1])         # the start, and times nobody asked for
        lanes.append((*_packed(kind, batch), batch.mean, batch.factor, batch.temperature, np.concatenate([early, grid], axis=1)))
        counts.append((batch.count, grid.shape[1], kind))
    mean, factor, status = _in_lanes(_follow, *(np.concatenate(part) for part in zip(*lanes, strict=True)))
    if (status != Status.COMPLETED).any():
        bad = {kind for (n, _, kind), end in zip(counts, np.cumsum([n for n, *_ in counts]), strict=True)
               if (status[end - n:end] != Status.COMPLETED).any()}
        raise NotConvergedError(f"{', '.join(sorted(bad))}: {count_statuses(status)} where every run must be COMPLETED")
    found, start = [], 0
    for n, saves, _ in counts:
        found.append(States(mean[start:start + n, -saves:], factor[start:start + n, -saves:]))
        start += n
    return found


def velocities(*runs: tuple[str, Heads]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The vectors m and matrices B of each run at its starts."""
    lanes = [(*_packed(kind, batch), batch.mean, batch.factor, batch.temperature) for kind, batch in runs]
    mean, matrix = _in_lanes(_velocity, *(np.concatenate(part) for part in zip(*lanes, strict=True)))
    ends = np.cumsum([batch.count for _, batch in runs])[:-1]
    return list(zip(np.split(mean, ends), np.split(matrix, ends), strict=True))


class Explosions(NamedTuple):
    """Blow-up times of softmax heads (infinite where there is none, NaN where undecided), the normalized covariance at the end, and its accuracy."""

    time: np.ndarray
    profile: np.ndarray
    status: np.ndarray
    unsettled: np.ndarray


def explode(batch: Heads, settle: float = np.inf) -> Explosions:
    """Which softmax heads blow up, in the desingularized clock, and when; with `settle`, followed until the direction moves less than that."""
    return Explosions(*_in_lanes(_explode, batch.Q, batch.K, batch.V, batch.factor, np.full(batch.count, settle)))


# ------------------------------------------------------------------------------------------------ bounds and formulas, independent of the package


def rate(kind: str, batch: Heads) -> np.ndarray:
    r"""A number c such that $\|B\| \le c\|M\|$ with the second moment M."""
    if kind not in SINGLE:
        return np.asarray(sum(rate(name, single) for name, single in parts(kind, batch).items()))
    return {"l2": 2.0, "sinkhorn": batch.temperature**-2}.get(kind, 1.0) * spectral(batch.V) * spectral(batch.A)


def safe_time(kind: str, batch: Heads) -> np.ndarray:
    """Half the time before which no head can blow up, whatever its kind."""
    return 0.5 / (2 * rate(kind, batch) * spectral(batch.cov + batch.mean[:, :, None] * batch.mean[:, None]))


def formula(kind: str, batch: Heads) -> tuple[np.ndarray, np.ndarray]:
    """The vector m and the matrix B of the statement, written out with inverses and singular values."""
    if kind not in SINGLE:
        both = [formula(name, single) for name, single in parts(kind, batch).items()]
        return np.asarray(sum(m for m, _ in both)), np.asarray(sum(B for _, B in both))
    A, V, cov, mean = batch.A, batch.V, batch.cov, batch.mean[..., None]
    if kind == "softmax":
        m, B = V @ (mean + cov @ A @ mean), V @ cov @ A
    elif kind == "l2":
        inverse = V @ np.linalg.inv(np.eye(DIM) + 2 * cov @ batch.P)
        m, B = inverse @ (mean + 2 * cov @ A @ mean), 2 * inverse @ cov @ A
    elif kind == "linear":
        B = V @ (cov + mean @ turned(mean)) @ A
        m = B @ mean
    else:
        eps, L = batch.temperature[:, None, None], batch.factor
        left, s, right = np.linalg.svd(turned(L) @ turned(A) @ L / eps)
        plan = L @ (left * (2 * s / (1 + np.sqrt(1 + 4 * s * s)))[:, None, :]) @ right @ turned(L)
        m, B = V @ mean / eps, V @ turned(plan) @ np.linalg.inv(cov) / eps
    return m[..., 0], B


