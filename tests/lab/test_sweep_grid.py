"""A grid is one table with an axis per parameter: few compilations, keys that do not move, and folders that resume."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lab.walks import ROUND_OFF, TRACES, StopAfter, files
from theorylab.core import store
from theorylab.core.keys import run_key, stream
from theorylab.core.module import Module, number, size
from theorylab.errors import ArgumentError, CheckpointMismatchError, RunWarning
from theorylab.lab.replicates import Table
from theorylab.lab.sweep import sweep, sweep_grid


def line(params, key, i):
    TRACES.append(1)
    return {"y": params["slope"] * i.astype(float) + params["offset"], "u": jax.random.uniform(key), "i": i}


def test_a_grid_of_numbers_is_one_compilation_with_axes_in_order(traces):
    table = sweep_grid(line, {"slope": [1.0, 2.0, 4.0], "offset": [10, 20]}, 5, key=0)
    assert len(traces) == 1
    assert table.slope.tolist() == [1, 2, 4] and table.offset.tolist() == [10, 20] and table["y"].shape == (3, 2, 5)
    slope, offset, i = np.meshgrid([1.0, 2.0, 4.0], [10, 20], np.arange(5), indexing="ij")
    assert (table["y"] == slope * i + offset).all() and table["i"].dtype == np.int32
    assert len(np.unique(table["u"])) == 30


def test_a_point_of_a_grid_is_the_sweep_with_its_own_key_and_new_values_leave_it_alone():
    table = sweep_grid(line, {"slope": [1.0, 2.0], "offset": [10]}, 6, key=3, chunk=5)
    alone = sweep(line, {"slope": 2.0, "offset": 10}, 6, key=stream(3, "slope=2.0,offset=10"))
    np.testing.assert_allclose(table["u"][1, 0], alone["u"], rtol=ROUND_OFF)
    longer = sweep_grid(line, {"slope": [0.5, 2.0, 1.0], "offset": [10]}, 8, key=3)
    np.testing.assert_allclose(longer["u"][2:0:-1, :, :6], table["u"], rtol=ROUND_OFF)


def sample_mean(params, key, i):
    TRACES.append(1)
    return {"mean": params["scale"] * jax.random.normal(key, (params["n"],)).mean() + params["data"].sum()}


def test_axes_that_shape_arrays_compile_once_per_value_and_resume_in_their_folders(tmp_path, traces, computed):
    grid = {"n": [3, 5], "scale": [1.0, 2.0, 3.0]}
    options = {"key": 0, "params": {"data": np.arange(3.0)}, "shapes": ("n",), "out": tmp_path, "chunk": 4}
    table = sweep_grid(sample_mean, grid, 4, **options)
    assert len(traces) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n=3", "n=5"] and len(list((tmp_path / "n=3").iterdir())) == 3
    key = run_key(stream(0, "n=5,scale=3.0"), 2)
    np.testing.assert_allclose(table["mean"][1, 2, 2], 3 * np.mean(jax.random.normal(key, (5,))) + 3, rtol=1e-13)
    before = files(tmp_path / "n=3")
    computed.clear()
    longer = sweep_grid(sample_mean, {"n": [3, 7, 5], "scale": grid["scale"]}, 4, **options)
    assert computed == [0, 4, 8] and len(traces) == 3 and files(tmp_path / "n=3") == before
    assert (longer["mean"][[0, 2]] == table["mean"]).all()
    with pytest.raises(CheckpointMismatchError, match="n=3.*different params"):
        sweep_grid(sample_mean, {"n": [9, 3], "scale": [1.0]}, 4, **options)
    assert not list((tmp_path / "n=9").glob("*.npz")) and len(traces) == 3


class Rule(Module):
    factor: object = number()
    power: int = size(1)


def test_words_functions_and_modules_are_axes(traces):
    def run(params, key, i):
        TRACES.append(1)
        base = {"sum": jnp.sum, "max": jnp.max}[params["how"]](jnp.arange(3.0))
        return {"y": params["rule"].factor * base ** params["rule"].power + params["act"](i).astype(float)}

    rules = [Rule(1.0), Rule(2.0), Rule(2.0, power=2)]
    table = sweep_grid(run, {"rule": rules, "how": ["sum", "max"], "act": [jnp.negative]}, 2, key=0)
    assert table["y"][..., 0, 0].tolist() == [[3, 2], [6, 4], [18, 8]] and (table["y"][..., 1] == table["y"][..., 0] - 1).all()
    assert len(traces) == 4 and table.rule is not rules and table.rule[2] == rules[2]      # two words times two structures


def test_a_partial_grid_is_marked_by_nan_and_missing(tmp_path):
    grid = {"slope": [1.0, 2.0], "offset": [0.0]}
    part = sweep_grid(line, grid, 6, key=0, chunk=4, rank=0, world=2)
    assert part.done.sum() == 8 and len(part.missing) == 4 and "missing=4 of 12" in repr(part)
    assert np.isnan(part["y"][~part.done]).all() and np.isfinite(part["y"][part.done]).all() and part["i"].dtype == np.float64
    assert len(part.to_pandas()) == 8
    with pytest.warns(RunWarning, match="interrupted: 4 of 12"):
        sweep_grid(line, grid, 6, key=0, chunk=4, out=tmp_path, progress=StopAfter(4))
    assert sweep_grid(line, grid, 6, key=0, chunk=4, out=tmp_path).done.all()


def test_a_table_has_a_frame_a_file_and_a_face(tmp_path):
    table = sweep_grid(line, {"slope": [1.0, 2.0], "offset": [10]}, 2, key=0)
    frame = table.to_pandas()
    assert list(frame.columns) == ["slope", "offset", "replicate", "i", "u", "y"] and frame.y.tolist() == [10, 11, 10, 12]
    back = store.load(table.save(tmp_path / "t.npz"))
    assert isinstance(back, Table) and (back["u"] == table["u"]).all() and back.slope.tolist() == [1, 2]
    assert repr(table) == "Table(slope=2 values, offset=1 values, replicates=2, columns=i, u, y)"
    assert "slope" in table._repr_html_()
    with pytest.raises(AttributeError, match="no attribute 'slopes'; its axes are slope, offset"):
        table.slopes


@pytest.mark.parametrize(("change", "match"), [
    ({"grid": {}}, "grid must be a dict"), ({"grid": [1]}, "grid must be a dict"), ({"grid": {"n": 3}}, r"grid\['n'\] must be a sequence"),
    ({"grid": {"n": []}}, r"grid\['n'\] must be a sequence of at least one value"), ({"grid": {"save": [1]}}, "'save' cannot name an axis"),
    ({"grid": {"n": [1, 2, 1]}}, r"grid\['n'\] holds 1 twice"), ({"params": {"slope": 1}}, "grid and params both have an entry 'slope'"),
    ({"shapes": ("m",)}, "shapes names 'm', which is neither an axis of grid nor an entry of params"),
])
def test_wrong_grids_are_named(change, match):
    call = {"grid": {"slope": [1.0], "offset": [0.0]}, "replicates": 2, "key": 0} | change
    with pytest.raises(ArgumentError, match=match):
        sweep_grid(line, **call)


def test_columns_of_other_shapes_at_other_points_are_refused():
    with pytest.raises(ArgumentError, match=r"run must return 'x' in one shape at all points of the grid, got \(2,\) and \(3,\)"):
        sweep_grid(lambda params, key, i: {"x": jnp.zeros(params["n"])}, {"n": [2, 3]}, 2, key=0, shapes=("n",))
