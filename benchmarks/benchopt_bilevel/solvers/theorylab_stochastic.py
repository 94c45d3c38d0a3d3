"""The stochastic methods of theorylab with their own sampler: a plug-in for the public benchmark of bilevel solvers."""

from functools import partial

import jax
import jax.numpy as jnp
from benchopt import BaseSolver

import theorylab as tl
from theorylab import hypergradient as hg


@jax.jit
def _started(problem, method, y, key):
    return tl.core.tree.strong(method.init(problem, y, key=key))


@partial(jax.jit, static_argnames="steps")
def _stepped(problem, method, state, *, steps):
    step = lambda _, state: tl.core.tree.strong(method.step(problem, state, key=state.key))
    return jax.lax.fori_loop(0, steps, step, state)


class Solver(BaseSolver):
    """SOBA, SABA, ... of theorylab: the same names and defaults as the benchmark's, each row once in a pass."""

    name = "theorylab-stochastic"
    sampling_strategy = "callback"
    requirements = ["pip::theorylab"]  # noqa: RUF012
    parameters = {"method": ["SABA"], "step_size": [0.1], "outer_ratio": [1.0], "batch_size": [64], "eval_freq": [128], "random_state": [1]}  # noqa: RUF012

    def get_next(self, stop_val):
        """`eval_freq` steps between two evaluations."""
        return stop_val + 1

    def set_objective(self, f_inner, f_outer, n_inner_samples, n_outer_samples, inner_var0, outer_var0, **others):
        """Take the two functions `f(inner_var, outer_var, start=0, batch_size=1)`: a batch is a mean over rows anywhere in the data."""

        def over_rows(f):
            return lambda x, y, rows: jnp.mean(jax.vmap(lambda row: f(x, y, start=row, batch_size=1))(rows))

        rows = (jnp.arange(n, dtype=jnp.int32) for n in (n_inner_samples, n_outer_samples))
        self.problem = hg.Bilevel(over_rows(f_inner), over_rows(f_outer), x=jax.tree.map(jnp.asarray, inner_var0),
                                  y=jax.tree.map(jnp.asarray, outer_var0), **dict(zip(("inner_data", "outer_data"), rows, strict=True)))
        self.way = getattr(hg, self.method)(self.step_size, self.outer_ratio, self.batch_size)
        self.run_once(2)  # compiles outside the measured time

    def run(self, callback):
        """Steps until the benchmark has enough."""
        state = _started(self.problem, self.way, self.problem.y, jax.random.key(self.random_state))
        self.inner_var, self.outer_var = self.problem.x, self.problem.y
        while callback():
            state = _stepped(self.problem, self.way, state, steps=self.eval_freq)
            self.inner_var, self.outer_var = self.problem.unpack_x(state.x), self.way.value(self.problem, state)

    def get_result(self):
        """Both variables, as the benchmark evaluates them."""
        return {"inner_var": self.inner_var, "outer_var": self.outer_var}
