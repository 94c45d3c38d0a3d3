# %% [markdown]
# # How many experts, and how many at a time
#
# Data from four experts in the plane, of which the gate keeps two. Neither number is given. Two ways to find them: fit all candidates and compare a
# criterion, or fit one that is too large and merge.

# %%
import matplotlib.pyplot as plt
import numpy as np

import theorylab as tl
from theorylab import moe
from theorylab.lab.style import figsize, paper_style

truth = moe.example("S3")
x, y = truth.sample(800, key=0, low=-1.0, high=1.0)

# %% [markdown]
# ## By BIC
#
# Every pair is fitted from several starts, by EM where the gate keeps all experts and by the routing search where it does not.

# %%
order = moe.select_order(x, y, experts=[2, 3, 4], active=[1, 2], starts=4, rounds=10, key=1)
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
# A fit with one expert too many, merged pair by pair. The height of a merge is small where the two experts say the same.

# %%
likelihood = moe.Likelihood(x, y, experts=5, active=2)
large = tl.iterate(moe.Routing(likelihood), moe.RoutingSearch(starts=2), steps=6, key=2).value
tree = moe.dendrogram(large)
print("heights of the merges:", np.round(np.asarray(tree.heights), 3))

# %%
with paper_style():
    fig, axes = plt.subplots(1, 2, figsize=figsize(2, 0.45), sharey=True)
    for ax, title, mixture in zip(axes, ("truth", f"fit, {best.experts} experts, {best.active} active"), (truth, best), strict=True):
        moe.plot_regions(mixture, ax=ax)
        ax.set_title(title)

# %% [markdown]
# Regions of the plane and the experts that serve them; numbers of experts are arbitrary.
