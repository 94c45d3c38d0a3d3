"""Clusters against SciPy's connected components, the rank diagnostic against a dense SVD, the rescaling against the flow it removes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings, strategies as st
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import ArgumentError, ShapeError
from theorylab.transformer_pde.clusters import _roots, attention_rank, cluster_count, clusters, rescaled

POINTS = np.random.default_rng(0).normal(size=(120, 2))
HEAD = tp.Softmax(np.array([[0.5, 0.2], [-0.1, 0.4]]), np.array([[0.3, -0.4], [0.2, 0.5]]), np.array([[0.6, -0.3], [0.2, 0.5]]))


@settings(max_examples=10, deadline=None)
@given(radius=st.floats(0.0, 1.5), seed=st.integers(0, 100))
def test_the_clusters_are_the_components_that_scipy_finds(radius, seed):
    rng = np.random.default_rng(seed)
    points, weights = rng.normal(size=(120, 2)), rng.dirichlet(np.ones(120))
    found = clusters(tp.Cloud(points, weights), radius, tile=32)
    count, labels = connected_components(cdist(points, points) <= radius)
    assert found.count == count == int(cluster_count(tp.Cloud(points), radius, tile=32))
    assert len(set(zip(labels.tolist(), found.labels.tolist(), strict=True))) == count                  # a one-to-one renaming
    k = int(found.labels[-1])
    inside = found.labels == k
    np.testing.assert_allclose(found.masses[k], weights[inside].sum())
    np.testing.assert_allclose(found.centers[k], weights[inside] @ points[inside] / weights[inside].sum())
    assert found.masses.sum() == pytest.approx(1.0)


def test_a_long_chain_is_one_cluster():
    line = np.random.default_rng(1).permutation(np.arange(120.0))[:, None] * np.ones((1, 2))
    assert clusters(tp.Cloud(line), 1.5, tile=32).count == 1
    assert clusters(tp.Cloud(line), 1.4, tile=32).count == 120


def test_clusters_far_smaller_than_their_distance_from_the_origin_are_told_apart():
    tight = 1.0 + 1e-9 * np.arange(120)[:, None] * np.ones((1, 2))
    tight[60:] += 1e-6
    assert clusters(tp.Cloud(tight), 1e-8, tile=32).count == 2


def test_tokens_of_weight_zero_have_a_cluster_with_their_mean():
    found = clusters(tp.Cloud(np.array([[0.0], [1.0]]), np.array([1.0, 0.0])), 0.1)
    assert found.count == 2 and found.masses.tolist() == [1.0, 0.0] and np.isfinite(found.centers).all()


def test_no_array_of_all_pairs_is_formed():
    n, tile = 8192, 64
    program = _roots.lower(jax.ShapeDtypeStruct((n, 2), float), 0.1, tile).compile()
    assert program.memory_analysis().temp_size_in_bytes < 40 * n * 2 * 8 < n * n


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["softmax", "l2"])
def test_the_attention_rank_is_that_of_the_dense_matrix(kind):
    head = {"softmax": tp.Softmax, "l2": tp.L2}[kind](HEAD.Q, HEAD.K, HEAD.V, scale=2.0)
    weights = np.random.default_rng(1).dirichlet(np.ones(120))
    q, k = POINTS @ np.asarray(HEAD.Q).T, POINTS @ np.asarray(HEAD.K).T
    logits = 2 * q @ k.T if kind == "softmax" else -2 * cdist(q, k, "sqeuclidean")
    p = weights * np.exp(logits)
    values = scipy.linalg.svdvals(p / p.sum(1, keepdims=True))
    gaps = [r for r in range(1, 30) if values[r - 1] > 1.2 * values[r]]                         # thresholds with no singular value close to them
    assert len(gaps) > 8
    for r in gaps[:: len(gaps) // 4]:
        tolerance = np.sqrt(values[r - 1] * values[r]) / values[0]
        assert int(attention_rank(head, tp.Cloud(POINTS, weights), tolerance, tile=32)) == r
    assert int(attention_rank(head, tp.Cloud(POINTS, weights), 1e-6, most=3, tile=32)) == 3


def test_tokens_in_two_clusters_have_attention_of_rank_two():
    centers = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert int(attention_rank(HEAD, tp.Cloud(centers[np.arange(120) % 2]), 1e-8, tile=32)) == 2


def test_the_rescaling_removes_the_linear_flow():
    times = np.array([0.0, 0.5, 1.0])
    V = np.asarray(HEAD.V)
    grown = np.stack([POINTS @ scipy.linalg.expm(t * V).T for t in times])
    np.testing.assert_allclose(rescaled(HEAD, tp.Cloud(grown), times).points, np.stack([POINTS] * 3), rtol=1e-12)
    scalar = tp.Softmax(HEAD.Q, HEAD.K, 0.5)
    np.testing.assert_allclose(rescaled(scalar, tp.Cloud(np.exp(0.5) * POINTS), 1.0).points, POINTS, rtol=1e-12)


@pytest.mark.slow
def test_clusters_are_counted_along_a_run():
    head = tp.Softmax(jnp.eye(2), jnp.eye(2), -1.0)
    sol = tl.integrate(tp.Particles(head, 32), POINTS, [0.0, 1.0, 2.0], record=lambda t, y: {"clusters": cluster_count(y, 0.1, tile=32)})
    assert sol.history["clusters"].tolist() == [clusters(jax.tree.map(lambda a, i=i: a[i], sol.value), 0.1, tile=32).count for i in range(3)]


def test_wrong_arguments_are_named():
    cloud = tp.Cloud(POINTS)
    with pytest.raises(ArgumentError, match="radius must be a number at least 0, got -1"):
        clusters(cloud, -1.0)
    with pytest.raises(ArgumentError, match="cloud must be a Cloud, got ndarray"):
        clusters(POINTS, 1.0)
    with pytest.raises(ShapeError, match="no leading axes"):
        cluster_count(tp.Cloud(POINTS[None]), 1.0)
    with pytest.raises(ArgumentError, match="use cluster_count there"):
        jax.jit(lambda x: clusters(tp.Cloud(x), 1.0).count)(POINTS)
    with pytest.raises(ArgumentError, match="attention must be softmax or L2"):
        attention_rank(tp.Exponential(HEAD.Q, HEAD.K, HEAD.V), cloud)
    with pytest.raises(ArgumentError, match="tolerance must be a number above 0 and below 1"):
        attention_rank(HEAD, cloud, 2.0)
    with pytest.raises(ShapeError, match=r"times must have shape \(\)"):
        rescaled(HEAD, cloud, [0.0, 1.0])
    with pytest.raises(ArgumentError, match="single head"):
        rescaled(tp.MultiHead([HEAD]), cloud, 1.0)
    with pytest.raises(ShapeError, match="must have dimension 2"):
        rescaled(HEAD, tp.Cloud(np.zeros((4, 3))), 1.0)
