"""What every test runs under: 64-bit mode, strict promotion, checked annotations, one thread per process, no files outside temporary folders."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

# Before JAX starts: workers run side by side, so each keeps to one thread, and pictures need no screen.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (loaded before the hook below looks for it)

install_import_hook("theorylab", "tests.typecheck.shapes")

import jax
import numpy as np
import pytest

import theorylab
from tests.budget import (  # noqa: F401  (pytest finds the hooks by their names here)
    pytest_collection_finish,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="session")
def _caches_in_a_temporary_folder(tmp_path_factory):
    """Results of figures and data sets go to a folder of this run, so a test neither finds nor leaves anything."""
    before = {name: os.environ.get(name) for name in ("THEORYLAB_CACHE", "THEORYLAB_DATA")}
    os.environ["THEORYLAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("THEORYLAB_DATA", None)
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _global_state_is_left_alone():
    """A test that switches precision or promotion, or leaves a figure open, fails by itself and not in its neighbour."""
    yield
    assert jax.config.jax_enable_x64, "the test left 64-bit mode off"
    assert jax.config.jax_numpy_dtype_promotion == "strict", "the test left strict promotion off"
    import sys

    plots = sys.modules.get("matplotlib.pyplot")
    if plots is not None:
        plots.close("all")


_calls = itertools.count(1)


def _drop_programs(most: int) -> None:
    """Drop compiled programs when there are many: they fill memory, and Linux gives a process no more than 65530 maps of it."""
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > most:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_few():
    yield
    _drop_programs(8_000)


@pytest.fixture(autouse=True)
def _compiled_programs_are_few_in_a_long_file():
    yield
    if next(_calls) % 20 == 0:
        _drop_programs(16_000)


@pytest.fixture
def rng():
    """A NumPy generator for data of tests."""
    return np.random.default_rng(0)


@pytest.fixture
def package():
    """The package under test."""
    return theorylab
