"""Fits to many samples at once, shared by the claims and figures about rates: one compiled program for each (k, K)."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.iterate import iterate
from theorylab.core.keys import Key, stream
from theorylab.core.stop import Below
from theorylab.lab.sweep import sweep_grid
from theorylab.moe.claims import _reference as reference
from theorylab.moe.em import EM
from theorylab.moe.model import Mixture, example
from theorylab.moe.newton import LikelihoodNewton, derivatives
from theorylab.moe.problem import Likelihood

PAPER = "Nguyen, Akbarian, Yan and Ho, ICLR 2024"
DENSE_PAPER = "Nguyen, Nguyen and Ho, NeurIPS 2023"
DERIVED = "companion derivation"
NOISE = 0.05
CHUNK = 12
MULTIPLICITIES = {(3, 2): (1, 1, 1), (4, 3): (1, 2, 1), (3, 3): (1, 1, 1)}
"""Copies of the experts of S1 at which fits with (k, K) start."""


def start_of(truth: Mixture, experts: int, active: int) -> Mixture:
    """Copies of the truth that a fit of this size starts near."""
    return reference.copies(truth, MULTIPLICITIES[experts, active], active)


def _fit(params: dict[str, Any], key: Key, i: Any) -> dict[str, Any]:
    """One fit to n rows of S1 from near the truth; traced."""
    truth, start, rows = params["truth"], params["start"], params["rows"]
    x, y = truth.sample(rows, key=stream(key, "data"), low=-1.0, high=1.0)
    likelihood = Likelihood(x, y, start.experts, start.active, truth.selection, (jnp.arange(rows) < params["n"]).astype(y.dtype))
    vector = start.pack()
    steady = start.experts * (1 + start.dim)
    noise = params["noise"] * jax.random.normal(stream(key, "start"), vector.shape, vector.dtype)
    # Variances start at the truth.
    begin = start.unpack(vector + jnp.where(jnp.arange(len(vector)) < 2 * steady - 1 - start.dim, noise, 0))
    run = iterate(likelihood, EM(), begin, steps=params["steps"], stop=Below("gain", params["tolerance"]), keep="last")
    fit, value = run.value, run.history.columns["log_likelihood"][-1]
    if params["finish"]:
        # Over-specified fits: EM is sublinear near its end.
        run = iterate(likelihood, LikelihoodNewton(), fit, steps=params["finish"], stop=Below("score_norm", 1e-9), keep="last")
        fit, value = run.value, run.history.columns["log_likelihood"][-1]
    found = {"point": fit.pack(), "log_likelihood": value}
    if params["information"]:
        found["information"] = derivatives(likelihood, fit).information
    return found


@cache
def fits(experts: int, active: int, sizes: tuple[int, ...], replicates: int, *, rows: int | None = None, steps: int = 300, finish: int = 0,
         noise: float = NOISE, tolerance: float = 1e-11, information: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Fits of (experts, active) to samples of S1: `point` (in the coordinates of `Mixture.pack`), `log_likelihood` and, if asked for, `information`.

    Leading axes are sizes and replicates; with `rows`, all sizes share one program.
    """
    truth = example("S1")
    params = {"truth": truth, "start": start_of(truth, experts, active), "steps": steps, "finish": finish, "noise": float(noise),
              "tolerance": float(tolerance), "information": information}
    tables = [sweep_grid(_fit, {"n": list(group)}, replicates, key=seed, params=params | {"rows": rows or group[0]}, chunk=CHUNK,
                         shapes=("rows", "steps", "finish")) for group in ([sizes] if rows else [(n,) for n in sizes])]
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0].columns}


def mixtures(experts: int, active: int, points: np.ndarray) -> np.ndarray:
    """The fits as NumPy atoms, an array of objects with the leading axes of `points`."""
    found = np.empty(points.shape[:-1], object)
    for at in np.ndindex(found.shape):
        found[at] = atoms(points[at], experts, active)
    return found


def atoms(vector: np.ndarray, experts: int, active: int) -> reference.Atoms:
    """The atoms of one vector of `Mixture.pack`, for one input and slope selection."""
    k = experts
    intercept, slope, a, b, variance = np.split(vector, np.cumsum([k - 1, k - 1, k, k]))
    gate = np.column_stack([np.append(intercept, 0.0), np.append(slope, 0.0)])
    return reference.Atoms(gate, np.column_stack([b, a]), variance, active, "slope")


@cache
def measured(experts: int, active: int, sizes: tuple[int, ...], replicates: int, **options: Any) -> dict[str, np.ndarray]:
    """Distances of such fits to S1: `hellinger` and `variation`, shape (sizes, replicates), and the `point`s."""
    table = fits(experts, active, sizes, replicates, **options)
    truth = reference.read(example("S1"))
    both = [reference.coarse(m, truth, -1.0, 1.0) for m in mixtures(experts, active, table["point"]).ravel()]
    shape = table["point"].shape[:-1]
    return {"hellinger": np.reshape([d.hellinger for d in both], shape), "variation": np.reshape([d.variation for d in both], shape),
            "point": table["point"]}


def losses(fit: reference.Atoms, truth: reference.Atoms, cells: np.ndarray, kind: str = "exact") -> float:
    """The loss for given cells by its definition; `truth.active` largest terms."""
    terms = np.zeros(len(truth.variance))
    weight = np.exp(fit.gate[:, 0])
    for j in range(len(terms)):
        inside = np.flatnonzero(cells == j)
        r = 2 * len(inside)
        powers = (1, 1, 1, 1) if kind == "exact" or len(inside) == 1 else (r, r / 2, r, r / 2) if kind == "over_specified" else (2, 2, r, r / 2)
        for i in inside:
            apart = (np.linalg.norm(fit.gate[i, 1:] - truth.gate[j, 1:]), np.linalg.norm(fit.experts[i, 1:] - truth.experts[j, 1:]),
                     abs(fit.experts[i, 0] - truth.experts[j, 0]), abs(fit.variance[i] - truth.variance[j]))
            terms[j] += weight[i] * sum(d**p for d, p in zip(apart, powers, strict=True))
        terms[j] += abs(weight[inside].sum() - np.exp(truth.gate[j, 0]))
    return float(np.sort(terms)[-truth.active:].sum())
