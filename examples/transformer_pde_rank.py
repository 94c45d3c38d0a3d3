# %% [markdown]
# # The rank that is left
#
# Under attention with keys $K = -Q$ tokens cluster: the covariance converges to one of lower rank. Of which rank? Theory says $d -
# \operatorname{rank} Q$ exactly, if $V$ is symmetric positive definite and $\Sigma_0$ invertible. A histogram of eigenvalues above a threshold says
# something else.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.lab.style import COLORS, figsize, paper_style

HEADS = 100

# %% [markdown]
# ## Random heads
#
# For each dimension: random queries of $\lfloor d/2 \rfloor$ rows, a random start, and $V = I$, so that the limit is a formula. `limit` gives
# covariance and rank; `sweep` repeats it over keys in one compiled call.


# %%
def run(params, key, i):
    dim = params["start"].shape[0]
    for_queries, for_start = jax.random.split(key)
    Q = jax.random.normal(for_queries, (dim // 2, dim))
    root = params["start"] + jax.random.normal(for_start, (dim, dim))
    limit = tp.limit(tp.GaussianFlow(tp.Softmax(Q, -Q, 1.0)), tp.Gaussian.from_factor(jnp.zeros(dim), root))
    return {"rank": limit.rank, "regime": limit.regime, "large": (jnp.linalg.eigvalsh(limit.cov) > 0.1).sum()}


tables = {}
for dim in (3, 4, 5):
    tables[dim] = tl.sweep(run, {"start": jnp.zeros((dim, dim))}, replicates=HEADS, key=dim)
    ranks, large = (np.bincount(tables[dim][name], minlength=dim + 1).tolist() for name in ("rank", "large"))
    print(f"d = {dim}: heads of rank 0, 1, ...: {ranks}; with so many eigenvalues above 0.1: {large}")

# %% [markdown]
# The rank is $\lceil d/2 \rceil$ for every head. The count of eigenvalues above 0.1 is a statement about sizes: a limit of full allowed rank may be
# small in some direction, and at no finite depth has a decaying direction vanished.
#
# ## Heads without structure
#
# With independent $Q$, $K$ and $V$ anything can happen. The regime of each head is decided in the lane of its own; what the numbers do not decide is
# reported as such.

# %%
FREE = 60


def free(params, key, i):
    limit = tp.limit(tp.GaussianFlow(tp.random_attention("softmax", key, dim=3)), tp.Gaussian.standard(3))
    return {"rank": limit.rank, "regime": limit.regime}


table = tl.sweep(free, {}, replicates=FREE, key=0)
counts = {regime.name: int((table["regime"] == regime).sum()) for regime in tp.Regime}
print({name: count for name, count in counts.items() if count})

# %%
with paper_style():
    fig, axes = plt.subplots(1, 4, figsize=figsize(2, 0.3), width_ratios=(1, 1, 1, 1.4))
    for ax, (dim, found) in zip(axes[:3], tables.items(), strict=True):
        bins = np.arange(dim + 1)
        ax.bar(bins - 0.2, [(found["rank"] == b).sum() for b in bins], width=0.4, color=COLORS["blue"], label="rank")
        ax.bar(bins + 0.2, [(found["large"] == b).sum() for b in bins], width=0.4, color=COLORS["orange"], label="above 0.1")
        ax.set(xlabel="rank", title=f"$d = {dim}$", xticks=bins, ylim=(0, 1.35 * HEADS))
    axes[0].set(ylabel="heads")
    axes[0].legend(loc="upper left", fontsize="small")
    shown = [name for name, count in counts.items() if count]
    axes[3].barh(range(len(shown)), [counts[name] for name in shown], color=COLORS["green"])
    axes[3].set(yticks=range(len(shown)), yticklabels=[name.lower() for name in shown], xlabel="heads", title="independent $Q, K, V$")
