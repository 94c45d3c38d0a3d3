# %% [markdown]
# # Regimes of another kind: outliers, bounded regions, classes
#
# A gate that keeps K experts and the experts behind it are two separate choices. Here a Gaussian gate, which can give an expert a bounded region,
# chooses between heavy-tailed lines; then a switch chooses between two laws of a class.

# %%
import matplotlib.pyplot as plt
import numpy as np

import theorylab as tl
from theorylab import moe
from theorylab.lab.style import COLORS, figsize, paper_style

# %% [markdown]
# ## A band with its own law, and outliers
#
# Between about -0.35 and 0.35 another line holds than outside, and the noise has three degrees of freedom. The fit is given the kind of the model
# and its shape, not its values.

# %%
gate = moe.QuadraticGate.from_gaussians([0.5, 0.5], [[0.0], [0.0]], [[[0.04]], [[1.0]]])
lines = moe.StudentExperts([[3.0], [-1.0]], [0.0, 1.0], [0.15, 0.15], [3.0, 3.0])
truth = moe.GeneralMixture(gate, lines, active=1)
x, y = truth.sample(500, key=1, low=-1.0)
likelihood = moe.GeneralLikelihood(x, y, truth)
fit = tl.solve(likelihood, key=2)
print(fit.value)
print(f"log-likelihood: truth {float(likelihood.log_likelihood(truth)):.2f}, fit {fit.history['log_likelihood'][-1]:.2f}")
print("slopes", np.sort(np.asarray(fit.value.experts.coef)[:, 0]).round(2), "degrees of freedom", np.asarray(fit.value.experts.df).round(1))

# %% [markdown]
# ## Classes
#
# On the left one rule decides between three classes, on the right another. `mean` gives their probabilities.

# %%
switch = moe.SoftmaxGate([0.0, 0.0], [[4.0], [0.0]], selection="logit")
rules = moe.LogisticExperts([[[0.0], [3.0], [-3.0]], [[0.0], [-4.0], [2.0]]], [[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
classes = moe.GeneralMixture(switch, rules, active=1)
u, label = classes.sample(800, key=4, low=-1.0)
found = tl.solve(moe.GeneralLikelihood(u, label, classes), key=5).value

# %%
grid = np.linspace(-1, 1, 400)
with paper_style():
    fig, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.38))
    left.plot(x, y, ".", markersize=2, color="0.6")
    left.plot(grid, fit.value.mean(grid), color=COLORS["blue"])
    left.set(xlabel="x", ylabel="y", ylim=(-3, 4))
    for j, (color, probability) in enumerate(zip(("blue", "vermilion", "green"), np.asarray(found.mean(grid)).T, strict=True)):
        right.plot(grid, probability, "-", color=COLORS[color], label=f"class {j}")
        right.plot(grid, np.asarray(classes.mean(grid))[:, j], color=COLORS[color], linestyle="--", linewidth=0.8)
    right.set(xlabel="x", ylabel="probability")
    right.legend()

# %% [markdown]
# Left: the mean of the fit through data with outliers (some lie outside the picture). Right: fitted probabilities, dashed the true ones.
