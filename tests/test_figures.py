"""Every figure of the papers with its smallest preset, and the numbers behind the pictures against independent ones."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from theorylab.core.solution import Status
from theorylab.lab import figures, results
from theorylab.lab.files import checkout_folder, load_module

BROKEN = figures.discover()
FIGURES = sorted(figures.registered())
LARGEST = 2_000_000  # bytes of a picture on a page


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Runs a figure once and gives its folder, its outcome and its data."""
    out, cache, known = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("stored"), {}

    def run(name):
        if name not in known:
            gallery, one = figures.run_figures(name, "quick", out=out, cache=cache, say=lambda text: None), figures.registered()[name]
            found = results.Store(cache).load(name, "quick", results.key({"name": name, **one.presets["quick"]}, one.text))
            known[name] = out, gallery, None if found is None else found[0]
        return known[name]

    return run


def test_every_module_of_figures_can_be_loaded():
    assert BROKEN == {} and FIGURES


@pytest.mark.parametrize("name", FIGURES)
def test_quick(name, drawn):
    out, gallery, _ = drawn(name)
    assert gallery.passed, gallery.text()
    picture, facts = out / f"{name}.svg", json.loads((out / f"{name}.json").read_text())
    assert picture.stat().st_size < LARGEST
    texts = list(ElementTree.parse(picture).getroot().iter("{http://www.w3.org/2000/svg}text"))
    assert texts, "the words of a picture must be text that can be searched"
    assert facts["passed"] and facts["checks"] and facts["caption"].endswith(".")


# ------------------------------------------------------------------------------------------------ transformer_pde


def published_field(kind, Q, K, V):
    """The right-hand side of the published scripts as it is written there, on the three entries of a symmetric matrix."""
    A = K.T @ Q / np.sqrt(2)

    def half(S):
        if kind == "softmax":
            return V @ S @ A @ S
        if kind == "l2":
            return 2 * V @ S @ np.linalg.solve(np.eye(2) + 2 * K.T @ K @ S, A @ S)
        if kind == "multihead":  # head h has row h of each matrix
            return sum(np.outer(np.eye(2)[h], V[h]) @ S @ np.outer(K[h], Q[h]) @ S for h in range(2))
        values, vectors = np.linalg.eigh(S)  # the cross-covariance of the entropic plan, between symmetric roots
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        left, s, right = np.linalg.svd(root @ Q.T @ K @ root)
        return V @ root @ (left * (2 * s / (1 + np.sqrt(1 + 4 * s**2))) @ right).T @ root

    def field(t, y):
        moved = half(np.array([[y[0], y[1]], [y[1], y[2]]]))
        return (moved + moved.T)[np.triu_indices(2)]

    return field


WEIGHTS = {
    "convergence-to-zero": ("DECAY_Q", None, "DECAY_V"),
    "convergence-to-a-line": ("LINE_Q", None, None),
    "two-lines": ("MIXED_Q", "MIXED_K", "TWO_LINES_V"),
    "blow-up-and-divergence": ("GROWTH_Q", "GROWTH_K", None),
    "mixed": ("MIXED_Q", "MIXED_K", "MIXED_V"),
}


KINDS = {
    "convergence-to-zero": ("softmax", "l2", "multihead", "sinkhorn"),
    "convergence-to-a-line": ("softmax", "l2", "multihead"),
    "two-lines": ("softmax", "l2"),
    "blow-up-and-divergence": ("softmax", "l2", "multihead", "sinkhorn"),
    "mixed": ("softmax", "l2", "multihead"),
}
PANELS = [pytest.param(name, kind, id=f"transformer_pde/{name}-{kind}") for name, kinds in KINDS.items() for kind in kinds]


@pytest.mark.parametrize(("name", "kind"), PANELS)
def test_ends_against_the_published_equation_in_scipy(name, kind, drawn):
    module = load_module(checkout_folder("paper_figures") / "_panels.py")
    q, k, v = WEIGHTS[name]
    Q = getattr(module, q)
    field = published_field(kind, Q, -Q if k is None else getattr(module, k), np.eye(2) if v is None else getattr(module, v))
    data = drawn(f"transformer_pde/{name}")[2]
    panel = SimpleNamespace(**{key.removeprefix(f"{kind}_"): value for key, value in data.items() if key.startswith(f"{kind}_")})
    for i in {len(panel.start) // 3, *np.flatnonzero(panel.status == Status.BLOWUP)[:1]}:
        blown = panel.status[i] == Status.BLOWUP
        end = (1 - 1e-4) * panel.blow_up_time[i] if blown else panel.time[i]
        start = panel.start[i][np.triu_indices(2)]
        if panel.trace[i] < 1e-12:  # a decay like 1/t that was followed to times of no use
            y = solve_ivp(field, (0.0, 1000.0), start, method="LSODA", rtol=1e-10, atol=1e-18, t_eval=[100.0, 1000.0]).y
            np.testing.assert_allclose(y[0] + y[2], panel.traces_at[i], rtol=5e-3)
            continue
        y = solve_ivp(field, (0.0, end), start, method="LSODA", rtol=1e-10, atol=1e-18).y[:, -1]
        if blown:  # the trace of softmax tends to a multiple of 1 / (t* - t)
            assert end + (y[0] + y[2]) / field(end, y)[[0, 2]].sum() == pytest.approx(panel.blow_up_time[i], rel=1e-6)
        else:
            np.testing.assert_allclose(y, panel.trace[i] * panel.direction[i][np.triu_indices(2)], rtol=0, atol=1e-5 * panel.trace[i])
