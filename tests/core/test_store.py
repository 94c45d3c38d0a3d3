"""Files are whole or absent, damage is noticed, and a saved result comes back equal."""

import errno
import json
import os
import subprocess
import sys
import zipfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from theorylab.core import store, structure
from theorylab.core.module import Module, choice, number, size
from theorylab.core.problem import Event
from theorylab.core.solution import History, Solution, Stats, Status
from theorylab.errors import ArgumentError, CheckpointMismatchError, PrecisionError, ShapeError, StorageError


def named_function(x):
    return x


class Pair(NamedTuple):
    left: Any
    right: Any


class Tuned(Module):
    """A module outside theorylab."""

    scale: Any = number()
    rank: int = size(3)
    rule: Any = choice(named_function)


def example_solution(runs=None, method=None):
    shape = () if runs is None else (runs,)
    valid = np.ones((4, *shape), bool)
    if runs:
        valid[2:, 0] = False
    columns = {"gap": np.arange(4.0 * (runs or 1)).reshape(4, *shape), "eigenvalues": np.arange(8.0 * (runs or 1)).reshape(4, *shape, 2)}
    history = History(columns, {"step": np.arange(4), "seconds": np.linspace(0, 1, 4)}, valid)
    status = Status.CONVERGED if runs is None else np.array([1, 5, 1][:runs])
    value = {"x": jnp.arange(3.0), "low": jnp.ones(2, jnp.bfloat16), "z": jnp.array([1 + 2j]), "key": jax.random.key(3), "n": (jnp.int32(4), None)}
    return Solution(value, status, 7, history, Stats(0.5, 0.25, 0.0, 3, "float64", "cpu", {"rejected": 2}), {"settings": {"every": 1}}, method)


def assert_same(a, b):
    """Equal in structure, types, dtypes and every bit."""
    assert type(a) is type(b)
    if isinstance(a, (jax.Array, np.ndarray)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert getattr(a, "weak_type", False) == getattr(b, "weak_type", False)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif hasattr(a, "__dataclass_fields__"):
        for name in a.__dataclass_fields__:
            assert_same(getattr(a, name), getattr(b, name))
    else:
        assert a == b or (a != a and b != b)


# ---------------------------------------------------------------------------------------------------------------- write and read


NUMPY_DTYPES = ["float64", "float32", "float16", "int64", "int8", "uint32", "complex128", "bool", "<U5", "datetime64[s]"]


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_every_numpy_dtype_and_shape_comes_back(tmp_path, dtype):
    arrays = {str(shape): np.zeros(shape, dtype) for shape in [(), (0,), (3,), (2, 0, 3)]}
    arrays["fortran"] = np.asfortranarray(np.arange(6).reshape(2, 3).astype(dtype))
    back, header = store.read(store.write(tmp_path / "a.npz", arrays, {"n": 1}))
    assert_same(back, arrays)
    assert header == {"n": 1}


def test_bfloat16_and_typed_keys_of_any_generator_come_back(tmp_path):
    arrays = {"b": np.asarray(jnp.linspace(0, 1, 5, dtype=jnp.bfloat16)), "0d": np.asarray(jnp.bfloat16(2)),
              "k": jax.random.split(jax.random.key(1), 3), "r": jax.random.key(2, impl="rbg")}
    back, _ = store.read(store.write(tmp_path / "a.npz", arrays, {}))
    assert_same(back, arrays)


def test_numpy_alone_can_read_the_arrays_and_the_header(tmp_path):
    path = store.write(tmp_path / "a.npz", {"x/y": np.arange(3)}, {"who": "me"})
    with np.load(path, allow_pickle=False) as file:
        assert file["x/y"].tolist() == [0, 1, 2]
        assert json.loads(file[store.HEADER].tobytes())["header"] == {"who": "me"}


def test_equal_contents_give_equal_bytes(tmp_path):
    a, b = (store.write(tmp_path / name, {"x": np.arange(9.0)}, {"s": 1}) for name in ("a.npz", "b.npz"))
    assert a.read_bytes() == b.read_bytes()


def test_header_alone_is_read_and_numpy_scalars_in_it_become_numbers(tmp_path):
    path = store.write(tmp_path / "a.npz", {}, {"a": np.float32(0.5), "b": (1, 2), "c": np.arange(2), "p": tmp_path / "q"})
    assert store.read_header(path) == {"a": 0.5, "b": [1, 2], "c": [0, 1], "p": str(tmp_path / "q")}


@pytest.mark.parametrize(("arrays", "header", "match"), [
    ({"x": np.array([object()])}, {}, "'x' holds Python objects"),
    ({store.HEADER: np.zeros(1)}, {}, "is taken by the header"),
    ({}, {"f": named_function}, "holds function"),
    ({}, {(1, 2): 3}, "header: keys must be str"),
])
def test_what_cannot_be_stored_is_refused_before_a_file_appears(tmp_path, arrays, header, match):
    with pytest.raises(ArgumentError, match=match):
        store.write(tmp_path / "a.npz", arrays, header)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------- whole or not at all


def test_missing_folders_are_made_and_other_users_may_read_the_file(tmp_path):
    path = store.write(tmp_path / "a" / "b" / "c.npz", {"x": np.zeros(2)}, {})
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_older_file_survives_a_failed_write_and_nothing_else_remains(tmp_path, monkeypatch, code, call):
    path = store.write(tmp_path / "a.npz", {"x": np.arange(3)}, {"v": 1})
    before = path.read_bytes()

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=f"a.npz cannot be written: {os.strerror(code)}"):
        store.write(path, {"x": np.arange(9)}, {"v": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_during_a_write_leaves_the_older_file_and_no_other(tmp_path):
    path = store.write(tmp_path / "a.npz", {"x": np.arange(3)}, {})
    before = path.read_bytes()

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_bytes(path, interrupted)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_place_of_the_folder_and_a_folder_in_place_of_the_file_are_storage_errors(tmp_path):
    (tmp_path / "plain").write_text("x")
    with pytest.raises(StorageError, match="plain"):
        store.write(tmp_path / "plain" / "a.npz", {}, {})
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(StorageError, match="folder cannot be written"):
        store.write(tmp_path / "folder", {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "plain"]


def test_a_missing_file_and_a_folder_are_storage_errors_that_are_also_os_errors(tmp_path):
    with pytest.raises(StorageError, match=r"nothing\.npz cannot be read: No such file"):
        store.read(tmp_path / "nothing.npz")
    with pytest.raises(OSError, match="directory"):
        store.read(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- damage


CONTENT = {"x": np.arange(20.0), "k": np.arange(4, dtype=np.int8)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return store.write(tmp_path_factory.mktemp("damage") / "whole.npz", CONTENT, {"step": 12, "note": "text"})


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused_by_name_and_left_alone(whole, tmp_path, cut):
    content = whole.read_bytes()
    damaged = tmp_path / "cut.npz"
    damaged.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(CheckpointMismatchError, match=r"cut\.npz is damaged or not a theorylab file"):
        store.read(damaged)
    assert damaged.stat().st_size == int(cut * len(content))


def test_a_flipped_bit_is_noticed_or_harmless(whole, tmp_path):
    """Every byte in turn: the arrays and the header are never silently different. Bytes that only concern unpacking tools may change."""
    content, damaged, noticed = whole.read_bytes(), tmp_path / "flip.npz", set()
    for place in range(len(content)):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1:])
        try:
            arrays, header = store.read(damaged)
        except CheckpointMismatchError as error:
            assert "flip.npz" in str(error)
            noticed.add(place)
        else:
            assert_same(arrays, CONTENT)
            assert header == {"step": 12, "note": "text"}
    for part in (CONTENT["x"].tobytes(), CONTENT["k"].tobytes(), b'"step": 12, "note": "text"'):
        first = content.index(part)
        assert noticed.issuperset(range(first, first + len(part)))


def test_files_of_others_are_refused_with_what_was_found(tmp_path):
    np.savez(tmp_path / "foreign.npz", weights=np.zeros(2))
    with pytest.raises(CheckpointMismatchError, match=r"foreign.npz was not made by theorylab.*weights.npy"):
        store.read(tmp_path / "foreign.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(CheckpointMismatchError, match=r"text\.npz"):
        store.read_header(tmp_path / "text.npz")


def test_a_missing_array_and_a_newer_format_are_refused(tmp_path):
    path = store.write(tmp_path / "a.npz", {"x": np.zeros(2), "y": np.zeros(2)}, {})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "less.npz", "w") as new:
        for name in old.namelist():
            if name != "y.npy":
                new.writestr(name, old.read(name))
    with pytest.raises(CheckpointMismatchError, match="names the array 'y'"):
        store.read(tmp_path / "less.npz")
    np.savez(tmp_path / "newer.npz", **{store.HEADER: np.frombuffer(b'{"theorylab": 2}', np.uint8)})
    with pytest.raises(CheckpointMismatchError, match="has format 2, and this version of theorylab reads format 1"):
        store.read(tmp_path / "newer.npz")


def test_pickled_content_is_never_loaded(tmp_path):
    np.savez(tmp_path / "p.npz", **{store.HEADER: np.array([{"theorylab": 1}], dtype=object)})
    with pytest.raises(CheckpointMismatchError, match=r"p\.npz.*allow_pickle"):
        store.read(tmp_path / "p.npz")


# ---------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("runs", [None, 3])
def test_a_solution_comes_back_equal_in_every_part(tmp_path, runs):
    sol = example_solution(runs, method=Event("blow-up", named_function, Status.BLOWUP))
    assert_same(store.load(sol.save(tmp_path / "s.npz")), sol)


OBJECTS = [np.float32(1.5), np.arange(3), jnp.arange(2), jnp.asarray(0.5), Status.BLOWUP, np.dtype("float32"), float, named_function]
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4), st.complex_numbers(),
                   st.sampled_from(OBJECTS))


def branches(trees):
    lists, names = st.lists(trees, max_size=3), st.text(max_size=3)
    return st.one_of(lists, lists.map(tuple), st.dictionaries(names, trees, max_size=3), st.dictionaries(st.integers(), trees, max_size=2),
                     st.tuples(trees, trees).map(lambda pair: Pair(*pair)), st.floats(0, 1).map(Tuned))


TREES = st.recursive(LEAVES, branches, max_leaves=8)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(value=TREES)
def test_description_and_rebuilding_are_inverse_through_json(value):
    arrays = {}
    described = json.loads(json.dumps(structure.describe(value, arrays)))
    rebuilt = structure.rebuild(described, arrays, "here")
    if value is float:
        assert rebuilt == structure.NotStored("<class 'float'>")
    elif float not in jax.tree.leaves(value):
        assert_same(rebuilt, value)


def test_what_has_no_name_is_kept_as_text_and_says_so_when_called(tmp_path):
    loaded = store.load(store.save(tmp_path / "a.npz", {"f": lambda x: x, "g": os.getpid}))
    with pytest.raises(TypeError, match=r"<lambda>.*was not stored in the file"):
        loaded["f"](1)
    assert isinstance(loaded["g"], structure.NotStored)


def test_a_class_that_was_not_imported_comes_back_as_a_dict_with_a_warning(tmp_path):
    store.save(tmp_path / "a.npz", {"m": Tuned(0.5), "p": Pair(1, 2), "s": Status.BLOWUP})
    code = ("import sys, warnings; from theorylab.core import store\n"
            "with warnings.catch_warnings(record=True) as seen:\n    warnings.simplefilter('always'); r = store.load(sys.argv[1])\n"
            "print(r['p'], sorted(r['m']), repr(r['s']), 'test_store' in sys.modules); print(*[w.message for w in seen], sep='\\n')")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.npz")], capture_output=True, text=True, timeout=120, check=True).stdout
    assert out.startswith("{'left': 1, 'right': 2} ['rank', 'rule', 'scale'] <Status.BLOWUP: 5> False\n")
    assert out.count("comes back as a dict of its fields: it was not found; import ") == 2


@pytest.mark.parametrize("address", ["posix:system", "builtins:eval", "theorylab.core.store:os.system", "subprocess:Popen", "no_such_module:f",
                                     "theorylab.no_such_module:f", "theorylab.core.store:jax.jit"])
def test_a_file_cannot_reach_code_outside_the_trusted_packages(address):
    assert isinstance(structure.rebuild({"name": address}, {}, "here"), structure.NotStored)
    with pytest.warns(UserWarning, match="comes back as a dict of its fields"):
        assert structure.rebuild({"class": address, "fields": {"args": "rm"}}, {}, "here") == {"args": "rm"}


def test_a_class_whose_fields_have_changed_comes_back_as_a_dict():
    address = f"{Tuned.__module__}:Tuned"
    with pytest.warns(UserWarning, match="its fields are now scale, rank, rule, and the file holds scale"):
        assert structure.rebuild({"class": address, "fields": {"scale": 1.0}}, {}, "here") == {"scale": 1.0}


def test_loading_a_checkpoint_as_a_result_is_refused(tmp_path):
    path = store.write(tmp_path / "c.npz", {}, {"kind": "checkpoint"})
    with pytest.raises(CheckpointMismatchError, match="kind 'checkpoint', not a saved result"):
        store.load(path)


def test_64_bit_arrays_are_not_silently_shortened_in_32_bit_mode(tmp_path):
    path = store.save(tmp_path / "a.npz", {"x": jnp.arange(2.0)})
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(PrecisionError, match="holds float64 arrays and 64-bit mode is off"):
            store.load(path)
    finally:
        jax.config.update("jax_enable_x64", True)


# ---------------------------------------------------------------------------------------------------------------- tables


def test_the_table_has_one_line_per_valid_row_and_run_and_spreads_vectors():
    frame = example_solution(runs=3).to_pandas()
    assert list(frame.columns) == ["run", "step", "seconds", "gap", "eigenvalues_0", "eigenvalues_1"]
    assert len(frame) == 4 * 3 - 2
    line = frame[(frame.run == 2) & (frame.step == 3)].iloc[0]
    assert (line.gap, line.eigenvalues_0, line.eigenvalues_1) == (11.0, 22.0, 23.0)
    assert set(frame[frame.run == 0].step) == {0, 1}


def test_the_table_of_one_run_has_no_column_of_runs():
    frame = example_solution().to_pandas()
    assert "run" not in frame and frame.gap.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_column_of_another_length_is_refused():
    with pytest.raises(ShapeError, match=r"'gap' has shape \(3,\), expected 4 rows"):
        store.to_pandas(History({"gap": np.zeros(3)}, {}, np.ones(4, bool)))
