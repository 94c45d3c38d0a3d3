"""Batches of rows are functions of the step: files, columns, shuffled passes, weights, sparse matrices."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings, strategies as st

from theorylab.core.stream import Batches, Rows, fold
from theorylab.errors import ArgumentError, ShapeError, StorageError

FEW = settings(max_examples=20, deadline=None, derandomize=True)
# rows, batch_size, block_rows
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([0, 1, 5, 17])).map(lambda t: (t[0] * t[1] + t[2], t[0] * t[1], t[0]))


def row_numbers(rows, number):
    """The row numbers that pass `number` gives, in order, and those it leaves out; the data are arange."""
    batches = [rows.batch(number * rows.per_pass + k) for k in range(rows.per_pass)]
    rest = rows.left_over(number)
    return np.concatenate(batches).tolist(), [] if rest is None else rest.tolist()


@FEW
@given(sizes=SIZES, number=st.integers(0, 3))
def test_a_pass_in_order_is_the_array_and_left_over_is_its_end(sizes, number):
    n, batch, _ = sizes
    given_rows, rest = row_numbers(Rows(np.arange(n), batch), number)
    assert given_rows + rest == list(range(n))
    assert len(rest) == n % batch


@FEW
@given(sizes=SIZES, number=st.integers(0, 3), seed=st.integers(-5, 5))
def test_a_shuffled_pass_has_every_row_once_in_whole_blocks(sizes, number, seed):
    n, batch, block = sizes
    given_rows, rest = row_numbers(Rows(np.arange(n), batch, shuffle="blocks", block_rows=block, seed=seed), number)
    assert sorted(given_rows + rest) == list(range(n))
    assert len(given_rows) == n // batch * batch
    assert (np.diff(np.reshape(given_rows, (-1, block)), axis=1) == 1).all()


def test_the_order_depends_on_seed_and_pass_and_on_nothing_else():
    make = lambda seed: Rows(np.arange(50), 5, shuffle="blocks", seed=seed)
    rows = make(1)
    forward = [rows.batch(k).tolist() for k in range(30)]
    assert [rows.batch(k).tolist() for k in reversed(range(30))] == forward[::-1]
    assert [make(1).batch(k).tolist() for k in (29, 0, 12)] == [forward[k] for k in (29, 0, 12)]
    assert forward[:10] != forward[10:20]
    assert [make(2).batch(k).tolist() for k in range(10)] != forward[:10]


def test_what_a_shuffled_pass_drops_changes_from_pass_to_pass():
    rows = Rows(np.arange(53), 5, shuffle="blocks")
    assert len({tuple(rows.left_over(number).tolist()) for number in range(6)}) > 1


def test_files_give_the_batches_of_the_arrays_in_them(tmp_path):
    x, y = np.arange(24.0).reshape(12, 2), np.arange(12)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    files = Rows({"x": tmp_path / "x.npy", "y": str(tmp_path / "y.npy")}, 5, shuffle="blocks", block_rows=1, seed=3)
    arrays = Rows({"x": x, "y": y}, 5, shuffle="blocks", block_rows=1, seed=3)
    for k in range(4):
        assert (files.batch(k)["x"] == arrays.batch(k)["x"]).all() and (files.batch(k)["y"] == arrays.batch(k)["y"]).all()
        assert (files.batch(k)["x"][:, 0] == 2 * files.batch(k)["y"]).all()


def test_columns_split_a_matrix(tmp_path):
    views = np.arange(30.0).reshape(6, 5)
    np.save(tmp_path / "v.npy", views)
    left, right = Rows(tmp_path / "v.npy", 2, columns=(2, 3)).batch(2)
    assert (left == views[4:, :2]).all() and (right == views[4:, 2:]).all()


@pytest.mark.parametrize("form", [scipy.sparse.csr_matrix, scipy.sparse.csr_array])
def test_rows_of_a_sparse_matrix_are_those_of_the_full_one(form):
    full = np.where(np.arange(40) % 3 == 0, np.arange(40.0), 0.0).reshape(8, 5)
    sparse, given_full = (Rows(data, 2, shuffle="blocks", block_rows=2, seed=1) for data in (form(full), full))
    assert all((sparse.batch(k) == given_full.batch(k)).all() for k in range(8))
    add = lambda total, batch: total + batch.T @ batch
    parts = Batches(form(full[k : k + 4]) for k in (0, 4))
    np.testing.assert_allclose(fold(add, parts, jnp.zeros((5, 5))), full.T @ full)


@FEW
@given(sizes=SIZES, shuffle=st.sampled_from(["none", "blocks"]), number=st.integers(0, 2))
def test_weights_count_every_row_once_at_one_shape(sizes, shuffle, number):
    n, batch, block = sizes
    rows = Rows(np.arange(n, dtype=np.float32), batch, shuffle=shuffle, block_rows=block, remainder="weight")
    parts = [rows.batch(number * rows.per_pass + k) for k in range(rows.per_pass)]
    assert {(x.shape, w.shape, w.dtype.name) for x, w in parts} == {((batch,), (batch,), "float32")}
    counted = np.zeros(n)
    for x, w in parts:
        np.add.at(counted, x.astype(int), w)
    assert (counted == 1).all()
    assert rows.left_over(number) is None


@pytest.mark.parametrize(("arguments", "error", "match"), [
    ({"batch_size": 0}, ArgumentError, "batch_size must be a whole number of at least 1, got 0"),
    ({"batch_size": 7}, ArgumentError, "batch_size must be at most the number of rows, 6, got 7"),
    ({"batch_size": 2.0}, ArgumentError, "batch_size must be a whole number"),
    ({"columns": (1, 1)}, ShapeError, r"columns must add up to the 3 columns of the data, got 1 \+ 1 = 2"),
    ({"columns": (4, -1)}, ArgumentError, "columns must be a whole number of at least 1, got -1"),
    ({"shuffle": "rows"}, ArgumentError, "shuffle must be 'none' or 'blocks', got 'rows'"),
    ({"remainder": "keep"}, ArgumentError, "remainder must be 'drop' or 'weight', got 'keep'"),
    ({"block_rows": 3}, ArgumentError, "block_rows must divide batch_size = 4, got 3"),
    ({"seed": 0.5}, ArgumentError, "seed must be a whole number"),
    ({"data": (np.zeros(3), np.zeros(4))}, ShapeError, "same number of rows, got 3, 4"),
    ({"data": (np.zeros((6, 3)), np.zeros(6)), "columns": (1, 2)}, ArgumentError, "columns splits one matrix"),
    ({"data": np.float64(1)}, ShapeError, "axis of rows"),
    ({"data": 3}, ArgumentError, "data must be arrays or names of .npy files, got int"),
    ({"data": ()}, ArgumentError, "data holds no arrays"),
    ({"data": np.array([None])}, ArgumentError, "Python objects"),
])
def test_wrong_arguments_of_rows_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        Rows(**{"data": np.zeros((6, 3)), "batch_size": 4} | arguments)


def test_a_negative_step_is_refused():
    with pytest.raises(ArgumentError, match="step must be a whole number of at least 0, got -1"):
        Rows(np.zeros(4), 2).batch(-1)


def test_missing_foreign_and_truncated_files_are_named(tmp_path):
    with pytest.raises(StorageError, match=r"none\.npy cannot be read: No such file"):
        Rows(tmp_path / "none.npy", 1)
    (tmp_path / "text.npy").write_text("1 2 3")
    with pytest.raises(StorageError, match=r"text\.npy is damaged or not a \.npy file"):
        Rows(tmp_path / "text.npy", 1)
    np.save(tmp_path / "cut.npy", np.zeros(100))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:400])
    with pytest.raises(StorageError, match=r"cut\.npy is damaged"):
        Rows(tmp_path / "cut.npy", 1)
