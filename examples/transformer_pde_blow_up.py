# %% [markdown]
# # Blow-up time against theory
#
# A covariance under softmax attention can become infinite at a finite depth $t^*$. Here $t^*$ is computed in three ways for random heads: by
# formula, by a flow in a clock that never ends, and by the published scheme, which steps until the trace passes a threshold.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.lab.style import COLORS, figsize, look, paper_style

COUNT = 200
start = tp.Gaussian(np.zeros(2), np.array([[1.0, 0.3], [0.3, 0.6]]))
keys = jax.random.split(jax.random.key(1), COUNT)

# %% [markdown]
# ## A formula for $V = I$
#
# With $A = K^\top Q$ and $\Sigma_0 = L_0 L_0^\top$, the covariance is $L_0 (I - t L_0^\top (A + A^\top) L_0)^{-1} L_0^\top$: it blows up at one
# over the largest eigenvalue of $L_0^\top (A + A^\top) L_0$, if that is positive. Giving $V$ as a number tells `blow_up_time` that the formula
# applies. The same $V$ given as a matrix hides it, and the answer comes from `Desingularized`. Both take a batch of heads in one call.


# %%
def formula(key):
    head = tp.random_attention("softmax", key, dim=2)
    return tp.blow_up_time(tp.GaussianFlow(tp.Softmax(head.Q, head.K, 1.0)), start)


def followed(key):
    head = tp.random_attention("softmax", key, dim=2)
    return tp.blow_up_time(tp.GaussianFlow(tp.Softmax(head.Q, head.K, jnp.eye(2))), start)


exact, found = (np.asarray(jax.vmap(f)(keys)) for f in (formula, followed))
blows = np.isfinite(exact)
print(f"{blows.sum()} of {COUNT} random heads blow up; the two ways agree on which: {np.array_equal(blows, np.isfinite(found))}")
print(f"largest relative difference of the times: {np.abs(found[blows] / exact[blows] - 1).max():.1e}")

# %% [markdown]
# ## A threshold on the trace
#
# The published scheme takes Euler steps of 0.01 and stops when the trace passes 1000.

# %%
heads = jax.vmap(lambda key: tp.random_attention("softmax", key, dim=2))(keys)


def scheme(Q, K):
    sol = tl.iterate(tp.Softmax(Q, K, 1.0), tp.OfficialEuler(0.01), start, steps=3000, stop=tl.Above("trace", 1e3), keep="last", throw=False)
    return sol.steps


some = np.flatnonzero(blows & (exact < 20))
stopped = 0.01 * np.asarray(jax.vmap(scheme)(heads.Q[some], heads.K[some]))
late = stopped / exact[some] - 1
print(f"the threshold is passed {100 * np.median(late):.0f} % late in the median, {100 * late.max():.0f} % at worst")

# %% [markdown]
# ## A bound, and a derivative
#
# No head can blow up before $1 / (2 \|V\| \|A\| \|\Sigma_0\|)$. And the formula can be differentiated: the gradient tells how the logit matrix has to
# change for the blow-up to come later.

# %%
size = jax.vmap(lambda Q, K: jnp.linalg.norm(K.T @ Q, 2))(heads.Q, heads.K)
bound = 1 / (2 * np.asarray(size) * np.linalg.norm(start.cov, 2))
print(f"the bound holds for {np.sum(bound[blows] <= exact[blows])} of {blows.sum()}")

A = jnp.array([[0.5, 0.4], [-0.2, -0.3]])
time = lambda A: tp.blow_up_time(tp.GaussianFlow(tp.Softmax.bilinear(A, 1.0)), start)  # noqa: E731
slope = jax.grad(time)(A)
for step in (0.0, 0.01, 0.02):
    print(f"A moved by {step:.2f} along the gradient: t* = {time(A + step * slope):.4f}")

# %%
with paper_style():
    fig, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.4))
    left.loglog(exact[blows], bound[blows], ".", color=COLORS["sky"], markersize=4, label="lower bound")
    left.loglog(exact[blows], found[blows], ".", color=COLORS["black"], markersize=4, label="followed")
    left.loglog(exact[some], stopped, ".", color=COLORS["vermilion"], markersize=4, label="threshold")
    line = np.array([exact[blows].min(), exact[blows].max()])
    left.loglog(line, line, "-", color="0.7", linewidth=0.8, zorder=0)
    left.set(xlabel="$t^*$ by formula", ylabel="$t^*$ otherwise")
    left.legend(loc="upper left")
    depth = np.linspace(0.0, 0.98, 60)
    for i, key in enumerate(np.flatnonzero(blows)[:4]):
        flow = tp.GaussianFlow(tp.Softmax(heads.Q[key], heads.K[key], 1.0))
        trace = jnp.trace(tp.closed_form(flow, start, depth * exact[key]).cov, axis1=1, axis2=2)
        right.plot(depth, 1 / np.asarray(trace), color=look(i)["color"], linestyle="-")
    right.set(xlabel="$t / t^*$", ylabel=r"$1 / \mathrm{tr}\,\Sigma$", ylim=(0, None), xlim=(0, 1))

# %% [markdown]
# Left: the two ways lie on the diagonal, the threshold is late, the bound is below. Right: one over the trace goes to zero linearly, which is what
# lets the clock of `Desingularized` read off $t^*$ long before it is reached.
