"""What the pictures of the family share: the instance of the eigenvalue figures and the look of each method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS

_shared: Any = load_module(Path(__file__).with_name("_acvi_pictures.py"))
letters, legend = _shared.letters, _shared.legend
PAPER = "Vary, Ablin, Gao and Absil, Optimization without Retraction on the Random Generalized Stiefel Manifold"
LOOKS: dict[str, dict[str, Any]] = {
    "Riem. GD": {"color": COLORS["black"], "linestyle": ":"},
    "PLAM": {"color": COLORS["orange"], "linestyle": "-."},
    "landing R": {"color": COLORS["green"], "linestyle": "--"},
    "landing B": {"color": COLORS["blue"], "linestyle": "-"},
}


def instance(n: int, p: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B and the start of the eigenvalue figures: the published recipe, seed 123."""
    rng = np.random.RandomState(123)

    def matrix(values: np.ndarray) -> np.ndarray:
        q = np.linalg.qr(rng.randn(n, n))[0]
        a = (q * values) @ q.T
        return (a + a.T) / 2

    a = matrix(np.linspace(1, 1 / 100, n))
    b = matrix(np.exp(np.log(1 / n) * (1 - np.linspace(n, 1, n) / n)))
    q = np.linalg.qr(rng.randn(n, p))[0]
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return a, b, np.linalg.solve(np.linalg.cholesky(q.T @ b @ q), q.T).T


def diverged(violation: np.ndarray) -> int:
    """The first step at which |h|^2 / 4 is above 1e8 or not finite; -1 if there is none. `violation` is |h|."""
    lost = np.flatnonzero(~(np.asarray(violation) ** 2 / 4 <= 1e8))
    return int(lost[0]) if lost.size else -1


def ticks(ax: Any, values: Any, texts: Any = None) -> None:
    """Name these values on a logarithmic horizontal axis, and no others."""
    from matplotlib.ticker import NullFormatter, NullLocator

    ax.set_xticks(values, [f"{v:g}" for v in values] if texts is None else texts)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
