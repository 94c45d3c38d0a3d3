"""Regions: boundaries, masses, pictures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorylab import errors, moe

S0, S1, S3 = moe.example("S0"), moe.example("S1"), moe.example("S3")
FOUR = moe.Mixture([0.3, -0.5, 0.1, 0.0], [[2.0], [-1.0], [0.5], [0.0]], np.zeros((4, 1)), np.zeros(4), np.ones(4), 2, "logit")


def uniform(key, n):
    return jax.random.uniform(key, (n, 1), minval=-1.0)


def test_the_boundary_of_the_two_lines_is_where_the_logits_cross():
    assert moe.boundaries(S0).tolist() == [0.32]
    assert moe.boundaries(S0, -1.0, 0.3).tolist() == []


def test_slope_selection_changes_only_at_the_origin():
    assert moe.boundaries(S1, -1.0, 1.0).tolist() == [0.0]
    assert moe.boundaries(moe.example("S1", active=3), -1.0, 1.0).tolist() == []


def test_boundaries_are_those_of_a_fine_grid():
    grid = np.linspace(-3, 3, 60001)
    routing = np.asarray(FOUR.routing(grid))
    changes = np.flatnonzero((routing[1:] != routing[:-1]).any(axis=1))
    np.testing.assert_allclose(moe.boundaries(FOUR, -3.0, 3.0), (grid[changes] + grid[changes + 1]) / 2, atol=1e-4)


def test_exact_masses_add_to_one_and_agree_with_draws():
    exact, drawn = FOUR.region_masses((-1.0, 1.0)), FOUR.region_masses(uniform)
    assert abs(exact.masses.sum() - 1) < 1e-15 and (exact.error == 0).all()
    assert (exact.members.sum(axis=1) == 2).all()
    seen = {tuple(m): (p, e) for m, p, e in zip(drawn.members.tolist(), drawn.masses, drawn.error, strict=True)}
    for members, mass in zip(exact.members.tolist(), exact.masses, strict=True):
        found, error = seen[tuple(members)]
        assert abs(found - mass) < 5 * error + 1e-12


def test_masses_of_weighted_points_are_sums_of_weights():
    regions = S1.region_masses((np.array([[-1.0], [1.0], [2.0]]), np.array([1.0, 1.0, 2.0])))
    assert regions.masses.tolist() == [0.75, 0.25]
    assert regions.members.tolist() == [[False, True, True], [True, True, False]]


def test_masses_in_two_dimensions_have_honest_errors():
    one, two = (S3.region_masses((-1.0, 1.0), key=key, samples=20000) for key in (0, 1))
    assert one.masses.shape == two.masses.shape
    sort = lambda r: r.masses[np.lexsort(r.members.T)]
    assert (np.abs(sort(one) - sort(two)) < 5 * np.sqrt(2) * 0.5 / np.sqrt(20000)).all()


@pytest.mark.parametrize("mixture", [FOUR, S3])
def test_regions_are_drawn(mixture):
    axes = moe.plot_regions(mixture, points=30)
    assert len(axes.texts) == len(mixture.region_masses((-1.0, 1.0), samples=2000).masses)


def test_a_fit_is_drawn_with_its_band_and_data():
    data = S1.sample(50, key=0, low=-1.0)
    axes = S1.plot(data=data)
    assert axes.get_xlabel() == "x"
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["90% band", "mean", "expert 0", "expert 1", "expert 2"]
    low, high = axes.collections[0].get_paths()[0].vertices[:, 1].min(), axes.collections[0].get_paths()[0].vertices[:, 1].max()
    assert low < float(jnp.min(S1.mean(data.x))) and high > float(jnp.max(S1.mean(data.x)))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: moe.boundaries(S3), errors.ArgumentError, "region_masses"),
    (lambda: moe.boundaries(S1, 1.0, 0.0), errors.ArgumentError, "low must be below high"),
    (lambda: S1.region_masses("uniform"), errors.ArgumentError, "law must be"),
    (lambda: S1.region_masses((np.zeros((3, 1)), np.ones(2))), errors.ShapeError, "weights must have shape"),
    (lambda: S1.region_masses((np.zeros((2, 1)), np.array([1.0, -1.0]))), errors.ArgumentError, "not be negative"),
    (lambda: moe.plot_regions(S1, 1.0, 0.0), errors.ArgumentError, "low must be below high"),
    (lambda: S1.plot(level=1.0), errors.ArgumentError, "level"),
    (lambda: moe.plot_regions(moe.Mixture([0.0], np.zeros((1, 3)), np.zeros((1, 3)), [0.0], [1.0], 1)), errors.ArgumentError, "one or two"),
])
def test_wrong_arguments_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
