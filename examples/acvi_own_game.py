# %% [markdown]
# # Your own game in ten lines
#
# Four firms sell the same good. Each unit needs a permit, there are only so many, and the state sells them at the price at which the market clears.
# An equilibrium is a point $x^*$ of a set $C$ with $\langle F(x^*), x - x^* \rangle \ge 0$ for all $x \in C$, where $F_i$ is the derivative of the
# cost of firm $i$ in its own quantity:
#
# $$ F_i(q) = c_i + k_i\, q_i |q_i| - p(Q) - q_i\, p'(Q), \qquad p(Q) = 60 - Q, \quad Q = \sum_i q_i . $$
#
# The permits that nobody wants are one more unknown with $F = 0$. Then $C$ is a simplex: everything is at least 0, and the sum is the number of
# permits.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize_scalar

import theorylab as tl
from theorylab import acvi
from theorylab.lab.style import COLORS, figsize, label_lines, look, paper_style

COSTS, GROWTH = np.array([10.0, 14.0, 20.0, 30.0]), np.array([0.5, 0.2, 0.05, 0.0])


# %%
def operator(x, args):
    costs, growth = args
    q = x[:-1]
    own = costs + growth * q * jnp.abs(q) - (60.0 - q.sum()) + q
    return jnp.append(own, 0.0)


def market(permits):
    return acvi.VariationalInequality(operator, dim=5, args=(COSTS, GROWTH), constraints=acvi.Nonnegative(),
                                      equality=acvi.BlockSimplex((5,), permits))


sol = tl.solve(market(20.0), tolerance=1e-9)
print(sol.status.name, "after", sol.steps, "steps; gap", f"{float(sol.history.last('gap')):.1e}")
print("quantities", np.round(sol.value[:4], 4), "unused permits", np.round(sol.value[4], 4))

# %% [markdown]
# That is all of it. `solve` took the default method for the class, restarted ACVI with Newton steps on $F$, and stopped when the gap $\max_{x' \in
# C} \langle F(x), x - x' \rangle$ was below the tolerance. On a simplex the gap is a formula, so this is a proof, not a guess: at the feasible
# point `repair(x)` nothing can be gained by more than the tolerance.
#
# ## Is it an equilibrium?
#
# The price of a permit is the multiplier of the sum, $-F_i$ of every firm that produces. Given that price, and what the others do, each firm
# maximises its own profit; SciPy is asked whether one could do better.

# %%
x = np.asarray(acvi.repair(market(20.0), sol.value))
price = max(0.0, -float(market(20.0).operator(x).min()))


def profit(i, own):
    total = x[:4].sum() - x[i] + own
    return (60.0 - total - COSTS[i] - price) * own - GROWTH[i] * own**3 / 3


print(f"price of a permit: {price:.6f}")
for i in range(4):
    best = minimize_scalar(lambda own, i=i: -profit(i, own), bounds=(0.0, 40.0), method="bounded", options={"xatol": 1e-10})
    print(f"firm {i + 1}: sells {x[i]:8.5f}, best reply {best.x:8.5f}, profit {profit(i, x[i]):9.5f}, gain {-best.fun - profit(i, x[i]):.0e}")

# %% [markdown]
# ## From scarce to plenty
#
# Another number of permits is another right-hand side, not another compilation.

# %%
grid = np.linspace(2.0, 44.0, 43)
points = [acvi.repair(market(c), tl.solve(market(c), tolerance=1e-9).value) for c in grid]
found, prices = np.stack(points), [max(0.0, -float(market(c).operator(x).min())) for c, x in zip(grid, points, strict=True)]
free = grid[np.argmax(found[:, 4] > 1e-6)]
print(f"from {free:g} permits on some are left over, and their price is 0")

# %%
with paper_style():
    fig, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.36))
    for i in range(4):
        left.plot(grid, found[:, i], label=f"firm {i + 1}", **look(i))
    left.plot(grid, found[:, 4], "-", color="0.6", linewidth=0.9, label="unused")
    left.set(xlabel="permits", ylabel="quantity $q_i$", xlim=(0, 44), ylim=(0, 18))
    right.plot(grid, prices, "-", color=COLORS["black"])
    right.set(xlabel="permits", ylabel="price of a permit", xlim=(0, 44), ylim=(0, None))
    label_lines(left)
