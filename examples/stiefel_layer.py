# %% [markdown]
# # An orthogonal layer in a trained model
#
# A recurrent network must remember the first thing it saw for a hundred steps. With a free recurrent matrix signals vanish or explode on the way;
# with an orthogonal one they keep their length. `theorylab.interop.optax.landing` keeps the matrix orthogonal without ever factoring it: two
# products more for each update, and the other parameters are trained by Adam as ever.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from theorylab.interop.optax import landing
from theorylab.lab.style import figsize, look, paper_style

WIDTH, SYMBOLS, DELAY, BATCH, UPDATES = 32, 4, 100, 32, 250


def predict(params, symbols):
    """Logits for the first symbol, after `DELAY` steps of noise."""
    key = jax.random.key(7)
    noise = 0.05 * jax.random.normal(key, (DELAY, WIDTH))
    state = params["read"][symbols]

    def step(state, push):
        return params["turn"] @ state + push, None

    return jax.lax.scan(step, state, noise)[0] @ params["write"]


def loss(params, symbols):
    states = jax.vmap(predict, (None, 0))(params, symbols)
    return optax.softmax_cross_entropy_with_integer_labels(states, symbols).mean()


def start(key):
    a, b, c = jax.random.split(key, 3)
    return {"turn": jnp.linalg.qr(jax.random.normal(a, (WIDTH, WIDTH)))[0], "read": jax.random.normal(b, (SYMBOLS, WIDTH)) / WIDTH**0.5,
            "write": jax.random.normal(c, (WIDTH, SYMBOLS)) / WIDTH**0.5}


# %% [markdown]
# ## Two optimizers
#
# `multi_transform` sends the recurrent matrix to one transformation and the rest to Adam. The plain rival gives all of it to Adam.

# %%
labels = {"turn": "turn", "read": "free", "write": "free"}
on_manifold = optax.chain(optax.clip_by_global_norm(1.0), landing(0.1, attraction="auto"))
optimizers = {"landing": optax.multi_transform({"turn": on_manifold, "free": optax.adam(1e-2)}, labels), "Adam": optax.adam(1e-2)}


def train(optimizer):
    params = start(jax.random.key(0))

    def update(carry, key):
        params, state = carry
        symbols = jax.random.randint(key, (BATCH,), 0, SYMBOLS)
        value, slope = jax.value_and_grad(loss)(params, symbols)
        updates, state = optimizer.update(slope, state, params)
        params = optax.apply_updates(params, updates)
        distance = jnp.linalg.norm(params["turn"].T @ params["turn"] - jnp.eye(WIDTH))
        return (params, state), (value, distance)

    keys = jax.random.split(jax.random.key(1), UPDATES)
    with jax.numpy_dtype_promotion("standard"):                                       # Adam mixes whole and real numbers
        return jax.jit(lambda: jax.lax.scan(update, (params, optimizer.init(params)), keys))()


# %%
curves = {}
for name, optimizer in optimizers.items():
    (params, _), (losses, distances) = train(optimizer)
    curves[name] = np.asarray(losses), np.asarray(distances)
    print(f"{name:8s} loss {losses[-1]:.2e}, largest |W'W - I| on the way {distances.max():.1e}, at the end {distances[-1]:.1e}")

# %%
with paper_style():
    fig, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.34))
    for i, (name, (losses, distances)) in enumerate(curves.items()):
        left.semilogy(np.maximum(losses, 1e-8), label=name, **look(i))
        right.semilogy(np.maximum(distances, 1e-16), label=name, **look(i))
    left.set(xlabel="update", ylabel="loss")
    right.set(xlabel="update", ylabel=r"$\|W^\top W - I\|$")
    left.legend()

# %% [markdown]
# Adam gets to a small loss, and then the matrix that made it possible blows the signals up. A step of the landing method may leave the manifold a
# little, and the next one draws it back; no retraction is ever computed. The same transformation takes a matrix $B$, rows of data, or the rows of the
# current batch, where the constraint is $X^\top B X = I$.
