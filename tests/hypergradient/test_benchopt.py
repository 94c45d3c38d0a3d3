"""The plug-in for the public benchmark of bilevel solvers, run by benchopt itself on simulated quadratics."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("benchopt", reason="benchopt is not installed")

FOLDER = Path(__file__).parents[2] / "benchmarks" / "benchopt_bilevel"


@pytest.mark.slow
def test_the_solvers_run_through_benchopt(tmp_path):
    import pandas as pd

    shutil.copytree(FOLDER, tmp_path / "bilevel")  # results are written into the folder of the benchmark
    command = [sys.executable, "-m", "benchopt", "run", "bilevel", "-d", "simulated", "-s", "theorylab", "-s", "theorylab-stochastic",
               "--max-runs", "25", "--timeout", "200", "--no-plot", "--no-html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_NUMPY_DTYPE_PROMOTION": "standard"})
    (result,) = tmp_path.glob("bilevel/outputs/*.parquet")
    table = pd.read_parquet(result)
    for name, level in (("theorylab[", 1e-4), ("theorylab-stochastic[", 1e-6)):  # single precision
        value = table[table["solver_name"].str.startswith(name)].sort_values("stop_val")["objective_value"].to_numpy()
        assert len(value) > 5 and value[0] > 1e-2 and value.min() < level * value[0], (name, value, done.stderr)
