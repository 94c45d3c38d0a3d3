"""Tokens spread over devices: the ring gives the numbers of one device, for every variant, and no device holds all tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorylab.transformer_pde import kernels, ring

ROOT = Path(__file__).resolve().parents[2]
POINTS = np.random.default_rng(0).normal(size=(4, 6, 2))
SCRIPT = """
import json
import jax, jax.numpy as jnp, numpy as np
import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.errors import ShapeError

mesh = jax.make_mesh((4,), ("tokens",))
rng = np.random.default_rng(0)
Q, K, V = 0.5 * rng.normal(size=(3, 2, 2))
cloud = tp.Cloud(rng.normal(size=(24, 2)), rng.dirichlet(np.ones(24)))
variants = {"softmax": tp.Softmax(Q, K, V), "l2": tp.L2(Q, K, V), "masked": tp.Masked(tp.Softmax(Q, K, V)), "sinkhorn": tp.Sinkhorn(Q, K, V),
            "sigmoid": tp.Sigmoid(Q, K, V), "linear": tp.Linear(Q, K, V), "masked sigmoid": tp.Masked(tp.Sigmoid(Q, K, V)),
            "masked linear": tp.Masked(tp.Linear(Q, K, V)), "exponential": tp.Exponential(Q, K, V)}
def move(flow, cloud):
    return jax.jit(lambda c: flow.token_velocity(0.0, c)[0])(flow.lift(cloud))

moved = {}
for name, head in variants.items():
    moved[name] = [np.asarray(move(tp.Particles(head, 4, mesh=m), cloud)).tolist() for m in (None, mesh)]
equal = [np.asarray(move(tp.Particles(tp.Sigmoid(Q, K, V), 4, mesh=m), tp.Cloud(cloud.points))).tolist() for m in (None, mesh)]
head = tp.Softmax(Q, K, V)
ends = [tl.integrate(tp.Particles(head, 4, mesh=m), cloud, [0.0, 0.5, 1.0]) for m in (None, mesh)]
grads = [jax.grad(lambda x, m=m: (tp.Particles(head, 4, mesh=m).token_velocity(0.0, tp.Cloud(x))[0] ** 2).sum())(cloud.points) for m in (None, mesh)]
try:
    tp.Particles(head, mesh=mesh).lift(np.zeros((6, 2)))
    refused = ""
except ShapeError as error:
    refused = str(error)
n = 4096
flow = tp.Particles(head, 64, mesh=mesh)
spread = jax.ShapeDtypeStruct((n, 2), float, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tokens")))
program = jax.jit(lambda x: flow.field(0.0, tp.Cloud._raw(x, None)).points).lower(spread).compile()
print(json.dumps({
    "moved": moved, "equal": equal, "refused": refused,
    "points": [np.asarray(s.value.points).tolist() for s in ends], "history": [s.history["eigenvalues"].tolist() for s in ends],
    "grads": [np.asarray(g).tolist() for g in grads], "spread": len(flow.lift(cloud).points.sharding.device_set),
    "memory": program.memory_analysis().temp_size_in_bytes, "gathers": program.as_text().count("all-gather"),
}))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_four_devices_give_the_numbers_of_one():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu",
                                "JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["spread"] == 4
    for name, (one, many) in seen["moved"].items():
        np.testing.assert_allclose(many, one, rtol=1e-10, atol=1e-13, err_msg=name)
    for name in ("equal", "points", "history", "grads"):
        np.testing.assert_allclose(seen[name][1], seen[name][0], rtol=1e-8, atol=1e-10, err_msg=name)
    assert "multiple of the 4 devices of the mesh, got 6" in seen["refused"]
    assert seen["memory"] < 40 * 1024 * 2 * 8 + 20 * 64**2 * 8                     # a share of the tokens and a few tiles on each device
    assert seen["gathers"] == 0


def test_the_ring_visits_every_shard_once_its_own_first():
    def local(points):
        shift = lambda carry, part, number: (jnp.concatenate([carry[0][1:], number[None].astype(jnp.int32)]), carry[1] + part.sum())
        return ring.round_trip(shift, (jnp.full(4, -1, jnp.int32), 0.0), points)

    order, sums = jax.vmap(local, axis_name=ring.AXIS)(jnp.asarray(POINTS))
    assert order.tolist() == [[0, 3, 2, 1], [1, 0, 3, 2], [2, 1, 0, 3], [3, 2, 1, 0]]
    np.testing.assert_allclose(sums, POINTS.sum())


def test_cumulative_sums_run_over_the_shards_in_order():
    found = jax.vmap(ring.cumulative, axis_name=ring.AXIS)(jnp.asarray(POINTS))
    np.testing.assert_allclose(found.reshape(-1, 2), np.cumsum(POINTS.reshape(-1, 2), 0), rtol=1e-12)
    np.testing.assert_allclose(ring.cumulative(jnp.asarray(POINTS[0])), np.cumsum(POINTS[0], 0))


@pytest.mark.parametrize("causal", [False, True])
def test_shards_side_by_side_give_the_average_of_the_whole(causal):
    shards = jnp.asarray(POINTS)
    whole = shards.reshape(-1, 2)
    expected = kernels.tiled_average(whole, whole, whole[:, 0], whole, 5, causal)
    found = jax.vmap(lambda x: kernels.tiled_average(x, x, x[:, 0], x, 5, causal), axis_name=ring.AXIS)(shards)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-12, atol=1e-14)
