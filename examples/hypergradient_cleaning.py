# %% [markdown]
# # A hundred thousand hyper-parameters
#
# A data set has 100,000 samples, and three labels in ten are wrong. A small clean set is at hand. Give each sample a weight, train with the weights,
# and choose the weights by the loss on the clean set: that is a bilevel problem with 100,000 hyper-parameters. No matrix of size features by samples
# is ever formed, and a hypergradient costs a few passes over the data.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import theorylab as tl
from theorylab import hypergradient as hg
from theorylab.lab.style import COLORS, figsize, paper_style

SAMPLES, CLEAN, FEATURES, WRONG = 100_000, 5_000, 32, 0.3
rng = np.random.default_rng(0)
truth = rng.standard_normal(FEATURES).astype(np.float32) * 0.5


def draw(count):
    x = rng.standard_normal((count, FEATURES), dtype=np.float32)
    return x, np.sign(x @ truth + 0.3 * rng.standard_normal(count, dtype=np.float32))


features, right_labels = draw(SAMPLES)
flipped = rng.random(SAMPLES) < WRONG
labels = np.where(flipped, -right_labels, right_labels)
problem = hg.DataCleaning((features, labels), draw(CLEAN), penalty=0.01)
start = jnp.zeros(SAMPLES, jnp.float32)                                          # all weights are sigmoid(0) = 1/2

# %% [markdown]
# ## One hypergradient

# %%
x = tl.iterate(problem.inner(start), hg.Newton(), steps=6).value
found = hg.hypergradient(problem, x, start, hg.OnePoint(linear=hg.CG(tolerance=1e-5)))
began = time.perf_counter()
jax.block_until_ready(hg.hypergradient(problem, x, start, hg.OnePoint(linear=hg.CG(tolerance=1e-5))).value)
pull = SAMPLES * np.asarray(found.value)
print(f"{problem.m} hyper-parameters in {1e3 * (time.perf_counter() - began):.0f} ms; estimated relative error "
      f"{float(found.error_estimate / jnp.linalg.norm(found.value)):.0e}")
print(f"mean derivative of wrong samples {pull[flipped].mean():+.3f}, of right ones {pull[~flipped].mean():+.3f}")

# %% [markdown]
# A positive derivative says: this sample's weight should fall. Now descend. The step is large because each entry of the hypergradient is of order
# 1 / samples.

# %%
method = hg.OuterDescent(20.0 * SAMPLES, inner=hg.Newton(), inner_tolerance=1e-4, estimator=hg.OnePoint(linear=hg.CG(tolerance=1e-4)))
sol = tl.iterate(problem, method, start, steps=25)
weights = np.asarray(jax.nn.sigmoid(sol.value))
print("loss on the clean set:", np.round(np.asarray(sol.history["objective"])[[0, 5, -1]], 4))
trusted = weights > 0.5
print(f"weight above 1/2: {trusted[~flipped].mean():.1%} of the right samples, {trusted[flipped].mean():.1%} of the wrong ones")


def accuracy(weight):
    """Of a model trained with these weights, on fresh data."""
    model = tl.iterate(problem.inner(jnp.log(weight) - jnp.log1p(-weight)), hg.Newton(), steps=8).value
    fresh, answers = draw(20_000)
    return float(np.mean(np.sign(fresh @ np.asarray(model)) == answers))


print(f"accuracy with equal weights {accuracy(jnp.full(SAMPLES, 0.5, jnp.float32)):.3f}, with these {accuracy(jnp.asarray(weights)):.3f}")

# %%
with paper_style():
    fig, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.34))
    left.plot(sol.history["step"], sol.history["objective"], color=COLORS["blue"])
    left.set(xlabel="outer step", ylabel="loss on the clean set")
    bins = np.linspace(0.0, 1.0, 51)
    right.hist(weights[~flipped], bins, color=COLORS["blue"], alpha=0.7, label="right labels")
    right.hist(weights[flipped], bins, color=COLORS["vermilion"], alpha=0.7, label="wrong labels")
    right.set(xlabel="weight", ylabel="samples")
    right.legend()
