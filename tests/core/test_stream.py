"""Batches are functions of the step, blocks are the batches in order, sums count every row once."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings, strategies as st

from theorylab.core import stream
from theorylab.core.stream import Batches, BlockReader, EndOfData, Rows, Stream, as_stream, fold
from theorylab.errors import ArgumentError, PrecisionError, ShapeError

FEW = settings(max_examples=20, deadline=None, derandomize=True)
# rows, batch_size, block_rows
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([0, 1, 5, 17])).map(lambda t: (t[0] * t[1] + t[2], t[0] * t[1], t[0]))


def settled_threads():
    """Names of live reader threads, after those that are ending have ended."""
    until = time.monotonic() + 5
    while (names := [t.name for t in threading.enumerate() if t.name == "theorylab-reader"]) and time.monotonic() < until:
        time.sleep(0.01)
    return names


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
