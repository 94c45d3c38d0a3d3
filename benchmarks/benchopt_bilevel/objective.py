"""The objective of the local copy of the benchmark: what solvers are given, and how they are judged."""

import numpy as np
from benchopt import BaseObjective


class Objective(BaseObjective):
    """The squared norm of the gradient of the value function, and the distance to the inner solution."""

    name = "Bilevel optimization"
    url = "https://github.com/benchopt/benchmark_bilevel"
    min_benchopt_version = "1.6"

    def set_data(self, metrics, inner_var0, outer_var0, **functions):
        """Keep what the data set defines."""
        self.metrics, self.functions, self.start = metrics, functions, {"inner_var0": inner_var0, "outer_var0": outer_var0}

    def get_objective(self):
        """What `Solver.set_objective` takes."""
        return {**self.functions, **self.start}

    def evaluate_result(self, inner_var, outer_var):
        """The metrics of the data set; the first, `value`, is what solvers are ranked by."""
        if not np.isfinite(np.asarray(outer_var)).all():
            raise ValueError("the outer variable is not finite")
        return self.metrics(inner_var, outer_var)

    def get_one_result(self):
        """A point, for the checks of benchopt."""
        return {"inner_var": self.start["inner_var0"], "outer_var": self.start["outer_var0"]}
