# %% [markdown]
# # A regression with two regimes
#
# Up to some input one law holds, beyond it another, and where the change is nobody knows. A mixture of two experts with a gate that keeps one of them
# is exactly this model: two lines and a boundary. The fit gives the boundary, the lines, and a predictive distribution.

# %%
import matplotlib.pyplot as plt
import numpy as np

import theorylab as tl
from theorylab import moe
from theorylab.lab.style import COLORS, figsize, paper_style

truth = moe.example("S0")                                       # both papers: slopes -20 and 20, a switch at 0.32
x, y = truth.sample(400, key=1)
likelihood = moe.Likelihood(x, y, experts=2, active=1, selection="logit")

# %% [markdown]
# ## EM keeps what it is given
#
# A start with the boundary in the wrong place. EM fits the lines to the wrong halves and stays there: none of its steps moves a training point from
# one expert to the other. The routing search can.

# %%
wrong = truth.replace(gate_intercept=np.array([-17.0, 0.0]))     # a switch at 0.68
em = tl.iterate(likelihood, moe.EM(), wrong, steps=200)
search = tl.iterate(moe.Routing(likelihood), moe.RoutingSearch(), wrong, steps=12)
for name, mixture in (("truth", truth), ("EM", em.value), ("search", search.value)):
    print(f"{name:7s} log-likelihood {float(likelihood.log_likelihood(mixture)):9.2f}   boundary at {float(moe.boundaries(mixture)[0]):.4f}")

# %% [markdown]
# On one input there is also an exact way: `scan_breakpoints` finds the best boundary of all for given experts, and EM fits the experts again.

# %%
current = em.value
for _ in range(3):
    scan = moe.scan_breakpoints(likelihood, current)
    current = tl.iterate(likelihood, moe.EM(), scan.mixture, steps=20).value
    print(f"scan and EM: boundary {scan.breakpoints[0]:.4f}, log-likelihood {float(likelihood.log_likelihood(current)):.2f}")

# %% [markdown]
# ## How sure
#
# The parameters of the lines are regular and have intervals. The gate has none: with one active expert only the boundary is identified, and a
# boundary is known to within about one over n.

# %%
intervals = moe.confidence_intervals(likelihood, search.value)
print(intervals)
ordered = np.sort(np.asarray(x)[:, 0])
place = np.searchsorted(ordered, float(moe.boundaries(search.value)[0]))
print(f"any boundary between the data points {ordered[place - 1]:.4f} and {ordered[place]:.4f} has this likelihood")

# %%
with paper_style():
    fig, axes = plt.subplots(1, 2, figsize=figsize(2, 0.38), sharey=True)
    for ax, title, mixture in zip(axes, ("EM", "routing search"), (em.value, search.value), strict=True):
        moe.plot(mixture, (x, y), ax=ax)
        ax.set_title(title)
        ax.axvline(0.32, color=COLORS["vermilion"], linestyle="--", linewidth=0.8)

# %% [markdown]
# Dashed: the true switch. The band holds 90 % of the predictive distribution at each input.
