"""Replicates do not depend on blocks, ranks or interruptions; files of a sweep are resumed, extended or refused, never lost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lab.walks import PARAMS, ROUND_OFF, StopAfter, assert_expected, files, walk
from theorylab.core import store
from theorylab.core.keys import run_key
from theorylab.core.solution import Status
from theorylab.errors import ArgumentError, CheckpointMismatchError, PrecisionError, RunWarning, StorageError, UnknownNameError
from theorylab.lab import blocks
from theorylab.lab.replicates import Replicates
from theorylab.lab.sweep import gather, sweep

# ---------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(("replicates", "chunk"), [(40, None), (20, 6), (20, 20), (5, 100), (3, 1)])
def test_replicates_are_those_of_a_plain_loop_whatever_the_blocks(replicates, chunk):
    assert_expected(sweep(walk, PARAMS, replicates, key=0, chunk=chunk))


def test_blocks_and_new_numbers_share_one_compilation():
    traces = []

    def run(params, key, i):
        traces.append(1)
        return {"x": params["a"] * params["b"] + jax.random.uniform(key)}

    for a in (0.25, np.float64(0.75)):
        sweep(run, {"a": a, "b": np.ones(2)}, 23, key=1, chunk=5)
        sweep(run, {"a": a, "b": np.zeros(2)}, 5, key=2)
    assert len(traces) == 1


def test_numbers_adopt_the_precision_of_the_data_and_arrays_keep_theirs():
    def run(params, key, i):
        return {"y": params["x"] * params["step"], "z": params["count"] + i, "word": jnp.asarray(len(params["word"]))}

    result = sweep(run, {"x": np.ones(2, np.float32), "step": 0.5, "count": 3, "word": "four"}, 2, key=0)
    assert result["y"].dtype == np.float32 and result["z"].tolist() == [3, 4] and result["word"].tolist() == [4, 4]


def test_named_entries_shape_arrays_and_others_say_how():
    def run(params, key, i):
        return {"mean": jax.random.normal(key, (params["n"],)).mean()}

    result = sweep(run, {"n": np.int64(3)}, 2, key=0, shapes=("n",))
    np.testing.assert_allclose(result["mean"], [np.mean(jax.random.normal(run_key(0, i), (3,))) for i in range(2)], rtol=ROUND_OFF)
    with pytest.raises(TypeError, match=r"Name the entries that shape arrays: shapes=\('n',\)"):
        sweep(run, {"n": 3}, 2, key=0)


def test_bad_ends_are_counted_and_kept():
    def run(params, key, i):
        return {"status": jnp.where(i % 3 == 0, jnp.int32(Status.NONFINITE), jnp.int32(Status.CONVERGED)), "x": i}

    with pytest.warns(RunWarning, match="3 of 7 replicates did not end as asked: 3 NONFINITE; they are in the columns"):
        result = sweep(run, {}, 7, key=0)
    assert result.statuses == {"CONVERGED": 4, "NONFINITE": 3} and result.failed == 3
    assert result["x"].tolist() == list(range(7))
    assert "3 NONFINITE" in repr(result)


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_finished_sweep_is_read_and_not_computed(tmp_path, computed):
    first = sweep(walk, PARAMS, 20, key=0, chunk=6, out=tmp_path / "a" / "b")
    before = files(tmp_path / "a" / "b")
    assert sorted(before) == [f"block{b:05d}.npz" for b in range(4)]
    computed.clear()
    again = sweep(walk, PARAMS, 20, key=0, chunk=6, out=str(tmp_path / "a" / "b"))
    assert computed == [] and files(tmp_path / "a" / "b") == before
    assert_expected(again)
    assert all((first[name] == again[name]).all() and first[name].dtype == again[name].dtype for name in first)


def test_a_deleted_block_alone_is_computed_again(tmp_path):
    sweep(walk, PARAMS, 20, key=0, chunk=6, out=tmp_path)
    before = files(tmp_path)
    (tmp_path / "block00002.npz").unlink()
    assert_expected(sweep(walk, PARAMS, 20, key=0, chunk=6, out=tmp_path))
    changed = {name for name, stamp in files(tmp_path).items() if before[name] != stamp}
    assert changed == {"block00002.npz"}


def test_more_replicates_reuse_the_blocks_and_fewer_lose_none(tmp_path):
    sweep(walk, PARAMS, 14, key=0, chunk=6, out=tmp_path)
    before = files(tmp_path)
    assert_expected(sweep(walk, PARAMS, 20, key=0, chunk=6, out=tmp_path))
    after = files(tmp_path)
    assert {name for name in before if before[name] == after[name]} == {"block00000.npz", "block00001.npz"}    # the third was not full
    assert_expected(sweep(walk, PARAMS, 9, key=0, chunk=6, out=tmp_path))
    assert files(tmp_path) == after


def test_other_files_and_half_written_ones_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".block00000.npz.123-abcd.tmp").write_bytes(b"half")
    assert_expected(sweep(walk, PARAMS, 5, key=0, out=tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def other_walk(params, key, i):
    return {"x": jnp.zeros(()), "n": i, "i": i, "pair": jnp.zeros(2)}


FOREIGN = [
    ({"params": {"shrink": 0.4}}, "different params"),
    ({"params": {"shrink": 0.5, "more": 1}}, "different params"),
    ({"key": 1}, "different key"),
    ({"chunk": 3}, "different chunk .here 3, in the file 6"),
    ({"run": other_walk}, "different run .*other_walk.*, source of run"),
]


@pytest.mark.parametrize(("change", "match"), FOREIGN)
def test_a_folder_of_another_sweep_is_refused_before_computing(tmp_path, computed, change, match):
    sweep(walk, PARAMS, 12, key=0, chunk=6, out=tmp_path)
    (tmp_path / "block00000.npz").unlink()          # there would be something to compute
    before = files(tmp_path)
    computed.clear()
    call = {"run": walk, "params": PARAMS, "key": 0, "chunk": 6} | change
    with pytest.raises(CheckpointMismatchError, match=match) as caught:
        sweep(call["run"], call["params"], 12, key=call["key"], chunk=call["chunk"], out=tmp_path)
    assert "block00001.npz belongs to another sweep" in str(caught.value)
    assert files(tmp_path) == before and computed == []


def test_a_damaged_block_is_refused_before_computing_and_the_message_says_how_to_go_on(tmp_path, computed):
    sweep(walk, PARAMS, 20, key=0, chunk=6, out=tmp_path)
    content = (tmp_path / "block00002.npz").read_bytes()
    (tmp_path / "block00002.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "block00000.npz").unlink()
    before = files(tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"block00002\.npz is damaged.*If you delete this one file, sweep computes its block again"):
        sweep(walk, PARAMS, 20, key=0, chunk=6, out=tmp_path)
    assert files(tmp_path) == before and computed == [0, 6, 12, 18]
    (tmp_path / "block00002.npz").unlink()
    assert_expected(sweep(walk, PARAMS, 20, key=0, chunk=6, out=tmp_path))


def test_a_renamed_block_and_another_kind_of_file_are_refused(tmp_path):
    sweep(walk, PARAMS, 12, key=0, chunk=6, out=tmp_path)
    (tmp_path / "block00001.npz").rename(tmp_path / "block00000.npz")
    with pytest.raises(CheckpointMismatchError, match=r"block00000\.npz is not block 0 of a sweep"):
        sweep(walk, PARAMS, 12, key=0, chunk=6, out=tmp_path)
    store.write(tmp_path / "block00000.npz", {}, {"kind": "something"})
    with pytest.raises(CheckpointMismatchError, match=r"block00000\.npz is not block 0 of a sweep \('something'"):
        sweep(walk, PARAMS, 12, key=0, chunk=6, out=tmp_path)


def test_what_a_function_is_bound_to_belongs_to_its_identity(tmp_path):
    def make(scale):
        def run(params, key, i):
            return {"x": scale * i.astype(float)}
        return run

    @dataclasses.dataclass(frozen=True)
    class Runner:
        scale: float

        def __call__(self, params, key, i):
            return {"x": self.scale * i.astype(float)}

        def method(self, params, key, i):
            return {"x": self.scale * i.astype(float)}

    def free(scale, params, key, i):
        return {"x": scale * i.astype(float)}

    def identity(run):
        return blocks._function(run)

    for kind in (make, Runner, lambda s: Runner(s).method, lambda s: functools.partial(free, s)):
        assert identity(kind(2.0)) == identity(kind(2.0))
        assert identity(kind(2.0)) != identity(kind(3.0))
    assert identity(jax.jit(make(2.0))) == identity(make(2.0))
    sweep(make(2.0), {}, 3, key=0, out=tmp_path)
    assert sweep(make(2.0), {}, 3, key=0, out=tmp_path)["x"].tolist() == [0, 2, 4]
    with pytest.raises(CheckpointMismatchError, match="different source of run"):
        sweep(make(3.0), {}, 3, key=0, out=tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_before_computing(tmp_path, computed):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="out: .*file cannot be used as a folder"):
        sweep(walk, PARAMS, 5, key=0, out=tmp_path / "file")
    assert computed == []


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_interrupt_keeps_the_finished_blocks(tmp_path, on_disk):
    progress = StopAfter(12)
    with pytest.warns(RunWarning, match="the sweep was interrupted: 12 of 20 replicates are there"):
        part = sweep(walk, PARAMS, 20, key=0, chunk=6, out=tmp_path if on_disk else None, progress=progress)
    assert progress.closed and progress.total == 20
    assert_expected(part, range(12))
    assert part.missing.tolist() == list(range(12, 20)) and "missing=12-19" in repr(part)
    assert len(files(tmp_path)) == (2 if on_disk else 0)


# ---------------------------------------------------------------------------------------------------------------- ranks


def test_ranks_share_the_blocks_and_the_last_one_sees_all(tmp_path):
    parts = [sweep(walk, PARAMS, 40, key=0, chunk=6, out=tmp_path, rank=rank, world=3) for rank in range(3)]
    assert [part.n for part in parts] == [16, 28, 40]        # blocks 0, 3, 6 (the last has 4); then 1, 4; then 2, 5
    assert_expected(parts[2])


def test_a_rank_without_a_folder_holds_its_own_blocks():
    part = sweep(walk, PARAMS, 20, key=0, chunk=6, rank=1, world=3)
    assert_expected(part, range(6, 12))
    assert part.missing.tolist() == [*range(6), *range(12, 20)]
    empty = sweep(walk, PARAMS, 6, key=0, chunk=6, rank=1, world=2)
    assert empty.n == 0 and empty["pair"].shape == (0, 2) and empty["n"].dtype == np.int32


@pytest.mark.parametrize(("rank", "world"), blocks.QUEUES)
def test_the_variables_of_a_queue_count_where_ranks_can_meet(tmp_path, monkeypatch, rank, world):
    monkeypatch.setenv(rank, "1")
    monkeypatch.setenv(world, "2")
    with pytest.warns(RunWarning, match=rf"6 of 12 replicates are there: this is rank 1 of 2 \({rank}\)"):
        part = sweep(walk, PARAMS, 12, key=0, chunk=6, out=tmp_path)
    assert_expected(part, range(6, 12))
    assert_expected(sweep(walk, PARAMS, 12, key=0, chunk=6))
    assert_expected(sweep(walk, PARAMS, 12, key=0, chunk=6, out=tmp_path, rank=0, world=1))


@pytest.mark.parametrize(("rank", "world", "match"), [
    (0, None, "rank and world go together"), (2, 2, "rank must be a whole number from 0 to world - 1, got rank=2, world=2"),
    (-1, 2, "got rank=-1"), (0.0, 2, "got rank=0.0"),
])
def test_wrong_ranks_are_named(rank, world, match):
    with pytest.raises(ArgumentError, match=match):
        sweep(walk, PARAMS, 4, key=0, rank=rank, world=world)


def test_a_queue_that_speaks_in_riddles_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4(x2)")
    with pytest.raises(ArgumentError, match=r"SLURM_NTASKS='4\(x2\)' are not whole numbers; pass rank and world"):
        sweep(walk, PARAMS, 4, key=0, out=tmp_path)


def test_gather_without_its_service_says_what_to_do():
    with pytest.raises(ArgumentError, match=r"gather needs jax\.distributed\.initialize\(\).*a folder `out`"):
        gather(sweep(walk, PARAMS, 5, key=0))


# ---------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"run": 3}, ArgumentError, "run must be a function of"),
    ({"replicates": 0}, ArgumentError, "replicates must be a whole number of at least 1, got 0"),
    ({"replicates": 2.5}, ArgumentError, "replicates must be a whole number"),
    ({"chunk": 0}, ArgumentError, "chunk must be a whole number of at least 1, got 0"),
    ({"key": "seed"}, ArgumentError, "key must be an integer seed"),
    ({"client": "tcp://"}, ArgumentError, "client must be a distributed.Client, got str"),
    ({"progress": "yes"}, ArgumentError, "progress must be"),
    ({"shapes": "n"}, ArgumentError, r"shapes must be a tuple of names such as \('n',\)"),
    ({"shapes": ("m",)}, ArgumentError, r"shapes=\['m'\], params has 'shrink'"),
    ({"shapes": ("shrink",), "params": {"shrink": np.ones(2)}}, ArgumentError, "shapes names 'shrink', which holds an array"),
])
def test_wrong_arguments_are_named(change, error, match):
    call = {"run": walk, "params": PARAMS, "replicates": 4, "key": 0} | change
    with pytest.raises(error, match=match):
        sweep(**call)


@pytest.mark.parametrize(("value", "match"), [
    (3.0, "run must return a dict of arrays, got "), ({}, "run must return a dict of arrays, got dict"), ({1: jnp.zeros(())}, "got the name 1"),
    ({"x": {"y": jnp.zeros(())}}, "its entry 'x' is a dict"), ({"x": "word"}, "its entry 'x' is a str"),
    ({"k": jax.random.key(0)}, "is a random key"),
])
def test_wrong_results_of_run_are_named(value, match):
    with pytest.raises(ArgumentError, match=match):
        sweep(lambda params, key, i: value, {}, 2, key=0)


def test_an_error_in_run_comes_out_as_it_is():
    def run(params, key, i):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        sweep(run, {}, 2, key=0)


def test_a_sweep_inside_compiled_code_is_refused():
    with pytest.raises(ArgumentError, match="cannot be called inside jit"):
        jax.jit(lambda s: sweep(walk, {"shrink": s}, 4, key=0)["x"])(0.5)


def test_64_bit_arrays_are_refused_in_32_bit_mode():
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(PrecisionError, match="params holds a float64 array and 64-bit mode is off"):
            sweep(walk, {"shrink": np.ones(2)}, 4, key=0)
    finally:
        jax.config.update("jax_enable_x64", True)


# ---------------------------------------------------------------------------------------------------------------- results


def test_replicates_have_a_table_a_file_and_a_face(tmp_path):
    result = sweep(walk, PARAMS, 5, key=0)
    frame = result.to_pandas()
    assert list(frame.columns) == ["replicate", "i", "n", "pair_0", "pair_1", "x"] and frame.pair_1.tolist() == (-result["x"]).tolist()
    back = store.load(result.save(tmp_path / "r.npz"))
    assert isinstance(back, Replicates) and back.total == 5 and back.provenance == result.provenance
    assert all((back[name] == result[name]).all() for name in result)
    assert repr(result) == "Replicates(n=5, columns=i, n, pair, x)"
    assert "float64[5, 2]" in result._repr_html_()
    assert "walk" in result.provenance["settings"]["run"] and result.provenance["settings"]["seed"] == 0
    with pytest.raises(UnknownNameError, match="column 'pairs' is not known; did you mean 'pair'"):
        result["pairs"]
