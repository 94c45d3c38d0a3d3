"""Canonical correlations of the halves of the digits and independent components of a mixture: landing beside scikit-learn, cca-zoo and picard; peers
that are not installed are left out.

steps: what the streaming recipe captures over first steps and seeds, 40 passes. digits: batches and seconds to a gap of one per cent. components:
100,000 rows of a mixture of 10 Laplace sources.

    python benchmarks/stiefel_data.py [--quick] [--only steps digits components] [--json | --markdown]
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import stiefel
from theorylab.errors import RunWarning
from theorylab.lab.files import load_module

shared: ModuleType = load_module(Path(__file__).with_name("stiefel.py"))
Rows = list[dict[str, Any]]
PER_PASS = 14                                       # batches of 128 in one pass over the digits


def halves() -> tuple[np.ndarray, np.ndarray]:
    """The halves of the digits, values from -1 to 1."""
    from sklearn.datasets import load_digits

    images = (load_digits(return_X_y=True)[0].reshape(-1, 8, 8) / 16.0 - 0.5) / 0.5
    return images[:, :, :4].reshape(-1, 32), images[:, :, 4:].reshape(-1, 32)


def correlations() -> Any:
    """The problem: five correlations, ridge 1e-3; their sum is 3.59992."""
    return stiefel.CCA(*halves(), p=5, ridge=1e-3)


def recipe(step: float, passes: int, estimator: str = "one_batch") -> stiefel.StochasticLanding:
    """The streaming recipe: preconditioned, exact safe step on the batch, cosine schedule."""
    return stiefel.StochasticLanding(tl.Cosine(step, passes * PER_PASS), 128, estimator, preconditioner="auto")


def steps(bases: tuple[float, ...], seeds: int, passes: int) -> Rows:
    """What is captured in the end."""
    problem, table = correlations(), []
    best = -float(problem.optimum)
    for estimator in ("one_batch", "u_statistic"):
        for base in bases:
            count = passes * PER_PASS
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RunWarning)
                sol = tl.iterate(problem, recipe(base, passes, estimator), steps=count, every=count, runs=seeds, key=0, keep="last")
            share = 1 - np.asarray(sol.history["gap"][-1]) / best
            table.append({"estimator": estimator, "first step": base, "runs": seeds, "diverged": int(np.sum(~np.isfinite(share))),
                          "captured, median": f"{np.median(share):.4%}", "captured, worst": f"{np.min(share):.4%}",
                          "|X'BX - I|, median": float(np.median(sol.history["infeasibility"][-1]))})
    return table


def digits(limit: int) -> Rows:
    """Batches and CPU seconds to a gap of one per cent; of a method with a free step the fastest of five."""
    from sklearn.cross_decomposition import CCA

    problem = correlations()
    best, rows = -float(problem.optimum), []
    averaged = {f"{eta:g}": stiefel.StochasticLanding(eta, 128, normal="gradient", attraction=0.2 / eta, safe=None, average="first_pass")
                for eta in (0.03, 0.1, 0.2, 0.3, 0.5)}
    kinds: dict[str, dict[str, Any]] = {
        "the streaming recipe": {"0.7": stiefel.StochasticLanding(tl.Inverse(0.7, 50.0), 128, preconditioner="auto")},
        "the same, U-statistic": {"0.7": stiefel.StochasticLanding(tl.Inverse(0.7, 50.0), 128, "u_statistic", preconditioner="auto")},
        "the paper's averaged landing": averaged,
        "the paper's averaged landing, exact safe step": {name: method.replace(safe=0.75, attraction=1.0) for name, method in averaged.items()},
        "rolling Riemannian": {f"{eta:g}": stiefel.RollingRiemannian(eta, 128) for eta in (0.1, 0.3, 0.6, 1.0, 2.0)}}
    for name, methods in kinds.items():
        found = []
        for eta, method in methods.items():
            for _ in range(2):
                began = time.process_time()
                sol = tl.iterate(problem, method, steps=limit, every=5, stop=tl.Below("gap", 0.01 * best), throw=False)
                took = time.process_time() - began
            gap = float(sol.history["gap"][-1]) / best
            found.append((not sol.status.good, took if sol.status.good else gap, eta, sol, gap, took))
        _, _, eta, sol, gap, took = min(found, key=lambda entry: entry[:2])
        rows.append({"row": name, "step": eta, "batches to 1 %": sol.steps if sol.status.good else None, "relative gap": gap, "CPU seconds": took})
    centred = [view - view.mean(0) for view in halves()]
    plain = {"scikit-learn CCA (NIPALS, no ridge)": lambda: CCA(n_components=5, max_iter=1000).fit(*centred).transform(*centred),
             "closed_form (dense, with the ridge)": lambda: [v @ x for v, x in zip(centred, stiefel.closed_form(problem).point, strict=True)]}
    if shared.present("cca_zoo"):
        plain |= zoo(centred)
    for name, call in plain.items():
        scores, _, cpu = shared.once(call)
        rows.append({"row": name, "step": None, "batches to 1 %": None, "relative gap": 1 - captured(scores, centred) / best, "CPU seconds": cpu})
    return rows


def captured(scores: Any, views: list[np.ndarray]) -> float:
    """The sum of correlations that the subspaces of some scores hold, with the ridge: directions by least squares, exact retraction."""
    rows, ends = len(views[0]), []
    for view, score in zip(views, scores, strict=True):
        score = np.asarray(score)
        x = np.linalg.lstsq(view, score - score.mean(0), rcond=1e-10)[0]
        gram = x.T @ (view.T @ view / rows + 1e-3 * np.eye(len(x))) @ x
        ends.append(np.linalg.solve(np.linalg.cholesky(gram), x.T).T)
    return float(np.linalg.svd(ends[0].T @ (views[0].T @ views[1] / rows) @ ends[1], compute_uv=False).sum())


def zoo(views: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    """The whole and the iterative solver of cca-zoo."""
    from cca_zoo.linear import CCA, CCAEY  # pyright: ignore[reportMissingImports]

    return {f"cca-zoo {solver.__name__}": lambda solver=solver: solver(n_components=5).fit(views).transform(views) for solver in (CCA, CCAEY)}


def components(rows: int, sources: int) -> Rows:
    """Independent components."""
    from sklearn.decomposition import FastICA

    from theorylab.interop.sklearn import LandingICA

    rng = np.random.RandomState(42)
    signals = rng.laplace(size=(rows, sources))
    mixing = np.linalg.qr(rng.randn(sources, sources))[0]
    data = signals @ mixing.T
    problem = stiefel.ICA(data, sources, sign=1, mixing=mixing)
    count = 4 * rows // 500
    schedule = tl.Staircase([0.4, 0.04, 0.004], [count // 2, 3 * count // 4])
    online = stiefel.StochasticLanding(schedule, 500, attraction=1.25, safe=None)
    calls: dict[str, Callable[[], Any]] = {
        "LandingICA": lambda: LandingICA(sign=1, random_state=0).fit(data).components_,
        "StochasticLanding, four passes": lambda: tl.iterate(problem, online, steps=count, every=count, keep="last").value.T,
        "the same, averaged B": lambda: tl.iterate(problem, online.replace(average="first_pass"), steps=count, every=count, keep="last").value.T,
        "scikit-learn FastICA": lambda: FastICA(whiten="unit-variance", fun="logcosh", random_state=0).fit(data).components_}
    if shared.present("picard"):
        from picard import picard  # pyright: ignore[reportMissingImports]

        def peer(ortho: bool) -> np.ndarray:
            whitening, unmixing, _ = picard(data.T, ortho=ortho, extended=False, random_state=0)
            return unmixing @ whitening

        calls |= {"picard": lambda: peer(False), "picard, orthogonal": lambda: peer(True)}
    table: Rows = []
    for name, call in calls.items():
        w, wall, cpu = shared.once(call)
        w = np.asarray(w)
        white = np.asarray(stiefel.retract(w.T, np.cov(data.T, bias=True)))
        table.append({"row": name, "error (Amari)": float(stiefel.amari_distance(w, mixing)),
                      "objective, made white": f"{float(problem.metrics(jnp.asarray(white))['objective']):.8f}", "seconds": wall, "CPU seconds": cpu})
    return table


def parts(quick: bool) -> dict[str, tuple[str, Callable[[], Rows]]]:
    """Title and table of each part."""
    return {
        "steps": ("Captured correlation of the digits", lambda: steps(*(((0.7,), 2, 4) if quick else ((0.3, 0.7, 1.0, 3.0), 10, 40)))),
        "digits": ("Canonical correlations of digits", lambda: digits(60 if quick else 2000)),
        "components": ("Independent components", lambda: components(*((5000, 4) if quick else (100_000, 10)))),
    }


if __name__ == "__main__":
    raise SystemExit(shared.main(None, __doc__, parts))
