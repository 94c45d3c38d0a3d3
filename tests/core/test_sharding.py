"""A problem whose arrays are spread over devices gives the answer of one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import theorylab as tl

class LeastSquares(tl.Problem):
    X: jax.Array
    t: jax.Array
    def metrics(self, w):
        return {"residual": jnp.linalg.norm(self.X.T @ (self.X @ w - self.t))}

class Descent(tl.Method):
    def init(self, problem, x0, *, key): return x0
    def step(self, problem, w, *, key): return w - 0.01 * problem.X.T @ (problem.X @ w - problem.t)
    def value(self, problem, w): return w

def compute(place):
    i = np.arange(64.0)
    X = place(np.cos(np.outer(i, np.arange(1.0, 4.0))))
    return tl.iterate(LeastSquares(X, place(np.sin(i))), Descent(), jnp.zeros(3), steps=50), X

devices = jax.devices()
mesh = Mesh(np.array(devices), ("rows",))
spread = lambda a: jax.device_put(jnp.asarray(a), NamedSharding(mesh, P("rows")))
one, many = compute(jnp.asarray), compute(spread)
print(json.dumps({
    "devices": len(devices),
    "value": [np.asarray(one[0].value).tolist(), np.asarray(many[0].value).tolist()],
    "history": [one[0].history["residual"].tolist(), many[0].history["residual"].tolist()],
    "spread": len(many[1].sharding.device_set),
}))
"""


@pytest.mark.multiprocess
def test_four_devices_give_the_numbers_of_one():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu",
                                "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["devices"] == 4 and seen["spread"] == 4
    for name in ("value", "history"):
        one, many = map(np.asarray, seen[name])
        np.testing.assert_allclose(many, one, rtol=1e-10, atol=1e-13)
