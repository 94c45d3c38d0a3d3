# %% [markdown]
# # Tolls by gradient through an equilibrium
#
# Six units of traffic choose among three paths through Braess's network; a path costs the sum of its links, a link the more the fuller it is. At
# the equilibrium nobody can save time by another path, and everybody would be faster if the link in the middle did not exist. A toll can repair
# this. Which one? The total time is a function of an equilibrium, which is a function of the tolls: descend along its gradient.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize

import theorylab as tl
from theorylab import acvi
from theorylab.acvi.implicit import smoothed_equilibrium
from theorylab.lab.style import COLORS, figsize, look, paper_style

LINKS = jnp.array([[1.0, 0, 1, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 1, 1]])         # paths (a, c), (b, d), (a, e, d)
SLOPES, CONSTANTS = jnp.array([10.0, 1, 1, 10, 1]), jnp.array([0.0, 50, 50, 0, 10])
MATRIX = (LINKS * SLOPES) @ LINKS.T


def network(tolls, demand=6.0):
    """Costs of paths as an operator of the flows on them; the tolls are felt like time."""
    return acvi.AffineVariationalInequality(MATRIX, LINKS @ (CONSTANTS + tolls), acvi.Nonnegative(), acvi.BlockSimplex((3,), demand))


def total(flows):
    """Time spent by all together; what is paid is not lost."""
    on_links = LINKS.T @ flows
    return on_links @ (SLOPES * on_links + CONSTANTS)


free = tl.solve(network(jnp.zeros(5)), tolerance=1e-9).value
without = acvi.braess(bridge=False)
print(f"total time at the equilibrium {total(free):.3f}, without the link {without.operator(without.solution) @ without.solution:.3f}")

# %% [markdown]
# ## The derivative of an equilibrium
#
# `smoothed_equilibrium(problem, mu)` is the point of the central path: the solution of $F(x) + \mu \nabla B(x) + C^\top \nu = 0$, $Cx = d$, with
# the log barrier $B$. It is within $m\mu$ of an equilibrium, in the gap, and unlike an equilibrium it is smooth in everything. Its derivative is
# one linear solve with the equations that define it; the iterations that found it are not differentiated.

# %%
MU = 1e-3
loss = jax.jit(jax.value_and_grad(lambda tolls: total(smoothed_equilibrium(network(tolls), MU))))
tolls = jnp.array([0.0, 0.0, 0.0, 0.0, 5.0])
differences = [(loss(tolls + h)[0] - loss(tolls - h)[0]) / 2e-4 for h in 1e-4 * jnp.eye(5)]
print("gradient   ", np.round(loss(tolls)[1], 6))
print("differences", np.round(differences, 6))

# %% [markdown]
# ## Descent
#
# From no tolls at all, along the gradient. What can be reached at best is known without any equilibrium: the flows that minimise the total time, a
# quadratic program.

# %%
tolls, trace = jnp.zeros(5), []
for _ in range(20):
    value, slope = loss(tolls)
    trace.append(float(value))
    tolls = jnp.maximum(tolls - 0.5 * slope, 0.0)

bounds, sums = [(0.0, None)] * 3, {"type": "eq", "fun": lambda f: f.sum() - 6.0}
best = minimize(lambda f: float(total(jnp.asarray(f))), np.full(3, 2.0), bounds=bounds, constraints=sums, tol=1e-12)
after = acvi.repair(network(tolls), tl.solve(network(tolls), tolerance=1e-9).value)
print("tolls on a to e:", np.round(tolls, 3))
print(f"total time {total(after):.6f}; the best that flows can do {best.fun:.6f}")
print("flows", np.round(after, 4), "of the best", np.round(best.x, 4))

# %% [markdown]
# ## One toll for an unknown demand
#
# The toll on the middle link alone, fixed before the demand is known: the average over demands is one `vmap`, and its gradient one `grad`.

# %%
demands = jnp.linspace(1.0, 12.0, 81)


def per_head(toll, demand, mu):
    """Time of one unit of traffic."""
    flows = smoothed_equilibrium(network(toll * jnp.array([0.0, 0, 0, 0, 1]), demand), mu)
    return total(flows) / demand


over_demands = jax.vmap(per_head, (None, 0, None))
mean = jax.jit(jax.value_and_grad(lambda toll: over_demands(toll, demands, MU).mean()))
toll, path = 0.0, []
for _ in range(40):
    value, slope = mean(toll)
    path.append((float(toll), float(value)))
    toll = jnp.maximum(toll - 3.0 * slope, 0.0)
print(f"toll {path[0][0]:.2f}: {path[0][1]:.4f} per head; toll {path[-1][0]:.2f}: {path[-1][1]:.4f}")

# %%
grid, both = jnp.linspace(0.0, 40.0, 81), jax.jit(jax.vmap(per_head))
six, ones = jnp.full(81, 6.0), jnp.ones(81)
with paper_style():
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=figsize(2, 0.34))
    left.plot(trace, "-", color=COLORS["blue"])
    left.axhline(best.fun, color=COLORS["vermilion"], linestyle="--", linewidth=0.9)
    left.text(19, best.fun + 1.2, "best flows", ha="right", fontsize="small", color=COLORS["vermilion"])
    left.set(xlabel="step", ylabel="total time, demand 6", xlim=(0, 19), xticks=[0, 5, 10, 15])
    for i, mu in enumerate((30.0, 3.0, MU)):
        middle.plot(grid, both(grid, six, mu * ones), label=rf"$\mu = {mu:g}$", **look(i))
    middle.set(xlabel="toll on the middle link", ylabel="time per head, demand 6", xlim=(0, 40))
    middle.legend(loc="upper right")
    for i, t in enumerate((0.0, float(path[-1][0]))):
        right.plot(demands, both(t * ones, demands, MU * ones), label=f"toll {t:.3g}", **look(i))
    right.set(xlabel="demand", ylabel="time per head", xlim=(1, 12))
    right.legend(loc="upper left")

# %% [markdown]
# Left: five steps of descent reach what the best flows can do. Middle: total time against the toll on the middle link. The equilibrium itself ($\mu
# \to 0$) has a corner where the link falls out of use, and no derivative there; a larger $\mu$ rounds it off. Right: the toll that is best on
# average takes the time off the middle demands, where the link does harm, and leaves the others nearly as they were.
