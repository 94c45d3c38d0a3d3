# %% [markdown]
# # Two halves of a digit
#
# Cut an image of a handwritten digit in the middle. What do the left and the right half know of each other? Canonical correlation analysis answers
# with pairs of directions, one for each half, whose scores correlate most. Here nobody ever forms a covariance matrix: the images come in batches of
# 128, each is looked at and dropped.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import theorylab as tl
from theorylab import stiefel
from theorylab.lab.style import COLORS, figsize, look, paper_style

images = load_digits().images / 16.0
images = images[np.random.default_rng(0).permutation(len(images))]
halves = images[:, :, :4].reshape(-1, 32), images[:, :, 4:].reshape(-1, 32)
held_out, train = tuple(half[:300] for half in halves), tuple(half[300:] for half in halves)
PAIRS, RIDGE = 4, 1e-2

# %% [markdown]
# ## From batches
#
# The constraint is that the scores of each half are uncorrelated and of variance one: $X^\top C_{xx} X = Y^\top C_{yy} Y = I$. A batch gives a noisy
# sample of both matrices, of rank below their size if it is small. The landing method follows a field that is made of the batch alone, and cuts the
# step so that the batch's own constraint cannot break. `CCA.streamed` measures on held-out images; `Rows` reads the batches, in a new order in each
# pass.

# %%
streamed = stiefel.CCA.streamed(held_out, p=PAIRS, ridge=RIDGE)
method = stiefel.StochasticLanding(tl.Inverse(0.7, offset=50.0), preconditioner="auto")
sol = tl.iterate(streamed, method, steps=600, every=20, data=tl.Rows(train, 128, seed=0), record=tl.whole)
print(sol.status.name, "after", sol.steps, "batches")

# %% [markdown]
# ## Against all the data at once
#
# 1497 images do fit in memory, so the exact solution is one singular value decomposition. `exact` measures what the run went through on all the
# training data: the *gap* is the objective after an exact retraction, less the optimum.

# %%
exact = stiefel.CCA(*train, p=PAIRS, ridge=RIDGE)
best = stiefel.closed_form(exact)
print("correlations, all data:   ", np.round(np.asarray(best.values[:PAIRS]), 4))
path = jax.vmap(exact.metrics)((jnp.asarray(sol.history["x[0]"]), jnp.asarray(sol.history["x[1]"])))
gaps = np.asarray(path["gap"] / -exact.optimum)
print(f"gap of the streamed solution, relative: {gaps[-1]:.1e}; infeasibility {path['infeasibility'][-1]:.2f}")

x, y = stiefel.polish(streamed, sol.value, steps=0)                                   # retract and order, nothing else
scores = np.asarray(held_out[0] @ x), np.asarray(held_out[1] @ y)
seen = [np.corrcoef(scores[0][:, i], scores[1][:, i])[0, 1] for i in range(PAIRS)]
print("correlations of scores on held-out images:", np.round(seen, 3))

# %%
with paper_style():
    fig = plt.figure(figsize=figsize(2, 0.42))
    grid = fig.add_gridspec(2, 7, width_ratios=[1.6, 0.5, 1, 1, 1, 1, 0.05], wspace=0.15, hspace=0.25)
    left = fig.add_subplot(grid[:, 0])
    left.semilogy(sol.history["step"], gaps, label="gap", **look(0))
    left.semilogy(sol.history["step"][1:], path["infeasibility"][1:], label="infeasibility", **look(1))
    left.set(xlabel="batches")
    left.legend(fontsize="x-small")
    for i in range(PAIRS):
        ax = fig.add_subplot(grid[0, 2 + i])
        pattern = np.concatenate([np.asarray(x[:, i]).reshape(8, 4), np.asarray(y[:, i]).reshape(8, 4)], axis=1)
        ax.imshow(pattern, cmap="RdBu_r", vmin=-np.abs(pattern).max(), vmax=np.abs(pattern).max())
        ax.axvline(3.5, color="k", linewidth=0.8)
        ax.set(xticks=[], yticks=[], title=f"pair {i + 1}")
        ax = fig.add_subplot(grid[1, 2 + i])
        ax.plot(scores[0][:, i], scores[1][:, i], ".", markersize=2, color=COLORS["blue"])
        ax.set(xticks=[], yticks=[], xlabel="left score")
        if i == 0:
            ax.set_ylabel("right score")

# %% [markdown]
# Left: the way of the run, measured on all training images. Top: the directions, as images; the line is the cut. Bottom: scores of images that no
# batch contained.
