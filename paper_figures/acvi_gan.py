"""A small constrained GAN: the offline stand-in for the image experiment, with its problem and its three methods.

Generator and discriminator are small networks on the 8 x 8 digits of scikit-learn; the weights of each satisfy random linear inequalities. PI-ACVI
takes Adam steps with fresh minibatches and a long first loop inside, so it is a method of its own here.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import theorylab as tl
from theorylab import acvi
from theorylab.core.keys import stream
from theorylab.lab import datasets
from theorylab.lab.figures import figure
from theorylab.lab.files import load_module
from theorylab.lab.style import figsize

pictures: ModuleType = load_module(Path(__file__).with_name("_acvi_pictures.py"))
SECOND = "Chavdarova, Yang, Pagliardini and Jordan, A Primal-Dual Approach to Solving Variational Inequalities with General Constraints"
NOISE = 16
GENERATOR, DISCRIMINATOR = (NOISE, 64, 64, 64), (64, 64, 64, 1)
WALLS, ROOM = 20, 0.05
SAMPLES, BATCH = 2000, 50
DUAL_STEPS = 20
Array = jax.Array


def _count(widths: tuple[int, ...]) -> int:
    return sum((a + 1) * b for a, b in pairwise(widths))


SIZE = _count(GENERATOR)


def _network(weights: Array, widths: tuple[int, ...], x: Array) -> Array:
    """Affine layers with leaky rectifiers between them; `weights` are all matrices and offsets in one vector."""
    at = 0
    for i, (a, b) in enumerate(pairwise(widths)):
        matrix, offset = weights[at : at + a * b].reshape(a, b), weights[at + a * b : at + (a + 1) * b]
        x, at = (jnp.where(x > 0, x, 0.2 * x) if i else x) @ matrix + offset, at + (a + 1) * b
    return x


def _first(widths: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random weights, normal with the variance 2 over the number of inputs, and offsets 0."""
    layers = [(rng.standard_normal(a * b) * (2 / a) ** 0.5, np.zeros(b)) for a, b in pairwise(widths)]
    return np.concatenate([part for layer in layers for part in layer]).astype(np.float32)


def starts(seeds: int) -> np.ndarray:
    """First weights of both networks for each seed."""
    return np.stack([np.concatenate([_first(widths, np.random.default_rng(seed)) for widths in (GENERATOR, DISCRIMINATOR)]) for seed in range(seeds)])


class Walls(tl.Module):
    """The halfspaces A w <= 0.05 with random unit normals, and the exact projection onto their intersection by its dual."""

    normals: Array
    gram: Array
    rate: Array

    @classmethod
    def make(cls, size: int, rng: np.random.Generator) -> Walls:
        normals = rng.standard_normal((WALLS, size))
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        gram = normals @ normals.T
        return cls(*(jnp.asarray(a, jnp.float32) for a in (normals, gram, 1 / np.linalg.norm(gram, 2))))

    def project(self, w: Array) -> Array:
        """Random normals in thousands of dimensions are nearly orthogonal, so each dual step gains a digit."""
        beyond = self.normals @ w - ROOM
        dual = jax.lax.fori_loop(0, DUAL_STEPS, lambda _, u: jnp.maximum(u + self.rate * (beyond - self.gram @ u), 0), jnp.zeros_like(beyond))
        return w - dual @ self.normals

    def violation(self, w: Array) -> Array:
        return jnp.max(jnp.maximum(self.normals @ w - ROOM, 0))


class ConstrainedGan(tl.Problem):
    """Both networks as one vector; the operator is that of the non-saturating logistic losses on a random minibatch."""

    images: Array
    walls: tuple[Walls, Walls]
    noise: Array
    mean: Array
    root: Array

    @classmethod
    def make(cls) -> ConstrainedGan:
        images, rng = datasets.load("digits").x / 8.0 - 1.0, np.random.default_rng(0)
        values, vectors = np.linalg.eigh(np.cov(images.T))
        walls = Walls.make(_count(GENERATOR), rng), Walls.make(_count(DISCRIMINATOR), rng)
        return cls(jnp.asarray(images, jnp.float32), walls, jnp.asarray(rng.standard_normal((SAMPLES, NOISE)), jnp.float32),
                   jnp.asarray(images.mean(0)), jnp.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T))

    def force(self, w: Array, key: Array) -> Array:
        """A stochastic value of the operator."""
        generator, discriminator = w[:SIZE], w[SIZE:]
        real = self.images[jax.random.randint(stream(key, "batch"), (BATCH,), 0, len(self.images))]
        noise = jax.random.normal(stream(key, "noise"), (BATCH, NOISE), w.dtype)

        def judged(weights: Array, x: Array) -> Array:
            return _network(weights, DISCRIMINATOR, x)[:, 0]

        def fooled(weights: Array) -> Array:
            return jax.nn.softplus(-judged(discriminator, self.draw(weights, noise))).mean()

        def caught(weights: Array) -> Array:
            fake = self.draw(generator, noise)
            return jax.nn.softplus(-judged(weights, real)).mean() + jax.nn.softplus(judged(weights, fake)).mean()

        return jnp.concatenate([jax.grad(fooled)(generator), jax.grad(caught)(discriminator)])

    def draw(self, generator: Array, noise: Array) -> Array:
        return jnp.tanh(_network(generator, GENERATOR, noise))

    def project(self, w: Array) -> Array:
        return jnp.concatenate([self.walls[0].project(w[:SIZE]), self.walls[1].project(w[SIZE:])])

    def metrics(self, x: Array) -> dict[str, Array]:
        """`distance`: the Frechet distance between Gaussians fitted to the pixels of the data and of 2000 samples; `violation` of the walls."""
        fake = self.draw(x[:SIZE], self.noise).astype(self.mean.dtype)
        values = jnp.linalg.eigvalsh(self.root @ jnp.cov(fake.T) @ self.root)
        shift = jnp.sum((fake.mean(0) - self.mean) ** 2)
        distance = shift + jnp.sum(fake.var(0, ddof=1)) + jnp.sum(self.root**2) - 2 * jnp.sum(jnp.sqrt(jnp.maximum(values, 0)))
        return {"distance": distance, "violation": jnp.maximum(self.walls[0].violation(x[:SIZE]), self.walls[1].violation(x[SIZE:]))}


class Adam(NamedTuple):
    """Moments of the gradient."""

    first: Array
    second: Array
    step: Array

    def move(self, gradient: Array, size: Array) -> tuple[Adam, Array]:
        """The moments after another gradient, and the step to take; decay rates 0.05 and 0.999."""
        step = self.step + 1
        first, second = 0.05 * self.first + 0.95 * gradient, 0.999 * self.second + 0.001 * gradient**2
        count = step.astype(gradient.dtype)
        scale = jnp.sqrt(second / (1 - 0.999**count)) + 1e-8
        return Adam(first, second, step), size * first / (1 - 0.05**count) / scale


def _no_moments(w: Array) -> Adam:
    return Adam(jnp.zeros_like(w), jnp.zeros_like(w), jnp.zeros((), jnp.int32))


class ProjectedAdam(tl.Method):
    """GDA with Adam steps and a projection after each; with `extrapolate` extragradient, which takes two gradients per step."""

    step_size: Any = tl.number(1e-3)
    extrapolate: bool = tl.choice(False)

    def init(self, problem, x0, *, key):
        return problem.project(x0), _no_moments(x0)

    def step(self, problem, state, *, key):
        w, adam = state
        at = w
        if self.extrapolate:
            adam, move = adam.move(problem.force(w, stream(key, "ahead")), self.step_size)
            at = problem.project(w - move)
        adam, move = adam.move(problem.force(at, key), self.step_size)
        return problem.project(w - move), adam

    def value(self, problem, state):
        return state[0]

    def cost(self, problem):
        return {"gradients": 2.0 if self.extrapolate else 1.0}


class Loop(NamedTuple):
    """x of the running inner loop, y and v = y + lambda / beta of the outer one, gradients left in this loop, moments."""

    x: Array
    y: Array
    v: Array
    left: Array
    adam: Adam


class PenalizedAdam(tl.Method):
    """PI-ACVI with Adam steps on the x-problem; a step is one gradient, the last one of a loop updates y and the multiplier."""

    step_size: Any = tl.number(1e-3)
    penalty: Any = tl.number(0.5)
    first: Any = tl.count(500)
    inner: Any = tl.count(20)

    def init(self, problem, x0, *, key):
        y = problem.project(x0)
        return Loop(y, y, y, self.first.astype(jnp.int32), _no_moments(x0))

    def step(self, problem, state, *, key):
        pull = self.penalty * (state.x - 2 * state.y + state.v)
        adam, move = state.adam.move(problem.force(state.x, key) + pull, self.step_size)
        x, done = state.x - move, state.left == 1
        v = jnp.where(done, state.v + x - state.y, state.v)
        y = jnp.where(done, problem.project(v), state.y)
        return Loop(x, y, v, jnp.where(done, self.inner.astype(jnp.int32), state.left - 1), adam)

    def value(self, problem, state):
        return state.y

    def cost(self, problem):
        return {"gradients": 1.0}


METHODS = {"GDA": ProjectedAdam(), "EG": ProjectedAdam(extrapolate=True), "PI-ACVI": PenalizedAdam()}
SHOWN = 8


@figure("acvi/constrained-gan", source=f"{SECOND}, constrained GAN; digits of scikit-learn in the place of MNIST",
        quick={"methods": ("PI-ACVI",), "seeds": 2, "gradients": 600, "every": 200},
        paper={"methods": tuple(METHODS), "seeds": 6, "gradients": 8000, "every": 500},
        caption="A generator (16-64-64-64) and a discriminator (64-64-64-1) on 8 x 8 digits, with 20 random halfspaces for the weights of each and "
                "exact projections. GDA and EG: projected Adam steps of 0.001 on batches of 50. PI-ACVI: the same inside a loop of 500 and then "
                r"loops of 20 gradients, $\beta = 0.5$. (a) Frechet distance of pixels by gradients of all weights (EG gets half as many updates); "
                "mean and standard error of 6 seeds. PI-ACVI is behind at 500, where its first feasible update comes, and level with the others in "
                "the end. One configuration, nothing tuned: no evidence of an advantage. (b) Digits, and samples of one seed.")
class ConstrainedGanFigure:
    """Distance by gradients, and samples."""

    @staticmethod
    def compute(progress, methods, seeds, gradients, every):
        problem, data = ConstrainedGan.make(), {}
        progress.start("methods", len(methods))
        for i, name in enumerate(methods):
            cost = int(METHODS[name].cost(problem)["gradients"])
            run = tl.iterate(problem, METHODS[name], starts(seeds), steps=gradients // cost, every=every // cost, runs=seeds, key=3)
            data |= {f"{what}/{name}": np.asarray(run.history[what]) for what in ("gradients", "distance", "violation")}
            data[f"samples/{name}"] = np.asarray(jax.jit(ConstrainedGan.draw)(problem, run.value[0][:SIZE], problem.noise[:SHOWN]))
            progress.update(i + 1, name)
        walls, far = problem.walls[0], starts(1)[0, :SIZE]
        normals = np.asarray(walls.normals, float)
        exact, found = acvi.hildreth(far.astype(float), normals, np.full(WALLS, ROOM)), jax.jit(Walls.project)(walls, far)
        return data | {"images": np.asarray(problem.images)[:SHOWN], "beyond": (normals @ far).max() - ROOM,
                       "projection": np.linalg.norm(np.asarray(found) - np.asarray(exact))}

    @staticmethod
    def draw(data):
        import matplotlib.pyplot as plt
        shown = [name for name in METHODS if f"distance/{name}" in data]
        from matplotlib.ticker import NullFormatter, ScalarFormatter

        picture, (left, right) = plt.subplots(1, 2, figsize=figsize(2, 0.36))
        for name in shown:
            distance = data[f"distance/{name}"]
            spread = distance.std(1, ddof=1) / np.sqrt(distance.shape[1])
            left.errorbar(data[f"gradients/{name}"], distance.mean(1), yerr=spread, label=name, marker=pictures.MARKS[name], markersize=3,
                          capsize=1.5, elinewidth=0.8, **pictures.LOOKS[name])
        left.set(xlabel="gradients", ylabel="Frechet distance", yscale="log", xlim=(0, None), ylim=(1.2, 70), yticks=(2, 5, 10, 20, 50))
        left.yaxis.set_major_formatter(ScalarFormatter())
        left.yaxis.set_minor_formatter(NullFormatter())
        left.legend()
        rows = [data["images"], *(data[f"samples/{name}"] for name in shown)]
        tiles = np.concatenate([np.concatenate([np.pad(tile.reshape(8, 8), 1, constant_values=1.0) for tile in row], axis=1) for row in rows])
        right.imshow(tiles, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        right.set(xticks=(), yticks=np.arange(len(rows)) * 10 + 4.5, yticklabels=["data", *shown])
        right.tick_params(length=0)
        for side in ("left", "bottom"):
            right.spines[side].set_visible(False)
        pictures.letters((left, right), ["distance", "samples"])
        return picture

    @staticmethod
    def expect(check, data, methods, seeds, gradients, every):
        check.above("the test point of the projection is outside by", data["beyond"], 0.1)
        check.below("distance of the projection from that of acvi.hildreth in double precision", data["projection"], 1e-5)
        for name in methods:
            check.below(f"{name}: violation of the constraints", data[f"violation/{name}"], 5e-6)
            check.below(f"{name}: mean distance in the end over that of the start", np.divide(*data[f"distance/{name}"].mean(1)[[-1, 0]]), 0.5)
        row = data["gradients/PI-ACVI"] == 4000
        if row.any():
            mean = {name: data[f"distance/{name}"][data[f"gradients/{name}"] == 4000].mean() for name in methods}
            check.below("PI-ACVI: mean distance after 4000 gradients over that of GDA", mean["PI-ACVI"] / mean["GDA"], 1.1)
