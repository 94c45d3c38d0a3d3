"""Voronoi losses: the golden case, brute force over sets of atoms, invariances, alignment against a general optimizer."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from tests.moe.cases import A3_FIT
from theorylab.errors import RunWarning, ShapeError, UnknownNameError
from theorylab.moe.losses import align, voronoi_cells, voronoi_loss
from theorylab.moe.model import Mixture, example

S1 = example("S1")
GOLDEN = {("exact", 1): 0.506427768110788, ("exact", 2): 1.00556353657034, ("exact", 3): 1.15556353657034,
          ("over_specified", 1): 0.506427768110788, ("over_specified", 2): 0.656427768110788, ("over_specified", 3): 0.719363234051738}
S3 = example("S3")
KINDS = ("exact", "over_specified", "sharp")


def random_fit(seed, truth=S3, extra=2):
    rng = np.random.default_rng(seed)
    places = np.concatenate([np.arange(truth.experts), rng.integers(0, truth.experts, extra)])
    return Mixture(*(np.asarray(a)[places] + 0.05 * rng.normal(size=np.asarray(a)[places].shape)
                     for a in (truth.gate_intercept, truth.gate_coef, truth.expert_coef, truth.expert_intercept)),
                   np.asarray(truth.variance)[places] + 0.01 * rng.uniform(size=len(places)), 3, truth.selection)


def brute(fit, truth, kind, t0=0.0, t1=0.0, cells=None, norm="l2"):
    """The definition, atom by atom and set by set, in plain Python."""
    f = [np.asarray(a) for a in (fit.gate_coef + t1, fit.expert_coef, fit.expert_intercept[:, None], fit.variance[:, None])]
    t = [np.asarray(a) for a in (truth.gate_coef, truth.expert_coef, truth.expert_intercept[:, None], truth.variance[:, None])]
    parts = lambda i, j: [np.linalg.norm(a[i] - b[j]) for a, b in zip(f, t, strict=True)]
    far = (lambda p: sum(v**2 for v in p)) if norm == "l2" else sum
    if cells is None:
        cells = [min(range(truth.experts), key=lambda j, i=i: far(parts(i, j))) for i in range(fit.experts)]
    terms = []
    for j in range(truth.experts):
        inside = [i for i in range(fit.experts) if cells[i] == j]
        r = 2 * len(inside)
        powers = [1, 1, 1, 1] if kind == "exact" or r == 2 else [r, r / 2, r, r / 2] if kind == "over_specified" else [2, 2, r, r / 2]
        weight = [np.exp(float(fit.gate_intercept[i]) + t0) for i in inside]
        terms.append(sum(w * sum(v**e for v, e in zip(parts(i, j), powers, strict=True)) for w, i in zip(weight, inside, strict=True))
                     + abs(sum(weight) - np.exp(float(truth.gate_intercept[j]))))
    return max(sum(terms[j] for j in chosen) for chosen in itertools.combinations(range(truth.experts), truth.active))


@pytest.mark.parametrize(("kind", "K"), GOLDEN)
def test_golden_case(kind, K):
    assert float(voronoi_loss(A3_FIT, S1.replace(active=K), kind)) == pytest.approx(GOLDEN[kind, K], rel=1e-13)


def test_golden_cells():
    assert voronoi_cells(A3_FIT, S1).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_losses_are_the_definition_over_all_sets_of_atoms(kind, seed):
    fit = random_fit(seed)
    for norm in ("l2", "sum"):
        assert float(voronoi_loss(fit, S3, kind, norm=norm)) == pytest.approx(brute(fit, S3, kind, norm=norm), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_atoms_does_not_matter(kind):
    fit = random_fit(3)
    loss = float(voronoi_loss(fit, S3, kind))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        assert float(voronoi_loss(fit.permuted(rng.permutation(6)), S3.permuted(rng.permutation(4)), kind)) == pytest.approx(loss, rel=1e-13)


def test_the_loss_of_the_truth_is_zero():
    assert float(voronoi_loss(S3, S3, "exact")) == 0.0


@pytest.mark.parametrize("how", ["reference", "infimum"])
def test_aligned_losses_do_not_see_a_translation_of_the_gate(how):
    for kind in ("exact", "over_specified") if how == "reference" else ("exact",):
        fit = random_fit(4)
        moved = fit.replace(gate_intercept=fit.gate_intercept + 1.7, gate_coef=fit.gate_coef + jnp.array([0.4, -2.0]))
        loss = float(voronoi_loss(fit, S3, kind, align=how))
        assert float(voronoi_loss(moved, S3, kind, align=how)) == pytest.approx(loss, rel=1e-7)
        assert float(voronoi_loss(moved, S3, kind)) > 2 * loss


def test_the_reference_alignment_matches_weight_and_mean_slope_of_the_last_cell():
    fit = align(random_fit(5), S3)
    inside = np.asarray(voronoi_cells(fit, S3, features="experts")) == 3
    weight = np.exp(np.asarray(fit.gate_intercept))[inside]
    assert weight.sum() == pytest.approx(np.exp(float(S3.gate_intercept[3])))
    np.testing.assert_allclose(weight @ np.asarray(fit.gate_coef)[inside] / weight.sum(), S3.gate_coef[3], atol=1e-13)


@pytest.mark.parametrize(("kind", "K"), [("exact", 2), ("over_specified", 3), pytest.param("exact", 3, marks=pytest.mark.slow),
                                         pytest.param("over_specified", 2, marks=pytest.mark.slow)])
def test_the_infimum_is_the_one_a_general_optimizer_finds(kind, K):
    truth = S1.replace(active=K)
    cells = np.asarray(voronoi_cells(A3_FIT, truth, features="experts"))
    found = min((scipy.optimize.minimize(lambda t: brute(A3_FIT, truth, kind, t[0], t[1], cells), start, method="Nelder-Mead",
                                         options={"xatol": 1e-10, "fatol": 1e-12, "maxiter": 1000}) for start in ([0.0, 0.0], [0.1, -0.1])),
                key=lambda r: r.fun)
    loss = float(voronoi_loss(A3_FIT, truth, kind, align="infimum", features="experts"))
    assert loss <= found.fun + 1e-8
    assert loss == pytest.approx(found.fun, rel=1e-4)
    best = align(A3_FIT, truth, "infimum", kind=kind)
    assert loss == pytest.approx(brute(best, truth, kind, cells=cells), rel=1e-12)


def test_a_weight_that_overflows_is_infinite_too():
    away = S1.replace(gate_intercept=[800.0, 0.0, 0.0])
    with pytest.warns(RunWarning, match="overflows"):
        assert float(voronoi_loss(away, S1)) == np.inf


def test_an_empty_cell_is_infinite_with_a_warning():
    fit = S1.permuted([0, 0, 2])
    with pytest.warns(RunWarning, match="empty cell"):
        assert np.isinf(float(voronoi_loss(fit, S1)))


def test_float32_stays():
    low = Mixture(*(np.asarray(a, np.float32) for a in (S1.gate_intercept, S1.gate_coef, S1.expert_coef, S1.expert_intercept, S1.variance)), 2)
    moved = low.replace(expert_intercept=low.expert_intercept + np.float32(0.1))
    assert voronoi_loss(moved, low, "over_specified", align="reference").dtype == jnp.float32


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: voronoi_loss(S1, S3), ShapeError, "fit and truth must have one dimension, got 1 and 2"),
    (lambda: voronoi_loss(3.0, S1), ShapeError, "fit must be a Mixture, got float"),
    (lambda: voronoi_loss(S1, S1, "D3"), UnknownNameError, "kind 'D3'"),
    (lambda: voronoi_loss(S1, S1, align="best"), UnknownNameError, "align 'best'"),
    (lambda: voronoi_cells(S1, S1, norm="l1"), UnknownNameError, "norm 'l1'"),
    (lambda: voronoi_cells(S1, S1, features="gate"), UnknownNameError, "features 'gate'"),
    (lambda: align(S1, S1, "median"), UnknownNameError, "align 'median'"),
    (lambda: align(S1, S1, kind="D1"), UnknownNameError, "kind 'D1'"),
])
def test_wrong_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
