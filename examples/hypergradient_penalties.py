# %% [markdown]
# # Thirty penalties, each step proved to go down
#
# A logistic model of the breast cancer data has thirty features. One penalty for all of them is found by trying a few; thirty penalties, one for
# each, are not. The validation loss is differentiable in them, through the solution of the training problem. But the training problem is never
# solved exactly: how far must the solver go, so that the derivative can be trusted?

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer

import theorylab as tl
from theorylab import hypergradient as hg
from theorylab.lab.style import COLORS, figsize, look, paper_style

data = load_breast_cancer()
labels = 2.0 * data.target - 1.0
train, valid = hg.standardize(data.data[::2], data.data[1::2])
problem = hg.LogisticSelection((train, labels[::2]), (valid, labels[1::2]))
y = jnp.zeros(30)                                                                # logarithms of the penalties

# %% [markdown]
# ## How wrong is the derivative?
#
# At an inner point that is not yet the solution: the plain formula, the one-point correction, and the bound that is proved without knowing the
# solution.

# %%
exact = hg.hypergradient(problem, hg.reference(problem, y), y, hg.Plain()).value
print("residual    plain error   proved bound  corrected error  its bound")
for level in (1e-2, 1e-3, 1e-4, 1e-6):
    x = tl.iterate(problem.inner(y), hg.LBFGS(), steps=500, stop=tl.Below("residual", level)).value
    plain, corrected = (hg.certificate(problem, x, y, estimator) for estimator in (hg.Plain(), hg.OnePoint()))
    errors = [float(jnp.linalg.norm(one.value - exact)) for one in (plain, corrected)]
    print(f"{float(plain.inner_residual):.1e}     {errors[0]:.2e}      {float(plain.error_bound):.2e}      {errors[1]:.2e}         "
          f"{float(corrected.error_bound):.2e}")

# %% [markdown]
# ## Descent
#
# `inner_tolerance="certified"` stops the inner solver as soon as the hypergradient is proved to be within 10 % of the truth. The rival solves each
# inner problem to a residual of 1e-6, as one does who cannot know.

# %%
runs = {"certified": "certified", "estimated": "estimate", "residual 1e-6": 1e-6}
sols = {name: tl.iterate(problem, hg.OuterDescent(30.0, inner=hg.AcceleratedGradient(), inner_tolerance=rule, inner_steps=5000, every=5), y, steps=30)
        for name, rule in runs.items()}
for name, sol in sols.items():
    print(f"{name:14s} validation loss {sol.history['objective'][-1]:.5f}, gradients {int(sol.history['gradients'][-1])}")

fast = tl.solve(problem, y, tolerance=1e-5)
print(f"tl.solve: validation loss {fast.history['objective'][-1]:.5f} after {fast.steps} outer steps, {type(fast.method).__name__}")

# %%
with paper_style():
    fig, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.36), width_ratios=[1, 1.25])
    for i, (name, sol) in enumerate(sols.items()):
        left.plot(sol.history["gradients"], sol.history["objective"], label=name, **look(i))
    left.set(xlabel="gradients of the inner energy", ylabel="validation loss", xscale="symlog")
    left.legend()
    order = np.argsort(np.asarray(fast.value))
    right.bar(range(30), np.asarray(fast.value)[order], color=COLORS["blue"])
    right.set_xticks(range(30), [data.feature_names[i] for i in order], rotation=90, fontsize=4)
    right.set(ylabel="log penalty")

# %% [markdown]
# Right: the features that the model should use freely are on the left, those that it should forget on the right.
