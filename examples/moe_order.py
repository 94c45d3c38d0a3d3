# %% [markdown]
# # How many experts, and how many at a time
#
# Data from four experts in the plane, of which the gate keeps two. Neither number is given. Two ways to find them: fit all candidates and compare a
# criterion, or look at what merging the experts of a fit would cost.

# %%
import matplotlib.pyplot as plt
import numpy as np

from theorylab import moe
from theorylab.lab.style import figsize, paper_style

truth = moe.example("S3")
x, y = truth.sample(600, key=0, low=-1.0, high=1.0)

# %% [markdown]
# ## By BIC
#
# Each candidate is fitted from two starts by the routing search (by EM where the gate keeps all experts).

# %%
order = moe.select_order(x, y, experts=[3, 4], active=[2], starts=2, rounds=6, key=1)
print(order)

# %% [markdown]
# ## What can be trusted
#
# The report says which experts meet somewhere, what of the gate is identified, and whether some pair is so well separated that the slope of its gate
# has only a lower bound.

# %%
best = order.fits[order.best()]
print(moe.identifiability(best, x))
print("Hellinger distance to the truth:", moe.hellinger(best, truth, (-1.0, 1.0)))

# %% [markdown]
# ## By merging
#
# The fit, merged pair by pair. The height of a merge is small where two experts say the same, and large where merging would lose one.

# %%
tree = moe.dendrogram(best)
print("heights of the merges:", np.round(np.asarray(tree.heights), 3))

# %%
with paper_style():
    fig, axes = plt.subplots(1, 2, figsize=figsize(2, 0.45), sharey=True)
    for ax, title, mixture in zip(axes, ("truth", f"fit, {best.experts} experts, {best.active} active"), (truth, best), strict=True):
        moe.plot_regions(mixture, ax=ax)
        ax.set_title(title)

# %% [markdown]
# Regions of the plane and the experts that serve them; numbers of experts are arbitrary.
