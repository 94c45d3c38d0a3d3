"""One sweep, many devices, processes and workers: always the same replicates."""

import importlib.util
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from theorylab.core import store
from theorylab.errors import RunWarning
from theorylab.lab import blocks
from theorylab.lab.sweep import gather, sweep

pytestmark = pytest.mark.multiprocess
ROOT = pathlib.Path(__file__).parents[2]
QUIET = {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}}      # any free port, no dashboard
PATIENCE = 120                                      # seconds; a loaded machine needs some

JOB = '''
"""Runs of very different lengths; this file is imported by every process of the tests."""
import sys, time
import jax, jax.numpy as jnp, numpy as np
from theorylab.core import store
from theorylab.lab import blocks
from theorylab.lab.sweep import gather, sweep

REPLICATES, CHUNK, PARAMS = 40, 6, {"shrink": 0.75, "start": np.arange(1.0, 4.0)}

def run(params, key, i):
    x = params["start"] * jnp.exp(20 * jax.random.uniform(key) - 10)
    x, n = jax.lax.while_loop(lambda c: jnp.max(c[0]) > 1e-6, lambda c: (params["shrink"] * c[0], c[1] + 1), (x, jnp.zeros((), jnp.int32)))
    return {"x": x, "n": n, "large": n > 60}

def devices(folder):
    """The sweep on the first two and on all of four virtual devices."""
    assert len(jax.local_devices()) == 4
    whole = blocks.local_mesh
    for count in (2, 4):
        blocks.local_mesh = lambda: jax.sharding.Mesh(whole().devices[:count], ("replicates",))
        sweep(run, PARAMS, REPLICATES, key=0, chunk=CHUNK).save(f"{folder}/devices{count}.npz")

class Slow:
    def start(self, label, total): pass
    def update(self, done, note=""): time.sleep(0.2)
    def close(self): pass

def slowly(folder):
    """The share of a rank that the queue names, slowly enough to be killed in the middle."""
    sweep(run, PARAMS, REPLICATES, key=0, chunk=CHUNK, out=f"{folder}/out", progress=Slow())

def member(folder, port, rank):
    """One of two processes of jax.distributed."""
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(rank), initialization_timeout=60)
    part = sweep(run, PARAMS, REPLICATES, key=0, chunk=CHUNK)
    part.save(f"{folder}/part{rank}.npz")
    gather(part).save(f"{folder}/whole{rank}.npz")
    jax.distributed.shutdown()

def main():
    globals()[sys.argv[1]](*sys.argv[2:])
'''


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The module of the job, importable by its children under the same name."""
    path = tmp_path_factory.mktemp("job") / "sweep_job.py"
    path.write_text(JOB)
    spec = importlib.util.spec_from_file_location("sweep_job", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep_job"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sweep_job"]


@pytest.fixture(scope="module")
def alone(job):
    """The whole sweep in this process."""
    return sweep(job.run, job.PARAMS, job.REPLICATES, key=0, chunk=job.CHUNK)


def start(job, *arguments, **environment):
    paths = os.pathsep.join([str(pathlib.Path(job.__file__).parent), str(ROOT)])
    variables = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen([sys.executable, "-c", "import sweep_job; sweep_job.main()", *map(str, arguments)], env=variables,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    assert process.returncode == 0, out + err


def assert_equal(result, reference):
    assert result.index.tolist() == reference.index.tolist()
    assert result["n"].tolist() == reference["n"].tolist() and result["large"].tolist() == reference["large"].tolist()
    assert result["large"].dtype == bool and result["n"].dtype == np.int32
    np.testing.assert_allclose(result["x"], reference["x"], rtol=1e-14)


def test_one_two_and_four_devices_give_the_same_replicates(job, alone, tmp_path):
    finish(start(job, "devices", tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false"))
    for count in (2, 4):                            # this process has one
        assert_equal(store.load(tmp_path / f"devices{count}.npz"), alone)
    assert alone["n"].max() > 2 * alone["n"].min()     # lanes of very different lengths


def test_two_ranks_meet_in_a_folder_and_a_killed_one_goes_on_where_it_stopped(job, alone, tmp_path, monkeypatch):
    out, child = tmp_path / "out", start(job, "slowly", tmp_path, SLURM_PROCID="1", SLURM_NTASKS="2")
    until = time.monotonic() + PATIENCE
    while len(list(out.glob("block*.npz"))) < 2 and child.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    killed = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("block*.npz")}
    assert set(killed) in ({"block00001.npz", "block00003.npz"}, {"block00001.npz", "block00003.npz", "block00005.npz"})      # of 1, 3, 5

    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.warns(RunWarning, match=r"of 40 replicates are there: this is rank 0 of 2 \(SLURM_PROCID\)") if len(killed) < 3 else nullcontext():
        sweep(job.run, job.PARAMS, job.REPLICATES, key=0, chunk=job.CHUNK, out=out)
    monkeypatch.setenv("SLURM_PROCID", "1")
    computed, compute = [], blocks.compute
    monkeypatch.setattr(blocks, "compute", lambda task, mesh, first, *rest: (computed.append(first // 6), compute(task, mesh, first, *rest))[1])
    whole = sweep(job.run, job.PARAMS, job.REPLICATES, key=0, chunk=job.CHUNK, out=out)
    assert [f"block{b:05d}.npz" for b in computed] == sorted({"block00001.npz", "block00003.npz", "block00005.npz"} - set(killed))
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in killed} == killed
    assert_equal(whole, alone)


@pytest.mark.slow
def test_two_processes_of_jax_distributed_gather_the_whole(job, alone, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    members = [start(job, "member", tmp_path, port, rank, JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo") for rank in (0, 1)]
    for process in members:
        finish(process)
    for rank in (0, 1):
        assert_equal(store.load(tmp_path / f"whole{rank}.npz"), alone)
        part = store.load(tmp_path / f"part{rank}.npz")
        assert sorted(set(part.index // 6)) == list(range(rank, 7, 2)) and part.missing.size == 40 - part.n


def test_gather_puts_the_parts_of_all_processes_together(job, alone, monkeypatch):
    """Three processes played by threads that exchange their arrays; one of them has no block."""
    parts = [sweep(job.run, job.PARAMS, job.REPLICATES, key=0, chunk=20, rank=rank, world=3) for rank in range(3)]
    assert [part.n for part in parts] == [20, 20, 0]
    barrier, sent, results = threading.Barrier(3), {}, {}

    def allgather(array):
        rank = int(threading.current_thread().name)
        sent[rank] = np.array(array)
        barrier.wait(PATIENCE)
        stacked = np.stack([sent[r] for r in range(3)])
        barrier.wait(PATIENCE)
        return stacked

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    threads = [threading.Thread(target=lambda rank=rank: results.update({rank: gather(parts[rank])}), name=str(rank)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    for rank in range(3):
        assert_equal(results[rank], alone)
        assert results[rank].missing.size == 0


def test_a_client_computes_the_blocks_and_this_process_writes_them(job, alone, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, **QUIET) as cluster, \
            distributed.Client(cluster) as client:
        result = sweep(job.run, job.PARAMS, job.REPLICATES, key=0, chunk=job.CHUNK, out=tmp_path, client=client)
    assert_equal(result, alone)
    assert len(list(tmp_path.glob("block*.npz"))) == 7


@pytest.mark.slow
def test_two_dask_workers_in_their_own_processes_give_the_same_replicates(job, alone, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    for place in (ROOT, pathlib.Path(job.__file__).parent):     # the workers take their path from this process
        monkeypatch.syspath_prepend(place)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", **QUIET) as cluster, \
            distributed.Client(cluster) as client:
        result = sweep(job.run, job.PARAMS, job.REPLICATES, key=0, chunk=job.CHUNK, client=client)
        by_value = sweep(lambda params, key, i: {"i": i}, {}, 9, key=0, chunk=2, client=client)
    assert_equal(result, alone)
    assert by_value["i"].tolist() == list(range(9))
