# %% [markdown]
# # Three mixed signals, unmixed
#
# Three sources are recorded by three microphones, each of which hears all of them. Independent component analysis finds the sources from the
# recordings alone: it looks for directions in which the recordings are as far from Gaussian as possible, and uncorrelated. The second part is a
# constraint, $X^\top B X = I$ with the covariance $B$ of the recordings, so nothing needs to be whitened first.

# %%
import matplotlib.pyplot as plt
import numpy as np

import theorylab as tl
from theorylab import stiefel
from theorylab.lab.style import COLORS, figsize, paper_style

SAMPLES = 12_000
rng = np.random.default_rng(3)
t = np.linspace(0.0, 60.0, SAMPLES)
sources = np.stack([np.sin(2.1 * t) ** 9, np.sign(np.sin(3.7 * t)) * (0.6 + 0.4 * np.sin(0.3 * t)), rng.laplace(size=SAMPLES)], axis=1)
sources = (sources - sources.mean(0)) / sources.std(0)
mixing = np.array([[1.0, 0.8, 0.6], [0.5, 1.0, -0.7], [-0.4, 0.9, 1.0]])
recordings = sources @ mixing.T

# %% [markdown]
# ## Heavy and light tails
#
# The classical contrast $E \log\cosh$ finds sources with heavy tails when it is minimized, and sources with light tails, such as a square wave, when
# it is maximized. `sign="auto"` decides for each component while it runs.

# %%
problem = stiefel.ICA(recordings, p=3, sign="auto")
sol = tl.solve(problem, tolerance=1e-8)
found = stiefel.amari_distance(sol.value.T, mixing)
print(sol.status.name, type(sol.method).__name__, "in", sol.steps, "steps; Amari distance", float(found))

# %% [markdown]
# ## The same while recording
#
# Batches of 200 samples as they come, in no order but that of time. The first thousand samples serve as the reference of the metrics.

# %%
live = stiefel.ICA.streamed(recordings[:1000], p=3, sign="auto")
rows = tl.Rows(recordings, 200, seed=1)
running = tl.iterate(live, live.default_method(), steps=240, every=10, data=rows, record=tl.whole)
distances = [float(stiefel.amari_distance(x.T, mixing)) for x in running.history["x"]]
print("Amari distance after", running.steps, "batches:", round(distances[-1], 4))

# %%
unmixed = np.asarray(recordings @ sol.value)
cross = np.corrcoef(unmixed.T, sources.T)[:3, 3:]
order = np.abs(cross).argmax(axis=0)
unmixed = unmixed[:, order] * np.sign(cross[order, range(3)])
with paper_style():
    fig, axes = plt.subplots(3, 4, figsize=figsize(2, 0.45), sharex="col", width_ratios=[1, 1, 1, 1.1])
    window = slice(0, 2400)
    for i in range(3):
        for ax, series, color in zip(axes[i], (sources, recordings, unmixed), ("green", "grey", "blue")):
            ax.plot(t[window], series[window, i], color=COLORS.get(color, "0.5"), linewidth=0.6)
            ax.set(yticks=[])
    for ax, title in zip(axes[0], ("sources", "recordings", "unmixed")):
        ax.set_title(title)
    for ax in axes[:, 3]:
        ax.remove()
    right = fig.add_subplot(axes[0, 3].get_gridspec()[:, 3])
    right.semilogy(running.history["step"], distances, color=COLORS["blue"])
    right.axhline(float(found), color="0.5", linestyle="--", linewidth=0.8)
    right.set(xlabel="batches", title="Amari distance")

# %% [markdown]
# Order and sign of the components cannot be found and were matched for the picture. Dashed: the solution on all recordings at once.
