# %% [markdown]
# # Collapse to a line, and blow-up
#
# Tokens with a Gaussian law stay Gaussian under softmax attention, so a few numbers tell what a deep Transformer does to them. Here one row of
# queries makes a plane of tokens collapse to a line; the opposite sign of $V$ makes the same tokens blow up at a finite depth. Both are computed from
# the moment equations and from the tokens themselves.

# %%
import matplotlib.pyplot as plt
import numpy as np

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.lab.style import COLORS, figsize, label_lines, look, paper_style

# %% [markdown]
# ## Collapse
#
# One head with a single row of queries $q$, keys $K = -Q$ and $V = I$. The covariance then tends to that of $x$ given $q \cdot x$,
#
# $$ \Sigma_\infty = \Sigma_0 - \frac{\Sigma_0 q q^\top \Sigma_0}{q^\top \Sigma_0 q}, $$
#
# which has rank one: every token ends on the line orthogonal to $q$. `limit` finds it without integrating to infinity.

# %%
q = np.array([[0.4, 0.9]])
start = tp.Gaussian(np.zeros(2), np.array([[1.0, 0.3], [0.3, 0.6]]))
collapse = tp.GaussianFlow(tp.Softmax(q, -q, 1.0))
limit = tp.limit(collapse, start)
by_hand = start.cov - start.cov @ q.T @ q @ start.cov / (q @ start.cov @ q.T)
print(limit.regime.name, "- rank", int(limit.rank))
print("distance to the formula:", f"{np.linalg.norm(limit.cov - by_hand):.1e}")

# %% [markdown]
# Now the way there: the moments of the Gaussian, and 400 tokens that see only each other. With $V = I$ the mean of a cloud grows like $e^t$ unless
# it is zero, so the tokens come in pairs $\pm x$; they are also scaled to have the covariance $\Sigma_0$. The approach is like $1/t$: at depth 16 the
# small axis is still there, and its size alone would not tell the rank.


# %%
def paired(count, key):
    """Tokens in pairs x and -x with the covariance of the start."""
    half = np.asarray(start.sample(count // 2, key=key).points)
    root = np.linalg.cholesky(half.T @ half / len(half))
    half = half @ np.linalg.inv(root).T @ start.factor.T
    return tp.Cloud(np.concatenate([half, -half]))


times = np.linspace(0.0, 4.0, 41) ** 2
sol = tl.integrate(collapse, start, times)
tokens = tl.integrate(tp.Particles(collapse.attention), paired(400, key=3), times, rtol=1e-6)
cloud, exact = tokens.value, tp.closed_form(collapse, start, times).cov
print(f"error of the integrated covariance: {np.abs(sol.value.cov - exact).max():.1e}")
print(f"distance of tokens and Gaussian:    {np.abs(tp.moments(cloud).cov - exact).max():.1e}")
shown = np.array([0, 10, 20, 40])
for t, low in zip(times[shown], sol.history["eigenvalues"][shown, 0], strict=True):
    print(f"depth {t:2g}: smaller eigenvalue {low:.4f}, times depth {t * low:.4f}")


# %%
def ellipse(cov):
    """The points at two standard deviations; a segment if the rank is one."""
    angle = np.linspace(0.0, 2 * np.pi, 200)
    values, vectors = np.linalg.eigh(cov)
    return vectors @ (2 * np.sqrt(np.maximum(values, 0.0))[:, None] * [np.cos(angle), np.sin(angle)])


with paper_style():
    fig, axes = plt.subplots(1, 4, figsize=figsize(2, 0.26), sharex=True, sharey=True)
    for ax, row in zip(axes, shown, strict=True):
        ax.plot(*cloud.points[row].T, ".", markersize=2.2, markeredgewidth=0, color=COLORS["sky"])
        ax.plot(*ellipse(sol.value.cov[row]), "-", color=COLORS["blue"])
        ax.plot(*ellipse(limit.cov), "-", color=COLORS["vermilion"])
        ax.set(title=f"depth $t = {times[row]:g}$", xlabel="$x_1$", aspect="equal", xlim=(-3, 3), ylim=(-2.3, 2.3))
        ax.set(xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    axes[0].set(ylabel="$x_2$")
    axes[0].text(2.9, -2.0, "limit", ha="right", color=COLORS["vermilion"])

# %% [markdown]
# Blue: the Gaussian at two standard deviations. Points: the tokens. Red: the limit, at two standard deviations too.
#
# ## Blow-up
#
# The opposite sign of $V$ reverses depth, and the same head now spreads the tokens along $q$. The trace becomes infinite at a finite depth $t^*$.

# %%
spread = tp.GaussianFlow(tp.Softmax(q, -q, -1.0))
t_star = float(tp.blow_up_time(spread, start))
gaussian = tl.integrate(spread, start, 1.001 * t_star * (1 - np.linspace(1.0, 0.0, 41) ** 3))
depth = gaussian.history.axis("time")
print(f"t* = {t_star:.9f} by formula; the integration ends with {gaussian.status.name} at {depth[-1]:.9f}")

# %% [markdown]
# A finite cloud cannot follow: no token moves faster than the farthest one is far, so the cloud grows at most like $e^t$. Ten times the tokens do
# little better: the blow-up belongs to the limit of infinitely many. The *effective sample size*, the number of tokens that decide an average, tells
# why: for the outermost of 400 tokens it is about five at $t^*$.

# %%
grid = np.linspace(0.0, 1.6 * t_star, 41)
with paper_style():
    fig, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.36))
    left.plot(depth / t_star, gaussian.history["trace"], "-", color=COLORS["black"], label="_")
    for i, count in enumerate((40, 400)):
        sol = tl.integrate(tp.Particles(spread.attention), paired(count, key=5), grid, rtol=1e-6)
        trace, size = sol.history["trace"], sol.history["effective_sample_size"]
        left.plot(grid / t_star, trace, label=f"{count} tokens", **look(i))
        right.plot(grid / t_star, size, label=f"{count} tokens", **look(i))
        print(f"{count:4d} tokens: trace {trace[25]:.3g} at t*, {trace[-1]:.3g} at 1.6 t*; sample size {size[25]:.2g} at t*")
    for ax in (left, right):
        ax.axvline(1.0, color="0.8", linewidth=0.8, zorder=0)
        ax.set(xlabel="depth $t / t^*$", xlim=(0, 1.6))
    left.set(ylabel="trace of the covariance", yscale="log", ylim=(1, 100))
    right.set(ylabel="smallest effective sample size", ylim=(0, 20))
    left.annotate("Gaussian", (0.97, 60), ha="right", fontsize="small")
    for ax in (left, right):
        label_lines(ax)
