# %% [markdown]
# # A certified equilibrium
#
# The row player of a matrix game pays $x_1^\top A x_2$. For any two strategies the value of the game lies in
#
# $$ \min_i (A x_2)_i \;\le\; v \;\le\; \max_j (A^\top x_1)_j, $$
#
# and the width of the interval, the *gap*, is 0 exactly at the equilibria. `solve` stops on it, so what it returns carries its own proof. Here it
# meets linear programming on a game of 200 by 200 actions with standard normal payments.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import linprog

import theorylab as tl
from theorylab import acvi
from theorylab.lab.style import COLORS, figsize, look, paper_style

SIZE = 200
game = acvi.matrix_game(rows=SIZE, key=1)
sol = tl.solve(game, tolerance=1e-8)
proof = acvi.certificate(game, sol.value)
print(type(sol.method).__name__, sol.status.name, "after", sol.steps, "steps")
print(f"gap {float(proof.bound):.1e}, value between {proof.value_interval[0]:.12f} and {proof.value_interval[1]:.12f}")
row, column = game.split(sol.value)
print(f"actions in use: {int((row > 1e-6).sum())} of {SIZE} by the row player, {int((column > 1e-6).sum())} by the column player")

# %% [markdown]
# ## Against HiGHS
#
# The same equilibrium by a linear program, with the solver in SciPy. Its value must lie in the interval, up to its own accuracy.

# %%
A = np.asarray(game.A)
began = time.perf_counter()
lp = linprog(np.append(np.zeros(SIZE), 1.0), A_ub=np.c_[A.T, -np.ones(SIZE)], b_ub=np.zeros(SIZE), A_eq=np.append(np.ones(SIZE), 0.0)[None],
             b_eq=[1.0], bounds=[(0, None)] * SIZE + [(None, None)], method="highs")
highs = time.perf_counter() - began
again = tl.solve(game, tolerance=1e-8).stats.run_seconds
low, high = proof.value_interval
print(f"value by HiGHS {lp.fun:.12f}; inside the interval: {bool(low - 1e-12 <= lp.fun <= high + 1e-12)}")
print(f"HiGHS {1e3 * highs:.0f} ms; solve {1e3 * again:.0f} ms, compilation left out")

# %% [markdown]
# For one game of this size both are good tools: `solve` takes the interior-point method here, and HiGHS returns a vertex. What `solve` adds: its
# stop rule is the proof, and it works inside `jit` and `vmap`, so that a thousand games are one call.
#
# ## Work against precision
#
# `compare` runs methods from one start and judges them by the same gap. One evaluation is the pair $(A x_2, A^\top x_1)$; an exact step of ACVI
# counts two. Penalties and steps are in units of the norm $L$ of the game.

# %%
L = float(np.linalg.norm(A - A.mean(0) - A.mean(1, keepdims=True) + A.mean(), 2))
methods = {"PDHG, Halpern": acvi.PrimalDualHybridGradient("halpern"), "ACVI, Halpern": acvi.HalpernACVI(), "ACVI": acvi.ProjectedACVI(0.3 * L),
           "extragradient": acvi.Extragradient(0.9 / L)}
table = tl.compare(game, methods, steps=5000, every=20, stop=tl.Below("gap", 1e-9), axis="operator_evaluations", levels=(1e-2, 1e-4, 1e-6))
print(table)
inner = tl.iterate(game, acvi.InteriorPoint(), steps=30, stop=tl.Below("gap", 1e-11))
print(f"interior point: {inner.steps} steps, each with a matrix of {2 * SIZE + 2} rows to factor; {1e3 * inner.stats.run_seconds:.0f} ms")

# %%
with paper_style():
    fig, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.4), sharey=True)
    for i, name in enumerate(table):
        history = table[name].history
        for ax, axis in ((left, "operator_evaluations"), (right, "seconds")):
            ax.plot(history.axis(axis), history["gap"], label=name, **look(i))
    right.plot(inner.history.axis("seconds"), inner.history["gap"], "o-", color=COLORS["sky"], label="interior point")
    right.plot([highs], [1e-11], "*", color=COLORS["black"], markersize=8, clip_on=False)
    right.annotate("HiGHS", (highs, 1e-11), xytext=(6, 5), textcoords="offset points", fontsize="small")
    right.annotate("interior point", (inner.history.axis("seconds")[1], inner.history["gap"][1]), xytext=(4, 4), textcoords="offset points",
                   fontsize="small", color=COLORS["sky"])
    left.set(xlabel="operator evaluations", ylabel="gap", yscale="log", ylim=(1e-11, 10), xlim=(0, 10_000))
    right.set(xlabel="seconds", xscale="log")
    left.legend(loc="upper right")

# %% [markdown]
# Left: restarts turn the slow tail of the first-order methods into straight lines. The restarted primal-dual method (PDHG) needs fewer evaluations
# than restarted ACVI, about half on average over such games, and is what `solve` takes for games that are too large to factor. ACVI is for what the
# primal-dual method cannot do: operators that are no matrix game, and constraints that are no simplex.
#
# Right: the same runs against the clock, where projections onto simplices and factorizations count too, so that the order may be another one. The
# interior point takes fifteen steps, each of which costs $O(N^3)$, and ends at round-off. The star is HiGHS.
