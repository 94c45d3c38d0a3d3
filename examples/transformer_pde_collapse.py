# %% [markdown]
# # Collapse to a line, and blow-up
#
# Tokens with a Gaussian law stay Gaussian under softmax attention, so a few numbers tell what a deep Transformer does to them. Here one row of queries makes a plane
# of tokens collapse to a line; the opposite sign of $V$ makes the same tokens blow up in finite depth. Both are computed from the moment equations and from the tokens themselves.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.lab.style import COLORS, figsize, label_lines, paper_style

# %% [markdown]
# ## Collapse
#
# One head with a single row of queries $q$, keys $K = -Q$ and $V = I$. The covariance then tends to that of $x$ given $q \cdot x$,
#
# $$ \Sigma_\infty = \Sigma_0 - \frac{\Sigma_0 q q^\top \Sigma_0}{q^\top \Sigma_0 q}, $$
#
# which has rank one: every token ends on the line orthogonal to $q$. `limit` finds it without integrating to infinity.

# %%
q = jnp.array([[0.4, 0.9]])
start = tp.Gaussian(jnp.zeros(2), jnp.array([[1.0, 0.3], [0.3, 0.6]]))
collapse = tp.GaussianFlow(tp.Softmax(q, -q, 1.0))
limit = tp.limit(collapse, start)
by_hand = start.cov - start.cov @ q.T @ q @ start.cov / (q @ start.cov @ q.T)
print(limit.regime.name, "- rank", int(limit.rank))
print("distance to the formula:", f"{jnp.linalg.norm(limit.cov - by_hand):.1e}")

# %% [markdown]
# Now the way there: the moments of the Gaussian, and 400 tokens that see only each other. With $V = I$ the mean of a cloud grows like $e^t$ unless it is zero,
# so the tokens come in pairs $\pm x$; they are also scaled to have the covariance $\Sigma_0$. The approach is like $1/t$: at depth 16 the small axis is still
# there, and its size alone would not tell the rank.


# %%
def paired(count, key):
    """Tokens in pairs x and -x with the covariance of the start."""
    half = tp.Gaussian.standard(2).sample(count // 2, key=key).points
    root = jnp.linalg.cholesky(half.T @ half / len(half))
    half = jnp.linalg.solve(root, half.T).T @ start.factor.T
    return tp.Cloud(jnp.concatenate([half, -half]))


times = np.array([0.0, 1.0, 4.0, 16.0])
sol = tl.integrate(collapse, start, times)
cloud = tl.integrate(tp.Particles(collapse.attention), paired(400, key=3), times).value
exact = tp.closed_form(collapse, start, times)
print("error of the integrated covariance:", f"{jnp.abs(sol.value.cov - exact.cov).max():.1e}")
print("distance of tokens and Gaussian:   ", f"{jnp.abs(tp.moments(cloud).cov - exact.cov).max():.1e}")
print("t times the smaller eigenvalue:    ", (times[1:] * sol.history["eigenvalues"][1:, 0]).round(3))


# %%
def ellipse(cov, count=200):
    """The points x with x' cov^-1 x = 4, which hold 86 % of a Gaussian in the plane."""
    angle = np.linspace(0.0, 2 * np.pi, count)
    values, vectors = np.linalg.eigh(cov)
    return vectors @ (2 * np.sqrt(np.maximum(values, 0.0))[:, None] * [np.cos(angle), np.sin(angle)])


normal = np.array([-q[0, 1], q[0, 0]]) / jnp.linalg.norm(q)
with paper_style():
    fig, axes = plt.subplots(1, 4, figsize=figsize(2, 0.3), sharex=True, sharey=True)
    for ax, t, cov, points in zip(axes, times, sol.value.cov, cloud.points, strict=True):
        ax.axline((0, 0), normal, color="0.75", linewidth=0.8, zorder=0)
        ax.plot(*points.T, ".", markersize=2.0, markeredgewidth=0, color=COLORS["sky"])
        ax.plot(*ellipse(cov), "-", color=COLORS["blue"])
        ax.set(xlabel=f"depth $t = {t:g}$", aspect="equal", xlim=(-3.2, 3.2), ylim=(-2.6, 2.6), xticks=[-2, 0, 2], yticks=[-2, 0, 2])

# %% [markdown]
# Lines: the Gaussian at two standard deviations. Points: the tokens. Gray: the line orthogonal to $q$.
#
# ## Blow-up
#
# The opposite sign of $V$ reverses depth, and the same head now spreads the tokens along $q$. The trace becomes infinite at a finite depth $t^*$.

# %%
spread = tp.GaussianFlow(tp.Softmax(q, -q, -1.0))
t_star = float(tp.blow_up_time(spread, start))
numerical = float(tp.blow_up_time(tp.GaussianFlow(tp.Softmax(q, -q, -jnp.eye(2))), start))       # V as a matrix: no formula, a run
print(f"t* = {t_star:.12f} by formula, {numerical:.12f} by integration")

grid = np.linspace(0.0, 1.6 * t_star, 161)
gaussian = tl.integrate(spread, start, grid)
print(gaussian.status.name, f"at {gaussian.history.axis('time')[-1]:.9f}")

# %% [markdown]
# A finite cloud cannot follow: a token moves at most as fast as the farthest token is far, so the cloud grows exponentially at most. Larger clouds follow the Gaussian further, but slowly:
# the blow-up is a property of the limit of infinitely many tokens. The sign comes early: the *effective sample size*, the number of tokens that decide an average, falls to one or two.

# %%
with paper_style():
    fig, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.4))
    depth, trace = gaussian.history.axis("time"), gaussian.history["trace"]
    left.plot(depth / t_star, trace, color=COLORS["black"], label="Gaussian")
    for count, color in ((30, "orange"), (300, "vermilion"), (3000, "purple")):
        sol = tl.integrate(tp.Particles(spread.attention), paired(count, key=5), grid, rtol=1e-5)
        left.plot(grid / t_star, sol.history["trace"], "-", color=COLORS[color], label=f"{count} tokens")
        right.plot(grid / t_star, sol.history["effective_sample_size"], "-", color=COLORS[color], label=f"{count} tokens")
        print(f"{count:5d} tokens: trace {sol.history['trace'][100]:.3g} at t*, {sol.history['trace'][-1]:.3g} at 1.6 t*")
    for ax in (left, right):
        ax.axvline(1.0, color="0.75", linewidth=0.8, zorder=0)
        ax.set(yscale="log", xlabel="depth / $t^*$", xlim=(0, 1.6))
    left.set(ylabel="trace of the covariance", ylim=(1, 3e4))
    right.set(ylabel="smallest effective sample size")
    for ax in (left, right):
        label_lines(ax)
