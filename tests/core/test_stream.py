"""Batches are functions of the step, blocks are the batches in order, sums count every row once."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from theorylab.core import stream
from theorylab.core.stream import Batches, BlockReader, EndOfData, Rows, Stream, as_stream, fold
from theorylab.errors import ArgumentError, PrecisionError, ShapeError, StorageError

FEW = settings(max_examples=20, deadline=None, derandomize=True)
# rows, batch_size, block_rows
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([0, 1, 5, 17])).map(lambda t: (t[0] * t[1] + t[2], t[0] * t[1], t[0]))


def row_numbers(rows, number):
    """The row numbers that pass `number` gives, in order, and those it leaves out; the data are arange."""
    batches = [rows.batch(number * rows.per_pass + k) for k in range(rows.per_pass)]
    rest = rows.left_over(number)
    return np.concatenate(batches).tolist(), [] if rest is None else rest.tolist()


def settled_threads():
    """Names of live reader threads, after those that are ending have ended."""
    until = time.monotonic() + 5
    while (names := [t.name for t in threading.enumerate() if t.name == "theorylab-reader"]) and time.monotonic() < until:
        time.sleep(0.01)
    return names


# ---------------------------------------------------------------------------------------------------------------- rows


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


# ---------------------------------------------------------------------------------------------------------------- iterators


def test_an_iterator_gives_its_batches_in_order_skips_forward_and_says_when_it_ends():
    batches = Batches(iter([10, 11, 12, 13]))
    assert [batches.batch(k) for k in (0, 0, 2, 2, 3)] == [10, 10, 12, 12, 13]
    with pytest.raises(EndOfData, match="the data ended after 4 batches; batch 4 was asked for"):
        batches.batch(4)
    with pytest.raises(ArgumentError, match="an iterator cannot go back: batch 1 was asked for, and 4 batches have been taken"):
        batches.batch(1)


def test_anything_with_the_two_members_is_a_stream_and_other_things_are_not():
    rows = Rows(np.zeros(4), 2)
    assert isinstance(rows, Stream) and as_stream(rows) is rows
    assert isinstance(as_stream([1, 2]), Batches)
    for wrong in (np.zeros(3), "file.npy", {"x": 1}):
        with pytest.raises(ArgumentError, match=r"data must be a stream or an iterable of batches.*Rows\(data, batch_size\)"):
            as_stream(wrong)
    with pytest.raises(ArgumentError, match=r"data must be a stream \(per_pass and batch\(step\)\)"):
        as_stream(3)
    with pytest.raises(ArgumentError, match="iterable must give batches"):
        Batches("abc")


# ---------------------------------------------------------------------------------------------------------------- blocks


class Counting:
    """Batch k holds the number k; remembers what was asked."""

    per_pass = None

    def __init__(self, end=10**9, shape=(2,)):
        self.end, self.shape, self.asked = end, shape, []

    def batch(self, step):
        self.asked.append((step, threading.current_thread().name))
        if step >= self.end:
            raise EndOfData("no more")
        return {"k": np.full(self.shape, step, np.int32), "half": np.asarray(step / 2)}


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_LENGTH", 4)


@pytest.mark.parametrize(("start", "steps", "end"), [(0, 11, 99), (5, 11, 99), (0, 8, 99), (3, None, 10), (0, 50, 10), (0, None, 8)])
def test_blocks_are_the_batches_in_order_from_any_step_at_one_shape(short_blocks, start, steps, end):
    with BlockReader(Counting(end), steps) as reader:
        reader.seek(start)
        seen, shapes, block = [], set(), reader.next()
        while block.end > block.first:
            assert block.first == start + len(seen)
            count = block.end - block.first
            seen += np.asarray(block.arrays["k"])[:count, 0].tolist()
            assert np.asarray(block.arrays["half"])[:count].tolist() == [k / 2 for k in range(block.first, block.end)]
            shapes.add(block.arrays["k"].shape)
            block = reader.next()
    assert seen == list(range(start, min(end, steps or 10**9)))
    assert shapes == {(4, 2)}
    assert settled_threads() == []


def test_a_step_inside_the_current_block_gives_that_block_again(short_blocks):
    with BlockReader(Counting()) as reader:
        block = reader.block(6)
        assert (block.first, block.end) == (6, 10)
        assert reader.block(9) is block
        assert reader.block(10).first == 10


def test_the_next_block_is_read_while_the_current_one_is_in_use(short_blocks):
    source = Counting()
    with BlockReader(source) as reader:
        reader.next()
        until = time.monotonic() + 10
        while len(source.asked) < 8 and time.monotonic() < until:
            time.sleep(0.005)
        assert [step for step, _ in source.asked] == list(range(8))
        assert {name for step, name in source.asked if step} == {"theorylab-reader"}


def test_batches_beyond_the_steps_are_never_asked_for(short_blocks):
    source = Counting()
    with BlockReader(source, 6) as reader:
        while (block := reader.next()).end > block.first:
            pass
        assert reader.block(6).arrays["k"].shape == (4, 2)
    assert [step for step, _ in source.asked] == list(range(6))


def test_waiting_is_counted(short_blocks):
    class Slow(Counting):
        def batch(self, step):
            time.sleep(0.02)
            return super().batch(step)

    with BlockReader(Slow()) as reader:
        reader.next()
        assert reader.wait_seconds >= 3 * 0.02


def test_an_error_of_the_stream_keeps_its_type_names_the_batch_and_leaves_no_thread(short_blocks):
    class Broken(Counting):
        def batch(self, step):
            if step == 6:
                raise ConnectionError("disk gone")
            return super().batch(step)

    with pytest.raises(ConnectionError, match="disk gone") as caught, BlockReader(Broken()) as reader:
        while True:
            reader.next()
    assert caught.value.__notes__ == ["while reading batch 6 of the data"]
    assert settled_threads() == []


def test_closing_ends_a_reader_in_the_middle_of_a_block():
    class Slow(Counting):
        def batch(self, step):
            time.sleep(0.01 if step >= 256 else 0)
            return super().batch(step)

    source = Slow()
    reader = BlockReader(source)
    reader.block(0)                                 # 256 batches; the next 256 are being read
    reader.close()
    reader.close()
    assert settled_threads() == []
    assert len(source.asked) < 2 * 256 - 100


@pytest.mark.parametrize(("odd", "error", "match"), [
    (np.zeros(3), ShapeError, r"batch 5, leaf \(the batch itself\) has shape \(3,\), and in batch 0 it was \(2,\)"),
    (np.zeros(2, np.float32), PrecisionError, "batch 5, leaf .* is float32, and in batch 0 it was float64"),
    ((np.zeros(2),), ShapeError, "batch 5 has the structure"),
])
def test_a_batch_unlike_the_first_is_named(odd, error, match):
    with pytest.raises(error, match=match), BlockReader(Batches([np.zeros(2)] * 5 + [odd])) as reader:
        reader.next()


def test_a_leaf_is_named_by_its_path():
    with pytest.raises(ShapeError, match=r"batch 1, leaf \['y'\]\[0\] has shape \(2,\)"), \
            BlockReader(Batches([{"y": [np.zeros(1)]}, {"y": [np.zeros(2)]}])) as reader:
        reader.next()


def test_empty_and_wordy_data_are_refused():
    with pytest.raises(EndOfData, match="ended after 0 batches"), BlockReader(Batches([])) as reader:
        reader.first()
    with pytest.raises(ShapeError, match="batch 0 holds no arrays"), BlockReader(Batches([{}])) as reader:
        reader.first()
    with pytest.raises(ArgumentError, match=r"leaf \['t'\] must hold numbers, got <U3"), BlockReader(Batches([{"t": np.array(["abc"])}])) as reader:
        reader.first()


def test_64_bit_batches_are_refused_in_32_bit_mode():
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(PrecisionError, match="is float64 and 64-bit mode is off"), BlockReader(Batches([np.zeros(2)])) as reader:
            reader.first()
        with pytest.raises(PrecisionError, match=r"initial\['s'\] is float64"):
            fold(moments, Batches([np.zeros(2, np.float32)]), {"s": np.zeros(2)})
        with BlockReader(Batches([np.zeros(2, np.float32)])) as reader:
            assert reader.next().arrays.dtype == np.float32
    finally:
        jax.config.update("jax_enable_x64", True)


@pytest.mark.parametrize(("shape", "length"), [((2,), 256), ((2**20,), 8), ((2**24,), 1)])
def test_a_block_holds_at_most_64_mib_and_256_batches(shape, length):
    assert BlockReader(Batches([np.zeros(shape)])).length == length


# ---------------------------------------------------------------------------------------------------------------- sums


def moments(total, x):
    return {"n": total["n"] + x.shape[0], "s": total["s"] + x.sum(0), "q": total["q"] + x.T @ x}


def zero(d):
    return {"n": np.zeros((), int), "s": np.zeros(d), "q": np.zeros((d, d))}


@pytest.mark.parametrize("shuffle", ["none", "blocks"])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_fold_counts_every_row_once_per_pass_in_one_compile_and_one_for_the_rest(short_blocks, tmp_path, shuffle, passes):
    x = np.asarray(jax.random.normal(jax.random.key(0), (107, 3)))
    np.save(tmp_path / "x.npy", x)
    traces = []

    def update(total, batch):
        traces.append(batch.shape)
        return moments(total, batch)

    total = fold(update, Rows(tmp_path / "x.npy", 5, shuffle=shuffle), zero(3), passes=passes)
    assert int(total["n"]) == passes * 107
    np.testing.assert_allclose(total["s"], passes * x.sum(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(total["q"], passes * x.T @ x, rtol=1e-12, atol=1e-12)
    assert sorted(traces) == [(2, 3), (5, 3), (5, 3)]     # a shape check and one compile; one compile for the rest


def test_a_fold_over_an_iterator_reads_to_its_end(short_blocks):
    total = fold(moments, (np.full((2, 1), float(k)) for k in range(9)), zero(1))
    assert (int(total["n"]), float(total["s"][0])) == (18, 72.0)


def test_the_order_of_a_fold_is_the_order_of_the_stream(short_blocks):
    hashed = fold(lambda h, k: (h * 31 + k) % 10007, list(np.arange(10)), np.int64(7))
    expected = 7
    for k in range(10):
        expected = (expected * 31 + k) % 10007
    assert int(hashed) == expected


def test_wrong_updates_and_passes_are_named():
    rows = Rows(np.zeros((6, 2)), 2)
    with pytest.raises(ShapeError, match=r"update must keep shape and dtype of the total: initial has float64\[2\], update gives float64\[2, 2\]"):
        fold(lambda t, x: t + x, rows, np.zeros(2))
    with pytest.raises(ShapeError, match="update must give a total of the structure of initial"):
        fold(lambda t, x: (t, t), rows, np.zeros(2))
    with pytest.raises(ArgumentError, match="passes must be 1 for an iterator"):
        fold(moments, iter([np.zeros((2, 2))]), zero(2), passes=2)
    with pytest.raises(ArgumentError, match="passes must be a whole number of at least 1, got 0"):
        fold(moments, rows, zero(2), passes=0)


def test_a_fold_reports_progress_and_closes_the_bar():
    class Seen:
        def __init__(self):
            self.calls = []

        def start(self, label, total):
            self.calls.append((label, total))

        def update(self, done, note=""):
            self.calls.append(done)

        def close(self):
            self.calls.append("closed")

    seen = Seen()
    fold(lambda t, x: t + jnp.sum(x), Rows(np.zeros(6), 2), 0.0, progress=seen)
    assert seen.calls == [("fold", 3), 3, "closed"]


def test_the_default_device_of_the_caller_holds_even_on_the_helper_thread():
    device = jax.devices()[-1]
    with jax.default_device(device), BlockReader(Counting()) as reader:
        assert reader.next().arrays["k"].devices() == {device}
