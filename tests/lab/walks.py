"""The small computation that the sweep tests repeat, what it must give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from theorylab.core.keys import run_key

ROUND_OFF = 1e-14                                   # batched kernels of other widths may round differently
TRACES = []


def walk(params, key, i):
    """Halve a random number until it is small: a count that differs from replicate to replicate."""
    TRACES.append(1)
    x, n = jax.lax.while_loop(lambda c: jnp.abs(c[0]) > 1e-3, lambda c: (c[0] * params["shrink"], c[1] + 1),
                              (jax.random.normal(key), jnp.zeros((), jnp.int32)))
    return {"x": x, "n": n, "i": i, "pair": jnp.stack([x, -x])}


PARAMS = {"shrink": 0.5}


@functools.cache
def expected(replicates):
    """One replicate after the other, in plain Python and NumPy."""
    rows = []
    for i in range(replicates):
        x, n = float(jax.random.normal(run_key(0, i))), 0
        while abs(x) > 1e-3:
            x, n = x * 0.5, n + 1
        rows.append((x, n))
    return rows


def assert_expected(result, index=None):
    index = np.arange(result.total) if index is None else np.asarray(index)
    rows = expected(40)
    assert result.index.tolist() == index.tolist() == result["i"].tolist()
    np.testing.assert_allclose(result["x"], [rows[i][0] for i in index], rtol=ROUND_OFF)
    assert result["n"].tolist() == [rows[i][1] for i in index]
    assert result["pair"].shape == (len(index), 2)
    assert (result["pair"] == result["x"][:, None] * [1, -1]).all()


def files(folder):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


class StopAfter:
    """A progress display under which somebody presses Ctrl-C."""

    def __init__(self, done):
        self.limit, self.closed = done, False

    def start(self, label, total):
        self.total = total

    def update(self, done, note=""):
        if done >= self.limit:
            raise KeyboardInterrupt

    def close(self):
        self.closed = True
