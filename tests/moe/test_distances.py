"""Distances: golden numbers, closed forms for single Gaussians, Monte Carlo against quadrature, and statements about the density."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from tests.moe.cases import A4_OTHER
from theorylab.errors import ArgumentError, PrecisionError, ShapeError, UnknownNameError
from theorylab.moe.distances import hellinger, kullback_leibler, total_variation
from theorylab.moe.losses import voronoi_loss
from theorylab.moe.model import Mixture, example
from theorylab.moe.selection import split

S0, S1, S2 = example("S0"), example("S1"), example("S2")
WIDE = (-1.0, 1.0)


def duplicated(truth, copies, active):
    """`copies[j]` equal copies of atom j, which share its weight."""
    places = np.repeat(np.arange(truth.experts), copies)
    return Mixture(truth.gate_intercept[places] - np.log(np.asarray(copies, float))[places], truth.gate_coef[places], truth.expert_coef[places],
                   truth.expert_intercept[places], truth.variance[places], active, truth.selection)


def test_golden_case():
    h = float(hellinger(S1, A4_OTHER, WIDE).value)
    assert h**2 == pytest.approx(0.0027221301896, rel=1e-10)
    assert h == pytest.approx(0.0521740375, rel=1e-9)
    assert float(hellinger(S1, A4_OTHER, WIDE, average="mean").value) == pytest.approx(0.0516156064, rel=1e-8)
    assert float(kullback_leibler(S1, A4_OTHER, WIDE).value) == pytest.approx(0.0105925979416, rel=1e-10)
    assert float(total_variation(S1, A4_OTHER, WIDE).value) == pytest.approx(0.05657, abs=1e-5)
    assert float(hellinger(S1, A4_OTHER, WIDE).standard_error) == 0.0


@pytest.mark.slow
def test_finer_panels_change_nothing():
    for distance in (hellinger, total_variation):
        assert float(distance(S1, A4_OTHER, WIDE).value) == pytest.approx(float(distance(S1, A4_OTHER, WIDE, panels=20).value), rel=1e-10)


ONE, OTHER = (Mixture([0.0], [[0.0]], [[a]], [b], [v], 1) for a, b, v in ((0.3, 0.0, 0.5), (-0.4, 0.2, 0.5)))
WIDER = OTHER.replace(variance=jnp.array([0.9]))


def by_quadrature(at):
    return scipy.integrate.quad(lambda x: at(0.7 * x - 0.2), -1, 1, epsabs=1e-14, epsrel=1e-13, points=[2 / 7])[0] / 2


def test_closed_forms_for_single_gaussians():
    v = 0.5, 0.9
    h2 = by_quadrature(lambda gap: 1 - np.sqrt(2 * np.sqrt(v[0] * v[1]) / sum(v)) * np.exp(-(gap**2) / (4 * sum(v))))
    kl = by_quadrature(lambda gap: 0.5 * (v[0] / v[1] + gap**2 / v[1] - 1 + np.log(v[1] / v[0])))
    assert float(hellinger(ONE, WIDER, WIDE).value) ** 2 == pytest.approx(h2, rel=1e-12)
    assert float(kullback_leibler(ONE, WIDER, WIDE).value) == pytest.approx(kl, rel=1e-12)


def test_points_with_weights_are_summed():
    points, weights = np.array([[-0.5], [0.2], [0.9]]), np.array([1.0, 2.0, 1.0])
    gap = 0.7 * points[:, 0] - 0.2
    tv = (2 * scipy.stats.norm.cdf(np.abs(gap) / 2 / np.sqrt(0.5)) - 1) @ weights / 4
    assert float(total_variation(ONE, OTHER, (points, weights)).value) == pytest.approx(tv, rel=1e-12)


def law(key, n):
    return jax.random.uniform(key, (n, 1), jnp.float64, -1, 1)


def test_monte_carlo_agrees_with_quadrature_within_its_error():
    for distance in (hellinger, total_variation):
        exact, found = distance(S1, A4_OTHER, WIDE).value, distance(S1, A4_OTHER, law, key=3, samples=20_000)
        assert abs(float(found.value - exact)) < 4 * float(found.standard_error) < 0.1 * float(exact)


def test_the_error_of_monte_carlo_is_honest():
    found = [total_variation(S1, A4_OTHER, law, key=k, samples=20_000) for k in range(20)]
    spread = np.std([float(e.value) for e in found])
    assert 0.6 < spread / float(found[0].standard_error) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["slope", "logit"])
def test_the_plane_is_cut_at_all_boundaries(selection):
    p = example("S3", selection=selection)
    q = p.replace(gate_coef=p.gate_coef * 1.05 + 0.02 * jnp.arange(8.0).reshape(4, 2), expert_intercept=p.expert_intercept + 0.05)
    exact = float(hellinger(p, q, WIDE).value)
    assert float(hellinger(p, q, WIDE, panels=6).value) == pytest.approx(exact, rel=1e-9)
    found = hellinger(p, q, lambda key, n: jax.random.uniform(key, (n, 2), jnp.float64, -1, 1), key=0)
    assert abs(float(found.value) - exact) < 4 * float(found.standard_error)


def test_three_inputs_are_sampled():
    m = Mixture(np.zeros(2), np.eye(2, 3), np.ones((2, 3)), np.zeros(2), np.ones(2), 1)
    found = hellinger(m, m.replace(expert_intercept=jnp.array([2.0, 2.0])), (0.0, 1.0), key=0, samples=20_000)
    h = np.sqrt(1 - np.exp(-0.5))  # both experts are one Gaussian, shifted by two standard deviations
    assert abs(float(found.value) - h) < 4 * float(found.standard_error) < 0.02


def test_with_one_active_expert_the_gate_is_not_identified():
    other = S0.replace(gate_intercept=jnp.array([-4.0, 0.0]), gate_coef=jnp.array([[12.5], [0.0]]))
    assert float(hellinger(S0, other, (0.0, 1.0)).value) < 1e-12
    # e^-8 (12.5 + ...): weights e^-4 against e^-8 and slopes 12.5 apart at weight e^-4
    assert float(voronoi_loss(other, S0, features="experts")) == pytest.approx(np.exp(-4) * 12.5 + np.exp(-4) - np.exp(-8), rel=1e-12)
    assert float(voronoi_loss(other, S0, features="experts")) == pytest.approx(0.2469, abs=5e-5)


MULTIPLICITIES = [((1, 2, 1), 3, 0.0, False), ((1, 2, 1), 2, 0.0887, True), ((2, 1, 1), 3, 0.0988, False), ((1, 2, 1), 4, 0.1787, True),
                  ((2, 2, 1), 3, 0.0543, True), ((2, 1, 2), 3, 0.0, True), ((1, 3, 1), 4, 0.0, True), ((2, 2, 2), 4, 0.0, True)]


@pytest.mark.parametrize(("copies", "active", "h"), [pytest.param(*row, marks=[pytest.mark.slow] if slow else []) for *row, slow in MULTIPLICITIES])
def test_copies_have_the_true_density_iff_every_region_holds_as_many_as_are_active(copies, active, h):
    assert float(hellinger(S1, duplicated(S1, copies, active), WIDE).value) == pytest.approx(h, abs=5e-5 if h else 1e-12)


def test_too_few_active_copies_cost_total_variation():
    assert float(total_variation(S1, duplicated(S1, (1, 2, 1), 2), WIDE).value) == pytest.approx(0.0919, abs=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("selection", "copies", "active", "h"), [
    ("slope", (1, 2), 1, 0.0), ("slope", (2, 2), 2, 0.0), ("slope", (1, 2), 2, 0.4884), ("slope", (2, 2), 1, 0.0),
    ("logit", (1, 2), 1, 0.1665), ("logit", (2, 2), 2, 0.0), ("logit", (2, 2), 1, 0.0)])
def test_copies_with_one_active_true_expert(selection, copies, active, h):
    truth = example("S0", selection=selection)
    assert float(hellinger(truth, duplicated(truth, copies, active), (0.0, 1.0)).value) == pytest.approx(h, abs=5e-5 if h else 1e-12)


@pytest.mark.slow
def test_in_logit_mode_the_copies_must_be_equally_many():
    truth = example("S1", selection="logit")
    for copies, active, h in (((1, 2, 1), 3, 0.124), ((2, 1, 2), 3, 0.213), ((2, 2, 2), 4, 0.0)):
        assert float(hellinger(truth, duplicated(truth, copies, active), WIDE).value) == pytest.approx(h, abs=5e-4 if h else 1e-7)


@pytest.mark.parametrize(("m", "last"), [(2, 2.10e-5), *(pytest.param(*row, marks=pytest.mark.slow) for row in [(3, 2.10e-7), (4, 2.11e-9)])])
def test_a_gauss_hermite_split_changes_the_density_at_order_2m(m, last):
    t = np.array([0.14, 0.1])
    h, tv = (np.array([float(distance(S2, split(S2, 0, at, m), (0.0, 1.0)).value) for at in t]) for distance in (hellinger, total_variation))
    assert np.diff(np.log(h))[0] / np.diff(np.log(t))[0] == pytest.approx(2 * m, abs=0.05)
    assert np.diff(np.log(tv))[0] / np.diff(np.log(t))[0] == pytest.approx(2 * m, abs=0.15)
    assert tv[1] == pytest.approx(last, rel=5e-3)


def test_points_alone_are_summed_with_equal_weights():
    x = np.linspace(-1, 1, 7)
    pair = float(hellinger(S1, A4_OTHER, (x[:, None], np.full(7, 1 / 7))).value)
    for points in (x, x[:, None], jnp.asarray(x)[:, None]):
        assert float(hellinger(S1, A4_OTHER, points).value) == pytest.approx(pair, rel=1e-13)
    assert float(hellinger(S1, A4_OTHER).value) == float(hellinger(S1, A4_OTHER, (0.0, 1.0)).value)


def test_distances_work_in_jit_and_keep_float32():
    low = jax.tree.map(lambda a: a.astype(jnp.float32), S1)
    found = jax.jit(lambda m: hellinger(m, low, WIDE, panels=2).value)(low.replace(variance=low.variance * np.float32(1.2)))
    assert found.dtype == jnp.float32
    exact = float(hellinger(S1.replace(variance=S1.variance * 1.2), S1, WIDE).value)
    assert float(found) == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: hellinger(S1, example("S3"), WIDE), ShapeError, "p and q must have one dimension, got 1 and 2"),
    (lambda: hellinger(S1, jax.tree.map(lambda a: a.astype(jnp.float32), S1), WIDE), PrecisionError, "one dtype"),
    (lambda: hellinger(S1, S1, 3.0), ArgumentError, "law must be a pair"),
    (lambda: hellinger(S1, S1, (1.0, -1.0)), ArgumentError, "low must be below high"),
    (lambda: hellinger(S1, S1, (np.ones((2, 1)), np.ones(3))), ShapeError, "weights of law must have shape"),
    (lambda: hellinger(S1, S1, (np.ones((2, 1)), -np.ones(2))), ArgumentError, "weights of law must not be negative"),
    (lambda: hellinger(S1, S1, law), ArgumentError, "key is needed"),
    (lambda: hellinger(S1, S1, law, average="mean", key=0), ArgumentError, "average='mean' needs"),
    (lambda: hellinger(S1, S1, WIDE, average="median"), UnknownNameError, "average 'median'"),
    (lambda: total_variation(S1, S1, law, key=0, samples=1), ArgumentError, "samples must be"),
    (lambda: kullback_leibler(S1, S1, WIDE, panels=0), ArgumentError, "panels must be"),
])
def test_wrong_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
