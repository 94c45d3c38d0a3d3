# %% [markdown]
# # Your solver, with derivatives and their error
#
# A pendulum with a stiff torsion spring hangs at rest under a load. An engineer has a solver for the angle, written long ago: it iterates until it
# has had enough. Somebody else wants the derivative of the angle in the parameters. Differentiating the loop gives the derivative of the *loop*;
# the implicit function theorem gives that of the *solution*, but at a point that is not the solution. How wrong is each, and can it be told without
# knowing the answer?

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from theorylab import hypergradient as hg
from theorylab.lab.style import figsize, look, paper_style

LOAD, CHAIN = 1.4, 6


def balance(angles, stiffness):
    """Torques on a chain of pendulums: springs between neighbours, gravity, and a load at the end."""
    bent = jnp.diff(angles, prepend=0.0)
    springs = stiffness * (bent + bent**3)
    above = jnp.concatenate([springs[1:], jnp.zeros(1)])
    return springs - above + jnp.sin(angles) - jnp.where(jnp.arange(CHAIN) == CHAIN - 1, LOAD * jnp.cos(angles), 0.0)


def solver(sweeps):
    """Damped fixed-point iteration, as it was found."""
    def run(angles, stiffness):
        return jax.lax.fori_loop(0, sweeps, lambda _, a: a - 0.08 * balance(a, stiffness), angles)
    return run


stiffness = jnp.linspace(3.0, 2.0, CHAIN)
start = jnp.zeros(CHAIN)

# %% [markdown]
# ## Three ways to differentiate it
#
# * unrolled: `jacfwd` through the loop,
# * implicit: the decorator, at the point where the loop stopped,
# * polished: the decorator with one differentiated Newton step on top.

# %%
exact = hg.implicit(balance)(solver(20_000))
truth = jax.jacobian(exact, 1)(start, stiffness)
sweeps = (25, 50, 100, 200, 400, 800)
errors = {"unrolled": [], "implicit": [], "polished": []}
for count in sweeps:
    raw = solver(count)
    ways = {"unrolled": jax.jacfwd(raw, 1)}
    ways |= {name: jax.jacobian(hg.implicit(balance, correction=kind)(raw), 1) for name, kind in (("implicit", "none"), ("polished", "polish"))}
    for name, derivative in ways.items():
        errors[name].append(float(jnp.linalg.norm(derivative(start, stiffness) - truth) / jnp.linalg.norm(truth)))
for name, column in errors.items():
    print(f"{name:9s}", "  ".join(f"{e:.1e}" for e in column))

# %% [markdown]
# ## What a user sees
#
# The same as a bilevel problem, with the height of the load as the outer objective. `error_estimate` needs no exact solution.

# %%
problem = hg.Bilevel(None, lambda angles, _: jnp.sum(1 - jnp.cos(angles)), residual=balance, x=start, y=stiffness, symmetric=True)
best = hg.hypergradient(problem, exact(start, stiffness), stiffness, hg.Plain()).value
true_errors, estimates, corrected = [], [], []
for count in sweeps:
    found = hg.hypergradient(problem, solver(count)(start, stiffness), stiffness)
    true_errors.append(float(jnp.linalg.norm(found.value + found.correction - best)))
    estimates.append(float(found.error_estimate))
    corrected.append(float(jnp.linalg.norm(found.value - best)))
print("error of the plain formula ", np.array2string(np.array(true_errors), precision=1))
print("its estimate               ", np.array2string(np.array(estimates), precision=1))
print("error after the correction ", np.array2string(np.array(corrected), precision=1))

# %%
with paper_style():
    fig, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.36))
    for i, (name, column) in enumerate(errors.items()):
        left.loglog(sweeps, np.maximum(column, 1e-16), label=name, **look(i))
    left.set(xlabel="sweeps of the solver", ylabel="relative error of the Jacobian")
    left.legend()
    for i, (name, column) in enumerate((("plain formula", true_errors), ("estimate of its error", estimates), ("corrected", corrected))):
        right.loglog(sweeps, np.maximum(column, 1e-16), label=name, **look(i))
    right.set(xlabel="sweeps of the solver", ylabel="error of the hypergradient")
    right.legend()
    for ax in (left, right):
        ax.minorticks_off()
        ax.set_xticks(sweeps, [str(count) for count in sweeps])

# %% [markdown]
# The polished derivative has twice the digits of the implicit one at every number of sweeps, and the estimate lies on the error that it estimates.
