"""Random instances, formulas as they are printed, and the compiled programs that the claims share.

Everything has a leading axis of trials, so that one program serves all trials of a shape. References are plain NumPy, with the n by n matrices that
the package never forms.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from theorylab.core.keys import stream
from theorylab.stiefel import fields

Array = jax.Array
PAPER = "Vary, Ablin, Gao and Absil, ICML 2024"
DERIVED = "companion derivation"
BOTH = f"{PAPER}; constants as in the {DERIVED}"
TANGENT = ("relative", "relative_solved")
Shape = tuple[int, int]
FEW: tuple[Shape, ...] = ((3, 1), (6, 3), (9, 9))
MANY: tuple[Shape, ...] = ((3, 1), (3, 3), (4, 2), (6, 1), (6, 3), (7, 5), (9, 9), (10, 4), (12, 1), (12, 6), (12, 11))


def normal(seed: int, name: str, *shape: int) -> np.ndarray:
    """Standard normal numbers."""
    size = int(np.prod(shape))
    return np.asarray(jax.random.normal(stream(seed, name), (_length(size),)))[:size].reshape(shape)


def uniform(seed: int, name: str, count: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Numbers between `low` and `high`."""
    return low + (high - low) * np.asarray(jax.random.uniform(stream(seed, name), (_length(count),)))[:count]


def _length(count: int) -> int:
    """A power of two: few lengths are few programs."""
    return max(4096, 1 << (count - 1).bit_length())


def t(a: np.ndarray) -> np.ndarray:
    """The transposed matrices."""
    return np.swapaxes(a, -1, -2)


def sym(a: np.ndarray) -> np.ndarray:
    """The symmetric parts."""
    return (a + t(a)) / 2


def skew(a: np.ndarray) -> np.ndarray:
    """The skew parts."""
    return (a - t(a)) / 2


def norm(a: np.ndarray) -> np.ndarray:
    """The Frobenius norms."""
    return np.linalg.norm(a, axis=(-2, -1))


def inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The Frobenius inner products."""
    return np.sum(a * b, axis=(-2, -1))


def power(b: np.ndarray, exponent: float) -> np.ndarray:
    """A power of positive definite matrices."""
    values, vectors = np.linalg.eigh(b)
    return (vectors * values[..., None, :] ** exponent) @ t(vectors)


def basis(seed: int, name: str, trials: int, n: int) -> np.ndarray:
    """Random orthogonal matrices."""
    return np.linalg.qr(normal(seed, name, trials, n, n))[0]


def spectral(vectors: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Symmetric matrices from eigenvectors and eigenvalues."""
    return sym((vectors * values[..., None, :]) @ t(vectors))


class Instances(NamedTuple):
    """Matrices B, points X, gradients G, and the products of a method, with a leading axis of trials."""

    b: np.ndarray
    x: np.ndarray
    g: np.ndarray
    bx: np.ndarray
    solved: np.ndarray

    @property
    def h(self) -> np.ndarray:
        """The residuals X'BX - I."""
        return sym(t(self.x) @ self.bx) - np.eye(self.x.shape[-1])

    @property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest eigenvalue of B."""
        values = np.linalg.eigvalsh(self.b)
        return values[..., 0], values[..., -1]


def at(b: np.ndarray, x: np.ndarray, g: np.ndarray) -> Instances:
    """Instances with their products."""
    return Instances(b, x, g, b @ x, np.linalg.solve(b, g))


def feasible(b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Points with X'BX = I and the span of X."""
    for _ in range(2):                                                                  # the second removes the round-off of the first
        x = x @ power(sym(t(x) @ b @ x), -0.5)
    return x


def instances(seed: int, shape: Shape, trials: int, *, spread: float = 1e3, distance: float | np.ndarray = 0.9) -> Instances:
    """Random instances: condition of B up to `spread`, distance |h| up to `distance` (or equal to it where it is an array)."""
    n, p = shape
    name = f"{n} {p}"
    decades = uniform(seed, f"{name} condition", trials) * np.log10(spread)
    place = np.sort(uniform(seed, f"{name} spectrum", trials * n).reshape(trials, n))
    place[:, 0], place[:, -1] = 0.0, 1.0
    scale = 10 ** uniform(seed, f"{name} scale", trials, -1, 1)
    b = spectral(basis(seed, f"{name} B", trials, n), scale[:, None] * 10 ** (-decades[:, None] * place))
    h = sym(normal(seed, f"{name} h", trials, p, p))
    d = distance if isinstance(distance, np.ndarray) else distance * uniform(seed, f"{name} distance", trials)
    h = h * (d / norm(h))[:, None, None]
    x = feasible(b, normal(seed, f"{name} X", trials, n, p)) @ power(np.eye(p) + h, 0.5)
    return at(b, x, normal(seed, f"{name} G", trials, n, p))


@jax.jit
def fields_of(one: Instances) -> dict[str, Array]:
    """All tangent and normal terms of the package."""
    _, x, g, bx, solved = one
    return {"relative": fields.relative(g, x, bx), "relative_solved": fields.relative_solved(g, x, bx, solved),
            "riemannian": fields.riemannian(g, x, solved), "plam": fields.plam(g, x, bx),
            "gradient": fields.normal_gradient(x, bx), "newton_schulz": fields.normal_newton_schulz(x, bx)}


def all_fields(one: Instances) -> dict[str, np.ndarray]:
    """The same as NumPy arrays."""
    return {name: np.asarray(value) for name, value in fields_of(one).items()}


def eigenproblem(seed: int, b: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrices A with given generalized eigenvalues with respect to B, and the B-orthonormal eigenvectors."""
    root, q = power(b, 0.5), basis(seed, "generalized eigenvectors", *b.shape[:2])
    return sym(root @ spectral(q, np.broadcast_to(values, b.shape[:2])) @ root), power(b, -0.5) @ q


def field_at(a: Any, b: Any, x: Any, attraction: Any, tangent: str, normal: str) -> Array:
    """The landing field of -tr(X'AX)/2."""
    g = -(a @ x)
    solved = jnp.linalg.solve(b, g) if tangent in fields.SOLVED else None
    return fields.landing_field(g, x, b @ x, attraction, tangent=tangent, normal=normal, solved=solved)


@partial(jax.jit, static_argnames=("steps", "tangent", "normal"))
def follow(a: Any, b: Any, x: Any, step_size: Any, attraction: Any, steps: int, tangent: str, normal: str) -> Array:
    """The iterates 0, 1, ..., K of the landing method for -tr(X'AX)/2 with a fixed step, shape (K + 1, trials, n, p)."""

    def step(x: Array, _: None) -> tuple[Array, Array]:
        after = x - step_size * field_at(a, b, x, attraction, tangent, normal)
        return after, after

    return jnp.concatenate([x[None], lax.scan(step, x, None, length=steps)[1]])


def residuals(b: np.ndarray, path: np.ndarray) -> np.ndarray:
    """X'BX - I along a path."""
    return sym(t(path) @ b @ path) - np.eye(path.shape[-1])
