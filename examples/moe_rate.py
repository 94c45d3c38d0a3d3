# %% [markdown]
# # A rate, with its interval
#
# Theory: with the right number of experts, the fitted density converges like $1/\sqrt n$ in Hellinger distance, and so does the Voronoi loss of the
# parameters. One call runs sizes and replicates as a single compiled sweep; one more fits the slopes.

# %%
import matplotlib.pyplot as plt
import numpy as np

import theorylab as tl
from theorylab import moe
from theorylab.lab.style import COLORS, figsize, look, paper_style

truth = moe.example("S1")
sizes = [250, 500, 1000, 2000, 4000]
table = moe.rate_study(truth, experts=3, sizes=sizes, replicates=24, key=0, law=(-1.0, 1.0))
print(table)

# %% [markdown]
# The loss has heavy tails at small n (a gate may be nearly separated), so its slope is taken over medians; the distance is bounded and tame.

# %%
density = tl.fit_rate(table.n, table["hellinger"])
loss = tl.fit_rate(table.n, table["loss"], center="median")
print("Hellinger:", density)
print("D1:       ", loss)

# %% [markdown]
# A regular model with 13 identified parameters has $n\,E H^2 \to 13/8$.

# %%
square = np.asarray(table.n) * np.mean(np.asarray(table["hellinger"]) ** 2, axis=1)
print("n E[H^2]:", np.round(square, 3), "theory 1.625")

# %%
with paper_style():
    fig, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.38))
    for ax, name, fit, label in ((left, "hellinger", density, "Hellinger distance"), (right, "loss", loss, "$D_1$")):
        values = np.asarray(table[name])
        ax.loglog(sizes, values, ".", color=COLORS["blue"], markersize=2, alpha=0.4)
        center = np.median(values, axis=1) if name == "loss" else values.mean(axis=1)
        ax.loglog(sizes, center, label=f"slope {fit.slope:.2f}", **look(0))
        ax.loglog(sizes, center[0] * np.sqrt(sizes[0] / np.array(sizes)), label="slope -1/2", **look(1))
        ax.set(xlabel="n", ylabel=label)
        ax.minorticks_off()
        ax.set_xticks(sizes, [str(n) for n in sizes])
        ax.legend()
