"""Rate studies: fits to data of growing size, with their loss and distance to the truth, as one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from theorylab.core import checks
from theorylab.core.iterate import iterate
from theorylab.core.keys import Key, stream
from theorylab.core.stop import Below
from theorylab.errors import ArgumentError
from theorylab.lab.replicates import Table
from theorylab.lab.sweep import sweep_grid
from theorylab.moe.distances import hellinger, read_law
from theorylab.moe.em import EM
from theorylab.moe.losses import voronoi_loss
from theorylab.moe.model import Mixture
from theorylab.moe.problem import Likelihood
from theorylab.moe.starts import near

CHUNK = 16
PANELS = 2  # of the quadrature in each lane: ample for averages over replicates
SAMPLES = 2000


def rate_study(truth: Mixture, experts: int, sizes: Sequence[int], replicates: int, *, key: Key | int = 0, active: int | None = None,
               law: Any = (0.0, 1.0), method: Any = None, starts: int = 1, steps: int = 500, tolerance: float = 1e-9, kind: str = "exact",
               align: str | None = "reference", features: str = "experts", distance: bool = True, out: str | Path | None = None,
               chunk: int = CHUNK, **options: Any) -> Table:
    """Draw data from `truth`, fit, and measure, for every size and replicate; feed the table to `tl.fit_rate`.

    Rows are drawn for the largest size, and those beyond n have weight 0, so that all sizes share one compilation; data of different sizes and
    replicates are independent. Fits start near the truth, as in the papers. With `out` the study is resumed where it stopped, and can be
    shared by several processes.

    Args:
        truth: the true mixture.
        experts: fitted number k.
        sizes: sample sizes n.
        replicates: fits at each size.
        key: seed or random key.
        active: fitted K; that of the truth unless given.
        law: of x: a pair (low, high) for a uniform law, or a function of (key, n).
        method: `EM()` unless given, or another method for a `Likelihood`.
        starts: of each fit, all near the truth; the one that ends with the largest likelihood is kept.
        steps: most steps of each fit.
        tolerance: gain per row at which a fit ends.
        kind: of `voronoi_loss`.
        align: of `voronoi_loss`.
        features: of `voronoi_loss`.
        distance: whether the Hellinger distance is measured: by quadrature for uniform laws with d <= 2, else from samples.
        out: folder for the blocks of the sweep.
        chunk: fits side by side.
        **options: further arguments of `tl.sweep_grid`.

    Returns:
        A `Table` over the axis `n` with the columns `loss`, `log_likelihood`, `steps`, `status` and, if asked for, `hellinger`.

    Raises:
        ArgumentError, ShapeError, UnknownNameError: an argument is wrong.

    Example:
        >>> from theorylab import moe
        >>> table = moe.rate_study(moe.example("S2"), 2, [200, 800], 4, key=0, tolerance=1e-5, distance=False)
        >>> table["loss"].shape
        (2, 4)
    """
    if not isinstance(truth, Mixture):
        raise ArgumentError(f"truth must be a Mixture, got {type(truth).__name__}")
    experts = checks.whole("experts", experts, low=truth.experts)
    active = checks.whole("active", truth.active if active is None else active, low=1, high=experts)
    sizes = [checks.whole("sizes", n, low=experts * (truth.dim + 2)) for n in sizes]
    if not sizes:
        raise ArgumentError("sizes must name at least one sample size")
    if not (callable(law) or read_law(law, truth.dim)[1]):
        raise ArgumentError("law must be a pair (low, high) or a function of (key, n): a study draws new inputs, got points with weights")
    checks.real("tolerance", tolerance, above=0.0)
    # Checked here, before anything is drawn: inside the sweep an error would come after the compilation.
    voronoi_loss(truth, truth, kind, align=align, features=features)
    params = {"truth": truth, "law": law, "method": EM() if method is None else method, "tolerance": float(tolerance), "experts": experts,
              "active": active, "rows": max(sizes), "starts": checks.whole("starts", starts, low=1), "steps": checks.whole("steps", steps, low=1),
              "kind": kind, "align": align, "features": features, "distance": bool(distance)}
    return sweep_grid(_fit, {"n": sizes}, replicates, key=key, params=params, shapes=("experts", "active", "rows", "starts", "steps"), out=out,
                      chunk=chunk, **options)


def _fit(params: dict[str, Any], key: Key, i: Any) -> dict[str, Any]:
    """One replicate; traced."""
    truth, law, rows, n = params["truth"], params["law"], params["rows"], params["n"]
    if callable(law):
        x, y = truth.sample(law(stream(key, "law"), rows), key=stream(key, "data"))
    else:
        x, y = truth.sample(rows, key=stream(key, "data"), low=law[0], high=law[1])
    likelihood = Likelihood(x, y, params["experts"], params["active"], truth.selection, (jnp.arange(rows) < n).astype(y.dtype))

    def one(key: Key) -> tuple[Mixture, dict[str, Any]]:
        start = near(truth, params["experts"], key=stream(key, "start"), rows=n, active=params["active"])
        solution = iterate(likelihood, params["method"], start, steps=params["steps"], stop=Below("gain", params["tolerance"]), keep="last",
                           key=stream(key, "fit"))
        value = jnp.asarray(solution.history.columns["log_likelihood"])[-1]
        return solution.value, {"log_likelihood": value, "steps": solution.steps, "status": solution.status}

    if params["starts"] == 1:
        fit, found = one(key)
    else:
        fits, runs = jax.vmap(one)(jax.random.split(stream(key, "starts"), params["starts"]))
        fit, found = jax.tree.map(lambda leaf: leaf[jnp.nanargmax(runs["log_likelihood"])], (fits, runs))
    found["loss"] = voronoi_loss(fit, truth, params["kind"], align=params["align"], features=params["features"])
    if params["distance"]:
        box = None if callable(law) else PANELS
        found["hellinger"] = hellinger(fit, truth, law, key=stream(key, "distance"), samples=SAMPLES, panels=box).value
    return jax.tree.map(jnp.asarray, found)
