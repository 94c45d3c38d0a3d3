"""What the figures of the family share: data, draws and inner runs of the published experiments, and the look of each estimator."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import hypergradient as hg
from theorylab.lab import datasets
from theorylab.lab.files import load_module
from theorylab.lab.style import COLORS

_shared: Any = load_module(Path(__file__).with_name("_acvi_pictures.py"))
letters, legend = _shared.letters, _shared.legend
PAPER = "Ye, Peyré, Cremers and Ablin, Enhancing Hypergradients Estimation: A Study of Preconditioning and Reparameterization"
ESTIMATORS = {"Vanilla": hg.Plain(), "ExpPhi": hg.Reparametrized("exponential"), "PzPhi": hg.Reparametrized("linear"),
              "OptPhi": hg.Reparametrized("hessian"), "Precond": hg.Preconditioned(), "Newton": hg.NewtonPoint()}
LOOKS: dict[str, dict[str, Any]] = {
    "Vanilla": {"color": COLORS["purple"], "linestyle": (0, (5, 1, 1, 1, 1, 1))}, "ExpPhi": {"color": COLORS["blue"], "linestyle": ":"},
    "PzPhi": {"color": COLORS["orange"], "linestyle": "--"}, "OptPhi": {"color": COLORS["sky"], "linestyle": (0, (7, 2))},
    "Precond": {"color": COLORS["green"], "linestyle": "-."}, "Newton": {"color": COLORS["vermilion"], "linestyle": "-"},
}
MARKS = {"Vanilla": "s", "ExpPhi": "v", "PzPhi": "^", "OptPhi": "D", "Precond": "o", "Newton": "P"}
DISPLACED, LAST = 10**1.5, 10**-3.5


class Run(NamedTuple):
    """One experiment: the problem, its y and solution, the first draw of x, and the iterates of gradient descent from the displaced start."""

    problem: Any
    y: np.ndarray
    solution: np.ndarray
    first: np.ndarray
    path: np.ndarray


def _load(name: str, features: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Features without the rows that the official loader drops (those with a zero), targets, and the name of the substitute or nothing.

    Of a substitute the first features, as many as there would be.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", datasets.SubstituteDataWarning)                          # the pictures say it
        found = datasets.load(name)
    kept = (found.x != 0).all(1) if found.substitute is None else np.ones(len(found.x), bool)
    return found.x[kept, :features], found.y[kept], found.substitute or ""


@cache
def data(kind: str) -> tuple[tuple, tuple | None, str]:
    """Training pair, outer pair (none for ridge, whose outer data are drawn), and the substitute."""
    if kind == "ridge":
        x, y, substitute = _load("mpg", 7)
        return (x, y.astype(float)), None, substitute
    (x, y, substitute), (x_out, y_out, _) = _load("liver", 5), _load("liver-test", 5)
    return (x, 2.0 * y - 1), (x_out, 2.0 * y_out - 1), substitute


def source(kind: str) -> str:
    """What the title of a panel says about the data."""
    name = {"ridge": "mpg", "logistic": "liver"}[kind]
    substitute = data(kind)[2]
    return f"{substitute} in place of {name}" if substitute else name


def ridge(objective: str, seed: int, low: float) -> tuple[hg.RidgeSelection, np.ndarray, np.ndarray]:
    """The problem of a seed, its first x and its y, with y from `low` to `low` + 3: draws of the legacy generator in the official order."""
    (A, b), rng = data("ridge")[0], np.random.RandomState(seed)
    p = A.shape[1]
    A_out, b_out = rng.randn(p, p), rng.randn(p)
    problem = hg.RidgeSelection((jnp.asarray(A), jnp.asarray(b)), (jnp.asarray(A_out), jnp.asarray(b_out)), objective)
    return problem, rng.randn(p), low + 3 * rng.rand(p)


def logistic(seed: int, low: float) -> tuple[hg.LogisticSelection, np.ndarray, np.ndarray]:
    """The same for logistic regression; y from -1 to 1 for `low` = -1, from `low` to `low` + 3 otherwise."""
    train, valid, _ = data("logistic")
    rng = np.random.RandomState(seed)
    problem = hg.LogisticSelection(tuple(map(jnp.asarray, train)), tuple(map(jnp.asarray, valid or ())))
    p = problem.n
    return problem, rng.randn(p), low + (2 if low == -1 else 3) * rng.rand(p)


@cache
def run(kind: str, objective: str, low: float, seed: int, steps: int) -> Run:
    """The experiment of a seed."""
    problem, first, y = ridge(objective, seed, low) if kind == "ridge" else logistic(seed, low)
    first, at = 2 * first, jnp.asarray(y)
    if kind == "ridge" and objective == "linear":                                                # the inner run does not see G
        return run(kind, "quadratic", low, seed, steps)._replace(problem=problem)
    solution = np.asarray(hg.reference(problem, at))
    step_size = None
    if kind == "ridge":
        A = np.asarray(problem.A)
        step_size = 1.8 / np.linalg.eigvalsh(A.T @ A / len(A) + np.diag(np.exp(y)) / problem.n)[-1]
    start = first + DISPLACED * (first - solution)
    path = tl.iterate(problem.inner(at), hg.GradientDescent(step_size), jnp.asarray(start), steps=steps, record=tl.whole).history["x"]
    return Run(problem, y, solution, first, np.asarray(path))


def crossing(distance: np.ndarray, error: np.ndarray, at: float) -> float:
    """The error where the distance first falls to `at`, by interpolation of logarithms between two iterates; NaN where it never does."""
    k = int(np.argmax(distance <= at))
    if not distance[k] <= at or k == 0:
        return float("nan")
    (d0, d1), (e0, e1) = np.log(distance[k - 1 : k + 1]), np.log(np.maximum(error[k - 1 : k + 1], 1e-300))
    return float(np.exp(e0 + (e1 - e0) * (np.log(at) - d0) / (d1 - d0)))


def geometric(values: Any) -> float:
    """Geometric mean of the values that are numbers; NaN if there is none."""
    logs = np.log(np.asarray(values, float))
    logs = logs[np.isfinite(logs)]
    return float(np.exp(logs.mean())) if logs.size else float("nan")
