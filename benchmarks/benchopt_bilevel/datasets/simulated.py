"""Simulated quadratics: inner and outer functions are means over samples, and everything is known in closed form."""

import jax
import jax.numpy as jnp
from benchopt import BaseDataset

from theorylab import hypergradient as hg


class Dataset(BaseDataset):
    """`theorylab.hypergradient.simulated` by the interface of the benchmark: functions `f(inner_var, outer_var, start=0, batch_size=1)`."""

    name = "simulated"
    parameters = {"dim_inner": [20], "dim_outer": [10], "n_samples": [1024], "random_state": [0]}  # noqa: RUF012

    def get_data(self):
        """Functions, numbers of samples, starting points and metrics."""
        problem = hg.simulated(self.random_state, dim_inner=self.dim_inner, dim_outer=self.dim_outer, samples=self.n_samples, dtype=jnp.float32)

        def over_slices(rows):
            def f(inner_var, outer_var, start=0, batch_size=1):
                return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, batch_size), rows).mean(inner_var, outer_var)

            return f

        @jax.jit
        def measured(problem, inner_var, outer_var):
            exact = problem.exact(outer_var)
            gradient = hg.Plain().estimate(problem, exact, outer_var).value
            return {"value": gradient @ gradient, "func": problem.outer(exact, outer_var), "inner_distance": jnp.sum((exact - inner_var) ** 2)}

        def metrics(inner_var, outer_var):
            return {name: float(value) for name, value in measured(problem, inner_var, outer_var).items()}

        samples = problem.samples
        return {"f_inner": over_slices(problem.inner_rows), "f_outer": over_slices(problem.outer_rows), "n_inner_samples": samples[0],
                "n_outer_samples": samples[1], "inner_var0": jnp.zeros(problem.n, jnp.float32), "outer_var0": jnp.ones(problem.m, jnp.float32),
                "metrics": metrics}
