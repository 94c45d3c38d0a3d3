"""The co-activation graph against the numerical null space of the gate's Hessian; admissible copies against the statement; moved boundaries."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from theorylab.errors import ArgumentError, ShapeError
from theorylab.moe.identifiability import admissible_multiplicities, coactivation_graph, identifiability, null_directions
from theorylab.moe.model import Mixture, example

GRID = np.linspace(-1, 1, 401)[:, None]


def random_mixture(k, active, d, selection, seed=0):
    rng = np.random.default_rng(seed)
    return Mixture(0.5 * rng.normal(size=k), 2 * rng.normal(size=(k, d)), rng.normal(size=(k, d)), rng.normal(size=k), np.ones(k), active, selection)


def gate_hessian(mixture, x):
    """-sum_i pi_ij (1[j=l] - pi_il) z_i z_i', shape (k p, k p)."""
    pi, z = np.asarray(mixture.gate(x)), np.column_stack([np.ones(len(x)), x])
    k, p = pi.shape[1], z.shape[1]
    return -np.einsum("ij,jl,ia,ib->jalb", pi, np.eye(k), z, z).reshape(k * p, -1) + np.einsum("ij,il,ia,ib->jalb", pi, pi, z, z).reshape(k * p, -1)


CASES = [(4, 2, 1, "slope", 4), (4, 2, 1, "logit", 2), (5, 3, 1, "slope", 2), (5, 2, 2, "slope", 3), (6, 2, 3, "logit", 4), (6, 3, 1, "slope", 4)]


@pytest.mark.parametrize(("k", "active", "d", "selection", "nullity"), CASES)
def test_the_null_space_of_the_gate_has_the_dimension_that_the_graph_says(k, active, d, selection, nullity):
    rng = np.random.default_rng(1)
    x = GRID if d == 1 else rng.uniform(-1, 1, (2000, d))
    for seed in range(40):  # the first draw in which every expert is active somewhere and, but for slope cones on a line, all are connected
        mixture = random_mixture(k, active, d, selection, seed)
        graph = coactivation_graph(mixture, x)
        if not len(graph.dead) and graph.components * (d + 1) == nullity:
            break
    directions = null_directions(mixture, x)
    assert directions.shape == (nullity, k, d + 1)
    hessian = gate_hessian(mixture, x)
    values = np.linalg.eigvalsh(hessian)
    assert np.sum(np.abs(values) < 1e-9 * np.abs(values).max()) == nullity
    flat = directions.reshape(nullity, -1)
    assert np.abs(hessian @ flat.T).max() < 1e-10 * np.abs(values).max()
    np.testing.assert_allclose(flat @ flat.T, np.eye(nullity), atol=1e-12)


def test_for_slopes_on_a_line_the_graph_is_known():
    """x < 0 keeps the K smallest slopes, x > 0 the K largest."""
    m = Mixture([0.0, 0.3, -0.2, 0.1], [[-3.0], [-1.0], [1.5], [0.0]], np.zeros((4, 1)), np.arange(4.0), np.ones(4), 2)
    graph = coactivation_graph(m, GRID)
    assert graph.component.tolist() == [0, 0, 1, 1]
    assert sorted(graph.regions)[:2] == [(0, 1), (2, 3)]  # at x = 0 all tie, and the two of lowest index are kept
    shifted = m.replace(gate_intercept=m.gate_intercept + jnp.array([0.7, 0.7, 0.0, 0.0]),
                        gate_coef=m.gate_coef - 0.4 * jnp.array([[1.0], [1.0], [0.0], [0.0]]))
    y = jnp.linspace(-3, 5, len(GRID))
    np.testing.assert_allclose(m.log_density(GRID, y), shifted.log_density(GRID, y), atol=1e-12)
    assert "{0, 1}, {2, 3}" in repr(graph)


def test_with_one_active_expert_nothing_but_the_partition_is_identified():
    report = identifiability(example("S0"), np.linspace(0, 1, 200))
    assert (report.graph.components, report.free, report.partition_only, report.identified) == (2, 2, True, False)
    assert report.parameters == 2 * 3
    assert "only the partition" in repr(report)
    np.testing.assert_allclose(report.graph.masses, [0.68, 0.32], atol=0.005)


def test_dead_experts_and_equal_experts_are_reported():
    m = Mixture([0.0, 0.0, -50.0], [[1.0], [-1.0], [0.0]], [[1.0], [1.0], [0.0]], [0.0, 1e-3, 5.0], [1.0, 1.0, 1.0], 2, "logit")
    report = identifiability(m, GRID)
    assert report.graph.dead.tolist() == [2]
    assert not report.identified
    assert report.closest == (0, 1)
    assert report.separation == pytest.approx(1e-3)
    assert report.parameters == (3 - 2) * 2 + 2 * 3
    assert "dead experts" in report._repr_html_()


def test_certain_gates_and_ties_are_reported():
    m = Mixture([0.0, 0.0], [[1e4], [0.0]], [[1.0], [-1.0]], [0.0, 0.0], [1.0, 1.0], 2, "logit")
    assert identifiability(m, GRID).diverging == [(0, 1)]
    assert identifiability(example("S1"), GRID).ties == pytest.approx(1 / 401)
    assert identifiability(example("S1"), np.delete(GRID, 200, axis=0)).identified


def test_admissible_copies_are_those_of_the_statement():
    assert admissible_multiplicities(example("S1"), 4, 3, GRID[::2][:-1] + 1e-3) == [(1, 2, 1)]
    s1, s0 = example("S1"), example("S0")
    x, unit = np.delete(GRID, 200, axis=0), np.linspace(0, 1, 200)
    assert admissible_multiplicities(s1, 4, 2, x) == []
    assert admissible_multiplicities(s1, 5, 3, x) == [(2, 1, 2)]
    assert admissible_multiplicities(s1, 5, 4, x) == [(1, 3, 1)]
    assert admissible_multiplicities(s1, 6, 4, x) == [(2, 2, 2)]
    assert admissible_multiplicities(example("S1", selection="logit"), 4, 3, x) == []
    assert admissible_multiplicities(example("S1", selection="logit"), 6, 4, x) == [(2, 2, 2)]
    assert admissible_multiplicities(s0, 3, 2, unit) == []
    assert admissible_multiplicities(s0, 4, 2, unit) == [(2, 2)]
    both = np.linspace(-1, 1, 200)
    assert admissible_multiplicities(s0.replace(selection="slope"), 3, 1, both) == [(1, 2), (2, 1)]
    assert admissible_multiplicities(s0, 3, 1, unit) == []


@pytest.mark.parametrize(("name", "selection", "dim"), [("S3", "slope", 2), ("S0", "logit", 1), ("S1", "slope", 1)])
def test_boundaries_move_in_proportion_to_the_gate_except_for_slopes_on_a_line(name, selection, dim):
    truth, rng = example(name, selection=selection), np.random.default_rng(0)
    x = rng.uniform(-1, 1, (40_000, 2)) if dim == 2 else np.linspace(-1, 1, 200_001)[:, None] + 1e-7
    before, eta = np.asarray(truth.routing(x)), np.array([0.3, 0.1, 0.03])
    intercept, coef = rng.normal(size=truth.experts), rng.normal(size=truth.gate_coef.shape)
    missed = [np.mean((np.asarray(truth.replace(gate_intercept=truth.gate_intercept + e * intercept, gate_coef=truth.gate_coef + e * coef).routing(x))
                       != before).any(axis=1)) for e in eta]
    if (selection, dim) == ("slope", 1):
        assert missed == [0.0, 0.0, 0.0]
    else:
        assert np.polyfit(np.log(eta), np.log(missed), 1)[0] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: coactivation_graph(3.0, GRID), ArgumentError, "mixture must be a Mixture, got float"),
    (lambda: coactivation_graph(example("S1"), np.ones((3, 2))), ShapeError, "x must have shape"),
    (lambda: null_directions("S1", GRID), ArgumentError, "mixture must be a Mixture"),
    (lambda: identifiability(None, GRID), ArgumentError, "mixture must be a Mixture"),
    (lambda: admissible_multiplicities(example("S1"), 2, 2, GRID), ArgumentError, "experts must be a whole number at least 3"),
    (lambda: admissible_multiplicities(example("S1"), 4, 5, GRID), ArgumentError, "active must be a whole number at least 1 and at most 4"),
])
def test_wrong_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
