"""Keys are addresses: a function of seed, purpose, run and step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorylab.core.keys import as_key, run_key, run_keys, step_key, stream
from theorylab.errors import ArgumentError


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_seeds_typed_keys_and_old_keys_mean_the_same():
    assert data(as_key(7)) == data(as_key(jax.random.key(7))) == data(as_key(np.int64(7))) == data(as_key(jax.random.PRNGKey(7)))


def test_addresses_do_not_collide_and_do_not_move():
    keys = [data(stream(0, p)) for p in ("start", "init", "data")] + [data(step_key(run_key(0, r), k)) for r in range(5) for k in range(5)]
    assert len(set(keys)) == len(keys)
    assert data(stream(0, "start")) == data(stream(0, "start"))


def test_a_batch_of_keys_is_the_keys_one_by_one():
    batch = run_keys(3, 4)
    assert [data(batch[r]) for r in range(4)] == [data(run_key(3, r)) for r in range(4)]
    assert data(jax.jit(lambda r: run_key(3, r))(jnp.asarray(2))) == data(run_key(3, 2))


@pytest.mark.parametrize("bad", ["0", 1.5, True, np.zeros(3), jax.random.split(jax.random.key(0))])
def test_what_is_no_key_is_refused(bad):
    with pytest.raises(ArgumentError, match="key must be an integer seed or one JAX random key"):
        as_key(bad)
