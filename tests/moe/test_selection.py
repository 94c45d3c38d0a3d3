"""Merging against moments, criteria against golden numbers and least squares, the order of the error of a merge."""

from __future__ import annotations

import numpy as np
import pytest

from tests.moe.cases import A5_FIT, s1_likelihood
from theorylab.errors import ArgumentError, ShapeError, UnknownNameError
from theorylab.moe.distances import hellinger
from theorylab.moe.model import Mixture, example
from theorylab.moe.problem import Likelihood
from theorylab.moe.selection import OrderSelection, aic, bic, degrees_of_freedom, dendrogram, merge, select_order, split

S1, S2 = example("S1"), example("S2")


def random_mixture(k, d, seed=0):
    rng = np.random.default_rng(seed)
    return Mixture(rng.normal(size=k), rng.normal(size=(k, d)), rng.normal(size=(k, d)), rng.normal(size=k), rng.uniform(0.5, 1, k), k)


def test_a_merge_has_the_moments_of_its_cell():
    m, cells = random_mixture(5, 2), np.array([1, 0, 1, 1, 0])
    found = merge(m, cells)
    for c in (0, 1):
        inside = cells == c
        weight = np.exp(np.asarray(m.gate_intercept))[inside]
        w, b = weight / weight.sum(), np.asarray(m.expert_intercept)[inside]
        gate, coef, variance = (np.asarray(a)[inside] for a in (m.gate_coef, m.expert_coef, m.variance))
        assert float(found.gate_intercept[c]) == pytest.approx(np.log(weight.sum()))
        assert float(found.expert_intercept[c]) == pytest.approx(w @ b)
        np.testing.assert_allclose(found.gate_coef[c], w @ gate)
        np.testing.assert_allclose(found.expert_coef[c], w @ coef + (w * (b - w @ b)) @ gate)
        assert float(found.variance[c]) == pytest.approx(w @ variance + w @ (b - w @ b) ** 2)
    assert found.active == 2
    huge = m.replace(gate_intercept=m.gate_intercept + 800)
    np.testing.assert_allclose(merge(huge, cells).gate_intercept, found.gate_intercept + 800)


def test_a_merge_undoes_a_split():
    two = split(S2, 1, 0.2, 3)
    assert (two.experts, two.active) == (4, 4)
    found = merge(two, [0, 1, 1, 1])
    for name in ("gate_matrix", "expert_matrix", "variance"):
        np.testing.assert_allclose(getattr(found, name), getattr(S2, name), atol=1e-12)
    assert split(S1, 0, 0.1, 2, active=3).active == 3


def test_matched_moments_gain_an_order_over_plain_means():
    """The distance is of order t^3 with them and t^2 without, where the atoms differ in b by 2 t."""
    h = {"matched": [], "plain": []}
    for t in (0.2, 0.1):
        two = Mixture([0.5 - np.log(2), 0.5 - np.log(2), 0.0], [[-1.5], [-1.5], [0.0]], [[1.5], [1.5], [-1.0]], [-t, t, 1.5], [0.5, 0.5, 0.3], 3)
        one = merge(two, [0, 0, 1])
        plain = one.replace(variance=np.array([0.5, 0.3]), expert_coef=np.array([[1.5], [-1.0]]))
        h["matched"].append(float(hellinger(two, one, (0.0, 1.0)).value))
        h["plain"].append(float(hellinger(two, plain, (0.0, 1.0)).value))
    assert np.log2(h["plain"][0] / h["plain"][1]) == pytest.approx(2, abs=0.1)
    assert np.log2(h["matched"][0] / h["matched"][1]) > 2.9


def test_the_dendrogram_undoes_splits_first():
    fit = split(split(S2, 0, 0.05), 2, 0.05)
    tree = dendrogram(fit)
    assert [m.experts for m in tree.mixtures] == [4, 3, 2, 1]
    assert (np.diff(tree.heights) > 0).all()
    assert tree.by_gap().experts == 2
    np.testing.assert_allclose(tree.at(2).expert_matrix, S2.expert_matrix, atol=1e-12)
    first, second = tree.pairs[0]
    w = np.exp(np.asarray(fit.gate_intercept))
    w /= w.sum()
    i, j = (np.concatenate([fit.gate_coef[a], fit.expert_matrix[a], fit.variance[a:a + 1]]) for a in (first, second))
    assert tree.heights[0] == pytest.approx(w[first] * w[second] / (w[first] + w[second]) * np.sum((i - j) ** 2))
    likelihood = Likelihood(*S2.sample(400, key=0), experts=4, active=4)
    assert tree.by_likelihood(likelihood).experts == 2
    assert "merged" in repr(tree)


def test_golden_criteria():
    fit = S1.unpack(A5_FIT)
    assert degrees_of_freedom(fit) == degrees_of_freedom(fit, np.linspace(-1, 1, 50)) == 13
    assert bic(s1_likelihood(), fit) == pytest.approx(797.92874, abs=2e-5)
    assert aic(s1_likelihood(), fit) == pytest.approx(746.03970, abs=2e-5)


def test_degrees_of_freedom_count_components():
    assert degrees_of_freedom(example("S0")) == 6
    apart = Mixture(np.zeros(4), [[-3.0], [-1.0], [1.5], [0.0]], np.zeros((4, 1)), np.arange(4.0), np.ones(4), 2)
    assert degrees_of_freedom(apart) == 3 * 2 + 4 * 3
    assert degrees_of_freedom(apart, np.array([-0.5, 0.5])) == 2 * 2 + 4 * 3


@pytest.mark.slow
def test_one_expert_is_least_squares():
    x, y = S2.sample(200, key=0)
    found = select_order(x, y, [1], starts=2)
    design = np.column_stack([np.ones(200), x])
    coefficients, (rss,) = np.linalg.lstsq(design, np.asarray(y), rcond=None)[:2]
    np.testing.assert_allclose(found.fits[1, 1].expert_matrix[0], coefficients, atol=1e-10)
    assert found.log_likelihood[1, 1] == pytest.approx(-100 * (np.log(2 * np.pi * rss / 200) + 1))
    assert found.bic[1, 1] == pytest.approx(100 * 2 * (np.log(2 * np.pi * rss / 200) + 1) + 3 * np.log(200))
    assert found.best("aic") == (1, 1)
    assert "bic" in repr(found)
    assert "<table>" in found._repr_html_()


@pytest.mark.slow
def test_two_experts_are_found_by_bic():
    truth = S2.replace(variance=np.array([0.15, 0.1]))
    for seed in range(3):
        assert select_order(*truth.sample(600, key=seed, low=-1.0), [1, 2, 3], key=seed).best() == (2, 2)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: merge(S1, [0, 1]), ShapeError, "cells must have shape"),
    (lambda: merge(S1, [0, 2, 2]), ArgumentError, "cells must number the cells 0, 1"),
    (lambda: split(S2, 2, 0.1), ArgumentError, "expert must be a whole number at least 0 and at most 1"),
    (lambda: split(S2, 0, 0.8), ArgumentError, "distance must be below the standard deviation 0.7071"),
    (lambda: split(S2, 0, 0.1, 1), ArgumentError, "m must be"),
    (lambda: dendrogram(3), ArgumentError, "mixture must be a Mixture, got int"),
    (lambda: dendrogram(S2).by_gap(), ArgumentError, "at least 3 atoms"),
    (lambda: dendrogram(S2).at(3), ArgumentError, "experts must be"),
    (lambda: degrees_of_freedom(None), ArgumentError, "mixture must be a Mixture"),
    (lambda: bic(S1, S1), ArgumentError, "likelihood must be a Likelihood, got Mixture"),
    (lambda: aic(s1_likelihood(), S2), ShapeError, "fit must have 3 experts"),
    (lambda: select_order(np.ones(9), np.ones(9), [1], [2]), ArgumentError, "active <= experts"),
    (lambda: select_order(np.arange(9.0), np.arange(9.0), [0]), ArgumentError, "experts must be"),
    (lambda: OrderSelection({}, {}, {}, {}, {}).best("dic"), UnknownNameError, "criterion 'dic'"),
])
def test_wrong_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
