# %% [markdown]
# # A trained network, predicted
#
# The moment equations take any matrices $Q, K, V$, also those of a trained network. Here a small attention network learns to denoise, its weights go
# into `Layered`, and the covariance that the equations predict for every layer is held against the tokens that run through the network.
#
# ## The task
#
# A prompt holds 64 noisy tokens $x = s + 0.5\,z$ in four dimensions. The signals $s$ of a prompt lie on a plane of its own, the noise $z$ everywhere.
# The network must return the signals. It can: the tokens of a prompt show the plane, and attention compares tokens.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import theorylab as tl
from theorylab import transformer_pde as tp
from theorylab.lab.style import COLORS, figsize, look, paper_style

DIM, TOKENS, LAYERS, NOISE = 4, 64, 4, 0.5


def prompts(key, count, tokens=TOKENS):
    """Clean and noisy tokens of `count` prompts, and the covariance of each."""
    for_planes, for_signals, for_noise = jax.random.split(key, 3)
    planes = jnp.linalg.qr(jax.random.normal(for_planes, (count, DIM, DIM)))[0][:, :, :2]
    clean = jnp.einsum("pdr,pnr->pnd", planes, jax.random.normal(for_signals, (count, tokens, 2)))
    covs = planes @ jnp.swapaxes(planes, 1, 2) + NOISE**2 * jnp.eye(DIM)
    return clean, clean + NOISE * jax.random.normal(for_noise, clean.shape), covs


# %% [markdown]
# ## Training
#
# Four layers $x \mapsto x + \Gamma(x)$, each with a softmax and an affine part: the weights are those of four `MultiHead` blocks. Adam is written
# out, since nothing else of an optimizer is needed.


# %%
def network(weights):
    """The attention of the network, ready to be iterated."""
    blocks = [tp.MultiHead([tp.Softmax(Q, K, V), tp.FeedForward(W)]) for Q, K, V, W in zip(*weights, strict=True)]
    return tp.Layered(blocks)


def loss(weights, clean, noisy):
    def forward(x):
        for Q, K, V, W in zip(*weights, strict=True):
            x = x + tp.Softmax(Q, K, V).token_velocity(x)[0] + x @ W.T
        return x

    return ((jax.vmap(forward)(noisy) - clean) ** 2).sum(-1).mean()


@partial(jax.jit, static_argnames="steps")
def train(weights, key, steps, rate=0.02):
    def step(carry, k):
        weights, first, second = carry
        value, slope = jax.value_and_grad(loss)(weights, *prompts(jax.random.fold_in(key, k), 16)[:2])
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, slope)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, slope)
        size = rate * jnp.minimum(1.0, 2.0 - 2.0 * k / steps)                                   # constant, then linear to zero
        weights = jax.tree.map(lambda w, m, v: w - size * m / (jnp.sqrt(v) + 1e-8), weights, first, second)
        return (weights, first, second), value

    zero = jax.tree.map(jnp.zeros_like, weights)
    (weights, _, _), losses = jax.lax.scan(step, (weights, zero, zero), jnp.arange(steps, dtype=float))
    return weights, losses


keys = jax.random.split(jax.random.key(0), 3)
begin = tuple(0.3 * jax.random.normal(jax.random.fold_in(keys[0], i), (LAYERS, DIM, DIM)) for i in range(3)) + (jnp.zeros((LAYERS, DIM, DIM)),)
weights, losses = train(begin, keys[1], steps=300)
clean, noisy, covs = prompts(keys[2], 64)
linear = covs[0] - NOISE**2 * jnp.eye(DIM)                                                  # the best linear map is known if the plane is
best = float(NOISE**2 * jnp.trace(linear @ jnp.linalg.inv(covs[0])))
print(f"squared error per token: noisy {DIM * NOISE**2:.2f}, trained {loss(weights, clean, noisy):.3f}, best with the plane given away {best:.3f}")

# %% [markdown]
# ## Prediction
#
# `iterate` with `ResidualLayers(1.0)` is the network itself. On a `Gaussian` it propagates mean and covariance exactly, on a `Cloud` it propagates
# tokens. The Gaussian knows the covariance of the prompt only, no token.

# %%
attention = network(weights)
exact = tl.iterate(attention, tp.ResidualLayers(1.0), tp.Gaussian(np.zeros(DIM), covs[0]), steps=LAYERS)


def through(tokens, key):
    """Eigenvalues of the covariance after each layer, for tokens of the first prompt."""
    cloud = tp.Gaussian(np.zeros(DIM), covs[0]).sample(tokens, key=key)
    return tl.iterate(attention, tp.ResidualLayers(1.0), cloud, steps=LAYERS).history["eigenvalues"]


few, many = np.stack([through(TOKENS, key) for key in range(12)]), through(4096, 99)
predicted = exact.history["eigenvalues"]
anisotropy = lambda values: values[..., 2] / values[..., 1]  # noqa: E731
print("signal over noise, by layer:")
print("  predicted      ", np.round(anisotropy(predicted), 2))
print("  4096 tokens    ", np.round(anisotropy(many), 2))
print("  64 tokens, mean", np.round(anisotropy(few).mean(0), 2))
print(f"largest relative distance of 4096 tokens from the prediction: {np.abs(many / predicted - 1).max():.2f}")

# %%
with paper_style():
    fig, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.36))
    left.plot(np.asarray(losses), color=COLORS["blue"], linewidth=0.7)
    left.axhline(best, **{**look(1), "marker": "", "linewidth": 1.0})
    left.set(xlabel="training step", ylabel="squared error per token", ylim=(0.3, 1.2))
    left.text(295, best * 1.02, "the plane given away", ha="right", va="bottom", fontsize="small", color=look(1)["color"])
    layers = np.arange(LAYERS + 1)
    for i in range(DIM):
        shade = COLORS["vermilion"] if i >= 2 else COLORS["blue"]
        right.fill_between(layers, few[:, :, i].min(0), few[:, :, i].max(0), color=shade, alpha=0.15, linewidth=0)
        right.plot(layers, predicted[:, i], "-", color=shade, label="_")
        right.plot(layers, many[:, i], "o", markersize=3.5, color=shade)
    right.set(xlabel="layer", ylabel="eigenvalues of the covariance", yscale="log", xticks=layers)
    right.text(0.05, predicted[0, 3] * 1.25, "the plane of the signals", color=COLORS["vermilion"], fontsize="small")
    right.text(0.05, predicted[0, 0] / 2.1, "noise", color=COLORS["blue"], va="top", fontsize="small")

# %% [markdown]
# Lines: predicted from weights and covariance. Points: 4096 tokens. Bands: twelve prompts of 64 tokens, as in training. The learned layers pull the
# two noise directions together and keep the plane, and the moment equations know by how much.
