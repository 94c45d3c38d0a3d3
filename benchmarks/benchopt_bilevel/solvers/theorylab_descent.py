"""Outer descent with the one-point correction, on full batches: a plug-in for the public benchmark of bilevel solvers."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from benchopt import BaseSolver

import theorylab as tl
from theorylab import hypergradient as hg

ESTIMATORS = {"one-point": hg.OnePoint, "plain": hg.Plain, "newton": hg.NewtonPoint}


@eqx.filter_jit
def _started(problem, method, y):
    return tl.core.tree.strong(method.init(problem, y, key=jax.random.key(0)))


@eqx.filter_jit
def _stepped(problem, method, state):
    return tl.core.tree.strong(method.step(problem, state, key=jax.random.fold_in(jax.random.key(0), state.step)))


class Solver(BaseSolver):
    """Each outer step solves the inner problem, warm-started, until the estimated error of the hypergradient is small enough."""

    name = "theorylab"
    sampling_strategy = "callback"
    requirements = ["pip::theorylab"]  # noqa: RUF012
    parameters = {"estimator": ["one-point"], "step_size": [None], "accuracy": [0.1]}  # noqa: RUF012

    def get_next(self, stop_val):
        """One outer step between two evaluations."""
        return stop_val + 1

    def set_objective(self, f_inner, f_outer, n_inner_samples, n_outer_samples, inner_var0, outer_var0, **others):
        """Take the two functions `f(inner_var, outer_var, start=0, batch_size=1)` over all their samples."""
        whole = partial(f_inner, start=0, batch_size=n_inner_samples), partial(f_outer, start=0, batch_size=n_outer_samples)
        self.problem = hg.Bilevel(*whole, x=jax.tree.map(jnp.asarray, inner_var0), y=jax.tree.map(jnp.asarray, outer_var0))
        self.method = hg.OuterDescent(self.step_size, ESTIMATORS[self.estimator](), inner_tolerance=hg.InnerEstimate(self.accuracy))
        self.run_once(2)  # compiles outside the measured time

    def run(self, callback):
        """Outer steps until the benchmark has enough."""
        self.inner_var, self.outer_var = self.problem.x, self.problem.y
        state = None
        while callback():
            state = _started(self.problem, self.method, self.problem.y) if state is None else _stepped(self.problem, self.method, state)
            self.inner_var, self.outer_var = self.problem.unpack_x(state.at.x), self.method.value(self.problem, state)

    def get_result(self):
        """Both variables, as the benchmark evaluates them."""
        return {"inner_var": self.inner_var, "outer_var": self.outer_var}
