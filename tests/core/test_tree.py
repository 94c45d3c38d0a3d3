"""Norms, choices and tests over pytrees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorylab.core import tree
from theorylab.errors import NonFiniteInputError

TREE = {"a": jnp.array([3.0, 0.0]), "b": (jnp.array([[4.0]]), jnp.array([7]))}


def test_norm_and_inner_run_over_all_floating_entries():
    assert float(tree.norm(TREE)) == 5.0 and float(tree.inner(TREE, TREE)) == 25.0
    assert float(tree.norm(jnp.array([3 + 4j]))) == 5.0
    assert float(tree.norm(())) == 0.0


def test_select_takes_lanes():
    new, old = {"x": jnp.ones((2, 3))}, {"x": jnp.zeros((2, 3))}
    assert tree.select(jnp.array([True, False]), new, old)["x"].tolist() == [[1, 1, 1], [0, 0, 0]]


def test_strong_drops_weak_types_only():
    out = tree.strong({"weak": jnp.asarray(0.5), "key": jax.random.key(0), "count": jnp.zeros((), jnp.int32)})
    assert not out["weak"].weak_type and out["count"].dtype == jnp.int32


def test_is_traced_sees_tracers_and_the_compiler():
    assert not tree.is_traced(TREE)
    seen = []
    jax.jit(lambda x: seen.append((tree.is_traced(x), tree.is_traced(1.0))) or x)(1.0)
    jax.vmap(lambda x: seen.append((tree.is_traced(x), tree.is_traced(1.0))) or x)(jnp.ones(2))
    assert seen == [(True, True), (True, False)]


def test_check_finite_names_argument_leaf_and_index():
    with pytest.raises(NonFiniteInputError, match=r"state\['b'\] must be finite, got inf at index \(1,\) \(1 of 2 entries"):
        tree.check_finite("state", {"a": np.ones(2), "b": jnp.array([0.0, jnp.inf])})
    assert tree.check_finite("state", TREE) is TREE
